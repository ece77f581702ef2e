//! `phonehome-server serve`.

use std::{
    ffi::OsString,
    fs,
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use anyhow::{Context, ensure};
use bytesize::ByteSize;
use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum, builder::Resettable};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tracing::{info, warn};

use super::{
    Args, Format, Level,
    given::Given,
    hook_args::{Limit, duration},
};
use crate::{
    ClientAuth, Clocks, Config, Durability, KeySource, Server,
    keeper::Care,
    lifecycle::{Destination, LabelForm},
    retention::Policy,
    secret::Secret,
    serve::{Outfit, Settings, Stood},
    strangers::StrangerLimits,
    tokens::{GivenTokens, NewToken},
};

/// Receives any number of builds, keeps them, and serves an API to watch and read them
///
/// One port for agents and API. Everything is kept below --data, as files that ordinary tools can read.
#[derive(Parser)]
pub(super) struct ServeArgs {
    /// Directory where everything is kept
    #[arg(long, value_name = "DIR", env = "PHONEHOME_DATA", help_heading = "Storage")]
    data: Option<PathBuf>,

    /// Address to bind; port 0 lets the system choose
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:8443",
        env = "PHONEHOME_LISTEN",
        help_heading = "Address"
    )]
    listen: SocketAddr,

    /// Address that agents are told, such as wss://logs.example [default: as the launcher reaches this server]
    #[arg(long, value_name = "URL", env = "PHONEHOME_ADVERTISE", help_heading = "Address")]
    advertise: Option<String>,

    /// Speak TLS with a key of the server's own, which agents recognise by its pin
    #[arg(long, env = "PHONEHOME_TLS_SELF_SIGNED", help_heading = "Address")]
    tls_self_signed: bool,

    /// Certificate of this server and those above it, PEM; read again when it changes
    #[arg(
        long,
        value_name = "FILE",
        env = "PHONEHOME_TLS_CERT",
        requires = "tls_key",
        conflicts_with = "tls_self_signed",
        help_heading = "Address"
    )]
    tls_cert: Option<PathBuf>,

    /// Its private key, PEM, not encrypted
    #[arg(long, value_name = "FILE", env = "PHONEHOME_TLS_KEY", requires = "tls_cert", help_heading = "Address")]
    tls_key: Option<PathBuf>,

    /// Ask callers for a certificate signed by one of these, PEM
    #[arg(long, value_name = "FILE", env = "PHONEHOME_CLIENT_CA", help_heading = "Address")]
    client_ca: Option<PathBuf>,

    /// What becomes of callers without one
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "required",
        env = "PHONEHOME_CLIENT_AUTH",
        help_heading = "Address"
    )]
    client_auth: Needed,

    /// Allow addresses beyond this machine without TLS
    #[arg(long, env = "PHONEHOME_INSECURE", help_heading = "Address")]
    insecure: bool,

    /// What an acknowledgement promises
    #[arg(long, value_name = "WHAT", default_value = "fsync", env = "PHONEHOME_DURABILITY", help_heading = "Storage")]
    durability: Promise,

    /// Compress the logs of a build this long after its end; off for never
    #[arg(long, value_name = "TIME", default_value = "10m", env = "PHONEHOME_SEAL_AFTER", help_heading = "Storage")]
    seal_after: Limit,

    /// Remove ended builds this long after their end; off for never
    #[arg(long, value_name = "TIME", default_value = "off", env = "PHONEHOME_KEEP_FOR", help_heading = "Storage")]
    keep_for: Limit,

    /// Keep at most so many ended builds, the oldest go first
    #[arg(long, value_name = "N", env = "PHONEHOME_KEEP_BUILDS", help_heading = "Storage")]
    keep_builds: Option<u64>,

    /// Keep ended builds while they have at most this much on the disk together, such as 100GiB; the oldest go first
    #[arg(long, value_name = "SIZE", env = "PHONEHOME_KEEP_BYTES", help_heading = "Storage")]
    keep_bytes: Option<ByteSize>,

    /// What a build may store; output beyond is not kept, which its log says, and the build goes on; off for no limit
    #[arg(long, value_name = "SIZE", default_value = "10GiB", env = "PHONEHOME_BUILD_QUOTA", help_heading = "Limits")]
    build_quota: Quota,

    /// Bytes per second that a build may send; one that sends more is slowed down; off for no limit
    #[arg(long, value_name = "SIZE", default_value = "off", env = "PHONEHOME_BUILD_RATE", help_heading = "Limits")]
    build_rate: Quota,

    /// Space on the disk that stays free of output: with less, agents wait, while ends and verdicts still fit
    #[arg(long, value_name = "SIZE", default_value = "256MiB", env = "PHONEHOME_MIN_FREE", help_heading = "Limits")]
    min_free: ByteSize,

    /// Builds that may run at once
    #[arg(long, value_name = "N", default_value = "20000", env = "PHONEHOME_MAX_BUILDS", help_heading = "Limits")]
    max_builds: usize,

    /// Agents that may be connected at once; others are told to come back
    #[arg(long, value_name = "N", default_value = "12000", env = "PHONEHOME_MAX_AGENTS", help_heading = "Limits")]
    max_agents: usize,

    /// Sockets that have not shown a token yet; when there are more, the oldest gives way
    #[arg(long, value_name = "N", default_value = "512", env = "PHONEHOME_MAX_STRANGERS", help_heading = "Limits")]
    max_strangers: usize,

    /// The same for one address; an IPv6 network of 64 bits is one. Raise it when a proxy hides all callers behind one
    #[arg(
        long,
        value_name = "N",
        default_value = "64",
        env = "PHONEHOME_MAX_STRANGERS_PER_ADDRESS",
        help_heading = "Limits"
    )]
    max_strangers_per_address: usize,

    /// How long connections get to end when the server is told to stop
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = duration, env = "PHONEHOME_DRAIN_TIMEOUT", help_heading = "Limits")]
    drain_timeout: Duration,

    /// Limit for a whole build, unless it is declared with another; off for none
    #[arg(long, value_name = "TIME", default_value = "1h", env = "PHONEHOME_TIMEOUT", help_heading = "Clocks")]
    timeout: Limit,

    /// Limit until a builder phones home
    #[arg(long, value_name = "TIME", default_value = "5m", env = "PHONEHOME_CONNECT_TIMEOUT", help_heading = "Clocks")]
    connect_timeout: Limit,

    /// Limit without any output, although the builder lives
    #[arg(long, value_name = "TIME", default_value = "off", env = "PHONEHOME_IDLE_TIMEOUT", help_heading = "Clocks")]
    idle_timeout: Limit,

    /// Limit until a builder that vanished comes back
    #[arg(long, value_name = "TIME", default_value = "2m", env = "PHONEHOME_LOST_TIMEOUT", help_heading = "Clocks")]
    lost_timeout: Limit,

    /// Between TERM and KILL when a build is stopped
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration, env = "PHONEHOME_GRACE_PERIOD", help_heading = "Clocks")]
    grace_period: Duration,

    /// File with the token for everything [default: PHONEHOME_ADMIN_TOKEN, else one is made and shown once]
    #[arg(long, value_name = "FILE", env = "PHONEHOME_ADMIN_TOKEN_FILE", help_heading = "Access")]
    admin_token_file: Option<PathBuf>,

    /// File with the token for reading [default: PHONEHOME_READ_TOKEN, else one is made and shown once]
    #[arg(long, value_name = "FILE", env = "PHONEHOME_READ_TOKEN_FILE", help_heading = "Access")]
    read_token_file: Option<PathBuf>,

    /// Show metrics to everybody, not only with a token
    #[arg(long, env = "PHONEHOME_METRICS_PUBLIC", help_heading = "Access")]
    metrics_public: bool,

    /// One JSON line for each change of a build, to this file; - is standard output
    #[arg(
        long,
        value_name = "PATH",
        default_value = "off",
        env = "PHONEHOME_LIFECYCLE_LOG",
        help_heading = "Lifecycle log"
    )]
    lifecycle_log: PathBuf,

    /// Size at which the file becomes PATH.1 and a new one begins
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "64MiB",
        env = "PHONEHOME_LIFECYCLE_LOG_SIZE",
        help_heading = "Lifecycle log"
    )]
    lifecycle_log_size: ByteSize,

    /// How many of these are kept
    #[arg(
        long,
        value_name = "N",
        default_value = "5",
        env = "PHONEHOME_LIFECYCLE_LOG_KEEP",
        help_heading = "Lifecycle log"
    )]
    lifecycle_log_keep: u32,

    /// Whether labels have an object of their own or are members of the line
    #[arg(
        long,
        value_name = "FORM",
        default_value = "nested",
        env = "PHONEHOME_LIFECYCLE_LABELS",
        help_heading = "Lifecycle log"
    )]
    lifecycle_labels: Form,

    /// Read options from this file as well: TOML, by their long names. Flags and variables win over it
    #[arg(long, value_name = "FILE", env = "PHONEHOME_CONFIG", help_heading = "Configuration")]
    config: Option<PathBuf>,

    /// Print all options as such a file, with where each value comes from, and exit
    #[arg(long, help_heading = "Configuration")]
    pub(super) print_config: bool,

    /// Form of the server's own log, on standard error
    #[arg(long, value_name = "FORMAT", default_value = "json", env = "PHONEHOME_LOG_FORMAT", help_heading = "Own log")]
    pub(super) log_format: Format,

    /// Least severity of it
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "PHONEHOME_LOG_LEVEL", help_heading = "Own log")]
    pub(super) log_level: Level,
}

/// A size, or none.
#[derive(Debug, Clone, Copy)]
struct Quota(Option<ByteSize>);

impl FromStr for Quota {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" { Ok(Self(None)) } else { text.parse().map(|size| Self(Some(size))) }
    }
}

/// Checks a file for `serve --config` and exits
///
/// Only the file counts: neither flags nor variables are looked at.
#[derive(Parser)]
pub(super) struct CheckConfigArgs {
    /// The file
    file: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Needed {
    /// They are turned away.
    Required,
    /// They are let in.
    Optional,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    /// In `labels`.
    Nested,
    /// Beside the others.
    Flat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Promise {
    /// Synced to the disk: survives a crash of the machine.
    Fsync,
    /// With the operating system: survives a crash of this process.
    Os,
}

/// Everything `serve` needs, checked.
struct Checked {
    config: Config,
    settings: Settings,
    outfit: Outfit,
    drain_timeout: Duration,
}

/// Descriptors that are not agents' sockets: three files of each of 1,536 attempts, and what callers and readers have.
const OTHER_DESCRIPTORS: usize = 8000;

/// Longest file with a token, bytes.
const MAX_TOKEN: u64 = 4096;

/// How long the last lines of the lifecycle log may take.
const LAST_LINES: Duration = Duration::from_secs(2);

/// How long a reload may take before the service manager is told that it is over.
const RELOAD: Duration = Duration::from_secs(5);

/// Prints to standard output.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

/// Says what is wrong with a file of options, if anything is.
pub(super) fn check(args: &CheckConfigArgs) -> anyhow::Result<()> {
    let command = Args::command().mut_subcommand("serve", |serve| serve.mut_args(|arg| arg.env(Resettable::Reset)));
    let line = ["phonehome-server", "serve"].map(OsString::from);
    let given = Given::with_file(command, &line, &args.file).map_err(|usage| anyhow::anyhow!("{}", usage.render()))?;
    let serve = given.matches.subcommand_matches("serve").context("there are no options")?;
    let at = || args.file.display().to_string();
    checked(&ServeArgs::from_arg_matches(serve)?, |_| None).with_context(at)?;
    print(&format!("{} is fine\n", at()))
}

/// Serves until the process is told to stop.
pub(super) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let checked = checked(args, |name| std::env::var(name).ok().filter(|text| !text.is_empty()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(checked))?;
    runtime.shutdown_background(); // a read may be stuck on a disk
    Ok(())
}

async fn serve(checked: Checked) -> anyhow::Result<()> {
    let mut signals = Signals::catch()?;
    raise_descriptor_limit(checked.settings.max_agents);
    let writes_lines = matches!(checked.outfit.lifecycle, Some((Destination::Stdout, _)));
    let Stood { server, standing, new_tokens, renewal } =
        Server::stand(checked.config, checked.settings, checked.outfit).await?;
    show(&new_tokens, writes_lines)?;
    let (asks, asked) = mpsc::channel(1);
    match renewal {
        Some(renewal) => drop(tokio::spawn(renewal.run(phonehome_env::Env::real(), asked))), // it ends with the runtime
        None => drop(asked), // there is nothing to look at
    }
    if let Some(every) = sd_notify::watchdog_enabled() {
        tokio::spawn(watch(every / 2));
    }
    info!(address = %server.local_addr(), pin = server.pin(), "serving");
    notify(&[NotifyState::Ready]);
    while signals.next().await == Asked::Reload {
        reload(&asks).await;
    }
    info!("told to stop");
    notify(&[NotifyState::Stopping]);
    tokio::select! {
        drained = timeout(checked.drain_timeout, server.drain()) => if drained.is_err() {
            warn!("not all agents have left in time, their connections are cut");
        },
        () = signals.stop() => info!("told again, ending at once"),
    }
    server.shutdown(Duration::ZERO).await;
    if let Some(lifecycle) = standing.shared.lifecycle.get() {
        lifecycle.flush(LAST_LINES).await;
    }
    Ok(())
}

/// One for each agent's socket, and those of files, readers and callers, as far as the system allows it.
fn raise_descriptor_limit(agents: usize) {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        warn!("the limit of descriptors cannot be raised: {error}");
    }
    let wanted = agents.saturating_add(OTHER_DESCRIPTORS);
    if let Some(limit) = getrlimit(Resource::Nofile).current.filter(|limit| *limit < wanted as u64) {
        warn!("{agents} agents may need {wanted} descriptors, the limit is {limit}: raise it, or lower --max-agents");
    }
}

/// Shows tokens that were made, the only time that anybody can see them. The log never has them.
fn show(tokens: &[NewToken], on_stderr: bool) -> anyhow::Result<()> {
    for NewToken { info, secret } in tokens {
        let name = info.scope.name();
        let text = format!("phonehome: made the {name} token, shown only now: {}\n", secret.expose());
        if on_stderr {
            std::io::stderr().write_all(text.as_bytes())?;
        } else {
            print(&text)?;
        }
    }
    Ok(())
}

/// Looks at the certificate's files at once.
async fn reload(asks: &mpsc::Sender<oneshot::Sender<()>>) {
    info!("told to reload");
    let now = NotifyState::monotonic_usec_now(); // without it the manager just does not know since when
    notify(&std::iter::once(NotifyState::Reloading).chain(now).collect::<Vec<_>>());
    let (done, reloaded) = oneshot::channel();
    if asks.send(done).await.is_ok() {
        drop(timeout(RELOAD, reloaded).await); // it goes on whatever came of it, and the log says what
    }
    notify(&[NotifyState::Ready]);
}

/// Tells the service manager, if there is one.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!("the service manager cannot be told: {error}");
    }
}

/// Tells the service manager that tasks make progress.
async fn watch(every: Duration) {
    loop {
        notify(&[NotifyState::Watchdog]);
        sleep(every).await;
    }
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Reload,
    Stop,
}

struct Signals {
    hangup: Signal,
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn catch() -> anyhow::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Cancel safe.
    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.hangup.recv() => Asked::Reload,
            _ = self.interrupt.recv() => Asked::Stop,
            _ = self.terminate.recv() => Asked::Stop,
        }
    }

    /// Completes at the next signal to stop.
    async fn stop(&mut self) {
        while self.next().await != Asked::Stop {}
    }
}

/// Checks what was given. `variable` tells what has no option.
fn checked(args: &ServeArgs, variable: impl Fn(&str) -> Option<String>) -> anyhow::Result<Checked> {
    let data = args.data.clone().context("there is no data directory: give --data DIR")?;
    ensure!(
        args.tls_cert.is_some() == args.tls_key.is_some(),
        "--tls-cert and --tls-key belong together: give both, or neither"
    );
    if let Some(url) = &args.advertise {
        let is_address = url.starts_with("wss://") || url.starts_with("ws://");
        ensure!(is_address, "--advertise {url}: agents need an address such as wss://logs.example");
    }
    let key = key_source(args, &data);
    ensure!(
        args.listen.ip().is_loopback() || key.is_some() || args.insecure,
        "{} can be reached from other machines: use TLS, or --insecure when something in front encrypts",
        args.listen
    );
    ensure!(key.is_some() || args.client_ca.is_none(), "--client-ca needs TLS: --tls-cert or --tls-self-signed");
    ensure!(args.max_strangers > 0 && args.max_strangers_per_address > 0, "nobody could connect with 0 strangers");
    let clients = args.client_ca.clone().map(|ca| ClientAuth { ca, required: args.client_auth == Needed::Required });
    let token = |name: &str, file: Option<&Path>| match (variable(name), file) {
        (Some(text), _) => Ok(Some(Secret::new(text))),
        (None, Some(file)) => read_token(file).map(Some),
        (None, None) => anyhow::Ok(None),
    };
    let outfit = Outfit {
        clients,
        tokens: GivenTokens {
            admin: token("PHONEHOME_ADMIN_TOKEN", args.admin_token_file.as_deref())?,
            read: token("PHONEHOME_READ_TOKEN", args.read_token_file.as_deref())?,
        },
        strangers: StrangerLimits { total: args.max_strangers, per_address: args.max_strangers_per_address },
        lifecycle: lifecycle(args),
        key,
    };
    let durability = match args.durability {
        Promise::Fsync => Durability::Fsync,
        Promise::Os => Durability::Os,
    };
    let tls = outfit.key.is_some();
    let config = Config { listen: args.listen, tls, data, durability };
    Ok(Checked { config, settings: settings(args, tls), outfit, drain_timeout: args.drain_timeout })
}

fn key_source(args: &ServeArgs, data: &Path) -> Option<KeySource> {
    match (&args.tls_cert, &args.tls_key) {
        (Some(certificates), Some(key)) => {
            Some(KeySource::Files { certificates: certificates.clone(), key: key.clone() })
        }
        _ if args.tls_self_signed => {
            let uri = args.advertise.as_ref().and_then(|url| url.parse::<http::Uri>().ok());
            let host = uri.and_then(|uri| uri.host().map(|host| host.trim_matches(['[', ']']).to_owned()));
            let names = ["localhost".to_owned(), "127.0.0.1".to_owned()].into_iter().chain(host);
            Some(KeySource::Kept { dir: data.join("tls"), names: names.collect() })
        }
        _ => None,
    }
}

fn lifecycle(args: &ServeArgs) -> Option<(Destination, LabelForm)> {
    let form = match args.lifecycle_labels {
        Form::Nested => LabelForm::Nested,
        Form::Flat => LabelForm::Flat,
    };
    let destination = match args.lifecycle_log.to_str() {
        Some("off") => return None,
        Some("-") => Destination::Stdout,
        Some(_) | None => Destination::File {
            path: args.lifecycle_log.clone(),
            size: args.lifecycle_log_size.as_u64(),
            keep: args.lifecycle_log_keep,
        },
    };
    Some((destination, form))
}

/// A token that ends where its line does.
fn read_token(path: &Path) -> anyhow::Result<Secret> {
    let size = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    ensure!(size <= MAX_TOKEN, "{} is larger than {MAX_TOKEN} bytes: it holds no token", path.display());
    let text = zeroize::Zeroizing::new(fs::read(path).with_context(|| format!("cannot read {}", path.display()))?);
    let text = std::str::from_utf8(&text).ok().with_context(|| format!("{} holds no token", path.display()))?;
    Ok(Secret::new(text.trim_end().to_owned()))
}

fn settings(args: &ServeArgs, tls: bool) -> Settings {
    Settings {
        timeouts: Clocks {
            connect: args.connect_timeout.0,
            idle: args.idle_timeout.0,
            lost: args.lost_timeout.0,
            total: args.timeout.0,
            grace: args.grace_period,
        },
        advertise: args.advertise.clone(),
        tls,
        max_builds: args.max_builds,
        max_agents: args.max_agents,
        build_rate: args.build_rate.0.map(|size| size.as_u64()),
        build_quota: args.build_quota.0.map(|size| size.as_u64()),
        min_free: args.min_free.as_u64(),
        care: Care {
            seal_after: args.seal_after.0,
            policy: Policy {
                keep_for: args.keep_for.0,
                keep_builds: args.keep_builds,
                keep_bytes: args.keep_bytes.map(|size| size.as_u64()),
            },
        },
        metrics_public: args.metrics_public,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_stands_in_the_documentation_with_its_variable_and_its_default() {
        let page = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/server.md"));
        for arg in ServeArgs::command().get_opts() {
            let name = arg.get_long().expect("an option has a long name");
            let forms = [format!("`--{name}`"), format!("`--{name} ")];
            let is_row = |line: &&str| {
                let option = line.split(" | ").next().unwrap_or_default();
                option.starts_with("| `--") && forms.iter().any(|form| option.contains(form))
            };
            let row = page.lines().find(is_row).unwrap_or_else(|| panic!("--{name} has no row"));
            if let Some(variable) = arg.get_env() {
                assert!(row.contains(&format!("`{}`", variable.to_string_lossy())), "--{name}: {row}");
            }
            for default in arg.get_default_values().iter().filter(|_| arg.get_action().takes_values()) {
                assert!(row.contains(&format!("`{}`", default.to_string_lossy())), "--{name}: {row}");
            }
        }
    }
}
