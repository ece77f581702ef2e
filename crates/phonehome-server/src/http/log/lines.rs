//! A log as text: as it is, or with the time or the step in front of every line.

use std::collections::BTreeMap;

use phonehome_proto::{
    frame::UnixMicros,
    id::{Attempt, StepName},
};

use crate::summary::rfc3339;

/// What stands in front of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Decoration {
    /// `[step] `. Lines of several steps are then kept whole.
    pub(crate) step: bool,
    /// When the first byte of the line was read.
    pub(crate) time: bool,
}

impl Decoration {
    pub(crate) const NONE: Self = Self { step: false, time: false };
}

/// Makes text of records.
#[derive(Debug)]
pub(crate) struct Lines {
    decoration: Decoration,
    rows: BTreeMap<StepName, Row>,
    /// Whose line the text ends with, when it does not end with a line's end.
    open: Option<StepName>,
}

/// What is held of a step's line.
#[derive(Debug, Default)]
struct Row {
    attempt: Attempt,
    time: UnixMicros,
    held: Vec<u8>,
}

/// Part of a line that is held until it ends, so that lines of other steps do not cut into it, bytes.
const HOLD: usize = 8 * 1024;

impl Lines {
    pub(crate) fn new(decoration: Decoration) -> Self {
        Self { decoration, rows: BTreeMap::new(), open: None }
    }

    /// Takes a record.
    pub(crate) fn push(
        &mut self,
        step: &StepName,
        attempt: Attempt,
        time: UnixMicros,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) {
        if self.decoration == Decoration::NONE {
            return out.extend_from_slice(payload);
        }
        if self.rows.get(step).is_some_and(|row| row.attempt != attempt) {
            self.end_line(step, out);
        }
        let hold = if self.decoration.step { HOLD } else { 0 };
        for line in payload.split_inclusive(|&byte| byte == b'\n') {
            let row = self.rows.entry(step.clone()).or_default();
            row.attempt = attempt;
            if row.held.is_empty() {
                row.time = time;
            }
            row.held.extend_from_slice(line);
            if line.ends_with(b"\n") || row.held.len() > hold {
                self.emit(step, out);
            }
        }
    }

    /// Says that records are gone, where nothing else says so: in the log as it is there is no place for that.
    pub(crate) fn lost(&mut self, step: &StepName, attempt: Attempt, records: u64, out: &mut Vec<u8>) {
        if self.decoration != Decoration::NONE {
            self.end_line(step, out);
            let time = self.rows.get(step).map_or(0, |row| row.time);
            let told = format!("phonehome: {records} records are lost here\n");
            self.push(step, attempt, time, told.as_bytes(), out);
        }
    }

    /// Ends every line that was begun.
    pub(crate) fn finish(&mut self, out: &mut Vec<u8>) {
        let steps: Vec<_> = self.rows.keys().cloned().collect();
        steps.iter().for_each(|step| self.end_line(step, out));
    }

    fn end_line(&mut self, step: &StepName, out: &mut Vec<u8>) {
        self.emit(step, out);
        if self.open.as_ref() == Some(step) {
            out.push(b'\n');
            self.open = None;
        }
    }

    /// Writes what is held of a step.
    fn emit(&mut self, step: &StepName, out: &mut Vec<u8>) {
        let Some(row) = self.rows.get_mut(step).filter(|row| !row.held.is_empty()) else { return };
        let is_open = self.open.as_ref() == Some(step);
        if !is_open {
            if self.open.is_some() {
                out.push(b'\n'); // a line that is too long to be kept whole
            }
            if self.decoration.time {
                out.extend_from_slice(rfc3339(row.time).as_bytes());
                out.push(b' ');
            }
            if self.decoration.step {
                out.extend_from_slice(format!("[{step}] ").as_bytes());
            }
        }
        out.extend_from_slice(&row.held);
        if row.held.ends_with(b"\n") {
            self.open = None;
        } else if !is_open {
            self.open = Some(step.clone());
        }
        row.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_is_passed_on_byte_for_byte() {
        assert_eq!(text(Decoration::NONE, &[("a", 1, 0, "x\ny"), ("a", 2, 0, "\r\0z")]), "x\ny\r\0z");
    }

    #[test]
    fn lines_of_several_steps_are_kept_whole() {
        let records = [("a", 1, 0, "one "), ("b", 1, 0, "three\nfour"), ("a", 1, 0, "two\n"), ("b", 1, 0, "\n")];
        let decoration = Decoration { step: true, time: false };
        assert_eq!(text(decoration, &records), "[b] three\n[a] one two\n[b] four\n");
    }

    #[test]
    fn a_last_line_without_an_end_gets_one() {
        let decoration = Decoration { step: true, time: false };
        assert_eq!(text(decoration, &[("a", 1, 0, "x"), ("b", 1, 0, "y")]), "[a] x\n[b] y\n");
        assert_eq!(text(decoration, &[("a", 1, 0, "x"), ("a", 2, 0, "y")]), "[a] x\n[a] y\n", "of each attempt");
    }

    #[test]
    fn a_line_that_is_too_long_is_cut_where_another_step_writes() {
        let long = "x".repeat(HOLD + 1);
        let decoration = Decoration { step: true, time: false };
        let told = text(decoration, &[("a", 1, 0, &long), ("b", 1, 0, "y\n"), ("a", 1, 0, "z\n")]);
        assert_eq!(told, format!("[a] {long}\n[b] y\n[a] z\n"));
        let told = text(decoration, &[("a", 1, 0, &long), ("a", 1, 0, "z\n")]);
        assert_eq!(told, format!("[a] {long}z\n"));
    }

    #[test]
    fn the_time_is_that_of_the_first_byte_of_a_line_and_nothing_is_held() {
        let decoration = Decoration { step: false, time: true };
        let (mut lines, mut out) = (Lines::new(decoration), Vec::new());
        lines.push(&name("a"), 1, 1, b"x", &mut out);
        assert_eq!(String::from_utf8_lossy(&out), "1970-01-01T00:00:00.000001Z x");
        lines.push(&name("a"), 1, 2, b"y\nz\n", &mut out);
        let told = "1970-01-01T00:00:00.000001Z xy\n1970-01-01T00:00:00.000002Z z\n";
        assert_eq!(String::from_utf8_lossy(&out), told);
    }

    #[test]
    fn what_is_lost_is_said_on_a_line_of_its_own() {
        let (mut lines, mut out) = (Lines::new(Decoration { step: true, time: false }), Vec::new());
        lines.push(&name("a"), 1, 1, b"x", &mut out);
        lines.lost(&name("a"), 1, 3, &mut out);
        assert_eq!(String::from_utf8_lossy(&out), "[a] x\n[a] phonehome: 3 records are lost here\n");
    }

    fn text(decoration: Decoration, records: &[(&str, Attempt, UnixMicros, &str)]) -> String {
        let (mut lines, mut out) = (Lines::new(decoration), Vec::new());
        for (step, attempt, time, payload) in records {
            lines.push(&name(step), *attempt, *time, payload.as_bytes(), &mut out);
        }
        lines.finish(&mut out);
        String::from_utf8(out).unwrap()
    }

    fn name(step: &str) -> StepName {
        step.parse().unwrap()
    }
}
