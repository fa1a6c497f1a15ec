//! What a backup says about its cluster: the facts a restore, a proof and a person need, none of the bytes.
//!
//! Stored in the manifest's root and never changed afterwards; additive only. Readers ignore fields they do not know.

use serde::{Deserialize, Serialize};

use crate::words::count;
use crate::{ClusterName, DatabaseName, Lsn, SystemIdentifier, Timeline};

/// What a backup is.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum BackupKind {
    /// The files of a cluster and its WAL: a server starts from it.
    #[default]
    Physical,
    /// What `pg_dump` says of each database: it is loaded into a server.
    Logical,
}

impl BackupKind {
    /// The kind as text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Physical => "physical",
            Self::Logical => "logical",
        }
    }

    /// Whether it is a physical one.
    pub fn is_physical(&self) -> bool {
        *self == Self::Physical
    }
}

impl std::fmt::Display for BackupKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

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
    /// How much of the files was read. Absent in a logical backup, and where nobody wrote it down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reading: Option<Reading>,
    /// Of a logical backup, and of no other: its databases. Positions and times are then those of the server when the first
    /// dump began and when the last one ended, `backup_label` is empty, and no recovery has to reach anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logical: Option<LogicalFacts>,
}

impl BackupFacts {
    /// Whether it was taken of a standby, which cannot end the segment in which its backup ends.
    pub fn is_of_standby(&self) -> bool {
        self.backup_label.lines().any(|line| line == "BACKUP FROM: standby")
    }

    /// What the backup is.
    pub fn kind(&self) -> BackupKind {
        if self.logical.is_some() { BackupKind::Logical } else { BackupKind::Physical }
    }
}

/// How much of a server's files a backup read, and why not less.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// When the server was started, its clock, Unix milliseconds. What happens to files while a server is stopped, no WAL summary
    /// tells: the next backup uses them only if it meets the same start.
    pub server_started_at_ms: i64,
    /// Bytes that came from the source, WAL included. Over connections a small file comes whole when a page of it is wanted, so that
    /// together with the next figure they may be more than there is.
    pub read_bytes: u64,
    /// Bytes of files taken over from the backup before without being looked at. Of these no page was checked.
    pub unread_bytes: u64,
    /// The WAL summaries that told which pages changed: of files whose times or sizes are not what they were, only those were
    /// read. Absent where such files were read whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summaries: Option<SummariesUsed>,
    /// Why files that changed were read whole, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole_files: Option<String>,
    /// What times and sizes of files had not told. Where something had not, the next backup believes none of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silent_changes: Option<SilentChanges>,
}

/// Content that had changed although size, times and inode of its file said that it had not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SilentChanges {
    /// Units (8 to 32 KiB) that differed from what the backup before has.
    pub units: u64,
    /// Files they are in, relative to the data directory; of many only some, [`SilentChanges::FILES_NAMED_MAX`].
    pub files: Vec<String>,
}

impl SilentChanges {
    /// The most files that are named.
    pub const FILES_NAMED_MAX: usize = 16;

    /// The files in words, which say when there may be more.
    pub fn names(&self) -> String {
        let names = self.files.join(", ");
        if self.files.len() >= Self::FILES_NAMED_MAX {
            names + " and perhaps others"
        } else {
            names
        }
    }
}

/// WAL summaries that a backup relied on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SummariesUsed {
    /// Where they begin: the start of the backup before.
    pub since: Lsn,
    /// How many there were.
    pub count: u64,
}

impl Reading {
    /// How files that changed were read, in a few words.
    pub fn sentence(&self) -> String {
        match (&self.summaries, &self.whole_files) {
            (Some(SummariesUsed { since, count }), _) => {
                let summaries = if *count == 1 { "summary" } else { "summaries" };
                format!("read by pages, told by {count} WAL {summaries} since {since}")
            }
            (None, Some(why)) => format!("read whole: {why}"),
            (None, None) => "read whole".to_owned(),
        }
    }
}

/// What a logical backup holds, and with what it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogicalFacts {
    /// `pg_dump` in the manner of `server_version_num`.
    pub client_version_num: u32,
    /// Whether `globals.sql` has the passwords of roles: a role that may not read `pg_authid` cannot dump them.
    pub role_passwords: bool,
    /// The dumps, in the order of their names.
    pub databases: Vec<DatabaseDump>,
    /// Databases that are not in the backup although nobody excluded them by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<SkippedDatabase>,
    /// Databases that were to be dumped and could not be, with what was said. An older backup that has one of them is kept.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<SkippedDatabase>,
    /// How many databases with something in them are not in the backup, whoever left them out; absent when an earlier program
    /// stored it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_out: Option<u64>,
}

impl LogicalFacts {
    /// Whether it has a dump of a database.
    pub fn has(&self, database: &DatabaseName) -> bool {
        self.databases.iter().any(|dump| dump.database == *database)
    }
}

/// One database's dump.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseDump {
    /// The database.
    pub database: DatabaseName,
    /// Path of the dump in the backup.
    pub file: String,
    /// The snapshot it shows, as the server named it.
    pub snapshot: String,
    /// Its encoding, as the server names it.
    pub encoding: String,
    /// `LC_COLLATE`.
    pub collate: String,
    /// `LC_CTYPE`.
    pub ctype: String,
    /// Bytes it had on the server, indexes included.
    pub server_bytes: u64,
    /// Where in the file what is; absent when an earlier program stored it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<DumpLayout>,
}

/// Where in a dump what is, so that parts of it can be read without the rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpLayout {
    /// Bytes of head and contents.
    pub contents_bytes: u64,
    /// The data behind them, without a gap up to the file's end: number of the entry in the contents, bytes.
    pub blocks: Vec<(u32, u64)>,
}

/// A database that is not in a logical backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedDatabase {
    /// The database.
    pub database: DatabaseName,
    /// Why, for people.
    pub why: String,
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
    /// Tables that have no count because the role was not let read them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forbidden: Option<Forbidden>,
}

/// Tables whose rows nobody counted because the role that takes the backups may not read them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forbidden {
    /// The role.
    pub role: String,
    /// How many tables.
    pub tables: u64,
    /// One of them, for people: `public.orders in shop`.
    pub first: String,
}

impl Forbidden {
    /// Who may not read what.
    pub fn sentence(&self) -> String {
        let others = match self.tables.saturating_sub(1) {
            0 => String::new(),
            others => format!(" and {}", count(others, "other table")),
        };
        format!("role {} may not read {}{others}", self.role, self.first)
    }

    /// The statement that lets it.
    pub fn cure(&self) -> String {
        grant_reading(&self.role)
    }
}

/// The statement that lets a role read, and so count, every table.
pub fn grant_reading(role: &str) -> String {
    format!("GRANT pg_read_all_data TO \"{}\";", role.replace('"', "\"\""))
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
    /// count and stop, `Some((fewer, more))` where the backup's WAL bounds the change, `None` where nothing is known.
    pub drift: Option<(u64, u64)>,
    /// The table's file, for the next backup's census; absent where the files were not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<CountedFile>,
}

/// The file of a table that was counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountedFile {
    /// Of the first segment, below the data directory: `base/5/16384`.
    pub path: String,
    /// Of all segments, when the files were listed.
    pub size_bytes: u64,
    /// When the rows were last counted. Later for a file that did not change since, they are taken over.
    pub counted_at_ms: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_may_not_read_is_named_with_the_grant() {
        let first = "public.orders in shop".to_owned();
        let one = Forbidden { role: "back\"up".to_owned(), tables: 1, first };
        assert_eq!(one.sentence(), "role back\"up may not read public.orders in shop");
        assert_eq!(one.cure(), "GRANT pg_read_all_data TO \"back\"\"up\";");
        let several = Forbidden { tables: 3, ..one };
        assert!(several.sentence().ends_with("in shop and 2 other tables"));
    }
}
