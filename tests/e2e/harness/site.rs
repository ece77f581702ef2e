//! A build whose server dies and is started again, and what must be true of it in the end.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::process::Signal;
use serde_json::Value;
use tokio::process::Command;

use super::{Process, Proxy, Scene, Stored, agent, binaries::collector};

/// Address, directory and token of one build's server, which stay the same from one of its lives to the next.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) scene: Scene,
    pub(crate) address: SocketAddr,
    pub(crate) data: PathBuf,
}

/// One life of the server and how it ended.
#[derive(Debug)]
pub(crate) struct Life {
    /// As a shell says it.
    pub(crate) code: i32,
    pub(crate) printed: Vec<u8>,
    pub(crate) told: String,
    /// Whether the end of the log had been stored before it began.
    is_epilogue: bool,
}

/// What the collector exits with when an earlier life has stored the verdict, and when it cannot do its work.
const ENDED: i32 = 98;
const FAILED: i32 = 99;

/// A process that was killed.
const KILLED: i32 = 128 + 9;

/// More lives than any test plans: one that never ends is a failure.
const MAX_LIVES: usize = 200;

const BUILD: &str = "kept";
const TOKEN: &str = "of-every-life";

impl Site {
    pub(crate) fn new() -> Self {
        let scene = Scene::new();
        let data = scene.path("data");
        Self { scene, address: own_address(), data }
    }

    /// A life of the server: `wrap` is a command that runs it, `fault` what is to happen to it. Both may be empty.
    pub(crate) fn start(&self, wrap: &[&str], fault: &str) -> Process {
        let mut command = self.wrapped(wrap, collector());
        command.arg(self.address.to_string()).arg(&self.data).arg(BUILD);
        Process::spawn(command.env("COLLECTOR_TOKEN", TOKEN).env("PHONEHOME_FAULT", fault))
    }

    fn wrapped(&self, wrap: &[&str], program: PathBuf) -> Command {
        let [first, rest @ ..] = wrap else { return self.scene.command(program) };
        let mut command = self.scene.command(first);
        command.args(rest).arg(program);
        command
    }

    /// A life that goes as it should.
    pub(crate) async fn started(&self) -> Process {
        let collector = self.start(&[], "");
        collector.stderr.shows("listening on").await;
        collector
    }

    /// Runs an agent of the build.
    pub(crate) fn agent(&self, options: &[&str], script: &str) -> Process {
        self.agent_in(&[], options, script)
    }

    /// Runs an agent of the build by another command.
    pub(crate) fn agent_in(&self, wrap: &[&str], options: &[&str], script: &str) -> Process {
        Process::spawn(&mut self.agent_command(wrap, self.address, options, script))
    }

    /// Runs an agent of the build that reaches the server only through a proxy.
    pub(crate) fn agent_through(&self, proxy: &Proxy, options: &[&str], script: &str) -> Process {
        Process::spawn(&mut self.agent_command(&[], proxy.address(), options, script))
    }

    fn agent_command(&self, wrap: &[&str], address: SocketAddr, options: &[&str], script: &str) -> Command {
        let mut command = self.wrapped(wrap, agent());
        command.env("PHONEHOME_URL", format!("ws://{address}")).env("PHONEHOME_BUILD", BUILD);
        command.env("PHONEHOME_TOKEN", TOKEN).env("PHONEHOME_TEE", "off");
        command.args(options).args(["--", "sh", "-c", script]);
        command
    }

    /// Lets the server live until the build has its verdict. `start` begins a life and knows which it is, from 0; a life
    /// that is killed or cannot do its work is followed by the next.
    pub(crate) async fn serve(&self, mut start: impl FnMut(usize) -> Process) -> Vec<Life> {
        let mut lives = Vec::new();
        while lives.last().is_none_or(Life::needs_another) {
            assert!(lives.len() < MAX_LIVES, "it never ends: {:?}", lives.last());
            let is_epilogue =
                self.attempt(1).join("finished.json").exists() || self.attempt(2).join("finished.json").exists();
            let collector = start(lives.len());
            lives.push(Life { is_epilogue, ..Life::of(collector).await });
        }
        lives
    }

    /// Waits for the agent's end with 7, unless its log's end was stored before the last life began: then it may have gone
    /// long ago, or not have heard of it and wait in vain for as long as it was told to.
    pub(crate) async fn agent_ended(&self, agent: &mut Process, lives: &[Life]) {
        if lives.last().is_some_and(|life| !life.is_epilogue) {
            assert_eq!(agent.ended().await, 7);
        }
    }

    /// The directory of an attempt.
    pub(crate) fn attempt(&self, attempt: u32) -> PathBuf {
        self.data.join("builds").join(BUILD).join("main").join(attempt.to_string())
    }

    /// Bytes of output that are on the disk.
    pub(crate) fn stored(&self, attempt: u32) -> u64 {
        fs::metadata(self.attempt(attempt).join("log")).map_or(0, |found| found.len())
    }

    /// Compares what was written, what is stored and what was printed: all of it, once, in order, and proven.
    pub(crate) fn assert_whole(&self, attempt: u32, source: &[u8], code: i32, lives: &[Life]) {
        let about = |life: &Life| format!("{}: {}", life.code, life.told);
        let history = lives.iter().map(about).collect::<Vec<_>>().join("\n");
        let stored = Stored::read(&self.data, BUILD, "main", attempt);
        assert_same(&stored.log, source, &format!("stored: {history}"));
        stored.assert_complete();
        let verdict: Value =
            serde_json::from_slice(&fs::read(Stored::verdict_path(&self.data, BUILD)).unwrap()).unwrap();
        assert_eq!(
            (&verdict["complete"], &verdict["incomplete"]),
            (&true.into(), &Value::Null),
            "{verdict}\n{history}"
        );
        assert_eq!((&verdict["verdict"], &verdict["end"]["exited"]), (&"failed".into(), &code.into()), "{verdict}");
        let step = &verdict["steps"][0];
        assert_eq!(step["digest"], blake3::hash(source).to_hex().as_str(), "{verdict}");
        assert_eq!((&step["bytes"], &step["attempt"]), (&source.len().into(), &attempt.into()), "{verdict}");
        let dir = self.attempt(attempt);
        assert_eq!(records_of(&dir, source.len()), step["records"].as_u64().unwrap(), "{verdict}");
        assert!(!dir.join("quarantine").exists(), "no byte was damaged: {history}");
        self.assert_printed(source, code, lives, &history);
    }

    /// Every life prints the log from its beginning, none anything else, and the one that tells the verdict all of it.
    fn assert_printed(&self, source: &[u8], code: i32, lives: &[Life], history: &str) {
        let before = if fs::exists(self.attempt(2)).unwrap() {
            fs::read(self.attempt(1).join("log")).unwrap()
        } else {
            Vec::new()
        };
        let whole = [&before, source].concat();
        for life in lives {
            assert!(whole.starts_with(&life.printed), "{} bytes are no prefix\n{history}", life.printed.len());
        }
        let last = lives.last().expect("there was one");
        if last.code != ENDED {
            assert_eq!(last.code, code, "{history}");
            assert_same(&last.printed, &whole, &format!("printed: {history}"));
        }
    }
}

impl Life {
    /// Waits for its end.
    pub(crate) async fn of(mut collector: Process) -> Self {
        let code = collector.ended().await;
        let (printed, told) = (collector.stdout.all().await, collector.stderr.all().await);
        Self { code, printed, told: String::from_utf8_lossy(&told).into_owned(), is_epilogue: false }
    }

    /// Ends it, if it has not ended by itself.
    pub(crate) async fn cut_short(mut collector: Process) -> Self {
        if !collector.has_ended() {
            collector.signal(Signal::KILL);
        }
        Self::of(collector).await
    }

    pub(crate) fn was_killed(&self) -> bool {
        self.code == KILLED
    }

    fn needs_another(&self) -> bool {
        self.was_killed() || self.code == FAILED
    }
}

fn assert_same(found: &[u8], source: &[u8], what: &str) {
    let common = found.iter().zip(source).take_while(|(one, other)| one == other).count();
    assert!(found == source, "{} of {} bytes, the same up to {common}; {what}", found.len(), source.len());
}

/// Goes through an attempt's index by its documented layout: every record follows the one before, in number, in place
/// and in its stream, and together they are the log. Returns how many there are.
fn records_of(dir: &Path, log: usize) -> u64 {
    let index = fs::read(dir.join("index")).unwrap();
    let (mut next, mut end, mut offsets) = (0, 0, [0; 2]);
    for entry in index.chunks(48) {
        let u64_at = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
        let (seq, offset, position, stream) = (u64_at(0), u64_at(16), u64_at(24), usize::from(entry[40]));
        let len = u64::from(u32::from_le_bytes(entry[32..36].try_into().unwrap()));
        assert_eq!(seq, next, "a record is missing, or there twice");
        next += 1;
        if stream < offsets.len() {
            assert_eq!((offset, position), (offsets[stream], end), "record {seq} is not where it belongs");
            offsets[stream] += len;
            end += len;
        } else {
            assert_ne!(stream, 255, "there is a hole at record {seq}");
        }
    }
    assert_eq!(end, log as u64, "the index and the log differ");
    next
}

/// A loopback address that nobody else in this test run has, and a port that the system gives to nobody. So a server
/// that comes back finds both free.
pub(super) fn own_address() -> SocketAddr {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    SocketAddr::from(([127, 1 + (number % 250) as u8, high, low], 4443 + (number / 250) as u16))
}

/// Lines with their numbers and digests, and scripts that write them: every line can be told from every other.
#[derive(Debug)]
pub(crate) struct Lines(Vec<u8>);

impl Lines {
    /// Prepares so many lines for the scripts of a scene.
    pub(crate) fn prepare(scene: &Scene, count: u32) -> Self {
        let lines = (0..count).map(|number| format!("{number} {}\n", blake3::hash(&number.to_be_bytes()).to_hex()));
        let all = lines.collect::<String>().into_bytes();
        scene.write("lines", &all);
        Self(all)
    }

    pub(crate) fn all(&self) -> &[u8] {
        &self.0
    }

    /// The first `count` lines.
    pub(crate) fn first(&self, count: usize) -> Vec<u8> {
        self.0.split_inclusive(|byte| *byte == b'\n').take(count).flatten().copied().collect()
    }

    /// What [`Self::UNTIL_ENOUGH`] has written by now.
    pub(crate) fn written(scene: &Scene) -> Vec<u8> {
        fs::read(scene.path("written")).unwrap()
    }

    /// Writes all lines with a pause after every thirtieth, so that they are stored in many rounds, and exits with 7.
    pub(crate) const ALL: &str = r#"number=0
        while read -r line; do
            echo "$line"
            number=$((number + 1))
            [ $((number % 30)) -ne 0 ] || sleep 0.02
        done <lines
        exit 7"#;

    /// Writes a few lines at a time until there is a file `enough`, keeps a copy in `written`, and exits with 7.
    pub(crate) const UNTIL_ENOUGH: &str = r#"exec 3<lines 4>written
        number=0
        while read -r line <&3; do
            echo "$line"
            echo "$line" >&4
            number=$((number + 1))
            [ $((number % 5)) -eq 0 ] || continue
            [ ! -e enough ] || break
            sleep 0.02
        done
        exit 7"#;
}
