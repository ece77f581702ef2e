//! Where spools are kept, and what earlier agents left there.
//!
//! `DIR/phonehome-UID/BUILD/STEP/NUMBER-PRODUCER`: containers of several users may share a volume, several steps a
//! directory, and the numbers say which attempt came first.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use phonehome_env::{Env, disk::Disk};
use phonehome_proto::{
    frame::Hello,
    id::{BuildId, ProducerId, StepName},
    sender::Sender,
};
use tracing::{info, warn};

use super::{
    Spool, Spooling, Usage,
    journal::{Found, Journal},
};
use crate::outbox::Outbox;

/// Where the spools of one step's agents are.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    env: Env,
    step: PathBuf,
    usage: Usage,
    /// What the next attempt's directory is called.
    number: u64,
}

/// What an earlier agent left, ready to be delivered.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) producer: ProducerId,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) spooling: Spooling,
    pub(crate) records: u64,
    pub(crate) finished: bool,
}

impl Place {
    /// Makes the directories, as far as they are not there, and finds what earlier agents of this step left.
    ///
    /// # Errors
    ///
    /// When they cannot be made, or somebody else may write to them.
    pub(crate) async fn open(
        env: &Env,
        dir: &Path,
        (build, step): (&BuildId, &StepName),
        limit: u64,
    ) -> io::Result<(Self, Vec<Found>)> {
        let usage = Usage::new(limit);
        let private = dir.join(format!("phonehome-{}", rustix::process::geteuid().as_raw()));
        let dirs = [private.clone(), private.join(build.as_str()), private.join(build.as_str()).join(step.as_str())];
        let mut place = Self { env: env.clone(), step: dirs[2].clone(), usage, number: 1 };
        let (disk, dir) = (env.disk.clone(), dir.to_owned());
        let look = place.clone();
        let found = env.blocking(move || {
            if !disk.exists(&dir)? {
                disk.create_dirs(&dir)?;
            }
            dirs.iter().try_for_each(|dir| disk.private_dir(dir))?;
            look.find(&disk)
        });
        let found = found.await?;
        place.number = found.iter().map(|(number, _)| number + 1).max().unwrap_or(1);
        Ok((place, found.into_iter().filter_map(|(_, found)| found).collect()))
    }

    /// What is there, oldest first. What cannot be read is left alone, and said.
    fn find(&self, disk: &Arc<dyn Disk>) -> io::Result<Vec<(u64, Option<Found>)>> {
        let mut all = Vec::new();
        for name in disk.list(&self.step)? {
            let number = name.to_str().and_then(|name| name.split_once('-')?.0.parse().ok());
            let Some(number) = number else {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    format!("{} does not belong there", self.step.join(name).display()),
                ));
            };
            let dir = self.step.join(name);
            match Journal::take_up(disk.clone(), &dir, self.usage.segment()) {
                Ok(found) => all.push((number, found)),
                Err(error) => {
                    warn!("what an earlier agent left in {} cannot be used: {error}", dir.display());
                    all.push((number, None));
                }
            }
        }
        Ok(all)
    }

    /// Makes what was found ready to be delivered; what is empty is removed.
    pub(crate) async fn take_up(&self, found: Vec<Found>, memory: u64) -> Vec<Left> {
        let mut left = Vec::new();
        for Found { hello, finished, first, next, journal } in found {
            if first == next && finished.is_none() {
                drop(self.env.blocking(move || journal.remove()).await); // the next agent tries again
                continue;
            }
            info!(records = next - first, "an earlier agent left records; they are delivered first");
            self.usage.change(0, journal.bytes());
            let (records, is_finished) = (next - first, finished.is_some());
            let outbox = Arc::new(Outbox::holding(Sender::recover(first, next, finished), memory));
            let spooling = Spool::go_on(self.env.clone(), outbox.clone(), journal, self.usage.clone());
            left.push(Left { producer: hello.producer, outbox, spooling, records, finished: is_finished });
        }
        left
    }

    /// Starts the spool of this agent's own attempt.
    pub(crate) fn start(&self, outbox: Arc<Outbox>, hello: Hello) -> Spooling {
        let producer = &hello.producer;
        let dir = self.step.join(format!("{:06}-{producer}", self.number));
        Spool::start(self.env.clone(), outbox, dir, hello, self.usage.clone())
    }
}
