//! Files of a server that are read over connections to it, by the functions that it has for that: nothing of ours runs on
//! its host, and nothing is written there.
//!
//! Every call is a statement of its own on one of a few ordinary sessions, so a session that breaks costs nothing but a
//! new one: reading can be repeated. Every session must be with the very server that was asked first; a name that leads
//! to several servers would mix their files.
//!
//! The server follows links and says nothing of them, nor of modes and inodes, and tells times in seconds.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::TryStreamExt as _;
use proto::JobId;
use proto::failure::chain;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_postgres::{Row, Statement};
use tokio_util::sync::CancellationToken;

use super::listing::{Listed, Listing, Seen};
use super::{Kind, ServerFile, ServerFiles, Stat};
use crate::connect::{Purpose, connect};
use crate::error::{During as _, Error};
use crate::identity::ServerIdentity;
use crate::process::Result;
use crate::quote;
use crate::roots::Roots;
use crate::scan::{DROP_LOOKS, DROP_PAUSE, Scan, ScanOptions, walk};
use crate::session::Session;
use crate::target::Target;

/// What a role must be allowed to call.
const FUNCTIONS: [&str; 3] = [
    "pg_catalog.pg_ls_dir(text, boolean, boolean)",
    "pg_catalog.pg_stat_file(text, boolean)",
    "pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean)",
];
/// Bytes of one answer. The server holds as much in memory for each session that reads.
const READ_BYTES: usize = 1 << 20;
/// A file of this size or less is read when it is opened: that costs as much as the question whether it is there.
const AT_ONCE_BYTES: u64 = 512 << 10;
/// The longest statement, the listing of a level of directories, on a slow disk.
const STATEMENT: Duration = Duration::from_mins(5);
/// What a statement may take altogether, log-in and network included.
const ANSWER: Duration = Duration::from_mins(6);
/// How often a statement is sent whose session broke, or that a standby ended because replay had to go on.
const TRIES: u32 = 3;

const READ: &str = "\
-- pgmuster: read a file
SELECT pg_read_binary_file($1, $2, $3, true)";
const STAT: &str = "\
-- pgmuster: look at a file
SELECT size, isdir, extract(epoch FROM modification)::int8, extract(epoch FROM change)::int8
  FROM pg_stat_file($1, true)";
const NAMES: &str = "\
-- pgmuster: list a directory
SELECT name FROM pg_ls_dir($1, true, false) AS name";
/// A directory is listed to its end before anything in it is looked at.
const LIST: &str = "\
-- pgmuster: list directories
SELECT number, name, size, isdir, extract(epoch FROM modification)::int8, extract(epoch FROM change)::int8
  FROM unnest($1::text[]) WITH ORDINALITY AS directory (path, number),
       LATERAL pg_ls_dir(path, true, false) AS name,
       LATERAL pg_stat_file(path || '/' || name, true)";
const LOCATION: &str = "\
-- pgmuster: where a tablespace is
SELECT pg_tablespace_location($1::text::oid)";

/// How a server's files are read.
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    /// For which job; its short form is the sessions' application name.
    pub job: JobId,
    /// Sessions at once, at least one.
    pub sessions_max: usize,
    /// Ends every call that waits.
    pub cancel: CancellationToken,
}

/// The files of a server, read over connections. Must not be used on a thread that serves the runtime.
#[derive(Debug, Clone)]
pub struct RemoteFiles {
    shared: Arc<Shared>,
}

struct Shared {
    runtime: Handle,
    target: Target,
    purpose: Purpose,
    server: ServerIdentity,
    /// `data_directory_mode`: what others than the server's user may do is the same for every file.
    directory_mode: u32,
    cancel: CancellationToken,
    room: Semaphore,
    idle: Mutex<Vec<Reader>>,
}

/// A session with its statements.
struct Reader {
    session: Session,
    read: Statement,
    stat: Statement,
}

/// Looks whether the role of a session may read the server's files, and names the grants that are missing.
pub async fn require_remote_rights(session: &Session, server: &ServerIdentity) -> Result<()> {
    let mut missing = Vec::new();
    for function in FUNCTIONS {
        let sql = "SELECT has_function_privilege($1::text, 'EXECUTE')";
        if !session.one("look at the role's rights", sql, &[&function]).await?.get::<_, bool>(0) {
            let role = quote::identifier(&server.role);
            missing.push(format!("GRANT EXECUTE ON FUNCTION {function} TO {role};"));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::Permission {
        what: format!("read the files of {} over the connection", session.target()),
        role: server.role.clone(),
        grant: missing.join(" "),
        source: None,
    })
}

impl RemoteFiles {
    /// The files of the server that `session` is with. Must be called inside a tokio runtime, which then carries the
    /// sessions.
    pub async fn of(
        session: &Session,
        target: &Target,
        server: &ServerIdentity,
        options: RemoteOptions,
    ) -> Result<Self> {
        require_remote_rights(session, server).await?;
        let what = "ask for the mode of the data directory";
        let mode = session.one(what, "SELECT current_setting('data_directory_mode')", &[]).await?;
        let mode: String = mode.get(0);
        let Ok(directory_mode) = u32::from_str_radix(&mode, 8) else {
            return Err(Error::Answer { what: what.to_owned(), answer: mode });
        };
        let shared = Shared {
            runtime: Handle::current(),
            target: target.with_database(&server.database),
            purpose: Purpose { statement_timeout: STATEMENT, ..Purpose::ask(&options.job) },
            server: server.clone(),
            directory_mode: directory_mode & 0o777,
            cancel: options.cancel.child_token(),
            room: Semaphore::new(options.sessions_max.max(1)),
            idle: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// What a name leads to.
    pub(super) fn stat(&self, path: &str) -> io::Result<Option<Stat>> {
        let shared = &*self.shared;
        let row = shared.wait("look at a file", &async |reader: &Reader| {
            reader.session.client().query_one(&reader.stat, &[&path]).await.during("look at a file")
        })?;
        Ok(seen(&row, 0)?.map(|seen| self.stat_of(seen)))
    }

    pub(super) fn stat_of(&self, seen: Seen) -> Stat {
        self.shared.stat_of(seen)
    }

    /// What is in each of some directories, in their order. What is gone by now is not there.
    pub(super) fn list(&self, directories: &[&str]) -> io::Result<Vec<Vec<Listed>>> {
        let directories: Vec<&str> =
            directories.iter().map(|path| if path.is_empty() { "." } else { *path }).collect();
        let what = "list the data directory";
        // There may be a row for each of a million files: they are never all in memory here.
        self.shared.wait(what, &async |reader: &Reader| {
            let mut found: Vec<Vec<Listed>> = directories.iter().map(|_| Vec::new()).collect();
            let parameters: [&(dyn ToSql + Sync); 1] = [&directories];
            let rows = reader.session.client().query_raw(LIST, parameters).await.during(what)?;
            let mut rows = std::pin::pin!(rows);
            while let Some(row) = rows.try_next().await.during(what)? {
                let mut read = || -> io::Result<()> {
                    let number: i64 = column(&row, 0)?;
                    let names = usize::try_from(number - 1).ok();
                    let names = names.and_then(|number| found.get_mut(number));
                    let Name(name) = column(&row, 1)?;
                    let leads_to = seen(&row, 2)?;
                    let listed = Listed { name: name.into_boxed_os_str(), leads_to };
                    names.ok_or_else(|| strange("a number"))?.push(listed);
                    Ok(())
                };
                read().map_err(|error| Error::Answer {
                    what: what.to_owned(),
                    answer: error.to_string(),
                })?;
            }
            Ok(found)
        })
    }

    /// Where the link of a tablespace leads; for one that lies in place, a relative path.
    pub(super) fn location(&self, oid: &str) -> io::Result<Option<PathBuf>> {
        let asked = self.shared.wait("ask for a tablespace", &async |reader: &Reader| {
            reader.session.one("ask for a tablespace", LOCATION, &[&oid]).await
        });
        match asked {
            Ok(row) => {
                let Name(location) = column(&row, 0)?;
                Ok(Some(location.into()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether `pg_tblspc` has this name now.
    pub(super) fn has_tablespace(&self, oid: &str) -> io::Result<bool> {
        let names = self.names(Path::new("pg_tblspc"))?.unwrap_or_default();
        Ok(names.iter().any(|name| name == oid))
    }

    /// The data directory, where the role may know it.
    pub(super) fn data_directory(&self) -> Option<&Path> {
        self.shared.server.data_directory.as_deref()
    }

    pub(super) fn directory(&self) -> Stat {
        self.stat_of(Seen { kind: Kind::Directory, size: 0, modified_s: 0, changed_s: 0 })
    }
}

impl ServerFiles for RemoteFiles {
    fn here(&self) -> Option<&Path> {
        None
    }

    fn place(&self, path: &Path) -> PathBuf {
        match self.data_directory() {
            Some(directory) if path.as_os_str().is_empty() => directory.to_owned(),
            Some(directory) => directory.join(path),
            None => path.to_owned(),
        }
    }

    fn open(&self, path: &Path, size_bytes: u64) -> io::Result<Option<Box<dyn ServerFile>>> {
        let path = text(path)?;
        let mut begin = None;
        // What was empty is not touched: pipes and sockets look like empty files, and a pipe would hold its reader.
        if size_bytes > 0 && size_bytes <= AT_ONCE_BYTES {
            let wanted = usize::try_from(size_bytes).unwrap_or(READ_BYTES);
            let Some(answer) = self.shared.read(path, 0, wanted)? else { return Ok(None) };
            begin = Some(answer);
        } else if size_bytes > 0 && self.stat(path)?.is_none() {
            return Ok(None);
        }
        let fetched = begin.as_ref().map_or(Ok(0), |answer| answer.bytes().map(<[u8]>::len))?;
        Ok(Some(Box::new(RemoteFile {
            shared: Arc::clone(&self.shared),
            path: path.to_owned(),
            begin: Mutex::new(begin),
            fetched: AtomicU64::new(fetched as u64),
        })))
    }

    fn read(&self, path: &Path, limit_bytes: u64) -> io::Result<Option<Vec<u8>>> {
        let path = text(path)?;
        let limit = usize::try_from(limit_bytes).unwrap_or(usize::MAX);
        let mut bytes = Vec::new();
        while bytes.len() < limit {
            let wanted = (limit - bytes.len()).min(READ_BYTES);
            let answer = self.shared.read(path, bytes.len() as u64, wanted)?;
            // It went away in the middle: what it was is not known.
            let Some(answer) = answer else { return Ok(None) };
            bytes.extend_from_slice(answer.bytes()?);
            if answer.bytes()?.len() < wanted {
                break;
            }
        }
        Ok(Some(bytes))
    }

    fn names(&self, directory: &Path) -> io::Result<Option<Vec<OsString>>> {
        let path = text(directory)?;
        let rows = self.shared.wait("list a directory", &async |reader: &Reader| {
            reader.session.query("list a directory", NAMES, &[&path]).await
        })?;
        rows.iter()
            .map(|row| column(row, 0).map(|Name(name)| name))
            .collect::<io::Result<_>>()
            .map(Some)
    }

    fn scan(&self, options: &ScanOptions) -> Result<Scan> {
        walk(&Listing::of(self.clone(), options)?, options)
    }

    /// A tablespace whose file system went away has no directory of this server any more, but still its link. Another
    /// directory in the same place is not told from the one that was there.
    fn verify(&self, roots: &Roots) -> Result<()> {
        for place in roots.places() {
            let (Some(versioned), Some(oid)) = (&place.versioned, place.path.file_name()) else {
                continue;
            };
            let inside = place.path.join(versioned);
            let failed = |source| self.unreadable(&inside, source);
            let (inside_text, oid) = (inside.to_string_lossy(), oid.to_string_lossy());
            let mut is_right = false;
            for _ in 0..DROP_LOOKS {
                is_right = self.stat(&inside_text).map_err(failed)?.is_some()
                    || !self.has_tablespace(&oid).map_err(failed)?;
                if is_right {
                    break;
                }
                std::thread::sleep(DROP_PAUSE);
            }
            if !is_right {
                return Err(place.changed("it went away"));
            }
        }
        Ok(())
    }

    fn unreadable(&self, path: &Path, source: io::Error) -> Error {
        let place = self.place(path);
        if source.kind() != io::ErrorKind::PermissionDenied {
            return Error::io("read", &place, source);
        }
        let cure = "Look whether the server's own user may read it, and whether the role still may read the server's files: \
                    the server's log has the whole message."
            .to_owned();
        Error::Unreadable { path: place, cure, source }
    }

    fn close(&self) {
        self.shared.cancel.cancel();
        lock(&self.shared.idle).clear();
    }
}

/// A file of a server that is read by its name, again and again.
struct RemoteFile {
    shared: Arc<Shared>,
    path: String,
    /// What was read when it was opened.
    begin: Mutex<Option<Answer>>,
    /// Bytes that the server sent.
    fetched: AtomicU64,
}

impl ServerFile for RemoteFile {
    fn read_full_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        // Once: a page that is read again is to be read.
        if let Some(answer) = lock(&self.begin).take() {
            let bytes = answer.bytes()?;
            let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
            let rest = rest.unwrap_or_default();
            filled = rest.len().min(buffer.len());
            buffer[..filled].copy_from_slice(&rest[..filled]);
            if bytes.len() < answer.wanted {
                return Ok(filled);
            }
        }
        while filled < buffer.len() {
            let wanted = (buffer.len() - filled).min(READ_BYTES);
            let answer = self.shared.read(&self.path, offset + filled as u64, wanted)?;
            // A file that is gone has ended.
            let Some(answer) = answer else { break };
            let bytes = answer.bytes()?;
            self.fetched.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            let got = bytes.len().min(wanted);
            buffer[filled..filled + got].copy_from_slice(&bytes[..got]);
            filled += got;
            if got < wanted {
                break;
            }
        }
        Ok(filled)
    }

    fn fetched_bytes(&self) -> Option<u64> {
        Some(self.fetched.load(Ordering::Relaxed))
    }
}

impl fmt::Debug for RemoteFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteFile").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Bytes of a file, where the driver has them.
struct Answer {
    row: Row,
    wanted: usize,
}

impl Answer {
    fn bytes(&self) -> io::Result<&[u8]> {
        column(&self.row, 0)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Shared {
    /// One stretch of a file; fewer bytes than asked for mean that it ends there. Nothing when the file is gone.
    fn read(&self, path: &str, offset: u64, wanted: usize) -> io::Result<Option<Answer>> {
        let start = i64::try_from(offset).map_err(|_| strange("an offset"))?;
        let length = i64::try_from(wanted).map_err(|_| strange("a length"))?;
        let row = self.wait("read a file", &async |reader: &Reader| {
            let parameters: [&(dyn ToSql + Sync); 3] = [&path, &start, &length];
            reader.session.client().query_one(&reader.read, &parameters).await.during("read a file")
        })?;
        let is_there = column::<Option<&[u8]>>(&row, 0)?.is_some();
        Ok(is_there.then_some(Answer { row, wanted }))
    }

    /// Runs a statement on a session that nobody else uses, and waits for it on this thread.
    fn wait<T>(&self, what: &str, statement: &impl AsyncFn(&Reader) -> Result<T>) -> io::Result<T> {
        let answered = self.runtime.block_on(async {
            let answer = tokio::time::timeout(ANSWER, self.ask(statement));
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => Err(Error::Cancelled { what: what.to_owned() }),
                answered = answer => {
                    answered.unwrap_or_else(|_| Err(Error::Deadline { what: what.to_owned() }))
                }
            }
        });
        answered.map_err(|error| {
            let kind = match error.state().map(SqlState::code) {
                Some("42501") => io::ErrorKind::PermissionDenied,
                Some("58P01") => io::ErrorKind::NotFound,
                _ => io::ErrorKind::Other,
            };
            io::Error::new(kind, chain(&error))
        })
    }

    async fn ask<T>(&self, statement: &impl AsyncFn(&Reader) -> Result<T>) -> Result<T> {
        let mut tries = 1;
        loop {
            let asked = async {
                let reader = self.reader().await?;
                let answer = statement(&reader).await;
                // A session that broke in the middle of its statement is of no more use.
                if !reader.session.is_closed() && !self.cancel.is_cancelled() {
                    lock(&self.idle).push(reader);
                }
                answer
            };
            let room = self.room.acquire().await;
            let answer = asked.await;
            drop(room);
            match answer {
                Err(error) if tries < TRIES && passes(&error) => tries += 1,
                answer => return answer,
            }
        }
    }

    /// A session of this server.
    async fn reader(&self) -> Result<Reader> {
        loop {
            let idle = lock(&self.idle).pop();
            match idle {
                Some(reader) if reader.session.is_closed() => {}
                Some(reader) => return Ok(reader),
                None => break,
            }
        }
        let session = connect(&self.target, &self.purpose).await?;
        let now = session.identity_of(Some(self.server.system_identifier)).await?;
        if now.started_at_ms != self.server.started_at_ms {
            let what = format!(
                "the server at {} was restarted, or another one answers there",
                session.target()
            );
            return Err(Error::SessionLost { what, source: None });
        }
        // Names of files are bytes and of no encoding; the server must not convert them.
        session.run("set up the session", "SET client_encoding = 'SQL_ASCII'").await?;
        let client = session.client();
        let what = "prepare the reading of files";
        let read = client.prepare(READ).await.during(what)?;
        let stat = client.prepare(STAT).await.during(what)?;
        Ok(Reader { session, read, stat })
    }

    fn stat_of(&self, seen: Seen) -> Stat {
        let Seen { kind, size, modified_s, changed_s } = seen;
        let is_directory = kind == Kind::Directory;
        let nanoseconds = |seconds: i64| seconds.saturating_mul(1_000_000_000);
        Stat {
            kind,
            size,
            mode: self.directory_mode & if is_directory { 0o777 } else { 0o666 },
            mtime_ns: nanoseconds(modified_s),
            ctime_ns: nanoseconds(changed_s),
            inode: 0,
            device: 0,
        }
    }
}

/// Size, whether it is a directory, and two times, from a column on.
fn seen(row: &Row, from: usize) -> io::Result<Option<Seen>> {
    let Some(size) = column::<Option<i64>>(row, from)? else { return Ok(None) };
    let is_directory = column::<Option<bool>>(row, from + 1)?.unwrap_or(false);
    let modified_s = column::<Option<i64>>(row, from + 2)?.unwrap_or(0);
    let changed_s = column::<Option<i64>>(row, from + 3)?.unwrap_or(modified_s);
    let size = u64::try_from(size).map_err(|_| strange("a size"))?;
    let kind = if is_directory { Kind::Directory } else { Kind::File };
    Ok(Some(Seen { kind, size, modified_s, changed_s }))
}

/// Whether the same statement may be answered on another session, or a moment later.
fn passes(error: &Error) -> bool {
    matches!(error, Error::Statement { .. })
        && (error.is_closed() || error.state() == Some(&SqlState::T_R_SERIALIZATION_FAILURE))
}

/// A name as the server's file system has it.
struct Name(OsString);

impl<'a> FromSql<'a> for Name {
    fn from_sql(
        _: &Type,
        raw: &'a [u8],
    ) -> std::result::Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(OsString::from_vec(raw.to_vec())))
    }

    fn accepts(of: &Type) -> bool {
        *of == Type::TEXT
    }
}

fn column<'a, T: FromSql<'a>>(row: &'a Row, index: usize) -> io::Result<T> {
    row.try_get(index).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, chain(&error)))
}

fn strange(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} is out of range"))
}

fn text(path: &Path) -> io::Result<&str> {
    let path = path.to_str();
    path.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the name is no UTF-8 text"))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
