//! Files of a server on this host, or on a volume that is mounted here.

use std::ffi::{OsStr, OsString};
use std::fs::{File, FileType, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use super::once::OnceFile;
use super::{Directory, Kind, Names, ServerFile, ServerFiles, SettingsFile, Stat, Tree};
use crate::Error;
use crate::process::Result;
use crate::roots::Roots;
use crate::scan::{EXTERNAL_ROOT, Scan, ScanOptions, no_data_directory, unreadable, walk};

/// More than `PG_VERSION` ever holds.
const VERSION_LIMIT_BYTES: u64 = 64;

/// A data directory that this process reads itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalFiles {
    directory: PathBuf,
}

impl LocalFiles {
    /// The files of the server whose data directory this is.
    pub fn new(data_directory: impl Into<PathBuf>) -> Self {
        Self { directory: data_directory.into() }
    }

    fn listed(&self, directory: &Path) -> io::Result<Option<Names>> {
        let Some(entries) = present(std::fs::read_dir(self.place(directory)))? else {
            return Ok(None);
        };
        let mut names = Names::default();
        for entry in entries {
            if let Some(entry) = present(entry)? {
                names.push(&entry.file_name());
            }
        }
        Ok(Some(names))
    }
}

impl ServerFiles for LocalFiles {
    fn here(&self) -> Option<&Path> {
        Some(&self.directory)
    }

    fn place(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() { self.directory.clone() } else { self.directory.join(path) }
    }

    fn open(&self, path: &Path, _: u64) -> io::Result<Option<Box<dyn ServerFile>>> {
        let Some(file) = present(File::open(self.place(path)))? else { return Ok(None) };
        Ok(Some(Box::new(OnceFile::new(file))))
    }

    fn read(&self, path: &Path, limit_bytes: u64) -> io::Result<Option<Vec<u8>>> {
        let Some(file) = present(File::open(self.place(path)))? else { return Ok(None) };
        OnceFile::new(file).read_whole(limit_bytes).map(Some)
    }

    fn names(&self, directory: &Path) -> io::Result<Option<Vec<OsString>>> {
        let names = self.listed(directory)?;
        Ok(names.map(|names| names.iter().map(OsStr::to_owned).collect()))
    }

    fn scan(&self, options: &ScanOptions) -> Result<Scan> {
        let version = Path::new("PG_VERSION");
        let content = self.read(version, VERSION_LIMIT_BYTES);
        let Some(content) = content.map_err(|source| told(&self.place(version), source))? else {
            return Err(no_data_directory(options, "PG_VERSION"));
        };
        let found = String::from_utf8_lossy(&content);
        if found.trim() != options.major.to_string() {
            return Err(Error::Shape {
                path: options.data_directory.clone(),
                what: format!(
                    "it is of PostgreSQL {}, the server of {}",
                    found.trim(),
                    options.major
                ),
                cure: "Give the directory that SHOW data_directory names.".to_owned(),
            });
        }
        walk(self, options)
    }

    fn verify(&self, roots: &Roots) -> Result<()> {
        roots.verify()
    }

    fn unreadable(&self, path: &Path, source: io::Error) -> Error {
        told(&self.place(path), source)
    }
}

impl Tree for LocalFiles {
    fn source(&self, path: &str) -> PathBuf {
        self.place(Path::new(path))
    }

    fn names(&self, path: &str) -> io::Result<Option<Names>> {
        self.listed(Path::new(path))
    }

    fn look(&self, path: &str) -> io::Result<Option<Stat>> {
        let found = present(std::fs::symlink_metadata(self.source(path)))?;
        Ok(found.as_ref().map(stat))
    }

    fn follow(&self, path: &str) -> io::Result<Stat> {
        Ok(stat(&std::fs::metadata(self.source(path))?))
    }

    fn link(&self, path: &str) -> io::Result<Option<PathBuf>> {
        present(std::fs::read_link(self.source(path)))
    }

    fn has_link(&self, path: &str) -> io::Result<bool> {
        Ok(self.look(path)?.is_some())
    }

    fn directory(&self, _: &str, stat: &Stat) -> Directory {
        Directory::Inode(stat.device, stat.inode)
    }

    fn settings_file(&self, path: &Path) -> io::Result<SettingsFile> {
        let resolved = path.canonicalize();
        let data_directory = self.directory.canonicalize();
        if let (Ok(resolved), Ok(data_directory)) = (&resolved, &data_directory)
            && let Ok(inside) = resolved.strip_prefix(data_directory)
            && !inside.starts_with(EXTERNAL_ROOT)
        {
            return Ok(SettingsFile::Inside);
        }
        // A way back (`..`) has no place in a backup.
        let plain = path.components().all(|part| part != Component::ParentDir);
        let named = resolved.as_deref().ok().filter(|_| !plain).unwrap_or(path).to_owned();
        let metadata = File::open(path)?.metadata()?;
        Ok(SettingsFile::Outside { named, stat: stat(&metadata) })
    }

    fn outside(&self, path: &Path) -> io::Result<Stat> {
        Ok(stat(&std::fs::metadata(path)?))
    }

    fn unreadable(&self, path: &Path, source: io::Error) -> Error {
        ServerFiles::unreadable(self, path, source)
    }
}

/// A file that may not be read comes with its cure.
pub(crate) fn told(path: &Path, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::PermissionDenied => unreadable(path, source),
        _ => Error::io("read", path, source),
    }
}

/// `None` for what is gone by now.
fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) fn stat(metadata: &Metadata) -> Stat {
    Stat {
        kind: kind(metadata.file_type()),
        size: metadata.len(),
        mode: metadata.mode() & 0o7777,
        mtime_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
        ctime_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        inode: metadata.ino(),
        device: metadata.dev(),
    }
}

fn kind(of: FileType) -> Kind {
    if of.is_symlink() {
        Kind::Link
    } else if of.is_dir() {
        Kind::Directory
    } else if of.is_file() {
        Kind::File
    } else {
        Kind::Special
    }
}

pub(super) fn nanoseconds(seconds: i64, nanoseconds: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}
