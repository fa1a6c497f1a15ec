//! Jobs: what a worker can be asked to do. A kind is a file here, a file in `worker/src/jobs/` and the exhaustive
//! `match`es the compiler finds.
//!
//! A job carries no secret, no SQL, no shell text and no free path. Workers refuse fields they do not know
//! (`deny_unknown_fields`): a job that is understood by half must not run.

mod analyze;
mod backup;
mod enable_wal;
mod pattern;
mod probe;
mod restore;
mod vacuum;
mod verify_restore;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use analyze::{Analyze, AnalyzeOutcome, SkippedTable};
pub use backup::{Backup, BackupOutcome, LogicalOutcome, PgDump, RATE_LIMIT_MIN_BYTES};
pub use enable_wal::{EnableWal, EnableWalOutcome, LostWal, SeenSegment};
pub use pattern::{DatabasePattern, PatternError};
pub use probe::{Probe, ProbeOutcome, SeenVerdict};
pub use restore::{
    Reached, RecoveryOutcome, RelativePath, RelativePathError, Restore, RestoreOutcome,
    RestoreTarget, meeting,
};
pub use vacuum::{Vacuum, VacuumOutcome, VacuumedTable};
pub use verify_restore::{ProofTarget, VerifyRestore, VerifyRestoreOutcome};

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident($outcome:ident) = $text:literal,)*) => {
        /// The kind of a job, as it stands in tickets, metrics and tables.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum JobKind {
            $($(#[$doc])* $kind,)*
        }

        impl JobKind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            /// The kind as text.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$kind => $text,)* }
            }
        }

        impl FromStr for JobKind {
            type Err = UnknownKind;
            fn from_str(text: &str) -> Result<Self, UnknownKind> {
                match text {
                    $($text => Ok(Self::$kind),)*
                    other => Err(UnknownKind(other.chars().take(40).collect())),
                }
            }
        }

        /// What is to be done: a kind and its typed parameters.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Task {
            $($(#[$doc])* $kind($kind),)*
        }

        impl Task {
            /// The kind of this task.
            pub fn kind(&self) -> JobKind {
                match self { $(Self::$kind(_) => JobKind::$kind,)* }
            }
        }

        /// What a finished task has to say.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Outcome {
            $($(#[$doc])* $kind($outcome),)*
        }
    };
}

kinds! {
    /// Take a backup into the repository.
    Backup(BackupOutcome) = "backup",
    /// Restore a backup in a sandbox and check it.
    VerifyRestore(VerifyRestoreOutcome) = "verify_restore",
    /// Restore a backup into a directory below a restore root.
    Restore(RestoreOutcome) = "restore",
    /// Refresh the planner's statistics.
    Analyze(AnalyzeOutcome) = "analyze",
    /// Vacuum tables whose bloat asks for it.
    Vacuum(VacuumOutcome) = "vacuum",
    /// Look for evidence of another attempt, and end its session when asked.
    Probe(ProbeOutcome) = "probe",
    /// Have the server archive its WAL into the cluster's repository.
    EnableWal(EnableWalOutcome) = "enable_wal",
}

/// A text that is no job kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("know the job kind or state {0:?}")]
pub struct UnknownKind(String);

impl fmt::Display for JobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a job of this kind needs to have at hand, which decides where it may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// The cluster's files or socket: one worker that announced the cluster.
    Cluster,
    /// Any worker of the site that serves the cluster's repository.
    Site,
}

impl JobKind {
    /// Where a job of this kind may run.
    pub fn placement(self) -> Placement {
        match self {
            Self::Backup | Self::Analyze | Self::Vacuum | Self::EnableWal => Placement::Cluster,
            Self::VerifyRestore | Self::Restore | Self::Probe => Placement::Site,
        }
    }
}

/// Which of the two queues of a place a job goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// A person waits.
    Urgent,
    /// Scheduled work.
    Routine,
}

impl Lane {
    /// Both lanes, the one that goes first first.
    pub const ALL: [Self; 2] = [Self::Urgent, Self::Routine];

    /// The lane as text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Urgent => "urgent",
            Self::Routine => "routine",
        }
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Ready, or on its way to a worker.
    Queued,
    /// Not ready yet; the reason is stored with the job.
    Waiting,
    /// A worker holds a grant for it.
    Running,
    /// Asked to stop; no evidence yet that it did.
    Cancelling,
    /// Done, and it worked.
    Succeeded,
    /// Done, and it did not work.
    Failed,
    /// Stopped on request, on evidence.
    Cancelled,
    /// Its time passed before anybody could run it.
    Missed,
    /// Its last attempt vanished and may not be tried again.
    Lost,
}

impl JobState {
    /// Every state.
    pub const ALL: [Self; 9] = [
        Self::Queued,
        Self::Waiting,
        Self::Running,
        Self::Cancelling,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
        Self::Missed,
        Self::Lost,
    ];

    /// The state as text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Cancelling => "cancelling",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Missed => "missed",
            Self::Lost => "lost",
        }
    }

    /// What a job in this state does or did, as the end of a sentence that begins with the job.
    pub fn told(self) -> &'static str {
        match self {
            Self::Queued => "is queued",
            Self::Waiting => "is waiting",
            Self::Running => "is running",
            Self::Cancelling => "is being cancelled",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "was cancelled",
            Self::Missed => "was missed",
            Self::Lost => "was lost",
        }
    }

    /// Whether a job in this state never changes again.
    pub fn is_final(self) -> bool {
        match self {
            Self::Queued | Self::Waiting | Self::Running | Self::Cancelling => false,
            Self::Succeeded | Self::Failed | Self::Cancelled | Self::Missed | Self::Lost => true,
        }
    }
}

impl FromStr for JobState {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        Self::ALL
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| UnknownKind(text.chars().take(40).collect()))
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
