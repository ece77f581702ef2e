//! Running a command as a probe, in a process that reaps every child itself.
//!
//! The agent takes the status of whichever child has ended (`waitpid(-1)`), so nobody else may wait for one: the
//! [`Reaper`] tells [`Children`] what has become of theirs.

use std::{
    ffi::OsString,
    fmt, io,
    os::unix::process::CommandExt,
    path::Path,
    pin::Pin,
    process::{Command, Stdio},
};

use rustix::process::{Pid, Signal, WaitStatus, kill_process_group};
use tokio::sync::watch;
use tracing::debug;

use crate::{
    command::{Reaper, unblock_signals},
    config::User,
};

/// Runs commands. A run that is dropped is killed.
pub(crate) trait Runner: fmt::Debug + Send + Sync {
    /// Program and arguments, at least one, and whom they run as, if not as the agent; the exit code, 128 more than the
    /// number of a signal.
    fn run(&self, command: &[OsString], user: Option<User>) -> Running;
}

/// A command that runs.
pub(crate) type Running = Pin<Box<dyn Future<Output = io::Result<u8>> + Send>>;

/// Commands that run as children of this process, and whose status this reaper tells.
#[derive(Debug, Clone)]
pub(crate) struct Children(pub(crate) Reaper);

impl Children {
    /// Starts one in a process group of its own.
    fn spawn(&self, command: &[OsString], user: Option<User>) -> io::Result<Child> {
        let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut process = Command::new(program);
        process.args(arguments).process_group(0);
        process.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some(user) = user {
            process.uid(user.uid).gid(user.group(Path::new("/etc/passwd")));
        }
        unblock_signals(&mut process);
        let child = process.spawn()?;
        let leader = Pid::from_raw(child.id().cast_signed()).expect("a child's process id is positive");
        Ok(Child { leader, status: self.0.watch(leader) })
    }
}

impl Runner for Children {
    fn run(&self, command: &[OsString], user: Option<User>) -> Running {
        let spawned = self.spawn(command, user);
        Box::pin(async move { spawned?.code().await })
    }
}

/// Kills the command with the last interest in it. While its status has not been taken its number is nobody else's.
struct Child {
    leader: Pid,
    status: watch::Receiver<Option<WaitStatus>>,
}

impl Child {
    async fn code(mut self) -> io::Result<u8> {
        let ended = |status: &Option<WaitStatus>| status.is_some_and(|status| !status.stopped());
        let status =
            *self.status.wait_for(ended).await.map_err(|_| io::Error::other("nobody reaps children any more"))?;
        let signalled =
            |status: WaitStatus| status.terminating_signal().map(|signal| 128u8.saturating_add(signal as u8));
        let code = status.and_then(|status| status.exit_status().map(|code| code as u8).or_else(|| signalled(status)));
        Ok(code.unwrap_or(u8::MAX)) // wait(2): one of both, and a code has eight bits
    }

    fn has_ended(&self) -> bool {
        self.status.borrow().is_some_and(|status| !status.stopped())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.has_ended()
            && let Err(errno) = kill_process_group(self.leader, Signal::KILL)
        {
            debug!("a probe that was given up cannot be killed: {errno}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_exit_code_comes_by_way_of_the_reaper() {
        for (script, expected) in [("exit 3", 3), ("kill -TERM $$", 143)] {
            let children = Children(Reaper::default());
            let child = children.spawn(&["/bin/sh", "-c", script].map(OsString::from), None).unwrap();
            let leader = child.leader;
            let code = tokio::spawn(child.code());
            children.0.reap_one(leader);
            assert_eq!(code.await.unwrap().unwrap(), expected, "{script}");
        }
    }

    #[tokio::test]
    async fn one_that_is_given_up_is_killed_with_all_that_it_started() {
        let children = Children(Reaper::default());
        let child = children.spawn(&["/bin/sh", "-c", "sleep 1000 & wait"].map(OsString::from), None).unwrap();
        let leader = child.leader;
        drop(child);
        assert_eq!(children.0.reap_one(leader).terminating_signal(), Some(Signal::KILL.as_raw()));
    }

    #[tokio::test]
    async fn one_that_cannot_be_started_is_an_error() {
        let children = Children(Reaper::default());
        let error = children.run(&["/nowhere/at all".into()], None).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(children.run(&[], None).await.is_err());
    }
}
