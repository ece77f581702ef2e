//! Tokens of people and tools, for administrators.

use std::{sync::Arc, time::Duration};

use axum::extract::{Path, State};
use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::{
    auth::Caller,
    body::{Answer, Json, Nothing},
    params::NoQuery,
    problem::Problem,
};
use crate::{
    serve::Standing,
    tokens::{NewToken, Scope, TokenError, TokenInfo, Tokens},
};

/// A token that is asked for.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wanted {
    name: String,
    scope: Scope,
    /// Seconds, or a time such as `24h`.
    expires_in: Option<Lifetime>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Lifetime {
    Seconds(f64),
    Text(String),
}

/// All that may be known of tokens.
#[derive(Serialize)]
pub(crate) struct List {
    tokens: Vec<TokenInfo>,
}

/// A new token, with its text: the only time that it is told.
#[derive(Serialize)]
pub(crate) struct Made {
    token: String,
    #[serde(flatten)]
    info: TokenInfo,
}

/// `GET tokens`.
pub(crate) async fn list(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    _: NoQuery,
) -> Result<Answer<List>, Problem> {
    caller.may_administer()?;
    Ok(Answer(StatusCode::OK, List { tokens: standing.tokens.list() }))
}

/// `POST tokens`.
pub(crate) async fn create(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    _: NoQuery,
    Json(wanted): Json<Wanted>,
) -> Result<Answer<Made>, Problem> {
    caller.may_administer()?;
    let expires_in = wanted.expires_in.map(Lifetime::checked).transpose()?;
    let made = aside(&standing, move |tokens| tokens.create(&wanted.name, wanted.scope, expires_in)).await?;
    let NewToken { info, secret } = made;
    Ok(Answer(StatusCode::CREATED, Made { token: secret.expose().to_owned(), info }))
}

/// `DELETE tokens/{id}`.
pub(crate) async fn revoke(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    Path(id): Path<String>,
    _: NoQuery,
    Json(Nothing {}): Json<Nothing>,
) -> Result<StatusCode, Problem> {
    caller.may_administer()?;
    aside(&standing, move |tokens| tokens.revoke(&id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Does what waits for the disk where that is done.
async fn aside<T: Send + 'static>(
    standing: &Arc<Standing>,
    work: impl FnOnce(&Tokens) -> Result<T, TokenError> + Send + 'static,
) -> Result<T, Problem> {
    let worker = standing.clone();
    Ok(standing.shared.env.blocking(move || work(&worker.tokens)).await?)
}

/// What a token may be good for. Who wants more says nothing.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(3_155_760_000);

impl Lifetime {
    fn checked(self) -> Result<Duration, Problem> {
        let time = match self {
            Self::Seconds(seconds) => Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string()),
            Self::Text(text) => humantime::parse_duration(&text).map_err(|error| error.to_string()),
        };
        let time = time.and_then(|time| match time {
            time if (SHORTEST..=LONGEST).contains(&time) => Ok(time),
            _ => Err("a token is good for a second to a hundred years".to_owned()),
        });
        time.map_err(|why| Problem::bad_request("the token cannot be made").at("/expires_in", why))
    }
}

impl From<TokenError> for Problem {
    fn from(error: TokenError) -> Self {
        match error {
            TokenError::Unknown(_) => Self::not_found(error.to_string()),
            TokenError::Given(_) => Self::conflict(error.to_string()),
            TokenError::TooMany => Self::too_many(error.to_string()),
            TokenError::Unfit(_) => Self::bad_request(error.to_string()),
            TokenError::UnfitName => Self::bad_request("the token cannot be made").at("/name", error.to_string()),
            TokenError::Damaged { .. } | TokenError::Random(_) | TokenError::Storage(..) => {
                Self::failed(&std::io::Error::other(error))
            }
        }
    }
}
