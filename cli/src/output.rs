//! The only place that writes to standard output (what was asked for) and standard error (talk about it).

use std::io::{IsTerminal as _, Write as _};
use std::sync::OnceLock;
use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};
use proto::Failure;
pub(crate) use proto::words::{count, duration};
use serde::Serialize;

use crate::args::Output;
use crate::hints::Place;

/// The repository that this process is about, for the commands in what is said.
static PLACE: OnceLock<Place> = OnceLock::new();

/// Has every command that is said from now on name this repository, where it names one. Once a process.
pub(crate) fn about(place: Place) {
    // The first one is what was typed.
    let _ = PLACE.set(place);
}

fn filled(text: &str) -> String {
    PLACE.get().map_or_else(|| text.to_owned(), |place| place.fill(text))
}

/// Writes what was asked for. A reader that went away (`| head`) is no failure.
pub(crate) fn data(text: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody is left to tell when this fails.
    let _ = writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush());
}

/// Says something about the work.
pub(crate) fn talk(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", filled(text));
}

/// How long nobody wonders why nothing happens.
const SLOW: Duration = Duration::from_secs(5);

/// Does something that is soon done as a rule, and says what it is when it takes long.
pub(crate) async fn told_when_slow<T>(what: &str, work: impl Future<Output = T>) -> T {
    when_slow(|| talk(&format!("Still {what}")), work).await
}

async fn when_slow<T>(tell: impl FnOnce(), work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    if let Ok(done) = tokio::time::timeout(SLOW, &mut work).await {
        return done;
    }
    tell();
    work.await
}

/// Prints a value as JSON, or as people read it.
pub(crate) fn show<T: Serialize>(output: Output, value: &T, people: impl FnOnce(&T) -> String) {
    match output {
        Output::Json => data(&json(value)),
        Output::Table => data(&filled(&people(value))),
    }
}

/// One JSON document.
pub(crate) fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string_pretty(value).expect("what is shown serialises to JSON")
}

/// Tells a failure: what happened, what a program said about it, and the cure.
pub(crate) fn failure(failure: &Failure) {
    talk(&format!("error: {failure}"));
    for line in details(failure) {
        talk(&line);
    }
    if !failure.hint.is_empty() {
        talk(&format!("hint: {}", failure.hint));
    }
}

/// The lines of a program's log that belong to a failure, marked as such.
pub(crate) fn details(failure: &Failure) -> impl Iterator<Item = String> + '_ {
    failure.details.iter().map(|line| format!("  | {line}"))
}

/// A table without frames: it can be read, and cut into columns by other programs.
pub(crate) fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    if !std::io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    table.set_header(head.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines.join("\n")
}

/// Whether somebody watches standard error.
pub(crate) fn is_watched() -> bool {
    std::io::stderr().is_terminal()
}

/// A number of bytes as people say it.
pub(crate) fn bytes(count: u64) -> String {
    bytesize::ByteSize(count).display().iec().to_string()
}

/// How much was restored, WAL apart as a backup tells it, and how little of it had to be fetched.
pub(crate) fn restored(done: &proto::job::RestoreOutcome) -> String {
    let files = count(done.files.saturating_sub(done.wal_files), "file");
    let size = bytes(done.size_bytes.saturating_sub(done.wal_bytes));
    let all = format!("{files}, {size}{}", and_wal(done.wal_bytes));
    if done.reused_bytes == 0 {
        return all;
    }
    let (reused, fetched) = (bytes(done.reused_bytes), bytes(done.fetched_bytes));
    format!("{all}, of which {reused} were right already; {fetched} fetched")
}

/// The WAL beside the files of a backup, in what it says of itself and in what is restored of it.
pub(crate) fn and_wal(wal_bytes: u64) -> String {
    if wal_bytes == 0 { String::new() } else { format!(", and {} of WAL", bytes(wal_bytes)) }
}

/// Where a restored server is, or will be when it is started.
pub(crate) fn recovered(done: &proto::job::RestoreOutcome) -> String {
    let Some(settings) = &done.settings_apart else { return where_it_is(done) };
    let directory = &done.directory;
    format!(
        "{}. It has no postgresql.conf: the source had its settings elsewhere, and they are in {settings}. They name the source's \
         directories, so a server that is started with them needs -c data_directory={directory} as well, and -c hba_file and \
         -c ident_file",
        where_it_is(done)
    )
}

fn where_it_is(done: &proto::job::RestoreOutcome) -> String {
    let Some(recovery) = &done.recovery else {
        let silent = if done.archiving_stopped {
            " and archives nothing (archive_mode in postgresql.auto.conf)"
        } else {
            ""
        };
        return format!("a server started there recovers to {}{silent}", done.stop_lsn);
    };
    let Some(reached) = &recovery.reached else {
        return format!("a server started there recovers to {}", recovery.target);
    };
    let commit = reached.last_commit.map_or(String::new(), |at| format!(", last commit {at}"));
    let evidence = &reached.evidence;
    format!("the server is {}, at {}{commit} ({evidence})", reached.state, reached.lsn)
}

/// What a recovery that is done left behind, a line each.
pub(crate) fn not_taken(done: &proto::job::RestoreOutcome) -> String {
    done.plan.iter().flat_map(|line| ["\n", line]).collect()
}

/// A moment with its zone, to the second: in UTC, like every time that is printed.
pub(crate) fn time(at_ms: i64) -> String {
    let at = jiff::Timestamp::from_millisecond(at_ms.div_euclid(1_000) * 1_000);
    at.map_or_else(|_| "-".to_owned(), |at| at.to_string())
}

/// How long ago, or a dash.
pub(crate) fn ago(now_ms: i64, then_ms: Option<i64>) -> String {
    then_ms.map_or_else(|| "-".to_owned(), |then| format!("{} ago", duration(now_ms - then)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_without_settings_says_where_they_are_and_that_they_name_the_source() {
        let mut done = proto::job::RestoreOutcome {
            backup: proto::BackupId::from(proto::AttemptId::mint(1, [1; 10])),
            directory: "/restored".to_owned(),
            files: 1,
            size_bytes: 1,
            wal_files: 0,
            wal_bytes: 0,
            fetched_bytes: 1,
            reused_bytes: 0,
            stop_lsn: proto::Lsn(0x0100_0028),
            planned_only: false,
            plan: vec![],
            recovery: None,
            archiving_stopped: false,
            settings_apart: None,
        };
        assert_eq!(recovered(&done), "a server started there recovers to 0/1000028");
        done.settings_apart = Some("/restored/pgmuster_external".to_owned());
        let said = recovered(&done);
        assert!(said.contains("in /restored/pgmuster_external"), "{said}");
        assert!(said.contains("-c data_directory=/restored "), "{said}");
        (done.files, done.size_bytes) = (970, 41 << 20);
        (done.wal_files, done.wal_bytes, done.reused_bytes) = (1, 16 << 20, 3 << 20);
        let said = "969 files, 25.0 MiB, and 16.0 MiB of WAL, of which 3.0 MiB were right already; 1 B fetched";
        assert_eq!(restored(&done), said);
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_long_is_said_once_after_five_seconds_and_ends_all_the_same() {
        for (takes_ms, told_at_ms) in [(4_999, None), (5_001, Some(5_000)), (60_000, Some(5_000))] {
            let began = tokio::time::Instant::now();
            let mut told_at = None;
            let work = async {
                tokio::time::sleep(Duration::from_millis(takes_ms)).await;
                takes_ms
            };
            assert_eq!(when_slow(|| told_at = Some(began.elapsed()), work).await, takes_ms);
            assert_eq!(told_at, told_at_ms.map(Duration::from_millis));
            assert_eq!(began.elapsed(), Duration::from_millis(takes_ms));
        }
    }

    #[test]
    fn columns_begin_at_the_edge_and_are_two_spaces_apart() {
        let rows = vec![
            vec!["orders".to_owned(), "PROVED".to_owned(), "fine".to_owned()],
            vec!["x".to_owned(), "AT_RISK".to_owned(), String::new()],
        ];
        let lines = "CLUSTER  STATE    WHY\norders   PROVED   fine\nx        AT_RISK";
        assert_eq!(table(&["CLUSTER", "STATE", "WHY"], rows), lines);
    }

    #[test]
    fn moments_have_their_zone() {
        assert_eq!(time(1_700_000_000_999), "2023-11-14T22:13:20Z");
    }
}
