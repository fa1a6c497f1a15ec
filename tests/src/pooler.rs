//! A real pooler in front of a throwaway cluster.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;
use postgres::instance::Instance;
use tempfile::TempDir;

use crate::{SOON, eventually, services};

/// The number in the socket's name.
const PORT: u16 = 6543;

/// The pooler. Dropping it kills it.
#[derive(Debug)]
pub struct Pooler {
    child: Child,
    place: TempDir,
}

impl Pooler {
    /// Starts one; `mode` is its `pool_mode`. It hands through what a client may set at its start, as one does
    /// that was configured for drivers which insist on that.
    pub fn start(server: &Instance, mode: &str) -> anyhow::Result<Self> {
        // The path of a socket must be short.
        let place = tempfile::Builder::new().prefix("b").tempdir_in("/tmp")?;
        let config = place.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\npostgres = user=postgres host={} port={}\n\
             [pgbouncer]\nlisten_port = {PORT}\nunix_socket_dir = {}\nauth_type = any\n\
             ignore_startup_parameters = options,extra_float_digits\npool_mode = {mode}\n",
            server.socket_directory().display(),
            server.port(),
            place.path().display(),
        );
        std::fs::write(&config, text)?;
        let log = File::create(place.path().join("log"))?;
        let child = Command::new(services::pgbouncer()?)
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start the pooler")?;
        let pooler = Self { child, place };
        let up = eventually("the pooler to listen", SOON, || {
            Ok(UnixStream::connect(pooler.socket()).is_ok().then_some(()))
        });
        up.with_context(|| {
            std::fs::read_to_string(pooler.place.path().join("log")).unwrap_or_default()
        })?;
        Ok(pooler)
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.place.path().join(format!(".s.PGSQL.{PORT}"))
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
