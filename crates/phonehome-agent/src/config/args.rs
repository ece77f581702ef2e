//! The command line as typed: [`Args`].

use std::{ffi::OsString, path::PathBuf, time::Duration};

use bytesize::ByteSize;
use clap::{Parser, ValueEnum};

use super::{LabelsArgs, RedactArgs, Secret, siblings::SiblingsArgs, supervision::SupervisionArgs};
use crate::log::{self, Format, Trace};

/// Runs a build command, streams its output to a phonehome server and exits as the command did.
///
/// Made to be the entrypoint of a builder image. The command's standard output and standard error are copied to the
/// agent's own (--tee) and sent to the server, which confirms every byte; after the command's end the agent stays
/// until the server has accepted the whole log, or for --linger. Whatever happens on the network, the exit code is
/// the command's.
///
/// Every option can be given as a variable instead, shown in brackets, or in a file (--config): a flag wins over its
/// variable, and that over the file.
#[derive(Parser)]
#[command(
    name = "phonehome-agent",
    version,
    override_usage = "phonehome-agent [OPTIONS] [--] COMMAND [ARG]...\n       \
                      phonehome-agent install DEST\n       \
                      phonehome-agent completions SHELL\n       \
                      phonehome-agent man",
    after_help = "Commands of the agent itself, when they are its first argument:\n  \
                  install DEST       Copy this program to DEST, a file or a directory, as an init container does\n  \
                  completions SHELL  Print what completes the command line in bash, fish or zsh\n  \
                  man                Print the manual page\n\n\
                  Exit code: the command's; 128+N when signal N ended it; 127 command not found; 126 not executable; \
                  143 when TERM came before it was started; 125 when the agent itself could not do its work.\n\n\
                  Example: phonehome-agent --url wss://10.0.0.7:4443 --build 42 --token-file /run/token -- make all",
    max_term_width = 100
)]
pub struct Args {
    /// Where to phone home: wss://HOST:PORT[/PREFIX], or ws:// without encryption. Without it the command runs unobserved
    ///
    /// A wss:// address is reached through the proxy in HTTPS_PROXY, unless NO_PROXY names its host.
    #[arg(long, env = "PHONEHOME_URL", value_name = "URL", help_heading = "Where to")]
    pub url: Option<String>,

    /// Build this output belongs to; required with a URL
    #[arg(long, env = "PHONEHOME_BUILD", value_name = "ID", help_heading = "Where to")]
    pub build: Option<String>,

    /// Step of the build, usually one per container [default: main]
    #[arg(long, env = "PHONEHOME_STEP", value_name = "NAME", help_heading = "Where to")]
    pub step: Option<String>,

    /// Secret of this build; never shown, never passed on to the command. Prefer the variable or --token-file
    #[arg(long, env = "PHONEHOME_TOKEN", value_name = "TOKEN", hide_env_values = true, help_heading = "Trust")]
    pub token: Option<String>,

    /// What the variable of the token said.
    #[arg(skip)]
    pub token_variable: Option<Secret>,

    /// File that holds the token
    #[arg(long, env = "PHONEHOME_TOKEN_FILE", value_name = "PATH", help_heading = "Trust")]
    pub token_file: Option<PathBuf>,

    /// PEM file of roots to trust, in place of the system's
    #[arg(long, env = "PHONEHOME_CA", value_name = "PATH", help_heading = "Trust")]
    pub ca: Option<PathBuf>,

    /// Public key the server must have, sha256:HEX of its SubjectPublicKeyInfo. Needs no CA, and wins over --ca
    #[arg(long, env = "PHONEHOME_PIN", value_name = "PIN", help_heading = "Trust")]
    pub pin: Option<String>,

    /// PEM file of this agent's certificate, for mutual TLS
    #[arg(long, env = "PHONEHOME_CLIENT_CERT", value_name = "PATH", help_heading = "Trust")]
    pub client_cert: Option<PathBuf>,

    /// PEM file of its private key
    #[arg(long, env = "PHONEHOME_CLIENT_KEY", value_name = "PATH", help_heading = "Trust")]
    pub client_key: Option<PathBuf>,

    /// Copy the command's output to the agent's own as well, so that the node's log still works
    #[arg(long, env = "PHONEHOME_TEE", value_name = "WHEN", value_enum, default_value_t, help_heading = "Output")]
    pub tee: Switch,

    /// One pipe for both streams: their exact order, but no distinction; all of it is stdout
    #[arg(long, env = "PHONEHOME_MERGE", value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Output")]
    pub merge: bool,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would make it the help text of the whole")]
    pub supervision: SupervisionArgs,

    /// How long to stay after the command's end until the server has accepted its log
    #[arg(long, env = "PHONEHOME_LINGER", value_name = "TIME", default_value = LINGER, value_parser = duration, help_heading = "Delivery")]
    pub linger: Duration,

    /// Start the command now and hold its output until the server answers, or wait for the server first
    #[arg(long, env = "PHONEHOME_START", value_name = "WHEN", value_enum, default_value_t, help_heading = "Delivery")]
    pub start: Start,

    /// Memory for output that the server has not confirmed yet. When it is full the command waits; nothing is lost
    #[arg(
        long,
        env = "PHONEHOME_SPOOL_MEMORY",
        value_name = "SIZE",
        default_value = SPOOL_MEMORY,
        value_parser = size,
        help_heading = "Delivery"
    )]
    pub spool_memory: ByteSize,

    /// Directory for output that the server does not confirm in time, when memory is not enough and for the next agent
    /// after a restart of the container. Without it there is memory only
    #[arg(long, env = "PHONEHOME_SPOOL_DIR", value_name = "PATH", help_heading = "Delivery")]
    pub spool_dir: Option<PathBuf>,

    /// Most bytes in that directory
    #[arg(long, env = "PHONEHOME_SPOOL_LIMIT", value_name = "SIZE", default_value = SPOOL_LIMIT, value_parser = size, help_heading = "Delivery")]
    pub spool_limit: ByteSize,

    /// When all of that is full: block the command, so that nothing is lost, or drop the middle of the output and say how
    /// much
    #[arg(
        long,
        env = "PHONEHOME_OVERFLOW",
        value_name = "POLICY",
        value_enum,
        default_value_t,
        help_heading = "Delivery"
    )]
    pub overflow: Overflow,

    /// How long the server may confirm nothing before --on-offline applies; off for no limit
    #[arg(long, env = "PHONEHOME_OFFLINE_LIMIT", value_name = "TIME", default_value = OFFLINE_LIMIT, value_parser = limit, help_heading = "Delivery")]
    pub offline_limit: Limit,

    /// After that: continue, no longer waiting for room, or stop the command
    #[arg(
        long,
        env = "PHONEHOME_ON_OFFLINE",
        value_name = "WHAT",
        value_enum,
        default_value_t,
        help_heading = "Delivery"
    )]
    pub on_offline: OnOffline,

    /// Exit with 125 when the server has not accepted the complete log. Otherwise delivery never changes the exit code
    #[arg(long, env = "PHONEHOME_REQUIRE_DELIVERY", value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Delivery")]
    pub require_delivery: bool,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would make it the help text of the whole")]
    pub redact: RedactArgs,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would make it the help text of the whole")]
    pub labels: LabelsArgs,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would make it the help text of the whole")]
    pub siblings: SiblingsArgs,

    /// Form of the agent's own log, on standard error
    #[arg(
        long,
        env = "PHONEHOME_LOG_FORMAT",
        value_name = "FORMAT",
        value_enum,
        default_value_t,
        help_heading = "Own log"
    )]
    pub log_format: Format,

    /// Least severity of it
    #[arg(
        long,
        env = "PHONEHOME_LOG_LEVEL",
        value_name = "LEVEL",
        value_enum,
        default_value_t,
        help_heading = "Own log"
    )]
    pub log_level: Level,

    /// What becomes of its finer lines: ring keeps the latest and shows them before an error; live, or live:MODULE,..., shows
    /// them at once; off
    #[arg(long, env = "PHONEHOME_TRACE", value_name = "HOW", default_value = TRACE, value_parser = trace, help_heading = "Own log")]
    pub trace: Trace,

    /// TOML file of options: each key is an option's long name, and command is the COMMAND
    #[arg(long, env = "PHONEHOME_CONFIG", value_name = "PATH", help_heading = "Configuration")]
    pub config: Option<PathBuf>,

    /// Check and print all options, where each comes from, as such a file; run nothing. Secrets are left out
    #[arg(long, help_heading = "Configuration")]
    pub print_config: bool,

    /// Command to run, with its arguments; they are passed on untouched
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// What they are when nothing is given. Clap makes the same of an empty line, a hundred times as slowly.
impl Default for Args {
    fn default() -> Self {
        Self {
            url: None,
            build: None,
            step: None,
            token: None,
            token_variable: None,
            token_file: None,
            ca: None,
            pin: None,
            client_cert: None,
            client_key: None,
            tee: Switch::default(),
            merge: false,
            supervision: SupervisionArgs::default(),
            linger: parsed(LINGER, duration),
            start: Start::default(),
            spool_memory: parsed(SPOOL_MEMORY, size),
            spool_dir: None,
            spool_limit: parsed(SPOOL_LIMIT, size),
            overflow: Overflow::default(),
            offline_limit: parsed(OFFLINE_LIMIT, limit),
            on_offline: OnOffline::default(),
            require_delivery: false,
            redact: RedactArgs::default(),
            labels: LabelsArgs::default(),
            siblings: SiblingsArgs::default(),
            log_format: Format::default(),
            log_level: Level::default(),
            trace: parsed(TRACE, trace),
            config: None,
            print_config: false,
            command: Vec::new(),
        }
    }
}

// What these options are when they are not given.
const LINGER: &str = "30s";
const SPOOL_MEMORY: &str = "8MiB";
const SPOOL_LIMIT: &str = "1GiB";
const OFFLINE_LIMIT: &str = "10m";
const TRACE: &str = "ring";

/// An option's default as its value.
pub(super) fn parsed<T>(default: &str, parse: impl Fn(&str) -> Result<T, Unfit>) -> T {
    parse(default).expect("a default fits its option")
}

impl Args {
    /// How to log.
    #[must_use]
    pub fn log(&self) -> log::Settings {
        log::Settings { format: self.log_format, level: self.log_level, trace: self.trace.clone() }
    }
}

/// Why a text cannot be the value of an option. It follows `'TEXT' is`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Unfit(pub(crate) &'static str);

const NO_TIME: Unfit = Unfit("not a time, such as 30s or 5m");

/// A time that can be added to the clock.
pub(super) fn duration(text: &str) -> Result<Duration, Unfit> {
    let duration = humantime::parse_duration(text).map_err(|_| NO_TIME)?;
    if duration > MAX_DURATION { Err(Unfit("more than 10 years")) } else { Ok(duration) }
}

fn size(text: &str) -> Result<ByteSize, Unfit> {
    text.parse().map_err(|_| Unfit("not a size, such as 512KiB or 8MiB"))
}

fn trace(text: &str) -> Result<Trace, Unfit> {
    Trace::parse(text).ok_or(Unfit("none of off, ring, live and live:MODULE,..."))
}

/// A time limit, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit(pub Option<Duration>);

pub(super) fn limit(text: &str) -> Result<Limit, Unfit> {
    let why = |unfit| if unfit == NO_TIME { Unfit("neither off nor a time, such as 30s or 5m") } else { unfit };
    if text == "off" { Ok(Limit(None)) } else { duration(text).map(|limit| Limit(Some(limit))).map_err(why) }
}

/// Longest duration that an option takes: ten years.
const MAX_DURATION: Duration = Duration::from_secs(10 * 366 * 24 * 60 * 60);

/// A choice between two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Do it.
    #[default]
    On,
    /// Leave it.
    Off,
}

/// When to start the command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Start {
    /// At once.
    #[default]
    Now,
    /// When the server has welcomed this agent.
    Connected,
}

/// What becomes of output for which there is no room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Overflow {
    /// It stays in the pipe, and the command waits.
    #[default]
    Block,
    /// The middle is left out and counted; the beginning and the newest output stay.
    Drop,
}

/// What to do when the server has been out of reach for too long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum OnOffline {
    /// Let the command go on, dropping output if need be.
    #[default]
    Continue,
    /// End the command.
    Stop,
}

/// Least severity of a line in the agent's own log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// The agent failed.
    Error,
    /// A person should look.
    #[default]
    Warn,
    /// One line for each thing that happens.
    Info,
    /// Every decision.
    Debug,
    /// Every frame.
    Trace,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_option_stands_in_the_documentation_with_its_variable_and_its_default() {
        let page = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/agent.md"));
        for arg in Args::command().get_opts().filter(|arg| !arg.is_hide_set()) {
            let name = arg.get_long().expect("an option has a long name");
            let row = page.lines().find(|line| line.starts_with(&format!("| `--{name}` |")));
            let columns: Vec<_> = row.unwrap_or_else(|| panic!("--{name} has no row")).split(" | ").collect();
            let variable = arg.get_env().map_or("none".into(), |variable| format!("`{}`", variable.to_string_lossy()));
            assert!(columns[1].starts_with(&variable), "--{name}: {columns:?}");
            for default in arg.get_default_values().iter().filter(|_| arg.get_action().takes_values()) {
                assert_eq!(columns[2], format!("`{}`", default.to_string_lossy()), "--{name}");
            }
        }
    }

    #[test]
    fn what_follows_the_command_is_its_own_and_what_precedes_it_is_ours() {
        let args = Args::try_parse_from(["agent", "--merge", "make", "-j8", "--merge", "--", "x"]).unwrap();
        assert_eq!(args.command, ["make", "-j8", "--merge", "--", "x"]);
        let args = Args::try_parse_from(["agent", "--", "--odd-name", "-v"]).unwrap();
        assert_eq!(args.command, ["--odd-name", "-v"]);
        assert!(Args::try_parse_from(["agent", "--no-such-option", "make"]).is_err());
    }

    #[test]
    fn a_duration_has_an_end() {
        assert_eq!(duration("10years"), Ok(humantime::parse_duration("10years").unwrap()));
        assert_eq!(duration("400000000000years"), Err(Unfit("more than 10 years")));
        assert_eq!(duration("11years"), Err(Unfit("more than 10 years")));
    }
}
