//! Exactly once, shown by exhaustion: the real state machines in a world so small that every state it can get into is
//! looked at.
//!
//! There are one or two agents of one step with one to three records each, a server that writes first and syncs later,
//! and a number of cuts and crashes that strike at any time. Where `exactly_once.rs` walks far along paths chosen at
//! random, this takes all paths, but short ones. [`Broken`] is what none of them may lead to; and as no path without
//! faults goes in a circle, each one comes to its end, where the newest attempt must be delivered. By default there are
//! two cuts and one crash, and one cut and two crashes. Two of each, with one more record, take longer:
//!
//! ```text
//! PHONEHOME_MODEL=full cargo test --release -p phonehome-proto --test model
//! ```
//!
//! That the search would find something is shown by taking the rules of the wire out, one [`Rule`] at a time. Sizes,
//! heartbeat and backoff (rules 5, 6 and the times of 7) have no place in a world without bytes and clocks.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, wherever that happens")]
#![expect(
    clippy::print_stdout,
    reason = "how much was searched is worth reading when a test fails or is asked to tell"
)]

mod agent;
mod rules;
mod search;
mod server;
mod world;

use phonehome_proto::{frame::Durable, limits::RECORD_COST};

use crate::{
    agent::Script,
    rules::{Broken, Rule, Situation},
    search::{search, search_twice_over},
    world::{Faults, Model, Windows},
};

#[test]
fn two_cuts_and_a_crash() {
    let (model, least) = if is_full() { (pair([2, 2], 2, 2), 4_000_000) } else { (pair([2, 1], 2, 1), 700_000) };
    passes(&model, least, &ALWAYS_MET);
}

#[test]
fn a_cut_and_two_crashes() {
    passes(&pair([2, 1], 1, 2), 200_000, &ALWAYS_MET);
}

#[test]
fn one_agent_with_a_small_window() {
    let met =
        [Situation::WindowWasFull, Situation::Batch, Situation::DuplicateAndNew, Situation::AckForEarlierConnection];
    passes(&alone(Script::plain(3), 2, 2), 20_000, &met);
}

#[test]
fn a_server_that_loses_what_it_acknowledged() {
    let met = [Situation::CrashLostDurable, Situation::Hole, Situation::Incomplete];
    passes(&forgetful(), 150_000, &met);
}

#[test]
fn a_link_that_loses_messages() {
    passes(&lossy(), 1000, &[Situation::OutOfOrder, Situation::ResumeAtFinished]);
}

#[test]
fn an_agent_that_changes_what_it_sends() {
    let met = [
        Situation::Conflict,
        Situation::FencedRewind,
        Situation::Incomplete,
        Situation::Mended,
        Situation::NothingLeft,
        Situation::Rewound,
        Situation::RewoundDurable,
        Situation::RewoundPart,
    ];
    let faults = Faults { alterations: 2, cuts: 2, crashes: 1, ..Faults::default() };
    let (model, least) = if is_full() { (Model { faults, ..altering() }, 180_000) } else { (altering(), 3000) };
    passes(&model, least, &met);
}

#[test]
fn an_agent_whose_end_is_another() {
    passes(&mistaken(), 2500, &[Situation::DiffersAgain, Situation::NothingLeft, Situation::Rewound]);
}

#[test]
fn an_agent_with_little_memory() {
    let met = [
        Situation::AckOverSpilled,
        Situation::PushedBehindSpilled,
        Situation::Recovered,
        Situation::Restored,
        Situation::Spilled,
    ];
    let faults = Faults { spills: 2, deaths: 1, cuts: 2, crashes: 1, ..Faults::default() };
    let (model, least) = if is_full() { (Model { faults, ..spilling() }, 120_000) } else { (spilling(), 3000) };
    passes(&model, least, &met);
}

#[test]
fn an_agent_that_drops_bytes() {
    passes(&dropping(true), 1500, &[Situation::Incomplete]);
}

/// The states are told apart by an account beside the state machines. It must not leave anything out.
#[test]
fn the_fingerprint_hides_nothing() {
    let forgetful = Model { durable: Durable::Memory, ..alone(Script::plain(2), 1, 1) };
    let honest = [pair([1, 1], 1, 0), pair([2, 1], 0, 1), alone(Script::plain(3), 1, 1), spilling()];
    for model in honest.into_iter().chain([forgetful, altering(), mistaken()]) {
        let report = search_twice_over(&model).unwrap();
        assert!(report.transitions > 2 * report.states, "few states were met twice");
    }
}

#[test]
fn no_rule_can_be_left_out() {
    let mut unnoticed = Vec::new();
    for Removal(rule, expected, model) in REMOVALS {
        match search(&Model { without: Some(rule), ..model() }) {
            Ok(report) => unnoticed.push(format!("{rule:?}: nothing is wrong with {} states", report.states)),
            Err(found) => {
                println!("without {rule:?}: {:?} after {} actions", found.broken, found.trace.len());
                if found.broken != expected {
                    unnoticed.push(format!("{rule:?}: {expected:?} was expected, {found:?}"));
                }
            }
        }
    }
    assert!(unnoticed.is_empty(), "{}", unnoticed.join("\n"));
}

/// A rule, what the search finds without it, and in which world.
struct Removal(Rule, Broken, fn() -> Model);

/// With the rule in place there is nothing to be found: each of these worlds is searched above, or is part of one that
/// is.
const REMOVALS: [Removal; 31] = [
    Removal(Rule::AboveNextIsRefused, Broken::SilentHole, lossy),
    Removal(Rule::ConflictIsFatal, Broken::ConflictPassed, altering),
    Removal(Rule::DuplicateIsIgnored, Broken::NotAsProduced, cut),
    Removal(Rule::ResumeFromDurable, Broken::ResumePoint, cut),
    Removal(Rule::AckIsDurable, Broken::EmptyPromise, calm),
    Removal(Rule::AnswerIsDurable, Broken::Forgotten, calm),
    Removal(Rule::FinishedIsLast, Broken::EarlyEnd, lossy),
    Removal(Rule::FinishedIsIdempotent, Broken::AfterEnd, cut),
    Removal(Rule::FinishedIsSaidAgain, Broken::DeadEnd, cut),
    Removal(Rule::HoldUntilAcknowledged, Broken::Forgotten, calm),
    Removal(Rule::AttemptIsDurable, Broken::Fenced, crash),
    Removal(Rule::FinishedNeedsLease, Broken::Fenced, calm),
    Removal(Rule::OlderConnectionIsVoid, Broken::NotAsProduced, cut),
    Removal(Rule::ProducerIsAttempt, Broken::NotAsProduced, calm),
    Removal(Rule::RecordNeedsLease, Broken::Fenced, calm),
    Removal(Rule::SameProducerResumes, Broken::SplitAttempt, cut),
    Removal(Rule::SupersededIsFinal, Broken::Livelock, calm),
    Removal(Rule::SupersededOnceMore, Broken::Refused, cut),
    Removal(Rule::Window, Broken::Flooded, small_window),
    Removal(Rule::OtherCodesReturn, Broken::Refused, cut),
    Removal(Rule::DropIsGap, Broken::Refused, || dropping(false)),
    Removal(Rule::GapIsIncomplete, Broken::FalseComplete, || dropping(true)),
    Removal(Rule::HoleIsRecorded, Broken::SilentHole, forgetful),
    Removal(Rule::DigestIsCompared, Broken::FalseComplete, altering),
    Removal(Rule::RewindFromAck, Broken::EmptyPromise, altering),
    Removal(Rule::RewindNeedsLease, Broken::EmptyPromise, altering),
    Removal(Rule::RewindOnce, Broken::Livelock, mistaken),
    Removal(Rule::RewindTakesBack, Broken::NotAsProduced, altering),
    Removal(Rule::RewindWhileHeld, Broken::Unmended, altering),
    Removal(Rule::EndIsFirst, Broken::LateAttempt, calm),
    Removal(Rule::EndOutlivesCrash, Broken::LateAttempt, crash),
];

/// What has to be met where two agents meet cuts and crashes.
const ALWAYS_MET: [Situation; 18] = [
    Situation::AckForEarlierConnection,
    Situation::AlreadyFinished,
    Situation::Batch,
    Situation::CrashKeptPart,
    Situation::Duplicate,
    Situation::DuplicateAndNew,
    Situation::FencedFinished,
    Situation::FencedFinishedOfOlderAttempt,
    Situation::FencedRecords,
    Situation::FencedRecordsOfOlderAttempt,
    Situation::FinishedAgain,
    Situation::HelloOutlivedCrash,
    Situation::OldHelloDisplaces,
    Situation::OldHelloRefused,
    Situation::ResumeAfterCrash,
    Situation::Superseded,
    Situation::SupersededAndBack,
    Situation::WelcomeBelowReceived,
];

/// Searches `model`, which must be without fault, and at least so large; and must have met all of `met`.
fn passes(model: &Model, least: usize, met: &[Situation]) {
    let report = search(model).unwrap();
    println!("{report}");
    assert!(report.states >= least, "only {} states", report.states);
    let missed: Vec<_> = met.iter().filter(|situation| !report.seen.has(**situation)).collect();
    assert!(missed.is_empty(), "never met: {missed:?}");
}

/// Whether to search for longer than every day.
fn is_full() -> bool {
    std::env::var_os("PHONEHOME_MODEL").is_some_and(|budget| budget == "full")
}

fn calm() -> Model {
    pair([2, 1], 0, 0)
}

fn cut() -> Model {
    pair([2, 1], 1, 0)
}

fn crash() -> Model {
    pair([2, 1], 0, 1)
}

/// Two agents with so many records each.
fn pair(records: [u64; 2], cuts: u8, crashes: u8) -> Model {
    Model { scripts: records.map(Script::plain).into(), ..alone(Script::plain(0), cuts, crashes) }
}

/// One agent. Its window has room for two records, and after the first ack for one.
fn alone(script: Script, cuts: u8, crashes: u8) -> Model {
    Model {
        scripts: vec![script],
        faults: Faults { cuts, crashes, ..Faults::default() },
        windows: Windows { welcome: 2 * (RECORD_COST + 1), ack: RECORD_COST + 1 },
        durable: Durable::Fsync,
        without: None,
    }
}

fn small_window() -> Model {
    alone(Script::plain(3), 0, 0)
}

fn forgetful() -> Model {
    Model { durable: Durable::Memory, ..pair([2, 1], 1, 1) }
}

fn lossy() -> Model {
    Model { faults: Faults { losses: 1, cuts: 1, ..Faults::default() }, ..alone(Script::plain(3), 0, 0) }
}

fn altering() -> Model {
    Model { faults: Faults { alterations: 1, cuts: 1, ..Faults::default() }, ..alone(Script::plain(3), 0, 0) }
}

fn mistaken() -> Model {
    alone(Script::mistaken(2), 1, 1)
}

fn spilling() -> Model {
    Model { faults: Faults { spills: 1, deaths: 1, cuts: 1, ..Faults::default() }, ..alone(Script::plain(3), 0, 0) }
}

fn dropping(says_so: bool) -> Model {
    alone(Script::dropping(says_so), 1, 1)
}
