//! Claims: the leading coordinator decides who runs an attempt, by one compare-and-set.
//!
//! Idempotent by (attempt, boot, nonce): the same claim gets the same grant, byte for byte. A claim that is not
//! signed by a worker this coordinator certified is not answered at all.

use proto::envelope::{Certificate, Signed};
use proto::job::{JobState, Task};
use proto::message::{
    Claim, ClaimMessage, Control, Decline, DeclineReason, Denial, DenialReason, Grant, SCHEMA, Spec,
};
use proto::{WorkerName, topology};
use telemetry::TraceContext;

use crate::catalog::attempts::{self, Attempt, AttemptState};
use crate::catalog::clusters::Cluster;
use crate::catalog::jobs::{self, Job};
use crate::catalog::{Tx, clusters, heartbeats, leader, workers};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::inbox::{Handled, refuse};
use crate::settle::withdraw;
use crate::{catalog::row::json, wire};

/// Answers one message of the claims queue.
pub(crate) async fn handle(core: &Core, epoch: i64, body: &[u8]) -> Result<Handled> {
    let signed: Signed<ClaimMessage> = match serde_json::from_slice(body) {
        Ok(signed) => signed,
        Err(error) => return Ok(refuse(core, topology::CLAIMS, &error)),
    };
    let (message, certificate) = match signed.verify_certified(&core.public_key) {
        Ok(verified) => verified,
        Err(error) => return Ok(refuse(core, topology::CLAIMS, &error)),
    };
    let sender = match &message {
        ClaimMessage::Claim(claim) => &claim.worker,
        ClaimMessage::Decline(decline) => &decline.worker,
    };
    if *sender != certificate.worker {
        return Ok(refuse(core, topology::CLAIMS, &NotTheSender));
    }
    match message {
        ClaimMessage::Claim(claim) => {
            let worker = claim.worker.clone();
            match decide(core, epoch, &claim, &certificate).await? {
                Answer::Grant(body) => wire::signed_control(core, &worker, body).await,
                Answer::Denial(reason) => {
                    let denial = Denial {
                        schema: SCHEMA,
                        attempt: claim.attempt,
                        worker: claim.worker,
                        boot: claim.boot,
                        nonce: claim.nonce,
                        reason,
                    };
                    wire::control(core, &worker, &Control::Denial(denial)).await;
                }
            }
        }
        ClaimMessage::Decline(decline) => take_back(core, epoch, &decline, &certificate).await?,
    }
    core.job_changed();
    core.doorbell.notify_one();
    Ok(Handled::Done)
}

/// The sender's certificate names somebody else.
#[derive(Debug, thiserror::Error)]
#[error("accept a message in another worker's name")]
pub(crate) struct NotTheSender;

enum Answer {
    /// A signed grant.
    Grant(String),
    Denial(DenialReason),
}

async fn decide(
    core: &Core,
    epoch: i64,
    claim: &Claim,
    certificate: &Certificate,
) -> Result<Answer> {
    let now_ms = core.now_ms();
    let (answer, waited) = core
        .catalog
        .lead(epoch, "claim", move |tx| {
            Box::pin(async move {
                let denied = |reason| Ok((Answer::Denial(reason), None));
                if !is_current(tx, certificate).await? {
                    return denied(DenialReason::NotForYou);
                }
                let worker = workers::get(tx.db(), &claim.worker).await?;
                // Nobody is left to run it: this claim was on its way when its process ended.
                if worker.as_ref().is_some_and(|worker| worker.is_former(claim.boot)) {
                    return denied(DenialReason::NotForYou);
                }
                let every_ms = worker.map_or(0, |worker| worker.every_ms);
                let Some(mut attempt) = attempts::get(tx.db(), claim.attempt).await? else {
                    return denied(DenialReason::Unknown);
                };
                let Some(mut job) = jobs::get(tx.db(), attempt.job).await? else {
                    return denied(DenialReason::Unknown);
                };
                if attempt.job != claim.job {
                    return denied(DenialReason::Unknown);
                }
                if attempt.state.is_granted() && is_same(&attempt, claim) {
                    return match (&job.state, attempt.grant) {
                        (JobState::Running, Some(grant)) => Ok((Answer::Grant(grant), None)),
                        _ => denied(DenialReason::Cancelled),
                    };
                }
                if matches!(job.state, JobState::Cancelled | JobState::Cancelling) {
                    return denied(DenialReason::Cancelled);
                }
                if attempt.state != AttemptState::Ticketed || job.attempt != Some(attempt.id) {
                    return denied(DenialReason::Taken);
                }
                if !may_claim(&attempt, certificate) {
                    return denied(DenialReason::NotForYou);
                }
                if let Some(reason) = held(tx, &job).await? {
                    withdraw(tx, attempt.id, AttemptState::Superseded, &reason, now_ms).await?;
                    job.attempt = None;
                    job.state = JobState::Waiting;
                    job.reason = Some(reason);
                    jobs::update(tx, &job).await?;
                    return denied(DenialReason::Held);
                }
                let first = job.started_at_ms.is_none();
                let grant =
                    grant(tx, core, claim, &mut job, &mut attempt, every_ms, now_ms).await?;
                let waited = first.then(|| (job.kind(), now_ms - job.submitted_at_ms));
                Ok((Answer::Grant(grant), waited))
            })
        })
        .await?;
    if let Some((kind, waited_ms)) = waited {
        core.metrics.job_started(kind, waited_ms);
    }
    Ok(answer)
}

fn is_same(attempt: &Attempt, claim: &Claim) -> bool {
    attempt.worker.as_ref() == Some(&claim.worker)
        && attempt.boot == Some(claim.boot)
        && attempt.nonce.as_deref() == Some(claim.nonce.0.as_str())
}

/// A certificate that was replaced by a newer one is not believed any more.
pub(crate) async fn is_current(tx: &mut Tx<'_>, certificate: &Certificate) -> Result<bool> {
    let known = workers::get(tx.db(), &certificate.worker).await?;
    Ok(known.is_none_or(|mut worker| worker.accept(certificate)))
}

fn may_claim(attempt: &Attempt, certificate: &Certificate) -> bool {
    match (&attempt.target_worker, &attempt.target_site) {
        (Some(worker), _) => *worker == certificate.worker,
        (None, Some(site)) => *site == certificate.site,
        (None, None) => false,
    }
}

/// Why nobody may begin this job right now.
async fn held(tx: &mut Tx<'_>, job: &Job) -> Result<Option<String>> {
    let cluster = clusters::get(tx.db(), &job.cluster).await?;
    if job.probe_of.is_none() && cluster.is_some_and(|cluster| cluster.paused) {
        return Ok(Some(format!("{} is paused", job.cluster)));
    }
    let other = attempts::granted_in_class(tx.db(), &job.cluster, job.kind()).await?;
    Ok(other.map(|other| {
        format!("another {} of {} runs: job {}", other.kind, other.cluster, other.job)
    }))
}

/// Writes the grant and answers it, signed. An attempt counts from here on, so that a job that kills its worker runs
/// out of attempts.
async fn grant(
    tx: &mut Tx<'_>,
    core: &Core,
    claim: &Claim,
    job: &mut Job,
    attempt: &mut Attempt,
    every_ms: i64,
    now_ms: i64,
) -> Result<String> {
    let token = leader::next_token(tx).await?;
    let lease_ms = core.config.timing.lease_ms;
    let cluster = clusters::get(tx.db(), &job.cluster).await?;
    let spec = Spec {
        schema: SCHEMA,
        job: job.id,
        attempt: attempt.id,
        predecessor: attempt.predecessor,
        cluster: job.cluster.clone(),
        system_identifier: cluster.as_ref().and_then(|cluster| cluster.system_identifier),
        task: completed(tx, &job.task, cluster.as_ref()).await?,
        deadline_ms: u64::try_from(job.deadline_ms).unwrap_or(0),
        traceparent: Some(TraceContext::of_attempt(job.id, attempt.id).to_string()),
    };
    let spec = serde_json::to_value(&spec).map_err(|source| Error::Stored {
        column: "task",
        row: job.id.to_string(),
        source: Box::new(source),
    })?;
    let grant = Control::Grant(Box::new(Grant {
        schema: SCHEMA,
        attempt: attempt.id,
        worker: claim.worker.clone(),
        boot: claim.boot,
        nonce: claim.nonce.clone(),
        token: u64::try_from(token).unwrap_or(0),
        lease_ms,
        spec,
    }));
    let body = json(&core.key.sign(&grant));
    attempt.state = AttemptState::Running;
    attempt.worker = Some(claim.worker.clone());
    attempt.boot = Some(claim.boot);
    attempt.nonce = Some(claim.nonce.0.clone());
    attempt.token = Some(token);
    attempt.grant = Some(body.clone());
    attempt.granted_at_ms = Some(now_ms);
    attempt.lease_until_at_ms = Some(now_ms + core.config.lease_ms(every_ms));
    job.state = JobState::Running;
    job.reason = None;
    job.started_at_ms = job.started_at_ms.or(Some(now_ms));
    job.attempts_used += 1;
    job.last_attempt = Some(attempt.id);
    attempts::update(tx, attempt).await?;
    jobs::update(tx, job).await?;
    crate::catalog::outbox::remove(tx, attempt.id).await?;
    Ok(body)
}

/// A task with what is known only now: a proof is told which heartbeats of its cluster were archived.
async fn completed(tx: &mut Tx<'_>, task: &Task, cluster: Option<&Cluster>) -> Result<Task> {
    let Task::VerifyRestore(proof) = task else { return Ok(task.clone()) };
    let mut proof = proof.clone();
    proof.heartbeats = None;
    if let Some(cluster) = cluster
        && let (Some(wal), Some(server)) = (&cluster.wal, cluster.system_identifier)
    {
        let known = heartbeats::of(tx.db(), &cluster.name, server).await?;
        proof.heartbeats = policy::heartbeats::archived(&known, wal);
    }
    Ok(Task::VerifyRestore(proof))
}

/// A worker gave a ticket back: the job is planned anew, with what the worker said in mind.
async fn take_back(
    core: &Core,
    epoch: i64,
    decline: &Decline,
    certificate: &Certificate,
) -> Result<()> {
    let now_ms = core.now_ms();
    core.catalog
        .lead(epoch, "decline", move |tx| {
            Box::pin(async move {
                if !is_current(tx, certificate).await? {
                    return Ok(());
                }
                let Some(attempt) = attempts::get(tx.db(), decline.attempt).await? else {
                    return Ok(());
                };
                if attempt.state != AttemptState::Ticketed || !may_claim(&attempt, certificate) {
                    return Ok(());
                }
                let Some(mut job) = jobs::get(tx.db(), attempt.job).await? else { return Ok(()) };
                let reason = describe(decline);
                withdraw(tx, attempt.id, AttemptState::Declined, &reason, now_ms).await?;
                if job.attempt == Some(attempt.id) {
                    job.attempt = None;
                    job.state = JobState::Waiting;
                    job.reason = Some(reason);
                }
                match decline.reason {
                    DeclineReason::Busy => fill(tx, &decline.worker, &attempt).await?,
                    DeclineReason::Draining => drain(tx, &decline.worker).await?,
                    DeclineReason::NotAllowed | DeclineReason::Unsupported => {
                        job.refused.insert(decline.worker.clone());
                    }
                }
                jobs::update(tx, &job).await
            })
        })
        .await
}

fn describe(decline: &Decline) -> String {
    let worker = &decline.worker;
    let what = match decline.reason {
        DeclineReason::Busy => "has no free slot",
        DeclineReason::NotAllowed => "is not allowed to do it",
        DeclineReason::Unsupported => "cannot do it",
        DeclineReason::Draining => "is shutting down",
    };
    let detail: String = telemetry::scrub(&decline.detail).chars().take(300).collect();
    if detail.is_empty() {
        format!("worker {worker} {what}")
    } else {
        format!("worker {worker} {what}: {detail}")
    }
}

/// The worker's next pulse says what is free; until then nothing is, in this lane.
async fn fill(tx: &mut Tx<'_>, name: &WorkerName, attempt: &Attempt) -> Result<()> {
    if let Some(mut worker) = workers::get(tx.db(), name).await? {
        worker.routine_free = 0;
        if attempt.lane == proto::Lane::Urgent {
            worker.urgent_free = 0;
        }
        workers::put(tx, &worker).await?;
    }
    Ok(())
}

async fn drain(tx: &mut Tx<'_>, name: &WorkerName) -> Result<()> {
    if let Some(mut worker) = workers::get(tx.db(), name).await? {
        worker.draining = true;
        workers::put(tx, &worker).await?;
    }
    Ok(())
}
