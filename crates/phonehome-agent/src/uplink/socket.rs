//! One websocket: whole frames in, one queued message at a time out, both at once.

use bytes::Bytes;
use futures_util::{Sink, SinkExt, Stream};
use phonehome_env::network::Transport;
use phonehome_proto::{
    codec::{Codec, DecodeError, EncodeError, Message},
    frame::{AgentFrame, ServerFrame},
};
use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};
use tokio_tungstenite::{WebSocketStream, tungstenite};

/// The connection and what waits to be written to it.
pub(super) struct Socket {
    stream: WebSocketStream<Box<dyn Transport>>,
    queue: VecDeque<Bytes>,
    unflushed: bool,
}

/// What a socket reports.
#[derive(Debug)]
pub(super) enum Incoming {
    /// The server sent something without meaning for us, a websocket ping say.
    Alive,
    /// The server closed.
    Closed(u16, String),
    /// A frame.
    Frame(ServerFrame),
    /// Queued messages have been written.
    Writable,
}

/// Why a socket is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum SocketError {
    #[error("the server sent a bad frame")]
    Decode(#[from] DecodeError),
    #[error("a frame cannot be sent")]
    Encode(#[from] EncodeError),
    #[error("the connection broke")]
    Transport(#[from] tungstenite::Error),
}

/// Read buffer, bytes: the server says little.
pub(super) const READ_BUFFER: usize = 4 * 1024;

impl Socket {
    pub(super) fn new(stream: WebSocketStream<Box<dyn Transport>>) -> Self {
        Self { stream, queue: VecDeque::new(), unflushed: false }
    }

    /// Whether something waits to be written.
    pub(super) fn is_busy(&self) -> bool {
        !self.queue.is_empty()
    }

    pub(super) fn queue(&mut self, frame: &AgentFrame) -> Result<(), SocketError> {
        match Codec::Binary.encode_agent(frame)? {
            Message::Binary(message) => self.queue_message(message),
            Message::Text(_) => unreachable!("the binary codec writes binary messages"),
        }
        Ok(())
    }

    pub(super) fn queue_message(&mut self, message: Bytes) {
        self.queue.push_back(message);
    }

    /// Writes what is queued and reads what arrives, whichever is possible first. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Incoming, SocketError> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Incoming, SocketError>> {
        if let Poll::Ready(message) = Pin::new(&mut self.stream).poll_next(context) {
            let message = message.unwrap_or(Err(tungstenite::Error::ConnectionClosed));
            return Poll::Ready(incoming(message?));
        }
        self.poll_write(context)
    }

    /// Ready when the queue has become empty; flushes in any case.
    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<Result<Incoming, SocketError>> {
        let mut stream = Pin::new(&mut self.stream);
        let mut wrote = false;
        while !self.queue.is_empty() {
            std::task::ready!(stream.as_mut().poll_ready(context))?;
            if let Some(message) = self.queue.pop_front() {
                stream.as_mut().start_send(tungstenite::Message::Binary(message))?;
                self.unflushed = true;
                wrote = true;
            }
        }
        if wrote {
            return Poll::Ready(Ok(Incoming::Writable));
        }
        if self.unflushed {
            std::task::ready!(stream.as_mut().poll_flush(context))?;
            self.unflushed = false;
        }
        Poll::Pending
    }

    /// Says goodbye and waits for the server to do the same.
    pub(super) async fn close(&mut self) -> Result<(), SocketError> {
        self.stream.close(None).await?;
        while let Ok(Incoming::Alive | Incoming::Frame(_) | Incoming::Writable) = self.next().await {}
        self.stream.flush().await?;
        Ok(())
    }
}

fn incoming(message: tungstenite::Message) -> Result<Incoming, SocketError> {
    let message = match message {
        tungstenite::Message::Binary(bytes) => Message::Binary(bytes),
        tungstenite::Message::Text(text) => Message::Text(text.as_str().to_owned()),
        tungstenite::Message::Close(frame) => {
            return Ok(frame.map_or(Incoming::Closed(NO_STATUS, String::new()), |frame| {
                Incoming::Closed(frame.code.into(), frame.reason.as_str().to_owned())
            }));
        }
        tungstenite::Message::Ping(_) | tungstenite::Message::Pong(_) | tungstenite::Message::Frame(_) => {
            return Ok(Incoming::Alive);
        }
    };
    Ok(Incoming::Frame(Codec::Binary.decode_server(&message)?))
}

/// What a close frame without a code means (RFC 6455, section 7.1.5).
const NO_STATUS: u16 = 1005;
