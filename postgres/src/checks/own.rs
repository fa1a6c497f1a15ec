//! The server's own checks: amcheck, page checksums of what rows do not reach, libraries, collations.

use std::collections::BTreeSet;

use super::Run;
use super::findings::{is_corruption, is_lost_object};
use super::read::{Collation, Relation};
use crate::error::Error;
use crate::quote;
use crate::session::Session;

/// Where our own extensions go, so that they meet nothing of the user's.
const OWN_SCHEMA: &str = "pgmuster_checks";
/// The collation OID that means "the database's own".
const DEFAULT_COLLATION: u32 = 100;

impl Run<'_> {
    /// Collations whose order may differ from the one the indexes were built with. That is a difference between two machines
    /// and no damage, so it is told apart, and indexes that depend on them are not judged.
    pub(super) async fn collations(
        &mut self,
        session: &mut Option<Session>,
        database: &str,
        collation: &Collation,
    ) -> Result<BTreeSet<u32>, Error> {
        let mut mismatched = BTreeSet::new();
        // What a dump brings is sorted here and now.
        let census = self.census_of(database).filter(|_| !self.is_of_dump());
        let census = census.map(|census| census.collation.clone());
        let version = collation.actual.split_once(' ').map(|(_, version)| version.to_owned());
        let differs_from_recorded = collation.recorded.is_some() && collation.recorded != version;
        let differs_from_source = census.as_ref().is_some_and(|source| *source != collation.actual);
        if differs_from_recorded || differs_from_source {
            mismatched.insert(DEFAULT_COLLATION);
            let source = census.or_else(|| collation.recorded.clone()).unwrap_or_default();
            let text = format!(
                "database {database} sorts by {source:?}, this machine has {:?}",
                collation.actual
            );
            self.unseen("collations", text);
        } else {
            self.finding("collations").good += 1;
        }
        let sql = "\
-- pgmuster: collations of another version
SELECT oid, collname::text, collversion, coalesce(pg_collation_actual_version(oid), '') FROM pg_collation
 WHERE collversion IS NOT NULL AND collversion IS DISTINCT FROM pg_collation_actual_version(oid)
   AND EXISTS (SELECT FROM pg_depend WHERE refclassid = 'pg_collation'::regclass AND refobjid = pg_collation.oid)";
        let usable = self.usable(session, database).await?;
        for row in usable.query("compare the collations", sql, &[]).await? {
            mismatched.insert(row.get(0));
            let (name, source, here): (&str, &str, &str) = (row.get(1), row.get(2), row.get(3));
            self.unseen(
                "collations",
                format!(
                    "collation {name} in {database} has version {source}, this machine {here:?}"
                ),
            );
        }
        Ok(mismatched)
    }

    pub(super) async fn amcheck(
        &mut self,
        session: &mut Option<Session>,
        database: &str,
        relations: &[Relation],
        mismatched: &BTreeSet<u32>,
    ) -> Result<(), Error> {
        let usable = self.usable(session, database).await?;
        let checks = ["amcheck_tables", "amcheck_indexes"];
        let Some(schema) = self.extension(usable, "amcheck", &checks, database).await? else {
            return Ok(());
        };
        let heap =
            format!("SELECT blkno, offnum, msg FROM {schema}.verify_heapam($1::oid::regclass)");
        for relation in relations.iter().filter(|r| r.is_heap && matches!(r.kind, 'r' | 'm' | 't'))
        {
            let usable = self.usable(session, database).await?;
            let checked =
                self.within(usable, usable.query("check a table", &heap, &[&relation.oid])).await;
            let thing = relation.shown(database);
            if let Some(rows) = self.outcome("amcheck_tables", &thing, checked)?
                && let Some(row) = rows.first()
            {
                let (block, text): (Option<i64>, &str) = (row.get(0), row.get(2));
                let text = format!(
                    "{thing}: {} findings, first in block {}: {text}",
                    rows.len(),
                    block.unwrap_or(-1)
                );
                let findings = self.finding("amcheck_tables");
                findings.good -= 1;
                findings.bad.push(text);
            }
        }
        let list = "\
-- pgmuster: indexes to check
SELECT c.oid, n.nspname::text, c.relname::text, i.indcollation::oid[]
  FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_am a ON a.oid = c.relam
 WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence <> 't' AND i.indisvalid AND i.indisready
 ORDER BY c.oid";
        let usable = self.usable(session, database).await?;
        let indexes = usable.query("list the indexes", list, &[]).await?;
        let check = format!("SELECT {schema}.bt_index_check($1::oid::regclass, $2)");
        for row in indexes {
            let (oid, collations): (u32, Vec<u32>) = (row.get(0), row.get(3));
            let thing =
                format!("{}.{} in {database}", row.get::<_, &str>(1), row.get::<_, &str>(2));
            if collations.iter().any(|collation| mismatched.contains(collation)) {
                self.unseen(
                    "amcheck_indexes",
                    format!("{thing}: its collation sorts differently here"),
                );
                continue;
            }
            let usable = self.usable(session, database).await?;
            let what = "check an index";
            let every_row = self.options.every_row_in_indexes;
            let checked =
                self.within(usable, usable.query(what, &check, &[&oid, &every_row])).await;
            let checked = match checked {
                // The rows cannot be looked up without the code of the index; its order can be checked still.
                Err(error) if every_row && is_lost_object(&error) => {
                    let text = format!("rows of {thing}: {}", proto::failure::chain(&error));
                    self.unseen("amcheck_indexes", text);
                    self.within(usable, usable.query(what, &check, &[&oid, &false])).await
                }
                checked => checked,
            };
            self.outcome("amcheck_indexes", &thing, checked)?;
        }
        Ok(())
    }

    /// Reads what neither the tables' rows nor the B-tree check have touched, for the sake of the page checksums.
    pub(super) async fn other_pages(
        &mut self,
        session: &mut Option<Session>,
        database: &str,
        relations: &[Relation],
    ) -> Result<(), Error> {
        if !self.checksums {
            return Ok(());
        }
        let usable = self.usable(session, database).await?;
        let checks = ["page_checksums"];
        let Some(schema) = self.extension(usable, "pg_prewarm", &checks, database).await? else {
            return Ok(());
        };
        // Only the main fork: free space maps are not protected by WAL, and the server repairs them as it goes.
        let sql = format!("SELECT {schema}.pg_prewarm($1::oid::regclass, 'buffer', 'main')");
        for relation in relations.iter().filter(|relation| matches!(relation.kind, 't' | 'i')) {
            let usable = self.usable(session, database).await?;
            let read =
                self.within(usable, usable.query("read all pages", &sql, &[&relation.oid])).await;
            self.outcome("page_checksums", &relation.shown(database), read)?;
        }
        Ok(())
    }

    /// Each library that the database's functions live in is loaded once.
    pub(super) async fn libraries(
        &mut self,
        session: &mut Option<Session>,
        database: &str,
    ) -> Result<(), Error> {
        let sql = "\
-- pgmuster: libraries
SELECT DISTINCT probin FROM pg_proc JOIN pg_language l ON l.oid = prolang
 WHERE lanname = 'c' AND probin IS NOT NULL ORDER BY probin";
        let usable = self.usable(session, database).await?;
        for row in usable.query("list the libraries", sql, &[]).await? {
            let library: String = row.get(0);
            let usable = self.usable(session, database).await?;
            match usable.run("load a library", &format!("LOAD {}", quote::literal(&library))).await
            {
                Ok(()) => self.finding("extensions_load").good += 1,
                // A library that is missing or wants to be preloaded says something about this machine only.
                Err(error) => {
                    let text =
                        format!("{library} for {database}: {}", proto::failure::chain(&error));
                    self.unseen("extensions_load", text);
                }
            }
        }
        Ok(())
    }

    /// The quoted schema of an extension, which is created when it is installed on this machine. When it is not, the checks
    /// that need it say so.
    async fn extension(
        &mut self,
        session: &Session,
        name: &str,
        checks: &[&'static str],
        database: &str,
    ) -> Result<Option<String>, Error> {
        let what = "prepare an extension";
        let present = "SELECT nspname::text FROM pg_extension e JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = $1";
        if let Some(row) = session.maybe(what, present, &[&name]).await? {
            return Ok(Some(quote::identifier(row.get(0))));
        }
        let created = session
            .run(
                what,
                &format!(
                    "CREATE SCHEMA IF NOT EXISTS {OWN_SCHEMA}; CREATE EXTENSION {} SCHEMA {OWN_SCHEMA}",
                    quote::identifier(name)
                ),
            )
            .await;
        match created {
            Ok(()) => Ok(Some(quote::identifier(OWN_SCHEMA))),
            Err(error) if error.is_closed() => Err(error),
            Err(error) => {
                let text = format!(
                    "{database} without extension {name}: {}",
                    proto::failure::chain(&error)
                );
                for check in checks {
                    if is_corruption(&error) {
                        self.finding(check).bad.push(text.clone());
                    } else {
                        self.unseen(check, text.clone());
                    }
                }
                Ok(None)
            }
        }
    }
}
