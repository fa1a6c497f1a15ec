//! The production roles: `coordinator`, `worker`, and enrolling a worker.

use std::path::Path;
use std::time::Duration;

use broker::{Broker, RabbitOptions};
use coordinator::api::types::{EnrolRequest, EnrolResponse, EnrolmentTokenRequest, TokenResponse};
use coordinator::{Clock, Coordinator};
use postgres::Environment;
use proto::envelope::SigningKey;
use proto::{Action, Code, Failure, SecretRef};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use worker::Worker;
use worker::config::WorkerConfig;
use worker::places::Places;

use crate::args::{Output, WorkerArgs, WorkerCommand};
use crate::client::Client;
use crate::exit::Exit;
use crate::{configs, environment, identity, output, secrets};

/// How long a role waits for RabbitMQ before it says that it goes on waiting.
const BROKER_PATIENCE: Duration = Duration::from_secs(10);

/// `coordinator --config FILE`.
pub(crate) async fn coordinator(path: &Path) -> Result<Exit, Failure> {
    let config: coordinator::Config = configs::read(path, coordinator::Config::validate)?;
    let broker = connect(&config.broker.url, config.name.as_str())?;
    let seed_text = secrets::resolve(&config.signing_key)?;
    let seed = identity::seed(seed_text.expose_secret()).ok_or_else(|| {
        Failure::new(
            Code::ConfigInvalid,
            Action::FixConfig,
            format!("{} does not hold 32 bytes as base64", config.signing_key),
        )
        .with_hint("Make a key: head -c 32 /dev/urandom | base64")
    })?;
    let options = coordinator::Options {
        catalog_url: url(&config.catalog.url)?,
        signing_key: SigningKey::from_seed(&seed),
        config,
    };
    let handle = Coordinator::start(options, broker.clone(), Clock::system()).await?;
    tracing::info!(key = %handle.public_key(), "The coordinator is up");
    say_whether_the_broker_answers(&broker).await;
    Signals::listen()?.next().await;
    tracing::info!("Stepping down");
    handle.shutdown().await;
    broker.close().await;
    Ok(Exit::Ok)
}

/// `worker …`.
pub(crate) async fn worker(
    args: WorkerArgs,
    client: impl Fn() -> Result<Client, Failure>,
    format: Output,
) -> Result<Exit, Failure> {
    match (args.command, args.config) {
        (None, Some(config)) => run_worker(&config).await,
        (None, None) => Err(Failure::bug("a worker is run without a configuration")),
        (Some(WorkerCommand::Enroll(args)), _) => {
            let config: WorkerConfig = configs::read(&args.config, WorkerConfig::problems)?;
            let token = if args.enroll_token.as_os_str() == "-" {
                secrets::read("the token on standard input", std::io::stdin())?
            } else {
                secrets::resolve(&SecretRef::File(args.enroll_token.display().to_string()))?
            };
            enroll(&client()?, &config, &token).await?;
            output::talk(&format!("{} is enrolled for site {}", config.name, config.site));
            Ok(Exit::Ok)
        }
        (Some(WorkerCommand::Token(args)), _) => {
            let request =
                EnrolmentTokenRequest { worker: args.worker, site: args.site, valid_ms: None };
            let token: TokenResponse = client()?.post("/v1/workers/tokens", &request).await?;
            output::show(format, &token, |token| token.token.clone());
            Ok(Exit::Ok)
        }
    }
}

async fn enroll(
    client: &Client,
    config: &WorkerConfig,
    token: &SecretString,
) -> Result<(), Failure> {
    let seed = repository::random();
    let request = EnrolRequest {
        token: token.expose_secret().to_owned(),
        public_key: SigningKey::from_seed(&seed).public(),
        worker: Some(config.name.clone()),
        site: Some(config.site.clone()),
    };
    let answer: EnrolResponse = client.post_with_own_right("/v1/workers/enrol", &request).await?;
    let state_dir = config.state_dir.as_std_path();
    identity::store(state_dir, &seed, answer.certificate, answer.coordinator_key)
}

async fn run_worker(path: &Path) -> Result<Exit, Failure> {
    if let Some(text) = environment::variable("PGMUSTER_FAILPOINT") {
        let armed = worker::failpoint::arm(&text);
        tracing::warn!(armed, "This worker will fail on purpose: PGMUSTER_FAILPOINT={text}");
    }
    let config: WorkerConfig = configs::read(path, WorkerConfig::problems)?;
    let credentials = identity::load(config.state_dir.as_std_path())?;
    let places = Places::resolve(&config, &Environment::of_process(), &secrets::resolve)?;
    let broker = connect(&config.broker.url, config.name.as_str())?;
    let worker = Worker::start(config, credentials, places, broker.clone()).await?;
    say_whether_the_broker_answers(&broker).await;
    let mut signals = Signals::listen()?;
    signals.next().await;
    tracing::info!("Draining; a second signal stops at once");
    let now = CancellationToken::new();
    let second = now.clone();
    tokio::spawn(async move {
        signals.next().await;
        second.cancel();
    });
    worker.drain(now).await;
    broker.close().await;
    Ok(Exit::Ok)
}

/// The URL itself, or the one a reference points to.
fn url(setting: &str) -> Result<SecretString, Failure> {
    match setting.parse::<SecretRef>() {
        Ok(reference) => secrets::resolve(&reference),
        Err(_) => Ok(SecretString::from(setting.to_owned())),
    }
}

fn connect(setting: &str, name: &str) -> Result<Broker, Failure> {
    if setting == "memory" {
        return Err(Failure::new(
            Code::ConfigInvalid,
            Action::FixConfig,
            "broker.url is memory, which only works inside one process",
        )
        .with_hint("Give the URL of a RabbitMQ, or run everything in one process: pgmuster up."));
    }
    Ok(Broker::rabbit(RabbitOptions::new(url(setting)?, format!("pgmuster {name}"))))
}

async fn say_whether_the_broker_answers(broker: &Broker) {
    match broker.wait_up(BROKER_PATIENCE).await {
        Ok(()) => tracing::info!("Connected to RabbitMQ"),
        Err(error) => {
            let why = proto::failure::chain(&error);
            tracing::error!("RabbitMQ does not answer yet, trying on: failed to {why}");
        }
    }
}

/// SIGTERM and SIGINT. One of these for the life of the process: a signal between two would be nobody's.
pub(crate) struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    pub(crate) fn listen() -> Result<Self, Failure> {
        let failed = |error| Failure::bug(format!("signals cannot be received: {error}"));
        Ok(Self {
            term: signal(SignalKind::terminate()).map_err(failed)?,
            int: signal(SignalKind::interrupt()).map_err(failed)?,
        })
    }

    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}
