//! What of a data directory belongs into a backup: a walk that lists files, directories and
//! tablespaces, and reads none.
//!
//! The rules are those of the server's own base backup. Everything is excluded by its full path,
//! never by name alone: an administrator's `log` or `backup_label_notes` is no business of ours to
//! drop. Files that vanish during the walk were dropped by the server and are passed over; what
//! cannot be copied as it is becomes a warning or an error, never a silence.

mod entries;

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use self::entries::Entries;
use crate::Error;
use crate::control_file::CONTROL_FILE_PATH;
use crate::files::{self, Kind, Names, SettingsFile, Stat, Tree};
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
    /// Each path once, in their order by components: a directory stands right before what is in it.
    pub entries: Entries,
    /// Where the settings files from outside the data directory are read, by their paths in the backup. Everything else is read
    /// where its path says, below the data directory.
    pub outside: HashMap<String, PathBuf>,
    /// In the order they were found.
    pub warnings: Vec<ScanWarning>,
    /// Sorted by OID.
    pub tablespaces: Vec<ScannedTablespace>,
    /// The directories that were walked: to be verified when everything was copied.
    pub roots: Roots,
}

impl ScanOptions {
    /// The name of this server's directory inside a tablespace.
    pub(crate) fn versioned_directory(&self) -> String {
        format!("PG_{}_{}", self.major, self.catalog_version)
    }
}

/// Walks a data directory, wherever it is. Blocking: a few microseconds a file of this host.
pub(crate) fn walk(tree: &impl Tree, options: &ScanOptions) -> Result<Scan> {
    let mut walk = Walk::new(tree, options)?;
    walk.tablespaces()?;
    for path in &options.settings_files {
        walk.settings_file(path);
    }
    walk.directory("", Place::Root)?;
    if !walk.has_control_file {
        return Err(no_data_directory(options, CONTROL_FILE_PATH));
    }
    let mut scan = walk.scan;
    scan.tablespaces.sort_by_key(|tablespace| tablespace.oid);
    Ok(scan)
}

/// The error for a directory that lacks what every data directory has.
pub(crate) fn no_data_directory(options: &ScanOptions, missing: &str) -> Error {
    Error::Shape {
        path: options.data_directory.clone(),
        what: format!("{missing} is missing, so it is no data directory"),
        cure: "Give the directory that SHOW data_directory names.".to_owned(),
    }
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
pub(crate) enum Place {
    Root,
    Global,
    /// `base`, or the versioned directory of a tablespace: databases and temporary files.
    Databases,
    Database,
    /// `pg_tblspc`: tablespaces by their numbers.
    Tablespaces,
    /// A tablespace: directories of server versions.
    Tablespace,
    Elsewhere,
}

struct Walk<'a, T> {
    tree: &'a T,
    options: &'a ScanOptions,
    /// Directories of tablespaces, so that none is copied twice.
    tablespace_places: HashMap<files::Directory, (u32, PathBuf)>,
    /// What is listed where the walk comes to `pg_tblspc`: paths of links, and the directories that they lead to.
    tablespaces: Vec<(String, Stat, ScannedTablespace)>,
    /// What is listed where the walk would come to [`EXTERNAL_ROOT`].
    outside: Vec<(String, EntryKind, Stat)>,
    has_control_file: bool,
    scan: Scan,
}

impl<'a, T: Tree> Walk<'a, T> {
    fn new(tree: &'a T, options: &'a ScanOptions) -> Result<Self> {
        let root = tree.follow("").map_err(|source| tree.unreadable(Path::new(""), source))?;
        let scan = Scan { roots: Roots::of(tree.source(""), &root), ..Scan::default() };
        Ok(Self {
            tree,
            options,
            tablespace_places: HashMap::new(),
            tablespaces: Vec::new(),
            outside: Vec::new(),
            has_control_file: false,
            scan,
        })
    }

    /// Looks for tablespaces, before anything is listed: a walk must know the directories that are copied as one.
    fn tablespaces(&mut self) -> Result<()> {
        let versioned = self.options.versioned_directory();
        let names = self.list("pg_tblspc")?;
        for name in names.iter() {
            let Some(name) = self.text("pg_tblspc", name) else { continue };
            let path = format!("pg_tblspc/{name}");
            let Some(itself) = self.look(&path)? else { continue };
            let oid = RelationFile::parse(name)
                .filter(|file| file.fork == Fork::Main && file.segment == 0);
            let Some(RelationFile { filenode: oid, .. }) = oid else {
                self.scan.warnings.push(ScanWarning::StrangeTablespace(path));
                continue;
            };
            let in_place = itself.kind == Kind::Directory;
            let location = if in_place {
                PathBuf::from(&path)
            } else if itself.kind == Kind::Link {
                let Some(location) = self.link_of(&path)? else { continue };
                location
            } else {
                self.scan.warnings.push(ScanWarning::StrangeTablespace(path));
                continue;
            };
            let Some(directory) = self.tablespace_directory(&path, &location)? else { continue };
            self.scan.roots.remember_tablespace(self.tree.source(&path), &directory, &versioned);
            if !in_place {
                let id = self.tree.directory(&path, &directory);
                self.tablespace_places.insert(id, (oid, location.clone()));
            }
            let tablespace = ScannedTablespace { oid, location, in_place };
            self.tablespaces.push((path, directory, tablespace));
        }
        Ok(())
    }

    /// Walks the tablespaces that were found.
    fn inside_tablespaces(&mut self) -> Result<()> {
        let versioned = self.options.versioned_directory();
        for (path, directory, tablespace) in std::mem::take(&mut self.tablespaces) {
            let inside = format!("{path}/{versioned}");
            let Some(found) = self.versioned_directory(&path, &inside)? else { continue };
            self.push(&path, EntryKind::Directory, &directory);
            self.push(&inside, EntryKind::Directory, &found);
            self.directory(&inside, Place::Databases)?;
            self.scan.tablespaces.push(tablespace);
        }
        Ok(())
    }

    /// Walks the content of one directory.
    fn directory(&mut self, directory: &str, place: Place) -> Result<()> {
        let mut listed = self.list(directory)?;
        if place == Place::Root && !self.outside.is_empty() {
            listed.push(EXTERNAL_ROOT.as_ref());
            listed.sort();
        }
        let prefix = if directory.is_empty() { String::new() } else { format!("{directory}/") };
        let unlogged =
            if place == Place::Database { self.unlogged(&prefix, &listed) } else { HashSet::new() };
        for name in listed.iter() {
            let Some(name) = self.text(directory, name) else { continue };
            if place == Place::Root && name == EXTERNAL_ROOT {
                self.push_outside();
            }
            if place.skips(name) {
                continue;
            }
            let relation = if place.holds_relations() { RelationFile::parse(name) } else { None };
            if let Some(file) = relation
                && file.fork != Fork::Init
                && unlogged.contains(&file.filenode)
            {
                continue;
            }
            let path = format!("{prefix}{name}");
            let Some(stat) = self.look(&path)? else { continue };
            match stat.kind {
                Kind::Link => self.link(&path, place)?,
                Kind::Directory => self.subdirectory(&path, &stat, place)?,
                Kind::File => {
                    let kind = match relation {
                        _ if path == CONTROL_FILE_PATH => EntryKind::ControlFile,
                        Some(file) => EntryKind::Relation(file),
                        None => EntryKind::Plain,
                    };
                    self.has_control_file |= kind == EntryKind::ControlFile;
                    self.push(&path, kind, &stat);
                }
                Kind::Special => self.scan.warnings.push(ScanWarning::SpecialFile(path)),
            }
        }
        self.tree.forget(directory);
        Ok(())
    }

    fn subdirectory(&mut self, path: &str, stat: &Stat, place: Place) -> Result<()> {
        if let Some((oid, location)) = self.tablespace_places.get(&self.tree.directory(path, stat))
        {
            self.scan.warnings.push(ScanWarning::TablespaceInside(*oid, location.clone()));
            return Ok(());
        }
        self.push(path, EntryKind::Directory, stat);
        if self.scan.roots.is_elsewhere(stat) && place == Place::Root {
            self.scan.roots.remember(self.tree.source(path), stat);
        }
        match place.inside(path) {
            Inside::Walked(Place::Tablespaces) => self.inside_tablespaces(),
            Inside::Walked(inside) => self.directory(path, inside),
            Inside::Emptied(kept) => self.emptied(path, kept),
        }
    }

    /// A directory whose content stays behind, but for the directories the server expects in it.
    fn emptied(&mut self, path: &str, kept: &[&str]) -> Result<()> {
        for name in kept {
            let path = format!("{path}/{name}");
            match self.tree.follow(&path) {
                Ok(stat) if stat.kind == Kind::Directory => {
                    self.push(&path, EntryKind::Directory, &stat);
                }
                Ok(_) => {}
                Err(error) => self.vanished(&path, error)?,
            }
        }
        Ok(())
    }

    fn link(&mut self, path: &str, place: Place) -> Result<()> {
        let Some(target) = self.link_of(path)? else { return Ok(()) };
        if place == Place::Root
            && let Inside::Emptied(kept) = place.inside(path)
        {
            match self.tree.follow(path) {
                Ok(stat) => self.push(path, EntryKind::Directory, &stat),
                Err(error) => return self.vanished(path, error),
            }
            return self.emptied(path, kept);
        }
        let first = path.split('/').next().unwrap_or_default();
        if SERVERS_OWN.contains(&first) {
            return Err(Error::Shape {
                what: format!(
                    "{path} is a link to {}, which the server did not make",
                    target.display()
                ),
                path: self.tree.source(path),
                cure: "Move the files back, or into a tablespace made with CREATE TABLESPACE."
                    .to_owned(),
            });
        }
        match self.tree.follow(path) {
            Ok(stat) if stat.kind == Kind::File => {
                self.scan.warnings.push(ScanWarning::LinkFollowed(path.to_owned(), target));
                self.push(path, EntryKind::Plain, &stat);
            }
            _ => self.scan.warnings.push(ScanWarning::LinkLeftOut(path.to_owned(), target)),
        }
        Ok(())
    }

    fn settings_file(&mut self, path: &Path) {
        let (named, stat) = match self.tree.settings_file(path) {
            Ok(SettingsFile::Inside) => return,
            Ok(SettingsFile::Outside { named, stat }) => (named, stat),
            Err(error) => return self.settings_file_unreadable(path, &error),
        };
        match named.to_str() {
            Some(name) if stat.kind == Kind::File => {
                if let Err(error) = self.external_file(path, name, &stat) {
                    self.settings_file_unreadable(path, &error);
                }
            }
            Some(name) => self.scan.warnings.push(ScanWarning::SpecialFile(name.to_owned())),
            None => self.scan.warnings.push(ScanWarning::NameNotText(path.to_owned())),
        }
    }

    fn settings_file_unreadable(&mut self, path: &Path, error: &io::Error) {
        let warning = ScanWarning::SettingsFileUnreadable(path.to_owned(), error.to_string());
        self.scan.warnings.push(warning);
    }

    /// The file and every directory above it, which nobody else may read in a copy. A directory
    /// of several files is kept several times, and listed once.
    fn external_file(&mut self, source: &Path, name: &str, stat: &Stat) -> io::Result<()> {
        let mut place = PathBuf::from("/");
        let mut path = EXTERNAL_ROOT.to_owned();
        let parts = name.split('/').filter(|part| !matches!(*part, "" | "."));
        for part in parts {
            let directory = Stat { mode: 0o700, ..self.tree.outside(&place)? };
            self.outside.push((path.clone(), EntryKind::Directory, directory));
            place.push(part);
            path = format!("{path}/{part}");
        }
        self.outside.push((path.clone(), EntryKind::External, *stat));
        self.scan.outside.insert(path, source.to_owned());
        Ok(())
    }

    /// Lists what was found outside the data directory.
    fn push_outside(&mut self) {
        let mut outside = std::mem::take(&mut self.outside);
        outside.sort_by(|a, b| a.0.split('/').cmp(b.0.split('/')));
        outside.dedup_by(|a, b| a.0 == b.0);
        for (path, kind, stat) in outside {
            self.push(&path, kind, &stat);
        }
    }

    /// The names in a directory, sorted; empty when it is gone.
    fn list(&self, directory: &str) -> Result<Names> {
        let names =
            self.tree.names(directory).map_err(|source| self.unreadable(directory, source))?;
        match names {
            Some(mut names) => {
                names.sort();
                Ok(names)
            }
            None if directory.is_empty() => {
                Err(self.unreadable(directory, io::Error::from(io::ErrorKind::NotFound)))
            }
            None => Ok(Names::default()),
        }
    }

    /// A name as text; one that is none leaves a warning.
    fn text<'n>(&mut self, directory: &str, name: &'n OsStr) -> Option<&'n str> {
        let text = name.to_str();
        if text.is_none() {
            let path = self.tree.source(directory).join(name);
            self.scan.warnings.push(ScanWarning::NameNotText(path));
        }
        text
    }

    fn push(&mut self, path: &str, kind: EntryKind, stat: &Stat) {
        self.scan.entries.push(path, kind, stat);
    }

    fn look(&self, path: &str) -> Result<Option<Stat>> {
        self.tree.look(path).map_err(|source| self.unreadable(path, source))
    }

    fn link_of(&self, path: &str) -> Result<Option<PathBuf>> {
        self.tree.link(path).map_err(|source| self.unreadable(path, source))
    }

    fn unreadable(&self, path: &str, source: io::Error) -> Error {
        self.tree.unreadable(Path::new(path), source)
    }

    /// What is gone by now is passed over; any other error ends the walk.
    fn vanished(&self, path: &str, error: io::Error) -> Result<()> {
        match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(self.unreadable(path, error)),
        }
    }

    /// The unlogged relations of a database's directory: those whose init fork was listed and is still
    /// there. While it is, the number cannot have changed hands, so the other forks are an unlogged
    /// relation's and will be made anew from the init fork. In every other case they are copied: it is
    /// never wrong to copy too much.
    fn unlogged(&self, prefix: &str, listed: &Names) -> HashSet<u32> {
        let init = listed.iter().filter_map(|name| {
            let name = name.to_str()?;
            let file = RelationFile::parse(name)?;
            let is_init = file.fork == Fork::Init && file.segment == 0;
            let is_there = || matches!(self.tree.look(&format!("{prefix}{name}")), Ok(Some(_)));
            (is_init && is_there()).then_some(file.filenode)
        });
        init.collect()
    }

    /// What the link of a tablespace leads to; `None` when the tablespace was dropped since it was
    /// listed.
    fn tablespace_directory(&self, link: &str, location: &Path) -> Result<Option<Stat>> {
        match self.tree.follow(link) {
            Ok(stat) => Ok(Some(stat)),
            Err(_) if !self.tree.has_link(link).unwrap_or(false) => Ok(None),
            // The server would not start on a copy without it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Shape {
                path: self.tree.source(link),
                what: format!("the tablespace's directory {} does not exist", location.display()),
                cure: "Mount it again, or drop the tablespace.".to_owned(),
            }),
            Err(error) => Err(self.unreadable(link, error)),
        }
    }

    /// The directory of this server inside a tablespace; `None` when the tablespace was dropped since it
    /// was listed. One that is missing though the tablespace exists means that another file system was
    /// mounted there: a backup without its files would look complete.
    fn versioned_directory(&self, link: &str, directory: &str) -> Result<Option<Stat>> {
        // DROP TABLESPACE removes the directory a moment before it removes the link.
        for _ in 0..DROP_LOOKS {
            if let Some(stat) = self.look(directory)? {
                return Ok(Some(stat));
            }
            if !self.tree.has_link(link).map_err(|source| self.unreadable(link, source))? {
                return Ok(None);
            }
            std::thread::sleep(DROP_PAUSE);
        }
        Err(Error::Shape {
            path: self.tree.source(directory),
            what: format!(
                "the tablespace {} has no such directory",
                self.tree.source(link).display()
            ),
            cure: "Mount the tablespace's file system again, or drop the tablespace.".to_owned(),
        })
    }
}

/// How often, and with which pause, a tablespace is looked at that lost its directory and still has its link.
pub(crate) const DROP_LOOKS: u32 = 100;
/// See [`DROP_LOOKS`].
pub(crate) const DROP_PAUSE: Duration = Duration::from_millis(10);

/// What is done with the content of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inside {
    /// It is walked by the rules of this place.
    Walked(Place),
    /// It is left out, but for these directories.
    Emptied(&'static [&'static str]),
}

impl Place {
    /// What is done with the content of the directory at `path`, which lies here.
    pub(crate) fn inside(self, path: &str) -> Inside {
        match (self, path) {
            (Self::Root, "pg_wal") => Inside::Emptied(&["archive_status", "summaries"]),
            (Self::Root, path) if EMPTIED.contains(&path) => Inside::Emptied(&[]),
            (Self::Root, "pg_tblspc") => Inside::Walked(Self::Tablespaces),
            (Self::Root, "global") => Inside::Walked(Self::Global),
            (Self::Tablespaces, _) => Inside::Walked(Self::Tablespace),
            (Self::Root, "base") | (Self::Tablespace, _) => Inside::Walked(Self::Databases),
            (Self::Databases, _) => Inside::Walked(Self::Database),
            _ => Inside::Walked(Self::Elsewhere),
        }
    }

    fn holds_relations(self) -> bool {
        matches!(self, Self::Global | Self::Database)
    }

    /// Whether a name is left out here.
    pub(crate) fn skips(self, name: &str) -> bool {
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
            Self::Tablespaces | Self::Tablespace | Self::Elsewhere => false,
        }
    }
}
