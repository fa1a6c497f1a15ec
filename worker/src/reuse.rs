//! Whether a restore may change the files that are in its target: only those of a stopped server of the same cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use postgres::control_file::{CONTROL_FILE_PATH, ControlFile};
use postgres::occupied::{
    DirectoryLock, LOCK_FILE, Unavailable, check_unused, check_unused_tablespace,
};
use proto::{Action, Code, Failure, SystemIdentifier};
use repository::{Existing, Unfinished};

use crate::restoring::Destination;

/// Says how what is in the target may be used, or why it must not be changed. Touches nothing.
pub(crate) fn examine(
    destination: &Destination,
    source: SystemIdentifier,
) -> Result<Existing, Failure> {
    let directory = &destination.data_directory;
    if !destination.delta || is_empty(directory)? {
        return Ok(Existing::Resume);
    }
    check_unused(directory).map_err(|why| unavailable(directory, &why))?;
    let found = match Unfinished::in_directory(directory)? {
        Some(unfinished) => unfinished.system_identifier,
        None => identify(directory)?,
    };
    same_cluster(directory, found, source)?;
    for (oid, place) in &destination.tablespaces {
        if is_empty(place)? {
            continue;
        }
        check_unused_tablespace(place).map_err(|why| unavailable(place, &why))?;
        if let Some(unfinished) = Unfinished::in_directory(place)? {
            same_cluster(place, unfinished.system_identifier, source)?;
            continue;
        }
        let link = directory.join("pg_tblspc").join(oid.to_string());
        let leads = fs::canonicalize(&link).ok();
        if leads.is_none() || leads != fs::canonicalize(place).ok() {
            return Err(refused(
                place,
                &format!("it is not empty, and {} does not lead to it", link.display()),
            ));
        }
    }
    let spare = BTreeSet::from([LOCK_FILE.as_bytes().to_vec()]);
    Ok(Existing::Replace { spare, believe_cache: destination.believe_cache })
}

/// The same, and keeps servers from starting there until the lock is dropped.
pub(crate) fn occupy(
    destination: &Destination,
    source: SystemIdentifier,
) -> Result<(Existing, Option<DirectoryLock>), Failure> {
    let directory = &destination.data_directory;
    if examine(destination, source)? == Existing::Resume {
        return Ok((Existing::Resume, None));
    }
    let lock = DirectoryLock::take(directory).map_err(|why| unavailable(directory, &why))?;
    // Nobody can start any more: what is found now stays so.
    Ok((examine(destination, source)?, Some(lock)))
}

/// Tablespaces of the directory that lie elsewhere than they will be restored to.
pub(crate) fn left_alone(destination: &Destination) -> BTreeMap<u32, PathBuf> {
    let leads = |oid: &u32| {
        let link = destination.data_directory.join("pg_tblspc").join(oid.to_string());
        fs::read_link(link).ok()
    };
    destination
        .tablespaces
        .iter()
        .filter_map(|(oid, place)| Some((*oid, leads(oid).filter(|leads| leads != place)?)))
        .collect()
}

/// Which cluster a data directory is of.
fn identify(directory: &Path) -> Result<SystemIdentifier, Failure> {
    match fs::symlink_metadata(directory.join(CONTROL_FILE_PATH)) {
        Ok(_) => {}
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            let reason =
                format!("it is not empty and no data directory: it has no {CONTROL_FILE_PATH}");
            // What is left of a directory may be anybody's.
            return Err(refused(directory, &reason).with_hint(
                "Nothing was changed. With --delta, a target is empty or the stopped data directory of the backup's own cluster, and nothing \
                 says whose this is: move it out of the way and restore into an empty directory.",
            ));
        }
        Err(error) => return Err(refused(directory, &error.to_string())),
    }
    let read = ControlFile::read(directory).map_err(|error| {
        let why = proto::failure::chain(&error);
        refused(directory, &format!("nothing says which cluster it is of: failed to {why}"))
    })?;
    Ok(read.system_identifier)
}

fn same_cluster(
    directory: &Path,
    found: SystemIdentifier,
    source: SystemIdentifier,
) -> Result<(), Failure> {
    if found == source {
        return Ok(());
    }
    let message = format!(
        "failed to restore into {}: it is of the cluster with system identifier {found}, the backup is of {source}",
        directory.display()
    );
    Err(Failure::new(Code::SystemIdentifierMismatch, Action::FixConfig, message).with_hint(
        "Nothing was changed. Give an empty directory, or the one of the backup's own cluster.",
    ))
}

/// Whether there is nothing that would have to be explained.
fn is_empty(directory: &Path) -> Result<bool, Failure> {
    match fs::read_dir(directory) {
        Ok(mut names) => Ok(names.next().is_none()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) => Err(refused(directory, &error.to_string())),
    }
}

fn unavailable(directory: &Path, why: &Unavailable) -> Failure {
    match why {
        Unavailable::InUse(_) => refused(directory, &why.to_string()).with_hint(format!(
            "Nothing was changed. Stop the server first. If none runs there, on no host and in no container, delete {}.",
            directory.join(LOCK_FILE).display()
        )),
        Unavailable::Unknown { .. } => refused(directory, &why.to_string()),
    }
}

fn refused(directory: &Path, reason: &str) -> Failure {
    let message = format!("failed to restore into {}: {reason}", directory.display());
    Failure::new(Code::TargetNotEmpty, Action::FixConfig, message).with_hint(
        "Nothing was changed. With --delta, a target is empty or the stopped data directory of the backup's own cluster.",
    )
}
