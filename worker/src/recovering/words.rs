//! What a recovery is told with: the command that fetches WAL, and the sentences of a plan.

use std::path::PathBuf;

use jiff::Timestamp;
use postgres::recovery::RecoverySettings;
use postgres::wal::History;
use proto::job::RecoveryOutcome;
use proto::words::count;
use proto::{BackupFacts, BackupId, LineageId, Recovery, RecoveryTarget, TargetAction, Timeline};

use crate::archive::{Until, quoted};

/// How a restored server calls this program for WAL. No secret stands in it: keys are named by reference.
#[derive(Debug, Clone)]
pub struct Fetching {
    /// This program, absolute.
    pub program: PathBuf,
    /// Where it gets it.
    pub from: FetchFrom,
}

/// Where WAL comes from.
#[derive(Debug, Clone)]
pub enum FetchFrom {
    /// Out of the repository of a URL, opened by `--key` or `--passphrase` with its reference.
    Repository(String, [String; 2]),
    /// From a service that answers at this socket, and from nowhere else.
    Service(PathBuf),
}

impl Fetching {
    /// The `restore_command`.
    pub(super) fn command(
        &self,
        lineage: LineageId,
        standby: bool,
        until: Option<Until>,
    ) -> String {
        let program = quoted(&self.program.display().to_string());
        let from = match &self.from {
            FetchFrom::Repository(url, [option, reference]) => {
                format!("--repository {} {option} {}", quoted(url), quoted(reference))
            }
            FetchFrom::Service(socket) => {
                format!("--socket {}", quoted(&socket.display().to_string()))
            }
        };
        let mut command = format!("{program} wal get \"%f\" \"%p\" {from} --lineage {lineage}");
        if standby {
            command.push_str(" --standby");
        }
        if let Some(until) = until {
            command.extend([" --until ", &until.to_string()]);
        }
        command
    }
}

/// What the sentences are about.
pub(super) struct Told<'a> {
    /// How the timeline came to be that is followed.
    pub(super) history: &'a History,
    pub(super) backup: BackupId,
    pub(super) facts: &'a BackupFacts,
    pub(super) recovery: &'a Recovery,
    pub(super) outcome: &'a RecoveryOutcome,
    pub(super) settings: &'a RecoverySettings,
    /// Segments that only the backup has.
    pub(super) brought: u64,
    pub(super) is_gap: bool,
    pub(super) notes: &'a [String],
}

/// What the latest moment is where nothing is archived behind a backup.
pub(super) fn nothing_behind(backup: BackupId, facts: &BackupFacts) -> String {
    let ended = Timestamp::from_millisecond(facts.stopped_at_ms).unwrap_or_default();
    let mut modes = facts.settings.iter().filter(|one| one.name == "archive_mode");
    let why = if modes.any(|one| one.value == "off") {
        ", and archive_mode was off when it was taken"
    } else {
        ""
    };
    format!(
        "nothing is archived behind backup {backup}{why}: the latest moment is the end of this backup, {ended}, and nothing that was \
         committed later is recovered. For later moments have {cluster} archive its WAL: pgmuster cluster enable-wal {cluster} --wait",
        cluster = facts.cluster
    )
}

pub(super) fn lines(told: &Told<'_>) -> Vec<String> {
    let Told { facts, recovery, outcome, settings, .. } = told;
    let ended = Timestamp::from_millisecond(facts.stopped_at_ms).unwrap_or_default();
    let just = if recovery.before { "just before " } else { "" };
    let mut lines = vec![
        format!("recover to {just}{} along timeline {}", recovery.to, outcome.timeline),
        format!(
            "begin with backup {}, which ended at {} ({ended}) on timeline {}",
            told.backup, facts.stop_lsn, facts.timeline
        ),
    ];
    lines.extend(branch_points(told.history, facts.timeline));
    lines.extend(told.notes.iter().cloned());
    let upto = match outcome.recoverable_to_time {
        Some(time) => format!("{}, newest commit {time}", outcome.recoverable_to),
        None => outcome.recoverable_to.to_string(),
    };
    let behind = if told.is_gap { ", where there is a gap" } else { "" };
    lines.push(format!("WAL is there up to {upto}{behind}"));
    let bounded = !matches!(settings.target, RecoveryTarget::Latest | RecoveryTarget::Time(_));
    lines.push(format!(
        "replay {}{} of WAL, {}, which the server fetches one by one; {} of them are in the backup only",
        if bounded { "" } else { "at most " },
        count(outcome.segments, "segment"),
        count(outcome.wal_bytes, "byte"),
        told.brought
    ));
    lines.push(format!(
        "write {} and {}; recovery settings that are there go",
        postgres::recovery::SETTINGS_FILE,
        settings.signal()
    ));
    lines.push(if recovery.keep_archiving {
        "leave archive_mode as the backup has it: what the server writes once it is open is archived into the same lineage, on a timeline of its own".to_owned()
    } else {
        crate::restoring::STOPS_ARCHIVING.to_owned()
    });
    lines.push(match (recovery.standby, recovery.action) {
        (true, _) => "a server started there follows the archive as a standby".to_owned(),
        (false, TargetAction::Promote) => "a server that is started there replays WAL to that moment, and opens on a new timeline".to_owned(),
        (false, TargetAction::Pause) => {
            "a server that is started there replays WAL to that moment, and waits there until pg_wal_replay_resume() opens it".to_owned()
        }
        (false, TargetAction::Shutdown) => "a server that is started there replays WAL to that moment, and shuts down".to_owned(),
    });
    if let Some(port) = recovery.port {
        lines.push(format!("it listens at port {port}"));
    }
    if recovery.start {
        lines.push(
            "start it, alone, see that it came there, and only then start it for everybody"
                .to_owned(),
        );
    }
    lines
}

/// Where the way goes over to the next timeline, from the backup's own on.
fn branch_points(history: &History, from: Timeline) -> Option<String> {
    let entries = history.entries.iter().skip_while(|entry| entry.timeline != from);
    let points: Vec<String> = entries
        .map(|entry| format!("timeline {} at {}", entry.timeline, entry.switched_at))
        .collect();
    let to = history.timeline;
    (!points.is_empty())
        .then(|| format!("the way leaves {}, and comes to timeline {to}", points.join(", ")))
}

#[cfg(test)]
mod tests {
    use proto::Lsn;

    use super::*;

    #[test]
    fn a_command_survives_the_shell_and_the_server() {
        let fetching = Fetching {
            program: "/opt/it's/pgmuster".into(),
            from: FetchFrom::Repository(
                "file:///backups/100%".to_owned(),
                ["--key".to_owned(), "/etc/a key".to_owned()],
            ),
        };
        let lineage = LineageId::mint(1_700_000_000_003, [4; 10]);
        let command = fetching.command(lineage, true, Some(Until::Position(Lsn(0x300_0148))));
        assert_eq!(
            command,
            format!(
                "'/opt/it'\\''s/pgmuster' wal get \"%f\" \"%p\" --repository 'file:///backups/100%%' --key '/etc/a key' \
                 --lineage {lineage} --standby --until 0/3000148"
            )
        );
        // As a server does, and then a shell.
        let filled = command.replace("%f", "F").replace("%p", "pg_wal/R").replace("%%", "%");
        let script = format!("set -- {filled}; printf '%s\\n' \"$@\"");
        let said = std::process::Command::new("sh").arg("-c").arg(script).output().unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        let words: Vec<&str> = said.lines().collect();
        assert_eq!(words[0], "/opt/it's/pgmuster");
        assert_eq!(words[3..7], ["F", "pg_wal/R", "--repository", "file:///backups/100%"][..]);
        assert_eq!(words[8], "/etc/a key");
        let fetching = Fetching { from: FetchFrom::Service("/tmp/s/wal.sock".into()), ..fetching };
        assert_eq!(
            fetching.command(lineage, false, None),
            format!(
                "'/opt/it'\\''s/pgmuster' wal get \"%f\" \"%p\" --socket '/tmp/s/wal.sock' --lineage {lineage}"
            )
        );
    }
}
