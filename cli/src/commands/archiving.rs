//! How a cluster archives its WAL, in one sentence with the cure: for `cluster show`, `doctor` and `up`.

use proto::ClusterName;
use proto::message::{ArchiveSetup, WalStanding};

use crate::output;

/// An archive that nobody looked at for so long says nothing any more.
const SILENCE_MAX_MS: i64 = 120_000;

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

/// Judges how a server is set up, and what its worker sees in the archive, where that is known.
pub(crate) fn said(
    cluster: &ClusterName,
    setup: &ArchiveSetup,
    wal: Option<&WalStanding>,
    now_ms: i64,
) -> Said {
    let bad = |what: String, cure: String| Said { is_good: false, what, cure };
    let command = format!("pgmuster cluster enable-wal {cluster} --wait");
    if !setup.pending_restart.is_empty() {
        return bad(
            format!(
                "PENDING RESTART for {}: nothing is archived before",
                setup.pending_restart.join(" and ")
            ),
            format!("Restart the server, then run: {command}"),
        );
    }
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
    if let Some(file) = &setup.failing_at {
        return bad(
            format!("its archiver fails at {file}, and the server keeps all its WAL"),
            "The server's log has what archive_command said.".to_owned(),
        );
    }
    let Some(wal) = wal else {
        return Said {
            is_good: true,
            what: format!(
                "on (archive_mode = {mode}); nothing of it was seen in the repository yet"
            ),
            cure: format!("See a segment arrive with: {command}"),
        };
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
    if let Some(gap) = wal.gap {
        return bad(
            format!("{gap} is missing, and what lies behind it counts only from another backup on"),
            format!("Take one: pgmuster backup {cluster}"),
        );
    }
    let last = wal.safe_at_ms.map_or_else(String::new, |at_ms| {
        format!(", with what had committed {}", output::ago(now_ms, Some(at_ms)))
    });
    Said {
        is_good: true,
        what: format!("on, archived up to {}{last}", wal.archived_to),
        cure: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use proto::message::WalWaiting;
    use proto::{LineageId, Lsn, Timeline};

    use super::*;

    const NOW_MS: i64 = 1_700_000_000_000;

    fn setup() -> ArchiveSetup {
        ArchiveSetup {
            mode: "on".to_owned(),
            has_command: true,
            pending_restart: Vec::new(),
            failing_at: None,
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
        }
    }

    #[test]
    fn each_thing_that_keeps_wal_from_its_archive_is_told_with_its_cure() {
        let tell = |setup: &ArchiveSetup, wal: Option<&WalStanding>| {
            let said = said(&"orders".parse().unwrap(), setup, wal, NOW_MS);
            (said.is_good, format!("{} | {}", said.what, said.cure))
        };
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
    }
}
