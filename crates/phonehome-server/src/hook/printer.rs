//! Reads the build's log from the store and prints it, at the reader's pace.

use std::{
    io::{self, Write},
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use bytes::Bytes;
use phonehome_proto::{
    event::Event,
    frame::Stream,
    id::{Attempt, StepName},
};
use rustix::stdio;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::Instant,
};

use super::{
    feed::Feed,
    news::News,
    outlet::{Outlet, Unread},
    pusher::{self, STALL},
    screen::{Screen, Source, Target},
};
use crate::{builds::expiry, client::remote_log::Item};

/// Something to print beside the build's output.
#[derive(Debug)]
pub(crate) enum Notice {
    /// What the launcher wrote.
    Launcher(Bytes),
    /// A line of the hook's own; the printer says whose it is.
    Line(String),
    /// A line of the log, complete.
    Log(String),
    /// The hook has said its last word.
    End,
}

/// Who reads what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    /// Somebody who waits for the end, and wants to hear of a build that is silent; one who takes nothing for long is
    /// gone.
    Pusher { keepalive: Option<Duration> },
    /// Whoever it is, a person with a pager say: they may take their time.
    Anybody,
}

/// Why nobody reads any more.
pub(crate) type Gone = oneshot::Receiver<String>;

/// Notices on their way to the printer.
const QUEUE: usize = 64;

/// Bytes rendered before they are handed to the writers.
const BATCH: usize = 64 * 1024;

/// The way to the printer.
pub(crate) fn notices() -> (mpsc::Sender<Notice>, mpsc::Receiver<Notice>) {
    mpsc::channel(QUEUE)
}

/// Prints one line of the hook's own when there is no printer.
pub(crate) fn complain(line: &str) {
    drop(writeln!(io::stderr(), "phonehome: {line}")); // there is nowhere left to say that this failed
}

/// The printer of one build.
pub(crate) struct Printer {
    log: Feed,
    screen: Screen,
    notices: mpsc::Receiver<Notice>,
    keepalive: Option<Duration>,
    stall: Option<Duration>,
    last_output: Instant,
    last_line: Instant,
    attempts: std::collections::BTreeMap<StepName, u32>,
    news: News,
}

impl Printer {
    pub(crate) fn new(log: Feed, screen: Screen, notices: mpsc::Receiver<Notice>, reader: Reader) -> Self {
        let (keepalive, stall) = match reader {
            Reader::Pusher { keepalive } => (keepalive.filter(|_| screen.is_watched()), Some(STALL)),
            Reader::Anybody => (None, None),
        };
        let now = Instant::now();
        Self {
            log,
            screen,
            notices,
            keepalive,
            stall,
            last_output: now,
            last_line: now,
            attempts: std::collections::BTreeMap::new(),
            news: News::default(),
        }
    }

    /// Starts to print. The receiver fires when nobody reads any more.
    pub(crate) fn spawn(self) -> (JoinHandle<Result<(), Unread>>, Gone) {
        let (gone, is_gone) = oneshot::channel();
        let printing = tokio::spawn(async move {
            let result = self.run().await;
            if let Err(Unread(reason)) = &result {
                drop(gone.send(reason.clone())); // the hook may be about to end
            }
            result
        });
        (printing, is_gone)
    }

    async fn run(mut self) -> Result<(), Unread> {
        let unusable = |error: io::Error| Unread(format!("the output cannot be used: {error}"));
        let written = Arc::new(AtomicU64::new(0));
        let mut outlets = Outlets {
            stdout: Outlet::open(stdio::stdout(), written.clone(), self.stall).map_err(unusable)?,
            stderr: Outlet::open(stdio::stderr(), written.clone(), self.stall).map_err(unusable)?,
        };
        let mut log_ended = false;
        let mut hook_ended = false;
        let mut notice = None;
        let mut pusher_gone = std::pin::pin!(pusher::gone([stdio::stdout(), stdio::stderr()], written, self.stall));
        while !(log_ended && hook_ended) {
            let screen_at = self.screen.poll_timeout();
            let keepalive_at = self.keepalive_at();
            tokio::select! {
                biased; // all of the build's output comes before the hook's last words
                reason = &mut pusher_gone => return Err(Unread(reason)),
                item = self.log.next(), if !log_ended => match item {
                    Ok(Some(item)) => self.show_batch(item),
                    Ok(None) => {
                        self.screen.finish(); // an unfinished last line comes before what is said about the end
                        log_ended = true;
                    }
                    Err(error) => {
                        self.own_line(&format!("the log cannot be read: {error}"));
                        log_ended = true;
                    }
                },
                // Shown when the log was looked at once more: what came before the notice may have just arrived.
                () = std::future::ready(()), if notice.is_some() => match notice.take() {
                    Some(Notice::End) | None => hook_ended = true,
                    Some(notice) => self.show_notice(notice),
                },
                next = self.notices.recv(), if !hook_ended => notice = next.or(Some(Notice::End)),
                () = expiry(screen_at) => self.screen.handle_timeout(Instant::now()),
                () = expiry(keepalive_at), if !log_ended => self.keep_alive(),
            }
            outlets.write(&mut self.screen).await?;
        }
        self.screen.finish();
        outlets.write(&mut self.screen).await?;
        outlets.finish().await
    }

    /// Shows an item and what can be had right behind it.
    fn show_batch(&mut self, item: Item) {
        let mut size = self.show(item);
        while size < BATCH
            && let Ok(Some(item)) = self.log.try_next()
        {
            size += self.show(item);
        }
    }

    /// Shows an item and says how large it is.
    fn show(&mut self, item: Item) -> usize {
        match item {
            Item::Lost { step, records } => {
                self.own_line(&format!(
                    "{records} records of step {step} are missing here: neither side has them any more"
                ));
                0
            }
            Item::Record { step, attempt, stream, payload } => self.show_record(&step, attempt, stream, &payload),
            Item::Report(report) => {
                self.own_line(&format!("reported: {}", report.told()));
                0
            }
            Item::Note(line) => {
                self.own_line(&line);
                0
            }
        }
    }

    fn show_record(&mut self, step: &StepName, attempt: Attempt, stream: Stream, payload: &[u8]) -> usize {
        let last = self.attempts.insert(step.clone(), attempt).unwrap_or(1);
        if last < attempt {
            self.own_line(&format!("attempt {attempt} of step {step}: its builder was started again"));
        }
        let now = Instant::now();
        if stream == Stream::Event {
            let event = Event::parse(payload);
            if let Some(line) = event.and_then(|event| self.news.line(step, attempt, &event)) {
                self.own_line(&line);
            }
        } else {
            self.last_output = now;
            self.last_line = now;
            self.screen.show(Source::Build(step.clone(), stream.into()), payload, now);
        }
        payload.len()
    }

    fn show_notice(&mut self, notice: Notice) {
        match notice {
            Notice::Launcher(block) => {
                self.last_line = Instant::now();
                self.screen.show(Source::Launcher, &block, Instant::now());
            }
            Notice::Line(line) => self.own_line(&line),
            Notice::Log(line) => self.screen.own_line(&line),
            Notice::End => {}
        }
    }

    fn own_line(&mut self, line: &str) {
        self.last_line = Instant::now();
        let printable: String = line.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        self.screen.own_line(&format!("phonehome: {printable}"));
    }

    fn keepalive_at(&self) -> Option<Instant> {
        Some(self.last_line + self.keepalive?)
    }

    fn keep_alive(&mut self) {
        let silence = self.last_output.elapsed().as_secs();
        self.own_line(&format!("still building, {silence} s without output"));
    }
}

/// Both streams.
struct Outlets {
    stdout: Outlet,
    stderr: Outlet,
}

impl Outlets {
    async fn write(&mut self, screen: &mut Screen) -> Result<(), Unread> {
        self.stdout.write(screen.take(Target::Stdout)).await?;
        self.stderr.write(screen.take(Target::Stderr)).await
    }

    async fn finish(self) -> Result<(), Unread> {
        self.stdout.finish().await?;
        self.stderr.finish().await
    }
}

/// A writer of log lines that never waits: a line for which there is no room is dropped.
#[derive(Debug)]
pub(crate) struct LogLines(pub(crate) mpsc::Sender<Notice>);

impl Write for LogLines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        drop(self.0.try_send(Notice::Log(String::from_utf8_lossy(line).into_owned())));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
