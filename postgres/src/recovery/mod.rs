//! Recovery to a moment: which WAL leads there, the settings that take a server there, and seeing that it came there.
//!
//! Deliberately not here: where the WAL is kept, and which backup to begin with.

mod said;
mod server;
mod settings;
mod way;

pub(crate) use said::{Said, time};
pub use server::{Expected, Recovered, RecoveryServer};
pub use settings::{Change, RecoverySettings, SETTINGS_FILE, own_names, stop_archiving};
pub use way::{Way, WayError};
