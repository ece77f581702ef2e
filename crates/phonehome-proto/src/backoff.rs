//! How long to wait before dialling again.

use std::time::{Duration, Instant};

use crate::limits::{BACKOFF_MAX, BACKOFF_MIN, HEALTHY_AFTER};

/// Exponential backoff with full jitter: the delay is drawn evenly between nothing and a bound that doubles with every
/// connection that came to nothing and halves with every one that got something acknowledged before it broke. So a
/// network that cuts every few seconds does not slow down a delivery that gets on, and a server that only ever hangs up
/// is left alone. Full jitter spreads a crowd that lost its server at one instant best ("Exponential Backoff and Jitter",
/// AWS Architecture Blog, 2015).
#[derive(Debug)]
pub struct Backoff {
    bound: Duration,
    connected: Option<Instant>,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { bound: BACKOFF_MIN, connected: None }
    }
}

impl Backoff {
    /// A connection was established.
    pub fn handle_connected(&mut self, now: Instant) {
        self.connected = Some(now);
    }

    /// The connection ended or could not be made: wait this long. `progressed` says whether it got anything acknowledged;
    /// `random` is drawn evenly from 0..1. A `floor` is the server's own wish (Retry-After), to which the jitter is added.
    pub fn handle_disconnected(&mut self, now: Instant, progressed: bool, random: f64, floor: Duration) -> Duration {
        let healthy = self.connected.take().is_some_and(|since| now.saturating_duration_since(since) >= HEALTHY_AFTER);
        if healthy {
            self.bound = BACKOFF_MIN;
        }
        if progressed {
            self.bound = (self.bound / 2).max(BACKOFF_MIN);
        }
        let delay = floor + self.bound.mul_f64(random.clamp(0.0, 1.0));
        if !progressed {
            self.bound = (self.bound * 2).min(BACKOFF_MAX);
        }
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_7_the_bound_doubles_to_its_limit_and_the_jitter_is_full() {
        let now = origin();
        let mut backoff = Backoff::default();
        let bounds: Vec<_> =
            (0..8).map(|_| backoff.handle_disconnected(now, false, 1.0, Duration::ZERO).as_millis()).collect();
        assert_eq!(bounds, [250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
        assert_eq!(backoff.handle_disconnected(now, false, 0.0, Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn rule_7_only_a_healthy_connection_resets_the_counter() {
        let now = origin();
        let mut backoff = Backoff::default();
        for (lasted, bound) in [(0, 250), (2999, 500), (3000, 250), (10, 500)] {
            backoff.handle_connected(now);
            let delay = backoff.handle_disconnected(now + Duration::from_millis(lasted), false, 1.0, Duration::ZERO);
            assert_eq!(delay.as_millis(), bound, "after {lasted} ms");
        }
    }

    #[test]
    fn rule_7_a_connection_that_got_something_done_is_no_failure() {
        let now = origin();
        let mut backoff = Backoff::default();
        let mut bound = |progressed| backoff.handle_disconnected(now, progressed, 1.0, Duration::ZERO).as_millis();
        let bounds = [false, false, false, true, true, true, true, false].map(&mut bound);
        assert_eq!(bounds, [250, 500, 1000, 1000, 500, 250, 250, 250]);
    }

    #[test]
    fn rule_7_a_servers_wish_is_a_floor() {
        let delay = Backoff::default().handle_disconnected(origin(), false, 0.5, Duration::from_secs(7));
        assert_eq!(delay, Duration::from_millis(7125));
    }

    fn origin() -> Instant {
        #[expect(clippy::disallowed_methods, reason = "an arbitrary origin; only differences are used")]
        Instant::now()
    }
}
