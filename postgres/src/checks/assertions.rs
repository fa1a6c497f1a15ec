//! The user's own assertions (L6): queries that must answer true on the restored server.
//!
//! Each runs in a read-only transaction that is rolled back, within its own time. Where they stand and who may write them
//! down is the caller's; nothing here comes from a job.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::{TryStreamExt as _, pin_mut};
use proto::DatabaseName;
use proto::proof::{CheckOutcome, ProofAssertion};
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::Run;
use super::findings::{is_lost, is_shortage, lacks_something_here};
use crate::error::{During as _, Error};
use crate::session::Session;

/// How long an assertion may wait for a lock. Only a prepared transaction that came with the backup can hold one.
const LOCK_MAX: Duration = Duration::from_secs(2);
/// Characters of a server's message that are kept.
const WHY_MAX_CHARS: usize = 300;

/// Something that must be true of one database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assertion {
    /// What it is called in the proof.
    pub name: String,
    /// Where it is asked.
    pub database: DatabaseName,
    /// One query that answers with one row of one boolean column.
    pub sql: String,
    /// How long it may take.
    pub within: Duration,
}

/// An assertion that was asked.
pub(super) struct Asked {
    pub(super) told: ProofAssertion,
    /// Whether it was seen not to hold: the server was there, and lacked nothing.
    pub(super) saw_false: bool,
}

impl Run<'_> {
    /// Asks every assertion, those of one database in one session.
    pub(super) async fn ask_assertions(&mut self) -> Result<(), Error> {
        let mut databases: BTreeMap<&str, Vec<&Assertion>> = BTreeMap::new();
        for assertion in self.options.assertions {
            databases.entry(assertion.database.as_str()).or_default().push(assertion);
        }
        for (database, assertions) in databases {
            let mut session = None;
            for assertion in assertions {
                let began = Instant::now();
                let holds = self.ask(&mut session, database, assertion).await;
                if let Err(error @ (Error::Cancelled { .. } | Error::Deadline { .. })) = holds {
                    return Err(error);
                }
                self.asked.push(concluded(assertion, holds, began.elapsed()));
            }
            if let Some(session) = session {
                session.close().await;
            }
        }
        Ok(())
    }

    async fn ask(
        &self,
        session: &mut Option<Session>,
        database: &str,
        assertion: &Assertion,
    ) -> Result<Result<(), String>, Error> {
        let usable = self.usable(session, database).await?;
        self.within(usable, holds(usable, assertion)).await
    }
}

/// Whether it holds; the inner error says what it answered instead.
async fn holds(session: &Session, assertion: &Assertion) -> Result<Result<(), String>, Error> {
    let begin = format!(
        "BEGIN READ ONLY; SET LOCAL statement_timeout = {}; SET LOCAL lock_timeout = {}",
        assertion.within.as_millis(),
        LOCK_MAX.as_millis()
    );
    session.run("begin an assertion", &begin).await?;
    let answer = answer(session, &assertion.sql).await;
    let ended = session.run("end an assertion", "ROLLBACK").await;
    let answer = answer?;
    ended.map(|()| answer)
}

async fn answer(session: &Session, sql: &str) -> Result<Result<(), String>, Error> {
    let what = "ask an assertion";
    // Prepared, so that it is one statement, and that what it answers with is known before it runs.
    let query = session.client().prepare(sql).await.during(what)?;
    match (query.params(), query.columns()) {
        ([], [column]) if *column.type_() == Type::BOOL => {}
        ([], [column]) => {
            return Ok(Err(format!("its column is of type {}, not boolean", column.type_())));
        }
        ([], columns) => return Ok(Err(format!("it has {} columns, not one", columns.len()))),
        _ => return Ok(Err("it has parameters, which nobody gives".to_owned())),
    }
    let rows = session.client().query_raw(&query, [] as [bool; 0]).await.during(what)?;
    pin_mut!(rows);
    let Some(row) = rows.try_next().await.during(what)? else {
        return Ok(Err("no row".to_owned()));
    };
    let holds: Option<bool> = row.try_get(0).during(what)?;
    if rows.try_next().await.during(what)?.is_some() {
        return Ok(Err("more than one row".to_owned()));
    }
    Ok(match holds {
        Some(true) => Ok(()),
        Some(false) => Err("false".to_owned()),
        None => Err("NULL".to_owned()),
    })
}

fn concluded(
    assertion: &Assertion,
    holds: Result<Result<(), String>, Error>,
    took: Duration,
) -> Asked {
    let (outcome, answer, saw_false) = match holds {
        Ok(Ok(())) => (CheckOutcome::Passed, "true".to_owned(), false),
        Ok(Err(why)) => (CheckOutcome::Failed, why, true),
        Err(error) if lacks_something_here(&error) => (CheckOutcome::Skipped, said(&error), false),
        Err(error) => {
            let why = if error.state() == Some(&SqlState::QUERY_CANCELED) {
                format!("no answer within {:?}", assertion.within)
            } else {
                said(&error)
            };
            (CheckOutcome::Failed, why, !is_lost(&error) && !is_shortage(&error))
        }
    };
    let told = ProofAssertion {
        name: assertion.name.clone(),
        database: assertion.database.clone(),
        outcome,
        answer,
        duration_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
    };
    Asked { told, saw_false }
}

/// What the server said, without what it was asked for: the assertion's name says that.
fn said(error: &Error) -> String {
    let text = match error {
        Error::Statement { source, .. } => source.to_string(),
        other => proto::failure::chain(other),
    };
    text.chars().take(WHY_MAX_CHARS).collect()
}
