//! Prometheus text from a registry that is passed in. Which metrics exist is decided where the numbers are.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use std::sync::Arc;

use crate::export::Tally;

/// The `Content-Type` of what [`encode`] returns.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds, in seconds, for jobs and their steps: from a tenth of a second to a day. The usual buckets end at
/// ten seconds, where a backup has hardly begun.
pub const JOB_SECONDS: [f64; 14] = [
    0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1_800.0, 3_600.0, 7_200.0, 21_600.0, 43_200.0,
    86_400.0,
];

/// Upper bounds, in seconds, for waits that should be short: from a millisecond to a minute.
pub const WAIT_SECONDS: [f64; 12] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];

/// The body of `/metrics`: what is in `registry`, read from memory.
///
/// Fails only if a metric's own encoder does, and then gives nothing rather than half a page.
pub fn encode(registry: &Registry) -> Result<String, fmt::Error> {
    let mut page = String::new();
    text::encode(&mut page, registry)?;
    Ok(page)
}

/// Adds the figures of span export itself: `telemetry_spans_total{result}` and `telemetry_spans_pending`, below the
/// registry's own prefix. With no OTLP configured they stay at 0.
pub(crate) fn register_export(registry: &mut Registry, tally: Arc<Tally>) {
    registry.register_collector(Box::new(ExportCollector(tally)));
}

#[derive(Debug)]
struct ExportCollector(Arc<Tally>);

impl Collector for ExportCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counts = self.0.counts();
        let results =
            [("exported", counts.exported), ("failed", counts.failed), ("dropped", counts.dropped)];
        let total = ConstCounter::new(0u64);
        let mut family = encoder.encode_descriptor(
            "telemetry_spans",
            "Spans that ended, by what became of them",
            None,
            total.metric_type(),
        )?;
        for (result, value) in results {
            let labels = [("result", result)];
            ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
        }
        let pending = ConstGauge::new(i64::try_from(counts.pending).unwrap_or(i64::MAX));
        let metric = encoder.encode_descriptor(
            "telemetry_spans_pending",
            "Spans queued for export or on their way",
            None,
            pending.metric_type(),
        )?;
        pending.encode(metric)
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::family::Family;

    use super::*;

    #[test]
    fn a_page_has_the_registry_and_the_figures_of_export() {
        let mut registry = Registry::with_prefix("pgmuster");
        let jobs = Family::<Vec<(String, String)>, Counter>::default();
        registry.register("jobs", "Jobs by kind", jobs.clone());
        jobs.get_or_create(&vec![("kind".to_owned(), "a\"b\n".to_owned())]).inc();
        register_export(&mut registry, Arc::new(Tally::default()));
        let page = encode(&registry).unwrap();
        for line in [
            "pgmuster_jobs_total{kind=\"a\\\"b\\n\"} 1",
            "pgmuster_telemetry_spans_total{result=\"dropped\"} 0",
            "pgmuster_telemetry_spans_pending 0",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} in\n{page}");
        }
        assert!(page.ends_with("# EOF\n"));
    }

    #[test]
    fn buckets_rise() {
        assert!(JOB_SECONDS.is_sorted_by(|a, b| a < b));
        assert!(WAIT_SECONDS.is_sorted_by(|a, b| a < b));
    }
}
