//! What became of a stored attempt's files on a bad disk: bytes changed, cut off, moved, gone. Whatever it is, the attempt
//! opens; what is read was stored once, in that order; what is missing is counted, or is the end of a log that was torn
//! off; what was found damaged is kept; opening again changes nothing; and the agent can go on.

#![no_main]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use phonehome_env::disk::Disk;
use phonehome_fuzz::{
    Input,
    disk::{Contents, MemoryDisk},
    memory::Meter,
};
use phonehome_proto::{
    frame::{End, Finished, FinishedAck, Hello, Record, Stream},
    id::{BuildId, ProducerId, StepName},
    tally::Tally,
};
use phonehome_server::fuzzing::{ENTRY, Stored, StoredItem, decode_entry, entry_of, entry_of_lost, store, survey};

#[global_allocator]
static MEMORY: Meter = Meter::new();

/// Most memory that opening takes, bytes: a record, what is gathered of a new log (see `GATHER` in `quarantine.rs`), and
/// all that is read here.
const BOUND: usize = 4 * 1024 * 1024;

const DATA: &str = "/data";
const DIR: &str = "/data/builds/b/main/1";
const NAMES: [&str; 5] = ["index", "log", "events", "finished.json", "attempt.json"];

fuzz_target!(|input: &[u8]| {
    let mut input = Input::new(input);
    let scene = Scene::store(&mut input);
    let before = scene.files();
    while !input.is_empty() {
        scene.edit(&mut input);
    }
    let found = scene.files();
    let (first, memory) = MEMORY.measure(|| scene.survey());
    assert!(memory <= BOUND, "{memory} bytes to open {} bytes", found.values().map(Vec::len).sum::<usize>());
    let after = scene.disk.contents();
    assert_eq!(scene.survey(), first, "opened again it is another");
    assert_eq!(scene.disk.contents(), after, "opening again changes the files");
    let is_honest = found.get("index").is_none_or(|index| scene.is_honest(index));
    match first.as_slice() {
        [] => assert!(!found.contains_key("attempt.json") && found.get("index").is_none_or(Vec::is_empty)),
        [stored] => scene.check(stored, is_honest, &before, &found, &after),
        _ => panic!("one attempt has become {}", first.len()),
    }
    if let ([stored], true) = (first.as_slice(), is_honest) {
        scene.go_on(stored);
    }
});

/// A stored attempt.
struct Scene {
    disk: MemoryDisk,
    hello: Hello,
    rounds: Vec<Vec<Record>>,
    /// By number.
    records: BTreeMap<u64, Record>,
    finished: Option<Finished>,
    /// The index as it was written.
    index: Vec<u8>,
}

impl Scene {
    /// Up to 16 records in rounds, perhaps a hole before them, perhaps the end.
    fn store(input: &mut Input<'_>) -> Self {
        let (shape, count) = (input.byte(), 1 + input.below(16));
        let oldest = if shape & 1 == 0 { 0 } else { u64::from(shape >> 4) };
        let mut tally = Tally::default();
        if oldest > 0 {
            tally.skip_to(oldest);
        }
        let mut rounds = vec![Vec::new()];
        for _ in 0..count {
            let choice = input.byte();
            let stream = [Stream::Stdout, Stream::Stdout, Stream::Stderr, Stream::Event][usize::from(choice & 3)];
            let len = [0, 1, 2, 9, 30, 200, 3000, 20_000][usize::from(choice >> 2 & 7)];
            let payload: Vec<u8> = (0..len).map(|at| (tally.next() as usize * 31 + at * 7) as u8 | 1).collect();
            let record = Record::new(tally.next(), 5, stream, tally.offset(stream), payload.into());
            tally.add(&record);
            rounds.last_mut().expect("there is one").push(record);
            if choice & 64 == 0 {
                rounds.push(Vec::new());
            }
        }
        rounds.retain(|round| !round.is_empty());
        let (next, counts, digest) = (tally.next(), tally.counts(), tally.digest());
        let finished = Finished { next, counts, digest, end: End::Exited(0), time: 1, usage: None };
        let mut scene = Self {
            disk: MemoryDisk::default(),
            hello: Hello {
                build: build(),
                step: StepName::default(),
                producer: ProducerId([7; 16]),
                oldest,
                next,
                labels: BTreeMap::from([("label".into(), "value".into())]),
                agent: "agent".into(),
                capabilities: Vec::new(),
            },
            records: rounds.iter().flatten().map(|record| (record.seq, record.clone())).collect(),
            rounds,
            finished: (shape & 2 == 2).then_some(finished),
            index: Vec::new(),
        };
        store(&scene.disk(), Path::new(DATA), &scene.hello, &scene.rounds, scene.finished.as_ref())
            .expect("it can be stored");
        scene.index = scene.files()["index"].clone();
        scene
    }

    fn disk(&self) -> Arc<dyn Disk> {
        Arc::new(self.disk.clone())
    }

    fn survey(&self) -> Vec<Stored> {
        survey(&self.disk(), Path::new(DATA), &build()).expect("nothing is wrong with this disk")
    }

    /// The attempt's files, by name.
    fn files(&self) -> BTreeMap<&'static str, Vec<u8>> {
        let all = self.disk.contents();
        NAMES.into_iter().filter_map(|name| Some((name, all.get(&path(name))?.clone()))).collect()
    }

    fn edit(&self, input: &mut Input<'_>) {
        let choice = input.byte();
        let name = NAMES[usize::from(choice & 7) % NAMES.len()];
        let mut bytes = self.files().remove(name).unwrap_or_default();
        if choice >> 3 == 0 {
            return self.disk.take(&path(name));
        }
        edit(choice >> 3, &mut bytes, input);
        bytes.truncate(64 * 1024);
        self.disk.put(&path(name), bytes);
    }

    /// Whether every entry that can be read was written by the store.
    fn is_honest(&self, index: &[u8]) -> bool {
        let written: BTreeSet<_> = self.index.chunks_exact(ENTRY).collect();
        index.chunks_exact(ENTRY).all(|entry| decode(entry).is_none() || written.contains(entry))
    }

    /// Everything below this was acknowledged, and the index still says so where it said so before.
    fn acknowledged(&self, index: &[u8]) -> u64 {
        let same = self.index.chunks_exact(ENTRY).zip(index.chunks_exact(ENTRY)).filter(|(was, is)| was == is);
        same.filter_map(|(_, entry)| decode(entry).filter(|(_, first)| *first).map(|(seq, _)| seq)).max().unwrap_or(0)
    }

    fn check(
        &self,
        stored: &Stored,
        is_honest: bool,
        before: &BTreeMap<&str, Vec<u8>>,
        found: &BTreeMap<&str, Vec<u8>>,
        after: &Contents,
    ) {
        let lost = stored.items.iter().any(|item| matches!(item, StoredItem::Lost(_)));
        if let Some((finished, FinishedAck::Complete)) = &stored.finished {
            assert!(!lost && finished.next == stored.next, "incomplete, and said to be complete");
        }
        if found == before {
            assert_eq!(stored.next, self.hello.next);
            assert!(stored.finished.as_ref().map(|(finished, _)| finished) == self.finished.as_ref());
            assert!(!after.keys().any(|path| path.to_string_lossy().contains("quarantine")), "nothing was wrong");
        }
        let acknowledged = found.get("index").map_or(0, |index| self.acknowledged(index));
        let has_end = found.contains_key("finished.json");
        let cut = kept(found, after);
        assert!(cut.is_empty() || !has_end, "of an attempt with its end, {cut:?} is not kept");
        if !is_honest {
            return;
        }
        for item in &stored.items {
            if let StoredItem::Record(record) = item {
                assert_eq!(self.records.get(&record.seq), Some(record), "it was never stored");
            }
        }
        assert!(stored.next >= acknowledged, "{} to {acknowledged} were acknowledged and are not missed", stored.next);
        if found.get("finished.json") == before.get("finished.json") {
            assert!(stored.next <= self.hello.next);
            assert!(!has_end || stored.next == self.hello.next, "the end is not reached");
        }
    }

    /// The agent, which holds what was not acknowledged to it, comes back and sends the rest.
    fn go_on(&self, stored: &Stored) {
        if stored.finished.is_some() || stored.next > self.hello.next || self.has_new_owner() {
            return;
        }
        let oldest = self.rounds.last().map_or(0, |round| round[0].seq);
        let hello = Hello { oldest, ..self.hello.clone() };
        let from = stored.next.max(oldest);
        let rest: Vec<_> = self.records.range(from..).map(|(_, record)| record.clone()).collect();
        match store(&self.disk(), Path::new(DATA), &hello, &[rest], self.finished.as_ref()) {
            Ok(next) => assert_eq!(next, from),
            Err(why) => panic!("the agent is turned away: {why}"),
        }
        let again = self.survey();
        let stored = again.iter().max_by_key(|stored| stored.attempt).expect("it was stored");
        assert_eq!(stored.next, self.hello.next);
        assert_eq!(stored.finished.is_some(), self.finished.is_some());
        for item in &stored.items {
            if let StoredItem::Record(record) = item {
                assert_eq!(self.records.get(&record.seq), Some(record));
            }
        }
    }

    /// Whether the attempt has lost its agent: it is nobody's now, or another's.
    fn has_new_owner(&self) -> bool {
        let text = self.files().remove("attempt.json").unwrap_or_default();
        !String::from_utf8_lossy(&text).contains(&self.hello.producer.to_string())
    }
}

/// Which files are neither there as they were found nor in quarantine. Each of them is the beginning of what was found.
fn kept<'a>(found: &BTreeMap<&'a str, Vec<u8>>, after: &Contents) -> Vec<&'a str> {
    let aside = |name: &str, contents: &Vec<u8>| {
        after.iter().any(|(path, bytes)| {
            path.file_name().is_some_and(|file| file == name)
                && path.to_string_lossy().contains("/quarantine/")
                && bytes == contents
        })
    };
    let mut cut = Vec::new();
    for (name, contents) in found {
        let is = after.get(&path(name));
        if is != Some(contents) && !aside(name, contents) {
            assert!(!name.contains("json"), "{name} is not kept");
            assert!(is.is_some_and(|is| contents.starts_with(is)), "{name} is not kept");
            cut.push(*name);
        }
    }
    cut
}

/// One change to a file's bytes. `how` is from 1 to 31.
fn edit(how: u8, bytes: &mut Vec<u8>, input: &mut Input<'_>) {
    let len = bytes.len();
    let at = if len == 0 { 0 } else { place(input) % len };
    match how {
        1..=7 if len > 0 => bytes[at] ^= input.byte().max(1),
        8..=11 => bytes.truncate(at),
        12..=14 => {
            let count = usize::from(input.byte());
            bytes.extend_from_slice(input.bytes(count));
        }
        15..=17 => {
            let count = place(input);
            bytes[at..].iter_mut().take(count).for_each(|byte| *byte = 0);
        }
        18..=20 => {
            // An entry is where another was, or behind the last.
            let (from, to) = (at / ENTRY * ENTRY, usize::from(input.byte()) * ENTRY);
            let entry = bytes[from..].iter().copied().take(ENTRY).collect::<Vec<_>>();
            overwrite(bytes, to.min(len), &entry);
        }
        21..=22 => {
            let count = usize::from(input.byte());
            drop(bytes.drain(at..(at + count).min(len)));
        }
        23..=24 => {
            let count = usize::from(input.byte());
            drop(bytes.splice(at..at, input.bytes(count).to_vec()));
        }
        25..=26 => {
            let count = usize::from(input.byte());
            overwrite(bytes, at, input.bytes(count));
        }
        27..=28 => bytes.resize(len + place(input), 0),
        _ => {
            // An entry that nobody wrote, with its checksum: no store does that, and no reader may break on it.
            let entry = any_entry(input);
            let to = usize::from(input.byte()) * ENTRY;
            overwrite(bytes, to.min(len), &entry);
        }
    }
}

fn any_entry(input: &mut Input<'_>) -> [u8; ENTRY] {
    let usual = input.byte().into();
    let seq = input.near(usual);
    let first = input.below(2) == 0;
    if input.below(3) == 0 {
        return entry_of_lost(seq, input.near(seq.wrapping_add(1)), first);
    }
    let stream = Stream::from_number(input.below(3)).expect("there are three");
    let offset = input.near(0);
    let len = usize::from(input.byte());
    let record = Record::new(seq, 0, stream, offset, Bytes::copy_from_slice(input.bytes(len)));
    entry_of(&record, input.near(0), first)
}

fn overwrite(bytes: &mut Vec<u8>, at: usize, with: &[u8]) {
    let end = at + with.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[at..end].copy_from_slice(with);
}

fn place(input: &mut Input<'_>) -> usize {
    usize::from(u16::from_le_bytes([input.byte(), input.byte()]))
}

fn decode(entry: &[u8]) -> Option<(u64, bool)> {
    decode_entry(entry.try_into().expect("it has the size"))
}

fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

fn build() -> BuildId {
    "b".parse().expect("a name")
}
