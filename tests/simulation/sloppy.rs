//! An agent that is not ours: a websocket client that speaks JSON without checksums, sends again what is stored already,
//! and may send a byte wrong the first time.

use std::{cell::RefCell, rc::Rc, time::Duration};

use futures_util::{SinkExt, StreamExt};
use phonehome_agent::Delivery;
use phonehome_env::{Env, network::Transport};
use phonehome_proto::{
    close,
    codec::{Codec, Message as Coded},
    frame::{AgentFrame, End, Finished, FinishedAck, Hello, Pong, Record, ServerFrame},
    id::ProducerId,
    tally::Tally,
};
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Error, Message, client::IntoClientRequest},
};

use crate::{
    chance::Chance,
    plan::Script,
    trace::{note, saw},
    world::{BUILD, Source, TOKEN, payload},
};

/// One life of such an agent. It holds all of its log to the end.
pub(crate) struct Sloppy {
    env: Env,
    chance: Chance,
    producer: ProducerId,
    records: Vec<Record>,
    finished: Finished,
    /// The record to damage the first time it is sent.
    damaged: Option<u64>,
    source: Rc<RefCell<Source>>,
}

type Socket = WebSocketStream<Box<dyn Transport>>;

/// How a connection ended that was not the last.
enum Broken {
    /// It may be made again.
    Again,
    /// It may not.
    Refused(u16),
}

impl From<Error> for Broken {
    fn from(_: Error) -> Self {
        Self::Again
    }
}

impl Sloppy {
    pub(crate) fn new(life: u64, env: Env, chance: Chance, script: Script, source: Rc<RefCell<Source>>) -> Self {
        let mut producer = [0; 16];
        env.nature.fill(&mut producer).expect("chance is there");
        let mut tally = Tally::default();
        let mut records = Vec::new();
        for (number, (_, stream, len)) in script.blocks.into_iter().enumerate() {
            let bytes = payload(life, number, len);
            source.borrow_mut().note(stream, &bytes);
            let record = Record::new(tally.next(), env.nature.now(), stream, tally.offset(stream), bytes.into());
            tally.add(&record);
            records.push(record);
        }
        source.borrow_mut().ended = Some(script.code);
        let finished = Finished {
            next: tally.next(),
            counts: tally.counts(),
            digest: tally.digest(),
            end: End::Exited(script.code),
            time: env.nature.now(),
            usage: None,
        };
        let damaged = chance.is(50).then(|| chance.below(tally.next().max(1)));
        source.borrow_mut().damaged = damaged;
        Self { env, chance, producer: ProducerId(producer), records, finished, damaged, source }
    }

    pub(crate) async fn run(mut self) {
        loop {
            match self.connect().await {
                Ok(delivery) => {
                    note(&format!("a sloppy agent ends: {delivery:?}"));
                    self.source.borrow_mut().delivery = Some(Some(delivery));
                    return;
                }
                Err(Broken::Refused(code)) => {
                    note(&format!("a sloppy agent is refused: {code}"));
                    self.source.borrow_mut().delivery = Some(Some(Delivery::Refused(code.to_string())));
                    return;
                }
                Err(Broken::Again) => sleep(self.chance.millis(10, 500)).await,
            }
        }
    }

    async fn connect(&mut self) -> Result<Delivery, Broken> {
        let stream = self.env.network.connect("server", 80).await.map_err(|_| Broken::Again)?;
        let mut request = "ws://server/v1/agent".into_client_request()?;
        let headers = request.headers_mut();
        headers.insert("sec-websocket-protocol", Codec::Json.subprotocol().parse().unwrap());
        headers.insert("authorization", format!("Bearer {TOKEN}").parse().unwrap());
        let opened = tokio::time::timeout(Duration::from_secs(20), client_async(request, stream)).await;
        let (mut socket, _) = opened.map_err(|_| Broken::Again)??;
        let hello = Hello {
            build: BUILD.parse().unwrap(),
            step: "main".parse().unwrap(),
            producer: self.producer,
            oldest: 0,
            next: self.finished.next,
            labels: Default::default(),
            agent: "sloppy".into(),
            capabilities: Vec::new(),
        };
        say(&mut socket, &AgentFrame::Hello(hello)).await?;
        self.stream(socket).await
    }

    async fn stream(&mut self, mut socket: Socket) -> Result<Delivery, Broken> {
        loop {
            match hear(&mut socket).await? {
                ServerFrame::Welcome(welcome) => {
                    // What it damaged it must not send again unasked: the same number with other bytes is fatal.
                    let again = if self.damaged.is_some() { 0 } else { self.chance.below(4) };
                    self.deliver(&mut socket, welcome.next.saturating_sub(again)).await?;
                }
                ServerFrame::FinishedAck(FinishedAck::Resume(next)) => {
                    saw("resume asked for at FINISHED");
                    self.deliver(&mut socket, next).await?;
                }
                ServerFrame::FinishedAck(FinishedAck::Complete) => return leave(socket, Delivery::Complete).await,
                ServerFrame::FinishedAck(FinishedAck::Incomplete(reason)) => {
                    return leave(socket, Delivery::Incomplete(reason)).await;
                }
                ServerFrame::Ping(ping) => {
                    let command = phonehome_proto::frame::CommandState::Ended;
                    say(&mut socket, &AgentFrame::Pong(Pong { id: ping.id, command, quiet: 0, held: 0 })).await?;
                }
                ServerFrame::Drain(_) => return Err(Broken::Again),
                ServerFrame::Ack(_) | ServerFrame::Cancel(_) => {}
            }
        }
    }

    async fn deliver(&mut self, socket: &mut Socket, from: u64) -> Result<(), Broken> {
        let mut records = self.records[from as usize..].to_vec();
        if let Some(record) = records.iter_mut().find(|record| Some(record.seq) == self.damaged)
            && !std::mem::replace(&mut self.source.borrow_mut().is_damaged, true)
        {
            saw("record damaged");
            let mut bytes = record.payload.to_vec();
            bytes[0] ^= 1;
            record.payload = bytes.into();
        }
        for batch in records.chunks(3) {
            say(socket, &AgentFrame::Records(batch.to_vec())).await?;
            if self.damaged.is_none() && self.chance.is(10) {
                say(socket, &AgentFrame::Records(batch.to_vec())).await?;
            }
            if self.chance.is(30) {
                sleep(self.chance.millis(0, 200)).await;
            }
        }
        say(socket, &AgentFrame::Finished(self.finished.clone())).await
    }
}

/// Says a frame as text, without checksums.
async fn say(socket: &mut Socket, frame: &AgentFrame) -> Result<(), Broken> {
    let Ok(Coded::Text(text)) = Codec::Json.encode_agent(frame) else { panic!("JSON is text") };
    let mut frame: Value = serde_json::from_str(&text).unwrap();
    for record in frame.get_mut("records").and_then(Value::as_array_mut).into_iter().flatten() {
        record.as_object_mut().unwrap().remove("crc");
    }
    let sent = tokio::time::timeout(Duration::from_secs(45), socket.send(Message::text(frame.to_string()))).await;
    Ok(sent.map_err(|_| Broken::Again)??)
}

async fn hear(socket: &mut Socket) -> Result<ServerFrame, Broken> {
    let deadline = Instant::now() + Duration::from_secs(45);
    loop {
        let heard = tokio::time::timeout_at(deadline, socket.next()).await.map_err(|_| Broken::Again)?;
        match heard.ok_or(Broken::Again)?? {
            Message::Text(text) => {
                let frame = Codec::Json.decode_server(&Coded::Text(text.as_str().to_owned()));
                return Ok(frame.expect("the server speaks JSON"));
            }
            Message::Close(frame) => {
                let code = frame.map_or(1005, |frame| u16::from(frame.code));
                let refused = close::is_fatal(code) && code != 4002;
                return Err(if refused { Broken::Refused(code) } else { Broken::Again });
            }
            Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
        }
    }
}

async fn leave(mut socket: Socket, delivery: Delivery) -> Result<Delivery, Broken> {
    drop(socket.close(None).await); // it has its answer
    Ok(delivery)
}
