//! The archive as a service on a server's host: its commands ask over a socket, and most of what they ask for was done before.
//!
//! A server hands over one file of its log at a time and waits, and asks for one at a time. The service stores what the
//! server has marked as ready next ([`ahead`]), and fetches what a recovery will want next ([`readahead`]). It answers what
//! [`push`](super::push) and [`get`](super::get) would have, only sooner, and it keeps a repository open, which each command would
//! have to open for itself. It is never needed: whoever finds nobody at the socket does the work himself.
//!
//! A connection carries one question and its answer. The socket is its owner's alone.

mod ahead;
mod ask;
mod readahead;
#[cfg(test)]
mod tests;
mod words;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use proto::{Action, Code, Failure, WalFileName};
use repository::Repository;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::ahead::Ahead;
pub use self::ask::{ask_for, ask_to_store};
use self::readahead::ReadAhead;
use self::words::{Answer, Question};
use super::Until;
use super::gap::Asked;
use super::get::{self, Got};
use super::lineage::Whose;

/// Where a server that this program starts finds its service: its `restore_command` is the same without it.
pub const SOCKET_VARIABLE: &str = "PGMUSTER_WAL_SOCKET";
/// Questions at once. A server asks one at a time; beyond this one waits.
const QUESTIONS_MAX: usize = 64;
/// A question is one line, and whoever connects has it at hand.
const ASKED_WITHIN: Duration = Duration::from_secs(10);
/// How long a service that ends goes on with what was asked.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);
/// How often is looked whether something fetched ahead is wanted no more.
const SWEEP_EVERY: Duration = Duration::from_secs(15);
/// Repositories that are kept open.
const OPEN_MAX: usize = 64;

/// Opens the repository that has somebody's archive.
#[async_trait]
pub trait OpenArchive: fmt::Debug + Send + Sync + 'static {
    /// Opens it anew.
    async fn open(&self, whose: Whose) -> Result<Repository, Failure>;
}

/// A service that answers at its socket until it is dropped or stopped.
#[derive(Debug)]
pub struct Service {
    path: PathBuf,
    stop: CancellationToken,
    serving: JoinHandle<()>,
}

impl Service {
    /// Takes its place at `path` and begins to answer. What a dead process left there is replaced, a service that answers is
    /// not. Must be called inside a tokio runtime.
    pub async fn listen(path: &Path, opener: Arc<dyn OpenArchive>) -> io::Result<Self> {
        let listener = bind(path).await?;
        let stop = CancellationToken::new();
        let archives = Arc::new(Archives {
            opener,
            open: Mutex::default(),
            ahead: Arc::default(),
            readahead: ReadAhead::default(),
        });
        let serving = tokio::spawn(serve(listener, archives, stop.clone()));
        Ok(Self { path: path.to_owned(), stop, serving })
    }

    /// Takes no more questions, answers those it has if that does not take long, and goes.
    pub async fn stop(mut self) {
        self.stop.cancel();
        // Whoever asks from now on finds nobody and does the work himself.
        let _ = std::fs::remove_file(&self.path);
        let _ = (&mut self.serving).await;
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if !self.stop.is_cancelled() {
            self.stop.cancel();
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Binds a socket that nobody else can open, not even for a moment: it is made in a private directory and moved into place.
async fn bind(path: &Path) -> io::Result<UnixListener> {
    if UnixStream::connect(path).await.is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another service answers there"));
    }
    let private = tempfile::Builder::new()
        .prefix(".")
        .rand_bytes(3)
        .tempdir_in(path.parent().unwrap_or(Path::new("/")))?;
    let inside = private.path().join("s");
    let listener = UnixListener::bind(&inside)?;
    std::fs::rename(&inside, path)?;
    Ok(listener)
}

async fn serve(listener: UnixListener, archives: Arc<Archives>, stop: CancellationToken) {
    let questions = TaskTracker::new();
    let room = Arc::new(Semaphore::new(QUESTIONS_MAX));
    let mut sweep = tokio::time::interval(SWEEP_EVERY);
    loop {
        let (stream, permit) = tokio::select! {
            () = stop.cancelled() => break,
            _ = sweep.tick() => {
                archives.readahead.sweep();
                continue;
            }
            next = next(&listener, &room) => next,
        };
        let archives = Arc::clone(&archives);
        questions.spawn(async move {
            if let Err(error) = archives.serve(stream).await {
                tracing::debug!("Whoever asked for WAL has gone: {error}");
            }
            drop(permit);
        });
    }
    drop(listener);
    questions.close();
    let _ = tokio::time::timeout(ANSWERED_WITHIN, questions.wait()).await;
}

async fn next(
    listener: &UnixListener,
    room: &Arc<Semaphore>,
) -> (UnixStream, Option<tokio::sync::OwnedSemaphorePermit>) {
    let permit = Arc::clone(room).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, permit),
            Err(error) => {
                tracing::warn!("The WAL service cannot take a question: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// What the questions share.
#[derive(Debug)]
struct Archives {
    opener: Arc<dyn OpenArchive>,
    open: Mutex<BTreeMap<Whose, Arc<Repository>>>,
    ahead: Arc<Ahead>,
    readahead: ReadAhead,
}

impl Archives {
    async fn serve(self: Arc<Self>, stream: UnixStream) -> io::Result<()> {
        let (mut from, mut to) = stream.into_split();
        let read = tokio::time::timeout(ASKED_WITHIN, words::read::<Question>(&mut from)).await;
        let question = read.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let answer = match question {
            Ok(question) => self.answer(question).await.unwrap_or_else(Answer::Failed),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Answer::Failed(not_understood(&error))
            }
            Err(error) => return Err(error),
        };
        words::say(&mut to, answer).await
    }

    async fn answer(&self, question: Question) -> Result<Answer, Failure> {
        let whose = match &question {
            Question::Store { whose, .. } | Question::Fetch { whose, .. } => whose.clone(),
        };
        let repository = self.repository(&whose).await?;
        match question {
            Question::Store { path, .. } => self.store(&repository, &whose, &path).await,
            Question::Fetch { file, to, until, .. } => {
                let file = file.parse().map_err(|error| not_understood(&error))?;
                self.fetch(&repository, &whose, &file, &to, until).await
            }
        }
    }

    async fn store(
        &self,
        repository: &Arc<Repository>,
        whose: &Whose,
        path: &Path,
    ) -> Result<Answer, Failure> {
        let pushed = self.ahead.push(repository, whose, path).await?;
        Ok(Answer::Stored { lineage: pushed.identity.lineage, stored: pushed.stored })
    }

    async fn fetch(
        &self,
        repository: &Arc<Repository>,
        whose: &Whose,
        file: &WalFileName,
        to: &Path,
        until: Option<Until>,
    ) -> Result<Answer, Failure> {
        let (identity, server) = get::recipient(repository, whose, to).await?;
        let found = self.readahead.fetch(repository, identity.lineage, file, to).await?;
        let asked = Asked { repository, identity: &identity, file, to, server };
        Ok(match get::hand_over(asked, found, until).await? {
            Got::Written => Answer::Written,
            Got::NotThere => Answer::NotThere,
        })
    }

    async fn repository(&self, whose: &Whose) -> Result<Arc<Repository>, Failure> {
        let kept = self.open.lock().await.get(whose).cloned();
        if let Some(repository) = kept
            && repository.check_there().await.is_ok()
        {
            return Ok(repository);
        }
        let mut open = self.open.lock().await;
        let repository = Arc::new(self.opener.open(whose.clone()).await?);
        if open.len() >= OPEN_MAX {
            open.clear();
        }
        open.insert(whose.clone(), Arc::clone(&repository));
        Ok(repository)
    }
}

fn not_understood(error: &dyn fmt::Display) -> Failure {
    let what = format!("the WAL service did not understand the question: {error}");
    Failure::new(Code::RequestInvalid, Action::FixConfig, what)
        .with_hint("It is of another version than the command: start it again after an update.")
}
