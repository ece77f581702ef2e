//! The files of one attempt's spool.
//!
//! ```text
//! DIR/NUMBER-PRODUCER/hello                 the agent's Hello
//! DIR/NUMBER-PRODUCER/FIRST.records         records from FIRST on, consecutive
//! DIR/NUMBER-PRODUCER/finished              the agent's Finished, once its command has ended
//! ```
//!
//! Each file is a sequence of wire messages (see `docs/wire.md`), each behind its length as u32, little-endian. A message
//! of records carries one, with its checksum: what does not decode or does not agree ends the file. Nothing is synced:
//! the spool outlives the agent, not the node.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
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
    cursor: Cursor,
    /// Keeps others from taking it up.
    lock: Option<Box<dyn File>>,
}

/// One file of records.
#[derive(Debug)]
struct Segment {
    path: PathBuf,
    file: Box<dyn File>,
    first: u64,
    /// One more than its last record.
    next: u64,
    bytes: u64,
}

/// Where reading goes on: behind the message of record `next - 1` of the segment that starts with `first`.
#[derive(Debug, Clone, Copy, Default)]
struct Cursor {
    first: u64,
    next: u64,
    position: u64,
}

/// What was found of an attempt whose agent is gone.
#[derive(Debug)]
pub(crate) struct Found {
    pub(super) hello: Hello,
    pub(super) finished: Option<Finished>,
    /// The records that follow each other up to the last.
    pub(super) first: u64,
    pub(super) next: u64,
    pub(super) journal: Journal,
}

/// Length of a message's length.
const PREFIX: usize = 4;

/// Bytes read at once.
const CHUNK: usize = MAX_MESSAGE + PREFIX;

const SUFFIX: &str = "records";

impl Journal {
    /// Makes the directory and says in it whose it is.
    pub(super) fn create(disk: Arc<dyn Disk>, dir: PathBuf, hello: &Hello, segment_size: u64) -> io::Result<Self> {
        disk.private_dir(&dir)?;
        let message = encode_agent(&AgentFrame::Hello(hello.clone())).map_err(invalid)?;
        let path = dir.join("hello");
        let lock = disk.open(&path, Open::New)?;
        lock.lock()?;
        lock.write_all_at(&mut [IoSlice::new(&prefix(&message)), IoSlice::new(&message)], 0)?;
        Ok(Self { disk, dir, segments: VecDeque::new(), segment_size, cursor: Cursor::default(), lock: Some(lock) })
    }

    /// Takes up what an earlier agent left. `None` when there is nothing in it, or its agent lives.
    pub(super) fn take_up(disk: Arc<dyn Disk>, dir: &Path, segment_size: u64) -> io::Result<Option<Found>> {
        let lock = disk.open(&dir.join("hello"), Open::Write)?;
        if !lock.lock()? {
            return Ok(None);
        }
        let Some(AgentFrame::Hello(hello)) = first_frame(&*lock)? else { return Ok(None) };
        let dir = dir.to_owned();
        let (segments, cursor) = (VecDeque::new(), Cursor::default());
        let mut journal = Self { disk, dir, segments, segment_size, cursor, lock: Some(lock) };
        journal.find_segments()?;
        let finished = journal.find_end()?;
        let (first, next) = match (journal.segments.front(), journal.segments.back(), &finished) {
            (Some(front), Some(back), _) => (front.first, back.next),
            (None, _, Some(finished)) | (_, None, Some(finished)) => (finished.next, finished.next),
            (None, _, None) | (_, None, None) => (0, 0),
        };
        // An end whose last records did not get here would promise what cannot be kept.
        let finished = finished.filter(|finished| finished.next == next);
        Ok(Some(Found { hello, finished, first, next, journal }))
    }

    fn find_end(&self) -> io::Result<Option<Finished>> {
        let path = self.dir.join("finished");
        if !self.disk.exists(&path)? {
            return Ok(None);
        }
        let frame = first_frame(&*self.disk.open(&path, Open::Read)?)?;
        Ok(if let Some(AgentFrame::Finished(finished)) = frame { Some(finished) } else { None })
    }

    /// Finds the newest files whose records follow each other. What lies before a gap was acknowledged: only that is ever
    /// left out.
    fn find_segments(&mut self) -> io::Result<()> {
        for name in self.disk.list(&self.dir)? {
            let path = self.dir.join(name);
            let Some(first) = first_of(&path) else { continue };
            let file = self.disk.open(&path, Open::Write)?;
            let (next, bytes) = measure(&*file, first)?;
            if self.segments.back().is_none_or(|last| last.next != first) {
                self.segments.clear();
            }
            if next > first {
                self.segments.push_back(Segment { path, file, first, next, bytes });
            }
        }
        Ok(())
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
        if !self.segments.back().is_some_and(|last| last.next == first && last.bytes < self.segment_size) {
            self.segments.push_back(self.new_segment(first)?);
        }
        let segment = self.segments.back_mut().expect("one was added above");
        let prefixes: Vec<_> = records.iter().map(|sealed| prefix(&sealed.message)).collect();
        let mut slices: Vec<_> = prefixes
            .iter()
            .zip(records)
            .flat_map(|(prefix, sealed)| [IoSlice::new(prefix), IoSlice::new(&sealed.message)])
            .collect();
        if let Err(error) = segment.file.write_all_at(&mut slices, segment.bytes) {
            drop(segment.file.set_len(segment.bytes)); // what stays there is taken for the torn tail that it is
            return Err(error);
        }
        segment.bytes += Self::size_of(records);
        segment.next = first + records.len() as u64;
        Ok(())
    }

    fn new_segment(&self, first: u64) -> io::Result<Segment> {
        let path = self.dir.join(format!("{first:020}.{SUFFIX}"));
        let file = self.disk.open(&path, Open::Write)?;
        file.set_len(0)?; // an append that failed may have left it
        Ok(Segment { path, file, first, next: first, bytes: 0 })
    }

    /// Adds the end.
    pub(super) fn finish(&self, finished: &Finished) -> io::Result<()> {
        let message = encode_agent(&AgentFrame::Finished(finished.clone())).map_err(invalid)?;
        let file = [&prefix(&message)[..], &message].concat();
        write_whole(&*self.disk, &self.dir.join("finished"), &file, false)
    }

    /// Reads records from `first` on, up to about `most` bytes of what they cost in memory. At least one.
    ///
    /// # Errors
    ///
    /// When the next record is not there, or not as it was written.
    pub(super) fn read(&mut self, first: u64, most: u64) -> io::Result<Vec<Sealed>> {
        let Some(segment) = self.segments.iter().find(|segment| segment.first <= first && first < segment.next) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if self.cursor.first != segment.first || self.cursor.next > first {
            self.cursor = Cursor { first: segment.first, next: segment.first, position: 0 };
        }
        let mut messages = Messages::new(&*segment.file, self.cursor.position, segment.bytes);
        let (mut records, mut cost) = (Vec::new(), 0);
        while cost < most && self.cursor.next < segment.next {
            let Some(sealed) = messages.next()?.and_then(|message| sealed(message, self.cursor.next)) else { break };
            self.cursor.next += 1;
            self.cursor.position = messages.position;
            if sealed.record.seq >= first {
                cost += sealed.record.cost();
                records.push(sealed);
            }
        }
        if records.is_empty() { Err(io::ErrorKind::InvalidData.into()) } else { Ok(records) }
    }

    /// One more than the last record of the file that holds `seq`: how far a damaged file reaches.
    pub(super) fn end_of_segment(&self, seq: u64) -> u64 {
        self.segments.iter().map(|segment| segment.next).find(|next| *next > seq).unwrap_or(seq + 1)
    }

    /// Whether [`Self::forget`] would remove anything.
    pub(super) fn has_delivered(&self, next: u64) -> bool {
        self.segments.front().is_some_and(|segment| segment.next <= next)
    }

    /// Removes the files all of whose records are below `next`.
    pub(super) fn forget(&mut self, next: u64) {
        while self.segments.front().is_some_and(|segment| segment.next <= next) {
            if let Some(segment) = self.segments.pop_front() {
                drop(self.disk.remove_file(&segment.path)); // what stays is found to be acknowledged by the next agent
            }
        }
    }

    /// Removes everything.
    pub(super) fn remove(mut self) -> io::Result<()> {
        self.forget(u64::MAX);
        for name in self.disk.list(&self.dir)? {
            self.disk.remove_file(&self.dir.join(name))?;
        }
        drop(self.lock.take());
        self.disk.remove_dir(&self.dir)
    }
}

/// The number in a segment's name.
fn first_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(SUFFIX)?.strip_suffix('.')?.parse().ok()
}

fn prefix(message: &Bytes) -> [u8; PREFIX] {
    (message.len() as u32).to_le_bytes()
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

/// The one record of a message, if it is that record and intact.
fn sealed(message: Bytes, seq: u64) -> Option<Sealed> {
    let AgentFrame::Records(mut records) = decode_agent(&message).ok()? else { return None };
    let record = records.pop().filter(|record| records.is_empty() && record.seq == seq && record.is_intact())?;
    Some(Sealed { record, message })
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
}

impl<'a> Messages<'a> {
    fn new(file: &'a dyn File, position: u64, end: u64) -> Self {
        Self { file, position, end, ahead: Bytes::new() }
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
        let message = self.ahead.split_to(PREFIX + len).slice(PREFIX..);
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
        let mut chunk = BytesMut::zeroed(rest.min(CHUNK as u64) as usize);
        self.file.read_exact_at(&mut chunk, self.position)?;
        self.ahead = chunk.freeze();
        Ok(true)
    }
}
