//! Opens sessions: straight to one server, with settings of our own, and certain that nothing stands in between.
//!
//! A role or database may carry any setting (`statement_timeout`, `search_path`, `default_transaction_read_only`);
//! a session of ours overrides every one that could change what our statements mean.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proto::JobId;
use tokio_postgres::error::SqlState;

use crate::error::{Error, ServerMessage};
use crate::session::Session;
use crate::target::{Target, scrubbed};
use crate::tls;
use crate::version::ServerVersion;

/// The databases that may hold our locks, in the order they are tried. The first that exists is used by everybody.
const MAINTENANCE_DATABASES: [&str; 2] = ["postgres", "template1"];

/// How long a server has that goes down or comes up, before it is asked again.
const AGAIN_AFTER: Duration = Duration::from_millis(250);

/// By these the server notices within two minutes that a worker is gone whose connection nobody closed: its backup ends
/// then, and the temporary slot that holds back WAL goes with it. The system's own defaults let both live for hours.
const SERVER_KEEPALIVES: &str = " SET tcp_keepalives_idle = 60; \
     SET tcp_keepalives_interval = 10; \
     SET tcp_keepalives_count = 6; \
     SET tcp_user_timeout = 60000;";

/// What a session is for, and how much the server may make it wait.
#[derive(Debug, Clone)]
pub struct Purpose {
    /// Shown in `pg_stat_activity`; at most 63 bytes.
    pub application_name: String,
    /// Whether transactions begin read-only. Functions with effects elsewhere (slots, backup mode) work all the same.
    pub read_only: bool,
    /// Limit of one statement; zero is none.
    pub statement_timeout: Duration,
    /// Limit of waiting for one lock; zero is none.
    pub lock_timeout: Duration,
}

impl Purpose {
    /// Questions to the server's own views: short, read-only.
    pub fn ask(job: &JobId) -> Self {
        Self {
            application_name: application_name(job),
            read_only: true,
            statement_timeout: Duration::from_secs(30),
            lock_timeout: Duration::from_secs(2),
        }
    }

    /// The session that carries a backup: it may have to wait long for a spread checkpoint.
    pub fn backup(job: &JobId) -> Self {
        Self { statement_timeout: Duration::ZERO, lock_timeout: Duration::ZERO, ..Self::ask(job) }
    }

    /// Work that changes something, within the limits given.
    pub fn work(job: &JobId, statement_timeout: Duration, lock_timeout: Duration) -> Self {
        Self { read_only: false, statement_timeout, lock_timeout, ..Self::ask(job) }
    }
}

/// `pgmuster/` and the last twelve digits of the job's id, which are random: the first ones are the time.
pub fn application_name(job: &JobId) -> String {
    let id = job.to_string();
    format!("pgmuster/{}", id.rsplit('-').next().unwrap_or(&id))
}

/// Connects, applies the purpose's settings, and refuses versions and poolers we cannot work with. A server that is being
/// restarted is asked a second time.
///
/// Dropping the session closes the connection: a running statement is cancelled and the server rolls back.
pub async fn connect(target: &Target, purpose: &Purpose) -> Result<Session, Error> {
    let mut is_in = false;
    match Box::pin(connect_once(target, purpose, &mut is_in)).await {
        // Nothing was asked of it yet but who it is.
        Err(Error::Unreachable { source, .. }) if is_in || source.is_farewell() => {
            tokio::time::sleep(AGAIN_AFTER).await;
            Box::pin(connect_once(target, purpose, &mut is_in)).await
        }
        outcome => outcome,
    }
}

/// `is_in` tells whether the server let us in before it failed.
async fn connect_once(
    target: &Target,
    purpose: &Purpose,
    is_in: &mut bool,
) -> Result<Session, Error> {
    let nonce = nonce();
    let mut config = target.config(&format!("-c pgmuster.session={nonce}"));
    config.application_name(&purpose.application_name);
    let password = target.resolve_password()?;
    if let Some(password) = &password {
        config.password(secrecy::ExposeSecret::expose_secret(password));
    }
    let tls = tls::connector(target.tls())?;
    let login = tokio::time::timeout(target.login_timeout(), config.connect(tls.clone())).await;
    let (client, connection) = match login {
        Ok(Ok(made)) => made,
        Ok(Err(error)) => {
            return Err(login_error(target, scrubbed(error.into(), password.as_ref())));
        }
        Err(_) => {
            let source = ServerMessage::gone(format!(
                "no answer within {} s",
                target.login_timeout().as_secs()
            ));
            return Err(Error::Unreachable { target: target.to_string(), source });
        }
    };
    *is_in = true;
    let session = Session::new(target, client, connection, tls);
    let begun = async {
        let version = prepare(&session, purpose, !target.is_socket()).await?;
        if !version.is_supported() {
            return Err(Error::Version { target: target.to_string(), found: version.to_string() });
        }
        refuse_pooler(&session, purpose, &nonce).await
    };
    match begun.await {
        Ok(()) => Ok(session),
        Err(error) if meets_others(&error) => Err(Error::Pooler {
            target: target.to_string(),
            evidence: "statements of several clients meet in one server process".to_owned(),
        }),
        Err(Error::Statement { source, .. }) if source.is_closed() => {
            // What it said before it hung up tells more than that the connection is gone.
            let source = session.last_words().cloned().unwrap_or(source);
            Err(Error::Unreachable { target: target.to_string(), source })
        }
        Err(error) => Err(error),
    }
}

/// Whether a statement that was just prepared is in another server process, or somebody else's of its name in this one.
fn meets_others(error: &Error) -> bool {
    let states = [SqlState::INVALID_SQL_STATEMENT_NAME, SqlState::DUPLICATE_PSTATEMENT];
    error.state().is_some_and(|state| states.contains(state))
}

/// Connects to the database that holds the locks: `postgres`, or `template1` where somebody dropped it.
pub async fn connect_maintenance(target: &Target, purpose: &Purpose) -> Result<Session, Error> {
    let [first, second] = MAINTENANCE_DATABASES.map(|database| target.with_database(database));
    match connect(&first, purpose).await {
        Err(error) if error.state() == Some(&SqlState::INVALID_CATALOG_NAME) => {
            connect(&second, purpose).await
        }
        outcome => outcome,
    }
}

/// A text that no other session of any process sent before: process, start of this process's time, counter.
pub(crate) fn nonce() -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let random =
        std::hash::BuildHasher::hash_one(&std::collections::hash_map::RandomState::new(), count);
    format!("{:x}_{count:x}_{random:x}", std::process::id())
}

async fn prepare(
    session: &Session,
    purpose: &Purpose,
    is_tcp: bool,
) -> Result<ServerVersion, Error> {
    let on_off = |on: bool| if on { "on" } else { "off" };
    // One simple query and no function call: it runs before our search_path holds.
    let mut settings = format!(
        "SET search_path = pg_catalog, pg_temp; \
         SET client_encoding = 'UTF8'; \
         SET standard_conforming_strings = on; \
         SET datestyle = 'ISO, YMD'; \
         SET intervalstyle = 'postgres'; \
         SET timezone = 'UTC'; \
         SET bytea_output = 'hex'; \
         SET row_security = off; \
         SET max_parallel_workers_per_gather = 0; \
         SET max_parallel_maintenance_workers = 0; \
         SET jit = off; \
         SET synchronous_commit = local; \
         SET default_transaction_isolation = 'read committed'; \
         SET default_transaction_deferrable = off; \
         SET default_transaction_read_only = {}; \
         SET statement_timeout = {}; \
         SET lock_timeout = {}; \
         SET idle_in_transaction_session_timeout = 0; \
         SET idle_session_timeout = 0; \
         SET client_connection_check_interval = 10000;",
        on_off(purpose.read_only),
        purpose.statement_timeout.as_millis(),
        purpose.lock_timeout.as_millis(),
    );
    let what = "set up the session";
    let version = session.one("ask for the version", "SHOW server_version_num", &[]).await?;
    let version: String = version.get(0);
    let version = ServerVersion(version.parse().map_err(|_| Error::Answer {
        what: "ask for the version".to_owned(),
        answer: version.chars().take(40).collect(),
    })?);
    if !version.is_supported() {
        return Ok(version);
    }
    if is_tcp {
        // A server whose system has no such limit notes that in its log and goes on.
        settings.push_str(SERVER_KEEPALIVES);
    }
    if version.major() >= 17 {
        settings.push_str(" SET transaction_timeout = 0;");
    }
    session.run(what, &settings).await?;
    Ok(version)
}

/// A server of our own got exactly our start-up packet and keeps its session; a pooler's did not or does not.
async fn refuse_pooler(session: &Session, purpose: &Purpose, nonce: &str) -> Result<(), Error> {
    let pooler = |evidence: &str| {
        Err(Error::Pooler { target: session.target().to_owned(), evidence: evidence.to_owned() })
    };
    let state = "SELECT pg_catalog.pg_backend_pid(), \
                 pg_catalog.current_setting('pgmuster.session', true), \
                 pg_catalog.current_setting('application_name'), \
                 pg_catalog.current_setting('search_path')";
    let mut pid = None;
    // Each round is a transaction of its own, where a transaction pooler may change the server connection.
    for _ in 0..2 {
        let row = session.one("look for a pooler", state, &[]).await?;
        let this_pid: i32 = row.get(0);
        if row.get::<_, Option<&str>>(1) != Some(nonce) {
            return pooler("the server did not get the options of our start-up packet");
        }
        if row.get::<_, &str>(2) != purpose.application_name {
            return pooler("the server shows another application_name");
        }
        if row.get::<_, &str>(3) != "pg_catalog, pg_temp" {
            return pooler("a setting of the session did not survive its transaction");
        }
        if *pid.get_or_insert(this_pid) != this_pid {
            return pooler("two statements ran in two server processes");
        }
    }
    if let Some(pid) = pid {
        session.set_backend_pid(pid);
    }
    Ok(())
}

fn login_error(target: &Target, source: ServerMessage) -> Error {
    let shown = target.to_string();
    if source.is_farewell() {
        return Error::Unreachable { target: shown, source };
    }
    let Some(state) = source.state().cloned() else {
        let text = source.to_string();
        // Errors of TLS and of our own side of SASL come without a SQLSTATE and do not pass by themselves.
        if text.contains("TLS") || text.contains("certificate") {
            let cure = "Check sslmode and sslrootcert against the server's certificate and its ssl setting.".to_owned();
            return Error::Refused { target: shown, cure, source };
        }
        if text.contains("authentication")
            || text.contains("password missing")
            || text.contains("configuration")
        {
            let cure =
                "Give the role's password in a password file (passfile), or correct it there."
                    .to_owned();
            return Error::Refused { target: shown, cure, source };
        }
        return Error::Unreachable { target: shown, source };
    };
    let (user, database) = (target.user(), target.database());
    let cure = match state.code() {
        // PgBouncer refuses what it does not know.
        "08P01" if source.to_string().contains("startup parameter") => {
            return Error::Pooler { target: shown, evidence: source.to_string() };
        }
        "28P01" => format!("Correct the password of role {user} in the worker's password file."),
        "28000" => format!(
            "Let role {user} exist with LOGIN, and add a line for it, database {database} and this host to pg_hba.conf."
        ),
        "3D000" => format!(
            "Create database {database}, or name another one in the worker's configuration."
        ),
        "42501" => format!(
            "GRANT CONNECT ON DATABASE {} TO {};",
            crate::quote::identifier(database),
            crate::quote::identifier(user)
        ),
        "53300" => "Raise max_connections, or free connections; the job is tried again.".to_owned(),
        "55000" => format!("Database {database} does not accept connections; name another one."),
        _ => "The server's log says why it refused the connection.".to_owned(),
    };
    Error::Refused { target: shown, cure, source }
}
