//! Engines: ways to take a physical backup of a server.

pub mod native;
