//! What went wrong in one of PostgreSQL's client programs, in the words of a job's failure.

use proto::{Action, Code, Failure};

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
