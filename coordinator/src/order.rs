//! What people order: submit, cancel, retry. Any coordinator may take an order, not only the leader.

use aws_lc_rs::digest;
use policy::words::span;
use proto::failure::{Action, Code, Failure};
use proto::job::{JobState, RATE_LIMIT_MIN_BYTES, Task};
use proto::message::{Cancel, Control, SCHEMA};
use proto::near::did_you_mean;
use proto::{ClusterName, JobId, WorkerName};

use crate::api::types::SubmitRequest;
use crate::catalog::attempts::{self, Attempt, AttemptState};
use crate::catalog::clusters::Cluster;
use crate::catalog::jobs::{self, Job};
use crate::catalog::{backups, clusters, workers};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::settle::{finish_cancelled, new_job, tell_job, withdraw};
use crate::wire;

/// An idempotency key is no longer than this, bytes.
const KEY_MAX_BYTES: usize = 200;
/// Backups among which is looked for the one that was meant, newest first.
const NEAR_MAX: i64 = 1_000;

/// Writes a job down, or finds the one that was written under the same key. `true` when it is new.
pub(crate) async fn submit(
    core: &Core,
    request: &SubmitRequest,
    key: Option<&str>,
    requested_by: &str,
) -> Result<(Job, bool)> {
    let now_ms = core.now_ms();
    check(request, key)?;
    let digest = digest::digest(&digest::SHA256, crate::catalog::row::json(request).as_bytes());
    let digest = crate::api::hex(digest.as_ref());
    let digest = digest.as_str();
    // Keys of different callers do not meet.
    let key = key.map(|key| format!("{requested_by}/{key}"));
    let key = key.as_deref();
    let (job, fresh) = core
        .catalog
        .transact("submit", move |tx| {
            Box::pin(async move {
                if let Some(key) = key
                    && let Some(known) = jobs::by_idempotency_key(tx.db(), key).await?
                {
                    if known.request_digest.as_deref() == Some(digest) {
                        return Ok((known, false));
                    }
                    let text = format!(
                        "the idempotency key was used for another request, job {}",
                        known.id
                    );
                    return Err(refused(
                        Code::StateConflict,
                        text,
                        "Use a fresh key for a new request.",
                    ));
                }
                let Some(_) = clusters::get(tx.db(), &request.cluster).await? else {
                    let known = clusters::list(tx.db()).await?;
                    return Err(Error::Refused(cluster_unknown(&request.cluster, &known)));
                };
                if let Some(worker) = &request.worker
                    && workers::get(tx.db(), worker).await?.is_none()
                {
                    return Err(Error::Refused(worker_unknown(worker)));
                }
                if let Some(backup) = asked_backup(&request.task) {
                    let known = backups::get(tx.db(), backup).await?;
                    if known.is_none_or(|known| known.cluster != request.cluster) {
                        let cluster = request.cluster.as_str();
                        let known = backups::list(tx.db(), cluster, NEAR_MAX).await?;
                        let known: Vec<String> =
                            known.iter().map(|known| known.id.to_string()).collect();
                        let meant =
                            did_you_mean(&backup.to_string(), known.iter().map(String::as_str));
                        let text = format!("{cluster} has no backup {backup}{meant}");
                        let hint =
                            format!("List its backups: pgmuster backups list {}.", request.cluster);
                        return Err(refused(Code::BackupUnknown, text, &hint));
                    }
                }
                let mut job = new_job(
                    &core.config,
                    request.cluster.clone(),
                    request.task.clone(),
                    request.lane,
                    requested_by,
                    now_ms,
                );
                job.idempotency_key = key.map(str::to_owned);
                job.request_digest = Some(digest.to_owned());
                job.only_worker.clone_from(&request.worker);
                job.verify = request.verify;
                job.not_after_at_ms =
                    request.start_within_ms.map(|ms| now_ms.saturating_add(signed(ms)));
                job.deadline_ms = request.deadline_ms.map_or(job.deadline_ms, signed);
                job.attempts_max = request.attempts_max.unwrap_or(job.attempts_max);
                jobs::insert(tx, &job).await?;
                Ok((job, true))
            })
        })
        .await?;
    if fresh {
        tracing::info!(job.id = %job.id, job.kind = %job.kind(), cluster = %job.cluster, "Submitted {} of {}", job.kind(), job.cluster);
        wake(core).await;
    }
    Ok((job, fresh))
}

/// Asks a job to stop. What nobody has begun is cancelled at once; what runs is `cancelling` until there is evidence
/// that it stopped. Cancelling twice is cancelling once.
pub(crate) async fn cancel(core: &Core, id: JobId, requested_by: &str) -> Result<Job> {
    let now_ms = core.now_ms();
    let (job, attempt) = core
        .catalog
        .transact("cancel", move |tx| {
            Box::pin(async move {
                let mut job = jobs::get(tx.db(), id).await?.ok_or_else(|| job_unknown(id))?;
                let open = match job.attempt {
                    Some(open) => attempts::get(tx.db(), open).await?,
                    None => None,
                };
                match job.state {
                    JobState::Cancelled => return Ok((job, None)),
                    state if state.is_final() => {
                        let text = format!("job {id} is over already: it {}", state.told());
                        return Err(refused(Code::StateConflict, text, ""));
                    }
                    _ => {}
                }
                job.cancel_asked_at_ms = job.cancel_asked_at_ms.or(Some(now_ms));
                let granted = open.filter(|attempt| attempt.state.is_granted());
                if granted.is_some() {
                    if job.state != JobState::Cancelling {
                        job.state = JobState::Cancelling;
                        job.reason = Some(format!("{requested_by} asked it to stop"));
                    }
                } else {
                    if let Some(open) = job.attempt {
                        withdraw(
                            tx,
                            open,
                            AttemptState::Superseded,
                            "the job was cancelled",
                            now_ms,
                        )
                        .await?;
                    }
                    let when = if job.attempts_used == 0 {
                        "before anybody began it"
                    } else {
                        "while nobody worked on it"
                    };
                    let reason = format!("cancelled by {requested_by} {when}");
                    finish_cancelled(&mut job, reason, now_ms);
                }
                jobs::update(tx, &job).await?;
                job.version += 1;
                Ok((job, granted))
            })
        })
        .await?;
    tell_job(core, &job);
    if let Some(attempt) = attempt {
        push_cancel(core, &attempt).await;
    }
    wake(core).await;
    Ok(job)
}

/// Tells the worker to stop an attempt. May get lost: the beacon says the same every few seconds.
pub(crate) async fn push_cancel(core: &Core, attempt: &Attempt) {
    let (Some(worker), Some(token)) = (&attempt.worker, attempt.token) else { return };
    let token = u64::try_from(token).unwrap_or(0);
    let cancel = Control::Cancel(Cancel { schema: SCHEMA, attempt: attempt.id, token });
    wire::control(core, worker, &cancel).await;
}

/// Tries a job that ended badly again: a new job with the same work, so that final states stay final and the history
/// is kept. It names the old one, and its first attempt has the old one's last as predecessor.
pub(crate) async fn retry(core: &Core, id: JobId, requested_by: &str) -> Result<Job> {
    let now_ms = core.now_ms();
    let job = core
        .catalog
        .transact("retry", move |tx| {
            Box::pin(async move {
                let old = jobs::get(tx.db(), id).await?.ok_or_else(|| job_unknown(id))?;
                if !matches!(
                    old.state,
                    JobState::Failed | JobState::Cancelled | JobState::Missed | JobState::Lost
                ) {
                    let text = format!("job {id} is {}: only failed, cancelled, missed and lost jobs are tried again", old.state);
                    return Err(refused(Code::StateConflict, text, ""));
                }
                // One retry of a job at a time; asking again names the one there is.
                let key = format!("retry/{id}/{}", old.version);
                if let Some(known) = jobs::by_idempotency_key(tx.db(), &key).await? {
                    return Ok(known);
                }
                let mut job = new_job(
                    &core.config,
                    old.cluster.clone(),
                    old.task.clone(),
                    old.lane,
                    requested_by,
                    now_ms,
                );
                job.idempotency_key = Some(key);
                job.only_worker.clone_from(&old.only_worker);
                job.verify = old.verify;
                job.deadline_ms = old.deadline_ms;
                job.attempts_max = old.attempts_max;
                job.retry_of = Some(old.id);
                job.last_attempt = old.last_attempt;
                jobs::insert(tx, &job).await?;
                Ok(job)
            })
        })
        .await?;
    wake(core).await;
    Ok(job)
}

/// Rings the own doorbell, and everybody else's if somebody else leads.
pub(crate) async fn wake(core: &Core) {
    core.job_changed();
    core.doorbell.notify_one();
    if core.epoch().is_none() {
        wire::wake(core).await;
    }
}

fn check(request: &SubmitRequest, key: Option<&str>) -> Result<()> {
    let invalid = |text: String| Err(refused(Code::RequestInvalid, text, ""));
    if let Task::Probe(_) = request.task {
        return invalid("probes are begun by the coordinator alone".to_owned());
    }
    if request.verify.is_some() && !matches!(request.task, Task::Backup(_)) {
        return invalid("only a backup can be verified after it succeeded".to_owned());
    }
    if let Task::VerifyRestore(proof) = &request.task
        && let Err(what) = proof.check()
    {
        return invalid(what.to_owned());
    }
    if let Task::Restore(restore) = &request.task
        && let Err(what) = restore.check()
    {
        return invalid(what);
    }
    if let Task::Vacuum(vacuum) = &request.task
        && (vacuum.bloat_ratio_min < 1.0 || !vacuum.bloat_ratio_min.is_finite())
    {
        return invalid(format!(
            "bloat_ratio_min is {}, at least 1.0 is needed",
            vacuum.bloat_ratio_min
        ));
    }
    if let Task::Backup(backup) = &request.task
        && backup.compression_level.is_some_and(|level| !(-7..=19).contains(&level))
    {
        return invalid("compression_level must be -7 to 19".to_owned());
    }
    if let Task::Backup(backup) = &request.task
        && let Some(processes) = backup.processes
        && !(1..=256).contains(&processes)
    {
        return invalid(format!("processes is {processes}, 1 to 256 is possible"));
    }
    if let Task::Backup(backup) = &request.task
        && let Some(limit) = backup.rate_limit_bytes
        && limit < RATE_LIMIT_MIN_BYTES
    {
        return invalid(format!(
            "rate_limit_bytes is {limit}, at least {RATE_LIMIT_MIN_BYTES} (1 MiB a second) is needed"
        ));
    }
    if let Task::EnableWal(enable) = &request.task
        && (1..10).contains(&enable.archive_timeout_s)
    {
        return invalid(format!(
            "archive_timeout_s is {}: at least 10 are needed, or 0 to leave it as it is",
            enable.archive_timeout_s
        ));
    }
    if request.attempts_max == Some(0) {
        return invalid("attempts_max is 0: nothing would run".to_owned());
    }
    let limit_ms = 366 * 86_400_000;
    for (name, ms) in
        [("deadline_ms", request.deadline_ms), ("start_within_ms", request.start_within_ms)]
    {
        if ms.is_some_and(|ms| ms == 0 || ms > limit_ms) {
            let longest = span(signed(limit_ms));
            return invalid(format!("{name} must be more than 0 and at most {longest}"));
        }
    }
    if key.is_some_and(|key| key.is_empty() || key.len() > KEY_MAX_BYTES) {
        return invalid(format!("an idempotency key has 1 to {KEY_MAX_BYTES} bytes"));
    }
    Ok(())
}

fn asked_backup(task: &Task) -> Option<proto::BackupId> {
    match task {
        Task::VerifyRestore(verify) => verify.backup,
        Task::Restore(restore) => restore.backup,
        Task::Backup(_)
        | Task::Analyze(_)
        | Task::Vacuum(_)
        | Task::Probe(_)
        | Task::EnableWal(_) => None,
    }
}

fn signed(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

fn refused(code: Code, text: String, hint: &str) -> Error {
    Error::Refused(Failure::new(code, Action::Abandon, text).with_hint(hint))
}

/// No worker ever announced this cluster, though these.
pub(crate) fn cluster_unknown(name: &ClusterName, known: &[Cluster]) -> Failure {
    let meant = did_you_mean(name.as_str(), known.iter().map(|known| known.name.as_str()));
    let text = format!("no worker has announced a cluster {name}{meant}");
    Failure::new(Code::ClusterUnknown, Action::Abandon, text)
        .with_hint("List the clusters: pgmuster cluster list. A cluster is written into the configuration of a worker near it.")
}

fn worker_unknown(name: &WorkerName) -> Failure {
    Failure::new(Code::WorkerUnknown, Action::Abandon, format!("there is no worker {name}"))
        .with_hint("Its configuration names it; enroll it there: pgmuster worker enroll --config FILE --enroll-token FILE.")
}

/// There is no such job.
pub(crate) fn job_unknown(id: JobId) -> Failure {
    Failure::new(Code::JobUnknown, Action::Abandon, format!("there is no job {id}"))
        .with_hint("List the jobs: pgmuster job list.")
}
