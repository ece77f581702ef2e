//! One agent of a swarm: what matters of a real one to its server, without a command.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use phonehome_proto::{
    backoff::{Backoff, Tried},
    codec::{Codec, Message},
    frame::{AgentFrame, CommandState, End, Finished, FinishedAck, Hello, Ping, Pong, Record, ServerFrame, Stream},
    id::{BuildId, ProducerId, StepName},
    limits::{MAX_PAYLOAD, WINDOW},
    tally::Tally,
};
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_tungstenite::tungstenite;
use tokio_util::sync::CancellationToken;

use super::{
    Result,
    api::Declared,
    histogram::{Histogram, Snapshot},
    socket::{Socket, Target},
};

/// What all agents tell.
pub(crate) struct Shared {
    latency: Histogram,
    /// From an end that was told to its answer.
    pub(crate) ends: Histogram,
    /// Acknowledged payload of the bomb, bytes.
    pub(crate) bombed: AtomicU64,
    pub(crate) cuts: AtomicU64,
    /// Records that were acknowledged once and asked for again.
    pub(crate) forgotten: AtomicU64,
    /// Fires when all are connected: nobody writes before.
    pub(crate) start: CancellationToken,
    pub(crate) stop: CancellationToken,
    /// Whether they tell their end.
    finish: bool,
    count: usize,
    /// Who was welcomed in this life of the server.
    welcomed: watch::Sender<Welcomed>,
    error: Mutex<String>,
    /// Nobody starts ten thousand builds in one instant. Who comes back does not wait for this.
    doors: Semaphore,
}

#[derive(Clone, Copy, Default)]
struct Welcomed {
    life: u64,
    count: usize,
}

/// First handshakes at a time.
const DOORS: usize = 200;

/// How long a handshake may take before it is tried again.
const HANDSHAKE: Duration = Duration::from_secs(30);

impl Shared {
    pub(crate) fn new(count: usize, finish: bool) -> Self {
        Self {
            latency: Histogram::default(),
            ends: Histogram::default(),
            bombed: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            forgotten: AtomicU64::new(0),
            start: CancellationToken::new(),
            stop: CancellationToken::new(),
            finish,
            count,
            welcomed: watch::Sender::default(),
            error: Mutex::default(),
            doors: Semaphore::new(DOORS),
        }
    }

    /// Waits until every agent was welcomed in this life of the server.
    pub(crate) async fn all_welcomed(&self) {
        let mut welcomed = self.welcomed.subscribe();
        drop(welcomed.wait_for(|welcomed| welcomed.count >= self.count).await); // `self` holds the sender
    }

    /// The server was killed: every agent has to be welcomed again.
    pub(crate) fn begin_again(&self) {
        self.welcomed.send_modify(|welcomed| *welcomed = Welcomed { life: welcomed.life + 1, count: 0 });
    }

    /// Notes a welcome, unless this agent had one in this life; `seen` is the last in which it had.
    fn note_welcome(&self, seen: &mut Option<u64>) {
        self.welcomed.send_modify(|welcomed| {
            if seen.replace(welcomed.life) != Some(welcomed.life) {
                welcomed.count += 1;
            }
        });
    }

    /// How long acknowledgements took since this was asked the last time.
    pub(crate) fn take_latency(&self) -> Snapshot {
        self.latency.take()
    }

    /// Why an agent was cut or turned away the last time.
    pub(crate) fn last_error(&self) -> String {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_cut(&self, error: &dyn std::error::Error) {
        self.cuts.fetch_add(1, Ordering::Relaxed);
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = error.to_string();
    }
}

/// What an agent writes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// As much as its window allows.
    Bomb,
    /// A line per interval.
    Quiet { interval: Duration, phase: Duration },
}

/// What an agent has sent.
pub(crate) struct Sent {
    pub(crate) build: BuildId,
    /// All of them acknowledged; 0 for the bomb.
    pub(crate) lines: u64,
}

/// A build's agent.
pub(crate) struct Agent {
    build: BuildId,
    token: String,
    number: usize,
    kind: Kind,
    target: Arc<Target>,
    shared: Arc<Shared>,
    tally: Tally,
    /// Not acknowledged, with the time each was due.
    held: VecDeque<(Instant, Record)>,
    window: u64,
    next_line: Option<Instant>,
    /// The life of the server in which it was welcomed last.
    life: Option<u64>,
    backoff: Backoff,
    /// When it told its end first.
    ended: Option<Instant>,
    is_done: bool,
}

impl Agent {
    pub(crate) fn new(build: Declared, number: usize, kind: Kind, target: Arc<Target>, shared: Arc<Shared>) -> Self {
        let Declared { build, token } = build;
        let (tally, held, backoff) = (Tally::default(), VecDeque::new(), Backoff::default());
        let (window, next_line, life, ended, is_done) = (WINDOW, None, None, None, false);
        Self {
            build,
            token,
            number,
            kind,
            target,
            shared,
            tally,
            held,
            window,
            next_line,
            life,
            backoff,
            ended,
            is_done,
        }
    }

    /// Runs until all have to stop and everything was acknowledged.
    pub(crate) async fn run(mut self) -> Sent {
        let (mut tries, mut before) = (0, None);
        while !self.try_to_live().await {
            tries += 1;
            let tried = if self.life == before { Tried::Unreachable } else { Tried::Progressed };
            before = self.life;
            let random = ((self.number * 7919 + tries * 104_729) % 1000) as f64 / 1000.0;
            let now = Instant::now().into_std();
            sleep(self.backoff.handle_disconnected(now, tried, random, Duration::ZERO)).await;
        }
        let lines = if let Kind::Bomb = self.kind { 0 } else { self.tally.next() };
        Sent { build: self.build, lines }
    }

    /// One connection; `false` when it was cut.
    async fn try_to_live(&mut self) -> bool {
        self.live().await.inspect_err(|error| self.shared.note_cut(&**error)).is_ok()
    }

    /// One connection.
    async fn live(&mut self) -> Result<()> {
        let shared = self.shared.clone();
        let mut socket = {
            let _door = if self.life.is_none() { Some(shared.doors.acquire().await?) } else { None };
            timeout(HANDSHAKE, self.greet()).await??
        };
        self.backoff.handle_connected(Instant::now().into_std());
        shared.note_welcome(&mut self.life);
        let records: Vec<_> = self.held.iter().map(|(_, record)| record.clone()).collect();
        for few in records.chunks(4) {
            send(&mut socket, AgentFrame::Records(few.to_vec())).await?;
        }
        self.talk(&mut socket, &shared).await?;
        if shared.finish {
            self.finish(&mut socket, &shared).await?;
        }
        Ok(())
    }

    /// Writes until all have to stop and everything was acknowledged.
    async fn talk(&mut self, socket: &mut Socket, shared: &Shared) -> Result<()> {
        while !(shared.stop.is_cancelled() && self.held.is_empty()) {
            let due = self.next_line.filter(|_| !shared.stop.is_cancelled());
            let has_room = self.unacknowledged() + MAX_PAYLOAD as u64 <= self.window;
            tokio::select! {
                () = shared.start.cancelled(), if self.next_line.is_none() => self.next_line = Some(self.first_line()),
                () = shared.stop.cancelled(), if due.is_some() || self.held.is_empty() => {}
                message = socket.next() => self.handle(socket, message).await?,
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() && has_room => {
                    let record = self.write(due.unwrap_or_else(Instant::now));
                    send(socket, AgentFrame::Records(vec![record])).await?;
                }
            }
        }
        Ok(())
    }

    /// Tells the end and waits for the answer.
    async fn finish(&mut self, socket: &mut Socket, shared: &Shared) -> Result<()> {
        let (next, counts, digest) = (self.tally.next(), self.tally.counts(), self.tally.digest());
        let finished = Finished { next, counts, digest, end: End::Exited(0), time: 0, usage: None };
        let since = *self.ended.get_or_insert_with(Instant::now);
        send(socket, AgentFrame::Finished(finished)).await?;
        while !self.is_done {
            let message = socket.next().await;
            self.handle(socket, message).await?;
        }
        shared.ends.note(since.elapsed());
        drop(socket.close(None).await); // it has said all that it had to
        Ok(())
    }

    async fn greet(&mut self) -> Result<Socket> {
        let mut socket = self.target.connect(self.number, &self.token).await?;
        let mut producer = [7; 16];
        producer[..8].copy_from_slice(&(self.number as u64).to_be_bytes());
        let next = self.tally.next();
        let hello = Hello {
            build: self.build.clone(),
            step: StepName::default(),
            producer: ProducerId(producer),
            oldest: self.held.front().map_or(next, |(_, record)| record.seq),
            next,
            labels: BTreeMap::new(),
            agent: "swarm".into(),
            capabilities: Vec::new(),
        };
        send(&mut socket, AgentFrame::Hello(hello)).await?;
        loop {
            let message = socket.next().await.ok_or("closed before the welcome")??;
            let tungstenite::Message::Binary(wire) = message else {
                return Err(format!("no welcome: {message}").into());
            };
            if let ServerFrame::Welcome(welcome) = Codec::Binary.decode_server(&Message::Binary(wire))? {
                self.window = welcome.window;
                let oldest = self.held.front().map_or(next, |(_, record)| record.seq);
                self.shared.forgotten.fetch_add(oldest.saturating_sub(welcome.next), Ordering::Relaxed);
                self.acknowledge(welcome.next);
                return Ok(socket);
            }
        }
    }

    async fn handle(
        &mut self,
        socket: &mut Socket,
        message: Option<std::result::Result<tungstenite::Message, tungstenite::Error>>,
    ) -> Result<()> {
        let wire = match message.ok_or("the server hung up")?? {
            tungstenite::Message::Binary(wire) => wire,
            tungstenite::Message::Close(frame) => return Err(format!("closed: {frame:?}").into()),
            tungstenite::Message::Text(_)
            | tungstenite::Message::Ping(_)
            | tungstenite::Message::Pong(_)
            | tungstenite::Message::Frame(_) => return Ok(()),
        };
        match Codec::Binary.decode_server(&Message::Binary(wire))? {
            ServerFrame::Ack(ack) => {
                self.window = ack.window;
                self.acknowledge(ack.next);
                Ok(())
            }
            ServerFrame::Ping(Ping { id }) => {
                let pong = Pong { id, command: CommandState::Running, quiet: 0, held: self.unacknowledged() };
                send(socket, AgentFrame::Pong(pong)).await
            }
            ServerFrame::Drain(_) => Ok(()), // the end of the connection follows
            ServerFrame::FinishedAck(FinishedAck::Complete) => {
                self.is_done = true;
                Ok(())
            }
            ServerFrame::Welcome(_) | ServerFrame::Cancel(_) | ServerFrame::FinishedAck(_) => {
                Err("the server said something out of place".into())
            }
        }
    }

    fn acknowledge(&mut self, next: u64) {
        let now = Instant::now();
        let known = self.held.iter().take_while(|(_, record)| record.seq < next).count();
        for (due, record) in self.held.drain(..known) {
            match self.kind {
                Kind::Bomb => drop(self.shared.bombed.fetch_add(record.payload.len() as u64, Ordering::Relaxed)),
                Kind::Quiet { .. } => self.shared.latency.note(now.duration_since(due)),
            }
        }
    }

    fn unacknowledged(&self) -> u64 {
        self.held.iter().map(|(_, record)| record.cost()).sum()
    }

    fn first_line(&self) -> Instant {
        match self.kind {
            Kind::Bomb => Instant::now(),
            Kind::Quiet { phase, .. } => Instant::now() + phase,
        }
    }

    /// The record that is due, and the time of the next.
    fn write(&mut self, due: Instant) -> Record {
        let (seq, offset) = (self.tally.next(), self.tally.offset(Stream::Stdout));
        let payload: Bytes = match self.kind {
            Kind::Bomb => Bytes::from_static(&NOISE),
            Kind::Quiet { .. } => format!("{:<16} {seq:>20} {:>41}\n", self.build.as_str(), "of a quiet build").into(),
        };
        self.next_line = Some(match self.kind {
            Kind::Bomb => due,
            Kind::Quiet { interval, .. } => due + interval,
        });
        let record = Record::new(seq, 0, Stream::Stdout, offset, payload);
        self.tally.add(&record);
        self.held.push_back((due, record.clone()));
        record
    }
}

/// What a bomb sends.
static NOISE: [u8; MAX_PAYLOAD] = [b'!'; MAX_PAYLOAD];

async fn send(socket: &mut Socket, frame: AgentFrame) -> Result<()> {
    match Codec::Binary.encode_agent(&frame)? {
        Message::Binary(wire) => socket.send(tungstenite::Message::Binary(wire)).await?,
        Message::Text(text) => socket.send(tungstenite::Message::Text(text.into())).await?,
    }
    Ok(())
}
