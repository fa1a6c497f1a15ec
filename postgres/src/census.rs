//! The census of a cluster: what is in it, counted while its backup is taken, so that a restore can be compared with it.
//!
//! Two halves. [`take_census`] counts early in the backup. [`finish_census`] runs **after** the backup was stopped: only
//! then can anybody say what did not change between a count and the stop position. It keeps what was there at both times,
//! and takes the changes in between from the backup's own WAL.
//!
//! A count of `n` rows is exact (`drift` zero) when two things hold. No transaction that had written to the table before the
//! count was still open: such a one holds a lock on the table, and the locks are read before the count. And the WAL
//! from before that reading up to the stop position holds no insert or delete for the table.
//!
//! On a standby the locks of the primary's transactions are not known, only that some transaction is open: then no count of that
//! moment is exact. The position is what was replayed.
//!
//! A table whose files did not change since the backup before is not counted: what was exact then is exact now
//! ([`table_files`](crate::table_files)). Which tables those are turns out while the files are copied, so they come last.
//!
//! Not counted: templates (a session in a template makes `CREATE DATABASE` fail), temporary tables, unlogged tables
//! (they are empty after a restore), foreign tables and partitioned parents (they hold no rows of their own; the
//! partitions are counted), and what the role may not read.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures::TryStreamExt as _;
use proto::backup::{Census, CountedFile, DatabaseCensus, Forbidden, TableCount};
use proto::{DatabaseName, JobId, Lsn};
use tokio::time::Instant;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_util::sync::CancellationToken;

use crate::connect::{Purpose, connect, connect_maintenance};
use crate::error::{During as _, Error};
use crate::quote;
use crate::session::Session;
use crate::table_files::{Counted, Earlier, TableFiles};
use crate::target::Target;
use crate::wal_changes::WalChanges;

/// The census waits for no lock longer than this, so that it never stands in a queue behind somebody's DDL.
const LOCK_TIMEOUT: Duration = Duration::from_millis(200);
/// Tables counted by one statement: many small tables cost one round trip.
const GROUP_TABLES: usize = 50;
/// Pages counted by one statement at most, unless it counts one table: 64 MiB are read within a second or so.
const GROUP_PAGES: i64 = 8192;

/// How long after a changed table more of them are waited for, to be counted together: at first, and in a long copy.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How a census is taken.
#[derive(Debug, Clone)]
pub struct CensusOptions {
    /// For which job.
    pub job: JobId,
    /// No count begins after this, and a running one is cancelled. Time in which the census waits for the copy to say which
    /// tables changed comes on top.
    pub deadline: Instant,
    /// Limit of one table's count: it holds a snapshot and an `AccessShareLock` that long.
    pub table_limit: Duration,
    /// Interrupts the census.
    pub cancel: CancellationToken,
}

/// A census that waits for the end of the backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CensusDraft {
    canary: Option<String>,
    /// Who counts.
    role: String,
    databases: Vec<DatabaseDraft>,
    /// Databases that are there and could not be looked at.
    unseen: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct DatabaseDraft {
    name: DatabaseName,
    oid: u32,
    collation: String,
    extensions: Vec<String>,
    /// Those that have rows to count.
    relations: Vec<Relation>,
    /// Of the others, there are a lot of indexes, nothing is told but how many there are of a kind: by their object ids.
    others: Vec<(u32, char)>,
    counts: HashMap<u32, Count>,
    /// Of tables that need not be counted unless their files change.
    earlier: HashMap<u32, Earlier>,
    /// Tables that the role may not read.
    forbidden: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Relation {
    oid: u32,
    pub(crate) kind: char,
    pub(crate) schema: String,
    pub(crate) name: String,
    file_node: u32,
    /// The file of its first segment, for what has one.
    path: Option<String>,
    pages: i64,
    /// Whether it has rows of its own that a restore brings back.
    pub(crate) countable: bool,
    is_heap: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Count {
    rows: u64,
    /// Before the locks were read and the rows were counted. Of a count that was taken over, where the backup starts.
    from: Lsn,
    /// Whether an open transaction may have written to the table before the count.
    disturbed: bool,
    /// What the next backup needs to know to take it over.
    file: Option<Counted>,
}

impl CensusDraft {
    /// How many tables have a count, and how many there are to count.
    pub fn counted(&self) -> (usize, usize) {
        let counted = self.databases.iter().map(|database| database.counts.len()).sum();
        let all = self.databases.iter().map(|database| database.relations.len()).sum();
        (counted, all)
    }

    /// What has no count because the role may not read it.
    fn forbidden(&self) -> Option<Forbidden> {
        let of = |database: &DatabaseDraft| database.forbidden.len() as u64;
        let database = self.databases.iter().find(|database| !database.forbidden.is_empty())?;
        let first = format!("{} in {}", database.forbidden.first()?, database.name);
        Some(Forbidden {
            role: self.role.clone(),
            tables: self.databases.iter().map(of).sum(),
            first,
        })
    }
}

/// Commits a canary and counts, and ends after `files` has: then it is known which counts can be taken over. A table that
/// cannot be read is not counted, a database that cannot be read is named as unseen; an error means that there is no census
/// at all.
pub async fn take_census(
    target: &Target,
    options: &CensusOptions,
    files: &TableFiles,
) -> Result<CensusDraft, Error> {
    let session = connect_maintenance(target, &purpose(options)).await?;
    let what = "take the census";
    let canary = canary(&session).await?;
    let rows = session.query(what, &databases_sql(session_version(&session).await?), &[]).await?;
    let role = session.one(what, "SELECT current_user::text", &[]).await?.get(0);
    session.close().await;
    let (mut databases, mut unseen) = (Vec::new(), Vec::new());
    for row in rows {
        let shown: String = row.get("name");
        let Ok(name) = shown.parse::<DatabaseName>() else {
            unseen.push(shown);
            continue;
        };
        if options.cancel.is_cancelled() {
            return Err(Error::Cancelled { what: what.to_owned() });
        }
        let oid = row.get("oid");
        match database_draft(target, options, files, &name, oid, row.get("collation")).await {
            Ok(draft) => databases.push(draft),
            Err(error @ Error::Cancelled { .. }) => return Err(error),
            // It was dropped since the list was made, and is not in the backup's end either.
            Err(error) if is_gone(&error) => {}
            Err(error) => {
                warn_unseen(&name, &error);
                unseen.push(shown);
            }
        }
    }
    count_changed(target, options, files, &mut databases).await?;
    Ok(CensusDraft { canary, role, databases, unseen })
}

/// Counts the tables whose files turn out to have changed, and takes over the counts of the others.
async fn count_changed(
    target: &Target,
    options: &CensusOptions,
    files: &TableFiles,
    databases: &mut [DatabaseDraft],
) -> Result<(), Error> {
    let mut options = options.clone();
    let mut pause = PAUSE;
    while databases.iter().any(|database| !database.earlier.is_empty()) {
        let waited = Instant::now();
        let cancelled = || Error::Cancelled { what: "take the census".to_owned() };
        tokio::select! {
            biased;
            () = options.cancel.cancelled() => return Err(cancelled()),
            () = files.news(pause) => {}
        }
        pause = (pause * 2).min(PAUSE_MAX);
        options.deadline += waited.elapsed();
        let seen = files.seen();
        for database in &mut *databases {
            let DatabaseDraft { name, relations, counts, earlier, forbidden, .. } = database;
            let is_changed = |relation: &&Relation| {
                let changed = files.has_changed(relation.path.as_deref(), &seen);
                earlier.contains_key(&relation.oid) && (changed || seen.ended == Some(false))
            };
            let changed: Vec<&Relation> = relations.iter().filter(is_changed).collect();
            let disturbed = seen.ended.is_some() && counts.values().any(|count| count.disturbed);
            if changed.is_empty() && !disturbed {
                continue;
            }
            for relation in &changed {
                earlier.remove(&relation.oid);
            }
            let counted = async {
                let session =
                    connect(&target.with_database(name.as_str()), &purpose(&options)).await?;
                let denied = count_all(&session, &options, files, &changed, name, counts).await?;
                forbidden.extend(denied);
                if seen.ended.is_some() {
                    count_disturbed(&session, &options, files, relations, counts).await?;
                }
                session.close().await;
                Ok(())
            };
            if let Err(error) = counted.await {
                if matches!(error, Error::Cancelled { .. }) {
                    return Err(error);
                }
                // The end of the census says whether it is gone, or cannot be looked at.
                warn_unseen(name, &error);
            }
        }
        if seen.ended.is_none() {
            continue;
        }
        for DatabaseDraft { relations, counts, earlier, .. } in &mut *databases {
            for relation in &*relations {
                if let Some(Earlier { rows, counted }) = earlier.remove(&relation.oid) {
                    let (from, file) = (files.since(), Some(counted));
                    counts.insert(relation.oid, Count { rows, from, disturbed: false, file });
                }
            }
        }
    }
    Ok(())
}

/// Completes a census after the backup was stopped at `stop_lsn`. `changes` has read the backup's WAL up to there; without
/// it the counts stay, but nothing is known of how they may have changed.
///
/// A database that cannot be looked at again before the deadline is named as unseen; when that is all of them there is no
/// census.
pub async fn finish_census(
    target: &Target,
    options: &CensusOptions,
    draft: CensusDraft,
    changes: Option<&WalChanges>,
    stop_lsn: Lsn,
) -> Result<Census, Error> {
    let what = || "finish the census".to_owned();
    let forbidden = draft.forbidden();
    let (mut databases, mut unseen) = (Vec::new(), draft.unseen);
    let mut seen = 0_usize;
    let mut first_error = None;
    for database in draft.databases {
        let name = database.name.clone();
        // Its session goes with the future that is dropped, and a running statement with the session.
        let finished = tokio::select! {
            biased;
            () = options.cancel.cancelled() => return Err(Error::Cancelled { what: what() }),
            () = tokio::time::sleep_until(options.deadline) => Err(Error::Deadline { what: what() }),
            finished = finish_database(target, options, database, changes, stop_lsn) => finished,
        };
        match finished {
            Ok(finished) => {
                seen += 1;
                databases.extend(finished);
            }
            Err(error) => {
                warn_unseen(&name, &error);
                unseen.push(name.to_string());
                first_error.get_or_insert(error);
            }
        }
    }
    // An empty census would say that there was nothing to compare with.
    if let Some(error) = first_error
        && seen == 0
    {
        return Err(error);
    }
    unseen.sort_unstable();
    Ok(Census { canary: draft.canary, databases, unseen, forbidden })
}

fn warn_unseen(name: &DatabaseName, error: &Error) {
    let why = proto::failure::chain(error);
    tracing::warn!(database = %name, "The census cannot tell what is in database {name}: {why}");
}

/// Whether there is no such database.
fn is_gone(error: &Error) -> bool {
    error.state().is_some_and(|state| state.code() == "3D000")
}

fn purpose(options: &CensusOptions) -> Purpose {
    Purpose {
        lock_timeout: LOCK_TIMEOUT,
        statement_timeout: options.table_limit,
        ..Purpose::ask(&options.job)
    }
}

async fn session_version(session: &Session) -> Result<u32, Error> {
    let sql = "SELECT current_setting('server_version_num')::int4 / 10000";
    Ok(session.one("ask for the version", sql, &[]).await?.get::<_, i32>(0).cast_unsigned())
}

/// A transaction id that was assigned and committed now. It writes one commit record and touches no table. On a standby, which
/// assigns none, the newest of its primary's that it knows to be committed, if there is one among the last thousand.
async fn canary(session: &Session) -> Result<Option<String>, Error> {
    let what = "commit the canary";
    let recovering = session.one(what, "SELECT pg_is_in_recovery()", &[]).await?;
    if recovering.get(0) {
        let sql = "\
-- pgmuster: the newest transaction that was committed
SELECT id::text FROM (SELECT pg_snapshot_xmin(pg_current_snapshot())::text::int8 AS xmin) s,
       generate_series(xmin - 1, greatest(xmin - 1000, 3), -1) id
 WHERE pg_xact_status(id::text::xid8) = 'committed' LIMIT 1";
        return Ok(session.maybe(what, sql, &[]).await?.map(|row| row.get(0)));
    }
    let id: String = session.one(what, "SELECT pg_current_xact_id()::text", &[]).await?.get(0);
    let status = session.one(what, "SELECT pg_xact_status($1::text::xid8)", &[&id]).await?;
    match status.get::<_, Option<&str>>(0) {
        Some("committed") => Ok(Some(id)),
        other => Err(Error::Answer { what: what.to_owned(), answer: format!("{id} is {other:?}") }),
    }
}

/// Every database that accepts connections and is no template, with the collation version that the system has *now*: the
/// recorded one is in the backup itself.
fn databases_sql(major: u32) -> String {
    format!(
        "-- pgmuster: databases of the census\n\
         SELECT oid, datname::text AS name, {} AS collation FROM pg_database \
         WHERE datallowconn AND NOT datistemplate AND datconnlimit <> -2 \
           AND has_database_privilege(oid, 'CONNECT') ORDER BY datname",
        collation_sql(major)
    )
}

/// `c`, `libc 2.36`, `icu 153.121` …: provider and actual version of the default collation of a row of `pg_database`.
pub(crate) fn collation_sql(major: u32) -> String {
    let portable = "datcollate IN ('C', 'POSIX') AND datctype IN ('C', 'POSIX')";
    if major < 15 {
        return format!(
            "CASE WHEN {portable} THEN 'c' ELSE trim('libc ' || coalesce((SELECT pg_collation_actual_version(c.oid) \
             FROM pg_collation c WHERE c.collprovider = 'c' AND c.collcollate = datcollate LIMIT 1), '')) END"
        );
    }
    format!(
        "CASE WHEN datlocprovider = 'c' AND {portable} THEN 'c' ELSE trim(CASE datlocprovider WHEN 'c' THEN 'libc ' \
         WHEN 'i' THEN 'icu ' ELSE 'builtin ' END || coalesce(pg_database_collation_actual_version(oid), '')) END"
    )
}

pub(crate) const EXTENSIONS: &str = "\
-- pgmuster: extensions
SELECT extname || ' ' || extversion FROM pg_extension ORDER BY extname";

/// Relations of user schemas. The toast tables belong to their tables and are not listed.
const RELATIONS: &str = "\
-- pgmuster: relations of a database
SELECT c.oid, c.relkind::text AS kind, n.nspname::text AS schema, c.relname::text AS name,
       c.relfilenode AS file_node, pg_relation_filepath(c.oid) AS path, c.relpages::int8 AS pages,
       c.relkind IN ('r', 'm') AND c.relpersistence = 'p' AND c.relispopulated AS countable,
       coalesce((SELECT amname = 'heap' FROM pg_am WHERE oid = c.relam), false) AS is_heap
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
   AND n.nspname !~ '^pg_(toast_)?temp_' AND c.relpersistence <> 't'
 ORDER BY c.relpages, c.oid";

/// Tables that an open transaction may have written to: the lock modes that allow it. Prepared transactions are among them.
const WRITE_LOCKS: &str = "\
-- pgmuster: tables being written
SELECT DISTINCT relation FROM pg_locks
 WHERE locktype = 'relation' AND granted AND relation IS NOT NULL
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
   AND pid IS DISTINCT FROM pg_backend_pid()";

/// Everything before it is seen by the next snapshot, or belongs to a transaction that is still open.
const POSITION: &str = "\
-- pgmuster: position of the census
SELECT CASE WHEN pg_is_in_recovery() THEN coalesce(pg_last_wal_replay_lsn(), '0/0') ELSE pg_current_wal_insert_lsn() END::text";

/// Whether this is a standby that knows of an open transaction: those between the two ends of a snapshot, and those that are newer
/// than every one that has ended.
const ANY_OPEN: &str = "\
-- pgmuster: open transactions of a standby
SELECT pg_is_in_recovery() AND (pg_snapshot_xmin(s) <> pg_snapshot_xmax(s)
       OR age((pg_snapshot_xmax(s)::text::int8 & 4294967295)::text::xid) > 0) FROM pg_current_snapshot() s";

fn relation(row: &Row) -> Relation {
    let kind: &str = row.get("kind");
    Relation {
        oid: row.get("oid"),
        kind: kind.chars().next().unwrap_or('?'),
        schema: row.get("schema"),
        name: row.get("name"),
        file_node: row.get("file_node"),
        path: row.get("path"),
        pages: row.get("pages"),
        countable: row.get("countable"),
        is_heap: row.get("is_heap"),
    }
}

pub(crate) async fn relations(session: &Session) -> Result<Vec<Relation>, Error> {
    let mut relations = Vec::new();
    each_relation(session, |relation| relations.push(relation)).await?;
    Ok(relations)
}

/// There may be a row for each of a million relations: they are never all in memory.
async fn each_relation(session: &Session, mut tell: impl FnMut(Relation)) -> Result<(), Error> {
    let what = "list the relations";
    let none = std::iter::empty::<&(dyn ToSql + Sync)>();
    let rows = session.client().query_raw(RELATIONS, none).await.during(what)?;
    let mut rows = std::pin::pin!(rows);
    while let Some(row) = rows.try_next().await.during(what)? {
        tell(relation(&row));
    }
    Ok(())
}

async fn database_draft(
    target: &Target,
    options: &CensusOptions,
    files: &TableFiles,
    name: &DatabaseName,
    oid: u32,
    collation: String,
) -> Result<DatabaseDraft, Error> {
    let session = connect(&target.with_database(name.as_str()), &purpose(options)).await?;
    let extensions = session.query("list the extensions", EXTENSIONS, &[]).await?;
    let (mut relations, mut others) = (Vec::new(), Vec::new());
    each_relation(&session, |relation| {
        if relation.countable {
            relations.push(relation);
        } else {
            others.push((relation.oid, relation.kind));
        }
    })
    .await?;
    let known = |relation: &Relation| {
        let earlier = files.earlier(relation.path.as_deref())?;
        relation.is_heap.then_some((relation.oid, earlier))
    };
    let earlier: HashMap<u32, Earlier> = relations.iter().filter_map(known).collect();
    let to_count = |relation: &&Relation| !earlier.contains_key(&relation.oid);
    let to_count: Vec<&Relation> = relations.iter().filter(to_count).collect();
    let mut counts = HashMap::new();
    let forbidden = count_all(&session, options, files, &to_count, name, &mut counts).await?;
    count_disturbed(&session, options, files, &relations, &mut counts).await?;
    session.close().await;
    Ok(DatabaseDraft {
        name: name.clone(),
        oid,
        collation,
        extensions: extensions.iter().map(|row| row.get(0)).collect(),
        relations,
        others,
        counts,
        earlier,
        forbidden,
    })
}

/// Counts tables of one database as far as it can, and gives the names of those that the role may not read.
async fn count_all(
    session: &Session,
    options: &CensusOptions,
    files: &TableFiles,
    tables: &[&Relation],
    name: &DatabaseName,
    counts: &mut HashMap<u32, Count>,
) -> Result<Vec<String>, Error> {
    let (mut uncounted, mut forbidden) = (0_usize, Vec::new());
    for group in groups(tables) {
        let missing = count_group(session, options, files, &group, counts).await?;
        let mut each = Vec::new();
        match missing {
            None => {}
            Some(why) if group.len() == 1 => each.push((group[0], why)),
            // One table that is locked, forbidden or broken must not take the others of its group with it.
            Some(_) => {
                for table in group {
                    let missing = count_group(session, options, files, &[table], counts).await?;
                    each.extend(missing.map(|why| (table, why)));
                }
            }
        }
        uncounted += each.len();
        let denied = each.into_iter().filter(|(_, why)| *why == Missing::Forbidden);
        forbidden.extend(denied.map(|(table, _)| format!("{}.{}", table.schema, table.name)));
    }
    if uncounted > 0 {
        let counted = tables.len() - uncounted;
        let denied = forbidden.first().map_or(String::new(), |first| {
            format!("; the role may not read {} of them, {first} first", forbidden.len())
        });
        tracing::warn!(database = %name, "Counted {counted} tables of database {name}, not {uncounted}{denied}");
    }
    Ok(forbidden)
}

/// Why a table has no count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    /// The role may not read it.
    Forbidden,
    /// It is locked or broken, or there is no time.
    Other,
}

/// A second look at what was disturbed: most transactions are short.
async fn count_disturbed(
    session: &Session,
    options: &CensusOptions,
    files: &TableFiles,
    relations: &[Relation],
    counts: &mut HashMap<u32, Count>,
) -> Result<(), Error> {
    let is_disturbed =
        |table: &&Relation| counts.get(&table.oid).is_some_and(|count| count.disturbed);
    let disturbed: Vec<&Relation> = relations.iter().filter(is_disturbed).collect();
    for group in groups(&disturbed) {
        count_group(session, options, files, &group, counts).await?;
    }
    Ok(())
}

/// Neighbours in size order, as many as one statement may count.
fn groups<'a>(tables: &[&'a Relation]) -> Vec<Vec<&'a Relation>> {
    let mut groups: Vec<Vec<&Relation>> = Vec::new();
    let mut pages = 0;
    for table in tables {
        let size = table.pages.max(1);
        match groups.last_mut() {
            Some(group) if group.len() < GROUP_TABLES && pages + size <= GROUP_PAGES => {
                group.push(table);
                pages += size;
            }
            _ => {
                groups.push(vec![table]);
                pages = size;
            }
        }
    }
    groups
}

/// Counts some tables with one snapshot, or says why they could not be counted; an error ends the whole database.
async fn count_group(
    session: &Session,
    options: &CensusOptions,
    files: &TableFiles,
    tables: &[&Relation],
    counts: &mut HashMap<u32, Count>,
) -> Result<Option<Missing>, Error> {
    let what = "count rows";
    if Instant::now() >= options.deadline {
        return Ok(Some(Missing::Other));
    }
    // The order is what makes a count exact, see the top of this file: position, then locks, then the snapshot.
    let from: String = session.one(what, POSITION, &[]).await?.get(0);
    let from =
        from.parse::<Lsn>().map_err(|_| Error::Answer { what: what.to_owned(), answer: from })?;
    let any_open: bool = session.one(what, ANY_OPEN, &[]).await?.get(0);
    let locks = session.query(what, WRITE_LOCKS, &[]).await?;
    let written: HashSet<u32> = locks.iter().map(|row| row.get(0)).collect();
    let parts: Vec<String> = tables
        .iter()
        .map(|table| {
            let name = quote::qualified(&table.schema, &table.name);
            // The name could mean another table by now; while this statement holds its lock it cannot change again.
            format!("SELECT to_regclass({})::oid, count(*) FROM ONLY {name}", quote::literal(&name))
        })
        .collect();
    let sql = format!("-- pgmuster: count rows\n{}", parts.join("\nUNION ALL "));
    let counting = session
        .within(what, &options.cancel, Some(options.deadline), session.query(what, &sql, &[]))
        .await;
    let rows = match counting {
        Ok(rows) => rows,
        Err(error @ Error::Cancelled { .. }) => return Err(error),
        Err(error) if error.is_closed() => return Err(error),
        Err(error) if error.state() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            return Ok(Some(Missing::Forbidden));
        }
        Err(_) => return Ok(Some(Missing::Other)),
    };
    for row in rows {
        let Some(oid) = row.get::<_, Option<u32>>(0) else { continue };
        let rows = u64::try_from(row.get::<_, i64>(1)).unwrap_or(0);
        if let Some(table) = tables.iter().find(|table| table.oid == oid) {
            let disturbed = any_open || written.contains(&oid);
            let file = files.counted(table.path.as_deref());
            counts.insert(oid, Count { rows, from, disturbed, file });
        }
    }
    Ok(None)
}

/// `None` when the database is gone: it was dropped before or after the stop, and nothing can be said of it.
async fn finish_database(
    target: &Target,
    options: &CensusOptions,
    mut draft: DatabaseDraft,
    changes: Option<&WalChanges>,
    stop_lsn: Lsn,
) -> Result<Option<DatabaseCensus>, Error> {
    let session = match connect(&target.with_database(draft.name.as_str()), &purpose(options)).await
    {
        Ok(session) => session,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let oid = session.one(
        "look at the database",
        "SELECT oid FROM pg_database WHERE datname = current_database()",
        &[],
    );
    if oid.await?.get::<_, u32>(0) != draft.oid {
        return Ok(None);
    }
    let mut after = Aftermath::of(&mut draft);
    each_relation(&session, |now| after.see(&draft, &now)).await?;
    let extensions = session.query("list the extensions", EXTENSIONS, &[]).await?;
    session.close().await;
    let extensions: HashSet<String> = extensions.iter().map(|row| row.get(0)).collect();
    Ok(Some(conclude(draft, after, &extensions, changes, stop_lsn)))
}

/// What has become of the relations. There may be a million, so each takes a few bytes.
struct Aftermath {
    /// How many are still there, of each kind.
    relations: HashMap<char, u64>,
    /// Of each table of the draft, in its order.
    tables: Vec<Option<After>>,
}

/// What has become of a table.
#[derive(Debug, Clone, Copy)]
struct After {
    file_node: u32,
    /// It is the same by its name, and still has rows of its own.
    is_same: bool,
}

impl Aftermath {
    /// Has the draft in the order in which it is looked up.
    fn of(draft: &mut DatabaseDraft) -> Self {
        draft.relations.sort_unstable_by_key(|relation| relation.oid);
        draft.others.sort_unstable();
        Self { relations: HashMap::new(), tables: vec![None; draft.relations.len()] }
    }

    fn see(&mut self, draft: &DatabaseDraft, now: &Relation) {
        if let Ok(at) = draft.relations.binary_search_by_key(&now.oid, |relation| relation.oid) {
            let before = &draft.relations[at];
            if before.kind == now.kind {
                let is_same =
                    now.countable && (&now.schema, &now.name) == (&before.schema, &before.name);
                self.tables[at] = Some(After { file_node: now.file_node, is_same });
                *self.relations.entry(now.kind).or_default() += 1;
            }
        } else if draft.others.binary_search(&(now.oid, now.kind)).is_ok() {
            *self.relations.entry(now.kind).or_default() += 1;
        }
    }
}

/// What was there when the backup stopped, from what was there before and after.
fn conclude(
    draft: DatabaseDraft,
    after: Aftermath,
    extensions_after: &HashSet<String>,
    changes: Option<&WalChanges>,
    stop_lsn: Lsn,
) -> DatabaseCensus {
    let mut tables = Vec::new();
    for (before, now) in draft.relations.into_iter().zip(after.tables) {
        let Some(now) = now.filter(|now| now.is_same) else { continue };
        let count = draft.counts.get(&before.oid);
        tables.push(TableCount {
            rows: count.map(|count| count.rows),
            drift: count.and_then(|count| drift(draft.oid, &before, now, count, changes, stop_lsn)),
            file: count.and_then(|count| counted_file(before.path, count)),
            schema: before.schema,
            table: before.name,
        });
    }
    let relations = after.relations;
    let mut relations: Vec<_> = relations.into_iter().collect();
    relations.sort_unstable();
    tables.sort_unstable_by(|a, b| (&a.schema, &a.table).cmp(&(&b.schema, &b.table)));
    DatabaseCensus {
        database: draft.name,
        collation: draft.collation,
        extensions: draft
            .extensions
            .into_iter()
            .filter(|extension| extensions_after.contains(extension))
            .collect(),
        relations,
        tables,
    }
}

fn counted_file(path: Option<String>, count: &Count) -> Option<CountedFile> {
    let Counted { size_bytes, counted_at_ms } = count.file?;
    Some(CountedFile { path: path?, size_bytes, counted_at_ms })
}

/// How many rows fewer or more than counted the table can have had at the stop position; `None` when nothing bounds it.
fn drift(
    database: u32,
    before: &Relation,
    now: After,
    count: &Count,
    changes: Option<&WalChanges>,
    stop_lsn: Lsn,
) -> Option<(u64, u64)> {
    // A new file node is a TRUNCATE or a rewrite; a table access method of an extension writes WAL of its own kind.
    if count.disturbed || before.file_node != now.file_node || !before.is_heap {
        return None;
    }
    let changed = changes?.of_table(database, before.file_node, count.from, stop_lsn)?;
    Some((changed.deleted.min(count.rows), changed.inserted))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(oid: u32, pages: i64) -> Relation {
        Relation {
            oid,
            kind: 'r',
            schema: "s".to_owned(),
            name: format!("t{oid}"),
            file_node: oid,
            path: Some(format!("base/5/{oid}")),
            pages,
            countable: true,
            is_heap: true,
        }
    }

    #[test]
    fn small_tables_are_counted_together_and_large_ones_alone() {
        let tables = [table(1, 0), table(2, 1), table(3, 9000), table(4, 9000)];
        let all: Vec<&Relation> = tables.iter().collect();
        let sizes: Vec<_> = groups(&all).iter().map(Vec::len).collect();
        assert_eq!(sizes, [2, 1, 1]);
    }

    #[test]
    fn only_what_was_there_before_and_after_is_told() {
        let mut renamed = table(2, 0);
        renamed.name = "other".to_owned();
        let mut rewritten = table(4, 0);
        rewritten.file_node = 99;
        let index = |oid| Relation { kind: 'i', countable: false, ..table(oid, 0) };
        let after = [index(9), table(1, 0), renamed, rewritten, table(5, 0), index(8), index(6)];
        let count = Count { rows: 7, from: Lsn(10), disturbed: false, file: None };
        let mut draft = DatabaseDraft {
            name: "d".parse().unwrap(),
            oid: 5,
            collation: "c".to_owned(),
            extensions: vec!["a 1".to_owned(), "b 1".to_owned()],
            relations: vec![table(3, 0), table(2, 0), table(1, 0), table(4, 0)],
            others: vec![(9, 'i'), (7, 'i'), (8, 'S')],
            counts: [1, 2, 3, 4].map(|oid| (oid, count.clone())).into(),
            earlier: HashMap::new(),
            forbidden: Vec::new(),
        };
        let mut seen = Aftermath::of(&mut draft);
        for now in &after {
            seen.see(&draft, now);
        }
        let finished = conclude(draft, seen, &HashSet::from(["b 1".to_owned()]), None, Lsn(20));
        assert_eq!(finished.relations, [('i', 1), ('r', 3)]);
        assert_eq!(finished.extensions, ["b 1"]);
        let names: Vec<_> =
            finished.tables.iter().map(|t| (t.table.as_str(), t.rows, t.drift)).collect();
        assert_eq!(names, [("t1", Some(7), None), ("t4", Some(7), None)]);
    }
}
