//! Reading a build that has ended from its directory, without the worker: nobody writes there any more.
//!
//! Only small files and the ends of the index are looked at, however long the logs are. What is in them is checked when
//! it is read, record by record; [`verify`](super::verify) checks all of it.

use std::{io, path::Path, sync::Arc};

use phonehome_env::disk::{Disk, File, Open};
use phonehome_proto::{
    frame::{Finished, FinishedAck},
    id::{Attempt, BuildId, ProducerId, StepName},
    limits::{MAX_MESSAGE, MAX_WINDOW, RECORD_COST},
};

use super::{
    CANCEL,
    attempt::{AttemptFiles, End, Owner, Progress, is_missing, read_optional},
    index::{ENTRY, Entry},
    log::stored_len,
    quarantine,
    steps::REPORTS,
};

/// A build as it lies on the disk.
#[derive(Debug)]
pub(crate) struct Archived {
    /// `build.json`, as it was written.
    pub(crate) declaration: Option<Vec<u8>>,
    /// `verdict.json`, as it was written.
    pub(crate) verdict: Option<Vec<u8>>,
    /// `reports`, as far as they were written.
    pub(crate) reports: Option<Vec<u8>>,
    /// By the name of the step and by number.
    pub(crate) attempts: Vec<ArchivedAttempt>,
}

/// An attempt that nobody writes to.
#[derive(Debug)]
pub(crate) struct ArchivedAttempt {
    /// For an [`AttemptReader`](super::AttemptReader). Of its progress only `next`, `entries`, `bytes` (with the newlines
    /// of the events) and `finished` are known; the tally is empty.
    pub(crate) files: Arc<AttemptFiles>,
    /// How it ended and what was answered; `None` also when that can no longer be understood.
    pub(crate) finished: Option<(Finished, FinishedAck)>,
    /// Whose it is; `None` when that can no longer be understood.
    pub(crate) producer: Option<ProducerId>,
    /// There is an end that cannot be understood.
    pub(crate) is_end_damaged: bool,
}

/// Takes up a build that has ended; `None` when there is no such build.
///
/// # Errors
///
/// When the disk fails.
pub(crate) fn load(disk: &Arc<dyn Disk>, data: &Path, build: &BuildId) -> io::Result<Option<Archived>> {
    let dir = data.join("builds").join(build.as_str());
    let names = match disk.list(&dir) {
        Ok(names) => names,
        Err(error) if is_missing(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut attempts = Vec::new();
    for step in names.iter().filter_map(|name| name.to_str()?.parse::<StepName>().ok()) {
        load_step(disk, &dir, build, &step, &mut attempts)?;
    }
    let declaration = read_optional(&**disk, &dir.join("build.json"))?;
    let verdict = read_optional(&**disk, &dir.join("verdict.json"))?;
    let reports = read_optional(&**disk, &dir.join(REPORTS))?;
    Ok(Some(Archived { declaration, verdict, reports, attempts }))
}

/// That somebody wanted a build to stop, as it was written.
///
/// # Errors
///
/// When the disk fails.
pub(crate) fn cancel(disk: &dyn Disk, data: &Path, build: &BuildId) -> io::Result<Option<Vec<u8>>> {
    read_optional(disk, &data.join("builds").join(build.as_str()).join(CANCEL))
}

/// Every build that has a directory, sorted.
///
/// # Errors
///
/// When the disk fails.
pub(crate) fn list(disk: &dyn Disk, data: &Path) -> io::Result<Vec<BuildId>> {
    let names = disk.list(&data.join("builds"))?;
    Ok(names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect())
}

/// What a build takes on the disk: the length of every file in its directory, whatever it is. 0 when there is no such
/// build.
///
/// # Errors
///
/// When the disk fails.
pub(crate) fn bytes(disk: &dyn Disk, data: &Path, build: &BuildId) -> io::Result<u64> {
    tree_bytes(disk, &data.join("builds").join(build.as_str()))
}

fn tree_bytes(disk: &dyn Disk, dir: &Path) -> io::Result<u64> {
    let names = match disk.list(dir) {
        Err(error) if is_missing(&error) => Vec::new(), // it is being removed
        names => names?,
    };
    let mut sum = 0;
    for path in names.iter().map(|name| dir.join(name)) {
        sum += match disk.open(&path, Open::Read) {
            Ok(file) => file.len()?,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => tree_bytes(disk, &path)?, // it is no file
            Err(error) if is_missing(&error) => 0,                                                 // it is being sealed
            Err(error) => return Err(error),
        };
    }
    Ok(sum)
}

fn load_step(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    build: &BuildId,
    step: &StepName,
    attempts: &mut Vec<ArchivedAttempt>,
) -> io::Result<()> {
    for attempt in 1..=Attempt::MAX {
        let path = dir.join(step.as_str()).join(attempt.to_string());
        if !is_attempt(&**disk, &path)? {
            break;
        }
        if disk.exists(&path.join(quarantine::REPAIR))? {
            quarantine::complete(&**disk, &path)?; // a crash came between, and nobody has opened it since
        }
        let files = AttemptFiles::new(disk.clone(), build.clone(), step.clone(), attempt, path);
        attempts.push(load_attempt(&**disk, files)?);
    }
    Ok(())
}

/// A file and a directory may have any name in a build's directory: an attempt is what has one of an attempt's files.
fn is_attempt(disk: &dyn Disk, dir: &Path) -> io::Result<bool> {
    for name in ["attempt.json", "index", "index.zst"] {
        if disk.exists(&dir.join(name)).or_else(|error| if is_missing(&error) { Ok(false) } else { Err(error) })? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn load_attempt(disk: &dyn Disk, files: Arc<AttemptFiles>) -> io::Result<ArchivedAttempt> {
    let end = End::read(disk, &files.dir)?;
    let finished = end.known().map(|ended| (ended.finished.clone(), ended.answer.clone()));
    files.progress.send_replace(progress(&files, finished.clone())?);
    let owner = read_optional(disk, &files.dir.join("attempt.json"))?;
    let producer = owner.and_then(|text| Some(serde_json::from_slice::<Owner>(&text).ok()?.producer));
    Ok(ArchivedAttempt { files, finished, producer, is_end_damaged: matches!(end, End::Damaged) })
}

/// How far an attempt has got, as its files' lengths tell.
fn progress(files: &AttemptFiles, finished: Option<(Finished, FinishedAck)>) -> io::Result<Progress> {
    let (log, events) = (files.open("log")?, files.open("events")?);
    let lens = [log.len()?, events.len()?];
    // Without an end the last round may be torn: then nobody has heard of it.
    let torn = if finished.is_none() { MAX_TORN } else { 0 };
    let (mut entries, mut next) = last_entry(&*files.open("index")?, lens, torn)?;
    if let Some((finished, _)) = &finished {
        // Behind an end it would be damage, and whoever reads that far has to see it.
        entries += u64::from(next != finished.next);
        next = finished.next;
    }
    Ok(Progress { next, bytes: lens[0] + lens[1], entries, finished, ..Progress::default() })
}

/// How many entries there are up to the last good one, and the number after it, when not more than `torn` are bad.
fn last_entry(index: &dyn File, lens: [u64; 2], torn: u64) -> io::Result<(u64, u64)> {
    let all = index.len()? / ENTRY as u64;
    let mut wire = [0; ENTRY];
    for last in (all.saturating_sub(torn + 1)..all).rev() {
        index.read_exact_at(&mut wire, last * ENTRY as u64)?;
        if let Some(next) = Entry::decode(&wire).and_then(|entry| end_of(entry, lens)) {
            return Ok((last + 1, next));
        }
    }
    Ok((all.saturating_sub(torn), 0))
}

/// The number after an entry whose payload is there.
fn end_of(entry: Entry, lens: [u64; 2]) -> Option<u64> {
    match entry {
        Entry::Hole { to, .. } => Some(to),
        Entry::Record { seq, stream, position, len, .. } => {
            let end = position.checked_add(stored_len(stream, len))?;
            (end <= lens[usize::from(!stream.is_output())]).then_some(seq.checked_add(1)?)
        }
    }
}

/// Entries that a torn round can have: what an agent may have unacknowledged.
const MAX_TORN: u64 = (MAX_WINDOW + MAX_MESSAGE as u64) / RECORD_COST;

#[cfg(test)]
mod tests {
    use std::fs;

    use phonehome_env::disk::RealDisk;
    use phonehome_proto::{frame::Record, frame::Stream};

    use super::*;
    use crate::store::{
        AttemptReader, Durability, Found,
        faulty::{Agent, tempdir},
        log::{AttemptLog, Batch},
    };

    #[test]
    fn an_ended_build_is_read_from_its_directory() {
        let scene = Scene::new();
        let (mut log, mut agent) = scene.attempt("main/1");
        scene.write(&mut log, &mut agent, Stream::Stdout, "out\n");
        scene.write(&mut log, &mut agent, Stream::Event, "{}");
        log.finish(agent.finished(), FinishedAck::Complete).unwrap();
        let (mut log, mut agent) = scene.attempt("lint/1");
        scene.write(&mut log, &mut agent, Stream::Stderr, "warned\n");
        let (mut log, mut agent) = scene.attempt("lint/2");
        log.hole(3).unwrap();
        agent.tally.skip_to(3);
        scene.write(&mut log, &mut agent, Stream::Stderr, "again\n");
        fs::write(scene.path("build.json"), "declared").unwrap();
        fs::write(scene.path("verdict.json"), "told").unwrap();
        fs::write(scene.path("reports"), "{}\n").unwrap();
        let found = scene.load().unwrap();
        assert_eq!((found.declaration.unwrap(), found.verdict.unwrap()), (b"declared".to_vec(), b"told".to_vec()));
        let attempts: Vec<_> =
            found.attempts.iter().map(|found| (found.files.step.to_string(), found.files.attempt)).collect();
        assert_eq!(attempts, [("lint".into(), 1), ("lint".into(), 2), ("main".into(), 1)]);
        let read: Vec<_> = found.attempts.iter().map(|found| texts(&found.files)).collect();
        assert_eq!(read, [vec!["warned\n"], vec!["3 lost", "again\n"], vec!["out\n", "{}"]]);
        let progress: Vec<_> = found.attempts.iter().map(|found| found.files.progress.borrow().clone()).collect();
        let reached: Vec<_> =
            progress.iter().map(|progress| (progress.next, progress.entries, progress.bytes)).collect();
        assert_eq!(reached, [(1, 1, 7), (4, 2, 6), (2, 2, 7)]);
        let main = &found.attempts[2];
        assert_eq!((main.files.labels().unwrap().0.as_str(), &main.finished), ("test", &progress[2].finished));
        assert!(main.finished.as_ref().is_some_and(|(_, answer)| *answer == FinishedAck::Complete));
        assert!(!main.is_end_damaged && found.attempts[0].finished.is_none());
    }

    #[test]
    fn a_build_takes_what_all_its_files_take() {
        let scene = Scene::new();
        let (mut log, mut agent) = scene.attempt("main/1");
        scene.write(&mut log, &mut agent, Stream::Stdout, "out\n");
        fs::create_dir_all(scene.path("main/1/quarantine/1")).unwrap();
        fs::write(scene.path("main/1/quarantine/1/log"), "set aside").unwrap();
        fs::write(scene.path("reports"), "{}\n").unwrap();
        let owner = fs::metadata(scene.path("main/1/attempt.json")).unwrap().len();
        let bytes = |build: &str| bytes(&RealDisk, &scene.data(), &build.parse().unwrap()).unwrap();
        assert_eq!((bytes("b"), bytes("unknown")), (owner + 4 + ENTRY as u64 + 9 + 3, 0));
    }

    #[test]
    fn what_is_no_build_is_not_found() {
        let scene = Scene::new();
        assert!(scene.load().is_none());
        fs::create_dir_all(scene.path("main/1")).unwrap();
        fs::create_dir_all(scene.data().join("builds/.expired-a")).unwrap();
        fs::create_dir_all(scene.data().join("builds/a")).unwrap();
        assert!(scene.load().unwrap().attempts.is_empty());
        let found = list(&RealDisk, &scene.data()).unwrap();
        assert_eq!(found.iter().map(BuildId::as_str).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn a_torn_tail_is_left_out_unless_an_end_says_that_it_belongs_there() {
        for finished in [false, true] {
            for (file, len) in [("index", 2 * ENTRY - 1), ("log", 5)] {
                let scene = Scene::new();
                let (mut log, mut agent) = scene.attempt("main/1");
                scene.write(&mut log, &mut agent, Stream::Stdout, "one\n");
                scene.write(&mut log, &mut agent, Stream::Stdout, "two\n");
                if finished {
                    log.finish(agent.finished(), FinishedAck::Complete).unwrap();
                }
                let path = scene.path("main/1").join(file);
                let bytes = fs::read(&path).unwrap();
                fs::write(&path, &bytes[..len]).unwrap();
                let files = scene.load().unwrap().attempts.remove(0).files;
                let mut reader = AttemptReader::open(files.clone()).unwrap();
                assert!(reader.next().unwrap().is_some());
                let next = files.progress.borrow().next;
                assert_eq!(next, if finished { 2 } else { 1 }, "{file}");
                assert_eq!(reader.next().is_err(), finished, "{file}");
            }
        }
    }

    #[test]
    fn an_attempt_with_damaged_small_files_can_be_read_still() {
        let scene = Scene::new();
        let (mut log, mut agent) = scene.attempt("main/1");
        scene.write(&mut log, &mut agent, Stream::Stdout, "kept");
        for name in ["attempt.json", "finished.json"] {
            fs::write(scene.path("main/1").join(name), "{torn").unwrap();
        }
        let found = scene.load().unwrap().attempts.remove(0);
        assert_eq!(
            (found.files.labels().unwrap().0.as_str(), found.is_end_damaged, texts(&found.files)),
            ("", true, vec!["kept".to_owned()])
        );
    }

    struct Scene(tempfile::TempDir);

    impl Scene {
        fn new() -> Self {
            Self(tempdir())
        }

        fn data(&self) -> std::path::PathBuf {
            self.0.path().to_owned()
        }

        fn path(&self, name: &str) -> std::path::PathBuf {
            self.0.path().join("builds/b").join(name)
        }

        fn attempt(&self, dir: &str) -> (AttemptLog, Agent) {
            let agent = Agent::new(1);
            let log = AttemptLog::create(Arc::new(RealDisk), &self.path(dir), &agent.owner(), Durability::Os).unwrap();
            (log, agent)
        }

        fn write(&self, log: &mut AttemptLog, agent: &mut Agent, stream: Stream, text: &str) {
            let records: Vec<Record> = vec![agent.write(stream, text)];
            log.append(&[Batch { records, tally: agent.tally.clone() }]).and_then(|()| log.sync()).unwrap();
        }

        fn load(&self) -> Option<Archived> {
            let disk: Arc<dyn Disk> = Arc::new(RealDisk);
            load(&disk, self.0.path(), &"b".parse().unwrap()).unwrap()
        }
    }

    fn texts(files: &Arc<AttemptFiles>) -> Vec<String> {
        let mut reader = AttemptReader::open(files.clone()).unwrap();
        let next = || match reader.next().unwrap()? {
            Found::Lost(count) => Some(format!("{count} lost")),
            Found::Record(record) => Some(String::from_utf8(record.payload.to_vec()).unwrap()),
        };
        std::iter::from_fn(next).collect()
    }
}
