//! Tokens: for enrolling one worker once, and for calling the API. Only their SHA-256 is kept.

use proto::{SiteName, WorkerName};
use sqlx::AnyConnection;

use super::Tx;
use super::row::Row;
use crate::error::Result;

/// A token that enrols one worker, once.
#[derive(Debug, Clone)]
pub(crate) struct EnrolmentToken {
    pub(crate) digest: String,
    pub(crate) worker: WorkerName,
    pub(crate) site: SiteName,
    pub(crate) created_at_ms: i64,
    pub(crate) expires_at_ms: i64,
    /// The key it was used for: the same worker may ask again after a lost answer.
    pub(crate) used_key: Option<String>,
    /// When it was used last.
    pub(crate) used_at_ms: Option<i64>,
}

pub(crate) async fn put_enrolment(tx: &mut Tx<'_>, token: &EnrolmentToken) -> Result<()> {
    sqlx::query(
        "-- put_enrolment_token
         INSERT INTO enrolment_tokens (digest, worker, site, created_at_ms, expires_at_ms)
         VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(token.digest.as_str())
    .bind(token.worker.as_str())
    .bind(token.site.as_str())
    .bind(token.created_at_ms)
    .bind(token.expires_at_ms)
    .execute(tx.db())
    .await?;
    Ok(())
}

pub(crate) async fn enrolment(tx: &mut Tx<'_>, digest: &str) -> Result<Option<EnrolmentToken>> {
    let row = sqlx::query(
        "-- get_enrolment_token
         SELECT * FROM enrolment_tokens WHERE digest = $1",
    )
    .bind(digest)
    .fetch_optional(tx.db())
    .await?;
    row.map(|row| {
        let row = Row(row);
        Ok(EnrolmentToken {
            digest: row.text("digest")?,
            worker: row.parsed("worker")?,
            site: row.parsed("site")?,
            created_at_ms: row.number("created_at_ms")?,
            expires_at_ms: row.number("expires_at_ms")?,
            used_key: row.maybe_text("used_key")?,
            used_at_ms: row.maybe_number("used_at_ms")?,
        })
    })
    .transpose()
}

pub(crate) async fn use_enrolment(
    tx: &mut Tx<'_>,
    digest: &str,
    key: &str,
    now_ms: i64,
) -> Result<()> {
    sqlx::query(
        "-- use_enrolment_token
         UPDATE enrolment_tokens SET used_at_ms = $2, used_key = $3 WHERE digest = $1",
    )
    .bind(digest)
    .bind(now_ms)
    .bind(key)
    .execute(tx.db())
    .await?;
    Ok(())
}

/// A token of the API.
#[derive(Debug, Clone)]
pub(crate) struct ApiToken {
    pub(crate) digest: String,
    pub(crate) name: String,
    pub(crate) role: String,
    pub(crate) created_at_ms: i64,
    pub(crate) expires_at_ms: i64,
}

impl ApiToken {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            digest: row.text("digest")?,
            name: row.text("name")?,
            role: row.text("role")?,
            created_at_ms: row.number("created_at_ms")?,
            expires_at_ms: row.number("expires_at_ms")?,
        })
    }
}

/// Writes a token; false when its name is taken.
pub(crate) async fn put_api(tx: &mut Tx<'_>, token: &ApiToken) -> Result<bool> {
    let done = sqlx::query(
        "-- put_api_token
         INSERT INTO api_tokens (digest, name, role, created_at_ms, expires_at_ms)
         VALUES ($1, $2, $3, $4, $5) ON CONFLICT (name) DO NOTHING",
    )
    .bind(token.digest.as_str())
    .bind(token.name.as_str())
    .bind(token.role.as_str())
    .bind(token.created_at_ms)
    .bind(token.expires_at_ms)
    .execute(tx.db())
    .await?;
    Ok(done.rows_affected() == 1)
}

pub(crate) async fn api(db: &mut AnyConnection, digest: &str) -> Result<Option<ApiToken>> {
    let row = sqlx::query(
        "-- get_api_token
         SELECT * FROM api_tokens WHERE digest = $1",
    )
    .bind(digest)
    .fetch_optional(db)
    .await?;
    row.map(|row| ApiToken::from_row(&Row(row))).transpose()
}

pub(crate) async fn list_api(db: &mut AnyConnection) -> Result<Vec<ApiToken>> {
    let rows = sqlx::query(
        "-- list_api_tokens
         SELECT * FROM api_tokens ORDER BY name",
    )
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| ApiToken::from_row(&Row(row))).collect()
}

/// Removes a token; false when there was none of this name.
pub(crate) async fn remove_api(tx: &mut Tx<'_>, name: &str) -> Result<bool> {
    let done = sqlx::query(
        "-- remove_api_token
         DELETE FROM api_tokens WHERE name = $1",
    )
    .bind(name)
    .execute(tx.db())
    .await?;
    Ok(done.rows_affected() == 1)
}
