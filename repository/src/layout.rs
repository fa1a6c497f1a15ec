//! Where each object lives. Nothing but names.

use std::path::Path;

use proto::{AttemptId, BackupId, LineageId, Timeline, WalFileName};

use crate::hex;
use crate::pack::PackId;

pub(crate) const CONFIG: &str = "config";
pub(crate) const KEYS: &str = "keys/";
pub(crate) const KEYRINGS: &str = "keyring/";
pub(crate) const LINEAGES: &str = "lineages/";
/// The directories at the top of a repository.
pub(crate) const OWN: [&str; 3] = [KEYS, KEYRINGS, LINEAGES];
/// Below [`wal`].
pub(crate) const WAL_FLOORS: &str = "floor/";

/// Whether a directory of this computer is the top of a repository, whosever it is.
pub(crate) fn is_repository(directory: &Path) -> bool {
    directory.join(CONFIG).is_file() && directory.join(KEYS).is_dir()
}

pub(crate) fn key(id: &str) -> String {
    format!("{KEYS}{id}")
}

/// Everything of one lineage.
pub(crate) fn lineage(lineage: LineageId) -> String {
    format!("{LINEAGES}{lineage}/")
}

/// The `number`-th list of recipients, from 1.
pub(crate) fn keyring(number: u64) -> String {
    format!("{KEYRINGS}{number}")
}

pub(crate) fn identity(lineage: LineageId) -> String {
    format!("{LINEAGES}{lineage}/identity")
}

pub(crate) fn backups(lineage: LineageId) -> String {
    format!("{LINEAGES}{lineage}/backups/")
}

/// An object of one attempt: `intent`, `manifest`, `verdict`, `proof.N`, `forget`, `remember`, `hold`, `release`,
/// `gone`, `checkpoint.N`.
pub(crate) fn of_attempt(lineage: LineageId, attempt: AttemptId, name: &str) -> String {
    format!("{LINEAGES}{lineage}/backups/{attempt}/{name}")
}

/// The `number`-th checkpoint of an attempt, from 1.
pub(crate) fn checkpoint(lineage: LineageId, attempt: AttemptId, number: u32) -> String {
    of_attempt(lineage, attempt, &format!("checkpoint.{number}"))
}

/// The same for a backup, which has its attempt's name.
pub(crate) fn of_backup(lineage: LineageId, backup: BackupId, name: &str) -> String {
    of_attempt(lineage, backup.into(), name)
}

pub(crate) fn packs(lineage: LineageId) -> String {
    format!("{LINEAGES}{lineage}/packs/")
}

/// Packs are spread over 256 names, so that no directory grows large.
pub(crate) fn pack(lineage: LineageId, id: PackId) -> String {
    let id = id.to_string();
    format!("{LINEAGES}{lineage}/packs/{}/{id}", &id[..2])
}

/// Where the marks of damaged packs are.
pub(crate) fn marks(lineage: LineageId) -> String {
    format!("{LINEAGES}{lineage}/damaged/")
}

/// The mark of a damaged pack.
pub(crate) fn mark(lineage: LineageId, id: PackId) -> String {
    format!("{LINEAGES}{lineage}/damaged/{id}")
}

/// Where the pins are.
pub(crate) fn pins(lineage: LineageId) -> String {
    format!("{LINEAGES}{lineage}/pins/")
}

/// The pin of one reader of a backup.
pub(crate) fn pin(lineage: LineageId, backup: BackupId, name: &str) -> String {
    format!("{LINEAGES}{lineage}/pins/{backup}/{name}")
}

/// Where it is said which copies there are.
pub(crate) fn copies(lineage: LineageId) -> String {
    format!("{LINEAGES}{lineage}/copies/")
}

/// What is said of the copies in one place: by a digest, because a place has characters that no key has.
pub(crate) fn copies_in(lineage: LineageId, place: &str) -> String {
    let digest = blake3::derive_key("pgmuster repository v1: place of copies", place.as_bytes());
    format!("{LINEAGES}{lineage}/copies/{}", hex::encode(&digest[..16]))
}

/// Where the lists of condemned packs are.
pub(crate) fn condemned(lineage: LineageId) -> String {
    format!("{LINEAGES}{lineage}/gc/")
}

/// An object of one run of a collector: `condemned`, `done`.
pub(crate) fn of_run(lineage: LineageId, run: &str, name: &str) -> String {
    format!("{LINEAGES}{lineage}/gc/{run}/{name}")
}

/// The WAL archive of a lineage.
pub(crate) fn wal(lineage: LineageId) -> String {
    format!("{LINEAGES}{lineage}/wal/")
}

/// What the archive has of one timeline.
pub(crate) fn wal_of(lineage: LineageId, timeline: Timeline) -> String {
    format!("{LINEAGES}{lineage}/wal/{:08X}/", timeline.0)
}

/// A file of the archive: a name below [`wal`]. Each timeline has a folder.
pub(crate) fn wal_file(file: &WalFileName) -> String {
    format!("{:08X}/{file}", file.timeline().0)
}

/// What says that a collection may have deleted whatever of a timeline ranks below a segment: a name below [`wal`]. `None`
/// means every timeline, as earlier programs said it.
pub(crate) fn wal_floor(timeline: Option<Timeline>, rank: u64) -> String {
    match timeline {
        Some(timeline) => format!("{WAL_FLOORS}{:08X}/{rank:016X}", timeline.0),
        None => format!("{WAL_FLOORS}{rank:016X}"),
    }
}

/// What came under a name that other content had first: a name below [`wal`]. `number` from 1.
pub(crate) fn wal_conflict(file: &WalFileName, number: u32) -> String {
    format!("conflicts/{file}/{number}")
}
