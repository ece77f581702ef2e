//! The server: receives builds that phone home, stores what they write and says how they ended.
//!
//! `phonehome-server hook` is one use of this library; a receive hook of your own is another. A [`Server`] listens and
//! stores, [`Server::expect`] starts to wait for a build and draws its token, [`ExpectedBuild::log`] reads what was
//! stored from the beginning, however late and however often, and [`ExpectedBuild::verdict`] tells the end.
//!
//! ```
//! use std::time::Duration;
//!
//! use phonehome_server::{Config, Durability, Expected, LogItem, Server};
//!
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! let logs = tempfile::tempdir()?;
//! let config = Config {
//!     listen: "127.0.0.1:0".parse()?,
//!     tls: true,
//!     data: logs.path().to_owned(),
//!     durability: Durability::Os,
//! };
//! let server = Server::spawn(config).await?;
//! let mut expected = Expected::new("build-42".parse()?);
//! expected.clocks.connect = Some(Duration::from_millis(10));
//! let build = server.expect(expected)?;
//!
//! // Hand these to whatever starts the builder.
//! let url = server.url("127.0.0.1", server.local_addr().port());
//! let (token, pin) = (build.token(), server.pin());
//! # let _ = (url, token, pin);
//!
//! let mut log = build.log();
//! while let Some(item) = log.next().await? {
//!     if let LogItem::Record(found) = item {
//!         println!("{} {} bytes", found.step, found.record.payload.len());
//!     }
//! }
//! let verdict = build.verdict().await;
//! assert_eq!(verdict.exit_code(), 124, "nobody phoned home in time");
//! server.shutdown(Duration::from_secs(5)).await;
//! # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
//! ```
//!
//! `examples/receive_hook.rs` is a whole pre-receive hook.

#![cfg_attr(
    not(feature = "http"),
    allow(
        dead_code,
        unused_imports,
        clippy::unused_async,
        reason = "parts of a build and of the store serve the API only"
    )
)]

mod builds;
mod burst;
#[cfg(feature = "http")]
mod catalogue;
#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "cli")]
mod client;
mod connection;
mod declaration;
#[cfg(all(fuzzing, feature = "cli"))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "cli")]
mod hook;
#[cfg(feature = "http")]
mod http;
mod identity;
#[cfg(feature = "http")]
mod keeper;
#[cfg(feature = "http")]
mod lifecycle;
mod listener;
#[cfg_attr(not(feature = "http"), allow(dead_code, reason = "only a standing server tells it"))]
mod meter;
mod object;
mod origin;
#[cfg(feature = "http")]
mod ready;
mod report;
mod retention;
#[cfg(test)]
mod scene;
#[cfg(feature = "http")]
mod secret;
#[cfg(feature = "http")]
mod serve;
mod server;
#[cfg(feature = "http")]
mod stamp;
mod store;
mod strangers;
#[cfg(feature = "http")]
mod summary;
mod tasks;
#[cfg(feature = "http")]
mod tokens;
mod words;

pub use builds::{BuildLog, Clock, Clocks, LogItem, LogRecord, Outcome, StepLog, Verdict};
pub use identity::{ClientAuth, IdentityError, KeySource};
pub use phonehome_proto::{
    frame::{End, Record, Stream, Usage},
    id::{BuildId, Digest, StepName},
};
pub use server::{Config, ExpectError, Expected, ExpectedBuild, Refusals, Server, StartError};
pub use store::Durability;
#[cfg(feature = "http")]
pub use tokens::TokenError;
