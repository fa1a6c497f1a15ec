//! One connection to one server, owned: when the session is dropped the connection is closed, whatever it was doing.

use std::future::Future;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Connection, Row, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::sync::CancellationToken;

pub use crate::cancel::Canceller;
use crate::error::{During as _, Error, ServerMessage};
use crate::target::Target;

/// How long a closing connection may take for each of: saying good-bye, being cancelled, saying good-bye after that.
const CLOSING: Duration = Duration::from_secs(2);
/// How long a cancelled statement may take to end before its connection is given up.
const CANCELLING: Duration = Duration::from_secs(10);

type Stream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;

/// A session. Statements run one after another; a second session is needed for anything concurrent.
pub struct Session {
    // Dropped in this order: the client first, so that the connection says good-bye, then the notice to its task.
    client: Client,
    _dropped: oneshot::Sender<()>,
    task: JoinHandle<()>,
    canceller: Canceller,
    last_words: Arc<OnceLock<ServerMessage>>,
    target: String,
    user: String,
    backend_pid: AtomicI32,
}

impl Session {
    pub(crate) fn new(
        target: &Target,
        client: Client,
        connection: Connection<Socket, Stream>,
        tls: MakeRustlsConnect,
    ) -> Self {
        let canceller = Canceller::new(client.cancel_token(), tls, target.sole_address());
        let last_words = Arc::new(OnceLock::new());
        let (dropped, on_drop) = oneshot::channel();
        let task =
            tokio::spawn(drive(connection, on_drop, canceller.clone(), Arc::clone(&last_words)));
        Self {
            client,
            _dropped: dropped,
            task,
            canceller,
            last_words,
            target: target.to_string(),
            user: target.user().to_owned(),
            backend_pid: AtomicI32::new(0),
        }
    }

    /// Host, port, role and database, for messages.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// The role that logged in.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The server process that serves this session.
    pub fn backend_pid(&self) -> i32 {
        self.backend_pid.load(Ordering::Relaxed)
    }

    pub(crate) fn set_backend_pid(&self, pid: i32) {
        self.backend_pid.store(pid, Ordering::Relaxed);
    }

    /// The driver's client, for what this type does not offer (COPY, pipelining).
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The same, for transactions and portals.
    pub(crate) fn client_mut(&mut self) -> &mut Client {
        &mut self.client
    }

    /// Whether the connection is known to be gone.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// What the server said when it ended the connection on its own.
    pub fn last_words(&self) -> Option<&ServerMessage> {
        self.last_words.get()
    }

    /// A handle that cancels this session's statements.
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Runs a query; `what` completes "failed to …".
    pub async fn query(
        &self,
        what: &str,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        self.client.query(sql, parameters).await.during(what)
    }

    /// Runs a query that returns one row.
    pub async fn one(
        &self,
        what: &str,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, Error> {
        self.client.query_one(sql, parameters).await.during(what)
    }

    /// Runs a query that returns one row or none.
    pub async fn maybe(
        &self,
        what: &str,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, Error> {
        self.client.query_opt(sql, parameters).await.during(what)
    }

    /// Runs statements without parameters and without interest in rows, separated by semicolons.
    pub async fn run(&self, what: &str, sql: &str) -> Result<(), Error> {
        self.client.batch_execute(sql).await.during(what)
    }

    /// Waits for `work` on this session, but no longer than until `cancel` or `deadline`: then the statement is cancelled
    /// on the server, and the session is usable again once `work` has ended. A server that does not end the statement
    /// within ten seconds keeps the session busy; drop it then.
    pub async fn within<T>(
        &self,
        what: &str,
        cancel: &CancellationToken,
        deadline: Option<Instant>,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::pin!(work);
        let reason = tokio::select! {
            biased;
            outcome = &mut work => return outcome,
            () = cancel.cancelled() => Error::Cancelled { what: what.to_owned() },
            () = sleep_until(deadline) => Error::Deadline { what: what.to_owned() },
        };
        // The request may overtake the statement it is meant for, so it is repeated until the statement has ended.
        let give_up = Instant::now() + CANCELLING;
        while Instant::now() < give_up {
            let (_, ended) = tokio::join!(self.canceller.cancel(), timeout(CLOSING / 4, &mut work));
            match ended {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(_)) => break,
                Err(_) => {}
            }
        }
        Err(reason)
    }

    /// Closes the connection and waits until it is closed, at most a few seconds.
    pub async fn close(self) {
        let Self { client, _dropped: dropped, task, .. } = self;
        drop(client);
        drop(dropped);
        let _ = task.await;
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Owns the connection. Ends when the server closes it, or at most three [`CLOSING`] after the session was dropped.
async fn drive(
    connection: Connection<Socket, Stream>,
    on_drop: oneshot::Receiver<()>,
    canceller: Canceller,
    last_words: Arc<OnceLock<ServerMessage>>,
) {
    tokio::pin!(connection);
    tokio::select! {
        ended = &mut connection => {
            if let Err(error) = ended {
                let _ = last_words.set(error.into());
            }
            return;
        }
        _ = on_drop => {}
    }
    if timeout(CLOSING, &mut connection).await.is_ok() {
        return;
    }
    // A statement is still running: without this the server would go on with it, and keep its locks.
    let _ = canceller.cancel().await;
    let _ = timeout(CLOSING, &mut connection).await;
}
