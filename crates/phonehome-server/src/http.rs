//! The API over HTTP: what it consists of, and what every part of it shares.
//!
//! Handlers ask [`Standing`] and answer; they decide nothing. Errors are problem details (RFC 9457) throughout.

mod auth;
mod body;
mod builds;
mod health;
mod keeping;
mod metrics;
mod params;
mod problem;
mod reports;
mod tokens;

use std::sync::Arc;

use axum::{
    Router,
    middleware::from_fn_with_state,
    routing::{delete, get, post},
};

use self::problem::Problem;
use crate::serve::Standing;

/// Everything that is served beside the agents.
pub(crate) fn router(standing: Arc<Standing>) -> Router {
    let api = Router::new()
        .route("/builds", get(builds::list).post(builds::declare))
        .route("/builds/{id}", get(builds::show).delete(keeping::delete))
        .route("/builds/{id}/cancel", post(builds::cancel))
        .route("/builds/{id}/events", post(reports::report))
        .route("/builds/{id}/verify", post(keeping::check))
        .route("/builds/{id}/wait", get(builds::wait))
        .route("/events", post(reports::report_of_any))
        .route("/retention", post(keeping::retain))
        .route("/tokens", get(tokens::list).post(tokens::create))
        .route("/tokens/{id}", delete(tokens::revoke))
        .route("/version", get(health::version));
    Router::new()
        .nest("/api/v1", api)
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(metrics::metrics))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(standing.clone(), metrics::count))
        .with_state(standing)
}

async fn unknown_path() -> Problem {
    Problem::unknown_path()
}

async fn wrong_method() -> Problem {
    Problem::wrong_method()
}
