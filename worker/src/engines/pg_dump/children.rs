//! The programs of a dump: those that write are read by a thread of the copy, those that read are fed from the repository.

use std::fs::File;
use std::io::{self, Read};
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use postgres::process::Program;
use proto::Failure;
use tokio::io::AsyncReadExt as _;
use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::failure::{is_of_database, of_program};

/// A program writes 4 KiB at a time. After a read that found less than this, more may gather in the pipe, which holds much more, for
/// so long: who reads at once is woken, and wakes, for each of them.
const FEW_BYTES: usize = 256 << 10;
const GATHERING: Duration = Duration::from_millis(1);

/// The output of a program as it comes, for a thread that waits for it. It ends without an error only when the program ended
/// well.
pub(super) struct Output {
    /// For messages: `database shop`.
    what: String,
    pipe: File,
    /// The last read found little.
    gathers: bool,
    end: End,
    /// It ended badly, for a reason that lies in what it was to read.
    unreadable: bool,
    /// Ends the program when this is dropped.
    _nobody_reads: DropGuard,
}

/// How the program ended.
enum End {
    /// It says so when there is nothing more to be read.
    Open(oneshot::Receiver<Result<String, postgres::Error>>),
    Well,
    Badly,
}

impl Output {
    /// Starts the program. It ends with `ended`, and when nobody reads any more.
    pub(super) async fn of(
        program: &Program,
        what: String,
        ended: &CancellationToken,
    ) -> Result<Self, Failure> {
        let mut running = program.piped().await?;
        let Some(pipe) = running.take_stdout_blocking()? else {
            return Err(Failure::bug(format!("the dump of {what} has no output")));
        };
        let stop = ended.child_token();
        let guard = stop.clone().drop_guard();
        let (tell, told) = oneshot::channel();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                // What is dropped here takes the program along, and with it the other end of the pipe.
                () = stop.cancelled() => {}
                // Who does not listen any more does not want to know.
                end = running.end() => drop(tell.send(end)),
            }
        });
        let end = End::Open(told);
        Ok(Self { what, pipe, gathers: false, end, unreadable: false, _nobody_reads: guard })
    }

    /// Whether it ended badly for a reason that lies in what it was to read, and in nothing else.
    pub(super) fn is_unreadable(&self) -> bool {
        self.unreadable
    }
}

impl Read for Output {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.gathers {
            std::thread::sleep(GATHERING);
        }
        let read = self.pipe.read(buffer)?;
        self.gathers = read < FEW_BYTES.min(buffer.len());
        if read > 0 || buffer.is_empty() {
            return Ok(read);
        }
        match std::mem::replace(&mut self.end, End::Badly) {
            End::Open(told) => match told.blocking_recv() {
                Ok(Ok(warnings)) => tell(&self.what, &warnings),
                Ok(Err(error)) => {
                    self.unreadable = is_of_database(&error);
                    return Err(io::Error::other(of_program(&self.what, error)));
                }
                Err(_) => return Err(io::Error::other("its end is not known")),
            },
            End::Well => {}
            End::Badly => return Err(io::Error::other("it has failed")),
        }
        self.end = End::Well;
        Ok(0)
    }
}

/// The failure of a dump that came to its end and is none.
pub(super) fn incomplete(what: &str, reason: &str) -> Failure {
    use proto::{Action, Code};

    let message = format!("what pg_dump wrote of {what} is no whole archive: {reason}");
    Failure::new(Code::DumpFailed, Action::Retry, message).with_hint(
        "Nothing was committed. pg_dump ended too early without saying so: look at the programs in use and at this machine.",
    )
}

fn tell(what: &str, warnings: &str) {
    for line in warnings.lines().filter(|line| !line.trim().is_empty()).take(20) {
        tracing::warn!("pg_dump of {what} says: {line}");
    }
}

/// Runs a program on bytes that come as a stream, and returns what it wrote, up to `keep` bytes. It may end before it has
/// read everything.
pub(super) async fn feed(
    what: &str,
    program: &Program,
    input: impl Stream<Item = Result<Bytes, repository::Error>>,
    keep: usize,
) -> Result<String, Failure> {
    let mut child = program.piped().await?;
    let stdout = child.take_stdout();
    let collect = async {
        let mut kept = Vec::new();
        if let Some(mut stdout) = stdout {
            let limit = u64::try_from(keep).unwrap_or(u64::MAX);
            let _ = (&mut stdout).take(limit).read_to_end(&mut kept).await;
            let _ = tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await;
        }
        kept
    };
    let serve = async {
        let mut input = pin!(input);
        while let Some(bytes) = input.next().await {
            if !child.feed(&bytes?).await {
                break;
            }
        }
        child.end().await.map_err(|error| of_program(what, error))
    };
    let (kept, served) = tokio::join!(collect, serve);
    served?;
    Ok(String::from_utf8_lossy(&kept).into_owned())
}
