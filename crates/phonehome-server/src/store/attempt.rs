//! One attempt's files: written by the store's thread, read by anybody.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader, IoSlice, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use phonehome_proto::{
    frame::{Finished, FinishedAck, Hello, Record, Stream},
    id::{Attempt, BuildId, ProducerId, StepName},
    limits::MAX_PAYLOAD,
    tally::Tally,
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::warn;

use super::{
    Durability,
    index::{ENTRY, Entry},
};

/// What everybody may know of an attempt: whose it is, where it lies, how far it has got.
#[derive(Debug)]
pub(crate) struct AttemptFiles {
    pub(crate) build: BuildId,
    pub(crate) step: StepName,
    pub(crate) attempt: Attempt,
    pub(crate) dir: PathBuf,
    pub(crate) progress: watch::Sender<Progress>,
}

/// What is durable.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress {
    /// Everything below this sequence number.
    pub(crate) next: u64,
    /// Payload bytes, events included.
    pub(crate) bytes: u64,
    /// The account of these records.
    pub(crate) tally: Arc<Tally>,
    /// Entries in the index.
    pub(crate) entries: u64,
    /// How often records were taken back, to be sent again.
    pub(crate) rewinds: u64,
    /// The end and what to answer, once stored.
    pub(crate) finished: Option<(Finished, FinishedAck)>,
    /// The files can no longer be written; they must be opened anew.
    pub(crate) failed: bool,
}

impl AttemptFiles {
    /// Checksum of a record that is stored, whether synced or not.
    pub(crate) fn stored_crc(&self, seq: u64) -> Option<u32> {
        let index = File::open(self.dir.join("index")).ok()?;
        let mut wire = [0; ENTRY];
        let (mut low, mut high) = (0, index.metadata().ok()?.len() / ENTRY as u64);
        while low < high {
            let middle = low + (high - low) / 2;
            index.read_exact_at(&mut wire, middle * ENTRY as u64).ok()?;
            match Entry::decode(&wire)? {
                Entry::Record { seq: found, crc, .. } if found == seq => return Some(crc),
                Entry::Record { seq: found, .. } if found > seq => high = middle,
                Entry::Hole { from, .. } if from > seq => high = middle,
                Entry::Record { .. } | Entry::Hole { .. } => low = middle + 1,
            }
        }
        None
    }
}

/// Who made an attempt; `attempt.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    pub(super) producer: ProducerId,
    pub(super) agent: String,
    pub(super) labels: std::collections::BTreeMap<String, String>,
}

impl From<&Hello> for Owner {
    fn from(hello: &Hello) -> Self {
        Self { producer: hello.producer, agent: hello.agent.clone(), labels: hello.labels.clone() }
    }
}

/// `finished.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Ended {
    finished: Finished,
    answer: FinishedAck,
}

/// The writing side of an attempt's files.
#[derive(Debug)]
pub(super) struct AttemptLog {
    dir: PathBuf,
    log: File,
    events: File,
    index: File,
    pending: Vec<u8>,
    /// Where the next payload goes in `log` and in `events`.
    positions: [u64; 2],
    entries: u64,
    pub(super) tally: Tally,
    pub(super) lost: u64,
    pub(super) finished: Option<(Finished, FinishedAck)>,
}

/// Bytes of a torn tail that opening removed, if any.
pub(super) type Torn = u64;

impl AttemptLog {
    /// Makes an attempt, durably: before anybody hears of it, its directory says whose it is.
    pub(super) fn create(dir: &Path, owner: &Owner, durability: Durability) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let log = Self::with_files(dir, Tally::default())?;
        write_whole(&dir.join("attempt.json"), &serde_json::to_vec_pretty(owner)?, durability)?;
        if durability == Durability::Fsync {
            dir.ancestors().skip(1).take(3).try_for_each(sync_dir)?;
        }
        Ok(log)
    }

    fn with_files(dir: &Path, tally: Tally) -> io::Result<Self> {
        let open = |name| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(dir.join(name));
        Ok(Self {
            dir: dir.to_owned(),
            log: open("log")?,
            events: open("events")?,
            index: open("index")?,
            pending: Vec::new(),
            positions: [0; 2],
            entries: 0,
            tally,
            lost: 0,
            finished: None,
        })
    }

    /// Takes up what an earlier process left: every record whose index entry, bytes and checksums agree. What follows
    /// the last such record was never acknowledged, or is damaged; it is cut and its size reported.
    pub(super) fn open(dir: &Path) -> io::Result<(Self, Owner, Torn)> {
        let owner = serde_json::from_slice(&fs::read(dir.join("attempt.json"))?)?;
        let mut log = Self::with_files(dir, Tally::default())?;
        log.replay()?;
        let torn = log.cut_tail()?;
        if let Some(ended) = read_optional(&dir.join("finished.json"))? {
            let Ended { finished, answer } = serde_json::from_slice(&ended)?;
            log.finished = Some((finished, answer));
        }
        Ok((log, owner, torn))
    }

    fn replay(&mut self) -> io::Result<()> {
        let mut index = BufReader::new(&self.index);
        let mut log = BufReader::new(&self.log);
        let mut events = BufReader::new(&self.events);
        let mut wire = [0; ENTRY];
        while read_full(&mut index, &mut wire)? {
            let known = match Entry::decode(&wire) {
                Some(Entry::Hole { from, to }) if from == self.tally.next() && to > from => {
                    self.tally.skip_to(to);
                    self.lost += to - from;
                    true
                }
                Some(entry @ Entry::Record { stream, position, len, .. }) => {
                    let file = usize::from(!stream.is_output());
                    let source: &mut dyn Read = if stream.is_output() { &mut log } else { &mut events };
                    let record = read_record(source, entry)?
                        .filter(|record| position == self.positions[file] && self.tally.expects(record));
                    if let Some(record) = &record {
                        self.tally.add(record);
                        self.positions[file] += stored_len(stream, len);
                    }
                    record.is_some()
                }
                Some(Entry::Hole { .. }) | None => false,
            };
            if !known {
                break;
            }
            self.entries += 1;
        }
        Ok(())
    }

    /// Removes what replay did not accept and goes to the ends of the files.
    fn cut_tail(&mut self) -> io::Result<Torn> {
        let ends = [
            (&self.log, self.positions[0]),
            (&self.events, self.positions[1]),
            (&self.index, self.entries * ENTRY as u64),
        ];
        let mut torn = 0;
        for (mut file, end) in ends {
            let len = file.metadata()?.len();
            if len > end {
                torn += len - end;
                file.set_len(end)?;
            }
            file.seek(SeekFrom::Start(end))?;
        }
        Ok(torn)
    }

    /// Writes payloads now and keeps the index entries for [`Self::flush`].
    pub(super) fn append(&mut self, records: &[Record]) -> io::Result<()> {
        for run in records.chunk_by(|a, b| a.stream.is_output() == b.stream.is_output()) {
            if run[0].stream.is_output() {
                write_gathered(&mut self.log, run)?;
            } else {
                write_events(&mut self.events, run)?;
            }
            for record in run {
                self.note(record);
            }
        }
        Ok(())
    }

    fn note(&mut self, record: &Record) {
        let position = &mut self.positions[usize::from(!record.stream.is_output())];
        self.pending.extend_from_slice(&Entry::of(record, *position).encode());
        *position += stored_len(record.stream, record.payload.len() as u32);
        self.entries += 1;
    }

    /// Notes that records up to `to` are gone.
    pub(super) fn hole(&mut self, from: u64, to: u64) {
        self.pending.extend_from_slice(&Entry::Hole { from, to }.encode());
        self.entries += 1;
    }

    /// Writes the index entries of everything appended: payload first, then what points to it.
    pub(super) fn flush(&mut self, durability: Durability) -> io::Result<()> {
        if durability == Durability::Fsync {
            self.log.sync_data()?;
            self.events.sync_data()?;
        }
        self.index.write_all(&self.pending)?;
        self.pending.clear();
        if durability == Durability::Fsync { self.index.sync_data() } else { Ok(()) }
    }

    /// Goes back to where `tally` had got to, for the time being without touching what is on disk: [`Self::cut`] does.
    pub(super) fn step_back(&mut self, tally: Tally) -> io::Result<()> {
        self.flush(Durability::Os)?; // the way back is read from the index
        let mut wire = [0; ENTRY];
        while let Some(last) = self.entries.checked_sub(1) {
            self.index.read_exact_at(&mut wire, last * ENTRY as u64)?;
            match Entry::decode(&wire) {
                Some(Entry::Record { seq, stream, position, .. }) if seq >= tally.next() => {
                    self.positions[usize::from(!stream.is_output())] = position;
                }
                Some(Entry::Record { .. } | Entry::Hole { .. }) => break,
                None => return Err(io::ErrorKind::InvalidData.into()),
            }
            self.entries = last;
        }
        self.tally = tally;
        Ok(())
    }

    /// Removes from the files what lies beyond the current position.
    pub(super) fn cut(&mut self, durability: Durability) -> io::Result<()> {
        self.cut_tail()?;
        if durability == Durability::Fsync {
            [&self.index, &self.log, &self.events].into_iter().try_for_each(File::sync_data)?;
        }
        Ok(())
    }

    /// Writes the end, whole or not at all.
    pub(super) fn finish(&mut self, finished: Finished, answer: FinishedAck, durability: Durability) -> io::Result<()> {
        let ended = Ended { finished, answer };
        write_whole(&self.dir.join("finished.json"), &serde_json::to_vec_pretty(&ended)?, durability)?;
        self.finished = Some((ended.finished, ended.answer));
        Ok(())
    }

    pub(super) fn entries(&self) -> u64 {
        self.entries
    }
}

/// What a payload takes in its file: an event is followed by a newline.
fn stored_len(stream: Stream, len: u32) -> u64 {
    u64::from(len) + u64::from(!stream.is_output())
}

fn read_record(source: &mut dyn Read, entry: Entry) -> io::Result<Option<Record>> {
    let Entry::Record { seq, time, stream, offset, len, crc, .. } = entry else { return Ok(None) };
    if len as usize > MAX_PAYLOAD {
        return Ok(None);
    }
    let mut payload = vec![0; stored_len(stream, len) as usize];
    if !read_full(source, &mut payload)? {
        return Ok(None);
    }
    payload.truncate(len as usize);
    let record = Record { seq, time, stream, offset, crc, payload: Bytes::from(payload) };
    Ok(record.is_intact().then_some(record))
}

/// Fills the buffer; `false` at the end of the file, also within a torn one.
fn read_full(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<bool> {
    match source.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// All payloads of a message with few system calls (writev(2) takes at most 1024 slices).
fn write_gathered(file: &mut File, records: &[Record]) -> io::Result<()> {
    if let [record] = records {
        return file.write_all(&record.payload);
    }
    let mut slices: Vec<_> = records.iter().map(|record| IoSlice::new(&record.payload)).collect();
    let mut rest = &mut slices[..];
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        match file.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut rest, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_events(file: &mut File, records: &[Record]) -> io::Result<()> {
    let mut lines = Vec::with_capacity(records.iter().map(|record| record.payload.len() + 1).sum());
    for record in records {
        lines.extend_from_slice(&record.payload);
        lines.push(b'\n');
    }
    file.write_all(&lines)
}

/// Writes a small file so that a reader sees all of it or none (rename(2)).
pub(super) fn write_whole(path: &Path, contents: &[u8], durability: Durability) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(contents)?;
    if durability == Durability::Fsync {
        file.sync_all()?;
    }
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(dir) if durability == Durability::Fsync => sync_dir(dir),
        Some(_) | None => Ok(()),
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn read_optional(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(contents) => Ok(Some(contents)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Says what opening an attempt removed.
pub(super) fn report_torn(dir: &Path, torn: Torn) {
    if torn > 0 {
        warn!(bytes = torn, attempt = %dir.display(), "cut a torn tail that was never acknowledged");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_appended_is_there_after_opening_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = AttemptLog::create(dir.path(), &owner(), Durability::Fsync).unwrap();
        append(&mut log, Stream::Stdout, "one\n");
        append(&mut log, Stream::Event, r#"{"event":"x"}"#);
        append(&mut log, Stream::Stderr, "two\n");
        drop(log);
        let (log, found, torn) = AttemptLog::open(dir.path()).unwrap();
        assert_eq!((found, torn, log.tally.next(), log.entries()), (owner(), 0, 3, 3));
        assert_eq!(log.tally.digest().0, *blake3::hash(b"one\ntwo\n").as_bytes());
        assert_eq!(fs::read(dir.path().join("log")).unwrap(), b"one\ntwo\n");
        assert_eq!(fs::read(dir.path().join("events")).unwrap(), b"{\"event\":\"x\"}\n");
    }

    #[test]
    fn a_file_torn_at_any_byte_is_cut_to_whole_records_and_goes_on() {
        for file in ["log", "index", "events"] {
            let whole = {
                let dir = filled();
                fs::metadata(dir.path().join(file)).unwrap().len()
            };
            for len in 0..whole {
                let dir = filled();
                File::options().write(true).open(dir.path().join(file)).unwrap().set_len(len).unwrap();
                let (mut log, _, torn) = AttemptLog::open(dir.path()).unwrap();
                let kept = log.tally.next();
                assert!(kept < 4 && torn > 0 || file == "index" && len % ENTRY as u64 == 0, "{file} at {len}");
                append(&mut log, Stream::Stdout, "again");
                drop(log);
                let (log, _, torn) = AttemptLog::open(dir.path()).unwrap();
                assert_eq!((log.tally.next(), torn), (kept + 1, 0), "{file} at {len}");
            }
        }
    }

    #[test]
    fn a_flipped_byte_ends_what_is_believed() {
        for file in ["log", "index", "events"] {
            let dir = filled();
            let path = dir.path().join(file);
            let mut bytes = fs::read(&path).unwrap();
            bytes[0] ^= 1;
            fs::write(&path, bytes).unwrap();
            let (log, _, torn) = AttemptLog::open(dir.path()).unwrap();
            assert!(log.tally.next() < 4 && torn > 0, "{file}");
        }
    }

    #[test]
    fn holes_and_ends_survive() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = AttemptLog::create(dir.path(), &owner(), Durability::Os).unwrap();
        log.hole(0, 5);
        log.tally.skip_to(5);
        append(&mut log, Stream::Stdout, "late");
        let tally = &log.tally;
        let finished = Finished {
            next: 6,
            counts: tally.counts(),
            digest: tally.digest(),
            end: phonehome_proto::frame::End::Exited(0),
            time: 1,
            usage: None,
        };
        let answer = FinishedAck::Incomplete("lost".into());
        log.finish(finished.clone(), answer.clone(), Durability::Os).unwrap();
        drop(log);
        let (log, _, _) = AttemptLog::open(dir.path()).unwrap();
        assert_eq!((log.lost, log.tally.next(), log.finished), (5, 6, Some((finished, answer))));
    }

    #[test]
    fn what_is_taken_back_is_as_if_it_had_never_been_stored() {
        let streams = [Stream::Stdout, Stream::Event, Stream::Stderr, Stream::Stdout];
        let good = ["one\n", r#"{"event":"x"}"#, "two\n", "3"];
        let bad = ["bad", "{}", "worse\n", "none"];
        let whole = filled();
        for kept in 0..=4 {
            let dir = tempfile::tempdir().unwrap();
            let mut log = AttemptLog::create(dir.path(), &owner(), Durability::Fsync).unwrap();
            (0..kept).for_each(|at| append(&mut log, streams[at], good[at]));
            let tally = log.tally.clone();
            (kept..4).for_each(|at| append(&mut log, streams[at], bad[at]));
            log.step_back(tally).unwrap();
            log.cut(Durability::Fsync).unwrap();
            (kept..4).for_each(|at| append(&mut log, streams[at], good[at]));
            for file in ["log", "index", "events"] {
                let read = |dir: &tempfile::TempDir| fs::read(dir.path().join(file)).unwrap();
                assert!(read(&dir) == read(&whole), "{file}, {kept} kept");
            }
        }
    }

    #[test]
    fn the_checksum_of_any_stored_record_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = AttemptLog::create(dir.path(), &owner(), Durability::Os).unwrap();
        log.hole(0, 3);
        log.tally.skip_to(3);
        (0..9).for_each(|_| append(&mut log, Stream::Stdout, "x"));
        let files = AttemptFiles {
            build: "b".parse().unwrap(),
            step: StepName::default(),
            attempt: 1,
            dir: dir.path().to_owned(),
            progress: watch::Sender::new(Progress::default()),
        };
        for seq in 3..12 {
            let expected = Record::new(seq, 0, Stream::Stdout, seq - 3, "x".into()).crc;
            assert_eq!(files.stored_crc(seq), Some(expected), "{seq}");
        }
        assert_eq!((files.stored_crc(2), files.stored_crc(12)), (None, None));
    }

    fn owner() -> Owner {
        Owner { producer: ProducerId([7; 16]), agent: "test".into(), labels: std::collections::BTreeMap::new() }
    }

    fn append(log: &mut AttemptLog, stream: Stream, text: &str) {
        let record = Record::new(log.tally.next(), 0, stream, log.tally.offset(stream), text.to_owned().into());
        log.append(std::slice::from_ref(&record)).unwrap();
        log.tally.add(&record);
        log.flush(Durability::Os).unwrap();
    }

    fn filled() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut log = AttemptLog::create(dir.path(), &owner(), Durability::Os).unwrap();
        append(&mut log, Stream::Stdout, "one\n");
        append(&mut log, Stream::Event, r#"{"event":"x"}"#);
        append(&mut log, Stream::Stderr, "two\n");
        append(&mut log, Stream::Stdout, "3");
        dir
    }
}
