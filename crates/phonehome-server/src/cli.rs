//! The command line: arguments as typed, settings as checked, and what the process exits with.

mod client;
mod given;
mod healthcheck;
mod hook_args;
mod rebuild;
mod serve_args;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, error::ErrorKind};
use tokio::sync::mpsc;
use tracing::level_filters::LevelFilter;

use self::{given::Given, hook_args::HookArgs, serve_args::ServeArgs};
use crate::hook::{self, Notice, notices};

/// Receives builds that phone home.
///
/// A builder's entrypoint, phonehome-agent, runs the build command and streams its output to this server, which proves
/// by counts and a digest that it has every byte. No orchestrator is asked for anything.
#[derive(Parser)]
#[command(name = "phonehome-server", version, max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Hook(Box<HookArgs>),
    Serve(Box<ServeArgs>),
    Rebuild(rebuild::RebuildArgs),
    CheckConfig(serve_args::CheckConfigArgs),
    #[command(flatten)]
    Client(Box<client::ClientCommand>),
    Healthcheck(healthcheck::HealthcheckArgs),
}

/// Least severity of a line in the server's own log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Level {
    /// The server failed.
    Error,
    /// A person should look.
    Warn,
    /// One line for each thing that happens to a build.
    Info,
    /// Every decision.
    Debug,
    /// Every frame.
    Trace,
}

/// Form of the server's own log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

impl From<Level> for LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Error => Self::ERROR,
            Level::Warn => Self::WARN,
            Level::Info => Self::INFO,
            Level::Debug => Self::DEBUG,
            Level::Trace => Self::TRACE,
        }
    }
}

/// Exit code of a failure of the server itself: a build rarely uses it, and 1 or 2 would look like a build's own.
const EXIT_FAILURE: u8 = 125;

/// Runs the command that the process was started with.
#[must_use]
pub fn main() -> ExitCode {
    let line: Vec<_> = std::env::args_os().collect();
    let read = Given::read(Args::command(), &line);
    match read.and_then(|given| Ok((Args::from_arg_matches(&given.matches)?, given))) {
        Ok((args, given)) => ExitCode::from(run(args, &given)),
        Err(usage) => explain(&usage),
    }
}

fn run(args: Args, given: &Given) -> u8 {
    match args.command {
        Command::Serve(args) if args.print_config => told(serve_args::print(&given.to_toml()).map(|()| 0)),
        Command::CheckConfig(args) => told(serve_args::check(&args).map(|()| 0)),
        Command::Hook(args) => run_hook(*args),
        Command::Serve(args) => run_serve(&args),
        Command::Rebuild(args) => told(rebuild::run(&args).map(|()| 0)),
        Command::Client(command) => told(client::run(*command)),
        Command::Healthcheck(args) => told(healthcheck::run(&args).map(|()| 0)),
    }
}

fn run_hook(args: HookArgs) -> u8 {
    let (own_lines, queue) = notices();
    init_log(args.log_format, args.log_level, own_lines.clone());
    let result = hook_args::checked(args).and_then(|config| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
        let code = runtime.block_on(hook::run(config, own_lines, queue))?;
        runtime.shutdown_background(); // a writer may be stuck on a reader that is gone
        Ok(code)
    });
    told(result)
}

fn run_serve(args: &ServeArgs) -> u8 {
    write_log(args.log_format, args.log_level);
    told(serve_args::run(args).map(|()| 0))
}

/// One for the sockets and one for the printer; the store has a thread of its own.
const WORKERS: usize = 2;

/// The exit code, with the failure's whole chain on standard error.
fn told(result: anyhow::Result<u8>) -> u8 {
    result.unwrap_or_else(|failure| {
        hook::complain(&format!("{failure:#}"));
        EXIT_FAILURE
    })
}

/// Prints clap's message and says what to exit with: its own code for a usage error, 2, would look like a build's.
fn explain(usage: &clap::Error) -> ExitCode {
    drop(usage.print()); // there is nowhere left to say that this failed
    if matches!(usage.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_FAILURE)
    }
}

/// The log goes to standard error.
fn write_log(format: Format, level: Level) {
    let builder = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::from(level))
        .with_ansi(false)
        .with_writer(std::io::stderr);
    let result = match format {
        Format::Text => builder.with_target(false).try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    };
    drop(result); // a second log in one process is refused, the first goes on
}

/// The log goes through the printer, so that its lines stay out of the build's.
fn init_log(format: Format, level: Level, lines: mpsc::Sender<Notice>) {
    let builder = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::from(level))
        .with_ansi(false)
        .with_writer(move || hook::LogLines(lines.clone()));
    let result = match format {
        Format::Text => builder.with_target(false).try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    };
    drop(result); // a second log in one process is refused, the first goes on
}
