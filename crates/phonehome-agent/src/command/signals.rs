//! Signals to this process, caught from before the command exists so that none is lost.

use std::{
    io,
    task::{Context, Poll},
};

use rustix::process::Signal;
use tokio::signal::unix::{self, SignalKind};

/// Every signal that is passed on, and the one that says a child has ended.
#[derive(Debug)]
pub(crate) struct Signals {
    caught: Vec<(Signal, unix::Signal)>,
}

/// What a signal means for the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caught {
    /// Some child has ended.
    Child,
    /// Pass it on to the command.
    Other(Signal),
}

/// All that can be caught and that others send. Left out: KILL and STOP, which cannot; the faults (ILL, TRAP, ABRT,
/// BUS, FPE, SEGV, SYS), which are this process's own; PIPE, an error code here; TTIN and TTOU, which stop a background
/// reader or writer of a terminal.
const PASSED_ON: [Signal; 18] = [
    Signal::HUP,
    Signal::INT,
    Signal::QUIT,
    Signal::USR1,
    Signal::USR2,
    Signal::ALARM,
    Signal::TERM,
    Signal::STKFLT,
    Signal::CONT,
    Signal::TSTP,
    Signal::URG,
    Signal::XCPU,
    Signal::XFSZ,
    Signal::VTALARM,
    Signal::PROF,
    Signal::WINCH,
    Signal::IO,
    Signal::POWER,
];

impl Signals {
    /// Starts to catch them.
    pub(crate) fn catch() -> io::Result<Self> {
        let catch = |signal: Signal| Ok((signal, unix::signal(SignalKind::from_raw(signal.as_raw()))?));
        let all = PASSED_ON.into_iter().chain([Signal::CHILD]);
        Ok(Self { caught: all.map(catch).collect::<io::Result<_>>()? })
    }

    /// The next signal. Cancel safe.
    pub(crate) async fn next(&mut self) -> Caught {
        let signal = std::future::poll_fn(|context| self.poll_next(context)).await;
        if signal == Signal::CHILD { Caught::Child } else { Caught::Other(signal) }
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Signal> {
        for (signal, stream) in &mut self.caught {
            if stream.poll_recv(context).is_ready() {
                return Poll::Ready(*signal);
            }
        }
        Poll::Pending
    }
}
