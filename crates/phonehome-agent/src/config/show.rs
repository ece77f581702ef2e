//! The configuration as it is in effect, for people and as a file.

use clap::{Arg, ArgAction, ArgMatches};
use serde_json::Value;

use super::{
    file::{self, ConfigFile},
    given,
};

/// One option.
#[derive(Debug)]
pub(super) struct Setting<'a> {
    pub(super) name: &'a str,
    heading: &'a str,
    value: Option<Shown>,
    is_command: bool,
    /// Where the value comes from.
    place: Option<String>,
}

/// A value, as far as it can be shown.
#[derive(Debug)]
enum Shown {
    /// As TOML and JSON have it.
    Whole(Value),
    /// It has bytes that are no text.
    Lossy(Value),
    Secret,
}

const SECRET: &str = "[secret]";

impl<'a> Setting<'a> {
    pub(super) fn of(arg: &'a Arg, matches: &ArgMatches, file: Option<&ConfigFile>) -> Self {
        Self {
            name: file::key(arg).unwrap_or_default(),
            heading: arg.get_help_heading().unwrap_or(if arg.is_positional() { "Command" } else { "Options" }),
            value: value(arg, matches),
            is_command: arg.is_positional(),
            place: given::place(arg, matches, file),
        }
    }

    /// The same option, whose value was in its variable until that was taken away.
    pub(super) fn taken_from(self, arg: &Arg) -> Self {
        let place = arg.get_env().map(|variable| variable.to_string_lossy().into_owned());
        Self { value: Some(Shown::Secret), place, ..self }
    }

    /// The value as the log may show it: `[secret]` for a secret, and of the command only the program.
    pub(super) fn for_log(&self) -> Option<Value> {
        match self.value.as_ref()? {
            Shown::Whole(value) | Shown::Lossy(value) if self.is_command => value.get(0).cloned(),
            Shown::Whole(value) | Shown::Lossy(value) => Some(value.clone()),
            Shown::Secret => Some(SECRET.into()),
        }
    }

    /// A line of the file. What could not be read back is a comment.
    fn line(&self) -> String {
        let Self { name, place, .. } = self;
        let place = place.as_deref().unwrap_or_default();
        match &self.value {
            None => format!("# {name} is not set\n"),
            Some(Shown::Whole(value)) => format!("{name} = {}  # {}\n", literal(value), comment(place)),
            Some(Shown::Lossy(value)) => format!("# {name} = {}  # {}, not UTF-8\n", literal(value), comment(place)),
            Some(Shown::Secret) => format!("# {name} = \"{SECRET}\"  # {}\n", comment(place)),
        }
    }
}

/// All settings as a file.
pub(super) fn toml<'a>(settings: impl Iterator<Item = Setting<'a>>) -> String {
    let mut text =
        concat!("# phonehome-agent ", env!("CARGO_PKG_VERSION"), ", each option and where it comes from\n").to_owned();
    let mut heading = "";
    for setting in settings {
        if setting.heading != heading {
            heading = setting.heading;
            text += &format!("\n# {heading}\n");
        }
        text += &setting.line();
    }
    text
}

fn value(arg: &Arg, matches: &ArgMatches) -> Option<Shown> {
    let id = arg.get_id().as_str();
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return Some(Shown::Whole(matches.get_flag(id).into()));
    }
    let raw: Vec<_> = matches.get_raw(id)?.collect();
    if arg.is_hide_env_values_set() {
        return Some(Shown::Secret);
    }
    let mut texts = raw.iter().map(|text| Value::from(text.to_string_lossy()));
    let value = if file::is_list(arg) { texts.collect() } else { texts.next_back()? };
    let is_text = raw.iter().all(|text| text.to_str().is_some());
    Some(if is_text { Shown::Whole(value) } else { Shown::Lossy(value) })
}

/// JSON's texts, lists and numbers are TOML's, but for one character that TOML wants escaped.
fn literal(value: &Value) -> String {
    value.to_string().replace('\u{7f}', "\\u007f")
}

/// A comment ends with its line.
fn comment(text: &str) -> String {
    text.replace(char::is_control, "?")
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::Path};

    use clap::Command;

    use super::*;

    #[test]
    fn every_text_is_read_back_as_it_was() {
        let text: String = (0..=0x2ff).filter_map(char::from_u32).chain("\u{2028}€😀".chars()).collect();
        for value in [Value::from(text.clone()), Value::from(vec![text, String::new()])] {
            let read: BTreeMap<String, Value> = basic_toml::from_str(&format!("x = {}", literal(&value))).unwrap();
            assert_eq!(read["x"], value);
        }
    }

    /// What `line` and a file make of options that others may add: a list, a list in one word, a secret.
    fn shown(text: &str, line: &[&str]) -> String {
        let list = Arg::new("wait_for").long("wait-for").action(ArgAction::Append);
        let word = Arg::new("redact_env").long("redact-env").action(ArgAction::Set).value_delimiter(',');
        let secret = Arg::new("key").long("key").action(ArgAction::Set).env("NO_SUCH_VARIABLE").hide_env_values(true);
        let command = Command::new("agent").args([list, word, secret]);
        let file = ConfigFile::parse(Path::new("f"), text, &command).unwrap();
        let mut command = file.apply(command);
        let matches = command.try_get_matches_from_mut(line).unwrap();
        toml(
            command
                .get_arguments()
                .filter(|arg| file::key(arg).is_some())
                .map(|arg| Setting::of(arg, &matches, Some(&file))),
        )
    }

    #[test]
    fn a_list_is_one_in_the_file_on_the_line_and_when_shown() {
        let text = "wait-for = [\"a=1\", \"b=2\"]\nredact-env = [\"A\", \"B\"]\nkey = \"hunter2\"";
        let from_file = shown(text, &["agent"]);
        assert!(from_file.contains("wait-for = [\"a=1\",\"b=2\"]  # f\n"), "{from_file}");
        assert!(from_file.contains("redact-env = [\"A\",\"B\"]  # f\n"), "{from_file}");
        assert!(from_file.contains("# key = \"[secret]\"  # f\n"), "{from_file}");
        let from_line = shown(text, &["agent", "--wait-for", "c=3", "--redact-env", "C,D"]);
        assert!(from_line.contains("wait-for = [\"c=3\"]  # --wait-for\n"), "{from_line}");
        assert!(from_line.contains("redact-env = [\"C\",\"D\"]  # --redact-env\n"), "{from_line}");
    }
}
