//! Keys: the master key, the classes derived from it, and key files.
//!
//! The master key is 32 random bytes. It never leaves this module but sealed: everything else gets a class key. Who can
//! unseal it is the affair of `recipient.rs`, who is to be able to that of `keyring.rs`.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use proto::{BackupKind, LineageId, RepositoryId};
use secrecy::{ExposeSecret, SecretBox};
use zeroize::Zeroizing;

use crate::{chance, crypto, error::Error, hex};

const FILE_MAGIC: &str = "pgmuster-key-1";
/// A key file is some 350 bytes.
const FILE_BYTES_MAX: u64 = 4096;
const WRAP_CONTEXT: &str = "pgmuster repository v1: wrap of the master key by a key file";
const CHECK_CONTEXT: &str = "pgmuster repository v1: check digits of a key file";

type Secret = SecretBox<[u8; 32]>;

fn secret(bytes: [u8; 32]) -> Secret {
    SecretBox::new(Box::new(bytes))
}

/// What opens a repository: the content of its key file.
pub struct KeyFile {
    id: [u8; 16],
    secret: Secret,
}

impl KeyFile {
    pub(crate) fn generate() -> Self {
        Self { id: chance::random(), secret: secret(chance::random()) }
    }

    /// The name of the object below `keys/` that this file unwraps.
    pub fn id(&self) -> String {
        hex::encode(&self.id)
    }

    fn check(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key(CHECK_CONTEXT);
        hasher.update(&self.id).update(self.secret.expose_secret());
        hex::encode(&hasher.finalize().as_bytes()[..4])
    }

    /// The file's text: comments that name the repository, and one line with the key in groups that can be typed from
    /// paper. The text is a secret.
    pub fn text(&self, repository: RepositoryId, place: &str) -> Zeroizing<String> {
        Zeroizing::new(format!(
            "# pgmuster key of repository {repository}\n\
             # at {place}\n\
             # Whoever has this file and the repository can read every backup in it; without it nobody can.\n\
             # Keep a copy in a place that does not burn together with either.\n\
             {}\n",
            *self.line()
        ))
    }

    /// Whether a file looks like one with a key. What cannot be read, or is longer than anybody would write beside a key, does not.
    pub(crate) fn is_in(path: &Path, bytes: u64) -> bool {
        if !(FILE_MAGIC.len() as u64..=FILE_BYTES_MAX).contains(&bytes) {
            return false;
        }
        let text = std::fs::read(path).map(Zeroizing::new).unwrap_or_default();
        text.windows(FILE_MAGIC.len()).any(|window| window == FILE_MAGIC.as_bytes())
    }

    fn line(&self) -> Zeroizing<String> {
        let digits = Zeroizing::new(hex::encode(self.secret.expose_secret()));
        let groups: Vec<&str> = (0..16).map(|n| &digits[n * 4..n * 4 + 4]).collect();
        Zeroizing::new(format!("{FILE_MAGIC} {} {} {}", self.id(), groups.join("-"), self.check()))
    }

    pub(crate) fn wrapping_key(&self, repository: RepositoryId) -> Zeroizing<[u8; 32]> {
        let mut hasher = blake3::Hasher::new_derive_key(WRAP_CONTEXT);
        hasher.update(self.secret.expose_secret()).update(&self.id).update(repository.as_bytes());
        Zeroizing::new(hasher.finalize().into())
    }
}

impl fmt::Debug for KeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyFile({})", self.id())
    }
}

/// Why a text is not a key file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyFileError {
    /// No line begins like a key.
    #[error("find a line that begins with {FILE_MAGIC} in the key file")]
    NoKey,
    /// The line has the wrong shape.
    #[error("read the key: it is not an id, 64 hexadecimal digits and check digits")]
    Shape,
    /// The check digits do not fit: a typing error.
    #[error("read the key: a digit is wrong, its check digits do not fit")]
    Check,
}

impl FromStr for KeyFile {
    type Err = KeyFileError;

    /// Reads the file's text; hyphens and upper case in the digits do not matter.
    fn from_str(text: &str) -> Result<Self, KeyFileError> {
        let line = text
            .lines()
            .find_map(|line| line.trim().strip_prefix(FILE_MAGIC))
            .ok_or(KeyFileError::NoKey)?;
        let mut words = line
            .split_whitespace()
            .map(|word| Zeroizing::new(word.replace('-', "").to_ascii_lowercase()));
        let mut word = || words.next().ok_or(KeyFileError::Shape);
        let id = hex::decode(&word()?).ok_or(KeyFileError::Shape)?;
        let key = hex::decode(&word()?).ok_or(KeyFileError::Shape)?;
        let check = word()?;
        let file = Self { id, secret: secret(key) };
        if *check == file.check() { Ok(file) } else { Err(KeyFileError::Check) }
    }
}

/// The root of all keys of one repository.
pub(crate) struct MasterKey(Secret);

impl MasterKey {
    pub(crate) fn generate() -> Self {
        Self(secret(chance::random()))
    }

    /// Sealed under a wrapping key, bound to the id of its recipient: hexadecimal nonce, sealed key and tag.
    pub(crate) fn seal(&self, wrapping: &[u8; 32], id: &str) -> Result<String, Error> {
        let nonce: [u8; 12] = chance::random();
        let mut sealed = Zeroizing::new(*self.0.expose_secret());
        let tag = crypto::seal(wrapping, nonce, id.as_bytes(), &mut *sealed)?;
        Ok(hex::encode(&nonce) + &hex::encode(&*sealed) + &hex::encode(&tag))
    }

    /// The reverse of [`Self::seal`]; `None` when the wrapping key does not fit, whatever the cause.
    pub(crate) fn unseal(wrapped: &str, wrapping: &[u8; 32], id: &str) -> Option<Self> {
        let wrapped: [u8; 60] = hex::decode(wrapped)?;
        let (nonce, sealed) = wrapped.split_first_chunk::<12>()?;
        let mut sealed = Zeroizing::new(sealed.to_vec());
        let opened = crypto::open(wrapping, *nonce, id.as_bytes(), &mut sealed)?;
        Some(Self(secret(opened.try_into().ok()?)))
    }

    /// In the clear: hexadecimal.
    pub(crate) fn bare(&self) -> String {
        hex::encode(self.0.expose_secret())
    }

    /// The reverse of [`Self::bare`].
    pub(crate) fn from_bare(text: &str) -> Option<Self> {
        hex::decode(text).map(|bytes| Self(secret(bytes)))
    }

    /// Whether both are the same key, in constant time.
    pub(crate) fn is(&self, other: &Self) -> bool {
        let [ours, theirs] =
            [self, other].map(|key| blake3::Hash::from_bytes(*key.0.expose_secret()));
        ours == theirs
    }

    fn derive(&self, context: &str, repository: RepositoryId) -> Secret {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        hasher.update(self.0.expose_secret()).update(repository.as_bytes());
        secret(hasher.finalize().into())
    }

    pub(crate) fn keys(&self, repository: RepositoryId) -> Keys {
        Keys {
            repository,
            index: self.derive("pgmuster repository v1: index key", repository),
            data: self.derive("pgmuster repository v1: data key", repository),
        }
    }
}

/// Which class of key opens an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Manifests, shards, detection hashes, notes.
    Index,
    /// The content of files and WAL.
    Data,
}

/// The class keys of one repository.
pub(crate) struct Keys {
    pub(crate) repository: RepositoryId,
    index: Secret,
    data: Secret,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.repository)
    }
}

impl Keys {
    /// The key that wraps the random key of one pack: bound to the pack's whole header.
    pub(crate) fn pack_wrap(&self, class: Class, header: &[u8]) -> Zeroizing<[u8; 32]> {
        let mut hasher =
            blake3::Hasher::new_derive_key("pgmuster repository v1: wrap of a pack key");
        let class = match class {
            Class::Index => &self.index,
            Class::Data => &self.data,
        };
        hasher.update(class.expose_secret()).update(header);
        Zeroizing::new(hasher.finalize().into())
    }

    /// The key of the detection hashes of one lineage.
    pub(crate) fn detection(&self, lineage: LineageId) -> Zeroizing<[u8; 32]> {
        let mut hasher = blake3::Hasher::new_derive_key("pgmuster repository v1: detection hashes");
        hasher.update(self.index.expose_secret()).update(lineage.as_bytes());
        Zeroizing::new(hasher.finalize().into())
    }

    /// The code that authenticates a note: bound to the name of its object.
    pub(crate) fn note_code(&self, key: &str, line: &[u8]) -> blake3::Hash {
        let mut hasher =
            blake3::Hasher::new_derive_key("pgmuster repository v1: authentication of a note");
        hasher.update(self.index.expose_secret());
        hasher.update(&(key.len() as u64).to_le_bytes()).update(key.as_bytes()).update(line);
        hasher.finalize()
    }

    /// The id of the `generation`-th lineage of a cluster, so that two workers that mint at once mint the same.
    pub(crate) fn lineage_id(
        &self,
        kind: BackupKind,
        cluster: &str,
        system_identifier: u64,
        generation: u32,
    ) -> LineageId {
        let mut hasher = blake3::Hasher::new_derive_key(match kind {
            BackupKind::Physical => "pgmuster repository v1: lineage id",
            BackupKind::Logical => "pgmuster repository v1: lineage id of logical backups",
        });
        hasher.update(self.index.expose_secret());
        hasher
            .update(&system_identifier.to_le_bytes())
            .update(&generation.to_le_bytes())
            .update(cluster.as_bytes());
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        LineageId(uuid::Builder::from_custom_bytes(bytes).into_uuid())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_survives_paper() {
        let file = KeyFile::generate();
        let repository = RepositoryId::mint(1, [7; 10]);
        let text = file.text(repository, "file:///x");
        let typed = text.to_uppercase().replace("PGMUSTER-KEY-1", FILE_MAGIC);
        let read: KeyFile = typed.parse().unwrap();
        assert_eq!(read.id, file.id);
        assert_eq!(read.secret.expose_secret(), file.secret.expose_secret());
    }

    #[test]
    fn a_typing_error_is_noticed() {
        let file = KeyFile { id: [1; 16], secret: secret([0x11; 32]) };
        let text = file.text(RepositoryId::mint(1, [7; 10]), "x");
        assert_eq!(
            text.replacen("-1111-", "-1112-", 1).parse::<KeyFile>().unwrap_err(),
            KeyFileError::Check
        );
        assert_eq!("nothing".parse::<KeyFile>().unwrap_err(), KeyFileError::NoKey);
        assert_eq!("pgmuster-key-1 12".parse::<KeyFile>().unwrap_err(), KeyFileError::Shape);
    }
}
