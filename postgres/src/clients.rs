//! The client programs for logical backups: which installation of `pg_dump`, `pg_dumpall` and `pg_restore` fits a server.
//!
//! A client older than its server cannot dump it. And a client must not be older than the fixes of what a hostile server, or a hostile
//! name in a database, could make it do (CVE-2024-7348, CVE-2025-8714, CVE-2025-8715, CVE-2026-6477).

use std::path::{Path, PathBuf};

use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::binaries::{VERSION_TIMEOUT, candidates, parse_version};
use crate::process::{Program, Result, is_executable};
use crate::version::{NEWEST_MAJOR, ServerVersion};

/// Major version, and the first minor version with the fixes.
const SAFE_SINCE: [(u32, u32); 5] = [(14, 23), (15, 18), (16, 14), (17, 10), (18, 4)];
const PROGRAMS: [&str; 3] = ["pg_dump", "pg_dumpall", "pg_restore"];

/// The client programs of one installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clients {
    directory: PathBuf,
    version: ServerVersion,
}

impl Clients {
    /// Finds clients for a server: those of its own major version first, because what they write goes back into such a
    /// server, then newer ones. Looks where [`Binaries::find`](crate::binaries::Binaries::find) does.
    pub async fn find(server: ServerVersion, extra_dirs: &[PathBuf]) -> Result<Self> {
        let mut searched = Vec::new();
        let mut unsafe_one = None;
        for major in server.major()..=NEWEST_MAJOR {
            for directory in candidates(major, extra_dirs) {
                if searched.contains(&directory) || !has_programs(&directory) {
                    continue;
                }
                let Ok(found) = Self::at(&directory).await else { continue };
                if found.version.major() != major {
                    continue;
                }
                if found.is_safe() {
                    return Ok(found);
                }
                unsafe_one.get_or_insert(found);
                searched.push(directory);
            }
        }
        if let Some(Self { directory, version }) = unsafe_one {
            let needed = safe_since(version.major()).unwrap_or_default();
            return Err(Error::ClientUnsafe { directory, found: version.to_string(), needed });
        }
        let major = server.major();
        for directory in candidates(major, extra_dirs) {
            if !searched.contains(&directory) {
                searched.push(directory);
            }
        }
        let package = format!("postgresql-client-{major}");
        Err(Error::BinariesMissing { major, package, searched })
    }

    /// The clients in `directory`, whatever their version: `pg_dump` is asked for it.
    pub async fn at(directory: &Path) -> Result<Self> {
        let output = Program::new(directory.join("pg_dump"))
            .arg("--version")
            .run(VERSION_TIMEOUT, &CancellationToken::new())
            .await?;
        let text = output.stdout_text();
        let (major, minor) = parse_version(&text).ok_or_else(|| Error::Program {
            program: directory.join("pg_dump").display().to_string(),
            outcome: "a version that cannot be read".to_owned(),
            output: text.trim().to_owned(),
        })?;
        let version = ServerVersion(major * 10_000 + minor);
        Ok(Self { directory: directory.to_owned(), version })
    }

    /// Their version.
    pub fn version(&self) -> ServerVersion {
        self.version
    }

    /// `pg_dump`, ready for arguments.
    pub fn pg_dump(&self) -> Program {
        Program::new(self.directory.join("pg_dump"))
    }

    /// `pg_dumpall`, ready for arguments.
    pub fn pg_dumpall(&self) -> Program {
        Program::new(self.directory.join("pg_dumpall"))
    }

    /// `pg_restore`, ready for arguments.
    pub fn pg_restore(&self) -> Program {
        Program::new(self.directory.join("pg_restore"))
    }

    fn is_safe(&self) -> bool {
        let (major, minor) = (self.version.major(), self.version.0 % 10_000);
        SAFE_SINCE.iter().any(|(known, since)| *known == major && minor >= *since)
    }
}

fn safe_since(major: u32) -> Option<String> {
    let (major, minor) = SAFE_SINCE.iter().find(|(known, _)| *known == major)?;
    Some(format!("{major}.{minor}"))
}

fn has_programs(directory: &Path) -> bool {
    PROGRAMS.iter().all(|name| is_executable(&directory.join(name)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn installed(place: &Path, name: &str, version: &str) -> PathBuf {
        let directory = place.join(name);
        std::fs::create_dir(&directory).unwrap();
        for program in PROGRAMS {
            let path = directory.join(program);
            let text = format!("#!/bin/sh\necho '{program} (PostgreSQL) {version}'\n");
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        directory
    }

    #[tokio::test]
    async fn clients_are_neither_older_than_the_server_nor_than_the_fixes() {
        let place = tempfile::tempdir().unwrap();
        let old = installed(place.path(), "old", "17.9");
        let new = installed(place.path(), "new", "18.4");
        let server = ServerVersion(170_011);
        let found = Clients::find(server, &[old.clone(), new.clone()]).await.unwrap();
        assert_eq!(found.version(), ServerVersion(180_004), "17.9 has known holes");
        assert_eq!(found.directory, new);
        let error = Clients::find(server, std::slice::from_ref(&old)).await.unwrap_err();
        let told = proto::failure::chain(&error);
        assert!(matches!(error, Error::ClientUnsafe { .. }), "{told}");
        assert!(told.contains("17.9") && told.contains("17.10"), "{told}");
        let fits = installed(place.path(), "fits", "17.10");
        let found = Clients::find(server, &[new.clone(), fits.clone()]).await.unwrap();
        assert_eq!(found.directory, fits, "the server's own major version goes first");
        let error = Clients::find(ServerVersion(180_000), &[fits]).await;
        assert!(!matches!(error, Ok(found) if found.version().major() < 18), "17 cannot dump 18");
    }
}
