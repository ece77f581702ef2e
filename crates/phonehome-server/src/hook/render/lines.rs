//! One stream's lines on a display that others write to as well: what is written when.
//!
//! ```text
//! Clean --partial line--> Open          (terminal: the row holds the start of the line, the rest is appended)
//!   |                       |
//!   |                      \r
//!   |                       v
//!   +------progress------> Drawn        (the row holds a state of the line that the next one replaces)
//!   |
//!   +--more than 8 KiB---> Long         (sent as it comes, never replaced)
//!
//! \n or an interrupt leads back to Clean from everywhere
//! ```
//!
//! The sideband has no Open: git shows a partial line only as `text\r`, which is Drawn.
//!
//! An interrupt in a terminal keeps what the row holds as a line and goes on below it. Under the sideband it wipes the
//! row with ` \r` and draws it again a second later. That loses nothing, since a line that was shown in part is still
//! here and is written whole when it ends; and no line is torn, as it would be by a `\n` in its middle. The wipe is for
//! an empty line, for which git clears nothing.
//!
//! Whatever is written ends without colour, so nobody inherits one, not even from a hook that is killed.

use std::time::{Duration, Instant};

use super::{ATTRIBUTES, MAX_SGR, RESET, Sgr, Style, find};

/// Writes the lines of one (step, stream).
#[derive(Debug)]
pub(crate) struct LinePrinter {
    style: Style,
    prefix: Vec<u8>,
    row: Row,
    /// Text since the last `\r` or `\n`, but for what an open row holds. It starts with the colours in force there.
    line: Vec<u8>,
    /// The last state of the line that a `\r` ended, without open colours; it stands until there is another.
    progress: Vec<u8>,
    /// Whether `progress` is yet to be drawn.
    progress_due: bool,
    /// When the part of `line` arrived that is yet to be shown.
    unshown: Option<Unshown>,
    /// Whether a part of this line was kept above, so that its end alone needs no line.
    continued: bool,
    /// Whether this line is drawn at the pace of progress from now on.
    paced: bool,
    /// When something was last shown that is not a complete line.
    last_draw: Option<Instant>,
    /// Colours in force after everything that was pushed.
    sgr: Sgr,
}

/// What the row under the cursor holds of this stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Row {
    /// Nothing.
    Clean,
    /// Text that the next drawing replaces.
    Drawn,
    /// The start of the line, which goes on behind it. Not under the sideband.
    Open,
    /// The start of a line that was too long to keep. git shows it when it ends.
    Long,
}

/// How long a part of the line has been waiting to be shown.
#[derive(Debug, Clone, Copy)]
struct Unshown {
    /// When its first byte arrived.
    since: Instant,
    /// When its last byte arrived.
    last: Instant,
}

impl LinePrinter {
    /// At the start of a stream. `prefix` comes before each line and is safe to print.
    pub(crate) fn new(style: Style, prefix: impl Into<Vec<u8>>) -> Self {
        Self {
            style,
            prefix: prefix.into(),
            row: Row::Clean,
            line: Vec::new(),
            progress: Vec::new(),
            progress_due: false,
            unshown: None,
            continued: false,
            paced: false,
            last_draw: None,
            sgr: Sgr::default(),
        }
    }

    /// Takes what one push of a [`Sanitizer`](super::Sanitizer) passed on: whole characters, whole colours.
    pub(crate) fn push(&mut self, bytes: &[u8], now: Instant, out: &mut Vec<u8>) {
        let mut rest = bytes;
        while let Some(&byte) = rest.first() {
            let used = match byte {
                b'\r' => self.carriage_return(rest, out),
                ESC => self.color(rest, now, out),
                _ => self.text(rest, now, out),
            };
            rest = &rest[used..];
        }
        self.handle_timeout(now, out);
    }

    /// When to call [`Self::handle_timeout`], if nothing arrives before.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let progress_at = self.pace().filter(|_| self.progress_due);
        [self.line_at(), progress_at].into_iter().flatten().min()
    }

    /// Draws what is due.
    pub(crate) fn handle_timeout(&mut self, now: Instant, out: &mut Vec<u8>) {
        if self.line_at().is_some_and(|at| at <= now) {
            self.draw_line(now, out);
        } else if self.progress_due && self.pace().is_none_or(|at| at <= now) {
            self.draw_progress(now, out);
        }
    }

    /// Leaves the row to somebody else, who is about to write at its start and to end with `\n`.
    pub(crate) fn interrupt(&mut self, out: &mut Vec<u8>) {
        match (self.row, self.style) {
            (Row::Clean, _) => {}
            (Row::Drawn, Style::Sideband) => {
                out.extend_from_slice(WIPE);
                self.show_again();
            }
            (Row::Drawn | Row::Open | Row::Long, _) => self.keep_row(out),
        }
        self.row = Row::Clean;
    }

    /// Ends the stream: everything is shown, the last line is ended.
    pub(crate) fn finish(&mut self, out: &mut Vec<u8>) {
        if self.row != Row::Clean || !self.line.is_empty() || !self.progress.is_empty() {
            self.end_line(out);
        }
        self.continued = false;
        self.sgr = Sgr::default();
    }

    /// Takes a `\r` or `\r\n` from `rest` and says how many bytes that was, as the next two do.
    fn carriage_return(&mut self, rest: &[u8], out: &mut Vec<u8>) -> usize {
        if rest.get(1) == Some(&b'\n') {
            self.end_line(out);
            return 2;
        }
        self.end_state(out);
        1
    }

    /// Takes a colour.
    fn color(&mut self, rest: &[u8], now: Instant, out: &mut Vec<u8>) -> usize {
        let Some(sequence) = Sgr::prefix_of(rest) else {
            return self.text(rest, now, out); // no sanitizer lets this through
        };
        if !self.line.is_empty() {
            if self.fits(sequence) {
                self.line.extend_from_slice(sequence);
            } else {
                self.pass_on(b"", out);
            }
        }
        self.sgr.apply(sequence); // an empty line starts with it once it has text
        sequence.len()
    }

    /// Takes text up to the next `\r` or colour, which may be many lines.
    fn text(&mut self, rest: &[u8], now: Instant, out: &mut Vec<u8>) -> usize {
        let run = 1 + find(&rest[1..], |byte| (byte == b'\r') | (byte == ESC));
        let text = &rest[..run];
        let complete = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        self.lines(&text[..complete], now, out);
        self.add(&text[complete..], now, out);
        run
    }

    /// Ends the current line with the first of these and writes the others straight through.
    fn lines(&mut self, mut lines: &[u8], now: Instant, out: &mut Vec<u8>) {
        if !lines.is_empty() && !self.is_at_start() {
            let end = find(lines, |byte| byte == b'\n');
            self.add(&lines[..end], now, out);
            self.end_line(out);
            lines = &lines[end + 1..];
        }
        if self.prefix.is_empty() && !self.sgr.is_open() {
            return out.extend_from_slice(lines);
        }
        for line in lines.split_inclusive(|&byte| byte == b'\n') {
            self.whole_line(&line[..line.len() - 1], out);
        }
    }

    /// Whether the next line owes nothing to what came before it.
    fn is_at_start(&self) -> bool {
        self.row == Row::Clean && self.line.is_empty() && self.progress.is_empty() && !self.continued && !self.paced
    }

    /// Writes a line that was never kept.
    fn whole_line(&self, text: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(&self.prefix);
        if !text.is_empty() {
            self.sgr.restore(out);
            out.extend_from_slice(text);
            self.sgr.close(out);
        }
        out.push(b'\n');
    }

    /// Adds text to the current line.
    fn add(&mut self, text: &[u8], now: Instant, out: &mut Vec<u8>) {
        if text.is_empty() {
            return;
        }
        if self.row == Row::Long || !self.fits(text) {
            return self.pass_on(text, out);
        }
        if self.line.is_empty() {
            self.sgr.restore(&mut self.line);
        }
        self.line.extend_from_slice(text);
        self.unshown.get_or_insert(Unshown { since: now, last: now }).last = now;
    }

    /// Whether the line, its colours and their end stay within [`MAX_LINE`] with this.
    fn fits(&self, more: &[u8]) -> bool {
        self.line.len() + more.len() <= MAX_LINE - MAX_COLORS
    }

    /// Sends a line that is too long to keep.
    fn pass_on(&mut self, text: &[u8], out: &mut Vec<u8>) {
        self.begin(out);
        if self.line.is_empty() {
            self.sgr.restore(out);
        }
        out.append(&mut self.line);
        out.extend_from_slice(text);
        self.sgr.close(out);
        self.erase(out);
        self.row = Row::Long;
        self.forget_progress();
        self.unshown = None;
    }

    /// A lone `\r`: what follows replaces what the line was, if anything does.
    fn end_state(&mut self, out: &mut Vec<u8>) {
        self.paced = true;
        match self.row {
            Row::Long => self.keep_row(out),
            Row::Open => {
                self.write_line(out);
                self.row = Row::Drawn;
            }
            Row::Clean | Row::Drawn if !self.line.is_empty() => {
                self.sgr.close(&mut self.line);
                std::mem::swap(&mut self.line, &mut self.progress);
                self.progress_due = self.unshown.is_some();
            }
            Row::Clean | Row::Drawn => {}
        }
        self.line.clear();
        self.unshown = None;
    }

    /// A `\n`: the latest state of the line is its final one.
    fn end_line(&mut self, out: &mut Vec<u8>) {
        match (self.row, self.style) {
            (Row::Open | Row::Long, _) => self.write_line(out),
            (Row::Drawn, Style::Terminal) if self.line.is_empty() && !self.progress_due => {}
            (Row::Clean, _) if self.continued && self.line.is_empty() && self.progress.is_empty() => {
                return self.start_line();
            }
            (Row::Clean | Row::Drawn, _) => {
                self.begin(out);
                self.write_line(out);
                self.erase(out);
            }
        }
        out.push(b'\n');
        self.start_line();
    }

    /// Forgets the line that has ended.
    fn start_line(&mut self) {
        self.row = Row::Clean;
        self.line.clear();
        self.forget_progress();
        self.unshown = None;
        self.continued = false;
        self.paced = false;
    }

    /// Shows the start of a line that may not end soon.
    fn draw_line(&mut self, now: Instant, out: &mut Vec<u8>) {
        self.begin(out);
        self.write_line(out);
        self.erase(out);
        match self.style {
            Style::Terminal => {
                self.line.clear();
                self.row = Row::Open;
            }
            Style::Sideband => {
                out.push(b'\r');
                self.row = Row::Drawn;
            }
        }
        self.forget_progress();
        self.unshown = None;
        self.drawn(now);
    }

    /// Shows the last state that a `\r` ended.
    fn draw_progress(&mut self, now: Instant, out: &mut Vec<u8>) {
        self.row = Row::Drawn;
        self.begin(out);
        out.extend_from_slice(&self.progress);
        self.erase(out);
        if self.style == Style::Sideband {
            out.push(b'\r');
        }
        self.progress_due = false;
        self.drawn(now);
    }

    /// From now on this line waits its turn.
    fn drawn(&mut self, now: Instant) {
        self.paced = true;
        self.last_draw = Some(now);
    }

    /// Goes to where the line's text belongs.
    fn begin(&self, out: &mut Vec<u8>) {
        match (self.row, self.style) {
            (Row::Open | Row::Long, _) => return,
            (Row::Drawn, Style::Terminal) => out.push(b'\r'),
            (Row::Drawn, Style::Sideband) | (Row::Clean, _) => {}
        }
        out.extend_from_slice(&self.prefix);
    }

    /// Writes the latest state of the line, as far as the row does not hold it.
    fn write_line(&self, out: &mut Vec<u8>) {
        if self.line.is_empty() {
            return out.extend_from_slice(&self.progress);
        }
        out.extend_from_slice(&self.line);
        self.sgr.close(out);
    }

    /// Removes what is left of a longer drawing; git does it by itself.
    fn erase(&self, out: &mut Vec<u8>) {
        if (self.row, self.style) == (Row::Drawn, Style::Terminal) {
            out.extend_from_slice(ERASE);
        }
    }

    /// Makes what the row holds a line of its own; what follows of the line goes below it.
    fn keep_row(&mut self, out: &mut Vec<u8>) {
        out.push(b'\n');
        self.row = Row::Clean;
        self.continued = true;
        if !self.progress_due {
            self.progress.clear();
        }
    }

    /// Whatever was drawn is no longer on the screen.
    fn show_again(&mut self) {
        self.progress_due = !self.progress.is_empty();
        if !self.line.is_empty() {
            self.unshown = self.unshown.or(self.last_draw.map(|at| Unshown { since: at, last: at }));
        }
    }

    /// Something newer stands in the place of the last state.
    fn forget_progress(&mut self) {
        self.progress.clear();
        self.progress_due = false;
    }

    /// When the start of the line is to be shown.
    fn line_at(&self) -> Option<Instant> {
        let Unshown { since, last } = self.unshown?;
        let quiet = (last + QUIET).min(since + PACE);
        Some(self.pace().filter(|_| self.paced).map_or(quiet, |pace| pace.max(quiet)))
    }

    /// When the next drawing is allowed; `None` before the first.
    fn pace(&self) -> Option<Instant> {
        self.last_draw.map(|at| at + PACE)
    }
}

/// Starts a colour; nothing else gets here.
const ESC: u8 = 0x1b;

/// Clears from the cursor to the end of the row.
const ERASE: &[u8] = b"\x1b[K";

/// Has git clear the row: it does so behind any text, but not for an empty line.
const WIPE: &[u8] = b" \r";

/// Silence after which a partial line is shown: long enough for the rest of a line that was written in two halves.
const QUIET: Duration = Duration::from_millis(200);

/// Time between two drawings of the same line: a network carries each, and some displays keep each as a line.
const PACE: Duration = Duration::from_secs(1);

/// Most bytes of a line that are kept to be drawn again, with its colours. A longer line is no progress.
const MAX_LINE: usize = 8 << 10;

/// Room for colours before the text of a line, and for their end behind it.
const MAX_COLORS: usize = ATTRIBUTES * MAX_SGR + RESET.len();

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn complete_lines_go_out_at_once_with_their_prefix() {
        for style in BOTH {
            let mut run = Run::new(style, "[test] ");
            assert_eq!(run.push("one\ntwo\r\n\nthr"), "[test] one\n[test] two\n[test] \n");
            assert_eq!(run.push("ee\n"), "[test] three\n");
            assert_eq!(run.finish(), "");
        }
    }

    #[test]
    fn many_lines_without_a_prefix_pass_untouched() {
        let mut run = Run::new(Style::Sideband, "");
        assert_eq!(run.push("a\n\n\nb\nrest"), "a\n\n\nb\n");
        assert_eq!(run.finish(), "rest\n");
    }

    #[test]
    fn crlf_is_one_line_end_even_when_it_is_cut() {
        let mut run = Run::new(Style::Terminal, "");
        assert_eq!(run.push("one\r\n\r\ntwo\r"), "one\n\n\rtwo\x1b[K");
        assert_eq!(run.push("\n"), "\n");
        let mut run = Run::new(Style::Sideband, "");
        assert_eq!(run.push("one\r"), "one\r");
        assert_eq!(run.push("\n"), "one\n");
    }

    #[test]
    fn progress_is_drawn_at_once_and_then_once_a_second() {
        for (style, draw) in [(Style::Terminal, "\r10%\x1b[K"), (Style::Sideband, "10%\r")] {
            let mut run = Run::new(style, "");
            let drawn = |percent: &str| draw.replace("10%", percent);
            assert_eq!(run.push("10%\r"), draw);
            assert_eq!(run.push("20%\r") + &run.push("30%\r"), "");
            assert_eq!(run.wait(999), "");
            assert_eq!(run.wait(1), drawn("30%"));
            assert_eq!(run.push("40%\r50%\r"), "");
            let (last, end) = (run.push("done\n"), if style == Style::Terminal { "\rdone\x1b[K\n" } else { "done\n" });
            assert_eq!(last, end);
            assert_eq!(run.wait(5000), "");
        }
    }

    #[test]
    fn progress_at_any_rate_costs_one_drawing_a_second() {
        for style in BOTH {
            let mut run = Run::new(style, "");
            let drawings: usize = (0..1000)
                .map(|n| {
                    let output = run.push(&format!("{n}\r")) + &run.wait(10);
                    output.matches('\r').count()
                })
                .sum();
            assert_eq!(drawings, 11);
        }
    }

    #[test]
    fn progress_that_starts_with_the_return_is_shown_too() {
        let mut run = Run::new(Style::Terminal, "");
        assert_eq!(run.push("\r10%"), "");
        assert_eq!(run.push("\r20%"), "\r10%\x1b[K");
        assert_eq!(run.wait(1000), "\r20%\x1b[K");
        assert_eq!(run.push("\n"), "\n");
        let mut run = Run::new(Style::Sideband, "");
        assert_eq!(run.push("\r10%") + &run.push("\r20%"), "10%\r");
        assert_eq!(run.wait(1000), "20%\r");
        assert_eq!(run.push("\n"), "20%\n");
    }

    #[test]
    fn progress_on_a_new_line_waits_its_turn_too() {
        let mut run = Run::new(Style::Sideband, "");
        assert_eq!(run.push("9%\r") + &run.push("\n"), "9%\r9%\n");
        assert_eq!(run.push("\r1%") + &run.wait(999), "");
        assert_eq!(run.wait(1), "1%\r");
    }

    #[test]
    fn what_is_shown_already_is_not_drawn_again() {
        let mut run = Run::new(Style::Sideband, "");
        assert_eq!(run.push("10%") + &run.wait(200), "10%\r");
        assert_eq!(run.push("\r") + &run.wait(5000), "");
    }

    #[test]
    fn a_half_written_state_is_not_shown_while_it_is_written() {
        let mut run = Run::new(Style::Sideband, "");
        assert_eq!(run.push("10%\r20%\r"), "20%\r");
        assert_eq!(run.push("30%\r") + &run.wait(950) + &run.push("4"), "");
        assert_eq!(run.wait(50), "30%\r");
        assert_eq!(run.push("0%\r") + &run.wait(1000), "40%\r");
    }

    #[test]
    fn the_final_state_is_shown_even_when_it_was_throttled() {
        for (style, end) in [(Style::Terminal, "\r99%\x1b[K\n"), (Style::Sideband, "99%\n")] {
            let mut run = Run::new(style, "");
            run.push("1%\r");
            assert_eq!(run.push("99%\r") + &run.push("\r\n") + &run.wait(1000), end);
            run.push("1%\r");
            run.push("99%\r");
            assert_eq!(run.finish(), end);
        }
    }

    #[test]
    fn a_partial_line_appears_after_200_ms_and_goes_on_in_a_terminal() {
        let mut run = Run::new(Style::Terminal, "[t] ");
        assert_eq!(run.push("test a ") + &run.wait(199) + &run.push("... ") + &run.wait(199), "");
        assert_eq!(run.wait(1), "[t] test a ... ");
        assert_eq!(run.push("ok\nnext"), "ok\n");
        assert_eq!(run.wait(200), "[t] next");
    }

    #[test]
    fn a_partial_line_appears_after_200_ms_and_is_repeated_under_the_sideband() {
        let mut run = Run::new(Style::Sideband, "[t] ");
        assert_eq!(run.push("test a ... ") + &run.wait(200), "[t] test a ... \r");
        assert_eq!(run.wait(60_000), "");
        assert_eq!(run.push("ok\nnext"), "[t] test a ... ok\n");
        assert_eq!(run.wait(200), "[t] next\r");
    }

    #[test]
    fn a_line_that_keeps_growing_is_shown_once_a_second() {
        for (style, shown) in [
            (Style::Terminal, ["..........", ".........."]),
            (Style::Sideband, ["..........\r", "....................\r"]),
        ] {
            let mut run = Run::new(style, "");
            let mut dots = || (0..10).map(|_| run.push(".") + &run.wait(100)).collect::<String>();
            assert_eq!([dots(), dots()], shown);
        }
    }

    #[test]
    fn an_interrupt_in_a_terminal_keeps_what_is_shown_and_repeats_nothing() {
        let mut run = Run::new(Style::Terminal, "[t] ");
        assert_eq!(run.interrupt() + &run.push("held") + &run.interrupt(), "");
        assert_eq!(run.wait(200) + &run.interrupt() + &run.interrupt(), "[t] held\n");
        assert_eq!(run.push(" back\n"), "[t]  back\n");
        assert_eq!(run.push("whole") + &run.wait(200) + &run.interrupt(), "[t] whole\n");
        assert_eq!(run.push("\n"), "");
        assert_eq!(run.push("\n"), "[t] \n");
        assert_eq!(run.wait(1000) + &run.push("10%\r") + &run.interrupt(), "\r[t] 10%\x1b[K\n");
        assert_eq!(run.finish(), "");
    }

    #[test]
    fn an_interrupt_keeps_progress_that_is_yet_to_be_drawn() {
        let mut run = Run::new(Style::Terminal, "");
        assert_eq!(run.push("10%\r") + &run.push("20%\r") + &run.interrupt(), "\r10%\x1b[K\n");
        assert_eq!(run.wait(1000), "\r20%\x1b[K");
        assert_eq!(run.push("\n"), "\n");
    }

    #[test]
    fn an_interrupt_under_the_sideband_wipes_the_row_and_draws_it_again() {
        let mut run = Run::new(Style::Sideband, "");
        assert_eq!(run.push("held") + &run.interrupt(), "");
        assert_eq!(run.wait(200) + &run.interrupt() + &run.interrupt(), "held\r \r");
        assert_eq!(run.wait(999), "");
        assert_eq!(run.wait(1), "held\r");
        assert_eq!(run.interrupt() + &run.push(" back\n"), " \rheld back\n");
        assert_eq!(run.wait(1000) + &run.push("10%\r") + &run.interrupt() + &run.wait(1000), "10%\r \r10%\r");
        assert_eq!(run.interrupt() + &run.finish(), " \r10%\n");
    }

    #[test]
    fn colours_end_with_the_line_and_come_back_on_the_next() {
        for style in BOTH {
            let mut run = Run::new(style, "[t] ");
            assert_eq!(run.push("\x1b[31mred\n"), "[t] \x1b[31mred\x1b[0m\n");
            assert_eq!(run.push("\n"), "[t] \n");
            assert_eq!(run.push("still\x1b[0m not\n"), "[t] \x1b[31mstill\x1b[0m not\n");
            assert_eq!(run.push("plain\n"), "[t] plain\n");
        }
    }

    #[test]
    fn colours_end_with_whatever_is_shown() {
        let mut run = Run::new(Style::Terminal, "");
        assert_eq!(run.push("\x1b[31mred") + &run.wait(200), "\x1b[31mred\x1b[0m");
        assert_eq!(run.push(" too\x1b[39m.\n"), "\x1b[31m too\x1b[39m.\n");
        assert_eq!(run.wait(1000) + &run.push("\x1b[1mbold\rbolder\r"), "\r\x1b[1mbolder\x1b[0m\x1b[K");
        let mut run = Run::new(Style::Sideband, "");
        assert_eq!(run.push("\x1b[31mred") + &run.wait(200), "\x1b[31mred\x1b[0m\r");
    }

    #[test]
    fn a_return_followed_by_a_colour_alone_leaves_the_state() {
        let mut run = Run::new(Style::Sideband, "");
        assert_eq!(run.push("\x1b[32mdone\r\x1b[0m\n"), "\x1b[32mdone\x1b[0m\n");
        assert_eq!(run.push("next\n"), "next\n");
    }

    #[test]
    fn a_very_long_line_is_passed_on_in_pieces() {
        let long = "x".repeat(3000);
        for style in BOTH {
            let mut run = Run::new(style, "[t] ");
            assert_eq!(run.push(&long) + &run.push(&long), "");
            assert_eq!(run.push(&long), format!("[t] {}", long.repeat(3)));
            assert_eq!(run.push("y") + &run.wait(10_000), "y");
            assert_eq!(run.interrupt() + &run.push("z\nnext\n"), "\n[t] z\n[t] next\n");
            assert_eq!(run.push(&long.repeat(3)) + &run.interrupt(), format!("[t] {}\n", long.repeat(3)));
            assert_eq!(run.push("\nnext\n"), "[t] next\n");
        }
    }

    #[test]
    fn a_very_long_line_is_never_overwritten() {
        for style in BOTH {
            let mut run = Run::new(style, "");
            let long = "x".repeat(MAX_LINE);
            assert_eq!(run.push("10%\r").matches("10%").count(), 1);
            assert_eq!(run.push("20%\r"), "");
            assert!(run.push(&long).contains(&long));
            assert_eq!(run.wait(5000), "");
            assert_eq!(run.push("\r"), "\n");
            assert_eq!(run.push("\n50%\n"), "50%\n");
        }
    }

    #[test]
    fn a_flood_of_colours_is_passed_on_too() {
        let mut run = Run::new(Style::Terminal, "");
        let flood = format!("a{}b\n", "\x1b[0m\x1b[1;44m\x1b[31m".repeat(2000));
        let output = run.push(&flood);
        assert!(output.starts_with("a\x1b[0m") && output.ends_with("\x1b[1m\x1b[31m\x1b[44mb\x1b[0m\n"));
    }

    #[test]
    fn an_escape_that_no_sanitizer_lets_through_is_mere_text() {
        let mut run = Run::new(Style::Terminal, "");
        assert_eq!(run.push("a\x1b[31\nb\x1b"), "a\x1b[31\n");
        assert_eq!(run.finish(), "b\x1b\n");
    }

    #[test]
    fn the_first_drawing_of_a_line_does_not_wait_for_the_last_of_another() {
        let mut run = Run::new(Style::Terminal, "");
        assert_eq!(run.push("9%\r"), "\r9%\x1b[K");
        assert_eq!(run.push("\n\rstart\npart") + &run.wait(200), "\nstart\npart");
        assert_eq!(run.push("\nmore") + &run.wait(200), "\nmore");
    }

    proptest! {
        #[test]
        fn the_final_screen_is_the_plain_text(
            steps in steps(&SHORT),
            style in style(),
            prefix in prefix(),
            packet in 1..40_usize,
        ) {
            let rows = Show::new(style, prefix, packet).play(&steps);
            prop_assert_eq!(rows, expected(&steps));
        }

        #[test]
        fn under_the_sideband_no_line_is_torn_by_others(
            steps in interrupted(&SHORT),
            prefix in prefix(),
            packet in 1..40_usize,
        ) {
            let rows = Show::new(Style::Sideband, prefix, packet).play(&steps);
            prop_assert_eq!(rows, expected(&steps));
        }

        #[test]
        fn in_a_terminal_the_last_state_survives_others(steps in interrupted(&SHORT)) {
            let mut rows = Show::new(Style::Terminal, "", 1).play(&steps).concat().into_iter();
            let mut wanted = expected(&steps).concat().into_iter();
            prop_assert!(wanted.all(|cell| rows.any(|shown| shown == cell)));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        #[test]
        fn the_final_screen_is_the_plain_text_of_long_lines(
            steps in steps(&LONG),
            style in style(),
            prefix in prefix(),
        ) {
            let rows = Show::new(style, prefix, 4096).play(&steps);
            prop_assert_eq!(rows, expected(&steps));
        }

        #[test]
        fn in_a_terminal_others_tear_lines_but_lose_and_repeat_nothing(
            steps in interrupted(&LONG),
            prefix in prefix(),
        ) {
            let rows = Show::new(Style::Terminal, prefix, 1).play(&steps);
            prop_assert_eq!(rows.concat(), expected(&steps).concat());
        }
    }

    const BOTH: [Style; 2] = [Style::Terminal, Style::Sideband];
    const OTHER: &str = "## others";

    /// One printer, whose output is looked at byte by byte.
    struct Run {
        printer: LinePrinter,
        now: Instant,
    }

    impl Run {
        fn new(style: Style, prefix: &str) -> Self {
            #[expect(clippy::disallowed_methods, reason = "an arbitrary origin; only differences are used")]
            let now = Instant::now();
            Self { printer: LinePrinter::new(style, prefix), now }
        }

        fn push(&mut self, text: &str) -> String {
            let now = self.now;
            self.output(|printer, out| printer.push(text.as_bytes(), now, out))
        }

        /// Lets time pass, with every timeout when it is due.
        fn wait(&mut self, millis: u64) -> String {
            let (until, mut all) = (self.now + Duration::from_millis(millis), String::new());
            while let Some(at) = self.printer.poll_timeout().filter(|&at| at <= until) {
                all += &self.output(|printer, out| printer.handle_timeout(at, out));
                assert!(self.printer.poll_timeout().is_none_or(|next| next > at), "a timer spins");
            }
            self.now = until;
            all
        }

        fn interrupt(&mut self) -> String {
            self.output(LinePrinter::interrupt)
        }

        fn finish(&mut self) -> String {
            self.output(LinePrinter::finish)
        }

        fn output(&mut self, call: impl FnOnce(&mut LinePrinter, &mut Vec<u8>)) -> String {
            let mut out = Vec::new();
            call(&mut self.printer, &mut out);
            assert!(self.printer.line.len().max(self.printer.progress.len()) <= MAX_LINE);
            assert!(self.printer.line.capacity().max(self.printer.progress.capacity()) <= 2 * MAX_LINE);
            let out = String::from_utf8(out).unwrap();
            assert!(!colors(&out).is_open(), "a colour is left open");
            out
        }
    }

    /// A printer, a display, and somebody else who writes to it.
    struct Show {
        run: Run,
        prefix: &'static str,
        git: Option<Git>,
        screen: Screen,
    }

    impl Show {
        fn new(style: Style, prefix: &'static str, packet: usize) -> Self {
            let git = (style == Style::Sideband).then(|| Git { packet, scratch: Vec::new() });
            Self { run: Run::new(style, prefix), prefix, git, screen: Screen::new() }
        }

        /// What is on the screen in the end: the printer's rows, without prefixes.
        fn play(mut self, steps: &[Step]) -> Vec<Vec<Cell>> {
            for step in steps {
                let output = match step {
                    Step::Push(text) => self.run.push(text),
                    Step::Wait(millis) => self.run.wait(*millis),
                    Step::Others(count) => self.run.interrupt() + &format!("{OTHER}\n").repeat(*count),
                };
                self.display(&output);
            }
            let output = self.run.finish();
            self.display(&output);
            self.rows()
        }

        fn display(&mut self, output: &str) {
            match &mut self.git {
                Some(git) => git.write(output, &mut self.screen),
                None => self.screen.write(output),
            }
        }

        fn rows(self) -> Vec<Vec<Cell>> {
            let mut rows = self.screen.rows;
            assert_eq!(rows.pop(), Some(Vec::new()), "the last line does not end");
            let remote = if self.git.is_some() { REMOTE } else { "" };
            let others = cells(&format!("{remote}{OTHER}"));
            rows.retain(|row| *row != others);
            let prefix = cells(&format!("{remote}{}", self.prefix));
            rows.into_iter().map(|row| row.strip_prefix(&*prefix).expect("a prefix").to_vec()).collect()
        }
    }

    /// The colours that are open after `text`.
    fn colors(text: &str) -> Sgr {
        let mut sgr = Sgr::default();
        for (at, _) in text.match_indices('\x1b') {
            Sgr::prefix_of(&text.as_bytes()[at..]).into_iter().for_each(|sequence| sgr.apply(sequence));
        }
        sgr
    }

    /// A character and its colours.
    type Cell = (char, Vec<u8>);

    fn cells(text: &str) -> Vec<Cell> {
        text.chars().map(|char| (char, Vec::new())).collect()
    }

    /// A terminal of endless width and height that knows `\r`, `\n`, ESC[K and colours.
    struct Screen {
        rows: Vec<Vec<Cell>>,
        column: usize,
        sgr: Sgr,
    }

    impl Screen {
        fn new() -> Self {
            Self { rows: vec![Vec::new()], column: 0, sgr: Sgr::default() }
        }

        fn write(&mut self, mut text: &str) {
            while let Some(char) = text.chars().next() {
                let used = if char == '\x1b' { self.escape(text.as_bytes()) } else { self.char(char) };
                text = text.split_at(used).1;
            }
        }

        fn escape(&mut self, bytes: &[u8]) -> usize {
            if let Some(sequence) = Sgr::prefix_of(bytes) {
                self.sgr.apply(sequence);
                return sequence.len();
            }
            assert!(bytes.starts_with(ERASE), "an unknown sequence");
            assert!(!self.sgr.is_open(), "the row is erased in colour");
            self.rows.last_mut().unwrap().truncate(self.column);
            ERASE.len()
        }

        fn char(&mut self, char: char) -> usize {
            match char {
                '\r' => self.column = 0,
                '\n' => {
                    self.column = 0;
                    self.rows.push(Vec::new());
                }
                _ => self.put(char),
            }
            char.len_utf8()
        }

        fn put(&mut self, char: char) {
            let mut colors = Vec::new();
            self.sgr.restore(&mut colors);
            let row = self.rows.last_mut().unwrap();
            if let Some(cell) = row.get_mut(self.column) {
                *cell = (char, colors);
            } else {
                row.push((char, colors));
            }
            self.column += 1;
        }
    }

    const REMOTE: &str = "remote: ";

    /// What git's client does to the sideband (sideband.c, `demultiplex_sideband`), before 2.55.
    struct Git {
        packet: usize,
        scratch: Vec<u8>,
    }

    impl Git {
        fn write(&mut self, text: &str, screen: &mut Screen) {
            text.as_bytes().chunks(self.packet).for_each(|packet| self.packet(packet, screen));
        }

        fn packet(&mut self, mut packet: &[u8], screen: &mut Screen) {
            while let Some(end) = packet.iter().position(|byte| b"\r\n".contains(byte)) {
                let is_clearing = end > 0 || !self.scratch.is_empty();
                self.append(&packet[..end]);
                if is_clearing {
                    self.scratch.extend_from_slice(ERASE);
                }
                self.scratch.push(packet[end]);
                screen.write(str::from_utf8(&self.scratch).unwrap());
                self.scratch.clear();
                packet = &packet[end + 1..];
            }
            if !packet.is_empty() {
                self.append(packet);
            }
        }

        fn append(&mut self, text: &[u8]) {
            if self.scratch.is_empty() {
                self.scratch.extend_from_slice(REMOTE.as_bytes());
            }
            self.scratch.extend_from_slice(text);
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push(String),
        Wait(u64),
        Others(usize),
    }

    /// Everything that was pushed, as the lines a person should have read in the end.
    fn expected(steps: &[Step]) -> Vec<Vec<Cell>> {
        let mut text = String::new();
        for step in steps {
            match step {
                Step::Push(more) => text += more,
                Step::Wait(_) | Step::Others(_) => {}
            }
        }
        let (mut screen, mut lines) = (Screen::new(), Vec::new());
        for line in text.split_inclusive('\n') {
            let state = line.trim_end_matches('\n').split('\r').fold(Vec::new(), |last, state| {
                screen.write(state);
                screen.write("\n");
                let row = screen.rows.remove(0);
                if row.is_empty() { last } else { row }
            });
            if line.ends_with('\n') || !state.is_empty() {
                lines.push(state);
            }
        }
        lines
    }

    const SHORT: [&str; 14] =
        ["a", "bc", "é", "日本", " ", "\n", "\n", "\r", "\r", "\r\n", "50% done", "\x1b[31m", "\x1b[1;44m", "\x1b[0m"];

    const LONG: [&str; 9] =
        ["a", "bc", "é", "\n", "\x1b[31m", "\x1b[0m", "\x1b[1;44m", long::<3000>(), long::<MAX_LINE>()];

    const fn long<const LENGTH: usize>() -> &'static str {
        match str::from_utf8(const { &[b'x'; LENGTH] }) {
            Ok(text) => text,
            Err(_) => panic!("it is ASCII"),
        }
    }

    fn text(parts: &'static [&'static str]) -> impl Strategy<Value = Step> {
        let part = proptest::sample::select(parts);
        proptest::collection::vec(part, 1..6).prop_map(|parts| Step::Push(parts.concat()))
    }

    fn steps(parts: &'static [&'static str]) -> impl Strategy<Value = Vec<Step>> {
        proptest::collection::vec(prop_oneof![3 => text(parts), 1 => (0..1500_u64).prop_map(Step::Wait)], 0..30)
    }

    fn interrupted(parts: &'static [&'static str]) -> impl Strategy<Value = Vec<Step>> {
        let wait = (0..1500_u64).prop_map(Step::Wait);
        let others = (0..3_usize).prop_map(Step::Others);
        proptest::collection::vec(prop_oneof![3 => text(parts), 2 => wait, 1 => others], 0..30)
    }

    fn style() -> impl Strategy<Value = Style> {
        proptest::sample::select(&BOTH)
    }

    fn prefix() -> impl Strategy<Value = &'static str> {
        proptest::sample::select(&["", "[t] "])
    }
}
