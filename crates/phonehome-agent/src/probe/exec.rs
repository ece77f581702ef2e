//! Running a command as a probe, in a process that reaps every child itself.
//!
//! The agent takes the status of whichever child has ended (`waitpid(-1)`), so nobody else may wait for one. [`Children`]
//! starts the command and is told by whoever reaps.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fmt, io,
    os::unix::process::CommandExt,
    pin::Pin,
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::process::{Pid, Signal, WaitStatus, kill_process_group};
use tokio::sync::oneshot;
use tracing::{debug, trace};

/// Runs commands. A run that is dropped is killed.
pub(crate) trait Runner: fmt::Debug + Send + Sync {
    /// Program and arguments, at least one; the exit code, 128 more than the number of a signal.
    fn run(&self, command: &[OsString]) -> Running;
}

/// A command that runs.
pub(crate) type Running = Pin<Box<dyn Future<Output = io::Result<u8>> + Send>>;

/// Commands that run as children of this process. Clones are the same ones.
#[derive(Debug, Clone, Default)]
pub(crate) struct Children {
    running: Arc<Mutex<HashMap<Pid, oneshot::Sender<u8>>>>,
    /// Variables that they do not inherit.
    secret: &'static [&'static str],
}

impl Children {
    /// Of which none inherits these variables.
    pub(crate) fn without(secret: &'static [&'static str]) -> Self {
        Self { running: Arc::default(), secret }
    }

    /// Takes the status of a child that was reaped, and says whether it was one of these.
    pub(crate) fn reaped(&self, child: Pid, status: WaitStatus) -> bool {
        let Some(run) = self.lock().remove(&child) else { return false };
        let signalled = || status.terminating_signal().map_or(u8::MAX, |signal| 128u8.saturating_add(signal as u8));
        let code = status.exit_status().map_or_else(signalled, |code| code as u8); // wait(2): eight bits
        if run.send(code).is_err() {
            trace!("nobody waits for this command any more");
        }
        true
    }

    /// Starts one in a process group of its own. The lock is held meanwhile: its status cannot come before its number.
    fn spawn(&self, command: &[OsString]) -> io::Result<(Guard, oneshot::Receiver<u8>)> {
        let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut process = Command::new(program);
        process.args(arguments).process_group(0);
        process.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        for variable in self.secret {
            process.env_remove(OsStr::new(variable));
        }
        let mut running = self.lock();
        let child = process.spawn()?;
        let leader = Pid::from_raw(child.id().cast_signed()).expect("a child's process id is positive");
        let (run, code) = oneshot::channel();
        running.insert(leader, run);
        Ok((Guard { children: self.clone(), leader }, code))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Pid, oneshot::Sender<u8>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner) // a map is whole at every step
    }
}

impl Runner for Children {
    fn run(&self, command: &[OsString]) -> Running {
        let spawned = self.spawn(command);
        Box::pin(async move {
            let (_guard, code) = spawned?;
            code.await.map_err(|_| io::Error::other("nobody reaps children any more"))
        })
    }
}

/// Kills the command with the last interest in it. While its status has not been taken its number is nobody else's.
struct Guard {
    children: Children,
    leader: Pid,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut running = self.children.lock();
        if running.remove(&self.leader).is_some()
            && let Err(errno) = kill_process_group(self.leader, Signal::KILL)
        {
            debug!("a probe that was given up cannot be killed: {errno}");
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{WaitOptions, waitpid};

    use super::*;

    #[tokio::test]
    async fn an_exit_code_comes_by_way_of_the_reaper() {
        for (script, expected) in [("exit 3", 3), ("test -z \"$CARGO_MANIFEST_DIR\"", 0), ("kill -TERM $$", 143)] {
            let children = Children::without(&["CARGO_MANIFEST_DIR"]);
            let run = children.run(&["/bin/sh", "-c", script].map(OsString::from));
            let (child, status) = reap(&children);
            assert!(children.reaped(child, status));
            assert!(!children.reaped(child, status), "a stranger who got the same number");
            assert_eq!(run.await.unwrap(), expected, "{script}");
        }
    }

    #[tokio::test]
    async fn one_that_is_given_up_is_killed_with_all_that_it_started() {
        let children = Children::default();
        let run = children.run(&["/bin/sh", "-c", "sleep 1000 & wait"].map(OsString::from));
        let leader = leader(&children);
        drop(run);
        let (_, status) = waitpid(Some(leader), WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(status.terminating_signal(), Some(Signal::KILL.as_raw()));
        assert!(!children.reaped(leader, status), "nobody waits for it any more");
    }

    #[tokio::test]
    async fn one_that_cannot_be_started_is_an_error() {
        let error = Children::default().run(&["/nowhere/at all".into()]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(Children::default().run(&[]).await.is_err());
    }

    /// As the agent does, but for this one child: other tests have theirs.
    fn reap(children: &Children) -> (Pid, WaitStatus) {
        waitpid(Some(leader(children)), WaitOptions::empty()).unwrap().unwrap()
    }

    fn leader(children: &Children) -> Pid {
        *children.lock().keys().next().unwrap()
    }
}
