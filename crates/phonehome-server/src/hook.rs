//! One push: launch a builder, print what it phones home, end as it does.

mod address;
pub(crate) mod ending;
mod feed;
mod launcher;
mod lock;
mod news;
mod outlet;
mod printer;
mod pusher;
pub(crate) mod render;
mod screen;
pub(crate) mod summary;
pub(crate) mod via;

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io::{self, Write},
    net::SocketAddr,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use phonehome_proto::id::{BuildId, StepName};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use self::{
    ending::{Cause, Ending},
    launcher::{Launched, Launcher},
    lock::Lock,
    summary::{is_plain, summary},
    via::Via,
};
pub(crate) use self::{
    feed::Feed,
    printer::{Gone, LogLines, Notice, Printer, Reader, complain, notices},
    screen::{Choice, RenderChoice, Screen},
};
use crate::{Clocks, Config, Durability, Expected, ExpectedBuild, Refusals, Server, client::http::Client};

/// Everything a hook needs, checked.
pub(crate) struct HookConfig {
    /// The standing server that has the build; `None` receives it here.
    pub(crate) via: Option<Client>,
    pub(crate) listen: SocketAddr,
    /// Host, host and port, or address to tell the builder.
    pub(crate) advertise: Option<String>,
    pub(crate) tls: bool,
    pub(crate) env_file: Option<PathBuf>,
    pub(crate) build: BuildId,
    pub(crate) steps: Vec<StepName>,
    /// Where to keep the log; `None` for a temporary directory.
    pub(crate) data: Option<PathBuf>,
    pub(crate) lock: Option<PathBuf>,
    pub(crate) clocks: Clocks,
    pub(crate) on_hangup: OnHangup,
    pub(crate) render: RenderChoice,
    pub(crate) color: Choice,
    pub(crate) keepalive: Option<Duration>,
    /// Say nothing at the end of a build that ended by itself and whose log is complete.
    pub(crate) quiet: bool,
    pub(crate) launcher: Vec<OsString>,
}

/// What becomes of a build whose pusher is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnHangup {
    Cancel,
    Continue,
}

/// How long finished agents get to hear that they may go.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long a launcher may go on after the build's end before it is terminated.
const LAUNCHER_PATIENCE: Duration = Duration::from_secs(10);

/// Runs one build and returns its exit code.
pub(crate) async fn run(
    mut config: HookConfig,
    own_lines: mpsc::Sender<Notice>,
    queue: mpsc::Receiver<Notice>,
) -> anyhow::Result<u8> {
    let _lock = config.lock.as_deref().map(|path| Lock::acquire(path, &config.build)).transpose()?;
    let signals = Hangups::catch()?;
    let notices = (own_lines, queue);
    match config.via.take() {
        Some(client) => run_there(&config, client, signals, notices).await,
        None => run_here(&config, signals, notices).await,
    }
}

/// The way to the printer, both ends.
type Notices = (mpsc::Sender<Notice>, mpsc::Receiver<Notice>);

/// The build phones this process.
async fn run_here(config: &HookConfig, signals: Hangups, (own_lines, queue): Notices) -> anyhow::Result<u8> {
    let temporary =
        if config.data.is_none() { Some(tempfile::tempdir().context("no place for the log")?) } else { None };
    let data = config.data.clone().or_else(|| temporary.as_ref().map(|dir| dir.path().to_owned())).unwrap_or_default();
    let durability = if config.data.is_some() { Durability::Fsync } else { Durability::Os };
    let server = Server::spawn(Config { listen: config.listen, tls: config.tls, data, durability }).await?;
    let clocks = config.clocks.clone();
    let build = server.expect(Expected {
        id: config.build.clone(),
        steps: config.steps.clone(),
        clocks,
        token: None,
        rate: None,
    })?;
    let url = address::advertised(config.advertise.as_deref(), &server)?;
    let variables = variables(&url, &build, &server);
    let log = Feed::Store(Box::new(build.log()));
    let place = Place::Here { build: &build, server: &server, url };
    let code = launch(config, place, log, &variables, signals, (own_lines, queue)).await?;
    server.shutdown(FAREWELL).await;
    Ok(code)
}

/// The build phones a standing server, and this process follows it there.
async fn run_there(config: &HookConfig, client: Client, signals: Hangups, notices: Notices) -> anyhow::Result<u8> {
    let (via, log, variables) = Via::declare(client, config).await?;
    let result = launch(config, Place::There(&via), log, &variables, signals, notices).await;
    if let Err(error) = &result {
        via.cancel(&format!("{error:#}"));
    }
    via.farewell().await;
    result
}

/// Starts the launcher and stays until the end.
async fn launch(
    config: &HookConfig,
    place: Place<'_>,
    log: Feed,
    variables: &[(&'static str, String)],
    signals: Hangups,
    (own_lines, queue): Notices,
) -> anyhow::Result<u8> {
    let _env_file = config.env_file.as_deref().map(|path| EnvFile::create(path, variables)).transpose()?;
    let screen = Screen::open(config.render, config.color, config.steps.len() > 1);
    let printer = Printer::new(log, screen, queue, Reader::Pusher { keepalive: config.keepalive });
    let launcher = Launcher::start(&config.launcher, variables, own_lines.clone());
    let push = Push { place, on_hangup: config.on_hangup, quiet: config.quiet, signals, own_lines };
    Ok(push.run(launcher, printer).await)
}

/// What the builder is told.
fn variables(url: &str, build: &ExpectedBuild, server: &Server) -> Vec<(&'static str, String)> {
    let mut variables = vec![
        ("PHONEHOME_URL", url.to_owned()),
        ("PHONEHOME_BUILD", build.id().to_string()),
        ("PHONEHOME_TOKEN", build.token().to_owned()),
    ];
    variables.extend(server.pin().map(|pin| ("PHONEHOME_PIN", pin.to_owned())));
    variables
}

/// The variables as a file; removed again at the end, when the token in it is worth nothing any more.
struct EnvFile<'a> {
    path: &'a Path,
    /// Device and inode: another hook may have put its own there since.
    identity: (u64, u64),
}

impl<'a> EnvFile<'a> {
    fn create(path: &'a Path, variables: &[(&str, String)]) -> anyhow::Result<Self> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".tmp");
        let identity = |metadata: &fs::Metadata| Ok((metadata.dev(), metadata.ino()));
        let write = || -> io::Result<(u64, u64)> {
            drop(fs::remove_file(&temporary)); // left by a hook that was killed
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            variables.iter().try_for_each(|(name, value)| writeln!(file, "{name}={value}"))?;
            fs::rename(&temporary, path)?;
            identity(&file.metadata()?)
        };
        let identity = write().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path, identity })
    }
}

impl Drop for EnvFile<'_> {
    fn drop(&mut self) {
        if fs::metadata(self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.identity) {
            drop(fs::remove_file(self.path)); // whoever removed it first wanted the same
        }
    }
}

/// Where the build is.
enum Place<'a> {
    Here {
        build: &'a ExpectedBuild,
        server: &'a Server,
        /// What the builder was told.
        url: String,
    },
    There(&'a Via),
}

impl Place<'_> {
    async fn ending(&self) -> Ending {
        match self {
            Self::Here { build, .. } => build.verdict().await.into(),
            Self::There(via) => via.ending().await,
        }
    }

    fn was_connected(&self) -> bool {
        match self {
            Self::Here { build, .. } => build.was_connected(),
            Self::There(via) => via.was_connected(),
        }
    }

    fn is_cancelled(&self) -> bool {
        match self {
            Self::Here { build, .. } => build.is_cancelled(),
            Self::There(via) => via.is_cancelled(),
        }
    }

    fn cancel(&self, reason: &str) {
        match self {
            Self::Here { build, .. } => build.cancel(reason),
            Self::There(via) => via.cancel(reason),
        }
    }

    fn fail(&self, reason: &str) {
        match self {
            Self::Here { build, .. } => build.fail(reason),
            Self::There(via) => via.fail(reason),
        }
    }

    fn hints_about_nobody(&self) -> Vec<String> {
        let look_at = [
            "look at: was the builder started at all (image pull, quota, scheduling)?".to_owned(),
            "is phonehome-agent its entrypoint, with the PHONEHOME_ variables of this build? what does its own log say?"
                .to_owned(),
        ];
        match self {
            Self::Here { server, url, .. } => match server.refusals() {
                Some(Refusals { count, last }) => {
                    vec![format!("callers were refused {count} times, the last one because: {last}")]
                }
                None => {
                    let reach = format!("can the builder reach {url}? if not, see --advertise and --listen");
                    look_at.into_iter().chain([reach]).collect()
                }
            },
            Self::There(via) => match via.hints_about_nobody() {
                reports if reports.is_empty() => look_at.into(),
                reports => reports,
            },
        }
    }
}

/// Everything that waits for one build.
struct Push<'a> {
    place: Place<'a>,
    on_hangup: OnHangup,
    quiet: bool,
    signals: Hangups,
    own_lines: mpsc::Sender<Notice>,
}

impl Push<'_> {
    async fn run(mut self, mut launcher: Launcher, printer: Printer) -> u8 {
        let (mut printing, gone) = printer.spawn();
        let mut gone = Some(gone);
        let mut was_asked = false;
        let ending = loop {
            tokio::select! {
                ending = self.place.ending() => break ending,
                launched = launcher.ended() => self.handle_launcher(&launched),
                reason = recv(&mut gone) => {
                    gone = None;
                    self.handle_gone(&reason, &launcher);
                }
                asked = self.signals.next() => match asked {
                    Asked::HungUp => self.handle_gone("the pusher hung up", &launcher),
                    Asked::ToStop(reason) => self.handle_stop(reason, &launcher, &mut was_asked),
                },
            }
        };
        let last_words = self.last_words(&ending);
        for line in &last_words {
            self.say(line).await;
        }
        drop(self.own_lines.send(Notice::End).await); // a printer that is gone has ended already
        // A slow reader gets all of it; one that has stopped reading ends the printer.
        tokio::select! {
            _ = &mut printing => {}
            _ = self.signals.next() => printing.abort(),
        }
        if gone.is_none_or(|mut gone| gone.try_recv().is_ok()) {
            // Standard error may still lead somewhere, to a log say.
            last_words
                .iter()
                .for_each(|line| pusher::try_write(rustix::stdio::stderr(), &format!("phonehome: {line}")));
        }
        launcher.finish(LAUNCHER_PATIENCE).await;
        ending.code
    }

    fn handle_launcher(&self, launched: &Launched) {
        if let Launched::Failed(reason) = launched {
            let stage = if self.place.was_connected() {
                "while the build was running"
            } else {
                "before any builder phoned home"
            };
            self.place.fail(&format!("the launcher {reason} {stage}; its own output is above"));
        }
    }

    /// The pusher is gone, which may show in more ways than one.
    fn handle_gone(&self, reason: &str, launcher: &Launcher) {
        if self.on_hangup == OnHangup::Cancel && !self.place.is_cancelled() {
            self.stop(reason, launcher);
        }
    }

    /// Somebody wants the build to stop. With `--on-hangup continue` the first wish is the pusher's Ctrl-C; the second is
    /// meant.
    fn handle_stop(&self, reason: &str, launcher: &Launcher, was_asked: &mut bool) {
        if self.on_hangup == OnHangup::Cancel || std::mem::replace(was_asked, true) {
            self.stop(reason, launcher);
        }
    }

    fn stop(&self, reason: &str, launcher: &Launcher) {
        self.place.cancel(reason);
        launcher.terminate();
    }

    /// What is said about the end.
    fn last_words(&self, ending: &Ending) -> Vec<String> {
        if self.quiet && is_plain(ending) {
            return Vec::new();
        }
        std::iter::once(summary(ending)).chain(self.hints(ending)).collect()
    }

    /// What to look at when the build itself could not say what went wrong.
    fn hints(&self, ending: &Ending) -> Vec<String> {
        match ending.cause {
            Cause::Nobody => self.place.hints_about_nobody(),
            Cause::Lost => vec![
                "look at: was the builder evicted, out of memory or deleted, or its network cut?".into(),
                "everything that had arrived is above; raise --lost-timeout if it comes back later than that".into(),
            ],
            Cause::Itself | Cause::Other => Vec::new(),
        }
    }

    async fn say(&self, line: &str) {
        drop(self.own_lines.send(Notice::Line(line.to_owned())).await); // a printer that is gone prints nothing
    }
}

/// Why nobody reads any more, once; then never again.
async fn recv(gone: &mut Option<Gone>) -> String {
    match gone {
        Some(gone) => match gone.await {
            Ok(reason) => reason,
            Err(_) => std::future::pending().await, // the printer ended without being left alone
        },
        None => std::future::pending().await,
    }
}

/// What a signal says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    HungUp,
    ToStop(&'static str),
}

/// Signals that say the pusher is gone, or wants to stop.
struct Hangups {
    hangup: Signal,
    interrupt: Signal,
    terminate: Signal,
}

impl Hangups {
    fn catch() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Cancel safe.
    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.hangup.recv() => Asked::HungUp,
            _ = self.interrupt.recv() => Asked::ToStop("interrupted"),
            _ = self.terminate.recv() => Asked::ToStop("the hook was told to end"),
        }
    }
}
