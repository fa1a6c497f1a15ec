//! What takes a proof beyond the end of its backup: a moment that archived WAL leads to, found before a byte is written, and a
//! service that hands that WAL to the server in its sandbox, which reaches nothing else.

use std::sync::Arc;

use async_trait::async_trait;
use postgres::process::Account;
use postgres::sandbox::{self, SandboxRoom};
use proto::job::ProofTarget;
use proto::proof::BrokenWal;
use proto::wal::SegmentName;
use proto::{
    Action, AttemptId, BackupFacts, BackupId, ClusterName, Code, Failure, Lsn, Recovery,
    RecoveryTarget, SystemIdentifier, WalFileName,
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
    /// What was asked for, or chosen.
    pub(crate) to: RecoveryTarget,
    /// The same for people.
    pub(crate) asked: String,
    /// Where the server will live. The socket lies there, too, so that whoever finds the room of a dead worker finds both.
    room: Option<SandboxRoom>,
    /// Answers for as long as the proof lasts.
    _service: Service,
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
    /// Finds the backup to begin with and the way to the moment, for a server in this room. The backup is pinned.
    pub async fn find(
        repository: &Repository,
        whom: Whom<'_>,
        target: &ProofTarget,
        pin: &Pin,
        room: SandboxRoom,
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
            rehearses: true,
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
        let socket = room.service_socket();
        let opened = Arc::new(Opened(repository.clone()));
        let service = Service::listen(&socket, opened).await.map_err(unheard)?;
        let fetching =
            Fetching { program: recovering::this_program()?, from: FetchFrom::Service(socket) };
        let wanted = Wanted { backup, recovery: &recovery, ..wanted };
        let (pinned, plan) = recovering::plan(repository, wanted, &fetching, pin).await?;
        let (to, room) = (recovery.to, Some(room));
        Ok((pinned, Self { plan, to, asked, room, _service: service }))
    }

    /// The same, as a sandbox is told.
    pub(crate) fn of_sandbox(&self) -> sandbox::Beyond {
        let RecoveryPlan { settings, expected, .. } = &self.plan;
        sandbox::Beyond { settings: settings.clone(), at_least: expected.at_least }
    }

    /// The room that was made for the server, once.
    pub(crate) fn take_room(&mut self) -> Option<SandboxRoom> {
        self.room.take()
    }

    /// What it says that a server did not come to the moment: something of archived WAL, of the backup alone, or of neither.
    pub(crate) fn fell(&self, error: postgres::Error, facts: &BackupFacts) -> Fell {
        use postgres::Error::{Replay, StopPositionMissed};
        let met_by = self.plan.met_by;
        let before = || self.stretch(Lsn(met_by.0.saturating_sub(1)), met_by);
        if let Some(failure) = not_fetched(&error) {
            let is_wal = matches!(
                failure.code,
                Code::ObjectDamaged | Code::ObjectMissing | Code::WalMissing
            );
            let size = facts.wal_segment_size;
            let broken = || match unfetched(&error).and_then(|name| name.segment(size)) {
                Some(segment) => BrokenWal {
                    target: self.asked.clone(),
                    timeline: segment.timeline,
                    from: segment.start(size),
                    to: segment.end(size),
                },
                None => before(),
            };
            return Fell { failure, broken: is_wal.then(broken) };
        }
        let broken = match &error {
            Replay { is_missed: true, .. } if !self.plan.is_found => {
                return Fell { failure: self.not_found(facts), broken: None };
            }
            Replay { .. } => Some(before()),
            StopPositionMissed { reached, .. } if *reached >= facts.stop_lsn => {
                Some(self.stretch(*reached, *reached))
            }
            _ => None,
        };
        Fell { failure: error.into(), broken }
    }

    fn stretch(&self, from: Lsn, to: Lsn) -> BrokenWal {
        let way = &self.plan.way;
        let number = from.0 / u64::from(way.segment_size());
        BrokenWal { target: self.asked.clone(), timeline: way.segment(number).timeline, from, to }
    }

    /// Nobody had looked for it, and it is not there.
    fn not_found(&self, facts: &BackupFacts) -> Failure {
        let what = format!(
            "the target was not found: the server replayed all WAL that there is without meeting {}, for which nobody could look before",
            self.asked
        );
        Failure::new(Code::RecoveryTargetUnreachable, Action::FixConfig, what).with_hint(format!(
            "This says nothing about the backup. `pgmuster recovery windows {}` shows what can be recovered; --to latest takes all there is.",
            facts.cluster
        ))
    }
}

/// How a server fell that was to go beyond its backup.
#[derive(Debug)]
pub(crate) struct Fell {
    /// Why.
    pub(crate) failure: Failure,
    /// The archived WAL that ended it.
    pub(crate) broken: Option<BrokenWal>,
}

/// The last lines that a server said which did not start.
fn said(error: &postgres::Error) -> Option<&str> {
    match error {
        postgres::Error::Sandbox { output, .. } | postgres::Error::Replay { output, .. } => {
            Some(output)
        }
        _ => None,
    }
}

/// The segment that a server could not get, by its last words.
fn unfetched(error: &postgres::Error) -> Option<SegmentName> {
    let (_, rest) = said(error)?.rsplit_once("could not restore file \"")?;
    match rest.split_once('"')?.0.parse() {
        Ok(WalFileName::Segment(name)) => Some(name),
        _ => None,
    }
}

/// Why a server got no WAL, by the last words of the program that fetches it: that is not its backup's fault.
pub(crate) fn not_fetched(error: &postgres::Error) -> Option<Failure> {
    let output = said(error)?;
    let errors = output.lines().rev().filter_map(|line| line.trim().strip_prefix("error: "));
    let told = errors.filter_map(|said| {
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

    #[test]
    fn the_segment_that_a_server_did_not_get_is_named_by_its_last_words() {
        let said = |file: &str| postgres::Error::Replay {
            what: "it ended with exit code 1".to_owned(),
            output: format!(
                "LOG:  restored log file \"0000000A00000015000000B2\" from archive\n\
                 FATAL:  could not restore file \"{file}\" from archive: child process exited with exit code 200"
            ),
            is_missed: false,
        };
        let named = |file| unfetched(&said(file)).map(|name| name.to_string());
        let segment = "0000000A00000015000000B3";
        assert_eq!(named(segment).as_deref(), Some(segment));
        assert_eq!(named("0000000B.history"), None);
        assert!(not_fetched(&said(segment)).is_some());
    }
}
