//! The keys of a repository, as far as they can be judged without their secrets: `keyring` says which there are, with the digest of
//! each one's object.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::names::number_of_ring;
use super::{Faults, blame};
use crate::error::Error;
use crate::keyring::Ring;
use crate::layout;
use crate::limits::NOTE_BYTES_MAX;
use crate::recipient::KeyObject;
use crate::repository::Repository;
use crate::store::StoreError;

impl Repository {
    pub(super) async fn look_at_keys(&self, faults: &mut Faults) -> Result<(), Error> {
        let rings = self.list_rings().await?;
        let newest = rings.keys().next_back().copied().unwrap_or(0);
        // They are numbered from 1 and never deleted.
        if let Some(gap) = (1..newest).find(|number| !rings.contains_key(number)) {
            blame(faults, layout::keyring(gap), "it is missing, and a later list of keys is there");
        }
        let mut ring: Option<Ring> = None;
        for (number, size) in &rings {
            let key = layout::keyring(*number);
            if *size > NOTE_BYTES_MAX {
                blame(faults, key, format!("it has {size} bytes, more than a note can have"));
                continue;
            }
            match self.read_note(&key).await {
                Ok(read) => ring = read.filter(|_| *number == newest),
                Err(Error::Damaged { reason, .. }) => blame(faults, key, reason),
                Err(error) => return Err(error),
            }
        }
        let objects = self.key_objects(faults).await?;
        for (id, bytes) in &objects {
            let object = KeyObject::parse(bytes).and_then(|object| object.check());
            if let Err(why) = object {
                blame(faults, layout::key(id), why);
            }
        }
        for member in ring.iter().flat_map(|ring| &ring.recipients) {
            let key = layout::key(&member.id);
            match objects.get(&member.id) {
                Some(bytes) if member.is_of(bytes) => {}
                Some(_) => blame(faults, key, "it is not what was written"),
                // Somebody may have retired it meanwhile.
                None if self.list_rings().await?.len() == rings.len() => {
                    blame(
                        faults,
                        key,
                        "it is missing: that key does not open the repository any more",
                    );
                }
                None => {}
            }
        }
        Ok(())
    }

    /// The numbers and sizes of the lists of keys.
    async fn list_rings(&self) -> Result<BTreeMap<u64, u64>, Error> {
        let listed = self.store.list(layout::KEYRINGS).await?;
        let ring =
            |object: &crate::store::Listed| Some((number_of_ring(&object.key)?, object.size_bytes));
        Ok(listed.iter().filter_map(ring).collect())
    }

    async fn key_objects(&self, faults: &mut Faults) -> Result<BTreeMap<String, Bytes>, Error> {
        let mut objects = BTreeMap::new();
        for object in self.store.list(layout::KEYS).await? {
            let Some(id) = object.key.strip_prefix(layout::KEYS) else { continue };
            if object.size_bytes > NOTE_BYTES_MAX {
                let what = format!("it has {} bytes, more than a key can have", object.size_bytes);
                blame(faults, &object.key, what);
                continue;
            }
            match self.store.get(&object.key, NOTE_BYTES_MAX).await {
                Ok(bytes) => drop(objects.insert(id.to_owned(), bytes)),
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(objects)
    }
}
