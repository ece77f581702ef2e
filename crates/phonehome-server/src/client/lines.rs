//! Lines and server-sent events out of a body that comes in pieces. Pure.

use bytes::{Buf, Bytes, BytesMut};

/// Longest line, bytes: a full record of control characters, each written as `\u0000`, and what goes with it.
const MAX_LINE: usize = 1024 * 1024;

/// A line that is longer than any that is meant for this client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server sent a line of more than {MAX_LINE} bytes")]
pub(crate) struct TooLong;

/// Splits a body into lines.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    buffer: BytesMut,
    /// How much of the buffer is known to hold no end of a line.
    searched: usize,
}

impl Lines {
    pub(crate) fn push(&mut self, block: &[u8]) {
        self.buffer.extend_from_slice(block);
    }

    /// The next complete line without its end, which is `\n` or `\r\n`.
    pub(crate) fn next(&mut self) -> Result<Option<Bytes>, TooLong> {
        let Some(at) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') else {
            self.searched = self.buffer.len();
            return if self.searched > MAX_LINE { Err(TooLong) } else { Ok(None) };
        };
        let mut line = self.buffer.split_to(self.searched + at).freeze();
        self.buffer.advance(1);
        self.searched = 0;
        if line.ends_with(b"\r") {
            line.truncate(line.len() - 1);
        }
        Ok(Some(line))
    }
}

/// One event of a stream of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SseEvent {
    /// What kind it is.
    pub(crate) event: String,
    /// Where to go on after it.
    pub(crate) id: Option<String>,
    pub(crate) data: Vec<u8>,
}

/// Puts server-sent events together (WHATWG HTML, section 9.2.6), as far as an API uses them.
#[derive(Debug, Default)]
pub(crate) struct Sse {
    lines: Lines,
    event: SseEvent,
}

impl Sse {
    pub(crate) fn push(&mut self, block: &[u8]) {
        self.lines.push(block);
    }

    /// The next complete event. One that is cut off by the end of the body is none.
    pub(crate) fn next(&mut self) -> Result<Option<SseEvent>, TooLong> {
        while let Some(line) = self.lines.next()? {
            if line.is_empty() {
                let event = std::mem::take(&mut self.event);
                if event != SseEvent::default() {
                    return Ok(Some(event));
                }
            } else {
                self.field(&line)?;
            }
        }
        Ok(None)
    }

    fn field(&mut self, line: &[u8]) -> Result<(), TooLong> {
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let (name, rest) = line.split_at(colon);
        let value = rest.strip_prefix(b":").unwrap_or(rest);
        let value = value.strip_prefix(b" ").unwrap_or(value);
        let text = || String::from_utf8_lossy(value).into_owned();
        match name {
            b"event" => self.event.event = text(),
            b"id" => self.event.id = Some(text()),
            b"data" if self.event.data.len() + value.len() > MAX_LINE => return Err(TooLong),
            b"data" => {
                if !self.event.data.is_empty() {
                    self.event.data.push(b'\n');
                }
                self.event.data.extend_from_slice(value);
            }
            _ => {} // a comment, which is a heartbeat, or a field of later days
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_whole_however_they_came_in() {
        for size in 1..8 {
            let mut lines = Lines::default();
            let mut found = Vec::new();
            for block in b"one\r\n\ntwo\nrest".chunks(size) {
                lines.push(block);
                while let Some(line) = lines.next().unwrap() {
                    found.push(line);
                }
            }
            assert_eq!(found, ["one", "", "two"], "pieces of {size}");
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut lines = Lines::default();
        let block = [b'x'; 64 * 1024];
        let refused = (0..=16).any(|_| {
            lines.push(&block);
            lines.next() == Err(TooLong)
        });
        assert!(refused);
        let mut sse = Sse::default();
        let refused = (0..=16).any(|_| {
            sse.push(b"data: ");
            sse.push(&block);
            sse.push(b"\n");
            sse.next() == Err(TooLong)
        });
        assert!(refused);
    }

    #[test]
    fn events_are_told_apart_and_heartbeats_and_torn_ones_left_out() {
        let body = b": hello\n\nevent: output\nid: a 1\ndata: {\"x\":\ndata:1}\n\n:beat\n\ndata: 2\n\nevent: end\nda";
        for size in [1, 3, body.len()] {
            let mut sse = Sse::default();
            let mut found = Vec::new();
            for block in body.chunks(size) {
                sse.push(block);
                while let Some(event) = sse.next().unwrap() {
                    found.push(event);
                }
            }
            let first = SseEvent { event: "output".into(), id: Some("a 1".into()), data: b"{\"x\":\n1}".to_vec() };
            let second = SseEvent { event: String::new(), id: None, data: b"2".to_vec() };
            assert_eq!(found, [first, second], "pieces of {size}");
        }
    }
}
