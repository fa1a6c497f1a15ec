//! From rows to what is shown.

use proto::JobId;
use sqlx::AnyConnection;
use telemetry::TraceContext;

use super::types::{AttemptView, JobView, TraceView, WorkerView};
use crate::catalog::attempts::{self, Attempt};
use crate::catalog::jobs::{self, Job};
use crate::catalog::steps;
use crate::catalog::workers::Worker;
use crate::core::Core;
use crate::error::Result;

/// A job without what stands in other tables.
pub(crate) fn job_alone(job: Job) -> JobView {
    JobView {
        id: job.id,
        kind: job.kind(),
        cluster: job.cluster,
        task: job.task,
        lane: job.lane,
        state: job.state,
        reason: job.reason,
        version: job.version,
        requested_by: job.requested_by,
        submitted_at_ms: job.submitted_at_ms,
        not_before_at_ms: job.not_before_at_ms,
        not_after_at_ms: job.not_after_at_ms,
        started_at_ms: job.started_at_ms,
        ended_at_ms: job.ended_at_ms,
        attempts_used: job.attempts_used,
        attempts_max: job.attempts_max,
        worker: None,
        attempt: job.attempt.or(job.last_attempt),
        progress: None,
        failure: job.failure,
        outcome: job.outcome,
        verify: job.verify,
        follows: job.follows,
        followed_by: Vec::new(),
        retry_of: job.retry_of,
        traceparent: job.traceparent,
    }
}

/// A job with its worker, its progress and its followers.
pub(crate) async fn job(db: &mut AnyConnection, job: Job) -> Result<JobView> {
    let mut view = job_alone(job);
    if let Some(id) = view.attempt
        && let Some(attempt) = attempts::get(db, id).await?
        && attempt.job == view.id
    {
        view.worker = attempt.worker;
        view.progress = attempt.progress.filter(|_| attempt.state.is_granted());
    }
    view.followed_by = jobs::followers(db, view.id).await?;
    Ok(view)
}

/// The waterfall of a job.
pub(crate) async fn trace(core: &Core, id: JobId) -> Result<Option<TraceView>> {
    let mut db = core.catalog.read().await?;
    let Some(row) = jobs::get(&mut db, id).await? else { return Ok(None) };
    let mut shown = Vec::new();
    for attempt in attempts::of_job(&mut db, id).await? {
        let steps = steps::of_attempt(&mut db, attempt.id).await?;
        shown.push(attempt_view(attempt, steps));
    }
    let trace_id = TraceContext::of_job(id).trace_id().to_string();
    Ok(Some(TraceView { job: job(&mut db, row).await?, trace_id, attempts: shown }))
}

fn attempt_view(attempt: Attempt, steps: Vec<proto::Step>) -> AttemptView {
    AttemptView {
        span_id: TraceContext::of_attempt(attempt.job, attempt.id).span_id().to_string(),
        id: attempt.id,
        state: attempt.state.to_string(),
        reason: attempt.reason,
        queue: attempt.queue,
        worker: attempt.worker,
        predecessor: attempt.predecessor,
        created_at_ms: attempt.created_at_ms,
        granted_at_ms: attempt.granted_at_ms,
        started_at_ms: attempt.started_at_ms,
        ended_at_ms: attempt.ended_at_ms,
        failure: attempt.failure,
        steps,
    }
}

/// A worker and what it runs.
pub(crate) fn worker(worker: Worker, granted: &[Attempt], now_ms: i64) -> WorkerView {
    WorkerView {
        alive: worker.is_alive(now_ms),
        running: granted
            .iter()
            .filter(|attempt| attempt.worker.as_ref() == Some(&worker.name))
            .map(|attempt| attempt.job)
            .collect(),
        name: worker.name,
        site: worker.site,
        draining: worker.draining,
        boot: worker.boot,
        seen_at_ms: worker.seen_at_ms,
        urgent_free: worker.urgent_free,
        routine_free: worker.routine_free,
        offers: worker.offers,
    }
}
