//! Everybody who has no business here is turned away with a reason, and the honest agent is served all the same.

use phonehome_proto::{
    codec::Codec,
    frame::{Ack, AgentFrame, FinishedAck, ServerFrame},
    limits::MAX_MESSAGE,
};
use phonehome_server::{Config, Durability, Expected, Server};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::Message;

use crate::harness::{Caller, Hook, Random, Records, Scene, ask, hello, patiently};

const BINARY: (&str, &str) = ("Sec-WebSocket-Protocol", "phonehome.v1");

#[tokio::test]
async fn a_request_without_the_right_token_is_unauthorized() {
    let hook = plain_hook().await;
    let scheme_only = ("Authorization", "Bearer");
    let basic = ("Authorization", "Basic cGhvbmU6aG9tZQ==");
    let almost = format!("Bearer {}0", hook.variable("TOKEN"));
    let wrong = ("Authorization", "Bearer phonehome_build_0000");
    for headers in [
        vec![BINARY],
        vec![BINARY, wrong],
        vec![BINARY, ("Authorization", &almost)],
        vec![BINARY, scheme_only],
        vec![BINARY, basic],
    ] {
        let answer = ask(hook.address(), "/v1/agent", &headers).await;
        assert_eq!(answer.status, 401, "{headers:?}");
        assert!(answer.body.contains("token"), "{answer:?}");
    }
    hook.still_serves().await;
}

#[tokio::test]
async fn a_request_without_a_common_version_is_a_bad_one() {
    let hook = plain_hook().await;
    let token = format!("Bearer {}", hook.variable("TOKEN"));
    let token = ("Authorization", &*token);
    for headers in [vec![token], vec![token, ("Sec-WebSocket-Protocol", "phonehome.v9, chat")]] {
        let answer = ask(hook.address(), "/v1/agent", &headers).await;
        assert_eq!(answer.status, 400, "{headers:?}");
        assert!(answer.body.contains("phonehome.v1"), "{answer:?}");
    }
    hook.still_serves().await;
}

#[tokio::test]
async fn other_paths_are_not_found() {
    let hook = plain_hook().await;
    let token = format!("Bearer {}", hook.variable("TOKEN"));
    for path in ["/", "/v1", "/v1/agent2", "/v2/agent", "/v1/agent/"] {
        let answer = ask(hook.address(), path, &[BINARY, ("Authorization", &token)]).await;
        assert_eq!(answer.status, 404, "{path}");
    }
    hook.still_serves().await;
}

#[tokio::test]
async fn plain_http_on_a_tls_port_gets_an_answer_that_says_what_is_wrong() {
    let hook = Hook::wait(&[]).await;
    let answer = ask(hook.address(), "/v1/agent", &[BINARY]).await;
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("this port speaks TLS"), "{answer:?}");
    hook.still_serves().await;
}

#[tokio::test]
async fn noise_instead_of_a_request_harms_nobody() {
    for flags in [&[][..], &["--no-tls"]] {
        let hook = Hook::wait(flags).await;
        for (seed, first) in [(1, 0), (2, 22), (3, b'G')] {
            let mut noise = Random::new(seed).bytes(100_000);
            noise[0] = first;
            let mut stream = TcpStream::connect(hook.address()).await.unwrap();
            drop(stream.write_all(&noise).await); // it may be closed before all is written
            drop(stream.shutdown().await);
            let mut answer = Vec::new();
            drop(patiently("the server hangs up", stream.read_to_end(&mut answer)).await); // a reset is an end too
        }
        hook.still_serves().await;
    }
}

#[tokio::test]
async fn a_message_that_is_no_frame_breaks_the_protocol() {
    let frames: [Message; 4] = [
        Message::binary(Random::new(4).bytes(100)),
        Message::binary(Vec::new()),
        Message::binary(vec![0xff, 0xff]),
        Message::text("{\"type\":\"hello\"}"),
    ];
    let hook = plain_hook().await;
    for frame in frames {
        let mut caller = Caller::connect(&hook, Codec::Binary).await;
        caller.send_message(frame.clone()).await;
        let (code, reason) = caller.closed().await;
        assert_eq!(code, 4000, "{frame:?}: {reason}");
        assert!(!reason.is_empty());
    }
    hook.still_serves().await;
}

#[tokio::test]
async fn text_and_binary_do_not_mix() {
    let hook = plain_hook().await;
    let mut binary = Caller::connect(&hook, Codec::Binary).await;
    binary.send_message(Message::text("text")).await;
    assert_eq!(binary.closed().await.0, 4000);
    let mut json = Caller::connect(&hook, Codec::Json).await;
    json.send_message(Message::binary(vec![0, 1, 0])).await;
    assert_eq!(json.closed().await.0, 4000);
    hook.still_serves().await;
}

#[tokio::test]
async fn noise_after_the_welcome_breaks_the_protocol_and_stores_nothing() {
    let hook = plain_hook().await;
    let (mut caller, _) = Caller::welcomed(&hook, 1).await;
    caller.send_message(Message::binary(Random::new(5).bytes(5000))).await;
    assert_eq!(caller.closed().await.0, 4000);
    hook.still_serves().await;
}

#[tokio::test]
async fn the_first_frame_must_be_a_hello() {
    let hook = plain_hook().await;
    let mut caller = Caller::connect(&hook, Codec::Binary).await;
    caller.send(Records::of(&["too early"]).frame()).await;
    let (code, reason) = caller.closed().await;
    assert_eq!(code, 4000);
    assert!(reason.contains("Records"), "{reason}");
    hook.still_serves().await;
}

#[tokio::test]
async fn a_token_is_good_for_one_build_only() {
    let hook = plain_hook().await;
    let mut caller = Caller::connect(&hook, Codec::Binary).await;
    caller.send(AgentFrame::Hello(hello("another", 1))).await;
    assert_eq!(caller.closed().await.0, 4003);
    hook.still_serves().await;
}

#[tokio::test]
async fn a_step_that_nobody_declared_is_unknown() {
    let hook = plain_hook().await;
    let mut caller = Caller::connect(&hook, Codec::Binary).await;
    let mut other = hello(hook.variable("BUILD"), 1);
    other.step = "deploy".parse().unwrap();
    caller.send(AgentFrame::Hello(other)).await;
    let (code, reason) = caller.closed().await;
    assert_eq!(code, 4004);
    assert!(reason.contains("deploy") && reason.contains("main"), "{reason}");
    hook.still_serves().await;
}

#[tokio::test]
async fn an_oversized_message_is_refused_with_a_close_frame_that_arrives() {
    let hook = plain_hook().await;
    for size in [MAX_MESSAGE + 1, 2 * MAX_MESSAGE, 16 * MAX_MESSAGE] {
        for codec in [Codec::Binary, Codec::Json] {
            let mut caller = Caller::connect(&hook, codec).await;
            let message = match codec {
                Codec::Binary => Message::binary(vec![0; size]),
                Codec::Json => Message::text(" ".repeat(size)),
            };
            caller.send_message(message).await;
            assert_eq!(caller.closed().await.0, 4006, "{size} bytes, {codec:?}");
        }
    }
    hook.still_serves().await;
}

#[tokio::test]
async fn who_says_no_hello_is_asked_to_come_back() {
    let hook = plain_hook().await;
    let mut caller = Caller::connect(&hook, Codec::Binary).await;
    let (code, _) = caller.closed().await;
    assert_eq!(code, 4102);
    hook.still_serves().await;
}

#[tokio::test]
async fn records_that_contradict_what_is_stored_are_refused() {
    let hook = plain_hook().await;
    let (mut caller, _) = Caller::welcomed(&hook, 1).await;
    caller.send(Records::of(&["one", "two"]).frame()).await;
    caller.send(Records::of(&["one", "TWO"]).frame()).await;
    let (code, reason) = caller.closed().await;
    assert_eq!(code, 4000);
    assert!(reason.contains("other bytes"), "{reason}");
    let (_, welcome) = Caller::welcomed(&hook, 2).await;
    assert_eq!((welcome.attempt, welcome.next), (2, 0));
}

#[tokio::test]
async fn an_end_that_does_not_add_up_is_taken_and_never_called_complete() {
    let mut hook = plain_hook().await;
    let (mut caller, _) = Caller::welcomed(&hook, 1).await;
    caller.send(Records::of(&["what was said"]).frame()).await;
    let acked = caller.frame().await;
    assert!(matches!(acked, ServerFrame::Ack(Ack { next: 1, .. })), "{acked:?}");
    caller.send(Records::of(&["what was sent"]).finished(0)).await;
    let FinishedAck::Incomplete(reason) = caller.finished_ack().await else { panic!("it is not complete") };
    assert!(reason.contains("digest") && reason.contains("nothing was left"), "{reason}");
    caller.leave().await;
    let ended = hook.ended().await;
    assert_eq!(ended.code, 0, "verdict and completeness are independent");
    assert!(ended.stderr().contains("the log is not complete: step main: the digest differs"), "{}", ended.stderr());
}

#[tokio::test]
async fn an_end_before_its_records_is_not_taken() {
    let mut hook = plain_hook().await;
    let (mut caller, _) = Caller::welcomed(&hook, 1).await;
    let records = Records::of(&["one\n", "two\n"]);
    caller.send(records.finished(3)).await;
    assert_eq!(caller.finished_ack().await, FinishedAck::Resume(0));
    caller.send(records.frame()).await;
    caller.send(records.finished(3)).await;
    assert_eq!(caller.finished_ack().await, FinishedAck::Complete);
    caller.leave().await;
    let ended = hook.ended().await;
    assert_eq!((ended.code, ended.stdout()), (3, "one\ntwo\n".to_owned()));
}

#[tokio::test]
async fn who_comes_after_the_verdict_is_told_so() {
    let scene = Scene::new();
    let listen = "127.0.0.1:0".parse().unwrap();
    let config = Config { listen, tls: false, data: scene.path("data"), durability: Durability::Os };
    let server = Server::spawn(config).await.unwrap();
    let build = server.expect(Expected::new("late".parse().unwrap())).unwrap();
    build.cancel("nobody wants it any more");
    patiently("a verdict", build.verdict()).await;
    let mut caller = Caller::connect_to(server.local_addr(), build.token(), Codec::Binary).await;
    caller.send(AgentFrame::Hello(hello("late", 1))).await;
    assert_eq!(caller.closed().await.0, 4005);
}

#[tokio::test]
async fn an_agent_with_the_wrong_pin_says_so_and_runs_its_command() {
    let hook = Hook::wait(&[]).await;
    let pin = format!("sha256:{}", "0".repeat(64));
    let mut agent = hook.agent(&["--pin", &pin], "echo built anyway; exit 6");
    assert_eq!(agent.ended().await, 6);
    assert_eq!(agent.stdout.all().await, b"built anyway\n");
    let own_log = String::from_utf8(agent.stderr.all().await).unwrap();
    assert!(own_log.contains("which is not the pinned one"), "{own_log}");
    hook.still_serves().await;
}

#[tokio::test]
async fn an_agent_with_the_wrong_token_says_so_and_runs_its_command() {
    let hook = Hook::wait(&[]).await;
    let mut agent = hook.agent(&["--token", "phonehome_build_wrong"], "echo built anyway; exit 6");
    assert_eq!(agent.ended().await, 6);
    assert_eq!(agent.stdout.all().await, b"built anyway\n");
    let own_log = String::from_utf8(agent.stderr.all().await).unwrap();
    assert!(own_log.contains("401"), "{own_log}");
    assert!(!own_log.contains("phonehome_build_wrong"), "a token is never shown: {own_log}");
    hook.still_serves().await;
}

#[tokio::test]
async fn an_agent_that_is_refused_does_not_start_a_command_that_waits_for_the_server() {
    let hook = Hook::wait(&[]).await;
    let options = ["--token", "phonehome_build_wrong", "--start", "connected"];
    let mut agent = hook.agent(&options, "echo never");
    assert_eq!(agent.ended().await, 125);
    assert_eq!(agent.stdout.all().await, b"");
    hook.still_serves().await;
}

async fn plain_hook() -> Hook {
    Hook::wait(&["--no-tls"]).await
}
