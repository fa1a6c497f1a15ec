//! Starting a restored server and seeing that it came to where it shall be.

use std::path::PathBuf;
use std::sync::Arc;

use postgres::binaries::Binaries;
use postgres::process::Account;
use postgres::recovery::{Expected, RecoveryServer};
use postgres::short_place::ShortPlace;
use proto::job::{Reached, RecoveryOutcome, RestoreOutcome};
use proto::{Action, Code, Failure, TargetAction};
use repository::Backup;

use super::RecoveryPlan;
use super::place::Listening;
use crate::archive::service::{OpenArchive, SOCKET_VARIABLE, Service};
use crate::context::JobContext;
use crate::programs;
use crate::restoring::Destination;

/// Everything that a start needs and that is better missed before the files are restored than after.
#[derive(Debug)]
pub struct Starter {
    binaries: Binaries,
    environment: Vec<(String, String)>,
    archive: Arc<dyn OpenArchive>,
    expected: Expected,
    outcome: RecoveryOutcome,
}

impl RecoveryPlan {
    /// Adds what is known of the recovery to what a restore did, or would do. What is not taken stays told when it is done.
    #[must_use]
    pub fn tell(&self, done: RestoreOutcome) -> RestoreOutcome {
        let mut plan = done.plan;
        if done.planned_only {
            plan.extend(self.lines.iter().cloned());
        } else {
            plan.extend(self.not_taken.iter().cloned());
        }
        let recovery = done.recovery.or_else(|| Some(self.outcome.clone()));
        RestoreOutcome { plan, recovery, ..done }
    }

    /// Finds the programs of the backup's version and sizes, and sees that the place where the server will listen is free; with
    /// `delta` it takes the place of a stopped one, and that place is its own. `environment` is what the server gets of it, and
    /// `archive` is where its WAL comes from.
    pub async fn starter(
        &self,
        backup: &Backup,
        bin_dirs: &[PathBuf],
        environment: Vec<(String, String)>,
        archive: Arc<dyn OpenArchive>,
        delta: bool,
    ) -> Result<Starter, Failure> {
        if Account::current().is_root() {
            let what = "PostgreSQL does not run as root, so a server cannot be started";
            return Err(Failure::new(Code::PermissionDenied, Action::FixConfig, what)
                .with_hint("Restore as the user who shall run the server, or without --start."));
        }
        let binaries = programs::of(backup, bin_dirs).await?;
        // It is opened by its own settings in the end, unless it shuts down at its target.
        let opens = self.expected.standby || self.expected.action != TargetAction::Shutdown;
        if opens
            && !delta
            && let Some(place) = Listening::of(&backup.facts().settings, self.settings.port)
        {
            place.check().await?;
        }
        let (expected, outcome) = (self.expected.clone(), self.outcome.clone());
        Ok(Starter { binaries, environment, archive, expected, outcome })
    }
}

impl Starter {
    /// Starts the server in a directory that was restored by the plan, and adds what it reached.
    pub async fn start(
        &self,
        cx: &JobContext,
        destination: &Destination,
        done: RestoreOutcome,
    ) -> Result<RestoreOutcome, Failure> {
        let service = self.serve().await;
        let alone: Vec<(String, String)> = service
            .iter()
            .map(|(_, socket)| (SOCKET_VARIABLE.to_owned(), socket.clone()))
            .collect();
        let server = RecoveryServer {
            binaries: &self.binaries,
            directory: &destination.data_directory,
            environment: &self.environment,
            environment_alone: &alone,
            cancel: &cx.cancel,
        };
        let recovered = match server.recover(&self.expected).await {
            Err(_) if cx.cancel.is_cancelled() => return Err(cx.stopped()),
            recovered => recovered?,
        };
        let reached = Reached {
            state: recovered.state,
            stays_down: recovered.stays_down,
            lsn: recovered.lsn,
            last_commit: recovered.last_commit,
            timeline: recovered.timeline,
            evidence: recovered.evidence,
            duration_ms: u64::try_from(recovered.duration.as_millis()).unwrap_or(u64::MAX),
        };
        let recovery = RecoveryOutcome { reached: Some(reached), ..self.outcome.clone() };
        Ok(RestoreOutcome { recovery: Some(recovery), ..done })
    }

    /// Fetches ahead for as long as the server recovers. Without it, the server's commands fetch for themselves.
    async fn serve(&self) -> Option<((Service, ShortPlace), String)> {
        let place = ShortPlace::make().ok()?;
        let socket = place.path().join("wal.sock");
        match Service::listen(&socket, Arc::clone(&self.archive)).await {
            Ok(service) => Some(((service, place), socket.display().to_string())),
            Err(error) => {
                tracing::info!("WAL is not fetched ahead: {error}");
                None
            }
        }
    }
}
