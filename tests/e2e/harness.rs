//! What the tests stand on: the programs, directories and processes that end with their test, a hook with a builder, a
//! client that speaks the wire by hand, and a proxy that breaks connections.

mod binaries;
mod caller;
mod disk;
mod hook;
mod netns;
mod process;
mod proxy;
mod random;
mod scene;
mod site;
mod standing;

use std::{io::Write, process::Command, time::Duration};

use tokio::time::{sleep, timeout};

pub(crate) use self::{
    binaries::{agent, server},
    caller::{Caller, Records, ask, hello},
    disk::MortalDisk,
    hook::{Hook, Stored, arguments, builder},
    netns::{End, Link},
    process::Process,
    proxy::{Mode, Proxy},
    random::Random,
    scene::{Gate, Scene},
    site::{Life, Lines, Site},
    standing::{ADMIN, READER, Standing, exchange},
};

/// How long anything may take that must happen. Generous: only a failing test waits this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How often a file is looked for that nobody announces.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Waits for an event, and fails when it does not come.
pub(crate) async fn patiently<T>(what: &str, event: impl Future<Output = T>) -> T {
    match timeout(PATIENCE, event).await {
        Ok(value) => value,
        Err(_) => panic!("waited {} s for nothing: {what}", PATIENCE.as_secs()),
    }
}

/// Waits for a fact that nobody announces, such as a file, and fails when it does not come true.
pub(crate) async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    patiently(what, async {
        while !is_so() {
            sleep(LOOK_AGAIN).await;
        }
    })
    .await;
}

/// Says that a test did not test anything, and why. It goes past the capture of test output: a skipped test must show.
pub(crate) fn skipped(why: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    std::io::stderr().write_all(format!("skipped: {test}: {why}\n").as_bytes()).unwrap();
}

/// Whether a command can be run and succeeds.
pub(crate) fn works(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}
