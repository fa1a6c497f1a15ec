//! Recovery to a moment: which backup, along which WAL, and whether that leads there. Needs a repository and nothing else.
//!
//! Everything is found out before a byte is written: the backup is the newest that was complete before the moment and from
//! which WAL leads there without a gap, on the timeline that was asked for; one that took pages of the server which were wrong
//! gives way to an older one. A moment that cannot be reached is refused with the
//! nearest one that can, and one that two timelines have is asked about. What is planned here is what [`crate::restoring`] then does.

mod branches;
mod place;
mod search;
mod start;
#[cfg(test)]
mod tests;
mod words;

use std::path::PathBuf;

use jiff::Timestamp;
use postgres::recovery::{Expected, RecoverySettings, Way};
use postgres::wal_moments::Moment;
use proto::job::RecoveryOutcome;
use proto::wal::Segment;
use proto::{
    Action, BackupFacts, BackupId, BackupKind, ClusterName, Code, Failure, LineageId, Lsn,
    Recovery, RecoveryTarget, SystemIdentifier, Timeline,
};
use repository::{AttemptSummary, Pin, Pinned, Repository, WalInventory};

use self::branches::{Branch, question, readable};
use self::search::{Found, Search};
pub use self::start::Starter;
pub use self::words::{FetchFrom, Fetching};
use crate::archive::{self, NoWay, Reach, Until};
use crate::restoring::{self, Located};

/// A recovery that was found possible, as far as anybody can know before it is done.
#[derive(Debug)]
pub struct RecoveryPlan {
    /// What is written for the server.
    pub settings: RecoverySettings,
    /// What the server must come to.
    pub expected: Expected,
    /// What is known, for whoever asked.
    pub outcome: RecoveryOutcome,
    /// The same in sentences.
    pub lines: Vec<String>,
    /// What other timelines wrote, or newer backups hold, that is not taken, and that nothing is archived: a sentence each. They are
    /// among the lines.
    pub not_taken: Vec<String>,
    /// Somebody looked whether WAL passes the target, and it does; else only the server can tell.
    pub(crate) is_found: bool,
    /// Where the target is met at the latest, as far as is known.
    pub(crate) met_by: Lsn,
    /// The way that was planned.
    pub(crate) way: Way,
    /// The server is to be started.
    pub starts: bool,
}

/// What somebody wants.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Whose backup; needed only where the repository holds several clusters.
    pub cluster: Option<&'a ClusterName>,
    /// The cluster's system identifier, where it is known.
    pub system_identifier: Option<SystemIdentifier>,
    /// The backup to begin with; otherwise the right one is found.
    pub backup: Option<BackupId>,
    /// It is a rehearsal: archived WAL that is damaged is left for its server to meet.
    pub rehearses: bool,
    /// How far.
    pub recovery: &'a Recovery,
}

/// A backup and the WAL that follows it.
struct Candidate {
    id: BackupId,
    facts: BackupFacts,
    way: Way,
}

/// Where a target was found.
#[derive(Debug)]
struct Aim {
    /// The target as the server is told.
    target: RecoveryTarget,
    /// What it must have replayed.
    at_least: Lsn,
    /// Where it is met at the latest.
    met_by: Lsn,
    /// Whether it was looked for, and found.
    is_found: bool,
    /// Nothing behind this will be replayed, where that is known.
    until: Option<Until>,
    /// Where replay stops, where that is known.
    stops_at: Option<Lsn>,
    /// Sentences about it.
    notes: Vec<String>,
}

/// Finds the backup to begin with and proves, as far as that is possible, that WAL leads to the target. The backup is pinned:
/// no collection of garbage takes it away until it is released.
pub async fn plan(
    repository: &Repository,
    wanted: Wanted<'_>,
    fetching: &Fetching,
    pin: &Pin,
) -> Result<(Pinned, RecoveryPlan), Failure> {
    let Wanted { cluster, system_identifier, backup: wanted, rehearses, recovery } = wanted;
    recovery.check().map_err(|what| {
        Failure::new(Code::RequestInvalid, Action::FixConfig, what)
            .with_hint("pgmuster help restore says what goes with what.")
    })?;
    let located =
        restoring::locate(repository, BackupKind::Physical, cluster, system_identifier, wanted)
            .await?;
    let lineage = located.lineage;
    let archive = repository.list_wal(lineage).await?;
    let planner = Planner { repository, lineage, archive, rehearses, recovery };
    let (id, plan) = planner.plan(located, wanted.is_some(), fetching).await?;
    // Read once more: only what is read after the pin is safe.
    let pinned = repository.open_pinned(lineage, id, pin).await?;
    Ok((pinned, plan))
}

/// Where a recovery can end that begins with one backup.
pub(crate) struct Range {
    pub(crate) backup: BackupId,
    /// The timeline that it goes along.
    pub(crate) timeline: Timeline,
    /// The end of the backup.
    pub(crate) from: Lsn,
    /// The last record to which an unbroken line of WAL leads from there.
    pub(crate) last: Lsn,
}

/// Between which positions a recovery can end that begins with the newest backup, or with the one that is named.
pub(crate) async fn range(repository: &Repository, wanted: Wanted<'_>) -> Result<Range, Failure> {
    let Wanted { cluster, system_identifier, backup, rehearses, recovery } = wanted;
    let located =
        restoring::locate(repository, BackupKind::Physical, cluster, system_identifier, backup)
            .await?;
    let lineage = located.lineage;
    let archive = repository.list_wal(lineage).await?;
    let planner = Planner { repository, lineage, archive, rehearses, recovery };
    let (id, facts) = planner.facts_of(located.backup).await?;
    let way = match archive::way_to(&planner.archive, planner.timeline(&facts), &facts) {
        Ok(way) => way,
        Err(why) => return Err(*planner.no_way(id, &facts, &why).failure),
    };
    let reach = Reach::along(&way, &planner.archive, &facts);
    let mut search = Search::new(repository, lineage, &facts).rehearsing(rehearses);
    let last = search.last_record(&way, reach.to).await?;
    // Of a last segment that is damaged any position may be chosen.
    let size = way.segment_size();
    let newest = Segment::ending_at(reach.to, way.timeline(), size).number;
    let is_unread = last.is_none() && rehearses && planner.archive.has(way.segment(newest), size);
    let last = last.or_else(|| is_unread.then(|| Lsn(reach.to.0.saturating_sub(1))));
    match last.filter(|last| *last > facts.stop_lsn) {
        Some(last) => {
            Ok(Range { backup: id, timeline: way.timeline(), from: facts.stop_lsn, last })
        }
        None => Err(unreachable(format!(
            "no archived WAL leads on from backup {id}, which ended at {}",
            facts.stop_lsn
        ))
        .with_hint("Prove the backup alone, without --to, or see that its cluster archives.")),
    }
}

/// When the last transaction between the end of a backup and a position of its way ended, if the last `segments_max` segments
/// before that position say it.
pub(crate) async fn newest_end(
    repository: &Repository,
    lineage: LineageId,
    facts: &BackupFacts,
    way: &Way,
    to: Lsn,
    segments_max: usize,
) -> Result<Option<Timestamp>, Failure> {
    let mut search = Search::new(repository, lineage, facts).within(segments_max);
    let newest = search.newest_end(way, facts.stop_lsn, to).await?;
    Ok(newest.map(|moment| moment.at))
}

/// The last end of a transaction between two positions of a way, if the last `segments_max` segments before the second one say it.
pub(crate) async fn last_end(
    repository: &Repository,
    lineage: LineageId,
    major: u32,
    way: &Way,
    (from, to): (Lsn, Lsn),
    segments_max: usize,
) -> Result<Option<Moment>, Failure> {
    let mut search = Search::of_version(repository, lineage, major).within(segments_max);
    search.newest_end(way, from, to).await
}

struct Planner<'a> {
    repository: &'a Repository,
    lineage: LineageId,
    archive: WalInventory,
    rehearses: bool,
    recovery: &'a Recovery,
}

impl Planner<'_> {
    async fn plan(
        &self,
        located: Located,
        is_named: bool,
        fetching: &Fetching,
    ) -> Result<(BackupId, RecoveryPlan), Failure> {
        let Located { backup: newest, mut older, .. } = located;
        let newest = self.facts_of(newest).await?;
        let timeline = self.timeline(&newest.1);
        let mut search =
            Search::new(self.repository, self.lineage, &newest.1).rehearsing(self.rehearses);
        let (mut next, mut refusals) = (Some(newest), Vec::new());
        while let Some((id, facts)) = next {
            // Whoever names a backup, proves one or asks for no more than its end wants this one.
            let is_meant =
                is_named || self.rehearses || self.recovery.to == RecoveryTarget::Immediate;
            let is_damaged = !(facts.bad_pages.is_empty() || is_meant);
            let is_first = refusals.is_empty();
            match self.plan_from(id, facts, timeline, &mut search, fetching, is_first).await? {
                Ok(plan) if is_damaged => {
                    let undamaged = self.undamaged(older, timeline, &mut search, fetching).await;
                    return Ok(around_damage((id, plan), readable(undamaged)?.flatten()));
                }
                Ok(plan) => return Ok((id, plan)),
                // An older backup cannot help against what is missing behind a newer one.
                Err(Refusal { is_final: true, failure }) => return Err(*failure),
                Err(refusal) => refusals.push(refusal),
            }
            next = self.newest_of(&mut older).await?;
        }
        // The refusal that is about the newest backup says most.
        let failure = refusals.into_iter().next().map(|refusal| *refusal.failure);
        let failure = failure.unwrap_or_else(|| Failure::bug("a recovery without any backup"));
        if !is_named {
            return Err(failure);
        }
        let hint = format!("{} Or leave --backup away: then the right one is found.", failure.hint);
        Err(failure.with_hint(hint))
    }

    /// What begins with the newest of these backups that leads there and took no wrong page of the server.
    async fn undamaged(
        &self,
        mut older: Vec<AttemptSummary>,
        timeline: Timeline,
        search: &mut Search<'_>,
        fetching: &Fetching,
    ) -> Result<Option<(BackupId, RecoveryPlan)>, Failure> {
        while let Some((id, facts)) = self.newest_of(&mut older).await? {
            if facts.bad_pages.is_empty()
                && let Ok(plan) =
                    self.plan_from(id, facts, timeline, search, fetching, false).await?
            {
                return Ok(Some((id, plan)));
            }
        }
        Ok(None)
    }

    async fn facts_of(&self, id: BackupId) -> Result<(BackupId, BackupFacts), Failure> {
        let backup = self.repository.open_backup(self.lineage, id).await?;
        Ok((id, backup.facts().clone()))
    }

    /// Takes the newest backup off these that nobody gave up. Each is looked at only when no newer one does.
    async fn newest_of(
        &self,
        older: &mut Vec<AttemptSummary>,
    ) -> Result<Option<(BackupId, BackupFacts)>, Failure> {
        while let Some(summary) = older.pop() {
            if let Some(id) = summary.backup()
                && !self.repository.is_given_up(self.lineage, &summary).await?
            {
                return self.facts_of(id).await.map(Some);
            }
        }
        Ok(None)
    }

    /// The timeline to follow: the one that was asked for, else the newest.
    fn timeline(&self, newest: &BackupFacts) -> Timeline {
        let known = self.archive.timelines.keys().copied();
        match (self.recovery.timeline, &self.recovery.to) {
            (Some(timeline), _) => timeline,
            // The end of a backup is on the backup's own timeline.
            (None, RecoveryTarget::Immediate) => newest.timeline,
            (None, _) => known.max().unwrap_or(newest.timeline).max(newest.timeline),
        }
    }

    /// What begins with one backup. `is_first` says that no newer one was refused.
    async fn plan_from(
        &self,
        id: BackupId,
        facts: BackupFacts,
        timeline: Timeline,
        search: &mut Search<'_>,
        fetching: &Fetching,
        is_first: bool,
    ) -> Result<Result<RecoveryPlan, Refusal>, Failure> {
        let way = match archive::way_to(&self.archive, timeline, &facts) {
            Ok(way) => way,
            Err(why) => return Ok(Err(self.no_way(id, &facts, &why))),
        };
        let candidate = Candidate { id, facts, way };
        let reach = Reach::along(&candidate.way, &self.archive, &candidate.facts);
        // A standby goes over to the newest by itself.
        let asks = self.recovery.timeline.is_none() && !self.recovery.standby;
        let aim = match self.aim(&candidate, reach, search).await? {
            Ok(aim) => aim,
            Err(mut refusal) => {
                let is_event =
                    matches!(self.recovery.to, RecoveryTarget::Xid(_) | RecoveryTarget::Name(_));
                if asks && (refusal.is_final || (is_event && is_first)) {
                    for branch in self.branches(&candidate, reach, None).await? {
                        refusal.failure.hint.extend([" ", &branch.hint()]);
                    }
                }
                return Ok(Err(refusal));
            }
        };
        let mut not_taken = Vec::new();
        // The end of a backup is common to all that leads on from it.
        if self.recovery.to != RecoveryTarget::Immediate {
            let branches = self.branches(&candidate, reach, aim.stops_at).await?;
            if asks && !branches.is_empty() {
                let stop = candidate.facts.stop_lsn;
                let newest = search.newest_end(&candidate.way, stop, reach.to).await?;
                let newest = newest.map(|moment| moment.at);
                let (cluster, target) = (&candidate.facts.cluster, &self.recovery.to);
                if let Some(failure) = question(cluster, &branches, target, timeline, newest) {
                    return Ok(Err(Refusal { is_final: true, failure: Box::new(failure) }));
                }
            }
            not_taken.extend(branches.iter().map(Branch::told));
        }
        // Which timeline is meant is plain now; some of its moments are reached along an older one only.
        let older = if asks || self.rehearses {
            self.before_parting(&candidate, &aim, search).await?
        } else {
            None
        };
        let (candidate, reach, mut aim) = older.unwrap_or((candidate, reach, aim));
        let is_alone = reach.to <= candidate.facts.stop_lsn;
        if self.recovery.to == RecoveryTarget::Latest && !self.recovery.standby && is_alone {
            not_taken.push(words::nothing_behind(candidate.id, &candidate.facts));
        }
        aim.notes.extend(not_taken.iter().cloned());
        let plan = self.finish(&candidate, reach, aim, search, fetching).await?;
        Ok(Ok(RecoveryPlan { not_taken, ..plan }))
    }

    /// The same target along the older timeline that has it, where the way passes it in the very segment in which it leaves that
    /// timeline. A server gets this segment once, as the newer timeline's. If it stops before that one begins, it looks for
    /// transactions that were prepared there in the older one's file, which it was never given, and ends.
    async fn before_parting(
        &self,
        candidate: &Candidate,
        aim: &Aim,
        search: &mut Search<'_>,
    ) -> Result<Option<(Candidate, Reach, Aim)>, Failure> {
        let (way, facts) = (&candidate.way, &candidate.facts);
        let history = way.history();
        for entry in &history.entries {
            let older = entry.timeline;
            let Some(left_at) = history.end_of(older) else { continue };
            let begins = Segment::containing(left_at, older, way.segment_size());
            let from = begins.start(way.segment_size()).max(facts.stop_lsn);
            let Some(stop) = self.stops_between(way, from, left_at, aim, search).await? else {
                continue;
            };
            let Ok(way) = archive::way_to(&self.archive, older, facts) else { return Ok(None) };
            let same = Candidate { id: candidate.id, facts: facts.clone(), way };
            let reach = Reach::along(&same.way, &self.archive, facts);
            // Nobody may have archived the older one's file.
            if reach.to <= left_at {
                return Ok(None);
            }
            let aimed = readable(self.aim(&same, reach, search).await)?;
            return Ok(aimed.and_then(Result::ok).map(|mut aim| {
                aim.stops_at = Some(stop);
                aim.notes.push(format!(
                    "timeline {} left timeline {older} at {left_at}, behind that moment and in the same segment: recovery goes along \
                     timeline {older}, which has it",
                    history.timeline
                ));
                (same, reach, aim)
            }));
        }
        Ok(None)
    }

    /// Where a server stops at the latest, if that is certain to be between two positions of one segment.
    async fn stops_between(
        &self,
        way: &Way,
        from: Lsn,
        to: Lsn,
        aim: &Aim,
        search: &mut Search<'_>,
    ) -> Result<Option<Lsn>, Failure> {
        let before = self.recovery.before;
        let within = |lsn: Lsn| (from..to).contains(&lsn).then_some(lsn);
        let first = match &aim.target {
            RecoveryTarget::Latest | RecoveryTarget::Immediate => return Ok(None),
            RecoveryTarget::Xid(_) | RecoveryTarget::Name(_) => {
                return Ok(aim.stops_at.and_then(within));
            }
            RecoveryTarget::Lsn(lsn) if before => return Ok(within(*lsn)),
            // It replays the first record that begins there or later, so one has to.
            RecoveryTarget::Lsn(lsn) => {
                let Some(lsn) = within(*lsn) else { return Ok(None) };
                search.first(way, lsn, to, |moment| moment.start < to).await
            }
            RecoveryTarget::Time(time) => {
                let is_after = |at: Timestamp| at > *time || (before && at == *time);
                let ends = |moment: &Moment| moment.ends_transaction() && is_after(moment.at);
                search.first(way, from, to, |moment| moment.start < to && ends(moment)).await
            }
        };
        Ok(readable(first)?.flatten().map(|moment| moment.start))
    }

    fn no_way(&self, id: BackupId, facts: &BackupFacts, why: &NoWay) -> Refusal {
        let failure = match why {
            NoWay::Elsewhere(why) => {
                let leads = self.leads(facts);
                unreachable(format!("backup {id} leads elsewhere: {why}")).with_hint(
                    if leads.is_empty() {
                        "Name another backup, or another timeline with --timeline.".to_owned()
                    } else {
                        format!("It leads {}. Or name another backup.", leads.join(", "))
                    },
                )
            }
            NoWay::WithoutHistory { .. } => {
                let timelines = self.archive.timelines.iter();
                let there: Vec<String> = timelines
                    .filter(|(timeline, wal)| timeline.0 == 1 || wal.history.is_some())
                    .map(|(timeline, _)| timeline.to_string())
                    .collect();
                unreachable(why.to_string()).with_hint(format!(
                    "Archive that file if a server still has it in pg_wal, or choose another timeline with --timeline; known are {}.",
                    if there.is_empty() { "none".to_owned() } else { there.join(", ") }
                ))
            }
        };
        Refusal { is_final: false, failure: Box::new(failure) }
    }

    /// Whether and where a candidate's way passes the target.
    async fn aim(
        &self,
        candidate: &Candidate,
        reach: Reach,
        search: &mut Search<'_>,
    ) -> Result<Result<Aim, Refusal>, Failure> {
        let facts = &candidate.facts;
        let before = self.recovery.before;
        let target = self.recovery.to.clone();
        let aim = |at_least, met_by: Lsn, until: Option<Until>| {
            let (target, notes) = (target.clone(), Vec::new());
            let stops_at = match target {
                RecoveryTarget::Lsn(lsn) => Some(lsn),
                _ => None,
            };
            Ok(Ok(Aim { target, at_least, met_by, is_found: true, until, stops_at, notes }))
        };
        if reach.to < facts.stop_lsn {
            let size = candidate.way.segment_size();
            let failure = unreachable(format!(
                "backup {} is not complete without WAL segment {}, which is missing",
                candidate.id,
                reach.missing.file_name(size)
            ))
            .with_hint("Archive that segment if a server still has it, or use another backup.");
            return Ok(Err(Refusal { is_final: false, failure: Box::new(failure) }));
        }
        match &self.recovery.to {
            RecoveryTarget::Immediate => {
                let stop = facts.stop_lsn;
                aim(stop, stop, Some(Until::Position(stop)))
            }
            RecoveryTarget::Latest => {
                if reach.is_gap {
                    let what = "the end of the WAL lies behind a gap".to_owned();
                    return Ok(Err(self.gap(candidate, reach, search, what, true).await?));
                }
                let end = search.end(&candidate.way, reach.to).await?;
                let at_least = end.unwrap_or(facts.stop_lsn).max(facts.stop_lsn);
                aim(at_least, end.unwrap_or(reach.to).max(at_least), None)
            }
            RecoveryTarget::Lsn(lsn) => {
                if *lsn < facts.stop_lsn {
                    return Ok(Err(too_early(candidate, &target.to_string())));
                }
                let last = search.last_record(&candidate.way, reach.to).await?;
                let reachable = *lsn < reach.to && last.is_none_or(|last| *lsn <= last);
                if !reachable {
                    let what = format!("WAL does not lead to {lsn}");
                    return Ok(Err(self.gap(candidate, reach, search, what, true).await?));
                }
                // One that is not to stop before it replays the first record that begins there or later.
                let until = if before { Until::Position(*lsn) } else { Until::Record(*lsn) };
                aim(if before { facts.stop_lsn } else { *lsn }, *lsn, Some(until))
            }
            RecoveryTarget::Time(time) => {
                if facts.stopped_at_ms > time.as_millisecond() {
                    return Ok(Err(too_early(candidate, &target.to_string())));
                }
                self.aim_at_time(candidate, reach, search, *time).await
            }
            RecoveryTarget::Xid(_) | RecoveryTarget::Name(_) => {
                self.aim_at_event(candidate, reach, search).await
            }
        }
    }

    /// A server stops at the first commit after the time, so there has to be one. Where there is none, but a checkpoint shows
    /// that the server was there at that time, its position is a target that cannot be missed.
    async fn aim_at_time(
        &self,
        candidate: &Candidate,
        reach: Reach,
        search: &mut Search<'_>,
        time: Timestamp,
    ) -> Result<Result<Aim, Refusal>, Failure> {
        let stop = candidate.facts.stop_lsn;
        let target = RecoveryTarget::Time(time);
        if reach.to <= stop {
            let what = format!(
                "WAL does not lead to {time}: nothing is there behind the end of the backup"
            );
            return Ok(Err(self.gap(candidate, reach, search, what, true).await?));
        }
        let found =
            search.after(&candidate.way, stop, reach.to, time, self.recovery.before).await?;
        let until = match &found {
            Found::Idle(moment) => Until::Position(moment.end),
            Found::Event(_) | Found::Unknown | Found::Nothing => Until::Time(time),
        };
        let stops_at = match &found {
            Found::Idle(moment) => Some(moment.start),
            // One of those that show that WAL goes on, not the first.
            Found::Event(_) | Found::Unknown | Found::Nothing => None,
        };
        let is_found = !matches!(found, Found::Unknown);
        let met_by = match &found {
            Found::Event(moment) | Found::Idle(moment) => moment.start,
            Found::Unknown | Found::Nothing => reach.to,
        };
        let (target, note) = match found {
            Found::Event(moment) => {
                (target, format!("a transaction that ended at {} shows that WAL goes on beyond that", moment.at))
            }
            Found::Idle(moment) => (
                RecoveryTarget::Lsn(moment.start),
                format!(
                    "no transaction ended after {time}, but a record of {} was written at {}: recovery goes to that position",
                    moment.at, moment.start
                ),
            ),
            Found::Unknown => (
                target,
                "the newest WAL holds no end of a transaction, so it is not known whether one follows that time; the server \
                 refuses to open if none does"
                    .to_owned(),
            ),
            Found::Nothing => {
                let what = format!("WAL does not lead to {time}: no transaction that ended later is there");
                return Ok(Err(self.gap(candidate, reach, search, what, true).await?));
            }
        };
        let (until, notes) = (Some(until), vec![note]);
        Ok(Ok(Aim { target, at_least: stop, met_by, is_found, until, stops_at, notes }))
    }

    /// A transaction or a restore point is looked for from the end of what is there.
    async fn aim_at_event(
        &self,
        candidate: &Candidate,
        reach: Reach,
        search: &mut Search<'_>,
    ) -> Result<Result<Aim, Refusal>, Failure> {
        let stop = candidate.facts.stop_lsn;
        let target = self.recovery.to.clone();
        let found = search.all(&candidate.way, stop, reach.to, &target).await?;
        let Some(found) = found else {
            // Not everything could be looked at: the server finds it or refuses to open.
            let note = "it was not looked for: there is too much WAL; the server refuses to open if it is not there";
            return Ok(Ok(Aim {
                target,
                at_least: stop,
                met_by: reach.to,
                is_found: false,
                until: None,
                stops_at: None,
                notes: vec![note.to_owned()],
            }));
        };
        match found.as_slice() {
            [] => {
                let what = format!("WAL behind backup {} does not pass {target}", candidate.id);
                Ok(Err(self.gap(candidate, reach, search, what, false).await?))
            }
            [moment] => {
                let at_least = if self.recovery.before { moment.start } else { moment.end };
                let note =
                    format!("{target} is at {} and was reached at {}", moment.start, moment.at);
                let (at_least, until) = (at_least.min(moment.end), Until::Position(moment.end));
                let (met_by, notes) = (moment.end, vec![note]);
                let (until, stops_at) = (Some(until), Some(moment.start));
                Ok(Ok(Aim { target, at_least, met_by, is_found: true, until, stops_at, notes }))
            }
            several => {
                let places: Vec<String> = several
                    .iter()
                    .map(|moment| format!("{} ({})", moment.start, moment.at))
                    .collect();
                let failure = Failure::new(
                    Code::RequestInvalid,
                    Action::FixConfig,
                    format!("{target} is there {} times: at {}", several.len(), places.join(", ")),
                )
                .with_hint(format!(
                    "Say which by its position: --to {}.",
                    several[several.len() - 1].start
                ));
                Ok(Err(Refusal { is_final: true, failure: Box::new(failure) }))
            }
        }
    }

    /// A refusal that says what can be reached.
    async fn gap(
        &self,
        candidate: &Candidate,
        reach: Reach,
        search: &mut Search<'_>,
        what: String,
        is_final: bool,
    ) -> Result<Refusal, Failure> {
        let size = candidate.way.segment_size();
        let stop = candidate.facts.stop_lsn;
        let newest = search.newest_end(&candidate.way, stop, reach.to).await?;
        let last = search.last_record(&candidate.way, reach.to).await?;
        let last = last.filter(|last| *last >= stop);
        let upto = match newest {
            Some(moment) => format!(
                "recoverable up to {} (position {})",
                moment.at,
                last.unwrap_or(moment.start)
            ),
            None => format!("recoverable up to position {}", last.unwrap_or(stop)),
        };
        let name = reach.missing.file_name(size);
        let missing = if reach.is_gap {
            format!("WAL segment {name} is missing and later ones are there")
        } else {
            format!("the archive ends before WAL segment {name}")
        };
        let position = last.map_or("immediate".to_owned(), |last| last.to_string());
        let failure = unreachable(format!(
            "{what}; {missing}; along timeline {} it is {upto}",
            candidate.way.timeline()
        ))
        .with_hint(if reach.is_gap {
            format!(
                "Archive {name} if a server still has it, or stop before it: --to {position}. A backup taken after the gap leads beyond it."
            )
        } else {
            format!("--to latest takes all there is, --to {position} stops at the last record of it.")
        });
        Ok(Refusal { is_final, failure: Box::new(failure) })
    }

    async fn finish(
        &self,
        candidate: &Candidate,
        reach: Reach,
        aim: Aim,
        search: &mut Search<'_>,
        fetching: &Fetching,
    ) -> Result<RecoveryPlan, Failure> {
        let (way, facts, recovery) = (&candidate.way, &candidate.facts, self.recovery);
        let size = way.segment_size();
        let until = match (&aim.target, &recovery.to) {
            (RecoveryTarget::Lsn(lsn), _) => Lsn(lsn.0 + 1),
            (_, RecoveryTarget::Immediate | RecoveryTarget::Xid(_) | RecoveryTarget::Name(_)) => {
                aim.at_least
            }
            _ => reach.to,
        };
        let (mut segments, mut brought) = (0_u64, 0_u64);
        for segment in way.segments(until) {
            segments += 1;
            brought += u64::from(!self.archive.has(segment, size));
        }
        let newest = search.newest_end(way, facts.stop_lsn, reach.to).await?;
        let timeline = (way.timeline() != facts.timeline).then(|| way.timeline());
        // A position in place of a time is one before which all is wanted.
        let is_translated = aim.target != recovery.to;
        let settings = RecoverySettings {
            restore_command: fetching.command(self.lineage, recovery.standby, aim.until),
            target: aim.target.clone(),
            before: recovery.before && !is_translated,
            timeline,
            action: recovery.action,
            standby: recovery.standby,
            keep_archiving: recovery.keep_archiving,
            port: recovery.port,
        };
        let expected = Expected {
            target: aim.target,
            before: settings.before,
            timeline: way.timeline(),
            at_least: aim.at_least,
            action: recovery.action,
            standby: recovery.standby,
            system_identifier: facts.system_identifier,
        };
        let outcome = RecoveryOutcome {
            target: recovery.to.to_string(),
            timeline: way.timeline(),
            segments,
            wal_bytes: segments * u64::from(size),
            recoverable_to: reach.to,
            recoverable_to_time: newest.map(|moment| moment.at),
            reached: None,
        };
        let lines = words::lines(&words::Told {
            history: way.history(),
            backup: candidate.id,
            facts,
            recovery,
            outcome: &outcome,
            settings: &settings,
            brought,
            is_gap: reach.is_gap,
            notes: &aim.notes,
        });
        let (met_by, is_found, way) = (aim.met_by, aim.is_found, way.clone());
        let (starts, not_taken) = (recovery.start, Vec::new());
        Ok(RecoveryPlan {
            settings,
            expected,
            outcome,
            lines,
            not_taken,
            is_found,
            met_by,
            way,
            starts,
        })
    }
}

/// Begins before the damage that a backup has from the server's disk, where an older one is known that leads on: changes since
/// are in the WAL, and what went wrong on the disk is not.
fn around_damage(
    (damaged, plan): (BackupId, RecoveryPlan),
    undamaged: Option<(BackupId, RecoveryPlan)>,
) -> (BackupId, RecoveryPlan) {
    let (taken, mut plan, line) = match undamaged {
        Some((older, plan)) => {
            let line =
                "is newer, and holds pages that had wrong checksums on the server: not taken";
            (older, plan, line)
        }
        None => (
            damaged,
            plan,
            "holds pages that had wrong checksums on the server; no older one leads there",
        ),
    };
    let line = format!("Backup {damaged} {line}.");
    plan.lines.push(line.clone());
    plan.not_taken.push(line);
    (taken, plan)
}

/// Why one backup does not do.
struct Refusal {
    /// No older one can do either.
    is_final: bool,
    failure: Box<Failure>,
}

fn too_early(candidate: &Candidate, target: &str) -> Refusal {
    let facts = &candidate.facts;
    let ended = Timestamp::from_millisecond(facts.stopped_at_ms).unwrap_or_default();
    let failure = unreachable(format!(
        "backup {} ended at {} ({ended}), after {target}",
        candidate.id, facts.stop_lsn
    ))
    .with_hint(format!(
        "A backup leads only to moments after its own end; `pgmuster backups list {}` shows older ones.",
        facts.cluster
    ));
    Refusal { is_final: false, failure: Box::new(failure) }
}

fn unreachable(message: String) -> Failure {
    Failure::new(Code::RecoveryTargetUnreachable, Action::FixConfig, message)
}

/// Where the program is that fetches WAL, for the settings of a server that outlives this process.
pub fn this_program() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(|error| {
        let what = format!("failed to find this program: {error}");
        Failure::new(Code::Internal, Action::FixConfig, what).with_hint(
            "The restored server calls it to fetch WAL; start pgmuster from a file that stays.",
        )
    })
}
