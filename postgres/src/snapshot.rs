//! One moment of one database, held open for others: a dump reads it, and the rows of its tables are counted in it.

use std::collections::HashMap;
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

    /// Counts the rows of every ordinary table. What the role may not read, or what the deadline cuts off, is not counted; the
    /// rest is exact, because nothing changes in a snapshot.
    pub async fn census(
        &self,
        database: &DatabaseName,
        collation: &str,
        deadline: Instant,
        cancel: &CancellationToken,
    ) -> Result<DatabaseCensus, Error> {
        let session = &self.session;
        let extensions = session.query("list the extensions", EXTENSIONS, &[]).await?;
        let rows = session.query("list the relations", OF_EXTENSIONS, &[]).await?;
        let foreign: Vec<(String, String)> =
            rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let mut of_kind: HashMap<char, u64> = HashMap::new();
        let mut tables = Vec::new();
        for relation in relations(session).await? {
            let Relation { kind, schema, name, countable, .. } = relation;
            if foreign.iter().any(|(s, n)| (s, n) == (&schema, &name)) {
                continue;
            }
            *of_kind.entry(kind).or_default() += 1;
            if !countable || kind != 'r' {
                continue;
            }
            let rows = self.count(&schema, &name, deadline, cancel).await?;
            let drift = rows.map(|_| (0, 0));
            tables.push(TableCount { schema, table: name, rows, drift, file: None });
        }
        let mut relations: Vec<_> = of_kind.into_iter().collect();
        relations.sort_unstable();
        tables.sort_unstable_by(|a, b| (&a.schema, &a.table).cmp(&(&b.schema, &b.table)));
        Ok(DatabaseCensus {
            database: database.clone(),
            collation: collation.to_owned(),
            extensions: extensions.iter().map(|row| row.get(0)).collect(),
            relations,
            tables,
        })
    }

    /// `None`: it could not be counted, and the snapshot is as it was.
    async fn count(
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
