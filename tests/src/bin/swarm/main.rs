//! Thousands of agents in one process, to see what a server takes: memory, descriptors, and time to acknowledge a line.
//!
//! ```text
//! swarm serve LISTEN DATA BUILDS FILE [--tls]     a server that expects so many builds; FILE gets their names and tokens
//! swarm load --server URL --builds-file FILE --agents N --rate LINES_PER_SECOND --seconds S
//!            [--bomb] [--server-pid PID] [--data DIR]
//! ```
//!
//! Every agent is a build. It sends lines of 80 bytes at its rate, the agents spread evenly, and measures from the moment
//! a line is due to its acknowledgement, so an agent that cannot send counts too. With `--bomb` one more agent sends as
//! much as its window allows. Whoever is cut comes back as real agents do, with what was not acknowledged: kill the
//! server and start it again to see such a storm. `--server-pid` shows the server's memory and descriptors, and `--data`
//! compares what is stored with what was sent.

mod agent;
mod histogram;
mod serve;
mod socket;
mod stored;

use std::{
    error::Error,
    fs,
    io::{self, Write},
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use self::{
    agent::{Agent, Kind, Shared},
    socket::Target,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const USAGE: &str = "usage: swarm serve LISTEN DATA BUILDS FILE [--tls] | swarm load --server URL --builds-file FILE \
                     --agents N --rate LINES_PER_SECOND --seconds S [--bomb] [--server-pid PID] [--data DIR]";

/// How long all agents together may take to connect.
const CONNECT_LIMIT: Duration = Duration::from_secs(300);

/// How long the last lines may take to be acknowledged.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

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
    let texts: Vec<_> = arguments.iter().map(String::as_str).collect();
    match &*texts {
        ["serve", listen, data, builds, file, rest @ ..] => {
            serve::serve(listen.parse()?, data.into(), builds.parse()?, file.as_ref(), rest == ["--tls"]).await
        }
        ["load", options @ ..] => load(&Load::parse(options)?).await,
        _ => Err(USAGE.into()),
    }
}

/// What to do to a server.
#[derive(Default)]
struct Load {
    server: String,
    builds_file: String,
    agents: usize,
    rate: f64,
    seconds: u64,
    bomb: bool,
    server_pid: Option<u32>,
    data: Option<String>,
}

impl Load {
    fn parse(options: &[&str]) -> Result<Self> {
        let mut load = Self::default();
        let mut options = options.iter();
        while let Some(option) = options.next() {
            let mut value = || options.next().copied().ok_or_else(|| format!("{option} needs a value"));
            match *option {
                "--server" => load.server = value()?.to_owned(),
                "--builds-file" => load.builds_file = value()?.to_owned(),
                "--agents" => load.agents = value()?.parse()?,
                "--rate" => load.rate = value()?.parse()?,
                "--seconds" => load.seconds = value()?.parse()?,
                "--bomb" => load.bomb = true,
                "--server-pid" => load.server_pid = Some(value()?.parse()?),
                "--data" => load.data = Some(value()?.to_owned()),
                other => return Err(format!("unknown option {other}\n{USAGE}").into()),
            }
        }
        let is_complete = !load.server.is_empty() && !load.builds_file.is_empty() && load.agents > 0;
        if is_complete && load.rate > 0.0 && load.seconds > 0 { Ok(load) } else { Err(USAGE.into()) }
    }
}

async fn load(load: &Load) -> Result<()> {
    let target = Arc::new(Target::parse(&load.server)?);
    let shared = Arc::new(Shared::default());
    let count = load.agents + usize::from(load.bomb);
    let file = fs::read_to_string(&load.builds_file)?;
    let builds: Vec<_> = file.lines().filter_map(|line| line.split_once(' ')).take(count).collect();
    if builds.len() < count {
        return Err(format!("{} has {} builds, {count} are needed", load.builds_file, builds.len()).into());
    }
    let mut agents = JoinSet::new();
    let (start, interval) = (Instant::now(), Duration::from_secs_f64(1.0 / load.rate));
    for (at, (build, token)) in builds.iter().enumerate() {
        let phase = interval.mul_f64(at as f64 / load.agents as f64);
        let kind = if at < load.agents { Kind::Quiet { interval, phase } } else { Kind::Bomb };
        agents.spawn(Agent::new(build.parse()?, token, at, kind, target.clone(), shared.clone())?.run());
    }
    let all = shared.wait_connected(count);
    timeout(CONNECT_LIMIT, all).await.map_err(|_| format!("not connected: {:?}", shared.last_error()))?;
    let connected_in = start.elapsed();
    shared.start.cancel();
    sleep(Duration::from_secs(load.seconds)).await;
    let memory = load.server_pid.map(Usage::of);
    shared.stop.cancel();
    let mut sent = Vec::new();
    let ended = async {
        while let Some(agent) = agents.join_next().await {
            sent.push(agent?);
        }
        Ok::<_, tokio::task::JoinError>(())
    };
    timeout(DRAIN_LIMIT, ended).await.map_err(|_| "the last lines were not acknowledged")??;
    report(load, &shared, connected_in, memory)?;
    if let Some(data) = &load.data {
        stored::compare(data.as_ref(), &sent)?;
    }
    Ok(())
}

fn report(load: &Load, shared: &Shared, connected_in: Duration, usage: Option<Usage>) -> io::Result<()> {
    let mut out = io::stdout();
    let time = |at: f64| format!("{:.1} ms", shared.latency.quantile(at) as f64 / 1e3);
    let rows = [
        ("agents", format!("{}{}", load.agents, if load.bomb { " and a bomb" } else { "" })),
        ("connected in", format!("{:.1} s", connected_in.as_secs_f64())),
        ("lines acknowledged", shared.latency.count().to_string()),
        ("acknowledged p50", time(0.5)),
        ("acknowledged p99", time(0.99)),
        ("acknowledged max", time(1.0)),
        ("bomb", format!("{:.1} MB/s", shared.bombed.load(Ordering::Relaxed) as f64 / 1e6 / load.seconds as f64)),
        ("connections lost", shared.cuts.load(Ordering::Relaxed).to_string()),
        ("records forgotten by the server", shared.forgotten.load(Ordering::Relaxed).to_string()),
    ];
    for (name, value) in rows {
        writeln!(out, "{name:<34}{value:>16}")?;
    }
    if let Some(Usage { resident, peak, descriptors }) = usage {
        writeln!(
            out,
            "{:<34}{resident:>12} MiB\n{:<34}{peak:>12} MiB",
            "server, resident", "server, resident at most"
        )?;
        writeln!(out, "{:<34}{descriptors:>16}", "server, descriptors")?;
    }
    Ok(())
}

/// What a process has, proc(5).
struct Usage {
    resident: u64,
    peak: u64,
    descriptors: usize,
}

impl Usage {
    fn of(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let mib = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name))?.trim_start_matches(':').trim();
            value.split(' ').next()?.parse::<u64>().ok().map(|kib| kib / 1024)
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        Self { resident: mib("VmRSS").unwrap_or(0), peak: mib("VmHWM").unwrap_or(0), descriptors }
    }
}
