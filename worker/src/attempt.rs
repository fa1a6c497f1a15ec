//! One attempt, from its grant to its final report.

use std::borrow::Cow;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use proto::envelope::PAYLOAD_MAX_BYTES;
use proto::job::BackupOutcome;
use proto::message::{Grant, Report, ReportBody, SCHEMA, Spec};
use proto::{Action, AttemptId, BootId, Code, Failure, JobId, Outcome, Step, WorkerName};
use telemetry::TraceContext;
use tracing::Instrument as _;

use crate::context::{JobContext, blocking};
use crate::outbound::Outbound;
use crate::shared::Shared;
use crate::slots::Slot;
use crate::spool::{Spool, Spooled};
use crate::{clock, jobs};

/// How long a job that was told to stop may take to clean up before it is dropped.
const CLEAN_UP_MAX: Duration = Duration::from_mins(2);

/// How an attempt ended.
pub(crate) struct Ended {
    pub(crate) result: Result<Outcome, Failure>,
    /// What was found although it failed.
    pub(crate) found: Option<Outcome>,
}

/// Numbers and signs the reports of one attempt.
#[derive(Debug, Clone)]
struct Reporter {
    outbound: Outbound,
    spool: Spool,
    seq: Arc<AtomicU64>,
    job: JobId,
    attempt: AttemptId,
    token: u64,
    worker: WorkerName,
    boot: BootId,
}

impl Reporter {
    fn new(shared: &Shared, job: JobId, grant: &Grant) -> Self {
        Self {
            outbound: shared.outbound.clone(),
            spool: shared.spool.clone(),
            seq: Arc::new(AtomicU64::new(0)),
            job,
            attempt: grant.attempt,
            token: grant.token,
            worker: shared.config.name.clone(),
            boot: shared.boot,
        }
    }

    fn signed(&self, body: ReportBody) -> (u64, Vec<u8>) {
        let body = scrubbed(body);
        let seq = self.seq.fetch_add(1, Ordering::SeqCst) + 1;
        let report = Report {
            schema: SCHEMA,
            job: self.job,
            attempt: self.attempt,
            token: self.token,
            worker: self.worker.clone(),
            boot: self.boot,
            seq,
            at_ms: clock::now_ms(),
            body,
        };
        (seq, self.outbound.sign(&report))
    }

    /// A report that may be lost.
    fn tell(&self, body: ReportBody) {
        let (seq, body) = self.signed(body);
        let message_id = format!("{}.{seq}", self.attempt);
        self.outbound.report(Spooled { message_id, body, file: None, must_arrive: false });
    }

    /// The final report: on disk first. The disk may be busy with a backup, so it is written beside the runtime's threads.
    async fn finish(&self, body: ReportBody) {
        let (seq, mut body) = self.signed(body);
        if body.len() > PAYLOAD_MAX_BYTES {
            let what = format!("the job's result is too large to report ({} bytes)", body.len());
            let failure = Failure::bug(what);
            let (_, smaller) =
                self.signed(ReportBody::Failed { failure, outcome: None, steps: Vec::new() });
            body = smaller;
        }
        let (spool, attempt, copy) = (self.spool.clone(), self.attempt, body.clone());
        let kept = blocking(move || {
            spool.keep(attempt, seq, copy).map_err(|error| Failure::bug(error.to_string()))
        });
        let report = kept.await.unwrap_or_else(|failure| {
            tracing::error!(%failure, "Failed to keep a final report on disk; it is only in memory");
            let message_id = format!("{}.{seq}", self.attempt);
            Spooled { message_id, body, file: None, must_arrive: true }
        });
        self.outbound.report(report);
    }
}

/// A report without secrets in its texts: servers, drivers and libraries quote what they were given. The proof in an
/// outcome is signed by itself and was scrubbed when it was made.
fn scrubbed(mut body: ReportBody) -> ReportBody {
    let outcome = match &mut body {
        ReportBody::Started | ReportBody::Step(_) => None,
        ReportBody::Succeeded { outcome, .. } => Some(outcome),
        ReportBody::Failed { failure, outcome, .. } => {
            scrub_failure(failure);
            outcome.as_mut()
        }
    };
    let skipped = match outcome.map(AsMut::as_mut) {
        Some(Outcome::Analyze(done)) => &mut done.skipped,
        Some(Outcome::Vacuum(done)) => &mut done.skipped,
        // The command that archived before may be anything.
        Some(Outcome::EnableWal(done)) => {
            done.plan.iter_mut().for_each(scrub);
            return body;
        }
        // What a program said of a database that it could not dump.
        Some(Outcome::Backup(BackupOutcome { logical: Some(logical), .. })) => {
            logical.failed.iter_mut().for_each(|failed| scrub(&mut failed.why));
            return body;
        }
        Some(
            Outcome::Backup(_)
            | Outcome::VerifyRestore(_)
            | Outcome::Restore(_)
            | Outcome::Probe(_),
        )
        | None => return body,
    };
    for table in skipped {
        scrub(&mut table.reason);
    }
    body
}

/// Takes the secrets out of a failure that leaves this worker.
pub(crate) fn scrub_failure(failure: &mut Failure) {
    scrub(&mut failure.message);
    scrub(&mut failure.hint);
    failure.details.iter_mut().for_each(scrub);
}

fn scrub(text: &mut String) {
    if let Cow::Owned(clean) = telemetry::scrub(text) {
        *text = clean;
    }
}

/// Says that a grant came too late to be used.
pub(crate) fn hand_back(shared: &Shared, grant: &Grant) {
    let Some(job) = grant.spec.get("job").and_then(|id| id.as_str()?.parse().ok()) else {
        return;
    };
    let failure = Failure::new(
        Code::WorkerDraining,
        Action::Retry,
        "the grant arrived when the worker could not begin with it any more",
    );
    give_back(shared, Reporter::new(shared, job, grant), failure);
}

/// Starts a granted attempt in a task of its own.
pub(crate) fn start(shared: &Arc<Shared>, grant: &Grant, slot: Slot) {
    let spec: Spec = match serde_path_to_error::deserialize(&grant.spec) {
        Ok(spec) => spec,
        Err(error) => return refuse(shared, grant, &error.to_string()),
    };
    // A ticket is unsigned: what it said of the kind was only good for asking.
    let kind = spec.task.kind();
    if !shared.config.allows(kind, &spec.cluster) || spec.attempt != grant.attempt {
        let message = format!(
            "the configuration of worker {} does not allow {kind} for {}",
            shared.config.name, spec.cluster
        );
        let failure = Failure::new(Code::NotAllowed, Action::RetryElsewhere, message)
            .with_hint("Allow the kind in the worker's configuration, or use another worker.");
        give_back(shared, Reporter::new(shared, spec.job, grant), failure);
        return;
    }
    let reporter = Reporter::new(shared, spec.job, grant);
    let steps = reporter.clone();
    let sink = move |step: &Step| steps.tell(ReportBody::Step(step.clone()));
    let cx = JobContext::new(spec, Arc::new(sink));
    if !shared.attempts.begin(grant.attempt, grant.token, cx.clone()) {
        return;
    }
    reporter.tell(ReportBody::Started);
    let shared = Arc::clone(shared);
    let tracker = shared.jobs.clone();
    tracker.spawn(async move {
        run(&shared, &cx, &reporter).await;
        shared.attempts.end(cx.spec.attempt);
        drop(slot);
    });
}

/// A spec that is not understood must not run; another worker may be newer.
fn refuse(shared: &Shared, grant: &Grant, error: &str) {
    let Some(job) = grant.spec.get("job").and_then(|id| id.as_str()?.parse().ok()) else {
        tracing::error!(error, "A grant has a spec without a job");
        return;
    };
    let failure = Failure::new(
        Code::JobUnsupported,
        Action::RetryElsewhere,
        format!("worker {} does not understand the job: {error}", shared.config.name),
    )
    .with_hint("Upgrade the worker, or run the job on a newer one.");
    give_back(shared, Reporter::new(shared, job, grant), failure);
}

/// Reports an attempt that never began.
fn give_back(shared: &Shared, reporter: Reporter, failure: Failure) {
    shared.jobs.spawn(async move {
        let nothing = ReportBody::Failed { failure, outcome: None, steps: Vec::new() };
        reporter.finish(nothing).await;
    });
}

async fn run(shared: &Arc<Shared>, cx: &JobContext, reporter: &Reporter) {
    let kind = cx.spec.task.kind();
    let span = tracing::info_span!(
        "attempt",
        otel.name = kind.as_str(),
        job.id = %cx.spec.job,
        attempt.id = %cx.spec.attempt,
        cluster.name = %cx.spec.cluster,
    );
    if let Some(parent) = cx.spec.traceparent.as_deref().and_then(|text| text.parse().ok()) {
        let parent: TraceContext = parent;
        telemetry::set_parent(&span, &parent);
    }
    let ended = supervised(shared, cx).instrument(span).await;
    let steps = cx.steps();
    let body = match ended.result {
        Ok(outcome) => {
            tracing::info!(job.id = %cx.spec.job, "Finished {kind} of {}", cx.spec.cluster);
            ReportBody::Succeeded { outcome: Box::new(outcome), steps }
        }
        Err(failure) => {
            tracing::warn!(job.id = %cx.spec.job, %failure, "Failed {kind} of {}", cx.spec.cluster);
            ReportBody::Failed { failure, outcome: ended.found.map(Box::new), steps }
        }
    };
    reporter.finish(body).await;
}

/// Runs the job under its deadline; a panic in it becomes a failure, and a job that does not stop when told is dropped.
async fn supervised(shared: &Arc<Shared>, cx: &JobContext) -> Ended {
    let work = AssertUnwindSafe(jobs::run(shared, cx)).catch_unwind();
    tokio::pin!(work);
    let deadline = tokio::time::sleep(Duration::from_millis(cx.spec.deadline_ms));
    tokio::pin!(deadline);
    let dropped = |reason: Failure| Ended { result: Err(reason), found: None };
    let caught = |ended: Result<Ended, _>| {
        ended.unwrap_or_else(|_: Box<dyn std::any::Any + Send>| {
            dropped(Failure::bug("the job panicked; the worker's log says where"))
        })
    };
    tokio::select! {
        ended = &mut work => return caught(ended),
        () = cx.cancel.cancelled() => {}
        () = &mut deadline => cx.stop(
            Failure::new(
                Code::DeadlineExceeded,
                Action::Retry,
                format!("the job did not end within {} s", cx.spec.deadline_ms / 1_000),
            )
            .with_hint("Look at its steps for what took so long; raise the deadline if that is right."),
        ),
    }
    match tokio::time::timeout(CLEAN_UP_MAX, work).await {
        Ok(ended) => caught(ended),
        Err(_) => dropped(cx.stopped()),
    }
}

#[cfg(test)]
mod tests {
    use proto::job::{AnalyzeOutcome, SkippedTable};

    use super::*;

    #[test]
    fn no_secret_of_an_error_text_is_reported() {
        let text =
            "failed to reach postgres://backup:hunter2@db1/postgres: password=hunter2 was refused";
        let failure = Failure::new(Code::ServerUnreachable, Action::Retry, text).with_hint(text);
        let skipped = SkippedTable {
            database: "orders".parse().unwrap(),
            table: "public.orders".to_owned(),
            reason: text.to_owned(),
        };
        let outcome = AnalyzeOutcome { skipped: vec![skipped], ..AnalyzeOutcome::default() };
        let outcome = Box::new(Outcome::Analyze(outcome));
        let failed =
            ReportBody::Failed { failure, outcome: Some(outcome.clone()), steps: Vec::new() };
        let succeeded = ReportBody::Succeeded { outcome, steps: Vec::new() };
        for body in [failed, succeeded] {
            let report = serde_json::to_string(&scrubbed(body)).unwrap();
            assert!(!report.contains("hunter2"), "{report}");
            assert!(report.contains("db1") && report.contains("public.orders"), "{report}");
        }
    }
}
