//! The server's command: `phonehome-server hook` and `phonehome-server healthcheck`.

use std::process::ExitCode;

use phonehome_server::cli;

fn main() -> ExitCode {
    cli::main()
}
