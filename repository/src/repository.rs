//! The repository as a whole: making one, opening one.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use proto::RepositoryId;
use proto::failure::chain;
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use crate::again::again;
use crate::chance;
use crate::config::{Config, Features, SINGLE_WRITER};
use crate::error::Error;
use crate::key::{KeyFile, Keys, MasterKey};
use crate::keyring::{self, Change, NewRecipient};
use crate::layout;
use crate::limits::NOTE_BYTES_MAX;
use crate::note;
use crate::recipient::{self, KeyObject, OPEN_KEY, Unlock, Unlocked};
use crate::store::probe::Capabilities;
use crate::store::single::SingleWriter;
use crate::store::{PutOutcome, Store, StoreError};

/// An open repository. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Repository {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) keys: Arc<Keys>,
    config: Arc<Config>,
    /// Whoever opened it says that no other program uses it now.
    is_alone: bool,
    /// Held by whoever makes a lineage. What follows from one first contact (the first segments of a server, several at a time)
    /// shall not race for one key: a store that locks it lets the loser wait, `SeaweedFS` a whole second.
    pub(crate) minting: Arc<Mutex<()>>,
}

/// How a new repository is made.
#[derive(Debug, Clone, Copy)]
pub struct InitOptions {
    /// Whether a key file is needed to read it.
    pub encryption: Encryption,
    /// Stored in it, Unix milliseconds.
    pub now_ms: i64,
}

/// Who can read a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encryption {
    /// Whoever has the key file.
    KeyFile,
    /// Whoever has the repository: the key stands in it. What protects against damage stays.
    Off,
}

/// A repository that is not in the store yet: its key and recovery sheet, to be put away before [`NewRepository::create`].
/// A key that is lost between the two costs nothing; one that is lost after them costs every backup.
pub struct NewRepository {
    /// Content of the key file; absent without encryption. A secret.
    pub key_file: Option<Zeroizing<String>>,
    /// A page to print: where the repository is, its key, and the commands of a restore without anything else. A
    /// secret like the key file.
    pub recovery_sheet: Zeroizing<String>,
    store: Arc<dyn Store>,
    features: Features,
    id: RepositoryId,
    now_ms: i64,
    master: MasterKey,
    /// Never empty.
    recipients: Vec<NewRecipient>,
}

impl fmt::Debug for NewRepository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NewRepository({} at {})", self.id, self.store.describe())
    }
}

/// A new repository and what its owner must put away.
pub struct Created {
    /// The repository, open.
    pub repository: Repository,
    /// See [`NewRepository::key_file`].
    pub key_file: Option<Zeroizing<String>>,
    /// See [`NewRepository::recovery_sheet`].
    pub recovery_sheet: Zeroizing<String>,
}

impl fmt::Debug for Created {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Created({} at {})", self.repository.id(), self.repository.describe())
    }
}

impl NewRepository {
    /// The id it will have.
    pub fn id(&self) -> RepositoryId {
        self.id
    }

    /// Adds a second key file, to be put away like the first and elsewhere: with one alone, its loss is the loss of every
    /// backup. Only with encryption.
    pub fn add_key_file(&mut self, label: &str) -> Result<&mut NewRecipient, Error> {
        if self.recipients.iter().any(|new| new.id() == OPEN_KEY) {
            return Err(keyring::not_encrypted(label));
        }
        let place = self.store.describe();
        self.recipients.push(NewRecipient::file(&self.master, self.id, &place, label)?);
        self.recipients.last_mut().ok_or_else(|| Error::Bug("a key that was added".to_owned()))
    }

    /// It will be written by one program at a time: for a store that does not decide between two. Programs that do not
    /// know of this will read it and not write to it.
    #[must_use]
    pub fn for_a_single_writer(mut self) -> Self {
        self.store = Arc::new(SingleWriter::over(self.store));
        self.features.write.push(SINGLE_WRITER.to_owned());
        self
    }

    /// Makes the repository, in a store that has none; `found` is what a probe saw and is kept in it. The wrapped keys are
    /// in the store before the repository is, so a crash in between leaves unused keys and no repository.
    ///
    /// After [`Error::RepositoryExists`] the keys open nothing. After any other error they may: keep them.
    pub async fn create(self, found: Option<Capabilities>) -> Result<Repository, Error> {
        let Self { store, features, id, now_ms, mut master, recipients, .. } = self;
        let place = store.describe();
        match store.size(layout::CONFIG).await {
            Ok(_) => return Err(Error::RepositoryExists { place }),
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        for new in &recipients {
            let key = layout::key(new.id());
            let outcome = create(store.as_ref(), &key, new.object().into()).await?;
            if outcome == PutOutcome::Exists {
                // Only without encryption is this name not of our own making. Whoever left it, or is creating beside us,
                // means the same with it: one master key for whichever config comes first.
                let bytes = store.get(&key, NOTE_BYTES_MAX).await.map_err(Error::needed)?;
                let there = KeyObject::parse(&bytes).ok().filter(|_| new.id() == OPEN_KEY);
                master = there
                    .and_then(|there| there.bare())
                    .ok_or_else(|| Error::damaged(&key, "it is in the way and holds no key"))?;
            }
        }
        let keys = master.keys(id);
        let config = Config::new(id, now_ms, features, found);
        let bytes = note::write(&keys, layout::CONFIG, &config)?;
        if create(store.as_ref(), layout::CONFIG, bytes).await? == PutOutcome::Exists {
            for key in recipients.iter().filter(|new| new.id() != OPEN_KEY) {
                let key = layout::key(key.id());
                if let Err(error) = store.delete(&key).await {
                    tracing::warn!("The unused {key} was not deleted: {error}");
                }
            }
            return Err(Error::RepositoryExists { place });
        }
        let repository = Repository::over(store, keys, config);
        // Without encryption there is nothing to list: no key is ever added or retired.
        let listed = recipients.iter().all(|new| new.id() != OPEN_KEY);
        let change = Change { by: "init".to_owned(), at_ms: now_ms };
        if listed && let Err(error) = keyring::begin(&repository, &recipients, &change).await {
            // The repository is there and whole.
            tracing::warn!("The list of keys was not written: failed to {}", chain(&error));
        }
        Ok(repository)
    }
}

/// Creates an object; when the store does not say whether it did, the object itself is asked. Only for bytes that nobody
/// else writes.
pub(crate) async fn create(
    store: &dyn Store,
    key: &str,
    bytes: Bytes,
) -> Result<PutOutcome, Error> {
    match store.put_if_absent(key, bytes.clone()).await {
        Ok(outcome) => Ok(outcome),
        Err(unheard) => match store.get(key, NOTE_BYTES_MAX).await {
            Ok(there) if there == bytes => Ok(PutOutcome::Created),
            Ok(_) => Ok(PutOutcome::Exists),
            Err(_) => Err(unheard.into()),
        },
    }
}

impl Repository {
    /// Makes the key and the recovery sheet of a new repository, in memory: nothing is asked or written. The caller saves
    /// them where they last, then calls [`NewRepository::create`].
    pub fn prepare(store: Arc<dyn Store>, options: InitOptions) -> Result<NewRepository, Error> {
        let place = store.describe();
        let id = RepositoryId::mint(u64::try_from(options.now_ms).unwrap_or(0), chance::random());
        let master = MasterKey::generate();
        let mut first = match options.encryption {
            Encryption::KeyFile => NewRecipient::file(&master, id, &place, "")?,
            Encryption::Off => NewRecipient::open(&master, id, &place),
        };
        Ok(NewRepository {
            key_file: first.key_file.take(),
            recovery_sheet: std::mem::take(&mut first.recovery_sheet),
            store,
            features: Features::default(),
            id,
            now_ms: options.now_ms,
            master,
            recipients: vec![first],
        })
    }

    /// [`Repository::prepare`] and [`NewRepository::create`] in one. A crash in between leaves a repository whose key
    /// nobody has: for repositories that may be lost, such as those of tests.
    pub async fn init(store: Arc<dyn Store>, options: InitOptions) -> Result<Created, Error> {
        let mut new = Self::prepare(store, options)?;
        let key_file = new.key_file.take();
        let recovery_sheet = std::mem::take(&mut new.recovery_sheet);
        Ok(Created { repository: new.create(None).await?, key_file, recovery_sheet })
    }

    /// Opens a repository with its key file; without one only if it was made without encryption.
    pub async fn open(store: Arc<dyn Store>, key: Option<&KeyFile>) -> Result<Self, Error> {
        Self::open_with(store, key.into()).await
    }

    /// Opens a repository with whatever opens it.
    pub async fn open_with(store: Arc<dyn Store>, unlock: Unlock<'_>) -> Result<Self, Error> {
        Ok(Self::unlock(store, unlock).await?.0)
    }

    /// The repository, and its master key for whoever changes its recipients.
    pub(crate) async fn unlock(
        store: Arc<dyn Store>,
        unlock: Unlock<'_>,
    ) -> Result<(Self, Unlocked), Error> {
        let place = store.describe();
        let (keys, config, unlocked) = again(|| async {
            let bytes = match store.get(layout::CONFIG, NOTE_BYTES_MAX).await {
                Ok(bytes) => bytes,
                Err(StoreError::NotFound { .. }) => {
                    return Err(Error::NoRepository { place: place.clone() });
                }
                Err(error) => return Err(error.into()),
            };
            let config: Config = note::read_unchecked(layout::CONFIG, &bytes)?;
            config.check_readable(&place)?;
            let unlocked = recipient::unlock(store.as_ref(), config.repository, unlock).await?;
            let keys = unlocked.master.keys(config.repository);
            // Only now is it known that nobody changed the config.
            let config: Config = note::read(&keys, layout::CONFIG, &bytes)?;
            Ok((keys, config, unlocked))
        })
        .await?;
        let store =
            if config.is_single_writer() { Arc::new(SingleWriter::over(store)) } else { store };
        Ok((Self::over(store, keys, config), unlocked))
    }

    fn over(store: Arc<dyn Store>, keys: Keys, config: Config) -> Self {
        let (keys, config) = (Arc::new(keys), Arc::new(config));
        Self { store, keys, config, is_alone: false, minting: Arc::default() }
    }

    /// The repository's id.
    pub fn id(&self) -> RepositoryId {
        self.config.repository
    }

    /// Where it is, for people; no secrets.
    pub fn describe(&self) -> String {
        self.store.describe()
    }

    /// The store below.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// What a probe found its store to honour when it was made.
    pub fn probed(&self) -> Option<&Capabilities> {
        self.config.store.as_ref()
    }

    /// Whether it was made for one program at a time, because its store does not decide between two. Two that write to
    /// it nevertheless may undo each other's backups without noticing.
    pub fn is_single_writer(&self) -> bool {
        self.config.is_single_writer()
    }

    /// The same repository, for a caller who knows that no other program uses it as long as this one does.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.is_alone = true;
        self
    }

    /// Makes sure that the store still holds this repository: it may have been unmounted, or replaced, since it was opened.
    pub async fn check_there(&self) -> Result<(), Error> {
        let place = self.describe();
        again(|| async {
            let bytes = match self.store.get(layout::CONFIG, NOTE_BYTES_MAX).await {
                Ok(bytes) => bytes,
                Err(StoreError::NotFound { .. }) => {
                    return Err(Error::NoRepository { place: place.clone() });
                }
                Err(error) => return Err(error.into()),
            };
            // Another repository's note is of other keys.
            note::read::<Config>(&self.keys, layout::CONFIG, &bytes).map(drop)
        })
        .await
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn check_writable(&self) -> Result<(), Error> {
        self.config.check_writable(&self.describe())
    }

    pub(crate) fn check_deletable(&self) -> Result<(), Error> {
        self.config.check_deletable(&self.describe())
    }

    /// Refuses what the store would have to keep apart from what others do, where it cannot and nobody said that there
    /// are no others.
    pub fn check_alone(&self) -> Result<(), Error> {
        if self.is_single_writer() && !self.is_alone {
            return Err(Error::NotAlone { place: self.describe() });
        }
        Ok(())
    }
}
