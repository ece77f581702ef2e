//! Servers, good and bad, against the agent's half of exactly-once: whatever they say, and however often the connection
//! breaks, records leave in order and without a hole, within the window, and none is forgotten that was not acknowledged.

#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use phonehome_fuzz::Input;
use phonehome_proto::{
    codec::binary::{self, HEADROOM, Sealed, seal},
    frame::{Ack, AgentFrame, Counts, Durable, End, Finished, FinishedAck, Record, ServerFrame, Stream, Welcome},
    id::Digest,
    limits::MAX_PAYLOAD,
    sender::{Order, Outgoing, Sender},
};

fuzz_target!(|input: &[u8]| {
    let mut input = Input::new(input);
    let mut agent = Agent::default();
    while !input.is_empty() {
        match input.below(8) {
            0 => agent.push(&mut input),
            1 => agent.finish(),
            2 => agent.connected(),
            3 => agent.disconnected(),
            4 => agent.transmit(),
            5 => {
                let length = usize::from(input.byte());
                if let Ok(frame) = binary::decode_server(&Bytes::copy_from_slice(input.bytes(length))) {
                    agent.frame(frame);
                }
            }
            _ => {
                let frame = frame(&mut input, &agent);
                agent.frame(frame);
            }
        }
        agent.check();
    }
});

/// What a server might say here.
fn frame(input: &mut Input<'_>, agent: &Agent) -> ServerFrame {
    let kind = input.below(4);
    let usual = match input.below(3) {
        0 => agent.sender.oldest(),
        1 => agent.sent,
        _ => agent.sender.next(),
    };
    let next = input.near(usual);
    let window = input.near(1000);
    match kind {
        0 => ServerFrame::Welcome(Welcome {
            attempt: 1,
            next,
            durable: Durable::Memory,
            window,
            heartbeat: 0,
            max_payload: 0,
            max_message: 0,
            cancel: None,
            server: String::new(),
            capabilities: Vec::new(),
        }),
        1 => ServerFrame::Ack(Ack { next, window }),
        2 => ServerFrame::FinishedAck(FinishedAck::Resume(next)),
        _ => ServerFrame::FinishedAck(FinishedAck::Complete),
    }
}

/// An agent that knows what its sender has been told.
#[derive(Default)]
struct Agent {
    sender: Sender,
    /// Every record there ever was.
    records: Vec<Record>,
    finished: bool,
    /// Everything below was acknowledged.
    acknowledged: u64,
    /// What is sent next over this connection.
    sent: u64,
    /// Whether the end was sent over this connection.
    ended: bool,
    window: u64,
}

impl Agent {
    fn push(&mut self, input: &mut Input<'_>) {
        if self.finished {
            return;
        }
        let mut buffer = BytesMut::zeroed(HEADROOM);
        match input.below(16) {
            0 => buffer.resize(HEADROOM + MAX_PAYLOAD, b'x'),
            length => buffer.resize(HEADROOM + 8 * usize::from(length), b'x'),
        }
        let Sealed { record, message } = seal(buffer, self.sender.next(), 0, Stream::Stdout, 0);
        self.records.push(record.clone());
        self.sender.push(Sealed { record, message });
    }

    fn finish(&mut self) {
        if !self.finished {
            self.finished = true;
            self.sender.finish(self.end());
        }
    }

    fn end(&self) -> Finished {
        let (counts, digest) = (Counts::default(), Digest([0; 32]));
        Finished { next: self.records.len() as u64, counts, digest, end: End::Exited(0), time: 0, usage: None }
    }

    fn connected(&mut self) {
        self.sender.handle_connected();
    }

    fn disconnected(&mut self) {
        self.sender.handle_disconnected();
        assert!(self.sender.is_done() || self.sender.poll_transmit().is_none(), "sends without a connection");
    }

    fn frame(&mut self, frame: ServerFrame) {
        let before = (self.sender.oldest(), self.sender.next(), self.sender.cost());
        let Ok(order) = self.sender.handle_frame(frame.clone()) else {
            assert_eq!((self.sender.oldest(), self.sender.next(), self.sender.cost()), before);
            return self.disconnected(); // as the agent does
        };
        match frame {
            ServerFrame::Welcome(welcome) => {
                assert!((before.0..=before.1).contains(&welcome.next), "cannot resume there");
                (self.sent, self.window, self.ended) = (welcome.next, welcome.window, false);
                self.acknowledged = self.acknowledged.max(welcome.next);
            }
            ServerFrame::Ack(ack) => {
                self.window = ack.window;
                self.acknowledged = self.acknowledged.max(ack.next);
                self.sent = self.sent.max(self.acknowledged);
            }
            ServerFrame::FinishedAck(FinishedAck::Resume(next)) => {
                assert!(self.ended && (before.0..=before.1).contains(&next), "cannot resume there");
                (self.sent, self.ended) = (next, false);
                self.acknowledged = self.acknowledged.max(next);
            }
            ServerFrame::FinishedAck(FinishedAck::Complete | FinishedAck::Incomplete(_)) => {
                assert!(self.ended && matches!(order, Order::Delivered(_)), "delivered before it was sent");
                self.acknowledged = self.records.len() as u64;
            }
            ServerFrame::Cancel(_) | ServerFrame::Drain(_) | ServerFrame::Ping(_) => {}
        }
    }

    fn transmit(&mut self) {
        let frame = match self.sender.poll_transmit() {
            None => return,
            Some(Outgoing::Message(wire)) => binary::decode_agent(&wire).expect("a frame"),
            Some(Outgoing::Frame(frame)) => {
                binary::encode_agent(&frame).expect("within the limits");
                frame
            }
        };
        match frame {
            AgentFrame::Records(records) => {
                for record in &records {
                    assert_eq!(*record, self.records[self.sent as usize], "out of order");
                    self.sent += 1;
                }
                assert!(!self.ended, "a record after the end");
                let on_its_way = &self.records[self.acknowledged as usize..self.sent as usize];
                let cost: u64 = on_its_way.iter().map(Record::cost).sum();
                assert!(on_its_way.len() == 1 || cost <= self.window, "{cost} bytes in a window of {}", self.window);
            }
            AgentFrame::Finished(finished) => {
                assert!(!self.ended && self.sent == self.records.len() as u64, "the end is not the last");
                assert_eq!(finished, self.end());
                self.ended = true;
            }
            AgentFrame::Hello(_) | AgentFrame::Pong(_) => panic!("{frame:?} is not for a sender"),
        }
    }

    /// Held is what was not acknowledged, no more and no less.
    fn check(&self) {
        assert_eq!(self.sender.oldest(), self.acknowledged);
        assert_eq!(self.sender.next(), self.records.len() as u64);
        let held = &self.records[self.acknowledged as usize..];
        assert_eq!(self.sender.cost(), held.iter().map(Record::cost).sum::<u64>());
    }
}
