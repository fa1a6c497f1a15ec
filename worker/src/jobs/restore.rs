//! Restores a backup into a directory below one of the worker's restore roots.

use std::path::{Path, PathBuf};

use proto::job::{Restore, RestoreOutcome};
use proto::{Action, Code, Failure};
use repository::{Backup, Pin};

use crate::clock;
use crate::config::WorkerConfig;
use crate::context::JobContext;
use crate::places::Places;
use crate::restoring::{self, Destination};

/// Runs a restore, or says what it would do.
pub(crate) async fn run(
    cx: &JobContext,
    places: &Places,
    config: &WorkerConfig,
    task: &Restore,
) -> Result<RestoreOutcome, Failure> {
    if task.recovery.is_some() {
        let what = "this worker restores to the end of a backup and no further";
        return Err(Failure::new(Code::JobUnsupported, Action::RetryElsewhere, what));
    }
    let directory = target(config, task)?;
    let pin = Pin { by: config.name.to_string(), why: "restore".into(), at_ms: clock::now_ms() };
    let backup = cx
        .step("find", async {
            let repository = places.repository_for(&cx.spec.cluster).await?;
            let (cluster, identifier) = (Some(&cx.spec.cluster), cx.spec.system_identifier);
            restoring::find_pinned(repository, cluster, identifier, task.backup, &pin).await
        })
        .await?;
    let restored = restore(cx, config, task, &directory, &backup).await;
    backup.release().await;
    restored
}

async fn restore(
    cx: &JobContext,
    config: &WorkerConfig,
    task: &Restore,
    directory: &Path,
    backup: &Backup,
) -> Result<RestoreOutcome, Failure> {
    let below = Destination::below(directory, backup.facts());
    let destination = Destination { delta: task.delta, ..below };
    for place in destination.tablespaces.values() {
        below_root(config, &task.target.root, place)?;
    }
    if task.plan_only {
        let plan = restoring::plan(cx, backup, &destination, config.backup.processes);
        return cx.step("plan", plan).await;
    }
    cx.step_with("restore", |step| async move {
        let done = restoring::restore(cx, backup, &destination, config.backup.processes).await?;
        step.figure("written_bytes", done.size_bytes);
        step.figure("fetched_bytes", done.fetched_bytes);
        step.figure("reused_bytes", done.reused_bytes);
        Ok(done)
    })
    .await
}

/// The directory, if the worker's own configuration allows it.
fn target(config: &WorkerConfig, task: &Restore) -> Result<PathBuf, Failure> {
    let root = &task.target.root;
    let known = config.allow.restore_roots.iter().any(|allowed| allowed.as_str() == root);
    if !known {
        return Err(outside(config, format!("{root} is no restore root of this worker")));
    }
    let resolved = std::fs::canonicalize(root).map_err(|error| {
        outside(config, format!("the restore root {root} cannot be used: {error}"))
    })?;
    let directory = resolved.join(task.target.directory.as_str());
    below_root(config, root, &directory)?;
    Ok(directory)
}

/// Makes sure that a path leads below a root. Links are resolved as far as it exists, so that one below the root cannot
/// lead out of it.
fn below_root(config: &WorkerConfig, root: &str, path: &Path) -> Result<(), Failure> {
    let resolve = |place: &Path| {
        std::fs::canonicalize(place).map_err(|error| {
            outside(config, format!("{} cannot be used: {error}", place.display()))
        })
    };
    let existing = path.ancestors().find(|place| place.exists()).unwrap_or(Path::new("/"));
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
    use proto::job::RestoreTarget;

    use super::*;

    fn config(root: &Path) -> WorkerConfig {
        let text = format!(
            "name = \"w\"\nsite = \"s\"\nstate_dir = \"/s\"\nbroker = {{ url = \"file:/u\" }}\n\
             sandbox = {{ directory = \"/tmp\" }}\nallow = {{ restore_roots = [{:?}] }}\n",
            root.display()
        );
        toml::from_str(&text).unwrap()
    }

    fn task(root: &Path, directory: &str) -> Restore {
        let target = RestoreTarget {
            root: root.display().to_string(),
            directory: directory.parse().unwrap(),
        };
        Restore { backup: None, target, plan_only: false, delta: false, recovery: None }
    }

    #[test]
    fn a_link_below_a_root_does_not_lead_out_of_it() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("root");
        std::fs::create_dir_all(root.join("inside")).unwrap();
        std::os::unix::fs::symlink(place.path(), root.join("out")).unwrap();
        let config = config(&root);
        assert!(target(&config, &task(&root, "inside/new")).is_ok());
        let refused = target(&config, &task(&root, "out/new")).unwrap_err();
        assert_eq!(refused.code, Code::TargetOutsideRoots);
        let other = target(&config, &task(place.path(), "root/inside")).unwrap_err();
        assert_eq!(other.code, Code::TargetOutsideRoots);
        assert!(other.hint.contains("root"));
    }
}
