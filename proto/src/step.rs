//! Steps: the named parts of a job, each a span, a timing and a row on the job's page.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One step of an attempt. Sent when it starts and again when it ends; the second replaces the first by `number`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// 1, 2, … in the order they began.
    pub number: u32,
    /// `connect`, `start_backup`, `copy`, `store_wal`, `commit` …
    pub name: String,
    /// The step's span, sixteen hexadecimal digits; the trace is the job's.
    pub span_id: String,
    /// Worker's clock.
    pub started_at_ms: i64,
    /// Worker's clock; absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at_ms: Option<i64>,
    /// True when it ended in a failure.
    #[serde(default)]
    pub failed: bool,
    /// What it did, in numbers: `read_bytes`, `files` …
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub figures: BTreeMap<String, u64>,
}

/// How far a running step is. Travels with the worker's pulse; only the newest counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The step's name.
    pub step: String,
    /// How much is done, in `unit`.
    pub done: u64,
    /// How much there is; absent when unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// `bytes`, `tables` …
    pub unit: String,
}
