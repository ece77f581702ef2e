//! The hook's own promises: what it tells the launcher, one push at a time, several steps, and a pusher who leaves.

use std::{os::unix::fs::PermissionsExt, path::Path};

use rustix::{
    fs::{FlockOperation, flock},
    process::Signal,
};

use crate::harness::{Hook, Scene, Stored, builder, eventually};

/// Writes down that it was told to stop, and how it ends then. A shell also says that its `sleep` was terminated: that is
/// left out, as are all other errors.
const STOPPABLE: &str = "exec 2>/dev/null; trap 'echo stopping; touch \"$E2E_SCENE/stopped\"; exit 9' TERM
    echo going; for i in $(seq 1200); do sleep 0.1; done";

#[tokio::test]
async fn several_steps_carry_their_names_and_the_first_failed_one_gives_the_code() {
    let mut hook = Hook::wait(&["--steps", "build,test"]).await;
    let mut test = hook.agent(&["--step", "test", "--tee", "off"], "echo testing; echo bad >&2; exit 7");
    assert_eq!(test.ended().await, 7);
    assert!(!hook.process.has_ended(), "the other step is awaited");
    let mut build = hook.agent(&["--step", "build", "--tee", "off"], "echo building; exit 3");
    let ended = hook.ended().await;
    assert_eq!(ended.code, 3, "build was declared before test");
    assert_eq!(ended.stdout(), "[test] testing\n[build] building\n");
    assert!(ended.stderr().contains("[test] bad\n"), "{}", ended.stderr());
    assert!(ended.stderr().contains("build failed: step build: exit code 3;"), "{}", ended.stderr());
    assert_eq!(build.ended().await, 3);
}

#[tokio::test]
async fn steps_at_the_same_time_never_share_a_line() {
    let mut hook = Hook::wait(&["--steps", "a,b"]).await;
    let script = |name: &str| {
        format!("i=0; while [ $i -lt 500 ]; do printf {name}; printf '{name} %s\\n' $i; i=$((i + 1)); done")
    };
    let mut agents = ["a", "b"].map(|name| hook.agent(&["--step", name, "--tee", "off"], &script(name)));
    let ended = hook.ended().await;
    for (agent, name) in agents.iter_mut().zip(["a", "b"]) {
        assert_eq!(agent.ended().await, 0);
        let prefix = format!("[{name}] ");
        // A line that another step interrupts is ended and goes on in the next, so only the text together counts.
        let text: String = ended.stdout().lines().filter_map(|line| line.strip_prefix(&prefix)).collect();
        let expected: String = (0..500).map(|i| format!("{name}{name} {i}")).collect();
        assert_eq!(text, expected);
    }
    assert!(ended.stdout().lines().all(|line| line.starts_with("[a] a") || line.starts_with("[b] b")));
}

#[tokio::test]
async fn the_env_file_is_private_and_gone_afterwards() {
    let mut hook = Hook::wait(&["--env-file", "build.env"]).await;
    let path = hook.scene.path("build.env");
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let contents = hook.scene.read("build.env");
    for (name, value) in hook.variables() {
        assert!(contents.lines().any(|line| line == format!("{name}={value}")), "{name} in {contents}");
    }
    assert_eq!(contents.lines().count(), hook.variables().len());
    let mut agent = hook.agent(&[], "true");
    assert_eq!(hook.ended().await.code, 0);
    assert_eq!(agent.ended().await, 0);
    assert!(!path.exists());
}

#[tokio::test]
async fn the_launcher_gets_the_hooks_standard_input_and_its_output_is_shown() {
    let scene = Scene::new();
    let input = std::fs::File::open(scene.write("input", "old new refs/heads/main\n")).unwrap();
    let launcher = "cat; echo starting >&2; exit 1";
    let mut hook = scene.command(crate::harness::server());
    hook.args(crate::harness::arguments(&[])).args(["--", "sh", "-c", launcher]).stdin(input);
    let output = crate::harness::patiently("the hook ends", hook.output()).await.unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("old new refs/heads/main\n") && told.contains("starting\n"), "{told}");
    assert_eq!(output.stdout, b"", "stdout belongs to the build");
}

#[tokio::test]
async fn what_the_launcher_leaves_behind_does_not_hold_up_the_push() {
    let scene = Scene::new();
    let launcher = format!("sleep 120 & {}", builder(&scene, &[], "echo built"));
    let ended = Hook::launch_in(scene, &[], &launcher).ended().await; // waits for the ends of both streams too
    assert_eq!((ended.code, ended.stdout()), (0, "built\n".to_owned()));
}

#[tokio::test]
async fn the_advertised_address_is_what_was_asked_for() {
    for (flags, url) in [
        (&["--advertise", "git.example:4443"][..], "wss://git.example:4443"),
        (&["--advertise", "wss://proxy.example/builds"], "wss://proxy.example/builds"),
        (&["--advertise", "proxy.example:80", "--no-tls"], "ws://proxy.example:80"),
    ] {
        let mut hook = Hook::wait(flags).await;
        assert_eq!(hook.variable("URL"), url);
        hook.signal(Signal::TERM);
        assert_eq!(hook.ended().await.code, 130);
    }
}

#[tokio::test]
async fn one_push_at_a_time_and_the_second_hears_who_is_first() {
    let scene = Scene::new();
    let lock = scene.path("lock");
    let flags = ["--lock", lock.to_str().unwrap(), "--build", "first"];
    let first = Hook::wait_in(scene, &flags).await;

    let mut second = Hook::launch(&["--lock", lock.to_str().unwrap()], "touch \"$E2E_SCENE/launched\"");
    let ended = second.ended().await;
    let told = ended.stderr();
    let holder = first.process.pid().as_raw_nonzero();
    assert_eq!(ended.code, 125);
    assert!(told.contains(&format!("another push is being built: build first, process {holder}, for ")), "{told}");
    assert!(!second.scene.path("launched").exists(), "nothing is launched without the lock");

    first.signal(Signal::KILL);
    let mut first = first;
    assert_eq!(first.process.ended().await, 137);
    let third = Hook::run(&["--lock", lock.to_str().unwrap()], "echo third").ended().await;
    assert_eq!((third.code, third.stdout()), (0, "third\n".to_owned()));
}

#[tokio::test]
async fn a_pusher_who_stops_the_hook_stops_the_build() {
    for (signal, reason) in
        [(Signal::HUP, "the pusher hung up"), (Signal::INT, "interrupted"), (Signal::TERM, "told to end")]
    {
        let scene = Scene::new();
        let lock = scene.path("lock");
        let launcher = builder(&scene, &[], STOPPABLE);
        let mut hook = Hook::launch_in(scene, &["--lock", lock.to_str().unwrap()], &launcher);
        hook.process.stdout.shows("going\n").await;
        hook.signal(signal);
        let ended = hook.ended().await;
        assert_eq!((ended.code, ended.stdout()), (130, "going\nstopping\n".to_owned()), "{signal:?}");
        assert!(ended.stderr().contains(reason), "{signal:?}: {}", ended.stderr());
        assert!(ended.stderr().contains("the log is complete"), "{signal:?}: {}", ended.stderr());
        assert!(hook.scene.path("stopped").exists());
        assert!(is_free(&lock));
    }
}

#[tokio::test]
async fn a_pusher_whose_pipes_are_closed_is_gone() {
    let mut hook = Hook::run(&["--data", "data", "--build", "left"], STOPPABLE);
    hook.process.stdout.shows("going\n").await;
    hook.process.stdout.stop_reading().await;
    hook.process.stderr.stop_reading().await;
    assert_eq!(hook.process.ended().await, 130);
    assert!(hook.scene.path("stopped").exists());
    let data = hook.scene.path("data");
    assert_eq!(Stored::verdict(&data, "left").await["verdict"], "cancelled");
    let stored = Stored::read(&data, "left", "main", 1);
    stored.assert_complete();
    assert_eq!(stored.log, b"going\nstopping\n");
}

/// Who closes a terminal hangs up and reads nothing any more. That is one wish to stop, not a second one not to wait.
#[tokio::test]
async fn a_pusher_who_hangs_up_and_is_gone_still_gets_the_whole_log_stored() {
    let scene = Scene::new();
    let gate = scene.gate("gate");
    let script = format!(
        "exec 2>/dev/null; trap 'echo stopping; {}; echo stopped; exit 9' TERM; echo going; for i in $(seq 1200); do sleep 0.1; done",
        gate.pass()
    );
    let launcher = builder(&scene, &[], &script);
    let mut hook = Hook::launch_in(scene, &["--data", "data", "--build", "left"], &launcher);
    hook.process.stdout.shows("going\n").await;
    hook.signal(Signal::HUP);
    hook.process.stdout.shows("stopping\n").await;
    hook.process.stdout.stop_reading().await;
    hook.process.stderr.stop_reading().await;
    gate.open();
    assert_eq!(hook.process.ended().await, 130);
    let data = hook.scene.path("data");
    assert!(Stored::verdict(&data, "left").await["incomplete"].is_null());
    assert_eq!(Stored::read(&data, "left", "main", 1).log, b"going\nstopping\nstopped\n");
}

#[tokio::test]
async fn a_build_may_go_on_without_the_pusher() {
    let scene = Scene::new();
    let gate = scene.gate("gate");
    let script = format!("echo going; {}; echo finished", gate.pass());
    let launcher = builder(&scene, &[], &script);
    let flags = ["--on-hangup", "continue", "--data", "data", "--build", "alone"];
    let mut hook = Hook::launch_in(scene, &flags, &launcher);
    hook.process.stdout.shows("going\n").await;
    hook.process.stdout.stop_reading().await;
    hook.process.stderr.stop_reading().await;
    gate.open();
    assert_eq!(hook.process.ended().await, 0);
    let data = hook.scene.path("data");
    assert_eq!(Stored::verdict(&data, "alone").await["verdict"], "succeeded");
    let stored = Stored::read(&data, "alone", "main", 1);
    stored.assert_complete();
    assert_eq!(stored.log, b"going\nfinished\n");
}

#[tokio::test]
async fn a_silent_build_is_said_to_be_alive_only_where_a_person_watches() {
    let script = |gate: &crate::harness::Gate| format!("echo going; {}", gate.pass());
    let start = |flags: &[&str]| {
        let scene = Scene::new();
        let gate = scene.gate("gate");
        let launcher = builder(&scene, &[], &script(&gate));
        (Hook::launch_in(scene, flags, &launcher), gate)
    };
    let data = ["--data", "data", "--build", "silent"];
    let (mut raw, raw_gate) = start(&["--render", "raw", "--keepalive", "300ms"]);
    raw.process.stdout.shows("going\n").await;
    let (mut safe, safe_gate) = start(&[&["--render", "safe", "--keepalive", "300ms"][..], &data].concat());
    safe.process.stderr.shows("still building, 1 s without output").await;
    raw_gate.open();
    safe_gate.open();
    assert!(!raw.ended().await.stderr().contains("still building"));
    assert_eq!(safe.ended().await.stdout(), "going\n");
    let stored = Stored::read(&safe.scene.path("data"), "silent", "main", 1);
    assert_eq!(stored.log, b"going\n", "such a line is never stored");
}

#[tokio::test]
async fn nothing_is_left_behind_when_no_data_directory_was_given() {
    let mut hook = Hook::run(&[], "echo built");
    assert_eq!(hook.ended().await.code, 0);
    let agent_is_gone = || hook.scene.processes("phonehome-agent").is_empty();
    eventually("the agent ends", agent_is_gone).await;
    let left = std::fs::read_dir(hook.scene.dir()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut left: Vec<_> = left.collect();
    left.sort();
    assert_eq!(left, ["agent.log", "build.sh"], "the scene is the directory for temporary files");
    assert_eq!(hook.scene.read("agent.log"), "");
}

#[tokio::test]
async fn quiet_leaves_out_the_last_line_and_no_problem() {
    for (script, code) in [("echo built", 0), ("echo built; exit 3", 3)] {
        let ended = Hook::run(&["--quiet"], script).ended().await;
        assert_eq!((ended.code, ended.stdout(), ended.stderr()), (code, "built\n".to_owned(), String::new()));
    }
    let ended = Hook::run(&["--quiet", "--timeout", "1s"], "echo going; exec sleep 120").ended().await;
    assert_eq!(ended.code, 124);
    assert!(ended.stderr().contains("timed out: the build took too long"), "{}", ended.stderr());
}

#[tokio::test]
async fn the_verdict_on_disk_says_what_the_last_line_says() {
    let mut hook = Hook::run(&["--data", "data", "--build", "proven"], "echo built; exit 3");
    let told = hook.ended().await.stderr();
    let verdict = Stored::verdict(&hook.scene.path("data"), "proven").await;
    let digest = blake3::hash(b"built\n").to_hex().to_string();
    let (complete, step) = (&verdict["complete"], &verdict["steps"][0]);
    assert_eq!((complete, &step["bytes"], &step["cuts"]), (&true.into(), &6.into(), &0.into()), "{verdict}");
    assert_eq!(step["digest"], *digest);
    let proof = format!("complete: 6 bytes in {}", step["records"]);
    assert!(told.contains(&proof) && told.contains(&format!("BLAKE3 {digest}, 0 cuts survived\n")), "{told}");
}

#[tokio::test]
async fn bad_options_are_an_error_of_phonehome_not_a_code_of_a_build() {
    for flags in [&["--no-such-option"][..], &["--steps", "a,a"], &["--timeout", "soon"], &["--advertise", "a b"]] {
        let ended = Hook::launch(flags, "true").ended().await;
        assert_eq!((ended.code, ended.stdout.len()), (125, 0), "{flags:?}: {}", ended.stderr());
        assert!(!ended.stderr.is_empty());
    }
}

/// Whether nobody holds the lock.
fn is_free(lock: &Path) -> bool {
    flock(std::fs::File::open(lock).unwrap(), FlockOperation::NonBlockingLockExclusive).is_ok()
}
