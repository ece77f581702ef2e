//! Which attempts exist and who may write them: the state of the store's worker.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use phonehome_env::disk::{Disk, File, Open, Volume, is_full, name_whole, stage_whole, write_whole};
use phonehome_proto::{
    attempts::{Attempts, Lease},
    close::CloseCode,
    frame::{Finished, FinishedAck, Hello, Record},
    id::{Attempt, BuildId, StepName},
    tally::Tally,
};
use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};
use tracing::{error, warn};

use super::{
    Durability, Kept, OpenError, Opened, Surveyed, Writer,
    attempt::{AttemptFiles, End, Owner, is_missing},
    current::Current,
    log::AttemptLog,
    quarantine,
    quota::Quota,
    recency::Recency,
    recover,
    room::Room,
};
use crate::meter::Meter;

/// Every step that an agent has said hello for since the start of this process.
///
/// All maps are ordered: the same jobs do the same things in the same order, in every run.
#[derive(Debug)]
pub(super) struct Steps {
    disk: Arc<dyn Disk>,
    /// The builds' directories are in here.
    root: PathBuf,
    durability: Durability,
    /// The file system below `root`, where it can be synced as a whole.
    volume: Option<Box<dyn Volume>>,
    /// Everything that earlier processes have left is durable.
    settled: bool,
    steps: BTreeMap<Key, Step>,
    /// Steps whose files are open, by when they were last written to.
    open: Recency<Key>,
    /// How many of them may be.
    open_limit: usize,
    /// Agents that are to get the first attempt of their step.
    arrivals: BTreeMap<Key, Arrival>,
    /// Steps with something to commit.
    dirty: BTreeSet<Key>,
    files: Vec<NewFile>,
    /// Of builds that have one, until their verdict.
    quotas: BTreeMap<BuildId, Arc<Quota>>,
    room: Room,
}

type Key = (BuildId, StepName);

#[derive(Debug)]
struct Step {
    attempts: Attempts,
    current: Option<Current>,
    /// Everything readers may have, by the number of the attempt.
    known: BTreeMap<Attempt, Arc<AttemptFiles>>,
    quota: Option<Arc<Quota>>,
}

/// An agent whose attempt is made with the next commit. Thousands come at a time when a server was started again.
#[derive(Debug)]
struct Arrival {
    hello: Hello,
    lease: Lease,
    changed: watch::Sender<u64>,
    reply: OpenReply,
}

type OpenReply = oneshot::Sender<Result<Opened, OpenError>>;

/// A small file that is to be stored with the next commit.
#[derive(Debug)]
pub(super) struct NewFile {
    pub(super) build: BuildId,
    pub(super) kept: Kept,
    pub(super) contents: Vec<u8>,
    pub(super) reply: oneshot::Sender<io::Result<bool>>,
}

impl Steps {
    /// What lies below a data directory.
    pub(super) fn new(disk: Arc<dyn Disk>, data: &Path, durability: Durability) -> Self {
        Self {
            room: Room::new(disk.clone(), data),
            disk,
            root: data.join("builds"),
            durability,
            volume: None,
            settled: false,
            steps: BTreeMap::new(),
            open: Recency::new(),
            open_limit: OPEN,
            arrivals: BTreeMap::new(),
            dirty: BTreeSet::new(),
            files: Vec::new(),
            quotas: BTreeMap::new(),
        }
    }

    /// So much of the file system stays free of output.
    pub(super) fn keep_free(&mut self, min_free: u64) {
        self.room.keep_free(min_free);
    }

    /// Tells whether output waits for room, at any time.
    pub(super) fn is_full(&self) -> Arc<AtomicBool> {
        self.room.is_full()
    }

    /// Limits what a build may store, from its first hello or survey on.
    pub(super) fn limit(&mut self, build: BuildId, bytes: u64, meter: Arc<Meter>) {
        self.quotas.insert(build, Quota::new(bytes, meter));
    }

    /// Sets aside what must be there when the disk is full, and makes durable what earlier processes have left.
    pub(super) fn prepare(&mut self) {
        self.room.prepare();
        if self.durability == Durability::Fsync {
            self.volume = self.disk.volume(&self.root).unwrap_or_else(|error| {
                warn!("files are synced one by one: {}: {error}", self.root.display());
                None
            });
            self.settled = self.volume.as_ref().is_some_and(|volume| volume.sync().is_ok());
        }
    }

    fn dir(&self, (build, step): &Key) -> PathBuf {
        self.root.join(build.as_str()).join(step.as_str())
    }

    /// The step, with what an earlier process left of it.
    fn load(&mut self, key: &Key) -> io::Result<&mut Step> {
        if !self.steps.contains_key(key) {
            let mut step = Step::load(&*self.disk, &self.dir(key))?;
            step.quota = self.quotas.get(&key.0).cloned();
            self.steps.insert(key.clone(), step);
        }
        Ok(self.steps.get_mut(key).expect("it was put there above"))
    }

    /// Takes an agent's hello: decides on its attempt, makes or opens the files, and voids every earlier lease. The answer
    /// may come with the next commit.
    pub(super) fn open(&mut self, hello: Hello, changed: watch::Sender<u64>, reply: OpenReply) {
        let key = (hello.build.clone(), hello.step.clone());
        if self.arrivals.contains_key(&key) {
            self.admit_arrivals();
        }
        if self.dirty.remove(&key) {
            self.commit_these(&[&key]); // what an earlier connection handed over must be counted
        }
        match self.lease(&key, &hello) {
            Ok((lease, true)) => drop(self.arrivals.insert(key, Arrival { hello, lease, changed, reply })),
            Ok((lease, false)) => {
                let opened = self.admit(&key, &hello, lease, changed);
                self.answer(&key, opened, reply);
            }
            Err(refused) => self.answer(&key, Err(refused), reply),
        }
    }

    /// What an agent may write to, and whether that can wait for others: as nobody else writes to its step.
    fn lease(&mut self, key: &Key, hello: &Hello) -> Result<(Lease, bool), OpenError> {
        let step = self.load(key)?;
        step.check(hello)?;
        let lease = step.attempts.handle_hello(hello.producer).map_err(|code| OpenError::Refused(code, why(code)))?;
        Ok((lease, lease.new && step.current.is_none()))
    }

    fn admit(
        &mut self,
        key: &Key,
        hello: &Hello,
        lease: Lease,
        changed: watch::Sender<u64>,
    ) -> Result<Opened, OpenError> {
        let path = self.dir(key).join(lease.attempt.to_string());
        if lease.new {
            let log = AttemptLog::create(self.disk.clone(), &path, &Owner::from(hello), self.durability);
            return self.begin(key, hello, lease, changed, log);
        }
        let (disk, durability, settled) = (self.disk.clone(), self.durability, self.settled);
        let step = self.load(key)?;
        if step.current.is_none() {
            let log = recover::open(&disk, &path, durability, settled)?;
            let files = step.files(&disk, key, lease.attempt, path);
            step.current = Some(Current::new(log, files, changed));
        }
        step.current.as_mut().expect("it was opened above").greet(hello, lease)
    }

    /// Lets an agent into its new attempt, if that could be made.
    fn begin(
        &mut self,
        key: &Key,
        hello: &Hello,
        lease: Lease,
        changed: watch::Sender<u64>,
        log: io::Result<AttemptLog>,
    ) -> Result<Opened, OpenError> {
        let (disk, path) = (self.disk.clone(), self.dir(key).join(lease.attempt.to_string()));
        let step = self.load(key)?;
        let log = log.inspect_err(|_| step.attempts.undo())?;
        let files = step.files(&disk, key, lease.attempt, path);
        step.current.iter_mut().for_each(Current::close); // its readers may stay
        step.current.insert(Current::new(log, files, changed)).greet(hello, lease)
    }

    fn answer(&mut self, key: &Key, opened: Result<Opened, OpenError>, reply: OpenReply) {
        if let Err(OpenError::Storage(error)) = &opened
            && is_full(error)
        {
            self.room.note_full();
        }
        self.note_open(key);
        drop(reply.send(opened)); // a connection that is gone has no use for it
    }

    /// Makes the attempts of those who wait for one, and lets them in.
    fn admit_arrivals(&mut self) {
        let arrivals = std::mem::take(&mut self.arrivals);
        let logs = self.create(&arrivals);
        for ((key, arrival), log) in arrivals.into_iter().zip(logs) {
            let Arrival { hello, lease, changed, reply } = arrival;
            let opened = self.begin(&key, &hello, lease, changed, log);
            self.answer(&key, opened, reply);
        }
    }

    /// Makes attempts durably: a few one by one, many at once.
    fn create(&mut self, arrivals: &BTreeMap<Key, Arrival>) -> Vec<io::Result<AttemptLog>> {
        let attempts = arrivals
            .iter()
            .map(|(key, arrival)| (self.dir(key).join(arrival.lease.attempt.to_string()), Owner::from(&arrival.hello)));
        if !self.is_worth_it(arrivals.len() * CREATE_SYNCS) {
            let create =
                |(dir, owner): (PathBuf, _)| AttemptLog::create(self.disk.clone(), &dir, &owner, self.durability);
            return attempts.map(create).collect();
        }
        let staged = attempts.map(|(dir, owner)| AttemptLog::stage(self.disk.clone(), &dir, &owner)).collect();
        let staged = self.sync_each_of(staged);
        let named = staged.into_iter().map(|log| log.and_then(|log| log.name().map(|()| log))).collect();
        self.sync_each_of(named)
    }

    /// Makes what was done for each durable, or an error.
    fn sync_each_of<T>(&mut self, made: Vec<io::Result<T>>) -> Vec<io::Result<T>> {
        let Err(error) = self.sync_volume() else { return made };
        let failed = || io::Error::new(error.kind(), error.to_string());
        made.into_iter().map(|made| made.and_then(|_| Err(failed()))).collect()
    }

    /// Every attempt of a build that is on the disk, steps in the order of their names.
    pub(super) fn survey(&mut self, build: &BuildId, changed: &watch::Sender<u64>) -> io::Result<Vec<Surveyed>> {
        self.admit_arrivals();
        let dir = self.root.join(build.as_str());
        let names = if self.disk.exists(&dir)? { self.disk.list(&dir)? } else { Vec::new() };
        let mut found = Vec::new();
        for step in names.iter().filter_map(|name| name.to_str()?.parse::<StepName>().ok()) {
            self.survey_step(&(build.clone(), step), changed, &mut found)?;
        }
        Ok(found)
    }

    fn survey_step(&mut self, key: &Key, changed: &watch::Sender<u64>, found: &mut Vec<Surveyed>) -> io::Result<()> {
        let (disk, dir, durability, settled) = (self.disk.clone(), self.dir(key), self.durability, self.settled);
        let step = self.load(key)?;
        let newest = step.attempts.count() as Attempt;
        for attempt in 1..=newest {
            let is_open = if attempt == newest { step.current.is_some() } else { step.known.contains_key(&attempt) };
            if !is_open {
                let path = dir.join(attempt.to_string());
                let log = recover::open(&disk, &path, durability, settled)?;
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
    pub(super) fn append(&mut self, writer: &Writer, records: Vec<Record>, tally: Tally) {
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

    /// Takes a verdict or a declaration, for the next commit.
    pub(super) fn settle(&mut self, file: NewFile) {
        self.files.push(file);
    }

    /// Adds a line to a build's reports. What an earlier process did not finish is cut off first.
    pub(super) fn report(&mut self, build: &BuildId, line: &[u8]) -> io::Result<()> {
        let (dir, durable) = (self.root.join(build.as_str()), self.durability == Durability::Fsync);
        let path = dir.join(REPORTS);
        self.room.try_to(|| {
            let is_new = !self.disk.exists(&path)?;
            let file = self.disk.open(&path, Open::Write)?;
            let end = end_of_lines(&*file)?;
            file.set_len(end)?;
            file.write_all_at(&mut [IoSlice::new(line)], end)?;
            if durable {
                file.sync()?;
            }
            if durable && is_new { self.disk.sync_dir(&dir) } else { Ok(()) }
        })
    }

    /// When to call [`Self::commit`] though nothing was handed over.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.room.poll_timeout()
    }

    /// Takes back every record beyond `tally`.
    pub(super) fn rewind(&mut self, writer: &Writer, tally: Tally) -> io::Result<bool> {
        match self.current(writer) {
            Some(current) => current.rewind(tally).map(|()| true),
            None => Ok(false),
        }
    }

    /// Attempts that have something new.
    pub(super) fn dirty(&self) -> usize {
        self.dirty.len()
    }

    /// Makes everything that was handed over durable and lets it be known. What has no room waits.
    pub(super) fn commit(&mut self) {
        self.admit_arrivals();
        let due = self.poll_timeout().is_some_and(|at| at <= Instant::now());
        let mut keys = std::mem::take(&mut self.dirty);
        if due {
            keys.extend(self.waiting());
        } else {
            keys.retain(|key| !self.steps.get(key).is_some_and(Step::is_full));
        }
        self.commit_these(&keys.iter().collect::<Vec<_>>());
        self.keep_files();
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
        for key in keys {
            self.with(key, |current, room| {
                if room.admits(current.waiting_bytes()) {
                    current.write();
                } else {
                    current.hold();
                }
            });
            self.note_open(key);
        }
        if self.stage_ends(keys) {
            self.end_together(keys);
        } else {
            self.sync(keys);
            self.note_ends(keys, Current::end);
        }
        for key in keys {
            self.with(key, |current, room| {
                current.publish();
                if current.is_full() {
                    room.note_full();
                }
            });
            self.note_open(key);
        }
    }

    /// Writes ends, if they are many: thousands come at a time when a server with many builds was away. They do not count
    /// before [`Self::end_together`].
    fn stage_ends(&mut self, keys: &[&Key]) -> bool {
        let ends = keys.iter().filter(|key| self.with(key, |current, _| current.wants_end()) == Some(true)).count();
        let is_worth_it = self.is_worth_it(ends * END_SYNCS);
        for key in keys.iter().filter(|_| is_worth_it) {
            self.with(key, Current::stage_end);
        }
        is_worth_it
    }

    /// Makes everything durable, ends last: no end has its name before the records it speaks of are synced.
    fn end_together(&mut self, keys: &[&Key]) {
        let mut synced = self.sync_volume();
        if synced.is_ok() {
            for key in keys {
                self.with(key, |current, _| {
                    current.note_synced();
                    current.name_end();
                });
            }
            synced = self.sync_volume();
        }
        self.note_ends(keys, |current, _| current.confirm_end(synced.as_ref().copied()));
    }

    /// Ends attempts, and remembers of which steps those were.
    fn note_ends(&mut self, keys: &[&Key], mut end: impl FnMut(&mut Current, &mut Room) -> bool) {
        for key in keys {
            if self.with(key, &mut end) == Some(true)
                && let Some(step) = self.steps.get_mut(*key)
            {
                step.attempts.finish();
            }
        }
    }

    /// Does something with the attempt of a step that is written to.
    fn with<T>(&mut self, key: &Key, work: impl FnOnce(&mut Current, &mut Room) -> T) -> Option<T> {
        let current = self.steps.get_mut(key)?.current.as_mut()?;
        Some(work(current, &mut self.room))
    }

    /// Makes what was written durable: few files one by one, many at once with the file system they are on.
    fn sync(&mut self, keys: &[&Key]) {
        let files: usize = keys.iter().filter_map(|key| self.with(key, |current, _| current.unsynced())).sum();
        let is_whole = self.is_worth_it(files);
        if is_whole && self.sync_volume().is_err() {
            return; // all that was written to has failed by it
        }
        for key in keys {
            self.with(key, |current, _| if is_whole { current.note_synced() } else { current.sync() });
        }
    }

    /// Whether so many syncs cost more than one of the whole file system.
    ///
    /// A journal that all attempts share would cost a quarter of that for 1,000 attempts. Nobody would notice: both are
    /// far below the second an acknowledgement may take. And it would write every byte twice, and bring checkpoints, a
    /// replay and a file in which damage hits every build.
    fn is_worth_it(&self, syncs: usize) -> bool {
        self.volume.as_ref().is_some_and(|volume| syncs > volume.worth())
    }

    /// Makes everything durable; after an error no file is trusted that was written to.
    fn sync_volume(&mut self) -> io::Result<()> {
        let volume = self.volume.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        volume.sync().inspect_err(|error| {
            error!("cannot sync the file system of {}: {error}", self.root.display());
            self.steps.values_mut().flat_map(|step| &mut step.current).for_each(|current| current.distrust(error));
        })
    }

    /// Stores what was handed over of a build that has ended, and takes nothing more of it.
    pub(super) fn stop(&mut self, build: &BuildId) {
        self.admit_arrivals();
        let keys: Vec<_> = of_build(&mut self.steps, build).map(|(key, _)| key.clone()).collect();
        let dirty: Vec<_> = keys.iter().filter(|key| self.dirty.remove(*key)).collect();
        self.commit_these(&dirty);
        self.revoke(build);
    }

    /// Voids every lease of a build. What waits for room is no longer waited with: no output comes after the verdict.
    fn revoke(&mut self, build: &BuildId) {
        for (_, step) in of_build(&mut self.steps, build) {
            step.attempts.revoke();
            step.current.iter_mut().for_each(Current::stop);
        }
    }

    /// Drops what is kept of a build that has ended. Should somebody ask for it, it is taken up from the disk again. What
    /// could not be synced stays: it cannot be told from what is durable there.
    pub(super) fn forget(&mut self, build: &BuildId) {
        self.commit();
        let is_failed = |step: &Step| step.current.as_ref().is_some_and(Current::is_failed);
        let gone = of_build(&mut self.steps, build).filter(|(_, step)| !is_failed(step));
        for key in gone.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            self.steps.remove(&key);
        }
    }

    /// A step's files may be open now, or closed. Beyond the limit those are closed that were not written to for the
    /// longest time. In a round that writes to more they are not synced yet: then the file system will be.
    fn note_open(&mut self, key: &Key) {
        if self.with(key, |current, _| current.is_open()) == Some(true) {
            self.open.touch(key);
        } else {
            self.open.remove(key);
        }
        while self.open.len() > self.open_limit
            && let Some(oldest) = self.open.pop()
        {
            let is_whole = self.volume.is_some();
            self.with(&oldest, |current, _| {
                if !is_whole {
                    current.sync();
                }
                current.close_unsynced();
            });
        }
    }

    /// Stores the small files that wait: few one by one, many at once.
    fn keep_files(&mut self) {
        let mut files = std::mem::take(&mut self.files);
        if self.is_worth_it(files.len() * KEEP_SYNCS) {
            files = self.keep_together(files);
        }
        for file in files {
            let kept = self.keep(&file);
            drop(file.reply.send(kept)); // whoever asked may have gone
        }
    }

    /// Stores small files with two syncs for all. Returns those that have the name of one before them.
    fn keep_together(&mut self, files: Vec<NewFile>) -> Vec<NewFile> {
        let mut names = BTreeSet::new();
        let (first, later): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| names.insert(self.path(file)));
        let staged = first.iter().map(|file| self.stage(file)).collect();
        let staged = self.sync_each_of(staged).into_iter().zip(&first);
        let named = staged.map(|(staged, file)| match staged? {
            true => name_whole(&*self.disk, &self.path(file)).map(|()| true),
            false => Ok(false),
        });
        let named = named.collect();
        for (file, kept) in first.into_iter().zip(self.sync_each_of(named)) {
            if matches!(kept, Ok(true)) {
                self.note_kept(&file);
            }
            drop(file.reply.send(kept)); // whoever asked may have gone
        }
        later
    }

    /// Writes a small file beside its place, unless there is another.
    fn stage(&mut self, file: &NewFile) -> io::Result<bool> {
        let path = self.path(file);
        if self.is_taken(file)? {
            return Ok(false);
        }
        let write = || {
            path.parent().map_or(Ok(()), |dir| self.disk.create_dirs(dir))?;
            stage_whole(&*self.disk, &path, &file.contents)
        };
        match file.kept {
            Kept::Declaration => self.room.try_to(write)?,
            Kept::Cancel | Kept::Verdict => self.room.spend(write)?,
        }
        Ok(true)
    }

    /// Stores a small file durably, unless there is another: the first one wins.
    fn keep(&mut self, file: &NewFile) -> io::Result<bool> {
        let (path, durable) = (self.path(file), self.durability == Durability::Fsync);
        if self.is_taken(file)? {
            return Ok(false);
        }
        let write = || {
            path.parent().map_or(Ok(()), |dir| self.disk.create_dirs(dir))?;
            write_whole(&*self.disk, &path, &file.contents, durable)?;
            if durable { self.disk.sync_dir(&self.root) } else { Ok(()) }
        };
        match file.kept {
            Kept::Declaration => self.room.try_to(write)?,
            Kept::Cancel | Kept::Verdict => self.room.spend(write)?,
        }
        self.note_kept(file);
        Ok(true)
    }

    fn path(&self, file: &NewFile) -> PathBuf {
        self.root.join(file.build.as_str()).join(file.kept.name())
    }

    /// Whether there is one already. The same one again was perhaps not stored as it should be when it was tried before.
    fn is_taken(&self, file: &NewFile) -> io::Result<bool> {
        let path = self.path(file);
        if file.kept == Kept::Cancel && !self.is_unended(&file.build)? {
            return Ok(true); // of a build that was removed it must not wait for the next of that name
        }
        Ok(self.disk.exists(&path)? && self.disk.read(&path)? != file.contents)
    }

    /// Whether a build was declared, and has no verdict.
    fn is_unended(&self, build: &BuildId) -> io::Result<bool> {
        let dir = self.root.join(build.as_str());
        let has = |kept: Kept| self.disk.exists(&dir.join(kept.name()));
        match has(Kept::Declaration) {
            Err(error) if is_missing(&error) => Ok(false),
            declared => Ok(declared? && !has(Kept::Verdict)?),
        }
    }

    fn note_kept(&mut self, file: &NewFile) {
        if file.kept == Kept::Verdict {
            self.quotas.remove(&file.build);
            self.revoke(&file.build);
        }
    }
}

/// Attempts whose files stay open at most. Each has three, so that with 12,000 sockets, and what readers open, a
/// process stays below 20,000 descriptors.
const OPEN: usize = 1536;

/// What storing one end by itself syncs: the file and its directory.
const END_SYNCS: usize = 2;

/// The same for a small file of a build: the file and two directories.
const KEEP_SYNCS: usize = 3;

/// The steps of one build.
fn of_build<'a>(
    steps: &'a mut BTreeMap<Key, Step>,
    build: &'a BuildId,
) -> impl Iterator<Item = (&'a Key, &'a mut Step)> {
    let first = (build.clone(), "0".parse().expect("it is a name, and none comes before it"));
    steps.range_mut(first..).take_while(move |((of, _), _)| of == build)
}

/// What making one attempt by itself syncs: its owner's file, its directory and the three above.
const CREATE_SYNCS: usize = 5;

impl Step {
    /// Takes up what an earlier process left.
    fn load(disk: &dyn Disk, dir: &Path) -> io::Result<Self> {
        let mut owners = Vec::new();
        let mut finished = false;
        for attempt in 1.. {
            let path = dir.join(attempt.to_string());
            let Some(owner) = quarantine::owner(disk, &path)? else { break };
            quarantine::complete(disk, &path)?;
            owners.push(owner.producer);
            finished = matches!(End::read(disk, &path)?, End::Known(_));
        }
        Ok(Self { attempts: Attempts::resume(owners, finished), current: None, known: BTreeMap::new(), quota: None })
    }

    /// What readers have of an attempt.
    fn files(&mut self, disk: &Arc<dyn Disk>, key: &Key, attempt: Attempt, dir: PathBuf) -> Arc<AttemptFiles> {
        let new = || AttemptFiles::new(disk.clone(), key.0.clone(), key.1.clone(), attempt, dir);
        let files = self.known.entry(attempt).or_insert_with(new).clone();
        if let Some(quota) = &self.quota {
            files.quota.get_or_init(|| quota.clone());
        }
        files
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

/// Where reports are kept, in the directory of their build.
pub(super) const REPORTS: &str = "reports";

/// The end of the last whole line.
fn end_of_lines(file: &dyn File) -> io::Result<u64> {
    let mut end = file.len()?;
    let mut last = [0];
    while end > 0 {
        file.read_exact_at(&mut last, end - 1)?;
        if last == *b"\n" {
            break;
        }
        end -= 1;
    }
    Ok(end)
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

#[cfg(test)]
mod tests {
    use phonehome_proto::{frame::Stream, receiver::Ending};

    use super::*;
    use crate::store::{
        AttemptReader, Found,
        faulty::{Agent, FaultyDisk, WORTH, tempdir},
    };

    #[test]
    fn nothing_is_known_before_it_is_synced_and_one_round_serves_all() {
        let mut scene = Scene::new();
        let mut agent = Agent::new(1);
        let writer = scene.greet(&agent, 0).writer;
        for text in ["one ", "two ", "three"] {
            scene.append(&writer, &mut agent, text);
        }
        assert_eq!(writer.files.progress.borrow().next, 0);
        scene.disk.seen();
        scene.steps.commit();
        assert_eq!(scene.disk.seen(), ["write log", "write index", "sync log", "sync index"]);
        assert_eq!((writer.files.progress.borrow().next, scene.read(&writer)), (3, "one two three".into()));
    }

    #[test]
    fn rule_2_an_end_is_stored_behind_its_records_and_its_files_are_closed() {
        let mut scene = Scene::new();
        let mut agent = Agent::new(1);
        let mut opened = scene.greet(&agent, 0);
        scene.append(&opened.writer, &mut agent, "all");
        scene.finish(&mut opened, &agent);
        scene.disk.seen();
        scene.steps.commit();
        let seen = scene.disk.seen();
        let [log, end] = ["sync log", "rename finished.json"].map(|step| seen.iter().position(|seen| seen == step));
        assert!(log.unwrap() < end.unwrap(), "{seen:?}");
        let progress = opened.writer.files.progress.borrow().clone();
        assert!(progress.finished.is_some_and(|(_, answer)| answer == FinishedAck::Complete));
        assert_eq!(scene.open_files(), 0);
        assert!(matches!(scene.try_greet(&Agent::new(2), 0), Err(OpenError::Refused(CloseCode::AlreadyFinished, _))));
        let mut claim = agent.clone();
        claim.write(Stream::Stdout, "more than it said it would be");
        assert!(matches!(scene.try_greet(&claim, claim.tally.next()), Err(OpenError::Contradiction(_))));
        assert_eq!(scene.greet(&agent, 0).receiver.next(), 1);
    }

    #[test]
    fn reports_are_lines_and_a_torn_one_goes() {
        let mut scene = Scene::new();
        let build = "b".parse().unwrap();
        scene.greet(&Agent::new(1), 0);
        scene.steps.report(&build, b"one\n").unwrap();
        scene.steps.report(&build, b"two\n").unwrap();
        assert_eq!(scene.reports(), "one\ntwo\n");
        std::fs::write(scene.path("b/reports"), "one\ntw").unwrap();
        scene.steps.report(&build, b"three\n").unwrap();
        assert_eq!(scene.reports(), "one\nthree\n");
    }

    #[test]
    fn rule_3_behind_a_newer_hello_nothing_of_the_older_is_stored() {
        for successor in [1, 2] {
            let mut scene = Scene::new();
            let mut agent = Agent::new(1);
            let mut old = scene.greet(&agent, 0);
            scene.append(&old.writer, &mut agent, "kept");
            scene.greet(&if successor == 1 { agent.clone() } else { Agent::new(successor) }, 0);
            assert_eq!(old.writer.files.progress.borrow().next, 1, "what came before the hello counts");
            scene.append(&old.writer, &mut agent, "void");
            scene.finish(&mut old, &agent);
            scene.steps.commit();
            assert_eq!((scene.read(&old.writer), scene.contents("b/main/1/log")), ("kept".into(), "kept".into()));
            assert!(
                !scene.path("b/main/1/finished.json").exists() && old.writer.files.progress.borrow().finished.is_none()
            );
        }
    }

    #[test]
    fn a_full_disk_keeps_everything_waiting_in_order_and_others_go_on() {
        for operation in ["write log", "write index"] {
            let mut scene = Scene::new();
            let mut agent = Agent::new(1);
            let writer = scene.greet(&agent, 0).writer;
            scene.append(&writer, &mut agent, "before ");
            scene.steps.commit();
            scene.disk.fail_always(operation, io::ErrorKind::StorageFull);
            for text in ["one ", "two ", "three"] {
                scene.append(&writer, &mut agent, text);
                scene.steps.commit();
            }
            assert_eq!(scene.told(&writer), (1, true, false), "{operation}");
            assert!(scene.steps.poll_timeout().is_some());
            scene.disk.seen();
            scene.steps.commit();
            assert!(scene.disk.seen().is_empty(), "it is not tried again before it is time");
            scene.disk.heal();
            let mut other = Agent::new(1);
            let mut hello = other.hello(0);
            hello.step = "other".parse().unwrap();
            let elsewhere = scene.open(hello).unwrap().writer;
            scene.append(&elsewhere, &mut other, "goes on");
            scene.steps.commit();
            assert_eq!((scene.told(&elsewhere), scene.told(&writer).0), ((1, false, false), 1));
            scene.retry();
            assert_eq!((scene.told(&writer), scene.read(&writer)), ((4, false, false), "before one two three".into()));
            assert!(scene.steps.poll_timeout().is_none(), "there is room again");
        }
    }

    #[test]
    fn as_much_is_stored_as_there_is_room_for() {
        let mut scene = Scene::new();
        let mut agent = Agent::new(1);
        let writer = scene.greet(&agent, 0).writer;
        (0..16).for_each(|_| scene.append(&writer, &mut agent, "x"));
        scene.disk.fail({
            let mut room = 2;
            move |seen| {
                room -= i32::from(seen == "write log");
                (seen == "write log" && room != 0).then_some(io::ErrorKind::QuotaExceeded)
            }
        });
        scene.steps.commit();
        let (next, full, failed) = scene.told(&writer);
        assert!(next > 0 && next < 16 && full && !failed, "{next}");
        scene.disk.heal();
        scene.retry();
        assert_eq!((scene.told(&writer), scene.read(&writer)), ((16, false, false), "x".repeat(16)));
    }

    #[test]
    fn a_new_hello_on_a_full_disk_starts_from_what_is_durable() {
        let mut scene = Scene::new();
        let mut agent = Agent::new(1);
        let mut opened = scene.greet(&agent, 0);
        scene.disk.fail_always("write log", io::ErrorKind::StorageFull);
        scene.append(&opened.writer, &mut agent, "one ");
        scene.finish(&mut opened, &agent);
        scene.steps.commit();
        let opened = scene.greet(&agent, 0);
        assert_eq!((opened.receiver.next(), scene.told(&opened.writer)), (0, (0, false, false)));
        let refused = scene.try_greet(&Agent::new(2), 0);
        assert!(refused.is_ok(), "an attempt needs no room in the log");
        scene.disk.fail_always("write attempt.tmp", io::ErrorKind::StorageFull);
        assert!(matches!(scene.try_greet(&Agent::new(3), 0), Err(OpenError::Storage(error)) if is_full(&error)));
        scene.disk.heal();
        assert_eq!(scene.greet(&Agent::new(3), 0).writer.lease.attempt, 3);
    }

    #[test]
    fn ends_and_verdicts_fit_on_a_full_disk() {
        let mut scene = Scene::new();
        let mut agent = Agent::new(1);
        let mut opened = scene.greet(&agent, 0);
        scene.append(&opened.writer, &mut agent, "all");
        scene.steps.commit();
        scene.finish(&mut opened, &agent);
        scene.fill();
        scene.steps.commit();
        assert!(opened.writer.files.progress.borrow().finished.is_some());
        assert!(scene.verdict("{}").unwrap());
        assert_eq!(scene.contents("b/verdict.json"), "{}");
        let len = |scene: &Scene| std::fs::metadata(scene.path("../reserve")).unwrap().len();
        assert_eq!(len(&scene), (1024 - 2 * 64) * 1024);
        scene.retry();
        assert!(scene.steps.poll_timeout().is_some(), "there is no room for a whole reserve yet");
        scene.disk.heal();
        scene.retry();
        assert_eq!((len(&scene), scene.steps.poll_timeout()), (1024 * 1024, None));
    }

    #[test]
    fn reports_and_declarations_leave_the_reserve_to_ends_and_verdicts() {
        let mut scene = Scene::new();
        let is_told_full = scene.steps.is_full();
        let is_told_full = || is_told_full.load(std::sync::atomic::Ordering::Relaxed);
        scene.greet(&Agent::new(1), 0);
        scene.steps.report(&"b".parse().unwrap(), b"first\n").unwrap();
        assert!(!is_told_full());
        scene.fill();
        assert!(is_full(&scene.steps.report(&"b".parse().unwrap(), b"second\n").unwrap_err()));
        let mut declared = scene.settle_as(Kept::Declaration, "new", "{}");
        scene.steps.commit();
        assert!(is_full(&declared.try_recv().unwrap().unwrap_err()));
        assert_eq!(std::fs::metadata(scene.path("../reserve")).unwrap().len(), 1024 * 1024);
        assert!(is_told_full() && scene.verdict("{}").unwrap());
        scene.disk.heal();
        scene.retry();
        assert!(!is_told_full());
    }

    #[test]
    fn a_verdict_without_any_room_is_an_error() {
        let mut scene = Scene::new();
        scene.disk.fail(|seen| seen.starts_with("write").then_some(io::ErrorKind::StorageFull));
        assert!(is_full(&scene.verdict("{}").unwrap_err()));
        assert!(!scene.path("b/verdict.json").exists() && !scene.path("b/verdict.tmp").exists());
    }

    #[test]
    fn rule_10_the_first_verdict_wins_and_is_durable() {
        let mut scene = Scene::new();
        scene.disk.seen();
        assert!(scene.verdict("first").unwrap());
        let seen = scene.disk.seen();
        assert_eq!(seen[seen.len() - 4..], ["sync verdict.tmp", "rename verdict.json", "syncdir b", "syncdir builds"]);
        assert!(!scene.verdict("second").unwrap());
        assert_eq!(scene.contents("b/verdict.json"), "first");
    }

    #[test]
    fn a_verdict_of_which_nobody_knows_whether_it_is_stored_can_be_stored_again() {
        let mut scene = Scene::new();
        scene.disk.fail_always("syncdir b", io::ErrorKind::Other);
        scene.verdict("first").unwrap_err();
        scene.disk.heal();
        scene.disk.seen();
        assert!(scene.verdict("first").unwrap());
        assert!(scene.disk.seen().contains(&"syncdir b".to_owned()));
        assert!(!scene.verdict("second").unwrap());
    }

    #[test]
    fn after_an_error_the_next_hello_goes_on_from_what_is_durable_and_readers_follow() {
        for operation in ["write log", "write index", "sync log", "sync index"] {
            let mut scene = Scene::new();
            let mut agent = Agent::new(1);
            let writer = scene.greet(&agent, 0).writer;
            scene.append(&writer, &mut agent, "one ");
            scene.steps.commit();
            let mut reader = AttemptReader::open(writer.files.clone()).unwrap();
            scene.disk.fail_always(operation, io::ErrorKind::Other);
            scene.append(&writer, &mut agent, "two");
            scene.steps.commit();
            assert_eq!(scene.told(&writer), (1, false, true), "{operation}");
            scene.disk.heal();
            let again = scene.greet(&agent, 0);
            assert_eq!((again.receiver.next(), scene.told(&again.writer)), (1, (1, false, false)));
            assert!(Arc::ptr_eq(&again.writer.files, &writer.files));
            let two = agent.records[1].clone();
            scene.steps.append(&again.writer, vec![two], agent.tally.clone());
            scene.steps.commit();
            assert_eq!((scene.told(&again.writer), rest(&mut reader)), ((2, false, false), "one two".into()));
            assert_eq!(writer.files.checksums([1]), BTreeMap::from([(1, agent.records[1].crc)]));
        }
    }

    #[test]
    fn an_attempt_that_cannot_be_made_changes_nothing_for_the_older() {
        let mut scene = Scene::new();
        let mut agent = Agent::new(1);
        let writer = scene.greet(&agent, 0).writer;
        scene.disk.fail_always("rename attempt.json", io::ErrorKind::Other);
        assert!(matches!(scene.try_greet(&Agent::new(2), 0), Err(OpenError::Storage(_))));
        scene.append(&writer, &mut agent, "still here");
        scene.steps.commit();
        assert_eq!(scene.read(&writer), "still here");
    }

    #[test]
    fn everything_on_the_disk_is_found_after_a_restart() {
        let mut scene = Scene::new();
        let (mut first, mut second) = (Agent::new(1), Agent::new(2));
        let writer = scene.greet(&first, 0).writer;
        scene.append(&writer, &mut first, "first life");
        let mut opened = scene.greet(&second, 0);
        scene.append(&opened.writer, &mut second, "second life");
        scene.steps.commit();
        scene.restart();
        let found = scene.survey();
        let seen: Vec<_> = found.iter().map(|found| (found.files.attempt, scene.read_all(&found.files))).collect();
        assert_eq!(seen, [(1, "first life".into()), (2, "second life".into())]);
        assert!(found.iter().all(|found| found.finished.is_none()) && scene.open_files() == 0);
        opened = scene.greet(&second, 0);
        assert!(Arc::ptr_eq(&opened.writer.files, &found[1].files));
        assert_eq!(opened.receiver.next(), 1);
        scene.finish(&mut opened, &second);
        scene.steps.commit();
        scene.verdict("{}").unwrap();
        scene.restart();
        assert!(scene.survey()[1].finished.is_some());
        assert!(scene.steps.survey(&"unknown".parse().unwrap(), &watch::Sender::new(0)).unwrap().is_empty());
    }

    #[test]
    fn an_attempt_without_its_owner_can_be_read_and_nobody_goes_on_with_it() {
        for damage in [Some("{torn"), None] {
            let mut scene = Scene::new();
            let mut agent = Agent::new(1);
            let writer = scene.greet(&agent, 0).writer;
            scene.append(&writer, &mut agent, "kept");
            scene.steps.commit();
            let owner = scene.path("b/main/1/attempt.json");
            match damage {
                Some(text) => std::fs::write(&owner, text).unwrap(),
                None => std::fs::remove_file(&owner).unwrap(),
            }
            for _ in 0..2 {
                scene.restart();
                let found = scene.survey();
                assert_eq!((found.len(), scene.read_all(&found[0].files)), (1, "kept".into()));
            }
            assert_eq!(scene.path("b/main/1/quarantine/1/attempt.json").exists(), damage.is_some());
            let again = scene.greet(&agent, 1);
            assert_eq!((again.writer.lease.attempt, again.receiver.next()), (2, 1));
            assert_eq!(scene.contents("b/main/1/log"), "kept");
        }
    }

    #[test]
    fn a_survey_of_what_is_open_changes_nothing() {
        let mut scene = Scene::new();
        let (mut first, mut second) = (Agent::new(1), Agent::new(2));
        let old = scene.greet(&first, 0).writer;
        scene.append(&old, &mut first, "old");
        let writer = scene.greet(&second, 0).writer;
        let found = scene.survey();
        assert!(Arc::ptr_eq(&found[0].files, &old.files) && Arc::ptr_eq(&found[1].files, &writer.files));
        scene.append(&writer, &mut second, "new");
        scene.steps.commit();
        assert_eq!(scene.read_all(&found[1].files), "new");
    }

    #[test]
    fn a_crash_at_any_operation_loses_nothing_that_was_known_to_be_stored() {
        for count in 0.. {
            let mut scene = Scene::new();
            let mut agent = Agent::new(1);
            scene.disk.crash_after(count);
            let known = scene.live(&mut agent);
            scene.disk.heal();
            scene.restart();
            let found = scene.survey();
            let Some((stored, is_finished, is_settled)) = known else { continue };
            let progress = found[0].files.progress.borrow().clone();
            let text = scene.read_all(&found[0].files);
            assert!(progress.next >= stored && "one {} two {} three {} ".starts_with(&text), "{count}: {text}");
            assert!(found[0].finished.is_some() >= is_finished, "{count}");
            assert!(!scene.path("b/main/1/quarantine").exists(), "{count}");
            assert!(scene.path("b/verdict.json").exists() >= is_settled, "{count}");
            let opened = scene.greet(&agent, stored);
            assert_eq!((opened.receiver.next(), scene.told(&opened.writer).2), (progress.next, false), "{count}");
            if is_settled {
                break;
            }
        }
    }

    #[test]
    fn many_are_synced_at_once_and_few_one_by_one() {
        let mut scene = Scene::new();
        let mut crowd = scene.crowd(WORTH);
        scene.disk.seen();
        crowd.iter_mut().for_each(|(agent, writer)| scene.append(writer, agent, "line"));
        scene.steps.commit();
        let syncs: Vec<_> = scene.disk.seen().into_iter().filter(|seen| seen.starts_with("sync")).collect();
        assert_eq!(syncs, ["syncfs builds"]);
        assert!(crowd.iter().all(|(_, writer)| scene.told(writer) == (1, false, false)));
        crowd.iter_mut().take(WORTH / 2).for_each(|(agent, writer)| scene.append(writer, agent, "line"));
        scene.steps.commit();
        let syncs: Vec<_> = scene.disk.seen().into_iter().filter(|seen| seen.starts_with("sync")).collect();
        assert!(syncs.len() == WORTH && !syncs.contains(&"syncfs builds".to_owned()), "{syncs:?}");
    }

    #[test]
    fn after_a_failed_sync_of_all_every_file_that_was_written_to_is_replaced_by_what_was_durable() {
        let mut scene = Scene::new();
        let mut crowd = scene.crowd(WORTH);
        crowd.iter_mut().for_each(|(agent, writer)| scene.append(writer, agent, "one "));
        scene.steps.commit();
        scene.disk.fail_always("syncfs builds", io::ErrorKind::Other);
        crowd[1..].iter_mut().for_each(|(agent, writer)| scene.append(writer, agent, "two"));
        scene.steps.commit();
        assert_eq!(scene.told(&crowd[0].1), (1, false, false), "it was not written to");
        assert!(crowd[1..].iter().all(|(_, writer)| scene.told(writer) == (1, false, true)));
        scene.disk.heal();
        scene.disk.seen();
        for (at, (agent, writer)) in crowd.iter_mut().enumerate().skip(1) {
            let again = scene.open(named(agent, at)).unwrap();
            assert_eq!((again.receiver.next(), writer.files.progress.borrow().generation), (1, 1));
            let two = agent.records[1].clone();
            scene.steps.append(&again.writer, vec![two], agent.tally.clone());
        }
        let seen = scene.disk.seen();
        assert_eq!(seen.iter().filter(|seen| *seen == "rename log").count(), WORTH - 1);
        assert!(!seen.contains(&"sync events".to_owned()) || !seen.contains(&"rename events".to_owned()), "{seen:?}");
        scene.steps.commit();
        assert!(crowd[1..].iter().all(|(_, writer)| scene.read(writer) == "one two"));
    }

    #[test]
    fn many_attempts_are_made_with_two_syncs_and_none_is_known_before() {
        let mut scene = Scene::new();
        scene.disk.seen();
        let waiting: Vec<_> = (0..9).map(|at| scene.ask(named(&Agent::new(1), at))).collect();
        assert!(scene.disk.seen().is_empty());
        scene.steps.commit();
        let seen = scene.disk.seen();
        let place = |step: &str| seen.iter().position(|seen| seen == step).unwrap();
        let last = |step: &str| seen.iter().rposition(|seen| seen == step).unwrap();
        assert_eq!(seen.iter().filter(|seen| seen.starts_with("sync")).count(), 2, "{seen:?}");
        assert!(
            last("write attempt.tmp") < place("syncfs builds") && place("syncfs builds") < place("rename attempt.json")
        );
        assert!(last("rename attempt.json") < last("syncfs builds"));
        assert!(waiting.into_iter().all(|mut opened| opened.try_recv().unwrap().is_ok()));
        assert_eq!(scene.open_files(), 0, "nobody has written yet");
    }

    #[test]
    fn many_attempts_that_could_not_be_made_can_be_made_again() {
        for fault in ["write attempt.tmp", "syncfs builds", "rename attempt.json"] {
            let mut scene = Scene::new();
            scene.disk.fail_always(fault, io::ErrorKind::Other);
            let waiting: Vec<_> = (0..9).map(|at| scene.ask(named(&Agent::new(1), at))).collect();
            scene.steps.commit();
            for mut opened in waiting {
                assert!(matches!(opened.try_recv().unwrap(), Err(OpenError::Storage(_))), "{fault}");
            }
            scene.disk.heal();
            for at in 0..9 {
                let opened = scene.open(named(&Agent::new(2), at)).unwrap();
                assert_eq!(opened.writer.lease.attempt, 1, "{fault}");
            }
        }
    }

    #[test]
    fn many_ends_are_stored_with_two_syncs_and_none_has_its_name_before_its_records_are_synced() {
        let mut scene = Scene::new();
        let crowd = scene.crowd_with_ends(WORTH);
        scene.disk.seen();
        scene.steps.commit();
        let seen = scene.disk.seen();
        let place = |step: &str| seen.iter().position(|seen| seen == step).unwrap();
        let last = |step: &str| seen.iter().rposition(|seen| seen == step).unwrap();
        assert_eq!(seen.iter().filter(|seen| seen.starts_with("sync")).count(), 2, "{seen:?}");
        assert!(last("write log").max(last("write finished.tmp")) < place("syncfs builds"));
        assert!(place("syncfs builds") < place("rename finished.json"));
        assert!(last("rename finished.json") < last("syncfs builds"));
        assert!(crowd.iter().all(|(_, writer)| writer.files.progress.borrow().finished.is_some()));
        assert_eq!(scene.open_files(), 0);
    }

    #[test]
    fn many_ends_that_could_not_be_stored_are_not_known_and_can_be_told_again() {
        for (fault, spared) in
            [("write finished.tmp", 0), ("syncfs builds", 0), ("rename finished.json", 0), ("syncfs builds", 1)]
        {
            let mut scene = Scene::new();
            let crowd = scene.crowd_with_ends(WORTH);
            let mut spared = spared;
            scene.disk.fail(move |seen| {
                let fails = seen == fault && spared == 0;
                spared -= i32::from(seen == fault && !fails);
                fails.then_some(io::ErrorKind::Other)
            });
            scene.steps.commit();
            assert!(crowd.iter().all(|(_, writer)| scene.told(writer).2), "{fault}");
            assert!(crowd.iter().all(|(_, writer)| writer.files.progress.borrow().finished.is_none()), "{fault}");
            scene.disk.heal();
            for (at, (agent, _)) in crowd.iter().enumerate() {
                let mut again = scene.open(named(agent, at)).unwrap();
                for record in agent.records[again.receiver.next() as usize..].iter().cloned() {
                    scene.steps.append(&again.writer, vec![record], agent.tally.clone());
                }
                scene.finish(&mut again, agent);
            }
            scene.steps.commit();
            assert!(crowd.iter().all(|(_, writer)| writer.files.progress.borrow().finished.is_some()), "{fault}");
        }
    }

    #[test]
    fn many_small_files_are_stored_with_two_syncs_and_the_first_of_a_name_wins() {
        let mut scene = Scene::new();
        assert!(scene.verdict("first").unwrap());
        let mut waiting: Vec<_> = (0..WORTH).map(|at| scene.settle(&format!("b{at}"), "{}")).collect();
        let (same, other, late) = (scene.settle("b0", "{}"), scene.settle("b0", "other"), scene.settle("b", "late"));
        scene.disk.seen();
        scene.steps.commit();
        let seen = scene.disk.seen();
        let place = |step: &str| seen.iter().position(|seen| seen == step).unwrap();
        assert!(place("syncfs builds") < place("rename verdict.json"), "{seen:?}");
        assert_eq!(seen.iter().filter(|seen| *seen == "syncfs builds").count(), 2, "{seen:?}");
        assert!(waiting.iter_mut().all(|kept| kept.try_recv().unwrap().unwrap()));
        let told = [same, other, late].map(|mut kept| kept.try_recv().unwrap().unwrap());
        assert_eq!(told, [true, false, false]);
        assert_eq!(
            (scene.contents("b0/verdict.json"), scene.contents("b/verdict.json")),
            ("{}".into(), "first".into())
        );
    }

    #[test]
    fn many_small_files_that_could_not_be_stored_are_said_to_be_so() {
        for fault in ["write verdict.tmp", "syncfs builds", "rename verdict.json"] {
            let mut scene = Scene::new();
            scene.disk.fail_always(fault, io::ErrorKind::Other);
            for is_stored in [false, true] {
                let waiting: Vec<_> = (0..WORTH).map(|at| scene.settle(&format!("b{at}"), "{}")).collect();
                scene.steps.commit();
                assert!(waiting.into_iter().all(|mut kept| kept.try_recv().unwrap().is_ok() == is_stored), "{fault}");
                scene.disk.heal();
            }
        }
    }

    #[test]
    fn a_second_hello_does_not_wait_for_the_round_of_the_first() {
        let mut scene = Scene::new();
        let mut first = scene.ask(Agent::new(1).hello(0));
        let mut second = scene.ask(Agent::new(2).hello(0));
        assert_eq!(first.try_recv().unwrap().unwrap().writer.lease.attempt, 1);
        assert_eq!(second.try_recv().unwrap().unwrap().writer.lease.attempt, 2);
    }

    /// What waited for room does not come behind the verdict either.
    #[test]
    fn a_verdict_voids_every_lease() {
        let mut scene = Scene::new();
        let mut agent = Agent::new(1);
        let mut opened = scene.greet(&agent, 0);
        scene.append(&opened.writer, &mut agent, "stored");
        scene.steps.commit();
        scene.disk.fail_always("write log", io::ErrorKind::StorageFull);
        scene.append(&opened.writer, &mut agent, " waits");
        scene.steps.commit();
        assert_eq!(scene.told(&opened.writer), (1, true, false));
        assert!(scene.verdict("{}").unwrap());
        scene.disk.heal();
        scene.append(&opened.writer, &mut agent, " late");
        scene.finish(&mut opened, &agent);
        scene.retry();
        assert_eq!((scene.told(&opened.writer), scene.read(&opened.writer)), ((1, false, false), "stored".into()));
        assert!(opened.writer.files.progress.borrow().finished.is_none());
    }

    #[test]
    fn a_bounded_number_of_files_is_open_and_all_is_stored() {
        let mut scene = Scene::new();
        scene.steps.open_limit = 8;
        let mut crowd = scene.crowd(40);
        for round in 0..2 {
            crowd.iter_mut().for_each(|(agent, writer)| scene.append(writer, agent, "line "));
            scene.steps.commit();
            assert_eq!(scene.open_files(), 2 * 8, "round {round}: log and index, there was no event");
        }
        assert!(crowd.iter().all(|(_, writer)| scene.read(writer) == "line line "));
    }

    #[test]
    fn what_was_forgotten_is_taken_up_again_from_the_disk() {
        let mut scene = Scene::new();
        let mut agent = Agent::new(1);
        let writer = scene.greet(&agent, 0).writer;
        scene.append(&writer, &mut agent, "kept");
        scene.steps.forget(&"other".parse().unwrap());
        assert_eq!(scene.steps.steps.len(), 1);
        scene.steps.forget(&"b".parse().unwrap());
        assert!(scene.steps.steps.is_empty() && scene.open_files() == 0);
        assert_eq!((scene.told(&writer), scene.read(&writer)), ((1, false, false), "kept".into()));
        assert_eq!(scene.greet(&agent, 0).receiver.next(), 1);
    }

    #[test]
    fn what_could_not_be_synced_is_not_forgotten() {
        let mut scene = Scene::new();
        let mut agent = Agent::new(1);
        let writer = scene.greet(&agent, 0).writer;
        scene.disk.fail_always("sync log", io::ErrorKind::Other);
        scene.append(&writer, &mut agent, "lost");
        scene.steps.forget(&"b".parse().unwrap());
        scene.disk.heal();
        assert_eq!(scene.greet(&agent, 0).receiver.next(), 0);
    }

    #[test]
    fn what_an_earlier_process_left_is_made_durable_once() {
        let mut scene = Scene::new();
        let mut agent = Agent::new(1);
        let writer = scene.greet(&agent, 0).writer;
        scene.append(&writer, &mut agent, "kept");
        scene.steps.commit();
        scene.restart();
        scene.disk.seen();
        scene.steps.prepare();
        assert_eq!(scene.greet(&agent, 0).receiver.next(), 1);
        let seen = scene.disk.seen();
        assert_eq!(seen.iter().filter(|seen| seen.starts_with("sync")).collect::<Vec<_>>(), ["syncfs builds"]);
        scene.restart();
        scene.disk.fail_always("syncfs builds", io::ErrorKind::Other);
        scene.steps.prepare();
        scene.greet(&agent, 0);
        assert!(scene.disk.seen().contains(&"sync log".to_owned()), "then each is by itself");
    }

    struct Scene {
        dir: tempfile::TempDir,
        disk: FaultyDisk,
        steps: Steps,
    }

    /// The hello of one of many builds' agents.
    fn named(agent: &Agent, at: usize) -> Hello {
        Hello { build: format!("b{at}").parse().unwrap(), ..agent.hello(0) }
    }

    impl Scene {
        fn new() -> Self {
            let (dir, disk) = (tempdir(), FaultyDisk::new());
            let mut steps = Steps::new(Arc::new(disk.clone()), dir.path(), Durability::Fsync);
            disk.create_dirs(&dir.path().join("builds")).unwrap();
            steps.prepare();
            Self { dir, disk, steps }
        }

        /// Another process over the same directory.
        fn restart(&mut self) {
            self.steps = Steps::new(Arc::new(self.disk.clone()), self.dir.path(), Durability::Fsync);
        }

        fn try_greet(&mut self, agent: &Agent, oldest: u64) -> Result<Opened, OpenError> {
            self.open(agent.hello(oldest))
        }

        fn open(&mut self, hello: Hello) -> Result<Opened, OpenError> {
            let mut opened = self.ask(hello);
            self.steps.admit_arrivals();
            opened.try_recv().unwrap()
        }

        fn ask(&mut self, hello: Hello) -> oneshot::Receiver<Result<Opened, OpenError>> {
            let (reply, opened) = oneshot::channel();
            self.steps.open(hello, watch::Sender::new(0), reply);
            opened
        }

        fn greet(&mut self, agent: &Agent, oldest: u64) -> Opened {
            self.try_greet(agent, oldest).unwrap()
        }

        /// So many builds with an agent each.
        fn crowd(&mut self, count: usize) -> Vec<(Agent, Writer)> {
            let waiting: Vec<_> = (0..count).map(|at| self.ask(named(&Agent::new(1), at))).collect();
            self.steps.commit();
            let writer =
                |mut opened: oneshot::Receiver<Result<Opened, OpenError>>| opened.try_recv().unwrap().unwrap().writer;
            waiting.into_iter().map(|opened| (Agent::new(1), writer(opened))).collect()
        }

        fn survey(&mut self) -> Vec<Surveyed> {
            self.steps.survey(&"b".parse().unwrap(), &watch::Sender::new(0)).unwrap()
        }

        fn append(&mut self, writer: &Writer, agent: &mut Agent, text: &str) {
            let record = agent.write(Stream::Stdout, text);
            self.steps.append(writer, vec![record], agent.tally.clone());
        }

        fn finish(&mut self, opened: &mut Opened, agent: &Agent) {
            let finished = agent.finished();
            let mut receiver = phonehome_proto::receiver::Receiver::resume(agent.tally.clone(), 0, None);
            let Ok(Ending::Accept(answer)) = receiver.handle_finished(finished.clone()) else { panic!("no end") };
            self.steps.finish(&opened.writer, finished, answer);
        }

        /// A whole build. Tells what was known of it in the end: records, whether finished, whether settled.
        fn live(&mut self, agent: &mut Agent) -> Option<(u64, bool, bool)> {
            let mut opened = self.try_greet(agent, 0).ok()?;
            for text in ["one ", "two ", "three "] {
                self.append(&opened.writer, agent, text);
                let event = agent.write(Stream::Event, "{} ");
                self.steps.append(&opened.writer, vec![event], agent.tally.clone());
                self.steps.commit();
            }
            self.finish(&mut opened, agent);
            self.steps.commit();
            let is_settled = self.verdict("{}").is_ok();
            let progress = opened.writer.files.progress.borrow().clone();
            Some((progress.next, progress.finished.is_some(), is_settled))
        }

        fn reports(&self) -> String {
            self.contents("b/reports")
        }

        fn verdict(&mut self, contents: &str) -> io::Result<bool> {
            let mut recorded = self.settle("b", contents);
            self.steps.commit();
            recorded.try_recv().unwrap()
        }

        fn settle(&mut self, build: &str, contents: &str) -> oneshot::Receiver<io::Result<bool>> {
            self.settle_as(Kept::Verdict, build, contents)
        }

        fn settle_as(&mut self, kept: Kept, build: &str, contents: &str) -> oneshot::Receiver<io::Result<bool>> {
            let (reply, recorded) = oneshot::channel();
            let build = build.parse().unwrap();
            self.steps.settle(NewFile { build, kept, contents: contents.into(), reply });
            recorded
        }

        /// So many builds with an agent each, which have handed over a line and their end.
        fn crowd_with_ends(&mut self, count: usize) -> Vec<(Agent, Writer)> {
            let waiting: Vec<_> = (0..count).map(|at| self.ask(named(&Agent::new(1), at))).collect();
            self.steps.commit();
            let mut crowd = Vec::new();
            for mut opened in waiting {
                let (mut opened, mut agent) = (opened.try_recv().unwrap().unwrap(), Agent::new(1));
                self.append(&opened.writer, &mut agent, "line");
                self.finish(&mut opened, &agent);
                crowd.push((agent, opened.writer));
            }
            crowd
        }

        /// From now on there is room for one write per piece of the reserve.
        fn fill(&self) {
            let mut room = false;
            self.disk.fail(move |seen| {
                room |= seen == "truncate reserve";
                (seen.starts_with("write") && !std::mem::take(&mut room)).then_some(io::ErrorKind::StorageFull)
            });
        }

        /// The time has come to try again.
        fn retry(&mut self) {
            self.steps.room.be_due();
            self.steps.commit();
        }

        fn told(&self, writer: &Writer) -> (u64, bool, bool) {
            let progress = writer.files.progress.borrow();
            (progress.next, progress.full, progress.failed)
        }

        fn read(&self, writer: &Writer) -> String {
            self.read_all(&writer.files)
        }

        fn read_all(&self, files: &Arc<AttemptFiles>) -> String {
            rest(&mut AttemptReader::open(files.clone()).unwrap())
        }

        fn path(&self, below: &str) -> PathBuf {
            self.dir.path().join("builds").join(below)
        }

        fn contents(&self, below: &str) -> String {
            std::fs::read_to_string(self.path(below)).unwrap()
        }

        /// Files of this scene that are open.
        fn open_files(&self) -> usize {
            let targets = std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
            targets.filter(|target| target.starts_with(self.dir.path())).count()
        }
    }

    fn rest(reader: &mut AttemptReader) -> String {
        let mut text = String::new();
        while let Some(found) = reader.next().unwrap() {
            match found {
                Found::Record(record) => text.push_str(std::str::from_utf8(&record.payload).unwrap()),
                Found::Lost(records) => text.push_str(&format!("[{records} lost]")),
            }
        }
        text
    }
}
