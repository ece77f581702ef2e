//! Where attempts are kept: one thread that owns every file it writes, and readers that follow it.
//!
//! All decisions about who may write are made on that thread, in the order in which requests arrive. So no record of a
//! superseded connection can slip in behind its successor's hello, and one round of syncing serves every build.
//!
//! On disk, below the data directory, everything can be read with ordinary tools:
//!
//! ```text
//! builds/BUILD/verdict.json              the verdict, once there is one
//! builds/BUILD/STEP/ATTEMPT/log          stdout and stderr bytes in record order
//! builds/BUILD/STEP/ATTEMPT/events       lifecycle events, one JSON object per line
//! builds/BUILD/STEP/ATTEMPT/index        48 bytes per record, see [`index`]
//! builds/BUILD/STEP/ATTEMPT/attempt.json whose attempt it is
//! builds/BUILD/STEP/ATTEMPT/finished.json FINISHED and what was answered, once accepted
//! ```

mod attempt;
mod index;
mod reader;
mod steps;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use phonehome_proto::{
    attempts::Lease,
    close::CloseCode,
    frame::{Durable, Finished, FinishedAck, Hello, Record},
    receiver::Receiver,
    tally::Tally,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use self::{attempt::write_whole, steps::Steps};
pub(crate) use self::{
    attempt::{AttemptFiles, Progress},
    reader::{AttemptReader, Found},
};

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

/// The way to the store's thread.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    jobs: mpsc::Sender<Job>,
    root: Arc<PathBuf>,
    durability: Durability,
}

/// What a connection asks of the store.
#[derive(Debug)]
enum Job {
    Open {
        hello: Box<Hello>,
        changed: watch::Sender<u64>,
        reply: oneshot::Sender<Result<Opened, OpenError>>,
    },
    /// With the account after these records, so that no byte is hashed twice.
    Append {
        writer: Writer,
        records: Vec<Record>,
        tally: Box<Tally>,
    },
    Finish {
        writer: Writer,
        finished: Box<Finished>,
        answer: FinishedAck,
    },
    /// Takes back what was stored beyond this account.
    Rewind {
        writer: Writer,
        tally: Box<Tally>,
        reply: oneshot::Sender<io::Result<()>>,
    },
}

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

/// An attempt that an earlier process left.
#[derive(Debug)]
#[allow(dead_code, reason = "nobody makes one yet")]
pub(crate) struct Surveyed {
    pub(crate) files: Arc<AttemptFiles>,
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

/// The store did not take a job in time, or its thread is gone.
#[derive(Debug, thiserror::Error)]
#[error("the store does not take records")]
pub(crate) struct Stuck;

/// Jobs waiting for the thread. Each holds at most one message, so this bounds memory too.
const QUEUE: usize = 64;

/// Jobs handled between two rounds of syncing.
const ROUND: usize = 256;

/// How long a connection waits for the store before it closes with "storage unavailable".
const PATIENCE: Duration = Duration::from_secs(30);

impl Store {
    /// Opens or makes the data directory and starts the thread, which ends when the last handle is dropped.
    pub(crate) fn open(root: &Path, durability: Durability) -> io::Result<Self> {
        fs::create_dir_all(root.join("builds"))?;
        let (jobs, queue) = mpsc::channel(QUEUE);
        let root = Arc::new(root.to_owned());
        let steps = Steps::new(root.join("builds"), durability);
        std::thread::Builder::new().name("store".into()).spawn(move || serve(queue, steps))?;
        Ok(Self { jobs, root, durability })
    }

    pub(crate) fn durability(&self) -> Durability {
        self.durability
    }

    /// Makes or resumes the attempt of an agent. Every earlier [`Writer`] of the step is void from then on.
    pub(crate) async fn open_attempt(&self, hello: Hello, changed: watch::Sender<u64>) -> Result<Opened, OpenError> {
        let (reply, opened) = oneshot::channel();
        let gone = |_| OpenError::Storage(io::ErrorKind::BrokenPipe.into());
        self.send(Job::Open { hello: Box::new(hello), changed, reply }).await.map_err(|Stuck| gone(()))?;
        opened.await.map_err(|_| gone(()))?
    }

    /// Hands over new records. They are durable when the attempt's progress says so.
    pub(crate) async fn append(&self, writer: &Writer, records: Vec<Record>, tally: &Tally) -> Result<(), Stuck> {
        self.send(Job::Append { writer: writer.clone(), records, tally: Box::new(tally.clone()) }).await
    }

    /// Hands over the end.
    pub(crate) async fn finish(&self, writer: &Writer, finished: Finished, answer: FinishedAck) -> Result<(), Stuck> {
        self.send(Job::Finish { writer: writer.clone(), finished: Box::new(finished), answer }).await
    }

    /// Takes back every record beyond `tally`, durably. Nothing that the attempt's progress said before this returns may
    /// be acknowledged.
    pub(crate) async fn rewind(&self, writer: &Writer, tally: &Tally) -> Result<(), Stuck> {
        let (reply, done) = oneshot::channel();
        self.send(Job::Rewind { writer: writer.clone(), tally: Box::new(tally.clone()), reply }).await?;
        match timeout(PATIENCE, done).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(_)) | Err(_)) | Err(_) => Err(Stuck),
        }
    }

    /// The attempts that are stored of a build, those of a step in their order.
    pub(crate) fn survey(
        &self,
        _build: &phonehome_proto::id::BuildId,
        _changed: watch::Sender<u64>,
    ) -> impl Future<Output = io::Result<Vec<Surveyed>>> {
        std::future::ready(Ok(Vec::new()))
    }

    async fn send(&self, job: Job) -> Result<(), Stuck> {
        match timeout(PATIENCE, self.jobs.send(job)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Stuck),
        }
    }

    /// Whether a build has its verdict.
    pub(crate) fn has_verdict(&self, build: &str) -> bool {
        self.root.join("builds").join(build).join("verdict.json").exists()
    }

    /// Writes a build's verdict, unless it has one already: the first one wins.
    pub(crate) fn record_verdict(&self, build: &str, verdict: &[u8]) -> io::Result<bool> {
        let dir = self.root.join("builds").join(build);
        fs::create_dir_all(&dir)?;
        if self.has_verdict(build) {
            return Ok(false);
        }
        let path = dir.join("verdict.json");
        write_whole(&path, verdict, self.durability)?;
        Ok(true)
    }
}

/// The thread: takes what has gathered, writes it, syncs once, and only then lets anybody know.
fn serve(mut queue: mpsc::Receiver<Job>, mut steps: Steps) {
    let mut round = Vec::with_capacity(ROUND);
    while let Some(job) = queue.blocking_recv() {
        round.push(job);
        while round.len() < ROUND
            && let Ok(job) = queue.try_recv()
        {
            round.push(job);
        }
        for job in round.drain(..) {
            match job {
                Job::Open { hello, changed, reply } => {
                    let opened = steps.open(*hello, changed);
                    drop(reply.send(opened)); // a connection that is gone has no use for it
                }
                Job::Append { writer, records, tally } => steps.append(&writer, &records, *tally),
                Job::Finish { writer, finished, answer } => steps.finish(&writer, *finished, answer),
                Job::Rewind { writer, tally, reply } => {
                    let rewound = steps.rewind(&writer, *tally);
                    drop(reply.send(rewound)); // a connection that is gone does not go on
                }
            }
        }
        steps.commit();
    }
}
