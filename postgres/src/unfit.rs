//! Whose trouble it is when a restored server does not start: its copy's, or that of the machine it was to run on.
//!
//! Decides by the sentence with which the server gave up. The machine's are only those that no content of a data directory
//! can cause: a full disk, missing libraries, a disk that may not be written. Everything else, and every sentence that is
//! not known here, is held against the copy: a bad backup must not be excused. So "out of memory", which a damaged length
//! causes too, and "Permission denied", which a damaged mode causes too, excuse nothing; neither does a log of which the
//! beginning is missing.
//!
//! "database files are incompatible with server" is the machine's because the sandbox compares every `PG_VERSION` before it
//! starts a server, and the control file is guarded by its checksum.

/// What the machine is short of, and the line that says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unfit {
    /// Completes "this machine …".
    pub(crate) what: &'static str,
    /// The line of the server's log.
    pub(crate) evidence: String,
}

const FULL: &str = "has no room left";
const MEMORY: &str = "has too little memory";
const FILES: &str = "lets too few files be open";
const LIBRARY: &str = "lacks a library that the cluster needs";
const RIGHTS: &str = "does not let the server use its own files";
const DISK: &str = "has a disk that fails";
const SOCKET: &str = "has no place for the server's socket";
const SETTINGS: &str = "gives the server settings that it refuses";
const BUILD: &str = "has programs that were built for another kind of cluster";
const EXTENSION: &str = "lacks an extension of the dump";
const PRELOAD: &str = "would have to load a library of the dump's extension at its start";
const FEATURE: &str = "has programs that were built without something that the dump needs";
const LOCALE: &str = "lacks a locale of the cluster";
pub(crate) const KILLED: &str = "killed the server";
pub(crate) const SLOW: &str = "leaves the server no time to answer";

/// Parts of the server's last sentence. The server prints in English and the system in its own words, because the
/// sandbox sets no locale.
const SENTENCES: [(&str, &str); 24] = [
    ("No space left on device", FULL),
    ("Disk quota exceeded", FULL),
    ("File too large", FULL),
    ("Cannot allocate memory", MEMORY),
    // Its size is that of our own settings.
    ("out of shared memory", MEMORY),
    ("could not map anonymous shared memory", MEMORY),
    ("could not create shared memory segment", MEMORY),
    ("could not create semaphores", MEMORY),
    ("could not fork", MEMORY),
    ("Too many open files", FILES),
    ("insufficient file descriptors available", FILES),
    // Only libraries are "accessed"; files of the data directory are opened.
    ("could not access file \"", LIBRARY),
    ("could not load library \"", LIBRARY),
    ("resource manager with ID", LIBRARY),
    // Owners are not restored, modes are.
    ("Operation not permitted", RIGHTS),
    ("Read-only file system", RIGHTS),
    ("has wrong ownership", RIGHTS),
    ("Input/output error", DISK),
    ("Stale file handle", DISK),
    ("could not create any Unix-domain sockets", SOCKET),
    ("contains errors", SETTINGS),
    ("insufficient parameter settings", SETTINGS),
    ("database files are incompatible with server", BUILD),
    ("locale is incompatible with operating system", LOCALE),
];

/// Looks for the sentence with which the server gave up: the first of its kind, because what follows are consequences.
/// `None` when it speaks of the copy, or is not there.
pub(crate) fn unfit(log: &str) -> Option<Unfit> {
    judge(log, &["FATAL:", "PANIC:", "ERROR:", " error:", " fatal:"])
}

/// The same for a server that had been asked things before it ended: errors of statements did not end it.
pub(crate) fn died_unfit(log: &str) -> Option<Unfit> {
    judge(log, &["PANIC:"])
}

/// What a server refuses while a dump is loaded, because the machine lacks it. An error that a person's own function raised may
/// have any other words.
const LOADING: [(&str, &str); 22] = [
    ("No space left on device", FULL),
    ("Disk quota exceeded", FULL),
    ("Cannot allocate memory", MEMORY),
    ("out of shared memory", MEMORY),
    ("Too many open files", FILES),
    ("Input/output error", DISK),
    ("Read-only file system", RIGHTS),
    ("could not open extension control file", EXTENSION),
    ("could not access file \"", LIBRARY),
    ("could not load library \"", LIBRARY),
    ("shared_preload_libraries", PRELOAD),
    ("security label provider \"", PRELOAD),
    (" locale name: \"", LOCALE),
    ("could not create locale \"", LOCALE),
    ("could not open collator for locale \"", LOCALE),
    ("not supported in this build", FEATURE),
    // A collation of pg_catalog is one of the operating system.
    ("\" for encoding \"", LOCALE),
    ("could not open dictionary file \"", LIBRARY),
    ("could not open affix file \"", LIBRARY),
    ("could not open stop-word file \"", LIBRARY),
    ("could not find function \"", LIBRARY),
    ("must be preloaded", PRELOAD),
];

/// What this machine lacks, as one sees from the lines that a program said which loaded a dump: completes "this machine …".
/// `None` when the dump is to blame.
pub fn lacks_for_a_dump(said: &str) -> Option<String> {
    let mut lines =
        said.lines().skip_while(|line| !["ERROR:", "FATAL:"].iter().any(|it| line.contains(it)));
    let error = lines.next()?;
    // `extension "x" is not available`, as later versions say it.
    if error.contains("ERROR:  extension \"") && error.ends_with("\" is not available") {
        return Some(format!("{EXTENSION}: {}", error.trim()));
    }
    let detail = lines.next().filter(|line| line.contains("DETAIL:"));
    [Some(error), detail].into_iter().flatten().find_map(|line| {
        let (_, what) = LOADING.iter().find(|(part, _)| line.contains(part))?;
        Some(format!("{what}: {}", line.trim()))
    })
}

fn judge(log: &str, gives_up: &[&str]) -> Option<Unfit> {
    let told = |what, line: &str| Some(Unfit { what, evidence: line.trim().to_owned() });
    if let Some(line) = log.lines().find(|line| line.contains("was terminated by signal 9")) {
        return told(KILLED, line);
    }
    let mut lines = log.lines();
    let last_words = lines.find(|line| {
        // Whoever asks a new server for its roles and databases hears that one is not there.
        gives_up.iter().any(|severity| line.contains(severity))
            && !line.contains("\" does not exist")
    })?;
    // What the system said may stand in the line below.
    let detail = lines.next().filter(|line| line.contains("DETAIL:"));
    [Some(last_words), detail].into_iter().flatten().find_map(|line| {
        let (_, what) = SENTENCES.iter().find(|(part, _)| line.contains(part))?;
        told(what, line)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_a_machine_can_cause_is_told_with_its_line() {
        for (line, what) in [
            (
                r#"FATAL:  could not write to file "pg_wal/xlogtemp.31": No space left on device"#,
                FULL,
            ),
            ("FATAL:  could not map anonymous shared memory: Cannot allocate memory", MEMORY),
            ("FATAL:  out of shared memory", MEMORY),
            (r#"FATAL:  could not access file "timescaledb": No such file or directory"#, LIBRARY),
            ("FATAL:  resource manager with ID 138 not registered", LIBRARY),
            (
                r#"PANIC:  could not open file "global/pg_control": Too many open files in system"#,
                FILES,
            ),
            (r#"FATAL:  could not open file "global/1262": Read-only file system"#, RIGHTS),
            (r#"FATAL:  data directory "/room/data" has wrong ownership"#, RIGHTS),
            (r#"FATAL:  could not read block 3 in file "base/5/1259": Input/output error"#, DISK),
            (r#"FATAL:  configuration file "/room/run/postgresql.conf" contains errors"#, SETTINGS),
            ("FATAL:  database files are incompatible with server", BUILD),
            ("FATAL:  database locale is incompatible with operating system", LOCALE),
            ("LOG:  startup process (PID 17) was terminated by signal 9: Killed", KILLED),
        ] {
            let line = format!("2026-01-02 03:04:05.678 UTC [17] {line}");
            let log = format!(
                "2026-01-02 03:04:05.000 UTC [17] LOG:  starting\n{line}\nLOG:  database system is shut down\n"
            );
            assert_eq!(unfit(&log), Some(Unfit { what, evidence: line }));
        }
    }

    #[test]
    fn what_a_copy_can_cause_is_held_against_it() {
        for line in [
            r#"FATAL:  could not open file "pg_xact/0000": No such file or directory"#,
            r#"FATAL:  could not read block 3 in file "base/5/1259": read only 0 of 8192 bytes"#,
            "FATAL:  recovery ended before configured recovery target was reached",
            "PANIC:  could not locate a valid checkpoint record",
            "FATAL:  incorrect checksum in control file",
            "FATAL:  could not access status of transaction 0\nDETAIL:  Could not open file \"pg_xact/0000\": No such file or directory.",
            "FATAL:  out of memory\nDETAIL:  Failed on request of size 1073741823 in memory context \"TopMemoryContext\".",
            r#"FATAL:  could not open file "global/1262": Permission denied"#,
            r#"FATAL:  data directory "/room/data" has invalid permissions"#,
            "FATAL:  invalid memory alloc request size 18446744073709551613",
            "LOG:  startup process (PID 17) was terminated by signal 6: Aborted",
        ] {
            assert_eq!(unfit(&format!("{line}\n")), None, "{line}");
        }
        // What follows is a consequence.
        let both = "PANIC:  WAL contains references to invalid pages\nFATAL:  could not write: No space left on device\n";
        assert_eq!(unfit(both), None);
        assert_eq!(unfit(""), None);
    }

    #[test]
    fn a_dump_is_blamed_for_what_no_machine_lacks() {
        let said = |line: &str| {
            format!(
                "pg_restore: from TOC entry 2; 3079 1 EXTENSION x \npg_restore: error: could not execute query: {line}\n\
                 Command was: x"
            )
        };
        for (line, what) in [
            (
                "ERROR:  could not open extension control file \"/x/y.control\": No such file or directory",
                EXTENSION,
            ),
            (
                "ERROR:  extension \"y\" is not available\nDETAIL:  Could not open extension control file",
                EXTENSION,
            ),
            ("ERROR:  could not access file \"$libdir/y\": No such file or directory", LIBRARY),
            ("ERROR:  y must be loaded via \"shared_preload_libraries\"", PRELOAD),
            ("ERROR:  security label provider \"selinux\" is not loaded", PRELOAD),
            ("ERROR:  invalid LC_COLLATE locale name: \"de_AT.utf8\"", LOCALE),
            (
                "ERROR:  collation \"pg_catalog.de_DE.utf8\" for encoding \"UTF8\" does not exist",
                LOCALE,
            ),
            (
                "ERROR:  could not open dictionary file \"/usr/share/postgresql/15/tsearch_data/de.dict\"",
                LIBRARY,
            ),
            ("FATAL:  extension \"timescaledb\" must be preloaded", PRELOAD),
            ("ERROR:  could not extend file \"base/1/2\": No space left on device", FULL),
        ] {
            let lacks = lacks_for_a_dump(&said(line)).unwrap_or_default();
            assert!(lacks.starts_with(what), "{line}: {lacks}");
        }
        for line in [
            "ERROR:  role \"gone\" does not exist",
            "ERROR:  duplicate key value violates unique constraint \"a\"\nDETAIL:  Key (a)=(No space) exists.",
            "ERROR:  function not_there() does not exist",
        ] {
            assert_eq!(lacks_for_a_dump(&said(line)), None, "{line}");
        }
        let cut = "pg_restore: error: could not read from input file: end of file";
        assert_eq!(lacks_for_a_dump(cut), None);
    }

    #[test]
    fn the_systems_own_words_may_stand_in_the_detail() {
        let detail = r#"DETAIL:  Could not write to file "pg_xact/0000" at offset 8192: No space left on device."#;
        let log = format!("FATAL:  could not access status of transaction 0\n{detail}\n");
        assert_eq!(unfit(&log), Some(Unfit { what: FULL, evidence: detail.to_owned() }));
    }

    #[test]
    fn a_missing_role_is_not_the_last_word() {
        let log = "FATAL:  role \"postgres\" does not exist\nFATAL:  out of shared memory\n";
        assert_eq!(unfit(log).map(|unfit| unfit.what), Some(MEMORY));
    }
}
