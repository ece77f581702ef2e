//! Agents, their connections, the server, and everything that can happen to them next.
//!
//! What makes no difference to anybody happens at one fixed time, and so makes no states of its own:
//!
//! - A command writes right before its agent next says something. Nobody sees it earlier.
//! - What comes over a connection whose lease is void is read at once: it changes nothing but that connection's
//!   `Receiver`.
//! - An agent hears that it is superseded as soon as the server says so, behind everything said before. What it would
//!   have sent in between goes nowhere.
//! - What an agent has not read when a connection or the server breaks is lost. What still arrives has arrived before.
//! - An agent that dies is one that does nothing any more. The others may not wait for it, see
//!   [`World::waits_for_others`].
//! - A connection that nobody reads or writes any more is forgotten.

use std::{collections::VecDeque, rc::Rc};

use phonehome_proto::{
    close::CloseCode,
    frame::{Durable, FinishedAck, Record, ServerFrame, Welcome},
    limits::{MAX_MESSAGE, MAX_PAYLOAD},
};

use crate::{
    agent::{Agent, Outcome, Script, producer},
    rules::{Broken, Rule, Seen, Situation},
    server::{Entry, Log, Seat, Server, encode_answer, hello, refute},
};

/// What is explored.
pub(crate) struct Model {
    /// What each agent's command writes. The first agent is there from the start, the second joins at any time.
    pub(crate) scripts: Vec<Script>,
    pub(crate) faults: Faults,
    pub(crate) windows: Windows,
    /// With `Memory` a crash takes any part of a log, acknowledged or not.
    pub(crate) durable: Durable,
    pub(crate) without: Option<Rule>,
}

/// How often each fault may still strike.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    pub(crate) cuts: u8,
    pub(crate) crashes: u8,
    /// A message vanishes from the middle of a connection: no network does that, a broken peer may.
    pub(crate) losses: u8,
    /// A message carries other bytes with a fitting checksum, as above.
    pub(crate) alterations: u8,
    /// An agent drops records from memory that it has on disk.
    pub(crate) spills: u8,
    /// An agent dies when everything is on disk, and another process goes on.
    pub(crate) deaths: u8,
}

/// What may be in flight, bytes.
pub(crate) struct Windows {
    pub(crate) welcome: u64,
    pub(crate) ack: u64,
}

impl Model {
    pub(crate) fn lacks(&self, rule: Rule) -> bool {
        self.without == Some(rule)
    }

    /// A record as its agent made it, or as a broken one would.
    pub(crate) fn record(&self, agent: usize, seq: u64, altered: bool) -> &Record {
        let script = &self.scripts[agent];
        if altered { &script.altered[seq as usize] } else { &script.records[seq as usize].record }
    }

    /// Whether peers and network keep to what they promise. Otherwise an agent may rightly be refused.
    fn is_honest(&self) -> bool {
        self.faults.losses + self.faults.alterations == 0
    }

    /// Whether a log may rightly end with something missing.
    pub(crate) fn may_miss(&self) -> bool {
        !self.is_honest() || self.durable == Durable::Memory || self.scripts.iter().any(|script| script.is_flawed)
    }
}

/// One thing that happens. Connections are named by their place in [`World::links`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// The server says how far its store has got.
    Ack(usize),
    /// The server answers FINISHED.
    Answer(usize),
    /// The store makes everything durable.
    Commit,
    /// After so many more records an agent dials and says hello.
    Connect(usize, u64),
    /// An agent reads a frame.
    Down(usize),
    /// An agent brings a record back into memory.
    Restore(usize),
    /// The server notices that the agent's end of the connection is gone. What is unread is lost.
    Gone(usize),
    /// The server closes a connection whose lease is void, and the agent hears it.
    Notice(usize),
    /// After so many more records an agent says what it has to say.
    Transmit(usize, u64),
    /// The server reads a frame.
    Up(usize),

    /// A message carries other bytes.
    Alter(usize),
    /// The server dies and comes back with this many entries of the newest log.
    Crash(usize),
    /// The agent loses its connection. What is under way may still reach the server.
    Cut(usize),
    /// The agent dies, when nothing of it is on its way. What it left on disk from this record on is taken up by another
    /// process.
    Die(usize, u64),
    /// The second agent starts, whether or not the first is still there.
    Join,
    /// A message vanishes.
    Lose(usize),
    /// An agent drops records below the first number from memory, except for so many of the oldest.
    Spill(usize, u64, u64),
}

impl Action {
    /// Whether it may as well never happen.
    pub(crate) fn is_optional(self) -> bool {
        match self {
            Self::Ack(_) | Self::Answer(_) | Self::Commit | Self::Connect(..) | Self::Down(_) | Self::Gone(_) => false,
            Self::Notice(_) | Self::Restore(_) | Self::Transmit(..) | Self::Up(_) => false,
            Self::Alter(_) | Self::Crash(_) | Self::Cut(_) | Self::Die(..) | Self::Join | Self::Lose(_) => true,
            Self::Spill(..) => true,
        }
    }
}

/// One state. Cloning is cheap: what an action does not touch is shared.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) agents: Vec<Rc<Agent>>,
    pub(crate) links: Vec<Rc<Link>>,
    server: Rc<Server>,
    faults: Faults,
    crashed: bool,
}

/// One connection, with what the server keeps for it.
#[derive(Clone)]
pub(crate) struct Link {
    agent: usize,
    /// The agent reads and writes it. When it does not any more, what it wrote may still arrive.
    attached: bool,
    /// The server reads it.
    open: bool,
    up: VecDeque<Up>,
    down: VecDeque<Down>,
    pub(crate) seat: Option<Seat>,
}

/// What an agent says, as far as it is not the same in every state.
#[derive(Debug, Clone)]
pub(crate) enum Up {
    Finished,
    Hello { oldest: u64, next: u64 },
    Records { first: u64, count: u64, altered: bool },
}

/// What a server sends.
#[derive(Debug, Clone)]
enum Down {
    Close(CloseCode),
    Word(Word),
}

/// What a server says, as far as it is not the same in every state.
#[derive(Debug, Clone)]
pub(crate) enum Word {
    Ack(u64),
    FinishedAck(FinishedAck),
    Welcome { attempt: u32, next: u64 },
}

impl World {
    pub(crate) fn new(model: &Model) -> Self {
        let agents = vec![Rc::default()];
        Self { agents, links: Vec::new(), server: Rc::default(), faults: model.faults, crashed: false }
    }

    /// Everything that may happen next.
    pub(crate) fn actions(&self, model: &Model) -> Vec<Action> {
        let mut actions = Vec::new();
        for who in 0..self.agents.len() {
            self.actions_of_agent(who, model, &mut actions);
            self.actions_on_disk(who, &mut actions);
        }
        for at in 0..self.links.len() {
            self.actions_on_link(at, model, &mut actions);
        }
        if let Some(log) = self.server.logs.last() {
            if log.durable < log.entries.len() {
                actions.push(Action::Commit);
            }
            if self.faults.crashes > 0 {
                let safe = if model.durable == Durable::Memory { 0 } else { log.durable };
                actions.extend((safe..=log.entries.len()).map(Action::Crash));
            }
        }
        if self.agents.len() < model.scripts.len() {
            actions.push(Action::Join);
        }
        actions
    }

    /// What the command writes matters to nobody before the agent speaks the next time, so that is when it is written.
    fn actions_of_agent(&self, who: usize, model: &Model, actions: &mut Vec<Action>) {
        let agent = &self.agents[who];
        let act = match self.attached(who) {
            Some(_) if agent.is_streaming() => Action::Transmit,
            Some(_) => return,
            None => Action::Connect,
        };
        if agent.is_at_work() {
            actions.extend((0..=model.scripts[who].finished.next - agent.sender.next()).map(|count| act(who, count)));
        }
    }

    /// What becomes of records that an agent has on disk as well as in memory, or only there.
    fn actions_on_disk(&self, who: usize, actions: &mut Vec<Action>) {
        let agent = &self.agents[who];
        let (oldest, next) = (agent.sender.oldest(), agent.sender.next());
        if agent.has_spilled() {
            actions.push(Action::Restore(who));
        }
        if agent.is_at_work() && self.faults.spills > 0 {
            actions.extend((oldest + 1..=next).flat_map(|kept| [0, 1].map(|keep| Action::Spill(who, kept, keep))));
        }
        if agent.can_recover() && self.faults.deaths > 0 {
            actions.extend((0..=oldest).map(|oldest| Action::Die(who, oldest)));
        }
    }

    fn actions_on_link(&self, at: usize, model: &Model, actions: &mut Vec<Action>) {
        let link = &self.links[at];
        let carries_records = matches!(link.up.front(), Some(Up::Records { altered: false, .. }));
        let listener = self.listener(at);
        let can = [
            (link.open && !link.up.is_empty(), Action::Up(at)),
            (link.attached && !link.down.is_empty(), Action::Down(at)),
            (listener.is_some_and(|(seat, log)| seat.ack(log, model).is_some()), Action::Ack(at)),
            (listener.is_some_and(|(seat, log)| seat.answer(log, model).is_some()), Action::Answer(at)),
            (link.attached && link.down.is_empty() && self.is_void(link), Action::Notice(at)),
            (!link.attached, Action::Gone(at)),
            (link.attached && self.faults.cuts > 0, Action::Cut(at)),
            (carries_records && link.up.len() > 1 && self.faults.losses > 0, Action::Lose(at)),
            (carries_records && self.faults.alterations > 0, Action::Alter(at)),
        ];
        actions.extend(can.into_iter().filter_map(|(can, action)| can.then_some(action)));
    }

    /// The state after `action`; `None` when an agent had nothing to say.
    pub(crate) fn after(&self, action: Action, model: &Model, seen: &mut Seen) -> Result<Option<Self>, Broken> {
        let mut next = self.clone();
        match action {
            Action::Ack(at) => next.ack(at, model),
            Action::Alter(at) => next.alter(at),
            Action::Answer(at) => next.answer(at, model),
            Action::Commit => Rc::make_mut(&mut next.server).commit(model),
            Action::Connect(who, count) => next.connect(who, count, model, seen),
            Action::Crash(kept) => next.crash(kept, model, seen)?,
            Action::Cut(at) => next.cut(at, model, seen)?,
            Action::Die(who, oldest) => next.die(who, oldest, model, seen),
            Action::Down(at) => next.down(at, model, seen)?,
            Action::Gone(at) => next.link(at).open = false,
            Action::Join => next.agents.push(Rc::default()),
            Action::Lose(at) => next.lose(at),
            Action::Notice(at) => next.hang_up(at, CloseCode::Superseded.number(), model, seen)?,
            Action::Restore(who) => next.agent(who).restore(&model.scripts[who], seen),
            Action::Spill(who, kept, keep) => {
                next.faults.spills -= 1;
                if !next.agent(who).spill(kept, keep, seen) {
                    return Ok(None);
                }
            }
            Action::Transmit(who, count) => {
                if !next.transmit(who, count, model, seen)? {
                    return Ok(None);
                }
            }
            Action::Up(at) => next.up(at, model, seen)?,
        }
        next.read_in_vain(model, seen)?;
        next.links.retain(|link| link.attached || link.open && !link.up.is_empty());
        Ok(Some(next))
    }

    /// The agent without which `action` would not happen; `None` for what the server does.
    fn actor(&self, action: Action) -> Option<usize> {
        match action {
            Action::Connect(who, _) | Action::Restore(who) | Action::Transmit(who, _) => Some(who),
            Action::Down(at) => Some(self.links[at].agent),
            Action::Ack(_) | Action::Answer(_) | Action::Commit | Action::Gone(_) | Action::Notice(_) => None,
            Action::Alter(_) | Action::Crash(_) | Action::Cut(_) | Action::Die(..) | Action::Join => None,
            Action::Lose(_) | Action::Spill(..) | Action::Up(_) => None,
        }
    }

    fn agent(&mut self, who: usize) -> &mut Agent {
        Rc::make_mut(&mut self.agents[who])
    }

    fn link(&mut self, at: usize) -> &mut Link {
        Rc::make_mut(&mut self.links[at])
    }

    /// The connection that an agent reads and writes.
    fn attached(&self, who: usize) -> Option<usize> {
        self.links.iter().position(|link| link.attached && link.agent == who)
    }

    fn connect(&mut self, who: usize, count: u64, model: &Model, seen: &mut Seen) {
        let agent = self.agent(who);
        agent.produce(count, &model.scripts[who], seen);
        agent.sender.handle_connected();
        let hello = Up::Hello { oldest: agent.sender.oldest(), next: agent.sender.next() };
        let up = VecDeque::from([hello]);
        self.links.push(Rc::new(Link {
            agent: who,
            attached: true,
            open: true,
            up,
            down: VecDeque::new(),
            seat: None,
        }));
    }

    fn transmit(&mut self, who: usize, count: u64, model: &Model, seen: &mut Seen) -> Result<bool, Broken> {
        let agent = self.agent(who);
        agent.produce(count, &model.scripts[who], seen);
        let Some(said) = agent.transmit(who, model, seen)? else { return Ok(false) };
        if let Some(at) = self.attached(who).filter(|at| self.links[*at].open) {
            self.link(at).up.push_back(said);
        }
        Ok(true)
    }

    fn cut(&mut self, at: usize, model: &Model, seen: &mut Seen) -> Result<(), Broken> {
        self.faults.cuts -= 1;
        self.hang_up(at, ABNORMAL_CLOSURE, model, seen)
    }

    fn die(&mut self, who: usize, oldest: u64, model: &Model, seen: &mut Seen) {
        self.faults.deaths -= 1;
        for at in 0..self.links.len() {
            if self.links[at].agent == who {
                self.link(at).let_go();
            }
        }
        self.agent(who).recover(oldest, &model.scripts[who], seen);
    }

    /// The agent's end of a connection is gone; it learns this code.
    fn hang_up(&mut self, at: usize, code: u16, model: &Model, seen: &mut Seen) -> Result<(), Broken> {
        let who = self.links[at].agent;
        self.agent(who).hang_up(code, model, seen);
        self.link(at).let_go();
        let is_refused = matches!(self.agents[who].outcome, Some(Outcome::Refused(_)));
        refute(is_refused && !self.may_refuse(who, code, model), Broken::Refused)
    }

    /// A connection whose hello no server has read is not yet bound to a process: a proxy may hold it.
    fn crash(&mut self, kept: usize, model: &Model, seen: &mut Seen) -> Result<(), Broken> {
        self.faults.crashes -= 1;
        self.crashed = true;
        for at in 0..self.links.len() {
            if self.links[at].open && self.links[at].seat.is_none() {
                seen.note(Situation::HelloOutlivedCrash);
                continue;
            }
            if self.links[at].attached {
                self.hang_up(at, ABNORMAL_CLOSURE, model, seen)?;
            }
            self.link(at).open = false;
        }
        if let Some(log) = self.server.logs.last() {
            seen.note_when(log.durable < kept && kept < log.entries.len(), Situation::CrashKeptPart);
            seen.note_when(kept < log.durable, Situation::CrashLostDurable);
        }
        Rc::make_mut(&mut self.server).crash(kept, model);
        Ok(())
    }

    fn lose(&mut self, at: usize) {
        self.faults.losses -= 1;
        self.link(at).up.pop_front();
    }

    fn alter(&mut self, at: usize) {
        self.faults.alterations -= 1;
        if let Some(Up::Records { altered, .. }) = self.link(at).up.front_mut() {
            *altered = true;
        }
    }

    fn is_void(&self, link: &Link) -> bool {
        link.open && link.seat.as_ref().is_some_and(|seat| !self.server.attempts.is_current(seat.lease))
    }

    /// Reads what comes over connections whose lease is void as soon as it is sent. It changes nothing but the server's
    /// half of that connection, so when it is read makes no difference.
    fn read_in_vain(&mut self, model: &Model, seen: &mut Seen) -> Result<(), Broken> {
        for at in 0..self.links.len() {
            while self.is_void(&self.links[at]) && !self.links[at].up.is_empty() {
                self.up(at, model, seen)?;
            }
        }
        Ok(())
    }

    /// A seat that somebody listens to, and its log.
    fn listener(&self, at: usize) -> Option<(&Seat, &Log)> {
        let link = &self.links[at];
        let seat = link.seat.as_ref().filter(|_| link.attached && link.open)?;
        Some((seat, self.server.log(seat.lease)))
    }

    fn ack(&mut self, at: usize, model: &Model) {
        let link = Rc::make_mut(&mut self.links[at]);
        let Some(seat) = &mut link.seat else { return };
        let next = seat.acknowledge(self.server.log(seat.lease), model);
        link.say(Word::Ack(next));
    }

    fn answer(&mut self, at: usize, model: &Model) {
        let answer = self.listener(at).and_then(|(seat, log)| seat.answer(log, model));
        let link = self.link(at);
        answer.into_iter().for_each(|answer| link.say(Word::FinishedAck(answer)));
        if let Some(seat) = &mut link.seat {
            seat.silent = true;
        }
    }

    fn down(&mut self, at: usize, model: &Model, seen: &mut Seen) -> Result<(), Broken> {
        let link = self.link(at);
        let who = link.agent;
        match link.down.pop_front() {
            Some(Down::Close(code)) => self.hang_up(at, code.number(), model, seen)?,
            Some(Down::Word(word)) => self.agent(who).hear(word, model, seen)?,
            None => {}
        }
        if !self.agents[who].is_at_work() {
            self.link(at).let_go();
        }
        Ok(())
    }

    fn up(&mut self, at: usize, model: &Model, seen: &mut Seen) -> Result<(), Broken> {
        match self.link(at).up.pop_front() {
            Some(Up::Finished) => self.take_finished(at, model, seen)?,
            Some(Up::Hello { oldest, next }) => self.take_hello(at, oldest, next, model, seen)?,
            Some(Up::Records { first, count, altered }) => self.take_records(at, first, count, altered, model, seen)?,
            None => {}
        }
        Ok(())
    }

    fn take_hello(&mut self, at: usize, oldest: u64, next: u64, model: &Model, seen: &mut Seen) -> Result<(), Broken> {
        let (who, attached) = (self.links[at].agent, self.links[at].attached);
        let seat = match Rc::make_mut(&mut self.server).welcome(who, &hello(who, oldest, next), model, seen) {
            Ok(seat) => seat,
            Err(code) => {
                seen.note_when(code == CloseCode::Protocol, Situation::OldHelloRefused);
                self.link(at).close(code);
                return Ok(());
            }
        };
        let displaces = !attached && self.attached(who).is_some_and(|newer| self.links[newer].seat.is_some());
        seen.note_when(displaces, Situation::OldHelloDisplaces);
        seen.note_when(self.crashed && seat.receiver.durable() > 0, Situation::ResumeAfterCrash);
        seen.note_when(seat.receiver.durable() < seat.receiver.next(), Situation::WelcomeBelowReceived);
        let next = seat.acked;
        let durable = self.server.log(seat.lease).durable_next();
        refute(model.durable != Durable::Memory && next != durable, Broken::ResumePoint)?;
        let link = self.link(at);
        link.say(Word::Welcome { attempt: seat.lease.attempt, next });
        link.seat = Some(seat);
        Ok(())
    }

    fn take_records(
        &mut self,
        at: usize,
        first: u64,
        count: u64,
        altered: bool,
        model: &Model,
        seen: &mut Seen,
    ) -> Result<(), Broken> {
        let link = Rc::make_mut(&mut self.links[at]);
        let agent = link.agent;
        let entry = |seq| Entry::Record { agent, seq, altered: altered && seq == first };
        let records: Vec<_> = (first..first + count)
            .map(|seq| (model.record(agent, seq, altered && seq == first).clone(), entry(seq)))
            .collect();
        let seat = link.seat.as_mut().expect("a hello comes first");
        // A connection whose lease is void takes nothing back, and goes on as if it had.
        let contradicts = |record: &Record| {
            record.seq < seat.receiver.next() && self.server.log(seat.lease).contradicts(record, model)
        };
        let contradicted = records.iter().any(|(record, _)| contradicts(record));
        let result = Rc::make_mut(&mut self.server).take(seat, &records, model, seen);
        refute(contradicted && result.is_ok(), Broken::ConflictPassed)?;
        if let Err(code) = result {
            link.close(code);
        }
        Ok(())
    }

    fn take_finished(&mut self, at: usize, model: &Model, seen: &mut Seen) -> Result<(), Broken> {
        let link = Rc::make_mut(&mut self.links[at]);
        let seat = link.seat.as_mut().expect("a hello comes first");
        let log = self.server.log(seat.lease);
        let is_owed = log.end().is_none() && log.can_be_mended(seat.acked);
        let lease = seat.lease;
        match Rc::make_mut(&mut self.server).finish(seat, model, seen) {
            Ok(answer) => answer.into_iter().for_each(|answer| link.say(Word::FinishedAck(answer))),
            Err(code) => link.close(code),
        }
        refute(is_owed && matches!(self.server.log(lease).end(), Some(FinishedAck::Incomplete(_))), Broken::Unmended)
    }

    /// What holds in every state.
    pub(crate) fn check(&self, model: &Model) -> Result<(), Broken> {
        self.server.check(model)?;
        let promises = self.links.iter().filter(|link| link.open).filter_map(|link| link.seat.as_ref());
        for seat in promises {
            let is_empty = seat.acked > self.server.log(seat.lease).durable_next();
            refute(model.durable != Durable::Memory && is_empty, Broken::EmptyPromise)?;
        }
        for (who, agent) in self.agents.iter().enumerate() {
            let log = self.server.logs.iter().find(|log| log.agent == who);
            let durable = log.map_or(0, Log::durable_next);
            refute(model.durable != Durable::Memory && agent.sender.oldest() > durable, Broken::Forgotten)?;
            match &agent.outcome {
                Some(Outcome::Delivered(missing)) => {
                    let log = log.filter(|log| log.has_durable_end());
                    let whole = log.is_some_and(|log| log.is_whole(model));
                    refute(log.is_none() && model.durable != Durable::Memory, Broken::FalseComplete)?;
                    refute(missing.is_none() && log.is_some() && !whole, Broken::FalseComplete)?;
                    refute(missing.is_some() && whole, Broken::FalseComplete)?;
                }
                Some(Outcome::Refused(_)) | None => {}
            }
        }
        Ok(())
    }

    fn may_refuse(&self, who: usize, code: u16, model: &Model) -> bool {
        let is_newest = self.server.attempts.is_newest(producer(who));
        match CloseCode::from_number(code) {
            Some(CloseCode::AlreadyFinished) => !is_newest && self.server.attempts.is_finished(),
            Some(CloseCode::Protocol) => !model.is_honest(),
            Some(CloseCode::Superseded) => !is_newest,
            Some(CloseCode::Auth | CloseCode::HelloTimeout | CloseCode::NotTheOwner | CloseCode::Overloaded) => false,
            Some(CloseCode::StorageUnavailable | CloseCode::TooLarge | CloseCode::UnknownBuild) => false,
            Some(CloseCode::Version) | None => false,
        }
    }

    /// Whether an agent that is not done has nothing to expect unless another one moves. That one may be dead.
    pub(crate) fn waits_for_others(&self, possible: &[Action]) -> bool {
        let concerns = |action: Action, who| self.actor(action).is_none_or(|actor| actor == who);
        let waits = |who: usize| self.agents[who].is_at_work() && !possible.iter().any(|action| concerns(*action, who));
        (0..self.agents.len()).any(waits)
    }

    /// Whether a world in which nothing happens any more has come to a good end: the newest attempt is delivered.
    pub(crate) fn is_settled(&self, model: &Model) -> bool {
        let newest = self.server.logs.last().map(|log| &self.agents[log.agent]);
        let is_delivered = newest.is_some_and(|agent| match &agent.outcome {
            Some(Outcome::Delivered(missing)) => missing.is_none() || model.may_miss(),
            // The end it was told of is lost, and a hello that was long under way made it the newest after all.
            Some(Outcome::Refused(code)) => {
                model.durable == Durable::Memory && *code == CloseCode::AlreadyFinished.number()
            }
            None => false,
        });
        is_delivered || !model.is_honest()
    }

    /// Everything that decides what can happen from here on.
    pub(crate) fn encode(&self, model: &Model, out: &mut Vec<u8>) {
        let Faults { cuts, crashes, losses, alterations, spills, deaths } = self.faults;
        out.extend_from_slice(&[cuts, crashes, losses, alterations, spills, deaths]);
        out.extend_from_slice(&[self.agents.len() as u8, self.links.len() as u8]);
        self.agents.iter().for_each(|agent| agent.encode(out));
        self.server.encode(out);
        let mut links: Vec<_> = self.links.iter().map(|link| link.encode(&self.server, model)).collect();
        links.sort_unstable(); // their order means nothing
        links.iter().for_each(|link| out.extend_from_slice(link));
    }

    /// The same in the state machines' own words, of those parts that the next `Welcome` does not overwrite. Two states
    /// that [`Self::encode`] writes alike must agree in it.
    pub(crate) fn in_own_words(&self) -> String {
        let senders = self.agents.iter().filter(|agent| agent.is_streaming()).map(|agent| &agent.sender);
        let receivers = self.links.iter().filter_map(|link| link.seat.as_ref()).map(|seat| {
            let digest = seat.receiver.tally().digest();
            format!("{:?} {digest}", seat.receiver)
        });
        let mut receivers: Vec<_> = receivers.collect();
        receivers.sort_unstable();
        format!("{:?} {receivers:?}", senders.collect::<Vec<_>>())
    }
}

impl Link {
    /// The agent is gone from it.
    fn let_go(&mut self) {
        self.attached = false;
        self.down.clear();
    }

    fn say(&mut self, word: Word) {
        if self.attached {
            self.down.push_back(Down::Word(word));
        }
    }

    /// The server is gone from it, with these last words.
    fn close(&mut self, code: CloseCode) {
        self.open = false;
        self.up.clear();
        if self.attached {
            self.down.push_back(Down::Close(code));
        }
    }

    fn encode(&self, server: &Server, model: &Model) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        out.extend_from_slice(&[self.agent as u8, u8::from(self.attached), u8::from(self.open)]);
        out.extend_from_slice(&[self.up.len() as u8, self.down.len() as u8, u8::from(self.seat.is_some())]);
        for frame in &self.up {
            match frame {
                Up::Finished => out.push(0),
                Up::Hello { oldest, next } => out.extend_from_slice(&[1, *oldest as u8, *next as u8]),
                Up::Records { first, count, altered } => {
                    out.extend_from_slice(&[2, *first as u8, *count as u8, u8::from(*altered)]);
                }
            }
        }
        for word in &self.down {
            match word {
                Down::Close(code) => {
                    out.push(0);
                    out.extend_from_slice(&code.number().to_le_bytes());
                }
                Down::Word(Word::Ack(next)) => out.extend_from_slice(&[1, *next as u8]),
                Down::Word(Word::FinishedAck(answer)) => {
                    out.push(2);
                    encode_answer(answer, &mut out);
                }
                Down::Word(Word::Welcome { attempt, next }) => out.extend_from_slice(&[3, *attempt as u8, *next as u8]),
            }
        }
        if let Some(seat) = &self.seat {
            seat.encode(&server.attempts, model, &mut out);
        }
        out
    }
}

/// What a socket reports that broke without a close frame (RFC 6455, section 7.1.5).
const ABNORMAL_CLOSURE: u16 = 1006;

pub(crate) fn welcome(attempt: u32, next: u64, window: u64, durable: Durable) -> ServerFrame {
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
