//! Entrypoint of a builder image: runs the build command and phones its output home.

use std::process::ExitCode;

use phonehome_agent::{
    Blocked,
    config::{self, Config, ProxySettings},
    console::Console,
    failure::Failure,
};
use tracing::error;

fn main() -> ExitCode {
    let signals = Blocked::all();
    let token = phonehome_agent::take_token();
    let args = match config::parse(std::env::args_os(), token) {
        Ok(args) => args,
        Err(usage) => return config::explain(&usage),
    };
    let console = Console::default();
    phonehome_agent::log::init(args.log(), console.clone());
    let variable = |name: &str| std::env::var(name).ok();
    let proxy = ProxySettings::read(variable);
    let result = Config::try_from_args(args, &proxy, |name| std::env::var_os(name))
        .map(|config| config.identified(variable))
        .map_err(Failure::from)
        .and_then(|config| phonehome_agent::run(config, &console, signals?));
    let code = result.unwrap_or_else(|failure| {
        let code = failure.exit_code();
        error!("{:#}", anyhow::Error::from(failure));
        code
    });
    console.finish();
    ExitCode::from(code)
}
