//! Which life of a step's agent may write: only the newest, over its newest connection.

use crate::{
    close::CloseCode,
    id::{Attempt, ProducerId},
};

/// The attempts of one step.
#[derive(Debug, Clone, Default)]
pub struct Attempts {
    lives: Vec<ProducerId>,
    connection: u64,
    finished: bool,
}

/// Permission to write one attempt's log, good until somebody newer gets one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Whose log.
    pub attempt: Attempt,
    /// Whether this hello made the attempt.
    pub new: bool,
    /// Number of the connection, over all attempts of the step.
    connection: u64,
}

impl Lease {
    /// One with which nothing can be written, of an attempt that has its end.
    #[must_use]
    pub fn void(attempt: Attempt) -> Self {
        Self { attempt, new: false, connection: 0 }
    }

    /// Whether this one was given after `other`.
    #[must_use]
    pub fn is_newer_than(self, other: Self) -> bool {
        self.connection > other.connection
    }
}

/// More lives than this are a crash loop, not a build.
pub const MAX_ATTEMPTS: usize = 1000;

impl Attempts {
    /// Goes on with the attempts that a store holds, oldest first.
    #[must_use]
    pub fn resume(lives: Vec<ProducerId>, finished: bool) -> Self {
        Self { lives, connection: 0, finished }
    }

    /// An agent says hello. Every lease given before is void from here on.
    ///
    /// # Errors
    ///
    /// With the close code to answer: superseded when a newer agent took over, already finished when the step has its
    /// end, overloaded beyond [`MAX_ATTEMPTS`].
    pub fn handle_hello(&mut self, producer: ProducerId) -> Result<Lease, CloseCode> {
        let new = match self.lives.iter().position(|life| *life == producer) {
            Some(at) if at + 1 == self.lives.len() => false,
            Some(_) => return Err(CloseCode::Superseded),
            None if self.finished => return Err(CloseCode::AlreadyFinished),
            None if self.lives.len() >= MAX_ATTEMPTS => return Err(CloseCode::Overloaded),
            None => true,
        };
        if new {
            self.lives.push(producer);
        }
        self.connection += 1;
        Ok(Lease { attempt: self.lives.len() as Attempt, new, connection: self.connection })
    }

    /// Takes back the attempt made last, which could not be stored. Nobody may have been given its lease; the one before
    /// is good again.
    pub fn undo(&mut self) {
        self.lives.pop();
        self.connection -= 1;
    }

    /// Every lease given before is void: nothing more is written.
    pub fn revoke(&mut self) {
        self.connection += 1;
    }

    /// Whether the newest attempt is this producer's.
    #[must_use]
    pub fn is_newest(&self, producer: ProducerId) -> bool {
        self.lives.last() == Some(&producer)
    }

    /// Whether the holder of `lease` may still write.
    #[must_use]
    pub fn is_current(&self, lease: Lease) -> bool {
        lease.connection == self.connection
    }

    /// The newest attempt has been given its end.
    pub fn finish(&mut self) {
        self.finished = true;
    }

    /// Whether the step has its end.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lives.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: ProducerId = ProducerId([1; 16]);
    const SECOND: ProducerId = ProducerId([2; 16]);

    #[test]
    fn rule_3_the_same_producer_resumes_and_its_older_connection_is_void() {
        let mut attempts = Attempts::default();
        let old = attempts.handle_hello(FIRST).unwrap();
        let new = attempts.handle_hello(FIRST).unwrap();
        assert_eq!((old.attempt, old.new, new.attempt, new.new), (1, true, 1, false));
        assert!(!attempts.is_current(old) && attempts.is_current(new));
    }

    #[test]
    fn rule_3_a_new_producer_is_the_next_attempt_and_fences_the_older() {
        let mut attempts = Attempts::default();
        let old = attempts.handle_hello(FIRST).unwrap();
        let new = attempts.handle_hello(SECOND).unwrap();
        assert_eq!((new.attempt, new.new), (2, true));
        assert!(!attempts.is_current(old));
        assert_eq!(attempts.handle_hello(FIRST), Err(CloseCode::Superseded));
        assert!(attempts.is_current(new));
    }

    #[test]
    fn an_attempt_that_could_not_be_stored_leaves_the_older_one_its_lease() {
        let mut attempts = Attempts::default();
        let old = attempts.handle_hello(FIRST).unwrap();
        attempts.handle_hello(SECOND).unwrap();
        attempts.undo();
        assert!(attempts.is_current(old));
        assert!(attempts.handle_hello(SECOND).unwrap().is_newer_than(old) && !attempts.is_current(old));
    }

    #[test]
    fn rule_10_a_finished_step_takes_no_new_attempt_but_answers_its_own() {
        let mut attempts = Attempts::default();
        attempts.handle_hello(FIRST).unwrap();
        attempts.finish();
        assert_eq!(attempts.handle_hello(SECOND), Err(CloseCode::AlreadyFinished));
        assert!(!attempts.handle_hello(FIRST).unwrap().new);
    }

    #[test]
    fn a_crash_loop_is_stopped() {
        let lives = (0..MAX_ATTEMPTS as u128).map(|n| ProducerId(n.to_le_bytes())).collect();
        assert_eq!(Attempts::resume(lives, false).handle_hello(ProducerId([0xff; 16])), Err(CloseCode::Overloaded));
    }
}
