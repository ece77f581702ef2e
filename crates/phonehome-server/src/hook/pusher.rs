//! Whether the person who pushed is still there.
//!
//! git tells a hook nothing. When its client dies, `git receive-pack` lives on with the hook's output pipe open and
//! unread, so writing succeeds until the pipe is full. Four signs are watched: the reading end of a pipe is closed; a
//! process between the pusher and `receive-pack` is gone; nobody reads what `receive-pack` answers to the pusher; what was
//! written is not read for too long.

use std::{
    fs,
    io::Write,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileTypeExt,
    },
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    io::{Errno, ioctl_fionread},
    process::{Pid, PidfdFlags, getppid, pidfd_open},
};
use tokio::{sync::oneshot, time::Instant};

use super::outlet::is_pipe;

/// A reader that takes nothing for this long has stopped reading.
pub(super) const STALL: Duration = Duration::from_secs(30);

/// How often it is looked at whether anything was read.
const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Completes with the reason when the pusher is gone; never when that cannot be found out. A thread waits, because the
/// descriptors are shared with others and so must not be made non-blocking; it ends with the process.
pub(super) async fn gone(
    streams: [BorrowedFd<'static>; 2],
    written: Arc<AtomicU64>,
    stall: Option<Duration>,
) -> String {
    let pipes: Vec<_> = streams.into_iter().filter(|stream| is_pipe(*stream)).collect();
    let (tell, told) = oneshot::channel();
    let ancestors = receivers();
    let answers = ancestors.iter().filter_map(|receiver| answer_pipe(*receiver)).collect();
    let watch = Watch { clients: clients(&ancestors), answers, stall, unread: Unread::new(written), pipes };
    let watching = std::thread::Builder::new().name("pusher".into()).spawn(move || {
        if let Some(reason) = watch.run() {
            drop(tell.send(reason)); // nobody may wait for it any more
        }
    });
    match (watching, told.await) {
        (Ok(_), Ok(reason)) => reason,
        (Ok(_) | Err(_), _) => std::future::pending().await,
    }
}

struct Watch {
    pipes: Vec<BorrowedFd<'static>>,
    clients: Vec<OwnedFd>,
    answers: Vec<OwnedFd>,
    /// A reader that takes nothing for this long has stopped reading.
    stall: Option<Duration>,
    unread: Unread,
}

impl Watch {
    fn run(mut self) -> Option<String> {
        loop {
            let pipes = self.pipes.iter().map(|pipe| PollFd::from_borrowed_fd(*pipe, PollFlags::empty()));
            let clients = self.clients.iter().map(|client| PollFd::new(client, PollFlags::IN));
            let answers = self.answers.iter().map(|answer| PollFd::new(answer, PollFlags::empty()));
            let mut polled: Vec<_> = pipes.chain(clients).chain(answers).collect();
            match poll(&mut polled, Some(&LOOK)) {
                Ok(1..) => return Some("the pusher is gone".into()),
                Ok(0) | Err(Errno::INTR) => {}
                Err(_) => return None,
            }
            let silence = self.unread.silence(&self.pipes, Instant::now());
            if let Some(stall) = self.stall.filter(|stall| silence >= *stall) {
                return Some(format!("nobody has read the output for {} s", stall.as_secs()));
            }
        }
    }
}

/// Tells a reader who takes its time from one who takes nothing.
struct Unread {
    /// Bytes written to all streams so far.
    written: Arc<AtomicU64>,
    /// The most that was ever seen to be read.
    read: u64,
    since: Instant,
}

impl Unread {
    fn new(written: Arc<AtomicU64>) -> Self {
        Self { written, read: 0, since: Instant::now() }
    }

    /// How long nothing was read although there was something.
    fn silence(&mut self, pipes: &[BorrowedFd<'_>], now: Instant) -> Duration {
        let written = self.written.load(Ordering::Relaxed);
        // FIONREAD counts what lies in a pipe, at either end (pipe(7)).
        let unread = pipes.iter().filter_map(|pipe| ioctl_fionread(pipe).ok()).max().unwrap_or(0);
        self.note(written, unread, now)
    }

    fn note(&mut self, written: u64, unread: u64, now: Instant) -> Duration {
        let read = written.saturating_sub(unread);
        if unread == 0 || read > self.read {
            self.read = self.read.max(read);
            self.since = now;
        }
        now.duration_since(self.since)
    }
}

/// The processes above this one that are `receive-pack`, or a shell that waits for it. Empty outside git.
fn receivers() -> Vec<Pid> {
    let ancestors = std::iter::successors(getppid(), |pid| parent(*pid)).take(MAX_ANCESTORS);
    ancestors.skip_while(|pid| !is_receive_pack(*pid)).take_while(|pid| is_receive_pack(*pid)).collect()
}

/// The receivers, and whoever started them: the pusher's git, or a session of sshd.
fn clients(receivers: &[Pid]) -> Vec<OwnedFd> {
    let starter = receivers.last().and_then(|pid| parent(*pid)).filter(|pid| *pid != Pid::INIT);
    let all = receivers.iter().copied().chain(starter);
    all.filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()).collect()
}

/// The pipe on which a receiver answers the pusher, opened once more for as long as this process lives: the system says
/// when its reader is gone. Nothing is written to it.
fn answer_pipe(receiver: Pid) -> Option<OwnedFd> {
    let path = format!("/proc/{}/fd/1", receiver.as_raw_nonzero());
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let is_fifo = fs::metadata(&path).is_ok_and(|metadata| metadata.file_type().is_fifo());
    if is_fifo { rustix::fs::open(path, flags, Mode::empty()).ok() } else { None }
}

/// How far up `receive-pack` is looked for: a hook's shell, its dispatcher, a wrapper or two.
const MAX_ANCESTORS: usize = 8;

fn is_receive_pack(pid: Pid) -> bool {
    let command = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    command.windows(RECEIVE_PACK.len()).any(|part| part == RECEIVE_PACK)
}

const RECEIVE_PACK: &[u8] = b"receive-pack";

/// Field 4 of proc_pid_stat(5), behind a name that may hold anything.
fn parent(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    Pid::from_raw(fields.split(' ').nth(1)?.parse().ok()?)
}

/// Writes a line where it cannot block: for last words when the printer has given up.
pub(super) fn try_write(stream: BorrowedFd<'_>, line: &str) {
    let mut polled = [PollFd::new(&stream, PollFlags::OUT)];
    if poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
        && let Ok(owned) = stream.as_fd().try_clone_to_owned()
    {
        drop(writeln!(fs::File::from(owned), "{line}")); // nobody reads it, then
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_reader_who_takes_nothing_has_stalled() {
        let start = Instant::now();
        let mut unread = Unread { written: Arc::default(), read: 0, since: start };
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut is_stalled = |written, read, now| unread.note(written, read, now) >= STALL;
        assert!(!is_stalled(100, 0, at(100)), "all is read");
        assert!(!is_stalled(200, 100, at(129)));
        assert!(is_stalled(200, 100, at(130)), "nothing was read since 100 s");
        assert!(!is_stalled(300, 100, at(131)), "a full pipe that flows");
        assert!(!is_stalled(300, 100, at(160)));
        assert!(!is_stalled(301, 100, at(161)));
    }

    #[test]
    fn the_parent_of_this_process_is_found_in_proc() {
        assert_eq!(parent(rustix::process::getpid()), getppid());
    }
}
