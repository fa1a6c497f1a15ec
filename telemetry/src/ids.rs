//! Where trace and span ids come from: random by default, or the ones already written into the catalog.
//!
//! The SDK offers no way to build a span with a given id, so the generator looks at a value that the calling thread
//! has put there for the length of one synchronous call.

use std::cell::Cell;

use opentelemetry::trace::{SpanId, TraceId};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator};

thread_local! {
    static CHOSEN: Cell<Option<(TraceId, SpanId)>> = const { Cell::new(None) };
}

/// A random trace id.
pub(crate) fn trace_id() -> TraceId {
    RandomIdGenerator::default().new_trace_id()
}

/// A random span id.
pub(crate) fn span_id() -> SpanId {
    RandomIdGenerator::default().new_span_id()
}

/// Runs `build`; the one span it starts gets `span_id`, and `trace_id` if it has no parent.
pub(crate) fn with_chosen<T>(trace_id: TraceId, span_id: SpanId, build: impl FnOnce() -> T) -> T {
    /// Clears the choice even when `build` unwinds: a later span must not inherit it.
    struct Clear;
    impl Drop for Clear {
        fn drop(&mut self) {
            CHOSEN.set(None);
        }
    }
    CHOSEN.set(Some((trace_id, span_id)));
    let _clear = Clear;
    build()
}

/// The generator given to the SDK.
#[derive(Debug, Default)]
pub(crate) struct ChosenIds(RandomIdGenerator);

impl IdGenerator for ChosenIds {
    fn new_trace_id(&self) -> TraceId {
        CHOSEN.get().map_or_else(|| self.0.new_trace_id(), |(trace, _)| trace)
    }

    fn new_span_id(&self) -> SpanId {
        CHOSEN.get().map_or_else(|| self.0.new_span_id(), |(_, span)| span)
    }
}
