//! Exactly once, shown by simulation: the real state machines at both ends of a link that holds back, repeats and cuts,
//! before a store that becomes durable when it likes and a server that crashes.
//!
//! A case is a list of [`Step`]s; after each one the invariants hold ([`World::check`]), and after the last one the
//! network heals and everybody has to come to an end ([`World::settle`]).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, wherever that happens")]

use std::collections::{BTreeMap, VecDeque};

use bytes::BytesMut;
use phonehome_proto::{
    attempts::{Attempts, Lease},
    close::{CloseCode, may_return},
    codec::{
        Codec, Message,
        binary::{HEADROOM, decode_agent, seal},
    },
    frame::{Ack, AgentFrame, Durable, End, Finished, FinishedAck, Hello, Record, ServerFrame, Stream, Welcome},
    id::{ProducerId, StepName},
    limits::{MAX_MESSAGE, MAX_PAYLOAD, MAX_WINDOW, MIN_WINDOW, WINDOW},
    receiver::{Ending, Receiver},
    sender::{Order, Outgoing, Sender},
    tally::Tally,
};
use proptest::{collection::vec, prelude::*};

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_link_does_every_byte_is_stored_once_and_in_order(steps in vec(step(), 0..120)) {
        let mut world = World::new(Durable::Fsync);
        world.join();
        world.play(&[0], steps.into_iter().map(|step| (0, step)));
        world.settle();
        prop_assert_eq!(&world.agents[0].outcome, &Some(Outcome::Delivered(None)));
        prop_assert_eq!(world.server.attempts.count(), 1);
        prop_assert!(world.server.attempts.is_finished());
        prop_assert!(world.is_whole(0));
    }

    #[test]
    fn a_second_agent_takes_over_and_the_first_stores_nothing_more(
        before in vec(step(), 0..60),
        after in vec((0..2usize, step()), 0..80),
    ) {
        let mut world = World::new(Durable::Fsync);
        world.join();
        world.play(&[0], before.into_iter().map(|step| (0, step)));
        world.join();
        world.play(&[0, 1], after);
        world.settle();
        let newest = world.server.logs.len() - 1;
        prop_assert!(world.is_whole(newest));
        for (at, agent) in world.agents.iter().enumerate() {
            let expected = match &agent.outcome {
                Some(Outcome::Delivered(missing)) => missing.is_none() && world.server.logs[newest].agent == at,
                Some(Outcome::Refused(code)) => matches!(code, CloseCode::Superseded | CloseCode::AlreadyFinished),
                None => false,
            };
            prop_assert!(expected, "agent {}: {:?}", at, agent.outcome);
        }
    }

    #[test]
    fn a_server_that_forgets_what_it_acknowledged_says_so(steps in vec(step(), 0..120)) {
        let mut world = World::new(Durable::Memory);
        world.join();
        world.play(&[0], steps.into_iter().map(|step| (0, step)));
        world.settle();
        let log = &world.server.logs[0];
        let lost = world.agents[0].produced.len() - log.records().count();
        match log.end() {
            // Forgotten after the answer: then nobody calls the log complete.
            None => {
                prop_assert!(matches!(world.agents[0].outcome, Some(Outcome::Delivered(_))));
                prop_assert!(!world.server.attempts.is_finished());
            }
            Some(FinishedAck::Complete) => prop_assert!(world.is_whole(0)),
            Some(FinishedAck::Incomplete(reason)) => {
                prop_assert!(lost > 0);
                prop_assert_eq!(reason, &format!("{lost} records are gone, neither side has them any more"));
                prop_assert_eq!(&world.agents[0].outcome, &Some(Outcome::Delivered(Some(reason.clone()))));
            }
            Some(FinishedAck::Resume(_)) => prop_assert!(false, "an order to resume is no end"),
        }
    }
}

proptest! {
    /// Records arrive with other bytes than were sent, and nobody notices before the end; JSON has no checksums.
    #[test]
    fn what_was_damaged_on_the_way_is_sent_again_while_the_agent_holds_it(
        lens in vec(1..50usize, 1..20),
        damaged in vec(any::<bool>(), 20),
        acked in 0..20usize,
    ) {
        let mut agent = Agent::new(0);
        lens.iter().for_each(|len| agent.produce(Stream::Stdout, *len));
        agent.finish();
        let acked = acked.min(lens.len());
        let mut receiver = Receiver::default();
        agent.sender.handle_connected();
        agent.sender.handle_frame(welcome(1, 0, MAX_WINDOW, Durable::Memory)).unwrap();
        let stored = take(&mut agent, &mut receiver, |seq| damaged[seq]);
        let (tally, _, _) = replay(&stored[..acked]);
        receiver.handle_durable(&tally);
        let ack = Ack { next: receiver.acknowledge(), window: MAX_WINDOW };
        agent.obey(ServerFrame::Ack(ack)).unwrap();
        let Some(AgentFrame::Finished(finished)) = next_frame(&mut agent) else { panic!("no end") };

        let (early, any) = (damaged[..acked].contains(&true), damaged[..lens.len()].contains(&true));
        let answer = match receiver.handle_finished(finished.clone()).unwrap() {
            Ending::Rewind(answer) => {
                prop_assert!(any && acked < lens.len());
                prop_assert_eq!(&answer, &FinishedAck::Resume(acked as u64));
                agent.obey(ServerFrame::FinishedAck(answer)).unwrap();
                let again = take(&mut agent, &mut receiver, |_| false);
                prop_assert_eq!(again.len(), lens.len() - acked, "what was acknowledged is not sent again");
                prop_assert_eq!(next_frame(&mut agent), Some(AgentFrame::Finished(finished.clone())));
                accepted(receiver.handle_finished(finished).unwrap())
            }
            ending @ (Ending::Accept(_) | Ending::Repeat(_) | Ending::Resume(_)) => {
                prop_assert!(!any || acked == lens.len());
                accepted(ending)
            }
        };
        prop_assert_eq!(answer == FinishedAck::Complete, !early);
        agent.obey(ServerFrame::FinishedAck(answer)).unwrap();
        prop_assert!(agent.sender.is_done());
    }
}

/// Lets the receiver take every record that the agent sends, some with other bytes, and returns what is stored of them.
fn take(agent: &mut Agent, receiver: &mut Receiver, damaged: impl Fn(usize) -> bool) -> Vec<Entry> {
    let mut stored = Vec::new();
    while receiver.next() < agent.tally.next() {
        let Some(AgentFrame::Records(records)) = next_frame(agent) else { panic!("no records") };
        let mut records: Vec<_> = records
            .into_iter()
            .map(|record| if damaged(record.seq as usize) { damage(record) } else { record })
            .collect();
        receiver.handle_records(&mut records, |_| None).unwrap();
        stored.extend(records.into_iter().map(Entry::Record));
    }
    stored
}

fn accepted(ending: Ending) -> FinishedAck {
    if let Ending::Accept(answer) = ending { answer } else { panic!("not accepted: {ending:?}") }
}

fn next_frame(agent: &mut Agent) -> Option<AgentFrame> {
    match agent.sender.poll_transmit()? {
        Outgoing::Frame(frame) => Some(frame),
        Outgoing::Message(message) => Some(decode_agent(&message).unwrap()),
    }
}

fn damage(record: Record) -> Record {
    let mut payload = record.payload.to_vec();
    payload[0] ^= 1;
    Record::new(record.seq, record.time, record.stream, record.offset, payload.into())
}

/// One thing that happens. Shares are parts of 255, other numbers are taken modulo what there is.
#[derive(Debug, Clone)]
enum Step {
    /// The server says what is durable and answers FINISHED when it is.
    Ack,
    /// The agent dials; what it sent before may still be under way.
    Connect(Codec),
    /// The server dies. This share of what was not durable is kept all the same; of its last words, the first few.
    Crash { kept: u8, words: u8 },
    /// The connection breaks: only the first few messages under way arrive, in each direction.
    Cut { up: u8, down: u8 },
    /// The agent reads this many messages.
    DeliverDown(usize),
    /// The server reads this many messages from one of the links, dead ones included.
    DeliverUp { link: usize, count: usize },
    /// The link repeats one of its messages.
    DuplicateDown(usize),
    /// One of the links, dead ones included, repeats one of its messages.
    DuplicateUp { link: usize, message: usize },
    /// The command ends.
    Finish,
    /// The command writes.
    Produce { stream: Stream, len: usize },
    /// For a moment all goes well, except that not everything gets durable.
    Round(u8),
    /// This share of what is not durable yet becomes durable.
    Sync(u8),
    /// The agent writes this many messages, on a new connection if it has none.
    Transmit(usize),
    /// The server changes its mind about the window.
    Window(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let stream = prop_oneof![Just(Stream::Stdout), Just(Stream::Stderr), Just(Stream::Event)];
    let len = prop_oneof![30 => 0..300usize, 1 => 0..=MAX_PAYLOAD];
    let window = prop_oneof![2 => 1..2000u64, 1 => Just(MIN_WINDOW), 1 => Just(WINDOW), 1 => Just(MAX_WINDOW)];
    let codec = prop_oneof![Just(Codec::Binary), Just(Codec::Json)];
    let few = || 1..6usize;
    let link = || prop_oneof![3 => Just(0), 1 => 0..4usize];
    prop_oneof![
        8 => any::<u8>().prop_map(Step::Round),
        20 => (stream, len).prop_map(|(stream, len)| Step::Produce { stream, len }),
        15 => few().prop_map(Step::Transmit),
        15 => (link(), few()).prop_map(|(link, count)| Step::DeliverUp { link, count }),
        15 => few().prop_map(Step::DeliverDown),
        10 => any::<u8>().prop_map(Step::Sync),
        10 => Just(Step::Ack),
        5 => (link(), 0..50usize).prop_map(|(link, message)| Step::DuplicateUp { link, message }),
        2 => (0..50usize).prop_map(Step::DuplicateDown),
        4 => any::<(u8, u8)>().prop_map(|(up, down)| Step::Cut { up, down }),
        4 => codec.prop_map(Step::Connect),
        3 => any::<(u8, u8)>().prop_map(|(kept, words)| Step::Crash { kept, words }),
        3 => window.prop_map(Step::Window),
        1 => Just(Step::Finish),
    ]
}

/// Agents, links and the server.
struct World {
    agents: Vec<Agent>,
    links: Vec<Link>,
    server: Server,
}

struct Agent {
    producer: ProducerId,
    sender: Sender,
    tally: Tally,
    produced: Vec<Record>,
    ended: bool,
    /// The connection it reads and writes.
    link: Option<usize>,
    /// The window it was last told.
    window: u64,
    /// One more than the last record it sent on this connection.
    reached: u64,
    outcome: Option<Outcome>,
}

#[derive(Debug, PartialEq)]
enum Outcome {
    Delivered(Option<String>),
    Refused(CloseCode),
}

/// One connection, with what the server keeps for it.
struct Link {
    agent: usize,
    codec: Codec,
    up: VecDeque<Message>,
    down: VecDeque<Word>,
    /// What arrived so far, after the hello.
    read: Vec<Message>,
    /// Everything the server said so far.
    said: Vec<ServerFrame>,
    /// Nothing sent from now on arrives.
    cut: bool,
    /// The server says nothing more, but may still read what is under way.
    dismissed: bool,
    /// The server does not read any more.
    closed: bool,
    lease: Option<Lease>,
    /// What to answer as soon as FINISHED is durable.
    answer: Option<FinishedAck>,
}

/// What a server says.
#[derive(Clone)]
enum Word {
    Close(CloseCode),
    Copy(ServerFrame),
    Frame(ServerFrame),
}

struct Server {
    durable: Durable,
    window: u64,
    attempts: Attempts,
    /// Who made the attempts, always durable.
    lives: Vec<ProducerId>,
    /// One for each attempt.
    logs: Vec<Log>,
    /// How much every older attempt had when it was fenced.
    fenced: BTreeMap<usize, usize>,
}

/// An attempt's log: a file of entries of which the first few are durable, and what the process knows of it.
struct Log {
    agent: usize,
    entries: Vec<Entry>,
    durable: usize,
    receiver: Receiver,
}

enum Entry {
    Finished(Finished, FinishedAck),
    Lost { count: u64, next: u64 },
    Record(Record),
}

impl World {
    fn new(durable: Durable) -> Self {
        let (attempts, lives, logs, fenced) = (Attempts::default(), Vec::new(), Vec::new(), BTreeMap::new());
        let server = Server { durable, window: WINDOW, attempts, lives, logs, fenced };
        Self { agents: Vec::new(), links: Vec::new(), server }
    }

    /// Starts another agent.
    fn join(&mut self) {
        self.agents.push(Agent::new(self.agents.len()));
    }

    fn play(&mut self, agents: &[usize], steps: impl IntoIterator<Item = (usize, Step)>) {
        for (at, step) in steps {
            self.step(agents[at % agents.len()], step);
            self.check();
        }
    }

    fn step(&mut self, who: usize, step: Step) {
        match step {
            Step::Ack => self.ack(),
            Step::Connect(codec) => self.connect(who, codec),
            Step::Crash { kept, words } => self.crash(kept, words),
            Step::Cut { up, down } => self.cut(who, up, down),
            Step::DeliverDown(count) => self.deliver_down(who, count),
            Step::DeliverUp { link, count } => self.deliver_up(self.recent(link), count),
            Step::DuplicateDown(word) => self.duplicate_down(who, word),
            Step::DuplicateUp { link, message } => self.duplicate_up(self.recent(link), message),
            Step::Finish => self.agents[who].finish(),
            Step::Produce { stream, len } => self.agents[who].produce(stream, len),
            Step::Round(durable) => self.round(&[who], durable),
            Step::Sync(share) => self.server.sync(share),
            Step::Transmit(count) => self.transmit(who, count),
            Step::Window(window) => self.server.window = window,
        }
    }

    /// The link made so many before the last one, if there is one.
    fn recent(&self, back: usize) -> Option<usize> {
        self.links.len().checked_sub(1 + back)
    }

    /// The link that the server takes records from.
    fn current(&self) -> Option<usize> {
        self.links
            .iter()
            .position(|link| !link.closed && link.lease.is_some_and(|lease| self.server.attempts.is_current(lease)))
    }

    fn connect(&mut self, who: usize, codec: Codec) {
        let agent = &mut self.agents[who];
        if agent.outcome.is_some() {
            return;
        }
        if let Some(old) = agent.hang_up() {
            self.links[old].cut = true;
        }
        agent.sender.handle_connected();
        let hello = codec.encode_agent(&AgentFrame::Hello(agent.hello())).unwrap();
        agent.link = Some(self.links.len());
        self.links.push(Link::new(who, codec, hello));
    }

    fn transmit(&mut self, who: usize, count: usize) {
        if self.agents[who].link.is_none() {
            self.connect(who, Codec::Binary);
        }
        let Some(at) = self.agents[who].link else { return };
        for _ in 0..count {
            let Some(outgoing) = self.agents[who].sender.poll_transmit() else { return };
            let message = self.agents[who].encode(outgoing, self.links[at].codec);
            self.links[at].write(message);
        }
    }

    fn deliver_up(&mut self, at: Option<usize>, count: usize) {
        let Some(at) = at else { return };
        for _ in 0..count {
            let Some(message) = self.links[at].up.pop_front() else { return };
            if self.links[at].lease.is_some() {
                self.links[at].read.push(message.clone());
            }
            self.receive(at, &message);
        }
    }

    fn deliver_down(&mut self, who: usize, count: usize) {
        for _ in 0..count {
            let Some(at) = self.agents[who].link else { return };
            let link = &mut self.links[at];
            match link.down.pop_front() {
                Some(word) => self.agents[who].hear(word),
                None if link.cut => drop(self.agents[who].hang_up()),
                None => return,
            }
        }
    }

    fn duplicate_up(&mut self, at: Option<usize>, message: usize) {
        let Some(link) = at.map(|at| &mut self.links[at]).filter(|link| !link.read.is_empty()) else { return };
        let copy = link.read[message % link.read.len()].clone();
        link.up.push_back(copy);
    }

    fn duplicate_down(&mut self, who: usize, word: usize) {
        let Some(at) = self.agents[who].link else { return };
        let link = &mut self.links[at];
        if !link.said.is_empty() && !link.cut {
            link.down.push_back(Word::Copy(link.said[word % link.said.len()].clone()));
        }
    }

    fn cut(&mut self, who: usize, up: u8, down: u8) {
        let Some(at) = self.agents[who].link else { return };
        let link = &mut self.links[at];
        link.up.truncate(share(link.up.len(), up));
        link.down.truncate(share(link.down.len(), down));
        link.cut = true;
    }

    fn crash(&mut self, kept: u8, words: u8) {
        for link in &mut self.links {
            link.up.clear();
            link.down.truncate(share(link.down.len(), words));
            (link.cut, link.closed) = (true, true);
        }
        self.server.crash(kept);
    }

    fn receive(&mut self, at: usize, message: &Message) {
        if self.links[at].closed {
            return;
        }
        match self.links[at].codec.decode_agent(message).unwrap() {
            AgentFrame::Hello(hello) => self.welcome(at, &hello),
            _ if self.current() != Some(at) => {}
            AgentFrame::Records(records) => self.server.log(self.links[at].lease).store(records),
            AgentFrame::Finished(finished) => self.finished(at, finished),
            AgentFrame::Pong(_) => unreachable!("nobody asked"),
        }
    }

    fn welcome(&mut self, at: usize, hello: &Hello) {
        let who = self.links[at].agent;
        let lease = match self.server.hello(who, hello) {
            Ok(lease) => lease,
            Err(code) => return self.links[at].refuse(code),
        };
        for link in &mut self.links {
            if link.lease.is_some() {
                link.dismiss(CloseCode::Superseded);
            }
        }
        self.links[at].lease = Some(lease);
        let log = self.server.log(Some(lease));
        match log.greet(hello) {
            Ok(()) => {
                let word = welcome(lease.attempt, log.receiver.acknowledge(), self.server.window, self.server.durable);
                self.links[at].say(word);
            }
            Err(code) => {
                assert_ne!(self.agents[who].link, Some(at), "only a hello that was long under way can be refused");
                self.links[at].refuse(code);
            }
        }
    }

    fn finished(&mut self, at: usize, finished: Finished) {
        let log = self.server.log(self.links[at].lease);
        let answer = match log.receiver.handle_finished(finished.clone()).expect("an honest end") {
            Ending::Accept(answer) => {
                log.entries.push(Entry::Finished(finished, answer.clone()));
                answer
            }
            Ending::Repeat(answer) => answer,
            Ending::Resume(_) | Ending::Rewind(_) => unreachable!("a link keeps the order, and its bytes"),
        };
        let complete = answer == FinishedAck::Complete;
        self.links[at].answer = Some(answer);
        let attempt = self.links[at].lease.expect("it is current").attempt as usize - 1;
        assert_eq!(complete, self.is_whole(attempt), "complete means that every byte is there");
    }

    /// The server says on its one live link what is durable.
    fn ack(&mut self) {
        let Some(at) = self.current() else { return };
        let window = self.server.window;
        let log = self.server.log(self.links[at].lease);
        let (next, durable) = (log.receiver.acknowledge(), log.durable == log.entries.len());
        self.links[at].say(ServerFrame::Ack(Ack { next, window }));
        if let Some(answer) = self.links[at].answer.take_if(|_| durable) {
            self.links[at].say(ServerFrame::FinishedAck(answer));
        }
    }

    /// Whether an attempt's log holds everything its agent produced.
    fn is_whole(&self, attempt: usize) -> bool {
        let log = &self.server.logs[attempt];
        log.records().eq(&self.agents[log.agent].produced)
    }

    /// What holds at every moment.
    fn check(&self) {
        for (attempt, log) in self.server.logs.iter().enumerate() {
            let produced = &self.agents[log.agent].produced;
            assert!(log.records().all(|record| produced[record.seq as usize] == *record), "every byte as produced");
            assert!(log.records().is_sorted_by(|a, b| a.seq < b.seq), "in order and once");
            let end = log.entries.iter().position(|entry| entry.end().is_some());
            assert!(end.is_none_or(|end| end + 1 == log.entries.len()), "nothing after the end");
            if let Some(fenced) = self.server.fenced.get(&attempt) {
                assert!(log.entries.len() <= *fenced, "a fenced attempt stores nothing");
            }
            if self.server.durable != Durable::Memory {
                let durable = log.entries.iter().take(log.durable).filter_map(Entry::record).count() as u64;
                assert!(log.records().map(|record| record.seq).eq(0..log.records().count() as u64), "without a hole");
                assert!(durable >= self.agents[log.agent].sender.oldest(), "what was acknowledged is durable");
            }
        }
    }

    /// The network heals: everybody ends, in a bounded number of rounds.
    fn settle(&mut self) {
        self.agents.iter_mut().for_each(Agent::finish);
        let records: usize = self.agents.iter().map(|agent| agent.produced.len()).sum();
        let everybody: Vec<_> = (0..self.agents.len()).collect();
        for _ in 0..2 * records + 20 {
            self.round(&everybody, u8::MAX);
            self.check();
        }
        everybody.iter().for_each(|who| assert!(self.agents[*who].outcome.is_some(), "agent {who} hangs"));
    }

    /// Everything under way arrives, and everybody answers.
    fn round(&mut self, agents: &[usize], durable: u8) {
        for who in agents {
            self.deliver_down(*who, usize::MAX);
            self.transmit(*who, usize::MAX);
        }
        (0..self.links.len()).for_each(|at| self.deliver_up(Some(at), usize::MAX));
        self.server.sync(durable);
        self.ack();
    }
}

impl Agent {
    fn new(number: usize) -> Self {
        Self {
            producer: ProducerId([number as u8 + 1; 16]),
            sender: Sender::default(),
            tally: Tally::default(),
            produced: Vec::new(),
            ended: false,
            link: None,
            window: WINDOW,
            reached: 0,
            outcome: None,
        }
    }

    fn produce(&mut self, stream: Stream, len: usize) {
        if self.ended {
            return;
        }
        let seq = self.tally.next();
        let mut buffer = BytesMut::zeroed(HEADROOM + len);
        for (at, byte) in buffer.iter_mut().skip(HEADROOM).enumerate() {
            *byte = (seq as usize * 31 + at * 7) as u8;
        }
        let sealed = seal(buffer, seq, seq, stream, self.tally.offset(stream));
        self.tally.add(&sealed.record);
        self.produced.push(sealed.record.clone());
        self.sender.push(sealed);
    }

    fn finish(&mut self) {
        if !self.ended {
            self.ended = true;
            let (next, counts, digest) = (self.tally.next(), self.tally.counts(), self.tally.digest());
            self.sender.finish(Finished { next, counts, digest, end: End::Exited(0), time: next, usage: None });
        }
    }

    fn hello(&self) -> Hello {
        Hello {
            build: "simulated".parse().unwrap(),
            step: StepName::default(),
            producer: self.producer,
            oldest: self.sender.oldest(),
            next: self.sender.next(),
            labels: BTreeMap::new(),
            agent: String::new(),
            capabilities: Vec::new(),
        }
    }

    fn encode(&mut self, outgoing: Outgoing, codec: Codec) -> Message {
        let frame = match outgoing {
            Outgoing::Message(message) if codec == Codec::Binary => {
                self.sent(&decode_agent(&message).unwrap());
                return Message::Binary(message);
            }
            Outgoing::Message(message) => decode_agent(&message).unwrap(),
            Outgoing::Frame(frame) => frame,
        };
        self.sent(&frame);
        codec.encode_agent(&frame).unwrap()
    }

    /// Keeps the account of what is in flight.
    fn sent(&mut self, frame: &AgentFrame) {
        let AgentFrame::Records(records) = frame else { return };
        self.reached = records.last().unwrap().seq + 1;
        let in_flight = &self.produced[self.sender.oldest() as usize..self.reached as usize];
        let cost: u64 = in_flight.iter().map(Record::cost).sum();
        assert!(cost <= self.window || in_flight.len() == 1, "{cost} bytes in a window of {}", self.window);
    }

    fn hear(&mut self, word: Word) {
        match word {
            Word::Close(code) if may_return(code.number(), self.sender.is_welcomed()) => drop(self.hang_up()),
            Word::Close(code) => self.outcome = Some(Outcome::Refused(code)),
            Word::Frame(frame) => self.obey(frame).expect("an honest server"),
            Word::Copy(frame) => {
                // What a copy may cost is the connection.
                if self.obey(frame).is_err() {
                    self.hang_up();
                }
            }
        }
    }

    fn obey(&mut self, frame: ServerFrame) -> Result<(), phonehome_proto::sender::ServerViolation> {
        if self.outcome.is_some() {
            return Ok(());
        }
        let ack = if let ServerFrame::Ack(ack) = &frame { Some(*ack) } else { None };
        match self.sender.handle_frame(frame)? {
            Order::Delivered(missing) => self.outcome = Some(Outcome::Delivered(missing)),
            Order::Welcome(welcome) => (self.window, self.reached) = (welcome.window, welcome.next),
            Order::Nothing => self.window = ack.map_or(self.window, |ack| ack.window),
            Order::Cancel(_) | Order::Drain(_) | Order::Pong(_) => unreachable!("never said"),
        }
        Ok(())
    }

    /// Gives the connection up and says which it was.
    fn hang_up(&mut self) -> Option<usize> {
        self.sender.handle_disconnected();
        self.link.take()
    }
}

impl Link {
    fn new(agent: usize, codec: Codec, hello: Message) -> Self {
        Self {
            agent,
            codec,
            up: VecDeque::from([hello]),
            down: VecDeque::new(),
            read: Vec::new(),
            said: Vec::new(),
            cut: false,
            dismissed: false,
            closed: false,
            lease: None,
            answer: None,
        }
    }

    fn write(&mut self, message: Message) {
        if !self.cut {
            self.up.push_back(message);
        }
    }

    fn say(&mut self, frame: ServerFrame) {
        let message = self.codec.encode_server(&frame).unwrap();
        assert_eq!(self.codec.decode_server(&message).unwrap(), frame);
        if !self.cut && !self.dismissed {
            self.said.push(frame.clone());
            self.down.push_back(Word::Frame(frame));
        }
    }

    fn dismiss(&mut self, code: CloseCode) {
        if !self.cut && !self.dismissed {
            self.down.push_back(Word::Close(code));
        }
        self.dismissed = true;
    }

    fn refuse(&mut self, code: CloseCode) {
        self.dismiss(code);
        self.closed = true;
    }
}

impl Server {
    fn hello(&mut self, agent: usize, hello: &Hello) -> Result<Lease, CloseCode> {
        let lease = self.attempts.handle_hello(hello.producer)?;
        if lease.new {
            if let Some(older) = self.logs.len().checked_sub(1) {
                self.fenced.insert(older, self.logs[older].entries.len());
            }
            self.lives.push(hello.producer);
            self.logs.push(Log { agent, entries: Vec::new(), durable: 0, receiver: Receiver::default() });
        }
        Ok(lease)
    }

    fn log(&mut self, lease: Option<Lease>) -> &mut Log {
        &mut self.logs[lease.expect("a hello comes first").attempt as usize - 1]
    }

    fn sync(&mut self, part: u8) {
        self.logs.iter_mut().for_each(|log| log.sync(part));
        if self.logs.last().is_some_and(Log::has_durable_end) {
            self.attempts.finish();
        }
    }

    fn crash(&mut self, kept: u8) {
        for log in &mut self.logs {
            let safe = if self.durable == Durable::Memory { 0 } else { log.durable };
            log.restart(safe + share(log.entries.len() - safe, kept));
        }
        let finished = self.logs.last().is_some_and(Log::has_durable_end);
        self.attempts = Attempts::resume(self.lives.clone(), finished);
    }
}

impl Log {
    fn records(&self) -> impl Iterator<Item = &Record> {
        self.entries.iter().filter_map(Entry::record)
    }

    /// What was answered to FINISHED, if that is stored.
    fn end(&self) -> Option<&FinishedAck> {
        self.entries.last().and_then(Entry::end).map(|(_, answer)| answer)
    }

    fn has_durable_end(&self) -> bool {
        self.end().is_some() && self.durable == self.entries.len()
    }

    /// Answers a hello; what the agent no longer has is lost, and that is made durable first.
    fn greet(&mut self, hello: &Hello) -> Result<(), CloseCode> {
        let stored = self.receiver.next();
        if let Some(next) = self.receiver.handle_hello(hello).map_err(|violation| violation.close_code())? {
            self.entries.push(Entry::Lost { count: next - stored, next });
            self.sync(u8::MAX);
        }
        Ok(())
    }

    fn store(&mut self, mut records: Vec<Record>) {
        let crc = |seq| self.entries.iter().filter_map(Entry::record).find(|record| record.seq == seq).map(|r| r.crc);
        self.receiver.handle_records(&mut records, crc).expect("honest records");
        self.entries.extend(records.into_iter().map(Entry::Record));
    }

    fn sync(&mut self, part: u8) {
        self.durable += share(self.entries.len() - self.durable, part);
        let (tally, _, _) = replay(&self.entries[..self.durable]);
        self.receiver.handle_durable(&tally);
    }

    /// A new process finds this many entries.
    fn restart(&mut self, entries: usize) {
        self.entries.truncate(entries);
        self.durable = entries;
        let (tally, lost, finished) = replay(&self.entries);
        self.receiver = Receiver::resume(tally, lost, finished);
    }
}

impl Entry {
    fn record(&self) -> Option<&Record> {
        if let Self::Record(record) = self { Some(record) } else { None }
    }

    fn end(&self) -> Option<(&Finished, &FinishedAck)> {
        if let Self::Finished(finished, answer) = self { Some((finished, answer)) } else { None }
    }
}

/// What a server reads from its store when it starts.
fn replay(entries: &[Entry]) -> (Tally, u64, Option<(Finished, FinishedAck)>) {
    let (mut tally, mut lost, mut end) = (Tally::default(), 0, None);
    for entry in entries {
        match entry {
            Entry::Finished(finished, answer) => end = Some((finished.clone(), answer.clone())),
            Entry::Lost { count, next } => {
                lost += count;
                tally.skip_to(*next);
            }
            Entry::Record(record) => tally.add(record),
        }
    }
    (tally, lost, end)
}

fn share(whole: usize, part: u8) -> usize {
    (whole * usize::from(part)).div_ceil(usize::from(u8::MAX))
}

fn welcome(attempt: u32, next: u64, window: u64, durable: Durable) -> ServerFrame {
    ServerFrame::Welcome(Welcome {
        attempt,
        next,
        durable,
        window,
        heartbeat: 15_000,
        max_payload: MAX_PAYLOAD as u32,
        max_message: MAX_MESSAGE as u32,
        cancel: None,
        server: String::new(),
        capabilities: Vec::new(),
    })
}
