//! How long to wait before dialling again.

use std::time::{Duration, Instant};

use crate::limits::{BACKOFF_MAX, BACKOFF_MIN, BACKOFF_UNREACHABLE, HEALTHY_AFTER};

/// Exponential backoff with full jitter: the delay is drawn evenly between nothing and a bound that doubles with every
/// connection that came to nothing and halves with every one that got something acknowledged before it broke. So a
/// network that cuts every few seconds does not slow down a delivery that gets on, and a server that only ever hangs up
/// is left alone. Full jitter spreads a crowd that lost its server at one instant best ("Exponential Backoff and Jitter",
/// AWS Architecture Blog, 2015).
///
/// A server that does not answer has nothing to be spared, and the attempt itself has taken its time: the bound stays
/// low then, so that a network which is back is noticed within seconds.
#[derive(Debug)]
pub struct Backoff {
    bound: Duration,
    connected: Option<Instant>,
}

/// What became of a connection, or of the attempt to make one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tried {
    /// Something was acknowledged on it.
    Progressed,
    /// The server, or somebody on the way, answered, but nothing came of it.
    TurnedAway,
    /// Nobody answered.
    Unreachable,
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

    /// The connection ended or could not be made: wait this long. `random` is drawn evenly from 0..1. A `floor` is the
    /// server's own wish (Retry-After), to which the jitter is added.
    pub fn handle_disconnected(&mut self, now: Instant, tried: Tried, random: f64, floor: Duration) -> Duration {
        let healthy = self.connected.take().is_some_and(|since| now.saturating_duration_since(since) >= HEALTHY_AFTER);
        if healthy {
            self.bound = BACKOFF_MIN;
        }
        let limit = match tried {
            Tried::Progressed => (self.bound / 2).max(BACKOFF_MIN),
            Tried::TurnedAway => BACKOFF_MAX,
            Tried::Unreachable => BACKOFF_UNREACHABLE,
        };
        self.bound = self.bound.min(limit);
        let delay = floor + self.bound.mul_f64(random.clamp(0.0, 1.0));
        if tried != Tried::Progressed {
            self.bound = (self.bound * 2).min(limit);
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
        let bounds: Vec<_> = (0..8)
            .map(|_| backoff.handle_disconnected(now, Tried::TurnedAway, 1.0, Duration::ZERO).as_millis())
            .collect();
        assert_eq!(bounds, [250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
        assert_eq!(backoff.handle_disconnected(now, Tried::TurnedAway, 0.0, Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn rule_7_only_a_healthy_connection_resets_the_counter() {
        let now = origin();
        let mut backoff = Backoff::default();
        for (lasted, bound) in [(0, 250), (2999, 500), (3000, 250), (10, 500)] {
            backoff.handle_connected(now);
            let delay = backoff.handle_disconnected(
                now + Duration::from_millis(lasted),
                Tried::TurnedAway,
                1.0,
                Duration::ZERO,
            );
            assert_eq!(delay.as_millis(), bound, "after {lasted} ms");
        }
    }

    #[test]
    fn rule_7_a_connection_that_got_something_done_is_no_failure() {
        let now = origin();
        let mut backoff = Backoff::default();
        let mut bound = |tried| backoff.handle_disconnected(now, tried, 1.0, Duration::ZERO).as_millis();
        let (away, on) = (Tried::TurnedAway, Tried::Progressed);
        assert_eq!(
            [away, away, away, on, on, on, on, away].map(&mut bound),
            [250, 500, 1000, 1000, 500, 250, 250, 250]
        );
    }

    #[test]
    fn rule_7_a_server_that_does_not_answer_is_asked_again_soon() {
        let now = origin();
        let mut backoff = Backoff::default();
        let mut bound = |tried| backoff.handle_disconnected(now, tried, 1.0, Duration::ZERO).as_millis();
        let (away, none) = (Tried::TurnedAway, Tried::Unreachable);
        assert_eq!([none; 5].map(&mut bound), [250, 500, 1000, 2000, 2000]);
        assert_eq!([away, away, none, away].map(&mut bound), [2000, 4000, 2000, 2000]);
    }

    #[test]
    fn rule_7_a_servers_wish_is_a_floor() {
        let delay = Backoff::default().handle_disconnected(origin(), Tried::TurnedAway, 0.5, Duration::from_secs(7));
        assert_eq!(delay, Duration::from_millis(7125));
    }

    fn origin() -> Instant {
        #[expect(clippy::disallowed_methods, reason = "an arbitrary origin; only differences are used")]
        Instant::now()
    }
}
