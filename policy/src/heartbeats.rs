//! Which heartbeats a proof is told of: those that came into the archive, and not too many.

use proto::message::WalStanding;
use proto::{ArchivedHeartbeats, Heartbeat};

use crate::reach::{is_foreign, is_on_the_way};

/// How many a proof is told of at most. Of more it gets every second, third … one: then it is known less finely how far a copy came.
const TOLD_MAX: usize = 128;

/// Those of `known`, oldest first, that an archive has on the way to where it stands. The newest is always among them. `None`
/// without any: then nothing is asked.
pub fn archived(known: &[Heartbeat], wal: &WalStanding) -> Option<ArchivedHeartbeats> {
    let is_archived = |heartbeat: &&Heartbeat| {
        heartbeat.ended_lsn <= wal.archived_to
            && is_on_the_way(heartbeat.timeline, heartbeat.ended_lsn, wal)
    };
    let archived: Vec<&Heartbeat> = known.iter().filter(is_archived).collect();
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

    fn told(known: &[Heartbeat], wal: &WalStanding) -> Vec<u64> {
        let archived = archived(known, wal);
        archived.iter().flat_map(|told| &told.known).map(|one| one.transaction).collect()
    }

    #[test]
    fn only_what_the_archive_has_on_the_way_is_expected() {
        let known = [(1, 400), (1, 500), (1, 501), (2, 600), (2, 900), (2, 901), (3, 700)]
            .map(|(t, lsn)| heartbeat(t, lsn));
        assert_eq!(told(&known, &wal()), [400, 500, 600, 900]);
        let foreign = WalStanding { server_lsn: Lsn(800), ..wal() };
        assert_eq!(archived(&known, &foreign), None);
        assert_eq!(archived(&known[5..], &wal()), None);
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
