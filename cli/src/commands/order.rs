//! Orders: backup, verify, maintain, restore through the queue.

use std::path::{Component, Path};

use coordinator::api::types::{ClusterView, JobView, SubmitRequest, WorkerView};
use proto::job::{self, Analyze, PgDump, RestoreTarget, Vacuum, VerifyRestore};
use proto::{Action, Code, Failure, ProofLevel, Task, WorkerName};

use crate::args::{Backup, EnableWal, Engine, Maintain, MaintenanceTask, Output, Restore, Verify};
use crate::client::Client;
use crate::commands::{cluster, moment};
use crate::exit::Exit;
use crate::{follow, output};

/// `backup CLUSTER`.
pub(crate) async fn backup(client: &Client, args: Backup, format: Output) -> Result<Exit, Failure> {
    let task = Task::Backup(task(&args)?);
    let request = SubmitRequest { verify: args.verify, ..SubmitRequest::new(args.cluster, task) };
    let view: JobView = client.post("/v1/jobs", &request).await?;
    follow::after_order(client, view, &args.waiting, format).await
}

/// What was asked for.
pub(crate) fn task(args: &Backup) -> Result<job::Backup, Failure> {
    Ok(job::Backup {
        fast_checkpoint: !args.spread_checkpoint,
        full_read: args.full_read,
        compression_level: None,
        processes: args.processes,
        rate_limit_bytes: args.rate_limit.map(|limit| limit.as_u64()),
        pg_dump: scope(args)?,
    })
}

/// Which databases a logical backup is of; `None` for a physical one, which has all of them.
fn scope(args: &Backup) -> Result<Option<PgDump>, Failure> {
    let scope =
        PgDump { databases: args.databases.clone(), exclude: args.exclude_databases.clone() };
    let refuse = |message: &str, hint: &str| {
        Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message).with_hint(hint))
    };
    match args.engine {
        Engine::Native if scope == PgDump::default() => Ok(None),
        Engine::Native => refuse(
            "a copy of a cluster's files has every database",
            "Add --engine pg_dump, or leave the names of databases out.",
        ),
        Engine::PgDump => Ok(Some(scope)),
    }
}

/// `verify CLUSTER`.
pub(crate) async fn verify(client: &Client, args: Verify, format: Output) -> Result<Exit, Failure> {
    let to = args.to.as_deref().map(moment::of_proof).transpose()?;
    let usual = if to.is_some() { VerifyRestore::LEVEL_BEYOND_MAX } else { ProofLevel::L5 };
    let task = VerifyRestore {
        backup: args.backup,
        level: args.level.unwrap_or(usual),
        to,
        heartbeats: None,
    };
    task.check().map_err(|what| Failure::new(Code::RequestInvalid, Action::FixConfig, what))?;
    let task = Task::VerifyRestore(task);
    let request = SubmitRequest::new(args.cluster, task);
    let view: JobView = client.post("/v1/jobs", &request).await?;
    follow::after_order(client, view, &args.waiting, format).await
}

/// `maintain CLUSTER`.
pub(crate) async fn maintain(
    client: &Client,
    args: Maintain,
    format: Output,
) -> Result<Exit, Failure> {
    let databases = (!args.databases.is_empty()).then_some(args.databases);
    let task = match args.task {
        MaintenanceTask::Analyze => {
            Task::Analyze(Analyze { databases, plan_only: args.plan, ..Analyze::default() })
        }
        MaintenanceTask::Vacuum => Task::Vacuum(Vacuum {
            databases,
            bloat_ratio_min: args.bloat_ratio,
            plan_only: args.plan,
            ..Vacuum::default()
        }),
    };
    let view: JobView = client.post("/v1/jobs", &SubmitRequest::new(args.cluster, task)).await?;
    let mut waiting = args.waiting;
    // A plan that nobody sees is no use.
    waiting.wait |= args.plan;
    follow::after_order(client, view, &waiting, format).await
}

/// `cluster enable-wal CLUSTER`.
pub(crate) async fn enable_wal(
    client: &Client,
    args: EnableWal,
    format: Output,
) -> Result<Exit, Failure> {
    let task = Task::EnableWal(job::EnableWal {
        archive_timeout_s: args.archive_timeout,
        replace: args.replace,
        plan_only: args.plan,
    });
    let view: JobView = client.post("/v1/jobs", &SubmitRequest::new(args.cluster, task)).await?;
    let mut waiting = args.waiting;
    waiting.wait |= args.plan;
    follow::after_order(client, view, &waiting, format).await
}

/// `restore CLUSTER --into DIR`.
pub(crate) async fn restore(
    client: &Client,
    args: Restore,
    format: Output,
) -> Result<Exit, Failure> {
    let recovery = moment::wanted(&args)?;
    let workers: Vec<WorkerView> = client.get("/v1/workers").await?;
    let into = args.into.as_deref().ok_or_else(|| Failure::bug("clap asks for a directory"))?;
    let (worker, target) = place(&workers, into, args.on.as_ref())?;
    let cluster = args.cluster.ok_or_else(|| {
        Failure::new(Code::RequestInvalid, Action::FixConfig, "no cluster was named")
            .with_hint("Write pgmuster restore CLUSTER --into DIR.")
    })?;
    let plan_only = args.plan;
    let (backup, delta, keep_archiving) = (args.backup, args.delta, args.moment.keep_archiving);
    let task =
        Task::Restore(job::Restore { backup, target, plan_only, delta, recovery, keep_archiving });
    let request =
        SubmitRequest { worker: Some(worker), ..SubmitRequest::new(cluster.clone(), task) };
    let view: JobView = client.post("/v1/jobs", &request).await?;
    let mut waiting = args.waiting;
    waiting.wait |= plan_only;
    let ended = follow::after_order(client, view, &waiting, format).await?;
    if plan_only && ended == Exit::Ok && format == Output::Table {
        let view: ClusterView = client.get(&format!("/v1/clusters/{cluster}")).await?;
        output::data(&cluster::time_of_recovery(&view));
    }
    Ok(ended)
}

/// Which worker restores into a directory: one with a restore root above it.
fn place(
    workers: &[WorkerView],
    into: &Path,
    on: Option<&WorkerName>,
) -> Result<(WorkerName, RestoreTarget), Failure> {
    let plain = into.is_absolute()
        && into.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !plain {
        let message = format!("{} is not an absolute path without . and ..", into.display());
        return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message)
            .with_hint("Give the whole path of the directory on the worker's host."));
    }
    let mut roots = Vec::new();
    for worker in workers.iter().filter(|w| w.alive && on.is_none_or(|on| w.name == *on)) {
        for root in worker.offers.iter().flat_map(|offers| &offers.restore_roots) {
            roots.push(format!("{root} on {}", worker.name));
            let Some(below) = into.strip_prefix(root).ok().and_then(Path::to_str) else { continue };
            if below.is_empty() {
                continue;
            }
            let directory = below.parse().map_err(|error| {
                Failure::new(Code::RequestInvalid, Action::FixConfig, format!("failed to {error}"))
                    .with_hint("Choose a plainer name for the directory.")
            })?;
            let target = RestoreTarget { root: root.clone(), directory };
            return Ok((worker.name.clone(), target));
        }
    }
    let roots = if roots.is_empty() { "none".to_owned() } else { roots.join(", ") };
    Err(Failure::new(
        Code::TargetOutsideRoots,
        Action::FixConfig,
        format!("{} is below no restore root of a living worker", into.display()),
    )
    .with_hint(format!("Restore roots are: {roots}. A worker's are in its allow.restore_roots.")))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn asked(options: &str) -> job::Backup {
        let line = format!("pgmuster backup orders {options}");
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Backup(args) = cli.command else { panic!("{line}") };
        task(&args).unwrap()
    }

    #[test]
    fn a_backup_is_ordered_as_its_options_say() {
        let usual = job::Backup { fast_checkpoint: true, ..job::Backup::default() };
        assert_eq!(asked(""), usual);
        assert_eq!(asked("--spread-checkpoint"), job::Backup::default());
        assert_eq!(asked("--full-read"), job::Backup { full_read: true, ..usual.clone() });
        assert_eq!(
            asked("--processes 3 --rate-limit 50MiB"),
            job::Backup { processes: Some(3), rate_limit_bytes: Some(50 << 20), ..usual }
        );
    }
}
