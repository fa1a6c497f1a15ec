//! How far a copy or restore is: counters that anybody may read while it runs.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use proto::backup::SilentChanges;

use crate::error::show;

/// Counters, only ever growing. Relaxed: they are for people and reports; nothing is decided by them but for `silent_changes`,
/// which is read when all that counts has ended.
#[derive(Debug, Default)]
pub struct Progress {
    files: AtomicU64,
    bytes: AtomicU64,
    bytes_read: AtomicU64,
    bytes_skipped: AtomicU64,
    bytes_reread: AtomicU64,
    bytes_taken_over: AtomicU64,
    bytes_stored: AtomicU64,
    vanished: AtomicU64,
    silent_changes: AtomicU64,
    silent_files: Mutex<BTreeSet<Vec<u8>>>,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProgressSnapshot {
    /// Files done with (copied, skipped or restored).
    pub files: u64,
    /// Bytes of those files and parts of files.
    pub bytes: u64,
    /// Bytes that came from the source, also those of a file that came whole when a part of it was wanted.
    pub bytes_read: u64,
    /// Bytes of files, stretches and units that were taken over without being looked at, because nothing about them changed;
    /// in a restore, bytes that were right already.
    pub bytes_skipped: u64,
    /// Bytes that were read although nothing said that they had changed, because it was their turn.
    pub bytes_reread: u64,
    /// Bytes that were read and not stored, because a backup that was interrupted had stored them.
    pub bytes_taken_over: u64,
    /// Bytes sent to the repository, or fetched from it.
    pub bytes_stored: u64,
    /// Files that were gone when they were to be read.
    pub vanished: u64,
    /// Units that had changed in files that claimed not to have: found where such files are read all the same.
    pub silent_changes: u64,
}

impl Progress {
    /// The counters now.
    pub fn snapshot(&self) -> ProgressSnapshot {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ProgressSnapshot {
            files: read(&self.files),
            bytes: read(&self.bytes),
            bytes_read: read(&self.bytes_read),
            bytes_skipped: read(&self.bytes_skipped),
            bytes_reread: read(&self.bytes_reread),
            bytes_taken_over: read(&self.bytes_taken_over),
            bytes_stored: read(&self.bytes_stored),
            vanished: read(&self.vanished),
            silent_changes: read(&self.silent_changes),
        }
    }

    /// What had changed in files that claimed not to have.
    pub fn silent_changes(&self) -> Option<SilentChanges> {
        let units = self.silent_changes.load(Ordering::Relaxed);
        let files = self.silent_files.lock().unwrap_or_else(PoisonError::into_inner);
        let files = files.iter().map(|path| show(path)).collect();
        (units > 0).then_some(SilentChanges { units, files })
    }

    pub(crate) fn add_files(&self, count: u64) {
        self.files.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn add_bytes(&self, count: u64) {
        self.bytes.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn add_read(&self, count: u64) {
        self.bytes_read.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn add_skipped(&self, count: u64) {
        self.bytes_skipped.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn add_reread(&self, count: u64) {
        self.bytes_reread.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn add_taken_over(&self, count: u64) {
        self.bytes_taken_over.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn add_stored(&self, count: u64) {
        self.bytes_stored.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn add_vanished(&self) {
        self.vanished.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_silent_changes(&self, path: &[u8], count: u64) {
        if count == 0 {
            return;
        }
        self.silent_changes.fetch_add(count, Ordering::Relaxed);
        let mut files = self.silent_files.lock().unwrap_or_else(PoisonError::into_inner);
        if files.len() < SilentChanges::FILES_NAMED_MAX {
            files.insert(path.to_vec());
        }
    }
}
