//! The agent's own log: on standard error, and never inside a line of the command.
//!
//! Every line is an event of [`tracing`]; this is its subscriber. What `--log-level` asks for is written at once.
//! Whatever else happens down to DEBUG is kept in a small [`Ring`], so that an error can show what led to it.

mod line;
mod ring;

use std::{
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::SystemTime,
};

use clap::ValueEnum;
use serde_json::{Map, Value};
use tracing::{
    Event, Level, Metadata, Subscriber,
    level_filters::LevelFilter,
    span,
    subscriber::{Interest, set_global_default},
};

use self::{line::Line, ring::Ring};
use crate::{config, console::Console, redact::Redactor};

/// Form of the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// What becomes of lines that `--log-level` does not ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trace {
    /// They are not made.
    Off,
    /// They are kept for a while, and shown before an error.
    Ring,
    /// Those of some modules are shown at once, the others are kept.
    Live(Modules),
}

/// Some modules of the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Modules {
    /// All of them.
    All,
    /// Those with these names, and what is inside them.
    Named(Vec<String>),
}

/// How to log.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Form of a line.
    pub format: Format,
    /// Least severity that is written.
    pub level: config::Level,
    /// What becomes of the rest.
    pub trace: Trace,
}

/// Sends the log to the console. Only the first call of a process counts: a second, as tests make, keeps the first log.
pub fn init(settings: Settings, console: Console) {
    LOG.get_or_init(|| Log { settings, console, redactor: OnceLock::new(), ring: Mutex::default() });
    drop(set_global_default(Global)); // it fails from the second call on
}

/// Masks secrets in all further lines: some quote the command, or what others said. Only the first call of a process counts.
pub fn hide(redactor: &Redactor) {
    if let Some(log) = LOG.get() {
        log.redactor.get_or_init(|| redactor.clone());
    }
}

/// Says that the agent has started and with which settings, if the log is to show that: `settings` is not called
/// otherwise.
pub fn started(settings: impl FnOnce() -> Map<String, Value>) {
    if let Some(log) = LOG.get()
        && log.shows(Level::INFO, TARGET)
    {
        let mut line = Line::new(SystemTime::now(), Level::INFO, TARGET);
        line.message = concat!("phonehome-agent ", env!("CARGO_PKG_VERSION"), " started").to_owned();
        line.fields.push(("config".into(), settings().into()));
        log.mask(&mut line);
        log.write(&line);
    }
}

/// The latest own lines as text, the oldest first, as many as `limit` bytes have room for. Lines below `--log-level` are
/// among them.
#[must_use]
pub fn recent(limit: usize) -> Vec<String> {
    LOG.get().map(|log| log.ring().recent(limit)).unwrap_or_default()
}

/// The log of this process.
static LOG: OnceLock<Log> = OnceLock::new();

/// Where the start line comes from.
const TARGET: &str = "phonehome_agent";

#[derive(Debug)]
struct Log {
    settings: Settings,
    console: Console,
    /// What no line may show.
    redactor: OnceLock<Redactor>,
    ring: Mutex<Ring>,
}

impl Log {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether such a line is written at once.
    fn shows(&self, level: Level, target: &str) -> bool {
        level <= LevelFilter::from(self.settings.level) || self.settings.trace.is_live(target)
    }

    /// Whether such a line is kept.
    fn keeps(&self, level: Level) -> bool {
        level <= KEPT && self.settings.trace != Trace::Off
    }

    fn mask(&self, line: &mut Line) {
        if let Some(redactor) = self.redactor.get() {
            line.mask(redactor);
        }
    }

    fn take(&self, mut line: Line) {
        self.mask(&mut line);
        let shown = self.shows(line.level, line.target);
        if line.level == Level::ERROR {
            self.ring().hidden().for_each(|line| self.write_hidden(line));
        }
        if shown {
            self.write(&line);
        }
        if self.keeps(line.level) {
            self.ring().push(line, shown);
        }
    }

    fn write(&self, line: &Line) {
        self.console.own_line(&match self.settings.format {
            Format::Text => format!("{line}\n"),
            Format::Json => format!("{}\n", line.json()),
        });
    }

    /// Writes a line that is of interest only now, marked as such.
    fn write_hidden(&self, line: &mut Line) {
        match self.settings.format {
            Format::Text => self.console.own_line(&format!("before the error: {line}\n")),
            Format::Json => {
                line.fields.push(("trace".into(), true.into()));
                self.write(line);
                line.fields.pop();
            }
        }
    }
}

/// Least severity that is kept. TRACE is for every frame: a filter that is one comparison keeps it free of cost.
const KEPT: Level = Level::DEBUG;

/// The subscriber: [`LOG`], which is there before this one is.
struct Global;

impl Subscriber for Global {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if self.enabled(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let (level, target) = (*metadata.level(), metadata.target());
        metadata.is_event() && LOG.get().is_some_and(|log| log.keeps(level) || log.shows(level, target))
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let settings = &LOG.get()?.settings;
        let traced = match settings.trace {
            Trace::Off => LevelFilter::OFF,
            Trace::Ring => KEPT.into(),
            Trace::Live(_) => LevelFilter::TRACE,
        };
        Some(traced.max(settings.level.into()))
    }

    fn event(&self, event: &Event<'_>) {
        if let Some(log) = LOG.get() {
            log.take(Line::of(event, SystemTime::now()));
        }
    }

    // The agent has no spans.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

impl Trace {
    /// Reads `off`, `ring`, `live` or `live:MODULE,...`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        match text {
            "off" => Some(Self::Off),
            "ring" => Some(Self::Ring),
            "live" => Some(Self::Live(Modules::All)),
            _ => {
                let names: Vec<_> = text.strip_prefix("live:")?.split(',').map(|name| name.trim().to_owned()).collect();
                let all_named = names.iter().all(|name| !name.is_empty());
                all_named.then_some(Self::Live(Modules::Named(names)))
            }
        }
    }

    fn is_live(&self, target: &str) -> bool {
        match self {
            Self::Off | Self::Ring => false,
            Self::Live(Modules::All) => true,
            Self::Live(Modules::Named(names)) => target.split("::").any(|part| names.iter().any(|name| name == part)),
        }
    }
}

impl From<config::Level> for LevelFilter {
    fn from(level: config::Level) -> Self {
        match level {
            config::Level::Error => Self::ERROR,
            config::Level::Warn => Self::WARN,
            config::Level::Info => Self::INFO,
            config::Level::Debug => Self::DEBUG,
            config::Level::Trace => Self::TRACE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_off_kept_or_live_for_some_modules() {
        let live = |text: &str, target: &str| Trace::parse(text).unwrap().is_live(target);
        assert!(!live("off", "a::uplink") && !live("ring", "a::uplink"));
        assert!(live("live", "a::uplink"));
        assert!(live("live:spool, uplink", "a::uplink") && live("live:uplink", "a::uplink::dial"));
        assert!(!live("live:dial", "a::uplink"));
        for bad in ["", "on", "live:", "live:a,,b", "ring:a"] {
            assert_eq!(Trace::parse(bad), None, "{bad}");
        }
    }
}
