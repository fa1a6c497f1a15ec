//! What the checks saw, and how it becomes the outcome of each.

use proto::proof::{CheckOutcome, ProofCheck, ProofLevel};

use super::Run;
use crate::error::Error;

/// Findings named in a check's detail; all are counted.
const NAMED_FINDINGS: usize = 10;

/// Names and levels of the checks, in the order they are reported.
pub(super) const CHECKS: [(&str, ProofLevel, &str); 12] = [
    ("stop_position", ProofLevel::L3, "the server reached the end of the backup"),
    (
        "system_identifier",
        ProofLevel::L3,
        "the restored server has the system identifier of the backup",
    ),
    ("tables_readable", ProofLevel::L4, "relations read to the last byte"),
    ("page_checksums", ProofLevel::L4, "relations read without a wrong page"),
    ("amcheck_tables", ProofLevel::L4, "tables checked by verify_heapam"),
    ("amcheck_indexes", ProofLevel::L4, "B-tree indexes checked by bt_index_check"),
    ("extensions_load", ProofLevel::L4, "libraries loaded"),
    (
        "collations",
        ProofLevel::L4,
        "databases and collations with the version they were built with",
    ),
    ("relations_present", ProofLevel::L5, "relations of the census are there"),
    ("row_counts", ProofLevel::L5, "tables have the rows they must have"),
    ("extensions_present", ProofLevel::L5, "extensions of the census are there"),
    ("canary", ProofLevel::L5, "a transaction of the time of the backup is committed"),
];

/// What one check saw.
#[derive(Default)]
pub(super) struct Findings {
    pub(super) good: u64,
    /// What was seen to be wrong, and what could not be seen to be right.
    pub(super) bad: Vec<String>,
    /// How many of `bad` show no damage themselves: the connection was gone, or they follow from something that has its
    /// own entry.
    pub(super) blind: usize,
    pub(super) unseen: Vec<String>,
    /// Whether what is unseen is so much that what was seen does not make up for it.
    pub(super) lacks_much: bool,
}

impl Findings {
    pub(super) fn saw_damage(&self) -> bool {
        self.bad.len() > self.blind
    }
}

/// Whether an error says that this machine lacks a library, a function or a locale, which is no fault of the backup.
pub(super) fn is_environment(error: &Error) -> bool {
    let lacks_function = |code: &str| matches!(code, "0A000" | "42883");
    lacks_something_here(error) || error.state().is_some_and(|state| lacks_function(state.code()))
}

/// Whether an error says that this machine lacks a library or a locale.
///
/// A missing library and a missing file of a relation have the same SQLSTATE; the text, which is in English in our
/// sessions, tells them apart.
pub(super) fn lacks_something_here(error: &Error) -> bool {
    let lacks_library = || {
        let text = proto::failure::chain(error);
        text.contains("could not access file") || text.contains("could not load library")
    };
    error.state().is_some_and(|state| match state.code() {
        "58P01" => lacks_library(),
        // The system's locales, without which no session gets into the database.
        "XX000" => proto::failure::chain(error).contains("locale is incompatible"),
        _ => false,
    })
}

/// Whether an error of amcheck comes from the code in an index's expression or predicate, which does not find something by
/// the `search_path` of the check. It says nothing about the index.
pub(super) fn is_lost_object(error: &Error) -> bool {
    error.state().is_some_and(|state| matches!(state.code(), "42P01" | "42704" | "42883" | "3F000"))
}

/// Whether an error says that stored data are damaged.
pub(super) fn is_corruption(error: &Error) -> bool {
    error.state().is_some_and(|state| matches!(state.code(), "XX001" | "XX002"))
}

/// Whether an error says only that the server was gone, or about to be.
pub(super) fn is_lost(error: &Error) -> bool {
    let ending = |code: &str| matches!(code, "57P01" | "57P02" | "57P03" | "57P05");
    error.is_closed() || error.state().is_some_and(|state| ending(state.code()))
}

/// Whether an error says that something ran out: disk, memory, files, connections (class 53). Damaged data can ask for too
/// much as well, so it fails the check; by itself it shows no damage.
pub(super) fn is_shortage(error: &Error) -> bool {
    error.state().is_some_and(|state| state.code().starts_with("53"))
}

/// Whether an error says that a page failed its checksum or has a broken header.
fn is_bad_page(error: &Error) -> bool {
    error.state().is_some_and(|state| state.code() == "XX001")
}

impl Run<'_> {
    pub(super) fn finding(&mut self, check: &'static str) -> &mut Findings {
        self.findings.entry(check).or_default()
    }

    pub(super) fn note(&mut self, check: &'static str, good: bool, what: impl FnOnce() -> String) {
        let findings = self.finding(check);
        if good { findings.good += 1 } else { findings.bad.push(what()) }
    }

    pub(super) fn unseen(&mut self, check: &'static str, what: String) {
        self.finding(check).unseen.push(what);
    }

    /// Notes what was not right, but shows no damage by itself.
    pub(super) fn blind(&mut self, check: &'static str, what: String) {
        let findings = self.finding(check);
        findings.bad.push(what);
        findings.blind += 1;
    }

    /// Notes how something went that can fail for the backup's fault or for this machine's.
    pub(super) fn outcome<T>(
        &mut self,
        check: &'static str,
        thing: &str,
        outcome: Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        match outcome {
            Ok(value) => {
                self.finding(check).good += 1;
                Ok(Some(value))
            }
            Err(error @ (Error::Cancelled { .. } | Error::Deadline { .. })) => Err(error),
            Err(error) => {
                let text = format!("{thing}: {}", proto::failure::chain(&error));
                if is_bad_page(&error) && check != "page_checksums" {
                    self.finding("page_checksums").bad.push(text.clone());
                }
                if is_environment(&error) {
                    self.unseen(check, text);
                } else if is_lost(&error) || is_shortage(&error) {
                    self.blind(check, text);
                } else {
                    self.finding(check).bad.push(text);
                }
                Ok(None)
            }
        }
    }
}

pub(super) fn conclude(
    name: &str,
    level: ProofLevel,
    what: &str,
    findings: Option<&Findings>,
    checksums: bool,
) -> ProofCheck {
    let nothing = Findings::default();
    let findings = findings.unwrap_or(&nothing);
    let list = |items: &[String]| {
        let text = items.iter().take(NAMED_FINDINGS).cloned().collect::<Vec<_>>().join("; ");
        match items.len().checked_sub(NAMED_FINDINGS) {
            None | Some(0) => text,
            Some(more) => format!("{text}; and {more} more"),
        }
    };
    let (outcome, detail) = if !findings.bad.is_empty() {
        (CheckOutcome::Failed, format!("{} wrong: {}", findings.bad.len(), list(&findings.bad)))
    } else if name == "page_checksums" && !checksums {
        (CheckOutcome::Skipped, "the cluster has no page checksums".to_owned())
    } else if !findings.unseen.is_empty() {
        let seen = findings.good;
        // A busy table cannot be compared, ever; what could be is a look. A table that was not read is none, and neither
        // is a database of which nothing is known.
        let outcome = if name == "row_counts" && seen > 0 && !findings.lacks_much {
            CheckOutcome::Passed
        } else {
            CheckOutcome::Skipped
        };
        (
            outcome,
            format!(
                "{seen} {what}; {} not judged: {}",
                findings.unseen.len(),
                list(&findings.unseen)
            ),
        )
    } else if level == ProofLevel::L3 || name == "canary" {
        (CheckOutcome::Passed, what.to_owned())
    } else if level == ProofLevel::L4 && findings.good == 0 {
        // Every server has catalogues; a check that saw none of them did not look.
        (CheckOutcome::Skipped, format!("0 {what}"))
    } else {
        (CheckOutcome::Passed, format!("{} {what}", findings.good))
    };
    ProofCheck { name: name.to_owned(), level, outcome, detail }
}
