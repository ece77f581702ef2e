//! The thread that writes lines, and the queue to it that nobody waits for.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

use phonehome_env::Nature;
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};
use tracing::warn;

use super::line;

/// Where the lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Destination {
    /// A file. When it has `size` bytes it becomes PATH.1, and so on up to PATH.KEEP.
    File { path: PathBuf, size: u64, keep: u32 },
    /// Standard output.
    Stdout,
}

/// The way to the thread.
#[derive(Debug)]
pub(super) struct Writer {
    queue: SyncSender<Job>,
    backlog: Arc<Backlog>,
}

/// What is told of the queue, at both ends.
#[derive(Debug, Default)]
struct Backlog {
    bytes: AtomicUsize,
    dropped: AtomicU64,
}

#[derive(Debug)]
enum Job {
    Flush(oneshot::Sender<()>),
    Line(Vec<u8>),
}

/// Lines that wait. A line has some hundred bytes: so many are written in well under a second.
const QUEUE: usize = 8192;

/// Bytes that wait: lines may have labels of 32 KiB each.
const QUEUE_BYTES: usize = 16 * 1024 * 1024;

/// Bytes gathered for one write.
const BATCH: usize = 64 * 1024;

/// Pause before a full queue is asked to flush again.
const FLUSH_RETRY: Duration = Duration::from_millis(20);

impl Writer {
    /// Opens the destination and starts the thread, which ends with the last handle.
    pub(super) fn start(nature: Arc<dyn Nature>, destination: Destination) -> io::Result<Self> {
        let sink = Sink::open(destination)?;
        let (queue, jobs) = sync_channel(QUEUE);
        let backlog = Arc::new(Backlog::default());
        let scribe = Scribe { jobs, sink, nature, backlog: backlog.clone(), told: 0, is_failing: false };
        thread::Builder::new().name("lifecycle".into()).spawn(move || scribe.run())?;
        Ok(Self { queue, backlog })
    }

    /// Hands a line over. One that has no place in the queue is counted, and the log says so later.
    pub(super) fn write(&self, line: Vec<u8>) {
        let len = line.len();
        let waiting = self.backlog.bytes.fetch_add(len, Ordering::Relaxed);
        if waiting + len > QUEUE_BYTES || self.queue.try_send(Job::Line(line)).is_err() {
            self.backlog.bytes.fetch_sub(len, Ordering::Relaxed);
            self.backlog.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lines that were not written.
    pub(super) fn dropped(&self) -> u64 {
        self.backlog.dropped.load(Ordering::Relaxed)
    }

    /// Waits until everything before is written, at most for `patience`.
    pub(super) async fn flush(&self, patience: Duration) {
        let flushed = async {
            let (done, flushed) = oneshot::channel();
            let mut job = Job::Flush(done);
            while let Err(full) = self.queue.try_send(job) {
                job = match full {
                    TrySendError::Full(job) => job,
                    TrySendError::Disconnected(_) => return,
                };
                sleep(FLUSH_RETRY).await;
            }
            drop(flushed.await); // a thread that is gone writes nothing more
        };
        if timeout(patience, flushed).await.is_err() {
            warn!("the end of the lifecycle log may not be written: it takes too long");
        }
    }
}

/// What runs on the thread.
struct Scribe {
    jobs: Receiver<Job>,
    sink: Sink,
    nature: Arc<dyn Nature>,
    backlog: Arc<Backlog>,
    /// Dropped lines that the log has told of.
    told: u64,
    is_failing: bool,
}

impl Scribe {
    fn run(mut self) {
        while let Ok(first) = self.jobs.recv() {
            let mut next = Some(first);
            let (mut batch, mut lines, mut flushed) = (Vec::new(), 0, Vec::new());
            while let Some(job) = next.take() {
                match job {
                    Job::Flush(done) => flushed.push(done),
                    Job::Line(line) => {
                        batch.extend_from_slice(&line);
                        lines += 1;
                    }
                }
                if batch.len() < BATCH {
                    next = self.jobs.try_recv().ok();
                }
            }
            self.write(&batch, lines);
            for done in flushed {
                done.send(()).unwrap_or_default(); // who does not wait any more does not mind
            }
        }
    }

    fn write(&mut self, batch: &[u8], lines: u64) {
        self.backlog.bytes.fetch_sub(batch.len(), Ordering::Relaxed);
        let dropped = self.backlog.dropped.load(Ordering::Relaxed);
        let missing = match dropped - self.told {
            0 => Vec::new(),
            count => line::dropped(self.nature.now(), count),
        };
        let lines_and_missing = [batch, &missing].concat();
        if lines_and_missing.is_empty() {
            return;
        }
        match self.sink.write(&lines_and_missing) {
            Ok(()) => {
                self.told = dropped;
                self.is_failing = false;
            }
            Err(error) => {
                self.backlog.dropped.fetch_add(lines, Ordering::Relaxed);
                if !std::mem::replace(&mut self.is_failing, true) {
                    warn!("the lifecycle log cannot be written, lines are dropped: {error}");
                }
            }
        }
    }
}

/// An open destination.
enum Sink {
    File(Rotated),
    Stdout { is_torn: bool },
}

impl Sink {
    fn open(destination: Destination) -> io::Result<Self> {
        Ok(match destination {
            Destination::File { path, size, keep } => Self::File(Rotated::open(path, size, keep)?),
            Destination::Stdout => Self::Stdout { is_torn: false },
        })
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.write(lines),
            Self::Stdout { is_torn } => write_to(&mut io::stdout(), is_torn, lines),
        }
    }
}

/// A line that was written in part is ended before the next one.
fn write_to(output: &mut impl Write, is_torn: &mut bool, lines: &[u8]) -> io::Result<()> {
    let was_torn = std::mem::replace(is_torn, true);
    if was_torn {
        output.write_all(b"\n")?;
    }
    output.write_all(lines)?;
    output.flush()?;
    *is_torn = false;
    Ok(())
}

/// A file that is replaced by a new one when it is full.
struct Rotated {
    path: PathBuf,
    size: u64,
    keep: u32,
    file: File,
    written: u64,
    /// When it is replaced, bytes.
    full_at: u64,
    is_torn: bool,
}

impl Rotated {
    fn open(path: PathBuf, size: u64, keep: u32) -> io::Result<Self> {
        let file = append(&path)?;
        let written = file.metadata()?.len();
        Ok(Self { path, size, keep, file, written, full_at: size, is_torn: false })
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.was_moved() {
            self.reopen()?; // by logrotate, say
        }
        if self.written > 0
            && self.written + lines.len() as u64 > self.full_at
            && let Err(error) = self.rotate()
        {
            warn!("the lifecycle log goes on in the file that is full: it cannot be replaced: {error}");
            self.full_at = self.written.saturating_add(self.size); // when it is tried again
        }
        write_to(&mut self.file, &mut self.is_torn, lines)?;
        self.written += lines.len() as u64;
        Ok(())
    }

    fn was_moved(&self) -> bool {
        let identity = |found: io::Result<fs::Metadata>| found.map(|found| (found.dev(), found.ino())).ok();
        identity(fs::metadata(&self.path)) != identity(self.file.metadata())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let gap = (1..self.keep).find(|number| !numbered(&self.path, *number).exists());
        for number in (1..gap.unwrap_or(self.keep)).rev() {
            fs::rename(numbered(&self.path, number), numbered(&self.path, number + 1))?;
        }
        if self.keep == 0 {
            fs::remove_file(&self.path)?;
        } else {
            fs::rename(&self.path, numbered(&self.path, 1))?;
        }
        self.reopen()
    }

    fn reopen(&mut self) -> io::Result<()> {
        self.file = append(&self.path)?;
        (self.written, self.full_at) = (self.file.metadata()?.len(), self.size);
        self.is_torn = false;
        Ok(())
    }
}

/// For its owner and a group that collects logs.
fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use phonehome_env::Env;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn lines_are_written_in_order_and_files_are_rotated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lifecycle.log");
        let writer = start(&path, 100, 2);
        for number in 0..50 {
            writer.write(format!("line {number:02}\n").into_bytes());
            writer.flush(PATIENCE).await;
        }
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        let all = [numbered(&path, 2), numbered(&path, 1), path.clone()].map(|path| read(&path));
        assert!(all.iter().all(|text| text.len() <= 100), "{all:?}");
        let last: String = (26..50).map(|number| format!("line {number:02}\n")).collect();
        assert!(all.concat().ends_with(&last), "{all:?}");
        assert!(!numbered(&path, 3).exists() && writer.dropped() == 0);
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_replaced_is_written_further_until_it_can() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lifecycle.log");
        let obstacle = numbered(&path, 1);
        fs::create_dir(&obstacle).unwrap();
        let writer = start(&path, 16, 1);
        let write = async |text: &str| {
            writer.write(text.as_bytes().to_vec());
            writer.flush(PATIENCE).await;
        };
        for line in ["first\n", "second\n", "third\n", "fourth\n"] {
            write(line).await;
        }
        assert_eq!(
            (fs::read_to_string(&path).unwrap().as_str(), writer.dropped()),
            ("first\nsecond\nthird\nfourth\n", 0)
        );
        fs::remove_dir(&obstacle).unwrap();
        write("fifth\n").await;
        write("sixth\n").await;
        assert!(fs::read_to_string(&path).unwrap().ends_with("sixth\n") && obstacle.is_file());
    }

    #[tokio::test]
    async fn a_file_that_was_moved_away_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let (path, moved) = (dir.path().join("lifecycle.log"), dir.path().join("moved"));
        let writer = start(&path, 1000, 1);
        writer.write(b"first\n".to_vec());
        writer.flush(PATIENCE).await;
        fs::rename(&path, &moved).unwrap();
        writer.write(b"second\n".to_vec());
        writer.flush(PATIENCE).await;
        assert_eq!(
            (fs::read_to_string(moved).unwrap(), fs::read_to_string(path).unwrap()),
            ("first\n".into(), "second\n".into())
        );
    }

    #[tokio::test]
    async fn nobody_waits_for_a_log_that_does_not_take_lines_and_it_says_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        // Opened for both, so that opening it to write does not wait.
        let reader = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let writer = start(&path, u64::MAX, 1);
        let line = vec![b'x'; 100_000];
        for _ in 0..1000 {
            writer.write([&line[..], b"\n"].concat());
        }
        let dropped = writer.dropped();
        assert!(dropped > 0, "100 MB do not fit anywhere");
        let told = tokio::task::spawn_blocking(move || {
            use std::io::BufRead;
            let mut lines = io::BufReader::new(reader).lines();
            lines.find_map(|line| line.ok().filter(|line| line.contains("LinesDropped"))).unwrap()
        });
        let told = timeout(PATIENCE, told).await.unwrap().unwrap();
        assert!(told.contains(&format!("\"count\":{dropped}")), "{told}");
    }

    #[tokio::test]
    async fn lines_that_cannot_be_written_are_counted_and_the_rest_follows() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("place");
        fs::create_dir(&place).unwrap();
        let path = place.join("lifecycle.log");
        let writer = start(&path, 10, 1);
        writer.write(b"0123456789\n".to_vec());
        writer.flush(PATIENCE).await;
        fs::remove_dir_all(&place).unwrap();
        writer.write(b"lost\n".to_vec());
        writer.flush(PATIENCE).await;
        assert_eq!(writer.dropped(), 1);
        fs::create_dir(&place).unwrap();
        fs::write(&path, "").unwrap();
        writer.write(b"found\n".to_vec());
        writer.flush(PATIENCE).await;
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("found\n") && text.contains("LinesDropped"), "{text}");
    }

    fn start(path: &Path, size: u64, keep: u32) -> Writer {
        let destination = Destination::File { path: path.to_owned(), size, keep };
        Writer::start(Env::real().nature, destination).unwrap()
    }
}
