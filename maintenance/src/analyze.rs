//! Refreshing the planner's statistics: which tables, in which order, and doing it.
//!
//! Every table of the database is planned, partitioned parents too, which autovacuum never analyzes. Left out:
//! temporary tables (another session's), foreign tables (ANALYZE would read the remote server), and parents with a
//! foreign partition for the same reason.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::fmt;

use postgres::Session;
use proto::DatabaseName;
use proto::job::SkippedTable;
use tokio::time::Instant;
use tokio_postgres::Row;
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::limits::{Ended, Limits};
use crate::table::{self, TableRef, Verdict, unsigned};
use crate::{sql, table::Left};

/// What kind of relation a table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableKind {
    /// An ordinary table, or a partition that holds rows.
    Table,
    /// A partitioned table: no rows of its own.
    Partitioned,
    /// A materialized view.
    MaterializedView,
    /// A foreign table.
    Foreign,
}

/// What the server knows of one table.
#[derive(Debug, Clone, PartialEq)]
pub struct TableStatistics {
    /// Which table.
    pub table: TableRef,
    /// What it is.
    pub kind: TableKind,
    /// Whether it belongs to a session and vanishes with it.
    pub is_temporary: bool,
    /// The partitioned table it is a partition of.
    pub parent_oid: Option<u32>,
    /// Rows when last counted; `None` when it was never analyzed.
    pub rows: Option<f64>,
    /// Rows changed since the last analyze.
    pub changes: u64,
    /// When it was last analyzed, Unix milliseconds; `None` when that is not recorded.
    pub analyzed_at_ms: Option<i64>,
    /// When autovacuum last analyzed it, Unix milliseconds.
    pub autoanalyzed_at_ms: Option<i64>,
    /// Whose it is.
    pub owner: String,
    /// Whether the asking role may analyze it.
    pub may_maintain: bool,
}

/// All tables of one database.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    /// Which database.
    pub database: DatabaseName,
    /// The server's major version.
    pub server_major: u32,
    /// The role that asks.
    pub role: String,
    /// Every table but the system's own.
    pub tables: Vec<TableStatistics>,
}

/// What may be wished of a plan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AnalyzeOptions {
    /// Leave out tables without any change since their last analyze.
    pub skip_unchanged: bool,
}

/// Why a table is analyzed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reason {
    /// The planner knows nothing of it.
    NeverAnalyzed,
    /// Its rows, or those of its partitions, changed.
    Changed {
        /// Rows changed since.
        rows: u64,
        /// Of how many, when last counted.
        of: f64,
    },
    /// Autovacuum found enough changes in a partition to analyze that, which leaves the parent behind.
    PartitionsMovedOn,
    /// Nothing changed as far as is known; analyzed because all tables are.
    Unchanged,
}

/// One ANALYZE of the plan.
#[derive(Debug, Clone, PartialEq)]
pub struct AnalyzeItem {
    /// Which table.
    pub table: TableRef,
    /// Why.
    pub reason: Reason,
    /// Whether it is a partitioned table, which only an explicit ANALYZE reaches.
    pub is_partitioned: bool,
    /// Partitions that the same statement analyzes. From PostgreSQL 18 on they are items of their own.
    pub covers: usize,
    /// Whether the statement says ONLY: the parent's statistics without its partitions' (PostgreSQL 18 on).
    pub only: bool,
}

/// What will be analyzed, in which order, and what will not, each with its reason.
#[derive(Debug, Clone, PartialEq)]
pub struct AnalyzePlan {
    /// Which database.
    pub database: DatabaseName,
    /// In the order of work: never analyzed first, then by changed rows.
    pub items: Vec<AnalyzeItem>,
    /// Left out.
    pub skipped: Vec<SkippedTable>,
}

/// What an execution did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnalyzeResult {
    /// Tables whose statistics are fresh now; partitions that went with their parent included.
    pub analyzed: u64,
    /// Left out by the plan or during the work.
    pub skipped: Vec<SkippedTable>,
    /// How it ended.
    pub ended: Ended,
}

/// How far an execution is: `done` of `total` statements, and the table it turns to now.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Statements that are over, whatever became of them.
    pub done: usize,
    /// Statements of the plan.
    pub total: usize,
    /// The table whose turn it is; `None` at the end.
    pub table: Option<&'a TableRef>,
}

/// Asks the server for the statistics of the session's database. Touches no table.
pub async fn read(session: &Session) -> Result<Statistics, Error> {
    let database = table::current_database(session).await?;
    let server_major = table::major(session).await?;
    let rows = session.query("read the tables' statistics", sql::TABLE_STATISTICS, &[]).await?;
    let tables = rows.iter().map(statistics).collect();
    Ok(Statistics { database, server_major, role: session.user().to_owned(), tables })
}

fn statistics(row: &Row) -> TableStatistics {
    let rows: f64 = row.get("rows");
    TableStatistics {
        table: TableRef { oid: row.get("oid"), schema: row.get("schema"), name: row.get("name") },
        kind: match row.get("kind") {
            "p" => TableKind::Partitioned,
            "m" => TableKind::MaterializedView,
            "f" => TableKind::Foreign,
            _ => TableKind::Table,
        },
        is_temporary: row.get::<_, &str>("persistence") == "t",
        parent_oid: row.get("parent_oid"),
        rows: (rows >= 0.0).then_some(rows),
        changes: unsigned(row.get("changes")),
        analyzed_at_ms: row.get("analyzed_at_ms"),
        autoanalyzed_at_ms: row.get("autoanalyzed_at_ms"),
        owner: row.get("owner"),
        may_maintain: row.get("may_maintain"),
    }
}

/// Decides what to analyze. Pure: the same statistics give the same plan.
pub fn plan(statistics: &Statistics, options: &AnalyzeOptions) -> AnalyzePlan {
    let Statistics { database, server_major, role, tables } = statistics;
    let tree = Tree::of(tables);
    let mut items = Vec::new();
    let mut skipped = Vec::new();
    let mut obstacles = HashMap::new();
    for table in tables {
        if let Some(reason) = obstacle(table, &tree, role, *server_major) {
            obstacles.insert(table.table.oid, reason);
        }
    }
    // Before PostgreSQL 18, analyzing a partitioned table analyzes all its partitions in the same statement.
    let only = *server_major >= 18;
    let takes_along: HashSet<u32> = tables
        .iter()
        .filter(|table| !only && table.kind == TableKind::Partitioned)
        .map(|table| table.table.oid)
        .filter(|oid| !obstacles.contains_key(oid))
        .collect();
    for table in tables {
        if let Some(reason) = obstacles.get(&table.table.oid) {
            skipped.push(table.table.skipped(database, reason));
            continue;
        }
        if tree.ancestors(table).any(|ancestor| takes_along.contains(&ancestor)) {
            continue;
        }
        let is_partitioned = table.kind == TableKind::Partitioned;
        let family = if is_partitioned { tree.below(table.table.oid) } else { Vec::new() };
        let reason = reason(table, &family, !only);
        if options.skip_unchanged && reason == Reason::Unchanged {
            skipped.push(table.table.skipped(database, "no row changed since it was analyzed"));
            continue;
        }
        let along = family.iter().filter(|below| !obstacles.contains_key(&below.table.oid));
        items.push(AnalyzeItem {
            table: table.table.clone(),
            reason,
            is_partitioned,
            covers: if only { 0 } else { along.count() },
            only: only && is_partitioned,
        });
    }
    items.sort_by(|a, b| order(a).cmp(&order(b)).then_with(|| names(a).cmp(&names(b))));
    AnalyzePlan { database: database.clone(), items, skipped }
}

fn order(item: &AnalyzeItem) -> (u8, Reverse<u64>) {
    match item.reason {
        Reason::NeverAnalyzed => (0, Reverse(0)),
        Reason::Changed { rows, .. } => (1, Reverse(rows)),
        Reason::PartitionsMovedOn => (2, Reverse(0)),
        Reason::Unchanged => (3, Reverse(0)),
    }
}

fn names(item: &AnalyzeItem) -> (&str, &str) {
    (&item.table.schema, &item.table.name)
}

/// Why a table cannot or must not be analyzed, if so.
fn obstacle(table: &TableStatistics, tree: &Tree<'_>, role: &str, major: u32) -> Option<String> {
    if table.is_temporary {
        return Some("temporary: it belongs to another session".to_owned());
    }
    if table.kind == TableKind::Foreign {
        return Some("foreign: analyzing it would read the remote server".to_owned());
    }
    if !table.may_maintain {
        let TableRef { schema, name, .. } = &table.table;
        let grant = table::grant(role, schema, name, &table.owner, major);
        return Some(Left::NotPermitted { grant }.to_string());
    }
    let foreign =
        tree.below(table.table.oid).into_iter().find(|below| below.kind == TableKind::Foreign)?;
    Some(format!(
        "its partition {} is foreign: analyzing it would read the remote server",
        foreign.table
    ))
}

/// `family` are the partitions below; `takes_along` says that they are analyzed in the same statement.
fn reason(table: &TableStatistics, family: &[&TableStatistics], takes_along: bool) -> Reason {
    let Some(own_rows) = table.rows else { return Reason::NeverAnalyzed };
    if takes_along && family.iter().any(|below| below.rows.is_none()) {
        return Reason::NeverAnalyzed;
    }
    // A parent's own counters stay at zero; what changed lies in its partitions.
    let rows = table.changes + family.iter().map(|below| below.changes).sum::<u64>();
    if rows > 0 {
        return Reason::Changed { rows, of: own_rows };
    }
    let since = family.iter().filter_map(|below| below.autoanalyzed_at_ms).max();
    if since > table.analyzed_at_ms { Reason::PartitionsMovedOn } else { Reason::Unchanged }
}

/// Who is a partition of whom.
struct Tree<'a> {
    by_oid: HashMap<u32, &'a TableStatistics>,
    children: HashMap<u32, Vec<&'a TableStatistics>>,
}

impl<'a> Tree<'a> {
    fn of(tables: &'a [TableStatistics]) -> Self {
        let mut children: HashMap<u32, Vec<&TableStatistics>> = HashMap::new();
        for table in tables {
            if let Some(parent) = table.parent_oid {
                children.entry(parent).or_default().push(table);
            }
        }
        Self { by_oid: tables.iter().map(|table| (table.table.oid, table)).collect(), children }
    }

    /// From the parent upwards. Ends also if the catalog, read in between changes, shows a circle.
    fn ancestors(&self, table: &TableStatistics) -> impl Iterator<Item = u32> {
        let next = |oid: &u32| self.by_oid.get(oid).and_then(|table| table.parent_oid);
        std::iter::successors(table.parent_oid, next).take(self.by_oid.len())
    }

    /// Every partition below, at any depth.
    fn below(&self, oid: u32) -> Vec<&'a TableStatistics> {
        let mut found = Vec::new();
        let mut open = vec![oid];
        while let Some(parent) = open.pop() {
            for child in self.children.get(&parent).into_iter().flatten() {
                if found.len() < self.by_oid.len() {
                    found.push(*child);
                    open.push(child.table.oid);
                }
            }
        }
        found
    }
}

/// Does what the plan says, table by table, each in a transaction of its own. The session must not be read-only.
///
/// Safe to repeat: analyzing twice gives the statistics of the second time. Returns within a second or so of
/// `cancel`, with what was done until then.
pub async fn execute(
    session: &Session,
    plan: &AnalyzePlan,
    limits: &Limits,
    progress: &mut (dyn FnMut(Progress<'_>) + Send),
    cancel: &CancellationToken,
) -> Result<AnalyzeResult, Error> {
    table::refuse_standby(session, "analyze the tables").await?;
    limits.apply(session).await?;
    let mut result =
        AnalyzeResult { analyzed: 0, skipped: plan.skipped.clone(), ended: Ended::Complete };
    let total = plan.items.len();
    for (done, item) in plan.items.iter().enumerate() {
        if let Some((ended, reason)) = stopped(limits, cancel) {
            let left = plan.items[done..].iter();
            result.skipped.extend(left.map(|item| item.table.skipped(&plan.database, reason)));
            result.ended = ended;
            break;
        }
        progress(Progress { done, total, table: Some(&item.table) });
        match one(session, item, limits, cancel).await? {
            None => result.analyzed += 1 + item.covers as u64,
            Some(reason) => result.skipped.push(item.table.skipped(&plan.database, reason)),
        }
    }
    progress(Progress { done: total, total, table: None });
    // The last table may have been interrupted, and no further round has noticed.
    if result.ended == Ended::Complete
        && let Some((ended, _)) = stopped(limits, cancel)
        && total > 0
    {
        result.ended = ended;
    }
    Ok(result)
}

/// Whether to stop before the next table, and how that is told for the tables not reached.
pub(crate) fn stopped(
    limits: &Limits,
    cancel: &CancellationToken,
) -> Option<(Ended, &'static str)> {
    if cancel.is_cancelled() {
        return Some((Ended::Cancelled, "not reached: the job was cancelled"));
    }
    limits
        .is_over(Instant::now())
        .then_some((Ended::Deadline, "not reached: the job's time was over"))
}

/// Analyzes one table; `Some` is why not.
async fn one(
    session: &Session,
    item: &AnalyzeItem,
    limits: &Limits,
    cancel: &CancellationToken,
) -> Result<Option<String>, Error> {
    let now = match item.table.now(session).await? {
        Ok(now) => now,
        Err(left) => return Ok(Some(left.to_string())),
    };
    let only = if item.only { "ONLY " } else { "" };
    let sql = format!("ANALYZE {only}{}", now.quoted);
    let what = format!("analyze {}", item.table);
    Ok(match table::work(session, &what, &sql, limits, cancel).await? {
        Verdict::Done => None,
        Verdict::Skip(reason) => Some(reason),
    })
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeverAnalyzed => f.write_str("never analyzed"),
            Self::Changed { rows, of } => write!(f, "{rows} rows changed, of {of:.0}"),
            Self::PartitionsMovedOn => f.write_str("its partitions changed since"),
            Self::Unchanged => f.write_str("no change known"),
        }
    }
}

impl fmt::Display for AnalyzeItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.table, self.reason)?;
        if self.is_partitioned {
            f.write_str("; partitioned, autovacuum never analyzes it")?;
        }
        if self.covers > 0 {
            write!(f, "; its {} partitions are analyzed with it", self.covers)?;
        }
        Ok(())
    }
}

impl AnalyzePlan {
    /// The plan, one line a table: first what is done, in its order, then what is skipped.
    pub fn lines(&self) -> Vec<String> {
        let done = self.items.iter().map(|item| format!("analyze {item}"));
        let skipped =
            self.skipped.iter().map(|skip| format!("skip {}: {}", skip.table, skip.reason));
        done.chain(skipped).collect()
    }
}

impl fmt::Display for AnalyzePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (items, skipped) = (self.items.len(), self.skipped.len());
        writeln!(f, "database {}: {items} to analyze, {skipped} skipped", self.database)?;
        self.lines().iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(oid: u32, name: &str, rows: Option<f64>, changes: u64) -> TableStatistics {
        TableStatistics {
            table: TableRef { oid, schema: "public".to_owned(), name: name.to_owned() },
            kind: TableKind::Table,
            is_temporary: false,
            parent_oid: None,
            rows,
            changes,
            analyzed_at_ms: None,
            autoanalyzed_at_ms: None,
            owner: "app".to_owned(),
            may_maintain: true,
        }
    }

    fn statistics(server_major: u32, tables: Vec<TableStatistics>) -> Statistics {
        let database = "orders".parse().unwrap();
        Statistics { database, server_major, role: "pgmuster".to_owned(), tables }
    }

    fn family() -> Vec<TableStatistics> {
        let mut root = table(1, "root", Some(10.0), 0);
        root.kind = TableKind::Partitioned;
        let mut middle = table(2, "middle", None, 0);
        middle.kind = TableKind::Partitioned;
        middle.parent_oid = Some(1);
        let mut leaf = table(3, "leaf", Some(10.0), 4);
        leaf.parent_oid = Some(2);
        vec![root, middle, leaf, table(4, "other", Some(1.0), 1)]
    }

    fn order_of(plan: &AnalyzePlan) -> Vec<&str> {
        plan.items.iter().map(|item| item.table.name.as_str()).collect()
    }

    #[test]
    fn never_analyzed_goes_first_then_the_most_changed_then_the_rest() {
        let tables = vec![
            table(1, "calm", Some(5.0), 0),
            table(2, "busy", Some(5.0), 900),
            table(3, "new_b", None, 0),
            table(4, "lively", Some(5.0), 90),
            table(5, "new_a", None, 7),
        ];
        let plan = plan(&statistics(15, tables), &AnalyzeOptions::default());
        assert_eq!(order_of(&plan), ["new_a", "new_b", "busy", "lively", "calm"]);
        assert!(plan.skipped.is_empty());
    }

    #[test]
    fn unchanged_tables_may_be_left_out() {
        let tables = vec![table(1, "calm", Some(5.0), 0), table(2, "busy", Some(5.0), 1)];
        let plan = plan(&statistics(15, tables), &AnalyzeOptions { skip_unchanged: true });
        assert_eq!(order_of(&plan), ["busy"]);
        assert_eq!(plan.skipped[0].reason, "no row changed since it was analyzed");
    }

    #[test]
    fn before_18_a_parent_takes_its_partitions_along() {
        let plan = plan(&statistics(17, family()), &AnalyzeOptions::default());
        assert_eq!(order_of(&plan), ["root", "other"]);
        assert_eq!((plan.items[0].covers, plan.items[0].only), (2, false));
        assert_eq!(plan.items[0].reason, Reason::NeverAnalyzed, "one of its partitions never was");
    }

    #[test]
    fn a_parent_changes_with_its_partitions_also_when_autovacuum_has_seen_them() {
        let options = AnalyzeOptions { skip_unchanged: true };
        let mut tables = family();
        tables[1].rows = Some(10.0);
        let first = plan(&statistics(15, tables.clone()), &options);
        assert_eq!(first.items[0].reason, Reason::Changed { rows: 4, of: 10.0 });

        tables[0].analyzed_at_ms = Some(1_000);
        tables[1].analyzed_at_ms = Some(1_000);
        tables[2].changes = 0;
        tables[2].autoanalyzed_at_ms = Some(900);
        let before = plan(&statistics(18, tables.clone()), &options);
        assert_eq!(order_of(&before), ["other"]);
        tables[2].autoanalyzed_at_ms = Some(1_100);
        let after = plan(&statistics(18, tables), &options);
        assert_eq!(order_of(&after), ["other", "middle", "root"]);
        assert_eq!(after.items[2].reason, Reason::PartitionsMovedOn);
    }

    #[test]
    fn from_18_on_every_level_is_a_statement_of_its_own() {
        let plan = plan(&statistics(18, family()), &AnalyzeOptions::default());
        assert_eq!(order_of(&plan), ["middle", "leaf", "root", "other"]);
        assert!(plan.items.iter().all(|item| item.covers == 0));
        assert!(plan.items.iter().all(|item| item.only == item.is_partitioned));
    }

    #[test]
    fn a_parent_that_may_not_be_analyzed_takes_nobody_along() {
        let mut tables = family();
        tables[0].may_maintain = false;
        let plan = plan(&statistics(16, tables), &AnalyzeOptions::default());
        assert_eq!(order_of(&plan), ["middle", "other"]);
        assert!(plan.skipped[0].reason.contains("GRANT \"app\" TO \"pgmuster\""), "{plan}");
    }

    #[test]
    fn nothing_remote_and_nothing_of_other_sessions_is_touched() {
        let mut tables = family();
        tables[2].kind = TableKind::Foreign;
        let mut temporary = table(9, "scratch", None, 0);
        temporary.is_temporary = true;
        tables.push(temporary);
        let plan = plan(&statistics(15, tables), &AnalyzeOptions::default());
        assert_eq!(order_of(&plan), ["other"]);
        let reason = |name: &str| {
            let found = plan.skipped.iter().find(|skip| skip.table.contains(name));
            found.map(|skip| skip.reason.clone()).unwrap_or_default()
        };
        assert!(reason("root").contains("\"leaf\" is foreign"), "{plan}");
        assert!(reason("middle").contains("is foreign"));
        assert!(reason("leaf").starts_with("foreign"));
        assert!(reason("scratch").starts_with("temporary"));
    }

    #[test]
    fn the_plan_prints_itself() {
        let mut tables = family();
        tables[1].rows = Some(10.0);
        tables[3].may_maintain = false;
        let plan = plan(&statistics(17, tables), &AnalyzeOptions::default());
        assert_eq!(
            plan.to_string(),
            "database orders: 1 to analyze, 1 skipped\n  \
             analyze \"public\".\"root\": 4 rows changed, of 10; partitioned, autovacuum never analyzes it; \
             its 2 partitions are analyzed with it\n  \
             skip \"public\".\"other\": the role lacks the right: GRANT MAINTAIN ON TABLE \"public\".\"other\" \
             TO \"pgmuster\" (or GRANT pg_maintain TO \"pgmuster\")\n"
        );
    }

    #[test]
    fn a_circle_in_the_catalog_ends() {
        let mut tables = family();
        tables[0].parent_oid = Some(3);
        let _ = plan(&statistics(15, tables), &AnalyzeOptions::default());
    }
}
