//! The names of exchanges and queues. Both sides derive them from here; either may start first.

use std::fmt;

use crate::{Lane, SiteName, WorkerName};

/// Topic exchange of tickets.
pub const JOBS: &str = "pgmuster.jobs";
/// Direct exchange and quorum queue of claims and declines.
pub const CLAIMS: &str = "pgmuster.claims";
/// Direct exchange and quorum queue of reports.
pub const REPORTS: &str = "pgmuster.reports";
/// Direct exchange and bounded, short-lived queue of heartbeats.
pub const PULSE: &str = "pgmuster.pulse";
/// Fan-out exchange of the coordinator's sign of life.
pub const BEACON: &str = "pgmuster.beacon";
/// Direct exchange of what is said to one worker; the routing key is its name.
pub const CONTROL: &str = "pgmuster.control";
/// Fan-out exchange that wakes the other coordinators.
pub const WAKE: &str = "pgmuster.wake";
/// Fan-out exchange and quorum queue of messages nobody could take.
pub const DEAD: &str = "pgmuster.dead";

/// Where tickets of one lane wait: for any worker of a site, or for one worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TicketQueue {
    /// Any worker of the site.
    Site(SiteName, Lane),
    /// One worker.
    Worker(WorkerName, Lane),
}

impl TicketQueue {
    /// The routing key at [`JOBS`].
    pub fn routing_key(&self) -> String {
        match self {
            Self::Site(site, lane) => format!("site.{site}.{lane}"),
            Self::Worker(worker, lane) => format!("worker.{worker}.{lane}"),
        }
    }
}

impl fmt::Display for TicketQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{JOBS}.{}", self.routing_key())
    }
}

/// The queue of a worker's control messages: grants, denials, cancels and beacons.
pub fn control_queue(worker: &WorkerName) -> String {
    format!("{CONTROL}.{worker}")
}

/// The queue on which one coordinator is woken; `coordinator` is a name like a worker's.
pub fn wake_queue(coordinator: &WorkerName) -> String {
    format!("{WAKE}.{coordinator}")
}
