//! Tickets on their way to the broker. A row is there until the broker confirmed it; its key is the attempt, so that
//! sending it twice is sending the same.

use proto::AttemptId;
use sqlx::AnyConnection;

use super::Tx;
use super::row::Row;
use crate::error::Result;

/// One ticket to be sent.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    pub(crate) attempt: AttemptId,
    pub(crate) routing_key: String,
    pub(crate) body: String,
    pub(crate) traceparent: String,
    pub(crate) urgent: bool,
    pub(crate) submitted_at_ms: i64,
}

pub(crate) async fn put(tx: &mut Tx<'_>, ticket: &Outgoing) -> Result<()> {
    sqlx::query(
        "-- put_outbox
         INSERT INTO outbox (attempt, routing_key, body, traceparent, urgent, submitted_at_ms)
         VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (attempt) DO NOTHING",
    )
    .bind(ticket.attempt.to_string())
    .bind(ticket.routing_key.as_str())
    .bind(ticket.body.as_str())
    .bind(ticket.traceparent.as_str())
    .bind(i64::from(ticket.urgent))
    .bind(ticket.submitted_at_ms)
    .execute(tx.db())
    .await?;
    Ok(())
}

/// What is to be sent: urgent tickets first, then the oldest jobs.
pub(crate) async fn pending(db: &mut AnyConnection, limit: i64) -> Result<Vec<Outgoing>> {
    let rows = sqlx::query(
        "-- pending_outbox
         SELECT * FROM outbox ORDER BY urgent DESC, submitted_at_ms, attempt LIMIT $1",
    )
    .bind(limit)
    .fetch_all(db)
    .await?;
    rows.into_iter()
        .map(|row| {
            let row = Row(row);
            Ok(Outgoing {
                attempt: row.parsed("attempt")?,
                routing_key: row.text("routing_key")?,
                body: row.text("body")?,
                traceparent: row.text("traceparent")?,
                urgent: row.flag("urgent")?,
                submitted_at_ms: row.number("submitted_at_ms")?,
            })
        })
        .collect()
}

pub(crate) async fn remove(tx: &mut Tx<'_>, attempt: AttemptId) -> Result<()> {
    sqlx::query(
        "-- remove_outbox
         DELETE FROM outbox WHERE attempt = $1",
    )
    .bind(attempt.to_string())
    .execute(tx.db())
    .await?;
    Ok(())
}
