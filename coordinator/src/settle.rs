//! How an attempt ends, and what becomes of its job then. The one place where jobs get their final state.
//!
//! Runs inside the transaction of whoever learned of the end: a report, a pulse of a new boot, the reaper. Final
//! states never change.

use policy::Retry;
use proto::failure::{Action, Code, Failure};
use proto::job::{JobState, Lane, Outcome, Task, VerifyRestore};
use proto::{BackupId, JobId};
use telemetry::{FinishedSpan, Kind, TraceContext, emit_span};

use crate::catalog::attempts::{self, Attempt, AttemptState};
use crate::catalog::backups::{self, Backup, ProofRow, Shown, Worth};
use crate::catalog::events::{self, Event};
use crate::catalog::jobs::{self, Job};
use crate::catalog::{Tx, outbox};
use crate::chance;
use crate::config::Config;
use crate::core::Core;
use crate::error::Result;
use crate::proofs;

/// How a granted attempt ended.
#[derive(Debug, Clone)]
pub(crate) enum Ending {
    /// It worked. Without an outcome when the evidence is the repository's and nobody reported.
    Succeeded { outcome: Option<Box<Outcome>>, reason: Option<String> },
    /// It did not work.
    Failed { failure: Failure, outcome: Option<Box<Outcome>> },
    /// It is gone.
    Lost { reason: String },
}

/// What is told to the outside once the transaction is committed.
#[derive(Debug, Clone)]
pub(crate) struct Settled {
    job: Job,
    attempt: Attempt,
}

impl Settled {
    /// Emits the spans, counts the metrics, wakes whoever waits.
    pub(crate) fn tell(&self, core: &Core) {
        let (job, attempt) = (&self.job, &self.attempt);
        if attempt.state == AttemptState::Lost {
            core.metrics.attempt_lost(job.kind());
        }
        emit_attempt(job, attempt);
        tell_job(core, job);
        core.doorbell.notify_one();
    }
}

/// Tells of a job that is final; nothing for any other.
pub(crate) fn tell_job(core: &Core, job: &Job) {
    core.job_changed();
    if let (true, Some(ended_at_ms)) = (job.state.is_final(), job.ended_at_ms) {
        let ran_ms = job.started_at_ms.map(|started| ended_at_ms - started);
        core.metrics.job_ended(job.kind(), job.state, ran_ms);
        emit_job(job, ended_at_ms);
        tracing::info!(job.id = %job.id, job.kind = %job.kind(), cluster = %job.cluster, job.state = %job.state,
            "{} of {} {}{}", job.kind(), job.cluster, job.state,
            job.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default());
    }
}

/// Ends a granted attempt and moves its job on. Both are written.
pub(crate) async fn end(
    tx: &mut Tx<'_>,
    config: &Config,
    now_ms: i64,
    mut job: Job,
    mut attempt: Attempt,
    ending: Ending,
) -> Result<Settled> {
    attempt.ended_at_ms = Some(now_ms);
    job.attempt = None;
    record(tx, &job, &attempt, &ending, now_ms).await?;
    let cancelling = job.state == JobState::Cancelling;
    match ending {
        Ending::Succeeded { outcome, reason } => {
            attempt.state = AttemptState::Succeeded;
            attempt.reason.clone_from(&reason);
            finish(&mut job, JobState::Succeeded, reason, now_ms);
            job.failure = None;
            job.outcome = outcome.map(|outcome| *outcome);
            follow_up(tx, config, &job, &attempt, now_ms).await?;
        }
        Ending::Failed { failure, outcome } => {
            let cancelled = cancelling || failure.code == Code::Cancelled;
            attempt.state = if cancelled { AttemptState::Cancelled } else { AttemptState::Failed };
            attempt.failure = Some(failure.clone());
            job.outcome = outcome.map(|outcome| *outcome);
            if cancelled {
                finish_cancelled(&mut job, "its worker stopped it".to_owned(), now_ms);
            } else {
                let retry = config.retry_policy(job.attempts_max).after_failure(
                    &failure,
                    job.attempts_used,
                    chance::number(),
                );
                job.failure = Some(failure);
                again_or_not(&mut job, &attempt, retry, JobState::Failed, now_ms);
            }
        }
        Ending::Lost { reason } => {
            attempt.state = AttemptState::Lost;
            attempt.reason = Some(reason.clone());
            add_event(tx, &job, &attempt, "attempt_lost", &reason, now_ms).await?;
            if cancelling {
                finish_cancelled(&mut job, format!("its attempt is gone: {reason}"), now_ms);
            } else {
                let retry = config.retry_policy(job.attempts_max).after_loss(
                    &reason,
                    job.attempts_used,
                    chance::number(),
                );
                let text = format!("the worker that ran it vanished: {reason}");
                job.failure = Some(Failure::new(Code::WorkerLost, Action::Retry, text));
                again_or_not(&mut job, &attempt, retry, JobState::Lost, now_ms);
            }
        }
    }
    attempts::update(tx, &attempt).await?;
    jobs::update(tx, &job).await?;
    job.version += 1;
    Ok(Settled { job, attempt })
}

/// Takes a late success of an attempt that had been given up: the backup exists, whatever we believed. The job
/// succeeds if nobody else holds a grant for it; otherwise only the backup is remembered.
pub(crate) async fn late_success(
    tx: &mut Tx<'_>,
    config: &Config,
    now_ms: i64,
    mut job: Job,
    mut attempt: Attempt,
    outcome: Box<Outcome>,
) -> Result<Option<Settled>> {
    let ending = Ending::Succeeded { outcome: Some(outcome.clone()), reason: None };
    record(tx, &job, &attempt, &ending, now_ms).await?;
    let message = "its worker reported success after it had been given up";
    add_event(tx, &job, &attempt, "late_success", message, now_ms).await?;
    if !matches!(job.state, JobState::Queued | JobState::Waiting) {
        return Ok(None);
    }
    if let Some(open) = job.attempt.take() {
        withdraw(tx, open, AttemptState::Superseded, message, now_ms).await?;
    }
    attempt.state = AttemptState::Succeeded;
    attempt.reason = Some(message.to_owned());
    finish(&mut job, JobState::Succeeded, Some(message.to_owned()), now_ms);
    job.failure = None;
    job.outcome = Some(*outcome);
    follow_up(tx, config, &job, &attempt, now_ms).await?;
    attempts::update(tx, &attempt).await?;
    jobs::update(tx, &job).await?;
    Ok(Some(Settled { job, attempt }))
}

/// Takes the outcome of a job that had counted as a success without one: what it made is remembered, and shown. Nothing
/// else changes, because the job is over.
pub(crate) async fn late_outcome(
    tx: &mut Tx<'_>,
    now_ms: i64,
    mut job: Job,
    attempt: &Attempt,
    outcome: Box<Outcome>,
) -> Result<()> {
    let ending = Ending::Succeeded { outcome: Some(outcome.clone()), reason: None };
    record(tx, &job, attempt, &ending, now_ms).await?;
    job.outcome = Some(*outcome);
    jobs::update(tx, &job).await
}

/// Takes back an attempt that was never granted, with its ticket if that is still here.
pub(crate) async fn withdraw(
    tx: &mut Tx<'_>,
    id: proto::AttemptId,
    state: AttemptState,
    reason: &str,
    now_ms: i64,
) -> Result<()> {
    outbox::remove(tx, id).await?;
    let Some(mut attempt) = attempts::get(tx.db(), id).await? else { return Ok(()) };
    if attempt.state == AttemptState::Ticketed {
        attempt.state = state;
        attempt.reason = Some(reason.to_owned());
        attempt.ended_at_ms = Some(now_ms);
        attempts::update(tx, &attempt).await?;
    }
    Ok(())
}

/// Gives a job its final state.
pub(crate) fn finish(job: &mut Job, state: JobState, reason: Option<String>, now_ms: i64) {
    job.state = state;
    job.reason = reason;
    job.attempt = None;
    job.ended_at_ms = Some(now_ms);
}

/// Gives a job that was asked to stop its final state. What an earlier attempt failed with is not why it ended.
pub(crate) fn finish_cancelled(job: &mut Job, reason: String, now_ms: i64) {
    job.failure = Some(Failure::new(Code::Cancelled, Action::Abandon, reason.clone()));
    finish(job, JobState::Cancelled, Some(reason), now_ms);
}

fn again_or_not(job: &mut Job, attempt: &Attempt, retry: Retry, over: JobState, now_ms: i64) {
    match retry {
        Retry::Again { pause_ms, elsewhere, counts, reason } => {
            job.state = JobState::Waiting;
            job.reason = Some(reason);
            job.not_before_at_ms = now_ms + pause_ms;
            if elsewhere {
                job.rather_not.clone_from(&attempt.worker);
            }
            if !counts {
                job.attempts_used = job.attempts_used.saturating_sub(1);
            }
        }
        Retry::No { reason } => finish(job, over, Some(reason), now_ms),
    }
}

/// Writes the backup or proof that an attempt made, whether or not the job counts as a success.
async fn record(
    tx: &mut Tx<'_>,
    job: &Job,
    attempt: &Attempt,
    ending: &Ending,
    now_ms: i64,
) -> Result<()> {
    let (Ending::Succeeded { outcome, .. } | Ending::Failed { outcome, .. }) = ending else {
        return Ok(());
    };
    let Some(worker) = attempt.worker.clone() else { return Ok(()) };
    match outcome.as_deref() {
        Some(Outcome::Backup(facts)) if matches!(ending, Ending::Succeeded { .. }) => {
            let mut facts = facts.clone();
            // A worker whose clock is ahead must not make anything seem safe that is not.
            facts.stopped_at_ms = facts.stopped_at_ms.min(now_ms);
            facts.started_at_ms = facts.started_at_ms.min(facts.stopped_at_ms);
            facts.holds_to_ms = facts.holds_to_ms.map(|ms| ms.min(facts.stopped_at_ms));
            let backup = Backup {
                id: facts.backup,
                job: job.id,
                cluster: job.cluster.clone(),
                worker,
                worth: Worth::of(&facts, Some(&job.task)),
                outcome: facts,
                shown: Shown::None,
                gone_at_ms: None,
                copies: Vec::new(),
            };
            backups::put(tx, &backup, now_ms).await
        }
        Some(Outcome::VerifyRestore(verified)) => {
            // A worker whose clock is ahead must not outlive what others find later.
            let mut proof = verified.proof.clone();
            proof.at_ms = proof.at_ms.min(now_ms);
            let row = ProofRow { id: attempt.id, job: job.id, proof };
            proofs::take_in(tx, &row, &job.cluster, now_ms).await
        }
        _ => Ok(()),
    }
}

/// A backup that was asked to be proved gets the job that proves it, together with its own success.
async fn follow_up(
    tx: &mut Tx<'_>,
    config: &Config,
    job: &Job,
    attempt: &Attempt,
    now_ms: i64,
) -> Result<()> {
    let (Some(level), Task::Backup(_)) = (job.verify, &job.task) else { return Ok(()) };
    let task = Task::VerifyRestore(VerifyRestore {
        backup: Some(BackupId::from(attempt.id)),
        level,
        to: None,
        heartbeats: None,
    });
    let mut next = new_job(config, job.cluster.clone(), task, job.lane, &job.requested_by, now_ms);
    next.follows = Some(job.id);
    jobs::insert(tx, &next).await
}

/// A job with the coordinator's defaults, not yet written.
pub(crate) fn new_job(
    config: &Config,
    cluster: proto::ClusterName,
    task: Task,
    lane: Lane,
    requested_by: &str,
    now_ms: i64,
) -> Job {
    let id: JobId = chance::job(now_ms);
    Job {
        id,
        idempotency_key: None,
        request_digest: None,
        cluster,
        lane,
        task,
        state: JobState::Queued,
        reason: None,
        only_worker: None,
        rather_not: None,
        refused: std::collections::BTreeSet::new(),
        requested_by: requested_by.to_owned(),
        version: 1,
        submitted_at_ms: now_ms,
        not_before_at_ms: now_ms,
        not_after_at_ms: None,
        deadline_ms: i64::try_from(config.jobs.deadline_ms).unwrap_or(i64::MAX),
        attempts_max: config.jobs.attempts_max,
        attempts_used: 0,
        traceparent: TraceContext::of_job(id).to_string(),
        verify: None,
        follows: None,
        retry_of: None,
        probe_of: None,
        attempt: None,
        last_attempt: None,
        started_at_ms: None,
        ended_at_ms: None,
        cancel_asked_at_ms: None,
        failure: None,
        outcome: None,
    }
}

pub(crate) async fn add_event(
    tx: &mut Tx<'_>,
    job: &Job,
    attempt: &Attempt,
    name: &str,
    message: &str,
    now_ms: i64,
) -> Result<()> {
    let event = Event {
        at_ms: now_ms,
        name: name.to_owned(),
        cluster: Some(job.cluster.to_string()),
        job: Some(job.id.to_string()),
        worker: attempt.worker.as_ref().map(ToString::to_string),
        message: message.to_owned(),
    };
    events::add(tx, &event).await
}

/// The span of an attempt, from its grant to its end: exported by the coordinator, because a worker that was killed
/// cannot. The steps of the worker are its children.
fn emit_attempt(job: &Job, attempt: &Attempt) {
    let (Some(start_ms), Some(end_ms)) = (attempt.granted_at_ms, attempt.ended_at_ms) else {
        return;
    };
    let worker = attempt.worker.as_ref().map(ToString::to_string).unwrap_or_default();
    emit_span(FinishedSpan {
        name: format!("attempt {} of {}", job.kind(), job.cluster),
        context: TraceContext::of_attempt(job.id, attempt.id),
        parent: Some(TraceContext::of_job(job.id).span_id()),
        kind: Kind::Internal,
        start_ms,
        end_ms,
        outcome: match (attempt.state, &attempt.failure, &attempt.reason) {
            (AttemptState::Succeeded, _, _) => telemetry::Outcome::Ok,
            (_, Some(failure), _) => telemetry::Outcome::of(failure),
            (state, None, reason) => telemetry::Outcome::Failed(format!(
                "{state}: {}",
                reason.as_deref().unwrap_or_default()
            )),
        },
        attributes: vec![
            ("pgmuster.attempt.id", attempt.id.to_string().into()),
            ("pgmuster.worker", worker.into()),
        ],
        links: attempt
            .predecessor
            .map(|before| TraceContext::of_attempt(job.id, before))
            .into_iter()
            .collect(),
    });
}

/// The span of a job, from its submission to its end: the root of its trace.
fn emit_job(job: &Job, end_ms: i64) {
    emit_span(FinishedSpan {
        name: format!("{} {}", job.kind(), job.cluster),
        context: TraceContext::of_job(job.id),
        parent: None,
        kind: Kind::Internal,
        start_ms: job.submitted_at_ms,
        end_ms,
        outcome: match (job.state, &job.failure) {
            (JobState::Succeeded, _) => telemetry::Outcome::Ok,
            (_, Some(failure)) => telemetry::Outcome::of(failure),
            (state, None) => telemetry::Outcome::Failed(format!(
                "{state}: {}",
                job.reason.as_deref().unwrap_or_default()
            )),
        },
        attributes: vec![
            ("pgmuster.job.id", job.id.to_string().into()),
            ("pgmuster.job.kind", job.kind().as_str().into()),
            ("pgmuster.cluster", job.cluster.to_string().into()),
            ("pgmuster.attempts", job.attempts_used.into()),
        ],
        links: [job.follows, job.retry_of]
            .into_iter()
            .flatten()
            .map(TraceContext::of_job)
            .collect(),
    });
}
