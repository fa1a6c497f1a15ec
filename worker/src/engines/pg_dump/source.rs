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
use proto::{Action, Code, Failure, JobId};
use repository::{Source, SourceEntry, SourceFile};
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::children::{Output, incomplete};
use super::counting::{Counting, Passing, Rows};
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
            Err(error) => return Err(error.into()),
        };
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
            dumps: Arc::clone(self),
            _login: login,
        };
        Ok(Some(dump))
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

/// One dump while it is read.
struct Dump {
    output: Output,
    reader: archive::Reader,
    /// Until the dump has ended.
    counting: Option<(Counting, Passing)>,
    facts: DatabaseDump,
    dumps: Arc<Dumps>,
    /// Its password file.
    _login: Login,
}

impl Read for Dump {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.output.read(buffer)?;
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
                let stream: Option<Box<dyn Read + Send>> = match dumps.databases.get(&entry.path) {
                    Some(database) => match dumps.database(database, ended).await? {
                        Some(dump) => Some(Box::new(dump)),
                        None => None,
                    },
                    None => Some(Box::new(dumps.globals(ended).await?)),
                };
                Ok::<_, Failure>(stream)
            };
            tokio::select! {
                biased;
                () = ended.cancelled() => Err(Failure::bug("the backup ended before this dump began")),
                begun = begin => begun,
            }
        });
        begun.map_err(io::Error::other)
    }
}
