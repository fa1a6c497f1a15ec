//! What is asked and answered: one line of JSON each. The asker keeps his side open until he has what he wanted: when it is
//! closed, nobody waits any more.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use super::super::Until;
use super::super::lineage::Whose;
use proto::{Failure, LineageId};
use repository::WalStored;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader,
};

/// The longest line: paths are short, and sentences too.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// What a command wants. Paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Question {
    /// As `archive_command`: store this file.
    Store {
        whose: Whose,
        #[serde(default)]
        repository: Option<String>,
        path: PathBuf,
    },
    /// As `restore_command`: have the content of the file of this name beside `to`.
    Fetch {
        whose: Whose,
        #[serde(default)]
        repository: Option<String>,
        file: String,
        to: PathBuf,
        #[serde(default)]
        until: Option<Until>,
    },
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// It is durable in this lineage.
    Stored {
        lineage: LineageId,
        #[serde(with = "stored")]
        stored: WalStored,
    },
    /// It lies here, whole and durable, as long as the asker keeps his side open: he puts it into its place.
    Fetched {
        file: PathBuf,
    },
    /// It is certain that there is none.
    NotThere,
    /// Nothing was found out about the file: the service is not for this archive.
    Unserved(Failure),
    Failed(Failure),
}

/// Whether a file was new.
mod stored {
    use repository::WalStored;
    use serde::{Deserialize as _, Deserializer, Serializer};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    pub(super) fn serialize<S: Serializer>(
        stored: &WalStored,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_bool(*stored == WalStored::Created)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<WalStored, D::Error> {
        let is_new = bool::deserialize(deserializer)?;
        Ok(if is_new { WalStored::Created } else { WalStored::AlreadyThere })
    }
}

/// Whether this user, or root, is at the other end.
pub(super) fn is_of_this_user(stream: impl AsFd) -> io::Result<bool> {
    let uid = rustix::net::sockopt::socket_peercred(stream)?.uid;
    Ok(uid.is_root() || uid == rustix::process::geteuid())
}

pub(super) async fn say(
    to: &mut (impl AsyncWrite + Unpin),
    words: impl Serialize,
) -> io::Result<()> {
    let line = line(&words)?;
    drop(words);
    to.write_all(&line).await
}

fn line(words: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(words)?;
    line.push(b'\n');
    Ok(line)
}

/// One line there and one back, by a thread that has nothing else to do until `deadline`.
pub(super) fn exchange<T: DeserializeOwned>(
    stream: &mut UnixStream,
    words: &impl Serialize,
    deadline: Instant,
) -> io::Result<T> {
    let left = || {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::Error::from(io::ErrorKind::TimedOut)) } else { Ok(Some(left)) }
    };
    stream.set_write_timeout(left()?)?;
    stream.write_all(&line(words)?)?;
    let (mut answer, mut piece) = (Vec::new(), [0; 1024]);
    while !answer.ends_with(b"\n") && (answer.len() as u64) < LINE_BYTES_MAX {
        stream.set_read_timeout(left()?)?;
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => answer.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    understood(&answer)
}

/// One line. What is no line of ours is [`io::ErrorKind::InvalidData`]; that nothing came is
/// [`io::ErrorKind::UnexpectedEof`].
pub(super) async fn hear<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
) -> io::Result<T> {
    let mut line = Vec::new();
    BufReader::new(from.take(LINE_BYTES_MAX)).read_until(b'\n', &mut line).await?;
    understood(&line)
}

fn understood<T: DeserializeOwned>(line: &[u8]) -> io::Result<T> {
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(line).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Waits until the other side has closed, or says something that it should not.
pub(super) async fn gone(from: &mut (impl AsyncRead + Unpin)) {
    let _ = from.read(&mut [0]).await;
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// What is heard of somebody who says `pieces`, one after another, and closes only when all were heard or nobody listens.
    fn heard(pieces: &[&[u8]], closes: bool) -> io::Result<String> {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut question = [0; 6];
                theirs.read_exact(&mut question).unwrap();
                assert_eq!(&question, b"\"ask\"\n");
                for piece in pieces {
                    // Whoever has heard enough is gone.
                    let _ = theirs.write_all(piece);
                }
                if !closes {
                    let _ = theirs.read(&mut [0]);
                }
            });
            let deadline = Instant::now() + Duration::from_millis(300);
            let heard = exchange(&mut ours, &"ask", deadline);
            drop(ours);
            heard
        })
    }

    #[test]
    fn an_answer_is_one_whole_line_in_time() {
        let kind = |pieces: &[&[u8]], closes| heard(pieces, closes).unwrap_err().kind();
        assert_eq!(heard(&[b"\"ye", b"s\"", b"\n"], false).unwrap(), "yes");
        assert_eq!(kind(&[b"\"ye"], true), io::ErrorKind::InvalidData, "cut");
        assert_eq!(kind(&[], true), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(&[b"\"ye"], false), io::ErrorKind::WouldBlock, "silent");
        let endless = vec![b' '; 64 << 10];
        assert_eq!(kind(&[&endless, b"\"yes\"\n"], false), io::ErrorKind::InvalidData);
    }
}
