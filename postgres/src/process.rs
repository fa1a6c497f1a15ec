//! Child processes: PostgreSQL's programs, started without a shell, under an account that may run
//! them, and tied to us.
//!
//! Every child gets its own process group, an environment of a few words, bounded output and a
//! deadline. It is bound to this process by the kernel (`setpriv --pdeathsig`), so that a killed
//! parent leaves no server behind. The signal goes out when the *thread* that started the child
//! ends, so all children are started by one thread that lives as long as the process; a thread of a
//! pool would take its children along when it retires.
//!
//! Deliberately not here: what the programs are for, and any retry.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::{OnceCell, oneshot};
use tokio_util::sync::CancellationToken;

use crate::Error;

/// What the file side of this crate returns.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(what: &str, path: impl AsRef<Path>, source: io::Error) -> Self {
        Self::Io { what: what.to_owned(), path: path.as_ref().to_owned(), source }
    }
}

/// Where the programs of the system are looked for; children get the same `PATH`.
const SYSTEM_PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin";
/// What is kept of a child's standard output: enough for any listing we ask for, not for a table.
const STDOUT_LIMIT_BYTES: usize = 4 << 20;
/// What is kept of a child's standard error, from its end; of a piped one as much of its beginning as well.
const STDERR_LIMIT_BYTES: usize = 64 << 10;
/// Lines of standard error that go into an error text.
pub(crate) const ERROR_LINES: usize = 12;
/// How PostgreSQL's programs and servers mark an error.
const ERROR_MARKS: [&str; 4] = [": error: ", ": fatal: ", "ERROR:", "FATAL:"];
/// Lines before an error that say what it is about.
const LINES_BEFORE: usize = 2;
/// How long a server may take over an immediate shutdown before it is killed: the postmaster itself
/// gives its children five seconds.
const QUIT_PATIENCE: Duration = Duration::from_secs(8);
/// How long a killed child may take to be reaped; it can only be late in uninterruptible sleep.
const KILL_PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks at something that has no event to wait for.
pub(crate) const POLL: Duration = Duration::from_millis(5);
/// `setpriv`, `unshare` and `id` do nothing slow; a name service behind `id` may.
const TOOL_TIMEOUT: Duration = Duration::from_secs(10);

/// The user and group a child runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// User id.
    pub uid: u32,
    /// Primary group id; supplementary groups are dropped.
    pub gid: u32,
}

impl Account {
    /// The account of this process.
    pub fn current() -> Self {
        Self { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    }

    /// The account that owns `path`.
    pub fn owner_of(path: &Path) -> Result<Self> {
        let metadata =
            std::fs::symlink_metadata(path).map_err(|source| Error::io("inspect", path, source))?;
        Ok(Self { uid: metadata.uid(), gid: metadata.gid() })
    }

    /// The account called `name`, asked of the system's name service.
    pub async fn named(name: &str) -> Result<Self> {
        let ask = async |flag: &str| {
            let output = Program::new("id")
                .args([flag, "--", name])
                .run(TOOL_TIMEOUT, &CancellationToken::new())
                .await?;
            output.stdout_text().trim().parse().map_err(|_| Error::Program {
                program: "id".to_owned(),
                outcome: "an answer that is no number".to_owned(),
                output: output.stdout_text(),
            })
        };
        Ok(Self { uid: ask("-u").await?, gid: ask("-g").await? })
    }

    /// An account that may run a server: the current one, or `postgres` when that is root.
    pub async fn of_servers() -> Result<Self> {
        let current = Self::current();
        if current.is_root() { Self::named("postgres").await } else { Ok(current) }
    }

    /// Whether this is the superuser, as whom PostgreSQL refuses to run.
    pub fn is_root(self) -> bool {
        self.uid == 0
    }
}

/// What the kernel sends a child whose parent died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeathSignal {
    /// Ends any program at once.
    Kill,
    /// For a PostgreSQL server: an immediate shutdown, which takes every backend along and frees
    /// shared memory. After SIGKILL a busy backend would run on to the end of its statement.
    Quit,
}

impl DeathSignal {
    fn name(self) -> &'static str {
        match self {
            Self::Kill => "KILL",
            Self::Quit => "QUIT",
        }
    }
}

/// How far a child is kept from the rest of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Isolation {
    /// Own network namespace without any interface that is up, and own System V IPC.
    Namespaces {
        /// Whether the namespaces hang on a user namespace of their own (without root they must).
        user_namespace: bool,
    },
    /// None; the reason why not.
    None(String),
}

impl Isolation {
    /// Finds out what this machine allows to `account` (the current one otherwise), by trying it.
    pub async fn probe(account: Option<Account>) -> Self {
        let root = Account::current().is_root();
        let mut reason = String::new();
        for user_namespace in if root { &[false, true][..] } else { &[true][..] } {
            let candidate = Self::Namespaces { user_namespace: *user_namespace };
            let attempt = Program::new("true").account(account).isolation(candidate.clone());
            match attempt.run(TOOL_TIMEOUT, &CancellationToken::new()).await {
                Ok(_) => return candidate,
                Err(error) => reason = error.to_string(),
            }
        }
        Self::None(reason)
    }

    fn flags(&self) -> &'static [&'static str] {
        match self {
            Self::Namespaces { user_namespace: true } => {
                &["--user", "--map-current-user", "--net", "--ipc", "--"]
            }
            Self::Namespaces { user_namespace: false } => &["--net", "--ipc", "--"],
            Self::None(_) => &[],
        }
    }
}

/// A program to be run: an argument vector and what surrounds it. Nothing ever passes through a
/// shell.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    args: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    account: Option<Account>,
    isolation: Isolation,
    death_signal: DeathSignal,
    stdin: Vec<u8>,
}

/// What a program that ended well has said.
#[derive(Debug, Clone)]
pub struct Output {
    /// The first 4 MiB of standard output.
    pub stdout: Vec<u8>,
    /// The last 64 KiB of standard error.
    pub stderr: Vec<u8>,
    /// Whether standard output was longer than what is kept.
    pub truncated: bool,
}

impl Output {
    /// Standard output as text.
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Program {
    /// `program`: a path, or a name that is looked up in the system's directories (not in this
    /// process's `PATH`).
    pub fn new(program: impl AsRef<Path>) -> Self {
        Self {
            path: program.as_ref().to_owned(),
            args: Vec::new(),
            environment: Vec::new(),
            directory: None,
            account: None,
            isolation: Isolation::None("not asked for".to_owned()),
            death_signal: DeathSignal::Kill,
            stdin: Vec::new(),
        }
    }

    /// Appends one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Appends arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Adds a variable to the child's environment, which is otherwise `PATH`, `LC_ALL=C` and
    /// `TZ=UTC`.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// The child's working directory; `/` otherwise.
    #[must_use]
    pub fn directory(mut self, directory: impl AsRef<Path>) -> Self {
        self.directory = Some(directory.as_ref().to_owned());
        self
    }

    /// Runs the child as `account`, which needs root unless it is the current one.
    #[must_use]
    pub fn account(mut self, account: Option<Account>) -> Self {
        self.account = account;
        self
    }

    /// Runs the child inside the namespaces that [`Isolation::probe`] found.
    #[must_use]
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.isolation = isolation;
        self
    }

    /// What the child gets when this process dies, and first when its [`Running`] is dropped.
    #[must_use]
    pub fn death_signal(mut self, signal: DeathSignal) -> Self {
        self.death_signal = signal;
        self
    }

    /// What the child reads on its standard input.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// The name in error texts; arguments are left out, they may be long.
    pub(crate) fn name(&self) -> String {
        self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned()
    }

    /// Runs the program to its end. Anything but exit code 0 is an error that carries the end of
    /// standard error.
    ///
    /// After `timeout`, and when `cancel` fires, the whole process group is killed. Dropping the
    /// future does the same.
    pub async fn run(&self, timeout: Duration, cancel: &CancellationToken) -> Result<Output> {
        let mut command = self.command().await?;
        command.stdin(if self.stdin.is_empty() { Stdio::null() } else { Stdio::piped() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut running = self.start(command).await?;
        let stdin = running.child.stdin.take();
        let stdout = running.child.stdout.take();
        let stderr = running.child.stderr.take();
        let work = async {
            let feed = async {
                if let Some(mut pipe) = stdin {
                    // A child may end without reading all of its input; its exit code tells.
                    let _ = pipe.write_all(&self.stdin).await;
                }
            };
            let ((), head, tail, status) =
                tokio::join!(feed, keep_head(stdout), keep_tail(stderr), running.child.wait());
            (head, tail, status)
        };
        let (head, tail, status) = tokio::select! {
            done = work => done,
            () = tokio::time::sleep(timeout) => {
                return Err(Error::Deadline { what: format!("run {}", self.name()) });
            }
            () = cancel.cancelled() => return Err(Error::Cancelled { what: format!("run {}", self.name()) }),
        };
        let lost = |source| Error::ProgramStart { program: self.name(), source };
        let status = status.map_err(lost)?;
        let (stdout, truncated) = head.map_err(lost)?;
        let stderr = tail.map_err(lost)?;
        if status.success() {
            return Ok(Output { stdout, stderr, truncated });
        }
        let said = if stderr.is_empty() { &stdout } else { &stderr };
        Err(Error::Program {
            program: self.name(),
            outcome: describe(status),
            output: told(&String::from_utf8_lossy(said)),
        })
    }

    /// Starts the program with all three pipes.
    pub(crate) async fn start_piped(
        &self,
    ) -> Result<(Running, Option<ChildStdin>, Option<ChildStdout>, Option<ChildStderr>)> {
        let mut command = self.command().await?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut running = self.start(command).await?;
        let child = &mut running.child;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        Ok((running, pipes.0, pipes.1, pipes.2))
    }

    /// Starts the program with both its outputs appended to `log`, and returns at once.
    pub async fn spawn(&self, log: std::fs::File) -> Result<Running> {
        let mut command = self.command().await?;
        let failed = |source| Error::ProgramStart { program: self.name(), source };
        command.stdin(Stdio::null());
        command.stderr(log.try_clone().map_err(failed)?);
        command.stdout(log);
        self.start(command).await
    }

    /// `unshare … setpriv … program args`. All three replace each other in one process, so the pid
    /// is the program's. The death signal is set last: a change of user or of user namespace
    /// clears it.
    async fn command(&self) -> Result<Command> {
        let missing = |program: &Path| Error::ProgramStart {
            program: program.display().to_string(),
            source: io::Error::from(io::ErrorKind::NotFound),
        };
        let setpriv = setpriv().await;
        let mut become_account: Vec<OsString> = Vec::new();
        if let Some(Account { uid, gid }) = self.account.filter(|it| *it != Account::current()) {
            become_account.push(setpriv.clone().ok_or_else(|| missing("setpriv".as_ref()))?.into());
            become_account.push(format!("--reuid={uid}").into());
            become_account.push(format!("--regid={gid}").into());
            become_account.extend(["--clear-groups", "--"].map(OsString::from));
        }
        let mut unshare: Vec<OsString> = Vec::new();
        if !self.isolation.flags().is_empty() {
            let path =
                find_in(SYSTEM_PATH, "unshare").ok_or_else(|| missing("unshare".as_ref()))?;
            unshare.push(path.into());
            unshare.extend(self.isolation.flags().iter().map(OsString::from));
        }
        // A user namespace maps one account, so that comes first; other namespaces take root.
        let needs_root = self.isolation == Isolation::Namespaces { user_namespace: false };
        let mut argv = if needs_root {
            [unshare, become_account].concat()
        } else {
            [become_account, unshare].concat()
        };
        if let Some(setpriv) = setpriv {
            argv.push(setpriv.into());
            argv.extend(["--pdeathsig", self.death_signal.name(), "--"].map(OsString::from));
        }
        argv.push(if self.path.components().count() > 1 {
            self.path.clone().into()
        } else {
            let name = self.path.as_os_str();
            find_in(SYSTEM_PATH, name).ok_or_else(|| missing(&self.path))?.into()
        });
        argv.extend(self.args.iter().cloned());

        let mut argv = argv.into_iter();
        let mut command = Command::new(argv.next().unwrap_or_default());
        command.args(argv).env_clear().envs([
            ("PATH", SYSTEM_PATH),
            ("LC_ALL", "C"),
            ("TZ", "UTC"),
        ]);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.current_dir(self.directory.as_deref().unwrap_or(Path::new("/")));
        command.process_group(0).kill_on_drop(true);
        Ok(command)
    }

    async fn start(&self, command: Command) -> Result<Running> {
        let child = spawn_on_lasting_thread(command)
            .await
            .map_err(|source| Error::ProgramStart { program: self.name(), source })?;
        Ok(Running { child, death_signal: self.death_signal })
    }
}

/// A child that runs. Dropping it ends it, with its whole process group.
#[derive(Debug)]
pub struct Running {
    child: Child,
    death_signal: DeathSignal,
}

impl Running {
    /// The process id; none once the child was seen to have ended (the number may belong to
    /// somebody else by then).
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Sends a signal to the child alone.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match self.target() {
            Some(pid) => Ok(kill_process(pid, signal)?),
            None => Err(io::Error::from(io::ErrorKind::NotFound)),
        }
    }

    /// Waits for the end. Safe to call again, and to be dropped while it waits.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// Whether the child has ended, and how.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Ends the child and everything below it with SIGKILL, as a power cut would, and waits until
    /// all are gone.
    pub fn kill(&mut self) {
        let Some(pid) = self.target() else { return };
        let below = descendants(pid.as_raw_nonzero().get().unsigned_abs());
        let _ = kill_process_group(pid, Signal::KILL);
        let _ = kill_process(pid, Signal::KILL);
        for process in &below {
            process.kill();
        }
        self.settle(KILL_PATIENCE);
        wait_blocking(KILL_PATIENCE, || below.iter().all(|process| !process.is_alive()));
    }

    fn target(&self) -> Option<Pid> {
        self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw)
    }

    fn settle(&mut self, patience: Duration) -> bool {
        wait_blocking(patience, || !matches!(self.child.try_wait(), Ok(None)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        if self.death_signal == DeathSignal::Quit {
            let _ = self.signal(Signal::QUIT);
            if self.settle(QUIT_PATIENCE) {
                return;
            }
        }
        self.kill();
    }
}

/// A process as the kernel knows it: a number may be given out again, a number with a start time is
/// not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessIdentity {
    /// The process id.
    pub pid: u32,
    /// Clock ticks from the machine's boot to the process's start.
    pub started_ticks: u64,
}

impl ProcessIdentity {
    /// The process that has this id now.
    pub fn of(pid: u32) -> Option<Self> {
        stat(pid).map(|(_, started_ticks, _)| Self { pid, started_ticks })
    }

    /// Whether this very process still runs; one that has ended and waits for its parent does not.
    pub fn is_alive(&self) -> bool {
        matches!(stat(self.pid), Some((_, started, state)) if started == self.started_ticks && state != 'Z')
    }

    /// Sends SIGKILL if this very process still runs.
    pub fn kill(&self) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        if let (true, Some(pid)) = (self.is_alive(), pid) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// All processes below `pid`, the nearest first. A snapshot: a process that forks meanwhile may be
/// missed.
pub(crate) fn descendants(pid: u32) -> Vec<ProcessIdentity> {
    let all: Vec<(u32, u32, u64)> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|id: u32| stat(id).map(|(parent, started, _)| (id, parent, started)))
        .collect();
    let mut found = Vec::new();
    let mut parents = vec![pid];
    while let Some(parent) = parents.pop() {
        for (pid, _, started_ticks) in all.iter().copied().filter(|(_, of, _)| *of == parent) {
            found.push(ProcessIdentity { pid, started_ticks });
            parents.push(pid);
        }
    }
    found
}

/// Parent, start time in ticks and state of a process. The command's name stands in parentheses and
/// may hold any character.
fn stat(pid: u32) -> Option<(u32, u64, char)> {
    let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text);
    let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
    Some((
        fields.get(1)?.parse().ok()?,
        fields.get(19)?.parse().ok()?,
        fields.first()?.chars().next()?,
    ))
}

/// Waits, blocking, until `done` or until `patience` has passed; returns whether it is done.
pub(crate) fn wait_blocking(patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(POLL);
    }
}

/// The first executable called `name` in the colon-separated directories of `path`.
pub(crate) fn find_in(path: impl AsRef<OsStr>, name: impl AsRef<Path>) -> Option<PathBuf> {
    std::env::split_paths(path.as_ref())
        .map(|directory| directory.join(&name))
        .find(|candidate| is_executable(candidate))
}

pub(crate) fn is_executable(path: &Path) -> bool {
    let metadata = std::fs::metadata(path);
    metadata.is_ok_and(|metadata| metadata.is_file() && metadata.mode() & 0o111 != 0)
}

/// The last `count` lines of a text.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// What a program said, for an error text. Of much it is the first error that counts: what follows are the lines of a statement, or
/// consequences.
pub(crate) fn told(said: &str) -> String {
    let lines: Vec<&str> = said.trim_end().lines().collect();
    if lines.len() <= ERROR_LINES {
        return lines.join("\n");
    }
    let is_error = |line: &&str| ERROR_MARKS.iter().any(|mark| line.contains(mark));
    let first = lines.iter().position(is_error).map_or(0, |at| at.saturating_sub(LINES_BEFORE));
    let kept = &lines[first..lines.len().min(first + ERROR_LINES)];
    format!("{}\n({} more lines)", kept.join("\n"), lines.len() - kept.len())
}

/// How a child ended, in words.
pub(crate) fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// `setpriv`, if it is there and knows `--pdeathsig` (`busybox` has one that does not).
async fn setpriv() -> Option<PathBuf> {
    static FOUND: OnceCell<Option<PathBuf>> = OnceCell::const_new();
    let probe = async || {
        let path = find_in(SYSTEM_PATH, "setpriv")?;
        let mut command = Command::new(&path);
        command.args(["--pdeathsig", "KILL", "--", "true"]).env_clear().env("PATH", SYSTEM_PATH);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = spawn_on_lasting_thread(command).await.ok()?;
        let status = tokio::time::timeout(TOOL_TIMEOUT, child.wait()).await.ok()?.ok()?;
        status.success().then_some(path)
    };
    FOUND.get_or_init(probe).await.clone()
}

struct Request {
    command: Command,
    runtime: tokio::runtime::Handle,
    reply: oneshot::Sender<io::Result<Child>>,
}

async fn spawn_on_lasting_thread(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<SyncSender<Request>> = OnceLock::new();
    /// Requests in flight; a sender beyond this waits, and a spawn takes about a millisecond.
    const PENDING: usize = 64;
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, receiver) = sync_channel::<Request>(PENDING);
        let serve = move || {
            for Request { mut command, runtime, reply } in receiver {
                let _context = runtime.enter();
                // Nobody waits any more: the child comes back and is killed on drop.
                drop(reply.send(command.spawn()));
            }
        };
        // Without the thread the receiver is gone, and every request fails with a clear error
        // below.
        drop(std::thread::Builder::new().name("pgmuster-spawn".to_owned()).spawn(serve));
        sender
    });
    let gone = || io::Error::other("the thread that starts programs is gone");
    let (reply, answer) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    spawner.send(Request { command, runtime, reply }).map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?
}

async fn keep_head(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<(Vec<u8>, bool)> {
    let Some(mut pipe) = pipe else { return Ok((Vec::new(), false)) };
    let mut head = Vec::new();
    (&mut pipe).take(STDOUT_LIMIT_BYTES as u64).read_to_end(&mut head).await?;
    let rest = tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    Ok((head, rest > 0))
}

/// The beginning and the end of what comes out of a pipe.
pub(crate) async fn keep_ends(mut pipe: impl AsyncRead + Unpin) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    (&mut pipe).take(STDERR_LIMIT_BYTES as u64).read_to_end(&mut kept).await?;
    kept.append(&mut keep_tail(Some(pipe)).await?);
    Ok(kept)
}

async fn keep_tail(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let Some(mut pipe) = pipe else { return Ok(Vec::new()) };
    let mut tail = Vec::new();
    let mut chunk = vec![0; 8 << 10];
    loop {
        let n_bytes = pipe.read(&mut chunk).await?;
        if n_bytes == 0 {
            return Ok(tail);
        }
        tail.extend_from_slice(&chunk[..n_bytes]);
        if tail.len() > 2 * STDERR_LIMIT_BYTES {
            tail.drain(..tail.len() - STDERR_LIMIT_BYTES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_error_is_told_from_its_beginning_and_how_much_more_there_is() {
        let warnings = "pg_restore: warning: this\n".repeat(30);
        let about = "pg_restore: while PROCESSING TOC:\npg_restore: from TOC entry 215; 1255 16390 FUNCTION f()\n";
        let error = "pg_restore: error: could not execute query: ERROR:  syntax error\nCommand was: CREATE FUNCTION f()\n";
        let body = "  line of a body\n".repeat(100);
        let said = told(&format!("{warnings}{about}{error}{body}"));
        assert!(said.starts_with("pg_restore: while PROCESSING TOC:"), "{said}");
        assert!(said.contains("syntax error\nCommand was"), "{said}");
        assert!(said.ends_with("line of a body\n(122 more lines)"), "{said}");
        assert_eq!(said.lines().count(), ERROR_LINES + 1);
        // Without an error that is known as one, what came first.
        let lines: Vec<String> = (1..=14).map(|n| format!("line {n}\n")).collect();
        let said = told(&lines.concat());
        assert!(
            said.starts_with("line 1\n") && said.ends_with("line 12\n(2 more lines)"),
            "{said}"
        );
        assert_eq!(told("two\nlines\n"), "two\nlines");
    }
}
