//! The server's system calls fail, or are the last thing it does: by strace, so in release builds as well.

use crate::{
    faults::{at_each, is_full},
    harness::{Lines, Site, skipped, works},
};

/// Ways to fail, as strace has them.
const FAILURES: [&str; 3] = ["error=EIO", "error=ENOSPC", "signal=KILL"];

/// What the server asks of its disk, under all names it may have, and at which of its turns: its reserve takes the first
/// sixteen writes and one sync.
const CALLS: [(&str, &[u32]); 5] = [
    ("fdatasync", &[1, 2, 3, 4, 9]),
    ("fsync", &[1, 2, 4]),
    ("pwrite64", &[1, 17, 18, 19, 24]),
    ("pwritev,pwritev2", &[1]),
    ("rename,renameat,renameat2", &[1, 2, 3, 4]),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_system_call_that_fails_or_kills_loses_nothing() {
    if !works("strace", &["-f", "-qq", "-e", "trace=none", "true"]) {
        return skipped("there is no strace, or it may not trace");
    }
    let mut places = Vec::new();
    for (call, turns) in CALLS {
        // An older strace does not know every one of them.
        let known = call.split(',').filter(|call| works("strace", &["-e", &format!("trace={call}"), "true"]));
        let call = known.collect::<Vec<_>>().join(",");
        for failure in FAILURES {
            let turns = if is_full() { (1..=45).collect() } else { turns.to_vec() };
            places.extend(turns.iter().map(|turn| (call.clone(), format!("inject={call}:{failure}:when={turn}"))));
        }
    }
    at_each(places, |(call, inject)| async move {
        let site = Site::new();
        let lines = Lines::prepare(&site.scene, 300);
        let mut agent = site.agent(&["--linger", "5m", "--start", "connected"], Lines::ALL);
        // Calls that are not traced are not tampered with either.
        let trace = format!("trace={call}");
        let strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject];
        let lives = site.serve(|life| site.start(if life == 0 { &strace } else { &[] }, "")).await;
        // Several payloads in one call there may be or not; everything else happens in every build.
        let certain = !is_full() && inject.contains("KILL") && !inject.contains("pwritev");
        assert!(!certain || lives[0].was_killed(), "{inject} has not happened: {}", lives[0].told);
        site.agent_ended(&mut agent, &lives).await;
        site.assert_whole(1, lines.all(), 7, &lives);
    })
    .await;
}
