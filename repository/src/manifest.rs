//! The root of a backup: what it is about, which packs it needs, and where its shards are.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use proto::{AttemptId, BackupFacts, BackupId, LineageId, RepositoryId};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::key::Keys;
use crate::limits::{FRAME_BYTES_MAX, MANIFEST_RAW_MAX, PATH_BYTES_MAX};
use crate::pack::{self, Compressor, ObjectType, PackBuilder, PackId, PackRecord};
use crate::shard::{PackTable, ShardRef};
use crate::wire::{Decoder, Encoder, Malformed};

/// The format this program writes.
pub(crate) const FORMAT: u32 = 1;
/// Content of one frame of a manifest.
const FRAME: usize = 4 << 20;

/// What a person and a planner want to know first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Head {
    pub(crate) format: u32,
    pub(crate) repository: RepositoryId,
    pub(crate) lineage: LineageId,
    pub(crate) attempt: AttemptId,
    /// The backup it was compared with. It is not needed to restore this one.
    pub(crate) predecessor: Option<BackupId>,
    /// Program and version.
    pub(crate) writer: String,
    /// The writer's clock when the attempt began, Unix milliseconds.
    pub(crate) began_at_ms: i64,
    /// Files may be skipped by their times only when this is equal.
    pub(crate) continuity: Option<String>,
    /// Where the next backup begins its share of re-reading, in 2⁻³² of the whole.
    pub(crate) reread_from: u32,
    pub(crate) counts: Counts,
    pub(crate) facts: BackupFacts,
}

/// How much a backup is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Regular files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Bytes of all files, as they are restored.
    pub bytes: u64,
    /// Bytes this backup added to the repository, its manifest excepted.
    pub stored_bytes: u64,
    /// Packs it added.
    pub packs_added: u64,
    /// Packs it needs, added or not.
    pub packs: u64,
    /// WAL segments and history files it brought along.
    pub wal_files: u64,
}

/// What a manifest remembers of packs.
pub(crate) type Packs = HashMap<PackId, PackRecord>;

/// A shard and the first path in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RootShard {
    pub(crate) first_path: Vec<u8>,
    pub(crate) shard: ShardRef,
}

/// A manifest, opened.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Root {
    pub(crate) head: Head,
    pub(crate) packs: Arc<Packs>,
    pub(crate) shards: Vec<RootShard>,
    /// Entries that are written last.
    pub(crate) late: Vec<RootShard>,
    /// WAL: entries whose paths are file names.
    pub(crate) wal: Vec<RootShard>,
}

impl Root {
    pub(crate) fn encode(&self) -> Result<(Vec<u8>, Vec<u8>), Error> {
        let head = serde_json::to_vec(&self.head)
            .map_err(|error| Error::Bug(format!("write a manifest: {error}")))?;
        let mut table = PackTable::default();
        let mut body = Encoder::default();
        for list in [&self.shards, &self.late, &self.wal] {
            encode_shards(list, &mut table, &mut body);
        }
        Ok((head, encode_body(&table, &self.packs, body)?))
    }

    pub(crate) fn decode(head: &[u8], body: &[u8]) -> Result<Self, String> {
        let head: Head = serde_json::from_slice(head).map_err(|error| error.to_string())?;
        Self::decode_body(head, body)
            .map_err(|Malformed(what)| format!("its {what} cannot be read"))
    }

    fn decode_body(head: Head, body: &[u8]) -> Result<Self, Malformed> {
        let mut from = Decoder::new(body);
        let (ids, packs) = decode_packs(&mut from)?;
        let mut list = || decode_shards(&ids, &mut from);
        let (shards, late, wal) = (list()?, list()?, list()?);
        from.end()?;
        Ok(Self { head, packs: Arc::new(packs), shards, late, wal })
    }

    /// The bytes of the manifest object.
    pub(crate) fn seal(&self, keys: &Keys) -> Result<Bytes, Error> {
        let id = *self.head.attempt.as_bytes();
        seal(keys, self.head.lineage, ObjectType::Manifest, id, self.encode()?)
    }

    /// Opens and checks a manifest object.
    pub(crate) fn open(
        keys: &Keys,
        lineage: LineageId,
        backup: BackupId,
        key: &str,
        bytes: Vec<u8>,
    ) -> Result<Arc<Self>, Error> {
        let kind = ObjectType::Manifest;
        let (head, body) = open(keys, lineage, kind, *backup.as_bytes(), key, bytes)?;
        let root = Self::decode(&head, &body).map_err(|reason| Error::damaged(key, reason))?;
        let own = root.head.repository == keys.repository
            && root.head.lineage == lineage
            && BackupId::from(root.head.attempt) == backup;
        if !own {
            return Err(Error::damaged(key, "its head belongs to another backup"));
        }
        check_format(key, root.head.format)?;
        Ok(Arc::new(root))
    }
}

pub(crate) fn check_format(key: &str, format: u32) -> Result<(), Error> {
    if format <= FORMAT {
        return Ok(());
    }
    let reason = format!("it has format {format}, and this program reads up to {FORMAT}");
    Err(Error::Version { place: key.to_owned(), reason })
}

/// A list of shards, whose packs go into the table.
pub(crate) fn encode_shards(list: &[RootShard], table: &mut PackTable, out: &mut Encoder) {
    out.count(list.len());
    for root in list {
        out.bytes(&root.first_path);
        root.shard.encode(table, out);
    }
}

/// The packs of the table, and what was written with it.
pub(crate) fn encode_body(
    table: &PackTable,
    packs: &Packs,
    lists: Encoder,
) -> Result<Vec<u8>, Error> {
    let mut out = Encoder::default();
    out.count(table.packs().len());
    for id in table.packs() {
        let record = packs
            .get(id)
            .ok_or_else(|| Error::Bug(format!("pack {id} is needed and not known")))?;
        record.encode(&mut out);
    }
    out.raw(&lists.finish());
    Ok(out.finish())
}

/// The packs at the beginning of a body, in their order and by name.
pub(crate) fn decode_packs(from: &mut Decoder<'_>) -> Result<(Vec<PackId>, Packs), Malformed> {
    let count = from.count(PackRecord::BYTES_MIN, "packs")?;
    let mut ids = Vec::with_capacity(count);
    let mut packs = HashMap::with_capacity(count);
    for _ in 0..count {
        let record = PackRecord::decode(from)?;
        ids.push(record.id);
        if packs.insert(record.id, record).is_some() {
            return Err(Malformed("packs, one of which is named twice,"));
        }
    }
    Ok((ids, packs))
}

pub(crate) fn decode_shards(
    ids: &[PackId],
    from: &mut Decoder<'_>,
) -> Result<Vec<RootShard>, Malformed> {
    let count = from.count(9, "shards")?;
    let mut shards = Vec::with_capacity(count);
    for _ in 0..count {
        let first_path = from.bytes(PATH_BYTES_MAX, "path")?.to_vec();
        shards.push(RootShard { first_path, shard: ShardRef::decode(ids, from)? });
    }
    Ok(shards)
}

/// Head and body in a container of their own.
pub(crate) fn seal(
    keys: &Keys,
    lineage: LineageId,
    kind: ObjectType,
    id: [u8; 16],
    (head, body): (Vec<u8>, Vec<u8>),
) -> Result<Bytes, Error> {
    if head.len() > FRAME_BYTES_MAX as usize || body.len() > MANIFEST_RAW_MAX {
        return Err(Error::Limit {
            reason: format!("a manifest of {} and {} bytes is too large", head.len(), body.len()),
        });
    }
    let mut builder = PackBuilder::new(keys, lineage, kind, id)?;
    let mut compressor = Compressor::new(3)
        .map_err(|error| Error::Bug(format!("zstd cannot be started: {error}")))?;
    builder.append(&head, Some(&mut compressor))?;
    for part in body.chunks(FRAME) {
        builder.append(part, Some(&mut compressor))?;
    }
    Ok(builder.finish()?.0)
}

/// Head and body of a container, which is checked.
pub(crate) fn open(
    keys: &Keys,
    lineage: LineageId,
    kind: ObjectType,
    id: [u8; 16],
    key: &str,
    bytes: Vec<u8>,
) -> Result<(Vec<u8>, Vec<u8>), Error> {
    let mut frames = pack::open_whole(keys, lineage, kind, id, bytes, MANIFEST_RAW_MAX)
        .map_err(|reason| Error::damaged(key, reason))?
        .into_iter();
    let head = frames.next().ok_or_else(|| Error::damaged(key, "it has no head"))?;
    Ok((head, frames.flatten().collect()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn garbage_never_panics(bytes: Vec<u8>) {
            let _ = Root::decode(b"{}", &bytes);
            let _ = pack::Tail::parse(&bytes);
        }
    }
}
