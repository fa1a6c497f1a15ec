//! Hundreds of ways to spoil a repository, one at a time: a check finds each at the level that a rule names beforehand, and
//! every backup restores exactly or not at all.
//!
//! `laboratory` makes what is spoilt, `mutate` the mutations, `rules` says what must be noticed where. The same mutations
//! are made in every run; what they meet differs, because keys and salts are random.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests: what cannot be set up has failed"
)]

#[path = "../suite/common/mod.rs"]
#[expect(dead_code, reason = "the suite uses the rest of it")]
mod common;
mod laboratory;
mod mutate;
mod rules;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{DAY_MS, NOW_MS};
use repository::store::Store;
use repository::store::directory::DirectoryStore;
use repository::{CheckLevel, Error, Repository, ScrubOptions, ScrubReport};

use crate::laboratory::{Laboratory, copy};
use crate::mutate::Mutation;
use crate::rules::Expect;

/// Two threads, each with a copy of its own.
const WORKERS: usize = 2;
/// The process holds a few packs of some hundred kilobytes at a time; a length that is believed would be seen.
const MEMORY_MAX_KIB: u64 = 512 << 10;

const LEVELS: [CheckLevel; 4] =
    [CheckLevel::Inventory, CheckLevel::Manifest, CheckLevel::Read, CheckLevel::Decrypt];

#[test]
fn every_mutation_is_found_at_its_level_and_no_backup_restores_wrong() {
    let runtime = runtime();
    let laboratory = runtime.block_on(laboratory::build());
    let baseline = runtime.block_on(scrub(&laboratory, laboratory.path(), CheckLevel::Decrypt));
    let baseline = baseline.unwrap();
    assert!(baseline.is_sound() && baseline.foreign.is_empty(), "{baseline:#?}");
    let mutations = mutate::all(&laboratory);
    let outcomes: Mutex<BTreeMap<&str, Outcomes>> = Mutex::default();
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (laboratory, mutations) = (&laboratory, &mutations);
            let (baseline, outcomes) = (&baseline, &outcomes);
            scope.spawn(move || {
                let place = tempfile::tempdir().unwrap();
                copy(laboratory.path(), place.path());
                let runtime = self::runtime();
                for mutation in mutations.iter().skip(worker).step_by(WORKERS) {
                    let here = Bed { laboratory, baseline, path: place.path() };
                    let outcome = runtime.block_on(here.try_out(mutation));
                    outcomes.lock().unwrap().entry(mutation.kind).or_default().add(&outcome);
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap();
    let mut all = Outcomes::default();
    println!("{:28} mutations   found  unseen   right refused", "");
    for (kind, outcomes) in &outcomes {
        println!("{kind:28} {outcomes}");
        all.add(outcomes);
    }
    println!("{:28} {all}", "");
    assert!(all.mutations >= 500, "{all}");
    assert!(all.found * 10 >= all.mutations * 7, "most are found: {all}");
    assert!(all.right >= 300 && all.refused >= 300, "both happen: {all}");
    let peak = memory_peak_kib();
    println!("at most {peak} KiB of memory");
    assert!(peak < MEMORY_MAX_KIB, "{peak} KiB");
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

#[derive(Debug, Default)]
struct Outcomes {
    mutations: usize,
    found: usize,
    unseen: usize,
    /// Restores that gave the right bytes, and such as gave an error.
    right: usize,
    refused: usize,
}

impl Outcomes {
    fn add(&mut self, other: &Self) {
        self.mutations += other.mutations;
        self.found += other.found;
        self.unseen += other.unseen;
        self.right += other.right;
        self.refused += other.refused;
    }
}

impl std::fmt::Display for Outcomes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { mutations, found, unseen, right, refused } = self;
        write!(f, "{mutations:9} {found:7} {unseen:7} {right:7} {refused:7}")
    }
}

async fn open(laboratory: &Laboratory, path: &Path) -> Result<Repository, Error> {
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(path));
    Repository::open(store, Some(&laboratory.key())).await
}

/// Opens the repository afresh and checks it. A repository that does not open is an error.
async fn scrub(
    laboratory: &Laboratory,
    path: &Path,
    level: CheckLevel,
) -> Result<ScrubReport, Error> {
    let repository = open(laboratory, path).await?;
    // Later than any attempt is open without being named.
    let options = ScrubOptions::new(level, NOW_MS + 30 * DAY_MS);
    let mut report = ScrubReport::default();
    repository.scrub(&options, &mut report).await.unwrap();
    Ok(report)
}

/// A copy of the repository that is spoilt and put right again.
struct Bed<'a> {
    laboratory: &'a Laboratory,
    baseline: &'a ScrubReport,
    path: &'a Path,
}

impl Bed<'_> {
    async fn try_out(&self, mutation: &Mutation) -> Outcomes {
        for edit in &mutation.edits {
            let file = self.path.join(&edit.key);
            match &edit.bytes {
                Some(bytes) => {
                    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
                    std::fs::write(file, bytes).unwrap();
                }
                None => std::fs::remove_file(file).unwrap(),
            }
        }
        let mut outcome = Outcomes { mutations: 1, ..Outcomes::default() };
        if self.is_found_where_it_must_be(mutation).await {
            outcome.found = 1;
        } else {
            outcome.unseen = 1;
        }
        self.restore(mutation, &mut outcome).await;
        self.fetch(mutation).await;
        for edit in &mutation.edits {
            let file = self.path.join(&edit.key);
            match self.laboratory.objects.get(&edit.key) {
                Some(object) => std::fs::write(file, &object.bytes).unwrap(),
                None => std::fs::remove_file(file).unwrap(),
            }
        }
        outcome
    }

    async fn is_found_where_it_must_be(&self, mutation: &Mutation) -> bool {
        let mut found = false;
        for (n, level) in LEVELS.into_iter().enumerate() {
            let wanted = |edit: &&mutate::Edit| edit.expect == Expect::At(level);
            let counted = |edit: &&mutate::Edit| edit.expect == Expect::Counted;
            let must: Vec<_> = mutation.edits.iter().filter(wanted).collect();
            let count =
                level == CheckLevel::Inventory && mutation.edits.iter().any(|e| counted(&e));
            if must.is_empty() && !count {
                continue;
            }
            let report = scrub(self.laboratory, self.path, level).await;
            for edit in &must {
                assert!(names(&report, &edit.key), "at {level:?}: {mutation}: {report:#?}");
                // The rule is not lax: what is found at this level is not found for less.
                if n > 0 {
                    let lower = scrub(self.laboratory, self.path, LEVELS[n - 1]).await;
                    assert!(!names(&lower, &edit.key), "{level:?} is too deep: {mutation}");
                }
            }
            if count {
                let garbage = |report: &ScrubReport| -> u64 {
                    report.lineages.iter().map(|row| row.unreferenced.packs).sum()
                };
                let report = report.unwrap();
                assert!(garbage(&report) > garbage(self.baseline), "{mutation}: {report:#?}");
            }
            found = true;
        }
        if !found {
            // What cannot be noticed must at least do no harm to the check.
            drop(scrub(self.laboratory, self.path, CheckLevel::Decrypt).await);
        }
        found
    }

    /// Restores every backup that could be concerned: exactly its bytes, or an error.
    async fn restore(&self, mutation: &Mutation, outcome: &mut Outcomes) {
        let everywhere = mutation.edits.iter().any(|edit| !edit.key.starts_with("lineages/"));
        for backup in &self.laboratory.backups {
            let lineage = backup.lineage.to_string();
            if !everywhere && !mutation.edits.iter().any(|edit| edit.key.contains(&lineage)) {
                continue;
            }
            let restored = async {
                let repository = open(self.laboratory, self.path).await?;
                let opened = repository.open_backup(backup.lineage, backup.backup).await?;
                common::restore(&opened).await
            };
            match restored.await {
                Ok(restored) => {
                    assert!(restored == backup.content, "{mutation}: {} is wrong", backup.backup);
                    outcome.right += 1;
                }
                Err(_) => outcome.refused += 1,
            }
        }
    }

    /// Fetches every file of an archive that is concerned: exactly its bytes, an error, or none where it was deleted.
    async fn fetch(&self, mutation: &Mutation) {
        if !mutation.edits.iter().any(|edit| edit.key.contains("/wal/")) {
            return;
        }
        let repository = open(self.laboratory, self.path).await.unwrap();
        for (lineage, file, content) in &self.laboratory.archived {
            let key = format!("lineages/{lineage}/wal/{:08X}/{file}", file.timeline().0);
            let edit = mutation.edits.iter().find(|edit| edit.key == key);
            match (repository.fetch_wal(*lineage, file).await, edit) {
                (Ok(Some(fetched)), _) => assert!(fetched == *content, "{mutation}: {file}"),
                (Ok(None), Some(edit)) => assert!(edit.bytes.is_none(), "{mutation}: {file}"),
                (Err(error), Some(_)) => {
                    assert!(matches!(error, Error::Damaged { .. }), "{mutation}: {file}: {error}");
                }
                (other, None) => panic!("{mutation}: {file}: {other:?}"),
            }
        }
    }
}

/// Whether a report names an object, or another one of the same attempt that does not fit it any more. A repository
/// that does not open is as loud as can be.
fn names(report: &Result<ScrubReport, Error>, key: &str) -> bool {
    let Ok(report) = report else { return true };
    let attempt = key.contains("/backups/").then(|| key.rsplit_once('/').unwrap().0);
    let is_it =
        |named: &str| named == key || attempt.is_some_and(|attempt| named.starts_with(attempt));
    report.damaged.iter().any(|damage| is_it(&damage.object))
        || report.foreign.iter().any(|foreign| foreign == key)
}

/// The most memory that this process has had.
fn memory_peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}
