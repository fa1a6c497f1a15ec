//! Refreshes the planner's statistics of every user table, partitioned parents included.

use maintenance::analyze::{self, AnalyzeOptions};
use proto::Failure;
use proto::job::{Analyze, AnalyzeOutcome};

use super::databases::Maintained;
use crate::context::JobContext;
use crate::places::Places;

/// Runs an analyze, or says what it would do.
pub(crate) async fn run(
    cx: &JobContext,
    places: &Places,
    task: &Analyze,
) -> Result<AnalyzeOutcome, Failure> {
    let opened = Maintained::open(cx, places, task.databases.as_ref(), task.lock_timeout_ms);
    let maintained = cx.step("connect", opened).await?;
    let mut outcome = AnalyzeOutcome::default();
    for database in &maintained.databases {
        outcome.databases += 1;
        let step = format!("analyze {database}");
        let result = cx
            .step_with(&step, |figures| {
                let (maintained, step) = (&maintained, &step);
                async move {
                    let session = maintained.enter(database).await?;
                    let statistics = analyze::read(&session).await.map_err(Failure::from)?;
                    let plan = analyze::plan(&statistics, &AnalyzeOptions::default());
                    if task.plan_only {
                        session.close().await;
                        return Ok((plan.lines(), None));
                    }
                    let mut tell = |progress: analyze::Progress<'_>| {
                        maintained.progress(step, progress.done, progress.total);
                    };
                    let limits = &maintained.limits;
                    let done =
                        analyze::execute(&session, &plan, limits, &mut tell, &cx.cancel).await?;
                    session.close().await;
                    figures.figure("analyzed", done.analyzed);
                    figures.figure("skipped", done.skipped.len() as u64);
                    maintained.ended(done.ended)?;
                    Ok((Vec::new(), Some(done)))
                }
            })
            .await?;
        outcome.plan.extend(result.0);
        if let Some(done) = result.1 {
            outcome.analyzed += done.analyzed;
            outcome.skipped.extend(done.skipped);
        }
    }
    maintained.close().await;
    Ok(maintenance::told::analyze(outcome))
}
