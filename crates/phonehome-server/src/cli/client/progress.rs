//! How far a long piece of work has got, for a person at a terminal; silent everywhere else.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use tokio::time::Instant;

/// A line that is drawn again and again, and gone in the end.
#[derive(Debug)]
pub(super) struct Progress {
    is_watched: bool,
    drawn: Option<Instant>,
}

/// Between two drawings.
const PACE: Duration = Duration::from_millis(100);

/// To the first column, and nothing to the right of it (ECMA-48, 8.3.41).
const ERASE: &str = "\r\x1b[K";

impl Progress {
    pub(super) fn new() -> Self {
        Self { is_watched: io::stderr().is_terminal(), drawn: None }
    }

    /// Shows how far it is, unless that was shown just now.
    pub(super) fn show(&mut self, line: impl FnOnce() -> String) {
        let now = Instant::now();
        if self.is_watched && self.drawn.is_none_or(|drawn| now.duration_since(drawn) >= PACE) {
            self.drawn = Some(now);
            drop(write!(io::stderr(), "{ERASE}{}", line())); // nobody sees it, then
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.drawn.is_some() {
            drop(write!(io::stderr(), "{ERASE}")); // nobody sees it, then
        }
    }
}
