//! The server: receives builds that phone home.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use phonehome_server::{Config, Durability, Expected, Server};
//! # Ok(()) }
//! ```

mod builds;
mod connection;
mod identity;
mod listener;
mod server;
mod store;

pub use builds::{BuildLog, Clock, Clocks, LogItem, LogRecord, Outcome, Verdict};
pub use identity::IdentityError;
pub use phonehome_proto::{
    frame::{End, Record, Stream},
    id::{BuildId, StepName},
};
pub use server::{Config, ExpectError, Expected, ExpectedBuild, Server, StartError};
pub use store::Durability;
