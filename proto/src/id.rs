//! Identifiers: one type a thing, so that a job's id cannot be passed where an attempt's is meant.
//!
//! All are UUIDs of version 7 (RFC 9562): they sort by the time they were minted and carry no other meaning.
//! Minting takes the time and the randomness from the caller.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Builds a version 7 UUID from a Unix time in milliseconds and ten random bytes.
pub fn v7(unix_ms: u64, random: [u8; 10]) -> Uuid {
    uuid::Builder::from_unix_timestamp_millis(unix_ms, &random).into_uuid()
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// Mints an id from a Unix time in milliseconds and ten random bytes.
            pub fn mint(unix_ms: u64, random: [u8; 10]) -> Self {
                Self(v7(unix_ms, random))
            }

            /// The sixteen bytes of the id, in the order of its text.
            pub fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    )*};
}

ids! {
    /// One piece of work for one cluster.
    JobId;
    /// One execution of a job. A backup is named by the attempt that wrote it, see [`BackupId`].
    AttemptId;
    /// One life of a worker process: a restarted worker has a new one.
    BootId;
    /// One repository, minted when it is created.
    RepositoryId;
    /// One history of one cluster in a repository.
    LineageId;
    /// One committed (or attempted) backup: the same value as the attempt that wrote it.
    BackupId;
}

impl From<AttemptId> for BackupId {
    fn from(attempt: AttemptId) -> Self {
        Self(attempt.0)
    }
}

impl From<BackupId> for AttemptId {
    fn from(backup: BackupId) -> Self {
        Self(backup.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_sort_by_time_and_round_trip() {
        let early = JobId::mint(1_000, [0xff; 10]);
        let late = JobId::mint(1_001, [0; 10]);
        assert!(early < late);
        assert_eq!(early.to_string().parse::<JobId>().unwrap(), early);
        assert_eq!(early.0.get_version_num(), 7);
    }
}
