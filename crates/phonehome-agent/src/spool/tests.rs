//! A spool between a command that writes and a server that comes and goes, on a disk that fails on demand. Time is paused.

use std::{
    ffi::OsString,
    fs,
    io::IoSlice,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize},
    },
};

use bytes::BytesMut;
use phonehome_env::{
    Workers,
    disk::{Disk, File, Open, RealDisk},
};
use phonehome_proto::{
    codec::binary::{HEADROOM, decode_agent, encode_agent, seal},
    frame::{Ack, AgentFrame, Counts, Durable, End, FinishedAck, Record, ServerFrame, Stream, Welcome},
    id::{Digest, ProducerId},
    limits::WINDOW,
    sender::Outgoing,
};
use tempfile::TempDir;
use tokio::time::sleep;

use super::*;

#[tokio::test(start_paused = true)]
async fn what_memory_has_no_room_for_goes_to_disk_and_comes_back_in_order() {
    let bench = Bench::new(LIMIT).await;
    bench.write(0..400).await;
    assert!(bench.bytes() > 300 * LEN as u64, "{} bytes on disk", bench.bytes());
    bench.outbox.finish(finished(400));
    let mut server = Server::default();
    server.take_all(&bench.outbox).await;
    server.assert_has(0..400);
    assert_eq!(server.holes, []);
    bench.leave().await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_that_is_confirmed_in_time() {
    let bench = Bench::new(LIMIT).await;
    let mut server = Server::default();
    server.connect(&bench.outbox);
    for seq in 0..50 {
        bench.write(seq..seq + 1).await;
        sleep(PATIENCE / 2).await;
        server.take(&bench.outbox);
    }
    bench.write(50..51).await;
    assert_eq!(bench.disk.writes.load(Ordering::Relaxed), 0);
    sleep(2 * PATIENCE).await;
    assert!(bench.disk.writes.load(Ordering::Relaxed) > 0, "nobody has confirmed the last");
}

#[tokio::test(start_paused = true)]
async fn reading_and_writing_take_turns_while_the_network_comes_and_goes() {
    let bench = Bench::new(LIMIT).await;
    let mut server = Server::default();
    for round in 0..20 {
        bench.write(40 * round..40 * (round + 1)).await;
        server.connect(&bench.outbox);
        for _ in 0..round {
            sleep(Duration::from_millis(3)).await;
            server.take(&bench.outbox);
            bench.check_memory();
        }
        bench.outbox.with(Sender::handle_disconnected);
    }
    bench.outbox.finish(finished(800));
    server.take_all(&bench.outbox).await;
    server.assert_has(0..800);
    bench.leave().await;
}

#[tokio::test(start_paused = true)]
async fn the_limit_is_kept_and_what_is_delivered_makes_room() {
    let limit = 1 << 20;
    let bench = Bench::new(limit).await;
    let mut next = 0;
    while bench.outbox.is_relieved() || bench.outbox.has_room() {
        if bench.outbox.has_room() {
            bench.outbox.push(record(next));
            next += 1;
        }
        sleep(Duration::from_millis(5)).await;
        assert!(bench.bytes() <= limit, "{} bytes", bench.bytes());
    }
    assert!(bench.bytes() > limit - 2 * LEN as u64, "only {} bytes", bench.bytes());
    assert!(timeout(Duration::from_secs(60), bench.outbox.room()).await.is_err(), "everything is full");
    assert!(Arc::strong_count(&bench.disk.files) <= 4, "{} files are open", Arc::strong_count(&bench.disk.files) - 1);
    let mut server = Server::default();
    server.connect(&bench.outbox);
    for seq in next..next + 200 {
        while timeout(Duration::from_millis(50), bench.outbox.room()).await.is_err() {
            server.take(&bench.outbox);
            assert!(bench.bytes() <= limit, "{} bytes", bench.bytes());
        }
        bench.outbox.push(record(seq));
    }
    bench.outbox.finish(finished(next + 200));
    server.take_all(&bench.outbox).await;
    server.assert_has(0..next + 200);
    bench.leave().await;
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_is_full_from_the_start_is_tried_again() {
    let bench = Bench::new(LIMIT).await;
    bench.disk.full.store(true, Ordering::Relaxed);
    bench.fill(0).await;
    let full = bench.outbox.look(Sender::next);
    assert!(!bench.outbox.is_relieved() && bench.bytes() == 0);
    sleep(10 * RETRY).await;
    let tried = bench.disk.writes.load(Ordering::Relaxed);
    assert!((1..=12).contains(&tried), "tried {tried} times in 50 s");
    bench.disk.full.store(false, Ordering::Relaxed);
    bench.write(full..100).await;
    bench.outbox.finish(finished(100));
    let mut server = Server::default();
    server.take_all(&bench.outbox).await;
    server.assert_has(0..100);
    bench.leave().await;
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_gets_full_and_has_room_again_loses_nothing() {
    let bench = Bench::new(LIMIT).await;
    bench.write(0..60).await;
    bench.disk.full.store(true, Ordering::Relaxed);
    bench.fill(60).await;
    let mut next = bench.outbox.look(Sender::next);
    let mut server = Server::default();
    server.connect(&bench.outbox);
    for _ in 0..30 {
        sleep(Duration::from_millis(20)).await;
        server.take(&bench.outbox);
        bench.check_memory();
    }
    assert!(server.records.len() > 40, "what is on disk is delivered although nothing can be written");
    bench.outbox.with(Sender::handle_disconnected);
    bench.disk.full.store(false, Ordering::Relaxed);
    bench.write(next..next + 60).await;
    next += 60;
    bench.outbox.finish(finished(next));
    server.take_all(&bench.outbox).await;
    server.assert_has(0..next);
    bench.leave().await;
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_fails_is_not_written_to_again_but_read() {
    let bench = Bench::new(LIMIT).await;
    bench.write(0..60).await;
    bench.disk.broken.store(true, Ordering::Relaxed);
    bench.fill(60).await;
    let (next, writes) = (bench.outbox.look(Sender::next), bench.disk.writes.load(Ordering::Relaxed));
    bench.disk.broken.store(false, Ordering::Relaxed);
    sleep(10 * RETRY).await;
    assert_eq!(bench.disk.writes.load(Ordering::Relaxed), writes);
    bench.outbox.finish(finished(next));
    let mut server = Server::default();
    server.take_all(&bench.outbox).await;
    server.assert_has(0..next);
    bench.leave().await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_is_told_as_a_hole_and_what_follows_is_delivered() {
    let bench = Bench::new(4 << 20).await;
    bench.write(0..100).await;
    bench.outbox.finish(finished(100));
    sleep(2 * PATIENCE).await;
    *bench.disk.unreadable.lock().unwrap() = "00000000000000000000.records".into();
    let mut server = Server::default();
    server.connect(&bench.outbox);
    let reads = || bench.disk.reads.load(Ordering::Relaxed);
    let before = reads();
    sleep(Duration::from_secs(60)).await;
    assert!(reads() - before < 10, "{} reads of what cannot be read, while nothing is acknowledged", reads() - before);
    while !bench.outbox.take_stale() {
        server.take(&bench.outbox);
        sleep(Duration::from_millis(100)).await;
    }
    bench.outbox.with(Sender::handle_disconnected);
    server.take_all(&bench.outbox).await;
    let [hole] = &server.holes[..] else { panic!("{:?}", server.holes) };
    assert!(hole.start > 10 && hole.end < 40, "{hole:?}");
    assert_eq!(server.seqs(), (0..100).filter(|seq| !hole.contains(seq)).collect::<Vec<_>>(), "{hole:?}");
    bench.leave().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_not_delivered_is_left_to_the_next_agent() {
    let bench = Bench::new(LIMIT).await;
    bench.write(0..100).await;
    bench.outbox.finish(finished(100));
    let (dir, disk) = bench.leave_behind().await;
    let (left, place) = next_agent(&dir, &disk).await;
    let [left] = <[Left; 1]>::try_from(left).unwrap();
    assert_eq!((left.records, left.finished, left.producer), (100, true, ProducerId([1; 16])));
    let (outbox, spooling) = left.start();
    let mut server = Server::default();
    server.take_all(&outbox).await;
    server.assert_has(0..100);
    spooling.leave().await;
    place.tidy().await;
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_the_server_has_already_of_what_was_left_is_not_sent() {
    let bench = Bench::new(LIMIT).await;
    bench.write(0..100).await;
    let (dir, disk) = bench.leave_behind().await;
    for stored in [50, 100, 120] {
        let (left, _) = next_agent(&dir, &disk).await;
        let (outbox, spooling) = left.into_iter().next().unwrap().start();
        let mut server = Server { next: stored, ..Server::default() };
        server.connect(&outbox);
        while outbox.look(|sender| sender.oldest() < sender.next()) {
            server.take(&outbox);
            sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(server.seqs(), (stored..100).collect::<Vec<_>>());
        spooling.leave().await;
        if stored == 50 {
            assert!(next_agent(&dir, &disk).await.0.is_empty(), "all was delivered");
            let bench = Bench::in_dir(LIMIT, &dir, disk.clone()).await;
            bench.write(0..100).await;
            bench.spooling.leave().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_left_to_say_so_is_as_good_as_being_told_to_leave() {
    let bench = Bench::new(LIMIT).await;
    bench.write(0..20).await;
    let Spooling { task, leave } = bench.spooling;
    drop(leave);
    timeout(Duration::from_secs(5), task).await.unwrap().unwrap();
    let (left, _) = next_agent(&bench.dir, &bench.disk).await;
    assert_eq!(left[0].records, 20);
}

#[tokio::test(start_paused = true)]
async fn abandoned_with_records_on_disk_it_leaves_nothing() {
    let bench = Bench::new(LIMIT).await;
    bench.write(0..100).await;
    bench.outbox.abandon();
    bench.leave().await;
}

#[tokio::test(start_paused = true)]
async fn foreign_names_make_the_place_unusable_and_are_not_touched() {
    let bench = Bench::new(LIMIT).await;
    bench.write(0..100).await;
    let (dir, disk) = bench.leave_behind().await;
    let step = dir.path().join(format!("phonehome-{}/b/main", rustix::process::geteuid().as_raw()));
    let foreign = step.join("5-notes");
    fs::write(&foreign, "precious").unwrap();
    let env = env(&disk);
    let refused = Place::open(&env, dir.path(), (&hello().build, &hello().step), LIMIT).await.unwrap_err();
    assert!(refused.to_string().contains(&format!("{} does not belong there", foreign.display())), "{refused}");
    assert_eq!(fs::read(foreign).unwrap(), b"precious");
}

const LEN: usize = 20_000;
const MEMORY: u64 = 512 * 1024;
const LIMIT: u64 = 1 << 30;

fn record(seq: u64) -> Sealed {
    let mut block = BytesMut::zeroed(HEADROOM + LEN);
    block[HEADROOM..].fill(seq as u8);
    seal(block, seq, seq, Stream::Stdout, LEN as u64 * seq)
}

fn finished(next: u64) -> Finished {
    Finished { next, counts: Counts::default(), digest: Digest([0; 32]), end: End::Exited(0), time: 0, usage: None }
}

fn hello() -> Hello {
    Hello {
        build: "b".parse().unwrap(),
        step: "main".parse().unwrap(),
        producer: ProducerId([1; 16]),
        oldest: 0,
        next: 0,
        labels: std::collections::BTreeMap::new(),
        agent: "test".into(),
        capabilities: Vec::new(),
    }
}

/// A machine whose disk is `disk` and takes a moment.
fn env(disk: &Arc<FaultyDisk>) -> Env {
    Env { disk: disk.clone(), workers: Workers::Tasks(Arc::new(|| Duration::from_millis(1))), ..Env::real() }
}

/// What the next agent of the step finds, and where its own goes.
async fn next_agent(dir: &TempDir, disk: &Arc<FaultyDisk>) -> (Vec<Left>, Place) {
    let env = env(disk);
    let (place, found) = Place::open(&env, dir.path(), (&hello().build, &hello().step), LIMIT).await.unwrap();
    (place.take_up(found, MEMORY).await, place)
}

/// An attempt with its spool.
struct Bench {
    dir: TempDir,
    disk: Arc<FaultyDisk>,
    outbox: Arc<Outbox>,
    place: Place,
    spooling: Spooling,
}

impl Bench {
    async fn new(limit: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(FaultyDisk::default());
        Self::in_dir(limit, &dir, disk).await.with_dir(dir)
    }

    fn with_dir(self, dir: TempDir) -> Self {
        Self { dir, ..self }
    }

    /// The directory of somebody else, who keeps it.
    async fn in_dir(limit: u64, dir: &TempDir, disk: Arc<FaultyDisk>) -> Self {
        let step = (&hello().build, &hello().step);
        let (place, found) = Place::open(&env(&disk), dir.path(), step, limit).await.unwrap();
        assert!(found.is_empty());
        let outbox = Arc::new(Outbox::new(MEMORY));
        let spooling = place.start(outbox.clone(), hello());
        Self { dir: tempfile::tempdir().unwrap(), disk, outbox, place, spooling }
    }

    /// Pushes records as a command that waits for room.
    async fn write(&self, seqs: std::ops::Range<u64>) {
        for seq in seqs {
            timeout(Duration::from_secs(60), self.outbox.room()).await.unwrap();
            self.outbox.push(record(seq));
            self.check_memory();
        }
    }

    /// Pushes records until there is no room any more.
    async fn fill(&self, first: u64) {
        let mut seq = first;
        while timeout(Duration::from_secs(1), self.outbox.room()).await.is_ok() {
            self.outbox.push(record(seq));
            seq += 1;
        }
    }

    fn check_memory(&self) {
        let cost = self.outbox.look(Sender::cost);
        assert!(cost <= MEMORY + LEN as u64 + RECORD_COST, "{cost} bytes in memory");
    }

    /// Bytes of all files of records.
    fn bytes(&self) -> u64 {
        size(self.dir.path())
    }

    /// Ends the spool of an attempt that is over; nothing may be left of it.
    async fn leave(self) {
        self.spooling.leave().await;
        self.place.tidy().await;
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), 0);
    }

    /// Ends the spool of an attempt that is not delivered.
    async fn leave_behind(self) -> (TempDir, Arc<FaultyDisk>) {
        self.spooling.leave().await;
        self.place.tidy().await;
        (self.dir, self.disk)
    }
}

fn size(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    let sizes = entries.map(|entry| match entry.metadata().unwrap() {
        found if found.is_dir() => size(&entry.path()),
        found if entry.path().extension().is_some_and(|extension| extension == "records") => found.len(),
        _ => 0,
    });
    sizes.sum()
}

/// A server that takes what an outbox sends.
#[derive(Default)]
struct Server {
    next: u64,
    records: Vec<Record>,
    holes: Vec<std::ops::Range<u64>>,
}

impl Server {
    fn connect(&mut self, outbox: &Outbox) {
        outbox.take_stale();
        outbox.with(|sender| {
            assert!(sender.claimed_next() >= self.next);
            sender.handle_connected();
            if sender.oldest() > self.next {
                self.holes.push(self.next..sender.oldest());
                self.next = sender.oldest();
            }
            let welcome = Welcome {
                attempt: 1,
                next: self.next,
                durable: Durable::Memory,
                window: WINDOW,
                heartbeat: 0,
                max_payload: 0,
                max_message: 0,
                cancel: None,
                server: String::new(),
                capabilities: Vec::new(),
            };
            sender.handle_frame(ServerFrame::Welcome(welcome)).unwrap();
        });
    }

    /// Takes what is sent at this moment and confirms it. Says whether the end was among it.
    fn take(&mut self, outbox: &Outbox) -> bool {
        let mut is_finished = false;
        while let Some(outgoing) = outbox.with(Sender::poll_transmit) {
            let message = match outgoing {
                Outgoing::Message(message) => message,
                Outgoing::Frame(frame) => encode_agent(&frame).unwrap(),
            };
            match decode_agent(&message).unwrap() {
                AgentFrame::Records(records) => {
                    for record in records {
                        assert_eq!(record.seq, self.next);
                        self.next += 1;
                        self.records.push(record);
                    }
                }
                AgentFrame::Finished(finished) => {
                    assert_eq!(finished.next, self.next);
                    is_finished = true;
                }
                AgentFrame::Hello(_) | AgentFrame::Pong(_) => unreachable!("never polled"),
            }
        }
        let next = self.next;
        outbox.with(|sender| {
            sender.handle_frame(ServerFrame::Ack(Ack { next, window: WINDOW })).unwrap();
            if is_finished {
                sender.handle_frame(ServerFrame::FinishedAck(FinishedAck::Complete)).unwrap();
            }
        });
        is_finished
    }

    /// Connects and takes everything up to the end.
    async fn take_all(&mut self, outbox: &Outbox) {
        self.connect(outbox);
        let all = async {
            while !self.take(outbox) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(600), all).await.unwrap();
    }

    fn seqs(&self) -> Vec<u64> {
        self.records.iter().map(|record| record.seq).collect()
    }

    fn assert_has(&self, seqs: std::ops::Range<u64>) {
        assert_eq!(self.seqs(), seqs.collect::<Vec<_>>());
        assert!(self.records.iter().all(|found| *found == record(found.seq).record));
    }
}

/// The system's files, with faults.
#[derive(Debug, Default)]
struct FaultyDisk {
    full: Arc<AtomicBool>,
    broken: Arc<AtomicBool>,
    /// The name of the file that cannot be read.
    unreadable: Arc<Mutex<OsString>>,
    writes: Arc<AtomicUsize>,
    reads: Arc<AtomicUsize>,
    /// Counts open files.
    files: Arc<()>,
}

#[derive(Debug)]
struct FaultyFile {
    file: Box<dyn File>,
    full: Arc<AtomicBool>,
    broken: Arc<AtomicBool>,
    name: OsString,
    unreadable: Arc<Mutex<OsString>>,
    writes: Arc<AtomicUsize>,
    reads: Arc<AtomicUsize>,
    _open: Arc<()>,
}

impl Disk for FaultyDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn File>> {
        let file = RealDisk.open(path, how)?;
        let (full, broken, unreadable) = (self.full.clone(), self.broken.clone(), self.unreadable.clone());
        let (writes, reads) = (self.writes.clone(), self.reads.clone());
        let name = path.file_name().unwrap().to_owned();
        Ok(Box::new(FaultyFile { file, name, full, broken, unreadable, writes, reads, _open: self.files.clone() }))
    }

    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dirs(path)
    }

    fn private_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.private_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        RealDisk.list(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.sync_dir(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        RealDisk.exists(path)
    }
}

impl File for FaultyFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if *self.unreadable.lock().unwrap() == self.name {
            return Err(io::Error::other("cannot read"));
        }
        self.file.read_at(buffer, position)
    }

    fn write_at(&self, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        if self.broken.load(Ordering::Relaxed) {
            return Err(io::Error::other("cannot write"));
        }
        if self.full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write_at(slices, position)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn lock(&self) -> io::Result<bool> {
        self.file.lock()
    }
}
