//! What went wrong in one of PostgreSQL's client programs, in the words of a job's failure.

use proto::{Action, Code, Failure};

/// As much is kept of why a database is not in a backup.
const WHY_CHARS_MAX: usize = 600;

/// What an error has in it that lies in one database, whatever is tried again: its catalog or its data contradict themselves, or what they
/// name is not there. In English, as servers say it by default. Whatever else there is, and all of it in other languages, may pass by itself,
/// or be of every database, and is never held against one: a table that was dropped meanwhile, a full disk, a lock, a lost connection, a
/// right that is missing.
const OF_ONE: [&str; 12] = [
    "catalog is missing",
    "invalid page in block",
    "could not read block",
    "could not access file",
    "could not load library",
    "could not access status of transaction",
    "missing chunk number",
    "unexpected chunk number",
    "compressed pglz data is corrupt",
    "compressed lz4 data is corrupt",
    "invalid memory alloc request size",
    "unrecognized",
];

/// Whether a program that ended so cannot read this database, while it may read others: one that the server, or the program,
/// cannot make sense of.
pub(super) fn is_of_database(error: &postgres::Error) -> bool {
    if let Some(state) = error.state() {
        // Internal errors, damaged data, files that are missing or cannot be read.
        return ["XX", "58"].iter().any(|class| state.code().starts_with(class));
    }
    let postgres::Error::Program { outcome, output, .. } = error else { return false };
    outcome.starts_with("exit code")
        && output.contains("error: ")
        && OF_ONE.iter().any(|own| output.contains(own))
}

/// The failure of a program that ended badly while it did something to `what`.
pub(super) fn of_program(what: &str, error: postgres::Error) -> Failure {
    let postgres::Error::Program { program, outcome, output } = &error else {
        return error.into();
    };
    let message = format!("{program} of {what} ended with {outcome}: {output}");
    if output.contains("permission denied") || output.contains("row-level security") {
        return Failure::new(Code::PermissionDenied, Action::FixConfig, message).with_hint(
            "GRANT pg_read_all_data TO the role, and ALTER ROLE … BYPASSRLS where tables have row security; \
             CONNECT on every database is needed as well.",
        );
    }
    Failure::new(Code::DumpFailed, Action::Retry, message)
        .with_hint("Its first error says why; nothing was committed.")
}

/// A failure as why a database is not in a backup, in one line that may be told.
pub(super) fn why(failure: &Failure) -> String {
    let line = failure.message.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut line = telemetry::scrub(&line).into_owned();
    if let Some((end, _)) = line.char_indices().nth(WHY_CHARS_MAX) {
        line.truncate(end);
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(outcome: &str, output: &str) -> postgres::Error {
        let (outcome, output) = (outcome.to_owned(), output.to_owned());
        postgres::Error::Program { program: "pg_dump".to_owned(), outcome, output }
    }

    #[test]
    fn what_may_pass_or_is_the_servers_is_not_held_against_a_database() {
        let said = "pg_dump: error: query failed: ERROR:  ";
        for (outcome, what, is_its_own) in [
            ("exit code 1", "catalog is missing 1 attribute(s) for relation OID 16385", true),
            (
                "exit code 1",
                "could not access file \"$libdir/odd\": No such file or directory",
                true,
            ),
            ("signal 9", "cache lookup failed for type 16390", false),
            ("exit code 1", "canceling statement due to lock timeout", false),
            ("exit code 1", "relation \"public.t\" does not exist", false),
            ("exit code 1", "cache lookup failed for type 16390", false),
            (
                "exit code 1",
                "could not extend file \"base/5/16390\": No space left on device",
                false,
            ),
            ("exit code 1", "permission denied for table t", false),
            ("exit code 1", "ABBRUCH:  Abbruch der Anfrage wegen Zeitüberschreitung", false),
            ("exit code 1", "canceling statement due to conflict with recovery", false),
        ] {
            assert_eq!(
                is_of_database(&ended(outcome, &format!("{said}{what}"))),
                is_its_own,
                "{what}"
            );
        }
        let lost = "pg_dump: error: connection to server at \"db1\" failed: FATAL:  sorry, too many clients already";
        assert!(!is_of_database(&ended("exit code 1", lost)));
        assert!(!is_of_database(&ended("exit code 1", "")), "nobody knows why");
    }

    #[test]
    fn why_a_database_is_missing_is_one_line_without_secrets() {
        let text = "pg_dump of database a ended:\n  postgres://b:hunter2@db1/a  was refused";
        let failure = Failure::new(Code::DumpFailed, Action::Retry, text);
        let line = why(&failure);
        assert!(
            line.starts_with("pg_dump of database a ended: postgres://b:")
                && line.ends_with("refused"),
            "{line}"
        );
        assert!(!line.contains("hunter2"), "{line}");
        let long = Failure::new(Code::DumpFailed, Action::Retry, "é".repeat(5_000));
        assert_eq!(why(&long).chars().count(), WHY_CHARS_MAX + 1);
    }
}
