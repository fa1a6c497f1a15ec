//! `repo check`: looks after a whole repository, and says what became of which backup.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use proto::{Action, Code, Failure};
use repository::{CheckLevel, Damage, Progress, ScrubOptions, ScrubReport, ScrubbedLineage};
use serde::Serialize;

use super::repo::{no_cluster, open, who};
use crate::args::{Depth, Output, RepoCheck};
use crate::exit::Exit;
use crate::{environment, follow, output};

/// How often a terminal is told how far it is.
const LOOK: Duration = Duration::from_millis(200);
/// Threads at most when nobody says how many: the store is slower than the processor.
const PROCESSES_MAX: usize = 4;
/// Foreign objects and open attempts that are named to a person; programs hear of all.
const NAMED_MAX: usize = 10;

/// What a program reads.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    level: CheckLevel,
    slice: String,
    sound: bool,
    #[serde(flatten)]
    report: &'a ScrubReport,
}

/// `repo check`.
pub(crate) async fn run(args: RepoCheck, format: Output) -> Result<Exit, Failure> {
    let level = match args.level {
        Depth::Inventory => CheckLevel::Inventory,
        Depth::Manifest => CheckLevel::Manifest,
        Depth::Read => CheckLevel::Read,
        Depth::Decrypt => CheckLevel::Decrypt,
    };
    if level < CheckLevel::Read && !args.slice.is_whole() {
        let message = "a slice divides the packs that are read, and this level reads none";
        return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message)
            .with_hint("Give --level read or --level decrypt with --slice."));
    }
    let repository = open(&args.at.url, &args.at.opener).await?;
    let mut options = ScrubOptions::new(level, environment::now_ms());
    options.slice = args.slice;
    options.cluster.clone_from(&args.cluster);
    options.mark = (!args.no_marks).then(who);
    options.processes = args.processes.map_or_else(processes, usize::from);

    let cancel = options.cancel.clone();
    let interrupted = follow::interrupted();
    let interrupted = tokio::spawn(async move {
        interrupted.await;
        cancel.cancel();
    });
    let shown = output::is_watched()
        .then(|| show(Arc::clone(&options.progress), Arc::clone(&options.to_read)));
    let mut report = ScrubReport::default();
    let ended = repository.scrub(&options, &mut report).await;
    interrupted.abort();
    if let Some((watching, bar)) = shown {
        watching.abort();
        bar.finish_and_clear();
    }

    if let (Ok(()), true, Some(cluster)) = (&ended, report.lineages.is_empty(), &args.cluster)
        && report.is_sound()
    {
        return Err(no_cluster(format!("{} has no cluster {cluster}", repository.describe())));
    }
    let slice = args.slice.to_string();
    // What was found is told also when the check did not get to its end.
    let answer = Answer { level, slice, sound: report.is_sound(), report: &report };
    output::show(format, &answer, |answer| said(answer, &options));
    ended?;
    Ok(if report.is_sound() { Exit::Ok } else { Exit::Findings })
}

fn processes() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(PROCESSES_MAX)
}

fn show(
    progress: Arc<Progress>,
    to_read: Arc<AtomicU64>,
) -> (tokio::task::JoinHandle<()>, ProgressBar) {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {bytes} of {total_bytes} read") {
        bar.set_style(style);
    }
    let told = bar.clone();
    let watching = tokio::spawn(async move {
        let mut looks = tokio::time::interval(LOOK);
        loop {
            looks.tick().await;
            told.set_length(to_read.load(Ordering::Relaxed));
            told.set_position(progress.snapshot().bytes_stored);
        }
    });
    (watching, bar)
}

/// The report as people read it: what was looked at, what is wrong, and what to do about it.
fn said(answer: &Answer<'_>, options: &ScrubOptions) -> String {
    let report = answer.report;
    let row = |row: &ScrubbedLineage| {
        let cluster =
            row.cluster.as_ref().map_or_else(|| row.lineage.to_string(), ToString::to_string);
        let damaged = report.damaged.iter().filter(|damage| damage.lineage == Some(row.lineage));
        let amount = |amount: repository::Amount| {
            format!("{} in {}", output::bytes(amount.bytes), output::count(amount.packs, "pack"))
        };
        let needed = amount(row.needed);
        let read = if row.read.packs == 0 { "-".to_owned() } else { amount(row.read) };
        vec![cluster, row.backups.to_string(), needed, read, damaged.count().to_string()]
    };
    let head = ["CLUSTER", "BACKUPS", "NEEDED", "READ", "DAMAGED"];
    let mut text = output::table(&head, report.lineages.iter().map(row).collect());
    for damage in &report.damaged {
        let _ = write!(text, "\n\n{}\n  {}", damage.object, damage.what);
        if !damage.backups.is_empty() {
            let _ = write!(text, "\n  needed by {}", listed(damage.backups.iter()));
        }
    }
    for advice in advice(report, options) {
        let _ = write!(text, "\n\n{advice}");
    }
    for remark in remarks(report, options) {
        let _ = write!(text, "\n{remark}");
    }
    text
}

fn listed<T: ToString>(things: impl Iterator<Item = T>) -> String {
    things.map(|thing| thing.to_string()).collect::<Vec<_>>().join(", ")
}

/// What a person should know and do, a sentence or two for each cluster.
fn advice(report: &ScrubReport, options: &ScrubOptions) -> Vec<String> {
    let mut of_cluster: BTreeMap<Option<String>, BTreeSet<String>> = BTreeMap::new();
    for Damage { cluster, backups, .. } in &report.damaged {
        let concerned = of_cluster.entry(cluster.as_ref().map(ToString::to_string)).or_default();
        concerned.extend(backups.iter().map(ToString::to_string));
    }
    let marks = options.mark.is_some() && report.not_marked.is_none();
    let mut advice = Vec::new();
    for (cluster, backups) in &of_cluster {
        let name = cluster.as_deref().unwrap_or("a cluster whose identity cannot be read");
        if backups.is_empty() {
            continue;
        }
        let order = cluster.as_deref().unwrap_or("CLUSTER");
        let next = if marks || options.level < CheckLevel::Read {
            "refers to nothing of what is named above and stores it again"
        } else {
            "may refer to the damaged packs again, because they were not marked"
        };
        advice.push(format!(
            "Do not rely on {} of {name}: {} may not restore whole. The next backup {next}: \
             `pgmuster backup {order} --verify 5`. To keep {}, bring the objects back from a copy or an older \
             version of the bucket, and check again.",
            listed(backups.iter()),
            if backups.len() == 1 { "it" } else { "they" },
            if backups.len() == 1 { "it" } else { "them" },
        ));
    }
    if let Some(why) = &report.not_marked {
        advice.push(format!("Damaged packs were not marked: failed to {why}"));
    }
    advice
}

/// What is no damage and worth a line.
fn remarks(report: &ScrubReport, options: &ScrubOptions) -> Vec<String> {
    let mut remarks = Vec::new();
    let garbage = report.lineages.iter().map(|row| row.unreferenced);
    let (packs, bytes) =
        garbage.fold((0, 0), |(packs, bytes), amount| (packs + amount.packs, bytes + amount.bytes));
    if packs > 0 {
        remarks.push(format!(
            "{} in {} of no backup: of running ones, or for `pgmuster repo gc URL --key FILE`.",
            output::bytes(bytes),
            output::count(packs, "pack")
        ));
    }
    for row in &report.lineages {
        for open in row.open.iter().take(NAMED_MAX) {
            let age = output::ago(options.now_ms, Some(open.began_at_ms));
            remarks.push(format!(
                "Attempt {} was begun {age} by {} and has no end: `pgmuster repo gc URL --key FILE --abort-open` ends it.",
                open.attempt, open.by
            ));
        }
        for list in row.interrupted.iter().take(NAMED_MAX) {
            remarks.push(format!(
                "A collection runs or was interrupted: {list}. The next one finishes it."
            ));
        }
    }
    for key in report.foreign.iter().take(NAMED_MAX) {
        remarks.push(format!("Not pgmuster's: {key}"));
    }
    if report.foreign.len() > NAMED_MAX {
        let more = report.foreign.len() - NAMED_MAX;
        remarks
            .push(format!("and {more} objects more that are not pgmuster's (-o json names all)"));
    }
    remarks
}
