//! How fast builds come to rest in the standing server's store, acknowledged and synced, beside what else there is.
//!
//! `cargo bench -p phonehome-tests --bench ingest` prints, for one build and for 64, line-sized and large writes, MB/s and
//! the CPU seconds per GiB of the sending and the receiving side, and the speed as a ratio to the limit: `cat` into a file
//! and one `fdatasync`. Read the ratios: they carry over to other machines, the figures do not. What was stored is
//! compared with what was written, byte for byte, or the row fails. Ways whose tools are missing are skipped.
//!
//! The builds are real ones: an agent each, with a command that writes. An argument, as in `-- '64 builds'`, takes only the
//! workloads whose names contain it.

#[path = "../common/daemon.rs"]
mod daemon;
mod phonehome;
mod process;
mod rivals;
#[path = "../common/standing.rs"]
mod standing;
mod text;

use std::{
    error::Error,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::Instant;

use self::process::children_cpu;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Rounds per way; the medians are shown.
const ROUNDS: usize = 3;

const MIB: u64 = 1 << 20;

/// What the builds write.
#[derive(Clone, Copy)]
struct Workload {
    builds: usize,
    name: &'static str,
    /// Lines in one write.
    lines: u64,
    /// Of all builds together; each writes the same whole number of writes.
    bytes: u64,
}

const WORKLOADS: [Workload; 4] = [
    Workload { builds: 1, name: "one build, line-sized writes", lines: 1, bytes: 64 * MIB },
    Workload { builds: 1, name: "one build, 64 KiB writes", lines: text::BLOCK, bytes: 128 * MIB },
    Workload { builds: 64, name: "64 builds, line-sized writes", lines: 1, bytes: 64 * MIB },
    Workload { builds: 64, name: "64 builds, 64 KiB writes", lines: text::BLOCK, bytes: 128 * MIB },
];

impl Workload {
    /// Bytes of one build.
    fn each(self) -> u64 {
        let write = self.lines * text::LINE;
        self.bytes / self.builds as u64 / write * write
    }

    fn total(self) -> u64 {
        self.each() * self.builds as u64
    }
}

/// One way, and how to run it for a workload.
struct Way {
    name: &'static str,
    run: fn(&Tools, &Path, Workload) -> Result<Run>,
    /// What is missing here, if anything.
    missing: fn() -> Option<&'static str>,
}

const WAYS: [Way; 6] = [
    Way { name: "cat > file, fdatasync", run: rivals::cat, missing: || None },
    Way { name: "phonehome, fsync", run: phonehome::fsync, missing: || None },
    Way { name: "phonehome, os", run: phonehome::os, missing: || None },
    Way { name: "rsyslog RELP", run: rivals::relp, missing: rivals::relp_is_missing },
    Way { name: "rsyslog RELP, sync", run: rivals::relp_sync, missing: rivals::relp_is_missing },
    Way { name: "fluent-bit, ack", run: rivals::fluent_bit, missing: rivals::fluent_bit_is_missing },
];

/// What a way took.
struct Run {
    /// Until all is stored and acknowledged.
    wall: Duration,
    /// Of the commands and what carries their output.
    sender: Duration,
    receiver: Duration,
    /// What became of each build's output.
    stored: Vec<PathBuf>,
}

struct Tools {
    writer: PathBuf,
    agent: PathBuf,
    server: PathBuf,
    /// On a disk: below /tmp may be memory.
    scratch: tempfile::TempDir,
}

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().collect();
    if let [_, role, lines, bytes] = &arguments[..]
        && role == "write"
    {
        return Ok(text::write(lines.parse()?, bytes.parse()?, &mut own_stdout()?)?);
    }
    let wanted = arguments.iter().skip(1).find(|argument| !argument.starts_with('-'));
    let tools = Tools::build()?;
    let mut workloads =
        WORKLOADS.into_iter().filter(|workload| wanted.is_none_or(|wanted| workload.name.contains(wanted)));
    workloads.try_for_each(|workload| compare(&tools, workload))
}

/// Without a buffer: every write is one.
fn own_stdout() -> io::Result<fs::File> {
    Ok(fs::File::from(std::os::fd::AsFd::as_fd(&io::stdout()).try_clone_to_owned()?))
}

fn compare(tools: &Tools, workload: Workload) -> Result<()> {
    let mut out = io::stdout();
    writeln!(out, "\n{}, {} MiB, medians of {ROUNDS}", workload.name, (workload.total() + MIB / 2) / MIB)?;
    writeln!(out, "{:<26} {:>8} {:>10} {:>14} {:>16}", "", "MB/s", "x limit", "sender s/GiB", "receiver s/GiB")?;
    let mut limit = None;
    for way in WAYS {
        if let Some(tool) = (way.missing)() {
            writeln!(out, "{:<26} skipped: {tool} is missing", way.name)?;
            continue;
        }
        match measure(&way, tools, workload) {
            Ok([speed, sender, receiver]) => {
                let ratio = speed / *limit.get_or_insert(speed);
                writeln!(out, "{:<26} {speed:>8.1} {ratio:>10.3} {sender:>14.2} {receiver:>16.2}", way.name)?;
            }
            Err(error) => writeln!(out, "{:<26} FAILED: {error}", way.name)?,
        }
    }
    Ok(())
}

/// Medians of MB/s, and of CPU seconds per GiB of both sides.
fn measure(way: &Way, tools: &Tools, workload: Workload) -> Result<[f64; 3]> {
    let mut rounds = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        let scratch = tempfile::tempdir_in(&tools.scratch)?;
        let run = (way.run)(tools, scratch.path(), workload)?;
        if run.stored.len() != workload.builds {
            return Err(format!("{} builds are stored", run.stored.len()).into());
        }
        run.stored.iter().try_for_each(|stored| text::verify(stored, workload.each()))?;
        let gib = workload.total() as f64 / (1024 * MIB) as f64;
        rounds[0].push(workload.total() as f64 / 1e6 / run.wall.as_secs_f64());
        rounds[1].push(run.sender.as_secs_f64() / gib);
        rounds[2].push(run.receiver.as_secs_f64() / gib);
    }
    Ok(rounds.map(median))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
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

    /// The command of a build.
    fn write_arguments(&self, workload: Workload) -> [String; 4] {
        let writer = self.writer.display().to_string();
        [writer, "write".into(), workload.lines.to_string(), workload.each().to_string()]
    }
}

/// The time and the CPU of what senders do until they have all ended.
fn senders(work: impl FnOnce() -> Result<()>) -> Result<(Duration, Duration)> {
    let (start, cpu) = (Instant::now(), children_cpu()?);
    work()?;
    Ok((start.elapsed(), children_cpu()? - cpu))
}
