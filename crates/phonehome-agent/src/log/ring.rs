//! The latest lines, kept for the moment in which they are wanted.

use std::collections::VecDeque;

use super::line::Line;

/// The latest lines, as many as there is room for.
#[derive(Debug, Default)]
pub(super) struct Ring {
    kept: VecDeque<Kept>,
    /// What all of them take, bytes.
    size: usize,
}

#[derive(Debug)]
struct Kept {
    line: Line,
    /// Whether it has been written to the log.
    shown: bool,
}

/// Most lines kept: about what a person reads.
const MAX_LINES: usize = 64;

/// What they take at most, bytes. As text they fit into what the console holds back while the command is within a line.
const MAX_SIZE: usize = 16 * 1024;

impl Ring {
    /// Keeps a line in place of the oldest. One that is larger than everything is not kept.
    pub(super) fn push(&mut self, line: Line, shown: bool) {
        let size = line.size();
        if size > MAX_SIZE {
            return;
        }
        self.size += size;
        self.kept.push_back(Kept { line, shown });
        while self.kept.len() > MAX_LINES || self.size > MAX_SIZE {
            self.size -= self.kept.pop_front().map_or(0, |oldest| oldest.line.size());
        }
    }

    /// The lines that were not shown; they count as shown from now on.
    pub(super) fn hidden(&mut self) -> impl Iterator<Item = &mut Line> {
        self.kept.iter_mut().filter_map(|kept| (!std::mem::replace(&mut kept.shown, true)).then_some(&mut kept.line))
    }

    /// The newest lines as text, the oldest of them first, as many as `limit` bytes have room for.
    pub(super) fn recent(&self, limit: usize) -> Vec<String> {
        let mut room = limit;
        let mut lines: Vec<_> = self
            .kept
            .iter()
            .rev()
            .map(|kept| kept.line.to_string())
            .take_while(|text| room.checked_sub(text.len()).map(|left| room = left).is_some())
            .collect();
        lines.reverse();
        lines
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use tracing::Level;

    use super::*;

    fn line(message: &str) -> Line {
        let mut line = Line::new(UNIX_EPOCH, Level::DEBUG, "a::b");
        line.message = message.into();
        line
    }

    fn hidden(ring: &mut Ring) -> Vec<String> {
        ring.hidden().map(|line| line.message.clone()).collect()
    }

    #[test]
    fn what_was_not_shown_is_told_once_and_stays_at_hand() {
        let mut ring = Ring::default();
        ring.push(line("one"), false);
        ring.push(line("two"), true);
        ring.push(line("three"), false);
        assert_eq!(hidden(&mut ring), ["one", "three"]);
        ring.push(line("four"), false);
        assert_eq!(hidden(&mut ring), ["four"]);
        assert_eq!(ring.recent(usize::MAX).len(), 4);
    }

    #[test]
    fn it_keeps_to_its_bounds() {
        let mut ring = Ring::default();
        for number in 0..1000 {
            ring.push(line(&number.to_string()), false);
        }
        assert_eq!((ring.kept.len(), hidden(&mut ring)[0].as_str()), (MAX_LINES, "936"));
        ring.push(line(&"x".repeat(MAX_SIZE / 2)), false);
        ring.push(line(&"y".repeat(MAX_SIZE / 2)), false);
        assert!(ring.kept.len() < 3 && ring.size <= MAX_SIZE, "{}", ring.size);
        ring.push(line(&"z".repeat(MAX_SIZE)), false);
        assert!(!hidden(&mut ring).iter().any(|text| text.starts_with('z')));
        let sum: usize = ring.kept.iter().map(|kept| kept.line.size()).sum();
        assert_eq!(ring.size, sum);
    }

    #[test]
    fn the_newest_that_fit_are_told_oldest_first() {
        let mut ring = Ring::default();
        for message in ["one", "two", "three"] {
            ring.push(line(message), true);
        }
        let all = ring.recent(usize::MAX);
        let newest = all[1].len() + all[2].len();
        assert_eq!(ring.recent(newest), all[1..]);
        assert_eq!(ring.recent(newest - 1), all[2..]);
        assert_eq!(ring.recent(0), [""; 0]);
    }
}
