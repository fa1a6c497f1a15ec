//! Lists of what `pg_restore` is to load of an archive, by the numbers in its contents.

use std::io::Write as _;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use postgres::archive::{Contents, Reader};
use postgres::process::Program;
use proto::{Action, Code, Failure};
use repository::FileContent;
use tempfile::NamedTempFile;

/// The contents of an archive, and the bytes that say so.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) contents: Contents,
    pub(super) bytes: Bytes,
}

impl Head {
    /// Reads as much of a stored dump as is needed for it.
    pub(super) async fn read(content: &FileContent) -> Result<Self, Failure> {
        let mut reader = Reader::new();
        let mut bytes = BytesMut::new();
        let mut pieces = std::pin::pin!(content.stream());
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            reader.push(&piece)?;
            bytes.extend_from_slice(&piece);
            if let Some(contents) = reader.contents() {
                let contents = contents.clone();
                bytes.truncate(usize::try_from(contents.bytes).unwrap_or(usize::MAX));
                return Ok(Self { contents, bytes: bytes.freeze() });
            }
        }
        // It says what is missing.
        reader.end()?;
        Err(Failure::bug("a whole archive has no contents"))
    }
}

/// A file with a list; it vanishes by itself.
pub(super) struct List(NamedTempFile);

impl List {
    /// Made with 0600. In the archive's order, because `pg_restore` loads in that of the list.
    pub(super) fn of(ids: impl Iterator<Item = u32>, scratch: &Path) -> Result<Self, Failure> {
        let mut text = String::new();
        for id in ids {
            text.extend([&id.to_string(), ";\n"]);
        }
        private_file(scratch, text.as_bytes()).map(Self)
    }

    /// Has a program load what it names, and nothing else.
    pub(super) fn apply(&self, program: Program) -> Program {
        program.arg("--use-list").arg(self.0.path())
    }
}

/// A file that nobody else may read, and that vanishes by itself.
pub(super) fn private_file(directory: &Path, content: &[u8]) -> Result<NamedTempFile, Failure> {
    let full = |error| full(directory, &error);
    let mut file = NamedTempFile::with_prefix_in("pgmuster-dump-", directory).map_err(full)?;
    file.write_all(content).map_err(full)?;
    Ok(file)
}

pub(super) fn full(directory: &Path, error: &std::io::Error) -> Failure {
    let message = format!("failed to write a dump below {}: {error}", directory.display());
    Failure::new(Code::TargetFull, Action::FixConfig, message)
        .with_hint("Name a directory with more room in TMPDIR, or restore with one session.")
}
