//! Engines: ways to take a backup of a server, and to put a logical one back.

mod attempt;
pub mod native;
pub mod pg_dump;
