//! The repository as a whole: making one, opening one.

use std::sync::Arc;

use proto::RepositoryId;

use crate::chance;
use crate::config::Config;
use crate::error::Error;
use crate::key::{KeyFile, KeyObject, Keys, MasterKey, Recipient};
use crate::layout;
use crate::limits::NOTE_BYTES_MAX;
use crate::note;
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

/// A new repository and what its owner must put away.
#[derive(Debug)]
pub struct Created {
    /// The repository, open.
    pub repository: Repository,
    /// Content of the key file; absent without encryption. A secret.
    pub key_file: Option<zeroize::Zeroizing<String>>,
    /// A page to print: where the repository is, its key, and the commands of a restore without anything else. A
    /// secret like the key file.
    pub recovery_sheet: zeroize::Zeroizing<String>,
}

impl Repository {
    /// Makes a repository in a store that has none. The key is in the store before the repository is, so a crash in
    /// between leaves an unused key and no repository.
    pub async fn init(store: Arc<dyn Store>, options: InitOptions) -> Result<Created, Error> {
        let place = store.describe();
        let now_ms = u64::try_from(options.now_ms).unwrap_or(0);
        let id = RepositoryId::mint(now_ms, chance::random());
        let master = MasterKey::generate();
        let (name, object, key_file) = match options.encryption {
            Encryption::KeyFile => {
                let file = KeyFile::generate();
                (file.id(), master.wrap_for_file(&file, id)?, Some(file.text(id, &place)))
            }
            Encryption::Off => (OPEN_KEY.to_owned(), master.wrap_open(), None),
        };
        match store.size(layout::CONFIG).await {
            Ok(_) => return Err(Error::RepositoryExists { place }),
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let key = layout::key(&name);
        if store.put_if_absent(&key, object.to_bytes().into()).await? == PutOutcome::Exists {
            return Err(Error::RepositoryExists { place });
        }
        let keys = master.keys(id);
        let config = Config::new(id, options.now_ms);
        let bytes = note::write(&keys, layout::CONFIG, &config)?;
        if store.put_if_absent(layout::CONFIG, bytes).await? == PutOutcome::Exists {
            store.delete(&key).await?;
            return Err(Error::RepositoryExists { place });
        }
        let recovery_sheet =
            recovery_sheet(id, &place, key_file.as_ref().map(|text| text.as_str()));
        let repository = Self { store, keys: Arc::new(keys), config: Arc::new(config) };
        Ok(Created { repository, key_file, recovery_sheet: recovery_sheet.into() })
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
    format!(
        "pgmuster recovery sheet\n\
         =======================\n\n\
         Repository {id}\n\
         at         {place}\n\n\
         {key}\n\
         To restore with nothing but the pgmuster program:\n\n\
         \x20   pgmuster backups --repository {place}{flag}\n\
         \x20   pgmuster restore --repository {place}{flag} --target /empty/directory\n"
    )
}
