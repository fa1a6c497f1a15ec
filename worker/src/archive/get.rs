//! One file from the archive to where the server wants it.

use std::io::{self, Write as _};
use std::path::Path;

use bytes::Bytes;
use postgres::wal::is_whole;
use proto::{Action, Code, Failure, WalFileName};
use repository::{Identity, Repository, WalAbsence};

use super::lineage::Whose;
use super::{segment_of, server_of, verify};
use crate::context::blocking;

/// How fetching a file ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Got {
    /// It is there, whole and durable.
    Written,
    /// It is certain that the archive does not have it, nor anything that would have to come after it.
    NotThere,
}

/// Fetches `file` and puts it to `to`, whole or not at all. Whatever is not certain is an error: a server that is told that
/// there is no such file takes it for the end of its log and goes into service with what it has.
pub async fn get(
    repository: &Repository,
    whose: &Whose,
    file: &WalFileName,
    to: &Path,
) -> Result<Got, Failure> {
    let server = server_of(to).await?;
    let identity = whose.find(repository, server.map(|server| server.system_identifier)).await?;
    let content = match repository.ask_wal(identity.lineage, file).await? {
        Ok(content) => content,
        Err(absence) => return not_there(&identity, file, absence, to).await,
    };
    if let Some(name) = segment_of(file) {
        verify(name, &content, identity.system_identifier, server).map_err(|what| {
            let what = format!("{file} in the archive is not what it should be: {what}");
            Failure::new(Code::ObjectDamaged, Action::FixData, what)
                .with_hint("Look at restore_command: is this the archive of this cluster?")
        })?;
    }
    let to = to.to_owned();
    blocking(move || {
        write(&to, &content).map_err(|error| {
            let what = format!("failed to write {}: {error}", to.display());
            Failure::new(Code::TargetUnwritable, Action::FixConfig, what)
                .with_hint("Make room there, and run this as the server's user.")
        })
    })
    .await?;
    Ok(Got::Written)
}

/// A segment that is not there, when later ones are or a collection may have deleted it, is no end; unless the server has it
/// itself, as a backup brings its WAL along: it looks into its own `pg_wal` when it hears that there is none.
async fn not_there(
    identity: &Identity,
    file: &WalFileName,
    absence: WalAbsence,
    to: &Path,
) -> Result<Got, Failure> {
    let WalFileName::Segment(name) = *file else { return Ok(Got::NotThere) };
    if absence == WalAbsence::End {
        return Ok(Got::NotThere);
    }
    let own = to.with_file_name(file.to_string());
    let system_identifier = identity.system_identifier;
    let is_own = blocking(move || {
        let Ok(content) = std::fs::read(own) else { return Ok(false) };
        let start =
            u32::try_from(content.len()).ok().and_then(|size| Some((name.segment(size)?, size)));
        Ok(verify(name, &content, system_identifier, None).is_ok()
            && start.is_some_and(|(segment, size)| is_whole(&content, segment.start(size))))
    });
    if is_own.await? {
        return Ok(Got::NotThere);
    }
    let cluster = &identity.cluster;
    let (what, hint) = match absence {
        WalAbsence::Collected { below } => (
            format!(
                "{file} is not in the archive of {cluster}: `repo gc` deleted the WAL before {below}, which no backup needed"
            ),
            "This data directory is older than every backup that is left, and the archive leads nowhere from it. Restore a backup \
             of `pgmuster repo list` and recover from there; a standby is made anew.",
        ),
        WalAbsence::Gap | WalAbsence::End => (
            format!(
                "{file} is missing in the archive of {cluster}, which has later segments of this timeline"
            ),
            "`pgmuster recovery windows` shows what can be recovered. Archive the segment with `pgmuster wal push` if the server that \
             wrote it still has it; else recover to a position before it.",
        ),
    };
    Err(Failure::new(Code::WalMissing, Action::FixData, what).with_hint(hint))
}

/// The whole file appears at once, and stays after a crash.
fn write(to: &Path, content: &Bytes) -> io::Result<()> {
    let directory = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new().prefix(".pgmuster-").tempfile_in(directory)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(to)?;
    std::fs::File::open(directory)?.sync_all()
}
