//! The repository as a whole: making one, opening one.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use proto::RepositoryId;
use zeroize::Zeroizing;

use crate::chance;
use crate::config::Config;
use crate::error::Error;
use crate::key::{KeyFile, KeyObject, Keys, MasterKey, Recipient};
use crate::layout;
use crate::limits::NOTE_BYTES_MAX;
use crate::note;
use crate::store::probe::Capabilities;
use crate::store::{PutOutcome, Store, StoreError};

/// An open repository. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Repository {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) keys: Arc<Keys>,
    config: Arc<Config>,
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
    id: RepositoryId,
    now_ms: i64,
    master: MasterKey,
    key_name: String,
    key_object: KeyObject,
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

    /// Makes the repository, in a store that has none; `found` is what a probe saw and is kept in it. The wrapped key is
    /// in the store before the repository is, so a crash in between leaves an unused key and no repository.
    ///
    /// After [`Error::RepositoryExists`] the key opens nothing. After any other error it may: keep it.
    pub async fn create(self, found: Option<Capabilities>) -> Result<Repository, Error> {
        let Self { store, id, now_ms, mut master, key_name, key_object, .. } = self;
        let place = store.describe();
        match store.size(layout::CONFIG).await {
            Ok(_) => return Err(Error::RepositoryExists { place }),
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let key = layout::key(&key_name);
        if create(store.as_ref(), &key, key_object.to_bytes().into()).await? == PutOutcome::Exists {
            // Only without encryption is this name not of our own making. Whoever left it, or is creating beside us,
            // means the same with it: one master key for whichever config comes first.
            let bytes = store.get(&key, NOTE_BYTES_MAX).await.map_err(Error::needed)?;
            let there = KeyObject::parse(&key, &bytes)?;
            master = Some(there)
                .filter(|there| key_name == OPEN_KEY && there.recipient == Recipient::Open)
                .and_then(|there| MasterKey::unwrap_open(&there))
                .ok_or_else(|| Error::damaged(&key, "it is in the way and holds no key"))?;
        }
        let keys = master.keys(id);
        let config = Config::new(id, now_ms, found);
        let bytes = note::write(&keys, layout::CONFIG, &config)?;
        if create(store.as_ref(), layout::CONFIG, bytes).await? == PutOutcome::Exists {
            if key_name != OPEN_KEY
                && let Err(error) = store.delete(&key).await
            {
                tracing::warn!("The unused {key} was not deleted: {error}");
            }
            return Err(Error::RepositoryExists { place });
        }
        Ok(Repository { store, keys: Arc::new(keys), config: Arc::new(config) })
    }
}

/// Creates an object; when the store does not say whether it did, the object itself is asked. Only for bytes that nobody
/// else writes.
async fn create(store: &dyn Store, key: &str, bytes: Bytes) -> Result<PutOutcome, Error> {
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
        let (key_name, key_object, key_file) = match options.encryption {
            Encryption::KeyFile => {
                let file = KeyFile::generate();
                (file.id(), master.wrap_for_file(&file, id)?, Some(file.text(id, &place)))
            }
            Encryption::Off => (OPEN_KEY.to_owned(), master.wrap_open(), None),
        };
        let sheet = recovery_sheet(id, &place, key_file.as_ref().map(|text| text.as_str()));
        Ok(NewRepository {
            key_file,
            recovery_sheet: sheet.into(),
            store,
            id,
            now_ms: options.now_ms,
            master,
            key_name,
            key_object,
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
        let place = store.describe();
        let bytes = match store.get(layout::CONFIG, NOTE_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(StoreError::NotFound { .. }) => return Err(Error::NoRepository { place }),
            Err(error) => return Err(error.into()),
        };
        let config: Config = note::read_unchecked(layout::CONFIG, &bytes)?;
        config.check_readable(&place)?;
        let master = unwrap_master(store.as_ref(), &config, key).await?;
        let keys = master.keys(config.repository);
        // Only now is it known that nobody changed the config.
        let config: Config = note::read(&keys, layout::CONFIG, &bytes)?;
        Ok(Self { store, keys: Arc::new(keys), config: Arc::new(config) })
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

    pub(crate) fn check_writable(&self) -> Result<(), Error> {
        self.config.check_writable(&self.describe())
    }
}

/// The name of the key object of a repository without encryption.
const OPEN_KEY: &str = "open";

async fn unwrap_master(
    store: &dyn Store,
    config: &Config,
    key: Option<&KeyFile>,
) -> Result<MasterKey, Error> {
    let refuse = |reason: &str| Error::Key { place: store.describe(), reason: reason.to_owned() };
    let name = key.map_or_else(|| OPEN_KEY.to_owned(), KeyFile::id);
    let object_key = layout::key(&name);
    let object = match store.get(&object_key, NOTE_BYTES_MAX).await {
        Ok(bytes) => KeyObject::parse(&object_key, &bytes)?,
        Err(StoreError::NotFound { .. }) if key.is_none() => {
            return Err(refuse("it needs a key file"));
        }
        Err(StoreError::NotFound { .. }) => {
            return Err(refuse("the key file belongs to another repository"));
        }
        Err(error) => return Err(error.into()),
    };
    match (object.recipient, key) {
        (Recipient::KeyFile, Some(file)) => {
            MasterKey::unwrap_with_file(&object, file, config.repository).ok_or_else(|| {
                Error::damaged(
                    object_key,
                    "the key file does not open it: key or object were changed",
                )
            })
        }
        (Recipient::Open, None) => MasterKey::unwrap_open(&object)
            .ok_or_else(|| Error::damaged(object_key, "it does not hold a key")),
        _ => Err(Error::damaged(object_key, "it is for another kind of key")),
    }
}

fn recovery_sheet(id: RepositoryId, place: &str, key_file: Option<&str>) -> String {
    let key = match key_file {
        Some(text) => format!(
            "Its key. Save these lines as a file, say repository.key (capital letters and hyphens do not matter):\n\n\
             {text}\n\
             Whoever has this sheet and the repository can read every backup. Keep it where it survives the loss of\n\
             both, and where nobody else reads it.\n"
        ),
        None => "It is not encrypted: whoever can read it can read every backup.\n".to_owned(),
    };
    let flag = if key_file.is_some() { " --key repository.key" } else { "" };
    let url = format!("'{}'", place.replace('\'', r"'\''"));
    format!(
        "pgmuster recovery sheet\n\
         =======================\n\n\
         Repository {id}\n\
         at         {place}\n\n\
         {key}\n\
         To restore with nothing but the pgmuster program (if the list shows several clusters, put the name of the one\n\
         you want behind `restore`):\n\n\
         \x20   pgmuster repo list {url}{flag}\n\
         \x20   pgmuster restore --repository {url}{flag} --into /empty/directory\n"
    )
}
