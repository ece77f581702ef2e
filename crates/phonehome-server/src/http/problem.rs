//! Errors as problem details (RFC 9457).

use std::io;

use axum::response::{IntoResponse, Response};
use http::{
    HeaderValue, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde::Serialize;
use tracing::error;

use crate::serve::{DeclareError, ReportError};

/// An error as the client sees it.
#[derive(Debug, Serialize)]
pub(crate) struct Problem {
    /// Which kind of problem, for programs.
    r#type: &'static str,
    /// The kind for people.
    title: &'static str,
    #[serde(serialize_with = "as_number")]
    status: StatusCode,
    /// This one for people: what is wrong and what to do.
    detail: String,
    /// The members of the request that are wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<FieldError>,
    /// Seconds to wait before another try.
    #[serde(skip)]
    retry_after: Option<u64>,
}

/// What is wrong with one member or parameter.
#[derive(Debug, Serialize)]
pub(crate) struct FieldError {
    /// A parameter's name, or a JSON pointer into the body.
    pub(crate) at: String,
    pub(crate) detail: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde asks for")]
fn as_number<S: serde::Serializer>(status: &StatusCode, out: S) -> Result<S::Ok, S::Error> {
    out.serialize_u16(status.as_u16())
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $status:ident, $kind:literal, $title:literal;)*) => {$(
        $(#[$doc])*
        pub(crate) fn $name(detail: impl Into<String>) -> Self {
            Self::new(StatusCode::$status, concat!("urn:phonehome:problem:", $kind), $title, detail.into())
        }
    )*};
}

impl Problem {
    fn new(status: StatusCode, r#type: &'static str, title: &'static str, detail: String) -> Self {
        Self { r#type, title, status, detail, errors: Vec::new(), retry_after: None }
    }

    kinds! {
        /// Something about the request cannot be understood.
        bad_request = BAD_REQUEST, "bad-request", "The request cannot be understood";
        /// What is asked for is not possible as things are.
        conflict = CONFLICT, "conflict", "That is not possible as things are";
        /// The token is known and may not do this.
        forbidden = FORBIDDEN, "forbidden", "The token does not allow this";
        /// There was one, and it was removed.
        gone = GONE, "expired", "The build has expired";
        /// Nothing of that name.
        not_found = NOT_FOUND, "not-found", "There is no such thing";
        /// The body is longer than anything that makes sense here.
        too_large = PAYLOAD_TOO_LARGE, "too-large", "The body is too large";
        /// A limit is reached.
        too_many = TOO_MANY_REQUESTS, "too-many", "A limit is reached";
        /// The body did not come in time.
        too_slow = REQUEST_TIMEOUT, "too-slow", "The body did not come in time";
        /// The server cannot do it at this moment.
        unavailable = SERVICE_UNAVAILABLE, "unavailable", "Not at this moment";
        /// The range lies outside of what there is.
        unsatisfiable = RANGE_NOT_SATISFIABLE, "range", "The range is outside of the log";
        /// The body is not JSON.
        unsupported = UNSUPPORTED_MEDIA_TYPE, "media-type", "The body has the wrong type";
        /// A method that the path does not have.
        wrong_method_named = METHOD_NOT_ALLOWED, "method", "The method is not allowed here";
        unauthorized_because = UNAUTHORIZED, "unauthorized", "A token is required";
        failed_because = INTERNAL_SERVER_ERROR, "internal", "The server failed";
    }

    pub(crate) fn unknown_path() -> Self {
        Self::not_found("no such path; the API is described at /api/v1/openapi.json, agents connect to /v1/agent")
    }

    pub(crate) fn wrong_method() -> Self {
        Self::wrong_method_named("this path has other methods, see the Allow header")
    }

    pub(crate) fn unauthorized(detail: &str) -> Self {
        Self::unauthorized_because(detail)
    }

    pub(crate) fn no_build(id: &str) -> Self {
        Self::not_found(format!("there is no build {id}"))
    }

    /// A failure of the server, whose cause is for its own log.
    pub(crate) fn failed(cause: &io::Error) -> Self {
        error!("a request failed: {cause}");
        Self::failed_because("the server's log says why")
    }

    /// Names the parameter or member that is wrong.
    pub(crate) fn at(mut self, at: impl Into<String>, detail: impl Into<String>) -> Self {
        self.errors.push(FieldError { at: at.into(), detail: detail.into() });
        self
    }

    pub(crate) fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }
}

impl From<io::Error> for Problem {
    fn from(cause: io::Error) -> Self {
        Self::failed(&cause)
    }
}

impl From<DeclareError> for Problem {
    fn from(error: DeclareError) -> Self {
        match &error {
            DeclareError::Known(_) | DeclareError::SameToken => Self::conflict(error.to_string()),
            DeclareError::TooMany(_) => Self::too_many(error.to_string()).retry_after(10),
            DeclareError::Storage(cause) => Self::failed(cause),
        }
    }
}

impl From<ReportError> for Problem {
    fn from(error: ReportError) -> Self {
        match &error {
            ReportError::TooMany => Self::too_many(error.to_string()),
            ReportError::Storage(cause) => Self::failed(cause),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self).expect("a problem is plain data");
        let mut response = (self.status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
