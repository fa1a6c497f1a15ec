//! How much WAL a backup may make its server keep. The backup's replication slot holds WAL until it is stored; a repository
//! that takes it more slowly than the server writes it would fill the disk of `pg_wal`, and the server would stop.
//!
//! The backup gives up before that: a backup that failed is repeated, a server that stopped is an outage.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use postgres::BackupSession;
use postgres::backup_session::Standing;
use proto::{Action, Code, Failure};

use crate::config::BackupConfig;
use crate::context::blocking;

/// How often the server is looked at.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Segments that never count as too many: the one being written, the ones being stored, and what is written between two
/// looks. Giving them back would not help a full disk either.
const SEGMENTS_ALWAYS: u64 = 4;
/// What stays free on the file system of `pg_wal` unless the configuration says otherwise: this much, or the share below
/// when that is more, but no more than the ceiling: on a volume of many terabytes a share of it is room that no server
/// fills between two looks, and keeping it would end backups that harm nobody.
const RESERVE_BYTES: u64 = 1 << 30;
const RESERVE_PERCENT: u64 = 5;
const RESERVE_MAX_BYTES: u64 = 16 << 30;

/// The limits of one backup.
#[derive(Debug, Clone)]
pub(super) struct Hold {
    /// `pg_wal`, links followed, where this process can ask for the free space of its file system.
    directory: Option<PathBuf>,
    max_bytes: u64,
    reserve_bytes: Option<u64>,
    always_bytes: u64,
}

/// The file system of `pg_wal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Space {
    total_bytes: u64,
    free_bytes: u64,
}

impl Hold {
    pub(super) fn new(
        data_directory: Option<&Path>,
        segment_size: u32,
        config: &BackupConfig,
    ) -> Self {
        Self {
            directory: data_directory.map(|directory| directory.join("pg_wal")),
            max_bytes: config.wal_held_max_bytes,
            reserve_bytes: config.wal_free_min_bytes,
            always_bytes: SEGMENTS_ALWAYS * u64::from(segment_size),
        }
    }

    /// Makes sure that the backup is still one and harms nobody.
    pub(super) async fn look(&self, session: &BackupSession) -> Result<Standing, Failure> {
        let standing = session.check().await?;
        let held_bytes = standing.held_bytes();
        // The disk is only asked when there is something to give back.
        if held_bytes <= self.always_bytes {
            return Ok(standing);
        }
        let directory = self.directory.clone();
        let space = match directory {
            Some(directory) => Some(blocking(move || space(&directory)).await?),
            None => None,
        };
        match self.too_much(held_bytes, space) {
            None => Ok(standing),
            Some(what) => {
                Err(Failure::new(Code::WalHeld, Action::Retry, what).with_hint(
                    "The repository takes WAL more slowly than the server writes it: look at the store and the way to \
                     it. backup.wal_held_max_bytes and backup.wal_free_min_bytes in the worker's configuration are the \
                     limits.",
                ))
            }
        }
    }

    /// Does `work` and looks at the server beside it, also while `work` waits for the store. `work` is dropped when the
    /// backup has to end.
    pub(super) async fn beside<T>(
        &self,
        session: &BackupSession,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let looking = async {
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                if let Err(failure) = self.look(session).await {
                    return failure;
                }
            }
        };
        tokio::select! {
            biased;
            done = work => done,
            failure = looking => Err(failure),
        }
    }

    /// Why so much WAL may not be held, if so.
    fn too_much(&self, held_bytes: u64, space: Option<Space>) -> Option<String> {
        if held_bytes <= self.always_bytes {
            return None;
        }
        let held = format!("the backup's replication slot holds {held_bytes} bytes of WAL back");
        if held_bytes > self.max_bytes {
            return Some(format!("{held}, more than the {} it may", self.max_bytes));
        }
        let (Space { total_bytes, free_bytes }, directory) = (space?, self.directory.as_ref()?);
        let directory = directory.display();
        let by_share = total_bytes / 100 * RESERVE_PERCENT;
        let reserve_bytes =
            self.reserve_bytes.unwrap_or(by_share.clamp(RESERVE_BYTES, RESERVE_MAX_BYTES));
        (free_bytes < reserve_bytes).then(|| {
            format!(
                "{held}, and {directory} has {free_bytes} of {total_bytes} bytes left, fewer than the {reserve_bytes} \
                 that stay free"
            )
        })
    }
}

fn space(directory: &Path) -> Result<Space, Failure> {
    match rustix::fs::statvfs(directory) {
        Ok(found) => Ok(Space {
            total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
            free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
        }),
        Err(error) => {
            let message =
                format!("failed to ask for the free space of {}: {error}", directory.display());
            Err(Failure::new(Code::SourceUnreadable, Action::Retry, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn hold(max_bytes: u64, reserve_bytes: Option<u64>) -> Hold {
        let config = BackupConfig {
            wal_held_max_bytes: max_bytes,
            wal_free_min_bytes: reserve_bytes,
            ..BackupConfig::default()
        };
        Hold::new(Some(Path::new("/data")), 16 << 20, &config)
    }

    #[test]
    fn a_backup_ends_at_its_limit_and_not_before() {
        let roomy = Space { total_bytes: 100 * GIB, free_bytes: 50 * GIB };
        assert_eq!(hold(GIB, None).too_much(GIB, Some(roomy)), None);
        let text = hold(GIB, None).too_much(GIB + 1, Some(roomy)).unwrap();
        assert!(text.contains("1073741825") && text.contains("1073741824"), "{text}");
        // A limit below what a backup cannot do without would end every backup.
        assert_eq!(hold(MIB, None).too_much(64 * MIB, Some(roomy)), None);
    }

    #[test]
    fn the_disk_keeps_a_reserve_of_a_twentieth_between_one_and_sixteen_gibibytes() {
        let held = 100 * MIB;
        let at = |total, free, reserve| {
            let space = Space { total_bytes: total, free_bytes: free };
            hold(64 * GIB, reserve).too_much(held, Some(space)).is_some()
        };
        assert!(!at(10 * GIB, GIB, None));
        assert!(at(10 * GIB, GIB - 1, None));
        assert!(!at(100 * GIB, 5 * GIB, None));
        assert!(at(100 * GIB, 5 * GIB - MIB, None));
        assert!(!at(1000 * GIB, 16 * GIB, None));
        assert!(at(1000 * GIB, 16 * GIB - 1, None));
        assert!(!at(10_000 * GIB, 450 * GIB, None), "a large volume with room is no danger");
        assert!(!at(1000 * GIB, GIB, Some(GIB)), "the configuration may ask for less");
        assert!(at(1000 * GIB, 99 * GIB, Some(100 * GIB)), "and for more");
        assert!(!at(1000 * GIB, 0, Some(0)), "0 switches it off");
    }

    #[test]
    fn a_disk_that_was_full_before_is_not_the_backup_s_doing() {
        let full = Space { total_bytes: 10 * GIB, free_bytes: 0 };
        assert_eq!(hold(GIB, None).too_much(64 * MIB, Some(full)), None);
        assert!(hold(GIB, None).too_much(64 * MIB + 1, Some(full)).is_some());
    }
}
