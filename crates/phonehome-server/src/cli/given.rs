//! What `serve` was given in all places: a flag wins over its variable, and that over the file of `--config`.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::File,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgAction, ArgMatches, Command, builder::Resettable, error::ErrorKind, parser::ValueSource};
use rustix::fs::OFlags;
use serde_json::Value;

/// The options of the subcommand `serve`, and what was given for them.
pub(super) struct Given {
    /// Of the whole line.
    pub(super) matches: ArgMatches,
    serve: Command,
    file: Option<ConfigFile>,
}

/// What a file says, by option, as on a command line.
struct ConfigFile {
    path: PathBuf,
    values: BTreeMap<String, Vec<OsString>>,
}

/// The subcommand that may have a file.
const SERVE: &str = "serve";

/// Most bytes of such a file: a thousand times what it needs, and little enough for a mistaken path.
const MAX_SIZE: u64 = 1024 * 1024;

/// Options that only make sense outside of the file.
const NOT_IN_FILE: [&str; 2] = ["config", "print-config"];

/// How alike a wrong and a right name must be for one to be a slip of the other: as clap has it.
const ALIKE: f64 = 0.7;

impl Given {
    /// Reads the line, the variables and, for `serve`, the file. A variable that is empty is one that is not set:
    /// manifests often have no other way to say so.
    pub(super) fn read(command: Command, line: &[OsString]) -> Result<Self, clap::Error> {
        let command = command.mut_subcommand(SERVE, without_empty_variables);
        let matches = command.clone().try_get_matches_from(line)?;
        let path = matches.subcommand_matches(SERVE).and_then(|serve| serve.get_one::<PathBuf>("config"));
        match path.cloned() {
            Some(path) => Self::with_file(command, line, &path),
            None => Ok(Self { matches, serve: serve_of(&command), file: None }),
        }
    }

    /// The same, with a file whatever the line says of one.
    pub(super) fn with_file(command: Command, line: &[OsString], path: &Path) -> Result<Self, clap::Error> {
        let blame = |kind, why: String| clap::Error::raw(kind, format!("{}: {why}\n", path.display()));
        let text = read(path).map_err(|error| blame(ErrorKind::Io, error.to_string()))?;
        let serve = serve_of(&command);
        let values = parse(&text, &serve).map_err(|why| blame(ErrorKind::ValueValidation, why))?;
        let file = ConfigFile { path: path.to_owned(), values };
        let mut command = command.mut_subcommand(SERVE, |serve| file.apply(serve));
        // The line and the variables are fine: they have been read before.
        let matches = command.try_get_matches_from_mut(line).map_err(|usage| blame(usage.kind(), usage.to_string()))?;
        Ok(Self { matches, serve, file: Some(file) })
    }

    /// All options as a file that could be given with `--config`, each with where its value comes from.
    pub(super) fn to_toml(&self) -> String {
        let mut text = concat!("# phonehome-server serve ", env!("CARGO_PKG_VERSION"), "\n").to_owned();
        let Some(matches) = self.matches.subcommand_matches(SERVE) else { return text };
        let mut heading = "";
        for arg in self.serve.get_arguments() {
            let Some(name) = key(arg) else { continue };
            let own = arg.get_help_heading().unwrap_or("Storage");
            if std::mem::replace(&mut heading, own) != own {
                text += &format!("\n# {own}\n");
            }
            text += &match value(arg, matches) {
                None => format!("# {name} is not set\n"),
                Some(value) => format!("{name} = {}  # {}\n", literal(&value), comment(&self.place(arg, matches))),
            };
        }
        text
    }

    /// Where a value comes from.
    fn place(&self, arg: &Arg, matches: &ArgMatches) -> String {
        let name = key(arg).unwrap_or_default();
        let source = matches.value_source(arg.get_id().as_str());
        if source == Some(ValueSource::CommandLine) {
            return format!("--{name}");
        }
        if source == Some(ValueSource::EnvVariable) {
            return arg.get_env().unwrap_or_default().to_string_lossy().into_owned();
        }
        let file = self.file.as_ref().filter(|file| file.values.contains_key(name));
        file.map_or("default".to_owned(), |file| file.path.display().to_string())
    }
}

impl ConfigFile {
    /// Makes what the file says the defaults, which are then checked like everything else.
    fn apply(&self, command: Command) -> Command {
        command.mut_args(|arg| match key(&arg).and_then(|name| self.values.get(name)) {
            Some(values) => arg.default_values(values.clone()),
            None => arg,
        })
    }
}

fn serve_of(command: &Command) -> Command {
    command.find_subcommand(SERVE).cloned().unwrap_or_default()
}

fn without_empty_variables(serve: Command) -> Command {
    let is_empty = |arg: &Arg| arg.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty());
    serve.mut_args(|arg| if is_empty(&arg) { arg.env(Resettable::Reset) } else { arg })
}

/// The name an option has in the file, if it may stand there.
fn key(arg: &Arg) -> Option<&str> {
    let name = arg.get_long()?;
    let is_help = matches!(arg.get_action(), ArgAction::Help | ArgAction::HelpLong | ArgAction::HelpShort);
    let is_other = is_help || matches!(arg.get_action(), ArgAction::Version) || NOT_IN_FILE.contains(&name);
    (!is_other).then_some(name)
}

/// Does not wait for the writer of a pipe, and takes nothing but a file of bounded size.
fn read(path: &Path) -> io::Result<String> {
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(nonblocking).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut text = String::new();
    file.take(MAX_SIZE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_SIZE {
        return Err(io::Error::other(format!("it is larger than {MAX_SIZE} bytes")));
    }
    Ok(text)
}

fn parse(text: &str, serve: &Command) -> Result<BTreeMap<String, Vec<OsString>>, String> {
    let table: BTreeMap<String, Value> = basic_toml::from_str(text).map_err(|error| error.to_string())?;
    let mut values = BTreeMap::new();
    for (name, value) in table {
        let arg = serve.get_arguments().find(|arg| key(arg) == Some(&name)).ok_or_else(|| unknown(&name, serve))?;
        let given = as_typed(&value, arg).map_err(|why| format!("{name}: {why}"))?;
        values.insert(name, vec![given]);
    }
    Ok(values)
}

/// The value as a command line would have it. No option of `serve` takes several.
fn as_typed(value: &Value, arg: &Arg) -> Result<OsString, String> {
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        let on = value.as_bool().ok_or_else(|| format!("it is {}, but must be true or false", kind(value)))?;
        return Ok(on.to_string().into());
    }
    match value {
        Value::String(text) => Ok(text.into()),
        Value::Number(number) => Ok(number.to_string().into()),
        Value::Array(_) | Value::Bool(_) | Value::Null | Value::Object(_) => {
            Err(format!("it is {}, but must be a text in quotation marks", kind(value)))
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Array(_) => "a list",
        Value::Bool(_) => "true or false",
        Value::Null => "nothing",
        Value::Number(_) => "a number",
        Value::Object(_) => "a table",
        Value::String(_) => "a text",
    }
}

fn unknown(name: &str, serve: &Command) -> String {
    if NOT_IN_FILE.contains(&name) {
        return format!("{name} cannot be set in a file");
    }
    let likeness = |known: &str| strsim::jaro(name, known);
    let nearest = serve.get_arguments().filter_map(key).max_by(|one, other| likeness(one).total_cmp(&likeness(other)));
    match nearest.filter(|known| likeness(known) > ALIKE) {
        Some(nearest) => format!("there is no option {name}; the nearest is {nearest}"),
        None => format!("there is no option {name}"),
    }
}

fn value(arg: &Arg, matches: &ArgMatches) -> Option<Value> {
    let id = arg.get_id().as_str();
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return Some(matches.get_flag(id).into());
    }
    matches.get_raw(id)?.next_back().map(|text| text.to_string_lossy().into())
}

/// JSON's texts and numbers are TOML's, but for one character that TOML wants escaped.
fn literal(value: &Value) -> String {
    value.to_string().replace('\u{7f}', "\\u007f")
}

/// A comment ends with its line.
fn comment(text: &str) -> String {
    text.replace(char::is_control, "?")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Args;

    #[test]
    fn a_flag_wins_over_the_file_and_that_over_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serve.toml");
        std::fs::write(&path, "data = \"/srv\"\nmax-builds = 7\ntls-self-signed = true\ntimeout = \"2h\"\n").unwrap();
        let text = shown(&["--config", path.to_str().unwrap(), "--timeout", "3h"]);
        for line in [
            format!("data = \"/srv\"  # {}", path.display()),
            format!("max-builds = \"7\"  # {}", path.display()),
            format!("tls-self-signed = true  # {}", path.display()),
            "timeout = \"3h\"  # --timeout".to_owned(),
            "grace-period = \"30s\"  # default".to_owned(),
            "# tls-cert is not set".to_owned(),
        ] {
            assert!(text.lines().any(|told| told == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn what_is_shown_can_be_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serve.toml");
        let text = shown(&["--data", "/a \"b\"", "--insecure"]);
        std::fs::write(&path, &text).unwrap();
        let again = shown(&["--config", path.to_str().unwrap()]);
        let values =
            |text: &str| text.lines().map(|line| line.split("  # ").next().unwrap().to_owned()).collect::<Vec<_>>();
        assert_eq!(values(&text), values(&again));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_file_and_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serve.toml");
        for (text, expected) in [
            ("listn = \"x\"", "there is no option listn; the nearest is listen"),
            ("print-config = true", "print-config cannot be set in a file"),
            ("insecure = \"yes\"", "insecure: it is a text, but must be true or false"),
            ("listen = [\"x\"]", "listen: it is a list, but must be a text in quotation marks"),
            ("listen = \"nowhere\"", "'nowhere'"),
            ("listen = ", "line 1"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = given(&["--config", path.to_str().unwrap()]).err().unwrap().to_string();
            assert!(error.contains(expected) && error.contains(path.to_str().unwrap()), "{error}");
        }
        assert!(given(&["--config", "/no/such/file"]).err().unwrap().to_string().contains("/no/such/file"));
    }

    fn given(words: &[&str]) -> Result<Given, clap::Error> {
        let line: Vec<_> = ["phonehome-server", "serve"].iter().chain(words).map(OsString::from).collect();
        Given::read(Args::command(), &line)
    }

    fn shown(words: &[&str]) -> String {
        given(words).unwrap().to_toml()
    }
}
