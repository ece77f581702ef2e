//! The command line: [`Args`] as typed, [`Config`] as checked.

use std::{
    ffi::{OsStr, OsString},
    fmt, io,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use bytesize::ByteSize;
use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum, builder::Resettable, error::ErrorKind};
use http::Uri;
use phonehome_proto::{
    id::{BuildId, NameError, StepName},
    limits::MIN_WINDOW,
};
use zeroize::Zeroizing;

use crate::{failure::EXIT_FAILURE, log::Format};

/// Runs a build command, streams its output to a phonehome server and exits as the command did.
///
/// Made to be the entrypoint of a builder image. The command's standard output and standard error are copied to the
/// agent's own (--tee) and sent to the server, which confirms every byte; after the command's end the agent stays
/// until the server has accepted the whole log, or for --linger. Whatever happens on the network, the exit code is
/// the command's.
///
/// Every option can be given as a variable instead, shown in brackets; a flag wins over its variable.
#[derive(Parser)]
#[command(
    name = "phonehome-agent",
    version,
    after_help = "Exit code: the command's; 128+N when signal N ended it; 127 command not found; 126 not executable; \
                  143 when TERM came before it was started; 125 when the agent itself could not do its work.\n\n\
                  Example: phonehome-agent --url wss://10.0.0.7:4443 --build 42 --token-file /run/token -- make all",
    max_term_width = 100
)]
pub struct Args {
    /// Where to phone home: wss://HOST:PORT[/PREFIX], or ws:// without encryption. Without it the command runs unobserved
    ///
    /// A wss:// address is reached through the proxy in HTTPS_PROXY, unless NO_PROXY names its host.
    #[arg(long, env = "PHONEHOME_URL", value_name = "URL", help_heading = "Where to")]
    pub url: Option<String>,

    /// Build this output belongs to; required with a URL
    #[arg(long, env = "PHONEHOME_BUILD", value_name = "ID", help_heading = "Where to")]
    pub build: Option<String>,

    /// Step of the build, usually one per container [default: main]
    #[arg(long, env = "PHONEHOME_STEP", value_name = "NAME", help_heading = "Where to")]
    pub step: Option<String>,

    /// Secret of this build; never shown, never passed on to the command. Prefer the variable or --token-file
    #[arg(long, env = "PHONEHOME_TOKEN", value_name = "TOKEN", hide_env_values = true, help_heading = "Trust")]
    pub token: Option<String>,

    /// File that holds the token
    #[arg(long, env = "PHONEHOME_TOKEN_FILE", value_name = "PATH", help_heading = "Trust")]
    pub token_file: Option<PathBuf>,

    /// PEM file of roots to trust, in place of the system's
    #[arg(long, env = "PHONEHOME_CA", value_name = "PATH", help_heading = "Trust")]
    pub ca: Option<PathBuf>,

    /// Public key the server must have, sha256:HEX of its SubjectPublicKeyInfo. Needs no CA, and wins over --ca
    #[arg(long, env = "PHONEHOME_PIN", value_name = "PIN", help_heading = "Trust")]
    pub pin: Option<String>,

    /// PEM file of this agent's certificate, for mutual TLS
    #[arg(long, env = "PHONEHOME_CLIENT_CERT", value_name = "PATH", help_heading = "Trust")]
    pub client_cert: Option<PathBuf>,

    /// PEM file of its private key
    #[arg(long, env = "PHONEHOME_CLIENT_KEY", value_name = "PATH", help_heading = "Trust")]
    pub client_key: Option<PathBuf>,

    /// Copy the command's output to the agent's own as well, so that the node's log still works
    #[arg(long, env = "PHONEHOME_TEE", value_name = "WHEN", default_value = "on", help_heading = "Output")]
    pub tee: Switch,

    /// One pipe for both streams: their exact order, but no distinction; all of it is stdout
    #[arg(long, env = "PHONEHOME_MERGE", value_parser = clap::builder::FalseyValueParser::new(), help_heading = "Output")]
    pub merge: bool,

    /// How long to stay after the command's end until the server has accepted its log
    #[arg(long, env = "PHONEHOME_LINGER", value_name = "TIME", default_value = "30s", value_parser = duration, help_heading = "Delivery")]
    pub linger: Duration,

    /// Start the command now and hold its output until the server answers, or wait for the server first
    #[arg(long, env = "PHONEHOME_START", value_name = "WHEN", default_value = "now", help_heading = "Delivery")]
    pub start: Start,

    /// Memory for output that the server has not confirmed yet. When it is full the command waits; nothing is lost
    #[arg(
        long,
        env = "PHONEHOME_SPOOL_MEMORY",
        value_name = "SIZE",
        default_value = "8MiB",
        help_heading = "Delivery"
    )]
    pub spool_memory: ByteSize,

    /// Directory for output that the server does not confirm in time, when memory is not enough and for the next agent
    /// after a restart of the container. Without it there is memory only
    #[arg(long, env = "PHONEHOME_SPOOL_DIR", value_name = "PATH", help_heading = "Delivery")]
    pub spool_dir: Option<PathBuf>,

    /// Most bytes in that directory
    #[arg(long, env = "PHONEHOME_SPOOL_LIMIT", value_name = "SIZE", default_value = "1GiB", help_heading = "Delivery")]
    pub spool_limit: ByteSize,

    /// When all of that is full: block the command, so that nothing is lost, or drop the middle of the output and say how
    /// much
    #[arg(long, env = "PHONEHOME_OVERFLOW", value_name = "POLICY", default_value = "block", help_heading = "Delivery")]
    pub overflow: Overflow,

    /// How long the server may confirm nothing before --on-offline applies; off for no limit
    #[arg(long, env = "PHONEHOME_OFFLINE_LIMIT", value_name = "TIME", default_value = "10m", value_parser = limit, help_heading = "Delivery")]
    pub offline_limit: Limit,

    /// After that: continue, no longer waiting for room, or stop the command
    #[arg(
        long,
        env = "PHONEHOME_ON_OFFLINE",
        value_name = "WHAT",
        default_value = "continue",
        help_heading = "Delivery"
    )]
    pub on_offline: OnOffline,

    /// Exit with 125 when the server has not accepted the complete log. Otherwise delivery never changes the exit code
    #[arg(long, env = "PHONEHOME_REQUIRE_DELIVERY", value_parser = clap::builder::FalseyValueParser::new(), help_heading = "Delivery")]
    pub require_delivery: bool,

    /// Form of the agent's own log, on standard error
    #[arg(long, env = "PHONEHOME_LOG_FORMAT", value_name = "FORMAT", default_value = "text", help_heading = "Own log")]
    pub log_format: Format,

    /// Least severity of it
    #[arg(long, env = "PHONEHOME_LOG_LEVEL", value_name = "LEVEL", default_value = "warn", help_heading = "Own log")]
    pub log_level: Level,

    /// Command to run, with its arguments; they are passed on untouched
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Reads a command line and the variables. An empty variable is one that is not set: manifests often have no other way
/// to say so.
///
/// # Errors
///
/// When it is not one, or asks for help: see [`explain`].
pub fn parse(line: impl IntoIterator<Item = OsString>) -> Result<Args, clap::Error> {
    let is_empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    let mut command = Args::command()
        .mut_args(|arg| if arg.get_env().is_some_and(is_empty) { arg.env(Resettable::Reset) } else { arg });
    let matches = command.try_get_matches_from_mut(line)?;
    Args::from_arg_matches(&matches).map_err(|usage| usage.format(&mut command))
}

/// A time that can be added to the clock.
fn duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if duration > MAX_DURATION { Err("more than 10 years".into()) } else { Ok(duration) }
}

/// A time limit, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit(pub Option<Duration>);

fn limit(text: &str) -> Result<Limit, String> {
    if text == "off" { Ok(Limit(None)) } else { duration(text).map(|limit| Limit(Some(limit))) }
}

/// Longest duration that an option takes: ten years.
const MAX_DURATION: Duration = Duration::from_secs(10 * 366 * 24 * 60 * 60);

/// A choice between two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Do it.
    On,
    /// Leave it.
    Off,
}

/// When to start the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Start {
    /// At once.
    Now,
    /// When the server has welcomed this agent.
    Connected,
}

/// What becomes of output for which there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Overflow {
    /// It stays in the pipe, and the command waits.
    Block,
    /// The middle is left out and counted; the beginning and the newest output stay.
    Drop,
}

/// What to do when the server has been out of reach for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnOffline {
    /// Let the command go on, dropping output if need be.
    Continue,
    /// End the command.
    Stop,
}

/// Least severity of a line in the agent's own log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// The agent failed.
    Error,
    /// A person should look.
    Warn,
    /// One line for each thing that happens.
    Info,
    /// Every decision.
    Debug,
    /// Every frame.
    Trace,
}

/// Prints clap's message and says what to exit with: its own code for a usage error, 2, would look like the command's.
#[must_use]
pub fn explain(usage: &clap::Error) -> ExitCode {
    drop(usage.print()); // there is nowhere left to say that this failed
    if matches!(usage.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_FAILURE)
    }
}

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
    /// How long the last bytes may take to reach the server once the command has ended.
    pub linger: Duration,
    /// Whether to wait for the server before the command starts.
    pub start: Start,
    /// What becomes of output that the server has not confirmed.
    pub spool: SpoolConfig,
    /// Whether a log that was not delivered complete is a failure.
    pub require_delivery: bool,
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
}

/// A phone-home address, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Whether to use TLS.
    pub tls: bool,
    /// Name or IP address; an IPv6 one without its brackets.
    pub host: String,
    /// Port, 443 or 80 when the URL names none.
    pub port: u16,
    /// The agent endpoint: `wss://host:port/prefix/v1/agent`.
    pub endpoint: Uri,
    /// The proxy to go through.
    pub proxy: Option<Proxy>,
}

/// An HTTP proxy that is asked to CONNECT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Name or IP address.
    pub host: String,
    /// Port, 80 when the URL names none.
    pub port: u16,
    /// `user:password`, as the URL has them.
    pub credentials: Option<Secret>,
}

/// How to know the server, and be known to it. Ignored for `ws://`.
#[derive(Debug, Default)]
pub struct Trust {
    /// Roots in place of the system's.
    pub ca: Option<PathBuf>,
    /// SHA-256 of the server's public key.
    pub pin: Option<[u8; 32]>,
    /// Certificate and key of this agent.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// A text that is never shown and is wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Keeps `text`.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// What the environment says about proxies.
#[derive(Debug, Default)]
pub struct ProxySettings {
    proxy: Option<String>,
    exempt: Option<String>,
}

impl ProxySettings {
    /// Reads `HTTPS_PROXY` and `NO_PROXY`, in capitals or small letters.
    #[must_use]
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Self {
        let either = |upper: &str, lower: &str| variable(upper).or_else(|| variable(lower)).filter(|v| !v.is_empty());
        Self { proxy: either("HTTPS_PROXY", "https_proxy"), exempt: either("NO_PROXY", "no_proxy") }
    }

    fn proxy_for(&self, host: &str) -> Result<Option<Proxy>, ConfigError> {
        let Some(proxy) = self.proxy.as_deref().filter(|_| !self.is_exempt(host)) else { return Ok(None) };
        Proxy::parse(proxy).map(Some)
    }

    /// As curl has it: a comma-separated list of hosts and domain suffixes, or `*`.
    fn is_exempt(&self, host: &str) -> bool {
        let Some(exempt) = &self.exempt else { return false };
        exempt.split(',').map(|entry| entry.trim().trim_start_matches('.')).filter(|entry| !entry.is_empty()).any(
            |entry| {
                let suffix = host.len().checked_sub(entry.len()).and_then(|at| host.get(at..));
                let whole = host.len() == entry.len()
                    || host.as_bytes().get(host.len().wrapping_sub(entry.len() + 1)) == Some(&b'.');
                entry == "*" || whole && suffix.is_some_and(|suffix| suffix.eq_ignore_ascii_case(entry))
            },
        )
    }
}

impl Proxy {
    fn parse(text: &str) -> Result<Self, ConfigError> {
        let url = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let uri: Uri = url.parse().map_err(|_| ConfigError::BadProxy)?;
        let authority = uri.authority().ok_or(ConfigError::BadProxy)?;
        if uri.scheme_str() != Some("http") {
            return Err(ConfigError::BadProxy);
        }
        let credentials = authority.as_str().rsplit_once('@').map(|(user, _)| Secret::new(user.to_owned()));
        Ok(Self { host: bare_host(&uri), port: uri.port_u16().unwrap_or(80), credentials })
    }
}

/// A host as a resolver wants it, without the brackets of an IPv6 literal.
fn bare_host(uri: &Uri) -> String {
    let host = uri.host().unwrap_or_default();
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).to_owned()
}

impl Address {
    fn parse(url: &str, proxy: &ProxySettings) -> Result<Self, ConfigError> {
        let bad = |why| ConfigError::BadUrl { why };
        let uri: Uri = url.parse().map_err(|_| bad("it is not a URL"))?;
        let tls = match uri.scheme_str() {
            Some("wss") => true,
            Some("ws") => false,
            _ => return Err(bad("it must start with wss:// or ws://")),
        };
        if tls && cfg!(not(feature = "tls")) {
            return Err(bad("this agent was built without TLS, only ws:// works"));
        }
        let authority = uri.authority().ok_or(bad("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("it must not carry credentials, use --token-file"));
        }
        if uri.query().is_some() {
            return Err(bad("it must not have a query"));
        }
        let prefix = uri.path().trim_end_matches('/');
        let endpoint = format!("{}://{authority}{prefix}/v1/agent", uri.scheme_str().unwrap_or_default());
        let host = bare_host(&uri);
        if host.is_empty() {
            return Err(bad("it has no host"));
        }
        Ok(Self {
            tls,
            proxy: if tls { proxy.proxy_for(&host)? } else { None },
            host,
            port: uri.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            endpoint: endpoint.parse().map_err(|_| bad("its path is not valid"))?,
        })
    }
}

impl Config {
    /// Checks what was typed.
    ///
    /// # Errors
    ///
    /// With the first thing that is wrong, and what to do about it.
    pub fn try_from_args(args: Args, proxy: &ProxySettings) -> Result<Self, ConfigError> {
        let spool = SpoolConfig::try_from_args(&args)?;
        if args.require_delivery && args.url.is_none() {
            return Err(ConfigError::NowhereToDeliver);
        }
        Ok(Self {
            tee: args.tee == Switch::On,
            merge: args.merge,
            linger: args.linger,
            start: args.start,
            spool,
            require_delivery: args.require_delivery,
            command: args.command.clone(),
            home: args.url.as_deref().map(|url| Home::try_from_args(url, &args, proxy)).transpose()?,
        })
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
            trust: Trust::try_from_args(args)?,
        })
    }
}

/// The token, which becomes an HTTP header.
fn token(args: &Args) -> Result<Option<Secret>, ConfigError> {
    let text = match (&args.token, &args.token_file) {
        (Some(token), _) => Zeroizing::new(token.clone()),
        (None, Some(path)) => Zeroizing::new(read(path)?),
        (None, None) => return Ok(None),
    };
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(ConfigError::BadToken);
    }
    Ok(Some(Secret::new(token.to_owned())))
}

fn read(path: &PathBuf) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.clone(), source })
}

impl Trust {
    fn try_from_args(args: &Args) -> Result<Self, ConfigError> {
        let client = match (&args.client_cert, &args.client_key) {
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => return Err(ConfigError::HalfIdentity),
        };
        Ok(Self { ca: args.ca.clone(), pin: args.pin.as_deref().map(parse_pin).transpose()?, client })
    }
}

fn parse_pin(text: &str) -> Result<[u8; 32], ConfigError> {
    let hex = text.strip_prefix("sha256:").ok_or(ConfigError::BadPin)?;
    Ok(hex.parse::<phonehome_proto::id::Digest>().map_err(|_| ConfigError::BadPin)?.0)
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
    use super::*;

    #[test]
    fn an_address_becomes_an_endpoint() {
        let address = |url| Address::parse(url, &ProxySettings::default()).unwrap();
        for (url, endpoint, host, port) in [
            ("ws://h", "ws://h/v1/agent", "h", 80),
            ("ws://h:81/", "ws://h:81/v1/agent", "h", 81),
            ("ws://h/a/b/", "ws://h/a/b/v1/agent", "h", 80),
            ("ws://[::1]:9", "ws://[::1]:9/v1/agent", "::1", 9),
        ] {
            let parsed = address(url);
            assert_eq!((parsed.endpoint.to_string().as_str(), &*parsed.host, parsed.port), (endpoint, host, port));
        }
    }

    #[test]
    fn bad_addresses_say_what_is_wrong() {
        let why = |url| Address::parse(url, &ProxySettings::default()).unwrap_err().to_string();
        assert!(why("http://h").contains("must start with wss://"));
        assert!(why("ws://u:p@h").contains("credentials"));
        assert!(!why("ws://u:hunter2@h").contains("hunter2"));
        assert!(why("ws://h?x=1").contains("query"));
        assert!(why("ws://").contains("not a URL"));
    }

    #[test]
    fn no_proxy_names_hosts_and_domains() {
        let settings =
            ProxySettings { proxy: Some("http://p:3128".into()), exempt: Some("a.example, .b.example".into()) };
        for (host, exempt) in
            [("a.example", true), ("x.a.example", true), ("xa.example", false), ("B.example", true), ("c", false)]
        {
            assert_eq!(settings.proxy_for(host).unwrap().is_none(), exempt, "{host}");
        }
    }

    #[test]
    fn a_proxy_may_have_credentials_and_they_stay_secret() {
        let proxy = Proxy::parse("http://user:hunter2@proxy:3128").unwrap();
        assert_eq!(
            (&*proxy.host, proxy.port, proxy.credentials.as_ref().unwrap().expose()),
            ("proxy", 3128, "user:hunter2")
        );
        assert!(!format!("{proxy:?}").contains("hunter2"));
        assert!(Proxy::parse("socks5://p").is_err());
    }

    #[test]
    fn what_follows_the_command_is_its_own_and_what_precedes_it_is_ours() {
        let args = Args::try_parse_from(["agent", "--merge", "make", "-j8", "--merge", "--", "x"]).unwrap();
        assert_eq!(args.command, ["make", "-j8", "--merge", "--", "x"]);
        let args = Args::try_parse_from(["agent", "--", "--odd-name", "-v"]).unwrap();
        assert_eq!(args.command, ["--odd-name", "-v"]);
        assert!(Args::try_parse_from(["agent", "--no-such-option", "make"]).is_err());
    }

    #[test]
    fn a_duration_has_an_end() {
        assert_eq!(duration("10years"), Ok(humantime::parse_duration("10years").unwrap()));
        assert_eq!(duration("400000000000years"), Err("more than 10 years".into()));
        assert_eq!(duration("11years"), Err("more than 10 years".into()));
    }

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
            let failure = Config::try_from_args(args, &ProxySettings::default()).unwrap_err();
            assert!(failure.to_string().contains(expected), "{failure}");
        }
    }
}
