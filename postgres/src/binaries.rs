//! Where PostgreSQL's own programs are, by major version.
//!
//! Deliberately not here: installing anything. What is missing is named together with the package
//! that brings it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::block_sizes::BlockSizes;
use crate::process::{Program, Result, find_in, is_executable};

/// `postgres --version` prints one line; a dead network mount must not hold us longer.
pub(crate) const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

/// A directory with the programs of one PostgreSQL installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    directory: PathBuf,
    major: u32,
    minor: u32,
}

impl Binaries {
    /// Finds the programs of a major version: in `extra_dirs` (each as it is, and its `bin`), where
    /// Debian and Red Hat put them, and in this process's `PATH`. A directory of another version is
    /// passed over.
    pub async fn find(major: u32, extra_dirs: &[PathBuf]) -> Result<Self> {
        Self::search(major, extra_dirs, None).await
    }

    /// The same, for a cluster of these sizes: programs that are built for others are passed over, too.
    pub async fn find_for(major: u32, extra_dirs: &[PathBuf], sizes: BlockSizes) -> Result<Self> {
        Self::search(major, extra_dirs, Some(sizes)).await
    }

    async fn search(
        major: u32,
        extra_dirs: &[PathBuf],
        needed: Option<BlockSizes>,
    ) -> Result<Self> {
        let mut searched = Vec::new();
        let mut of_others = None;
        for directory in candidates(major, extra_dirs) {
            if searched.contains(&directory) {
                continue;
            }
            if is_executable(&directory.join("postgres"))
                && let Ok(found) = Self::at(&directory).await
                && found.major == major
            {
                let Some(needed) = needed else { return Ok(found) };
                match found.block_sizes().await {
                    Ok(built_for) if built_for != needed => {
                        of_others.get_or_insert(Error::BinariesOfOtherSizes {
                            major,
                            needed,
                            directory: directory.clone(),
                            built_for,
                        });
                    }
                    // Those that do not tell refuse the cluster themselves, if it is not theirs.
                    Ok(_) | Err(_) => return Ok(found),
                }
            }
            searched.push(directory);
        }
        Err(of_others.unwrap_or_else(|| Error::BinariesMissing {
            major,
            package: debian_package(major),
            searched,
        }))
    }

    /// The programs in `directory`, whose `postgres` is asked for its version.
    pub async fn at(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref();
        let output = Program::new(directory.join("postgres"))
            .arg("--version")
            .run(VERSION_TIMEOUT, &CancellationToken::new())
            .await?;
        let text = output.stdout_text();
        let (major, minor) = parse_version(&text).ok_or_else(|| Error::Program {
            program: directory.join("postgres").display().to_string(),
            outcome: "a version that cannot be read".to_owned(),
            output: text.trim().to_owned(),
        })?;
        Ok(Self { directory: directory.to_owned(), major, minor })
    }

    /// Those that the suite gives to the tests beside the code.
    #[cfg(test)]
    #[expect(clippy::disallowed_methods, reason = "tests are told of their services by variables")]
    pub(crate) async fn of_the_suite(major: u32) -> Self {
        let given = std::env::var(format!("PGMUSTER_TEST_PG_BIN_{major}"));
        Self::at(given.expect("run ./tests/run, which starts the services")).await.unwrap()
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// 15 for 15.18.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// 18 for 15.18; 0 for a version before its first release.
    pub fn minor(&self) -> u32 {
        self.minor
    }

    /// As in `server_version_num`: 150018.
    pub fn version_num(&self) -> u32 {
        self.major * 10_000 + self.minor
    }

    /// What they are built for, asked of `postgres` itself, without any cluster.
    pub async fn block_sizes(&self) -> Result<BlockSizes> {
        let ask = async |name: &str| {
            // `-C` comes first: only then root may ask. Settings there are none, and the directory is not looked into.
            let asked = ["-C", name, "-D", "/", "-c", "config_file=/dev/null"];
            let program = self.program("postgres")?.args(asked);
            let output = program.run(VERSION_TIMEOUT, &CancellationToken::new()).await?;
            let text = output.stdout_text();
            text.trim().parse::<u32>().map_err(|_| Error::Program {
                program: self.directory.join("postgres").display().to_string(),
                outcome: format!("a {name} that cannot be read"),
                output: text.trim().to_owned(),
            })
        };
        Ok(BlockSizes {
            page_bytes: ask("block_size").await?,
            file_pages: ask("segment_size").await?,
            wal_page_bytes: ask("wal_block_size").await?,
        })
    }

    /// The path of a program, for example `initdb`; an error when this installation lacks it (the
    /// client tools are a package of their own).
    pub fn path(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        if is_executable(&path) {
            return Ok(path);
        }
        Err(Error::BinariesMissing {
            major: self.major,
            package: match name {
                "psql" | "pg_dump" | "pg_dumpall" | "pg_restore" | "pg_basebackup"
                | "pg_isready" | "pg_receivewal" | "pg_amcheck" | "pg_verifybackup" => {
                    format!("postgresql-client-{}", self.major)
                }
                _ => debian_package(self.major),
            },
            searched: vec![path],
        })
    }

    /// One of the programs, ready for arguments.
    pub fn program(&self, name: &str) -> Result<Program> {
        self.path(name).map(Program::new)
    }
}

fn debian_package(major: u32) -> String {
    format!("postgresql-{major}")
}

pub(crate) fn candidates(major: u32, extra_dirs: &[PathBuf]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for directory in extra_dirs {
        found.push(directory.clone());
        found.push(directory.join("bin"));
    }
    found.push(format!("/usr/lib/postgresql/{major}/bin").into());
    found.push(format!("/usr/pgsql-{major}/bin").into());
    found.push("/usr/local/pgsql/bin".into());
    // The one place where this crate looks at its environment: where a person's own PostgreSQL is
    // found.
    let path = std::env::var_os("PATH").unwrap_or_default();
    if let Some(postgres) = find_in(&path, "postgres") {
        found.extend(postgres.parent().map(Path::to_owned));
    }
    found.extend(std::env::split_paths(&path).filter(|directory| directory.is_absolute()));
    found
}

/// From `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`, also `19devel` and `18beta1`.
pub(crate) fn parse_version(text: &str) -> Option<(u32, u32)> {
    let number = text.split_once("(PostgreSQL) ")?.1.split_whitespace().next()?;
    let end = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
    let minor = number[end..].strip_prefix('.').unwrap_or("0");
    Some((number[..end].parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_they_are_printed() {
        let debian = "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n";
        assert_eq!(parse_version(debian), Some((15, 18)));
        assert_eq!(parse_version("postgres (PostgreSQL) 18.6\n"), Some((18, 6)));
        assert_eq!(parse_version("postgres (PostgreSQL) 19devel\n"), Some((19, 0)));
        assert_eq!(parse_version("postgres (PostgreSQL) 18beta1\n"), Some((18, 0)));
        assert_eq!(parse_version("postgres (EnterpriseDB) 15.1\n"), None);
        assert_eq!(parse_version(""), None);
    }

    #[tokio::test]
    async fn a_missing_version_names_its_package() {
        let error = Binaries::find(99, &["/nowhere".into()]).await.unwrap_err();
        let Error::BinariesMissing { package, searched, .. } = error else { panic!("{error}") };
        assert_eq!(package, "postgresql-99");
        assert!(searched.contains(&PathBuf::from("/nowhere/bin")));
    }
}
