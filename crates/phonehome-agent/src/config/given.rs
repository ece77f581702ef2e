//! What was given in all places: [`Given`].

use std::{
    ffi::{OsStr, OsString},
    fmt,
    path::PathBuf,
};

use clap::{
    ArgMatches, Command, CommandFactory, FromArgMatches, builder::Resettable, error::ErrorKind, parser::ValueSource,
};
use serde_json::{Map, Value};

use super::{Args, complaint, file::ConfigFile, show};

/// The command line, the variables and the file, put together: a flag wins over its variable, and that over the file.
pub struct Given {
    command: Command,
    matches: ArgMatches,
    file: Option<ConfigFile>,
}

impl Given {
    /// Reads all of them. A variable that is empty is one that is not set: manifests often have no other way to say so.
    ///
    /// # Errors
    ///
    /// When something is wrong with one of them, or the line asks for help.
    pub fn read(line: &[OsString]) -> Result<Self, clap::Error> {
        let mut command = definition();
        let matches = command.try_get_matches_from_mut(line).map_err(|usage| blame_line(usage, &command, line))?;
        let Some(path) = matches.get_one::<PathBuf>("config") else {
            return Self { command, matches, file: None }.with_command();
        };
        let file = ConfigFile::read(path, &command)?;
        // The line and the variables are fine: they have been read before.
        let blame = |usage, command: &Command| complaint::about(usage, command, |name, _| file.place(name));
        let mut command = file.apply(definition());
        let matches = command.try_get_matches_from_mut(line).map_err(|usage| blame(usage, &command))?;
        Self { command, matches, file: Some(file) }.with_command()
    }

    /// Nothing but the configuration can be printed without a command to run.
    fn with_command(mut self) -> Result<Self, clap::Error> {
        if self.matches.contains_id("command") || self.matches.get_flag("print_config") {
            return Ok(self);
        }
        Err(self.command.error(ErrorKind::MissingRequiredArgument, "there is no COMMAND to run"))
    }

    /// All of it as types.
    ///
    /// # Panics
    ///
    /// Never: [`Self::read`] has found all values fit.
    #[must_use]
    pub fn args(&self) -> Args {
        let mut args = Args::from_arg_matches(&self.matches).expect("clap has checked every value");
        // Both say the same; the one from the stronger place counts.
        if self.matches.value_source("token_file") > self.matches.value_source("token") {
            args.token = None;
        }
        args
    }

    /// The options that have a value, by name, for the log: secrets are hidden, and so are the command's arguments, among
    /// which nobody knows them.
    #[must_use]
    pub fn settings(&self) -> Map<String, Value> {
        self.all().filter_map(|setting| Some((setting.name.to_owned(), setting.for_log()?))).collect()
    }

    /// All options as a file that could be given with `--config`.
    #[must_use]
    pub fn to_toml(&self) -> String {
        show::toml(self.all())
    }

    fn all(&self) -> impl Iterator<Item = show::Setting<'_>> {
        let options = self.command.get_arguments().filter(|arg| super::file::key(arg).is_some());
        options.map(|arg| show::Setting::of(arg, &self.matches, self.file.as_ref()))
    }
}

/// Among what was given are secrets.
impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Given").finish_non_exhaustive()
    }
}

/// The options as they are when nothing is given.
fn definition() -> Command {
    let is_empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    Args::command().mut_args(|arg| if arg.get_env().is_some_and(is_empty) { arg.env(Resettable::Reset) } else { arg })
}

/// Says where a wrong value was given: on the line, which is read first, or in a variable.
fn blame_line(usage: clap::Error, command: &Command, line: &[OsString]) -> clap::Error {
    let mut no_variables = Args::command().mut_args(|arg| arg.env(Resettable::Reset));
    let on_line = no_variables.try_get_matches_from_mut(line).is_err_and(|error| error.kind() == usage.kind());
    complaint::about(usage, command, |name, variable| match variable {
        Some(variable) if !on_line => variable.to_string_lossy().into_owned(),
        _ => format!("--{name}"),
    })
}

/// Where a value comes from.
pub(super) fn place(arg: &clap::Arg, matches: &ArgMatches, file: Option<&ConfigFile>) -> Option<String> {
    let name = super::file::key(arg)?;
    let source = matches.value_source(arg.get_id().as_str())?;
    Some(if source == ValueSource::CommandLine {
        if arg.is_positional() { "command line".to_owned() } else { format!("--{name}") }
    } else if source == ValueSource::EnvVariable {
        arg.get_env()?.to_string_lossy().into_owned()
    } else {
        file.filter(|file| file.has(name)).map_or("default".to_owned(), |file| file.path().display().to_string())
    })
}
