//! Who a server is: read from the server, to be compared with the job and with the files on disk.

use std::path::PathBuf;

use proto::{Lsn, SystemIdentifier, Timeline};

use crate::error::Error;
use crate::session::Session;
use crate::version::ServerVersion;

const IDENTITY: &str = "\
-- pgmuster: identity
SELECT current_setting('server_version_num')::int4 AS version,
       (SELECT system_identifier FROM pg_control_system()) AS system_identifier,
       pg_backend_pid() AS pid,
       pg_is_in_recovery() AS in_recovery,
       (SELECT setting FROM pg_settings WHERE name = 'data_directory') AS data_directory,
       (SELECT setting FROM pg_settings WHERE name = 'unix_socket_directories') AS socket_directories,
       current_setting('port')::int4 AS port,
       current_setting('block_size')::int4 AS block_size,
       (SELECT setting::int8 FROM pg_settings WHERE name = 'segment_size') AS blocks_in_segment,
       (SELECT setting::int8 FROM pg_settings WHERE name = 'wal_segment_size') AS wal_segment_size,
       current_setting('data_checksums') = 'on' AS data_checksums,
       CASE WHEN pg_is_in_recovery() THEN (SELECT greatest(timeline_id, min_recovery_end_timeline)
                                             FROM pg_control_checkpoint(), pg_control_recovery())
            ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int4
       END AS timeline,
       (SELECT checkpoint_lsn::text FROM pg_control_checkpoint()) AS checkpoint_lsn,
       (SELECT redo_lsn::text FROM pg_control_checkpoint()) AS redo_lsn,
       (extract(epoch FROM pg_postmaster_start_time()) * 1000)::int8 AS started_at_ms,
       current_database()::text AS database,
       current_user::text AS role,
       rolsuper OR rolreplication AS may_replicate,
       rolsuper AS superuser,
       rolsuper OR coalesce((SELECT pg_has_role(current_user, r.oid, 'USAGE') FROM pg_roles r
                              WHERE r.rolname = 'pg_read_all_data'), false) AS reads_all
  FROM pg_roles WHERE rolname = current_user";

/// What a server says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "facts of a server that do not exclude each other"
)]
pub struct ServerIdentity {
    /// Its version.
    pub version: ServerVersion,
    /// Its system identifier.
    pub system_identifier: SystemIdentifier,
    /// The server process that answered.
    pub backend_pid: i32,
    /// Whether it is a standby, or still recovering.
    pub in_recovery: bool,
    /// Its data directory; absent when the role may not see it (`pg_read_all_settings`).
    pub data_directory: Option<PathBuf>,
    /// The directories of its Unix sockets; empty when the role may not see them.
    pub socket_directories: Vec<PathBuf>,
    /// Its port.
    pub port: u16,
    /// Bytes in a page.
    pub block_size: u32,
    /// Bytes in one file of a relation; usually 1 GiB.
    pub relation_segment_size: u64,
    /// Bytes in a WAL segment.
    pub wal_segment_size: u32,
    /// Whether pages carry checksums now.
    pub data_checksums: bool,
    /// The timeline it writes; for a standby the newest one of which its disk has something.
    pub timeline: Timeline,
    /// Where its last checkpoint record is, from the control file.
    pub checkpoint_lsn: Lsn,
    /// Where recovery would begin, from the control file.
    pub redo_lsn: Lsn,
    /// When the server was started, its clock, Unix milliseconds: another value means a restart.
    pub started_at_ms: i64,
    /// The database of this session.
    pub database: String,
    /// The role of this session.
    pub role: String,
    /// Whether the role may create replication slots.
    pub may_replicate: bool,
    /// Whether the role is a superuser, which is more than we need.
    pub superuser: bool,
    /// Whether the role may read every table, whoever made it (`pg_read_all_data`).
    pub reads_all: bool,
}

impl Session {
    /// Asks the server who it is.
    pub async fn identity(&self) -> Result<ServerIdentity, Error> {
        let what = "ask the server who it is";
        let row = self.one(what, IDENTITY, &[]).await?;
        let wrong =
            |column: &str| Error::Answer { what: what.to_owned(), answer: column.to_owned() };
        let lsn =
            |column: &str| row.get::<_, String>(column).parse::<Lsn>().map_err(|_| wrong(column));
        let unsigned =
            |column: &str| u32::try_from(row.get::<_, i32>(column)).map_err(|_| wrong(column));
        let large =
            |column: &str| u64::try_from(row.get::<_, i64>(column)).map_err(|_| wrong(column));
        let block_size = unsigned("block_size")?;
        let sockets: Option<String> = row.get("socket_directories");
        Ok(ServerIdentity {
            version: ServerVersion(unsigned("version")?),
            system_identifier: SystemIdentifier(
                row.get::<_, i64>("system_identifier").cast_unsigned(),
            ),
            backend_pid: row.get("pid"),
            in_recovery: row.get("in_recovery"),
            data_directory: row.get::<_, Option<String>>("data_directory").map(PathBuf::from),
            socket_directories: sockets
                .iter()
                .flat_map(|list| list.split(','))
                .map(|directory| directory.trim().trim_matches('"'))
                .filter(|directory| directory.starts_with('/'))
                .map(PathBuf::from)
                .collect(),
            port: u16::try_from(row.get::<_, i32>("port")).map_err(|_| wrong("port"))?,
            block_size,
            relation_segment_size: large("blocks_in_segment")? * u64::from(block_size),
            wal_segment_size: u32::try_from(large("wal_segment_size")?)
                .map_err(|_| wrong("wal_segment_size"))?,
            data_checksums: row.get("data_checksums"),
            timeline: Timeline(row.get::<_, i32>("timeline").cast_unsigned()),
            checkpoint_lsn: lsn("checkpoint_lsn")?,
            redo_lsn: lsn("redo_lsn")?,
            started_at_ms: row.get("started_at_ms"),
            database: row.get("database"),
            role: row.get("role"),
            may_replicate: row.get("may_replicate"),
            superuser: row.get("superuser"),
            reads_all: row.get("reads_all"),
        })
    }

    /// Asks the server who it is, and refuses a cluster other than `expected`.
    pub async fn identity_of(
        &self,
        expected: Option<SystemIdentifier>,
    ) -> Result<ServerIdentity, Error> {
        let identity = self.identity().await?;
        match expected {
            Some(expected) if expected != identity.system_identifier => Err(Error::WrongCluster {
                target: self.target().to_owned(),
                expected,
                found: identity.system_identifier,
            }),
            _ => Ok(identity),
        }
    }
}
