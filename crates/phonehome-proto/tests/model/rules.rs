//! What can be taken out of the model, what must hold, and what has to have been seen.

use std::{collections::BTreeMap, fmt};

/// A rule of `docs/wire.md` that the code around the state machines can be told to ignore. Where a state machine itself
/// keeps the rule, what it did is undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// 1: a record above the next one is never stored.
    AboveNextIsRefused,
    /// 1: a known number with other bytes is fatal.
    ConflictIsFatal,
    /// 1: a record below the next one is ignored.
    DuplicateIsIgnored,
    /// 1: `Welcome` says what is durable, not what was received.
    ResumeFromDurable,
    /// 2: an ack says what is durable, not what was received.
    AckIsDurable,
    /// 2: FINISHED is answered when it is durable.
    AnswerIsDurable,
    /// 2: FINISHED is taken after every record.
    FinishedIsLast,
    /// 2: FINISHED again is the same FINISHED.
    FinishedIsIdempotent,
    /// 2: FINISHED is said again on every connection until it is answered.
    FinishedIsSaidAgain,
    /// 2: a record is held until it is acknowledged.
    HoldUntilAcknowledged,
    /// 3: an attempt is durable before its `Welcome`.
    AttemptIsDurable,
    /// 3: without its lease a connection stores no FINISHED.
    FinishedNeedsLease,
    /// 3: the lease of an agent's older connection is void as soon as it has a newer one.
    OlderConnectionIsVoid,
    /// 3: a new producer is a new attempt.
    ProducerIsAttempt,
    /// 3: without its lease a connection stores no record.
    RecordNeedsLease,
    /// 3: the same producer again is the same attempt.
    SameProducerResumes,
    /// 3, section 7: 4002 in place of a `Welcome` is final.
    SupersededIsFinal,
    /// 3, section 7: 4002 after a `Welcome` means: connect once more.
    SupersededOnceMore,
    /// 4: what is in flight stays within the window.
    Window,
    /// 7: every code outside 4000-4099 means: connect again.
    OtherCodesReturn,
    /// 8: dropped bytes are a gap record.
    DropIsGap,
    /// 8: a gap makes the log incomplete.
    GapIsIncomplete,
    /// 8: acknowledged records that the server lost are recorded as a hole.
    HoleIsRecorded,
    /// 9: FINISHED is compared with what was stored.
    DigestIsCompared,
    /// `resume`: only what was not acknowledged is taken back.
    RewindFromAck,
    /// `resume`, 3: without its lease a connection takes nothing back.
    RewindNeedsLease,
    /// `resume`: an attempt whose end differs is sent again once.
    RewindOnce,
    /// `resume`: what is sent again is taken back first.
    RewindTakesBack,
    /// `resume`: a log that differs is sent again while the agent holds the records.
    RewindWhileHeld,
    /// 10: a step with its end takes no new attempt.
    EndIsFirst,
    /// 10: also after a crash.
    EndOutlivesCrash,
}

/// What must never be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// There is something after an attempt's end.
    AfterEnd,
    /// The same number came with two contents and the connection lives.
    ConflictPassed,
    /// Somebody waits and nothing can happen any more, or the newest attempt was not delivered.
    DeadEnd,
    /// FINISHED is stored before its last record.
    EarlyEnd,
    /// What was acknowledged is not durable, or not any more.
    EmptyPromise,
    /// A log is called complete, or is delivered, and is not whole and durable.
    FalseComplete,
    /// A fenced attempt has stored something.
    Fenced,
    /// An agent has forgotten what is not durable.
    Forgotten,
    /// More is in flight than the window allows.
    Flooded,
    /// There is an attempt after the one that ended.
    LateAttempt,
    /// Without any fault, the same can happen again and again.
    Livelock,
    /// What is stored is not what the agent produced, once and in order.
    NotAsProduced,
    /// An agent was refused for no good reason.
    Refused,
    /// A `Welcome` does not say what is durable.
    ResumePoint,
    /// Records are missing and no hole says so.
    SilentHole,
    /// An agent has several attempts.
    SplitAttempt,
    /// A log is called incomplete, and the agent was never asked for the records in question though it held them.
    Unmended,
    /// An agent found its server breaking the protocol.
    Violation,
}

/// Something rare that a search has to have met, or it proves less than it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Situation {
    /// An ack covered records that an earlier connection had carried and this one had not yet.
    AckForEarlierConnection,
    /// The server already had records that were not in the agent's memory.
    AckOverSpilled,
    /// A new agent was told that the step has its end.
    AlreadyFinished,
    /// One message carried several records.
    Batch,
    /// A known number came with other bytes.
    Conflict,
    /// A crash lost part of what was not durable.
    CrashKeptPart,
    /// A crash lost what was durable.
    CrashLostDurable,
    /// The end differed again after the records were sent again.
    DiffersAgain,
    /// A message carried known records.
    Duplicate,
    /// A message carried known and new records.
    DuplicateAndNew,
    /// The older connection of an agent delivered FINISHED when its lease was void.
    FencedFinished,
    /// The same from an older attempt.
    FencedFinishedOfOlderAttempt,
    /// The older connection of an agent delivered records when its lease was void.
    FencedRecords,
    /// The same from an older attempt.
    FencedRecordsOfOlderAttempt,
    /// An older connection was to have its records sent again when its lease was void.
    FencedRewind,
    /// FINISHED came again.
    FinishedAgain,
    /// A hello that the server had not read outlived its crash.
    HelloOutlivedCrash,
    /// The server recorded a hole.
    Hole,
    /// FINISHED was accepted, and something was missing.
    Incomplete,
    /// A log was complete after its last records were sent again.
    Mended,
    /// The end differed, and everything was acknowledged.
    NothingLeft,
    /// A hello that was long under way displaced the agent's newer connection.
    OldHelloDisplaces,
    /// A hello that was long under way knew less than was stored.
    OldHelloRefused,
    /// A record came too early.
    OutOfOrder,
    /// FINISHED came before its records, and the agent sent them again.
    ResumeAtFinished,
    /// After a crash an agent went on in the middle.
    ResumeAfterCrash,
    /// Records were taken back to be sent again.
    Rewound,
    /// The same, and some of them were durable.
    RewoundDurable,
    /// The same, and some before them stayed.
    RewoundPart,
    /// The command wrote while older records were not in memory.
    PushedBehindSpilled,
    /// An agent died and went on with what it had on disk.
    Recovered,
    /// A record came back into memory.
    Restored,
    /// Records left the agent's memory.
    Spilled,
    /// An older attempt was told so in place of a welcome.
    Superseded,
    /// An agent was superseded after its welcome and came back.
    SupersededAndBack,
    /// `Welcome` said less than the server had received.
    WelcomeBelowReceived,
    /// The window held a record back.
    WindowWasFull,
}

/// How often each situation was met.
#[derive(Debug, Default)]
pub(crate) struct Seen(BTreeMap<Situation, u64>);

impl Seen {
    pub(crate) fn note(&mut self, situation: Situation) {
        *self.0.entry(situation).or_default() += 1;
    }

    /// Notes it only `when`.
    pub(crate) fn note_when(&mut self, when: bool, situation: Situation) {
        if when {
            self.note(situation);
        }
    }

    pub(crate) fn has(&self, situation: Situation) -> bool {
        self.0.contains_key(&situation)
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(situation, count)| writeln!(f, "  {situation:?}: {count}"))
    }
}
