//! What was typed.

use std::path::PathBuf;

use super::Result;

/// What to do to a server.
pub(crate) struct Options {
    pub(crate) server: String,
    /// The server to start, when it is not one that runs.
    pub(crate) program: Option<PathBuf>,
    pub(crate) server_options: Vec<String>,
    pub(crate) server_pid: Option<u32>,
    pub(crate) data: Option<PathBuf>,
    pub(crate) tls: bool,
    pub(crate) agents: usize,
    pub(crate) rate: f64,
    pub(crate) seconds: u64,
    pub(crate) bomb: bool,
    pub(crate) finish: bool,
    pub(crate) kill: bool,
    /// MiB.
    pub(crate) max_resident: Option<u64>,
    /// Milliseconds.
    pub(crate) max_p99: Option<u64>,
    /// Seconds.
    pub(crate) max_back: Option<u64>,
}

impl Options {
    pub(crate) fn parse(arguments: &[String]) -> Result<Self> {
        let mut read = Self::default();
        let mut arguments = arguments.iter();
        while let Some(option) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{option} needs a value"));
            match option.as_str() {
                "--server" => value()?.clone_into(&mut read.server),
                "--program" => read.program = Some(value()?.into()),
                "--server-pid" => read.server_pid = Some(value()?.parse()?),
                "--data" => read.data = Some(value()?.into()),
                "--tls" => read.tls = true,
                "--agents" => read.agents = value()?.parse()?,
                "--rate" => read.rate = value()?.parse()?,
                "--seconds" => read.seconds = value()?.parse()?,
                "--bomb" => read.bomb = true,
                "--finish" => read.finish = true,
                "--kill" => read.kill = true,
                "--max-resident" => read.max_resident = Some(value()?.parse()?),
                "--max-p99" => read.max_p99 = Some(value()?.parse()?),
                "--max-back" => read.max_back = Some(value()?.parse()?),
                "--" => read.server_options = arguments.by_ref().cloned().collect(),
                other => return Err(format!("unknown option {other}").into()),
            }
        }
        read.check()
    }

    fn check(self) -> Result<Self> {
        if self.server.is_empty() == self.program.is_none() {
            return Err("give --server URL or --program FILE, one of them".into());
        }
        if self.program.is_some() && self.data.is_none() {
            return Err("--program needs --data".into());
        }
        if self.program.is_none() && (self.kill || self.tls) {
            return Err("--kill and --tls need --program".into());
        }
        if self.agents == 0 || self.rate <= 0.0 || self.seconds == 0 {
            return Err("--agents, --rate and --seconds are more than nothing".into());
        }
        Ok(self)
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            server: String::new(),
            program: None,
            server_options: Vec::new(),
            server_pid: None,
            data: None,
            tls: false,
            agents: 1000,
            rate: 1.0,
            seconds: 15,
            bomb: false,
            finish: false,
            kill: false,
            max_resident: None,
            max_p99: None,
            max_back: None,
        }
    }
}
