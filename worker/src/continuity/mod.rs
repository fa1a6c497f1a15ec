//! Whether the log of a cluster arrives in its archive, by position: where the server is, against what the archive has.
//!
//! An `archive_command` that says yes and stores nothing, a segment that was deleted, an archive that fell behind: each shows
//! itself here, whatever the server believes. Clusters that archive nothing into their repository are left alone.

mod commits;
mod line;
mod tail;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use postgres::{Purpose, connect_maintenance};
use proto::message::WalStanding;
use proto::{ClusterName, Failure, JobId, LineageId, SystemIdentifier, Timeline};
use repository::Repository;

use self::commits::Commits;
use self::line::Line;
use crate::clock;
use crate::places::Cluster;
use crate::shared::Shared;

/// How often a server is asked where it is: so fine is what is known of the last transaction that is safe.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The same for one of which there is nothing to say.
const LOOK_SELDOM: Duration = Duration::from_secs(30);
/// One look may take this long; a hung server or store delays the next one and nothing else.
const LOOK_MAX: Duration = Duration::from_secs(30);
/// How often a standing is told when nothing about it is new.
const TELL_EVERY_MS: i64 = 15_000;

/// How the archives stand, as they were seen last.
#[derive(Debug, Default)]
pub(crate) struct Standings(Mutex<BTreeMap<ClusterName, Told>>);

#[derive(Debug)]
struct Told {
    standing: WalStanding,
    /// When it was told last; zero when it is due.
    told_at_ms: i64,
}

impl Standings {
    /// Notes a standing; `true` when something about it is new that people should know at once.
    fn note(&self, standing: WalStanding) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.get(&standing.cluster);
        let key = |standing: &WalStanding| {
            let waits = standing.waiting.map(|waiting| waiting.segment);
            let line = (standing.line_from, standing.archived_to);
            (standing.lineage, standing.timeline, line, standing.gap, waits)
        };
        let is_news = before.is_none_or(|told| key(&told.standing) != key(&standing));
        let told_at_ms = if is_news { 0 } else { before.map_or(0, |told| told.told_at_ms) };
        all.insert(standing.cluster.clone(), Told { standing, told_at_ms });
        is_news
    }

    /// Those that are due, or all of them. They count as told.
    pub(crate) fn due(&self, all_of_them: bool) -> Vec<WalStanding> {
        let now_ms = clock::now_ms();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = all
            .values_mut()
            .filter(|told| all_of_them || now_ms.saturating_sub(told.told_at_ms) >= TELL_EVERY_MS);
        due.map(|told| {
            told.told_at_ms = now_ms;
            told.standing.clone()
        })
        .collect()
    }

    /// What was told did not get through.
    pub(crate) fn not_told(&self, standings: &[WalStanding]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
    if shared.places.place_for(&cluster.config.name).is_err() {
        return;
    }
    let mut watcher = Watcher { cluster, lineage: None, line: None, commits: Commits::default() };
    let mut is_failing = false;
    loop {
        let looked = tokio::time::timeout(LOOK_MAX, watcher.look(shared)).await;
        let mut pause = LOOK_EVERY;
        let failed = matches!(looked, Ok(Err(_)));
        match looked {
            Ok(Ok(Some(standing))) => {
                if shared.standings.note(standing) {
                    shared.pulse_now.notify_one();
                }
            }
            Ok(Ok(None)) => pause = LOOK_SELDOM,
            // A server that is away is told by the offers, a store that is away by what needs it.
            Ok(Err(failure)) if !is_failing => {
                tracing::info!(cluster = %cluster.config.name, "The archive of WAL cannot be looked at: {failure}");
            }
            Ok(Err(_)) | Err(_) => {}
        }
        is_failing = failed;
        tokio::time::sleep(pause).await;
    }
}

struct Watcher<'a> {
    cluster: &'a Cluster,
    lineage: Option<(SystemIdentifier, LineageId)>,
    line: Option<Line>,
    commits: Commits,
}

impl Watcher<'_> {
    /// `None` when there is nothing to say: a standby, a cluster that archives nowhere, or not here.
    async fn look(&mut self, shared: &Shared) -> Result<Option<WalStanding>, Failure> {
        let name = &self.cluster.config.name;
        let purpose = Purpose::ask(&JobId(shared.boot.0));
        let session = connect_maintenance(&self.cluster.target, &purpose).await?;
        let now_ms = clock::now_ms();
        let position = session.wal_position().await?.filter(|position| position.archives);
        let Some(position) = position else {
            self.line = None;
            return Ok(None);
        };
        let identity = session.identity().await?;
        let server = identity.system_identifier;
        session.close().await;
        if self.line.as_ref().is_some_and(|line| !line.is_of(position.timeline))
            || self.lineage.is_some_and(|(known, _)| known != server)
        {
            (self.line, self.lineage) = (None, None);
            self.commits.forget();
        }
        let repository = shared.places.place_for(name)?.kept().await?;
        if self.line.is_none() {
            self.survey(repository, server, position.timeline, now_ms).await?;
        }
        let (Some(line), Some((_, lineage))) = (&mut self.line, self.lineage) else {
            return Ok(None);
        };
        line.go_on(repository, &position, now_ms).await?;
        let is_idle = tail::is_idle(self.cluster, identity, line, position.lsn).await;
        let behind = if is_idle { line.to } else { position.lsn };
        self.commits.note(now_ms, &position.snapshot, behind);
        Ok(Some(WalStanding {
            cluster: name.clone(),
            lineage,
            at_ms: now_ms,
            timeline: position.timeline,
            ancestors: line.ancestors.clone(),
            server_lsn: position.lsn,
            line_from: line.from,
            archived_to: line.to,
            safe_at_ms: self.commits.safe_at(line.to),
            waiting: line.waiting(&position),
            gap: line.missing.map(|segment| segment.name(line.segment_size)),
        }))
    }

    async fn survey(
        &mut self,
        repository: &Repository,
        server: SystemIdentifier,
        timeline: Timeline,
        now_ms: i64,
    ) -> Result<(), Failure> {
        if self.lineage.is_none() {
            let name = &self.cluster.config.name;
            let lineages = repository.list_lineages().await?;
            let of_server = lineages.into_iter().find(|identity| {
                identity.cluster == *name
                    && identity.system_identifier == server
                    && identity.kind.is_physical()
            });
            self.lineage = of_server.map(|identity| (server, identity.lineage));
        }
        if let Some((_, lineage)) = self.lineage {
            self.line = Line::survey(repository, lineage, timeline, now_ms).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proto::Lsn;
    use proto::message::WalWaiting;

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
    }
}
