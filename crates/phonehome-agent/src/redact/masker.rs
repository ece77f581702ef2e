//! One stream on its way past a redactor.

use std::{fmt, ops::Range, time::Duration};

use tokio::time::Instant;
use zeroize::Zeroize;

use super::{
    Index, MARKER, Redactor,
    automaton::{ROOT, State},
};

/// How long the beginning of a secret is held back while nothing follows it: it may as well be a prompt.
pub const IDLE: Duration = Duration::from_secs(1);

/// Replaces secrets in a stream.
///
/// It holds back no more than the longest end of the stream that begins a secret, and that only for [`IDLE`]: a secret
/// that is written with a longer pause within it is not found.
pub struct Masker {
    redactor: Redactor,
    state: State,
    /// The end of what was read, not written yet.
    held: Vec<u8>,
    /// Where secrets are in it and in the block at hand: in order, neither overlapping nor touching.
    found: Vec<Range<usize>>,
    /// Whether the last byte that left was a secret's.
    within: bool,
    replaced: u64,
    deadline: Option<Instant>,
}

impl Masker {
    /// At the beginning of a stream.
    #[must_use]
    pub fn new(redactor: &Redactor) -> Self {
        Self {
            redactor: redactor.clone(),
            state: ROOT,
            held: Vec::new(),
            found: Vec::new(),
            within: false,
            replaced: 0,
            deadline: None,
        }
    }

    /// Takes a block and writes what is known to be no secret, in pieces.
    pub fn mask(&mut self, block: &[u8], now: Instant, write: &mut impl FnMut(&[u8])) {
        self.find(block);
        let undecided = self.redactor.0.automaton.depth(self.state);
        let decided = (self.held.len() + block.len()).saturating_sub(undecided);
        self.release(block, decided, write);
        self.deadline = (!self.held.is_empty()).then(|| now + IDLE);
    }

    /// When what is held back is written in any case.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Writes what is held back when its time has come. While more is `at_hand` that was only not read yet, it stays.
    pub fn poll(&mut self, now: Instant, at_hand: bool, write: &mut impl FnMut(&[u8])) {
        match self.deadline {
            Some(deadline) if deadline <= now && at_hand => self.deadline = Some(now + IDLE),
            Some(deadline) if deadline <= now => self.finish(write),
            Some(_) | None => {}
        }
    }

    /// Writes what is held back: nothing follows it.
    pub fn finish(&mut self, write: &mut impl FnMut(&[u8])) {
        self.release(&[], self.held.len(), write);
        self.state = ROOT;
        self.deadline = None;
    }

    /// How many runs of secret bytes were replaced.
    #[must_use]
    pub fn replaced(&self) -> u64 {
        self.replaced
    }

    fn find(&mut self, block: &[u8]) {
        let Index { automaton, skip, .. } = &*self.redactor.0;
        let (mut state, mut at) = (self.state, 0);
        while at < block.len() {
            if state == ROOT {
                at = skip.find(block, at);
            }
            let Some(byte) = block.get(at) else { break };
            state = automaton.next(state, *byte);
            at += 1;
            let found = automaton.longest(state);
            if found > 0 {
                let end = self.held.len() + at;
                add(&mut self.found, end.saturating_sub(found)..end); // what of it has left was masked then
            }
        }
        self.state = state;
    }

    /// Writes the first `decided` bytes of what is held and the block: whatever comes, no further secret begins there.
    /// Where they end within or at a secret it goes with them: that it is masked is decided too.
    fn release(&mut self, block: &[u8], decided: usize, write: &mut impl FnMut(&[u8])) {
        let whole = self.found.partition_point(|run| run.end < decided);
        let open = self.found.get(whole).filter(|run| run.start <= decided);
        let leaving = whole + usize::from(open.is_some());
        let decided = open.map_or(decided, |run| run.end);
        let mut from = 0;
        for run in self.found.drain(..leaving) {
            self.within &= from == run.start;
            write_part(&self.held, block, from..run.start, write);
            if !std::mem::replace(&mut self.within, true) {
                self.replaced += 1;
                write(MARKER.as_bytes());
            }
            from = run.end;
        }
        self.within &= from == decided;
        write_part(&self.held, block, from..decided, write);
        for run in &mut self.found {
            *run = run.start - decided..run.end - decided;
        }
        self.hold(block, decided);
    }

    /// Keeps what follows the first `gone` bytes.
    fn hold(&mut self, block: &[u8], gone: usize) {
        let gone_of_block = gone.saturating_sub(self.held.len());
        self.held.drain(..gone - gone_of_block);
        self.held.extend_from_slice(&block[gone_of_block..]);
    }
}

impl fmt::Debug for Masker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { redactor, held, replaced, .. } = self;
        f.debug_struct("Masker")
            .field("redactor", redactor)
            .field("held", &held.len())
            .field("replaced", replaced)
            .finish_non_exhaustive()
    }
}

impl Drop for Masker {
    fn drop(&mut self) {
        self.held.zeroize();
    }
}

/// Adds a run that ends behind all others, and makes one of those that it touches.
fn add(runs: &mut Vec<Range<usize>>, mut run: Range<usize>) {
    while let Some(last) = runs.pop_if(|last| last.end >= run.start) {
        run.start = run.start.min(last.start);
    }
    runs.push(run);
}

/// Writes a part of `held` followed by `block`.
fn write_part(held: &[u8], block: &[u8], part: Range<usize>, write: &mut impl FnMut(&[u8])) {
    let (old, new) = (|at: usize| at.min(held.len()), |at: usize| at.saturating_sub(held.len()));
    for piece in [&held[old(part.start)..old(part.end)], &block[new(part.start)..new(part.end)]] {
        if !piece.is_empty() {
            write(piece);
        }
    }
}
