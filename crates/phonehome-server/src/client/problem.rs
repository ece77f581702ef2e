//! Why a server said no, on one line.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, StatusCode, header::RETRY_AFTER};
use serde_json::Value;

use crate::words::OneLine;

/// An answer that is an error (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) status: StatusCode,
    title: String,
    detail: String,
    /// Fields and what is wrong with each.
    fields: Vec<(String, String)>,
    /// How long the server wants to be left alone.
    pub(crate) retry_after: Duration,
}

/// Longest Retry-After that is believed.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Field errors that are shown.
const MAX_FIELDS: usize = 10;

impl Problem {
    /// Reads problem details, or what a proxy in front wrote in their place.
    pub(crate) fn read(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Self {
        let retry_after = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(retry_after);
        let json: Option<Value> = serde_json::from_slice(body).ok();
        let text = |name: &str| json.as_ref().and_then(|json| json[name].as_str()).unwrap_or_default().to_owned();
        let is_text = json.is_none() && !body.trim_ascii_start().starts_with(b"<");
        Self {
            status,
            title: text("title"),
            detail: if is_text { String::from_utf8_lossy(body).into_owned() } else { text("detail") },
            fields: json.as_ref().and_then(|json| json["errors"].as_array()).map(|all| fields(all)).unwrap_or_default(),
            retry_after: retry_after.unwrap_or_default(),
        }
    }

    /// Whether the same request may be answered otherwise a little later.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(
            self.status,
            StatusCode::TOO_MANY_REQUESTS
                | StatusCode::INTERNAL_SERVER_ERROR
                | StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT
        )
    }

    /// Whether the server has certainly done nothing. What a proxy says of it, 502 or 504, does not say that.
    pub(crate) fn is_undone(&self) -> bool {
        matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
    }

    fn advice(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "; give a token in PHONEHOME_TOKEN or with --token-file",
            StatusCode::FORBIDDEN => "; the token may not do this",
            _ => "",
        }
    }
}

/// A field's name and its error, whatever the members are called.
fn fields(errors: &[Value]) -> Vec<(String, String)> {
    let member = |error: &Value, names: &[&str]| {
        names.iter().find_map(|name| error[*name].as_str()).unwrap_or_default().to_owned()
    };
    let read = |error: &Value| match error.as_str() {
        Some(text) => (String::new(), text.to_owned()),
        None => (member(error, &["at", "field", "pointer"]), member(error, &["detail", "message", "reason"])),
    };
    errors.iter().take(MAX_FIELDS).map(read).collect()
}

/// Seconds or a date (RFC 9110, section 10.2.3).
fn retry_after(text: &str) -> Option<Duration> {
    let wish = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).unwrap_or_default(),
    };
    Some(wish.min(MAX_RETRY_AFTER))
}

impl std::error::Error for Problem {}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let title =
            if self.title.is_empty() { self.status.canonical_reason().unwrap_or_default() } else { &self.title };
        write!(f, "the server answered {} {}", self.status.as_u16(), OneLine(title))?;
        if !self.detail.is_empty() && self.detail != self.title {
            write!(f, ": {}", OneLine(&self.detail))?;
        }
        for (at, (field, error)) in self.fields.iter().enumerate() {
            let colon = if field.is_empty() { "" } else { ": " };
            write!(f, "{}{}{colon}{}", if at == 0 { " (" } else { "; " }, OneLine(field), OneLine(error))?;
        }
        f.write_str(if self.fields.is_empty() { "" } else { ")" })?;
        f.write_str(self.advice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_one_line_with_its_fields() {
        let body = br#"{"type":"about:blank","title":"Bad request","status":400,"detail":"two fields are wrong\n",
            "errors":[{"at":"id","detail":"too long"},{"pointer":"/steps/0","message":"\u001b[2Jempty"}]}"#;
        let problem = Problem::read(StatusCode::BAD_REQUEST, &HeaderMap::new(), body);
        let expected = "the server answered 400 Bad request: two fields are wrong (id: too long; /steps/0: ?[2Jempty)";
        assert_eq!(problem.to_string(), expected);
        assert!(!problem.is_transient());
    }

    #[test]
    fn what_is_no_problem_document_is_shown_unless_it_is_a_page() {
        let told = |body: &[u8]| Problem::read(StatusCode::BAD_GATEWAY, &HeaderMap::new(), body).to_string();
        assert_eq!(told(b"upstream is gone\n"), "the server answered 502 Bad Gateway: upstream is gone");
        assert_eq!(told(b"<html>502</html>"), "the server answered 502 Bad Gateway");
        assert_eq!(told(b"[1]"), "the server answered 502 Bad Gateway");
    }

    #[test]
    fn a_missing_token_is_explained_and_a_wish_to_be_left_alone_bounded() {
        let told = Problem::read(StatusCode::UNAUTHORIZED, &HeaderMap::new(), b"").to_string();
        assert!(told.contains("PHONEHOME_TOKEN"), "{told}");
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, "86400".parse().unwrap());
        let busy = Problem::read(StatusCode::SERVICE_UNAVAILABLE, &headers, b"");
        assert!(busy.is_transient() && busy.retry_after == MAX_RETRY_AFTER);
        assert_eq!(retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        assert_eq!(retry_after("soon"), None);
    }
}
