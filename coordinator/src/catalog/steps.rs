//! The steps of attempts: the waterfall of a job's page.

use proto::AttemptId;
use proto::step::Step;
use sqlx::AnyConnection;

use super::Tx;
use super::row::{Row, json};
use crate::error::Result;

/// Writes a step unless something newer is known of it. The key is (attempt, number), the order the report's `seq`.
pub(crate) async fn put(tx: &mut Tx<'_>, attempt: AttemptId, seq: i64, step: &Step) -> Result<()> {
    sqlx::query(
        "-- put_step
         INSERT INTO steps (attempt, number, seq, name, span_id, started_at_ms, ended_at_ms, failed, figures)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
         ON CONFLICT (attempt, number) DO UPDATE SET
             seq = excluded.seq, name = excluded.name, span_id = excluded.span_id,
             started_at_ms = excluded.started_at_ms, ended_at_ms = excluded.ended_at_ms, failed = excluded.failed,
             figures = excluded.figures
         WHERE steps.seq < excluded.seq",
    )
    .bind(attempt.to_string())
    .bind(i64::from(step.number))
    .bind(seq)
    .bind(step.name.as_str())
    .bind(step.span_id.as_str())
    .bind(step.started_at_ms)
    .bind(step.ended_at_ms)
    .bind(i64::from(step.failed))
    .bind(json(&step.figures))
    .execute(tx.db())
    .await?;
    Ok(())
}

pub(crate) async fn of_attempt(db: &mut AnyConnection, attempt: AttemptId) -> Result<Vec<Step>> {
    let rows = sqlx::query(
        "-- steps_of_attempt
         SELECT * FROM steps WHERE attempt = $1 ORDER BY number",
    )
    .bind(attempt.to_string())
    .fetch_all(db)
    .await?;
    rows.into_iter()
        .map(|row| {
            let row = Row(row);
            Ok(Step {
                number: u32::try_from(row.number("number")?).unwrap_or(0),
                name: row.text("name")?,
                span_id: row.text("span_id")?,
                started_at_ms: row.number("started_at_ms")?,
                ended_at_ms: row.maybe_number("ended_at_ms")?,
                failed: row.flag("failed")?,
                figures: row.json("figures")?,
            })
        })
        .collect()
}
