//! Where copies of backups are, as the repositories say that have the backups.

use std::collections::HashMap;

use proto::BackupId;
use proto::copies::BackupCopy;
use proto::message::Holdings;

use super::Tx;
use super::backups::{IDS_MAX, places};
use super::row::{Row, json};
use crate::error::Result;

/// Takes in what a repository says of copies of the backups it has. What it said before is over; what others say stays: a copy that
/// is served by a worker of its own knows of other copies.
pub(crate) async fn told(tx: &mut Tx<'_>, holdings: &Holdings) -> Result<()> {
    let Some(copies) = &holdings.copies else { return Ok(()) };
    let mut told: HashMap<BackupId, Vec<BackupCopy>> = HashMap::new();
    for (backup, copy) in copies.iter().flat_map(|copies| copies.each(&holdings.repository)) {
        told.entry(backup).or_default().push(copy);
    }
    for ids in holdings.backups.chunks(IDS_MAX) {
        let text = format!(
            "-- copies_of_backups
             SELECT id, copies FROM backups WHERE cluster = $1 AND id IN ({})",
            places(2, ids)
        );
        let mut query =
            sqlx::query(sqlx::AssertSqlSafe(text)).bind(holdings.cluster.as_str().to_owned());
        for id in ids {
            query = query.bind(id.to_string());
        }
        for row in query.fetch_all(tx.db()).await? {
            let row = Row(row);
            let backup: BackupId = row.parsed("id")?;
            let known: Vec<BackupCopy> = row.maybe_json("copies")?.unwrap_or_default();
            let others = known.iter().filter(|copy| copy.told_by != holdings.repository).cloned();
            let copies: Vec<BackupCopy> =
                others.chain(told.remove(&backup).into_iter().flatten()).collect();
            if copies != known {
                put(tx, backup, &copies).await?;
            }
        }
    }
    Ok(())
}

async fn put(tx: &mut Tx<'_>, backup: BackupId, copies: &Vec<BackupCopy>) -> Result<()> {
    sqlx::query(
        "-- put_copies
         UPDATE backups SET copies = $2 WHERE id = $1",
    )
    .bind(backup.to_string())
    .bind(json(copies))
    .execute(tx.db())
    .await?;
    Ok(())
}
