//! Heartbeats: in each cluster whose configuration asks for it, a commit from time to time of which the coordinator is told, so
//! that proofs know what a restored server must have.
//!
//! Nothing waits for a heartbeat and nothing fails for want of one: why the last one was not made is told with the worker's
//! offers, and the next one is tried in its time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use postgres::heartbeat::Beat;
use postgres::{Purpose, connect_maintenance};
use proto::{Action, ClusterHeartbeat, ClusterName, Code, Failure, Heartbeat, JobId};

use crate::places::Cluster;
use crate::shared::Shared;

/// One heartbeat may take this long, from the connection to the commit.
const BEAT_MAX: Duration = Duration::from_secs(10);
/// Limit of one of its statements, and of waiting for a lock, of which it takes none.
const STATEMENT_MAX: Duration = Duration::from_secs(5);
/// While a server does not answer, the pause grows up to this, or stays what it is where that is longer: one that hangs is left
/// alone.
const PAUSE_MAX: Duration = Duration::from_mins(10);
/// Heartbeats that wait to be told, of all clusters. Beyond that the oldest are forgotten: whoever tells late tells less.
const UNTOLD_MAX: usize = 1_024;

/// What was made and not told yet, and what went wrong.
#[derive(Debug, Default)]
pub(crate) struct Heartbeats {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Oldest first.
    untold: VecDeque<ClusterHeartbeat>,
    problems: BTreeMap<ClusterName, Failure>,
}

impl Heartbeats {
    /// Those that were not told yet. They count as told.
    pub(crate) fn untold(&self) -> Vec<ClusterHeartbeat> {
        self.state().untold.drain(..).collect()
    }

    /// What was told did not get through.
    pub(crate) fn not_told(&self, heartbeats: Vec<ClusterHeartbeat>) {
        let mut state = self.state();
        let since = std::mem::take(&mut state.untold);
        state.untold = heartbeats.into_iter().chain(since).collect();
        state.bound();
    }

    /// Why the last one of a cluster was not made, if it was not.
    pub(crate) fn problem(&self, cluster: &ClusterName) -> Option<Failure> {
        self.state().problems.get(cluster).cloned()
    }

    fn made(&self, cluster: &ClusterName, heartbeat: Heartbeat) {
        let mut state = self.state();
        state.untold.push_back(ClusterHeartbeat { cluster: cluster.clone(), heartbeat });
        state.bound();
    }

    /// Notes how the last one went; `true` when that is news.
    fn went(&self, cluster: &ClusterName, problem: Option<Failure>) -> bool {
        let problems = &mut self.state().problems;
        let before = match &problem {
            Some(problem) => problems.insert(cluster.clone(), problem.clone()),
            None => problems.remove(cluster),
        };
        before.map(|before| before.code) != problem.map(|problem| problem.code)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn bound(&mut self) {
        let forgotten = self.untold.len().saturating_sub(UNTOLD_MAX);
        self.untold.drain(..forgotten);
    }
}

/// Makes them, for ever, in every cluster whose configuration asks for it.
pub(crate) async fn beat(shared: Arc<Shared>) {
    let clusters = shared.places.clusters().filter_map(|cluster| {
        let every = Duration::from_secs(cluster.config.heartbeat_s?.into());
        Some(beat_one(&shared, cluster, every))
    });
    join_all(clusters).await;
}

async fn beat_one(shared: &Shared, cluster: &Cluster, every: Duration) {
    let name = &cluster.config.name;
    let mut pause = every;
    loop {
        let made = tokio::time::timeout(BEAT_MAX, once(shared, cluster)).await;
        let made = made.unwrap_or_else(|_| {
            let what = format!("a heartbeat of {name} takes more than {} s", BEAT_MAX.as_secs());
            Err(Failure::new(Code::ServerUnreachable, Action::Retry, what))
        });
        let problem = match made {
            Ok(made) => {
                if let Some(heartbeat) = made {
                    shared.heartbeats.made(name, heartbeat);
                }
                pause = every;
                None
            }
            Err(failure) => {
                let answered = failure.code == Code::ServerSetting;
                pause = if answered { every } else { longer(pause, every) };
                Some(failure)
            }
        };
        if shared.heartbeats.went(name, problem.clone()) {
            if let Some(failure) = problem {
                tracing::warn!(cluster = %name, "No heartbeat is made: {failure}");
            } else {
                tracing::info!(cluster = %name, "Heartbeats are made again");
            }
        }
        tokio::time::sleep(pause).await;
    }
}

/// The pause after one more failure.
fn longer(pause: Duration, every: Duration) -> Duration {
    (pause + every).min(PAUSE_MAX.max(every))
}

/// `None` where there is nothing to do: at a standby, and where nothing is archived.
async fn once(shared: &Shared, cluster: &Cluster) -> Result<Option<Heartbeat>, Failure> {
    let purpose = Purpose::work(&JobId(shared.boot.0), STATEMENT_MAX, STATEMENT_MAX);
    let session = connect_maintenance(&cluster.target, &purpose).await?;
    let beat = session.beat().await?;
    session.close().await;
    match beat {
        Beat::Made(heartbeat) => Ok(Some(heartbeat)),
        Beat::NotHere => Ok(None),
        Beat::NeverArchived => {
            let name = &cluster.config.name;
            let what = format!(
                "archive_timeout of {name} is 0, so that its heartbeats would come into the archive only with a full segment"
            );
            Err(Failure::new(Code::ServerSetting, Action::FixConfig, what).with_hint(
                "Set archive_timeout to what may be lost of an idle server's last work, 60s to 600s; pgmuster cluster enable-wal does.",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::{Lsn, SystemIdentifier, Timeline};

    use super::*;

    fn heartbeat(transaction: u64) -> Heartbeat {
        Heartbeat {
            system_identifier: SystemIdentifier(1),
            timeline: Timeline(1),
            transaction,
            begun_lsn: Lsn(transaction),
            ended_lsn: Lsn(transaction),
            begun_at_ms: 1,
            ended_at_ms: 1,
        }
    }

    #[test]
    fn what_was_not_told_is_told_later_in_its_order_and_within_bounds() {
        let (heartbeats, orders) = (Heartbeats::default(), "orders".parse().unwrap());
        let told = || -> Vec<u64> {
            heartbeats.untold().iter().map(|one| one.heartbeat.transaction).collect()
        };
        heartbeats.made(&orders, heartbeat(1));
        heartbeats.made(&orders, heartbeat(2));
        let lost = heartbeats.untold();
        assert!(heartbeats.untold().is_empty());
        heartbeats.made(&orders, heartbeat(3));
        heartbeats.not_told(lost);
        assert_eq!(told(), [1, 2, 3]);
        (1..=2_000).for_each(|n| heartbeats.made(&orders, heartbeat(n)));
        let told = told();
        assert_eq!((told.len(), told[0], told[1_023]), (1_024, 977, 2_000));
    }

    #[test]
    fn a_server_that_does_not_answer_is_asked_less_often_and_yet_again() {
        let after = |failures: usize, every_s| {
            let every = Duration::from_secs(every_s);
            (0..failures).fold(every, |pause, _| longer(pause, every)).as_secs()
        };
        assert_eq!([after(0, 60), after(1, 60), after(9, 60)], [60, 120, 600]);
        assert_eq!([after(1_000, 60), after(3, 3_600)], [600, 3_600]);
    }

    #[test]
    fn a_failure_is_news_once_and_so_is_its_end() {
        let (heartbeats, orders) = (Heartbeats::default(), "orders".parse().unwrap());
        let failure = |code| Some(Failure::new(code, Action::Retry, "it is down"));
        assert!(!heartbeats.went(&orders, None));
        assert!(heartbeats.went(&orders, failure(Code::ServerUnreachable)));
        assert!(!heartbeats.went(&orders, failure(Code::ServerUnreachable)));
        assert!(heartbeats.went(&orders, failure(Code::ServerSetting)));
        assert_eq!(heartbeats.problem(&orders).unwrap().code, Code::ServerSetting);
        assert!(heartbeats.went(&orders, None));
        assert_eq!(heartbeats.problem(&orders), None);
    }
}
