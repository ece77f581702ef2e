//! The line home: everything between the command's output and the server, but for the command itself.

use std::sync::Arc;

use phonehome_env::Env;
use phonehome_proto::{
    frame::{Cancel, CommandState},
    id::ProducerId,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tracing::{debug, error, warn};

use crate::{
    config::{Home, SpoolConfig},
    failure::Failure,
    labels::Labeller,
    outbox::Outbox,
    recorder::{Policy, Recorder},
    spool::{LEAVE, Place, Remains, Spooling},
    uplink::{Delivery, Dialler, Identity, Uplink},
};

/// A line that is open: records go in, and the server is phoned until it has them all.
#[derive(Debug)]
pub struct Line {
    outbox: Arc<Outbox>,
    uplink: JoinHandle<Delivery>,
    labeller: Option<JoinHandle<()>>,
    spooling: Option<(Place, Spooling)>,
    /// How the delivery ended, once it has.
    delivery: Option<Delivery>,
    /// Whether the server has welcomed this agent.
    pub(crate) welcomed: watch::Receiver<bool>,
    /// What the command does, for heartbeats.
    pub(crate) command: watch::Sender<CommandState>,
    pub(crate) cancels: Option<mpsc::Receiver<Cancel>>,
    /// When the command wrote something last, for heartbeats.
    pub(crate) last_output: watch::Sender<Instant>,
}

impl Line {
    /// Takes up what an earlier agent left and starts to phone home.
    ///
    /// # Errors
    ///
    /// When there is no source of randomness.
    pub async fn open(env: &Env, home: Home, config: &SpoolConfig) -> Result<(Self, Recorder), Failure> {
        let mut producer = [0; 16];
        env.nature.fill(&mut producer)?;
        let outbox = Arc::new(Outbox::new(config.memory));
        let policy = Policy {
            overflow: config.overflow,
            offline_limit: config.offline_limit,
            on_offline: config.on_offline,
            ring: config.memory / RING_SHARE,
        };
        let mut recorder = Recorder::new(env.clone(), outbox.clone(), policy);
        let (labels, labeller) = Labeller::open(env, home.labels, recorder.herald()).await;
        let labeller = labeller.map(|labeller| tokio::spawn(labeller.run()));
        let identity = Identity { build: home.build, step: home.step, producer: ProducerId(producer), labels };
        let place = open_place(env, config, &identity).await;
        let mut left = Vec::new();
        let mut spooling = None;
        if let Some((place, found)) = place {
            left = place.take_up(found, config.memory).await;
            let own = place.start(outbox.clone(), identity.hello(0, 0));
            spooling = Some((place, own));
        }
        for left in &left {
            recorder.took_over(left.records, left.finished);
        }
        let (welcomed_tx, welcomed) = watch::channel(false);
        let (cancels_tx, cancels) = mpsc::channel(1);
        let (command, command_rx) = watch::channel(CommandState::Waiting);
        let (last_output, last_output_rx) = watch::channel(Instant::now());
        let uplink = Uplink {
            env: env.clone(),
            dialler: Dialler::new(env.clone(), home.address, home.token, home.trust),
            identity,
            outbox: outbox.clone(),
            left,
            welcomed: welcomed_tx,
            cancels: cancels_tx,
            command: command_rx,
            last_output: last_output_rx,
        };
        let uplink = tokio::spawn(uplink.run());
        let (cancels, delivery) = (Some(cancels), None);
        let line = Self { outbox, uplink, labeller, spooling, delivery, welcomed, command, cancels, last_output };
        Ok((line, recorder))
    }

    /// Waits until the server has accepted the end, or never will. Cancel safe.
    pub async fn delivered(&mut self) {
        if self.delivery.is_none() {
            self.delivery = Some(match (&mut self.uplink).await {
                Ok(delivery) => delivery,
                Err(panicked) => {
                    error!("delivery failed: {panicked}");
                    Delivery::Refused("it failed here".into())
                }
            });
        }
    }

    /// How the delivery ended, if it has.
    pub fn delivery(&self) -> Option<&Delivery> {
        self.delivery.as_ref()
    }

    pub(crate) fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    /// Ends the line and says how the delivery ended. What is not delivered is left to the next agent, if there is a place
    /// for it.
    pub async fn close(mut self) -> Option<Delivery> {
        match &self.delivery {
            Some(Delivery::Complete) => debug!("the server has the complete log"),
            Some(Delivery::Incomplete(reason)) => warn!("the server has the log, but it is incomplete: {reason}"),
            Some(Delivery::Refused(_)) => {} // said when it happened
            None => {
                let records = self.outbox.look(|sender| sender.next() - sender.oldest());
                warn!(records, "the server has not confirmed the end of the log within --linger");
            }
        }
        if let Some((place, spooling)) = self.spooling.take() {
            self.uplink.abort();
            spooling.leave().await;
            drop(timeout(LEAVE, place.tidy()).await); // empty directories are no harm
        }
        self.delivery.take()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.uplink.abort();
        self.labeller.iter().for_each(JoinHandle::abort);
    }
}

/// The newest output may take this part of the memory while older output is dropped.
const RING_SHARE: u64 = 4;

/// The place for spools. Without one memory has to do.
async fn open_place(env: &Env, config: &SpoolConfig, identity: &Identity) -> Option<(Place, Vec<Remains>)> {
    let dir = config.dir.as_deref()?;
    let step = (&identity.build, &identity.step);
    Place::open(env, dir, step, config.limit)
        .await
        .inspect_err(|refusal| {
            warn!(
                "--spool-dir {} cannot be used, memory has to do: {refusal} (it has to be a directory in which uid {} may \
                 make one of its own)",
                dir.display(),
                rustix::process::geteuid().as_raw()
            );
        })
        .ok()
}
