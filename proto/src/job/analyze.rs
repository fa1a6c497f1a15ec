//! Refresh the planner's statistics.

use serde::{Deserialize, Serialize};

use crate::DatabaseName;

/// Parameters of an analyze.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Analyze {
    /// Only these databases; every one that accepts connections when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub databases: Option<Vec<DatabaseName>>,
    /// How long one table may wait for its lock, milliseconds.
    pub lock_timeout_ms: u32,
    /// Only say what would be done.
    #[serde(default)]
    pub plan_only: bool,
}

impl Default for Analyze {
    fn default() -> Self {
        Self { databases: None, lock_timeout_ms: 2_000, plan_only: false }
    }
}

/// What an analyze did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AnalyzeOutcome {
    /// Databases visited.
    pub databases: u64,
    /// Tables analyzed.
    pub analyzed: u64,
    /// Tables left out, with the reason.
    pub skipped: Vec<SkippedTable>,
    /// The plan, one line a table, when only the plan was asked for.
    #[serde(default)]
    pub plan: Vec<String>,
}

/// A table that a maintenance job left alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedTable {
    /// The database.
    pub database: DatabaseName,
    /// `schema.table`, quoted as in SQL.
    pub table: String,
    /// Why.
    pub reason: String,
}
