//! `phonehome-server hook` and the builders that phone it.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use rustix::process::Signal;
use serde_json::Value;

use super::{Process, Proxy, Scene, agent, eventually, server};

/// A hook that waits for one build.
#[derive(Debug)]
pub(crate) struct Hook {
    pub(crate) process: Process,
    variables: Vec<(String, String)>,
    pub(crate) scene: Scene,
}

/// How a hook ended and all it printed.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

impl Hook {
    /// A hook whose launcher starts an agent that runs `script`, as a builder far away: in a session of its own, with
    /// none of the hook's streams.
    pub(crate) fn run(flags: &[&str], script: &str) -> Self {
        Self::run_agent(flags, &[], script)
    }

    /// The same with options for the agent.
    pub(crate) fn run_agent(flags: &[&str], options: &[&str], script: &str) -> Self {
        let scene = Scene::new();
        let launcher = builder(&scene, options, script);
        Self::launch_in(scene, flags, &launcher)
    }

    /// A hook with this shell script as its launcher.
    pub(crate) fn launch(flags: &[&str], launcher: &str) -> Self {
        Self::launch_in(Scene::new(), flags, launcher)
    }

    /// The same in a scene where something is prepared.
    pub(crate) fn launch_in(scene: Scene, flags: &[&str], launcher: &str) -> Self {
        let process = Process::spawn(scene.command(server()).args(arguments(flags)).args(["--", "sh", "-c", launcher]));
        Self { process, variables: Vec::new(), scene }
    }

    /// A hook whose launcher starts nothing: the test phones itself.
    pub(crate) async fn wait(flags: &[&str]) -> Self {
        Self::wait_in(Scene::new(), flags).await
    }

    /// The same in a scene where something is prepared.
    pub(crate) async fn wait_in(scene: Scene, flags: &[&str]) -> Self {
        let launcher = r#"env | grep ^PHONEHOME_ >"$E2E_SCENE/variables.tmp"
            mv "$E2E_SCENE/variables.tmp" "$E2E_SCENE/variables""#;
        let mut hook = Self::launch_in(scene, flags, launcher);
        hook.scene.appears("variables").await;
        let text = hook.scene.read("variables");
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        hook.variables = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        hook
    }

    /// What the launcher was told: `URL`, `BUILD`, `TOKEN` or `PIN`.
    pub(crate) fn variable(&self, name: &str) -> &str {
        let name = format!("PHONEHOME_{name}");
        let found = self.variables.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| &**value).expect("the launcher was told")
    }

    /// All that the launcher was told.
    pub(crate) fn variables(&self) -> Vec<(String, String)> {
        self.variables.clone()
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        let (_, address) = self.variable("URL").split_once("://").expect("it is a URL");
        address.parse().unwrap()
    }

    /// A command that runs an agent of this build.
    pub(crate) fn agent_command(&self, options: &[&str], script: &str) -> tokio::process::Command {
        let mut command = self.scene.command(agent());
        command.envs(self.variables()).args(options).args(["--", "sh", "-c", script]);
        command
    }

    /// Runs an agent of this build.
    pub(crate) fn agent(&self, options: &[&str], script: &str) -> Process {
        Process::spawn(&mut self.agent_command(options, script))
    }

    /// Runs an agent that reaches the hook only through a proxy.
    pub(crate) fn agent_through(&self, proxy: &Proxy, options: &[&str], script: &str) -> Process {
        let url = self.variable("URL").replace(&self.address().to_string(), &proxy.address().to_string());
        Process::spawn(self.agent_command(options, script).env("PHONEHOME_URL", url))
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> Ended {
        let code = self.process.ended().await;
        Ended { code, stdout: self.process.stdout.all().await, stderr: self.process.stderr.all().await }
    }

    /// Runs a well-behaved agent and checks that the hook serves it as if nothing had happened before.
    pub(crate) async fn still_serves(mut self) {
        let mut agent = self.agent(&[], "echo fine; exit 4");
        let ended = self.ended().await;
        assert_eq!((ended.code, &*ended.stdout), (4, &b"fine\n"[..]), "{}", ended.stderr());
        assert!(ended.stderr().contains("the log is complete"), "{}", ended.stderr());
        assert_eq!(agent.ended().await, 4);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }
}

impl Ended {
    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

/// The arguments of a hook up to its launcher. It listens on a port of its own and never outlives its test by much.
pub(crate) fn arguments(flags: &[&str]) -> Vec<String> {
    let mut arguments = vec!["hook".to_owned()];
    for (flag, value) in [("--listen", "127.0.0.1:0"), ("--timeout", "2m")] {
        if !flags.contains(&flag) {
            arguments.extend([flag.to_owned(), value.to_owned()]);
        }
    }
    arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
    arguments
}

/// A launcher that starts an agent which runs `script`. What the agent itself says is in the file `agent.log`.
pub(crate) fn builder(scene: &Scene, options: &[&str], script: &str) -> String {
    let script = scene.write("build.sh", script);
    format!(
        "setsid {} --tee off {} -- sh {} </dev/null >/dev/null 2>\"$E2E_SCENE/agent.log\" &",
        agent().display(),
        options.join(" "),
        script.display(),
    )
}

/// An attempt as a data directory holds it.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) log: Vec<u8>,
    pub(crate) finished: Value,
}

impl Stored {
    /// Reads an attempt that has finished.
    pub(crate) fn read(data: &Path, build: &str, step: &str, attempt: u32) -> Self {
        let dir = data.join("builds").join(build).join(step).join(attempt.to_string());
        let finished = fs::read(dir.join("finished.json")).unwrap();
        Self { log: fs::read(dir.join("log")).unwrap(), finished: serde_json::from_slice(&finished).unwrap() }
    }

    /// The events that the directory of an attempt holds by now: when they happened, microseconds, and what they say.
    pub(crate) fn events(attempt: &Path) -> Vec<(u64, Value)> {
        let [index, events] = ["index", "events"].map(|name| fs::read(attempt.join(name)).unwrap_or_default());
        let entries = index.chunks_exact(48).filter(|entry| entry[40] == 2);
        let event = |entry: &[u8]| {
            let u64_at = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
            let (position, len) = (u64_at(24) as usize, u32::from_le_bytes(entry[32..36].try_into().unwrap()) as usize);
            let payload = events.get(position..position + len)?; // what is not there yet is not stored yet
            Some((u64_at(8), serde_json::from_slice(payload).unwrap()))
        };
        entries.map_while(event).collect()
    }

    /// Checks what the server promises: counts and digest of FINISHED are those of the bytes on disk.
    pub(crate) fn assert_complete(&self) {
        assert_eq!(self.finished["answer"], "complete");
        let finished = &self.finished["finished"];
        assert_eq!(finished["digest"], blake3::hash(&self.log).to_hex().as_str());
        let bytes = |stream: &str| finished["counts"][stream]["bytes"].as_u64().unwrap();
        assert_eq!(bytes("stdout") + bytes("stderr"), self.log.len() as u64);
    }

    /// The file with a build's verdict.
    pub(crate) fn verdict_path(data: &Path, build: &str) -> PathBuf {
        data.join("builds").join(build).join("verdict.json")
    }

    /// Waits for a build's verdict.
    pub(crate) async fn verdict(data: &Path, build: &str) -> Value {
        let path = Self::verdict_path(data, build);
        eventually("the verdict is written", || path.exists()).await;
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }
}
