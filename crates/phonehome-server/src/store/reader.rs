//! Reading an attempt with a cursor, from its beginning to wherever it has got.

use std::{io, sync::Arc};

use bytes::BytesMut;
use phonehome_env::disk::File;
use phonehome_proto::{frame::Record, limits::MAX_PAYLOAD};

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
    /// Which files are open, see [`Progress::generation`](super::Progress).
    generation: u64,
    entry: u64,
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

impl AttemptReader {
    pub(crate) fn open(files: Arc<AttemptFiles>) -> io::Result<Self> {
        let generation = files.progress.borrow().generation;
        Ok(Self { open: open_all(&files)?, files, generation, entry: 0, buffer: BytesMut::new() })
    }

    /// The next record; `None` when there is none yet. A record that was returned once is never returned again, also
    /// when it was taken back and sent again: it has kept its place.
    ///
    /// # Errors
    ///
    /// When the files cannot be read, or do not hold what their index says.
    pub(crate) fn next(&mut self) -> io::Result<Option<Found>> {
        let (entries, generation, rewinds) = self.reach();
        if self.entry >= entries {
            return Ok(None);
        }
        if generation != self.generation {
            self.open = open_all(&self.files)?; // copies, entry by entry the same
            self.generation = generation;
        }
        match self.read() {
            Ok(found) => {
                self.entry += 1;
                Ok(Some(found))
            }
            Err(_) if self.reach().2 != rewinds => Ok(None), // taken back in this moment, and announced
            Err(error) => Err(self.explain(&error)),
        }
    }

    /// How many entries there are, which copy of the files has them, and how often some were taken back.
    fn reach(&self) -> (u64, u64, u64) {
        let progress = self.files.progress.borrow();
        (progress.entries, progress.generation, progress.rewinds)
    }

    fn read(&mut self) -> io::Result<Found> {
        let [log, events, index] = &self.open;
        let mut wire = [0; ENTRY];
        index.read_exact_at(&mut wire, self.entry * ENTRY as u64)?;
        match Entry::decode(&wire) {
            Some(Entry::Hole { from, to }) => Ok(Found::Lost(to - from)),
            Some(Entry::Record { seq, time, stream, offset, position, len, crc }) if len as usize <= MAX_PAYLOAD => {
                self.buffer.resize(len as usize, 0);
                let file = if stream.is_output() { log } else { events };
                file.read_exact_at(&mut self.buffer, position)?;
                let payload = self.buffer.split().freeze();
                let record = Record { seq, time, stream, offset, crc, payload };
                if record.is_intact() { Ok(Found::Record(record)) } else { Err(io::ErrorKind::InvalidData.into()) }
            }
            Some(Entry::Record { .. }) | None => Err(io::ErrorKind::InvalidData.into()),
        }
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

fn open_all(files: &AttemptFiles) -> io::Result<[Box<dyn File>; 3]> {
    let [log, events, index] = NAMES.map(|name| files.open(name));
    Ok([log?, events?, index?])
}
