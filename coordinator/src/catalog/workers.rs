//! Workers: who they are, which life they are in, what they offer, when they were last heard.

use proto::envelope::Certificate;
use proto::message::{Offers, Pulse, RepositoryAway, RepositoryLook};
use proto::{BootId, SiteName, WorkerName};
use sqlx::AnyConnection;

use super::Tx;
use super::row::{Row, json, maybe_json, maybe_text};
use crate::error::Result;

/// Former boots that are remembered, so that a late message of an old life does not pass for one of a new.
const FORMER_BOOTS_MAX: usize = 16;

/// One row. Changed in memory and written back by [`put`] within the transaction that read it.
#[derive(Debug, Clone)]
pub(crate) struct Worker {
    pub(crate) name: WorkerName,
    pub(crate) site: SiteName,
    pub(crate) public_key: String,
    /// When its certificate was issued: an older one is not believed any more.
    pub(crate) issued_at_ms: i64,
    pub(crate) boot: Option<BootId>,
    pub(crate) former_boots: Vec<BootId>,
    pub(crate) seq: i64,
    pub(crate) seen_at_ms: Option<i64>,
    pub(crate) every_ms: i64,
    pub(crate) urgent_free: u32,
    pub(crate) routine_free: u32,
    pub(crate) draining: bool,
    pub(crate) offers: Option<Offers>,
}

/// What a pulse means in the life of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// A new process: the one before is gone.
    New,
    /// The process that is known.
    Same,
    /// A message from the past: a former process, or an older pulse.
    Past,
}

impl Worker {
    /// A worker that nothing but its certificate is known of.
    pub(crate) fn of_certificate(certificate: &Certificate) -> Self {
        Self {
            name: certificate.worker.clone(),
            site: certificate.site.clone(),
            public_key: certificate.key.to_string(),
            issued_at_ms: certificate.issued_at_ms,
            boot: None,
            former_boots: Vec::new(),
            seq: 0,
            seen_at_ms: None,
            every_ms: 0,
            urgent_free: 0,
            routine_free: 0,
            draining: false,
            offers: None,
        }
    }

    /// Takes the newer of two certificates; false when this one has been replaced.
    pub(crate) fn accept(&mut self, certificate: &Certificate) -> bool {
        if certificate.issued_at_ms < self.issued_at_ms {
            return false;
        }
        if certificate.issued_at_ms > self.issued_at_ms {
            self.issued_at_ms = certificate.issued_at_ms;
            self.public_key = certificate.key.to_string();
            self.site = certificate.site.clone();
            // Whatever a former life said carries the older certificate.
            self.former_boots.clear();
        }
        self.public_key == certificate.key.to_string()
    }

    /// Whether this life is over: another began after it. One that is not remembered is taken for a new life, also
    /// after the worker's clock went back, but not when it began before everything of a full memory: it may have been
    /// forgotten.
    pub(crate) fn is_former(&self, boot: BootId) -> bool {
        let forgotten = self.former_boots.len() >= FORMER_BOOTS_MAX
            && self.former_boots.iter().all(|former| boot < *former);
        self.boot != Some(boot) && (forgotten || self.former_boots.contains(&boot))
    }

    /// Takes in a pulse, unless it is from the past.
    pub(crate) fn hear(&mut self, pulse: &Pulse, now_ms: i64) -> Life {
        let seq = i64::try_from(pulse.seq).unwrap_or(i64::MAX);
        let life = match self.boot {
            Some(boot) if boot == pulse.boot && seq <= self.seq => return Life::Past,
            Some(boot) if boot == pulse.boot => Life::Same,
            _ if self.is_former(pulse.boot) => return Life::Past,
            _ => Life::New,
        };
        if life == Life::New {
            self.former_boots.extend(self.boot);
            // Boots sort by the time they began: what is forgotten is older than all that is remembered.
            self.former_boots.sort_unstable();
            let excess = self.former_boots.len().saturating_sub(FORMER_BOOTS_MAX);
            self.former_boots.drain(..excess);
            self.boot = Some(pulse.boot);
        }
        self.seq = seq;
        self.seen_at_ms = Some(now_ms);
        self.every_ms = i64::from(pulse.every_ms);
        self.urgent_free = pulse.slots.urgent_free;
        self.routine_free = pulse.slots.routine_free;
        self.draining = pulse.draining;
        if let Some(offers) = &pulse.offers {
            let before = self.offers.replace(offers.clone());
            self.keep_gone(before.as_ref());
        }
        life
    }

    /// A repository that it said was gone is gone until a look of it succeeds, also when it began anew meanwhile: who has not
    /// looked yet, or cannot, has not seen it.
    fn keep_gone(&mut self, before: Option<&Offers>) {
        let before = before.map_or(&[][..], |offers| &offers.clusters);
        for offer in self.offers.iter_mut().flat_map(|offers| &mut offers.clusters) {
            let sees_nothing = match offer.repository_look {
                Some(RepositoryLook::NotYet | RepositoryLook::Failed) => true,
                Some(RepositoryLook::Found { .. }) | None => false,
            };
            let gone = before.iter().find(|before| before.name == offer.name);
            let gone = gone.and_then(|before| before.repository_away.as_ref());
            if let Some(gone) = gone.filter(|gone| sees_nothing && gone.is_gone())
                && !offer.repository_away.as_ref().is_some_and(RepositoryAway::is_gone)
            {
                offer.repository_away = Some(gone.clone());
            }
        }
    }

    /// Whether its pulses come: three in a row may be missed.
    pub(crate) fn is_alive(&self, now_ms: i64) -> bool {
        self.is_heard(now_ms, self.every_ms.max(1_000).saturating_mul(3))
    }

    /// Whether one came within the last `ms`.
    pub(crate) fn is_heard(&self, now_ms: i64, ms: i64) -> bool {
        self.seen_at_ms.is_some_and(|seen| now_ms.saturating_sub(seen) <= ms)
    }

    fn from_row(row: &Row) -> Result<Self> {
        let small = |number: i64| u32::try_from(number).unwrap_or(0);
        Ok(Self {
            name: row.parsed("name")?,
            site: row.parsed("site")?,
            public_key: row.text("public_key")?,
            issued_at_ms: row.number("issued_at_ms")?,
            boot: row.maybe_parsed("boot")?,
            former_boots: row.json("former_boots")?,
            seq: row.number("seq")?,
            seen_at_ms: row.maybe_number("seen_at_ms")?,
            every_ms: row.number("every_ms")?,
            urgent_free: small(row.number("urgent_free")?),
            routine_free: small(row.number("routine_free")?),
            draining: row.flag("draining")?,
            offers: row.maybe_json("offers")?,
        })
    }
}

/// Writes a worker as it is now; the key is its name.
pub(crate) async fn put(tx: &mut Tx<'_>, worker: &Worker) -> Result<()> {
    sqlx::query(
        "-- put_worker
         INSERT INTO workers (
             name, site, public_key, issued_at_ms, boot, former_boots, seq, seen_at_ms, every_ms, urgent_free,
             routine_free, draining, offers
         ) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
         ON CONFLICT (name) DO UPDATE SET
             site = excluded.site, public_key = excluded.public_key, issued_at_ms = excluded.issued_at_ms,
             boot = excluded.boot, former_boots = excluded.former_boots, seq = excluded.seq,
             seen_at_ms = excluded.seen_at_ms, every_ms = excluded.every_ms, urgent_free = excluded.urgent_free,
             routine_free = excluded.routine_free, draining = excluded.draining, offers = excluded.offers",
    )
    .bind(worker.name.as_str())
    .bind(worker.site.as_str())
    .bind(worker.public_key.as_str())
    .bind(worker.issued_at_ms)
    .bind(maybe_text(worker.boot.as_ref()))
    .bind(json(&worker.former_boots))
    .bind(worker.seq)
    .bind(worker.seen_at_ms)
    .bind(worker.every_ms)
    .bind(i64::from(worker.urgent_free))
    .bind(i64::from(worker.routine_free))
    .bind(i64::from(worker.draining))
    .bind(maybe_json(worker.offers.as_ref()))
    .execute(tx.db())
    .await?;
    Ok(())
}

pub(crate) async fn get(db: &mut AnyConnection, name: &WorkerName) -> Result<Option<Worker>> {
    let row = sqlx::query(
        "-- get_worker
         SELECT * FROM workers WHERE name = $1",
    )
    .bind(name.as_str())
    .fetch_optional(db)
    .await?;
    row.map(|row| Worker::from_row(&Row(row))).transpose()
}

pub(crate) async fn list(db: &mut AnyConnection) -> Result<Vec<Worker>> {
    let rows = sqlx::query(
        "-- list_workers
         SELECT * FROM workers ORDER BY name",
    )
    .fetch_all(db)
    .await?;
    rows.into_iter().map(|row| Worker::from_row(&Row(row))).collect()
}
