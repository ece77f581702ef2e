//! The API over HTTP: what it consists of, and what every part of it shares.
//!
//! Handlers ask [`Standing`] and answer; they decide nothing. Errors are problem details (RFC 9457) throughout.

mod auth;
mod body;
mod builds;
mod feed;
mod health;
mod keeping;
mod live;
mod log;
mod metrics;
mod params;
mod problem;
pub(crate) mod readers;
mod reports;
mod tokens;
mod told;

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use http::{Method, header::CONTENT_TYPE};

use self::problem::Problem;
use crate::{origin, serve::Standing};

/// Everything that is served beside the agents.
pub(crate) fn router(standing: Arc<Standing>) -> Router {
    let api = Router::new()
        .route("/builds", get(builds::list).post(builds::declare))
        .route("/builds/{id}", get(builds::show).delete(keeping::delete))
        .route("/builds/{id}/cancel", post(builds::cancel))
        .route("/builds/{id}/events", get(live::events).post(reports::report))
        .route("/builds/{id}/log", get(log::log))
        .route("/builds/{id}/verify", post(keeping::check))
        .route("/builds/{id}/wait", get(builds::wait))
        .route("/events", post(reports::report_of_any))
        .route("/openapi.json", get(openapi))
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
        .layer(from_fn_with_state(standing.clone(), refuse_strange_pages))
        .layer(from_fn_with_state(standing.clone(), metrics::count))
        .with_state(standing)
}

/// What this API is, for programs.
const OPENAPI: &str = include_str!("../../../docs/openapi.json");

/// `GET openapi.json`.
async fn openapi() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], OPENAPI)
}

/// Pages of others change nothing here.
async fn refuse_strange_pages(
    State(standing): State<Arc<Standing>>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let only_reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if !only_reads && origin::is_foreign(request.headers(), standing.settings.advertise.as_deref()) {
        return Err(Problem::forbidden(origin::REFUSED));
    }
    Ok(next.run(request).await)
}

async fn unknown_path() -> Problem {
    Problem::unknown_path()
}

async fn wrong_method() -> Problem {
    Problem::wrong_method()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::OPENAPI;

    /// A router does not tell its routes, so its source does.
    #[test]
    fn what_is_described_is_what_is_served() {
        let (routes, _) = include_str!("http.rs").split_once("#[cfg(test)]").unwrap();
        let served: BTreeSet<_> = routes.split(".route(\"").skip(1).flat_map(operations).collect();
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let mut described = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys().filter(|key| METHODS.contains(&key.as_str())) {
                described.insert(format!("{method} {path}"));
            }
        }
        assert_eq!(served, described);
    }

    const METHODS: [&str; 4] = ["delete", "get", "post", "put"];

    /// The operations of one route: `/path", get(…).post(…))` and what follows.
    fn operations(route: &str) -> Vec<String> {
        let (path, rest) = route.split_once('"').unwrap();
        let (handlers, _) = rest.split_once('\n').unwrap();
        let prefix = if ["/healthz", "/metrics", "/readyz"].contains(&path) { "" } else { "/api/v1" };
        let methods = METHODS.iter().filter(|method| handlers.contains(&format!("{method}(")));
        methods.map(|method| format!("{method} {prefix}{path}")).collect()
    }
}
