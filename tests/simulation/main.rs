//! The real agent and server on a simulated machine and network: one seed, one run.
//!
//! Everything that is not under test is simulated: time, chance, connections and disks. A run draws a plan from its seed
//! (settings, a command, faults), plays it, heals everything and lets [`oracle`] judge what is stored. The same seed
//! gives the same run.
//!
//! `PHONEHOME_SEEDS=1000000 cargo test --release -p phonehome-tests --test simulation` plays a million;
//! `PHONEHOME_SEED=7 cargo test -p phonehome-tests --test simulation one_seed -- --nocapture` plays one and shows all of
//! it.

#![expect(clippy::unwrap_used, reason = "a test that cannot set its scene up has failed")]
#![expect(clippy::print_stdout, reason = "what a batch has seen, and the trace of one run, are for people")]

mod chance;
mod disk;
mod network;
mod oracle;
mod plan;
mod sloppy;
mod trace;
mod world;

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::task::LocalSet;
use tracing::Level;

use self::{chance::Chance, plan::Plan, trace::Trace, world::World};

/// Runs of one call, unless told otherwise.
const SEEDS: u64 = 2_000;

/// What a run came to.
struct Outcome {
    result: Result<(), String>,
    seen: BTreeMap<&'static str, u64>,
    digest: String,
    lines: Vec<String>,
}

/// Rare paths that every batch must have taken: a batch that has not proves too little.
const RARE: [&str; 20] = [
    "agent killed at a disk operation",
    "attempt fenced",
    "connection superseded",
    "damage quarantined",
    "digest mismatch",
    "disk full",
    "disk room again",
    "drain",
    "duplicate refused",
    "gap",
    "hole",
    "late FINISHED",
    "lost",
    "resume asked for at FINISHED",
    "server killed at a disk operation",
    "spool taken over",
    "spool unusable",
    "storage failed",
    "torn tail",
    "two agents on one step",
];

#[test]
fn whatever_happens_every_byte_is_stored_once_or_said_to_be_missing() {
    let seeds = number("PHONEHOME_SEEDS").unwrap_or(SEEDS);
    let first = number("PHONEHOME_FIRST_SEED").unwrap_or(0);
    let next = AtomicU64::new(first);
    let batch = Mutex::new((BTreeMap::<&'static str, u64>::new(), Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let seed @ 0.. = next.fetch_add(1, Ordering::Relaxed)
                    && seed < first + seeds
                {
                    let outcome = play(seed, Level::DEBUG, false);
                    let mut batch = batch.lock().unwrap();
                    for (what, count) in outcome.seen {
                        *batch.0.entry(what).or_default() += count;
                    }
                    if let Err(wrong) = outcome.result {
                        batch.1.push(format!("seed {seed}: {wrong}"));
                    }
                }
            });
        }
    });
    let (seen, wrong) = batch.into_inner().unwrap();
    println!("seen in {seeds} runs: {seen:#?}");
    assert!(
        wrong.is_empty(),
        "{} of {seeds} runs went wrong:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(20)].join("\n")
    );
    let missed: Vec<_> = RARE.iter().filter(|what| !seen.contains_key(**what)).collect();
    assert!(missed.is_empty() || seeds < SEEDS, "never seen in {seeds} runs: {missed:?}");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..20 {
        let [one, other] = [(); 2].map(|()| play(seed, Level::TRACE, true));
        let differs = one.lines.iter().zip(&other.lines).find(|(one, other)| one != other);
        assert_eq!(one.digest, other.digest, "seed {seed}: {differs:#?}");
        assert!(one.lines.len() > 5, "seed {seed} has a trace");
    }
}

#[test]
fn one_seed() {
    let Some(seed) = number("PHONEHOME_SEED") else { return };
    let outcome = play(seed, Level::TRACE, true);
    println!("{}", outcome.lines.join("\n"));
    outcome.result.unwrap();
}

/// Plays one run.
fn play(seed: u64, level: Level, verbose: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let _log = tracing::subscriber::set_default(trace::Listener { level });
    let local = LocalSet::new();
    let chance = Chance::new(seed);
    let _entered = runtime.enter();
    let trace = Trace::start(verbose);
    let plan = Plan::draw(&chance.fork());
    let played = catch_unwind(AssertUnwindSafe(|| local.block_on(&runtime, World::new(plan, &chance).run())));
    let result = played.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.unwrap_or_else(|| panic.downcast_ref::<&str>().copied().unwrap_or("a panic").to_owned()))
    });
    drop(local);
    let trace = trace.borrow();
    Outcome { result, seen: trace.seen.clone(), digest: trace.digest(), lines: trace.lines.clone().unwrap_or_default() }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}
