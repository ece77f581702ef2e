//! Entrypoint of a builder image: runs the build command and phones its output home.

use std::{
    ffi::OsString,
    io::{self, Write},
    process::ExitCode,
};

use phonehome_agent::{
    Blocked,
    config::{Args, Config, Given, Level, ProxySettings, SiblingsConfig},
    console::Console,
    failure::{EXIT_FAILURE, Failure},
    install::install,
    invocation::{self, Invocation},
    log::{self, Format, Settings, Trace},
};
use tracing::error;

#[expect(unsafe_code, reason = "here it is certain that there is one thread")]
fn main() -> ExitCode {
    let signals = Blocked::all();
    // SAFETY: nothing before has started a thread or looked at the environment.
    let token = unsafe { phonehome_agent::take_token() };
    let line: Vec<_> = std::env::args_os().collect();
    let console = Console::default();
    let result = match Invocation::read(&line, token) {
        Ok(Invocation::Run(given)) => run(given, &console, signals),
        Ok(Invocation::RunPlain(command)) => run_plain(command, &console, signals),
        Ok(Invocation::Install(dest)) => {
            log::init(plain_log(&line), console.clone());
            install(&dest).map(|()| 0).map_err(Failure::from)
        }
        Ok(Invocation::Print(text)) => {
            log::init(plain_log(&line), console.clone());
            print_all(text)
        }
        Err(usage) => return explain(&usage, &line, console),
    };
    let code = result.unwrap_or_else(|failure| {
        let code = failure.exit_code();
        error!("{:#}", anyhow::Error::from(failure));
        code
    });
    console.finish();
    ExitCode::from(code)
}

fn run(given: Box<Given>, console: &Console, signals: io::Result<Blocked>) -> Result<u8, Failure> {
    let args = given.args();
    log::init(args.log(), console.clone());
    let print = args.print_config;
    let variable = |name: &str| std::env::var(name).ok();
    let siblings = SiblingsConfig::unchecked(&args.siblings);
    let termination_log = args.supervision.termination_log.clone();
    let config = Config::try_from_args(args, &ProxySettings::read(variable), |name| given.variable(name));
    let config = config.map_err(Failure::from).inspect_err(|failure| {
        if !print {
            let reason = failure.with_causes();
            phonehome_agent::carve_failure(&siblings, failure.exit_code(), &reason);
            phonehome_agent::leave_message(&termination_log, &reason);
        }
    })?;
    let config = config.identified(variable);
    if print {
        return print_all(&given.to_toml());
    }
    if let Some(redactor) = &config.redactor {
        log::hide(redactor);
    }
    log::started(|| given.settings());
    drop(given); // the token is in the configuration, and that is enough
    phonehome_agent::run(config, console, signals?)
}

/// Without any option there is less to find out, and nothing that could be wrong or secret.
fn run_plain(command: Vec<OsString>, console: &Console, signals: io::Result<Blocked>) -> Result<u8, Failure> {
    let args = Args { command, ..Args::default() };
    log::init(args.log(), console.clone());
    let config = Config::try_from_args(args, &ProxySettings::default(), |_| None)?;
    phonehome_agent::run(config, console, signals?)
}

fn print_all(text: &str) -> Result<u8, Failure> {
    io::stdout().write_all(text.as_bytes()).map_err(Failure::Print)?;
    Ok(0)
}

/// Prints help, or what is wrong with the line, and says what to exit with: clap's own code, 2, would look like the
/// command's.
fn explain(usage: &clap::Error, line: &[OsString], console: Console) -> ExitCode {
    if usage.use_stderr() && invocation::log_format(line) == Format::Json {
        log::init(plain_log(line), console);
        error!("{}", usage.to_string().trim_start_matches("error: ").trim_end());
    } else {
        drop(usage.print()); // there is nowhere left to say that this failed
    }
    if usage.use_stderr() { ExitCode::from(EXIT_FAILURE) } else { ExitCode::SUCCESS }
}

/// The log when there are no options yet.
fn plain_log(line: &[OsString]) -> Settings {
    Settings { format: invocation::log_format(line), level: Level::Warn, trace: Trace::Off }
}
