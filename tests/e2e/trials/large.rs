//! A log that is larger than anybody wants to read.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    time::Duration,
};

use serde_json::json;
use tokio::time::sleep;

use super::{MIB, Reader, cost, ended_within, peak_memory, within};
use crate::{faults::long_or, harness::Standing};

/// Lines of a burst, each followed by a line on standard error.
const BURST: u64 = 50_000;

/// A line: its number and the rest of 64 bytes.
const LINE: u64 = 64;

/// What a process may read of its own accord in the time of a question: its clocks, its catalogue, its sockets.
const NOISE: u64 = MIB / 2;

/// What the server may read for a small piece: some blocks of the log and steps of a bisection.
const PIECE: u64 = 2 * MIB;

/// What it may have read for somebody who takes the beginning of something long: what the sockets hold as well.
const BEGUN: u64 = 16 * MIB;

/// What the server may need while it takes, reads and seals such a log.
const MEMORY: u64 = 128 * MIB;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_log_is_read_from_anywhere_without_reading_the_rest() {
    let limit = long_or(Duration::from_secs(60), Duration::from_secs(3600));
    let bursts = long_or(60, 3200); // 192 MB, or 10 GB
    let mut standing = Standing::start(&["--seal-after", "off", "--timeout", "off"]).await;
    let token = standing.declare_one("large").await;
    let gate = standing.scene.gate("end");
    let script = format!(
        "at=0; while [ $at -lt {bursts} ]; do seq -f '%019.0f of a burst of a build that writes very much' \
         $((at * {BURST})) $((at * {BURST} + {BURST} - 1)); at=$((at + 1)); echo burst $at >&2; done; {}",
        gate.pass()
    );
    let mut agent = standing.agent("large", &token, &["--tee", "off"], &script);
    let path = standing.data.join("builds/large/main/1/log");
    let errors: u64 = (1..=bursts).map(|burst| format!("burst {burst}\n").len() as u64).sum();
    let all = bursts * BURST * LINE + errors;
    within(limit, "all is stored", async {
        while !fs::metadata(&path).is_ok_and(|found| found.len() == all) {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let seen = Seen::of(&File::open(&path).unwrap(), all);

    // Readers see what is synced, which may be a moment later.
    within(limit, "all is synced", async {
        while standing.get("/api/v1/builds/large").await.json()["bytes"] != json!(all) {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    ask_everywhere(&standing, &seen, "while it runs").await;
    gate.open();
    within(limit, "the agent ends", async {
        while !agent.has_ended() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(agent.ended().await, 0);
    let build = ended_within(limit, &standing, "large").await;
    assert_eq!((&build["verdict"], &build["complete"]), (&json!("succeeded"), &json!(true)), "{build}");
    ask_everywhere(&standing, &seen, "ended").await;
    assert!(peak_memory(&standing.process) < MEMORY, "{}", peak_memory(&standing.process));
    standing.crash().await;
    ask_everywhere(&standing, &seen, "after a crash").await;

    standing.options(&["--seal-after", "1s"]);
    standing.crash().await;
    within(limit, "it is sealed", async {
        while standing.get("/api/v1/builds/large").await.json()["sealed"] != json!(true) {
            sleep(Duration::from_millis(200)).await;
        }
    })
    .await;
    assert!(!path.exists());
    assert!(peak_memory(&standing.process) < MEMORY, "{}", peak_memory(&standing.process));
    ask_everywhere(&standing, &seen, "sealed").await;
    standing.crash().await;
    ask_everywhere(&standing, &seen, "sealed, after a crash").await;
}

/// Pieces of the log as they lay on the disk before anybody asked.
struct Seen {
    len: u64,
    pieces: Vec<(u64, Vec<u8>)>,
    last_lines: String,
}

impl Seen {
    fn of(log: &File, len: u64) -> Self {
        let at = [0, 1, len / 3, len / 2 - 7, len / 4 * 3 + 1, len - 4096];
        let piece = |at| {
            let mut bytes = vec![0; 4096];
            log.read_exact_at(&mut bytes, at).unwrap();
            (at, bytes)
        };
        let pieces: Vec<_> = at.map(piece).into();
        let end = String::from_utf8(pieces.last().unwrap().1.clone()).unwrap();
        let lines: Vec<_> = end.split_inclusive('\n').collect();
        Self { len, pieces, last_lines: lines[lines.len() - 10..].concat() }
    }
}

async fn ask_everywhere(standing: &Standing, seen: &Seen, when: &str) {
    let log = "/api/v1/builds/large/log";
    // What is read once for a build that has just been found on the disk is bounded too.
    let (_, read) = cost(standing, standing.get("/api/v1/builds/large")).await;
    assert!(read < PIECE, "{when}: {read} bytes read to find the build");

    let (tail, read) = cost(standing, standing.get(&format!("{log}?tail=10"))).await;
    assert_eq!(tail.text(), seen.last_lines, "{when}");
    assert!(read < PIECE, "{when}: {read} bytes read for ten lines");

    for (at, piece) in &seen.pieces {
        let range = format!("Range: bytes={at}-{}\r\n", at + 4095);
        let mut reader = Reader::ask(standing, log, &range).await;
        let (got, read) = cost(standing, reader.rest()).await;
        assert!(got == *piece, "{when}: a range at {at}");
        assert!(read < PIECE, "{when}: {read} bytes read for a range at {at}");

        let (got, read) =
            cost(standing, async { Reader::ask(standing, &format!("{log}?from={at}"), "").await.next(4096).await })
                .await;
        assert!(got == *piece, "{when}: from {at}");
        assert!(read < BEGUN, "{when}: {read} bytes read to begin at {at}");
    }

    let line = seen.len / LINE / 2;
    let path = format!("{log}?stream=stdout&from={}", line * LINE);
    let (got, read) = cost(standing, async { Reader::ask(standing, &path, "").await.next(LINE as usize).await }).await;
    assert_eq!(String::from_utf8_lossy(&got), format!("{line:019} of a burst of a build that writes very much\n"));
    assert!(read < BEGUN, "{when}: {read} bytes read to begin in one stream");

    for form in ["tail=10&format=ndjson", "tail=10&timestamps=true", "stream=stderr&tail=3&timestamps=true"] {
        let (answer, read) = cost(standing, standing.get(&format!("{log}?{form}"))).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(!answer.body.is_empty() && answer.body.len() < 4096, "{when}: {}", answer.text());
        assert!(read < PIECE, "{when}: {read} bytes read for {form}");
    }
    let path = format!("{log}?format=ndjson&from={}", seen.len / 2);
    let (_, read) = cost(standing, async { Reader::ask(standing, &path, "").await.next(4096).await }).await;
    assert!(read < BEGUN, "{when}: {read} bytes read to begin as JSON");

    let ((), read) = cost(standing, sleep(Duration::from_millis(100))).await;
    assert!(read < NOISE, "{when}: {read} bytes read for nobody");
}
