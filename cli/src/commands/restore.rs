//! `restore --repository`: with the repository and its key, and nothing else.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use postgres::process::Account;
use proto::job::{RestoreOutcome, RestoreTarget};
use proto::message::{SCHEMA, Spec};
use proto::{Action, AttemptId, BackupKind, Code, Failure, JobId, SecretRef, Step, Task};
use repository::{Backup, Pin, paths};
use tokio::task::JoinHandle;
use worker::archive::service::OpenArchive;
use worker::context::JobContext;
use worker::recovering::{self, RecoveryPlan, Wanted};
use worker::restoring::{self, Destination};

use crate::args::{OpenerArgs, Output, Restore};
use crate::commands::repo::Named;
use crate::commands::{moment, repo};
use crate::exit::Exit;
use crate::opener::Opener;
use crate::{environment, follow, output};

/// What clap does not refuse: options that need another one which is in conflict with a third.
pub(crate) fn check(args: &Restore) -> Result<(), Failure> {
    let given = [
        ("--database", !args.databases.is_empty()),
        ("--overwrite", !args.overwrite.is_empty()),
        ("--no-owner", args.no_owner),
        ("--jobs", args.jobs > 1),
    ];
    let mut oids = BTreeSet::new();
    if let Some((oid, _)) = args.tablespace.iter().find(|(oid, _)| !oids.insert(oid)) {
        let what = format!("--tablespace names {oid} twice");
        return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, what));
    }
    refuse_secret_inside(args)?;
    match given.iter().find(|(_, given)| *given && args.into_server.is_none()) {
        None => Ok(()),
        Some((option, _)) => {
            let what = format!("{option} is about loading a dump, and files are restored whole");
            Err(Failure::new(Code::RequestInvalid, Action::FixConfig, what).with_hint(
                "Load a logical backup with --into-server URL; or restore everything into a directory, start a server there and \
                 take what you need.",
            ))
        }
    }
}

/// What a delta restore is not about it removes, and what opens the repository is in no other place, perhaps. A key file it would know
/// when it sees one; a passphrase looks like anything.
fn refuse_secret_inside(args: &Restore) -> Result<(), Failure> {
    let Some(into) = &args.into else { return Ok(()) };
    let named = |reference: &str| match reference.parse() {
        Ok(SecretRef::File(path)) => Some(PathBuf::from(path)),
        Ok(_) => None,
        Err(_) => Some(PathBuf::from(reference)),
    };
    let key = args.key.as_ref().map(|key| ("key", key.to_string_lossy()));
    let passphrase = args.passphrase.as_ref().map(|words| ("passphrase", words.into()));
    for (what, reference) in key.into_iter().chain(passphrase) {
        let Some(file) = named(&reference).filter(|file| file.exists()) else { continue };
        if paths::lies(&file, into).is_ok_and(|lies| lies == paths::Lies::Inside) {
            let what = format!(
                "the {what} {} lies in {}, where files are to be restored",
                file.display(),
                into.display()
            );
            return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, what)
                .with_hint("Nothing was changed. Move it elsewhere, and keep a copy of it."));
        }
    }
    Ok(())
}

/// `restore --repository URL --key FILE --into DIR`, or `--passphrase REFERENCE`.
pub(crate) async fn offline(args: Restore, format: Output) -> Result<Exit, Failure> {
    let Some(url) = &args.repository else {
        return Err(Failure::bug("a restore without a coordinator needs --repository"));
    };
    let opener = OpenerArgs { key: args.key.clone(), passphrase: args.passphrase.clone() };
    if let Some(server) = &args.into_server {
        return super::load::into_server(&args, url, &opener, server, format).await;
    }
    let into = args.into.as_deref().ok_or_else(|| Failure::bug("clap asks for a directory"))?;
    let into = std::path::absolute(into).map_err(|error| {
        let message = format!("{}: {error}", into.display());
        Failure::new(Code::RequestInvalid, Action::FixConfig, message)
    })?;
    let recovery = moment::wanted(&args)?;
    let named = Arc::new(Named { url: url.clone(), opener: Opener::read(&opener)? });
    let repository = named.open().await?;
    let pin = Pin { by: repo::who(), why: "restore".to_owned(), at_ms: environment::now_ms() };
    let cluster = args.cluster.as_ref();
    let wanted = match &args.backup {
        Some(typed) => {
            Some(repo::meant(&repository, cluster, Some(BackupKind::Physical), typed).await?)
        }
        None => None,
    };
    let (backup, recovery) = match &recovery {
        None => (restoring::find_pinned(&repository, cluster, None, wanted, &pin).await?, None),
        Some(recovery) => {
            let fetching = moment::fetching(url, &opener)?;
            let wanted = Wanted {
                cluster,
                system_identifier: None,
                backup: wanted,
                rehearses: false,
                recovery,
            };
            let (backup, plan) = recovering::plan(&repository, wanted, &fetching, &pin).await?;
            (backup, Some(plan))
        }
    };
    if let Some(plan) = recovery.as_ref().filter(|_| !args.plan) {
        plan.not_taken.iter().for_each(|line| output::talk(line));
    }
    let cluster = backup.facts().cluster.clone();
    let given = Destination {
        data_directory: into,
        tablespaces: args.tablespace.iter().cloned().collect(),
        delta: args.delta,
        believe_cache: args.believe_cache,
        recovery: recovery.as_ref().map(|plan| plan.settings.clone()),
        keep_archiving: args.moment.keep_archiving,
    };
    let destination = given.complete(backup.facts());
    let cx = context(&cluster, nominal());
    let interrupted = stopped_by_signals(&cx);
    let processes = args.processes.unwrap_or_else(every_core);
    let done = if args.plan {
        restoring::plan(&cx, &backup, &destination, processes).await
    } else {
        let shown = tokio::spawn(show_progress(cx.clone()));
        let done = restore(&cx, &backup, &destination, processes, recovery.as_ref(), named).await;
        shown.abort();
        done
    };
    let done = done.map(|done| match &recovery {
        Some(plan) => plan.tell(done),
        None => done,
    });
    interrupted.abort();
    backup.release().await;
    let done = done?;
    // A target of somebody else is restored as that user.
    if Account::current().is_root() {
        let directory = &done.directory;
        let verb = if args.plan { "will belong" } else { "belong" };
        output::talk(&format!(
            "The files {verb} to root, as whom no server starts: chown -R postgres: {directory}, and the directories of its \
             tablespaces; or restore into a directory that belongs to the server's user."
        ));
    }
    output::show(format, &done, |done| {
        if done.planned_only {
            let time = format!(
                "How long it takes only a coordinator knows, from proofs: pgmuster cluster show {cluster}"
            );
            return [&done.plan[..], &[time]].concat().join("\n");
        }
        format!(
            "Restored backup {} of {} into {}: {}; {}",
            done.backup,
            cluster,
            done.directory,
            output::restored(done),
            output::recovered(done)
        )
    });
    Ok(follow::restored(&done))
}

/// Whoever restores by hand waits for it, and the server that it is for does not run.
fn every_core() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(cores).unwrap_or(1)
}

/// Restores, and has the server brought to where it shall be when that was asked for.
async fn restore(
    cx: &JobContext,
    backup: &Backup,
    destination: &Destination,
    processes: u32,
    recovery: Option<&RecoveryPlan>,
    archive: Arc<dyn OpenArchive>,
) -> Result<RestoreOutcome, Failure> {
    let starts = recovery.filter(|plan| plan.starts);
    let starter = match starts {
        Some(plan) => {
            let environment = environment::for_fetching();
            Some(plan.starter(backup, &[], environment, archive, destination.delta).await?)
        }
        None => None,
    };
    let done = restoring::restore(cx, backup, destination, processes).await?;
    match starter {
        Some(starter) => starter.start(cx, destination, done).await,
        None => Ok(done),
    }
}

/// The task of a restore that no coordinator ordered: where it goes to is known without it.
pub(super) fn nominal() -> Task {
    let target = RestoreTarget {
        root: "/".to_owned(),
        directory: "restore".parse().expect("it is a relative path"),
    };
    Task::Restore(proto::job::Restore::at(target))
}

/// A context for work that no coordinator knows of.
pub(super) fn context(cluster: &proto::ClusterName, task: Task) -> JobContext {
    let now_ms = u64::try_from(environment::now_ms()).unwrap_or(0);
    let spec = Spec {
        schema: SCHEMA,
        job: JobId::mint(now_ms, repository::random()),
        attempt: AttemptId::mint(now_ms, repository::random()),
        predecessor: None,
        cluster: cluster.clone(),
        system_identifier: None,
        task,
        deadline_ms: u64::MAX,
        traceparent: None,
    };
    JobContext::new(spec, Arc::new(|_: &Step| {}))
}

/// Stops the work at Ctrl-C or SIGTERM; to be aborted when the work has ended.
pub(super) fn stopped_by_signals(cx: &JobContext) -> JoinHandle<()> {
    let cx = cx.clone();
    tokio::spawn(async move {
        follow::interrupted().await;
        cx.stop(Failure::new(Code::Cancelled, Action::Abandon, "interrupted"));
    })
}

pub(super) async fn show_progress(cx: JobContext) {
    if !output::is_watched() {
        return;
    }
    let bar = indicatif::ProgressBar::new(0);
    let mut ticks = tokio::time::interval(Duration::from_millis(300));
    loop {
        ticks.tick().await;
        if let Some(progress) = cx.current_progress() {
            bar.set_length(progress.total.unwrap_or(0));
            bar.set_position(progress.done);
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    #[test]
    fn a_key_is_not_where_files_are_restored() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).display().to_string();
        for name in ["data", "data-2", "space"] {
            std::fs::create_dir(at(name)).unwrap();
            std::fs::write(at(name) + "/key", "").unwrap();
        }
        let checked = |opener: &str| {
            let (opener, data, space) = (opener.replace("AT", &at("")), at("data"), at("space"));
            let line = format!(
                "pgmuster restore main --repository file:///r {opener} --into {data} --tablespace 7={space}"
            );
            let Command::Restore(args) =
                Cli::try_parse_from(line.split_whitespace()).unwrap().command
            else {
                panic!("{line}")
            };
            check(&args).map_err(|failure| failure.code)
        };
        for opener in ["--key ATdata-2/key", "--key ATspace/key", "--passphrase env:data/key"] {
            assert_eq!(checked(opener), Ok(()), "{opener}");
        }
        for opener in [
            "--key ATdata/key",
            "--key file:ATdata/key",
            "--key ATdata-2/../data/key",
            "--passphrase file:ATdata/key",
        ] {
            assert_eq!(checked(opener), Err(Code::RequestInvalid), "{opener}");
        }
    }
}
