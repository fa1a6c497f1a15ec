//! `repo gc`: says what goes, what stays and why, and deletes it.

use std::fmt::Write as _;

use proto::{ClusterName, Failure, LineageId};
use repository::{
    Amount, CollectOptions, Collected, Judged, LeftList, Open, Reason, Repository, WalBound,
    WalPlan,
};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::args::Output;
use crate::commands::repo;
use crate::exit::Exit;
use crate::{environment, follow, output};

/// A backup that was given up is deleted a day later at the earliest: whoever sees that it was the wrong one can take it back.
const FORGOTTEN_FOR_MS: i64 = 24 * HOUR_MS;
/// An attempt that is open for longer is dead.
const OPEN_FOR_MS: i64 = 48 * HOUR_MS;
const HOUR_MS: i64 = 3_600_000;

/// What a collection may do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    pub(crate) plan_only: bool,
    pub(crate) confirm_large: bool,
    pub(crate) abort_open: bool,
    pub(crate) pins_for_hours: u32,
    pub(crate) lists_for_hours: Option<u32>,
}

/// What became of one lineage, or would.
#[derive(Debug, Serialize)]
struct Collection {
    cluster: String,
    lineage: String,
    delete: Amount,
    keep: Amount,
    /// What of that interrupted backups stored, for the next one.
    left_behind: Amount,
    /// Of the WAL archive; `None` when there was no plan.
    wal: Option<WalPlan>,
    backups: Vec<Judged>,
    /// Backups that are being written.
    open: Vec<Open>,
    /// What was open for too long, and would be aborted.
    aborts: Vec<Open>,
    /// Collections that did not end.
    lists: Vec<LeftList>,
    result: String,
}

impl Collection {
    fn of(cluster: String, lineage: LineageId) -> Self {
        Self {
            cluster,
            lineage: lineage.to_string(),
            delete: Amount::default(),
            keep: Amount::default(),
            left_behind: Amount::default(),
            wal: None,
            backups: Vec::new(),
            open: Vec::new(),
            aborts: Vec::new(),
            lists: Vec::new(),
            result: String::new(),
        }
    }
}

/// Collects every lineage of a cluster, or of all.
pub(crate) async fn run(
    repository: &Repository,
    cluster: Option<&ClusterName>,
    how: How,
    format: Output,
) -> Result<Exit, Failure> {
    let options = CollectOptions {
        by: repo::who(),
        now_ms: environment::now_ms(),
        grace_ms: FORGOTTEN_FOR_MS,
        patience_ms: how.abort_open.then_some(OPEN_FOR_MS),
        pins_for_ms: i64::from(how.pins_for_hours) * HOUR_MS,
        lists_for_ms: how.lists_for_hours.map(|hours| i64::from(hours) * HOUR_MS),
        cancel: CancellationToken::new(),
    };
    let interrupted = {
        let interrupted = follow::interrupted();
        let cancel = options.cancel.clone();
        tokio::spawn(async move {
            interrupted.await;
            cancel.cancel();
        })
    };
    let (mut rows, mut exit) = (Vec::new(), Exit::Ok);
    let lineages = repo::lineages(repository, cluster).await?;
    for (lineage, why) in lineages.unreadable {
        let failure = Failure::from(why);
        exit = Exit::of(&failure);
        let result = format!("failed: {failure}");
        rows.push(Collection { result, ..Collection::of("?".to_owned(), lineage) });
    }
    for identity in &lineages.readable {
        let mut row = Collection::of(identity.cluster.to_string(), identity.lineage);
        // One lineage that cannot be collected is no reason to leave the others.
        match collect(repository, identity.lineage, &options, how, &mut row).await {
            Ok(ended) if exit == Exit::Ok => exit = ended,
            Ok(_) => {}
            Err(failure) => {
                exit = Exit::of(&failure);
                row.result = format!("failed: {failure}{}", way_out(&failure));
            }
        }
        rows.push(row);
        if options.cancel.is_cancelled() {
            exit = Exit::Interrupted;
            break;
        }
    }
    interrupted.abort();
    output::show(format, &rows, |rows| {
        let mut shown = String::new();
        if how.plan_only {
            shown = backups(rows, options.now_ms) + "\n\n" + &archives(rows);
        }
        shown + &summary(rows, options.now_ms)
    });
    Ok(exit)
}

/// What a person can do about an object that stops every collection.
fn way_out(failure: &Failure) -> &'static str {
    match failure.code {
        proto::Code::ObjectDamaged | proto::Code::ObjectMissing => {
            "; what cannot be repaired is given up by `pgmuster repo delete URL --key FILE BACKUP --damaged`"
        }
        _ => "",
    }
}

/// Plans the collection of one lineage, and does it if it may.
async fn collect(
    repository: &Repository,
    lineage: LineageId,
    options: &CollectOptions,
    how: How,
    row: &mut Collection,
) -> Result<Exit, Failure> {
    let plan = repository.plan_collection(lineage, options).await?;
    (row.delete, row.keep, row.left_behind) = (plan.delete, plan.keep, plan.left_behind);
    row.wal = Some(plan.wal.clone());
    row.backups.clone_from(&plan.backups);
    row.open.clone_from(&plan.open);
    // Nobody is aborted for nothing.
    if how.plan_only && (plan.delete.packs > 0 || row.backups.iter().any(Judged::goes)) {
        row.aborts.clone_from(&plan.aborts);
    }
    row.lists.clone_from(&plan.lists);
    let postponed =
        "postponed: what is being written may need it (--abort-open ends what died days ago)";
    let (result, exit) = if !plan.open.is_empty() {
        (postponed.to_owned(), if how.plan_only { Exit::Ok } else { Exit::Conflict })
    } else if plan.is_large() && !how.confirm_large {
        let result = "more than a fifth of the bytes or of the backups would go: look at it, then --confirm-large";
        (result.to_owned(), if how.plan_only { Exit::Ok } else { Exit::Refused })
    } else if how.plan_only {
        ("planned".to_owned(), Exit::Ok)
    } else {
        match plan.collect(options).await? {
            Collected::Nothing => ("nothing to delete".to_owned(), Exit::Ok),
            Collected::Postponed { open } => {
                row.open = open;
                (postponed.to_owned(), Exit::Conflict)
            }
            Collected::Done(done) => {
                row.delete = done.deleted;
                row.wal.iter_mut().for_each(|wal| wal.delete = done.wal);
                let aborted: Vec<String> =
                    done.aborted.iter().map(|attempt| format!("; {attempt} aborted")).collect();
                (format!("deleted{}", aborted.concat()), Exit::Ok)
            }
        }
    };
    row.result = result;
    Ok(exit)
}

fn summary(rows: &[Collection], now_ms: i64) -> String {
    let amount = |amount: Amount| {
        format!("{} in {}", output::bytes(amount.bytes), output::count(amount.packs, "pack"))
    };
    let row = |row: &Collection| {
        let mut said = vec![row.result.clone()];
        said.extend(row.open.iter().map(|open| {
            let age = output::ago(now_ms, Some(open.began_at_ms));
            format!("{} was begun {age} by {}", open.attempt, open.by)
        }));
        said.extend(row.aborts.iter().map(|open| {
            let age = output::ago(now_ms, Some(open.began_at_ms));
            format!("{} would be aborted, which was begun {age} by {}", open.attempt, open.by)
        }));
        said.extend(row.lists.iter().map(|list| {
            let by = list.by.as_deref().filter(|by| !by.is_empty()).unwrap_or("nobody knows whom");
            let age = output::ago(now_ms, list.at_ms);
            format!(
                "collection {} by {by}, {age}, has not ended (--drop-lists-older-than)",
                list.run
            )
        }));
        if row.left_behind.packs > 0 {
            let left = amount(row.left_behind);
            said.push(format!("{left} of an interrupted backup stay for the next one for a day"));
        }
        let wal = row.wal.as_ref().filter(|wal| wal.delete.files > 0);
        let wal = wal.map_or_else(|| "-".to_owned(), |wal| repo::files(wal.delete));
        vec![row.cluster.clone(), amount(row.delete), wal, amount(row.keep), said.join("; ")]
    };
    let head = ["CLUSTER", "DELETE", "DELETE WAL", "KEEP", "RESULT"];
    output::table(&head, rows.iter().map(row).collect())
}

/// What goes of each WAL archive and why; nothing of those that are empty.
fn archives(rows: &[Collection]) -> String {
    let mut said = String::new();
    for Collection { cluster, wal, .. } in rows {
        let Some(wal) = wal.as_ref().filter(|wal| wal.delete.files + wal.keep.files > 0) else {
            continue;
        };
        let goes = match wal.last {
            Some(last) => format!("{} go, up to segment {last}", repo::files(wal.delete)),
            None => "none goes".to_owned(),
        };
        let why = match &wal.bound {
            WalBound::Before { segment, backup, .. } => {
                format!("the oldest backup that stays, {backup}, begins in {segment}")
            }
            WalBound::NoBackup => "there is no backup that would tell what is needed".to_owned(),
            WalBound::Unknown { backup } => {
                format!(
                    "where backup {backup} begins cannot be read; WAL goes when that one is gone"
                )
            }
            WalBound::Sizes { backup } => format!(
                "segments had another size when backup {backup} was made, so their names cannot be compared"
            ),
        };
        let _ = writeln!(said, "WAL of {cluster}: {goes}; {} stay: {why}.", repo::files(wal.keep));
        for timeline in &wal.untouched {
            let _ = writeln!(
                said,
                "WAL of {cluster}: timeline {timeline} stays whole: none of its segments tells that it has the size that the \
                 backups tell."
            );
        }
    }
    if !said.is_empty() {
        said.push('\n');
    }
    said
}

/// Every backup, whether it stays, why, and what it alone needs.
fn backups(rows: &[Collection], now_ms: i64) -> String {
    let row = |collection: &Collection, judged: &Judged| {
        vec![
            collection.cluster.clone(),
            judged.backup.to_string(),
            output::ago(now_ms, judged.committed_at_ms),
            if judged.goes() { "goes".to_owned() } else { stays(judged, now_ms) },
            judged.alone.map_or_else(|| "-".to_owned(), |alone| output::bytes(alone.bytes)),
        ]
    };
    let rows = rows.iter().flat_map(|collection| {
        collection.backups.iter().map(move |judged| row(collection, judged))
    });
    output::table(
        &["CLUSTER", "BACKUP", "COMMITTED", "STATE", "NEEDED BY IT ALONE"],
        rows.collect(),
    )
}

fn stays(judged: &Judged, now_ms: i64) -> String {
    let why = judged.stays.iter().map(|reason| match reason {
        Reason::Wanted => "wanted".to_owned(),
        Reason::Newest => "the newest".to_owned(),
        Reason::NewestProved => "the newest that was proved".to_owned(),
        Reason::Held => "held".to_owned(),
        Reason::Pinned { by, why, at_ms } => {
            format!("read by {by} for a {why}, since {}", output::ago(now_ms, Some(*at_ms)))
        }
        Reason::Grace { until_ms } => {
            format!("given up, goes in {}", output::duration(until_ms - now_ms))
        }
        Reason::NotBelieved => "given up by nobody who has the key".to_owned(),
    });
    why.collect::<Vec<_>>().join(", ")
}
