//! The listing of a server's data directory that a remote scan walks: fetched one level of directories at a time, by the
//! rules of the scan, so that nothing is listed that stays behind.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::remote::RemoteFiles;
use super::{Directory, Kind, ServerFiles as _, SettingsFile, Stat, Tree};
use crate::Error;
use crate::process::Result;
use crate::relation::{Fork, RelationFile};
use crate::scan::{EXTERNAL_ROOT, Inside, Place, ScanOptions};

/// Directories in one question.
const DIRECTORIES_MAX: usize = 256;
/// Levels of directories. The server's own are five; links that lead back would go on for ever.
const DEPTH_MAX: usize = 32;
/// Names in all: more than any server has files, and a bound for links that lead back in several ways.
const NAMES_MAX: usize = 1 << 25;

/// The content of a data directory, as the server listed it.
pub(super) struct Listing {
    files: RemoteFiles,
    names: HashMap<String, Vec<OsString>>,
    /// What each name leads to.
    stats: HashMap<String, Stat>,
    /// Where the links of tablespaces lead.
    links: HashMap<String, PathBuf>,
}

impl Listing {
    pub(super) fn of(files: RemoteFiles, options: &ScanOptions) -> Result<Self> {
        let mut listing =
            Self { files, names: HashMap::new(), stats: HashMap::new(), links: HashMap::new() };
        let versioned = options.versioned_directory();
        let mut level = vec![(String::new(), Place::Root)];
        let mut depth = 0;
        while !level.is_empty() {
            depth += 1;
            if depth > DEPTH_MAX || listing.stats.len() > NAMES_MAX {
                return Err(Error::Shape {
                    path: listing.files.place(Path::new(&level[0].0)),
                    what: format!(
                        "the data directory goes on for {depth} levels and {} names",
                        listing.stats.len()
                    ),
                    cure: "Look for a link below it that leads back.".to_owned(),
                });
            }
            let mut below = Vec::new();
            for some in level.chunks(DIRECTORIES_MAX) {
                listing.add(some, &versioned, &mut below)?;
            }
            level = below;
        }
        Ok(listing)
    }

    /// Lists some directories of a level, and gathers what is to be listed next.
    fn add(
        &mut self,
        level: &[(String, Place)],
        versioned: &str,
        below: &mut Vec<(String, Place)>,
    ) -> Result<()> {
        let directories: Vec<&str> = level.iter().map(|(path, _)| path.as_str()).collect();
        let failed = |source| self.files.unreadable(Path::new(directories[0]), source);
        let found = self.files.list(&directories).map_err(failed)?;
        for (path, _) in level {
            self.names.insert(path.clone(), Vec::new());
        }
        for (number, name, stat) in found {
            let Some((directory, place)) = level.get(number) else { continue };
            let Some(text) = name.to_str().map(str::to_owned) else {
                self.names.entry(directory.clone()).or_default().push(name);
                continue;
            };
            if place.skips(&text) || (*place == Place::Tablespace && text != versioned) {
                continue;
            }
            let path =
                if directory.is_empty() { text.clone() } else { format!("{directory}/{text}") };
            if *place == Place::Tablespaces && !self.add_tablespace(&path, &text)? {
                continue;
            }
            // A tablespace that leads nowhere is there all the same, and refused by the walk.
            if stat.is_none() && *place != Place::Tablespaces {
                continue;
            }
            self.names.entry(directory.clone()).or_default().push(name);
            let Some(mut stat) = stat else { continue };
            // The server takes a socket for an empty file.
            if stat.size == 0 && stat.kind == Kind::File && text.starts_with(".s.PGSQL.") {
                stat.kind = Kind::Special;
            }
            if stat.kind == Kind::Directory
                && let Inside::Walked(inside) = place.inside(&path)
                && (*place != Place::Tablespaces || self.links.contains_key(&path))
            {
                below.push((path.clone(), inside));
            }
            self.stats.insert(path, stat);
        }
        Ok(())
    }

    /// Asks where a tablespace is. `false` when it was dropped since it was listed.
    fn add_tablespace(&mut self, path: &str, name: &str) -> Result<bool> {
        let is_number = RelationFile::parse(name)
            .is_some_and(|file| file.fork == Fork::Main && file.segment == 0);
        if !is_number {
            return Ok(true);
        }
        let location = self.files.location(name);
        let location = location.map_err(|source| self.files.unreadable(Path::new(path), source))?;
        Ok(match location {
            Some(location) => self.links.insert(path.to_owned(), location).is_none(),
            None => false,
        })
    }
}

impl Tree for Listing {
    fn source(&self, path: &str) -> PathBuf {
        path.into()
    }

    fn names(&self, path: &str) -> io::Result<Option<Vec<OsString>>> {
        Ok(self.names.get(path).cloned())
    }

    fn look(&self, path: &str) -> io::Result<Option<Stat>> {
        if self.links.get(path).is_some_and(|location| location.is_absolute()) {
            return Ok(Some(Stat { kind: Kind::Link, ..self.files.directory() }));
        }
        match self.stats.get(path) {
            Some(stat) => Ok(Some(*stat)),
            None => self.files.stat(path),
        }
    }

    fn follow(&self, path: &str) -> io::Result<Stat> {
        if path.is_empty() {
            return Ok(self.files.directory());
        }
        let found = match self.stats.get(path) {
            Some(stat) => Some(*stat),
            None => self.files.stat(path)?,
        };
        found.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn link(&self, path: &str) -> io::Result<Option<PathBuf>> {
        Ok(self.links.get(path).cloned())
    }

    fn has_link(&self, path: &str) -> io::Result<bool> {
        self.files.has_tablespace(path.rsplit('/').next().unwrap_or(path))
    }

    /// Told apart by their paths: a tablespace by where its link leads.
    fn directory(&self, path: &str, _: &Stat) -> Directory {
        let data_directory = self.files.data_directory().unwrap_or(Path::new(""));
        let here = || data_directory.join(path);
        Directory::Path(self.links.get(path).cloned().unwrap_or_else(here))
    }

    fn settings_file(&self, path: &Path) -> io::Result<SettingsFile> {
        let named = without_ways_back(path);
        let data_directory = self.files.data_directory();
        let inside = data_directory.and_then(|directory| named.strip_prefix(directory).ok());
        if inside.is_some_and(|inside| !inside.starts_with(EXTERNAL_ROOT)) {
            return Ok(SettingsFile::Inside);
        }
        let Some(text) = named.to_str() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "its name is no UTF-8 text"));
        };
        let stat = self.files.stat(text)?.ok_or(io::ErrorKind::NotFound)?;
        Ok(SettingsFile::Outside { named, stat })
    }

    fn outside(&self, _: &Path) -> io::Result<Stat> {
        Ok(self.files.directory())
    }

    fn unreadable(&self, path: &Path, source: io::Error) -> Error {
        self.files.unreadable(path, source)
    }
}

/// A path as the server reads it: it takes `..` for the directory above, whatever links there are.
fn without_ways_back(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        if part == Component::ParentDir {
            plain.pop();
        } else {
            plain.push(part);
        }
    }
    plain
}
