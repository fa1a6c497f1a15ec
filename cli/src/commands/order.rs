//! Orders: backup, verify, maintain, restore through the queue.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use coordinator::api::types::{ClusterView, JobView, SubmitRequest, WorkerView};
use proto::job::{self, Analyze, PgDump, RestoreTarget, Vacuum, VerifyRestore};
use proto::{Action, Code, Failure, ProofLevel, Task, WorkerName};

use crate::args::{Backup, EnableWal, Engine, Maintain, MaintenanceTask, Output, Restore, Verify};
use crate::client::Client;
use crate::commands::{backups, cluster, moment};
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
    let backup = match &args.backup {
        Some(typed) => Some(backups::meant(client, &args.cluster, typed).await?),
        None => None,
    };
    let task = VerifyRestore { backup, level: args.level.unwrap_or(usual), to, heartbeats: None };
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
    let Placed { worker, target, tablespaces } =
        place(&workers, into, &args.tablespace, args.on.as_ref())?;
    let cluster = args.cluster.ok_or_else(|| {
        Failure::new(Code::RequestInvalid, Action::FixConfig, "no cluster was named")
            .with_hint("Write pgmuster restore CLUSTER --into DIR.")
    })?;
    let backup = match &args.backup {
        Some(typed) => Some(backups::meant(client, &cluster, typed).await?),
        None => None,
    };
    let plan_only = args.plan;
    let restore = job::Restore {
        backup,
        target,
        plan_only,
        delta: args.delta,
        recovery,
        keep_archiving: args.moment.keep_archiving,
        tablespaces,
    };
    restore.check().map_err(|what| Failure::new(Code::RequestInvalid, Action::FixConfig, what))?;
    let task = Task::Restore(restore);
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

/// Who restores, and to where.
#[derive(Debug)]
struct Placed {
    worker: WorkerName,
    target: RestoreTarget,
    tablespaces: BTreeMap<u32, RestoreTarget>,
}

/// Which worker restores into a directory: one with restore roots above it and above what was said of tablespaces.
fn place(
    workers: &[WorkerView],
    into: &Path,
    tablespaces: &[(u32, PathBuf)],
    on: Option<&WorkerName>,
) -> Result<Placed, Failure> {
    let every = [into].into_iter().chain(tablespaces.iter().map(|(_, place)| place.as_path()));
    for path in every {
        plain(path)?;
    }
    let (mut roots, mut outside) = (Vec::new(), into);
    for worker in workers.iter().filter(|w| w.alive && on.is_none_or(|on| w.name == *on)) {
        let own = worker.offers.as_ref().map_or(&[][..], |offers| &offers.restore_roots);
        roots.extend(own.iter().map(|root| format!("{root} on {}", worker.name)));
        let Some(target) = below(own, into)? else { continue };
        let mut places = BTreeMap::new();
        for (oid, path) in tablespaces {
            let Some(place) = below(own, path)? else {
                outside = path;
                break;
            };
            places.insert(*oid, place);
        }
        if places.len() == tablespaces.len() {
            return Ok(Placed { worker: worker.name.clone(), target, tablespaces: places });
        }
    }
    let roots = if roots.is_empty() { "none".to_owned() } else { roots.join(", ") };
    let worker = if outside == into {
        "a living worker"
    } else {
        "a worker that has one above the directory"
    };
    Err(Failure::new(
        Code::TargetOutsideRoots,
        Action::FixConfig,
        format!("{} is below no restore root of {worker}", outside.display()),
    )
    .with_hint(format!("Restore roots are: {roots}. A worker's are in its allow.restore_roots.")))
}

fn plain(path: &Path) -> Result<(), Failure> {
    let is_plain = path.is_absolute()
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if is_plain {
        return Ok(());
    }
    let message = format!("{} is not an absolute path without . and ..", path.display());
    Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message)
        .with_hint("Give the whole path of the directory on the worker's host."))
}

/// A directory as jobs name it, when it lies below one of the roots.
fn below(roots: &[String], path: &Path) -> Result<Option<RestoreTarget>, Failure> {
    for root in roots {
        let Some(below) = path.strip_prefix(root).ok().and_then(Path::to_str) else { continue };
        if below.is_empty() {
            continue;
        }
        let directory = below.parse().map_err(|error| {
            Failure::new(Code::RequestInvalid, Action::FixConfig, format!("failed to {error}"))
                .with_hint("Choose a plainer name for the directory.")
        })?;
        return Ok(Some(RestoreTarget { root: root.clone(), directory }));
    }
    Ok(None)
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

    /// A living worker as it announces itself.
    fn worker(name: &str, roots: &[&str]) -> WorkerView {
        let offers = serde_json::json!({
            "version": "1.0.0", "kinds": ["restore"], "clusters": [], "repositories": [],
            "restore_roots": roots, "postgres_majors": [15],
        });
        WorkerView {
            name: name.parse().unwrap(),
            site: "here".parse().unwrap(),
            alive: true,
            draining: false,
            boot: None,
            seen_at_ms: None,
            urgent_free: 1,
            routine_free: 1,
            running: Vec::new(),
            offers: Some(serde_json::from_value(offers).unwrap()),
        }
    }

    #[test]
    fn all_of_a_restore_goes_below_roots_of_one_worker() {
        let workers = [worker("w1", &["/srv/restore"]), worker("w2", &["/srv/restore", "/fast"])];
        let place = |into: &str, spaces: &[(u32, &str)]| {
            let spaces: Vec<_> = spaces.iter().map(|(oid, at)| (*oid, PathBuf::from(at))).collect();
            place(&workers, Path::new(into), &spaces, None)
        };
        assert_eq!(place("/srv/restore/a", &[]).unwrap().worker.as_str(), "w1");
        let spaces = [(7, "/srv/restore/a-7"), (8, "/fast/a/8")];
        let placed = place("/srv/restore/a", &spaces).unwrap();
        assert_eq!(placed.worker.as_str(), "w2");
        assert_eq!(placed.target.directory.as_str(), "a");
        let fast = &placed.tablespaces[&8];
        assert_eq!((fast.root.as_str(), fast.directory.as_str()), ("/fast", "a/8"));
        assert_eq!(placed.tablespaces.len(), 2);
        for (path, code) in [
            ("/elsewhere/8", Code::TargetOutsideRoots),
            ("/fast", Code::TargetOutsideRoots),
            ("/fast/../etc", Code::RequestInvalid),
            ("/fast/a b", Code::RequestInvalid),
        ] {
            let refused = place("/srv/restore/a", &[(7, "/fast/7"), (8, path)]).unwrap_err();
            assert_eq!(refused.code, code, "{path}: {refused}");
            assert!(refused.message.contains(path.trim_start_matches("/fast/")), "{refused}");
        }
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
