//! The side that asks. It has nothing else to do meanwhile, and a server waits for it: no runtime, no thread.

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proto::{Failure, LineageId, WalFileName};
use repository::WalStored;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

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

impl<T> Heard<T> {
    /// What is made of a good answer.
    pub fn map<U>(self, make: impl FnOnce(T) -> U) -> Heard<U> {
        match self {
            Self::Answer(answer) => Heard::Answer(answer.map(make)),
            Self::Nobody(why) => Heard::Nobody(why),
        }
    }

    /// What a good answer has, or what else was heard.
    pub fn done(self) -> Result<T, Heard<Infallible>> {
        match self {
            Self::Answer(Ok(answer)) => Ok(answer),
            Self::Answer(Err(failure)) => Err(Heard::Answer(Err(failure))),
            Self::Nobody(why) => Err(Heard::Nobody(why)),
        }
    }
}

impl Asking<'_> {
    /// Has a file stored, as [`push`](fn@super::super::push) would.
    pub fn to_store(&self, path: &Path) -> Heard<(LineageId, WalStored)> {
        let Some(path) = absolute(path) else { return Heard::Nobody(None) };
        let (whose, repository) = (self.whose.clone(), self.repository.map(str::to_owned));
        match self.ask(&Question::Store { whose, repository, path }) {
            Some((Answer::Stored { lineage, stored }, _)) => Heard::Answer(Ok((lineage, stored))),
            answer => heard(answer),
        }
    }

    /// Has a file fetched, as [`get`](fn@super::super::get) would, and puts it to `to`: that is not done by the service, which would not know
    /// whether anybody still waits for it.
    pub fn for_file(&self, file: &WalFileName, to: &Path, until: Option<Until>) -> Heard<Got> {
        let Some(to) = absolute(to) else { return Heard::Nobody(None) };
        let (whose, repository) = (self.whose.clone(), self.repository.map(str::to_owned));
        let file = file.to_string();
        let question = Question::Fetch { whose, repository, file, to: to.clone(), until };
        match self.ask(&question) {
            Some((Answer::Fetched { file }, held)) => {
                let put = get::put(file, &to);
                // As long as it is held, the service keeps the file for us.
                drop(held);
                Heard::Answer(put.map(|()| Got::Written))
            }
            Some((Answer::NotThere, _)) => Heard::Answer(Ok(Got::NotThere)),
            answer => heard(answer),
        }
    }

    /// The answer, and the connection that it came over.
    fn ask(&self, question: &Question) -> Option<(Answer, UnixStream)> {
        let asked = || {
            let deadline = Instant::now() + self.within;
            let mut stream = connected(self.socket)?;
            if !words::is_of_this_user(&stream)? {
                return Err(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "it is another user's",
                ));
            }
            let answer = words::exchange(&mut stream, question, deadline)?;
            Ok((answer, stream))
        };
        asked()
            .inspect_err(|error| {
                use io::ErrorKind::{ConnectionRefused, NotFound};
                if !matches!(error.kind(), NotFound | ConnectionRefused) {
                    let socket = self.socket.display();
                    tracing::warn!("The WAL service at {socket} did not answer: {error}");
                }
            })
            .ok()
    }
}

/// Connects if that can be done at once: who has no room for one more to wait is as good as away.
fn connected(socket: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(socket)?)?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
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
