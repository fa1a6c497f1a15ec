//! Which PostgreSQL answers, and what its version changes for us. One place for every "since 15" in this crate.

use std::fmt;

/// `server_version_num` of a server: 150018 is 15.18.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServerVersion(pub u32);

/// The oldest major version we work with.
pub const OLDEST_MAJOR: u32 = 14;
/// The newest major version we work with.
pub const NEWEST_MAJOR: u32 = 18;

impl ServerVersion {
    /// 14 to 18 for the versions we know.
    pub fn major(self) -> u32 {
        self.0 / 10_000
    }

    /// Whether this program was written for, and tested on, this major version.
    pub fn is_supported(self) -> bool {
        (OLDEST_MAJOR..=NEWEST_MAJOR).contains(&self.major())
    }

    /// The call that begins a backup; parameters: label, fast.
    pub(crate) fn backup_start(self) -> &'static str {
        if self.major() < 15 {
            "SELECT pg_catalog.pg_start_backup($1, $2, false)::text"
        } else {
            "SELECT pg_catalog.pg_backup_start($1, $2)::text"
        }
    }

    /// The call that ends a backup without waiting for an archive.
    pub(crate) fn backup_stop(self) -> &'static str {
        if self.major() < 15 {
            "SELECT lsn::text, labelfile, spcmapfile FROM pg_catalog.pg_stop_backup(false, false)"
        } else {
            "SELECT lsn::text, labelfile, spcmapfile FROM pg_catalog.pg_backup_stop(false)"
        }
    }

    /// The signature to grant for [`Self::backup_start`].
    pub(crate) fn backup_start_signature(self) -> &'static str {
        if self.major() < 15 {
            "pg_catalog.pg_start_backup(text, boolean, boolean)"
        } else {
            "pg_catalog.pg_backup_start(text, boolean)"
        }
    }

    /// The signature to grant for [`Self::backup_stop`].
    pub(crate) fn backup_stop_signature(self) -> &'static str {
        if self.major() < 15 {
            "pg_catalog.pg_stop_backup(boolean, boolean)"
        } else {
            "pg_catalog.pg_backup_stop(boolean)"
        }
    }
}

impl fmt::Display for ServerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.0 % 10_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(ServerVersion(150_018).to_string(), "15.18");
        assert!(!ServerVersion(130_020).is_supported());
        assert!(ServerVersion(140_000).is_supported() && ServerVersion(180_004).is_supported());
        assert!(!ServerVersion(190_000).is_supported());
    }
}
