//! What has to be before the command may start, and who can forbid it.

use std::error::Error;

use phonehome_proto::{
    event::{Event, Waiting},
    frame::End,
};
use tokio::sync::watch;

use crate::{
    command::{Caught, Reaper, Signals},
    config::Start,
    failure::{EXIT_TERMINATED, Failure},
    line::Line,
    recorder::Recorder,
    siblings::{Siblings, Unborn},
    supervisor::recv,
    uplink::Delivery,
};

/// Whether the command may start.
pub(crate) enum Admission {
    /// It may. These signals came meanwhile and are meant for it.
    Granted(Vec<u8>),
    /// It never may.
    Denied(Denied),
}

/// Why a command is never started.
pub(crate) struct Denied {
    pub(crate) end: End,
    /// Whether the agent itself was told to end.
    pub(crate) told_to_end: bool,
    /// Whether it is because a sibling has died.
    pub(crate) by_death: bool,
    /// Whether somebody wanted it so: nothing failed.
    pub(crate) is_wished: bool,
}

impl Denied {
    /// For another reason than those.
    pub(crate) fn because(end: End) -> Self {
        Self { end, told_to_end: false, by_death: false, is_wished: false }
    }

    /// For a failure of the agent's own.
    pub(crate) fn failed(failure: &Failure) -> Self {
        let reason = failure.source().map_or_else(|| failure.to_string(), |cause| format!("{failure}: {cause}"));
        Self::new(failure.exit_code(), reason)
    }

    fn new(code: u8, reason: String) -> Self {
        Self::because(End::NotStarted { code, reason })
    }
}

/// Signals kept for the command at most.
const EARLY: usize = 64;

/// What is looked at while the command waits.
pub(crate) struct Gate<'a> {
    pub(crate) start: Start,
    pub(crate) siblings: &'a mut Siblings,
    pub(crate) line: Option<&'a mut Line>,
    pub(crate) recorder: Option<&'a mut Recorder>,
    pub(crate) signals: &'a mut Signals,
    pub(crate) reaper: &'a Reaper,
}

impl Gate<'_> {
    /// Waits until the command may start, or until it never may.
    ///
    /// # Errors
    ///
    /// When it is to wait for the server, which does not want it.
    pub(crate) async fn admission(mut self) -> Result<Admission, Failure> {
        let mut early = Vec::new();
        let mut welcome = self.welcome();
        if let (Some(recorder), Some(_)) = (&self.recorder, &welcome) {
            recorder.herald().tell(Event::Waiting(Waiting { r#for: vec!["the server".into()] }));
        }
        while let Some(caught) = self.signals.pending() {
            if let Some(denied) = self.handle(caught, &mut early) {
                return Ok(Admission::Denied(denied));
            }
        }
        let mut is_alone = true;
        while welcome.is_some() || is_alone {
            let mut cancels = self.line.as_mut().and_then(|line| line.cancels.take());
            let heard = tokio::select! {
                biased; // who says no is heard first
                caught = self.signals.next() => self.handle(caught, &mut early),
                Some(cancel) = recv(&mut cancels) => Some(Denied::cancelled(&cancel.reason)),
                births = self.siblings.births(), if is_alone => {
                    is_alone = false;
                    births.err().map(Denied::unborn)
                }
                () = attend(&mut self.recorder) => None,
                () = welcomed(&mut welcome) => {
                    self.refusal().await?;
                    welcome = None;
                    None
                }
            };
            if let Some(line) = &mut self.line {
                line.cancels = cancels;
            }
            if let Some(denied) = heard {
                return Ok(Admission::Denied(denied));
            }
        }
        Ok(Admission::Granted(early))
    }

    /// Whether the server has welcomed this agent, if that matters.
    fn welcome(&self) -> Option<watch::Receiver<bool>> {
        let line = self.line.as_ref()?;
        (self.start == Start::Connected).then(|| line.welcomed.clone())
    }

    fn handle(&self, caught: Caught, early: &mut Vec<u8>) -> Option<Denied> {
        match (caught, caught.ends()) {
            (Caught::Child, _) => self.reaper.reap(),
            (Caught::Other(_), Some(signal)) => return Some(Denied::signalled(signal)),
            (Caught::Other(signal), None) if early.len() < EARLY => early.push(signal),
            (Caught::Other(_), None) => {}
        }
        None
    }

    /// A welcome that will never come.
    async fn refusal(&mut self) -> Result<(), Failure> {
        let Some(line) = &mut self.line else { return Ok(()) };
        if *line.welcomed.borrow() {
            return Ok(());
        }
        line.delivered().await;
        match line.delivery() {
            Some(Delivery::Refused(reason)) => Err(Failure::Refused(reason.clone())),
            Some(Delivery::Complete | Delivery::Incomplete(_)) | None => Ok(()),
        }
    }
}

impl Denied {
    fn unborn(unborn: Unborn) -> Self {
        let by_death = matches!(unborn, Unborn::Death(_));
        Self { by_death, is_wished: by_death, ..Self::because(unborn.end()) }
    }

    fn cancelled(reason: &str) -> Self {
        let reason = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
        let reason = format!("cancelled before it was started{reason}");
        Self { is_wished: true, ..Self::new(EXIT_TERMINATED, reason) }
    }

    fn signalled(signal: u8) -> Self {
        let reason = format!("{} came before it was started", phonehome_proto::signal::name(signal));
        Self { told_to_end: true, is_wished: true, ..Self::new(SIGNALLED + signal, reason) }
    }
}

/// An exit code above it says which signal ended a command.
const SIGNALLED: u8 = 128;

/// Records what is told meanwhile.
async fn attend(recorder: &mut Option<&mut Recorder>) {
    match recorder {
        Some(recorder) => recorder.attend().await,
        None => std::future::pending().await,
    }
}

/// Completes with the welcome, or when there is nobody left who could bring it.
async fn welcomed(welcome: &mut Option<watch::Receiver<bool>>) {
    match welcome {
        Some(welcome) => drop(welcome.wait_for(|welcomed| *welcomed).await), // the caller finds out which it was
        None => std::future::pending().await,
    }
}
