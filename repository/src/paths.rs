//! Where paths lead, how two of them lie to each other, and whether one is in the directory of a server. The one place that decides this
//! for whatever must not meet: a repository, its key, what is restored, what a server has. Looks at names, and touches nothing.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use proto::server_files::{CONTROL_FILE_PATH, is_in_tablespace};

/// A path without links, as far as it exists; the rest of it as it is written.
pub fn resolved(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let mut missing = Vec::new();
    let mut at = path.as_path();
    loop {
        match at.canonicalize() {
            Ok(found) => {
                return Ok(missing.iter().rev().fold(found, |found, name| found.join(name)));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let (Some(parent), Some(name)) = (at.parent(), at.file_name()) else { return Ok(path) };
        missing.push(name.to_owned());
        at = parent;
    }
}

/// How one path lies to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lies {
    /// It is the other, or in it.
    Inside,
    /// The other is in it.
    Around,
    /// Neither is in the other.
    Apart,
}

/// How one path lies to another, wherever links lead.
pub fn lies(one: &Path, other: &Path) -> io::Result<Lies> {
    let (one, other) = (resolved(one)?, resolved(other)?);
    Ok(if one.starts_with(&other) {
        Lies::Inside
    } else if other.starts_with(&one) {
        Lies::Around
    } else {
        Lies::Apart
    })
}

/// A directory that a server has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Servers {
    /// Its data directory.
    Data(PathBuf),
    /// What it made for itself in the place of one of its tablespaces.
    Tablespace(PathBuf),
}

impl fmt::Display for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data(path) => write!(f, "the data directory {}", path.display()),
            Self::Tablespace(path) => write!(f, "the tablespace {}", path.display()),
        }
    }
}

/// Whether a directory is the data directory of a server, running or not.
pub fn is_data_directory(directory: &Path) -> bool {
    directory.join(CONTROL_FILE_PATH).exists()
}

/// The directory of a server, of any, in which a path is or would be.
pub fn servers_around(path: &Path) -> io::Result<Option<Servers>> {
    let path = resolved(path)?;
    Ok(path.ancestors().find_map(|above| {
        if is_data_directory(above) {
            return Some(Servers::Data(above.to_owned()));
        }
        let name = above.file_name()?.to_str()?;
        let is_its_own = is_in_tablespace(name) && above.is_dir();
        is_its_own.then(|| Servers::Tablespace(above.to_owned()))
    }))
}

/// The directory of the server with this data directory in which a path is or would be. Where its tablespaces are is told by the links
/// there.
pub fn in_server(path: &Path, data: &Path) -> io::Result<Option<Servers>> {
    if lies(path, data)? == Lies::Inside {
        return Ok(Some(Servers::Data(resolved(data)?)));
    }
    let Ok(links) = std::fs::read_dir(data.join("pg_tblspc")) else { return Ok(None) };
    for link in links {
        // One that leads nowhere has nothing in it.
        let Ok(place) = link?.path().canonicalize() else { continue };
        let path = resolved(path)?;
        let Ok(inside) = path.strip_prefix(&place) else { continue };
        // Others may have directories of their own beside the one that the server made there.
        let name = inside.components().next().and_then(|first| first.as_os_str().to_str());
        if let Some(name) = name.filter(|name| is_in_tablespace(name)) {
            return Ok(Some(Servers::Tablespace(place.join(name))));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_exist_is_resolved_as_far_as_it_does() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("real")).unwrap();
        std::os::unix::fs::symlink(root.join("real"), root.join("alias")).unwrap();
        assert_eq!(resolved(&root.join("alias/not/there")).unwrap(), root.join("real/not/there"));
        let lies = |one: &str, other: &str| lies(&root.join(one), &root.join(other)).unwrap();
        assert_eq!(lies("alias/x", "real"), Lies::Inside);
        assert_eq!(lies("real", "alias"), Lies::Inside, "it is the same");
        assert_eq!(lies("alias", "real/x"), Lies::Around);
        assert_eq!(lies("real-2/x", "real"), Lies::Apart, "no part of a name");
    }

    #[test]
    fn the_directories_of_a_server_are_known_from_inside() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().canonicalize().unwrap();
        let at = |name: &str| root.join(name);
        for directory in ["data/global", "data/pg_tblspc", "space/PG_15_202209061", "other"] {
            std::fs::create_dir_all(at(directory)).unwrap();
        }
        std::fs::write(at("data/global/pg_control"), "").unwrap();
        for (link, to) in [("16384", "space"), ("16385", "nowhere")] {
            std::os::unix::fs::symlink(at(to), at("data/pg_tblspc").join(link)).unwrap();
        }
        std::os::unix::fs::symlink(at("space"), at("alias")).unwrap();
        let (data, space) =
            (Servers::Data(at("data")), Servers::Tablespace(at("space/PG_15_202209061")));
        for (name, servers) in [
            ("data", Some(&data)),
            ("data/a/b", Some(&data)),
            ("space/PG_15_202209061/5", Some(&space)),
            ("alias/PG_15_202209061/repository", Some(&space)),
            ("space", None),
            ("space/repository", None),
            ("other/repository", None),
            ("space-2", None),
        ] {
            assert_eq!(servers_around(&at(name)).unwrap().as_ref(), servers, "{name}");
            let its_own = in_server(&at(name), &at("data")).unwrap();
            assert_eq!(its_own.as_ref(), servers, "{name}");
        }
        // Of any server; but not of this one.
        std::fs::create_dir_all(at("clone/PG_16_202307071")).unwrap();
        let of_another = at("clone/PG_16_202307071/x");
        assert!(servers_around(&of_another).unwrap().is_some());
        assert_eq!(in_server(&of_another, &at("data")).unwrap(), None);
    }
}
