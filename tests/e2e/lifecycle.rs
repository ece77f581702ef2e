//! What happens to a command, as the server has it: each change once, in order, with the time at which it happened.

use std::{
    fs,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::{Hook, Site, Stored, eventually};

#[tokio::test]
async fn a_life_is_told_while_it_lasts() {
    a_life_is_told(false).await;
}

#[tokio::test]
async fn a_life_is_told_afterwards_when_the_server_was_away() {
    a_life_is_told(true).await;
}

/// Waits for a sibling, becomes ready, is ended for another's death, and leaves a process behind. That it is ended by TERM is
/// a success; how it really ended is told all the same.
async fn a_life_is_told(is_away: bool) {
    let site = Site::new();
    let graveyard = site.scene.path("graveyard");
    fs::create_dir(&graveyard).unwrap();
    let carve = |name: &str, text: &str| fs::write(graveyard.join(name), text).unwrap();
    let mut collector = None;
    if !is_away {
        collector = Some(site.started().await);
    }
    let options = "--name proxy --graveyard graveyard --birth-deps db --death-deps main --expected-exit 143 --linger 1m \
                   --ready-when output:^up$ --grace-period 1s --redact-env HOME --log-level info";
    let script = "setsid sleep 1000 & echo $HOME; echo up; read -r _ <\"$E2E_SCENE/gate\"";
    let _gate = site.scene.gate("gate");
    let begun = now();
    let mut agent = site.agent(&options.split(' ').collect::<Vec<_>>(), script);
    let attempt = site.attempt(1);
    agent.stderr.shows("waiting for db to be born").await;
    if !is_away {
        eventually("the server knows of it", || names(&attempt) == ["waiting"]).await;
    }
    let born = now();
    carve("db", BORN);
    agent.stderr.shows("the command is ready").await;
    let died = now();
    carve("main", &format!("{BORN}Died: \"2026-11-21T08:58:45Z\"\nExitCode: 0\n"));
    let stone = || fs::read_to_string(graveyard.join("proxy")).unwrap_or_default();
    eventually("the command has ended", || stone().contains("Died")).await;
    let ended = now();
    let mut collector = match collector {
        Some(collector) => collector,
        None => site.started().await,
    };
    assert_eq!((collector.ended().await, agent.ended().await), (0, 0));

    let events = Stored::events(&attempt);
    let told: Vec<_> = events.iter().map(|(_, event)| shortened(event)).collect();
    let expected = [
        json!({"event": "waiting", "for": ["db to be born"]}),
        json!({"event": "born", "program": "sh"}),
        json!({"event": "ready", "by": "output:^up$"}),
        json!({"event": "stopping", "reason": "main has died with exit code 0", "signal": "SIGTERM", "grace_ms": 1000}),
        json!({"event": "leftovers", "policy": "terminate", "processes": ["sleep"], "total": 1}),
        json!({"event": "redaction", "values": 2, "replaced": 1}),
        json!({"event": "terminated", "code": 143, "signal": "SIGTERM", "core": false, "oom": false,
               "reason": "main has died with exit code 0"}),
    ];
    assert_eq!(told, expected);
    let times: Vec<_> = events.iter().map(|(time, _)| *time).collect();
    assert!(times.is_sorted(), "{times:?}");
    // Each is as old as what it tells of, and what came before the server did is older than that.
    assert!(begun <= times[0] && born <= times[1] && died <= times[3] && times[3] <= ended, "{times:?}");
    let stored = Stored::read(&site.data, "kept", "main", 1);
    stored.assert_complete();
    assert_eq!(stored.log, b"[redacted]\nup\n");
    let finished = &stored.finished["finished"];
    assert_eq!(finished["end"], json!({"exited": 0}), "{finished}");
    let used = |what: &str| finished["usage"][what].as_u64().unwrap();
    assert!(used("wall") > 0 && used("max_rss") > 0, "{finished}");
    assert_eq!(Stored::verdict(&site.data, "kept").await["verdict"], "succeeded");
}

#[tokio::test]
async fn what_a_command_waits_for_is_told_when_it_changes_and_only_then() {
    let mut hook = Hook::wait(&["--data", "data", "--build", "waits"]).await;
    let attempt = hook.scene.path("data/builds/waits/main/1");
    let graveyard = hook.scene.path("graveyard");
    fs::create_dir(&graveyard).unwrap();
    let options = "--graveyard graveyard --birth-deps a,b --birth-timeout 2s --wait-for queue=file:/no/such/file";
    let mut agent = hook.agent(&options.split(' ').collect::<Vec<_>>(), "echo started");
    eventually("the server knows of it", || names(&attempt) == ["waiting"]).await;
    fs::write(graveyard.join("nobody"), BORN).unwrap(); // no change of what is missing
    fs::write(graveyard.join("a"), BORN).unwrap();
    eventually("the server knows of the change", || names(&attempt) == ["waiting"; 2]).await;
    let ended = hook.ended().await;
    assert_eq!((ended.code, agent.ended().await, &*ended.stdout), (125, 125, &b""[..]), "{}", ended.stderr());
    let events = Stored::events(&attempt);
    let [first, second, error, terminated] = &events[..] else { panic!("{events:?}") };
    let queue = "queue to pass file:/no/such/file";
    assert_eq!(first.1, json!({"event": "waiting", "for": ["a to be born", "b to be born", queue]}));
    assert_eq!(second.1, json!({"event": "waiting", "for": ["b to be born", queue]}));
    let reason = "not started: waited 2s for: b to be born (no tombstone; there are: a, nobody), queue to pass";
    for (event, name) in [(&error.1, "error"), (&terminated.1, "terminated")] {
        assert_eq!(event["event"], name);
        assert!(event["reason"].as_str().unwrap().starts_with(reason), "{event}");
    }
}

#[tokio::test]
async fn a_cancel_and_what_it_does_are_told() {
    let mut hook = Hook::wait(&["--data", "data", "--build", "cancelled"]).await;
    let attempt = hook.scene.path("data/builds/cancelled/main/1");
    let _gate = hook.scene.gate("gate");
    let mut agent = hook.agent(&[], "echo up; read -r _ <\"$E2E_SCENE/gate\"");
    hook.process.stdout.shows("up").await;
    hook.signal(Signal::TERM);
    assert_eq!((hook.ended().await.code, agent.ended().await), (130, 143));
    assert_eq!(names(&attempt), ["born", "cancelled", "stopping", "terminated"]);
    let events = Stored::events(&attempt);
    assert_eq!((&events[2].1["signal"], &events[3].1["signal"]), (&"SIGTERM".into(), &"SIGTERM".into()), "{events:?}");
}

#[tokio::test]
async fn a_graveyard_that_cannot_be_written_to_is_an_error_told_once() {
    let mut hook = Hook::wait(&["--data", "data", "--build", "unwritable"]).await;
    let attempt = hook.scene.path("data/builds/unwritable/main/1");
    let gate = hook.scene.gate("gate");
    hook.scene.write("graveyard", "a file in its place");
    let mut agent = hook.agent(&["--name", "main", "--graveyard", "graveyard"], &gate.pass());
    eventually("the server knows of it", || names(&attempt).contains(&"error".to_owned())).await;
    gate.open();
    assert_eq!((hook.ended().await.code, agent.ended().await), (0, 0));
    let mut told = names(&attempt);
    told.sort_unstable(); // the tombstone is carved on its own time
    assert_eq!(told, ["born", "error", "terminated"]);
    let events = Stored::events(&attempt);
    let error = events.iter().find(|(_, event)| event["event"] == "error").unwrap();
    assert!(
        error.1["reason"].as_str().unwrap().starts_with("cannot write the tombstone graveyard/main: "),
        "{}",
        error.1
    );
}

const BORN: &str = "Born: \"2026-11-21T08:58:44.123456789Z\"\n";

/// The names of the events that are stored by now.
fn names(attempt: &Path) -> Vec<String> {
    Stored::events(attempt).iter().map(|(_, event)| event["event"].as_str().unwrap().to_owned()).collect()
}

/// Without what is different each time: numbers of processes, and how long it took.
fn shortened(event: &Value) -> Value {
    let mut event = event.clone();
    let members = event.as_object_mut().unwrap();
    members.remove("pid");
    members.remove("duration_ms");
    if let Some(processes) = members.get_mut("processes").and_then(Value::as_array_mut) {
        processes.iter_mut().for_each(|process| *process = process["name"].take());
    }
    event
}

/// As records have it, microseconds.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64
}
