//! What one round of group commit costs, by the number of attempts that were written to, for three ways to make it
//! durable.
//!
//! `cargo bench -p phonehome-tests --bench commit` prints the median milliseconds of a round, writes included, and each
//! as a ratio to syncing file by file. Every way writes the same: a line to the `log` and an entry to the `index` of each
//! attempt. Read the ratios, and where they cross: the store changes from one way to the other there.
//!
//! The journal is a prototype that lives here alone: one more copy of every byte in a file that all attempts share, synced
//! in place of theirs. What it would need beside, checkpoints and a replay at the start, is not counted.

use std::{
    error::Error,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::Path,
    time::Duration,
};

use tokio::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Attempts that a round writes to.
const DIRTY: [usize; 7] = [1, 4, 8, 16, 64, 256, 1000];

/// Rounds of a way: at least so many, then until it had [`PATIENCE`].
const ROUNDS: usize = 9;

/// Time for one way and one number of attempts.
const PATIENCE: Duration = Duration::from_secs(1);

/// A line of a build.
const LINE: [u8; 80] = *b"[ 12%] Building CXX object src/CMakeFiles/example.dir/one/of/many/files.cc.obj \n";

/// An entry of its index.
const ENTRY: [u8; 48] = [7; 48];

/// One way to make a round durable.
struct Way {
    name: &'static str,
    commit: fn(&mut Scene, usize) -> io::Result<()>,
}

const WAYS: [Way; 3] = [
    Way { name: "fdatasync each", commit: Scene::sync_each },
    Way { name: "one syncfs", commit: Scene::sync_file_system },
    Way { name: "one journal", commit: Scene::sync_journal },
];

/// Attempts and their files, the journal, and the directory of it all.
struct Scene {
    attempts: Vec<[File; 2]>,
    journal: File,
    dir: File,
    /// Rounds so far: where the next line goes.
    rounds: u64,
    journaled: u64,
}

fn main() -> Result<()> {
    // Not below /tmp, which may be memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let mut scene = Scene::new(dir.path())?;
    let mut out = io::stdout();
    writeln!(out, "{:>10}  {}", "attempts", WAYS.map(|way| format!("{:>14} {:>7}", way.name, "ratio")).join("  "))?;
    for dirty in DIRTY {
        let medians = WAYS.map(|way| scene.median(&way, dirty));
        let mut line = format!("{dirty:>10}");
        let first = medians.first().and_then(|median| median.as_ref().ok()).copied().unwrap_or_default();
        for median in medians {
            let median = median?;
            let ratio = median.as_secs_f64() / first.as_secs_f64();
            line += &format!("  {:>11.2} ms {ratio:>7.2}", median.as_secs_f64() * 1e3);
        }
        writeln!(out, "{line}")?;
    }
    Ok(())
}

impl Scene {
    fn new(dir: &Path) -> io::Result<Self> {
        let count = DIRTY.into_iter().max().unwrap_or_default();
        let attempts = (0..count).map(|at| open_attempt(&dir.join(at.to_string()))).collect::<io::Result<_>>()?;
        let (journal, dir) = (File::create(dir.join("journal"))?, File::open(dir)?);
        rustix::fs::syncfs(&dir)?;
        Ok(Self { attempts, journal, dir, rounds: 0, journaled: 0 })
    }

    fn median(&mut self, way: &Way, dirty: usize) -> io::Result<Duration> {
        let (start, mut took) = (Instant::now(), Vec::new());
        while took.len() < ROUNDS || start.elapsed() < PATIENCE {
            let start = Instant::now();
            self.write(dirty)?;
            (way.commit)(self, dirty)?;
            took.push(start.elapsed());
            rustix::fs::syncfs(&self.dir)?; // what this way left for later is not the next one's
        }
        took.sort_unstable();
        Ok(took[took.len() / 2])
    }

    fn write(&mut self, dirty: usize) -> io::Result<()> {
        for [log, index] in &self.attempts[..dirty] {
            log.write_all_at(&LINE, self.rounds * LINE.len() as u64)?;
            index.write_all_at(&ENTRY, self.rounds * ENTRY.len() as u64)?;
        }
        self.rounds += 1;
        Ok(())
    }

    fn sync_each(&mut self, dirty: usize) -> io::Result<()> {
        self.attempts[..dirty].iter().flatten().try_for_each(File::sync_data)
    }

    fn sync_file_system(&mut self, _: usize) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.dir)?)
    }

    fn sync_journal(&mut self, dirty: usize) -> io::Result<()> {
        let block = [&LINE[..], &ENTRY].concat().repeat(dirty);
        self.journal.write_all_at(&block, self.journaled)?;
        self.journaled += block.len() as u64;
        self.journal.sync_data()
    }
}

fn open_attempt(dir: &Path) -> io::Result<[File; 2]> {
    fs::create_dir(dir)?;
    let open = |name| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(dir.join(name));
    Ok([open("log")?, open("index")?])
}
