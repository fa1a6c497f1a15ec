//! The proof sandbox: a restored copy, booted where it can harm nothing and nobody.
//!
//! **How it reaches the end of its backup, and no other place.** The WAL of the backup lies in
//! `pg_wal` and `backup_label` says where replay begins. Started just so, a server would replay
//! whatever it finds and open at the first record it cannot read, on the timeline of production. So
//! the sandbox asks for archive recovery with `recovery_target = 'immediate'`: every version from
//! 14 on stops exactly where the end-of-backup record makes the copy consistent, and refuses to
//! start ("recovery ended before configured recovery target was reached") when WAL ends earlier.
//! Archive recovery demands a `restore_command`; ours answers "there is no such file" to
//! everything, after which the server looks into `pg_wal`. It can end nothing early, because of
//! that refusal. The server then promotes itself: its writes go to a new timeline.
//!
//! A backup of a standby has no end-of-backup record, and its WAL no record behind the end, at which
//! a target could be noticed. There the sandbox asks for all the WAL there is, which ends with the
//! backup; that it ends no earlier is what the control file of such a copy demands.
//!
//! **Why it is inert.** It runs on settings of our own; the copy's `postgresql.conf` is not read
//! and its `postgresql.auto.conf` is emptied. No TCP, no archiving, no replication, no background
//! workers of any kind, a network of its own where the machine allows one. Before it starts,
//! everything is refused through which replay could write outside: links, tablespaces mapped
//! elsewhere, and tablespaces created during the backup (replay would make them at their original
//! place, over the files of production).
//!
//! **How it goes beyond the end of its backup**, where that is asked for ([`Beyond`]). Then its
//! `restore_command` is one that the caller gives, which fetches archived WAL through a socket, and
//! the target is the caller's. It must say itself that it stopped there. WAL that makes a tablespace
//! outside the room must not be handed to it: [`is_room_of`] says whether a server lives in one.
//!
//! Deliberately not here: restoring the files, and the checks that are run on the server.

mod empty;
mod in_replay;
#[cfg(test)]
mod silence;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Component, Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use proto::backup::Setting;
use proto::{Lsn, RecoveryTarget, SystemIdentifier, Timeline, failure};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::NoTls;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::binaries::Binaries;
use crate::control_file::ControlFile;
use crate::instance::{
    PostmasterStatus, SOCKET_PORT, SocketDirectory, give_to, log_tail, make_private_directory,
    open_log, postmaster_status, settings_text, socket_url, whole_log, write_private,
};
use crate::process::{
    Account, DeathSignal, ERROR_LINES, Isolation, ProcessIdentity, Program, Result, Running,
    describe, wait_blocking,
};
use crate::recovery::{self, RecoverySettings, Said};
use crate::unfit::{self, Unfit};
use crate::wal::Segment;
pub use empty::EmptyOptions;
use in_replay::in_replay;

/// Says in a room that it is one, and whose; locked while its owner lives.
const OWNER_FILE: &str = "owner";
/// The socket of whoever hands files to the room's server.
const SERVICE_SOCKET: &str = "wal.sock";
/// First line of a room's owner file: what does not begin so is never removed.
const OWNER_MARK: &str = "pgmuster sandbox";
/// What a server says when it has replayed to the end of its backup.
const CONSISTENT: &str = "consistent recovery state reached";
/// Between two looks at a booting server.
const BOOT_POLL: Duration = Duration::from_millis(20);
/// How long a sandbox may take to end at once; what is left then is killed.
const DESTROY_PATIENCE: Duration = Duration::from_secs(10);
/// A server one of whose processes was killed ends the others and then itself.
const DEATH_PATIENCE: Duration = Duration::from_secs(2);
/// A connection over a local socket either works at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Asking a stopped copy for its superuser.
const SINGLE_USER_TIMEOUT: Duration = Duration::from_mins(2);
/// PostgreSQL's own defaults of `min_wal_size` and `max_wal_size`.
const WAL_MIN_MB: u32 = 80;
const WAL_MAX_MB: u32 = 1024;
/// Settings a copy must have at least as high as its source, or replay fails: room for prepared
/// transactions and their locks, and for the replication origins of a subscriber. The other
/// minimums bind standbys that answer queries, which a sandbox does not do before it is promoted.
const MINIMUMS: [(&str, u32, u32); 5] = [
    ("max_connections", 20, 14),
    ("max_prepared_transactions", 0, 14),
    ("max_locks_per_transaction", 64, 14),
    ("max_replication_slots", 64, 14),
    ("max_active_replication_origins", 64, 18),
];
/// What makes the copy inert, and small. By name, value, and the first version that knows it.
const INERT: [(&str, &str, u32); 50] = [
    // Nobody reaches it but through the private socket.
    ("listen_addresses", "", 14),
    ("unix_socket_permissions", "0700", 14),
    ("ssl", "off", 14),
    ("bonjour", "off", 14),
    ("krb_server_keyfile", "", 14),
    ("cluster_name", "pgmuster-sandbox", 14),
    // It reaches nobody.
    ("archive_mode", "off", 14),
    ("archive_command", "", 14),
    ("archive_library", "", 15),
    ("archive_cleanup_command", "", 14),
    ("recovery_end_command", "", 14),
    ("primary_conninfo", "", 14),
    ("primary_slot_name", "", 14),
    ("max_wal_senders", "0", 14),
    ("sync_replication_slots", "off", 17),
    ("synchronous_standby_names", "", 14),
    ("synchronized_standby_slots", "", 17),
    // Nothing runs in it by itself: schedulers, subscriptions, launchers of any library are
    // background workers.
    ("max_worker_processes", "0", 14),
    ("max_logical_replication_workers", "0", 14),
    ("autovacuum", "off", 14),
    ("autovacuum_freeze_max_age", "2000000000", 14),
    ("autovacuum_multixact_freeze_max_age", "2000000000", 14),
    ("summarize_wal", "off", 17),
    ("event_triggers", "off", 17),
    ("session_preload_libraries", "", 14),
    ("local_preload_libraries", "", 14),
    ("jit", "off", 14),
    ("restart_after_crash", "off", 14),
    // Replay: to the end of the backup, exactly.
    ("restore_command", "exit 1", 14),
    ("recovery_target", "immediate", 14),
    ("recovery_target_action", "promote", 14),
    ("recovery_target_timeline", "current", 14),
    ("hot_standby", "off", 14),
    // A damaged page must be seen, not stepped over.
    ("ignore_checksum_failure", "off", 14),
    ("ignore_invalid_pages", "off", 14),
    ("zero_damaged_pages", "off", 14),
    // Nothing that is written here outlives the proof; nothing is left in shared memory.
    ("fsync", "off", 14),
    ("synchronous_commit", "off", 14),
    ("full_page_writes", "off", 14),
    ("wal_init_zero", "off", 14),
    ("checkpoint_timeout", "1h", 14),
    ("huge_pages", "off", 14),
    ("dynamic_shared_memory_type", "mmap", 14),
    ("io_method", "sync", 18),
    // A busy backend notices that its client has died.
    ("client_connection_check_interval", "2s", 14),
    // Its log is read by us, and holds no statements: they may quote data.
    ("logging_collector", "off", 14),
    ("log_destination", "stderr", 14),
    ("log_line_prefix", "%m [%p] ", 14),
    ("log_min_error_statement", "panic", 14),
    ("lc_messages", "C", 14),
];

/// A directory for one proof, locked by this process for as long as the value lives, and removed
/// with it. The restore writes into [`Self::data_directory`] and [`Self::tablespaces`]; everything
/// the proof ever touches lies inside.
#[derive(Debug)]
pub struct SandboxRoom {
    path: PathBuf,
    sockets: SocketDirectory,
    account: Account,
    /// Holds the lock; the kernel lets go of it when this process ends, however it ends.
    _owner: File,
}

impl SandboxRoom {
    /// Makes `root/name`. `root` is made when absent; `name` must be new there. The server will run
    /// as `account`: otherwise as the current one, or as `postgres` when that is root.
    pub async fn create(root: &Path, name: &str, account: Option<Account>) -> Result<Self> {
        let account = match account {
            Some(account) => account,
            None => Account::of_servers().await?,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(root)
            .map_err(|source| Error::io("create the directory", root, source))?;
        let root = root.canonicalize().map_err(|source| Error::io("find", root, source))?;
        let path = root.join(name);
        if Path::new(name).components().count() != 1 || path.parent() != Some(&root) {
            return Err(Error::io("create", &path, io::Error::from(io::ErrorKind::InvalidInput)));
        }
        // While a sweep looks around, no room may be half made.
        let _no_sweep = lock_root(&root, FlockOperation::LockShared)?;
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|source| Error::io("create the directory", &path, source))?;
        let made = Self::furnish(&path, account);
        if made.is_err() {
            // It was made a moment ago by this very call and nobody else knows of it.
            let _ = std::fs::remove_dir_all(&path);
        }
        made
    }

    fn furnish(path: &Path, account: Account) -> Result<Self> {
        let owner_path = path.join(OWNER_FILE);
        let failed = |source| Error::io("write", &owner_path, source);
        let open = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&owner_path);
        let mut owner = open.map_err(failed)?;
        flock(&owner, FlockOperation::NonBlockingLockExclusive).map_err(|e| failed(e.into()))?;
        let sockets = SocketDirectory::create(&path.join("s"), account)?;
        let text = format!(
            "{OWNER_MARK}\npid {}\nsockets {}\n",
            std::process::id(),
            sockets.path.display()
        );
        owner.write_all(text.as_bytes()).map_err(failed)?;
        make_private_directory(path, account)?;
        for part in ["data", "tablespaces", "run"] {
            make_private_directory(&path.join(part), account)?;
        }
        Ok(Self { path: path.to_owned(), sockets, account, _owner: owner })
    }

    /// The whole room.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the data directory must be restored to. It exists and is empty.
    pub fn data_directory(&self) -> PathBuf {
        self.path.join("data")
    }

    /// Below here, in a directory for each OID, tablespaces must be restored to.
    pub fn tablespaces(&self) -> PathBuf {
        self.path.join("tablespaces")
    }

    /// Where somebody may listen who hands WAL to the room's server.
    pub fn service_socket(&self) -> PathBuf {
        self.sockets.path.join(SERVICE_SOCKET)
    }

    /// The server's log.
    pub fn log_path(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Removes the room and says when that fails; dropping removes it too, silently. Blocking.
    pub fn remove(self) -> Result<()> {
        remove_room(&self.path)
            .map_err(|source| Error::io("remove the directory", &self.path, source))
    }
}

impl Drop for SandboxRoom {
    fn drop(&mut self) {
        // Gone already after `remove`. What cannot be removed now is found by the next sweep.
        let _ = remove_room(&self.path);
    }
}

/// Whether a sandbox gets a network of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetworkIsolation {
    /// Where the machine allows it; [`Sandbox::isolation`] tells.
    #[default]
    WherePossible,
    /// Without it the sandbox is not started.
    Required,
    /// Not even tried.
    Off,
}

/// A moment behind the end of the backup.
#[derive(Debug, Clone)]
pub struct Beyond {
    /// Where it ends, along which timeline, and what fetches WAL.
    pub settings: RecoverySettings,
    /// What must be replayed at least.
    pub at_least: Lsn,
}

/// What a copy that went beyond the end of its backup said of that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Went {
    /// Why it stopped there, in its own words.
    pub evidence: String,
    /// The last commit that it replayed.
    pub last_commit: Option<jiff::Timestamp>,
}

/// What a restored copy must become, and within which limits.
#[derive(Debug, Clone)]
pub struct SandboxOptions {
    /// The end of the backup. A server that stops earlier is an error.
    pub stop_lsn: Lsn,
    /// The timeline of the backup.
    pub timeline: Timeline,
    /// Whose copy it is.
    pub system_identifier: SystemIdentifier,
    /// Settings of the source, by which the minimums are set; others are ignored.
    pub settings: Vec<Setting>,
    /// Libraries of the source's `shared_preload_libraries` that replay or the checks need (custom
    /// resource managers, types). All others are left out. None of them gets a background worker.
    pub preload_libraries: Vec<String>,
    /// Whom to connect as. Where the copy has no such role, one of its superusers is found.
    pub role: String,
    /// Size of the buffer cache.
    pub shared_buffers_mb: u32,
    /// For everything from the start of the server until it answers.
    pub timeout: Duration,
    /// Stops the boot.
    pub cancel: CancellationToken,
    /// Whether it gets a network of its own.
    pub network: NetworkIsolation,
    /// Where it goes beyond the end of its backup.
    pub beyond: Option<Beyond>,
}

impl SandboxOptions {
    const SHARED_BUFFERS_MB: u32 = 128;

    /// Usual limits: 128 MiB of buffers, a network of its own where possible, no preloaded
    /// libraries, role `postgres`, one hour.
    pub fn new(stop_lsn: Lsn, timeline: Timeline, system_identifier: SystemIdentifier) -> Self {
        Self {
            stop_lsn,
            timeline,
            system_identifier,
            settings: Vec::new(),
            preload_libraries: Vec::new(),
            role: "postgres".to_owned(),
            shared_buffers_mb: Self::SHARED_BUFFERS_MB,
            timeout: Duration::from_hours(1),
            cancel: CancellationToken::new(),
            network: NetworkIsolation::default(),
            beyond: None,
        }
    }
}

/// How long the phases of a boot took, from the server's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BootPhases {
    /// From the start of the process to the first record of replay.
    pub start: Duration,
    /// Replay, to the end of the backup or to the moment behind it.
    pub replay: Duration,
    /// From there until the server answered a query.
    pub open: Duration,
}

/// A restored copy that runs. Dropping it stops it at once and removes its room.
#[derive(Debug)]
pub struct Sandbox {
    // Dropped in this order: first the server, then its files.
    server: Running,
    room: SandboxRoom,
    major: u32,
    role: String,
    replay_end: Lsn,
    next_transaction: u64,
    phases: BootPhases,
    isolation: Isolation,
    went: Option<Went>,
}

impl Sandbox {
    /// Boots the copy that lies in `room` and returns when it has replayed to the end of its backup
    /// and answers queries.
    ///
    /// On every error the server is ended and the room removed. [`Error::Sandbox`] carries the last
    /// lines of the log; [`Error::SandboxUnfit`] says that this machine is to blame, and the copy is
    /// not.
    pub async fn boot(
        binaries: &Binaries,
        room: SandboxRoom,
        options: SandboxOptions,
    ) -> Result<Self> {
        let begun = Instant::now();
        let control = check_copy(binaries, &room, &options)?;
        let account = room.account;
        hand_over(&room)?;
        refuse_tablespaces_created_meanwhile(binaries, &room, &options, &control).await?;
        disarm(&room, binaries.major(), &settings_for(binaries, &room, &options, &control)?)?;
        let isolation = match options.network {
            NetworkIsolation::Off => Isolation::None("switched off".to_owned()),
            NetworkIsolation::WherePossible => Isolation::probe(Some(account)).await,
            NetworkIsolation::Required => match Isolation::probe(Some(account)).await {
                Isolation::None(reason) => {
                    return Err(Error::SandboxUnfit {
                        what: "cannot give it a network of its own".to_owned(),
                        evidence: reason,
                    });
                }
                isolation @ Isolation::Namespaces { .. } => isolation,
            },
        };
        let mut boot = Boot {
            binaries,
            room: &room,
            options: &options,
            isolation: &isolation,
            account,
            deadline: begun + options.timeout,
        };
        let (mut server, mut phases) = boot.start().await?;
        let ready = Instant::now();
        let mut role = options.role.clone();
        let answer = match boot.ask(&role).await {
            Err(AskError::NoRole) => {
                // Replay is over, so a second start is a plain one.
                boot.stop(&mut server).await?;
                let replay_end = replay_end_of(&room)?;
                role = boot.superuser().await?;
                (server, _) = boot.start().await?;
                let answer = match boot.ask(&role).await {
                    Ok(answer) => answer,
                    Err(error) => return Err(boot.gave_no_answer(&mut server, error).await),
                };
                Answer { replay_end: Some(replay_end), ..answer }
            }
            Ok(answer) => answer,
            Err(error) => return Err(boot.gave_no_answer(&mut server, error).await),
        };
        phases.open += ready.elapsed();
        let reached = answer.replay_end.unwrap_or(Lsn::INVALID);
        if answer.in_recovery || answer.system_identifier != options.system_identifier {
            return Err(boot.failed("it is not the server that was to be started".to_owned()));
        }
        let beyond = options.beyond.as_ref();
        let expected = beyond.map_or(options.stop_lsn, |to| to.at_least.max(options.stop_lsn));
        if reached < expected {
            return Err(Error::StopPositionMissed { expected, reached });
        }
        let went = beyond.map(|beyond| boot.went(beyond, reached)).transpose()?;
        let major = binaries.major();
        Ok(Self {
            server,
            room,
            major,
            role,
            replay_end: reached,
            next_transaction: answer.next_transaction,
            phases,
            isolation,
            went,
        })
    }

    /// Where replay ended, as the server itself says; `0/0` of a server that was made empty.
    pub fn replay_end(&self) -> Lsn {
        self.replay_end
    }

    /// The first transaction that was not replayed: from here on it gave the numbers out itself.
    pub fn next_transaction(&self) -> u64 {
        self.next_transaction
    }

    /// What it said of the moment behind the end of its backup, where it was to go to one.
    pub fn went(&self) -> Option<&Went> {
        self.went.as_ref()
    }

    /// How long its phases took.
    pub fn phases(&self) -> BootPhases {
        self.phases
    }

    /// Whether it has a network of its own, and if not, why.
    pub fn isolation(&self) -> &Isolation {
        &self.isolation
    }

    /// The directory of its socket.
    pub fn socket_directory(&self) -> &Path {
        &self.room.sockets.path
    }

    /// The number in the socket's name.
    pub fn port(&self) -> u16 {
        SOCKET_PORT
    }

    /// A superuser of the copy.
    pub fn role(&self) -> &str {
        &self.role
    }

    /// A connection URL for that superuser. Its options beat what the copy has set for roles and
    /// databases: libraries to load, event triggers, limits.
    pub fn url(&self, database: &str) -> String {
        let options = session_options(self.major);
        socket_url(self.socket_directory(), SOCKET_PORT, &self.role, database, &options)
    }

    /// The restored data directory.
    pub fn data_directory(&self) -> PathBuf {
        self.room.data_directory()
    }

    /// The process id of the postmaster.
    pub fn pid(&self) -> Option<u32> {
        self.server.pid()
    }

    /// Whether the server still runs: it does not come back after a crash.
    pub fn is_running(&mut self) -> bool {
        matches!(self.server.ended(), Ok(None))
    }

    /// Why the server has ended, when that was for want of something on this machine: the system killed one of its
    /// processes, or took away what it needs. Then what checks found in it says nothing about the backup. `None` when it
    /// runs, or has died of its copy. Ask when a check failed: it waits two seconds for a server that is about to end.
    pub async fn unfit(&mut self) -> Option<Error> {
        let ended = tokio::time::timeout(DEATH_PATIENCE, self.server.wait()).await;
        let status = ended.ok()?.ok()?;
        if let Some(error) = killed(status) {
            return Some(error);
        }
        let Unfit { what, evidence } = unfit::died_unfit(&whole_log(&self.room.log_path())?)?;
        Some(Error::SandboxUnfit { what: what.to_owned(), evidence })
    }

    /// The last lines of the server's log.
    pub fn log_tail(&self) -> String {
        log_tail(&self.room.log_path())
    }

    /// Stops the server at once and removes everything. Returns how long that took.
    pub async fn destroy(self) -> Result<Duration> {
        let begun = Instant::now();
        let Self { mut server, room, .. } = self;
        end_at_once(&mut server).await;
        let removal = tokio::task::spawn_blocking(move || room.remove()).await;
        removal.map_err(|error| Error::io("remove", "the sandbox", io::Error::other(error)))??;
        Ok(begun.elapsed())
    }
}

/// A room whose owner had died, and that is removed now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swept {
    /// The room.
    pub path: PathBuf,
    /// Processes of its server that still ran.
    pub n_processes: usize,
}

/// Whether a data directory is the one of a room, so that its server must write nowhere else.
pub fn is_room_of(data_directory: &Path) -> bool {
    let Some(room) = data_directory.parent() else { return false };
    let text = std::fs::read_to_string(room.join(OWNER_FILE)).unwrap_or_default();
    text.lines().next() == Some(OWNER_MARK)
}

/// Removes the rooms in `root` whose owners have died, after ending what still runs in them. Rooms
/// of living processes, this one included, and everything that is no room are left alone. Blocking.
/// Safe to call from several processes.
pub fn sweep(root: &Path) -> Result<Vec<Swept>> {
    let failed = |source| Error::io("sweep", root, source);
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let _no_rooms_are_made = lock_root(root, FlockOperation::LockExclusive)?;
    let mut swept = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let Ok(mut owner) = File::open(path.join(OWNER_FILE)) else { continue };
        let mut text = String::new();
        let is_room =
            owner.read_to_string(&mut text).is_ok() && text.lines().next() == Some(OWNER_MARK);
        if !is_room || flock(&owner, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let n_processes = end_processes_in(&path);
        let sockets = text.lines().find_map(|line| line.strip_prefix("sockets "));
        if let Some(sockets) = sockets.map(Path::new).filter(|path| path.starts_with("/tmp/")) {
            // Only what a server leaves there, and who serves it; a directory that holds more stays.
            for name in [".s.PGSQL.5432", ".s.PGSQL.5432.lock", SERVICE_SOCKET] {
                let _ = std::fs::remove_file(sockets.join(name));
            }
            let _ = std::fs::remove_dir(sockets);
        }
        remove_room(&path).map_err(|source| Error::io("remove the directory", &path, source))?;
        swept.push(Swept { path, n_processes });
    }
    Ok(swept)
}

/// What a boot needs at every step.
struct Boot<'a> {
    binaries: &'a Binaries,
    room: &'a SandboxRoom,
    options: &'a SandboxOptions,
    isolation: &'a Isolation,
    account: Account,
    deadline: Instant,
}

struct Answer {
    in_recovery: bool,
    replay_end: Option<Lsn>,
    system_identifier: SystemIdentifier,
    next_transaction: u64,
}

enum AskError {
    NoRole,
    /// In the server's words.
    NoDatabase(String),
    /// Nothing was heard for [`CONNECT_TIMEOUT`].
    Silent,
    Other(String),
}

impl AskError {
    fn text(self) -> String {
        match self {
            Self::NoRole => "its superuser is refused".to_owned(),
            Self::Silent => {
                format!("it does not answer within {} s", CONNECT_TIMEOUT.as_secs())
            }
            Self::NoDatabase(text) | Self::Other(text) => text,
        }
    }
}

impl Boot<'_> {
    fn postgres(&self) -> Result<Program> {
        let config_file = self.room.path.join("run/postgresql.conf");
        let program = self.binaries.program("postgres")?;
        Ok(program.account(Some(self.account)).isolation(self.isolation.clone()).args([
            "-D".as_ref(),
            self.room.data_directory().as_os_str(),
            "-c".as_ref(),
            format!("config_file={}", config_file.display()).as_ref(),
        ]))
    }

    /// Starts the server and waits until it accepts connections.
    async fn start(&mut self) -> Result<(Running, BootPhases)> {
        let log_path = self.room.log_path();
        let log = open_log(&log_path, self.account)?;
        let mut watch = LogWatch::new(&log_path, self.options.beyond.is_some())?;
        let program = self.postgres()?.death_signal(DeathSignal::Quit);
        let mut server = program.spawn(log).await?;
        let pid_file = self.room.data_directory().join("postmaster.pid");
        loop {
            watch.look();
            let ended = server.ended();
            if let Some(status) = ended.map_err(|source| Error::io("watch", &pid_file, source))? {
                let what = format!("it ended with {}", describe(status));
                return Err(killed(status).unwrap_or_else(|| self.failed(what)));
            }
            let status = server.pid().map(|pid| postmaster_status(&pid_file, pid));
            if status == Some(PostmasterStatus::Ready) {
                watch.look();
                return Ok((server, watch.phases()));
            }
            if Instant::now() > self.deadline {
                return Err(Error::Deadline {
                    what: format!("boot the sandbox: {}", log_tail(&log_path)),
                });
            }
            tokio::select! {
                () = tokio::time::sleep(BOOT_POLL) => {}
                () = self.options.cancel.cancelled() => {
                    return Err(Error::Cancelled { what: "boot the sandbox".to_owned() });
                }
            }
        }
    }

    /// Asks the server who it is and where its replay ended.
    async fn ask(&self, role: &str) -> std::result::Result<Answer, AskError> {
        match self.ask_in(role, "postgres").await {
            // A cluster may have dropped its `postgres` database.
            Err(AskError::NoDatabase(_)) => self.ask_in(role, "template1").await,
            other => other,
        }
    }

    async fn ask_in(&self, role: &str, database: &str) -> std::result::Result<Answer, AskError> {
        let told = |error: tokio_postgres::Error| match error.code() {
            Some(state) if *state == SqlState::UNDEFINED_DATABASE => {
                AskError::NoDatabase(failure::chain(&error))
            }
            Some(state) if *state == SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
                AskError::NoRole
            }
            _ => AskError::Other(failure::chain(&error)),
        };
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.room.sockets.path).port(SOCKET_PORT).user(role).dbname(database);
        config.connect_timeout(CONNECT_TIMEOUT).options(session_options(self.binaries.major()));
        let work = async {
            let (client, connection) = config.connect(NoTls).await?;
            let query = client.query_one(
                "SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.pg_last_wal_replay_lsn()::pg_catalog.text, \
                 system_identifier::pg_catalog.text, \
                 pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text \
                 FROM pg_catalog.pg_control_system()",
                &[],
            );
            let row = tokio::select! {
                row = query => row?,
                error = connection => match error {
                    Err(error) => return Err(error),
                    Ok(()) => return Ok(None),
                },
            };
            Ok(Some((
                row.try_get(0)?,
                row.try_get::<_, Option<String>>(1)?,
                row.try_get(2)?,
                row.try_get(3)?,
            )))
        };
        let row = tokio::time::timeout(CONNECT_TIMEOUT, work)
            .await
            .map_err(|_| AskError::Silent)?
            .map_err(told)?;
        let odd = || AskError::Other("it gave an unexpected answer".to_owned());
        let (in_recovery, replay_end, identifier, next): (bool, Option<String>, String, String) =
            row.ok_or_else(odd)?;
        Ok(Answer {
            in_recovery,
            replay_end: replay_end.and_then(|text| text.parse().ok()),
            system_identifier: identifier.parse().map_err(|_| odd())?,
            next_transaction: next.parse().map_err(|_| odd())?,
        })
    }

    /// Holds what the server says of its target against what was wanted. That it opened is not enough: it does that at the end
    /// of the log, too.
    fn went(&self, beyond: &Beyond, reached: Lsn) -> Result<Went> {
        let Some(log) = whole_log(&self.room.log_path()) else {
            return Err(self.failed("it said too much to be read".to_owned()));
        };
        let said = Said::read(&log);
        let target = &beyond.settings.target;
        if *target != RecoveryTarget::Latest && !said.names(target) {
            let why =
                said.stopped.unwrap_or_else(|| "it does not say that it stopped there".to_owned());
            return Err(Error::Replay {
                what: format!("it is at {reached} and not at {target}: {why}"),
                output: log_tail(&self.room.log_path()),
                is_missed: false,
            });
        }
        Ok(Went {
            evidence: said.stopped.unwrap_or_else(|| format!("replayed all WAL, to {reached}")),
            last_commit: said.last_commit.as_deref().and_then(recovery::time),
        })
    }

    async fn stop(&self, server: &mut Running) -> Result<()> {
        let pid_file = self.room.data_directory().join("postmaster.pid");
        let failed = |source| Error::io("stop the server of", &pid_file, source);
        server.signal(Signal::INT).map_err(failed)?;
        let left = self.deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, server.wait()).await {
            Ok(status) => status.map(drop).map_err(failed),
            Err(_) => Err(Error::Deadline { what: "stop the sandbox".to_owned() }),
        }
    }

    /// The name of a superuser who may log in, asked of the stopped copy in single-user mode, which
    /// asks nobody's name.
    async fn superuser(&self) -> Result<String> {
        let query = "SELECT rolname FROM pg_catalog.pg_roles WHERE rolsuper AND rolcanlogin ORDER BY oid LIMIT 1\n";
        let program = self.binaries.program("postgres")?;
        let config_file = self.room.path.join("run/postgresql.conf");
        let output = program
            .account(Some(self.account))
            .isolation(self.isolation.clone())
            .arg("--single")
            .arg("-D")
            .arg(self.room.data_directory())
            .arg("-c")
            .arg(format!("config_file={}", config_file.display()))
            .arg("template1")
            .stdin(query)
            .run(SINGLE_USER_TIMEOUT, &self.options.cancel)
            .await
            .map_err(|error| judged("its superuser cannot be found", error))?;
        // One line a column: `1: rolname = "boss"	(typeid = 19, …)`.
        let text = output.stdout_text();
        let name =
            text.split_once("rolname = \"").and_then(|(_, rest)| rest.split_once("\"\t(typeid"));
        name.map(|(name, _)| name.to_owned())
            .ok_or_else(|| self.failed("none of its superusers may log in".to_owned()))
    }

    /// What is to be said when a server that had opened does not answer: it may have ended since.
    async fn gave_no_answer(&self, server: &mut Running, error: AskError) -> Error {
        let ended = tokio::time::timeout(DEATH_PATIENCE, server.wait()).await;
        let ended = ended.ok().and_then(std::result::Result::ok);
        match (ended, error) {
            // It is there, and had opened: it is this machine that gave it no time.
            (None, AskError::Silent) => Error::SandboxUnfit {
                what: unfit::SLOW.to_owned(),
                evidence: AskError::Silent.text(),
            },
            (ended, error) => ended.and_then(killed).unwrap_or_else(|| self.failed(error.text())),
        }
    }

    /// What happened, blamed on this machine or else on the copy by what stands in the server's log; where the copy was whole by
    /// then and replay had not ended, on the WAL behind it.
    fn failed(&self, what: String) -> Error {
        let log_path = self.room.log_path();
        let said = whole_log(&log_path);
        if self.options.beyond.is_some()
            && let Some(error) =
                said.as_deref().and_then(|log| in_replay(&what, log, || log_tail(&log_path)))
        {
            return error;
        }
        blamed(what, said.as_deref(), || log_tail(&log_path))
    }
}

/// That nobody but the system, or a person, ended a server: a server never does that to itself.
fn killed(status: ExitStatus) -> Option<Error> {
    (status.signal() == Some(Signal::KILL.as_raw())).then(|| Error::SandboxUnfit {
        what: unfit::KILLED.to_owned(),
        evidence: format!("it ended with {}", describe(status)),
    })
}

/// `said` is all that the server or program said; when it is not there from its beginning, what went wrong first may be
/// missing, and nothing is excused.
fn blamed(what: String, said: Option<&str>, output: impl FnOnce() -> String) -> Error {
    match said.and_then(unfit::unfit) {
        Some(Unfit { what, evidence }) => Error::SandboxUnfit { what: what.to_owned(), evidence },
        None => Error::Sandbox { what, output: output() },
    }
}

/// The same for a program of PostgreSQL that looked at the copy and ended badly.
fn judged(what: &str, error: Error) -> Error {
    match error {
        Error::Program { output, .. } => {
            let said = (output.lines().count() < ERROR_LINES).then_some(output.as_str());
            blamed(what.to_owned(), said, || output.clone())
        }
        other => other,
    }
}

/// Refuses what is no complete copy, or could write outside the room.
fn check_copy(
    binaries: &Binaries,
    room: &SandboxRoom,
    options: &SandboxOptions,
) -> Result<ControlFile> {
    let data = room.data_directory();
    let refuse = |path: PathBuf, what: String| Error::Shape {
        path,
        what,
        cure: "Restore the backup into the sandbox's own directories.".to_owned(),
    };
    let control = ControlFile::read(&data)?;
    if control.system_identifier != options.system_identifier {
        let what = format!(
            "the copy's system identifier is {}, not {}",
            control.system_identifier, options.system_identifier
        );
        return Err(refuse(data, what));
    }
    let version = std::fs::read_to_string(data.join("PG_VERSION")).unwrap_or_default();
    if version.trim() != binaries.major().to_string() {
        let what =
            format!("it is of PostgreSQL {}, the programs of {}", version.trim(), binaries.major());
        return Err(refuse(data, what));
    }
    let mode = std::fs::metadata(&data).map_err(|e| Error::io("read", &data, e))?.mode() & 0o7777;
    if mode & 0o700 != 0o700 || mode & 0o027 != 0 {
        return Err(refuse(data, format!("a server refuses a directory of mode {mode:04o}")));
    }
    refuse_other_versions(room, binaries.major())?;
    // Without the label the server would start from the wrong checkpoint and open, silently
    // damaged.
    if !data.join("backup_label").is_file() {
        return Err(refuse(data, "backup_label is missing".to_owned()));
    }
    if let Ok(map) = std::fs::read_to_string(data.join("tablespace_map")) {
        for line in map.lines().filter(|line| !line.is_empty()) {
            let location = line.split_once(' ').map_or(line, |(_, location)| location);
            if !is_inside(Path::new(location), &room.path) {
                return Err(refuse(
                    data.join("tablespace_map"),
                    format!("it maps a tablespace to {location}, outside the sandbox"),
                ));
            }
        }
    }
    refuse_links(&data, room).map_err(|(path, problem)| match problem {
        Ok(target) => {
            let what = format!("it is a link to {}, outside the sandbox", target.display());
            refuse(path, what)
        }
        Err(source) => Error::io("read", path, source),
    })?;
    Ok(control)
}

/// Refuses a copy in which a database says that it is of another version: a server would blame its programs for that.
fn refuse_other_versions(room: &SandboxRoom, major: u32) -> Result<()> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::io("read", path, source)
    };
    let directories_in = |path: &Path| -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(path).map_err(failed(path))? {
            let entry = entry.map_err(failed(path))?;
            if entry.file_type().map_err(failed(path))?.is_dir() {
                found.push(entry.path());
            }
        }
        Ok(found)
    };
    // In a tablespace the databases are one level further down: OID, version of the format, database.
    let mut parents = vec![room.data_directory().join("base")];
    for space in directories_in(&room.tablespaces())? {
        parents.extend(directories_in(&space)?);
    }
    for parent in parents {
        for database in directories_in(&parent)? {
            let path = database.join("PG_VERSION");
            // Where it is missing or empty, the database was just being made, and replay completes it.
            let Ok(text) = std::fs::read_to_string(&path) else { continue };
            let version = text.trim();
            if version.parse::<u32>().is_ok_and(|version| version != major) {
                return Err(Error::Sandbox {
                    what: "a database of the copy is of another version".to_owned(),
                    output: format!("{} says {version}, not {major}", path.display()),
                });
            }
        }
    }
    Ok(())
}

/// Finds a link below `directory` that leads out of the room.
fn refuse_links(
    directory: &Path,
    room: &SandboxRoom,
) -> std::result::Result<(), (PathBuf, io::Result<PathBuf>)> {
    let failed = |source| (directory.to_owned(), Err(source));
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() {
            refuse_links(&entry.path(), room)?;
        } else if kind.is_symlink() {
            let target = std::fs::read_link(entry.path()).map_err(failed)?;
            if !is_inside(&target, &room.path) {
                return Err((entry.path(), Ok(target)));
            }
        }
    }
    Ok(())
}

fn is_inside(path: &Path, room: &Path) -> bool {
    let plain =
        path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    path.is_absolute() && plain && path.starts_with(room)
}

/// Looks through the WAL of the backup for tablespaces created in it: replay makes them at their
/// original place, and writes there.
async fn refuse_tablespaces_created_meanwhile(
    binaries: &Binaries,
    room: &SandboxRoom,
    options: &SandboxOptions,
    control: &ControlFile,
) -> Result<()> {
    let label = backup_label(room)?;
    let start = label.lines().find_map(|line| {
        line.strip_prefix("START WAL LOCATION: ")?.split_whitespace().next()?.parse().ok()
    });
    let start: Lsn = start.ok_or_else(|| Error::Content {
        name: "backup_label".to_owned(),
        what: "it has no line START WAL LOCATION".to_owned(),
    })?;
    let wal = room.data_directory().join("pg_wal");
    for segment in
        Segment::range(start, options.stop_lsn, options.timeline, control.wal_segment_size)
    {
        let name = segment.file_name(control.wal_segment_size);
        if !wal.join(&name).is_file() {
            return Err(Error::Sandbox {
                what: "WAL of the backup is missing".to_owned(),
                output: format!("{name} is not in pg_wal"),
            });
        }
    }
    let output = binaries
        .program("pg_waldump")?
        .account(Some(room.account))
        .arg("-p")
        .arg(&wal)
        .args(["-t", &options.timeline.to_string(), "-s", &start.to_string()])
        .args(["-e", &options.stop_lsn.to_string(), "-r", "Tablespace"])
        .run(options.timeout, &options.cancel)
        .await
        .map_err(|error| judged("the WAL of the backup cannot be read", error))?;
    for line in output.stdout_text().lines() {
        // `rmgr: Tablespace … desc: CREATE 16390 "/place"`; an empty place is one inside the data
        // directory.
        let Some((_, created)) = line.split_once("desc: CREATE ") else { continue };
        let place =
            created.split_once('"').map_or(created, |(_, place)| place.trim_end_matches('"'));
        if !place.is_empty() {
            return Err(Error::Shape {
                path: place.into(),
                what: "this tablespace was created while the backup ran; replay would write into that very directory"
                    .to_owned(),
                cure: "Take another backup; its files hold the tablespace.".to_owned(),
            });
        }
    }
    Ok(())
}

/// The settings of the sandbox, all of them.
fn settings_for(
    binaries: &Binaries,
    room: &SandboxRoom,
    options: &SandboxOptions,
    control: &ControlFile,
) -> Result<Vec<(String, String)>> {
    let major = binaries.major();
    let mut settings = common_settings(room, major, options.shared_buffers_mb);
    let mut set = |name: &str, value: String| settings.push((name.to_owned(), value));
    let source = |name: &str| {
        options
            .settings
            .iter()
            .find(|setting| setting.name == name)
            .map(|setting| setting.value.as_str())
    };
    for (name, least, _) in MINIMUMS.iter().filter(|(_, _, since)| major >= *since) {
        let of_control = match *name {
            "max_connections" => control.max_connections,
            "max_prepared_transactions" => control.max_prepared_transactions,
            "max_locks_per_transaction" => control.max_locks_per_transaction,
            _ => 0,
        };
        let of_source = source(name).and_then(|value| value.parse().ok()).unwrap_or(0);
        set(name, (*least).max(of_control).max(of_source).to_string());
    }
    let wanted = source("shared_preload_libraries").unwrap_or_default();
    let preloaded: Vec<&str> = wanted
        .split(',')
        .map(|name| name.trim().trim_matches('"'))
        .filter(|name| options.preload_libraries.iter().any(|allowed| allowed == name))
        .collect();
    set("shared_preload_libraries", preloaded.join(","));
    if backup_label(room)?.lines().any(|line| line == "BACKUP FROM: standby") {
        set("recovery_target", String::new());
    }
    // Once consistent, a server takes a tablespace that is no link for one whose files are missing, unless told.
    if major >= 15 && has_tablespaces_in_place(room)? {
        set("allow_in_place_tablespaces", "on".to_owned());
    }
    // Counted in segments, and refused below two: the defaults are for segments of 16 MiB.
    let segment_mb = control.wal_segment_size >> 20;
    set("min_wal_size", format!("{}MB", WAL_MIN_MB.max(5 * segment_mb)));
    set("max_wal_size", format!("{}MB", WAL_MAX_MB.max(5 * segment_mb)));
    if let Some(beyond) = &options.beyond {
        // Of two targets a server takes neither.
        set("recovery_target", String::new());
        for (name, value) in beyond.settings.target_lines() {
            set(name, value);
        }
        set("timezone", "UTC".to_owned());
    }
    Ok(settings)
}

/// What makes any server in a room inert, and where its things are.
fn common_settings(
    room: &SandboxRoom,
    major: u32,
    shared_buffers_mb: u32,
) -> Vec<(String, String)> {
    let run = room.path.join("run");
    let inert = INERT.iter().filter(|(_, _, since)| major >= *since);
    let inert = inert.map(|(name, value, _)| (*name, (*value).to_owned()));
    let places = [
        ("shared_buffers", format!("{}MB", shared_buffers_mb.max(1))),
        ("unix_socket_directories", room.sockets.path.display().to_string()),
        ("port", SOCKET_PORT.to_string()),
        ("data_directory", room.data_directory().display().to_string()),
        ("hba_file", run.join("pg_hba.conf").display().to_string()),
        ("ident_file", run.join("pg_ident.conf").display().to_string()),
    ];
    inert.chain(places).map(|(name, value)| (name.to_owned(), value)).collect()
}

fn has_tablespaces_in_place(room: &SandboxRoom) -> Result<bool> {
    let spaces = room.data_directory().join("pg_tblspc");
    let failed = |source| Error::io("read", &spaces, source);
    for entry in std::fs::read_dir(&spaces).map_err(failed)? {
        if entry.and_then(|entry| entry.file_type()).map_err(failed)?.is_dir() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn backup_label(room: &SandboxRoom) -> Result<String> {
    let path = room.data_directory().join("backup_label");
    std::fs::read_to_string(&path).map_err(|source| Error::io("read", &path, source))
}

/// Options of every session: they beat `ALTER ROLE … SET` and `ALTER DATABASE … SET`, of which the
/// copy has brought its own.
fn session_options(major: u32) -> String {
    let mut options =
        "-c session_preload_libraries= -c local_preload_libraries= -c statement_timeout=0 \
                       -c lock_timeout=0 -c idle_in_transaction_session_timeout=0 -c jit=off \
                       -c default_transaction_read_only=off -c search_path=pg_catalog"
            .to_owned();
    // Event triggers: of those from before 17, all that do not insist on replicas too.
    options.push_str(if major >= 17 {
        " -c event_triggers=off -c transaction_timeout=0"
    } else {
        " -c session_replication_role=replica"
    });
    options
}

/// Takes from the copy everything it would act on, and gives it settings of our own.
fn disarm(room: &SandboxRoom, major: u32, settings: &[(String, String)]) -> Result<()> {
    let account = room.account;
    let data = room.data_directory();
    make_private_directory(&data, account)?;
    for name in ["standby.signal", "postmaster.pid", "postmaster.opts", "recovery.done"] {
        remove_if_there(&data.join(name))?;
    }
    // Replication slots hold WAL back and belong to the source's clients.
    let slots = data.join("pg_replslot");
    if slots.is_dir() {
        std::fs::remove_dir_all(&slots).map_err(|source| Error::io("empty", &slots, source))?;
    }
    make_private_directory(&slots, account)?;
    write_private(&data.join("postgresql.auto.conf"), "", account)?;
    write_private(&data.join("recovery.signal"), "", account)?;
    write_settings(room, settings)?;
    tracing::debug!(sandbox.path = %room.path.display(), postgres.major = major, "Disarmed the copy");
    Ok(())
}

/// Gives the server settings of our own, and lets in whoever reaches its private socket.
fn write_settings(room: &SandboxRoom, settings: &[(String, String)]) -> Result<()> {
    let (run, account) = (room.path.join("run"), room.account);
    write_private(&run.join("postgresql.conf"), &settings_text(settings), account)?;
    write_private(&run.join("pg_hba.conf"), "local all all trust\n", account)?;
    write_private(&run.join("pg_ident.conf"), "", account)
}

/// Gives everything the server needs in its room to its account.
fn hand_over(room: &SandboxRoom) -> Result<()> {
    for directory in [room.path.clone(), room.path.join("run"), room.sockets.path.clone()] {
        make_private_directory(&directory, room.account)?;
    }
    take_over(&room.data_directory(), room.account)?;
    take_over(&room.tablespaces(), room.account)
}

/// Gives a tree to the account the server runs as, where that is not us. Links themselves, not
/// their targets.
fn take_over(directory: &Path, account: Account) -> Result<()> {
    if account == Account::current() {
        return Ok(());
    }
    let failed = |source| Error::io("change the owner of", directory, source);
    give_to(directory, account).map_err(failed)?;
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            take_over(&entry.path(), account)?;
        } else {
            give_to(&entry.path(), account).map_err(failed)?;
        }
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", path, error))
        }
        _ => Ok(()),
    }
}

/// Reads what is new in a server's log and notes when the phases of recovery began.
struct LogWatch {
    log: File,
    begun: Instant,
    redo: Option<Instant>,
    /// With what replay ends.
    end_words: &'static str,
    replayed: Option<Instant>,
    /// The end of the last look, in case a sentence was cut there.
    carry: String,
    text: String,
}

impl LogWatch {
    fn new(path: &Path, goes_beyond: bool) -> Result<Self> {
        let failed = |source| Error::io("read", path, source);
        let end_words = if goes_beyond { "redo done at" } else { CONSISTENT };
        let mut log = File::open(path).map_err(failed)?;
        log.seek(SeekFrom::End(0)).map_err(failed)?;
        let begun = Instant::now();
        Ok(Self {
            log,
            begun,
            redo: None,
            end_words,
            replayed: None,
            carry: String::new(),
            text: String::new(),
        })
    }

    fn look(&mut self) {
        let mut bytes = Vec::new();
        // A log that cannot be read costs the figures of two phases, not the proof.
        if self.log.read_to_end(&mut bytes).is_err() {
            return;
        }
        self.text = std::mem::take(&mut self.carry) + &String::from_utf8_lossy(&bytes);
        let now = Instant::now();
        if self.redo.is_none() && self.text.contains("redo starts at") {
            self.redo = Some(now);
        }
        if self.replayed.is_none() && self.text.contains(self.end_words) {
            self.replayed = Some(now);
        }
        let cut = self.text.rfind('\n').map_or(0, |end| end + 1);
        self.carry = self.text.split_off(cut);
    }

    fn phases(&self) -> BootPhases {
        let redo = self.redo.unwrap_or(self.begun);
        let replayed = self.replayed.unwrap_or(redo).max(redo);
        BootPhases {
            start: redo.duration_since(self.begun),
            replay: replayed.duration_since(redo),
            open: replayed.elapsed(),
        }
    }
}

/// Where replay ended, from the log of a server that has stopped again: the new timeline begins
/// there.
fn replay_end_of(room: &SandboxRoom) -> Result<Lsn> {
    let control = ControlFile::read(&room.data_directory())?;
    let history =
        crate::wal::read_history(&room.data_directory().join("pg_wal"), control.timeline)?;
    let last = history.and_then(|history| history.entries.last().map(|entry| entry.switched_at));
    last.ok_or_else(|| Error::Sandbox {
        what: "it left no history of its promotion".to_owned(),
        output: log_tail(&room.log_path()),
    })
}

/// Ends a server without a checkpoint; what does not end by itself is killed.
async fn end_at_once(server: &mut Running) {
    // It may have ended before; then there is nobody to signal and nothing to wait for.
    let _ = server.signal(Signal::QUIT);
    if tokio::time::timeout(DESTROY_PATIENCE, server.wait()).await.is_err() {
        server.kill();
    }
}

/// Ends the processes that work inside a room: a server's processes all have its data directory as
/// working directory.
fn end_processes_in(room: &Path) -> usize {
    let Ok(room) = room.canonicalize() else { return 0 };
    let data = room.join("data");
    let found = processes_in(&room);
    let postmaster = std::fs::read_to_string(data.join("postmaster.pid")).ok();
    let postmaster = postmaster.and_then(|text| text.lines().next()?.trim().parse::<u32>().ok());
    let postmaster = found.iter().find(|process| Some(process.pid) == postmaster);
    if let Some(pid) = postmaster.and_then(|it| Pid::from_raw(i32::try_from(it.pid).ok()?)) {
        // An orderly end frees shared memory; its children end with it.
        let _ = kill_process(pid, Signal::QUIT);
        wait_blocking(DESTROY_PATIENCE, || found.iter().all(|process| !process.is_alive()));
    }
    let left = processes_in(&room);
    left.iter().for_each(ProcessIdentity::kill);
    wait_blocking(DESTROY_PATIENCE, || left.iter().all(|process| !process.is_alive()));
    found.len()
}

fn processes_in(directory: &Path) -> Vec<ProcessIdentity> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let works_in = std::fs::read_link(entry.path().join("cwd")).ok()?;
            works_in.starts_with(directory).then(|| ProcessIdentity::of(pid)).flatten()
        })
        .collect()
}

/// Removes a room, and last of all the file that makes it one: a process that dies on the way leaves
/// what the next sweep recognises.
fn remove_room(path: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_name() == OWNER_FILE {
            continue;
        }
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    match std::fs::remove_file(path.join(OWNER_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => std::fs::remove_dir(path),
    }
}

/// Locks a directory of rooms for as long as the returned file lives.
fn lock_root(root: &Path, operation: FlockOperation) -> Result<File> {
    let path = root.join(".lock");
    let lock = || {
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        flock(&file, operation)?;
        Ok(file)
    };
    lock().map_err(|source| Error::io("lock", &path, source))
}
