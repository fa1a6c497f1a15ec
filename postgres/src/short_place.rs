//! A private directory with a short path, for what a server and this program put beside a data directory while they work on it: the
//! path of a socket has some 100 bytes. Whoever dies leaves his, and the next one removes it.

use std::fs::{self, DirEntry, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

const ROOT: &str = "/tmp";
/// One that has an owner.
const OWNED: &str = "pgmuster-run-";
/// One that has none yet.
const NEW: &str = "pgmuster-new-";
/// Whoever made one and did not give it an owner within this time has died over it.
const GIVEN_UP_AFTER: Duration = Duration::from_hours(1);
/// Locked for as long as the owner lives.
const OWNER: &str = "owner";

/// The directory, which goes with this value.
#[derive(Debug)]
pub struct ShortPlace {
    path: PathBuf,
    owner: File,
}

impl ShortPlace {
    /// Makes one, and removes those of this user whose owners died. Blocking.
    pub fn make() -> io::Result<Self> {
        Self::sweep();
        let private = fs::Permissions::from_mode(0o700);
        let made = tempfile::Builder::new().prefix(NEW).permissions(private).tempdir_in(ROOT)?;
        let owner = File::create_new(made.path().join(OWNER))?;
        flock(&owner, FlockOperation::NonBlockingLockExclusive)?;
        let name = made.path().file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name = name.trim_start_matches(NEW);
        let path = Path::new(ROOT).join(format!("{OWNED}{name}"));
        fs::rename(made.path(), &path)?;
        let _ = made.keep();
        Ok(Self { path, owner })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes those of this user whose owners died. Blocking; may be done by several at once.
    pub fn sweep() {
        for entry in fs::read_dir(ROOT).into_iter().flatten().flatten() {
            let path = entry.path();
            let Some(prefix) = prefix_of(&entry) else { continue };
            match File::open(path.join(OWNER)) {
                Ok(owner) if flock(&owner, FlockOperation::NonBlockingLockExclusive).is_ok() => {
                    let _ = fs::remove_dir_all(&path);
                }
                Err(error) if prefix == NEW && error.kind() == io::ErrorKind::NotFound => {
                    let _ = fs::remove_dir_all(&path);
                }
                _ => {}
            }
        }
    }
}

/// With what the name of a directory of this user begins, if it may have been left.
fn prefix_of(entry: &DirEntry) -> Option<&'static str> {
    let name = entry.file_name();
    let prefix = [OWNED, NEW].into_iter().find(|it| name.to_string_lossy().starts_with(it))?;
    let found = entry.metadata().ok()?;
    let is_ours = found.is_dir() && found.uid() == rustix::process::geteuid().as_raw();
    let is_old =
        || found.modified().is_ok_and(|at| at.elapsed().is_ok_and(|age| age > GIVEN_UP_AFTER));
    (is_ours && (prefix == OWNED || is_old())).then_some(prefix)
}

impl Drop for ShortPlace {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
        let _ = flock(&self.owner, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_owner_left_goes_and_a_living_ones_stays() {
        let living = ShortPlace::make().unwrap();
        assert_eq!(fs::metadata(living.path()).unwrap().permissions().mode() & 0o777, 0o700);
        let dead = std::mem::ManuallyDrop::new(ShortPlace::make().unwrap());
        let (left, owner) = (&dead.path, &dead.owner);
        fs::write(left.join("wal.sock"), "").unwrap();
        ShortPlace::sweep();
        assert!(left.exists() && living.path().exists());
        // As the end of its process does.
        flock(owner, FlockOperation::Unlock).unwrap();
        ShortPlace::sweep();
        assert!(!left.exists() && living.path().exists());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists());
    }

    #[test]
    fn one_that_never_got_an_owner_goes_after_an_hour() {
        let made = || tempfile::Builder::new().prefix(NEW).tempdir_in(ROOT).unwrap();
        let (young, old, living) = (made(), made(), made());
        let owner = File::create_new(living.path().join(OWNER)).unwrap();
        flock(&owner, FlockOperation::NonBlockingLockExclusive).unwrap();
        let now = fs::metadata(young.path()).unwrap().modified().unwrap();
        for made in [&old, &living] {
            let then = now - GIVEN_UP_AFTER - Duration::from_mins(1);
            File::open(made.path()).unwrap().set_modified(then).unwrap();
        }
        ShortPlace::sweep();
        assert!(!old.path().exists());
        assert!(young.path().exists() && living.path().exists());
        // Its maker died between the lock and the name.
        flock(&owner, FlockOperation::Unlock).unwrap();
        ShortPlace::sweep();
        assert!(!living.path().exists() && young.path().exists());
    }
}
