//! Builds: declared, listed, shown, waited for, cancelled.

use std::{collections::BTreeMap, str::FromStr, sync::Arc, time::Duration};

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{HOST, LOCATION},
};
use phonehome_proto::{
    frame::{End, FinishedAck, UnixMicros, Usage},
    id::{BuildId, StepName},
    signal,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::{
    auth::Caller,
    body::{Answer, Json},
    params::{Named, NoQuery, Query, wrong},
    problem::Problem,
};
use crate::{
    builds::{Build, Clocks, StepState},
    catalogue::Filter,
    object::object,
    report::Report,
    serve::{Declare, Standing, entry},
    server::TOKEN_PREFIX,
    store::AttemptFiles,
    summary::{Summary, rfc3339},
};

/// What is sent to declare a build. Everything may be left out.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NewBuild {
    id: Option<BuildId>,
    steps: Option<Vec<StepName>>,
    labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "object")]
    timeouts: Timeouts,
    /// The secret of its agents, for who wants to be able to send the same declaration twice.
    token: Option<String>,
}

/// Seconds, or null for no limit.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Timeouts {
    #[serde(deserialize_with = "given")]
    connect: Option<Option<f64>>,
    #[serde(deserialize_with = "given")]
    idle: Option<Option<f64>>,
    #[serde(deserialize_with = "given")]
    lost: Option<Option<f64>>,
    #[serde(deserialize_with = "given")]
    total: Option<Option<f64>>,
    grace: Option<f64>,
}

/// Tells `null` from nothing.
fn given<'de, D: serde::Deserializer<'de>>(input: D) -> Result<Option<Option<f64>>, D::Error> {
    Option::<f64>::deserialize(input).map(Some)
}

/// The answer to a declaration: what a launcher hands to the builder.
#[derive(Debug, Serialize)]
struct Declared {
    id: BuildId,
    token: String,
    agent_url: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pin: Option<String>,
    steps: Vec<StepName>,
}

/// Most steps and labels of a build, and the longest name and value of a label, bytes.
const MAX_STEPS: usize = 100;
const MAX_LABELS: usize = 64;
const MAX_LABEL_KEY: usize = 256;
const MAX_LABEL_VALUE: usize = 1024;

/// Longest timeout, seconds: ten years.
const MAX_TIMEOUT: f64 = 10.0 * 366.0 * 24.0 * 3600.0;

/// `POST builds`.
pub(crate) async fn declare(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    _: NoQuery,
    headers: HeaderMap,
    Json(new): Json<NewBuild>,
) -> Result<Response, Problem> {
    caller.may_launch()?;
    let clocks = new.timeouts.over(&standing.settings.timeouts)?;
    let declare = checked(new, &standing)?;
    let token = declare.token.clone();
    let build = standing.declare(declare, clocks).await?;
    let declared = Declared {
        id: build.id.clone(),
        token,
        agent_url: agent_url(&standing, &headers),
        pin: standing.pin.clone(),
        steps: build.declaration.steps.clone(),
    };
    let location = HeaderValue::from_str(&format!("/api/v1/builds/{}", build.id)).map_err(std::io::Error::other)?;
    let mut response = Answer(StatusCode::CREATED, declared).into_response();
    response.headers_mut().insert(LOCATION, location);
    Ok(response)
}

fn checked(new: NewBuild, standing: &Standing) -> Result<Declare, Problem> {
    let invalid = |at: &str, why: String| Problem::bad_request(why.clone()).at(at, why);
    let env = &standing.shared.env;
    let steps = new.steps.unwrap_or_else(|| vec![StepName::default()]);
    if steps.is_empty() || steps.len() > MAX_STEPS {
        return Err(invalid("/steps", format!("a build has 1 to {MAX_STEPS} steps")));
    }
    let mut seen = std::collections::BTreeSet::new();
    if let Some(step) = steps.iter().find(|step| !seen.insert(step.as_str()) || is_taken(step)) {
        return Err(invalid("/steps", format!("step {step} is named twice, or has the name of a file of every build")));
    }
    if new.labels.len() > MAX_LABELS {
        return Err(invalid("/labels", format!("a build has at most {MAX_LABELS} labels")));
    }
    for (key, value) in &new.labels {
        if key.is_empty() || key.len() > MAX_LABEL_KEY || value.len() > MAX_LABEL_VALUE {
            let limits = format!("a label's name has 1 to {MAX_LABEL_KEY} bytes, its value at most {MAX_LABEL_VALUE}");
            return Err(invalid("/labels", limits));
        }
    }
    let token = match new.token {
        Some(token) if is_token(&token) => token,
        Some(_) => return Err(invalid("/token", format!("a token is {TOKEN_PREFIX} and 64 hexadecimal digits"))),
        None => crate::server::draw_token(env)?,
    };
    let id = match new.id {
        Some(id) => id,
        None => draw_id(standing)?,
    };
    Ok(Declare { id, steps, labels: new.labels, token })
}

fn is_token(text: &str) -> bool {
    text.strip_prefix(TOKEN_PREFIX)
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Names that lie beside the steps in a build's directory.
fn is_taken(step: &StepName) -> bool {
    matches!(step.as_str(), "build.json" | "reports" | "verdict.json")
}

fn draw_id(standing: &Standing) -> Result<BuildId, Problem> {
    let mut random = [0; 8];
    standing.shared.env.nature.fill(&mut random)?;
    format!("b-{:016x}", u64::from_le_bytes(random)).parse().map_err(|_| Problem::bad_request("no id"))
}

/// Where agents connect: as configured, or as the caller reaches this server.
fn agent_url(standing: &Standing, headers: &HeaderMap) -> String {
    let scheme = if standing.settings.tls { "wss" } else { "ws" };
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    standing.settings.advertise.clone().unwrap_or_else(|| format!("{scheme}://{host}"))
}

impl Timeouts {
    /// These, and the defaults where nothing was given.
    fn over(&self, defaults: &Clocks) -> Result<Clocks, Problem> {
        let limit = |name: &str, given: Option<Option<f64>>, default: Option<Duration>| match given {
            None => Ok(default),
            Some(None) => Ok(None),
            Some(Some(seconds)) => time(name, seconds).map(Some),
        };
        Ok(Clocks {
            connect: limit("connect", self.connect, defaults.connect)?,
            idle: limit("idle", self.idle, defaults.idle)?,
            lost: limit("lost", self.lost, defaults.lost)?,
            total: limit("total", self.total, defaults.total)?,
            grace: self.grace.map_or(Ok(defaults.grace), |seconds| time("grace", seconds))?,
        })
    }
}

fn time(name: &str, seconds: f64) -> Result<Duration, Problem> {
    if (0.0..=MAX_TIMEOUT).contains(&seconds) {
        return Ok(Duration::from_secs_f64(seconds));
    }
    let why = "a timeout is seconds from 0 to ten years, or null for no limit";
    Err(Problem::bad_request(why).at(format!("/timeouts/{name}"), why))
}

/// A part of the list.
#[derive(Debug, Serialize)]
struct Listed {
    builds: Vec<Summary>,
    /// What to ask the next part with.
    next: Option<String>,
}

/// How many builds a part has unless another number is asked for, and at most.
const PAGE: usize = 50;
const MAX_PAGE: usize = 500;

/// `GET builds`.
pub(crate) async fn list(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    mut query: Query,
) -> Result<Response, Problem> {
    caller.may_read()?;
    let filter = filter(&mut query, standing.shared.env.nature.now())?;
    query.end()?;
    let asked = standing.clone();
    let listed = move || {
        let page = asked.catalogue.list(&filter)?;
        let next = page.next.map(|(created, id)| format!("{created}.{id}"));
        Ok::<_, std::io::Error>(Listed {
            builds: page.summaries.into_iter().map(|row| asked.fresh(row)).collect(),
            next,
        })
    };
    let listed = standing.shared.env.blocking(listed).await?;
    Ok(Answer(StatusCode::OK, listed).into_response())
}

fn filter(query: &mut Query, now: UnixMicros) -> Result<Filter, Problem> {
    const VERDICTS: [&str; 7] = ["cancelled", "error", "failed", "lost", "running", "succeeded", "timed-out"];
    let labels = query.all("label").into_iter().map(|label| match label.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (label, None),
    });
    let labels = labels.collect();
    let verdicts: Vec<String> =
        query.all("verdict").iter().flat_map(|text| text.split(',')).map(str::to_owned).collect();
    if verdicts.iter().any(|verdict| !VERDICTS.contains(&verdict.as_str())) {
        return Err(wrong("verdict", &format!("it is one or more of {}", VERDICTS.join(", "))));
    }
    let limit = query.value::<usize>("limit")?.unwrap_or(PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(wrong("limit", &format!("it is from 1 to {MAX_PAGE}")));
    }
    let after = query.value::<Place>("cursor")?.map(|place| (place.created, place.id));
    let mut moment = |name: &str| match query.text(name)? {
        Some(text) => moment(&text, now)
            .map(Some)
            .ok_or_else(|| wrong(name, "it is a time such as 2026-01-31T12:00:00Z, or how long ago such as 24h")),
        None => Ok(None),
    };
    Ok(Filter { labels, verdicts, since: moment("since")?, until: moment("until")?, after, limit })
}

/// A point in time, or how long ago.
fn moment(text: &str, now: UnixMicros) -> Option<UnixMicros> {
    if let Ok(time) = humantime::parse_rfc3339(text) {
        return time.duration_since(std::time::UNIX_EPOCH).ok().map(|since| since.as_micros() as UnixMicros);
    }
    let ago = humantime::parse_duration(text).ok()?;
    Some(now.saturating_sub(u64::try_from(ago.as_micros()).ok()?))
}

/// Where a list goes on.
struct Place {
    created: UnixMicros,
    id: String,
}

impl FromStr for Place {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once('.').and_then(|(created, id)| {
            Some(Self { created: created.parse().ok()?, id: id.parse::<BuildId>().ok()?.to_string() })
        });
        parsed.ok_or("it is what an earlier answer said under next")
    }
}

impl Standing {
    /// A build that somebody asks for.
    pub(crate) async fn known(&self, id: &BuildId) -> Result<Arc<Build>, Problem> {
        match self.find(id).await? {
            Some(build) => Ok(build),
            None => Err(self.missing(id).await),
        }
    }

    /// Why there is no such build.
    pub(crate) async fn missing(&self, id: &BuildId) -> Problem {
        let (catalogue, wanted) = (self.catalogue.clone(), id.clone());
        match self.shared.env.blocking(move || catalogue.expired(&wanted)).await {
            Ok(Some((at, why))) => Problem::gone(format!("build {id} was removed at {} ({why})", rfc3339(at))),
            Ok(None) => Problem::no_build(id.as_str()),
            Err(error) => error.into(),
        }
    }

    /// A row of the catalogue, brought up to date for a build that runs.
    fn fresh(&self, row: Summary) -> Summary {
        let running = self.shared.builds.find(&row.id);
        running.and_then(|build| entry(&build).ok()).map_or(row, |entry| entry.summary)
    }
}

/// All that is known of a build.
#[derive(Debug, Serialize)]
pub(crate) struct Detail {
    /// The summary, with more about its steps below.
    #[serde(flatten)]
    summary: Map<String, Value>,
    /// Why the log is not proven complete.
    incomplete: Option<String>,
    timeouts: TimeoutsShown,
    steps: Vec<StepShown>,
    reports: Vec<Report>,
}

#[derive(Debug, Serialize)]
struct TimeoutsShown {
    connect: Option<f64>,
    idle: Option<f64>,
    lost: Option<f64>,
    total: Option<f64>,
    grace: f64,
}

#[derive(Debug, Serialize)]
struct StepShown {
    step: StepName,
    attempts: Vec<AttemptShown>,
}

#[derive(Debug, Serialize)]
struct AttemptShown {
    attempt: u32,
    state: StepState,
    agent: String,
    labels: BTreeMap<String, String>,
    /// When its command ended, as the agent says.
    ended: Option<String>,
    exit_code: Option<u8>,
    signal: Option<String>,
    core: bool,
    oom: bool,
    /// Why it never ran.
    reason: Option<String>,
    /// Whether the agent's account agrees with what is stored; `null` before its end.
    complete: Option<bool>,
    records: u64,
    bytes: Bytes,
    /// BLAKE3 of stdout and stderr in record order, as the agent promises it.
    digest: Option<String>,
    cuts: u64,
    usage: Option<UsageShown>,
    sealed: bool,
}

/// Bytes that are stored: of each stream once the agent has told its end, and together.
#[derive(Debug, Serialize)]
struct Bytes {
    stdout: Option<u64>,
    stderr: Option<u64>,
    total: u64,
}

#[derive(Debug, Serialize)]
struct UsageShown {
    wall_us: u64,
    user_us: u64,
    system_us: u64,
    max_rss_bytes: u64,
}

/// Everything about a build, read from its files where need be.
pub(crate) fn detail(build: &Build) -> std::io::Result<Detail> {
    let verdict = build.known_verdict();
    let attempts = build.attempts();
    let mut steps: Vec<_> =
        build.declaration.steps.iter().map(|step| StepShown { step: step.clone(), attempts: Vec::new() }).collect();
    for (files, state) in attempts {
        let is_newest = state != StepState::Superseded;
        let cuts = if is_newest { build.cuts(&files.step) } else { 0 }; // those of others are not counted
        let shown = attempt(&files, state, cuts)?;
        match steps.iter_mut().find(|step| step.step == files.step) {
            Some(step) => step.attempts.push(shown),
            None => steps.push(StepShown { step: files.step.clone(), attempts: vec![shown] }),
        }
    }
    let Clocks { connect, idle, lost, total, grace } = &build.declaration.timeouts;
    let seconds = |limit: &Option<Duration>| limit.map(|limit| limit.as_secs_f64());
    let summary = serde_json::to_value(entry(build)?.summary)?;
    let mut summary = if let Value::Object(summary) = summary { summary } else { Map::new() };
    summary.remove("steps");
    Ok(Detail {
        summary,
        incomplete: verdict.and_then(|verdict| verdict.incomplete),
        timeouts: TimeoutsShown {
            connect: seconds(connect),
            idle: seconds(idle),
            lost: seconds(lost),
            total: seconds(total),
            grace: grace.as_secs_f64(),
        },
        steps,
        reports: build.reports().iter().map(|report| (**report).clone()).collect(),
    })
}

fn attempt(files: &AttemptFiles, state: StepState, cuts: u64) -> std::io::Result<AttemptShown> {
    let (agent, labels) = files.labels()?;
    let progress = files.progress.borrow().clone();
    let finished = progress.finished.as_ref().map(|(finished, _)| finished);
    let end = finished.map(|finished| &finished.end);
    let (mut signal, mut core, mut oom, mut reason) = (None, false, false, None);
    match end {
        Some(End::Signalled { signal: number, core: dumped, oom: out }) => {
            (signal, core, oom) = (Some(signal::name(*number).into_owned()), *dumped, *out);
        }
        Some(End::NotStarted { reason: why, .. }) => reason = Some(why.clone()),
        Some(End::Exited(_)) | None => {}
    }
    let counts = finished.map(|finished| finished.counts);
    Ok(AttemptShown {
        attempt: files.attempt,
        state: if finished.is_some() { StepState::Finished } else { state },
        agent,
        labels,
        ended: finished.map(|finished| rfc3339(finished.time)),
        exit_code: end.map(End::code),
        signal,
        core,
        oom,
        reason,
        complete: progress.finished.as_ref().map(|(_, answer)| *answer == FinishedAck::Complete),
        records: progress.next,
        bytes: Bytes {
            stdout: counts.map(|counts| counts.stdout.bytes),
            stderr: counts.map(|counts| counts.stderr.bytes),
            total: files.output_bytes()?,
        },
        digest: finished.map(|finished| finished.digest.to_string()),
        cuts,
        usage: finished.and_then(|finished| finished.usage).map(|Usage { wall, user, system, max_rss }| UsageShown {
            wall_us: wall,
            user_us: user,
            system_us: system,
            max_rss_bytes: max_rss,
        }),
        sealed: files.is_sealed()?,
    })
}

/// `GET builds/{id}`.
pub(crate) async fn show(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    Named(id): Named,
    query: Query,
) -> Result<Response, Problem> {
    caller.may_read()?;
    query.end()?;
    answer(&standing, &id).await
}

async fn answer(standing: &Standing, id: &BuildId) -> Result<Response, Problem> {
    let build = standing.known(id).await?;
    let detail = standing.shared.env.blocking(move || detail(&build)).await?;
    Ok(Answer(StatusCode::OK, detail).into_response())
}

/// What may be said when a build is cancelled.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Cancelling {
    reason: Option<String>,
}

/// `POST builds/{id}/cancel`.
pub(crate) async fn cancel(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    Named(id): Named,
    _: NoQuery,
    Json(cancelling): Json<Cancelling>,
) -> Result<StatusCode, Problem> {
    caller.may_launch()?;
    let build = standing.known(&id).await?;
    if build.known_verdict().is_some() {
        return Err(Problem::conflict(format!("build {id} has ended already")));
    }
    let reason = cancelling.reason.unwrap_or_else(|| "somebody asked for it".into());
    let reason = phonehome_proto::text::shortened(&reason, phonehome_proto::limits::MAX_TEXT);
    standing.cancel(&build, &reason).await.map_err(|error| {
        Problem::unavailable(format!("build {id} stops, but a restart would forget that: it cannot be stored: {error}"))
    })?;
    Ok(StatusCode::ACCEPTED)
}

/// Longest wait for one answer; proxies cut longer ones anyway.
const MAX_WAIT: Duration = Duration::from_secs(300);
const WAIT: Duration = Duration::from_secs(30);

/// `GET builds/{id}/wait`: the build once it has ended, or 204 when the time is over.
pub(crate) async fn wait(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    Named(id): Named,
    mut query: Query,
) -> Result<Response, Problem> {
    caller.may_read()?;
    let patience = match query.value::<f64>("timeout")? {
        None => WAIT,
        Some(seconds) if (0.0..=MAX_WAIT.as_secs_f64()).contains(&seconds) => Duration::from_secs_f64(seconds),
        Some(_) => return Err(wrong("timeout", &format!("it is seconds from 0 to {}", MAX_WAIT.as_secs()))),
    };
    query.end()?;
    let build = standing.known(&id).await?;
    let ended = tokio::select! {
        ended = timeout(patience, build.verdict()) => ended.is_ok(),
        () = standing.shared.shutdown.cancelled() => return Err(Problem::unavailable("the server shuts down").retry_after(1)),
    };
    if ended { answer(&standing, &id).await } else { Ok(StatusCode::NO_CONTENT.into_response()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::Scene;

    #[tokio::test]
    async fn only_the_newest_attempt_of_a_step_has_its_state_and_its_cuts() {
        let scene = Scene::new(&["main", "other"]);
        let mut agents = Vec::new();
        for producer in [1, 2, 3, 3] {
            agents.push(scene.agent(producer, "main").await); // the third comes back after a cut
        }
        agents.push(scene.agent(4, "other").await);
        let shown = detail(&scene.build).unwrap();
        let all = shown.steps.iter().flat_map(|step| &step.attempts);
        let told: Vec<_> = all.map(|attempt| (attempt.attempt, attempt.state, attempt.cuts)).collect();
        let (gone, here) = (StepState::Superseded, StepState::Connected);
        assert_eq!(told, [(1, gone, 0), (2, gone, 0), (3, here, 1), (1, here, 0)]);
    }
}
