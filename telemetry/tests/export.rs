//! Spans really arrive at a collector: with the ids the report keeps, below the right parent, without secrets.
//!
//! Telemetry is the process's: these tests need a process each, as nextest gives them.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a helper that fails, fails its test")]

mod collector;

use std::time::Duration;

use collector::{Collector, attribute, hex};
use opentelemetry_proto::tonic::trace::v1::{span::SpanKind, status::StatusCode};
use proto::{Action, AttemptId, Code, Failure, JobId};
use telemetry::{
    Attribute, Environment, FinishedSpan, Guard, Kind, LogFormat, Options, OtlpOptions, Outcome,
    Step, TraceContext, emit_span,
};
use tracing::Instrument;

const LIMIT: Duration = Duration::from_secs(3);

fn options(endpoint: Option<&str>) -> Options {
    Options {
        service_name: "pgmuster-worker".to_owned(),
        instance: "fra1-a".to_owned(),
        log_format: LogFormat::Human,
        // Log lines and spans are filtered apart: no line is written here, every span is exported.
        log_filter: "off".to_owned(),
        otlp: endpoint.map(OtlpOptions::to),
        environment: Environment::default(),
    }
}

fn start(collector: &Collector) -> Guard {
    telemetry::init(&options(Some(&collector.endpoint))).unwrap()
}

fn job() -> (JobId, AttemptId) {
    (JobId::mint(1_790_000_000_000, [7; 10]), AttemptId::mint(1_790_000_000_900, [9; 10]))
}

#[tokio::test]
async fn steps_arrive_with_the_ids_and_times_of_the_report() {
    let collector = Collector::start();
    let guard = start(&collector);
    let (job, attempt) = job();
    let root = TraceContext::of_job(job);
    let own = TraceContext::of_attempt(job, attempt);

    let attempt_step = Step::with_ids(&own, &root, "attempt 1");
    assert_eq!(attempt_step.context(), own);
    attempt_step.set("cluster", "orders");
    let copy = attempt_step.child("copy files");
    copy.set("read_bytes", 41_u64);
    async {
        assert_eq!(TraceContext::current(), Some(copy.context()));
        tracing::info!(target: "worker", files = 3, "Copied");
        tokio::task::yield_now().await;
        let inner = tracing::info_span!(target: "worker", "read_file");
        inner.in_scope(|| tracing::debug!(target: "worker", "too fine to export"));
    }
    .instrument(copy.span().clone())
    .await;
    let copied = copy.end(&Outcome::Ok);
    let failure = Failure::new(Code::StoreForbidden, Action::FixConfig, "put pack 7: refused");
    let attempted = attempt_step.end(&Outcome::of(&failure));
    let counts = guard.shutdown(LIMIT).await;
    assert_eq!((counts.exported, counts.dropped, counts.failed, counts.pending), (3, 0, 0, 0));

    for record in [&copied, &attempted] {
        let span = collector.span(&record.name);
        assert_eq!(hex(&span.trace_id), record.trace_id);
        assert_eq!(hex(&span.trace_id), job.to_string().replace('-', ""));
        assert_eq!(hex(&span.span_id), record.span_id);
        assert_eq!(Some(hex(&span.parent_span_id)), record.parent_span_id);
        assert_eq!(span.end_time_unix_nano / 1_000_000, u64::try_from(record.end_ms).unwrap());
        let start_ms = span.start_time_unix_nano / 1_000_000;
        assert!(start_ms.abs_diff(u64::try_from(record.start_ms).unwrap()) <= 5, "{start_ms}");
    }
    let span = collector.span("copy files");
    assert_eq!(attribute(&span, "read_bytes").as_deref(), Some("41"));
    assert_eq!(attribute(&span, "trace.id"), None, "a field of log lines only");
    assert_eq!(span.events.len(), 1, "the log line inside is an event of the span");
    assert_eq!(span.status.unwrap_or_default().code, StatusCode::Unset as i32);
    let inner = collector.span("read_file");
    assert!(inner.events.is_empty());
    assert_eq!(hex(&inner.parent_span_id), copied.span_id);
    let failed = collector.span("attempt 1").status.unwrap();
    assert_eq!(failed.code, StatusCode::Error as i32);
    assert_eq!(failed.message, "STORE_FORBIDDEN: put pack 7: refused");

    let export = &collector.exports()[0];
    assert_eq!(export.path, "POST /v1/traces");
    let resource = export.request.resource_spans[0].resource.clone().unwrap();
    let named = |key: &str| resource.attributes.iter().any(|attribute| attribute.key == key);
    assert!(named("service.name") && named("service.instance.id") && named("service.version"));
}

#[tokio::test]
async fn the_coordinator_tells_of_a_job_at_its_end_and_links_are_kept() {
    let collector = Collector::start();
    let guard = start(&collector);
    let (job, attempt) = job();
    let root = TraceContext::of_job(job);
    let before: TraceContext =
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".parse().unwrap();
    let finished = |name: &str, context, parent, outcome| FinishedSpan {
        name: name.to_owned(),
        context,
        parent,
        kind: Kind::Internal,
        start_ms: 1_790_000_000_000,
        end_ms: 1_790_028_800_000,
        outcome,
        attributes: vec![("cluster", Attribute::from("orders")), ("bytes", 7_u64.into())],
        links: vec![before],
    };
    emit_span(finished("backup orders", root, None, Outcome::Ok));
    let lost = Outcome::Failed("WORKER_LOST: no heartbeat since 90 s".to_owned());
    let own = TraceContext::of_attempt(job, attempt);
    emit_span(finished("attempt 1", own, Some(root.span_id()), lost));
    let unsampled: TraceContext =
        "00-00000000000000000000000000000001-0000000000000001-00".parse().unwrap();
    emit_span(finished("unsampled", unsampled, None, Outcome::Ok));
    assert_eq!(guard.shutdown(LIMIT).await.exported, 2);

    let span = collector.span("backup orders");
    assert_eq!(hex(&span.trace_id), root.trace_id().to_string());
    assert_eq!(hex(&span.span_id), root.span_id().to_string());
    assert!(span.parent_span_id.iter().all(|byte| *byte == 0));
    assert_eq!(span.start_time_unix_nano, 1_790_000_000_000_000_000);
    assert_eq!(span.end_time_unix_nano, 1_790_028_800_000_000_000);
    assert_eq!(hex(&span.links[0].span_id), before.span_id().to_string());
    assert_eq!(hex(&span.links[0].trace_id), before.trace_id().to_string());
    let attempt_span = collector.span("attempt 1");
    assert_eq!(hex(&attempt_span.parent_span_id), root.span_id().to_string());
    assert_eq!(attempt_span.status.unwrap().code, StatusCode::Error as i32);
}

#[tokio::test]
async fn a_trace_crosses_the_queue_as_text() {
    let collector = Collector::start();
    let guard = start(&collector);
    let send = Step::root("send ticket");
    let text = send.context().to_string();
    let received: TraceContext = text.parse().unwrap();
    let process = Step::of_kind(Kind::Consumer, &received, "process ticket");
    let elsewhere = Step::root("elsewhere");
    process.link(&elsewhere.context());
    let span = tracing::info_span!(target: "worker", "by_hand");
    assert!(telemetry::set_parent(&span, &received));
    telemetry::link(&span, &elsewhere.context());
    span.in_scope(|| ());
    assert!(!telemetry::set_parent(&span, &received), "too late once entered");
    drop(span);
    let other = elsewhere.end(&Outcome::Ok);
    process.end(&Outcome::Ok);
    let sent = send.end(&Outcome::Ok);
    guard.shutdown(LIMIT).await;

    for name in ["process ticket", "by_hand"] {
        let span = collector.span(name);
        assert_eq!(
            (hex(&span.trace_id), hex(&span.parent_span_id)),
            (sent.trace_id.clone(), sent.span_id.clone())
        );
        assert_eq!(hex(&span.links[0].span_id), other.span_id, "{name}");
    }
    assert_eq!(collector.span("process ticket").kind, SpanKind::Consumer as i32);
    assert_ne!(hex(&collector.span("elsewhere").trace_id), sent.trace_id);
}

#[tokio::test]
async fn a_span_is_exported_when_it_ends_and_not_when_the_process_does() {
    let collector = Collector::start();
    let mut options = options(Some(&collector.endpoint));
    options.environment.schedule_delay = Some(Duration::from_millis(50));
    let guard = telemetry::init(&options).unwrap();
    let job = Step::root("six hours");
    // Something that goes on holding the tracing span does not hold back its end.
    let step = job.child("claim");
    let held = step.span().clone();
    step.end(&Outcome::Ok);
    let arrived = tokio::task::spawn_blocking(move || {
        collector.wait_for("claim");
        collector
    });
    let collector = arrived.await.unwrap();
    drop(held);
    drop(job);
    let counts = guard.shutdown(LIMIT).await;
    assert_eq!(counts.exported, 2);
    let abandoned = collector.span("six hours").status.unwrap();
    assert_eq!((abandoned.code, &*abandoned.message), (StatusCode::Error as i32, "abandoned"));
}

#[tokio::test]
async fn no_secret_leaves_in_any_part_of_a_span() {
    let collector = Collector::start();
    let guard = start(&collector);
    let step = Step::root("connect to postgres://u:hunter2@db1/orders");
    step.set("password", "hunter2");
    step.set("url", "amqp://u:hunter2@h");
    step.span().in_scope(|| {
        tracing::error!(
            conninfo = "host=h password=hunter2",
            token = "hunter2",
            "PGPASSWORD=hunter2"
        );
    });
    step.end(&Outcome::Failed("Authorization: Bearer hunter2".to_owned()));
    guard.shutdown(LIMIT).await;
    let everything = format!("{:?}", collector.spans());
    assert!(!everything.contains("hunter2"), "{everything}");
    assert!(everything.contains("postgres://u:***@db1/orders"), "{everything}");
}

#[tokio::test]
async fn the_environment_of_opentelemetry_is_honoured() {
    let collector = Collector::start();
    let endpoint = collector.endpoint.clone();
    let mut options = options(Some("http://127.0.0.1:9"));
    options.environment = Environment::read(|name| match name {
        "OTEL_EXPORTER_OTLP_ENDPOINT" => Some(endpoint.clone()),
        "OTEL_EXPORTER_OTLP_HEADERS" => Some("x-tenant=a%20b".to_owned()),
        "OTEL_SERVICE_NAME" => Some("mine".to_owned()),
        "OTEL_RESOURCE_ATTRIBUTES" => Some("team=dba".to_owned()),
        _ => None,
    });
    let guard = telemetry::init(&options).unwrap();
    Step::root("one").end(&Outcome::Ok);
    assert_eq!(guard.shutdown(LIMIT).await.exported, 1);
    let export = &collector.exports()[0];
    assert!(export.headers.contains("x-tenant: a b"), "{}", export.headers);
    let resource = format!("{:?}", export.request.resource_spans[0].resource);
    assert!(resource.contains("\"mine\"") && resource.contains("\"dba\""), "{resource}");
    assert!(!resource.contains("pgmuster-worker"), "{resource}");
}

#[tokio::test]
async fn switched_off_nothing_is_sent_and_steps_still_have_their_ids() {
    let collector = Collector::start();
    let mut options = options(Some(&collector.endpoint));
    options.environment.disabled = true;
    let guard = telemetry::init(&options).unwrap();
    let step = Step::root("quiet");
    let context = step.context();
    let record = step.end(&Outcome::Ok);
    assert_eq!(record.span_id, context.span_id().to_string());
    let counts = guard.shutdown(LIMIT).await;
    assert_eq!(counts, telemetry::ExportCounts::default());
    assert!(collector.exports().is_empty());
    assert!(telemetry::init(&options).is_err(), "once per process");
}
