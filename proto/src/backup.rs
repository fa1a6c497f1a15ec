//! What a backup says about its cluster: the facts a restore, a proof and a person need, none of the bytes.
//!
//! Stored in the manifest's root and never changed afterwards; additive only. Readers ignore fields they do not know.

use serde::{Deserialize, Serialize};

use crate::{ClusterName, DatabaseName, Lsn, SystemIdentifier, Timeline};

/// Everything about the source that a restore cannot learn from the files alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupFacts {
    /// The cluster's name when the backup was taken; the lineage, not the name, is its identity.
    pub cluster: ClusterName,
    /// The source's system identifier, read from its control file.
    pub system_identifier: SystemIdentifier,
    /// `server_version_num`, for example 150018.
    pub server_version_num: u32,
    /// The catalogue version of the control file; binaries must match it.
    pub catalog_version: u32,
    /// Bytes in a page (`BLCKSZ`).
    pub block_size: u32,
    /// Bytes in a WAL segment, 1 MiB to 1 GiB.
    pub wal_segment_size: u32,
    /// Whether data pages carry checksums.
    pub data_checksums: bool,
    /// The timeline of start and stop: a backup that crosses timelines is refused.
    pub timeline: Timeline,
    /// Redo position of the starting checkpoint: WAL from here is needed.
    pub start_lsn: Lsn,
    /// The end of the backup: recovery must reach it.
    pub stop_lsn: Lsn,
    /// Worker's clock when the backup started, Unix milliseconds.
    pub started_at_ms: i64,
    /// Worker's clock when the server ended backup mode, Unix milliseconds.
    pub stopped_at_ms: i64,
    /// `backup_label` as the server returned it. The only true version; written into a restore.
    pub backup_label: String,
    /// `tablespace_map` as the server returned it; empty without tablespaces.
    #[serde(default)]
    pub tablespace_map: String,
    /// The tablespaces of the source.
    #[serde(default)]
    pub tablespaces: Vec<Tablespace>,
    /// Settings a restored server must have at least (`max_connections`, …) and those that shape its data.
    #[serde(default)]
    pub settings: Vec<Setting>,
    /// What the content looked like while the backup was taken.
    #[serde(default)]
    pub census: Option<Census>,
    /// Pages that failed their checksum and were stored as they are: `path`, page number.
    #[serde(default)]
    pub bad_pages: Vec<BadPage>,
}

/// A tablespace outside the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// Its OID, the name of the link in `pg_tblspc`.
    pub oid: u32,
    /// Where it was on the source.
    pub location: String,
}

/// A server setting by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// As in `pg_settings`.
    pub name: String,
    /// Its value as text, in its base unit.
    pub value: String,
}

/// A page that was wrong on the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadPage {
    /// File, relative to the data directory.
    pub path: String,
    /// Block number inside the file, from 0.
    pub block: u32,
}

/// The content of the cluster as it was counted during the backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Census {
    /// A transaction id that was committed during the backup; `pg_xact_status` of the restored server must say so.
    #[serde(default)]
    pub canary: Option<String>,
    /// Each database that accepts connections.
    pub databases: Vec<DatabaseCensus>,
    /// Databases that should be among them but could not be looked at in time, as the server names them. Nothing is known
    /// of their content, so a proof cannot reach L5.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unseen: Vec<String>,
}

/// One database's relations and counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DatabaseCensus {
    /// The database.
    pub database: DatabaseName,
    /// Collation provider and version as recorded by the server, for example `c`, `libc 2.36`.
    #[serde(default)]
    pub collation: String,
    /// Installed extensions, `name version`.
    #[serde(default)]
    pub extensions: Vec<String>,
    /// Number of relations of each `relkind` in user schemas, sorted by kind.
    pub relations: Vec<(char, u64)>,
    /// Row counts of user tables, sorted by name.
    pub tables: Vec<TableCount>,
}

/// What is known of one table's rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableCount {
    /// Schema, unquoted.
    pub schema: String,
    /// Table, unquoted.
    pub table: String,
    /// Rows at the count's snapshot; absent when the census ran out of time before this table.
    pub rows: Option<u64>,
    /// How far the true number at the stop position may differ: `Some((0, 0))` for a table that did not change between
    /// count and stop, `Some((fewer, more))` where the server's counters bound the change, `None` where nothing is known.
    pub drift: Option<(u64, u64)>,
}
