//! `phonehome-server canary`: a build whose output is known beforehand, through a real agent and back.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use bytesize::ByteSize;
use clap::Parser;
use http::Method;
use phonehome_proto::{frame::Stream, id::BuildId};
use serde_json::json;
use tokio::{
    process::{Child, Command},
    time::{Instant, timeout},
};

use super::{
    ServerArgs,
    download::Raw,
    out::{print, say, size},
    progress::Progress,
    told, verify,
};
use crate::{
    cli::hook_args::duration,
    client::{
        http::{Ask, Client},
        model::{Declared, Detail},
        remote_log::{Item, RemoteLog, Wanted},
    },
    hook::via::variables,
};

/// Sends a known build through a real agent and compares what comes back
///
/// Declares a build, runs phonehome-agent with a command whose output is known beforehand (both streams, lines and binary), follows it as a
/// person would, fetches the stored log, and compares bytes, digest and verdict. The build is removed afterwards.
#[derive(Parser)]
#[command(
    after_help = "Exit code: 0 when everything came back as it was sent; 1 when it did not, or not in time; 125 when the canary \
                  could not be sent."
)]
pub(crate) struct CanaryArgs {
    /// The agent
    #[arg(long, value_name = "PATH", default_value = "phonehome-agent")]
    agent: PathBuf,

    /// How much is sent, such as 4MiB
    #[arg(long, value_name = "SIZE", default_value = "4MiB")]
    size: ByteSize,

    /// How long all of it may take
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = duration)]
    timeout: Duration,

    /// Keep the build; without a token that may remove it, it is kept anyway
    #[arg(long)]
    keep: bool,

    #[command(flatten)]
    server: ServerArgs,
}

/// Writes a canary's output; the agent runs it.
#[derive(Parser)]
pub(crate) struct OutputArgs {
    /// Bytes on standard output; standard error gets a quarter of it
    size: u64,
    /// What the bytes are made from
    seed: String,
}

/// Something came back otherwise than it was sent.
const EXIT_WRONG: u8 = 1;

pub(super) async fn run(args: CanaryArgs) -> anyhow::Result<u8> {
    let client = Arc::new(args.server.client()?);
    let id: BuildId = format!("canary-{:016x}", getrandom::u64().context("cannot draw a build id")?).parse()?;
    let canary = Canary { client, id, size: args.size.as_u64() };
    let flown = timeout(args.timeout, canary.fly(&args.agent)).await;
    let code = match flown {
        Ok(Ok(report)) => {
            print(report)?;
            0
        }
        Ok(Err(failure)) if failure.is::<NotSent>() => return Err(failure),
        Ok(Err(failure)) => {
            say(format_args!("the canary {} failed: {failure:#}", canary.id));
            EXIT_WRONG
        }
        Err(_) => {
            say(format_args!("the canary {} is not back after {} s", canary.id, args.timeout.as_secs()));
            EXIT_WRONG
        }
    };
    canary.clean_up(args.keep, code == 0).await;
    Ok(code)
}

/// The canary did not even start.
#[derive(Debug, thiserror::Error)]
#[error("the canary cannot be sent: {0}")]
struct NotSent(String);

struct Canary {
    client: Arc<Client>,
    id: BuildId,
    size: u64,
}

impl Canary {
    async fn fly(&self, agent: &Path) -> anyhow::Result<String> {
        let started = Instant::now();
        let declared = self.declare().await?;
        let wanted = Wanted { follow: true, ..Wanted::default() };
        let log = RemoteLog::start(self.client.clone(), self.id.clone(), wanted, Some(PATIENCE));
        let mut agent = self.start(agent, declared)?;
        let launched = Instant::now();
        let (seen, first_byte) = self.watch(log).await?;
        let told = Instant::now();
        let status = agent.wait().await.context("the agent cannot be waited for")?;
        let detail = self.detail().await?;
        check_end(status, &detail)?;
        let expected = Expected::of(self.size, self.id.as_str());
        expected.compare("the followed log", &seen)?;
        self.compare_stored(&expected, &detail).await?;
        let bytes = expected.streams.iter().map(|stream| stream.bytes).sum::<u64>();
        let first_byte = first_byte.map(|at| at - launched).unwrap_or_default();
        let took = told - launched;
        let rate = bytes as f64 / took.as_secs_f64().max(f64::MIN_POSITIVE);
        let text = [
            format!(
                "canary {} is back: {} in {:.3} s ({}/s)",
                self.id,
                size(bytes),
                took.as_secs_f64(),
                size(rate as u64)
            ),
            format!("declared after {:.3} s", (launched - started).as_secs_f64()),
            format!("first byte after {:.3} s, verdict after {:.3} s", first_byte.as_secs_f64(), took.as_secs_f64()),
            "both streams, digest and verdict are as they were sent".to_owned(),
        ];
        Ok(text.join("\n") + "\n")
    }

    async fn declare(&self) -> anyhow::Result<Declared> {
        let body = json!({
            "id": self.id.as_str(),
            "labels": {"phonehome/canary": "true"},
            "timeouts": {"connect": 60, "lost": 60, "total": 600, "grace": 5},
        });
        let declared = self.client.json(&Ask::post("builds", &body)).await;
        declared.map_err(|error| NotSent(error.told()).into())
    }

    fn start(&self, agent: &Path, declared: Declared) -> anyhow::Result<Child> {
        let own = std::env::current_exe().map_err(|error| NotSent(error.to_string()))?;
        let mut command = Command::new(agent);
        // Nothing of this process's own settings: an agent has names of its own for the same things.
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("PHONEHOME_")) {
                command.env_remove(name);
            }
        }
        if let (None, Some(ca)) = (&declared.pin, std::env::var_os("PHONEHOME_CA")) {
            command.env("PHONEHOME_CA", ca);
        }
        for name in ["PHONEHOME_CLIENT_CERT", "PHONEHOME_CLIENT_KEY"] {
            if let Some(path) = std::env::var_os(name) {
                command.env(name, path); // what a server asks of us it asks of agents
            }
        }
        command.envs(variables(declared)).args(["--tee", "off", "--"]).arg(own);
        command.args(["canary-output", &self.size.to_string(), self.id.as_str()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        let started = command.spawn();
        started.map_err(|error| NotSent(format!("{} cannot be started: {error}", agent.display())).into())
    }

    /// Follows the build as a person would. Says what came of each stream, and when the first byte did.
    async fn watch(&self, mut log: RemoteLog) -> anyhow::Result<([Sum; 2], Option<Instant>)> {
        let (mut seen, mut first_byte) = ([Sum::default(), Sum::default()], None);
        let mut progress = Progress::new();
        while let Some(item) = log.next().await? {
            match item {
                Item::Record { stream: stream @ (Stream::Stdout | Stream::Stderr), payload, .. } => {
                    first_byte.get_or_insert_with(Instant::now);
                    seen[usize::from(stream.number())].add(&payload);
                    progress.show(|| format!("{} are back", size(seen.iter().map(|sum| sum.bytes).sum())));
                }
                Item::Lost { records, .. } => bail!("{records} records were lost"),
                Item::Record { .. } | Item::Report(_) => {}
                Item::Note(line) => say(line),
            }
        }
        Ok((seen, first_byte))
    }

    async fn detail(&self) -> anyhow::Result<Detail> {
        let detail = self.client.json(&Ask::get(format!("builds/{}", self.id))).await;
        detail.map_err(|error| told(&error))
    }

    /// Fetches what is stored: each stream, and all of it, whose digest was promised.
    async fn compare_stored(&self, expected: &Expected, detail: &Detail) -> anyhow::Result<()> {
        let raw = |stream| Raw { build: self.id.to_string(), stream, ..Raw::default() };
        for (stream, expected) in [Stream::Stdout, Stream::Stderr].iter().zip(&expected.streams) {
            let (digest, bytes) = verify::hash(&self.client, &raw(Some(stream.name()))).await?;
            let name = stream.name();
            ensure!(bytes == expected.bytes, "{bytes} bytes of {name} are stored, {} were written", expected.bytes);
            ensure!(digest == expected.digest(), "{name} is stored with other bytes than were written");
        }
        let (digest, _) = verify::hash(&self.client, &raw(None)).await?;
        let mut promised =
            detail.steps.iter().flat_map(|step| &step.attempts).filter_map(|attempt| attempt.digest.as_ref());
        ensure!(promised.next_back() == Some(&digest), "the stored log has another digest than the agent has promised");
        Ok(())
    }

    /// Leaves nothing behind, unless somebody wants to look at it.
    async fn clean_up(&self, keep: bool, is_well: bool) {
        if !is_well {
            // Whatever state it is in, it must not go on; it is kept for whoever looks for the cause.
            let cancel = Ask::post(format!("builds/{}/cancel", self.id), &json!({"reason": "the canary failed"}));
            drop(self.client.ask(&cancel).await); // most probably it has ended
        } else if !keep
            && let Err(error) = self.client.ask(&Ask::new(Method::DELETE, format!("builds/{}", self.id))).await
        {
            say(format_args!("build {} stays: {}", self.id, error.told()));
        }
    }
}

/// How long the server may be away while the canary is under way.
const PATIENCE: Duration = Duration::from_secs(30);

fn check_end(status: ExitStatus, detail: &Detail) -> anyhow::Result<()> {
    ensure!(status.success(), "the agent ended with {status}; the verdict is {}", detail.told());
    ensure!(detail.verdict.as_deref() == Some("succeeded"), "the verdict is {}", detail.told());
    let incomplete = detail.incomplete.as_deref().unwrap_or_default();
    ensure!(detail.complete == Some(true), "the log is not complete: {incomplete}");
    Ok(())
}

/// Length and digest of a stream.
#[derive(Debug, Default)]
struct Sum {
    bytes: u64,
    hasher: blake3::Hasher,
}

impl Sum {
    fn add(&mut self, block: &[u8]) {
        self.bytes += block.len() as u64;
        self.hasher.update(block);
    }

    fn digest(&self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }
}

/// What the streams must be.
struct Expected {
    streams: [Sum; 2],
}

impl Expected {
    fn of(size: u64, seed: &str) -> Self {
        let mut streams = [Sum::default(), Sum::default()];
        Output::new(size, seed).for_each(|(stream, block)| streams[usize::from(stream.number())].add(&block));
        Self { streams }
    }

    fn compare(&self, what: &str, seen: &[Sum; 2]) -> anyhow::Result<()> {
        for ((expected, seen), name) in self.streams.iter().zip(seen).zip(["stdout", "stderr"]) {
            let (sent, came) = (expected.bytes, seen.bytes);
            ensure!(came == sent, "{what} has {came} bytes of {name}, {sent} were written");
            ensure!(expected.digest() == seen.digest(), "{what} has other bytes of {name} than were written");
        }
        Ok(())
    }
}

/// A canary's output, block by block: lines, blocks of any bytes, and some of it on standard error.
struct Output {
    left: u64,
    number: u64,
    seed: blake3::Hash,
}

/// One block of any bytes.
const BLOCK: usize = 8 * 1024;

impl Output {
    fn new(size: u64, seed: &str) -> Self {
        Self { left: size, number: 0, seed: blake3::hash(seed.as_bytes()) }
    }
}

impl Iterator for Output {
    type Item = (Stream, Vec<u8>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let number = self.number;
        self.number += 1;
        let mut hasher = blake3::Hasher::new_keyed(self.seed.as_bytes());
        hasher.update(&number.to_le_bytes());
        let mut block = if number.is_multiple_of(2) {
            format!("line {number} {}\n", hasher.finalize().to_hex()).into_bytes()
        } else {
            let mut block = vec![0; BLOCK];
            hasher.finalize_xof().fill(&mut block);
            block
        };
        block.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= block.len() as u64;
        let stream = if number % 5 == 3 { Stream::Stderr } else { Stream::Stdout };
        Some((stream, block))
    }
}

/// Writes the output, as the command that the agent runs.
pub(super) fn write_output(args: &OutputArgs) -> anyhow::Result<u8> {
    let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
    for (stream, block) in Output::new(args.size, &args.seed) {
        match stream {
            Stream::Stdout => stdout.write_all(&block)?,
            Stream::Stderr | Stream::Event => stderr.write_all(&block)?,
        }
    }
    stdout.flush()?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_is_known_beforehand_and_has_everything_in_it() {
        let all: Vec<_> = Output::new(100_000, "seed").collect();
        assert_eq!(all.iter().map(|(_, block)| block.len()).sum::<usize>(), 100_000);
        assert!(all.iter().any(|(stream, _)| *stream == Stream::Stderr));
        assert!(all.iter().any(|(_, block)| std::str::from_utf8(block).is_err()));
        let expected = Expected::of(100_000, "seed");
        expected.compare("it", &Expected::of(100_000, "seed").streams).unwrap();
        assert!(expected.compare("it", &Expected::of(100_000, "other").streams).is_err());
        assert!(expected.compare("it", &Expected::of(99_999, "seed").streams).is_err());
    }
}
