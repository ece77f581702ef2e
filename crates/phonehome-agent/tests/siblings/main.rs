//! Containers of a pod as plain processes that share a directory: who waits for whom, and who ends with whom. No server is
//! needed for that.

#![expect(clippy::unwrap_used, reason = "a test that cannot set its scene up has failed")]

mod births;
mod deaths;
mod examples;
mod graveyard;
mod readiness;
mod support;
