//! How long a dump has held the snapshot of its database: nothing that was deleted since is removed by vacuum, in no database of the
//! server.

use std::sync::Arc;
use std::time::Duration;

use postgres::{Purpose, connect_maintenance};
use proto::{Action, Code, DatabaseName, Failure};
use tokio::time::Instant;

use super::source::Dumps;
use crate::config::BackupConfig;
use crate::context::{JobContext, StepHandle};
use crate::jobs::session_owner;

/// How often it is looked how old the snapshot is.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often the server is asked what an old one holds back.
const ASK_EVERY: Duration = Duration::from_mins(1);

/// The snapshot of the database that is being dumped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) database: DatabaseName,
    pub(super) since: Instant,
}

/// How old a snapshot may become; `None` where that is nobody's affair.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ages {
    warn: Option<Duration>,
    max: Option<Duration>,
}

impl Ages {
    pub(super) fn of(config: &BackupConfig) -> Self {
        let age = |s: u32| (s > 0).then(|| Duration::from_secs(s.into()));
        Self { warn: age(config.dump_warn_s), max: age(config.dump_max_s) }
    }
}

/// Looks after the snapshots of dumps: tells of an old one, and returns when one is too old.
pub(super) async fn watch(
    cx: &JobContext,
    dumps: &Arc<Dumps>,
    ages: Ages,
    step: &StepHandle,
) -> Failure {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    let mut asked: Option<(Held, Instant)> = None;
    loop {
        ticks.tick().await;
        let held = dumps.lock().held.clone();
        let Some(held) = held else {
            dumps.lock().told = None;
            continue;
        };
        let age = held.since.elapsed();
        if ages.max.is_some_and(|max| age >= max) {
            let back = holds_back(cx, dumps).await;
            return too_old(&held.database, age, back);
        }
        if ages.warn.is_none_or(|warn| age < warn) {
            dumps.lock().told = None;
            continue;
        }
        let is_new = asked.as_ref().is_none_or(|(other, _)| *other != held);
        if !is_new && asked.as_ref().is_some_and(|(_, at)| at.elapsed() < ASK_EVERY) {
            continue;
        }
        let back = holds_back(cx, dumps).await;
        let said = sentence(&held.database, age, back);
        if is_new {
            tracing::warn!(database = %held.database, "{said}");
        }
        step.figure("snapshot_s", age.as_secs());
        if let Some(transactions) = back {
            step.figure("held_back_transactions", transactions);
        }
        dumps.lock().told = Some(said);
        asked = Some((held, Instant::now()));
    }
}

/// How many transactions old the oldest snapshot of this dump is; `None` where the server does not say.
async fn holds_back(cx: &JobContext, dumps: &Dumps) -> Option<u64> {
    let asking = async {
        let purpose = Purpose::ask(&session_owner(cx.spec.attempt));
        let session = connect_maintenance(&dumps.target, &purpose).await?;
        let back = session.held_back(&dumps.job).await;
        session.close().await;
        back
    };
    match asking.await {
        Ok(back) => back,
        Err(error) => {
            let why = proto::failure::chain(&error);
            tracing::debug!("What the dump holds back is not known: failed to {why}");
            None
        }
    }
}

fn sentence(database: &DatabaseName, age: Duration, back: Option<u64>) -> String {
    let back = back.map_or_else(String::new, |n| format!(", {n} transactions back"));
    format!(
        "dump of database {database} for {}: vacuum removes nothing that was deleted since on the whole server{back}",
        span(age)
    )
}

fn too_old(database: &DatabaseName, age: Duration, back: Option<u64>) -> Failure {
    let back = back.map_or_else(String::new, |n| format!(", {n} transactions back"));
    let message = format!(
        "the dump of database {database} has kept vacuum from removing anything on the server for {}{back}: \
         backup.dump_max_s ends it",
        span(age)
    );
    Failure::new(Code::DumpFailed, Action::FixConfig, message).with_hint(
        "Nothing was committed. A backup of the files holds nothing back. Or dump a standby, or fewer databases (--exclude-database), or raise \
         backup.dump_max_s; pg_dump --format=directory --jobs by hand reads with several sessions.",
    )
}

fn span(age: Duration) -> String {
    match age.as_secs() {
        s @ 0..120 => format!("{s} s"),
        s @ 120..7_200 => format!("{} min", s / 60),
        s => format!("{} h", s / 3_600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dump_holds_back_is_said_with_its_database_and_its_age() {
        let shop = "shop".parse().unwrap();
        assert_eq!(
            sentence(&shop, Duration::from_hours(5), Some(1_200_000)),
            "dump of database shop for 5 h: vacuum removes nothing that was deleted since on the whole server, 1200000 transactions back"
        );
        assert!(sentence(&shop, Duration::from_mins(3), None).ends_with("on the whole server"));
        let ended = too_old(&shop, Duration::from_secs(90), Some(7));
        assert!(ended.message.contains("for 90 s, 7 transactions back"), "{ended}");
        assert!(!ended.action.is_retryable(), "it would hold back as much again");
    }
}
