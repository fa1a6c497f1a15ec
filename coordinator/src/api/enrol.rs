//! Tokens and certificates: how a worker becomes one of ours, and how a remote caller is let in.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use proto::envelope::{Certificate, PublicKey, Signed};
use proto::failure::{Action, Code, Failure};
use proto::{SiteName, WorkerName};

use super::access::{fingerprint, role, unauthorized};
use super::types::{
    EnrolRequest, EnrolResponse, EnrolmentTokenRequest, Role, TokenRequest, TokenResponse,
    TokenView,
};
use super::{ApiError, ApiResult};
use crate::catalog::events::{self, Event};
use crate::catalog::tokens::{self, ApiToken, EnrolmentToken};
use crate::catalog::workers::{self, Worker};
use crate::chance;
use crate::core::Core;
use crate::error::Error;

const HOUR_MS: u64 = 3_600_000;
/// An enrolment token that nobody asked to last longer.
const ENROLMENT_MS: u64 = HOUR_MS;
/// The longest life of an enrolment token.
const ENROLMENT_MAX_MS: u64 = 7 * 24 * HOUR_MS;
/// An API token that nobody asked to last longer.
const API_MS: u64 = 90 * 24 * HOUR_MS;
/// The longest life of an API token.
const API_MAX_MS: u64 = 366 * 24 * HOUR_MS;

/// "This key is this worker's", signed.
pub(crate) fn certificate(
    core: &Core,
    worker: &WorkerName,
    site: &SiteName,
    key: PublicKey,
    issued_at_ms: i64,
) -> Signed<Certificate> {
    core.key.sign(&Certificate { worker: worker.clone(), site: site.clone(), key, issued_at_ms })
}

/// 256 random bits behind a prefix that scanners for leaked secrets recognise.
fn fresh(prefix: &str) -> String {
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode(chance::bytes::<32>()))
}

fn valid(asked_ms: Option<u64>, usual_ms: u64, max_ms: u64) -> ApiResult<i64> {
    let ms = asked_ms.unwrap_or(usual_ms);
    if ms == 0 || ms > max_ms {
        return Err(ApiError::invalid(format!(
            "valid_ms must be more than 0 and at most {max_ms}"
        )));
    }
    Ok(i64::try_from(ms).unwrap_or(i64::MAX))
}

/// Makes a token that enrols one worker, once.
pub(crate) async fn enrolment_token(
    core: &Core,
    request: &EnrolmentTokenRequest,
) -> ApiResult<TokenResponse> {
    let now_ms = core.now_ms();
    let expires_at_ms = now_ms + valid(request.valid_ms, ENROLMENT_MS, ENROLMENT_MAX_MS)?;
    let token = fresh("pgmuster_enrol_");
    let row = EnrolmentToken {
        digest: fingerprint(&token),
        worker: request.worker.clone(),
        site: request.site.clone(),
        created_at_ms: now_ms,
        expires_at_ms,
        used_key: None,
        used_at_ms: None,
    };
    let row = &row;
    core.catalog
        .transact("enrolment_token", move |tx| Box::pin(tokens::put_enrolment(tx, row)))
        .await?;
    Ok(TokenResponse { token, expires_at_ms })
}

/// Certifies a worker that shows its one-time token. The same worker may ask again with the same key, because an
/// answer can get lost; nobody can use the token for another key.
pub(crate) async fn enrol(core: &Core, request: &EnrolRequest) -> ApiResult<EnrolResponse> {
    let now_ms = core.now_ms();
    let digest = fingerprint(&request.token);
    let digest = digest.as_str();
    let key = request.public_key;
    let (certificate, issued_at_ms) = core
        .catalog
        .transact("enrol", move |tx| {
            Box::pin(async move {
                let Some(token) = tokens::enrolment(tx, digest).await? else {
                    let whose = request.worker.as_ref().zip(request.site.as_ref());
                    let failure = enrolment_refused("the enrolment token is unknown", whose);
                    return Err(Error::Refused(failure));
                };
                let refused = |text: &str| {
                    let whose = Some((&token.worker, &token.site));
                    Err(Error::Refused(enrolment_refused(text, whose)))
                };
                if let Some(used) = &token.used_key
                    && *used != key.to_string()
                {
                    let when = token.used_at_ms.map_or_else(String::new, at);
                    return refused(&format!(
                        "the enrolment token was used{when} by worker {} of site {}, with another key; each enrolls once",
                        token.worker, token.site
                    ));
                }
                if token.expires_at_ms <= now_ms {
                    let when = at(token.expires_at_ms);
                    return refused(&format!("the enrolment token has expired{when}"));
                }
                let is_it = request.worker.as_ref().is_none_or(|name| *name == token.worker)
                    && request.site.as_ref().is_none_or(|site| *site == token.site);
                if !is_it {
                    return refused(&format!(
                        "the enrolment token is for worker {} of site {}",
                        token.worker, token.site
                    ));
                }
                tokens::use_enrolment(tx, digest, &key.to_string(), now_ms).await?;
                let known = workers::get(tx.db(), &token.worker).await?;
                // Newer than the one before, also after this machine's clock went back.
                let issued_at_ms =
                    known.as_ref().map_or(now_ms, |known| now_ms.max(known.issued_at_ms + 1));
                let signed = certificate(core, &token.worker, &token.site, key, issued_at_ms);
                let issued = signed.verify(&core.public_key).map_err(|_| {
                    Error::Refused(Failure::bug("a certificate just signed did not verify"))
                })?;
                let mut worker = known.unwrap_or_else(|| Worker::of_certificate(&issued));
                worker.accept(&issued);
                workers::put(tx, &worker).await?;
                let event = Event {
                    at_ms: now_ms,
                    name: "worker_enrolled".to_owned(),
                    worker: Some(token.worker.to_string()),
                    message: format!(
                        "worker {} of site {} was enrolled with key {key}",
                        token.worker, token.site
                    ),
                    ..Event::default()
                };
                events::add(tx, &event).await?;
                Ok((signed, issued_at_ms))
            })
        })
        .await?;
    core.issued_by(issued_at_ms);
    Ok(EnrolResponse { certificate, coordinator_key: core.public_key })
}

/// Why a worker is not enrolled, and how it gets a token that does it.
fn enrolment_refused(text: &str, whose: Option<(&WorkerName, &SiteName)>) -> Failure {
    let make = match whose {
        Some((worker, site)) => format!("pgmuster worker token {worker} {site}"),
        None => {
            "NAME and SITE are those of the worker's configuration: pgmuster worker token NAME SITE"
                .to_owned()
        }
    };
    let mut failure = unauthorized(text);
    failure.hint = format!("{make}, on the coordinator's machine, makes a new one.");
    failure
}

/// ` at` a moment.
fn at(at_ms: i64) -> String {
    let at = jiff::Timestamp::from_millisecond(at_ms.div_euclid(1_000) * 1_000);
    at.map_or_else(|_| String::new(), |at| format!(" at {at}"))
}

/// Makes a token for the API.
pub(crate) async fn api_token(core: &Core, request: &TokenRequest) -> ApiResult<TokenResponse> {
    let now_ms = core.now_ms();
    let expires_at_ms = now_ms + valid(request.valid_ms, API_MS, API_MAX_MS)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    if request.name.is_empty() || request.name.len() > 63 || !request.name.chars().all(plain) {
        return Err(ApiError::invalid(
            "a token's name has 1 to 63 characters of A-Z, a-z, 0-9 and -_.@",
        ));
    }
    if request.name == "local" || request.name == "reaper" {
        return Err(ApiError::invalid(format!("{} is the coordinator's own name", request.name)));
    }
    let token = fresh("pgmuster_api_");
    let row = ApiToken {
        digest: fingerprint(&token),
        name: request.name.clone(),
        role: role_name(request.role).to_owned(),
        created_at_ms: now_ms,
        expires_at_ms,
    };
    let row = &row;
    let written =
        core.catalog.transact("api_token", move |tx| Box::pin(tokens::put_api(tx, row))).await?;
    if !written {
        let text = format!("there is a token {} already", request.name);
        return Err(Failure::new(Code::StateConflict, Action::Abandon, text)
            .with_hint("Choose another name, or remove that one first: pgmuster token remove NAME.")
            .into());
    }
    Ok(TokenResponse { token, expires_at_ms })
}

/// The tokens of the API, without what is secret.
pub(crate) async fn api_tokens(core: &Core) -> ApiResult<Vec<TokenView>> {
    let mut db = core.catalog.read().await?;
    let all = tokens::list_api(&mut db).await?;
    Ok(all
        .into_iter()
        .map(|token| TokenView {
            role: role(&token.role).unwrap_or(Role::Viewer),
            name: token.name,
            created_at_ms: token.created_at_ms,
            expires_at_ms: token.expires_at_ms,
        })
        .collect())
}

/// Removes a token at once.
pub(crate) async fn remove_api_token(core: &Core, name: &str) -> ApiResult<()> {
    let removed = core
        .catalog
        .transact("remove_api_token", move |tx| Box::pin(tokens::remove_api(tx, name)))
        .await?;
    if removed { Ok(()) } else { Err(ApiError::invalid(format!("there is no token {name}"))) }
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Viewer => "viewer",
        Role::Operator => "operator",
        Role::Admin => "admin",
    }
}
