//! One agent's socket, from its hello to its end.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use phonehome_env::Env;
use phonehome_proto::{
    close::CloseCode,
    codec::{Codec, DecodeError, EncodeError, Message},
    frame::{Ack, AgentFrame, Cancel, Drain, Finished, FinishedAck, Hello, Ping, Record, ServerFrame, Welcome},
    heartbeat::{Beat, Heartbeat},
    limits::{
        ACK_BYTES, ACK_DELAY, HEARTBEAT, HELLO_TIMEOUT, MAX_CLOSE_REASON, MAX_MESSAGE, MAX_PAYLOAD, MAX_WINDOW,
        MIN_WINDOW, WINDOW,
    },
    receiver::{AgentViolation, Ending},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, error::CapacityError, protocol::CloseFrame},
};
use tracing::{debug, info, trace, warn};

use crate::{
    builds::{Build, Refusal, Seat, expiry},
    server::Shared,
    store::{AttemptFiles, Opened, Stuck},
};

/// A socket whose peer has shown a build's token.
pub(crate) struct Connection<S> {
    socket: WebSocketStream<S>,
    codec: Codec,
    build: Arc<Build>,
    shared: Arc<Shared>,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Hangup {
    #[error("closed by the agent")]
    Closed,
    #[error("the agent was silent for too long")]
    Dead,
    #[error("the agent sent a bad frame")]
    Decode(#[from] DecodeError),
    #[error("a frame cannot be sent")]
    Encode(#[from] EncodeError),
    #[error("no hello in time")]
    NoHello,
    #[error("{1}")]
    Refused(CloseCode, String),
    #[error("the server shuts down")]
    ShuttingDown,
    #[error("the connection broke")]
    Socket(#[from] tungstenite::Error),
    #[error("storage is not available")]
    Storage,
    #[error("a newer connection of this step has taken over")]
    Superseded,
    #[error("the agent sent {0} at the wrong time")]
    Unexpected(&'static str),
    #[error("the agent broke the protocol")]
    Violation(#[from] AgentViolation),
}

impl From<Stuck> for Hangup {
    fn from(_: Stuck) -> Self {
        Self::Storage
    }
}

impl From<Refusal> for Hangup {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal.code, refusal.reason)
    }
}

impl Hangup {
    /// What to tell the agent; `None` when nobody listens any more.
    fn close_code(&self) -> Option<u16> {
        let code = match self {
            Self::Closed | Self::Dead => return None,
            Self::Socket(tungstenite::Error::Capacity(CapacityError::MessageTooLong { .. })) => CloseCode::TooLarge,
            Self::Socket(tungstenite::Error::Protocol(_) | tungstenite::Error::Utf8(_)) => CloseCode::Protocol,
            Self::Socket(_) => return None,
            Self::ShuttingDown => return Some(GOING_AWAY),
            Self::Refused(code, _) => *code,
            Self::Decode(DecodeError::TooLarge(_)) => CloseCode::TooLarge,
            Self::Decode(_) | Self::Encode(_) | Self::Unexpected(_) | Self::Violation(_) => CloseCode::Protocol,
            Self::NoHello => CloseCode::HelloTimeout,
            Self::Storage => CloseCode::StorageUnavailable,
            Self::Superseded => CloseCode::Superseded,
        };
        Some(code.number())
    }

    /// Whether it belongs to the normal life of a connection, a network's cuts included.
    fn is_ordinary(&self) -> bool {
        match self {
            Self::Closed | Self::Dead | Self::ShuttingDown | Self::Socket(_) | Self::Superseded => true,
            Self::Decode(_) | Self::Encode(_) | Self::NoHello | Self::Refused(..) | Self::Storage => false,
            Self::Unexpected(_) | Self::Violation(_) => false,
        }
    }

    /// The whole chain in one line that fits a close frame.
    fn reason(&self) -> String {
        let mut reason = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            reason = format!("{reason}: {cause}");
            source = cause.source();
        }
        let end = (0..=MAX_CLOSE_REASON.min(reason.len())).rev().find(|&at| reason.is_char_boundary(at));
        reason.truncate(end.unwrap_or(0));
        reason
    }
}

/// Close code of an endpoint that goes away (RFC 6455, section 7.4.1).
const GOING_AWAY: u16 = 1001;

/// How long an agent may take to accept what is sent to it: no more than the silence after which it is dead.
const SEND_TIMEOUT: Duration = phonehome_proto::limits::DEAD_AFTER;

/// How long a closing handshake may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How often a build is told that there is still no room in the store.
const FULL_INTERVAL: Duration = Duration::from_secs(1);

/// All windows of a server together, bytes: what may wait in memory for the store.
const WINDOW_BUDGET: u64 = 64 * 1024 * 1024;

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub(crate) fn new(socket: WebSocketStream<S>, codec: Codec, build: Arc<Build>, shared: Arc<Shared>) -> Self {
        Self { socket, codec, build, shared }
    }

    /// Runs until either side has had enough.
    ///
    /// A server has ten thousand of these futures, most of which wait. So what a connection does with a message is in a
    /// box that is gone when it waits again.
    pub(crate) async fn run(&mut self) {
        let hangup = match Box::pin(self.hello()).await {
            Ok(hello) => self.serve(hello).await,
            Err(hangup) => hangup,
        };
        let reason = hangup.reason();
        if hangup.is_ordinary() {
            info!("disconnected: {reason}");
        } else {
            warn!("disconnected: {reason}");
            let kind = hangup.close_code().map_or("broken".into(), |code| code.to_string());
            self.shared.note_refusal(kind, &reason);
        }
        if let Some(code) = hangup.close_code() {
            drop(timeout(CLOSE_TIMEOUT, Box::pin(self.close(code, reason))).await); // a peer that does not answer is left alone
        }
    }

    async fn hello(&mut self) -> Result<Hello, Hangup> {
        let deadline = Instant::now() + HELLO_TIMEOUT;
        loop {
            let shutdown = self.shared.draining.clone();
            let message = tokio::select! {
                biased; // the order is the same in every run
                () = shutdown.cancelled() => return Err(Hangup::ShuttingDown),
                message = timeout_at(deadline, self.socket.next()) => message.map_err(|_| Hangup::NoHello)?,
            };
            match self.decode(message)? {
                Some(AgentFrame::Hello(hello)) => return Ok(hello),
                Some(frame) => return Err(Hangup::Unexpected(name(&frame))),
                None => {}
            }
        }
    }

    async fn serve(&mut self, hello: Hello) -> Hangup {
        let step = hello.step.clone();
        #[cfg(feature = "http")]
        let labels = hello.labels.clone();
        let seat = match Box::pin(self.build.seat(hello)).await {
            Ok(seat) => seat,
            Err(refusal) => return refusal.into(),
        };
        let superseded = seat.superseded.clone();
        if superseded.is_cancelled() {
            return Hangup::Superseded; // a newer hello was seated first
        }
        self.shared.agents.fetch_add(1, Ordering::Relaxed);
        #[cfg(feature = "http")]
        self.tell(|log| log.handle_hello(&seat.opened.writer.files, &labels));
        let mut session = Session::new(seat, self.shared.env.jitter());
        let result = self.talk(&mut session).await;
        self.shared.agents.fetch_sub(1, Ordering::Relaxed);
        self.shared.left.notify_waiters();
        if session.end == EndState::Answered && matches!(result, Err(Hangup::Closed)) {
            self.build.handle_confirmed(&step);
        }
        if matches!(result, Err(Hangup::Storage)) {
            self.build.handle_storage(false);
        }
        self.build.leave(&step, &superseded);
        #[cfg(feature = "http")]
        if !superseded.is_cancelled() {
            self.tell(|log| log.handle_disconnected(&session.seat.opened.writer.files));
        }
        result.err().unwrap_or(Hangup::Closed)
    }

    /// Lets the lifecycle log know, if there is one. The verdict was its last line of a build.
    #[cfg(feature = "http")]
    fn tell(&self, tell: impl FnOnce(&crate::lifecycle::Lifecycle)) {
        if let Some(log) = self.shared.lifecycle.get().filter(|_| !self.build.has_verdict()) {
            tell(log);
        }
    }

    async fn talk(&mut self, session: &mut Session) -> Result<(), Hangup> {
        let welcome = self.welcome(session);
        Box::pin(self.send(ServerFrame::Welcome(welcome))).await?;
        self.check_verdict(session)?; // it may have come before anybody listened here
        let superseded = session.seat.superseded.clone();
        let shutdown = self.shared.draining.clone();
        loop {
            tokio::select! {
                biased; // who may not go on first, then what is new, then what is due
                () = superseded.cancelled() => return Err(Hangup::Superseded),
                () = shutdown.cancelled() => {
                    // An agent that is not done will find another server, or this one's successor.
                    let drain = Drain { within: CLOSE_TIMEOUT.as_millis() as u64 };
                    Box::pin(self.send(ServerFrame::Drain(drain))).await?;
                    return Err(Hangup::ShuttingDown);
                }
                changed = session.seat.cancel.changed() => if changed.is_ok() {
                    Box::pin(self.handle_cancel(session)).await?;
                },
                changed = session.seat.opened.progress.changed() => {
                    changed.map_err(|_| Hangup::Storage)?;
                    Box::pin(self.handle_progress(session)).await?;
                }
                message = self.socket.next() => {
                    session.heartbeat.heard(Instant::now().into_std());
                    if let Some(frame) = self.decode(message)? {
                        Box::pin(self.handle_frame(frame, session)).await?;
                    }
                }
                () = expiry(session.ack_at) => Box::pin(self.acknowledge(session)).await?,
                () = expiry(session.full_at) => self.handle_full(true, session),
                () = sleep_until(session.heartbeat.poll_timeout().into()) => Box::pin(self.handle_beat(session)).await?,
            }
        }
    }

    /// The build is cancelled, or has its verdict.
    async fn handle_cancel(&mut self, session: &mut Session) -> Result<(), Hangup> {
        self.check_verdict(session)?;
        let cancel = session.seat.cancel.borrow_and_update().clone();
        match cancel.filter(|_| !self.build.has_verdict()) {
            Some(cancel) => self.send(ServerFrame::Cancel(cancel)).await,
            None => Ok(()),
        }
    }

    /// Rule 10: after the verdict only who has yet to hear that its end counts may stay.
    fn check_verdict(&self, session: &Session) -> Result<(), Hangup> {
        let dismissal = self.build.dismissal(&session.seat.opened.writer.files.step);
        dismissal.map_or(Ok(()), |refusal| Err(refusal.into()))
    }

    fn welcome(&self, session: &mut Session) -> Welcome {
        Welcome {
            attempt: session.seat.opened.writer.lease.attempt,
            next: session.seat.opened.receiver.acknowledge(),
            durable: self.shared.store.durability().on_the_wire(),
            window: WINDOW.min(self.window()),
            heartbeat: HEARTBEAT.as_millis() as u64,
            max_payload: MAX_PAYLOAD as u32,
            max_message: MAX_MESSAGE as u32,
            cancel: session.pending_cancel(),
            server: concat!("phonehome-server/", env!("CARGO_PKG_VERSION")).into(),
            capabilities: Vec::new(),
        }
    }

    /// An even share of the budget, and not more than the build may use.
    fn window(&self) -> u64 {
        let agents = self.shared.agents.load(Ordering::Relaxed).max(1);
        (WINDOW_BUDGET / agents).min(self.build.window()).clamp(MIN_WINDOW, MAX_WINDOW)
    }

    async fn handle_frame(&mut self, frame: AgentFrame, session: &mut Session) -> Result<(), Hangup> {
        match frame {
            AgentFrame::Hello(_) => Err(Hangup::Unexpected("Hello")),
            AgentFrame::Records(records) => self.handle_records(records, session).await,
            AgentFrame::Finished(finished) => self.handle_finished(finished, session).await,
            AgentFrame::Pong(pong) => {
                trace!(?pong, "alive");
                Ok(())
            }
        }
    }

    async fn handle_records(&mut self, mut records: Vec<Record>, session: &mut Session) -> Result<(), Hangup> {
        let opened = &mut session.seat.opened;
        let next = opened.receiver.next();
        let known: Vec<_> = records.iter().map(|record| record.seq).filter(|seq| *seq < next).collect();
        let stored = checksums(&self.shared.env, known, &opened.writer.files).await;
        opened.receiver.handle_records(&mut records, |seq| stored.get(&seq).copied())?;
        if records.is_empty() {
            debug!("records that are stored already: the agent has missed an acknowledgement");
            session.ack_soon(Instant::now());
            return Ok(());
        }
        let meter = self.shared.store.meter();
        meter.records_received.add(records.len() as u64);
        meter.bytes_received.add(records.iter().map(|record| record.payload.len() as u64).sum());
        session.waits_since.get_or_insert_with(Instant::now);
        #[cfg(feature = "http")]
        self.tell(|log| log.handle_records(&opened.writer.files, &records));
        if records.iter().any(|record| record.stream.is_output()) {
            self.build.handle_output();
        }
        Ok(self.shared.store.append(&opened.writer, records, opened.receiver.tally()).await?)
    }

    async fn handle_finished(&mut self, finished: Finished, session: &mut Session) -> Result<(), Hangup> {
        let opened = &mut session.seat.opened;
        match opened.receiver.handle_finished(finished.clone())? {
            Ending::Accept(answer) => {
                session.end = EndState::Told;
                Ok(self.shared.store.finish(&opened.writer, finished, answer).await?)
            }
            Ending::Repeat(_) => {
                session.end = EndState::Told;
                self.handle_progress(session).await
            }
            Ending::Resume(answer) => self.send(ServerFrame::FinishedAck(answer)).await,
            Ending::Rewind(answer) => self.rewind(answer, session).await,
        }
    }

    /// The end does not agree with what is stored: what was not acknowledged is taken back, and the agent sends it again.
    async fn rewind(&mut self, answer: FinishedAck, session: &mut Session) -> Result<(), Hangup> {
        let Opened { writer, receiver, progress } = &mut session.seat.opened;
        warn!(from = receiver.next(), "the end does not agree with what is stored: the last records are sent again");
        if !self.shared.store.rewind(writer, receiver.tally()).await? {
            return Ok(()); // a newer connection has taken over, which is about to be noticed
        }
        self.build.note_rewound(&writer.files);
        #[cfg(feature = "http")]
        self.tell(|log| log.handle_rewound(&writer.files, receiver.next()));
        session.ack_at = None;
        if progress.borrow_and_update().failed {
            return Err(Hangup::Storage);
        }
        self.send(ServerFrame::FinishedAck(answer)).await
    }

    /// The store has got further.
    async fn handle_progress(&mut self, session: &mut Session) -> Result<(), Hangup> {
        let progress = session.seat.opened.progress.borrow_and_update().clone();
        if progress.failed {
            return Err(Hangup::Storage);
        }
        self.handle_full(progress.full, session);
        let receiver = &mut session.seat.opened.receiver;
        receiver.handle_durable(&progress.tally);
        #[cfg(feature = "http")]
        self.tell(|log| log.handle_progress(&session.seat.opened.writer.files));
        let receiver = &mut session.seat.opened.receiver;
        let (acked, acked_bytes) = (receiver.acked().next(), receiver.acked().bytes());
        if progress.next > acked && acked == session.first && !progress.full {
            self.build.handle_storage(true);
        }
        if let Some((finished, answer)) = progress.finished.filter(|_| session.end == EndState::Told) {
            return self.finish(finished, answer, session).await;
        }
        if progress.bytes.saturating_sub(acked_bytes) >= ACK_BYTES {
            return self.acknowledge(session).await;
        }
        if progress.next > acked {
            session.ack_soon(Instant::now());
        }
        Ok(())
    }

    /// There is no room in the store, or again some. The build hears of it as long as it lasts.
    fn handle_full(&self, full: bool, session: &mut Session) {
        if full || session.full_at.is_some() {
            self.build.handle_storage(!full);
        }
        session.full_at = full.then(|| Instant::now() + FULL_INTERVAL);
    }

    async fn finish(&mut self, finished: Finished, answer: FinishedAck, session: &mut Session) -> Result<(), Hangup> {
        let files = session.seat.opened.writer.files.clone();
        #[cfg(feature = "http")]
        self.tell(|log| log.handle_finished(&files, &finished));
        self.note_acknowledged(session, finished.next);
        self.build.handle_finished(&files.step, finished, answer.clone());
        session.end = EndState::Answered;
        session.ack_at = None;
        self.send(ServerFrame::FinishedAck(answer)).await
    }

    async fn acknowledge(&mut self, session: &mut Session) -> Result<(), Hangup> {
        let now = Instant::now();
        session.ack_at = self.build.acknowledges_at(now);
        if session.ack_at.is_some() {
            return Ok(()); // it goes faster than it may
        }
        let Opened { receiver, progress, .. } = &mut session.seat.opened;
        receiver.handle_durable(&progress.borrow().tally);
        let before = receiver.acked().bytes();
        let next = receiver.acknowledge();
        self.build.note_acknowledged(receiver.acked().bytes().saturating_sub(before), now);
        self.note_acknowledged(session, next);
        let window = self.window();
        self.send(ServerFrame::Ack(Ack { next, window })).await
    }

    /// Counts what an answer acknowledges: everything below `next`.
    fn note_acknowledged(&self, session: &mut Session, next: u64) {
        let (meter, tally) = (self.shared.store.meter(), session.seat.opened.progress.borrow().tally.clone());
        let (records, bytes) = std::mem::replace(&mut session.counted, (next, tally.bytes()));
        meter.records_acknowledged.add(next.saturating_sub(records));
        meter.bytes_acknowledged.add(tally.bytes().saturating_sub(bytes));
        if let Some(since) = session.waits_since.take() {
            meter.ack_latency.observe(since.elapsed());
        }
        if session.seat.opened.receiver.next() > next {
            session.waits_since = Some(Instant::now()); // the rest, of which it is not known when it came
        }
    }

    async fn handle_beat(&mut self, session: &mut Session) -> Result<(), Hangup> {
        match session.heartbeat.handle_timeout(Instant::now().into_std()) {
            Beat::Ask(id) => self.send(ServerFrame::Ping(Ping { id })).await,
            Beat::Dead => Err(Hangup::Dead),
            Beat::Wait => Ok(()),
        }
    }

    /// A frame, or nothing for a message without meaning here.
    fn decode(
        &self,
        message: Option<Result<tungstenite::Message, tungstenite::Error>>,
    ) -> Result<Option<AgentFrame>, Hangup> {
        let message = match message.ok_or(Hangup::Closed)?? {
            tungstenite::Message::Binary(bytes) => Message::Binary(bytes),
            tungstenite::Message::Text(text) => Message::Text(text.as_str().to_owned()),
            tungstenite::Message::Close(_) => return Err(Hangup::Closed),
            tungstenite::Message::Ping(_) | tungstenite::Message::Pong(_) | tungstenite::Message::Frame(_) => {
                return Ok(None);
            }
        };
        Ok(Some(self.codec.decode_agent(&message)?))
    }

    async fn send(&mut self, frame: ServerFrame) -> Result<(), Hangup> {
        trace!(?frame, "sending");
        let message = match self.codec.encode_server(&frame)? {
            Message::Binary(bytes) => tungstenite::Message::Binary(bytes),
            Message::Text(text) => tungstenite::Message::Text(text.into()),
        };
        timeout(SEND_TIMEOUT, self.socket.send(message)).await.map_err(|_| Hangup::Dead)??;
        Ok(())
    }

    /// Says why, then reads on until the agent has heard it: closing with bytes unread would reset the connection and
    /// the reason with it.
    async fn close(&mut self, code: u16, reason: String) {
        let frame = CloseFrame { code: code.into(), reason: reason.into() };
        if let Err(error) = self.socket.close(Some(frame)).await {
            debug!("cannot say goodbye: {error}");
        }
        while let Some(Ok(_)) = self.socket.next().await {}
        let mut rest = vec![0; 4096];
        while let Ok(1..) = tokio::io::AsyncReadExt::read(self.socket.get_mut(), &mut rest).await {}
    }
}

/// What a connection knows about its attempt.
struct Session {
    seat: Seat,
    heartbeat: Heartbeat,
    /// What was durable when the connection began.
    first: u64,
    ack_at: Option<Instant>,
    /// When the first record came that is not acknowledged.
    waits_since: Option<Instant>,
    /// Records and bytes of the attempt that were acknowledged before, or on this connection and counted.
    counted: (u64, u64),
    /// When the build is told again that there is no room in the store.
    full_at: Option<Instant>,
    end: EndState,
}

/// How far the end of the log has got on this connection. An end from before it is answered when the agent tells it
/// again, not before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EndState {
    Open,
    Told,
    Answered,
}

impl Session {
    fn new(mut seat: Seat, jitter: f64) -> Self {
        let progress = seat.opened.progress.borrow_and_update();
        let (first, full) = (progress.next, progress.full);
        let counted = (first, progress.bytes);
        drop(progress);
        let now = Instant::now();
        Self {
            heartbeat: Heartbeat::asking(now.into_std(), jitter),
            first,
            ack_at: None,
            waits_since: None,
            counted,
            full_at: full.then_some(now),
            end: EndState::Open,
            seat,
        }
    }

    fn ack_soon(&mut self, now: Instant) {
        self.ack_at.get_or_insert(now + ACK_DELAY);
    }

    fn pending_cancel(&self) -> Option<Cancel> {
        self.seat.cancel.borrow().clone()
    }
}

fn name(frame: &AgentFrame) -> &'static str {
    match frame {
        AgentFrame::Hello(_) => "Hello",
        AgentFrame::Records(_) => "Records",
        AgentFrame::Finished(_) => "Finished",
        AgentFrame::Pong(_) => "Pong",
    }
}

/// Of records that are stored already, which few messages have: looked up where waiting for the disk is no harm.
async fn checksums(env: &Env, seqs: Vec<u64>, files: &Arc<AttemptFiles>) -> BTreeMap<u64, u32> {
    if seqs.is_empty() {
        return BTreeMap::new();
    }
    let files = files.clone();
    env.blocking(move || files.checksums(seqs)).await
}
