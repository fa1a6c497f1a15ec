//! When a silent attempt is suspected, and what evidence makes it lost.
//!
//! A lease that ran out proves nothing: the coordinator may have been the one that was cut off, or the worker may
//! still hold the server's lock. So: expired → suspect → evidence → lost. Acting on the answers is not done here.

use proto::AttemptId;
use proto::job::{JobKind, ProbeOutcome, SeenVerdict};

use crate::words::span;

/// Limits of waiting for a silent attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeasePolicy {
    /// How long an attempt counts as alive after a pulse, milliseconds.
    pub lease_ms: i64,
    /// How long a suspect may stay without evidence before it counts as lost, unproven, milliseconds.
    pub patience_ms: i64,
    /// A storm is at least this many leases running out at once,
    pub storm_count_min: usize,
    /// and more than this share of all leases, per cent.
    pub storm_share_percent: usize,
}

impl Default for LeasePolicy {
    fn default() -> Self {
        Self { lease_ms: 60_000, patience_ms: 600_000, storm_count_min: 3, storm_share_percent: 20 }
    }
}

/// One lease of a running attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// The attempt.
    pub attempt: AttemptId,
    /// Until when it counts as alive by the pulses that came, Unix milliseconds.
    pub until_at_ms: i64,
}

/// What a look over all leases says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sweep {
    /// These have become suspects; often none.
    Suspects(Vec<AttemptId>),
    /// Nothing is decided: the coordinator cannot hear anybody.
    CutOff,
    /// Too many at once: more likely one fault of ours than many of theirs. Nobody is suspected; people are told.
    Storm {
        /// How many ran out.
        expired: usize,
        /// Of how many.
        of: usize,
        /// For people.
        reason: String,
    },
}

impl LeasePolicy {
    /// Looks over all leases of running attempts. `listening_since_at_ms` is when the coordinator began (again) to
    /// hear its workers without a break, `None` while it does not: leases do not run meanwhile, and a whole one is
    /// granted afterwards.
    pub fn sweep(
        &self,
        leases: &[Lease],
        listening_since_at_ms: Option<i64>,
        now_ms: i64,
    ) -> Sweep {
        let Some(since) = listening_since_at_ms else { return Sweep::CutOff };
        let floor = since.saturating_add(self.lease_ms);
        let expired: Vec<AttemptId> = leases
            .iter()
            .filter(|lease| lease.until_at_ms.max(floor) <= now_ms)
            .map(|lease| lease.attempt)
            .collect();
        let share = leases.len().saturating_mul(self.storm_share_percent);
        if expired.len() >= self.storm_count_min && expired.len().saturating_mul(100) > share {
            let (expired, of) = (expired.len(), leases.len());
            let reason = format!(
                "{expired} of {of} leases ran out together: nothing is declared lost before a person or the workers' pulses say more"
            );
            return Sweep::Storm { expired, of, reason };
        }
        Sweep::Suspects(expired)
    }

    /// Judges one suspect by what has been seen of it since.
    pub fn judge(
        &self,
        kind: JobKind,
        suspect_at_ms: i64,
        seen: &Seen<'_>,
        now_ms: i64,
    ) -> Verdict {
        if let Some(worker) = seen.disowned_by {
            return Verdict::Lost {
                reason: format!("worker {worker} is alive and no longer runs it"),
            };
        }
        let overdue = now_ms.saturating_sub(suspect_at_ms) >= self.patience_ms;
        match remains(kind) {
            Remains::Nothing => {
                return Verdict::Lost {
                    reason: "its lease ran out, and a second one does no harm".to_owned(),
                };
            }
            Remains::Unseen => {
                return self.without_evidence(overdue, "nobody else can see it", false);
            }
            Remains::Visible => {}
        }
        match seen.probe {
            Some(probe) => match (probe.verdict, probe.sessions) {
                (Some(SeenVerdict::Commit), _) if overdue => Verdict::Finished {
                    reason: "its COMMIT verdict is in the repository; its worker never reported"
                        .to_owned(),
                },
                (Some(SeenVerdict::Commit), _) => Verdict::Wait {
                    reason: "its COMMIT verdict is in the repository: waiting for its report"
                        .to_owned(),
                    probe: false,
                },
                (Some(SeenVerdict::Abort), _) => {
                    Verdict::Lost { reason: "its ABORT verdict is in the repository".to_owned() }
                }
                (_, Some(0)) => {
                    Verdict::Lost { reason: "the server shows no session of it".to_owned() }
                }
                (_, Some(sessions)) => Verdict::Wait {
                    reason: format!(
                        "its worker is silent, but the server still shows {sessions} of its sessions"
                    ),
                    probe: true,
                },
                (_, None) => {
                    self.without_evidence(overdue, "the probe could not ask the server", true)
                }
            },
            None => self.without_evidence(overdue, "nobody could look for it yet", true),
        }
    }

    fn without_evidence(&self, overdue: bool, why: &str, probe: bool) -> Verdict {
        let patience = span(self.patience_ms);
        if overdue {
            Verdict::Lost { reason: format!("silent for {patience}, unproven: {why}") }
        } else {
            Verdict::Wait { reason: format!("its worker is silent; {why}"), probe }
        }
    }
}

/// What a silent attempt may leave in the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remains {
    /// Sessions on a server, a verdict in a repository: a probe can look, and two at once do harm.
    Visible,
    /// Files on its worker's own disk: nobody else can look.
    Unseen,
    /// Nothing that a second attempt would meet.
    Nothing,
}

/// What a silent attempt of this kind may leave.
pub fn remains(kind: JobKind) -> Remains {
    match kind {
        JobKind::Backup | JobKind::Analyze | JobKind::Vacuum | JobKind::EnableWal => {
            Remains::Visible
        }
        JobKind::Restore => Remains::Unseen,
        JobKind::VerifyRestore | JobKind::Probe => Remains::Nothing,
    }
}

/// What has been seen of a suspect.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen<'a> {
    /// A worker that is alive, is the one that held the attempt, and does not list it any more.
    pub disowned_by: Option<&'a str>,
    /// The newest answer of a probe.
    pub probe: Option<&'a ProbeOutcome>,
}

/// What becomes of a suspect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is gone; the job may go on.
    Lost {
        /// The evidence, for people.
        reason: String,
    },
    /// It did its work although nobody reported.
    Finished {
        /// The evidence, for people.
        reason: String,
    },
    /// Nothing is certain yet.
    Wait {
        /// What is known, for people.
        reason: String,
        /// Whether (another) probe could say more.
        probe: bool,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: LeasePolicy = LeasePolicy {
        lease_ms: 100,
        patience_ms: 1_000,
        storm_count_min: 3,
        storm_share_percent: 20,
    };

    fn lease(number: u8, until_at_ms: i64) -> Lease {
        Lease { attempt: AttemptId::mint(1, [number; 10]), until_at_ms }
    }

    fn leases(expired: u8, alive: u8) -> Vec<Lease> {
        let dead = (0..expired).map(|n| lease(n, 500));
        dead.chain((0..alive).map(|n| lease(100 + n, 5_000))).collect()
    }

    #[test]
    fn an_expired_lease_makes_a_suspect() {
        assert_eq!(
            POLICY.sweep(&leases(1, 1), Some(0), 500),
            Sweep::Suspects(vec![lease(0, 0).attempt])
        );
        assert_eq!(POLICY.sweep(&leases(1, 1), Some(0), 499), Sweep::Suspects(vec![]));
    }

    #[test]
    fn the_clock_of_leases_stands_still_while_nobody_can_be_heard() {
        assert_eq!(POLICY.sweep(&leases(1, 0), None, 9_999), Sweep::CutOff);
        assert_eq!(POLICY.sweep(&leases(1, 0), Some(9_900), 9_999), Sweep::Suspects(vec![]));
        assert_eq!(
            POLICY.sweep(&leases(1, 0), Some(9_900), 10_000),
            Sweep::Suspects(vec![lease(0, 0).attempt])
        );
    }

    #[test]
    fn many_at_once_are_a_storm_and_nobody_is_suspected() {
        assert!(
            matches!(POLICY.sweep(&leases(2, 0), Some(0), 600), Sweep::Suspects(s) if s.len() == 2)
        );
        assert!(matches!(
            POLICY.sweep(&leases(3, 0), Some(0), 600),
            Sweep::Storm { expired: 3, of: 3, .. }
        ));
        assert!(
            matches!(POLICY.sweep(&leases(3, 12), Some(0), 600), Sweep::Suspects(s) if s.len() == 3)
        );
        assert!(matches!(POLICY.sweep(&leases(3, 11), Some(0), 600), Sweep::Storm { .. }));
    }

    fn probe(sessions: Option<u32>, verdict: Option<SeenVerdict>) -> ProbeOutcome {
        ProbeOutcome { sessions, terminated: 0, verdict }
    }

    #[test]
    fn evidence_decides() {
        use SeenVerdict::{Abort, Commit, Open, Unknown};
        let judge = |kind, probe: Option<&ProbeOutcome>, disowned_by, at| match POLICY.judge(
            kind,
            0,
            &Seen { disowned_by, probe },
            at,
        ) {
            Verdict::Lost { .. } => "lost",
            Verdict::Finished { .. } => "finished",
            Verdict::Wait { probe: true, .. } => "probe",
            Verdict::Wait { probe: false, .. } => "wait",
        };
        let table = [
            (probe(Some(0), Some(Open)), 10, "lost"),
            (probe(Some(0), Some(Unknown)), 10, "lost"),
            (probe(Some(0), None), 10, "lost"),
            (probe(Some(2), Some(Open)), 10, "probe"),
            (probe(Some(2), Some(Open)), 5_000, "probe"),
            (probe(Some(2), Some(Abort)), 10, "lost"),
            (probe(Some(0), Some(Commit)), 10, "wait"),
            (probe(None, Some(Commit)), 1_000, "finished"),
            (probe(None, Some(Open)), 999, "probe"),
            (probe(None, Some(Open)), 1_000, "lost"),
            (probe(None, None), 1_000, "lost"),
        ];
        for (outcome, at, expected) in table {
            assert_eq!(
                judge(JobKind::Backup, Some(&outcome), None, at),
                expected,
                "{outcome:?} at {at}"
            );
        }
        assert_eq!(judge(JobKind::Backup, None, None, 999), "probe");
        assert_eq!(judge(JobKind::Backup, None, None, 1_000), "lost");
        assert_eq!(judge(JobKind::Backup, Some(&probe(Some(1), None)), Some("w1"), 1), "lost");
        for kind in [JobKind::Probe, JobKind::VerifyRestore] {
            assert_eq!(judge(kind, None, None, 1), "lost", "{kind}");
        }
        assert_eq!(judge(JobKind::Restore, None, None, 999), "wait");
        assert_eq!(judge(JobKind::Restore, None, None, 1_000), "lost");
    }

    proptest! {
        #[test]
        fn nobody_with_a_running_lease_is_suspected(
            untils in proptest::collection::vec(0i64..2_000, 0..20),
            since in proptest::option::of(0i64..2_000),
            now in 0i64..3_000,
        ) {
            let leases: Vec<Lease> =
                untils.iter().zip(0u8..).map(|(until, n)| lease(n, *until)).collect();
            if let Sweep::Suspects(suspects) = POLICY.sweep(&leases, since, now) {
                for lease in leases.iter().filter(|l| suspects.contains(&l.attempt)) {
                    prop_assert!(lease.until_at_ms <= now);
                    prop_assert!(since.unwrap() + POLICY.lease_ms <= now);
                }
            }
        }
    }
}
