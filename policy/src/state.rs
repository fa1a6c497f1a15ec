//! Whether a cluster can be recovered to its target, and how we know.
//!
//! Says what is known, not what is hoped: whatever has no fresh information is `UNKNOWN`, never green.

use std::fmt;
use std::str::FromStr;

use proto::failure::Failure;
use proto::message::{RepositoryAway, WalBacklog, WalStanding};
use proto::proof::PITR;
use proto::{Lsn, ProofLevel, Timeline};
use serde::{Deserialize, Serialize};

use crate::broken::BrokenStretch;
use crate::reach::{BackupEnd, archive_silence, archive_trouble};
use crate::recoverable::{RecoveryPoint, standing_failure};
use crate::recovery_time::RecoveryTime;
use crate::repository;
use crate::target;
use crate::words::{count, duration, grouped, span};

macro_rules! states {
    ($($(#[$doc:meta])* $state:ident = $text:literal,)*) => {
        /// Where a cluster stands. The order is the order of urgency, worst first.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum ClusterState {
            $($(#[$doc])* #[serde(rename = $text)] $state,)*
        }

        impl ClusterState {
            /// Every state, worst first.
            pub const ALL: &[Self] = &[$(Self::$state,)*];

            /// The state as people see it.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$state => $text,)* }
            }
        }
    };
}

states! {
    /// A target is missed.
    Broken = "BROKEN",
    /// Nothing fresh is known.
    Unknown = "UNKNOWN",
    /// One step from missing a target.
    AtRisk = "AT_RISK",
    /// Registered; the first backup has not been taken.
    Pending = "PENDING",
    /// Recoverable on paper.
    Taken = "TAKEN",
    /// Recoverable to target, and the proof is fresh.
    Proved = "PROVED",
    /// Left out until a date, by somebody, for a reason.
    Exempt = "EXEMPT",
}

impl ClusterState {
    /// Whether people should look at it now.
    pub fn is_finding(self) -> bool {
        match self {
            Self::Broken | Self::Unknown | Self::AtRisk => true,
            Self::Pending | Self::Taken | Self::Proved | Self::Exempt => false,
        }
    }
}

impl fmt::Display for ClusterState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A text that is no cluster state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("know the cluster state {0:?}")]
pub struct UnknownState(String);

impl FromStr for ClusterState {
    type Err = UnknownState;

    fn from_str(text: &str) -> Result<Self, UnknownState> {
        Self::ALL
            .iter()
            .copied()
            .find(|state| state.as_str().eq_ignore_ascii_case(text))
            .ok_or_else(|| UnknownState(text.chars().take(40).collect()))
    }
}

/// What was promised for a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Objectives {
    /// The least a proof must show.
    pub proof_level: ProofLevel,
    /// How old a proof may be, milliseconds.
    pub proof_age_max_ms: i64,
    /// How old the newest backup may be, milliseconds; `None` when nothing was promised.
    pub backup_age_max_ms: Option<i64>,
    /// How long the workers of a cluster may be silent, milliseconds.
    pub silence_max_ms: i64,
    /// How long a full segment of WAL may take into the archive, milliseconds.
    pub wal_delay_max_ms: i64,
    /// How long nothing may be seen of an archive while its workers speak, milliseconds.
    pub archive_silence_max_ms: i64,
    /// How old the recovery point may be, milliseconds; `None` when nothing was promised.
    pub recovery_point_max_ms: Option<i64>,
    /// How long a recovery may take, milliseconds; `None` when nothing was promised.
    pub recovery_time_max_ms: Option<i64>,
}

impl Default for Objectives {
    fn default() -> Self {
        Self {
            proof_level: ProofLevel::L4,
            proof_age_max_ms: 7 * 86_400_000,
            backup_age_max_ms: None,
            silence_max_ms: 60_000,
            wal_delay_max_ms: 30_000,
            archive_silence_max_ms: 120_000,
            recovery_point_max_ms: None,
            recovery_time_max_ms: None,
        }
    }
}

/// The newest committed backup of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupFact {
    /// What a restore of it brings back, Unix milliseconds.
    pub stopped_at_ms: i64,
    /// How many databases are in it, where it is a dump that leaves out others: it is no backup of the cluster then.
    pub part_of: Option<u64>,
    /// Pages of the server that failed their checksum, and are in it as they are.
    pub bad_pages: u64,
    /// Units of files that had changed although times and sizes of the files had not.
    pub silent_changes: u64,
}

/// Databases that the newest dump of a cluster lacks although it was to have them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Undumped {
    /// Which.
    pub databases: Vec<String>,
    /// Why the first one could not be dumped.
    pub why: String,
}

impl Undumped {
    /// What it means beside the newest backup, which may have them.
    fn reason(&self, backup: BackupFact, now_ms: i64) -> String {
        let names = self.databases.join(", ");
        let what = if self.databases.len() == 1 { "database" } else { "databases" };
        let how = if self.databases.len() == 1 { "it" } else { "them" };
        let elsewhere = if backup.part_of.is_some() {
            format!("no backup of the whole cluster has {how}")
        } else {
            let age = span(now_ms.saturating_sub(backup.stopped_at_ms));
            format!("the newest backup of the whole cluster is {age} old")
        };
        format!("{what} {names} could not be dumped, and {elsewhere}: {}", self.why)
    }
}

/// A proof of that backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProofFact {
    /// When it ended, Unix milliseconds.
    pub at_ms: i64,
    /// What was asked for.
    pub level: ProofLevel,
    /// Whether that was reached.
    pub passed: bool,
    /// Milliseconds a recovery took, without the checks.
    pub recovery_time_ms: u64,
    /// User tables seen.
    pub tables: u64,
    /// How far it replayed archived WAL behind the end of the backup; `None` when it did not.
    pub replayed_to: Option<ReplayedTo>,
    /// Assertions of which it is known that they do not hold, where nothing else is wrong.
    pub unmet: u64,
    /// Assertions that could not be asked, of which nothing is known.
    pub unasked: u64,
}

/// How far archived WAL was replayed. Positions of two timelines say nothing of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplayedTo {
    /// The timeline that was followed.
    pub timeline: Timeline,
    /// The end.
    pub lsn: Lsn,
}

impl ReplayedTo {
    /// Whether everything was replayed that `other` was. Where they followed two timelines nobody knows: one may have left the
    /// other before.
    pub(crate) fn includes(self, other: Self) -> bool {
        self.timeline == other.timeline && self.lsn >= other.lsn
    }
}

/// What is known of a cluster.
#[derive(Debug, Clone, Default)]
pub struct ClusterFacts {
    /// When it was first announced, Unix milliseconds: what was committed before was promised to nobody.
    pub registered_at_ms: i64,
    /// The last pulse of a worker that serves it, Unix milliseconds.
    pub seen_at_ms: Option<i64>,
    /// Since when no two pulses were further apart than workers may be silent, Unix milliseconds.
    pub contact_since_ms: Option<i64>,
    /// What its worker says stands in the way.
    pub problem: Option<Failure>,
    /// Whether any worker announced a repository for it.
    pub has_repository: bool,
    /// The newest backup.
    pub backup: Option<BackupFact>,
    /// What its newest dump lacks because it could not be dumped.
    pub undumped: Option<Undumped>,
    /// Proofs of the newest backup, in any order: all that say anything which later ones do not.
    pub proofs: Vec<ProofFact>,
    /// The failure of the newest backup job that ended, when it did not succeed.
    pub backup_failure: Option<Failure>,
    /// Where the newest physical backup ends.
    pub backup_end: Option<BackupEnd>,
    /// Up to when it can be recovered from backups that are proved.
    pub recoverable: Option<RecoveryPoint>,
    /// How long a recovery would take now, as its proofs and restores measured.
    pub recovery_time: Option<RecoveryTime>,
    /// How the archive of its WAL stands, where it archives into its repository.
    pub wal: Option<WalStanding>,
    /// Archived WAL that a recovery from the newest backup cannot get past, as a proof found.
    pub broken_wal: Option<BrokenStretch>,
    /// What its server keeps because that is not archived.
    pub backlog: Option<WalBacklog>,
    /// It had backups, and its repository has none of them any more.
    pub is_robbed: bool,
    /// Its repository is not there, or does not let itself be looked into.
    pub repository_away: Option<RepositoryAway>,
}

/// A state and the sentence that explains it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// The state.
    pub state: ClusterState,
    /// Why, one sentence without a period.
    pub reason: String,
}

impl Judgement {
    fn new(state: ClusterState, reason: impl Into<String>) -> Self {
        Self { state, reason: reason.into() }
    }
}

/// Judges a cluster. What is certainly broken is said even while its worker is silent.
pub fn judge_cluster(facts: &ClusterFacts, objectives: &Objectives, now_ms: i64) -> Judgement {
    use ClusterState::{AtRisk, Broken, Pending, Proved, Taken, Unknown};

    if let Some(reason) =
        broken(facts, objectives, now_ms).or_else(|| target::missed(facts, objectives, now_ms))
    {
        return Judgement::new(Broken, reason);
    }
    match facts.seen_at_ms {
        None => return Judgement::new(Unknown, "no worker has announced it"),
        Some(seen) if now_ms.saturating_sub(seen) > objectives.silence_max_ms => {
            let silence = span(now_ms - seen);
            return Judgement::new(Unknown, format!("no contact with its worker for {silence}"));
        }
        Some(_) => {}
    }
    let Some(backup) = facts.backup else {
        let away = facts.repository_away.as_ref().map(|away| &away.failure);
        return match facts.problem.as_ref().or(away) {
            Some(problem) => Judgement::new(AtRisk, format!("it cannot be backed up: {problem}")),
            None if !facts.has_repository => {
                Judgement::new(AtRisk, "its worker has no repository for it")
            }
            None => Judgement::new(Pending, "no backup has been taken yet"),
        };
    };
    if let Some(reason) = repository::unseen(facts.repository_away.as_ref(), now_ms) {
        return Judgement::new(AtRisk, reason);
    }
    if let Some(failure) = &facts.backup_failure {
        return Judgement::new(AtRisk, format!("its last backup failed: {failure}"));
    }
    if let Some(problem) = &facts.problem {
        return Judgement::new(AtRisk, format!("it cannot be backed up now: {problem}"));
    }
    if let Some(undumped) = &facts.undumped {
        return Judgement::new(AtRisk, undumped.reason(backup, now_ms));
    }
    if let Some(databases) = backup.part_of {
        let what = count(databases, "database");
        let reason = format!(
            "its newest backup is a dump of {what} and leaves out others; there is none of the whole cluster"
        );
        return Judgement::new(AtRisk, reason);
    }
    if backup.bad_pages > 0 {
        let pages = count(backup.bad_pages, "page");
        let reason =
            format!("{pages} with a wrong checksum in its newest backup, as on the server");
        return Judgement::new(AtRisk, reason);
    }
    if let Some(trouble) = trouble(facts, objectives, now_ms) {
        return Judgement::new(AtRisk, trouble);
    }
    if let Some(reason) = target::nearly_missed(facts, objectives, now_ms) {
        return Judgement::new(AtRisk, reason);
    }
    if backup.silent_changes > 0 {
        let units = count(backup.silent_changes, "unit");
        let reason = format!(
            "{units} of files had changed in its newest backup though times and sizes had not (SILENT_CHANGE): the next one reads everything"
        );
        return Judgement::new(AtRisk, reason);
    }
    let age = now_ms.saturating_sub(backup.stopped_at_ms);
    if let Some(limit) = objectives.backup_age_max_ms
        && age.saturating_mul(5) > limit.saturating_mul(4)
    {
        let reason =
            format!("its newest backup is {} old, the limit is {}", span(age), span(limit));
        return Judgement::new(AtRisk, reason);
    }
    let wanted = objectives.proof_level;
    let limit = objectives.proof_age_max_ms;
    let passed = facts.proofs.iter().filter(|p| p.passed);
    let best = passed.clone().filter(|p| p.level >= wanted).max_by_key(|p| p.at_ms);
    match best {
        Some(proof)
            if now_ms.saturating_sub(proof.at_ms) < limit
                && let Some(reason) = target::unmeasured(facts, objectives) =>
        {
            Judgement::new(Taken, reason)
        }
        Some(proof) if now_ms.saturating_sub(proof.at_ms) < limit => {
            let counts = facts.proofs.iter().filter(|p| {
                p.passed && p.level >= wanted && now_ms.saturating_sub(p.at_ms) < limit
            });
            Judgement::new(Proved, proved(counts, now_ms).unwrap_or_default())
        }
        Some(proof) => Judgement::new(
            Taken,
            format!(
                "the {} proof of its newest backup is {} old, the limit is {}",
                proof.level,
                span(now_ms - proof.at_ms),
                span(limit)
            ),
        ),
        None => match passed.max_by_key(|p| p.level) {
            Some(proof) => Judgement::new(
                Taken,
                format!("its newest backup is proved {} only, {wanted} is wanted", proof.level),
            ),
            None => Judgement::new(
                Taken,
                format!(
                    "its newest backup, {} old, is not proved yet{}",
                    span(age),
                    proved_reach(facts, now_ms)
                ),
            ),
        },
    }
}

/// What proofs of a backup show: how far the backup alone is right, and whether archived WAL behind it was replayed. The newest of
/// each is told, because one that replays goes less far and would hide what the other one showed.
fn proved<'a>(proofs: impl Iterator<Item = &'a ProofFact>, now_ms: i64) -> Option<String> {
    let (along, alone): (Vec<_>, Vec<_>) = proofs.partition(|proof| proof.replayed_to.is_some());
    let newest = |of: Vec<&'a ProofFact>| of.into_iter().max_by_key(|proof| proof.at_ms);
    let (along, alone) = (newest(along), newest(alone));
    let ago = |proof: &ProofFact| span(now_ms - proof.at_ms);
    let told = alone.or(along)?;
    let moment = match (alone, along) {
        (Some(_), Some(along)) => format!(" {} ago and {PITR} {}", ago(told), ago(along)),
        (None, Some(_)) => format!("{PITR} {}", ago(told)),
        (_, None) => format!(" {}", ago(told)),
    };
    Some(
        format!(
            "restored in {} and proved {}{moment} ago, {}",
            duration(i64::try_from(told.recovery_time_ms).unwrap_or(i64::MAX)),
            told.level,
            count(told.tables, "table"),
        ) + &unasked(told),
    )
}

/// What a proof could not ask, which says nothing against the backup and proves nothing of it either.
fn unasked(proof: &ProofFact) -> String {
    match proof.unasked {
        0 => String::new(),
        n => format!("; {} could not be asked", count(n, "assertion")),
    }
}

/// What is wrong with its archive, and what its server keeps for that.
pub(crate) fn trouble(
    facts: &ClusterFacts,
    objectives: &Objectives,
    now_ms: i64,
) -> Option<String> {
    let kept = facts.backlog.map(|backlog| {
        format!(
            "its server keeps {} since {}, and pg_wal has {} MiB",
            count(backlog.segments, "segment"),
            span(now_ms.saturating_sub(backlog.since_ms)),
            grouped(backlog.pg_wal_bytes >> 20)
        )
    });
    match (trouble_of_archive(facts, objectives, now_ms), kept) {
        (Some(what), Some(kept)) => Some(format!("{what}; {kept}")),
        (None, Some(kept)) => Some(format!("its WAL is not archived: {kept}")),
        (what, None) => what,
    }
}

/// What is wrong with its archive, as it was looked at.
fn trouble_of_archive(
    facts: &ClusterFacts,
    objectives: &Objectives,
    now_ms: i64,
) -> Option<String> {
    let wal = facts.wal.as_ref()?;
    let silence_max_ms = objectives.archive_silence_max_ms;
    let silence = archive_silence(wal, facts.contact_since_ms, silence_max_ms, now_ms);
    let backup = facts.backup_end.as_ref();
    // What nobody looks at any more, and was the archive of another server, says nothing of this one.
    if silence.is_some() && backup.is_some_and(|end| end.lineage != wal.lineage) {
        return None;
    }
    archive_trouble(backup, wal, objectives.wal_delay_max_ms, now_ms).or(silence)
}

/// A target that is certainly missed.
fn broken(facts: &ClusterFacts, objectives: &Objectives, now_ms: i64) -> Option<String> {
    let gone = repository::gone(facts.repository_away.as_ref(), now_ms);
    if gone.is_some() && (facts.backup.is_some() || facts.is_robbed) {
        return gone;
    }
    let Some(backup) = facts.backup else {
        if facts.is_robbed {
            return Some("its repository has none of its backups any more".to_owned());
        }
        let failure = facts.backup_failure.as_ref()?;
        return Some(format!("there is no backup, and the last try failed: {failure}"));
    };
    if let Some(failed) = standing_failure(&facts.proofs) {
        let ago = span(now_ms - failed.at_ms);
        let reach = proved_reach(facts, now_ms);
        if failed.unmet > 0 {
            let (what, level) = (count(failed.unmet, "assertion"), failed.level);
            let verb = if failed.unmet == 1 { "does" } else { "do" };
            return Some(format!(
                "{what} {verb} not hold in its newest backup, by its {level} proof {ago} ago{}{reach}",
                unasked(failed)
            ));
        }
        return Some(format!(
            "its newest backup failed its {} proof {ago} ago{reach}",
            failed.level
        ));
    }
    if let Some(stretch) = facts.broken_wal {
        let BrokenStretch { from, timeline, at_ms, .. } = stretch;
        let ago = span(now_ms.saturating_sub(at_ms));
        let reach = proved_reach(facts, now_ms);
        return Some(format!(
            "archived WAL at {from} of timeline {timeline} could not be replayed in a proof {ago} ago{reach}; a new backup begins behind it"
        ));
    }
    let age = now_ms.saturating_sub(backup.stopped_at_ms);
    let limit = objectives.backup_age_max_ms?;
    (age > limit)
        .then(|| format!("its newest backup is {} old, the limit is {}", span(age), span(limit)))
}

/// What is left where the newest backup does not count.
fn proved_reach(facts: &ClusterFacts, now_ms: i64) -> String {
    match facts.recoverable {
        Some(point) => format!(": proved reach ends {} ago", span(now_ms - point.at_ms)),
        None => ": no backup of it is proved".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proto::LineageId;
    use proto::failure::{Action, Code};

    use super::*;

    const DAY: i64 = 86_400_000;
    const NOW: i64 = 100 * DAY;

    fn failure() -> Failure {
        Failure::new(Code::WalMissing, Action::Retry, "WAL is gone")
    }

    fn proof(age_ms: i64, level: ProofLevel, passed: bool) -> ProofFact {
        ProofFact {
            at_ms: NOW - age_ms,
            level,
            passed,
            recovery_time_ms: 31_400,
            tables: 212,
            replayed_to: None,
            unmet: 0,
            unasked: 0,
        }
    }

    /// One that replayed archived WAL, which goes to L4 at most.
    fn along(age_ms: i64) -> ProofFact {
        let replayed_to = Some(ReplayedTo { timeline: Timeline(1), lsn: Lsn(500) });
        ProofFact { replayed_to, ..proof(age_ms, ProofLevel::L4, true) }
    }

    fn broken_stretch() -> BrokenStretch {
        BrokenStretch {
            lineage: LineageId::mint(1, [1; 10]),
            timeline: Timeline(1),
            from: Lsn(500),
            to: Lsn(600),
            at_ms: NOW - 3_000,
        }
    }

    fn taken(age_ms: i64) -> BackupFact {
        BackupFact { stopped_at_ms: NOW - age_ms, part_of: None, bad_pages: 0, silent_changes: 0 }
    }

    fn undumped(databases: &[&str]) -> Undumped {
        let databases = databases.iter().map(|&name| name.to_owned()).collect();
        Undumped { databases, why: "pg_dump failed".to_owned() }
    }

    fn healthy() -> ClusterFacts {
        ClusterFacts {
            registered_at_ms: NOW - 20 * DAY,
            seen_at_ms: Some(NOW - 5_000),
            contact_since_ms: Some(NOW - 10 * DAY),
            problem: None,
            has_repository: true,
            backup: Some(taken(2 * DAY)),
            undumped: None,
            proofs: vec![proof(DAY, ProofLevel::L5, true)],
            backup_failure: None,
            backup_end: None,
            recoverable: Some(RecoveryPoint { at_ms: NOW - 2 * DAY, leads_on: true }),
            recovery_time: None,
            wal: None,
            broken_wal: None,
            is_robbed: false,
            backlog: None,
            repository_away: None,
        }
    }

    fn away(code: Code) -> RepositoryAway {
        let failure = Failure::new(code, Action::Retry, "failed to look");
        RepositoryAway { place: "s3://backups".to_owned(), since_ms: NOW - 300_000, failure }
    }

    fn judged(change: impl FnOnce(&mut ClusterFacts)) -> (ClusterState, String) {
        let mut facts = healthy();
        change(&mut facts);
        let judgement = judge_cluster(&facts, &Objectives::default(), NOW);
        (judgement.state, judgement.reason)
    }

    #[test]
    fn every_state_has_its_case_and_its_sentence() {
        use ClusterState::{AtRisk, Broken, Pending, Proved, Taken, Unknown};
        type Case = (fn(&mut ClusterFacts), ClusterState, &'static str);
        let table: &[Case] = &[
            (|_| {}, Proved, "restored in 31 s and proved L5 24 h ago, 212 tables"),
            (
                |f| f.proofs.push(along(2 * 3_600_000)),
                Proved,
                "restored in 31 s and proved L5 24 h ago and +PITR 2 h ago, 212 tables",
            ),
            (
                |f| f.proofs = vec![along(2 * 3_600_000), proof(8 * DAY, ProofLevel::L5, true)],
                Proved,
                "restored in 31 s and proved L4+PITR 2 h ago, 212 tables",
            ),
            (
                |f| f.proofs.push(along(8 * DAY)),
                Proved,
                "restored in 31 s and proved L5 24 h ago, 212 tables",
            ),
            (
                |f| f.proofs = vec![proof(7 * DAY, ProofLevel::L5, true)],
                Taken,
                "the L5 proof of its newest backup is 7 d old, the limit is 7 d",
            ),
            (
                |f| f.proofs = vec![proof(DAY, ProofLevel::L3, true)],
                Taken,
                "its newest backup is proved L3 only, L4 is wanted",
            ),
            (
                |f| f.proofs.clear(),
                Taken,
                "its newest backup, 2 d old, is not proved yet: proved reach ends 2 d ago",
            ),
            (
                |f| (f.proofs, f.recoverable) = (Vec::new(), None),
                Taken,
                "its newest backup, 2 d old, is not proved yet: no backup of it is proved",
            ),
            (
                |f| f.proofs.push(proof(0, ProofLevel::L4, false)),
                Broken,
                "its newest backup failed its L4 proof 0 s ago: proved reach ends 2 d ago",
            ),
            (
                |f| f.proofs = vec![ProofFact { unasked: 1, ..proof(DAY, ProofLevel::L5, true) }],
                Proved,
                "restored in 31 s and proved L5 24 h ago, 212 tables; 1 assertion could not be asked",
            ),
            (
                |f| {
                    let failed = proof(0, ProofLevel::L6, false);
                    f.proofs.push(ProofFact { unmet: 1, unasked: 2, ..failed });
                },
                Broken,
                "1 assertion does not hold in its newest backup, by its L6 proof 0 s ago; 2 assertions could not be asked: proved reach ends 2 d ago",
            ),
            (
                |f| f.broken_wal = Some(broken_stretch()),
                Broken,
                "archived WAL at 0/1F4 of timeline 1 could not be replayed in a proof 3 s ago: proved reach ends 2 d ago; a new backup begins behind it",
            ),
            (
                |f| (f.backup, f.is_robbed) = (None, true),
                Broken,
                "its repository has none of its backups any more",
            ),
            (
                |f| f.backup = f.backup.map(|b| BackupFact { part_of: Some(2), ..b }),
                AtRisk,
                "its newest backup is a dump of 2 databases and leaves out others; there is none of the whole cluster",
            ),
            (
                |f| f.undumped = Some(undumped(&["shop"])),
                AtRisk,
                "database shop could not be dumped, and the newest backup of the whole cluster is 2 d old: pg_dump failed",
            ),
            (
                |f| {
                    f.undumped = Some(undumped(&["a", "b"]));
                    f.backup = f.backup.map(|b| BackupFact { part_of: Some(2), ..b });
                },
                AtRisk,
                "databases a, b could not be dumped, and no backup of the whole cluster has them: pg_dump failed",
            ),
            (
                |f| f.backup = f.backup.map(|b| BackupFact { bad_pages: 1, ..b }),
                AtRisk,
                "1 page with a wrong checksum in its newest backup, as on the server",
            ),
            (
                |f| f.backup = f.backup.map(|b| BackupFact { silent_changes: 2, ..b }),
                AtRisk,
                "2 units of files had changed in its newest backup though times and sizes had not (SILENT_CHANGE): the next one reads everything",
            ),
            (
                |f| f.backup_failure = Some(failure()),
                AtRisk,
                "its last backup failed: WAL_MISSING: WAL is gone",
            ),
            (
                |f| f.problem = Some(failure()),
                AtRisk,
                "it cannot be backed up now: WAL_MISSING: WAL is gone",
            ),
            (
                |f| f.repository_away = Some(away(Code::RepositoryMissing)),
                Broken,
                "it cannot be recovered: its repository s3://backups is gone since 5 min",
            ),
            (
                |f| f.repository_away = Some(away(Code::StoreUnavailable)),
                AtRisk,
                "nobody can look into its repository s3://backups since 5 min: STORE_UNAVAILABLE: failed to look",
            ),
            (
                |f| (f.backup, f.repository_away) = (None, Some(away(Code::RepositoryMissing))),
                AtRisk,
                "it cannot be backed up: REPOSITORY_MISSING: failed to look",
            ),
            (|f| f.backup = None, Pending, "no backup has been taken yet"),
            (
                |f| {
                    f.backup = None;
                    f.has_repository = false;
                },
                AtRisk,
                "its worker has no repository for it",
            ),
            (
                |f| {
                    f.backup = None;
                    f.backup_failure = Some(failure());
                },
                Broken,
                "there is no backup, and the last try failed: WAL_MISSING: WAL is gone",
            ),
            (|f| f.seen_at_ms = None, Unknown, "no worker has announced it"),
            (
                |f| f.seen_at_ms = Some(NOW - 180_000),
                Unknown,
                "no contact with its worker for 3 min",
            ),
        ];
        for (change, state, reason) in table {
            assert_eq!(judged(change), (*state, (*reason).to_owned()));
        }
    }

    #[test]
    fn a_promised_age_is_at_risk_before_it_is_missed() {
        let objectives = Objectives { backup_age_max_ms: Some(DAY), ..Objectives::default() };
        let at = |age| {
            let mut facts = healthy();
            facts.backup = Some(taken(age));
            judge_cluster(&facts, &objectives, NOW).state
        };
        assert_eq!(at(DAY / 2), ClusterState::Proved);
        assert_eq!(at(DAY * 9 / 10), ClusterState::AtRisk);
        assert_eq!(at(DAY + 1), ClusterState::Broken);
    }

    #[test]
    fn a_silent_worker_does_not_hide_a_failed_proof() {
        let (state, _) = judged(|f| {
            f.seen_at_ms = None;
            f.proofs.push(proof(0, ProofLevel::L5, false));
        });
        assert_eq!(state, ClusterState::Broken);
    }

    fn lineage(n: u8) -> LineageId {
        LineageId::mint(1, [n; 10])
    }

    /// An archive that was seen so long ago.
    fn wal(seen_ago_ms: i64) -> WalStanding {
        WalStanding {
            cluster: "orders".parse().unwrap(),
            lineage: lineage(1),
            at_ms: NOW - seen_ago_ms,
            timeline: Timeline(1),
            ancestors: Vec::new(),
            server_lsn: Lsn(950),
            line_from: Lsn(100),
            archived_to: Lsn(900),
            safe_at_ms: Some(NOW - seen_ago_ms),
            waiting: None,
            gap: None,
            gaps: Vec::new(),
            conflict: None,
        }
    }

    #[test]
    fn an_archive_that_nobody_looks_at_is_at_risk() {
        let end = |n| BackupEnd {
            lineage: lineage(n),
            timeline: Timeline(1),
            start_lsn: Lsn(400),
            stop_lsn: Lsn(500),
            wal_to: Lsn(500),
            stopped_at_ms: NOW - 2 * DAY,
        };
        let at = |seen_ago_ms, of: u8| {
            judged(|f| (f.wal, f.backup_end) = (Some(wal(seen_ago_ms)), Some(end(of))))
        };
        assert_eq!(at(120_000, 1).0, ClusterState::Proved);
        let (state, reason) = at(120_001, 1);
        assert_eq!(state, ClusterState::AtRisk);
        assert!(reason.starts_with("nothing has been seen of its archive for 2 min"), "{reason}");
        assert_eq!(at(5_000, 2).0, ClusterState::AtRisk, "the server archives elsewhere now");
        assert_eq!(at(DAY, 2).0, ClusterState::Proved, "the archive of a server that is no more");
    }

    #[test]
    fn a_server_that_keeps_its_wal_is_told_with_its_room() {
        let backlog =
            WalBacklog { segments: 12, since_ms: NOW - 240_000, pg_wal_bytes: 1_234_567_890 };
        let (state, reason) = judged(|f| f.backlog = Some(backlog));
        assert_eq!(state, ClusterState::AtRisk);
        let kept = "its server keeps 12 segments since 4 min, and pg_wal has 1,177 MiB";
        assert_eq!(reason, format!("its WAL is not archived: {kept}"));
        let (_, reason) = judged(|f| (f.wal, f.backlog) = (Some(wal(600_000)), Some(backlog)));
        assert!(reason.starts_with("nothing has been seen of its archive for 10 min"), "{reason}");
        assert!(reason.ends_with(&format!("; {kept}")), "{reason}");
        // What the next backup looks after by itself is said when nothing else is.
        let (_, reason) = judged(|f| {
            f.backlog = Some(backlog);
            f.backup = f.backup.map(|b| BackupFact { silent_changes: 2, ..b });
        });
        assert_eq!(reason, format!("its WAL is not archived: {kept}"));
    }

    #[test]
    fn states_round_trip_as_text() {
        for state in ClusterState::ALL {
            assert_eq!(state.as_str().parse::<ClusterState>().unwrap(), *state);
        }
        assert!("GREEN".parse::<ClusterState>().is_err());
    }

    proptest! {
        /// The law that matters: green only on fresh contact, a backup, and a fresh passed proof that is not contradicted.
        #[test]
        fn proved_is_never_said_without_its_grounds(
            seen in proptest::option::of(0i64..200_000),
            backup in proptest::option::of(0i64..20 * DAY),
            proofs in proptest::collection::vec((0i64..20 * DAY, 1u8..=5, any::<bool>()), 0..5),
            failed in any::<bool>(),
        ) {
            let facts = ClusterFacts {
                registered_at_ms: NOW - 20 * DAY,
                seen_at_ms: seen.map(|age| NOW - age),
                contact_since_ms: None,
                problem: None,
                has_repository: true,
                backup: backup.map(taken),
                undumped: None,
                proofs: proofs.iter().map(|(age, level, passed)| proof(*age, ProofLevel::from_number(*level).unwrap(), *passed)).collect(),
                backup_failure: failed.then(failure),
                backup_end: None,
                recoverable: None,
                recovery_time: None,
                wal: None,
                broken_wal: None,
                is_robbed: false,
                backlog: None,
                repository_away: None,
            };
            let objectives = Objectives::default();
            let judgement = judge_cluster(&facts, &objectives, NOW);
            prop_assert!(!judgement.reason.is_empty());
            if judgement.state == ClusterState::Proved {
                prop_assert!(seen.unwrap() <= objectives.silence_max_ms);
                prop_assert!(backup.is_some() && !failed);
                prop_assert!(proofs.iter().any(|(age, level, passed)| *age < objectives.proof_age_max_ms && *level >= 4 && *passed));
            }
        }
    }
}
