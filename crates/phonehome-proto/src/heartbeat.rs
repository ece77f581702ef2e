//! When to ask for a sign of life, and when to stop believing in one.

use std::time::Instant;

use crate::limits::{DEAD_AFTER, HEARTBEAT};

/// One side's view of whether the other is alive.
#[derive(Debug)]
pub struct Heartbeat {
    heard: Instant,
    ask_at: Option<Instant>,
    asked: u64,
}

/// What a heartbeat's timer asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beat {
    /// Send a ping with this id.
    Ask(u64),
    /// The peer was silent for [`DEAD_AFTER`]: close.
    Dead,
    /// Nothing yet.
    Wait,
}

impl Heartbeat {
    /// For the side that only listens: the agent.
    #[must_use]
    pub fn listening(now: Instant) -> Self {
        Self { heard: now, ask_at: None, asked: 0 }
    }

    /// For the side that asks: the server. `jitter` in 0..=1 spreads the first ping over one interval.
    #[must_use]
    pub fn asking(now: Instant, jitter: f64) -> Self {
        Self { heard: now, ask_at: Some(now + HEARTBEAT.mul_f64(jitter.clamp(0.0, 1.0))), asked: 0 }
    }

    /// Anything arrived from the peer.
    pub fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// When to call [`Self::handle_timeout`] next.
    #[must_use]
    pub fn poll_timeout(&self) -> Instant {
        let dead = self.heard + DEAD_AFTER;
        self.ask_at.map_or(dead, |ask| ask.min(dead))
    }

    /// What is due now.
    pub fn handle_timeout(&mut self, now: Instant) -> Beat {
        if now.saturating_duration_since(self.heard) >= DEAD_AFTER {
            return Beat::Dead;
        }
        match self.ask_at {
            Some(at) if at <= now => {
                self.asked += 1;
                self.ask_at = Some(now + HEARTBEAT);
                Beat::Ask(self.asked)
            }
            _ => Beat::Wait,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn origin() -> Instant {
        #[expect(clippy::disallowed_methods, reason = "an arbitrary origin; only differences are used")]
        Instant::now()
    }

    #[test]
    fn rule_6_asks_every_interval_and_gives_up_after_three() {
        let start = origin();
        let mut server = Heartbeat::asking(start, 0.5);
        let first = start + HEARTBEAT / 2;
        assert_eq!(server.handle_timeout(first - Duration::from_millis(1)), Beat::Wait);
        assert_eq!((server.poll_timeout(), server.handle_timeout(first)), (first, Beat::Ask(1)));
        assert_eq!(
            (server.poll_timeout(), server.handle_timeout(first + HEARTBEAT)),
            (first + HEARTBEAT, Beat::Ask(2))
        );
        server.heard(first + HEARTBEAT);
        assert_eq!(server.handle_timeout(first + HEARTBEAT + DEAD_AFTER), Beat::Dead);
    }

    #[test]
    fn rule_6_a_listener_only_counts_silence() {
        let start = origin();
        let mut agent = Heartbeat::listening(start);
        agent.heard(start + HEARTBEAT);
        assert_eq!(agent.poll_timeout(), start + HEARTBEAT + DEAD_AFTER);
        assert_eq!(agent.handle_timeout(start + DEAD_AFTER), Beat::Wait);
        assert_eq!(agent.handle_timeout(agent.poll_timeout()), Beat::Dead);
    }
}
