//! Which attempts exist and who may write them: the state of the store's thread.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use phonehome_proto::{
    attempts::{Attempts, Lease},
    close::CloseCode,
    frame::{Finished, FinishedAck, Hello, Record},
    id::{Attempt, BuildId, StepName},
    receiver::Receiver,
    tally::Tally,
};
use tokio::sync::watch;
use tracing::error;

use super::{
    Durability, OpenError, Opened, Writer,
    attempt::{AttemptFiles, AttemptLog, Owner, Progress, report_torn},
};

/// Every step that an agent has said hello for since the start of this process.
#[derive(Debug)]
pub(super) struct Steps {
    root: PathBuf,
    durability: Durability,
    steps: HashMap<(BuildId, StepName), Step>,
    /// Steps written to since the last commit.
    dirty: Vec<(BuildId, StepName)>,
}

#[derive(Debug)]
struct Step {
    attempts: Attempts,
    current: Option<Current>,
}

/// The newest attempt, open for writing.
#[derive(Debug)]
struct Current {
    log: AttemptLog,
    files: Arc<AttemptFiles>,
    changed: watch::Sender<u64>,
    failed: bool,
}

impl Steps {
    pub(super) fn new(root: PathBuf, durability: Durability) -> Self {
        Self { root, durability, steps: HashMap::new(), dirty: Vec::new() }
    }

    /// Takes an agent's hello: decides on its attempt, makes or opens the files, and voids every earlier lease.
    pub(super) fn open(&mut self, hello: Hello, changed: watch::Sender<u64>) -> Result<Opened, OpenError> {
        self.commit(); // what an earlier connection handed over must be counted
        let key = (hello.build.clone(), hello.step.clone());
        let dir = self.root.join(hello.build.as_str()).join(hello.step.as_str());
        if !self.steps.contains_key(&key) {
            self.steps.insert(key.clone(), Step::load(&dir)?);
        }
        let step = self.steps.get_mut(&key).expect("it was put there above");
        step.check_memory(&hello)?;
        let lease = step.attempts.handle_hello(hello.producer).map_err(|code| OpenError::Refused(code, why(code)))?;
        let path = dir.join(lease.attempt.to_string());
        if lease.new {
            let log = AttemptLog::create(&path, &Owner::from(&hello), self.durability)
                .inspect_err(|_| step.attempts.undo())?;
            step.current = Some(Current::new(log, new_files(&hello, lease.attempt, path), changed));
        } else if step.current.as_ref().is_none_or(|current| current.failed) {
            let (log, _, torn) = AttemptLog::open(&path)?;
            report_torn(&path, torn);
            let files =
                step.current.take().map_or_else(|| new_files(&hello, lease.attempt, path), |failed| failed.files);
            step.current = Some(Current::new(log, files, changed));
        }
        let current = step.current.as_mut().expect("it was opened above");
        current.greet(&hello, lease, self.durability)
    }

    /// The attempt that `writer` may still write to.
    fn current(&mut self, writer: &Writer) -> Option<&mut Current> {
        let key = (writer.files.build.clone(), writer.files.step.clone());
        let step = self.steps.get_mut(&key)?;
        if !step.attempts.is_current(writer.lease) {
            return None;
        }
        self.dirty.push(key);
        step.current.as_mut().filter(|current| !current.failed)
    }

    pub(super) fn append(&mut self, writer: &Writer, records: &[Record], tally: Tally) {
        let Some(current) = self.current(writer) else { return };
        match current.log.append(records) {
            Ok(()) => current.log.tally = tally,
            Err(error) => current.fail(&error),
        }
    }

    pub(super) fn finish(&mut self, writer: &Writer, finished: Finished, answer: FinishedAck) {
        let durability = self.durability;
        let Some(current) = self.current(writer) else { return };
        let stored = current.log.flush(durability).and_then(|()| current.log.finish(finished, answer, durability));
        match stored {
            Ok(()) => {
                let key = (writer.files.build.clone(), writer.files.step.clone());
                if let Some(step) = self.steps.get_mut(&key) {
                    step.attempts.finish();
                }
            }
            Err(error) => current.fail(&error),
        }
    }

    /// Takes back every record beyond `tally`.
    pub(super) fn rewind(&mut self, writer: &Writer, tally: Tally) -> io::Result<()> {
        let durability = self.durability;
        let Some(current) = self.current(writer) else { return Ok(()) };
        current.rewind(tally, durability).inspect_err(|error| current.fail(error))
    }

    /// Makes everything written since the last call durable and lets it be known.
    pub(super) fn commit(&mut self) {
        self.dirty.sort_unstable();
        self.dirty.dedup();
        for key in self.dirty.drain(..) {
            if let Some(current) = self.steps.get_mut(&key).and_then(|step| step.current.as_mut()) {
                current.commit(self.durability);
            }
        }
    }
}

impl Step {
    /// Takes up what an earlier process left.
    fn load(dir: &Path) -> io::Result<Self> {
        let mut owners = Vec::new();
        let mut finished = false;
        for attempt in 1.. {
            let path = dir.join(attempt.to_string());
            let Ok(owner) = fs::read(path.join("attempt.json")) else { break };
            owners.push(serde_json::from_slice::<Owner>(&owner)?.producer);
            finished = path.join("finished.json").try_exists()?;
        }
        Ok(Self { attempts: Attempts::resume(owners, finished), current: None })
    }
}

impl Step {
    /// Refuses a hello that knows less than is stored, before it voids anybody's lease: an old one of the same agent may
    /// have been under way longer than the newer.
    fn check_memory(&self, hello: &Hello) -> Result<(), OpenError> {
        let Some(current) = &self.current else { return Ok(()) };
        if self.attempts.is_newest(hello.producer) {
            Receiver::resume(current.log.tally.clone(), 0, None).handle_hello(hello)?;
        }
        Ok(())
    }
}

impl Current {
    fn new(log: AttemptLog, files: Arc<AttemptFiles>, changed: watch::Sender<u64>) -> Self {
        let current = Self { log, files, changed, failed: false };
        current.publish();
        current
    }

    fn greet(&mut self, hello: &Hello, lease: Lease, durability: Durability) -> Result<Opened, OpenError> {
        let log = &mut self.log;
        let mut receiver = Receiver::resume(log.tally.clone(), log.lost, log.finished.clone());
        let stored = receiver.next();
        if let Some(oldest) = receiver.handle_hello(hello)? {
            log.hole(stored, oldest);
            log.tally.skip_to(oldest);
            log.lost += oldest - stored;
            if let Err(error) = log.flush(durability) {
                self.fail(&error);
                return Err(error.into());
            }
            receiver = Receiver::resume(log.tally.clone(), log.lost, log.finished.clone());
            self.publish();
        }
        let progress = self.files.progress.subscribe();
        Ok(Opened { writer: Writer { files: self.files.clone(), lease }, receiver, progress })
    }

    /// A file that failed once is not believed again in this process (a later fsync would report success for pages that
    /// were dropped); the next hello opens it from what the disk has.
    fn fail(&mut self, error: &io::Error) {
        error!(attempt = %self.files.dir.display(), "cannot write: {error}");
        self.failed = true;
    }

    /// Takes back every record beyond `tally`. Readers hear of it before the files change, and in this order: whoever
    /// knew of more entries than are left, and fails to read one, sees that the count of rewinds is another.
    fn rewind(&mut self, tally: Tally, durability: Durability) -> io::Result<()> {
        self.log.step_back(tally)?;
        self.publish();
        self.files.progress.send_modify(|progress| progress.rewinds += 1);
        self.log.cut(durability)
    }

    fn commit(&mut self, durability: Durability) {
        if !self.failed
            && let Err(error) = self.log.flush(durability)
        {
            self.fail(&error);
        }
        self.publish();
    }

    fn publish(&self) {
        self.files.progress.send_modify(|progress| {
            progress.failed = self.failed;
            if !self.failed {
                progress.next = self.log.tally.next();
                progress.bytes = self.log.tally.bytes();
                progress.tally = Arc::new(self.log.tally.clone());
                progress.entries = self.log.entries();
                progress.finished.clone_from(&self.log.finished);
            }
        });
        self.changed.send_modify(|version| *version += 1);
    }
}

fn new_files(hello: &Hello, attempt: Attempt, dir: PathBuf) -> Arc<AttemptFiles> {
    let (build, step) = (hello.build.clone(), hello.step.clone());
    Arc::new(AttemptFiles { build, step, attempt, dir, progress: watch::Sender::new(Progress::default()) })
}

fn why(code: CloseCode) -> &'static str {
    if code == CloseCode::AlreadyFinished {
        "this step has finished already"
    } else if code == CloseCode::Superseded {
        "a newer agent of this step has taken over"
    } else {
        "too many attempts of this step"
    }
}
