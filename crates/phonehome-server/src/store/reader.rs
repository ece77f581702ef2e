//! Reading an attempt with a cursor, from its beginning to wherever it has got.

use std::{io, sync::Arc};

use bytes::BytesMut;
use phonehome_env::disk::File;
use phonehome_proto::{
    frame::{Record, Stream, UnixMicros},
    limits::MAX_PAYLOAD,
};

use super::{
    attempt::AttemptFiles,
    index::{ENTRY, Entry},
    log::NAMES,
};

/// A position in an attempt's log. Sees what is durable and nothing else.
#[derive(Debug)]
pub(crate) struct AttemptReader {
    pub(crate) files: Arc<AttemptFiles>,
    open: [Box<dyn File>; 3],
    entry: u64,
    /// Everything below this sequence number was returned, or is not wanted.
    told: u64,
    ahead: Ahead,
    /// Taken up again for the next payload once the last record is dropped.
    buffer: BytesMut,
}

/// What a reader finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// A record.
    Record(Record),
    /// Records that were acknowledged once and are gone: how many.
    Lost(u64),
}

/// What comes next, without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// A record.
    Record {
        /// Its number.
        seq: u64,
        /// When its bytes were read.
        time: UnixMicros,
        /// Where they come from.
        stream: Stream,
    },
    /// A hole, which has no time.
    Lost {
        /// The number of the first record that is gone.
        seq: u64,
    },
}

impl Next {
    pub(crate) fn seq(self) -> u64 {
        match self {
            Self::Record { seq, .. } | Self::Lost { seq } => seq,
        }
    }
}

/// Entries that were read together.
#[derive(Debug, Default)]
struct Ahead {
    /// How often records had been taken back before they were read: after the next time they may be others.
    rewinds: u64,
    /// Which files they are from, see [`Progress::generation`](super::Progress).
    generation: u64,
    first: u64,
    wire: Vec<u8>,
}

impl AttemptReader {
    pub(crate) fn open(files: Arc<AttemptFiles>) -> io::Result<Self> {
        let (_, generation, rewinds) = reach(&files);
        let ahead = Ahead { rewinds, generation, ..Ahead::default() };
        Ok(Self { open: open_all(&files)?, files, entry: 0, told: 0, ahead, buffer: BytesMut::new() })
    }

    /// Goes on behind everything below a sequence number, also when some of it is yet to be sent again.
    ///
    /// # Errors
    ///
    /// When the index cannot be read.
    pub(crate) fn seek(&mut self, told: u64) -> io::Result<()> {
        let (mut low, mut high) = (0, reach(&self.files).0);
        while low < high {
            let middle = low + (high - low) / 2;
            self.entry = middle;
            let looked = self.look_at(middle);
            let Some(entry) = looked.or_else(|error| self.excuse(&error))? else { break };
            if entry.end() <= told {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        (self.entry, self.told) = (low, told);
        Ok(())
    }

    /// Everything of the attempt below this sequence number was returned.
    pub(crate) fn told(&self) -> u64 {
        self.told
    }

    /// The next record; `None` when there is none yet. A record that was returned once is never returned again, also
    /// when it was taken back and sent again: it has kept its place.
    ///
    /// # Errors
    ///
    /// When the files cannot be read, or do not hold what their index says.
    pub(crate) fn next(&mut self) -> io::Result<Option<Found>> {
        let Some(entry) = self.look()? else { return Ok(None) };
        match self.take(entry) {
            Ok(found) => {
                self.pass(entry);
                Ok(Some(found))
            }
            Err(error) => self.excuse(&error),
        }
    }

    /// What [`Self::next`] is about to return.
    ///
    /// # Errors
    ///
    /// When the index cannot be read.
    pub(crate) fn peek(&mut self) -> io::Result<Option<Next>> {
        Ok(self.look()?.map(|entry| match entry {
            Entry::Record { seq, time, stream, .. } => Next::Record { seq, time, stream },
            Entry::Hole { from, .. } => Next::Lost { seq: from },
        }))
    }

    /// Passes over what [`Self::next`] is about to return.
    ///
    /// # Errors
    ///
    /// When the index cannot be read.
    pub(crate) fn skip(&mut self) -> io::Result<()> {
        if let Some(entry) = self.look()? {
            self.pass(entry);
        }
        Ok(())
    }

    fn pass(&mut self, entry: Entry) {
        self.entry += 1;
        self.told = entry.end();
    }

    /// The next entry that is not told yet.
    fn look(&mut self) -> io::Result<Option<Entry>> {
        while self.entry < reach(&self.files).0 {
            match self.look_at(self.entry) {
                Ok(Some(entry)) if entry.end() > self.told => return Ok(Some(entry)),
                Ok(Some(_)) => self.entry += 1, // it was taken back, and has come again
                Ok(None) => return Ok(None),
                Err(error) => return self.excuse(&error),
            }
        }
        Ok(None)
    }

    /// An entry, read with those behind it; `None` when it is not there any more.
    fn look_at(&mut self, entry: u64) -> io::Result<Option<Entry>> {
        let (entries, generation, rewinds) = reach(&self.files);
        if entry >= entries {
            return Ok(None);
        }
        if generation != self.ahead.generation {
            self.open = open_all(&self.files)?; // copies, entry by entry the same
        }
        if (generation, rewinds) != (self.ahead.generation, self.ahead.rewinds) {
            self.ahead = Ahead { rewinds, generation, ..Ahead::default() };
        }
        let [_, _, index] = &self.open;
        self.ahead.get(&**index, entry, entries).map(Some)
    }

    fn take(&mut self, entry: Entry) -> io::Result<Found> {
        match entry {
            Entry::Hole { from, to } => Ok(Found::Lost(to - from.max(self.told))),
            Entry::Record { seq, time, stream, offset, position, len, crc } if len as usize <= MAX_PAYLOAD => {
                let [log, events, _] = &self.open;
                self.buffer.resize(len as usize, 0);
                let file = if stream.is_output() { log } else { events };
                file.read_exact_at(&mut self.buffer, position)?;
                let payload = self.buffer.split().freeze();
                let record = Record { seq, time, stream, offset, crc, payload };
                if record.is_intact() { Ok(Found::Record(record)) } else { Err(io::ErrorKind::InvalidData.into()) }
            }
            Entry::Record { .. } => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// What it means that something could not be read: it was taken back in this moment, and announced; or it is damage.
    fn excuse<T>(&self, error: &io::Error) -> io::Result<Option<T>> {
        let is_taken_back = reach(&self.files).2 != self.ahead.rewinds;
        if is_taken_back { Ok(None) } else { Err(self.explain(error)) }
    }

    /// Says where, and what a person can do.
    fn explain(&self, error: &io::Error) -> io::Error {
        let dir = self.files.dir.display();
        let is_damage = matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof);
        let told = if is_damage {
            let entry = self.entry;
            format!(
                "{dir} is damaged at entry {entry}; look after the disk, then start again to go on with what is good"
            )
        } else {
            format!("{dir} cannot be read: {error}")
        };
        io::Error::new(error.kind(), told)
    }
}

impl Ahead {
    /// One of `entries` entries.
    fn get(&mut self, index: &dyn File, entry: u64, entries: u64) -> io::Result<Entry> {
        if !(self.first..self.first + self.count()).contains(&entry) {
            self.fill(index, entry, entries)?;
        }
        let wire = self.wire.get((entry - self.first) as usize * ENTRY..).and_then(|wire| wire.first_chunk());
        wire.and_then(Entry::decode).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn count(&self) -> u64 {
        (self.wire.len() / ENTRY) as u64
    }

    /// Reads an entry, and behind it as many as are there and fit.
    fn fill(&mut self, index: &dyn File, entry: u64, entries: u64) -> io::Result<()> {
        self.first = entry;
        self.wire.resize(AHEAD.min(entries - entry) as usize * ENTRY, 0);
        let read = index.read_at(&mut self.wire, entry * ENTRY as u64);
        let whole = read.as_ref().map_or(0, |count| count / ENTRY);
        self.wire.truncate(whole * ENTRY);
        if whole == 0 {
            self.wire.resize(ENTRY, 0);
            let exact = index.read_exact_at(&mut self.wire, entry * ENTRY as u64);
            exact.inspect_err(|_| self.wire.clear())?;
        }
        Ok(())
    }
}

/// Entries read at once: 3 KiB.
const AHEAD: u64 = 64;

/// How many entries there are, which copy of the files has them, and how often some were taken back.
fn reach(files: &AttemptFiles) -> (u64, u64, u64) {
    let progress = files.progress.borrow();
    (progress.entries, progress.generation, progress.rewinds)
}

fn open_all(files: &AttemptFiles) -> io::Result<[Box<dyn File>; 3]> {
    let [log, events, index] = NAMES.map(|name| files.open(name));
    Ok([log?, events?, index?])
}
