//! The dumps as a source of the repository: each entry is a stream, begun when its turn comes, which is read here as it passes
//! by: whether it is a whole archive, where in it what is, and how many rows each table has.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use postgres::Target;
use postgres::archive::{self, Archive};
use postgres::clients::Clients;
use postgres::connect::application_name;
use postgres::databases::Database;
use postgres::libpq::Login;
use postgres::snapshot::Snapshot;
use proto::backup::{DatabaseCensus, DatabaseDump, DumpLayout, SkippedDatabase};
use proto::{Action, Code, DatabaseName, Failure, JobId};
use repository::{Source, SourceEntry, SourceFile};
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::children::{Output, incomplete};
use super::counting::{Counting, Passing, Rows};
use super::failure::{is_of_database, why};
use super::snapshots::Held;
use super::{GLOBALS, dump_path};

/// How long a dump waits for a lock on one table. It stands in the queue that long, and everybody who comes after it with it.
const LOCK_WAIT: Duration = Duration::from_mins(1);

/// What is read of a dump before it becomes part of the backup.
const FIRST_BYTES: usize = 64 << 10;

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
    /// Those that cannot be dumped, and of the first how it failed.
    pub(super) failed: Vec<SkippedDatabase>,
    failure: Option<Failure>,
    /// The snapshot that a dump has just now, and what was told of it.
    pub(super) held: Option<Held>,
    pub(super) told: Option<String>,
    counts: Vec<(Counting, Rows)>,
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
        for (counting, rows) in counts {
            let name = counting.database().to_string();
            match counting.end(&rows).await {
                Some(census) => databases.push(census),
                None => unseen.push(name),
            }
        }
        (databases, unseen)
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn globals(&self, ended: &CancellationToken) -> Result<Globals, Failure> {
        let login = Login::new(&self.target, &application_name(&self.job))?;
        let mut program = login
            .apply(self.clients.pg_dumpall())
            .args(["--globals-only", "--no-password"])
            .arg(format!("--lock-wait-timeout={}", LOCK_WAIT.as_millis()));
        if !self.role_passwords {
            program = program.arg("--no-role-passwords");
        }
        let output = Output::of(&program, "roles and tablespaces".to_owned(), ended).await?;
        Ok(Globals { output, _login: login })
    }

    async fn database(
        self: &Arc<Self>,
        database: &Database,
        ended: &CancellationToken,
    ) -> Result<Option<Dump>, Failure> {
        let name = database.name.as_str();
        let target = self.target.with_database(name);
        let snapshot = match Snapshot::take(&target, &self.job).await {
            Ok(snapshot) => snapshot,
            Err(error) if error.state().is_some_and(|state| state.code() == "3D000") => {
                return self.gone(database).map(|()| None);
            }
            Err(error) if is_of_database(&error) => {
                self.failed(&database.name, error.into());
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        self.lock().held = Some(Held { database: database.name.clone(), since: Instant::now() });
        let login = Login::new(&target, &application_name(&self.job))?;
        let program = login
            .apply(self.clients.pg_dump())
            .args(["--format=custom", "--compress=0", "--no-password"])
            .arg(format!("--lock-wait-timeout={}", LOCK_WAIT.as_millis()))
            .arg(format!("--snapshot={}", snapshot.id()));
        let facts = DatabaseDump {
            database: database.name.clone(),
            file: dump_path(&database.name),
            snapshot: snapshot.id().to_owned(),
            encoding: database.encoding.clone(),
            collate: database.collate.clone(),
            ctype: database.ctype.clone(),
            server_bytes: database.size_bytes.unwrap_or(0),
            layout: None,
        };
        let output = Output::of(&program, format!("database {name}"), ended).await?;
        let (until, cancel) = (self.count_until, self.cancel.clone());
        let (counting, passing) = Counting::begin(snapshot, database.clone(), until, cancel);
        let dump = Dump {
            output,
            reader: archive::Reader::new(),
            counting: Some((counting, passing)),
            facts,
            given_up: false,
            dumps: Arc::clone(self),
            _login: login,
        };
        Ok(Some(dump))
    }

    /// One database cannot be dumped: the others are, and the backup says what it has not.
    fn failed(&self, database: &DatabaseName, failure: Failure) {
        let why = why(&failure);
        tracing::error!(database = %database, "Database {database} is not in the backup, which is no backup of the whole cluster: {why}");
        let mut found = self.lock();
        found.failed.push(SkippedDatabase { database: database.clone(), why });
        found.failure.get_or_insert(failure);
    }

    /// Fails where no database could be dumped.
    pub(super) fn anything(&self) -> Result<(), Failure> {
        let found = self.lock();
        match &found.failure {
            Some(failure) if found.dumps.is_empty() => Err(failure.clone()),
            _ => Ok(()),
        }
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

/// Roles and tablespaces while they are read.
struct Globals {
    output: Output,
    /// Its password file.
    _login: Login,
}

impl Read for Globals {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.output.read(buffer)
    }
}

/// One dump while it is read. Its snapshot is held until this is dropped.
struct Dump {
    output: Output,
    reader: archive::Reader,
    /// Until the dump has ended.
    counting: Option<(Counting, Passing)>,
    facts: DatabaseDump,
    given_up: bool,
    dumps: Arc<Dumps>,
    /// Its password file.
    _login: Login,
}

impl Read for Dump {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.given_up {
            return Ok(0);
        }
        let read = match self.output.read(buffer) {
            Err(error) if self.gives_up(&error) => return Ok(0),
            read => read?,
        };
        let understood = if read == 0 && !buffer.is_empty() {
            self.end()
        } else {
            self.reader.push(&buffer[..read])
        };
        if let Err(error) = understood {
            let reason = match error {
                postgres::Error::Archive { what } => what,
                other => proto::failure::chain(&other),
            };
            let what = format!("database {}", self.facts.database);
            return Err(io::Error::other(incomplete(&what, &reason)));
        }
        if let (Some((_, passing)), Some(contents)) = (&mut self.counting, self.reader.contents()) {
            passing.begins(contents);
        }
        Ok(read)
    }
}

impl Dump {
    /// Waits until it has begun to write. `None`: it cannot be, for a reason that lies in its database.
    fn begun(mut self) -> io::Result<Option<impl Read + Send>> {
        let mut first = vec![0; FIRST_BYTES];
        let read = self.read(&mut first)?;
        first.truncate(read);
        Ok((!self.given_up).then(|| io::Cursor::new(first).chain(self)))
    }

    /// Whether a dump ends here that cannot be, for a reason that lies in its database. What was written of it stays behind, and
    /// nobody takes it for a dump.
    fn gives_up(&mut self, error: &io::Error) -> bool {
        let failure = error.get_ref().and_then(|inner| inner.downcast_ref::<Failure>());
        match failure {
            // A right that is missing is given, and all is dumped.
            Some(failure) if self.output.is_unreadable() && failure.code == Code::DumpFailed => {
                self.counting = None;
                self.given_up = true;
                self.dumps.failed(&self.facts.database, failure.clone());
                true
            }
            _ => false,
        }
    }

    /// It has ended well: what is known of it by now becomes part of the backup.
    fn end(&mut self) -> Result<(), postgres::Error> {
        let Some((counting, _)) = self.counting.take() else { return Ok(()) };
        let archive = std::mem::take(&mut self.reader).end()?;
        let rows = Rows::of(&archive);
        let facts = DatabaseDump { layout: Some(layout(&archive)), ..self.facts.clone() };
        let mut found = self.dumps.lock();
        found.dumps.push(facts);
        found.counts.push((counting, rows));
        Ok(())
    }
}

impl Drop for Dump {
    fn drop(&mut self) {
        self.dumps.lock().held = None;
    }
}

fn layout(archive: &Archive) -> DumpLayout {
    let blocks = archive.blocks.iter().map(|block| (block.id, block.bytes)).collect();
    DumpLayout { contents_bytes: archive.contents.bytes, blocks }
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
                    Some(database) => {
                        let dump = dumps.database(database, ended).await?;
                        Ok(dump.map(|dump| Begun::Dump(Box::new(dump))))
                    }
                    None => Ok::<_, Failure>(Some(Begun::Globals(dumps.globals(ended).await?))),
                }
            };
            tokio::select! {
                biased;
                () = ended.cancelled() => Err(Failure::bug("the backup ended before this dump began")),
                begun = begin => begun,
            }
        });
        Ok(match begun.map_err(io::Error::other)? {
            Some(Begun::Dump(dump)) => dump.begun()?.map(|dump| Box::new(dump) as _),
            Some(Begun::Globals(globals)) => Some(Box::new(globals)),
            None => None,
        })
    }
}

enum Begun {
    Dump(Box<Dump>),
    Globals(Globals),
}
