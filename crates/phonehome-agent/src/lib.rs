//! The agent: the entrypoint of a builder image.
//!
//! It runs the real build command as its child, captures what it writes, keeps it until the server has it for good,
//! and exits as the command did. [`run()`] is its whole life; the rest is what that leans on.

mod capture;
mod cause;
mod command;
pub mod config;
pub mod console;
pub mod failure;
mod gate;
mod herald;
pub mod install;
pub mod invocation;
mod labels;
mod ledger;
pub mod line;
pub mod log;
mod outbox;
mod probe;
pub mod recorder;
pub mod redact;
mod run;
mod siblings;
mod spool;
mod supervisor;
mod uplink;
mod watch;

pub use cause::leave_message;
pub use command::{Blocked, take_token};
pub use run::run;
pub use siblings::carve_failure;
#[cfg(fuzzing)]
#[doc(hidden)]
pub use spool::fuzzing;
pub use uplink::Delivery;
