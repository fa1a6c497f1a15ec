//! A server in backup mode: begin, keep, end. One session carries the cluster's lock, a temporary replication slot that
//! holds WAL back, and backup mode itself, so that the end of the session, however it comes, leaves nothing behind.
//!
//! Any error inside that session drops its temporary slot, so everything that may fail is asked on a second session.
//! Reads no files and copies nothing.
//!
//! A standby is a source like a primary, with three differences: the checkpoint a backup starts from is one that the
//! primary wrote, it ends at what the standby has replayed, and a promotion or another timeline in between ends it.
//!
//! **Which WAL belongs to a backup.** All segments from the one that holds [`Started::start_lsn`] to the one that holds
//! the byte before [`Stopped::stop_lsn`], all on [`Started::timeline`]. On a primary the call that ends backup mode
//! also switches to a new segment and flushes: when [`BackupSession::stop`] has returned, the last segment is complete
//! in `pg_wal` and will not change any more; what follows the stop position in it is of no interest. A standby cannot
//! switch: there the last segment is complete up to the stop position, and what follows may be of the file's former life.
//! The slot keeps all of them in `pg_wal` until [`BackupSession::advance`] or [`BackupSession::finish`].

use std::time::Duration;

use proto::backup::Tablespace;
use proto::{JobId, Lsn, SystemIdentifier, Timeline};
use tokio::time::Instant;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use crate::connect::{Purpose, connect, connect_maintenance};
use crate::error::{Error, ServerMessage};
use crate::identity::ServerIdentity;
use crate::locks::{self, Class};
use crate::quote;
use crate::session::Session;
use crate::settings;
use crate::target::Target;

/// How long any statement but the start may take: all are answered from memory, or after one flush of WAL.
const STATEMENT: Duration = Duration::from_mins(1);

/// How to begin a backup.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// For which job; its short form is the session's application name.
    pub job: JobId,
    /// Goes into `backup_label`: the attempt's id.
    pub label: String,
    /// Name of the temporary replication slot: 1 to 63 of `a-z 0-9 _`. Unique by attempt.
    pub slot_name: String,
    /// Force the starting checkpoint at once; else the server spreads it over up to `checkpoint_timeout`.
    pub fast: bool,
    /// The cluster the job is for.
    pub system_identifier: Option<SystemIdentifier>,
    /// When to give up waiting for the starting checkpoint.
    pub start_deadline: Option<Instant>,
    /// Interrupts the begin, also while the server writes its checkpoint.
    pub cancel: CancellationToken,
}

/// What is known once the server is in backup mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// Redo position of the starting checkpoint: WAL from here on belongs to the backup.
    pub start_lsn: Lsn,
    /// The timeline the server writes, or, for a standby, replays.
    pub timeline: Timeline,
    /// The server as it was after the start. The control file on disk must agree: same system identifier,
    /// a checkpoint at or after `start_lsn`, the same timeline; otherwise the files belong to another server.
    pub server: ServerIdentity,
    /// The name of the replication slot.
    pub slot_name: String,
    /// The slot holds WAL from here: at or before `start_lsn`.
    pub held_from: Lsn,
}

/// What the server returned when it ended backup mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopped {
    /// Recovery must reach this position before the copy is consistent. For a standby: what it had replayed at the end,
    /// which is at or after the position that the server names, so that nothing that could be seen there is missing.
    pub stop_lsn: Lsn,
    /// `backup_label`: the only true version, to be written into every restore.
    pub backup_label: String,
    /// `tablespace_map`; empty without tablespaces.
    pub tablespace_map: String,
    /// The server's clock when backup mode ended, Unix milliseconds.
    pub server_time_ms: i64,
    /// Of a standby: it had replayed every transaction that its primary had committed by then, by the primary's clock, Unix
    /// milliseconds.
    pub replayed_to_ms: Option<i64>,
}

/// How a backup stands, see [`BackupSession::check`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The slot holds WAL from here.
    pub held_from: Lsn,
    /// What the server has flushed, or, a standby, replayed: every segment that ends at or before this is complete on its
    /// disk.
    pub current_lsn: Lsn,
    /// What `pg_replication_slots.wal_status` says: `reserved`, `extended` or `unreserved` (about to be lost).
    pub wal_status: String,
    /// The server's clock, Unix milliseconds.
    pub server_time_ms: i64,
    /// Of a standby: when the newest transaction ended that it had replayed, or the checkpoint that it last restarted from was
    /// written, Unix milliseconds by its primary's clock.
    pub replayed_to_ms: Option<i64>,
}

impl Standing {
    /// Bytes of WAL that the server keeps for us.
    pub fn held_bytes(&self) -> u64 {
        self.current_lsn.bytes_since(self.held_from)
    }
}

/// A server in backup mode. Dropping it closes the session: the server then leaves backup mode, drops the slot and frees
/// the lock by itself.
pub struct BackupSession {
    session: Session,
    watch: Session,
    /// For a new watch, should the first be lost: that is no harm to the backup.
    watch_target: Target,
    watch_purpose: Purpose,
    started: Started,
    backend_started_at_us: i64,
    advanced_to: Lsn,
    stopped: bool,
}

impl BackupSession {
    /// Takes the lock, creates the slot, and enters backup mode. `target` may name any database; the maintenance one is used.
    pub async fn begin(target: &Target, options: &BackupOptions) -> Result<Self, Error> {
        let cancel = &options.cancel;
        let purpose = Purpose::backup(&options.job);
        let session = connect_maintenance(target, &purpose).await?;
        let ask = Purpose { statement_timeout: STATEMENT, ..Purpose::ask(&options.job) };
        let database =
            session.one("ask for the database", "SELECT current_database()::text", &[]).await?;
        let watch_target = target.with_database(database.get(0));
        let watch = connect(&watch_target, &ask).await?;
        refuse_shared_backend(&session, &watch).await?;

        // Nothing below that can fail for a reason we can foresee is left to the backup's own session.
        let identity = watch.identity_of(options.system_identifier).await?;
        require_rights(&watch, &identity).await?;
        settings::require_for_backup(&watch).await?;

        locks::try_lock(&session, Class::Backup).await?;
        create_slot(&session, &options.slot_name).await?;
        let version = identity.version;
        let start = async {
            session
                .one("start the backup", version.backup_start(), &[&options.label, &options.fast])
                .await
                .map_err(|error| without_full_pages(error).or_session_lost())
        };
        let row = session.within("start the backup", cancel, options.start_deadline, start).await?;
        let start_lsn = position("start the backup", row.get(0))?;

        let server = watch.identity().await?;
        let mut begun = Self {
            backend_started_at_us: backend_start(&watch, session.backend_pid()).await?,
            session,
            watch,
            watch_target,
            watch_purpose: ask,
            started: Started {
                start_lsn,
                timeline: server.timeline,
                server,
                slot_name: options.slot_name.clone(),
                held_from: Lsn::INVALID,
            },
            advanced_to: Lsn::INVALID,
            stopped: false,
        };
        let before = (identity.started_at_ms, identity.timeline, identity.system_identifier);
        let after = &begun.started.server;
        if before != (after.started_at_ms, after.timeline, after.system_identifier) {
            return Err(lost(
                "the server was restarted or changed its timeline while the backup began",
            ));
        }
        let standing = begun.check().await?;
        if standing.held_from > start_lsn {
            let what =
                format!("slot {} holds WAL only from {}", options.slot_name, standing.held_from);
            return Err(Error::WalLost { needed: start_lsn, what });
        }
        begun.started.held_from = standing.held_from;
        begun.advanced_to = standing.held_from;
        Ok(begun)
    }

    /// What is known from the start.
    pub fn started(&self) -> &Started {
        &self.started
    }

    /// The second session, for questions of the caller's own; an error on it does no harm.
    pub fn watch(&self) -> &Session {
        &self.watch
    }

    /// The server process that carries the backup.
    pub fn backend_pid(&self) -> i32 {
        self.session.backend_pid()
    }

    /// Makes sure that the backup is still one: the same server process, holding the lock and an unbroken slot, on a
    /// server that was neither restarted nor promoted. Cheap; ask every few seconds, and once more before committing.
    pub async fn check(&self) -> Result<Standing, Error> {
        if self.session.is_closed() {
            return Err(self.gone("the connection is closed"));
        }
        let (row, holds_lock) = self.look().await?;
        if row.get::<_, Option<i64>>("backend_started_at_us") != Some(self.backend_started_at_us) {
            return Err(self.gone("its server process has ended"));
        }
        let server = &self.started.server;
        if row.get::<_, i64>("started_at_ms") != server.started_at_ms {
            return Err(lost("the server was restarted"));
        }
        if row.get::<_, bool>("in_recovery") != server.in_recovery {
            return Err(lost("the server went into or out of recovery"));
        }
        let timeline = Timeline(row.get::<_, i32>("timeline").cast_unsigned());
        if timeline != self.started.timeline {
            let what =
                format!("the server changed from timeline {} to {timeline}", self.started.timeline);
            return Err(lost(&what));
        }
        let wal_status: Option<String> = row.get("wal_status");
        let held_from: Option<String> = row.get("restart_lsn");
        let needed = self.advanced_to.max(self.started.start_lsn);
        match (row.get::<_, Option<i32>>("active_pid"), held_from, wal_status) {
            (_, _, Some(status)) if status == "lost" => {
                let slot = &self.started.slot_name;
                Err(Error::WalLost {
                    needed,
                    what: format!("the server invalidated slot {slot}: max_slot_wal_keep_size"),
                })
            }
            (Some(pid), Some(held_from), Some(wal_status)) if pid == self.backend_pid() => {
                if !holds_lock {
                    return Err(lost("it no longer holds the cluster's lock"));
                }
                Ok(Standing {
                    held_from: position(LOOK, held_from)?,
                    current_lsn: position(LOOK, row.get("current_lsn"))?,
                    wal_status,
                    server_time_ms: row.get("server_time_ms"),
                    replayed_to_ms: row.get("replayed_to_ms"),
                })
            }
            _ => Err(lost("its replication slot is gone; an error in the session drops it")),
        }
    }

    /// Asks on the second session, or on a new one when that is gone.
    async fn look(&self) -> Result<(Row, bool), Error> {
        if !self.watch.is_closed() {
            match self.look_with(&self.watch).await {
                Err(error) if error.is_closed() => {}
                outcome => return outcome,
            }
        }
        match connect(&self.watch_target, &self.watch_purpose).await {
            Ok(spare) => self.look_with(&spare).await.map_err(Error::or_session_lost),
            Err(_) if self.session.is_closed() => Err(self.gone("the connection is closed")),
            Err(error) => Err(error),
        }
    }

    async fn look_with(&self, watch: &Session) -> Result<(Row, bool), Error> {
        let pid = self.backend_pid();
        let row = watch.one(LOOK, CHECK, &[&self.started.slot_name, &pid]).await?;
        Ok((row, locks::still_held(watch, pid, Class::Backup).await?))
    }

    /// The tablespaces outside the data directory as they are now. Needs no connection beyond those the backup has, unless
    /// the second one broke.
    pub async fn tablespaces(&self) -> Result<Vec<Tablespace>, Error> {
        if !self.watch.is_closed() {
            match settings::tablespaces(&self.watch).await {
                Err(error) if error.is_closed() => {}
                outcome => return outcome,
            }
        }
        let spare = connect(&self.watch_target, &self.watch_purpose).await?;
        let found = settings::tablespaces(&spare).await;
        spare.close().await;
        found
    }

    /// Lets the server recycle the WAL before `position`: all of it must be stored. Positions that go back are ignored.
    pub async fn advance(&mut self, position: Lsn) -> Result<(), Error> {
        if position <= self.advanced_to {
            return Ok(());
        }
        // Only this session may move its own slot. A move backwards would be an error, and an error would drop the slot.
        let sql = "\
-- pgmuster: advance the slot
SELECT (pg_replication_slot_advance(slot_name, $2::text::pg_lsn)).end_lsn::text
  FROM pg_replication_slots
 WHERE slot_name = $1 AND active_pid = pg_backend_pid()
   AND restart_lsn < $2::text::pg_lsn AND wal_status <> 'lost'
   AND $2::text::pg_lsn <=
       CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END";
        let what = "let go of stored WAL";
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 2] =
            [&self.started.slot_name, &position.to_string()];
        let moved =
            self.session.maybe(what, sql, &parameters).await.map_err(Error::into_session_lost)?;
        match moved {
            Some(_) => {
                self.advanced_to = position;
                Ok(())
            }
            // Nothing moved: either there was nothing to do, or the slot is gone; the check tells which.
            None => self.check().await.map(drop),
        }
    }

    /// Completes the current WAL segment, so that it can be stored and let go. Needs a right that the backup itself does
    /// not need; without it the segment completes when it is full.
    pub async fn switch_wal(&self) -> Result<Lsn, Error> {
        let what = "switch to a new WAL segment";
        let grant = grant("pg_catalog.pg_switch_wal()", self.watch.user());
        let row = self.watch.one(what, "SELECT pg_switch_wal()::text", &[]).await;
        position(what, row.map_err(|error| error.or_permission(self.watch.user(), &grant))?.get(0))
    }

    /// Ends backup mode. The slot and the lock stay until [`Self::finish`], so that the last WAL can be stored.
    ///
    /// A stop whose answer is lost is a lost backup: without the returned `backup_label` there is none.
    pub async fn stop(&mut self, cancel: &CancellationToken) -> Result<Stopped, Error> {
        self.check().await?;
        let what = "stop the backup";
        let sql = self.started.server.version.backup_stop();
        let statement = async {
            let row = self.session.one(what, sql, &[]).await;
            row.map_err(|error| match without_full_pages(error) {
                setting @ Error::Setting { .. } => setting,
                error => error.into_session_lost(),
            })
        };
        let deadline = Some(Instant::now() + STATEMENT);
        let row = self.session.within(what, cancel, deadline, statement).await?;
        let named = position(what, row.get(0))?;
        self.stopped = true;
        // The server refuses the stop of a standby that was promoted, and no other change of timeline.
        let Standing { current_lsn, server_time_ms, replayed_to_ms, .. } = self.check().await?;
        let backup_label: String = row.get(1);
        let began_on = format!("START TIMELINE: {}\n", self.started.timeline);
        if !backup_label.contains(&began_on) {
            return Err(lost("the server changed its timeline while the backup began"));
        }
        let in_recovery = self.started.server.in_recovery;
        Ok(Stopped {
            stop_lsn: if in_recovery { named.max(current_lsn) } else { named },
            backup_label,
            tablespace_map: row.get::<_, Option<String>>(2).unwrap_or_default(),
            server_time_ms,
            replayed_to_ms,
        })
    }

    /// Whether [`Self::stop`] has succeeded.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Closes both sessions and waits until they are closed: backup mode, slot and lock are gone then or shortly after.
    pub async fn finish(self) {
        self.session.close().await;
        self.watch.close().await;
    }

    fn gone(&self, what: &str) -> Error {
        Error::SessionLost { what: what.to_owned(), source: self.session.last_words().cloned() }
    }
}

const LOOK: &str = "look after the backup";

// What was replayed by then is asked before how far replay is.
const CHECK: &str = "\
-- pgmuster: look after a backup
SELECT (SELECT (extract(epoch FROM backend_start) * 1000000)::int8 FROM pg_stat_activity WHERE pid = $2)
           AS backend_started_at_us,
       (extract(epoch FROM pg_postmaster_start_time()) * 1000)::int8 AS started_at_ms,
       pg_is_in_recovery() AS in_recovery,
       CASE WHEN pg_is_in_recovery() THEN (SELECT greatest(timeline_id, min_recovery_end_timeline)
                                             FROM pg_control_checkpoint(), pg_control_recovery())
            ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int4
       END AS timeline,
       CASE WHEN pg_is_in_recovery() THEN
           (SELECT floor(extract(epoch FROM greatest(pg_last_xact_replay_timestamp(), checkpoint_time)) * 1000)::int8
              FROM pg_control_checkpoint())
       END AS replayed_to_ms,
       CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END::text
           AS current_lsn,
       (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS server_time_ms,
       s.active_pid, s.restart_lsn::text AS restart_lsn, s.wal_status
  FROM (SELECT 1) one LEFT JOIN pg_replication_slots s ON s.slot_name = $1 AND s.temporary";

fn lost(what: &str) -> Error {
    Error::SessionLost { what: what.to_owned(), source: None }
}

pub(crate) fn position(what: &str, text: String) -> Result<Lsn, Error> {
    text.parse().map_err(|_| Error::Answer { what: what.to_owned(), answer: text })
}

fn grant(function: &str, role: &str) -> String {
    format!("GRANT EXECUTE ON FUNCTION {function} TO {};", quote::identifier(role))
}

/// With the watch inside a transaction, a pooler that shares server connections must give the other session another one.
async fn refuse_shared_backend(session: &Session, watch: &Session) -> Result<(), Error> {
    let what = "look for a pooler";
    let pid = "SELECT pg_backend_pid()";
    watch.run(what, "BEGIN").await?;
    let watch_pid: i32 = watch.one(what, pid, &[]).await?.get(0);
    let session_pid: i32 = session.one(what, pid, &[]).await?.get(0);
    watch.run(what, "ROLLBACK").await?;
    if session_pid == session.backend_pid()
        && watch_pid == watch.backend_pid()
        && session_pid != watch_pid
    {
        return Ok(());
    }
    let evidence = "two sessions share server processes".to_owned();
    Err(Error::Pooler { target: session.target().to_owned(), evidence })
}

/// A standby says no when the WAL it has replayed lacks whole pages: a torn page could not be put right.
fn without_full_pages(error: Error) -> Error {
    match error {
        Error::Statement { what, source }
            if source.state() == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE)
                && source.to_string().contains("full_page_writes=off") =>
        {
            Error::Setting {
                what,
                found: "full_page_writes was off on the primary of this standby".to_owned(),
                cure: "On the primary: ALTER SYSTEM SET full_page_writes = on; SELECT pg_reload_conf(); then CHECKPOINT."
                    .to_owned(),
            }
        }
        error => error,
    }
}

/// Asks for every right before the first step, so that all that is missing is told at once.
async fn require_rights(watch: &Session, identity: &ServerIdentity) -> Result<(), Error> {
    let version = identity.version;
    let mut cure = Vec::new();
    if !identity.may_replicate {
        cure.push(format!("ALTER ROLE {} REPLICATION;", quote::identifier(&identity.role)));
    }
    for signature in [version.backup_start_signature(), version.backup_stop_signature()] {
        let sql = "SELECT has_function_privilege($1::text, 'EXECUTE')";
        if !watch.one("look at the role's rights", sql, &[&signature]).await?.get::<_, bool>(0) {
            cure.push(grant(signature, &identity.role));
        }
    }
    if cure.is_empty() {
        return Ok(());
    }
    Err(Error::Permission {
        what: format!("back up the cluster of {}", watch.target()),
        role: identity.role.clone(),
        grant: cure.join(" "),
        source: None,
    })
}

async fn create_slot(session: &Session, name: &str) -> Result<(), Error> {
    let what = "create a temporary replication slot";
    let sql = "SELECT slot_name FROM pg_create_physical_replication_slot($1, true, true)";
    let created = session.one(what, sql, &[&name]).await;
    let refused = match created {
        Ok(_) => return Ok(()),
        Err(Error::Statement { source, .. })
            if source.state() == Some(&SqlState::CONFIGURATION_LIMIT_EXCEEDED) =>
        {
            source
        }
        Err(error) => {
            let cure = format!("ALTER ROLE {} REPLICATION;", quote::identifier(session.user()));
            return Err(error.or_permission(session.user(), &cure).or_session_lost());
        }
    };
    Err(Error::Setting {
        what: what.to_owned(),
        found: ServerMessage::to_string(&refused),
        cure: "Drop replication slots that nobody uses (pg_replication_slots), or raise max_replication_slots and restart."
            .to_owned(),
    })
}

async fn backend_start(watch: &Session, pid: i32) -> Result<i64, Error> {
    let sql = "SELECT (extract(epoch FROM backend_start) * 1000000)::int8 FROM pg_stat_activity WHERE pid = $1";
    match watch.maybe("look at the backup's session", sql, &[&pid]).await? {
        Some(row) => {
            row.get::<_, Option<i64>>(0).ok_or_else(|| lost("its server process cannot be seen"))
        }
        None => Err(lost("its server process has ended")),
    }
}
