//! What other timelines wrote that the way to a target leaves behind, and whether one of them may be meant.
//!
//! A server that opens takes a number above all that it knows of, so the highest timeline is the newest, and it is followed where
//! none was named. But a copy that somebody tried out took a number, too, while its source went on; and after a failover an old
//! primary may write on for hours. So whatever is not taken is told, and where nothing shows which end the cluster lives on, its
//! people are asked.

use std::cmp::Reverse;

use jiff::{SignedDuration, Timestamp};
use postgres::recovery::Way;
use postgres::wal::History;
use postgres::wal_moments::{Event, Moment};
use proto::{Action, ClusterName, Code, Failure, Lsn, RecoveryTarget, Timeline};
use repository::{TimelineWal, WalInventory};

use super::search::Search;
use super::{Candidate, Planner};
use crate::archive::Reach;

/// Segments of each branch that are looked into for its first and its last transaction.
const LOOKED_INTO_MAX: usize = 32;
/// What a time in whole seconds leaves open.
const WITHIN_A_SECOND: SignedDuration = SignedDuration::from_micros(999_999);

/// A stretch of the log that is not on a way.
#[derive(Debug)]
struct Stretch {
    way: Way,
    /// What is behind this position is on no other timeline.
    from: Lsn,
    /// Nothing behind this position is common to it and the way.
    parted_at: Lsn,
    /// Which timeline left which.
    how: String,
}

/// What somebody wrote who left the way, or whom it left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Branch {
    timeline: Timeline,
    parted_at: Lsn,
    how: String,
    /// Its archived WAL ends there.
    end: Lsn,
    ended: Ended,
    /// When something was first written on the way behind the place where they parted, at the latest, where that is known.
    began: Option<Timestamp>,
}

impl Planner<'_> {
    /// What is left behind by a recovery that ends at a position, or goes on to the end of its way. Branches in which no
    /// transaction ended, or none before the time that is wanted, are none.
    pub(super) async fn branches(
        &self,
        candidate: &Candidate,
        reach: Reach,
        stops_at: Option<Lsn>,
    ) -> Result<Vec<Branch>, Failure> {
        let (way, facts) = (&candidate.way, &candidate.facts);
        let looking = || Search::new(self.repository, self.lineage, facts).within(LOOKED_INTO_MAX);
        let mut branches = Vec::new();
        for Stretch { way: branch, from, parted_at, how } in stretches(&self.archive, way) {
            let timeline = branch.timeline();
            let Some(wal) = self.archive.timelines.get(&timeline) else { continue };
            let Some(end) = wal.end() else { continue };
            if stops_at.is_some_and(|stop| stop <= parted_at) {
                continue;
            }
            let Some(ended) = ended(looking(), &branch, from, wal).await? else { continue };
            if let (RecoveryTarget::Time(time), Some(first)) = (&self.recovery.to, ended.first)
                && first > *time
            {
                // What came later is not taken from anybody.
                continue;
            }
            let began = readable(began(looking(), way, parted_at, reach.to).await)?.flatten();
            branches.push(Branch { timeline, parted_at, how, end, ended, began });
        }
        Ok(branches)
    }

    /// Where a backup leads, for whoever asked for something else.
    pub(super) fn leads(&self, facts: &proto::BackupFacts) -> Vec<String> {
        let timelines = self.archive.timelines.keys().copied();
        let ways = timelines.filter_map(|timeline| {
            let way = crate::archive::way_to(&self.archive, timeline, facts).ok()?;
            let to = Reach::along(&way, &self.archive, facts).to;
            (to > facts.stop_lsn).then(|| format!("to {to} with --timeline {timeline}"))
        });
        ways.collect()
    }
}

/// When the first and the last transaction ended that only a stretch of the log has; `None` where the segments that are looked
/// into do not say it, because there are too many or one cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ended {
    first: Option<Timestamp>,
    last: Option<Timestamp>,
}

/// `None` where, as far as the log is there, no transaction ended.
async fn ended(
    mut search: Search<'_>,
    way: &Way,
    from: Lsn,
    wal: &TimelineWal,
) -> Result<Option<Ended>, Failure> {
    let (mut last, mut is_readable) = (None, true);
    for run in wal.runs.iter().rev().take_while(|run| run.to > from) {
        let newest = readable(search.newest_end(way, from.max(run.from), run.to).await)?;
        is_readable = newest.is_some();
        last = newest.flatten();
        if last.is_some() || !is_readable {
            break;
        }
    }
    if last.is_none() && is_readable && !search.is_exhausted() {
        return Ok(None);
    }
    search.allow(LOOKED_INTO_MAX);
    // Behind a gap none is known to be the first.
    let first = match wal.runs.iter().find(|run| run.from <= from && from < run.to) {
        Some(run) => {
            readable(search.first(way, from, run.to, Moment::ends_transaction).await)?.flatten()
        }
        None => None,
    };
    let at = |moment: Option<Moment>| moment.map(|moment| moment.at);
    Ok(Some(Ended { first: at(first), last: at(last) }))
}

/// What was found, or `None` where something is damaged or refused: that must not keep anybody from another way. A store that does
/// not answer now says nothing about what it holds.
pub(super) fn readable<T>(looked: Result<T, Failure>) -> Result<Option<T>, Failure> {
    match looked {
        Ok(found) => Ok(Some(found)),
        Err(failure) if failure.action.is_retryable() => Err(failure),
        Err(failure) => {
            tracing::info!(%failure, "What leads another way cannot be looked into");
            Ok(None)
        }
    }
}

/// When something was first written on a way behind a position, at the latest: of a checkpoint only the second is known.
async fn began(
    mut search: Search<'_>,
    way: &Way,
    from: Lsn,
    to: Lsn,
) -> Result<Option<Timestamp>, Failure> {
    let first = search.first(way, from, to, |_| true).await?;
    let end = search.first(way, from, to, Moment::ends_transaction).await?;
    let at = |moment: Moment| match moment.event {
        Event::Checkpoint => moment.at.checked_add(WITHIN_A_SECOND).unwrap_or(moment.at),
        _ => moment.at,
    };
    Ok(first.map(at).into_iter().chain(end.map(|moment| moment.at)).min())
}

/// Everything in the archive behind the places where others parted from a way, by timeline.
fn stretches(archive: &WalInventory, way: &Way) -> Vec<Stretch> {
    let (taken, size) = (way.history(), way.segment_size());
    let others = archive.timelines.iter();
    let others = others.filter(|(timeline, wal)| {
        **timeline != taken.timeline && wal.segment_size == size && !wal.runs.is_empty()
    });
    let stretch = |(timeline, wal): (&Timeline, &TimelineWal)| {
        let history = wal.history.clone();
        let own = history.unwrap_or(History { timeline: *timeline, entries: Vec::new() });
        let first = wal.runs.first()?.from;
        let origin = own.entries.last().cloned();
        let begins = origin.as_ref().map_or(first, |origin| origin.switched_at);
        let (from, parted_at, how) = if let Some((by, at)) = follower(taken, *timeline) {
            (at.max(begins), at, format!("timeline {by} left timeline {timeline} at {at}"))
        } else {
            let how = match origin {
                Some(origin) => {
                    format!("timeline {timeline} left timeline {} at {begins}", origin.timeline)
                }
                None => format!("nobody knows where timeline {timeline} began"),
            };
            (begins, parting(&own, taken).unwrap_or(Lsn(0)), how)
        };
        let way = Way::of_timeline(own, size);
        (wal.end()? > from).then_some(Stretch { way, from, parted_at, how })
    };
    others.filter_map(stretch).collect()
}

/// Who left an ancestor on the way to a timeline, and where.
fn follower(taken: &History, ancestor: Timeline) -> Option<(Timeline, Lsn)> {
    let end = taken.end_of(ancestor)?;
    let later = taken.entries.iter().skip_while(|entry| entry.timeline != ancestor);
    let mut behind = later.skip_while(|entry| entry.switched_at != end).skip(1);
    Some((behind.next().map_or(taken.timeline, |entry| entry.timeline), end))
}

/// Up to where two timelines have one log.
fn parting(one: &History, other: &History) -> Option<Lsn> {
    let line = |history: &History| -> Vec<Timeline> {
        let ancestors = history.entries.iter().map(|entry| entry.timeline);
        ancestors.chain([history.timeline]).collect()
    };
    let (ones, others) = (line(one), line(other));
    let common = ones.into_iter().rev().find(|timeline| others.contains(timeline))?;
    [one, other].iter().filter_map(|history| history.end_of(common)).min()
}

impl Branch {
    /// What is not taken, and how to get it.
    pub(super) fn told(&self) -> String {
        let Self { timeline, how, end, .. } = self;
        let what = match self.ended {
            Ended { first: Some(first), last: Some(last) } if first == last => {
                format!("a transaction that ended there at {first} is not taken")
            }
            Ended { first: None, last: None } => "what ended there is not taken".to_owned(),
            ended => format!("transactions that ended there {} are not taken", ended.told()),
        };
        format!("{how}, and {timeline} goes on to {end}: {what}; --timeline {timeline} leads there")
    }

    /// Where it leads, for whoever found that another way does not.
    pub(super) fn hint(&self) -> String {
        let Self { timeline, how, end, .. } = self;
        let until = self.ended.last.map_or(String::new(), |last| format!(", {last}"));
        format!("{how}, and {timeline} goes on to {end}{until}: --timeline {timeline} leads there.")
    }
}

impl Ended {
    fn told(self) -> String {
        match (self.first, self.last) {
            (Some(first), Some(last)) => format!("from {first} to {last}"),
            (None, Some(last)) => format!("up to {last}"),
            (Some(first), None) => format!("from {first} on"),
            (None, None) => "at times that are not known".to_owned(),
        }
    }
}

/// What has to be asked before anybody recovers along `taken`, whose newest transaction ended at `newest`, where no timeline was
/// named; nothing where it is plain.
pub(super) fn question(
    cluster: &ClusterName,
    branches: &[Branch],
    target: &RecoveryTarget,
    taken: Timeline,
    newest: Option<Timestamp>,
) -> Option<Failure> {
    let to = match target {
        RecoveryTarget::Latest => None,
        RecoveryTarget::Time(time) => Some(*time),
        // Whoever names a position or an event has seen it on the way.
        _ => return None,
    };
    let mut branches: Vec<_> = branches.iter().collect();
    // Those of which nothing is known come last.
    branches.sort_by_key(|branch| Reverse(branch.ended.last));
    let ask = |what: String, hint: String| {
        Failure::new(Code::RequestInvalid, Action::FixConfig, what).with_hint(hint)
    };
    branches.into_iter().find_map(|branch| {
        let Branch { timeline, parted_at, end, ended, began, .. } = branch;
        if to.zip(ended.first).is_some_and(|(to, first)| to < first) {
            return None;
        }
        if let (Some(to), Some(began), Some(last)) = (to, *began, ended.last)
            && to < began
        {
            let there = if to < last { "" } else { " --to latest" };
            return Some(ask(
                format!(
                    "{to} is a moment of timeline {timeline}, where transactions ended {}; timeline {taken} parted from \
                     it at {parted_at} and wrote nothing before {began}",
                    ended.told()
                ),
                format!(
                    "Say which is meant: --timeline {timeline}{there} has what was committed then, --timeline {taken} only what was before they parted."
                ),
            ));
        }
        // Over is one that was silent for longer than both went on side by side.
        let is_over = began.zip(ended.last).is_some_and(|(began, last)| {
            let beside = last.duration_since(began);
            beside.is_negative()
                || beside.is_zero()
                || newest.is_some_and(|newest| newest.duration_since(last) > beside)
        });
        if is_over {
            return None;
        }
        let one = match ended.last {
            Some(last) => format!("timeline {timeline} went on to {last}"),
            None => format!(
                "timeline {timeline} goes on to {end}, and what could be looked into does not say when a transaction ended there last"
            ),
        };
        let other = match (began, newest) {
            (Some(_), Some(newest)) => format!("timeline {taken} went on to {newest}"),
            _ => format!("nothing shows when timeline {taken} began"),
        };
        Some(ask(
            format!(
                "nothing shows whether the cluster lives on timeline {taken} or {timeline}, which parted at {parted_at}: {one}; {other}"
            ),
            format!(
                "Say which is meant: pgmuster restore … --timeline {taken}, or --timeline {timeline}. `pgmuster recovery windows {cluster}` shows \
                 where each leads; stop the server that should not be there any more."
            ),
        ))
    })
}

#[cfg(test)]
mod tests {
    use proto::wal::Segment;
    use repository::WalRun;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn history(timeline: u32, entries: &[(u32, u64)]) -> History {
        let lines: Vec<String> =
            entries.iter().map(|(number, lsn)| format!("{number}\t{}\tx", Lsn(*lsn))).collect();
        History::parse(Timeline(timeline), &lines.join("\n")).unwrap()
    }

    /// Number of a timeline, its first and last segment, and the ends of those before it.
    type Line<'a> = (u32, [u64; 2], &'a [(u32, u64)]);

    fn archive(timelines: &[Line<'_>]) -> WalInventory {
        let mut archive = WalInventory::default();
        for (number, ends, entries) in timelines {
            let timeline = Timeline(*number);
            let [first, last] = ends.map(|number| Segment { timeline, number });
            let (from, to) = (first.start(1 << 20), last.end(1 << 20));
            let wal = TimelineWal {
                segment_size: 1 << 20,
                runs: vec![WalRun { first, last, from, to }],
                history: (*number > 1).then(|| history(*number, entries)),
                ..TimelineWal::default()
            };
            archive.timelines.insert(timeline, wal);
        }
        archive
    }

    #[test]
    fn all_that_parted_from_a_way_is_found_where_it_parted() {
        // 2 left 1, 3 left 2, and 4 left 1 before that; 5 left 4.
        let archive = archive(&[
            (1, [1, 12], &[]),
            (2, [8, 11], &[(1, 8 * MIB + 100)]),
            (3, [10, 14], &[(1, 8 * MIB + 100), (2, 10 * MIB + 7)]),
            (4, [6, 9], &[(1, 6 * MIB + 5)]),
            (5, [7, 8], &[(1, 6 * MIB + 5), (4, 7 * MIB + 3)]),
        ]);
        let told = |timeline: u32| {
            let timeline = Timeline(timeline);
            let history = archive.timelines[&timeline].history.clone();
            let way = Way::of_timeline(history.unwrap_or(History::FIRST), 1 << 20);
            let found = stretches(&archive, &way).into_iter();
            found
                .map(|one| (one.way.timeline().0, one.from.0, one.parted_at.0, one.how))
                .collect::<Vec<_>>()
        };
        let left = |by: u32, from: u32, at: u64| {
            format!("timeline {by} left timeline {from} at {}", Lsn(at))
        };
        let (second, third) = (8 * MIB + 100, 10 * MIB + 7);
        let (fourth, fifth) = (6 * MIB + 5, 7 * MIB + 3);
        assert_eq!(
            told(3),
            [
                (1, second, second, left(2, 1, second)),
                (2, third, third, left(3, 2, third)),
                (4, fourth, fourth, left(4, 1, fourth)),
                (5, fifth, fourth, left(5, 4, fifth)),
            ]
        );
        assert_eq!(
            told(1),
            [
                (2, second, second, left(2, 1, second)),
                (3, third, second, left(3, 2, third)),
                (4, fourth, fourth, left(4, 1, fourth)),
                (5, fifth, fourth, left(5, 4, fifth)),
            ]
        );
        assert_eq!(told(5).first().unwrap(), &(1, fourth, fourth, left(4, 1, fourth)));
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_790_000_000 + second).unwrap()
    }

    fn branch(first: Option<i64>, last: Option<i64>, began: Option<i64>) -> Branch {
        Branch {
            timeline: Timeline(1),
            parted_at: Lsn(7),
            how: "timeline 2 left timeline 1 at 0/7".to_owned(),
            end: Lsn(9),
            ended: Ended { first: first.map(at), last: last.map(at) },
            began: began.map(at),
        }
    }

    /// What is asked when timeline 1 wrote from one second to another, timeline 2 was there from one on, and wrote last at one.
    fn cluster() -> ClusterName {
        "orders".parse().unwrap()
    }

    fn asked(
        to: Option<i64>,
        ended: (i64, i64),
        began: Option<i64>,
        newest: Option<i64>,
    ) -> Option<Failure> {
        asked_of(branch(Some(ended.0), Some(ended.1), began), to, newest)
    }

    fn asked_of(branch: Branch, to: Option<i64>, newest: Option<i64>) -> Option<Failure> {
        let target = to.map_or(RecoveryTarget::Latest, |to| RecoveryTarget::Time(at(to)));
        question(&cluster(), &[branch], &target, Timeline(2), newest.map(at))
    }

    #[test]
    fn whoever_stopped_before_the_next_began_is_left_behind_without_a_question() {
        assert_eq!(asked(None, (10, 20), Some(30), Some(31)), None);
        assert_eq!(asked(None, (10, 20), Some(20), None), None);
    }

    #[test]
    fn of_two_that_went_on_the_one_that_fell_silent_long_ago_is_over() {
        // Ten seconds side by side.
        assert_eq!(asked(None, (10, 30), Some(20), Some(41)), None);
        let asked = |newest| asked(None, (10, 30), Some(20), newest);
        for newest in [Some(40), Some(30), Some(21), None] {
            let failure = asked(newest).unwrap();
            assert_eq!(failure.code, Code::RequestInvalid);
            for option in ["--timeline 1", "--timeline 2"] {
                assert!(failure.hint.contains(option), "{failure:?}");
            }
            assert!(failure.message.contains(&at(30).to_string()), "{failure:?}");
        }
    }

    #[test]
    fn a_timeline_of_which_nothing_shows_when_it_began_is_asked_about() {
        let failure = asked(None, (10, 20), None, Some(5)).unwrap();
        assert!(failure.message.contains("nothing shows when timeline 2 began"), "{failure:?}");
    }

    #[test]
    fn a_moment_at_which_only_the_branch_was_written_is_asked_about() {
        let asked = |to| asked(Some(to), (10, 20), Some(30), Some(50));
        assert_eq!(asked(9), None, "nothing is lost by then");
        let hint = asked(15).unwrap().hint;
        assert!(hint.contains("--timeline 1 has"), "{hint}");
        let hint = asked(25).unwrap().hint;
        assert!(hint.contains("--timeline 1 --to latest has"), "{hint}");
        assert_eq!(asked(30), None, "then the next was there");
    }

    #[test]
    fn a_branch_whose_first_transaction_is_not_known_may_have_the_moment() {
        let asked = |to| asked_of(branch(None, Some(20), Some(30)), Some(to), Some(50));
        for (to, option) in [(9, "--timeline 1 has"), (25, "--timeline 1 --to latest has")] {
            let failure = asked(to).unwrap();
            assert!(failure.message.contains(&format!("ended up to {}", at(20))), "{failure:?}");
            assert!(failure.hint.contains(option), "{failure:?}");
        }
        assert_eq!(asked(30), None, "then the next was there");
    }

    #[test]
    fn a_branch_whose_last_transaction_is_not_known_is_asked_about() {
        // However long the other went on: this one may have, too.
        for (to, first) in
            [(None, None), (None, Some(10)), (Some(15), None), (Some(5000), Some(10))]
        {
            let failure = asked_of(branch(first, None, Some(20)), to, Some(9000)).unwrap();
            assert_eq!(failure.code, Code::RequestInvalid);
            assert!(failure.message.contains("timeline 1 goes on to 0/9, and"), "{failure:?}");
            assert!(failure.hint.contains("--timeline 1"), "{failure:?}");
        }
        assert_eq!(
            asked_of(branch(Some(10), None, Some(20)), Some(9), Some(9000)),
            None,
            "nothing is lost by then"
        );
        let lsn = RecoveryTarget::Lsn(Lsn(8));
        assert_eq!(
            question(&cluster(), &[branch(None, None, Some(20))], &lsn, Timeline(2), None),
            None
        );
    }

    #[test]
    fn what_is_not_known_of_a_branch_is_not_told_as_known() {
        let (ten, twenty) = (at(10), at(20));
        for (first, last, words) in [
            (Some(10), Some(10), format!("a transaction that ended there at {ten} is")),
            (Some(10), Some(20), format!("that ended there from {ten} to {twenty} are")),
            (None, Some(20), format!("that ended there up to {twenty} are")),
            (Some(10), None, format!("that ended there from {ten} on are")),
            (None, None, "what ended there is".to_owned()),
        ] {
            let told = branch(first, last, None).told();
            assert!(
                told.contains(&format!("{words} not taken; --timeline 1 leads there")),
                "{told}"
            );
        }
    }

    #[test]
    fn only_a_store_that_does_not_answer_now_ends_the_look_at_a_branch() {
        let failure = |code, action| Failure::new(code, action, "");
        assert_eq!(readable(Ok(7)), Ok(Some(7)));
        for (code, action) in [
            (Code::ObjectDamaged, Action::FixData),
            (Code::ObjectMissing, Action::FixData),
            (Code::StoreForbidden, Action::FixConfig),
            (Code::Internal, Action::ReportBug),
        ] {
            assert_eq!(readable::<()>(Err(failure(code, action))), Ok(None));
        }
        let away = failure(Code::StoreUnavailable, Action::Retry);
        assert_eq!(readable::<()>(Err(away.clone())), Err(away));
    }
}
