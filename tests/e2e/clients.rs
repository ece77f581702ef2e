//! The commands that ask a standing server, and a hook whose build is on one: what they print, exit with and survive.

use std::os::unix::fs::PermissionsExt;

use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::harness::{Gate, Lines, Mode, Process, Proxy, Scene, Standing, agent, builder, server};

const ADMIN: &str = crate::harness::ADMIN;

#[tokio::test]
async fn a_declared_build_is_listed_shown_and_waited_for() {
    let standing = Standing::start(&[]).await;
    let flags = ["declare", "b", "--label", "team=a b", "--env-file", "build.env", "--timeout", "1m"];
    let declared = run(&standing, &flags).await;
    assert_eq!((declared.code, &*declared.stdout), (0, "b\n"), "{}", declared.stderr);
    let mode = std::fs::metadata(standing.scene.path("build.env")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let waiting = run(&standing, &["wait", "b", "--timeout", "10ms"]).await;
    assert_eq!((waiting.code, &*waiting.stdout), (122, ""), "{}", waiting.stderr);
    let mut built = agent_of(&standing, "build.env", "echo built; echo bad >&2; exit 7");
    assert_eq!(built.ended().await, 7);

    let waited = run(&standing, &["wait", "b"]).await;
    assert_eq!((waited.code, &*waited.stdout), (7, "b failed: step main: exit code 7\n"), "{}", waited.stderr);
    let listed = run(&standing, &["builds", "--label", "team=a b"]).await;
    let lines: Vec<_> = listed.stdout.lines().collect();
    assert_eq!((listed.code, lines.len()), (0, 2), "{listed:?}");
    assert!(lines[0].starts_with("BUILD  VERDICT  CODE  LOG"), "{listed:?}");
    assert!(lines[1].starts_with("b      failed   7     complete  20") && lines[1].ends_with("team=a b"), "{listed:?}");
    assert_eq!(run(&standing, &["builds", "--label", "team=c", "--json"]).await.stdout, "");

    let shown = run(&standing, &["show", "b"]).await;
    let digest = blake3::hash(b"built\nbad\n").to_hex().to_string();
    assert!(shown.stdout.contains("verdict   failed: step main: exit code 7 (exit code 7)\n"), "{shown:?}");
    assert!(shown.stdout.contains("6 B on stdout, 4 B on stderr"), "{shown:?}");
    let shown = run(&standing, &["show", "b", "--json"]).await;
    let shown: Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_eq!((&shown["id"], &shown["exit_code"]), (&json!("b"), &json!(7)), "{shown} {digest}");
}

#[tokio::test]
async fn a_build_that_runs_is_shown_and_followed() {
    let standing = Standing::start(&[]).await;
    assert_eq!(run(&standing, &["declare", "b", "--env-file", "build.env"]).await.code, 0);
    let gate = standing.scene.gate("go");
    let mut built = agent_of(&standing, "build.env", &format!("echo hello; {}; echo bye; exit 3", gate.pass()));
    standing.process.stderr.shows("\"connected\"").await;
    let shown = run(&standing, &["show", "b"]).await;
    assert_eq!(shown.code, 0, "{shown:?}");
    let printed = run(&standing, &["logs", "b"]).await;
    assert_eq!(printed.code, 0, "{printed:?}");
    let follower = start(&standing, &["logs", "-f", "b"]);
    follower.stdout.shows("hello").await;
    gate.open();
    let followed = ended(follower).await;
    assert_eq!((followed.code, &*followed.stdout), (3, "hello\nbye\n"), "{followed:?}");
    assert_eq!(built.ended().await, 3);
}

/// Lines come whole, whoever writes in between.
#[tokio::test]
async fn steps_do_not_cut_into_each_others_lines() {
    let standing = Standing::start(&[]).await;
    assert_eq!(run(&standing, &["declare", "b", "--step", "one,two", "--env-file", "build.env"]).await.code, 0);
    let mut agents: Vec<_> = ["one", "two"]
        .map(|step| {
            let script = format!("for i in 1 2 3 4 5; do printf {step}-; sleep 0.05; echo $i; done");
            Process::spawn(agent_command(&standing, "build.env").args(["--step", step, "--", "sh", "-c", &script]))
        })
        .into();
    for agent in &mut agents {
        assert_eq!(agent.ended().await, 0);
    }
    let printed = run(&standing, &["logs", "b"]).await;
    let mut lines: Vec<_> = printed.stdout.lines().collect();
    lines.sort_unstable();
    let whole: Vec<_> =
        ["one", "two"].iter().flat_map(|step| (1..=5).map(move |i| format!("[{step}] {step}-{i}"))).collect();
    assert_eq!(lines, whole);
}

#[tokio::test]
async fn what_a_server_refuses_is_one_line_and_125() {
    let standing = Standing::start(&[]).await;
    let unknown = run(&standing, &["show", "nothing"]).await;
    assert_eq!(unknown.code, 125);
    assert!(unknown.stderr.starts_with("phonehome: the server answered 404 "), "{}", unknown.stderr);
    assert_eq!(unknown.stderr.lines().count(), 1, "{}", unknown.stderr);

    let mut stranger = command(&standing, &["builds"]);
    let stranger = ended(Process::spawn(stranger.env_remove("PHONEHOME_TOKEN"))).await;
    assert_eq!(stranger.code, 125);
    assert!(stranger.stderr.contains("401") && stranger.stderr.contains("PHONEHOME_TOKEN"), "{}", stranger.stderr);

    let mut nobody = command(&standing, &["builds"]);
    let nobody = ended(Process::spawn(nobody.env("PHONEHOME_SERVER", "http://127.0.0.1:1"))).await;
    assert_eq!(nobody.code, 125);
    assert!(nobody.stderr.contains("cannot reach http://127.0.0.1:1: "), "{}", nobody.stderr);

    let taken = run(&standing, &["declare", "b"]).await;
    assert_eq!(taken.code, 0);
    let taken = run(&standing, &["declare", "b"]).await;
    assert!(taken.code == 125 && taken.stderr.contains("409"), "{}", taken.stderr);
}

#[tokio::test]
async fn the_settings_of_a_file_are_used_and_one_that_others_may_read_is_not() {
    let standing = Standing::start(&[]).await;
    let settings = format!("server = \"http://{}\"\ntoken = \"{ADMIN}\"\n", standing.address);
    let path = standing.scene.write("client.toml", settings);
    let ask = || {
        let mut command = command(&standing, &["builds", "--client-config", path.to_str().unwrap()]);
        command.env_remove("PHONEHOME_SERVER").env_remove("PHONEHOME_TOKEN");
        Process::spawn(&mut command)
    };
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let refused = ended(ask()).await;
    assert!(refused.code == 125 && refused.stderr.contains("chmod 600"), "{}", refused.stderr);
    assert!(!refused.stderr.contains(ADMIN));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let accepted = ended(ask()).await;
    assert_eq!(accepted.code, 0, "{}", accepted.stderr);
}

#[tokio::test]
async fn a_server_with_a_key_of_its_own_is_known_by_its_pin() {
    let standing = Standing::start(&["--tls-self-signed"]).await;
    let log = String::from_utf8(standing.process.stderr.so_far()).unwrap();
    let serving: Value = serde_json::from_str(log.lines().find(|line| line.contains("\"serving\"")).unwrap()).unwrap();
    let pin = serving["pin"].as_str().unwrap();
    let url = format!("https://{}", standing.address);
    let other = format!("sha256:{}", "0a".repeat(32));
    for (pin, expected) in [(pin, ""), (&*other, "which is not the pinned one")] {
        let mut command = command(&standing, &["builds", "--json", "--pin", pin]);
        let listed = ended(Process::spawn(command.env("PHONEHOME_SERVER", &url))).await;
        assert_eq!(listed.code == 0, expected.is_empty(), "{listed:?}");
        assert!(listed.stderr.contains(expected), "{listed:?}");
    }
    let scene = Scene::new();
    let mut hook = scene.command(server());
    hook.env("PHONEHOME_TOKEN", ADMIN).args(["hook", "--timeout", "2m", "--via", &url, "--pin", pin]);
    hook.args(["--", "sh", "-c", &builder(&scene, &[], "echo built; exit 4")]);
    let ended = ended(Process::spawn(&mut hook)).await;
    assert_eq!((ended.code, &*ended.stdout), (4, "built\n"), "{}", ended.stderr);
}

#[tokio::test]
async fn nothing_is_removed_where_no_rule_says_so() {
    let standing = Standing::start(&[]).await;
    for flags in [&["prune", "--dry-run"][..], &["prune"]] {
        let pruned = run(&standing, flags).await;
        assert_eq!(pruned.code, 0, "{pruned:?}");
        assert!(pruned.stdout.contains("0 builds, 0 B"), "{pruned:?}");
    }
}

#[tokio::test]
async fn a_cancelled_build_says_why_and_a_removed_one_is_gone() {
    let standing = Standing::start(&[]).await;
    run(&standing, &["declare", "b", "--env-file", "build.env"]).await;
    let mut agent = agent_of(&standing, "build.env", "echo going; exec sleep 120");
    let follower = start(&standing, &["logs", "-f", "b"]);
    follower.stdout.shows("going\n").await;
    assert_eq!(run(&standing, &["rm", "b"]).await.code, 125, "it runs");
    assert_eq!(run(&standing, &["cancel", "b", "--reason", "no longer wanted"]).await.code, 0);
    let followed = ended(follower).await;
    assert_eq!((followed.code, &*followed.stdout), (130, "going\n"), "{}", followed.stderr);
    assert!(followed.stderr.contains("build cancelled: no longer wanted (exit code 130)"), "{}", followed.stderr);
    agent.ended().await;
    assert_eq!(run(&standing, &["cancel", "b"]).await.code, 125, "it has ended");
    assert_eq!(run(&standing, &["rm", "b"]).await.stdout, "build b is removed\n");
    assert_eq!(run(&standing, &["show", "b"]).await.code, 125);
}

#[tokio::test]
async fn a_log_is_printed_stream_by_stream_and_byte_by_byte() {
    let standing = Standing::start(&[]).await;
    run(&standing, &["declare", "b", "--env-file", "build.env"]).await;
    let script = "printf 'one\\ntwo\\n\\377\\000\\033[2J'; printf 'bad\\n' >&2; exit 3";
    assert_eq!(agent_of(&standing, "build.env", script).ended().await, 3);
    let (stdout, stderr) = (b"one\ntwo\n\xff\0\x1b[2J".as_slice(), b"bad\n".as_slice());

    let mut printed = start(&standing, &["logs", "b"]);
    assert_eq!(printed.ended().await, 0);
    assert_eq!((&*printed.stdout.all().await, &*printed.stderr.all().await), (stdout, stderr));
    let mut followed = start(&standing, &["logs", "--follow", "b"]);
    assert_eq!(followed.ended().await, 3);
    assert_eq!(followed.stdout.all().await, stdout);
    let told = String::from_utf8(followed.stderr.all().await).unwrap();
    assert!(told.starts_with("bad\nphonehome: build failed: step main: exit code 3; the log is complete"), "{told}");

    let mut raw = start(&standing, &["logs", "--raw", "--exit-code", "b"]);
    assert_eq!(raw.ended().await, 3);
    assert_eq!(raw.stdout.all().await, standing.stored("b", "main"));
    let mut tail = start(&standing, &["logs", "--stream", "stdout", "--raw", "--from", "4", "b"]);
    assert_eq!(tail.ended().await, 0);
    assert_eq!(tail.stdout.all().await, &stdout[4..]);

    let only = run(&standing, &["logs", "--stream", "stderr", "b"]).await;
    assert_eq!((&*only.stdout, &*only.stderr), ("", "bad\n"));
    let stamped = run(&standing, &["logs", "--timestamps", "--stream", "stderr", "b"]).await;
    assert!(stamped.stderr.starts_with("20") && stamped.stderr.ends_with("Z bad\n"), "{}", stamped.stderr);
}

#[tokio::test]
async fn several_steps_carry_their_names_and_one_alone_does_not() {
    let standing = Standing::start(&[]).await;
    run(&standing, &["declare", "b", "--step", "build,test", "--env-file", "build.env"]).await;
    for step in ["build", "test"] {
        let mut command = agent_command(&standing, "build.env");
        command.args(["--step", step, "--tee", "off", "--", "sh", "-c", &format!("echo {step}ing")]);
        assert_eq!(Process::spawn(&mut command).ended().await, 0);
    }
    let printed = run(&standing, &["logs", "-f", "b"]).await;
    assert_eq!((printed.code, &*printed.stdout), (0, "[build] building\n[test] testing\n"), "{}", printed.stderr);
    let one = run(&standing, &["logs", "--step", "test", "b"]).await;
    assert_eq!((one.code, &*one.stdout), (0, "testing\n"), "{}", one.stderr);
    let none = run(&standing, &["logs", "--step", "tset", "b"]).await;
    assert!(none.code == 125 && none.stderr.contains("only: build, test"), "{}", none.stderr);
}

#[tokio::test]
async fn a_follower_loses_and_repeats_nothing_however_often_server_and_way_are_gone() {
    let mut standing = Standing::start(&["--lost-timeout", "60s"]).await;
    let lines = Lines::prepare(&standing.scene, 20_000);
    run(&standing, &["declare", "b", "--env-file", "build.env"]).await;
    let mut agent = agent_of(&standing, "build.env", Lines::UNTIL_ENOUGH);
    let proxy = Proxy::to(standing.address, Mode::Cut(1_000..20_000), 7).await;
    let mut command = command(&standing, &["logs", "-f", "b"]);
    let mut follower = Process::spawn(command.env("PHONEHOME_SERVER", format!("http://{}", proxy.address())));
    for round in [20, 60, 100] {
        let line = lines.first(round);
        let last = line.split_inclusive(|byte| *byte == b'\n').next_back().unwrap();
        tokio::select! {
            biased;
            told = follower.stderr.all() => panic!("it gave up: {}", String::from_utf8_lossy(&told)),
            () = follower.stdout.shows(std::str::from_utf8(last).unwrap()) => {}
        }
        standing.crash().await;
    }
    standing.scene.write("enough", "");
    assert_eq!(agent.ended().await, 7);
    assert_eq!(follower.ended().await, 7, "{}", String::from_utf8_lossy(&follower.stderr.so_far()));
    assert_eq!(follower.stdout.all().await, Lines::written(&standing.scene));
    assert!(proxy.cut() > 0);
}

#[tokio::test]
async fn a_reader_who_goes_away_is_no_error_worth_a_word() {
    let standing = Standing::start(&[]).await;
    run(&standing, &["declare", "b", "--env-file", "build.env"]).await;
    let mut agent = agent_of(&standing, "build.env", "echo going; exec sleep 120");
    let mut follower = start(&standing, &["logs", "-f", "b"]);
    follower.stdout.shows("going\n").await;
    follower.stdout.stop_reading().await;
    assert_eq!(follower.ended().await, 141);
    assert_eq!(follower.stderr.all().await, b"");
    run(&standing, &["cancel", "b"]).await;
    agent.ended().await;
}

#[tokio::test]
async fn a_log_is_verified_there_and_here() {
    let standing = Standing::start(&[]).await;
    run(&standing, &["declare", "b", "--env-file", "build.env"]).await;
    assert_eq!(agent_of(&standing, "build.env", "echo built").ended().await, 0);
    run(&standing, &["wait", "b"]).await;
    let digest = blake3::hash(b"built\n").to_hex();
    for flags in [&["verify", "b"][..], &["verify", "b", "--local"]] {
        let verified = run(&standing, flags).await;
        assert_eq!(verified.code, 0, "{verified:?}");
        assert!(verified.stdout.starts_with("main attempt 1: ok; 6 B"), "{verified:?}");
        assert!(verified.stdout.ends_with(&format!("BLAKE3 {digest}\n")), "{verified:?}");
    }
    std::fs::write(standing.data.join("builds/b/main/1/log"), "bulit\n").unwrap();
    for flags in [&["verify", "b"][..], &["verify", "b", "--local"]] {
        let verified = run(&standing, flags).await;
        assert!(verified.code == 1 || verified.code == 125 && flags.len() == 3, "{verified:?}");
    }
}

#[tokio::test]
async fn a_canary_comes_back_as_it_was_sent() {
    let standing = Standing::start(&[]).await;
    let agent = agent();
    let flags = ["canary", "--agent", agent.to_str().unwrap(), "--size", "3MiB"];
    let back = run(&standing, &flags).await;
    assert_eq!(back.code, 0, "{back:?}");
    assert!(back.stdout.contains("both streams, digest and verdict are as they were sent"), "{back:?}");
    assert_eq!(run(&standing, &["builds", "--json"]).await.stdout, "", "it is removed");
    assert_eq!(run(&standing, &[&flags[..], &["--keep"]].concat()).await.code, 0);
    assert!(run(&standing, &["builds"]).await.stdout.contains("phonehome/canary=true"));
    let unsent = run(&standing, &["canary", "--agent", "/nowhere"]).await;
    assert!(unsent.code == 125 && unsent.stderr.contains("/nowhere cannot be started"), "{unsent:?}");
}

#[tokio::test]
async fn a_hook_via_a_standing_server_prints_and_ends_as_one_without() {
    let standing = Standing::start(&[]).await;
    let scene = Scene::new();
    let script = "echo built; echo bad >&2; exit 3";
    let launcher = format!("env | grep PHONEHOME_ >\"$E2E_SCENE/told\"; {}", builder(&scene, &[], script));
    let ended = ended(hook(&standing, &scene, &["--build", "push"], &launcher)).await;
    assert_eq!((ended.code, &*ended.stdout), (3, "built\n"), "{}", ended.stderr);
    assert!(ended.stderr.contains("bad\n"), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("build failed: step main: exit code 3; the log is complete: 10 bytes"),
        "{}",
        ended.stderr
    );
    let told = scene.read("told");
    assert!(told.contains("PHONEHOME_BUILD=push\n") && told.contains("PHONEHOME_TOKEN=phonehome_build_"), "{told}");
    assert!(!told.contains(ADMIN), "{told}");
    assert_eq!(run(&standing, &["show", "push"]).await.code, 0);
}

#[tokio::test]
async fn a_launcher_that_fails_fails_the_push_and_its_build() {
    let standing = Standing::start(&[]).await;
    let scene = Scene::new();
    let ended = ended(hook(&standing, &scene, &["--build", "push"], "echo no quota >&2; exit 1")).await;
    assert_eq!(ended.code, 125, "{}", ended.stderr);
    assert!(ended.stderr.contains("no quota\n"), "{}", ended.stderr);
    let said = "error: the launcher failed with exit status: 1 before any builder phoned home";
    assert!(ended.stderr.contains(said), "{}", ended.stderr);
    let build = run(&standing, &["show", "push"]).await.stdout;
    assert!(build.contains("cancelled") && build.contains("LauncherFailed"), "{build}");
}

#[tokio::test]
async fn a_pusher_who_leaves_stops_the_build_on_the_standing_server() {
    let standing = Standing::start(&[]).await;
    let scene = Scene::new();
    let script =
        "exec 2>/dev/null; trap 'echo stopping; exit 9' TERM; echo going; for i in $(seq 1200); do sleep 0.1; done";
    let hook = hook(&standing, &scene, &["--build", "push"], &builder(&scene, &[], script));
    hook.stdout.shows("going\n").await;
    hook.signal(Signal::HUP);
    let ended = ended(hook).await;
    assert_eq!((ended.code, &*ended.stdout), (130, "going\nstopping\n"), "{}", ended.stderr);
    assert!(ended.stderr.contains("cancelled: the pusher hung up"), "{}", ended.stderr);
}

#[tokio::test]
async fn a_build_on_a_standing_server_may_go_on_without_the_pusher() {
    let standing = Standing::start(&[]).await;
    let scene = Scene::new();
    let gate = scene.gate("gate");
    let launcher = builder(&scene, &[], &format!("echo going; {}; echo finished; exit 5", gate.pass()));
    let mut hook = hook(&standing, &scene, &["--build", "push", "--on-hangup", "continue"], &launcher);
    hook.stdout.shows("going\n").await;
    hook.stdout.stop_reading().await;
    hook.stderr.stop_reading().await;
    gate.open();
    assert_eq!(hook.ended().await, 5);
    assert_eq!(standing.stored("push", "main"), b"going\nfinished\n");
}

#[tokio::test]
async fn a_build_nobody_phones_for_tells_what_was_reported() {
    let standing = Standing::start(&[]).await;
    let scene = Scene::new();
    let hook =
        hook(&standing, &scene, &["--build", "push", "--connect-timeout", "3s"], "touch \"$E2E_SCENE/launched\"");
    scene.appears("launched").await;
    let report = json!({"type": "Warning", "reason": "Failed", "message": "image nothing:1 cannot be pulled"});
    let answer = standing.post("/api/v1/builds/push/events", report).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    let ended = ended(hook).await;
    assert_eq!(ended.code, 124, "{}", ended.stderr);
    let told = "phonehome: reported: Failed: image nothing:1 cannot be pulled\n";
    let (shown, last_words) = ended.stderr.split_once("timed out: nobody phoned home").unwrap();
    assert!(shown.contains(told) && last_words.contains(told), "{}", ended.stderr);
}

#[tokio::test]
async fn a_hook_via_a_standing_server_survives_its_crashes() {
    let mut standing = Standing::start(&[]).await;
    let scene = Scene::new();
    let lines = Lines::prepare(&scene, 20_000);
    let launcher = builder(&scene, &[], Lines::UNTIL_ENOUGH);
    let mut hook = hook(&standing, &scene, &["--build", "push"], &launcher);
    for round in [20, 60, 100] {
        let line = lines.first(round);
        let last = line.split_inclusive(|byte| *byte == b'\n').next_back().unwrap();
        hook.stdout.shows(std::str::from_utf8(last).unwrap()).await;
        standing.crash().await;
    }
    scene.write("enough", "");
    assert_eq!(hook.ended().await, 7, "{}", String::from_utf8_lossy(&hook.stderr.so_far()));
    assert_eq!(hook.stdout.all().await, Lines::written(&scene));
    let told = String::from_utf8(hook.stderr.all().await).unwrap();
    assert!(told.contains("the log is complete"), "{told}");
}

#[tokio::test]
async fn a_hook_whose_standing_server_stays_away_ends_with_the_lost_clock() {
    let mut standing = Standing::start(&[]).await;
    let scene = Scene::new();
    let gate: Gate = scene.gate("gate");
    let launcher = builder(&scene, &[], &format!("echo going; {}", gate.pass()));
    let hook = hook(&standing, &scene, &["--lost-timeout", "2s"], &launcher);
    hook.stdout.shows("going\n").await;
    standing.process.signal(Signal::KILL);
    standing.process.ended().await;
    let ended = ended(hook).await;
    assert_eq!(ended.code, 125, "{}", ended.stderr);
    assert!(ended.stderr.contains("the server has not been heard of for "), "{}", ended.stderr);
}

#[tokio::test]
async fn options_that_open_a_port_make_no_sense_via_a_server() {
    let standing = Standing::start(&[]).await;
    for flags in [&["--listen", "127.0.0.1:0"][..], &["--advertise", "h"], &["--no-tls"], &["--data", "d"]] {
        let ended = ended(hook(&standing, &standing.scene, flags, "true")).await;
        assert_eq!(ended.code, 125);
        assert!(ended.stderr.contains("cannot be used with"), "{}", ended.stderr);
    }
}

/// What a command has printed and exited with.
#[derive(Debug)]
struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

async fn ended(mut process: Process) -> Ended {
    let code = process.ended().await;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ended { code, stdout: text(process.stdout.all().await), stderr: text(process.stderr.all().await) }
}

fn command(standing: &Standing, arguments: &[&str]) -> Command {
    let mut command = standing.scene.command(server());
    command.env("PHONEHOME_SERVER", format!("http://{}", standing.address)).env("PHONEHOME_TOKEN", ADMIN);
    command.args(arguments);
    command
}

fn start(standing: &Standing, arguments: &[&str]) -> Process {
    Process::spawn(&mut command(standing, arguments))
}

async fn run(standing: &Standing, arguments: &[&str]) -> Ended {
    ended(start(standing, arguments)).await
}

/// An agent that is told what an environment file of the scene says.
fn agent_command(standing: &Standing, env_file: &str) -> Command {
    let mut command = standing.scene.command(agent());
    let text = standing.scene.read(env_file);
    command.envs(text.lines().filter_map(|line| line.split_once('=')));
    command
}

fn agent_of(standing: &Standing, env_file: &str, script: &str) -> Process {
    Process::spawn(agent_command(standing, env_file).args(["--tee", "off", "--", "sh", "-c", script]))
}

/// A hook in a scene of its own.
fn hook(standing: &Standing, scene: &Scene, flags: &[&str], launcher: &str) -> Process {
    let mut command = scene.command(server());
    command.env("PHONEHOME_TOKEN", ADMIN).args(["hook", "--timeout", "2m"]);
    command.args(["--via", &format!("http://{}", standing.address)]).args(flags);
    Process::spawn(command.args(["--", "sh", "-c", launcher]))
}
