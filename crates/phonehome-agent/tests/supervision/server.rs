//! A server that takes what one agent tells.

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    thread::JoinHandle,
    time::Duration,
};

use http::HeaderValue;
use phonehome_proto::{
    codec::{Codec, Message},
    event::{Event, Terminated},
    frame::{Ack, AgentFrame, Cancel, Durable, Finished, FinishedAck, Record, ServerFrame, Stream, Welcome},
    limits,
};
use tokio_tungstenite::tungstenite::{
    self,
    handshake::server::{ErrorResponse, Request, Response},
};

/// Welcomes one agent, takes all it has and accepts its end.
pub(crate) struct Server {
    pub(crate) url: String,
    thread: JoinHandle<Told>,
}

/// What an agent has told.
#[derive(Debug)]
pub(crate) struct Told {
    /// Standard output and standard error.
    pub(crate) output: [Vec<u8>; 2],
    pub(crate) events: Vec<Event>,
    pub(crate) finished: Finished,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::new(None)
    }

    /// Its welcome tells the agent to end the command.
    pub(crate) fn that_cancels(cancel: Cancel) -> Self {
        Self::new(Some(cancel))
    }

    fn new(cancel: Option<Cancel>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a port");
        let url = format!("ws://{}", listener.local_addr().expect("it is bound"));
        Self { url, thread: std::thread::spawn(move || serve(&listener, cancel)) }
    }

    /// An agent's options that lead here.
    pub(crate) fn options(&self) -> [&str; 4] {
        ["--url", &self.url, "--build", "b"]
    }

    /// All that was told. To be called when the agent has ended.
    pub(crate) fn told(self) -> Told {
        self.thread.join().expect("an agent has told everything")
    }
}

impl Told {
    /// The event that says how the command ended.
    pub(crate) fn terminated(&self) -> &Terminated {
        let mut all = self.events.iter().filter_map(|event| match event {
            Event::Terminated(terminated) => Some(terminated),
            Event::Gap(_)
            | Event::TookOver(_)
            | Event::Waiting(_)
            | Event::Born(_)
            | Event::Ready(_)
            | Event::Error(_)
            | Event::Stopping(_)
            | Event::Cancelled(_)
            | Event::Leftovers(_)
            | Event::Redaction(_)
            | Event::Labels(_) => None,
        });
        let terminated = all.next().expect("an end is told");
        assert_eq!(all.next(), None, "an end is told once");
        terminated
    }

    fn take(&mut self, record: Record) {
        match record.stream {
            Stream::Stdout => self.output[0].extend(record.payload),
            Stream::Stderr => self.output[1].extend(record.payload),
            Stream::Event => self.events.extend(Event::parse(&record.payload)),
        }
    }
}

fn serve(listener: &TcpListener, cancel: Option<Cancel>) -> Told {
    let (connection, _) = listener.accept().expect("an agent calls");
    connection.set_read_timeout(Some(PATIENCE)).expect("a socket can have a limit");
    let mut socket = tungstenite::accept_hdr(Steady(connection), speak_binary).expect("it speaks websocket");
    assert!(matches!(hear(&socket.read().expect("it speaks")), AgentFrame::Hello(_)));
    socket.send(say(&welcome(cancel))).expect("it listens");
    let mut taken: Vec<Record> = Vec::new();
    let finished = loop {
        match hear(&socket.read().expect("it speaks")) {
            AgentFrame::Finished(finished) => break finished,
            AgentFrame::Records(records) => {
                let next = records.last().map_or(0, |record| record.seq + 1);
                taken.extend(records);
                socket.send(say(&ServerFrame::Ack(Ack { next, window: limits::WINDOW }))).expect("it listens");
            }
            AgentFrame::Pong(_) => {}
            frame @ AgentFrame::Hello(_) => panic!("not the end: {frame:?}"),
        }
    };
    socket.send(say(&ServerFrame::FinishedAck(FinishedAck::Complete))).expect("it listens");
    while socket.read().is_ok() {}
    let mut told = Told { output: Default::default(), events: Vec::new(), finished };
    taken.into_iter().for_each(|record| told.take(record));
    told
}

/// A socket that goes on when it was interrupted: a read with a time limit is, whenever this process was stopped or looked
/// at by a tracer, as other tests do (signal(7)).
struct Steady(TcpStream);

impl Read for Steady {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

impl Write for Steady {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// How long an agent may be silent.
const PATIENCE: Duration = Duration::from_secs(60);

fn welcome(cancel: Option<Cancel>) -> ServerFrame {
    ServerFrame::Welcome(Welcome {
        attempt: 1,
        next: 0,
        durable: Durable::Memory,
        window: limits::WINDOW,
        heartbeat: limits::HEARTBEAT.as_millis() as u64,
        max_payload: limits::MAX_PAYLOAD as u32,
        max_message: limits::MAX_MESSAGE as u32,
        cancel,
        server: String::new(),
        capabilities: Vec::new(),
    })
}

#[expect(clippy::result_large_err, reason = "the library's signature")]
fn speak_binary(_: &Request, mut response: Response) -> Result<Response, ErrorResponse> {
    response.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static(Codec::Binary.subprotocol()));
    Ok(response)
}

fn hear(message: &tungstenite::Message) -> AgentFrame {
    Codec::Binary.decode_agent(&Message::Binary(message.clone().into_data())).expect("it is a frame")
}

fn say(frame: &ServerFrame) -> tungstenite::Message {
    match Codec::Binary.encode_server(frame).expect("it is within limits") {
        Message::Binary(wire) => tungstenite::Message::Binary(wire),
        Message::Text(text) => panic!("not binary: {text}"),
    }
}
