//! What is promised for clusters: how much of the newest work may be lost, and how long a recovery may take.

use std::collections::BTreeMap;

use jiff::SignedDuration;
use jiff::fmt::serde::duration::friendly::compact;
use policy::Objectives;
use proto::ClusterName;
use proto::near::did_you_mean;
use serde::{Deserialize, Serialize};

/// Promises for every cluster, and for single ones.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectivesConfig {
    /// How old the recovery point may be: `"15min"`.
    #[serde(serialize_with = "compact::optional", skip_serializing_if = "Option::is_none")]
    pub rpo: Option<SignedDuration>,
    /// How long a recovery may take: `"1h"`.
    #[serde(serialize_with = "compact::optional", skip_serializing_if = "Option::is_none")]
    pub rto: Option<SignedDuration>,
    /// What is promised otherwise, by the cluster's name. What is not said here is as for every cluster.
    pub clusters: BTreeMap<ClusterName, ClusterObjectives>,
}

/// Promises for one cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterObjectives {
    /// How old its recovery point may be.
    #[serde(serialize_with = "compact::optional", skip_serializing_if = "Option::is_none")]
    pub rpo: Option<SignedDuration>,
    /// How long a recovery of it may take.
    #[serde(serialize_with = "compact::optional", skip_serializing_if = "Option::is_none")]
    pub rto: Option<SignedDuration>,
}

impl ObjectivesConfig {
    /// What is promised for a cluster.
    pub(crate) fn of(&self, cluster: &ClusterName) -> Objectives {
        let own = self.clusters.get(cluster).copied().unwrap_or_default();
        Objectives {
            recovery_point_max_ms: own.rpo.or(self.rpo).map(milliseconds),
            recovery_time_max_ms: own.rto.or(self.rto).map(milliseconds),
            ..Objectives::default()
        }
    }

    /// The clusters that it names and that are not among those that are known, each in a sentence that names its key: one that is
    /// still to come, or a slip, which would leave a cluster without its promise. Nothing while no cluster is known at all.
    pub fn unknown(&self, known: &[ClusterName]) -> Vec<String> {
        let is_unknown = |cluster: &&ClusterName| !known.is_empty() && !known.contains(cluster);
        let unknown = self.clusters.keys().filter(is_unknown);
        let sentences = unknown.map(|cluster| {
            let near = did_you_mean(cluster.as_str(), known.iter().map(ClusterName::as_str));
            format!("objectives.clusters.{cluster}: no cluster of this name is known{near}")
        });
        sentences.collect()
    }

    /// Every problem there is, each a sentence that names its key.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut promises =
            vec![("objectives.rpo".to_owned(), self.rpo), ("objectives.rto".to_owned(), self.rto)];
        for (cluster, own) in &self.clusters {
            promises.push((format!("objectives.clusters.{cluster}.rpo"), own.rpo));
            promises.push((format!("objectives.clusters.{cluster}.rto"), own.rto));
        }
        let wrong = promises.into_iter().filter_map(|(key, promise)| {
            let is_nothing = milliseconds(promise?) < 1_000;
            is_nothing.then(|| format!("{key}: too short, at least 1s"))
        });
        wrong.collect()
    }
}

fn milliseconds(duration: SignedDuration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<ObjectivesConfig, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn a_cluster_has_the_promises_of_all_but_for_its_own() {
        let config = parse(
            r#"{"rpo": "15min", "rto": "1h 30min", "clusters": {"orders": {"rpo": "5m"}, "logs": {"rto": "36 hours"}}}"#,
        )
        .unwrap();
        let of = |name: &str| {
            let promised = config.of(&name.parse().unwrap());
            (promised.recovery_point_max_ms, promised.recovery_time_max_ms)
        };
        assert_eq!(of("other"), (Some(900_000), Some(5_400_000)));
        assert_eq!(of("orders"), (Some(300_000), Some(5_400_000)));
        assert_eq!(of("logs"), (Some(900_000), Some(129_600_000)));
        let none = ObjectivesConfig::default().of(&"orders".parse().unwrap());
        assert_eq!(none, Objectives::default());
        assert_eq!(none.recovery_point_max_ms, None);
        let again = serde_json::to_string(&config).unwrap();
        assert_eq!(parse(&again).unwrap(), config, "{again}");
    }

    #[test]
    fn a_promise_for_a_cluster_that_nobody_knows_is_told_with_the_one_that_was_meant() {
        let config =
            parse(r#"{"clusters": {"ordres": {"rpo": "5m"}, "logs": {}, "next-year": {}}}"#);
        let config = config.unwrap();
        let known = ["logs", "orders"].map(|name| name.parse().unwrap());
        assert_eq!(
            config.unknown(&known),
            [
                "objectives.clusters.next-year: no cluster of this name is known",
                "objectives.clusters.ordres: no cluster of this name is known; did you mean orders?"
            ]
        );
        assert!(config.unknown(&[]).is_empty(), "the first cluster is still to come");
        assert!(ObjectivesConfig::default().unknown(&known).is_empty());
    }

    #[test]
    fn a_promise_that_nobody_can_keep_or_understand_is_refused() {
        let config = parse(r#"{"rpo": "-1h", "clusters": {"orders": {"rto": "0s"}}}"#).unwrap();
        assert_eq!(
            config.problems(),
            [
                "objectives.rpo: too short, at least 1s",
                "objectives.clusters.orders.rto: too short, at least 1s"
            ]
        );
        assert!(parse(r#"{"rpo": "15"}"#).is_err(), "of what?");
        assert!(parse(r#"{"rpo": 900}"#).is_err());
        assert!(parse(r#"{"clusters": {"orders": {"rp": "1h"}}}"#).is_err());
    }
}
