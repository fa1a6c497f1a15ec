//! How a cluster archives its WAL, in one sentence with the cure: for `cluster show`, `doctor` and `up`.

use proto::ClusterName;
use proto::message::{ArchiveSetup, WalStanding};

use crate::commands::recovery::{Behind, nothing_between};
use crate::output;

/// An archive that nobody looked at for so long says nothing any more.
const SILENCE_MAX_MS: i64 = 120_000;
/// The cure where two servers archive under one name.
const STOP_THE_OTHER: &str = "Find that server, a clone or an old primary, and stop it, or give it another --cluster in its archive_command.";

/// What is to be said of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Said {
    /// Nothing is wrong. Archiving that nobody has asked for is not wrong.
    pub(crate) is_good: bool,
    /// How it is.
    pub(crate) what: String,
    /// What to do; empty when there is nothing to do.
    pub(crate) cure: String,
}

/// What is known of the archive itself.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Seen<'a> {
    /// Nobody has looked into it.
    Nothing,
    /// The server says that it archived this file last, and when, Unix milliseconds.
    Told(&'a str, i64),
    /// Its worker looked into it; and what leads on behind its newest gap.
    Standing(&'a WalStanding, Option<Behind>),
}

impl<'a> Seen<'a> {
    /// What a worker saw, if one did.
    pub(crate) fn of(wal: Option<&'a WalStanding>, behind: Option<Behind>) -> Self {
        wal.map_or(Self::Nothing, |wal| Self::Standing(wal, behind))
    }
}

/// Judges how a server is set up, and what is known of its archive.
pub(crate) fn said(
    cluster: &ClusterName,
    setup: &ArchiveSetup,
    seen: Seen<'_>,
    now_ms: i64,
) -> Said {
    let waiting = setup.pending_restart.join(" and ");
    // A server archives by the mode that is in effect, whatever its next start makes of it.
    if setup.mode == "off" && setup.pending_restart.iter().any(|name| name == "archive_mode") {
        return Said {
            is_good: false,
            what: format!("PENDING RESTART for {waiting}: nothing is archived before"),
            cure: format!(
                "Restart the server, then run: pgmuster cluster enable-wal {cluster} --wait"
            ),
        };
    }
    let now = in_effect(cluster, setup, seen, now_ms);
    if waiting.is_empty() {
        return now;
    }
    let cure = "pg_file_settings shows what the next restart changes.";
    Said {
        what: format!("{}; a change of {waiting} waits for a restart", now.what),
        // A command stands at the end, where it can be copied.
        cure: if now.cure.is_empty() { cure.to_owned() } else { format!("{cure} {}", now.cure) },
        ..now
    }
}

/// The same, of what is in effect.
fn in_effect(cluster: &ClusterName, setup: &ArchiveSetup, seen: Seen<'_>, now_ms: i64) -> Said {
    let bad = |what: String, cure: String| Said { is_good: false, what, cure };
    let command = format!("pgmuster cluster enable-wal {cluster} --wait");
    if setup.mode == "off" {
        return Said {
            is_good: true,
            what: "off: recoverable to the end of each backup, and to no moment after it"
                .to_owned(),
            cure: format!("For any moment run: {command} (--plan says what it sets)."),
        };
    }
    let mode = &setup.mode;
    if !setup.has_command {
        return bad(
            format!(
                "archive_mode is {mode} and archive_command is empty: the server keeps all its WAL"
            ),
            format!("Set it with: {command}"),
        );
    }
    // It is what the archiver fails for.
    if let Seen::Standing(wal, _) = seen
        && let Some(conflict) = wal.conflict.filter(|conflict| conflict.is_foreign)
        && now_ms.saturating_sub(wal.at_ms) <= SILENCE_MAX_MS
    {
        return bad(
            format!(
                "another server archives under its name: segment {} differs, so this one's is refused",
                conflict.segment
            ),
            STOP_THE_OTHER.to_owned(),
        );
    }
    if let Some(file) = &setup.failing_at {
        let kept = setup.backlog.map_or_else(String::new, |backlog| {
            let segments = output::count(backlog.segments, "segment");
            let age = output::duration(now_ms.saturating_sub(backlog.since_ms));
            format!(
                ": {segments}, the oldest for {age}; pg_wal has {}",
                output::bytes(backlog.pg_wal_bytes)
            )
        });
        return bad(
            format!("its archiver fails at {file}, and the server keeps all its WAL{kept}"),
            "The server's log has what archive_command said.".to_owned(),
        );
    }
    let (wal, behind) = match seen {
        Seen::Standing(wal, behind) => (wal, behind),
        Seen::Told(file, at_ms) => {
            return Said {
                is_good: true,
                what: format!(
                    "on (archive_mode = {mode}), last archived {file} at {}",
                    output::time(at_ms)
                ),
                cure: String::new(),
            };
        }
        Seen::Nothing => {
            return Said {
                is_good: true,
                what: format!(
                    "on (archive_mode = {mode}); nothing of it was seen in the repository yet"
                ),
                cure: format!("See a segment arrive with: {command}"),
            };
        }
    };
    let age_ms = now_ms.saturating_sub(wal.at_ms);
    if age_ms > SILENCE_MAX_MS {
        let ago = output::duration(age_ms);
        return bad(
            format!("nobody has looked at the archive for {ago}"),
            "The worker's log says why it cannot.".to_owned(),
        );
    }
    if let Some(waiting) = wal.waiting {
        let segments = output::count(waiting.segments, "segment");
        return bad(
            format!("{segments} from {} on did not arrive in the repository", waiting.segment),
            "The server's log has what archive_command said; the server keeps them and tries again.".to_owned(),
        );
    }
    match (wal.gap, behind) {
        (None, _) | (Some(_), Some(Behind { is_proved: true, .. })) => {}
        (Some(gap), None) => {
            return bad(
                format!(
                    "{gap} is missing, and what lies behind it counts only from another backup on"
                ),
                format!("Take one: pgmuster backup {cluster} --verify 5"),
            );
        }
        (Some(gap), Some(Behind { is_proved: false, .. })) => {
            return bad(
                format!("{gap} is missing, and no backup behind it is proved"),
                format!("Prove the newest one: pgmuster verify {cluster}"),
            );
        }
    }
    let last = wal.safe_at_ms.map_or_else(String::new, |at_ms| {
        format!(", with what had committed {}", output::ago(now_ms, Some(at_ms)))
    });
    let torn = wal.gap.zip(behind).map_or_else(String::new, |(gap, behind)| {
        let nothing = nothing_between(behind.from_at_ms, behind.to_at_ms);
        format!("; {gap} is missing, and {nothing}")
    });
    let (other, cure) = match wal.conflict {
        Some(conflict) => {
            let what = "another server archives under its name";
            let what = format!("; {what}: segment {} differs, and was refused", conflict.segment);
            (what, STOP_THE_OTHER.to_owned())
        }
        None if torn.is_empty() => Default::default(),
        // There is nothing to be done about it any more.
        None => (
            String::new(),
            format!("A proved backup leads on behind that: pgmuster recovery windows {cluster}"),
        ),
    };
    Said {
        is_good: true,
        what: format!("on, archived up to {}{last}{torn}{other}", wal.archived_to),
        cure,
    }
}

#[cfg(test)]
mod tests {
    use proto::message::{WalBacklog, WalConflict, WalWaiting};
    use proto::{LineageId, Lsn, Timeline};

    use super::*;

    const NOW_MS: i64 = 1_700_000_000_000;

    fn setup() -> ArchiveSetup {
        ArchiveSetup {
            mode: "on".to_owned(),
            has_command: true,
            pending_restart: Vec::new(),
            failing_at: None,
            backlog: None,
        }
    }

    fn standing() -> WalStanding {
        WalStanding {
            cluster: "orders".parse().unwrap(),
            lineage: LineageId::mint(1, [1; 10]),
            at_ms: NOW_MS - 5_000,
            timeline: Timeline(1),
            ancestors: Vec::new(),
            server_lsn: Lsn(900),
            line_from: Lsn(1),
            archived_to: Lsn(0x300_0000),
            safe_at_ms: Some(NOW_MS - 61_000),
            waiting: None,
            gap: None,
            gaps: Vec::new(),
            conflict: None,
        }
    }

    fn told(setup: &ArchiveSetup, seen: Seen<'_>) -> (bool, String) {
        let said = said(&"orders".parse().unwrap(), setup, seen, NOW_MS);
        (said.is_good, format!("{} | {}", said.what, said.cure))
    }

    #[test]
    fn only_a_mode_that_is_off_archives_nothing_before_a_restart() {
        let pending = |mode: &str, names: &[&str]| ArchiveSetup {
            mode: mode.to_owned(),
            pending_restart: names.iter().map(|name| (*name).to_owned()).collect(),
            ..setup()
        };
        let (good, text) = told(&pending("off", &["archive_mode", "wal_level"]), Seen::Nothing);
        let expected = "PENDING RESTART for archive_mode and wal_level: nothing is archived before";
        assert!(!good && text.starts_with(expected), "{text}");
        // A restart does not make it archive.
        let (good, text) = told(&pending("off", &["wal_level"]), Seen::Nothing);
        assert!(good && text.starts_with("off: recoverable to the end of each backup"), "{text}");
        let cure = "; a change of wal_level waits for a restart | pg_file_settings shows what the next restart changes. For";
        assert!(text.contains(cure), "{text}");
        // It archives, whatever comes.
        let standing = standing();
        for (mode, name) in [("on", "wal_level"), ("on", "archive_mode"), ("always", "wal_level")] {
            let waits = format!("; a change of {name} waits for a restart | pg_file_settings");
            for (seen, how) in [
                (Seen::Standing(&standing, None), "on, archived up to 0/3000000"),
                (
                    Seen::Told("0000000100000000000000B3", NOW_MS),
                    "last archived 0000000100000000000000B3",
                ),
            ] {
                let (good, text) = told(&pending(mode, &[name]), seen);
                assert!(
                    good && text.contains(how) && text.contains(&waits),
                    "{mode} {name}: {text}"
                );
            }
        }
        // What is wrong with it is wrong before and after.
        let empty = ArchiveSetup { has_command: false, ..pending("on", &["wal_level"]) };
        let (good, text) = told(&empty, Seen::Nothing);
        assert!(!good && text.contains("archive_command is empty"), "{text}");
        // What it archived once is no news of a server that archives nothing now.
        let (_, text) = told(&pending("off", &[]), Seen::Told("0000000100000000000000B3", NOW_MS));
        assert!(text.starts_with("off: "), "{text}");
    }

    #[test]
    fn each_thing_that_keeps_wal_from_its_archive_is_told_with_its_cure() {
        let tell =
            |setup: &ArchiveSetup, wal: Option<&WalStanding>| told(setup, Seen::of(wal, None));
        let off = ArchiveSetup { mode: "off".to_owned(), has_command: false, ..setup() };
        let (good, text) = tell(&off, None);
        assert!(good && text.contains("run: pgmuster cluster enable-wal orders"), "{text}");
        let pending = vec!["archive_mode".to_owned()];
        let pending = ArchiveSetup { pending_restart: pending, has_command: true, ..off };
        let (good, text) = tell(&pending, None);
        assert!(!good && text.starts_with("PENDING RESTART for archive_mode"), "{text}");
        let (good, text) = tell(&ArchiveSetup { has_command: false, ..setup() }, None);
        assert!(!good && text.contains("archive_command is empty"), "{text}");
        let failing =
            ArchiveSetup { failing_at: Some("0000000100000000000000B3".into()), ..setup() };
        let (good, text) = tell(&failing, Some(&standing()));
        assert!(!good && text.contains("fails at 0000000100000000000000B3"), "{text}");
        let backlog = WalBacklog { segments: 12, since_ms: NOW_MS - 61_000, pg_wal_bytes: 5_000 };
        let full = ArchiveSetup { backlog: Some(backlog), ..failing.clone() };
        let (_, text) = tell(&full, Some(&standing()));
        assert!(
            text.contains("all its WAL: 12 segments, the oldest for 1m01s; pg_wal has"),
            "{text}"
        );
        let (good, text) = tell(&setup(), None);
        assert!(good && text.contains("nothing of it was seen"), "{text}");
        let (good, text) = tell(&setup(), Some(&standing()));
        assert_eq!(
            (good, text.as_str()),
            (true, "on, archived up to 0/3000000, with what had committed 1m01s ago | ")
        );
        let old = WalStanding { at_ms: NOW_MS - 180_000, ..standing() };
        let (good, text) = tell(&setup(), Some(&old));
        assert!(!good && text.contains("for 3m00s"), "{text}");
        let segment = "000000010000000000000002".parse().unwrap();
        let waiting = Some(WalWaiting { segment, since_ms: 1, segments: 1 });
        let (good, text) = tell(&setup(), Some(&WalStanding { waiting, ..standing() }));
        assert!(!good && text.starts_with("1 segment from 000000010000000000000002 on"), "{text}");
        let (good, text) = tell(&setup(), Some(&WalStanding { gap: Some(segment), ..standing() }));
        assert!(!good && text.contains("pgmuster backup orders"), "{text}");
        // With a backup behind it, there is something to know and nothing to do.
        let torn = WalStanding { gap: Some(segment), ..standing() };
        let behind = |is_proved, from_at_ms| {
            let to_at_ms = NOW_MS - 3_600_000;
            told(&setup(), Seen::of(Some(&torn), Some(Behind { from_at_ms, to_at_ms, is_proved })))
        };
        let (good, text) = behind(false, None);
        assert!(!good && text.ends_with("pgmuster verify orders"), "{text}");
        let (good, text) = behind(true, Some(NOW_MS - 7_200_000));
        assert!(good && text.starts_with("on, archived up to 0/3000000"), "{text}");
        let nothing =
            "no moment between 2023-11-14T20:13:20Z and 2023-11-14T21:13:20Z can be recovered";
        assert!(text.contains(&format!("; {segment} is missing, and {nothing} | ")), "{text}");
        assert!(text.ends_with("pgmuster recovery windows orders"), "{text}");
        let (good, text) = behind(true, None);
        assert!(
            good && text.contains("no moment in the gap before 2023-11-14T21:13:20Z"),
            "{text}"
        );
        // Why its archiver fails comes before that it fails.
        let other = |is_foreign| {
            let conflict = Some(WalConflict { segment, at: Lsn(0x200_0000), is_foreign });
            WalStanding { conflict, ..standing() }
        };
        let what = format!("another server archives under its name: segment {segment} differs");
        let (good, text) = tell(&failing, Some(&other(true)));
        assert!(!good && text.starts_with(&what) && text.contains("--cluster"), "{text}");
        let (good, text) = tell(&setup(), Some(&other(false)));
        assert!(good && text.starts_with("on, archived") && text.contains(&what), "{text}");
    }
}
