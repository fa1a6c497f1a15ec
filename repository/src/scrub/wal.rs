//! The part of a check that reads the WAL archive: each file of the slice, whole. What is not there cannot be missed here;
//! gaps are told by `Repository::list_wal`.

use std::collections::BTreeMap;

use futures::{StreamExt as _, stream};
use proto::LineageId;

use super::{CheckLevel, Faults, ScrubOptions, blame};
use crate::error::Error;
use crate::layout;
use crate::pack::PackId;
use crate::repository::Repository;
use crate::wal::object_id;

/// How much the WAL archive of a lineage is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct WalAmount {
    /// Files, refused ones that were kept included.
    pub files: u64,
    /// Bytes in the store.
    pub bytes: u64,
}

impl WalAmount {
    pub(crate) fn add(&mut self, bytes: u64) {
        self.files += 1;
        self.bytes += bytes;
    }
}

pub(super) fn amount(files: &BTreeMap<String, u64>) -> WalAmount {
    WalAmount { files: files.len() as u64, bytes: files.values().sum() }
}

/// What decides in which slice a file is.
pub(super) fn slice_id(place: &str) -> PackId {
    PackId(object_id(place))
}

/// Reads the files of the slice. Of each, only what is wrong is told.
pub(super) async fn read(
    repository: &Repository,
    lineage: LineageId,
    options: &ScrubOptions,
    files: &BTreeMap<String, u64>,
    faults: &mut Faults,
) -> Result<(), Error> {
    let opens = options.level >= CheckLevel::Decrypt;
    let wanted = files.iter().filter(|(place, _)| options.reads(slice_id(place)));
    let looks = wanted.map(|(place, size_bytes)| async move {
        let seen = repository.look_at_archived(lineage, place, opens).await;
        options.progress.add_stored(*size_bytes);
        (place, seen)
    });
    // Collected first: a stream of borrowing futures is not general enough for a spawned caller.
    let looks: Vec<_> = looks.collect();
    let mut looks = stream::iter(looks).buffer_unordered(options.processes.max(1));
    while let Some((place, seen)) = looks.next().await {
        match seen {
            Ok(()) => {}
            Err(Error::Damaged { reason, .. }) => {
                blame(faults, layout::wal(lineage) + place, reason);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
