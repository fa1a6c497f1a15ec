//! Throwaway clusters: `initdb`, a private socket directory, a server that dies with its owner. For
//! the demo and tests.
//!
//! Deliberately not here: anything for clusters that hold data of value. Authentication is `trust`
//! behind a directory that only the server's account can enter; nothing listens on TCP unless asked
//! for, and then only on loopback with passwords.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::binaries::Binaries;
use crate::process::{Account, DeathSignal, POLL, Result, Running, describe, last_lines};

/// `initdb` takes one to five seconds; a loaded machine with `fsync` may take a minute.
const INITDB_TIMEOUT: Duration = Duration::from_mins(3);
/// Until the server accepts connections; crash recovery of a test's data included.
const START_TIMEOUT: Duration = Duration::from_mins(2);
/// Until the server has ended; a shutdown writes a checkpoint.
const STOP_TIMEOUT: Duration = Duration::from_mins(2);
/// The kernel's limit on the path of a Unix socket, without the closing NUL.
pub(crate) const SOCKET_PATH_LIMIT_BYTES: usize = 107;
/// The socket's number: the directory is private, so every server may have the same.
pub(crate) const SOCKET_PORT: u16 = 5432;
/// Lines of the server's log in an error.
pub(crate) const LOG_LINES: usize = 15;

/// How a throwaway cluster is made.
#[derive(Debug, Clone)]
pub struct InstanceOptions {
    /// Settings by name, in PostgreSQL's own notation without quotes; they win over the defaults
    /// here.
    pub settings: Vec<(String, String)>,
    /// Whether data pages carry checksums.
    pub checksums: bool,
    /// Size of a WAL segment, a power of two from 1 to 1024; 16 otherwise.
    pub wal_segment_size_mb: Option<u32>,
    /// Further arguments of `initdb`.
    pub initdb_args: Vec<OsString>,
    /// Who runs the server. Otherwise the current account, or `postgres` when that is root.
    pub account: Option<Account>,
    /// Listen on 127.0.0.1 with passwords (SCRAM); `Some(0)` takes a free port.
    pub tcp_port: Option<u16>,
    /// Lines for `pg_hba.conf`, before our own.
    pub hba: Vec<String>,
    /// `false` only where losing the cluster in a power cut does not matter, as in tests.
    pub fsync: bool,
}

impl Default for InstanceOptions {
    fn default() -> Self {
        Self {
            settings: Vec::new(),
            checksums: true,
            wal_segment_size_mb: None,
            initdb_args: Vec::new(),
            account: None,
            tcp_port: None,
            hba: Vec::new(),
            fsync: true,
        }
    }
}

/// How a server is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Waits until every client has left.
    Smart,
    /// Ends the clients, writes a checkpoint.
    Fast,
    /// Ends everything without a checkpoint: the next start recovers.
    Immediate,
}

impl StopMode {
    fn signal(self) -> Signal {
        match self {
            Self::Smart => Signal::TERM,
            Self::Fast => Signal::INT,
            Self::Immediate => Signal::QUIT,
        }
    }
}

/// A throwaway cluster. Dropping it stops the server at once; its directory belongs to the caller
/// and stays.
#[derive(Debug)]
pub struct Instance {
    binaries: Binaries,
    options: InstanceOptions,
    account: Account,
    directory: PathBuf,
    sockets: SocketDirectory,
    tcp_port: Option<u16>,
    server: Option<Running>,
}

impl Instance {
    /// Makes a cluster in `directory`, which must be empty or absent and will belong to the account
    /// of the server. The superuser is `postgres`. The server is not started.
    pub async fn create(
        binaries: &Binaries,
        directory: &Path,
        options: InstanceOptions,
    ) -> Result<Self> {
        let account = match options.account {
            Some(account) => account,
            None => Account::of_servers().await?,
        };
        make_private_directory(directory, account)?;
        let sockets = SocketDirectory::create(&directory.join("s"), account)?;
        let tcp_port = match options.tcp_port {
            Some(0) => Some(free_port()?),
            port => port,
        };
        let instance = Self {
            binaries: binaries.clone(),
            options,
            account,
            directory: directory.to_owned(),
            sockets,
            tcp_port,
            server: None,
        };
        instance.initdb().await?;
        instance.write_settings()?;
        Ok(instance)
    }

    async fn initdb(&self) -> Result<()> {
        let mut args: Vec<OsString> = vec!["-D".into(), self.data_directory().into()];
        args.extend(["-U", "postgres", "-A", "trust", "-E", "UTF8"].map(OsString::from));
        args.extend(["--locale=C", "--no-instructions"].map(OsString::from));
        if self.options.checksums {
            args.push("--data-checksums".into());
        } else if self.binaries.major() >= 18 {
            args.push("--no-data-checksums".into());
        }
        if let Some(size) = self.options.wal_segment_size_mb {
            args.push(format!("--wal-segsize={size}").into());
        }
        if !self.options.fsync {
            args.push("--no-sync".into());
        }
        args.extend(self.options.initdb_args.iter().cloned());
        let program = self.binaries.program("initdb")?.args(args).account(Some(self.account));
        program.directory(&self.directory).run(INITDB_TIMEOUT, &CancellationToken::new()).await?;
        Ok(())
    }

    /// Adds settings, or replaces those of the same name; they take effect with the next start.
    pub fn set(&mut self, settings: &[(&str, &str)]) -> Result<()> {
        for (name, value) in settings {
            self.options.settings.retain(|(known, _)| known != name);
            self.options.settings.push(((*name).to_owned(), (*value).to_owned()));
        }
        self.write_settings()
    }

    fn write_settings(&self) -> Result<()> {
        let listen = if self.tcp_port.is_some() { "127.0.0.1" } else { "" };
        let mut settings = vec![
            ("listen_addresses".to_owned(), listen.to_owned()),
            ("port".to_owned(), self.port().to_string()),
            ("unix_socket_directories".to_owned(), self.socket_directory().display().to_string()),
            ("unix_socket_permissions".to_owned(), "0700".to_owned()),
            ("max_connections".to_owned(), "50".to_owned()),
            ("shared_buffers".to_owned(), "32MB".to_owned()),
            ("fsync".to_owned(), if self.options.fsync { "on" } else { "off" }.to_owned()),
            ("log_line_prefix".to_owned(), "%m [%p] ".to_owned()),
            ("timezone".to_owned(), "UTC".to_owned()),
        ];
        settings.extend(self.options.settings.iter().cloned());
        let mut hba = String::new();
        for line in &self.options.hba {
            hba.push_str(line);
            hba.push('\n');
        }
        hba.push_str("local all all trust\nlocal replication all trust\n");
        if self.tcp_port.is_some() {
            hba.push_str("host all all 127.0.0.1/32 scram-sha-256\n");
            hba.push_str("host replication all 127.0.0.1/32 scram-sha-256\n");
        }
        let data = self.data_directory();
        write_private(&data.join("postgresql.conf"), &settings_text(&settings), self.account)?;
        write_private(&data.join("pg_hba.conf"), &hba, self.account)
    }

    /// Starts the server and returns when it accepts connections. Nothing happens when it runs
    /// already.
    pub async fn start(&mut self) -> Result<()> {
        if self.is_running() {
            return Ok(());
        }
        let log = open_log(&self.log_path(), self.account)?;
        let program = self.binaries.program("postgres")?.arg("-D").arg(self.data_directory());
        let program = program.account(Some(self.account)).death_signal(DeathSignal::Quit);
        let server = self.server.insert(program.spawn(log).await?);
        let pid_file = self.directory.join("data/postmaster.pid");
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Some(status) = server
                .ended()
                .map_err(|source| Error::ProgramStart { program: "postgres".to_owned(), source })?
            {
                self.server = None;
                return Err(Error::Program {
                    program: "postgres".to_owned(),
                    outcome: describe(status),
                    output: self.log_tail(),
                });
            }
            let status = server.pid().map(|pid| postmaster_status(&pid_file, pid));
            if status.is_some_and(|status| status != PostmasterStatus::Starting) {
                return Ok(());
            }
            if Instant::now() > deadline {
                self.server = None;
                return Err(Error::Deadline {
                    what: format!("start postgres: {}", self.log_tail()),
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Stops the server and returns when it has ended. Nothing happens when it does not run.
    pub async fn stop(&mut self, mode: StopMode) -> Result<()> {
        let Some(server) = self.server.as_mut() else { return Ok(()) };
        let failed = |source| Error::ProgramStart { program: "postgres".to_owned(), source };
        if server.ended().map_err(failed)?.is_none() {
            server.signal(mode.signal()).map_err(failed)?;
            match tokio::time::timeout(STOP_TIMEOUT, server.wait()).await {
                Ok(status) => drop(status.map_err(failed)?),
                Err(_) => {
                    return Err(Error::Deadline { what: "stop postgres".to_owned() });
                }
            }
        }
        self.server = None;
        Ok(())
    }

    /// Stops the server (fast) and starts it again.
    pub async fn restart(&mut self) -> Result<()> {
        self.stop(StopMode::Fast).await?;
        self.start().await
    }

    /// Kills the server and all its backends with SIGKILL, as a crash of the machine would. The
    /// next start recovers.
    pub fn kill9(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill();
        }
    }

    /// Whether the server's process runs.
    pub fn is_running(&mut self) -> bool {
        self.server.as_mut().is_some_and(|server| matches!(server.ended(), Ok(None)))
    }

    /// The process id of the postmaster.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().and_then(Running::pid)
    }

    /// A connection URL for the superuser over the private socket.
    pub fn url(&self, database: &str) -> String {
        socket_url(self.socket_directory(), self.port(), "postgres", database, "")
    }

    /// A connection URL over TCP, when it was asked for.
    pub fn tcp_url(&self, user: &str, password: &str, database: &str) -> Option<String> {
        let port = self.tcp_port?;
        let [user, password, database] = [user, password, database].map(percent_encoded);
        Some(format!("postgresql://{user}:{password}@127.0.0.1:{port}/{database}"))
    }

    /// The data directory.
    pub fn data_directory(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// The directory of the Unix socket.
    pub fn socket_directory(&self) -> &Path {
        &self.sockets.path
    }

    /// The number in the socket's name, and the TCP port where one is open.
    pub fn port(&self) -> u16 {
        self.tcp_port.unwrap_or(SOCKET_PORT)
    }

    /// The account the server runs as.
    pub fn account(&self) -> Account {
        self.account
    }

    /// The programs the cluster was made with.
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// The server's log.
    pub fn log_path(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// The last lines of the server's log.
    pub fn log_tail(&self) -> String {
        log_tail(&self.log_path())
    }
}

/// A directory for Unix sockets that only one account can enter: the wished one when its path is
/// short enough, otherwise one in `/tmp` that vanishes with this value.
#[derive(Debug)]
pub(crate) struct SocketDirectory {
    pub(crate) path: PathBuf,
    /// Removes it, where it does not lie where it was wished.
    _temporary: Option<TempDir>,
}

impl SocketDirectory {
    pub(crate) fn create(wished: &Path, account: Account) -> Result<Self> {
        // The longest name a server makes there: its lock file, with a port of five digits.
        let longest = wished.join(".s.PGSQL.65535.lock");
        if wished.is_absolute() && longest.as_os_str().len() <= SOCKET_PATH_LIMIT_BYTES {
            make_private_directory(wished, account)?;
            return Ok(Self { path: wished.to_owned(), _temporary: None });
        }
        let temporary = tempfile::Builder::new()
            .prefix("pgmuster-")
            .tempdir_in("/tmp")
            .map_err(|source| Error::io("create a directory in", "/tmp", source))?;
        make_private_directory(temporary.path(), account)?;
        Ok(Self { path: temporary.path().to_owned(), _temporary: Some(temporary) })
    }
}

/// What a postmaster says of itself in its pid file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PostmasterStatus {
    Starting,
    /// In recovery. With hot standby it answers queries; without, it says so from the beginning of
    /// recovery on and refuses everybody.
    Standby,
    /// It accepts connections.
    Ready,
}

/// What the postmaster `pid` has written into its pid file last.
pub(crate) fn postmaster_status(pid_file: &Path, pid: u32) -> PostmasterStatus {
    // Lines: pid, data directory, start time, port, socket directory, address, shared memory,
    // status.
    let text = std::fs::read_to_string(pid_file).unwrap_or_default();
    let mut lines = text.lines();
    let is_same = lines.next().and_then(|line| line.trim().parse().ok()) == Some(pid);
    match lines.nth(6).map(str::trim) {
        Some("ready") if is_same => PostmasterStatus::Ready,
        Some("standby") if is_same => PostmasterStatus::Standby,
        _ => PostmasterStatus::Starting,
    }
}

/// Makes a directory of mode 0700 that belongs to `account`, or takes over an existing one.
pub(crate) fn make_private_directory(path: &Path, account: Account) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .and_then(|()| std::fs::set_permissions(path, PermissionsExt::from_mode(0o700)))
        .and_then(|()| give_to(path, account))
        .map_err(|source| Error::io("create the directory", path, source))
}

/// Writes a file of mode 0600 that belongs to `account`, replacing what was there (a link is
/// replaced, not followed).
pub(crate) fn write_private(path: &Path, text: &str, account: Account) -> Result<()> {
    let write = || {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        give_to(path, account)
    };
    write().map_err(|source| Error::io("write", path, source))
}

/// Changes the owner, where that is not us.
pub(crate) fn give_to(path: &Path, account: Account) -> std::io::Result<()> {
    if account == Account::current() {
        return Ok(());
    }
    std::os::unix::fs::lchown(path, Some(account.uid), Some(account.gid))
}

pub(crate) fn open_log(path: &Path, account: Account) -> Result<File> {
    let open = || {
        let log = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        give_to(path, account)?;
        Ok(log)
    };
    open().map_err(|source| Error::io("open the log", path, source))
}

pub(crate) fn log_tail(path: &Path) -> String {
    last_lines(&log_end(path), LOG_LINES)
}

/// The longest log that is read from its beginning.
const WHOLE_LOG_MAX_BYTES: u64 = 64 << 20;

/// The whole log; `None` when it cannot be read or is a runaway one.
pub(crate) fn whole_log(path: &Path) -> Option<String> {
    let mut text = Vec::new();
    let file = File::open(path).ok()?;
    file.take(WHOLE_LOG_MAX_BYTES + 1).read_to_end(&mut text).ok()?;
    (text.len() as u64 <= WHOLE_LOG_MAX_BYTES).then(|| String::from_utf8_lossy(&text).into_owned())
}

/// The last part of a log.
fn log_end(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&text[text.len().saturating_sub(64 << 10)..]).into_owned()
}

/// The text of a `postgresql.conf`; later settings win.
pub(crate) fn settings_text(settings: &[(String, String)]) -> String {
    settings.iter().fold(String::new(), |mut text, (name, value)| {
        // Within quotes a quote is doubled and a backslash begins an escape.
        let value = value.replace('\\', "\\\\").replace('\'', "''");
        let _ = writeln!(text, "{name} = '{value}'");
        text
    })
}

/// `postgresql:///database?host=…`: understood by libpq and by tokio-postgres. `options` are the
/// server's command-line options.
pub(crate) fn socket_url(
    socket_directory: &Path,
    port: u16,
    user: &str,
    database: &str,
    options: &str,
) -> String {
    let host = percent_encoded(&socket_directory.display().to_string());
    let [user, database] = [user, database].map(percent_encoded);
    let mut url = format!("postgresql://{user}@{host}:{port}/{database}");
    if !options.is_empty() {
        let _ = write!(url, "?options={}", percent_encoded(options));
    }
    url
}

pub(crate) fn percent_encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
        encoded
    })
}

fn free_port() -> Result<u16> {
    std::net::TcpListener::bind(("127.0.0.1", 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|source| Error::io("find a free port on", "127.0.0.1", source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_quoted_as_the_server_reads_them() {
        let settings = [("a".to_owned(), "it's".to_owned()), ("b".to_owned(), "c:\\d".to_owned())];
        assert_eq!(settings_text(&settings), "a = 'it''s'\nb = 'c:\\\\d'\n");
    }

    #[test]
    fn urls_survive_odd_names() {
        let url = socket_url(Path::new("/tmp/a b"), 5432, "us/er", "d?b", "-c a=b");
        assert_eq!(url, "postgresql://us%2Fer@%2Ftmp%2Fa%20b:5432/d%3Fb?options=-c%20a%3Db");
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_replaced_by_a_short_one() {
        let root = tempfile::tempdir().unwrap();
        let long = root.path().join("x".repeat(100));
        let sockets = SocketDirectory::create(&long, Account::current()).unwrap();
        assert!(sockets.path.starts_with("/tmp"));
        assert!(sockets.path.join(".s.PGSQL.65535.lock").as_os_str().len() <= 107);
        let path = sockets.path.clone();
        drop(sockets);
        assert!(!path.exists());
    }
}
