//! The coordinator: decides what runs, remembers what happened, answers questions. It never opens a connection to a
//! fleet database.
//!
//! ```text
//! order (API) ─ catalog ─ dispatcher ══ ticket ══▶ worker
//!                 ▲  claims ◀══ claim ══ ══ grant ══▶
//!                 ├─ reports ◀══ steps, outcome ══
//!                 ├─ pulses  ◀══ leases, offers ══
//!                 └─ reaper: suspect → evidence → lost
//! ```
//!
//! The catalog is the record; messages are hints that may come twice, late or never. One coordinator leads
//! ([`Coordinator::start`] stands for election); any of several takes orders and answers questions.

pub mod api;
mod catalog;
mod chance;
mod claims;
mod clock;
pub mod config;
mod core;
mod dispatcher;
mod error;
mod fleet;
mod gaps;
mod inbox;
mod metrics;
pub mod objectives;
mod order;
mod proofs;
mod pulses;
mod reaper;
mod reports;
mod restores;
mod settle;
mod term;
mod wire;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use broker::{Broker, Declaration};
use prometheus_client::registry::Registry;
use proto::envelope::{PublicKey, Signed, SigningKey};
use proto::{ClusterName, Failure, SiteName, WorkerName};
use secrecy::SecretString;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crate::catalog::Catalog;
pub use crate::clock::{Clock, Hand};
pub use crate::config::Config;
use crate::core::Core;
pub use crate::error::{Error, Result};
use crate::metrics::Metrics;

/// What has not stopped after this long is left behind: a client or a database that does not answer.
const SHUTDOWN_MAX: Duration = Duration::from_secs(10);

/// What a coordinator is started with: its file, and the secrets that the file only points to.
#[derive(Debug)]
pub struct Options {
    /// The configuration, validated.
    pub config: Config,
    /// The catalog's URL, resolved.
    pub catalog_url: SecretString,
    /// The signing key, resolved.
    pub signing_key: SigningKey,
}

/// The coordinator. See [`start`](Self::start).
#[derive(Debug)]
pub struct Coordinator;

/// A running coordinator. Dropped, it stops in the background; [`shutdown`](Self::shutdown) waits for that.
#[derive(Debug)]
pub struct Handle {
    core: Arc<Core>,
    stop: CancellationToken,
    tasks: TaskTracker,
    socket: Option<PathBuf>,
    tcp: Option<SocketAddr>,
}

impl Coordinator {
    /// Connects to the catalog, opens the API's sockets, and stands for election in the background. The broker need
    /// not be reachable yet. Must be called inside a tokio runtime.
    pub async fn start(options: Options, broker: Broker, clock: Clock) -> Result<Handle> {
        let Options { config, catalog_url, signing_key } = options;
        let problems = config.validate();
        if !problems.is_empty() {
            return Err(Error::Config(problems));
        }
        let metrics = Metrics::new();
        let catalog = Catalog::connect_with(&catalog_url, metrics.clone()).await?;
        let declarations = [Declaration::coordinator(), Declaration::wake(&config.name)];
        if let Err(error) = broker.declare(&declarations).await {
            // Remembered by the broker, and repeated at every connection.
            tracing::warn!("Failed to {}", proto::failure::chain(&error));
        }
        let stop = CancellationToken::new();
        let issued_at_ms = {
            let mut db = catalog.read().await?;
            let workers = catalog::workers::list(&mut db).await?;
            let clusters = catalog::clusters::list(&mut db).await?;
            let known: Vec<ClusterName> = clusters.into_iter().map(|row| row.name).collect();
            for unknown in config.objectives.unknown(&known) {
                tracing::warn!("{unknown}");
            }
            workers.iter().map(|worker| worker.issued_at_ms).max().unwrap_or(0)
        };
        let core = Core::new(config, catalog, broker, clock, signing_key, metrics, stop.clone());
        core.issued_by(issued_at_ms);
        let core = Arc::new(core);
        let tasks = TaskTracker::new();
        let (socket, tcp) = api::serve::open(&core, &tasks, &stop).await?;
        tasks.spawn(term::run(Arc::clone(&core), stop.clone()));
        tasks.spawn(term::listen_for_wakes(Arc::clone(&core), stop.clone()));
        tasks.close();
        Ok(Handle { core, stop, tasks, socket, tcp })
    }
}

impl Handle {
    /// The socket of the API, when there is one.
    pub fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// The address of the API, when there is one; with its port when the configuration asked for any.
    pub fn tcp(&self) -> Option<SocketAddr> {
        self.tcp
    }

    /// The key that workers pin.
    pub fn public_key(&self) -> PublicKey {
        self.core.public_key
    }

    /// Whether this coordinator leads, as far as it knows.
    pub fn leads(&self) -> bool {
        self.core.epoch().is_some()
    }

    /// Certifies a worker of the same process, or one whose key was carried here by hand.
    pub fn certify(
        &self,
        worker: &WorkerName,
        site: &SiteName,
        key: PublicKey,
    ) -> Signed<proto::envelope::Certificate> {
        api::enrol::certificate(&self.core, worker, site, key, self.core.next_issue_ms())
    }

    /// Lets somebody else register metrics that `/metrics` shows too.
    pub fn with_registry<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        self.core.metrics.with_registry(register)
    }

    /// Steps down and stops: sockets are closed, what is being written is finished, nothing else is begun. Jobs that
    /// run go on without a coordinator.
    pub async fn shutdown(self) {
        self.stop.cancel();
        let stopped = async {
            self.tasks.wait().await;
            self.core.catalog.close().await;
        };
        if tokio::time::timeout(SHUTDOWN_MAX, stopped).await.is_err() {
            tracing::warn!(
                "Something did not stop within {} s; the catalog holds what was committed",
                SHUTDOWN_MAX.as_secs()
            );
        }
        if let Some(socket) = &self.socket {
            let _ = std::fs::remove_file(socket);
        }
    }

    /// Ends everything at once, like a crash would: for tests of what a restart finds.
    pub async fn crash(self) {
        self.core.catalog.close().await;
        self.stop.cancel();
        self.tasks.wait().await;
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}
