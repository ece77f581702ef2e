//! Everything about a build as server-sent events: its log from the beginning, or from where a reader was cut off, and
//! what comes, to the verdict.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{CACHE_CONTROL, CONTENT_TYPE},
};

use super::{
    auth::Caller,
    feed::{self, Form, Seat, Wanted},
    params::{Named, Query, wrong},
    problem::Problem,
};
use crate::{
    builds::{Order, Streams, View},
    serve::Standing,
};

/// What a browser sends when it comes again after a cut.
const LAST_EVENT_ID: &str = "last-event-id";

/// `GET builds/{id}/events`.
pub(crate) async fn events(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    Named(id): Named,
    mut query: Query,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    caller.may_read()?;
    let asked = query.text("cursor")?;
    query.end()?;
    let build = standing.known(&id).await?;
    let given = headers.get(LAST_EVENT_ID).map(|value| value.to_str().unwrap_or_default().to_owned());
    let name = if given.is_some() { "Last-Event-ID" } else { "cursor" };
    let from = match given.filter(|id| !id.is_empty()).or(asked) {
        Some(text) => build.cursor(&text).map_err(|error| wrong(name, &error.to_string()))?,
        None => build.start(),
    };
    if from.ended && build.known_verdict().is_some() {
        return Ok(StatusCode::NO_CONTENT.into_response()); // whoever was told the end need not come again
    }
    let view = View { order: Order::Time, streams: Streams::All, from, until: None };
    let wanted = Wanted { build, view, starts: BTreeMap::new(), form: Form::Sse, follow: true };
    let mut response = feed::body(wanted, seat(&standing)?).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no")); // nginx would hold events back
    Ok(response)
}

/// A place for one more reader.
pub(super) fn seat(standing: &Standing) -> Result<Seat, Problem> {
    let shared = &standing.shared;
    if shared.shutdown.is_cancelled() {
        return Err(Problem::unavailable("the server shuts down").retry_after(1));
    }
    let place = standing.readers.place();
    let place =
        place.ok_or_else(|| Problem::unavailable("as many read logs as may; try again later").retry_after(5))?;
    let (env, readers, shutdown) = (shared.env.clone(), standing.readers.clone(), shared.shutdown.clone());
    Ok(Seat { env, readers, _place: place, shutdown })
}
