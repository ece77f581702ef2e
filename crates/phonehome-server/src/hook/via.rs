//! A build on a standing server, declared, followed and stopped from here.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use http::StatusCode;
use phonehome_proto::id::BuildId;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

use super::{
    HookConfig,
    ending::{Cause, Ending},
    feed::Feed,
};
use crate::{
    Clocks,
    client::{
        http::{Ask, Client, ClientError},
        model::{Declared, Detail, Report},
        remote_log::{Outcome, RemoteLog, Wanted},
    },
    server::draw_token,
};

/// A build on a standing server.
pub(super) struct Via {
    client: Arc<Client>,
    id: BuildId,
    outcome: Outcome,
    /// How long the server may be away.
    patience: Option<Duration>,
    connected: Arc<AtomicBool>,
    inner: Mutex<Inner>,
    /// Fires when somebody does not want to wait for the end.
    hurried: CancellationToken,
    /// What is being told to the server.
    telling: TaskTracker,
}

#[derive(Default)]
struct Inner {
    is_cancelled: bool,
    /// What failed around the build, which is then how it ended.
    failure: Option<String>,
    /// What was reported of a build to which nobody came.
    reports: Vec<Report>,
}

/// How long a server may be away when the build is declared: a restart, while the pusher sees nothing yet.
const DECLARE: Duration = Duration::from_secs(30);

/// How long a server that cannot be reached may keep a hook from its own end.
const LAST_TRY: Duration = Duration::from_secs(5);

/// Reports that are repeated in the end.
const MOST_REPORTS: usize = 3;

impl Via {
    /// Declares the build, and begins to read its log. Returns what the builder is told as well.
    pub(super) async fn declare(
        client: Client,
        config: &HookConfig,
    ) -> anyhow::Result<(Self, Feed, Vec<(&'static str, String)>)> {
        let patience = config.clocks.lost;
        let first_patience = patience.into_iter().chain([DECLARE]).min();
        let declared: Declared = async { client.json_for(first_patience, &declaration(config)?).await }
            .await
            .map_err(|error| anyhow::anyhow!(error.told()))
            .with_context(|| format!("cannot declare the build at {}", client.base))?;
        let id: BuildId = declared.id.parse().context("the server gave the build a name that is none")?;
        let client = Arc::new(client);
        let wanted = Wanted { follow: true, ..Wanted::default() };
        let log = RemoteLog::start(client.clone(), id.clone(), wanted, patience);
        let (outcome, connected) = (log.outcome(), log.connected());
        let (inner, hurried, telling) = (Mutex::default(), CancellationToken::new(), TaskTracker::new());
        let via = Self { client, id, outcome, patience, connected, inner, hurried, telling };
        Ok((via, Feed::Remote(log), variables(declared)))
    }

    /// Waits for the end of the build, or for somebody who does not want to wait any longer.
    pub(super) async fn ending(&self) -> Ending {
        let mut outcome = self.outcome.clone();
        let told = tokio::select! {
            told = outcome.wait_for(Option::is_some) => match told {
                Ok(told) => told.clone(),
                Err(_) => None, // the reader was stopped, with the printer
            },
            () = self.hurried.cancelled() => None,
        };
        let mut ending = match told {
            Some(Ok(detail)) => self.ended(detail),
            Some(Err(reason)) => Ending::failed(&reason),
            None if self.hurried.is_cancelled() => hurried(),
            None => self.ask_for_the_end().await,
        };
        if let Some(failure) = &self.inner().failure {
            ending.words = format!("error: {failure}");
            (ending.code, ending.cause) = (super::ending::EXIT_ERROR, Cause::Other);
        }
        ending
    }

    fn ended(&self, detail: Detail) -> Ending {
        let ending = Ending::from(&detail);
        self.inner().reports = detail.reports;
        ending
    }

    /// Waits without the log, which nobody reads any more.
    async fn ask_for_the_end(&self) -> Ending {
        let ask = Ask::get(format!("builds/{}/wait?timeout={}", self.id, WAIT.as_secs())).taking(WAIT);
        loop {
            let detail = tokio::select! {
                detail = self.client.json_if_any(self.patience, &ask) => detail,
                () = self.hurried.cancelled() => return hurried(),
            };
            match detail {
                Ok(None) => {}
                Ok(Some(detail)) => return self.ended(detail),
                Err(error) => return Ending::failed(&error.told()),
            }
        }
    }

    pub(super) fn was_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.inner().is_cancelled
    }

    /// Stops the build. A second call does not wait for that.
    pub(super) fn cancel(&self, reason: &str) {
        if std::mem::replace(&mut self.inner().is_cancelled, true) {
            self.hurried.cancel();
            return;
        }
        self.tell(vec![self.cancelling(reason)]);
    }

    /// Stops the build because something around it failed.
    pub(super) fn fail(&self, reason: &str) {
        let mut inner = self.inner();
        inner.is_cancelled = true;
        inner.failure.get_or_insert_with(|| reason.to_owned());
        drop(inner);
        let report =
            json!({"type": "Warning", "reason": "LauncherFailed", "message": reason, "source": "phonehome-hook"});
        let report = Ask::post(format!("builds/{}/events", self.id), &report);
        self.tell(vec![report, self.cancelling(reason)]);
    }

    fn cancelling(&self, reason: &str) -> Ask {
        Ask::post(format!("builds/{}/cancel", self.id), &json!({"reason": reason})).repeatable()
    }

    /// Tells the server, as long as it takes.
    fn tell(&self, asks: Vec<Ask>) {
        let (client, patience) = (self.client.clone(), self.patience);
        self.telling.spawn(async move {
            for ask in asks {
                match client.ask_for(patience, &ask).await {
                    Ok(_) => {}
                    Err(error) if error.status() == Some(StatusCode::CONFLICT) => {} // it has ended
                    Err(error) => warn!("the server could not be told: {}", error.told()),
                }
            }
        });
    }

    /// What is known about a build to which nobody came.
    pub(super) fn hints_about_nobody(&self) -> Vec<String> {
        let inner = self.inner();
        let mut told: Vec<&Report> = inner.reports.iter().rev().filter(|report| report.is_warning()).collect();
        told.dedup_by_key(|report| (&report.reason, &report.message));
        told.truncate(MOST_REPORTS);
        told.into_iter().map(|report| format!("reported: {}", report.told())).collect()
    }

    /// Lets what was said last reach the server.
    pub(super) async fn farewell(&self) {
        self.telling.close();
        drop(timeout(LAST_TRY, self.telling.wait()).await); // its clocks end the build, then
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One question about the end.
const WAIT: Duration = Duration::from_secs(60);

fn hurried() -> Ending {
    let incomplete = Some("its end was not waited for".to_owned());
    let words = "cancelled: nobody waited for its end".to_owned();
    Ending { words, code: EXIT_CANCELLED, cause: Cause::Other, incomplete, steps: Vec::new() }
}

const EXIT_CANCELLED: u8 = 130;

/// With a token of our own, so that it may be sent again when the answer did not arrive.
fn declaration(config: &HookConfig) -> Result<Ask, ClientError> {
    let token = draw_token(&phonehome_env::Env::real())
        .map_err(|error| ClientError::NotUnderstood(format!("a token cannot be drawn: {error}")))?;
    let steps: Vec<_> = config.steps.iter().map(|step| step.as_str()).collect();
    let body = json!({
        "id": config.build.as_str(), "steps": steps, "token": token, "timeouts": timeouts(&config.clocks),
    });
    Ok(Ask::post("builds", &body).repeatable())
}

/// Clocks as the API has them: seconds, or null for no limit.
pub(crate) fn timeouts(clocks: &Clocks) -> Value {
    let seconds = |limit: Option<Duration>| limit.map(|limit| limit.as_secs_f64());
    json!({
        "connect": seconds(clocks.connect), "idle": seconds(clocks.idle), "lost": seconds(clocks.lost),
        "total": seconds(clocks.total), "grace": clocks.grace.as_secs_f64(),
    })
}

/// What a builder is told.
pub(crate) fn variables(declared: Declared) -> Vec<(&'static str, String)> {
    let Declared { id, token, agent_url, pin } = declared;
    let mut variables = vec![("PHONEHOME_URL", agent_url), ("PHONEHOME_BUILD", id), ("PHONEHOME_TOKEN", token)];
    variables.extend(pin.map(|pin| ("PHONEHOME_PIN", pin)));
    variables
}
