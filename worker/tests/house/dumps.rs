//! Logical backups of a house's server.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use postgres::instance::InstanceOptions;
use proto::Failure;
use proto::job::{Backup, BackupOutcome, PgDump};
use worker::context::JobContext;
use worker::engines::pg_dump::{BackupRequest, back_up};

use super::{House, eventually};

pub(crate) async fn quick(major: u32) -> House {
    House::new(major, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await
}

pub(crate) fn scope(databases: &[&str], exclude: &[&str]) -> PgDump {
    let patterns = |list: &[&str]| list.iter().map(|text| text.parse().unwrap()).collect();
    PgDump { databases: patterns(databases), exclude: patterns(exclude) }
}

pub(crate) async fn dump_with(
    house: &House,
    cx: &JobContext,
    scope: &PgDump,
    bin_dirs: &[PathBuf],
) -> Result<BackupOutcome, Failure> {
    let task = Backup { pg_dump: Some(scope.clone()), ..Backup::default() };
    let request = BackupRequest {
        cluster: house.places.cluster(&"orders".parse().unwrap())?,
        repository: &house.repository,
        config: &house.config.backup,
        bin_dirs,
        by: "w1",
        task: &task,
        scope,
    };
    back_up(cx, request).await
}

pub(crate) async fn dump(house: &House, scope: &PgDump) -> Result<BackupOutcome, Failure> {
    let bin_dirs = [house.server.binaries().directory().to_owned()];
    dump_with(house, &house.cx(), scope, &bin_dirs).await
}

/// Programs that stand in for the real ones; `pg_dump` does as the script says, in which `$REAL` is the real one.
pub(crate) fn programs(house: &House, name: &str, script: &str) -> Vec<PathBuf> {
    let directory = house.place.path().join(name);
    std::fs::create_dir(&directory).unwrap();
    let real = house.server.binaries().directory();
    for program in ["pg_dumpall", "pg_restore"] {
        std::os::unix::fs::symlink(real.join(program), directory.join(program)).unwrap();
    }
    let path = directory.join("pg_dump");
    let text = format!(
        "#!/bin/bash\nREAL={}/pg_dump\nif [ \"$1\" = --version ]; then exec $REAL --version; fi\n{script}\n",
        real.display()
    );
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    vec![directory]
}

pub(crate) const WAITING: &str = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgmuster/%' \
                       AND wait_event_type = 'Lock'";

/// Waits until a dump stands in the queue for a lock.
pub(crate) async fn stands_still(house: &House) {
    let looked = async || (house.number(WAITING).await > 0).then_some(());
    eventually("a dump waits for a lock", Duration::from_secs(30), looked).await;
}
