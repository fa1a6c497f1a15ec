//! Heartbeats of clusters, as their workers told of them. They are known here, apart from the archive, so that it shows when the
//! archive has lost what it had.

use std::collections::BTreeSet;

use policy::heartbeats::{Known, reached};
use proto::message::WalStanding;
use proto::{ClusterHeartbeat, ClusterName, Heartbeat, Lsn, SystemIdentifier};
use sqlx::AnyConnection;

use super::Tx;
use super::row::{Row, json};
use crate::error::Result;

const HOUR_MS: i64 = 3_600_000;
/// How long every one is kept,
const ALL_FOR_MS: i64 = 24 * HOUR_MS;
/// and the first of each hour.
const LANDMARKS_FOR_MS: i64 = 35 * 24 * HOUR_MS;

/// Writes those that were heard now, and forgets the old ones of their clusters; the key is the place in the log and the transaction,
/// so the same again changes nothing.
pub(crate) async fn hear(tx: &mut Tx<'_>, told: &[&ClusterHeartbeat], now_ms: i64) -> Result<()> {
    for told in told {
        forget_overwritten(tx, told).await?;
        put(tx, told, now_ms).await?;
    }
    let clusters: BTreeSet<&ClusterName> = told.iter().map(|told| &told.cluster).collect();
    for cluster in clusters {
        forget_old(tx, cluster, now_ms).await?;
    }
    Ok(())
}

/// What a server had written at the place of a heartbeat and behind it before, by its own clock, is forgotten: the server was set
/// back, as to a snapshot of its disks, and writes its log once more. So is what lies before that place and has a number that was
/// given out there or later: a server numbers its transactions in the order of its log.
async fn forget_overwritten(tx: &mut Tx<'_>, told: &ClusterHeartbeat) -> Result<()> {
    let ClusterHeartbeat { cluster, heartbeat } = told;
    sqlx::query(
        "-- forget_overwritten_heartbeats
         DELETE FROM heartbeats WHERE cluster = $1 AND system_identifier = $2 AND timeline = $3
             AND ended_at_ms < $5 AND (ended_lsn > $4 OR transaction_number >= $6)",
    )
    .bind(cluster.as_str())
    .bind(heartbeat.system_identifier.to_string())
    .bind(i64::from(heartbeat.timeline.0))
    .bind(position(heartbeat.begun_lsn))
    .bind(heartbeat.begun_at_ms)
    .bind(number(heartbeat.transaction))
    .execute(tx.db())
    .await?;
    Ok(())
}

async fn put(tx: &mut Tx<'_>, told: &ClusterHeartbeat, now_ms: i64) -> Result<()> {
    let ClusterHeartbeat { cluster, heartbeat } = told;
    let landmark = sqlx::query(
        "-- newest_landmark
         SELECT heard_at_ms FROM heartbeats WHERE cluster = $1 AND landmark = 1 AND heard_at_ms >= $2 LIMIT 1",
    )
    .bind(cluster.as_str())
    .bind(now_ms - now_ms.rem_euclid(HOUR_MS))
    .fetch_optional(tx.db())
    .await?;
    sqlx::query(
        "-- put_heartbeat
         INSERT INTO heartbeats (
             cluster, system_identifier, timeline, ended_lsn, transaction_number, ended_at_ms, heard_at_ms, landmark, record
         ) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT DO NOTHING",
    )
    .bind(cluster.as_str())
    .bind(heartbeat.system_identifier.to_string())
    .bind(i64::from(heartbeat.timeline.0))
    .bind(position(heartbeat.ended_lsn))
    .bind(number(heartbeat.transaction))
    .bind(heartbeat.ended_at_ms)
    .bind(now_ms)
    .bind(i64::from(landmark.is_none()))
    .bind(json(heartbeat))
    .execute(tx.db())
    .await?;
    Ok(())
}

async fn forget_old(tx: &mut Tx<'_>, cluster: &ClusterName, now_ms: i64) -> Result<()> {
    for (landmark, kept_ms) in [(0_i64, ALL_FOR_MS), (1, LANDMARKS_FOR_MS)] {
        sqlx::query(
            "-- forget_old_heartbeats
             DELETE FROM heartbeats WHERE cluster = $1 AND landmark = $2 AND heard_at_ms < $3",
        )
        .bind(cluster.as_str())
        .bind(landmark)
        .bind(now_ms.saturating_sub(kept_ms))
        .execute(tx.db())
        .await?;
    }
    Ok(())
}

/// Holds those of a cluster against how its archive stands, as far as that is newer. What was heard before its server was seen,
/// `seen_at_ms` by our clock or later, and lies behind where that was then, is not in its log any more: it was set back. What the archive
/// has it was seen to have.
pub(crate) async fn stand(
    tx: &mut Tx<'_>,
    server: SystemIdentifier,
    wal: &WalStanding,
    seen_at_ms: i64,
) -> Result<()> {
    sqlx::query(
        "-- forget_heartbeats_ahead
         DELETE FROM heartbeats WHERE cluster = $1 AND system_identifier = $2 AND timeline = $3
             AND ended_lsn > $4 AND heard_at_ms < $5",
    )
    .bind(wal.cluster.as_str())
    .bind(server.to_string())
    .bind(i64::from(wal.timeline.0))
    .bind(position(wal.server_lsn))
    .bind(seen_at_ms)
    .execute(tx.db())
    .await?;
    for (timeline, to) in reached(wal) {
        sqlx::query(
            "-- heartbeats_archived
             UPDATE heartbeats SET archived_in = $1 WHERE cluster = $2 AND system_identifier = $3 AND timeline = $4
                 AND ended_lsn > $5 AND ended_lsn <= $6 AND archived_in IS NULL",
        )
        .bind(wal.lineage.to_string())
        .bind(wal.cluster.as_str())
        .bind(server.to_string())
        .bind(i64::from(timeline.0))
        .bind(position(wal.line_from))
        .bind(position(to))
        .execute(tx.db())
        .await?;
    }
    Ok(())
}

/// Those of a cluster, in the order in which they were heard.
pub(crate) async fn of(
    db: &mut AnyConnection,
    cluster: &ClusterName,
    server: SystemIdentifier,
) -> Result<Vec<Known>> {
    let rows = sqlx::query(
        "-- heartbeats_of
         SELECT record, archived_in FROM heartbeats WHERE cluster = $1 AND system_identifier = $2 ORDER BY heard_at_ms, ended_lsn",
    )
    .bind(cluster.as_str())
    .bind(server.to_string())
    .fetch_all(db)
    .await?;
    let known = rows.into_iter().map(Row).map(|row| {
        Ok(Known { heartbeat: row.json("record")?, archived_in: row.maybe_parsed("archived_in")? })
    });
    known.collect()
}

/// The one of a cluster that was heard last.
pub(crate) async fn newest(
    db: &mut AnyConnection,
    cluster: &ClusterName,
) -> Result<Option<Heartbeat>> {
    let row = sqlx::query(
        "-- newest_heartbeat
         SELECT record FROM heartbeats WHERE cluster = $1 ORDER BY heard_at_ms DESC, ended_lsn DESC LIMIT 1",
    )
    .bind(cluster.as_str())
    .fetch_optional(db)
    .await?;
    row.map(|row| Row(row).json("record")).transpose()
}

fn position(lsn: Lsn) -> i64 {
    number(lsn.0)
}

fn number(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
