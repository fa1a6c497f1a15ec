//! `recovery …`: to which moments clusters can be recovered, told by their repository.

use std::fmt::Write as _;

use proto::Failure;
use worker::archive::{Recoverable, recoverable};

use crate::args::{Output, RecoveryCommand};
use crate::commands::repo;
use crate::exit::Exit;
use crate::{environment, output};

/// `recovery …`.
pub(crate) async fn run(command: RecoveryCommand, format: Output) -> Result<Exit, Failure> {
    let RecoveryCommand::Windows { at, cluster } = command;
    let repository = repo::open(&at.url, &at.opener).await?;
    let all = recoverable(&repository, cluster.as_ref()).await?;
    output::show(format, &all, |all| said(all));
    Ok(if all.iter().all(Recoverable::is_whole) { Exit::Ok } else { Exit::Findings })
}

fn said(all: &[Recoverable]) -> String {
    let now_ms = environment::now_ms();
    let mut rows = Vec::new();
    for one in all {
        for window in &one.windows {
            rows.push(vec![
                one.cluster.to_string(),
                window.timeline.to_string(),
                window.backup.to_string(),
                window.backups.to_string(),
                window.from.to_string(),
                output::ago(now_ms, Some(window.from_at_ms)),
                window.to.to_string(),
                window.missing.clone().unwrap_or_default(),
            ]);
        }
    }
    let head = ["CLUSTER", "TIMELINE", "FROM BACKUP", "BACKUPS", "FROM", "SINCE", "TO", "MISSING"];
    let mut text = output::table(&head, rows);
    for one in all {
        let cluster = &one.cluster;
        if one.windows.is_empty() {
            let _ = write!(text, "\n{cluster} has no backup: its WAL leads nowhere.");
        }
        for gap in &one.gaps {
            let _ = write!(
                text,
                "\n{cluster}: WAL is missing on timeline {} from {}: recoverable before {} and, from a backup that begins there, after {}.",
                gap.timeline, gap.segment, gap.from, gap.to
            );
        }
        for timeline in &one.without_history {
            let _ = write!(
                text,
                "\n{cluster}: {} is missing, though other files of timeline {timeline} are there: no older backup leads to it.",
                proto::wal::history_file_name(*timeline)
            );
        }
        for damaged in &one.damaged {
            let _ = write!(text, "\n{cluster}: {} cannot be read: {}.", damaged.file, damaged.what);
        }
        for file in &one.conflicts {
            let _ = write!(
                text,
                "\n{cluster}: {file} came with other content than the archived one, from a second server."
            );
        }
    }
    text
}
