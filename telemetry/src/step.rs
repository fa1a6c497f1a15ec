//! Steps of a job: each a span that is exported when it ends, and a record for the report with the same ids.
//!
//! A step mints its ids itself, so that the record is complete with no collector, and with no subscriber at all.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use opentelemetry::trace::{Span as _, SpanKind, Status, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue, Value};
use serde::{Deserialize, Serialize};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::clock::{now, unix_ms};
use crate::context::{SpanId, TraceContext};
use crate::ids;

/// The side of a message or call a span stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// Work inside this process.
    #[default]
    Internal,
    /// Sends a message that somebody else will work on.
    Producer,
    /// Works on a message.
    Consumer,
    /// Calls somebody and waits for the answer; also the settling of a message.
    Client,
    /// Answers a call.
    Server,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Internal => "internal",
            Self::Producer => "producer",
            Self::Consumer => "consumer",
            Self::Client => "client",
            Self::Server => "server",
        }
    }

    fn to_otel(self) -> SpanKind {
        match self {
            Self::Internal => SpanKind::Internal,
            Self::Producer => SpanKind::Producer,
            Self::Consumer => SpanKind::Consumer,
            Self::Client => SpanKind::Client,
            Self::Server => SpanKind::Server,
        }
    }
}

/// How a step or a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Outcome {
    /// It did what it was for.
    #[default]
    Ok,
    /// It did not; the text is scrubbed before it leaves the process.
    Failed(String),
}

impl Outcome {
    /// A failure as it stands in a report: its code and its message.
    pub fn of(failure: &proto::Failure) -> Self {
        Self::Failed(failure.to_string())
    }
}

/// A number or text attached to a span. Labels of metrics have their own type: those must be few.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    /// Text; scrubbed before it leaves the process.
    Text(String),
    /// A whole number.
    Integer(i64),
    /// A measured number.
    Float(f64),
    /// Yes or no.
    Bool(bool),
}

impl From<&str> for Attribute {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Attribute {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<i64> for Attribute {
    fn from(number: i64) -> Self {
        Self::Integer(number)
    }
}

impl From<u64> for Attribute {
    fn from(number: u64) -> Self {
        Self::Integer(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<u32> for Attribute {
    fn from(number: u32) -> Self {
        Self::Integer(number.into())
    }
}

impl From<f64> for Attribute {
    fn from(number: f64) -> Self {
        Self::Float(number)
    }
}

impl From<bool> for Attribute {
    fn from(yes: bool) -> Self {
        Self::Bool(yes)
    }
}

impl From<Attribute> for Value {
    fn from(attribute: Attribute) -> Self {
        match attribute {
            Attribute::Text(text) => text.into(),
            Attribute::Integer(number) => number.into(),
            Attribute::Float(number) => number.into(),
            Attribute::Bool(yes) => yes.into(),
        }
    }
}

/// What a report keeps of a step. The ids are those of the exported span; times are Unix milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRecord {
    /// What was done, `copy files`.
    pub name: String,
    /// The trace, 32 hexadecimal digits.
    pub trace_id: String,
    /// The span, 16 hexadecimal digits.
    pub span_id: String,
    /// The span it belongs to, 16 hexadecimal digits; absent for the root of a trace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_span_id: Option<String>,
    /// When it began.
    pub start_ms: i64,
    /// When it ended; never before `start_ms`, whatever the wall clock did meanwhile.
    pub end_ms: i64,
    /// Whether it did what it was for.
    pub ok: bool,
}

impl StepRecord {
    /// The step as it is reported when it has ended; replaces what [`Step::started`] said under the same number.
    pub fn report(self, number: u32, figures: BTreeMap<String, u64>) -> proto::Step {
        proto::Step {
            number,
            name: self.name,
            span_id: self.span_id,
            started_at_ms: self.start_ms,
            ended_at_ms: Some(self.end_ms),
            failed: !self.ok,
            figures,
        }
    }
}

/// A named piece of work that is under way. End it with [`Step::end`]; a step that is dropped instead is exported as
/// failed: `abandoned`.
#[derive(Debug)]
pub struct Step {
    name: Cow<'static, str>,
    context: TraceContext,
    parent: Option<SpanId>,
    span: tracing::Span,
    started: SystemTime,
    since: Instant,
    ended: bool,
}

impl Step {
    /// The root of a trace of its own.
    pub fn root(name: impl Into<Cow<'static, str>>) -> Self {
        Self::begin(name.into(), Kind::Internal, None, None)
    }

    /// A step below a span of this or another process.
    pub fn under(parent: &TraceContext, name: impl Into<Cow<'static, str>>) -> Self {
        Self::begin(name.into(), Kind::Internal, Some(parent), None)
    }

    /// A step below `parent` on one side of a message or a call.
    pub fn of_kind(kind: Kind, parent: &TraceContext, name: impl Into<Cow<'static, str>>) -> Self {
        Self::begin(name.into(), kind, Some(parent), None)
    }

    /// A step whose ids were decided before it began, such as [`TraceContext::of_attempt`]; it belongs to `parent`
    /// in the same trace.
    pub fn with_ids(
        own: &TraceContext,
        parent: &TraceContext,
        name: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::begin(name.into(), Kind::Internal, Some(parent), Some(own.span_id()))
    }

    /// A step below this one.
    #[must_use]
    pub fn child(&self, name: impl Into<Cow<'static, str>>) -> Self {
        Self::under(&self.context, name)
    }

    fn begin(
        name: Cow<'static, str>,
        kind: Kind,
        parent: Option<&TraceContext>,
        own: Option<SpanId>,
    ) -> Self {
        let span_id = own.unwrap_or_else(ids::span_id);
        let trace_id = parent.map_or_else(ids::trace_id, TraceContext::trace_id);
        let span = tracing::info_span!(
            target: "telemetry::step",
            "step",
            step = %name,
            trace.id = %trace_id,
            otel.name = %name,
            otel.kind = kind.as_str(),
        );
        let started = now();
        // Without a subscriber there is nothing to set a parent on; the ids are ours either way.
        let _ = span.set_parent(parent.map_or_else(Context::new, TraceContext::as_parent));
        let recorded = ids::with_chosen(trace_id, span_id, || TraceContext::of_span(&span));
        let context = recorded.unwrap_or_else(|| {
            let sampled = parent.is_none_or(TraceContext::is_sampled);
            TraceContext::new(trace_id, span_id, sampled)
                .expect("the ids come from a valid context or the generator, which avoids zero")
        });
        Self {
            name,
            context,
            parent: parent.map(TraceContext::span_id),
            span,
            started,
            since: Instant::now(),
            ended: false,
        }
    }

    /// The step as it is reported when it begins: `number` counts the steps of an attempt from 1.
    pub fn started(&self, number: u32) -> proto::Step {
        proto::Step {
            number,
            name: self.name.clone().into_owned(),
            span_id: self.context.span_id().to_string(),
            started_at_ms: unix_ms(self.started),
            ended_at_ms: None,
            failed: false,
            figures: BTreeMap::new(),
        }
    }

    /// What to hand on, as parent of whatever this step causes.
    pub fn context(&self) -> TraceContext {
        self.context
    }

    /// The tracing span: `future.instrument(step.span().clone())` puts log lines into the step.
    pub fn span(&self) -> &tracing::Span {
        &self.span
    }

    /// Points to another trace, such as the one of the attempt before.
    pub fn link(&self, to: &TraceContext) {
        self.span.add_link(to.span_context());
    }

    /// Attaches a number or text to the span.
    pub fn set(&self, key: &'static str, value: impl Into<Attribute>) {
        self.span.set_attribute(key, value.into());
    }

    /// Ends the step: the span goes to the export queue now, the record goes into the report.
    pub fn end(mut self, outcome: &Outcome) -> StepRecord {
        self.finish(outcome)
    }

    /// Ends the step according to a result, whose error stays with the caller.
    pub fn end_with<T, E: std::error::Error>(self, result: &Result<T, E>) -> StepRecord {
        match result {
            Ok(_) => self.end(&Outcome::Ok),
            Err(error) => self.end(&Outcome::Failed(proto::failure::chain(error))),
        }
    }

    fn finish(&mut self, outcome: &Outcome) -> StepRecord {
        self.ended = true;
        // The monotonic clock measures; the wall clock only says when it began.
        let ended = self.started + self.since.elapsed();
        let context = self.span.context();
        let span = context.span();
        if let Outcome::Failed(text) = outcome {
            span.set_status(Status::error(text.clone()));
        }
        // Ending here and not when the last clone of the tracing span goes: an instrumented future may live on.
        span.end_with_timestamp(ended);
        StepRecord {
            name: self.name.clone().into_owned(),
            trace_id: self.context.trace_id().to_string(),
            span_id: self.context.span_id().to_string(),
            parent_span_id: self.parent.map(|parent| parent.to_string()),
            start_ms: unix_ms(self.started),
            end_ms: unix_ms(ended),
            ok: *outcome == Outcome::Ok,
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.ended {
            self.finish(&Outcome::Failed("abandoned".to_owned()));
        }
    }
}

/// A span that is over, with everything about it known: how the coordinator tells of a job at its end, from the
/// catalog, also of one whose worker was killed.
#[derive(Debug, Clone, PartialEq)]
pub struct FinishedSpan {
    /// What it was, `backup orders`.
    pub name: String,
    /// Its own ids.
    pub context: TraceContext,
    /// The span it belongs to; `None` for the root.
    pub parent: Option<SpanId>,
    /// The side of a message or call it stands on.
    pub kind: Kind,
    /// Unix milliseconds.
    pub start_ms: i64,
    /// Unix milliseconds; a value before `start_ms` counts as `start_ms`.
    pub end_ms: i64,
    /// How it ended.
    pub outcome: Outcome,
    /// What else is known.
    pub attributes: Vec<(&'static str, Attribute)>,
    /// Other traces it points to.
    pub links: Vec<TraceContext>,
}

/// Exports a span that is over. Does nothing when its context is not sampled or nothing is exported; never waits.
pub fn emit_span(finished: FinishedSpan) {
    let FinishedSpan { name, context, parent, kind, start_ms, end_ms, outcome, attributes, links } =
        finished;
    if !context.is_sampled() {
        return;
    }
    let parent = parent.map_or_else(Context::new, |id| context.with_span(id).as_parent());
    let tracer = opentelemetry::global::tracer(crate::init::SCOPE);
    let builder = tracer
        .span_builder(name)
        .with_kind(kind.to_otel())
        .with_start_time(from_unix_ms(start_ms))
        .with_attributes(attributes.into_iter().map(|(key, value)| KeyValue::new(key, value)));
    let mut span = ids::with_chosen(context.trace_id(), context.span_id(), || {
        builder.start_with_context(&tracer, &parent)
    });
    for link in links {
        span.add_link(link.span_context(), Vec::new());
    }
    span.set_status(match outcome {
        Outcome::Ok => Status::Ok,
        Outcome::Failed(text) => Status::error(text),
    });
    span.end_with_timestamp(from_unix_ms(end_ms.max(start_ms)));
}

fn from_unix_ms(ms: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_its_ids_and_times_without_any_subscriber() {
        let root = Step::root("backup");
        let child = root.child("copy files");
        let parent = root.context();
        assert_eq!(child.context().trace_id(), parent.trace_id());
        let record = child.end(&Outcome::Failed("disk full".to_owned()));
        assert_eq!(record.parent_span_id, Some(parent.span_id().to_string()));
        assert_eq!(record.trace_id, parent.trace_id().to_string());
        assert!(!record.ok && record.end_ms >= record.start_ms && record.start_ms > 0);
        let started = root.started(1);
        let record = root.end(&Outcome::Ok);
        assert_eq!((&record.parent_span_id, record.ok), (&None, true));
        let ended = record.report(1, BTreeMap::from([("files".to_owned(), 3)]));
        assert_eq!((ended.span_id, ended.started_at_ms), (started.span_id, started.started_at_ms));
        assert!(ended.ended_at_ms.is_some() && !ended.failed && started.ended_at_ms.is_none());
    }

    #[test]
    fn an_unsampled_parent_stays_unsampled() {
        let parent: TraceContext =
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00".parse().unwrap();
        assert!(!Step::under(&parent, "quiet").context().is_sampled());
    }
}
