//! How long a line is on its way from a build's write to somebody who follows the build.
//!
//! `cargo bench -p phonehome-tests --bench follow` prints, at 100 and at 1,000 lines a second, the median and the 99th
//! percentile of the milliseconds between the write and the follower's read, for a plain pipe, for a websocket relay that
//! keeps nothing, and for phonehome, where a line is synced, or with the operating system, before anybody reads it. Every
//! line has to arrive, once and in order, or the row fails. Ways whose tools are missing are skipped.

#[path = "../common/daemon.rs"]
mod daemon;
mod reader;
#[path = "../common/standing.rs"]
mod standing;
mod ways;

use std::{
    error::Error,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Rounds per way; medians over them are shown.
const ROUNDS: usize = 3;

/// Lines a second, and lines.
const RATES: [(u32, u32); 2] = [(100, 400), (1000, 4000)];

/// Lines that do not count: connections are fresh.
const WARM_UP: usize = 50;

/// One way, and how to run it.
struct Way {
    name: &'static str,
    run: fn(&Tools, &Path, [String; 4]) -> Result<Vec<Duration>>,
    needs: Option<&'static str>,
}

const WAYS: [Way; 6] = [
    Way { name: "pipe", run: ways::pipe, needs: None },
    Way { name: "websocat", run: ways::websocat, needs: Some("websocat") },
    Way { name: "phonehome, os, text", run: |t, s, c| ways::phonehome(t, s, c, "os", "log?follow=true"), needs: None },
    Way { name: "phonehome, os, SSE", run: |t, s, c| ways::phonehome(t, s, c, "os", "events"), needs: None },
    Way {
        name: "phonehome, fsync, text",
        run: |t, s, c| ways::phonehome(t, s, c, "fsync", "log?follow=true"),
        needs: None,
    },
    Way { name: "phonehome, fsync, SSE", run: |t, s, c| ways::phonehome(t, s, c, "fsync", "events"), needs: None },
];

struct Tools {
    writer: PathBuf,
    agent: PathBuf,
    server: PathBuf,
    /// On a disk: below /tmp may be memory.
    scratch: tempfile::TempDir,
}

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().collect();
    if let [_, role, rate, lines] = &arguments[..]
        && role == "write"
    {
        return write(rate.parse()?, lines.parse()?);
    }
    let tools = Tools::build()?;
    RATES.into_iter().try_for_each(|(rate, lines)| compare(&tools, rate, lines))
}

/// The build: lines with their numbers and the times they were written.
fn write(rate: u32, lines: u32) -> Result<()> {
    let mut stdout = fs::File::from(std::os::fd::AsFd::as_fd(&io::stdout()).try_clone_to_owned()?);
    let start = reader::now();
    for number in 0..lines {
        let due = start + Duration::from_secs(1) * number / rate;
        daemon::pause_for(due.saturating_sub(reader::now()));
        let line = format!("{number} {} of a build that writes a line now and then\n", reader::now().as_nanos());
        stdout.write_all(line.as_bytes())?;
    }
    Ok(())
}

fn compare(tools: &Tools, rate: u32, lines: u32) -> Result<()> {
    let mut out = io::stdout();
    writeln!(out, "\n{rate} lines a second, medians of {ROUNDS}")?;
    writeln!(out, "{:<26} {:>10} {:>10}", "", "p50 ms", "p99 ms")?;
    for way in WAYS {
        if let Some(tool) = way.needs.filter(|tool| !is_installed(tool)) {
            writeln!(out, "{:<26} skipped: {tool} is missing", way.name)?;
            continue;
        }
        match measure(&way, tools, rate, lines) {
            Ok([half, most]) => writeln!(out, "{:<26} {half:>10.2} {most:>10.2}", way.name)?,
            Err(error) => writeln!(out, "{:<26} FAILED: {error}", way.name)?,
        }
    }
    Ok(())
}

fn is_installed(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(tool).is_file())
}

/// Median and 99th percentile, milliseconds.
fn measure(way: &Way, tools: &Tools, rate: u32, lines: u32) -> Result<[f64; 2]> {
    let mut rounds = [const { Vec::new() }; 2];
    for _ in 0..ROUNDS {
        let scratch = tempfile::tempdir_in(&tools.scratch)?;
        let command = [tools.writer.display().to_string(), "write".into(), rate.to_string(), lines.to_string()];
        let mut took = (way.run)(tools, scratch.path(), command)?;
        if took.len() != lines as usize {
            return Err(format!("{} of {lines} lines arrived", took.len()).into());
        }
        took.drain(..WARM_UP);
        took.sort_unstable();
        rounds[0].push(took[took.len() / 2].as_secs_f64() * 1e3);
        rounds[1].push(took[took.len() * 99 / 100].as_secs_f64() * 1e3);
    }
    Ok(rounds.map(|mut values| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }))
}

impl Tools {
    fn build() -> Result<Self> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let packages = ["-p", "phonehome-agent", "-p", "phonehome-server"];
        let built =
            std::process::Command::new(cargo).args(["build", "--locked", "--release"]).args(packages).status()?;
        if !built.success() {
            return Err("the programs do not build".into());
        }
        let writer = std::env::current_exe()?;
        let release = writer.parent().and_then(Path::parent).ok_or("no target directory")?.to_owned();
        let (agent, server) = (release.join("phonehome-agent"), release.join("phonehome-server"));
        Ok(Self { writer, agent, server, scratch: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))? })
    }
}
