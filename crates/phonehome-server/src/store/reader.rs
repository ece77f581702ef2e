//! Reading an attempt with a cursor, from its beginning to wherever it has got.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use bytes::BytesMut;
use phonehome_proto::frame::Record;

use super::{
    attempt::AttemptFiles,
    index::{ENTRY, Entry},
};

/// A position in an attempt's log. Sees what is durable and nothing else.
#[derive(Debug)]
pub(crate) struct AttemptReader {
    pub(crate) files: Arc<AttemptFiles>,
    index: File,
    log: File,
    events: File,
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
        let open = |name| File::open(files.dir.join(name));
        Ok(Self {
            index: open("index")?,
            log: open("log")?,
            events: open("events")?,
            files,
            entry: 0,
            buffer: BytesMut::new(),
        })
    }

    /// The next record; `None` when there is none yet. A record that was returned once is never returned again, also
    /// when it was taken back and sent again: it has kept its place.
    ///
    /// # Errors
    ///
    /// When the files cannot be read, or do not hold what their index says.
    pub(crate) fn next(&mut self) -> io::Result<Option<Found>> {
        let (entries, rewinds) = self.reach();
        if self.entry >= entries {
            return Ok(None);
        }
        match self.read() {
            Ok(found) => {
                self.entry += 1;
                Ok(Some(found))
            }
            Err(_) if self.reach().1 != rewinds => Ok(None), // taken back in this moment, and announced
            Err(error) => Err(error),
        }
    }

    /// How many entries there are, and how often some were taken back.
    fn reach(&self) -> (u64, u64) {
        let progress = self.files.progress.borrow();
        (progress.entries, progress.rewinds)
    }

    fn read(&mut self) -> io::Result<Found> {
        let mut wire = [0; ENTRY];
        self.index.read_exact_at(&mut wire, self.entry * ENTRY as u64)?;
        match Entry::decode(&wire) {
            Some(Entry::Hole { from, to }) => Ok(Found::Lost(to - from)),
            Some(Entry::Record { seq, time, stream, offset, position, len, crc }) => {
                self.buffer.resize(len as usize, 0);
                let file = if stream.is_output() { &self.log } else { &self.events };
                file.read_exact_at(&mut self.buffer, position)?;
                let payload = self.buffer.split().freeze();
                let record = Record { seq, time, stream, offset, crc, payload };
                if !record.is_intact() {
                    return Err(damaged(&self.files));
                }
                Ok(Found::Record(record))
            }
            None => Err(damaged(&self.files)),
        }
    }
}

fn damaged(files: &AttemptFiles) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged", files.dir.display()))
}
