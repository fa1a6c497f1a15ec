//! The record of a restore that was tried, what it reached and how long each phase took.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    BackupId, BackupKind, ClusterName, DatabaseName, LineageId, Lsn, SystemIdentifier, Timeline,
    WorkerName,
};

/// What is added to the level of a proof that replayed archived WAL behind the end of its backup.
pub const PITR: &str = "+PITR";

/// How much a proof shows. Each level includes the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ProofLevel {
    /// Every object is present, with the right size.
    L1,
    /// Every frame was decrypted, decompressed and checked.
    L2,
    /// Restored, booted, reached the stop position.
    L3,
    /// The server's own checks pass: page checksums, amcheck, every table readable, extensions load, collations.
    L4,
    /// The content equals what was recorded when the backup was taken.
    L5,
    /// What the worker's configuration asserts of the cluster's content holds. It stands in orders and jobs, which earlier
    /// programs refuse; in records it is [`Proof::assertions`], which they pass over.
    L6,
}

impl ProofLevel {
    /// Every level, lowest first.
    pub const ALL: [Self; 6] = [Self::L1, Self::L2, Self::L3, Self::L4, Self::L5, Self::L6];

    /// 1 to 6.
    pub fn number(self) -> u8 {
        match self {
            Self::L1 => 1,
            Self::L2 => 2,
            Self::L3 => 3,
            Self::L4 => 4,
            Self::L5 => 5,
            Self::L6 => 6,
        }
    }

    /// The level of this number.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.number() == number)
    }
}

impl fmt::Display for ProofLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L{}", self.number())
    }
}

/// A text that is no proof level.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read {0:?} as a proof level: 1 to 6")]
pub struct ProofLevelError(String);

impl FromStr for ProofLevel {
    type Err = ProofLevelError;

    fn from_str(text: &str) -> Result<Self, ProofLevelError> {
        let digits = text.strip_prefix(['L', 'l']).unwrap_or(text);
        digits
            .parse()
            .ok()
            .and_then(Self::from_number)
            .ok_or_else(|| ProofLevelError(text.chars().take(20).collect()))
    }
}

/// The record. Signed by the worker that ran it and stored with the backup; additive only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// The backup that was restored.
    pub backup: BackupId,
    /// What it is. Of a dump, `restored` means loaded into an empty server; positions are absent.
    #[serde(default, skip_serializing_if = "BackupKind::is_physical")]
    pub kind: BackupKind,
    /// Its lineage.
    pub lineage: LineageId,
    /// The cluster's name when the backup was taken.
    pub cluster: ClusterName,
    /// The cluster's system identifier, as the restored server told it (the manifest's for levels below L3).
    pub system_identifier: SystemIdentifier,
    /// Who restored it.
    pub worker: WorkerName,
    /// Worker's clock at the end.
    pub at_ms: i64,
    /// The level that was asked for, L5 at most: see [`Proof::asked`].
    pub level_asked: ProofLevel,
    /// The highest level all of whose checks passed, L5 at most: see [`Proof::level`]; `None` when not even L1 did.
    pub level_reached: Option<ProofLevel>,
    /// Whether the level asked for was reached, L6 as well.
    pub passed: bool,
    /// `server_version_num` of the server that booted; absent below L3.
    #[serde(default)]
    pub server_version_num: Option<u32>,
    /// The position the restored server reached, read from the server itself; absent below L3.
    #[serde(default)]
    pub reached_lsn: Option<Lsn>,
    /// The phases, in order; their sum is what a restore costs.
    pub phases: Vec<Phase>,
    /// Bytes restored.
    pub size_bytes: u64,
    /// User tables seen in the restored server.
    pub tables: u64,
    /// Rows counted in the restored server.
    pub rows: u64,
    /// Tables whose rows were compared exactly with the census.
    pub tables_exact: u64,
    /// Tables whose rows were compared within bounds.
    pub tables_bounded: u64,
    /// Each check and how it ended.
    pub checks: Vec<ProofCheck>,
    /// How the sandbox was isolated, for people.
    #[serde(default)]
    pub isolation: String,
    /// The moment behind the backup to which archived WAL was replayed; absent when none was asked for, or it was not reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<ProofRecovery>,
    /// Archived WAL on the way to that moment which could not be replayed. Then nothing is said against the backup alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken_wal: Option<BrokenWal>,
    /// When the newest heartbeat that had to be there, and was, committed in the cluster; its clock, Unix milliseconds. Absent when
    /// none had to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_at_ms: Option<i64>,
    /// What was asserted, and what came of it, where L6 was asked for: none when the proof did not come that far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assertions: Option<Vec<ProofAssertion>>,
    /// Databases of the cluster that could not be dumped: whatever is proved of the backup says nothing of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lacks: Vec<String>,
}

/// Archived WAL that a restored server could not replay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokenWal {
    /// Where the server was to go, for people.
    pub target: String,
    /// The timeline of the WAL.
    pub timeline: Timeline,
    /// A recovery that gets beyond this position has replayed it.
    pub from: Lsn,
    /// A backup that begins here or later does not need it.
    pub to: Lsn,
}

/// A moment that a restored server was seen to reach along archived WAL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProofRecovery {
    /// Where it was to go, for people.
    pub target: String,
    /// The timeline that it followed.
    pub timeline: Timeline,
    /// The end of what it replayed.
    pub reached_lsn: Lsn,
    /// The last commit that it replayed, by its own account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_commit: Option<Timestamp>,
    /// In the server's own words, why it stopped there.
    pub evidence: String,
    /// Bytes of WAL that it replayed, from where the backup begins.
    pub replayed_bytes: u64,
}

impl Proof {
    /// A record in which nothing is shown yet, of a physical backup, with the level that was asked for.
    pub fn of(
        backup: BackupId,
        lineage: LineageId,
        cluster: ClusterName,
        system_identifier: SystemIdentifier,
        worker: WorkerName,
        level_asked: ProofLevel,
    ) -> Self {
        Self {
            backup,
            kind: BackupKind::Physical,
            lineage,
            cluster,
            system_identifier,
            worker,
            at_ms: 0,
            level_asked: level_asked.min(ProofLevel::L5),
            level_reached: None,
            passed: false,
            server_version_num: None,
            reached_lsn: None,
            phases: Vec::new(),
            size_bytes: 0,
            tables: 0,
            rows: 0,
            tables_exact: 0,
            tables_bounded: 0,
            checks: Vec::new(),
            isolation: String::new(),
            recovery: None,
            broken_wal: None,
            heartbeat_at_ms: None,
            assertions: (level_asked == ProofLevel::L6).then(Vec::new),
            lacks: Vec::new(),
        }
    }

    /// The level that was asked for.
    pub fn asked(&self) -> ProofLevel {
        if self.assertions.is_some() { ProofLevel::L6 } else { self.level_asked }
    }

    /// The highest level all of whose checks passed; `None` when not even L1 did.
    pub fn level(&self) -> Option<ProofLevel> {
        let assertions = self.assertions.as_deref().unwrap_or_default();
        let hold = assertions.iter().all(|assertion| assertion.outcome == CheckOutcome::Passed);
        match self.level_reached {
            Some(ProofLevel::L5) if hold && !assertions.is_empty() => Some(ProofLevel::L6),
            reached => reached,
        }
    }

    /// The level that is proved, whatever was asked for; `None` when none is, or when it says something against its backup. What could
    /// not be looked at takes nothing from what was.
    pub fn proved(&self) -> Option<ProofLevel> {
        if self.speaks_against() { None } else { self.level() }
    }

    /// Whether it says something against its backup. One that fell short only because something could not be looked at does not, nor
    /// does one that archived WAL ended.
    pub fn speaks_against(&self) -> bool {
        let found_wrong = self.found_wrong() || self.checks.is_empty();
        !self.passed && self.broken_wal.is_none() && found_wrong
    }

    /// Whether something was seen to be wrong.
    pub fn found_wrong(&self) -> bool {
        let assertions = self.assertions.iter().flatten().map(|assertion| assertion.outcome);
        let mut outcomes = self.checks.iter().map(|check| check.outcome).chain(assertions);
        outcomes.any(|outcome| outcome == CheckOutcome::Failed)
    }

    /// How many assertions ended so.
    pub fn assertions_that(&self, outcome: CheckOutcome) -> u64 {
        let ended = self.assertions.iter().flatten().filter(|asked| asked.outcome == outcome);
        ended.count() as u64
    }

    /// The same when that level was reached.
    #[must_use]
    pub fn reached(self) -> Self {
        Self { level_reached: Some(self.level_asked), passed: true, ..self }
    }

    /// Milliseconds from the first byte fetched to a server that answers: the measured recovery time of a backup alone.
    pub fn recovery_time_ms(&self) -> u64 {
        self.phases.iter().filter(|p| p.counts_as_recovery).map(|p| p.duration_ms).sum()
    }
}

/// One measured phase of a proof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// `inventory`, `decrypt`, `restore`, `boot`, `check` …
    pub name: String,
    /// How long it took.
    pub duration_ms: u64,
    /// Whether a real recovery would need this phase too.
    pub counts_as_recovery: bool,
}

/// One check of a proof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProofCheck {
    /// What was checked, stable: `page_checksums`, `amcheck`, `row_counts` …
    pub name: String,
    /// The level it belongs to.
    pub level: ProofLevel,
    /// How it ended.
    pub outcome: CheckOutcome,
    /// Numbers and names, for people.
    pub detail: String,
}

/// An assertion of the worker's configuration, asked of the restored server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProofAssertion {
    /// What the configuration calls it.
    pub name: String,
    /// Where it was asked.
    pub database: DatabaseName,
    /// Whether it holds: failed when it was asked and the answer was not `true`, skipped when it could not be asked.
    pub outcome: CheckOutcome,
    /// `true`, or what came instead, for people.
    pub answer: String,
    /// How long that took.
    pub duration_ms: u64,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckOutcome {
    /// It looked and found nothing wrong.
    Passed,
    /// It found something wrong.
    Failed,
    /// It could not look, for a reason that is no fault of the backup.
    Skipped,
}
