//! `phonehome.v1.json`: the same frames as one JSON object per text message, told apart by `type`.
//!
//! A record carries `text` (UTF-8) or `data` (base64, RFC 4648 section 4, padded); here `data` is written for what is
//! not UTF-8, and for what is rich in control characters, which JSON makes six times as long. Its `crc` may be left
//! out: then the checksum is made on arrival, and TCP's and TLS's own are all that guards the way.

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{DecodeError, EncodeError};
use crate::{
    frame::{
        Ack, AgentFrame, Cancel, Drain, Finished, FinishedAck, Hello, Ping, Pong, Record, ServerFrame, Stream,
        UnixMicros, Welcome,
    },
    limits::{MAX_MESSAGE, MAX_PAYLOAD, MAX_RECORDS},
};

#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
enum AgentText {
    Hello(Hello),
    Records(RecordsText),
    Finished(Finished),
    Pong(Pong),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordsText {
    first: u64,
    records: Vec<RecordText>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordText {
    time: UnixMicros,
    stream: Stream,
    offset: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crc: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    data: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
enum ServerText {
    Welcome(Welcome),
    Ack(Ack),
    Cancel(Cancel),
    FinishedAck(FinishedAckText),
    Drain(Drain),
    Ping(Ping),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FinishedAckText {
    outcome: FinishedAck,
}

/// Writes what an agent says.
///
/// # Errors
///
/// When the text exceeds the limit of a message.
pub fn encode_agent(frame: &AgentFrame) -> Result<String, EncodeError> {
    encode(&match frame.clone() {
        AgentFrame::Hello(hello) => AgentText::Hello(hello),
        AgentFrame::Records(records) => AgentText::Records(RecordsText {
            first: records.first().map_or(0, |record| record.seq),
            records: records.iter().map(record_text).collect(),
        }),
        AgentFrame::Finished(finished) => AgentText::Finished(finished),
        AgentFrame::Pong(pong) => AgentText::Pong(pong),
    })
}

/// Writes what a server says.
///
/// # Errors
///
/// When the text exceeds the limit of a message.
pub fn encode_server(frame: &ServerFrame) -> Result<String, EncodeError> {
    encode(&match frame.clone() {
        ServerFrame::Welcome(welcome) => ServerText::Welcome(welcome),
        ServerFrame::Ack(ack) => ServerText::Ack(ack),
        ServerFrame::Cancel(cancel) => ServerText::Cancel(cancel),
        ServerFrame::FinishedAck(outcome) => ServerText::FinishedAck(FinishedAckText { outcome }),
        ServerFrame::Drain(drain) => ServerText::Drain(drain),
        ServerFrame::Ping(ping) => ServerText::Ping(ping),
    })
}

fn encode(frame: &impl Serialize) -> Result<String, EncodeError> {
    let text = serde_json::to_string(frame).map_err(EncodeError::Unwritable)?;
    if text.len() > MAX_MESSAGE { Err(EncodeError::TooLarge(text.len())) } else { Ok(text) }
}

fn record_text(record: &Record) -> RecordText {
    let text = std::str::from_utf8(&record.payload).ok().filter(|text| is_readable(text)).map(str::to_owned);
    let data = text.is_none().then(|| BASE64_STANDARD.encode(&record.payload));
    let Record { time, stream, offset, crc, .. } = *record;
    RecordText { time, stream, offset, crc: Some(crc), text, data }
}

/// Whether at most a quarter is written as `\u0000`, so that the longest record still fits a message.
fn is_readable(text: &str) -> bool {
    let is_long = |byte: &u8| *byte < b' ' && !matches!(byte, b'\n' | b'\r' | b'\t' | 0x08 | 0x0c);
    text.as_bytes().iter().filter(|byte| is_long(byte)).count() * 4 <= text.len()
}

/// Reads what an agent sent.
///
/// # Errors
///
/// When the text is not one frame within its limits.
pub fn decode_agent(text: &str) -> Result<AgentFrame, DecodeError> {
    Ok(match decode(text)? {
        AgentText::Hello(hello) => AgentFrame::Hello(hello),
        AgentText::Records(text) => AgentFrame::Records(records(text)?),
        AgentText::Finished(finished) => AgentFrame::Finished(finished),
        AgentText::Pong(pong) => AgentFrame::Pong(pong),
    })
}

/// Reads what a server sent.
///
/// # Errors
///
/// When the text is not one frame within its limits.
pub fn decode_server(text: &str) -> Result<ServerFrame, DecodeError> {
    Ok(match decode(text)? {
        ServerText::Welcome(welcome) => ServerFrame::Welcome(welcome),
        ServerText::Ack(ack) => ServerFrame::Ack(ack),
        ServerText::Cancel(cancel) => ServerFrame::Cancel(cancel),
        ServerText::FinishedAck(text) => ServerFrame::FinishedAck(text.outcome),
        ServerText::Drain(drain) => ServerFrame::Drain(drain),
        ServerText::Ping(ping) => ServerFrame::Ping(ping),
    })
}

fn decode<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, DecodeError> {
    if text.len() > MAX_MESSAGE {
        return Err(DecodeError::TooLarge(text.len()));
    }
    serde_json::from_str(text).map_err(DecodeError::BadText)
}

fn records(text: RecordsText) -> Result<Vec<Record>, DecodeError> {
    let count = text.records.len();
    if !(1..=MAX_RECORDS).contains(&count) || text.first.checked_add(count as u64).is_none() {
        return Err(DecodeError::RecordCount(count));
    }
    // The numbers come second: nobody asks for the one after the last.
    text.records.into_iter().zip(text.first..).map(|(record, seq)| record_from(seq, record)).collect()
}

fn record_from(seq: u64, record: RecordText) -> Result<Record, DecodeError> {
    let payload: Bytes = match (record.text, record.data) {
        (Some(text), None) => text.into_bytes().into(),
        (None, Some(data)) => BASE64_STANDARD.decode(data).map_err(DecodeError::BadBase64)?.into(),
        (Some(_), Some(_)) | (None, None) => return Err(DecodeError::BadLength),
    };
    if payload.len() > MAX_PAYLOAD {
        return Err(DecodeError::TooLong(payload.len() as u64));
    }
    let made = Record::new(seq, record.time, record.stream, record.offset, payload);
    Ok(Record { crc: record.crc.unwrap_or(made.crc), ..made })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_by_hand_needs_no_checksum() {
        let text = r#"{"type":"records","first":0,"records":[{"time":1,"stream":"stdout","offset":0,"text":"hi\n"}]}"#;
        let AgentFrame::Records(records) = decode_agent(text).unwrap() else { panic!("not records") };
        assert!(records[0].is_intact());
    }

    #[test]
    fn a_record_has_text_or_data_and_not_both() {
        for body in [r#""text":"a","data":"YQ==""#, r#""crc":1"#] {
            let text = format!(
                r#"{{"type":"records","first":0,"records":[{{"time":1,"stream":"stdout","offset":0,{body}}}]}}"#
            );
            assert!(matches!(decode_agent(&text), Err(DecodeError::BadLength)), "{text}");
        }
    }

    #[test]
    fn unknown_members_are_refused() {
        let finished = r#"{"type":"finished-ack","outcome":"complete","x":2}"#;
        for text in [r#"{"type":"ping","id":1,"x":2}"#, r#"{"type":"pang","id":1}"#, finished] {
            assert!(matches!(decode_server(text), Err(DecodeError::BadText(_))), "{text}");
        }
        let end = r#"{"signalled":{"signal":9,"core":false,"oom":false,"x":2}}"#;
        assert!(serde_json::from_str::<crate::frame::End>(end).is_err());
    }

    #[test]
    fn the_longest_record_fits_a_message_whatever_its_bytes() {
        for pattern in [&b"a"[..], b"\"", b"\n", b"\0", b"\xff", b"\x1b\"\"\"", b"\x1b[m", "ä".as_bytes()] {
            let payload: Vec<_> = pattern.iter().copied().cycle().take(MAX_PAYLOAD).collect();
            let frame = AgentFrame::Records(vec![Record::new(0, 0, Stream::Stdout, 0, payload.into())]);
            assert_eq!(decode_agent(&encode_agent(&frame).unwrap()).unwrap(), frame);
        }
    }
}
