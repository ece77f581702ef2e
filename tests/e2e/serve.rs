//! The standing server: builds over crashes, who may do what, and what cannot be understood.

use phonehome_proto::{
    codec::Codec,
    frame::{FinishedAck, ServerFrame},
};
use serde_json::{Value, json};

use crate::harness::{ADMIN, Caller, READER, Records, Standing, exchange, patiently};

#[tokio::test]
async fn three_builds_outlive_three_crashes_of_the_server() {
    let mut standing = Standing::start(&[]).await;
    let mut builds = Vec::new();
    for (id, code) in [("one", 0), ("two", 3), ("three", 77)] {
        let token = standing.declare_one(id).await;
        let gate = standing.scene.gate(id);
        // Megabytes before and after each crash, and something that only comes at the end.
        let burst = format!("seq -f '{id} %.0f' 1 60000");
        let script =
            format!("{burst}; {pass}; {burst}; {pass}; {burst}; {pass}; echo last; exit {code}", pass = gate.pass());
        let agent = standing.agent(id, &token, &["--tee", "off"], &script);
        builds.push((id, code, gate, agent));
    }
    for _ in 0..3 {
        standing.crash().await;
        for (_, _, gate, _) in &builds {
            gate.open();
        }
    }
    for (id, code, _, agent) in &mut builds {
        assert_eq!(agent.ended().await, *code, "{}", String::from_utf8_lossy(&agent.stderr.so_far()));
        let build = standing.ended(id).await;
        assert_eq!((&build["complete"], &build["exit_code"]), (&json!(true), &json!(*code)), "{build}");
        let expected: String = (1..=60000).map(|line| format!("{id} {line}\n")).collect();
        let stored = standing.stored(id, "main");
        let whole = format!("{expected}{expected}{expected}last\n");
        assert!(stored == whole.as_bytes(), "{id}: {} bytes stored, {} written", stored.len(), whole.len());
        let attempts = build["steps"][0]["attempts"].as_array().unwrap();
        assert_eq!(attempts.len(), 1, "no agent was started twice");
        assert_eq!(attempts[0]["digest"], json!(blake3::hash(&stored).to_hex().as_str()));
    }
}

#[tokio::test]
async fn an_end_is_known_for_good_and_to_whoever_asks_late() {
    let mut standing = Standing::start(&[]).await;
    let token = standing.declare(json!({"id": "b", "labels": {"app": "shop"}})).await;
    let waiting = standing.get("/api/v1/builds/b").await.json();
    assert_eq!((&waiting["state"], &waiting["verdict"]), (&json!("waiting"), &Value::Null));
    assert_eq!(standing.agent("b", &token, &[], "echo hello; exit 4").ended().await, 4);
    let ended = standing.ended("b").await;
    assert_eq!((&ended["verdict"], &ended["exit_code"], &ended["bytes"]), (&json!("failed"), &json!(4), &json!(6)));
    standing.crash().await;
    assert_eq!(standing.get("/api/v1/builds/b").await.json(), ended);
    let listed = standing.get("/api/v1/builds?label=app%3Dshop&verdict=failed").await.json();
    assert_eq!(listed["builds"][0]["id"], json!("b"));
    standing.process.signal(rustix::process::Signal::TERM);
    assert_eq!(standing.process.ended().await, 0);
    std::fs::write(standing.data.join("catalogue.db"), "no database").unwrap();
    let mut rebuild = standing.scene.command(crate::harness::server());
    let mut rebuild = crate::harness::Process::spawn(rebuild.args(["rebuild", "--data"]).arg(&standing.data));
    assert_eq!(rebuild.ended().await, 0);
    rebuild.stderr.shows("1 builds are in the catalogue").await;
    standing.start_again().await;
    assert_eq!(
        standing.get("/api/v1/builds").await.json()["builds"][0],
        listed["builds"][0],
        "made again from the files"
    );
}

#[tokio::test]
async fn whoever_declares_the_same_again_gets_the_same() {
    let standing = Standing::start(&[]).await;
    let token = format!("phonehome_build_{}", "ab".repeat(32));
    let declaration = json!({"id": "b", "token": token});
    for _ in 0..2 {
        assert_eq!(standing.declare(declaration.clone()).await, token);
    }
    let same_token = standing.post("/api/v1/builds", json!({"id": "c", "token": token})).await;
    assert_eq!(same_token.status, 409, "{same_token:?}");
    let other = standing.post("/api/v1/builds", json!({"id": "b"})).await;
    assert_eq!((other.status, other.headers["content-type"].as_str()), (409, "application/problem+json"));
}

#[tokio::test]
async fn a_token_opens_what_it_is_for_and_nothing_else() {
    let standing = Standing::start(&[]).await;
    let one = standing.declare_one("one").await;
    standing.declare_one("two").await;
    let report = || Some(json!({"reason": "Queued"}));
    for (method, path, token, body, expected) in [
        ("GET", "/api/v1/builds", "", None, 401),
        ("GET", "/api/v1/builds", "wrong", None, 401),
        ("GET", "/api/v1/builds", one.as_str(), None, 403),
        ("GET", "/api/v1/builds", READER, None, 200),
        ("POST", "/api/v1/builds", READER, Some(json!({})), 403),
        ("POST", "/api/v1/builds/one/cancel", READER, None, 403),
        ("POST", "/api/v1/builds/one/events", one.as_str(), report(), 202),
        ("POST", "/api/v1/builds/two/events", one.as_str(), report(), 403),
        ("POST", "/api/v1/builds/one/events", READER, report(), 403),
        ("POST", "/api/v1/builds/one/events", ADMIN, report(), 202),
        ("POST", "/api/v1/builds/one/events", ADMIN, Some(json!({})), 400),
    ] {
        let answer = standing.ask(method, path, token, body).await;
        assert_eq!(answer.status, expected, "{method} {path}: {answer:?}");
        if expected >= 400 {
            assert_eq!(answer.headers["content-type"], "application/problem+json");
            assert!(!answer.text().contains("phonehome_build_"), "no token in an error: {answer:?}");
        }
    }
    // The agent of one build with the token of another.
    let mut agent = standing.agent("two", &one, &["--require-delivery", "--linger", "5s"], "true");
    assert_eq!(agent.ended().await, 125);
}

#[tokio::test]
async fn what_cannot_be_understood_is_answered_and_harms_nobody() {
    let standing = Standing::start(&[]).await;
    standing.declare_one("b").await;
    for (method, path, body, expected) in [
        ("POST", "/api/v1/builds", Some(json!({"idd": "typo"})), 400),
        ("POST", "/api/v1/builds", Some(json!({"id": "../../etc/passwd"})), 400),
        ("POST", "/api/v1/builds", Some(json!({"id": ".hidden"})), 400),
        ("POST", "/api/v1/builds", Some(json!({"steps": []})), 400),
        ("POST", "/api/v1/builds", Some(json!({"steps": ["a", "a"]})), 400),
        ("POST", "/api/v1/builds", Some(json!({"steps": ["verdict.json"]})), 400),
        ("POST", "/api/v1/builds", Some(json!({"timeouts": {"total": -1}})), 400),
        ("POST", "/api/v1/builds", Some(json!({"timeouts": {"total": 1e300}})), 400),
        ("POST", "/api/v1/builds", Some(json!([])), 400),
        ("GET", "/api/v1/builds/..%2f..%2fetc", None, 404),
        ("GET", "/api/v1/builds/%00", None, 404),
        ("GET", "/api/v1/builds/%ff", None, 404),
        ("GET", "/api/v1/builds/../../etc/passwd", None, 404),
        ("GET", "/api/v1/builds?limit=0", None, 400),
        ("GET", "/api/v1/builds?limit=9999999999999999999999", None, 400),
        ("GET", "/api/v1/builds?verdict=good", None, 400),
        ("GET", "/api/v1/builds?cursor=x", None, 400),
        ("GET", "/api/v1/builds?since=yesterday", None, 400),
        ("GET", "/api/v1/builds?colour=red", None, 400),
        ("PUT", "/api/v1/builds", None, 405),
        ("TRACE", "/api/v1/builds/b", None, 405),
        ("GET", "/nothing", None, 404),
        ("GET", "/api/v1/builds/b/wait?timeout=-1", None, 400),
        ("GET", "/api/v1/builds/b/wait?timeout=NaN", None, 400),
        ("GET", "/api/v1/builds/b/wait?timeout=0", None, 204),
    ] {
        let answer = standing.ask(method, path, ADMIN, body.clone()).await;
        assert_eq!(answer.status, expected, "{method} {path} {body:?}: {}", answer.text());
    }
    let huge = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(1024 * 1024));
    let answer =
        tokio::time::timeout(crate::harness::PATIENCE, try_exchange(&standing, huge.as_bytes())).await.unwrap();
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"), "{}", answer.escape_ascii());
    let wrong_type =
        "POST /api/v1/builds HTTP/1.0\r\nAuthorization: Bearer admin-of-this-test\r\nContent-Length: 2\r\n\r\n{}";
    assert_eq!(patiently("an answer", exchange(standing.address, wrong_type.as_bytes())).await.status, 415);
    let endless = "POST /api/v1/builds HTTP/1.0\r\nAuthorization: Bearer admin-of-this-test\r\n\
                   Content-Type: application/json\r\nContent-Length: 99999999\r\n\r\n{}";
    let answer = patiently("an answer", exchange(standing.address, endless.as_bytes())).await;
    assert!(matches!(answer.status, 408 | 413), "{answer:?}");
    assert_eq!(standing.get("/healthz").await.status, 200);
}

/// Whatever comes back before the server closes, or resets, the connection.
async fn try_exchange(standing: &Standing, request: &[u8]) -> Vec<u8> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(standing.address).await.unwrap();
    drop(stream.write_all(request).await); // it may have had enough before the end
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer).await); // what came before a reset counts
    answer
}

#[tokio::test]
async fn what_only_the_cluster_knows_is_shown() {
    let mut standing = Standing::start(&[]).await;
    standing.declare_one("b").await;
    let exported = json!({
        "metadata": {"name": "b.17", "namespace": "builds"}, "reason": "Failed", "type": "Warning", "count": 2,
        "message": "Failed to pull image", "source": {"component": "kubelet", "host": "node-1"},
        "involvedObject": {"kind": "Pod", "name": "b", "namespace": "builds", "labels": {"phonehome/build": "b"}}
    });
    assert_eq!(standing.post("/api/v1/events", exported.clone()).await.status, 202);
    assert_eq!(standing.post("/api/v1/builds/b/events", exported).await.status, 202, "the same again is no news");
    assert_eq!(standing.post("/api/v1/events", json!({"reason": "of nobody"})).await.status, 204);
    standing.crash().await;
    let build = standing.get("/api/v1/builds/b").await.json();
    assert_eq!(build["reports"].as_array().unwrap().len(), 1, "{build}");
    assert_eq!((&build["reports"][0]["object"], &build["report"]["node"]), (&json!("Pod/b"), &json!("node-1")));
    let listed = standing.get("/api/v1/builds?verdict=running").await.json();
    assert_eq!(listed["builds"][0]["report"]["reason"], json!("Failed"));
}

#[tokio::test]
async fn a_build_that_is_cancelled_stops() {
    let standing = Standing::start(&[]).await;
    let token = standing.declare_one("b").await;
    let mut agent = standing.agent("b", &token, &[], "echo begun; sleep 600");
    standing.process.stderr.shows("\"connected\"").await;
    agent.stdout.shows("begun").await;
    assert_eq!(standing.post("/api/v1/builds/b/cancel", json!({"reason": "enough"})).await.status, 202);
    assert_eq!(agent.ended().await, 143);
    let build = standing.ended("b").await;
    assert_eq!((&build["verdict"], &build["exit_code"]), (&json!("cancelled"), &json!(130)));
    assert_eq!(standing.post("/api/v1/builds/b/cancel", json!({})).await.status, 409);
}

#[tokio::test]
async fn beyond_this_machine_it_is_not_plain_by_accident() {
    let standing = Standing::start(&[]).await;
    let mut command = standing.scene.command(crate::harness::server());
    command.args(["serve", "--data"]).arg(standing.scene.path("other")).args(["--listen", "0.0.0.0:0"]);
    let mut refused = crate::harness::Process::spawn(&mut command);
    assert_eq!(refused.ended().await, 125);
    let told = String::from_utf8(refused.stderr.all().await).unwrap();
    assert!(told.contains("--insecure"), "{told}");
}

#[tokio::test]
async fn one_server_has_a_data_directory() {
    let standing = Standing::start(&[]).await;
    let mut command = standing.scene.command(crate::harness::server());
    command.args(["serve", "--data"]).arg(&standing.data).args(["--listen", "127.0.0.1:0"]);
    let mut refused = crate::harness::Process::spawn(&mut command);
    assert_eq!(refused.ended().await, 125);
    let told = String::from_utf8(refused.stderr.all().await).unwrap();
    assert!(told.contains("another server"), "{told}");
}

#[tokio::test]
async fn an_ended_build_is_sealed_verified_and_removed() {
    let mut standing = Standing::start(&["--seal-after", "1s"]).await;
    let token = standing.declare_one("b").await;
    assert_eq!(standing.agent("b", &token, &["--tee", "off"], "seq 1 100000; echo err >&2").ended().await, 0);
    let ended = standing.ended("b").await;
    let stored = standing.stored("b", "main");
    standing.process.stderr.shows("\"sealed\"").await;
    let dir = standing.data.join("builds/b/main/1");
    assert!(!dir.join("log").exists() && dir.join("log.zst").metadata().unwrap().len() < stored.len() as u64 / 3);
    for _ in 0..2 {
        let sealed = standing.get("/api/v1/builds/b").await.json();
        assert_eq!((&sealed["sealed"], &sealed["bytes"]), (&json!(true), &ended["bytes"]));
        let verified = standing.post("/api/v1/builds/b/verify", json!({})).await.json();
        assert_eq!(verified["ok"], json!(true), "{verified}");
        assert_eq!(verified["attempts"][0]["stored_digest"], json!(blake3::hash(&stored).to_hex().as_str()));
        standing.crash().await;
    }
    let mut damaged = std::fs::read(dir.join("log.zst")).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(dir.join("log.zst"), damaged).unwrap();
    let verified = standing.post("/api/v1/builds/b/verify", json!({})).await.json();
    assert_eq!(verified["ok"], json!(false));
    assert!(verified["attempts"][0]["problem"].is_string(), "{verified}");

    assert_eq!(standing.ask("DELETE", "/api/v1/builds/b", READER, None).await.status, 403);
    assert_eq!(standing.ask("DELETE", "/api/v1/builds/b", ADMIN, None).await.status, 204);
    let gone = standing.get("/api/v1/builds/b").await;
    assert_eq!(gone.status, 410, "{gone:?}");
    assert!(!standing.data.join("builds/b").exists());
    standing.declare_one("running").await;
    assert_eq!(standing.ask("DELETE", "/api/v1/builds/running", ADMIN, None).await.status, 409);
    assert_eq!(standing.ask("DELETE", "/api/v1/builds/never", ADMIN, None).await.status, 404);
}

#[tokio::test]
async fn what_the_rules_remove_is_told_before_it_goes() {
    let mut standing = Standing::start(&[]).await;
    for id in ["one", "two", "three"] {
        let token = standing.declare_one(id).await;
        assert_eq!(standing.agent(id, &token, &[], "echo hello").ended().await, 0);
        standing.ended(id).await;
    }
    standing.process.signal(rustix::process::Signal::TERM);
    assert_eq!(standing.process.ended().await, 0);
    standing.options(&["--keep-builds", "1"]);
    standing.start_again().await;
    let ids = async || {
        let listed = standing.get("/api/v1/builds").await.json();
        let builds = listed["builds"].as_array().unwrap();
        builds.iter().map(|build| build["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let dry = standing.post("/api/v1/retention?dry_run=true", json!({})).await.json();
    let told = dry["expire"].as_array().unwrap().iter().map(|expiry| (&expiry["id"], &expiry["rule"]));
    assert_eq!(told.collect::<Vec<_>>(), [(&json!("one"), &json!("count")), (&json!("two"), &json!("count"))]);
    assert_eq!(ids().await, ["three", "two", "one"], "nothing has gone yet");
    let applied = standing.post("/api/v1/retention", json!({})).await.json();
    assert_eq!((&applied["expire"], &applied["dry_run"]), (&dry["expire"], &json!(false)));
    assert_eq!(ids().await, ["three"]);
}

#[tokio::test]
async fn what_is_beyond_the_quota_is_left_out_and_said_and_the_build_goes_on() {
    let mut standing = Standing::start(&["--build-quota", "1MiB"]).await;
    let token = standing.declare_one("b").await;
    let gate = standing.scene.gate("later");
    let script = format!("seq 1 1000000; {}; seq 1 1000000; exit 7", gate.pass());
    let mut agent = standing.agent("b", &token, &["--tee", "off"], &script);
    standing.process.stderr.shows("\"connected\"").await;
    standing.crash().await;
    gate.open();
    assert_eq!(agent.ended().await, 7);
    let build = standing.ended("b").await;
    assert_eq!((&build["exit_code"], &build["complete"]), (&json!(7), &json!(false)), "{build}");
    assert!(build["incomplete"].as_str().unwrap().contains("quota"), "{build}");
    let stored = standing.stored("b", "main").len();
    assert!((512 * 1024..=1024 * 1024 + 65536).contains(&stored), "{stored} bytes are stored");
}

/// Who hangs up while a build is being declared may declare it again.
#[tokio::test]
async fn a_declaration_that_nobody_waits_for_is_whole() {
    use tokio::io::AsyncWriteExt;
    let mut standing = Standing::start(&[]).await;
    let declaration = |at: usize| json!({"id": format!("b{at}"), "token": format!("phonehome_build_{at:064x}")});
    for at in 0..30 {
        let body = declaration(at).to_string();
        let head = format!(
            "POST /api/v1/builds HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let mut stream = tokio::net::TcpStream::connect(standing.address).await.unwrap();
        stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        if at % 2 == 0 {
            stream.shutdown().await.unwrap();
        }
    }
    for _ in 0..2 {
        for at in 0..30 {
            standing.declare(declaration(at)).await;
            assert_eq!(standing.get(&format!("/api/v1/builds/b{at}")).await.status, 200);
        }
        standing.crash().await;
    }
}

#[tokio::test]
async fn a_damaged_build_keeps_no_server_from_starting() {
    let mut standing = Standing::start(&[]).await;
    for id in ["good", "damaged"] {
        let token = standing.declare_one(id).await;
        assert_eq!(standing.agent(id, &token, &[], "echo hello").ended().await, 0);
        standing.ended(id).await;
    }
    std::fs::remove_file(standing.data.join("builds/damaged/main/1/events")).unwrap();
    standing.process.signal(rustix::process::Signal::TERM);
    assert_eq!(standing.process.ended().await, 0);
    for name in ["catalogue.db", "catalogue.db-wal", "catalogue.db-shm"] {
        drop(std::fs::remove_file(standing.data.join(name))); // not each is there
    }
    standing.start_again().await;
    standing.process.stderr.shows("left alone").await;
    assert_eq!(standing.get("/api/v1/builds/good").await.status, 200);
}

/// Two things that happen again and again leave room for a third.
#[tokio::test]
async fn what_is_told_again_is_counted() {
    let mut standing = Standing::start(&[]).await;
    standing.declare_one("b").await;
    for count in 1..=150 {
        for reason in ["Pulling", "BackOff"] {
            let told = json!({"reason": reason, "message": "again", "count": count});
            assert_eq!(standing.post("/api/v1/builds/b/events", told).await.status, 202);
        }
    }
    assert_eq!(standing.post("/api/v1/builds/b/events", json!({"reason": "Failed"})).await.status, 202);
    let reports = standing.get("/api/v1/builds/b").await.json()["reports"].clone();
    assert_eq!((reports.as_array().unwrap().len(), &reports[0]["count"]), (3, &json!(150)));
    standing.crash().await;
    let kept = standing.get("/api/v1/builds/b").await.json()["reports"].clone();
    assert_eq!((kept.as_array().unwrap().len(), &kept[0]["count"]), (3, &json!(128)), "written when it doubles");
}

/// What looked after the first build of a name lets go of that one, not of the next.
#[tokio::test]
async fn a_name_that_was_removed_can_be_declared_again() {
    let standing = Standing::start(&["--seal-after", "1s"]).await;
    standing.declare_one("b").await;
    assert_eq!(standing.post("/api/v1/builds/b/cancel", json!({})).await.status, 202);
    standing.ended("b").await;
    let later = standing.declare_one("later").await;
    assert_eq!(standing.agent("later", &later, &[], "true").ended().await, 0);
    standing.ended("later").await;
    assert_eq!(standing.ask("DELETE", "/api/v1/builds/b", ADMIN, None).await.status, 204);
    let token = standing.declare_one("b").await;
    let gate = standing.scene.gate("go");
    let mut agent = standing.agent("b", &token, &[], &format!("echo begun; {}; echo over", gate.pass()));
    agent.stdout.shows("begun").await;
    standing.process.stderr.shows("\"sealed\"").await; // of the other: by then the first is let go as well
    let build = standing.get("/api/v1/builds/b").await;
    assert_eq!((build.status, &build.json()["state"]), (200, &json!("running")), "{build:?}");
    gate.open();
    assert_eq!(agent.ended().await, 0);
    assert_eq!(standing.ended("b").await["complete"], json!(true));
    assert_eq!(standing.stored("b", "main"), b"begun\nover\n");
}

/// An agent that does not stop is not listened to any more, and hears so.
#[tokio::test]
async fn no_output_comes_after_the_verdict() {
    let standing = Standing::start(&[]).await;
    let token = standing.declare_one("b").await;
    let script = "trap '' TERM; echo begun; while :; do echo more; done";
    let mut agent = standing.agent("b", &token, &["--tee", "off"], script);
    let begun = async { while standing.get("/api/v1/builds/b").await.json()["bytes"] == json!(0) {} };
    patiently("output", begun).await;
    for _ in 0..2 {
        assert_eq!(standing.post("/api/v1/builds/b/cancel", json!({})).await.status, 202);
    }
    standing.ended("b").await;
    agent.stderr.shows("4005").await;
    let verdict = std::fs::read(standing.data.join("builds/b/verdict.json")).unwrap();
    let verdict: Value = serde_json::from_slice(&verdict).unwrap();
    let stored = standing.stored("b", "main");
    assert_eq!(verdict["steps"][0]["digest"], json!(blake3::hash(&stored).to_hex().as_str()));
    agent.signal(rustix::process::Signal::KILL);
    agent.ended().await;
}

/// The server was killed between the verdict and the answer, or the agent was away until its build had left memory.
#[tokio::test]
async fn an_end_that_counts_is_answered_again_long_after_the_verdict() {
    let mut standing = Standing::start(&["--seal-after", "1s"]).await;
    let token = standing.declare_one("b").await;
    let (log, other) = (Records::of(&["one\n", "two\n"]), Records::of(&["three\n"]));
    let mut caller = Caller::connect_to(standing.address, &token, Codec::Binary).await;
    for frame in [log.hello("b", 1), log.frame(), log.finished(7)] {
        caller.send(frame).await;
    }
    standing.ended("b").await;
    for is_sealed in [false, true] {
        if is_sealed {
            standing.process.stderr.shows("\"sealed\"").await;
        } else {
            standing.crash().await;
        }
        let mut again = Caller::connect_to(standing.address, &token, Codec::Binary).await;
        again.send(log.hello("b", 1)).await;
        let ServerFrame::Welcome(welcome) = again.frame().await else { panic!("no welcome") };
        assert_eq!((welcome.attempt, welcome.next), (1, 2), "sealed: {is_sealed}");
        again.send(log.finished(7)).await;
        assert_eq!(again.finished_ack().await, FinishedAck::Complete, "sealed: {is_sealed}");
        again.leave().await;
        let mut stranger = Caller::connect_to(standing.address, &token, Codec::Binary).await;
        stranger.send(other.hello("b", 2)).await;
        assert_eq!(stranger.closed().await.0, 4005, "sealed: {is_sealed}");
    }
    assert!(!standing.data.join("builds/b/main/2").exists());
}

#[tokio::test]
async fn a_cancel_that_was_answered_survives_a_crash() {
    let mut standing = Standing::start(&[]).await;
    let token = standing.declare_one("b").await;
    let log = Records::of(&["one\n"]);
    let mut caller = Caller::connect_to(standing.address, &token, Codec::Binary).await;
    caller.send(log.hello("b", 1)).await;
    assert!(matches!(caller.frame().await, ServerFrame::Welcome(_)));
    drop(caller);
    assert_eq!(standing.post("/api/v1/builds/b/cancel", json!({"reason": "enough"})).await.status, 202);
    standing.crash().await;
    let mut again = Caller::connect_to(standing.address, &token, Codec::Binary).await;
    again.send(log.hello("b", 1)).await;
    let ServerFrame::Welcome(welcome) = again.frame().await else { panic!("no welcome") };
    assert!(welcome.cancel.is_some_and(|cancel| cancel.reason.contains("enough")));
    again.send(log.frame()).await;
    again.send(log.finished(0)).await;
    let build = standing.ended("b").await;
    assert_eq!((&build["verdict"], &build["complete"]), (&json!("cancelled"), &json!(true)), "{build}");
}

/// Its directory was removed by hand, or a crash took its verdict.
#[tokio::test]
async fn a_build_that_is_gone_leaves_the_list_when_the_rules_come_to_it() {
    let mut standing = Standing::start(&[]).await;
    for id in ["one", "two"] {
        let token = standing.declare_one(id).await;
        assert_eq!(standing.agent(id, &token, &[], "echo hello").ended().await, 0);
        standing.ended(id).await;
    }
    standing.options(&["--keep-builds", "1"]);
    std::fs::remove_file(standing.data.join("builds/one/verdict.json")).unwrap();
    std::fs::remove_file(standing.data.join("builds/one/build.json")).unwrap();
    standing.crash().await;
    let is_listed = async || standing.get("/api/v1/builds").await.text().contains("\"one\"");
    patiently("it is listed no more", async { while is_listed().await {} }).await;
    assert_eq!(standing.get("/api/v1/builds/two").await.status, 200);
}
