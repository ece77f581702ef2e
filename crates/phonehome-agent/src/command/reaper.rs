//! The one place that waits for children: nobody can steal another's status.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::process::{Pid, WaitOptions, WaitStatus};
use tokio::sync::watch;
use tracing::debug;

/// Who waits for which child.
type Watched = HashMap<Pid, watch::Sender<Option<WaitStatus>>>;

/// Reaps children, and tells those who wait for one. Its clones are the same reaper.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper(Arc<Mutex<Watched>>);

impl Reaper {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What becomes of a child: stopped, or ended. To be called before anything is awaited after its start, so that its
    /// end cannot have been reaped already.
    pub(crate) fn watch(&self, child: Pid) -> watch::Receiver<Option<WaitStatus>> {
        let (status, watched) = watch::channel(None);
        self.lock().insert(child, status);
        watched
    }

    /// Reaps every child that has ended: watched ones, and orphans that the system handed to this process.
    pub(crate) fn reap(&self) {
        let mut watched = self.lock();
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG | WaitOptions::UNTRACED) {
            tell(&mut watched, pid, status);
        }
    }

    /// Waits for one child only: other tests of this process have theirs.
    #[cfg(test)]
    pub(crate) fn reap_one(&self, child: Pid) -> WaitStatus {
        let (pid, status) = rustix::process::waitpid(Some(child), WaitOptions::empty()).unwrap().unwrap();
        tell(&mut self.lock(), pid, status);
        status
    }
}

fn tell(watched: &mut Watched, pid: Pid, status: WaitStatus) {
    if let Some(told) = watched.get(&pid) {
        told.send_replace(Some(status));
    } else {
        debug!(pid = pid.as_raw_nonzero().get(), "reaped an orphan");
    }
    if !status.stopped() {
        watched.remove(&pid);
    }
}
