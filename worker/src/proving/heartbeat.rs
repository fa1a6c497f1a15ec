//! Which heartbeats a restored server must have, and which it cannot have; and asking it.
//!
//! A server that stops early says that it is where it was to be: at the end of the log it found, or at the last commit before a
//! time. Heartbeats were written down elsewhere when they were made, so what is missing at the end of the log shows.

use postgres::{Purpose, Target, connect_maintenance};
use proto::proof::{BrokenWal, ProofLevel};
use proto::wal::History;
use proto::{Action, Code, Failure, Heartbeat, Lsn, RecoveryTarget, SystemIdentifier};

use super::Findings;
use crate::context::JobContext;
use crate::jobs;

/// What was restored, and how far it was to go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Restored<'a> {
    pub(super) system_identifier: SystemIdentifier,
    /// The timeline that it followed, and how that came to be as far as it is known.
    pub(super) history: &'a History,
    /// Where its backup ends.
    pub(super) backup_end: Lsn,
    /// The moment behind that which it was to go to, and the same for people.
    pub(super) beyond: Option<(&'a RecoveryTarget, &'a str)>,
    /// Where it says that it ended.
    pub(super) reached: Lsn,
    /// The first transaction that it did not replay.
    pub(super) next_transaction: u64,
}

/// The two heartbeats between which a restored server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Between<'a> {
    /// The newest that it must have.
    last: Option<&'a Heartbeat>,
    /// The oldest that it cannot have.
    next: Option<&'a Heartbeat>,
}

impl<'a> Between<'a> {
    fn of(heartbeats: &'a [Heartbeat], restored: Restored<'_>) -> Self {
        let Restored { system_identifier, history, beyond, reached, .. } = restored;
        let target = beyond.map(|(target, _)| target);
        let is_on_the_way = |heartbeat: &&Heartbeat| {
            let left_at = history.end_of(heartbeat.timeline);
            heartbeat.system_identifier == system_identifier
                && (heartbeat.timeline == history.timeline || left_at >= Some(heartbeat.ended_lsn))
        };
        let mut on_the_way: Vec<&Heartbeat> = heartbeats.iter().filter(is_on_the_way).collect();
        on_the_way.sort_by_key(|heartbeat| heartbeat.ended_lsn);
        let time_ms = match target {
            Some(RecoveryTarget::Time(time)) => Some(time.as_millisecond()),
            _ => None,
        };
        let is_later =
            |heartbeat: &Heartbeat| time_ms.is_some_and(|time_ms| heartbeat.begun_at_ms > time_ms);
        // A server stops before the first commit that is later, also where its clock was set back behind that.
        let before_the_time = on_the_way.iter().take_while(|heartbeat| match target {
            Some(RecoveryTarget::Latest) => true,
            _ => time_ms.is_some_and(|time_ms| heartbeat.ended_at_ms < time_ms),
        });
        let before_the_time = before_the_time.count();
        let must_be_there = |(number, heartbeat): &(usize, &&Heartbeat)| {
            *number < before_the_time || (heartbeat.ended_lsn <= reached && !is_later(heartbeat))
        };
        let last = on_the_way.iter().enumerate().rfind(must_be_there);
        let next = on_the_way.iter().enumerate().find(|(number, heartbeat)| {
            *number >= before_the_time && (heartbeat.begun_lsn >= reached || is_later(heartbeat))
        });
        Self { last: last.map(|(_, last)| *last), next: next.map(|(_, next)| *next) }
    }

    /// What a server that is where it was to be has of them, for people.
    fn told(self, has_last: Option<bool>) -> String {
        let last = self.last.map(|last| match has_last {
            Some(_) => format!("the heartbeat of {} is there", last.at()),
            None => {
                format!("whether the heartbeat of {} is there is not known any more", last.at())
            }
        });
        let next = self.next.map(Heartbeat::at);
        match (last, next) {
            (Some(last), Some(next)) => format!("{last}, the next one known, of {next}, is not"),
            (Some(last), None) => format!("{last}, the last one known"),
            (None, next) => {
                let next = next.unwrap_or_default();
                format!("the first heartbeat known, of {next}, is not there, as it must not be")
            }
        }
    }
}

/// What a restored server has that it cannot have, or has not that it must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong<'a> {
    Missing(&'a Heartbeat),
    TooMuch(&'a Heartbeat),
}

impl<'a> Wrong<'a> {
    /// By what the server says of the two. What it has forgotten says nothing.
    fn of(between: Between<'a>, has_last: Option<bool>, has_next: Option<bool>) -> Option<Self> {
        let missing = between.last.filter(|_| has_last == Some(false)).map(Self::Missing);
        missing.or_else(|| between.next.filter(|_| has_next == Some(true)).map(Self::TooMuch))
    }

    fn heartbeat(self) -> &'a Heartbeat {
        let (Self::Missing(heartbeat) | Self::TooMuch(heartbeat)) = self;
        heartbeat
    }

    fn failure(self, reached: Lsn) -> Failure {
        let heartbeat = self.heartbeat();
        let what = format!(
            "the heartbeat of {} (transaction {}, behind {})",
            heartbeat.at(),
            heartbeat.transaction,
            heartbeat.begun_lsn
        );
        let what = match self {
            Self::Missing(_) => format!(
                "{what} had been archived and is missing: the restored server ended at {reached}"
            ),
            Self::TooMuch(_) => format!(
                "{what} is there, though it was made after the moment that was to be reached: the restored server ended at {reached}"
            ),
        };
        Failure::new(Code::ProofFailed, Action::FixData, what).with_hint(
            "The archive has lost what it had, or another server archives under this name. Take a backup at once, and look at the store.",
        )
    }

    /// The archived WAL that is to blame. A heartbeat from before the end of the backup has to be in the backup alone.
    fn broken_wal(self, restored: &Restored<'_>) -> Option<BrokenWal> {
        let (_, asked) = restored.beyond?;
        let Heartbeat { timeline, begun_lsn, ended_lsn, .. } = *self.heartbeat();
        (ended_lsn > restored.backup_end).then(|| BrokenWal {
            target: asked.to_owned(),
            timeline,
            from: begun_lsn.min(restored.reached),
            to: ended_lsn,
        })
    }
}

/// Asks a restored server for the heartbeats that say how far it came. Notes what it has; one that is missing, or that it cannot
/// have, is the failure of the proof.
pub(super) async fn look(
    cx: &JobContext,
    target: &Target,
    heartbeats: &[Heartbeat],
    restored: Restored<'_>,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let between = Between::of(heartbeats, restored);
    if between == (Between { last: None, next: None }) {
        return Ok(());
    }
    let purpose = Purpose::ask(&jobs::session_owner(cx.spec.attempt));
    let asked = async {
        let session = connect_maintenance(target, &purpose).await?;
        let has = async |heartbeat: Option<&Heartbeat>| match heartbeat {
            Some(heartbeat) => session.has_heartbeat(heartbeat, restored.next_transaction).await,
            None => Ok(None),
        };
        let answers = (has(between.last).await?, has(between.next).await?);
        session.close().await;
        Ok::<_, postgres::Error>(answers)
    };
    let (has_last, has_next) = cx.until_stopped(asked).await??;
    let wrong = Wrong::of(between, has_last, has_next);
    let judged = match wrong {
        None => Ok(between.told(has_last)),
        Some(wrong) => Err(wrong.failure(restored.reached)),
    };
    findings.check("heartbeat", ProofLevel::L3, &judged);
    if let Some(wrong) = wrong {
        // Whatever it says itself, that is not where it was to be.
        findings.recovery = None;
        findings.broken_wal = wrong.broken_wal(&restored);
    } else if has_last == Some(true) {
        findings.heartbeat_at_ms = between.last.map(|last| last.begun_at_ms);
    }
    judged.map(drop)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use proto::Timeline;
    use proto::wal::HistoryEntry;

    use super::*;

    const SYSTEM: SystemIdentifier = SystemIdentifier(7);

    /// One that committed at a hundred times its number, one second after the other.
    fn heartbeat(n: u64) -> Heartbeat {
        let at_ms = i64::try_from(n * 1_000).unwrap();
        Heartbeat {
            system_identifier: SYSTEM,
            timeline: Timeline(1),
            transaction: 700 + n,
            begun_lsn: Lsn(n * 100),
            ended_lsn: Lsn(n * 100 + 50),
            begun_at_ms: at_ms,
            ended_at_ms: at_ms + 5,
        }
    }

    fn on(timeline: u32, heartbeat: Heartbeat) -> Heartbeat {
        Heartbeat { timeline: Timeline(timeline), ..heartbeat }
    }

    fn four() -> Vec<Heartbeat> {
        // In any order: several workers tell of them.
        [3, 1, 4, 2].map(heartbeat).to_vec()
    }

    /// What was restored from a backup that ended at 150.
    fn restored<'a>(
        history: &'a History,
        beyond: Option<(&'a RecoveryTarget, &'a str)>,
        reached: u64,
    ) -> Restored<'a> {
        Restored {
            system_identifier: SYSTEM,
            history,
            backup_end: Lsn(150),
            beyond,
            reached: Lsn(reached),
            next_transaction: 900,
        }
    }

    /// The numbers of the last that must be there and of the first that cannot.
    fn between(
        heartbeats: &[Heartbeat],
        target: Option<&RecoveryTarget>,
        reached: u64,
        history: &History,
    ) -> (Option<u64>, Option<u64>) {
        let beyond = target.map(|target| (target, "there"));
        let Between { last, next } = Between::of(heartbeats, restored(history, beyond, reached));
        let number = |heartbeat: Option<&Heartbeat>| heartbeat.map(|one| one.transaction - 700);
        (number(last), number(next))
    }

    fn time(ms: i64) -> RecoveryTarget {
        RecoveryTarget::Time(Timestamp::from_millisecond(ms).unwrap())
    }

    #[test]
    fn a_position_is_between_two_heartbeats() {
        let at = |reached| between(&four(), None, reached, &History::FIRST);
        assert_eq!(at(99), (None, Some(1)));
        assert_eq!(at(250), (Some(2), Some(3)));
        assert_eq!(at(249), (Some(1), Some(3)), "the second may be there or not");
        assert_eq!(at(200), (Some(1), Some(2)));
        assert_eq!(at(9_000), (Some(4), None));
        assert_eq!(between(&[], None, 9_000, &History::FIRST), (None, None));
        let random = RecoveryTarget::Lsn(Lsn(240));
        assert_eq!(between(&four(), Some(&random), 300, &History::FIRST), (Some(2), Some(3)));
    }

    #[test]
    fn all_that_was_archived_must_be_in_the_latest_moment() {
        let latest =
            |reached| between(&four(), Some(&RecoveryTarget::Latest), reached, &History::FIRST);
        assert_eq!(latest(900), (Some(4), None));
        assert_eq!(latest(120), (Some(4), None), "the log ended early");
    }

    #[test]
    fn a_time_is_between_two_heartbeats_wherever_the_server_stopped() {
        let at = |ms, reached| between(&four(), Some(&time(ms)), reached, &History::FIRST);
        assert_eq!(at(2_500, 280), (Some(2), Some(3)));
        assert_eq!(at(2_500, 120), (Some(2), Some(3)), "it stopped early");
        assert_eq!(at(2_500, 900), (Some(2), Some(3)), "it went too far");
        assert_eq!(at(2_003, 220), (Some(1), Some(3)), "the second may be there or not");
        assert_eq!(at(9_000, 900), (Some(4), None));
    }

    #[test]
    fn behind_a_clock_that_was_ahead_nothing_is_expected_by_its_time() {
        let mut heartbeats = four();
        // The second was made by a clock that was an hour ahead.
        heartbeats[3].begun_at_ms += 3_600_000;
        heartbeats[3].ended_at_ms += 3_600_000;
        let time = time(4_500);
        let found = between(&heartbeats, Some(&time), 199, &History::FIRST);
        assert_eq!(found, (Some(1), Some(2)));
    }

    #[test]
    fn only_heartbeats_on_the_way_count() {
        let history = History {
            timeline: Timeline(3),
            entries: vec![HistoryEntry {
                timeline: Timeline(1),
                switched_at: Lsn(350),
                reason: String::new(),
            }],
        };
        let latest = Some(&RecoveryTarget::Latest);
        assert_eq!(between(&four(), latest, 900, &history), (Some(3), None), "it left there");
        let more = [four(), vec![on(3, heartbeat(5)), on(2, heartbeat(6))]].concat();
        assert_eq!(between(&more, latest, 900, &history), (Some(5), None));
        assert_eq!(between(&more, None, 410, &history), (Some(3), Some(5)));
        let other = four().into_iter();
        let other = other.map(|h| Heartbeat { system_identifier: SystemIdentifier(8), ..h });
        let other: Vec<_> = other.collect();
        assert_eq!(between(&other, latest, 900, &History::FIRST), (None, None));
    }

    #[test]
    fn what_is_missing_or_too_much_is_named() {
        let (first, second) = (heartbeat(1), heartbeat(2));
        let both = Between { last: Some(&first), next: Some(&second) };
        let wrong = |has_last, has_next| Wrong::of(both, has_last, has_next);
        let (yes, no) = (Some(true), Some(false));
        assert_eq!(wrong(yes, no), None);
        assert_eq!(wrong(None, None), None, "it has forgotten both");
        assert_eq!(wrong(no, yes), Some(Wrong::Missing(&first)));
        assert_eq!(wrong(yes, yes), Some(Wrong::TooMuch(&second)));
        let good = both.told(yes);
        assert!(
            good.starts_with("the heartbeat of 1970-01-01T00:00:01Z is there, the next"),
            "{good}"
        );
        let missing = Wrong::Missing(&first).failure(Lsn(0x180));
        assert_eq!(missing.code, Code::ProofFailed);
        assert!(missing.message.contains("00:00:01Z (transaction 701, behind 0/64)"), "{missing}");
        assert!(
            missing.message.ends_with("is missing: the restored server ended at 0/180"),
            "{missing}"
        );
        let after = Wrong::TooMuch(&second).failure(Lsn(0x180));
        assert!(after.message.contains("00:00:02Z (transaction 702"), "{after}");
        assert!(after.message.contains("after the moment"), "{after}");
    }

    #[test]
    fn behind_its_backup_the_archived_wal_is_to_blame_and_before_that_the_backup() {
        let (first, second) = (heartbeat(1), heartbeat(2));
        let latest = RecoveryTarget::Latest;
        let broken = |wrong: Wrong<'_>, beyond, reached| {
            let broken = wrong.broken_wal(&restored(&History::FIRST, beyond, reached))?;
            Some((broken.target, broken.timeline.0, broken.from.0, broken.to.0))
        };
        let beyond = Some((&latest, "the end of the WAL"));
        let found = |from, to| Some(("the end of the WAL".to_owned(), 1, from, to));
        assert_eq!(broken(Wrong::Missing(&second), beyond, 160), found(160, 250), "it broke off");
        assert_eq!(broken(Wrong::Missing(&second), beyond, 900), found(200, 250));
        assert_eq!(broken(Wrong::TooMuch(&second), beyond, 190), found(190, 250));
        assert_eq!(broken(Wrong::Missing(&first), beyond, 900), None, "the backup has to have it");
        assert_eq!(broken(Wrong::Missing(&second), None, 160), None, "nothing else was replayed");
    }
}
