//! Everything around a build fails, at every place where that can be arranged; the log does not.
//!
//! A source of numbered and hashed lines is compared with what is stored and with what was printed, whatever was done
//! meanwhile to the server, the agent, the disk or the network. By default each test takes a part of its places, one of
//! every kind; `PHONEHOME_SWEEP=full` takes all of them, and waits as long as real faults last.

mod agent_killed;
mod calls;
mod crash;
mod errors;
mod partition;
mod power;
mod proxied;

use std::{env, sync::Arc};

use tokio::{sync::Semaphore, task::JoinSet};

/// Whether to go through all of it.
fn is_full() -> bool {
    env::var_os("PHONEHOME_SWEEP").is_some_and(|wanted| wanted == "full")
}

/// One of two measures: the second in a full sweep.
pub(crate) fn long_or<T>(short: T, long: T) -> T {
    if is_full() { long } else { short }
}

/// Does something for each of `places`, a few at a time: most of it is waiting.
async fn at_each<P, F>(places: impl IntoIterator<Item = P>, mut work: impl FnMut(P) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let at_a_time = Arc::new(Semaphore::new(AT_A_TIME));
    let mut running = JoinSet::new();
    for place in places {
        let (work, at_a_time) = (work(place), at_a_time.clone());
        running.spawn(async move {
            let _permit = at_a_time.acquire().await.unwrap();
            work.await;
        });
    }
    while let Some(done) = running.join_next().await {
        done.unwrap_or_else(|failed| std::panic::resume_unwind(failed.into_panic()));
    }
}

const AT_A_TIME: usize = 16;

/// How long the agents of these tests stay for their server: longer than any test.
const LINGER: [&str; 2] = ["--linger", "5m"];
