//! Look for evidence of another attempt.

use serde::{Deserialize, Serialize};

use crate::AttemptId;

/// Parameters of a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// The attempt that is silent.
    pub attempt: AttemptId,
    /// End its sessions on the server as well.
    #[serde(default)]
    pub terminate: bool,
}

/// What a probe saw. `None` means that this worker could not look there.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ProbeOutcome {
    /// Sessions of the attempt on the target server, by their application name.
    #[serde(default)]
    pub sessions: Option<u32>,
    /// How many of them were told to end.
    #[serde(default)]
    pub terminated: u32,
    /// The attempt's verdict in the repository.
    #[serde(default)]
    pub verdict: Option<SeenVerdict>,
}

/// An attempt's verdict as a probe read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeenVerdict {
    /// No such attempt in the repository.
    Unknown,
    /// The attempt began and nothing is decided.
    Open,
    /// The backup exists.
    Commit,
    /// The backup will never exist.
    Abort,
}
