//! What a worker tells of an attempt.

use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::step::Step;
use crate::{AttemptId, BootId, JobId, Outcome, WorkerName};

/// One report. Signed by the worker; applied once, by (attempt, token, seq), and never backwards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: AttemptId,
    /// The token of its grant.
    pub token: u64,
    /// Who.
    pub worker: WorkerName,
    /// Which life.
    pub boot: BootId,
    /// 1, 2, … within the attempt.
    pub seq: u64,
    /// Worker's clock.
    pub at_ms: i64,
    /// What there is to say.
    pub body: ReportBody,
}

/// What there is to say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReportBody {
    /// The grant arrived and the work begins.
    Started,
    /// A step began or ended.
    Step(Step),
    /// It worked. Every step once more, so that lost step reports do no harm.
    Succeeded {
        /// What it has to say.
        outcome: Box<Outcome>,
        /// All steps, in order.
        steps: Vec<Step>,
    },
    /// It did not work.
    Failed {
        /// Why, and what to do.
        failure: Failure,
        /// What was found all the same (a failed proof has its record).
        #[serde(default)]
        outcome: Option<Box<Outcome>>,
        /// All steps, in order.
        steps: Vec<Step>,
    },
}
