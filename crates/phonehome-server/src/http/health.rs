//! Whether the server lives, and whether it may be given work.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde_json::{Value, json};

use super::problem::Problem;
use crate::serve::Standing;

pub(crate) async fn alive() -> &'static str {
    "ok\n"
}

pub(crate) async fn ready(State(standing): State<Arc<Standing>>) -> Result<&'static str, Problem> {
    if standing.shared.draining.is_cancelled() {
        return Err(Problem::unavailable("the server is draining"));
    }
    standing.probe.check().await.map_err(Problem::unavailable)?;
    if standing.shared.store.is_full() {
        return Err(Problem::unavailable("no output is taken: there is no room left in the data directory"));
    }
    Ok("ok\n")
}

pub(crate) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION"), "subprotocols": ["phonehome.v1", "phonehome.v1.json"]}))
}
