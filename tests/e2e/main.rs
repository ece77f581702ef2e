//! Both programs as users run them: real processes, real sockets, real git, and a network that breaks.
//!
//! Every test has its own server on a port of its own, its own directory, and processes that end with it. Nothing waits
//! for a fixed time: tests wait for what must happen, under one limit, [`harness::PATIENCE`].

#![expect(clippy::unwrap_used, reason = "a test that cannot set its scene up has failed")]
#![expect(clippy::wildcard_enum_match_arm, reason = "what is not expected is a failure, whatever it is")]

mod harness;

mod agent;
mod attempts;
mod clients;
mod delivery;
mod exit_codes;
mod faults;
mod git;
mod hook;
mod isolation;
mod json_client;
mod labels;
mod lifecycle;
mod operations;
mod redaction;
mod refusals;
mod restart;
mod resume;
mod screen;
mod serve;
mod spool;
mod steps;
mod timeouts;
mod trials;
mod trust;
