//! What crosses the wire between an agent and a server, and the state machines that make it exact.
//!
//! Everything here is a plain value: bytes or frames and the time go in, frames and orders come out. No socket, no
//! task, no clock. The wire as a document for authors of other agents is `docs/wire.md`; its bytes are frozen by
//! `vectors/v1.json` in this crate.

pub mod attempts;
pub mod backoff;
pub mod close;
pub mod codec;
pub mod event;
pub mod frame;
pub mod heartbeat;
pub mod id;
pub mod limits;
pub mod receiver;
pub mod sender;
pub mod signal;
pub mod tally;
pub mod text;
