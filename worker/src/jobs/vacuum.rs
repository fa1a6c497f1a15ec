//! Vacuums the tables whose estimated bloat is above a ratio. Obeys the plan it would print.

use maintenance::analyze;
use maintenance::vacuum::{self, PlanOptions};
use proto::job::{Vacuum, VacuumOutcome};
use proto::{Action, Code, Failure};

use super::databases::Maintained;
use crate::context::JobContext;
use crate::places::Places;

/// Runs a vacuum, or says what it would do.
pub(crate) async fn run(
    cx: &JobContext,
    places: &Places,
    task: &Vacuum,
) -> Result<VacuumOutcome, Failure> {
    if !(task.bloat_ratio_min >= 1.0 && task.bloat_ratio_min.is_finite()) {
        let message = format!("a bloat ratio of {} makes no sense", task.bloat_ratio_min);
        return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message)
            .with_hint("Give a ratio of at least 1.0; 2.0 is usual."));
    }
    let options = PlanOptions { bloat_ratio_min: task.bloat_ratio_min, ..PlanOptions::default() };
    let opened = Maintained::open(cx, places, task.databases.as_ref(), task.lock_timeout_ms);
    let maintained = cx.step("connect", opened).await?;
    let mut outcome = VacuumOutcome::default();
    for database in &maintained.databases {
        outcome.databases += 1;
        let step = format!("vacuum {database}");
        let result = cx
            .step_with(&step, |figures| {
                let (maintained, step, options) = (&maintained, &step, &options);
                async move {
                    let session = maintained.enter(database).await?;
                    let statistics = vacuum::read(&session).await.map_err(Failure::from)?;
                    let plan = vacuum::plan(&statistics, options);
                    if task.plan_only {
                        session.close().await;
                        return Ok((plan.lines(), None));
                    }
                    let mut tell = |progress: analyze::Progress<'_>| {
                        maintained.progress(step, progress.done, progress.total);
                    };
                    let limits = &maintained.limits;
                    let done =
                        vacuum::execute(&session, &plan, limits, &mut tell, &cx.cancel).await?;
                    session.close().await;
                    figures.figure("vacuumed", done.vacuumed.len() as u64);
                    figures.figure("skipped", done.skipped.len() as u64);
                    maintained.ended(done.ended)?;
                    Ok((Vec::new(), Some(done)))
                }
            })
            .await?;
        outcome.plan.extend(result.0);
        if let Some(done) = result.1 {
            outcome.vacuumed.extend(done.vacuumed);
            outcome.skipped.extend(done.skipped);
        }
    }
    maintained.close().await;
    Ok(maintenance::told::vacuum(outcome))
}
