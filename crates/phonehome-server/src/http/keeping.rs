//! What is kept, whether it is whole, and what goes.

use std::sync::Arc;

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use phonehome_proto::id::{Attempt, StepName};
use serde::Serialize;

use super::{
    auth::Caller,
    body::{Answer, Json, Nothing},
    params::{Named, NoQuery, Query},
    problem::Problem,
};
use crate::{
    keeper::{RemoveError, told},
    serve::Standing,
    store::{archive, verify},
    summary::rfc3339,
};

/// `DELETE builds/{id}`.
pub(crate) async fn delete(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    Named(id): Named,
    _: NoQuery,
    Json(Nothing {}): Json<Nothing>,
) -> Result<StatusCode, Problem> {
    caller.may_administer()?;
    match standing.remove(&id, "deleted").await {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(RemoveError::Unknown) => Err(standing.missing(&id).await),
        Err(error @ RemoveError::Running) => Err(Problem::conflict(error.to_string())),
        Err(RemoveError::Storage(cause)) => Err(cause.into()),
    }
}

/// What the rules remove.
#[derive(Debug, Serialize)]
struct Plan {
    expire: Vec<Planned>,
    bytes: u64,
    dry_run: bool,
}

#[derive(Debug, Serialize)]
struct Planned {
    id: String,
    ended: String,
    bytes: u64,
    rule: &'static str,
}

/// `POST retention`: applies the rules now, or says what they would do.
pub(crate) async fn retain(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    mut query: Query,
    Json(Nothing {}): Json<Nothing>,
) -> Result<Response, Problem> {
    caller.may_administer()?;
    let dry_run = query.switch("dry_run")?;
    query.end()?;
    let mut plan = Plan { expire: Vec::new(), bytes: 0, dry_run };
    for expiry in standing.due().await? {
        let rule = told(expiry.rule);
        let goes = dry_run || standing.remove(&expiry.id, rule).await.is_ok();
        if goes {
            plan.bytes += expiry.bytes;
            let (id, ended, bytes) = (expiry.id.to_string(), rfc3339(expiry.ended), expiry.bytes);
            plan.expire.push(Planned { id, ended, bytes, rule });
        }
    }
    Ok(Answer(StatusCode::OK, plan).into_response())
}

/// Whether what is stored is what was promised.
#[derive(Debug, Serialize)]
struct Verified {
    ok: bool,
    attempts: Vec<VerifiedAttempt>,
}

#[derive(Debug, Serialize)]
struct VerifiedAttempt {
    step: StepName,
    attempt: Attempt,
    ok: bool,
    problem: Option<String>,
    stored_digest: String,
    promised_digest: Option<String>,
    records: u64,
    bytes: u64,
}

/// `POST builds/{id}/verify`: reads everything that is stored of an ended build.
pub(crate) async fn check(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    Named(id): Named,
    _: NoQuery,
    Json(Nothing {}): Json<Nothing>,
) -> Result<Response, Problem> {
    caller.may_read()?;
    let build = standing.known(&id).await?;
    if build.known_verdict().is_none() {
        return Err(Problem::conflict(format!("build {id} has not ended: there is nothing to compare with yet")));
    }
    let turn = standing.readers.verification();
    let turn =
        turn.ok_or_else(|| Problem::unavailable("as many builds are verified as may be at once").retry_after(5))?;
    let store = standing.shared.store.clone();
    let verify = move || match archive::load(store.disk(), store.data(), &build.id)? {
        Some(archived) => verify::verify(&archived, &mut |_, _| {}),
        None => Ok(Vec::new()),
    };
    let verified = move || {
        let _turn = turn; // until it is done, whoever still waits for it
        verify()
    };
    let attempts = standing.shared.env.blocking(verified).await?;
    let attempts: Vec<_> = attempts.into_iter().map(shown).collect();
    let ok = attempts.iter().all(|attempt| attempt.ok);
    Ok(Answer(StatusCode::OK, Verified { ok, attempts }).into_response())
}

fn shown(verified: verify::VerifiedAttempt) -> VerifiedAttempt {
    let verify::VerifiedAttempt { step, attempt, stored, promised, counts, problem } = verified;
    VerifiedAttempt {
        step,
        attempt,
        ok: problem.is_none(),
        problem,
        stored_digest: stored.to_string(),
        promised_digest: promised.map(|promised| promised.to_string()),
        records: counts.records(),
        bytes: counts.output_bytes(),
    }
}
