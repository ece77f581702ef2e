//! JSON bodies: bounded in size and time, and understood in full.

use std::time::Duration;

use axum::{
    body::Bytes,
    extract::{FromRequest, Request},
    response::{IntoResponse, Response},
};
use http::{StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::time::timeout;

use super::problem::Problem;

/// A request's body. An empty one is `{}`.
pub(crate) struct Json<T>(pub(crate) T);

/// No body, or an empty object.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Nothing {}

/// Longest body, bytes: a thousand labels fit.
const MAX_BODY: usize = 256 * 1024;

/// How long a body may take.
const PATIENCE: Duration = Duration::from_secs(10);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let is_json = is_json(&request);
        let body = read(request).await?;
        if !body.is_empty() && !is_json {
            return Err(Problem::unsupported("send Content-Type: application/json"));
        }
        let text: &[u8] = if body.is_empty() { b"{}" } else { &body };
        if !text.trim_ascii_start().starts_with(b"{") {
            return Err(Problem::bad_request("the body must be a JSON object")); // a list would fill the members in order
        }
        serde_json::from_slice(text)
            .map(Self)
            .map_err(|error| Problem::bad_request(format!("the body is not what is expected here: {error}")))
    }
}

fn is_json(request: &Request) -> bool {
    let given = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = given.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

async fn read(request: Request) -> Result<Bytes, Problem> {
    let collected = timeout(PATIENCE, Limited::new(request.into_body(), MAX_BODY).collect()).await;
    match collected {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err(Problem::too_large(format!("a body has at most {MAX_BODY} bytes")))
        }
        Ok(Err(_)) => Err(Problem::bad_request("the body broke off")),
        Err(_) => Err(Problem::too_slow(format!("a body must be sent within {} s", PATIENCE.as_secs()))),
    }
}

/// A JSON answer.
pub(crate) struct Answer<T>(pub(crate) StatusCode, pub(crate) T);

impl<T: serde::Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.1) {
            Ok(text) => (self.0, [(CONTENT_TYPE, "application/json")], text).into_response(),
            Err(error) => Problem::failed(&error.into()).into_response(),
        }
    }
}
