//! What launchers and event exporters tell.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use phonehome_proto::id::BuildId;

use super::{auth::Caller, body::Json, params::Named, problem::Problem};
use crate::{report::Told, serve::Standing};

/// `POST builds/{id}/events`.
pub(crate) async fn report(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    Named(id): Named,
    Json(told): Json<Told>,
) -> Result<StatusCode, Problem> {
    caller.may_report(&id)?;
    take(&standing, &id, told).await
}

/// `POST events`: the object of the event says which build it belongs to. One that belongs to none is not kept.
pub(crate) async fn report_of_any(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    Json(told): Json<Told>,
) -> Result<StatusCode, Problem> {
    caller.may_launch()?;
    let Some(id) = told.build().and_then(|id| id.parse::<BuildId>().ok()) else { return Ok(StatusCode::NO_CONTENT) };
    match standing.find(&id).await? {
        Some(_) => take(&standing, &id, told).await,
        None => Ok(StatusCode::NO_CONTENT),
    }
}

async fn take(standing: &Standing, id: &BuildId, told: Told) -> Result<StatusCode, Problem> {
    let build = standing.known(id).await?;
    let report = told.into_report(standing.shared.env.nature.now());
    let report = report.map_err(|error| Problem::bad_request(error.to_string()))?;
    standing.report(&build, report).await?;
    Ok(StatusCode::ACCEPTED)
}
