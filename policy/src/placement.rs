//! Where a job may go: to the queue of a site, to the queue of one worker, or nowhere, and then why.
//!
//! Decides from what workers announced and nothing else. How many tickets a queue may hold is [`window`].

use std::collections::BTreeSet;

use proto::job::{JobKind, Lane, Placement};
use proto::message::Slots;
use proto::topology::TicketQueue;
use proto::{ClusterName, SiteName, WorkerName};

use crate::words::list;

/// Work that excludes each other on one cluster: at most one job of a class runs there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Backups.
    Protect,
    /// Proofs.
    Prove,
    /// Restores.
    Restore,
    /// Changes inside the databases.
    Maintain,
    /// Looking for evidence.
    Probe,
}

impl Class {
    /// The class as text, as it stands in the catalog.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Protect => "protect",
            Self::Prove => "prove",
            Self::Restore => "restore",
            Self::Maintain => "maintain",
            Self::Probe => "probe",
        }
    }
}

/// The class of a kind of job.
pub fn class_of(kind: JobKind) -> Class {
    match kind {
        JobKind::Backup => Class::Protect,
        JobKind::VerifyRestore => Class::Prove,
        JobKind::Restore => Class::Restore,
        JobKind::Analyze | JobKind::Vacuum | JobKind::EnableWal => Class::Maintain,
        JobKind::Probe => Class::Probe,
    }
}

/// What a job needs.
#[derive(Debug, Clone)]
pub struct Need<'a> {
    /// The kind of work.
    pub kind: JobKind,
    /// Which lane it goes through.
    pub lane: Lane,
    /// For whom.
    pub cluster: &'a ClusterName,
    /// The site the cluster was last announced from.
    pub home: Option<&'a SiteName>,
    /// The repository of the cluster, by the name its workers use.
    pub repository: Option<&'a str>,
    /// Whether the cluster's files have to be read: a logical backup needs none.
    pub files: bool,
    /// Whether what a worker's configuration asserts of the cluster is asked for.
    pub assertions: bool,
    /// The restore roots that are asked for.
    pub restore_roots: BTreeSet<&'a str>,
    /// The only worker that will do, when somebody asked for one.
    pub only: Option<&'a WorkerName>,
    /// A worker to be avoided while there is another one.
    pub rather_not: Option<&'a WorkerName>,
    /// Workers that refused this job.
    pub refused: &'a BTreeSet<WorkerName>,
}

/// A worker as it announced itself.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Its name.
    pub worker: WorkerName,
    /// Its site.
    pub site: SiteName,
    /// Whether its pulses come.
    pub alive: bool,
    /// Whether it takes no new work.
    pub draining: bool,
    /// Its free slots.
    pub slots: Slots,
    /// Kinds of jobs it understands and is allowed.
    pub kinds: Vec<JobKind>,
    /// The clusters it serves, and whether it can do anything for each now.
    pub clusters: Vec<Served>,
    /// The repositories it can open.
    pub repositories: Vec<String>,
    /// Directories below which it may restore.
    pub restore_roots: Vec<String>,
}

/// One cluster of a worker.
#[derive(Debug, Clone)]
pub struct Served {
    /// The cluster.
    pub cluster: ClusterName,
    /// Whether the worker can read its files.
    pub files: bool,
    /// Whether it reads them over connections to the server.
    pub remote: bool,
    /// Whether its configuration asserts something of the cluster's content.
    pub assertions: bool,
    /// Why it can do nothing for it, as it found when it looked last: code and message of the failure.
    pub problem: Option<String>,
}

impl Candidate {
    fn serves(&self, cluster: &ClusterName) -> bool {
        self.clusters.iter().any(|served| served.cluster == *cluster)
    }

    fn reads_files_of(&self, cluster: &ClusterName) -> bool {
        self.clusters.iter().any(|served| served.cluster == *cluster && served.files)
    }

    fn reads_remotely(&self, cluster: &ClusterName) -> bool {
        self.clusters.iter().any(|served| served.cluster == *cluster && served.remote)
    }

    fn has_assertions_of(&self, cluster: &ClusterName) -> bool {
        self.clusters.iter().any(|served| served.cluster == *cluster && served.assertions)
    }

    fn reaches(&self, need: &Need<'_>) -> bool {
        let repository =
            need.repository.is_some_and(|name| self.repositories.iter().any(|r| r == name));
        match need.kind.placement() {
            Placement::Cluster => self.serves(need.cluster),
            Placement::Site if need.kind == JobKind::Probe => {
                repository || self.serves(need.cluster)
            }
            Placement::Site => repository,
        }
    }

    fn has_roots(&self, need: &Need<'_>) -> bool {
        need.restore_roots.iter().all(|root| self.restore_roots.iter().any(|r| r == root))
    }

    /// How many more jobs of this lane it could start now.
    pub fn free(&self, lane: Lane) -> u32 {
        match lane {
            Lane::Urgent => self.slots.urgent_free.saturating_add(self.slots.routine_free),
            Lane::Routine => self.slots.routine_free,
        }
    }
}

/// Where a job goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placed {
    /// Into this queue.
    Queue {
        /// The queue.
        queue: TicketQueue,
        /// Free slots behind it, for the window.
        free: u32,
        /// Why there, for people.
        reason: String,
    },
    /// Nobody can do it.
    Nobody {
        /// Why, for people.
        reason: String,
    },
}

/// A condition, and the sentence that is true when nobody is left after it.
type Condition<'c> = (Box<dyn Fn(&Candidate) -> bool + 'c>, String);

/// Chooses the queue of a job.
///
/// A job that needs a cluster's files or socket goes to one worker that announced the cluster, the one with the most
/// room. Any other goes to its site's queue if every live worker there could do it, else to one that can: a ticket
/// that the wrong worker picks up costs a round trip.
pub fn place(need: &Need<'_>, workers: &[Candidate]) -> Placed {
    let mut left: Vec<&Candidate> = workers.iter().collect();
    let cluster = need.cluster;
    let where_ = place_of(need, workers);
    let what_is_missing = match (need.kind.placement(), need.repository) {
        (Placement::Cluster, _) => format!("no worker {where_} serves {cluster}"),
        (Placement::Site, Some(repository)) => {
            format!("no worker can open repository {repository} of {cluster}")
        }
        (Placement::Site, None) => format!("no worker has announced a repository for {cluster}"),
    };
    // Where nobody has any, whoever gets the job says so and what to do.
    let asserted = need.assertions && workers.iter().any(|w| w.has_assertions_of(cluster));
    let roots: Vec<&str> = need.restore_roots.iter().copied().collect();
    let conditions: [Condition<'_>; 8] = [
        (
            Box::new(|w| need.only.is_none_or(|only| w.worker == *only)),
            need.only.map_or_else(
                || "no worker has announced itself".to_owned(),
                |only| format!("worker {only} has not announced itself"),
            ),
        ),
        (Box::new(|w| w.reaches(need)), what_is_missing),
        (Box::new(|w| !need.files || w.reads_files_of(cluster)), unread(need, workers)),
        (
            Box::new(|w| !asserted || w.has_assertions_of(cluster)),
            format!("no worker that could do it has the assertions of {cluster}"),
        ),
        (
            Box::new(|w| w.has_roots(need)),
            format!("no worker may restore below {}", list(&roots, 3)),
        ),
        (
            Box::new(|w| w.kinds.contains(&need.kind)),
            format!("no worker that serves {cluster} is allowed to do {}", need.kind),
        ),
        (Box::new(|w| w.alive), "is silent".to_owned()),
        (Box::new(|w| !w.draining), "is shutting down".to_owned()),
    ];
    for (condition, nobody) in conditions {
        let rest: Vec<&Candidate> = left.iter().copied().filter(|w| condition(w)).collect();
        if rest.is_empty() {
            let reason = if nobody.starts_with("is ") {
                let names: Vec<&str> = left.iter().map(|w| w.worker.as_str()).collect();
                let verb = if names.len() == 1 { nobody } else { nobody.replacen("is", "are", 1) };
                let noun = if names.len() == 1 { "worker" } else { "workers" };
                format!("{noun} {} {verb}", list(&names, 3))
            } else {
                nobody
            };
            return Placed::Nobody { reason };
        }
        left = rest;
    }
    let willing: Vec<&Candidate> =
        left.iter().copied().filter(|w| !need.refused.contains(&w.worker)).collect();
    if willing.is_empty() {
        let names: Vec<&str> = left.iter().map(|w| w.worker.as_str()).collect();
        return Placed::Nobody { reason: format!("refused by {}", list(&names, 3)) };
    }
    choose(need, &willing, workers)
}

/// Why nobody can read a cluster's files: in the words of a worker that tried, where one did.
fn unread(need: &Need<'_>, workers: &[Candidate]) -> String {
    let cluster = need.cluster;
    let asked = workers.iter().filter(|w| need.only.is_none_or(|only| w.worker == *only));
    let told = asked.flat_map(|w| w.clusters.iter().map(move |served| (&w.worker, served)));
    let mut problems = told
        .filter(|(_, served)| served.cluster == *cluster)
        .filter_map(|(worker, served)| Some((worker, served.problem.as_deref()?)));
    match problems.next() {
        Some((worker, problem)) => format!("worker {worker} cannot use {cluster}: {problem}"),
        None => format!("no worker can read the data directory of {cluster}"),
    }
}

fn place_of(need: &Need<'_>, workers: &[Candidate]) -> String {
    let sites: BTreeSet<&str> = workers.iter().map(|w| w.site.as_str()).collect();
    match (need.home, sites.iter().next()) {
        (Some(home), _) => format!("of site {home}"),
        (None, Some(site)) if sites.len() == 1 => format!("of site {site}"),
        _ => "of any site".to_owned(),
    }
}

fn choose(need: &Need<'_>, willing: &[&Candidate], workers: &[Candidate]) -> Placed {
    let others: Vec<&Candidate> = willing
        .iter()
        .copied()
        .filter(|w| need.rather_not.is_none_or(|name| w.worker != *name))
        .collect();
    let preferred = if others.is_empty() { willing } else { &others };
    let near: Vec<&Candidate> = preferred
        .iter()
        .copied()
        .filter(|w| need.home.is_some_and(|home| w.site == *home))
        .collect();
    let preferred = if near.is_empty() { preferred } else { &near };
    // Whoever reads files itself, before whoever lets the server read them and sends them over the network.
    let beside: Vec<&Candidate> = preferred
        .iter()
        .copied()
        .filter(|w| !need.files || !w.reads_remotely(need.cluster))
        .collect();
    let preferred = if beside.is_empty() { preferred } else { &beside };
    // Most room first; the name breaks ties, so that the same facts give the same answer.
    let Some(best) = preferred.iter().copied().max_by(|a, b| {
        a.free(need.lane).cmp(&b.free(need.lane)).then_with(|| b.worker.cmp(&a.worker))
    }) else {
        return Placed::Nobody { reason: "no worker has announced itself".to_owned() };
    };
    let site_mates = || workers.iter().filter(|w| w.site == best.site && w.alive && !w.draining);
    let everybody = site_mates().all(|mate| preferred.iter().any(|w| w.worker == mate.worker));
    if need.kind.placement() == Placement::Site && need.only.is_none() && everybody {
        return Placed::Queue {
            queue: TicketQueue::Site(best.site.clone(), need.lane),
            free: site_mates().map(|w| w.free(need.lane)).fold(0, u32::saturating_add),
            reason: format!("any worker of site {} can do it", best.site),
        };
    }
    Placed::Queue {
        queue: TicketQueue::Worker(best.worker.clone(), need.lane),
        free: best.free(need.lane),
        reason: format!("worker {} of site {} can do it", best.worker, best.site),
    }
}

/// How many more tickets may go into a queue with this many free slots behind it and this many tickets already in it.
///
/// No ticket goes ahead of a free slot: a worker without one gives it back at once, and would do so for ever.
pub fn window(free: u32, outstanding: u32) -> u32 {
    free.saturating_sub(outstanding)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn worker(name: &str, site: &str) -> Candidate {
        Candidate {
            worker: name.parse().unwrap(),
            site: site.parse().unwrap(),
            alive: true,
            draining: false,
            slots: Slots { urgent_free: 1, routine_free: 2 },
            kinds: JobKind::ALL.to_vec(),
            clusters: vec![Served {
                cluster: "orders".parse().unwrap(),
                files: true,
                remote: false,
                assertions: false,
                problem: None,
            }],
            repositories: vec!["main".to_owned()],
            restore_roots: vec!["/restore".to_owned()],
        }
    }

    struct Ask {
        kind: JobKind,
        home: Option<SiteName>,
        repository: Option<&'static str>,
        files: bool,
        assertions: bool,
        roots: &'static [&'static str],
        only: Option<WorkerName>,
        rather_not: Option<WorkerName>,
        refused: BTreeSet<WorkerName>,
    }

    impl Ask {
        fn new(kind: JobKind) -> Self {
            Self {
                kind,
                home: Some("fra1".parse().unwrap()),
                repository: Some("main"),
                files: kind == JobKind::Backup,
                assertions: false,
                roots: &[],
                only: None,
                rather_not: None,
                refused: BTreeSet::new(),
            }
        }

        fn place(&self, workers: &[Candidate]) -> Placed {
            place(
                &Need {
                    kind: self.kind,
                    lane: Lane::Routine,
                    cluster: &"orders".parse().unwrap(),
                    home: self.home.as_ref(),
                    repository: self.repository,
                    files: self.files,
                    assertions: self.assertions,
                    restore_roots: self.roots.iter().copied().collect(),
                    only: self.only.as_ref(),
                    rather_not: self.rather_not.as_ref(),
                    refused: &self.refused,
                },
                workers,
            )
        }

        fn queue(&self, workers: &[Candidate]) -> String {
            match self.place(workers) {
                Placed::Queue { queue, .. } => queue.routing_key(),
                Placed::Nobody { reason } => reason,
            }
        }
    }

    #[test]
    fn a_worker_that_reads_files_itself_goes_first() {
        let mut far = worker("far", "fra1");
        far.clusters[0].remote = true;
        let mut beside = worker("host", "fra1");
        let ask = Ask::new(JobKind::Backup);
        assert!(ask.queue(std::slice::from_ref(&far)).contains("far"));
        far.slots.routine_free = 9;
        assert!(ask.queue(&[far.clone(), beside.clone()]).contains("host"));
        beside.alive = false;
        assert!(ask.queue(&[far, beside]).contains("far"));
    }

    #[test]
    fn a_logical_backup_needs_no_files() {
        let mut blind = worker("w1", "fra1");
        blind.clusters[0].files = false;
        let mut ask = Ask::new(JobKind::Backup);
        let nobody = "no worker can read the data directory of orders";
        assert_eq!(ask.queue(std::slice::from_ref(&blind)), nobody);
        ask.files = false;
        let Placed::Queue { .. } = ask.place(&[blind]) else { panic!("it can be dumped") };
    }

    #[test]
    fn assertions_are_asked_where_they_stand() {
        let (mut w1, w2) = (worker("w1", "fra1"), worker("w2", "fra1"));
        let mut ask = Ask::new(JobKind::VerifyRestore);
        ask.assertions = true;
        let both = |w1: &Candidate| [w1.clone(), w2.clone()];
        assert_eq!(ask.queue(&both(&w1)), "site.fra1.routine", "whoever gets it says what to do");
        w1.clusters[0].assertions = true;
        assert_eq!(ask.queue(&both(&w1)), "worker.w1.routine");
        w1.alive = false;
        assert_eq!(ask.queue(&both(&w1)), "worker w1 is silent");
        ask.assertions = false;
        assert_eq!(ask.queue(&both(&w1)), "site.fra1.routine");
        (ask.assertions, ask.only) = (true, Some("w2".parse().unwrap()));
        let nobody = "no worker that could do it has the assertions of orders";
        assert_eq!(ask.queue(&both(&w1)), nobody);
    }

    #[test]
    fn a_backup_goes_to_a_worker_that_announced_the_cluster() {
        let mut other = worker("w1", "fra1");
        other.clusters.clear();
        let workers = [other, worker("w2", "fra1")];
        assert_eq!(Ask::new(JobKind::Backup).queue(&workers), "worker.w2.routine");
        assert_eq!(Ask::new(JobKind::Analyze).queue(&workers), "worker.w2.routine");
    }

    #[test]
    fn what_any_worker_of_the_site_can_do_goes_to_the_site() {
        let workers = [worker("w1", "fra1"), worker("w2", "fra1"), worker("w3", "ams1")];
        let ask = Ask::new(JobKind::VerifyRestore);
        assert_eq!(ask.queue(&workers), "site.fra1.routine");
        let Placed::Queue { free: 4, .. } = ask.place(&workers) else {
            panic!("two workers, two slots each")
        };
    }

    #[test]
    fn a_site_queue_is_not_used_when_the_wrong_worker_could_take_the_ticket() {
        let mut poor = worker("w1", "fra1");
        poor.repositories.clear();
        assert_eq!(
            Ask::new(JobKind::VerifyRestore).queue(&[poor, worker("w2", "fra1")]),
            "worker.w2.routine"
        );
        let mut ask = Ask::new(JobKind::VerifyRestore);
        ask.refused.insert("w1".parse().unwrap());
        assert_eq!(ask.queue(&[worker("w1", "fra1"), worker("w2", "fra1")]), "worker.w2.routine");
        let mut ask = Ask::new(JobKind::VerifyRestore);
        ask.only = Some("w2".parse().unwrap());
        assert_eq!(ask.queue(&[worker("w1", "fra1"), worker("w2", "fra1")]), "worker.w2.routine");
    }

    #[test]
    fn a_proof_goes_to_another_site_when_its_own_is_gone() {
        let mut dead = worker("w1", "fra1");
        dead.alive = false;
        assert_eq!(
            Ask::new(JobKind::VerifyRestore).queue(&[dead, worker("w3", "ams1")]),
            "site.ams1.routine"
        );
    }

    #[test]
    fn whoever_failed_is_avoided_while_there_is_another() {
        let mut ask = Ask::new(JobKind::Backup);
        ask.rather_not = Some("w1".parse().unwrap());
        assert_eq!(ask.queue(&[worker("w1", "fra1"), worker("w2", "fra1")]), "worker.w2.routine");
        assert_eq!(ask.queue(&[worker("w1", "fra1")]), "worker.w1.routine");
    }

    #[test]
    fn nobody_is_always_explained() {
        let backup = Ask::new(JobKind::Backup);
        let with = |change: fn(&mut Candidate)| {
            let mut one = worker("w1", "fra1");
            change(&mut one);
            [one]
        };
        assert_eq!(backup.queue(&[]), "no worker has announced itself");
        assert_eq!(
            backup.queue(&with(|w| w.clusters.clear())),
            "no worker of site fra1 serves orders"
        );
        assert_eq!(
            backup.queue(&with(|w| w.clusters[0].files = false)),
            "no worker can read the data directory of orders"
        );
        let behind_a_pooler = with(|w| {
            w.clusters[0].files = false;
            w.clusters[0].problem = Some("POOLER_DETECTED: one stands in between".to_owned());
        });
        assert_eq!(
            backup.queue(&behind_a_pooler),
            "worker w1 cannot use orders: POOLER_DETECTED: one stands in between"
        );
        assert_eq!(
            backup.queue(&with(|w| w.kinds.clear())),
            "no worker that serves orders is allowed to do backup"
        );
        assert_eq!(backup.queue(&with(|w| w.alive = false)), "worker w1 is silent");
        assert_eq!(backup.queue(&with(|w| w.draining = true)), "worker w1 is shutting down");
        let verify = Ask::new(JobKind::VerifyRestore);
        assert_eq!(
            verify.queue(&with(|w| w.repositories.clear())),
            "no worker can open repository main of orders"
        );
        let mut nowhere = Ask::new(JobKind::VerifyRestore);
        nowhere.repository = None;
        assert_eq!(
            nowhere.queue(&[worker("w1", "fra1")]),
            "no worker has announced a repository for orders"
        );
        let mut restore = Ask::new(JobKind::Restore);
        restore.roots = &["/elsewhere"];
        assert_eq!(
            restore.queue(&[worker("w1", "fra1")]),
            "no worker may restore below /elsewhere"
        );
        // Tablespaces may need others; the files of one restore go to one host.
        restore.roots = &["/elsewhere", "/restore"];
        let there = with(|w| w.restore_roots = vec!["/elsewhere".to_owned()]);
        assert_eq!(
            restore.queue(&[&[worker("w2", "fra1")][..], &there].concat()),
            "no worker may restore below /elsewhere and /restore"
        );
        let both = with(|w| w.restore_roots.push("/elsewhere".to_owned()));
        assert_eq!(restore.queue(&both), "site.fra1.routine");
        let mut only = Ask::new(JobKind::Backup);
        only.only = Some("w9".parse().unwrap());
        assert_eq!(only.queue(&[worker("w1", "fra1")]), "worker w9 has not announced itself");
        let mut refused = Ask::new(JobKind::Backup);
        refused.refused.insert("w1".parse().unwrap());
        assert_eq!(refused.queue(&[worker("w1", "fra1")]), "refused by w1");
    }

    proptest! {
        #[test]
        fn the_window_never_exceeds_the_room(free in 0u32..50, outstanding in 0u32..100) {
            prop_assert_eq!(outstanding + window(free, outstanding), outstanding.max(free));
        }

        #[test]
        fn a_chosen_worker_is_alive_willing_and_able(
            flags in proptest::collection::vec((any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), 0u32..3), 0..6),
            kind in proptest::sample::select(JobKind::ALL),
        ) {
            let workers: Vec<Candidate> = flags.iter().enumerate().map(|(n, (alive, draining, serves, repo, free))| {
                let mut w = worker(&format!("w{n}"), if n % 2 == 0 { "fra1" } else { "ams1" });
                w.alive = *alive;
                w.draining = *draining;
                w.slots.routine_free = *free;
                if !serves { w.clusters.clear(); }
                if !repo { w.repositories.clear(); }
                w
            }).collect();
            let able = |w: &Candidate| w.alive && !w.draining && match kind.placement() {
                Placement::Cluster => !w.clusters.is_empty(),
                Placement::Site if kind == JobKind::Probe => !w.clusters.is_empty() || !w.repositories.is_empty(),
                Placement::Site => !w.repositories.is_empty(),
            };
            match Ask::new(kind).place(&workers) {
                Placed::Nobody { reason } => {
                    prop_assert!(!workers.iter().any(able), "{reason}");
                    prop_assert!(!reason.is_empty());
                }
                Placed::Queue { queue: TicketQueue::Worker(name, _), .. } => {
                    prop_assert!(workers.iter().any(|w| w.worker == name && able(w)));
                }
                Placed::Queue { queue: TicketQueue::Site(site, _), .. } => {
                    let mut mates = workers.iter().filter(|w| w.site == site && w.alive && !w.draining).peekable();
                    prop_assert!(mates.peek().is_some());
                    prop_assert!(mates.all(able));
                }
            }
        }
    }
}
