//! `phonehome-server serve`.

use std::{net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use anyhow::{Context, ensure};
use bytesize::ByteSize;
use clap::{Parser, ValueEnum};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::timeout,
};
use tracing::info;

use super::{
    Format, Level,
    hook_args::{Limit, duration},
};
use crate::{
    Clocks, Config, Durability, Server, builds::hash_token, identity::Identity, keeper::Care, retention::Policy,
    serve::Settings, server::draw_token,
};

/// Receives any number of builds, keeps them, and serves an API to watch and read them
///
/// One port for agents and API. Everything is kept below --data, as files that ordinary tools can read.
#[derive(Parser)]
pub(super) struct ServeArgs {
    /// Directory where everything is kept
    #[arg(long, value_name = "DIR", env = "PHONEHOME_DATA")]
    data: PathBuf,

    /// Address to bind; port 0 lets the system choose
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:8443",
        env = "PHONEHOME_LISTEN",
        help_heading = "Address"
    )]
    listen: SocketAddr,

    /// Address that agents are told, such as wss://logs.example [default: as the launcher reaches this server]
    #[arg(long, value_name = "URL", env = "PHONEHOME_ADVERTISE", help_heading = "Address")]
    advertise: Option<String>,

    /// Speak TLS with a key of the server's own, which agents recognise by its pin
    #[arg(long, env = "PHONEHOME_TLS_SELF_SIGNED", help_heading = "Address")]
    tls_self_signed: bool,

    /// Allow addresses beyond this machine without TLS
    #[arg(long, env = "PHONEHOME_INSECURE", help_heading = "Address")]
    insecure: bool,

    /// What an acknowledgement promises
    #[arg(long, value_name = "WHAT", default_value = "fsync", env = "PHONEHOME_DURABILITY", help_heading = "Storage")]
    durability: Promise,

    /// Compress the logs of a build this long after its end; off for never
    #[arg(long, value_name = "TIME", default_value = "10m", env = "PHONEHOME_SEAL_AFTER", help_heading = "Storage")]
    seal_after: Limit,

    /// Remove ended builds this long after their end; off for never
    #[arg(long, value_name = "TIME", default_value = "off", env = "PHONEHOME_KEEP_FOR", help_heading = "Storage")]
    keep_for: Limit,

    /// Keep at most so many ended builds, the oldest go first
    #[arg(long, value_name = "N", env = "PHONEHOME_KEEP_BUILDS", help_heading = "Storage")]
    keep_builds: Option<u64>,

    /// Keep ended builds while they have at most this much on the disk together, such as 100GiB; the oldest go first
    #[arg(long, value_name = "SIZE", env = "PHONEHOME_KEEP_BYTES", help_heading = "Storage")]
    keep_bytes: Option<ByteSize>,

    /// What a build may store; output beyond is not kept, which its log says, and the build goes on; off for no limit
    #[arg(long, value_name = "SIZE", default_value = "10GiB", env = "PHONEHOME_BUILD_QUOTA", help_heading = "Limits")]
    build_quota: Quota,

    /// Space on the disk that stays free of output: with less, agents wait, while ends and verdicts still fit
    #[arg(long, value_name = "SIZE", default_value = "256MiB", env = "PHONEHOME_MIN_FREE", help_heading = "Limits")]
    min_free: ByteSize,

    /// Builds that may run at once
    #[arg(long, value_name = "N", default_value = "20000", env = "PHONEHOME_MAX_BUILDS", help_heading = "Limits")]
    max_builds: usize,

    /// How long connections get to end when the server is told to stop
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = duration, env = "PHONEHOME_DRAIN_TIMEOUT", help_heading = "Limits")]
    drain_timeout: Duration,

    /// Limit for a whole build, unless it is declared with another; off for none
    #[arg(long, value_name = "TIME", default_value = "1h", env = "PHONEHOME_TIMEOUT", help_heading = "Clocks")]
    timeout: Limit,

    /// Limit until a builder phones home
    #[arg(long, value_name = "TIME", default_value = "5m", env = "PHONEHOME_CONNECT_TIMEOUT", help_heading = "Clocks")]
    connect_timeout: Limit,

    /// Limit without any output, although the builder lives
    #[arg(long, value_name = "TIME", default_value = "off", env = "PHONEHOME_IDLE_TIMEOUT", help_heading = "Clocks")]
    idle_timeout: Limit,

    /// Limit until a builder that vanished comes back
    #[arg(long, value_name = "TIME", default_value = "2m", env = "PHONEHOME_LOST_TIMEOUT", help_heading = "Clocks")]
    lost_timeout: Limit,

    /// Between TERM and KILL when a build is stopped
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration, env = "PHONEHOME_GRACE_PERIOD", help_heading = "Clocks")]
    grace_period: Duration,

    /// Form of the server's own log, on standard error
    #[arg(long, value_name = "FORMAT", default_value = "json", env = "PHONEHOME_LOG_FORMAT", help_heading = "Own log")]
    pub(super) log_format: Format,

    /// Least severity of it
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "PHONEHOME_LOG_LEVEL", help_heading = "Own log")]
    pub(super) log_level: Level,
}

/// A size, or none.
#[derive(Debug, Clone, Copy)]
struct Quota(Option<ByteSize>);

impl FromStr for Quota {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" { Ok(Self(None)) } else { text.parse().map(|size| Self(Some(size))) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Promise {
    /// Synced to the disk: survives a crash of the machine.
    Fsync,
    /// With the operating system: survives a crash of this process.
    Os,
}

/// Serves until the process is told to stop.
pub(super) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let is_local = args.listen.ip().is_loopback();
    ensure!(
        is_local || args.tls_self_signed || args.insecure,
        "{} can be reached from other machines: use TLS, or --insecure when something in front encrypts",
        args.listen
    );
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(args))?;
    runtime.shutdown_background(); // a read may be stuck on a disk
    Ok(())
}

async fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    let config = Config {
        listen: args.listen,
        tls: args.tls_self_signed,
        data: args.data.clone(),
        durability: match args.durability {
            Promise::Fsync => Durability::Fsync,
            Promise::Os => Durability::Os,
        },
    };
    let identity = args.tls_self_signed.then(Identity::generate).transpose()?;
    let (server, _standing) = Server::stand(config, settings(args)?, identity).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    info!(address = %server.local_addr(), pin = server.pin(), "serving");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    info!("told to stop");
    drop(timeout(args.drain_timeout, server.shutdown(Duration::ZERO)).await); // what has not ended then is cut off
    Ok(())
}

fn settings(args: &ServeArgs) -> anyhow::Result<Settings> {
    let secret = |name: &str| std::env::var(name).ok().filter(|token| !token.is_empty());
    let admin = match secret("PHONEHOME_ADMIN_TOKEN") {
        Some(token) => token,
        None => draw_token(&phonehome_env::Env::real()).context("cannot draw a token")?,
    };
    Ok(Settings {
        timeouts: Clocks {
            connect: args.connect_timeout.0,
            idle: args.idle_timeout.0,
            lost: args.lost_timeout.0,
            total: args.timeout.0,
            grace: args.grace_period,
        },
        advertise: args.advertise.clone(),
        tls: args.tls_self_signed,
        max_builds: args.max_builds,
        build_quota: args.build_quota.0.map(|size| size.as_u64()),
        min_free: args.min_free.as_u64(),
        care: Care {
            seal_after: args.seal_after.0,
            policy: Policy {
                keep_for: args.keep_for.0,
                keep_builds: args.keep_builds,
                keep_bytes: args.keep_bytes.map(|size| size.as_u64()),
            },
        },
        admin: Some(hash_token(&admin)),
        read: secret("PHONEHOME_READ_TOKEN").map(|token| hash_token(&token)),
    })
}
