//! Signals to this process: blocked before anything else happens, and read one by one.
//!
//! Reading from a descriptor keeps what handlers lose: the order, each of several real-time signals of one number, and
//! who sent it. It takes two system calls however many signals there are.

use std::{io, os::fd::OwnedFd};

use rustix::{io::Errno, process::Signal};
use tokio::io::{Interest, unix::AsyncFd};

use super::unix;

/// Signals that wait from now on to be read.
#[derive(Debug)]
pub struct Blocked(OwnedFd);

impl Blocked {
    /// Blocks them. The first thing that a process does: what came before is handled as if it had no supervisor.
    ///
    /// # Errors
    ///
    /// When the system has no descriptor left.
    pub fn all() -> io::Result<Self> {
        unix::block_signals().map(Self)
    }
}

/// Blocks them once more, in this thread: musl unblocks some of its own in every thread that starts, and in the one that
/// starts the first. As at the beginning, this does not fail.
pub(crate) fn block_again() {
    drop(unix::block_all());
}

/// Every signal to this process.
#[derive(Debug)]
pub(crate) struct Signals {
    descriptor: AsyncFd<OwnedFd>,
}

/// What a signal means for the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caught {
    /// Some child has ended or was stopped.
    Child,
    /// Pass it on to the command: its number.
    Other(u8),
}

impl Caught {
    /// Whether it tells a process to end that has not been told what to do about it: the number.
    pub(crate) fn ends(self) -> Option<u8> {
        match self {
            Self::Other(signal) if ENDS.iter().any(|end| end.as_raw() == i32::from(signal)) => Some(signal),
            Self::Child | Self::Other(_) => None,
        }
    }
}

/// Sent to end a process in an orderly way.
const ENDS: [Signal; 4] = [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT];

impl Signals {
    pub(crate) fn new(Blocked(descriptor): Blocked) -> io::Result<Self> {
        Ok(Self { descriptor: unix::readable(descriptor)? })
    }

    /// The next signal. Cancel safe.
    pub(crate) async fn next(&mut self) -> Caught {
        loop {
            let read = self.descriptor.async_io(Interest::READABLE, read).await;
            if let Ok(Some(caught)) = read {
                return caught;
            }
        }
    }

    /// The next signal, if one has come already.
    pub(crate) fn pending(&mut self) -> Option<Caught> {
        loop {
            match read(self.descriptor.get_ref()) {
                Ok(Some(caught)) => return Some(caught),
                Ok(None) => {}
                Err(_) => return None,
            }
        }
    }
}

/// One signal. `None` for one that is nobody's business.
fn read(descriptor: &OwnedFd) -> io::Result<Option<Caught>> {
    let mut info = [0; INFO];
    match rustix::io::read(descriptor, &mut info) {
        Ok(_) => Ok(meaning(&info)),
        Err(Errno::INTR) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Size of what is read, bytes (signalfd(2), `struct signalfd_siginfo`).
const INFO: usize = 128;

/// The number is the first member, the sender the fourth.
fn meaning(info: &[u8; INFO]) -> Option<Caught> {
    let word = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    let (number, sender) = (word(0), word(12));
    match i32::try_from(number).ok()? {
        number if number == Signal::CHILD.as_raw() => Some(Caught::Child),
        // From a write of this process's own to a pipe that nobody reads.
        number if number == Signal::PIPE.as_raw() && sender == std::process::id() => None,
        number => u8::try_from(number).ok().map(Caught::Other),
    }
}
