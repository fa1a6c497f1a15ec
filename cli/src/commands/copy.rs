//! `repo copy`: backups into a second repository, which the same key opens.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::failure::chain;
use proto::{Action, BackupId, ClusterName, Code, Failure, LineageId};
use repository::{
    Amount, CopyOptions, CopyOutcome, CopySummary, Identity, Lineages, Lost, Mirror, Progress,
    Repository, WalCopySummary, store,
};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use worker::restoring::no_backup;

use crate::args::{Output, RepoCopy};
use crate::commands::repo;
use crate::exit::Exit;
use crate::opener::Opener;
use crate::{environment, follow, output};

/// Files that a failure names.
const NAMED_MAX: usize = 5;
/// How often a copy that goes on leaves word of what it has copied.
const WORD_EVERY: Duration = Duration::from_mins(1);

/// A line of what is told.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Row {
    Backup(BackupRow),
    Wal(WalRow),
}

impl Row {
    fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Backup(row) => row.failure.as_ref(),
            Self::Wal(row) => row.failure.as_ref(),
        }
    }
}

/// What became of the WAL archive of one lineage.
#[derive(Debug, Serialize)]
struct WalRow {
    cluster: String,
    wal: WalCopySummary,
    failure: Option<Failure>,
}

/// What became of one backup.
#[derive(Debug, Serialize)]
struct BackupRow {
    cluster: String,
    backup: BackupId,
    committed_at_ms: Option<i64>,
    /// `None` when it failed.
    outcome: Option<CopyOutcome>,
    sent: Amount,
    present: Amount,
    failure: Option<Failure>,
}

impl BackupRow {
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
    wanted: Vec<(LineageId, BackupRow)>,
    /// What cannot be read at the source.
    lost: Vec<BackupRow>,
    /// Lineages that cannot.
    unreadable: Vec<(LineageId, repository::Error)>,
    /// Those whose WAL is copied.
    archives: Vec<Identity>,
}

/// `repo copy FROM --key FILE TO`.
pub(crate) async fn run(args: RepoCopy, format: Output) -> Result<Exit, Failure> {
    let opener = Opener::read(&args.at.opener)?;
    let store = repo::open_store(&args.at.url).await?;
    let source = Repository::open_with(store, opener.unlock()).await?;
    let opener = args.to_key.as_deref().map_or(Ok(opener), Opener::file)?;
    let Selected { wanted, lost, unreadable, archives } = select(&source, &args).await?;
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
    let mut rows: Vec<Row> = lost.into_iter().map(Row::Backup).collect();
    let mut told = Instant::now();
    for (lineage, row) in wanted {
        if options.cancel.is_cancelled() {
            break;
        }
        let options = CopyOptions { now_ms: environment::now_ms(), ..options.clone() };
        let row = copy(&mut mirror, lineage, row, &options).await;
        // A first copy takes long, and may be killed; each word lists the lineage. What fails is tried again.
        if row.outcome == Some(CopyOutcome::Copied) && told.elapsed() >= WORD_EVERY {
            let _ = mirror.leave_word(&options).await;
            told = Instant::now();
        }
        rows.push(Row::Backup(row));
    }
    // After the backups, so that what a collection there would delete is known.
    for identity in archives {
        if options.cancel.is_cancelled() {
            break;
        }
        rows.extend(copy_wal(&mut mirror, &identity, &options).await.map(Row::Wal));
    }
    let word = mirror.leave_word(&options).await;
    interrupted.abort();
    shown.abort();
    output::show(format, &rows, |rows| table(rows));
    for row in &rows {
        let Some(failure) = row.failure() else { continue };
        output::talk(&match row {
            Row::Backup(row) => format!("Backup {} of {} is not copied:", row.backup, row.cluster),
            Row::Wal(row) => format!("Not all of the WAL of {} is copied:", row.cluster),
        });
        output::failure(failure);
    }
    if let Err(error) = word {
        let (from, why) = (source.describe(), chain(&error));
        output::talk(&format!(
            "{from} was not told of its copies, so `pgmuster backups show` does not show them as they are now: failed to {why}"
        ));
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
    let mut failures = rows.iter().filter_map(Row::failure);
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
    let asked = match &args.backup {
        Some(typed) => Some(repo::meant(source, args.cluster.as_ref(), None, typed).await?),
        None => None,
    };
    for identity in readable {
        let (lineage, cluster) = (identity.lineage, identity.cluster.clone());
        let backups = source.find_backups(lineage).await?;
        let mut of_lineage = Vec::new();
        for summary in backups.readable {
            let Some(backup) = summary.backup() else { continue };
            let meant = match asked {
                Some(named) => named == backup,
                // What is given up is on its way out.
                None => !source.is_given_up(lineage, &summary).await?,
            };
            if meant {
                let committed_at_ms = summary.committed_at_ms();
                let row = BackupRow { committed_at_ms, ..BackupRow::of(&cluster, backup) };
                of_lineage.push((lineage, row));
            }
        }
        if args.newest {
            of_lineage.drain(..of_lineage.len().saturating_sub(1));
        }
        for Lost { backup, why } in backups.lost {
            let meant = match asked {
                Some(named) => named == backup,
                // It may be the newest.
                None if args.newest => of_lineage.iter().all(|(_, newest)| backup > newest.backup),
                None => true,
            };
            if meant {
                let failure = Some(why.into());
                selected.lost.push(BackupRow { failure, ..BackupRow::of(&cluster, backup) });
            }
        }
        if identity.kind.is_physical() && (asked.is_none() || !of_lineage.is_empty()) {
            selected.archives.push(identity);
        }
        selected.wanted.append(&mut of_lineage);
    }
    match asked {
        Some(backup) if selected.wanted.is_empty() && selected.lost.is_empty() => {
            Err(no_backup(source, backup).await)
        }
        _ => Ok(selected),
    }
}

/// Copies the WAL of a lineage; `None` when it has none.
async fn copy_wal(
    mirror: &mut Mirror,
    identity: &Identity,
    options: &CopyOptions,
) -> Option<WalRow> {
    let cluster = identity.cluster.to_string();
    match mirror.copy_wal(identity.lineage, options).await {
        Ok(wal) if wal == WalCopySummary::default() => None,
        Ok(wal) => {
            let failure = left_out(&wal, &mirror.target().describe());
            Some(WalRow { cluster, wal, failure })
        }
        Err(error) => {
            Some(WalRow { cluster, wal: WalCopySummary::default(), failure: Some(error.into()) })
        }
    }
}

/// What of the WAL was not copied although everything was tried.
fn left_out(wal: &WalCopySummary, place: &str) -> Option<Failure> {
    let named = |files: &[&str]| {
        let shown = files.iter().take(NAMED_MAX).copied().collect::<Vec<_>>().join(", ");
        let more = files.len().saturating_sub(NAMED_MAX);
        if more > 0 { format!("{shown} and {more} more") } else { shown }
    };
    let damaged: Vec<&str> = wal.damaged.iter().map(|(file, _)| file.as_str()).collect();
    let conflicts: Vec<&str> = wal.conflicts.iter().map(String::as_str).collect();
    if let Some((_, why)) = wal.damaged.first() {
        let what = format!(
            "{} archived files cannot be read and are not copied ({}; of the first: {why}), {} have other content in {place}",
            damaged.len(),
            named(&damaged),
            conflicts.len(),
        );
        return Some(Failure::new(Code::ObjectDamaged, Action::FixData, what).with_hint(
            "Archive them again with `pgmuster wal push` if the server still has them, after deleting the damaged objects; else take a backup.",
        ));
    }
    (!conflicts.is_empty()).then(|| {
        let what = format!(
            "{} archived files have other content in {place}, which stays as it is: {}",
            conflicts.len(),
            named(&conflicts)
        );
        Failure::new(Code::WalConflict, Action::FixConfig, what).with_hint(
            "Somebody archives into the copy, or it went on by itself: let no archive_command name it, and copy into an empty place.",
        )
    })
}

async fn copy(
    mirror: &mut Mirror,
    lineage: LineageId,
    row: BackupRow,
    options: &CopyOptions,
) -> BackupRow {
    let copied = match mirror.copy_lineage(lineage).await {
        Ok(()) => mirror.copy(lineage, row.backup, options).await,
        Err(error) => Err(error),
    };
    match copied {
        Ok(CopySummary { outcome, sent, present }) => {
            BackupRow { outcome: Some(outcome), sent, present, ..row }
        }
        Err(error) => BackupRow { failure: Some(error.into()), ..row },
    }
}

fn table(rows: &[Row]) -> String {
    let now_ms = environment::now_ms();
    let amount = |amount: Amount| {
        format!("{} in {}", output::bytes(amount.bytes), output::count(amount.packs, "pack"))
    };
    let of_backup = |row: &BackupRow| {
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
    let of_wal = |row: &WalRow| {
        let wal = &row.wal;
        let result = match &row.failure {
            Some(failure) => failure.code.to_string(),
            None if wal.sent.files > 0 => "copied".to_owned(),
            None => "was there".to_owned(),
        };
        let (sent, present) = (repo::files(wal.sent), repo::files(wal.present));
        vec![row.cluster.clone(), "WAL".to_owned(), "-".to_owned(), sent, present, result]
    };
    let row = |row: &Row| match row {
        Row::Backup(row) => of_backup(row),
        Row::Wal(row) => of_wal(row),
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
