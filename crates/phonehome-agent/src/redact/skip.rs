//! The way past text in which no pattern begins: Wu and Manber, "A fast algorithm for multi-pattern searching", 1994.
//!
//! Only the last three bytes of a window are looked at. A table says how far on a pattern could begin at the earliest,
//! which in ordinary text is nearly the length of the window.

use super::MIN_VALUE;

pub(super) struct Skip {
    /// How far the window may move, by the group at its end.
    shifts: Box<[u8; SLOTS]>,
    /// Bytes of every pattern that are known to the table.
    window: usize,
}

/// Bytes in a group: three tell texts apart much better than two, and four no better.
const GROUP: usize = 3;
const _: () = assert!(GROUP < MIN_VALUE);

/// Slots of the table: it stays in the processor's first cache.
const SLOTS: usize = 1 << SLOT_BITS;
const SLOT_BITS: u32 = 14;

/// Longest window. A longer one fills the table with little gain.
const MAX_WINDOW: usize = 32;

impl Skip {
    /// Every pattern has at least [`MIN_VALUE`] bytes.
    pub(super) fn new(patterns: &[&[u8]]) -> Self {
        let shortest = patterns.iter().map(|pattern| pattern.len()).min().unwrap_or(MAX_WINDOW);
        let window = shortest.min(MAX_WINDOW);
        let farthest = window - GROUP + 1;
        let mut shifts = Box::new([farthest as u8; SLOTS]);
        for pattern in patterns {
            for (at, group) in pattern[..window].windows(GROUP).enumerate() {
                let shift = &mut shifts[slot(group)];
                *shift = (*shift).min((window - GROUP - at) as u8);
            }
        }
        Self { shifts, window }
    }

    /// The first place from `at` on where a pattern may begin in `text`, be it that the text ends too soon to know.
    pub(super) fn find(&self, text: &[u8], mut at: usize) -> usize {
        while let Some(window) = text.get(at..at + self.window) {
            match self.shifts[slot(&window[self.window - GROUP..])] {
                0 => break,
                shift => at += usize::from(shift),
            }
        }
        at
    }
}

/// The slot of a group (Fibonacci hashing).
fn slot(group: &[u8]) -> usize {
    let number = u32::from_le_bytes([0, group[0], group[1], group[2]]);
    (number.wrapping_mul(0x9e37_79b1) >> (u32::BITS - SLOT_BITS)) as usize
}
