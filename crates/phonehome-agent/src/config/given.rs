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

use super::{Args, Secret, complaint, file::ConfigFile, show, siblings};

/// The command line, the variables and the file, put together: a flag wins over its variable, and that over the file.
pub struct Given {
    command: Command,
    matches: ArgMatches,
    file: Option<ConfigFile>,
    /// What the variable of the token said, before it was taken out of the environment.
    token: Option<Secret>,
}

/// The command, if it is all that was given: then there is nothing to read. `variables` are the names of all that are set.
///
/// Most lines are like this, and to put together what is known of sixty options would cost more than all the rest of a
/// short supervision.
pub(crate) fn nothing_but_a_command(
    line: &[OsString],
    variables: impl Iterator<Item = OsString>,
) -> Option<&[OsString]> {
    let (first, rest) = line.get(1..)?.split_first()?;
    let command = if first == "--" { rest } else { &line[1..] };
    let is_command = first == "--" || !first.is_empty() && !first.as_encoded_bytes().starts_with(b"-");
    let is_alone = is_command && !command.is_empty() && !{ variables }.any(|name| is_ours(&name));
    is_alone.then_some(command)
}

/// Whether a variable may be one that an option is read from.
fn is_ours(variable: &OsStr) -> bool {
    OURS.iter().any(|prefix| variable.as_encoded_bytes().starts_with(prefix.as_bytes()))
}

/// What the names of our variables begin with, and those of their aliases.
const OURS: [&str; 2] = ["PHONEHOME_", "KUBEXIT_"];

impl Given {
    /// Reads all of them. A variable that is empty is one that is not set: manifests often have no other way to say so.
    /// Some have an alias, which is read when they are not set.
    ///
    /// # Errors
    ///
    /// When something is wrong with one of them, or the line asks for help.
    pub fn read(line: &[OsString], token: Option<Secret>) -> Result<Self, clap::Error> {
        let mut command = definition();
        let matches = command.try_get_matches_from_mut(line).map_err(|usage| blame_line(usage, &command, line))?;
        let Some(path) = matches.get_one::<PathBuf>("config") else {
            return Self { command, matches, file: None, token }.with_command();
        };
        let file = ConfigFile::read(path, &command)?;
        // The line and the variables are fine: they have been read before.
        let blame = |usage, command: &Command| complaint::about(usage, command, |name, _| file.place(name));
        let mut command = file.apply(definition());
        let matches = command.try_get_matches_from_mut(line).map_err(|usage| blame(usage, &command))?;
        Self { command, matches, file: Some(file), token }.with_command()
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
        // All three say the same; the one from the strongest place counts.
        let place = |id| self.matches.value_source(id);
        let variable = self.token.is_some().then_some(ValueSource::EnvVariable);
        if variable > place("token") && variable >= place("token_file") {
            args.token_variable = self.token.clone();
            (args.token, args.token_file) = (None, None);
        } else if place("token_file") > place("token") {
            args.token = None;
        }
        args
    }

    /// The value of a variable, of the token's also now that it is taken out of the environment.
    #[must_use]
    pub fn variable(&self, name: &OsStr) -> Option<OsString> {
        let taken = self.token.as_ref().filter(|_| name == "PHONEHOME_TOKEN");
        taken.map(|token| token.expose().into()).or_else(|| std::env::var_os(name))
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
        options.map(|arg| {
            let setting = show::Setting::of(arg, &self.matches, self.file.as_ref());
            let is_taken =
                arg.get_id() == "token" && self.matches.value_source("token") != Some(ValueSource::CommandLine);
            if self.token.is_some() && is_taken { setting.taken_from(arg) } else { setting }
        })
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
    Args::command().mut_args(|arg| match arg.get_env().map(|own| source(own, std::env::var_os)) {
        Some(Source::Alias(alias)) => arg.env(alias),
        Some(Source::Nothing) => arg.env(Resettable::Reset),
        Some(Source::Own) | None => arg,
    })
}

/// Where the value of an option comes from that is not on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// From its variable.
    Own,
    /// From the variable of another program, because its own says nothing.
    Alias(&'static str),
    /// From nowhere: its variable is set to nothing.
    Nothing,
}

pub(super) fn source<'a>(own: &'a OsStr, value_of: impl Fn(&'a OsStr) -> Option<OsString>) -> Source {
    let is_set = |name| value_of(name).is_some_and(|value| !value.is_empty());
    match siblings::alias(own) {
        Some(alias) if !is_set(own) && is_set(OsStr::new(alias)) => Source::Alias(alias),
        Some(_) | None if is_set(own) || value_of(own).is_none() => Source::Own,
        Some(_) | None => Source::Nothing,
    }
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::config::{Config, ProxySettings};

    fn line(words: &[&str]) -> Vec<OsString> {
        std::iter::once(&"agent").chain(words).map(OsString::from).collect()
    }

    #[test]
    fn a_line_that_need_not_be_read_says_what_reading_it_would_say() {
        let checked = |args: Args| {
            let log = args.log();
            let others = (args.print_config, args.config.clone());
            let config = Config::try_from_args(args, &ProxySettings::default(), |_| None).unwrap();
            format!("{log:?} {others:?} {config:#?}")
        };
        for words in [&["--", "x"][..], &["x", "--merge"], &["x", "--", "y"], &["--", "--", "x"], &["--", "-x"]] {
            let line = line(words);
            let command = nothing_but_a_command(&line, std::iter::empty()).unwrap().to_vec();
            let plain = Args { command, ..Args::default() };
            assert_eq!(checked(plain), checked(Args::try_parse_from(&line).unwrap()), "{words:?}");
        }
    }

    #[test]
    fn a_token_that_was_taken_out_of_the_environment_can_be_redacted_by_name() {
        let line = line(&["--redact-env", "PHONEHOME_TOKEN", "--", "x"]);
        let given = Given::read(&line, Some(Secret::new("hunter22".into()))).unwrap();
        let config =
            Config::try_from_args(given.args(), &ProxySettings::default(), |name| given.variable(name)).unwrap();
        assert_eq!(config.redactor.unwrap().mask_text("a hunter22 b"), "a [redacted] b");
        assert!(given.variable(OsStr::new("PATH")).is_some());
    }

    #[test]
    fn everything_else_is_read() {
        for words in [&[][..], &["--"], &["--merge", "x"], &["-h"], &["-", "x"], &["", "x"]] {
            assert_eq!(nothing_but_a_command(&line(words), std::iter::empty()), None, "{words:?}");
        }
        for variable in Args::command().get_arguments().filter_map(|arg| arg.get_env()) {
            for name in [Some(variable), siblings::alias(variable).map(OsStr::new)].into_iter().flatten() {
                let others = ["PATH", "HOME"].map(OsString::from).into_iter();
                let all = others.chain([name.to_owned()]);
                assert_eq!(nothing_but_a_command(&line(&["--", "x"]), all), None, "{}", name.display());
            }
        }
    }
}
