//! What maintenance jobs have in common: the cluster's lock, and one database after the other.

use std::time::Duration;

use maintenance::{Ended, Limits};
use postgres::locks::{Class, ClusterLock};
use postgres::{Purpose, Session, connect, connect_maintenance};
use proto::{Action, Code, DatabaseName, Failure, Progress};

use super::session_owner;
use crate::context::JobContext;
use crate::places::{Cluster, Places};

/// A cluster under the lock of maintenance.
pub(super) struct Maintained<'a> {
    cx: &'a JobContext,
    cluster: &'a Cluster,
    lock: ClusterLock,
    /// The databases to visit, in order.
    pub(super) databases: Vec<DatabaseName>,
    /// How long one table may wait and take.
    pub(super) limits: Limits,
}

impl<'a> Maintained<'a> {
    /// Connects, makes sure that it is the right server, takes the lock and lists the databases.
    pub(super) async fn open(
        cx: &'a JobContext,
        places: &'a Places,
        wanted: Option<&Vec<DatabaseName>>,
        lock_timeout_ms: u32,
    ) -> Result<Self, Failure> {
        let cluster = places.cluster(&cx.spec.cluster)?;
        let purpose = Purpose::ask(&session_owner(cx.spec.attempt));
        let session = connect_maintenance(&cluster.target, &purpose).await?;
        let found = session.identity().await?.system_identifier;
        if let Some(expected) = cx.spec.system_identifier
            && expected != found
        {
            let message = format!(
                "the server at {} has system identifier {found}, the job is for {expected}",
                cluster.config.name
            );
            return Err(Failure::new(Code::SystemIdentifierMismatch, Action::FixConfig, message)
                .with_hint("Point the cluster's connection at the right server."));
        }
        let existing = maintenance::databases(&session).await?;
        let databases = match wanted {
            None => existing,
            Some(wanted) => {
                if let Some(missing) = wanted.iter().find(|name| !existing.contains(name)) {
                    let message =
                        format!("{} has no database {:?}", cx.spec.cluster, missing.as_str());
                    return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message)
                        .with_hint(
                            "Names are those of pg_database, upper and lower case as there.",
                        ));
                }
                wanted.clone()
            }
        };
        let lock = ClusterLock::try_take(session, Class::Maintenance).await?;
        let limits = Limits {
            lock_timeout: Duration::from_millis(lock_timeout_ms.into()),
            deadline: Some(
                tokio::time::Instant::now() + Duration::from_millis(cx.spec.deadline_ms),
            ),
            ..Limits::default()
        };
        Ok(Self { cx, cluster, lock, databases, limits })
    }

    /// A session in one of the databases, after making sure that nobody else maintains this cluster now.
    pub(super) async fn enter(&self, database: &DatabaseName) -> Result<Session, Failure> {
        self.cx.check()?;
        if !self.lock.still_held().await? {
            return Err(Failure::new(
                Code::ClusterBusy,
                Action::Retry,
                "the session that held the cluster's lock is gone",
            )
            .with_hint("Look in the server's log for the reason."));
        }
        let target = self.cluster.target.with_database(database.as_str());
        let owner = session_owner(self.cx.spec.attempt);
        let purpose = Purpose::work(&owner, self.limits.table_timeout, self.limits.lock_timeout);
        Ok(connect(&target, &purpose).await?)
    }

    /// Says how far the work in a database is.
    pub(super) fn progress(&self, step: &str, done: usize, total: usize) {
        self.cx.progress(Progress {
            step: step.to_owned(),
            done: done as u64,
            total: Some(total as u64),
            unit: "tables".to_owned(),
        });
    }

    /// Turns an early end into the job's failure.
    pub(super) fn ended(&self, ended: Ended) -> Result<(), Failure> {
        match ended {
            Ended::Complete => Ok(()),
            Ended::Cancelled => Err(self.cx.stopped()),
            Ended::Deadline => Err(Failure::new(
                Code::DeadlineExceeded,
                Action::Retry,
                "the job's deadline passed before every table was done",
            )
            .with_hint("What was done stays done; the rest is done the next time.")),
        }
    }

    /// Gives the lock back.
    pub(super) async fn close(self) {
        self.lock.release().await;
    }
}
