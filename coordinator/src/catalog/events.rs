//! Things that happened and that somebody may ask about later. Written, never changed.

use sqlx::AnyConnection;

use super::Tx;
use super::row::Row;
use crate::chance;
use crate::error::Result;

/// One event.
#[derive(Debug, Clone, Default)]
pub(crate) struct Event {
    pub(crate) at_ms: i64,
    /// Stable: `worker_enrolled`, `attempt_lost` …
    pub(crate) name: String,
    pub(crate) cluster: Option<String>,
    pub(crate) job: Option<String>,
    pub(crate) worker: Option<String>,
    /// For people.
    pub(crate) message: String,
}

pub(crate) async fn add(tx: &mut Tx<'_>, event: &Event) -> Result<()> {
    sqlx::query(
        "-- add_event
         INSERT INTO events (id, at_ms, name, cluster, job, worker, message) VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(chance::id(event.at_ms))
    .bind(event.at_ms)
    .bind(event.name.as_str())
    .bind(event.cluster.clone())
    .bind(event.job.clone())
    .bind(event.worker.clone())
    .bind(event.message.as_str())
    .execute(tx.db())
    .await?;
    Ok(())
}

/// Newest first.
pub(crate) async fn list(db: &mut AnyConnection, limit: i64) -> Result<Vec<Event>> {
    let rows = sqlx::query(
        "-- list_events
         SELECT * FROM events ORDER BY id DESC LIMIT $1",
    )
    .bind(limit)
    .fetch_all(db)
    .await?;
    rows.into_iter()
        .map(|row| {
            let row = Row(row);
            Ok(Event {
                at_ms: row.number("at_ms")?,
                name: row.text("name")?,
                cluster: row.maybe_text("cluster")?,
                job: row.maybe_text("job")?,
                worker: row.maybe_text("worker")?,
                message: row.text("message")?,
            })
        })
        .collect()
}
