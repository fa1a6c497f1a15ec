//! Marks: packs whose bytes a check found to be wrong. Writers refer to nothing in a marked pack, so that the next backup
//! stores again what was in it, instead of inheriting the damage.
//!
//! A mark counts by being there: one that cannot be believed costs some storage, one that is ignored a backup.

use std::collections::BTreeSet;

use proto::LineageId;

use crate::error::Error;
use crate::pack::PackId;
use crate::record::Mark;
use crate::repository::Repository;
use crate::{hex, layout, note};

impl Repository {
    /// The packs of a lineage that are marked.
    pub(crate) async fn marked(&self, lineage: LineageId) -> Result<BTreeSet<PackId>, Error> {
        let prefix = layout::marks(lineage);
        let marks = self.store.list(&prefix).await?;
        Ok(marks.iter().filter_map(|mark| pack_of(mark.key.strip_prefix(&prefix)?)).collect())
    }

    /// Marks a pack. Idempotent: the first mark stays.
    pub(crate) async fn mark(
        &self,
        lineage: LineageId,
        pack: PackId,
        mark: &Mark,
    ) -> Result<(), Error> {
        self.check_writable()?;
        let key = layout::mark(lineage, pack);
        self.store.put_if_absent(&key, note::write(&self.keys, &key, mark)?).await?;
        Ok(())
    }

    /// Takes a mark away: every frame of the pack opens, or is gone and nothing needs it. Idempotent.
    pub(crate) async fn unmark(&self, lineage: LineageId, pack: PackId) -> Result<(), Error> {
        self.check_writable()?;
        Ok(self.store.delete(&layout::mark(lineage, pack)).await?)
    }
}

/// The pack that the last part of a key names.
pub(crate) fn pack_of(name: &str) -> Option<PackId> {
    hex::decode(name).map(PackId)
}
