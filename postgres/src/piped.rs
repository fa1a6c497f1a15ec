//! Child processes that are fed and read while they run: what goes through them is larger than memory.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::process::{ChildStdin, ChildStdout};
use tokio::task::JoinHandle;

use crate::Error;
use crate::process::{Program, Result, Running, describe, keep_ends, told};

/// Bytes in a pipe: as much as everybody may have.
const PIPE_BYTES: usize = 1 << 20;
/// How long a full pipe is left alone. Whoever reads it is not through with it before, unless he reads 500 MB in a second; who
/// looks earlier writes a page or two each time, and takes from others the time that it costs to be woken so often.
const FULL_PAUSE: Duration = Duration::from_millis(2);

/// A child with pipes. Dropping it ends it, with its whole process group.
#[derive(Debug)]
pub struct Piped {
    name: String,
    running: Running,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: JoinHandle<io::Result<Vec<u8>>>,
    /// A full standard input holds [`PIPE_BYTES`].
    is_wide: bool,
}

impl Program {
    /// Starts the program with pipes at both ends. Of a long standard error the beginning and the end are kept.
    pub async fn piped(&self) -> Result<Piped> {
        let (mut running, stdin, stdout, stderr) = self.start_piped().await?;
        let Some(stderr) = stderr else {
            running.kill();
            let source = io::Error::other("it has no standard error");
            return Err(Error::ProgramStart { program: self.name(), source });
        };
        let stderr = tokio::spawn(keep_ends(BufReader::new(stderr)));
        let is_wide = widen(stdin.as_ref().map(AsFd::as_fd));
        widen(stdout.as_ref().map(AsFd::as_fd));
        Ok(Piped { name: self.name(), running, stdin, stdout, stderr, is_wide })
    }
}

/// Lets more lie in a pipe, so that whoever writes and whoever reads take turns less often; says whether it does. A limit of the
/// system or of the account may forbid it.
fn widen(pipe: Option<BorrowedFd<'_>>) -> bool {
    let widened = pipe.map(|pipe| rustix::pipe::fcntl_setpipe_size(pipe, PIPE_BYTES));
    widened.is_some_and(|size| size.is_ok_and(|size| size >= PIPE_BYTES))
}

impl Piped {
    /// The process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.running.pid()
    }

    /// What it says on standard output; whoever took it reads to the end, or the child waits for ever.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.stdout.take()
    }

    /// The same to be read by a thread that waits for it.
    pub fn take_stdout_blocking(&mut self) -> Result<Option<std::fs::File>> {
        let lost = |source| Error::ProgramStart { program: self.name.clone(), source };
        let pipe = self.stdout.take().map(ChildStdout::into_owned_fd).transpose().map_err(lost)?;
        Ok(pipe.map(std::fs::File::from))
    }

    /// Writes to its standard input. False when it does not read any more, which its end explains.
    pub async fn feed(&mut self, mut bytes: &[u8]) -> bool {
        let Some(pipe) = &mut self.stdin else { return false };
        while !bytes.is_empty() {
            let Ok(fed @ 1..) = pipe.write(bytes).await else {
                self.stdin = None;
                return false;
            };
            bytes = &bytes[fed..];
            if !bytes.is_empty() && self.is_wide {
                tokio::time::sleep(FULL_PAUSE).await;
            }
        }
        true
    }

    /// Closes its standard input and waits for its end, while what is left of its standard output is thrown away. Anything
    /// but exit code 0 is an error. Returns the end of its standard error: warnings.
    pub async fn end(mut self) -> Result<String> {
        drop(self.stdin.take());
        let drain = async {
            if let Some(mut stdout) = self.stdout.take() {
                let _ = tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await;
            }
        };
        let ((), status) = tokio::join!(drain, self.running.wait());
        let lost = |source| Error::ProgramStart { program: self.name.clone(), source };
        let status = status.map_err(lost)?;
        let stderr = match (&mut self.stderr).await {
            Ok(tail) => tail.map_err(lost)?,
            Err(gone) => return Err(lost(io::Error::other(gone))),
        };
        let said = String::from_utf8_lossy(&stderr).into_owned();
        if status.success() {
            return Ok(said);
        }
        Err(Error::Program { program: self.name, outcome: describe(status), output: told(&said) })
    }
}
