//! The side that asks.

use std::io;
use std::path::{Path, PathBuf};

use proto::{Failure, LineageId, WalFileName};
use repository::WalStored;
use tokio::net::UnixStream;

use super::super::Until;
use super::super::get::Got;
use super::super::lineage::Whose;
use super::words::{self, Answer, Question};

/// Has the service at a socket store a file, as [`push`](super::super::push) would. `None` when nobody is there, or went away
/// before he answered.
pub async fn ask_to_store(
    socket: &Path,
    whose: &Whose,
    path: &Path,
) -> Option<Result<(LineageId, WalStored), Failure>> {
    let path = absolute(path)?;
    let question = Question::Store { whose: whose.clone(), path };
    match ask(socket, question).await? {
        Answer::Stored { lineage, stored } => Some(Ok((lineage, stored))),
        Answer::Failed(failure) => Some(Err(failure)),
        Answer::Written | Answer::NotThere => None,
    }
}

/// Has the service at a socket fetch a file, as [`get`](super::super::get) would. `None` when nobody is there, or went away
/// before he answered.
pub async fn ask_for(
    socket: &Path,
    whose: &Whose,
    file: &WalFileName,
    to: &Path,
    until: Option<Until>,
) -> Option<Result<Got, Failure>> {
    let to = absolute(to)?;
    let question = Question::Fetch { whose: whose.clone(), file: file.to_string(), to, until };
    match ask(socket, question).await? {
        Answer::Written => Some(Ok(Got::Written)),
        Answer::NotThere => Some(Ok(Got::NotThere)),
        Answer::Failed(failure) => Some(Err(failure)),
        Answer::Stored { .. } => None,
    }
}

/// A server names files as they are seen from its data directory, where its commands run.
fn absolute(path: &Path) -> Option<PathBuf> {
    std::path::absolute(path).ok()
}

async fn ask(socket: &Path, question: Question) -> Option<Answer> {
    let asked = async {
        let (mut from, mut to) = UnixStream::connect(socket).await?.into_split();
        words::say(&mut to, question).await?;
        words::read::<Answer>(&mut from).await
    };
    match asked.await {
        Ok(answer) => Some(answer),
        Err(error) => {
            let is_away =
                matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
            if !is_away {
                tracing::warn!("The WAL service at {} did not answer: {error}", socket.display());
            }
            None
        }
    }
}
