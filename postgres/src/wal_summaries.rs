//! The summaries that a server with `summarize_wal = on` (PostgreSQL 17 and later) makes of its log: which blocks changed between
//! the starts of two backups, asked for in SQL.
//!
//! As the server's own incremental backup does it (`basebackup_incremental.c`): every summary from the **start** of the earlier backup to
//! the start of the later one, along the server's own history, without a hole; the last of them may have to be waited for. The
//! start of the earlier one, because its files were read from then on, each at another time.

use std::time::Duration;

use futures::TryStreamExt as _;
use proto::backup::{BackupFacts, SummariesUsed};
use proto::wal::History;
use proto::{JobId, Lsn, Timeline};
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use crate::backup_session::{Started, position};
use crate::changed_blocks::{ChangedBlocks, RelationName, TooMany};
use crate::connect::{Purpose, connect_maintenance};
use crate::error::{During as _, Error};
use crate::quote;
use crate::session::Session;
use crate::target::Target;

/// The first major version that has them.
const FIRST_MAJOR: u32 = 17;
/// A summarizer that has not moved for so long is not waited for: it looks every 30 seconds when it has nothing to do.
const STILL_MAX: Duration = Duration::from_mins(1);
/// Nor is one that gets on and is not there after so long. Files can be read whole instead.
const WAIT_MAX: Duration = Duration::from_mins(10);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// To tell what is in all summaries.
const READ_MAX: Duration = Duration::from_mins(2);

/// Why a backup does without.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// The server is too old.
    #[error("PostgreSQL {0} makes no summaries of its WAL")]
    Version(u32),
    /// The server makes none.
    #[error("summarize_wal is off; where it is on, only their changed pages are")]
    Off,
    /// They would lead from nowhere, or from somewhere else.
    #[error("{0}")]
    Unfit(&'static str),
    /// The server's log did not come from there.
    #[error(
        "the backup before ended at {stop} on timeline {timeline}, from which the server's log does not lead"
    )]
    Stranger {
        /// Of the earlier backup.
        timeline: Timeline,
        /// Of the earlier backup.
        stop: Lsn,
    },
    /// There is more in them than is worth it.
    #[error("the server did not tell what is in its summaries within {} s", READ_MAX.as_secs())]
    Slow,
    /// As after a quiet time on a standby: both start from one checkpoint.
    #[error("the backup before ended at {stop}, behind {start}, where this one starts")]
    Overlap {
        /// The end of the earlier backup.
        stop: Lsn,
        /// The start of this one.
        start: Lsn,
    },
    /// A hole.
    #[error("the server has no WAL summary of timeline {timeline} from {from} on")]
    Missing {
        /// Where.
        timeline: Timeline,
        /// The first position of which there is none.
        from: Lsn,
    },
    /// The last one does not come.
    #[error("the server's WAL summarizer has not moved from {at} for {} s, and is needed at {needed}", STILL_MAX.as_secs())]
    Still {
        /// Where it is.
        at: Lsn,
        /// How far it had to get.
        needed: Lsn,
    },
    /// It comes too late.
    #[error("the server's WAL summarizer was at {at} and not at {needed} after {} s", WAIT_MAX.as_secs())]
    Behind {
        /// How far it got.
        at: Lsn,
        /// How far it had to get.
        needed: Lsn,
    },
    /// The role may not ask.
    #[error("the role may not read WAL summaries: {grant}")]
    NotAllowed {
        /// What would help.
        grant: String,
    },
    /// More blocks changed than are kept in memory.
    #[error(transparent)]
    TooMany(#[from] TooMany),
    /// The server did not say.
    #[error("{}", proto::failure::chain(.0))]
    Failed(#[from] Error),
}

/// A stretch of the log of one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    timeline: Timeline,
    from: Lsn,
    to: Lsn,
}

/// A summary by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Summary {
    timeline: Timeline,
    start: Lsn,
    end: Lsn,
}

/// What an earlier backup must say of itself, for summaries to tell what changed since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Earlier {
    timeline: Timeline,
    start: Lsn,
    stop: Lsn,
}

impl Earlier {
    /// Looks whether summaries may lead from an earlier backup to one that has started; asks nobody.
    pub fn of(facts: Option<&BackupFacts>, started: &Started) -> Result<Self, Unusable> {
        let server = &started.server;
        if server.version.major() < FIRST_MAJOR {
            return Err(Unusable::Version(server.version.major()));
        }
        let facts = facts.ok_or(Unusable::Unfit("there is no backup to compare with"))?;
        let reading = facts.reading.as_ref();
        let reading = reading
            .ok_or(Unusable::Unfit("the backup before does not say when its server was started"))?;
        if facts.system_identifier != server.system_identifier
            || reading.server_started_at_ms != server.started_at_ms
        {
            // A stopped server's files may be set back, or changed by other programs.
            return Err(Unusable::Unfit(
                "the server was started after the backup before, or it is another one",
            ));
        }
        if facts.stop_lsn > started.start_lsn {
            return Err(Unusable::Overlap { stop: facts.stop_lsn, start: started.start_lsn });
        }
        Ok(Self { timeline: facts.timeline, start: facts.start_lsn, stop: facts.stop_lsn })
    }

    /// The timeline of the earlier backup.
    pub fn timeline(&self) -> Timeline {
        self.timeline
    }

    /// The log from its start to the start of a later backup, along the history of the timeline on which that one started.
    fn stretches(&self, history: &History, to: Lsn) -> Result<Vec<Stretch>, Unusable> {
        let Self { timeline, start, stop } = *self;
        let stranger = Unusable::Stranger { timeline, stop };
        let mut stretches = Vec::new();
        let mut from = start;
        if timeline != history.timeline {
            // A history whose positions go back is one that nobody followed as it stands.
            let positions = || history.entries.iter().map(|entry| entry.switched_at);
            let left_at = history.end_of(timeline).filter(|left_at| *left_at >= stop);
            if left_at.is_none() || !positions().is_sorted() || positions().any(|at| at > to) {
                return Err(stranger);
            }
            for entry in history.entries.iter().skip_while(|entry| entry.timeline != timeline) {
                let (timeline, to) = (entry.timeline, entry.switched_at);
                stretches.push(Stretch { timeline, from, to });
                from = to;
            }
        }
        stretches.push(Stretch { timeline: history.timeline, from, to });
        Ok(stretches)
    }
}

/// Reads what changed from `earlier` to the start of a backup. `history` is that of the timeline on which it started. May take
/// minutes: call it beside the watch over the backup, which stores the WAL meanwhile.
pub async fn changed_blocks(
    target: &Target,
    job: &JobId,
    started: &Started,
    earlier: &Earlier,
    history: &History,
) -> Result<(ChangedBlocks, SummariesUsed), Unusable> {
    changed_within(WAIT_MAX + READ_MAX, target, job, started, earlier, history).await
}

async fn changed_within(
    all_max: Duration,
    target: &Target,
    job: &JobId,
    started: &Started,
    earlier: &Earlier,
    history: &History,
) -> Result<(ChangedBlocks, SummariesUsed), Unusable> {
    let stretches = earlier.stretches(history, started.start_lsn)?;
    let purpose = Purpose { statement_timeout: READ_MAX, ..Purpose::ask(job) };
    let session = connect_maintenance(target, &purpose).await?;
    let asked = async {
        if session.identity().await?.started_at_ms != started.server.started_at_ms {
            return Err(Unusable::Unfit("the connection leads to several servers"));
        }
        let summaries = complete(&session, &stretches).await?;
        let mut blocks = ChangedBlocks::default();
        let reading = async {
            for summary in &summaries {
                read(&session, *summary, &mut blocks).await?;
            }
            Ok(())
        };
        tokio::time::timeout(READ_MAX, reading).await.unwrap_or(Err(Unusable::Slow))?;
        let count = summaries.len() as u64;
        Ok((blocks, SummariesUsed { since: earlier.start, count }))
    };
    let asked = tokio::time::timeout(all_max, asked).await;
    let asked = asked.unwrap_or(Err(Unusable::Slow));
    let asked = asked.map_err(|error| or_not_allowed(error, &session));
    session.close().await;
    asked
}

/// Where the summarizer is.
#[derive(Debug, Clone, Copy)]
struct Summarizer {
    /// The end of its last summary.
    done: Lsn,
    /// What it has read of the log.
    at: Lsn,
}

/// How long it is waited for: as long as it gets on, within a bound.
#[derive(Debug)]
struct Patience {
    began: Instant,
    at: Lsn,
    moved: Instant,
}

impl Patience {
    fn new(at: Lsn, now: Instant) -> Self {
        Self { began: now, at, moved: now }
    }

    fn with(&mut self, at: Lsn, needed: Lsn, now: Instant) -> Result<(), Unusable> {
        if at > self.at {
            (self.at, self.moved) = (at, now);
        }
        if now.duration_since(self.moved) >= STILL_MAX {
            return Err(Unusable::Still { at, needed });
        }
        if now.duration_since(self.began) >= WAIT_MAX {
            return Err(Unusable::Behind { at, needed });
        }
        Ok(())
    }
}

/// The summaries of these stretches, without a hole. Waits for the last of them.
async fn complete(session: &Session, stretches: &[Stretch]) -> Result<Vec<Summary>, Unusable> {
    let mut state = summarizer(session).await?;
    let mut patience = Patience::new(state.at, Instant::now());
    loop {
        // In this order: what the summarizer has done by then is on the list.
        let done = state.done;
        let all = available(session).await?;
        let mut wanted = Vec::new();
        let mut hole = None;
        for stretch in stretches {
            let here = |summary: &&Summary| summary.overlaps(*stretch);
            wanted.extend(all.iter().filter(here).copied());
            hole = hole.or_else(|| stretch.first_hole(&all));
        }
        let Some((timeline, from)) = hole else { return Ok(wanted) };
        let needed = stretches.last().map_or(from, |last| last.to);
        // It never goes back to what it has passed.
        if from < done || done >= needed {
            return Err(Unusable::Missing { timeline, from });
        }
        while state.done == done {
            patience.with(state.at, needed, Instant::now())?;
            tokio::time::sleep(LOOK_EVERY).await;
            state = summarizer(session).await?;
        }
    }
}

impl Summary {
    fn overlaps(self, stretch: Stretch) -> bool {
        self.timeline == stretch.timeline && self.end > stretch.from && self.start < stretch.to
    }
}

impl Stretch {
    /// The first position of which there is no summary.
    fn first_hole(self, all: &[Summary]) -> Option<(Timeline, Lsn)> {
        let mut here: Vec<_> = all.iter().filter(|summary| summary.overlaps(self)).collect();
        here.sort_by_key(|summary| summary.start);
        let mut known = self.from;
        for summary in here {
            if summary.start > known {
                break;
            }
            known = known.max(summary.end);
        }
        (known < self.to).then_some((self.timeline, known))
    }
}

/// How far the summarizer got.
async fn summarizer(session: &Session) -> Result<Summarizer, Unusable> {
    let what = "ask how far the WAL is summarized";
    let sql = "\
-- pgmuster: the WAL summarizer
SELECT current_setting('summarize_wal')::bool, summarized_lsn::text, greatest(summarized_lsn, pending_lsn)::text
  FROM pg_get_wal_summarizer_state()";
    let row = session.one(what, sql, &[]).await?;
    if !row.get::<_, bool>(0) {
        return Err(Unusable::Off);
    }
    Ok(Summarizer { done: position(what, row.get(1))?, at: position(what, row.get(2))? })
}

async fn available(session: &Session) -> Result<Vec<Summary>, Error> {
    let what = "list the WAL summaries";
    let sql = "\
-- pgmuster: WAL summaries
SELECT tli, start_lsn::text, end_lsn::text FROM pg_available_wal_summaries()";
    let rows = session.query(what, sql, &[]).await?;
    let summaries = rows.iter().map(|row| {
        let timeline = u32::try_from(row.get::<_, i64>(0)).unwrap_or_default();
        Ok(Summary {
            timeline: Timeline(timeline),
            start: position(what, row.get(1))?,
            end: position(what, row.get(2))?,
        })
    });
    summaries.collect()
}

/// Adds what one summary says. It has a row for each block; they are never all in memory here.
async fn read(
    session: &Session,
    summary: Summary,
    blocks: &mut ChangedBlocks,
) -> Result<(), Unusable> {
    let what = "read a WAL summary";
    let sql = "\
-- pgmuster: a WAL summary
SELECT reltablespace, reldatabase, relfilenode, relblocknumber, is_limit_block
  FROM pg_wal_summary_contents($1, $2::text::pg_lsn, $3::text::pg_lsn) WHERE relforknumber = 0";
    let Summary { timeline, start, end } = summary;
    let (timeline, start, end) = (i64::from(timeline.0), start.to_string(), end.to_string());
    let parameters: [&(dyn ToSql + Sync); 3] = [&timeline, &start, &end];
    let rows = session.client().query_raw(sql, parameters).await.during(what)?;
    let mut rows = std::pin::pin!(rows);
    while let Some(row) = rows.try_next().await.during(what)? {
        let relation =
            RelationName { tablespace: row.get(0), database: row.get(1), filenode: row.get(2) };
        let block: i64 = row.get(3);
        let block = u32::try_from(block)
            .map_err(|_| Error::Answer { what: what.to_owned(), answer: block.to_string() })?;
        if row.get::<_, bool>(4) {
            blocks.add_length(relation, block)?;
        } else {
            blocks.add_block(relation, block)?;
        }
    }
    Ok(())
}

fn or_not_allowed(error: Unusable, session: &Session) -> Unusable {
    match error {
        Unusable::Failed(error) if error.state() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            let grant = format!(
                "GRANT EXECUTE ON FUNCTION pg_get_wal_summarizer_state(), pg_available_wal_summaries(), \
                 pg_wal_summary_contents(bigint, pg_lsn, pg_lsn) TO {};",
                quote::identifier(session.user())
            );
            Unusable::NotAllowed { grant }
        }
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use proto::SystemIdentifier;
    use proto::backup::Reading;

    use super::*;
    use crate::binaries::Binaries;
    use crate::identity::ServerIdentity;
    use crate::instance::{Instance, InstanceOptions};
    use crate::target::Environment;
    use crate::version::ServerVersion;

    #[tokio::test]
    async fn a_server_that_does_not_tell_in_time_is_asked_no_longer() {
        let binaries = Binaries::of_the_suite(18).await;
        let place = tempfile::tempdir().unwrap();
        let settings = vec![("summarize_wal".to_owned(), "on".to_owned())];
        let options = InstanceOptions { fsync: false, settings, ..InstanceOptions::default() };
        let mut server =
            Instance::create(&binaries, &place.path().join("c"), options).await.unwrap();
        server.start().await.unwrap();
        let target = Target::parse(&server.url("postgres"), &Environment::default()).unwrap();
        let job = JobId::mint(1, [1; 10]);
        let session = connect_maintenance(&target, &Purpose::ask(&job)).await.unwrap();
        let identity = session.identity().await.unwrap();
        session.close().await;
        // Where its log will be one day: the summarizer may still get there.
        let (start, later) = (Lsn(1 << 40), Lsn(1 << 41));
        let started = Started {
            start_lsn: later,
            timeline: Timeline(1),
            server: identity,
            slot_name: String::new(),
            held_from: later,
        };
        let earlier = Earlier { timeline: Timeline(1), start, stop: start };
        let history = History::parse(Timeline(1), "").unwrap();
        let all_max = Duration::from_millis(300);
        let asked = changed_within(all_max, &target, &job, &started, &earlier, &history).await;
        assert!(matches!(asked, Err(Unusable::Slow)), "{asked:?}");
    }

    fn summary(timeline: u32, start: u64, end: u64) -> Summary {
        Summary { timeline: Timeline(timeline), start: Lsn(start), end: Lsn(end) }
    }

    fn stretch(timeline: u32, from: u64, to: u64) -> Stretch {
        Stretch { timeline: Timeline(timeline), from: Lsn(from), to: Lsn(to) }
    }

    #[test]
    fn a_hole_is_found_wherever_it_is() {
        let hole = |all: &[Summary]| stretch(1, 100, 200).first_hole(all).map(|(_, at)| at.0);
        assert_eq!(hole(&[summary(1, 100, 200)]), None);
        assert_eq!(hole(&[summary(1, 50, 250)]), None);
        assert_eq!(hole(&[summary(1, 150, 200), summary(1, 90, 150)]), None, "in any order");
        assert_eq!(hole(&[summary(1, 90, 170), summary(1, 120, 130), summary(1, 150, 300)]), None);
        assert_eq!(hole(&[]), Some(100));
        assert_eq!(hole(&[summary(1, 101, 200)]), Some(100));
        assert_eq!(hole(&[summary(1, 50, 100), summary(1, 200, 300)]), Some(100));
        assert_eq!(hole(&[summary(1, 100, 150), summary(1, 151, 200)]), Some(150));
        assert_eq!(hole(&[summary(1, 100, 199)]), Some(199));
        assert_eq!(hole(&[summary(2, 100, 200)]), Some(100), "another timeline's");
        assert_eq!(stretch(1, 100, 100).first_hole(&[]), None, "nothing happened");
    }

    fn stretches(
        timeline: u32,
        target: u32,
        entries: &[(u32, u64)],
        to: u64,
    ) -> Result<Vec<Stretch>, Unusable> {
        let earlier = Earlier { timeline: Timeline(timeline), start: Lsn(100), stop: Lsn(150) };
        let lines: Vec<String> =
            entries.iter().map(|(number, at)| format!("{number}\t{}\twhy", Lsn(*at))).collect();
        let history = History::parse(Timeline(target), &lines.join("\n")).unwrap();
        earlier.stretches(&history, Lsn(to))
    }

    #[test]
    fn a_summarizer_that_gets_on_is_waited_for_within_a_bound() {
        let began = Instant::now();
        let at = |patience: &mut Patience, position, seconds| {
            patience.with(Lsn(position), Lsn(900), began + Duration::from_secs(seconds))
        };
        let mut patience = Patience::new(Lsn(100), began);
        at(&mut patience, 100, 59).unwrap();
        // It has moved at the last moment, and once more much later.
        at(&mut patience, 101, 60).unwrap();
        at(&mut patience, 101, 119).unwrap();
        let still = at(&mut patience, 101, 120).unwrap_err();
        assert!(matches!(still, Unusable::Still { at: Lsn(101), needed: Lsn(900) }), "{still:?}");
        assert!(still.to_string().contains("has not moved from 0/65 for 60 s"), "{still}");

        let mut patience = Patience::new(Lsn(100), began);
        for step in 1..20 {
            at(&mut patience, 100 + step, step * 30).unwrap();
        }
        let late = at(&mut patience, 200, 600).unwrap_err();
        assert!(matches!(late, Unusable::Behind { at: Lsn(200), needed: Lsn(900) }), "{late:?}");
    }

    /// A backup and the start of the next one, on a server of that version that was started then.
    fn earlier(
        major: u32,
        started_at_ms: i64,
        start: u64,
        change: impl FnOnce(&mut BackupFacts),
    ) -> Result<Earlier, Unusable> {
        let reading = Reading {
            server_started_at_ms: 5,
            read_bytes: 0,
            unread_bytes: 0,
            summaries: None,
            silent_changes: None,
            whole_files: None,
        };
        let mut facts = BackupFacts {
            cluster: "c".parse().unwrap(),
            system_identifier: SystemIdentifier(7),
            server_version_num: 180_000,
            catalog_version: 1,
            block_size: 8192,
            wal_segment_size: 16 << 20,
            data_checksums: true,
            timeline: Timeline(2),
            start_lsn: Lsn(100),
            stop_lsn: Lsn(150),
            started_at_ms: 1,
            stopped_at_ms: 2,
            backup_label: String::new(),
            tablespace_map: String::new(),
            tablespaces: Vec::new(),
            settings: Vec::new(),
            census: None,
            bad_pages: Vec::new(),
            reading: Some(reading),
            logical: None,
        };
        change(&mut facts);
        let server = ServerIdentity {
            version: ServerVersion(major * 10_000),
            system_identifier: SystemIdentifier(7),
            backend_pid: 1,
            in_recovery: false,
            data_directory: None,
            socket_directories: Vec::new(),
            port: 5432,
            block_size: 8192,
            relation_segment_size: 1 << 30,
            wal_segment_size: 16 << 20,
            data_checksums: true,
            timeline: Timeline(2),
            checkpoint_lsn: Lsn(start),
            redo_lsn: Lsn(start),
            started_at_ms,
            database: "postgres".into(),
            role: "postgres".into(),
            may_replicate: true,
            superuser: true,
            reads_all: true,
        };
        let started = Started {
            start_lsn: Lsn(start),
            timeline: Timeline(2),
            server,
            slot_name: String::new(),
            held_from: Lsn(start),
        };
        Earlier::of(Some(&facts), &started)
    }

    #[test]
    fn changes_begin_with_the_start_of_a_backup_that_ended_before_on_the_same_running_server() {
        let found = earlier(18, 5, 150, |_| ()).unwrap();
        assert_eq!(found, Earlier { timeline: Timeline(2), start: Lsn(100), stop: Lsn(150) });
        assert!(matches!(earlier(16, 5, 150, |_| ()), Err(Unusable::Version(16))));
        let overlap = earlier(18, 5, 149, |_| ());
        assert!(matches!(overlap, Err(Unusable::Overlap { stop: Lsn(150), start: Lsn(149) })));
        for unfit in [
            earlier(18, 6, 150, |_| ()),
            earlier(18, 5, 150, |facts| facts.reading = None),
            earlier(18, 5, 150, |facts| facts.system_identifier = SystemIdentifier(8)),
        ] {
            assert!(matches!(unfit, Err(Unusable::Unfit(_))), "{unfit:?}");
        }
    }

    #[test]
    fn the_way_follows_the_servers_own_history() {
        let way =
            |timeline, target, entries: &[_]| stretches(timeline, target, entries, 300).unwrap();
        assert_eq!(way(1, 1, &[]), [stretch(1, 100, 300)]);
        assert_eq!(way(3, 3, &[(1, 10), (2, 20)]), [stretch(3, 100, 300)]);
        assert_eq!(
            way(1, 4, &[(1, 150), (3, 220)]),
            [stretch(1, 100, 150), stretch(3, 150, 220), stretch(4, 220, 300)]
        );
        let refused = |timeline, target, entries: &[_]| {
            let error = stretches(timeline, target, entries, 300).unwrap_err();
            assert!(matches!(error, Unusable::Stranger { .. }), "{error:?}");
            assert!(error.to_string().contains("0/96"), "{error}");
        };
        refused(2, 3, &[(1, 200)]);
        refused(2, 1, &[]);
        // Left before the backup was complete; a history that goes back; one that comes after.
        refused(1, 2, &[(1, 149)]);
        refused(1, 3, &[(1, 250), (2, 200)]);
        refused(1, 2, &[(1, 301)]);
    }
}
