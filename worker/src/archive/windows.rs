//! To which moments a cluster can be recovered, from its repository alone.

use std::collections::BTreeMap;

use proto::job::LostWal;
use proto::wal::SegmentName;
use proto::{BackupFacts, BackupId, ClusterName, Failure, LineageId, Lsn, Timeline, WalFileName};
use repository::{Identity, Repository, WalInventory};
use serde::Serialize;

use super::{Reach, way_to};
use crate::recovering::newest_end;

/// Segments of one window that are looked into for its last transaction; of an idle server the newest ones have none.
const LOOKED_INTO_MAX: usize = 4;

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
    /// Timelines that nobody can recover to from an older one, because their history is missing.
    pub without_history: Vec<Timeline>,
    /// Files of the archive that cannot be read, and why.
    pub damaged: Vec<Damaged>,
    /// Files that came with other content than the archived one, which was kept.
    pub conflicts: Vec<String>,
}

impl Recoverable {
    /// Whether there is nothing that a person should look at.
    pub fn is_whole(&self) -> bool {
        self.windows.iter().all(|window| window.missing.is_none())
            && self.gaps.is_empty()
            && self.without_history.is_empty()
            && self.damaged.is_empty()
            && self.conflicts.is_empty()
    }
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
    /// When the last transaction before that ended, by the server's clock, Unix milliseconds; absent where that is not known
    /// within the last few segments.
    pub to_at_ms: Option<i64>,
    /// The segment that is missing there though there was more, if that is why the window ends.
    pub missing: Option<String>,
    /// The window is the end of a backup that was taken before the server archived anything: there is no gap behind it.
    pub before_archive: bool,
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
    let mut ids = Vec::new();
    for summary in repository.list_readable_backups(identity.lineage).await? {
        if let Some(id) = summary.backup()
            && !repository.is_given_up(identity.lineage, &summary).await?
        {
            ids.push(id);
        }
    }
    let backups = repository.read_facts(identity.lineage, ids).await?;
    let gaps = archive.gaps().into_iter().map(|gap| Gap {
        timeline: gap.timeline,
        from: gap.from,
        to: gap.to,
        segment: first_of(&archive, gap.timeline, gap.from)
            .map(|name| name.to_string())
            .unwrap_or_default(),
    });
    let mut windows = windows(&archive, &backups);
    for window in &mut windows {
        let facts = backups.iter().find(|(id, _)| *id == window.backup).map(|(_, facts)| facts);
        let Some(facts) = facts else { continue };
        window.to_at_ms = last_moment(repository, identity.lineage, &archive, window, facts).await;
    }
    Ok(Recoverable {
        lineage: identity.lineage,
        cluster: identity.cluster,
        windows,
        gaps: gaps.collect(),
        without_history: without_history(&archive, &backups),
        damaged: archive
            .damaged
            .iter()
            .map(|(file, what)| Damaged { file: file.to_string(), what: what.clone() })
            .collect(),
        conflicts: archive.conflicts.iter().map(ToString::to_string).collect(),
    })
}

/// When the last transaction of a window ended. That of a backup alone is its end; what cannot be read is not known.
async fn last_moment(
    repository: &Repository,
    lineage: LineageId,
    archive: &WalInventory,
    window: &Window,
    facts: &BackupFacts,
) -> Option<i64> {
    if window.to <= window.from {
        return Some(window.from_at_ms);
    }
    let way = way_to(archive, window.timeline, facts).ok()?;
    let looked = newest_end(repository, lineage, facts, &way, window.to, LOOKED_INTO_MAX).await;
    match looked {
        Ok(moment) => moment.map(jiff::Timestamp::as_millisecond),
        Err(failure) => {
            tracing::debug!(%failure, "The end of a window cannot be looked into");
            None
        }
    }
}

/// What the archive lacks between the newest backup that was not given up and a segment that it has; `None` where it lacks nothing,
/// where there is no backup, or none leads along the segment's timeline.
pub(crate) async fn lost_before(
    repository: &Repository,
    lineage: LineageId,
    seen: SegmentName,
) -> Result<Option<LostWal>, Failure> {
    let mut newest = None;
    for summary in repository.list_readable_backups(lineage).await?.into_iter().rev() {
        if let Some(id) = summary.backup()
            && !repository.is_given_up(lineage, &summary).await?
        {
            newest = Some(id);
            break;
        }
    }
    let Some(backup) = newest else { return Ok(None) };
    let mut known = repository.read_facts(lineage, vec![backup]).await?;
    let Some((_, facts)) = known.pop() else { return Ok(None) };
    let size = facts.wal_segment_size;
    let archive = repository.list_wal(lineage).await?;
    let Some(seen) = seen.segment(size) else { return Ok(None) };
    let Ok(way) = way_to(&archive, seen.timeline, &facts) else { return Ok(None) };
    let reach = Reach::along(&way, &archive, &facts);
    let between = (reach.missing.number..seen.number).map(|number| way.segment(number));
    let missing: Vec<_> = between.filter(|segment| !archive.has(*segment, size)).collect();
    let (Some(first), Some(last)) = (missing.first(), missing.last()) else { return Ok(None) };
    let recoverable_to_ms = if reach.to > facts.stop_lsn {
        // Only words are lost where that cannot be read.
        let looked = newest_end(repository, lineage, &facts, &way, reach.to, LOOKED_INTO_MAX).await;
        looked.ok().flatten().map(jiff::Timestamp::as_millisecond)
    } else {
        Some(facts.stopped_at_ms)
    };
    let (first, last) = (first.name(size), last.name(size));
    let segments = missing.len() as u64;
    Ok(Some(LostWal { first, last, segments, backup, recoverable_to_ms }))
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
            let (stop, size) = (facts.stop_lsn, facts.wal_segment_size);
            let Ok(way) = way_to(archive, timeline, facts) else { continue };
            let reach = Reach::along(&way, archive, facts);
            let to = reach.to.max(stop);
            let before_archive = is_before_archive(archive, &reach, facts);
            let window = of_timeline.entry(to).or_insert_with(|| Window {
                timeline,
                backup: *id,
                backups: 0,
                from: stop,
                from_at_ms: facts.stopped_at_ms,
                to,
                to_at_ms: None,
                missing: (reach.is_gap && !before_archive).then(|| reach.missing.file_name(size)),
                before_archive,
            });
            window.backups += 1;
            if stop < window.from {
                window.backup = *id;
                window.from = stop;
                window.from_at_ms = facts.stopped_at_ms;
            }
        }
        windows.extend(of_timeline.into_values());
    }
    windows
}

/// Whether the archive begins behind a backup because nothing was archived when that was taken.
fn is_before_archive(archive: &WalInventory, reach: &Reach, facts: &BackupFacts) -> bool {
    let archived_nothing =
        facts.settings.iter().any(|one| one.name == "archive_mode" && one.value == "off");
    let mut firsts = archive.timelines.values().filter_map(|wal| wal.runs.first());
    archived_nothing && reach.is_gap && firsts.all(|run| run.first.number > reach.missing.number)
}

/// Timelines that have files and no history, though something older is there from which a history would lead to them.
fn without_history(archive: &WalInventory, backups: &[(BackupId, BackupFacts)]) -> Vec<Timeline> {
    let is_damaged =
        |timeline| archive.damaged.iter().any(|(file, _)| *file == WalFileName::History(timeline));
    let oldest = archive.timelines.keys().copied();
    let oldest = oldest.chain(backups.iter().map(|(_, facts)| facts.timeline)).min();
    let later = archive.timelines.iter().filter(|(timeline, _)| Some(**timeline) > oldest);
    let lost = later.filter(|(timeline, wal)| wal.history.is_none() && !is_damaged(**timeline));
    lost.map(|(timeline, _)| *timeline).collect()
}

#[cfg(test)]
mod tests {
    use proto::wal::History;

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
            reading: None,
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
    fn a_backup_from_before_the_archive_has_no_gap_behind_it() {
        let (id, mut facts) = backup(1, 1, 2 * MIB);
        let missing = |facts: &BackupFacts, runs: &[u64]| {
            let window = windows(&archive(&[(1, runs, "")]), &[(id, facts.clone())]).remove(0);
            (window.to.0, window.before_archive, window.missing)
        };
        let lost = Some("000000010000000000000002".to_owned());
        assert_eq!(missing(&facts, &[5, 9]), (2 * MIB, false, lost), "it may have been archived");
        let off = postgres_setting("archive_mode", "off");
        facts.settings.push(off);
        assert_eq!(missing(&facts, &[5, 9]), (2 * MIB, true, None));
        let gap = Some("000000010000000000000004".to_owned());
        assert_eq!(missing(&facts, &[2, 3, 5, 9]), (4 * MIB, false, gap), "that is a gap");
    }

    fn postgres_setting(name: &str, value: &str) -> proto::backup::Setting {
        proto::backup::Setting { name: name.to_owned(), value: value.to_owned() }
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
    fn a_timeline_that_goes_back_behind_its_ancestors_beginning_leaves_later_backups_behind() {
        let second = format!("1\t{}\tx\n", Lsn(15 * MIB));
        let third = format!("{second}2\t{}\tx\n", Lsn(11 * MIB + 200));
        let archive =
            archive(&[(1, &[1, 15], ""), (2, &[15, 16], &second), (3, &[11, 16], &third)]);
        let found: Vec<_> = windows(&archive, &[backup(1, 1, 2 * MIB), backup(2, 1, 13 * MIB)])
            .into_iter()
            .map(|window| (window.timeline.0, window.backups, window.to.0 / MIB, window.missing))
            .collect();
        assert_eq!(found, [(1, 2, 16, None), (2, 2, 17, None), (3, 1, 17, None)]);
    }

    /// A primary ends the segment with the backup. A standby cannot, and in its backup nothing stands behind the end.
    #[test]
    fn a_backup_leads_on_over_its_last_segment_when_that_is_whole() {
        let archive = archive(&[(1, &[5, 9], "")]);
        let end = |stop: u64, label: &str| {
            let (id, mut facts) = backup(1, 1, stop);
            facts.backup_label = label.to_owned();
            let window = windows(&archive, &[(id, facts)]).remove(0);
            (window.to.0, window.missing)
        };
        let standby = "BACKUP METHOD: streamed\nBACKUP FROM: standby\n";
        let stop = 4 * MIB + 700;
        assert_eq!(end(stop, "BACKUP FROM: primary\n"), (10 * MIB, None));
        assert_eq!(end(stop, standby), (stop, Some("000000010000000000000004".to_owned())));
        assert_eq!(end(5 * MIB, standby), (10 * MIB, None));
        assert_eq!(end(11 * MIB + 700, standby), (11 * MIB + 700, None));
    }

    #[test]
    fn a_timeline_that_left_in_a_backups_last_segment_needs_its_own_of_it() {
        let history = format!("1\t{}\tx\n", Lsn(4 * MIB + 800));
        let archive = archive(&[(1, &[1, 6], ""), (2, &[5, 9], &history)]);
        let (_, facts) = backup(1, 1, 4 * MIB + 700);
        let way = way_to(&archive, Timeline(2), &facts).unwrap();
        let Reach { to, missing, is_gap } = Reach::along(&way, &archive, &facts);
        assert_eq!((to, missing.timeline, missing.number), (Lsn(4 * MIB), Timeline(2), 4));
        assert!(is_gap);
    }

    #[test]
    fn a_window_ends_at_a_gap_when_a_later_timeline_shows_that_there_was_more() {
        let history = format!("1\t{}\tx\n", Lsn(9 * MIB + 100));
        let archive = archive(&[(1, &[1, 5], ""), (2, &[9, 12], &history)]);
        let found: Vec<_> = windows(&archive, &[backup(1, 1, 2 * MIB)])
            .into_iter()
            .map(|window| (window.timeline.0, window.to.0 / MIB, window.missing))
            .collect();
        let missing = Some("000000010000000000000006".to_owned());
        assert_eq!(found, [(1, 6, missing.clone()), (2, 6, missing)]);
    }

    #[test]
    fn a_history_that_is_missing_is_told_where_something_could_lead_there() {
        let history = format!("1\t{}\tx\n", Lsn(5 * MIB));
        let both = archive(&[(1, &[1, 7], ""), (2, &[5, 9], "")]);
        assert_eq!(without_history(&both, &[]), [Timeline(2)]);
        assert_eq!(without_history(&archive(&[(1, &[1, 7], ""), (2, &[5, 9], &history)]), &[]), []);
        // A cluster that archives since it is on timeline 2.
        let late = archive(&[(2, &[5, 9], "")]);
        assert_eq!(without_history(&late, &[backup(1, 2, 6 * MIB)]), []);
        assert_eq!(without_history(&late, &[backup(1, 1, 2 * MIB)]), [Timeline(2)]);
    }

    #[test]
    fn a_backup_without_any_archive_is_a_window_of_one_moment() {
        let found = windows(&WalInventory::default(), &[backup(1, 1, 2 * MIB)]);
        assert_eq!((found[0].from, found[0].to), (Lsn(2 * MIB), Lsn(2 * MIB)));
    }
}
