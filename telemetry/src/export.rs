//! The queue between a span that has ended and the collector: bounded, counted, scrubbed, never waited for.
//!
//! The SDK's batch processor drops silently and counts privately, so [`Queue`] stands before it: it admits a span
//! only while fewer than the limit are unfinished, and keeps the figures that `/metrics` shows.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use opentelemetry::trace::Status;
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{BatchSpanProcessor, Span, SpanData, SpanExporter, SpanProcessor};

use crate::redact::scrub;

/// Span attributes that exist for log lines only and would repeat what the span already says.
const LOG_ONLY: [&str; 4] = ["trace.id", "step", "busy_ns", "idle_ns"];

/// What became of the spans that ended so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExportCounts {
    /// Accepted by the collector.
    pub exported: u64,
    /// Sent without success: the collector refused or did not answer in time.
    pub failed: u64,
    /// Never sent: the queue was full, or telemetry was shut down.
    pub dropped: u64,
    /// In the queue or on the way now.
    pub pending: u64,
}

/// The figures behind [`ExportCounts`], shared by the queue, the exporter and `/metrics`.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    exported: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
    pending: AtomicU64,
}

impl Tally {
    pub(crate) fn counts(&self) -> ExportCounts {
        ExportCounts {
            exported: self.exported.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            pending: self.pending.load(Ordering::Relaxed),
        }
    }

    /// Takes a place in the queue; when there is none, the span counts as dropped.
    fn admit(&self, limit: u64) -> bool {
        let place = self
            .pending
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |n| (n < limit).then_some(n + 1));
        if place.is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        place.is_ok()
    }
}

/// Admits spans to the batch processor as long as there is room.
#[derive(Debug)]
pub(crate) struct Queue {
    inner: BatchSpanProcessor,
    limit: u64,
    closed: AtomicBool,
    tally: Arc<Tally>,
}

impl Queue {
    /// `limit` spans at most are held by `inner`, whose own queue must be at least as long.
    pub(crate) fn new(inner: BatchSpanProcessor, limit: usize, tally: Arc<Tally>) -> Self {
        let limit = u64::try_from(limit).unwrap_or(u64::MAX);
        Self { inner, limit, closed: AtomicBool::new(false), tally }
    }
}

impl SpanProcessor for Queue {
    fn on_start(&self, _span: &mut Span, _context: &Context) {}

    fn on_end(&self, mut span: SpanData) {
        if !span.span_context.is_sampled() {
            return;
        }
        if self.closed.load(Ordering::Acquire) {
            self.tally.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if self.tally.admit(self.limit) {
            clean(&mut span);
            self.inner.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.closed.store(true, Ordering::Release);
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// Counts what the collector did with each batch.
#[derive(Debug)]
pub(crate) struct Counting<E> {
    inner: E,
    tally: Arc<Tally>,
}

impl<E> Counting<E> {
    pub(crate) fn new(inner: E, tally: Arc<Tally>) -> Self {
        Self { inner, tally }
    }
}

impl<E: SpanExporter> SpanExporter for Counting<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let size = batch.len() as u64;
        let result = self.inner.export(batch).await;
        let counter = if result.is_ok() { &self.tally.exported } else { &self.tally.failed };
        counter.fetch_add(size, Ordering::Relaxed);
        self.tally.pending.fetch_sub(size, Ordering::AcqRel);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// Takes secrets out of every text of a span, wherever it came from: names, statuses, attributes, events, links.
fn clean(span: &mut SpanData) {
    clean_text(&mut span.name);
    if let Status::Error { description } = &mut span.status {
        clean_text(description);
    }
    span.attributes.retain(|attribute| !LOG_ONLY.contains(&attribute.key.as_str()));
    clean_attributes(&mut span.attributes);
    for event in &mut span.events.events {
        clean_text(&mut event.name);
        clean_attributes(&mut event.attributes);
    }
    for link in &mut span.links.links {
        clean_attributes(&mut link.attributes);
    }
}

fn clean_text(text: &mut Cow<'static, str>) {
    if let Cow::Owned(scrubbed) = scrub(text) {
        *text = Cow::Owned(scrubbed);
    }
}

fn clean_attributes(attributes: &mut [KeyValue]) {
    for attribute in attributes {
        clean_value(attribute.key.as_str(), &mut attribute.value);
    }
}

/// A value is judged together with its key: `password` with `hunter2` shows nothing by the value alone.
fn clean_value(key: &str, value: &mut Value) {
    match value {
        Value::String(text) => clean_string(key, text),
        Value::Array(Array::String(texts)) => {
            for text in texts {
                clean_string(key, text);
            }
        }
        _ => {}
    }
}

fn clean_string(key: &str, text: &mut StringValue) {
    if let Some(scrubbed) = crate::redact::scrub_field(key, text.as_str()) {
        *text = scrubbed.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_admits_up_to_its_limit_and_counts_the_rest() {
        let tally = Tally::default();
        let admitted = (0..10).filter(|_| tally.admit(4)).count();
        assert_eq!(admitted, 4);
        assert_eq!(tally.counts(), ExportCounts { dropped: 6, pending: 4, ..Default::default() });
    }
}
