//! Recipients: who can unseal the master key, each from an object of its own below `keys/`.
//!
//! Format version 1 knows `key-file`, `passphrase` and `open` (the master key stands in the repository itself: "no
//! encryption", by name). Opening looks at nothing but the object that the key in hand names, or at each passphrase's:
//! what is wrong with another one is no obstacle. Who is to be a recipient is the affair of `keyring.rs`.

use std::fmt;

use proto::RepositoryId;
use proto::failure::chain;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::error::Error;
use crate::key::{KeyFile, MasterKey};
use crate::layout;
use crate::limits::{NOTE_BYTES_MAX, RECIPIENTS_MAX};
use crate::passphrase::{GuessCost, Stretching};
use crate::store::{Store, StoreError};
use crate::{chance, hex};

const PASSPHRASE_CONTEXT: &str = "pgmuster repository v1: wrap of the master key by a passphrase";
/// The id of the recipient of a repository without encryption.
pub(crate) const OPEN_KEY: &str = "open";
/// Ids that an error names at most.
const NAMED_MAX: usize = 8;

/// What opens a repository.
#[derive(Clone, Copy)]
pub enum Unlock<'a> {
    /// Nothing, for a repository that was made without encryption.
    Nothing,
    /// A key file.
    KeyFile(&'a KeyFile),
    /// A passphrase: its bytes as they are, nothing is normalised or trimmed.
    Passphrase(&'a SecretString),
}

impl fmt::Debug for Unlock<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("Nothing"),
            Self::KeyFile(file) => file.fmt(f),
            Self::Passphrase(_) => f.write_str("Passphrase"),
        }
    }
}

impl<'a> From<Option<&'a KeyFile>> for Unlock<'a> {
    fn from(key: Option<&'a KeyFile>) -> Self {
        key.map_or(Self::Nothing, Self::KeyFile)
    }
}

/// The kind of a recipient. Names of later versions are kept: their objects do not concern us.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub(crate) enum Recipient {
    KeyFile,
    Passphrase,
    Open,
    Other(String),
}

impl From<String> for Recipient {
    fn from(name: String) -> Self {
        match name.as_str() {
            "key-file" => Self::KeyFile,
            "passphrase" => Self::Passphrase,
            "open" => Self::Open,
            _ => Self::Other(name),
        }
    }
}

impl From<Recipient> for String {
    fn from(recipient: Recipient) -> Self {
        match recipient {
            Recipient::KeyFile => "key-file".to_owned(),
            Recipient::Passphrase => "passphrase".to_owned(),
            Recipient::Open => "open".to_owned(),
            Recipient::Other(name) => name,
        }
    }
}

/// An object below `keys/`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct KeyObject {
    magic: String,
    pub(crate) recipient: Recipient,
    /// Hexadecimal: nonce, sealed master key and tag; for `open` the master key itself.
    #[serde(default)]
    wrapped: String,
    /// How a passphrase becomes the wrapping key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stretching: Option<Stretching>,
}

impl KeyObject {
    const MAGIC: &'static str = "pgmuster-wrapped-key-1";

    fn new(recipient: Recipient, wrapped: String, stretching: Option<Stretching>) -> Self {
        Self { magic: Self::MAGIC.to_owned(), recipient, wrapped, stretching }
    }

    /// Whoever reads the store has the master key.
    pub(crate) fn open(master: &MasterKey) -> Self {
        Self::new(Recipient::Open, master.bare(), None)
    }

    pub(crate) fn for_file(
        master: &MasterKey,
        file: &KeyFile,
        repository: RepositoryId,
    ) -> Result<Self, Error> {
        let wrapped = master.seal(&file.wrapping_key(repository), &file.id())?;
        Ok(Self::new(Recipient::KeyFile, wrapped, None))
    }

    /// With a fresh id, which is the first of the two. Slow.
    pub(crate) fn for_passphrase(
        master: &MasterKey,
        passphrase: &SecretString,
        cost: GuessCost,
        repository: RepositoryId,
    ) -> Result<(String, Self), Error> {
        let id = hex::encode(&chance::random::<16>());
        let stretching = Stretching::new(cost);
        let wrapping = by_passphrase(&stretching, passphrase, &id, repository)
            .map_err(|reason| Error::Limit { reason })?;
        let wrapped = master.seal(&wrapping, &id)?;
        Ok((id, Self::new(Recipient::Passphrase, wrapped, Some(stretching))))
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let object: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let fits = object.magic == Self::MAGIC;
        fits.then_some(object).ok_or_else(|| "it is not a key object".to_owned())
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// What can be said against the object without its secret.
    pub(crate) fn check(&self) -> Result<(), String> {
        let sealed = hex::decode::<60>(&self.wrapped).map(drop);
        let shape = || "it does not hold a sealed key".to_owned();
        match self.recipient {
            Recipient::KeyFile => sealed.ok_or_else(shape),
            Recipient::Passphrase => {
                self.stretching()?.check()?;
                sealed.ok_or_else(shape)
            }
            Recipient::Open => self.bare().map(drop).ok_or_else(shape),
            Recipient::Other(_) => Ok(()),
        }
    }

    /// What a guess costs, of a passphrase.
    pub(crate) fn cost(&self) -> Option<GuessCost> {
        self.stretching.as_ref().map(Stretching::cost)
    }

    pub(crate) fn bare(&self) -> Option<MasterKey> {
        (self.recipient == Recipient::Open).then(|| MasterKey::from_bare(&self.wrapped))?
    }

    fn stretching(&self) -> Result<&Stretching, String> {
        self.stretching.as_ref().ok_or_else(|| "it does not say what to do".to_owned())
    }

    /// The master key, with the secret that belongs to the object; else why not. Slow for a passphrase.
    pub(crate) fn unseal(
        &self,
        id: &str,
        unlock: Unlock<'_>,
        repository: RepositoryId,
    ) -> Result<MasterKey, String> {
        let (wrapping, wrong) = match (&self.recipient, unlock) {
            (Recipient::Open, Unlock::Nothing) => {
                return self.bare().ok_or_else(|| "it does not hold a key".to_owned());
            }
            (Recipient::KeyFile, Unlock::KeyFile(file)) => {
                (file.wrapping_key(repository), "the key file does not open it: either was changed")
            }
            (Recipient::Passphrase, Unlock::Passphrase(passphrase)) => (
                by_passphrase(self.stretching()?, passphrase, id, repository)?,
                "the passphrase does not open it",
            ),
            _ => return Err("it is for another kind of key".to_owned()),
        };
        MasterKey::unseal(&self.wrapped, &wrapping, id).ok_or_else(|| wrong.to_owned())
    }
}

fn by_passphrase(
    stretching: &Stretching,
    passphrase: &SecretString,
    id: &str,
    repository: RepositoryId,
) -> Result<Zeroizing<[u8; 32]>, String> {
    let mut hasher = blake3::Hasher::new_derive_key(PASSPHRASE_CONTEXT);
    hasher.update(&*stretching.stretch(passphrase)?).update(id.as_bytes());
    hasher.update(repository.as_bytes());
    Ok(Zeroizing::new(hasher.finalize().into()))
}

/// The master key, and the id of the recipient that had it.
pub(crate) struct Unlocked {
    pub(crate) master: MasterKey,
    pub(crate) id: String,
}

/// Opens the master key of a repository.
pub(crate) async fn unlock(
    store: &dyn Store,
    repository: RepositoryId,
    unlock: Unlock<'_>,
) -> Result<Unlocked, Error> {
    let id = match unlock {
        Unlock::Nothing => OPEN_KEY.to_owned(),
        Unlock::KeyFile(file) => file.id(),
        Unlock::Passphrase(passphrase) => {
            return try_passphrases(store, repository, passphrase).await;
        }
    };
    let key = layout::key(&id);
    let bytes = match store.get(&key, NOTE_BYTES_MAX).await {
        Ok(bytes) => bytes,
        Err(StoreError::NotFound { .. }) => {
            let reason = match unlock {
                Unlock::Nothing => "it needs a key file or a passphrase".to_owned(),
                _ => format!("key {id} belongs to another repository, or was retired"),
            };
            return Err(refused(store, repository, reason).await);
        }
        Err(error) => return Err(error.into()),
    };
    let damaged = |reason| Error::KeyObject { key: key.clone(), reason };
    let object = KeyObject::parse(&bytes).map_err(damaged)?;
    let master = object.unseal(&id, unlock, repository).map_err(damaged)?;
    Ok(Unlocked { master, id })
}

/// A passphrase does not say whose it is, so each is tried. One that cannot be read is passed over; only when no other opens
/// is that the error.
async fn try_passphrases(
    store: &dyn Store,
    repository: RepositoryId,
    passphrase: &SecretString,
) -> Result<Unlocked, Error> {
    let (mut tried, mut unread, mut damaged) = (Vec::new(), None, None);
    for id in ids(store).await?.into_iter().take(RECIPIENTS_MAX) {
        let key = layout::key(&id);
        let bytes = match store.get(&key, NOTE_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(StoreError::NotFound { .. }) => continue,
            Err(error) => {
                tracing::warn!("{key} is passed over: failed to {}", chain(&error));
                unread.get_or_insert(error);
                continue;
            }
        };
        let usable = KeyObject::parse(&bytes).and_then(|object| object.check().map(|()| object));
        let object = match usable {
            Ok(object) => object,
            Err(reason) => {
                tracing::warn!("{key} is passed over: {reason}");
                damaged.get_or_insert((key, reason));
                continue;
            }
        };
        if object.recipient != Recipient::Passphrase {
            continue;
        }
        let (passphrase, of) = (passphrase.clone(), id.clone());
        let unsealed = tokio::task::spawn_blocking(move || {
            object.unseal(&of, Unlock::Passphrase(&passphrase), repository)
        });
        match unsealed
            .await
            .map_err(|error| Error::Bug(format!("stretch a passphrase: {error}")))?
        {
            Ok(master) => return Ok(Unlocked { master, id }),
            Err(reason) => tried.push(format!("{id} ({reason})")),
        }
    }
    if let Some(error) = unread {
        return Err(error.into());
    }
    let also = damaged.as_ref().map_or_else(String::new, |(key, _)| format!("; {key} is damaged"));
    match damaged {
        Some((key, reason)) if tried.is_empty() => Err(Error::KeyObject { key, reason }),
        _ if tried.is_empty() => {
            Err(refused(store, repository, "it has no passphrase".to_owned()).await)
        }
        _ => {
            let reason = format!("the passphrase is wrong: tried {}{also}", tried.join(", "));
            Err(Error::Key { place: store.describe(), repository, reason })
        }
    }
}

/// Says what would open the repository, as far as that can be seen.
async fn refused(store: &dyn Store, repository: RepositoryId, reason: String) -> Error {
    let ids = ids(store).await.unwrap_or_default();
    let more = if ids.len() > NAMED_MAX { ", …" } else { "" };
    let named: Vec<&str> = ids.iter().take(NAMED_MAX).map(String::as_str).collect();
    let reason = match named.as_slice() {
        [] => reason,
        named => format!("{reason} (its keys are {}{more})", named.join(", ")),
    };
    Error::Key { place: store.describe(), repository, reason }
}

/// The ids of all key objects, sorted.
pub(crate) async fn ids(store: &dyn Store) -> Result<Vec<String>, StoreError> {
    let listed = store.list(layout::KEYS).await?;
    let id = |key: &str| key.strip_prefix(layout::KEYS).map(str::to_owned);
    Ok(listed.iter().filter_map(|object| id(&object.key)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHEAP: GuessCost = GuessCost { memory_kib: 8, passes: 1, lanes: 1 };

    #[test]
    fn a_sealed_key_opens_only_with_its_secret_in_its_own_repository_and_under_its_own_name() {
        let master = MasterKey::generate();
        let (here, there) = (RepositoryId::mint(1, [1; 10]), RepositoryId::mint(1, [2; 10]));

        let (file, other) = (KeyFile::generate(), KeyFile::generate());
        let object = KeyObject::for_file(&master, &file, here).unwrap();
        let by_file = |id: &str, file, place| object.unseal(id, Unlock::KeyFile(file), place);
        assert!(by_file(&file.id(), &file, here).unwrap().is(&master));
        assert!(by_file(&file.id(), &file, there).is_err());
        assert!(by_file(&file.id(), &other, here).is_err());
        assert!(by_file("another name", &file, here).is_err());

        let (right, wrong) = (SecretString::from("right"), SecretString::from("wrong"));
        let (id, object) = KeyObject::for_passphrase(&master, &right, CHEAP, here).unwrap();
        let by_word = |id: &str, word, place| object.unseal(id, Unlock::Passphrase(word), place);
        assert!(by_word(&id, &right, here).unwrap().is(&master));
        assert!(by_word(&id, &right, there).is_err());
        assert!(by_word(&id, &wrong, here).is_err());
        assert!(by_word("another name", &right, here).is_err());
        assert!(object.unseal(&id, Unlock::Nothing, here).is_err());
    }

    #[test]
    fn an_object_of_a_later_version_is_read_as_far_as_its_name() {
        let later = br#"{"magic":"pgmuster-wrapped-key-1","recipient":"x25519","public":"00"}"#;
        let object = KeyObject::parse(later).unwrap();
        assert_eq!(object.recipient, Recipient::Other("x25519".to_owned()));
        assert_eq!(object.check(), Ok(()));
        let id = "00112233445566778899aabbccddeeff";
        let why = object.unseal(id, Unlock::Nothing, RepositoryId::mint(1, [1; 10]));
        assert_eq!(why.err().as_deref(), Some("it is for another kind of key"));
    }
}
