//! The way to a coordinator: over its Unix socket on the same machine, over HTTP with a token elsewhere.

use std::path::{Path, PathBuf};
use std::time::Duration;

use coordinator::api::types::HealthView;
use proto::{Action, Code, Failure};
use reqwest::StatusCode;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::environment;

/// Where a coordinator of this machine listens when nothing else is said, in the order they are tried.
const SYSTEM_SOCKET: &str = "/run/pgmuster/coordinator.sock";
/// One request may take this long on top of the time it asks the coordinator to wait.
const REQUEST_MAX: Duration = Duration::from_secs(30);

/// A client of one coordinator.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
    place: String,
    token: Option<SecretString>,
    /// The coordinator would refuse nearly everything.
    lacks_token: bool,
}

impl Client {
    /// A client for `coordinator` (a socket's path or a URL); finds the one of this machine when absent.
    pub(crate) fn new(
        coordinator: Option<&str>,
        token_file: Option<&Path>,
    ) -> Result<Self, Failure> {
        match coordinator {
            Some(url) if url.starts_with("http://") || url.starts_with("https://") => {
                Self::over_http(url, token_file)
            }
            Some(path) => Self::over_socket(Path::new(path)),
            None => Self::over_socket(&found_socket()),
        }
    }

    /// A client over a Unix socket.
    pub(crate) fn over_socket(path: &Path) -> Result<Self, Failure> {
        let http = builder().unix_socket(path).build().map_err(|error| bug(&error))?;
        let place = path.display().to_string();
        let base = "http://coordinator".to_owned();
        Ok(Self { http, base, place, token: None, lacks_token: false })
    }

    fn over_http(url: &str, token_file: Option<&Path>) -> Result<Self, Failure> {
        let refuse = |what: String, hint: &str| {
            Failure::new(Code::ConfigInvalid, Action::FixConfig, what).with_hint(hint)
        };
        let parsed = reqwest::Url::parse(url).map_err(|error| {
            refuse(
                format!("the coordinator's URL cannot be read: {error}"),
                "Write https://host:port.",
            )
        })?;
        let loopback = match parsed.host_str() {
            Some("localhost") => true,
            Some(host) => host
                .trim_matches(['[', ']'])
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| address.is_loopback()),
            None => false,
        };
        if parsed.scheme() == "http" && !loopback {
            return Err(refuse(
                "a token must not go over the network in clear".to_owned(),
                "Use an https:// URL.",
            ));
        }
        let http = builder().build().map_err(|error| bug(&error))?;
        let base = url.trim_end_matches('/').to_owned();
        let token = token_file.map(|file| {
            crate::secrets::resolve(&proto::SecretRef::File(file.display().to_string()))
        });
        let (token, lacks_token) = (token.transpose()?, token_file.is_none());
        Ok(Self { http, place: base.clone(), base, token, lacks_token })
    }

    /// Asks for something.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.send(self.http.get(format!("{}{path}", self.base)), REQUEST_MAX).await
    }

    /// Asks for something that the coordinator may answer up to `wait` later.
    pub(crate) async fn get_waiting<T: DeserializeOwned>(
        &self,
        path: &str,
        wait: Duration,
    ) -> Result<T, Failure> {
        self.send(self.http.get(format!("{}{path}", self.base)), REQUEST_MAX + wait).await
    }

    /// Orders something.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Failure> {
        self.send(self.http.post(format!("{}{path}", self.base)).json(body), REQUEST_MAX).await
    }

    /// Removes something.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), Failure> {
        self.check_token()?;
        let request = self.http.delete(format!("{}{path}", self.base));
        let (status, body) = self.exchange(request, REQUEST_MAX).await?;
        if status.is_success() { Ok(()) } else { understood(status, &body) }
    }

    /// Orders something that carries its own right to be done.
    pub(crate) async fn post_with_own_right<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Failure> {
        let request = self.http.post(format!("{}{path}", self.base)).json(body);
        let (status, body) = self.exchange(request, REQUEST_MAX).await?;
        understood(status, &body)
    }

    /// Asks the coordinator how it is. It says so also when it is not well, with status 503.
    pub(crate) async fn health(&self) -> Result<HealthView, Failure> {
        self.check_token()?;
        let request = self.http.get(format!("{}/healthz", self.base));
        let (status, body) = self.exchange(request, REQUEST_MAX).await?;
        match serde_json::from_slice(&body) {
            Ok(health) => Ok(health),
            Err(_) => understood(status, &body),
        }
    }

    fn check_token(&self) -> Result<(), Failure> {
        if !self.lacks_token {
            return Ok(());
        }
        let what = format!("a coordinator reached by URL ({}) asks for a token", self.place);
        Err(Failure::new(Code::ConfigInvalid, Action::FixConfig, what)
            .with_hint("Give --token-file FILE."))
    }

    async fn send<T: DeserializeOwned>(
        &self,
        request: reqwest::RequestBuilder,
        limit: Duration,
    ) -> Result<T, Failure> {
        self.check_token()?;
        let (status, body) = self.exchange(request, limit).await?;
        understood(status, &body)
    }

    /// One request and its answer, whatever it says.
    async fn exchange(
        &self,
        request: reqwest::RequestBuilder,
        limit: Duration,
    ) -> Result<(StatusCode, Vec<u8>), Failure> {
        let request = match &self.token {
            Some(token) => request.bearer_auth(token.expose_secret()),
            None => request,
        };
        let unreachable = |error: reqwest::Error| {
            let why = proto::failure::chain(&error.without_url());
            Failure::new(
                Code::CoordinatorUnreachable,
                Action::Retry,
                format!("no coordinator answers at {}: {why}", self.place),
            )
            .with_hint("Start one (pgmuster up, pgmuster coordinator --config FILE), or say where it is with --coordinator.")
        };
        let response = request.timeout(limit).send().await.map_err(unreachable)?;
        let status = response.status();
        let body = response.bytes().await.map_err(unreachable)?;
        Ok((status, body.to_vec()))
    }
}

/// What was asked for, or the failure the coordinator tells.
fn understood<T: DeserializeOwned>(status: StatusCode, body: &[u8]) -> Result<T, Failure> {
    if status.is_success() {
        return serde_json::from_slice(body).map_err(|error| {
            Failure::bug(format!("the coordinator's answer is not understood: {error}"))
        });
    }
    Err(serde_json::from_slice(body).unwrap_or_else(|_| {
        Failure::bug(format!("the coordinator answered {status} without saying why"))
    }))
}

fn builder() -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .user_agent(concat!("pgmuster/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(5))
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
}

fn bug(error: &reqwest::Error) -> Failure {
    Failure::bug(format!("the HTTP client cannot be built: {error}"))
}

/// The socket of `pgmuster up` of this user, else that of the system's coordinator.
fn found_socket() -> PathBuf {
    let own = environment::home().join("coordinator.sock");
    if own.exists() { own } else { SYSTEM_SOCKET.into() }
}
