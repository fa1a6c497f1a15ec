//! To which moments a cluster can be recovered, from its repository alone.

use std::collections::BTreeMap;

use proto::wal::{History, SegmentName};
use proto::{BackupFacts, BackupId, ClusterName, Failure, LineageId, Lsn, Timeline};
use repository::{Identity, Repository, WalInventory};
use serde::Serialize;

/// What can be recovered of one lineage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Recoverable {
    /// The lineage.
    pub lineage: LineageId,
    /// Its cluster.
    pub cluster: ClusterName,
    /// Stretches of the log, by timeline and position.
    pub windows: Vec<Window>,
    /// WAL that is missing between files that are there.
    pub gaps: Vec<Gap>,
    /// Files of the archive that cannot be read, and why.
    pub damaged: Vec<Damaged>,
    /// Files that came with other content than the archived one, which was kept.
    pub conflicts: Vec<String>,
}

/// An unbroken stretch that begins with a backup: every position in it can be recovered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Window {
    /// The timeline that is followed.
    pub timeline: Timeline,
    /// The oldest backup that leads into it.
    pub backup: BackupId,
    /// How many backups do.
    pub backups: usize,
    /// Where that backup ends: nothing before can be recovered with it.
    pub from: Lsn,
    /// When it ended, Unix milliseconds.
    pub from_at_ms: i64,
    /// Everything before this position can be recovered.
    pub to: Lsn,
    /// The segment that is missing there though later ones are not, if that is why the window ends.
    pub missing: Option<String>,
}

/// WAL that is not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// Of which timeline.
    pub timeline: Timeline,
    /// Recoverable before.
    pub from: Lsn,
    /// And after, from a backup that begins there.
    pub to: Lsn,
    /// The first segment that is missing.
    pub segment: String,
}

/// A file that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damaged {
    /// Its name.
    pub file: String,
    /// What is wrong with it.
    pub what: String,
}

/// Looks at every lineage of a repository, or at those of one cluster.
pub async fn recoverable(
    repository: &Repository,
    cluster: Option<&ClusterName>,
) -> Result<Vec<Recoverable>, Failure> {
    let mut all = Vec::new();
    for identity in repository.list_lineages().await? {
        if identity.kind.is_physical() && cluster.is_none_or(|cluster| identity.cluster == *cluster)
        {
            all.push(of_lineage(repository, identity).await?);
        }
    }
    all.sort_by(|a, b| (&a.cluster, a.lineage).cmp(&(&b.cluster, b.lineage)));
    Ok(all)
}

async fn of_lineage(repository: &Repository, identity: Identity) -> Result<Recoverable, Failure> {
    let archive = repository.list_wal(identity.lineage).await?;
    let mut backups = Vec::new();
    for summary in repository.list_readable_backups(identity.lineage).await? {
        if let Some(id) = summary.backup().filter(|_| !summary.forgotten) {
            let backup = repository.open_backup(identity.lineage, id).await?;
            backups.push((id, backup.facts().clone()));
        }
    }
    let gaps = archive.gaps().into_iter().map(|gap| Gap {
        timeline: gap.timeline,
        from: gap.from,
        to: gap.to,
        segment: first_of(&archive, gap.timeline, gap.from)
            .map(|name| name.to_string())
            .unwrap_or_default(),
    });
    Ok(Recoverable {
        lineage: identity.lineage,
        cluster: identity.cluster,
        windows: windows(&archive, &backups),
        gaps: gaps.collect(),
        damaged: archive
            .damaged
            .iter()
            .map(|(file, what)| Damaged { file: file.to_string(), what: what.clone() })
            .collect(),
        conflicts: archive.conflicts.iter().map(ToString::to_string).collect(),
    })
}

fn first_of(archive: &WalInventory, timeline: Timeline, at: Lsn) -> Option<SegmentName> {
    let size = archive.timelines.get(&timeline)?.segment_size;
    Some(proto::wal::Segment::containing(at, timeline, size).name(size))
}

/// Backups from which replay gets equally far along a timeline lead into one window.
fn windows(archive: &WalInventory, backups: &[(BackupId, BackupFacts)]) -> Vec<Window> {
    let mut timelines: Vec<Timeline> = archive.timelines.keys().copied().collect();
    timelines.extend(backups.iter().map(|(_, facts)| facts.timeline));
    timelines.sort_unstable();
    timelines.dedup();
    let mut windows = Vec::new();
    for timeline in timelines {
        let mut of_timeline: BTreeMap<Lsn, Window> = BTreeMap::new();
        for (id, facts) in backups {
            let Some(history) = way(archive, timeline, facts) else { continue };
            let reach = archive.reach_along(&history, facts.stop_lsn);
            // A backup brings the WAL up to its own end along.
            let (to, missing) = match reach {
                Ok(reach) => (
                    reach.to.max(facts.stop_lsn),
                    reach.is_gap.then(|| reach.missing.file_name(facts.wal_segment_size)),
                ),
                Err(_) => (facts.stop_lsn, None),
            };
            let window = of_timeline.entry(to).or_insert_with(|| Window {
                timeline,
                backup: *id,
                backups: 0,
                from: facts.stop_lsn,
                from_at_ms: facts.stopped_at_ms,
                to,
                missing,
            });
            window.backups += 1;
            if facts.stop_lsn < window.from {
                window.backup = *id;
                window.from = facts.stop_lsn;
                window.from_at_ms = facts.stopped_at_ms;
            }
        }
        windows.extend(of_timeline.into_values());
    }
    windows
}

/// The history along which a backup leads to a timeline, if it does.
fn way(archive: &WalInventory, timeline: Timeline, facts: &BackupFacts) -> Option<History> {
    let known = archive.timelines.get(&timeline).and_then(|wal| wal.history.clone());
    if timeline == facts.timeline {
        return Some(known.unwrap_or(History { timeline, entries: Vec::new() }));
    }
    let history = known?;
    // It was on the way until the next timeline began.
    let entry = history.entries.iter().find(|entry| entry.timeline == facts.timeline)?;
    (facts.stop_lsn <= entry.switched_at).then_some(history)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn facts(timeline: u32, stop: u64) -> BackupFacts {
        BackupFacts {
            logical: None,
            cluster: "orders".parse().unwrap(),
            system_identifier: proto::SystemIdentifier(7),
            server_version_num: 150_018,
            catalog_version: 0,
            block_size: 8192,
            wal_segment_size: 1 << 20,
            data_checksums: true,
            timeline: Timeline(timeline),
            start_lsn: Lsn(stop - 100),
            stop_lsn: Lsn(stop),
            started_at_ms: 0,
            stopped_at_ms: i64::try_from(stop).unwrap(),
            backup_label: String::new(),
            tablespace_map: String::new(),
            tablespaces: Vec::new(),
            settings: Vec::new(),
            census: None,
            bad_pages: Vec::new(),
        }
    }

    fn archive(timelines: &[(u32, &[u64], &str)]) -> WalInventory {
        let mut inventory = WalInventory::default();
        for (timeline, runs, history) in timelines {
            let timeline = Timeline(*timeline);
            let run = |pair: &[u64]| {
                let [first, last] =
                    [pair[0], pair[1]].map(|number| proto::wal::Segment { timeline, number });
                let (from, to) = (first.start(1 << 20), last.end(1 << 20));
                repository::WalRun { first, last, from, to }
            };
            let wal = repository::TimelineWal {
                segment_size: 1 << 20,
                runs: runs.chunks(2).map(run).collect(),
                history: History::parse(timeline, history).ok(),
                ..repository::TimelineWal::default()
            };
            inventory.timelines.insert(timeline, wal);
        }
        inventory
    }

    fn backup(n: u8, timeline: u32, stop: u64) -> (BackupId, BackupFacts) {
        (BackupId::from(proto::AttemptId::mint(1, [n; 10])), facts(timeline, stop))
    }

    #[test]
    fn a_gap_splits_a_window_and_a_backup_behind_it_begins_the_next() {
        let archive = archive(&[(1, &[1, 5, 8, 9], "")]);
        let all = [backup(1, 1, 2 * MIB), backup(2, 1, 3 * MIB + 7), backup(3, 1, 8 * MIB + 1)];
        let found: Vec<_> = windows(&archive, &all)
            .into_iter()
            .map(|window| (window.from.0, window.to.0 / MIB, window.backups, window.missing))
            .collect();
        let missing = Some("000000010000000000000006".to_owned());
        assert_eq!(found, [(2 * MIB, 6, 2, missing), (8 * MIB + 1, 10, 1, None)]);
    }

    #[test]
    fn a_backup_leads_along_its_own_timeline_and_those_that_left_it_later() {
        let history = format!("1\t{}\tx\n", Lsn(5 * MIB + 100));
        let archive = archive(&[(1, &[1, 7], ""), (2, &[5, 9], &history), (3, &[9, 9], "")]);
        let all = [backup(1, 1, 2 * MIB), backup(2, 1, 6 * MIB), backup(3, 3, 9 * MIB + 5)];
        let found: Vec<_> = windows(&archive, &all)
            .into_iter()
            .map(|window| (window.timeline.0, window.backups, window.from.0, window.to.0 / MIB))
            .collect();
        // Nobody knows where timeline 3 came from, and for its own backup nobody needs to.
        let own = (3, 1, 9 * MIB + 5, 10);
        assert_eq!(found, [(1, 2, 2 * MIB, 8), (2, 1, 2 * MIB, 10), own]);
    }

    #[test]
    fn a_backup_without_any_archive_is_a_window_of_one_moment() {
        let found = windows(&WalInventory::default(), &[backup(1, 1, 2 * MIB)]);
        assert_eq!((found[0].from, found[0].to), (Lsn(2 * MIB), Lsn(2 * MIB)));
    }
}
