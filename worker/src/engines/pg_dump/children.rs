//! The programs of a dump: one that writes, and beside it one that reads the same bytes and says whether they are whole.

use std::io::{self, Read};
use std::pin::pin;

use bytes::{Buf as _, Bytes, BytesMut};
use futures::{Stream, StreamExt as _};
use postgres::piped::Piped;
use postgres::process::Program;
use proto::Failure;
use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::failure::of_program;

/// Bytes read at once.
const CHUNK_BYTES: usize = 256 << 10;
/// Chunks on their way to whoever stores them.
const CHUNKS_MAX: usize = 4;

/// The output of a program as it comes, for a thread of its own. It ends without an error only when the program, and whatever
/// checked its output, ended well.
pub(super) struct Output {
    chunks: mpsc::Receiver<Result<Bytes, Failure>>,
    current: Bytes,
    /// Ends the programs when this is dropped.
    _nobody_reads: tokio_util::sync::DropGuard,
}

impl Read for Output {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                // An empty chunk is the end.
                Some(Ok(chunk)) if chunk.is_empty() => return Ok(0),
                Some(Ok(chunk)) => self.current = chunk,
                Some(Err(failure)) => return Err(io::Error::other(failure)),
                None => return Err(io::Error::other("its end is not known")),
            }
        }
        let length = self.current.len().min(buffer.len());
        buffer[..length].copy_from_slice(&self.current[..length]);
        self.current.advance(length);
        Ok(length)
    }
}

/// What is read, by whom it is checked, and what for.
pub(super) struct Pair {
    /// For messages: `database shop`.
    pub(super) what: String,
    pub(super) writer: Program,
    /// Reads the same bytes and throws away what it makes of them.
    pub(super) checker: Option<Program>,
}

impl Pair {
    /// Starts the programs. They end with `ended`, and when nobody reads any more.
    pub(super) async fn start(self, ended: &CancellationToken) -> Result<Output, Failure> {
        let Self { what, writer, checker } = self;
        let writer = writer.piped().await?;
        let checker = match checker {
            Some(checker) => Some(checker.piped().await?),
            None => None,
        };
        let (sender, chunks) = mpsc::channel(CHUNKS_MAX);
        let stop = ended.child_token();
        let guard = stop.clone().drop_guard();
        tokio::spawn(async move {
            // What is dropped here takes its programs along.
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = run(&what, writer, checker, &sender) => {}
            }
        });
        Ok(Output { chunks, current: Bytes::new(), _nobody_reads: guard })
    }
}

async fn run(
    what: &str,
    writer: Piped,
    checker: Option<Piped>,
    sender: &mpsc::Sender<Result<Bytes, Failure>>,
) {
    let last = match copy(what, writer, checker, sender).await {
        Ok(true) => Ok(Bytes::new()),
        Ok(false) => return,
        Err(failure) => Err(failure),
    };
    // Who does not listen any more does not want to know.
    let _ = sender.send(last).await;
}

/// False when nobody listens any more.
async fn copy(
    what: &str,
    mut writer: Piped,
    mut checker: Option<Piped>,
    sender: &mpsc::Sender<Result<Bytes, Failure>>,
) -> Result<bool, Failure> {
    let Some(mut stdout) = writer.take_stdout() else {
        return Err(Failure::bug(format!("the dump of {what} has no output")));
    };
    let mut refused = false;
    loop {
        let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
        let read = stdout.read_buf(&mut chunk).await;
        let read = read
            .map_err(|error| Failure::bug(format!("failed to read the dump of {what}: {error}")))?;
        if read == 0 {
            break;
        }
        let chunk = chunk.freeze();
        if let Some(checker) = &mut checker
            && !checker.feed(&chunk).await
        {
            refused = true;
            break;
        }
        if sender.send(Ok(chunk)).await.is_err() {
            return Ok(false);
        }
    }
    drop(stdout);
    // The one that wrote is asked first: what it says is the reason, what the other one says may follow from it. One whose
    // output was refused is ended by that, and has nothing to say.
    if !refused {
        tell(what, &writer.end().await.map_err(|error| of_program(what, error))?);
    }
    if let Some(checker) = checker {
        let whole = checker.end().await;
        whole.map_err(|error| not_whole(what, error))?;
    }
    if refused {
        let reason = "pg_restore stopped reading before the dump had ended";
        return Err(incomplete(what, reason));
    }
    Ok(true)
}

fn not_whole(what: &str, error: postgres::Error) -> Failure {
    match error {
        postgres::Error::Program { output, .. } => incomplete(what, &output),
        other => other.into(),
    }
}

fn incomplete(what: &str, reason: &str) -> Failure {
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
