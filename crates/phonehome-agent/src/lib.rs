//! The agent: the entrypoint of a builder image.
//!
//! It runs the real build command as its child, captures what it writes, keeps it until the server has it for good,
//! and exits as the command did. [`run()`] is its whole life; the rest is what that leans on.

mod capture;
mod command;
pub mod config;
pub mod console;
pub mod failure;
mod herald;
pub mod line;
pub mod log;
mod outbox;
pub mod recorder;
mod run;
mod spool;
mod uplink;

pub use run::run;
#[cfg(fuzzing)]
#[doc(hidden)]
pub use spool::fuzzing;
pub use uplink::Delivery;
