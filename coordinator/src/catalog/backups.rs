//! Backups and their proofs, as they were reported. The repository is the truth; this is the memory of it.

use proto::job::BackupOutcome;
use proto::proof::Proof;
use proto::{AttemptId, BackupId, ClusterName, JobId, WorkerName};
use sqlx::AnyConnection;

use super::Tx;
use super::row::{Row, json};
use crate::error::Result;

/// Proved backups of one cluster from which it is looked for how far they lead: the newest may lie on an abandoned branch.
const PROVED_MAX: i64 = 3;

/// What the proofs of a backup say of it together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown {
    /// None restored it.
    None,
    /// One restored it, and none found anything wrong since.
    Proved,
    /// The newest found something wrong.
    Bad,
}

impl Shown {
    fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Proved => "proved",
            Self::Bad => "bad",
        }
    }
}

impl std::str::FromStr for Shown {
    type Err = UnknownShown;

    fn from_str(text: &str) -> std::result::Result<Self, UnknownShown> {
        let all = [Self::None, Self::Proved, Self::Bad];
        all.into_iter().find(|shown| shown.as_str() == text).ok_or(UnknownShown)
    }
}

/// A text that is none of them.
#[derive(Debug, thiserror::Error)]
#[error("know what the proofs of a backup show")]
pub(crate) struct UnknownShown;

/// A committed backup.
#[derive(Debug, Clone)]
pub(crate) struct Backup {
    pub(crate) id: BackupId,
    pub(crate) job: JobId,
    pub(crate) cluster: ClusterName,
    pub(crate) worker: WorkerName,
    pub(crate) outcome: BackupOutcome,
    pub(crate) shown: Shown,
}

impl Backup {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            id: row.parsed("id")?,
            job: row.parsed("job")?,
            cluster: row.parsed("cluster")?,
            worker: row.parsed("worker")?,
            outcome: row.json("outcome")?,
            shown: row.parsed("shown")?,
        })
    }
}

/// Writes a backup once; the key is its id.
pub(crate) async fn put(tx: &mut Tx<'_>, backup: &Backup, now_ms: i64) -> Result<()> {
    sqlx::query(
        "-- put_backup
         INSERT INTO backups (id, job, cluster, worker, stopped_at_ms, recorded_at_ms, outcome, kind)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (id) DO NOTHING",
    )
    .bind(backup.id.to_string())
    .bind(backup.job.to_string())
    .bind(backup.cluster.as_str())
    .bind(backup.worker.as_str())
    .bind(backup.outcome.stopped_at_ms)
    .bind(now_ms)
    .bind(json(&backup.outcome))
    .bind(backup.outcome.kind().as_str())
    .execute(tx.db())
    .await?;
    Ok(())
}

/// Writes what the proofs of a backup say of it now.
pub(crate) async fn show(tx: &mut Tx<'_>, id: BackupId, shown: Shown) -> Result<()> {
    sqlx::query(
        "-- backup_shown
         UPDATE backups SET shown = $2 WHERE id = $1",
    )
    .bind(id.to_string())
    .bind(shown.as_str())
    .execute(tx.db())
    .await?;
    Ok(())
}

/// Newest first; every cluster's when `cluster` is empty.
pub(crate) async fn list(db: &mut AnyConnection, cluster: &str, limit: i64) -> Result<Vec<Backup>> {
    let rows = sqlx::query(
        "-- list_backups
         SELECT * FROM backups WHERE ($1 = '' OR cluster = $1) ORDER BY stopped_at_ms DESC, id DESC LIMIT $2",
    )
    .bind(cluster)
    .bind(limit)
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Backup::from_row(&Row(row))).collect()
}

pub(crate) async fn get(db: &mut AnyConnection, id: BackupId) -> Result<Option<Backup>> {
    let row = sqlx::query(
        "-- get_backup
         SELECT * FROM backups WHERE id = $1",
    )
    .bind(id.to_string())
    .fetch_optional(db)
    .await?;
    row.map(|row| Backup::from_row(&Row(row))).transpose()
}

/// The backup that each cluster is judged by: its newest physical one, or its newest logical one where it has no other.
pub(crate) async fn newest(db: &mut AnyConnection) -> Result<Vec<Backup>> {
    let rows = sqlx::query(
        "-- newest_backups
         SELECT * FROM backups AS b WHERE NOT EXISTS (
             SELECT 1 FROM backups AS later WHERE later.cluster = b.cluster
                 AND (later.kind > b.kind OR (later.kind = b.kind AND (later.stopped_at_ms > b.stopped_at_ms
                     OR (later.stopped_at_ms = b.stopped_at_ms AND later.id > b.id))))
         )",
    )
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Backup::from_row(&Row(row))).collect()
}

/// What each cluster can be recovered from: its newest proved backups, and the newest of those that nobody proved; newest first.
pub(crate) async fn sources(db: &mut AnyConnection) -> Result<Vec<Backup>> {
    let rows = sqlx::query(
        "-- recovery_sources
         SELECT * FROM (
             SELECT b.*, ROW_NUMBER() OVER (
                 PARTITION BY cluster, shown ORDER BY kind DESC, stopped_at_ms DESC, id DESC
             ) AS nth FROM backups AS b WHERE shown <> 'bad'
         ) AS ranked WHERE nth = 1 OR (shown = 'proved' AND nth <= $1)
         ORDER BY stopped_at_ms DESC, id DESC",
    )
    .bind(PROVED_MAX)
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Backup::from_row(&Row(row))).collect()
}

/// Proofs of each cluster's newest backup and of its newest proved ones, newest first.
pub(crate) async fn newest_proofs(db: &mut AnyConnection) -> Result<Vec<ProofRow>> {
    let rows = sqlx::query(
        "-- newest_proofs
         SELECT * FROM proofs WHERE backup IN (
             SELECT id FROM backups AS b WHERE NOT EXISTS (
                 SELECT 1 FROM backups AS later WHERE later.cluster = b.cluster
                     AND (later.kind > b.kind OR (later.kind = b.kind AND (later.stopped_at_ms > b.stopped_at_ms
                         OR (later.stopped_at_ms = b.stopped_at_ms AND later.id > b.id))))
             )
             UNION
             SELECT id FROM (
                 SELECT id, ROW_NUMBER() OVER (
                     PARTITION BY cluster ORDER BY kind DESC, stopped_at_ms DESC, id DESC
                 ) AS nth FROM backups WHERE shown = 'proved'
             ) AS ranked WHERE nth <= $1
         ) ORDER BY at_ms DESC, id DESC",
    )
    .bind(PROVED_MAX)
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| ProofRow::from_row(&Row(row))).collect()
}

/// A proof as it was reported.
#[derive(Debug, Clone)]
pub(crate) struct ProofRow {
    pub(crate) id: AttemptId,
    pub(crate) job: JobId,
    pub(crate) proof: Proof,
}

impl ProofRow {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self { id: row.parsed("id")?, job: row.parsed("job")?, proof: row.json("record")? })
    }
}

/// Writes a proof once; the key is the attempt that made it.
pub(crate) async fn put_proof(
    tx: &mut Tx<'_>,
    row: &ProofRow,
    cluster: &ClusterName,
    now_ms: i64,
) -> Result<()> {
    sqlx::query(
        "-- put_proof
         INSERT INTO proofs (id, job, backup, cluster, at_ms, recorded_at_ms, record)
         VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (id) DO NOTHING",
    )
    .bind(row.id.to_string())
    .bind(row.job.to_string())
    .bind(row.proof.backup.to_string())
    .bind(cluster.as_str())
    .bind(row.proof.at_ms)
    .bind(now_ms)
    .bind(json(&row.proof))
    .execute(tx.db())
    .await?;
    Ok(())
}

/// Newest first; every cluster's and every backup's when those are empty.
pub(crate) async fn list_proofs(
    db: &mut AnyConnection,
    cluster: &str,
    backup: &str,
    limit: i64,
) -> Result<Vec<ProofRow>> {
    let rows = sqlx::query(
        "-- list_proofs
         SELECT * FROM proofs WHERE ($1 = '' OR cluster = $1) AND ($2 = '' OR backup = $2)
         ORDER BY at_ms DESC, id DESC LIMIT $3",
    )
    .bind(cluster)
    .bind(backup)
    .bind(limit)
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| ProofRow::from_row(&Row(row))).collect()
}
