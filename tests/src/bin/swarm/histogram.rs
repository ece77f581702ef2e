//! Times in buckets: each is at most a sixteenth wide, whatever the magnitude.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Counts of microseconds, shared by all agents.
pub(crate) struct Histogram(Box<[AtomicU64]>);

/// Buckets per power of two.
const STEPS: u64 = 16;

impl Default for Histogram {
    fn default() -> Self {
        Self((0..64 * STEPS).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Histogram {
    pub(crate) fn note(&self, time: Duration) {
        let bucket = bucket(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
        self.0[bucket].fetch_add(1, Ordering::Relaxed);
    }

    /// What was counted so far, to start anew.
    pub(crate) fn take(&self) -> Snapshot {
        Snapshot(self.0.iter().map(|count| count.swap(0, Ordering::Relaxed)).collect())
    }

    /// What was counted so far.
    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot(self.0.iter().map(|count| count.load(Ordering::Relaxed)).collect())
    }
}

/// What was counted in some time.
pub(crate) struct Snapshot(Box<[u64]>);

impl Snapshot {
    pub(crate) fn count(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Microseconds that this share of all stayed below; 0 when there are none.
    pub(crate) fn quantile(&self, share: f64) -> u64 {
        let mut left = (self.count() as f64 * share).ceil() as u64;
        for (bucket, &count) in self.0.iter().enumerate() {
            if left > 0 && count >= left {
                return end(bucket as u64);
            }
            left = left.saturating_sub(count);
        }
        0
    }
}

fn bucket(micros: u64) -> usize {
    let power = u64::from(micros.max(STEPS).ilog2() - STEPS.ilog2());
    (power * STEPS + (micros >> power)) as usize
}

/// The end of a bucket.
fn end(bucket: u64) -> u64 {
    let power = (bucket / STEPS).saturating_sub(1);
    (bucket - power * STEPS + 1) << power
}
