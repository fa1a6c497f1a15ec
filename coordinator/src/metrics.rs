//! The coordinator's Prometheus metrics: names, labels, and nothing else. What is known from the catalog is set when
//! somebody asks ([`set`](Metrics::set)); what happens is counted when it happens.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use policy::state::ClusterState;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use proto::job::{JobKind, JobState};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKind {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKindAndState {
    kind: &'static str,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKindAndResult {
    kind: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByName {
    name: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByState {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByQueue {
    queue: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCluster {
    cluster: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByClusterAndState {
    cluster: String,
    state: &'static str,
}

/// What the catalog says at one moment.
#[derive(Debug, Default)]
pub(crate) struct Moment {
    pub(crate) jobs: Vec<(JobKind, JobState, i64)>,
    pub(crate) workers_alive: i64,
    pub(crate) workers_silent: i64,
    pub(crate) workers_draining: i64,
    pub(crate) clusters: Vec<ClusterMoment>,
    pub(crate) leading: bool,
    pub(crate) broker_up: bool,
}

/// One cluster at one moment; times in Unix seconds, 0 for never.
#[derive(Debug)]
pub(crate) struct ClusterMoment {
    pub(crate) cluster: String,
    pub(crate) state: ClusterState,
    pub(crate) registered_s: i64,
    pub(crate) contact_s: i64,
    pub(crate) backup_s: i64,
    pub(crate) proof_s: i64,
    pub(crate) proof_level: i64,
    pub(crate) assertions_failed: i64,
    pub(crate) assertions_unasked: i64,
    pub(crate) size_bytes: i64,
    pub(crate) stored_bytes: i64,
    pub(crate) silent_changes: i64,
    pub(crate) eligible_workers: i64,
    pub(crate) recovery_point_s: i64,
    pub(crate) unproved_point_s: i64,
    /// `None` before it is measured, and then there is no figure.
    pub(crate) recovery_time_s: Option<i64>,
    /// What is promised; `None` for nothing.
    pub(crate) rpo_objective_s: Option<i64>,
    pub(crate) rto_objective_s: Option<i64>,
    pub(crate) wal_waiting: i64,
    pub(crate) wal_ready: i64,
    pub(crate) pg_wal_bytes: i64,
}

type ClusterGauge = Family<ByCluster, Gauge>;
type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

#[derive(Debug)]
struct All {
    registry: Mutex<Registry>,
    jobs: Family<ByKindAndResult, Counter>,
    job_duration: Histograms<ByKind>,
    job_wait: Histograms<ByKind>,
    attempts_lost: Family<ByKind, Counter>,
    lease_storms: Counter,
    messages_refused: Family<ByQueue, Counter>,
    dead_letters: Counter,
    transactions: Histograms<ByName>,
    transactions_retried: Family<ByName, Counter>,
    jobs_in_state: Family<ByKindAndState, Gauge>,
    workers: Family<ByState, Gauge>,
    leader: Gauge,
    broker_up: Gauge,
    cluster_state: Family<ByClusterAndState, Gauge>,
    registered: ClusterGauge,
    contact: ClusterGauge,
    backup: ClusterGauge,
    proof: ClusterGauge,
    proof_level: ClusterGauge,
    assertions_failed: ClusterGauge,
    assertions_unasked: ClusterGauge,
    size: ClusterGauge,
    stored: ClusterGauge,
    silent_changes: ClusterGauge,
    eligible: ClusterGauge,
    recovery_point: ClusterGauge,
    unproved_point: ClusterGauge,
    recovery_time: ClusterGauge,
    rpo_objective: ClusterGauge,
    rto_objective: ClusterGauge,
    wal_waiting: ClusterGauge,
    wal_ready: ClusterGauge,
    pg_wal_bytes: ClusterGauge,
}

/// All metrics of one coordinator. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Metrics(Arc<All>);

fn job_seconds() -> Histogram {
    Histogram::new(telemetry::metrics::JOB_SECONDS)
}

fn wait_seconds() -> Histogram {
    Histogram::new(telemetry::metrics::WAIT_SECONDS)
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let all = All {
            registry: Mutex::new(Registry::with_prefix("pgmuster")),
            jobs: Family::default(),
            job_duration: Family::new_with_constructor(job_seconds),
            job_wait: Family::new_with_constructor(job_seconds),
            attempts_lost: Family::default(),
            lease_storms: Counter::default(),
            messages_refused: Family::default(),
            dead_letters: Counter::default(),
            transactions: Family::new_with_constructor(wait_seconds),
            transactions_retried: Family::default(),
            jobs_in_state: Family::default(),
            workers: Family::default(),
            leader: Gauge::default(),
            broker_up: Gauge::default(),
            cluster_state: Family::default(),
            registered: Family::default(),
            contact: Family::default(),
            backup: Family::default(),
            proof: Family::default(),
            proof_level: Family::default(),
            assertions_failed: Family::default(),
            assertions_unasked: Family::default(),
            size: Family::default(),
            stored: Family::default(),
            silent_changes: Family::default(),
            eligible: Family::default(),
            recovery_point: Family::default(),
            unproved_point: Family::default(),
            recovery_time: Family::default(),
            rpo_objective: Family::default(),
            rto_objective: Family::default(),
            wal_waiting: Family::default(),
            wal_ready: Family::default(),
            pg_wal_bytes: Family::default(),
        };
        {
            let mut locked = all.registry.lock().unwrap_or_else(PoisonError::into_inner);
            let r = &mut *locked;
            r.register("jobs", "Jobs that ended, by how", all.jobs.clone());
            r.register(
                "job_duration_seconds",
                "From the first grant to the end",
                all.job_duration.clone(),
            );
            r.register(
                "job_wait_seconds",
                "From submission to the first grant",
                all.job_wait.clone(),
            );
            r.register(
                "attempts_lost",
                "Attempts that were declared lost",
                all.attempts_lost.clone(),
            );
            r.register(
                "lease_storms",
                "Times too many leases ran out at once",
                all.lease_storms.clone(),
            );
            r.register(
                "messages_refused",
                "Messages that were not believed or not understood",
                all.messages_refused.clone(),
            );
            r.register(
                "queue_dead_lettered",
                "Messages that nobody could take",
                all.dead_letters.clone(),
            );
            r.register(
                "catalog_transaction_seconds",
                "Transactions of the catalog",
                all.transactions.clone(),
            );
            r.register(
                "catalog_transaction_retries",
                "Transactions begun anew",
                all.transactions_retried.clone(),
            );
            r.register("jobs_in_state", "Unfinished jobs", all.jobs_in_state.clone());
            r.register("workers", "Workers by state", all.workers.clone());
            r.register("leader", "1 while this coordinator leads", all.leader.clone());
            r.register(
                "broker_up",
                "1 while messages can be sent and received",
                all.broker_up.clone(),
            );
            r.register(
                "cluster_state",
                "1 for the state a cluster is in, 0 for the others",
                all.cluster_state.clone(),
            );
            r.register(
                "cluster_registered_timestamp_seconds",
                "When a cluster was first announced",
                all.registered.clone(),
            );
            r.register(
                "cluster_last_contact_timestamp_seconds",
                "Last pulse of a cluster's worker, 0 for never",
                all.contact.clone(),
            );
            r.register(
                "backup_last_success_timestamp_seconds",
                "End of the newest backup, 0 for never",
                all.backup.clone(),
            );
            r.register(
                "verify_last_success_timestamp_seconds",
                "Newest passed proof of the newest backup, 0 for never",
                all.proof.clone(),
            );
            r.register("verify_level", "Highest level among it and the newest that did not, or did, replay archived WAL, 0 for none", all.proof_level.clone());
            r.register(
                "verify_assertions_failed",
                "Assertions that do not hold in the newest backup, by the proof that it is judged by",
                all.assertions_failed.clone(),
            );
            r.register(
                "verify_assertions_unasked",
                "Assertions that this proof could not ask, of which nothing is known",
                all.assertions_unasked.clone(),
            );
            r.register(
                "backup_last_size_bytes",
                "What a restore of the newest backup writes, WAL apart",
                all.size.clone(),
            );
            r.register(
                "backup_last_silent_changes",
                "Units of files that had changed in the last backup though times and sizes of the files had not",
                all.silent_changes.clone(),
            );
            r.register(
                "backup_last_stored_bytes",
                "What the newest backup added to the repository",
                all.stored.clone(),
            );
            r.register(
                "cluster_eligible_workers",
                "Living workers that serve a cluster",
                all.eligible.clone(),
            );
            r.register(
                "recovery_point_timestamp_seconds",
                "Up to when a cluster can be recovered from proved backups, 0 for not at all",
                all.recovery_point.clone(),
            );
            r.register(
                "unproved_point_timestamp_seconds",
                "The same if backups that nobody proved count as well",
                all.unproved_point.clone(),
            );
            r.register(
                "recovery_time_estimate_seconds",
                "How long a recovery would take now, absent before it is measured",
                all.recovery_time.clone(),
            );
            r.register(
                "rpo_objective_seconds",
                "How old the recovery point may be, absent where nothing is promised",
                all.rpo_objective.clone(),
            );
            r.register(
                "rto_objective_seconds",
                "How long a recovery may take, absent where nothing is promised",
                all.rto_objective.clone(),
            );
            r.register(
                "wal_waiting_segments",
                "Full segments of WAL that are not in the archive",
                all.wal_waiting.clone(),
            );
            r.register(
                "wal_ready_segments",
                "Segments that the server keeps because they are not archived, 0 while none is late",
                all.wal_ready.clone(),
            );
            r.register(
                "pg_wal_bytes",
                "Size of the directory pg_wal of a server that keeps such segments, else 0",
                all.pg_wal_bytes.clone(),
            );
        }
        Self(Arc::new(all))
    }

    pub(crate) fn job_ended(&self, kind: JobKind, state: JobState, ran: Option<i64>) {
        let (kind, result) = (kind.as_str(), state.as_str());
        self.0.jobs.get_or_create(&ByKindAndResult { kind, result }).inc();
        if let Some(ran_ms) = ran {
            self.0.job_duration.get_or_create(&ByKind { kind }).observe(seconds(ran_ms));
        }
    }

    pub(crate) fn job_started(&self, kind: JobKind, waited_ms: i64) {
        self.0.job_wait.get_or_create(&ByKind { kind: kind.as_str() }).observe(seconds(waited_ms));
    }

    pub(crate) fn attempt_lost(&self, kind: JobKind) {
        self.0.attempts_lost.get_or_create(&ByKind { kind: kind.as_str() }).inc();
    }

    pub(crate) fn lease_storm(&self) {
        self.0.lease_storms.inc();
    }

    pub(crate) fn message_refused(&self, queue: &'static str) {
        self.0.messages_refused.get_or_create(&ByQueue { queue }).inc();
    }

    pub(crate) fn dead_letter(&self) {
        self.0.dead_letters.inc();
    }

    pub(crate) fn catalog_transacted(&self, name: &'static str, took: Duration) {
        self.0.transactions.get_or_create(&ByName { name }).observe(took.as_secs_f64());
    }

    pub(crate) fn catalog_retried(&self, name: &'static str) {
        self.0.transactions_retried.get_or_create(&ByName { name }).inc();
    }

    /// Sets everything that is known from the catalog; what is not mentioned is gone.
    fn set(&self, moment: &Moment) {
        let all = &self.0;
        all.jobs_in_state.clear();
        for (kind, state, count) in &moment.jobs {
            let labels = ByKindAndState { kind: kind.as_str(), state: state.as_str() };
            all.jobs_in_state.get_or_create(&labels).set(*count);
        }
        for (state, count) in [
            ("alive", moment.workers_alive),
            ("silent", moment.workers_silent),
            ("draining", moment.workers_draining),
        ] {
            all.workers.get_or_create(&ByState { state }).set(count);
        }
        all.leader.set(i64::from(moment.leading));
        all.broker_up.set(i64::from(moment.broker_up));
        all.cluster_state.clear();
        let gauges = [
            &all.registered,
            &all.contact,
            &all.backup,
            &all.proof,
            &all.proof_level,
            &all.assertions_failed,
            &all.assertions_unasked,
            &all.size,
            &all.stored,
            &all.silent_changes,
            &all.eligible,
            &all.recovery_point,
            &all.unproved_point,
            &all.wal_waiting,
            &all.wal_ready,
            &all.pg_wal_bytes,
        ];
        let partial = [&all.recovery_time, &all.rpo_objective, &all.rto_objective];
        for gauge in gauges.into_iter().chain(partial) {
            gauge.clear();
        }
        for c in &moment.clusters {
            for state in ClusterState::ALL {
                let labels =
                    ByClusterAndState { cluster: c.cluster.clone(), state: state.as_str() };
                all.cluster_state.get_or_create(&labels).set(i64::from(c.state == *state));
            }
            let values = [
                c.registered_s,
                c.contact_s,
                c.backup_s,
                c.proof_s,
                c.proof_level,
                c.assertions_failed,
                c.assertions_unasked,
                c.size_bytes,
                c.stored_bytes,
                c.silent_changes,
                c.eligible_workers,
                c.recovery_point_s,
                c.unproved_point_s,
                c.wal_waiting,
                c.wal_ready,
                c.pg_wal_bytes,
            ];
            for (gauge, value) in gauges.iter().zip(values) {
                gauge.get_or_create(&ByCluster { cluster: c.cluster.clone() }).set(value);
            }
            let values = [c.recovery_time_s, c.rpo_objective_s, c.rto_objective_s];
            for (gauge, value) in partial.into_iter().zip(values) {
                if let Some(value) = value {
                    gauge.get_or_create(&ByCluster { cluster: c.cluster.clone() }).set(value);
                }
            }
        }
    }

    /// The page of `/metrics` at this moment. One page at a time: two scrapes must not mix.
    pub(crate) fn page(&self, moment: &Moment) -> Result<String, std::fmt::Error> {
        let registry = self.0.registry.lock().unwrap_or_else(PoisonError::into_inner);
        self.set(moment);
        telemetry::metrics::encode(&registry)
    }

    /// Lets somebody else register into the same page.
    pub(crate) fn with_registry<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.0.registry.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[expect(clippy::cast_precision_loss, reason = "milliseconds of any job fit a double exactly")]
fn seconds(ms: i64) -> f64 {
    ms.max(0) as f64 / 1_000.0
}
