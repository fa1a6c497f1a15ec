//! The databases of a cluster, as a logical backup needs to know them.

use proto::{DatabaseName, JobId};

use crate::census::collation_sql;
use crate::connect::application_name;
use crate::error::Error;
use crate::session::Session;
use crate::version::ServerVersion;

/// A database of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Database {
    /// Its name.
    pub name: DatabaseName,
    /// Whether sessions are possible at all; `template0` allows none.
    pub allows_connections: bool,
    /// A `CREATE DATABASE` or `DROP DATABASE` did not finish: nothing can be done with it but dropping it.
    pub is_invalid: bool,
    /// Bytes on the server; none when the role may not ask.
    pub size_bytes: Option<u64>,
    /// Its encoding.
    pub encoding: String,
    /// `LC_COLLATE`.
    pub collate: String,
    /// `LC_CTYPE`.
    pub ctype: String,
    /// Provider and version of its collation, as the census tells it.
    pub collation: String,
}

impl Session {
    /// Every database, by name.
    pub async fn databases(&self, version: ServerVersion) -> Result<Vec<Database>, Error> {
        let what = "list the databases";
        let sql = format!(
            "-- pgmuster: databases\n\
             SELECT datname::text AS name, datallowconn, datconnlimit = -2 AS invalid, \
             CASE WHEN has_database_privilege(oid, 'CONNECT') OR pg_has_role('pg_read_all_stats', 'MEMBER') \
             THEN pg_database_size(oid) END AS size, pg_encoding_to_char(encoding)::text AS encoding, \
             datcollate::text AS collate, datctype::text AS ctype, {} AS collation FROM pg_database ORDER BY datname",
            collation_sql(version.major())
        );
        let rows = self.query(what, &sql, &[]).await?;
        let database = |row: &tokio_postgres::Row| {
            let name: String = row.get("name");
            Ok(Database {
                name: name
                    .parse()
                    .map_err(|_| Error::Answer { what: what.to_owned(), answer: name })?,
                allows_connections: row.get("datallowconn"),
                is_invalid: row.get("invalid"),
                size_bytes: row
                    .get::<_, Option<i64>>("size")
                    .and_then(|size| u64::try_from(size).ok()),
                encoding: row.get("encoding"),
                collate: row.get("collate"),
                ctype: row.get("ctype"),
                collation: row.get::<_, Option<String>>("collation").unwrap_or_default(),
            })
        };
        rows.iter().map(database).collect()
    }

    /// Databases that others are made of; none of them can be dropped.
    pub async fn templates(&self) -> Result<Vec<DatabaseName>, Error> {
        let what = "list the templates";
        let sql = "SELECT datname::text FROM pg_database WHERE datistemplate ORDER BY datname";
        let rows = self.query(what, sql, &[]).await?;
        let name = |row: &tokio_postgres::Row| {
            let name: String = row.get(0);
            name.parse().map_err(|_| Error::Answer { what: what.to_owned(), answer: name })
        };
        rows.iter().map(name).collect()
    }

    /// Whether the role may dump the passwords of roles.
    pub async fn may_read_passwords(&self) -> Result<bool, Error> {
        let sql = "SELECT has_table_privilege('pg_catalog.pg_authid', 'SELECT')";
        Ok(self.one("ask for the right to read passwords", sql, &[]).await?.get(0))
    }

    /// The catalogue version of the server.
    pub async fn catalog_version(&self) -> Result<u32, Error> {
        let sql = "SELECT catalog_version_no FROM pg_control_system()";
        let row = self.one("ask for the catalogue version", sql, &[]).await?;
        Ok(row.get::<_, i32>(0).cast_unsigned())
    }

    /// Where the server is now: the position it writes, or has replayed.
    pub async fn position(&self) -> Result<proto::Lsn, Error> {
        let what = "ask for the position";
        let sql = "SELECT CASE WHEN pg_is_in_recovery() THEN coalesce(pg_last_wal_replay_lsn(), '0/0') \
                   ELSE pg_current_wal_insert_lsn() END::text";
        let text: String = self.one(what, sql, &[]).await?.get(0);
        text.parse().map_err(|_| Error::Answer { what: what.to_owned(), answer: text })
    }

    /// How many transactions ago the oldest snapshot was taken that sessions of a job hold: vacuum removes nothing that was
    /// deleted since.
    pub async fn held_back(&self, job: &JobId) -> Result<Option<u64>, Error> {
        let sql = "-- pgmuster: the oldest snapshot of a job\n\
                   SELECT max(age(backend_xmin))::int8 FROM pg_stat_activity WHERE application_name = $1";
        let name = application_name(job);
        let row = self.one("ask what a job holds back", sql, &[&name]).await?;
        Ok(row.get::<_, Option<i64>>(0).and_then(|age| u64::try_from(age).ok()))
    }

    /// Names of user relations in this database, ten at most: whether there is something that a restore would meet.
    pub async fn some_relations(&self) -> Result<Vec<String>, Error> {
        let sql = "-- pgmuster: is the database empty\n\
                   SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c \
                   JOIN pg_namespace n ON n.oid = c.relnamespace \
                   WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') \
                   AND n.nspname !~ '^pg_(toast_)?temp_' AND c.relkind NOT IN ('i', 'I') \
                   AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.classid = 'pg_class'::regclass \
                   AND d.objid = c.oid AND d.deptype = 'e') ORDER BY 1 LIMIT 10";
        let rows = self.query("look into the database", sql, &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}
