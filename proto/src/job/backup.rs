//! Take a physical backup.

use serde::{Deserialize, Serialize};

use crate::{BackupId, LineageId, Lsn, SystemIdentifier, Timeline};

/// Parameters of a backup. The repository is the one the worker's configuration names for the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backup {
    /// Ask the server for an immediate checkpoint instead of a spread one. A person who waits wants this.
    #[serde(default)]
    pub fast_checkpoint: bool,
    /// Read every byte, also of files that look unchanged.
    #[serde(default)]
    pub full_read: bool,
    /// zstd level, -7 to 19; the worker's setting when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression_level: Option<i32>,
    /// Threads that read, compress and seal; at most what the worker's configuration gives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<u32>,
    /// Bytes a second that are read from the server's files, at least [`RATE_LIMIT_MIN_BYTES`]; at most what the worker's
    /// configuration allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_bytes: Option<u64>,
}

/// The lowest limit of what a backup reads in a second: slower ones end in no useful time.
pub const RATE_LIMIT_MIN_BYTES: u64 = 1 << 20;

/// What a backup did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupOutcome {
    /// The backup, as it is named in the repository.
    pub backup: BackupId,
    /// The line of history it belongs to.
    pub lineage: LineageId,
    /// The repository, for people: never with a secret in it.
    pub repository: String,
    /// The source.
    pub system_identifier: SystemIdentifier,
    /// `server_version_num` of the source.
    pub server_version_num: u32,
    /// The timeline of the backup.
    pub timeline: Timeline,
    /// Where its WAL starts.
    pub start_lsn: Lsn,
    /// Where recovery must get to.
    pub stop_lsn: Lsn,
    /// Worker's clock when the server entered backup mode.
    pub started_at_ms: i64,
    /// Worker's clock when the server left it: what a restore of this backup alone brings back.
    pub stopped_at_ms: i64,
    /// Files and directories in the backup.
    pub files: u64,
    /// Bytes a restore will write.
    pub size_bytes: u64,
    /// Bytes read from the source.
    pub read_bytes: u64,
    /// Bytes that were new and are now in the repository, compressed and sealed.
    pub stored_bytes: u64,
    /// Bytes of WAL stored with the backup, before compression.
    pub wal_bytes: u64,
    /// Pages that failed their checksum, stored as they are.
    pub bad_pages: u64,
    /// The backup this one was compared with.
    #[serde(default)]
    pub compared_with: Option<BackupId>,
}
