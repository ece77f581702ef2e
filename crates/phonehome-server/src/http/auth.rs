//! Who asks, and whether they may.

use std::sync::Arc;

use axum::extract::{FromRef, FromRequestParts};
use http::{header::AUTHORIZATION, request::Parts};
use phonehome_proto::id::BuildId;

use super::problem::Problem;
use crate::{
    serve::{Access, Standing},
    strangers::Stranger,
    tokens::{Action, Scope},
};

/// A caller whose token is known.
pub(crate) struct Caller(Access);

impl Caller {
    /// Lets everybody pass who may read builds.
    pub(crate) fn may_read(&self) -> Result<(), Problem> {
        self.may(Action::Read)
    }

    /// Lets everybody pass who may start and stop builds.
    pub(crate) fn may_launch(&self) -> Result<(), Problem> {
        self.may(Action::Launch)
    }

    /// Lets everybody pass who may tell about a build.
    pub(crate) fn may_report(&self, build: &BuildId) -> Result<(), Problem> {
        match &self.0 {
            Access::Build(own) if own == build => Ok(()),
            Access::Build(_) => Err(refused("the token is for another build")),
            Access::Admin | Access::Launch | Access::Read => self.may_launch(),
        }
    }

    /// Lets everybody pass who may tell about a build that has ended, which its own token may not.
    pub(crate) fn may_report_late(&self) -> Result<(), Problem> {
        match &self.0 {
            Access::Build(_) => Err(refused("the build has ended, and its token opens nothing any more")),
            Access::Admin | Access::Launch | Access::Read => self.may_launch(),
        }
    }

    /// Lets those pass who may do everything.
    pub(crate) fn may_administer(&self) -> Result<(), Problem> {
        self.may(Action::Administer)
    }

    fn may(&self, action: Action) -> Result<(), Problem> {
        let scope = match &self.0 {
            Access::Admin => Scope::Admin,
            Access::Launch => Scope::Launch,
            Access::Read => Scope::Read,
            Access::Build(_) => return Err(refused("a build's own token is for its agents and for reports on it")),
        };
        match action {
            _ if scope.allows(action) => Ok(()),
            Action::Administer => Err(refused("this needs an admin token")),
            Action::Launch | Action::Read => Err(refused("a read token only reads")),
        }
    }
}

fn refused(why: &str) -> Problem {
    Problem::forbidden(why)
}

impl<S: Send + Sync> FromRequestParts<S> for Caller
where
    Arc<Standing>: FromRef<S>,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let standing = Arc::<Standing>::from_ref(state);
        let mut given = parts.headers.get_all(AUTHORIZATION).iter();
        let header = given.next().ok_or_else(|| Problem::unauthorized("send Authorization: Bearer TOKEN"))?;
        if given.next().is_some() {
            return Err(Problem::unauthorized("more than one Authorization header"));
        }
        let (scheme, token) = header.to_str().ok().and_then(|value| value.split_once(' ')).unwrap_or_default();
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Problem::unauthorized("send Authorization: Bearer TOKEN"));
        }
        match standing.access(token.trim()).await? {
            Some(access) => {
                let stranger = parts.extensions.get::<Option<Arc<Stranger>>>().and_then(Option::as_deref);
                stranger.into_iter().for_each(Stranger::become_known);
                Ok(Self(access))
            }
            None => Err(Problem::unauthorized("the token is not known here, or was revoked")),
        }
    }
}
