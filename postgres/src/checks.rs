//! The checks of a proof, run on the restored server in its sandbox: did it reach the stop position (L3), do the server's
//! own checks pass (L4), is the content what the census says (L5).
//!
//! For restored copies only: it reads every table, creates extensions and disables event triggers. What it finds wrong
//! is in the report; an error means that the checks could not be run. Starts, stops and restores nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use futures::{StreamExt as _, pin_mut};
use proto::backup::{Census, DatabaseCensus, TableCount};
use proto::proof::{CheckOutcome, ProofCheck, ProofLevel};
use proto::{JobId, Lsn, SystemIdentifier};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::census::collation_sql;
use crate::connect::{Purpose, connect, connect_maintenance};
use crate::error::{During as _, Error};
use crate::quote;
use crate::session::Session;
use crate::target::Target;
use crate::version::ServerVersion;

/// Findings named in a check's detail; all are counted.
const NAMED_FINDINGS: usize = 10;
/// Where our own extensions go, so that they meet nothing of the user's.
const OWN_SCHEMA: &str = "pgmuster_checks";
/// The collation OID that means "the database's own".
const DEFAULT_COLLATION: u32 = 100;

/// What to check.
#[derive(Debug, Clone)]
pub struct CheckOptions<'a> {
    /// For which job.
    pub job: JobId,
    /// How far: L3, L4 or L5. Lower levels need no server; they count as L3 here.
    pub level: ProofLevel,
    /// The backup's cluster.
    pub system_identifier: SystemIdentifier,
    /// The position that recovery had to reach.
    pub stop_lsn: Lsn,
    /// What the content looked like when the backup was taken.
    pub census: Option<&'a Census>,
    /// Also look up every row in every B-tree index (`heapallindexed`): finds missing entries, costs a second reading.
    pub every_row_in_indexes: bool,
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
    /// `server_version_num` of the restored server.
    pub server_version_num: u32,
    /// The system identifier it tells.
    pub system_identifier: SystemIdentifier,
    /// The position it reached, read from the server itself.
    pub reached_lsn: Lsn,
    /// User tables read.
    pub tables: u64,
    /// Rows read in them.
    pub rows: u64,
    /// Tables whose rows were compared exactly with the census.
    pub tables_exact: u64,
    /// Tables whose rows were compared within bounds.
    pub tables_bounded: u64,
}

impl CheckReport {
    /// The highest level from L3 on at which, and below which, nothing failed and what makes the level was really looked
    /// at: for L4 that every table was read, for L5 that there was a census. A check that could not look (no amcheck
    /// installed, no page checksums in the cluster) does not lower the level; it is in the report.
    pub fn level_reached(&self) -> Option<ProofLevel> {
        let sound = |level: ProofLevel, essential: &str| {
            let failed =
                self.checks.iter().any(|c| c.level == level && c.outcome == CheckOutcome::Failed);
            !failed
                && self
                    .checks
                    .iter()
                    .any(|c| c.name == essential && c.outcome == CheckOutcome::Passed)
        };
        let steps = [
            (ProofLevel::L3, "stop_position"),
            (ProofLevel::L4, "tables_readable"),
            (ProofLevel::L5, "row_counts"),
        ];
        steps
            .into_iter()
            .take_while(|(level, essential)| sound(*level, essential))
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
    };
    let reached_lsn = run.stop_position(&session).await?;
    let same = identity.system_identifier == options.system_identifier;
    run.note("system_identifier", same, || {
        format!("{} instead of {}", identity.system_identifier, options.system_identifier)
    });
    if options.level >= ProofLevel::L4 {
        run.read_everything(&session).await?;
    }
    if options.level >= ProofLevel::L5 {
        run.compare(&session).await?;
    }
    session.close().await;
    Ok(run.report(identity.system_identifier, reached_lsn))
}

fn purpose(options: &CheckOptions<'_>) -> Purpose {
    Purpose::work(&options.job, Duration::ZERO, Duration::ZERO)
}

/// Names and levels of the checks, in the order they are reported.
const CHECKS: [(&str, ProofLevel, &str); 12] = [
    ("stop_position", ProofLevel::L3, "the stop position was reached"),
    ("system_identifier", ProofLevel::L3, "the system identifier is the backup's"),
    ("tables_readable", ProofLevel::L4, "relations read to the last byte"),
    ("page_checksums", ProofLevel::L4, "relations read without a wrong page"),
    ("amcheck_tables", ProofLevel::L4, "tables checked by verify_heapam"),
    ("amcheck_indexes", ProofLevel::L4, "B-tree indexes checked by bt_index_check"),
    ("extensions_load", ProofLevel::L4, "libraries loaded"),
    (
        "collations",
        ProofLevel::L4,
        "databases and collations with the version they were built with",
    ),
    ("relations_present", ProofLevel::L5, "relations of the census are there"),
    ("row_counts", ProofLevel::L5, "tables have the rows they must have"),
    ("extensions_present", ProofLevel::L5, "extensions of the census are there"),
    ("canary", ProofLevel::L5, "a transaction of the time of the backup is committed"),
];

/// What one check saw.
#[derive(Default)]
struct Findings {
    good: u64,
    bad: Vec<String>,
    unseen: Vec<String>,
}

/// What the restored copy of one database holds.
#[derive(Default)]
struct Content {
    relations: HashMap<char, u64>,
    extensions: HashSet<String>,
    /// Rows of each user table by schema and name; `None` where they could not be counted.
    tables: HashMap<(String, String), Option<u64>>,
}

struct Run<'a> {
    target: &'a Target,
    options: &'a CheckOptions<'a>,
    version: ServerVersion,
    checksums: bool,
    findings: BTreeMap<&'static str, Findings>,
    databases: HashMap<String, Content>,
}

/// A relation of the restored database.
struct Relation {
    oid: u32,
    kind: char,
    schema: String,
    name: String,
    is_user: bool,
    is_heap: bool,
    /// False for a materialised view that was never refreshed: it cannot be read.
    is_filled: bool,
}

impl Relation {
    fn shown(&self, database: &str) -> String {
        format!("{}.{} in {database}", self.schema, self.name)
    }

    fn quoted(&self) -> String {
        quote::qualified(&self.schema, &self.name)
    }
}

/// Whether an error says that this machine lacks a library or function, which is no fault of the backup.
fn is_environment(error: &Error) -> bool {
    error.state().is_some_and(|state| matches!(state.code(), "58P01" | "0A000" | "42883"))
}

/// Whether an error says that a page failed its checksum or has a broken header.
fn is_bad_page(error: &Error) -> bool {
    error.state().is_some_and(|state| state.code() == "XX001")
}

impl Run<'_> {
    fn finding(&mut self, check: &'static str) -> &mut Findings {
        self.findings.entry(check).or_default()
    }

    fn note(&mut self, check: &'static str, good: bool, what: impl FnOnce() -> String) {
        let findings = self.finding(check);
        if good { findings.good += 1 } else { findings.bad.push(what()) }
    }

    fn unseen(&mut self, check: &'static str, what: String) {
        self.finding(check).unseen.push(what);
    }

    /// Notes how something went that can fail for the backup's fault or for this machine's.
    fn outcome<T>(
        &mut self,
        check: &'static str,
        thing: &str,
        outcome: Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        match outcome {
            Ok(value) => {
                self.finding(check).good += 1;
                Ok(Some(value))
            }
            Err(error @ (Error::Cancelled { .. } | Error::Deadline { .. })) => Err(error),
            Err(error) => {
                let text = format!("{thing}: {}", proto::failure::chain(&error));
                if is_bad_page(&error) && check != "page_checksums" {
                    self.finding("page_checksums").bad.push(text.clone());
                }
                if is_environment(&error) {
                    self.unseen(check, text);
                } else {
                    self.finding(check).bad.push(text);
                }
                Ok(None)
            }
        }
    }

    async fn stop_position(&mut self, session: &Session) -> Result<Lsn, Error> {
        let what = "ask how far recovery came";
        let sql = "\
-- pgmuster: stop position
SELECT pg_is_in_recovery() AS in_recovery,
       greatest(pg_last_wal_replay_lsn(), (SELECT checkpoint_lsn FROM pg_control_checkpoint()))::text AS reached,
       backup_start_lsn = '0/0' AND NOT end_of_backup_record_required AS consistent
  FROM pg_control_recovery()";
        let row = session.one(what, sql, &[]).await?;
        let reached: String = row.get("reached");
        let reached: Lsn = reached
            .parse()
            .map_err(|_| Error::Answer { what: what.to_owned(), answer: reached })?;
        let stop = self.options.stop_lsn;
        let consistent: bool = row.get("consistent");
        self.note("stop_position", consistent && reached >= stop, || {
            match (reached >= stop, consistent) {
                (true, _) => format!("the server reached {reached} but not the end of the backup"),
                (false, _) => format!("the server reached {reached}, the backup ends at {stop}"),
            }
        });
        Ok(reached)
    }

    async fn read_everything(&mut self, session: &Session) -> Result<(), Error> {
        let sql = format!(
            "-- pgmuster: databases to check\n\
             SELECT oid, datname::text AS name, {} AS actual, {} AS recorded FROM pg_database \
             WHERE datallowconn AND datconnlimit <> -2 ORDER BY datname",
            collation_sql(self.version.major()),
            if self.version.major() < 15 { "NULL::text" } else { "datcollversion" },
        );
        let rows = session.query("list the databases", &sql, &[]).await?;
        for (index, row) in rows.iter().enumerate() {
            let name: String = row.get("name");
            let collation = Collation { actual: row.get("actual"), recorded: row.get("recorded") };
            if let Err(error) = self.read_database(&name, &collation, index == 0).await {
                // The server may have crashed on what it read; the next database tells whether it came back.
                self.outcome::<()>("tables_readable", &format!("database {name}"), Err(error))?;
            }
        }
        Ok(())
    }

    async fn read_database(
        &mut self,
        database: &str,
        collation: &Collation,
        with_shared: bool,
    ) -> Result<(), Error> {
        let session = self.session(database).await?;
        self.databases.insert(database.to_owned(), Content::default());
        let relations = relations(&session, with_shared).await?;
        let mut extensions = HashSet::new();
        for row in session
            .query(
                "list the extensions",
                "SELECT extname || ' ' || extversion FROM pg_extension",
                &[],
            )
            .await?
        {
            extensions.insert(row.get(0));
        }
        let mut content = Content { extensions, ..Content::default() };
        for relation in &relations {
            if relation.is_user {
                *content.relations.entry(relation.kind).or_default() += 1;
            }
        }
        self.databases.insert(database.to_owned(), content);
        let mut session = Some(session);
        for relation in
            relations.iter().filter(|r| r.is_filled && matches!(r.kind, 'r' | 'm' | 'S'))
        {
            let usable = self.usable(&mut session, database).await?;
            let read = self.within(usable, copy_rows(usable, relation)).await;
            let thing = relation.shown(database);
            let rows = self.outcome("tables_readable", &thing, read)?;
            if rows.is_some() && self.checksums {
                self.finding("page_checksums").good += 1;
            }
            if relation.is_user && relation.kind != 'S' {
                let rows = match rows {
                    Some(rows) => Some(rows),
                    // A missing library may stop the output of a value, not the counting of rows.
                    None => self.within(usable, count_rows(usable, relation)).await.ok(),
                };
                if let Some(content) = self.databases.get_mut(database) {
                    content.tables.insert((relation.schema.clone(), relation.name.clone()), rows);
                }
            }
        }
        let mismatched = self.collations(&mut session, database, collation).await?;
        self.amcheck(&mut session, database, &relations, &mismatched).await?;
        self.other_pages(&mut session, database, &relations).await?;
        self.libraries(&mut session, database).await?;
        if let Some(session) = session {
            session.close().await;
        }
        Ok(())
    }

    /// A session in which nothing of the user's fires and no damage is passed over.
    async fn session(&self, database: &str) -> Result<Session, Error> {
        let session = connect(&self.target.with_database(database), &purpose(self.options)).await?;
        let what = "make the session strict";
        session
            .run(
                what,
                "SET ignore_checksum_failure = off; SET zero_damaged_pages = off; SET ignore_system_indexes = off; \
                 SET session_replication_role = replica; SET check_function_bodies = off",
            )
            .await?;
        if self.version.major() >= 17 {
            session.run(what, "SET event_triggers = off").await?;
            return Ok(session);
        }
        let triggers = "SELECT evtname::text FROM pg_event_trigger WHERE evtenabled <> 'D' AND NOT pg_is_in_recovery()";
        for row in session.query(what, triggers, &[]).await? {
            // ALTER EVENT TRIGGER itself fires none.
            let sql = format!("ALTER EVENT TRIGGER {} DISABLE", quote::identifier(row.get(0)));
            session.run(what, &sql).await?;
        }
        Ok(session)
    }

    /// The session, or a new one when the server broke it on damaged data.
    async fn usable<'s>(
        &self,
        session: &'s mut Option<Session>,
        database: &str,
    ) -> Result<&'s Session, Error> {
        if session.as_ref().is_none_or(Session::is_closed) {
            *session = Some(self.session(database).await?);
        }
        session.as_ref().ok_or_else(|| Error::Answer {
            what: "open a session".to_owned(),
            answer: String::new(),
        })
    }

    async fn within<T>(
        &self,
        session: &Session,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        session
            .within("check the restored server", &self.options.cancel, self.options.deadline, work)
            .await
    }

    /// Collations whose order may differ from the one the indexes were built with. That is a difference between two machines
    /// and no damage, so it is told apart, and indexes that depend on them are not judged.
    async fn collations(
        &mut self,
        session: &mut Option<Session>,
        database: &str,
        collation: &Collation,
    ) -> Result<BTreeSet<u32>, Error> {
        let mut mismatched = BTreeSet::new();
        let census = self.census_of(database).map(|census| census.collation.clone());
        let version = collation.actual.split_once(' ').map(|(_, version)| version.to_owned());
        let differs_from_recorded = collation.recorded.is_some() && collation.recorded != version;
        let differs_from_source = census.as_ref().is_some_and(|source| *source != collation.actual);
        if differs_from_recorded || differs_from_source {
            mismatched.insert(DEFAULT_COLLATION);
            let source = census.or_else(|| collation.recorded.clone()).unwrap_or_default();
            let text = format!(
                "database {database} sorts by {source:?}, this machine has {:?}",
                collation.actual
            );
            self.unseen("collations", text);
        } else {
            self.finding("collations").good += 1;
        }
        let sql = "\
-- pgmuster: collations of another version
SELECT oid, collname::text, collversion, coalesce(pg_collation_actual_version(oid), '') FROM pg_collation
 WHERE collversion IS NOT NULL AND collversion IS DISTINCT FROM pg_collation_actual_version(oid)
   AND EXISTS (SELECT FROM pg_depend WHERE refclassid = 'pg_collation'::regclass AND refobjid = pg_collation.oid)";
        let usable = self.usable(session, database).await?;
        for row in usable.query("compare the collations", sql, &[]).await? {
            mismatched.insert(row.get(0));
            let (name, source, here): (&str, &str, &str) = (row.get(1), row.get(2), row.get(3));
            self.unseen(
                "collations",
                format!(
                    "collation {name} in {database} has version {source}, this machine {here:?}"
                ),
            );
        }
        Ok(mismatched)
    }

    async fn amcheck(
        &mut self,
        session: &mut Option<Session>,
        database: &str,
        relations: &[Relation],
        mismatched: &BTreeSet<u32>,
    ) -> Result<(), Error> {
        let usable = self.usable(session, database).await?;
        let Some(schema) = self.extension(usable, "amcheck", "amcheck_indexes", database).await?
        else {
            return Ok(());
        };
        let heap =
            format!("SELECT blkno, offnum, msg FROM {schema}.verify_heapam($1::oid::regclass)");
        for relation in relations.iter().filter(|r| r.is_heap && matches!(r.kind, 'r' | 'm' | 't'))
        {
            let usable = self.usable(session, database).await?;
            let checked =
                self.within(usable, usable.query("check a table", &heap, &[&relation.oid])).await;
            let thing = relation.shown(database);
            if let Some(rows) = self.outcome("amcheck_tables", &thing, checked)?
                && let Some(row) = rows.first()
            {
                let (block, text): (Option<i64>, &str) = (row.get(0), row.get(2));
                let text = format!(
                    "{thing}: {} findings, first in block {}: {text}",
                    rows.len(),
                    block.unwrap_or(-1)
                );
                let findings = self.finding("amcheck_tables");
                findings.good -= 1;
                findings.bad.push(text);
            }
        }
        let list = "\
-- pgmuster: indexes to check
SELECT c.oid, n.nspname::text, c.relname::text, i.indcollation::oid[]
  FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_am a ON a.oid = c.relam
 WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence <> 't' AND i.indisvalid AND i.indisready
 ORDER BY c.oid";
        let usable = self.usable(session, database).await?;
        let indexes = usable.query("list the indexes", list, &[]).await?;
        let check = format!("SELECT {schema}.bt_index_check($1::oid::regclass, $2)");
        for row in indexes {
            let (oid, collations): (u32, Vec<u32>) = (row.get(0), row.get(3));
            let thing =
                format!("{}.{} in {database}", row.get::<_, &str>(1), row.get::<_, &str>(2));
            if collations.iter().any(|collation| mismatched.contains(collation)) {
                self.unseen(
                    "amcheck_indexes",
                    format!("{thing}: its collation sorts differently here"),
                );
                continue;
            }
            let usable = self.usable(session, database).await?;
            let every_row = self.options.every_row_in_indexes;
            let checked = self
                .within(usable, usable.query("check an index", &check, &[&oid, &every_row]))
                .await;
            self.outcome("amcheck_indexes", &thing, checked)?;
        }
        Ok(())
    }

    /// Reads what neither the tables' rows nor the B-tree check have touched, for the sake of the page checksums.
    async fn other_pages(
        &mut self,
        session: &mut Option<Session>,
        database: &str,
        relations: &[Relation],
    ) -> Result<(), Error> {
        if !self.checksums {
            return Ok(());
        }
        let usable = self.usable(session, database).await?;
        let Some(schema) = self.extension(usable, "pg_prewarm", "page_checksums", database).await?
        else {
            return Ok(());
        };
        // Only the main fork: free space maps are not protected by WAL, and the server repairs them as it goes.
        let sql = format!("SELECT {schema}.pg_prewarm($1::oid::regclass, 'buffer', 'main')");
        for relation in relations.iter().filter(|relation| matches!(relation.kind, 't' | 'i')) {
            let usable = self.usable(session, database).await?;
            let read =
                self.within(usable, usable.query("read all pages", &sql, &[&relation.oid])).await;
            self.outcome("page_checksums", &relation.shown(database), read)?;
        }
        Ok(())
    }

    /// Each library that the database's functions live in is loaded once.
    async fn libraries(
        &mut self,
        session: &mut Option<Session>,
        database: &str,
    ) -> Result<(), Error> {
        let sql = "\
-- pgmuster: libraries
SELECT DISTINCT probin FROM pg_proc JOIN pg_language l ON l.oid = prolang
 WHERE lanname = 'c' AND probin IS NOT NULL ORDER BY probin";
        let usable = self.usable(session, database).await?;
        for row in usable.query("list the libraries", sql, &[]).await? {
            let library: String = row.get(0);
            let usable = self.usable(session, database).await?;
            match usable.run("load a library", &format!("LOAD {}", quote::literal(&library))).await
            {
                Ok(()) => self.finding("extensions_load").good += 1,
                // A library that is missing or wants to be preloaded says something about this machine only.
                Err(error) => {
                    let text =
                        format!("{library} for {database}: {}", proto::failure::chain(&error));
                    self.unseen("extensions_load", text);
                }
            }
        }
        Ok(())
    }

    /// The quoted schema of an extension, which is created when it is installed on this machine.
    async fn extension(
        &mut self,
        session: &Session,
        name: &str,
        check: &'static str,
        database: &str,
    ) -> Result<Option<String>, Error> {
        let what = "prepare an extension";
        let present = "SELECT nspname::text FROM pg_extension e JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = $1";
        if let Some(row) = session.maybe(what, present, &[&name]).await? {
            return Ok(Some(quote::identifier(row.get(0))));
        }
        let created = session
            .run(
                what,
                &format!(
                    "CREATE SCHEMA IF NOT EXISTS {OWN_SCHEMA}; CREATE EXTENSION {} SCHEMA {OWN_SCHEMA}",
                    quote::identifier(name)
                ),
            )
            .await;
        match created {
            Ok(()) => Ok(Some(quote::identifier(OWN_SCHEMA))),
            Err(error) if error.is_closed() => Err(error),
            Err(error) => {
                let text =
                    format!("{database}: no extension {name}: {}", proto::failure::chain(&error));
                self.unseen(check, text);
                Ok(None)
            }
        }
    }

    fn census_of(&self, database: &str) -> Option<&DatabaseCensus> {
        self.options.census?.databases.iter().find(|census| census.database.as_str() == database)
    }

    async fn compare(&mut self, session: &Session) -> Result<(), Error> {
        let Some(census) = self.options.census else {
            for check in ["relations_present", "row_counts", "canary"] {
                self.unseen(check, "the backup has no census".to_owned());
            }
            return Ok(());
        };
        for database in &census.databases {
            self.compare_database(database);
        }
        // A census without tables is an empty cluster, and an empty cluster is healthy.
        self.finding("relations_present");
        self.finding("row_counts");
        let Some(canary) = &census.canary else {
            self.unseen("canary", "the backup has none".to_owned());
            return Ok(());
        };
        let status = session
            .maybe("look for the canary", "SELECT pg_xact_status($1::text::xid8)", &[canary])
            .await;
        let status = match status {
            Ok(row) => row
                .and_then(|row| row.get::<_, Option<String>>(0))
                .unwrap_or_else(|| "unknown".to_owned()),
            Err(error) if error.is_closed() => return Err(error),
            Err(error) => proto::failure::chain(&error),
        };
        self.note("canary", status == "committed", || format!("transaction {canary} is: {status}"));
        Ok(())
    }

    fn compare_database(&mut self, census: &DatabaseCensus) {
        let database = census.database.as_str();
        let Some(content) = self.databases.remove(database) else {
            self.finding("relations_present").bad.push(format!("database {database} is missing"));
            return;
        };
        for (kind, expected) in &census.relations {
            let found = content.relations.get(kind).copied().unwrap_or(0);
            self.note("relations_present", found >= *expected, || {
                format!("{database} has {found} relations of kind {kind}, {expected} were there")
            });
        }
        for extension in &census.extensions {
            let there = content.extensions.contains(extension);
            self.note("extensions_present", there, || {
                format!("{extension} is missing in {database}")
            });
        }
        for table in &census.tables {
            let key = (table.schema.clone(), table.table.clone());
            let shown = format!("{}.{} in {database}", table.schema, table.table);
            match content.tables.get(&key) {
                None => {
                    self.finding("relations_present").bad.push(format!("table {shown} is missing"))
                }
                Some(found) => self.compare_rows(&shown, table, *found),
            }
        }
        self.databases.insert(database.to_owned(), content);
    }

    fn compare_rows(&mut self, shown: &str, table: &TableCount, found: Option<u64>) {
        let Some((rows, drift)) = table.rows.zip(table.drift) else { return };
        let Some(found) = found else {
            // Why it could not be read stands in tables_readable; what could not be counted does not match.
            self.finding("row_counts")
                .bad
                .push(format!("{shown} could not be counted, {rows} rows were there"));
            return;
        };
        let (fewer, more) = drift;
        let fits = (rows.saturating_sub(fewer)..=rows.saturating_add(more)).contains(&found);
        self.note("row_counts", fits, || {
            let bounds =
                if drift == (0, 0) { String::new() } else { format!(" (-{fewer}, +{more})") };
            format!("{shown} has {found} rows, {rows}{bounds} were there")
        });
    }

    fn report(self, system_identifier: SystemIdentifier, reached_lsn: Lsn) -> CheckReport {
        let compared = self.options.census.iter().filter(|_| self.options.level >= ProofLevel::L5);
        let drifts: Vec<_> = compared
            .flat_map(|census| &census.databases)
            .flat_map(|database| &database.tables)
            .filter_map(|table| table.rows.and(table.drift))
            .collect();
        let exact = drifts.iter().filter(|drift| **drift == (0, 0)).count();
        let counts = || self.databases.values().flat_map(|content| content.tables.values());
        CheckReport {
            server_version_num: self.version.0,
            system_identifier,
            reached_lsn,
            tables: counts().count() as u64,
            rows: counts().flatten().sum(),
            tables_exact: exact as u64,
            tables_bounded: (drifts.len() - exact) as u64,
            checks: CHECKS
                .iter()
                .filter(|(_, level, _)| *level <= self.options.level)
                .map(|(name, level, what)| {
                    conclude(name, *level, what, self.findings.get(name), self.checksums)
                })
                .collect(),
        }
    }
}

/// The default collation of a database: what this machine has, and what the database was made with.
struct Collation {
    actual: String,
    recorded: Option<String>,
}

fn conclude(
    name: &str,
    level: ProofLevel,
    what: &str,
    findings: Option<&Findings>,
    checksums: bool,
) -> ProofCheck {
    let nothing = Findings::default();
    let findings = findings.unwrap_or(&nothing);
    let list = |items: &[String]| {
        let mut text = items.iter().take(NAMED_FINDINGS).cloned().collect::<Vec<_>>().join("; ");
        if items.len() > NAMED_FINDINGS {
            text.push_str(&format!("; and {} more", items.len() - NAMED_FINDINGS));
        }
        text
    };
    let (outcome, detail) = if !findings.bad.is_empty() {
        (CheckOutcome::Failed, format!("{} wrong: {}", findings.bad.len(), list(&findings.bad)))
    } else if name == "page_checksums" && !checksums {
        (CheckOutcome::Skipped, "the cluster has no page checksums".to_owned())
    } else if !findings.unseen.is_empty() {
        let seen = findings.good;
        // Most of it seen is still a look; the rest is told.
        let outcome = if name == "tables_readable" && seen > 0 {
            CheckOutcome::Passed
        } else {
            CheckOutcome::Skipped
        };
        (
            outcome,
            format!(
                "{seen} {what}; {} not judged: {}",
                findings.unseen.len(),
                list(&findings.unseen)
            ),
        )
    } else {
        (CheckOutcome::Passed, format!("{} {what}", findings.good))
    };
    ProofCheck { name: name.to_owned(), level, outcome, detail }
}

/// Everything with storage, and the other kinds that the census counts. Foreign tables are never read.
async fn relations(session: &Session, with_shared: bool) -> Result<Vec<Relation>, Error> {
    let sql = "\
-- pgmuster: relations to check
SELECT c.oid, c.relkind::text, n.nspname::text, c.relname::text,
       n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') AND n.nspname !~ '^pg_(toast_)?temp_'
         AND n.nspname <> 'pgmuster_checks' AND c.relpersistence <> 't' AS is_user,
       coalesce((SELECT amname = 'heap' FROM pg_am WHERE oid = c.relam), false), c.relispopulated
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relpersistence <> 't' AND ($1 OR NOT c.relisshared)
 ORDER BY c.oid";
    let rows = session.query("list the relations", sql, &[&with_shared]).await?;
    Ok(rows
        .iter()
        .map(|row| Relation {
            oid: row.get(0),
            kind: row.get::<_, &str>(1).chars().next().unwrap_or('?'),
            schema: row.get(2),
            name: row.get(3),
            is_user: row.get(4),
            is_heap: row.get(5),
            is_filled: row.get(6),
        })
        .collect())
}

/// Reads every value of every row, detoasted and put into text by its type's own function, and returns the number of rows.
async fn copy_rows(session: &Session, relation: &Relation) -> Result<u64, Error> {
    let what = "read all rows";
    let name = relation.quoted();
    // COPY of a table leaves out generated columns, whose expressions are the user's code; other kinds have none.
    let source = if relation.kind == 'r' { name } else { format!("(SELECT * FROM ONLY {name})") };
    // Without conversion: what is stored is to be read, not judged for its encoding.
    let sql = format!("COPY {source} TO STDOUT (FORMAT text, ENCODING 'SQL_ASCII')");
    let rows = session.client().copy_out(&sql).await.during(what)?;
    pin_mut!(rows);
    let mut count = 0;
    while let Some(row) = rows.next().await {
        // The server sends each row as a message of its own.
        row.during(what)?;
        count += 1;
    }
    Ok(count)
}

async fn count_rows(session: &Session, relation: &Relation) -> Result<u64, Error> {
    let sql = format!("SELECT count(*) FROM ONLY {}", relation.quoted());
    let count: i64 = session.one("count rows", &sql, &[]).await?.get(0);
    Ok(u64::try_from(count).unwrap_or(0))
}
