//! Entrypoint of a builder image: runs the build command and phones its output home.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use phonehome_agent::{
    Blocked,
    config::{Config, Given, ProxySettings},
    console::Console,
    failure::{EXIT_FAILURE, Failure},
    log,
};
use tracing::error;

fn main() -> ExitCode {
    let line: Vec<_> = std::env::args_os().collect();
    let console = Console::default();
    let result = match Given::read(&line) {
        Ok(given) => run(given, &console),
        Err(usage) => return explain(&usage),
    };
    let code = result.unwrap_or_else(|failure| {
        let code = failure.exit_code();
        error!("{:#}", anyhow::Error::from(failure));
        code
    });
    console.finish();
    ExitCode::from(code)
}

fn run(given: Given, console: &Console) -> Result<u8, Failure> {
    let args = given.args();
    log::init(args.log(), console.clone());
    let print = args.print_config;
    let config = Config::try_from_args(args, &ProxySettings::read(|name| std::env::var(name).ok()))?;
    if print {
        return print_all(&given.to_toml());
    }
    log::started(|| given.settings());
    drop(given); // the token is in the configuration, and that is enough
    phonehome_agent::run(config, console)
}

fn print_all(text: &str) -> Result<u8, Failure> {
    io::stdout().write_all(text.as_bytes()).map_err(Failure::Print)?;
    Ok(0)
}

/// Prints help, or what is wrong with the line, and says what to exit with: clap's own code, 2, would look like the
/// command's.
fn explain(usage: &clap::Error) -> ExitCode {
    drop(usage.print()); // there is nowhere left to say that this failed
    if usage.use_stderr() { ExitCode::from(EXIT_FAILURE) } else { ExitCode::SUCCESS }
}
