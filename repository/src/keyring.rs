//! The keyring: which recipients a repository has, and changing that so that one always remains.
//!
//! Every change writes the whole list anew as the next `keyring/N`, create-if-absent. So changes have one order, each was
//! checked against the one before, and of two at the same time one is refused or looks again. The rule that each is checked
//! by: **the key that opened the repository for a change stays, or was retired by nobody and is replaced in the same change
//! by one that was just shown to open it.** An object is added below `keys/` before the list names it, and deleted after the
//! list names it as retired; ids are never used twice. Whatever is interrupted where, the last list names a key that opens.
//!
//! Opening a repository, to back up or to restore, never looks here: a lost or damaged list costs no backup.

use std::fmt;

use proto::RepositoryId;
use proto::failure::chain;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use zeroize::Zeroizing;

use crate::error::Error;
use crate::key::{KeyFile, MasterKey};
use crate::limits::{NOTE_BYTES_MAX, RECIPIENTS_MAX};
use crate::passphrase::{CHARACTERS_MIN, GuessCost, RECOMMENDED};
use crate::recipient::{self, KeyObject, OPEN_KEY, Recipient, Unlock, Unlocked};
use crate::repository::{Repository, create};
use crate::sheet::{SheetKey, recovery_sheet};
use crate::store::{PutOutcome, Store, StoreError};
use crate::{chance, hex, layout, note};

/// How often a change begins again because another one was first. Changes are made by people.
const CHANGE_TRIES: usize = 8;
/// Characters of a label: it is for a column of a table.
const LABEL_MAX: usize = 64;

/// The note `keyring/N`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ring {
    pub(crate) recipients: Vec<Member>,
    /// All that ever were: they never come back.
    retired: Vec<Retired>,
    /// Random: so that a writer who heard no answer recognises its own.
    change: String,
}

/// A recipient as the list names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) id: String,
    recipient: Recipient,
    /// Digest of its object, hexadecimal, so that whoever has any key sees damage of all.
    object_blake3: String,
    #[serde(default)]
    label: String,
    by: String,
    at_ms: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Retired {
    id: String,
    by: String,
    at_ms: i64,
}

/// Who changes the keys and when; kept in the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// For people.
    pub by: String,
    /// Their clock, Unix milliseconds.
    pub at_ms: i64,
}

/// A key that is not in the store yet: to be put away before [`Keyring::add`]. One that is lost between the two is a
/// recipient that nobody can use; the others open the repository as before.
pub struct NewRecipient {
    /// Content of the key file, unless it is a passphrase. A secret.
    pub key_file: Option<Zeroizing<String>>,
    /// A page to print; with a key file, a secret like it.
    pub recovery_sheet: Zeroizing<String>,
    id: String,
    label: String,
    object: KeyObject,
    secret: NewSecret,
}

enum NewSecret {
    KeyFile(KeyFile),
    Passphrase(SecretString),
    Nothing,
}

impl NewSecret {
    fn unlock(&self) -> Unlock<'_> {
        match self {
            Self::KeyFile(file) => Unlock::KeyFile(file),
            Self::Passphrase(passphrase) => Unlock::Passphrase(passphrase),
            Self::Nothing => Unlock::Nothing,
        }
    }
}

impl fmt::Debug for NewRecipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NewRecipient({})", self.id)
    }
}

impl NewRecipient {
    pub(crate) fn file(
        master: &MasterKey,
        repository: RepositoryId,
        place: &str,
        label: &str,
    ) -> Result<Self, Error> {
        let file = KeyFile::generate();
        let text = file.text(repository, place);
        Ok(Self {
            recovery_sheet: recovery_sheet(repository, place, SheetKey::KeyFile(&text)).into(),
            key_file: Some(text),
            id: file.id(),
            label: label.to_owned(),
            object: KeyObject::for_file(master, &file, repository)?,
            secret: NewSecret::KeyFile(file),
        })
    }

    /// Without encryption.
    pub(crate) fn open(master: &MasterKey, repository: RepositoryId, place: &str) -> Self {
        Self {
            recovery_sheet: recovery_sheet(repository, place, SheetKey::Open).into(),
            key_file: None,
            id: OPEN_KEY.to_owned(),
            label: String::new(),
            object: KeyObject::open(master),
            secret: NewSecret::Nothing,
        }
    }

    /// The name of its object below `keys/`.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn object(&self) -> Vec<u8> {
        self.object.to_bytes()
    }

    fn member(&self, change: &Change) -> Member {
        Member {
            id: self.id.clone(),
            recipient: self.object.recipient.clone(),
            object_blake3: digest(&self.object()),
            label: self.label.clone(),
            by: change.by.clone(),
            at_ms: change.at_ms,
        }
    }
}

impl Member {
    /// Whether its object is what was written.
    pub(crate) fn is_of(&self, object: &[u8]) -> bool {
        self.object_blake3 == digest(object)
    }
}

fn digest(object: &[u8]) -> String {
    hex::encode(blake3::hash(object).as_bytes())
}

/// A repository that was opened to look after its keys: it holds the master key, which an ordinary [`Repository`] does not.
pub struct Keyring {
    repository: Repository,
    master: Arc<MasterKey>,
    opener: String,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keyring({:?}, opened by {})", self.repository, self.opener)
    }
}

/// What is known about the keys of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeyringReport {
    /// One for each key that is on the list or in the store.
    pub keys: Vec<Slot>,
    /// What is wrong with the keys as a whole.
    pub findings: Vec<String>,
}

impl KeyringReport {
    /// Whether nothing was found.
    pub fn is_sound(&self) -> bool {
        self.findings.is_empty() && self.keys.iter().all(|key| key.findings.is_empty())
    }
}

/// One key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Slot {
    /// Its name; a key file says it behind `pgmuster-key-1`.
    pub id: String,
    /// `key-file`, `passphrase`, `open`, or what a later version calls it; absent when it cannot be read.
    pub recipient: Option<String>,
    /// What people call it.
    pub label: String,
    /// Who added it; absent when the list does not say.
    pub added_by: Option<String>,
    /// When, Unix milliseconds.
    pub added_at_ms: Option<i64>,
    /// Whether it is the key that opened the repository just now.
    pub opened: bool,
    /// What is wrong with it.
    pub findings: Vec<String>,
}

impl Keyring {
    /// Opens a repository to look after its keys.
    pub async fn open(store: Arc<dyn Store>, unlock: Unlock<'_>) -> Result<Self, Error> {
        let (repository, Unlocked { master, id }) = Repository::unlock(store, unlock).await?;
        Ok(Self { repository, master: Arc::new(master), opener: id })
    }

    /// The repository, open.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The id of the key that opened it.
    pub fn opener(&self) -> &str {
        &self.opener
    }

    /// Makes a key file, in memory.
    pub fn new_key_file(&self, label: &str) -> Result<NewRecipient, Error> {
        check_label(label)?;
        let place = self.repository.describe();
        NewRecipient::file(&self.master, self.repository.id(), &place, label)
    }

    /// Makes a recipient of a passphrase, in memory.
    pub async fn new_passphrase(
        &self,
        passphrase: &SecretString,
        cost: GuessCost,
        label: &str,
    ) -> Result<NewRecipient, Error> {
        check_label(label)?;
        let characters = passphrase.expose_secret().chars().count();
        if characters < CHARACTERS_MIN {
            let reason = format!(
                "it has {characters} characters, and fewer than {CHARACTERS_MIN} are guessed; take six random words"
            );
            return Err(refused("add", "by passphrase", reason));
        }
        let (secret, master) = (passphrase.clone(), Arc::clone(&self.master));
        let repository = self.repository.id();
        let made = tokio::task::spawn_blocking(move || {
            KeyObject::for_passphrase(&master, &secret, cost, repository)
        });
        let (id, object) =
            made.await.map_err(|error| Error::Bug(format!("stretch a passphrase: {error}")))??;
        let key = SheetKey::Passphrase(&id);
        Ok(NewRecipient {
            key_file: None,
            recovery_sheet: recovery_sheet(repository, &self.repository.describe(), key).into(),
            id,
            label: label.to_owned(),
            object,
            secret: NewSecret::Passphrase(passphrase.clone()),
        })
    }

    /// Adds a key. After [`Error::Store`] it may open the repository: keep it. After any other error it does not.
    pub async fn add(&self, new: &NewRecipient, change: &Change) -> Result<(), Error> {
        self.put_in(new, change, false).await
    }

    /// Adds a key and retires the one that opened the repository, in one change: whenever it is interrupted, at least one of
    /// the two opens the repository. The master key stays, so who kept the old key **and** a copy of its old object can
    /// still read everything.
    pub async fn rotate(&self, new: &NewRecipient, change: &Change) -> Result<(), Error> {
        self.put_in(new, change, true).await
    }

    /// Retires a key: it never opens the repository again. Refused for the key that opened it just now, so that whoever
    /// retires one has shown that another one opens; the last one can therefore never be retired. Idempotent: what was
    /// interrupted behind the decision is finished.
    pub async fn retire(&self, id: &str, change: &Change) -> Result<(), Error> {
        let refuse = |reason: &str| refused("retire", id, reason);
        if id == self.opener {
            let reason = "the repository was just opened with it; open it with one that stays";
            return Err(refuse(reason));
        }
        if id == OPEN_KEY {
            let reason = "whoever could read the store has it; a new repository needs another";
            return Err(refuse(reason));
        }
        let in_store = recipient::ids(self.store()).await?.iter().any(|there| there == id);
        let ring = self
            .change(|ring| {
                if ring.retired.iter().any(|retired| retired.id == id) {
                    return Ok(false);
                }
                if !in_store && ring.recipients.iter().all(|member| member.id != id) {
                    return Err(refuse("there is no such key"));
                }
                ring.retire(id, change);
                Ok(true)
            })
            .await?;
        self.sweep(&ring).await
    }

    /// Everything that can be seen of the keys with one of them in hand.
    pub async fn report(&self) -> Result<KeyringReport, Error> {
        let mut findings = Vec::new();
        let ring = match self.newest().await {
            Ok((_, ring)) => ring,
            Err(Error::KeyObject { key, reason }) => {
                findings.push(format!("{key}: {reason}"));
                None
            }
            Err(error) => return Err(error),
        };
        let in_store = recipient::ids(self.store()).await?;
        let members = ring.as_ref().map_or(&[][..], |ring| &ring.recipients);
        let mut keys = Vec::new();
        for member in members {
            keys.push(self.look(&member.id, Some(member), &[]).await?);
        }
        for id in in_store.iter().filter(|id| members.iter().all(|member| member.id != **id)) {
            let retired = ring.iter().flat_map(|ring| &ring.retired).find(|gone| gone.id == *id);
            let finding = match (&ring, retired) {
                (Some(_), Some(gone)) => {
                    vec![format!("it was retired by {} and is still there: retire it again", gone.by)]
                }
                (Some(_), None) => vec![
                    "it is on no list: an interrupted `add`, or somebody else's: retire it unless you know it".to_owned(),
                ],
                (None, _) => Vec::new(),
            };
            keys.push(self.look(id, None, &finding).await?);
        }
        let sound = keys.iter().filter(|key| key.findings.is_empty()).count();
        if sound < 2 && self.opener != OPEN_KEY {
            findings.push(format!(
                "{sound} sound key: who loses it loses every backup; add one and keep it elsewhere: `pgmuster repo key add URL --key FILE --new-key NEW_FILE`"
            ));
        }
        Ok(KeyringReport { keys, findings })
    }

    fn store(&self) -> &dyn Store {
        self.repository.store().as_ref()
    }

    async fn look(
        &self,
        id: &str,
        member: Option<&Member>,
        findings: &[String],
    ) -> Result<Slot, Error> {
        // The makers of what was found by the first list are not known.
        let known = member.filter(|member| member.at_ms > 0);
        let mut slot = Slot {
            id: id.to_owned(),
            recipient: member.map(|member| member.recipient.clone().into()),
            label: member.map(|member| member.label.clone()).unwrap_or_default(),
            added_by: known.map(|member| member.by.clone()),
            added_at_ms: known.map(|member| member.at_ms),
            opened: id == self.opener,
            findings: findings.to_vec(),
        };
        let bytes = match self.store().get(&layout::key(id), NOTE_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(StoreError::NotFound { .. }) => {
                slot.findings.push("its object is gone: retire it".to_owned());
                return Ok(slot);
            }
            // One that cannot be read is a finding about this one; the others are looked at as well.
            Err(error) => {
                slot.findings.push(format!("failed to {}", chain(&error)));
                return Ok(slot);
            }
        };
        if member.is_some_and(|member| !member.is_of(&bytes)) {
            slot.findings.push("its object is not what was written".to_owned());
        }
        match KeyObject::parse(&bytes).and_then(|object| object.check().map(|()| object)) {
            Ok(object) => {
                if let Some(cost) = object.cost().filter(|cost| is_cheap(*cost)) {
                    slot.findings.push(format!(
                        "a guess costs {} passes over {} KiB only: add the passphrase anew and retire this one",
                        cost.passes, cost.memory_kib
                    ));
                }
                slot.recipient = Some(object.recipient.into());
            }
            Err(reason) => slot.findings.push(format!("its object is damaged: {reason}")),
        }
        Ok(slot)
    }

    async fn put_in(
        &self,
        new: &NewRecipient,
        change: &Change,
        instead: bool,
    ) -> Result<(), Error> {
        let refuse = |reason: &str| refused("add", &new.id, reason);
        self.repository.check_writable()?;
        if self.opener == OPEN_KEY {
            return Err(not_encrypted(&new.id));
        }
        let key = layout::key(&new.id);
        if create(self.store(), &key, new.object().into()).await? == PutOutcome::Exists {
            return Err(refuse("there is one of this name"));
        }
        let ring = async {
            self.prove(new, &key).await?;
            self.change(|ring| {
                // The first list finds it in the store already.
                ring.recipients.retain(|member| member.id != new.id);
                if ring.recipients.len() - usize::from(instead) >= RECIPIENTS_MAX {
                    let reason = format!("there are {RECIPIENTS_MAX} already: retire one");
                    return Err(refuse(&reason));
                }
                ring.recipients.push(new.member(change));
                if instead {
                    ring.retire(&self.opener, change);
                }
                Ok(true)
            })
            .await
        };
        match ring.await {
            Ok(ring) => self.sweep(&ring).await,
            // The list may have been written.
            Err(unheard @ Error::Store(_)) => Err(unheard),
            Err(refused) => {
                // No list names it, and none will.
                self.store().delete(&key).await?;
                Err(refused)
            }
        }
    }

    /// The key opens what is stored, and finds the right thing.
    async fn prove(&self, new: &NewRecipient, key: &str) -> Result<(), Error> {
        let damaged = |reason| Error::KeyObject { key: key.to_owned(), reason };
        let bytes = self.store().get(key, NOTE_BYTES_MAX).await.map_err(Error::needed)?;
        if bytes != new.object() {
            return Err(damaged("it is not what was just written".to_owned()));
        }
        let object = KeyObject::parse(&bytes).map_err(damaged)?;
        // What a passphrase costs was paid when it was sealed, over the same bytes.
        let opens = match new.secret {
            NewSecret::Passphrase(_) => true,
            NewSecret::KeyFile(_) | NewSecret::Nothing => object
                .unseal(&new.id, new.secret.unlock(), self.repository.id())
                .is_ok_and(|master| master.is(&self.master)),
        };
        if opens { Ok(()) } else { Err(damaged("the new key does not open it".to_owned())) }
    }

    /// Changes the list: `apply` says whether there is anything to write. Returns the list that stands. Harmless to repeat:
    /// a list is recognised by its random `change`.
    async fn change(
        &self,
        apply: impl Fn(&mut Ring) -> Result<bool, Error>,
    ) -> Result<Ring, Error> {
        self.repository.check_writable()?;
        for _ in 0..CHANGE_TRIES {
            let (number, ring) = self.newest().await?;
            let mut ring = match ring {
                Some(ring) => ring,
                None => self.found().await?,
            };
            self.admit(&mut ring).await?;
            if !apply(&mut ring)? {
                return Ok(ring);
            }
            ring.change = hex::encode(&chance::random::<16>());
            let key = layout::keyring(number + 1);
            let bytes = note::write(&self.repository.keys, &key, &ring)?;
            if bytes.len() as u64 > NOTE_BYTES_MAX {
                let reason = format!("{key} would have {} bytes", bytes.len());
                return Err(Error::Limit { reason });
            }
            if create(self.store(), &key, bytes).await? == PutOutcome::Created {
                return Ok(ring);
            }
        }
        Err(refused("use", &self.opener, "others change the keys all the time; ask again"))
    }

    /// The list that stands, and its number; 0 and `None` when there is none: the repository is older than lists, or its
    /// making was interrupted.
    async fn newest(&self) -> Result<(u64, Option<Ring>), Error> {
        let listed = self.store().list(layout::KEYRINGS).await?;
        let number = |key: &str| key.strip_prefix(layout::KEYRINGS)?.parse::<u64>().ok();
        let Some(newest) = listed.iter().filter_map(|object| number(&object.key)).max() else {
            return Ok((0, None));
        };
        let key = layout::keyring(newest);
        let reason = |what: String| {
            format!("{what}; when it cannot be brought back, delete it, and the one before counts")
        };
        match self.repository.read_note(&key).await {
            Ok(Some(ring)) => Ok((newest, Some(ring))),
            Ok(None) => Err(Error::KeyObject { key, reason: reason("it is gone".to_owned()) }),
            Err(Error::Damaged { reason: what, .. }) => {
                Err(Error::KeyObject { key, reason: reason(what) })
            }
            Err(error) => Err(error),
        }
    }

    /// The first list, of what is in the store: its makers are not known.
    async fn found(&self) -> Result<Ring, Error> {
        let mut recipients = Vec::new();
        for id in recipient::ids(self.store()).await?.into_iter().take(RECIPIENTS_MAX) {
            let bytes = match self.store().get(&layout::key(&id), NOTE_BYTES_MAX).await {
                Ok(bytes) => bytes,
                Err(StoreError::NotFound { .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            let object = KeyObject::parse(&bytes);
            // What is damaged is on no list, and a check says so.
            if let Some(object) = object.ok().filter(|object| object.check().is_ok()) {
                recipients.push(Member::found(id, object.recipient, &bytes));
            }
        }
        Ok(Ring { recipients, retired: Vec::new(), change: String::new() })
    }

    /// Whether the key that opened the repository may change the list: nobody retired it, and it is still there.
    async fn admit(&self, ring: &mut Ring) -> Result<(), Error> {
        let refuse = |reason: String| Err(refused("use", &self.opener, reason));
        if let Some(gone) = ring.retired.iter().find(|gone| gone.id == self.opener) {
            return refuse(format!("{} retired it at the same moment, or before", gone.by));
        }
        let bytes = match self.store().get(&layout::key(&self.opener), NOTE_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(StoreError::NotFound { .. }) => return refuse("its object is gone".to_owned()),
            Err(error) => return Err(error.into()),
        };
        if ring.recipients.iter().all(|member| member.id != self.opener) {
            // It opened the repository, so it belongs here, whoever was interrupted.
            let recipient = KeyObject::parse(&bytes).map(|object| object.recipient);
            let recipient = recipient.unwrap_or_else(|_| Recipient::Other(String::new()));
            ring.recipients.push(Member::found(self.opener.clone(), recipient, &bytes));
        }
        Ok(())
    }

    /// Deletes the objects of what was retired, also of what somebody was interrupted with.
    async fn sweep(&self, ring: &Ring) -> Result<(), Error> {
        for id in recipient::ids(self.store()).await? {
            if ring.retired.iter().any(|retired| retired.id == id) {
                self.store().delete(&layout::key(&id)).await?;
            }
        }
        Ok(())
    }
}

impl Member {
    /// One whose maker is not known.
    fn found(id: String, recipient: Recipient, object: &[u8]) -> Self {
        let object_blake3 = digest(object);
        Self { id, recipient, object_blake3, label: String::new(), by: String::new(), at_ms: 0 }
    }
}

impl Ring {
    fn retire(&mut self, id: &str, change: &Change) {
        self.recipients.retain(|member| member.id != id);
        let Change { by, at_ms } = change.clone();
        self.retired.push(Retired { id: id.to_owned(), by, at_ms });
    }
}

/// The first list of a new repository. Without it the repository is whole; the next change makes one.
pub(crate) async fn begin(
    repository: &Repository,
    recipients: &[NewRecipient],
    change: &Change,
) -> Result<(), Error> {
    let ring = Ring {
        recipients: recipients.iter().map(|new| new.member(change)).collect(),
        retired: Vec::new(),
        change: hex::encode(&chance::random::<16>()),
    };
    let key = layout::keyring(1);
    let bytes = note::write(&repository.keys, &key, &ring)?;
    create(repository.store().as_ref(), &key, bytes).await.map(drop)
}

fn is_cheap(cost: GuessCost) -> bool {
    let work = |cost: GuessCost| u64::from(cost.memory_kib) * u64::from(cost.passes);
    work(cost) < work(RECOMMENDED) || cost.memory_kib < RECOMMENDED.memory_kib
}

fn check_label(label: &str) -> Result<(), Error> {
    if label.chars().count() <= LABEL_MAX && !label.chars().any(char::is_control) {
        return Ok(());
    }
    Err(refused("add", label, format!("a label has at most {LABEL_MAX} printable characters")))
}

pub(crate) fn not_encrypted(id: &str) -> Error {
    let reason = "the repository is not encrypted: whoever reads its store has the key";
    refused("add", id, reason)
}

fn refused(what: &'static str, id: &str, reason: impl Into<String>) -> Error {
    Error::KeyChange { what, id: id.to_owned(), reason: reason.into() }
}
