//! How the files of a server are reached: by this process itself where it can, else over connections where the role may.

use std::fmt;
use std::path::{Path, PathBuf};

use postgres::control_file::ControlFile;
use postgres::files::require_remote_rights;
use postgres::occupied::LOCK_FILE;
use postgres::{ServerIdentity, Session};
use proto::{Action, Code, Failure};

use crate::config::{ClusterConfig, FilesConfig, GivenBy};
use crate::context::blocking;
use crate::places::Cluster;

/// A server that began to start may take as long as this to say that it did.
const STARTING_MAX_S: i64 = 60;

/// How a server's files are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// By this process, in this directory.
    Here(PathBuf),
    /// Over connections to the server.
    Remote,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here(directory) => write!(f, "in {}", directory.display()),
            Self::Remote => f.write_str("whose files are read over connections"),
        }
    }
}

/// Chooses how a server's files are read, as its section of the configuration allows. Changes nothing; `session` is with
/// the server.
pub async fn access(
    cluster: &Cluster,
    server: &ServerIdentity,
    session: &Session,
) -> Result<Access, Failure> {
    let config = &cluster.config;
    if config.files == FilesConfig::Remote {
        require_remote_rights(session, server).await?;
        return Ok(Access::Remote);
    }
    let here = {
        let (config, server) = (config.clone(), server.clone());
        blocking(move || data_directory(&config, &server)).await
    };
    let refused = match here {
        Ok(directory) => return Ok(Access::Here(directory)),
        Err(refused) => refused,
    };
    // Whoever names a directory means it.
    if config.files == FilesConfig::Local || config.data_directory.is_some() {
        return Err(refused);
    }
    match require_remote_rights(session, server).await {
        Ok(()) => Ok(Access::Remote),
        Err(postgres::Error::Permission { grant, .. }) => {
            let hint =
                format!("{} Or let its files be read over connections: {grant}", refused.hint);
            Err(refused.with_hint(hint.trim_start().to_owned()))
        }
        Err(error) => Err(error.into()),
    }
}

/// The data directory of a server as this process sees it, after making sure that it is this server's.
pub(crate) fn data_directory(
    cluster: &ClusterConfig,
    server: &ServerIdentity,
) -> Result<PathBuf, Failure> {
    let configured = cluster.data_directory.as_ref().map(|dir| dir.clone().into_std_path_buf());
    let Some(directory) = configured.or_else(|| server.data_directory.clone()) else {
        return Err(Failure::new(
            Code::PermissionDenied,
            Action::FixConfig,
            format!("role {} may not ask the server for its data directory", server.role),
        )
        .with_hint(format!(
            "GRANT pg_read_all_settings TO {};{}",
            postgres::quote::identifier(&server.role),
            match cluster.given_by {
                GivenBy::File => " or set data_directory in the cluster's section.",
                GivenBy::Up => " or name the directory: --data-directory DIR.",
                GivenBy::Backup => "",
            }
        )));
    };
    let control = ControlFile::read(&directory)?;
    if control.system_identifier != server.system_identifier {
        return Err(Failure::new(
            Code::DataDirectoryMismatch,
            Action::FixConfig,
            format!(
                "{} belongs to the cluster with system identifier {}, the server at {} is {}",
                directory.display(),
                control.system_identifier,
                cluster.name,
                server.system_identifier
            ),
        )
        .with_hint(match cluster.given_by {
            GivenBy::File => {
                "Set data_directory in the cluster's section to the directory this server uses."
            }
            GivenBy::Up => "Name the directory that this server uses: --data-directory DIR.",
            GivenBy::Backup => {
                "Run this on the server's own host, where the directory that it names is its own."
            }
        }));
    }
    Ok(directory)
}

/// The directory in which a server runs now, as this process sees it; `None` where it is not at hand. A clone, and a primary of
/// before a failover, have the system identifier too: so the directory must be in use by a server that started when this one did, and
/// be where this one is. A checkpoint since `server` was asked makes it seem another one, until it is asked again.
pub(crate) fn live_directory(cluster: &ClusterConfig, server: &ServerIdentity) -> Option<PathBuf> {
    let directory = data_directory(cluster, server).ok()?;
    let lock = std::fs::read_to_string(directory.join(LOCK_FILE)).ok()?;
    let control = ControlFile::read(&directory).ok()?;
    let is_there = control.checkpoint == server.checkpoint_lsn
        && is_its_lock(&lock, server.data_directory.as_deref(), server.started_at_ms, server.port);
    is_there.then_some(directory)
}

/// Whether what a server wrote into its lock file fits what one says of itself: its directory, when it was started, and its port.
fn is_its_lock(lock: &str, directory: Option<&Path>, started_at_ms: i64, port: u16) -> bool {
    let lines: Vec<&str> = lock.lines().map(str::trim).collect();
    let [_, place, began_s, at_port, ..] = lines[..] else { return false };
    let (Ok(began_s), Ok(at_port)) = (began_s.parse::<i64>(), at_port.parse::<u16>()) else {
        return false;
    };
    let took_s = started_at_ms.div_euclid(1_000).saturating_sub(began_s);
    directory.is_none_or(|directory| directory == Path::new(place))
        && (0..=STARTING_MAX_S).contains(&took_s)
        && at_port == port
}

#[cfg(test)]
mod tests {
    use postgres::version::ServerVersion;
    use proto::{Lsn, SystemIdentifier, Timeline};

    use super::*;

    #[test]
    fn a_setting_is_told_where_it_can_be_given() {
        let server = ServerIdentity {
            version: ServerVersion(150_018),
            system_identifier: SystemIdentifier(7),
            backend_pid: 1,
            in_recovery: false,
            data_directory: None,
            socket_directories: Vec::new(),
            port: 5432,
            block_size: 8192,
            relation_segment_size: 1 << 30,
            wal_segment_size: 16 << 20,
            data_checksums: true,
            timeline: Timeline(1),
            checkpoint_lsn: Lsn(1),
            redo_lsn: Lsn(1),
            started_at_ms: 1,
            database: "postgres".to_owned(),
            role: "backup".to_owned(),
            may_replicate: true,
            superuser: false,
            reads_all: true,
        };
        let hint = |given_by| {
            let file = "name = \"main\"\nconnection = \"\"";
            let config = ClusterConfig { given_by, ..toml::from_str(file).unwrap() };
            data_directory(&config, &server).unwrap_err().hint
        };
        let grant =
            format!("GRANT pg_read_all_settings TO {};", postgres::quote::identifier(&server.role));
        let file = hint(GivenBy::File);
        assert!(file.starts_with(&grant) && file.contains("in the cluster's section"), "{file}");
        assert_eq!(
            hint(GivenBy::Up),
            format!("{grant} or name the directory: --data-directory DIR.")
        );
        assert_eq!(hint(GivenBy::Backup), grant, "it has no option for that");
    }

    #[test]
    fn a_lock_file_fits_the_server_that_wrote_it_and_no_other() {
        let lock = "4711\n/srv/pg\n1700000000\n5432\n/run/postgresql\nlocalhost\n 42 7\nready   \n";
        let fits = |place: Option<&str>, started_at_ms, port| {
            is_its_lock(lock, place.map(Path::new), started_at_ms, port)
        };
        let place = Some("/srv/pg");
        for started_at_ms in [1_700_000_000_000, 1_700_000_000_999, 1_700_000_060_000] {
            assert!(fits(place, started_at_ms, 5432), "{started_at_ms}");
        }
        assert!(fits(None, 1_700_000_000_500, 5432), "the role may not see where it is");
        assert!(!fits(place, 1_699_999_999_999, 5432), "it was started before");
        assert!(!fits(place, 1_700_000_061_000, 5432), "it was started later");
        assert!(!fits(place, 1_700_000_000_500, 5433));
        assert!(!fits(Some("/srv/clone"), 1_700_000_000_500, 5432));
        for other in ["", "4711\n/srv/pg\n1700000000\n", "-4711\n/srv/pg\n1\n0\n\n"] {
            assert!(!is_its_lock(other, Some(Path::new("/srv/pg")), 1_700_000_000_500, 5432));
        }
    }
}
