//! What should happen: pure decisions that say why.
//!
//! Everything here is a function of its arguments: no clock, no chance, no I/O, nothing async. Time comes in as
//! milliseconds, chance as a number, and every answer carries a sentence a person can read.

pub mod broken;
pub mod fleet;
pub mod heartbeats;
pub mod lease;
pub mod placement;
pub mod reach;
pub mod recoverable;
pub mod recovery_time;
mod repository;
pub mod retry;
pub mod standing;
pub mod state;
mod target;
pub mod words;

pub use fleet::{Counted, fleet_sentence};
pub use lease::{Lease, LeasePolicy, Seen, Sweep, Verdict};
pub use placement::{Candidate, Class, Need, Placed, class_of, place};
pub use retry::{Retry, RetryPolicy};
pub use state::{ClusterFacts, ClusterState, Judgement, Objectives, judge_cluster};
