//! Clusters, as their workers announced them.

use std::collections::BTreeMap;

use policy::broken::BrokenStretch;
use policy::{Objectives, standing};
use proto::failure::Failure;
use proto::message::{ClusterOffer, WalStanding};
use proto::{ClusterName, SiteName, SystemIdentifier, WorkerName};
use sqlx::AnyConnection;

use super::Tx;
use super::row::{Row, json, maybe_json, maybe_text};
use crate::error::Result;

/// Names in one statement.
const NAMES_MAX: usize = 500;

/// One row.
#[derive(Debug, Clone)]
pub(crate) struct Cluster {
    pub(crate) name: ClusterName,
    pub(crate) registered_at_ms: i64,
    /// The last pulse of a worker that serves it.
    pub(crate) seen_at_ms: Option<i64>,
    /// Since when its workers have not been silent for longer than they may.
    pub(crate) contact_since_at_ms: Option<i64>,
    pub(crate) site: Option<SiteName>,
    pub(crate) worker: Option<WorkerName>,
    pub(crate) repository: Option<String>,
    pub(crate) repository_location: Option<String>,
    /// What jobs expect the server to show. The first one announced stays until a person accepts another.
    pub(crate) system_identifier: Option<SystemIdentifier>,
    pub(crate) announced_identifier: Option<SystemIdentifier>,
    pub(crate) server_version_num: Option<u32>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) problem: Option<Failure>,
    pub(crate) paused: bool,
    /// How its archive of WAL stands, if it has one.
    pub(crate) wal: Option<WalStanding>,
    /// Archived WAL that proofs could not replay.
    pub(crate) broken_wal: Vec<BrokenStretch>,
}

impl Cluster {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            name: row.parsed("name")?,
            registered_at_ms: row.number("registered_at_ms")?,
            seen_at_ms: row.maybe_number("seen_at_ms")?,
            contact_since_at_ms: row.maybe_number("contact_since_at_ms")?,
            site: row.maybe_parsed("site")?,
            worker: row.maybe_parsed("worker")?,
            repository: row.maybe_text("repository")?,
            repository_location: row.maybe_text("repository_location")?,
            system_identifier: row.maybe_parsed("system_identifier")?,
            announced_identifier: row.maybe_parsed("announced_identifier")?,
            server_version_num: row
                .maybe_number("server_version_num")?
                .and_then(|number| u32::try_from(number).ok()),
            labels: row.json("labels")?,
            problem: row.maybe_json("problem")?,
            paused: row.flag("paused")?,
            wal: row.maybe_json("wal")?,
            broken_wal: row.maybe_json("broken_wal")?.unwrap_or_default(),
        })
    }
}

pub(crate) async fn get(db: &mut AnyConnection, name: &ClusterName) -> Result<Option<Cluster>> {
    let row = sqlx::query(
        "-- get_cluster
         SELECT * FROM clusters WHERE name = $1",
    )
    .bind(name.as_str())
    .fetch_optional(db)
    .await?;
    row.map(|row| Cluster::from_row(&Row(row))).transpose()
}

pub(crate) async fn list(db: &mut AnyConnection) -> Result<Vec<Cluster>> {
    let rows = sqlx::query(
        "-- list_clusters
         SELECT * FROM clusters ORDER BY name",
    )
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Cluster::from_row(&Row(row))).collect()
}

/// Writes what a worker announced of a cluster; the key is its name. That one which is known was seen is for [`seen`] to write.
pub(crate) async fn announce(
    tx: &mut Tx<'_>,
    offer: &ClusterOffer,
    location: Option<&str>,
    worker: &WorkerName,
    site: &SiteName,
    now_ms: i64,
) -> Result<()> {
    sqlx::query(
        "-- announce_cluster
         INSERT INTO clusters (
             name, registered_at_ms, seen_at_ms, site, worker, repository, repository_location, system_identifier,
             announced_identifier, server_version_num, labels, problem, paused, contact_since_at_ms
         ) VALUES ($1, $2, $2, $3, $4, $5, $6, $7, $7, $8, $9, $10, 0, $2)
         ON CONFLICT (name) DO UPDATE SET
             site = excluded.site, worker = excluded.worker,
             repository = COALESCE(excluded.repository, clusters.repository),
             repository_location = COALESCE(excluded.repository_location, clusters.repository_location),
             system_identifier = COALESCE(clusters.system_identifier, excluded.system_identifier),
             announced_identifier = COALESCE(excluded.announced_identifier, clusters.announced_identifier),
             server_version_num = COALESCE(excluded.server_version_num, clusters.server_version_num),
             labels = excluded.labels, problem = excluded.problem",
    )
    .bind(offer.name.as_str())
    .bind(now_ms)
    .bind(site.as_str())
    .bind(worker.as_str())
    .bind(offer.repository.clone())
    .bind(location.map(str::to_owned))
    .bind(maybe_text(offer.system_identifier.as_ref()))
    .bind(offer.server_version_num.map(i64::from))
    .bind(json(&offer.labels))
    .bind(maybe_json(offer.problem.as_ref()))
    .execute(tx.db())
    .await?;
    Ok(())
}

/// A worker that serves these clusters, alone or among others, gave a sign of life.
pub(crate) async fn seen(tx: &mut Tx<'_>, names: &[&ClusterName], now_ms: i64) -> Result<()> {
    let silent_since_ms = now_ms.saturating_sub(Objectives::default().silence_max_ms);
    for names in names.chunks(NAMES_MAX) {
        let places: Vec<String> = (3..names.len() + 3).map(|n| format!("${n}")).collect();
        let text = format!(
            "-- clusters_seen
             UPDATE clusters SET seen_at_ms = $1, contact_since_at_ms = CASE
                 WHEN contact_since_at_ms IS NULL OR seen_at_ms IS NULL OR seen_at_ms < $2 THEN $1
                 ELSE contact_since_at_ms END
             WHERE name IN ({})",
            places.join(", ")
        );
        let mut query = sqlx::query(sqlx::AssertSqlSafe(text)).bind(now_ms).bind(silent_since_ms);
        for name in names {
            query = query.bind(name.as_str());
        }
        query.execute(tx.db()).await?;
    }
    Ok(())
}

/// Writes how the archive of a cluster stands, as a worker told at `told_at_ms` by its clock, unless more is known. Gives the cluster
/// as it is then.
pub(crate) async fn archive_stands(
    tx: &mut Tx<'_>,
    told: &WalStanding,
    told_at_ms: i64,
    now_ms: i64,
) -> Result<Option<Cluster>> {
    let Some(cluster) = get(tx.db(), &told.cluster).await? else { return Ok(None) };
    let silence_max_ms = Objectives::default().archive_silence_max_ms;
    let before = cluster.wal.as_ref();
    let Some(standing) = standing::hear(before, told, told_at_ms, now_ms, silence_max_ms) else {
        return Ok(None);
    };
    sqlx::query(
        "-- archive_stands
         UPDATE clusters SET wal = $2 WHERE name = $1",
    )
    .bind(standing.cluster.as_str())
    .bind(json(&standing))
    .execute(tx.db())
    .await?;
    Ok(Some(Cluster { wal: Some(standing), ..cluster }))
}

/// Writes which archived WAL of a cluster proofs could not replay.
pub(crate) async fn wal_is_broken(
    tx: &mut Tx<'_>,
    name: &ClusterName,
    broken: &[BrokenStretch],
) -> Result<()> {
    sqlx::query(
        "-- wal_is_broken
         UPDATE clusters SET broken_wal = $2 WHERE name = $1",
    )
    .bind(name.as_str())
    .bind(json(&broken))
    .execute(tx.db())
    .await?;
    Ok(())
}

pub(crate) async fn pause(tx: &mut Tx<'_>, name: &ClusterName, paused: bool) -> Result<()> {
    sqlx::query(
        "-- pause_cluster
         UPDATE clusters SET paused = $2 WHERE name = $1",
    )
    .bind(name.as_str())
    .bind(i64::from(paused))
    .execute(tx.db())
    .await?;
    Ok(())
}

/// From now on jobs expect the identifier that was announced last.
pub(crate) async fn adopt(tx: &mut Tx<'_>, name: &ClusterName) -> Result<()> {
    sqlx::query(
        "-- adopt_identifier
         UPDATE clusters SET system_identifier = announced_identifier WHERE name = $1",
    )
    .bind(name.as_str())
    .execute(tx.db())
    .await?;
    Ok(())
}
