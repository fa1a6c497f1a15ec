//! Vacuuming bloated tables: which, with which options, and what it will not do.
//!
//! Plain VACUUM makes the space of dead rows usable again inside the file; it does not give the space back. What
//! would (VACUUM FULL, `pg_repack`) needs a second copy or a strong lock, so the plan names it and leaves it to people.

use std::fmt;
use std::time::Duration;

use postgres::Session;
use proto::DatabaseName;
use proto::job::{SkippedTable, VacuumedTable};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::analyze::{Progress, stopped};
use crate::bloat::{self, TableBloat};
use crate::error::Error;
use crate::limits::{Ended, Limits};
use crate::sql;
use crate::table::{self, Left, TableRef, Verdict, unsigned};

/// Above this ratio of real to needed size a table is bloated.
pub const BLOAT_RATIO: f64 = 2.0;
/// Smaller tables are not worth a lock: all their bloat fits into memory many times over.
pub const MIN_SIZE_BYTES: u64 = 1 << 20;
/// A snapshot this old keeps so many dead rows that vacuuming now frees little.
pub const MAX_SNAPSHOT_AGE: Duration = Duration::from_hours(1);
/// PostgreSQL 14 counts in a separate process and answers late.
const COUNTERS_LATE: Duration = Duration::from_secs(2);
const COUNTERS_POLL: Duration = Duration::from_millis(50);

/// A number that is `MIN` to `MAX` by construction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bounded<const MIN: u32, const MAX: u32>(u32);

impl<const MIN: u32, const MAX: u32> Bounded<MIN, MAX> {
    /// `None` outside the bounds.
    pub fn new(value: u32) -> Option<Self> {
        (MIN..=MAX).contains(&value).then_some(Self(value))
    }

    /// The nearest allowed value.
    pub fn clamped(value: u32) -> Self {
        Self(value.clamp(MIN, MAX))
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl<const MIN: u32, const MAX: u32> fmt::Display for Bounded<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether VACUUM looks after the indexes too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IndexCleanup {
    /// The server skips it where there is hardly anything to clean.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never: quick, against wraparound.
    Off,
}

impl IndexCleanup {
    fn as_sql(self) -> &'static str {
        match self {
            Self::Auto => "AUTO",
            Self::On => "ON",
            Self::Off => "OFF",
        }
    }
}

/// How tables are vacuumed. Every field is an enum, a flag or a bounded number: no text of anybody gets into SQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VacuumOptions {
    /// Refresh the planner's statistics in the same go.
    pub analyze: bool,
    /// Give empty pages at the end of the file back to the system. Off by default: it takes an exclusive lock, which
    /// standbys replay without mercy.
    pub truncate: bool,
    /// Whether indexes are cleaned.
    pub index_cleanup: IndexCleanup,
    /// Parallel workers for indexes; 0 is none.
    pub parallel: Bounded<0, 16>,
    /// Milliseconds of sleep each time `cost_limit` is spent; 0 runs at full speed.
    pub cost_delay_ms: Bounded<0, 100>,
    /// Cost between two sleeps; a page read from disk costs 2, one dirtied 20.
    pub cost_limit: Bounded<1, 10_000>,
    /// Shared buffers it may use, in kB, from PostgreSQL 16 on; 0 is no limit.
    pub buffer_limit_kb: Option<Bounded<128, 16_777_216>>,
}

impl Default for VacuumOptions {
    /// ANALYZE too, no truncation, one process, paced like autovacuum but ten times as fast.
    fn default() -> Self {
        Self {
            analyze: true,
            truncate: false,
            index_cleanup: IndexCleanup::Auto,
            parallel: Bounded(0),
            cost_delay_ms: Bounded(2),
            cost_limit: Bounded(2_000),
            buffer_limit_kb: None,
        }
    }
}

impl VacuumOptions {
    /// What stands in the parentheses.
    fn as_sql(self, server_major: u32) -> String {
        let on_off = |on: bool| if on { "ON" } else { "OFF" };
        let mut sql = format!(
            "ANALYZE {}, TRUNCATE {}, INDEX_CLEANUP {}, PARALLEL {}",
            on_off(self.analyze),
            on_off(self.truncate),
            self.index_cleanup.as_sql(),
            self.parallel,
        );
        if let Some(limit) = self.buffer_limit_kb
            && server_major >= 16
        {
            sql += &[", BUFFER_USAGE_LIMIT '", &limit.to_string(), " kB'"].concat();
        }
        sql
    }
}

/// What is wished of a plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlanOptions {
    /// Tables above this ratio are vacuumed; at least 1.0.
    pub bloat_ratio_min: f64,
    /// Smaller tables are left alone.
    pub size_min_bytes: u64,
    /// An older snapshot keeps the plan from doing anything.
    pub snapshot_age_max: Duration,
    /// How the tables are vacuumed.
    pub vacuum: VacuumOptions,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            bloat_ratio_min: BLOAT_RATIO,
            size_min_bytes: MIN_SIZE_BYTES,
            snapshot_age_max: MAX_SNAPSHOT_AGE,
            vacuum: VacuumOptions::default(),
        }
    }
}

/// Who keeps dead rows from being removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotHolder {
    /// In words: which session, slot or prepared transaction.
    pub holder: String,
    /// How many transactions back.
    pub transactions: u64,
    /// Seconds since; `None` where the server does not record it.
    pub held_s: Option<u64>,
}

/// What the server knows of one database's tables and of what holds them back.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    /// Which database.
    pub database: DatabaseName,
    /// The server's major version.
    pub server_major: u32,
    /// The role that asks.
    pub role: String,
    /// Every table but the system's own.
    pub tables: Vec<TableBloat>,
    /// The oldest holders of snapshots, the oldest first.
    pub holders: Vec<SnapshotHolder>,
}

/// One VACUUM of the plan.
#[derive(Debug, Clone, PartialEq)]
pub struct VacuumItem {
    /// Which table.
    pub table: TableRef,
    /// Real over needed size.
    pub bloat_ratio: f64,
    /// Bytes of the main file.
    pub size_bytes: u64,
    /// Bytes its rows need.
    pub needed_bytes: u64,
    /// Dead rows waiting to be removed.
    pub dead_rows: u64,
}

/// What will be vacuumed, how, and what not, each with its reason.
#[derive(Debug, Clone, PartialEq)]
pub struct VacuumPlan {
    /// Which database.
    pub database: DatabaseName,
    /// The server's major version, which decides what VACUUM understands.
    pub server_major: u32,
    /// How.
    pub options: VacuumOptions,
    /// In the order of work: the most bytes to win first.
    pub items: Vec<VacuumItem>,
    /// Left out although they are, or may be, bloated. Tables that are known to be fine are not listed.
    pub skipped: Vec<SkippedTable>,
}

/// What an execution did.
#[derive(Debug, Clone, PartialEq)]
pub struct VacuumResult {
    /// One entry a vacuumed table.
    pub vacuumed: Vec<VacuumedTable>,
    /// Left out by the plan or during the work.
    pub skipped: Vec<SkippedTable>,
    /// How it ended.
    pub ended: Ended,
}

/// Asks the server for everything the plan needs to know of the session's database. Reads no table.
pub async fn read(session: &Session) -> Result<Statistics, Error> {
    let database = table::current_database(session).await?;
    let server_major = table::major(session).await?;
    let tables = bloat::tables(session).await?;
    let rows = session.query("look for old snapshots", sql::HORIZON, &[]).await?;
    let holders = rows.iter().map(|row| SnapshotHolder {
        holder: row.get("holder"),
        transactions: unsigned(row.get("held_transactions")),
        held_s: row.get::<_, Option<i64>>("held_s").map(unsigned),
    });
    let holders = holders.collect();
    Ok(Statistics { database, server_major, role: session.user().to_owned(), tables, holders })
}

/// Decides what to vacuum. Pure: the same statistics give the same plan.
pub fn plan(statistics: &Statistics, options: &PlanOptions) -> VacuumPlan {
    let Statistics { database, server_major, .. } = statistics;
    let mut items = Vec::new();
    let mut skipped = Vec::new();
    for table in &statistics.tables {
        match decide(table, statistics, options) {
            Decision::Vacuum(item) => items.push(item),
            Decision::Skip(reason) => skipped.push(table.table.skipped(database, reason)),
            Decision::Fine => {}
        }
    }
    let to_win = |item: &VacuumItem| item.size_bytes.saturating_sub(item.needed_bytes);
    items.sort_by(|a, b| to_win(b).cmp(&to_win(a)).then_with(|| a.table.oid.cmp(&b.table.oid)));
    VacuumPlan {
        database: database.clone(),
        server_major: *server_major,
        options: options.vacuum,
        items,
        skipped,
    }
}

enum Decision {
    Vacuum(VacuumItem),
    Skip(String),
    Fine,
}

fn decide(table: &TableBloat, statistics: &Statistics, options: &PlanOptions) -> Decision {
    let Some(size_bytes) = table.size_bytes else {
        return Decision::Skip("another session holds it exclusively".to_owned());
    };
    // Small tables without statistics are not worth a line either.
    if size_bytes < options.size_min_bytes {
        let bloated = table.ratio().is_some_and(|ratio| ratio > options.bloat_ratio_min);
        let limit = megabytes(options.size_min_bytes);
        return if bloated && size_bytes > 8_192 {
            Decision::Skip(format!(
                "too small to matter: {} of at least {limit}",
                megabytes(size_bytes)
            ))
        } else {
            Decision::Fine
        };
    }
    let Some((bloat_ratio, needed_bytes)) = table.ratio().zip(table.needed_bytes) else {
        return Decision::Skip(
            "not estimable: analyze it first, and let the role read it (GRANT pg_read_all_data)"
                .to_owned(),
        );
    };
    if bloat_ratio <= options.bloat_ratio_min {
        return Decision::Fine;
    }
    if !table.may_maintain {
        let TableRef { schema, name, .. } = &table.table;
        let grant =
            table::grant(&statistics.role, schema, name, &table.owner, statistics.server_major);
        return Decision::Skip(Left::NotPermitted { grant }.to_string());
    }
    if table.dead_rows == 0 && table.vacuumed_at_ms.is_some() {
        return Decision::Skip(format!(
            "bloated {bloat_ratio:.1} times, but vacuumed already: its free space is in use again as rows come; \
             only VACUUM FULL or pg_repack would give it back"
        ));
    }
    if let Some(holder) = statistics.holders.iter().find(|holder| too_old(holder, options)) {
        return Decision::Skip(format!(
            "bloated {bloat_ratio:.1} times, but vacuuming would free little: {} keeps dead rows since {} s",
            holder.holder,
            holder.held_s.unwrap_or(0)
        ));
    }
    Decision::Vacuum(VacuumItem {
        table: table.table.clone(),
        bloat_ratio,
        size_bytes,
        needed_bytes,
        dead_rows: table.dead_rows,
    })
}

fn too_old(holder: &SnapshotHolder, options: &PlanOptions) -> bool {
    holder.held_s.is_some_and(|held| held >= options.snapshot_age_max.as_secs())
}

/// Does what the plan says, table by table. The session must not be read-only.
///
/// Safe to repeat: a second VACUUM finds nothing to do. Returns within a second or so of `cancel`, with what was done
/// until then; an interrupted VACUUM keeps the pages it has cleaned.
pub async fn execute(
    session: &Session,
    plan: &VacuumPlan,
    limits: &Limits,
    progress: &mut (dyn FnMut(Progress<'_>) + Send),
    cancel: &CancellationToken,
) -> Result<VacuumResult, Error> {
    table::refuse_standby(session, "vacuum the tables").await?;
    limits.apply(session).await?;
    let pace = format!(
        "SET vacuum_cost_delay = {}; SET vacuum_cost_limit = {}",
        plan.options.cost_delay_ms, plan.options.cost_limit
    );
    session.run("set the pace of VACUUM", &pace).await?;
    let mut result = VacuumResult {
        vacuumed: Vec::new(),
        skipped: plan.skipped.clone(),
        ended: Ended::Complete,
    };
    let total = plan.items.len();
    for (done, item) in plan.items.iter().enumerate() {
        if let Some((ended, reason)) = stopped(limits, cancel) {
            let left = plan.items[done..].iter();
            result.skipped.extend(left.map(|item| item.table.skipped(&plan.database, reason)));
            result.ended = ended;
            break;
        }
        progress(Progress { done, total, table: Some(&item.table) });
        match one(session, plan, item, limits, cancel).await? {
            Ok(vacuumed) => result.vacuumed.push(vacuumed),
            Err(reason) => result.skipped.push(item.table.skipped(&plan.database, reason)),
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

/// Vacuums one table; the inner error is why not.
async fn one(
    session: &Session,
    plan: &VacuumPlan,
    item: &VacuumItem,
    limits: &Limits,
    cancel: &CancellationToken,
) -> Result<Result<VacuumedTable, String>, Error> {
    let now = match item.table.now(session).await? {
        Ok(now) => now,
        Err(left) => return Ok(Err(left.to_string())),
    };
    let sql = format!("VACUUM ({}) {}", plan.options.as_sql(plan.server_major), now.quoted);
    let what = format!("vacuum {}", item.table);
    if let Verdict::Skip(reason) = table::work(session, &what, &sql, limits, cancel).await? {
        return Ok(Err(reason));
    }
    Ok(Ok(VacuumedTable {
        database: plan.database.clone(),
        table: item.table.to_string(),
        bloat_ratio: item.bloat_ratio,
        dead_rows_before: now.dead_rows,
        dead_rows_after: dead_rows_after(session, item, now.vacuums).await?,
        size_before_bytes: item.size_bytes,
        size_after_bytes: size_after(session, item).await?,
    }))
}

/// The counter after the VACUUM was counted. When the table vanished meanwhile there is nothing dead in it.
async fn dead_rows_after(
    session: &Session,
    item: &VacuumItem,
    vacuums_before: i64,
) -> Result<u64, Error> {
    let give_up = Instant::now() + COUNTERS_LATE;
    loop {
        session.run("ask for fresh counters", "SELECT pg_catalog.pg_stat_clear_snapshot()").await?;
        match item.table.now(session).await? {
            Ok(now) if now.vacuums > vacuums_before || Instant::now() >= give_up => {
                return Ok(now.dead_rows);
            }
            Ok(_) => tokio::time::sleep(COUNTERS_POLL).await,
            Err(_) => return Ok(0),
        }
    }
}

/// The size now, or the size before when somebody holds the table exclusively or it is gone: an unknown is no gain.
async fn size_after(session: &Session, item: &VacuumItem) -> Result<u64, Error> {
    match session.maybe("measure a table", sql::TABLE_SIZE, &[&item.table.oid]).await {
        Ok(row) => {
            let size = row.and_then(|row| row.get::<_, Option<i64>>(0));
            Ok(size.map_or(item.size_bytes, unsigned))
        }
        Err(error) if error.is_closed() => Err(error.into()),
        Err(_) => Ok(item.size_bytes),
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
fn megabytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

impl fmt::Display for VacuumItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {:.1} times its need ({} for {}), {} dead rows",
            self.table,
            self.bloat_ratio,
            megabytes(self.size_bytes),
            megabytes(self.needed_bytes),
            self.dead_rows
        )
    }
}

impl VacuumPlan {
    /// The plan, one line a table: first what is done, in its order, then what is skipped.
    pub fn lines(&self) -> Vec<String> {
        let done = self.items.iter().map(|item| format!("vacuum {item}"));
        let skipped =
            self.skipped.iter().map(|skip| format!("skip {}: {}", skip.table, skip.reason));
        done.chain(skipped).collect()
    }
}

impl fmt::Display for VacuumPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (items, skipped) = (self.items.len(), self.skipped.len());
        let options = self.options.as_sql(self.server_major);
        writeln!(
            f,
            "database {}: {items} to vacuum ({options}), {skipped} skipped",
            self.database
        )?;
        self.lines().iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        if items > 0 {
            writeln!(
                f,
                "  VACUUM makes this space usable again inside the files; it does not shrink them. VACUUM FULL \
                 (locks the table) or pg_repack (needs twice its space) would."
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(oid: u32, name: &str, size_mb: u64, needed_mb: u64) -> TableBloat {
        TableBloat {
            table: TableRef { oid, schema: "public".to_owned(), name: name.to_owned() },
            owner: "app".to_owned(),
            may_maintain: true,
            size_bytes: Some(size_mb << 20),
            live_rows: 1_000,
            dead_rows: 500,
            needed_bytes: Some(needed_mb << 20),
            vacuumed_at_ms: None,
        }
    }

    fn statistics(tables: Vec<TableBloat>) -> Statistics {
        Statistics {
            database: "orders".parse().unwrap(),
            server_major: 16,
            role: "pgmuster".to_owned(),
            tables,
            holders: Vec::new(),
        }
    }

    fn only_reason(table: TableBloat) -> String {
        let plan = plan(&statistics(vec![table]), &PlanOptions::default());
        assert!(plan.items.is_empty(), "{plan}");
        plan.skipped.into_iter().next().map(|skip| skip.reason).unwrap_or_default()
    }

    #[test]
    fn above_twice_the_need_is_vacuumed_and_exactly_twice_is_not() {
        let tables =
            vec![table(1, "twice", 20, 10), table(2, "more", 21, 10), table(3, "worst", 99, 10)];
        let plan = plan(&statistics(tables), &PlanOptions::default());
        let names: Vec<&str> = plan.items.iter().map(|item| item.table.name.as_str()).collect();
        assert_eq!(names, ["worst", "more"], "the most to win goes first");
        assert!(plan.skipped.is_empty(), "what is fine needs no line");
    }

    #[test]
    fn every_table_left_alone_has_its_reason() {
        let mut small = table(1, "small", 1, 0);
        small.size_bytes = Some(MIN_SIZE_BYTES - 1);
        assert!(only_reason(small).starts_with("too small to matter: 1.0 MiB of at least 1.0 MiB"));

        let mut locked = table(1, "locked", 9, 1);
        locked.size_bytes = None;
        assert_eq!(only_reason(locked), "another session holds it exclusively");

        let mut unknown = table(1, "unknown", 9, 1);
        unknown.needed_bytes = None;
        assert!(only_reason(unknown).starts_with("not estimable"));

        let mut foreign = table(1, "others", 9, 1);
        foreign.may_maintain = false;
        assert!(only_reason(foreign).contains("GRANT \"app\" TO \"pgmuster\""));

        let mut done = table(1, "done", 9, 1);
        done.dead_rows = 0;
        done.vacuumed_at_ms = Some(1);
        assert!(only_reason(done).contains("only VACUUM FULL or pg_repack"));
    }

    #[test]
    fn an_old_snapshot_keeps_the_plan_from_useless_work() {
        let mut statistics = statistics(vec![table(1, "t", 30, 10)]);
        let holder =
            |held_s| SnapshotHolder { holder: "session 7".to_owned(), transactions: 9, held_s };
        statistics.holders = vec![holder(None), holder(Some(3_599))];
        assert_eq!(plan(&statistics, &PlanOptions::default()).items.len(), 1);
        statistics.holders = vec![holder(Some(3_600))];
        let plan = plan(&statistics, &PlanOptions::default());
        assert!(
            plan.skipped[0].reason.ends_with("session 7 keeps dead rows since 3600 s"),
            "{plan}"
        );
    }

    #[test]
    fn an_empty_table_of_many_pages_is_bloated_and_an_empty_file_is_not() {
        let mut empty = table(1, "empty", 30, 0);
        assert!(empty.ratio().unwrap() > 1_000.0);
        empty.size_bytes = Some(0);
        assert!(empty.ratio().unwrap() <= 1.0);
    }

    #[test]
    fn options_are_enums_and_bounded_numbers() {
        assert_eq!(
            VacuumOptions::default().as_sql(14),
            "ANALYZE ON, TRUNCATE OFF, INDEX_CLEANUP AUTO, PARALLEL 0"
        );
        let limited =
            VacuumOptions { buffer_limit_kb: Bounded::new(1_024), ..VacuumOptions::default() };
        assert!(limited.as_sql(16).ends_with(", BUFFER_USAGE_LIMIT '1024 kB'"));
        assert!(!limited.as_sql(15).contains("BUFFER"));
        assert_eq!(Bounded::<1, 5>::new(6), None);
        assert_eq!(Bounded::<1, 5>::clamped(9).get(), 5);
    }

    #[test]
    fn the_plan_prints_itself_and_is_honest() {
        let plan = plan(&statistics(vec![table(1, "t", 30, 10)]), &PlanOptions::default());
        assert_eq!(
            plan.to_string(),
            "database orders: 1 to vacuum (ANALYZE ON, TRUNCATE OFF, INDEX_CLEANUP AUTO, PARALLEL 0), 0 skipped\n  \
             vacuum \"public\".\"t\": 3.0 times its need (30.0 MiB for 10.0 MiB), 500 dead rows\n  \
             VACUUM makes this space usable again inside the files; it does not shrink them. VACUUM FULL \
             (locks the table) or pg_repack (needs twice its space) would.\n"
        );
    }
}
