//! The client programs for logical backups: which installation of `pg_dump`, `pg_dumpall` and `pg_restore` fits a server.
//!
//! A client older than its server cannot dump it. And a client must not be older than the fixes of what a hostile server, or a hostile
//! name in a database, could make it do (CVE-2024-7348, CVE-2025-8714, CVE-2025-8715, CVE-2026-6477).

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::binaries::{VERSION_TIMEOUT, candidates, parse_version};
use crate::process::{Program, Result, is_executable};
use crate::version::{NEWEST_MAJOR, ServerVersion};

/// Major version, and the first minor version with the fixes.
const SAFE_SINCE: [(u32, u32); 5] = [(14, 23), (15, 18), (16, 14), (17, 10), (18, 4)];
/// From this major version on `pg_restore` sets `transaction_timeout`, which no older server knows.
const SETS_TRANSACTION_TIMEOUT: u32 = 17;
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
        Self::find_among(server.major()..=NEWEST_MAJOR, extra_dirs).await
    }

    /// Finds clients that load into a server what the `pg_dump` of a version wrote: those of the server's own major version where
    /// they can read it, or the next ones that can.
    pub async fn find_to_load(
        server: ServerVersion,
        writer: ServerVersion,
        extra_dirs: &[PathBuf],
    ) -> Result<Self> {
        let (server_major, oldest) = (server.major(), oldest_reader(writer));
        if server_to_load_into(server, writer) != server {
            return Err(Error::Setting {
                what: format!("load what pg_dump {writer} wrote into PostgreSQL {server}"),
                found: format!(
                    "pg_restore {oldest} is the first that reads it, and sets transaction_timeout, which PostgreSQL {server_major} does not know"
                ),
                cure: format!(
                    "Load it into PostgreSQL {oldest} or newer; or dump again where postgresql-client-{server_major} is installed."
                ),
            });
        }
        let newest = if server_major < SETS_TRANSACTION_TIMEOUT {
            SETS_TRANSACTION_TIMEOUT - 1
        } else {
            NEWEST_MAJOR
        };
        Self::find_among(server_major.max(oldest)..=newest, extra_dirs).await
    }

    async fn find_among(majors: RangeInclusive<u32>, extra_dirs: &[PathBuf]) -> Result<Self> {
        let first = *majors.start();
        let mut searched = Vec::new();
        let mut unsafe_one = None;
        for major in majors {
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
        let major = first;
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

/// The server, or the oldest newer one, that understands the `pg_restore` which reads what the `pg_dump` of a version wrote.
pub fn server_to_load_into(server: ServerVersion, writer: ServerVersion) -> ServerVersion {
    let oldest = oldest_reader(writer);
    if server.major() < SETS_TRANSACTION_TIMEOUT && oldest >= SETS_TRANSACTION_TIMEOUT {
        return ServerVersion(oldest * 10_000);
    }
    server
}

/// The oldest major version whose `pg_restore` reads what the `pg_dump` of a version writes: the format changed with 16 and 17.
fn oldest_reader(writer: ServerVersion) -> u32 {
    match writer.major() {
        ..=15 => 14,
        16 => 16,
        _ => 17,
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

    #[tokio::test]
    async fn what_loads_a_dump_reads_it_and_sets_nothing_that_the_server_does_not_know() {
        let place = tempfile::tempdir().unwrap();
        let all = ["14.23", "15.18", "16.14", "17.10", "18.4"];
        let dirs: Vec<PathBuf> =
            all.iter().map(|version| installed(place.path(), version, version)).collect();
        let version = |major: u32| ServerVersion(major * 10_000 + 1);
        let found = async |server, writer, dirs: &[PathBuf]| {
            let found = Clients::find_to_load(version(server), version(writer), dirs).await;
            found.map(|clients| clients.version().major())
        };
        for (server, writer, expected) in
            [(14, 14, 14), (14, 15, 14), (15, 15, 15), (15, 16, 16), (18, 14, 18), (17, 18, 17)]
        {
            let major = found(server, writer, &dirs).await.unwrap();
            assert_eq!(major, expected, "{writer} into {server}");
        }
        for (server, writer, expected) in
            [(15, 15, 15), (15, 16, 15), (15, 17, 17), (16, 18, 17), (18, 18, 18), (18, 15, 18)]
        {
            let into = server_to_load_into(version(server), version(writer)).major();
            assert_eq!(into, expected, "{writer} of {server}");
        }
        // Where the right one is missing, a newer one does only as far as the server knows what it sets.
        assert_eq!(found(16, 16, &dirs[3..]).await.ok(), None);
        assert_eq!(found(17, 17, &dirs[4..]).await.unwrap(), 18);
        let error = found(16, 18, &dirs).await.unwrap_err();
        let told = proto::failure::chain(&error);
        assert!(told.contains("transaction_timeout, which PostgreSQL 16"), "{told}");
    }
}
