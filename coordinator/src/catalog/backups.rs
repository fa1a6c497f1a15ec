//! Backups and their proofs, as they were reported. The repository is the truth; this is the memory of it.

use std::collections::{HashMap, HashSet};

use proto::copies::BackupCopy;
use proto::job::{BackupOutcome, Task};
use proto::message::Holdings;
use proto::proof::Proof;
use proto::{AttemptId, BackupId, ClusterName, JobId, WorkerName};
use sqlx::AnyConnection;

use super::Tx;
use super::row::{Row, json};
use crate::error::Result;

/// Proved backups of one cluster from which it is looked for how far they lead: the newest may lie on an abandoned branch, or
/// before WAL that is broken.
const PROVED_MAX: usize = 3;
/// Ids in one statement.
pub(super) const IDS_MAX: usize = 500;
/// Backups, or proofs, that are judged anew in one transaction.
const JUDGED_AT_ONCE: i64 = 200;

/// What the proofs of a backup say of it together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown {
    /// Nobody has looked at its proofs yet, which an earlier program wrote.
    Unjudged,
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
            Self::Unjudged => "unjudged",
            Self::None => "none",
            Self::Proved => "proved",
            Self::Bad => "bad",
        }
    }
}

impl std::str::FromStr for Shown {
    type Err = UnknownShown;

    fn from_str(text: &str) -> std::result::Result<Self, UnknownShown> {
        let all = [Self::Unjudged, Self::None, Self::Proved, Self::Bad];
        all.into_iter().find(|shown| shown.as_str() == text).ok_or(UnknownShown)
    }
}

/// A text that is none of them.
#[derive(Debug, thiserror::Error)]
#[error("know what the proofs of a backup show")]
pub(crate) struct UnknownShown;

/// What a backup is worth to its cluster. Of several the better one counts, and a part counts for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Worth {
    /// A dump that leaves out some of its databases.
    Part,
    /// A dump of all of them.
    Dump,
    /// A physical one.
    Whole,
}

impl Worth {
    /// Of a backup that `task` ordered, where that is known. A worker that does not say what a dump leaves out left out what
    /// it was told to.
    pub(crate) fn of(outcome: &BackupOutcome, task: Option<&Task>) -> Self {
        let Some(logical) = &outcome.logical else { return Self::Whole };
        let chosen = match task {
            Some(Task::Backup(order)) => order
                .pg_dump
                .as_ref()
                .is_some_and(|scope| !scope.databases.is_empty() || !scope.exclude.is_empty()),
            _ => false,
        };
        match logical.left_out {
            Some(0) => Self::Dump,
            None if !chosen => Self::Dump,
            Some(_) | None => Self::Part,
        }
    }

    fn number(self) -> i64 {
        match self {
            Self::Part => 0,
            Self::Dump => 1,
            Self::Whole => 2,
        }
    }

    fn of_number(number: i64) -> Self {
        match number {
            2 => Self::Whole,
            1 => Self::Dump,
            _ => Self::Part,
        }
    }
}

/// A committed backup.
#[derive(Debug, Clone)]
pub(crate) struct Backup {
    pub(crate) id: BackupId,
    pub(crate) job: JobId,
    pub(crate) cluster: ClusterName,
    pub(crate) worker: WorkerName,
    pub(crate) outcome: BackupOutcome,
    pub(crate) shown: Shown,
    pub(crate) worth: Worth,
    /// Since when it is known that its repository has it no more.
    pub(crate) gone_at_ms: Option<i64>,
    /// Where copies of it are, as repositories say that have it.
    pub(crate) copies: Vec<BackupCopy>,
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
            worth: Worth::of_number(row.number("worth")?),
            gone_at_ms: row.maybe_number("gone_at_ms")?,
            copies: row.maybe_json("copies")?.unwrap_or_default(),
        })
    }
}

/// Writes a backup once; the key is its id.
pub(crate) async fn put(tx: &mut Tx<'_>, backup: &Backup, now_ms: i64) -> Result<()> {
    sqlx::query(
        "-- put_backup
         INSERT INTO backups (id, job, cluster, worker, stopped_at_ms, recorded_at_ms, outcome, kind, worth, judged)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 1) ON CONFLICT (id) DO NOTHING",
    )
    .bind(backup.id.to_string())
    .bind(backup.job.to_string())
    .bind(backup.cluster.as_str())
    .bind(backup.worker.as_str())
    .bind(backup.outcome.stopped_at_ms)
    .bind(now_ms)
    .bind(json(&backup.outcome))
    .bind(backup.outcome.kind().as_str())
    .bind(backup.worth.number())
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
    by_text(db, &id.to_string()).await
}

/// The backup that each cluster is judged by: its newest physical one, or its newest logical one where it has no other. Only one
/// cluster's when `cluster` is not empty.
pub(crate) async fn newest(db: &mut AnyConnection, cluster: &str) -> Result<Vec<Backup>> {
    let text = format!("-- newest_backups\n{}", of_clusters(NEWEST));
    let rows = sqlx::query(sqlx::AssertSqlSafe(text)).bind(cluster).fetch_all(db).await?;
    rows.into_iter().map(|row| Backup::from_row(&Row(row))).collect()
}

/// The newest dump of each cluster, whatever it leaves out; only one cluster's when `cluster` is not empty.
pub(crate) async fn newest_dumps(db: &mut AnyConnection, cluster: &str) -> Result<Vec<Backup>> {
    let rows = sqlx::query(sqlx::AssertSqlSafe(text_of_dumps()));
    let rows = rows.bind(cluster).fetch_all(db).await?;
    let mut newest: HashMap<ClusterName, Backup> = HashMap::new();
    for row in rows {
        let dump = Backup::from_row(&Row(row))?;
        let at = |dump: &Backup| (dump.outcome.stopped_at_ms, dump.id);
        if newest.get(&dump.cluster).is_none_or(|other| at(other) < at(&dump)) {
            newest.insert(dump.cluster.clone(), dump);
        }
    }
    Ok(newest.into_values().collect())
}

pub(super) fn text_of_dumps() -> String {
    let each = [Worth::Part, Worth::Dump].map(|worth| {
        of_clusters(&format!(
            "SELECT id FROM backups WHERE cluster = c.name AND worth = {} AND gone_at_ms IS NULL \
             ORDER BY stopped_at_ms DESC, id DESC LIMIT 1",
            worth.number()
        ))
    });
    format!("-- newest_dumps\n{}", each.join(" UNION ALL "))
}

/// What each cluster can be recovered from: its newest proved backups, and the newest of those that nobody proved; newest first.
pub(crate) async fn sources(db: &mut AnyConnection, cluster: &str) -> Result<Vec<Backup>> {
    let rows = sqlx::query(sqlx::AssertSqlSafe(text_of_sources()));
    let rows = rows.bind(cluster).fetch_all(db).await?;
    rows.into_iter().map(|row| Backup::from_row(&Row(row))).collect()
}

pub(super) fn text_of_sources() -> String {
    let each: Vec<String> = each_source().map(|id| of_clusters(&id)).collect();
    let each = each.join(" UNION ALL ");
    format!("-- recovery_sources\n{each} ORDER BY stopped_at_ms DESC, id DESC")
}

/// The backups with these ids, one of each cluster `c`.
fn of_clusters(id: &str) -> String {
    format!(
        "SELECT b.* FROM clusters AS c JOIN backups AS b ON b.id = ({id}) WHERE ($1 = '' OR c.name = $1)"
    )
}

/// Proofs of each cluster's newest backup and of what it can be recovered from, newest first: those that say something which
/// later ones do not.
pub(crate) async fn newest_proofs(db: &mut AnyConnection, cluster: &str) -> Result<Vec<ProofRow>> {
    let rows = sqlx::query(sqlx::AssertSqlSafe(text_of_proofs()));
    let rows = rows.bind(cluster).fetch_all(db).await?;
    rows.into_iter().map(|row| ProofRow::from_row(&Row(row))).collect()
}

// SQLite joins in the order of a CROSS JOIN: few backups, and the proofs of each.
pub(super) fn text_of_proofs() -> String {
    let of = std::iter::once(NEWEST.to_owned()).chain(each_source());
    let of = of.map(|id| {
        format!("SELECT ({id}) AS backup FROM clusters AS c WHERE ($1 = '' OR c.name = $1)")
    });
    let of = of.collect::<Vec<_>>().join(" UNION ");
    format!(
        "-- newest_proofs
         SELECT p.* FROM ({of}) AS looked_at CROSS JOIN proofs AS p
         WHERE p.backup = looked_at.backup AND p.tells = 1
         ORDER BY at_ms DESC, id DESC"
    )
}

/// The id of the backup that cluster `c` is judged by. Each of these is the end of an index.
const NEWEST: &str = "SELECT id FROM backups WHERE cluster = c.name AND gone_at_ms IS NULL \
     ORDER BY worth DESC, stopped_at_ms DESC, id DESC LIMIT 1";

/// The ids of the backups that cluster `c` can be recovered from, one after the other.
fn each_source() -> impl Iterator<Item = String> {
    let nth = |shown: Shown, nth: usize| {
        format!(
            "SELECT id FROM backups WHERE cluster = c.name AND shown = '{}' AND worth > 0 AND gone_at_ms IS NULL \
             ORDER BY worth DESC, stopped_at_ms DESC, id DESC LIMIT 1 OFFSET {nth}",
            shown.as_str()
        )
    };
    (0..PROVED_MAX).map(move |n| nth(Shown::Proved, n)).chain(std::iter::once(nth(Shown::None, 0)))
}

/// Clusters that had backups, and whose repositories have none of them any more; of all clusters, or of one.
pub(crate) async fn robbed(db: &mut AnyConnection, cluster: &str) -> Result<HashSet<ClusterName>> {
    let rows = sqlx::query(sqlx::AssertSqlSafe(text_of_robbed())).bind(cluster);
    rows.fetch_all(db).await?.into_iter().map(|row| Row(row).parsed("name")).collect()
}

// Ends of two indexes; PostgreSQL would answer EXISTS by reading all backups.
pub(super) fn text_of_robbed() -> String {
    format!(
        "-- clusters_without_their_backups
         SELECT name FROM clusters AS c WHERE ($1 = '' OR c.name = $1) AND ({NEWEST}) IS NULL
             AND (SELECT id FROM backups WHERE cluster = c.name ORDER BY stopped_at_ms DESC LIMIT 1) IS NOT NULL"
    )
}

/// Takes in which backups of a cluster its repository has. What was recorded before `seen_at_ms`, when it was looked, and is not
/// there, is gone; what is there again is not. The ids of those that have gone are returned. Only what came from the same server is
/// judged by it. What the same worker recorded is, wherever that was: it would look nowhere else. What another one did is where it
/// is the same bucket: another host may have a directory of that name.
pub(crate) async fn held(
    tx: &mut Tx<'_>,
    holdings: &Holdings,
    by: &WorkerName,
    seen_at_ms: i64,
    now_ms: i64,
) -> Result<Vec<BackupId>> {
    let rows = sqlx::query(
        "-- backups_not_gone
         SELECT * FROM backups WHERE cluster = $1 AND gone_at_ms IS NULL AND recorded_at_ms < $2",
    )
    .bind(holdings.cluster.as_str())
    .bind(seen_at_ms)
    .fetch_all(tx.db())
    .await?;
    let mut gone = Vec::new();
    for row in rows {
        let Backup { id, worker, outcome, .. } = Backup::from_row(&Row(row))?;
        let is_shared =
            outcome.repository == holdings.repository && !holdings.repository.starts_with("file:");
        let is_of_it =
            outcome.system_identifier == holdings.system_identifier && (worker == *by || is_shared);
        if is_of_it && holdings.lack(id) {
            gone.push(id);
        }
    }
    for ids in gone.chunks(IDS_MAX) {
        let text = format!("UPDATE backups SET gone_at_ms = $1 WHERE id IN ({})", places(2, ids));
        let mut query = sqlx::query(sqlx::AssertSqlSafe(text)).bind(now_ms);
        for id in ids {
            query = query.bind(id.to_string());
        }
        query.execute(tx.db()).await?;
    }
    for ids in holdings.backups.chunks(IDS_MAX) {
        let text = format!(
            "UPDATE backups SET gone_at_ms = NULL WHERE gone_at_ms IS NOT NULL AND cluster = $1 AND id IN ({})",
            places(2, ids)
        );
        let mut query =
            sqlx::query(sqlx::AssertSqlSafe(text)).bind(holdings.cluster.as_str().to_owned());
        for id in ids {
            query = query.bind(id.to_string());
        }
        query.execute(tx.db()).await?;
    }
    Ok(gone)
}

/// Places of parameters for these values, from `$first` on.
pub(super) fn places<T>(first: usize, values: &[T]) -> String {
    let places = (first..first + values.len()).map(|n| format!("${n}"));
    places.collect::<Vec<_>>().join(", ")
}

/// Proofs of one backup that say something which later ones do not, newest first.
pub(crate) async fn telling_proofs(
    db: &mut AnyConnection,
    backup: BackupId,
) -> Result<Vec<ProofRow>> {
    let rows = sqlx::query(
        "-- telling_proofs
         SELECT * FROM proofs WHERE backup = $1 AND tells = 1 ORDER BY at_ms DESC, id DESC",
    )
    .bind(backup.to_string())
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| ProofRow::from_row(&Row(row))).collect()
}

/// A later proof says all that this one does.
pub(crate) async fn tells_nothing(tx: &mut Tx<'_>, proof: AttemptId) -> Result<()> {
    sqlx::query(
        "-- proof_tells_nothing
         UPDATE proofs SET tells = 0 WHERE id = $1",
    )
    .bind(proof.to_string())
    .execute(tx.db())
    .await?;
    Ok(())
}

/// Writes what the proofs of a backup say of it together.
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

/// Writes what a backup is worth, that an earlier program recorded: it is judged then.
pub(crate) async fn weigh(tx: &mut Tx<'_>, id: BackupId, worth: Worth) -> Result<()> {
    sqlx::query(
        "-- backup_worth
         UPDATE backups SET worth = $2, judged = 1 WHERE id = $1",
    )
    .bind(id.to_string())
    .bind(worth.number())
    .execute(tx.db())
    .await?;
    Ok(())
}

/// The ids of some backups that an earlier program recorded and nobody has judged since, in their order, behind `after`.
pub(crate) async fn unjudged(db: &mut AnyConnection, after: &str) -> Result<Vec<String>> {
    let rows = sqlx::query(
        "-- backups_not_judged
         SELECT id FROM backups WHERE judged = 0 AND id > $1 ORDER BY id LIMIT $2",
    )
    .bind(after)
    .bind(JUDGED_AT_ONCE)
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Row(row).text("id")).collect()
}

/// One of them, by its id as it stands there.
pub(crate) async fn by_text(db: &mut AnyConnection, id: &str) -> Result<Option<Backup>> {
    let row = sqlx::query(
        "-- get_backup
         SELECT * FROM backups WHERE id = $1",
    )
    .bind(id)
    .fetch_optional(db)
    .await?;
    row.map(|row| Backup::from_row(&Row(row))).transpose()
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

/// Writes a proof once, as one that is taken in; the key is the attempt that made it.
pub(crate) async fn put_proof(
    tx: &mut Tx<'_>,
    row: &ProofRow,
    cluster: &ClusterName,
    now_ms: i64,
) -> Result<()> {
    sqlx::query(
        "-- put_proof
         INSERT INTO proofs (id, job, backup, cluster, at_ms, recorded_at_ms, record, taken_in)
         VALUES ($1, $2, $3, $4, $5, $6, $7, 1) ON CONFLICT (id) DO UPDATE SET taken_in = 1",
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

/// Where a proof stands among those that nobody has taken in: when it was made, and its id.
pub(crate) type ProofPlace = (i64, String);

/// Some of the proofs that an earlier program recorded and nobody has taken in since, oldest first, behind `after`.
pub(crate) async fn not_taken_in(
    db: &mut AnyConnection,
    after: &ProofPlace,
) -> Result<Vec<ProofPlace>> {
    let rows = sqlx::query(
        "-- proofs_not_taken_in
         SELECT at_ms, id FROM proofs
         WHERE taken_in = 0 AND at_ms >= $1 AND (at_ms > $1 OR id > $2) ORDER BY at_ms, id LIMIT $3",
    )
    .bind(after.0)
    .bind(after.1.as_str())
    .bind(JUDGED_AT_ONCE)
    .fetch_all(db)
    .await?;
    let place = |row: Row| Ok((row.number("at_ms")?, row.text("id")?));
    rows.into_iter().map(|row| place(Row(row))).collect()
}

/// One of them with its cluster, by its id as it stands there.
pub(crate) async fn proof_by_text(
    db: &mut AnyConnection,
    id: &str,
) -> Result<Option<(ProofRow, ClusterName)>> {
    let row = sqlx::query(
        "-- get_proof
         SELECT * FROM proofs WHERE id = $1",
    )
    .bind(id)
    .fetch_optional(db)
    .await?;
    row.map(Row).map(|row| Ok((ProofRow::from_row(&row)?, row.parsed("cluster")?))).transpose()
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
