//! Jobs: what is wanted, where it stands, how it ended.

use std::collections::BTreeSet;

use proto::failure::Failure;
use proto::job::{JobKind, JobState, Lane, Outcome, Task};
use proto::{AttemptId, ClusterName, JobId, ProofLevel, WorkerName};
use serde::de::DeserializeOwned;
use sqlx::AnyConnection;

use super::Tx;
use super::row::{Row, json, maybe_json, maybe_text};
use crate::error::Result;

/// Restores of one cluster that are looked at: the last ones may have found files in place.
const RESTORED_MAX: i64 = 8;

/// One row. Changed in memory and written back by [`update`] within the transaction that read it.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) id: JobId,
    /// The caller's key, and the digest of what was asked under it: the same key asks for the same thing.
    pub(crate) idempotency_key: Option<String>,
    pub(crate) request_digest: Option<String>,
    pub(crate) cluster: ClusterName,
    pub(crate) lane: Lane,
    pub(crate) task: Task,
    pub(crate) state: JobState,
    /// Why it is in this state, for people.
    pub(crate) reason: Option<String>,
    pub(crate) only_worker: Option<WorkerName>,
    pub(crate) rather_not: Option<WorkerName>,
    /// Workers that may not or cannot do it; forgotten when they announce themselves anew.
    pub(crate) refused: BTreeSet<WorkerName>,
    pub(crate) requested_by: String,
    /// Grows with every change.
    pub(crate) version: i64,
    pub(crate) submitted_at_ms: i64,
    pub(crate) not_before_at_ms: i64,
    pub(crate) not_after_at_ms: Option<i64>,
    pub(crate) deadline_ms: i64,
    pub(crate) attempts_max: u32,
    /// Granted attempts.
    pub(crate) attempts_used: u32,
    pub(crate) traceparent: String,
    /// A backup that succeeds is proved to this level at once.
    pub(crate) verify: Option<ProofLevel>,
    pub(crate) follows: Option<JobId>,
    pub(crate) retry_of: Option<JobId>,
    /// The attempt a probe looks for.
    pub(crate) probe_of: Option<AttemptId>,
    /// The open attempt: ticketed, running or suspect.
    pub(crate) attempt: Option<AttemptId>,
    /// The last attempt that was granted, the predecessor of the next.
    pub(crate) last_attempt: Option<AttemptId>,
    pub(crate) started_at_ms: Option<i64>,
    pub(crate) ended_at_ms: Option<i64>,
    pub(crate) cancel_asked_at_ms: Option<i64>,
    pub(crate) failure: Option<Failure>,
    pub(crate) outcome: Option<Outcome>,
}

impl Job {
    pub(crate) fn kind(&self) -> JobKind {
        self.task.kind()
    }

    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            id: row.parsed("id")?,
            idempotency_key: row.maybe_text("idempotency_key")?,
            request_digest: row.maybe_text("request_digest")?,
            cluster: row.parsed("cluster")?,
            lane: lane(row)?,
            task: row.json("task")?,
            state: row.parsed("state")?,
            reason: row.maybe_text("reason")?,
            only_worker: row.maybe_parsed("only_worker")?,
            rather_not: row.maybe_parsed("rather_not")?,
            refused: row.json("refused")?,
            requested_by: row.text("requested_by")?,
            version: row.number("version")?,
            submitted_at_ms: row.number("submitted_at_ms")?,
            not_before_at_ms: row.number("not_before_at_ms")?,
            not_after_at_ms: row.maybe_number("not_after_at_ms")?,
            deadline_ms: row.number("deadline_ms")?,
            attempts_max: small(row.number("attempts_max")?),
            attempts_used: small(row.number("attempts_used")?),
            traceparent: row.text("traceparent")?,
            verify: row.maybe_parsed("verify")?,
            follows: row.maybe_parsed("follows")?,
            retry_of: row.maybe_parsed("retry_of")?,
            probe_of: row.maybe_parsed("probe_of")?,
            attempt: row.maybe_parsed("attempt")?,
            last_attempt: row.maybe_parsed("last_attempt")?,
            started_at_ms: row.maybe_number("started_at_ms")?,
            ended_at_ms: row.maybe_number("ended_at_ms")?,
            cancel_asked_at_ms: row.maybe_number("cancel_asked_at_ms")?,
            failure: row.maybe_json("failure")?,
            outcome: row.maybe_json("outcome")?,
        })
    }
}

/// A lane as it is stored: its name, as JSON has it.
pub(crate) fn lane(row: &Row) -> Result<Lane> {
    by_name(row, "lane")
}

fn by_name<T: DeserializeOwned>(row: &Row, column: &'static str) -> Result<T> {
    let name = serde_json::Value::String(row.text(column)?);
    serde_json::from_value(name).map_err(|source| row.stored(column, source))
}

fn small(number: i64) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

pub(crate) async fn insert(tx: &mut Tx<'_>, job: &Job) -> Result<()> {
    sqlx::query(
        "-- insert_job
         INSERT INTO jobs (
             id, idempotency_key, request_digest, cluster, kind, lane, task, state, reason, only_worker, rather_not,
             refused, requested_by, version, submitted_at_ms, not_before_at_ms, not_after_at_ms, deadline_ms,
             attempts_max, attempts_used, traceparent, verify, follows, retry_of, probe_of, last_attempt
         ) VALUES (
             $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11,
             $12, $13, $14, $15, $16, $17, $18,
             $19, $20, $21, $22, $23, $24, $25, $26
         )",
    )
    .bind(job.id.to_string())
    .bind(job.idempotency_key.clone())
    .bind(job.request_digest.clone())
    .bind(job.cluster.as_str())
    .bind(job.kind().as_str())
    .bind(job.lane.as_str())
    .bind(json(&job.task))
    .bind(job.state.as_str())
    .bind(job.reason.clone())
    .bind(maybe_text(job.only_worker.as_ref()))
    .bind(maybe_text(job.rather_not.as_ref()))
    .bind(json(&job.refused))
    .bind(job.requested_by.as_str())
    .bind(job.version)
    .bind(job.submitted_at_ms)
    .bind(job.not_before_at_ms)
    .bind(job.not_after_at_ms)
    .bind(job.deadline_ms)
    .bind(i64::from(job.attempts_max))
    .bind(i64::from(job.attempts_used))
    .bind(job.traceparent.as_str())
    .bind(maybe_text(job.verify.as_ref()))
    .bind(maybe_text(job.follows.as_ref()))
    .bind(maybe_text(job.retry_of.as_ref()))
    .bind(maybe_text(job.probe_of.as_ref()))
    .bind(maybe_text(job.last_attempt.as_ref()))
    .execute(tx.db())
    .await?;
    Ok(())
}

/// Writes everything that changes in the life of a job, and counts its version up.
pub(crate) async fn update(tx: &mut Tx<'_>, job: &Job) -> Result<()> {
    sqlx::query(
        "-- update_job
         UPDATE jobs SET
             state = $2, reason = $3, rather_not = $4, refused = $5, version = version + 1, not_before_at_ms = $6,
             attempts_used = $7, attempt = $8, last_attempt = $9, started_at_ms = $10, ended_at_ms = $11,
             cancel_asked_at_ms = $12, failure = $13, outcome = $14
         WHERE id = $1",
    )
    .bind(job.id.to_string())
    .bind(job.state.as_str())
    .bind(job.reason.clone())
    .bind(maybe_text(job.rather_not.as_ref()))
    .bind(json(&job.refused))
    .bind(job.not_before_at_ms)
    .bind(i64::from(job.attempts_used))
    .bind(maybe_text(job.attempt.as_ref()))
    .bind(maybe_text(job.last_attempt.as_ref()))
    .bind(job.started_at_ms)
    .bind(job.ended_at_ms)
    .bind(job.cancel_asked_at_ms)
    .bind(maybe_json(job.failure.as_ref()))
    .bind(maybe_json(job.outcome.as_ref()))
    .execute(tx.db())
    .await?;
    Ok(())
}

/// Counts the version up because something that is shown with the job changed elsewhere.
pub(crate) async fn touch(tx: &mut Tx<'_>, job: JobId) -> Result<()> {
    sqlx::query(
        "-- touch_job
         UPDATE jobs SET version = version + 1 WHERE id = $1",
    )
    .bind(job.to_string())
    .execute(tx.db())
    .await?;
    Ok(())
}

pub(crate) async fn get(db: &mut AnyConnection, id: JobId) -> Result<Option<Job>> {
    let row = sqlx::query(
        "-- get_job
         SELECT * FROM jobs WHERE id = $1",
    )
    .bind(id.to_string())
    .fetch_optional(db)
    .await?;
    row.map(|row| Job::from_row(&Row(row))).transpose()
}

pub(crate) async fn by_idempotency_key(db: &mut AnyConnection, key: &str) -> Result<Option<Job>> {
    let row = sqlx::query(
        "-- job_by_idempotency_key
         SELECT * FROM jobs WHERE idempotency_key = $1",
    )
    .bind(key)
    .fetch_optional(db)
    .await?;
    row.map(|row| Job::from_row(&Row(row))).transpose()
}

/// What a list of jobs shows: newest first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    pub(crate) cluster: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) state: Option<String>,
    pub(crate) before: Option<JobId>,
    pub(crate) limit: i64,
}

pub(crate) async fn list(db: &mut AnyConnection, filter: &Filter) -> Result<Vec<Job>> {
    let rows = sqlx::query(
        "-- list_jobs
         SELECT * FROM jobs
         WHERE ($1 = '' OR cluster = $1) AND ($2 = '' OR kind = $2) AND ($3 = '' OR state = $3)
             AND ($4 = '' OR id < $4)
         ORDER BY id DESC LIMIT $5",
    )
    .bind(filter.cluster.clone().unwrap_or_default())
    .bind(filter.kind.clone().unwrap_or_default())
    .bind(filter.state.clone().unwrap_or_default())
    .bind(maybe_text(filter.before.as_ref()).unwrap_or_default())
    .bind(filter.limit)
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Job::from_row(&Row(row))).collect()
}

/// Jobs of a lane that want an attempt and have none, the oldest first; only those that nobody has looked at yet when
/// `unseen` is set.
pub(crate) async fn ready(
    db: &mut AnyConnection,
    lane: Lane,
    unseen: bool,
    now_ms: i64,
) -> Result<Vec<Job>> {
    let rows = sqlx::query(
        "-- ready_jobs
         SELECT * FROM jobs
         WHERE state IN ('queued', 'waiting') AND lane = $1 AND attempt IS NULL
             AND not_before_at_ms <= $2 AND ($3 = 0 OR reason IS NULL)
         ORDER BY id",
    )
    .bind(lane.as_str())
    .bind(now_ms)
    .bind(i64::from(unseen))
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Job::from_row(&Row(row))).collect()
}

/// The next moment at which a waiting job becomes ready or is missed.
pub(crate) async fn next_due(db: &mut AnyConnection, now_ms: i64) -> Result<Option<i64>> {
    let row = sqlx::query(
        "-- next_due
         SELECT MIN(at_ms) AS at_ms FROM (
             SELECT not_before_at_ms AS at_ms FROM jobs
             WHERE state IN ('queued', 'waiting') AND attempt IS NULL AND not_before_at_ms > $1
             UNION ALL
             SELECT not_after_at_ms FROM jobs
             WHERE state IN ('queued', 'waiting') AND not_after_at_ms IS NOT NULL AND started_at_ms IS NULL
             UNION ALL
             SELECT ticket_until_at_ms FROM attempts WHERE state = 'ticketed'
         ) AS moments",
    )
    .bind(now_ms)
    .fetch_one(db)
    .await?;
    Row(row).maybe_number("at_ms")
}

/// Jobs whose time passed before anybody could run them.
pub(crate) async fn overdue(tx: &mut Tx<'_>, now_ms: i64) -> Result<Vec<Job>> {
    let rows = sqlx::query(
        "-- overdue_jobs
         SELECT * FROM jobs
         WHERE state IN ('queued', 'waiting') AND not_after_at_ms <= $1 AND started_at_ms IS NULL",
    )
    .bind(now_ms)
    .fetch_all(tx.db())
    .await?;
    rows.into_iter().map(|row| Job::from_row(&Row(row))).collect()
}

/// Jobs in a state.
pub(crate) async fn in_state(db: &mut AnyConnection, state: JobState) -> Result<Vec<Job>> {
    let rows = sqlx::query(
        "-- jobs_in_state
         SELECT * FROM jobs WHERE state = $1 ORDER BY id",
    )
    .bind(state.as_str())
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Job::from_row(&Row(row))).collect()
}

/// Jobs that go on where this one ended.
pub(crate) async fn followers(db: &mut AnyConnection, job: JobId) -> Result<Vec<JobId>> {
    let rows = sqlx::query(
        "-- followers
         SELECT id FROM jobs WHERE follows = $1 ORDER BY id",
    )
    .bind(job.to_string())
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Row(row).parsed("id")).collect()
}

/// The newest job of a kind that ended, for each cluster: how the last backup went.
pub(crate) async fn last_ended(db: &mut AnyConnection, kind: JobKind) -> Result<Vec<Job>> {
    let rows = sqlx::query(
        "-- last_ended
         SELECT * FROM jobs WHERE id IN (
             SELECT MAX(id) FROM jobs
             WHERE kind = $1 AND state IN ('succeeded', 'failed', 'lost', 'missed') GROUP BY cluster
         )",
    )
    .bind(kind.as_str())
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Job::from_row(&Row(row))).collect()
}

/// A restore that succeeded.
#[derive(Debug)]
pub(crate) struct Restored {
    pub(crate) job: Job,
    /// How long its attempt wrote files, by its worker's clock.
    pub(crate) restore_ms: i64,
}

/// The newest restores of each cluster that succeeded and were more than a plan, newest first; only one cluster's when `cluster` is
/// not empty.
pub(crate) async fn restored(db: &mut AnyConnection, cluster: &str) -> Result<Vec<Restored>> {
    let rows = sqlx::query(
        "-- restored
         SELECT * FROM (
             SELECT j.*, s.ended_at_ms - s.started_at_ms AS restore_ms,
                 ROW_NUMBER() OVER (PARTITION BY j.cluster ORDER BY j.id DESC) AS nth
             FROM jobs AS j
             JOIN attempts AS a ON a.job = j.id AND a.state = 'succeeded'
             JOIN steps AS s ON s.attempt = a.id AND s.name = 'restore' AND s.failed = 0 AND s.ended_at_ms IS NOT NULL
             WHERE j.state = 'succeeded' AND j.kind = 'restore' AND ($1 = '' OR j.cluster = $1)
         ) AS restores WHERE nth <= $2 ORDER BY id DESC",
    )
    .bind(cluster)
    .bind(RESTORED_MAX)
    .fetch_all(db)
    .await?;
    let restored = rows.into_iter().map(|row| {
        let row = Row(row);
        Ok(Restored { job: Job::from_row(&row)?, restore_ms: row.number("restore_ms")? })
    });
    restored.collect()
}

/// How many unfinished jobs there are, by kind and state.
pub(crate) async fn counts(db: &mut AnyConnection) -> Result<Vec<(JobKind, JobState, i64)>> {
    let rows = sqlx::query(
        "-- count_jobs
         SELECT kind, state, COUNT(*) AS jobs FROM jobs
         WHERE state IN ('queued', 'waiting', 'running', 'cancelling') GROUP BY kind, state",
    )
    .fetch_all(db)
    .await?;
    rows.into_iter()
        .map(|row| {
            let row = Row(row);
            Ok((row.parsed("kind")?, row.parsed("state")?, row.number("jobs")?))
        })
        .collect()
}

/// Forgets the refusals of a worker that announced itself anew.
pub(crate) async fn forget_refusals(tx: &mut Tx<'_>, worker: &WorkerName) -> Result<()> {
    let pattern = format!("%\"{worker}\"%");
    let rows = sqlx::query(
        "-- refused_jobs
         SELECT * FROM jobs WHERE state IN ('queued', 'waiting') AND refused LIKE $1",
    )
    .bind(pattern)
    .fetch_all(tx.db())
    .await?;
    for row in rows {
        let mut job = Job::from_row(&Row(row))?;
        job.refused.remove(worker);
        update(tx, &job).await?;
    }
    Ok(())
}
