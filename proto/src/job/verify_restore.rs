//! Prove a backup by restoring it.

use serde::{Deserialize, Serialize};

use crate::proof::{Proof, ProofLevel};
use crate::{ArchivedHeartbeats, BackupId, RecoveryTarget};

/// Parameters of a proof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyRestore {
    /// The backup; the newest committed one of the cluster when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupId>,
    /// How far to go.
    pub level: ProofLevel,
    /// Replay archived WAL to a moment behind the end of the backup. Left out when absent, so that a worker that does not know it
    /// still proves backups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<ProofTarget>,
    /// Heartbeats of the cluster: a restored server must have those before its moment, and none behind it. The coordinator fills
    /// them in when it gives the job out, and replaces whatever an order says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeats: Option<ArchivedHeartbeats>,
}

impl VerifyRestore {
    /// The highest level of a proof that goes beyond its backup: what was counted when that was taken says nothing of later.
    pub const LEVEL_BEYOND_MAX: ProofLevel = ProofLevel::L4;

    /// What contradicts itself, for people.
    pub fn check(&self) -> Result<(), &'static str> {
        let Some(to) = &self.to else { return Ok(()) };
        if *to == ProofTarget::At(RecoveryTarget::Immediate) {
            return Err("a proof reaches the end of its backup by itself: leave --to away");
        }
        if self.level < ProofLevel::L3 {
            return Err(
                "nothing is replayed below level 3: leave --to away, or choose level 3 or 4",
            );
        }
        if self.level > Self::LEVEL_BEYOND_MAX {
            return Err(
                "levels 5 and 6 are of the content when the backup was taken, and so cannot go beyond it: choose level 3 or 4",
            );
        }
        Ok(())
    }
}

/// To which moment archived WAL is replayed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProofTarget {
    /// To this one.
    At(RecoveryTarget),
    /// To a position between the end of the backup and the newest that can be reached, each as likely as any other.
    Random,
}

/// What a proof found. A proof that found damage is a *finished* job with `proof.passed == false` only where the checks
/// ran to their end; the job then fails with `PROOF_FAILED` and carries the same record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerifyRestoreOutcome {
    /// The record, as it is stored (signed) with the backup.
    pub proof: Proof,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_proof_beyond_its_backup_cannot_show_is_refused() {
        let task = |level, to| VerifyRestore { backup: None, level, to, heartbeats: None };
        let latest = || Some(ProofTarget::At(RecoveryTarget::Latest));
        assert_eq!(task(ProofLevel::L5, None).check(), Ok(()));
        assert_eq!(task(ProofLevel::L4, latest()).check(), Ok(()));
        assert_eq!(task(ProofLevel::L3, Some(ProofTarget::Random)).check(), Ok(()));
        let at_end = Some(ProofTarget::At(RecoveryTarget::Immediate));
        for wrong in [
            task(ProofLevel::L5, latest()),
            task(ProofLevel::L6, latest()),
            task(ProofLevel::L2, latest()),
            task(ProofLevel::L4, at_end),
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_worker_that_knows_no_moment_still_reads_a_proof_without_one() {
        let plain =
            VerifyRestore { backup: None, level: ProofLevel::L5, to: None, heartbeats: None };
        assert_eq!(serde_json::to_string(&plain).unwrap(), r#"{"level":"L5"}"#);
        let random =
            VerifyRestore { to: Some(ProofTarget::Random), level: ProofLevel::L4, ..plain };
        let text = serde_json::to_string(&random).unwrap();
        assert_eq!(text, r#"{"level":"L4","to":"random"}"#);
        assert_eq!(serde_json::from_str::<VerifyRestore>(&text).unwrap(), random);
    }
}
