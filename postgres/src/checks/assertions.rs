//! The user's own assertions (L6): queries that must answer true on the restored server.
//!
//! Each runs in a read-only transaction that is rolled back, within its own time, as a role that may read everything and do
//! nothing else: a transaction that is read-only does not keep a superuser from files and programs of this machine, and what
//! a query calls came with the copy. Where they stand and who may write them down is the caller's; nothing here comes from
//! a job.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use proto::DatabaseName;
use proto::proof::{CheckOutcome, ProofAssertion};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_postgres::Transaction;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::findings::lacks_something_here;
use super::{Run, purpose};
use crate::connect::{Purpose, connect, nonce};
use crate::error::{During as _, Error};
use crate::quote;
use crate::session::Session;

/// How long an assertion may wait for a lock. Only a prepared transaction that came with the backup can hold one.
const LOCK_MAX: Duration = Duration::from_secs(2);
/// How much longer than the server's own limit is waited: a function can catch that, and go on.
const GRACE: Duration = Duration::from_secs(2);
/// Characters of a server's message that are kept.
const WHY_MAX_CHARS: usize = 300;
/// Before the query runs.
const PREPARE: &str = "prepare an assertion";
/// While it runs.
const ASK: &str = "ask an assertion";

/// What the role logs in with: a database may bring settings that would keep it out or make it run something.
const OPTIONS: &str = "-c statement_timeout=0 -c search_path=pg_catalog";

/// Foreign data wrappers read files, start programs and know other servers, whoever asks; and a function that runs as its
/// owner is his who may do so. Without a handler the first fail, and the others run as whoever calls them.
const NOTHING_OUTSIDE: &str = "\
UPDATE pg_foreign_data_wrapper SET fdwhandler = 0 WHERE fdwhandler <> 0;
UPDATE pg_proc SET prosecdef = false WHERE prosecdef
   AND (pg_has_role(proowner, 'pg_execute_server_program', 'MEMBER') OR pg_has_role(proowner, 'pg_read_server_files', 'MEMBER')
        OR pg_has_role(proowner, 'pg_write_server_files', 'MEMBER'));";

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
    /// Whether it was seen not to hold.
    pub(super) saw_false: bool,
}

/// What came of asking one.
enum Answer {
    True,
    /// It was asked, and this is not `true`.
    Other(String),
    /// It is nothing that can be answered with `true`.
    NoQuestion(String),
    NotInTime,
}

impl Run<'_> {
    /// Asks every assertion, those of one database in one session.
    pub(super) async fn ask_assertions(&mut self) -> Result<(), Error> {
        let mut databases: BTreeMap<&str, Vec<&Assertion>> = BTreeMap::new();
        for assertion in self.options.assertions {
            databases.entry(assertion.database.as_str()).or_default().push(assertion);
        }
        let mut role = None;
        for assertions in databases.into_values() {
            let mut session = None;
            for assertion in assertions {
                let began = Instant::now();
                let answer = Box::pin(self.ask(&mut role, &mut session, assertion)).await;
                if let Err(error @ Error::Cancelled { .. }) = answer {
                    return Err(error);
                }
                self.asked.push(concluded(assertion, answer, began.elapsed()));
            }
            if let Some(session) = session {
                session.close().await;
            }
        }
        Ok(())
    }

    async fn ask(
        &self,
        role: &mut Option<String>,
        session: &mut Option<Session>,
        assertion: &Assertion,
    ) -> Result<Answer, Error> {
        let mut usable = match session.take().filter(|session| !session.is_closed()) {
            Some(session) => session,
            None => self.in_time(self.asking(role, assertion.database.as_str())).await?,
        };
        // Whatever ends the wait before the answer ends the session too, and with it the statement.
        let limit = assertion.within + GRACE;
        let asked = self
            .in_time(async { Ok::<_, Error>(timeout(limit, holds(&mut usable, assertion)).await) });
        match asked.await? {
            Ok(answer) => {
                *session = Some(usable);
                answer
            }
            Err(_) => Ok(Answer::NotInTime),
        }
    }

    /// Waits for `work` until the checks are cancelled, or their time for assertions is over.
    async fn in_time<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let until = self.options.ask_until.into_iter().chain(self.options.deadline).min();
        let over = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.options.cancel.cancelled() => Err(Error::Cancelled { what: ASK.to_owned() }),
            () = over => Err(Error::Deadline { what: ASK.to_owned() }),
            done = work => done,
        }
    }

    /// A session that reads everything of a database, and does nothing else. The first one makes the role for it.
    async fn asking(&self, role: &mut Option<String>, database: &str) -> Result<Session, Error> {
        let what = "make a role for the assertions";
        let superuser = self.session(database).await?;
        let name = if let Some(name) = role {
            name.clone()
        } else {
            let name = format!("pgmuster_asserts_{}", nonce());
            superuser.run(what, &self.creation(&name)).await?;
            role.insert(name).clone()
        };
        let shown = quote::identifier(database);
        let admission = format!(
            "GRANT CONNECT ON DATABASE {shown} TO {name}; ALTER DATABASE {shown} CONNECTION LIMIT -1; \
             ALTER DATABASE {shown} RESET session_preload_libraries; ALTER ROLE ALL RESET session_preload_libraries; \
             ALTER DATABASE {shown} RESET local_preload_libraries; ALTER ROLE ALL RESET local_preload_libraries; \
             {NOTHING_OUTSIDE}"
        );
        superuser.run(what, &admission).await?;
        superuser.close().await;
        let target = self.target.with_database(database).as_role(&name, OPTIONS);
        connect(&target, &Purpose { read_only: true, ..purpose(self.options) }).await
    }

    fn creation(&self, name: &str) -> String {
        let later = if self.version.major() >= 17 {
            format!(" ALTER ROLE {name} SET event_triggers = off;")
        } else {
            String::new()
        };
        format!(
            "CREATE ROLE {name} LOGIN BYPASSRLS NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION IN ROLE pg_read_all_data; \
             ALTER ROLE {name} SET lc_messages = 'C'; ALTER ROLE {name} SET ignore_checksum_failure = off; \
             ALTER ROLE {name} SET zero_damaged_pages = off;{later}"
        )
    }
}

async fn holds(session: &mut Session, assertion: &Assertion) -> Result<Answer, Error> {
    let begin = "begin an assertion";
    let transaction = session.client_mut().build_transaction().read_only(true).start();
    let transaction = transaction.await.during(begin)?;
    let limits = format!(
        "SET LOCAL statement_timeout = {}; SET LOCAL lock_timeout = {}",
        assertion.within.as_millis(),
        LOCK_MAX.as_millis()
    );
    transaction.batch_execute(&limits).await.during(begin)?;
    let answer = answer(&transaction, &assertion.sql).await;
    let ended = transaction.rollback().await.during("end an assertion");
    let answer = answer?;
    ended.map(|()| answer)
}

async fn answer(transaction: &Transaction<'_>, sql: &str) -> Result<Answer, Error> {
    let other = |what: &str| Ok(Answer::Other(what.to_owned()));
    let no_question = |what: String| Ok(Answer::NoQuestion(what));
    // Prepared, so that it is one statement, and that what it answers with is known before it runs.
    let query = transaction.prepare(sql).await.during(PREPARE)?;
    match (query.params(), query.columns()) {
        ([], [column]) if *column.type_() == Type::BOOL => {}
        ([], [column]) => {
            return no_question(format!("its column is of type {}, not boolean", column.type_()));
        }
        ([], columns) => {
            return no_question(format!("it has {} columns, not one", columns.len()));
        }
        _ => return no_question("it has parameters, which nobody gives".to_owned()),
    }
    // Of many rows, no more than show that they are too many.
    let portal = transaction.bind(&query, &[]).await.during(ASK)?;
    let rows = transaction.query_portal(&portal, 2).await.during(ASK)?;
    let row = match &rows[..] {
        [] => return other("no row"),
        [row] => row,
        _ => return other("more than one row"),
    };
    Ok(match row.try_get(0).during(ASK)? {
        Some(true) => Answer::True,
        Some(false) => Answer::Other("false".to_owned()),
        None => Answer::Other("NULL".to_owned()),
    })
}

/// One that could not be asked is skipped: it proves nothing, and says nothing against the data.
fn concluded(assertion: &Assertion, answer: Result<Answer, Error>, took: Duration) -> Asked {
    let late = || format!("no answer within {:?}", assertion.within);
    let (outcome, answer) = match answer {
        Ok(Answer::True) => (CheckOutcome::Passed, "true".to_owned()),
        Ok(Answer::Other(why)) => (CheckOutcome::Failed, why),
        Ok(Answer::NoQuestion(why)) => (CheckOutcome::Skipped, why),
        Ok(Answer::NotInTime) => (CheckOutcome::Skipped, late()),
        Err(Error::Deadline { .. }) => {
            (CheckOutcome::Skipped, "the job's time for it was over".to_owned())
        }
        Err(error) if error.state() == Some(&SqlState::QUERY_CANCELED) => {
            (CheckOutcome::Skipped, late())
        }
        Err(error) if is_of_the_data(&error) => (CheckOutcome::Failed, said(&error)),
        Err(error) => (CheckOutcome::Skipped, said(&error)),
    };
    let saw_false = outcome == CheckOutcome::Failed;
    let told = ProofAssertion {
        name: assertion.name.clone(),
        database: assertion.database.clone(),
        outcome,
        answer,
        duration_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
    };
    Asked { told, saw_false }
}

/// Whether an error comes of what is in the database, not of the query, of its rights or of this machine: a value of a row that is
/// not what the query takes it for, a function that raises, a relation that cannot be read.
fn is_of_the_data(error: &Error) -> bool {
    let Error::Statement { what, .. } = error else { return false };
    let Some(state) = error.state().filter(|_| !lacks_something_here(error)) else { return false };
    match state.code().get(..2) {
        // A constant of the query is looked at before any row is.
        Some("21" | "22" | "23" | "P0") => what == ASK,
        Some("58" | "XX") => true,
        _ => false,
    }
}

/// What the server said, without what it was asked for, which the assertion's name says, and without what may be of a row.
fn said(error: &Error) -> String {
    let text = match error {
        Error::Statement { what, source } => match source.state() {
            Some(state) if !is_of_the_query(what, state.code()) => {
                format!("error {}{}", state.code(), condition(state.code()))
            }
            _ => source.to_string(),
        },
        other => proto::failure::chain(other),
    };
    text.chars().take(WHY_MAX_CHARS).collect()
}

/// Whether an error speaks of the query, the server or this machine alone. Others quote the values that they stumble over:
/// a number that is none, a key, the name of a table that a column holds.
fn is_of_the_query(what: &str, state: &str) -> bool {
    match &state[..2] {
        "0A" | "21" | "25" | "28" | "3D" | "53" | "55" | "57" | "58" => true,
        "42" => what == PREPARE || state == "42501",
        _ => what != PREPARE && what != ASK,
    }
}

/// PostgreSQL's name of an error, for those that a query over data meets most.
fn condition(state: &str) -> &'static str {
    match state {
        "22003" => " (numeric_value_out_of_range)",
        "22007" => " (invalid_datetime_format)",
        "22012" => " (division_by_zero)",
        "22P02" => " (invalid_text_representation)",
        "P0001" => " (raise_exception)",
        "XX001" => " (data_corrupted)",
        _ => match state.get(..2) {
            Some("22") => " (data_exception)",
            Some("23") => " (integrity_constraint_violation)",
            Some("42") => " (syntax_error_or_access_rule_violation)",
            Some("54") => " (program_limit_exceeded)",
            Some("XX") => " (internal_error)",
            _ => "",
        },
    }
}
