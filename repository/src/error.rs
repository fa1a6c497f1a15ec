//! What can go wrong in a repository, and what each means for the job that met it.

use std::io;

use proto::{
    Action, AttemptId, BackupId, Code, Failure, LineageId, RepositoryId, WalFileName,
    failure::chain,
};

use crate::store::StoreError;

/// What to do about an object that is not there.
const MISSING: &str =
    "`pgmuster repo check URL --key FILE` says which backups are affected; take a new backup.";
/// What to do about one that is not what was written.
const DAMAGED: &str = "`pgmuster repo check URL --key FILE --level read` says which backups are affected; take a new backup.";

/// Why a call on a repository failed. Completes "failed to …".
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store below.
    #[error(transparent)]
    Store(StoreError),
    /// There is no `config` object.
    #[error("find a repository in {place}")]
    NoRepository {
        /// The store.
        place: String,
    },
    /// There is a `config` object already.
    #[error("create a repository in {place}: there is one already")]
    RepositoryExists {
        /// The store.
        place: String,
    },
    /// The place of a mirror holds something else.
    #[error("copy into {place}: {reason}")]
    NoMirror {
        /// The store.
        place: String,
        /// What is there.
        reason: String,
    },
    /// A copy would store a pack under a name that a collection may be deleting.
    #[error("store {key} in {place}: a collection of garbage there may be deleting that name")]
    Condemned {
        /// The pack.
        key: String,
        /// The store.
        place: String,
    },
    /// The repository needs something this program does not know.
    #[error("use the repository in {place}: {reason}")]
    Version {
        /// The store.
        place: String,
        /// Which version or feature.
        reason: String,
    },
    /// The repository is for one program at a time, and nobody said that there is no other.
    #[error(
        "delete from the repository in {place}: it is for one program at a time, and others may be using it"
    )]
    NotAlone {
        /// The store.
        place: String,
    },
    /// The key is not one of this repository's, or none was given and one is needed.
    #[error("open repository {repository} in {place}: {reason}")]
    Key {
        /// The store.
        place: String,
        /// The repository.
        repository: RepositoryId,
        /// What is wrong with the key.
        reason: String,
    },
    /// What is stored of a key, or about the keys, is not what was written.
    #[error("trust {key}: {reason}")]
    KeyObject {
        /// The object.
        key: String,
        /// What does not fit.
        reason: String,
    },
    /// A change of the keys that is not allowed.
    #[error("{what} key {id}: {reason}")]
    KeyChange {
        /// `add`, `retire` or `use`.
        what: &'static str,
        /// Which key.
        id: String,
        /// What stands against it.
        reason: String,
    },
    /// An object that must exist does not.
    #[error("find {key}, which the repository needs")]
    Missing {
        /// The object.
        key: String,
    },
    /// An object's bytes are not what was written.
    #[error("trust {key}: {reason}")]
    Damaged {
        /// The object.
        key: String,
        /// What does not fit.
        reason: String,
    },
    /// Something is larger than this format allows.
    #[error("stay within the format's limits: {reason}")]
    Limit {
        /// Which limit.
        reason: String,
    },
    /// The attempt has an intent already: somebody else works, or worked, on it.
    #[error("begin attempt {attempt}: it was begun before")]
    AttemptExists {
        /// The attempt.
        attempt: AttemptId,
    },
    /// Another verdict was first.
    #[error("commit attempt {attempt}: it was aborted by {by}: {why}")]
    CommitRefused {
        /// The attempt.
        attempt: AttemptId,
        /// Who aborted it.
        by: String,
        /// Their reason.
        why: String,
    },
    /// Something the attempt needs is gone again before it was committed.
    #[error("commit attempt {attempt}: {reason}")]
    Incomplete {
        /// The attempt.
        attempt: AttemptId,
        /// Which object.
        reason: String,
    },
    /// The store did not say whether a verdict was written, and did not show one when it was asked.
    #[error("learn whether the {word} of attempt {attempt} was written: it may stand")]
    VerdictUnknown {
        /// The attempt.
        attempt: AttemptId,
        /// COMMIT or ABORT.
        word: &'static str,
        /// What the store said.
        #[source]
        source: StoreError,
    },
    /// There is no committed backup of this name.
    #[error("find a committed backup {backup} in lineage {lineage}")]
    BackupUnknown {
        /// The lineage looked into.
        lineage: LineageId,
        /// The backup looked for.
        backup: BackupId,
    },
    /// A backup that is not to be forgotten, or that is forgotten already.
    #[error("{what} backup {backup}: {reason}")]
    Wanted {
        /// `forget`, `hold` or what takes a `forget` back.
        what: &'static str,
        /// The backup.
        backup: BackupId,
        /// What stands against it.
        reason: String,
    },
    /// A backup that somebody gave up, and that another one wants to keep.
    #[error("hold backup {backup}: it was given up{by}, and may be deleted at any moment")]
    GivenUp {
        /// The backup.
        backup: BackupId,
        /// By whom and why, as far as that is known.
        by: String,
    },
    /// A file of the log that cannot be what its name says.
    #[error("archive {file}: {reason}")]
    WalContent {
        /// The file.
        file: WalFileName,
        /// What does not fit.
        reason: String,
    },
    /// Other content is archived under the name of a file.
    #[error(
        "archive {file}: other content is archived under this name in lineage {lineage}, and stays; of what came now, {kept}"
    )]
    WalConflict {
        /// The file.
        file: WalFileName,
        /// The lineage.
        lineage: LineageId,
        /// What became of the content.
        kept: String,
    },
    /// There is no such lineage.
    #[error("find lineage {lineage}")]
    LineageUnknown {
        /// The lineage looked for.
        lineage: LineageId,
    },
    /// The source could not be read.
    #[error("read {path} of the source")]
    Source {
        /// The file, relative.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The caller's list of files cannot be stored.
    #[error("store {path}: {reason}")]
    Entry {
        /// The file, relative.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The target of a restore holds something else.
    #[error("restore into {target}: {reason}")]
    TargetNotEmpty {
        /// The directory.
        target: String,
        /// What is in the way.
        reason: String,
    },
    /// A restore would remove what nobody can bring back.
    #[error("restore into {target}: it would remove {what}")]
    TargetPrecious {
        /// The directory.
        target: String,
        /// What is in it.
        what: String,
    },
    /// Somebody else restores to the same place at this moment.
    #[error("restore into {target}: another restore is writing there")]
    TargetBusy {
        /// The directory.
        target: String,
    },
    /// Two directories of a restore, or one and the repository, are the same, or one lies in the other.
    #[error("restore {one} and {other}: they are the same directory, or one lies in the other")]
    TargetsMeet {
        /// What goes to the outer one.
        one: String,
        /// What goes to the inner one.
        other: String,
    },
    /// The target of a restore is too small.
    #[error(
        "restore into {target}: {needed_bytes} bytes are needed and {available_bytes} are free"
    )]
    TargetFull {
        /// The directory.
        target: String,
        /// What the restore writes.
        needed_bytes: u64,
        /// What the file system has.
        available_bytes: u64,
    },
    /// The store of a repository is too small for what is to be written.
    #[error("store in {place}: at least {needed_bytes} bytes are needed and {free_bytes} are free")]
    StoreFull {
        /// The store.
        place: String,
        /// What is known to come, at least.
        needed_bytes: u64,
        /// What the store has.
        free_bytes: u64,
    },
    /// The target of a restore could not be written.
    #[error("write {path}")]
    Target {
        /// The file or directory.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The caller cancelled.
    #[error("finish: cancelled")]
    Cancelled,
    /// A rule of this crate was broken.
    #[error("keep the repository's own rules: {0}")]
    Bug(String),
}

impl Error {
    pub(crate) fn damaged(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Damaged { key: key.into(), reason: reason.into() }
    }

    pub(crate) fn entry(path: &[u8], reason: impl Into<String>) -> Self {
        Self::Entry { path: show(path), reason: reason.into() }
    }

    /// A missing or cut object is the repository's fault when something committed names it.
    pub(crate) fn needed(error: StoreError) -> Self {
        match error {
            StoreError::NotFound { key } => Self::Missing { key },
            StoreError::Short { key, source } => Self::Damaged {
                key,
                reason: format!("it is shorter than it was written: {source}"),
            },
            other => other.into(),
        }
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            // Nothing that was written is.
            StoreError::Large { key, source } => Self::Damaged {
                key,
                reason: format!("it is larger than anything written there: {source}"),
            },
            other => Self::Store(other),
        }
    }
}

/// A path for people.
pub(crate) fn show(path: &[u8]) -> String {
    path.escape_ascii().to_string()
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let message = format!("failed to {}", chain(&error));
        let (code, action, hint) = match &error {
            Error::Store(store) => of_store(store),
            Error::NoRepository { .. } => (
                Code::RepositoryMissing,
                Action::FixConfig,
                "Check the repository's URL, or create it: `pgmuster repo init URL --key NEW_FILE`.",
            ),
            Error::RepositoryExists { .. } => (
                Code::RepositoryExists,
                Action::FixConfig,
                "Use the existing repository, or choose an empty place for a new one.",
            ),
            Error::NoMirror { .. } => (
                Code::RepositoryExists,
                Action::FixConfig,
                "Give an empty place, or one that holds an earlier copy of the same repository.",
            ),
            Error::Condemned { .. } => (
                Code::StateConflict,
                Action::Retry,
                "Copy again when that collection has ended; `pgmuster repo gc URL --key FILE --plan` shows lists that dead ones left.",
            ),
            Error::Version { .. } => (
                Code::RepositoryVersion,
                Action::FixConfig,
                "Use a pgmuster at least as new as the one that wrote the repository.",
            ),
            Error::NotAlone { .. } => (
                Code::StateConflict,
                Action::FixConfig,
                "Stop every worker and every other command on this repository, then repeat with `--alone`.",
            ),
            Error::Key { .. } => (
                Code::KeyWrong,
                Action::FixConfig,
                "Use a key file or a passphrase of this repository: a key file names its repository in its first lines.",
            ),
            Error::KeyObject { .. } => (
                Code::ObjectDamaged,
                Action::FixData,
                "Open the repository with another of its keys: `pgmuster repo key check URL --key OTHER` tells what is wrong, `pgmuster repo key add URL --key OTHER --new-key NEW_FILE` replaces the key.",
            ),
            Error::KeyChange { .. } => (
                Code::StateConflict,
                Action::FixConfig,
                "No key was taken away. `pgmuster repo key list URL --key FILE` shows the keys there are.",
            ),
            Error::Missing { .. } => (Code::ObjectMissing, Action::FixData, MISSING),
            Error::Damaged { .. } | Error::Limit { .. } => {
                (Code::ObjectDamaged, Action::FixData, DAMAGED)
            }
            Error::AttemptExists { .. } => (
                Code::AttemptSuperseded,
                Action::Abandon,
                "Another execution of this attempt began it; start a new attempt.",
            ),
            Error::CommitRefused { .. } => (
                Code::CommitRefused,
                Action::Abandon,
                "A later attempt took over; look at that one.",
            ),
            Error::Incomplete { .. } => (
                Code::ObjectMissing,
                Action::Retry,
                "Find out what deletes from the store or damages it (a lifecycle rule, a clean-up job, a disk); the next attempt stores it again.",
            ),
            Error::VerdictUnknown { source, .. } => {
                let (code, action, _) = of_store(source);
                let hint = "Once the store answers, `pgmuster repo list URL --key FILE` shows whether it is a backup.";
                (code, action, hint)
            }
            Error::BackupUnknown { .. } | Error::LineageUnknown { .. } => (
                Code::BackupUnknown,
                Action::FixConfig,
                "`pgmuster backups list` shows what there is.",
            ),
            Error::Wanted { .. } => (
                Code::StateConflict,
                Action::FixConfig,
                "Look at what stays and why: `pgmuster repo gc URL --key FILE --plan`. Prove a newer backup or release the hold where that is the reason.",
            ),
            Error::GivenUp { backup, .. } => {
                let hint = format!(
                    "Take that back first, while it is there: `pgmuster repo undelete URL --key FILE {backup}`."
                );
                return Failure::new(Code::StateConflict, Action::FixConfig, message)
                    .with_hint(hint);
            }
            Error::WalContent { .. } => (
                Code::WalRefused,
                Action::FixData,
                "Nothing was stored. Look at the file: a server archives segments whole.",
            ),
            Error::WalConflict { .. } => (
                Code::WalConflict,
                Action::FixConfig,
                "Two servers archive into one lineage: stop the one that is not the primary, or let it archive under another cluster name, as a restored or cloned one has to.",
            ),
            Error::Source { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => (
                    Code::DataDirectoryUnreadable,
                    Action::FixConfig,
                    "Let the worker run as the owner of the data directory.",
                ),
                _ => (
                    Code::SourceUnreadable,
                    Action::Retry,
                    "Look at the server's storage and kernel log when this repeats.",
                ),
            },
            Error::Entry { .. } => (
                Code::DataDirectoryShape,
                Action::FixConfig,
                "Move the named file out of the data directory.",
            ),
            Error::TargetNotEmpty { .. } => (
                Code::TargetNotEmpty,
                Action::FixConfig,
                "Give an empty directory, one with an unfinished restore of the same backup, or with --delta a stopped server's.",
            ),
            Error::TargetPrecious { .. } => (
                Code::TargetNotEmpty,
                Action::FixConfig,
                "Nothing was changed. Move it out of the way, and keep a copy of it; or give another directory.",
            ),
            Error::TargetBusy { .. } => (
                Code::TargetNotEmpty,
                Action::FixConfig,
                "Let it end. If it is stopped or fails, the same command goes on where it was; to have both, give another directory.",
            ),
            Error::TargetsMeet { .. } => (
                Code::RequestInvalid,
                Action::FixConfig,
                "Nothing was changed. Give the data directory and every tablespace a directory of its own, none inside another and none \
                 in or around the repository.",
            ),
            Error::TargetFull { .. } => (
                Code::TargetFull,
                Action::RetryElsewhere,
                "Make room, or restore to a larger file system.",
            ),
            Error::StoreFull { .. } => (
                Code::TargetFull,
                Action::FixConfig,
                "Make room in the repository's store; `pgmuster repo gc URL --key FILE --plan` tells what no backup needs any more.",
            ),
            Error::Target { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => (
                    Code::TargetFull,
                    Action::RetryElsewhere,
                    "Make room, or restore to a larger file system.",
                ),
                _ => (
                    Code::TargetUnwritable,
                    Action::FixConfig,
                    "Let the user that pgmuster runs as own the target directory, and its file system be writable.",
                ),
            },
            Error::Cancelled => (Code::Cancelled, Action::Abandon, ""),
            Error::Bug(_) => return Failure::bug(message),
        };
        Failure::new(code, action, message).with_hint(hint)
    }
}

fn of_store(error: &StoreError) -> (Code, Action, &'static str) {
    match error {
        StoreError::NotFound { .. } => (Code::ObjectMissing, Action::FixData, MISSING),
        StoreError::Short { .. } | StoreError::Large { .. } => {
            (Code::ObjectDamaged, Action::FixData, DAMAGED)
        }
        StoreError::Forbidden { .. } => (
            Code::StoreForbidden,
            Action::FixConfig,
            "Check the store's credentials and that they may read, list, write and (for cleaning) delete.",
        ),
        StoreError::Full { .. } => {
            (Code::StoreUnavailable, Action::FixConfig, "Make room in the repository's store.")
        }
        StoreError::Unavailable { .. } => (
            Code::StoreUnavailable,
            Action::Retry,
            "Check the store's address and health when this repeats.",
        ),
        StoreError::Address { .. } => (
            Code::RequestInvalid,
            Action::FixConfig,
            "Write file:///path for a directory, or s3://bucket/prefix.",
        ),
        // With the bucket, every repository in it is gone.
        StoreError::NoStore { .. } => (
            Code::RepositoryMissing,
            Action::FixConfig,
            "Check the repository's URL. A bucket that was deleted takes along all that was in it: create it, and the repository: `pgmuster repo init URL --key NEW_FILE`.",
        ),
        StoreError::Unsuitable { .. } => {
            (Code::StoreUnsuitable, Action::FixConfig, "Use a store with the named property.")
        }
    }
}
