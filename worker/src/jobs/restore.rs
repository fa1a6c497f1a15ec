//! Restores a backup into a directory below one of the worker's restore roots.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::job::{Restore, RestoreOutcome, RestoreTarget};
use proto::{Action, Code, Failure};
use repository::{Backup, Pin};

use crate::clock;
use crate::config::{RepositoryConfig, WorkerConfig};
use crate::context::JobContext;
use crate::places::Places;
use crate::recovering::{self, FetchFrom, Fetching, RecoveryPlan, Wanted};
use crate::restoring::{self, Destination};

/// Runs a restore, or says what it would do.
pub(crate) async fn run(
    cx: &JobContext,
    places: &Arc<Places>,
    config: &WorkerConfig,
    task: &Restore,
) -> Result<RestoreOutcome, Failure> {
    task.check().map_err(|what| Failure::new(Code::RequestInvalid, Action::FixConfig, what))?;
    let given = destination(config, task)?;
    let pin = Pin { by: config.name.to_string(), why: "restore".into(), at_ms: clock::now_ms() };
    let (backup, recovery) = cx
        .step("find", async {
            let place = places.place_for(&cx.spec.cluster)?;
            let repository = place.open().await?;
            let (cluster, system_identifier) = (Some(&cx.spec.cluster), cx.spec.system_identifier);
            let Some(recovery) = &task.recovery else {
                let found = restoring::find_pinned(
                    &repository,
                    cluster,
                    system_identifier,
                    task.backup,
                    &pin,
                );
                return Ok((found.await?, None));
            };
            let backup = task.backup;
            let wanted = Wanted { cluster, system_identifier, backup, rehearses: false, recovery };
            let fetching = fetching(&place.config)?;
            let (backup, plan) = recovering::plan(&repository, wanted, &fetching, &pin).await?;
            Ok((backup, Some(plan)))
        })
        .await?;
    let restored = restore(cx, places, config, task, given, &backup, recovery.as_ref()).await;
    backup.release().await;
    restored.map(|done| match &recovery {
        Some(plan) => plan.tell(done),
        None => done,
    })
}

async fn restore(
    cx: &JobContext,
    places: &Arc<Places>,
    config: &WorkerConfig,
    task: &Restore,
    given: Destination,
    backup: &Backup,
    recovery: Option<&RecoveryPlan>,
) -> Result<RestoreOutcome, Failure> {
    let settings = recovery.map(|plan| plan.settings.clone());
    let given = Destination { recovery: settings, ..given };
    let destination = given.complete(backup.facts());
    // Those beside the directory for the first time; of one that was placed once more, because links may have changed since.
    for (oid, place) in &destination.tablespaces {
        let root = task.tablespaces.get(oid).map_or(&task.target.root, |placed| &placed.root);
        below_root(config, root, place)?;
    }
    if task.plan_only {
        let plan = restoring::plan(cx, backup, &destination, config.backup.processes);
        return cx.step("plan", plan).await;
    }
    let starter = match recovery.filter(|plan| plan.starts) {
        Some(plan) => {
            let bin_dirs: Vec<PathBuf> =
                config.sandbox.postgres_bin_dirs.iter().map(PathBuf::from).collect();
            let archive = Arc::new(Arc::clone(places));
            Some(plan.starter(backup, &bin_dirs, Vec::new(), archive, task.delta).await?)
        }
        None => None,
    };
    let to = &destination;
    let done = cx.step_with("restore", |step| async move {
        let done = restoring::restore(cx, backup, to, config.backup.processes).await?;
        step.figure("written_bytes", done.size_bytes);
        step.figure("fetched_bytes", done.fetched_bytes);
        step.figure("reused_bytes", done.reused_bytes);
        Ok(done)
    });
    let done = done.await?;
    match starter {
        Some(starter) => cx.step("start", starter.start(cx, &destination, done)).await,
        None => Ok(done),
    }
}

/// How the restored server will call this program: with the references of this worker's configuration.
fn fetching(config: &RepositoryConfig) -> Result<Fetching, Failure> {
    let (option, reference) = config.opener()?;
    if config.access_key_id.is_some() {
        let what = format!(
            "the restored server cannot fetch WAL: the credentials of repository {} are in the worker's configuration only",
            config.name
        );
        return Err(Failure::new(Code::NotAllowed, Action::FixConfig, what).with_hint(format!(
            "Give the host credentials by the standard AWS chain, or restore without a coordinator: `pgmuster restore --repository '{}' \
             --key FILE --into DIR`.",
            config.url
        )));
    }
    let opener = [option.to_owned(), reference.to_string()];
    let from = FetchFrom::Repository(config.url.clone(), opener);
    Ok(Fetching { program: recovering::this_program()?, from })
}

/// What the order says of where everything goes, if the worker's own configuration allows it.
fn destination(config: &WorkerConfig, task: &Restore) -> Result<Destination, Failure> {
    let data_directory = allowed(config, &task.target)?;
    let mut tablespaces = BTreeMap::new();
    for (oid, place) in &task.tablespaces {
        tablespaces.insert(*oid, allowed(config, place)?);
    }
    Ok(Destination {
        data_directory,
        tablespaces,
        delta: task.delta,
        believe_cache: false,
        recovery: None,
        keep_archiving: task.keep_archiving,
    })
}

/// The directory, if the worker's own configuration allows it.
fn allowed(config: &WorkerConfig, place: &RestoreTarget) -> Result<PathBuf, Failure> {
    let root = &place.root;
    let known = config.allow.restore_roots.iter().any(|allowed| allowed.as_str() == root);
    if !known {
        return Err(outside(config, format!("{root} is no restore root of this worker")));
    }
    let resolved = std::fs::canonicalize(root).map_err(|error| {
        outside(config, format!("the restore root {root} cannot be used: {error}"))
    })?;
    let directory = resolved.join(place.directory.as_str());
    below_root(config, root, &directory)?;
    Ok(directory)
}

/// Makes sure that a path leads below a root. Links are resolved as far as it exists, so that one below the root cannot
/// lead out of it; one that leads nowhere is refused, because what it leads to may be made at any moment.
fn below_root(config: &WorkerConfig, root: &str, path: &Path) -> Result<(), Failure> {
    let resolve = |place: &Path| {
        std::fs::canonicalize(place).map_err(|error| {
            outside(config, format!("{} cannot be used: {error}", place.display()))
        })
    };
    let existing =
        path.ancestors().find(|place| place.symlink_metadata().is_ok()).unwrap_or(Path::new("/"));
    let (resolved, root) = (resolve(existing)?, resolve(Path::new(root))?);
    if resolved.starts_with(root) {
        return Ok(());
    }
    Err(outside(config, format!("{} leads to {}", path.display(), resolved.display())))
}

fn outside(config: &WorkerConfig, what: String) -> Failure {
    let roots: Vec<&str> = config.allow.restore_roots.iter().map(|root| root.as_str()).collect();
    let roots = if roots.is_empty() { "none".to_owned() } else { roots.join(", ") };
    Failure::new(Code::TargetOutsideRoots, Action::FixConfig, what).with_hint(format!(
        "This worker may restore below: {roots} (allow.restore_roots in its configuration)."
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(root: &Path) -> WorkerConfig {
        let text = format!(
            "name = \"w\"\nsite = \"s\"\nstate_dir = \"/s\"\nbroker = {{ url = \"file:/u\" }}\n\
             sandbox = {{ directory = \"/tmp\" }}\nallow = {{ restore_roots = [{:?}] }}\n",
            root.display()
        );
        toml::from_str(&text).unwrap()
    }

    fn place(root: &Path, directory: &str) -> RestoreTarget {
        RestoreTarget { root: root.display().to_string(), directory: directory.parse().unwrap() }
    }

    #[test]
    fn a_link_below_a_root_does_not_lead_out_of_it() {
        let temporary = tempfile::tempdir().unwrap();
        let root = temporary.path().join("root");
        std::fs::create_dir_all(root.join("inside")).unwrap();
        std::os::unix::fs::symlink(temporary.path(), root.join("out")).unwrap();
        let config = config(&root);
        let inside = Restore::at(place(&root, "inside/new"));
        assert!(destination(&config, &inside).unwrap().tablespaces.is_empty());
        // The same for a tablespace as for the directory.
        for (root, directory) in [(&*root, "out/new"), (temporary.path(), "root/inside")] {
            let tablespaces = BTreeMap::from([(7, place(root, directory))]);
            for outside in
                [Restore::at(place(root, directory)), Restore { tablespaces, ..inside.clone() }]
            {
                let refused = destination(&config, &outside).unwrap_err();
                assert_eq!(refused.code, Code::TargetOutsideRoots, "{outside:?}");
                assert!(refused.hint.contains("root"), "{refused:?}");
            }
        }
        let tablespaces = BTreeMap::from([(7, place(&root, "inside/seven"))]);
        let given = destination(&config, &Restore { tablespaces, ..inside }).unwrap();
        assert!(given.tablespaces[&7].ends_with("root/inside/seven"), "{given:?}");
    }
}
