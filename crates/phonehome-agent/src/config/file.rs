//! The file of `--config`: options by their long names, as TOML.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgAction, Command, error::ErrorKind};
use serde_json::Value;
use zeroize::Zeroizing;

/// What the file says, by option, as on a command line.
pub(super) struct ConfigFile {
    path: PathBuf,
    values: BTreeMap<String, Vec<OsString>>,
}

/// Most bytes of such a file: a thousand times what it needs, and little enough for a mistaken path.
const MAX_SIZE: usize = 1024 * 1024;

/// Options that only make sense outside of the file.
const NOT_IN_FILE: [&str; 2] = ["config", "print-config"];

/// How alike a wrong and a right name must be for one to be a slip of the other: as clap has it.
const ALIKE: f64 = 0.7;

/// The name an option has in the file, if it may stand there.
pub(super) fn key(arg: &Arg) -> Option<&str> {
    let name = if arg.is_positional() { arg.get_id().as_str() } else { arg.get_long()? };
    (!NOT_IN_FILE.contains(&name) && !matches!(arg.get_action(), ArgAction::Help | ArgAction::Version)).then_some(name)
}

/// Whether an option takes several values.
pub(super) fn is_list(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append) || arg.get_value_delimiter().is_some()
}

impl ConfigFile {
    /// Reads a file that speaks of the options of `command`.
    pub(super) fn read(path: &Path, command: &Command) -> Result<Self, clap::Error> {
        Self::parse(path, &read(path)?, command)
            .map_err(|why| clap::Error::raw(ErrorKind::ValueValidation, format!("{}: {why}\n", path.display())))
    }

    pub(super) fn parse(path: &Path, text: &str, command: &Command) -> Result<Self, String> {
        let table: BTreeMap<String, Value> = basic_toml::from_str(text).map_err(|error| error.to_string())?;
        let mut values = BTreeMap::new();
        for (name, value) in table {
            let arg = command.get_arguments().find(|arg| key(arg) == Some(&name));
            let arg = arg.ok_or_else(|| unknown(&name, command))?;
            let given = as_typed(&value, arg).map_err(|why| format!("{name}: {why}"))?;
            values.insert(name, given);
        }
        Ok(Self { path: path.to_owned(), values })
    }

    /// Makes what the file says the defaults of `command`, which then checks it as it does everything else.
    pub(super) fn apply(&self, command: Command) -> Command {
        command.mut_args(|arg| match key(&arg).and_then(|name| self.values.get(name)) {
            Some(values) => arg.default_values(values.clone()),
            None => arg,
        })
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What an error about an option begins with.
    pub(super) fn place(&self, name: &str) -> String {
        format!("{}: {name}", self.path.display())
    }
}

/// Among what it says are secrets.
impl fmt::Debug for ConfigFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigFile").field("path", &self.path).finish_non_exhaustive()
    }
}

fn read(path: &Path) -> Result<Zeroizing<String>, clap::Error> {
    let failed = |why: String| clap::Error::raw(ErrorKind::Io, format!("cannot read {}: {why}\n", path.display()));
    phonehome_env::file::read_text(path, MAX_SIZE).map_err(|error| failed(error.to_string()))
}

/// The value as a command line would have it.
fn as_typed(value: &Value, arg: &Arg) -> Result<Vec<OsString>, String> {
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        let on = value.as_bool().ok_or_else(|| format!("it is {}, but must be true or false", kind(value)))?;
        return Ok(vec![on.to_string().into()]);
    }
    match value.as_array().filter(|_| is_list(arg)) {
        Some(values) => values.iter().map(scalar).collect(),
        None => Ok(vec![scalar(value)?]),
    }
}

fn scalar(value: &Value) -> Result<OsString, String> {
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

fn unknown(name: &str, command: &Command) -> String {
    if NOT_IN_FILE.contains(&name) {
        return format!("{name} cannot be set in a file");
    }
    let likeness = |known: &str| strsim::jaro(name, known);
    let known = command.get_arguments().filter_map(key);
    let nearest = known.max_by(|one, other| likeness(one).total_cmp(&likeness(other)));
    match nearest.filter(|known| likeness(known) > ALIKE) {
        Some(nearest) => format!("there is no option {name}; the nearest is {nearest}"),
        None => format!("there is no option {name}"),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::config::Args;

    fn parse(text: &str) -> Result<ConfigFile, String> {
        ConfigFile::parse(Path::new("f"), text, &Args::command())
    }

    #[test]
    fn values_are_those_of_a_command_line() {
        let file =
            parse("linger = \"10s\"\nmerge = true\nspool-memory = 1048576\ncommand = [\"make\", \"all\"]").unwrap();
        let expected = [
            ("command", vec!["make", "all"]),
            ("linger", vec!["10s"]),
            ("merge", vec!["true"]),
            ("spool-memory", vec!["1048576"]),
        ];
        let expected =
            expected.map(|(name, values)| (name.to_owned(), values.into_iter().map(OsString::from).collect()));
        assert_eq!(file.values, BTreeMap::from(expected));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_key() {
        for (text, expected) in [
            ("lingr = \"1s\"", "there is no option lingr; the nearest is linger"),
            ("xyz = 1", "there is no option xyz"),
            ("print-config = true", "print-config cannot be set in a file"),
            ("help = true", "there is no option help"),
            ("merge = \"yes\"", "merge: it is a text, but must be true or false"),
            ("linger = true", "linger: it is true or false, but must be a text in quotation marks"),
            ("linger = [\"1s\"]", "linger: it is a list, but must be a text in quotation marks"),
            ("[linger]\nx = 1", "linger: it is a table, but must be a text in quotation marks"),
            ("command = [[\"a\"]]", "command: it is a list, but must be a text in quotation marks"),
        ] {
            assert_eq!(parse(text).unwrap_err(), expected, "{text}");
        }
        for (text, expected) in [("linger = ", "line 1"), ("linger = \"1s\"\nlinger = \"2s\"", "duplicate key")] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
