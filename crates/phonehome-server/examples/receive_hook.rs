//! A receive hook of one's own: waits for one build and prints it.
//!
//! As `hooks/pre-receive` of a repository, with the command that starts a builder as its arguments:
//!
//! ```sh
//! #!/bin/sh
//! exec receive_hook ./launch-builder
//! ```
//!
//! The builder's entrypoint is phonehome-agent; its address, build, token and pin are in the launcher's environment.
//! What `phonehome-server hook` adds to this: safe printing, clocks as options, cancel on hang-up, a lock.

use std::{
    error::Error,
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use phonehome_server::{Config, Durability, Expected, ExpectedBuild, LogItem, Server, Stream};
use tokio::process::{Child, Command};

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let logs = tempfile::tempdir()?;
    let config =
        Config { listen: "127.0.0.1:0".parse()?, tls: true, data: logs.path().to_owned(), durability: Durability::Os };
    let server = Server::spawn(config).await?;
    let build = server.expect(Expected::new(format!("push-{}", std::process::id()).parse()?))?;
    let mut launcher = launch(&server, &build)?;

    let watched = build.clone();
    tokio::spawn(async move {
        if !launcher.wait().await.is_ok_and(|status| status.success()) {
            watched.fail("the launcher failed");
        }
    });
    print(&build).await?;

    let verdict = build.verdict().await;
    writeln!(io::stderr(), "{}", verdict.outcome)?;
    server.shutdown(Duration::from_secs(5)).await;
    Ok(ExitCode::from(verdict.exit_code()))
}

/// Starts the builder.
fn launch(server: &Server, build: &ExpectedBuild) -> Result<Child, Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let launcher = arguments.next().ok_or("usage: receive_hook LAUNCHER [ARG...]")?;
    Ok(Command::new(launcher)
        .args(arguments)
        .env("PHONEHOME_URL", server.url("127.0.0.1", server.local_addr().port()))
        .env("PHONEHOME_BUILD", build.id().as_str())
        .env("PHONEHOME_TOKEN", build.token())
        .env("PHONEHOME_PIN", server.pin().unwrap_or_default())
        .spawn()?)
}

/// Prints the log from the store, live, until the build has its verdict.
async fn print(build: &ExpectedBuild) -> io::Result<()> {
    let mut log = build.log();
    while let Some(item) = log.next().await? {
        match item {
            LogItem::Lost { records, .. } => writeln!(io::stderr(), "{records} records are lost")?,
            LogItem::Record(found) => match found.record.stream {
                Stream::Stdout => io::stdout().write_all(&found.record.payload)?,
                Stream::Stderr => io::stderr().write_all(&found.record.payload)?,
                Stream::Event => {}
            },
        }
    }
    io::stdout().flush()
}
