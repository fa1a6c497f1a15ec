//! Which heartbeats a proof is told of: those that came into the archive, and not too many.
//!
//! One that was once seen to be in the archive is asked for ever after, also when the archive ends before it now: that is what it is
//! there for.

use proto::message::WalStanding;
use proto::{ArchivedHeartbeats, Heartbeat, LineageId, Lsn, Timeline};

use crate::reach::{is_foreign, is_on_the_way};

/// How many a proof is told of at most. Of more it gets every second, third … one: then it is known less finely how far a copy came.
const TOLD_MAX: usize = 128;

/// A heartbeat, and whose archive was seen to have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// It.
    pub heartbeat: Heartbeat,
    /// The lineage of that archive, the first one where there were several.
    pub archived_in: Option<LineageId>,
}

/// Up to where on each timeline an archive has what its server wrote; nothing of one that has what that server did not write.
pub fn reached(wal: &WalStanding) -> Vec<(Timeline, Lsn)> {
    if is_foreign(wal) {
        return Vec::new();
    }
    // The positions of a history may go back, so the lowest of those that follow counts.
    let mut to = wal.archived_to;
    let mut reached = vec![(wal.timeline, to)];
    for ancestor in wal.ancestors.iter().rev() {
        to = to.min(ancestor.left_at);
        reached.push((ancestor.timeline, to));
    }
    reached
}

/// Those of `known`, oldest first, that an archive has, or was seen to have, on the way to where it stands. The newest is always
/// among them. `None` without any: then nothing is asked.
pub fn archived(known: &[Known], wal: &WalStanding) -> Option<ArchivedHeartbeats> {
    let is_archived = |known: &&Known| {
        let Heartbeat { timeline, ended_lsn, .. } = known.heartbeat;
        let was_archived = known.archived_in == Some(wal.lineage);
        (was_archived || ended_lsn <= wal.archived_to) && is_on_the_way(timeline, ended_lsn, wal)
    };
    let archived = known.iter().filter(is_archived).map(|known| &known.heartbeat);
    let archived: Vec<&Heartbeat> = archived.collect();
    if archived.is_empty() || is_foreign(wal) {
        return None;
    }
    let step = archived.len().div_ceil(TOLD_MAX);
    let mut told: Vec<Heartbeat> = archived.into_iter().rev().step_by(step).copied().collect();
    told.reverse();
    Some(ArchivedHeartbeats { lineage: wal.lineage, known: told })
}

#[cfg(test)]
mod tests {
    use proto::message::WalAncestor;
    use proto::{LineageId, Lsn, SystemIdentifier, Timeline};

    use super::*;

    /// The archive is at 900 of timeline 2, which left timeline 1 at 500.
    fn wal() -> WalStanding {
        WalStanding {
            cluster: "orders".parse().unwrap(),
            lineage: LineageId::mint(1, [1; 10]),
            at_ms: 1,
            timeline: Timeline(2),
            ancestors: vec![WalAncestor { timeline: Timeline(1), left_at: Lsn(500) }],
            server_lsn: Lsn(950),
            line_from: Lsn(100),
            archived_to: Lsn(900),
            safe_at_ms: None,
            waiting: None,
            gap: None,
            gaps: Vec::new(),
            conflict: None,
        }
    }

    fn heartbeat(timeline: u32, ended: u64) -> Heartbeat {
        Heartbeat {
            system_identifier: SystemIdentifier(1),
            timeline: Timeline(timeline),
            transaction: ended,
            begun_lsn: Lsn(ended - 1),
            ended_lsn: Lsn(ended),
            begun_at_ms: 1,
            ended_at_ms: 1,
        }
    }

    fn known(heartbeats: &[Heartbeat], archived_in: Option<LineageId>) -> Vec<Known> {
        heartbeats.iter().map(|heartbeat| Known { heartbeat: *heartbeat, archived_in }).collect()
    }

    fn told(heartbeats: &[Heartbeat], wal: &WalStanding) -> Vec<u64> {
        told_of(&known(heartbeats, None), wal)
    }

    fn told_of(known: &[Known], wal: &WalStanding) -> Vec<u64> {
        let archived = archived(known, wal);
        archived.iter().flat_map(|told| &told.known).map(|one| one.transaction).collect()
    }

    #[test]
    fn only_what_the_archive_has_on_the_way_is_expected() {
        let all = [(1, 400), (1, 500), (1, 501), (2, 600), (2, 900), (2, 901), (3, 700)]
            .map(|(t, lsn)| heartbeat(t, lsn));
        assert_eq!(told(&all, &wal()), [400, 500, 600, 900]);
        let foreign = WalStanding { server_lsn: Lsn(800), ..wal() };
        assert_eq!(archived(&known(&all, None), &foreign), None);
        assert_eq!(archived(&known(&all[5..], None), &wal()), None);
    }

    #[test]
    fn what_was_seen_in_the_archive_is_expected_though_the_archive_ends_before_it_now() {
        let all = [(1, 400), (1, 501), (2, 600), (2, 900)].map(|(t, lsn)| heartbeat(t, lsn));
        let lost = WalStanding { archived_to: Lsn(599), ..wal() };
        assert_eq!(told(&all, &lost), [400], "nobody saw the others there");
        let seen = known(&all, Some(wal().lineage));
        assert_eq!(told_of(&seen, &lost), [400, 600, 900]);
        let elsewhere = known(&all, Some(LineageId::mint(1, [2; 10])));
        assert_eq!(told_of(&elsewhere, &lost), [400], "another archive had them");
        let ahead = WalStanding { server_lsn: Lsn(500), ..lost };
        assert_eq!(archived(&seen, &ahead), None, "it has what the server did not write");
    }

    #[test]
    fn an_archive_reaches_on_each_timeline_as_far_as_that_is_on_the_way() {
        let ancestors = [(1, 500), (2, 450), (3, 700)].map(|(timeline, left_at)| WalAncestor {
            timeline: Timeline(timeline),
            left_at: Lsn(left_at),
        });
        let long = WalStanding { timeline: Timeline(4), ancestors: ancestors.to_vec(), ..wal() };
        let found = |wal: &WalStanding| -> Vec<(u32, u64)> {
            reached(wal).iter().map(|(timeline, to)| (timeline.0, to.0)).collect()
        };
        assert_eq!(found(&long), [(4, 900), (3, 700), (2, 450), (1, 450)]);
        let short = WalStanding { archived_to: Lsn(600), ..long };
        assert_eq!(found(&short), [(4, 600), (3, 600), (2, 450), (1, 450)]);
        assert!(found(&WalStanding { server_lsn: Lsn(599), ..short }).is_empty());
    }

    #[test]
    fn of_many_a_sample_is_told_with_the_newest() {
        let known: Vec<Heartbeat> = (100..=899).map(|lsn| heartbeat(2, lsn)).collect();
        let sample = told(&known, &wal());
        assert_eq!((sample.len(), sample.last()), (115, Some(&899)));
        assert_eq!(&sample[..2], [101, 108]);
        let few: Vec<Heartbeat> = (100..228).map(|lsn| heartbeat(2, lsn)).collect();
        assert_eq!(told(&few, &wal()).len(), 128);
    }
}
