//! What the parts of one worker share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use proto::envelope::Credentials;
use proto::message::Offers;
use proto::{BootId, Failure};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::attempts::Attempts;
use crate::claims::Claims;
use crate::clock;
use crate::config::WorkerConfig;
use crate::continuity::Standings;
use crate::heartbeat::Heartbeats;
use crate::holdings::Held;
use crate::outbound::Outbound;
use crate::places::Places;
use crate::slots::Slots;
use crate::spool::Spool;

/// A coordinator that was silent for this long counts as away: tickets wait in their queues meanwhile.
pub(crate) const COORDINATOR_SILENT_MS: i64 = 20_000;

/// What the parts of one worker share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: WorkerConfig,
    pub(crate) boot: BootId,
    pub(crate) credentials: Arc<Credentials>,
    pub(crate) places: Arc<Places>,
    pub(crate) slots: Slots,
    pub(crate) attempts: Attempts,
    pub(crate) claims: Claims,
    pub(crate) outbound: Outbound,
    pub(crate) spool: Spool,
    /// Running attempts, for draining.
    pub(crate) jobs: TaskTracker,
    /// Fires at the first SIGTERM: no new work.
    pub(crate) drain: CancellationToken,
    /// Wakes the pulse before its time.
    pub(crate) pulse_now: Notify,
    /// What the worker can do, as it looked last.
    pub(crate) offered: watch::Sender<Option<Offers>>,
    /// Set when the next pulse has to carry the offers.
    pub(crate) offers_due: AtomicBool,
    /// How the archives of WAL stand.
    pub(crate) standings: Standings,
    /// Which backups there are.
    pub(crate) held: Held,
    /// The heartbeats it made.
    pub(crate) heartbeats: Heartbeats,
    beacon_at_ms: AtomicI64,
    beacon_seen: Notify,
    epoch: AtomicU64,
}

impl Shared {
    pub(crate) fn new(
        config: WorkerConfig,
        boot: BootId,
        credentials: Arc<Credentials>,
        places: Arc<Places>,
        outbound: Outbound,
        spool: Spool,
        drain: CancellationToken,
    ) -> Self {
        let slots = Slots::new(config.slots.routine, config.slots.urgent);
        Self {
            config,
            boot,
            credentials,
            places,
            slots,
            attempts: Attempts::default(),
            claims: Claims::default(),
            outbound,
            spool,
            jobs: TaskTracker::new(),
            drain,
            pulse_now: Notify::new(),
            offered: watch::Sender::new(None),
            offers_due: AtomicBool::new(true),
            standings: Standings::default(),
            held: Held::default(),
            heartbeats: Heartbeats::default(),
            beacon_at_ms: AtomicI64::new(0),
            beacon_seen: Notify::new(),
            epoch: AtomicU64::new(0),
        }
    }

    /// Notes a beacon. `false` for one of a leader that was already replaced.
    pub(crate) fn beacon(&self, epoch: u64) -> bool {
        if self.epoch.fetch_max(epoch, Ordering::SeqCst) > epoch {
            return false;
        }
        self.beacon_at_ms.store(clock::now_ms(), Ordering::SeqCst);
        self.beacon_seen.notify_waiters();
        true
    }

    /// Whether a coordinator showed itself lately.
    pub(crate) fn coordinator_is_there(&self) -> bool {
        clock::now_ms() - self.beacon_at_ms.load(Ordering::SeqCst) < COORDINATOR_SILENT_MS
    }

    /// Waits until a coordinator shows itself.
    pub(crate) async fn coordinator_seen(&self) {
        while !self.coordinator_is_there() {
            let seen = self.beacon_seen.notified();
            if self.coordinator_is_there() {
                return;
            }
            seen.await;
        }
    }

    /// Stops everything that runs and hands it back.
    pub(crate) fn stop_all(&self, reason: &Failure) {
        self.attempts.stop_all(reason);
    }
}
