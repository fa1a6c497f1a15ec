//! Proves a backup and stores the signed record with it.

use postgres::checks::Assertion;
use proto::backup::Forbidden;
use proto::envelope::Credentials;
use proto::job::{VerifyRestore, VerifyRestoreOutcome};
use proto::{Action, ClusterName, Code, Failure, Outcome, Proof, ProofLevel};
use repository::{Pin, Repository};

use crate::attempt::Ended;
use crate::beyond::{Beyond, Whom};
use crate::clock;
use crate::config::{ClusterConfig, WorkerConfig};
use crate::context::JobContext;
use crate::engines::native;
use crate::places::Places;
use crate::proving::{self, Moment, Workshop};
use crate::restoring;

/// Runs a proof. One that found damage fails the job, and its record goes along.
pub(crate) async fn run(
    cx: &JobContext,
    places: &Places,
    config: &WorkerConfig,
    credentials: &Credentials,
    task: &VerifyRestore,
) -> Ended {
    match proof(cx, places, config, credentials, task).await {
        Err(failure) => Ended { result: Err(failure), found: None },
        Ok((proof, forbidden)) => {
            let shortfall = proving::shortfall(&proof, forbidden.as_ref());
            let outcome = Outcome::VerifyRestore(VerifyRestoreOutcome { proof });
            match shortfall {
                None => Ended { result: Ok(outcome), found: None },
                Some(failure) => Ended { result: Err(failure), found: Some(outcome) },
            }
        }
    }
}

async fn proof(
    cx: &JobContext,
    places: &Places,
    config: &WorkerConfig,
    credentials: &Credentials,
    task: &VerifyRestore,
) -> Result<(Proof, Option<Forbidden>), Failure> {
    task.check().map_err(|what| Failure::new(Code::RequestInvalid, Action::FixConfig, what))?;
    let assertions = if task.level >= ProofLevel::L6 {
        assertions_of(config, &cx.spec.cluster)?
    } else {
        Vec::new()
    };
    let (repository, backup, mut beyond) = cx
        .step("find", async {
            let repository = places.repository_for(&cx.spec.cluster).await?;
            let identifier = cx.spec.system_identifier;
            let pin = Pin {
                by: config.name.to_string(),
                why: "proof".to_owned(),
                at_ms: clock::now_ms(),
            };
            if let Some(target) = &task.to {
                let whom = Whom {
                    cluster: &cx.spec.cluster,
                    system_identifier: identifier,
                    backup: task.backup,
                    attempt: cx.spec.attempt,
                };
                let room = proving::room(cx, config.sandbox.directory.as_std_path()).await?;
                let (backup, beyond) = Beyond::find(&repository, whom, target, &pin, room).await?;
                return Ok((repository, backup, Some(beyond)));
            }
            let cluster = Some(&cx.spec.cluster);
            let backup = restoring::find_pinned_to_prove(
                &repository,
                cluster,
                identifier,
                task.backup,
                &pin,
            )
            .await?;
            Ok((repository, backup, None))
        })
        .await?;
    let is_loaded = backup.facts().logical.is_some() && task.level >= ProofLevel::L3;
    if is_loaded && !config.allow.load_dumps {
        backup.release().await;
        let what = format!("worker {} may not load dumps", config.name);
        return Err(Failure::new(Code::SandboxUnfit, Action::FixConfig, what).with_hint(
            "Loading a dump runs the code in it under the account of the sandbox's server. Where everybody who may make functions in \
             the dumped databases is trusted with that account, set allow.load_dumps = true in the worker's configuration; \
             --level 2 reads the dump without loading it.",
        ));
    }
    let workshop = Workshop {
        worker: config.name.clone(),
        directory: config.sandbox.directory.as_std_path(),
        bin_dirs: native::bin_dirs(config),
        processes: config.backup.processes,
        assertions,
    };
    let proved = async {
        let heartbeats = task.heartbeats.as_ref();
        let heartbeats = heartbeats.filter(|archived| archived.lineage == backup.lineage());
        let heartbeats = heartbeats.map_or(&[][..], |archived| archived.known.as_slice());
        let moment = Moment { beyond: beyond.as_mut(), heartbeats };
        let proof = proving::prove_to(cx, &workshop, &backup, task.level, moment).await?;
        store(cx, &repository, credentials, &proof).await?;
        let census = backup.facts().census.as_ref();
        Ok((proof, census.and_then(|census| census.forbidden.clone())))
    };
    let proved = proved.await;
    backup.release().await;
    proved
}

/// What this worker's configuration asserts of the cluster: there is nothing else that L6 could ask.
fn assertions_of(config: &WorkerConfig, cluster: &ClusterName) -> Result<Vec<Assertion>, Failure> {
    let assertions = config.cluster(cluster).map(ClusterConfig::assertions).unwrap_or_default();
    if assertions.is_empty() {
        let worker = &config.name;
        let what = format!("the configuration of worker {worker} asserts nothing of {cluster}");
        return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, what).with_hint(
            "Level 6 asks what the worker's configuration has under [[clusters.assertions]] of the cluster (docs/concepts.md): write \
             assertions there and restart the worker, or ask for --level 5.",
        ));
    }
    Ok(assertions)
}

/// The record goes beside the backup, also when it is a bad one: it must not be forgotten that this backup failed.
async fn store(
    cx: &JobContext,
    repository: &Repository,
    credentials: &Credentials,
    proof: &Proof,
) -> Result<(), Failure> {
    cx.step("store_proof", async {
        let bytes =
            serde_json::to_vec(&credentials.sign(proof)).expect("a signed proof is plain JSON");
        repository.add_proof(proof.lineage, proof.backup, bytes.into()).await?;
        Ok(())
    })
    .await
}
