//! What a server says about its recovery, from its log with `lc_messages = C`. PostgreSQL 14 to 18 say it in the same words.

use jiff::Timestamp;
use proto::{Lsn, RecoveryTarget, Timeline, recovery};

/// What stood in the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Said {
    /// Why replay stopped: `recovery stopping before commit of transaction 740, time …`.
    pub(crate) stopped: Option<String>,
    /// The end of replay.
    pub(crate) redo_done: Option<Lsn>,
    /// The time of the last commit that was replayed, as the server writes it.
    pub(crate) last_commit: Option<String>,
    /// The timeline that was begun.
    pub(crate) new_timeline: Option<Timeline>,
    /// What ended the server, if something did.
    pub(crate) fatal: Option<String>,
}

impl Said {
    /// Reads a log. Of what was said twice, as after a restart, the last counts.
    pub(crate) fn read(log: &str) -> Self {
        let mut said = Self::default();
        for line in log.lines() {
            let after = |words: &str| line.split_once(words).map(|(_, rest)| rest.trim());
            let word = |rest: &str| {
                rest.split([' ', '\t']).next().unwrap_or_default().trim_end_matches(',').to_owned()
            };
            if let Some(rest) = after("recovery stopping ") {
                said.stopped = Some(format!("recovery stopping {rest}"));
            } else if let Some(rest) = after("redo done at ") {
                said.redo_done = word(rest).parse().ok();
            } else if let Some(rest) = after("last completed transaction was at log time ") {
                said.last_commit = Some(rest.to_owned());
            } else if let Some(rest) = after("selected new timeline ID: ") {
                said.new_timeline = word(rest).parse().ok().map(Timeline);
            } else if let Some(rest) = after("FATAL:").or_else(|| after("PANIC:")) {
                // Clients that come too early are told so with the same word.
                if !["the database system is ", "role \"", "database \""]
                    .iter()
                    .any(|w| rest.starts_with(w))
                {
                    said.fatal = Some(rest.to_owned());
                }
            }
        }
        said
    }

    /// Whether the server says that it stopped at the target, and not merely somewhere.
    pub(crate) fn names(&self, target: &RecoveryTarget) -> bool {
        let Some(stopped) = &self.stopped else { return false };
        match target {
            RecoveryTarget::Latest => false,
            RecoveryTarget::Immediate => stopped.contains("after reaching consistency"),
            // It names the first record that begins there or behind.
            RecoveryTarget::Lsn(lsn) => {
                let named = stopped.split_once("location (LSN) \"");
                let at = named.and_then(|(_, rest)| rest.trim_end_matches('"').parse::<Lsn>().ok());
                at.is_some_and(|at| at >= *lsn)
            }
            RecoveryTarget::Name(name) => stopped
                .starts_with(&format!("recovery stopping at restore point \"{name}\", time ")),
            RecoveryTarget::Xid(xid) => {
                stopped.contains(&format!(" of transaction {},", recovery::low_half(*xid)))
            }
            RecoveryTarget::Time(_) => {
                stopped.contains(" of transaction ") && stopped.contains(", time ")
            }
        }
    }
}

/// A time as a server in UTC writes it: `2026-11-27 08:30:00.123456+00`.
pub(crate) fn time(text: &str) -> Option<Timestamp> {
    let (date, rest) = text.trim().split_once(' ')?;
    format!("{date}T{rest}").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
2026-11-27 08:30:00 [1] LOG:  starting archive recovery
2026-11-27 08:30:00 [9] FATAL:  the database system is starting up
2026-11-27 08:30:00 [1] LOG:  consistent recovery state reached at 0/3000100
2026-11-27 08:30:00 [1] LOG:  recovery stopping before commit of transaction 740, time 2026-11-27 08:29:00.5+00
2026-11-27 08:30:00 [1] LOG:  redo done at 0/30001F8 system usage: CPU: user: 0.00 s
2026-11-27 08:30:00 [1] LOG:  last completed transaction was at log time 2026-11-27 08:28:59.123456+00
2026-11-27 08:30:00 [1] LOG:  selected new timeline ID: 11
";

    #[test]
    fn a_log_is_read_for_where_recovery_ended_and_why() {
        let said = Said::read(LOG);
        assert_eq!(said.redo_done, Some(Lsn(0x300_01F8)));
        assert_eq!(said.new_timeline, Some(Timeline(11)));
        assert!(said.fatal.is_none());
        let commit = said.last_commit.as_deref().and_then(time);
        assert_eq!(commit, Some("2026-11-27T08:28:59.123456Z".parse().unwrap()));
        assert!(said.names(&RecoveryTarget::Xid(740)));
        assert!(said.names(&RecoveryTarget::Xid((1 << 32) + 740)));
        assert!(said.names(&RecoveryTarget::Time("2026-11-27T08:29:00Z".parse().unwrap())));
        let at_position = Said {
            stopped: Some("recovery stopping after WAL location (LSN) \"0/3000148\"".to_owned()),
            ..Said::default()
        };
        assert!(at_position.names(&RecoveryTarget::Lsn(Lsn(0x300_0148))));
        assert!(
            at_position.names(&RecoveryTarget::Lsn(Lsn(0x300_0140))),
            "inside the record before"
        );
        assert!(!at_position.names(&RecoveryTarget::Lsn(Lsn(0x300_0149))));
        for other in [
            RecoveryTarget::Xid(74),
            RecoveryTarget::Latest,
            RecoveryTarget::Immediate,
            RecoveryTarget::Lsn(Lsn(740)),
            RecoveryTarget::Name("740".to_owned()),
        ] {
            assert!(!said.names(&other), "{other}");
        }
    }

    #[test]
    fn each_target_has_its_own_words() {
        for (line, target) in [
            ("recovery stopping after reaching consistency", RecoveryTarget::Immediate),
            (
                "recovery stopping after WAL location (LSN) \"0/3000148\"",
                RecoveryTarget::Lsn(Lsn(0x300_0148)),
            ),
            (
                "recovery stopping before WAL location (LSN) \"0/3000148\"",
                RecoveryTarget::Lsn(Lsn(0x300_0148)),
            ),
            (
                "recovery stopping at restore point \"a \"b\"\", time 2026-11-27 08:29:00+00",
                RecoveryTarget::Name("a \"b\"".to_owned()),
            ),
        ] {
            let said = Said::read(&format!("x [1] LOG:  {line}\n"));
            assert!(said.names(&target), "{line}");
            assert!(!said.names(&RecoveryTarget::Xid(1)), "{line}");
        }
    }

    #[test]
    fn what_ended_a_server_is_told() {
        let said = Said::read(
            "x [1] FATAL:  recovery ended before configured recovery target was reached\n",
        );
        assert_eq!(
            said.fatal.as_deref(),
            Some("recovery ended before configured recovery target was reached")
        );
        assert_eq!(said.stopped, None);
    }
}
