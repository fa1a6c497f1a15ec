//! One advisory lock per class of work, so that two attempts do not work side by side on one cluster.
//!
//! A courtesy, not a fence: what must not happen twice is decided elsewhere. Advisory locks belong to a database, so
//! every pgmuster takes them in the same one, see [`crate::connect::connect_maintenance`]. The key is the pair
//! (`0x70676d75`, class): the first number is `pgmu` in ASCII, 1885826421, the second is [`Class::number`]. An operator
//! finds them with `SELECT * FROM pg_locks WHERE locktype = 'advisory' AND classid = 1885826421`.

use std::fmt;

use crate::error::Error;
use crate::session::Session;

/// `pgmu` in ASCII: the first half of every key.
pub const KEY_SPACE: i32 = 0x7067_6d75;

/// Kinds of work that must not run twice at the same time on one cluster. Different classes do not disturb each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Physical backups.
    Backup,
    /// Maintenance: vacuum, analyze.
    Maintenance,
}

impl Class {
    /// The second half of the key; never re-used for another class.
    pub fn number(self) -> i32 {
        match self {
            Self::Backup => 1,
            Self::Maintenance => 2,
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Backup => "backup",
            Self::Maintenance => "maintenance",
        })
    }
}

const HOLDER: &str = "\
-- pgmuster: holder of a lock
SELECT l.pid, a.application_name, a.client_addr::text,
       to_char(a.backend_start, 'YYYY-MM-DD HH24:MI:SS') || ' UTC'
  FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
 WHERE l.locktype = 'advisory' AND l.granted
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.classid::int8 = $1::int4::int8 AND l.objid::int8 = $2::int4::int8 AND l.objsubid = 2";

/// Takes the lock for the life of `session`, or says who has it. Does not wait.
pub async fn try_lock(session: &Session, class: Class) -> Result<(), Error> {
    let what = "take the lock of the cluster";
    let keys: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&KEY_SPACE, &class.number()];
    let row = session.one(what, "SELECT pg_try_advisory_lock($1, $2)", &keys).await?;
    if row.get(0) {
        return Ok(());
    }
    let holder = match session.maybe(what, HOLDER, &keys).await? {
        Some(row) => {
            let field = |index| row.get::<_, Option<String>>(index).filter(|text| !text.is_empty());
            let mut text = format!("process {} holds it", row.get::<_, i32>(0));
            for (word, value) in [("named", field(1)), ("from", field(2)), ("since", field(3))] {
                if let Some(value) = value {
                    text = format!("{text}, {word} {value}");
                }
            }
            text
        }
        None => "somebody held it a moment ago".to_owned(),
    };
    Err(Error::Busy { class: class.to_string(), holder })
}

/// Whether the server process `pid` holds the lock, asked on any session in the maintenance database.
pub async fn still_held(watch: &Session, pid: i32, class: Class) -> Result<bool, Error> {
    let rows = watch
        .query("look at the lock of the cluster", HOLDER, &[&KEY_SPACE, &class.number()])
        .await?;
    Ok(rows.iter().any(|row| row.get::<_, i32>(0) == pid))
}

/// A lock with a session of its own: released when it is dropped.
pub struct ClusterLock {
    session: Session,
    class: Class,
}

impl ClusterLock {
    /// Takes the lock of `class` in the session, which must be in the maintenance database.
    pub async fn try_take(session: Session, class: Class) -> Result<Self, Error> {
        try_lock(&session, class).await?;
        Ok(Self { session, class })
    }

    /// Whether it is still the same server process that holds the lock. Ask before everything that must not run twice.
    pub async fn still_held(&self) -> Result<bool, Error> {
        if self.session.is_closed() {
            return Ok(false);
        }
        match still_held(&self.session, self.session.backend_pid(), self.class).await {
            Err(error) if error.is_closed() => Ok(false),
            outcome => outcome,
        }
    }

    /// The session that holds the lock.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Releases the lock and waits until the connection is closed.
    pub async fn release(self) {
        self.session.close().await;
    }
}
