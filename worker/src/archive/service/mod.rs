//! The archive as a service on a server's host: its commands ask over a socket, and most of what they ask for was done before.
//!
//! A server hands over one file of its log at a time and waits, and asks for one at a time. The service stores what the
//! server has marked as ready next ([`ahead`]), and fetches what a recovery will want next ([`readahead`]). It answers what
//! [`push`](fn@super::push) and [`get`](fn@super::get) would have, only sooner, and it keeps a repository open, which each command would
//! have to open for itself. It is never needed: whoever finds nobody at the socket does the work himself.
//!
//! A connection carries one question and its answer, and whoever closes it waits no more. The socket is its owner's alone. A
//! service puts nothing into a server's `pg_wal` but files that the server sweeps: the asker, who dies with the server's
//! command, puts them into their place.

mod ahead;
mod ask;
mod readahead;
mod tasks;
#[cfg(test)]
mod tests;
mod words;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use broker::PrivateSocket;
use proto::{Action, ClusterName, Code, Failure, WalFileName};
use repository::{Error, Repository};
use tempfile::NamedTempFile;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::ahead::Ahead;
pub use self::ask::{Asking, Heard};
use self::readahead::ReadAhead;
use self::tasks::Tasks;
use self::words::{Answer, Question};
use super::gap::Asked;
use super::get::{self, Found};
use super::lineage::Whose;
use super::{Until, buffers};

/// Where a server that this program starts finds its service: its `restore_command` is the same without it.
pub const SOCKET_VARIABLE: &str = "PGMUSTER_WAL_SOCKET";
/// Questions at once. A server asks one at a time; beyond this one waits.
const QUESTIONS_MAX: usize = 64;
/// A question is one line, and whoever connects has it at hand.
const ASKED_WITHIN: Duration = Duration::from_secs(10);
/// How long a file waits to be put into its place.
const TAKEN_WITHIN: Duration = Duration::from_mins(1);
/// How long a service that ends goes on with what was asked.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);
/// How long it goes on, after that, with what was begun ahead.
const STORED_WITHIN: Duration = Duration::from_secs(10);
/// How often is looked whether something fetched ahead is wanted no more.
const SWEEP_EVERY: Duration = Duration::from_secs(15);
/// Repositories that are kept open.
const OPEN_MAX: usize = 64;

/// Opens the repository that has somebody's archive.
#[async_trait]
pub trait OpenArchive: fmt::Debug + Send + Sync + 'static {
    /// Opens it anew. Fails when it is not the one that the asker names: he would be told what is in another one.
    async fn open(&self, whose: Whose, named: Option<String>) -> Result<Repository, Failure>;

    /// Whether somebody has written this cluster down where the service is configured, so that its name is no slip and its
    /// repository may not have seen it yet.
    fn has_written_down(&self, _: &ClusterName) -> bool {
        false
    }
}

/// What an opener says of a repository that is not its own.
pub fn another_repository(named: &str) -> Failure {
    let what = format!("this service has another repository than {named}");
    Failure::new(Code::ConfigInvalid, Action::FixConfig, what)
        .with_hint("Name the same repository, letter by letter, or none, in the command and where the service is configured.")
}

/// A service that answers at its socket until it is dropped or stopped.
#[derive(Debug)]
pub struct Service {
    path: PathBuf,
    /// Of the socket: another service may have come to its place.
    inode: u64,
    stop: CancellationToken,
    serving: JoinHandle<()>,
}

impl Service {
    /// Takes its place at `path` and begins to answer. What a dead process left there is replaced, a service that answers is
    /// not. Must be called inside a tokio runtime.
    pub async fn listen(path: &Path, opener: Arc<dyn OpenArchive>) -> io::Result<Self> {
        Self::with(path, Arc::new(Archives::of(opener))).await
    }

    async fn with(path: &Path, archives: Arc<Archives>) -> io::Result<Self> {
        let PrivateSocket { listener, inode } = PrivateSocket::bind(path).await?;
        let stop = CancellationToken::new();
        let serving = tokio::spawn(serve(listener, archives, stop.clone()));
        Ok(Self { path: path.to_owned(), inode, stop, serving })
    }

    /// Takes no more questions, answers those it has and stores what it has begun to store if that does not take long, and goes. Then
    /// nothing of it runs any more.
    pub async fn stop(mut self) {
        self.leave();
        let _ = (&mut self.serving).await;
    }

    /// Whoever asks from now on finds nobody and does the work himself.
    fn leave(&self) {
        self.stop.cancel();
        if std::fs::metadata(&self.path).is_ok_and(|socket| socket.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.leave();
    }
}

async fn serve(listener: UnixListener, archives: Arc<Archives>, stop: CancellationToken) {
    let tasks = archives.tasks.clone();
    // What is left of them when they took too long is given up with the rest.
    let questions = TaskTracker::new();
    let room = Arc::new(Semaphore::new(QUESTIONS_MAX));
    let mut sweep = tokio::time::interval(SWEEP_EVERY);
    loop {
        let (stream, permit) = tokio::select! {
            () = stop.cancelled() => break,
            _ = sweep.tick() => {
                archives.readahead.sweep();
                archives.ahead.sweep();
                buffers::sweep();
                continue;
            }
            next = next(&listener, &room) => next,
        };
        let asked = Arc::clone(&archives);
        questions.spawn(archives.tasks.spawn(async move {
            if let Err(error) = asked.serve(stream).await {
                tracing::debug!("Whoever asked for WAL has gone: {error}");
            }
            drop(permit);
        }));
    }
    drop(listener);
    questions.close();
    let _ = tokio::time::timeout(ANSWERED_WITHIN, questions.wait()).await;
    tasks.end(STORED_WITHIN).await;
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

type Wanted = (Whose, Option<String>);

/// What the questions share.
#[derive(Debug)]
struct Archives {
    opener: Arc<dyn OpenArchive>,
    /// By whose archive, and the repository as the asker names it.
    open: Mutex<BTreeMap<Wanted, Arc<Repository>>>,
    ahead: Arc<Ahead>,
    readahead: ReadAhead,
    tasks: Tasks,
}

/// An answer, and a file that lies ready as long as it is held.
type Answered = (Answer, Option<NamedTempFile>);

impl Archives {
    fn of(opener: Arc<dyn OpenArchive>) -> Self {
        let tasks = Tasks::default();
        Self {
            opener,
            open: Mutex::default(),
            ahead: Arc::new(Ahead::of(tasks.clone())),
            readahead: ReadAhead::of(tasks.clone()),
            tasks,
        }
    }

    async fn serve(self: Arc<Self>, mut stream: UnixStream) -> io::Result<()> {
        if !words::is_of_this_user(&stream)? {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let heard = tokio::time::timeout(ASKED_WITHIN, words::hear::<Question>(&mut stream)).await;
        let answered = match heard.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(question) => tokio::select! {
                answered = self.answer(question) => answered,
                () = words::gone(&mut stream) => return Ok(()),
            },
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                (Answer::Unserved(not_understood(&error)), None)
            }
            Err(error) => return Err(error),
        };
        let (answer, file) = answered;
        words::say(&mut stream, answer).await?;
        if file.is_some() {
            let _ = tokio::time::timeout(TAKEN_WITHIN, words::gone(&mut stream)).await;
        }
        Ok(())
    }

    async fn answer(&self, question: Question) -> Answered {
        let (whose, named) = match &question {
            Question::Store { whose, repository, .. }
            | Question::Fetch { whose, repository, .. } => (whose.clone(), repository.clone()),
        };
        let repository = match self.repository(&whose, named).await {
            Ok(repository) => repository,
            Err(failure) => return (Answer::Unserved(failure), None),
        };
        let answered = match question {
            Question::Store { path, .. } => {
                let whose = match whose {
                    Whose::Cluster(cluster) if self.opener.has_written_down(&cluster) => {
                        Whose::New(cluster)
                    }
                    whose => whose,
                };
                self.store(&repository, &whose, &path).await
            }
            Question::Fetch { file, to, until, .. } => match file.parse() {
                Ok(file) => self.fetch(&repository, &whose, &file, &to, until).await,
                Err(error) => return (Answer::Unserved(not_understood(&error)), None),
            },
        };
        answered.unwrap_or_else(|failure| match failure.code {
            // The asker may be another user, or see other places.
            Code::SourceUnreadable | Code::TargetUnwritable => (Answer::Unserved(failure), None),
            _ => (Answer::Failed(failure), None),
        })
    }

    async fn store(
        &self,
        repository: &Arc<Repository>,
        whose: &Whose,
        path: &Path,
    ) -> Result<Answered, Failure> {
        let pushed = self.ahead.push(repository, whose, path).await?;
        let lineage = pushed.identity.lineage;
        Ok((Answer::Stored { lineage, stored: pushed.stored }, None))
    }

    async fn fetch(
        &self,
        repository: &Arc<Repository>,
        whose: &Whose,
        file: &WalFileName,
        to: &Path,
        until: Option<Until>,
    ) -> Result<Answered, Failure> {
        let (identity, server) = get::recipient(repository, whose, to).await?;
        let found = self.readahead.fetch(repository, identity.lineage, file, to).await?;
        let asked = Asked { repository, identity: &identity, file, to, server };
        let content = found.as_ref().map(|found| found.content.clone());
        let handed = match get::hand_over(asked, found, until).await {
            // What lies ready for later may have taken the last room.
            Err(failure)
                if failure.code == Code::TargetUnwritable
                    && self.readahead.forget(identity.lineage, to) =>
            {
                get::hand_over(asked, content.map(Found::from), until).await
            }
            handed => handed,
        };
        Ok(match handed? {
            Some(file) => (Answer::Fetched { file: file.path().to_owned() }, Some(file)),
            None => (Answer::NotThere, None),
        })
    }

    /// The repository, which is looked for each time: it may be gone, or another one be in its place, since it was opened.
    async fn repository(
        &self,
        whose: &Whose,
        named: Option<String>,
    ) -> Result<Arc<Repository>, Failure> {
        let key = (whose.clone(), named.clone());
        let kept = self.open.lock().await.get(&key).cloned();
        if let Some(repository) = kept {
            match repository.check_there().await {
                Ok(()) => return Ok(repository),
                Err(Error::NoRepository { .. } | Error::Damaged { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let repository = Arc::new(self.opener.open(whose.clone(), named).await?);
        let mut open = self.open.lock().await;
        if open.len() >= OPEN_MAX {
            open.clear();
        }
        open.insert(key, Arc::clone(&repository));
        Ok(repository)
    }
}

fn not_understood(error: &dyn fmt::Display) -> Failure {
    let what = format!("the WAL service did not understand the question: {error}");
    Failure::new(Code::RequestInvalid, Action::FixConfig, what)
        .with_hint("It is of another version than the command: start it again after an update.")
}
