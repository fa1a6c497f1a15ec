//! One file from the archive to where the server wants it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use bytes::Bytes;
use futures::future::{BoxFuture, OptionFuture};
use postgres::wal_moments::SegmentMoments;
use proto::wal::SegmentName;
use proto::{Action, Code, Failure, WalFileName};
use repository::{Identity, Repository, write_in_pieces};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use tempfile::NamedTempFile;

use super::gap::Asked;
use super::lineage::Whose;
use super::{Server, Until, segment_of, server_of, tablespaces, verify};
use crate::context::blocking;
use crate::failpoint;

/// How fetching a file ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Got {
    /// It is there, whole and durable.
    Written,
    /// It is certain that the archive does not have it, nor anything that would have to come after it.
    NotThere,
}

/// Fetches `file` and puts it to `to`, whole or not at all. Of it, the server will replay nothing behind `until`. Whatever is
/// not certain is an error: a server that is told that there is no such file takes it for the end of its log and goes into
/// service with what it has.
pub async fn get(
    repository: &Repository,
    whose: &Whose,
    file: &WalFileName,
    to: &Path,
    until: Option<Until>,
) -> Result<Got, Failure> {
    let (identity, server) = recipient(repository, whose, to).await?;
    let found = repository.fetch_wal(identity.lineage, file).await?.map(Found::from);
    let asked = Asked { repository, identity: &identity, file, to, server };
    match hand_over(asked, found, until).await? {
        Some(file) => {
            let (file, to) = (file.into_temp_path(), to.to_owned());
            blocking(move || put(file, &to)).await.map(|()| Got::Written)
        }
        None => Ok(Got::NotThere),
    }
}

/// What the archive has under the name of a file.
pub(super) struct Found {
    pub(super) content: Bytes,
    /// What was done with it already.
    pub(super) prepared: Prepared,
    /// The segment behind it, where that is fetched anyway.
    pub(super) next: Option<BoxFuture<'static, Option<Bytes>>>,
}

/// What can be done with a segment before a server asks for it.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    /// It lies beside the one that the server wanted.
    written: Option<Written>,
    said: Option<SegmentMoments>,
}

impl Prepared {
    /// Does what can be done for the server whose log is in `directory`. What cannot is done when it asks, and it hears what is
    /// wrong then.
    pub(super) async fn of(directory: &Path, name: SegmentName, content: &Bytes) -> Self {
        let server = server_of(&directory.join(name.to_string())).await.ok().flatten();
        let segment = server.and_then(|server| Some((name.segment(server.segment_size)?, server)));
        let said = match segment {
            Some((segment, server)) => {
                tablespaces::look(segment, content.clone(), None, server).await.ok()
            }
            None => None,
        };
        let (directory, content) = (directory.to_owned(), content.clone());
        let written = blocking(move || Ok(Written::write(&directory, &content).ok())).await;
        Self { written: written.unwrap_or_default(), said }
    }
}

impl From<Bytes> for Found {
    fn from(content: Bytes) -> Self {
        Self { content, prepared: Prepared::default(), next: None }
    }
}

/// The lineage to fetch from, and the server that wants something at `to`, where that is one.
pub(super) async fn recipient(
    repository: &Repository,
    whose: &Whose,
    to: &Path,
) -> Result<(Identity, Option<Server>), Failure> {
    let server = server_of(to).await?;
    let identity = whose.find(repository, server.map(|server| server.system_identifier)).await?;
    Ok((identity, server))
}

/// What was found in the archive for a server, in a durable file beside the one that it wants; or nothing, if it is certain
/// that there is none.
pub(super) async fn hand_over(
    asked: Asked<'_>,
    found: Option<Found>,
    until: Option<Until>,
) -> Result<Option<NamedTempFile>, Failure> {
    let Asked { repository, identity, file, to, server } = asked;
    asked.refuse_abandoned(found.is_some()).await?;
    let Found { content, prepared: Prepared { written, said }, next } = match found {
        Some(found) => found,
        None => match asked.why_missing().await? {
            None => return Ok(None),
            // A server may be archiving at this moment: what shows that the file is missing came after it.
            Some(missing) => {
                repository.fetch_wal(identity.lineage, file).await?.ok_or(missing)?.into()
            }
        },
    };
    if let Some(name) = segment_of(file) {
        verify(name, &content, identity.system_identifier, server).map_err(|what| {
            let what = format!("{file} in the archive is not what it should be: {what}");
            Failure::new(Code::ObjectDamaged, Action::FixData, what)
                .with_hint("Look at restore_command: is this the archive of this cluster?")
        })?;
    }
    if let (Some(server), WalFileName::Segment(name)) = (server, file)
        && let Some(segment) = name.segment(server.segment_size)
    {
        let next = async {
            if let Some(content) = OptionFuture::from(next).await.flatten() {
                return Ok(Some(content));
            }
            let next = WalFileName::Segment(segment.next().name(server.segment_size));
            Ok(repository.fetch_wal(identity.lineage, &next).await?)
        };
        tablespaces::protect(segment, &content, said, next, server, to, until).await?;
    }
    let failed = unwritable(to);
    let directory = asked.directory();
    let named = move || match written.map(|written| written.name(&directory)) {
        Some(Ok(named)) => Ok(named),
        Some(Err(_)) | None => write(&directory, &content),
    };
    let file = blocking(move || named().map_err(failed)).await?;
    failpoint::reached("wal_written").await;
    Ok(Some(file))
}

/// What the server calls a file that it asks for, until it gives it the name that it has in the log: from then on the name is durable.
/// See `RestoreArchivedFile` and `KeepFileRestoredFromArchive` in PostgreSQL's `src/backend/access/transam/xlogarchive.c`.
const MADE_DURABLE_BY_SERVER: [&str; 2] = ["RECOVERYXLOG", "RECOVERYHISTORY"];

/// Puts a file that was fetched where the server wants it, and makes that durable unless the server does.
pub(super) fn put(file: impl AsRef<Path>, to: &Path) -> Result<(), Failure> {
    let directory = to.parent().filter(|parent| !parent.as_os_str().is_empty());
    let is_left = MADE_DURABLE_BY_SERVER.iter().any(|name| to.ends_with(name));
    let put = || {
        std::fs::rename(file.as_ref(), to)?;
        if is_left {
            return Ok(());
        }
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    };
    put().map_err(unwritable(to))
}

fn unwritable(to: &Path) -> impl FnOnce(io::Error) -> Failure + use<> {
    let to = to.display().to_string();
    move |error| {
        let what = format!("failed to write {to}: {error}");
        Failure::new(Code::TargetUnwritable, Action::FixConfig, what)
            .with_hint("Make room there, and run this as the server's user.")
    }
}

/// What a file beside the one that is wanted is called. When this process dies its server sweeps it, as one of its own that it was
/// about to make a segment of.
const PREFIX: &str = "xlogtemp.pgmuster-";
/// Where a process finds its own open files, to give one of them a name.
const OWN_FILES: &str = "/proc/self/fd";

/// A file beside the one that is wanted, whole and durable.
fn write(directory: &Path, content: &Bytes) -> io::Result<NamedTempFile> {
    let mut file = tempfile::Builder::new().prefix(PREFIX).tempfile_in(directory)?;
    write_in_pieces(&mut file, content)?;
    file.as_file().sync_all()?;
    Ok(file)
}

/// A file that is whole and durable but for its name: it has none, and is gone with this process.
#[derive(Debug)]
struct Written(File);

impl Written {
    /// Fails on file systems that know no files without a name, which some are: nothing is lost by that.
    fn write(directory: &Path, content: &Bytes) -> io::Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let mut file = File::from(rustix::fs::openat(CWD, directory, flags, mode)?);
        write_in_pieces(&mut file, content)?;
        file.sync_all()?;
        Ok(Self(file))
    }

    /// Gives it a name in the directory that it was written for.
    fn name(self, directory: &Path) -> io::Result<NamedTempFile> {
        let own = format!("{OWN_FILES}/{}", self.0.as_raw_fd());
        let named = tempfile::Builder::new().prefix(PREFIX).make_in(directory, |path| {
            Ok(rustix::fs::linkat(CWD, &own, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
        })?;
        let ((), path) = named.into_parts();
        Ok(NamedTempFile::from_parts(self.0, path))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use futures::FutureExt as _;
    use proto::SystemIdentifier;
    use repository::store::directory::DirectoryStore;
    use repository::store::layer::Layer;
    use repository::store::{KeyTest, Store, StoreError};
    use repository::{Encryption, Identity, InitOptions};

    use super::*;
    use crate::archive::tests::segment;

    const MIB: u64 = 1 << 20;

    /// A store in which a server archives at the moment in which somebody looks whether there is more.
    #[derive(Debug)]
    struct Busy {
        inner: DirectoryStore,
        arriving: Mutex<Vec<(String, Bytes)>>,
    }

    #[async_trait]
    impl Layer for Busy {
        fn inner(&self) -> &dyn Store {
            &self.inner
        }
        async fn has_behind(
            &self,
            prefix: &str,
            after: &str,
            is_wanted: KeyTest,
        ) -> Result<bool, StoreError> {
            let arriving = std::mem::take(&mut *self.arriving.lock().unwrap());
            for (key, bytes) in arriving {
                self.inner.put(&key, bytes).await?;
            }
            self.inner.has_behind(prefix, after, is_wanted).await
        }
    }

    /// An archive, and what is asked of it by somebody who is no server.
    struct Asking {
        place: tempfile::TempDir,
        store: Arc<Busy>,
        repository: Repository,
        identity: Identity,
    }

    impl Asking {
        async fn new() -> Self {
            let place = tempfile::tempdir().unwrap();
            let inner = DirectoryStore::new(place.path().join("repository"));
            let store = Arc::new(Busy { inner, arriving: Mutex::default() });
            let options = InitOptions { encryption: Encryption::Off, now_ms: 1 };
            let shared: Arc<dyn Store> = Arc::clone(&store) as _;
            let repository = Repository::init(shared, options).await.unwrap().repository;
            let cluster = "orders".parse().unwrap();
            let identity =
                repository.find_or_mint_lineage(&cluster, SystemIdentifier(7), 1).await.unwrap();
            Self { place, store, repository, identity }
        }

        async fn archive(&self, name: &str) {
            let segment_name: SegmentName = name.parse().unwrap();
            let start = segment_name.segment(1 << 20).unwrap().start(1 << 20).0;
            self.archive_as(name, segment(segment_name.timeline.0, start, 7)).await;
        }

        async fn archive_as(&self, name: &str, content: impl Into<Bytes>) {
            let lineage = self.identity.lineage;
            self.repository
                .store_wal(lineage, &name.parse().unwrap(), content.into())
                .await
                .unwrap();
        }

        fn to(&self) -> PathBuf {
            self.place.path().join("fetched")
        }

        async fn get(&self, name: &str) -> Result<Got, Code> {
            let whose = Whose::Lineage(self.identity.lineage);
            let got = get(&self.repository, &whose, &name.parse().unwrap(), &self.to(), None).await;
            got.map_err(|failure| failure.code)
        }
    }

    #[tokio::test]
    async fn a_file_is_missing_when_the_archive_shows_that_there_was_one() {
        let asking = Asking::new().await;
        let missing = Err(Code::WalMissing);
        for name in ["000000010000000000000003", "000000010000000000000005"] {
            asking.archive(name).await;
        }
        assert_eq!(asking.get("000000010000000000000004").await, missing);
        assert_eq!(asking.get("000000010000000000000005").await, Ok(Got::Written));
        assert_eq!(asking.get("000000010000000000000006").await, Ok(Got::NotThere));
        assert_eq!(asking.get("00000001.history").await, Ok(Got::NotThere));
        assert_eq!(asking.get("00000002.history").await, Ok(Got::NotThere));

        // Timeline 2 left timeline 1 in the middle of segment 8, and timeline 3 timeline 2 where segment 10 begins.
        let second = format!("1\t{}\tx\n", proto::Lsn(8 * MIB + 100));
        let third = format!("{second}2\t{}\tx\n", proto::Lsn(10 * MIB));
        asking.archive_as("00000002.history", second).await;
        asking.archive_as("00000003.history", third).await;
        for name in
            ["000000010000000000000006", "000000010000000000000007", "000000020000000000000009"]
        {
            assert_eq!(asking.get(name).await, missing, "{name}");
        }
        for name in
            ["000000010000000000000008", "000000010000000000000009", "00000002000000000000000A"]
        {
            assert_eq!(asking.get(name).await, Ok(Got::NotThere), "{name}");
        }

        // A history without which nobody comes to files that are there, or that a later one names.
        assert_eq!(asking.get("00000004.history").await, Ok(Got::NotThere));
        asking.archive_as("00000004000000000000000C.partial", segment(4, 12 * MIB, 7)).await;
        assert_eq!(asking.get("00000004.history").await, missing);
        assert_eq!(asking.get("00000006.history").await, Ok(Got::NotThere));
        asking.archive_as("00000007.history", "1\t0/900000\tx\n").await;
        assert_eq!(asking.get("00000006.history").await, missing);
    }

    /// A segment in which one record goes on from before and ends 8 bytes before the end, where another begins.
    fn going_on(start: u64) -> Vec<u8> {
        const PAGE: usize = 8192;
        let mut bytes = segment(1, start, 7);
        let mut rest = bytes.len() - 40 - (bytes.len() / PAGE - 1) * 24 - 8;
        for (number, page) in bytes.chunks_exact_mut(PAGE).enumerate() {
            let (flags, header) = if number == 0 { (3_u16, 40) } else { (1, 24) };
            page[2..4].copy_from_slice(&flags.to_ne_bytes());
            page[8..16].copy_from_slice(&(start + (number * PAGE) as u64).to_ne_bytes());
            page[16..20].copy_from_slice(&u32::try_from(rest).unwrap().to_ne_bytes());
            rest = rest.saturating_sub(PAGE - header);
        }
        let length = bytes.len();
        bytes[length - 8..length - 4].copy_from_slice(&60_u32.to_ne_bytes());
        bytes
    }

    #[tokio::test]
    async fn what_goes_on_in_the_next_segment_is_read_in_the_one_that_is_on_its_way() {
        let asking = Asking::new().await;
        let (repository, identity, to) = (&asking.repository, &asking.identity, &*asking.to());
        let [name, next] = ["000000010000000000000004", "000000010000000000000005"];
        asking.archive_as(name, going_on(4 * MIB)).await;
        let server = Server {
            system_identifier: SystemIdentifier(7),
            segment_size: 1 << 20,
            catalog_version: 1,
            timeline: proto::Timeline(1),
            major: Some(15),
        };
        let file = &name.parse().unwrap();
        let hand_over = async |next: Option<Vec<u8>>| {
            let asked = Asked { repository, identity, file, to, server: Some(server) };
            let found = Found {
                next: next.map(|next| std::future::ready(Some(next.into())).boxed()),
                ..Bytes::from(going_on(4 * MIB)).into()
            };
            hand_over(asked, Some(found), None).await.map(|file| file.is_some())
        };
        assert!(hand_over(None).await.unwrap(), "there is no next one");
        let key = format!("lineages/{}/wal/00000001/{next}", identity.lineage);
        asking.store.inner.put(&key, Bytes::from_static(b"not a segment")).await.unwrap();
        assert_eq!(hand_over(None).await.unwrap_err().code, Code::ObjectDamaged);
        assert!(hand_over(Some(segment(1, 5 * MIB, 7))).await.unwrap(), "nobody asked the archive");
    }

    #[test]
    fn what_was_written_ahead_has_no_name_before_it_is_handed_over() {
        let place = tempfile::tempdir().unwrap();
        let names = || std::fs::read_dir(place.path()).unwrap().count();
        let content = Bytes::from(segment(1, MIB, 7));
        drop(Written::write(place.path(), &content).unwrap());
        let written = Written::write(place.path(), &content).unwrap();
        assert_eq!(names(), 0);
        let named = written.name(place.path()).unwrap();
        assert!(named.path().file_name().unwrap().to_str().unwrap().starts_with(PREFIX));
        assert!(std::fs::read(named.path()).unwrap() == content);
        drop(named);
        assert_eq!(names(), 0, "nobody took it");
        Written::write(&place.path().join("no"), &content).unwrap_err();
    }

    #[tokio::test]
    async fn what_is_archived_while_it_is_asked_for_is_fetched() {
        let asking = Asking::new().await;
        let names = ["00000001000000000000000D", "00000001000000000000000E"];
        let prefix = format!("lineages/{}/wal/00000001/", asking.identity.lineage);
        for name in names {
            asking.archive(name).await;
            let key = format!("{prefix}{name}");
            let bytes = asking.store.inner.get(&key, 2 * MIB).await.unwrap();
            asking.store.inner.delete(&key).await.unwrap();
            asking.store.arriving.lock().unwrap().push((key, bytes));
        }
        assert_eq!(asking.get(names[0]).await, Ok(Got::Written));
        assert_eq!(std::fs::read(asking.to()).unwrap(), segment(1, 13 * MIB, 7));
    }
}
