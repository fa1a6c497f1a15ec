//! Reports: applied for the current (attempt, token) only, once, never backwards.
//!
//! Reading is tolerant: an outcome that a newer worker describes in words this program does not know is still an end.

use proto::envelope::{EnvelopeError, Signable, Signed};
use proto::failure::{Action, Code, Failure};
use proto::job::{JobKind, Outcome};
use proto::message::ReportBody;
use proto::step::Step;
use proto::{AttemptId, BackupId, BootId, JobId, WorkerName, topology};
use serde::{Deserialize, Serialize};

use crate::catalog::attempts::{self, Attempt, AttemptState};
use crate::catalog::jobs::{self, Job};
use crate::catalog::workers;
use crate::catalog::{Tx, steps};
use crate::claims::{NotTheSender, is_current};
use crate::core::Core;
use crate::error::Result;
use crate::inbox::{Handled, refuse};
use crate::settle::{Ending, Settled, end, late_outcome, late_success};

/// A report whose body is not understood yet.
#[derive(Debug, Serialize, Deserialize)]
struct Envelope {
    job: JobId,
    attempt: AttemptId,
    token: u64,
    worker: WorkerName,
    boot: BootId,
    seq: u64,
    body: serde_json::Value,
}

impl Signable for Envelope {
    const CONTEXT: &'static str = proto::message::Report::CONTEXT;
}

/// What a report says, as far as it is understood.
#[derive(Debug)]
enum Said {
    Started,
    Step(Step),
    Succeeded {
        outcome: Option<Box<Outcome>>,
        steps: Vec<Step>,
    },
    Failed {
        failure: Failure,
        outcome: Option<Box<Outcome>>,
        steps: Vec<Step>,
    },
    /// A kind of report that is not an end and not known here.
    Unknown,
}

/// Applies one message of the reports queue.
pub(crate) async fn handle(core: &Core, epoch: i64, body: &[u8]) -> Result<Handled> {
    let signed: Signed<Envelope> = match serde_json::from_slice(body) {
        Ok(signed) => signed,
        Err(error) => return Ok(refuse(core, topology::REPORTS, &error)),
    };
    let (report, certificate) = match signed.verify_certified(&core.public_key) {
        Ok(verified) => verified,
        Err(error) => return Ok(refuse(core, topology::REPORTS, &error)),
    };
    if report.worker != certificate.worker {
        return Ok(refuse(core, topology::REPORTS, &NotTheSender));
    }
    let now_ms = core.now_ms();
    let (report, certificate) = (&report, &certificate);
    let applied = core
        .catalog
        .lead(epoch, "report", move |tx| {
            Box::pin(async move {
                if !is_current(tx, certificate).await? {
                    return Ok(Applied::Refused);
                }
                apply(tx, core, report, now_ms).await
            })
        })
        .await?;
    match applied {
        Applied::Settled(settled) => settled.tell(core),
        Applied::Written => core.job_changed(),
        Applied::Ignored => {}
        Applied::Refused => {
            let context = EnvelopeError::Certificate {
                reason: "a newer one replaced it, or the grant is another's",
            };
            return Ok(refuse(core, topology::REPORTS, &context));
        }
    }
    Ok(Handled::Done)
}

enum Applied {
    Settled(Box<Settled>),
    Written,
    /// Old news.
    Ignored,
    /// Not from whoever holds the grant.
    Refused,
}

async fn apply(tx: &mut Tx<'_>, core: &Core, report: &Envelope, now_ms: i64) -> Result<Applied> {
    let Some(mut attempt) = attempts::get(tx.db(), report.attempt).await? else {
        tracing::warn!(attempt.id = %report.attempt, worker = %report.worker,
            "Report for attempt {}, which this catalog does not know", report.attempt);
        return Ok(Applied::Ignored);
    };
    let Some(job) = jobs::get(tx.db(), attempt.job).await? else { return Ok(Applied::Ignored) };
    let is_holder = attempt.worker.as_ref() == Some(&report.worker)
        && attempt.boot == Some(report.boot)
        && attempt.token.is_some_and(|token| u64::try_from(token) == Ok(report.token))
        && attempt.job == report.job;
    if !is_holder {
        return Ok(Applied::Refused);
    }
    let seq = i64::try_from(report.seq).unwrap_or(i64::MAX);
    let said = understand(&report.body, &job, &attempt);
    let live = attempt.state.is_granted();
    let given_up = attempt.state == AttemptState::Lost;
    match said {
        Said::Started if live && attempt.started_at_ms.is_none() => {
            attempt.started_at_ms = Some(now_ms);
            attempts::update(tx, &attempt).await?;
            jobs::touch(tx, job.id).await?;
            Ok(Applied::Written)
        }
        Said::Step(step) if live => {
            steps::put(tx, attempt.id, seq, &step).await?;
            jobs::touch(tx, job.id).await?;
            Ok(Applied::Written)
        }
        Said::Succeeded { outcome, steps } if live => {
            put_steps(tx, attempt.id, seq, &steps).await?;
            free_slot(tx, &attempt).await?;
            let unread = "it succeeded, in words this coordinator is too old to read";
            let reason = outcome.is_none().then(|| unread.to_owned());
            let ending = Ending::Succeeded { outcome, reason };
            Ok(Applied::Settled(Box::new(
                end(tx, &core.config, now_ms, job, attempt, ending).await?,
            )))
        }
        Said::Succeeded { outcome: Some(outcome), steps } if given_up => {
            put_steps(tx, attempt.id, seq, &steps).await?;
            let settled = late_success(tx, &core.config, now_ms, job, attempt, outcome).await?;
            Ok(settled.map_or(Applied::Written, |settled| Applied::Settled(Box::new(settled))))
        }
        // It counts as a success already, by the evidence in the repository or in words that were not understood.
        Said::Succeeded { outcome: Some(outcome), steps }
            if attempt.state == AttemptState::Succeeded && job.outcome.is_none() =>
        {
            put_steps(tx, attempt.id, seq, &steps).await?;
            late_outcome(tx, now_ms, job, &attempt, outcome).await?;
            Ok(Applied::Written)
        }
        Said::Failed { failure, outcome, steps } if live => {
            put_steps(tx, attempt.id, seq, &steps).await?;
            free_slot(tx, &attempt).await?;
            let ending = Ending::Failed { failure, outcome };
            Ok(Applied::Settled(Box::new(
                end(tx, &core.config, now_ms, job, attempt, ending).await?,
            )))
        }
        Said::Started
        | Said::Step(_)
        | Said::Succeeded { .. }
        | Said::Failed { .. }
        | Said::Unknown => Ok(Applied::Ignored),
    }
}

async fn put_steps(tx: &mut Tx<'_>, attempt: AttemptId, seq: i64, all: &[Step]) -> Result<()> {
    for step in all {
        steps::put(tx, attempt, seq, step).await?;
    }
    Ok(())
}

/// The worker has room again for what its last pulse counted as taken. Its next pulse says how it really is.
async fn free_slot(tx: &mut Tx<'_>, attempt: &Attempt) -> Result<()> {
    let Some(name) = &attempt.worker else { return Ok(()) };
    let Some(mut worker) = workers::get(tx.db(), name).await? else { return Ok(()) };
    if attempt.granted_at_ms < worker.seen_at_ms {
        worker.routine_free += 1;
        workers::put(tx, &worker).await?;
    }
    Ok(())
}

/// Reads the body strictly, and for an end that cannot be read so, for what it means.
fn understand(body: &serde_json::Value, job: &Job, attempt: &Attempt) -> Said {
    match serde_json::from_value::<ReportBody>(body.clone()) {
        Ok(ReportBody::Started) => Said::Started,
        Ok(ReportBody::Step(step)) => Said::Step(step),
        Ok(ReportBody::Succeeded { outcome, steps }) => match contradiction(&outcome, job, attempt)
        {
            None => Said::Succeeded { outcome: Some(outcome), steps },
            Some(text) => Said::Failed { failure: Failure::bug(text), outcome: None, steps },
        },
        Ok(ReportBody::Failed { failure, outcome, steps }) => {
            let outcome = outcome.filter(|outcome| contradiction(outcome, job, attempt).is_none());
            Said::Failed { failure, outcome, steps }
        }
        Err(_) => understand_loosely(body),
    }
}

fn understand_loosely(body: &serde_json::Value) -> Said {
    let steps = |end: &serde_json::Value| {
        let steps = end.get("steps").and_then(serde_json::Value::as_array);
        steps
            .into_iter()
            .flatten()
            .filter_map(|step| serde_json::from_value(step.clone()).ok())
            .collect::<Vec<Step>>()
    };
    if let Some(end) = body.get("succeeded") {
        return Said::Succeeded { outcome: None, steps: steps(end) };
    }
    if let Some(end) = body.get("failed") {
        let text = |key: &str| {
            end.pointer(&format!("/failure/{key}"))
                .and_then(serde_json::Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let action = end
            .pointer("/failure/action")
            .and_then(|action| serde_json::from_value(action.clone()).ok())
            .unwrap_or(Action::Abandon);
        let message = format!("{}: {}", text("code"), text("message"));
        let failure = Failure::new(Code::Internal, action, message).with_hint(
            "The worker is newer than the coordinator and used a code it does not know; update the coordinator.",
        );
        return Said::Failed { failure, outcome: None, steps: steps(end) };
    }
    Said::Unknown
}

/// Why an outcome cannot be this attempt's.
fn contradiction(outcome: &Outcome, job: &Job, attempt: &Attempt) -> Option<String> {
    let kind = match outcome {
        Outcome::Backup(facts) if facts.backup != BackupId::from(attempt.id) => {
            return Some(format!(
                "attempt {} reported backup {}, not its own",
                attempt.id, facts.backup
            ));
        }
        Outcome::Backup(_) => JobKind::Backup,
        Outcome::VerifyRestore(_) => JobKind::VerifyRestore,
        Outcome::Restore(_) => JobKind::Restore,
        Outcome::Analyze(_) => JobKind::Analyze,
        Outcome::Vacuum(_) => JobKind::Vacuum,
        Outcome::Probe(_) => JobKind::Probe,
        Outcome::EnableWal(_) => JobKind::EnableWal,
    };
    (kind != job.kind())
        .then(|| format!("a job of kind {} reported the outcome of a {kind}", job.kind()))
}
