//! What a database needs: planners that read statistics and return a plan with its reasons, and the execution of it.
//!
//! A planner is pure: statistics in, plan out; the plan prints itself and is exactly what is executed. The SQL lies in
//! `sql/`, one readable file a question. When to do anything, and for which cluster, is decided elsewhere.

pub mod analyze;
pub mod bloat;
mod error;
mod limits;
mod sql;
mod table;
pub mod told;
pub mod vacuum;

pub use error::Error;
pub use limits::{Ended, Limits};
pub use table::{TableRef, databases};
