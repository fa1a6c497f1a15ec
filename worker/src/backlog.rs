//! What a server keeps in `pg_wal` because it is not archived. A store that is away says nothing, and the server fills its disk
//! meanwhile; so it is asked of the server's own directory, where that is at hand.

use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use proto::WalFileName;
use proto::message::WalBacklog;

/// A segment that has waited for less is on its way.
const LATE_MS: i64 = 30_000;

/// Looks at a data directory; `None` while nothing is late.
pub(crate) fn look(data_directory: &Path, now_ms: i64) -> io::Result<Option<WalBacklog>> {
    let pg_wal = data_directory.join("pg_wal");
    let (mut segments, mut since_ms) = (0, i64::MAX);
    for entry in std::fs::read_dir(pg_wal.join("archive_status"))? {
        let entry = entry?;
        // What is archived meanwhile loses its mark.
        if is_waiting_segment(&entry.file_name().to_string_lossy())
            && let Ok(marked) = entry.metadata().and_then(|mark| mark.modified())
        {
            segments += 1;
            since_ms = since_ms.min(unix_ms(marked));
        }
    }
    if now_ms.saturating_sub(since_ms) < LATE_MS {
        return Ok(None);
    }
    let mut pg_wal_bytes = 0;
    for entry in std::fs::read_dir(&pg_wal)? {
        let file = entry?.metadata().ok().filter(std::fs::Metadata::is_file);
        pg_wal_bytes += file.map_or(0, |file| file.len());
    }
    Ok(Some(WalBacklog { segments, since_ms, pg_wal_bytes }))
}

fn is_waiting_segment(mark: &str) -> bool {
    let file = mark.strip_suffix(".ready").and_then(|name| name.parse().ok());
    matches!(file, Some(WalFileName::Segment(_)))
}

fn unix_ms(time: SystemTime) -> i64 {
    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn segments_that_wait_are_counted_once_the_oldest_is_late() {
        let place = tempfile::tempdir().unwrap();
        let pg_wal = place.path().join("pg_wal");
        std::fs::create_dir_all(pg_wal.join("archive_status")).unwrap();
        let write = |name: &str, bytes: usize| {
            std::fs::write(pg_wal.join(name), vec![0; bytes]).unwrap();
        };
        for (name, mark) in [
            ("000000010000000000000001", ".done"),
            ("000000010000000000000002", ".ready"),
            ("000000010000000000000003", ".ready"),
            ("00000002.history", ".ready"),
        ] {
            write(name, 1_000);
            write(&format!("archive_status/{name}{mark}"), 0);
        }
        write("000000010000000000000004", 500);
        let now_ms = clock::now_ms();
        assert_eq!(look(place.path(), now_ms).unwrap(), None, "they may be on their way");
        let late = look(place.path(), now_ms + LATE_MS + 1_000).unwrap().unwrap();
        assert_eq!((late.segments, late.pg_wal_bytes), (2, 4_500));
        assert!((now_ms - 60_000..=now_ms + 1_000).contains(&late.since_ms), "{late:?}");
        for number in [2, 3] {
            let mark = |what| {
                pg_wal.join(format!("archive_status/00000001000000000000000{number}.{what}"))
            };
            std::fs::rename(mark("ready"), mark("done")).unwrap();
        }
        assert_eq!(look(place.path(), now_ms + 86_400_000).unwrap(), None);
    }
}
