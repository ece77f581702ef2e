//! What launchers and event exporters tell.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use phonehome_proto::id::BuildId;

use super::{
    auth::Caller,
    body::Json,
    params::{Named, NoQuery},
    problem::Problem,
};
use crate::{
    builds::Build,
    report::{Report, Told},
    serve::Standing,
};

/// `POST builds/{id}/events`.
pub(crate) async fn report(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    Named(id): Named,
    _: NoQuery,
    Json(told): Json<Told>,
) -> Result<StatusCode, Problem> {
    caller.may_report(&id)?;
    let report = report_of(&standing, told)?;
    let build = standing.known(&id).await?;
    if build.known_verdict().is_some() {
        caller.may_report_late()?;
    }
    take(&standing, &build, report).await
}

/// `POST events`: the object of the event says which build it belongs to. One that belongs to none is not kept.
pub(crate) async fn report_of_any(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    _: NoQuery,
    Json(told): Json<Told>,
) -> Result<StatusCode, Problem> {
    caller.may_launch()?;
    let id = told.build().and_then(|id| id.parse::<BuildId>().ok());
    let report = report_of(&standing, told)?;
    let Some(id) = id else { return Ok(StatusCode::NO_CONTENT) };
    match standing.find(&id).await? {
        Some(build) => take(&standing, &build, report).await,
        None => Ok(StatusCode::NO_CONTENT),
    }
}

fn report_of(standing: &Standing, told: Told) -> Result<Report, Problem> {
    let report = told.into_report(standing.shared.env.nature.now());
    report.map_err(|error| Problem::bad_request(error.to_string()))
}

async fn take(standing: &Arc<Standing>, build: &Arc<Build>, report: Report) -> Result<StatusCode, Problem> {
    standing.report(build, report).await?;
    Ok(StatusCode::ACCEPTED)
}
