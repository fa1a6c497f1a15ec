//! How the work is seen: log lines, spans with one trace a job, Prometheus text, and the rule that no secret leaves.
//!
//! Exporting never delays work: spans go into a bounded queue and are dropped, and counted, when the collector does
//! not keep up. Nothing here knows a business metric, and nothing here reads the environment: the caller hands in
//! what it found ([`Environment`]).

mod clock;
mod context;
mod environment;
mod export;
mod ids;
mod init;
mod logs;
pub mod metrics;
pub mod redact;
mod step;

pub use context::{ParseTraceContextError, SpanId, TraceContext, TraceId, link, set_parent};
pub use environment::Environment;
pub use export::ExportCounts;
pub use init::{Guard, Options, OtlpOptions, TelemetryError, init};
pub use logs::LogFormat;
pub use redact::{Redacted, scrub, scrub_error};
pub use step::{Attribute, FinishedSpan, Kind, Outcome, Step, StepRecord, emit_span};
