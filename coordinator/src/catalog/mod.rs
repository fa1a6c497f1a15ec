//! The coordinator's memory: who may run what, what happened, what exists.
//!
//! One SQL text for SQLite and PostgreSQL; a file a table. Every decision that is written is made inside one short
//! [`transact`](Catalog::transact), which never waits for anything but the database, and is repeated from its
//! beginning when the database says so. What the leader writes is written in a [`lead`](Catalog::lead), which fails
//! when another coordinator leads.
//!
//! Losing the catalog loses history, never a backup.

pub(crate) mod attempts;
pub(crate) mod backups;
pub(crate) mod clusters;
pub(crate) mod copies;
mod dialect;
pub(crate) mod events;
pub(crate) mod heartbeats;
pub(crate) mod jobs;
pub(crate) mod leader;
pub(crate) mod outbox;
pub(crate) mod row;
pub(crate) mod steps;
#[cfg(test)]
mod suite;
pub(crate) mod tokens;
pub(crate) mod workers;

use std::fs::OpenOptions;
use std::future::Future;
use std::marker::PhantomData;
use std::os::unix::fs::OpenOptionsExt;
use std::pin::Pin;
use std::sync::{Arc, Once};
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sqlx::any::AnyPoolOptions;
use sqlx::migrate::Migrator;
use sqlx::pool::PoolConnection;
use sqlx::{Any, AnyConnection, AnyPool, Transaction};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::proofs;
use dialect::Dialect;

/// Connections that only read.
const READERS_MAX: u32 = 4;
/// How often a transaction is begun anew before its error is believed,
const TRIES_MAX: u32 = 8;
/// and for how long: a database that stays locked is told, not waited for.
const TRY_FOR: Duration = Duration::from_secs(5);
/// How long a connection may be waited for.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// A boxed future that borrows from its transaction.
pub(crate) type TxFuture<'t, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 't>>;

/// The catalog. Clones share its connections.
#[derive(Debug, Clone)]
pub struct Catalog {
    dialect: Dialect,
    readers: AnyPool,
    writer: AnyPool,
    /// One writing transaction at a time in this process: SQLite has no more, and on PostgreSQL it spares the leader
    /// serialisation failures against itself.
    turn: Arc<Semaphore>,
    metrics: Metrics,
}

/// A transaction. `'e` is how long what its body borrows lives. Dropped, it is rolled back.
pub(crate) struct Tx<'e> {
    transaction: Transaction<'static, Any>,
    body: PhantomData<&'e ()>,
}

impl Tx<'_> {
    /// The connection, inside the transaction.
    pub(crate) fn db(&mut self) -> &mut AnyConnection {
        &mut self.transaction
    }
}

impl Catalog {
    /// Connects, and brings the tables to this version. A SQLite file is created when it is missing.
    pub async fn connect(url: &SecretString) -> Result<Self> {
        Self::connect_with(url, Metrics::new()).await
    }

    pub(crate) async fn connect_with(url: &SecretString, metrics: Metrics) -> Result<Self> {
        static DRIVERS: Once = Once::new();
        DRIVERS.call_once(sqlx::any::install_default_drivers);
        let dialect = Dialect::of_url(url.expose_secret()).ok_or(Error::CatalogUrl)?;
        let url = match dialect {
            Dialect::Sqlite if !url.expose_secret().contains('?') => {
                make_private(url.expose_secret());
                SecretString::from(format!("{}?mode=rwc", url.expose_secret()))
            }
            Dialect::Sqlite | Dialect::Postgres => url.clone(),
        };
        let writer = pool(dialect, &url, 1).await?;
        migrations().run(&writer).await.map_err(Error::Migrate)?;
        let readers = pool(dialect, &url, READERS_MAX).await?;
        let catalog = Self { dialect, readers, writer, turn: Arc::new(Semaphore::new(1)), metrics };
        proofs::judge_former(&catalog).await?;
        Ok(catalog)
    }

    /// Closes all connections.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    /// A connection for reading. What is read may be old by the time it is used; decisions are made in transactions.
    pub(crate) async fn read(&self) -> Result<PoolConnection<Any>> {
        self.readers.acquire().await.map_err(|source| Error::Catalog { doing: "read", source })
    }

    /// Runs `body` as one transaction: all of it or nothing. Repeated from its beginning when the database asks for
    /// that, so `body` must have no effect elsewhere.
    pub(crate) async fn transact<'e, T, F>(&self, name: &'static str, body: F) -> Result<T>
    where
        F: for<'t> FnMut(&'t mut Tx<'e>) -> TxFuture<'t, T>,
    {
        self.repeat(name, None, body).await
    }

    /// Runs `body` as a transaction of the leader of `epoch`: nothing is written when another one leads.
    pub(crate) async fn lead<'e, T, F>(&self, epoch: i64, name: &'static str, body: F) -> Result<T>
    where
        F: for<'t> FnMut(&'t mut Tx<'e>) -> TxFuture<'t, T>,
    {
        self.repeat(name, Some(epoch), body).await
    }

    /// Whether the same transaction with the same values would fail whenever it is tried.
    pub(crate) fn fails_for_ever(&self, error: &Error) -> bool {
        match error {
            Error::Stored { .. } => true,
            Error::Catalog { source, .. } => self.dialect.is_lasting(source),
            _ => false,
        }
    }

    async fn repeat<'e, T, F>(
        &self,
        name: &'static str,
        epoch: Option<i64>,
        mut body: F,
    ) -> Result<T>
    where
        F: for<'t> FnMut(&'t mut Tx<'e>) -> TxFuture<'t, T>,
    {
        let _turn = self.turn.acquire().await.expect("the semaphore is never closed");
        let began = Instant::now();
        let mut tries = 0;
        let result = loop {
            tries += 1;
            match self.once(name, epoch, &mut body).await {
                Err(Error::Catalog { source, .. })
                    if tries < TRIES_MAX
                        && began.elapsed() < TRY_FOR
                        && self.dialect.is_passing(&source) =>
                {
                    self.metrics.catalog_retried(name);
                    // Grows from 2 ms to a quarter of a second.
                    tokio::time::sleep(Duration::from_millis(1 << tries)).await;
                }
                result => break result,
            }
        };
        self.metrics.catalog_transacted(name, began.elapsed());
        result
    }

    async fn once<'e, T, F>(
        &self,
        name: &'static str,
        epoch: Option<i64>,
        body: &mut F,
    ) -> Result<T>
    where
        F: for<'t> FnMut(&'t mut Tx<'e>) -> TxFuture<'t, T>,
    {
        let failed = |source| Error::Catalog { doing: name, source };
        let transaction = self.writer.begin_with(self.dialect.begin()).await.map_err(failed)?;
        let mut tx = Tx { transaction, body: PhantomData };
        if let Some(epoch) = epoch {
            let held = sqlx::query(self.dialect.hold_leader())
                .bind(epoch)
                .fetch_optional(tx.db())
                .await
                .map_err(failed)?;
            if held.is_none() {
                return Err(Error::StaleEpoch { epoch });
            }
        }
        match body(&mut tx).await {
            Ok(value) => {
                tx.transaction.commit().await.map_err(failed)?;
                Ok(value)
            }
            Err(Error::Catalog { source, .. }) => Err(failed(source)),
            Err(error) => Err(error),
        }
    }
}

/// What brings the tables to this version. One that was applied anywhere is never changed.
fn migrations() -> Migrator {
    sqlx::migrate!("./migrations")
}

/// Makes the file of a new catalog readable by its owner only; SQLite gives its side files the same mode. When this
/// cannot be done, opening it says why.
fn make_private(url: &str) {
    let path = url.trim_start_matches("sqlite:");
    let path = path.strip_prefix("//").unwrap_or(path);
    let _ = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
}

async fn pool(dialect: Dialect, url: &SecretString, connections_max: u32) -> Result<AnyPool> {
    AnyPoolOptions::new()
        .max_connections(connections_max)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .after_connect(move |connection, _| Box::pin(dialect::set_up(dialect, connection)))
        .connect(url.expose_secret())
        .await
        .map_err(|source| Error::Catalog { doing: "connect", source })
}
