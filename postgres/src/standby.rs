//! A standby as the source of a backup: how far it is behind, and whether it still follows the timeline it did.
//!
//! A standby cannot tell the age of its primary's newest transaction, only that of the newest it has heard of. So the
//! figure here is too high where the primary is idle and nothing streams. It counts from the server that this one
//! streams from: how far that one is behind is not known here.

use std::path::Path;

use proto::Timeline;

use crate::error::Error;
use crate::files::ServerFiles;
use crate::process::Result;
use crate::session::Session;
use crate::wal::WalFileName;

/// A receiver that streams and has handed over everything leaves nothing to be behind of. Otherwise the newest sign of life in
/// what was replayed counts: a transaction's end, or the checkpoint of the last restartpoint.
const LAG: &str = "\
-- pgmuster: replay lag
SELECT CASE WHEN EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming'
                     AND last_msg_receipt_time > clock_timestamp() - interval '2 minutes')
             AND pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn() THEN 0
            ELSE extract(epoch FROM clock_timestamp()
                 - greatest(pg_last_xact_replay_timestamp(), (SELECT checkpoint_time FROM pg_control_checkpoint())))
       END::int8";

/// How old what a standby shows may be, seconds; 0 when it has replayed all that a sender has sent it which spoke lately.
pub async fn lag_s(session: &Session) -> Result<u64> {
    let seconds: i64 = session.one("ask how far the standby is behind", LAG, &[]).await?.get(0);
    // Clocks may differ: a transaction of the future is no lag.
    Ok(u64::try_from(seconds).unwrap_or(0))
}

const REPLAYED_TO: &str = "\
-- pgmuster: what is replayed
SELECT floor(extract(epoch FROM greatest(pg_last_xact_replay_timestamp(), checkpoint_time)) * 1000)::int8
  FROM pg_control_checkpoint()";

/// A standby has replayed every transaction that its primary had committed by then, by the primary's clock, Unix milliseconds.
pub async fn replayed_to_ms(session: &Session) -> Result<i64> {
    let row = session.one("ask what the standby has replayed", REPLAYED_TO, &[]).await?;
    Ok(row.get(0))
}

/// Refuses WAL of a server that has heard of a timeline after `timeline`: positions may mean other bytes there. A standby
/// knows the history of a timeline before it replays anything of it, and keeps it in `pg_wal`. Blocking; reads names only.
pub fn require_timeline(files: &dyn ServerFiles, timeline: Timeline) -> Result<()> {
    let wal = Path::new("pg_wal");
    let names = files.names(wal).map_err(|source| files.unreadable(wal, source))?;
    for name in names.unwrap_or_default() {
        let file = name.to_str().and_then(|name| name.parse().ok());
        if let Some(WalFileName::History(known)) = file
            && known > timeline
        {
            let what = format!(
                "the standby knows timeline {known} ({} is in pg_wal), the backup began on timeline {timeline}",
                name.display()
            );
            return Err(Error::SessionLost { what, source: None });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::LocalFiles;

    #[test]
    fn a_later_timeline_is_noticed_by_its_history() {
        let place = tempfile::tempdir().unwrap();
        let wal = &place.path().join("pg_wal");
        std::fs::create_dir(wal).unwrap();
        let files = &LocalFiles::new(place.path());
        for name in
            ["00000002.history", "000000020000000000000003", "0000000300000000000000FF.partial"]
        {
            std::fs::write(wal.join(name), "").unwrap();
        }
        require_timeline(files, Timeline(2)).unwrap();
        std::fs::write(wal.join("0000000A.history"), "").unwrap();
        let error = require_timeline(files, Timeline(2)).unwrap_err();
        assert!(error.to_string().contains("0000000A.history"), "{error}");
        require_timeline(files, Timeline(10)).unwrap();
    }
}
