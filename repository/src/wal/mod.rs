//! The WAL archive of a lineage: what `archive_command` brought, under the names that `restore_command` asks for.
//!
//! A file is stored once, whole, and never changed or replaced. It is apart from the WAL that a backup brings along in its own
//! packs. Which cluster wrote a segment is checked by the callers, who know PostgreSQL's headers; that what comes back is
//! what was stored under this name is checked here.

mod archive;
mod collect;
mod copy;
mod floors;
mod inventory;
pub(crate) mod object;

pub(crate) use archive::{Place, of_place};
pub use archive::{SealedWal, WalAbsence, WalStored};
pub(crate) use collect::{Doomed, Start};
pub use collect::{WalBound, WalPlan};
pub use copy::WalCopySummary;
pub use inventory::{TimelineWal, WalGap, WalInventory, WalRun};
pub use object::WalDigest;
pub(crate) use object::object_id;
