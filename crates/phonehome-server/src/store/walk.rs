//! Going through an attempt's files entry by entry, to find out what in them is good.

use std::io::{self, BufRead, BufReader, Read};

use bytes::Bytes;
use phonehome_env::disk::File;
use phonehome_proto::{frame::Record, limits::MAX_PAYLOAD};

use super::{
    index::{ENTRY, Entry, is_first},
    log::{Point, stored_len},
};

/// A walk over the entries of an index, in order. An entry is good when it decodes, comes after the last good one, and
/// its payload has its checksum. As long as nothing bad was met it also has to follow the last one exactly.
pub(super) struct Walk<'a> {
    index: Source<'a>,
    payloads: [Source<'a>; 2],
    entries: u64,
    entry: u64,
    /// After the last good entry; `entries` counts the good ones.
    at: Point,
    /// Whether something bad lies between the last good entry and this place; in the payload files as well.
    gap: bool,
    payload_gaps: [bool; 2],
}

/// What an entry turns out to be.
pub(super) struct Seen {
    /// Its place in the index.
    pub(super) entry: u64,
    /// Its number, when it can be decoded and is the first of its round: all before it was acknowledged.
    pub(super) first: Option<u64>,
    pub(super) what: What,
}

/// Whether it is good.
pub(super) enum What {
    Bad,
    Hole,
    Record(Record),
    /// The disk does not give it back.
    Unreadable,
}

impl<'a> Walk<'a> {
    pub(super) fn new(files: &'a [Box<dyn File>; 3]) -> io::Result<Self> {
        let [log, events, index] = files;
        let entries = index.len()? / ENTRY as u64;
        Ok(Self {
            index: Source::new(&**index),
            payloads: [Source::new(&**log), Source::new(&**events)],
            entries,
            entry: 0,
            at: Point::default(),
            gap: false,
            payload_gaps: [false; 2],
        })
    }

    /// Everything good so far.
    pub(super) fn at(&self) -> &Point {
        &self.at
    }

    fn see(&mut self, entry: u64) -> Seen {
        let mut wire = [0; ENTRY];
        let known = match self.index.read(&mut wire, entry * ENTRY as u64) {
            Ok(true) => Entry::decode(&wire),
            Ok(false) => None,
            Err(_) => return Seen { entry, first: None, what: What::Unreadable },
        };
        let Some(known) = known else { return Seen { entry, first: None, what: What::Bad } };
        let first = is_first(&wire).then(|| known.seq());
        let what = match known {
            Entry::Hole { from, to } => self.see_hole(from, to),
            Entry::Record { .. } => self.see_record(known),
        };
        Seen { entry, first, what }
    }

    /// Whether a number may come here.
    fn fits(&self, seq: u64) -> bool {
        let next = self.at.tally.next();
        seq == next || self.gap && seq > next
    }

    fn see_hole(&mut self, from: u64, to: u64) -> What {
        if to <= from || !self.fits(from) {
            return What::Bad;
        }
        self.at.lost += to - self.at.tally.next();
        self.at.tally.skip_to(to);
        What::Hole
    }

    fn see_record(&mut self, entry: Entry) -> What {
        let Entry::Record { seq, time, stream, offset, position, len, crc } = entry else { return What::Bad };
        let file = usize::from(!stream.is_output());
        let end = self.at.positions[file];
        let placed = position == end || self.payload_gaps[file] && position > end;
        if len as usize > MAX_PAYLOAD || !placed || !self.fits(seq) {
            return What::Bad;
        }
        let mut payload = vec![0; stored_len(stream, len) as usize];
        match self.payloads[file].read(&mut payload, position) {
            Ok(true) => {}
            Ok(false) => return What::Bad,
            Err(_) => return What::Unreadable,
        }
        payload.truncate(len as usize);
        let record = Record { seq, time, stream, offset, crc, payload: Bytes::from(payload) };
        if !record.is_intact() || !self.follows(&record) {
            return What::Bad;
        }
        self.at.positions[file] = position + stored_len(stream, len);
        self.payload_gaps[file] = false;
        What::Record(record)
    }

    /// Takes the record into the account, when its stream has got to where it starts.
    fn follows(&mut self, record: &Record) -> bool {
        let tally = &mut self.at.tally;
        if record.seq == tally.next() && !tally.expects(record) || record.offset < tally.offset(record.stream) {
            return false;
        }
        if record.seq > tally.next() {
            self.at.lost += record.seq - tally.next();
            tally.skip_to(record.seq);
        }
        tally.add(record);
        true
    }
}

impl Iterator for Walk<'_> {
    type Item = Seen;

    fn next(&mut self) -> Option<Seen> {
        if self.entry == self.entries {
            return None;
        }
        let seen = self.see(self.entry);
        self.entry += 1;
        match seen.what {
            What::Hole | What::Record(_) => {
                self.gap = false;
                self.at.entries += 1;
            }
            What::Bad | What::Unreadable => {
                self.gap = true;
                self.payload_gaps = [true; 2];
            }
        }
        Some(seen)
    }
}

/// A file that is read forwards, mostly.
struct Source<'a> {
    reader: BufReader<Place<'a>>,
    position: u64,
}

/// A place in a file, moved by reading.
struct Place<'a> {
    file: &'a dyn File,
    position: u64,
}

impl Read for Place<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl<'a> Source<'a> {
    fn new(file: &'a dyn File) -> Self {
        Self { reader: BufReader::with_capacity(READ_AHEAD, Place { file, position: 0 }), position: 0 }
    }

    /// Fills the buffer; `false` when the file ends before.
    fn read(&mut self, buffer: &mut [u8], position: u64) -> io::Result<bool> {
        if position != self.position {
            self.reader.consume(self.reader.buffer().len());
            self.reader.get_mut().position = position;
        }
        self.position = u64::MAX; // unknown after an error
        match self.reader.read_exact(buffer) {
            Ok(()) => {
                self.position = position + buffer.len() as u64;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Bytes read at a time. A fuzzer's files are small, and have to be larger than this.
const READ_AHEAD: usize = if cfg!(fuzzing) { 4 * 1024 } else { 256 * 1024 };
