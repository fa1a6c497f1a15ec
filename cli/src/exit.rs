//! Exit codes: frozen, documented in `docs/exit-codes.md`, one meaning each.

use std::process::ExitCode;

use proto::{Action, Code, Failure, JobState};

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// 0: done.
    Ok,
    /// 1: it failed.
    Failed,
    /// 2: the command line or a configuration file is wrong.
    Usage,
    /// 3: checked fine, and something is wrong with what was checked.
    Findings,
    /// 4: not authorised.
    Unauthorized,
    /// 5: refused by a check before anything was changed.
    Refused,
    /// 6: there is no such thing.
    NotFound,
    /// 7: the thing is in a state that does not allow this.
    Conflict,
    /// 8: unreachable; trying again is safe.
    Unreachable,
    /// 9: some of several targets failed.
    SomeFailed,
    /// 10: still running when the waiting ended.
    StillRunning,
    /// 11: the key or passphrase does not open the repository.
    KeyWrong,
    /// 130: interrupted.
    Interrupted,
    /// 200: `wal get` does not know whether there is such a file. PostgreSQL ends a recovery at codes from 1 to 125 and
    /// fails at others, except 143.
    NotKnown,
}

impl Exit {
    /// The number.
    pub fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Findings => 3,
            Self::Unauthorized => 4,
            Self::Refused => 5,
            Self::NotFound => 6,
            Self::Conflict => 7,
            Self::Unreachable => 8,
            Self::SomeFailed => 9,
            Self::StillRunning => 10,
            Self::KeyWrong => 11,
            Self::Interrupted => 130,
            Self::NotKnown => 200,
        }
    }

    /// The exit code of a failure.
    pub fn of(failure: &Failure) -> Self {
        match failure.code {
            Code::ConfigInvalid | Code::RequestInvalid => Self::Usage,
            Code::Unauthorized | Code::StoreForbidden | Code::LoginRefused => Self::Unauthorized,
            Code::ClusterUnknown
            | Code::JobUnknown
            | Code::BackupUnknown
            | Code::WorkerUnknown
            | Code::RepositoryMissing => Self::NotFound,
            Code::StateConflict
            | Code::ClusterBusy
            | Code::RepositoryExists
            | Code::WalConflict => Self::Conflict,
            Code::CoordinatorUnreachable
            | Code::BrokerUnreachable
            | Code::CatalogUnavailable
            | Code::ServerUnreachable
            | Code::StoreUnavailable
            | Code::WalServiceAway => Self::Unreachable,
            Code::KeyWrong => Self::KeyWrong,
            Code::RecoveryTargetUnreachable
            | Code::TargetNotEmpty
            | Code::TargetOutsideRoots
            | Code::TargetFull
            | Code::NotAllowed
            | Code::PoolerDetected
            | Code::SystemIdentifierMismatch
            | Code::VersionUnsupported
            | Code::DataDirectoryUnreadable
            | Code::DataDirectoryMismatch
            | Code::StoreUnsuitable
            | Code::RepositoryVersion
            | Code::WalRefused
            | Code::ServerSetting
            | Code::PermissionDenied
            | Code::BinariesMissing => Self::Refused,
            Code::Cancelled if failure.action == Action::Abandon => Self::Interrupted,
            _ => Self::Failed,
        }
    }

    /// The exit code of a job that was waited for.
    pub fn of_job(state: JobState, failure: Option<&Failure>) -> Self {
        match state {
            JobState::Succeeded => Self::Ok,
            JobState::Queued | JobState::Waiting | JobState::Running | JobState::Cancelling => {
                Self::StillRunning
            }
            JobState::Failed | JobState::Cancelled | JobState::Missed | JobState::Lost => {
                failure.map_or(Self::Failed, Self::of)
            }
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Every exit in the order of the enum; a new one does not compile without a place here.
    fn all() -> Vec<Exit> {
        let next = |exit: &Exit| match exit {
            Exit::Ok => Some(Exit::Failed),
            Exit::Failed => Some(Exit::Usage),
            Exit::Usage => Some(Exit::Findings),
            Exit::Findings => Some(Exit::Unauthorized),
            Exit::Unauthorized => Some(Exit::Refused),
            Exit::Refused => Some(Exit::NotFound),
            Exit::NotFound => Some(Exit::Conflict),
            Exit::Conflict => Some(Exit::Unreachable),
            Exit::Unreachable => Some(Exit::SomeFailed),
            Exit::SomeFailed => Some(Exit::StillRunning),
            Exit::StillRunning => Some(Exit::KeyWrong),
            Exit::KeyWrong => Some(Exit::Interrupted),
            Exit::Interrupted => Some(Exit::NotKnown),
            Exit::NotKnown => None,
        };
        std::iter::successors(Some(Exit::Ok), next).collect()
    }

    #[test]
    fn the_page_lists_the_same_numbers() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/exit-codes.md");
        let page = std::fs::read_to_string(page).unwrap();
        let listed: Vec<u8> = page
            .lines()
            .filter_map(|line| line.strip_prefix("| ")?.split_once(" |")?.0.parse().ok())
            .collect();
        let ours: Vec<u8> = all().into_iter().map(Exit::code).collect();
        assert_eq!(ours, listed, "left: Exit; right: docs/exit-codes.md");
    }
}
