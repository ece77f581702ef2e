//! What the agent is told: [`Args`] as typed, [`Config`] as checked.

mod address;
mod args;
mod complaint;
mod file;
mod given;
mod labels;
mod redact;
mod show;
mod siblings;
mod supervision;

use std::{
    ffi::{OsStr, OsString},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytesize::ByteSize;
use phonehome_env::trust::parse_pin;
pub use phonehome_env::{
    proxy::{Proxy, ProxySettings},
    secret::Secret,
    trust::Trust,
};
use phonehome_proto::{
    id::{BuildId, NameError, StepName},
    limits::MIN_WINDOW,
};
use zeroize::Zeroizing;

pub(crate) use self::given::nothing_but_a_command;
pub use self::{
    address::Address,
    args::{Args, Level, Limit, OnOffline, Overflow, Start, Switch},
    given::Given,
    labels::{LabelList, LabelsArgs, LabelsConfig},
    redact::{Origin, RedactArgs, RedactError},
    siblings::{
        BirthDep, ExpectedExits, ExpectedExitsError, List, Pattern, Probe, ProbeError, ReadyWhen, SiblingName,
        SiblingsArgs, SiblingsConfig, Stage, WaitFor, WaitForError,
    },
    supervision::{Leftovers, Notice, Rewrites, Supervision, SupervisionArgs, User, Window},
};

use crate::redact::Redactor;

/// What the agent needs, checked: every value here can be used as it is.
#[derive(Debug)]
pub struct Config {
    /// The server; `None` runs the command unobserved.
    pub home: Option<Home>,
    /// Program and arguments, at least one.
    pub command: Vec<OsString>,
    /// Whether to copy output to the agent's own.
    pub tee: bool,
    /// Whether both streams share one pipe.
    pub merge: bool,
    /// How it is run and ended.
    pub supervision: Supervision,
    /// How long the last bytes may take to reach the server once the command has ended.
    pub linger: Duration,
    /// Whether to wait for the server before the command starts.
    pub start: Start,
    /// What becomes of output that the server has not confirmed.
    pub spool: SpoolConfig,
    /// Whether a log that was not delivered complete is a failure.
    pub require_delivery: bool,
    /// What its output may not show.
    pub redactor: Option<Redactor>,
    /// What is done about the other containers of the pod.
    pub siblings: SiblingsConfig,
}

/// What becomes of output that the server has not confirmed.
#[derive(Debug, Clone)]
pub struct SpoolConfig {
    /// Most bytes held in memory.
    pub memory: u64,
    /// Directory for more.
    pub dir: Option<PathBuf>,
    /// Most bytes there.
    pub limit: u64,
    /// What happens when that is full.
    pub overflow: Overflow,
    /// How long nothing may be confirmed; `None` for no limit.
    pub offline_limit: Option<Duration>,
    /// What happens then.
    pub on_offline: OnOffline,
}

/// The server to phone and who calls.
#[derive(Debug)]
pub struct Home {
    /// Where and how to connect.
    pub address: Address,
    /// The build.
    pub build: BuildId,
    /// Its step.
    pub step: StepName,
    /// Bearer secret.
    pub token: Option<Secret>,
    /// How to know the server.
    pub trust: Trust,
    /// What the build is called besides, for those who look for it.
    pub labels: LabelsConfig,
}
impl Config {
    /// Checks what was typed. `variable` reads the environment.
    ///
    /// # Errors
    ///
    /// With the first thing that is wrong, and what to do about it.
    pub fn try_from_args(
        args: Args,
        proxy: &ProxySettings,
        variable: impl Fn(&OsStr) -> Option<OsString>,
    ) -> Result<Self, ConfigError> {
        let spool = SpoolConfig::try_from_args(&args)?;
        let supervision = Supervision::try_from_args(&args.supervision, args.merge)?;
        supervision.check(args.linger);
        if args.require_delivery && args.url.is_none() {
            return Err(ConfigError::NowhereToDeliver);
        }
        let home = args.url.as_deref().map(|url| Home::try_from_args(url, &args, proxy)).transpose()?;
        let own_token = home.as_ref().and_then(|home| home.token.as_ref());
        Ok(Self {
            redactor: args.redact.redactor(own_token, variable)?,
            tee: args.tee == Switch::On,
            merge: args.merge,
            supervision,
            linger: args.linger,
            start: args.start,
            spool,
            require_delivery: args.require_delivery,
            siblings: SiblingsConfig {
                probe_user: args.supervision.user,
                ..SiblingsConfig::try_from_args(&args.siblings)?
            },
            command: args.command.clone(),
            home,
        })
    }
}

impl Config {
    /// Whether the output has to be read even if it goes nowhere.
    #[must_use]
    pub fn looks_at_output(&self) -> bool {
        let is_searched = matches!(self.siblings.ready_when, Some(ReadyWhen::Output(_)));
        self.redactor.is_some() || is_searched || self.merge || self.supervision.pty.is_some()
    }

    /// Adds what the variables of a pod tell about it to the labels.
    #[must_use]
    pub fn identified(mut self, variable: impl Fn(&str) -> Option<String>) -> Self {
        self.home = self.home.map(|home| Home { labels: home.labels.identified(variable), ..home });
        self
    }
}

impl SpoolConfig {
    fn try_from_args(args: &Args) -> Result<Self, ConfigError> {
        if args.spool_memory.as_u64() < MIN_MEMORY {
            return Err(ConfigError::SmallMemory(args.spool_memory));
        }
        if args.spool_limit.as_u64() < MIN_DISK {
            return Err(ConfigError::SmallSpool(args.spool_limit));
        }
        Ok(Self {
            memory: args.spool_memory.as_u64(),
            dir: args.spool_dir.clone(),
            limit: args.spool_limit.as_u64(),
            overflow: args.overflow,
            offline_limit: args.offline_limit.0,
            on_offline: args.on_offline,
        })
    }
}

impl Home {
    fn try_from_args(url: &str, args: &Args, proxy: &ProxySettings) -> Result<Self, ConfigError> {
        let name = |option| move |source| ConfigError::BadName { option, source };
        Ok(Self {
            address: Address::parse(url, proxy)?,
            build: args.build.as_deref().ok_or(ConfigError::NoBuild)?.parse().map_err(name("--build"))?,
            step: args.step.as_deref().map_or(Ok(StepName::default()), str::parse).map_err(name("--step"))?,
            token: token(args)?,
            trust: trust(args)?,
            labels: args.labels.clone().into(),
        })
    }
}

/// The token, which becomes an HTTP header.
fn token(args: &Args) -> Result<Option<Secret>, ConfigError> {
    let text = match (&args.token, &args.token_variable, &args.token_file) {
        (Some(token), _, _) => Zeroizing::new(token.clone()),
        (None, Some(token), _) => Zeroizing::new(token.expose().to_owned()),
        (None, None, Some(path)) => read(path)?,
        (None, None, None) => return Ok(None),
    };
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(ConfigError::BadToken);
    }
    Ok(Some(Secret::new(token.to_owned())))
}

fn read(path: &Path) -> Result<Zeroizing<String>, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
    phonehome_env::file::read_text(path, MAX_TOKEN).map_err(unreadable)
}

/// Most bytes of a file with a token: more than any header has room for.
const MAX_TOKEN: usize = 8 * 1024;

fn trust(args: &Args) -> Result<Trust, ConfigError> {
    let client = match (&args.client_cert, &args.client_key) {
        (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
        (None, None) => None,
        (Some(_), None) | (None, Some(_)) => return Err(ConfigError::HalfIdentity),
    };
    let pin = args.pin.as_deref().map(|pin| parse_pin(pin).ok_or(ConfigError::BadPin)).transpose()?;
    Ok(Trust { ca: args.ca.clone(), pin, client })
}

/// What is wrong with the options, and what to do. None of these texts repeats a secret.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A name breaks its grammar.
    #[error("{option} is not a name")]
    BadName {
        /// The option it was given with.
        option: &'static str,
        /// What is wrong with it.
        source: NameError,
    },
    /// The pin is not one.
    #[error("--pin must be sha256: and 64 hexadecimal digits")]
    BadPin,
    /// The proxy's address is unusable.
    #[error("HTTPS_PROXY must be http://[user:password@]host[:port]")]
    BadProxy,
    /// The token cannot be an HTTP header.
    #[error("the token must be one line of visible ASCII characters")]
    BadToken,
    /// The address is unusable.
    #[error("--url cannot be used: {why}")]
    BadUrl {
        /// What is wrong with it.
        why: &'static str,
    },
    /// One half of a client identity.
    #[error("--client-cert and --client-key belong together: give both or none")]
    HalfIdentity,
    /// An address, but nothing to say who calls.
    #[error("--url needs --build (or PHONEHOME_BUILD) to say which build this is")]
    NoBuild,
    /// A delivery is required, and there is no server.
    #[error("--require-delivery needs --url (or PHONEHOME_URL)")]
    NowhereToDeliver,
    /// A size for a terminal, and no terminal.
    #[error("--pty-size needs --pty (or PHONEHOME_PTY)")]
    SizeWithoutTerminal,
    /// A value cannot be redacted.
    #[error(transparent)]
    Redact(#[from] RedactError),
    /// A container cannot depend on itself.
    #[error("{option} names {name}, which is this container itself (--name)")]
    OwnDependency {
        /// The option it was given with.
        option: &'static str,
        /// The name.
        name: SiblingName,
    },
    /// Hardly a record would fit.
    #[error("--spool-memory {0} is too small, use 256KiB or more")]
    SmallMemory(ByteSize),
    /// Hardly anything would fit.
    #[error("--spool-limit {0} is too small, use 1MiB or more")]
    SmallSpool(ByteSize),
    /// A file that an option names.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Smallest memory, bytes: room for a full record on its way, one on its way to the disk and one being read.
const MIN_MEMORY: u64 = 256 * 1024;
const _: () = assert!(MIN_MEMORY > 3 * MIN_WINDOW);

/// Smallest directory, bytes.
const MIN_DISK: u64 = 1024 * 1024;
#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn checks_say_what_to_do() {
        for (args, expected) in [
            (&["--url", "ws://h", "--", "x"][..], "--build"),
            (&["--url", "ws://h", "--build", "a/b", "--", "x"], "--build is not a name"),
            (&["--spool-memory", "1KiB", "--", "x"], "too small"),
            (&["--url", "ws://h", "--build", "b", "--pin", "abc", "--", "x"], "sha256:"),
            (&["--url", "ws://h", "--build", "b", "--client-key", "k", "--", "x"], "both"),
            (&["--url", "ws://h", "--build", "b", "--token", "a b", "--", "x"], "visible ASCII"),
            (&["--url", "ws://h", "--build", "b", "--token-file", "/nowhere", "--", "x"], "/nowhere"),
        ] {
            let args = Args::try_parse_from(std::iter::once(&"agent").chain(args)).unwrap();
            let failure = Config::try_from_args(args, &ProxySettings::default(), |_| None).unwrap_err();
            assert!(failure.to_string().contains(expected), "{failure}");
        }
    }
}
