//! Whether the server may be given work: its store takes what it is given, and it is not about to end.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use phonehome_env::{
    Env,
    disk::{Disk, Open},
};
use tokio::time::{Instant, timeout};

/// Writes to the data directory now and then, when somebody asks.
#[derive(Debug)]
pub(crate) struct Probe {
    env: Env,
    path: PathBuf,
    /// Bytes of the file system that output does not take.
    min_free: u64,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// Since when a write is under way.
    began: Option<Instant>,
    /// The last one that has ended: when, and why it failed.
    last: Option<(Instant, Result<(), String>)>,
}

/// How long a write may take. A disk that is slower holds up every acknowledgement.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long an answer is good for. Anybody may ask, and each write costs the disk a sync.
const FRESH: Duration = Duration::from_secs(2);

impl Probe {
    pub(crate) fn new(env: &Env, data: &std::path::Path, min_free: u64) -> Self {
        Self { env: env.clone(), path: data.join("probe"), min_free, state: Arc::default() }
    }

    /// Why the store does not take anything, if so. One write at a time: a stuck disk holds one thread and no more.
    pub(crate) async fn check(&self) -> Result<(), String> {
        if let Some(known) = self.known() {
            return known;
        }
        let (disk, path, state) = (self.env.disk.clone(), self.path.clone(), self.state.clone());
        let min_free = self.min_free;
        let write = self.env.blocking(move || {
            let result = look(&*disk, &path, min_free);
            let mut state = lock(&state);
            state.began = None;
            state.last = Some((Instant::now(), result.clone()));
            result
        });
        timeout(PATIENCE, write).await.unwrap_or_else(|_| Err(SLOW.to_owned()))
    }

    /// The answer without a write; notes that one begins when there is none.
    fn known(&self) -> Option<Result<(), String>> {
        let mut state = lock(&self.state);
        match (&state.last, state.began) {
            (Some((at, last)), _) if at.elapsed() < FRESH => Some(last.clone()),
            (_, Some(began)) if began.elapsed() < PATIENCE => {
                Some(state.last.as_ref().map_or(Ok(()), |(_, last)| last.clone()))
            }
            (_, Some(_)) => Some(Err(SLOW.to_owned())),
            (_, None) => {
                state.began = Some(Instant::now());
                None
            }
        }
    }
}

const SLOW: &str = "the data directory takes too long to be written";

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether output would be taken.
fn look(disk: &dyn Disk, path: &std::path::Path, min_free: u64) -> Result<(), String> {
    let failed = |error| format!("the data directory cannot be written: {error}");
    write(disk, path).map_err(failed)?;
    match disk.free(path).map_err(failed)? {
        free if free < min_free => Err(format!("no output is taken: {free} bytes are free, less than --min-free")),
        _ => Ok(()),
    }
}

fn write(disk: &dyn Disk, path: &std::path::Path) -> io::Result<()> {
    let file = disk.open(path, Open::Write)?;
    file.set_len(0)?; // a byte that is there already needs no room
    file.write_all_at(&mut [io::IoSlice::new(b"\n")], 0)?;
    file.sync()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_that_takes_a_byte_is_ready_and_one_that_is_gone_is_not() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Probe::new(&Env::real(), dir.path(), 0).check().await, Ok(()));
        let gone = Probe::new(&Env::real(), &dir.path().join("gone"), 0);
        assert!(gone.check().await.unwrap_err().contains("cannot be written"));
    }

    #[tokio::test]
    async fn a_disk_with_less_than_is_to_stay_free_is_not_ready() {
        let dir = tempfile::tempdir().unwrap();
        let told = Probe::new(&Env::real(), dir.path(), u64::MAX).check().await.unwrap_err();
        assert!(told.contains("--min-free"), "{told}");
    }

    #[tokio::test]
    async fn an_answer_is_good_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let probe = Probe::new(&Env::real(), dir.path(), 0);
        probe.check().await.unwrap();
        drop(dir);
        assert_eq!(probe.check().await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_does_not_end_is_not_waited_for_and_no_other_is_begun() {
        let dir = tempfile::tempdir().unwrap();
        let delay: Arc<dyn Fn() -> Duration + Send + Sync> = Arc::new(|| Duration::from_secs(3600));
        let env = Env { workers: phonehome_env::Workers::Tasks(delay), ..Env::real() };
        let probe = Probe::new(&env, dir.path(), 0);
        for _ in 0..3 {
            assert_eq!(probe.check().await, Err(SLOW.to_owned()));
        }
        assert!(!dir.path().join("probe").exists());
    }
}
