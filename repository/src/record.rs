//! The notes of a lineage: identity, intent, verdict, and what the collector of garbage leaves. Data only.

use proto::{AttemptId, BackupId, BackupKind, ClusterName, LineageId, SystemIdentifier};
use serde::{Deserialize, Serialize};

use crate::manifest::Counts;

/// Who a lineage is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The lineage.
    pub lineage: LineageId,
    /// The cluster's name when it was minted.
    pub cluster: ClusterName,
    /// The system identifier every backup of it has.
    pub system_identifier: SystemIdentifier,
    /// Counts the lineages of this cluster, system identifier and kind, from 0.
    pub generation: u32,
    /// What every backup of it is. Not written when physical.
    #[serde(default, skip_serializing_if = "BackupKind::is_physical")]
    pub kind: BackupKind,
    /// Unix milliseconds.
    pub created_at_ms: i64,
}

/// An attempt has begun. Written before anything else of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// The attempt.
    pub attempt: AttemptId,
    /// The attempt it follows, when it is a repetition.
    #[serde(default)]
    pub follows: Option<AttemptId>,
    /// Who works on it: worker and boot, for people.
    pub by: String,
    /// The writer's clock, Unix milliseconds.
    pub began_at_ms: i64,
}

/// The end of an attempt. Created once, never replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The attempt.
    pub attempt: AttemptId,
    /// Which.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Who decided.
    pub by: String,
    /// Their clock, Unix milliseconds.
    pub at_ms: i64,
    /// Where it stands among the others of its lineage, when that is not where `at_ms` would put it: behind every backup that was
    /// there when it began, whatever the clocks said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order_ms: Option<i64>,
}

impl Verdict {
    /// What backups of a lineage are sorted by.
    pub(crate) fn order_ms(&self) -> i64 {
        self.order_ms.unwrap_or(self.at_ms)
    }
}

/// COMMIT or ABORT.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "UPPERCASE")]
pub enum Outcome {
    /// The attempt is a backup.
    Commit {
        /// Bytes of its manifest.
        manifest_bytes: u64,
        /// Digest of its manifest, hexadecimal.
        manifest_blake3: String,
        /// How much it is.
        counts: Counts,
    },
    /// The attempt will never be a backup.
    Abort {
        /// Why.
        why: String,
    },
}

impl Outcome {
    /// As it stands in the verdict.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Commit { .. } => "COMMIT",
            Self::Abort { .. } => "ABORT",
        }
    }
}

/// What a collector is about to delete.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Condemned {
    pub(crate) packs: Vec<String>,
    /// Backups whose manifest and proofs go.
    #[serde(default)]
    pub(crate) backups: Vec<BackupId>,
    #[serde(default)]
    pub(crate) by: String,
    /// The collector's clock, Unix milliseconds.
    #[serde(default)]
    pub(crate) at_ms: i64,
}

/// A check found the bytes of a pack to be wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// Who checked, for people.
    pub(crate) by: String,
    /// What was wrong.
    pub(crate) why: String,
    /// Their clock, Unix milliseconds.
    pub(crate) at_ms: i64,
}

/// A backup's manifest was about to be deleted by a collector: that it is missing is no damage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Gone {
    pub(crate) run: String,
    pub(crate) by: String,
    pub(crate) at_ms: i64,
}

/// A collection may have deleted the archived WAL of a timeline below a segment, which the object's name tells. For people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Floor {
    /// Who collected.
    pub(crate) by: String,
    /// Which backup was the oldest, and where it begins.
    pub(crate) why: String,
    /// Their clock, Unix milliseconds.
    pub(crate) at_ms: i64,
}

/// Somebody reads a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// Who reads.
    pub by: String,
    /// What for: `restore`, `proof`, `copy`.
    pub why: String,
    /// Their clock when they began, Unix milliseconds.
    pub at_ms: i64,
}

/// Somebody's wish about a backup: that it goes (`forget`), that this is taken back (`remember`), that it stays (`hold`), that
/// this is over (`release`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// Who wishes it.
    pub by: String,
    /// Why, for people.
    pub why: String,
    /// Their clock, Unix milliseconds.
    pub at_ms: i64,
}
