//! What people who run a standing server rely on: its lifecycle log, metrics, tokens, drain and file of options.

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::{ADMIN, Mode, Process, Proxy, READER, Scene, Standing, eventually, exchange, patiently, server};

#[tokio::test]
async fn each_change_is_one_line_however_often_the_connection_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lifecycle.log");
    let standing = Standing::start(&["--lifecycle-log", path.to_str().unwrap()]).await;
    let token = standing.declare_one("b").await;
    let proxy = Proxy::to(standing.address, Mode::Cut(100_000..300_000), 7).await;
    let mut command = standing.agent_command("b", &token);
    command.env("PHONEHOME_URL", format!("ws://{}", proxy.address())).env("POD_NAME", "builder-7");
    let mut agent =
        Process::spawn(command.args(["--tee", "off", "--linger", "60s", "--", "sh", "-c", "seq 100000; exit 3"]));
    assert_eq!(agent.ended().await, 3);
    assert_eq!(standing.ended("b").await["complete"], json!(true));
    assert!(proxy.cut() > 1, "{} cuts", proxy.cut());
    eventually("the verdict is a line", || lines(&path).iter().any(|line| line["step"].is_null())).await;
    let lines = lines(&path);
    let count = |action: &str, reason: &str| {
        lines.iter().filter(|line| line["action"] == action && line["reason"] == reason).count()
    };
    for (action, reason) in [("create", "Connected"), ("update", "Started"), ("update", "Failed")] {
        assert_eq!(count(action, reason), 1, "{action} {reason} in {lines:#?}");
    }
    assert_eq!(count("delete", "Failed"), 2, "of the step and of the build: {lines:#?}");
    let terminated = lines.iter().find(|line| line["state"] == "terminated").unwrap();
    assert_eq!((&terminated["exit_code"], &terminated["level"]), (&json!(3), &json!("error")));
    assert!(lines.iter().filter(|line| line["step"] == "main").all(|line| line["pod"] == "builder-7"), "{lines:#?}");
}

#[tokio::test]
async fn a_server_that_drains_sends_its_agents_away_and_they_lose_nothing() {
    let mut standing = Standing::start(&[]).await;
    let token = standing.declare_one("b").await;
    let gate = standing.scene.gate("gate");
    let mut agent = standing.agent("b", &token, &[], &format!("echo before; {}; echo after", gate.pass()));
    agent.stdout.shows("before").await;
    let is_running = async { while standing.get("/api/v1/builds/b").await.json()["state"] != "running" {} };
    patiently("the agent is connected", is_running).await;
    standing.process.signal(Signal::TERM);
    assert_eq!(standing.process.ended().await, 0);
    gate.open();
    standing.start_again().await;
    assert_eq!(agent.ended().await, 0);
    let build = standing.ended("b").await;
    assert_eq!((&build["verdict"], &build["complete"]), (&json!("succeeded"), &json!(true)), "{build}");
    assert_eq!(standing.stored("b", "main"), b"before\nafter\n");
}

#[tokio::test]
async fn a_token_lasts_over_a_restart_and_not_over_its_end() {
    let mut standing = Standing::start(&[]).await;
    let made = standing.post("/api/v1/tokens", json!({"name": "ci", "scope": "launch", "expires_in": "24h"})).await;
    assert_eq!(made.status, 201, "{made:?}");
    let made = made.json();
    let (id, token) = (made["id"].as_str().unwrap(), made["token"].as_str().unwrap());
    standing.crash().await;
    let ask = async |method, path: &str, body| standing.ask(method, path, token, body).await.status;
    assert_eq!(ask("POST", "/api/v1/builds", Some(json!({"id": "b"}))).await, 201);
    assert_eq!(ask("GET", "/api/v1/tokens", None).await, 403);
    assert!(!standing.get("/api/v1/tokens").await.text().contains(token));
    assert_eq!(standing.ask("DELETE", &format!("/api/v1/tokens/{id}"), ADMIN, None).await.status, 204);
    assert_eq!(ask("GET", "/api/v1/builds", None).await, 401);
    assert_eq!(standing.ask("DELETE", "/api/v1/tokens/given-admin", ADMIN, None).await.status, 409);
    for wrong in [json!({"name": "", "scope": "read"}), json!({"name": "x", "scope": "read", "expires_in": 0})] {
        assert_eq!(standing.post("/api/v1/tokens", wrong).await.status, 400);
    }
}

#[tokio::test]
async fn metrics_are_for_readers_and_count_what_happened() {
    let standing = Standing::start(&[]).await;
    let token = standing.declare_one("b").await;
    assert_eq!(standing.agent("b", &token, &[], "echo hello").ended().await, 0);
    standing.ended("b").await;
    assert_eq!(standing.ask("GET", "/metrics", "", None).await.status, 401);
    let is_told = async {
        loop {
            let text = standing.ask("GET", "/metrics", READER, None).await.text();
            if text.contains("phonehome_verdicts_total{outcome=\"succeeded\"} 1") {
                return text;
            }
        }
    };
    let text = patiently("the verdict is counted", is_told).await;
    for line in
        ["phonehome_agents 0", "phonehome_http_requests_total{route=\"/api/v1/builds/{id}/wait\",status=\"200\"} 1"]
    {
        assert!(text.lines().any(|told| told == line), "{line} is not in\n{text}");
    }
    let value =
        |name: &str| -> u64 { text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().parse().unwrap() };
    assert_eq!(value("phonehome_records_received_total "), value("phonehome_records_acknowledged_total "));
    assert!(value("phonehome_records_received_total ") >= 3 && value("phonehome_commit_duration_seconds_count ") > 0);
}

#[tokio::test]
async fn a_file_of_options_can_be_checked() {
    let scene = Scene::new();
    for (text, code, told) in [
        ("data = \"/srv/phonehome\"\ntls-self-signed = true\nlisten = \"[::]:8443\"\n", 0, "is fine"),
        ("data = \"/srv/phonehome\"\nlisten = \"[::]:8443\"\n", 125, "--insecure"),
        ("data = \"/srv/phonehome\"\nkeep-fr = \"1d\"\n", 125, "the nearest is keep-for"),
        ("listen = \"127.0.0.1:1\"\n", 125, "--data"),
    ] {
        let path = scene.write("serve.toml", text);
        let mut check = Process::spawn(scene.command(server()).arg("check-config").arg(path));
        assert_eq!(check.ended().await, code, "{text}");
        let output = [check.stdout.all().await, check.stderr.all().await].concat();
        assert!(String::from_utf8_lossy(&output).contains(told), "{}", String::from_utf8_lossy(&output));
    }
}

#[tokio::test]
async fn what_a_request_says_and_is_not_understood_changes_nothing() {
    let standing = Standing::start(&[]).await;
    let token = standing.declare_one("b").await;
    assert_eq!(standing.agent("b", &token, &[], "echo hello").ended().await, 0);
    standing.ended("b").await;
    let dry_run = Some(json!({"dry_run": true}));
    for (method, path, body) in [
        ("DELETE", "/api/v1/builds/b?dry_run=1", None),
        ("DELETE", "/api/v1/builds/b", dry_run.clone()),
        ("DELETE", "/api/v1/tokens/given-reader?x=1", None),
        ("GET", "/api/v1/tokens?x=1", None),
        ("POST", "/api/v1/builds/b/cancel?x=1", None),
        ("POST", "/api/v1/builds/b/events?x=1", Some(json!({"type": "Normal", "reason": "X", "message": "x"}))),
        ("POST", "/api/v1/builds/b/verify", dry_run.clone()),
        ("POST", "/api/v1/builds/b/verify?x=1", None),
        ("POST", "/api/v1/builds?x=1", Some(json!({"id": "other"}))),
        ("POST", "/api/v1/retention", dry_run),
        ("POST", "/api/v1/retention?dryrun=1", None),
        ("POST", "/api/v1/tokens?x=1", Some(json!({"name": "ci", "scope": "read"}))),
    ] {
        let answer = standing.ask(method, path, ADMIN, body).await;
        assert_eq!(answer.status, 400, "{method} {path}: {answer:?}");
    }
    assert_eq!(standing.get("/api/v1/builds/other").await.status, 404);
    assert_eq!(standing.post("/api/v1/builds/b/verify", json!({})).await.json()["ok"], json!(true));
}

#[tokio::test]
async fn behind_the_verdict_a_build_has_no_line_and_its_token_opens_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lifecycle.log");
    let standing = Standing::start(&["--lifecycle-log", path.to_str().unwrap()]).await;
    let (token, other) = (standing.declare_one("b").await, standing.declare_one("other").await);
    let report = |reason: &str| Some(json!({"type": "Warning", "reason": reason, "message": "x"}));
    let tell = async |build: &str, token: &str, reason: &str| {
        standing.ask("POST", &format!("/api/v1/builds/{build}/events"), token, report(reason)).await.status
    };
    assert_eq!(tell("b", &token, "Early").await, 202);
    assert_eq!(standing.agent("b", &token, &[], "echo hello").ended().await, 0);
    standing.ended("b").await;
    assert_eq!(tell("b", &token, "Late").await, 403);
    assert_eq!(tell("b", ADMIN, "Late").await, 202);
    assert_eq!(tell("other", &other, "Last").await, 202);
    eventually("the last report is a line", || lines(&path).iter().any(|line| line["reason"] == "Last")).await;
    let lines = lines(&path);
    assert!(lines.iter().any(|line| line["reason"] == "Early"), "{lines:#?}");
    assert!(!lines.iter().any(|line| line["reason"] == "Late"), "{lines:#?}");
}

#[tokio::test]
async fn a_page_of_somebody_else_changes_nothing() {
    let standing = Standing::start(&["--advertise", "wss://logs.example"]).await;
    let address = standing.address;
    let ask = async |method: &str, origin: &str| {
        let request = format!(
            "{method} /api/v1/builds HTTP/1.1\r\nHost: {address}\r\nOrigin: {origin}\r\nConnection: close\r\n\
             Authorization: Bearer {ADMIN}\r\n\r\n"
        );
        exchange(address, request.as_bytes()).await.status
    };
    assert_eq!(ask("POST", "https://evil.example").await, 403);
    assert_eq!(ask("POST", "null").await, 403);
    assert_eq!(ask("GET", "https://evil.example").await, 200);
    assert_eq!(standing.get("/api/v1/builds").await.json()["builds"], json!([]));
    assert_eq!(ask("POST", "https://logs.example").await, 201);
    assert_eq!(ask("POST", &format!("http://{address}")).await, 201);
}

#[tokio::test]
async fn a_server_that_takes_no_output_is_not_ready_and_says_why() {
    let standing = Standing::start(&["--min-free", "1000000TiB"]).await;
    let answer = standing.get("/readyz").await;
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.text().contains("--min-free"), "{answer:?}");
}

#[tokio::test]
async fn a_copy_of_the_certificate_is_good_after_a_restart() {
    let mut standing = Standing::start(&["--tls-self-signed"]).await;
    let path = standing.data.join("tls/certificate.pem");
    let before = std::fs::read(&path).unwrap();
    standing.process.signal(Signal::TERM);
    assert_eq!(standing.process.ended().await, 0);
    standing.start_again().await;
    assert_eq!(std::fs::read(path).unwrap(), before);
}

#[tokio::test]
async fn a_wrong_member_of_a_body_is_named_by_a_pointer() {
    let standing = Standing::start(&[]).await;
    for (path, body, at) in [
        ("/api/v1/builds", json!({"timeouts": {"grace": -1}}), "/timeouts/grace"),
        ("/api/v1/tokens", json!({"name": "", "scope": "read"}), "/name"),
        ("/api/v1/tokens", json!({"name": "x", "scope": "read", "expires_in": 0}), "/expires_in"),
    ] {
        assert_eq!(standing.post(path, body).await.json()["errors"][0]["at"], at, "{path}");
    }
}

fn lines(path: &std::path::Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}
