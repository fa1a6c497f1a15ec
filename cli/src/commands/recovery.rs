//! `recovery …`: to which moments clusters can be recovered, told by their repository, or of one cluster by what its coordinator
//! knows.

use std::fmt::Write as _;

use coordinator::api::types::{BackupView, ClusterView};
use policy::ClusterState;
use policy::broken::{BrokenStretch, in_the_way};
use policy::reach::{BackupEnd, is_foreign, is_on_way, leads_on, recovery_point};
use policy::words::count;
use proto::message::{WalAncestor, WalGap, WalStanding};
use proto::wal::Segment;
use proto::{Action, BackupId, BackupKind, ClusterName, Code, Failure, Lsn, ProofLevel};
use serde::Serialize;
use worker::archive::{Gap, Recoverable, Window, recoverable};

use crate::args::{Output, RecoveryCommand};
use crate::client::Client;
use crate::commands::repo::{Named, no_cluster};
use crate::exit::Exit;
use crate::opener::Opener;
use crate::output;

/// `recovery …`.
pub(crate) async fn run(
    client: impl Fn() -> Result<Client, Failure>,
    command: RecoveryCommand,
    format: Output,
) -> Result<Exit, Failure> {
    let RecoveryCommand::Windows { place, opener, cluster } = command;
    let opener = Opener::of(opener.key.as_deref(), opener.passphrase.as_deref()).transpose()?;
    match (place.contains("://"), opener) {
        (true, Some(opener)) => {
            let repository = Named { url: place, opener }.open().await?;
            let all = recoverable(&repository, cluster.as_ref()).await?;
            if let (Some(cluster), true) = (&cluster, all.is_empty()) {
                let message = format!("{} has no cluster {cluster}", repository.describe());
                return Err(no_cluster(message));
            }
            output::show(format, &all, |all| said(all));
            Ok(if all.iter().all(Recoverable::is_whole) { Exit::Ok } else { Exit::Findings })
        }
        (true, None) => Err(invalid(
            format!("nothing opens {place}"),
            "Give its key (--key FILE or --passphrase REFERENCE), or the name of a cluster instead of the URL.",
        )),
        (false, None) if cluster.is_none() => by_coordinator(&client()?, &place, format).await,
        (false, _) => Err(invalid(
            format!("{place} is no URL of a repository"),
            "Write file:///path or s3://bucket/prefix before --key and --cluster; or a cluster's name alone.",
        )),
    }
}

fn invalid(what: String, hint: &str) -> Failure {
    Failure::new(Code::RequestInvalid, Action::FixConfig, what).with_hint(hint)
}

/// What a coordinator knows of the windows of one cluster.
#[derive(Debug, Serialize)]
struct Known {
    cluster: ClusterName,
    /// Where to ask for all there is to know.
    repository: Option<String>,
    /// Where the cluster stands,
    state: ClusterState,
    /// and why, a sentence without a period.
    reason: String,
    windows: Vec<Window>,
    /// WAL that is missing on the way to where its server is.
    gaps: Vec<Gap>,
    /// Why the newest window does not go on though no gap is known, a sentence without a period.
    trouble: Option<String>,
    /// Archived WAL that proofs could not replay.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    broken_wal: Vec<Broken>,
    /// Timelines that the server left. What is archived of them behind that is in no window here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left: Vec<WalAncestor>,
}

/// A stretch that could not be replayed.
#[derive(Debug, Serialize)]
struct Broken {
    #[serde(flatten)]
    stretch: BrokenStretch,
    /// Windows of so many backups end before it.
    in_the_way_of: u64,
    /// It lies on a branch that the server left.
    abandoned: bool,
}

impl Known {
    fn of(view: ClusterView, ends: &[(BackupId, BackupEnd)]) -> Self {
        let wal = view.wal.as_ref();
        let broken = |stretch: &BrokenStretch| {
            let in_its_way = ends.iter().filter(|(_, end)| stretch.is_in_the_way(end, wal));
            Broken {
                stretch: *stretch,
                in_the_way_of: in_its_way.count() as u64,
                abandoned: stretch.is_abandoned(wal),
            }
        };
        let gaps: Vec<Gap> = wal.iter().flat_map(|wal| &wal.gaps).map(gap).collect();
        Self {
            // A worker of before tells of one segment only.
            trouble: wal.and_then(|wal| wal.gap).filter(|_| gaps.is_empty()).map(|gap| {
                format!("WAL segment {gap} is missing: backups before it lead no further than their own end here")
            }),
            windows: known_windows(ends, wal, &view.broken_wal),
            gaps,
            broken_wal: view.broken_wal.iter().map(broken).collect(),
            left: wal.map(|wal| wal.ancestors.clone()).unwrap_or_default(),
            cluster: view.name,
            repository: view.repository_location,
            state: view.state,
            reason: view.reason,
        }
    }

    /// As `status` ends for such a cluster, and where a window ends before its time.
    fn exit(&self) -> Exit {
        let ends_early = self.broken_wal.iter().any(|broken| broken.in_the_way_of > 0);
        let is_torn = self.trouble.is_some() || !self.gaps.is_empty();
        if is_torn || ends_early || self.state.is_finding() { Exit::Findings } else { Exit::Ok }
    }
}

async fn by_coordinator(client: &Client, name: &str, format: Output) -> Result<Exit, Failure> {
    let name: ClusterName = name.parse().map_err(|error| {
        invalid(format!("failed to {error}"), "Name a cluster, or the URL of a repository.")
    })?;
    let view: ClusterView = client.get(&format!("/v1/clusters/{name}")).await?;
    let backups = backups_of(client, &name).await?;
    let ends: Vec<_> = backups.iter().filter_map(end).collect();
    let mut known = Known::of(view, &ends);
    for window in &mut known.windows {
        begin_with(window, &backups);
    }
    output::show(format, &known, said_of_known);
    let place = known.repository.as_deref().unwrap_or("URL");
    output::talk(&format!(
        "Told by what the coordinator has heard. Every timeline and gap: pgmuster recovery windows {place} --key FILE --cluster {}, where that is reached.",
        known.cluster
    ));
    Ok(known.exit())
}

async fn backups_of(client: &Client, name: &ClusterName) -> Result<Vec<BackupView>, Failure> {
    client.get(&format!("/v1/backups?cluster={name}&limit=1000")).await
}

/// The newest gap in the archive of a cluster, and what leads on behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Behind {
    /// Nothing that committed later can be recovered,
    pub(crate) from_at_ms: Option<i64>,
    /// until this backup ended.
    pub(crate) to_at_ms: i64,
    /// One of those that lead on was restored by a proof.
    pub(crate) is_proved: bool,
}

/// What leads on behind the newest gap of a cluster; `None` without a gap, without such a backup, and where nobody says.
pub(crate) async fn behind_gap(client: &Client, view: &ClusterView) -> Option<Behind> {
    let wal = view.wal.as_ref().filter(|wal| wal.gap.is_some())?;
    behind(&backups_of(client, &view.name).await.ok()?, wal, &view.broken_wal)
}

fn behind(backups: &[BackupView], wal: &WalStanding, broken: &[BrokenStretch]) -> Option<Behind> {
    let leading = |view: &&BackupView| end(view).is_some_and(|(_, end)| leads_on(&end, wal));
    let is_proved = |view: &BackupView| {
        let mut proofs = view.proof.iter().chain(&view.other_proof);
        proofs.any(|proof| proof.record.proved() >= Some(ProofLevel::L3))
    };
    let ends: Vec<_> = backups.iter().filter_map(end).collect();
    let mut windows = known_windows(&ends, Some(wal), broken);
    for window in &mut windows {
        begin_with(window, backups);
    }
    let gap = wal.gaps.last().map(gap);
    let ended = |view: &BackupView| view.facts.ended_at_ms.unwrap_or(view.facts.recovers_to_ms());
    Some(Behind {
        from_at_ms: gap.and_then(|gap| unrecoverable(&gap, &windows).0),
        to_at_ms: backups.iter().filter(leading).map(ended).min()?,
        is_proved: backups.iter().filter(leading).any(is_proved),
    })
}

/// When the backup of a window ended, as the repository tells it.
fn begin_with(window: &mut Window, backups: &[BackupView]) {
    let backup = backups.iter().find(|view| view.id == window.backup);
    let Some(at_ms) = backup.and_then(|view| view.facts.ended_at_ms) else { return };
    window.from_at_ms = at_ms;
    if window.to <= window.from {
        window.to_at_ms = Some(at_ms);
    }
}

fn gap(gap: &WalGap) -> Gap {
    let WalGap { segment, from, to, .. } = gap;
    Gap { timeline: segment.timeline, from: *from, to: *to, segment: segment.to_string() }
}

/// From when to when nothing can be recovered for a gap: from the last transaction before it, to the end of the first backup behind
/// it; either where that is known, and there.
fn unrecoverable(gap: &Gap, windows: &[Window]) -> (Option<i64>, Option<i64>) {
    let before = windows.iter().filter(|window| window.to <= gap.from);
    let newest = before.max_by_key(|window| (window.to, window.to_at_ms));
    // A backup that begins in what is missing brings its own WAL along, and may end in there, too.
    let behind = windows.iter().filter(|window| window.from > gap.from);
    (newest.and_then(|window| window.to_at_ms), behind.map(|window| window.from_at_ms).min())
}

fn end(view: &BackupView) -> Option<(BackupId, BackupEnd)> {
    let facts = &view.facts;
    let end = BackupEnd {
        lineage: facts.lineage,
        timeline: facts.timeline,
        start_lsn: facts.start_lsn,
        stop_lsn: facts.stop_lsn,
        wal_to: facts.wal_to.unwrap_or(facts.stop_lsn),
        stopped_at_ms: facts.recovers_to_ms(),
    };
    (facts.kind() == BackupKind::Physical && view.gone_at_ms.is_none()).then_some((view.id, end))
}

/// One window for all backups from which the archive leads equally far along the server's way, and one for each of the others: its
/// own end.
fn known_windows(
    backups: &[(BackupId, BackupEnd)],
    wal: Option<&WalStanding>,
    broken: &[BrokenStretch],
) -> Vec<Window> {
    let mut windows: Vec<Window> = Vec::new();
    let mut oldest_first = backups.to_vec();
    oldest_first.sort_by_key(|(_, end)| end.stopped_at_ms);
    for (backup, end) in oldest_first {
        let alone = Window {
            timeline: end.timeline,
            backup,
            backups: 1,
            from: end.stop_lsn,
            from_at_ms: end.stopped_at_ms,
            to: end.stop_lsn,
            to_at_ms: Some(end.stopped_at_ms),
            missing: None,
            before_archive: false,
        };
        let is_whole = in_the_way(broken, &end, wal).is_none();
        let wal = wal.filter(|wal| is_whole && !is_foreign(wal));
        let Some((wal, Reached { to, to_at_ms, missing })) =
            wal.and_then(|wal| Some((wal, reached(&end, wal)?)))
        else {
            windows.push(alone);
            continue;
        };
        let is_same = |window: &&mut Window| {
            window.timeline == wal.timeline && window.to == to && window.missing == missing
        };
        match windows.iter_mut().find(is_same) {
            Some(window) => {
                window.backups += 1;
                window.to_at_ms = window.to_at_ms.max(to_at_ms);
            }
            None => windows.push(Window { timeline: wal.timeline, to, to_at_ms, missing, ..alone }),
        }
    }
    windows
}

/// How far an archive leads from a backup.
struct Reached {
    to: Lsn,
    to_at_ms: Option<i64>,
    missing: Option<String>,
}

/// `None` where it does not lead on from there, as far as anybody knows.
fn reached(end: &BackupEnd, wal: &WalStanding) -> Option<Reached> {
    let own_end = Some(end.stopped_at_ms);
    if leads_on(end, wal) {
        let to_at_ms = Some(recovery_point(end, Some(wal)));
        return Some(Reached { to: wal.archived_to.max(end.stop_lsn), to_at_ms, missing: None });
    }
    let gap = wal.gaps.iter().find(|gap| end.wal_to < gap.to)?;
    if !is_on_way(end, wal) {
        return None;
    }
    // What the backup brought along fills the beginning of the gap, and the rest is missing.
    if end.wal_to > gap.from {
        let at = Segment::containing(end.wal_to, gap.segment.timeline, gap.segment_bytes);
        let missing = Some(at.file_name(gap.segment_bytes));
        return Some(Reached { to: end.stop_lsn, to_at_ms: own_end, missing });
    }
    let missing = Some(gap.segment.to_string());
    // Nobody says what is between the backup and the line before this gap, or whether anything was archived then.
    if end.wal_to < gap.line_from {
        return None;
    }
    if end.stop_lsn >= gap.from {
        return Some(Reached { to: end.stop_lsn, to_at_ms: own_end, missing });
    }
    let last = gap.last_end.filter(|last| last.at >= end.stop_lsn);
    Some(Reached { to: gap.from, to_at_ms: last.map(|last| last.at_ms), missing })
}

const HEAD: [&str; 8] =
    ["TIMELINE", "FROM BACKUP", "BACKUPS", "FROM", "FROM LSN", "TO", "TO LSN", "MISSING"];

fn row(window: &Window) -> Vec<String> {
    vec![
        window.timeline.to_string(),
        window.backup.to_string(),
        window.backups.to_string(),
        output::time(window.from_at_ms),
        window.from.to_string(),
        window.to_at_ms.map_or_else(|| "-".to_owned(), output::time),
        window.to.to_string(),
        window.missing.clone().unwrap_or_default(),
    ]
}

fn said_of_known(known: &Known) -> String {
    let mut text = output::table(&HEAD, known.windows.iter().map(row).collect());
    if known.windows.is_empty() {
        let _ = write!(text, "\n{} has no backup: its WAL leads nowhere.", known.cluster);
    }
    if let Some(trouble) = &known.trouble {
        let _ = write!(text, "\n{}: {trouble}.", known.cluster);
    }
    for gap in &known.gaps {
        text.push_str(&said_of_gap(&known.cluster, gap, &known.windows));
    }
    for Broken { stretch, in_the_way_of, abandoned } in &known.broken_wal {
        let BrokenStretch { timeline, from, to, at_ms, .. } = stretch;
        let matters = match (in_the_way_of, abandoned) {
            (_, true) => "its server left that branch".to_owned(),
            (0, false) => "no backup that is there needs it".to_owned(),
            (n, false) => format!("it is in the way of {}", count(*n, "backup")),
        };
        let _ = write!(
            text,
            "\n{}: WAL of timeline {timeline} from {from} to {to} could not be replayed in a proof at {}: {matters}.",
            known.cluster,
            output::time(*at_ms)
        );
    }
    for WalAncestor { timeline, left_at } in &known.left {
        let _ = write!(
            text,
            "\n{}: its server left timeline {timeline} at {left_at}: what was archived of it behind that is in no window here.",
            known.cluster
        );
    }
    if known.state.is_finding() {
        let _ = write!(text, "\n{} is {}: {}.", known.cluster, known.state, known.reason);
    }
    text
}

/// That a gap cannot be recovered into, as a part of a sentence.
pub(crate) fn nothing_between(from_at_ms: Option<i64>, to_at_ms: i64) -> String {
    let to = output::time(to_at_ms);
    match from_at_ms {
        Some(from) => format!("no moment between {} and {to} can be recovered", output::time(from)),
        None => format!("no moment in the gap before {to} can be recovered"),
    }
}

/// A gap in one sentence: in positions, and as far as that is known in time.
fn said_of_gap(cluster: &ClusterName, gap: &Gap, windows: &[Window]) -> String {
    let Gap { timeline, from, to, segment } = gap;
    let when = match unrecoverable(gap, windows) {
        (Some(from), Some(to)) => format!("; {}", nothing_between(Some(from), to)),
        (Some(from), None) => format!(
            "; no moment after {} can be recovered before another backup is there",
            output::time(from)
        ),
        (None, _) => String::new(),
    };
    format!(
        "\n{cluster}: WAL is missing on timeline {timeline} from {segment}: recoverable before {from} and, from a backup that begins \
         there, after {to}{when}."
    )
}

fn said(all: &[Recoverable]) -> String {
    let mut rows = Vec::new();
    for one in all {
        for window in &one.windows {
            rows.push([vec![one.cluster.to_string()], row(window)].concat());
        }
    }
    let mut text = output::table(&[&["CLUSTER"], &HEAD[..]].concat(), rows);
    for one in all {
        let cluster = &one.cluster;
        if one.windows.is_empty() {
            let _ = write!(text, "\n{cluster} has no backup: its WAL leads nowhere.");
        }
        for window in one.windows.iter().filter(|window| window.before_archive) {
            let _ = write!(
                text,
                "\n{cluster}: backup {} was taken before anything was archived: it restores to its own end.",
                window.backup
            );
        }
        for gap in &one.gaps {
            text.push_str(&said_of_gap(cluster, gap, &one.windows));
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

#[cfg(test)]
mod tests {
    use proto::message::WalEnd;
    use proto::{LineageId, Timeline};

    use super::*;

    fn backup(n: u8, stop: u64) -> (BackupId, BackupEnd) {
        let end = BackupEnd {
            lineage: LineageId::mint(1, [1; 10]),
            timeline: Timeline(1),
            start_lsn: Lsn(stop - 1),
            stop_lsn: Lsn(stop),
            wal_to: Lsn(stop),
            stopped_at_ms: i64::try_from(stop).unwrap() * 1_000,
        };
        (BackupId::mint(1, [n; 10]), end)
    }

    fn wal() -> WalStanding {
        WalStanding {
            cluster: "orders".parse().unwrap(),
            lineage: LineageId::mint(1, [1; 10]),
            at_ms: 50_000,
            timeline: Timeline(1),
            ancestors: Vec::new(),
            server_lsn: Lsn(45),
            line_from: Lsn(15),
            archived_to: Lsn(40),
            safe_at_ms: Some(44_000),
            waiting: None,
            gap: None,
            gaps: Vec::new(),
            conflict: None,
        }
    }

    fn known(state: ClusterState, wal: &WalStanding, broken: &[(u64, u64)]) -> Known {
        let stretch = |(from, to): &(u64, u64)| BrokenStretch {
            lineage: wal.lineage,
            timeline: Timeline(1),
            from: Lsn(*from),
            to: Lsn(*to),
            at_ms: 1_000,
        };
        let view = serde_json::json!({
            "name": "orders", "state": state, "reason": "why", "site": null, "worker": null, "labels": {},
            "repository": null, "repository_location": null, "system_identifier": null,
            "server_version_num": null, "paused": false, "registered_at_ms": 1, "seen_at_ms": null,
            "wal": wal, "broken_wal": broken.iter().map(stretch).collect::<Vec<_>>(),
            "backup": null, "open_jobs": [],
        });
        Known::of(serde_json::from_value(view).unwrap(), &[backup(2, 20), backup(3, 30)])
    }

    #[test]
    fn wal_that_could_not_be_replayed_and_what_status_finds_end_with_findings() {
        use ClusterState::{AtRisk, Broken, Proved, Unknown};
        assert_eq!(known(Proved, &wal(), &[]).exit(), Exit::Ok);
        for state in [AtRisk, Broken, Unknown] {
            let known = known(state, &wal(), &[]);
            assert_eq!(known.exit(), Exit::Findings);
            assert!(said_of_known(&known).ends_with(&format!("\norders is {state}: why.")));
        }
        // The newest backup begins behind it, the one before does not.
        let broken = known(Proved, &wal(), &[(22, 25)]);
        assert_eq!((broken.exit(), broken.windows.len()), (Exit::Findings, 2));
        let says =
            "WAL of timeline 1 from 0/16 to 0/19 could not be replayed in a proof at 1970-01-01";
        let said = said_of_known(&broken);
        assert!(said.contains(says) && said.ends_with(": it is in the way of 1 backup."), "{said}");
        let before = known(Proved, &wal(), &[(5, 10)]);
        assert_eq!(before.exit(), Exit::Ok);
        assert!(said_of_known(&before).ends_with("no backup that is there needs it."));
    }

    #[test]
    fn what_the_server_left_behind_is_told() {
        let left = WalAncestor { timeline: Timeline(1), left_at: Lsn(32) };
        let promoted = WalStanding { timeline: Timeline(2), ancestors: vec![left], ..wal() };
        let known = known(ClusterState::Proved, &promoted, &[(35, 38)]);
        assert_eq!((known.exit(), known.windows.len()), (Exit::Ok, 1));
        let said = said_of_known(&known);
        assert!(said.contains(": its server left that branch.\n"), "{said}");
        let says = "orders: its server left timeline 1 at 0/20: what was archived of it behind that is in no window here.";
        assert!(said.ends_with(says), "{said}");
    }

    #[test]
    fn a_coordinator_knows_the_window_along_the_archive_and_each_backup_before_it() {
        let backups = [backup(3, 30), backup(1, 10), backup(2, 20)];
        let wal = wal();
        let found = |wal: Option<&WalStanding>| -> Vec<(u64, u64, usize, Option<i64>)> {
            let windows = known_windows(&backups, wal, &[]);
            windows.iter().map(|one| (one.from.0, one.to.0, one.backups, one.to_at_ms)).collect()
        };
        assert_eq!(found(Some(&wal)), [(10, 10, 1, Some(10_000)), (20, 40, 2, Some(44_000))]);
        assert_eq!(found(None).len(), 3, "each backup leads to its own end");
        // Along two gaps, as the repository tells it: segments have ten bytes here.
        let gap = |segment: u32, line_from, from, to, last: Option<(u64, i64)>| WalGap {
            segment: format!("00000001000000000000{segment:04X}").parse().unwrap(),
            segment_bytes: 10,
            line_from: Lsn(line_from),
            from: Lsn(from),
            to: Lsn(to),
            last_end: last.map(|(at, at_ms)| WalEnd { at: Lsn(at), at_ms }),
        };
        let gaps = vec![gap(2, 10, 20, 30, Some((17, 17_500))), gap(5, 30, 50, 60, None)];
        let torn = WalStanding {
            line_from: Lsn(60),
            archived_to: Lsn(90),
            server_lsn: Lsn(95),
            gaps,
            ..wal
        };
        let at = |n: u8, stop: u64, wal_to: u64| {
            let (id, end) = backup(n, stop);
            (id, BackupEnd { wal_to: Lsn(wal_to), ..end })
        };
        let backups = [
            at(1, 12, 20),
            at(2, 18, 20),
            at(3, 21, 25),
            at(4, 35, 40),
            at(5, 66, 70),
            at(6, 3, 5),
        ];
        let windows = known_windows(&backups, Some(&torn), &[]);
        let told = |window: &Window| {
            let missing = window.missing.as_ref().map(|name| name[20..].to_owned());
            (window.from.0, window.to.0, window.backups, window.to_at_ms, missing)
        };
        let missing = |n: &str| Some(n.to_owned());
        let expected = [
            (3, 3, 1, Some(3_000), None),
            (12, 20, 2, Some(17_500), missing("0002")),
            // It brought the first half of the segment along.
            (21, 21, 1, Some(21_000), missing("0002")),
            (35, 50, 1, None, missing("0005")),
            (66, 90, 1, Some(66_000), None),
        ];
        assert_eq!(windows.iter().map(told).collect::<Vec<_>>(), expected);
        let wal = torn;
        // What another server wrote is nobody's window.
        let foreign = WalStanding { server_lsn: Lsn(39), ..wal };
        assert_eq!(found(Some(&foreign)).len(), 3);
    }
}
