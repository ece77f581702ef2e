//! What the agent is asked to do: to run a command, or one of the few things it does itself.
//!
//! A command may be named as one of those. The first argument decides: `install x` is the agent's, `-- install x` is a
//! command.

use std::{ffi::OsString, path::PathBuf};

use clap::{Arg, ArgMatches, Command, builder::PossibleValuesParser, value_parser};

use crate::{
    config::{Given, Secret, nothing_but_a_command},
    log::Format,
};

/// What the agent is asked to do.
#[derive(Debug)]
pub enum Invocation {
    /// Run a command, or print how it would be run.
    Run(Box<Given>),
    /// Run this command; no option says how.
    RunPlain(Vec<OsString>),
    /// Put a copy of itself there.
    Install(PathBuf),
    /// Print this.
    Print(&'static str),
}

impl Invocation {
    /// Reads a command line, its first word being the agent's own name, and what else may say how to run. `token` is what
    /// its variable said before it was taken away.
    ///
    /// # Errors
    ///
    /// When it is not one, or asks for help.
    pub fn read(line: &[OsString], token: Option<Secret>) -> Result<Self, clap::Error> {
        match line.get(1).and_then(|first| first.to_str()) {
            Some(COMPLETIONS) => completions(line).map(Self::Print),
            Some(INSTALL) => destination(line).map(Self::Install),
            Some(MAN) => parse_own(man_command(), line).map(|_| Self::Print(MANUAL)),
            _ => match nothing_but_a_command(line, std::env::vars_os().map(|(name, _)| name)) {
                Some(command) if token.is_none() => Ok(Self::RunPlain(command.to_vec())),
                Some(_) | None => Given::read(line, token).map(|given| Self::Run(given.into())),
            },
        }
    }
}

const NAME: &str = "phonehome-agent";
const COMPLETIONS: &str = "completions";
const INSTALL: &str = "install";
const MAN: &str = "man";

fn completions(line: &[OsString]) -> Result<&'static str, clap::Error> {
    let mut matches = parse_own(completions_command(), line)?;
    let shell: String = matches.remove_one("SHELL").expect("it is required");
    let described = COMPLETIONS_OF.iter().find(|(known, _)| *known == shell);
    Ok(described.expect("clap knows the shells").1)
}

fn completions_command() -> Command {
    let shells = PossibleValuesParser::new(COMPLETIONS_OF.map(|(shell, _)| shell));
    let shell = Arg::new("SHELL").required(true).value_parser(shells).help("Shell to complete in");
    Command::new(COMPLETIONS).about("Print a script that completes the command line").arg(shell)
}

/// Made by the test below: what makes them would be two hundred KiB of a program that every builder image carries.
const COMPLETIONS_OF: [(&str, &str); 3] = [
    ("bash", include_str!("invocation/phonehome-agent.bash")),
    ("fish", include_str!("invocation/phonehome-agent.fish")),
    ("zsh", include_str!("invocation/_phonehome-agent")),
];

/// Likewise.
const MANUAL: &str = include_str!("invocation/phonehome-agent.1");

fn destination(line: &[OsString]) -> Result<PathBuf, clap::Error> {
    let mut matches = parse_own(install_command(), line)?;
    Ok(matches.remove_one("DEST").expect("it is required"))
}

fn install_command() -> Command {
    let dest = Arg::new("DEST").required(true).value_parser(value_parser!(PathBuf)).help("File, or directory");
    Command::new(INSTALL).about("Copy this program to DEST, as an init container does").arg(dest)
}

fn man_command() -> Command {
    Command::new(MAN).about("Print the manual page")
}

/// Reads what follows the name of one of the agent's own commands.
fn parse_own(command: Command, line: &[OsString]) -> Result<ArgMatches, clap::Error> {
    let name = command.get_name().to_owned();
    let words = line.iter().skip(1);
    command.bin_name(format!("{NAME} {name}")).try_get_matches_from(words).map_err(|usage| with_way_out(usage, &name))
}

/// Says how to run a command of that name.
fn with_way_out(usage: clap::Error, name: &str) -> clap::Error {
    if !usage.use_stderr() {
        return usage;
    }
    let words = usage.to_string();
    let words = words.trim_start_matches("error: ").trim_end();
    clap::Error::raw(usage.kind(), format!("{words}\n\nTo run a command named {name}: {NAME} [OPTIONS] -- {name}\n"))
}

/// The form in which to say that a line cannot be read. What it says of the form is seen through whatever is wrong with
/// it otherwise.
#[must_use]
pub fn log_format(line: &[OsString]) -> Format {
    const OPTION: &str = "--log-format";
    let words = line.iter().map(|word| word.to_str().unwrap_or_default());
    let options = words.take_while(|word| *word != "--");
    let mut given = std::env::var("PHONEHOME_LOG_FORMAT").ok();
    let mut is_next = false;
    for word in options {
        match word.strip_prefix(OPTION).and_then(|rest| rest.strip_prefix('=')) {
            Some(value) => given = Some(value.to_owned()),
            None if is_next => given = Some(word.to_owned()),
            None => {}
        }
        is_next = word == OPTION;
    }
    if given.as_deref() == Some("json") { Format::Json } else { Format::Text }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory;
    use clap_complete::Shell;

    use super::*;
    use crate::config::Args;

    fn line(words: &[&str]) -> Vec<OsString> {
        std::iter::once(&NAME).chain(words).map(OsString::from).collect()
    }

    #[test]
    fn only_the_first_argument_can_be_one_of_ours() {
        let read = |words: &[&str]| Invocation::read(&line(words), None);
        assert!(matches!(read(&["install", "x"]), Ok(Invocation::Install(dest)) if dest.as_os_str() == "x"));
        assert!(matches!(read(&["man"]), Ok(Invocation::Print(_))));
        for ran in [&["--", "install", "x"][..], &["--merge", "install", "x"], &["installer"], &["x", "install"]] {
            assert!(matches!(read(ran), Ok(Invocation::Run(_) | Invocation::RunPlain(_))), "{ran:?}");
        }
        for wrong in [&["install"][..], &["install", "a", "b"], &["man", "ls"], &["completions", "csh"]] {
            let error = read(wrong).unwrap_err().to_string();
            assert!(error.contains(&format!("{NAME} [OPTIONS] -- {}", wrong[0])), "{error}");
        }
    }

    /// With PHONEHOME_DESCRIBE=1 it writes them.
    #[test]
    fn the_completions_and_the_manual_are_up_to_date() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/invocation");
        let own = [install_command(), completions_command(), man_command()];
        let mut command = Args::command().disable_help_subcommand(true).subcommands(own);
        let mut texts = vec![("phonehome-agent.1", Vec::new())];
        clap_mangen::Man::new(command.clone()).render(&mut texts[0].1).unwrap();
        for (name, shell) in [
            ("phonehome-agent.bash", Shell::Bash),
            ("phonehome-agent.fish", Shell::Fish),
            ("_phonehome-agent", Shell::Zsh),
        ] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut command, NAME, &mut text);
            texts.push((name, text));
        }
        for (name, text) in texts {
            if std::env::var_os("PHONEHOME_DESCRIBE").is_some() {
                std::fs::write(folder.join(name), &text).unwrap();
            }
            let current = std::fs::read(folder.join(name)).unwrap();
            assert!(current == text, "{name} is out of date: run this test with PHONEHOME_DESCRIBE=1");
        }
    }

    #[test]
    fn the_form_of_an_error_is_found_in_a_wrong_line() {
        for (words, format) in [
            (&["--log-format", "json", "--odd"][..], Format::Json),
            (&["--odd", "--log-format=json"], Format::Json),
            (&["--log-format=json", "--log-format", "text"], Format::Text),
            (&["--", "--log-format=json"], Format::Text),
            (&["--log-format"], Format::Text),
        ] {
            assert_eq!(log_format(&line(words)), format, "{words:?}");
        }
    }
}
