//! The settings by which a server archives its log: what they are, what they should be, and setting them.

use std::fmt;

use crate::error::Error;
use crate::identity::ServerIdentity;
use crate::quote::{identifier, literal};
use crate::session::Session;

const SETTINGS: &str = "\
-- pgmuster: archive settings
SELECT name, setting, source = 'command line' AS is_fixed FROM pg_settings
 WHERE name IN ('wal_level', 'archive_mode', 'archive_command', 'archive_library', 'archive_timeout')";
const ARCHIVER: &str = "\
-- pgmuster: archiver
SELECT pg_is_in_recovery() AS is_standby,
       current_setting('archive_mode') AS mode,
       current_setting('archive_command') AS command,
       COALESCE(current_setting('archive_library', true), '') AS library,
       ARRAY(SELECT name FROM pg_settings WHERE pending_restart AND name IN ('wal_level', 'archive_mode') ORDER BY name)
           AS pending,
       last_archived_wal,
       (EXTRACT(epoch FROM last_archived_time) * 1000)::bigint AS last_archived_at_ms,
       last_failed_wal,
       (EXTRACT(epoch FROM last_failed_time) * 1000)::bigint AS last_failed_at_ms
  FROM pg_stat_archiver";
/// What `archive_command` shows of itself as long as `archive_mode` is off.
const DISABLED: &str = "(disabled)";

/// How a server archives. Read by [`Session::archiving`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Archiving {
    wal_level: String,
    archive_mode: String,
    archive_command: String,
    /// PostgreSQL 15 and later.
    archive_library: String,
    archive_timeout_s: u32,
    /// Settings of the server's command line, which nothing overrides.
    fixed: Vec<String>,
}

/// How a server that writes archives just now. Read by [`Session::archiver`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archiver {
    /// `archive_mode`: `off`, `on` or `always`.
    pub mode: String,
    /// Whether there is an `archive_command` or an `archive_library`.
    pub has_command: bool,
    /// Settings of archiving that wait for a restart.
    pub pending_restart: Vec<String>,
    /// The last file it archived, and when; server's clock, Unix milliseconds.
    pub last_archived: Option<(String, i64)>,
    /// The file it failed at, as long as it has archived none since.
    pub failing_at: Option<String>,
}

/// How it shall.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The `archive_command`.
    pub command: &'a str,
    /// The longest `archive_timeout`, seconds; 0 for any.
    pub timeout_s: u32,
    /// Whatever archives now may be replaced.
    pub replace: bool,
}

/// One setting to be changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its name.
    pub name: &'static str,
    from: String,
    to: String,
    /// It is in effect only after a restart.
    pub needs_restart: bool,
    why: &'static str,
}

impl Change {
    /// Whether something else archived by this setting.
    pub fn replaces_another(&self) -> bool {
        matches!(self.name, "archive_command" | "archive_library") && !is_nothing(&self.from)
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, from, to, why, .. } = self;
        let now = match *name {
            "archive_command" if is_nothing(from) => "no command".to_owned(),
            _ => quoted(from),
        };
        write!(f, "set {name} = {} (now {now}): {why}", quoted(to))?;
        if self.needs_restart {
            f.write_str("; the server must be restarted for it")
        } else {
            Ok(())
        }
    }
}

/// Whether a command or library is none.
fn is_nothing(value: &str) -> bool {
    matches!(value, "" | DISABLED)
}

/// A value as it can be pasted behind `ALTER SYSTEM SET name =`.
pub fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', "''"))
}

/// What stands in the way of archiving as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// Another command or library archives.
    Another {
        /// The setting.
        name: &'static str,
        /// What it is.
        value: String,
    },
    /// A setting is on the server's command line.
    Fixed(&'static str),
}

impl Archiving {
    /// What has to be changed, in the order in which it is; nothing when all is as wanted.
    pub fn changes(&self, wanted: Wanted<'_>) -> Result<Vec<Change>, Obstacle> {
        let mut changes = Vec::new();
        let mut change = |name, from: &str, to: &str, needs_restart, why| {
            if self.fixed.iter().any(|fixed| fixed == name) {
                return Err(Obstacle::Fixed(name));
            }
            let (from, to) = (from.to_owned(), to.to_owned());
            changes.push(Change { name, from, to, needs_restart, why });
            Ok(())
        };
        if self.wal_level == "minimal" {
            let why = "less is logged than a recovery needs";
            change("wal_level", &self.wal_level, "replica", true, why)?;
        }
        if self.archive_mode == "off" {
            change("archive_mode", &self.archive_mode, "on", true, "nothing is archived")?;
        }
        if !self.archive_library.is_empty() {
            let (name, value) = ("archive_library", &self.archive_library);
            if !wanted.replace {
                return Err(Obstacle::Another { name, value: value.clone() });
            }
            change(name, value, "", false, "a server with both archives nothing")?;
        }
        let command = self.archive_command.as_str();
        if command != wanted.command {
            if !wanted.replace && !is_nothing(command) {
                let (name, value) = ("archive_command", command.to_owned());
                return Err(Obstacle::Another { name, value });
            }
            let why = "each segment goes into the repository";
            change("archive_command", command, wanted.command, false, why)?;
        }
        let timeout = self.archive_timeout_s;
        if wanted.timeout_s > 0 && (timeout == 0 || timeout > wanted.timeout_s) {
            let why = "a segment that is not full is handed over after so many seconds, or the last transactions of an idle \
                       server would never be";
            change(
                "archive_timeout",
                &timeout.to_string(),
                &wanted.timeout_s.to_string(),
                false,
                why,
            )?;
        }
        Ok(changes)
    }

    /// Whether the server archives by this command already, whatever was changed.
    fn archives_by(&self, command: &str) -> bool {
        self.archive_mode != "off"
            && self.archive_command == command
            && self.archive_library.is_empty()
    }
}

impl Session {
    /// How the server archives.
    pub async fn archiving(&self) -> Result<Archiving, Error> {
        let what = "read how the server archives";
        let mut archiving = Archiving::default();
        for row in self.query(what, SETTINGS, &[]).await? {
            let (name, value): (&str, String) = (row.get(0), row.get(1));
            if row.get(2) {
                archiving.fixed.push(name.to_owned());
            }
            match name {
                "wal_level" => archiving.wal_level = value,
                "archive_mode" => archiving.archive_mode = value,
                "archive_command" => archiving.archive_command = value,
                "archive_library" => archiving.archive_library = value,
                "archive_timeout" => {
                    archiving.archive_timeout_s = value
                        .parse()
                        .map_err(|_| Error::Answer { what: what.to_owned(), answer: value })?;
                }
                _ => {}
            }
        }
        Ok(archiving)
    }

    /// How the server archives just now; `None` for a standby, whose WAL is its primary's.
    pub async fn archiver(&self) -> Result<Option<Archiver>, Error> {
        let row = self.one("ask how the server archives", ARCHIVER, &[]).await?;
        if row.get("is_standby") {
            return Ok(None);
        }
        let at = |wal: &str, at_ms: &str| {
            let wal: Option<String> = row.get(wal);
            wal.zip(row.get::<_, Option<i64>>(at_ms))
        };
        let last_archived = at("last_archived_wal", "last_archived_at_ms");
        let failed = at("last_failed_wal", "last_failed_at_ms");
        let archived_at_ms = last_archived.as_ref().map_or(i64::MIN, |(_, at_ms)| *at_ms);
        let (command, library): (&str, &str) = (row.get("command"), row.get("library"));
        Ok(Some(Archiver {
            mode: row.get("mode"),
            has_command: !is_nothing(command) || !library.is_empty(),
            pending_restart: row.get("pending"),
            last_archived,
            failing_at: failed.filter(|(_, at_ms)| *at_ms > archived_at_ms).map(|(wal, _)| wal),
        }))
    }

    /// What the role must be granted to make changes and to see that they work; empty when it may.
    pub async fn missing_for_archiving(
        &self,
        server: &ServerIdentity,
        changes: &[Change],
    ) -> Result<Vec<String>, Error> {
        let what = "look at the role's rights";
        let role = identifier(&server.role);
        let mut missing = Vec::new();
        for function in ["pg_reload_conf()", "pg_switch_wal()"] {
            let sql = "SELECT has_function_privilege('pg_catalog.' || $1::text, 'EXECUTE')";
            if !self.one(what, sql, &[&function]).await?.get::<_, bool>(0) {
                missing.push(format!("GRANT EXECUTE ON FUNCTION {function} TO {role};"));
            }
        }
        if server.version.major() < 15 {
            let sql = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user";
            if !changes.is_empty() && !self.one(what, sql, &[]).await?.get::<_, bool>(0) {
                missing.push(format!("ALTER ROLE {role} SUPERUSER; -- only a superuser sets them before PostgreSQL 15"));
            }
            return Ok(missing);
        }
        for Change { name, .. } in changes {
            let sql = "SELECT has_parameter_privilege($1::text, 'ALTER SYSTEM')";
            if !self.one(what, sql, &[name]).await?.get::<_, bool>(0) {
                missing.push(format!("GRANT ALTER SYSTEM ON PARAMETER {name} TO {role};"));
            }
        }
        Ok(missing)
    }

    /// Writes changes into the server's `postgresql.auto.conf` and has it read again.
    pub async fn change_archiving(&self, changes: &[Change]) -> Result<(), Error> {
        for Change { name, to, .. } in changes {
            let sql = format!("ALTER SYSTEM SET {name} = {}", literal(to));
            self.run(&format!("set {name}"), &sql).await?;
        }
        self.run("have the settings read again", "SELECT pg_reload_conf()").await
    }

    /// Whether the server archives by a command now: it reads its settings in its own time.
    pub async fn archives_by(&self, command: &str) -> Result<bool, Error> {
        Ok(self.archiving().await?.archives_by(command))
    }

    /// Ends the segment that is being written, and names it: it is to be archived.
    pub async fn finish_segment(&self) -> Result<String, Error> {
        let what = "end a segment of the log";
        // A switch does nothing when the segment is empty.
        let written =
            "SELECT pg_walfile_name(pg_logical_emit_message(false, 'pgmuster', 'archiving'))";
        let name = self.one(what, written, &[]).await?.get(0);
        self.run(what, "SELECT pg_switch_wal()").await?;
        Ok(name)
    }

    /// What the server's archiver failed at last, and how often in all; nothing when it never failed.
    pub async fn archiver_failures(&self) -> Result<Option<(i64, String)>, Error> {
        let sql =
            "SELECT failed_count, last_failed_wal FROM pg_stat_archiver WHERE failed_count > 0";
        let row = self.maybe("ask for the archiver's failures", sql, &[]).await?;
        Ok(row.map(|row| (row.get(0), row.get::<_, Option<String>>(1).unwrap_or_default())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> Archiving {
        Archiving {
            wal_level: "replica".to_owned(),
            archive_mode: "off".to_owned(),
            archive_command: DISABLED.to_owned(),
            ..Archiving::default()
        }
    }

    fn wanted(replace: bool) -> Wanted<'static> {
        Wanted { command: "push %p", timeout_s: 600, replace }
    }

    fn names(changes: &[Change]) -> Vec<&'static str> {
        changes.iter().map(|change| change.name).collect()
    }

    #[test]
    fn only_what_is_not_as_wanted_is_changed() {
        let changes = fresh().changes(wanted(false)).unwrap();
        assert_eq!(names(&changes), ["archive_mode", "archive_command", "archive_timeout"]);
        let restart: Vec<bool> = changes.iter().map(|change| change.needs_restart).collect();
        assert_eq!(restart, [true, false, false]);
        let done = Archiving {
            archive_mode: "always".to_owned(),
            archive_command: "push %p".to_owned(),
            archive_timeout_s: 60,
            ..fresh()
        };
        assert_eq!(done.changes(wanted(false)), Ok(Vec::new()));
        assert!(done.archives_by("push %p") && !fresh().archives_by("push %p"));
        let minimal =
            Archiving { wal_level: "minimal".to_owned(), archive_timeout_s: 3_600, ..done };
        let changes = minimal.changes(wanted(false)).unwrap();
        assert_eq!(names(&changes), ["wal_level", "archive_timeout"]);
        let any = Wanted { timeout_s: 0, ..wanted(false) };
        assert_eq!(names(&minimal.changes(any).unwrap()), ["wal_level"]);
    }

    #[test]
    fn a_change_is_told_so_that_its_value_can_be_pasted() {
        let wanted = Wanted { command: "'/a b/pgmuster' wal push \"%p\"", ..wanted(true) };
        let told = |before: &Archiving| {
            let changes = before.changes(wanted).unwrap();
            let command = changes.iter().find(|change| change.name == "archive_command").unwrap();
            (command.to_string(), command.replaces_another())
        };
        let set = "set archive_command = '''/a b/pgmuster'' wal push \"%p\"' (now ";
        let (text, replaces) = told(&fresh());
        assert!(text.starts_with(&format!("{set}no command): ")) && !replaces, "{text}");
        let lies = "test -e '/x y' || true".to_owned();
        let another = Archiving { archive_mode: "on".to_owned(), archive_command: lies, ..fresh() };
        let (text, replaces) = told(&another);
        let now = format!("{set}'test -e ''/x y'' || true'): ");
        assert!(text.starts_with(&now) && replaces, "{text}");
    }

    #[test]
    fn another_archive_is_replaced_only_on_demand_and_a_command_line_never() {
        let another = Archiving {
            archive_mode: "on".to_owned(),
            archive_command: "cp %p /a".to_owned(),
            ..fresh()
        };
        let obstacle = another.changes(wanted(false)).unwrap_err();
        let value = "cp %p /a".to_owned();
        assert_eq!(obstacle, Obstacle::Another { name: "archive_command", value });
        assert_eq!(names(&another.changes(wanted(true)).unwrap())[0], "archive_command");
        let library = Archiving { archive_library: "basic_archive".to_owned(), ..another };
        assert!(library.changes(wanted(false)).is_err());
        let changes = library.changes(wanted(true)).unwrap();
        assert_eq!(names(&changes)[..2], ["archive_library", "archive_command"]);
        let fixed = Archiving { fixed: vec!["archive_mode".to_owned()], ..fresh() };
        assert_eq!(fixed.changes(wanted(true)), Err(Obstacle::Fixed("archive_mode")));
    }
}
