//! `restore --into-server`: a logical backup, or a part of it, into a server, with the repository and its key alone.

use postgres::{Environment, Target};
use proto::{Action, BackupKind, Code, Failure};
use repository::Pin;
use worker::engines::pg_dump::{self, LoadOutcome, LoadRequest};
use worker::restoring;

use super::restore::{context, nominal, show_progress, stopped_by_signals};
use crate::args::{OpenerArgs, Output, Restore};
use crate::commands::repo;
use crate::exit::Exit;
use crate::{environment, output};

/// `restore --repository URL --key FILE --into-server URL`.
pub(super) async fn into_server(
    args: &Restore,
    url: &str,
    opener: &OpenerArgs,
    server: &str,
    format: Output,
) -> Result<Exit, Failure> {
    let target = server_at(server)?;
    let repository = repo::open(url, opener).await?;
    let pin = Pin { by: repo::who(), why: "restore".to_owned(), at_ms: environment::now_ms() };
    let (kind, cluster) = (BackupKind::Logical, args.cluster.as_ref());
    let wanted = match &args.backup {
        Some(typed) => Some(repo::meant(&repository, cluster, Some(kind), typed).await?),
        None => None,
    };
    let backup = restoring::find_pinned_of(kind, &repository, cluster, None, wanted, &pin).await?;
    let request = LoadRequest {
        target,
        bin_dirs: Vec::new(),
        databases: args.databases.clone(),
        schemas: args.schemas.clone(),
        tables: args.tables.clone(),
        overwrite: args.overwrite.clone(),
        no_owner: args.no_owner,
        jobs: args.jobs,
        scratch: std::env::temp_dir(),
    };
    let cx = context(&backup.facts().cluster, nominal());
    let interrupted = stopped_by_signals(&cx);
    let shown = tokio::spawn(show_progress(cx.clone()));
    let work = async {
        let plan = pg_dump::plan(&cx, &backup, &request).await?;
        if args.plan {
            return Ok(plan.only(&backup));
        }
        pg_dump::load(&cx, &backup, &request, plan).await
    };
    let done = work.await;
    shown.abort();
    interrupted.abort();
    backup.release().await;
    output::show(format, &done?, told);
    Ok(Exit::Ok)
}

/// The server that was typed.
pub(super) fn server_at(text: &str) -> Result<Target, Failure> {
    let target = Target::parse(text, &Environment::of_process())?;
    if target.has_inline_password() {
        let message =
            "the server's URL holds a password, which everybody on this machine could read";
        return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message)
            .with_hint("Put it into ~/.pgpass (0600), or into a file that passfile=… names."));
    }
    Ok(target)
}

fn told(done: &LoadOutcome) -> String {
    if done.planned_only {
        return done.plan.join("\n");
    }
    let mut line = format!(
        "Loaded {} of backup {} ({})",
        output::count(done.databases.len() as u64, "database"),
        done.backup,
        output::bytes(done.size_bytes)
    );
    if done.roles_created > 0 {
        line.extend(["; ", &output::count(done.roles_created, "role"), " created"]);
    }
    if !done.roles_kept.is_empty() {
        line.extend(["; left as they were: ", &done.roles_kept.join(", ")]);
    }
    for what in &done.left_out {
        line.extend(["\nLeft out: ", what]);
    }
    line
}
