//! The two ends of the WAL archive: what a server hands over is checked and stored, what it asks for is fetched and checked.
//!
//! Both work with the server's files and the repository alone, without coordinator, broker or connection to the server. How
//! an outcome is told to the server, and for how long it is tried, is the command line's affair.

mod branch;
mod buffers;
mod calling;
mod gap;
mod get;
mod lineage;
mod patience;
mod push;
mod reach;
pub mod service;
mod tablespaces;
mod windows;

use std::path::{Path, PathBuf};

use postgres::control_file::ControlFile;
use postgres::wal::{Segment, SegmentHeader, WalOrigin};
use proto::wal::SegmentName;
use proto::{Action, Code, Failure, SystemIdentifier, Timeline, WalFileName};

pub use calling::Calling;
pub(crate) use calling::quoted;
pub use get::{Got, get};
pub use lineage::Whose;
pub use patience::patiently;
pub use push::{Pushed, push};
pub(crate) use reach::{NoWay, Reach, way_to};
pub use tablespaces::Until;
#[cfg(test)]
pub(crate) use tests::segment as segment_for_tests;
pub(crate) use windows::lost_before;
pub use windows::{Damaged, Gap, Recoverable, Window, recoverable};

use crate::context::blocking;

/// What the server's own files say of it, where they are at hand.
#[derive(Debug, Clone, Copy)]
struct Server {
    system_identifier: SystemIdentifier,
    segment_size: u32,
    catalog_version: u32,
    /// The newest timeline that it has come to.
    timeline: Timeline,
    /// Absent where `PG_VERSION` cannot be read.
    major: Option<u32>,
}

/// The server whose `pg_wal` a path leads into: its data directory is two levels above, as the server itself writes such
/// paths. `None` where there is no control file: a person works somewhere else.
async fn server_of(path: &Path) -> Result<Option<Server>, Failure> {
    let directory = data_directory(path);
    blocking(move || {
        if !repository::paths::is_data_directory(&directory) {
            return Ok(None);
        }
        let control = ControlFile::read(&directory)?;
        let major = std::fs::read_to_string(directory.join("PG_VERSION")).ok();
        Ok(Some(Server {
            system_identifier: control.system_identifier,
            segment_size: control.wal_segment_size,
            catalog_version: control.catalog_version,
            timeline: control.timeline.max(control.min_recovery_timeline),
            major: major.and_then(|text| text.trim().parse().ok()),
        }))
    })
    .await
}

fn data_directory(path: &Path) -> PathBuf {
    match path.parent().and_then(Path::parent) {
        Some(above) if !above.as_os_str().is_empty() => above.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The segment whose content a file has, if it has one's.
fn segment_of(file: &WalFileName) -> Option<SegmentName> {
    match file {
        WalFileName::Segment(name) | WalFileName::Partial(name) => Some(*name),
        WalFileName::History(_) | WalFileName::BackupLabel(..) => None,
    }
}

/// Holds a segment's bytes against its name, its cluster and, where it is known, the server. The error says what does not fit.
fn verify(
    name: SegmentName,
    content: &[u8],
    system_identifier: SystemIdentifier,
    server: Option<Server>,
) -> Result<(), String> {
    let size = server.map_or_else(
        || u32::try_from(content.len()).unwrap_or(u32::MAX),
        |server| server.segment_size,
    );
    if content.len() as u64 != u64::from(size) {
        return Err(format!("it has {} bytes, not {size}", content.len()));
    }
    let header = SegmentHeader::parse(content)?;
    let segment: Segment = name
        .segment(size)
        .ok_or_else(|| format!("there is no such segment among those of {size} bytes"))?;
    let major = server.and_then(|server| server.major).unwrap_or_else(|| header.major());
    WalOrigin { major, system_identifier, segment_size: size }.verify(segment, content)
}

fn refused(file: &WalFileName, what: &str) -> Failure {
    Failure::new(Code::WalRefused, Action::FixData, format!("failed to archive {file}: {what}"))
        .with_hint("Nothing was stored; the server keeps the file and asks again.")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// A segment of 1 MiB as PostgreSQL 15 begins it.
    pub(crate) fn segment(timeline: u32, start: u64, system_identifier: u64) -> Vec<u8> {
        let mut bytes = vec![0; MIB];
        bytes[..2].copy_from_slice(&0xD110_u16.to_ne_bytes());
        bytes[2..4].copy_from_slice(&2_u16.to_ne_bytes());
        bytes[4..8].copy_from_slice(&timeline.to_ne_bytes());
        bytes[8..16].copy_from_slice(&start.to_ne_bytes());
        bytes[24..32].copy_from_slice(&system_identifier.to_ne_bytes());
        bytes[32..36].copy_from_slice(&(1_u32 << 20).to_ne_bytes());
        bytes[36..40].copy_from_slice(&8192_u32.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_segment_is_what_its_name_its_cluster_and_its_server_say() {
        let name = SegmentName { timeline: Timeline(10), high: 0, low: 5 };
        let start = 5 << 20;
        let ours = SystemIdentifier(7);
        let server = Server {
            system_identifier: ours,
            segment_size: 1 << 20,
            catalog_version: 1,
            timeline: Timeline(10),
            major: Some(15),
        };
        let good = segment(10, start, 7);
        for server in [None, Some(server)] {
            verify(name, &good, ours, server).unwrap();
            // A promotion begins its first segment as a copy of the one before.
            verify(name, &segment(9, start, 7), ours, server).unwrap();
            for (bad, why) in [
                (segment(10, start, 8), "system identifier 8"),
                (segment(11, start, 7), "of timeline 11"),
                (segment(10, 6 << 20, 7), "its name says"),
                (vec![0; MIB], "does not begin like a segment"),
                (good[..MIB / 2].to_vec(), "bytes"),
                (Vec::new(), ""),
            ] {
                let what = verify(name, &bad, ours, server).unwrap_err();
                assert!(what.contains(why), "{what}");
            }
        }
        let newer = Server { major: Some(16), ..server };
        assert!(verify(name, &good, ours, Some(newer)).unwrap_err().contains("PostgreSQL 15"));
        let larger = Server { segment_size: 16 << 20, ..server };
        assert!(verify(name, &good, ours, Some(larger)).unwrap_err().contains("not 16777216"));
    }
}
