//! One trace from the order to the last step, across the queue; and a collector that does not answer changes nothing.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::ensure;
use postgres::instance::InstanceOptions;
use tests::{Cluster, Fleet, Place, Vhost, WorkerSetup};

/// A collector that keeps what it is sent.
#[derive(Clone)]
struct Collector {
    port: u16,
    bodies: Arc<Mutex<Vec<u8>>>,
}

impl Collector {
    fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&bodies);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let kept = Arc::clone(&kept);
                std::thread::spawn(move || {
                    let mut buffer = vec![0; 65_536];
                    while let Ok(n) = stream.read(&mut buffer) {
                        if n == 0 {
                            return;
                        }
                        kept.lock().unwrap_or_else(PoisonError::into_inner).extend(&buffer[..n]);
                        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                        if stream.write_all(answer).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Ok(Self { port, bodies })
    }

    fn has(&self, bytes: &[u8]) -> bool {
        let bodies = self.bodies.lock().unwrap_or_else(PoisonError::into_inner);
        bodies.windows(bytes.len()).any(|window| window == bytes)
    }
}

/// A collector that takes connections and never says anything.
fn black_hole() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        let silent: Vec<_> = listener.incoming().flatten().collect();
        drop(silent);
    });
    Ok(port)
}

fn exporting(setup: WorkerSetup<'_>, port: u16) -> WorkerSetup<'_> {
    let mut setup = setup;
    setup.environment.push(("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://127.0.0.1:{port}")));
    setup
}

#[tokio::test(flavor = "multi_thread")]
async fn the_spans_of_a_job_arrive_under_its_own_trace() -> anyhow::Result<()> {
    let (vhost, collector) = (Vhost::create()?, Collector::start()?);
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    let setup = exporting(WorkerSetup::of("w1", "orders", cluster.url()), collector.port);
    fleet.start_worker(&setup)?;
    let job = fleet.order(&["backup", "orders"])?;
    fleet.await_state(job, &["succeeded"], Duration::from_mins(1))?;
    // OTLP carries ids as bytes and names as text.
    tests::eventually("the job's spans to arrive", Duration::from_secs(30), || {
        let all = collector.has(job.as_bytes())
            && ["copy", "store_wal", "commit"].iter().all(|step| collector.has(step.as_bytes()));
        Ok(all.then_some(()))
    })?;
    let trace = fleet.json(&["job", "trace", &job.to_string(), "-o", "json"])?;
    ensure!(trace["trace_id"] == job.to_string().replace('-', ""), "{trace}");
    let steps = trace["attempts"][0]["steps"].as_array().cloned().unwrap_or_default();
    let spans: BTreeSet<&str> = steps.iter().filter_map(|step| step["span_id"].as_str()).collect();
    ensure!(spans.len() == steps.len() && !spans.is_empty(), "each step has a span: {trace}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_never_answers_holds_nobody_up() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    let setup = exporting(WorkerSetup::of("w1", "orders", cluster.url()), black_hole()?);
    fleet.start_worker(&setup)?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    let told = Instant::now();
    fleet.worker("w1")?.terminate()?;
    tests::eventually("the worker to end", Duration::from_secs(30), || {
        Ok(fleet.worker("w1")?.has_ended()?.then_some(()))
    })?;
    // Three seconds are what the last spans may cost; the rest is a loaded machine.
    ensure!(told.elapsed() < Duration::from_secs(20), "it took {:?}", told.elapsed());
    Ok(())
}
