//! The build command: started in a process group or on a terminal of its own, signalled as a group, reaped, and its end
//! told.

mod descendants;
mod memory;
mod reaper;
mod signals;
mod source;
mod unix;

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::process::CommandExt,
    path::Path,
    time::Duration,
};

use phonehome_proto::{
    event::Process,
    frame::{End, Stream, Usage},
    limits::MAX_TEXT,
};
use rustix::{
    fs::fchown,
    process::{DumpableBehavior, Pid, Signal, WaitId, WaitIdOptions, WaitStatus, getpgid, getpgrp, getpid, waitid},
    termios::{tcgetpgrp, tcsetpgrp},
};
use tokio::{sync::watch, time::Instant};
use tracing::{debug, warn};

pub use self::signals::Blocked;
pub(crate) use self::{
    reaper::Reaper,
    signals::{Caught, Signals, block_again},
    source::{Held, Output, PIPE_SIZE, Source, Sources},
    unix::readable,
};
use crate::{
    cause::shortened,
    config::{Secret, Supervision, User},
    failure::{EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND},
};
use memory::OomKills;

/// A command that was started.
#[derive(Debug)]
pub(crate) struct Command {
    /// The child, which leads the process group of the same number.
    leader: Pid,
    status: watch::Receiver<Option<WaitStatus>>,
    end: Option<End>,
    started: Instant,
    ended: Option<Instant>,
    memory: OomKills,
    /// Whether it was given the terminal of this process.
    has_terminal: bool,
    /// Whether its group is one of a session of its own.
    leads_session: bool,
}

/// Takes the token out of this process's environment, where its children and, in `/proc/PID/environ`, others could read
/// it. An empty variable is not set.
///
/// # Safety
///
/// It is the first thing that a process does: there is one thread, and nobody holds a pointer into the environment.
#[must_use]
#[expect(unsafe_code, reason = "only the caller knows that there is one thread")]
pub unsafe fn take_token() -> Option<Secret> {
    // SAFETY: the contract is the same.
    let value = unsafe { unix::take_variable(c"PHONEHOME_TOKEN") }.filter(|value| !value.is_empty())?;
    Some(Secret::new(String::from_utf8_lossy(&value).into_owned()))
}

/// Makes this process fit to supervise.
///
/// Nobody of the same user may read its memory, where the token is (prctl(2), `PR_SET_DUMPABLE`); orphans of the command
/// become its children to reap (`PR_SET_CHILD_SUBREAPER`); and no descriptor that it was started with goes on to the
/// command.
pub(crate) fn prepare_process(config: &Supervision) {
    let told = |what: &str, result: rustix::io::Result<()>| {
        if let Err(errno) = result {
            warn!("{what}: {errno}");
        }
    };
    unix::close_on_exec();
    told(
        "the agent's memory stays readable to processes of its user",
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable),
    );
    if getpid() != Pid::INIT {
        told(
            "orphaned processes of the command will not be reaped",
            rustix::process::set_child_subreaper(Some(getpid())),
        );
    }
    if let Some(signal) = config.parent_death_signal.and_then(unix::signal) {
        told("the death of the parent goes unnoticed", rustix::process::set_parent_process_death_signal(Some(signal)));
    }
    if config.no_new_privileges {
        told("the command may gain privileges", rustix::thread::set_no_new_privs(true));
    }
}

impl Command {
    /// Starts the command. The error is the command's end: it could not be started.
    pub(crate) fn spawn(
        command: &[OsString],
        output: Output,
        user: Option<User>,
        environment: &[(&str, OsString)],
        reaper: &Reaper,
    ) -> Result<Self, End> {
        let program = command.first().expect("the command line requires a command");
        let leads_session = matches!(output, Output::Terminal(_));
        let memory = OomKills::before();
        let plain = user.is_none() && !leads_session;
        let started =
            if plain { start(command, &output, environment) } else { start_as(command, output, user, environment) };
        let leader = started.map_err(|error| not_started(&program.to_string_lossy(), &error))?;
        let (started, status) = (Instant::now(), reaper.watch(leader));
        let (end, ended, has_terminal) = (None, None, false);
        let mut command = Self { leader, status, end, started, ended, memory, has_terminal, leads_session };
        if !leads_session {
            command.give_terminal();
        }
        Ok(command)
    }

    /// Hands the terminal over, if there is one and it is this process's to give: only its foreground group may read it
    /// (tcsetpgrp(3)). From then on the terminal's own signals, Ctrl-C's say, go to the command.
    fn give_terminal(&mut self) {
        if !owns_terminal() {
            return;
        }
        match tcsetpgrp(rustix::stdio::stdin(), self.leader) {
            Ok(()) => {
                self.has_terminal = true;
                self.signal(Signal::CONT); // it may have been stopped by a read that came before
            }
            Err(errno) => warn!("the command cannot read from the terminal: {errno}"),
        }
    }

    /// Takes the terminal back, for the shell that has started this process. Its signals are blocked, so nothing stops
    /// it for doing so from the background.
    fn take_terminal(&mut self) {
        if std::mem::take(&mut self.has_terminal)
            && let Err(errno) = tcsetpgrp(rustix::stdio::stdin(), getpgrp())
        {
            debug!("the terminal stays the command's: {errno}");
        }
    }

    /// Looks at what the reaper has seen of it.
    pub(crate) fn notice(&mut self) {
        let news = {
            let seen = self.status.borrow_and_update();
            seen.filter(|_| seen.has_changed()) // a stop that has been looked at is over
        };
        let Some(status) = news else { return };
        if !status.stopped() {
            self.ended.get_or_insert_with(Instant::now);
            self.end.get_or_insert_with(|| end_of(status, &self.memory));
            self.take_terminal();
        } else if self.has_terminal {
            // Ctrl-Z at the terminal: whoever started this process believes it to be stopped by that, too.
            self.take_terminal();
            stop_myself();
            self.give_terminal(); // continued, by a shell's fg say
            self.signal(Signal::CONT);
        }
    }

    /// How the command ended, once [`Self::notice`] has seen it.
    pub(crate) fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.leader.as_raw_nonzero().get().unsigned_abs()
    }

    /// Whether the system has killed a process of this control group for its memory since the start.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        self.memory.has_grown()
    }

    /// From its start to its end, or until now.
    pub(crate) fn duration(&self) -> Duration {
        self.ended.unwrap_or_else(Instant::now).duration_since(self.started)
    }

    /// What it used, and all that were reaped with it.
    pub(crate) fn usage(&self) -> Usage {
        let used = unix::used_by_children();
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Usage {
            wall: micros(self.duration()),
            user: micros(used.user),
            system: micros(used.system),
            max_rss: used.max_rss,
        }
    }

    /// Sends a signal to the command's process group, as long as it has members.
    pub(crate) fn signal(&self, signal: Signal) {
        self.pass_on(signal.as_raw().try_into().unwrap_or_default());
    }

    /// Passes a signal on to the command's process group. The group of a session of its own is orphaned, to which the
    /// terminal's stop signals do nothing (setpgid(2)): it gets the one that cannot be ignored.
    pub(crate) fn pass_on(&self, number: u8) {
        let is_stop = STOPS.iter().any(|stop| stop.as_raw() == i32::from(number));
        let sent = if self.leads_session && is_stop { Signal::STOP.as_raw() as u8 } else { number };
        if !self.has_members() {
            debug!(sent, "nobody is left to signal");
        } else if let Err(error) = unix::kill_group(self.leader, sent) {
            debug!(sent, "the command could not be signalled: {error}");
        }
        if self.has_left_its_group()
            && let Err(error) = unix::kill(self.leader, sent)
        {
            debug!(sent, "the command itself could not be signalled: {error}");
        }
        if is_stop && !self.has_terminal {
            stop_myself(); // with the terminal lent, that waits until the command has stopped
        }
    }

    /// Whether the command lives and has joined another group (setpgid(2)). Until it is reaped its number is its own.
    fn has_left_its_group(&self) -> bool {
        self.end.is_none() && getpgid(Some(self.leader)).is_ok_and(|group| group != self.leader)
    }

    /// Whether the process group still has members: then its number is nobody else's. Until it is reaped the command is
    /// one; afterwards those of its orphans are that became children of this process.
    fn has_members(&self) -> bool {
        self.end.is_none() || has_children(WaitId::Pgid(Some(self.leader)))
    }

    /// Sends a signal to the process group and, as far as `/proc` tells, to every other descendant.
    pub(crate) fn signal_everybody(&self, signal: Signal) {
        for _ in 0..ROUNDS {
            // A member below a parent that has left the group does not count as one as long as that parent lives.
            let group = self.has_members().then_some(self.leader);
            self.signal(signal);
            if signal == Signal::TERM && self.end.is_some() {
                self.signal(Signal::CONT); // likewise
            }
            let strays: Vec<_> = descendants::of(getpid())
                .into_iter()
                .filter(|living| group.is_none() || living.group != group)
                .collect();
            for stray in &strays {
                if let Err(error) = descendants::signal(stray, signal) {
                    debug!(pid = ?stray.pid, "it could not be signalled: {error}");
                }
                if signal == Signal::TERM {
                    drop(descendants::signal(stray, Signal::CONT)); // a stopped one would not hear of it
                }
            }
            if strays.is_empty() || signal != Signal::KILL {
                return;
            }
        }
    }
}

/// How often those who were forked meanwhile are looked for when everybody is killed.
const ROUNDS: usize = 16;

/// Sent by a terminal, or to a reader or writer in its background, and ignored by an orphaned group.
const STOPS: [Signal; 3] = [Signal::TSTP, Signal::TTIN, Signal::TTOU];

/// Stops this process until somebody continues it. A PID 1 cannot be stopped from inside, and goes on.
fn stop_myself() {
    if let Err(errno) = rustix::process::kill_process(getpid(), Signal::STOP) {
        debug!("the agent itself is not stopped: {errno}");
    }
}

fn owns_terminal() -> bool {
    tcgetpgrp(rustix::stdio::stdin()).is_ok_and(|foreground| foreground == getpgrp())
}

/// Has a process that is not the command begin with no signal blocked.
pub(crate) fn unblock_signals(process: &mut std::process::Command) {
    unix::prepare_child(process, false);
}

/// Whether any descendant lives, or has not been reaped: an orphan is a child of this process, so that there is a child as
/// long as there is a descendant.
pub(crate) fn has_descendants() -> bool {
    has_children(WaitId::All)
}

fn has_children(which: WaitId<'_>) -> bool {
    waitid(which, WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT).is_ok()
}

/// Living descendants, and those who hold the output open even if they are none.
pub(crate) fn leftovers(held: &[Held]) -> Vec<Process> {
    let myself = getpid();
    let mut found: Vec<_> = descendants::of(myself).iter().map(|living| descendants::describe(living, held)).collect();
    if !held.is_empty() && found.iter().all(|process| process.holds.is_empty()) {
        found.extend(descendants::holders(held, myself));
    }
    found
}

/// This process's own standard output and standard error, as they look in `/proc`; without those that lead nowhere.
pub(crate) fn own_streams() -> Vec<Held> {
    let streams = [(Stream::Stdout, "/proc/self/fd/1"), (Stream::Stderr, "/proc/self/fd/2")];
    let links = streams.into_iter().filter_map(|(stream, path)| Some((stream, std::fs::read_link(path).ok()?)));
    links
        .map(|(stream, link)| Held { streams: vec![stream], link: link.to_string_lossy().into_owned() })
        .filter(|held| held.link != "/dev/null")
        .collect()
}

/// Whether a descendant holds one of these open.
pub(crate) fn is_held(streams: &[Held]) -> bool {
    has_descendants()
        && descendants::of(getpid()).iter().any(|living| !descendants::describe(living, streams).holds.is_empty())
}

/// Kills all descendants there are.
pub(crate) fn kill_descendants() {
    for _ in 0..ROUNDS {
        let living = if has_descendants() { descendants::of(getpid()) } else { Vec::new() };
        if living.is_empty() {
            return;
        }
        living.iter().for_each(|living| drop(descendants::signal(living, Signal::KILL))); // it may have ended by now
    }
}

/// Starts a command as it is.
fn start(command: &[OsString], output: &Output, environment: &[(&str, OsString)]) -> io::Result<Pid> {
    let is_replaced = |name: &OsStr| environment.iter().any(|(new, _)| name == *new);
    let kept = std::env::vars_os().filter(|(name, _)| !is_replaced(name));
    let mut variables = kept.map(|(name, value)| variable(&name, &value)).collect::<Vec<_>>();
    variables.extend(environment.iter().map(|(name, value)| variable(OsStr::new(name), value)));
    unix::spawn(command, &variables, output.ends())
}

fn variable(name: &OsStr, value: &OsStr) -> OsString {
    let mut variable = name.to_owned();
    variable.push("=");
    variable.push(value);
    variable
}

/// Starts a command on a terminal or as another user, which takes steps between fork and exec.
fn start_as(
    command: &[OsString],
    output: Output,
    user: Option<User>,
    environment: &[(&str, OsString)],
) -> io::Result<Pid> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut process = std::process::Command::new(program);
    process.args(arguments).envs(environment.iter().map(|(name, value)| (name, value)));
    if let Some(user) = user {
        become_user(&mut process, user, &output)?;
    }
    output.attach(&mut process)?;
    let child = process.spawn()?;
    Ok(Pid::from_raw(child.id().cast_signed()).expect("a child's process id is positive"))
}

/// Only root can; the pipes or the terminal become the user's, who may open them again by `/dev/stdout`.
fn become_user(process: &mut std::process::Command, user: User, output: &Output) -> io::Result<()> {
    let group = user.group(Path::new("/etc/passwd"));
    process.uid(user.uid).gid(group);
    let (uid, gid) = user.owner(group);
    output.descriptors().try_for_each(|descriptor| fchown(descriptor, Some(uid), Some(gid)))?;
    Ok(())
}

fn end_of(status: WaitStatus, memory: &OomKills) -> End {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => End::Exited(code as u8), // wait(2): an exit status has eight bits
        (None, Some(signal)) => {
            let oom = signal == Signal::KILL.as_raw() && memory.has_grown();
            End::Signalled { signal: signal as u8, core: status.as_raw() & CORE != 0, oom }
        }
        (None, None) => unreachable!("only ends get here"),
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
