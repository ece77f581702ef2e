//! A server of one build that may be killed at any moment and started again: same address, directory and token.
//!
//! ```text
//! COLLECTOR_TOKEN=SECRET collector LISTEN DATA BUILD
//! ```
//!
//! What it acknowledges is synced. Its standard output is the build's output, stdout and stderr in the order of the log,
//! in every life from the beginning. On standard error it says `listening on ADDRESS` and, when the verdict is stored,
//! `verdict JSON`, and exits as the build did; or with [`ENDED`] when an earlier life has stored the verdict, or with
//! [`FAILED`] when it cannot do its work.

use std::{
    error::Error,
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use phonehome_server::{
    BuildLog, Config, Durability, ExpectError, Expected, ExpectedBuild, LogItem, Server, Stream, Verdict,
};
use tracing_subscriber::filter::LevelFilter;

/// An earlier life has stored the verdict.
const ENDED: u8 = 98;

/// It could not start, or not read what it stores.
const FAILED: u8 = 99;

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false).with_max_level(LevelFilter::WARN).init();
    match collect().await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tell(&format!("failed: {error}"));
            ExitCode::from(FAILED)
        }
    }
}

async fn collect() -> Result<u8, Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [listen, data, id] = &*arguments else { return Err("usage: collector LISTEN DATA BUILD".into()) };
    let data = data.into();
    let config = Config { listen: listen.parse()?, tls: false, data, durability: Durability::Fsync };
    let server = Server::spawn(config).await?;
    let token = Some(std::env::var("COLLECTOR_TOKEN")?);
    let build = match server.expect(Expected { token, ..Expected::new(id.parse()?) }) {
        Ok(build) => build,
        Err(ExpectError::Ended(_)) => return Ok(ENDED),
        Err(error) => return Err(error.into()),
    };
    tell(&format!("listening on {}", server.local_addr()));
    let verdict = follow(&build).await?;
    tell(&format!("verdict {}", serde_json::to_string(&verdict)?));
    server.shutdown(Duration::from_secs(5)).await;
    Ok(verdict.exit_code())
}

/// Prints the log to its end.
async fn follow(build: &ExpectedBuild) -> Result<Verdict, Box<dyn Error>> {
    let mut log: BuildLog = build.log();
    while let Some(item) = log.next().await? {
        match item {
            LogItem::Lost { records, .. } => tell(&format!("{records} records are lost")),
            LogItem::Record(found) => match found.record.stream {
                Stream::Stdout | Stream::Stderr => io::stdout().write_all(&found.record.payload)?,
                Stream::Event => {}
            },
        }
        io::stdout().flush()?;
    }
    Ok(build.verdict().await)
}

fn tell(line: &str) {
    drop(writeln!(io::stderr(), "{line}")); // nobody may be reading any more, which changes nothing
}
