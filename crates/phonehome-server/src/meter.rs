//! What the server counts while it works: plain atomics, which cost next to nothing where every record passes. How they
//! are told is in `http::metrics`.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// All counters of a server.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    pub(crate) records_received: Count,
    pub(crate) bytes_received: Count,
    pub(crate) records_acknowledged: Count,
    pub(crate) bytes_acknowledged: Count,
    /// From the first record that is not acknowledged to the acknowledgement.
    pub(crate) ack_latency: Histogram,
    /// Of one round of the store: writing, syncing and letting it be known.
    pub(crate) commit_duration: Histogram,
    /// Attempts whose files were written and synced, round by round.
    pub(crate) attempts_synced: Count,
    pub(crate) bytes_sealed: Count,
    pub(crate) builds_expired: Count,
    pub(crate) bytes_expired: Count,
    pub(crate) bytes_over_quota: Count,
    /// By the kind of the outcome.
    pub(crate) verdicts: Counts<&'static str>,
    /// By the reason: a status of HTTP, or a close code.
    pub(crate) refusals: Counts<String>,
    /// By the template of the route and the status.
    pub(crate) requests: Counts<(String, u16)>,
}

/// A number that grows.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Numbers by something that there are few of.
#[derive(Debug)]
pub(crate) struct Counts<K>(Mutex<BTreeMap<K, u64>>);

/// Keys that are counted apart: nobody outside can make more of them than there are routes, statuses and codes.
const MAX_KEYS: usize = 1000;

impl<K: Ord + Clone> Counts<K> {
    pub(crate) fn add(&self, key: K) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.len() < MAX_KEYS || counts.contains_key(&key) {
            *counts.entry(key).or_insert(0) += 1;
        }
    }

    pub(crate) fn values(&self) -> BTreeMap<K, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl<K> Default for Counts<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

/// How long things take.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    /// How many took at most the bound of the same place, and more than the one before; the last has no bound.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
}

/// From a fast disk's sync to the time after which an agent is taken for dead, microseconds.
pub(crate) const BOUNDS: [u64; 12] =
    [250, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000, 5_000_000, 30_000_000];

impl Histogram {
    pub(crate) fn observe(&self, time: Duration) {
        let micros = time.as_micros() as u64;
        self.buckets[BOUNDS.partition_point(|bound| *bound < micros)].fetch_add(1, Ordering::Relaxed);
        self.micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// The sum in seconds, and each bucket's upper bound in seconds and count.
    pub(crate) fn values(&self) -> (f64, [(f64, u64); BOUNDS.len() + 1]) {
        let mut at = 0;
        let buckets = self.buckets.each_ref().map(|count| {
            let bound = BOUNDS.get(at).map_or(f64::INFINITY, |micros| *micros as f64 / 1e6);
            at += 1;
            (bound, count.load(Ordering::Relaxed))
        });
        (self.micros.load(Ordering::Relaxed) as f64 / 1e6, buckets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_in_the_bucket_whose_bound_it_does_not_exceed() {
        let histogram = Histogram::default();
        for micros in [0, 250, 251, 30_000_000, 30_000_001] {
            histogram.observe(Duration::from_micros(micros));
        }
        let (sum, buckets) = histogram.values();
        let counts = buckets.map(|(_, count)| count);
        assert_eq!((counts[0], counts[1], counts[11], counts[12]), (2, 1, 1, 1));
        assert_eq!(counts.iter().sum::<u64>(), 5);
        assert!((sum - 60.000_502).abs() < 1e-9, "{sum}");
        assert_eq!((buckets[0].0, buckets[12].0), (0.000_25, f64::INFINITY));
    }

    #[test]
    fn keys_are_counted_apart_and_there_are_not_too_many() {
        let counts = Counts::default();
        for key in (0..2 * MAX_KEYS).chain([0]) {
            counts.add(key);
        }
        assert_eq!((counts.values().len(), counts.values()[&0]), (MAX_KEYS, 2));
    }
}
