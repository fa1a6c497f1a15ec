//! Where a server is and how to log in there: a URL, a keyword string or the name of a service, as libpq reads them.
//!
//! Parsing is strict: an unknown keyword is an error, because a mistyped `sslmode` must not quietly mean "no TLS".
//! Neither `Debug` nor `Display` nor an error ever shows a password or a whole connection string.

use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use tokio_postgres::config::{ChannelBinding, SslMode, SslNegotiation};

use crate::cancel::Address;
use crate::error::Error;
use crate::tls;

/// Socket directories in the order they are tried when no host is given: Debian's, then PostgreSQL's own default.
const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];
/// How long one address may take to accept a connection when the settings do not say.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Keep-alives find a vanished server within idle + interval × retries, one minute, instead of the kernel's two hours.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;
/// Unacknowledged data means a dead peer after this long.
const TCP_USER_TIMEOUT: Duration = Duration::from_mins(1);

/// What the process's surroundings say about PostgreSQL connections: read once at start, or made up by a test.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// Home directory: `.pg_service.conf`, `.pgpass`, `.postgresql/`.
    pub home: Option<PathBuf>,
    /// Name of the operating-system user, the default role.
    pub user: Option<String>,
    /// `PGSERVICEFILE`.
    pub service_file: Option<PathBuf>,
    /// `PGSYSCONFDIR`, where the system's `pg_service.conf` is.
    pub system_directory: Option<PathBuf>,
    /// `PGPASSFILE`.
    pub passfile: Option<PathBuf>,
}

impl Environment {
    /// Reads the environment of this process. `PGPASSWORD` is ignored on purpose: other users of some systems see it.
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place of this crate that reads the environment"
    )]
    pub fn of_process() -> Self {
        let path =
            |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty()).map(PathBuf::from);
        Self {
            home: path("HOME"),
            user: user_name().or_else(|| std::env::var("USER").ok()),
            service_file: path("PGSERVICEFILE"),
            system_directory: path("PGSYSCONFDIR"),
            passfile: path("PGPASSFILE"),
        }
    }
}

/// The name of the effective user in `/etc/passwd`.
fn user_name() -> Option<String> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let passwd = fs::read_to_string("/etc/passwd").ok()?;
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    })
}

/// One server and the role and database to use there.
#[derive(Clone)]
pub struct Target {
    hosts: Vec<String>,
    addresses: Vec<std::net::IpAddr>,
    ports: Vec<u16>,
    database: String,
    user: String,
    password: Option<SecretString>,
    passfile: Option<Passfile>,
    tls: tls::Options,
    channel_binding: ChannelBinding,
    connect_timeout: Duration,
    keepalives: bool,
    keepalives_idle: Duration,
    keepalives_interval: Duration,
    keepalives_retries: u32,
    tcp_user_timeout: Duration,
    options: String,
}

#[derive(Debug, Clone)]
struct Passfile {
    path: PathBuf,
    /// Named by the settings: then it must be there and private. The default one is ignored otherwise, as libpq does.
    required: bool,
}

fn wrong(what: impl Into<String>) -> Error {
    Error::Target { what: what.into() }
}

impl Target {
    /// Reads `postgres://…`, `host=… user=…` or the name of a service.
    pub fn parse(text: &str, environment: &Environment) -> Result<Self, Error> {
        let text = text.trim();
        let mut settings = if let Some(rest) = strip_scheme(text) {
            url_settings(rest)?
        } else if text.contains('=') {
            keyword_settings(text)?
        } else if text.is_empty() {
            Settings::default()
        } else {
            Settings { pairs: vec![("service".to_owned(), text.to_owned())] }
        };
        if let Some(service) = settings.take("service") {
            let from_file = service_settings(&service, environment)?;
            settings.append_missing(from_file);
        }
        Self::from_settings(settings, environment)
    }

    /// A server on this host, by the directory of its Unix socket; logs in without a password (`peer` or `trust`).
    pub fn on_socket(directory: &Path, port: u16, user: &str, database: &str) -> Self {
        Self {
            hosts: vec![directory.to_string_lossy().into_owned()],
            ports: vec![port],
            user: user.to_owned(),
            database: database.to_owned(),
            ..Self::unset()
        }
    }

    fn unset() -> Self {
        Self {
            hosts: Vec::new(),
            addresses: Vec::new(),
            ports: Vec::new(),
            database: String::new(),
            user: String::new(),
            password: None,
            passfile: None,
            tls: tls::Options::default(),
            channel_binding: ChannelBinding::Prefer,
            connect_timeout: CONNECT_TIMEOUT,
            keepalives: true,
            keepalives_idle: KEEPALIVE_IDLE,
            keepalives_interval: KEEPALIVE_INTERVAL,
            keepalives_retries: KEEPALIVE_RETRIES,
            tcp_user_timeout: TCP_USER_TIMEOUT,
            options: String::new(),
        }
    }

    /// The same server and role, another database.
    #[must_use]
    pub fn with_database(&self, database: &str) -> Self {
        Self { database: database.to_owned(), ..self.clone() }
    }

    /// The same server and database as another role, which needs no password, and with these options of its session.
    #[must_use]
    pub(crate) fn as_role(&self, role: &str, options: &str) -> Self {
        let (user, options) = (role.to_owned(), options.to_owned());
        Self { user, options, password: None, passfile: None, ..self.clone() }
    }

    /// The same target with a password that was resolved elsewhere; goes before any password file.
    #[must_use]
    pub fn with_password(&self, password: SecretString) -> Self {
        Self { password: Some(password), ..self.clone() }
    }

    /// The role to log in as.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The database to connect to.
    pub fn database(&self) -> &str {
        &self.database
    }

    /// Whether the settings themselves held a password, which belongs in a password file instead.
    pub fn has_inline_password(&self) -> bool {
        self.password.is_some()
    }

    /// Whether only this machine can be meant: every host is the directory of a Unix socket.
    pub fn is_socket(&self) -> bool {
        self.addresses.is_empty() && self.hosts.iter().all(|host| host.starts_with('/'))
    }

    /// Where the server is, when only one can be meant.
    pub(crate) fn sole_address(&self) -> Option<Address> {
        let [name] = &self.hosts[..] else { return None };
        let port = self.ports.first().copied().unwrap_or(5432);
        let host = match self.addresses[..] {
            [] if name.starts_with('/') => {
                return Some(Address::Socket(Path::new(name).join(format!(".s.PGSQL.{port}"))));
            }
            [] => name.clone(),
            [address] => address.to_string(),
            _ => return None,
        };
        Some(Address::Tcp { name: name.clone(), host, port })
    }

    /// The variables by which libpq gets the same settings, without files and secrets.
    pub(crate) fn libpq_words(&self) -> Vec<(&'static str, String)> {
        let join = |words: Vec<String>| words.join(",");
        let mode = match self.tls.mode {
            tls::Mode::Disable => "disable",
            tls::Mode::Prefer => "prefer",
            tls::Mode::Require => "require",
            tls::Mode::VerifyCa => "verify-ca",
            tls::Mode::VerifyFull => "verify-full",
        };
        let binding = match self.channel_binding {
            ChannelBinding::Disable => "disable",
            ChannelBinding::Require => "require",
            _ => "prefer",
        };
        let mut words = vec![
            ("PGHOST", join(self.hosts.clone())),
            ("PGPORT", join(self.ports.iter().map(ToString::to_string).collect())),
            ("PGUSER", self.user.clone()),
            ("PGDATABASE", self.database.clone()),
            ("PGSSLMODE", mode.to_owned()),
            ("PGCHANNELBINDING", binding.to_owned()),
            ("PGCONNECT_TIMEOUT", self.connect_timeout.as_secs().max(2).to_string()),
        ];
        if !self.addresses.is_empty() {
            words.push((
                "PGHOSTADDR",
                join(self.addresses.iter().map(ToString::to_string).collect()),
            ));
        }
        if self.tls.direct {
            words.push(("PGSSLNEGOTIATION", "direct".to_owned()));
        }
        words.retain(|(_, value)| !value.is_empty());
        words
    }

    /// Settings of the session, as words of a server's command line.
    pub(crate) fn options(&self) -> &str {
        &self.options
    }

    pub(crate) fn tls(&self) -> &tls::Options {
        &self.tls
    }

    /// The longest a whole log-in may take: each address in turn, and as long again for the talk.
    pub(crate) fn login_timeout(&self) -> Duration {
        let addresses =
            u32::try_from(self.hosts.len().max(self.addresses.len())).unwrap_or(u32::MAX);
        self.connect_timeout.saturating_mul(addresses.saturating_add(1))
    }

    /// The password from the settings, else from the password file, which is read each time: it may have been rotated.
    pub(crate) fn resolve_password(&self) -> Result<Option<SecretString>, Error> {
        if self.password.is_some() {
            return Ok(self.password.clone());
        }
        let Some(passfile) = &self.passfile else { return Ok(None) };
        let metadata = match fs::metadata(&passfile.path) {
            Ok(metadata) => metadata,
            Err(_) if !passfile.required => return Ok(None),
            Err(source) => {
                return Err(Error::File { path: passfile.path.display().to_string(), source });
            }
        };
        if metadata.permissions().mode() & 0o077 != 0 {
            let what = format!(
                "password file {} may be read by others; make it private: chmod 600 {}",
                passfile.path.display(),
                passfile.path.display()
            );
            if passfile.required {
                return Err(wrong(what));
            }
            tracing::warn!("Ignored: {what}");
            return Ok(None);
        }
        let text = fs::read_to_string(&passfile.path)
            .map_err(|source| Error::File { path: passfile.path.display().to_string(), source })?;
        let host = match self.hosts.first() {
            Some(host) if SOCKET_DIRECTORIES.contains(&host.as_str()) => "localhost".to_owned(),
            Some(host) => host.clone(),
            None => self.addresses.first().map(ToString::to_string).unwrap_or_default(),
        };
        let port = self.ports.first().copied().unwrap_or(5432).to_string();
        Ok(passfile_entry(&text, [&host, &port, &self.database, &self.user]))
    }

    /// What tokio-postgres needs, without password and application name. `options` are `-c name=value` words to add.
    pub(crate) fn config(&self, options: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        for host in &self.hosts {
            config.host(host);
        }
        for address in &self.addresses {
            config.hostaddr(*address);
        }
        for port in &self.ports {
            config.port(*port);
        }
        config.user(&self.user).dbname(&self.database);
        let all_options = [self.options.as_str(), options].join(" ");
        config.options(all_options.trim());
        config.ssl_mode(match self.tls.mode {
            tls::Mode::Disable => SslMode::Disable,
            tls::Mode::Prefer => SslMode::Prefer,
            tls::Mode::Require | tls::Mode::VerifyCa | tls::Mode::VerifyFull => SslMode::Require,
        });
        if self.is_socket() {
            // TLS does not exist on Unix sockets; libpq ignores sslmode there too.
            config.ssl_mode(SslMode::Disable);
        }
        if self.tls.direct {
            config.ssl_negotiation(SslNegotiation::Direct);
        }
        config
            .channel_binding(self.channel_binding)
            .connect_timeout(self.connect_timeout)
            .keepalives(self.keepalives)
            .keepalives_idle(self.keepalives_idle)
            .keepalives_interval(self.keepalives_interval)
            .keepalives_retries(self.keepalives_retries);
        if !self.tcp_user_timeout.is_zero() {
            config.tcp_user_timeout(self.tcp_user_timeout);
        }
        config
    }

    fn from_settings(settings: Settings, environment: &Environment) -> Result<Self, Error> {
        let mut target = Self::unset();
        let mut named_database = None;
        let mut named_user = None;
        for (key, value) in settings.pairs {
            let seconds = || number(&key, &value).map(Duration::from_secs);
            match key.as_str() {
                "host" => target.hosts = list(&value),
                "hostaddr" => {
                    target.addresses = list(&value)
                        .iter()
                        .map(|address| {
                            address.parse().map_err(|_| wrong("hostaddr is not an IP address"))
                        })
                        .collect::<Result<_, _>>()?;
                }
                "port" => {
                    target.ports = value
                        .split(',')
                        .map(|port| match port.trim() {
                            "" => Ok(5432),
                            port => port
                                .parse()
                                .map_err(|_| wrong("port is not a number from 1 to 65535")),
                        })
                        .collect::<Result<_, _>>()?;
                }
                "dbname" => named_database = Some(value),
                "user" => named_user = Some(value),
                "password" => target.password = Some(SecretString::from(value)),
                "passfile" => {
                    target.passfile = Some(Passfile { path: PathBuf::from(value), required: true });
                }
                "sslmode" => target.tls.mode = ssl_mode(&value)?,
                "sslrootcert" if value == "system" => target.tls.roots = Some(tls::Roots::System),
                "sslrootcert" => target.tls.roots = Some(tls::Roots::File(PathBuf::from(value))),
                "sslcert" => target.tls.certificate = Some(PathBuf::from(value)),
                "sslkey" => target.tls.key = Some(PathBuf::from(value)),
                "sslnegotiation" => {
                    target.tls.direct = match value.as_str() {
                        "direct" => true,
                        "postgres" => false,
                        _ => return Err(wrong("sslnegotiation is neither postgres nor direct")),
                    };
                }
                "channel_binding" => {
                    target.channel_binding = match value.as_str() {
                        "disable" => ChannelBinding::Disable,
                        "prefer" => ChannelBinding::Prefer,
                        "require" => ChannelBinding::Require,
                        _ => {
                            return Err(wrong(
                                "channel_binding is none of disable, prefer, require",
                            ));
                        }
                    };
                }
                "connect_timeout" => {
                    let timeout = seconds()?;
                    // Zero means "for ever" to libpq; nothing here waits for ever.
                    target.connect_timeout =
                        if timeout.is_zero() { CONNECT_TIMEOUT } else { timeout };
                }
                "keepalives" => target.keepalives = number(&key, &value)? != 0,
                "keepalives_idle" => target.keepalives_idle = seconds()?,
                "keepalives_interval" => target.keepalives_interval = seconds()?,
                "keepalives_count" | "keepalives_retries" => {
                    target.keepalives_retries = u32::try_from(number(&key, &value)?)
                        .map_err(|_| wrong("keepalives_count is too large"))?;
                }
                "tcp_user_timeout" => {
                    target.tcp_user_timeout = Duration::from_millis(number(&key, &value)?);
                }
                "options" => target.options = value,
                // Accepted and not used: ours is always pgmuster/JOB, and our reading needs UTF-8.
                // The rest concerns what rustls does not do.
                "application_name"
                | "fallback_application_name"
                | "client_encoding"
                | "sslcompression"
                | "gssencmode"
                | "krbsrvname"
                | "sslsni" => {}
                _ => return Err(wrong(format!("the keyword {key:?} is unknown or not supported"))),
            }
        }
        let needs_private_certificate = target.tls.roots.is_none()
            && matches!(target.tls.mode, tls::Mode::VerifyCa | tls::Mode::VerifyFull);
        if let (true, Some(home)) = (needs_private_certificate, &environment.home) {
            target.tls.roots = Some(tls::Roots::File(home.join(".postgresql/root.crt")));
        }
        if target.hosts.is_empty() && target.addresses.is_empty() {
            let directory =
                SOCKET_DIRECTORIES.iter().find(|d| Path::new(d).is_dir()).unwrap_or(&"/tmp");
            target.hosts = vec![(*directory).to_owned()];
        }
        let count = target.hosts.len().max(target.addresses.len());
        if !target.hosts.is_empty()
            && !target.addresses.is_empty()
            && target.hosts.len() != target.addresses.len()
        {
            return Err(wrong("host and hostaddr name different numbers of servers"));
        }
        if target.ports.len() > 1 && target.ports.len() != count {
            return Err(wrong("there are more or fewer ports than hosts"));
        }
        if target.hosts.is_empty() {
            // Without a name TLS has nothing to compare the certificate with; the address is then the name.
            target.hosts = target.addresses.iter().map(ToString::to_string).collect();
        }
        target.user = named_user
            .or_else(|| environment.user.clone())
            .ok_or_else(|| wrong("no user is given and this process's user has no name"))?;
        target.database = named_database.unwrap_or_else(|| target.user.clone());
        if target.passfile.is_none() {
            let by_environment =
                environment.passfile.clone().map(|path| Passfile { path, required: true });
            let by_home = environment
                .home
                .as_ref()
                .map(|home| Passfile { path: home.join(".pgpass"), required: false });
            target.passfile = by_environment.or(by_home);
        }
        Ok(target)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port =
            |index: usize| self.ports.get(index).or(self.ports.first()).copied().unwrap_or(5432);
        let places: Vec<_> =
            self.hosts.iter().enumerate().map(|(i, host)| format!("{host}:{}", port(i))).collect();
        write!(f, "{} as {} in database {}", places.join(","), self.user, self.database)
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Target({self})")
    }
}

/// Keyword and value pairs, first come first served.
#[derive(Default)]
struct Settings {
    pairs: Vec<(String, String)>,
}

impl Settings {
    fn take(&mut self, key: &str) -> Option<String> {
        let index = self.pairs.iter().position(|(k, _)| k == key)?;
        Some(self.pairs.remove(index).1)
    }

    fn append_missing(&mut self, other: Self) {
        for (key, value) in other.pairs {
            if !self.pairs.iter().any(|(k, _)| *k == key) {
                self.pairs.push((key, value));
            }
        }
    }
}

fn strip_scheme(text: &str) -> Option<&str> {
    text.strip_prefix("postgres://").or_else(|| text.strip_prefix("postgresql://"))
}

fn list(value: &str) -> Vec<String> {
    value.split(',').map(str::trim).filter(|v| !v.is_empty()).map(ToOwned::to_owned).collect()
}

fn number(key: &str, value: &str) -> Result<u64, Error> {
    value.trim().parse().map_err(|_| wrong(format!("{key} is not a number")))
}

fn ssl_mode(value: &str) -> Result<tls::Mode, Error> {
    Ok(match value {
        "disable" => tls::Mode::Disable,
        // `allow` prefers plain text; there is no reason to.
        "allow" | "prefer" => tls::Mode::Prefer,
        "require" => tls::Mode::Require,
        "verify-ca" => tls::Mode::VerifyCa,
        "verify-full" => tls::Mode::VerifyFull,
        _ => {
            return Err(wrong(
                "sslmode is none of disable, prefer, require, verify-ca, verify-full",
            ));
        }
    })
}

fn percent_decode(text: &str) -> Result<String, Error> {
    let bad = || wrong("the URL has a broken %-escape");
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16)).ok_or_else(bad);
            let value = digit()? * 16 + digit()?;
            bytes.push(u8::try_from(value).map_err(|_| bad())?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

/// `user:password@host:port,host:port/database?key=value&…`, after the scheme.
fn url_settings(rest: &str) -> Result<Settings, Error> {
    let mut pairs = Vec::new();
    let (before_query, query) = rest.split_once('?').unwrap_or((rest, ""));
    // The last @ ends the credentials: a raw @ in a password is a common slip, and a host cannot hold one.
    let (authority, database) = before_query.rsplit_once('@').map_or_else(
        || {
            let (host, database) = before_query.split_once('/').unwrap_or((before_query, ""));
            ((None, host), database)
        },
        |(credentials, tail)| {
            let (host, database) = tail.split_once('/').unwrap_or((tail, ""));
            ((Some(credentials), host), database)
        },
    );
    if let (Some(credentials), _) = authority {
        let (user, password) = match credentials.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (credentials, None),
        };
        if !user.is_empty() {
            pairs.push(("user".to_owned(), percent_decode(user)?));
        }
        if let Some(password) = password {
            pairs.push(("password".to_owned(), percent_decode(password)?));
        }
    }
    let mut hosts = Vec::new();
    let mut ports = Vec::new();
    for place in authority.1.split(',').filter(|place| !place.is_empty()) {
        let (host, port) = match place.strip_prefix('[').and_then(|p| p.split_once(']')) {
            Some((address, after)) => (address, after.strip_prefix(':').unwrap_or("")),
            None => place.rsplit_once(':').unwrap_or((place, "")),
        };
        hosts.push(percent_decode(host)?);
        ports.push(port.to_owned());
    }
    if hosts.iter().any(|host| !host.is_empty()) {
        pairs.push(("host".to_owned(), hosts.join(",")));
    }
    if ports.iter().any(|port| !port.is_empty()) {
        pairs.push(("port".to_owned(), ports.join(",")));
    }
    if !database.is_empty() {
        pairs.push(("dbname".to_owned(), percent_decode(database)?));
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) =
            pair.split_once('=').ok_or_else(|| wrong("the URL has a parameter without a value"))?;
        let key = percent_decode(key)?;
        let value = percent_decode(value)?;
        // What JDBC writes, and libpq reads as well.
        let (key, value) = match (key.as_str(), value.as_str()) {
            ("ssl", "true") => ("sslmode".to_owned(), "require".to_owned()),
            _ => (key, value),
        };
        pairs.retain(|(existing, _)| *existing != key);
        pairs.push((key, value));
    }
    Ok(Settings { pairs })
}

/// `key = value`, `key='quoted \' value'`, separated by white space.
fn keyword_settings(text: &str) -> Result<Settings, Error> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return Ok(Settings { pairs });
        }
        let mut key = String::new();
        while let Some(c) = chars.next_if(|c| !c.is_whitespace() && *c != '=') {
            key.push(c);
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if key.is_empty() || chars.next() != Some('=') {
            return Err(wrong("a keyword is not followed by '=' and its value"));
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        let quoted = chars.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        loop {
            match chars.next_if(|c| quoted || !c.is_whitespace()) {
                Some('\\') => value.extend(chars.next()),
                Some('\'') if quoted => break,
                Some(c) => value.push(c),
                None if quoted => {
                    return Err(wrong(format!("the quoted value of {key} has no end")));
                }
                None => break,
            }
        }
        pairs.retain(|(existing, _)| *existing != key);
        pairs.push((key, value));
    }
}

fn service_settings(service: &str, environment: &Environment) -> Result<Settings, Error> {
    let own = environment
        .service_file
        .clone()
        .or_else(|| environment.home.as_ref().map(|home| home.join(".pg_service.conf")));
    let system = environment
        .system_directory
        .clone()
        .unwrap_or_else(|| PathBuf::from("/etc/postgresql-common"))
        .join("pg_service.conf");
    let mut looked = Vec::new();
    for path in own.into_iter().chain([system]) {
        match fs::read_to_string(&path) {
            Ok(text) => {
                if let Some(settings) = service_section(&text, service, &path)? {
                    return Ok(settings);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::File { path: path.display().to_string(), source }),
        }
        looked.push(path.display().to_string());
    }
    Err(wrong(format!("there is no service {service:?} in {}", looked.join(" or "))))
}

fn service_section(text: &str, service: &str, path: &Path) -> Result<Option<Settings>, Error> {
    let mut found: Option<Vec<(String, String)>> = None;
    for line in
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            if found.is_some() {
                break;
            }
            if name == service {
                found = Some(Vec::new());
            }
        } else if let Some(pairs) = &mut found {
            let (key, value) = line.split_once('=').ok_or_else(|| {
                wrong(format!("{} has a line without '=' in service {service:?}", path.display()))
            })?;
            pairs.push((key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    Ok(found.map(|pairs| Settings { pairs }))
}

/// The password of the first line whose host, port, database and role match; `*` matches anything.
fn passfile_entry(text: &str, wanted: [&String; 4]) -> Option<SecretString> {
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut fields = vec![String::new()];
        let mut chars = line.chars();
        while let Some(c) = chars.next() {
            let last = fields.len() - 1;
            match c {
                '\\' => fields[last].extend(chars.next()),
                // Everything after the fourth colon is the password, colons included.
                ':' if fields.len() < 5 => fields.push(String::new()),
                c => fields[last].push(c),
            }
        }
        let matches = fields.len() == 5
            && fields.iter().zip(wanted).all(|(field, want)| field == "*" || field == want);
        matches.then(|| SecretString::from(fields.swap_remove(4)))
    })
}

/// Blots out everything secret that a text could have picked up from the settings of `target`.
pub(crate) fn scrubbed(
    text: crate::error::ServerMessage,
    password: Option<&SecretString>,
) -> crate::error::ServerMessage {
    match password {
        Some(password) => text.without(password.expose_secret()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn nobody() -> Environment {
        Environment { user: Some("worker".to_owned()), ..Environment::default() }
    }

    #[test]
    fn a_url_and_keywords_say_the_same() {
        let url =
            "postgres://bob:s%40cret@db1:5433,[::1]/or%20ders?sslmode=require&connect_timeout=3";
        let keywords = r"host=db1,::1 port = 5433, user=bob password='s@cret' dbname='or ders' sslmode=require connect_timeout=3";
        for text in [url, keywords] {
            let target = Target::parse(text, &nobody()).unwrap();
            assert_eq!(target.to_string(), "db1:5433,::1:5432 as bob in database or ders");
            assert_eq!(target.resolve_password().unwrap().unwrap().expose_secret(), "s@cret");
            assert_eq!(target.tls.mode, tls::Mode::Require);
            assert_eq!(target.connect_timeout, Duration::from_secs(3));
        }
    }

    #[test]
    fn nothing_that_is_shown_holds_the_password() {
        let secret = "hunter2";
        let target = Target::parse(&format!("postgres://bob:{secret}@db1/x"), &nobody()).unwrap();
        assert!(!format!("{target} {target:?} {target:#?}").contains(secret));
        for bad in [
            format!("postgres://bob:{secret}%zz@db1/x"),
            format!("host=a password={secret} sslmode={secret}"),
            format!("host=a password='{secret}"),
            format!("port={secret}"),
            format!("postgres://db1/x?password={secret}&{secret}"),
        ] {
            let error = Target::parse(&bad, &nobody()).unwrap_err();
            let told = format!("{error} {error:?}");
            let told = format!("{told} {:?}", proto::Failure::from(error));
            assert!(!told.contains(secret), "{told}");
        }
    }

    #[test]
    fn one_host_is_one_address() {
        let address = |text: &str| Target::parse(text, &nobody()).unwrap().sole_address();
        let tcp = |name: &str, host: &str, port| {
            Some(Address::Tcp { name: name.to_owned(), host: host.to_owned(), port })
        };
        assert_eq!(address("host=db1 user=a"), tcp("db1", "db1", 5432));
        assert_eq!(address("host=db1 hostaddr=10.0.0.1 port=7 user=a"), tcp("db1", "10.0.0.1", 7));
        assert_eq!(
            address("host=/run/pg port=7 user=a"),
            Some(Address::Socket("/run/pg/.s.PGSQL.7".into()))
        );
        assert_eq!(address("host=db1,db2 user=a"), None);
    }

    #[test]
    fn a_mistyped_keyword_is_an_error_and_not_less_security() {
        let error = Target::parse("host=a ssl_mode=verify-full", &nobody()).unwrap_err();
        assert!(error.to_string().contains("ssl_mode"), "{error}");
        assert!(Target::parse("host=a sslmode=verify_full", &nobody()).is_err());
    }

    #[test]
    fn a_raw_at_sign_in_a_password_does_not_become_a_host() {
        let target = Target::parse("postgres://bob:p@ss@db1/x", &nobody()).unwrap();
        assert_eq!(target.hosts, ["db1"]);
        assert_eq!(target.resolve_password().unwrap().unwrap().expose_secret(), "p@ss");
    }

    #[test]
    fn services_give_what_the_text_leaves_open() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("services");
        fs::write(
            &file,
            "# ours\n[other]\nhost=no\n\n[orders]\nhost=db7\nport=6000\nuser=s\n[later]\nport=1\n",
        )
        .unwrap();
        let environment = Environment { service_file: Some(file), ..nobody() };
        let plain = Target::parse("orders", &environment).unwrap();
        assert_eq!(plain.to_string(), "db7:6000 as s in database s");
        let mixed = Target::parse("service=orders user=me dbname=d", &environment).unwrap();
        assert_eq!(mixed.to_string(), "db7:6000 as me in database d");
        let missing = Target::parse("orderz", &environment).unwrap_err();
        assert!(missing.to_string().contains("orderz"), "{missing}");
    }

    #[test]
    fn password_files_match_in_order_and_must_be_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pgpass");
        let mut file = fs::File::create(&path).unwrap();
        writeln!(file, "# comment\ndb1:1:x:bob:no\ndb1:*:or\\:ders:bob:a:b\\\\c\n*:*:*:*:last")
            .unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let parse = |text: &str| {
            Target::parse(&format!("{text} passfile={}", path.display()), &nobody())
                .unwrap()
                .resolve_password()
        };
        assert_eq!(
            parse("host=db1 user=bob dbname=or:ders").unwrap().unwrap().expose_secret(),
            "a:b\\c"
        );
        assert_eq!(parse("host=db2 user=bob").unwrap().unwrap().expose_secret(), "last");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(parse("host=db2 user=bob").unwrap_err().to_string().contains("chmod 600"));
    }
}
