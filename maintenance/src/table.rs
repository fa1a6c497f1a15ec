//! One table: its identity, its quoted name, and what becomes of it between plan and work.
//!
//! The only place where a name gets into a statement: looked up by OID at that moment and quoted by one function.

use std::fmt;

use postgres::{Session, quote};
use proto::DatabaseName;
use proto::job::SkippedTable;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::limits::{Limits, settle};
use crate::sql;

/// A table of one database. The OID is its identity; the names are for people.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TableRef {
    /// `pg_class.oid`.
    pub oid: u32,
    /// The schema, unquoted.
    pub schema: String,
    /// The table, unquoted.
    pub name: String,
}

impl fmt::Display for TableRef {
    /// `"schema"."table"`, quoted as in SQL; control characters are shown as escapes, so that a name cannot break a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in quote::qualified(&self.schema, &self.name).chars() {
            if c.is_control() {
                write!(f, "{}", c.escape_default())?;
            } else {
                fmt::Write::write_char(f, c)?;
            }
        }
        Ok(())
    }
}

impl TableRef {
    pub(crate) fn skipped(
        &self,
        database: &DatabaseName,
        reason: impl fmt::Display,
    ) -> SkippedTable {
        SkippedTable {
            database: database.clone(),
            table: self.to_string(),
            reason: reason.to_string(),
        }
    }
}

/// The databases that a job visits when it names none: those that accept connections from this role and are no
/// templates.
pub async fn databases(session: &Session) -> Result<Vec<DatabaseName>, Error> {
    let rows = session.query("list the databases", sql::DATABASES, &[]).await?;
    // A name the server has is a valid one.
    Ok(rows.iter().filter_map(|row| row.get::<_, &str>(0).parse().ok()).collect())
}

/// The database a session is connected to.
pub(crate) async fn current_database(session: &Session) -> Result<DatabaseName, Error> {
    let what = "ask for the database's name";
    let row = session.one(what, "SELECT pg_catalog.current_database()::text", &[]).await?;
    let name: String = row.get(0);
    name.parse().map_err(|_| {
        postgres::Error::Answer { what: what.to_owned(), answer: name.chars().take(40).collect() }
            .into()
    })
}

/// Refuses a standby, where neither ANALYZE nor VACUUM is possible.
pub(crate) async fn refuse_standby(session: &Session, what: &'static str) -> Result<(), Error> {
    let row = session.one(what, "SELECT pg_catalog.pg_is_in_recovery()", &[]).await?;
    if row.get(0) { Err(Error::Standby { what }) } else { Ok(()) }
}

/// What a table is at this moment.
pub(crate) struct Now {
    /// `"schema"."table"` as it is called now, ready for a statement.
    pub(crate) quoted: String,
    pub(crate) dead_rows: u64,
    pub(crate) vacuums: i64,
}

/// Why a table is left alone, found out immediately before the work.
pub(crate) enum Left {
    Vanished,
    NotPermitted { grant: String },
    Busy { pid: i32, kind: String },
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vanished => f.write_str("it was dropped meanwhile"),
            Self::NotPermitted { grant } => write!(f, "the role lacks the right: {grant}"),
            Self::Busy { pid, kind } => {
                write!(f, "process {pid} ({kind}) is vacuuming or analyzing it now")
            }
        }
    }
}

impl TableRef {
    /// Looks the table up again. An error is the server's; `Left` is about this table.
    pub(crate) async fn now(&self, session: &Session) -> Result<Result<Now, Left>, Error> {
        let Some(row) = session.maybe("look at a table", sql::TABLE_NOW, &[&self.oid]).await?
        else {
            return Ok(Err(Left::Vanished));
        };
        let (schema, name): (&str, &str) = (row.get("schema"), row.get("name"));
        if !matches!(row.get("kind"), "r" | "p" | "m") {
            return Ok(Err(Left::Vanished));
        }
        if !row.get::<_, bool>("may_maintain") {
            let grant =
                grant(session.user(), schema, name, row.get("owner"), major(session).await?);
            return Ok(Err(Left::NotPermitted { grant }));
        }
        let worker: Option<i32> = row.get("worker_pid");
        let kind: Option<String> = row.get("worker_kind");
        if let Some((pid, kind)) = worker.zip(kind)
            && kind != "client backend"
        {
            return Ok(Err(Left::Busy { pid, kind }));
        }
        Ok(Ok(Now {
            quoted: quote::qualified(schema, name),
            dead_rows: unsigned(row.get("dead_rows")),
            vacuums: row.get("vacuums"),
        }))
    }
}

/// The server's major version.
pub(crate) async fn major(session: &Session) -> Result<u32, Error> {
    let what = "ask for the version";
    let sql = "SELECT pg_catalog.current_setting('server_version_num')::int / 10000";
    let row = session.one(what, sql, &[]).await?;
    Ok(u32::try_from(row.get::<_, i32>(0)).unwrap_or(0))
}

/// The statement that lets `role` maintain the table.
pub(crate) fn grant(role: &str, schema: &str, name: &str, owner: &str, major: u32) -> String {
    let role = quote::identifier(role);
    if major >= 17 {
        format!(
            "GRANT MAINTAIN ON TABLE {} TO {role} (or GRANT pg_maintain TO {role})",
            quote::qualified(schema, name)
        )
    } else {
        format!(
            "GRANT {} TO {role} (before PostgreSQL 17 only the owner may)",
            quote::identifier(owner)
        )
    }
}

/// A counter of the server, which never should be and may for a moment be negative.
pub(crate) fn unsigned(count: i64) -> u64 {
    u64::try_from(count).unwrap_or(0)
}

/// What became of one table's statement.
pub(crate) enum Verdict {
    /// It ran to its end.
    Done,
    /// This table is left out for this reason; go on.
    Skip(String),
}

/// Runs the statement on one table within the limits. An error means that the whole job is broken: the connection is
/// gone, usually. Everything else that may happen to one table is a reason to skip it.
pub(crate) async fn work(
    session: &Session,
    what: &str,
    sql: &str,
    limits: &Limits,
    cancel: &CancellationToken,
) -> Result<Verdict, Error> {
    let deadline = limits.table_deadline(Instant::now());
    let Err(error) = session.within(what, cancel, Some(deadline), session.run(what, sql)).await
    else {
        return Ok(Verdict::Done);
    };
    if error.is_closed() {
        return Err(error.into());
    }
    let interrupted =
        matches!(error, postgres::Error::Cancelled { .. } | postgres::Error::Deadline { .. });
    if interrupted && !cancel.is_cancelled() && !limits.is_over(Instant::now()) {
        settle(session).await?;
    }
    let reason = match &error {
        postgres::Error::Cancelled { .. } => "interrupted: the job was cancelled".to_owned(),
        postgres::Error::Deadline { .. } if limits.is_over(Instant::now()) => {
            "interrupted: the job's time was over".to_owned()
        }
        postgres::Error::Deadline { .. } => too_long(limits),
        refused => match refused.state() {
            Some(state) if *state == SqlState::LOCK_NOT_AVAILABLE => format!(
                "another session holds a lock on it; waited {} ms",
                limits.lock_timeout.as_millis()
            ),
            Some(state) if *state == SqlState::QUERY_CANCELED => too_long(limits),
            Some(state)
                if *state == SqlState::UNDEFINED_TABLE
                    || *state == SqlState::INVALID_SCHEMA_NAME =>
            {
                Left::Vanished.to_string()
            }
            Some(_) => format!("the server refused: {}", proto::failure::chain(refused)),
            None => return Err(error.into()),
        },
    };
    Ok(Verdict::Skip(reason))
}

fn too_long(limits: &Limits) -> String {
    format!("it took longer than {} s and was stopped", limits.table_timeout.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_stays_on_its_line_and_in_its_quotes() {
        let table = TableRef {
            oid: 1,
            schema: "a.b".to_owned(),
            name: "x\"; drop table t; --\n".to_owned(),
        };
        assert_eq!(table.to_string(), "\"a.b\".\"x\"\"; drop table t; --\\n\"");
    }

    #[test]
    fn the_cure_names_the_role_and_fits_the_version() {
        assert_eq!(
            grant("ma in", "s", "t", "o", 17),
            "GRANT MAINTAIN ON TABLE \"s\".\"t\" TO \"ma in\" (or GRANT pg_maintain TO \"ma in\")"
        );
        assert!(grant("m", "s", "t", "o", 16).starts_with("GRANT \"o\" TO \"m\""));
    }
}
