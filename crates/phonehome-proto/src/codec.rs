//! Frames as websocket messages: `phonehome.v1` (binary) and `phonehome.v1.json` (text). Both say the same.

pub mod binary;
pub mod json;

use bytes::Bytes;

use crate::{
    frame::{AgentFrame, End, Hello, Record, ServerFrame},
    limits::{MAX_HEAD, MAX_MESSAGE, MAX_PAYLOAD, MAX_RECORDS},
};

/// The websocket subprotocol, which is also the version of the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// `phonehome.v1`: binary messages.
    Binary,
    /// `phonehome.v1.json`: the same frames as JSON text, for tools and other languages.
    Json,
}

/// One websocket message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A binary message.
    Binary(Bytes),
    /// A text message.
    Text(String),
}

impl Codec {
    /// The subprotocol's name (RFC 6455, section 1.9).
    #[must_use]
    pub fn subprotocol(self) -> &'static str {
        match self {
            Self::Binary => "phonehome.v1",
            Self::Json => "phonehome.v1.json",
        }
    }

    /// The first subprotocol of a `Sec-WebSocket-Protocol` header that is spoken here.
    #[must_use]
    pub fn negotiate(offered: &str) -> Option<Self> {
        offered.split(',').find_map(|name| match name.trim() {
            "phonehome.v1" => Some(Self::Binary),
            "phonehome.v1.json" => Some(Self::Json),
            _ => None,
        })
    }

    /// Reads what an agent sent.
    ///
    /// # Errors
    ///
    /// When the message is not one frame of this codec within every limit.
    pub fn decode_agent(self, message: &Message) -> Result<AgentFrame, DecodeError> {
        let frame = match (self, message) {
            (Self::Binary, Message::Binary(wire)) => binary::decode_agent(wire)?,
            (Self::Json, Message::Text(text)) => json::decode_agent(text)?,
            (Self::Binary, Message::Text(_)) | (Self::Json, Message::Binary(_)) => return Err(DecodeError::WrongKind),
        };
        check(&frame)?;
        Ok(frame)
    }

    /// Reads what a server sent.
    ///
    /// # Errors
    ///
    /// When the message is not one frame of this codec within every limit.
    pub fn decode_server(self, message: &Message) -> Result<ServerFrame, DecodeError> {
        match (self, message) {
            (Self::Binary, Message::Binary(wire)) => binary::decode_server(wire),
            (Self::Json, Message::Text(text)) => json::decode_server(text),
            (Self::Binary, Message::Text(_)) | (Self::Json, Message::Binary(_)) => Err(DecodeError::WrongKind),
        }
    }

    /// Writes what an agent says.
    ///
    /// # Errors
    ///
    /// When the frame exceeds a limit.
    pub fn encode_agent(self, frame: &AgentFrame) -> Result<Message, EncodeError> {
        match self {
            Self::Binary => binary::encode_agent(frame).map(Message::Binary),
            Self::Json => json::encode_agent(frame).map(Message::Text),
        }
    }

    /// Writes what a server says.
    ///
    /// # Errors
    ///
    /// When the frame exceeds a limit.
    pub fn encode_server(self, frame: &ServerFrame) -> Result<Message, EncodeError> {
        match self {
            Self::Binary => binary::encode_server(frame).map(Message::Binary),
            Self::Json => json::encode_server(frame).map(Message::Text),
        }
    }
}

/// Limits and checksums that hold in every codec.
fn check(frame: &AgentFrame) -> Result<(), DecodeError> {
    match frame {
        AgentFrame::Hello(hello) => Hello::is_reasonable(hello).then_some(()).ok_or(DecodeError::BadHello),
        AgentFrame::Records(records) => records.iter().try_for_each(check_record),
        AgentFrame::Finished(finished) => match finished.end {
            End::NotStarted { code: 0, .. } => Err(DecodeError::BadEnd),
            End::Exited(_) | End::NotStarted { .. } | End::Signalled { .. } => Ok(()),
        },
        AgentFrame::Pong(_) => Ok(()),
    }
}

fn check_record(record: &Record) -> Result<(), DecodeError> {
    if record.is_intact() { Ok(()) } else { Err(DecodeError::BadChecksum(record.seq)) }
}

/// Why a message is not a frame.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A record's checksum does not agree with its contents.
    #[error("record {0} does not match its checksum")]
    BadChecksum(u64),
    /// A command that never ran, and the code of success.
    #[error("a command that was not started cannot have succeeded")]
    BadEnd,
    /// The fixed part is not one.
    #[error("the head is not a frame of this version")]
    BadHead(#[source] bincode::Error),
    /// A hello with an impossible range or too many or too long labels.
    #[error("hello exceeds a limit")]
    BadHello,
    /// The text is not one.
    #[error("the text is not a frame of this version")]
    BadText(#[source] serde_json::Error),
    /// Lengths in the head and bytes in the message do not add up.
    #[error("the payload is not as long as its records say")]
    BadLength,
    /// The base64 of a record is not base64.
    #[error("record data is not base64")]
    BadBase64(#[source] base64::DecodeError),
    /// More records than [`MAX_RECORDS`], or none.
    #[error("{0} records in one message, 1 to {MAX_RECORDS} are allowed")]
    RecordCount(usize),
    /// The message is larger than [`MAX_MESSAGE`].
    #[error("a message of {0} bytes, at most {MAX_MESSAGE} are allowed")]
    TooLarge(usize),
    /// A record's payload is larger than [`MAX_PAYLOAD`].
    #[error("a record of {0} bytes, at most {MAX_PAYLOAD} are allowed")]
    TooLong(u64),
    /// The message ends within its head.
    #[error("the message is cut short")]
    Truncated,
    /// Text where binary belongs, or the other way round.
    #[error("text and binary messages do not mix in one subprotocol")]
    WrongKind,
}

/// Why a frame cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The fixed part is larger than [`MAX_HEAD`].
    #[error("the head of the frame exceeds {MAX_HEAD} bytes")]
    HeadTooLarge(#[source] bincode::Error),
    /// The message would be larger than [`MAX_MESSAGE`].
    #[error("a message of {0} bytes, at most {MAX_MESSAGE} are allowed")]
    TooLarge(usize),
    /// A value that JSON cannot carry.
    #[error("the frame cannot be written as text")]
    Unwritable(#[source] serde_json::Error),
}
