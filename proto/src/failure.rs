//! How a failure is told: a code to look up, what the coordinator does about it, what happened, and the cure.
//!
//! Crates below the job boundary have error enums of their own; each converts into a [`Failure`] there. Every
//! [`Code`] has a page `docs/errors/CODE.md`; a test compares the two lists.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What has to happen after a failure. The coordinator branches on this and on nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The same worker may try again later: the cause is likely to pass.
    Retry,
    /// Another worker may succeed where this one cannot.
    RetryElsewhere,
    /// A setting, grant or key must be changed by a person first.
    FixConfig,
    /// Data is damaged or missing; a person must look.
    FixData,
    /// Nothing to retry: the work was cancelled, refused or has become pointless.
    Abandon,
    /// The program broke its own rules.
    ReportBug,
}

impl Action {
    /// Whether the same job may be given out again without a person's doing.
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::Retry | Self::RetryElsewhere)
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// The name of a failure, stable for ever. Its page is `docs/errors/CODE.md`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Code {
            $($(#[$doc])* #[serde(rename = $text)] $variant,)*
        }

        impl Code {
            /// Every code, in the order of the source.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The code as people see it.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

codes! {
    // Configuration and requests.
    /// A configuration file is missing, unreadable or has unknown or invalid entries.
    ConfigInvalid = "CONFIG_INVALID",
    /// A request names a cluster nobody announced.
    ClusterUnknown = "CLUSTER_UNKNOWN",
    /// A request names a job that does not exist.
    JobUnknown = "JOB_UNKNOWN",
    /// A request names a backup that does not exist or was not committed.
    BackupUnknown = "BACKUP_UNKNOWN",
    /// A request names a worker that is not enrolled or not alive.
    WorkerUnknown = "WORKER_UNKNOWN",
    /// A request is malformed or contradicts itself.
    RequestInvalid = "REQUEST_INVALID",
    /// The thing is in a state that does not allow this.
    StateConflict = "STATE_CONFLICT",
    /// The caller showed no valid token.
    Unauthorized = "UNAUTHORIZED",
    /// The coordinator cannot be reached.
    CoordinatorUnreachable = "COORDINATOR_UNREACHABLE",
    /// RabbitMQ cannot be reached or refused the connection.
    BrokerUnreachable = "BROKER_UNREACHABLE",
    /// RabbitMQ has a queue or exchange with other settings, or does not let us have it.
    BrokerTopology = "BROKER_TOPOLOGY",
    /// The catalog's database cannot be reached or answered with an error.
    CatalogUnavailable = "CATALOG_UNAVAILABLE",

    // Jobs.
    /// The worker's own configuration does not allow this job.
    NotAllowed = "NOT_ALLOWED",
    /// The worker does not understand the job.
    JobUnsupported = "JOB_UNSUPPORTED",
    /// A signature, nonce or certificate did not verify.
    SignatureInvalid = "SIGNATURE_INVALID",
    /// The job was cancelled.
    Cancelled = "CANCELLED",
    /// The job's deadline passed.
    DeadlineExceeded = "DEADLINE_EXCEEDED",
    /// The worker is shutting down and handed the job back.
    WorkerDraining = "WORKER_DRAINING",
    /// The attempt's worker vanished.
    WorkerLost = "WORKER_LOST",
    /// Another attempt already decided this backup.
    AttemptSuperseded = "ATTEMPT_SUPERSEDED",
    /// Another job holds the lock for this class of work on the cluster.
    ClusterBusy = "CLUSTER_BUSY",

    // The PostgreSQL server.
    /// The server did not answer the connection, or not now.
    ServerUnreachable = "SERVER_UNREACHABLE",
    /// The server answered and did not let the role in.
    LoginRefused = "LOGIN_REFUSED",
    /// The role lacks a right; the hint is the GRANT.
    PermissionDenied = "PERMISSION_DENIED",
    /// The server is not the cluster the job is meant for.
    SystemIdentifierMismatch = "SYSTEM_IDENTIFIER_MISMATCH",
    /// This version of PostgreSQL is not supported.
    VersionUnsupported = "VERSION_UNSUPPORTED",
    /// A server setting prevents the job.
    ServerSetting = "SERVER_SETTING",
    /// A connection pooler stands between worker and server.
    PoolerDetected = "POOLER_DETECTED",
    /// The standby that was to be backed up is too far behind its primary.
    StandbyBehind = "STANDBY_BEHIND",
    /// The backup's session ended before the backup did.
    BackupSessionLost = "BACKUP_SESSION_LOST",
    /// A statement was refused by the server.
    StatementFailed = "STATEMENT_FAILED",
    /// The server's data directory cannot be read by this process.
    DataDirectoryUnreadable = "DATA_DIRECTORY_UNREADABLE",
    /// The data directory is not the one the server uses.
    DataDirectoryMismatch = "DATA_DIRECTORY_MISMATCH",
    /// Something in the data directory has a shape that is not supported.
    DataDirectoryShape = "DATA_DIRECTORY_SHAPE",
    /// A file of the source could not be read.
    SourceUnreadable = "SOURCE_UNREADABLE",
    /// Pages with wrong checksums were found.
    PageChecksum = "PAGE_CHECKSUM",
    /// Files changed although their times and sizes said that they had not.
    SilentChange = "SILENT_CHANGE",
    /// WAL that the backup needs is gone from the server.
    WalMissing = "WAL_MISSING",
    /// A backup made the server keep more WAL than it may.
    WalHeld = "WAL_HELD",
    /// `pg_dump` failed, or what it wrote is not whole.
    DumpFailed = "DUMP_FAILED",
    /// A file for the WAL archive is not what its name says.
    WalRefused = "WAL_REFUSED",
    /// Other content is archived under the name of a WAL file.
    WalConflict = "WAL_CONFLICT",
    /// A server was set up to archive, and its segment did not come into the archive.
    WalNotArchived = "WAL_NOT_ARCHIVED",
    /// Nobody answers at the socket of the WAL service.
    WalServiceAway = "WAL_SERVICE_AWAY",
    /// The PostgreSQL programs of the needed version are not installed.
    BinariesMissing = "BINARIES_MISSING",

    // The repository.
    /// The store cannot be reached or answered with errors beyond the retries.
    StoreUnavailable = "STORE_UNAVAILABLE",
    /// The store refused the credentials.
    StoreForbidden = "STORE_FORBIDDEN",
    /// The store lacks a property the protocol needs.
    StoreUnsuitable = "STORE_UNSUITABLE",
    /// There is no repository at that place.
    RepositoryMissing = "REPOSITORY_MISSING",
    /// A repository exists already at that place.
    RepositoryExists = "REPOSITORY_EXISTS",
    /// The repository's format is newer than this program.
    RepositoryVersion = "REPOSITORY_VERSION",
    /// The key does not open this repository.
    KeyWrong = "KEY_WRONG",
    /// An object that must exist is missing.
    ObjectMissing = "OBJECT_MISSING",
    /// An object's content is damaged, cut, swapped or forged.
    ObjectDamaged = "OBJECT_DAMAGED",
    /// The attempt was aborted by somebody else before it could commit.
    CommitRefused = "COMMIT_REFUSED",

    // Restore and proof.
    /// The target directory is not empty, or belongs to a running server.
    TargetNotEmpty = "TARGET_NOT_EMPTY",
    /// The target lies outside the worker's restore roots.
    TargetOutsideRoots = "TARGET_OUTSIDE_ROOTS",
    /// The target has too little space.
    TargetFull = "TARGET_FULL",
    /// The target cannot be written.
    TargetUnwritable = "TARGET_UNWRITABLE",
    /// The restored server did not start.
    SandboxFailed = "SANDBOX_FAILED",
    /// The machine cannot run the restored server; nothing is known about the backup.
    SandboxUnfit = "SANDBOX_UNFIT",
    /// The restored server ended recovery somewhere else than planned.
    StopPositionMissed = "STOP_POSITION_MISSED",
    /// WAL does not lead to the moment that was asked for.
    RecoveryTargetUnreachable = "RECOVERY_TARGET_UNREACHABLE",
    /// The restored server did not come to the moment that was asked for.
    RecoveryTargetMissed = "RECOVERY_TARGET_MISSED",
    /// The restored server failed a check.
    ProofFailed = "PROOF_FAILED",

    /// The program broke its own rules.
    Internal = "INTERNAL",
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failure as it is reported, stored and shown.
///
/// `message` says in one sentence what happened to which thing, with numbers; `hint` is the cure, one sentence or a command.
/// None of it may hold a secret: connection strings and error texts are scrubbed before they get here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Failure {
    /// What people look up.
    pub code: Code,
    /// What the coordinator does about it.
    pub action: Action,
    /// What happened to which thing.
    pub message: String,
    /// The cure; empty when there is nothing a person could do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hint: String,
    /// What a program said about it, line by line; the message is understood without.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(code: Code, action: Action, message: impl Into<String>) -> Self {
        let (message, hint, details) = (message.into(), String::new(), Vec::new());
        Self { code, action, message, hint, details }
    }

    /// The same failure with the lines of a program's log that say more.
    #[must_use]
    pub fn with_details<'a>(mut self, lines: impl IntoIterator<Item = &'a str>) -> Self {
        self.details = lines.into_iter().map(str::to_owned).collect();
        self
    }

    /// The same failure with its cure.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// A broken rule of our own: never the user's fault.
    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, Action::ReportBug, message)
            .with_hint("This is a fault in pgmuster; please report it with the job's trace.")
    }
}

/// An error and everything that caused it, on one line: `copy base/1/2: No such file or directory`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
