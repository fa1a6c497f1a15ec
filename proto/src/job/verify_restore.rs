//! Prove a backup by restoring it.

use serde::{Deserialize, Serialize};

use crate::BackupId;
use crate::proof::{Proof, ProofLevel};

/// Parameters of a proof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyRestore {
    /// The backup; the newest committed one of the cluster when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupId>,
    /// How far to go.
    pub level: ProofLevel,
}

/// What a proof found. A proof that found damage is a *finished* job with `proof.passed == false` only where the checks
/// ran to their end; the job then fails with `PROOF_FAILED` and carries the same record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerifyRestoreOutcome {
    /// The record, as it is stored (signed) with the backup.
    pub proof: Proof,
}
