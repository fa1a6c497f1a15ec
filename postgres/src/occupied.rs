//! Whether somebody uses the files of a data directory, and keeping everybody out of them: what a restore has to know
//! before it changes files that a server may have open.
//!
//! A server and we see each other only where processes are seen: on one host, and in its containers from outside. Nothing
//! here asks a server of another host that has the same directory mounted.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::process::{Pid, getpid, test_kill_process};

/// The file by which servers keep each other out of a data directory.
pub const LOCK_FILE: &str = "postmaster.pid";
/// Attempts to take the lock when stale ones are in the way: each was of a process that died since.
const TRIES: u32 = 3;

/// Why a data directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// Somebody works there. The text completes "it cannot be changed: …".
    #[error("{0}")]
    InUse(String),
    /// It could not be found out, or the lock not be taken.
    #[error("{path}: {source}", path = path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Fails with the reason when a server, or another restore, uses a data directory.
pub fn check_unused(data_directory: &Path) -> Result<(), Unavailable> {
    // A server whose lock file was deleted is still there: all of its processes work in its directory.
    if let Some(pid) = servers().find(|(_, place)| is_same(place, data_directory)).map(|it| it.0) {
        return in_use(format!("process {pid} is a server that runs there"));
    }
    let path = data_directory.join(LOCK_FILE);
    let text = match fs::read(&path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Unavailable::Unknown { path, source }),
    };
    let mut lines = text.lines();
    let Some(number) = lines.next().and_then(|line| line.trim().parse::<i32>().ok()) else {
        return in_use(format!("its {LOCK_FILE} cannot be understood"));
    };
    let alone = number < 0;
    let Some(pid) = Pid::from_raw(number.saturating_abs()) else {
        return in_use(format!("its {LOCK_FILE} cannot be understood"));
    };
    let ours = pid == getpid();
    // No right to signal it is no proof that it is no server. Of ours, only a restore before this one is known to be over.
    let is_over = matches!(test_kill_process(pid), Err(Errno::SRCH)) || (ours && alone);
    if !is_over {
        let who = if alone { "a restore, or a server for one user," } else { "a server" };
        return in_use(format!(
            "{LOCK_FILE} names process {pid}, which is alive: {who} may work there"
        ));
    }
    if alone {
        return Ok(());
    }
    // The line of the shared memory, which outlives a postmaster whose children go on. Memory that is there and unused shows
    // that the number was given by this system; without it, a server in another container may have it.
    let memory = text.lines().nth(6).and_then(|line| line.split_whitespace().nth(1));
    match memory.and_then(users_of) {
        Some(0) => Ok(()),
        Some(_) => in_use("processes of a server that was killed still run there".to_owned()),
        None => in_use(format!(
            "{LOCK_FILE} names process {pid}, which is not of this host and boot, or of another container: once it is \
             certain that no server runs there, delete that file"
        )),
    }
}

/// Fails with the reason when a running server has a tablespace in a directory.
pub fn check_unused_tablespace(place: &Path) -> Result<(), Unavailable> {
    for (pid, data_directory) in servers() {
        let links = fs::read_dir(data_directory.join("pg_tblspc")).into_iter().flatten().flatten();
        if links.map(|link| link.path()).any(|link| is_same(&link, place)) {
            return in_use(format!(
                "it is a tablespace of the server that runs in {} (process {pid})",
                fs::read_link(&data_directory).unwrap_or(data_directory).display()
            ));
        }
    }
    Ok(())
}

fn in_use(what: String) -> Result<(), Unavailable> {
    Err(Unavailable::InUse(what))
}

/// The processes of servers that can be seen, each with a path to the directory it works in.
fn servers() -> impl Iterator<Item = (u32, PathBuf)> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        name.starts_with("post").then(|| (pid, entry.path().join("cwd")))
    })
}

fn is_same(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// How many processes have the segment of shared memory with this id; `None` when there is no such segment.
fn users_of(id: &str) -> Option<u64> {
    let table = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let mut lines = table.lines();
    let names: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
    let place = |name| names.iter().position(|it| *it == name);
    let (shmid, nattch) = (place("shmid")?, place("nattch")?);
    lines.map(|line| line.split_whitespace().collect::<Vec<_>>()).find_map(|row| {
        let is_it = row.get(shmid) == Some(&id);
        is_it.then(|| row.get(nattch)?.parse().ok()).flatten()
    })
}

/// Keeps servers from starting in a data directory, in the way in which they keep out each other, for as long as it lives.
/// When this process is killed, the file that is left names a dead process, and servers know what that means.
#[derive(Debug)]
pub struct DirectoryLock {
    path: PathBuf,
    text: String,
}

impl DirectoryLock {
    /// Takes the lock, or says who works there.
    pub fn take(data_directory: &Path) -> Result<Self, Unavailable> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let path = data_directory.join(LOCK_FILE);
        // As a server for one user writes it: negative, so that nobody asks this process for a shutdown. The third line
        // tells our locks apart.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let text = format!("-{}\n{}\n{number}\n0\n\n", getpid(), data_directory.display());
        let failed = |source| Unavailable::Unknown { path: path.clone(), source };
        for _ in 0..TRIES {
            let before = fs::read(&path).ok();
            check_unused(data_directory)?;
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(mut file) => {
                    let lock = Self { path: path.clone(), text };
                    file.write_all(lock.text.as_bytes()).map_err(failed)?;
                    return Ok(lock);
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    // Only the one that was looked at: another is of somebody who was quicker.
                    if before.is_some() && fs::read(&path).ok() == before {
                        fs::remove_file(&path).map_err(failed)?;
                    }
                }
                Err(source) => return Err(failed(source)),
            }
        }
        Err(Unavailable::InUse(format!("others keep taking its {LOCK_FILE}")))
    }
}

impl Drop for DirectoryLock {
    fn drop(&mut self) {
        if fs::read_to_string(&self.path).is_ok_and(|text| text == self.text) {
            // What is left names a process that will be gone.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(place: &Path) -> String {
        check_unused(place).unwrap_err().to_string()
    }

    /// A process that has ended and been waited for.
    fn dead() -> u32 {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    #[test]
    fn a_living_process_in_the_lock_file_is_believed_and_a_dead_one_is_not() {
        let place = tempfile::tempdir().unwrap();
        check_unused(place.path()).unwrap();
        let write = |text: &str| fs::write(place.path().join(LOCK_FILE), text).unwrap();
        write("1\n/somewhere\n");
        assert!(reason(place.path()).contains("process 1, which is alive"));
        // A server in another container may well have our number.
        write(&format!("{}\n/somewhere\n", getpid()));
        assert!(reason(place.path()).contains("which is alive"));
        // A restore that is over. A server that cannot be seen may be one of another container.
        write(&format!("-{}\n/somewhere\n", dead()));
        check_unused(place.path()).unwrap();
        for memory in ["", "1\n5432\n/tmp\n\n 1 2147483647\n"] {
            write(&format!("{}\n/somewhere\n{memory}", dead()));
            assert!(reason(place.path()).contains("another container"));
        }
        for text in ["", "\n", "x\n", "0\n"] {
            write(text);
            assert!(reason(place.path()).contains("cannot be understood"), "{text:?}");
        }
    }

    #[test]
    fn a_lock_keeps_out_goes_away_and_takes_the_place_of_a_dead_one() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(LOCK_FILE);
        fs::write(&path, format!("-{}\n", dead())).unwrap();
        let lock = DirectoryLock::take(place.path()).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with(&format!("-{}\n", getpid())), "{text}");
        drop(lock);
        assert!(!path.exists());
        // Of two of one process, the later one stays.
        let first = DirectoryLock::take(place.path()).unwrap();
        let second = DirectoryLock::take(place.path()).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
        fs::write(&path, "1\n").unwrap();
        assert!(matches!(DirectoryLock::take(place.path()), Err(Unavailable::InUse(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
    }
}
