//! `phonehome.v1`: the only place that knows bincode.
//!
//! ```text
//! | head length u16, big-endian | head | payload of record 1 | payload of record 2 | ... |
//! ```
//!
//! The head is the frame's fixed part in bincode 1.3's standard form: integers as little-endian varints, the frame's
//! kind first, no trailing bytes. Payloads follow as they are. Only `Records` has any.

use bincode::Options;
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{DecodeError, EncodeError};
use crate::{
    frame::{
        Ack, AgentFrame, Cancel, Drain, Finished, FinishedAck, Hello, Ping, Pong, Record, ServerFrame, Stream,
        UnixMicros, Welcome,
    },
    limits::{MAX_HEAD, MAX_MESSAGE, MAX_PAYLOAD, MAX_RECORDS},
};

/// Room to leave before a record's payload so that [`seal`] can put the rest of the message there: the length, kind
/// and record count, and every integer of the head at its longest.
pub const HEADROOM: usize = 48;

/// Variants are numbered by position: append only.
#[derive(Serialize, Deserialize)]
enum AgentHead<H, F> {
    Hello(H),
    Records(RecordsHead),
    Finished(F),
    Pong(Pong),
}

#[derive(Serialize, Deserialize)]
struct RecordsHead {
    first: u64,
    records: Vec<RecordHead>,
}

/// [`AgentHead::Records`] with exactly one record, without a vector.
#[derive(Serialize)]
struct SealedHead {
    kind: u8,
    first: u64,
    count: u8,
    record: RecordHead,
}

const RECORDS_KIND: u8 = 1;

#[derive(Serialize, Deserialize)]
struct RecordHead {
    time: UnixMicros,
    stream: Stream,
    offset: u64,
    len: u32,
    crc: u32,
}

impl From<&Record> for RecordHead {
    fn from(record: &Record) -> Self {
        Self {
            time: record.time,
            stream: record.stream,
            offset: record.offset,
            len: record.payload.len() as u32,
            crc: record.crc,
        }
    }
}

/// Variants are numbered by position: append only.
#[derive(Serialize, Deserialize)]
enum ServerHead<W, C, F> {
    Welcome(W),
    Ack(Ack),
    Cancel(C),
    FinishedAck(F),
    Drain(Drain),
    Ping(Ping),
}

fn options() -> impl Options {
    bincode::DefaultOptions::new().with_limit(MAX_HEAD as u64)
}

/// A record and the whole message that carries it alone, sharing one buffer.
#[derive(Debug, Clone)]
pub struct Sealed {
    /// The record; its payload is the end of `message`.
    pub record: Record,
    /// A complete message.
    pub message: Bytes,
}

/// Makes a record of a buffer whose first [`HEADROOM`] bytes are free, and its message in place: no payload byte moves.
///
/// # Panics
///
/// When the buffer is shorter than the headroom or its payload longer than [`MAX_PAYLOAD`].
#[must_use]
pub fn seal(mut buffer: BytesMut, seq: u64, time: UnixMicros, stream: Stream, offset: u64) -> Sealed {
    let (room, payload) = buffer.split_at_mut(HEADROOM);
    assert!(payload.len() <= MAX_PAYLOAD, "a record of {} bytes", payload.len());
    let crc = crate::frame::checksum(seq, stream, offset, payload);
    let record = RecordHead { time, stream, offset, len: payload.len() as u32, crc };
    let start = put_head(room, &SealedHead { kind: RECORDS_KIND, first: seq, count: 1, record });
    let message = buffer.freeze();
    let payload = message.slice(HEADROOM..);
    Sealed { record: Record { seq, time, stream, offset, crc, payload }, message: message.slice(start..) }
}

/// Writes length and head so that they end where `room` ends, and says where they start.
fn put_head(room: &mut [u8], head: &SealedHead) -> usize {
    let mut encoded = [0; HEADROOM - 2];
    let mut rest = &mut encoded[..];
    options().serialize_into(&mut rest, head).expect("the longest head fits the headroom");
    let len = HEADROOM - 2 - rest.len();
    let start = HEADROOM - 2 - len;
    room[start..start + 2].copy_from_slice(&(len as u16).to_be_bytes());
    room[start + 2..].copy_from_slice(&encoded[..len]);
    start
}

/// Writes what an agent says.
///
/// # Errors
///
/// When the head or the message exceeds its limit.
pub fn encode_agent(frame: &AgentFrame) -> Result<Bytes, EncodeError> {
    type Head<'a> = AgentHead<&'a Hello, &'a Finished>;
    match frame {
        AgentFrame::Hello(hello) => encode(&Head::Hello(hello), &[]),
        AgentFrame::Records(records) => {
            let first = records.first().map_or(0, |record| record.seq);
            let heads = records.iter().map(RecordHead::from).collect();
            encode(&Head::Records(RecordsHead { first, records: heads }), records)
        }
        AgentFrame::Finished(finished) => encode(&Head::Finished(finished), &[]),
        AgentFrame::Pong(pong) => encode(&Head::Pong(*pong), &[]),
    }
}

/// Writes what a server says.
///
/// # Errors
///
/// When the head exceeds its limit.
pub fn encode_server(frame: &ServerFrame) -> Result<Bytes, EncodeError> {
    type Head<'a> = ServerHead<&'a Welcome, &'a Cancel, &'a FinishedAck>;
    let head = match frame {
        ServerFrame::Welcome(welcome) => Head::Welcome(welcome),
        ServerFrame::Ack(ack) => Head::Ack(*ack),
        ServerFrame::Cancel(cancel) => Head::Cancel(cancel),
        ServerFrame::FinishedAck(ack) => Head::FinishedAck(ack),
        ServerFrame::Drain(drain) => Head::Drain(*drain),
        ServerFrame::Ping(ping) => Head::Ping(*ping),
    };
    encode(&head, &[])
}

fn encode(head: &impl Serialize, records: &[Record]) -> Result<Bytes, EncodeError> {
    let head_len = options().serialized_size(head).map_err(EncodeError::HeadTooLarge)? as usize;
    let len = 2 + head_len + records.iter().map(|record| record.payload.len()).sum::<usize>();
    if len > MAX_MESSAGE {
        return Err(EncodeError::TooLarge(len));
    }
    let mut wire = Vec::with_capacity(len);
    wire.extend_from_slice(&(head_len as u16).to_be_bytes());
    options().serialize_into(&mut wire, head).map_err(EncodeError::HeadTooLarge)?;
    for record in records {
        wire.extend_from_slice(&record.payload);
    }
    Ok(wire.into())
}

/// Reads what an agent sent. Payloads share the message's buffer.
///
/// # Errors
///
/// When the bytes are not one frame within its limits.
pub fn decode_agent(wire: &Bytes) -> Result<AgentFrame, DecodeError> {
    let (head, payload) = split(wire)?;
    let frame = match decode_head(&head)? {
        AgentHead::Hello(hello) => AgentFrame::Hello(hello),
        AgentHead::Records(head) => return records(head, payload).map(AgentFrame::Records),
        AgentHead::Finished(finished) => AgentFrame::Finished(finished),
        AgentHead::Pong(pong) => AgentFrame::Pong(pong),
    };
    no_payload(&payload)?;
    Ok(frame)
}

/// Reads what a server sent.
///
/// # Errors
///
/// When the bytes are not one frame within its limits.
pub fn decode_server(wire: &Bytes) -> Result<ServerFrame, DecodeError> {
    let (head, payload) = split(wire)?;
    no_payload(&payload)?;
    Ok(match decode_head(&head)? {
        ServerHead::Welcome(welcome) => ServerFrame::Welcome(welcome),
        ServerHead::Ack(ack) => ServerFrame::Ack(ack),
        ServerHead::Cancel(cancel) => ServerFrame::Cancel(cancel),
        ServerHead::FinishedAck(ack) => ServerFrame::FinishedAck(ack),
        ServerHead::Drain(drain) => ServerFrame::Drain(drain),
        ServerHead::Ping(ping) => ServerFrame::Ping(ping),
    })
}

fn split(wire: &Bytes) -> Result<(Bytes, Bytes), DecodeError> {
    if wire.len() > MAX_MESSAGE {
        return Err(DecodeError::TooLarge(wire.len()));
    }
    let (len, _) = wire.split_first_chunk().ok_or(DecodeError::Truncated)?;
    let end = 2 + usize::from(u16::from_be_bytes(*len));
    if wire.len() < end {
        return Err(DecodeError::Truncated);
    }
    Ok((wire.slice(2..end), wire.slice(end..)))
}

fn decode_head<T: DeserializeOwned>(head: &Bytes) -> Result<T, DecodeError> {
    options().deserialize(head).map_err(DecodeError::BadHead)
}

fn no_payload(payload: &Bytes) -> Result<(), DecodeError> {
    if payload.is_empty() { Ok(()) } else { Err(DecodeError::BadLength) }
}

fn records(head: RecordsHead, mut payload: Bytes) -> Result<Vec<Record>, DecodeError> {
    let count = head.records.len();
    if !(1..=MAX_RECORDS).contains(&count) || head.first.checked_add(count as u64).is_none() {
        return Err(DecodeError::RecordCount(count));
    }
    let mut records = Vec::with_capacity(count);
    // The numbers come second: nobody asks for the one after the last.
    for (record, seq) in head.records.into_iter().zip(head.first..) {
        if record.len as usize > MAX_PAYLOAD {
            return Err(DecodeError::TooLong(u64::from(record.len)));
        }
        if record.len as usize > payload.len() {
            return Err(DecodeError::BadLength);
        }
        let RecordHead { time, stream, offset, len, crc } = record;
        records.push(Record { seq, time, stream, offset, crc, payload: payload.split_to(len as usize) });
    }
    no_payload(&payload)?;
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_message_is_what_the_encoder_writes() {
        for seq in [0, 300, 70_000, u64::MAX - 1] {
            let mut buffer = BytesMut::zeroed(HEADROOM);
            buffer.extend_from_slice(b"hello\n");
            let sealed = seal(buffer, seq, seq, Stream::Stderr, seq);
            assert_eq!(sealed.record, Record::new(seq, seq, Stream::Stderr, seq, "hello\n".into()));
            assert_eq!(sealed.message, encode_agent(&AgentFrame::Records(vec![sealed.record])).unwrap());
        }
    }

    #[test]
    fn a_head_of_one_byte_records_stays_within_its_limit() {
        let records = (0..MAX_RECORDS as u64)
            .map(|n| Record::new(u64::MAX - 2000 + n, u64::MAX, Stream::Event, u64::MAX, "x".into()));
        assert!(encode_agent(&AgentFrame::Records(records.collect())).is_ok());
    }

    #[test]
    fn lengths_that_do_not_add_up_are_refused() {
        let wire =
            encode_agent(&AgentFrame::Records(vec![Record::new(0, 0, Stream::Stdout, 0, "abc".into())])).unwrap();
        assert!(matches!(decode_agent(&wire.slice(..wire.len() - 1)), Err(DecodeError::BadLength)));
        assert!(matches!(decode_agent(&[&wire[..], b"x"].concat().into()), Err(DecodeError::BadLength)));
        assert!(matches!(decode_agent(&Bytes::from_static(b"\x00")), Err(DecodeError::Truncated)));
        assert!(matches!(decode_agent(&Bytes::from_static(b"\x00\x09\x00")), Err(DecodeError::Truncated)));
        assert!(matches!(decode_agent(&vec![0; MAX_MESSAGE + 1].into()), Err(DecodeError::TooLarge(_))));
    }
}
