//! The commands that ask a standing server, as typed: which server, and how to be known to it.

pub(super) mod builds;
pub(super) mod canary;
pub(super) mod declare;
mod download;
pub(super) mod end;
pub(super) mod logs;
mod out;
mod progress;
pub(super) mod prune;
pub(super) mod show;
mod table;
pub(super) mod token;
pub(super) mod verify;
pub(super) mod wait;

use std::{ffi::OsString, io, path::PathBuf};

use clap::{Args, Subcommand};
use phonehome_env::{proxy::ProxySettings, secret::Secret};

use crate::client::{
    http::{Client, ClientError},
    settings::{Settings, usual_file},
};

/// The commands of a client.
#[derive(Subcommand)]
pub(super) enum ClientCommand {
    Logs(logs::LogsArgs),
    Builds(builds::BuildsArgs),
    Show(show::ShowArgs),
    Wait(wait::WaitArgs),
    Cancel(end::CancelArgs),
    Rm(end::RmArgs),
    Declare(declare::DeclareArgs),
    #[command(subcommand)]
    Token(token::TokenCommand),
    Prune(prune::PruneArgs),
    Verify(verify::VerifyArgs),
    Canary(canary::CanaryArgs),
    #[command(hide = true)]
    CanaryOutput(canary::OutputArgs),
}

/// Which server is asked, and how.
#[derive(Debug, Args)]
pub(super) struct ServerArgs {
    /// Address of the standing server, https:// or http://, with a path if a proxy wants one
    #[arg(long, value_name = "URL", env = "PHONEHOME_SERVER", help_heading = "Server")]
    server: Option<String>,

    #[command(flatten)]
    access: AccessArgs,
}

/// How to know a server and be known to it. The token itself is never an argument, where everybody could see it.
#[derive(Debug, Args)]
pub(super) struct AccessArgs {
    /// File with the token; else PHONEHOME_TOKEN has it, else the file that PHONEHOME_TOKEN_FILE names
    #[arg(long, value_name = "PATH", help_heading = "Server")]
    token_file: Option<PathBuf>,

    /// PEM file with the roots to trust, in place of the system's
    #[arg(long, value_name = "PATH", env = "PHONEHOME_CA", help_heading = "Server")]
    ca: Option<PathBuf>,

    /// SHA-256 of the server's public key, sha256:HEX; needs no roots at all
    #[arg(long, value_name = "PIN", env = "PHONEHOME_PIN", help_heading = "Server")]
    pin: Option<String>,

    /// PEM file with a certificate of this client's own
    #[arg(long, value_name = "PATH", env = "PHONEHOME_CLIENT_CERT", help_heading = "Server")]
    client_cert: Option<PathBuf>,

    /// PEM file with its key
    #[arg(long, value_name = "PATH", env = "PHONEHOME_CLIENT_KEY", help_heading = "Server")]
    client_key: Option<PathBuf>,

    /// TOML file with server, token or token-file, ca, pin, client-cert and client-key, for what is not given otherwise
    /// [default: ~/.config/phonehome/client.toml, if there is one]
    #[arg(long, value_name = "PATH", env = "PHONEHOME_CLIENT_CONFIG", help_heading = "Server")]
    client_config: Option<PathBuf>,
}

impl ServerArgs {
    pub(super) fn client(self) -> anyhow::Result<Client> {
        self.access.client(self.server)
    }
}

impl AccessArgs {
    /// The client for a server, whose address the settings file may have too.
    pub(super) fn client(self, server: Option<String>) -> anyhow::Result<Client> {
        let Self { token_file, ca, pin, client_cert, client_key, client_config } = self;
        let token = variable("PHONEHOME_TOKEN").filter(|_| token_file.is_none());
        let token = token.map(|token| Secret::new(token.to_string_lossy().into_owned()));
        let token_file = token_file.or_else(|| variable("PHONEHOME_TOKEN_FILE").map(PathBuf::from));
        let typed = Settings { server, token, token_file, ca, pin, client_cert, client_key };
        let usual = || usual_file(|name| variable(name).map(PathBuf::from)).filter(|path| path.exists());
        let settings = match client_config.or_else(usual) {
            Some(path) => typed.or_file(Settings::read(&path)?)?,
            None => typed,
        };
        settings.client(&ProxySettings::read(|name| variable(name).and_then(|value| value.into_string().ok())))
    }
}

/// A variable that says something.
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// What a program exits with whose output nobody reads, as the system's own do: 128 and the number of SIGPIPE.
const EXIT_BROKEN_PIPE: u8 = 141;

/// Runs a command and says what to exit with.
pub(super) fn run(command: ClientCommand) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(super::WORKERS).enable_all().build()?;
    let result = runtime.block_on(dispatch(command));
    runtime.shutdown_background(); // a writer may be stuck on a reader that is gone
    match result {
        Err(error) if is_broken_pipe(&error) => Ok(EXIT_BROKEN_PIPE),
        result => result,
    }
}

async fn dispatch(command: ClientCommand) -> anyhow::Result<u8> {
    match command {
        ClientCommand::Logs(args) => logs::run(args).await,
        ClientCommand::Builds(args) => builds::run(args).await,
        ClientCommand::Show(args) => show::run(args).await,
        ClientCommand::Wait(args) => wait::run(args).await,
        ClientCommand::Cancel(args) => end::cancel(args).await,
        ClientCommand::Rm(args) => end::rm(args).await,
        ClientCommand::Declare(args) => declare::run(args).await,
        ClientCommand::Token(command) => token::run(command).await,
        ClientCommand::Prune(args) => prune::run(args).await,
        ClientCommand::Verify(args) => verify::run(args).await,
        ClientCommand::Canary(args) => canary::run(args).await,
        ClientCommand::CanaryOutput(args) => canary::write_output(&args),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    kind == Some(io::ErrorKind::BrokenPipe)
}

/// A client's error on one line.
fn told(error: &ClientError) -> anyhow::Error {
    anyhow::anyhow!(error.told())
}
