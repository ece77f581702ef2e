//! What is to happen in a run, drawn from its seed.

use std::time::Duration;

use phonehome_agent::config::{OnOffline, Overflow};
use phonehome_proto::{frame::Stream, limits::MAX_PAYLOAD};
use phonehome_server::Durability;

use crate::chance::Chance;

/// A run's settings and faults.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) durability: Durability,
    pub(crate) overflow: Overflow,
    pub(crate) on_offline: OnOffline,
    pub(crate) offline_limit: Option<Duration>,
    pub(crate) memory: u64,
    pub(crate) spool: bool,
    pub(crate) spool_limit: u64,
    /// The first agent is somebody else's.
    pub(crate) sloppy: bool,
    /// How long agents stay for their delivery.
    pub(crate) linger: Duration,
    pub(crate) faults: Vec<(Duration, Fault)>,
    pub(crate) faults_end: Duration,
    /// What commands are like.
    pub(crate) blocks: u64,
    pub(crate) longest: u64,
    pub(crate) pace: u64,
}

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Every connection breaks; quietly: nobody is told.
    Cut {
        quietly: bool,
    },
    /// Only one side is told.
    Halve {
        told: usize,
    },
    Hold(Duration),
    Partition(Duration),
    /// The server's process dies.
    KillServer(Duration),
    /// Its machine does.
    PowerOff(Duration),
    /// It dies at a disk operation from now.
    ServerFuse(u64),
    /// It is told to end, and ends in good order.
    ShutDown(Duration),
    /// The agent dies, and its container is started again.
    KillAgent {
        keep_spool: bool,
        down: Duration,
    },
    AgentFuse(u64),
    ServerDiskFull(Duration),
    ServerDiskErrors(u64),
    ServerSyncErrors(u64),
    AgentDiskFull(Duration),
    AgentDiskErrors(u64),
    /// A bit flips in what the server has stored, while it is down.
    Rot,
    /// A bit flips in a spool.
    SpoolRot,
    SlowDisk {
        delay: Duration,
        lasts: Duration,
    },
    ClockJump(i64),
    /// A second agent of the step appears while the first lives.
    SecondAgent,
}

/// What one command writes.
#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub(crate) blocks: Vec<(Duration, Stream, usize)>,
    pub(crate) code: u8,
}

impl Plan {
    pub(crate) fn draw(chance: &Chance) -> Self {
        let calm = chance.is(5);
        let millis = chance.within(1_000, 60_000);
        let faults_end = Duration::from_millis(millis);
        let blocks = chance.pick(&[0, 1, 5, 40, 150]);
        let sloppy = chance.is(12);
        let count = if calm { 0 } else { chance.within(1, 9) };
        let mut faults: Vec<_> = (0..count).map(|_| (chance.millis(0, millis), draw_fault(chance))).collect();
        faults.sort_by_key(|(at, _)| *at);
        let memory = chance.pick(&[256, 256, 512, 8192]) * 1024;
        Self {
            durability: if chance.is(60) { Durability::Fsync } else { Durability::Os },
            overflow: if chance.is(25) { Overflow::Drop } else { Overflow::Block },
            on_offline: OnOffline::Continue,
            offline_limit: chance.is(30).then(|| chance.millis(2_000, 40_000)),
            memory,
            spool: chance.is(60),
            sloppy,
            spool_limit: chance.pick(&[1, 1, 64]) * 1024 * 1024,
            linger: if chance.is(80) { Duration::from_secs(400) } else { chance.millis(0, 20_000) },
            faults,
            faults_end,
            blocks,
            // It sends all it has at once, and that has to fit the window.
            longest: if sloppy { 3_000 } else { chance.pick(&[3, 300, 20_000, MAX_PAYLOAD as u64]) },
            // Most commands live about as long as things go wrong.
            pace: if chance.is(75) { 2 * millis / blocks.max(1) } else { chance.pick(&[0, 10, 200]) },
        }
    }

    /// Whether the server's disk fails.
    pub(crate) fn harms_storage(&self) -> bool {
        let harms = |fault: &Fault| {
            matches!(fault, Fault::ServerDiskFull(_) | Fault::ServerDiskErrors(_) | Fault::ServerSyncErrors(_))
        };
        self.faults.iter().any(|(_, fault)| harms(fault))
    }

    /// Whether agents push each other aside.
    pub(crate) fn has_rivals(&self) -> bool {
        self.faults.iter().any(|(_, fault)| *fault == Fault::SecondAgent)
    }

    pub(crate) fn script(&self, chance: &Chance) -> Script {
        let blocks = if chance.is(10) { chance.within(0, self.blocks) } else { self.blocks };
        let block = |_| {
            let stream = if chance.is(70) { Stream::Stdout } else { Stream::Stderr };
            (chance.millis(0, self.pace), stream, chance.within(1, self.longest) as usize)
        };
        Script { blocks: (0..blocks).map(block).collect(), code: chance.pick(&[0, 0, 1, 77]) }
    }
}

fn draw_fault(chance: &Chance) -> Fault {
    let down = chance.millis(0, chance.pick(&[10, 1_000, 20_000]));
    match chance.below(22) {
        0 | 1 => Fault::Cut { quietly: false },
        2 => Fault::Cut { quietly: true },
        3 => Fault::Halve { told: chance.below(2) as usize },
        4 => Fault::Hold(chance.millis(1, 50_000)),
        5 => Fault::Partition(chance.millis(1, 60_000)),
        6 => Fault::KillServer(down),
        7 => Fault::PowerOff(down),
        8 | 9 => Fault::ServerFuse(chance.within(1, 60)),
        10 => Fault::ShutDown(down),
        11 | 12 => Fault::KillAgent { keep_spool: chance.is(80), down },
        13 => Fault::AgentFuse(chance.within(1, 30)),
        14 => Fault::ServerDiskFull(chance.millis(100, 30_000)),
        15 => Fault::ServerDiskErrors(chance.within(1, 3)),
        16 => Fault::ServerSyncErrors(chance.within(1, 2)),
        17 => Fault::AgentDiskFull(chance.millis(100, 30_000)),
        18 => Fault::AgentDiskErrors(1),
        19 => {
            if chance.is(50) {
                Fault::Rot
            } else {
                Fault::SpoolRot
            }
        }
        20 => Fault::SlowDisk { delay: chance.millis(1, 3_000), lasts: chance.millis(1_000, 30_000) },
        _ => {
            if chance.is(50) {
                Fault::ClockJump(chance.within(0, 20_000_000_000) as i64 - 10_000_000_000)
            } else {
                Fault::SecondAgent
            }
        }
    }
}
