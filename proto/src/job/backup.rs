//! Take a backup: of a cluster's files, or with `pg_dump` of its databases.

use serde::{Deserialize, Serialize};

use super::DatabasePattern;
use crate::backup::{BackupKind, Forbidden, SilentChanges, SkippedDatabase};
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
    /// Take a logical backup with `pg_dump`; the files are copied when absent. `fast_checkpoint`, `full_read` and
    /// `rate_limit_bytes` mean nothing then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pg_dump: Option<PgDump>,
}

impl Backup {
    /// What it will be.
    pub fn kind(&self) -> BackupKind {
        if self.pg_dump.is_some() { BackupKind::Logical } else { BackupKind::Physical }
    }
}

/// Parameters of a logical backup: which databases. A new one is included by itself as far as the patterns allow.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PgDump {
    /// Only databases that one of these fits; all when empty. One that fits no database fails the backup.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub databases: Vec<DatabasePattern>,
    /// None that one of these fits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<DatabasePattern>,
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
    /// Where the WAL ends that it brought along: with the segment in which the backup of a primary ends, which was ended for
    /// it; with the backup where this is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal_to: Option<Lsn>,
    /// Worker's clock when the server entered backup mode.
    pub started_at_ms: i64,
    /// Worker's clock when the server left it: what a restore of this backup alone brings back.
    pub stopped_at_ms: i64,
    /// Every transaction is in it that had committed by then, where that is earlier: a standby may be behind its primary, by whose
    /// clock this is, and a dump lists its databases before it begins. Unix milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holds_to_ms: Option<i64>,
    /// Worker's clock when backup mode was over, as the backup itself says it: only later times can be recovered to with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at_ms: Option<i64>,
    /// Files in the backup, WAL apart.
    pub files: u64,
    /// Bytes of those files, as a restore writes them.
    pub size_bytes: u64,
    /// Bytes read from the source.
    pub read_bytes: u64,
    /// Bytes that were new and are now in the repository, compressed and sealed.
    pub stored_bytes: u64,
    /// Bytes that were read and not stored, because an attempt that was interrupted had stored them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub taken_over_bytes: u64,
    /// Bytes of files that were read although nothing said that they had changed, because it was their turn: a share is read
    /// again by each backup.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reread_bytes: u64,
    /// By when all that this backup took over unread will have been read again, if backups go on, Unix milliseconds. Absent
    /// where everything was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reread_by_ms: Option<i64>,
    /// Bytes of WAL stored with the backup, before compression.
    pub wal_bytes: u64,
    /// Pages that failed their checksum, stored as they are.
    pub bad_pages: u64,
    /// What had changed although times and sizes said that it had not. It is in this backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silent_changes: Option<SilentChanges>,
    /// Tables whose rows were not counted because the role may not read them: proofs cannot compare these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forbidden: Option<Forbidden>,
    /// The backup this one was compared with.
    #[serde(default)]
    pub compared_with: Option<BackupId>,
    /// How files that changed were read, for people; absent where nobody says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_files: Option<String>,
    /// Of a logical backup, and of no other: what it holds. Positions are then where the server was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logical: Option<LogicalOutcome>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl BackupOutcome {
    /// What the backup is.
    pub fn kind(&self) -> BackupKind {
        if self.logical.is_some() { BackupKind::Logical } else { BackupKind::Physical }
    }

    /// What had committed by then a restore of it alone brings back, Unix milliseconds. Each database of a dump is as it was when
    /// its own began.
    pub fn recovers_to_ms(&self) -> i64 {
        let own_ms = if self.logical.is_some() { self.started_at_ms } else { self.stopped_at_ms };
        self.holds_to_ms.map_or(own_ms, |ms| ms.min(own_ms))
    }
}

/// What a logical backup holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogicalOutcome {
    /// `pg_dump` in the manner of `server_version_num`.
    pub client_version_num: u32,
    /// Databases in it.
    pub databases: u64,
    /// Whether it has the passwords of roles.
    pub role_passwords: bool,
    /// Databases of the cluster that are not in it, excluded or not: what it has is no recovery of the cluster. Absent when the
    /// worker did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_out: Option<u64>,
    /// Databases that are not in it although nobody excluded them, with the reason.
    #[serde(default)]
    pub skipped: Vec<SkippedDatabase>,
    /// Databases that were to be dumped and could not be, with what was said. They are among those that are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<SkippedDatabase>,
}
