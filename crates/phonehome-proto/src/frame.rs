//! What the two sides say to each other. How it is written as bytes is in [`crate::codec`].

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    id::{Attempt, BuildId, Digest, ProducerId, StepName},
    limits::{MAX_LABEL, MAX_LABELS, RECORD_COST},
    text::shorten,
};

/// Wall-clock time in microseconds since the Unix epoch.
pub type UnixMicros = u64;

/// Where a record's bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stream {
    /// The command's standard output.
    Stdout,
    /// The command's standard error.
    Stderr,
    /// Facts about the build that are not its output: one JSON object per record, see [`crate::event`].
    Event,
}

impl Stream {
    /// Every stream, in the order of its number.
    pub const ALL: [Self; 3] = [Self::Stdout, Self::Stderr, Self::Event];

    /// Number of the stream in files and checksums.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Stdout => 0,
            Self::Stderr => 1,
            Self::Event => 2,
        }
    }

    /// Name of the stream, as JSON has it too.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Event => "event",
        }
    }

    /// The stream with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Whether its bytes are the build's output, and so part of the raw file and the digest.
    #[must_use]
    pub fn is_output(self) -> bool {
        match self {
            Self::Stdout | Self::Stderr => true,
            Self::Event => false,
        }
    }
}

/// The unit of an attempt's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Dense from 0 over all streams of the attempt; given once, when the bytes are read.
    pub seq: u64,
    /// When the bytes were read.
    pub time: UnixMicros,
    /// Where they come from.
    pub stream: Stream,
    /// Position of the first byte in that stream.
    pub offset: u64,
    /// [`checksum`] of the record.
    pub crc: u32,
    /// The bytes, at most [`crate::limits::MAX_PAYLOAD`].
    pub payload: Bytes,
}

impl Record {
    /// Makes a record and its checksum.
    #[must_use]
    pub fn new(seq: u64, time: UnixMicros, stream: Stream, offset: u64, payload: Bytes) -> Self {
        Self { seq, time, stream, offset, crc: checksum(seq, stream, offset, &payload), payload }
    }

    /// What the record counts in a window or a spool, bytes.
    #[must_use]
    pub fn cost(&self) -> u64 {
        self.payload.len() as u64 + RECORD_COST
    }

    /// Whether the checksum agrees with the rest.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        self.crc == checksum(self.seq, self.stream, self.offset, &self.payload)
    }
}

/// CRC-32C (RFC 3720, appendix B.4) of `seq` and `offset` as 8 little-endian bytes each with the stream's number
/// between them, then the payload.
#[must_use]
pub fn checksum(seq: u64, stream: Stream, offset: u64, payload: &[u8]) -> u32 {
    let mut prefix = [0; 17];
    prefix[..8].copy_from_slice(&seq.to_le_bytes());
    prefix[8] = stream.number();
    prefix[9..].copy_from_slice(&offset.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c(&prefix), payload)
}

/// What an agent says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentFrame {
    /// The first frame of every connection.
    Hello(Hello),
    /// One or more consecutive records.
    Records(Vec<Record>),
    /// The end of the attempt's log.
    Finished(Finished),
    /// The answer to [`ServerFrame::Ping`].
    Pong(Pong),
}

/// Who calls, and what it can still send.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// The build this agent belongs to.
    pub build: BuildId,
    /// Its step.
    #[serde(default)]
    pub step: StepName,
    /// The same for every connection of one agent's life.
    pub producer: ProducerId,
    /// The lowest sequence number the agent still holds; equals `next` when it holds none.
    #[serde(default)]
    pub oldest: u64,
    /// The sequence number its next record will get.
    #[serde(default)]
    pub next: u64,
    /// Labels for people and filters.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Name and version of the agent.
    #[serde(default)]
    pub agent: String,
    /// Names of optional abilities; none is defined yet.
    #[serde(default)]
    pub capabilities: Vec<String>,
}

impl Hello {
    /// Whether labels and range keep their limits.
    #[must_use]
    pub fn is_reasonable(&self) -> bool {
        self.oldest <= self.next
            && self.labels.len() <= MAX_LABELS
            && self.labels.iter().all(|(key, value)| !key.is_empty() && key.len() + value.len() <= MAX_LABEL)
    }
}

/// How the command ended and what its log must add up to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Finished {
    /// Records of the attempt: one more than the last sequence number.
    pub next: u64,
    /// Records and bytes per stream.
    pub counts: Counts,
    /// Over stdout and stderr bytes in record order.
    pub digest: Digest,
    /// How the command ended.
    pub end: End,
    /// When it ended.
    pub time: UnixMicros,
    /// What it used, where the system tells.
    #[serde(default)]
    pub usage: Option<Usage>,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum End {
    /// It exited with this code.
    Exited(u8),
    /// It never ran.
    NotStarted {
        /// What the agent exits with: 126, 127 or 143.
        code: u8,
        /// Why.
        reason: String,
    },
    /// A signal ended it.
    Signalled {
        /// The signal's number.
        signal: u8,
        /// Whether it left a core file.
        core: bool,
        /// Whether memory ran out.
        oom: bool,
    },
}

impl End {
    /// The exit code that says the same: a signal is 128 more than its number.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Exited(code) | Self::NotStarted { code, .. } => *code,
            Self::Signalled { signal, .. } => 128u8.saturating_add(*signal),
        }
    }

    /// The same end with a reason that a frame may hold: no longer than [`MAX_TEXT`](crate::limits::MAX_TEXT).
    #[must_use]
    pub fn fitted(mut self) -> Self {
        match &mut self {
            Self::NotStarted { reason, .. } => shorten(reason),
            Self::Exited(_) | Self::Signalled { .. } => {}
        }
        self
    }
}

/// Resources a command used, with all of its descendants that were waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// From start to end, microseconds.
    pub wall: u64,
    /// CPU time in user mode, microseconds.
    pub user: u64,
    /// CPU time in the kernel, microseconds.
    pub system: u64,
    /// Largest resident set of one process, bytes.
    pub max_rss: u64,
}

/// Records and bytes of every stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Of standard output.
    pub stdout: Count,
    /// Of standard error.
    pub stderr: Count,
    /// Of the event stream.
    pub event: Count,
}

impl Counts {
    /// The counts of one stream.
    #[must_use]
    pub fn of(&self, stream: Stream) -> Count {
        match stream {
            Stream::Stdout => self.stdout,
            Stream::Stderr => self.stderr,
            Stream::Event => self.event,
        }
    }

    pub(crate) fn of_mut(&mut self, stream: Stream) -> &mut Count {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
            Stream::Event => &mut self.event,
        }
    }

    /// Bytes of standard output and standard error together.
    #[must_use]
    pub fn output_bytes(&self) -> u64 {
        self.stdout.bytes.saturating_add(self.stderr.bytes)
    }

    /// Records of all streams.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.stdout.records.saturating_add(self.stderr.records).saturating_add(self.event.records)
    }
}

/// Records and bytes of one stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Count {
    /// Records carried.
    pub records: u64,
    /// Payload bytes carried.
    pub bytes: u64,
}

/// A sign of life that tells silent from lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pong {
    /// The id of the ping.
    pub id: u64,
    /// What the command does.
    pub command: CommandState,
    /// Age of its last output, milliseconds; of its start when it wrote nothing yet.
    pub quiet: u64,
    /// Bytes the agent holds and has not seen acknowledged.
    pub held: u64,
}

/// What the wrapped command does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CommandState {
    /// Not started yet.
    Waiting,
    /// Alive.
    Running,
    /// Ended; the agent delivers the rest.
    Ended,
}

/// What a server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerFrame {
    /// The answer to a hello.
    Welcome(Welcome),
    /// What is durable now.
    Ack(Ack),
    /// Stop the command.
    Cancel(Cancel),
    /// The answer to FINISHED.
    FinishedAck(FinishedAck),
    /// Reconnect soon: this server is about to go.
    Drain(Drain),
    /// Asks for a sign of life.
    Ping(Ping),
}

/// What the server knows of the attempt and promises for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Welcome {
    /// The attempt this agent is.
    pub attempt: Attempt,
    /// Everything below is durable: send from here.
    pub next: u64,
    /// What an acknowledgement means here.
    pub durable: Durable,
    /// Bytes that may be in flight, see [`crate::limits::WINDOW`].
    pub window: u64,
    /// Interval of the server's pings, milliseconds.
    pub heartbeat: u64,
    /// Largest record payload it takes, bytes.
    pub max_payload: u32,
    /// Largest message it takes, bytes.
    pub max_message: u32,
    /// A cancel from before this connection.
    pub cancel: Option<Cancel>,
    /// Name and version of the server.
    pub server: String,
    /// Names of optional abilities; none is defined yet.
    pub capabilities: Vec<String>,
}

/// What outlives what, once acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durable {
    /// The server process: bytes are with its operating system.
    Memory,
    /// A crash of the server's machine: bytes are synced.
    Fsync,
    /// The loss of a minority of machines.
    Quorum,
}

/// Cumulative acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ack {
    /// Everything below is durable as [`Welcome::durable`] said.
    pub next: u64,
    /// Bytes that may be in flight from now on.
    pub window: u64,
}

/// An order to end the command: TERM to its process group, KILL after the grace period.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cancel {
    /// Why, for people.
    pub reason: String,
    /// Between TERM and KILL, milliseconds.
    pub grace: u64,
}

/// What became of FINISHED.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FinishedAck {
    /// Accepted: counts and digest agree with what is stored.
    Complete,
    /// Accepted, but something is missing, and this is what.
    Incomplete(String),
    /// Not accepted: everything below is durable, send from here, then FINISHED again.
    Resume(u64),
}

/// Reconnect soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// The connection stays open at most this much longer, milliseconds.
    pub within: u64,
}

/// Asks for a [`Pong`] with the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ping {
    /// Comes back in the answer.
    pub id: u64,
}
