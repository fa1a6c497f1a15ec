//! What a running job has at hand: its spec, the way to be cancelled, its steps and its progress.
//!
//! The same context serves a job from the queue and a command that runs without a coordinator: only where the steps go
//! differs.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::message::Spec;
use proto::{Action, Code, Failure, Progress, Step};
use telemetry::TraceContext;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::clock;

/// Where steps go as they begin and end.
pub type StepSink = Arc<dyn Fn(&Step) + Send + Sync>;

/// What a running job has at hand. Cloning shares it.
#[derive(Clone)]
pub struct JobContext {
    /// What to do, for whom.
    pub spec: Arc<Spec>,
    /// Fires when the job must stop; [`JobContext::stopped`] says why.
    pub cancel: CancellationToken,
    run: Arc<Run>,
}

struct Run {
    steps: Mutex<Vec<Step>>,
    progress: Mutex<Option<Progress>>,
    stop_reason: Mutex<Option<Failure>>,
    sink: StepSink,
    began: Instant,
}

impl std::fmt::Debug for JobContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JobContext").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl JobContext {
    /// A context whose steps go to `sink`.
    pub fn new(spec: Spec, sink: StepSink) -> Self {
        let run = Run {
            steps: Mutex::default(),
            progress: Mutex::default(),
            stop_reason: Mutex::default(),
            sink,
            began: Instant::now(),
        };
        Self { spec: Arc::new(spec), cancel: CancellationToken::new(), run: Arc::new(run) }
    }

    /// When the job's time is up; `None` when it has all the time that there is.
    pub fn ends_at(&self) -> Option<Instant> {
        self.run.began.checked_add(Duration::from_millis(self.spec.deadline_ms))
    }

    /// Tells the job to stop, with the failure it shall end in. The first reason counts.
    pub fn stop(&self, reason: Failure) {
        lock(&self.run.stop_reason).get_or_insert(reason);
        self.cancel.cancel();
    }

    /// The failure of a job that was told to stop.
    pub fn stopped(&self) -> Failure {
        lock(&self.run.stop_reason).clone().unwrap_or_else(|| {
            Failure::new(Code::Cancelled, Action::Abandon, "the job was told to stop")
        })
    }

    /// Fails when the job was told to stop.
    pub fn check(&self) -> Result<(), Failure> {
        if self.cancel.is_cancelled() { Err(self.stopped()) } else { Ok(()) }
    }

    /// Runs `work` until it ends or the job is told to stop. `work` is dropped then, so it must be safe to drop.
    pub async fn until_stopped<T>(&self, work: impl Future<Output = T>) -> Result<T, Failure> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(self.stopped()),
            done = work => Ok(done),
        }
    }

    /// Runs a named part of the job: a span, a timing and a row on the job's page.
    pub async fn step<T>(
        &self,
        name: &str,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let work = Box::pin(work);
        self.step_with(name, |_| work).await
    }

    /// Like [`JobContext::step`], for work that has figures to tell.
    pub async fn step_with<T, F>(
        &self,
        name: &str,
        work: impl FnOnce(StepHandle) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        self.check()?;
        let span = tracing::info_span!("step", otel.name = name, step = name);
        let span_id = TraceContext::of_span(&span).map_or_else(
            || format!("{:016x}", u64::from_be_bytes(clock::random::<8>())),
            |context| context.span_id().to_string(),
        );
        let index = self.begin_step(name, span_id);
        let handle = StepHandle { context: self.clone(), index };
        // On the heap: the future of a whole job would otherwise be moved through every frame of the stack.
        let result = Box::pin(async {
            self.until_stopped(crate::failpoint::reached(name)).await?;
            Box::pin(work(handle)).await
        });
        let result = result.instrument(span).await;
        self.end_step(index, result.is_err());
        result
    }

    /// Says how far the current step is.
    pub fn progress(&self, progress: Progress) {
        *lock(&self.run.progress) = Some(progress);
    }

    /// How far the current step is.
    pub fn current_progress(&self) -> Option<Progress> {
        lock(&self.run.progress).clone()
    }

    /// All steps so far.
    pub fn steps(&self) -> Vec<Step> {
        lock(&self.run.steps).clone()
    }

    fn begin_step(&self, name: &str, span_id: String) -> usize {
        let mut steps = lock(&self.run.steps);
        let index = steps.len();
        let step = Step {
            number: u32::try_from(index + 1).unwrap_or(u32::MAX),
            name: name.to_owned(),
            span_id,
            started_at_ms: clock::now_ms(),
            ended_at_ms: None,
            failed: false,
            figures: BTreeMap::new(),
        };
        steps.push(step.clone());
        drop(steps);
        *lock(&self.run.progress) = None;
        (self.run.sink)(&step);
        index
    }

    fn end_step(&self, index: usize, failed: bool) {
        let mut steps = lock(&self.run.steps);
        let step = &mut steps[index];
        step.ended_at_ms = Some(clock::now_ms().max(step.started_at_ms));
        step.failed = failed;
        let step = step.clone();
        drop(steps);
        (self.run.sink)(&step);
    }
}

/// Lets a step tell its figures.
#[derive(Debug, Clone)]
pub struct StepHandle {
    context: JobContext,
    index: usize,
}

impl StepHandle {
    /// Records a figure of this step; the last value counts.
    pub fn figure(&self, name: &str, value: u64) {
        let mut steps = lock(&self.context.run.steps);
        steps[self.index].figures.insert(name.to_owned(), value);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a blocking closure on tokio's blocking threads; a panic in it becomes a failure.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(result) => result,
        Err(error) => Err(Failure::bug(format!("a blocking part of the job ended badly: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use proto::job::Analyze;
    use proto::{AttemptId, JobId, Task};

    use super::*;

    fn context(sink: StepSink) -> JobContext {
        let spec = Spec {
            schema: 1,
            job: JobId::mint(1, [1; 10]),
            attempt: AttemptId::mint(1, [2; 10]),
            predecessor: None,
            cluster: "orders".parse().unwrap(),
            system_identifier: None,
            task: Task::Analyze(Analyze::default()),
            deadline_ms: 1_000,
            traceparent: None,
        };
        JobContext::new(spec, sink)
    }

    #[tokio::test]
    async fn steps_are_told_when_they_begin_and_when_they_end() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let cx = context(Arc::new(move |step: &Step| lock(&sink).push(step.clone())));
        let result = cx
            .step_with("copy", |step| async move {
                step.figure("files", 3);
                Ok::<_, Failure>(7)
            })
            .await;
        assert_eq!(result.unwrap(), 7);
        let failed = cx.step("commit", async { Err::<(), _>(Failure::bug("x")) }).await;
        assert!(failed.is_err());
        let seen = lock(&seen).clone();
        assert_eq!(seen.len(), 4);
        assert!(seen[0].ended_at_ms.is_none() && seen[1].ended_at_ms.is_some());
        assert_eq!(seen[1].figures["files"], 3);
        assert!(!seen[1].failed && seen[3].failed);
        assert_eq!(seen[3].number, 2);
    }

    #[tokio::test]
    async fn a_stopped_job_begins_no_further_step_and_tells_the_first_reason() {
        let cx = context(Arc::new(|_| {}));
        cx.stop(Failure::new(Code::DeadlineExceeded, Action::Retry, "late"));
        cx.stop(Failure::new(Code::Cancelled, Action::Abandon, "cancelled"));
        let result = cx.step("copy", async { Ok(()) }).await;
        assert_eq!(result.unwrap_err().code, Code::DeadlineExceeded);
        assert!(cx.steps().is_empty());
        assert!(cx.until_stopped(std::future::pending::<()>()).await.is_err());
    }
}
