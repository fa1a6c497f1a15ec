//! A running worker: starts its parts, drains them, stops them.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use broker::{Broker, Declaration, Declared};
use proto::envelope::Credentials;
use proto::{Action, BootId, Code, Failure};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::archive::service::Service;
use crate::config::WorkerConfig;
use crate::outbound::Outbound;
use crate::places::Places;
use crate::shared::Shared;
use crate::spool::Spool;
use crate::{clock, consume, continuity, control, heartbeat, holdings, pulse};

/// How long a draining worker lets running jobs go on before it hands them back.
const DRAIN_MAX: Duration = Duration::from_secs(20);
/// How long handed-back jobs may take to clean up.
const HAND_BACK_MAX: Duration = Duration::from_secs(30);
/// The same after a second signal.
const HAND_BACK_AT_ONCE: Duration = Duration::from_secs(5);
/// How long the last reports may take to be confirmed; they stay on disk otherwise.
const LAST_REPORTS_MAX: Duration = Duration::from_secs(10);
/// How long a worker takes to end after its first signal, at most: whoever stops it has to wait so long.
pub const ENDS_WITHIN: Duration = Duration::from_secs(
    2 * DRAIN_MAX.as_secs() + HAND_BACK_MAX.as_secs() + LAST_REPORTS_MAX.as_secs(),
);
/// How often a worker tries to take the place of its WAL service.
const SOCKET_TRIED_EVERY: Duration = Duration::from_secs(10);

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
    parts: JoinSet<()>,
    consumers: JoinSet<()>,
    deliverer: tokio::task::JoinHandle<()>,
    /// Serves the archive to the servers on this host.
    archive: tokio::task::JoinHandle<()>,
    stop: CancellationToken,
    abandon: CancellationToken,
}

impl Worker {
    /// Starts a worker: declares its queues, announces itself, takes tickets.
    ///
    /// Neither the broker nor a coordinator has to be there yet.
    pub async fn start(
        config: WorkerConfig,
        credentials: Credentials,
        places: Places,
        broker: Broker,
    ) -> Result<Self, Failure> {
        let identity = credentials.identity();
        if identity.worker != config.name || identity.site != config.site {
            return Err(Failure::new(
                Code::ConfigInvalid,
                Action::FixConfig,
                format!(
                    "the certificate is for worker {} of site {}, the configuration for {} of {}",
                    identity.worker, identity.site, config.name, config.site
                ),
            )
            .with_hint("Enroll this worker again: pgmuster worker enroll --config FILE --enroll-token FILE."));
        }
        let unwritable = |error: io::Error| {
            Failure::new(
                Code::ConfigInvalid,
                Action::FixConfig,
                format!("failed to use the state directory {}: {error}", config.state_dir),
            )
        };
        let spool = Spool::open(config.state_dir.as_std_path()).map_err(unwritable)?;
        let undelivered = spool.undelivered().map_err(unwritable)?;
        // Without a connection they are remembered, and come first once there is one.
        let _: Declared =
            broker.declare(&[Declaration::worker(&config.name, &config.site)]).await?;

        let (stop, abandon) = (CancellationToken::new(), CancellationToken::new());
        let credentials = Arc::new(credentials);
        let (outbound, deliverer) = Outbound::start(
            broker.clone(),
            Arc::clone(&credentials),
            undelivered,
            stop.clone(),
            abandon.clone(),
        );
        let shared = Arc::new(Shared::new(
            config,
            BootId::mint(u64::try_from(clock::now_ms()).unwrap_or(0), clock::random()),
            credentials,
            Arc::new(places),
            outbound,
            spool,
            CancellationToken::new(),
        ));
        let mut parts = JoinSet::new();
        parts.spawn(control::listen(Arc::clone(&shared), broker.clone()));
        parts.spawn(pulse::beat(Arc::clone(&shared), stop.clone()));
        parts.spawn(pulse::look_around(Arc::clone(&shared)));
        parts.spawn(continuity::watch(Arc::clone(&shared)));
        parts.spawn(holdings::watch(Arc::clone(&shared)));
        parts.spawn(heartbeat::beat(Arc::clone(&shared)));
        parts.spawn(crate::jobs::clean_up_after_the_dead(Arc::clone(&shared)));
        let mut consumers = JoinSet::new();
        for queue in consume::queues(&shared) {
            consumers.spawn(consume::serve(Arc::clone(&shared), broker.clone(), queue));
        }
        let archive = tokio::spawn(serve_archive(Arc::clone(&shared), stop.clone()));
        Ok(Self { shared, parts, consumers, deliverer, archive, stop, abandon })
    }

    /// Stops taking jobs, lets short ones finish, hands long ones back, delivers the last reports. `now` ends the
    /// waiting early (a second SIGTERM).
    pub async fn drain(mut self, now: CancellationToken) {
        self.shared.drain.cancel();
        self.shared.pulse_now.notify_one();
        // A claim on its way may still be granted: its grant is handed back by whoever waits for it.
        let settled = async { while self.consumers.join_next().await.is_some() {} };
        tokio::select! {
            () = settled => {}
            () = tokio::time::sleep(DRAIN_MAX) => {}
            () = now.cancelled() => {}
        }
        self.shared.jobs.close();
        let ended = tokio::select! {
            () = self.shared.jobs.wait() => true,
            () = tokio::time::sleep(DRAIN_MAX) => false,
            () = now.cancelled() => false,
        };
        if !ended {
            self.shared.stop_all(
                &Failure::new(Code::WorkerDraining, Action::Retry, "the worker is shutting down")
                    .with_hint("The job will be given out again."),
            );
            let patience = if now.is_cancelled() { HAND_BACK_AT_ONCE } else { HAND_BACK_MAX };
            let waited = tokio::time::timeout(patience, self.shared.jobs.wait()).await;
            if waited.is_err() {
                tracing::warn!("Some jobs did not stop in time; their leases will run out");
            }
        }
        self.stop.cancel();
        if tokio::time::timeout(LAST_REPORTS_MAX, &mut self.deliverer).await.is_err() {
            self.abandon.cancel();
            tracing::warn!("Some reports could not be delivered; the next start will deliver them");
        }
        let _ = self.archive.await;
        self.consumers.shutdown().await;
        self.parts.shutdown().await;
    }
}

/// Answers the commands of servers on this host until `stop`. Without it they do the work themselves.
async fn serve_archive(shared: Arc<Shared>, stop: CancellationToken) {
    if shared.config.clusters.is_empty() {
        return;
    }
    let socket = shared.config.wal_socket();
    let mut has_warned = false;
    let listen = async {
        loop {
            let opener = Arc::new(Arc::clone(&shared.places));
            match Service::listen(socket.as_std_path(), opener).await {
                Ok(service) => return service,
                // Another worker may be about to end.
                Err(error) if !has_warned => {
                    tracing::warn!("Failed to serve the archive of WAL at {socket}: {error}");
                    has_warned = true;
                }
                Err(_) => {}
            }
            tokio::time::sleep(SOCKET_TRIED_EVERY).await;
        }
    };
    tokio::select! {
        service = listen => {
            stop.cancelled().await;
            service.stop().await;
        }
        () = stop.cancelled() => {}
    }
}
