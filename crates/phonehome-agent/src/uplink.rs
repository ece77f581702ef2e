//! The connection home: dial, resume, send, come back.

mod dial;
mod socket;
#[cfg(feature = "tls")]
mod tls;

use std::{sync::Arc, time::Duration};

use phonehome_proto::{
    backoff::Backoff,
    close,
    frame::{AgentFrame, Cancel, CommandState, Hello, Pong, ServerFrame},
    heartbeat::{Beat, Heartbeat},
    id::{BuildId, ProducerId, StepName},
    sender::{Order, Outgoing, ServerViolation},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};

pub(crate) use self::dial::Dialler;
use self::socket::{Incoming, Socket, SocketError};
use crate::outbox::Outbox;

/// Delivers an outbox to the server, for as long as that takes.
pub(crate) struct Uplink {
    pub(crate) dialler: Dialler,
    pub(crate) identity: Identity,
    pub(crate) outbox: Arc<Outbox>,
    /// Whether the server has ever welcomed this agent.
    pub(crate) welcomed: watch::Sender<bool>,
    pub(crate) cancels: mpsc::Sender<Cancel>,
    pub(crate) command: watch::Receiver<CommandState>,
    pub(crate) last_output: watch::Receiver<Instant>,
}

/// Who calls.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) build: BuildId,
    pub(crate) step: StepName,
    pub(crate) producer: ProducerId,
}

/// How a delivery ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// Every byte is where it belongs.
    Complete,
    /// The server accepted the end and says what is missing.
    Incomplete(String),
    /// The server does not want this log, and trying again would not change that.
    Refused(String),
}

/// Why one connection ended.
#[derive(Debug, thiserror::Error)]
enum Hangup {
    #[error("the server closed the connection: {0} {1}")]
    Closed(u16, String, bool),
    #[error("the server was silent for {} s", phonehome_proto::limits::DEAD_AFTER.as_secs())]
    Dead,
    #[error("the server is about to go")]
    Draining,
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("the server broke the protocol")]
    Violation(#[from] ServerViolation),
}

impl Hangup {
    /// Whether coming back is pointless.
    fn is_fatal(&self) -> bool {
        match self {
            Self::Closed(code, _, was_welcomed) => !close::may_return(*code, *was_welcomed),
            Self::Socket(SocketError::Encode(_)) | Self::Violation(_) => true, // the next connection would be no better
            Self::Dead | Self::Draining | Self::Socket(SocketError::Decode(_) | SocketError::Transport(_)) => false,
        }
    }
}

/// How long to wait for the server to close after the log is delivered.
const FAREWELL: Duration = Duration::from_secs(2);

impl Uplink {
    /// Connects again and again until the log is delivered or refused.
    pub(crate) async fn run(mut self) -> Delivery {
        let mut backoff = Backoff::default();
        loop {
            let before = self.outbox.with(|sender| sender.oldest());
            let floor = match self.dialler.dial().await {
                Ok(socket) => {
                    backoff.handle_connected(Instant::now().into_std());
                    match self.talk(socket).await {
                        Ok(delivery) => return delivery,
                        Err(hangup) if hangup.is_fatal() => return self.refused(&hangup),
                        Err(hangup) => info!("disconnected: {:#}", anyhow::Error::from(hangup)),
                    }
                    Duration::ZERO
                }
                Err(failure) if failure.is_fatal() => return self.refused(&failure),
                Err(failure) => {
                    let floor = failure.retry_after();
                    info!("cannot connect: {:#}", anyhow::Error::from(failure));
                    floor
                }
            };
            let progressed = self.outbox.with(|sender| sender.oldest()) > before;
            let delay = backoff.handle_disconnected(Instant::now().into_std(), progressed, random(), floor);
            debug!(?delay, "dialling again");
            sleep(delay).await;
        }
    }

    fn refused(&self, why: &(dyn std::error::Error + 'static)) -> Delivery {
        let mut reason = why.to_string();
        let mut source = why.source();
        while let Some(cause) = source {
            reason = format!("{reason}: {cause}");
            source = cause.source();
        }
        warn!("the server refuses this log, the command goes on with local output only: {reason}");
        self.outbox.abandon();
        Delivery::Refused(reason)
    }

    /// One connection, from hello to its end.
    async fn talk(&mut self, mut socket: Socket) -> Result<Delivery, Hangup> {
        socket.queue(&self.hello())?;
        self.outbox.with(phonehome_proto::sender::Sender::handle_connected);
        let result = self.stream(&mut socket).await;
        self.outbox.with(phonehome_proto::sender::Sender::handle_disconnected);
        if result.is_ok() {
            drop(timeout(FAREWELL, socket.close()).await); // delivered already: a lost farewell changes nothing
        }
        result
    }

    fn hello(&self) -> AgentFrame {
        let (oldest, next) = self.outbox.with(|sender| (sender.oldest(), sender.next()));
        AgentFrame::Hello(Hello {
            build: self.identity.build.clone(),
            step: self.identity.step.clone(),
            producer: self.identity.producer,
            oldest,
            next,
            labels: std::collections::BTreeMap::new(),
            agent: concat!("phonehome-agent/", env!("CARGO_PKG_VERSION")).into(),
            capabilities: Vec::new(),
        })
    }

    async fn stream(&mut self, socket: &mut Socket) -> Result<Delivery, Hangup> {
        let mut heartbeat = Heartbeat::listening(Instant::now().into_std());
        loop {
            self.fill(socket)?;
            let incoming = tokio::select! {
                biased; // what the server says may change what is worth sending
                incoming = socket.next() => incoming?,
                () = self.outbox.filled(), if !socket.is_busy() => continue,
                () = sleep_until(heartbeat.poll_timeout().into()) => {
                    if heartbeat.handle_timeout(Instant::now().into_std()) == Beat::Dead {
                        return Err(Hangup::Dead);
                    }
                    continue;
                }
            };
            heartbeat.heard(Instant::now().into_std());
            match incoming {
                Incoming::Writable | Incoming::Alive => {}
                Incoming::Closed(code, reason) => {
                    let was_welcomed = self.outbox.with(|sender| sender.is_welcomed());
                    return Err(Hangup::Closed(code, reason, was_welcomed));
                }
                Incoming::Frame(frame) => {
                    if let Some(delivery) = self.handle_frame(frame, socket)? {
                        return Ok(delivery);
                    }
                }
            }
        }
    }

    /// Gives the socket its next message when it has none.
    fn fill(&self, socket: &mut Socket) -> Result<(), Hangup> {
        if socket.is_busy() {
            return Ok(());
        }
        match self.outbox.with(phonehome_proto::sender::Sender::poll_transmit) {
            Some(Outgoing::Message(message)) => socket.queue_message(message),
            Some(Outgoing::Frame(frame)) => socket.queue(&frame)?,
            None => {}
        }
        Ok(())
    }

    fn handle_frame(&mut self, frame: ServerFrame, socket: &mut Socket) -> Result<Option<Delivery>, Hangup> {
        match self.outbox.with(|sender| sender.handle_frame(frame))? {
            Order::Cancel(cancel) => self.cancel(cancel),
            Order::Delivered(None) => return Ok(Some(Delivery::Complete)),
            Order::Delivered(Some(reason)) => return Ok(Some(Delivery::Incomplete(reason))),
            Order::Drain(_) => return Err(Hangup::Draining),
            Order::Nothing => {}
            Order::Pong(id) => socket.queue(&self.pong(id))?,
            Order::Welcome(welcome) => {
                info!(attempt = welcome.attempt, next = welcome.next, "connected");
                self.welcomed.send_replace(true);
                if let Some(cancel) = welcome.cancel {
                    self.cancel(cancel);
                }
            }
        }
        Ok(None)
    }

    fn cancel(&self, cancel: Cancel) {
        warn!(reason = cancel.reason, "the server cancels the build");
        drop(self.cancels.try_send(cancel)); // a queued one says the same
    }

    fn pong(&self, id: u64) -> AgentFrame {
        let command = *self.command.borrow();
        let quiet = self.last_output.borrow().elapsed().as_millis() as u64;
        AgentFrame::Pong(Pong { id, command, quiet, held: self.outbox.with(|sender| sender.cost()) })
    }
}

/// Evenly from 0..1. Without a source of randomness the delay is just not spread.
fn random() -> f64 {
    let bits = getrandom::u32().unwrap_or(u32::MAX / 2);
    f64::from(bits) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use phonehome_proto::codec::EncodeError;

    use super::*;

    #[test]
    fn a_frame_that_cannot_be_written_is_not_tried_again() {
        assert!(Hangup::from(SocketError::Encode(EncodeError::TooLarge(1))).is_fatal());
    }
}
