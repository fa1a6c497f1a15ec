//! Has a server archive its WAL into its cluster's repository, through this worker, and sees a segment arrive there.

use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use postgres::archiving::{Change, Obstacle, Wanted, quoted};
use postgres::locks::{Class, ClusterLock};
use postgres::{Purpose, ServerIdentity, Session, connect_maintenance};
use proto::job::{EnableWal, EnableWalOutcome, LostWal, SeenSegment};
use proto::wal::SegmentName;
use proto::{Action, BackupKind, Code, Failure, SecretRef};
use tokio::time::Instant;

use super::session_owner;
use crate::archive::{Calling, lost_before};
use crate::clock;
use crate::config::{RepositoryConfig, WorkerConfig};
use crate::context::{JobContext, blocking};
use crate::engines::native::data_directory;
use crate::places::{Cluster, Places};
use crate::recovering;

/// How long the server may take to read its settings.
const READ_WITHIN: Duration = Duration::from_secs(20);
/// How long a segment may take into the archive. An archiver that failed before asks again once a minute.
const SEEN_WITHIN: Duration = Duration::from_secs(150);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// What to know before another archive is replaced.
const LEFT_ELSEWHERE: &str = "what the server archived before stays where that was put: as far as it is not in this repository, no \
     moment between the newest backup and the next one can be recovered from here";

/// Sets up the archive, or says what it would set.
pub(crate) async fn run(
    cx: &JobContext,
    places: &Places,
    config: &WorkerConfig,
    task: &EnableWal,
) -> Result<EnableWalOutcome, Failure> {
    let cluster = places.cluster(&cx.spec.cluster)?;
    let place = places.place_for(&cx.spec.cluster)?;
    let (session, server) = cx.step("connect", connect(cx, cluster)).await?;
    let command = command(config, cluster, &place.config)?;
    let wanted =
        Wanted { command: &command, timeout_s: task.archive_timeout_s, replace: task.replace };
    let changes =
        session.archiving().await?.changes(wanted).map_err(|obstacle| refused(cx, obstacle))?;
    let mut outcome = EnableWalOutcome {
        planned_only: task.plan_only,
        plan: changes.iter().map(ToString::to_string).collect(),
        restart_for: needing_restart(&changes),
        seen: None,
        lost: None,
    };
    if changes.iter().any(Change::replaces_another) {
        outcome.plan.push(LEFT_ELSEWHERE.to_owned());
    }
    outcome.plan.push(if changes.is_empty() {
        "nothing has to be set; a segment is ended to see it arrive in the archive".to_owned()
    } else if outcome.restart_for.is_empty() {
        "then end a segment and see it arrive in the archive".to_owned()
    } else {
        "after the restart, run this again: it ends a segment and sees it arrive in the archive"
            .to_owned()
    });
    let missing = session.missing_for_archiving(&server, &changes).await?;
    if task.plan_only {
        if !missing.is_empty() {
            outcome.plan.push(format!(
                "role {} may not do that yet: {}",
                server.role,
                missing.join(" ")
            ));
        }
        return Ok(outcome);
    }
    if !missing.is_empty() {
        let what =
            format!("role {} may not set up the archive of {}", server.role, cx.spec.cluster);
        return Err(Failure::new(Code::PermissionDenied, Action::FixConfig, what)
            .with_hint(format!("Nothing was changed. {}", missing.join(" "))));
    }
    let lock = ClusterLock::try_take(session, Class::Maintenance).await?;
    let done = async {
        let session = lock.session();
        let set = async {
            // Its command is to find the cluster also where it works without this worker.
            let repository = place.open().await?;
            let identifier = server.system_identifier;
            repository.find_or_mint_lineage(&cx.spec.cluster, identifier, clock::now_ms()).await?;
            Ok(session.change_archiving(&changes).await?)
        };
        cx.step("set", set).await?;
        if outcome.restart_for.is_empty() {
            let see = see(cx, session, places, &server, &command);
            let (seen, lost) = cx.step("check", see).await?;
            (outcome.seen, outcome.lost) = (Some(seen), lost);
        }
        Ok(outcome)
    };
    let done = done.await;
    lock.release().await;
    done
}

/// A session with the right server, which must be a primary on this host that runs as this worker's user.
async fn connect(cx: &JobContext, cluster: &Cluster) -> Result<(Session, ServerIdentity), Failure> {
    let name = &cluster.config.name;
    let purpose = Purpose::ask(&session_owner(cx.spec.attempt));
    let session = connect_maintenance(&cluster.target, &purpose).await?;
    let server = session.identity_of(cx.spec.system_identifier).await?;
    let refused = |what: String, hint: &str| {
        Failure::new(Code::ServerSetting, Action::FixConfig, what).with_hint(hint.to_owned())
    };
    if session.wal_position().await?.is_none() {
        return Err(refused(
            format!("the server at {name} is a standby, and its settings are not its primary's"),
            "Set up the archive at the primary. A standby that may be promoted archives too: archive_mode = always there, with the same archive_command.",
        ));
    }
    let (config, identity) = (cluster.config.clone(), server.clone());
    let owner = blocking(move || {
        let directory = data_directory(&config, &identity)?;
        let owner = std::fs::metadata(directory).map(|directory| directory.uid());
        owner.map_err(|error| Failure::bug(format!("a directory that was read is gone: {error}")))
    });
    match owner.await {
        Ok(owner) if owner == rustix::process::geteuid().as_raw() => Ok((session, server)),
        Ok(_) => Err(refused(
            format!(
                "the server at {name} runs as another user than this worker, at whose socket it would archive"
            ),
            "Run the worker as the server's user, or write archive_command by hand: docs/wal-archive.md.",
        )),
        Err(failure) => Err(refused(
            format!("this worker is not beside the server at {name}: {}", failure.message),
            "A server archives through a worker on its own host. Run one there, or write archive_command by hand: docs/wal-archive.md.",
        )),
    }
}

/// The command, which asks this worker first. Where the server's user can open the repository himself, it does without it.
fn command(
    config: &WorkerConfig,
    cluster: &Cluster,
    repository: &RepositoryConfig,
) -> Result<String, Failure> {
    let opener = repository.opener()?;
    // The server has not this worker's environment, and the credentials in its configuration are no argument.
    let is_reachable = repository.access_key_id.is_none() && !matches!(opener.1, SecretRef::Env(_));
    let reference = match opener {
        ("--key", SecretRef::File(path)) => path.clone(),
        (_, reference) => reference.to_string(),
    };
    let calling = Calling {
        program: recovering::this_program()?,
        socket: config.wal_socket().into_std_path_buf(),
        repository: is_reachable.then(|| (repository.url.clone(), opener.0.to_owned(), reference)),
    };
    Ok(calling.push(&cluster.config.name))
}

fn needing_restart(changes: &[Change]) -> Vec<String> {
    let waiting = changes.iter().filter(|change| change.needs_restart);
    waiting.map(|change| change.name.to_owned()).collect()
}

fn refused(cx: &JobContext, obstacle: Obstacle) -> Failure {
    let cluster = &cx.spec.cluster;
    let (what, hint) = match obstacle {
        Obstacle::Another { name, value } => (
            format!("{cluster} archives by another {name}: {}", quoted(&value)),
            "With --replace it is replaced: what the other archive has got stays there, and a recovery over that moment needs both. Take \
             a backup afterwards.",
        ),
        Obstacle::Fixed(name) => (
            format!(
                "{name} of {cluster} is on the server's command line, which no setting overrides"
            ),
            "Take it from there, and start the server again.",
        ),
    };
    Failure::new(Code::ServerSetting, Action::FixConfig, what).with_hint(hint)
}

/// Ends a segment, waits until the repository has it, and looks what is missing before it.
async fn see(
    cx: &JobContext,
    session: &Session,
    places: &Places,
    server: &ServerIdentity,
    command: &str,
) -> Result<(SeenSegment, Option<LostWal>), Failure> {
    let read_by = Instant::now() + READ_WITHIN;
    while !session.archives_by(command).await? {
        if Instant::now() > read_by {
            let what = "the server has not taken over the settings, which were written into postgresql.auto.conf";
            return Err(Failure::new(Code::WalNotArchived, Action::FixConfig, what)
                .with_hint("Its log says why; see also pg_file_settings."));
        }
        pause(cx).await?;
    }
    let repository = places.repository_for(&cx.spec.cluster).await?;
    let name = session.finish_segment().await?;
    let segment: SegmentName =
        name.parse().map_err(|_| Failure::bug(format!("the server calls a segment {name:?}")))?;
    let ended = Instant::now();
    while ended.elapsed() < SEEN_WITHIN {
        let lineages = repository
            .lineages_of(BackupKind::Physical, &cx.spec.cluster, server.system_identifier)
            .await?;
        if let Some(identity) = lineages.last()
            && repository.has_wal(identity.lineage, segment).await?
        {
            let after_ms = u64::try_from(ended.elapsed().as_millis()).unwrap_or(u64::MAX);
            let lineage = identity.lineage;
            // A server archives its segments in their order, so what is missing now was given to somebody else.
            let lost = lost_before(&repository, lineage, segment).await.unwrap_or_else(|failure| {
                tracing::warn!("What was lost before it cannot be told: {failure}");
                None
            });
            return Ok((SeenSegment { segment, lineage, after_ms }, lost));
        }
        pause(cx).await?;
    }
    let failures = session.archiver_failures().await?;
    let said = failures.map_or_else(
        || "its archiver counts no failure".to_owned(),
        |(count, last)| format!("its archiver failed {count} times, last at {last}"),
    );
    let what = format!(
        "segment {segment} did not come into the archive within {} seconds; {said}",
        SEEN_WITHIN.as_secs()
    );
    Err(Failure::new(Code::WalNotArchived, Action::FixConfig, what).with_hint(
        "The server's log has what archive_command said. The settings stay; the server keeps its WAL and tries again.",
    ))
}

async fn pause(cx: &JobContext) -> Result<(), Failure> {
    tokio::select! {
        () = cx.cancel.cancelled() => Err(cx.stopped()),
        () = tokio::time::sleep(LOOK_EVERY) => Ok(()),
    }
}
