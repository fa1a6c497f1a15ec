//! The backup that a gap asks for: behind it nothing that is archived counts until another backup leads on from there, so one
//! is ordered at once, and again after a while as long as that did not help.

use std::collections::HashMap;

use policy::broken::in_the_way;
use policy::reach::needs_backup;
use proto::job::{Backup, JobKind, JobState, Task};
use proto::{ClusterName, ProofLevel};
use tokio_util::sync::CancellationToken;

use crate::api::types::SubmitRequest;
use crate::catalog::{backups, clusters, jobs};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::fleet::backup_end;
use crate::order;

/// How often archives are looked at.
const LOOK_EVERY_MS: i64 = 10_000;
/// How long until another backup is ordered for the same gap.
const AGAIN_MS: i64 = 6 * 3_600_000;
/// Who orders.
const ORDERED_BY: &str = "coordinator";

/// Looks again and again until the term ends.
pub(crate) async fn run(core: &Core, over: &CancellationToken) -> Result<()> {
    if !core.config.jobs.backup_behind_gaps {
        over.cancelled().await;
        return Ok(());
    }
    loop {
        tokio::select! {
            () = over.cancelled() => return Ok(()),
            () = core.clock.sleep_until(core.now_ms() + LOOK_EVERY_MS) => {}
        }
        for Gap { cluster, key, proof } in gaps(core).await? {
            let task = Task::Backup(Backup { fast_checkpoint: true, ..Backup::default() });
            let request = SubmitRequest { verify: proof, ..SubmitRequest::new(cluster, task) };
            match order::submit(core, &request, Some(&key), ORDERED_BY).await {
                Ok(_) => {}
                Err(Error::Refused(failure)) => tracing::warn!("No backup behind a gap: {failure}"),
                Err(error) => return Err(error),
            }
        }
    }
}

/// A cluster that needs another backup and waits for none.
struct Gap {
    cluster: ClusterName,
    /// For what it needs it.
    key: String,
    /// How far its newest backup was to be proved, if it was.
    proof: Option<ProofLevel>,
}

async fn gaps(core: &Core) -> Result<Vec<Gap>> {
    let mut db = core.catalog.read().await?;
    let newest = backups::newest(&mut db, "").await?.into_iter();
    let newest: HashMap<ClusterName, _> = newest
        .filter_map(|backup| Some((backup.cluster.clone(), (backup_end(&backup)?, backup.id))))
        .collect();
    let proofs = backups::newest_proofs(&mut db, "").await?;
    let mut gaps = Vec::new();
    for cluster in clusters::list(&mut db).await? {
        let Some((backup, id)) = newest.get(&cluster.name) else { continue };
        let wal = cluster.wal.as_ref();
        // WAL that cannot be replayed is a gap, too, also where nobody tells of the archive.
        let begins = match in_the_way(&cluster.broken_wal, backup, wal) {
            Some(stretch) => Some((stretch.timeline, stretch.to)),
            None => {
                wal.filter(|wal| needs_backup(backup, wal)).map(|wal| (wal.timeline, wal.line_from))
            }
        };
        if let Some((timeline, from)) = begins.filter(|_| !cluster.paused) {
            let turn = core.now_ms() / AGAIN_MS;
            let lineage = wal.map(|wal| wal.lineage.to_string()).unwrap_or_default();
            let key = format!("gap/{}/{lineage}/{timeline}/{from}/{turn}", cluster.name);
            let of_it = proofs.iter().filter(|row| row.proof.backup == *id);
            let proof = of_it.map(|row| row.proof.asked()).max();
            gaps.push(Gap { cluster: cluster.name, key, proof });
        }
    }
    if gaps.is_empty() {
        return Ok(gaps);
    }
    for state in [JobState::Running, JobState::Cancelling, JobState::Queued, JobState::Waiting] {
        for job in jobs::in_state(&mut db, state).await? {
            gaps.retain(|gap| job.kind() != JobKind::Backup || job.cluster != gap.cluster);
        }
    }
    Ok(gaps)
}
