//! The side that asks.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::{Failure, LineageId, WalFileName};
use repository::WalStored;
use tokio::net::UnixStream;

use super::super::Until;
use super::super::get::{self, Got};
use super::super::lineage::Whose;
use super::words::{self, Answer, Question};

/// Whom to ask, and about what.
#[derive(Debug, Clone, Copy)]
pub struct Asking<'a> {
    /// Where the service is.
    pub socket: &'a Path,
    /// Whose archive.
    pub whose: &'a Whose,
    /// The repository, where the asker names one: a service with another one is none for him.
    pub repository: Option<&'a str>,
    /// How long silence is waited for.
    pub within: Duration,
}

/// What was heard.
#[derive(Debug)]
pub enum Heard<T> {
    /// The answer.
    Answer(Result<T, Failure>),
    /// Nobody serves this archive there, or nobody spoke in time; why, where that is known.
    Nobody(Option<Failure>),
}

impl Asking<'_> {
    /// Has a file stored, as [`push`](fn@super::super::push) would.
    pub async fn to_store(&self, path: &Path) -> Heard<(LineageId, WalStored)> {
        let Some(path) = absolute(path) else { return Heard::Nobody(None) };
        let (whose, repository) = (self.whose.clone(), self.repository.map(str::to_owned));
        match self.ask(Question::Store { whose, repository, path }).await {
            Some((Answer::Stored { lineage, stored }, _)) => Heard::Answer(Ok((lineage, stored))),
            answer => heard(answer),
        }
    }

    /// Has a file fetched, as [`get`](fn@super::super::get) would, and puts it to `to`: that is not done by the service, which would not know
    /// whether anybody still waits for it.
    pub async fn for_file(
        &self,
        file: &WalFileName,
        to: &Path,
        until: Option<Until>,
    ) -> Heard<Got> {
        let Some(to) = absolute(to) else { return Heard::Nobody(None) };
        let (whose, repository) = (self.whose.clone(), self.repository.map(str::to_owned));
        let file = file.to_string();
        let question = Question::Fetch { whose, repository, file, to: to.clone(), until };
        match self.ask(question).await {
            Some((Answer::Fetched { file }, held)) => {
                let put = get::put(file, to).await;
                // As long as it is held, the service keeps the file for us.
                drop(held);
                Heard::Answer(put.map(|()| Got::Written))
            }
            Some((Answer::NotThere, _)) => Heard::Answer(Ok(Got::NotThere)),
            answer => heard(answer),
        }
    }

    /// The answer, and the connection that it came over.
    async fn ask(&self, question: Question) -> Option<(Answer, UnixStream)> {
        let asked = async {
            let mut stream = UnixStream::connect(self.socket).await?;
            if !words::is_of_this_user(&stream)? {
                return Err(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "it is another user's",
                ));
            }
            words::say(&mut stream, question).await?;
            let answer = words::hear::<Answer>(&mut stream).await?;
            Ok((answer, stream))
        };
        let heard = tokio::time::timeout(self.within, asked).await;
        match heard.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(answer) => Some(answer),
            Err(error) => {
                use io::ErrorKind::{ConnectionRefused, NotFound};
                if !matches!(error.kind(), NotFound | ConnectionRefused) {
                    let socket = self.socket.display();
                    tracing::warn!("The WAL service at {socket} did not answer: {error}");
                }
                None
            }
        }
    }
}

fn heard<T>(answer: Option<(Answer, UnixStream)>) -> Heard<T> {
    match answer {
        Some((Answer::Failed(failure), _)) => Heard::Answer(Err(failure)),
        Some((Answer::Unserved(failure), _)) => Heard::Nobody(Some(failure)),
        _ => Heard::Nobody(None),
    }
}

/// A server names files as they are seen from its data directory, where its commands run.
fn absolute(path: &Path) -> Option<PathBuf> {
    std::path::absolute(path).ok()
}
