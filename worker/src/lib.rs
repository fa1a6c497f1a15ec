//! The worker: takes tickets, runs what it is granted near the databases, tells what happened.
//!
//! Stateless: nothing it holds is needed after it died. It knows the server, the repository and the job in its hands;
//! it decides nothing about schedules or retention and never talks to the catalog.

pub mod archive;
mod attempt;
mod attempts;
mod away;
mod backlog;
pub mod beyond;
mod claims;
mod clock;
pub mod config;
mod consume;
pub mod context;
mod continuity;
mod control;
pub mod engines;
pub mod failpoint;
mod heartbeat;
mod holdings;
mod jobs;
mod offers;
mod outbound;
pub mod places;
mod programs;
pub mod proving;
mod pulse;
pub mod recovering;
pub mod restoring;
mod reuse;
mod shared;
mod slots;
mod spool;
mod worker;

pub use worker::{ENDS_WITHIN, Worker};
