//! The census of a dump: rows are counted as they pass by, and by the server where the dump has none of a table.

use std::collections::{HashMap, HashSet};

use postgres::archive::{Archive, Contents};
use postgres::databases::Database;
use postgres::snapshot::{Listing, Snapshot};
use proto::DatabaseName;
use proto::backup::DatabaseCensus;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Schema and name.
type Table = (String, String);

/// The half of a census that is the server's, while the dump is taken.
pub(super) struct Counting {
    database: Database,
    task: JoinHandle<Result<Option<Seen>, postgres::Error>>,
}

/// What the server says of a database.
struct Seen {
    listing: Listing,
    /// Tables that the dump has no rows of, and could be counted.
    beside: HashMap<Table, u64>,
}

/// The dump as it passes by.
pub(super) struct Passing {
    tell: Option<oneshot::Sender<HashSet<Table>>>,
}

/// The half of a census that is the dump's.
pub(super) struct Rows(HashMap<Table, u64>);

impl Counting {
    /// Lists in the snapshot what is there, and holds the snapshot until `pg_dump` has it as well. Nothing is listed or counted
    /// where no time is given for it.
    pub(super) fn begin(
        snapshot: Snapshot,
        database: Database,
        until: Option<Instant>,
        cancel: CancellationToken,
    ) -> (Self, Passing) {
        let (tell, told) = oneshot::channel();
        let task = tokio::spawn(async move {
            let seen = match until {
                Some(until) => see(&snapshot, told, until, &cancel).await,
                // An error says that the dump ended before it began.
                None => told.await.map(|_| None).or(Ok(None)),
            };
            snapshot.release().await;
            seen
        });
        (Self { database, task }, Passing { tell: Some(tell) })
    }

    /// Which database it is about.
    pub(super) fn database(&self) -> &DatabaseName {
        &self.database.name
    }

    /// The census, when the dump has ended; none where the server did not say what is there.
    pub(super) async fn end(self, rows: &Rows) -> Option<DatabaseCensus> {
        let Database { name, collation, .. } = self.database;
        let Seen { listing, beside } = match self.task.await {
            Ok(Ok(seen)) => seen?,
            Ok(Err(error)) => {
                let why = proto::failure::chain(&error);
                tracing::warn!(database = %name, "The rows of database {name} are not counted: {why}");
                return None;
            }
            Err(_) => return None,
        };
        let rows = |schema: &str, table: &str| {
            let table = (schema.to_owned(), table.to_owned());
            rows.0.get(&table).or_else(|| beside.get(&table)).copied()
        };
        Some(listing.census(name, collation, rows))
    }
}

async fn see(
    snapshot: &Snapshot,
    told: oneshot::Receiver<HashSet<Table>>,
    until: Instant,
    cancel: &CancellationToken,
) -> Result<Option<Seen>, postgres::Error> {
    let listing = snapshot.list().await?;
    let Ok(dumped) = told.await else { return Ok(None) };
    let mut beside = HashMap::new();
    for table in listing.tables().iter().filter(|table| !dumped.contains(*table)) {
        if let Some(rows) = snapshot.count(&table.0, &table.1, until, cancel).await? {
            beside.insert(table.clone(), rows);
        }
    }
    Ok(Some(Seen { listing, beside }))
}

impl Passing {
    /// The dump says what it will hold: it has its snapshot by now. What is said a second time is not new.
    pub(super) fn begins(&mut self, contents: &Contents) {
        if let Some(tell) = self.tell.take() {
            // Whoever lists may have failed.
            let _ = tell.send(contents.entries.iter().filter_map(|e| owned(e.table())).collect());
        }
    }
}

impl Rows {
    /// What an archive brings back.
    pub(super) fn of(archive: &Archive) -> Self {
        let rows: HashMap<u32, u64> =
            archive.blocks.iter().filter_map(|block| Some((block.id, block.rows?))).collect();
        let entries = archive.contents.entries.iter();
        Self(entries.filter_map(|e| Some((owned(e.table())?, *rows.get(&e.id)?))).collect())
    }
}

fn owned(table: Option<(&str, &str)>) -> Option<Table> {
    table.map(|(schema, name)| (schema.to_owned(), name.to_owned()))
}
