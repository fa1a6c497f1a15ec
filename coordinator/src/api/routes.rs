//! The routes. `GET` needs a viewer, what orders or stops jobs an operator, the rest an admin; `/healthz` and
//! enrolling need no caller.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, RawQuery, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use proto::{ClusterName, JobId};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout_at};

use super::access::Caller;
use super::types::{
    BackupView, ClusterView, EnrolResponse, EventView, HealthView, JobList, JobQuery, JobView,
    ProofView, Role, StatusView, TokenResponse, TokenView, TraceView, WaitQuery, WorkerView,
};
use super::{ApiError, ApiResult, enrol, view};
use crate::catalog::{attempts, backups, clusters, events, jobs, workers};
use crate::core::Core;
use crate::fleet;
use crate::order::{self, cluster_unknown, job_unknown};

/// The largest request body, bytes.
const BODY_MAX_BYTES: usize = 1 << 20;
/// The longest wait of a long poll, seconds.
const WAIT_MAX_S: u32 = 60;
/// How often a waiting request looks by itself: another coordinator may have written.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Whoever asks for our health gives up after a few seconds: a catalog that has not answered by then is not well.
const HEALTH_MAX: Duration = Duration::from_secs(2);
/// Rows in a list.
const LIMIT: u32 = 100;
/// The most rows in a list.
const LIMIT_MAX: u32 = 1_000;

type Shared = State<Arc<Core>>;

/// All routes; who calls is decided by the layer around them.
pub(crate) fn router() -> Router<Arc<Core>> {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .route("/v1/status", get(status))
        .route("/v1/clusters", get(list_clusters))
        .route("/v1/clusters/{name}", get(cluster))
        .route("/v1/clusters/{name}/pause", post(pause))
        .route("/v1/clusters/{name}/resume", post(resume))
        .route("/v1/clusters/{name}/adopt", post(adopt))
        .route("/v1/jobs", get(list_jobs).post(submit))
        .route("/v1/jobs/{id}", get(job))
        .route("/v1/jobs/{id}/trace", get(trace))
        .route("/v1/jobs/{id}/cancel", post(cancel))
        .route("/v1/jobs/{id}/retry", post(retry))
        .route("/v1/backups", get(list_backups))
        .route("/v1/proofs", get(list_proofs))
        .route("/v1/workers", get(list_workers))
        .route("/v1/workers/tokens", post(enrolment_token))
        .route("/v1/workers/enrol", post(enrol_worker))
        .route("/v1/tokens", get(list_tokens).post(create_token))
        .route("/v1/tokens/{name}", delete(remove_token))
        .route("/v1/events", get(list_events))
        .fallback(async || ApiError::invalid("there is no such route"))
        .method_not_allowed_fallback(async || ApiError::invalid("this route has no such method"))
        .layer(DefaultBodyLimit::max(BODY_MAX_BYTES))
}

fn parse_body<T: DeserializeOwned>(body: &Bytes) -> ApiResult<T> {
    serde_json::from_slice(body)
        .map_err(|error| ApiError::invalid(format!("the request's body: {error}")))
}

fn parse_query<T: DeserializeOwned>(RawQuery(query): RawQuery) -> ApiResult<T> {
    let uri = format!("/?{}", query.unwrap_or_default());
    let uri = uri.parse().map_err(|_| ApiError::invalid("the query is not a query"))?;
    axum::extract::Query::try_from_uri(&uri)
        .map(|query| query.0)
        .map_err(|error| ApiError::invalid(format!("the query: {}", error.body_text())))
}

fn parse_path<T>(text: &str) -> ApiResult<T>
where
    T: FromStr,
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error: T::Err| ApiError::invalid(format!("the path: failed to {error}")))
}

fn limit(asked: Option<u32>) -> ApiResult<i64> {
    match asked.unwrap_or(LIMIT) {
        n @ 1..=LIMIT_MAX => Ok(i64::from(n)),
        n => Err(ApiError::invalid(format!("limit is {n}, 1 to {LIMIT_MAX} is possible"))),
    }
}

async fn healthz(State(core): Shared) -> Response {
    let catalog = async {
        let mut db = core.catalog.read().await?;
        clusters::list(&mut db).await
    };
    let catalog = tokio::time::timeout(HEALTH_MAX, catalog).await;
    let health = HealthView {
        catalog: catalog.is_ok_and(|answer| answer.is_ok()),
        broker: core.broker_up(),
        leader: core.epoch().is_some(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        public_key: core.public_key,
    };
    let ok = health.catalog && health.broker;
    let code = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(health)).into_response()
}

async fn metrics(State(core): Shared, caller: Caller) -> ApiResult<Response> {
    caller.needs(Role::Viewer)?;
    let moment = fleet::moment(&core).await?;
    let page = core
        .metrics
        .page(&moment)
        .map_err(|_| ApiError(proto::Failure::bug("a metric could not be written")))?;
    Ok(([(header::CONTENT_TYPE, telemetry::metrics::CONTENT_TYPE)], page).into_response())
}

async fn status(State(core): Shared, caller: Caller) -> ApiResult<Json<StatusView>> {
    caller.needs(Role::Viewer)?;
    Ok(Json(fleet::status(&core).await?))
}

async fn list_clusters(State(core): Shared, caller: Caller) -> ApiResult<Json<Vec<ClusterView>>> {
    caller.needs(Role::Viewer)?;
    Ok(Json(fleet::status(&core).await?.clusters))
}

async fn cluster(
    State(core): Shared,
    caller: Caller,
    Path(name): Path<String>,
) -> ApiResult<Json<ClusterView>> {
    caller.needs(Role::Viewer)?;
    let name: ClusterName = parse_path(&name)?;
    if let Some(view) = fleet::cluster(&core, &name).await? {
        return Ok(Json(view));
    }
    let known = clusters::list(&mut *core.catalog.read().await?).await?;
    Err(cluster_unknown(&name, &known).into())
}

/// What an admin may change of a cluster.
#[derive(Debug, Clone, Copy)]
enum Change {
    Pause,
    Resume,
    Adopt,
}

async fn change(
    core: &Core,
    caller: &Caller,
    name: &str,
    change: Change,
) -> ApiResult<Json<ClusterView>> {
    caller.needs(Role::Admin)?;
    let name: ClusterName = parse_path(name)?;
    let target = &name;
    core.catalog
        .transact("change_cluster", move |tx| {
            Box::pin(async move {
                if clusters::get(tx.db(), target).await?.is_none() {
                    let known = clusters::list(tx.db()).await?;
                    return Err(cluster_unknown(target, &known).into());
                }
                match change {
                    Change::Pause => clusters::pause(tx, target, true).await,
                    Change::Resume => clusters::pause(tx, target, false).await,
                    Change::Adopt => clusters::adopt(tx, target).await,
                }
            })
        })
        .await?;
    order::wake(core).await;
    let view = fleet::cluster(core, &name).await?.ok_or_else(|| cluster_unknown(&name, &[]))?;
    Ok(Json(view))
}

async fn pause(
    State(core): Shared,
    caller: Caller,
    Path(name): Path<String>,
) -> ApiResult<Json<ClusterView>> {
    change(&core, &caller, &name, Change::Pause).await
}

async fn resume(
    State(core): Shared,
    caller: Caller,
    Path(name): Path<String>,
) -> ApiResult<Json<ClusterView>> {
    change(&core, &caller, &name, Change::Resume).await
}

async fn adopt(
    State(core): Shared,
    caller: Caller,
    Path(name): Path<String>,
) -> ApiResult<Json<ClusterView>> {
    change(&core, &caller, &name, Change::Adopt).await
}

async fn submit(
    State(core): Shared,
    caller: Caller,
    headers: HeaderMap,
    body: Bytes,
) -> ApiResult<(StatusCode, Json<JobView>)> {
    caller.needs(Role::Operator)?;
    let request = parse_body(&body)?;
    let key = headers
        .get("idempotency-key")
        .map(|value| {
            value.to_str().map_err(|_| ApiError::invalid("the idempotency key is not ASCII"))
        })
        .transpose()?;
    let (job, fresh) = order::submit(&core, &request, key, &caller.name).await?;
    let code = if fresh { StatusCode::CREATED } else { StatusCode::OK };
    Ok((code, Json(shown(&core, job).await?)))
}

async fn shown(core: &Core, job: jobs::Job) -> ApiResult<JobView> {
    let mut db = core.catalog.read().await?;
    Ok(view::job(&mut db, job).await?)
}

async fn list_jobs(
    State(core): Shared,
    caller: Caller,
    query: RawQuery,
) -> ApiResult<Json<JobList>> {
    caller.needs(Role::Viewer)?;
    let query: JobQuery = parse_query(query)?;
    let filter = jobs::Filter {
        cluster: query.cluster.map(|cluster| cluster.to_string()),
        kind: query.kind.map(|kind| kind.to_string()),
        state: query.state.map(|state| state.to_string()),
        before: query.before,
        limit: limit(query.limit)?,
    };
    let mut db = core.catalog.read().await?;
    let mut list = Vec::new();
    for job in jobs::list(&mut db, &filter).await? {
        list.push(view::job(&mut db, job).await?);
    }
    Ok(Json(JobList { jobs: list }))
}

async fn job(
    State(core): Shared,
    caller: Caller,
    Path(id): Path<String>,
    query: RawQuery,
) -> ApiResult<Json<JobView>> {
    caller.needs(Role::Viewer)?;
    let id: JobId = parse_path(&id)?;
    let query: WaitQuery = parse_query(query)?;
    let wait_s = query.wait_s.unwrap_or(0);
    if wait_s > WAIT_MAX_S {
        return Err(ApiError::invalid(format!(
            "wait_s is {wait_s}, at most {WAIT_MAX_S} is possible"
        )));
    }
    let until = Instant::now() + Duration::from_secs(u64::from(wait_s));
    let mut changes = core.job_changes();
    loop {
        // Subscribed before looking: a change in between is seen.
        changes.mark_unchanged();
        let found = {
            let mut db = core.catalog.read().await?;
            match jobs::get(&mut db, id).await? {
                Some(job) => view::job(&mut db, job).await?,
                None => return Err(job_unknown(id).into()),
            }
        };
        let news = query.after_version.is_none_or(|version| found.version > version);
        if news || Instant::now() >= until || core.stop.is_cancelled() {
            return Ok(Json(found));
        }
        let next = until.min(Instant::now() + LOOK_EVERY);
        tokio::select! {
            _ = timeout_at(next, changes.changed()) => {}
            () = core.stop.cancelled() => {}
        }
    }
}

async fn trace(
    State(core): Shared,
    caller: Caller,
    Path(id): Path<String>,
) -> ApiResult<Json<TraceView>> {
    caller.needs(Role::Viewer)?;
    let id: JobId = parse_path(&id)?;
    Ok(Json(view::trace(&core, id).await?.ok_or_else(|| job_unknown(id))?))
}

async fn cancel(
    State(core): Shared,
    caller: Caller,
    Path(id): Path<String>,
) -> ApiResult<Json<JobView>> {
    caller.needs(Role::Operator)?;
    let job = order::cancel(&core, parse_path(&id)?, &caller.name).await?;
    Ok(Json(shown(&core, job).await?))
}

async fn retry(
    State(core): Shared,
    caller: Caller,
    Path(id): Path<String>,
) -> ApiResult<(StatusCode, Json<JobView>)> {
    caller.needs(Role::Operator)?;
    let job = order::retry(&core, parse_path(&id)?, &caller.name).await?;
    Ok((StatusCode::CREATED, Json(shown(&core, job).await?)))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ListQuery {
    cluster: Option<ClusterName>,
    backup: Option<proto::BackupId>,
    limit: Option<u32>,
}

impl ListQuery {
    fn cluster(&self) -> String {
        self.cluster.as_ref().map(ToString::to_string).unwrap_or_default()
    }
}

async fn list_backups(
    State(core): Shared,
    caller: Caller,
    query: RawQuery,
) -> ApiResult<Json<Vec<BackupView>>> {
    caller.needs(Role::Viewer)?;
    let query: ListQuery = parse_query(query)?;
    let mut db = core.catalog.read().await?;
    let mut list = Vec::new();
    for backup in backups::list(&mut db, &query.cluster(), limit(query.limit)?).await? {
        if query.backup.is_some_and(|id| id != backup.id) {
            continue;
        }
        let proofs = backups::telling_proofs(&mut db, backup.id).await?;
        list.push(fleet::backup_view(backup, &proofs));
    }
    Ok(Json(list))
}

async fn list_proofs(
    State(core): Shared,
    caller: Caller,
    query: RawQuery,
) -> ApiResult<Json<Vec<ProofView>>> {
    caller.needs(Role::Viewer)?;
    let query: ListQuery = parse_query(query)?;
    let backup = query.backup.map(|id| id.to_string()).unwrap_or_default();
    let mut db = core.catalog.read().await?;
    let rows =
        backups::list_proofs(&mut db, &query.cluster(), &backup, limit(query.limit)?).await?;
    Ok(Json(rows.into_iter().map(fleet::proof_view).collect()))
}

async fn list_workers(State(core): Shared, caller: Caller) -> ApiResult<Json<Vec<WorkerView>>> {
    caller.needs(Role::Viewer)?;
    let mut db = core.catalog.read().await?;
    let granted = attempts::granted(&mut db).await?;
    let all = workers::list(&mut db).await?;
    let now_ms = core.now_ms();
    Ok(Json(all.into_iter().map(|worker| view::worker(worker, &granted, now_ms)).collect()))
}

async fn enrolment_token(
    State(core): Shared,
    caller: Caller,
    body: Bytes,
) -> ApiResult<(StatusCode, Json<TokenResponse>)> {
    caller.needs(Role::Admin)?;
    Ok((StatusCode::CREATED, Json(enrol::enrolment_token(&core, &parse_body(&body)?).await?)))
}

async fn enrol_worker(
    State(core): Shared,
    body: Bytes,
) -> ApiResult<(StatusCode, Json<EnrolResponse>)> {
    Ok((StatusCode::CREATED, Json(enrol::enrol(&core, &parse_body(&body)?).await?)))
}

async fn list_tokens(State(core): Shared, caller: Caller) -> ApiResult<Json<Vec<TokenView>>> {
    caller.needs(Role::Admin)?;
    Ok(Json(enrol::api_tokens(&core).await?))
}

async fn create_token(
    State(core): Shared,
    caller: Caller,
    body: Bytes,
) -> ApiResult<(StatusCode, Json<TokenResponse>)> {
    caller.needs(Role::Admin)?;
    Ok((StatusCode::CREATED, Json(enrol::api_token(&core, &parse_body(&body)?).await?)))
}

async fn remove_token(
    State(core): Shared,
    caller: Caller,
    Path(name): Path<String>,
) -> ApiResult<StatusCode> {
    caller.needs(Role::Admin)?;
    enrol::remove_api_token(&core, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn list_events(
    State(core): Shared,
    caller: Caller,
    query: RawQuery,
) -> ApiResult<Json<Vec<EventView>>> {
    caller.needs(Role::Viewer)?;
    let query: ListQuery = parse_query(query)?;
    let mut db = core.catalog.read().await?;
    let rows = events::list(&mut db, limit(query.limit)?).await?;
    Ok(Json(
        rows.into_iter()
            .map(|event| EventView {
                at_ms: event.at_ms,
                name: event.name,
                cluster: event.cluster,
                job: event.job,
                worker: event.worker,
                message: event.message,
            })
            .collect(),
    ))
}
