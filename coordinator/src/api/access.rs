//! Who calls, and what that allows.

use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::Response;
use proto::failure::{Action, Code, Failure};

use super::types::Role;
use super::{ApiError, ApiResult, hex};
use crate::catalog::tokens;
use crate::core::Core;

/// Whoever calls.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// As it stands in `requested_by`.
    pub(crate) name: String,
    pub(crate) role: Role,
}

impl Caller {
    /// Refuses a caller that may not do what needs this role.
    pub(crate) fn needs(&self, role: Role) -> ApiResult<()> {
        if self.role >= role {
            return Ok(());
        }
        let text = format!("token {} has the role {:?}, this needs {role:?}", self.name, self.role);
        Err(Failure::new(Code::NotAllowed, Action::FixConfig, text.to_lowercase())
            .with_hint("Use a token with that role: pgmuster token new NAME --role ROLE, on the coordinator's machine, makes one.")
            .into())
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts
            .extensions
            .get::<Self>()
            .cloned()
            .ok_or_else(|| unauthorized("there is no token").into())
    }
}

/// Whoever may open the socket may do everything.
pub(crate) async fn over_socket(mut request: Request, next: Next) -> Response {
    request.extensions_mut().insert(Caller { name: "local".to_owned(), role: Role::Admin });
    next.run(request).await
}

/// Over TCP a token says who calls. Without one only what needs no caller is answered.
pub(crate) async fn over_tcp(
    State(core): State<Arc<Core>>,
    mut request: Request,
    next: Next,
) -> ApiResult<Response> {
    if let Some(header) = request.headers().get(AUTHORIZATION) {
        let token = header
            .to_str()
            .ok()
            .and_then(|text| text.strip_prefix("Bearer "))
            .ok_or_else(|| unauthorized("the Authorization header is not a bearer token"))?;
        let caller = caller_of(&core, token).await?;
        request.extensions_mut().insert(caller);
    }
    Ok(next.run(request).await)
}

async fn caller_of(core: &Core, token: &str) -> ApiResult<Caller> {
    let mut db = core.catalog.read().await?;
    let known = tokens::api(&mut db, &fingerprint(token)).await?;
    let known = known
        .filter(|known| known.expires_at_ms > core.now_ms())
        .ok_or_else(|| unauthorized("the token is unknown or has expired"))?;
    let role = role(&known.role).ok_or_else(|| unauthorized("the token's role is unknown"))?;
    Ok(Caller { name: known.name, role })
}

/// What is kept of a token. It is random and long, so that a plain hash tells nothing.
pub(crate) fn fingerprint(token: &str) -> String {
    hex(digest(&SHA256, token.as_bytes()).as_ref())
}

/// A role by its stored name.
pub(crate) fn role(name: &str) -> Option<Role> {
    serde_json::from_value(serde_json::Value::String(name.to_owned())).ok()
}

pub(crate) fn unauthorized(text: &str) -> Failure {
    Failure::new(Code::Unauthorized, Action::FixConfig, text).with_hint(
        "Make a token on the coordinator's machine: pgmuster token new NAME --role ROLE > FILE.",
    )
}
