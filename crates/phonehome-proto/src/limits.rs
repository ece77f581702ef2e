//! Every size and interval that both sides share, with its unit and its reason.

use std::time::Duration;

/// Payload of one record, bytes. A pipe's default capacity, so one read fills at most one record.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// One websocket message, bytes. Four full records: large enough that per-message cost vanishes, small enough that a
/// heartbeat never waits long behind one.
pub const MAX_MESSAGE: usize = 256 * 1024;

/// The encoded fixed part of a binary message, bytes: what its 16-bit length prefix can say.
pub const MAX_HEAD: usize = u16::MAX as usize;

/// Records in one message. Keeps the heads of empty or one-byte records well below [`MAX_HEAD`].
pub const MAX_RECORDS: usize = 1024;

/// Records smaller than this in sum are gathered into one message; a larger one travels alone and is not copied.
pub const GATHER: usize = 64 * 1024;

/// What a record costs in a window or a spool beyond its payload, bytes. Bounds the number of one-byte records.
pub const RECORD_COST: u64 = 192;

/// Window of a new connection, bytes of unacknowledged payload plus [`RECORD_COST`] each.
pub const WINDOW: u64 = 1024 * 1024;

/// The largest window a server may grant, bytes. More in flight without an acknowledgement is a protocol error.
pub const MAX_WINDOW: u64 = 8 * 1024 * 1024;

/// The smallest window a server may grant, bytes: one full record always fits.
pub const MIN_WINDOW: u64 = MAX_PAYLOAD as u64 + RECORD_COST;

/// How often the server asks for a sign of life. A quarter of the 60 s after which proxies cut silent connections.
pub const HEARTBEAT: Duration = Duration::from_secs(15);

/// Silence after which a peer is taken for dead: three heartbeats.
pub const DEAD_AFTER: Duration = Duration::from_secs(45);

/// How long an agent may take to say hello once its socket is open.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Shortest upper bound of the random delay before the agent dials again.
pub const BACKOFF_MIN: Duration = Duration::from_millis(250);

/// Longest upper bound of that delay.
pub const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// Longest upper bound while nobody answers at all.
pub const BACKOFF_UNREACHABLE: Duration = Duration::from_secs(2);

/// A connection that lasted this long was healthy: the next delay starts from [`BACKOFF_MIN`] again.
pub const HEALTHY_AFTER: Duration = Duration::from_secs(3);

/// Bytes received since the last acknowledgement that make the next one due at once.
pub const ACK_BYTES: u64 = 256 * 1024;

/// The longest an acknowledgement waits for company.
pub const ACK_DELAY: Duration = Duration::from_millis(5);

/// Labels in a hello.
pub const MAX_LABELS: usize = 128;

/// Key and value of one label together, bytes.
pub const MAX_LABEL: usize = 4096;

/// A reason, error text or version inside a frame, bytes.
pub const MAX_TEXT: usize = 1024;

/// Reason in a websocket close frame, bytes: a control frame carries 125, two are the code (RFC 6455, section 5.5).
pub const MAX_CLOSE_REASON: usize = 123;
