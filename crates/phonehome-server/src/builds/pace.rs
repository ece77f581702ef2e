//! How fast a build may go: when its next bytes may be acknowledged.
//!
//! Nothing is held back but the acknowledgement. The agent keeps what is not acknowledged, its window fills, and it slows
//! its build as it does when the disk is slow.

use std::time::Duration;

use tokio::time::Instant;

/// A token bucket for the bytes of one build, over all of its steps.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Bytes per second.
    rate: u64,
    /// When everything that was acknowledged is paid for.
    paid_at: Instant,
}

/// A silent build saves up this much time.
const BURST: Duration = Duration::from_secs(1);

impl Pace {
    /// `rate` is in bytes per second; below one it is one.
    pub(crate) fn new(rate: u64, now: Instant) -> Self {
        Self { rate: rate.max(1), paid_at: now }
    }

    /// When the next acknowledgement may go; a time that has come is at once.
    pub(crate) fn ready_at(&self) -> Instant {
        self.paid_at
    }

    /// So many bytes are acknowledged.
    pub(crate) fn spend(&mut self, bytes: u64, now: Instant) {
        let saved = now.checked_sub(BURST).unwrap_or(now);
        // The cap of a day keeps sums of times from overflowing, whatever the rate.
        let cost = Duration::try_from_secs_f64(bytes as f64 / self.rate as f64).unwrap_or(LONGEST).min(LONGEST);
        self.paid_at = self.paid_at.max(saved) + cost;
    }

    /// Bytes that are worth having under way: what may be acknowledged within a second.
    pub(crate) fn window(&self) -> u64 {
        self.rate
    }
}

/// The longest that one acknowledgement is paid for.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn in_the_long_run_a_build_gets_its_rate() {
        let start = Instant::now();
        let (mut pace, mut now, mut sent) = (Pace::new(1000, start), start, 0);
        while sent < 100_000 {
            now = now.max(pace.ready_at());
            pace.spend(700, now);
            sent += 700;
        }
        let took = now.duration_since(start).as_secs_f64();
        assert!((98.0..=100.0).contains(&took), "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_build_has_saved_a_second_and_no_more() {
        let start = Instant::now();
        let mut pace = Pace::new(1000, start);
        let now = start + Duration::from_secs(3600);
        pace.spend(1000, now);
        assert!(pace.ready_at() <= now, "it was saved up");
        pace.spend(1000, now);
        assert_eq!(pace.ready_at(), now + Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn no_rate_and_no_amount_is_too_much() {
        let now = Instant::now();
        let mut pace = Pace::new(0, now);
        (0..3).for_each(|_| pace.spend(u64::MAX, now));
        assert!(pace.ready_at() > now);
    }
}
