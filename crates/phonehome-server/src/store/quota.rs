//! How much of its output a build may have stored: over all its steps and attempts, also those of earlier processes.
//!
//! Output beyond it is acknowledged and counted like all other, and left out of the files: the build goes on. Its place in
//! the index is taken by one hole up to the next record that is stored; see [`AttemptLog`](super::log::AttemptLog). The
//! end of the attempt is then accepted as incomplete, with the reason.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering},
};

use phonehome_proto::frame::{Finished, FinishedAck, Record};

use super::log::Batch;
use crate::meter::Meter;

/// A build's allowance. Only the store's worker counts, so the order of its operations is the order of the numbers.
#[derive(Debug)]
pub(super) struct Quota {
    limit: u64,
    used: AtomicU64,
    meter: Arc<Meter>,
}

/// What an attempt has of it; nothing to do with it while there is no quota.
#[derive(Debug, Default)]
pub(super) struct Share {
    /// Bytes that this attempt has added.
    counted: u64,
    /// Bytes that were left out since the last hole was written.
    left_out: u64,
    /// Whether anything was left out.
    has_left_out: bool,
}

/// Bytes of events that are stored beyond the limit: all the lifecycle of any real build, and not an agent's flood of
/// them.
const EVENTS: u64 = 16 * 1024 * 1024;

/// Bytes that are left out before it is written down that they are. After a crash the rest is a hole all the same: their
/// agent no longer has them.
const HOLE_EVERY: u64 = 16 * 1024 * 1024;

impl Quota {
    /// What it keeps out is counted by `meter`.
    pub(super) fn new(limit: u64, meter: Arc<Meter>) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicU64::new(0), meter })
    }

    fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether a record is stored when `used` bytes are: while there is anything left. So a quota is exceeded by less
    /// than a record, and once it is used up that stays so.
    fn takes(&self, used: u64, record: &Record) -> bool {
        used < if record.stream.is_output() { self.limit } else { self.limit.saturating_add(EVENTS) }
    }
}

impl Share {
    /// The attempt has so many bytes in its files now.
    pub(super) fn count(&mut self, quota: &OnceLock<Arc<Quota>>, stored: u64) {
        if let Some(quota) = quota.get() {
            let others = quota.used().saturating_sub(self.counted);
            quota.used.store(others.saturating_add(stored), Ordering::Relaxed);
            self.counted = stored;
        }
    }

    /// Takes out of what is to be written what may not be stored. What it leaves, it leaves also the next time.
    pub(super) fn trim(&mut self, quota: &OnceLock<Arc<Quota>>, batches: &mut [Batch]) {
        let Some(quota) = quota.get() else { return };
        let mut used = quota.used();
        for batch in batches {
            batch.records.retain(|record| {
                let (len, takes) = (record.payload.len() as u64, quota.takes(used, record));
                *(if takes { &mut used } else { &mut self.left_out }) += len;
                if !takes {
                    self.has_left_out = true;
                    quota.meter.bytes_over_quota.add(len);
                }
                takes
            });
        }
    }

    /// The answer to the end of an attempt with so much output in its file: when some was left out, it says so.
    pub(super) fn answer(
        &self,
        quota: &OnceLock<Arc<Quota>>,
        finished: &Finished,
        answer: FinishedAck,
        stored: u64,
    ) -> FinishedAck {
        let left_out = finished.counts.output_bytes().saturating_sub(stored);
        let Some(quota) = quota.get().filter(|quota| quota.used() >= quota.limit) else { return answer };
        if left_out == 0 && !self.has_left_out {
            return answer;
        }
        let limit = quota.limit;
        let told = format!("the build's quota of {limit} bytes is used up: {left_out} bytes of output were not stored");
        match answer {
            FinishedAck::Incomplete(why) => FinishedAck::Incomplete(format!("{told}; {why}")),
            FinishedAck::Complete | FinishedAck::Resume(_) => FinishedAck::Incomplete(told),
        }
    }

    /// Whether it is time to write a hole.
    pub(super) fn wants_hole(&self) -> bool {
        self.left_out >= HOLE_EVERY
    }

    pub(super) fn note_hole(&mut self) {
        self.left_out = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::{io, time::Duration};

    use phonehome_env::{Env, Workers};
    use phonehome_proto::{
        frame::Stream,
        id::BuildId,
        limits::MAX_PAYLOAD,
        receiver::{Ending, Receiver},
    };
    use tokio::{sync::watch, time::timeout};

    use crate::{
        store::{
            AttemptFiles, AttemptReader, Durability, Found, Opened, Progress, Store, StoreSettings, Surveyed,
            faulty::{Agent, FaultyDisk, tempdir},
        },
        tasks::Tasks,
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn output_beyond_the_quota_is_a_hole_and_events_are_stored() {
        let mut scene = Scene::new(10).await;
        let mut agent = Agent::new(1);
        let opened = scene.greet(&agent, 0).await;
        for (stream, text) in [
            (Stream::Stdout, "12345"),
            (Stream::Stderr, "678901"),
            (Stream::Stdout, "too much"),
            (Stream::Stdout, "and more"),
            (Stream::Event, "{}"),
            (Stream::Stderr, "again"),
        ] {
            scene.append(&opened, &mut agent, stream, text).await;
        }
        scene.progress(&opened, |progress| progress.next == 6).await;
        assert_eq!(read(&opened.writer.files), ["12345", "678901", "2 lost", "{}"], "all of it is acknowledged");
        let answer = scene.finish(&opened, &agent).await;
        let told = "the build's quota of 10 bytes is used up: 21 bytes of output were not stored";
        assert_eq!(answer, FinishedAck::Incomplete(told.into()));
        assert_eq!(read(&opened.writer.files), ["12345", "678901", "2 lost", "{}", "1 lost"]);
        scene.restart(10).await;
        let found = scene.survey().await.remove(0);
        assert_eq!((found.finished.unwrap().1, read(&found.files).len()), (answer, 5));
        assert!(!found.files.dir.join("quarantine").exists());
    }

    #[tokio::test(start_paused = true)]
    async fn a_build_within_its_quota_is_complete() {
        let scene = Scene::new(8).await;
        let mut agent = Agent::new(1);
        let opened = scene.greet(&agent, 0).await;
        scene.append(&opened, &mut agent, Stream::Stdout, "all of it").await;
        assert_eq!(scene.finish(&opened, &agent).await, FinishedAck::Complete);
    }

    #[tokio::test(start_paused = true)]
    async fn steps_attempts_and_restarts_share_one_quota() {
        let mut scene = Scene::new(20).await;
        let (mut first, mut second) = (Agent::new(1), Agent::new(2));
        let opened = scene.greet(&first, 0).await;
        scene.append(&opened, &mut first, Stream::Stdout, "0123456789").await;
        scene.progress(&opened, |progress| progress.next == 1).await;
        let opened = scene.greet(&second, 0).await;
        scene.append(&opened, &mut second, Stream::Stdout, "abcdefgh").await;
        scene.progress(&opened, |progress| progress.next == 1).await;
        scene.restart(20).await;
        let mut elsewhere = Agent::new(3);
        let mut hello = elsewhere.hello(0);
        hello.step = "other".parse().unwrap();
        let other = scene.store.open_attempt(hello, watch::Sender::new(0)).await.unwrap();
        for text in ["ij", "none of it"] {
            scene.append(&other, &mut elsewhere, Stream::Stdout, text).await;
        }
        let FinishedAck::Incomplete(why) = scene.finish(&other, &elsewhere).await else { panic!("it is complete") };
        assert!(why.contains("10 bytes of output were not stored"), "{why}");
        assert_eq!(read(&other.writer.files), ["ij", "1 lost"]);
        let again = scene.greet(&second, 1).await;
        scene.append(&again, &mut second, Stream::Stdout, "nor this").await;
        scene.progress(&again, |progress| progress.next == 2).await;
        assert_eq!(read(&again.writer.files), ["abcdefgh"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_left_out_before_a_restart_is_a_hole_and_the_reason_is_told() {
        let mut scene = Scene::new(4).await;
        let mut agent = Agent::new(1);
        let opened = scene.greet(&agent, 0).await;
        for text in ["1234", "gone", "gone too"] {
            scene.append(&opened, &mut agent, Stream::Stdout, text).await;
        }
        scene.progress(&opened, |progress| progress.next == 3).await;
        scene.restart(4).await;
        assert_eq!(scene.survey().await[0].files.progress.borrow().next, 1, "no hole was written");
        let opened = scene.greet(&agent, 3).await; // it was told that all of it is durable
        assert_eq!(opened.receiver.next(), 3);
        let FinishedAck::Incomplete(why) = scene.finish(&opened, &agent).await else { panic!("it is complete") };
        assert!(why.contains("quota of 4 bytes is used up: 12 bytes"), "{why}");
        assert_eq!(read(&opened.writer.files), ["1234", "2 lost"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_takeover_writes_the_hole_of_the_older_attempt() {
        let mut scene = Scene::new(0).await;
        let mut agent = Agent::new(1);
        let opened = scene.greet(&agent, 0).await;
        scene.append(&opened, &mut agent, Stream::Stdout, "nothing is stored").await;
        scene.progress(&opened, |progress| progress.next == 1).await;
        scene.greet(&Agent::new(2), 0).await;
        assert_eq!(read(&opened.writer.files), ["1 lost"]);
        scene.restart(0).await;
        assert_eq!(read(&scene.survey().await[0].files), ["1 lost"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_leaves_one_entry_for_every_16_mib() {
        let scene = Scene::new(0).await;
        let mut agent = Agent::new(1);
        let opened = scene.greet(&agent, 0).await;
        let text = "x".repeat(MAX_PAYLOAD);
        let records = 2 * HOLE_EVERY / MAX_PAYLOAD as u64 + 9;
        for _ in 0..records {
            scene.append(&opened, &mut agent, Stream::Stdout, &text).await;
        }
        let entries = scene.progress(&opened, |progress| progress.next == records).await.entries;
        assert!((1..=2).contains(&entries), "{entries}");
        scene.finish(&opened, &agent).await;
        let lost: u64 =
            read(&opened.writer.files).iter().map(|told| told.trim_end_matches(" lost").parse::<u64>().unwrap()).sum();
        assert_eq!(lost, records);
    }

    #[tokio::test(start_paused = true)]
    async fn a_crash_at_any_operation_damages_nothing() {
        for count in 0.. {
            let mut scene = Scene::new(4).await;
            let mut agent = Agent::new(1);
            let opened = scene.greet(&agent, 0).await;
            scene.disk.crash_after(count);
            for (stream, text) in
                [(Stream::Stdout, "1234"), (Stream::Stdout, "gone"), (Stream::Event, "{}"), (Stream::Stdout, "gone")]
            {
                scene.append(&opened, &mut agent, stream, text).await;
            }
            scene.store.finish(&opened.writer, agent.finished(), FinishedAck::Complete).await.unwrap();
            let progress = scene.progress(&opened, |progress| progress.failed || progress.finished.is_some()).await;
            scene.disk.heal();
            scene.restart(4).await;
            let found = scene.survey().await.remove(0);
            assert!(!found.files.dir.join("quarantine").exists(), "after {count} operations");
            assert!(
                ["1234", "1 lost", "{}", "1 lost"].iter().zip(read(&found.files)).all(|(told, read)| *told == read)
            );
            assert!(found.finished.is_some() || progress.finished.is_none(), "after {count} operations");
            if !progress.failed {
                break;
            }
        }
    }

    /// As after an end whose digest is wrong: the last records are sent again, from the middle of the hole.
    #[tokio::test(start_paused = true)]
    async fn a_hole_that_is_taken_back_in_part_is_the_same_hole_again() {
        let mut scene = Scene::new(4).await;
        let mut agent = Agent::new(1);
        let opened = scene.greet(&agent, 0).await;
        scene.append(&opened, &mut agent, Stream::Stdout, "1234").await;
        scene.append(&opened, &mut agent, Stream::Stdout, "gone").await;
        let back = agent.clone();
        scene.append(&opened, &mut agent, Stream::Stdout, "gone").await;
        scene.append(&opened, &mut agent, Stream::Event, "{}").await;
        let told = ["1234", "2 lost", "{}"];
        scene.progress(&opened, |progress| progress.next == 4).await;
        assert_eq!(read(&opened.writer.files), told);
        assert!(scene.store.rewind(&opened.writer, &back.tally).await.unwrap());
        assert_eq!(scene.progress(&opened, |progress| progress.rewinds == 1).await.next, 2);
        agent = back;
        scene.append(&opened, &mut agent, Stream::Stdout, "gone").await;
        scene.append(&opened, &mut agent, Stream::Event, "{}").await;
        scene.finish(&opened, &agent).await;
        assert_eq!(read(&opened.writer.files), told);
        scene.restart(4).await;
        assert_eq!(read(&scene.survey().await[0].files), told);
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_disk_lets_the_hole_and_the_end_through() {
        let scene = Scene::new(0).await;
        let mut agent = Agent::new(1);
        let opened = scene.greet(&agent, 0).await;
        scene.append(&opened, &mut agent, Stream::Stdout, "gone").await;
        let mut room = false;
        scene.disk.fail(move |seen| {
            room |= seen == "truncate reserve";
            (seen.starts_with("write") && !std::mem::take(&mut room)).then_some(io::ErrorKind::StorageFull)
        });
        assert!(matches!(scene.finish(&opened, &agent).await, FinishedAck::Incomplete(_)));
        assert_eq!(read(&opened.writer.files), ["1 lost"]);
    }

    #[tokio::test(start_paused = true)]
    async fn below_low_water_output_waits_while_ends_and_verdicts_are_stored() {
        let mut scene = Scene::new(1000).await;
        scene.open(StoreSettings { durability: Durability::Fsync, min_free: 1000 });
        let (mut agent, mut done) = (Agent::new(1), Agent::new(2));
        let mut hello = done.hello(0);
        hello.step = "done".parse().unwrap();
        let ended = scene.store.open_attempt(hello, watch::Sender::new(0)).await.unwrap();
        scene.append(&ended, &mut done, Stream::Stdout, "before").await;
        scene.progress(&ended, |progress| progress.next == 1).await;
        scene.disk.say_free(999);
        tokio::time::advance(Duration::from_secs(2)).await;
        let opened = scene.greet(&agent, 0).await;
        scene.append(&opened, &mut agent, Stream::Stdout, "waits").await;
        assert_eq!(scene.progress(&opened, |progress| progress.full).await.next, 0);
        assert_eq!(scene.finish(&ended, &done).await, FinishedAck::Complete);
        assert!(scene.store.record_verdict(&"c".parse().unwrap(), b"{}".to_vec()).await.unwrap());
        scene.disk.say_free(10_000);
        let progress = scene.progress(&opened, |progress| progress.next == 1).await;
        assert!(!progress.full && read(&opened.writer.files) == ["waits"]);
    }

    #[tokio::test(start_paused = true)]
    async fn free_room_is_asked_for_once_a_second_or_every_64_mib() {
        let disk = FaultyDisk::new();
        let mut room = crate::store::room::Room::new(Arc::new(disk.clone()), std::path::Path::new("/"));
        room.keep_free(1);
        assert!((0..100).all(|_| room.admits(1000)) && disk.seen().len() == 1);
        assert!(room.admits(64 * 1024 * 1024) && disk.seen().len() == 1);
        tokio::time::advance(Duration::from_secs(1)).await;
        disk.say_free(0);
        assert!(!room.admits(1) && !room.admits(1) && disk.seen().len() == 1);
        assert!(room.admits(0), "what writes nothing needs no room");
    }

    struct Scene {
        dir: tempfile::TempDir,
        disk: FaultyDisk,
        tasks: Tasks,
        store: Store,
    }

    impl Scene {
        async fn new(quota: u64) -> Self {
            let (dir, disk, tasks) = (tempdir(), FaultyDisk::new(), Tasks::default());
            let store = start(&disk, &dir, Durability::Fsync.into(), &tasks);
            store.limit(&build(), quota).await.unwrap();
            Self { dir, disk, tasks, store }
        }

        fn open(&mut self, settings: StoreSettings) {
            self.store = start(&self.disk, &self.dir, settings, &self.tasks);
        }

        /// Another process over the same directory, which takes up what is there.
        async fn restart(&mut self, quota: u64) {
            self.open(Durability::Fsync.into());
            self.store.limit(&build(), quota).await.unwrap();
            self.survey().await;
        }

        async fn survey(&self) -> Vec<Surveyed> {
            self.store.survey(&build(), watch::Sender::new(0)).await.unwrap()
        }

        async fn greet(&self, agent: &Agent, oldest: u64) -> Opened {
            self.store.open_attempt(agent.hello(oldest), watch::Sender::new(0)).await.unwrap()
        }

        async fn append(&self, opened: &Opened, agent: &mut Agent, stream: Stream, text: &str) {
            let record = agent.write(stream, text);
            self.store.append(&opened.writer, vec![record], &agent.tally).await.unwrap();
        }

        async fn finish(&self, opened: &Opened, agent: &Agent) -> FinishedAck {
            // What a connection has received since its hello, the receiver here has not seen.
            let received = opened.receiver.next() == agent.tally.next();
            let mut receiver =
                if received { opened.receiver.clone() } else { Receiver::resume(agent.tally.clone(), 0, None) };
            let Ok(Ending::Accept(answer)) = receiver.handle_finished(agent.finished()) else { panic!("no end") };
            self.store.finish(&opened.writer, agent.finished(), answer).await.unwrap();
            self.progress(opened, |progress| progress.finished.is_some()).await.finished.unwrap().1
        }

        async fn progress(&self, opened: &Opened, is_it: impl FnMut(&Progress) -> bool) -> Progress {
            let mut progress = opened.writer.files.progress.subscribe();
            let found = timeout(Duration::from_secs(30), progress.wait_for(is_it)).await;
            found.expect("it comes to that").unwrap().clone()
        }
    }

    fn start(disk: &FaultyDisk, dir: &tempfile::TempDir, settings: StoreSettings, tasks: &Tasks) -> Store {
        let workers = Workers::Tasks(Arc::new(|| Duration::from_millis(1)));
        let env = Env { disk: Arc::new(disk.clone()), workers, ..Env::real() };
        Store::open(&env, dir.path(), settings, tasks).unwrap()
    }

    fn build() -> BuildId {
        "b".parse().unwrap()
    }

    fn read(files: &Arc<AttemptFiles>) -> Vec<String> {
        let mut reader = AttemptReader::open(files.clone()).unwrap();
        let next = || match reader.next().unwrap()? {
            Found::Lost(count) => Some(format!("{count} lost")),
            Found::Record(record) => Some(String::from_utf8(record.payload.to_vec()).unwrap()),
        };
        std::iter::from_fn(next).collect()
    }
}
