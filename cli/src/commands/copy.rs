//! `repo copy`: backups into a second repository, which the same key opens.

use std::sync::Arc;
use std::time::Duration;

use proto::failure::chain;
use proto::{BackupId, ClusterName, Failure, LineageId};
use repository::{
    Amount, CopyOptions, CopyOutcome, CopySummary, Lineages, Lost, Mirror, Progress, Repository,
    store,
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
    failure: Option<Failure>,
}

impl Row {
    fn of(cluster: &ClusterName, backup: BackupId) -> Self {
        Self {
            cluster: cluster.to_string(),
            backup,
            committed_at_ms: None,
            outcome: None,
            sent: Amount::default(),
            present: Amount::default(),
            failure: None,
        }
    }
}

/// What was asked for.
#[derive(Default)]
struct Selected {
    /// To be copied, with the row that will tell what became of it.
    wanted: Vec<(LineageId, Row)>,
    /// What cannot be read at the source.
    lost: Vec<Row>,
    /// Lineages that cannot.
    unreadable: Vec<(LineageId, repository::Error)>,
}

/// `repo copy FROM --key FILE TO`.
pub(crate) async fn run(args: RepoCopy, format: Output) -> Result<Exit, Failure> {
    let opener = Opener::read(&args.at.opener)?;
    let store = repo::open_store(&args.at.url).await?;
    let source = Repository::open_with(store, opener.unlock()).await?;
    let opener = args.to_key.as_deref().map_or(Ok(opener), Opener::file)?;
    let Selected { wanted, lost, unreadable } = select(&source, &args).await?;
    let to = repo::open_store(&args.to).await?;
    let probe = async |store: &dyn store::Store| {
        let found = if args.single_writer {
            store::probe::probe_for_a_single_writer(Arc::clone(&to)).await?
        } else {
            store::probe::probe(store).await?
        };
        tracing::info!(?found, "Probed {}", store.describe());
        Ok(found)
    };
    let mut mirror =
        source.mirror(Arc::clone(&to), opener.unlock(), args.single_writer, probe).await?;
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
    let mut rows = lost;
    for (lineage, row) in wanted {
        if options.cancel.is_cancelled() {
            break;
        }
        let options = CopyOptions { now_ms: environment::now_ms(), ..options.clone() };
        rows.push(copy(&mut mirror, lineage, row, &options).await);
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
    for (lineage, why) in &unreadable {
        output::talk(&format!("Lineage {lineage} is not copied: failed to {}", chain(why)));
    }
    match exit(&rows, options.cancel.is_cancelled()) {
        Exit::Ok if !unreadable.is_empty() => Ok(Exit::SomeFailed),
        exit => Ok(exit),
    }
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
async fn select(source: &Repository, args: &RepoCopy) -> Result<Selected, Failure> {
    let Lineages { readable, unreadable } = repo::lineages(source, args.cluster.as_ref()).await?;
    let mut selected = Selected { unreadable, ..Selected::default() };
    for identity in readable {
        let (lineage, cluster) = (identity.lineage, &identity.cluster);
        let backups = source.find_backups(lineage).await?;
        let mut of_lineage = Vec::new();
        for summary in backups.readable {
            let Some(backup) = summary.backup() else { continue };
            let meant = match args.backup {
                Some(named) => named == backup,
                // What is given up is on its way out.
                None => !source.is_given_up(lineage, &summary).await?,
            };
            if meant {
                let committed_at_ms = summary.committed_at_ms();
                of_lineage.push((lineage, Row { committed_at_ms, ..Row::of(cluster, backup) }));
            }
        }
        if args.newest {
            of_lineage.drain(..of_lineage.len().saturating_sub(1));
        }
        for Lost { backup, why } in backups.lost {
            let meant = match args.backup {
                Some(named) => named == backup,
                // It may be the newest.
                None if args.newest => of_lineage.iter().all(|(_, newest)| backup > newest.backup),
                None => true,
            };
            if meant {
                let failure = Some(why.into());
                selected.lost.push(Row { failure, ..Row::of(cluster, backup) });
            }
        }
        selected.wanted.append(&mut of_lineage);
    }
    match args.backup {
        Some(backup) if selected.wanted.is_empty() && selected.lost.is_empty() => {
            Err(repo::unknown(source, backup))
        }
        _ => Ok(selected),
    }
}

async fn copy(mirror: &mut Mirror, lineage: LineageId, row: Row, options: &CopyOptions) -> Row {
    let copied = match mirror.copy_lineage(lineage).await {
        Ok(()) => mirror.copy(lineage, row.backup, options).await,
        Err(error) => Err(error),
    };
    match copied {
        Ok(CopySummary { outcome, sent, present }) => {
            Row { outcome: Some(outcome), sent, present, ..row }
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
            (Some(CopyOutcome::Aborted), _) => {
                "an earlier copy was aborted there: it can be copied to another place only"
                    .to_owned()
            }
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
