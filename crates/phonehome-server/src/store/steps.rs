//! Which attempts exist and who may write them: the state of the store's worker.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::Arc,
};

use phonehome_env::disk::{Disk, File, Open, is_full, write_whole};
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
    Durability, Kept, OpenError, Opened, Surveyed, Writer,
    attempt::{AttemptFiles, End, Owner},
    current::Current,
    log::AttemptLog,
    quarantine, recover,
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
    files: Vec<NewFile>,
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
            steps: BTreeMap::new(),
            dirty: BTreeSet::new(),
            files: Vec::new(),
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
            step.current.iter_mut().for_each(Current::close); // its readers may stay
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
        self.room.spend(|| {
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
        for NewFile { build, kept, contents, reply } in std::mem::take(&mut self.files) {
            drop(reply.send(self.keep(&build, kept, &contents))); // whoever asked may have gone
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

    /// Stores a small file durably, unless there is another: the first one wins.
    fn keep(&mut self, build: &BuildId, kept: Kept, contents: &[u8]) -> io::Result<bool> {
        let (dir, durable) = (self.root.join(build.as_str()), self.durability == Durability::Fsync);
        let path = dir.join(kept.name());
        // The same one again was perhaps not stored as it should be when it was tried before.
        if self.disk.exists(&path)? && self.disk.read(&path)? != contents {
            return Ok(false);
        }
        self.room.spend(|| {
            self.disk.create_dirs(&dir)?;
            write_whole(&*self.disk, &path, contents, durable)?;
            if durable { self.disk.sync_dir(&self.root) } else { Ok(()) }
        })?;
        if kept == Kept::Verdict {
            for (_, step) in self.steps.iter_mut().filter(|((of, _), _)| of == build) {
                step.current.iter_mut().for_each(Current::close);
            }
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
            let Some(owner) = quarantine::owner(disk, &path)? else { break };
            quarantine::complete(disk, &path)?;
            owners.push(owner.producer);
            finished = matches!(End::read(disk, &path)?, End::Known(_));
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
        faulty::{Agent, FaultyDisk, tempdir},
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
            let elsewhere = scene.steps.open(hello, watch::Sender::new(0)).unwrap().writer;
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
            assert_eq!(writer.files.stored_crc(1), Some(agent.records[1].crc));
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

    struct Scene {
        dir: tempfile::TempDir,
        disk: FaultyDisk,
        steps: Steps,
    }

    impl Scene {
        fn new() -> Self {
            let (dir, disk) = (tempdir(), FaultyDisk::new());
            let steps = Steps::new(Arc::new(disk.clone()), dir.path(), Durability::Fsync);
            disk.create_dirs(&dir.path().join("builds")).unwrap();
            steps.prepare();
            Self { dir, disk, steps }
        }

        /// Another process over the same directory.
        fn restart(&mut self) {
            self.steps = Steps::new(Arc::new(self.disk.clone()), self.dir.path(), Durability::Fsync);
        }

        fn try_greet(&mut self, agent: &Agent, oldest: u64) -> Result<Opened, OpenError> {
            self.steps.open(agent.hello(oldest), watch::Sender::new(0))
        }

        fn greet(&mut self, agent: &Agent, oldest: u64) -> Opened {
            self.try_greet(agent, oldest).unwrap()
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
            let (reply, mut recorded) = oneshot::channel();
            let build = "b".parse().unwrap();
            self.steps.settle(NewFile { build, kept: Kept::Verdict, contents: contents.into(), reply });
            self.steps.commit();
            recorded.try_recv().unwrap()
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
