//! When to ask a server again, and when to give up. Pure: the time is an argument.

use std::time::Duration;

use phonehome_proto::backoff::{Backoff, Tried};
use tokio::time::Instant;

use super::http::ClientError;

/// How long a server that was never reached is tried: long enough for a restart, short enough for a wrong address.
pub(crate) const FIRST_CONTACT: Duration = Duration::from_secs(5);

/// One server's failures.
#[derive(Debug)]
pub(crate) struct Retry {
    /// How long it may fail; `None` is for ever.
    limit: Option<Duration>,
    last_contact: Instant,
    backoff: Backoff,
}

impl Retry {
    pub(crate) fn new(limit: Option<Duration>, now: Instant) -> Self {
        Self { limit, last_contact: now, backoff: Backoff::default() }
    }

    /// The server has said something.
    pub(crate) fn handle_contact(&mut self, now: Instant) {
        self.last_contact = now;
    }

    /// How long nothing was heard.
    pub(crate) fn silence(&self, now: Instant) -> Duration {
        now.duration_since(self.last_contact)
    }

    /// Something failed: how long to wait before the next try, or `None` when there is none. `random` is evenly from
    /// 0..1.
    pub(crate) fn handle_failure(&mut self, error: &ClientError, random: f64, now: Instant) -> Option<Duration> {
        if !error.is_transient() || self.limit.is_some_and(|limit| self.silence(now) >= limit) {
            return None;
        }
        let tried = if error.is_unanswered() { Tried::Unreachable } else { Tried::TurnedAway };
        let pause = self.backoff.handle_disconnected(now.into_std(), tried, random, error.retry_after());
        Some(pause.max(LEAST_PAUSE))
    }
}

/// Between two tries, whatever chance says.
const LEAST_PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use http::{HeaderMap, StatusCode};

    use super::*;
    use crate::client::problem::Problem;

    #[test]
    fn a_server_is_tried_until_its_time_is_over() {
        let start = Instant::now();
        let mut retry = Retry::new(Some(Duration::from_secs(5)), start);
        let at = |seconds| start + Duration::from_secs(seconds);
        let gone = || ClientError::Unreachable("h:1".into(), std::io::ErrorKind::ConnectionRefused.into());
        assert!(retry.handle_failure(&gone(), 1.0, at(4)).is_some());
        retry.handle_contact(at(4));
        assert!(retry.handle_failure(&gone(), 1.0, at(8)).is_some());
        assert_eq!(retry.silence(at(8)), Duration::from_secs(4));
        assert_eq!(retry.handle_failure(&gone(), 1.0, at(9)), None);
        assert!(Retry::new(None, start).handle_failure(&gone(), 1.0, at(9_999)).is_some());
    }

    #[test]
    fn a_no_is_final_and_a_later_is_kept() {
        let now = Instant::now();
        let mut retry = Retry::new(None, now);
        let answer = |status| ClientError::Refused(Box::new(Problem::read(status, &headers(), b"")));
        assert_eq!(retry.handle_failure(&answer(StatusCode::NOT_FOUND), 0.0, now), None);
        let busy = answer(StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(retry.handle_failure(&busy, 0.0, now), Some(Duration::from_secs(7)));
    }

    fn headers() -> HeaderMap {
        HeaderMap::from_iter([(http::header::RETRY_AFTER, "7".parse().unwrap())])
    }
}
