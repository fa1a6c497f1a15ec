//! Switching telemetry on at the start of the process and off at its end.
//!
//! Once per process: the subscriber and the tracer are the process's. Spans are exported by a thread of its own
//! through a blocking client, so that no async runtime of ours ever waits for a collector, nor can deadlock with it.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider,
};
use prometheus_client::registry::Registry;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::environment::Environment;
use crate::export::{Counting, ExportCounts, Queue, Tally};
use crate::ids::ChosenIds;
use crate::logs::{self, LogFormat};
use crate::metrics;
use crate::redact::scrub;

/// The instrumentation scope of every span.
pub(crate) const SCOPE: &str = "pgmuster";

/// Whose tracing spans are exported, from level INFO on. Libraries are left out: an exporter that traced its own HTTP client would feed
/// itself.
const TRACED: [&str; 13] = [
    "broker",
    "cli",
    "coordinator",
    "maintenance",
    "pgmuster",
    "policy",
    "postgres",
    "proto",
    "repository",
    "story",
    "telemetry",
    "tests",
    "worker",
];

/// What is not logged unless the filter names it. lapin writes whole messages that were returned into its warnings; what
/// matters of them is told by the broker crate.
const QUIET: &str = "lapin=off";

/// Spans that may wait for a slow collector. At a few hundred bytes each that is well under 2 MiB.
const QUEUE_SIZE: usize = 2_048;
/// Spans sent together.
const BATCH_SIZE: usize = 512;
/// How long a span waits for others to travel with.
const SCHEDULE_DELAY: Duration = Duration::from_secs(2);
/// One export, retries included.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// No shutdown waits longer, whatever is asked for.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(3);

/// What to switch on.
#[derive(Debug, Clone)]
pub struct Options {
    /// `pgmuster-worker`, unless the environment says otherwise.
    pub service_name: String,
    /// Which process of that service: the worker's name, or the host's.
    pub instance: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Which log lines are written, in the syntax of `tracing_subscriber::EnvFilter`: `info`, `info,worker=debug`. Those of
    /// lapin, which may hold bodies of messages, only when it is named: `info,lapin=warn`.
    pub log_filter: String,
    /// Where spans go; `None` unless the environment names an endpoint.
    pub otlp: Option<OtlpOptions>,
    /// The standard variables; stronger than the fields above.
    pub environment: Environment,
}

/// Where spans go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtlpOptions {
    /// Base URL of a collector that speaks OTLP over HTTP, `http://collector:4318`; `/v1/traces` is appended.
    pub endpoint: String,
    /// Headers of every export, such as an API key.
    pub headers: Vec<(String, String)>,
    /// Limit for one export, retries included; 10 s by default.
    pub timeout: Option<Duration>,
    /// Spans that may wait; more are dropped and counted. 2,048 by default.
    pub queue_size: Option<usize>,
}

impl OtlpOptions {
    /// Everything but the endpoint by default.
    pub fn to(endpoint: impl Into<String>) -> Self {
        Self { endpoint: endpoint.into(), headers: Vec::new(), timeout: None, queue_size: None }
    }
}

/// Why telemetry could not be switched on.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The log filter is not in the syntax of `EnvFilter`.
    #[error("read the log filter {filter:?}: {reason}")]
    Filter {
        /// As configured.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Only `http/protobuf` is spoken.
    #[error(
        "export spans over {protocol:?}: set OTEL_EXPORTER_OTLP_PROTOCOL to http/protobuf and use the collector's HTTP port, usually 4318"
    )]
    Protocol {
        /// As configured.
        protocol: String,
    },
    /// The sampler's name or argument is unknown.
    #[error(
        "set up the sampler {sampler:?}: use always_on, always_off, traceidratio, parentbased_always_on, parentbased_always_off or parentbased_traceidratio, with a ratio from 0 to 1"
    )]
    Sampler {
        /// As configured.
        sampler: String,
    },
    /// The exporter refused its configuration, usually the endpoint.
    #[error("set up the span exporter for {endpoint}: {reason}")]
    Exporter {
        /// As configured, scrubbed.
        endpoint: String,
        /// What is wrong, scrubbed.
        reason: String,
    },
    /// Telemetry was switched on before, by us or by a test.
    #[error("install the log subscriber: the process has one already")]
    AlreadyInstalled,
}

/// Keeps telemetry on. Dropping it changes nothing; [`Guard::shutdown`] sends what is still queued.
#[derive(Debug)]
pub struct Guard {
    provider: SdkTracerProvider,
    tally: Arc<Tally>,
}

/// Switches telemetry on for this process: log lines to standard error, spans to the collector if there is one.
///
/// Call it once, early, from any thread.
pub fn init(options: &Options) -> Result<Guard, TelemetryError> {
    let filter = filter(&options.log_filter)?;
    let tally = Arc::new(Tally::default());
    let provider = provider(options, &tally)?;

    let ansi = std::io::stderr().is_terminal();
    let lines = logs::layer(options.log_format, ansi, std::io::stderr).with_filter(filter);
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(SCOPE))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_filter(Targets::new().with_targets(TRACED.map(|target| (target, LevelFilter::INFO))));
    let subscriber = tracing_subscriber::registry().with(spans).with(lines);
    tracing::subscriber::set_global_default(subscriber)
        .map_err(|_| TelemetryError::AlreadyInstalled)?;
    opentelemetry::global::set_tracer_provider(provider.clone());
    Ok(Guard { provider, tally })
}

impl Guard {
    /// What became of the spans so far.
    pub fn counts(&self) -> ExportCounts {
        self.tally.counts()
    }

    /// Adds the figures of span export to what `/metrics` shows.
    pub fn register(&self, registry: &mut Registry) {
        metrics::register_export(registry, Arc::clone(&self.tally));
    }

    /// Sends what is queued and stops exporting, within `limit` and never longer than 3 s: a collector that does not
    /// answer costs its spans, not our exit. Log lines keep being written. Call it after the work is drained.
    ///
    /// The waiting happens on a thread of its own, so the caller's runtime may be single-threaded or stopping.
    pub async fn shutdown(self, limit: Duration) -> ExportCounts {
        let tally = Arc::clone(&self.tally);
        let (done, waits) = tokio::sync::oneshot::channel();
        let thread = std::thread::Builder::new().name("telemetry-shutdown".to_owned());
        let spawned = thread.spawn(move || {
            // The receiver may have given up waiting: nothing depends on it.
            let _ = done.send(self.shutdown_blocking(limit));
        });
        match spawned {
            Ok(_detached) => waits.await.unwrap_or_else(|_| tally.counts()),
            Err(_) => tally.counts(),
        }
    }

    /// The same for a thread that may block.
    pub fn shutdown_blocking(self, limit: Duration) -> ExportCounts {
        // An error means that the time is over or the collector refused; the counts tell which.
        let _ = self.provider.shutdown_with_timeout(limit.min(SHUTDOWN_LIMIT));
        self.tally.counts()
    }
}

/// The configured filter behind [`QUIET`]: of two directives for one target the later counts.
fn filter(configured: &str) -> Result<EnvFilter, TelemetryError> {
    // What an empty filter means by itself, which it no longer would behind another directive.
    let rest = if configured.trim().is_empty() { "error" } else { configured };
    EnvFilter::builder().parse(format!("{QUIET},{rest}")).map_err(|error| TelemetryError::Filter {
        filter: configured.to_owned(),
        reason: error.to_string(),
    })
}

fn provider(options: &Options, tally: &Arc<Tally>) -> Result<SdkTracerProvider, TelemetryError> {
    let environment = &options.environment;
    let builder = SdkTracerProvider::builder()
        .with_resource(resource(options))
        .with_id_generator(ChosenIds::default())
        .with_sampler(sampler(environment)?);
    let Some(target) = Target::of(options)? else {
        return Ok(builder.build());
    };
    let exporter = Counting::new(target.exporter()?, Arc::clone(tally));
    let config = BatchConfigBuilder::default()
        .with_max_queue_size(target.queue_size)
        .with_max_export_batch_size(
            environment.batch_size.unwrap_or(BATCH_SIZE).min(target.queue_size),
        )
        .with_scheduled_delay(environment.schedule_delay.unwrap_or(SCHEDULE_DELAY))
        .build();
    let batches = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
    Ok(builder
        .with_span_processor(Queue::new(batches, target.queue_size, Arc::clone(tally)))
        .build())
}

fn resource(options: &Options) -> Resource {
    let environment = &options.environment;
    let name = environment.service_name.as_ref().unwrap_or(&options.service_name);
    let named = environment.resource_attributes.iter().cloned();
    Resource::builder_empty()
        .with_attributes([
            KeyValue::new("service.namespace", "pgmuster"),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", options.instance.clone()),
        ])
        .with_attributes(named.map(|(key, value)| KeyValue::new(key, value)))
        .with_attribute(KeyValue::new("service.name", name.clone()))
        .build()
}

fn sampler(environment: &Environment) -> Result<Sampler, TelemetryError> {
    let Some(name) = environment.sampler.as_deref() else {
        return Ok(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)));
    };
    let unknown = || TelemetryError::Sampler { sampler: name.to_owned() };
    let (parent_based, kind) = match name.strip_prefix("parentbased_") {
        Some(kind) => (true, kind),
        None => (false, name),
    };
    let sampler = match kind {
        "always_on" => Sampler::AlwaysOn,
        "always_off" => Sampler::AlwaysOff,
        "traceidratio" => {
            let ratio = environment.sampler_argument.as_deref().unwrap_or("1").parse::<f64>();
            let ratio = ratio.ok().filter(|ratio| (0.0..=1.0).contains(ratio));
            Sampler::TraceIdRatioBased(ratio.ok_or_else(unknown)?)
        }
        _ => return Err(unknown()),
    };
    Ok(if parent_based { Sampler::ParentBased(Box::new(sampler)) } else { sampler })
}

/// Where spans go once file and environment are weighed.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    /// The whole URL of the traces signal.
    url: String,
    headers: Vec<(String, String)>,
    timeout: Duration,
    queue_size: usize,
}

impl Target {
    /// `None` when nobody named an endpoint or exporting is switched off. There is no default endpoint: a process
    /// that nobody told of a collector talks to nobody.
    fn of(options: &Options) -> Result<Option<Self>, TelemetryError> {
        let environment = &options.environment;
        if environment.disabled || environment.traces_exporter.as_deref() == Some("none") {
            return Ok(None);
        }
        let base = environment
            .endpoint
            .as_ref()
            .or_else(|| options.otlp.as_ref().map(|otlp| &otlp.endpoint));
        let appended = |base: &String| format!("{}/v1/traces", base.trim_end_matches('/'));
        let Some(url) = environment.traces_endpoint.clone().or_else(|| base.map(appended)) else {
            return Ok(None);
        };
        match environment.protocol.as_deref() {
            None | Some("http/protobuf") => {}
            Some(other) => return Err(TelemetryError::Protocol { protocol: other.to_owned() }),
        }
        let mut headers = options.otlp.as_ref().map_or_else(Vec::new, |otlp| otlp.headers.clone());
        headers.extend(environment.headers.iter().cloned());
        let from_file = options.otlp.as_ref();
        let timeout = environment.timeout.or_else(|| from_file.and_then(|otlp| otlp.timeout));
        let queue_size =
            environment.queue_size.or_else(|| from_file.and_then(|otlp| otlp.queue_size));
        Ok(Some(Self {
            url,
            headers,
            timeout: timeout.unwrap_or(EXPORT_TIMEOUT),
            queue_size: queue_size.unwrap_or(QUEUE_SIZE).max(1),
        }))
    }

    fn exporter(&self) -> Result<SpanExporter, TelemetryError> {
        let failed = |reason: String| TelemetryError::Exporter {
            endpoint: scrub(&self.url).into_owned(),
            reason: scrub(&reason).into_owned(),
        };
        if !self.url.starts_with("http://") && !self.url.starts_with("https://") {
            return Err(failed("the URL must begin with http:// or https://".to_owned()));
        }
        let timeout = self.timeout;
        // A blocking client may not be made on a thread of an async runtime, so it is made on one of its own.
        let made = std::thread::spawn(move || {
            reqwest::blocking::Client::builder()
                .timeout(timeout)
                .connect_timeout(timeout)
                // Headers may be credentials; they go to the endpoint that was named and nowhere else.
                .redirect(reqwest::redirect::Policy::none())
                .build()
        });
        let client = made
            .join()
            .map_err(|_| failed("the HTTP client could not be made".to_owned()))?
            .map_err(|error| failed(proto::failure::chain(&error)))?;
        SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
            .with_endpoint(&self.url)
            .with_timeout(self.timeout)
            .with_headers(self.headers.iter().cloned().collect())
            .build()
            .map_err(|error| failed(proto::failure::chain(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(otlp: Option<OtlpOptions>, environment: Environment) -> Options {
        Options {
            service_name: "pgmuster-worker".to_owned(),
            instance: "w1".to_owned(),
            log_format: LogFormat::Human,
            log_filter: "info".to_owned(),
            otlp,
            environment,
        }
    }

    fn url(otlp: Option<&str>, environment: Environment) -> Option<String> {
        let target = Target::of(&options(otlp.map(OtlpOptions::to), environment)).unwrap();
        target.map(|target| target.url)
    }

    #[test]
    fn lapin_is_quiet_unless_the_filter_names_it() {
        let enabled = |configured: &str| {
            let subscriber = tracing_subscriber::registry().with(filter(configured).unwrap());
            tracing::subscriber::with_default(subscriber, || {
                let lapin = tracing::enabled!(target: "lapin::channel", tracing::Level::WARN);
                let ours = tracing::enabled!(target: "worker", tracing::Level::WARN);
                (lapin, ours)
            })
        };
        assert_eq!(enabled("info"), (false, true));
        assert_eq!(enabled("trace"), (false, true));
        assert_eq!(enabled("info,lapin=warn"), (true, true));
        assert_eq!(enabled("error,worker=debug"), (false, true));
        assert_eq!(enabled("off"), (false, false));
        assert_eq!(filter("").unwrap().max_level_hint(), Some(LevelFilter::ERROR));
        let error = filter("info,worker=loud").unwrap_err().to_string();
        assert!(error.contains("\"info,worker=loud\""), "only what was configured: {error}");
    }

    #[test]
    fn nobody_is_talked_to_unless_somebody_named_them() {
        assert_eq!(url(None, Environment::default()), None);
        let off = Environment { disabled: true, ..Default::default() };
        assert_eq!(url(Some("http://c:4318"), off), None);
        let none = Environment { traces_exporter: Some("none".to_owned()), ..Default::default() };
        assert_eq!(url(Some("http://c:4318"), none), None);
    }

    #[test]
    fn the_environment_is_stronger_and_the_url_of_the_signal_is_used_as_it_is() {
        assert_eq!(
            url(Some("http://file:4318/"), Environment::default()).as_deref(),
            Some("http://file:4318/v1/traces")
        );
        let general = Environment { endpoint: Some("http://env".to_owned()), ..Default::default() };
        assert_eq!(url(Some("http://file"), general).as_deref(), Some("http://env/v1/traces"));
        let signal = Environment {
            endpoint: Some("http://env".to_owned()),
            traces_endpoint: Some("http://env/own".to_owned()),
            ..Default::default()
        };
        assert_eq!(url(None, signal).as_deref(), Some("http://env/own"));
    }

    #[test]
    fn what_cannot_work_is_refused_with_its_reason() {
        let grpc = Environment { protocol: Some("grpc".to_owned()), ..Default::default() };
        let error = Target::of(&options(Some(OtlpOptions::to("http://c")), grpc)).unwrap_err();
        assert!(error.to_string().contains("http/protobuf"), "{error}");

        let sampled = |name: &str, argument: Option<&str>| {
            sampler(&Environment {
                sampler: Some(name.to_owned()),
                sampler_argument: argument.map(str::to_owned),
                ..Default::default()
            })
        };
        assert!(sampled("parentbased_traceidratio", Some("0.25")).is_ok());
        assert!(sampled("always_off", None).is_ok());
        assert!(sampled("traceidratio", Some("2")).is_err());
        assert!(sampled("jaeger_remote", None).is_err());

        let target = Target::of(&options(
            Some(OtlpOptions::to("ftp://u:hunter2@c")),
            Environment::default(),
        ));
        let error = target.unwrap().unwrap().exporter().unwrap_err().to_string();
        assert!(error.contains("http://") && !error.contains("hunter2"), "{error}");
    }
}
