//! Reading a backup while collectors may run: a pin says that somebody reads it.
//!
//! A reader creates its pin, after that reads what is condemned, after that the manifest. So either the collector's last look
//! sees the pin, or the reader sees the list, or the manifest is gone. A reader that cannot have a pin reads all the same and
//! says so: a restore must never fail for want of one. What it can lose is the backup under its hands, loudly.

use std::ops::Deref;

use proto::failure::chain;
use proto::{BackupId, LineageId};

use crate::attempt::is_doomed;
use crate::error::Error;
use crate::judge::is_older;
use crate::reader::Backup;
use crate::record::Pin;
use crate::repository::Repository;
use crate::store::StoreError;
use crate::{chance, hex, layout, note};

/// An open backup that no collector deletes, as far as [`Pinned::unprotected`] does not say otherwise, until
/// [`Pinned::release`]. One that is dropped instead leaves a pin that collectors let go for its age.
#[derive(Debug)]
pub struct Pinned {
    backup: Backup,
    /// Where the pin is, or may be.
    key: Option<String>,
    unprotected: Option<String>,
}

impl Deref for Pinned {
    type Target = Backup;

    fn deref(&self) -> &Backup {
        &self.backup
    }
}

impl Pinned {
    /// Why a collector may delete the backup all the same, if so.
    pub fn unprotected(&self) -> Option<&str> {
        self.unprotected.as_deref()
    }

    /// Ends the pin. A failure is told in the log: what was read is none the worse for it.
    pub async fn release(self) {
        if let Some(key) = &self.key {
            self.backup.repository.unpin(key).await;
        }
    }
}

/// A pin as a collector sees it.
#[derive(Debug, Clone)]
pub(crate) struct SeenPin {
    pub(crate) key: String,
    pub(crate) backup: BackupId,
    pub(crate) pin: Pin,
}

impl SeenPin {
    /// Its reader may be dead.
    pub(crate) fn is_older(&self, now_ms: i64, than_ms: i64) -> bool {
        is_older(self.pin.at_ms, now_ms, than_ms)
    }
}

impl Repository {
    /// Opens a committed backup for somebody who reads for a while.
    pub async fn open_pinned(
        &self,
        lineage: LineageId,
        backup: BackupId,
        pin: &Pin,
    ) -> Result<Pinned, Error> {
        let (key, refused) = self.pin(lineage, backup, pin).await?;
        // In this order: the manifest goes first, so one that is there after the lists were read was on them, or is safe.
        let condemned = self.condemned(lineage).await;
        let backup = match self.open_backup(lineage, backup).await {
            Ok(backup) => backup,
            Err(error) => {
                if let Some(key) = &key {
                    self.unpin(key).await;
                }
                return Err(error);
            }
        };
        let going = || "a collection that began before may be deleting it".to_owned();
        let unprotected = refused.or_else(|| match condemned {
            Ok(condemned) => is_doomed(&backup, &condemned).then(going),
            Err(error) => Some(format!("failed to {}", chain(&error))),
        });
        if let Some(why) = &unprotected {
            tracing::warn!(
                backup.id = %backup.id(),
                "Backup {} is read without protection from collections of garbage: {why}",
                backup.id(),
            );
        }
        Ok(Pinned { backup, key, unprotected })
    }

    /// Where the pin is or may be, and why it may not be.
    async fn pin(
        &self,
        lineage: LineageId,
        backup: BackupId,
        pin: &Pin,
    ) -> Result<(Option<String>, Option<String>), Error> {
        if let Err(error) = self.check_writable() {
            return Ok((None, Some(format!("failed to {error}"))));
        }
        let key = layout::pin(lineage, backup, &hex::encode(&chance::random::<16>()));
        let bytes = note::write(&self.keys, &key, pin)?;
        Ok(match self.store.put_if_absent(&key, bytes).await {
            Ok(_) => (Some(key), None),
            Err(error @ StoreError::Forbidden { .. }) => {
                (None, Some(format!("failed to {}", chain(&error))))
            }
            // It may be there.
            Err(error) => (Some(key), Some(format!("failed to {}", chain(&error)))),
        })
    }

    async fn unpin(&self, key: &str) {
        if let Err(error) = self.store.delete(key).await {
            tracing::warn!(
                "{key} stays until a collection lets it go for its age: failed to {}",
                chain(&error)
            );
        }
    }

    /// Every pin of a lineage that can be believed. One that cannot was written by nobody who has the key.
    pub(crate) async fn list_pins(&self, lineage: LineageId) -> Result<Vec<SeenPin>, Error> {
        let prefix = layout::pins(lineage);
        let mut pins = Vec::new();
        for object in self.store.list(&prefix).await? {
            let backup = object.key.strip_prefix(&prefix).and_then(|rest| rest.split_once('/'));
            let Some(backup) = backup.and_then(|(backup, _)| backup.parse().ok()) else { continue };
            match self.read_note(&object.key).await {
                Ok(Some(pin)) => pins.push(SeenPin { key: object.key, backup, pin }),
                // Its reader ended since it was listed.
                Ok(None) => {}
                Err(Error::Damaged { key, reason }) => {
                    tracing::warn!("{key} counts for nothing: {reason}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(pins)
    }
}
