//! The one place that waits for children: nobody can steal another's status.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, getpid, kill_process};
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

    /// Reaps children that have ended: watched ones, and orphans that the system handed to this process. Of very many,
    /// the rest is announced once more: whoever makes orphans without end keeps this process from nothing else.
    pub(crate) fn reap(&self) {
        let mut watched = self.lock();
        for _ in 0..AT_ONCE {
            match rustix::process::wait(WaitOptions::NOHANG | WaitOptions::UNTRACED) {
                Ok(Some((pid, status))) => tell(&mut watched, pid, status),
                Ok(None) | Err(_) => return,
            }
        }
        if let Err(errno) = kill_process(getpid(), Signal::CHILD) {
            debug!("the rest of the children is reaped later: {errno}");
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

/// Children reaped before anything else is looked at.
const AT_ONCE: usize = 256;

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
