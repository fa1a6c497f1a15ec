//! A collector that does not work costs its spans and nothing else: no time of the work, and at most 3 s at the end.
//!
//! Telemetry is the process's: these tests need a process each, as nextest gives them.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a helper that fails, fails its test")]

mod collector;

use std::time::{Duration, Instant};

use collector::{black_hole, hang_up};
use telemetry::{Environment, Guard, LogFormat, Options, OtlpOptions, Outcome, Step};

/// More than the queue holds, so that it must be full.
const SPANS: u64 = 10_000;
const QUEUE: u16 = 500;
/// For 10,000 spans without optimisation, about 1 s; one export that is waited for takes 10 s.
const WORK: Duration = Duration::from_secs(8);
const LIMIT: Duration = Duration::from_secs(3);
/// What a busy machine may add to the limit.
const SLACK: Duration = Duration::from_secs(2);

fn start(endpoint: &str) -> Guard {
    let otlp = OtlpOptions { queue_size: Some(QUEUE.into()), ..OtlpOptions::to(endpoint) };
    let options = Options {
        service_name: "pgmuster-worker".to_owned(),
        instance: "w".to_owned(),
        log_format: LogFormat::Human,
        log_filter: "off".to_owned(),
        otlp: Some(otlp),
        environment: Environment::default(),
    };
    telemetry::init(&options).unwrap()
}

fn work() -> Duration {
    let since = Instant::now();
    let root = Step::root("job");
    for _ in 1..SPANS {
        root.child("step").end(&Outcome::Ok);
    }
    root.end(&Outcome::Ok);
    since.elapsed()
}

async fn costs_its_spans_only(endpoint: &str) {
    let guard = start(endpoint);
    let worked = work();
    assert!(worked < WORK, "{worked:?}");
    let counts = guard.counts();
    assert!(counts.dropped > 0 && counts.pending <= QUEUE.into(), "{counts:?}");

    let since = Instant::now();
    let counts = guard.shutdown(Duration::from_mins(1)).await;
    let took = since.elapsed();
    assert!(took < LIMIT + SLACK, "asked for 60 s, never gives more than 3: {took:?}");
    assert_eq!(counts.exported, 0);
    let total = counts.dropped + counts.failed + counts.pending;
    assert_eq!(total, SPANS, "every span is accounted for: {counts:?}");

    // After the end, spans are dropped and counted; nothing panics, nothing waits.
    let since = Instant::now();
    Step::root("late").end(&Outcome::Ok);
    assert!(since.elapsed() < Duration::from_secs(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_accepts_and_never_answers() {
    costs_its_spans_only(&black_hole()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_hangs_up() {
    costs_its_spans_only(&hang_up()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_not_there() {
    // Port 9 is discard, which nobody runs.
    costs_its_spans_only("http://127.0.0.1:9").await;
}

#[tokio::test]
async fn a_runtime_with_one_thread_is_not_held_up_by_the_shutdown() {
    let guard = start(&black_hole());
    Step::root("job").end(&Outcome::Ok);
    let since = Instant::now();
    let shutdown = tokio::spawn(guard.shutdown(LIMIT));
    let mut ticks = 0;
    while !shutdown.is_finished() {
        tokio::time::sleep(Duration::from_millis(10)).await;
        ticks += 1;
    }
    assert!(since.elapsed() < LIMIT + SLACK);
    assert!(ticks > 50, "the runtime went on: {ticks} ticks");
}

#[test]
fn the_end_of_the_process_does_not_wait_for_the_collector() {
    // The guard is dropped without a shutdown, as after a failed start: nothing may block.
    let guard = start(&black_hole());
    Step::root("job").end(&Outcome::Ok);
    let since = Instant::now();
    drop(guard);
    assert!(since.elapsed() < Duration::from_secs(1));
}
