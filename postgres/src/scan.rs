//! What of a data directory belongs into a backup: a walk that lists files, directories and
//! tablespaces, and reads none.
//!
//! The rules are those of the server's own base backup. Everything is excluded by its full path,
//! never by name alone: an administrator's `log` or `backup_label_notes` is no business of ours to
//! drop. Files that vanish during the walk were dropped by the server and are passed over; what
//! cannot be copied as it is becomes a warning or an error, never a silence.

use std::collections::{HashMap, HashSet};
use std::fs::{FileType, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use crate::Error;
use crate::control_file::CONTROL_FILE_PATH;
use crate::process::{Account, Result};
use crate::relation::{Fork, RelationFile};
use crate::roots::Roots;

/// Below this name a backup keeps the settings files that lie outside the data directory, each by
/// its absolute path.
pub const EXTERNAL_ROOT: &str = "pgmuster_external";

/// Directories whose content is worthless in a copy; the directories themselves must exist for a
/// server to start.
const EMPTIED: [&str; 8] = [
    "pg_dynshmem",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_wal",
];
/// Files that describe the running server, an older backup or a finished recovery. A prefix where
/// the server appends.
const SKIPPED: [&str; 9] = [
    "postmaster.pid",
    "postmaster.opts",
    "postgresql.auto.conf.tmp",
    "current_logfiles.tmp",
    "recovery.signal",
    "standby.signal",
    ".DS_Store",
    // What an earlier restore left: its note that it is not done, and the settings files of then.
    "pgmuster-restore-incomplete",
    EXTERNAL_ROOT,
];
const SKIPPED_WITH_SUFFIX: [&str; 3] = ["backup_label", "tablespace_map", "backup_manifest"];
/// Directories that hold the server's own data: a link in or on one of them would be lost in a
/// copy.
const SERVERS_OWN: [&str; 9] = [
    "base",
    "global",
    "pg_commit_ts",
    "pg_logical",
    "pg_multixact",
    "pg_stat",
    "pg_tblspc",
    "pg_twophase",
    "pg_xact",
];

/// What to walk.
#[derive(Debug, Clone)]
pub struct ScanOptions {
    /// The data directory.
    pub data_directory: PathBuf,
    /// Major version of the server.
    pub major: u32,
    /// Catalogue version of the control file: with the major version it names the directory inside
    /// a tablespace.
    pub catalog_version: u32,
    /// Settings files as the server names them (`config_file`, `hba_file`, `ident_file`, included
    /// ones); those inside the data directory need not be left out.
    pub settings_files: Vec<PathBuf>,
}

/// A file or directory that belongs into a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanEntry {
    /// Path relative to the data directory, `/` between the parts; tablespaces appear below
    /// `pg_tblspc/OID`.
    pub path: String,
    /// Where to read it.
    pub source: PathBuf,
    /// What it is.
    pub kind: EntryKind,
    /// Bytes at the time of the walk; zero for directories.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Last change of the content, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Last change of content or properties, nanoseconds since 1970.
    pub ctime_ns: i64,
    /// Number inside its file system.
    pub inode: u64,
    /// Number of its file system.
    pub device: u64,
}

/// What an entry is, and how it must be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory; its content has entries of its own, or is left out.
    Directory,
    /// A file made of pages.
    Relation(RelationFile),
    /// `pg_control`: read with retries, and after everything else.
    ControlFile,
    /// Any other file.
    Plain,
    /// A settings file from outside the data directory.
    External,
}

/// A tablespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScannedTablespace {
    /// Its OID.
    pub oid: u32,
    /// What the link in `pg_tblspc` says; `pg_tblspc/OID` for one that lies in place.
    pub location: PathBuf,
    /// Whether it is a directory in `pg_tblspc` and no link.
    pub in_place: bool,
}

/// Something a person should know about the backup's content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScanWarning {
    /// A socket, pipe or device.
    #[error("{0} is a special file and is not in the backup")]
    SpecialFile(String),
    /// A link somebody put there.
    #[error("{0} is a link to {1} and is not in the backup")]
    LinkLeftOut(String, PathBuf),
    /// A link to a settings file.
    #[error("{0} is a link to {1}; the backup holds the content of that file")]
    LinkFollowed(String, PathBuf),
    /// A name that is no UTF-8.
    #[error("{0:?} has a name that is no UTF-8 text and is not in the backup")]
    NameNotText(PathBuf),
    /// A settings file outside the data directory.
    #[error("{0} cannot be read and is not in the backup ({1})")]
    SettingsFileUnreadable(PathBuf, String),
    /// A tablespace below the data directory.
    #[error(
        "tablespace {0} lies inside the data directory ({1}); the backup holds it once, as a tablespace"
    )]
    TablespaceInside(u32, PathBuf),
    /// Something in `pg_tblspc` that is no tablespace.
    #[error("{0} is no tablespace and is not in the backup")]
    StrangeTablespace(String),
}

/// The result of a walk.
#[derive(Debug, Clone, Default)]
pub struct Scan {
    /// Sorted by path as bytes, each path once.
    pub entries: Vec<ScanEntry>,
    /// In the order they were found.
    pub warnings: Vec<ScanWarning>,
    /// Sorted by OID.
    pub tablespaces: Vec<ScannedTablespace>,
    /// The directories that were walked: to be verified when everything was copied.
    pub roots: Roots,
}

impl Scan {
    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.size).sum()
    }
}

/// Walks a data directory. Blocking: a few microseconds a file.
pub fn scan(options: &ScanOptions) -> Result<Scan> {
    let mut walk = Walk::new(options)?;
    walk.tablespaces()?;
    walk.directory("", &options.data_directory, Place::Root)?;
    for path in &options.settings_files {
        walk.settings_file(path);
    }
    let mut scan = walk.scan;
    scan.entries.sort_by(|a, b| a.path.cmp(&b.path));
    scan.entries.dedup_by(|a, b| a.path == b.path);
    scan.tablespaces.sort_by_key(|tablespace| tablespace.oid);
    if !scan.entries.iter().any(|entry| entry.kind == EntryKind::ControlFile) {
        return Err(Error::Shape {
            path: options.data_directory.clone(),
            what: format!("{CONTROL_FILE_PATH} is missing, so it is no data directory"),
            cure: "Give the directory that SHOW data_directory names.".to_owned(),
        });
    }
    Ok(scan)
}

/// The error for files of a server that this process may not read, with the two cures.
pub(crate) fn unreadable(path: &Path, source: io::Error) -> Error {
    let owner = path.ancestors().find_map(|place| Account::owner_of(place).ok());
    let who = owner.map_or_else(
        || "the server's user".to_owned(),
        |owner| format!("the server's user (uid {})", owner.uid),
    );
    let cure = format!(
        "Run pgmuster on the database's host as {who}; or let its group read the data directory (initdb --allow-group-access) and \
         put pgmuster's user into that group."
    );
    Error::Unreadable { path: path.to_owned(), cure, source }
}

/// Where in the data directory the walk is: which rules hold for the files there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Root,
    Global,
    /// `base`, or the versioned directory of a tablespace: databases and temporary files.
    Databases,
    Database,
    Elsewhere,
}

struct Walk<'a> {
    options: &'a ScanOptions,
    /// Directories of tablespaces by device and inode, so that none is copied twice.
    tablespace_places: HashMap<(u64, u64), (u32, PathBuf)>,
    scan: Scan,
}

impl<'a> Walk<'a> {
    fn new(options: &'a ScanOptions) -> Result<Self> {
        let version_path = options.data_directory.join("PG_VERSION");
        let version = std::fs::read_to_string(&version_path).map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound {
                Error::Shape {
                    path: options.data_directory.clone(),
                    what: "PG_VERSION is missing, so it is no data directory".to_owned(),
                    cure: "Give the directory that SHOW data_directory names.".to_owned(),
                }
            } else {
                io_error(&version_path, source)
            }
        })?;
        if version.trim() != options.major.to_string() {
            return Err(Error::Shape {
                path: options.data_directory.clone(),
                what: format!(
                    "it is of PostgreSQL {}, the server of {}",
                    version.trim(),
                    options.major
                ),
                cure: "Give the directory that SHOW data_directory names.".to_owned(),
            });
        }
        let roots = Roots::of(&options.data_directory)
            .map_err(|source| io_error(&options.data_directory, source))?;
        let scan = Scan { roots, ..Scan::default() };
        Ok(Self { options, tablespace_places: HashMap::new(), scan })
    }

    /// Tablespaces come first: the walk of the data directory must know the directories that are
    /// copied as one.
    fn tablespaces(&mut self) -> Result<()> {
        let parent = self.options.data_directory.join("pg_tblspc");
        let versioned = format!("PG_{}_{}", self.options.major, self.options.catalog_version);
        let mut found = Vec::new();
        for (name, link) in self.list("pg_tblspc/", &parent)? {
            let path = format!("pg_tblspc/{name}");
            let Some(metadata) = vanishing(&link, std::fs::symlink_metadata(&link))? else {
                continue;
            };
            let oid = RelationFile::parse(&name)
                .filter(|file| file.fork == Fork::Main && file.segment == 0);
            let Some(RelationFile { filenode: oid, .. }) = oid else {
                self.scan.warnings.push(ScanWarning::StrangeTablespace(path));
                continue;
            };
            let in_place = metadata.is_dir();
            let location = if in_place {
                PathBuf::from(&path)
            } else if metadata.is_symlink() {
                let Some(location) = vanishing(&link, std::fs::read_link(&link))? else { continue };
                location
            } else {
                self.scan.warnings.push(ScanWarning::StrangeTablespace(path));
                continue;
            };
            let Some(directory) = tablespace_directory(&link, &location)? else { continue };
            self.scan.roots.remember(&link, &directory, true);
            if !in_place {
                let id = (directory.dev(), directory.ino());
                self.tablespace_places.insert(id, (oid, location.clone()));
            }
            found.push((link, directory, ScannedTablespace { oid, location, in_place }));
        }
        // Only now are all places known: a tablespace may lie inside another.
        for (link, directory, tablespace) in found {
            let source = link.join(&versioned);
            let Some(metadata) = versioned_directory(&link, &source)? else { continue };
            let path = format!("pg_tblspc/{}", tablespace.oid);
            self.push(path.clone(), link, EntryKind::Directory, &directory);
            let path = format!("{path}/{versioned}");
            self.push(path.clone(), source.clone(), EntryKind::Directory, &metadata);
            self.directory(&format!("{path}/"), &source, Place::Databases)?;
            self.scan.tablespaces.push(tablespace);
        }
        Ok(())
    }

    /// Walks the content of one directory; `prefix` is its path with a slash behind.
    fn directory(&mut self, prefix: &str, directory: &Path, place: Place) -> Result<()> {
        let listed = self.list(prefix, directory)?;
        let unlogged = if place == Place::Database { unlogged(&listed) } else { HashSet::new() };
        for (name, source) in listed {
            if place.skips(&name) {
                continue;
            }
            let relation = if place.holds_relations() { RelationFile::parse(&name) } else { None };
            if let Some(file) = relation
                && file.fork != Fork::Init
                && unlogged.contains(&file.filenode)
            {
                continue;
            }
            let Some(metadata) = vanishing(&source, std::fs::symlink_metadata(&source))? else {
                continue;
            };
            let path = format!("{prefix}{name}");
            let kind = metadata.file_type();
            if kind.is_symlink() {
                self.link(path, source, place)?;
            } else if kind.is_dir() {
                self.subdirectory(&path, &source, &metadata, place)?;
            } else if kind.is_file() {
                let kind = match relation {
                    _ if path == CONTROL_FILE_PATH => EntryKind::ControlFile,
                    Some(file) => EntryKind::Relation(file),
                    None => EntryKind::Plain,
                };
                self.push(path, source, kind, &metadata);
            } else {
                debug_assert!(is_special(kind), "files, directories and links were handled");
                self.scan.warnings.push(ScanWarning::SpecialFile(path));
            }
        }
        Ok(())
    }

    fn subdirectory(
        &mut self,
        path: &str,
        source: &Path,
        metadata: &Metadata,
        place: Place,
    ) -> Result<()> {
        if let Some((oid, location)) = self.tablespace_places.get(&(metadata.dev(), metadata.ino()))
        {
            self.scan.warnings.push(ScanWarning::TablespaceInside(*oid, location.clone()));
            return Ok(());
        }
        self.push(path.to_owned(), source.to_owned(), EntryKind::Directory, metadata);
        if self.scan.roots.is_elsewhere(metadata) && place == Place::Root {
            self.scan.roots.remember(source, metadata, false);
        }
        let inside = match place {
            Place::Root if EMPTIED.contains(&path) => return self.emptied(path, source),
            // Walked already.
            Place::Root if path == "pg_tblspc" => return Ok(()),
            Place::Root if path == "base" => Place::Databases,
            Place::Root if path == "global" => Place::Global,
            Place::Databases => Place::Database,
            _ => Place::Elsewhere,
        };
        self.directory(&format!("{path}/"), source, inside)
    }

    /// A directory whose content stays behind, but for the directories the server expects in it.
    fn emptied(&mut self, path: &str, source: &Path) -> Result<()> {
        if path != "pg_wal" {
            return Ok(());
        }
        for name in ["archive_status", "summaries"] {
            let source = source.join(name);
            if let Some(metadata) = vanishing(&source, std::fs::metadata(&source))?
                && metadata.is_dir()
            {
                self.push(format!("{path}/{name}"), source, EntryKind::Directory, &metadata);
            }
        }
        Ok(())
    }

    fn link(&mut self, path: String, source: PathBuf, place: Place) -> Result<()> {
        let Some(target) = vanishing(&source, std::fs::read_link(&source))? else { return Ok(()) };
        if place == Place::Root && EMPTIED.contains(&path.as_str()) {
            let Some(metadata) = vanishing(&source, std::fs::metadata(&source))? else {
                return Ok(());
            };
            self.push(path.clone(), source.clone(), EntryKind::Directory, &metadata);
            return self.emptied(&path, &source);
        }
        let first = path.split('/').next().unwrap_or_default();
        if SERVERS_OWN.contains(&first) {
            return Err(Error::Shape {
                what: format!(
                    "{path} is a link to {}, which the server did not make",
                    target.display()
                ),
                path: source,
                cure: "Move the files back, or into a tablespace made with CREATE TABLESPACE."
                    .to_owned(),
            });
        }
        match std::fs::metadata(&source) {
            Ok(metadata) if metadata.is_file() => {
                self.scan.warnings.push(ScanWarning::LinkFollowed(path.clone(), target));
                self.push(path, source, EntryKind::Plain, &metadata);
            }
            _ => self.scan.warnings.push(ScanWarning::LinkLeftOut(path, target)),
        }
        Ok(())
    }

    fn settings_file(&mut self, path: &Path) {
        let resolved = path.canonicalize();
        let data_directory = self.options.data_directory.canonicalize();
        if let (Ok(resolved), Ok(data_directory)) = (&resolved, &data_directory)
            && let Ok(inside) = resolved.strip_prefix(data_directory)
            && !inside.starts_with(EXTERNAL_ROOT)
        {
            return;
        }
        // A way back (`..`) has no place in a backup.
        let plain = path.components().all(|part| part != Component::ParentDir);
        let named = resolved.as_deref().ok().filter(|_| !plain).unwrap_or(path);
        let readable = std::fs::File::open(path).and_then(|file| file.metadata());
        let pushed = match (readable, named.to_str()) {
            (Ok(metadata), Some(name)) if metadata.is_file() => {
                self.external_file(path, name, &metadata)
            }
            (Ok(_), Some(name)) => {
                self.scan.warnings.push(ScanWarning::SpecialFile(name.to_owned()));
                Ok(())
            }
            (Ok(_), None) => {
                self.scan.warnings.push(ScanWarning::NameNotText(path.to_owned()));
                Ok(())
            }
            (Err(error), _) => Err(error),
        };
        if let Err(error) = pushed {
            let warning = ScanWarning::SettingsFileUnreadable(path.to_owned(), error.to_string());
            self.scan.warnings.push(warning);
        }
    }

    /// The file and every directory above it, which nobody else may read in a copy. A directory
    /// that was listed for another file before is listed again; the end of the scan removes it.
    fn external_file(&mut self, source: &Path, name: &str, metadata: &Metadata) -> io::Result<()> {
        let mut place = PathBuf::from("/");
        let mut path = EXTERNAL_ROOT.to_owned();
        let parts = name.split('/').filter(|part| !matches!(*part, "" | "."));
        for part in parts {
            let directory = std::fs::metadata(&place)?;
            self.push(path.clone(), place.clone(), EntryKind::Directory, &directory);
            if let Some(entry) = self.scan.entries.last_mut() {
                entry.mode = 0o700;
            }
            place.push(part);
            path = format!("{path}/{part}");
        }
        self.push(path, source.to_owned(), EntryKind::External, metadata);
        Ok(())
    }

    /// Names and paths of a directory's content; empty when it is gone.
    fn list(&mut self, prefix: &str, directory: &Path) -> Result<Vec<(String, PathBuf)>> {
        let Some(reader) = vanishing(directory, std::fs::read_dir(directory))? else {
            if prefix.is_empty() {
                return Err(io_error(directory, io::Error::from(io::ErrorKind::NotFound)));
            }
            return Ok(Vec::new());
        };
        let mut listed = Vec::new();
        for entry in reader {
            let Some(entry) = vanishing(directory, entry)? else { continue };
            match entry.file_name().into_string() {
                Ok(name) => listed.push((name, entry.path())),
                Err(_) => self.scan.warnings.push(ScanWarning::NameNotText(entry.path())),
            }
        }
        listed.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(listed)
    }

    fn push(&mut self, path: String, source: PathBuf, kind: EntryKind, metadata: &Metadata) {
        self.scan.entries.push(ScanEntry {
            path,
            source,
            kind,
            size: if kind == EntryKind::Directory { 0 } else { metadata.len() },
            mode: metadata.mode() & 0o7777,
            mtime_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            ctime_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
            inode: metadata.ino(),
            device: metadata.dev(),
        });
    }
}

impl Place {
    fn holds_relations(self) -> bool {
        matches!(self, Self::Global | Self::Database)
    }

    /// Whether a name is left out here.
    fn skips(self, name: &str) -> bool {
        match self {
            Self::Root => {
                SKIPPED.contains(&name)
                    || SKIPPED_WITH_SUFFIX.iter().any(|stem| {
                        let rest = name.strip_prefix(stem);
                        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                    })
            }
            Self::Global => name.starts_with("pg_internal.init"),
            Self::Databases => name.starts_with("pgsql_tmp"),
            Self::Database => {
                name.starts_with("pg_internal.init")
                    || name.starts_with("pgsql_tmp")
                    || RelationFile::is_temporary(name)
            }
            Self::Elsewhere => false,
        }
    }
}

/// The unlogged relations of a database's directory: those whose init fork was listed and is still
/// there. While it is, the number cannot have changed hands, so the other forks are an unlogged
/// relation's and will be made anew from the init fork. In every other case they are copied: it is
/// never wrong to copy too much.
fn unlogged(listed: &[(String, PathBuf)]) -> HashSet<u32> {
    let init = listed.iter().filter_map(|(name, path)| {
        let file = RelationFile::parse(name)?;
        let is_init = file.fork == Fork::Init && file.segment == 0;
        (is_init && std::fs::symlink_metadata(path).is_ok()).then_some(file.filenode)
    });
    init.collect()
}

/// What the link of a tablespace leads to; `None` when the tablespace was dropped since it was
/// listed.
fn tablespace_directory(link: &Path, location: &Path) -> Result<Option<Metadata>> {
    match std::fs::metadata(link) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(_) if std::fs::symlink_metadata(link).is_err() => Ok(None),
        // The server would not start on a copy without it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Shape {
            path: link.to_owned(),
            what: format!("the tablespace's directory {} does not exist", location.display()),
            cure: "Mount it again, or drop the tablespace.".to_owned(),
        }),
        Err(error) => Err(io_error(link, error)),
    }
}

/// The directory of this server inside a tablespace; `None` when the tablespace was dropped since it
/// was listed. One that is missing though the tablespace exists means that another file system was
/// mounted there: a backup without its files would look complete.
fn versioned_directory(link: &Path, directory: &Path) -> Result<Option<Metadata>> {
    // DROP TABLESPACE removes the directory a moment before it removes the link.
    for _ in 0..100 {
        if let Some(metadata) = vanishing(directory, std::fs::symlink_metadata(directory))? {
            return Ok(Some(metadata));
        }
        if vanishing(link, std::fs::symlink_metadata(link))?.is_none() {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(Error::Shape {
        path: directory.to_owned(),
        what: format!("the tablespace {} has no such directory", link.display()),
        cure: "Mount the tablespace's file system again, or drop the tablespace.".to_owned(),
    })
}

/// `None` for what is gone by now.
fn vanishing<T>(path: &Path, result: io::Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error(path, error)),
    }
}

fn io_error(path: &Path, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::PermissionDenied => unreadable(path, source),
        _ => Error::io("read", path, source),
    }
}

fn is_special(kind: FileType) -> bool {
    kind.is_fifo() || kind.is_socket() || kind.is_block_device() || kind.is_char_device()
}

fn nanoseconds(seconds: i64, nanoseconds: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}
