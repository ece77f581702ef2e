//! Talking to a standing server: what the client commands and `hook --via` stand on.

pub(crate) mod base;
#[cfg(test)]
pub(crate) mod canned;
pub(crate) mod http;
pub(crate) mod lines;
pub(crate) mod model;
pub(crate) mod problem;
pub(crate) mod remote_log;
pub(crate) mod retry;
pub(crate) mod settings;
