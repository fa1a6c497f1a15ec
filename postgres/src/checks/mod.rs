//! The checks of a proof, run on the restored server in its sandbox: did it reach the stop position (L3), do the server's
//! own checks pass (L4), is the content what the census says (L5), does what the user asserts hold (L6). Of a server that a
//! dump was loaded into, what has a meaning there: its pages, its positions and its transactions are its own and not the
//! backup's.
//!
//! For restored copies only: it reads every table, creates extensions, disables event triggers, and for assertions it makes
//! a role and takes rights away. What it finds wrong is in the report; an error means that the checks could not be run.
//! Starts, stops and restores nothing.

mod assertions;
mod compare;
mod findings;
mod own;
mod read;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use proto::backup::Census;
use proto::proof::{CheckOutcome, ProofAssertion, ProofCheck, ProofLevel};
use proto::{JobId, Lsn, SystemIdentifier};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::connect::{Purpose, connect_maintenance};
use crate::error::Error;
use crate::target::Target;
use crate::version::ServerVersion;
use assertions::Asked;
pub use assertions::Assertion;
use findings::{CHECKS, Findings, conclude};
use read::Content;

/// What the restored server was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The files of a cluster and their WAL.
    Copy {
        /// The backup's cluster.
        system_identifier: SystemIdentifier,
        /// The position that recovery had to reach.
        stop_lsn: Lsn,
    },
    /// A dump, loaded into an empty server.
    Dump,
}

/// Checks that say nothing of a server that a dump was loaded into.
const NOT_OF_A_DUMP: [&str; 4] = ["stop_position", "system_identifier", "page_checksums", "canary"];

/// What to check.
#[derive(Debug, Clone)]
pub struct CheckOptions<'a> {
    /// For which job.
    pub job: JobId,
    /// How far: L3 to L6. Lower levels need no server; they count as L3 here.
    pub level: ProofLevel,
    /// What the server was made of.
    pub origin: Origin,
    /// What the content looked like when the backup was taken.
    pub census: Option<&'a Census>,
    /// What must be true for L6.
    pub assertions: &'a [Assertion],
    /// Also look up every row in every B-tree index (`heapallindexed`): finds missing entries, costs a second reading.
    pub every_row_in_indexes: bool,
    /// When to ask no further assertion: those that have no answer by then are skipped, and the report tells all the rest.
    pub ask_until: Option<Instant>,
    /// When to give up.
    pub deadline: Option<Instant>,
    /// Interrupts the checks.
    pub cancel: CancellationToken,
}

/// What the checks found.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckReport {
    /// Each check, in the order of their levels.
    pub checks: Vec<ProofCheck>,
    /// Each assertion that was asked.
    pub assertions: Vec<ProofAssertion>,
    /// `server_version_num` of the restored server.
    pub server_version_num: u32,
    /// The system identifier it tells.
    pub system_identifier: SystemIdentifier,
    /// The position it reached, read from the server itself; `None` of one that a dump was loaded into.
    pub reached_lsn: Option<Lsn>,
    /// User tables read.
    pub tables: u64,
    /// Rows read in them.
    pub rows: u64,
    /// Tables whose rows were compared exactly with the census.
    pub tables_exact: u64,
    /// Tables whose rows were compared within bounds.
    pub tables_bounded: u64,
    /// Whether damage, or an assertion that does not hold, was seen. False when all that failed was asked of a server that was
    /// gone, or follows from that: then what ended the server decides whether the backup is to blame.
    pub saw_damage: bool,
}

impl CheckReport {
    /// The highest level from L3 on at which, and below which, nothing failed and what makes the level was really looked
    /// at: for L4 that every table was read, for L5 that the rows of at least one table could be compared, unless
    /// the census has none, for L6 that every assertion, and at least one, could be asked. Any other check that could not
    /// look (no amcheck installed, no page checksums in the cluster) does not lower the level; it is in the report.
    pub fn level_reached(&self) -> Option<ProofLevel> {
        let sound = |level: ProofLevel, essential: &str| {
            let mut of_level = self.checks.iter().filter(|check| check.level == level);
            let failed = of_level.clone().any(|check| check.outcome == CheckOutcome::Failed);
            // A dump has no check of its own here: that it could be loaded is known before.
            let is_dump = level == ProofLevel::L3 && of_level.clone().next().is_none();
            let passed = |c: &ProofCheck| c.name == essential && c.outcome == CheckOutcome::Passed;
            !failed && (is_dump || of_level.any(passed))
        };
        let steps = [
            (ProofLevel::L3, "stop_position"),
            (ProofLevel::L4, "tables_readable"),
            (ProofLevel::L5, "row_counts"),
        ];
        let sound = steps.into_iter().map(|(level, essential)| (level, sound(level, essential)));
        let holds = |asked: &ProofAssertion| asked.outcome == CheckOutcome::Passed;
        let hold = !self.assertions.is_empty() && self.assertions.iter().all(holds);
        sound
            .chain([(ProofLevel::L6, hold)])
            .take_while(|(_, is_sound)| *is_sound)
            .last()
            .map(|(level, _)| level)
    }

    /// The checks that failed.
    pub fn failed(&self) -> impl Iterator<Item = &ProofCheck> {
        self.checks.iter().filter(|check| check.outcome == CheckOutcome::Failed)
    }
}

/// Runs the checks on a restored server.
pub async fn run_checks(target: &Target, options: &CheckOptions<'_>) -> Result<CheckReport, Error> {
    let session = connect_maintenance(target, &purpose(options)).await?;
    let identity = session.identity().await?;
    let mut run = Run {
        target,
        options,
        version: identity.version,
        checksums: identity.data_checksums,
        findings: BTreeMap::new(),
        databases: HashMap::new(),
        asked: Vec::new(),
    };
    let mut reached_lsn = None;
    if let Origin::Copy { system_identifier, stop_lsn } = options.origin {
        reached_lsn = Some(run.stop_position(&session, stop_lsn).await?);
        let found = identity.system_identifier;
        run.note("system_identifier", found == system_identifier, || {
            format!("{found} instead of {system_identifier}")
        });
    }
    if options.level >= ProofLevel::L4 {
        run.read_everything(&session).await?;
    }
    if options.level >= ProofLevel::L5 {
        run.compare().await?;
    }
    if options.level >= ProofLevel::L6 {
        Box::pin(run.ask_assertions()).await?;
    }
    session.close().await;
    Ok(run.report(identity.system_identifier, reached_lsn))
}

fn purpose(options: &CheckOptions<'_>) -> Purpose {
    Purpose::work(&options.job, Duration::ZERO, Duration::ZERO)
}

struct Run<'a> {
    target: &'a Target,
    options: &'a CheckOptions<'a>,
    version: ServerVersion,
    checksums: bool,
    findings: BTreeMap<&'static str, Findings>,
    /// `None` for a database that could not be read.
    databases: HashMap<String, Option<Content>>,
    asked: Vec<Asked>,
}

impl Run<'_> {
    fn is_of_dump(&self) -> bool {
        self.options.origin == Origin::Dump
    }

    fn report(self, system_identifier: SystemIdentifier, reached_lsn: Option<Lsn>) -> CheckReport {
        let compared = self.options.census.iter().filter(|_| self.options.level >= ProofLevel::L5);
        let drifts: Vec<_> = compared
            .flat_map(|census| &census.databases)
            .flat_map(|database| &database.tables)
            .filter_map(|table| table.rows.and(table.drift))
            .collect();
        let exact = drifts.iter().filter(|drift| **drift == (0, 0)).count();
        let counts =
            || self.databases.values().flatten().flat_map(|content| content.tables.values());
        CheckReport {
            server_version_num: self.version.0,
            system_identifier,
            reached_lsn,
            tables: counts().count() as u64,
            rows: counts().flatten().sum(),
            tables_exact: exact as u64,
            tables_bounded: (drifts.len() - exact) as u64,
            saw_damage: self.findings.values().any(Findings::saw_damage)
                || self.asked.iter().any(|asked| asked.saw_false),
            checks: CHECKS
                .iter()
                .filter(|(_, level, _)| *level <= self.options.level)
                .filter(|(name, ..)| !self.is_of_dump() || !NOT_OF_A_DUMP.contains(name))
                .map(|(name, level, what)| {
                    conclude(name, *level, what, self.findings.get(name), self.checksums)
                })
                .collect(),
            assertions: self.asked.into_iter().map(|asked| asked.told).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ServerMessage;

    fn options() -> CheckOptions<'static> {
        CheckOptions {
            job: JobId::mint(1, [1; 10]),
            level: ProofLevel::L4,
            origin: Origin::Copy { system_identifier: SystemIdentifier(1), stop_lsn: Lsn(1) },
            census: None,
            assertions: &[],
            every_row_in_indexes: false,
            ask_until: None,
            deadline: None,
            cancel: CancellationToken::new(),
        }
    }

    fn said(source: ServerMessage) -> Result<(), Error> {
        Err(Error::Statement { what: "read all rows".to_owned(), source })
    }

    #[test]
    fn only_what_was_seen_counts_as_damage() {
        let (options, environment) = (options(), crate::target::Environment::default());
        let target = Target::parse("host=/nowhere user=u dbname=d", &environment).unwrap();
        let mut run = Run {
            target: &target,
            options: &options,
            version: ServerVersion(180_000),
            checksums: true,
            findings: BTreeMap::new(),
            databases: HashMap::new(),
            asked: Vec::new(),
        };
        let saw = |run: &Run<'_>| run.findings.values().any(Findings::saw_damage);
        run.outcome("tables_readable", "a", Ok(())).unwrap();
        let gone = said(ServerMessage::gone("server closed the connection unexpectedly"));
        run.outcome("tables_readable", "b", gone).unwrap();
        run.blind("row_counts", "b could not be counted".to_owned());
        assert!(!saw(&run), "nobody looked at b");
        run.outcome("amcheck_tables", "c", said(ServerMessage::local("c is broken"))).unwrap();
        assert!(saw(&run));
        let report = run.report(SystemIdentifier(1), Some(Lsn(1)));
        assert!(report.saw_damage);
        assert_eq!(report.failed().count(), 2, "what nobody saw failed all the same");
    }
}
