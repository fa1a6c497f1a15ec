//! One moment of one database, held open for others: a dump reads it, and what is in the database is listed in it.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;

use proto::backup::{DatabaseCensus, TableCount};
use proto::{DatabaseName, JobId};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::census::{EXTENSIONS, Relation, relations};
use crate::connect::{Purpose, connect};
use crate::error::Error;
use crate::quote;
use crate::session::Session;
use crate::target::Target;

/// A transaction whose snapshot others may take.
pub struct Snapshot {
    session: Session,
    id: String,
}

/// What is in a database, as far as a dump of it brings it back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    extensions: Vec<String>,
    relations: Vec<(char, u64)>,
    /// Schemas and names, in order.
    tables: Vec<(String, String)>,
}

impl Listing {
    /// Tables with rows of their own, by schema and name.
    pub fn tables(&self) -> &[(String, String)] {
        &self.tables
    }

    /// The census of the database, once the rows of its tables are known.
    pub fn census(
        self,
        database: DatabaseName,
        collation: String,
        rows: impl Fn(&str, &str) -> Option<u64>,
    ) -> DatabaseCensus {
        let Self { extensions, relations, tables } = self;
        let count = |(schema, table): (String, String)| {
            let rows = rows(&schema, &table);
            TableCount { schema, table, rows, drift: rows.map(|_| (0, 0)), file: None }
        };
        let tables = tables.into_iter().map(count).collect();
        DatabaseCensus { database, collation, extensions, relations, tables }
    }
}

/// What a dump of a table does not bring back as it was: rows of extensions' tables come from the extension.
const OF_EXTENSIONS: &str = "\
-- pgmuster: relations of extensions, and indexes that no dump has
SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE EXISTS (SELECT 1 FROM pg_depend d
                WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
    OR EXISTS (SELECT 1 FROM pg_index i
                WHERE i.indexrelid = c.oid AND c.relkind = 'i' AND NOT (i.indisvalid AND i.indisready))";

impl Snapshot {
    /// Opens a session in the target's database and takes its snapshot.
    pub async fn take(target: &Target, job: &JobId) -> Result<Self, Error> {
        let session = connect(target, &Purpose::backup(job)).await?;
        let what = "take a snapshot";
        session.run(what, "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY").await?;
        let id = session.one(what, "SELECT pg_export_snapshot()", &[]).await?.get(0);
        Ok(Self { session, id })
    }

    /// Its name on the server.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What is in the database.
    pub async fn list(&self) -> Result<Listing, Error> {
        let session = &self.session;
        let extensions = session.query("list the extensions", EXTENSIONS, &[]).await?;
        let rows = session.query("list the relations", OF_EXTENSIONS, &[]).await?;
        let foreign: HashSet<(String, String)> =
            rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let mut of_kind: HashMap<char, u64> = HashMap::new();
        let mut tables = Vec::new();
        for relation in relations(session).await? {
            let Relation { kind, schema, name, countable, .. } = relation;
            let table = (schema, name);
            if foreign.contains(&table) {
                continue;
            }
            *of_kind.entry(kind).or_default() += 1;
            if countable && kind == 'r' {
                tables.push(table);
            }
        }
        let mut relations: Vec<_> = of_kind.into_iter().collect();
        relations.sort_unstable();
        tables.sort_unstable();
        let extensions = extensions.iter().map(|row| row.get(0)).collect();
        Ok(Listing { extensions, relations, tables })
    }

    /// Counts the rows of a table: exactly, because nothing changes in a snapshot. `None`: it could not be counted, and the
    /// snapshot is as it was.
    pub async fn count(
        &self,
        schema: &str,
        name: &str,
        deadline: Instant,
        cancel: &CancellationToken,
    ) -> Result<Option<u64>, Error> {
        if Instant::now() >= deadline {
            return Ok(None);
        }
        let (session, what) = (&self.session, "count rows");
        session.run(what, "SAVEPOINT pgmuster_count").await?;
        let mut sql = "-- pgmuster: count rows\nSELECT count(*) FROM ONLY ".to_owned();
        let _ = write!(sql, "{}", quote::qualified(schema, name));
        let counted =
            session.within(what, cancel, Some(deadline), session.one(what, &sql, &[])).await;
        match counted {
            Ok(row) => {
                session.run(what, "RELEASE SAVEPOINT pgmuster_count").await?;
                Ok(u64::try_from(row.get::<_, i64>(0)).ok())
            }
            Err(error @ Error::Cancelled { .. }) => Err(error),
            Err(error) if error.is_closed() => Err(error),
            Err(_) => {
                session.run(what, "ROLLBACK TO SAVEPOINT pgmuster_count").await?;
                Ok(None)
            }
        }
    }

    /// Lets it go.
    pub async fn release(self) {
        self.session.close().await;
    }
}
