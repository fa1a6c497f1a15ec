//! Up to when a cluster can be recovered: what a disaster now would cost.

use proto::message::WalStanding;
use proto::{LineageId, Lsn, Timeline};

use crate::words::{count, span};

/// Where a backup of a cluster ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupEnd {
    /// The lineage it belongs to.
    pub lineage: LineageId,
    /// The timeline it was taken on.
    pub timeline: Timeline,
    /// Where its WAL begins.
    pub start_lsn: Lsn,
    /// Where recovery must get to.
    pub stop_lsn: Lsn,
    /// Where the WAL ends that it brought along, there or later.
    pub wal_to: Lsn,
    /// What a restore of it alone brings back, Unix milliseconds.
    pub stopped_at_ms: i64,
}

/// Whether the archive's line leads on from the end of a backup.
pub fn leads_on(backup: &BackupEnd, wal: &WalStanding) -> bool {
    let begins_before = wal.line_from <= backup.wal_to && backup.stop_lsn <= wal.archived_to;
    begins_before && is_on_way(backup, wal)
}

/// Whether the end of a backup lies on the way to where a server is, as far as its archive tells, whatever of it is archived.
pub fn is_on_way(backup: &BackupEnd, wal: &WalStanding) -> bool {
    wal.lineage == backup.lineage && is_on_the_way(backup.timeline, backup.stop_lsn, wal)
}

/// Whether the server's timeline is this one, or left it behind a position of it. The positions of a history may go back, so
/// the lowest of those that follow counts.
pub(crate) fn is_on_the_way(timeline: Timeline, lsn: Lsn, wal: &WalStanding) -> bool {
    if timeline == wal.timeline {
        return true;
    }
    let later = wal.ancestors.iter().skip_while(|ancestor| ancestor.timeline != timeline);
    later.map(|ancestor| ancestor.left_at).min().is_some_and(|left| left >= lsn)
}

/// Whether the archive has WAL that the server cannot have written, so that nothing of it counts as the server's.
pub fn is_foreign(wal: &WalStanding) -> bool {
    wal.archived_to > wal.server_lsn
}

/// Whether a backup ends where the archive, on the way to it, has not come yet.
pub(crate) fn is_ahead(backup: &BackupEnd, wal: &WalStanding) -> bool {
    backup.stop_lsn > wal.archived_to && !is_foreign(wal) && !is_left_behind(backup, wal)
}

/// The moment up to which everything that was committed can be recovered from a backup, Unix milliseconds.
pub fn recovery_point(backup: &BackupEnd, wal: Option<&WalStanding>) -> i64 {
    let by_wal = wal.filter(|wal| leads_on(backup, wal) && !is_foreign(wal));
    let safe = by_wal.and_then(|wal| wal.safe_at_ms);
    safe.map_or(backup.stopped_at_ms, |safe| safe.max(backup.stopped_at_ms))
}

/// Bytes of archived WAL that a recovery from a backup to the newest moment replays, besides what the backup brought along.
pub fn wal_beyond(backup: &BackupEnd, wal: Option<&WalStanding>) -> u64 {
    let leading = wal.filter(|wal| leads_on(backup, wal) && !is_foreign(wal));
    leading.map_or(0, |wal| wal.archived_to.0.saturating_sub(backup.stop_lsn.0))
}

/// Whether only another backup can lead to where a server is: nothing that its archive gets from now on can be replayed onto
/// this one.
pub fn needs_backup(backup: &BackupEnd, wal: &WalStanding) -> bool {
    !is_foreign(wal) && is_left_behind(backup, wal)
}

/// What is wrong with an archive, as a sentence without a period; `None` when all is well. `patience_ms` is how long a full
/// segment may take to arrive.
pub fn archive_trouble(
    backup: Option<&BackupEnd>,
    wal: &WalStanding,
    patience_ms: i64,
    now_ms: i64,
) -> Option<String> {
    if is_foreign(wal) {
        return Some(format!(
            "its archive has WAL up to {} that this server, at {}, did not write: another server archives as {}, or this one was set back",
            wal.archived_to, wal.server_lsn, wal.cluster
        ));
    }
    if let Some(conflict) = wal.conflict
        && conflict.is_foreign
    {
        return Some(format!(
            "another server archives under its name: segment {} differs, so this one's is refused and nothing from there on counts",
            conflict.segment
        ));
    }
    if let Some(waiting) = wal.waiting
        && wal.at_ms.saturating_sub(waiting.since_ms) >= patience_ms
    {
        let since = span(now_ms.saturating_sub(waiting.since_ms));
        return Some(format!(
            "its WAL does not reach the archive: {} {} since {since}, beginning with {}",
            count(waiting.segments, "full segment"),
            if waiting.segments == 1 { "is missing" } else { "are missing" },
            waiting.segment
        ));
    }
    let Some(backup) = backup else { return refused_another(wal, Lsn(0)) };
    // Behind a gap only a later backup leads on.
    if let Some(gap) = wal.gap
        && backup.lineage == wal.lineage
        && backup.wal_to < wal.line_from
    {
        return Some(format!(
            "WAL segment {gap} is missing in its archive, so its newest backup does not lead beyond it: take another backup"
        ));
    }
    if is_left_behind(backup, wal) {
        let what =
            "its newest backup does not lead to where the server is now: take another backup";
        return Some(what.to_owned());
    }
    refused_another(wal, backup.start_lsn)
}

/// That another server was refused: no harm was done, and yet it is there. Before `from` nothing is needed any more.
fn refused_another(wal: &WalStanding, from: Lsn) -> Option<String> {
    let conflict = wal.conflict.filter(|conflict| conflict.at >= from)?;
    Some(format!(
        "another server archives under its name: segment {} differs, and was refused; the archive has this server's",
        conflict.segment
    ))
}

/// Whether what is archived can never be replayed onto a backup. One that the archive has not reached yet is not left behind.
fn is_left_behind(backup: &BackupEnd, wal: &WalStanding) -> bool {
    if backup.lineage != wal.lineage {
        return true;
    }
    let is_off_the_way = wal.timeline > backup.timeline
        && !wal.ancestors.is_empty()
        && !is_on_the_way(backup.timeline, backup.stop_lsn, wal);
    is_off_the_way || (wal.archived_to > backup.stop_lsn && !leads_on(backup, wal))
}

/// That nobody has looked at an archive for longer than `silence_max_ms`, as a sentence without a period. Nobody could before
/// `contact_since_ms`, when the contact with a worker of the cluster began that lasts since.
pub fn archive_silence(
    wal: &WalStanding,
    contact_since_ms: Option<i64>,
    silence_max_ms: i64,
    now_ms: i64,
) -> Option<String> {
    let since_ms = contact_since_ms.map_or(wal.at_ms, |since_ms| since_ms.max(wal.at_ms));
    (now_ms.saturating_sub(since_ms) > silence_max_ms).then(|| {
        format!(
            "nothing has been seen of its archive for {}: it archives nothing any more, or its worker's log says why",
            span(now_ms.saturating_sub(wal.at_ms))
        )
    })
}

#[cfg(test)]
mod tests {
    use proto::message::{WalAncestor, WalConflict, WalWaiting};

    use super::*;

    fn lineage(n: u8) -> LineageId {
        LineageId::mint(1, [n; 10])
    }

    fn backup(stop: u64) -> BackupEnd {
        BackupEnd {
            lineage: lineage(1),
            timeline: Timeline(1),
            start_lsn: Lsn(stop.saturating_sub(10)),
            stop_lsn: Lsn(stop),
            wal_to: Lsn(stop),
            stopped_at_ms: 1_000,
        }
    }

    #[test]
    fn an_archive_leads_on_from_the_wal_that_a_backup_brought_along() {
        // Archiving was switched on when the backup's last segment had been written.
        let late = WalStanding { line_from: Lsn(512), ..wal() };
        assert!(!leads_on(&backup(500), &late) && needs_backup(&backup(500), &late));
        let whole = BackupEnd { wal_to: Lsn(512), ..backup(500) };
        assert!(leads_on(&whole, &late) && !needs_backup(&whole, &late));
        assert_eq!(archive_trouble(Some(&whole), &late, 60_000, 160_000), None);
    }

    fn wal() -> WalStanding {
        WalStanding {
            cluster: "orders".parse().unwrap(),
            lineage: lineage(1),
            at_ms: 100_000,
            timeline: Timeline(1),
            ancestors: Vec::new(),
            server_lsn: Lsn(950),
            line_from: Lsn(100),
            archived_to: Lsn(900),
            safe_at_ms: Some(90_000),
            waiting: None,
            gap: None,
            gaps: Vec::new(),
            conflict: None,
        }
    }

    #[test]
    fn wal_counts_only_where_it_leads_on_from_the_backup() {
        let point = |backup: BackupEnd, change: fn(&mut WalStanding)| {
            let mut wal = wal();
            change(&mut wal);
            recovery_point(&backup, Some(&wal))
        };
        assert_eq!(point(backup(100), |_| {}), 90_000);
        assert_eq!(point(backup(900), |_| {}), 90_000);
        assert_eq!(point(backup(99), |_| {}), 1_000, "behind a gap");
        assert_eq!(point(backup(901), |_| {}), 1_000, "the archive is not so far");
        assert_eq!(point(backup(500), |wal| wal.safe_at_ms = None), 1_000);
        assert_eq!(point(backup(500), |wal| wal.safe_at_ms = Some(5)), 1_000);
        assert_eq!(point(backup(500), |wal| wal.lineage = lineage(2)), 1_000, "another history");
        assert_eq!(point(backup(500), |wal| wal.server_lsn = Lsn(899)), 1_000, "not its own");
        assert_eq!(recovery_point(&backup(500), None), 1_000);
    }

    #[test]
    fn only_wal_that_leads_on_is_to_be_replayed() {
        assert_eq!(wal_beyond(&backup(500), Some(&wal())), 400);
        assert_eq!(wal_beyond(&backup(99), Some(&wal())), 0, "behind a gap");
        assert_eq!(wal_beyond(&backup(901), Some(&wal())), 0, "the archive is not so far");
        assert_eq!(wal_beyond(&backup(500), None), 0);
    }

    #[test]
    fn a_promotion_before_the_end_of_the_backup_leaves_it_behind() {
        let point = |stop: u64, ancestors: &[(u32, u64)]| {
            let ancestors = ancestors.iter().map(|(timeline, left_at)| WalAncestor {
                timeline: Timeline(*timeline),
                left_at: Lsn(*left_at),
            });
            let wal =
                WalStanding { timeline: Timeline(3), ancestors: ancestors.collect(), ..wal() };
            recovery_point(&backup(stop), Some(&wal))
        };
        assert_eq!(point(500, &[(1, 600), (2, 700)]), 90_000);
        assert_eq!(point(500, &[(1, 499), (2, 700)]), 1_000);
        assert_eq!(point(500, &[(1, 600), (2, 400)]), 1_000, "positions that go back");
        assert_eq!(point(500, &[]), 1_000, "nobody knows where the timeline came from");
    }

    #[test]
    fn trouble_is_told_with_what_to_do() {
        let segment = "000000010000000000000003".parse().unwrap();
        let late = WalStanding {
            waiting: Some(WalWaiting { segment, since_ms: 40_000, segments: 2 }),
            ..wal()
        };
        let told = |wal: &WalStanding, patience| {
            archive_trouble(Some(&backup(500)), wal, patience, 160_000)
        };
        assert_eq!(
            told(&late, 60_000).unwrap(),
            "its WAL does not reach the archive: 2 full segments are missing since 2 min, beginning with 000000010000000000000003"
        );
        assert_eq!(told(&late, 60_001), None, "it may still be on its way");
        let gap = WalStanding { line_from: Lsn(501), gap: Some(segment), ..wal() };
        assert!(told(&gap, 60_000).unwrap().contains("take another backup"));
        assert_eq!(
            archive_trouble(Some(&backup(501)), &gap, 60_000, 0),
            None,
            "a later backup leads on"
        );
        assert_eq!(archive_trouble(None, &gap, 60_000, 0), None);
        assert_eq!(told(&wal(), 0), None);
    }

    #[test]
    fn wal_that_the_server_did_not_write_is_told() {
        let ahead = WalStanding { server_lsn: Lsn(899), ..wal() };
        let told = archive_trouble(Some(&backup(500)), &ahead, 60_000, 160_000).unwrap();
        assert!(
            told.contains("WAL up to 0/384 that this server, at 0/383, did not write"),
            "{told}"
        );
        let even = WalStanding { server_lsn: Lsn(900), ..wal() };
        assert_eq!(archive_trouble(Some(&backup(500)), &even, 60_000, 160_000), None);
    }

    #[test]
    fn another_server_under_the_same_name_is_told_whoever_was_first() {
        let conflict = |is_foreign| {
            let segment = "000000010000000000000003".parse().unwrap();
            Some(WalConflict { segment, at: Lsn(700), is_foreign })
        };
        let told = |backup: Option<&BackupEnd>, is_foreign| {
            let wal = WalStanding { conflict: conflict(is_foreign), ..wal() };
            archive_trouble(backup, &wal, 60_000, 160_000)
        };
        let begins =
            "another server archives under its name: segment 000000010000000000000003 differs";
        for backup in [None, Some(&backup(500)), Some(&backup(900))] {
            let told = told(backup, true).unwrap();
            assert!(told.starts_with(begins) && told.contains("nothing from there on"), "{told}");
        }
        for backup in [None, Some(&backup(500)), Some(&backup(710))] {
            let told = told(backup, false).unwrap();
            assert!(told.starts_with(begins) && told.contains("was refused"), "{told}");
        }
        assert_eq!(told(Some(&backup(711)), false), None, "a backup that begins behind it");
    }

    #[test]
    fn a_backup_that_leads_to_nowhere_is_told() {
        let left = |backup: &BackupEnd, change: &dyn Fn(&mut WalStanding)| {
            let mut wal = wal();
            change(&mut wal);
            let told = archive_trouble(Some(backup), &wal, 60_000, 160_000);
            told.is_some_and(|told| told.contains("does not lead to where the server is now"))
        };
        let promoted = |wal: &mut WalStanding, left_at: u64| {
            wal.timeline = Timeline(2);
            wal.ancestors = vec![WalAncestor { timeline: Timeline(1), left_at: Lsn(left_at) }];
        };
        assert!(left(&backup(99), &|_| {}), "archiving began behind it");
        assert!(left(&backup(500), &|wal| wal.lineage = lineage(2)), "another history");
        assert!(left(&backup(500), &|wal| wal.timeline = Timeline(2)), "history unknown");
        assert!(left(&backup(500), &|wal| promoted(wal, 499)), "an abandoned branch");
        assert!(left(&backup(950), &|wal| promoted(wal, 499)), "before the archive is so far");
        assert!(!left(&backup(500), &|wal| promoted(wal, 500)));
        assert!(!left(&backup(901), &|_| {}), "the archive is not so far yet");
        assert!(!left(&backup(901), &|wal| wal.timeline = Timeline(2)), "the same");
        let later = BackupEnd { timeline: Timeline(2), ..backup(901) };
        assert!(!left(&later, &|_| {}), "taken after a promotion that nobody saw yet");
        assert_eq!(archive_trouble(None, &wal(), 60_000, 160_000), None);
    }

    #[test]
    fn silence_counts_while_somebody_could_speak() {
        let silent =
            |contact_since_ms, now_ms| archive_silence(&wal(), contact_since_ms, 120_000, now_ms);
        assert_eq!(silent(Some(0), 220_000), None);
        assert!(silent(Some(0), 280_001).unwrap().contains("its archive for 3 min"));
        assert!(silent(None, 220_001).is_some());
        assert_eq!(silent(Some(270_000), 280_001), None, "the worker has just come back");
    }
}
