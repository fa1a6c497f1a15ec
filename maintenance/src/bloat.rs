//! How much larger tables and indexes are than their rows need, estimated from statistics, without reading them.
//!
//! For reports and for the plan of a vacuum. An exact figure needs the whole table to be read and belongs on a
//! restored copy, not here.

use postgres::Session;
use tokio_postgres::Row;

use crate::error::Error;
use crate::sql;
use crate::table::{TableRef, unsigned};

/// The estimate for one table's main file; TOAST and indexes are not in it.
#[derive(Debug, Clone, PartialEq)]
pub struct TableBloat {
    /// Which table.
    pub table: TableRef,
    /// Whose it is.
    pub owner: String,
    /// Whether the asking role may vacuum it.
    pub may_maintain: bool,
    /// Bytes of the main file; `None` while somebody holds the table exclusively.
    pub size_bytes: Option<u64>,
    /// Rows now, by the server's counters.
    pub live_rows: u64,
    /// Dead rows not yet vacuumed away, by the server's counters.
    pub dead_rows: u64,
    /// Bytes the rows would need if written anew; `None` without statistics of every column.
    pub needed_bytes: Option<u64>,
    /// When it was last vacuumed, Unix milliseconds.
    pub vacuumed_at_ms: Option<i64>,
}

/// The estimate for one B-tree.
#[derive(Debug, Clone, PartialEq)]
pub struct IndexBloat {
    /// Which index.
    pub index: TableRef,
    /// The OID of its table.
    pub table_oid: u32,
    /// Its table's name, unquoted.
    pub table_name: String,
    /// Its bytes; `None` while somebody holds it or its table exclusively.
    pub size_bytes: Option<u64>,
    /// Bytes its entries need, were no two of them equal; `None` without statistics of every key.
    pub needed_bytes: Option<u64>,
    /// False for one that a failed CREATE INDEX CONCURRENTLY left behind.
    pub is_valid: bool,
}

/// `size / need`; a need of nothing counts as one byte.
#[expect(clippy::cast_precision_loss, reason = "a ratio of sizes needs no 53rd bit")]
pub(crate) fn ratio(size_bytes: u64, needed_bytes: u64) -> f64 {
    size_bytes as f64 / needed_bytes.max(1) as f64
}

impl TableBloat {
    /// Real size over needed size, when both are known. An empty file has no bloat.
    pub fn ratio(&self) -> Option<f64> {
        // An empty table needs no page; one page is what it cannot do without once it has a file.
        let needed = |size: u64| self.needed_bytes.map(|needed| needed.max(size.min(8_192)));
        self.size_bytes.and_then(|size| needed(size).map(|needed| ratio(size, needed)))
    }
}

impl IndexBloat {
    /// Real size over needed size, when both are known.
    pub fn ratio(&self) -> Option<f64> {
        self.size_bytes.zip(self.needed_bytes).map(|(size, needed)| ratio(size, needed))
    }
}

/// Estimates every table of the session's database.
pub async fn tables(session: &Session) -> Result<Vec<TableBloat>, Error> {
    let rows = session.query("estimate the bloat of the tables", sql::TABLE_BLOAT, &[]).await?;
    Ok(rows.iter().map(table).collect())
}

/// Estimates every B-tree of the session's database.
pub async fn indexes(session: &Session) -> Result<Vec<IndexBloat>, Error> {
    let rows = session.query("estimate the bloat of the indexes", sql::INDEX_BLOAT, &[]).await?;
    Ok(rows.iter().map(index).collect())
}

fn named(row: &Row) -> TableRef {
    TableRef { oid: row.get("oid"), schema: row.get("schema"), name: row.get("name") }
}

fn bytes(row: &Row, column: &str) -> Option<u64> {
    row.get::<_, Option<i64>>(column).map(unsigned)
}

fn table(row: &Row) -> TableBloat {
    TableBloat {
        table: named(row),
        owner: row.get("owner"),
        may_maintain: row.get("may_maintain"),
        size_bytes: bytes(row, "size_bytes"),
        live_rows: unsigned(row.get("live_rows")),
        dead_rows: unsigned(row.get("dead_rows")),
        needed_bytes: bytes(row, "needed_bytes"),
        vacuumed_at_ms: row.get("vacuumed_at_ms"),
    }
}

fn index(row: &Row) -> IndexBloat {
    IndexBloat {
        index: named(row),
        table_oid: row.get("table_oid"),
        table_name: row.get("table_name"),
        size_bytes: bytes(row, "size_bytes"),
        needed_bytes: bytes(row, "needed_bytes"),
        is_valid: row.get("is_valid"),
    }
}
