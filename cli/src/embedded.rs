//! The whole product in one process: coordinator, one worker, the broker between them. The same code as in production;
//! only the broker is inside, the catalog is SQLite and the repository a directory.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use broker::Broker;
use coordinator::api::types::ClusterView;
use coordinator::{Clock, Coordinator, Handle};
use postgres::Environment;
use proto::envelope::{Credentials, SigningKey};
use proto::{Action, ClusterName, Code, Failure};
use secrecy::SecretString;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use worker::Worker;
use worker::config::{GivenBy, WorkerConfig};
use worker::places::Places;

use crate::client::Client;
use crate::commands::{init_repository, refuse_in_server, write_secret};
use crate::hints::Place;
use crate::{configs, identity, secrets};

/// The kernel's limit on the path of a Unix socket.
const SOCKET_PATH_MAX: usize = 107;

/// The API's socket, in the directory where the whole keeps its state.
const SOCKET: &str = "coordinator.sock";
/// The key of its repository, there too.
const KEY: &str = "repository.key";
/// How long who runs already may take to say what it serves; that it runs is known without.
const SAID_WITHIN: Duration = Duration::from_secs(3);

/// The cluster an embedded worker serves.
#[derive(Debug)]
pub(crate) struct Served {
    /// What it is called.
    pub(crate) name: ClusterName,
    /// How to connect.
    pub(crate) connection: String,
    /// Its data directory, when it is not the one the server names.
    pub(crate) data_directory: Option<PathBuf>,
    /// Further directories with PostgreSQL's programs.
    pub(crate) bin_dirs: Vec<PathBuf>,
    /// Directories below which restores may write.
    pub(crate) restore_roots: Vec<PathBuf>,
}

/// A running whole.
#[derive(Debug)]
pub(crate) struct Embedded {
    handle: Handle,
    worker: Worker,
    broker: Broker,
    /// A client of its coordinator.
    pub(crate) client: Client,
    /// Whether the repository was made just now.
    pub(crate) is_new: bool,
}

impl Embedded {
    /// Starts everything, keeping its state in `home`.
    pub(crate) async fn start(home: &Path, served: &Served) -> Result<Self, Failure> {
        let unusable = |what: String| {
            Failure::new(Code::ConfigInvalid, Action::FixConfig, what)
                .with_hint("Choose another directory: --home DIR, or the variable PGMUSTER_HOME.")
        };
        let socket = home.join(SOCKET);
        if socket.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(unusable(format!(
                "the path of the socket {} is longer than {SOCKET_PATH_MAX} bytes",
                socket.display()
            )));
        }
        refuse_in_server(&format!("{} (--home)", home.display()), Some(home))?;
        for directory in [home].into_iter().chain(served.restore_roots.iter().map(PathBuf::as_path))
        {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(
                |error| unusable(format!("failed to make {}: {error}", directory.display())),
            )?;
        }
        let is_new = make_repository(home).await?;

        let broker = Broker::memory();
        let started = start_coordinator(home, &socket, broker.another("coordinator")).await;
        let handle = match started {
            Ok(handle) => handle,
            Err(failure) => {
                // Who was asked a moment ago may have been there only since then.
                require_free(home).await?;
                return Err(failure);
            }
        };
        let worker = start_worker(home, served, &handle, broker.another("worker")).await?;
        let client = Client::over_socket(&socket)?;
        Ok(Self { handle, worker, broker, client, is_new })
    }

    /// Ends everything, running jobs included.
    pub(crate) async fn stop(self) {
        let now = CancellationToken::new();
        now.cancel();
        self.worker.drain(now).await;
        self.handle.shutdown().await;
        self.broker.close().await;
    }
}

/// Refuses a directory whose state another process works on, and says which one that is and what it serves.
pub(crate) async fn require_free(home: &Path) -> Result<(), Failure> {
    let socket = home.join(SOCKET);
    let Ok(there) = UnixStream::connect(&socket).await else { return Ok(()) };
    let pid = there.peer_cred().ok().and_then(|credentials| credentials.pid());
    drop(there);
    let clusters = async {
        let clusters: Vec<ClusterView> = Client::over_socket(&socket)?.get("/v1/clusters").await?;
        Ok::<_, Failure>(clusters)
    };
    let clusters = tokio::time::timeout(SAID_WITHIN, clusters).await;
    let mut names: Vec<String> = Vec::new();
    if let Ok(Ok(clusters)) = clusters {
        names.extend(clusters.iter().map(|view| view.name.to_string()));
    }
    let who = pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"));
    let serves = match names.as_slice() {
        [] => String::new(),
        names => format!(" and serves {}", names.join(", ")),
    };
    let (home, socket) = (home.display(), socket.display());
    let what = format!("pgmuster runs in {home} already: {who} answers at {socket}{serves}");
    let stop = pid.map_or_else(|| "stop it".to_owned(), |pid| format!("stop it (kill {pid})"));
    Err(Failure::new(Code::StateConflict, Action::FixConfig, what).with_hint(format!(
        "It goes on. Ask and order there: pgmuster --coordinator {socket} status. To start anew {stop} first; for another server \
         give this one a place of its own: --home DIR.",
    )))
}

/// The repository of a whole that keeps its state there, for what is said of it.
pub(crate) fn repository_in(home: &Path) -> Place {
    Place::of_whole(&url_in(home), &home.join(KEY))
}

fn url_in(home: &Path) -> String {
    format!("file://{}", home.join("repository").display())
}

async fn make_repository(home: &Path) -> Result<bool, Failure> {
    let key = home.join(KEY);
    if key.exists() {
        return Ok(false);
    }
    let url = url_in(home);
    let sheet = init_repository(&url, &key, None, false).await.map_err(|failure| {
        if failure.code != Code::RepositoryExists {
            return failure;
        }
        let what = format!("the repository {url} is there, and its key {} is not", key.display());
        Failure::new(Code::RepositoryExists, Action::FixConfig, what).with_hint(
            "Without its key nobody can read it. Put the file back from where you keep it, or write its line that begins with pgmuster-key-1 \
             from the recovery sheet into it; or begin anew in another directory with --home.",
        )
    })?;
    write_secret(&home.join("recovery-sheet.txt"), sheet.as_bytes())?;
    Ok(true)
}

async fn start_coordinator(home: &Path, socket: &Path, broker: Broker) -> Result<Handle, Failure> {
    let key = home.join("signing.key");
    if !key.exists() {
        write_secret(&key, identity::seed_text(&repository::random()).as_bytes())?;
    }
    let catalog = format!("sqlite:{}", home.join("catalog.sqlite").display());
    let config = toml::toml! {
        signing_key = "file:/replaced"
        [catalog]
        url = "sqlite:/replaced"
        [broker]
        url = "memory"
        // One process: nobody's pulse gets lost on the way, and a person watches.
        [timing]
        beacon_ms = 1000
    };
    let config: coordinator::Config =
        config.try_into().map_err(|error| Failure::bug(format!("its own settings: {error}")))?;
    let reference = proto::SecretRef::File(key.display().to_string());
    let seed = secrets::resolve(&reference)?;
    let seed = identity::seed(secrecy::ExposeSecret::expose_secret(&seed)).ok_or_else(|| {
        Failure::new(Code::ConfigInvalid, Action::FixConfig, format!("{reference} is damaged"))
    })?;
    let options = coordinator::Options {
        config: coordinator::Config {
            signing_key: reference,
            catalog: coordinator::config::CatalogConfig { url: catalog.clone() },
            listen: coordinator::config::ListenConfig {
                socket: Some(socket.to_owned()),
                ..coordinator::config::ListenConfig::default()
            },
            ..config
        },
        catalog_url: SecretString::from(catalog),
        signing_key: SigningKey::from_seed(&seed),
    };
    Ok(Coordinator::start(options, broker, Clock::system()).await?)
}

async fn start_worker(
    home: &Path,
    served: &Served,
    handle: &Handle,
    broker: Broker,
) -> Result<Worker, Failure> {
    let text = |path: &Path| toml::Value::String(path.display().to_string());
    let paths = |paths: &[PathBuf]| toml::Value::Array(paths.iter().map(|p| text(p)).collect());
    let mut cluster = toml::Table::new();
    cluster.insert("name".to_owned(), served.name.as_str().into());
    cluster.insert("connection".to_owned(), served.connection.as_str().into());
    cluster.insert("repository".to_owned(), "main".into());
    if let Some(directory) = &served.data_directory {
        cluster.insert("data_directory".to_owned(), text(directory));
    }
    let repository = toml::toml! { name = "main" };
    let mut repository = repository;
    let key = format!("file:{}", home.join(KEY).display());
    repository.insert("url".to_owned(), url_in(home).into());
    repository.insert("key".to_owned(), key.into());
    let mut config = toml::toml! {
        name = "local"
        site = "local"
        [broker]
        url = "memory"
    };
    config.insert("state_dir".to_owned(), text(&home.join("worker")));
    let mut sandbox = toml::Table::new();
    sandbox.insert("directory".to_owned(), text(&home.join("sandbox")));
    sandbox.insert("postgres_bin_dirs".to_owned(), paths(&served.bin_dirs));
    config.insert("sandbox".to_owned(), sandbox.into());
    let mut allow = toml::Table::new();
    allow.insert("restore_roots".to_owned(), paths(&served.restore_roots));
    config.insert("allow".to_owned(), allow.into());
    config.insert("repositories".to_owned(), vec![toml::Value::from(repository)].into());
    config.insert("clusters".to_owned(), vec![toml::Value::from(cluster)].into());
    let mut config: WorkerConfig = configs::parse(&config.to_string()).map_err(Failure::bug)?;
    for cluster in &mut config.clusters {
        cluster.given_by = GivenBy::Up;
    }

    let key = SigningKey::from_seed(&repository::random());
    let certificate = handle.certify(&config.name, &config.site, key.public());
    let credentials = Credentials::new(key, certificate, handle.public_key())
        .map_err(|error| Failure::bug(format!("failed to {error}")))?;
    let places = Places::resolve(&config, &Environment::of_process(), &secrets::resolve)?;
    Worker::start(config, credentials, places, broker).await
}

#[cfg(test)]
mod tests {
    use broker::PrivateSocket;

    use super::*;

    #[tokio::test]
    async fn a_directory_where_another_process_answers_is_refused_with_what_it_is() {
        let home = tempfile::tempdir().unwrap();
        require_free(home.path()).await.unwrap();
        let socket = home.path().join(SOCKET);
        let bound = PrivateSocket::bind(&socket).await.unwrap();
        // It says nothing, as one that is about to end does.
        let answering = tokio::spawn(async move {
            while let Ok(connection) = bound.listener.accept().await {
                drop(connection);
            }
        });
        let refused = require_free(home.path()).await.unwrap_err();
        assert_eq!(refused.code, Code::StateConflict, "{refused}");
        let process = format!("process {} answers at {}", std::process::id(), socket.display());
        assert!(refused.message.contains(&process), "{refused}");
        let order = format!("pgmuster --coordinator {} status", socket.display());
        assert!(refused.hint.contains(&order), "{}", refused.hint);
        answering.abort();
        let _ = answering.await;
        require_free(home.path()).await.expect("what a dead process left is in nobody's way");
    }
}
