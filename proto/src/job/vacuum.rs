//! Vacuum the tables whose bloat asks for it.

use serde::{Deserialize, Serialize};

use super::SkippedTable;
use crate::DatabaseName;

/// Parameters of a vacuum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vacuum {
    /// Only these databases; every one that accepts connections when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub databases: Option<Vec<DatabaseName>>,
    /// Tables whose size is more than this many times the estimated need, at least 1.0.
    pub bloat_ratio_min: f64,
    /// How long one table may wait for its lock, milliseconds.
    pub lock_timeout_ms: u32,
    /// Only say what would be done.
    #[serde(default)]
    pub plan_only: bool,
}

impl Default for Vacuum {
    fn default() -> Self {
        Self { databases: None, bloat_ratio_min: 2.0, lock_timeout_ms: 2_000, plan_only: false }
    }
}

/// What a vacuum did.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct VacuumOutcome {
    /// Databases visited.
    pub databases: u64,
    /// Tables vacuumed.
    pub vacuumed: Vec<VacuumedTable>,
    /// Tables left out although they are bloated, with the reason.
    pub skipped: Vec<SkippedTable>,
    /// The plan, one line a table, when only the plan was asked for.
    #[serde(default)]
    pub plan: Vec<String>,
}

/// One vacuumed table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VacuumedTable {
    /// The database.
    pub database: DatabaseName,
    /// `schema.table`, quoted as in SQL.
    pub table: String,
    /// Estimated ratio of its size to its need before.
    pub bloat_ratio: f64,
    /// Dead rows before, by the server's statistics.
    pub dead_rows_before: u64,
    /// Dead rows after.
    pub dead_rows_after: u64,
    /// Bytes before.
    pub size_before_bytes: u64,
    /// Bytes after; plain VACUUM frees space inside the file and seldom shrinks it.
    pub size_after_bytes: u64,
}
