//! `repo copy`: backups into a second repository, which the same key opens.

use std::sync::Arc;
use std::time::Duration;

use proto::{BackupId, Failure, LineageId};
use repository::{
    Amount, CopyOptions, CopyOutcome, CopySummary, Mirror, Progress, Repository, store,
};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::args::{Output, RepoCopy};
use crate::commands::repo;
use crate::exit::Exit;
use crate::opener::Opener;
use crate::{environment, follow, output};

/// What became of one backup.
#[derive(Debug, Serialize)]
struct Row {
    cluster: String,
    backup: BackupId,
    committed_at_ms: Option<i64>,
    /// `None` when it failed.
    outcome: Option<CopyOutcome>,
    sent: Amount,
    present: Amount,
    proofs: u32,
    failure: Option<Failure>,
}

/// A backup to be copied.
struct Wanted {
    cluster: String,
    lineage: LineageId,
    backup: BackupId,
    committed_at_ms: Option<i64>,
}

/// `repo copy FROM --key FILE TO`.
pub(crate) async fn run(args: RepoCopy, format: Output) -> Result<Exit, Failure> {
    let opener = Opener::read(&args.at.opener)?;
    let store = repo::open_store(&args.at.url).await?;
    let source = Repository::open_with(store, opener.unlock()).await?;
    let opener = args.to_key.as_deref().map_or(Ok(opener), Opener::file)?;
    let wanted = select(&source, &args).await?;
    let probe = async |store: &dyn store::Store| {
        let found = store::probe::probe(store).await?;
        tracing::info!(?found, "Probed {}", store.describe());
        Ok(found)
    };
    let mut mirror =
        source.mirror(repo::open_store(&args.to).await?, opener.unlock(), probe).await?;
    let options = CopyOptions {
        by: repo::who(),
        now_ms: environment::now_ms(),
        processes: usize::try_from(args.processes).unwrap_or(1),
        progress: Arc::new(Progress::default()),
        cancel: CancellationToken::new(),
    };
    let cancel = options.cancel.clone();
    let interrupted = tokio::spawn(async move {
        follow::interrupted().await;
        cancel.cancel();
    });
    let shown = tokio::spawn(show_progress(Arc::clone(&options.progress)));
    let mut rows = Vec::new();
    for wanted in wanted {
        if options.cancel.is_cancelled() {
            break;
        }
        let options = CopyOptions { now_ms: environment::now_ms(), ..options.clone() };
        rows.push(copy(&mut mirror, wanted, &options).await);
    }
    interrupted.abort();
    shown.abort();
    output::show(format, &rows, |rows| table(rows));
    for row in &rows {
        if let Some(failure) = &row.failure {
            output::talk(&format!("Backup {} of {} is not copied:", row.backup, row.cluster));
            output::failure(failure);
        }
    }
    Ok(exit(&rows, options.cancel.is_cancelled()))
}

fn exit(rows: &[Row], interrupted: bool) -> Exit {
    let mut failures = rows.iter().filter_map(|row| row.failure.as_ref());
    match failures.next() {
        _ if interrupted => Exit::Interrupted,
        None => Exit::Ok,
        Some(only) if rows.len() == 1 => Exit::of(only),
        Some(_) => Exit::SomeFailed,
    }
}

/// The backups that were asked for, oldest first, so that the newest of a copy is never older than what it has.
async fn select(source: &Repository, args: &RepoCopy) -> Result<Vec<Wanted>, Failure> {
    let mut wanted = Vec::new();
    for identity in repo::lineages(source, args.cluster.as_ref()).await? {
        let mut of_lineage = Vec::new();
        for summary in source.list_readable_backups(identity.lineage).await? {
            let Some(backup) = summary.backup() else { continue };
            let meant = match args.backup {
                Some(named) => named == backup,
                // What is given up is on its way out.
                None => !source.is_given_up(identity.lineage, &summary).await?,
            };
            if meant {
                of_lineage.push(Wanted {
                    cluster: identity.cluster.to_string(),
                    lineage: identity.lineage,
                    backup,
                    committed_at_ms: summary.committed_at_ms(),
                });
            }
        }
        if args.newest {
            of_lineage.drain(..of_lineage.len().saturating_sub(1));
        }
        wanted.append(&mut of_lineage);
    }
    match args.backup {
        Some(backup) if wanted.is_empty() => Err(repo::unknown(source, backup)),
        _ => Ok(wanted),
    }
}

async fn copy(mirror: &mut Mirror, wanted: Wanted, options: &CopyOptions) -> Row {
    let copied = match mirror.copy_lineage(wanted.lineage).await {
        Ok(()) => mirror.copy(wanted.lineage, wanted.backup, options).await,
        Err(error) => Err(error),
    };
    let row = Row {
        cluster: wanted.cluster,
        backup: wanted.backup,
        committed_at_ms: wanted.committed_at_ms,
        outcome: None,
        sent: Amount::default(),
        present: Amount::default(),
        proofs: 0,
        failure: None,
    };
    match copied {
        Ok(CopySummary { outcome, sent, present, proofs }) => {
            Row { outcome: Some(outcome), sent, present, proofs, ..row }
        }
        Err(error) => Row { failure: Some(error.into()), ..row },
    }
}

fn table(rows: &[Row]) -> String {
    let now_ms = environment::now_ms();
    let amount =
        |amount: Amount| format!("{} in {} packs", output::bytes(amount.bytes), amount.packs);
    let row = |row: &Row| {
        let result = match (row.outcome, &row.failure) {
            (Some(CopyOutcome::Copied), _) => "copied".to_owned(),
            (Some(CopyOutcome::Present), _) => "was there".to_owned(),
            (Some(CopyOutcome::Repaired), _) => "was there, repaired".to_owned(),
            (Some(CopyOutcome::GivenUp), _) => "was given up there".to_owned(),
            (None, Some(failure)) => failure.code.to_string(),
            (None, None) => String::new(),
        };
        vec![
            row.cluster.clone(),
            row.backup.to_string(),
            output::ago(now_ms, row.committed_at_ms),
            amount(row.sent),
            amount(row.present),
            result,
        ]
    };
    let head = ["CLUSTER", "BACKUP", "COMMITTED", "SENT", "WAS THERE", "RESULT"];
    output::table(&head, rows.iter().map(row).collect())
}

async fn show_progress(progress: Arc<Progress>) {
    if !output::is_watched() {
        return;
    }
    let bar = indicatif::ProgressBar::new_spinner();
    let mut ticks = tokio::time::interval(Duration::from_millis(300));
    loop {
        ticks.tick().await;
        bar.set_message(format!("{} sent", output::bytes(progress.snapshot().bytes_stored)));
        bar.tick();
    }
}
