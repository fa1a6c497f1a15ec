//! The fleet in one sentence: which clusters cannot be recovered to target, and why.

use serde::{Deserialize, Serialize};

use crate::state::{ClusterState, Judgement};
use crate::words::count;

/// Clusters named one by one in the sentence; the rest are counted.
const NAMED_MAX: usize = 3;

/// How many clusters are in a state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// The state.
    pub state: ClusterState,
    /// How many.
    pub clusters: u64,
}

/// Counts the states that occur, worst first.
pub fn counted(judgements: &[&Judgement]) -> Vec<Counted> {
    ClusterState::ALL
        .iter()
        .map(|state| Counted {
            state: *state,
            clusters: judgements.iter().map(|j| u64::from(j.state == *state)).sum(),
        })
        .filter(|counted| counted.clusters > 0)
        .collect()
}

/// Says in one sentence which clusters cannot be recovered to target, and why; or that all can.
pub fn fleet_sentence(fleet: &[(&str, &Judgement)]) -> String {
    if fleet.is_empty() {
        return "No cluster is registered yet: start a worker that serves one.".to_owned();
    }
    let mut short: Vec<&(&str, &Judgement)> =
        fleet.iter().filter(|(_, j)| !is_good(j.state)).collect();
    short.sort_by_key(|(name, judgement)| (judgement.state, *name));
    let all = fleet.len() as u64;
    if short.is_empty() {
        let proved = fleet.iter().filter(|(_, j)| j.state == ClusterState::Proved).count();
        return match fleet {
            [(name, judgement)] if judgement.state == ClusterState::Proved => {
                format!("{name} is PROVED: {}.", judgement.reason)
            }
            _ if proved == fleet.len() => {
                format!(
                    "All {} are PROVED: recoverable to target, and the proof is fresh.",
                    count(all, "cluster")
                )
            }
            _ => {
                format!("{proved} of {} are PROVED, the others are EXEMPT.", count(all, "cluster"))
            }
        };
    }
    let named: Vec<String> = short
        .iter()
        .take(NAMED_MAX)
        .map(|(name, judgement)| format!("{name} is {} ({})", judgement.state, judgement.reason))
        .collect();
    let rest = short.len() - named.len();
    let more = if rest > 0 { format!("; and {rest} more") } else { String::new() };
    let cannot = match (short.len(), fleet.len()) {
        (1, 1) => "The only cluster is not proved recoverable to target".to_owned(),
        (n, _) => format!(
            "{n} of {} {} not proved recoverable to target",
            count(all, "cluster"),
            if n == 1 { "is" } else { "are" }
        ),
    };
    format!("{cannot}: {}{more}.", named.join("; "))
}

fn is_good(state: ClusterState) -> bool {
    matches!(state, ClusterState::Proved | ClusterState::Exempt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judgement(state: ClusterState, reason: &str) -> Judgement {
        Judgement { state, reason: reason.to_owned() }
    }

    #[test]
    fn one_sentence_says_which_and_why() {
        let proved =
            judgement(ClusterState::Proved, "restored in 31 s and proved L5 2 h ago, 3 tables");
        let taken = judgement(ClusterState::Taken, "its newest backup, 2 d old, is not proved yet");
        let broken =
            judgement(ClusterState::Broken, "its newest backup failed its L4 proof 3 h ago");
        assert_eq!(
            fleet_sentence(&[]),
            "No cluster is registered yet: start a worker that serves one."
        );
        assert_eq!(
            fleet_sentence(&[("orders", &proved)]),
            "orders is PROVED: restored in 31 s and proved L5 2 h ago, 3 tables."
        );
        assert_eq!(
            fleet_sentence(&[("a", &proved), ("b", &proved)]),
            "All 2 clusters are PROVED: recoverable to target, and the proof is fresh."
        );
        assert_eq!(
            fleet_sentence(&[("orders", &taken)]),
            "The only cluster is not proved recoverable to target: orders is TAKEN (its newest backup, 2 d old, is not proved yet)."
        );
        assert_eq!(
            fleet_sentence(&[("a", &taken), ("b", &proved), ("c", &broken)]),
            "2 of 3 clusters are not proved recoverable to target: c is BROKEN (its newest backup failed its L4 proof 3 h ago); a is TAKEN (its newest backup, 2 d old, is not proved yet)."
        );
        let many: Vec<(&str, &Judgement)> =
            ["a", "b", "c", "d", "e"].iter().map(|n| (*n, &taken)).collect();
        assert!(fleet_sentence(&many).ends_with("; and 2 more."));
    }

    #[test]
    fn states_are_counted_worst_first() {
        let list = [
            judgement(ClusterState::Proved, "x"),
            judgement(ClusterState::Broken, "x"),
            judgement(ClusterState::Proved, "x"),
        ];
        assert_eq!(
            counted(&list.iter().collect::<Vec<_>>()),
            [
                Counted { state: ClusterState::Broken, clusters: 1 },
                Counted { state: ClusterState::Proved, clusters: 2 }
            ]
        );
    }
}
