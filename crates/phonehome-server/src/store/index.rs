//! The index of an attempt: fixed-size entries, so that record n is found at once and a torn one is seen.
//!
//! ```text
//! | seq u64 | time u64 | offset u64 | position u64 | length u32 | crc u32 | stream u8 | first u8 | 0 0 | entry crc u32 |
//! ```
//!
//! Little-endian, 48 bytes. `position` is where the payload starts in `log` (stdout, stderr) or `events`; `crc` is the
//! record's checksum on the wire; `entry crc` is CRC-32C of the 44 bytes before it. Stream 255 is a hole: records from
//! `seq` up to `offset` are lost, and no payload belongs to it. `first` is 1 when everything before the entry was durable
//! when it was written: it is the first of its round of syncing. So whatever is bad before such an entry was
//! acknowledged once, and is no torn tail.

use phonehome_proto::frame::{Record, Stream, UnixMicros};

/// Size of an entry, bytes.
pub(crate) const ENTRY: usize = 48;

const HOLE: u8 = 255;

/// One line of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// A record and where its payload is.
    Record { seq: u64, time: UnixMicros, stream: Stream, offset: u64, position: u64, len: u32, crc: u32 },
    /// Records that were acknowledged once and are gone.
    Hole { from: u64, to: u64 },
}

impl Entry {
    /// The number of the first record it is about.
    pub(crate) fn seq(self) -> u64 {
        match self {
            Self::Record { seq, .. } | Self::Hole { from: seq, .. } => seq,
        }
    }

    /// The number behind the last record it is about.
    pub(crate) fn end(self) -> u64 {
        match self {
            Self::Record { seq, .. } => seq.saturating_add(1),
            Self::Hole { to, .. } => to,
        }
    }

    pub(crate) fn of(record: &Record, position: u64) -> Self {
        let Record { seq, time, stream, offset, crc, .. } = *record;
        Self::Record { seq, time, stream, offset, position, len: record.payload.len() as u32, crc }
    }

    /// The bytes of the entry, `first` of its round or not.
    pub(crate) fn encode(self, first: bool) -> [u8; ENTRY] {
        let (seq, time, offset, position, len, crc, stream) = match self {
            Self::Record { seq, time, stream, offset, position, len, crc } => {
                (seq, time, offset, position, len, crc, stream.number())
            }
            Self::Hole { from, to } => (from, 0, to, 0, 0, 0, HOLE),
        };
        let mut wire = [0; ENTRY];
        wire[0..8].copy_from_slice(&seq.to_le_bytes());
        wire[8..16].copy_from_slice(&time.to_le_bytes());
        wire[16..24].copy_from_slice(&offset.to_le_bytes());
        wire[24..32].copy_from_slice(&position.to_le_bytes());
        wire[32..36].copy_from_slice(&len.to_le_bytes());
        wire[36..40].copy_from_slice(&crc.to_le_bytes());
        wire[40] = stream;
        wire[41] = u8::from(first);
        let check = crc32c::crc32c(&wire[..44]);
        wire[44..].copy_from_slice(&check.to_le_bytes());
        wire
    }

    /// `None` when the bytes are not an entry: torn, or never written.
    pub(crate) fn decode(wire: &[u8; ENTRY]) -> Option<Self> {
        let u64_at = |at: usize| Some(u64::from_le_bytes(wire.get(at..at + 8)?.try_into().ok()?));
        let u32_at = |at: usize| Some(u32::from_le_bytes(wire.get(at..at + 4)?.try_into().ok()?));
        if u32_at(44)? != crc32c::crc32c(&wire[..44]) {
            return None;
        }
        let (seq, offset) = (u64_at(0)?, u64_at(16)?);
        if wire[40] == HOLE {
            return Some(Self::Hole { from: seq, to: offset });
        }
        Some(Self::Record {
            seq,
            time: u64_at(8)?,
            stream: Stream::from_number(wire[40])?,
            offset,
            position: u64_at(24)?,
            len: u32_at(32)?,
            crc: u32_at(36)?,
        })
    }
}

/// Whether an entry that can be decoded says that everything before it was durable.
pub(super) fn is_first(wire: &[u8; ENTRY]) -> bool {
    wire[41] == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_frozen_and_any_changed_bit_is_seen() {
        let entry = Entry::of(&Record::new(1, 2, Stream::Stderr, 3, "four".into()), 5);
        let wire = entry.encode(false);
        assert_eq!(wire[..36], *b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x04\0\0\0");
        assert_eq!(wire[40..44], [1, 0, 0, 0]);
        assert_eq!(Entry::decode(&wire), Some(entry));
        let first = entry.encode(true);
        assert_eq!((Entry::decode(&first), first[40..44].to_vec()), (Some(entry), vec![1, 1, 0, 0]));
        assert!(is_first(&first) && !is_first(&wire));
        for bit in 0..ENTRY * 8 {
            let mut torn = wire;
            torn[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Entry::decode(&torn), None, "bit {bit}");
        }
        assert_eq!(Entry::decode(&[0; ENTRY]), None);
    }

    #[test]
    fn a_hole_is_an_entry() {
        let hole = Entry::Hole { from: 3, to: 9 };
        assert_eq!(Entry::decode(&hole.encode(true)), Some(hole));
    }
}
