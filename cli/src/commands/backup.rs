//! `backup --server`: a backup by this process, with the server, the repository and its key, and nothing else.

use std::collections::BTreeMap;

use proto::job::BackupOutcome;
use proto::{Failure, Task};
use worker::config::{BackupConfig, ClusterConfig, FilesConfig, GivenBy};
use worker::engines::{native, pg_dump};
use worker::places::Cluster;

use super::load::server_at;
use super::restore::{context, show_progress, stopped_by_signals};
use crate::args::{Backup, OpenerArgs, Output};
use crate::commands::{order, repo};
use crate::exit::Exit;
use crate::{environment, follow, output};

/// `backup CLUSTER --server URL --repository URL --key FILE`.
pub(crate) async fn alone(args: Backup, format: Output) -> Result<Exit, Failure> {
    let (Some(server), Some(url)) = (&args.server, &args.repository) else {
        return Err(Failure::bug("clap asks for --server and --repository together"));
    };
    if let Some(text) = environment::variable("PGMUSTER_FAILPOINT") {
        let armed = worker::failpoint::arm(&text);
        tracing::warn!(armed, "This backup will fail on purpose: PGMUSTER_FAILPOINT={text}");
    }
    let task = order::task(&args)?;
    let target = server_at(server)?;
    let opener = OpenerArgs { key: args.key.clone(), passphrase: args.passphrase.clone() };
    let repository = repo::open(url, &opener).await?;
    let config = ClusterConfig {
        name: args.cluster.clone(),
        connection: String::new(),
        password: None,
        data_directory: None,
        repository: None,
        labels: BTreeMap::new(),
        kinds: None,
        heartbeat_s: None,
        assertions: Vec::new(),
        files: FilesConfig::Auto,
        given_by: GivenBy::Backup,
    };
    let cluster = Cluster { config, target };
    let cx = context(&args.cluster, Task::Backup(task.clone()));
    let interrupted = stopped_by_signals(&cx);
    let shown = tokio::spawn(show_progress(cx.clone()));
    let mut settings = BackupConfig::default();
    settings.reread_days = args.reread_days.unwrap_or(settings.reread_days);
    let by = repo::who();
    let (cluster, repository, config) = (&cluster, &repository, &settings);
    let (by, task) = (by.as_str(), &task);
    let done = match &task.pg_dump {
        None => {
            let request = native::BackupRequest { cluster, repository, config, by, task };
            Box::pin(native::back_up(&cx, request)).await
        }
        Some(scope) => {
            let bin_dirs = &[];
            let request =
                pg_dump::BackupRequest { cluster, repository, config, bin_dirs, by, task, scope };
            Box::pin(pg_dump::back_up(&cx, request)).await
        }
    };
    shown.abort();
    interrupted.abort();
    let done = done?;
    output::show(format, &done, |done| told(&args, done));
    Ok(follow::found(&done))
}

fn told(args: &Backup, done: &BackupOutcome) -> String {
    follow::backed_up(&args.cluster, done, done.stopped_at_ms - done.started_at_ms)
}
