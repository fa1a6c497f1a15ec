//! The listing of a server's data directory that a remote scan walks: fetched one level of directories at a time, by the
//! rules of the scan, so that nothing is listed that stays behind.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::remote::RemoteFiles;
use super::{Directory, Kind, Names, ServerFiles as _, SettingsFile, Stat, Tree};
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
    /// What is in each directory, by name once it is complete.
    directories: RefCell<HashMap<String, Vec<Listed>>>,
    /// How many names there are.
    names: usize,
    /// Where the links of tablespaces lead.
    links: HashMap<String, PathBuf>,
}

/// A name in a directory.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) name: Box<OsStr>,
    /// What it leads to; nothing where that is nowhere.
    pub(super) leads_to: Option<Seen>,
}

/// All that a server tells.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) kind: Kind,
    pub(super) size: u64,
    pub(super) modified_s: i64,
    pub(super) changed_s: i64,
}

impl Listing {
    pub(super) fn of(files: RemoteFiles, options: &ScanOptions) -> Result<Self> {
        let mut listing =
            Self { files, directories: RefCell::default(), names: 0, links: HashMap::new() };
        let versioned = options.versioned_directory();
        let mut level = vec![(String::new(), Place::Root)];
        let mut depth = 0;
        while !level.is_empty() {
            depth += 1;
            if depth > DEPTH_MAX || listing.names > NAMES_MAX {
                return Err(Error::Shape {
                    path: listing.files.place(Path::new(&level[0].0)),
                    what: format!(
                        "the data directory goes on for {depth} levels and {} names",
                        listing.names
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
        for ((directory, place), found) in level.iter().zip(found) {
            let mut kept = Vec::with_capacity(found.len());
            for mut listed in found {
                if self.keeps(directory, *place, versioned, &mut listed, below)? {
                    kept.push(listed);
                }
            }
            kept.sort_unstable_by(|a, b| a.name.cmp(&b.name));
            kept.shrink_to_fit();
            self.names += kept.len();
            self.directories.get_mut().insert(directory.clone(), kept);
        }
        Ok(())
    }

    /// Whether a name in a directory is of use to the walk.
    fn keeps(
        &mut self,
        directory: &str,
        place: Place,
        versioned: &str,
        listed: &mut Listed,
        below: &mut Vec<(String, Place)>,
    ) -> Result<bool> {
        let Some(text) = listed.name.to_str() else {
            // There is a word about it, and nothing else.
            listed.leads_to = None;
            return Ok(true);
        };
        if place.skips(text) || (place == Place::Tablespace && text != versioned) {
            return Ok(false);
        }
        let path =
            if directory.is_empty() { text.to_owned() } else { format!("{directory}/{text}") };
        if place == Place::Tablespaces && !self.add_tablespace(&path, text)? {
            return Ok(false);
        }
        // A tablespace that leads nowhere is there all the same, and refused by the walk.
        let Some(seen) = &mut listed.leads_to else { return Ok(place == Place::Tablespaces) };
        // The server takes a socket for an empty file.
        if seen.size == 0 && seen.kind == Kind::File && text.starts_with(".s.PGSQL.") {
            seen.kind = Kind::Special;
        }
        if seen.kind == Kind::Directory
            && let Inside::Walked(inside) = place.inside(&path)
            && (place != Place::Tablespaces || self.links.contains_key(&path))
        {
            below.push((path, inside));
        }
        Ok(true)
    }

    /// What a name leads to, where that was listed.
    fn listed(&self, path: &str) -> Option<Stat> {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let directories = self.directories.borrow();
        let names = directories.get(directory)?;
        let found = names.binary_search_by(|listed| (*listed.name).cmp(name.as_ref())).ok()?;
        names[found].leads_to.map(|seen| self.files.stat_of(seen))
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

    fn names(&self, path: &str) -> io::Result<Option<Names>> {
        let directories = self.directories.borrow();
        Ok(directories.get(path).map(|listed| {
            let mut names = Names::default();
            for listed in listed {
                names.push(&listed.name);
            }
            names
        }))
    }

    fn forget(&self, path: &str) {
        self.directories.borrow_mut().remove(path);
    }

    fn look(&self, path: &str) -> io::Result<Option<Stat>> {
        if self.links.get(path).is_some_and(|location| location.is_absolute()) {
            return Ok(Some(Stat { kind: Kind::Link, ..self.files.directory() }));
        }
        match self.listed(path) {
            Some(stat) => Ok(Some(stat)),
            None => self.files.stat(path),
        }
    }

    fn follow(&self, path: &str) -> io::Result<Stat> {
        if path.is_empty() {
            return Ok(self.files.directory());
        }
        let found = match self.listed(path) {
            Some(stat) => Some(stat),
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
