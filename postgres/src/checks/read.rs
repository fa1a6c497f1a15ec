//! Reads every row of every table of every database, in sessions in which nothing of the user's fires.

use std::collections::{HashMap, HashSet};
use std::future::Future;

use futures::{StreamExt as _, pin_mut};

use super::{Run, purpose};
use crate::census::collation_sql;
use crate::connect::connect;
use crate::error::{During as _, Error};
use crate::quote;
use crate::session::Session;

/// What the restored copy of one database holds.
#[derive(Default)]
pub(super) struct Content {
    pub(super) relations: HashMap<char, u64>,
    pub(super) extensions: HashSet<String>,
    /// Rows of each user table by schema and name; `None` where they could not be counted.
    pub(super) tables: HashMap<(String, String), Option<u64>>,
}

/// A relation of the restored database.
pub(super) struct Relation {
    pub(super) oid: u32,
    pub(super) kind: char,
    schema: String,
    name: String,
    is_user: bool,
    pub(super) is_heap: bool,
    /// False for a materialised view that was never refreshed: it cannot be read.
    is_filled: bool,
}

impl Relation {
    pub(super) fn shown(&self, database: &str) -> String {
        format!("{}.{} in {database}", self.schema, self.name)
    }

    fn has_counted_rows(&self) -> bool {
        self.is_user && self.is_filled && matches!(self.kind, 'r' | 'm')
    }

    fn quoted(&self) -> String {
        quote::qualified(&self.schema, &self.name)
    }
}

/// The default collation of a database: what this machine has, and what the database was made with.
pub(super) struct Collation {
    pub(super) actual: String,
    pub(super) recorded: Option<String>,
}

impl Run<'_> {
    pub(super) async fn read_everything(&mut self, session: &Session) -> Result<(), Error> {
        self.open_databases(session).await?;
        let sql = format!(
            "-- pgmuster: databases to check\n\
             SELECT oid, datname::text AS name, {} AS actual, {} AS recorded FROM pg_database \
             WHERE datallowconn AND datconnlimit <> -2 ORDER BY datname",
            collation_sql(self.version.major()),
            if self.version.major() < 15 { "NULL::text" } else { "datcollversion" },
        );
        let rows = session.query("list the databases", &sql, &[]).await?;
        for (index, row) in rows.iter().enumerate() {
            let name: String = row.get("name");
            self.databases.insert(name.clone(), None);
            let collation = Collation { actual: row.get("actual"), recorded: row.get("recorded") };
            if let Err(error) = self.read_database(&name, &collation, index == 0).await {
                // The server may have crashed on what it read; the next database tells whether it came back.
                self.outcome::<()>("tables_readable", &format!("database {name}"), Err(error))?;
            }
        }
        Ok(())
    }

    /// Lets the checks into databases that were closed to everybody; their tables are part of the backup too.
    async fn open_databases(&mut self, session: &Session) -> Result<(), Error> {
        let what = "open a closed database";
        // `template0` holds nothing of the user's; -2 marks what an interrupted DROP DATABASE has left.
        let sql = "SELECT datname::text FROM pg_database \
                   WHERE NOT datallowconn AND datconnlimit <> -2 AND datname <> 'template0'";
        for row in session.query(what, sql, &[]).await? {
            let name: String = row.get(0);
            let sql = format!("ALTER DATABASE {} ALLOW_CONNECTIONS true", quote::identifier(&name));
            if let Err(error) = session.run(what, &sql).await {
                self.outcome::<()>("tables_readable", &format!("database {name}"), Err(error))?;
            }
        }
        Ok(())
    }

    async fn read_database(
        &mut self,
        database: &str,
        collation: &Collation,
        with_shared: bool,
    ) -> Result<(), Error> {
        let session = self.session(database).await?;
        let relations = relations(&session, with_shared).await?;
        let mut extensions = HashSet::new();
        for row in session
            .query(
                "list the extensions",
                "SELECT extname || ' ' || extversion FROM pg_extension",
                &[],
            )
            .await?
        {
            extensions.insert(row.get(0));
        }
        let mut content = Content { extensions, ..Content::default() };
        for relation in &relations {
            if relation.is_user {
                *content.relations.entry(relation.kind).or_default() += 1;
            }
            // A table that is never reached, because the server is gone by then, is not a missing one.
            if relation.has_counted_rows() {
                content.tables.insert((relation.schema.clone(), relation.name.clone()), None);
            }
        }
        self.databases.insert(database.to_owned(), Some(content));
        let mut session = Some(session);
        for relation in
            relations.iter().filter(|r| r.is_filled && matches!(r.kind, 'r' | 'm' | 'S'))
        {
            let usable = self.usable(&mut session, database).await?;
            let read = self.within(usable, copy_rows(usable, relation)).await;
            let thing = relation.shown(database);
            let rows = self.outcome("tables_readable", &thing, read)?;
            if rows.is_some() && self.checksums {
                self.finding("page_checksums").good += 1;
            }
            if relation.has_counted_rows() {
                let rows = match rows {
                    Some(rows) => Some(rows),
                    // A missing library may stop the output of a value; the rows can still be counted.
                    None => self.within(usable, count_rows(usable, relation)).await.ok(),
                };
                if let Some(Some(content)) = self.databases.get_mut(database) {
                    content.tables.insert((relation.schema.clone(), relation.name.clone()), rows);
                }
            }
        }
        let mismatched = self.collations(&mut session, database, collation).await?;
        self.amcheck(&mut session, database, &relations, &mismatched).await?;
        self.other_pages(&mut session, database, &relations).await?;
        self.libraries(&mut session, database).await?;
        if let Some(session) = session {
            session.close().await;
        }
        Ok(())
    }

    /// A session in which nothing of the user's fires and no damage is passed over.
    pub(super) async fn session(&self, database: &str) -> Result<Session, Error> {
        let session = connect(&self.target.with_database(database), &purpose(self.options)).await?;
        let what = "make the session strict";
        session
            .run(
                what,
                "SET ignore_checksum_failure = off; SET zero_damaged_pages = off; \
                 SET session_replication_role = replica; SET lc_messages = 'C'; SET check_function_bodies = off",
            )
            .await?;
        if self.version.major() >= 17 {
            session.run(what, "SET event_triggers = off").await?;
            return Ok(session);
        }
        let triggers = "SELECT evtname::text FROM pg_event_trigger WHERE evtenabled <> 'D' AND NOT pg_is_in_recovery()";
        for row in session.query(what, triggers, &[]).await? {
            // ALTER EVENT TRIGGER itself fires none.
            let sql = format!("ALTER EVENT TRIGGER {} DISABLE", quote::identifier(row.get(0)));
            session.run(what, &sql).await?;
        }
        Ok(session)
    }

    /// The session, or a new one when the server broke it on damaged data.
    pub(super) async fn usable<'s>(
        &self,
        session: &'s mut Option<Session>,
        database: &str,
    ) -> Result<&'s Session, Error> {
        if session.as_ref().is_none_or(Session::is_closed) {
            *session = Some(self.session(database).await?);
        }
        session.as_ref().ok_or_else(|| Error::Answer {
            what: "open a session".to_owned(),
            answer: String::new(),
        })
    }

    pub(super) async fn within<T>(
        &self,
        session: &Session,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        session
            .within("check the restored server", &self.options.cancel, self.options.deadline, work)
            .await
    }
}

/// Everything with storage, and the other kinds that the census counts. Foreign tables are never read.
async fn relations(session: &Session, with_shared: bool) -> Result<Vec<Relation>, Error> {
    let sql = "\
-- pgmuster: relations to check
SELECT c.oid, c.relkind::text, n.nspname::text, c.relname::text,
       n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') AND n.nspname !~ '^pg_(toast_)?temp_'
         AND n.nspname <> 'pgmuster_checks' AND c.relpersistence <> 't' AS is_user,
       coalesce((SELECT amname = 'heap' FROM pg_am WHERE oid = c.relam), false), c.relispopulated
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relpersistence <> 't' AND ($1 OR NOT c.relisshared)
 ORDER BY c.oid";
    let rows = session.query("list the relations", sql, &[&with_shared]).await?;
    Ok(rows
        .iter()
        .map(|row| Relation {
            oid: row.get(0),
            kind: row.get::<_, &str>(1).chars().next().unwrap_or('?'),
            schema: row.get(2),
            name: row.get(3),
            is_user: row.get(4),
            is_heap: row.get(5),
            is_filled: row.get(6),
        })
        .collect())
}

/// Reads every value of every row, detoasted and put into text by its type's own function, and returns the number of rows.
async fn copy_rows(session: &Session, relation: &Relation) -> Result<u64, Error> {
    let what = "read all rows";
    let name = relation.quoted();
    // COPY of a table leaves out generated columns, whose expressions are the user's code; other kinds have none.
    let source = if relation.kind == 'r' { name } else { format!("(SELECT * FROM ONLY {name})") };
    // Without conversion: what is stored is to be read, not judged for its encoding.
    let sql = format!("COPY {source} TO STDOUT (FORMAT text, ENCODING 'SQL_ASCII')");
    let rows = session.client().copy_out(&sql).await.during(what)?;
    pin_mut!(rows);
    let mut count = 0;
    while let Some(row) = rows.next().await {
        // The server sends each row as a message of its own.
        row.during(what)?;
        count += 1;
    }
    Ok(count)
}

async fn count_rows(session: &Session, relation: &Relation) -> Result<u64, Error> {
    let sql = format!("SELECT count(*) FROM ONLY {}", relation.quoted());
    let count: i64 = session.one("count rows", &sql, &[]).await?.get(0);
    Ok(u64::try_from(count).unwrap_or(0))
}
