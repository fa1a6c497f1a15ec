//! Where backups live: the format of FORMAT.md, its keys, the stores below it, writing, reading, restoring, checking.
//!
//! It knows bytes, files and packs. It does not know jobs, and of PostgreSQL only the words of `proto`: which files are
//! copied, what a page is and when a backup is consistent is its callers' affair.
//!
//! The way of a backup: [`Repository::begin`] → [`Attempt::write`] → [`BackupWriter::copy`] (and [`WalWriter::add`] beside
//! it) → [`BackupWriter::finish`] → [`Written::commit`]. The way back: [`Repository::open_backup`] →
//! [`Backup::restore_plan`] → [`RestorePlan::restore`].

mod again;
mod attempt;
mod chance;
mod check;
mod checkpoint;
mod collect;
mod config;
mod content;
mod copies;
mod copy;
mod crypto;
mod detect;
mod entry;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod hex;
mod judge;
mod key;
mod keyring;
mod layout;
mod limits;
mod lineage;
mod manifest;
mod marks;
mod note;
mod pack;
mod passphrase;
pub mod paths;
mod pieces;
mod pins;
mod progress;
mod proof;
mod reader;
mod recipient;
mod record;
mod refer;
mod repository;
mod restore;
mod room;
mod scrub;
mod shard;
mod sheet;
mod slice;
mod stop;
pub mod store;
mod uploads;
mod wal;
mod wire;
mod wishes;
mod writer;

pub use attempt::{Aborted, Attempt, PassedOver};
pub use chance::random;
pub use check::{CheckOptions, DecryptReport, Inventory};
pub use collect::{Amount, CollectOptions, CollectPlan, CollectSummary, Collected, LeftList, Open};
pub use content::{FileContent, StoredFile};
pub use copy::{CopyOptions, CopyOutcome, CopySummary, Mirror};
pub use entry::{SourceEntry, SourceKind, path_order};
pub use error::Error;
pub use judge::{Judged, Reason};
pub use key::{KeyFile, KeyFileError};
pub use keyring::{Change, Keyring, KeyringReport, NewRecipient, Slot};
pub use lineage::{AttemptSummary, Backups, Lineages, Lost};
pub use manifest::Counts;
pub use pack::PackId;
pub use passphrase::GuessCost;
pub use pieces::write_in_pieces;
pub use pins::Pinned;
pub use progress::{Progress, ProgressSnapshot};
pub use proof::StoredProof;
pub use reader::{Backup, WalFile};
pub use recipient::Unlock;
pub use record::{Identity, Intent, Outcome, Pin, Verdict, Wish};
pub use repository::{Created, Encryption, InitOptions, NewRepository, Repository};
pub use restore::{
    Addition, Comparison, Existing, Foreign, Place, RestoreOptions, RestorePlan, RestoreSummary,
    RestoreTarget, Unfinished, WriteAddition,
};
pub use scrub::{CheckLevel, Damage, ScrubOptions, ScrubReport, ScrubbedLineage, WalAmount};
pub use slice::Slice;
pub use wal::{
    SealedWal, TimelineWal, WalAbsence, WalBound, WalCopySummary, WalDigest, WalGap, WalInventory,
    WalPlan, WalRun, WalStored,
};
pub use writer::{
    BackupSummary, BackupWriter, Source, SourceFile, WalWriter, WriteOptions, Written,
};
