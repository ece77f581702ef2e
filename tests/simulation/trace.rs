//! What happened in a run: what the programs log and what was done to them, with the simulated time.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt::{self, Write},
    rc::Rc,
};

use tokio::time::Instant;
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

thread_local! {
    static RUN: RefCell<Option<Rc<RefCell<Trace>>>> = const { RefCell::new(None) };
}

/// The trace of a run.
#[derive(Debug)]
pub(crate) struct Trace {
    start: Instant,
    /// Everything, when asked for; only a digest of it otherwise.
    pub(crate) lines: Option<Vec<String>>,
    hasher: blake3::Hasher,
    count: u64,
    /// How often each rare thing was seen.
    pub(crate) seen: BTreeMap<&'static str, u64>,
}

/// What is looked for in the programs' logs: the name of a rare path, and how its line starts.
const SIGNS: [(&str, &str); 14] = [
    ("agent cancelled", "the server cancels the build"),
    ("attempt fenced", "disconnected: a newer agent of this step has taken over"),
    ("connection superseded", "disconnected: a newer connection of this step has taken over"),
    ("damage quarantined", "the log was damaged"),
    ("digest mismatch", "the end does not agree"),
    ("disk full", "no room left in"),
    ("disk room again", "there is room again"),
    ("drain", "disconnected: the server is about to go"),
    ("duplicate refused", "records that are stored already"),
    ("late FINISHED", "disconnected: the build has"),
    ("spool unusable", "the spool in"),
    ("spool lost", "the spool is damaged"),
    ("storage failed", "cannot write"),
    ("torn tail", "cut a torn tail"),
];

/// Lines that no run has which gets anywhere.
const ENDLESS: u64 = 200_000;

impl Trace {
    /// Starts the trace of this thread's run.
    pub(crate) fn start(verbose: bool) -> Rc<RefCell<Self>> {
        let trace = Self {
            start: Instant::now(),
            lines: verbose.then(Vec::new),
            hasher: blake3::Hasher::new(),
            count: 0,
            seen: BTreeMap::new(),
        };
        let trace = Rc::new(RefCell::new(trace));
        RUN.set(Some(trace.clone()));
        trace
    }

    pub(crate) fn digest(&self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }

    fn add(&mut self, line: &str) {
        let line = format!("{:>10.3} {line}", self.start.elapsed().as_secs_f64());
        self.hasher.update(line.as_bytes());
        self.count += 1;
        assert!(self.count < ENDLESS, "the run does not end: {line}");
        if let Some(lines) = &mut self.lines {
            lines.push(line);
        }
    }
}

/// Notes something that the simulation itself did or found.
pub(crate) fn note(line: &str) {
    RUN.with_borrow(|run| run.as_ref().expect("a run").borrow_mut().add(&format!("** {line}")));
}

/// Counts a rare thing that no log line tells.
pub(crate) fn saw(what: &'static str) {
    RUN.with_borrow(|run| *run.as_ref().expect("a run").borrow_mut().seen.entry(what).or_default() += 1);
}

/// Takes the programs' log.
pub(crate) struct Listener {
    pub(crate) level: Level,
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("phonehome") && *metadata.level() <= self.level
    }

    fn new_span(&self, _span: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}

    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let Text { message, fields } = text;
        RUN.with_borrow(|run| {
            let Some(run) = run else { return };
            let mut run = run.borrow_mut();
            for (name, sign) in SIGNS {
                if message.starts_with(sign) {
                    *run.seen.entry(name).or_default() += 1;
                }
            }
            let metadata = event.metadata();
            run.add(&format!("{:<5} {}: {message}{fields}", metadata.level(), metadata.target()));
        });
    }

    fn enter(&self, _span: &span::Id) {}

    fn exit(&self, _span: &span::Id) {}
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let written = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
        written.expect("a string takes everything");
    }
}
