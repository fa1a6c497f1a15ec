//! What the API takes and gives: plain values, shared with the command line.
//!
//! Fields are only ever added. Times are Unix milliseconds by the coordinator's clock unless a field says otherwise.
//! Every error is a [`Failure`] as JSON, with a status code.

use std::collections::BTreeMap;

use policy::broken::BrokenStretch;
use policy::fleet::Counted;
use policy::recovery_time::RecoveryTime;
use policy::state::ClusterState;
use proto::copies::BackupCopy;
use proto::envelope::{Certificate, PublicKey, Signed};
use proto::failure::Failure;
use proto::job::{BackupOutcome, JobKind, JobState, Lane, Outcome, Task};
use proto::message::{ArchiveSetup, HeartbeatSetup, Offers, WalStanding};
use proto::proof::{Proof, ProofLevel};
use proto::step::{Progress, Step};
use proto::{
    AttemptId, BackupId, BootId, ClusterName, JobId, SiteName, SystemIdentifier, WorkerName,
};
use serde::{Deserialize, Serialize};

/// `POST /v1/jobs`. The header `Idempotency-Key` makes repeating it safe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubmitRequest {
    /// For whom.
    pub cluster: ClusterName,
    /// What.
    pub task: Task,
    /// `urgent` when absent: whoever asks by hand waits.
    #[serde(default = "urgent")]
    pub lane: Lane,
    /// The only worker that may do it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    /// For a backup: prove it to this level as soon as it succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<ProofLevel>,
    /// When nobody has begun it after this long, it is `missed`; milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_within_ms: Option<u64>,
    /// An attempt ends itself after this long; the coordinator's default when absent; milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// How many attempts it gets; the coordinator's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempts_max: Option<u32>,
}

fn urgent() -> Lane {
    Lane::Urgent
}

impl SubmitRequest {
    /// An urgent job with the coordinator's defaults.
    pub fn new(cluster: ClusterName, task: Task) -> Self {
        Self {
            cluster,
            task,
            lane: Lane::Urgent,
            worker: None,
            verify: None,
            start_within_ms: None,
            deadline_ms: None,
            attempts_max: None,
        }
    }
}

/// A job as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobView {
    /// Its id; also the id of its trace, with dashes.
    pub id: JobId,
    /// For whom.
    pub cluster: ClusterName,
    /// What kind of work.
    pub kind: JobKind,
    /// The work.
    pub task: Task,
    /// Which lane.
    pub lane: Lane,
    /// Where it stands.
    pub state: JobState,
    /// Why it stands there, a sentence without a period; absent when there is nothing to say.
    pub reason: Option<String>,
    /// Grows with every change: the `after_version` of a wait.
    pub version: i64,
    /// Who asked.
    pub requested_by: String,
    /// When.
    pub submitted_at_ms: i64,
    /// Not before.
    pub not_before_at_ms: i64,
    /// `missed` when nobody has begun it by then.
    pub not_after_at_ms: Option<i64>,
    /// First grant.
    pub started_at_ms: Option<i64>,
    /// Its end.
    pub ended_at_ms: Option<i64>,
    /// Granted attempts.
    pub attempts_used: u32,
    /// How many it gets.
    pub attempts_max: u32,
    /// The worker that has it, or had it last.
    pub worker: Option<WorkerName>,
    /// The open attempt, or the last one.
    pub attempt: Option<AttemptId>,
    /// How far the running step is.
    pub progress: Option<Progress>,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// What it has to say.
    pub outcome: Option<Outcome>,
    /// The level a successful backup is proved to.
    pub verify: Option<ProofLevel>,
    /// The job it was submitted after.
    pub follows: Option<JobId>,
    /// Jobs that were submitted after it.
    pub followed_by: Vec<JobId>,
    /// The job it tries again.
    pub retry_of: Option<JobId>,
    /// W3C trace context of the job's span.
    pub traceparent: String,
}

/// `GET /v1/jobs`: newest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobList {
    /// The jobs.
    pub jobs: Vec<JobView>,
}

/// The query of `GET /v1/jobs`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobQuery {
    /// Only this cluster's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterName>,
    /// Only this kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<JobKind>,
    /// Only in this state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<JobState>,
    /// Only older than this one: the next page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<JobId>,
    /// At most this many, 1 to 1000; 100 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// The query of `GET /v1/jobs/{id}`: answers at once, or when the job is newer than a version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitQuery {
    /// Wait until the version is larger than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_version: Option<i64>,
    /// At most this long, 0 to 60 seconds; the answer is the job as it is then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_s: Option<u32>,
}

/// `GET /v1/jobs/{id}/trace`: the waterfall.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TraceView {
    /// The job.
    pub job: JobView,
    /// 32 hexadecimal digits.
    pub trace_id: String,
    /// Every attempt that was made, oldest first.
    pub attempts: Vec<AttemptView>,
}

/// An attempt as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttemptView {
    /// Its id; a backup has the id of its attempt.
    pub id: AttemptId,
    /// `ticketed`, `running`, `suspect`, `succeeded`, `failed`, `cancelled`, `lost`, `declined` or `superseded`.
    pub state: String,
    /// Why.
    pub reason: Option<String>,
    /// Routing key of its ticket.
    pub queue: String,
    /// Who has or had it.
    pub worker: Option<WorkerName>,
    /// The attempt it aborts first.
    pub predecessor: Option<AttemptId>,
    /// The span of the attempt, 16 hexadecimal digits.
    pub span_id: String,
    /// When it was planned.
    pub created_at_ms: i64,
    /// When it was granted.
    pub granted_at_ms: Option<i64>,
    /// When its worker said that it began.
    pub started_at_ms: Option<i64>,
    /// When it was over.
    pub ended_at_ms: Option<i64>,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// Its steps; times by the worker's clock.
    pub steps: Vec<Step>,
}

/// `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusView {
    /// Which clusters cannot be recovered to target, and why, in one sentence.
    pub sentence: String,
    /// How many are in each state, worst first.
    pub states: Vec<Counted>,
    /// The clusters, worst first.
    pub clusters: Vec<ClusterView>,
    /// What in the coordinator's configuration seems to be a slip, a sentence each without a period.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Jobs that wait because nobody may do them, by cluster and kind.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nobody_may: Vec<NobodyMay>,
    /// The coordinator's clock.
    pub at_ms: i64,
}

/// Jobs that no living worker may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NobodyMay {
    /// Whose they are.
    pub cluster: ClusterName,
    /// What they are.
    pub kind: JobKind,
    /// How many.
    pub jobs: u64,
    /// Why nobody may, a sentence without a period.
    pub reason: String,
}

/// A cluster as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterView {
    /// Its name.
    pub name: ClusterName,
    /// Where it stands.
    pub state: ClusterState,
    /// Why, a sentence without a period.
    pub reason: String,
    /// Where it is.
    pub site: Option<SiteName>,
    /// Who announced it last.
    pub worker: Option<WorkerName>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The repository of its backups, by name.
    pub repository: Option<String>,
    /// Where that is.
    pub repository_location: Option<String>,
    /// What jobs expect the server to show.
    pub system_identifier: Option<SystemIdentifier>,
    /// `server_version_num`.
    pub server_version_num: Option<u32>,
    /// Whether it is paused: nothing is begun for it.
    pub paused: bool,
    /// When it was first announced.
    pub registered_at_ms: i64,
    /// The last pulse of a worker that serves it.
    pub seen_at_ms: Option<i64>,
    /// Up to when it can be recovered, by backups that are proved and the WAL that leads on from them: what was committed before
    /// is not lost. Absent while none is proved. By the clock of its worker.
    #[serde(default)]
    pub recoverable_to_at_ms: Option<i64>,
    /// The same, if backups that nobody proved count as well.
    #[serde(default)]
    pub unproved_to_at_ms: Option<i64>,
    /// How long a recovery to the newest moment would take now, as its proofs and restores measured; absent before a proof did.
    #[serde(default)]
    pub recovery_time: Option<RecoveryTime>,
    /// How old its recovery point may be; absent where nothing is promised.
    #[serde(default)]
    pub rpo_objective_ms: Option<i64>,
    /// How long a recovery of it may take; absent where nothing is promised.
    #[serde(default)]
    pub rto_objective_ms: Option<i64>,
    /// How the archive of its WAL stands; absent where it archives nothing into its repository.
    #[serde(default)]
    pub wal: Option<WalStanding>,
    /// Archived WAL that proofs could not replay.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub broken_wal: Vec<BrokenStretch>,
    /// How its server is set up to archive, as its worker sees it now; absent while nobody knows.
    #[serde(default)]
    pub archive: Option<ArchiveSetup>,
    /// The heartbeats that its worker makes in it; absent where it makes none.
    #[serde(default)]
    pub heartbeats: Option<HeartbeatSetup>,
    /// When the newest of them was made, by its clock. Only where one cluster is shown.
    #[serde(default)]
    pub heartbeat_at_ms: Option<i64>,
    /// Its newest backup.
    pub backup: Option<BackupView>,
    /// Unfinished jobs.
    pub open_jobs: Vec<JobView>,
}

/// A backup as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupView {
    /// Its id.
    pub id: BackupId,
    /// Whose.
    pub cluster: ClusterName,
    /// The job that took it.
    pub job: JobId,
    /// The worker that took it.
    pub worker: WorkerName,
    /// What its worker reported.
    pub facts: BackupOutcome,
    /// Since when it is known that its repository has it no more, or that somebody gave it up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gone_at_ms: Option<i64>,
    /// Where copies of it are, as those who copied it left word in its repository.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copies: Vec<BackupCopy>,
    /// Its newest proof that restored it, unless one found something wrong and stands.
    pub proof: Option<ProofView>,
    /// The newest that passed of the other sort: where `proof` replayed archived WAL behind the backup one of the backup alone, else one
    /// that replayed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_proof: Option<ProofView>,
}

/// A proof as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProofView {
    /// The job that made it.
    pub job: JobId,
    /// The record.
    pub record: Proof,
}

/// A worker as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerView {
    /// Its name.
    pub name: WorkerName,
    /// Its site.
    pub site: SiteName,
    /// Whether its pulses come.
    pub alive: bool,
    /// Whether it takes no new work.
    pub draining: bool,
    /// Which life it is in.
    pub boot: Option<BootId>,
    /// Last pulse.
    pub seen_at_ms: Option<i64>,
    /// Slots only urgent jobs may use.
    pub urgent_free: u32,
    /// Slots for all.
    pub routine_free: u32,
    /// Jobs it runs.
    pub running: Vec<JobId>,
    /// What it announced.
    pub offers: Option<Offers>,
}

/// `POST /v1/workers/enrol`: a worker presents its one-time token and its public key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnrolRequest {
    /// The token.
    pub token: String,
    /// The key the worker will sign with.
    pub public_key: PublicKey,
    /// Who the worker takes itself for; a token for another one is not used up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    /// Where.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<SiteName>,
}

/// The answer: what the worker pins and shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolResponse {
    /// "This key is this worker's", signed.
    pub certificate: Signed<Certificate>,
    /// The coordinator's key, to be pinned.
    pub coordinator_key: PublicKey,
}

/// `POST /v1/workers/tokens`: makes a token that enrols one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnrolmentTokenRequest {
    /// The worker's name; one that exists is enrolled anew, and its old certificate ends.
    pub worker: WorkerName,
    /// Its site.
    pub site: SiteName,
    /// How long the token is good, milliseconds; an hour when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_ms: Option<u64>,
}

/// What a caller of the API may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Look.
    Viewer,
    /// And order, cancel and retry jobs.
    Operator,
    /// And enrol workers, make tokens, pause and adopt clusters.
    Admin,
}

/// `POST /v1/tokens`: makes a token for the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// Whose it is: shown as `requested_by` of jobs.
    pub name: String,
    /// What it allows.
    pub role: Role,
    /// How long it is good, milliseconds; 90 days when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_ms: Option<u64>,
}

/// A fresh token. It is shown once and kept nowhere.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenResponse {
    /// The token itself.
    pub token: String,
    /// When it ends.
    pub expires_at_ms: i64,
}

impl std::fmt::Debug for TokenResponse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenResponse")
            .field("token", &"***")
            .field("expires_at_ms", &self.expires_at_ms)
            .finish()
    }
}

/// A token as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenView {
    /// Whose.
    pub name: String,
    /// What it allows.
    pub role: Role,
    /// Since when.
    pub created_at_ms: i64,
    /// Until when.
    pub expires_at_ms: i64,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventView {
    /// When.
    pub at_ms: i64,
    /// What, stable: `attempt_lost`, `lease_storm`, `worker_enrolled`, `late_backup` …
    pub name: String,
    /// About which cluster.
    pub cluster: Option<String>,
    /// About which job.
    pub job: Option<String>,
    /// About which worker.
    pub worker: Option<String>,
    /// For people.
    pub message: String,
}

/// `GET /healthz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthView {
    /// Whether the catalog answers.
    pub catalog: bool,
    /// Whether the broker's link is up.
    pub broker: bool,
    /// Whether this coordinator leads.
    pub leader: bool,
    /// The program's version.
    pub version: String,
    /// The key workers pin.
    pub public_key: PublicKey,
}
