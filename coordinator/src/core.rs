//! What all parts of a coordinator share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};

use broker::Broker;
use proto::envelope::{PublicKey, SigningKey};
use proto::{AttemptId, BootId};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::catalog::Catalog;
use crate::clock::Clock;
use crate::config::Config;
use crate::metrics::Metrics;

/// How long an attempt that a worker wrongly runs stays on the beacon after it was last listed.
const REVOKED_MS: i64 = 60_000;

/// Shared by all parts of one coordinator.
pub(crate) struct Core {
    pub(crate) config: Config,
    pub(crate) catalog: Catalog,
    pub(crate) broker: Broker,
    pub(crate) clock: Clock,
    pub(crate) key: SigningKey,
    pub(crate) public_key: PublicKey,
    pub(crate) metrics: Metrics,
    /// Cancelled when the coordinator stops.
    pub(crate) stop: CancellationToken,
    /// Which life of the coordinator this is.
    pub(crate) boot: BootId,
    /// Rings when there may be something to dispatch.
    pub(crate) doorbell: Notify,
    /// Rings when a job changed, for whoever waits for one.
    changed: watch::Sender<u64>,
    /// The epoch this coordinator leads in, 0 while it does not.
    epoch: AtomicI64,
    /// When the newest certificate that is known here was issued.
    issued_at_ms: AtomicI64,
    /// Attempts that pulses listed although they are over, with token and time.
    wrongly_listed: Mutex<HashMap<AttemptId, (u64, i64)>>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("name", &self.config.name)
            .field("boot", &self.boot)
            .finish_non_exhaustive()
    }
}

impl Core {
    pub(crate) fn new(
        config: Config,
        catalog: Catalog,
        broker: Broker,
        clock: Clock,
        key: SigningKey,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Self {
        let boot_ms = u64::try_from(clock.now_ms()).unwrap_or(0);
        Self {
            config,
            catalog,
            broker,
            clock,
            public_key: key.public(),
            key,
            metrics,
            stop,
            boot: BootId::mint(boot_ms, crate::chance::bytes()),
            doorbell: Notify::new(),
            changed: watch::Sender::new(0),
            epoch: AtomicI64::new(0),
            issued_at_ms: AtomicI64::new(0),
            wrongly_listed: Mutex::default(),
        }
    }

    pub(crate) fn now_ms(&self) -> i64 {
        self.clock.now_ms()
    }

    /// A certificate was issued then.
    pub(crate) fn issued_by(&self, at_ms: i64) {
        self.issued_at_ms.fetch_max(at_ms, Ordering::AcqRel);
    }

    /// The time of the next certificate: now, but later than any before, also after the machine's clock went back.
    pub(crate) fn next_issue_ms(&self) -> i64 {
        let now_ms = self.now_ms();
        let next = |last: i64| Some(now_ms.max(last.saturating_add(1)));
        let last = self.issued_at_ms.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        now_ms.max(last.unwrap_or(0).saturating_add(1))
    }

    /// A job changed: whoever waits looks again.
    pub(crate) fn job_changed(&self) {
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Rings at every change of any job.
    pub(crate) fn job_changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(crate) fn set_epoch(&self, epoch: i64) {
        self.epoch.store(epoch, Ordering::Release);
    }

    /// The epoch this coordinator leads in, as far as it knows.
    pub(crate) fn epoch(&self) -> Option<i64> {
        Some(self.epoch.load(Ordering::Acquire)).filter(|epoch| *epoch != 0)
    }

    /// A worker runs something it should not.
    pub(crate) fn listed_wrongly(&self, attempt: AttemptId, token: u64, now_ms: i64) {
        let mut listed = self.wrongly_listed.lock().unwrap_or_else(PoisonError::into_inner);
        listed.insert(attempt, (token, now_ms));
    }

    /// What workers should not run although they did a moment ago.
    pub(crate) fn wrongly_listed(&self, now_ms: i64) -> Vec<(AttemptId, u64)> {
        let mut listed = self.wrongly_listed.lock().unwrap_or_else(PoisonError::into_inner);
        listed.retain(|_, (_, at_ms)| now_ms - *at_ms < REVOKED_MS);
        listed.iter().map(|(attempt, (token, _))| (*attempt, *token)).collect()
    }

    /// Whether messages can be sent and received.
    pub(crate) fn broker_up(&self) -> bool {
        self.broker.link().borrow().is_up()
    }
}
