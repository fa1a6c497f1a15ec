//! Settings of the server: which prevent a backup, and which a restored server must have.

use std::fmt::Write as _;
use std::path::PathBuf;

use proto::backup::{Setting, Tablespace};

use crate::error::Error;
use crate::session::Session;

/// Kept with every backup. The first seven are minimums: hot standby and recovery refuse or stop below the source's
/// values. The next shape the data or are needed to read it; the last help a person to rebuild the server.
const KEPT: &[&str] = &[
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
    "max_replication_slots",
    "max_active_replication_origins",
    "block_size",
    "segment_size",
    "wal_block_size",
    "wal_segment_size",
    "data_checksums",
    "wal_log_hints",
    "wal_level",
    "full_page_writes",
    "track_commit_timestamp",
    "server_encoding",
    "server_version",
    "lc_collate",
    "lc_ctype",
    "lc_messages",
    "TimeZone",
    "shared_preload_libraries",
    "default_text_search_config",
    "archive_mode",
    "listen_addresses",
    "port",
    "unix_socket_directories",
    "config_file",
    "hba_file",
    "ident_file",
    "data_directory",
    "data_directory_mode",
    "port",
];

/// The settings a backup keeps, as far as the role may see them. Values are in the setting's base unit.
pub async fn kept(session: &Session) -> Result<Vec<Setting>, Error> {
    let sql = "\
-- pgmuster: kept settings
SELECT name, setting FROM pg_settings WHERE name = ANY($1) ORDER BY array_position($1::text[], name)";
    let rows = session.query("read the server's settings", sql, &[&KEPT]).await?;
    Ok(rows.iter().map(|row| Setting { name: row.get(0), value: row.get(1) }).collect())
}

/// Every file outside the data directory that the server reads its settings from: the three that it names itself, and what they
/// include, as far as the role may see it. Included files are all told to a role that may read `pg_file_settings` (and, from 16
/// on, `pg_hba_file_rules` and `pg_ident_file_mappings`); to others only those of which a setting is in effect. Sorted.
pub async fn files_outside(session: &Session) -> Result<Vec<PathBuf>, Error> {
    let what = "find the server's settings files";
    let mut sql = "\
-- pgmuster: settings files
SELECT setting AS file FROM pg_settings WHERE name IN ('config_file', 'hba_file', 'ident_file')
UNION SELECT sourcefile FROM pg_settings"
        .to_owned();
    let views = "\
-- pgmuster: views of settings files
SELECT oid::regclass::text, file FROM (VALUES ('pg_file_settings', 'pg_show_all_file_settings', 'sourcefile'),
       ('pg_hba_file_rules', 'pg_hba_file_rules', 'file_name'),
       ('pg_ident_file_mappings', 'pg_ident_file_mappings', 'file_name')) AS known (view, source, file)
  JOIN pg_class c ON oid = to_regclass('pg_catalog.' || view)
 WHERE has_table_privilege(oid, 'SELECT')
   AND (SELECT bool_and(has_function_privilege(p.oid, 'EXECUTE')) FROM pg_proc p
         WHERE proname = source AND pronamespace = 'pg_catalog'::regnamespace)
   AND EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attname = file)";
    for row in session.query(what, views, &[]).await? {
        let (view, file): (&str, &str) = (row.get(0), row.get(1));
        // Both are names of the catalogue's own, written above.
        let _ = write!(sql, "\nUNION SELECT {file} FROM {view}");
    }
    let directory = "SELECT setting FROM pg_settings WHERE name = 'data_directory'";
    let directory: Option<String> =
        session.maybe(what, directory, &[]).await?.and_then(|row| row.get(0));
    let mut files: Vec<PathBuf> = session
        .query(what, &sql, &[])
        .await?
        .iter()
        .filter_map(|row| row.get::<_, Option<String>>(0))
        .map(PathBuf::from)
        .filter(|file| file.is_absolute())
        .filter(|file| directory.as_ref().is_none_or(|directory| !file.starts_with(directory)))
        .collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// The tablespaces outside the data directory. In-place ones (relative paths, a developer's setting) are not among them.
pub async fn tablespaces(session: &Session) -> Result<Vec<Tablespace>, Error> {
    let sql = "\
-- pgmuster: tablespaces
SELECT oid, pg_tablespace_location(oid) FROM pg_tablespace
 WHERE spcname NOT IN ('pg_default', 'pg_global') ORDER BY oid";
    let rows = session.query("read the tablespaces", sql, &[]).await?;
    let all = rows.iter().map(|row| Tablespace { oid: row.get(0), location: row.get(1) });
    Ok(all.filter(|tablespace| tablespace.location.starts_with('/')).collect())
}

/// Refuses a server that cannot carry a physical backup with a replication slot, naming the setting to change.
pub async fn require_for_backup(session: &Session) -> Result<(), Error> {
    let what = "prepare a physical backup";
    let sql = "\
-- pgmuster: settings a backup needs
SELECT current_setting('wal_level'), current_setting('max_replication_slots')::int4,
       (SELECT count(*) FROM pg_replication_slots)::int4";
    let row = session.one(what, sql, &[]).await?;
    let refuse = |found: String, cure: &str| {
        Err(Error::Setting { what: what.to_owned(), found, cure: cure.to_owned() })
    };
    let wal_level: String = row.get(0);
    let (slots, used): (i32, i32) = (row.get(1), row.get(2));
    if wal_level == "minimal" {
        return refuse(
            "wal_level is minimal, which leaves out what a backup needs".to_owned(),
            "ALTER SYSTEM SET wal_level = 'replica'; then restart the server.",
        );
    }
    if slots == 0 {
        return refuse(
            "max_replication_slots is 0".to_owned(),
            "ALTER SYSTEM SET max_replication_slots = 10; then restart the server.",
        );
    }
    if used >= slots {
        return refuse(
            format!("all {slots} replication slots are in use (max_replication_slots)"),
            "Drop replication slots that nobody uses (pg_replication_slots), or raise max_replication_slots and restart.",
        );
    }
    Ok(())
}
