//! A client that speaks the wire by hand, and says what no agent would.

use std::{net::SocketAddr, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::{SinkExt, StreamExt};
use http::{
    HeaderValue,
    header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL},
};
use phonehome_proto::{
    codec::{Codec, Message},
    frame::{AgentFrame, End, Finished, Hello, Record, ServerFrame, Stream, Welcome},
    id::ProducerId,
    tally::Tally,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, client::IntoClientRequest},
};

use super::{Hook, patiently};

/// An open websocket to a hook without TLS.
#[derive(Debug)]
pub(crate) struct Caller {
    socket: WebSocketStream<TcpStream>,
    codec: Codec,
}

impl Caller {
    /// Connects with the token of the hook's build.
    pub(crate) async fn connect(hook: &Hook, codec: Codec) -> Self {
        Self::connect_to(hook.address(), hook.variable("TOKEN"), codec).await
    }

    pub(crate) async fn connect_to(address: SocketAddr, token: &str, codec: Codec) -> Self {
        let mut request = format!("ws://{address}/v1/agent").into_client_request().unwrap();
        request.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(codec.subprotocol()));
        request.headers_mut().insert(AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
        let stream = TcpStream::connect(address).await.unwrap();
        let (socket, response) = tokio_tungstenite::client_async(request, stream).await.unwrap();
        assert_eq!(response.headers()[SEC_WEBSOCKET_PROTOCOL], codec.subprotocol());
        Self { socket, codec }
    }

    /// Connects and introduces itself, as a producer that has no records yet.
    pub(crate) async fn welcomed(hook: &Hook, producer: u8) -> (Self, Welcome) {
        Self::resumed(hook, producer, &Records::default()).await
    }

    /// Connects and introduces itself, as a producer that holds these records.
    pub(crate) async fn resumed(hook: &Hook, producer: u8, records: &Records) -> (Self, Welcome) {
        let mut caller = Self::connect(hook, Codec::Binary).await;
        caller.send(records.hello(hook.variable("BUILD"), producer)).await;
        match caller.frame().await {
            ServerFrame::Welcome(welcome) => (caller, welcome),
            other => panic!("not a welcome: {other:?}"),
        }
    }

    pub(crate) async fn send(&mut self, frame: AgentFrame) {
        let message = match self.codec.encode_agent(&frame).unwrap() {
            Message::Binary(bytes) => tungstenite::Message::Binary(bytes),
            Message::Text(text) => tungstenite::Message::Text(text.into()),
        };
        self.send_message(message).await;
    }

    pub(crate) async fn send_message(&mut self, message: impl Into<tungstenite::Message>) {
        self.socket.send(message.into()).await.unwrap();
    }

    /// Sends all of them at once, so that the server has the last when it looks at the first.
    pub(crate) async fn send_messages(&mut self, messages: impl IntoIterator<Item = tungstenite::Message>) {
        for message in messages {
            self.socket.feed(message).await.unwrap();
        }
        self.socket.flush().await.unwrap();
    }

    /// Sends to somebody who may have closed already.
    pub(crate) async fn try_send(&mut self, frame: AgentFrame) {
        if let Ok(Message::Binary(bytes)) = self.codec.encode_agent(&frame) {
            drop(self.socket.send(tungstenite::Message::Binary(bytes)).await);
        }
    }

    /// The next frame of the server.
    pub(crate) async fn frame(&mut self) -> ServerFrame {
        let message = match self.message().await {
            tungstenite::Message::Binary(bytes) => Message::Binary(bytes),
            tungstenite::Message::Text(text) => Message::Text(text.as_str().to_owned()),
            other => panic!("not a frame: {other:?}"),
        };
        self.codec.decode_server(&message).unwrap()
    }

    /// The next message as it is.
    pub(crate) async fn message(&mut self) -> tungstenite::Message {
        patiently("the server says something", self.socket.next()).await.expect("the connection is open").unwrap()
    }

    /// Waits until the server closes and returns the code and the reason. A connection that just breaks is a failure.
    pub(crate) async fn closed(&mut self) -> (u16, String) {
        loop {
            if let tungstenite::Message::Close(frame) = self.message().await {
                let frame = frame.expect("the server says why");
                return (frame.code.into(), frame.reason.as_str().to_owned());
            }
        }
    }

    /// Waits for the answer to FINISHED, past acknowledgements.
    pub(crate) async fn finished_ack(&mut self) -> phonehome_proto::frame::FinishedAck {
        loop {
            match self.frame().await {
                ServerFrame::FinishedAck(answer) => return answer,
                ServerFrame::Ack(_) | ServerFrame::Ping(_) => {}
                other => panic!("neither Ack nor FinishedAck: {other:?}"),
            }
        }
    }

    /// Says goodbye as an agent does once its log is delivered.
    pub(crate) async fn leave(mut self) {
        self.socket.close(None).await.unwrap();
        while let Ok(Some(Ok(_))) = tokio::time::timeout(Duration::from_secs(2), self.socket.next()).await {}
    }
}

/// A hello of step `main`.
pub(crate) fn hello(build: &str, producer: u8) -> Hello {
    Hello {
        build: build.parse().unwrap(),
        step: phonehome_proto::id::StepName::default(),
        producer: ProducerId([producer; 16]),
        oldest: 0,
        next: 0,
        labels: std::collections::BTreeMap::new(),
        agent: "by hand".into(),
        capabilities: Vec::new(),
    }
}

/// The records of an attempt and what they add up to.
#[derive(Debug, Default)]
pub(crate) struct Records {
    records: Vec<Record>,
    tally: Tally,
}

impl Records {
    /// One record on standard output per text.
    pub(crate) fn of(texts: &[&str]) -> Self {
        let mut all = Self::default();
        texts.iter().for_each(|text| all.push(text));
        all
    }

    /// One more.
    pub(crate) fn push(&mut self, text: &str) {
        let (seq, offset) = (self.tally.next(), self.tally.offset(Stream::Stdout));
        let record = Record::new(seq, 1, Stream::Stdout, offset, text.to_owned().into());
        self.tally.add(&record);
        self.records.push(record);
    }

    /// The hello of an agent that holds all of them.
    pub(crate) fn hello(&self, build: &str, producer: u8) -> AgentFrame {
        AgentFrame::Hello(Hello { next: self.tally.next(), ..hello(build, producer) })
    }

    pub(crate) fn frame(&self) -> AgentFrame {
        AgentFrame::Records(self.records.clone())
    }

    pub(crate) fn finished(&self, code: u8) -> AgentFrame {
        AgentFrame::Finished(Finished {
            next: self.tally.next(),
            counts: self.tally.counts(),
            digest: self.tally.digest(),
            end: End::Exited(code),
            time: 1,
            usage: None,
        })
    }
}

/// What a server answers to a request that it does not turn into a websocket.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct HttpAnswer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

/// Asks to open a websocket at `path`, with these headers besides those that make it a websocket.
pub(crate) async fn ask(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> HttpAnswer {
    let key = BASE64_STANDARD.encode([7; 16]);
    let mut request = format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
    );
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{request}\r\n").as_bytes()).await.unwrap();
    patiently("an HTTP answer", read_answer(stream)).await
}

async fn read_answer(mut stream: TcpStream) -> HttpAnswer {
    let mut answer = String::new();
    let mut byte = [0];
    while !answer.ends_with("\r\n\r\n") {
        stream.read_exact(&mut byte).await.unwrap();
        answer.push(byte[0].into());
    }
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let header = |name: &str| {
        let mut lines = answer.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim().to_owned())
    };
    let length = header("Content-Length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.unwrap();
    HttpAnswer { status, body: String::from_utf8(body).unwrap() }
}
