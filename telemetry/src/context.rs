//! The trace context that travels with a job: W3C `traceparent`, parsed strictly.
//!
//! `tracestate` is not carried: nobody in the fleet has vendor state to hand on, and an empty one breaks consumers.

use std::fmt;
use std::str::FromStr;

use opentelemetry::Context;
use opentelemetry::trace::{SpanContext, TraceContextExt, TraceFlags, TraceState};
use proto::{AttemptId, JobId};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use tracing_opentelemetry::OpenTelemetrySpanExt;

pub use opentelemetry::trace::{SpanId, TraceId};

/// One point in a trace: which trace, which span, and whether anybody records it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceContext {
    trace_id: TraceId,
    span_id: SpanId,
    sampled: bool,
}

/// Why a text is not a `traceparent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseTraceContextError {
    /// Not `VERSION-TRACE-SPAN-FLAGS` with 2, 32, 16 and 2 lowercase hexadecimal digits.
    #[error(
        "read the traceparent: not four fields of 2, 32, 16 and 2 lowercase hexadecimal digits"
    )]
    Shape,
    /// Version `ff` is forbidden; version `00` ends after the flags.
    #[error("read the traceparent: its version is not supported")]
    Version,
    /// An id of zeros stands for "no trace".
    #[error("read the traceparent: an id is all zeros")]
    ZeroId,
}

impl TraceContext {
    /// A context from its parts. `None` when an id is all zeros, which W3C forbids.
    pub fn new(trace_id: TraceId, span_id: SpanId, sampled: bool) -> Option<Self> {
        (trace_id != TraceId::INVALID && span_id != SpanId::INVALID).then_some(Self {
            trace_id,
            span_id,
            sampled,
        })
    }

    /// The root of a job's trace: the job's own id is the trace id, so that whoever knows one knows the other, and
    /// the coordinator can emit the job's span at the end under the id its children named all along.
    pub fn of_job(job: JobId) -> Self {
        let bytes = *job.as_bytes();
        Self { trace_id: TraceId::from_bytes(bytes), span_id: tail(&bytes), sampled: true }
    }

    /// The span of one attempt inside its job's trace.
    pub fn of_attempt(job: JobId, attempt: AttemptId) -> Self {
        Self::of_job(job).with_span(tail(attempt.as_bytes()))
    }

    /// The trace this thread is in, when a span of ours is entered and telemetry is initialised.
    pub fn current() -> Option<Self> {
        Self::of_span(&tracing::Span::current())
    }

    /// The context of a tracing span. This starts it: [`set_parent`] has no effect afterwards.
    pub fn of_span(span: &tracing::Span) -> Option<Self> {
        let context = span.context();
        let inner = context.span();
        let found = inner.span_context();
        Self::new(found.trace_id(), found.span_id(), found.is_sampled())
    }

    /// Another span of the same trace.
    #[must_use]
    pub fn with_span(self, span_id: SpanId) -> Self {
        Self { span_id, ..self }
    }

    /// Which trace.
    pub fn trace_id(&self) -> TraceId {
        self.trace_id
    }

    /// Which span in it.
    pub fn span_id(&self) -> SpanId {
        self.span_id
    }

    /// Whether spans below this one are exported.
    pub fn is_sampled(&self) -> bool {
        self.sampled
    }

    pub(crate) fn span_context(&self) -> SpanContext {
        let flags = if self.sampled { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
        SpanContext::new(self.trace_id, self.span_id, flags, true, TraceState::NONE)
    }

    pub(crate) fn as_parent(&self) -> Context {
        Context::new().with_remote_span_context(self.span_context())
    }
}

/// Makes `span` a child of `parent`. Call it between creating the span and entering it: once entered, a span keeps
/// the parent it has, and the answer is `false`. So it is when no telemetry is initialised.
pub fn set_parent(span: &tracing::Span, parent: &TraceContext) -> bool {
    span.set_parent(parent.as_parent()).is_ok()
}

/// Points from `span` to another trace (or another attempt of this one), without becoming its child.
pub fn link(span: &tracing::Span, to: &TraceContext) {
    span.add_link(to.span_context());
}

/// The last eight bytes: the random half of a version 7 UUID, whose variant bits keep it from being zero.
fn tail(bytes: &[u8; 16]) -> SpanId {
    let mut last = [0; 8];
    last.copy_from_slice(&bytes[8..]);
    SpanId::from_bytes(last)
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled))
    }
}

impl fmt::Debug for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TraceContext {
    type Err = ParseTraceContextError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        use ParseTraceContextError::{Shape, Version, ZeroId};

        let head = text.get(..55).ok_or(Shape)?;
        let fields: Vec<&str> = head.split('-').collect();
        let [version, trace, span, flags] = fields[..] else { return Err(Shape) };
        let version = hex::<1>(version).ok_or(Shape)?[0];
        let trace = hex::<16>(trace).ok_or(Shape)?;
        let span = hex::<8>(span).ok_or(Shape)?;
        let flags = hex::<1>(flags).ok_or(Shape)?[0];
        // A later version may add fields, which must begin with a dash; version 0 has none.
        let rest = &text[55..];
        if version == 0xff || (version == 0 && !rest.is_empty()) {
            return Err(Version);
        }
        if !rest.is_empty() && !rest.starts_with('-') {
            return Err(Shape);
        }
        Self::new(TraceId::from_bytes(trace), SpanId::from_bytes(span), flags & 1 == 1)
            .ok_or(ZeroId)
    }
}

/// Exactly `N` bytes in lowercase hexadecimal.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(bytes)
}

impl Serialize for TraceContext {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TraceContext {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_example_of_the_standard_round_trips() {
        let context: TraceContext = GOOD.parse().unwrap();
        assert_eq!(context.to_string(), GOOD);
        assert_eq!(context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(context.span_id().to_string(), "00f067aa0ba902b7");
        assert!(context.is_sampled());
        assert_eq!(serde_json::from_str::<TraceContext>(&format!("\"{GOOD}\"")).unwrap(), context);
        assert_eq!(serde_json::to_string(&context).unwrap(), format!("\"{GOOD}\""));
    }

    #[test]
    fn everything_else_is_refused() {
        use ParseTraceContextError::{Shape, Version, ZeroId};
        let upper = GOOD.to_uppercase();
        let cases: &[(&str, ParseTraceContextError)] = &[
            ("", Shape),
            (&GOOD[..54], Shape),
            (&upper, Shape),
            ("00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-001", Shape),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736x00f067aa0ba902b7-01", Shape),
            ("00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01", Shape),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-extra", Version),
            ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", Version),
            ("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01x", Shape),
            ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", ZeroId),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", ZeroId),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0\u{e9}", Shape),
        ];
        for (text, why) in cases {
            assert_eq!(text.parse::<TraceContext>(), Err(*why), "{text:?}");
        }
    }

    #[test]
    fn a_later_version_is_read_as_far_as_we_know_it() {
        let context: TraceContext =
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03-more".parse().unwrap();
        assert_eq!(context.to_string(), GOOD);
    }

    #[test]
    fn a_job_and_its_attempts_have_the_same_trace_and_known_spans() {
        let job = JobId::mint(1_790_000_000_000, [7; 10]);
        let attempt = AttemptId::mint(1_790_000_000_001, [9; 10]);
        let root = TraceContext::of_job(job);
        assert_eq!(root.trace_id().to_string(), job.to_string().replace('-', ""));
        let child = TraceContext::of_attempt(job, attempt);
        assert_eq!(child.trace_id(), root.trace_id());
        assert_ne!(child.span_id(), root.span_id());
        assert_ne!(TraceContext::of_job(JobId::mint(0, [0; 10])).span_id(), SpanId::INVALID);
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_accepts_only_what_it_prints(text in ".{0,70}") {
            if let Ok(context) = text.parse::<TraceContext>() {
                prop_assert_eq!(context.to_string().parse::<TraceContext>().unwrap(), context);
            }
        }

        #[test]
        fn every_context_round_trips(trace in 1u128.., span in 1u64.., sampled: bool) {
            let context = TraceContext::new(trace.into(), span.into(), sampled).unwrap();
            prop_assert_eq!(context.to_string().parse::<TraceContext>().unwrap(), context);
        }
    }
}
