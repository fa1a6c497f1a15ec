//! Running a restored server until it is where it shall be, and seeing that it is there.
//!
//! First it runs alone: its socket is private, nothing else reaches it, and at the target it waits. Only when its own words, the
//! position it replayed and the last commit it saw agree with what was wanted does it go on, and is started again as a person
//! would start it. A server that starts and answers, but stopped somewhere else, is an error here and is never opened.
//!
//! Deliberately not here: restoring its files and the settings it recovers by.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use proto::{Lsn, RecoveryTarget, SystemIdentifier, TargetAction, Timeline, failure};
use rustix::process::Signal;
use tokio_postgres::NoTls;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use super::said::{self, Said};
use crate::Error;
use crate::binaries::Binaries;
use crate::control_file::ControlFile;
use crate::instance::{
    PostmasterStatus, SOCKET_PORT, log_tail, make_private_directory, open_log, postmaster_status,
    whole_log, write_private,
};
use crate::process::{Account, DeathSignal, Program, Result, Running, describe};
use crate::short_place::ShortPlace;
use crate::unfit::{self, Unfit};
use crate::wal::read_history;

/// What the server says while it runs alone, in its data directory.
const RECOVERY_LOG: &str = "pgmuster-recovery.log";
/// What it says as long as its own settings send it nowhere else.
const SERVER_LOG: &str = "pgmuster-server.log";
/// Between two looks at a server that recovers.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// One question over a private socket.
const ASK_TIMEOUT: Duration = Duration::from_secs(30);
/// A shutdown writes a checkpoint.
const STOP_TIMEOUT: Duration = Duration::from_mins(10);
/// How long a server may take to open by its own settings; one that pauses replays again from its last restartpoint.
const OPEN_TIMEOUT: Duration = Duration::from_hours(1);

/// Where a server must arrive.
#[derive(Debug, Clone)]
pub struct Expected {
    /// The target in its settings.
    pub target: RecoveryTarget,
    /// It stops just before it.
    pub before: bool,
    /// The timeline it follows.
    pub timeline: Timeline,
    /// What it must have replayed at least.
    pub at_least: Lsn,
    /// What it does at the target.
    pub action: TargetAction,
    /// It goes on following.
    pub standby: bool,
    /// Whose copy it is.
    pub system_identifier: SystemIdentifier,
}

/// Where a server arrived, by its own account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// What it does now.
    pub state: String,
    /// It was to run on and does not, because it has no settings of its own.
    pub stays_down: bool,
    /// The end of what it replayed.
    pub lsn: Lsn,
    /// The last commit that it replayed.
    pub last_commit: Option<Timestamp>,
    /// The timeline it is on.
    pub timeline: Timeline,
    /// Why it stopped there, in its own words.
    pub evidence: String,
    /// From its start until it was there.
    pub duration: Duration,
}

/// A restored data directory with recovery settings, and the programs that run it.
#[derive(Debug)]
pub struct RecoveryServer<'a> {
    /// The programs of its major version.
    pub binaries: &'a Binaries,
    /// The data directory.
    pub directory: &'a Path,
    /// Variables that the server gets for its `restore_command`.
    pub environment: &'a [(String, String)],
    /// The same, and only as long as it runs alone.
    pub environment_alone: &'a [(String, String)],
    /// Ends it early.
    pub cancel: &'a CancellationToken,
}

/// What the server answered.
struct Answer {
    in_recovery: bool,
    is_paused: bool,
    replayed: Lsn,
    last_commit: Option<Timestamp>,
    system_identifier: SystemIdentifier,
}

/// A server that runs alone.
struct Alone {
    running: Running,
    /// Its socket and its own rules for who may enter.
    private: ShortPlace,
    role: String,
    started: Instant,
}

impl RecoveryServer<'_> {
    /// Takes the server to where it must arrive, sees that it is there, and leaves it as its settings say: open, paused, shut
    /// down or following. It then runs on without this process.
    ///
    /// On every error no server runs. [`Error::RecoveryMissed`] says that it arrived somewhere else, or could not arrive.
    pub async fn recover(&self, expected: &Expected) -> Result<Recovered> {
        let account = Account::current();
        if account.is_root() {
            return Err(self.missed(
                "PostgreSQL does not run as root: start it as the user who owns the directory"
                    .to_owned(),
            ));
        }
        let mut alone = self.start_alone(expected, account).await?;
        let arrived = match self.arrive(&mut alone, expected).await {
            Ok(arrived) => arrived,
            Err(error) => {
                self.stop(&mut alone.running, Signal::QUIT).await?;
                return Err(error);
            }
        };
        let duration = alone.started.elapsed();
        self.stop(&mut alone.running, Signal::INT).await?;
        drop(alone);
        let opens = expected.standby || expected.action != TargetAction::Shutdown;
        let stays_down = opens && !self.has_settings();
        let mut state = match (expected.standby, expected.action) {
            _ if stays_down => {
                "stopped where it had to arrive, because it has no postgresql.conf to run by"
                    .to_owned()
            }
            (true, _) => "following the archive as a standby".to_owned(),
            (false, TargetAction::Promote) => format!("open on timeline {}", arrived.timeline),
            (false, TargetAction::Pause) => "paused at the target".to_owned(),
            (false, TargetAction::Shutdown) => "shut down at the target".to_owned(),
        };
        if opens && !stays_down {
            self.open().await?;
            let pid_file = std::fs::read_to_string(self.directory.join("postmaster.pid"));
            state.extend(pid_file.ok().as_deref().and_then(listens));
        }
        Ok(Recovered { state, stays_down, duration, ..arrived })
    }

    fn has_settings(&self) -> bool {
        self.directory.join("postgresql.conf").is_file()
    }

    fn program(&self, name: &str) -> Result<Program> {
        let program = self.binaries.program(name)?;
        Ok(self.environment.iter().fold(program, |program, (name, value)| program.env(name, value)))
    }

    fn log_path(&self) -> PathBuf {
        self.directory.join(RECOVERY_LOG)
    }

    async fn start_alone(&self, expected: &Expected, account: Account) -> Result<Alone> {
        let private = ShortPlace::make()
            .map_err(|source| Error::io("create a directory in", "/tmp", source))?;
        make_private_directory(private.path(), account)?;
        write_private(&private.path().join("hba"), "local all all trust\n", account)?;
        write_private(&private.path().join("ident"), "", account)?;
        let place = |name: &str| private.path().join(name).display().to_string();
        let mut settings = vec![
            ("hba_file", place("hba")),
            ("ident_file", place("ident")),
            ("unix_socket_directories", private.path().display().to_string()),
        ];
        let fixed = [
            ("listen_addresses", ""),
            ("unix_socket_permissions", "0700"),
            ("external_pid_file", ""),
            ("ssl", "off"),
            ("hot_standby", "on"),
            // What it would archive waits until it runs by its own settings.
            ("archive_command", "false"),
            ("max_logical_replication_workers", "0"),
            ("restart_after_crash", "off"),
            // What it says is read.
            ("logging_collector", "off"),
            ("log_destination", "stderr"),
            ("log_min_messages", "warning"),
            ("log_line_prefix", "%m [%p] "),
            ("lc_messages", "C"),
            ("timezone", "UTC"),
        ];
        settings.extend(fixed.map(|(name, value)| (name, value.to_owned())));
        settings.push(("port", SOCKET_PORT.to_string()));
        if self.binaries.major() >= 15 {
            settings.push(("archive_library", String::new()));
        }
        if !expected.standby && expected.target != RecoveryTarget::Latest {
            settings.push(("recovery_target_action", "pause".to_owned()));
        }
        if !self.has_settings() {
            write_private(&private.path().join("conf"), "", account)?;
            settings.push(("config_file", place("conf")));
            // A server that answers while it recovers needs at least what its primary had.
            let control = ControlFile::read(self.directory)?;
            let minimums = [
                ("max_connections", control.max_connections),
                ("max_worker_processes", control.max_worker_processes),
                ("max_wal_senders", control.max_wal_senders),
                ("max_prepared_transactions", control.max_prepared_transactions),
                ("max_locks_per_transaction", control.max_locks_per_transaction),
            ];
            settings.extend(minimums.map(|(name, value)| (name, value.to_string())));
        }
        let mut program = self.program("postgres")?.arg("-D").arg(self.directory);
        for (name, value) in self.environment_alone {
            program = program.env(name, value);
        }
        for (name, value) in settings {
            program = program.arg("-c").arg(format!("{name}={value}"));
        }
        let log = self.log_path();
        // What an earlier recovery said is none of this one's evidence.
        if let Err(source) = std::fs::remove_file(&log)
            && source.kind() != std::io::ErrorKind::NotFound
        {
            return Err(Error::io("remove", &log, source));
        }
        let log = open_log(&log, account)?;
        let program: Program = program.directory(self.directory).death_signal(DeathSignal::Quit);
        let running = program.spawn(log).await?;
        Ok(Alone { running, private, role: "postgres".to_owned(), started: Instant::now() })
    }

    /// Waits until the server is where it must be, and judges it.
    async fn arrive(&self, alone: &mut Alone, expected: &Expected) -> Result<Recovered> {
        let pid_file = self.directory.join("postmaster.pid");
        let mut resumed = None;
        loop {
            let ended = alone.running.ended();
            if let Some(status) = ended.map_err(|source| Error::io("watch", &pid_file, source))? {
                return Err(self.ended(expected, &describe(status)));
            }
            let status = alone.running.pid().map(|pid| postmaster_status(&pid_file, pid));
            if matches!(status, Some(PostmasterStatus::Standby | PostmasterStatus::Ready))
                && let Some(answer) = self.ask(alone).await?
            {
                if answer.system_identifier != expected.system_identifier {
                    return Err(self.missed("it is a server of another cluster".to_owned()));
                }
                match (answer.in_recovery, expected.standby, &resumed) {
                    (true, true, _) if answer.replayed >= expected.at_least => {
                        return self.judge(expected, &answer);
                    }
                    (true, false, None) if answer.is_paused => {
                        let arrived = self.judge(expected, &answer)?;
                        if expected.action != TargetAction::Promote {
                            return Ok(arrived);
                        }
                        self.tell(alone, "SELECT pg_catalog.pg_wal_replay_resume()").await?;
                        resumed = Some(arrived);
                    }
                    (false, true, _) => {
                        return Err(
                            self.missed("it opened instead of following the archive".to_owned())
                        );
                    }
                    // It was paused and judged at the target, or has none, or could not pause.
                    (false, false, _) => {
                        let arrived = match resumed.take() {
                            Some(arrived) => arrived,
                            None => self.judge(expected, &answer)?,
                        };
                        return Ok(Recovered { timeline: self.new_timeline(expected)?, ..arrived });
                    }
                    _ => {}
                }
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_AGAIN) => {}
                () = self.cancel.cancelled() => {
                    return Err(Error::Cancelled { what: "recover".to_owned() });
                }
            }
        }
    }

    /// Holds what the server says against what was wanted.
    fn judge(&self, expected: &Expected, answer: &Answer) -> Result<Recovered> {
        let said = self.said();
        let reached = said.redo_done.unwrap_or(Lsn::INVALID).max(answer.replayed);
        let last_commit =
            answer.last_commit.or_else(|| said.last_commit.as_deref().and_then(said::time));
        let stops = !expected.standby && expected.target != RecoveryTarget::Latest;
        if stops && !said.names(&expected.target) {
            let why =
                said.stopped.unwrap_or_else(|| "it does not say that it stopped there".to_owned());
            return Err(
                self.missed(format!("it is at {reached} and not at {}: {why}", expected.target))
            );
        }
        if reached < expected.at_least {
            return Err(self.missed(format!(
                "it replayed to {reached}, and WAL leads to {}",
                expected.at_least
            )));
        }
        if let (RecoveryTarget::Time(time), Some(commit)) = (&expected.target, last_commit)
            && (commit > *time || (expected.before && commit == *time))
        {
            return Err(
                self.missed(format!("it replayed a commit of {commit}, which is after {time}"))
            );
        }
        let evidence = said.stopped.unwrap_or_else(|| format!("replayed all WAL, to {reached}"));
        Ok(Recovered {
            state: String::new(),
            stays_down: false,
            lsn: reached,
            last_commit,
            timeline: expected.timeline,
            evidence,
            duration: Duration::ZERO,
        })
    }

    /// The timeline that the server opened on; it must descend from the one it was to follow.
    fn new_timeline(&self, expected: &Expected) -> Result<Timeline> {
        let timeline = self.said().new_timeline;
        let timeline =
            timeline.ok_or_else(|| self.missed("it opened without a new timeline".to_owned()))?;
        let history = read_history(&self.directory.join("pg_wal"), timeline)?;
        let parent = history.and_then(|history| history.entries.last().map(|entry| entry.timeline));
        if parent == Some(expected.timeline) {
            return Ok(timeline);
        }
        let parent = parent.map_or("none".to_owned(), |parent| parent.to_string());
        Err(self.missed(format!(
            "it opened on timeline {timeline}, a child of {parent} and not of {}",
            expected.timeline
        )))
    }

    fn said(&self) -> Said {
        whole_log(&self.log_path()).map(|log| Said::read(&log)).unwrap_or_default()
    }

    /// `None` while the server lets nobody in.
    async fn ask(&self, alone: &mut Alone) -> Result<Option<Answer>> {
        let sql = "\
SELECT pg_catalog.pg_is_in_recovery(),
       CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_get_wal_replay_pause_state() = 'paused' ELSE false END,
       pg_catalog.pg_last_wal_replay_lsn()::pg_catalog.text,
       (extract(epoch FROM pg_catalog.pg_last_xact_replay_timestamp()) * 1000000)::pg_catalog.int8,
       (SELECT system_identifier::pg_catalog.text FROM pg_catalog.pg_control_system())";
        let row = match self.query(alone, sql).await {
            Ok(Some(row)) => row,
            // It lets nobody in yet, or it may be ending, which the next look tells.
            Ok(None) | Err((_, None)) => return Ok(None),
            Err((_, Some(state))) if state == SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
                // initdb names the superuser after the account that ran it, unless it is told otherwise.
                let me = Program::new("id").arg("-un").run(ASK_TIMEOUT, self.cancel).await?;
                let me = me.stdout_text().trim().to_owned();
                if alone.role == me {
                    return Err(self.missed(format!(
                        "it cannot be asked: it has neither a role postgres nor a role {me}"
                    )));
                }
                alone.role = me;
                return Ok(None);
            }
            Err((_, Some(state))) if state == SqlState::CANNOT_CONNECT_NOW => return Ok(None),
            Err((text, _)) => return Err(self.missed(format!("it cannot be asked: {text}"))),
        };
        let odd = |_| self.missed("it gave an unexpected answer".to_owned());
        let replayed: Option<String> = row.try_get(2).map_err(odd)?;
        let commit: Option<i64> = row.try_get(3).map_err(odd)?;
        let identifier: String = row.try_get(4).map_err(odd)?;
        Ok(Some(Answer {
            in_recovery: row.try_get(0).map_err(odd)?,
            is_paused: row.try_get(1).map_err(odd)?,
            replayed: replayed.and_then(|text| text.parse().ok()).unwrap_or(Lsn::INVALID),
            last_commit: commit.and_then(|us| Timestamp::from_microsecond(us).ok()),
            system_identifier: identifier
                .parse()
                .map_err(|_| self.missed("it gave an unexpected answer".to_owned()))?,
        }))
    }

    async fn tell(&self, alone: &Alone, sql: &str) -> Result<()> {
        let told = self.query(alone, sql).await;
        told.map(drop)
            .map_err(|(text, _)| self.missed(format!("it cannot be told to go on: {text}")))
    }

    async fn query(
        &self,
        alone: &Alone,
        sql: &str,
    ) -> std::result::Result<Option<tokio_postgres::Row>, (String, Option<SqlState>)> {
        let told = |error: tokio_postgres::Error| (failure::chain(&error), error.code().cloned());
        let mut config = tokio_postgres::Config::new();
        // Every cluster has this database, even one that has dropped its `postgres`.
        config
            .host_path(alone.private.path())
            .port(SOCKET_PORT)
            .user(&alone.role)
            .dbname("template1");
        config.connect_timeout(ASK_TIMEOUT);
        config.options(
            "-c session_preload_libraries= -c local_preload_libraries= -c statement_timeout=0",
        );
        let work = async {
            let (client, connection) = config.connect(NoTls).await?;
            let query = client.query_one(sql, &[]);
            tokio::select! {
                row = query => row.map(Some),
                ended = connection => ended.map(|()| None),
            }
        };
        let answered = tokio::time::timeout(ASK_TIMEOUT, work).await;
        answered.map_err(|_| ("it does not answer".to_owned(), None))?.map_err(told)
    }

    async fn stop(&self, running: &mut Running, signal: Signal) -> Result<()> {
        let failed = |source| Error::io("stop the server of", self.directory, source);
        if running.ended().map_err(failed)?.is_some() {
            return Ok(());
        }
        running.signal(signal).map_err(failed)?;
        if let Ok(status) = tokio::time::timeout(STOP_TIMEOUT, running.wait()).await {
            return status.map(drop).map_err(failed);
        }
        running.kill();
        Err(Error::Deadline { what: "stop the restored server".to_owned() })
    }

    /// Starts it by its own settings, as a person would. It runs on.
    async fn open(&self) -> Result<()> {
        let program = self.program("pg_ctl")?.args(["start", "-s", "-w", "-t"]);
        let program = program.arg(OPEN_TIMEOUT.as_secs().to_string()).arg("-D").arg(self.directory);
        let program = program.arg("-l").arg(self.directory.join(SERVER_LOG));
        program.run(OPEN_TIMEOUT, self.cancel).await.map(drop).map_err(|error| match error {
            Error::Program { .. } => {
                let log = whole_log(&self.directory.join(SERVER_LOG)).unwrap_or_default();
                let directory = self.directory.display().to_string();
                Error::NotOpened {
                    found: fatal_line(&log).unwrap_or("its log says why").to_owned(),
                    cure: format!(
                        "The directory is ready and need not be restored again. Beside the server that it is a copy of, start it elsewhere: \
                         pg_ctl -D {directory} -o '-c port=5433 -c unix_socket_directories=/tmp' start. Its log is {SERVER_LOG} there."
                    ),
                    directory,
                }
            }
            other => other,
        })
    }

    /// What to make of a server that ended by itself.
    fn ended(&self, expected: &Expected, how: &str) -> Error {
        if let Some(Unfit { what, evidence }) =
            whole_log(&self.log_path()).as_deref().and_then(unfit::unfit)
        {
            return Error::SandboxUnfit { what: what.to_owned(), evidence };
        }
        let why = self.said().fatal.unwrap_or_else(|| format!("it ended with {how}"));
        self.missed(format!("it did not come to {}: {why}", expected.target))
    }

    fn missed(&self, what: String) -> Error {
        Error::RecoveryMissed { what, output: log_tail(&self.log_path()) }
    }
}

/// Why a server ended, as the last such line of its log has it.
fn fatal_line(log: &str) -> Option<&str> {
    log.lines().rev().find_map(|line| Some(line.split_once("FATAL:")?.1.trim()))
}

/// Where a server can be reached, as its `postmaster.pid` says, to be put behind its state.
fn listens(pid_file: &str) -> Option<String> {
    // Lines: pid, data directory, start time, port, socket directory, address.
    let mut lines = pid_file.lines().map(str::trim).skip(3);
    let port = lines.next()?;
    let places: Vec<&str> = lines.take(2).filter(|place| !place.is_empty()).collect();
    (!places.is_empty()).then(|| format!(", listens at {} port {port}", places.join(" and ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_says_where_it_can_be_reached() {
        let file = |places: &str| format!("7\n/data\n1700000000\n5433\n{places}\n 1 2\nready  \n");
        let both = listens(&file("/run/postgresql\nlocalhost"));
        assert_eq!(both.as_deref(), Some(", listens at /run/postgresql and localhost port 5433"));
        let socket = listens(&file("/run/postgresql\n"));
        assert_eq!(socket.as_deref(), Some(", listens at /run/postgresql port 5433"));
        assert_eq!(listens(&file("\n")), None);
        assert_eq!(listens("7\n/data\n"), None);
    }
}
