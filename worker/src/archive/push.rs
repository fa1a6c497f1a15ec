//! One file from the server into the archive.

use std::path::Path;

use bytes::Bytes;
use proto::wal::SEGMENT_BYTES_MAX;
use proto::{Action, Code, Failure, WalFileName};
use repository::{Identity, Repository, SealedWal, WalStored};

use super::lineage::Whose;
use super::{buffers, refused, segment_of, server_of, verify};
use crate::context::blocking;
use crate::failpoint;

/// What was archived.
#[derive(Debug, Clone)]
pub struct Pushed {
    /// Into whose lineage.
    pub identity: Identity,
    /// Whether it was new. It is durable either way.
    pub stored: WalStored,
}

/// A file that was read, checked and sealed, and is not stored yet.
pub(super) struct Ready {
    identity: Identity,
    sealed: SealedWal,
}

/// Archives the file at `path`, whose last part is its name in the log. Idempotent by name and content. Everything is
/// checked before the first byte is stored: size, header, timeline, and whose log it is.
pub async fn push(repository: &Repository, whose: &Whose, path: &Path) -> Result<Pushed, Failure> {
    ready(repository, whose, path).await?.store(repository).await
}

/// All of a push but the storing.
pub(super) async fn ready(
    repository: &Repository,
    whose: &Whose,
    path: &Path,
) -> Result<Ready, Failure> {
    let file = name_of(path)?;
    let server = server_of(path).await?;
    failpoint::reached("wal_read").await;
    let content = read(path).await?;
    // Whose it is says the server; where there is none, the file itself.
    let written_by = match segment_of(&file) {
        Some(_) => postgres::wal::SegmentHeader::parse(&content)
            .map(|header| Some(header.system_identifier))
            .map_err(|what| refused(&file, &what))?,
        None => None,
    };
    let system_identifier = server.map(|server| server.system_identifier).or(written_by);
    if let Some(name) = segment_of(&file)
        && let Some(system_identifier) = system_identifier
    {
        // Before a lineage is made for it.
        verify(name, &content, system_identifier, server).map_err(|what| refused(&file, &what))?;
    }
    let identity = whose.find_or_mint(repository, system_identifier).await?;
    let sealed = repository.seal_wal(identity.lineage, &file, content).await?;
    Ok(Ready { identity, sealed })
}

impl Ready {
    /// Does what of the storing can be done before its turn has come.
    pub(super) async fn stage(self, repository: &Repository) -> Self {
        let sealed = repository.stage_sealed_wal(self.sealed).await;
        Self { sealed, ..self }
    }

    /// Leaves nothing of it behind.
    pub(super) async fn discard(self) {
        self.sealed.discard().await;
    }

    /// Stores it. It is durable when this returns.
    pub(super) async fn store(self, repository: &Repository) -> Result<Pushed, Failure> {
        failpoint::reached("wal_store").await;
        let stored = repository.store_sealed_wal(self.sealed).await?;
        failpoint::reached("wal_stored").await;
        Ok(Pushed { identity: self.identity, stored })
    }
}

pub(super) fn name_of(path: &Path) -> Result<WalFileName, Failure> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.and_then(|name| name.parse().ok()).ok_or_else(|| {
        let what = format!("{} has no name that a WAL file has", path.display());
        Failure::new(Code::WalRefused, Action::FixData, what).with_hint(
            "Segments, .history, .partial and .backup files belong into the archive; give the path that the server writes for %p.",
        )
    })
}

async fn read(path: &Path) -> Result<Bytes, Failure> {
    let path = path.to_owned();
    blocking(move || {
        let read = || {
            let file = std::fs::File::open(&path)?;
            let size = file.metadata()?.len();
            let limit = u64::from(SEGMENT_BYTES_MAX);
            if size > limit {
                let what = format!("{size} bytes, and a segment has at most {limit}");
                return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, what));
            }
            let bytes = std::io::Read::take(file, limit + 1);
            buffers::read(bytes, usize::try_from(size).unwrap_or(0))
        };
        read().map_err(|error| {
            let what = format!("failed to read {}: {error}", path.display());
            Failure::new(Code::SourceUnreadable, Action::FixData, what)
                .with_hint("Run this as the server's user, in its data directory.")
        })
    })
    .await
}
