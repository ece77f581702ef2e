//! Whether what is stored of an ended build is what was promised.

use std::io;

use phonehome_proto::{
    frame::{Counts, Finished, FinishedAck},
    id::{Attempt, Digest, StepName},
    tally::Tally,
};

use super::{
    archive::{Archived, ArchivedAttempt},
    index::ENTRY,
    log::NAMES,
    walk::{Walk, What},
};

/// What was found out about an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VerifiedAttempt {
    pub(crate) step: StepName,
    pub(crate) attempt: Attempt,
    /// Of the output bytes that are stored and good.
    pub(crate) stored: Digest,
    /// What FINISHED says it is; `None` without one.
    pub(crate) promised: Option<Digest>,
    /// Good records and their bytes, per stream.
    pub(crate) counts: Counts,
    /// What is wrong first, in words; `None` when nothing is.
    pub(crate) problem: Option<String>,
}

/// How many index entries of all attempts pass between two calls of `progress`.
const INTERVAL: u64 = 1024;

/// Reads everything that is stored of a build, and compares it with its checksums and with what its agents promised at
/// their ends. `progress` hears how many index entries of how many were read. Blocks for as long as the disk needs.
///
/// # Errors
///
/// When a file cannot be opened. One that cannot be read is a problem of its attempt.
pub(crate) fn verify(build: &Archived, progress: &mut dyn FnMut(u64, u64)) -> io::Result<Vec<VerifiedAttempt>> {
    let total = build.attempts.iter().map(|attempt| attempt.files.progress.borrow().entries).sum();
    let mut done = 0;
    let mut count = || {
        done += 1;
        if done % INTERVAL == 0 || done == total {
            progress(done, total);
        }
    };
    build.attempts.iter().map(|attempt| verify_attempt(attempt, &mut count)).collect()
}

fn verify_attempt(attempt: &ArchivedAttempt, count: &mut dyn FnMut()) -> io::Result<VerifiedAttempt> {
    let (files, entries) = (&attempt.files, attempt.files.progress.borrow().entries);
    let [log, events, index] = NAMES.map(|name| files.open(name));
    let open = [log?, events?, index?];
    let mut walk = Walk::new(&open)?;
    let mut problem = None;
    for entry in 0..entries {
        let told = match walk.next().map(|seen| seen.what) {
            Some(What::Hole | What::Record(_)) => None,
            Some(What::Bad) => Some(format!("entry {entry} of the index, or the record it is of, is damaged")),
            Some(What::Unreadable) => {
                Some(format!("entry {entry} of the index, or the record it is of, cannot be read"))
            }
            None => Some(format!("the index ends behind {} bytes, its end is gone", entry * ENTRY as u64)),
        };
        problem = problem.or(told);
        count();
    }
    let stored = &walk.at().tally;
    let end = attempt.finished.as_ref();
    let problem = problem.or_else(|| if attempt.is_end_damaged { Some(DAMAGED_END.into()) } else { None });
    Ok(VerifiedAttempt {
        step: files.step.clone(),
        attempt: files.attempt,
        stored: stored.digest(),
        promised: end.map(|(finished, _)| finished.digest),
        counts: stored.counts(),
        problem: problem.or_else(|| end.and_then(|(finished, answer)| compare(finished, answer, stored))),
    })
}

const DAMAGED_END: &str = "finished.json cannot be understood, so nobody knows what was promised";

/// What of the promise does not hold. A log that was accepted as incomplete keeps its reason in the story.
fn compare(finished: &Finished, answer: &FinishedAck, stored: &Tally) -> Option<String> {
    let (promised, counts) = (&finished.counts, stored.counts());
    let streams = [
        ("stdout", promised.stdout, counts.stdout),
        ("stderr", promised.stderr, counts.stderr),
        ("event", promised.event, counts.event),
    ];
    let differs = streams.into_iter().find(|(_, promised, stored)| promised != stored);
    let told = match differs {
        Some((stream, promised, stored)) => format!(
            "{stream} has {} records with {} bytes, where {} with {} were promised",
            stored.records, stored.bytes, promised.records, promised.bytes
        ),
        None if finished.digest != stored.digest() => {
            "the digest of the output is not the one that was promised".into()
        }
        None if finished.next != stored.next() => {
            format!("the last record is not {}, as was promised", finished.next.saturating_sub(1))
        }
        None => return None,
    };
    Some(match answer {
        FinishedAck::Incomplete(why) => format!("{told}; the log was accepted as incomplete: {why}"),
        FinishedAck::Complete | FinishedAck::Resume(_) => told,
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf, sync::Arc};

    use phonehome_env::disk::{Disk, RealDisk};
    use phonehome_proto::frame::Stream;

    use super::*;
    use crate::store::{
        Durability, archive,
        faulty::{Agent, tempdir},
        log::{AttemptLog, Batch},
        seal::seal,
    };

    #[test]
    fn what_is_stored_as_promised_has_no_problem_plain_or_sealed() {
        let scene = Scene::finished(FinishedAck::Complete);
        for sealed in [false, true] {
            if sealed {
                seal(&RealDisk, &scene.path(""), &mut |_, _| {}).unwrap();
            }
            let mut told = Vec::new();
            let found = scene.verify(&mut |done, total| told.push((done, total)));
            assert_eq!((found.problem, told.as_slice()), (None, &[(3, 3)][..]));
            assert_eq!(found.promised, Some(found.stored));
            assert_eq!(found.stored.0, *blake3::hash(b"one\ntwo\n").as_bytes());
            assert_eq!((found.counts.stdout.bytes, found.counts.stderr.bytes, found.counts.event.records), (4, 4, 1));
        }
    }

    #[test]
    fn any_changed_byte_is_found() {
        for name in NAMES {
            let scene = Scene::finished(FinishedAck::Complete);
            let good = fs::read(scene.path(name)).unwrap();
            for at in 0..good.len() {
                if (name, at) == ("events", good.len() - 1) {
                    continue; // the newline belongs to no record
                }
                let mut bytes = good.clone();
                bytes[at] ^= 1;
                fs::write(scene.path(name), bytes).unwrap();
                let problem = scene.verify(&mut |_, _| {}).problem.expect("it is found");
                assert!(problem.contains("damaged"), "{name} at {at}: {problem}");
            }
            fs::write(scene.path(name), good).unwrap();
            assert_eq!(scene.verify(&mut |_, _| {}).problem, None);
        }
    }

    #[test]
    fn what_is_cut_off_is_missed() {
        let scene = Scene::finished(FinishedAck::Complete);
        let index = fs::read(scene.path("index")).unwrap();
        fs::write(scene.path("index"), &index[..2 * ENTRY]).unwrap();
        let problem = scene.verify(&mut |_, _| {}).problem.unwrap();
        assert!(problem.contains("its end is gone"), "{problem}");
    }

    #[test]
    fn a_promise_that_does_not_hold_is_said_in_words() {
        for (from, to, told) in [
            ("\"bytes\": 4", "\"bytes\": 5", "stdout has 1 records with 4 bytes, where 1 with 5 were promised"),
            ("\"next\": 3", "\"next\": 9", "its end is gone"),
            ("{", "!", "cannot be understood"),
        ] {
            let scene = Scene::finished(FinishedAck::Incomplete("a hole".into()));
            let text = fs::read_to_string(scene.path("finished.json")).unwrap();
            assert!(text.contains(from), "{text}");
            fs::write(scene.path("finished.json"), text.replacen(from, to, 1)).unwrap();
            let problem = scene.verify(&mut |_, _| {}).problem.unwrap();
            assert!(problem.contains(told), "{problem}");
            assert_eq!(problem.contains("accepted as incomplete: a hole"), from.contains("bytes"), "{problem}");
        }
    }

    #[test]
    fn other_output_of_the_same_length_is_not_what_was_promised() {
        let scene = Scene::new(|agent| {
            let mut finished = agent.finished();
            finished.digest = Tally::default().digest();
            Some((finished, FinishedAck::Complete))
        });
        assert!(scene.verify(&mut |_, _| {}).problem.unwrap().contains("digest"));
    }

    #[test]
    fn without_an_end_the_records_are_checked_only() {
        let scene = Scene::new(|_| None);
        let found = scene.verify(&mut |_, _| {});
        assert_eq!((found.problem, found.promised), (None, None));
        fs::write(scene.path("log"), b"one\ntwO\n").unwrap();
        assert!(scene.verify(&mut |_, _| {}).problem.is_some());
    }

    struct Scene(tempfile::TempDir);

    impl Scene {
        fn finished(answer: FinishedAck) -> Self {
            Self::new(|agent| Some((agent.finished(), answer)))
        }

        fn new(end: impl FnOnce(&Agent) -> Option<(Finished, FinishedAck)>) -> Self {
            let (scene, mut agent) = (Self(tempdir()), Agent::new(1));
            let disk = Arc::new(RealDisk);
            let mut log = AttemptLog::create(disk, &scene.path(""), &agent.owner(), Durability::Os).unwrap();
            let records = vec![
                agent.write(Stream::Stdout, "one\n"),
                agent.write(Stream::Event, r#"{"event":"x"}"#),
                agent.write(Stream::Stderr, "two\n"),
            ];
            log.append(&[Batch { records, tally: agent.tally.clone() }]).and_then(|()| log.sync()).unwrap();
            if let Some((finished, answer)) = end(&agent) {
                log.finish(finished, answer).unwrap();
            }
            scene
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join("builds/b/main/1").join(name)
        }

        fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> VerifiedAttempt {
            let disk: Arc<dyn Disk> = Arc::new(RealDisk);
            let build = archive::load(&disk, self.0.path(), &"b".parse().unwrap()).unwrap().unwrap();
            verify(&build, progress).unwrap().remove(0)
        }
    }
}
