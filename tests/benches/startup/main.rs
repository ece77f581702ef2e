//! What the agent costs beside a command: to start and to end, and in memory while output flows.
//!
//! `cargo bench -p phonehome-tests --bench startup [-- AGENT]` builds the static agent, or takes the one that is named, and
//! has it wrap `/bin/true` a thousand times, alone and with a server on loopback over TLS. Beside it stand other programs
//! made to be PID 1, in the same rounds: read the ratios to tini, they carry over to other machines, the figures do not.
//! CPU is that of all processes but the server, `/bin/true` included. Programs that are not installed are named. Then a
//! command writes, as fast as it can and as builds do, and the agent's largest resident set is shown.
//!
//! Exit status: 0 when memory is within its limit, and no ratio is beyond its own by more than a busy machine explains.

mod home;
mod memory;
mod processes;

use std::{error::Error, path::PathBuf, process::ExitCode, time::Duration};

use self::{
    home::Home,
    processes::{Used, installed, run, static_agent, used},
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Runs of a round, and rounds; every way has its turn in each, so that what else happens on the machine meets all of them.
const RUNS: u32 = 100;
const ROUNDS: usize = 10;

const COMMAND: &str = "/bin/true";

/// Others that wrap a command, and what they want before it.
const OTHERS: [(&str, &str); 3] = [(BASE, "--"), ("dumb-init", "--"), ("catatonit", "--")];

/// What all are compared with.
const BASE: &str = "tini";

/// Most CPU the agent may use, in tini's.
const MOST_ALONE: f64 = 1.0;
const MOST_OVER_TLS: f64 = 3.0;

/// What a busy machine may add before it counts as a failure.
const NOISE: f64 = 1.3;

/// One way to run the command.
struct Way<'a> {
    name: &'static str,
    command: Vec<PathBuf>,
    home: Option<&'a Home>,
    limit: Option<f64>,
    /// What one run of each round took.
    rounds: Vec<Round>,
}

/// What one run took, on average.
#[derive(Clone, Copy)]
struct Round {
    wall: Duration,
    used: Used,
}

fn main() -> Result<ExitCode> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if let [role, bytes, rate] = &arguments[..]
        && role == memory::WRITER
    {
        memory::write(bytes.parse()?, rate.parse()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let agent = match arguments.iter().find(|argument| !argument.starts_with('-')) {
        Some(named) => named.into(),
        None => static_agent()?,
    };
    let home = Home::open()?;
    let is_quick = compare(&agent, &home)?;
    let is_small = memory::measure(&agent, &home)?;
    home.close();
    Ok(if is_quick && is_small { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs all ways in turns. Says whether those with a limit keep to it.
fn compare(agent: &PathBuf, home: &Home) -> Result<bool> {
    let mut ways = ways(agent, home);
    for _ in 0..ROUNDS {
        ways.iter_mut().try_for_each(Way::round)?;
    }
    say(&format!("\n{COMMAND}, {} runs each in {ROUNDS} rounds, medians", RUNS as usize * ROUNDS));
    say(&format!(
        "{:<22} {:>8} {:>8} {:>12} {:>8} {:>8}  {}",
        "", "wall us", "CPU us", "page faults", "x wall", "x CPU", "x CPU allowed"
    ));
    let base = ways.iter().find(|way| way.name == BASE).map(Way::median);
    let are_within = ways.iter().map(|way| way.report(base)).collect::<Vec<_>>();
    for (name, _) in OTHERS.iter().filter(|(name, _)| installed(name).is_none()) {
        say(&format!("{name:<22} not installed"));
    }
    Ok(are_within.iter().all(|is_within| *is_within))
}

fn ways<'a>(agent: &PathBuf, home: &'a Home) -> Vec<Way<'a>> {
    let way = |name, wrapper: &[&PathBuf], home, limit| {
        let command = wrapper.iter().map(|word| (*word).clone()).chain([COMMAND.into()]).collect();
        Way { name, command, home, limit, rounds: Vec::new() }
    };
    let mut ways = vec![way("nothing", &[], None, None)];
    let others = OTHERS.into_iter().filter_map(|(name, end)| Some((name, installed(name)?, end)));
    ways.extend(others.map(|(name, program, end)| way(name, &[&program, &end.into()], None, None)));
    let end = "--".into();
    ways.push(way("agent, no server", &[agent, &end], None, Some(MOST_ALONE)));
    ways.push(way("agent, over TLS", &[agent, &end], Some(home), Some(MOST_OVER_TLS)));
    ways
}

impl Way<'_> {
    fn round(&mut self) -> Result<()> {
        let before = used();
        let mut wall = Duration::ZERO;
        for _ in 0..RUNS {
            let visit = self.home.map(Home::expect).transpose()?;
            let variables = visit.as_ref().map(|visit| visit.variables()).unwrap_or_default();
            wall += run(&self.command, &variables)?;
            visit.map_or(Ok(()), |visit| visit.succeeded())?;
        }
        self.rounds.push(Round { wall: wall / RUNS, used: used().since(before).per_run(RUNS) });
        Ok(())
    }

    fn median(&self) -> Round {
        let median = |value: fn(&Round) -> Duration| {
            let mut values: Vec<_> = self.rounds.iter().map(value).collect();
            values.sort();
            values[values.len() / 2]
        };
        let faults = self.rounds.first().map_or(0, |round| round.used.faults);
        Round { wall: median(|round| round.wall), used: Used { cpu: median(|round| round.used.cpu), faults } }
    }

    /// Prints the result. Says whether it is within the limit; without tini nobody knows.
    fn report(&self, base: Option<Round>) -> bool {
        let Round { wall, used } = self.median();
        let figures = format!("{:>8} {:>8} {:>12}", wall.as_micros(), used.cpu.as_micros(), used.faults);
        let Some(base) = base else {
            say(&format!("{:<22} {figures}", self.name));
            return true;
        };
        let cpu = used.cpu.as_secs_f64() / base.used.cpu.as_secs_f64();
        let ratios = format!("{:>8.2} {cpu:>8.2}", wall.as_secs_f64() / base.wall.as_secs_f64());
        let is_within = self.limit.is_none_or(|limit| cpu <= limit);
        let limit = self.limit.map_or(String::new(), |limit| format!("  {limit:.2}{}", verdict(is_within)));
        say(&format!("{:<22} {figures} {ratios}{limit}", self.name));
        self.limit.is_none_or(|limit| cpu <= limit * NOISE)
    }
}

/// What stands behind a limit.
fn verdict(is_within: bool) -> &'static str {
    if is_within { "" } else { " EXCEEDED" }
}

#[expect(clippy::print_stdout, reason = "the report is what this program is for")]
fn say(line: &str) {
    println!("{line}");
}
