//! Which attempts exist and who may write them: the state of the store's worker.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use phonehome_env::disk::{Disk, is_full, write_whole};
use phonehome_proto::{
    attempts::Attempts,
    close::CloseCode,
    frame::{Finished, FinishedAck, Hello, Record},
    id::{Attempt, BuildId, StepName},
    tally::Tally,
};
use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};

use super::{
    Durability, OpenError, Opened, Surveyed, Writer,
    attempt::{AttemptFiles, Owner},
    current::Current,
    log::AttemptLog,
    recover,
    room::Room,
};

/// Every step that an agent has said hello for since the start of this process.
///
/// All maps are ordered: the same jobs do the same things in the same order, in every run.
#[derive(Debug)]
pub(super) struct Steps {
    disk: Arc<dyn Disk>,
    /// The builds' directories are in here.
    root: PathBuf,
    durability: Durability,
    steps: BTreeMap<Key, Step>,
    /// Steps with something to commit.
    dirty: BTreeSet<Key>,
    verdicts: Vec<NewVerdict>,
    room: Room,
}

type Key = (BuildId, StepName);

#[derive(Debug)]
struct Step {
    attempts: Attempts,
    current: Option<Current>,
    /// Everything readers may have, by the number of the attempt.
    known: BTreeMap<Attempt, Arc<AttemptFiles>>,
}

/// A verdict that is to be stored with the next commit.
#[derive(Debug)]
struct NewVerdict {
    build: BuildId,
    contents: Vec<u8>,
    reply: oneshot::Sender<io::Result<bool>>,
}

impl Steps {
    /// What lies below a data directory.
    pub(super) fn new(disk: Arc<dyn Disk>, data: &Path, durability: Durability) -> Self {
        Self {
            room: Room::new(disk.clone(), data),
            disk,
            root: data.join("builds"),
            durability,
            steps: BTreeMap::new(),
            dirty: BTreeSet::new(),
            verdicts: Vec::new(),
        }
    }

    /// Sets aside what must be there when the disk is full.
    pub(super) fn prepare(&self) {
        self.room.prepare();
    }

    fn dir(&self, (build, step): &Key) -> PathBuf {
        self.root.join(build.as_str()).join(step.as_str())
    }

    /// The step, with what an earlier process left of it.
    fn load(&mut self, key: &Key) -> io::Result<&mut Step> {
        if !self.steps.contains_key(key) {
            let step = Step::load(&*self.disk, &self.dir(key))?;
            self.steps.insert(key.clone(), step);
        }
        Ok(self.steps.get_mut(key).expect("it was put there above"))
    }

    /// Takes an agent's hello: decides on its attempt, makes or opens the files, and voids every earlier lease.
    pub(super) fn open(&mut self, hello: Hello, changed: watch::Sender<u64>) -> Result<Opened, OpenError> {
        let key = (hello.build.clone(), hello.step.clone());
        if self.dirty.remove(&key) {
            self.commit_these(&[&key]); // what an earlier connection handed over must be counted
        }
        let opened = self.admit(&key, &hello, changed);
        if let Err(OpenError::Storage(error)) = &opened
            && is_full(error)
        {
            self.room.note_full();
        }
        opened
    }

    fn admit(&mut self, key: &Key, hello: &Hello, changed: watch::Sender<u64>) -> Result<Opened, OpenError> {
        let (disk, dir, durability) = (self.disk.clone(), self.dir(key), self.durability);
        let step = self.load(key)?;
        step.check(hello)?;
        let lease = step.attempts.handle_hello(hello.producer).map_err(|code| OpenError::Refused(code, why(code)))?;
        let path = dir.join(lease.attempt.to_string());
        if lease.new {
            let log = AttemptLog::create(disk.clone(), &path, &Owner::from(hello), durability)
                .inspect_err(|_| step.attempts.undo())?;
            let files = step.files(&disk, key, lease.attempt, path);
            step.current = Some(Current::new(log, files, changed));
        } else if step.current.is_none() {
            let log = recover::open(&disk, &path, durability)?;
            let files = step.files(&disk, key, lease.attempt, path);
            step.current = Some(Current::new(log, files, changed));
        }
        step.current.as_mut().expect("it was opened above").greet(hello, lease)
    }

    /// Every attempt of a build that is on the disk, steps in the order of their names.
    pub(super) fn survey(&mut self, build: &BuildId, changed: &watch::Sender<u64>) -> io::Result<Vec<Surveyed>> {
        let dir = self.root.join(build.as_str());
        let names = if self.disk.exists(&dir)? { self.disk.list(&dir)? } else { Vec::new() };
        let mut found = Vec::new();
        for step in names.iter().filter_map(|name| name.to_str()?.parse::<StepName>().ok()) {
            self.survey_step(&(build.clone(), step), changed, &mut found)?;
        }
        Ok(found)
    }

    fn survey_step(&mut self, key: &Key, changed: &watch::Sender<u64>, found: &mut Vec<Surveyed>) -> io::Result<()> {
        let (disk, dir, durability) = (self.disk.clone(), self.dir(key), self.durability);
        let step = self.load(key)?;
        let newest = step.attempts.count() as Attempt;
        for attempt in 1..=newest {
            let is_open = if attempt == newest { step.current.is_some() } else { step.known.contains_key(&attempt) };
            if !is_open {
                let path = dir.join(attempt.to_string());
                let log = recover::open(&disk, &path, durability)?;
                let files = step.files(&disk, key, attempt, path);
                let mut opened = Current::new(log, files, changed.clone());
                opened.close();
                if attempt == newest {
                    step.current = Some(opened);
                }
            }
            let Some(files) = step.known.get(&attempt).cloned() else { continue };
            let finished = files.progress.borrow().finished.clone();
            found.push(Surveyed { files, finished });
        }
        Ok(())
    }

    /// The attempt that `writer` may still write to.
    fn current(&mut self, writer: &Writer) -> Option<&mut Current> {
        let key = (writer.files.build.clone(), writer.files.step.clone());
        let step = self.steps.get_mut(&key)?;
        if !step.attempts.is_current(writer.lease) {
            return None;
        }
        self.dirty.insert(key);
        step.current.as_mut()
    }

    /// Takes records, for the next commit.
    pub(super) fn append(&mut self, writer: &Writer, records: Vec<Record>, tally: Box<Tally>) {
        if let Some(current) = self.current(writer) {
            current.append(records, tally);
        }
    }

    /// Takes the end, for the next commit.
    pub(super) fn finish(&mut self, writer: &Writer, finished: Finished, answer: FinishedAck) {
        if let Some(current) = self.current(writer) {
            current.finish(finished, answer);
        }
    }

    /// Takes a verdict, for the next commit.
    pub(super) fn settle(&mut self, build: BuildId, contents: Vec<u8>, reply: oneshot::Sender<io::Result<bool>>) {
        self.verdicts.push(NewVerdict { build, contents, reply });
    }

    /// When to call [`Self::commit`] though nothing was handed over.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.room.poll_timeout()
    }

    /// Takes back every record beyond `tally`.
    pub(super) fn rewind(&mut self, writer: &Writer, tally: Tally) -> io::Result<()> {
        match self.current(writer) {
            Some(current) => current.rewind(tally),
            None => Ok(()), // its connection hears of that in another way
        }
    }

    /// Makes everything that was handed over durable and lets it be known. What has no room waits.
    pub(super) fn commit(&mut self) {
        let due = self.poll_timeout().is_some_and(|at| at <= Instant::now());
        let mut keys = std::mem::take(&mut self.dirty);
        if due {
            keys.extend(self.waiting());
        } else {
            keys.retain(|key| !self.steps.get(key).is_some_and(Step::is_full));
        }
        self.commit_these(&keys.iter().collect::<Vec<_>>());
        for NewVerdict { build, contents, reply } in std::mem::take(&mut self.verdicts) {
            drop(reply.send(self.record_verdict(&build, &contents))); // whoever asked may have gone
        }
        if due {
            let waits = self.waiting().next().is_some();
            self.room.handle_retry(waits);
        }
    }

    /// Steps that have something without room.
    fn waiting(&self) -> impl Iterator<Item = Key> {
        self.steps.iter().filter(|(_, step)| step.is_full()).map(|(key, _)| key.clone())
    }

    /// Writes everything, then syncs everything, and only then lets anybody know.
    fn commit_these(&mut self, keys: &[&Key]) {
        self.each(keys, |current, _| {
            current.write();
            false
        });
        self.each(keys, |current, _| {
            current.sync();
            false
        });
        self.each(keys, Current::end);
        self.each(keys, |current, room| {
            current.publish();
            if current.is_full() {
                room.note_full();
            }
            false
        });
    }

    /// Does something with each attempt, and notes those that have got their end by it.
    fn each(&mut self, keys: &[&Key], mut work: impl FnMut(&mut Current, &mut Room) -> bool) {
        for key in keys {
            if let Some(step) = self.steps.get_mut(key)
                && let Some(current) = &mut step.current
                && work(current, &mut self.room)
            {
                step.attempts.finish();
            }
        }
    }

    /// Stores a verdict durably, unless there is another: the first one wins.
    fn record_verdict(&mut self, build: &BuildId, contents: &[u8]) -> io::Result<bool> {
        let (dir, durable) = (self.root.join(build.as_str()), self.durability == Durability::Fsync);
        let path = dir.join("verdict.json");
        // The same one again was perhaps not stored as it should be when it was tried before.
        if self.disk.exists(&path)? && self.disk.read(&path)? != contents {
            return Ok(false);
        }
        self.room.spend(|| {
            self.disk.create_dirs(&dir)?;
            write_whole(&*self.disk, &path, contents, durable)?;
            if durable { self.disk.sync_dir(&self.root) } else { Ok(()) }
        })?;
        for (_, step) in self.steps.iter_mut().filter(|((of, _), _)| of == build) {
            step.current.iter_mut().for_each(Current::close);
        }
        Ok(true)
    }
}

impl Step {
    /// Takes up what an earlier process left.
    fn load(disk: &dyn Disk, dir: &Path) -> io::Result<Self> {
        let mut owners = Vec::new();
        let mut finished = false;
        for attempt in 1.. {
            let path = dir.join(attempt.to_string());
            let Some(owner) = Owner::read(disk, &path)? else { break };
            owners.push(owner.producer);
            finished = disk.exists(&path.join("finished.json"))?;
        }
        Ok(Self { attempts: Attempts::resume(owners, finished), current: None, known: BTreeMap::new() })
    }

    /// What readers have of an attempt.
    fn files(&mut self, disk: &Arc<dyn Disk>, key: &Key, attempt: Attempt, dir: PathBuf) -> Arc<AttemptFiles> {
        let new = || AttemptFiles::new(disk.clone(), key.0.clone(), key.1.clone(), attempt, dir);
        self.known.entry(attempt).or_insert_with(new).clone()
    }

    fn is_full(&self) -> bool {
        self.current.as_ref().is_some_and(Current::is_full)
    }

    /// Refuses a hello that knows less than is stored, before it voids anybody's lease: an old one of the same agent may
    /// have been under way longer than the newer.
    fn check(&self, hello: &Hello) -> Result<(), OpenError> {
        match &self.current {
            Some(current) if self.attempts.is_newest(hello.producer) => Ok(current.check(hello)?),
            Some(_) | None => Ok(()),
        }
    }
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
