//! Parameters of paths and queries: every one known, none twice unless it may be.

use std::{fmt::Display, str::FromStr};

use axum::extract::{FromRequestParts, Path, RawQuery};
use http::request::Parts;
use phonehome_proto::id::BuildId;

use super::problem::Problem;

/// The build that a path names. What cannot be a build's name is no build.
pub(crate) struct Named(pub(crate) BuildId);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let id = path.map_err(|_| Problem::not_found("the path is not valid"))?.0;
        id.parse().map(Self).map_err(|_| Problem::not_found("no build can have this name"))
    }
}

/// The parameters of a query, taken out one after the other.
pub(crate) struct Query(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Ok(RawQuery(query)) = RawQuery::from_request_parts(parts, state).await;
        let pairs = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(&parts.uri);
        match pairs {
            Ok(pairs) => Ok(Self(pairs.0)),
            Err(error) => Err(Problem::bad_request(format!("the query {:?}: {error}", query.unwrap_or_default()))),
        }
    }
}

/// Nothing behind the path: a parameter that is not understood may change what was meant, as `dry_run` would.
pub(crate) struct NoQuery;

impl<S: Send + Sync> FromRequestParts<S> for NoQuery {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        Query::from_request_parts(parts, state).await?.end().map(|()| Self)
    }
}

impl Query {
    /// Every value of a parameter.
    pub(crate) fn all(&mut self, name: &str) -> Vec<String> {
        let (taken, left) = std::mem::take(&mut self.0).into_iter().partition(|(key, _)| key == name);
        self.0 = left;
        taken.into_iter().map(|(_, value): (String, String)| value).collect()
    }

    /// The text of a parameter that may be given once.
    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>, Problem> {
        let mut values = self.all(name).into_iter();
        match (values.next(), values.next()) {
            (value, None) => Ok(value),
            (_, Some(_)) => Err(wrong(name, "it is given more than once")),
        }
    }

    /// The value of a parameter.
    pub(crate) fn value<T: FromStr<Err: Display>>(&mut self, name: &str) -> Result<Option<T>, Problem> {
        let text = self.text(name)?;
        text.map(|text| text.parse().map_err(|error: T::Err| wrong(name, &error.to_string()))).transpose()
    }

    /// A switch: `1`, `true` or nothing is on.
    pub(crate) fn switch(&mut self, name: &str) -> Result<bool, Problem> {
        match self.text(name)?.as_deref() {
            None | Some("0" | "false") => Ok(false),
            Some("" | "1" | "true") => Ok(true),
            Some(_) => Err(wrong(name, "it is true or false")),
        }
    }

    /// Nothing else may be there.
    pub(crate) fn end(self) -> Result<(), Problem> {
        match self.0.first() {
            Some((name, _)) => Err(wrong(name, "there is no such parameter")),
            None => Ok(()),
        }
    }
}

/// A parameter that makes no sense.
pub(crate) fn wrong(name: &str, why: &str) -> Problem {
    Problem::bad_request(format!("the parameter {name}: {why}")).at(name, why)
}
