//! Whether the place where a restored server will listen is free, as far as that is known before it is restored.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::Path;

use proto::backup::Setting;
use proto::{Action, Code, Failure};

use crate::context::blocking;

/// Where a server listens by its own settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listening {
    port: u16,
    /// It listens beyond its sockets.
    over_tcp: bool,
    /// The directories of its sockets; none where the backup does not say.
    directories: Vec<String>,
}

impl Listening {
    /// By the settings of the server when the backup was taken; `None` where nobody knows its port, and where its settings are
    /// not in its data directory: such a server is not opened.
    pub(super) fn of(settings: &[Setting], port: Option<u16>) -> Option<Self> {
        let setting =
            |name: &str| settings.iter().find(|one| one.name == name).map(|one| one.value.as_str());
        let directory = setting("data_directory").map(Path::new);
        let is_inside = directory.zip(setting("config_file").map(Path::new));
        if is_inside.is_some_and(|(directory, file)| !file.starts_with(directory)) {
            return None;
        }
        let port = port.or_else(|| setting("port")?.parse().ok())?;
        let directories = setting("unix_socket_directories").unwrap_or_default().split(',');
        let directories =
            directories.map(|directory| directory.trim().trim_matches('"').to_owned());
        Some(Self {
            port,
            over_tcp: setting("listen_addresses") != Some(""),
            directories: directories.filter(|directory| !directory.is_empty()).collect(),
        })
    }

    /// Refuses when another server has the place.
    pub(super) async fn check(self) -> Result<(), Failure> {
        let port = self.port;
        let taken = blocking(move || Ok(self.taken())).await?;
        match taken {
            None => Ok(()),
            Some(by) => {
                let what = format!("the restored server would listen at port {port}, and {by}");
                Err(Failure::new(Code::ServerSetting, Action::FixConfig, what).with_hint(
                    "Nothing was written. Choose another port: --port N; or stop the other server; or restore without --start.",
                ))
            }
        }
    }

    /// Who has it.
    fn taken(&self) -> Option<String> {
        for directory in &self.directories {
            let socket = Path::new(directory).join(format!(".s.PGSQL.{}", self.port));
            if UnixStream::connect(&socket).is_ok() {
                return Some(format!("a server answers at {}", socket.display()));
            }
        }
        let bound = self.over_tcp.then(|| TcpListener::bind((Ipv4Addr::LOCALHOST, self.port)));
        match bound {
            Some(Err(error)) if error.kind() == ErrorKind::AddrInUse => {
                Some(format!("another process listens at 127.0.0.1:{}", self.port))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_server_listens_where_its_files_say_unless_a_port_was_asked_for() {
        let of = |settings: &[(&str, &str)], port| {
            let setting = |(name, value): &(&str, &str)| Setting {
                name: (*name).to_owned(),
                value: (*value).to_owned(),
            };
            Listening::of(&settings.iter().map(setting).collect::<Vec<_>>(), port)
        };
        let known = [
            ("listen_addresses", ""),
            ("port", "5432"),
            ("unix_socket_directories", "/run/postgresql, \"/tmp\""),
            ("config_file", "/data/postgresql.conf"),
            ("data_directory", "/data"),
        ];
        let place = of(&known, None).unwrap();
        assert_eq!((place.port, place.over_tcp), (5432, false));
        assert_eq!(place.directories, ["/run/postgresql", "/tmp"]);
        assert_eq!(of(&known, Some(5433)).unwrap().port, 5433);
        // What an older program kept does not say; what has its settings elsewhere is not opened.
        assert_eq!(of(&[("archive_mode", "on")], None), None);
        let elsewhere = [known[1], ("config_file", "/etc/postgresql.conf"), known[4]];
        assert_eq!(of(&elsewhere, Some(5433)), None);
    }

    #[tokio::test]
    async fn a_place_that_another_server_has_is_refused_and_a_dead_ones_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let at = |port: u16, over_tcp: bool| Listening {
            port,
            over_tcp,
            directories: vec![directory.path().display().to_string()],
        };
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = tcp.local_addr().unwrap().port();
        let refused = at(port, true).check().await.unwrap_err();
        assert_eq!(refused.code, Code::ServerSetting);
        assert!(refused.message.contains(&format!("127.0.0.1:{port}")), "{refused}");
        assert!(refused.hint.contains("--port N"), "{refused:?}");
        at(port, false).check().await.unwrap();
        let socket = directory.path().join(format!(".s.PGSQL.{port}"));
        let listener = UnixListener::bind(&socket).unwrap();
        let refused = at(port, false).check().await.unwrap_err();
        assert!(refused.message.contains(&socket.display().to_string()), "{refused}");
        drop(listener);
        at(port, false).check().await.unwrap();
    }
}
