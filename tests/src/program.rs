//! The built `pgmuster` program as a person or systemd runs it: started, watched, signalled, killed.

use std::ffi::OsStr;
use std::fmt;
use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::{eventually, services};

/// How long a program may take that is only run for its answer.
const RUN_BOUND: Duration = Duration::from_mins(2);

/// A running `pgmuster`. Dropping it kills it.
#[derive(Debug)]
pub struct Pgmuster {
    line: String,
    child: Child,
    stdout: Capture,
    stderr: Capture,
}

/// What a program left when it ended.
#[derive(Debug)]
pub struct Finished {
    /// The exit status: `status.code()` is `None` after a signal.
    pub status: ExitStatus,
    /// Data.
    pub stdout: String,
    /// Talk.
    pub stderr: String,
}

impl Finished {
    /// The exit code; -1 after a signal.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n--- stdout\n{}--- stderr\n{}", self.status, self.stdout, self.stderr)
    }
}

impl Pgmuster {
    /// Starts `pgmuster ARGUMENTS...` with an empty standard input.
    pub fn start(arguments: &[impl AsRef<OsStr>]) -> anyhow::Result<Self> {
        Self::start_with(arguments, |_| {})
    }

    /// The same after the test has set the program's environment or directory.
    pub fn start_with(
        arguments: &[impl AsRef<OsStr>],
        prepare: impl FnOnce(&mut Command),
    ) -> anyhow::Result<Self> {
        Self::start_under(&[], arguments, prepare)
    }

    /// The same, started by another program that in the end becomes it: `env`, `unshare`. `under` is that program and
    /// its first arguments; the path of `pgmuster` and its arguments follow them.
    pub fn start_under(
        under: &[String],
        arguments: &[impl AsRef<OsStr>],
        prepare: impl FnOnce(&mut Command),
    ) -> anyhow::Result<Self> {
        let mut command = match under {
            [] => Command::new(services::pgmuster()?),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(services::pgmuster()?);
                command
            }
        };
        command.args(arguments);
        prepare(&mut command);
        Self::spawn(command)
    }

    /// Starts any command, with an empty standard input: a script that calls `pgmuster`.
    pub fn spawn(mut command: Command) -> anyhow::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let arguments: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
        let program = command.get_program().to_string_lossy();
        let line = [program.as_ref(), &arguments.join(" ")].join(" ");
        let mut child = command.spawn().with_context(|| format!("start {line}"))?;
        let stdout = Capture::of(child.stdout.take().context("take its stdout")?);
        let stderr = Capture::of(child.stderr.take().context("take its stderr")?);
        Ok(Self { line, child, stdout, stderr })
    }

    /// Runs it to its end.
    pub fn run(arguments: &[impl AsRef<OsStr>]) -> anyhow::Result<Finished> {
        Self::start(arguments)?.wait(RUN_BOUND)
    }

    /// Waits for a line on either stream that holds `part`, and gives that line.
    pub fn wait_for_line(&mut self, part: &str, bound: Duration) -> anyhow::Result<String> {
        let what = format!("a line with {part:?} from {}", self.line);
        let found = eventually(what, bound, || {
            let ended = self.child.try_wait()?;
            let line = self.stdout.find(part).or_else(|| self.stderr.find(part));
            Ok(match (line, ended) {
                (Some(line), _) => Some(Ok(line)),
                (None, Some(status)) => Some(Err(status)),
                (None, None) => None,
            })
        });
        match found {
            Ok(Ok(line)) => Ok(line),
            // It may have said the line and ended between the two looks.
            Ok(Err(status)) => self.drained(part).with_context(|| {
                format!("{} ended ({status}) without it: {}", self.line, self.said())
            }),
            Err(error) => Err(error.context(self.said())),
        }
    }

    /// The process id, to look at its memory, its files and its children.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// SIGTERM: asks it to end.
    pub fn terminate(&self) -> anyhow::Result<()> {
        self.signal(Signal::TERM)
    }

    /// kill -9, and waits until it is gone.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().context("kill pgmuster")?;
        self.child.wait().context("wait for the killed pgmuster")?;
        Ok(())
    }

    /// How many lines it has written, on either stream, that hold `part`.
    pub fn count_lines(&self, part: &str) -> usize {
        let count = |text: String| text.lines().filter(|line| line.contains(part)).count();
        count(self.stdout.so_far()) + count(self.stderr.so_far())
    }

    /// Any signal: STOP and CONT make a worker that hangs and comes back.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.context("read the program's pid")?, signal).context("send a signal")
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits until it ends by itself.
    pub fn wait(mut self, bound: Duration) -> anyhow::Result<Finished> {
        let what = format!("the end of {}", self.line);
        let status = eventually(what, bound, || Ok(self.child.try_wait()?));
        let status = status.with_context(|| self.said())?;
        Ok(Finished { status, stdout: self.stdout.drain(), stderr: self.stderr.drain() })
    }

    /// Everything it has said so far, for a failing test to show.
    pub fn said(&self) -> String {
        format!("--- stdout\n{}--- stderr\n{}", self.stdout.so_far(), self.stderr.so_far())
    }

    fn drained(&mut self, part: &str) -> anyhow::Result<String> {
        self.stdout.drain();
        self.stderr.drain();
        match self.stdout.find(part).or_else(|| self.stderr.find(part)) {
            Some(line) => Ok(line),
            None => bail!("no line holds {part:?}"),
        }
    }
}

impl Drop for Pgmuster {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads one stream of a program into memory while it runs.
#[derive(Debug)]
struct Capture {
    text: Arc<Mutex<String>>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    fn of(stream: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let into = Arc::clone(&text);
        let thread = std::thread::spawn(move || {
            let mut lines = BufReader::new(stream);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                into.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_str(&String::from_utf8_lossy(&line));
                line.clear();
            }
        });
        Self { text, thread: Some(thread) }
    }

    fn so_far(&self) -> String {
        self.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Only after the program has ended. A child of it that holds the stream open is waited for no longer than this.
    fn drain(&mut self) -> String {
        let bound = Duration::from_secs(5);
        if let Some(thread) = self.thread.take() {
            let closed = eventually("the end of its output", bound, || {
                Ok(thread.is_finished().then_some(()))
            });
            if closed.is_ok() {
                let _ = thread.join();
            }
        }
        self.so_far()
    }

    fn find(&self, part: &str) -> Option<String> {
        self.so_far().lines().find(|line| line.contains(part)).map(str::to_owned)
    }
}
