//! One run: a server, agents and what happens to them, all from one seed.

use std::{
    cell::RefCell,
    path::PathBuf,
    rc::Rc,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::BytesMut;
use phonehome_agent::{
    Delivery,
    config::{Address, Home, LabelsConfig, Secret, SpoolConfig, Trust},
    line::Line,
};
use phonehome_env::{Env, Nature, Workers};
use phonehome_proto::{
    codec::binary::HEADROOM,
    frame::{End, Stream},
    id::ProducerId,
};
use phonehome_server::{Clocks, Config, Durability, Expected, Server};
use serde_json::Value;
use tokio::{
    task::{JoinHandle, spawn_local},
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    chance::{Chance, SimNature},
    disk::{Mount, SimDisk},
    network::SimNetwork,
    oracle::{self, Reader},
    plan::{Fault, Plan, Script},
    sloppy::Sloppy,
    trace::{note, saw},
};

/// Everything of a run.
pub(crate) struct World {
    plan: Plan,
    chance: Chance,
    network: SimNetwork,
    server_disk: SimDisk,
    server: Option<Running>,
    server_returns: Instant,
    slow: Arc<Mutex<Slow>>,
    agents: Vec<Agent>,
    /// What ends by itself, and when.
    later: Vec<(Instant, Later)>,
    /// Verdicts as they were told, by any server.
    verdicts: Vec<Value>,
    readers: Vec<Rc<RefCell<Reader>>>,
    history: History,
}

/// What happened that no promise survives.
#[derive(Debug, Default)]
pub(crate) struct History {
    /// The server's machine crashed although acknowledged did not mean synced: anything may be gone.
    pub(crate) unsynced: bool,
    /// A file of the server's was damaged.
    pub(crate) damaged: bool,
    /// A spool was damaged, or could not be written for a while.
    pub(crate) spool_failed: bool,
}

#[derive(Debug, Default)]
struct Slow {
    delay: Duration,
    until: Option<Instant>,
}

#[derive(Debug)]
enum Later {
    AgentStarts(SimDisk),
    AgentHasRoom(SimDisk),
    ServerHasRoom,
}

/// A server process.
struct Running {
    server: Rc<RefCell<Option<Server>>>,
    mount: Mount,
    tasks: Vec<JoinHandle<()>>,
    verdict: Rc<RefCell<Option<Value>>>,
}

/// A life of an agent.
pub(crate) struct Agent {
    pub(crate) life: u64,
    pub(crate) source: Rc<RefCell<Source>>,
    pub(crate) disk: SimDisk,
    nature: Arc<AgentNature>,
    mount: Mount,
    task: JoinHandle<()>,
}

/// What a command wrote, and what became of it.
#[derive(Debug, Default)]
pub(crate) struct Source {
    /// Bytes given to the recorder, by stream.
    pub(crate) written: [Vec<u8>; 2],
    /// When how much of them was.
    pub(crate) stamps: Vec<(Instant, [usize; 2])>,
    /// The exit code, once the command has ended.
    pub(crate) ended: Option<u8>,
    /// What the agent said at its end.
    pub(crate) delivery: Option<Option<Delivery>>,
    pub(crate) killed: Option<Instant>,
    /// Whether its spool went with it.
    pub(crate) wiped: bool,
    /// The record that is sent wrong the first time, and whether it was.
    pub(crate) damaged: Option<u64>,
    pub(crate) is_damaged: bool,
}

impl Source {
    /// The command writes something.
    pub(crate) fn note(&mut self, stream: Stream, bytes: &[u8]) {
        self.written[usize::from(stream.number())].extend_from_slice(bytes);
        let len = self.written.each_ref().map(Vec::len);
        self.stamps.push((Instant::now(), len));
    }
}

/// What a command writes: no two blocks of a run begin alike.
pub(crate) fn payload(life: u64, number: usize, len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (life.wrapping_mul(89) ^ number as u64 ^ (at >> 3)) as u8).collect()
}

/// An agent's chance, which remembers what its first draw was: the producer id.
#[derive(Debug)]
struct AgentNature {
    inner: SimNature,
    producer: Mutex<Option<[u8; 16]>>,
}

impl Nature for AgentNature {
    fn fill(&self, bytes: &mut [u8]) -> std::io::Result<()> {
        self.inner.fill(bytes)?;
        if let Ok(id) = <[u8; 16]>::try_from(&*bytes) {
            self.producer.lock().unwrap().get_or_insert(id);
        }
        Ok(())
    }

    fn now(&self) -> u64 {
        self.inner.now()
    }
}

impl Agent {
    pub(crate) fn is_delivered(&self) -> bool {
        matches!(self.source.borrow().delivery, Some(Some(Delivery::Complete | Delivery::Incomplete(_))))
    }

    pub(crate) fn producer(&self) -> Option<String> {
        self.nature.producer.lock().unwrap().map(|id| ProducerId(id).to_string())
    }
}

pub(crate) const DATA: &str = "/data";
pub(crate) const BUILD: &str = "b";
pub(crate) const TOKEN: &str = "secret";

/// The longest a run takes once everything works again: more than the longest linger, backoff and heartbeat.
const SETTLE: Duration = Duration::from_secs(900);

/// How long a lost agent is waited for: longer than any planned absence.
const LOST: Duration = Duration::from_secs(300);

impl World {
    pub(crate) fn new(plan: Plan, chance: &Chance) -> Self {
        Self {
            network: SimNetwork::new(chance.fork()),
            server_disk: SimDisk::new(chance.fork()),
            chance: chance.fork(),
            plan,
            server: None,
            server_returns: Instant::now(),
            slow: Arc::default(),
            agents: Vec::new(),
            later: Vec::new(),
            verdicts: Vec::new(),
            readers: Vec::new(),
            history: History::default(),
        }
    }

    /// Plays the plan, heals everything, waits for the end and judges.
    pub(crate) async fn run(mut self) -> Result<(), String> {
        note(&format!("{:?}", self.plan));
        self.start_server();
        self.start_agent(SimDisk::new(self.chance.fork()));
        let start = Instant::now();
        for (at, fault) in self.plan.faults.clone() {
            self.pass_until(start + at).await;
            self.strike(fault).await;
        }
        self.pass_until(start + self.plan.faults_end).await;
        self.heal();
        let deadline = Instant::now() + SETTLE;
        while !self.is_settled() && Instant::now() < deadline {
            self.pass_until(Instant::now() + Duration::from_secs(1)).await;
        }
        // Readers see the rest.
        sleep(Duration::from_secs(1)).await;
        self.stop_server();
        oracle::judge(&self.plan, &self.history, &self.agents, &self.verdicts, &self.readers, &self.server_disk)
    }

    /// Lets time pass, and brings back what is to come back.
    async fn pass_until(&mut self, until: Instant) {
        loop {
            self.look_after_server();
            self.look_after_agents();
            let now = Instant::now();
            if now >= until {
                return;
            }
            sleep_until(until.min(now + Duration::from_millis(50))).await;
        }
    }

    fn look_after_server(&mut self) {
        if self.server_disk.faults(|faults| std::mem::take(&mut faults.burnt)) {
            saw("server killed at a disk operation");
            note("the server dies at a disk operation");
            let power = self.chance.is(50);
            self.crash_server(power, self.chance.millis(0, 5_000));
        }
        if let Some(verdict) = self.server.as_ref().and_then(|running| running.verdict.borrow_mut().take()) {
            note(&format!("verdict: {verdict}"));
            self.verdicts.push(verdict);
        }
        if self.server.is_none() && self.server_returns <= Instant::now() && self.verdicts.is_empty() {
            self.start_server();
        }
    }

    fn look_after_agents(&mut self) {
        for at in 0..self.agents.len() {
            if self.agents[at].disk.faults(|faults| std::mem::take(&mut faults.burnt)) {
                saw("agent killed at a disk operation");
                note("an agent dies at a disk operation");
                self.kill_agent(at, true, self.chance.millis(0, 5_000));
            }
        }
        let now = Instant::now();
        let due = self.later.extract_if(.., |(at, _)| *at <= now).collect::<Vec<_>>();
        for (_, later) in due {
            self.happen(later);
        }
    }

    fn happen(&mut self, later: Later) {
        match later {
            Later::AgentStarts(disk) => self.start_agent(disk),
            Later::AgentHasRoom(disk) => disk.faults(|faults| faults.room = None),
            Later::ServerHasRoom => self.server_disk.faults(|faults| faults.room = None),
        }
    }

    fn is_settled(&self) -> bool {
        !self.verdicts.is_empty() && self.later.is_empty() && self.agents.iter().all(|agent| agent.task.is_finished())
    }

    /// From now on nothing goes wrong any more.
    fn heal(&mut self) {
        note("everything works again");
        self.server_disk.faults(|faults| *faults = crate::disk::Faults { burnt: faults.burnt, ..Default::default() });
        for agent in &self.agents {
            agent.disk.faults(|faults| *faults = crate::disk::Faults { burnt: faults.burnt, ..Default::default() });
        }
        *self.slow.lock().unwrap() = Slow::default();
        self.server_returns = self.server_returns.min(Instant::now());
        for (at, _) in &mut self.later {
            *at = Instant::now();
        }
    }

    async fn strike(&mut self, fault: Fault) {
        note(&format!("{fault:?}"));
        let alive: Vec<_> = (0..self.agents.len()).filter(|at| !self.agents[*at].task.is_finished()).collect();
        let victim = alive.get(self.chance.below(alive.len() as u64) as usize).copied();
        let disk = victim.map(|at| self.agents[at].disk.clone());
        match fault {
            Fault::Cut { quietly } => self.network.cut(quietly),
            Fault::Halve { told } => self.network.halve(told),
            Fault::Hold(time) => self.network.hold(time),
            Fault::Partition(time) => self.network.partition(time),
            Fault::KillServer(down) => self.crash_server(false, down),
            Fault::PowerOff(down) => self.crash_server(true, down),
            Fault::ServerFuse(operations) => self.server_disk.faults(|faults| faults.fuse = Some(operations)),
            Fault::ShutDown(down) => self.shut_down(down).await,
            Fault::KillAgent { keep_spool, down } => {
                if let Some(at) = victim {
                    self.kill_agent(at, keep_spool, down);
                }
            }
            Fault::AgentFuse(operations) => {
                disk.into_iter().for_each(|disk| disk.faults(|faults| faults.fuse = Some(operations)));
            }
            Fault::ServerDiskFull(time) => {
                let room = self.chance.below(100_000);
                self.server_disk.faults(|faults| faults.room = Some(room));
                self.later.push((Instant::now() + time, Later::ServerHasRoom));
            }
            Fault::ServerDiskErrors(count) => self.server_disk.faults(|faults| faults.errors = count),
            Fault::ServerSyncErrors(count) => self.server_disk.faults(|faults| faults.sync_errors = count),
            Fault::AgentDiskFull(time) => {
                if let Some(disk) = disk {
                    self.history.spool_failed = true;
                    let room = self.chance.below(100_000);
                    disk.faults(|faults| faults.room = Some(room));
                    self.later.push((Instant::now() + time, Later::AgentHasRoom(disk)));
                }
            }
            Fault::AgentDiskErrors(count) => {
                self.history.spool_failed = true;
                disk.into_iter().for_each(|disk| disk.faults(|faults| faults.errors = count));
            }
            Fault::Rot if self.verdicts.is_empty() => self.rot(),
            Fault::Rot => {} // nobody opens those files any more
            Fault::SpoolRot => {
                let hit = disk.and_then(|disk| disk.rot(|name| name.ends_with(".records")));
                if let Some((path, position)) = hit {
                    note(&format!("a bit flips at {position} of {}", path.display()));
                    self.history.spool_failed = true;
                }
            }
            Fault::SlowDisk { delay, lasts } => {
                *self.slow.lock().unwrap() = Slow { delay, until: Some(Instant::now() + lasts) };
            }
            Fault::ClockJump(micros) => {
                victim.into_iter().for_each(|at| self.agents[at].nature.inner.jump(micros));
            }
            Fault::SecondAgent => {
                saw("two agents on one step");
                self.start_agent(SimDisk::new(self.chance.fork()));
            }
        }
    }

    /// A bit flips in a file of the server's, while it is down.
    fn rot(&mut self) {
        self.crash_server(false, Duration::from_millis(10));
        let file = self.chance.pick(&["log", "index", "events"]);
        if let Some((path, position)) = self.server_disk.rot(|name| name == file) {
            note(&format!("a bit flips at {position} of {}", path.display()));
            self.history.damaged = true;
        }
    }

    fn crash_server(&mut self, power: bool, down: Duration) {
        self.stop_server();
        self.server_returns = Instant::now() + down;
        if power {
            self.server_disk.lose_power();
            self.history.unsynced |= self.plan.durability == Durability::Os;
        }
    }

    /// Ends the server's process where it stands.
    fn stop_server(&mut self) {
        let Some(running) = self.server.take() else { return };
        running.mount.kill();
        self.network.stop_listening();
        running.tasks.iter().for_each(JoinHandle::abort);
        drop(running.server.borrow_mut().take());
    }

    async fn shut_down(&mut self, down: Duration) {
        let Some(running) = self.server.take() else { return };
        self.network.stop_listening();
        let server = running.server.borrow_mut().take();
        if let Some(server) = server {
            server.shutdown(Duration::from_secs(1)).await;
        }
        running.tasks.iter().for_each(JoinHandle::abort);
        running.mount.kill();
        self.server_returns = Instant::now() + down;
    }

    fn kill_agent(&mut self, at: usize, keep_spool: bool, down: Duration) {
        let agent = &self.agents[at];
        agent.mount.kill();
        agent.task.abort();
        let mut source = agent.source.borrow_mut();
        if source.delivery.is_some() || source.killed.is_some() {
            return;
        }
        source.killed = Some(Instant::now());
        if !keep_spool {
            agent.disk.wipe();
            source.wiped = true;
        }
        self.later.push((Instant::now() + down, Later::AgentStarts(agent.disk.clone())));
    }

    fn start_server(&mut self) {
        let mount = self.server_disk.mount();
        let slow = self.slow.clone();
        let delay = move || {
            let slow = slow.lock().unwrap();
            if slow.until.is_some_and(|until| until > Instant::now()) { slow.delay } else { Duration::ZERO }
        };
        let env = Env {
            disk: Arc::new(mount.clone()),
            network: Arc::new(self.network.clone()),
            nature: Arc::new(SimNature::new(self.chance.fork())),
            workers: Workers::Tasks(Arc::new(delay)),
        };
        let config = Config {
            listen: ([127, 0, 0, 1], 0).into(),
            tls: false,
            data: PathBuf::from(DATA),
            durability: self.plan.durability,
        };
        let clocks =
            Clocks { connect: Some(LOST), idle: None, lost: Some(LOST), total: None, grace: Duration::from_secs(5) };
        let steps = vec!["main".parse().unwrap()];
        let expected = Expected { id: BUILD.parse().unwrap(), steps, clocks, token: Some(TOKEN.into()), rate: None };
        let started = Server::deaf(env, &config).map_err(|error| format!("{error:?}")).and_then(|server| {
            let build = server.expect(expected).map_err(|error| format!("{error:?}"))?;
            Ok((server, build))
        });
        let (server, build) = match started {
            Ok(started) => started,
            Err(why) => {
                note(&format!("the server does not start: {why}"));
                mount.kill();
                self.read_verdict();
                self.server_returns = Instant::now() + Duration::from_secs(1);
                return;
            }
        };
        note("the server starts");
        let server = Rc::new(RefCell::new(Some(server)));
        let verdict = Rc::new(RefCell::new(None));
        let reader = Rc::new(RefCell::new(Reader::default()));
        self.readers.push(reader.clone());
        let mut listener = self.network.listen();
        let (serving, told, log) = (server.clone(), verdict.clone(), build.log());
        let tasks = vec![
            spawn_local(async move {
                while let Some(stream) = listener.recv().await {
                    if let Some(server) = serving.borrow().as_ref() {
                        server.serve(stream);
                    }
                }
            }),
            spawn_local(oracle::read(log, reader)),
            spawn_local(async move {
                let verdict = build.verdict().await;
                told.replace(Some(serde_json::to_value(verdict).unwrap()));
            }),
        ];
        self.server = Some(Running { server, mount, tasks, verdict });
    }

    /// A server that died right after it had stored the verdict could not tell it.
    fn read_verdict(&mut self) {
        if let Some(verdict) = oracle::stored_verdict(&self.server_disk) {
            saw("verdict stored but not told");
            self.verdicts.push(verdict);
        }
    }

    fn start_agent(&mut self, disk: SimDisk) {
        let life = self.agents.len() as u64 + 1;
        note(&format!("agent {life} starts"));
        let mount = disk.mount();
        let nature = SimNature::new(self.chance.fork());
        let nature = Arc::new(AgentNature { inner: nature, producer: Mutex::default() });
        let env = Env {
            disk: Arc::new(mount.clone()),
            network: Arc::new(self.network.clone()),
            nature: nature.clone(),
            workers: Workers::Tasks(Arc::new(|| Duration::ZERO)),
        };
        let source = Rc::new(RefCell::new(Source::default()));
        let script = self.plan.script(&self.chance.fork());
        let task = if self.plan.sloppy && life == 1 {
            spawn_local(Sloppy::new(life, env, self.chance.fork(), script, source.clone()).run())
        } else {
            spawn_local(live(life, env, spool(&self.plan), script, self.plan.linger, source.clone()))
        };
        self.agents.push(Agent { life, source, disk, nature, mount, task });
    }
}

fn spool(plan: &Plan) -> SpoolConfig {
    SpoolConfig {
        memory: plan.memory,
        dir: plan.spool.then(|| PathBuf::from("/spool")),
        limit: plan.spool_limit,
        overflow: plan.overflow,
        offline_limit: plan.offline_limit,
        on_offline: plan.on_offline,
    }
}

fn home() -> Home {
    let endpoint = "ws://server:80/v1/agent".parse().unwrap();
    Home {
        address: Address { tls: false, host: "server".into(), port: 80, endpoint, proxy: None },
        build: BUILD.parse().unwrap(),
        step: "main".parse().unwrap(),
        token: Some(Secret::new(TOKEN.into())),
        trust: Trust::default(),
        labels: LabelsConfig::default(),
    }
}

/// An agent with a command that writes by a script.
async fn live(life: u64, env: Env, spool: SpoolConfig, script: Script, linger: Duration, source: Rc<RefCell<Source>>) {
    let (mut line, mut recorder) = Line::open(&env, home(), &spool).await.expect("chance is there");
    for (number, (pause, stream, len)) in script.blocks.into_iter().enumerate() {
        sleep(pause).await;
        recorder.ready().await;
        let mut block = BytesMut::zeroed(HEADROOM);
        block.extend_from_slice(&payload(life, number, len));
        source.borrow_mut().note(stream, &block[HEADROOM..]);
        recorder.record(stream, block);
    }
    source.borrow_mut().ended = Some(script.code);
    recorder.finish(End::Exited(script.code), None);
    drop(timeout(linger, line.delivered()).await); // the delivery says how it went
    let delivery = line.close().await;
    note(&format!("agent {life} ends: {delivery:?}"));
    source.borrow_mut().delivery = Some(delivery);
}
