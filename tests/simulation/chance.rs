//! All chance of a run, from its seed.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use phonehome_env::Nature;
use phonehome_proto::frame::UnixMicros;
use tokio::time::Instant;

/// A generator of numbers (SplitMix64, Steele and others, OOPSLA 2014). Clones are the same one.
#[derive(Debug, Clone)]
pub(crate) struct Chance(Arc<Mutex<u64>>);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(seed)))
    }

    /// Another generator, which this one seeds.
    pub(crate) fn fork(&self) -> Self {
        Self::new(self.next())
    }

    pub(crate) fn next(&self) -> u64 {
        let mut state = self.0.lock().unwrap();
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = *state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// Evenly from 0 to `below`, without it.
    pub(crate) fn below(&self, below: u64) -> u64 {
        self.next() % below.max(1)
    }

    /// Evenly from `low` to `high`, both included.
    pub(crate) fn within(&self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True in `percent` of all cases.
    pub(crate) fn is(&self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn millis(&self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.within(low, high))
    }

    pub(crate) fn pick<T: Copy>(&self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// A machine's chance and its wall clock, which jumps when it is told to.
#[derive(Debug)]
pub(crate) struct SimNature {
    chance: Chance,
    start: Instant,
    jumped: AtomicI64,
}

/// The wall clock at the start of every run: 2026-01-01, in microseconds.
const EPOCH: i64 = 1_767_225_600_000_000;

impl SimNature {
    pub(crate) fn new(chance: Chance) -> Self {
        Self { chance, start: Instant::now(), jumped: AtomicI64::new(0) }
    }

    pub(crate) fn jump(&self, micros: i64) {
        self.jumped.fetch_add(micros, Ordering::Relaxed);
    }
}

impl Nature for SimNature {
    fn fill(&self, bytes: &mut [u8]) -> io::Result<()> {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.chance.next().to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }

    fn now(&self) -> UnixMicros {
        let micros = EPOCH + self.start.elapsed().as_micros() as i64 + self.jumped.load(Ordering::Relaxed);
        u64::try_from(micros).unwrap_or(0)
    }
}
