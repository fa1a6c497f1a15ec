//! Whether the log of a cluster arrives in its archive, by position: where the server is, against what the archive has.
//!
//! An `archive_command` that says yes and stores nothing, a segment that was deleted, an archive that fell behind: each shows
//! itself here, whatever the server believes. Clusters that archive nothing into their repository are left alone.

mod commits;
mod follow;
mod line;
mod owner;
mod passed;
mod survey;
mod tail;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use postgres::{Purpose, connect_maintenance};
use proto::message::WalStanding;
use proto::{Action, ClusterName, Code, Failure, JobId};
use repository::Repository;
use tokio::sync::Semaphore;

use self::follow::{Follower, Looked, Server};
use self::line::Line;
use crate::clock;
use crate::context::blocking;
use crate::engines::native;
use crate::places::{Cluster, RepositoryPlace};
use crate::shared::Shared;

/// How often a server is asked where it is: so fine is what is known of the last transaction that is safe.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The same for one of which there is nothing to say.
const LOOK_SELDOM: Duration = Duration::from_secs(30);
/// One look may take this long; a hung server or store delays the next one and nothing else.
const LOOK_MAX: Duration = Duration::from_secs(30);
/// How often a standing is told when nothing about it is new.
const TELL_EVERY_MS: i64 = 15_000;
/// The same while a full segment is missing, for which patience ends soon.
const TELL_MISSING_EVERY_MS: i64 = 5_000;
/// Archives that are listed as a whole at the same time: a list of years takes its room in memory.
const SURVEYS_MAX: usize = 4;

/// How the archives stand, as they were seen last.
#[derive(Debug)]
pub(crate) struct Standings {
    told: Mutex<BTreeMap<ClusterName, Told>>,
    /// Who may list a whole archive.
    surveys: Arc<Semaphore>,
}

#[derive(Debug)]
struct Told {
    standing: WalStanding,
    /// When it was told last; zero when it is due.
    told_at_ms: i64,
}

impl Told {
    fn every_ms(&self) -> i64 {
        if self.standing.waiting.is_some() { TELL_MISSING_EVERY_MS } else { TELL_EVERY_MS }
    }
}

impl Default for Standings {
    fn default() -> Self {
        Self { told: Mutex::default(), surveys: Arc::new(Semaphore::new(SURVEYS_MAX)) }
    }
}

impl Standings {
    /// Notes a standing; `true` when something about it is new that people should know at once.
    fn note(&self, standing: WalStanding) -> bool {
        let mut all = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.get(&standing.cluster);
        let key = |standing: &WalStanding| {
            let waits = standing.waiting.map(|waiting| waiting.segment);
            let line = (standing.line_from, standing.archived_to, standing.conflict);
            (standing.lineage, standing.timeline, line, standing.gap, waits)
        };
        let is_news = before.is_none_or(|told| key(&told.standing) != key(&standing));
        let told_at_ms = if is_news { 0 } else { before.map_or(0, |told| told.told_at_ms) };
        all.insert(standing.cluster.clone(), Told { standing, told_at_ms });
        is_news
    }

    /// There is nothing to say any more.
    fn forget(&self, cluster: &ClusterName) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).remove(cluster);
    }

    /// Those that are due, or all of them. They count as told.
    pub(crate) fn due(&self, all_of_them: bool) -> Vec<WalStanding> {
        let now_ms = clock::now_ms();
        let mut all = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let due = all.values_mut().filter(|told| {
            all_of_them || now_ms.saturating_sub(told.told_at_ms) >= told.every_ms()
        });
        due.map(|told| {
            told.told_at_ms = now_ms;
            told.standing.clone()
        })
        .collect()
    }

    /// What was told did not get through.
    pub(crate) fn not_told(&self, standings: &[WalStanding]) {
        let mut all = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        for standing in standings {
            if let Some(told) = all.get_mut(&standing.cluster) {
                told.told_at_ms = 0;
            }
        }
    }
}

/// Looks at every cluster that this worker serves, for ever.
pub(crate) async fn watch(shared: Arc<Shared>) {
    let clusters = shared.places.clusters().map(|cluster| watch_one(&shared, cluster));
    join_all(clusters).await;
}

async fn watch_one(shared: &Shared, cluster: &Cluster) {
    let name = &cluster.config.name;
    let Ok(place) = shared.places.place_for(name) else { return };
    let mut watcher = Watcher { cluster, place, follower: Follower::new(name.clone()) };
    let mut is_failing = false;
    loop {
        let looked = tokio::time::timeout(LOOK_MAX, watcher.look(shared)).await;
        let looked = looked.unwrap_or_else(|_| {
            let message = format!("one look takes more than {} s", LOOK_MAX.as_secs());
            Err(Failure::new(Code::DeadlineExceeded, Action::Retry, message))
        });
        if !matches!(looked, Ok(Looked::Standing(_))) {
            // What nobody sees any more is not told again: that it is old tells itself.
            shared.standings.forget(name);
        }
        let failed = looked.is_err();
        let pause = match looked {
            Ok(Looked::Standing(standing)) => {
                if shared.standings.note(*standing) {
                    shared.pulse_now.notify_one();
                }
                LOOK_EVERY
            }
            Ok(Looked::Later) => LOOK_EVERY,
            Err(failure) if !is_failing => {
                tracing::warn!(cluster = %name, "The archive of WAL cannot be looked at: {failure}");
                LOOK_EVERY
            }
            Ok(Looked::Nothing) | Err(_) => LOOK_SELDOM,
        };
        if is_failing && !failed {
            tracing::info!(cluster = %name, "The archive of WAL can be looked at again");
        }
        is_failing = failed;
        tokio::time::sleep(pause).await;
    }
}

struct Watcher<'a> {
    cluster: &'a Cluster,
    place: &'a RepositoryPlace,
    follower: Follower,
}

impl Watcher<'_> {
    async fn look(&mut self, shared: &Shared) -> Result<Looked, Failure> {
        if self.follower.follows() {
            let repository = self.place.kept().await?;
            let prepared = self.follower.prepare(&repository, clock::Seen::now()).await;
            self.or_let_go(&repository, prepared).await?;
        }
        let Some(server) = self.ask(shared).await? else {
            if self.follower.follows() {
                let name = &self.cluster.config.name;
                tracing::info!(cluster = %name, "The server is a standby now, or archives nothing any more");
            }
            self.follower.forget();
            return Ok(Looked::Nothing);
        };
        let repository = self.place.kept().await?;
        let (until, pg_wal, major) = (server.position.lsn, server.pg_wal.clone(), server.major);
        let is_idle = async |line: &Line| tail::is_idle(pg_wal, major, line, until).await;
        let few = &shared.standings.surveys;
        let looked = self.follower.follow(&repository, few, &server, is_idle).await;
        self.or_let_go(&repository, looked).await
    }

    /// The server. `None` when there is nothing to follow: a standby, or a server that archives nothing.
    async fn ask(&self, shared: &Shared) -> Result<Option<Server>, Failure> {
        let purpose = Purpose::ask(&JobId(shared.boot.0));
        let session = connect_maintenance(&self.cluster.target, &purpose).await?;
        let seen = clock::Seen::now();
        let position = session.wal_position().await?.filter(|position| position.archives);
        let Some(position) = position else { return Ok(None) };
        let identity = session.identity().await?;
        session.close().await;
        let (system_identifier, major) = (identity.system_identifier, identity.version.major());
        let config = self.cluster.config.clone();
        let directory = blocking(move || Ok(native::live_directory(&config, &identity))).await?;
        // Without its files, its word has to do.
        let pg_wal = directory.map(|directory| directory.join("pg_wal"));
        Ok(Some(Server { seen, system_identifier, major, position, pg_wal }))
    }

    /// After an error the repository is opened anew: the one at this place may be another by now.
    async fn or_let_go<T>(
        &self,
        repository: &Arc<Repository>,
        result: Result<T, Failure>,
    ) -> Result<T, Failure> {
        if result.is_err() {
            self.place.let_go(repository).await;
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use proto::message::WalWaiting;
    use proto::{LineageId, Lsn, Timeline};

    use super::*;

    fn standing(archived_to: u64, waits: bool) -> WalStanding {
        WalStanding {
            cluster: "orders".parse().unwrap(),
            lineage: LineageId::mint(1, [1; 10]),
            at_ms: 1,
            timeline: Timeline(1),
            ancestors: Vec::new(),
            server_lsn: Lsn(9),
            line_from: Lsn(1),
            archived_to: Lsn(archived_to),
            safe_at_ms: None,
            waiting: waits.then(|| WalWaiting {
                segment: "000000010000000000000002".parse().unwrap(),
                since_ms: 1,
                segments: 1,
            }),
            gap: None,
            gaps: Vec::new(),
            conflict: None,
        }
    }

    #[test]
    fn news_is_told_at_once_and_the_rest_from_time_to_time() {
        let standings = Standings::default();
        assert!(standings.note(standing(1, false)));
        assert_eq!(standings.due(false).len(), 1);
        assert!(!standings.note(standing(1, false)), "nothing is new");
        assert!(standings.due(false).is_empty());
        assert_eq!(standings.due(true)[0].archived_to, Lsn(1));
        assert!(standings.note(standing(2, false)), "a segment arrived");
        assert!(standings.note(standing(2, true)));
        let told = standings.due(false);
        assert_eq!(told.len(), 1);
        assert!(standings.due(false).is_empty());
        standings.not_told(&told);
        assert_eq!(standings.due(false).len(), 1);
        let every_ms = |waits| Told { standing: standing(2, waits), told_at_ms: 0 }.every_ms();
        assert!(every_ms(true) < every_ms(false), "what is missing is told with each look");
        standings.forget(&"orders".parse().unwrap());
        assert!(standings.due(true).is_empty(), "what is not seen any more is not told again");
    }
}
