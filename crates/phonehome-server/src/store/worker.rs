//! The one task or thread that writes: takes what has gathered, writes it, syncs it, and only then lets anybody know.

use std::{io, mem, sync::Arc, time::Duration};

use phonehome_env::{Env, Workers};
use tokio::{
    runtime,
    sync::mpsc,
    time::{Instant, sleep, timeout_at},
};

use super::{
    Job,
    steps::{NewFile, Steps},
};
use crate::{meter::Meter, tasks::Tasks};

/// Serves jobs until the last way to it is gone.
pub(super) struct Worker {
    queue: mpsc::Receiver<Job>,
    steps: Steps,
    meter: Arc<Meter>,
    /// How long a simulated disk takes for a round.
    delay: Option<Arc<dyn Fn() -> Duration + Send + Sync>>,
}

impl Worker {
    /// Starts where this machine's work is done that waits for a disk.
    pub(super) fn start(
        env: &Env,
        queue: mpsc::Receiver<Job>,
        steps: Steps,
        meter: Arc<Meter>,
        tasks: &Tasks,
    ) -> io::Result<()> {
        match &env.workers {
            Workers::Threads => {
                // A runtime of its own: the thread waits for jobs or a time, and nobody minds that it blocks.
                let runtime = runtime::Builder::new_current_thread().enable_time().build()?;
                let worker = Self { queue, steps, meter, delay: None };
                std::thread::Builder::new().name("store".into()).spawn(move || runtime.block_on(worker.run()))?;
            }
            Workers::Tasks(delay) => tasks.spawn_aside(Self { queue, steps, meter, delay: Some(delay.clone()) }.run()),
        }
        Ok(())
    }

    async fn run(mut self) {
        self.steps.prepare();
        let mut round = Vec::new();
        while self.gather(&mut round).await {
            for job in mem::take(&mut round) {
                self.take(job);
            }
            let (attempts, began) = (self.steps.dirty(), Instant::now());
            self.steps.commit();
            self.meter.attempts_synced.add(attempts as u64);
            self.meter.commit_duration.observe(began.elapsed());
        }
    }

    /// Waits for work, then takes what else is there; `false` when nobody can have any more.
    async fn gather(&mut self, round: &mut Vec<Job>) -> bool {
        let first = match self.steps.poll_timeout() {
            Some(at) => match timeout_at(at, self.queue.recv()).await {
                Ok(first) => first,
                Err(_) => return true, // something waits for room and is due
            },
            None => self.queue.recv().await,
        };
        let Some(first) = first else { return false };
        if let Some(delay) = &self.delay {
            sleep(delay()).await;
        }
        round.push(first);
        // No more than the queue holds: what comes while it is emptied is the next round's.
        let more = self.queue.len();
        round.extend(std::iter::from_fn(|| self.queue.try_recv().ok()).take(more));
        true
    }

    fn take(&mut self, job: Job) {
        match job {
            Job::Append { writer, records, tally, room } => {
                drop(room); // they are in the round now
                self.steps.append(&writer, records, tally);
            }
            Job::Finish { writer, finished, answer } => self.steps.finish(&writer, *finished, answer),
            Job::Forget { build } => self.steps.forget(&build),
            Job::Limit { build, bytes } => self.steps.limit(build, bytes, self.meter.clone()),
            Job::Open { hello, changed, reply } => self.steps.open(*hello, changed, reply),
            Job::Rewind { writer, tally, reply } => {
                drop(reply.send(self.steps.rewind(&writer, tally))); // a connection that is gone does not go on
            }
            Job::Stop { build, reply } => {
                self.steps.stop(&build);
                drop(reply.send(Ok(()))); // whoever asked may not have wanted to wait
            }
            Job::Survey { build, changed, reply } => {
                drop(reply.send(self.steps.survey(&build, &changed))); // whoever asked may have gone
            }
            Job::Keep { build, kept, contents, reply } => {
                self.steps.settle(NewFile { build, kept, contents, reply });
            }
            Job::Report { build, line, reply } => {
                drop(reply.send(self.steps.report(&build, &line))); // whoever told it may have gone
            }
        }
    }
}
