//! Taking up what an earlier process left of an attempt.

use std::{io, path::Path, sync::Arc};

use phonehome_env::disk::Disk;
use tracing::warn;

use super::{
    Durability,
    attempt::{Ended, read_optional},
    log::{AttemptLog, Point, open_all},
    walk::{Walk, What},
};

/// Opens an attempt: every record whose index entry, bytes and checksums agree. What follows the last such record was
/// never acknowledged; it is cut and its size reported.
///
/// Everything stored is read once, which takes as long as the disk needs for the log's size; meanwhile nothing else is
/// stored.
pub(super) fn open(disk: &Arc<dyn Disk>, dir: &Path, durability: Durability) -> io::Result<AttemptLog> {
    let files = open_all(&**disk, dir)?;
    let ended = match read_optional(&**disk, &dir.join("finished.json"))? {
        Some(ended) => Some(serde_json::from_slice::<Ended>(&ended)?),
        None => None,
    };
    let sound = sound(&mut Walk::new(&files)?);
    let mut torn = 0;
    for (file, end) in files.iter().zip(sound.ends()) {
        let len = file.len()?;
        if len > end {
            torn += len - end;
            file.set_len(end)?;
        }
    }
    if torn > 0 {
        warn!(bytes = torn, attempt = %dir.display(), "cut a torn tail that was never acknowledged");
    }
    let finished = ended.map(|ended| (ended.finished, ended.answer));
    Ok(AttemptLog::resume(disk.clone(), dir, durability, sound, finished))
}

/// How far everything is good.
fn sound(walk: &mut Walk<'_>) -> Point {
    loop {
        match walk.next().map(|seen| seen.what) {
            Some(What::Hole | What::Record(_)) => {}
            Some(What::Bad | What::Unreadable) | None => return walk.at().clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use phonehome_env::disk::RealDisk;
    use phonehome_proto::frame::{FinishedAck, Stream};

    use super::*;
    use crate::store::{
        faulty::Agent,
        index::ENTRY,
        log::{Batch, NAMES},
    };

    #[test]
    fn what_was_appended_is_there_after_opening_again() {
        let scene = Scene::filled();
        let log = scene.open();
        assert_eq!((log.durable().tally.next(), log.durable().entries), (4, 4));
        assert_eq!(log.durable().tally.digest().0, *blake3::hash(b"one\ntwo\n3").as_bytes());
        assert_eq!(fs::read(scene.path("log")).unwrap(), b"one\ntwo\n3");
        assert_eq!(fs::read(scene.path("events")).unwrap(), b"{\"event\":\"x\"}\n");
    }

    #[test]
    fn a_file_torn_at_any_byte_is_cut_to_whole_records_and_goes_on() {
        for file in NAMES {
            let whole = Scene::filled().len(file);
            for len in 0..whole {
                let mut scene = Scene::filled();
                File::options().write(true).open(scene.path(file)).unwrap().set_len(len).unwrap();
                let mut log = scene.open();
                let kept = log.durable().tally.next();
                assert!(kept < 4 || file == "index" && len % ENTRY as u64 == 0, "{file} at {len}");
                scene.agent.tally = log.durable().tally.clone();
                scene.append(&mut log, Stream::Stdout, "again");
                assert_eq!(scene.open().durable().tally.next(), kept + 1, "{file} at {len}");
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
        agent: Agent,
    }

    impl Scene {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap(), agent: Agent::new(1) }
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

        fn create(&self) -> AttemptLog {
            AttemptLog::create(Arc::new(RealDisk), self.dir.path(), &self.agent.owner(), Durability::Os).unwrap()
        }

        fn open(&self) -> AttemptLog {
            let disk: Arc<dyn Disk> = Arc::new(RealDisk);
            open(&disk, self.dir.path(), Durability::Os).unwrap()
        }

        fn append(&mut self, log: &mut AttemptLog, stream: Stream, text: &str) {
            let records = vec![self.agent.write(stream, text)];
            log.append(&[Batch { records, tally: Box::new(self.agent.tally.clone()) }]).unwrap();
            log.sync().unwrap();
        }

        fn path(&self, file: &str) -> std::path::PathBuf {
            self.dir.path().join(file)
        }

        fn len(&self, file: &str) -> u64 {
            fs::metadata(self.path(file)).unwrap().len()
        }
    }
}
