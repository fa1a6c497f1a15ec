//! An empty server in a room, for what is no copy of a cluster's files: a dump is loaded into it to see that it can be.
//!
//! It is as inert as a restored copy and runs on the same settings. Tablespaces get a place inside of the room
//! ([`Sandbox::tablespace_place`]). But a dump is a program: constraints, expressions of indexes and materialised views call its
//! functions as the superuser who loads it, and nothing here keeps them from starting programs under the server's account.
//! Whether dumps are loaded at all is for the caller to ask. Whatever fails here is this machine's fault: nothing of a
//! backup is in it yet.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use proto::{Lsn, SystemIdentifier, Timeline};
use tokio_util::sync::CancellationToken;

use super::{Boot, Sandbox, SandboxOptions, SandboxRoom, common_settings, write_settings};
use crate::Error;
use crate::binaries::Binaries;
use crate::instance::make_private_directory;
use crate::process::{Isolation, Result};

/// Sessions beside those that were asked for: of the checks, and for a superuser.
const SPARE_SESSIONS: u32 = 20;
/// A dump in one transaction locks every table and large object that it makes.
const LOCKS_PER_TRANSACTION: u32 = 1024;

/// What an empty server must be like.
#[derive(Debug, Clone)]
pub struct EmptyOptions {
    /// Its superuser. Memberships of roles may say that he granted them, so it is the one of the dumped server.
    pub superuser: String,
    /// The encoding of its templates.
    pub encoding: String,
    /// Sessions that load at once.
    pub sessions: u32,
    /// For everything until it answers.
    pub timeout: Duration,
    /// Stops it.
    pub cancel: CancellationToken,
}

impl Sandbox {
    /// Makes a cluster in `room` and returns when its server answers queries. On every error the server is ended and the room
    /// removed.
    pub async fn empty(
        binaries: &Binaries,
        room: SandboxRoom,
        options: EmptyOptions,
    ) -> Result<Self> {
        Self::made(binaries, room, options).await.map_err(|error| match error {
            Error::Sandbox { what, output } | Error::Program { outcome: what, output, .. } => {
                Error::SandboxUnfit {
                    what: format!("makes no empty server ({what})"),
                    evidence: output,
                }
            }
            other => other,
        })
    }

    async fn made(binaries: &Binaries, room: SandboxRoom, options: EmptyOptions) -> Result<Self> {
        let begun = Instant::now();
        let EmptyOptions { superuser, encoding, sessions, timeout, cancel } = options;
        let (account, major) = (room.account, binaries.major());
        let mut initdb = binaries
            .program("initdb")?
            .account(Some(account))
            .directory(room.path())
            .arg("--pgdata")
            .arg(room.data_directory())
            .arg(format!("--username={superuser}"))
            .arg(format!("--encoding={encoding}"))
            .args(["--locale=C", "--auth=trust", "--no-sync", "--no-instructions"]);
        if major >= 18 {
            // Pages that were never stored anywhere prove nothing.
            initdb = initdb.arg("--no-data-checksums");
        }
        initdb.run(timeout, &cancel).await?;

        let mut settings = common_settings(&room, major, SandboxOptions::SHARED_BUFFERS_MB);
        for (name, value) in [
            ("max_connections", sessions.saturating_add(SPARE_SESSIONS).to_string()),
            ("max_locks_per_transaction", LOCKS_PER_TRANSACTION.to_string()),
            ("wal_level", "minimal".to_owned()),
        ] {
            settings.push((name.to_owned(), value));
        }
        write_settings(&room, &settings)?;
        let isolation = Isolation::probe(Some(account)).await;
        // A server that replays nothing reaches no position.
        let nowhere = SandboxOptions {
            role: superuser.clone(),
            timeout,
            cancel,
            ..SandboxOptions::new(Lsn::INVALID, Timeline(1), SystemIdentifier(0))
        };
        let mut boot = Boot {
            binaries,
            room: &room,
            options: &nowhere,
            isolation: &isolation,
            account,
            deadline: begun + timeout,
        };
        let (server, mut phases) = boot.start().await?;
        let answer = boot.ask(&superuser).await.map_err(|error| boot.failed(error.text()))?;
        if answer.in_recovery {
            return Err(boot.failed("it is not the server that was to be started".to_owned()));
        }
        phases.start = begun.elapsed();
        let replay_end = Lsn::INVALID;
        let went = None;
        // Nothing was replayed.
        let next_transaction = 0;
        let role = superuser;
        Ok(Self {
            server,
            room,
            major,
            role,
            replay_end,
            next_transaction,
            phases,
            isolation,
            went,
        })
    }

    /// A new empty directory in the room, for a tablespace.
    pub fn tablespace_place(&self, number: usize) -> Result<PathBuf> {
        let place = self.room.tablespaces().join(number.to_string());
        make_private_directory(&place, self.room.account)?;
        Ok(place)
    }

    /// A private directory in the room for whatever has to go when it goes.
    pub fn scratch(&self) -> PathBuf {
        self.room.path.join("run")
    }
}
