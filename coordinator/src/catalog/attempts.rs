//! Attempts: who was asked to run a job, who may, and until when it counts as alive.

use std::fmt;
use std::str::FromStr;

use proto::failure::Failure;
use proto::job::{JobKind, Lane};
use proto::step::Progress;
use proto::{AttemptId, BootId, ClusterName, JobId, SiteName, WorkerName};
use sqlx::AnyConnection;

use super::Tx;
use super::jobs::lane;
use super::row::{Row, maybe_json, maybe_text};
use crate::error::Result;

macro_rules! attempt_states {
    ($($(#[$doc:meta])* $state:ident = $text:literal,)*) => {
        /// Where an attempt stands.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum AttemptState {
            $($(#[$doc])* $state,)*
        }

        impl AttemptState {
            pub(crate) fn as_str(self) -> &'static str {
                match self { $(Self::$state => $text,)* }
            }
        }

        impl FromStr for AttemptState {
            type Err = UnknownAttemptState;
            fn from_str(text: &str) -> std::result::Result<Self, UnknownAttemptState> {
                match text {
                    $($text => Ok(Self::$state),)*
                    _ => Err(UnknownAttemptState),
                }
            }
        }
    };
}

attempt_states! {
    /// A ticket is out, or on its way.
    Ticketed = "ticketed",
    /// A worker holds the grant.
    Running = "running",
    /// Its lease ran out; evidence is being sought.
    Suspect = "suspect",
    /// It worked.
    Succeeded = "succeeded",
    /// It did not work.
    Failed = "failed",
    /// It stopped because it was asked to.
    Cancelled = "cancelled",
    /// It is gone.
    Lost = "lost",
    /// Never granted: its worker gave the ticket back.
    Declined = "declined",
    /// Never granted, and not wanted any more.
    Superseded = "superseded",
}

#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("know this state of an attempt")]
pub(crate) struct UnknownAttemptState;

impl fmt::Display for AttemptState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl AttemptState {
    /// Whether a worker holds a grant for it.
    pub(crate) fn is_granted(self) -> bool {
        matches!(self, Self::Running | Self::Suspect)
    }
}

/// One row. Changed in memory and written back by [`update`] within the transaction that read it.
#[derive(Debug, Clone)]
pub(crate) struct Attempt {
    pub(crate) id: AttemptId,
    pub(crate) job: JobId,
    pub(crate) cluster: ClusterName,
    pub(crate) kind: JobKind,
    pub(crate) lane: Lane,
    pub(crate) state: AttemptState,
    pub(crate) reason: Option<String>,
    pub(crate) predecessor: Option<AttemptId>,
    /// The routing key of its ticket.
    pub(crate) queue: String,
    /// Who may claim it: this worker, or any of this site.
    pub(crate) target_worker: Option<WorkerName>,
    pub(crate) target_site: Option<SiteName>,
    pub(crate) created_at_ms: i64,
    pub(crate) ticket_until_at_ms: i64,
    pub(crate) tickets_sent: i64,
    /// Whoever holds the grant.
    pub(crate) worker: Option<WorkerName>,
    pub(crate) boot: Option<BootId>,
    pub(crate) nonce: Option<String>,
    pub(crate) token: Option<i64>,
    /// The signed grant, to be sent again when the same claim comes again.
    pub(crate) grant: Option<String>,
    pub(crate) granted_at_ms: Option<i64>,
    pub(crate) lease_until_at_ms: Option<i64>,
    /// When a pulse last listed it.
    pub(crate) listed_at_ms: Option<i64>,
    pub(crate) progress: Option<Progress>,
    pub(crate) started_at_ms: Option<i64>,
    pub(crate) ended_at_ms: Option<i64>,
    pub(crate) suspect_at_ms: Option<i64>,
    /// The newest probe for it.
    pub(crate) probe: Option<JobId>,
    pub(crate) probe_at_ms: Option<i64>,
    pub(crate) failure: Option<Failure>,
}

impl Attempt {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            id: row.parsed("id")?,
            job: row.parsed("job")?,
            cluster: row.parsed("cluster")?,
            kind: row.parsed("kind")?,
            lane: lane(row)?,
            state: row.parsed("state")?,
            reason: row.maybe_text("reason")?,
            predecessor: row.maybe_parsed("predecessor")?,
            queue: row.text("queue")?,
            target_worker: row.maybe_parsed("target_worker")?,
            target_site: row.maybe_parsed("target_site")?,
            created_at_ms: row.number("created_at_ms")?,
            ticket_until_at_ms: row.number("ticket_until_at_ms")?,
            tickets_sent: row.number("tickets_sent")?,
            worker: row.maybe_parsed("worker")?,
            boot: row.maybe_parsed("boot")?,
            nonce: row.maybe_text("nonce")?,
            token: row.maybe_number("token")?,
            grant: row.maybe_text("grant_text")?,
            granted_at_ms: row.maybe_number("granted_at_ms")?,
            lease_until_at_ms: row.maybe_number("lease_until_at_ms")?,
            listed_at_ms: row.maybe_number("listed_at_ms")?,
            progress: row.maybe_json("progress")?,
            started_at_ms: row.maybe_number("started_at_ms")?,
            ended_at_ms: row.maybe_number("ended_at_ms")?,
            suspect_at_ms: row.maybe_number("suspect_at_ms")?,
            probe: row.maybe_parsed("probe")?,
            probe_at_ms: row.maybe_number("probe_at_ms")?,
            failure: row.maybe_json("failure")?,
        })
    }
}

pub(crate) async fn insert(tx: &mut Tx<'_>, attempt: &Attempt) -> Result<()> {
    sqlx::query(
        "-- insert_attempt
         INSERT INTO attempts (
             id, job, cluster, kind, class, lane, state, predecessor, queue, target_worker, target_site,
             created_at_ms, ticket_until_at_ms, tickets_sent
         ) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
    )
    .bind(attempt.id.to_string())
    .bind(attempt.job.to_string())
    .bind(attempt.cluster.as_str())
    .bind(attempt.kind.as_str())
    .bind(policy::class_of(attempt.kind).as_str())
    .bind(attempt.lane.as_str())
    .bind(attempt.state.as_str())
    .bind(maybe_text(attempt.predecessor.as_ref()))
    .bind(attempt.queue.as_str())
    .bind(maybe_text(attempt.target_worker.as_ref()))
    .bind(maybe_text(attempt.target_site.as_ref()))
    .bind(attempt.created_at_ms)
    .bind(attempt.ticket_until_at_ms)
    .bind(attempt.tickets_sent)
    .execute(tx.db())
    .await?;
    Ok(())
}

/// Writes everything that changes in the life of an attempt.
pub(crate) async fn update(tx: &mut Tx<'_>, attempt: &Attempt) -> Result<()> {
    sqlx::query(
        "-- update_attempt
         UPDATE attempts SET
             state = $2, reason = $3, ticket_until_at_ms = $4, tickets_sent = $5, worker = $6, boot = $7, nonce = $8,
             token = $9, grant_text = $10, granted_at_ms = $11, lease_until_at_ms = $12, listed_at_ms = $13,
             progress = $14, started_at_ms = $15, ended_at_ms = $16, suspect_at_ms = $17, probe = $18,
             probe_at_ms = $19, failure = $20
         WHERE id = $1",
    )
    .bind(attempt.id.to_string())
    .bind(attempt.state.as_str())
    .bind(attempt.reason.clone())
    .bind(attempt.ticket_until_at_ms)
    .bind(attempt.tickets_sent)
    .bind(maybe_text(attempt.worker.as_ref()))
    .bind(maybe_text(attempt.boot.as_ref()))
    .bind(attempt.nonce.clone())
    .bind(attempt.token)
    .bind(attempt.grant.clone())
    .bind(attempt.granted_at_ms)
    .bind(attempt.lease_until_at_ms)
    .bind(attempt.listed_at_ms)
    .bind(maybe_json(attempt.progress.as_ref()))
    .bind(attempt.started_at_ms)
    .bind(attempt.ended_at_ms)
    .bind(attempt.suspect_at_ms)
    .bind(maybe_text(attempt.probe.as_ref()))
    .bind(attempt.probe_at_ms)
    .bind(maybe_json(attempt.failure.as_ref()))
    .execute(tx.db())
    .await?;
    Ok(())
}

pub(crate) async fn get(db: &mut AnyConnection, id: AttemptId) -> Result<Option<Attempt>> {
    let row = sqlx::query(
        "-- get_attempt
         SELECT * FROM attempts WHERE id = $1",
    )
    .bind(id.to_string())
    .fetch_optional(db)
    .await?;
    row.map(|row| Attempt::from_row(&Row(row))).transpose()
}

pub(crate) async fn of_job(db: &mut AnyConnection, job: JobId) -> Result<Vec<Attempt>> {
    let rows = sqlx::query(
        "-- attempts_of_job
         SELECT * FROM attempts WHERE job = $1 ORDER BY created_at_ms, id",
    )
    .bind(job.to_string())
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Attempt::from_row(&Row(row))).collect()
}

/// Attempts that some worker holds a grant for.
pub(crate) async fn granted(db: &mut AnyConnection) -> Result<Vec<Attempt>> {
    let rows = sqlx::query(
        "-- granted_attempts
         SELECT * FROM attempts WHERE state IN ('running', 'suspect') ORDER BY id",
    )
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Attempt::from_row(&Row(row))).collect()
}

/// Attempts this worker holds a grant for.
pub(crate) async fn granted_to(
    db: &mut AnyConnection,
    worker: &WorkerName,
) -> Result<Vec<Attempt>> {
    let rows = sqlx::query(
        "-- granted_to
         SELECT * FROM attempts WHERE worker = $1 AND state IN ('running', 'suspect') ORDER BY id",
    )
    .bind(worker.as_str())
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Attempt::from_row(&Row(row))).collect()
}

/// The attempt of a class that a worker holds a grant for on a cluster; at most one.
pub(crate) async fn granted_in_class(
    db: &mut AnyConnection,
    cluster: &ClusterName,
    kind: JobKind,
) -> Result<Option<Attempt>> {
    let row = sqlx::query(
        "-- granted_in_class
         SELECT * FROM attempts WHERE cluster = $1 AND class = $2 AND state IN ('running', 'suspect')",
    )
    .bind(cluster.as_str())
    .bind(policy::class_of(kind).as_str())
    .fetch_optional(db)
    .await?;
    row.map(|row| Attempt::from_row(&Row(row))).transpose()
}

/// Attempts whose ticket is out.
pub(crate) async fn ticketed(db: &mut AnyConnection) -> Result<Vec<Attempt>> {
    let rows = sqlx::query(
        "-- ticketed_attempts
         SELECT * FROM attempts WHERE state = 'ticketed' ORDER BY id",
    )
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Attempt::from_row(&Row(row))).collect()
}
