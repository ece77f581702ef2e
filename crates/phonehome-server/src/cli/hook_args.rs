//! `phonehome-server hook`.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use phonehome_proto::id::{BuildId, StepName};

use super::{Format, Level, client::AccessArgs};
use crate::{
    Clocks,
    hook::{Choice, HookConfig, OnHangup, RenderChoice},
};

/// Waits for one build, prints it to the person who pushed and exits as it did
///
/// Made for git's pre-receive hook: opens a port, starts LAUNCHER with the address, a build id, a token and the key's
/// pin in PHONEHOME_URL, PHONEHOME_BUILD, PHONEHOME_TOKEN and PHONEHOME_PIN, prints what the builder phones home, and
/// exits with the build's code, so that a failed build refuses the push.
///
/// The log is stored first and printed from the store: a git client that stalls never stalls the build.
#[derive(Parser)]
#[command(
    after_help = "Exit code: the build's; 124 timed out; 121 the agent was lost; 130 cancelled; 125 phonehome itself or \
                  the launcher failed.\n\n\
                  Example, as hooks/pre-receive:\n  #!/bin/sh\n  exec phonehome-server hook --timeout 30m -- ./launch-builder"
)]
pub(super) struct HookArgs {
    /// Address to bind; port 0 lets the system choose [default: 0.0.0.0:0]
    #[arg(long, value_name = "ADDR", help_heading = "Address", conflicts_with = "via")]
    listen: Option<SocketAddr>,

    /// Open no port: declare the build on this standing server, https:// or http://, and follow it there. Needs a token
    /// that may launch, in PHONEHOME_TOKEN or a file; the launcher gets the build's own in its place
    #[arg(long, value_name = "URL", help_heading = "Server")]
    via: Option<String>,

    #[command(flatten)]
    access: AccessArgs,

    /// Host the builder can reach: HOST, HOST:PORT or a whole wss:// or ws:// address [default: POD_IP, else the
    /// address of the default route]
    #[arg(long, value_name = "HOST", help_heading = "Address", conflicts_with = "via")]
    advertise: Option<String>,

    /// Serve ws:// without encryption, for a proxy in front that has it
    #[arg(long, help_heading = "Address", conflicts_with = "via")]
    no_tls: bool,

    /// Also write the variables to this file, one NAME=value each, mode 0600, gone at the end; ready for docker run
    /// --env-file
    #[arg(long, value_name = "PATH", help_heading = "Build")]
    env_file: Option<PathBuf>,

    /// Build id [default: one is drawn]
    #[arg(long, value_name = "ID", help_heading = "Build")]
    build: Option<BuildId>,

    /// Steps the build consists of, separated by commas; it ends when all have. With several, lines carry their step
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', default_value = "main", help_heading = "Build")]
    steps: Vec<StepName>,

    /// Keep the log here; without it the log is kept in a temporary directory until the end
    #[arg(long, value_name = "DIR", help_heading = "Build", conflicts_with = "via")]
    data: Option<PathBuf>,

    /// Allow one push at a time: the lock is held on this file and freed when this process ends, however it ends
    #[arg(long, value_name = "PATH", help_heading = "Build")]
    lock: Option<PathBuf>,

    /// Limit for the whole build; off for none
    #[arg(long, value_name = "TIME", default_value = "1h", help_heading = "Clocks")]
    timeout: Limit,

    /// Limit until a builder phones home
    #[arg(long, value_name = "TIME", default_value = "5m", help_heading = "Clocks")]
    connect_timeout: Limit,

    /// Limit without any output, although the builder lives
    #[arg(long, value_name = "TIME", default_value = "off", help_heading = "Clocks")]
    idle_timeout: Limit,

    /// Limit until a builder that vanished comes back
    #[arg(long, value_name = "TIME", default_value = "2m", help_heading = "Clocks")]
    lost_timeout: Limit,

    /// Between TERM and KILL when the build is stopped
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration, help_heading = "Clocks")]
    grace_period: Duration,

    /// What becomes of the build when the person who pushed is gone
    #[arg(long, value_name = "WHAT", default_value = "cancel", help_heading = "Printing")]
    on_hangup: Hangup,

    /// Form of the output: raw is byte for byte, safe keeps a build from driving the reader's terminal, auto is safe for
    /// a terminal and under git
    #[arg(long, value_name = "FORM", default_value = "auto", help_heading = "Printing")]
    render: Render,

    /// Whether the safe form keeps colours; auto does unless NO_COLOR is set or TERM is dumb
    #[arg(long, value_name = "WHEN", default_value = "auto", help_heading = "Printing")]
    color: Color,

    /// Say so when a build was silent for this long, and again each time; only in the safe form; off for never
    #[arg(long, value_name = "TIME", default_value = "30s", help_heading = "Printing")]
    keepalive: Limit,

    /// Leave out the last line, which says how the build ended and what is proven about its log: bytes, records, digest,
    /// cuts survived. Problems are told all the same
    #[arg(long, help_heading = "Printing")]
    quiet: bool,

    /// Form of the server's own log, on standard error
    #[arg(long, value_name = "FORMAT", default_value = "text", help_heading = "Own log")]
    pub(super) log_format: Format,

    /// Least severity of it
    #[arg(long, value_name = "LEVEL", default_value = "error", help_heading = "Own log")]
    pub(super) log_level: Level,

    /// Command that starts the builder, with its arguments; it gets the hook's standard input
    #[arg(required = true, trailing_var_arg = true, value_name = "LAUNCHER")]
    launcher: Vec<OsString>,
}

/// A duration, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limit(pub(super) Option<Duration>);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" { Ok(Self(None)) } else { duration(text).map(|limit| Self(Some(limit))) }
    }
}

/// A time such as 90s or 1h 30m.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time > LONGEST { Err("the longest time is 10 years, use off for no limit".into()) } else { Ok(time) }
}

/// Beyond this a point in time could not be told.
const LONGEST: Duration = Duration::from_secs(10 * 366 * 24 * 3600);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Hangup {
    /// Stop it.
    Cancel,
    /// Let it go on, unseen.
    Continue,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Render {
    /// Safe for a terminal and under git, else raw.
    Auto,
    /// Byte for byte.
    Raw,
    /// Nothing that drives a terminal.
    Safe,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Color {
    /// Unless NO_COLOR is set or TERM is dumb.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Checks what was typed and adds what the environment says.
pub(super) fn checked(args: HookArgs) -> anyhow::Result<HookConfig> {
    let mut seen = std::collections::BTreeSet::new();
    let twice = args.steps.iter().find(|step| !seen.insert(step.as_str().to_owned()));
    ensure!(twice.is_none(), "--steps names a step twice");
    ensure!(!args.launcher.is_empty(), "a launcher is required");
    ensure!(args.keepalive.0 != Some(Duration::ZERO), "--keepalive 0s would never be silent, use off");
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    let via = args.via.map(|server| args.access.client(Some(server))).transpose()?;
    Ok(HookConfig {
        via,
        listen: args.listen.unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0))),
        advertise: args.advertise.or_else(|| std::env::var("POD_IP").ok().filter(|ip| !ip.is_empty())),
        tls: !args.no_tls,
        env_file: args.env_file,
        build: args.build.map_or_else(draw_build_id, Ok)?,
        steps: args.steps,
        data: args.data,
        lock: args.lock,
        clocks: Clocks {
            connect: args.connect_timeout.0,
            idle: args.idle_timeout.0,
            lost: args.lost_timeout.0,
            total: args.timeout.0,
            grace: args.grace_period,
        },
        on_hangup: match args.on_hangup {
            Hangup::Cancel => OnHangup::Cancel,
            Hangup::Continue => OnHangup::Continue,
        },
        render: match args.render {
            Render::Auto => RenderChoice::Auto { under_git: set("GIT_DIR") },
            Render::Raw => RenderChoice::Raw,
            Render::Safe => RenderChoice::Safe,
        },
        color: match args.color {
            Color::Auto if set("NO_COLOR") || dumb => Choice::No,
            Color::Auto | Color::Always => Choice::Yes,
            Color::Never => Choice::No,
        },
        keepalive: args.keepalive.0,
        quiet: args.quiet,
        launcher: args.launcher,
    })
}

/// Unique enough for a directory name, and short enough to read out.
fn draw_build_id() -> anyhow::Result<BuildId> {
    let random = getrandom::u64().context("cannot draw a build id")?;
    Ok(format!("push-{random:016x}").parse()?)
}
