//! How the files of a server are reached: by this process itself where it can, else over connections where the role may.

use std::fmt;
use std::path::PathBuf;

use postgres::control_file::ControlFile;
use postgres::files::require_remote_rights;
use postgres::{ServerIdentity, Session};
use proto::{Action, Code, Failure};

use crate::config::{ClusterConfig, FilesConfig};
use crate::context::blocking;
use crate::places::Cluster;

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
            "GRANT pg_read_all_settings TO {}; or set data_directory in the cluster's section.",
            postgres::quote::identifier(&server.role)
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
        .with_hint(
            "Set data_directory in the cluster's section to the directory this server uses.",
        ));
    }
    Ok(directory)
}
