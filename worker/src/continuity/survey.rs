//! Looking at a whole archive, beside the looks that follow it segment by segment: a listing may take minutes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use postgres::recovery::Way;
use proto::failure::{Action, Code, Failure};
use proto::message::WalEnd;
use proto::wal::{SegmentName, WalFileName};
use proto::{BackupKind, ClusterName, LineageId, Lsn, SystemIdentifier, Timeline};
use repository::Repository;
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use super::line::Line;
use crate::clock::Seen;
use crate::recovering;

/// How long one may take.
const SURVEY_MAX: Duration = Duration::from_mins(10);
/// So long the segments before gaps are looked into, beside that.
const ENDS_MAX: Duration = Duration::from_secs(30);
/// A survey is paid for with this many times its duration without one.
const REST: i64 = 20;
/// A timeline costs two questions more, which cost about as much as so many names in a list.
pub(super) const FILES_OF_A_TIMELINE: u64 = 200;

/// Segments before a gap that are looked into for the last transaction.
const LOOKED_INTO_MAX: usize = 4;

/// The last transaction before each gap that was looked for, by where the gap begins.
pub(super) type Ends = BTreeMap<Lsn, Option<WalEnd>>;

/// Whose archive is looked at, and where its server was seen before.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) cluster: ClusterName,
    pub(super) server: SystemIdentifier,
    pub(super) major: u32,
    pub(super) timeline: Timeline,
    pub(super) lsn: Lsn,
    /// What needs not be looked for again.
    pub(super) ends: Ends,
}

/// What one found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The newest line; `None` when nothing is archived at all.
    pub(super) line: Option<Line>,
    /// Segments of the timeline of which other content was refused.
    pub(super) refused: Vec<SegmentName>,
    /// What the list cost, in files.
    pub(super) files: u64,
    /// The last transactions before its gaps.
    pub(super) ends: Ends,
}

/// What came of the last survey, and the one that runs.
#[derive(Debug, Default)]
pub(super) struct Surveys {
    running: Option<Running>,
    /// When the last one ended, and how many milliseconds it took.
    ended: Option<(Seen, i64)>,
    /// Why the last one failed.
    pub(super) failure: Option<Failure>,
}

#[derive(Debug)]
struct Running {
    /// What it finds, and how many milliseconds it took.
    task: AbortOnDropHandle<(Result<Found, Failure>, i64)>,
    known_to: Lsn,
}

impl Surveys {
    /// Whether one may begin: none runs, and the last one ended `pause` or longer ago.
    pub(super) fn may_begin(&self, pause: Duration, now: Seen) -> bool {
        let pause_ms = i64::try_from(pause.as_millis()).unwrap_or(i64::MAX);
        let rested = self.ended.is_none_or(|(ended, took_ms)| {
            ended.age_ms(now) >= pause_ms.max(took_ms.saturating_mul(REST))
        });
        self.running.is_none() && rested
    }

    /// Begins one, when what is known leads to `known_to`. Few run at the same time, however many clusters there are.
    pub(super) fn begin(
        &mut self,
        repository: &Arc<Repository>,
        few: &Arc<Semaphore>,
        asked: Asked,
        known_to: Lsn,
    ) {
        let (repository, few) = (Arc::clone(repository), Arc::clone(few));
        let task = tokio::spawn(async move {
            let _one_of_few = few.acquire().await;
            let began = Seen::now();
            let surveyed =
                tokio::time::timeout(SURVEY_MAX, survey(&repository, &asked, began)).await;
            let surveyed = surveyed.unwrap_or_else(|_| {
                let message = format!("the archive is not listed after {} s", SURVEY_MAX.as_secs());
                Err(Failure::new(Code::DeadlineExceeded, Action::Retry, message))
            });
            match surveyed {
                Ok((found, listed_ms)) => (Ok(found), listed_ms),
                Err(failure) => (Err(failure), began.age_ms(Seen::now())),
            }
        });
        self.running = Some(Running { task: AbortOnDropHandle::new(task), known_to });
    }

    /// What was found, and to where the line led when that began; `None` unless one has ended well since.
    pub(super) async fn ended(&mut self, now: Seen) -> Option<(Found, Lsn)> {
        let Running { task, known_to } = self.running.take_if(|one| one.task.is_finished())?;
        let (found, took_ms) = task.await.unwrap_or_else(|error| {
            (Err(Failure::bug(format!("a survey ended badly: {error}"))), 0)
        });
        // What a store took to fail says nothing of what a list costs.
        self.ended = Some((now, if found.is_ok() { took_ms } else { 0 }));
        self.failure = found.as_ref().err().cloned();
        found.ok().map(|found| (found, known_to))
    }

    /// Whether one runs and has not ended.
    #[cfg(test)]
    pub(super) fn is_listing(&self) -> bool {
        self.running.as_ref().is_some_and(|running| !running.task.is_finished())
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }
}

/// What there is, and how long it took to list it, milliseconds.
async fn survey(
    repository: &Repository,
    asked: &Asked,
    began: Seen,
) -> Result<(Found, i64), Failure> {
    let Asked { cluster, server, timeline, lsn, .. } = asked;
    let mut lineages = repository.lineages_of(BackupKind::Physical, cluster, *server).await?;
    let Some(newest) = lineages.pop() else {
        return Ok((Found::default(), began.age_ms(Seen::now())));
    };
    let archive = repository.list_wal(newest.lineage).await?;
    let listed_ms = began.age_ms(Seen::now());
    let refused = archive.conflicts.iter().filter_map(|file| match file {
        WalFileName::Segment(name) if name.timeline == *timeline => Some(*name),
        _ => None,
    });
    let mut line = Line::newest(&archive, newest.lineage, *timeline, *lsn);
    let mut ends = Ends::new();
    if let Some(line) = &mut line {
        let way = line.way(&archive);
        let looking = async {
            for gap in &mut line.gaps {
                let looked = if let Some(known) = asked.ends.get(&gap.from) {
                    Ok(*known)
                } else {
                    let (lineage, between) = (newest.lineage, (gap.line_from, gap.from));
                    last_end(repository, lineage, asked.major, &way, between).await
                };
                match looked {
                    Ok(end) => {
                        gap.last_end = end;
                        ends.insert(gap.from, end);
                    }
                    // It is asked again with the next list.
                    Err(failure) => tracing::debug!("The end before a gap is not known: {failure}"),
                }
            }
        };
        // These are words beside what was found: segments may be large, and a store slow. The rest has its turn with the next list.
        if tokio::time::timeout(ENDS_MAX, looking).await.is_err() {
            tracing::debug!(
                "The ends before gaps are not all known after {} s",
                ENDS_MAX.as_secs()
            );
        }
    }
    let found = Found {
        line,
        refused: refused.collect(),
        files: archive.objects + FILES_OF_A_TIMELINE * archive.timelines.len() as u64,
        ends,
    };
    Ok((found, listed_ms))
}

/// The last end of a transaction between two positions, if the last few segments have one. What is damaged has none.
async fn last_end(
    repository: &Repository,
    lineage: LineageId,
    major: u32,
    way: &Way,
    between: (Lsn, Lsn),
) -> Result<Option<WalEnd>, Failure> {
    let found =
        recovering::last_end(repository, lineage, major, way, between, LOOKED_INTO_MAX).await;
    match found {
        Ok(moment) => {
            Ok(moment.map(|moment| WalEnd { at: moment.start, at_ms: moment.at.as_millisecond() }))
        }
        Err(failure) if failure.action.is_retryable() => Err(failure),
        Err(failure) => {
            tracing::debug!("What lies before a gap cannot be looked into: {failure}");
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Seen {
        Seen::test(ms, ms)
    }

    /// After one that took a minute.
    async fn after(found: Result<Found, Failure>) -> Surveys {
        let task = tokio::spawn(async { (found, 60_000) });
        let ended = async {
            while !task.is_finished() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_mins(1), ended).await.unwrap();
        let running = Running { task: AbortOnDropHandle::new(task), known_to: Lsn(7) };
        let mut surveys = Surveys { running: Some(running), ..Surveys::default() };
        let known_to = surveys.ended(at(0)).await.map(|(_, known_to)| known_to);
        assert_eq!(known_to, surveys.failure.is_none().then_some(Lsn(7)));
        surveys
    }

    #[tokio::test]
    async fn a_long_list_is_paid_for_with_a_rest_and_a_failure_is_not() {
        let soon = Duration::from_secs(30);
        let listed = after(Ok(Found::default())).await;
        assert!(!listed.may_begin(soon, at(20 * 60_000 - 1)));
        assert!(listed.may_begin(soon, at(20 * 60_000)));
        let away = Failure::new(Code::StoreUnavailable, Action::Retry, "it is away");
        let failed = after(Err(away)).await;
        assert!(failed.failure.is_some());
        assert!(!failed.may_begin(soon, at(29_999)));
        assert!(failed.may_begin(soon, at(30_000)));
    }
}
