//! How long a recovery to the newest moment would take now, by what proofs and restores of the cluster measured. Nothing is
//! assumed: what was not measured is not known.
//!
//! A proof of a backup alone shows how fast files are restored and a server starts. How fast WAL comes out of the archive and is
//! replayed shows only a recovery that went along it; the little WAL that a backup brings along says nothing of that.

use proto::BackupKind;
use proto::message::WalStanding;
use serde::{Deserialize, Serialize};

use crate::reach::{BackupEnd, wal_beyond};

/// What one proof measured, or one restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// Of what: files are restored, a dump is loaded.
    pub kind: BackupKind,
    /// When it ended, Unix milliseconds.
    pub at_ms: i64,
    /// Bytes of files that were restored.
    pub restored_bytes: u64,
    /// In how many milliseconds.
    pub restore_ms: u64,
    /// Milliseconds for the start of the server and until it was open, with the replay of what the backup brought along. `None`
    /// of a restore, which does not measure that.
    pub start_ms: Option<u64>,
    /// What was replayed out of the archive.
    pub replayed: Option<Replayed>,
}

/// WAL that was replayed out of the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replayed {
    /// Bytes from the first position to the last.
    pub bytes: u64,
    /// In how many milliseconds.
    pub duration_ms: u64,
}

/// The backup that a recovery would begin with now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begins {
    /// What it is.
    pub kind: BackupKind,
    /// Bytes that a restore of it writes.
    pub size_bytes: u64,
    /// Where WAL leads on from it; `None` of a dump.
    pub end: Option<BackupEnd>,
}

/// What a recovery would have to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Work {
    /// Bytes that a restore of the newest backup writes.
    size_bytes: u64,
    /// Bytes of WAL that lead on from it.
    wal_bytes: u64,
}

/// How long a recovery would take now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryTime {
    /// Bytes that a restore of the newest backup writes.
    pub size_bytes: u64,
    /// Milliseconds for that.
    pub restore_ms: u64,
    /// Milliseconds until the server is open, apart from the WAL that is archived.
    pub start_ms: u64,
    /// Bytes of archived WAL to replay.
    pub wal_bytes: u64,
    /// Milliseconds for that; absent when no recovery along archived WAL was measured.
    pub replay_ms: Option<u64>,
    /// When the restore was measured, Unix milliseconds.
    pub measured_at_ms: i64,
}

impl RecoveryTime {
    /// What is certain of it, milliseconds: what was not measured counts as nothing.
    pub fn at_least_ms(&self) -> u64 {
        let restored_ms = self.restore_ms.saturating_add(self.start_ms);
        restored_ms.saturating_add(self.replay_ms.unwrap_or(0))
    }

    /// All of it, milliseconds; `None` when a part was not measured.
    pub fn total_ms(&self) -> Option<u64> {
        (self.replay_ms.is_some() || self.wal_bytes == 0).then(|| self.at_least_ms())
    }
}

/// How long a recovery would take now that begins with a backup and goes along the WAL that leads on from it, by what was measured
/// of the cluster. What was measured of the other kind of backup says nothing of this one.
pub fn recovery_time(
    begins: &Begins,
    wal: Option<&WalStanding>,
    measured: &[Measured],
) -> Option<RecoveryTime> {
    let of_kind = measured.iter().filter(|one| one.kind == begins.kind);
    let of_kind: Vec<Measured> = of_kind.copied().collect();
    let (_, start) = newest_start(&of_kind)?;
    let mut wal_bytes = begins.end.map_or(0, |end| wal_beyond(&end, wal));
    // Where the replay was measured apart, the backup's own WAL is not in the time of the start.
    if start.replayed.is_some() {
        wal_bytes += begins.end.map_or(0, |end| end.stop_lsn.0.saturating_sub(end.start_lsn.0));
    }
    put_together(&of_kind, Work { size_bytes: begins.size_bytes, wal_bytes })
}

/// Puts together what was measured: files as fast as they were restored last, the start as it was in the newest proof, and WAL as
/// fast as the recovery that replayed most of it, because a short one is mostly its own beginning. `None` when a restore or a start
/// was not measured.
fn put_together(measured: &[Measured], work: Work) -> Option<RecoveryTime> {
    let restored = measured.iter().filter(|one| one.restored_bytes > 0);
    let newest = restored.max_by_key(|one| one.at_ms)?;
    let (start_ms, _) = newest_start(measured)?;
    let replays = measured.iter().filter_map(|one| Some((one.replayed?, one.at_ms)));
    let most = replays.filter(|(replayed, _)| replayed.bytes > 0);
    let most = most.max_by_key(|(replayed, at_ms)| (replayed.bytes, *at_ms));
    Some(RecoveryTime {
        size_bytes: work.size_bytes,
        restore_ms: scaled(newest.restore_ms, newest.restored_bytes, work.size_bytes),
        start_ms,
        wal_bytes: work.wal_bytes,
        replay_ms: most
            .map(|(replayed, _)| scaled(replayed.duration_ms, replayed.bytes, work.wal_bytes)),
        measured_at_ms: newest.at_ms,
    })
}

/// How long a server took to start when that was measured last, and by whom.
fn newest_start(measured: &[Measured]) -> Option<(u64, &Measured)> {
    let starts = measured.iter().filter_map(|one| Some((one.start_ms?, one)));
    starts.max_by_key(|(_, one)| one.at_ms)
}

/// What took `ms` for `measured` bytes, for `bytes`. What took less than a millisecond counts as one.
fn scaled(ms: u64, measured: u64, bytes: u64) -> u64 {
    let scaled = u128::from(ms.max(1)) * u128::from(bytes) / u128::from(measured.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A restore of 1 GiB in 10 s.
    fn measured(at_ms: i64) -> Measured {
        Measured {
            kind: BackupKind::Physical,
            at_ms,
            restored_bytes: GIB,
            restore_ms: 10_000,
            start_ms: Some(2_000),
            replayed: None,
        }
    }

    fn replayed(bytes: u64, duration_ms: u64) -> Replayed {
        Replayed { bytes, duration_ms }
    }

    fn time(measured: &[Measured], size_bytes: u64, wal_bytes: u64) -> Option<RecoveryTime> {
        put_together(measured, Work { size_bytes, wal_bytes })
    }

    #[test]
    fn nothing_is_known_before_it_is_measured() {
        assert_eq!(time(&[], GIB, 0), None);
        let looked = Measured { restored_bytes: 0, ..measured(1) };
        assert_eq!(time(&[looked], GIB, 0), None, "it only looked at objects");
        let time = time(&[measured(1)], GIB, 1).unwrap();
        assert_eq!((time.total_ms(), time.at_least_ms()), (None, 12_000), "one byte of WAL");
    }

    #[test]
    fn files_are_restored_as_fast_as_they_were_last() {
        let total = |measured: &[Measured], size| time(measured, size, 0).unwrap().total_ms();
        assert_eq!(total(&[measured(1)], GIB), Some(12_000));
        assert_eq!(total(&[measured(1)], 3 * GIB), Some(32_000));
        assert_eq!(total(&[measured(1)], 0), Some(2_000));
        let slow = Measured { restore_ms: 40_000, ..measured(2) };
        assert_eq!(total(&[slow, measured(1)], GIB), Some(42_000));
        assert_eq!(total(&[slow, measured(3)], GIB), Some(12_000));
        let quick = Measured { restore_ms: 0, restored_bytes: 1, ..measured(1) };
        assert_eq!(total(&[quick], 5), Some(2_005), "no clock shows less than a millisecond");
        let huge = Measured { restore_ms: u64::MAX, restored_bytes: 1, ..measured(1) };
        assert_eq!(total(&[huge], u64::MAX), Some(u64::MAX));
    }

    #[test]
    fn wal_is_replayed_as_fast_as_where_most_of_it_was() {
        let short = Measured { replayed: Some(replayed(1_000, 500)), ..measured(9) };
        let long = Measured { replayed: Some(replayed(GIB, 60_000)), ..measured(1) };
        let found = time(&[short, long], GIB, 2 * GIB).unwrap();
        assert_eq!(found.replay_ms, Some(120_000));
        assert_eq!(found.total_ms(), Some(132_000));
        let found = time(&[short], GIB, 10_000).unwrap();
        assert_eq!(found.replay_ms, Some(5_000), "better than nothing");
        let none = Measured { replayed: Some(replayed(0, 500)), ..measured(9) };
        assert_eq!(time(&[none], GIB, 10_000).unwrap().replay_ms, None);
    }

    #[test]
    fn a_restore_measures_files_and_a_proof_the_start() {
        let restore = |at_ms| Measured { restore_ms: 40_000, start_ms: None, ..measured(at_ms) };
        assert_eq!(time(&[restore(1)], GIB, 0), None, "nobody knows how long it takes to start");
        let found = |measured: &[Measured]| {
            let found = time(measured, GIB, 0).unwrap();
            (found.total_ms(), found.measured_at_ms)
        };
        assert_eq!(found(&[measured(1), restore(2)]), (Some(42_000), 2));
        assert_eq!(found(&[restore(1), measured(2)]), (Some(12_000), 2));
    }

    #[test]
    fn what_one_kind_of_backup_takes_says_nothing_of_the_other() {
        let begins = |kind| Begins { kind, size_bytes: GIB, end: None };
        let dump = Measured { kind: BackupKind::Logical, restore_ms: 90_000, ..measured(9) };
        let total = |kind, measured: &[Measured]| {
            recovery_time(&begins(kind), None, measured).and_then(|time| time.total_ms())
        };
        let both = [measured(1), dump];
        assert_eq!(total(BackupKind::Physical, &both), Some(12_000), "though the dump is newer");
        assert_eq!(total(BackupKind::Logical, &both), Some(92_000));
        assert_eq!(total(BackupKind::Physical, &[dump]), None, "that was not measured");
    }

    #[test]
    fn where_replay_was_measured_apart_the_backups_own_wal_is_replayed_too() {
        let end = BackupEnd {
            lineage: proto::LineageId::mint(1, [1; 10]),
            timeline: proto::Timeline(1),
            start_lsn: proto::Lsn(1_000),
            stop_lsn: proto::Lsn(3_000),
            wal_to: proto::Lsn(3_000),
            stopped_at_ms: 1,
        };
        let begins = Begins { kind: BackupKind::Physical, size_bytes: GIB, end: Some(end) };
        let wal_bytes = |measured: &[Measured]| {
            recovery_time(&begins, None, measured).map(|time| time.wal_bytes)
        };
        let along = Measured { replayed: Some(replayed(GIB, 60_000)), ..measured(1) };
        assert_eq!(wal_bytes(&[along]), Some(2_000));
        assert_eq!(wal_bytes(&[along, measured(2)]), Some(0), "it is in the time of the start");
        let restore = Measured { start_ms: None, ..measured(2) };
        assert_eq!(wal_bytes(&[along, restore]), Some(2_000), "a restore measured no start");
    }
}
