//! A server process that is started, killed and started again, and what a process takes.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::param::clock_ticks_per_second;
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    time::{sleep, timeout},
};

use super::{Result, options::Options};

/// `phonehome-server serve` with a port and a directory of its own.
pub(crate) struct Program {
    file: PathBuf,
    data: PathBuf,
    address: SocketAddr,
    tls: bool,
    options: Vec<String>,
    /// Gone with this.
    running: Option<Child>,
}

/// Nobody else gets to a server that listens on the loopback for a minute.
const TOKEN: &str = "phonehome_admin_of-a-swarm";

/// How long it may take to listen.
const START_LIMIT: Duration = Duration::from_secs(30);

impl Program {
    pub(crate) fn new(file: &Path, options: &Options) -> Result<Self> {
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?; // it stays free for this moment
        let data = options.data.clone().unwrap_or_default();
        let (file, tls, options) = (file.to_owned(), options.tls, options.server_options.clone());
        Ok(Self { file, data, address, tls, options, running: None })
    }

    pub(crate) async fn start(&mut self) -> Result<()> {
        let mut command = Command::new(&self.file);
        command.arg("serve").arg("--data").arg(&self.data).arg("--listen").arg(self.address.to_string());
        command.args(["--log-level", "warn"]).args(self.tls.then_some("--tls-self-signed")).args(&self.options);
        command.env("PHONEHOME_ADMIN_TOKEN", TOKEN).stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        self.running = Some(command.spawn().map_err(|error| format!("{}: {error}", self.file.display()))?);
        let listening = async {
            while TcpStream::connect(self.address).await.is_err() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        Ok(timeout(START_LIMIT, listening).await.map_err(|_| "the server does not listen")?)
    }

    /// As a machine that loses power does, but for its disk.
    pub(crate) async fn kill(&mut self) -> Result<()> {
        if let Some(mut running) = self.running.take() {
            running.kill().await?;
        }
        Ok(())
    }

    pub(crate) fn url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.address)
    }

    pub(crate) fn token(&self) -> &str {
        TOKEN
    }

    /// 0 when it does not run.
    pub(crate) fn pid(&self) -> u32 {
        self.running.as_ref().and_then(Child::id).unwrap_or(0)
    }
}

/// What a process has and had, proc(5).
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    /// MiB.
    pub(crate) resident: u64,
    /// MiB, at most so far.
    pub(crate) peak: u64,
    pub(crate) descriptors: usize,
    /// Processor time so far, seconds.
    pub(crate) busy: f64,
}

impl Usage {
    pub(crate) fn of(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let mib = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name))?.trim_start_matches(':').trim();
            value.split(' ').next()?.parse::<u64>().ok().map(|kib| kib / 1024)
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        let busy = busy(pid).unwrap_or(0.0);
        Self { resident: mib("VmRSS").unwrap_or(0), peak: mib("VmHWM").unwrap_or(0), descriptors, busy }
    }
}

/// Fields 14 and 15 of `stat`, which come after a name in brackets that may hold anything.
fn busy(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    let ticks: u64 = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Some(ticks as f64 / clock_ticks_per_second() as f64)
}
