//! Taking up what an earlier process left of an attempt, and telling a torn tail from damage.
//!
//! A crash tears the end of what was being written: the last round, which nobody has heard of. It is cut. Anything else
//! that is not as it should be was acknowledged once: the disk has lost or changed it. Then the files are set aside as
//! they are, and everything that is intact in them goes on in new ones, with holes where something is gone.

use std::{io, path::Path, sync::Arc};

use phonehome_env::disk::{Disk, File};
use phonehome_proto::{
    frame::FinishedAck,
    limits::{MAX_MESSAGE, MAX_WINDOW, RECORD_COST},
};
use tracing::{error, warn};

use super::{
    Durability,
    attempt::{End, Ended},
    index::ENTRY,
    log::{AttemptLog, Point, open_all},
    quarantine::{self, Rewrite},
    walk::{Walk, What},
};

/// Opens an attempt with everything in it that is good: what its index entries, bytes and checksums agree on.
///
/// All that is stored is read once, which takes as long as the disk needs for the log's size; meanwhile nothing else is
/// stored. What is there need not be made durable when it is known to be `settled`.
pub(super) fn open(disk: &Arc<dyn Disk>, dir: &Path, durability: Durability, settled: bool) -> io::Result<AttemptLog> {
    quarantine::complete(&**disk, dir)?;
    let (mut log, state) = take_up(disk, dir, durability)?;
    if !settled || state != State::Sound {
        log.confirm()?;
    }
    Ok(log)
}

fn take_up(disk: &Arc<dyn Disk>, dir: &Path, durability: Durability) -> io::Result<(AttemptLog, State)> {
    let files = open_all(&**disk, dir)?;
    let end = End::read(&**disk, dir)?;
    let found = Found::look(&files)?;
    let state = found.judge(&end);
    match state {
        State::Sound => {}
        State::Torn => found.cut(&files, dir)?,
        State::Damaged => {
            let restored = restore(disk, dir, durability, &files, &end, &found);
            if restored.is_err() {
                drop(quarantine::complete(&**disk, dir)); // leftovers take room; the error that counts is the first
            }
            return Ok((restored?, state));
        }
    }
    let finished = end.known().map(|ended| (ended.finished.clone(), ended.answer.clone()));
    Ok((AttemptLog::resume(disk.clone(), dir, durability, found.sound, finished), state))
}

/// What an attempt's files turn out to be.
#[derive(Debug, PartialEq, Eq)]
enum State {
    Sound,
    Torn,
    Damaged,
}

/// What is found in an attempt's files.
struct Found {
    /// Up to where everything is good.
    sound: Point,
    /// The last place where an entry begins a round, and the highest number of one that does: everything before either was
    /// acknowledged. They are of the same entry, unless the disk has put one where it does not belong.
    round: Option<(u64, u64)>,
    /// Something cannot be read at all.
    unreadable: bool,
    lens: [u64; 3],
}

impl Found {
    fn look(files: &[Box<dyn File>; 3]) -> io::Result<Self> {
        let [log, events, index] = files;
        let mut walk = Walk::new(files)?;
        let (mut sound, mut round, mut unreadable) = (None, None::<(u64, u64)>, false);
        while let Some(seen) = walk.next() {
            match seen.what {
                What::Hole | What::Record(_) => {}
                What::Bad | What::Unreadable => {
                    unreadable |= matches!(seen.what, What::Unreadable);
                    sound.get_or_insert_with(|| walk.at().clone());
                }
            }
            if let Some(seq) = seen.first {
                let highest = round.map_or(seq, |(_, highest)| seq.max(highest));
                round = Some((seen.entry, highest));
            }
        }
        let sound = sound.unwrap_or_else(|| walk.at().clone());
        Ok(Self { sound, round, unreadable, lens: [log.len()?, events.len()?, index.len()?] })
    }

    /// Bytes behind what is good, in each file.
    fn rest(&self) -> [u64; 3] {
        let ends = self.sound.ends();
        [0, 1, 2].map(|at| self.lens[at].saturating_sub(ends[at]))
    }

    fn judge(&self, end: &End) -> State {
        let is_whole = self.rest() == [0; 3];
        match end {
            End::Damaged => State::Damaged,
            End::Known(ended) if is_whole && agrees(ended, &self.sound) => State::Sound,
            End::Known(_) => State::Damaged, // all of it was synced before the end was written
            End::None if is_whole => State::Sound,
            End::None if self.was_acknowledged() => State::Damaged,
            End::None => State::Torn,
        }
    }

    /// Whether something of what is not good was acknowledged for certain.
    fn was_acknowledged(&self) -> bool {
        let [log, events, index] = self.rest();
        let cost = log + events + index.div_ceil(ENTRY as u64) * RECORD_COST;
        self.unreadable
            || self.round.is_some_and(|(entry, _)| entry > self.sound.entries)
            || cost > MAX_WINDOW + MAX_MESSAGE as u64
    }

    fn cut(&self, files: &[Box<dyn File>; 3], dir: &Path) -> io::Result<()> {
        let bytes: u64 = self.rest().iter().sum();
        warn!(bytes, attempt = %dir.display(), "cut a torn tail that was never acknowledged");
        files
            .iter()
            .zip(self.sound.ends())
            .zip(self.rest())
            .filter(|(_, rest)| *rest > 0)
            .try_for_each(|((file, end), _)| file.set_len(end))
    }
}

/// Whether an end fits what is stored. Why a log is incomplete was found out when the end came, and is not asked again.
fn agrees(ended: &Ended, stored: &Point) -> bool {
    let (finished, tally) = (&ended.finished, &stored.tally);
    let same = finished.counts == tally.counts() && finished.digest == tally.digest();
    finished.next == tally.next() && (same || ended.answer != FinishedAck::Complete)
}

/// Sets the files aside and goes on with new ones that have everything intact.
fn restore(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    durability: Durability,
    files: &[Box<dyn File>; 3],
    end: &End,
    found: &Found,
) -> io::Result<AttemptLog> {
    let mut rewrite = Rewrite::begin(disk, dir)?;
    // All of an ended log was acknowledged, of another what comes before its last round: up to which entry, which record.
    let (entries, next) = match end {
        End::Known(ended) => (u64::MAX, ended.finished.next),
        End::Damaged => (u64::MAX, found.round.map_or(0, |(_, seq)| seq)),
        End::None => found.round.unwrap_or((0, 0)),
    };
    let mut walk = Walk::new(files)?;
    while let Some(seen) = walk.next() {
        match seen.what {
            What::Record(record) => rewrite.push(record, walk.at())?,
            What::Hole => rewrite.skip_to(walk.at())?,
            What::Bad | What::Unreadable if seen.entry < entries => {}
            What::Bad | What::Unreadable => break,
        }
    }
    let stored = rewrite.end_at(next)?;
    let ended = end.known().and_then(|ended| restore_end(ended, &stored));
    let number = rewrite.replace(ended.as_ref(), !matches!(end, End::None))?;
    error!(
        attempt = %dir.display(),
        records_lost = stored.lost - found.sound.lost.min(stored.lost),
        records_kept = stored.entries,
        "the log was damaged behind record {}; what is intact goes on, and the files as they were found are in quarantine/{number}",
        found.sound.tally.next(),
    );
    let finished = ended.map(|ended| (ended.finished, ended.answer));
    Ok(AttemptLog::resume(disk.clone(), dir, durability, stored, finished))
}

/// The end as it is now; `None` when it is of another log.
fn restore_end(ended: &Ended, stored: &Point) -> Option<Ended> {
    let Ended { finished, mut answer } = ended.clone();
    if finished.next != stored.tally.next() {
        return None;
    }
    if stored.lost > 0 {
        answer = FinishedAck::Incomplete(format!("{} records are gone, neither side has them any more", stored.lost));
    } else if !agrees(ended, stored) {
        answer = FinishedAck::Incomplete("the counts or the digest differ from what is stored".into());
    }
    Some(Ended { finished, answer })
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::PathBuf};

    use phonehome_proto::{frame::Record, frame::Stream, limits::MAX_PAYLOAD};
    use tokio::sync::watch;

    use super::*;
    use crate::store::{
        AttemptReader, Found as Read,
        attempt::AttemptFiles,
        current::Current,
        faulty::{Agent, FaultyDisk, tempdir},
        log::{Batch, NAMES},
    };

    #[test]
    fn what_was_appended_is_there_after_opening_again() {
        let scene = Scene::filled();
        let log = scene.open();
        assert_eq!((log.durable().tally.next(), log.durable().entries), (4, 4));
        assert_eq!(log.durable().tally.digest().0, *blake3::hash(b"one\ntwo\n3").as_bytes());
        assert_eq!(scene.bytes("log"), b"one\ntwo\n3");
        assert_eq!(scene.bytes("events"), b"{\"event\":\"x\"}\n");
        assert!(!scene.path("quarantine").exists());
    }

    #[test]
    fn what_an_earlier_process_did_not_sync_is_synced_before_it_is_believed() {
        let scene = Scene::filled();
        for file in NAMES {
            scene.disk.seen();
            scene.open();
            let seen = scene.disk.seen();
            assert!(["sync log", "sync events", "sync index"].iter().all(|sync| seen.contains(&(*sync).to_owned())));
            scene.disk.fail_always(
                ["sync log", "sync events", "sync index"][usize::from(file != "log")],
                io::ErrorKind::Other,
            );
            assert!(scene.try_open().is_err(), "it fails for ever");
            scene.disk.heal();
        }
    }

    #[test]
    fn the_last_round_torn_at_any_byte_is_cut_and_the_log_goes_on() {
        for file in ["log", "index"] {
            let whole = Scene::filled().bytes(file).len();
            for len in whole - if file == "log" { 1 } else { ENTRY }..whole {
                let mut scene = Scene::filled();
                scene.cut(file, len);
                let mut log = scene.open();
                assert_eq!((log.durable().tally.next(), log.durable().lost), (3, 0), "{file} at {len}");
                assert!(!scene.path("quarantine").exists(), "{file} at {len}");
                scene.agent.tally = log.durable().tally.clone();
                scene.append(&mut log, Stream::Stdout, "again");
                assert_eq!(scene.open().durable().tally.next(), 4, "{file} at {len}");
            }
        }
    }

    /// A crash writes pages in any order: what comes first in a round may be missing and what comes later be there.
    #[test]
    fn a_round_torn_in_its_middle_is_no_damage() {
        let mut scene = Scene::filled();
        let mut log = scene.open();
        let records: Vec<_> = ["five", "six", "seven"].map(|text| scene.agent.write(Stream::Stdout, text)).into();
        log.append(&[Batch { records, tally: scene.agent.tally.clone() }]).unwrap();
        drop(log);
        scene.flip("log", b"one\ntwo\n3five".len());
        let log = scene.open();
        assert_eq!((log.durable().tally.next(), log.durable().lost), (5, 0), "the agent has the rest still");
        assert!(!scene.path("quarantine").exists());
    }

    #[test]
    fn more_than_may_be_unacknowledged_is_no_torn_tail() {
        let mut scene = Scene::filled();
        let mut log = scene.open();
        let text = "x".repeat(MAX_PAYLOAD);
        let records: Vec<_> = (0..140).map(|_| scene.agent.write(Stream::Stdout, &text)).collect();
        log.append(&[Batch { records, tally: scene.agent.tally.clone() }]).unwrap();
        scene.cut("index", 4 * ENTRY);
        let log = scene.open();
        assert_eq!(log.durable().entries, 4);
        assert_eq!(fs::metadata(scene.path("quarantine/1/log")).unwrap().len(), 9 + 140 * MAX_PAYLOAD as u64);
    }

    /// Any byte changed and any file cut anywhere: never wrong bytes, everything before is there, what is gone is counted.
    #[test]
    fn no_damage_is_ever_served_as_good() {
        for finished in [false, true] {
            for file in NAMES {
                for at in 0..Scene::filled().bytes(file).len() {
                    if (file, at) == ("events", 13) {
                        continue; // the newline belongs to no record
                    }
                    for flip in [true, false] {
                        let mut scene = Scene::filled();
                        if finished {
                            scene.finish();
                        }
                        if flip {
                            scene.flip(file, at)
                        } else {
                            scene.cut(file, at)
                        }
                        scene.check(
                            &format!("{file} at {at}, flip: {flip}, finished: {finished}"),
                            finished,
                            touched(file, at),
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn one_record_changed_is_one_record_lost() {
        for finished in [false, true] {
            let mut scene = Scene::filled();
            if finished {
                scene.finish();
            }
            scene.flip("log", 1);
            let log = scene.open();
            assert_eq!((log.durable().tally.next(), log.durable().lost, scene.bytes("log")), (4, 1, b"two\n3".into()));
            let answer = FinishedAck::Incomplete("1 records are gone, neither side has them any more".into());
            assert_eq!(log.finished().map(|(_, told)| told), finished.then_some(&answer));
            scene.flip("index", ENTRY);
            let log = scene.open();
            assert_eq!((log.durable().tally.next(), log.durable().lost), (4, 2));
            assert!(scene.path("quarantine/2").exists(), "nothing that was restored is a torn tail");
        }
    }

    #[test]
    fn an_entry_that_does_not_belong_there_hides_no_loss() {
        let scene = Scene::filled();
        let mut index = scene.bytes("index");
        index.extend_from_within(ENTRY..2 * ENTRY);
        fs::write(scene.path("index"), index).unwrap();
        scene.cut("log", 0);
        scene.cut("events", 0);
        let log = scene.open();
        assert_eq!((log.durable().tally.next(), log.durable().lost), (3, 3));
    }

    #[test]
    fn what_cannot_be_read_is_set_aside_and_never_cut() {
        let scene = Scene::filled();
        let mut reads = 0;
        scene.disk.fail(move |seen| {
            reads += i32::from(seen == "read log");
            (seen == "read log" && reads > 1).then_some(io::ErrorKind::Other)
        });
        let before = scene.bytes("log");
        drop(scene.try_open());
        scene.disk.heal();
        let kept = ["log", "quarantine/1/log"].map(|name| fs::read(scene.path(name)).unwrap_or_default());
        assert!(kept.contains(&before));
    }

    #[test]
    fn an_end_that_cannot_be_understood_is_set_aside() {
        for (from, to) in [("{", "!"), ("\"next\": 4", "\"next\": 3")] {
            let mut scene = Scene::filled();
            scene.finish();
            let text = String::from_utf8(scene.bytes("finished.json")).unwrap();
            fs::write(scene.path("finished.json"), text.replacen(from, to, 1)).unwrap();
            let log = scene.open();
            assert_eq!((log.durable().tally.next(), log.finished()), (4, None));
            assert!(scene.path("quarantine/1/finished.json").exists() && !scene.path("finished.json").exists());
        }
    }

    #[test]
    fn an_end_with_another_digest_is_not_complete() {
        let mut scene = Scene::filled();
        scene.agent.tally.add(&Record::new(4, 0, Stream::Stdout, 5, "never stored".into()));
        let finished = phonehome_proto::frame::Finished { next: 4, ..scene.agent.finished() };
        scene.open().finish(finished, FinishedAck::Complete).unwrap();
        for _ in 0..2 {
            let log = scene.open();
            assert!(matches!(log.finished(), Some((_, FinishedAck::Incomplete(_)))));
            assert!(!scene.path("quarantine/2").exists());
        }
    }

    #[test]
    fn a_crash_at_any_point_of_a_restoration_does_no_harm() {
        for finished in [false, true] {
            for count in 0.. {
                let mut scene = Scene::filled();
                if finished {
                    scene.finish();
                }
                scene.flip("log", 1);
                let damaged: Vec<_> =
                    scene.names().into_iter().map(|name| (name.clone(), scene.bytes(&name))).collect();
                scene.disk.crash_after(count);
                let survived = scene.try_open().is_ok();
                scene.disk.heal();
                let log = scene.open();
                assert_eq!((log.durable().tally.next(), log.durable().lost), (4, 1), "after {count} operations");
                assert_eq!(log.finished().is_some(), finished);
                for (name, bytes) in damaged.iter().filter(|(name, _)| name != "attempt.json") {
                    assert!(scene.bytes(&format!("quarantine/1/{name}")) == *bytes, "{name} after {count} operations");
                }
                let mut names: Vec<_> =
                    damaged.into_iter().map(|(name, _)| name).chain(["quarantine".into()]).collect();
                names.sort_unstable();
                let mut there = scene.names();
                there.retain(|name| !name.ends_with(".tmp"));
                assert_eq!((there, scene.path("quarantine/2").exists()), (names, false), "after {count} operations");
                if survived {
                    break;
                }
            }
        }
    }

    #[test]
    fn holes_and_ends_survive() {
        let mut scene = Scene::new();
        let mut log = scene.create();
        log.hole(5).unwrap();
        scene.agent.tally.skip_to(5);
        scene.append(&mut log, Stream::Stdout, "late");
        let (finished, answer) = (scene.agent.finished(), FinishedAck::Incomplete("lost".into()));
        log.finish(finished.clone(), answer.clone()).unwrap();
        let log = scene.open();
        assert_eq!((log.durable().lost, log.durable().tally.next()), (5, 6));
        assert_eq!(log.finished(), Some(&(finished, answer)));
    }

    struct Scene {
        dir: tempfile::TempDir,
        disk: FaultyDisk,
        agent: Agent,
    }

    impl Scene {
        fn new() -> Self {
            Self { dir: tempdir(), disk: FaultyDisk::new(), agent: Agent::new(1) }
        }

        /// Four records, each in a round of its own.
        fn filled() -> Self {
            let mut scene = Self::new();
            let mut log = scene.create();
            scene.append(&mut log, Stream::Stdout, "one\n");
            scene.append(&mut log, Stream::Event, r#"{"event":"x"}"#);
            scene.append(&mut log, Stream::Stderr, "two\n");
            scene.append(&mut log, Stream::Stdout, "3");
            scene
        }

        fn finish(&mut self) {
            let finished = self.agent.finished();
            self.open().finish(finished, FinishedAck::Complete).unwrap();
        }

        fn create(&self) -> AttemptLog {
            let disk = Arc::new(self.disk.clone());
            AttemptLog::create(disk, &self.path(""), &self.agent.owner(), Durability::Fsync).unwrap()
        }

        fn try_open(&self) -> io::Result<AttemptLog> {
            let disk: Arc<dyn Disk> = Arc::new(self.disk.clone());
            open(&disk, &self.path(""), Durability::Fsync, false)
        }

        fn open(&self) -> AttemptLog {
            self.try_open().unwrap()
        }

        fn append(&mut self, log: &mut AttemptLog, stream: Stream, text: &str) {
            let records = vec![self.agent.write(stream, text)];
            log.append(&[Batch { records, tally: self.agent.tally.clone() }]).unwrap();
            log.sync().unwrap();
        }

        /// Opens what is damaged from record `first` on and looks at everything in it.
        fn check(&mut self, what: &str, finished: bool, first: u64) {
            let damaged: Vec<_> = NAMES.map(|name| self.bytes(name)).into();
            let log = self.open();
            let end = log.durable().clone();
            let answer = log.finished().map(|(_, answer)| answer.clone());
            let (records, lost) = self.read(log);
            for record in records.values() {
                assert_eq!(*record, self.agent.records[record.seq as usize], "{what}");
            }
            assert!((0..first).all(|seq| records.contains_key(&seq)), "{what}: {records:?}");
            assert_eq!((records.len() as u64 + lost, lost), (end.tally.next(), end.lost), "{what}");
            assert_eq!(self.bytes("log").len() as u64, end.positions[0], "{what}");
            if finished {
                assert_eq!(
                    (end.tally.next(), answer.is_some_and(|told| told != FinishedAck::Complete)),
                    (4, true),
                    "{what}"
                );
            }
            if self.path("quarantine").exists() {
                let kept: Vec<_> = NAMES.map(|name| self.bytes(&format!("quarantine/1/{name}"))).into();
                assert!(kept == damaged, "{what}");
            } else {
                assert!(lost == 0 && !finished, "{what}");
            }
            let mut log = self.open();
            assert_eq!((log.durable().entries, self.path("quarantine/2").exists()), (end.entries, false), "{what}");
            if !finished {
                self.agent.tally = end.tally;
                self.append(&mut log, Stream::Stderr, "on");
                assert_eq!(self.open().durable().entries, end.entries + 1, "{what}");
            }
        }

        /// Everything that a reader gets.
        fn read(&self, log: AttemptLog) -> (BTreeMap<u64, Record>, u64) {
            let disk = Arc::new(self.disk.clone());
            let (build, step) = ("b".parse().unwrap(), phonehome_proto::id::StepName::default());
            let files = AttemptFiles::new(disk, build, step, 1, self.path(""));
            drop(Current::new(log, files.clone(), watch::Sender::new(0)));
            let mut reader = AttemptReader::open(files).unwrap();
            let (mut records, mut lost) = (BTreeMap::new(), 0);
            while let Some(found) = reader.next().unwrap() {
                match found {
                    Read::Record(record) => drop(records.insert(record.seq, record)),
                    Read::Lost(count) => lost += count,
                }
            }
            (records, lost)
        }

        fn path(&self, file: &str) -> PathBuf {
            self.dir.path().join("b/main/1").join(file)
        }

        fn bytes(&self, file: &str) -> Vec<u8> {
            fs::read(self.path(file)).unwrap()
        }

        fn names(&self) -> Vec<String> {
            let names = self.disk.list(&self.path("")).unwrap();
            names.into_iter().map(|name| name.into_string().unwrap()).collect()
        }

        fn flip(&self, file: &str, at: usize) {
            let mut bytes = self.bytes(file);
            bytes[at] ^= 1;
            fs::write(self.path(file), bytes).unwrap();
        }

        fn cut(&self, file: &str, len: usize) {
            fs::write(self.path(file), &self.bytes(file)[..len]).unwrap();
        }
    }

    /// The first record of a filled scene that a byte of a file belongs to.
    fn touched(file: &str, at: usize) -> u64 {
        match (file, at) {
            ("index", _) => (at / ENTRY) as u64,
            ("events", _) => 1,
            (_, 0..4) => 0,
            (_, 4..8) => 2,
            _ => 3,
        }
    }
}
