//! Child processes that are fed and read while they run: what goes through them is larger than memory.

use std::io;

use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::process::{ChildStdin, ChildStdout};
use tokio::task::JoinHandle;

use crate::Error;
use crate::process::{Program, Result, Running, describe, keep_ends, told};

/// A child with pipes. Dropping it ends it, with its whole process group.
#[derive(Debug)]
pub struct Piped {
    name: String,
    running: Running,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: JoinHandle<io::Result<Vec<u8>>>,
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
        Ok(Piped { name: self.name(), running, stdin, stdout, stderr })
    }
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

    /// Writes to its standard input. False when it does not read any more, which its end explains.
    pub async fn feed(&mut self, bytes: &[u8]) -> bool {
        let Some(pipe) = &mut self.stdin else { return false };
        let fed = pipe.write_all(bytes).await.is_ok();
        if !fed {
            self.stdin = None;
        }
        fed
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
        Err(Error::Program {
            program: self.name,
            outcome: describe(status),
            output: told(&said),
        })
    }
}
