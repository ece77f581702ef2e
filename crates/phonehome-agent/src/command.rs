//! The build command: started in a process group of its own, signalled as a group, reaped, and its end told.

mod signals;

use std::{
    borrow::Cow,
    ffi::OsString,
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::Stdio,
};

use phonehome_proto::{frame::End, limits::MAX_TEXT};
use rustix::{
    pipe::{PipeFlags, fcntl_setpipe_size, pipe_with},
    process::{
        DumpableBehavior, Pid, Signal, WaitOptions, WaitStatus, getpgrp, getpid, kill_process_group,
        test_kill_process_group,
    },
    termios::{tcgetpgrp, tcsetpgrp},
};
use tokio::net::unix::pipe::Receiver;
use tracing::{debug, warn};

pub(crate) use signals::{Caught, Signals};

use crate::failure::{EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND};

/// A running command.
#[derive(Debug)]
pub(crate) struct Command {
    /// The child, which leads the process group of the same number.
    leader: Pid,
    end: Option<End>,
}

/// Where the command writes to.
#[derive(Debug)]
pub(crate) enum Output {
    /// The agent's own standard streams, untouched.
    Inherited,
    /// Pipes of the agent.
    Piped(Stdio, Stdio),
}

/// The reading ends of a command's pipes.
#[derive(Debug)]
pub(crate) struct Pipes {
    pub(crate) stdout: Receiver,
    /// None when both streams share one pipe.
    pub(crate) stderr: Option<Receiver>,
}

/// Variables that carry secrets: the command does not inherit them.
const SECRET_VARIABLES: [&str; 1] = ["PHONEHOME_TOKEN"];

/// Capacity asked for a pipe, bytes: the most an unprivileged process gets (pipe(7), `/proc/sys/fs/pipe-max-size`).
pub(crate) const PIPE_SIZE: usize = 1024 * 1024;

/// Makes the pipes before the command exists, so that not even its first byte can be missed.
pub(crate) fn pipes(merge: bool) -> io::Result<(Output, Pipes)> {
    let (stdout, stdout_end) = pipe()?;
    if merge {
        let output = Output::Piped(stdout_end.try_clone()?.into(), stdout_end.into());
        return Ok((output, Pipes { stdout, stderr: None }));
    }
    let (stderr, stderr_end) = pipe()?;
    Ok((Output::Piped(stdout_end.into(), stderr_end.into()), Pipes { stdout, stderr: Some(stderr) }))
}

fn pipe() -> io::Result<(Receiver, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    if let Err(errno) = fcntl_setpipe_size(&reader, PIPE_SIZE) {
        debug!("the pipe keeps its default size: {errno}");
    }
    Ok((Receiver::from_owned_fd(reader)?, writer))
}

/// Makes this process fit to supervise: nobody of the same user may read its memory, where the token is (prctl(2),
/// `PR_SET_DUMPABLE`), and orphans of the command become its children to reap (`PR_SET_CHILD_SUBREAPER`).
pub(crate) fn prepare_process() {
    if let Err(errno) = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        warn!("the agent's memory stays readable to processes of its user: {errno}");
    }
    if getpid() != Pid::INIT
        && let Err(errno) = rustix::process::set_child_subreaper(Some(getpid()))
    {
        warn!("orphaned processes of the command will not be reaped: {errno}");
    }
}

impl Command {
    /// Starts the command. The error is the command's end: it could not be started.
    pub(crate) fn spawn(command: &[OsString], output: Output) -> Result<Self, End> {
        let (program, arguments) = command.split_first().expect("the command line requires a command");
        let mut process = std::process::Command::new(program);
        process.args(arguments).process_group(0);
        for variable in SECRET_VARIABLES {
            process.env_remove(variable);
        }
        if let Output::Piped(stdout, stderr) = output {
            process.stdout(stdout).stderr(stderr);
        }
        let child = process.spawn().map_err(|error| not_started(&program.to_string_lossy(), &error))?;
        let leader = Pid::from_raw(child.id().cast_signed()).expect("a child's process id is positive");
        let command = Self { leader, end: None };
        command.take_terminal();
        Ok(command)
    }

    /// Hands the terminal over, if there is one and it is this process's to give: only its foreground group may read it
    /// (tcsetpgrp(3)). From then on the terminal's own signals, Ctrl-C's say, go to the command.
    fn take_terminal(&self) {
        let terminal = rustix::stdio::stdin();
        if !tcgetpgrp(terminal).is_ok_and(|foreground| foreground == getpgrp()) {
            return;
        }
        match tcsetpgrp(terminal, self.leader) {
            Ok(()) => self.signal(Signal::CONT), // it may have been stopped by a read that came before
            Err(errno) => warn!("the command cannot read from the terminal: {errno}"),
        }
    }

    /// Reaps every child that has ended: the command, and orphans that the system handed to this process. Nothing else
    /// in this process waits for children, so no status can be stolen.
    pub(crate) fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if pid == self.leader {
                self.end = Some(end_of(status));
            } else {
                debug!(pid = pid.as_raw_nonzero().get(), "reaped an orphan");
            }
        }
    }

    /// How the command ended, once [`Self::reap`] has seen it.
    pub(crate) fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// Sends a signal to the command's process group, as long as it has members.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Err(errno) = kill_process_group(self.leader, signal) {
            debug!(?signal, "nobody was left to signal: {errno}");
        }
    }

    /// Whether the process group still has members.
    pub(crate) fn has_members(&self) -> bool {
        test_kill_process_group(self.leader).is_ok()
    }
}

fn end_of(status: WaitStatus) -> End {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => End::Exited(code as u8), // wait(2): an exit status has eight bits
        (None, Some(signal)) => End::Signalled { signal: signal as u8, core: status.as_raw() & CORE != 0, oom: false },
        (None, None) => unreachable!("waitpid reports stops only when asked to"),
    }
}

/// The bit of a wait status that says a core file was written (`WCOREFLAG`, wait(2)).
const CORE: i32 = 0x80;

fn not_started(program: &str, error: &io::Error) -> End {
    let code = if error.kind() == io::ErrorKind::NotFound { EXIT_NOT_FOUND } else { EXIT_NOT_EXECUTABLE };
    let why = format!(": {error}");
    let program = shortened(program, MAX_TEXT.saturating_sub(CANNOT_RUN.len() + why.len()));
    End::NotStarted { code, reason: format!("{CANNOT_RUN}{program}{why}") }
}

const CANNOT_RUN: &str = "cannot run ";

/// At most `limit` bytes of `text`, and a sign that there was more.
fn shortened(text: &str, limit: usize) -> Cow<'_, str> {
    const MORE: char = '…';
    if text.len() <= limit {
        return text.into();
    }
    let most = limit.saturating_sub(MORE.len_utf8());
    let start = (0..=most).rev().find_map(|end| text.get(..end)).unwrap_or_default();
    format!("{start}{MORE}").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_keeps_to_its_limit_and_says_what_failed() {
        for name in ["x".repeat(70_000), "€".repeat(70_000)] {
            let End::NotStarted { reason, .. } = not_started(&name, &io::Error::other("too long")) else {
                unreachable!("nothing ran");
            };
            assert!((MAX_TEXT - 3..=MAX_TEXT).contains(&reason.len()) && reason.ends_with("…: too long"), "{reason}");
        }
    }
}
