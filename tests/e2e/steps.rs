//! Several steps of one build: each log is what its command wrote, byte for byte, and the merged view has every line once.

use std::fs;

use crate::harness::{Hook, Mode, Process, Proxy, Random, Scene, Stored};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Bytes of the step that writes most.
const LARGE: usize = 20_000_000;

/// Steps and what writes their output: nothing and next to nothing, which is lost most easily, what is written when the
/// command itself has ended, many small writes, and a lot.
const STEPS: [(&str, &str); 8] = [
    ("none", "true"),
    ("one", "printf 1"),
    ("two", "printf 12"),
    ("three", "printf '12\\n'"),
    ("four", "printf '123\\n'"),
    ("late", "{ sleep 0.3; echo late; }"),
    ("lines", "i=0; while [ $i -lt 30000 ]; do echo \"line $i\"; i=$((i + 1)); done"),
    ("large", "cat source"),
];

/// `tee` keeps a copy that phonehome has no part in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_log_equals_what_tee_kept_of_its_step() {
    let mut build = Build::new().await;
    let mut agents: Vec<_> =
        STEPS.iter().map(|(step, writer)| build.hook.agent(&options(step), &teed(step, writer))).collect();
    build.ended(&mut agents).await;
    build.assert_complete().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_log_equals_what_tee_kept_of_its_step_also_through_cuts() {
    let mut build = Build::new().await;
    let mut proxies = Vec::new();
    let mut agents = Vec::new();
    for (seed, (step, writer)) in (0..).zip(STEPS) {
        // A step with little output is cut in its handshakes and its first and last frames. Some connection has to be long
        // enough for a whole record, of which steps with more output have full ones.
        let range = match step {
            "large" => 64 * KIB..2 * MIB,
            "lines" => 2 * KIB..256 * KIB,
            _ => 2 * KIB..16 * KIB,
        };
        let proxy = Proxy::to(build.hook.address(), Mode::Cut(range), seed).await;
        agents.push(build.hook.agent_through(&proxy, &options(step), &teed(step, writer)));
        proxies.push(proxy);
    }
    build.ended(&mut agents).await;
    build.assert_complete().await;
    let cuts: u64 = proxies.iter().map(Proxy::cut).sum();
    assert!(cuts >= 10, "only {cuts} cuts");
    assert!(build.verdict().await["steps"][7]["cuts"].as_u64().unwrap() >= 5);
}

#[tokio::test]
async fn the_merged_view_has_each_line_once_and_those_of_a_step_in_order() {
    assert_merged(Mode::Forward).await;
}

#[tokio::test]
async fn the_merged_view_has_each_line_once_also_through_cuts() {
    assert_merged(Mode::Cut(4 * KIB..64 * KIB)).await;
}

/// The order in which records arrive: what a step wrote after it had seen another's output stands below that.
#[tokio::test]
async fn the_merged_view_has_the_order_of_arrival() {
    let mut hook = Hook::wait(&["--steps", "a,b"]).await;
    let gate = hook.scene.gate("gate");
    let mut a = hook.agent(&options("a"), &format!("echo first; {}; echo third", gate.pass()));
    hook.process.stdout.shows("[a] first\n").await;
    let mut b = hook.agent(&options("b"), "echo second");
    hook.process.stdout.shows("[b] second\n").await;
    gate.open();
    assert_eq!(hook.ended().await.stdout(), "[a] first\n[b] second\n[a] third\n");
    assert_eq!((a.ended().await, b.ended().await), (0, 0));
}

#[tokio::test]
async fn each_step_of_a_verdict_has_its_own_end() {
    let flags = ["--data", "data", "--build", "vela", "--steps", "fine,bad,killed,missing"];
    let mut hook = Hook::wait(&flags).await;
    let scripts = [("fine", "true"), ("bad", "exit 3"), ("killed", "ulimit -c 0; kill -KILL $$")];
    let mut agents: Vec<_> = scripts.iter().map(|(step, script)| hook.agent(&options(step), script)).collect();
    let mut missing = hook.scene.command(crate::harness::agent());
    missing.envs(hook.variables()).args(options("missing")).args(["--", "no-such-command"]);
    agents.push(Process::spawn(&mut missing));
    let ended = hook.ended().await;
    assert!(ended.stderr().contains("build failed: step bad: exit code 3;"), "{}", ended.stderr());
    let verdict = Stored::verdict(&hook.scene.path("data"), "vela").await;
    let ends: Vec<_> =
        (0..4).map(|at| &verdict["steps"][at]).map(|step| (&step["exit_code"], &step["signal"])).collect();
    let none = serde_json::Value::Null;
    assert_eq!(ends, [(&0.into(), &none), (&3.into(), &none), (&137.into(), &"SIGKILL".into()), (&127.into(), &none)]);
    let reason = verdict["steps"][3]["reason"].as_str().unwrap();
    assert!(reason.contains("no-such-command"), "{reason}");
    for (agent, code) in agents.iter_mut().zip([0, 3, 137, 127]) {
        assert_eq!(agent.ended().await, code);
    }
}

/// Lines of each step on each stream. Together a step's are smaller than a pipe, so that no record ends within one.
const LINES: usize = 1500;

async fn assert_merged(mode: Mode) {
    let steps = ["a", "b", "c"];
    let mut hook = Hook::wait(&["--steps", "a,b,c"]).await;
    let mut proxies = Vec::new();
    let mut agents = Vec::new();
    for (seed, step) in (0..).zip(steps) {
        let proxy = Proxy::to(hook.address(), mode.clone(), seed).await;
        let line = format!("echo \"{step} line $i\"");
        let script = format!("i=0; while [ $i -lt {LINES} ]; do {line}; {line} >&2; i=$((i + 1)); done");
        agents.push(hook.agent_through(&proxy, &options(step), &script));
        proxies.push(proxy);
    }
    let ended = hook.ended().await;
    for step in steps {
        let expected: String = (0..LINES).map(|i| format!("[{step}] {step} line {i}\n")).collect();
        assert!(lines_of(step, &ended.stdout()) == expected, "stdout of {step} differs");
        assert!(
            lines_of(step, &ended.stderr()) == expected,
            "stderr of {step} differs: {}",
            last_line(&ended.stderr())
        );
    }
    assert_eq!(ended.stdout().lines().count(), steps.len() * LINES, "nothing else is on stdout");
    assert!(last_line(&ended.stderr()).contains("the log is complete"), "{}", last_line(&ended.stderr()));
    for agent in &mut agents {
        assert_eq!(agent.ended().await, 0);
    }
    if mode != Mode::Forward {
        assert!(proxies.iter().map(Proxy::cut).sum::<u64>() >= 1, "nothing was cut");
    }
}

fn lines_of(step: &str, printed: &str) -> String {
    let prefix = format!("[{step}] ");
    printed.split_inclusive('\n').filter(|line| line.starts_with(&prefix)).collect()
}

fn last_line(printed: &str) -> &str {
    printed.lines().last().unwrap_or_default()
}

fn options(step: &str) -> [&str; 4] {
    ["--step", step, "--tee", "off"]
}

/// The command ends before its writer where that takes its time.
fn teed(step: &str, writer: &str) -> String {
    let background = if step == "late" { "&" } else { "" };
    format!("{writer} | tee {step}.tee {background}")
}

/// A hook that waits for all [`STEPS`] and keeps what they write.
struct Build {
    hook: Hook,
}

impl Build {
    async fn new() -> Self {
        let scene = Scene::new();
        scene.write("source", Random::new(20).bytes(LARGE));
        let steps = STEPS.map(|(step, _)| step).join(",");
        let flags = ["--data", "data", "--build", "vela", "--steps", &steps];
        Self { hook: Hook::wait_in(scene, &flags).await }
    }

    async fn ended(&mut self, agents: &mut [Process]) {
        let ended = self.hook.ended().await;
        assert_eq!(ended.code, 0, "{}", ended.stderr());
        for agent in agents {
            assert_eq!(agent.ended().await, 0);
        }
    }

    async fn verdict(&self) -> serde_json::Value {
        Stored::verdict(&self.hook.scene.path("data"), "vela").await
    }

    /// Compares with what `tee` has kept, and with what the verdict says.
    async fn assert_complete(&self) {
        let verdict = self.verdict().await;
        assert_eq!((&verdict["verdict"], &verdict["complete"]), (&"succeeded".into(), &true.into()), "{verdict}");
        let told = verdict["steps"].as_array().unwrap();
        assert_eq!(told.len(), STEPS.len());
        for ((step, _), told) in STEPS.iter().zip(told) {
            let kept = fs::read(self.hook.scene.path(&format!("{step}.tee"))).unwrap();
            let stored = Stored::read(&self.hook.scene.path("data"), "vela", step, 1);
            assert!(stored.log == kept, "{step}: {} bytes of {}", stored.log.len(), kept.len());
            stored.assert_complete();
            assert_eq!((&told["step"], &told["complete"]), (&(*step).into(), &true.into()), "{told}");
            assert_eq!((&told["exit_code"], &told["bytes"]), (&0.into(), &kept.len().into()), "{told}");
            assert_eq!(told["digest"], blake3::hash(&kept).to_hex().as_str());
        }
        let sizes = told.iter().map(|told| told["bytes"].as_u64().unwrap());
        assert_eq!(sizes.collect::<Vec<_>>()[..6], [0, 1, 2, 3, 4, 5]);
        assert_eq!(told[7]["bytes"], LARGE);
    }
}
