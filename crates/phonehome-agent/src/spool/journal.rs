//! The files of one attempt's spool.
//!
//! ```text
//! DIR/NUMBER-PRODUCER/hello                 the agent's Hello, for its labels; locked as long as the agent lives
//! DIR/NUMBER-PRODUCER/FIRST.records         records from FIRST on, consecutive
//! DIR/NUMBER-PRODUCER/finished              the agent's Finished, once its command has ended
//! ```
//!
//! Each file is a sequence of wire messages (see `docs/wire.md`), each behind its length and its CRC-32C, u32 both and
//! little-endian. A message of records carries one. What does not agree with its checksum ends the file. Nothing is
//! synced: the spool outlives the agent, not the node.

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::{OsStr, OsString},
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::{Buf, Bytes, BytesMut};
use phonehome_env::disk::{Disk, File, Open, write_whole};
use phonehome_proto::{
    codec::{
        EncodeError,
        binary::{Sealed, decode_agent, encode_agent},
    },
    frame::{AgentFrame, Finished, Hello},
    limits::MAX_MESSAGE,
};

/// An attempt's records on disk.
#[derive(Debug)]
pub(crate) struct Journal {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    segments: VecDeque<Segment>,
    segment_size: u64,
    /// The last segment, when this agent made it. Only this one and the one that is read are open: there may be many.
    last: Option<Box<dyn File>>,
    cursor: Option<Cursor>,
    /// Keeps others from taking it up.
    lock: Option<Box<dyn File>>,
}

/// One file of records.
#[derive(Debug)]
struct Segment {
    path: PathBuf,
    first: u64,
    /// One more than its last record.
    next: u64,
    bytes: u64,
}

/// Where reading goes on: behind the message of record `next - 1` of the segment that starts with `first`.
#[derive(Debug)]
struct Cursor {
    file: Box<dyn File>,
    first: u64,
    next: u64,
    position: u64,
}

/// What was found of an attempt whose agent is gone.
#[derive(Debug)]
pub(crate) struct Found {
    pub(super) finished: Option<Finished>,
    /// The first record that is there, and one more than the last that there was. Some between them may be missing.
    pub(super) first: u64,
    pub(super) next: u64,
    /// Whether there is a file of records that does not even begin with one.
    pub(super) is_damaged: bool,
    /// What the attempt was called, as far as that can still be read.
    pub(super) labels: BTreeMap<String, String>,
    pub(super) journal: Journal,
}

/// Length of a message's length and checksum.
const PREFIX: usize = 8;

/// Most bytes read at once.
const CHUNK: u64 = (MAX_MESSAGE + PREFIX) as u64;

const HELLO: &str = "hello";
const FINISHED: &str = "finished";
const SUFFIX: &str = "records";

impl Journal {
    /// Makes the directory, and those above it that are not there, and says in it whose it is. After an error it is not
    /// there, so that it can be tried again.
    pub(super) fn create(
        disk: Arc<dyn Disk>,
        above: &[PathBuf],
        dir: PathBuf,
        hello: &Hello,
        segment_size: u64,
    ) -> io::Result<Self> {
        make_dirs(&*disk, above)?;
        disk.private_dir(&dir)?;
        let path = dir.join(HELLO);
        let lock = match new_hello(&*disk, &path, hello) {
            Ok(lock) => lock,
            Err(error) => {
                drop(disk.remove_file(&path)); // it may not even be there; the error that counts is the first
                drop(disk.remove_dir(&dir));
                return Err(error);
            }
        };
        Ok(Self::new(disk, dir, segment_size, lock))
    }

    fn new(disk: Arc<dyn Disk>, dir: PathBuf, segment_size: u64, lock: Box<dyn File>) -> Self {
        Self { disk, dir, segments: VecDeque::new(), segment_size, last: None, cursor: None, lock: Some(lock) }
    }

    /// Takes up what an earlier agent left. `None` when its agent lives.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or somebody else has put something there.
    pub(super) fn take_up(disk: Arc<dyn Disk>, dir: &Path, segment_size: u64) -> io::Result<Option<Found>> {
        disk.private_dir(dir)?;
        let names = disk.list(dir)?;
        if let Some(foreign) = names.iter().find(|name| !is_ours(name)) {
            let text = format!("{} does not belong there; remove it", foreign.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        let lock = disk.open(&dir.join(HELLO), Open::Write)?; // without it the agent ended before there was a record
        if !lock.lock()? {
            return Ok(None);
        }
        let mut journal = Self::new(disk, dir.to_owned(), segment_size, lock);
        let is_damaged = journal.find_segments(&names)?;
        let finished = journal.find_end()?;
        // What is missing between files, or before the end, was acknowledged, or is damaged: the server knows which.
        let end = finished.as_ref().map_or(0, |finished| finished.next);
        let next = journal.segments.back().map_or(end, |segment| segment.next.max(end));
        let finished = finished.filter(|finished| finished.next == next);
        let first = journal.segments.front().map_or(next, |segment| segment.first);
        let labels = journal.find_labels();
        Ok(Some(Found { finished, first, next, is_damaged, labels, journal }))
    }

    /// None where they cannot be read: that is no reason to lose the rest.
    fn find_labels(&self) -> BTreeMap<String, String> {
        let hello = self.disk.open(&self.dir.join(HELLO), Open::Read).and_then(|file| first_frame(&*file));
        if let Ok(Some(AgentFrame::Hello(hello))) = hello { hello.labels } else { BTreeMap::new() }
    }

    fn find_end(&self) -> io::Result<Option<Finished>> {
        let path = self.dir.join(FINISHED);
        if !self.disk.exists(&path)? {
            return Ok(None);
        }
        let frame = first_frame(&*self.disk.open(&path, Open::Read)?)?;
        Ok(if let Some(AgentFrame::Finished(finished)) = frame { Some(finished) } else { None })
    }

    /// Finds the files of records, in their order, each as far as its records follow each other. Says whether one of them is
    /// of no use at all.
    fn find_segments(&mut self, names: &[OsString]) -> io::Result<bool> {
        let mut is_damaged = false;
        for name in names {
            let Some(first) = first_of(name) else { continue };
            let path = self.dir.join(name);
            let file = self.disk.open(&path, Open::Read)?;
            let (next, bytes) = measure(&*file, first)?;
            if next > first {
                self.segments.push_back(Segment { path, first, next, bytes });
            } else {
                is_damaged |= !file.is_empty()?;
            }
        }
        self.segments.make_contiguous().sort_by_key(|segment| segment.first);
        Ok(is_damaged)
    }

    /// Bytes on disk.
    pub(super) fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }

    /// What records will take on disk, bytes.
    pub(super) fn size_of(records: &[Sealed]) -> u64 {
        records.iter().map(|sealed| (sealed.message.len() + PREFIX) as u64).sum()
    }

    /// Adds consecutive records. After an error none of them is there.
    pub(super) fn append(&mut self, records: &[Sealed]) -> io::Result<()> {
        let Some(first) = records.first().map(|sealed| sealed.record.seq) else { return Ok(()) };
        let goes_on = self.segments.back().is_some_and(|last| last.next == first && last.bytes < self.segment_size);
        if !goes_on || self.last.is_none() {
            self.begin_segment(first)?;
        }
        let segment = self.segments.back_mut().expect("one was added above");
        let file = self.last.as_deref().expect("and its file");
        let prefixes: Vec<_> = records.iter().map(|sealed| prefix(&sealed.message)).collect();
        let mut slices: Vec<_> = prefixes
            .iter()
            .zip(records)
            .flat_map(|(prefix, sealed)| [IoSlice::new(prefix), IoSlice::new(&sealed.message)])
            .collect();
        if let Err(error) = file.write_all_at(&mut slices, segment.bytes) {
            drop(file.set_len(segment.bytes)); // what stays there is taken for the torn tail that it is
            return Err(error);
        }
        segment.bytes += Self::size_of(records);
        segment.next = first + records.len() as u64;
        Ok(())
    }

    fn begin_segment(&mut self, first: u64) -> io::Result<()> {
        let path = self.dir.join(format!("{first:020}.{SUFFIX}"));
        let file = self.disk.open(&path, Open::Write)?;
        file.set_len(0)?; // an append that failed may have left it
        self.segments.push_back(Segment { path, first, next: first, bytes: 0 });
        self.last = Some(file);
        Ok(())
    }

    /// Adds the end.
    pub(super) fn finish(&self, finished: &Finished) -> io::Result<()> {
        let message = encode_agent(&AgentFrame::Finished(finished.clone())).map_err(invalid)?;
        let file = [&prefix(&message)[..], &message].concat();
        write_whole(&*self.disk, &self.dir.join(FINISHED), &file, false)
    }

    /// Reads records from `first` on, up to `most` bytes of what they cost in memory. At least one.
    ///
    /// # Errors
    ///
    /// When the next record is not there, or not as it was written.
    pub(super) fn read(&mut self, first: u64, most: u64) -> io::Result<Vec<Sealed>> {
        let Some(segment) = self.segments.iter().find(|segment| segment.first <= first && first < segment.next) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        self.cursor.take_if(|cursor| cursor.first != segment.first || cursor.next > first);
        let cursor = match &mut self.cursor {
            Some(cursor) => cursor,
            none => {
                let file = self.disk.open(&segment.path, Open::Read)?;
                none.insert(Cursor { file, first: segment.first, next: segment.first, position: 0 })
            }
        };
        let mut messages = Messages::new(&*cursor.file, cursor.position, segment.bytes);
        messages.chunk = most.min(CHUNK);
        let (mut records, mut cost) = (Vec::new(), 0);
        while cursor.next < segment.next {
            let sealed = match messages.next() {
                Ok(message) => message.and_then(|message| sealed(message, cursor.next)),
                Err(error) if records.is_empty() => return Err(error),
                Err(_) => break, // it comes again in the next call, whose first record it concerns
            };
            let Some(sealed) = sealed else { break };
            cost += sealed.record.cost();
            if sealed.record.seq < first {
                cost = 0; // read for its length only
            } else if cost > most && !records.is_empty() {
                break;
            } else {
                records.push(sealed);
            }
            cursor.next += 1;
            cursor.position = messages.position;
        }
        if records.is_empty() { Err(damaged()) } else { Ok(records) }
    }

    /// Where reading goes on when `seq` cannot be read: at the next file. Behind the last one there is nothing.
    pub(super) fn resumes_at(&self, seq: u64) -> u64 {
        let ends = self.segments.iter().map(|segment| if segment.first > seq { segment.first } else { segment.next });
        ends.into_iter().find(|end| *end > seq).unwrap_or(u64::MAX)
    }

    /// Whether [`Self::forget`] would remove anything.
    pub(super) fn has_delivered(&self, next: u64) -> bool {
        self.segments.front().is_some_and(|segment| segment.next <= next)
    }

    /// Removes the files all of whose records are below `next`.
    pub(super) fn forget(&mut self, next: u64) {
        while self.segments.front().is_some_and(|segment| segment.next <= next) {
            if let Some(segment) = self.segments.pop_front() {
                self.cursor.take_if(|cursor| cursor.first == segment.first); // open, it would keep its place on the disk
                drop(self.disk.remove_file(&segment.path)); // what stays is found to be acknowledged by the next agent
            }
        }
        if self.segments.is_empty() {
            self.last = None;
        }
    }

    /// How many records there are.
    pub(super) fn records(&self) -> u64 {
        self.segments.iter().map(|segment| segment.next - segment.first).sum()
    }

    /// Removes everything.
    pub(super) fn remove(mut self) -> io::Result<()> {
        self.forget(u64::MAX);
        for name in self.disk.list(&self.dir)?.iter().filter(|name| is_ours(name)) {
            self.disk.remove_file(&self.dir.join(name))?;
        }
        drop(self.lock.take());
        self.disk.remove_dir(&self.dir)
    }
}

/// Makes or checks directories, the outermost first. Another agent may remove one that is empty in the same moment.
pub(super) fn make_dirs(disk: &dyn Disk, dirs: &[PathBuf]) -> io::Result<()> {
    let make = || dirs.iter().try_for_each(|dir| disk.private_dir(dir).map_err(at(dir)));
    make().or_else(|error| if error.kind() == io::ErrorKind::NotFound { make() } else { Err(error) })
}

/// Says where an error happened.
pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Says whose journal it is, in a file that nobody else has locked.
fn new_hello(disk: &dyn Disk, path: &Path, hello: &Hello) -> io::Result<Box<dyn File>> {
    let message = encode_agent(&AgentFrame::Hello(hello.clone())).map_err(invalid)?;
    let file = disk.open(path, Open::New)?;
    if !file.lock()? {
        return Err(io::Error::new(io::ErrorKind::WouldBlock, "another agent of this step is taking it up"));
    }
    file.write_all_at(&mut [IoSlice::new(&prefix(&message)), IoSlice::new(&message)], 0)?;
    Ok(file)
}

/// Whether a journal has files of this name; the last is a [`FINISHED`] that is being written.
fn is_ours(name: &OsStr) -> bool {
    first_of(name).is_some() || [HELLO, FINISHED, "finished.tmp"].iter().any(|ours| name == *ours)
}

/// The number in a segment's name.
fn first_of(name: &OsStr) -> Option<u64> {
    name.to_str()?.strip_suffix(SUFFIX)?.strip_suffix('.')?.parse().ok()
}

fn prefix(message: &Bytes) -> [u8; PREFIX] {
    let mut prefix = [0; PREFIX];
    prefix[..4].copy_from_slice(&(message.len() as u32).to_le_bytes());
    prefix[4..].copy_from_slice(&crc32c::crc32c(message).to_le_bytes());
    prefix
}

/// How far the records of a file follow each other, and where the last of them ends.
fn measure(file: &dyn File, first: u64) -> io::Result<(u64, u64)> {
    let mut messages = Messages::new(file, 0, file.len()?);
    let (mut next, mut end) = (first, 0);
    while let Some(message) = messages.next()? {
        if sealed(message, next).is_none() {
            break;
        }
        next += 1;
        end = messages.position;
    }
    Ok((next, end))
}

fn first_frame(file: &dyn File) -> io::Result<Option<AgentFrame>> {
    let message = Messages::new(file, 0, file.len()?).next()?;
    Ok(message.and_then(|message| decode_agent(&message).ok()))
}

/// The one record of a message, if it is that record.
fn sealed(message: Bytes, seq: u64) -> Option<Sealed> {
    let AgentFrame::Records(mut records) = decode_agent(&message).ok()? else { return None };
    let record = records.pop().filter(|record| records.is_empty() && record.seq == seq)?;
    Some(Sealed { record, message })
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a record is not as it was written")
}

fn invalid(error: EncodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

/// The messages of a file, one after the other.
struct Messages<'a> {
    file: &'a dyn File,
    /// Behind the last message.
    position: u64,
    end: u64,
    /// What was read ahead, from `position` on.
    ahead: Bytes,
    /// How much is read ahead, bytes: records that stay in memory keep all that was read with them.
    chunk: u64,
}

impl<'a> Messages<'a> {
    fn new(file: &'a dyn File, position: u64, end: u64) -> Self {
        Self { file, position, end, ahead: Bytes::new(), chunk: CHUNK }
    }

    /// `None` at the end, or where what follows cannot be a message.
    fn next(&mut self) -> io::Result<Option<Bytes>> {
        if !self.has(PREFIX)? {
            return Ok(None);
        }
        let len = u32::from_le_bytes([self.ahead[0], self.ahead[1], self.ahead[2], self.ahead[3]]) as usize;
        if len > MAX_MESSAGE || !self.has(PREFIX + len)? {
            return Ok(None);
        }
        let message = self.ahead.slice(PREFIX..PREFIX + len);
        if self.ahead[..PREFIX] != prefix(&message) {
            return Ok(None);
        }
        self.ahead.advance(PREFIX + len);
        self.position += (PREFIX + len) as u64;
        Ok(Some(message))
    }

    /// Reads on until that many bytes are there; `false` when there are fewer.
    fn has(&mut self, len: usize) -> io::Result<bool> {
        if self.ahead.len() >= len {
            return Ok(true);
        }
        let rest = self.end.saturating_sub(self.position);
        if rest < len as u64 {
            return Ok(false);
        }
        // What cannot be read further on is no reason not to have this.
        let ahead = self.chunk.max(len as u64).min(rest) as usize;
        self.ahead = self.read(ahead).or_else(|_| self.read(len))?;
        Ok(true)
    }

    fn read(&self, len: usize) -> io::Result<Bytes> {
        let mut chunk = BytesMut::zeroed(len);
        self.file.read_exact_at(&mut chunk, self.position)?;
        Ok(chunk.freeze())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use phonehome_env::disk::RealDisk;
    use phonehome_proto::{
        codec::binary::{HEADROOM, seal},
        frame::{Counts, End, Record, Stream},
        id::{Digest, ProducerId},
    };
    use tempfile::TempDir;

    use super::*;

    #[test]
    fn what_was_written_is_read_back_and_taken_up() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = create(&dir);
        for first in (0..40).step_by(4) {
            journal.append(&records(first..first + 4)).unwrap();
        }
        assert!(segments(&dir).len() > 3, "{:?}", segments(&dir));
        assert_eq!(read(&mut journal, 0..40), seqs(0..40));
        assert_eq!(read(&mut journal, 17..40), seqs(17..40), "from the middle, and back");
        journal.finish(&finished(40)).unwrap();
        let before = journal.bytes();
        journal.forget(21);
        assert!(journal.bytes() < before && !journal.has_delivered(21));
        assert_eq!(read(&mut journal, 21..40), seqs(21..40));
        drop(journal);
        let Found { finished: end, first, next, is_damaged, mut journal, .. } = take_up(&dir).unwrap().unwrap();
        assert_eq!((end, next, is_damaged), (Some(finished(40)), 40, false));
        assert!(first <= 21);
        assert_eq!(read(&mut journal, first..40), seqs(first..40));
        journal.remove().unwrap();
        assert!(!path(&dir).exists());
    }

    #[test]
    fn no_more_is_read_than_memory_has_room_for_but_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = create(&dir);
        journal.append(&records(0..4)).unwrap();
        let cost = records(0..1)[0].record.cost();
        for (most, count) in [(0, 1), (cost, 1), (2 * cost - 1, 1), (2 * cost, 2), (100 * cost, 4)] {
            assert_eq!(journal.read(0, most).unwrap().len(), count, "{most}");
        }
        assert_eq!(journal.read(4, cost).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_torn_tail_is_cut_wherever_it_was_torn() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = create(&dir);
        journal.append(&records(0..3)).unwrap();
        journal.finish(&finished(3)).unwrap();
        let ends: Vec<_> = (0..=3).map(|count| Journal::size_of(&records(0..count))).collect();
        drop(journal);
        let path = path(&dir).join("00000000000000000000.records");
        for len in (0..ends[3]).rev() {
            fs::File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
            let Found { finished: end, first, next, mut journal, .. } = take_up(&dir).unwrap().unwrap();
            let whole = ends.iter().rposition(|end| *end <= len).unwrap() as u64;
            if whole == 0 {
                assert_eq!((first, next), (3, 3), "the end is all there is");
            } else {
                assert_eq!((first, next, read(&mut journal, 0..whole)), (0, 3, seqs(0..whole)), "{len}");
                assert!(
                    journal.read(whole, 1).is_err() && end == Some(finished(3)),
                    "the end says how many there were"
                );
            }
        }
    }

    #[test]
    fn a_flipped_bit_is_never_taken_for_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = create(&dir);
        journal.append(&records(0..3)).unwrap();
        journal.finish(&finished(3)).unwrap();
        drop(journal);
        for name in ["00000000000000000000.records", HELLO, FINISHED] {
            let file = path(&dir).join(name);
            let whole = fs::read(&file).unwrap();
            for at in 0..whole.len() {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << (at % 8);
                fs::write(&file, &flipped).unwrap();
                let Found { finished: end, first, next, is_damaged, mut journal, .. } = take_up(&dir).unwrap().unwrap();
                assert_eq!(is_damaged, name.ends_with(SUFFIX) && next == first, "{name} {at}");
                assert!(end.is_none_or(|end| name != FINISHED && end == finished(3)), "{name} {at}");
                assert_eq!(next, 3, "{name} {at}");
                let whole = first..first + journal.records();
                let (found, expected) = (all(&mut journal, whole.clone()), records(whole));
                assert!(found.iter().eq(expected.iter().map(|sealed| &sealed.record)), "{name} {at}");
            }
            fs::write(&file, &whole).unwrap();
        }
    }

    #[test]
    fn damage_after_it_was_taken_up_is_an_error_that_ends_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = create(&dir);
        (0..3).for_each(|at| journal.append(&records(10 * at..10 * at + 10)).unwrap());
        let first = &segments(&dir)[0];
        let mut bytes = fs::read(path(&dir).join(first)).unwrap();
        let at = Journal::size_of(&records(0..4)) as usize + 20;
        bytes[at] ^= 1;
        fs::write(path(&dir).join(first), bytes).unwrap();
        assert_eq!(read(&mut journal, 0..4), seqs(0..4), "what comes before is good");
        assert_eq!(journal.read(4, 1).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(journal.resumes_at(4), 10);
        assert_eq!(read(&mut journal, 10..30), seqs(10..30));
    }

    #[test]
    fn a_gap_between_files_costs_what_is_missing_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = create(&dir);
        for range in [0..4, 4..8, 9..12, 12..13] {
            journal.append(&records(range)).unwrap();
        }
        drop(journal);
        let mut found = take_up(&dir).unwrap().unwrap();
        assert_eq!((found.first, found.next, found.finished, found.journal.records()), (0, 13, None, 12));
        assert_eq!(read(&mut found.journal, 0..8), seqs(0..8));
        assert!(found.journal.read(8, 1).is_err());
        assert_eq!((found.journal.resumes_at(8), found.journal.resumes_at(13)), (9, u64::MAX));
        assert_eq!(read(&mut found.journal, 9..13), seqs(9..13));
        found.journal.remove().unwrap();
        assert!(!path(&dir).exists(), "the others are removed with them");
    }

    #[test]
    fn a_journal_whose_agent_lives_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let journal = create(&dir);
        assert!(take_up(&dir).unwrap().is_none());
        drop(journal);
        assert!(take_up(&dir).unwrap().is_some());
    }

    #[test]
    fn what_an_agent_left_before_it_had_said_who_it_is_is_empty() {
        for contents in [None, Some(""), Some("\x05\0")] {
            let dir = tempfile::tempdir().unwrap();
            RealDisk.private_dir(&path(&dir)).unwrap();
            if let Some(contents) = contents {
                fs::write(path(&dir).join(HELLO), contents).unwrap();
            }
            let found = take_up(&dir).unwrap().unwrap();
            assert_eq!((found.first, found.next, found.finished, found.is_damaged), (0, 0, None, false));
            found.journal.remove().unwrap();
            assert!(!path(&dir).exists());
        }
    }

    #[test]
    fn what_somebody_else_has_put_there_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        drop(create(&dir));
        let foreign = path(&dir).join("notes.txt");
        fs::write(&foreign, "precious").unwrap();
        assert!(take_up(&dir).unwrap_err().to_string().contains("notes.txt does not belong there"));
        fs::remove_file(&foreign).unwrap();
        let precious = dir.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        symlink(&precious, path(&dir).join("00000000000000000007.records")).unwrap();
        assert!(take_up(&dir).is_err(), "no link is followed");
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
    }

    #[test]
    fn an_attempt_keeps_its_own_labels_as_long_as_they_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let labelled = Hello { labels: BTreeMap::from([("pod".into(), "one".into())]), ..hello() };
        drop(Journal::create(Arc::new(RealDisk), &[], path(&dir), &labelled, SEGMENT).unwrap());
        assert_eq!(take_up(&dir).unwrap().unwrap().labels, labelled.labels);
        for damaged in ["", "no hello"] {
            fs::write(path(&dir).join(HELLO), damaged).unwrap();
            assert!(take_up(&dir).unwrap().unwrap().labels.is_empty());
        }
    }

    #[test]
    fn a_hello_that_could_not_be_written_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let too_long = Hello { agent: "x".repeat(1 << 17), ..hello() };
        assert!(Journal::create(Arc::new(RealDisk), &[], path(&dir), &too_long, SEGMENT).is_err());
        assert!(!path(&dir).exists());
        create(&dir);
    }

    const SEGMENT: u64 = 400;

    fn path(dir: &TempDir) -> PathBuf {
        dir.path().join("000001-attempt")
    }

    fn create(dir: &TempDir) -> Journal {
        Journal::create(Arc::new(RealDisk), &[], path(dir), &hello(), SEGMENT).unwrap()
    }

    fn take_up(dir: &TempDir) -> io::Result<Option<Found>> {
        Journal::take_up(Arc::new(RealDisk), &path(dir), SEGMENT)
    }

    fn segments(dir: &TempDir) -> Vec<OsString> {
        RealDisk.list(&path(dir)).unwrap().into_iter().filter(|name| first_of(name).is_some()).collect()
    }

    fn hello() -> Hello {
        Hello {
            build: "b".parse().unwrap(),
            step: "s".parse().unwrap(),
            producer: ProducerId([7; 16]),
            oldest: 0,
            next: 0,
            labels: BTreeMap::new(),
            agent: "test".into(),
            capabilities: Vec::new(),
        }
    }

    fn finished(next: u64) -> Finished {
        Finished { next, counts: Counts::default(), digest: Digest([1; 32]), end: End::Exited(3), time: 9, usage: None }
    }

    fn records(range: std::ops::Range<u64>) -> Vec<Sealed> {
        let record = |seq| {
            let mut block = BytesMut::zeroed(HEADROOM);
            block.extend_from_slice(format!("this is line {seq}\n").as_bytes());
            seal(block, seq, 1_700_000_000_000_000 + seq, Stream::Stdout, 100 * seq)
        };
        range.map(record).collect()
    }

    fn all(journal: &mut Journal, range: std::ops::Range<u64>) -> Vec<Record> {
        let mut found = Vec::new();
        while range.start + (found.len() as u64) < range.end {
            let more = journal.read(range.start + found.len() as u64, 1000).unwrap();
            found.extend(more.into_iter().map(|sealed| sealed.record));
        }
        found.truncate((range.end - range.start) as usize);
        found
    }

    fn read(journal: &mut Journal, range: std::ops::Range<u64>) -> Vec<u64> {
        all(journal, range).iter().map(|record| record.seq).collect()
    }

    fn seqs(range: std::ops::Range<u64>) -> Vec<u64> {
        range.collect()
    }
}
