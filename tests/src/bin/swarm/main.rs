//! Thousands of agents in one process, to see what a server takes: memory, descriptors, processor time, and the time to
//! acknowledge a line.
//!
//! ```text
//! swarm --program FILE --data DIR [options] [-- SERVER OPTIONS]   starts `FILE serve` itself
//! swarm --server URL [options]                                    loads one that runs; PHONEHOME_ADMIN_TOKEN is its token
//!
//! --agents N     how many (1000)              --bomb             one more agent sends as much as its window allows
//! --rate R       lines a second of each (1)   --finish           every agent tells its end, and waits for the answer
//! --seconds S    how long (15)                --kill             kill the server half way, start it again (--program)
//! --tls          with TLS (--program)         --data DIR         compare what is stored with what was sent
//! --server-pid PID  whose memory to show      --max-resident MIB, --max-p99 MS, --max-back S   fail beyond
//! ```
//!
//! Every agent is a build of its own, which is declared over HTTP. It sends lines of 80 bytes at its rate, the agents
//! spread evenly, and measures from the moment a line is due to its acknowledgement, so an agent that cannot send counts
//! too. Whoever is cut comes back as real agents do, with what was not acknowledged.

mod agent;
mod api;
mod histogram;
mod options;
mod program;
mod report;
mod socket;
mod stored;

use std::{
    error::Error,
    io::{self, Write},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use self::{
    agent::{Agent, Kind, Sent, Shared},
    options::Options,
    program::{Program, Usage},
    report::{Phase, Report},
    socket::Target,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// How long all agents together may take to connect.
const CONNECT_LIMIT: Duration = Duration::from_secs(300);

/// How long the last lines, and the ends, may take to be acknowledged.
const DRAIN_LIMIT: Duration = Duration::from_secs(120);

/// How long what has gathered while the server was away may take.
const CALM_LIMIT: Duration = Duration::from_secs(60);

/// What 99 of 100 lines take at most when nothing is wrong, microseconds.
const CALM: u64 = 1_000_000;

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            drop(writeln!(io::stderr(), "swarm: {error}")); // nobody may be reading
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    // A descriptor per agent.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let options = Options::parse(&arguments)?;
    let mut program = options.program.as_ref().map(|program| Program::new(program, &options)).transpose()?;
    if let Some(program) = &mut program {
        program.start().await?;
    }
    let report = load(&options, program.as_mut()).await?;
    report.print(&mut io::stdout())?;
    report.judge(&options)
}

/// Declares the builds, sets the agents on the server, and kills that in between if that is wanted.
async fn load(options: &Options, mut program: Option<&mut Program>) -> Result<Report> {
    let (url, token) = match &program {
        Some(program) => (program.url(), program.token().to_owned()),
        None => (options.server.clone(), std::env::var("PHONEHOME_ADMIN_TOKEN")?),
    };
    let target = Arc::new(Target::parse(&url)?);
    let mut report = Report::default();
    let began = Instant::now();
    let builds = api::declare(&target, &token, options.agents + usize::from(options.bomb)).await?;
    report.declared_in = began.elapsed();
    let shared = Arc::new(Shared::new(builds.len(), options.finish));
    let began = Instant::now();
    let mut agents = set_out(options, builds, &target, &shared)?;
    let all = timeout(CONNECT_LIMIT, shared.all_welcomed()).await;
    all.map_err(|_| format!("not connected: {:?}", shared.last_error()))?;
    report.connected_in = began.elapsed();

    let pid = |program: &Option<&mut Program>| program.as_ref().map(|program| program.pid()).or(options.server_pid);
    report.calm = Some(phase(options, &shared, pid(&program)).await);
    if options.kill
        && let Some(program) = program.as_mut()
    {
        let killed = Instant::now();
        program.kill().await?;
        shared.begin_again();
        program.start().await?;
        timeout(CONNECT_LIMIT, shared.all_welcomed()).await.map_err(|_| "they do not come back")?;
        report.back_in = Some(killed.elapsed());
        report.calm_in = timeout(CALM_LIMIT, calm_again(&shared)).await.ok().map(|()| killed.elapsed());
        report.second = Some(phase(options, &shared, Some(program.pid())).await);
    }
    shared.stop.cancel();
    let began = Instant::now();
    let sent = timeout(DRAIN_LIMIT, ended(&mut agents)).await.map_err(|_| "the last lines were not acknowledged")??;
    report.drained_in = began.elapsed();
    report.note(options, &shared);
    report.last = pid(&program).map(Usage::of);
    if let Some(data) = &options.data {
        report.stored = Some(stored::compare(data, &sent)?);
    }
    Ok(report)
}

fn set_out(
    options: &Options,
    builds: Vec<api::Declared>,
    target: &Arc<Target>,
    shared: &Arc<Shared>,
) -> Result<JoinSet<Sent>> {
    let mut agents = JoinSet::new();
    let interval = Duration::from_secs_f64(1.0 / options.rate);
    for (at, build) in builds.into_iter().enumerate() {
        let phase = interval.mul_f64(at as f64 / options.agents as f64);
        let kind = if at < options.agents { Kind::Quiet { interval, phase } } else { Kind::Bomb };
        agents.spawn(Agent::new(build, at, kind, target.clone(), shared.clone()).run());
    }
    Ok(agents)
}

/// Lines for a while, and what they took.
async fn phase(options: &Options, shared: &Shared, pid: Option<u32>) -> Phase {
    shared.start.cancel();
    drop(shared.take_latency());
    let (before, seconds) = (pid.map(Usage::of), options.seconds);
    sleep(Duration::from_secs(seconds)).await;
    let after = pid.map(Usage::of);
    let busy = before.zip(after.as_ref()).map(|(before, after)| (after.busy - before.busy) / seconds as f64);
    Phase { latency: shared.take_latency(), busy, usage: after }
}

/// Waits until lines are acknowledged in time again.
async fn calm_again(shared: &Shared) {
    loop {
        drop(shared.take_latency());
        sleep(Duration::from_secs(1)).await;
        if (1..CALM).contains(&shared.take_latency().quantile(0.99)) {
            return;
        }
    }
}

async fn ended(agents: &mut JoinSet<Sent>) -> Result<Vec<Sent>> {
    let mut sent = Vec::new();
    while let Some(agent) = agents.join_next().await {
        sent.push(agent?);
    }
    Ok(sent)
}
