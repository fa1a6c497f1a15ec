//! The directories a restore writes into, looked at beside each other: none may be another one or lie in it, and there must be
//! handles for all of them. Looks at names only, and touches nothing.

use std::io;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::RestoreTarget;
use crate::error::{Error, show};
use crate::{layout, paths};

/// Each directory takes one handle for its lock and one to write through.
const HANDLES_A_DIRECTORY: u64 = 2;
/// Files, connections and whatever else the process has open meanwhile.
const HANDLES_BESIDE: u64 = 512;

/// Refuses a target whose directories meet: one would be in the way of the other, now or at the next attempt. The repository
/// that is restored from is one of them: a restore into a directory around it would remove what it is not about.
pub(super) fn require_apart(
    target: &RestoreTarget,
    repository: Option<&Path>,
) -> Result<(), Error> {
    let mut places = vec![(resolved(&target.directory)?, "the data directory".to_owned())];
    for (path, elsewhere) in &target.mapping {
        places.push((resolved(elsewhere)?, show(path)));
    }
    if let Some(repository) = repository {
        let repository = resolved(repository)?;
        let is_in_its_way = |(n, place): &(usize, &(PathBuf, String))| {
            let place = &place.0;
            let its_own = || layout::OWN.iter().any(|own| place.starts_with(repository.join(own)));
            *place == repository || its_own() || *n == 0 && repository.starts_with(place)
        };
        // Beside what it has, in its directory, or above it beside what a tablespace has, nothing is in anybody's way.
        if let Some((_, (place, name))) = places.iter().enumerate().find(is_in_its_way) {
            return Err(Error::TargetsMeet {
                one: format!("{name} in {}", place.display()),
                other: format!("the repository that is restored from in {}", repository.display()),
            });
        }
    }
    match proto::job::meeting(&mut places) {
        None => Ok(()),
        Some([(outer, one), (inner, other)]) => Err(Error::TargetsMeet {
            one: format!("{one} in {}", outer.display()),
            other: format!("{other} in {}", inner.display()),
        }),
    }
}

fn resolved(path: &Path) -> Result<PathBuf, Error> {
    paths::resolved(path)
        .map_err(|source| Error::Target { path: path.display().to_string(), source })
}

/// Lets this process open as many files as a restore into so many directories needs: the usual limit, 1,024, is meant for
/// programs that know no better, and the system allows more to who asks.
pub(super) fn make_room_for_handles(target: &RestoreTarget) -> Result<(), Error> {
    let directories = target.mapping.len() as u64 + 1;
    let needed = directories * HANDLES_A_DIRECTORY + HANDLES_BESIDE;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= needed) {
        return Ok(());
    }
    let failed = |source| Error::Target { path: target.directory.display().to_string(), source };
    if let Some(maximum) = maximum
        && maximum < needed
    {
        return Err(failed(io::Error::other(format!(
            "a restore into {directories} directories needs {needed} open files, and this process may have {maximum} (ulimit -Hn)"
        ))));
    }
    setrlimit(Resource::Nofile, Rlimit { current: Some(needed), maximum })
        .map_err(|error| failed(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meet(directory: &Path, spaces: &[&Path]) -> bool {
        meet_beside(None, directory, spaces)
    }

    fn meet_beside(repository: Option<&Path>, directory: &Path, spaces: &[&Path]) -> bool {
        let mapping = spaces.iter().enumerate().map(|(number, place)| {
            (format!("pg_tblspc/{number}").into_bytes(), place.to_path_buf())
        });
        let target = RestoreTarget {
            directory: directory.to_owned(),
            mapping: mapping.collect(),
            ..RestoreTarget::default()
        };
        match require_apart(&target, repository) {
            Ok(()) => false,
            Err(Error::TargetsMeet { .. }) => true,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn nothing_is_restored_into_or_around_the_repository_that_it_comes_from() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        std::fs::create_dir_all(at("big/repository/lineages")).unwrap();
        std::os::unix::fs::symlink(at("big"), at("alias")).unwrap();
        let meet = |directory: &str, space: &str| {
            meet_beside(Some(&at("big/repository")), &at(directory), &[&at(space)])
        };
        assert!(!meet("big/data", "big/space"));
        // A worker may keep its sandbox there.
        assert!(!meet("big/repository/sandbox/x", "big/repository/space"));
        // What a tablespace has lies in a directory of its own, beside whatever else is there.
        assert!(!meet("data", "big"));
        for itself_or_around in ["big", "alias"] {
            assert!(meet(itself_or_around, "space"), "{itself_or_around}");
        }
        for its_own in ["big/repository", "alias/repository/lineages/x", "big/repository/keys"] {
            assert!(meet(its_own, "space"), "{its_own}");
            assert!(meet("data", its_own), "{its_own}");
        }
    }

    #[test]
    fn directories_that_meet_are_noticed_under_any_name() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        std::fs::create_dir(at("real")).unwrap();
        std::os::unix::fs::symlink(at("real"), at("alias")).unwrap();
        assert!(!meet(&at("data"), &[&at("one"), &at("two")]));
        assert!(
            !meet(&at("data"), &[&at("data-1"), &at("data.x"), &at("dat")]),
            "no part of a name"
        );
        assert!(meet(&at("data"), &[&at("one"), &at("one")]));
        assert!(meet(&at("data"), &[&at("data/inside")]));
        assert!(meet(&at("data/inside"), &[&at("data")]));
        assert!(meet(&at("data"), &[&at("one/a/b"), &at("two"), &at("one")]));
        assert!(meet(&at("data"), &[&at("one/x"), &at("one-x"), &at("one")]));
        assert!(meet(&at("data"), &[&at("real/x"), &at("alias/x")]));
        assert!(meet(&at("real/data"), &[&at("alias/data/not/there")]));
    }
}
