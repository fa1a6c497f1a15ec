//! The settings that take a server to a moment, where PostgreSQL 14 to 18 read them: `postgresql.auto.conf`, which wins over
//! `postgresql.conf` wherever that is, and one of two signal files.
//!
//! Whatever recovery settings the files brought along are removed, and every one that could stand in `postgresql.conf` is
//! overruled: a second target is an error to a server, and somebody else's `restore_command` is another cluster's WAL.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use proto::{RecoveryTarget, TargetAction, Timeline};

use crate::instance::settings_text;

/// The server's own file of settings, read after all others.
pub const SETTINGS_FILE: &str = "postgresql.auto.conf";
const RECOVERY_SIGNAL: &str = "recovery.signal";
const STANDBY_SIGNAL: &str = "standby.signal";
/// Ruled only where one was asked for.
const PORT: &str = "port";
/// What is written and then renamed.
const DRAFT: &str = "postgresql.auto.conf.tmp";
const BEGIN: &str = "# Written by pgmuster restore. After the recovery these may be removed, archive_mode with care.\n";
/// What follows was written by somebody else, later.
const END: &str = "# So far pgmuster restore.\n";

/// Settings that shape a recovery. Those with a value are written so unless we have one of our own; the empty ones come first,
/// because a server refuses a target that comes while another one is set.
const RULED: [(&str, Option<&str>, u32, u32); 17] = [
    ("recovery_target", Some(""), 14, 18),
    ("recovery_target_lsn", Some(""), 14, 18),
    ("recovery_target_name", Some(""), 14, 18),
    ("recovery_target_time", Some(""), 14, 18),
    ("recovery_target_xid", Some(""), 14, 18),
    ("archive_cleanup_command", Some(""), 14, 18),
    ("recovery_end_command", Some(""), 14, 18),
    ("primary_conninfo", Some(""), 14, 18),
    ("primary_slot_name", Some(""), 14, 18),
    ("promote_trigger_file", Some(""), 14, 15),
    ("recovery_min_apply_delay", Some("0"), 14, 18),
    ("hot_standby", Some("on"), 14, 18),
    ("restore_command", None, 14, 18),
    ("recovery_target_inclusive", None, 14, 18),
    ("recovery_target_timeline", None, 14, 18),
    ("recovery_target_action", None, 14, 18),
    ("archive_mode", None, 14, 18),
];

/// How a server shall recover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoverySettings {
    /// Fetches `%f` to `%p`.
    pub restore_command: String,
    /// Where it stops.
    pub target: RecoveryTarget,
    /// Just before it.
    pub before: bool,
    /// The timeline it follows; `None` is the backup's own, of which no history is asked for.
    pub timeline: Option<Timeline>,
    /// What it does there.
    pub action: TargetAction,
    /// It goes on following.
    pub standby: bool,
    /// `archive_mode` stays what it is.
    pub keep_archiving: bool,
    /// The port it listens at, instead of the one in its files.
    pub port: Option<u16>,
}

/// What writing the settings did to those that were there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// Lines of `postgresql.auto.conf` that were removed.
    pub removed: Vec<String>,
    /// Settings of `postgresql.conf` that no longer count, by name.
    pub overruled: Vec<String>,
}

/// Every name in a data directory that [`RecoverySettings::write`] makes, changes or removes.
pub fn own_names() -> BTreeSet<Vec<u8>> {
    [SETTINGS_FILE, RECOVERY_SIGNAL, STANDBY_SIGNAL, DRAFT]
        .map(|name| name.as_bytes().to_vec())
        .into()
}

impl RecoverySettings {
    /// The settings by name, in the order in which they must be read.
    pub fn lines(&self, major: u32) -> Vec<(String, String)> {
        let own = self.own();
        let given = |name: &str| own.iter().any(|(own, _)| *own == name);
        let ruled = RULED.iter().filter(|(name, _, oldest, newest)| {
            (*oldest..=*newest).contains(&major) && !given(name)
        });
        let ruled = ruled.filter_map(|(name, value, ..)| Some((*name, (*value)?.to_owned())));
        ruled.chain(own.iter().cloned()).map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// Those of a server that archives nothing and opens at the target.
    pub(crate) fn target_lines(&self) -> Vec<(&'static str, String)> {
        let fixed = ["archive_mode", "recovery_target_action"];
        self.own().into_iter().filter(|(name, _)| !fixed.contains(name)).collect()
    }

    fn own(&self) -> Vec<(&'static str, String)> {
        let mut own = Vec::new();
        if !self.keep_archiving {
            own.push(("archive_mode", "off".to_owned()));
        }
        if let Some(port) = self.port {
            own.push((PORT, port.to_string()));
        }
        own.push(("restore_command", self.restore_command.clone()));
        let timeline = match (self.standby, self.timeline) {
            // A standby follows promotions that are yet to come.
            (true, _) => "latest".to_owned(),
            (false, Some(timeline)) => timeline.to_string(),
            (false, None) => "current".to_owned(),
        };
        own.push(("recovery_target_timeline", timeline));
        let inclusive = if self.before { "off" } else { "on" };
        own.push(("recovery_target_inclusive", inclusive.to_owned()));
        own.push(("recovery_target_action", self.action.as_str().to_owned()));
        match &self.target {
            RecoveryTarget::Latest => {}
            RecoveryTarget::Immediate => own.push(("recovery_target", "immediate".to_owned())),
            RecoveryTarget::Lsn(lsn) => own.push(("recovery_target_lsn", lsn.to_string())),
            RecoveryTarget::Xid(xid) => own.push(("recovery_target_xid", xid.to_string())),
            RecoveryTarget::Name(name) => own.push(("recovery_target_name", name.clone())),
            RecoveryTarget::Time(time) => {
                let time = time.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string();
                own.push(("recovery_target_time", time));
            }
        }
        own
    }

    /// The file that makes the server recover so.
    pub fn signal(&self) -> &'static str {
        if self.standby { STANDBY_SIGNAL } else { RECOVERY_SIGNAL }
    }

    /// Writes them into a data directory in which no server runs. Can be repeated; what is written is not synced.
    pub fn write(&self, directory: &Path, major: u32) -> io::Result<Change> {
        let removed = put(directory, &self.lines(major), |name| is_ruled(name, self))?;
        for signal in [RECOVERY_SIGNAL, STANDBY_SIGNAL] {
            remove_if_there(&directory.join(signal))?;
        }
        let signal = directory.join(self.signal());
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(signal)?;
        let main = std::fs::read(directory.join("postgresql.conf")).unwrap_or_default();
        Ok(Change { removed, overruled: self.overruled(&String::from_utf8_lossy(&main)) })
    }

    /// The settings of a `postgresql.conf` that no longer count.
    fn overruled(&self, main: &str) -> Vec<String> {
        let names = main.lines().filter_map(name_of).filter(|name| is_ruled(name, self));
        names.collect::<BTreeSet<_>>().into_iter().collect()
    }
}

/// Has a server that will run in a restored directory archive nothing, whatever its files say: it would write into the
/// archive of the server whose copy it is. Can be repeated; what is written is not synced.
pub fn stop_archiving(directory: &Path) -> io::Result<()> {
    let off = [("archive_mode".to_owned(), "off".to_owned())];
    put(directory, &off, |name| name == "archive_mode").map(drop)
}

/// Puts settings behind all others, in place of those that `is_replaced` names and of what was put there before; what somebody
/// appended to that stays. Returns the lines of others that are gone.
fn put(
    directory: &Path,
    lines: &[(String, String)],
    is_replaced: impl Fn(&str) -> bool,
) -> io::Result<Vec<String>> {
    let path = directory.join(SETTINGS_FILE);
    let old = match std::fs::read(&path) {
        Ok(old) => String::from_utf8_lossy(&old).into_owned(),
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    let (before, behind) = around(&old);
    let (removed, kept): (Vec<&str>, Vec<&str>) = before
        .lines()
        .chain(behind.lines())
        .partition(|line| name_of(line).is_some_and(|name| is_replaced(&name)));
    let mut text: String = kept.iter().flat_map(|line| [line, "\n"]).collect();
    text.push_str(BEGIN);
    text.push_str(&settings_text(lines));
    text.push_str(END);
    let draft = directory.join(DRAFT);
    remove_if_there(&draft)?;
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
    file.write_all(text.as_bytes())?;
    std::fs::rename(&draft, &path)?;
    Ok(removed.into_iter().map(|line| line.trim().to_owned()).collect())
}

/// What stands before the settings that were put there, and behind them.
fn around(old: &str) -> (&str, &str) {
    let Some((before, rest)) = old.split_once(BEGIN) else { return (old, "") };
    if let Some((_, behind)) = rest.split_once(END) {
        return (before, behind);
    }
    // An older program did not mark the end: it is where something stands that it did not write.
    let is_own = |line: &str| {
        name_of(line)
            .is_some_and(|name| name == PORT || RULED.iter().any(|(ruled, ..)| *ruled == name))
    };
    let own: usize = rest.split_inclusive('\n').take_while(|line| is_own(line)).map(str::len).sum();
    (before, &rest[own..])
}

fn is_ruled(name: &str, settings: &RecoverySettings) -> bool {
    if name == PORT {
        return settings.port.is_some();
    }
    let ours = RULED.iter().any(|(ruled, ..)| *ruled == name);
    ours && !(settings.keep_archiving && name == "archive_mode")
}

/// The setting that a line of a settings file is about, in lower case; none for a comment.
fn name_of(line: &str) -> Option<String> {
    let line = line.trim_start();
    let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.'));
    let name = &line[..end.unwrap_or(line.len())];
    (!name.is_empty()).then(|| name.to_ascii_lowercase())
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proto::Lsn;

    use super::*;

    fn settings(target: RecoveryTarget) -> RecoverySettings {
        RecoverySettings {
            restore_command: "get '%f'".to_owned(),
            target,
            before: false,
            timeline: Some(Timeline(3)),
            action: TargetAction::Promote,
            standby: false,
            keep_archiving: false,
            port: None,
        }
    }

    const TARGETS: [&str; 5] = [
        "recovery_target",
        "recovery_target_lsn",
        "recovery_target_name",
        "recovery_target_time",
        "recovery_target_xid",
    ];

    fn value<'a>(lines: &'a [(String, String)], name: &str) -> Option<&'a str> {
        lines.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    #[test]
    fn one_target_is_set_and_it_comes_after_the_empty_ones() {
        let time = "2026-11-27T08:30:00.5Z".parse().unwrap();
        for (target, name, text) in [
            (RecoveryTarget::Immediate, "recovery_target", "immediate"),
            (RecoveryTarget::Lsn(Lsn(0x300_0148)), "recovery_target_lsn", "0/3000148"),
            (RecoveryTarget::Xid(740), "recovery_target_xid", "740"),
            (RecoveryTarget::Name("it's".to_owned()), "recovery_target_name", "it's"),
            (RecoveryTarget::Time(time), "recovery_target_time", "2026-11-27 08:30:00.500000+00"),
        ] {
            let lines = settings(target).lines(15);
            let (at, _) = lines.iter().enumerate().find(|(_, (known, _))| known == name).unwrap();
            assert_eq!(value(&lines, name), Some(text));
            for other in TARGETS.iter().filter(|other| **other != name) {
                let (empty, line) =
                    lines.iter().enumerate().find(|(_, (known, _))| known == other).unwrap();
                assert!(line.1.is_empty() && empty < at, "{other} before {name}");
            }
            assert_eq!(lines.iter().filter(|(known, _)| known == name).count(), 1);
        }
        let lines = settings(RecoveryTarget::Latest).lines(15);
        assert!(TARGETS.iter().all(|name| value(&lines, name) == Some("")));
    }

    #[test]
    fn each_version_is_told_only_what_it_knows() {
        for (major, knows) in [(14, true), (15, true), (16, false), (18, false)] {
            let lines = settings(RecoveryTarget::Latest).lines(major);
            assert_eq!(value(&lines, "promote_trigger_file").is_some(), knows, "{major}");
            assert_eq!(value(&lines, "recovery_target_timeline"), Some("3"));
            assert_eq!(value(&lines, "archive_mode"), Some("off"));
        }
        let standby = RecoverySettings { standby: true, ..settings(RecoveryTarget::Latest) };
        assert_eq!(value(&standby.lines(15), "recovery_target_timeline"), Some("latest"));
        assert_eq!(standby.signal(), "standby.signal");
        let own =
            RecoverySettings { timeline: None, before: true, ..settings(RecoveryTarget::Latest) };
        assert_eq!(value(&own.lines(15), "recovery_target_timeline"), Some("current"));
        assert_eq!(value(&own.lines(15), "recovery_target_inclusive"), Some("off"));
    }

    #[test]
    fn a_copy_that_shall_not_archive_keeps_all_its_other_settings() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(SETTINGS_FILE);
        for old in ["", "work_mem = '8MB'\nARCHIVE_MODE = always\narchive_command = 'x'\n"] {
            std::fs::write(&path, old).unwrap();
            stop_archiving(place.path()).unwrap();
            let once = std::fs::read_to_string(&path).unwrap();
            assert!(
                once.contains("\narchive_mode = 'off'\n") && !once.contains("always"),
                "{once}"
            );
            assert_eq!(once.contains("work_mem"), !old.is_empty());
            assert_eq!(once.contains("archive_command"), !old.is_empty());
            stop_archiving(place.path()).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), once, "twice is harmless");
        }
    }

    /// As somebody does with a copy of his own, who restores it again later.
    #[test]
    fn what_was_appended_behind_our_settings_stays() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(SETTINGS_FILE);
        let read = || std::fs::read_to_string(&path).unwrap();
        let append = |text: &str| std::fs::write(&path, read() + text).unwrap();
        let wanted = RecoverySettings { port: Some(5_434), ..settings(RecoveryTarget::Latest) };
        wanted.write(place.path(), 15).unwrap();
        append("work_mem = '64MB'\nrestore_command = 'cp'\nport = 5500\n# mine\n");
        let without_port = RecoverySettings { port: None, ..wanted.clone() };
        let change = without_port.write(place.path(), 15).unwrap();
        assert_eq!(change.removed, ["restore_command = 'cp'"]);
        let text = read();
        assert!(text.starts_with("work_mem = '64MB'\nport = 5500\n# mine\n"), "{text}");
        assert!(!text.contains("5434"), "{text}");
        assert_eq!(text.matches(BEGIN).count(), 1);
        stop_archiving(place.path()).unwrap();
        assert!(read().starts_with("work_mem = '64MB'\nport = 5500\n# mine\n"), "{}", read());
        // Nothing marked the end of what an older program wrote.
        std::fs::write(&path, "").unwrap();
        wanted.write(place.path(), 15).unwrap();
        std::fs::write(&path, read().replace(END, "")).unwrap();
        append("listen_addresses = '*'\nshared_buffers = '1GB'\n");
        without_port.write(place.path(), 15).unwrap();
        let text = read();
        assert!(text.starts_with("listen_addresses = '*'\nshared_buffers = '1GB'\n"), "{text}");
        assert!(!text.contains("5434"), "{text}");
    }

    #[test]
    fn stale_settings_go_and_all_others_stay() {
        let place = tempfile::tempdir().unwrap();
        let old = "# Do not edit this file manually!\nwork_mem = '8MB'\nRecovery_Target_Time = 'yesterday'\n\
                   \u{20}primary_conninfo 'host=production'\n#recovery_target_xid = 7\narchive_mode=on\n";
        let path = place.path();
        std::fs::write(path.join(SETTINGS_FILE), old).unwrap();
        std::fs::write(path.join("standby.signal"), "").unwrap();
        let main =
            "restore_command = 'cp /elsewhere/%f %p'\nport = 5433\nrecovery_target_name = 'x'\n";
        std::fs::write(path.join("postgresql.conf"), main).unwrap();
        let wanted = settings(RecoveryTarget::Lsn(Lsn(7)));
        let change = wanted.write(path, 15).unwrap();
        assert_eq!(change.removed.len(), 3, "{change:?}");
        assert_eq!(change.overruled, ["recovery_target_name", "restore_command"]);
        let written = std::fs::read_to_string(path.join(SETTINGS_FILE)).unwrap();
        assert!(written.contains("work_mem = '8MB'\n") && written.contains("#recovery_target_xid"));
        assert!(!written.contains("yesterday") && !written.contains("production"));
        assert!(written.contains("restore_command = 'get ''%f'''\n"), "{written}");
        assert!(path.join("recovery.signal").exists() && !path.join("standby.signal").exists());
        // Twice is harmless.
        let again = wanted.write(path, 15).unwrap();
        assert!(again.removed.is_empty());
        assert_eq!(std::fs::read_to_string(path.join(SETTINGS_FILE)).unwrap(), written);
        let keeps = RecoverySettings { keep_archiving: true, ..wanted };
        std::fs::write(path.join(SETTINGS_FILE), old).unwrap();
        keeps.write(path, 15).unwrap();
        assert!(
            std::fs::read_to_string(path.join(SETTINGS_FILE))
                .unwrap()
                .contains("archive_mode=on\n")
        );
        // A port that was asked for wins; any other is left alone.
        let written = || std::fs::read_to_string(path.join(SETTINGS_FILE)).unwrap();
        std::fs::write(path.join(SETTINGS_FILE), "port = 5400\n").unwrap();
        keeps.write(path, 15).unwrap();
        assert!(written().contains("port = 5400\n"), "{}", written());
        let elsewhere = RecoverySettings { port: Some(5_434), ..keeps };
        let change = elsewhere.write(path, 15).unwrap();
        assert_eq!(change.removed, ["port = 5400"]);
        assert!(change.overruled.contains(&"port".to_owned()), "{change:?}");
        assert!(written().contains("port = '5434'\n"), "{}", written());
    }
}
