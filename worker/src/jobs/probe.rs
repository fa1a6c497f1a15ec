//! Looks for evidence of another attempt: its sessions on the server, its verdict in the repository.
//!
//! Changes nothing, except that it ends those sessions when asked to.

use postgres::connect::application_name;
use postgres::{Purpose, connect_maintenance};
use proto::job::{Probe, ProbeOutcome, SeenVerdict};
use proto::{Action, AttemptId, Code, Failure};
use repository::Outcome;

use super::session_owner;
use crate::context::JobContext;
use crate::places::{Cluster, Places};

/// Runs a probe. Not being able to look somewhere is part of its answer, not a failure.
pub(crate) async fn run(
    cx: &JobContext,
    places: &Places,
    task: &Probe,
) -> Result<ProbeOutcome, Failure> {
    let mut outcome = ProbeOutcome::default();
    if let Ok(cluster) = places.cluster(&cx.spec.cluster) {
        let looked = cx
            .step("look_at_server", async {
                // An unreachable server is an answer: nobody could look.
                Ok(sessions(cx, cluster, task).await.inspect_err(|error| {
                    tracing::warn!(%error, "A probe could not look at the server");
                }))
            })
            .await?;
        if let Ok((seen, terminated)) = looked {
            outcome.sessions = Some(seen);
            outcome.terminated = terminated;
        }
    }
    let verdict = cx
        .step("look_at_repository", async {
            Ok(verdict(cx, places, task.attempt).await.inspect_err(|error| {
                tracing::warn!(%error, "A probe could not look at the repository");
            }))
        })
        .await?;
    outcome.verdict = verdict.ok();
    Ok(outcome)
}

async fn sessions(cx: &JobContext, cluster: &Cluster, task: &Probe) -> Result<(u32, u32), Failure> {
    let purpose = Purpose::ask(&session_owner(cx.spec.attempt));
    let session = connect_maintenance(&cluster.target, &purpose).await?;
    let server = session.identity().await?;
    let not_here = || {
        Failure::new(
            Code::SystemIdentifierMismatch,
            Action::RetryElsewhere,
            "this is not the server that the attempt worked on",
        )
    };
    if cx.spec.system_identifier.is_some_and(|id| id != server.system_identifier) {
        session.close().await;
        return Err(not_here());
    }
    let name = application_name(&session_owner(task.attempt));
    let sql = "-- probe: sessions of an attempt, ended when asked
        SELECT count(*)::int4 AS seen,
               count(*) FILTER (WHERE $2 AND pg_terminate_backend(pid))::int4 AS terminated
          FROM pg_stat_activity
         WHERE application_name = $1 AND pid <> pg_backend_pid()";
    let row = session.one("look for sessions", sql, &[&name, &task.terminate]).await?;
    let count = |column| u32::try_from(row.get::<_, i32>(column)).unwrap_or(0);
    let counted = (count("seen"), count("terminated"));
    session.close().await;
    // Most jobs work on the primary: what a standby shows is evidence, its silence is none.
    if server.in_recovery && counted.0 == 0 { Err(not_here()) } else { Ok(counted) }
}

async fn verdict(
    cx: &JobContext,
    places: &Places,
    attempt: AttemptId,
) -> Result<SeenVerdict, Failure> {
    let repository = places.repository_for(&cx.spec.cluster).await?;
    let Some(lineage) = repository.lineage_of(attempt).await? else {
        return Ok(SeenVerdict::Unknown);
    };
    let verdict = repository.verdict(lineage, attempt).await?;
    Ok(match verdict.map(|verdict| verdict.outcome) {
        None => SeenVerdict::Open,
        Some(Outcome::Commit { .. }) => SeenVerdict::Commit,
        Some(Outcome::Abort { .. }) => SeenVerdict::Abort,
    })
}
