//! Compares the restored server with what its backup says: where it ended, what was in it.

use proto::Lsn;
use proto::backup::{DatabaseCensus, TableCount};
use proto::words::count;

use super::findings::is_lost;
use super::{Run, purpose};
use crate::connect::connect_maintenance;
use crate::error::Error;
use crate::session::Session;

impl Run<'_> {
    pub(super) async fn stop_position(
        &mut self,
        session: &Session,
        stop: Lsn,
    ) -> Result<Lsn, Error> {
        let what = "ask how far recovery came";
        let sql = "\
-- pgmuster: stop position
SELECT pg_is_in_recovery() AS in_recovery,
       greatest(pg_last_wal_replay_lsn(), (SELECT checkpoint_lsn FROM pg_control_checkpoint()))::text AS reached,
       backup_start_lsn = '0/0' AND NOT end_of_backup_record_required AS consistent
  FROM pg_control_recovery()";
        let row = session.one(what, sql, &[]).await?;
        let reached: String = row.get("reached");
        let reached: Lsn = reached
            .parse()
            .map_err(|_| Error::Answer { what: what.to_owned(), answer: reached })?;
        let consistent: bool = row.get("consistent");
        self.note("stop_position", consistent && reached >= stop, || {
            match (reached >= stop, consistent) {
                (true, _) => format!("the server reached {reached} but not the end of the backup"),
                (false, _) => format!("the server reached {reached}, the backup ends at {stop}"),
            }
        });
        Ok(reached)
    }

    pub(super) fn census_of(&self, database: &str) -> Option<&DatabaseCensus> {
        self.options.census?.databases.iter().find(|census| census.database.as_str() == database)
    }

    pub(super) async fn compare(&mut self) -> Result<(), Error> {
        let Some(census) = self.options.census else {
            for check in ["relations_present", "row_counts", "canary"] {
                self.unseen(check, "the backup has no census".to_owned());
            }
            return Ok(());
        };
        for database in &census.databases {
            self.compare_database(database);
        }
        for database in &census.unseen {
            for check in ["relations_present", "row_counts", "extensions_present"] {
                self.unseen(check, format!("the census could not look at database {database}"));
                self.finding(check).lacks_much = true;
            }
        }
        let tables = || census.databases.iter().flat_map(|database| &database.tables);
        let incomparable = tables().filter(|table| table.rows.and(table.drift).is_none()).count();
        if incomparable > 0 {
            let tables = count(incomparable as u64, "table");
            let why = census.forbidden.as_ref();
            let why = why.map_or(String::new(), |forbidden| format!(", {}", forbidden.sentence()));
            let what =
                format!("how many rows {tables} had at the end of the backup is not known{why}");
            self.unseen("row_counts", what);
        }
        // A census without tables is an empty cluster, and an empty cluster is healthy.
        self.finding("relations_present");
        self.finding("row_counts");
        if self.is_of_dump() {
            return Ok(());
        }
        let Some(canary) = &census.canary else {
            self.unseen("canary", "the backup has none".to_owned());
            return Ok(());
        };
        let status = match self.status_of(canary).await {
            Ok(status) => status.unwrap_or_else(|| "unknown".to_owned()),
            Err(error @ (Error::Cancelled { .. } | Error::Deadline { .. })) => return Err(error),
            // Whoever knows what the server died of decides whether that is the copy's fault.
            Err(error) if is_lost(&error) => {
                let why = proto::failure::chain(&error);
                self.blind("canary", format!("transaction {canary} is: {why}"));
                return Ok(());
            }
            Err(error) => proto::failure::chain(&error),
        };
        self.note("canary", status == "committed", || format!("transaction {canary} is: {status}"));
        Ok(())
    }

    /// In a session of its own: the one that the checks began with may have died with a damaged page.
    async fn status_of(&self, transaction: &String) -> Result<Option<String>, Error> {
        let session = connect_maintenance(self.target, &purpose(self.options)).await?;
        let sql = "SELECT pg_xact_status($1::text::xid8)";
        let row =
            self.within(&session, session.maybe("look for the canary", sql, &[transaction])).await;
        let status = row?.and_then(|row| row.get(0));
        session.close().await;
        Ok(status)
    }

    fn compare_database(&mut self, census: &DatabaseCensus) {
        let database = census.database.as_str();
        let content = match self.databases.remove(database) {
            Some(Some(content)) => content,
            Some(None) => {
                // Why stands in tables_readable.
                self.blind("row_counts", format!("database {database} could not be read"));
                return;
            }
            None => {
                let text = format!("database {database} is missing");
                self.finding("relations_present").bad.push(text);
                return;
            }
        };
        for (kind, expected) in &census.relations {
            let found = content.relations.get(kind).copied().unwrap_or(0);
            self.note("relations_present", found >= *expected, || {
                format!("{database} has {found} relations of kind {kind}, {expected} were there")
            });
        }
        for extension in &census.extensions {
            let there = if self.is_of_dump() {
                // A dump asks for an extension, and the machine gives the version that it has.
                let name = without_version(extension);
                content.extensions.iter().any(|found| without_version(found) == name)
            } else {
                content.extensions.contains(extension)
            };
            self.note("extensions_present", there, || {
                format!("{extension} is missing in {database}")
            });
        }
        for table in &census.tables {
            let key = (table.schema.clone(), table.table.clone());
            let shown = format!("{}.{} in {database}", table.schema, table.table);
            match content.tables.get(&key) {
                None => {
                    self.finding("relations_present").bad.push(format!("table {shown} is missing"));
                }
                Some(found) => self.compare_rows(&shown, table, *found),
            }
        }
        self.databases.insert(database.to_owned(), Some(content));
    }

    fn compare_rows(&mut self, shown: &str, table: &TableCount, found: Option<u64>) {
        let Some((rows, drift)) = table.rows.zip(table.drift) else { return };
        let Some(found) = found else {
            // Why it could not be read stands in tables_readable; what could not be counted does not match.
            self.blind(
                "row_counts",
                format!("{shown} could not be counted, {rows} rows were there"),
            );
            return;
        };
        let (fewer, more) = drift;
        let fits = (rows.saturating_sub(fewer)..=rows.saturating_add(more)).contains(&found);
        self.note("row_counts", fits, || {
            let bounds =
                if drift == (0, 0) { String::new() } else { format!(" (-{fewer}, +{more})") };
            format!("{shown} has {found} rows, {rows}{bounds} were there")
        });
    }
}

fn without_version(extension: &str) -> &str {
    extension.rsplit_once(' ').map_or(extension, |(name, _)| name)
}
