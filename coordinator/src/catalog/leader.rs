//! The leader's row: who leads, in which epoch, and the next fencing token.
//!
//! Epochs and tokens are never smaller than the time in milliseconds, so that a catalog restored from an old copy
//! does not hand out again what was handed out since.

use super::row::Row;
use super::{Catalog, Tx};
use crate::error::Result;

impl Catalog {
    /// Becomes leader if nobody is, or the last one's time ran out, or it had this very name and `anew` is set.
    /// Answers the new epoch.
    pub(crate) async fn elect(
        &self,
        coordinator: &str,
        anew: bool,
        now_ms: i64,
        until_at_ms: i64,
    ) -> Result<Option<i64>> {
        self.transact("elect", move |tx| {
            Box::pin(async move {
                let name_counts = i64::from(anew);
                let row = sqlx::query(
                    "-- elect
                     UPDATE leader SET
                         epoch = CASE WHEN epoch + 1 > $1 THEN epoch + 1 ELSE $1 END,
                         next_token = CASE WHEN next_token > $1 THEN next_token ELSE $1 END,
                         coordinator = $2, until_at_ms = $3
                     WHERE id = 1 AND (until_at_ms <= $1 OR (coordinator = $2 AND $4 = 1))
                     RETURNING epoch",
                )
                .bind(now_ms)
                .bind(coordinator)
                .bind(until_at_ms)
                .bind(name_counts)
                .fetch_optional(tx.db())
                .await?;
                row.map(|row| Row(row).number("epoch")).transpose()
            })
        })
        .await
    }

    /// Goes on leading; `StaleEpoch` when another one leads.
    pub(crate) async fn renew_leader(&self, epoch: i64, until_at_ms: i64) -> Result<()> {
        self.lead(epoch, "renew_leader", move |tx| {
            Box::pin(async move {
                sqlx::query(
                    "-- renew_leader
                     UPDATE leader SET until_at_ms = $2 WHERE id = 1 AND epoch = $1",
                )
                .bind(epoch)
                .bind(until_at_ms)
                .execute(tx.db())
                .await?;
                Ok(())
            })
        })
        .await
    }
}

/// Hands out the next fencing token.
pub(crate) async fn next_token(tx: &mut Tx<'_>) -> Result<i64> {
    let row = sqlx::query(
        "-- next_token
         UPDATE leader SET next_token = next_token + 1 WHERE id = 1 RETURNING next_token",
    )
    .fetch_one(tx.db())
    .await?;
    Row(row).number("next_token")
}
