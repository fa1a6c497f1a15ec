//! What can go wrong with a server, sorted by what somebody has to do about it, and how that is told at the job
//! boundary.
//!
//! No variant holds a connection string, a password or a row of user data: server texts come in through
//! [`ServerMessage`], which keeps the message and drops the DETAIL (it quotes rows).

use std::error::Error as _;
use std::fmt;
use std::path::PathBuf;

use proto::{Action, Code, Failure, Lsn, SystemIdentifier, failure};
use tokio_postgres::error::SqlState;

use crate::block_sizes::BlockSizes;

/// Why something could not be done with a server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A connection string, service or password file that cannot be used. Never quotes a value.
    #[error("read the connection settings: {what}")]
    Target {
        /// What is wrong, naming the keyword and never its value.
        what: String,
    },
    /// The server did not answer, or broke the connection while it was being made.
    #[error("connect to {target}")]
    Unreachable {
        /// Host, port, database and role.
        target: String,
        /// Why.
        #[source]
        source: ServerMessage,
    },
    /// The server answered and refused: wrong password, no `pg_hba.conf` line, unknown role or database, TLS.
    #[error("log in to {target}")]
    Refused {
        /// Host, port, database and role.
        target: String,
        /// The cure.
        cure: String,
        /// Why.
        #[source]
        source: ServerMessage,
    },
    /// A server older or newer than this program knows.
    #[error("work with PostgreSQL {found} of {target}: supported are 14 to 18")]
    Version {
        /// Host, port, database and role.
        target: String,
        /// The version as people write it.
        found: String,
    },
    /// Something between us and the server shares or keeps connections.
    #[error("use the connection to {target}: a connection pooler stands in between ({evidence})")]
    Pooler {
        /// Host, port, database and role.
        target: String,
        /// How it showed itself.
        evidence: String,
    },
    /// The server is another cluster.
    #[error("use {target}: its system identifier is {found}, the job is for {expected}")]
    WrongCluster {
        /// Host, port, database and role.
        target: String,
        /// Whose job it is.
        expected: SystemIdentifier,
        /// Who answered.
        found: SystemIdentifier,
    },
    /// The role lacks a right.
    #[error("{what}: role {role} lacks the right")]
    Permission {
        /// What was tried.
        what: String,
        /// The role.
        role: String,
        /// The statement that gives the right.
        grant: String,
        /// What the server said.
        #[source]
        source: Option<ServerMessage>,
    },
    /// A setting of the server prevents the work.
    #[error("{what}: {found}")]
    Setting {
        /// What was tried.
        what: String,
        /// The setting and its value, or the state of the server.
        found: String,
        /// What to change.
        cure: String,
    },
    /// A server that was restored and recovered does not start by its own settings.
    #[error(
        "start the server in {directory}, which was recovered and stopped, as its settings say: {found}"
    )]
    NotOpened {
        /// Its directory, which is ready.
        directory: String,
        /// What its log says.
        found: String,
        /// What to do.
        cure: String,
    },
    /// Somebody else holds the lock for this class of work.
    #[error("take the {class} lock of the cluster: {holder}")]
    Busy {
        /// The class of work.
        class: String,
        /// Who has it: application name, process id and since when, as far as the role may see.
        holder: String,
    },
    /// The session that carries a backup is gone, or no longer carries it.
    #[error("keep the backup's session: {what}")]
    SessionLost {
        /// How it showed itself.
        what: String,
        /// What the connection said last.
        #[source]
        source: Option<ServerMessage>,
    },
    /// WAL that the backup needs was removed by the server.
    #[error("keep WAL from {needed} on: {what}")]
    WalLost {
        /// The oldest position still needed.
        needed: Lsn,
        /// What the server says of the replication slot.
        what: String,
    },
    /// A statement was refused or broke.
    #[error("{what}")]
    Statement {
        /// What it was for.
        what: String,
        /// What the server said.
        #[source]
        source: ServerMessage,
    },
    /// The server answered with something that it never answers.
    #[error("{what}: unexpected answer: {answer}")]
    Answer {
        /// What was asked.
        what: String,
        /// The answer, shortened.
        answer: String,
    },
    /// The caller asked to stop.
    #[error("{what}: cancelled")]
    Cancelled {
        /// What was interrupted.
        what: String,
    },
    /// The caller's time was up.
    #[error("{what}: the deadline passed")]
    Deadline {
        /// What was interrupted.
        what: String,
    },
    /// Bytes of WAL that cannot be decoded.
    #[error("read WAL at {at}: {what}")]
    WalFormat {
        /// Where.
        at: Lsn,
        /// What is wrong there.
        what: String,
    },
    /// A file of our own configuration (certificates, keys, password file) could not be read.
    #[error("read {path}")]
    File {
        /// Which file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Something on this machine's disk could not be read or written.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried, for example `write`.
        what: String,
        /// Which file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// PostgreSQL's own programs of one version are not on this machine.
    #[error("find the programs of PostgreSQL {major}: looked for {}", listed(searched))]
    BinariesMissing {
        /// The version.
        major: u32,
        /// The package that brings them.
        package: String,
        /// Where they are not.
        searched: Vec<PathBuf>,
    },
    /// PostgreSQL's programs of that version are there, and built for clusters of other sizes.
    #[error(
        "find programs of PostgreSQL {major} for {needed}: those in {} are built for {built_for}",
        directory.display()
    )]
    BinariesOfOtherSizes {
        /// The version.
        major: u32,
        /// What the cluster has.
        needed: BlockSizes,
        /// Where the others are.
        directory: PathBuf,
        /// What they are built for.
        built_for: BlockSizes,
    },
    /// The only client programs that fit have known holes.
    #[error("use pg_dump {found} in {}: needed is {needed} or newer of that major version", directory.display())]
    ClientUnsafe {
        /// Where they are.
        directory: PathBuf,
        /// Their version.
        found: String,
        /// The first one without the holes.
        needed: String,
    },
    /// A program could not be started, or lost.
    #[error("start {program}")]
    ProgramStart {
        /// Its name.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A program ended badly.
    #[error("run {program}: it ended with {outcome}: {output}")]
    Program {
        /// Its name.
        program: String,
        /// Exit code or signal.
        outcome: String,
        /// What it said: its first error and what followed, and how much more there was.
        output: String,
    },
    /// What `pg_dump` wrote is no whole archive, or none that is known here.
    #[error("read an archive of pg_dump: {what}")]
    Archive {
        /// What is wrong with it.
        what: String,
    },
    /// The files of a data directory cannot be read by this process.
    #[error("read {}", path.display())]
    Unreadable {
        /// Which one.
        path: PathBuf,
        /// What to do.
        cure: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A data directory has a shape that cannot be backed up or started.
    #[error("use {}: {what}", path.display())]
    Shape {
        /// The offending file or directory.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What to do.
        cure: String,
    },
    /// A control file, WAL segment or history file does not hold what it must.
    #[error("read {name}: {what}")]
    Content {
        /// Which file.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// A restored copy was not started, or ended, for want of something on this machine. That says nothing about the
    /// backup.
    #[error("start the restored server: this machine {what}: {evidence}")]
    SandboxUnfit {
        /// What is wrong with the machine.
        what: String,
        /// What the server or the system said.
        evidence: String,
    },
    /// A restored copy did not become a running server, and nothing says that it was this machine's fault.
    #[error("start the restored server: {what}: {output}")]
    Sandbox {
        /// What happened.
        what: String,
        /// The last lines of its log.
        output: String,
    },
    /// A restored copy was whole, and could not be taken to a moment behind the end of its backup.
    #[error("replay WAL behind the backup: {what}: {output}")]
    Replay {
        /// What happened.
        what: String,
        /// The last lines of its log.
        output: String,
        /// It replayed all that there was, and did not meet the moment.
        is_missed: bool,
    },
    /// A restored server came to another place than the one that was wanted, or to none.
    #[error("recover to the moment: {what}")]
    RecoveryMissed {
        /// Where it came to.
        what: String,
        /// The last lines of its log.
        output: String,
    },
    /// A restored copy ended recovery before the end of its backup.
    #[error("replay to {expected}: recovery ended at {reached}")]
    StopPositionMissed {
        /// The end of the backup.
        expected: Lsn,
        /// Where the server says it ended.
        reached: Lsn,
    },
}

/// Places, for people.
fn listed(places: &[PathBuf]) -> String {
    places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// What a server says that goes down, crashed, or is starting. The first one is also what a session hears that somebody ended.
const FAREWELLS: [SqlState; 3] =
    [SqlState::ADMIN_SHUTDOWN, SqlState::CRASH_SHUTDOWN, SqlState::CANNOT_CONNECT_NOW];

/// What a server or a connection said, without connection strings, passwords or user data.
#[derive(Debug, Clone)]
pub struct ServerMessage {
    // Boxed, because errors travel through every result of this crate.
    inner: Box<Message>,
}

#[derive(Debug, Clone)]
struct Message {
    state: Option<SqlState>,
    text: String,
    closed: bool,
}

impl From<Message> for ServerMessage {
    fn from(message: Message) -> Self {
        Self { inner: Box::new(message) }
    }
}

impl ServerMessage {
    /// The SQLSTATE, when the server itself spoke.
    pub fn state(&self) -> Option<&SqlState> {
        self.inner.state.as_ref()
    }

    /// Whether the connection is gone, so that nothing further can be said on it.
    pub fn is_closed(&self) -> bool {
        self.inner.closed
    }

    /// Whether the server said that it goes down, crashed, or takes nobody in just now: nothing is wrong with what it was asked.
    pub fn is_farewell(&self) -> bool {
        self.state().is_some_and(|state| FAREWELLS.contains(state))
    }

    /// Whether the connection was gone before the server said anything about what it was asked.
    fn is_cut_off(&self) -> bool {
        self.is_closed() && self.state().is_none()
    }

    /// A message of our own in the place of the server's.
    pub fn local(text: impl Into<String>) -> Self {
        Message { state: None, text: text.into(), closed: false }.into()
    }

    /// A message of our own about a connection that is gone.
    pub fn gone(text: impl Into<String>) -> Self {
        Message { state: None, text: text.into(), closed: true }.into()
    }

    /// The same message with every occurrence of `secret` blotted out.
    #[must_use]
    pub fn without(mut self, secret: &str) -> Self {
        if !secret.is_empty() {
            self.inner.text = self.inner.text.replace(secret, "***");
        }
        self
    }
}

impl fmt::Display for ServerMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.text)?;
        match &self.inner.state {
            Some(state) => write!(f, " (SQLSTATE {})", state.code()),
            None => Ok(()),
        }
    }
}

impl std::error::Error for ServerMessage {}

impl From<tokio_postgres::Error> for ServerMessage {
    fn from(error: tokio_postgres::Error) -> Self {
        if let Some(db) = error.as_db_error() {
            // 57P01 to 57P05 and class 08: the server says good-bye with these.
            let state = db.code().clone();
            let closed = error.is_closed()
                || matches!(
                    state.code(),
                    "57P01" | "57P02" | "57P03" | "57P04" | "57P05" | "25P03" | "25P04"
                )
                || state.code().starts_with("08");
            return Message { text: db.message().to_owned(), state: Some(state), closed }.into();
        }
        let lost =
            |e: &(dyn std::error::Error + 'static)| e.downcast_ref::<std::io::Error>().is_some();
        let mut closed = error.is_closed();
        let mut cause = error.source();
        while let Some(inner) = cause {
            closed |= lost(inner);
            cause = inner.source();
        }
        Message { state: None, text: failure::chain(&error), closed }.into()
    }
}

/// Turns the errors of statements into [`Error::Statement`], saying what the statement was for.
pub(crate) trait During<T> {
    fn during(self, what: &str) -> Result<T, Error>;
}

impl<T> During<T> for Result<T, tokio_postgres::Error> {
    fn during(self, what: &str) -> Result<T, Error> {
        self.map_err(|error| Error::Statement { what: what.to_owned(), source: error.into() })
    }
}

impl Error {
    /// The server's SQLSTATE, when it was the server that refused.
    pub fn state(&self) -> Option<&SqlState> {
        match self {
            Self::Unreachable { source, .. }
            | Self::Refused { source, .. }
            | Self::Statement { source, .. } => source.state(),
            Self::Permission { source, .. } | Self::SessionLost { source, .. } => {
                source.as_ref().and_then(ServerMessage::state)
            }
            _ => None,
        }
    }

    /// Whether the connection the error came from is gone.
    pub fn is_closed(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::SessionLost { .. } => true,
            Self::Statement { source, .. } => source.is_closed(),
            _ => false,
        }
    }

    /// A statement that failed for want of a right, told with the GRANT; any other error as it is.
    #[must_use]
    pub(crate) fn or_permission(self, role: &str, grant: &str) -> Self {
        match self {
            Self::Statement { what, source }
                if source.state() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) =>
            {
                Self::Permission {
                    what,
                    role: role.to_owned(),
                    grant: grant.to_owned(),
                    source: Some(source),
                }
            }
            other => other,
        }
    }

    /// A statement that failed in the session of a backup: whatever the error was, the server has dropped the session's
    /// temporary slot with it, so the backup is lost.
    #[must_use]
    pub(crate) fn into_session_lost(self) -> Self {
        match self {
            Self::Statement { what, source } => {
                Self::SessionLost { what: format!("it failed to {what}"), source: Some(source) }
            }
            other => other,
        }
    }

    /// A statement that failed because its connection is gone, told as the loss of the backup's session.
    #[must_use]
    pub(crate) fn or_session_lost(self) -> Self {
        match self {
            Self::Statement { what, source } if source.is_closed() => Self::SessionLost {
                what: format!("the connection ended while it was to {what}"),
                source: Some(source),
            },
            other => other,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let message = failure::chain(&error);
        let told =
            |code, action, hint: &str| Self::new(code, action, message.clone()).with_hint(hint);
        match &error {
            Error::Target { .. } | Error::File { .. } => told(
                Code::ConfigInvalid,
                Action::FixConfig,
                "Correct the connection settings, where they are given: on the command line, or for the cluster in the worker's configuration.",
            ),
            // Whatever was to be done: with the server as it is now, nothing can be.
            Error::Unreachable { source, .. } | Error::Statement { source, .. }
                if source.is_farewell()
                    || matches!(error, Error::Statement { .. }) && source.is_cut_off() =>
            {
                told(
                    Code::ServerUnreachable,
                    Action::Retry,
                    "The server is starting or stopping, or somebody ended this session: its log says which. A job is tried again.",
                )
            }
            Error::Unreachable { .. } => told(
                Code::ServerUnreachable,
                Action::Retry,
                "Check that the server runs and that this host may reach its port or socket.",
            ),
            Error::Refused { cure, source, .. } => {
                if source.state() == Some(&SqlState::TOO_MANY_CONNECTIONS) {
                    told(Code::ServerUnreachable, Action::Retry, cure)
                } else {
                    told(Code::LoginRefused, Action::FixConfig, cure)
                }
            }
            Error::Version { .. } => told(
                Code::VersionUnsupported,
                Action::FixConfig,
                "Upgrade the server to PostgreSQL 14 to 18, or use a pgmuster that knows its version.",
            ),
            Error::Pooler { .. } => told(
                Code::PoolerDetected,
                Action::FixConfig,
                "Give the worker a connection straight to the server: its own port (usually 5432) or its Unix socket.",
            ),
            Error::WrongCluster { .. } => told(
                Code::SystemIdentifierMismatch,
                Action::FixConfig,
                "Give the connection of the right server, or the new cluster a name of its own.",
            ),
            Error::Permission { grant, .. } => {
                told(Code::PermissionDenied, Action::FixConfig, grant)
            }
            Error::Setting { cure, .. } => told(Code::ServerSetting, Action::FixConfig, cure),
            Error::NotOpened { cure, .. } => told(Code::SandboxFailed, Action::FixConfig, cure),
            Error::Busy { .. } => told(
                Code::ClusterBusy,
                Action::Retry,
                "Wait for the other job, or cancel it; pg_terminate_backend on its process frees the lock at once.",
            ),
            Error::SessionLost { .. } => told(
                Code::BackupSessionLost,
                Action::Retry,
                "The server forgot the backup when its session ended; the server's log says why it ended.",
            ),
            Error::WalLost { .. } => told(
                Code::WalMissing,
                Action::Retry,
                "Raise max_slot_wal_keep_size, or give the worker a faster repository.",
            ),
            Error::Statement { source, .. } => {
                let passes = source.is_closed()
                    || source
                        .state()
                        .is_some_and(|s| matches!(&s.code()[..2], "40" | "53" | "55" | "57"));
                let action = if passes { Action::Retry } else { Action::FixConfig };
                told(
                    Code::StatementFailed,
                    action,
                    "The server's log holds the statement and its context.",
                )
            }
            Error::Cancelled { .. } => Self::new(Code::Cancelled, Action::Abandon, message),
            Error::Deadline { .. } => told(
                Code::DeadlineExceeded,
                Action::Retry,
                "Give the job more time, or find out what the server was waiting for in pg_stat_activity.",
            ),
            Error::WalFormat { .. } | Error::Answer { .. } => Self::bug(message),
            Error::Io { .. } => told(
                Code::SourceUnreadable,
                Action::Retry,
                "Check the file system, its free space and the rights of pgmuster's user.",
            ),
            Error::BinariesMissing { package, .. } => told(
                Code::BinariesMissing,
                Action::RetryElsewhere,
                &format!(
                    "Install them: apt-get install {package} (from apt.postgresql.org where the system's own release lacks it), or have the directory of its programs in PATH; a worker's configuration names it in sandbox.postgres_bin_dirs."
                ),
            ),
            Error::BinariesOfOtherSizes { needed, .. } => told(
                Code::BinariesMissing,
                Action::RetryElsewhere,
                &format!(
                    "No packages bring them: they are configured with {} and built from source. Name their directory in sandbox.postgres_bin_dirs of the worker, or put it into PATH.",
                    needed.configure_options()
                ),
            ),
            Error::ClientUnsafe { .. } => told(
                Code::BinariesMissing,
                Action::RetryElsewhere,
                "Older ones run what a hostile server or database makes them run. Update the client programs (apt-get install --only-upgrade postgresql-client-MAJOR), or name a newer directory in sandbox.postgres_bin_dirs.",
            ),
            Error::SandboxUnfit { .. } | Error::ProgramStart { .. } => told(
                Code::SandboxUnfit,
                Action::RetryElsewhere,
                "The backup is neither proved nor blamed. Give this machine what it lacks, or let a worker elsewhere prove.",
            ),
            Error::Program { .. } => {
                told(Code::SandboxFailed, Action::FixConfig, "The program's first error says why.")
            }
            Error::Archive { .. } => told(
                Code::ObjectDamaged,
                Action::FixData,
                "pg_restore --list of the restored file may show more; keep older backups.",
            ),
            Error::Unreadable { cure, .. } => {
                told(Code::DataDirectoryUnreadable, Action::FixConfig, cure)
            }
            Error::Shape { cure, .. } => told(Code::DataDirectoryShape, Action::FixConfig, cure),
            Error::Content { .. } => told(
                Code::DataDirectoryMismatch,
                Action::FixData,
                "Check that the directory is the one the server uses and that its disk is sound.",
            ),
            Error::Sandbox { .. } => told(
                Code::SandboxFailed,
                Action::FixData,
                "The lines are from the log of the restored server; keep older backups until the cause is found.",
            ),
            Error::Replay { .. } => told(
                Code::SandboxFailed,
                Action::FixData,
                "The lines are from the log of the restored server. The backup itself was whole by then: take a new one, which needs \
                 none of that WAL, and keep the older ones.",
            ),
            Error::RecoveryMissed { output, .. } => told(
                Code::RecoveryTargetMissed,
                Action::FixData,
                "Nothing was opened: no server runs there. The lines are from pgmuster-recovery.log in the directory.",
            )
            .with_details(output.lines()),
            Error::StopPositionMissed { .. } => told(
                Code::StopPositionMissed,
                Action::FixData,
                "WAL of the backup is missing or damaged; take a new backup and keep the older ones.",
            ),
        }
    }
}
