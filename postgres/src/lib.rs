//! How PostgreSQL behaves: connections, versions, control file, pages, WAL segments, backup start and stop,
//! throwaway instances, its command-line tools. PostgreSQL 14 to 18.
//!
//! Knows nothing of repositories, jobs or schedules: a caller says what it wants of one server, and gets facts or an
//! [`Error`] back that names the cure.

pub mod archive;
pub mod archiving;
pub mod backup_session;
pub mod binaries;
pub mod block_sizes;
mod cancel;
pub mod census;
pub mod changed_blocks;
pub mod checks;
pub mod clients;
pub mod connect;
pub mod control_file;
mod crc32c;
pub mod databases;
pub mod error;
pub mod files;
pub mod globals;
pub mod heartbeat;
pub mod identity;
pub mod instance;
pub mod libpq;
pub mod locks;
pub mod occupied;
pub mod page;
pub mod piped;
pub mod process;
pub mod quote;
pub mod recovery;
pub mod relation;
pub mod roots;
pub mod sandbox;
pub mod scan;
pub mod session;
pub mod settings;
pub mod short_place;
pub mod snapshot;
pub mod standby;
pub mod table_files;
pub mod target;
mod there;
pub mod tls;
mod unfit;
pub mod version;
pub mod wal;
pub mod wal_changes;
mod wal_layout;
pub mod wal_moments;
pub mod wal_position;
pub mod wal_summaries;

pub use backup_session::{BackupOptions, BackupSession, Started, Stopped};
pub use connect::{Purpose, connect, connect_maintenance};
pub use error::Error;
pub use identity::ServerIdentity;
pub use session::Session;
pub use target::{Environment, Target};
pub use unfit::lacks_for_a_dump;
