//! `phonehome-server logs`.

use std::{io::Write, sync::Arc};

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use phonehome_proto::{
    frame::Stream,
    id::{BuildId, StepName},
};

use super::{
    EXIT_BROKEN_PIPE, ServerArgs,
    download::{Raw, download},
    told, variable,
};
use crate::{
    cli::{EXIT_FAILURE, hook_args::Limit},
    client::{
        http::{Ask, Client},
        model::Detail,
        remote_log::{Outcome, RemoteLog, Wanted},
    },
    hook::{
        Choice, Feed, Notice, Printer, Reader, RenderChoice, Screen,
        ending::{Cause, Ending},
        notices,
        summary::summary,
    },
};

/// Prints the log of a build
///
/// Standard output goes to standard output and standard error to standard error: byte for byte into files and pipes,
/// and into a terminal without what would drive it. What phonehome itself has to say goes to standard error.
///
/// With --follow it stays until the verdict, reconnects by itself when the connection or the server goes away, and loses
/// and repeats nothing.
#[derive(Parser)]
#[command(
    after_help = "Exit code: 0 when all that is there was printed; with --follow or --exit-code the build's: its own, 124 \
                  timed out, 121 its agent was lost, 130 cancelled, 125 phonehome failed. 125 also when the server \
                  cannot be asked, 141 when nobody reads the output any more."
)]
pub(crate) struct LogsArgs {
    /// The build
    build: BuildId,

    /// Stay until the build has its verdict
    #[arg(short, long)]
    follow: bool,

    /// This step only, whose lines have no prefix then
    #[arg(long, value_name = "NAME")]
    step: Option<StepName>,

    /// This attempt only [default: the newest of each step, all of them with --follow]
    #[arg(long, value_name = "N")]
    attempt: Option<u32>,

    /// This stream only
    #[arg(long, value_name = "STREAM")]
    stream: Option<StreamName>,

    /// Begin with the last N lines
    #[arg(long, value_name = "N")]
    tail: Option<u64>,

    /// The time of the server's record in front of each line
    #[arg(long)]
    timestamps: bool,

    /// Both streams as they are stored, byte for byte, on standard output
    #[arg(long, conflicts_with_all = ["follow", "tail", "timestamps"])]
    raw: bool,

    /// Begin at this byte of the stored log, or of --stream; means --raw
    #[arg(long, value_name = "OFFSET", conflicts_with_all = ["follow", "tail", "timestamps"])]
    from: Option<u64>,

    /// Exit with the build's code also without --follow, 0 while it runs
    #[arg(long)]
    exit_code: bool,

    /// Whether colours reach a terminal; auto unless NO_COLOR is set or TERM is dumb
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    color: Color,

    /// How long a server that went away is waited for; off is for ever
    #[arg(long, value_name = "TIME", default_value = "5m")]
    patience: Limit,

    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StreamName {
    Stdout,
    Stderr,
}

impl From<StreamName> for Stream {
    fn from(name: StreamName) -> Self {
        match name {
            StreamName::Stdout => Self::Stdout,
            StreamName::Stderr => Self::Stderr,
        }
    }
}

/// Whether the safe form keeps colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

impl From<Color> for Choice {
    fn from(color: Color) -> Self {
        let is_plain = || variable("NO_COLOR").is_some() || variable("TERM").is_some_and(|term| term == "dumb");
        match color {
            Color::Auto if is_plain() => Self::No,
            Color::Auto | Color::Always => Self::Yes,
            Color::Never => Self::No,
        }
    }
}

pub(super) async fn run(args: LogsArgs) -> anyhow::Result<u8> {
    let client = args.server.client()?;
    let asked = client.json(&Ask::get(format!("builds/{}", args.build))).await;
    let detail: Detail = asked.map_err(|error| told(&error))?;
    if let Some(step) = &args.step {
        let is_known = detail.steps.iter().any(|known| known.step == step.as_str());
        ensure!(is_known, "build {} has no step {step}, only: {}", args.build, names(&detail));
    }
    if args.raw || args.from.is_some() {
        let raw = Raw {
            build: args.build.to_string(),
            step: args.step.map(|step| step.to_string()),
            attempt: args.attempt,
            stream: args.stream.map(|stream| Stream::from(stream).name()),
            from: args.from.unwrap_or_default(),
        };
        ensure!(raw.step.is_some() || detail.steps.len() < 2, "--raw needs --step, one of: {}", names(&detail));
        print_raw(&client, &raw).await?;
        return Ok(if args.exit_code { detail.exit_code().unwrap_or_default() } else { 0 });
    }
    let wanted = Wanted {
        follow: args.follow,
        step: args.step.clone(),
        attempt: args.attempt,
        stream: args.stream.map(Stream::from),
        tail: args.tail,
        timestamps: args.timestamps,
    };
    let prefixes = detail.steps.len() > 1 && args.step.is_none();
    let screen = Screen::open(RenderChoice::Auto { under_git: false }, args.color.into(), prefixes);
    let log = RemoteLog::start(Arc::new(client), args.build, wanted, args.patience.0);
    let ending = print(log, screen, args.follow).await?;
    Ok(match ending {
        Printed::Failed => EXIT_FAILURE,
        Printed::Unread => EXIT_BROKEN_PIPE,
        Printed::All(detail) if args.follow || args.exit_code => detail.exit_code().unwrap_or_default(),
        Printed::All(_) => 0,
    })
}

fn names(detail: &Detail) -> String {
    let names: Vec<_> = detail.steps.iter().map(|step| step.step.as_str()).collect();
    names.join(", ")
}

async fn print_raw(client: &Client, raw: &Raw) -> anyhow::Result<()> {
    let result = download(client, raw, |block, _, _| std::io::stdout().lock().write_all(block)).await;
    match result {
        Ok(_) => Ok(std::io::stdout().lock().flush()?),
        Err(super::download::DownloadError::Sink(error)) => Err(error.into()),
        Err(error) => Err(error.into()),
    }
}

/// What became of the printing.
enum Printed {
    All(Box<Detail>),
    /// The printer has said why.
    Failed,
    Unread,
}

/// Prints a log to its end, and how the build ended when it was followed.
async fn print(log: RemoteLog, screen: Screen, follow: bool) -> anyhow::Result<Printed> {
    let mut outcome: Outcome = log.outcome();
    let (lines, queue) = notices();
    let (printing, gone) = Printer::new(Feed::Remote(log), screen, queue, Reader::Anybody).spawn();
    let told = tokio::select! {
        Ok(_) = gone => return Ok(Printed::Unread),
        told = outcome.wait_for(Option::is_some) => told.ok().and_then(|told| told.clone()),
    };
    let Some(told) = told else { return Ok(Printed::Unread) };
    if let Ok(detail) = &told
        && follow
    {
        for line in last_words(detail) {
            drop(lines.send(Notice::Line(line)).await); // a printer that is gone prints nothing
        }
    }
    drop(lines.send(Notice::End).await); // a printer that is gone has ended already
    let printed = printing.await.context("the printer failed")?;
    match told {
        _ if printed.is_err() => Ok(Printed::Unread),
        Ok(detail) => Ok(Printed::All(Box::new(detail))),
        Err(_) => Ok(Printed::Failed),
    }
}

/// What a follower is told in the end: nothing that the exit code and the output do not say.
fn last_words(detail: &Detail) -> Vec<String> {
    let ending = Ending::from(detail);
    let is_plain = ending.cause == Cause::Itself && ending.incomplete.is_none();
    if is_plain && ending.code == 0 { Vec::new() } else { vec![summary(&ending)] }
}
