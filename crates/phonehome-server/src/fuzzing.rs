//! What the programs in `tests/fuzz` may see of the inside. It exists only under `--cfg fuzzing`, is no part of the
//! library and follows the code that it opens up: a thin wrapper for each.

use std::time::{Duration, Instant};

use crate::hook::render::{self, LinePrinter, Sanitizer, Style};
pub use crate::store::fuzzing::{ENTRY, Stored, StoredItem, decode_entry, entry_of, entry_of_lost, store, survey};

/// The safe form of a whole stream that arrived in these pieces, without the lines' part of it.
pub fn sanitize<'a>(color: bool, pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let (mut sanitizer, mut out) = (Sanitizer::new(color), Vec::new());
    pieces.into_iter().for_each(|piece| sanitizer.push(piece, &mut out));
    sanitizer.finish(&mut out);
    out
}

/// The safe form of one stream, lines included, with a clock of its own.
pub struct SafeForm {
    sanitizer: Sanitizer,
    lines: LinePrinter,
    now: Instant,
}

impl SafeForm {
    /// At the start of a stream.
    #[must_use]
    pub fn new(color: bool, sideband: bool, prefix: &str) -> Self {
        let style = if sideband { Style::Sideband } else { Style::Terminal };
        let now = tokio::time::Instant::now().into_std(); // an arbitrary origin; only differences are used
        Self { sanitizer: Sanitizer::new(color), lines: LinePrinter::new(style, prefix), now }
    }

    /// Bytes of the build.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let mut clean = Vec::new();
        self.sanitizer.push(bytes, &mut clean);
        self.lines.push(&clean, self.now, out);
    }

    /// Time passes, with every timeout when it is due.
    ///
    /// # Panics
    ///
    /// When a timer is due again at once.
    pub fn wait(&mut self, time: Duration, out: &mut Vec<u8>) {
        let until = self.now + time;
        while let Some(at) = self.lines.poll_timeout().filter(|&at| at <= until) {
            self.lines.handle_timeout(at, out);
            assert!(self.lines.poll_timeout().is_none_or(|next| next > at), "a timer spins");
        }
        self.now = until;
    }

    /// Others are about to write.
    pub fn interrupt(&mut self, out: &mut Vec<u8>) {
        self.lines.interrupt(out);
    }

    /// The stream is at its end.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        let mut clean = Vec::new();
        self.sanitizer.finish(&mut clean);
        self.lines.push(&clean, self.now, out);
        self.lines.finish(out);
    }
}

/// Whether a terminal would go on in another colour or attribute than its own.
#[must_use]
pub fn leaves_color(output: &[u8]) -> bool {
    render::leaves_color(output)
}
