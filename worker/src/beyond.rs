//! What takes a proof beyond the end of its backup: a moment that archived WAL leads to, found before a byte is written, and a
//! service that hands that WAL to the server in its sandbox, which reaches nothing else.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use postgres::process::Account;
use postgres::sandbox;
use postgres::short_place::ShortPlace;
use proto::job::ProofTarget;
use proto::{
    Action, AttemptId, BackupId, ClusterName, Code, Failure, Lsn, Recovery, RecoveryTarget,
    SystemIdentifier,
};
use repository::{Pin, Pinned, Repository};

use crate::archive::Whose;
use crate::archive::service::{OpenArchive, Service};
use crate::recovering::{self, FetchFrom, Fetching, Range, RecoveryPlan, Wanted};

/// A moment behind the end of a backup, and the WAL that leads there.
#[derive(Debug)]
pub struct Beyond {
    /// How the server gets there, and where it must arrive.
    pub(crate) plan: RecoveryPlan,
    /// What was asked for, for people.
    pub(crate) asked: String,
    /// Answers for as long as the proof lasts; its socket lies in the directory.
    _service: (Service, ShortPlace),
}

/// Whose backup is wanted, and which.
#[derive(Debug, Clone, Copy)]
pub struct Whom<'a> {
    /// The cluster.
    pub cluster: &'a ClusterName,
    /// Its system identifier, where it is known.
    pub system_identifier: Option<SystemIdentifier>,
    /// The backup to begin with; otherwise the right one is found.
    pub backup: Option<BackupId>,
    /// The attempt that asks: where a position is chosen by chance, it is the attempt's, so that it chooses no other when it
    /// is asked again.
    pub attempt: AttemptId,
}

/// The repository that was opened for the proof, and no other.
#[derive(Debug)]
struct Opened(Repository);

#[async_trait]
impl OpenArchive for Opened {
    async fn open(&self, _: Whose, _: Option<String>) -> Result<Repository, Failure> {
        Ok(self.0.clone())
    }
}

impl Beyond {
    /// Finds the backup to begin with and the way to the moment. The backup is pinned.
    pub async fn find(
        repository: &Repository,
        whom: Whom<'_>,
        target: &ProofTarget,
        pin: &Pin,
    ) -> Result<(Pinned, Self), Failure> {
        if Account::current().is_root() {
            let what = "PostgreSQL does not run as root, and the server of a proof could not ask this worker for WAL";
            return Err(Failure::new(Code::PermissionDenied, Action::FixConfig, what).with_hint(
                "Run the worker as the user of its servers, or prove the backup alone.",
            ));
        }
        let Whom { cluster, system_identifier, .. } = whom;
        let any = Recovery::to(RecoveryTarget::Latest);
        let wanted = Wanted {
            cluster: Some(cluster),
            system_identifier,
            backup: whom.backup,
            recovery: &any,
        };
        let (backup, recovery, asked) = match target {
            ProofTarget::At(to) => (whom.backup, Recovery::to(to.clone()), to.to_string()),
            ProofTarget::Random => {
                let Range { backup, timeline, from, last } =
                    recovering::range(repository, wanted).await?;
                let to = chosen(from, last, chance(whom.attempt));
                let to_there = Recovery::to(RecoveryTarget::Lsn(to));
                let recovery = Recovery { timeline: Some(timeline), ..to_there };
                (Some(backup), recovery, format!("position {to}, chosen by chance"))
            }
        };
        let unheard = |error: std::io::Error| {
            let what = format!("failed to listen for the server of a proof: {error}");
            Failure::new(Code::SandboxUnfit, Action::RetryElsewhere, what)
        };
        let place = ShortPlace::make().map_err(unheard)?;
        let socket: PathBuf = place.path().join("wal.sock");
        let opened = Arc::new(Opened(repository.clone()));
        let service = Service::listen(&socket, opened).await.map_err(unheard)?;
        let fetching =
            Fetching { program: recovering::this_program()?, from: FetchFrom::Service(socket) };
        let wanted = Wanted { backup, recovery: &recovery, ..wanted };
        let (pinned, plan) = recovering::plan(repository, wanted, &fetching, pin).await?;
        Ok((pinned, Self { plan, asked, _service: (service, place) }))
    }

    /// The same, as a sandbox is told.
    pub(crate) fn of_sandbox(&self) -> sandbox::Beyond {
        let RecoveryPlan { settings, expected, .. } = &self.plan;
        sandbox::Beyond { settings: settings.clone(), at_least: expected.at_least }
    }
}

/// Why a server got no WAL, by the last words of the program that fetches it: that is not its backup's fault.
pub(crate) fn not_fetched(error: &postgres::Error) -> Option<Failure> {
    let postgres::Error::Sandbox { output, .. } = error else { return None };
    let said = output.lines().rev().filter_map(|line| line.trim().strip_prefix("error: "));
    let told = said.filter_map(|said| {
        let (code, message) = said.split_once(": ")?;
        Some((serde_json::from_value::<Code>(code.into()).ok()?, message))
    });
    let Some((code, message)) = told.into_iter().next() else {
        // It died, or was not even started.
        let what =
            "the server of a proof could not fetch archived WAL, and its log does not say why";
        let unfit = || Failure::new(Code::SandboxUnfit, Action::RetryElsewhere, what);
        return output.contains("could not restore file").then(unfit);
    };
    let action = if code == Code::DataDirectoryShape { Action::FixConfig } else { Action::Retry };
    Some(Failure::new(code, action, format!("archived WAL could not be replayed: {message}")))
}

/// The random half of an attempt's id.
fn chance(attempt: AttemptId) -> u64 {
    attempt.as_bytes().last_chunk().map_or(0, |random| u64::from_be_bytes(*random))
}

/// One of the positions from `first` to `last`, each as likely as any other but for what a division leaves.
fn chosen(first: Lsn, last: Lsn, chance: u64) -> Lsn {
    let width = u128::from(last.0.saturating_sub(first.0)) + 1;
    let offset = (u128::from(chance.wrapping_mul(0x9E37_79B9_7F4A_7C15)) * width) >> 64;
    Lsn(first.0.saturating_add(u64::try_from(offset).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_may_be_chosen_and_none_outside() {
        let mut seen = std::collections::BTreeSet::new();
        for n in 0..2_000u64 {
            let Lsn(position) = chosen(Lsn(100), Lsn(107), n);
            assert!((100..=107).contains(&position), "{position}");
            seen.insert(position);
        }
        assert_eq!(seen.len(), 8);
        assert_eq!(chosen(Lsn(5), Lsn(5), u64::MAX), Lsn(5));
        assert!(chosen(Lsn(0), Lsn(u64::MAX), 1) > Lsn(0));
    }

    #[test]
    fn a_store_that_is_away_is_not_the_backups_fault() {
        let failed = |output: &str| postgres::Error::Sandbox {
            what: "it ended with exit status 1".to_owned(),
            output: output.to_owned(),
        };
        let told = not_fetched(&failed(
            "LOG:  restored log file\nerror: STORE_UNAVAILABLE: it does not answer\nhint: wait\nFATAL:  could not restore file",
        ));
        let told = told.unwrap();
        assert_eq!(told.code, Code::StoreUnavailable);
        assert!(told.message.ends_with("it does not answer"), "{told}");
        assert_eq!(
            not_fetched(&failed("FATAL:  recovery ended before configured recovery target")),
            None
        );
        assert_eq!(not_fetched(&failed("error: no code: x")), None);
        let killed =
            not_fetched(&failed("FATAL:  could not restore file \"A\" from archive: killed"));
        assert_eq!(killed.map(|told| told.code), Some(Code::SandboxUnfit));
    }
}
