//! `global/pg_control`: what the server last wrote down about its own state. PostgreSQL 14 to 18.
//!
//! The file can be caught half-written, so it is read until its checksum is right. Deliberately not
//! here: any judgement whether the values fit a backup.

use std::path::Path;
use std::time::Duration;

use proto::{Lsn, SystemIdentifier, Timeline};

use crate::Error;
use crate::crc32c::crc32c;
use crate::files::{LocalFiles, ServerFiles};
use crate::process::Result;

/// Where it lies in a data directory.
pub use proto::server_files::CONTROL_FILE_PATH;
/// No more than this is read of what has its name.
const CONTROL_FILE_LIMIT_BYTES: u64 = 1 << 20;
/// How often a torn file is read. The server writes it in one call, so the second try nearly always
/// does; half a second covers a server that was suspended in that call.
const ATTEMPTS: u32 = 50;
/// Between two tries, as the server's own readers do.
const BACK_OFF: Duration = Duration::from_millis(10);

/// Where `min_recovery_point` lies in every layout, its timeline behind it.
const MIN_RECOVERY_POINT: usize = 136;

/// The state a cluster was in when its control file was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// Starting up.
    Startup,
    /// Shut down cleanly.
    ShutDown,
    /// A standby that was shut down.
    ShutDownInRecovery,
    /// Shutting down.
    ShuttingDown,
    /// Recovering from a crash.
    InCrashRecovery,
    /// A standby, or a restore that replays.
    InArchiveRecovery,
    /// Running; also the state a crashed server leaves behind.
    InProduction,
}

impl ClusterState {
    /// As `pg_controldata` prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Startup => "starting up",
            Self::ShutDown => "shut down",
            Self::ShutDownInRecovery => "shut down in recovery",
            Self::ShuttingDown => "shutting down",
            Self::InCrashRecovery => "in crash recovery",
            Self::InArchiveRecovery => "in archive recovery",
            Self::InProduction => "in production",
        }
    }
}

/// The content of a control file, as far as backups, restores and proofs need it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "the fields are the server's own")]
pub struct ControlFile {
    /// The number `initdb` gave the cluster.
    pub system_identifier: SystemIdentifier,
    /// Version of the file's own layout: 1300, 1700 or 1800.
    pub control_version: u32,
    /// Version of the system catalogs; server programs must match it.
    pub catalog_version: u32,
    /// What the server was doing.
    pub state: ClusterState,
    /// When the file was last written, Unix seconds by the server's clock.
    pub written_at_s: i64,
    /// Position of the latest checkpoint's record.
    pub checkpoint: Lsn,
    /// Where recovery from that checkpoint begins.
    pub redo: Lsn,
    /// Timeline of that checkpoint.
    pub timeline: Timeline,
    /// The timeline before, the same when that checkpoint does not begin one.
    pub previous_timeline: Timeline,
    /// Whether full page images were being written at that checkpoint.
    pub full_page_writes: bool,
    /// Next transaction id, with its epoch in the upper half.
    pub next_transaction: u64,
    /// When that checkpoint began, Unix seconds by the server's clock.
    pub checkpoint_at_s: i64,
    /// A standby must replay to here before it is consistent; zero on a primary.
    pub min_recovery_point: Lsn,
    /// Timeline of `min_recovery_point`.
    pub min_recovery_timeline: Timeline,
    /// Redo position of the backup that is being recovered; zero once its end was reached.
    pub backup_start: Lsn,
    /// End of a backup taken from a standby; zero otherwise.
    pub backup_end: Lsn,
    /// Whether recovery must see an end-of-backup record before the cluster may open.
    pub backup_end_required: bool,
    /// `wal_level`: 0 minimal, 1 replica, 2 logical.
    pub wal_level: u32,
    /// `wal_log_hints`.
    pub wal_log_hints: bool,
    /// `max_connections`.
    pub max_connections: u32,
    /// `max_worker_processes`.
    pub max_worker_processes: u32,
    /// `max_wal_senders`.
    pub max_wal_senders: u32,
    /// `max_prepared_transactions`.
    pub max_prepared_transactions: u32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_transaction: u32,
    /// `track_commit_timestamp`.
    pub track_commit_timestamp: bool,
    /// Bytes in a page (`BLCKSZ`), 1 to 32 KiB.
    pub block_size: u32,
    /// Blocks in a segment of a large relation (`RELSEG_SIZE`).
    pub relation_segment_blocks: u32,
    /// Bytes in a page of WAL (`XLOG_BLCKSZ`), 1 to 64 KiB.
    pub wal_block_size: u32,
    /// Bytes in a WAL segment, 1 MiB to 1 GiB, a power of two.
    pub wal_segment_size: u32,
    /// Version of page checksums; zero when pages carry none.
    pub checksum_version: u32,
}

impl ControlFile {
    /// Reads the control file of a data directory, again while it is torn.
    pub fn read(data_directory: &Path) -> Result<Self> {
        Self::read_with_bytes(data_directory).map(|(control, _)| control)
    }

    /// The same, with the bytes whose checksum was right: these are what a backup stores.
    pub fn read_with_bytes(data_directory: &Path) -> Result<(Self, Vec<u8>)> {
        Self::read_in(&LocalFiles::new(data_directory))
    }

    /// The same of a server's files, wherever they are.
    pub fn read_in(files: &dyn ServerFiles) -> Result<(Self, Vec<u8>)> {
        let path = Path::new(CONTROL_FILE_PATH);
        let mut attempt = 1;
        loop {
            let read = files.read(path, CONTROL_FILE_LIMIT_BYTES);
            let Some(bytes) = read.map_err(|source| files.unreadable(path, source))? else {
                return Err(Error::Shape {
                    path: files.place(Path::new("")),
                    what: format!("{CONTROL_FILE_PATH} is missing, so it is no data directory"),
                    cure: "Give the directory that SHOW data_directory names.".to_owned(),
                });
            };
            match Self::parse(&bytes) {
                Ok(control) => return Ok((control, bytes)),
                Err(what) if attempt == ATTEMPTS => {
                    return Err(Error::Content {
                        name: files.place(path).display().to_string(),
                        what,
                    });
                }
                Err(_) => std::thread::sleep(BACK_OFF),
            }
            attempt += 1;
        }
    }

    /// Reads the content of a control file. The error says what is wrong with it.
    pub fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let field = Fields(bytes);
        let control_version = field.u32(8)?;
        let content_length = content_length(control_version)?;
        let stored = field.u32(content_length)?;
        let computed = crc32c([&bytes[..content_length]]);
        if stored != computed {
            return Err(format!(
                "checksum {stored:08X} does not match the content ({computed:08X})"
            ));
        }
        // A constant the server writes to detect another floating-point format.
        if field.u64(208)? != 1_234_567.0_f64.to_bits() {
            return Err("it was written by a machine of another floating-point format".to_owned());
        }
        let lsn = |offset| field.u64(offset).map(Lsn);
        let timeline = |offset| field.u32(offset).map(Timeline);
        let control = Self {
            system_identifier: SystemIdentifier(field.u64(0)?),
            control_version,
            catalog_version: field.u32(12)?,
            state: match field.u32(16)? {
                0 => ClusterState::Startup,
                1 => ClusterState::ShutDown,
                2 => ClusterState::ShutDownInRecovery,
                3 => ClusterState::ShuttingDown,
                4 => ClusterState::InCrashRecovery,
                5 => ClusterState::InArchiveRecovery,
                6 => ClusterState::InProduction,
                other => return Err(format!("cluster state {other} is unknown")),
            },
            written_at_s: field.u64(24)?.cast_signed(),
            checkpoint: lsn(32)?,
            redo: lsn(40)?,
            timeline: timeline(48)?,
            previous_timeline: timeline(52)?,
            full_page_writes: field.bool(56)?,
            next_transaction: field.u64(64)?,
            checkpoint_at_s: field.u64(104)?.cast_signed(),
            min_recovery_point: lsn(MIN_RECOVERY_POINT)?,
            min_recovery_timeline: timeline(MIN_RECOVERY_POINT + 8)?,
            backup_start: lsn(152)?,
            backup_end: lsn(160)?,
            backup_end_required: field.bool(168)?,
            wal_level: field.u32(172)?,
            wal_log_hints: field.bool(176)?,
            max_connections: field.u32(180)?,
            max_worker_processes: field.u32(184)?,
            max_wal_senders: field.u32(188)?,
            max_prepared_transactions: field.u32(192)?,
            max_locks_per_transaction: field.u32(196)?,
            track_commit_timestamp: field.bool(200)?,
            block_size: field.u32(216)?,
            relation_segment_blocks: field.u32(220)?,
            wal_block_size: field.u32(224)?,
            wal_segment_size: field.u32(228)?,
            checksum_version: field.u32(252)?,
        };
        let power = |value: u32, from: u32, to: u32| {
            value.is_power_of_two() && value >= from && value <= to
        };
        if !power(control.block_size, 1 << 10, 32 << 10)
            || !power(control.wal_block_size, 1 << 10, 64 << 10)
            || !power(control.wal_segment_size, 1 << 20, 1 << 30)
            || control.relation_segment_blocks == 0
        {
            return Err("page or segment sizes are impossible".to_owned());
        }
        Ok(control)
    }

    /// The same control file, of a copy that is consistent at `end` and no earlier: recovery from a
    /// standby's backup ends no sooner, and the server refuses to open where its WAL ends before. The
    /// standby's own value is never lowered. The error says what is wrong with `bytes`.
    pub fn with_recovery_end(bytes: &[u8], end: Lsn) -> std::result::Result<Vec<u8>, String> {
        let control = Self::parse(bytes)?;
        let mut copy = bytes.to_vec();
        if control.min_recovery_point >= end {
            return Ok(copy);
        }
        copy[MIN_RECOVERY_POINT..MIN_RECOVERY_POINT + 8].copy_from_slice(&end.0.to_ne_bytes());
        copy[MIN_RECOVERY_POINT + 8..MIN_RECOVERY_POINT + 12]
            .copy_from_slice(&control.timeline.0.to_ne_bytes());
        let length = content_length(control.control_version)?;
        let checksum = crc32c([&copy[..length]]);
        copy[length..length + 4].copy_from_slice(&checksum.to_ne_bytes());
        Self::parse(&copy).map(|_| copy)
    }

    /// Whether data pages carry checksums.
    pub fn has_checksums(&self) -> bool {
        self.checksum_version != 0
    }
}

/// How many bytes of a layout its checksum covers.
fn content_length(control_version: u32) -> std::result::Result<usize, String> {
    match control_version {
        1300 | 1700 => Ok(288),
        1800 => Ok(292),
        other if matches!(other.swap_bytes(), 1300 | 1700 | 1800) => {
            Err("it was written by a machine of the other byte order".to_owned())
        }
        other => Err(format!("layout {other} is unknown (1300, 1700 and 1800 are known)")),
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, offset: usize) -> std::result::Result<[u8; N], String> {
        let slice = self.0.get(offset..offset + N);
        slice
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| format!("it is too short: {} bytes", self.0.len()))
    }

    fn u32(&self, offset: usize) -> std::result::Result<u32, String> {
        self.bytes(offset).map(u32::from_ne_bytes)
    }

    fn u64(&self, offset: usize) -> std::result::Result<u64, String> {
        self.bytes(offset).map(u64::from_ne_bytes)
    }

    fn bool(&self, offset: usize) -> std::result::Result<bool, String> {
        self.bytes(offset).map(|[byte]| byte != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_control_file_is_refused() {
        assert!(ControlFile::parse(&[]).unwrap_err().contains("too short"));
        assert!(ControlFile::parse(&[0; 8192]).unwrap_err().contains("layout 0"));
        let mut bytes = vec![0; 8192];
        bytes[8..12].copy_from_slice(&1300_u32.to_be_bytes());
        if cfg!(target_endian = "little") {
            assert!(ControlFile::parse(&bytes).unwrap_err().contains("byte order"));
        }
        bytes[8..12].copy_from_slice(&1300_u32.to_ne_bytes());
        assert!(ControlFile::parse(&bytes).unwrap_err().contains("checksum"));
    }
}
