//! The connection home: dial, resume, send, come back.

mod dial;
mod socket;
mod upgrade;

use std::{sync::Arc, time::Duration};

use phonehome_env::Env;
use phonehome_proto::{
    backoff::{Backoff, Tried},
    close,
    frame::{AgentFrame, Cancel, CommandState, Hello, Pong, ServerFrame},
    heartbeat::{Beat, Heartbeat},
    id::{BuildId, ProducerId, StepName},
    limits::GATHER,
    sender::{Order, Outgoing, Sender, ServerViolation},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};

pub(crate) use self::dial::Dialler;
use self::socket::{Incoming, Socket, SocketError};
use crate::{labels::Labels, outbox::Outbox, spool::Left};

/// Delivers outboxes to the server, for as long as that takes.
pub(crate) struct Uplink {
    pub(crate) env: Env,
    pub(crate) dialler: Dialler,
    pub(crate) identity: Identity,
    pub(crate) outbox: Arc<Outbox>,
    /// What earlier agents of this step left: delivered first.
    pub(crate) left: Vec<Left>,
    /// Whether the server has ever welcomed this agent.
    pub(crate) welcomed: watch::Sender<bool>,
    pub(crate) cancels: mpsc::Sender<Cancel>,
    pub(crate) command: watch::Receiver<CommandState>,
    pub(crate) last_output: watch::Receiver<Instant>,
}

/// Who calls.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) build: BuildId,
    pub(crate) step: StepName,
    pub(crate) producer: ProducerId,
    /// As they are at the moment.
    pub(crate) labels: watch::Receiver<Labels>,
}

impl Identity {
    /// What the first frame of a connection says, or of a spool.
    pub(crate) fn hello(&self, oldest: u64, next: u64) -> Hello {
        Hello {
            build: self.build.clone(),
            step: self.step.clone(),
            producer: self.producer,
            oldest,
            next,
            labels: (**self.labels.borrow()).clone(),
            agent: concat!("phonehome-agent/", env!("CARGO_PKG_VERSION")).into(),
            capabilities: Vec::new(),
        }
    }
}

/// How a delivery ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivery {
    /// Every byte is where it belongs.
    Complete,
    /// The server accepted the end and says what is missing.
    Incomplete(String),
    /// The server does not want this log, and trying again would not change that.
    Refused(String),
}

/// One attempt's records and whose they are.
struct Parcel {
    identity: Identity,
    outbox: Arc<Outbox>,
    /// Whether an earlier agent left it. Then it may have no end: all of its records are all there is.
    is_left: bool,
}

impl Parcel {
    fn hello(&self) -> AgentFrame {
        let (oldest, next) = self.outbox.look(|sender| (sender.oldest(), sender.claimed_next()));
        AgentFrame::Hello(self.identity.hello(oldest, next))
    }

    fn is_delivered(&self) -> bool {
        let is_all =
            |sender: &Sender| sender.is_welcomed() && sender.finished().is_none() && sender.oldest() == sender.next();
        self.is_left && self.outbox.look(is_all)
    }
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
    #[error("records of the spool are lost, the server has to hear of it")]
    Stale,
    #[error("the server broke the protocol")]
    Violation(#[from] ServerViolation),
}

impl Hangup {
    /// Whether coming back is pointless.
    fn is_fatal(&self) -> bool {
        match self {
            Self::Closed(code, _, was_welcomed) => !close::may_return(*code, *was_welcomed),
            Self::Socket(SocketError::Encode(_)) | Self::Violation(_) => true, // the next connection would be no better
            Self::Dead | Self::Draining | Self::Stale => false,
            Self::Socket(SocketError::Decode(_) | SocketError::Transport(_)) => false,
        }
    }
}

/// The least that small records are gathered to, bytes.
const SMALLEST_GATHER: usize = 64;

/// How long to wait for the server to close after the log is delivered.
const FAREWELL: Duration = Duration::from_secs(2);

impl Uplink {
    /// Connects again and again until everything is delivered or refused.
    pub(crate) async fn run(mut self) -> Delivery {
        for left in std::mem::take(&mut self.left) {
            let labels = watch::channel(left.labels.clone()).1; // they change no more
            let identity = Identity { producer: left.producer, labels, ..self.identity.clone() };
            let (outbox, spooling) = left.start();
            let parcel = Parcel { identity, outbox, is_left: true };
            match self.deliver(&parcel).await {
                Delivery::Complete => info!("what an earlier agent left is delivered"),
                Delivery::Incomplete(reason) => warn!("the log of an earlier agent is incomplete: {reason}"),
                Delivery::Refused(reason) => {
                    warn!("the server refuses what an earlier agent left, it stays where it is: {reason}");
                    spooling.leave().await;
                    continue;
                }
            }
            parcel.outbox.abandon(); // nobody needs it any more
            spooling.leave().await;
        }
        let parcel = Parcel { identity: self.identity.clone(), outbox: self.outbox.clone(), is_left: false };
        let delivery = self.deliver(&parcel).await;
        if let Delivery::Refused(reason) = &delivery {
            warn!("the server refuses this log, the command goes on with local output only: {reason}");
            self.outbox.abandon();
        }
        delivery
    }

    async fn deliver(&mut self, parcel: &Parcel) -> Delivery {
        let mut backoff = Backoff::default();
        let mut gather = GATHER;
        loop {
            let before = parcel.outbox.look(Sender::oldest);
            let (tried, floor) = match self.dialler.dial().await {
                Ok(socket) => {
                    backoff.handle_connected(Instant::now().into_std());
                    match self.talk(parcel, socket).await {
                        Ok(delivery) => return delivery,
                        Err(hangup) if hangup.is_fatal() => return refused(&hangup),
                        Err(hangup) => info!("disconnected: {:#}", anyhow::Error::from(hangup)),
                    }
                    let progressed = parcel.outbox.look(Sender::oldest) > before;
                    // A link that always breaks early may let something smaller through.
                    gather = if progressed { (4 * gather).min(GATHER) } else { (gather / 4).max(SMALLEST_GATHER) };
                    parcel.outbox.with(|sender| sender.gather(gather));
                    (if progressed { Tried::Progressed } else { Tried::TurnedAway }, Duration::ZERO)
                }
                Err(failure) if failure.is_fatal() => return refused(&failure),
                Err(failure) => {
                    let tried = if failure.is_unanswered() { Tried::Unreachable } else { Tried::TurnedAway };
                    let floor = failure.retry_after();
                    info!("cannot connect: {:#}", anyhow::Error::from(failure));
                    (tried, floor)
                }
            };
            let delay = backoff.handle_disconnected(Instant::now().into_std(), tried, self.env.jitter(), floor);
            debug!(?delay, "dialling again");
            sleep(delay).await;
        }
    }

    /// One connection, from hello to its end.
    async fn talk(&mut self, parcel: &Parcel, mut socket: Socket) -> Result<Delivery, Hangup> {
        parcel.outbox.take_stale();
        socket.queue(&parcel.hello())?;
        parcel.outbox.with(Sender::handle_connected);
        let result = self.stream(parcel, &mut socket).await;
        parcel.outbox.with(Sender::handle_disconnected);
        if result.is_ok() {
            drop(timeout(FAREWELL, socket.close()).await); // delivered already: a lost farewell changes nothing
        }
        result
    }

    async fn stream(&mut self, parcel: &Parcel, socket: &mut Socket) -> Result<Delivery, Hangup> {
        let mut heartbeat = Heartbeat::listening(Instant::now().into_std());
        loop {
            if parcel.is_delivered() {
                return Ok(Delivery::Complete);
            }
            if parcel.outbox.take_stale() {
                return Err(Hangup::Stale);
            }
            fill(&parcel.outbox, socket)?;
            let incoming = tokio::select! {
                biased; // what the server says may change what is worth sending
                incoming = socket.next() => incoming?,
                () = parcel.outbox.filled(), if !socket.is_busy() => continue,
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
                    let was_welcomed = parcel.outbox.look(Sender::is_welcomed);
                    return Err(Hangup::Closed(code, reason, was_welcomed));
                }
                Incoming::Frame(frame) => {
                    if let Some(delivery) = self.handle_frame(parcel, frame, socket)? {
                        return Ok(delivery);
                    }
                }
            }
        }
    }

    fn handle_frame(
        &mut self,
        parcel: &Parcel,
        frame: ServerFrame,
        socket: &mut Socket,
    ) -> Result<Option<Delivery>, Hangup> {
        let before = parcel.outbox.look(Sender::oldest);
        let order = parcel.outbox.with(|sender| sender.handle_frame(frame))?;
        if parcel.is_left && (matches!(order, Order::Welcome(_)) || parcel.outbox.look(Sender::oldest) > before) {
            self.outbox.encourage(); // the server is there, it is just not this attempt's turn
        }
        match order {
            Order::Cancel(cancel) => self.cancel(cancel),
            Order::Delivered(None) => return Ok(Some(Delivery::Complete)),
            Order::Delivered(Some(reason)) => return Ok(Some(Delivery::Incomplete(reason))),
            Order::Drain(_) => return Err(Hangup::Draining),
            Order::Nothing => {}
            Order::Pong(id) => socket.queue(&self.pong(id, &parcel.outbox))?,
            Order::Welcome(welcome) => {
                info!(attempt = welcome.attempt, next = welcome.next, "connected");
                self.welcomed.send_replace(!parcel.is_left || *self.welcomed.borrow());
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

    fn pong(&self, id: u64, outbox: &Outbox) -> AgentFrame {
        let command = *self.command.borrow();
        let quiet = self.last_output.borrow().elapsed().as_millis() as u64;
        AgentFrame::Pong(Pong { id, command, quiet, held: outbox.look(Sender::cost) })
    }
}

/// Gives the socket its next message when it has none.
fn fill(outbox: &Outbox, socket: &mut Socket) -> Result<(), Hangup> {
    if socket.is_busy() {
        return Ok(());
    }
    match outbox.with(Sender::poll_transmit) {
        Some(Outgoing::Message(message)) => socket.queue_message(message),
        Some(Outgoing::Frame(frame)) => socket.queue(&frame)?,
        None => {}
    }
    Ok(())
}

fn refused(why: &(dyn std::error::Error + 'static)) -> Delivery {
    let mut reason = why.to_string();
    let mut source = why.source();
    while let Some(cause) = source {
        reason = format!("{reason}: {cause}");
        source = cause.source();
    }
    Delivery::Refused(reason)
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
