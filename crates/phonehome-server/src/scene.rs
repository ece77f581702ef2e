//! A build over a store of its own, with agents that write what they are told to: for tests of whoever reads it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use phonehome_env::{Env, Workers};
use phonehome_proto::{
    frame::{End, Finished, FinishedAck, Hello, Record, Stream, UnixMicros},
    id::ProducerId,
    receiver::Receiver,
    tally::Tally,
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{
    builds::{Build, Clocks, Seat, hash_token},
    declaration::Declaration,
    store::{Durability, Opened, Store},
    tasks::Tasks,
};

/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct Scene {
    pub(crate) build: Arc<Build>,
    pub(crate) env: Env,
    pub(crate) store: Store,
    /// Of the server.
    pub(crate) shutdown: CancellationToken,
    tasks: Tasks,
    _dir: tempfile::TempDir,
}

/// One life of a step's agent.
pub(crate) struct Agent {
    seat: Seat,
    step: String,
    /// Its account before each record.
    before: Vec<Tally>,
}

impl Scene {
    pub(crate) fn new(steps: &[&str]) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        // The store's worker and its readers are tasks, so that it all happens in one thread.
        let env = Env { workers: Workers::Tasks(Arc::new(|| Duration::ZERO)), ..Env::real() };
        let store = Store::open(&env, dir.path(), Durability::Os, &Tasks::default()).unwrap();
        let steps = steps.iter().map(|step| step.parse().unwrap()).collect();
        let (labels, token) = (BTreeMap::new(), hash_token("token"));
        let declaration = Declaration { created: 0, steps, labels, timeouts: Clocks::default(), token };
        let build = Arc::new(Build::new("b".parse().unwrap(), declaration, Duration::ZERO, store.clone()));
        let (tasks, watched) = (Tasks::default(), build.clone());
        tasks.spawn(async move { watched.watch_clocks(&CancellationToken::new()).await });
        Self { build, env, store, shutdown: CancellationToken::new(), tasks, _dir: dir }
    }

    /// An agent of a step; another producer than before is its next attempt.
    pub(crate) async fn agent(&self, producer: u8, step: &str) -> Agent {
        let hello = Hello {
            build: self.build.id.clone(),
            step: step.parse().unwrap(),
            producer: ProducerId([producer; 16]),
            oldest: 0,
            next: 0,
            labels: BTreeMap::new(),
            agent: "test".into(),
            capabilities: Vec::new(),
        };
        Agent { seat: self.build.seat(hello).await.unwrap(), step: step.to_owned(), before: Vec::new() }
    }

    /// Stores records, and waits until they can be read.
    pub(crate) async fn write(&self, agent: &mut Agent, records: &[(UnixMicros, Stream, &[u8])]) {
        for (time, stream, payload) in records {
            let Opened { writer, receiver, .. } = &mut agent.seat.opened;
            agent.before.push(receiver.tally().clone());
            let (seq, offset) = (receiver.next(), receiver.tally().offset(*stream));
            let mut record = vec![Record::new(seq, *time, *stream, offset, payload.to_vec().into())];
            receiver.handle_records(&mut record, |_| None).unwrap();
            self.store.append(writer, record, receiver.tally()).await.unwrap();
        }
        let next = agent.seat.opened.receiver.next();
        let stored = agent.seat.opened.progress.wait_for(|progress| progress.next == next);
        timeout(LIMIT, stored).await.expect("it is stored").unwrap();
    }

    /// Takes back all but the first `kept` records, to be sent again.
    pub(crate) async fn take_back(&self, agent: &mut Agent, kept: usize) {
        let Some(tally) = agent.before.get(kept).cloned() else { return };
        agent.before.truncate(kept);
        assert!(self.store.rewind(&agent.seat.opened.writer, &tally).await.unwrap());
        agent.seat.opened.receiver = Receiver::resume(tally, 0, None);
    }

    /// The end of an agent, with code 0.
    pub(crate) async fn finish(&self, agent: &mut Agent) {
        let tally = agent.seat.opened.receiver.tally().clone();
        let (next, counts, digest) = (tally.next(), tally.counts(), tally.digest());
        let finished = Finished { next, counts, digest, end: End::Exited(0), time: 9, usage: None };
        let writer = &agent.seat.opened.writer;
        self.store.finish(writer, finished.clone(), FinishedAck::Complete).await.unwrap();
        let stored = agent.seat.opened.progress.wait_for(|progress| progress.finished.is_some());
        timeout(LIMIT, stored).await.expect("its end is stored").unwrap();
        self.build.handle_finished(&agent.step.parse().unwrap(), finished, FinishedAck::Complete);
    }

    /// Ends the build.
    pub(crate) async fn end(&self) {
        self.build.cancel("enough");
        self.build.cancel("enough, I said");
        timeout(LIMIT, self.build.verdict()).await.expect("it ends");
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}
