//! What of an archive is in a database already, by name: whoever loads a part of a dump has to know.

use std::collections::BTreeSet;

use crate::archive::Entry;
use crate::error::Error;
use crate::session::Session;

/// What is not listed here cannot be told by its name; it counts as there, and `pg_restore` says what it misses.
const THERE: &str = "-- pgmuster: what is there\n\
    SELECT wanted.id FROM unnest($1::int8[], $2::text[], $3::text[], $4::text[]) AS wanted (id, kind, schema, name) \
    LEFT JOIN pg_namespace n ON n.nspname = wanted.schema WHERE CASE \
    WHEN kind IN ('TABLE', 'FOREIGN TABLE', 'VIEW', 'MATERIALIZED VIEW', 'SEQUENCE', 'INDEX') THEN EXISTS \
      (SELECT FROM pg_class c WHERE c.relnamespace = n.oid AND c.relname = wanted.name) \
    WHEN kind IN ('TYPE', 'DOMAIN', 'SHELL TYPE') THEN EXISTS \
      (SELECT FROM pg_type t WHERE t.typnamespace = n.oid AND t.typname = wanted.name) \
    WHEN kind IN ('FUNCTION', 'PROCEDURE', 'AGGREGATE') THEN EXISTS \
      (SELECT FROM pg_proc p WHERE p.pronamespace = n.oid AND wanted.name IN \
        (p.proname || '(' || oidvectortypes(p.proargtypes) || ')', p.proname || '(*)')) \
    WHEN kind = 'CONSTRAINT' THEN EXISTS \
      (SELECT FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid \
        WHERE c.relnamespace = n.oid AND c.relname || ' ' || k.conname = wanted.name) \
    WHEN kind = 'EXTENSION' THEN EXISTS (SELECT FROM pg_extension e WHERE e.extname = wanted.name) \
    ELSE true END";

impl Session {
    /// The numbers of those entries that the database has, or of which that cannot be said.
    pub async fn there(&self, entries: &[&Entry]) -> Result<BTreeSet<u32>, Error> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let ids: Vec<i64> = entries.iter().map(|entry| entry.id.into()).collect();
        let kinds: Vec<&str> = entries.iter().map(|entry| entry.kind.as_str()).collect();
        let schemas: Vec<Option<String>> =
            entries.iter().map(|entry| entry.schema.as_deref().map(text)).collect();
        let names: Vec<String> = entries.iter().map(|entry| text(&entry.name)).collect();
        let rows =
            self.query("look into the database", THERE, &[&ids, &kinds, &schemas, &names]).await?;
        Ok(rows.iter().filter_map(|row| u32::try_from(row.get::<_, i64>(0)).ok()).collect())
    }

    /// The names of all schemas.
    pub async fn schemas(&self) -> Result<BTreeSet<Vec<u8>>, Error> {
        let sql = "SELECT nspname::text FROM pg_namespace";
        let rows = self.query("list the schemas", sql, &[]).await?;
        Ok(rows.iter().map(|row| row.get::<_, String>(0).into_bytes()).collect())
    }

    /// Relations of these schemas, or of these schemas and names, ten at most: what a restore of them would meet.
    pub async fn relations_in_the_way(
        &self,
        whole: &[String],
        relations: &[&Entry],
    ) -> Result<Vec<String>, Error> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let schema = |entry: &&Entry| entry.schema.as_deref().map(text);
        let schemas: Vec<Option<String>> = relations.iter().map(schema).collect();
        let names: Vec<String> = relations.iter().map(|entry| text(&entry.name)).collect();
        let sql = "-- pgmuster: relations in the way\n\
                   SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c \
                   JOIN pg_namespace n ON n.oid = c.relnamespace \
                   WHERE (n.nspname::text = ANY ($1) AND NOT EXISTS (SELECT 1 FROM pg_depend d \
                   WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')) \
                   OR (n.nspname::text, c.relname::text) IN (SELECT * FROM unnest($2::text[], $3::text[])) \
                   ORDER BY 1 LIMIT 10";
        let parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)] = &[&whole, &schemas, &names];
        let rows = self.query("look into the database", sql, parameters).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}
