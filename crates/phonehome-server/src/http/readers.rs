//! How many may read logs, and verify builds, at once.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Places for readers of logs.
#[derive(Debug, Clone)]
pub(crate) struct Readers {
    places: Arc<Semaphore>,
    /// For those who read from the disk at this moment.
    turns: Arc<Semaphore>,
    verifications: Arc<Semaphore>,
}

/// Readers at once. Each has up to three open files per step that still runs, and less than a megabyte.
const MAX_READERS: usize = 1000;

/// Readers that use the disk at once: they leave threads to everybody else who needs one for the disk.
const MAX_TURNS: usize = 32;

/// Builds that are verified at once. Each reads all of a build and has a thread as long, and there may be no more threads
/// than everybody else needs for the disk.
const MAX_VERIFICATIONS: usize = 2;

impl Default for Readers {
    fn default() -> Self {
        let [places, turns, verifications] =
            [MAX_READERS, MAX_TURNS, MAX_VERIFICATIONS].map(|count| Arc::new(Semaphore::new(count)));
        Self { places, turns, verifications }
    }
}

impl Readers {
    #[cfg(test)]
    pub(crate) fn with_places(count: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(count)), ..Self::default() }
    }

    /// A place, if there is one.
    pub(crate) fn place(&self) -> Option<OwnedSemaphorePermit> {
        self.places.clone().try_acquire_owned().ok()
    }

    /// How many have a place.
    pub(crate) fn count(&self) -> usize {
        MAX_READERS.saturating_sub(self.places.available_permits())
    }

    /// Leave to verify a build, if there is one more.
    pub(crate) fn verification(&self) -> Option<OwnedSemaphorePermit> {
        self.verifications.clone().try_acquire_owned().ok()
    }

    /// Waits until it may read from the disk.
    pub(crate) async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        self.turns.clone().acquire_owned().await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_and_given_back() {
        let readers = Readers::with_places(2);
        let places = [readers.place(), readers.place()];
        assert!(places.iter().all(Option::is_some) && readers.place().is_none());
        drop(places);
        assert!(readers.place().is_some());
    }

    #[test]
    fn a_build_is_verified_when_another_one_is_done() {
        let readers = Readers::default();
        let first = readers.verification();
        let others: Vec<_> = (1..MAX_VERIFICATIONS).map(|_| readers.verification().unwrap()).collect();
        assert!(first.is_some() && readers.verification().is_none());
        drop(first);
        assert!(readers.verification().is_some() && others.len() == MAX_VERIFICATIONS - 1);
    }
}
