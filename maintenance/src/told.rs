//! What of an outcome is told: lists that grow with the number of tables are cut, and say how much they leave out.
//!
//! An outcome travels in one signed message, whose size has a limit (`proto::envelope::PAYLOAD_MAX_BYTES`): a job over a
//! hundred thousand tables would otherwise be done and could never be reported.

use proto::job::{AnalyzeOutcome, SkippedTable, VacuumOutcome, VacuumedTable};

/// Entries of one list that are told. With the longest names and reasons a thousand take 2 MiB at most, and usually a tenth.
pub const TOLD_MAX: usize = 1_000;

/// Cuts the lists of an analyze.
#[must_use]
pub fn analyze(outcome: AnalyzeOutcome) -> AnalyzeOutcome {
    AnalyzeOutcome {
        databases: outcome.databases,
        analyzed: outcome.analyzed,
        skipped: skipped(outcome.skipped),
        plan: lines(outcome.plan),
    }
}

/// Cuts the lists of a vacuum.
#[must_use]
pub fn vacuum(outcome: VacuumOutcome) -> VacuumOutcome {
    VacuumOutcome {
        databases: outcome.databases,
        vacuumed: vacuumed(outcome.vacuumed),
        skipped: skipped(outcome.skipped),
        plan: lines(outcome.plan),
    }
}

fn lines(plan: Vec<String>) -> Vec<String> {
    cut(plan, |rest| Some(format!("and {} more", rest.len())))
}

fn skipped(tables: Vec<SkippedTable>) -> Vec<SkippedTable> {
    cut(tables, |rest| {
        Some(SkippedTable {
            database: rest.first()?.database.clone(),
            table: format!("and {} more", rest.len()),
            reason: "not listed one by one, with those of the databases after it".to_owned(),
        })
    })
}

/// The last entry has the sums of those that are not told, so that sums over the list stay true.
fn vacuumed(tables: Vec<VacuumedTable>) -> Vec<VacuumedTable> {
    cut(tables, |rest| {
        let sum = |figure: fn(&VacuumedTable) -> u64| rest.iter().map(figure).sum();
        Some(VacuumedTable {
            database: rest.first()?.database.clone(),
            table: format!("and {} more", rest.len()),
            bloat_ratio: rest.iter().map(|table| table.bloat_ratio).fold(0.0, f64::max),
            dead_rows_before: sum(|table| table.dead_rows_before),
            dead_rows_after: sum(|table| table.dead_rows_after),
            size_before_bytes: sum(|table| table.size_before_bytes),
            size_after_bytes: sum(|table| table.size_after_bytes),
        })
    })
}

/// The first entries of a list, and one for the others.
fn cut<T>(mut list: Vec<T>, rest: impl FnOnce(&[T]) -> Option<T>) -> Vec<T> {
    if list.len() > TOLD_MAX {
        let last = rest(&list[TOLD_MAX..]);
        list.truncate(TOLD_MAX);
        list.extend(last);
    }
    list
}

#[cfg(test)]
mod tests {
    use proto::DatabaseName;
    use proto::envelope::PAYLOAD_MAX_BYTES;

    use super::*;

    const TABLES: usize = 10_000;

    fn database() -> DatabaseName {
        "d".repeat(63).parse().unwrap()
    }

    /// As long as names can get: each quote is doubled in SQL, and escaped on the way.
    fn name() -> String {
        let name = format!("\"{}\"", "\"\"".repeat(63));
        format!("{name}.{name}")
    }

    fn skip() -> SkippedTable {
        let reason = format!("not permitted: GRANT MAINTAIN ON TABLE {} TO {}", name(), name());
        SkippedTable { database: database(), table: name(), reason }
    }

    fn table(rows: u64) -> VacuumedTable {
        VacuumedTable {
            database: database(),
            table: name(),
            bloat_ratio: 3.25,
            dead_rows_before: rows,
            dead_rows_after: 0,
            size_before_bytes: 1 << 40,
            size_after_bytes: 1 << 40,
        }
    }

    fn size(outcome: &impl serde::Serialize) -> usize {
        serde_json::to_vec(outcome).unwrap().len()
    }

    #[test]
    fn an_outcome_over_very_many_tables_fits_into_its_message() {
        let outcome = vacuum(VacuumOutcome {
            databases: 3,
            vacuumed: vec![table(2); TABLES],
            skipped: vec![skip(); TABLES],
            plan: Vec::new(),
        });
        assert!(size(&outcome) < PAYLOAD_MAX_BYTES * 3 / 4, "{}", size(&outcome));
        let last = outcome.vacuumed.last().unwrap();
        assert_eq!(last.table, "and 9000 more");
        let dead: u64 = outcome.vacuumed.iter().map(|table| table.dead_rows_before).sum();
        assert_eq!(dead, 2 * TABLES as u64);
        assert_eq!(outcome.skipped.last().unwrap().table, "and 9000 more");

        let line = format!("skip {}: {}", name(), skip().reason);
        let planned = AnalyzeOutcome {
            plan: vec![line; TABLES],
            skipped: vec![skip(); TABLES],
            ..AnalyzeOutcome::default()
        };
        assert!(size(&planned) > PAYLOAD_MAX_BYTES, "the limit is what keeps it small");
        let planned = analyze(planned);
        assert!(size(&planned) < PAYLOAD_MAX_BYTES, "{}", size(&planned));
        assert_eq!(planned.plan.last().unwrap(), "and 9000 more");
    }

    #[test]
    fn a_short_list_is_told_whole() {
        let outcome = VacuumOutcome {
            databases: 1,
            vacuumed: vec![table(1); TOLD_MAX],
            skipped: vec![skip()],
            plan: vec!["vacuum t".to_owned(); TOLD_MAX],
        };
        assert_eq!(vacuum(outcome.clone()), outcome);
    }
}
