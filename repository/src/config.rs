//! The `config` object: the one that says "here is a repository", of which format, and what it takes to use it.

use proto::RepositoryId;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::manifest::FORMAT;
use crate::store::probe::Capabilities;

pub(crate) const MAGIC: &str = "pgmuster-repository";

/// Required for writing: at most one program writes at a time, because the store does not decide between two.
pub(crate) const SINGLE_WRITER: &str = "single-writer";

/// What this program knows of [`Features::write`].
const KNOWN_FOR_WRITING: [&str; 1] = [SINGLE_WRITER];

/// Clear text; authenticated once a key is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Config {
    pub(crate) magic: String,
    pub(crate) format: u32,
    pub(crate) repository: RepositoryId,
    pub(crate) created_at_ms: i64,
    /// What a program must know before it may read, write or delete. Names it does not know forbid that.
    #[serde(default)]
    pub(crate) features: Features,
    /// What the probe found the store to honour, when one was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) store: Option<Capabilities>,
}

/// Required features by what they are required for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Features {
    #[serde(default)]
    pub(crate) read: Vec<String>,
    #[serde(default)]
    pub(crate) write: Vec<String>,
    #[serde(default)]
    pub(crate) delete: Vec<String>,
}

impl Config {
    pub(crate) fn new(
        repository: RepositoryId,
        created_at_ms: i64,
        features: Features,
        store: Option<Capabilities>,
    ) -> Self {
        Self { magic: MAGIC.to_owned(), format: FORMAT, repository, created_at_ms, features, store }
    }

    /// Whether this program may read here.
    pub(crate) fn check_readable(&self, place: &str) -> Result<(), Error> {
        let refuse = |reason: String| Err(Error::Version { place: place.to_owned(), reason });
        if self.magic != MAGIC {
            return refuse("its config object is of another program".into());
        }
        if self.format == 0 || self.format > FORMAT {
            return refuse(format!(
                "it has format {}, and this program reads up to {FORMAT}",
                self.format
            ));
        }
        match self.features.read.first() {
            Some(feature) => {
                refuse(format!("reading it needs {feature:?}, which this program does not know"))
            }
            None => Ok(()),
        }
    }

    /// Whether this program may write here.
    pub(crate) fn check_writable(&self, place: &str) -> Result<(), Error> {
        let unknown = |feature: &&String| !KNOWN_FOR_WRITING.contains(&feature.as_str());
        match self.features.write.iter().find(unknown) {
            Some(feature) => Err(Error::Version {
                place: place.to_owned(),
                reason: format!(
                    "writing to it needs {feature:?}, which this program does not know"
                ),
            }),
            None => Ok(()),
        }
    }

    /// Whether this program may delete here.
    pub(crate) fn check_deletable(&self, place: &str) -> Result<(), Error> {
        self.check_writable(place)?;
        match self.features.delete.first() {
            Some(feature) => Err(Error::Version {
                place: place.to_owned(),
                reason: format!(
                    "deleting from it needs {feature:?}, which this program does not know"
                ),
            }),
            None => Ok(()),
        }
    }

    /// That of a mirror in another store, in which a probe saw `found`.
    pub(crate) fn mirrored(&self, single_writer: bool, found: Capabilities) -> Self {
        let mut config = Self { store: Some(found), ..self.clone() };
        config.features.write.retain(|feature| feature != SINGLE_WRITER);
        config.features.write.extend(single_writer.then(|| SINGLE_WRITER.to_owned()));
        config
    }

    pub(crate) fn is_single_writer(&self) -> bool {
        self.features.write.iter().any(|feature| feature == SINGLE_WRITER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_forbids_what_it_is_required_for_and_all_behind_it() {
        let with = |write: &[&str], delete: &[&str]| {
            let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            let features =
                Features { read: Vec::new(), write: named(write), delete: named(delete) };
            let config = Config::new(RepositoryId::mint(1, [1; 10]), 0, features, None);
            (
                config.check_readable("x").is_ok(),
                config.check_writable("x").is_ok(),
                config.check_deletable("x").is_ok(),
            )
        };
        assert_eq!(with(&[], &[]), (true, true, true));
        assert_eq!(with(&[SINGLE_WRITER], &[]), (true, true, true));
        assert_eq!(with(&[SINGLE_WRITER, "new"], &[]), (true, false, false));
        assert_eq!(with(&[], &["new"]), (true, true, false));
    }
}
