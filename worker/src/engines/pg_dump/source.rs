//! The dumps as a source of the repository: each entry is a stream, begun when its turn comes.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use postgres::Target;
use postgres::clients::Clients;
use postgres::connect::application_name;
use postgres::databases::Database;
use postgres::libpq::Login;
use postgres::snapshot::Snapshot;
use proto::backup::{DatabaseCensus, DatabaseDump, SkippedDatabase};
use proto::{Action, Code, Failure, JobId};
use repository::{Source, SourceEntry, SourceFile};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::children::{Output, Pair};
use super::{GLOBALS, dump_path};

/// How long a dump waits for a lock on one table. It stands in the queue that long, and everybody who comes after it with it.
const LOCK_WAIT: Duration = Duration::from_mins(1);

/// Everything that dumps need.
pub(super) struct Dumps {
    pub(super) target: Target,
    pub(super) job: JobId,
    pub(super) clients: Clients,
    pub(super) runtime: Handle,
    /// By path.
    pub(super) databases: BTreeMap<Vec<u8>, Database>,
    /// Names that were asked for: such a database must not be missing.
    pub(super) asked: Vec<String>,
    pub(super) role_passwords: bool,
    /// Rows are counted until then; not at all when it is absent.
    pub(super) count_until: Option<Instant>,
    pub(super) cancel: CancellationToken,
    pub(super) found: Mutex<Found>,
}

/// What became known while the dumps were taken.
#[derive(Default)]
pub(super) struct Found {
    /// Without sizes.
    pub(super) dumps: Vec<DatabaseDump>,
    pub(super) gone: Vec<SkippedDatabase>,
    counts: Vec<(String, JoinHandle<Option<DatabaseCensus>>)>,
}

impl Dumps {
    /// What is to be stored, in order.
    pub(super) fn entries(&self) -> Vec<io::Result<SourceEntry>> {
        let mut paths: Vec<Vec<u8>> = self.databases.keys().cloned().collect();
        paths.push(GLOBALS.into());
        paths.sort_by(|a, b| repository::path_order(a, b));
        paths.into_iter().map(|path| Ok(SourceEntry::stream(path, 0o600))).collect()
    }

    /// The counts, and which databases could not be counted, once everything was dumped.
    pub(super) async fn counted(&self) -> (Vec<DatabaseCensus>, Vec<String>) {
        let counts = std::mem::take(&mut self.lock().counts);
        let (mut databases, mut unseen) = (Vec::new(), Vec::new());
        for (name, count) in counts {
            match count.await {
                Ok(Some(census)) => databases.push(census),
                Ok(None) | Err(_) => unseen.push(name),
            }
        }
        (databases, unseen)
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn globals(&self, ended: &CancellationToken) -> Result<Stream, Failure> {
        let login = Login::new(&self.target, &application_name(&self.job))?;
        let mut writer = login
            .apply(self.clients.pg_dumpall())
            .args(["--globals-only", "--no-password"])
            .arg(format!("--lock-wait-timeout={}", LOCK_WAIT.as_millis()));
        if !self.role_passwords {
            writer = writer.arg("--no-role-passwords");
        }
        let what = "roles and tablespaces".to_owned();
        let output = Pair { what, writer, checker: None }.start(ended).await?;
        Ok(Stream { output, _login: login, _snapshot: None })
    }

    async fn database(
        &self,
        database: &Database,
        ended: &CancellationToken,
    ) -> Result<Option<Stream>, Failure> {
        let name = database.name.as_str();
        let target = self.target.with_database(name);
        let snapshot = match Snapshot::take(&target, &self.job).await {
            Ok(snapshot) => snapshot,
            Err(error) if error.state().is_some_and(|state| state.code() == "3D000") => {
                return self.gone(database).map(|()| None);
            }
            Err(error) => return Err(error.into()),
        };
        let login = Login::new(&target, &application_name(&self.job))?;
        let writer = login
            .apply(self.clients.pg_dump())
            .args(["--format=custom", "--compress=0", "--no-password"])
            .arg(format!("--lock-wait-timeout={}", LOCK_WAIT.as_millis()))
            .arg(format!("--snapshot={}", snapshot.id()));
        let checker = self.clients.pg_restore().arg("--file=/dev/null");
        let what = format!("database {name}");
        let output = Pair { what, writer, checker: Some(checker) }.start(ended).await?;
        let dump = DatabaseDump {
            database: database.name.clone(),
            file: dump_path(&database.name),
            snapshot: snapshot.id().to_owned(),
            encoding: database.encoding.clone(),
            collate: database.collate.clone(),
            ctype: database.ctype.clone(),
            server_bytes: database.size_bytes.unwrap_or(0),
        };
        let dumped = CancellationToken::new();
        let count = self.count(snapshot, database.clone(), dumped.clone());
        let mut found = self.lock();
        found.dumps.push(dump);
        found.counts.push((name.to_owned(), count));
        Ok(Some(Stream { output, _login: login, _snapshot: Some(dumped.drop_guard()) }))
    }

    /// Counts in the snapshot, and holds it until the dump is there.
    fn count(
        &self,
        snapshot: Snapshot,
        database: Database,
        dumped: CancellationToken,
    ) -> JoinHandle<Option<DatabaseCensus>> {
        let (until, cancel) = (self.count_until, self.cancel.clone());
        tokio::spawn(async move {
            let Database { name, collation, .. } = &database;
            let census = match until {
                Some(until) => match snapshot.census(name, collation, until, &cancel).await {
                    Ok(census) => Some(census),
                    Err(error) => {
                        let why = proto::failure::chain(&error);
                        tracing::warn!(database = %name, "The rows of database {name} are not counted: {why}");
                        None
                    }
                },
                None => None,
            };
            dumped.cancelled().await;
            snapshot.release().await;
            census
        })
    }

    fn gone(&self, database: &Database) -> Result<(), Failure> {
        let name = &database.name;
        let why = "it was dropped while the backup ran".to_owned();
        if self.asked.iter().any(|asked| asked == name.as_str()) {
            let message = format!("database {name} was to be backed up: {why}");
            return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message)
                .with_hint("Order the backup again without it."));
        }
        tracing::warn!(database = %name, "Database {name} is not in the backup: {why}");
        self.lock().gone.push(SkippedDatabase { database: name.clone(), why });
        Ok(())
    }
}

/// One dump while it is read.
struct Stream {
    output: Output,
    /// Its password file.
    _login: Login,
    /// Lets the snapshot go.
    _snapshot: Option<DropGuard>,
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.output.read(buffer)
    }
}

/// The dumps, shared with the threads that store them.
pub(super) struct SharedDumps(pub(super) Arc<Dumps>);

impl Source for SharedDumps {
    fn open(&self, _: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a dump cannot be read twice"))
    }

    fn stream(
        &self,
        entry: &SourceEntry,
        ended: &CancellationToken,
    ) -> io::Result<Option<Box<dyn Read + Send>>> {
        let dumps = &self.0;
        let begun = dumps.runtime.block_on(async {
            let begin = async {
                match dumps.databases.get(&entry.path) {
                    Some(database) => dumps.database(database, ended).await,
                    None => dumps.globals(ended).await.map(Some),
                }
            };
            tokio::select! {
                biased;
                () = ended.cancelled() => Err(Failure::bug("the backup ended before this dump began")),
                begun = begin => begun,
            }
        });
        match begun {
            Ok(stream) => Ok(stream.map(|stream| -> Box<dyn Read + Send> { Box::new(stream) })),
            Err(failure) => Err(io::Error::other(failure)),
        }
    }
}
