//! Where attempts are kept: one worker that owns every file it writes, and readers that follow it.
//!
//! All decisions about who may write are made by the worker, in the order in which requests arrive. So no record of a
//! superseded connection can slip in behind its successor's hello, and one round of syncing serves every build.
//!
//! On disk, below the data directory, everything can be read with ordinary tools:
//!
//! ```text
//! builds/BUILD/build.json                what was declared of it
//! builds/BUILD/reports                   what launchers and exporters told about it, one JSON object per line
//! builds/BUILD/cancel.json               that somebody wants it to stop, and why
//! builds/BUILD/verdict.json              the verdict, once there is one
//! builds/BUILD/STEP/ATTEMPT/log          stdout and stderr bytes in record order
//! builds/BUILD/STEP/ATTEMPT/events       lifecycle events, one JSON object per line
//! builds/BUILD/STEP/ATTEMPT/index        48 bytes per record, see [`index`]
//! builds/BUILD/STEP/ATTEMPT/attempt.json whose attempt it is
//! builds/BUILD/STEP/ATTEMPT/finished.json FINISHED and what was answered, once accepted
//! builds/BUILD/STEP/ATTEMPT/{log,events,index}.zst  in place of the plain files once they are sealed, see [`seal`]
//! builds/.expired-BUILD                  a build that is being removed, see [`expire`]
//! reserve                                1 MiB of nothing: given up in pieces for ends and verdicts when the disk is full
//! ```
//!
//! A round takes what all connections have handed over, writes payloads and index entries of every attempt, syncs the
//! files that were written to, or the whole file system when they are many, and then lets the new progress be known. What has no room stays in memory and is tried
//! again, while its agent waits for the acknowledgement; other errors end the attempt's connection, and the next hello
//! goes on from what is durable.

pub(crate) mod archive;
mod attempt;
mod current;
pub(crate) mod expire;
#[cfg(test)]
mod faulty;
#[cfg(all(fuzzing, feature = "cli"))]
pub(crate) mod fuzzing;
mod index;
mod log;
mod quarantine;
mod quota;
mod raw;
mod reader;
mod recency;
mod recover;
mod room;
pub(crate) mod seal;
mod sealed;
mod steps;
pub(crate) mod verify;
mod walk;
mod worker;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use phonehome_env::{Env, Nature, disk::Disk};
use phonehome_proto::{
    attempts::Lease,
    close::CloseCode,
    frame::{Durable, Finished, FinishedAck, Hello, Record, UnixMicros},
    id::BuildId,
    receiver::Receiver,
    tally::Tally,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
    time::timeout,
};

pub(crate) use self::{
    attempt::{AttemptFiles, Progress},
    raw::{BLOCK, Slice, Spot, Start, Tail},
    reader::{AttemptReader, Found, Next},
};
use self::{steps::Steps, worker::Worker};
use crate::{meter::Meter, tasks::Tasks};

/// What an acknowledgement promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// Synced to the disk: survives a crash of the machine.
    Fsync,
    /// With the operating system: survives a crash of this process.
    #[default]
    Os,
}

impl Durability {
    pub(crate) fn on_the_wire(self) -> Durable {
        match self {
            Self::Fsync => Durable::Fsync,
            Self::Os => Durable::Memory,
        }
    }
}

/// What a store promises and leaves to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StoreSettings {
    pub(crate) durability: Durability,
    /// Bytes of the file system that output does not take: with less, it waits as on a full disk.
    pub(crate) min_free: u64,
}

/// Without a low water mark.
impl From<Durability> for StoreSettings {
    fn from(durability: Durability) -> Self {
        Self { durability, min_free: 0 }
    }
}

/// The way to the store's worker.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    jobs: mpsc::Sender<Job>,
    room: QueueRoom,
    disk: Arc<dyn Disk>,
    nature: Arc<dyn Nature>,
    root: Arc<PathBuf>,
    durability: Durability,
    meter: Arc<Meter>,
    is_full: Arc<AtomicBool>,
}

/// What is asked of the worker.
#[derive(Debug)]
enum Job {
    /// With the account after these records, so that no byte is hashed twice.
    Append {
        writer: Writer,
        records: Vec<Record>,
        tally: Tally,
        room: OwnedSemaphorePermit,
    },
    Finish {
        writer: Writer,
        finished: Box<Finished>,
        answer: FinishedAck,
    },
    /// Drops what is kept in memory of a build that has ended.
    Forget {
        build: BuildId,
    },
    Open {
        hello: Box<Hello>,
        changed: watch::Sender<u64>,
        reply: oneshot::Sender<Result<Opened, OpenError>>,
    },
    /// Of what comes after it for this build, so much is stored.
    Limit {
        build: BuildId,
        bytes: u64,
    },
    /// Takes back what was stored beyond this account.
    Rewind {
        writer: Writer,
        tally: Tally,
        reply: oneshot::Sender<io::Result<bool>>,
    },
    /// Voids every lease of a build, behind what was handed over before.
    Stop {
        build: BuildId,
        reply: oneshot::Sender<io::Result<()>>,
    },
    Survey {
        build: BuildId,
        changed: watch::Sender<u64>,
        reply: oneshot::Sender<io::Result<Vec<Surveyed>>>,
    },
    /// Writes a small file of a build, once.
    Keep {
        build: BuildId,
        kept: Kept,
        contents: Vec<u8>,
        reply: oneshot::Sender<io::Result<bool>>,
    },
    /// Adds a line to a build's reports.
    Report {
        build: BuildId,
        line: Vec<u8>,
        reply: oneshot::Sender<io::Result<()>>,
    },
}

/// Small files of a build, each written once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Cancel,
    Declaration,
    Verdict,
}

impl Kept {
    fn name(self) -> &'static str {
        match self {
            Self::Cancel => CANCEL,
            Self::Declaration => "build.json",
            Self::Verdict => "verdict.json",
        }
    }
}

/// Where it is kept that a build is to stop, in its directory.
const CANCEL: &str = "cancel.json";

/// Permission to write to one attempt.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    pub(crate) files: Arc<AttemptFiles>,
    pub(crate) lease: Lease,
}

/// What a hello gets: the attempt as it is stored.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) writer: Writer,
    pub(crate) receiver: Receiver,
    pub(crate) progress: watch::Receiver<Progress>,
}

impl Opened {
    /// An attempt that has its end, for its agent to hear again what was answered: nothing is written. `None` when there
    /// is no end.
    pub(crate) fn again(files: Arc<AttemptFiles>) -> Option<Self> {
        let progress = files.progress.subscribe();
        let finished = progress.borrow().finished.clone()?;
        let mut stored = Tally::default();
        stored.skip_to(finished.0.next);
        let writer = Writer { lease: Lease::void(files.attempt), files };
        Some(Self { writer, receiver: Receiver::resume(stored, 0, Some(finished)), progress })
    }
}

/// An attempt that was found on the disk.
#[derive(Debug)]
pub(crate) struct Surveyed {
    /// Its progress is what is stored; a later hello of its agent goes on with the same.
    pub(crate) files: Arc<AttemptFiles>,
    /// Its end, if it has one, and what was answered.
    pub(crate) finished: Option<(Finished, FinishedAck)>,
}

/// Why a hello is turned away.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("the agent contradicts what is stored")]
    Contradiction(#[from] phonehome_proto::receiver::AgentViolation),
    #[error("{1}")]
    Refused(CloseCode, &'static str),
    #[error("the store cannot be used")]
    Storage(#[from] io::Error),
}

/// The store did not take a job in time, or its worker is gone.
#[derive(Debug, thiserror::Error)]
#[error("the store does not take records")]
pub(crate) struct Stuck;

/// Jobs waiting for the worker: one of every agent that a server may have, so that one round takes them all. What they
/// hold is bounded by [`QueueRoom`].
const QUEUE: usize = 16 * 1024;

/// Payload that may wait for the worker, bytes, and as much again is in its current round. What it does not take waits
/// with its connection, which reads no more until then.
///
/// Small messages have a share of their own: no log bomb keeps a quiet build out of the next round.
#[derive(Debug, Clone)]
struct QueueRoom {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
}

/// Payload of a small message, bytes: a few lines.
const SMALL: u64 = 4 * 1024;

/// Small messages that may wait, bytes: five lines of each of 12,000 agents. A round costs what the number of its files
/// costs, hardly more for more lines, so after an outage a few large rounds catch up where small ones never would.
const SMALL_ROOM: usize = 16 * 1024 * 1024;

/// Other messages that may wait, bytes: what a disk writes in about a tenth of a second.
const LARGE_ROOM: usize = 12 * 1024 * 1024;

impl QueueRoom {
    fn new() -> Self {
        Self { small: Arc::new(Semaphore::new(SMALL_ROOM)), large: Arc::new(Semaphore::new(LARGE_ROOM)) }
    }

    /// Waits for room, in turns.
    async fn take(&self, records: &[Record]) -> Result<OwnedSemaphorePermit, Stuck> {
        let cost: u64 = records.iter().map(Record::cost).sum();
        let room = if cost <= SMALL { &self.small } else { &self.large };
        let cost = u32::try_from(cost).unwrap_or(u32::MAX).min(LARGE_ROOM as u32);
        room.clone().acquire_many_owned(cost).await.map_err(|_| Stuck)
    }
}

/// How long a connection waits for the store before it closes with "storage unavailable".
const PATIENCE: Duration = Duration::from_secs(30);

impl Store {
    /// Opens or makes the data directory and starts the worker, which ends when the last handle is dropped.
    pub(crate) fn open(env: &Env, root: &Path, settings: impl Into<StoreSettings>, tasks: &Tasks) -> io::Result<Self> {
        let StoreSettings { durability, min_free } = settings.into();
        let disk = env.disk.clone();
        let is_new = !disk.exists(root)?;
        disk.create_dirs(&root.join("builds"))?;
        if durability == Durability::Fsync {
            disk.sync_dir(root)?;
            match root.parent() {
                Some(parent) if is_new && parent != Path::new("") => disk.sync_dir(parent)?,
                Some(_) | None => {}
            }
        }
        let (jobs, queue) = mpsc::channel(QUEUE);
        let meter = Arc::new(Meter::default());
        let mut steps = Steps::new(disk.clone(), root, durability);
        steps.keep_free(min_free);
        let is_full = steps.is_full();
        Worker::start(env, queue, steps, meter.clone(), tasks)?;
        Ok(Self {
            jobs,
            room: QueueRoom::new(),
            disk,
            nature: env.nature.clone(),
            root: Arc::new(root.to_owned()),
            durability,
            meter,
            is_full,
        })
    }

    pub(crate) fn time_of_day(&self) -> UnixMicros {
        self.nature.now()
    }

    /// Where everything is.
    pub(crate) fn data(&self) -> &Path {
        &self.root
    }

    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// Whether output waits because it has no room.
    pub(crate) fn is_full(&self) -> bool {
        self.is_full.load(Ordering::Relaxed)
    }

    /// What this server counts.
    pub(crate) fn meter(&self) -> &Arc<Meter> {
        &self.meter
    }

    pub(crate) fn durability(&self) -> Durability {
        self.durability
    }

    /// Limits what a build may store, over all its steps and attempts: what is there from an earlier process counts. Said
    /// before its first survey or hello; without it there is no limit.
    ///
    /// # Errors
    ///
    /// When the store takes nothing.
    pub(crate) async fn limit(&self, build: &BuildId, bytes: u64) -> Result<(), Stuck> {
        self.send(Job::Limit { build: build.clone(), bytes }).await
    }

    /// Makes or resumes the attempt of an agent. Every earlier [`Writer`] of the step is void from then on.
    pub(crate) async fn open_attempt(&self, hello: Hello, changed: watch::Sender<u64>) -> Result<Opened, OpenError> {
        let (reply, opened) = oneshot::channel();
        self.send(Job::Open { hello: Box::new(hello), changed, reply }).await.map_err(|Stuck| gone())?;
        opened.await.map_err(|_| gone())?
    }

    /// Hands over new records. They are durable when the attempt's progress says so.
    pub(crate) async fn append(&self, writer: &Writer, records: Vec<Record>, tally: &Tally) -> Result<(), Stuck> {
        let room = timeout(PATIENCE, self.room.take(&records)).await.map_err(|_| Stuck)??;
        self.send(Job::Append { writer: writer.clone(), records, tally: tally.clone(), room }).await
    }

    /// Hands over the end.
    pub(crate) async fn finish(&self, writer: &Writer, finished: Finished, answer: FinishedAck) -> Result<(), Stuck> {
        self.send(Job::Finish { writer: writer.clone(), finished: Box::new(finished), answer }).await
    }

    /// Takes back every record beyond `tally`, durably, unless the writer may write no more: says whether it did. Nothing that the attempt's progress said before this returns may
    /// be acknowledged.
    pub(crate) async fn rewind(&self, writer: &Writer, tally: &Tally) -> Result<bool, Stuck> {
        let (reply, done) = oneshot::channel();
        self.send(Job::Rewind { writer: writer.clone(), tally: tally.clone(), reply }).await?;
        match timeout(PATIENCE, done).await {
            Ok(Ok(Ok(rewound))) => Ok(rewound),
            Ok(Ok(Err(_)) | Err(_)) | Err(_) => Err(Stuck),
        }
    }

    /// Ends the writing in a build: what was handed over before is stored, as far as there is room, and nothing after it.
    ///
    /// # Errors
    ///
    /// When the worker has ended.
    pub(crate) async fn stop(&self, build: &BuildId) -> io::Result<()> {
        let (reply, stopped) = oneshot::channel();
        self.jobs.send(Job::Stop { build: build.clone(), reply }).await.map_err(|_| gone())?;
        stopped.await.map_err(|_| gone())?
    }

    /// Drops what is kept in memory of a build that has ended: its files can still be read, and whoever asks for it later
    /// has it taken up from the disk.
    pub(crate) async fn forget(&self, build: &BuildId) -> Result<(), Stuck> {
        self.send(Job::Forget { build: build.clone() }).await
    }

    async fn send(&self, job: Job) -> Result<(), Stuck> {
        match timeout(PATIENCE, self.jobs.send(job)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Stuck),
        }
    }

    /// Whether a build has its verdict.
    pub(crate) fn has_verdict(&self, build: &str) -> bool {
        self.disk.exists(&self.root.join("builds").join(build).join("verdict.json")).unwrap_or(false)
    }

    /// Stores a build's verdict as durably as everything else, after all that was handed over before; `false` when there
    /// is another one already: the first one wins. The same one may be recorded again, after an error say.
    ///
    /// # Errors
    ///
    /// When it could not be stored, or it is not known whether it is.
    pub(crate) async fn record_verdict(&self, build: &BuildId, contents: Vec<u8>) -> io::Result<bool> {
        self.keep(build, Kept::Verdict, contents).await
    }

    /// Stores what was declared of a build, in the same way.
    ///
    /// # Errors
    ///
    /// When it could not be stored, or it is not known whether it is.
    pub(crate) async fn declare(&self, build: &BuildId, contents: Vec<u8>) -> io::Result<bool> {
        self.keep(build, Kept::Declaration, contents).await
    }

    /// Stores that a build is to stop, and why; `false` when that is stored already, or the build is not there to be
    /// stopped.
    ///
    /// # Errors
    ///
    /// When it could not be stored, or it is not known whether it is.
    pub(crate) async fn record_cancel(&self, build: &BuildId, contents: Vec<u8>) -> io::Result<bool> {
        self.keep(build, Kept::Cancel, contents).await
    }

    async fn keep(&self, build: &BuildId, kept: Kept, contents: Vec<u8>) -> io::Result<bool> {
        let (reply, done) = oneshot::channel();
        let job = Job::Keep { build: build.clone(), kept, contents, reply };
        self.jobs.send(job).await.map_err(|_| gone())?;
        done.await.map_err(|_| gone())?
    }

    /// Adds a line, which ends with a line feed, to a build's reports, as durably as everything else.
    ///
    /// # Errors
    ///
    /// When it could not be stored, or it is not known whether it is.
    pub(crate) async fn report(&self, build: &BuildId, line: Vec<u8>) -> io::Result<()> {
        let (reply, done) = oneshot::channel();
        self.jobs.send(Job::Report { build: build.clone(), line, reply }).await.map_err(|_| gone())?;
        done.await.map_err(|_| gone())?
    }

    /// Every attempt of a build that is on the disk, by step and number. Opening them reads and checks all that was
    /// stored, at the speed of the disk, and other builds wait meanwhile.
    ///
    /// # Errors
    ///
    /// When one of them cannot be opened.
    pub(crate) async fn survey(&self, build: &BuildId, changed: watch::Sender<u64>) -> io::Result<Vec<Surveyed>> {
        let (reply, surveyed) = oneshot::channel();
        self.jobs.send(Job::Survey { build: build.clone(), changed, reply }).await.map_err(|_| gone())?;
        surveyed.await.map_err(|_| gone())?
    }
}

/// The worker has ended.
fn gone() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

#[cfg(test)]
mod tests {
    use phonehome_env::Workers;
    use phonehome_proto::frame::Stream;

    use super::{
        faulty::{Agent, FaultyDisk, tempdir},
        *,
    };

    /// Longer than anything here takes.
    const LIMIT: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_thread_and_a_task_store_the_same() {
        let delay: Arc<dyn Fn() -> Duration + Send + Sync> = Arc::new(|| Duration::from_millis(1));
        for workers in [Workers::Threads, Workers::Tasks(delay)] {
            let scene = Scene::new(workers);
            let mut agent = Agent::new(1);
            let (build, changed) = ("b".parse().unwrap(), watch::Sender::new(0));
            let opened = scene.store.open_attempt(agent.hello(0), changed.clone()).await.unwrap();
            scene.append(&opened.writer, &mut agent, "stored").await;
            scene.progress(&opened.writer, |progress| progress.next == 1).await;
            assert!(!scene.store.has_verdict("b"));
            assert!(scene.store.record_verdict(&build, b"{}".to_vec()).await.unwrap());
            assert!(scene.store.has_verdict("b"));
            let found = scene.store.survey(&build, changed).await.unwrap();
            assert!(found.len() == 1 && Arc::ptr_eq(&found[0].files, &opened.writer.files));
            let mut reader = AttemptReader::open(found[0].files.clone()).unwrap();
            assert!(matches!(reader.next(), Ok(Some(Found::Record(record))) if record.payload == "stored"));
        }
    }

    /// Nobody has to say or send anything for that.
    #[tokio::test(start_paused = true)]
    async fn what_waits_for_room_is_stored_when_there_is_some() {
        let scene = Scene::new(Workers::Tasks(Arc::new(|| Duration::from_millis(1))));
        let mut agent = Agent::new(1);
        let opened = scene.store.open_attempt(agent.hello(0), watch::Sender::new(0)).await.unwrap();
        scene.disk.fail_always("write log", io::ErrorKind::StorageFull);
        scene.append(&opened.writer, &mut agent, "waits").await;
        let mut progress = opened.progress.clone();
        scene.progress(&opened.writer, |progress| progress.full).await;
        for _ in 0..3 {
            progress.mark_unchanged();
            timeout(Duration::from_secs(2), progress.changed()).await.expect("it is said again").unwrap();
            assert!(progress.borrow().full && progress.borrow().next == 0);
        }
        scene.disk.heal();
        scene.progress(&opened.writer, |progress| progress.next == 1 && !progress.full).await;
    }

    #[tokio::test]
    async fn no_large_message_waits_where_small_ones_do() {
        let room = QueueRoom::new();
        let records = |len: usize| [Record::new(0, 0, Stream::Stdout, 0, vec![b'x'; len].into())];
        let large = records(60 * 1024);
        let mut taken = Vec::new();
        while let Ok(permit) = timeout(Duration::from_millis(1), room.take(&large)).await {
            taken.push(permit.unwrap());
        }
        assert!((150..250).contains(&taken.len()), "{}", taken.len());
        for _ in 0..10_000 {
            taken.push(timeout(LIMIT, room.take(&records(80))).await.expect("there is room").unwrap());
        }
    }

    #[tokio::test]
    async fn a_build_that_was_forgotten_can_be_taken_up_again() {
        let scene = Scene::new(Workers::Threads);
        let mut agent = Agent::new(1);
        let opened = scene.store.open_attempt(agent.hello(0), watch::Sender::new(0)).await.unwrap();
        scene.append(&opened.writer, &mut agent, "stored").await;
        scene.store.forget(&"b".parse().unwrap()).await.unwrap();
        let found = scene.store.survey(&"b".parse().unwrap(), watch::Sender::new(0)).await.unwrap();
        assert!(found.len() == 1 && !Arc::ptr_eq(&found[0].files, &opened.writer.files));
        assert_eq!(found[0].files.progress.borrow().next, 1);
    }

    #[tokio::test]
    async fn a_store_whose_tasks_were_stopped_takes_nothing() {
        let scene = Scene::new(Workers::Tasks(Arc::new(|| Duration::ZERO)));
        scene.tasks.stop();
        scene.store.jobs.closed().await;
        let refused = scene.store.open_attempt(Agent::new(1).hello(0), watch::Sender::new(0)).await;
        assert!(matches!(refused, Err(OpenError::Storage(_))));
        assert!(scene.store.record_verdict(&"b".parse().unwrap(), Vec::new()).await.is_err());
    }

    struct Scene {
        disk: FaultyDisk,
        tasks: Tasks,
        store: Store,
        _dir: tempfile::TempDir,
    }

    impl Scene {
        fn new(workers: Workers) -> Self {
            let (dir, disk, tasks) = (tempdir(), FaultyDisk::new(), Tasks::default());
            let env = Env { disk: Arc::new(disk.clone()), workers, ..Env::real() };
            let store = Store::open(&env, &dir.path().join("data"), Durability::Fsync, &tasks).unwrap();
            Self { disk, tasks, store, _dir: dir }
        }

        async fn append(&self, writer: &Writer, agent: &mut Agent, text: &str) {
            let record = agent.write(Stream::Stdout, text);
            self.store.append(writer, vec![record], &agent.tally).await.unwrap();
        }

        async fn progress(&self, writer: &Writer, is_it: impl FnMut(&Progress) -> bool) {
            let mut progress = writer.files.progress.subscribe();
            timeout(LIMIT, progress.wait_for(is_it)).await.expect("it comes to that").unwrap();
        }
    }
}
