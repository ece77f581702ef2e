//! A pattern in the command's own output.

use std::{fmt, str::FromStr};

use phonehome_proto::frame::Stream;
use regex::bytes::{Regex, RegexBuilder};
use tokio::sync::oneshot;

use super::ProbeError;

/// A regular expression for one line, without its end. It knows bytes: `.` is any of them, `\w` and the like are ASCII.
#[derive(Debug, Clone)]
pub struct Pattern(Regex);

/// Longest part of a line that is looked at, bytes.
const MAX_LINE: usize = 8 * 1024;

/// Largest compiled pattern, bytes.
const MAX_PATTERN: usize = 1024 * 1024;

impl FromStr for Pattern {
    type Err = ProbeError;

    fn from_str(text: &str) -> Result<Self, ProbeError> {
        let pattern = RegexBuilder::new(text).unicode(false).size_limit(MAX_PATTERN).build();
        pattern.map(Self).map_err(|error| ProbeError::BadPattern(error.to_string()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

/// Looks for the pattern in blocks of output, wherever they are cut. Only whole lines count.
#[derive(Debug)]
pub(crate) struct OutputMatcher {
    pattern: Pattern,
    stdout: Line,
    stderr: Line,
}

/// The start of a line whose end has not come.
#[derive(Debug, Default)]
struct Line {
    /// At most [`MAX_LINE`] bytes.
    start: Vec<u8>,
}

impl OutputMatcher {
    pub(crate) fn new(pattern: Pattern) -> Self {
        Self { pattern, stdout: Line::default(), stderr: Line::default() }
    }

    /// Takes the next block of a stream and says whether it ends a line that matches.
    pub(crate) fn feed(&mut self, stream: Stream, block: &[u8]) -> bool {
        let line = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
            Stream::Event => return false,
        };
        line.feed(block, &self.pattern.0)
    }
}

impl Line {
    fn feed(&mut self, block: &[u8], pattern: &Regex) -> bool {
        for part in block.split_inclusive(|byte| *byte == b'\n') {
            let Some(rest) = part.strip_suffix(b"\n") else {
                self.push(part);
                break;
            };
            let is_match = if self.start.is_empty() {
                pattern.is_match(content(&rest[..rest.len().min(MAX_LINE)]))
            } else {
                self.push(rest);
                let is_match = pattern.is_match(content(&self.start));
                self.start.clear();
                is_match
            };
            if is_match {
                return true;
            }
        }
        false
    }

    fn push(&mut self, part: &[u8]) {
        let room = MAX_LINE - self.start.len();
        self.start.extend_from_slice(&part[..part.len().min(room)]);
    }
}

/// Without the carriage return that a terminal's line has.
fn content(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// Watches the output for whoever waits for the pattern, and costs nothing once it has come.
#[derive(Debug)]
pub(crate) struct OutputWatch {
    matcher: OutputMatcher,
    matched: Option<oneshot::Sender<()>>,
}

impl OutputWatch {
    /// A watch, and what completes with the first match.
    pub(crate) fn new(pattern: Pattern) -> (Self, oneshot::Receiver<()>) {
        let (matched, waiting) = oneshot::channel();
        (Self { matcher: OutputMatcher::new(pattern), matched: Some(matched) }, waiting)
    }

    /// Takes the next block of a stream.
    pub(crate) fn feed(&mut self, stream: Stream, block: &[u8]) {
        if self.matched.is_some()
            && self.matcher.feed(stream, block)
            && let Some(matched) = self.matched.take()
        {
            matched.send(()).unwrap_or_default(); // whoever waited may have given up
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_line_is_found_wherever_its_blocks_are_cut() {
        let text = b"starting\nnot ready\nready: port 80\r\nmore\n";
        for first in 0..text.len() {
            for second in first..text.len() {
                let mut matcher = matcher("^ready: port [0-9]+$");
                let blocks = [&text[..first], &text[first..second], &text[second..]];
                assert!(blocks.iter().any(|block| matcher.feed(Stream::Stdout, block)), "{first} {second}");
            }
        }
    }

    #[test]
    fn streams_are_not_mixed_and_a_line_needs_its_end() {
        let mut matcher = matcher("ready");
        assert!(!matcher.feed(Stream::Stdout, b"rea"));
        assert!(!matcher.feed(Stream::Stderr, b"dy\nrea"));
        assert!(!matcher.feed(Stream::Event, b"ready\n"));
        assert!(!matcher.feed(Stream::Stdout, b"dy"));
        assert!(matcher.feed(Stream::Stdout, b"\n"));
        assert!(matcher.feed(Stream::Stderr, b"dy\n"));
    }

    #[test]
    fn of_a_long_line_the_start_counts_and_the_next_line_is_found() {
        for cut in [0, 1, MAX_LINE - 1, MAX_LINE, MAX_LINE + 1] {
            let mut matcher = matcher("^(x+end|ready)$");
            let mut text = vec![b'x'; 3 * MAX_LINE];
            text.extend_from_slice(b"end\nready\n");
            assert!(!matcher.feed(Stream::Stdout, &text[..cut]));
            assert!(!matcher.feed(Stream::Stdout, &text[cut..3 * MAX_LINE + 4]), "{cut}");
            assert!(matcher.feed(Stream::Stdout, b"ready\n"));
            assert!(matcher.stdout.start.capacity() <= 2 * MAX_LINE);
        }
    }

    #[test]
    fn the_first_match_is_told_once() {
        let (mut watch, mut waiting) = OutputWatch::new("ready".parse().unwrap());
        watch.feed(Stream::Stdout, b"no\n");
        assert!(waiting.try_recv().is_err());
        watch.feed(Stream::Stdout, b"ready\nready\n");
        watch.feed(Stream::Stdout, b"ready\n");
        waiting.try_recv().unwrap();
    }

    #[test]
    fn a_pattern_knows_bytes_and_has_a_limit() {
        assert!(matcher("^gr\u{fc}\u{df}e .$").feed(Stream::Stdout, b"gr\xc3\xbc\xc3\x9fe \xff\n"));
        for bad in ["(", "\\p{Greek}", "(x{1000}){1000}"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(text in "[ab\r\n]{0,60}", cuts in prop::collection::vec(0usize..60, 0..6)) {
            let whole = text.lines().count() > 0
                && text.split_inclusive('\n').any(|line| line == "ab\n" || line == "ab\r\n");
            let mut matcher = matcher("^ab$");
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
            cuts.sort_unstable();
            cuts.push(text.len());
            let mut from = 0;
            let mut found = false;
            for to in cuts {
                found |= matcher.feed(Stream::Stderr, &text.as_bytes()[from..to]);
                from = to;
            }
            prop_assert_eq!(found, whole);
        }
    }

    fn matcher(pattern: &str) -> OutputMatcher {
        OutputMatcher::new(pattern.parse().unwrap())
    }
}
