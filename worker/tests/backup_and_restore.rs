//! The engine without a queue: a running server is backed up, restored with the repository and its key alone, booted,
//! and equal.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

mod house;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use house::{
    DATA, House, back_up_and_meanwhile, bin_dir, copies, eventually, nothing_is_left_on, number,
    run_sql, session, start_plainly,
};
use postgres::binaries::Binaries;
use postgres::instance::{Instance, InstanceOptions, StopMode};
use postgres::scan::EXTERNAL_ROOT;
use proto::backup::{SilentChanges, TableCount};
use proto::job;
use proto::message::Spec;
use proto::{Action, BackupId, Code, Failure, ProofLevel};
use repository::Outcome;
use worker::context::JobContext;
use worker::proving;
use worker::restoring::{self, Destination};

/// A server with data, on which autovacuum changes no pages that nobody wrote to.
async fn still() -> House {
    let settings = vec![("autovacuum".to_owned(), "off".to_owned())];
    let options = InstanceOptions { fsync: false, settings, ..InstanceOptions::default() };
    let house = House::new(15, options).await;
    house.sql(DATA).await;
    house
}

async fn restores_and_is_proved(major: u32) {
    let house =
        House::new(major, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    let outcome = house.back_up().await;
    assert_eq!(outcome.server_version_num / 10_000, major);
    assert!(outcome.stop_lsn > outcome.start_lsn);
    nothing_is_left_on(&house).await;

    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);
    assert_eq!(proof.level_reached, Some(ProofLevel::L5));
    assert!(proof.reached_lsn.unwrap() >= outcome.stop_lsn);
    assert!(proof.rows >= 50_003, "{proof:#?}");
    assert!(proof.tables_exact >= 3, "{proof:#?}");

    // The same by hand: the repository, its key, an empty directory, and a server.
    let repository = house.reopened().await;
    let backup = restoring::find(&repository, None, None, Some(outcome.backup)).await.unwrap();
    let directory = house.place.path().join("restored");
    let destination = Destination::below(&directory, backup.facts());
    let done = restoring::restore(&house.cx(), &backup, &destination, 2).await.unwrap();
    // Both say the same of what they have in common, and WAL is told apart.
    assert_eq!(done.files - done.wal_files, outcome.files);
    assert_eq!(done.size_bytes - done.wal_bytes, outcome.size_bytes);
    assert_eq!(done.wal_bytes, outcome.wal_bytes);
    assert!(directory.join("backup_label").exists());
    let url = start_plainly(&directory, major).await;
    assert_eq!(number(&url.1, "SELECT count(*) FROM public.orders").await, 50_000);
    assert_eq!(number(&url.1, "SELECT sum(x) FROM public.\"Odd \"\"name\"\"\"").await, 6);
    assert_eq!(number(&url.1, "SELECT count(*) FROM public.fleeting").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_15_restores_and_is_proved() {
    Box::pin(restores_and_is_proved(15)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_18_restores_and_is_proved() {
    Box::pin(restores_and_is_proved(18)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asserted_of_a_cluster_is_asked_of_its_restored_copy() {
    let mut house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    house.back_up().await;
    // It is the copy that is asked.
    house.sql("DELETE FROM public.orders").await;
    house.assert_of_postgres(&[("all-there", "SELECT count(*) = 50000 FROM public.orders")]);
    let proof = house.prove(ProofLevel::L6).await;
    assert!(proof.passed, "{:#?}", proof.checks);
    assert_eq!(proof.level(), Some(ProofLevel::L6));
    let sentence = proving::sentence(&proof);
    assert!(sentence.contains("PROVED (L6)") && sentence.contains("match, 1 assertion holds"));

    house.assert_of_postgres(&[
        ("all-there", "SELECT count(*) = 50000 FROM public.orders"),
        ("none", "SELECT count(*) = 0 FROM public.orders"),
        ("writes", "DELETE FROM public.orders WHERE id = 1 RETURNING true"),
        ("tells", "SELECT 'password=hunter2'::int = 1"),
        ("late", house::ENDLESS),
    ]);
    let proof = house.prove(ProofLevel::L6).await;
    assert_eq!((proof.passed, proof.level()), (false, Some(ProofLevel::L5)));
    assert_eq!(house::unmet(&proof), ["none"]);
    assert_eq!(house::unasked(&proof), ["writes", "tells", "late"]);
    let failure = proving::shortfall(&proof, None).unwrap();
    assert_eq!((failure.code, failure.action), (Code::ProofFailed, Action::FixData));
    let why = "reached L5 of L6: assertion none (false) does not hold; assertions writes (";
    for why in [why, "read-only transaction", "no answer within 1s) could not be asked"] {
        assert!(failure.message.contains(why), "{why}: {failure}");
    }
    assert!(!format!("{proof:?}").contains("hunter2"), "{proof:#?}");

    // What could not be asked proves nothing, and is nothing against the backup.
    house.assert_of_postgres(&[
        ("all-there", "SELECT count(*) = 50000 FROM public.orders"),
        ("typo", "SELECT count(*) = 50000 FROM public.order"),
    ]);
    let proof = house.prove(ProofLevel::L6).await;
    assert_eq!((proof.passed, proof.proved()), (false, Some(ProofLevel::L5)));
    let failure = proving::shortfall(&proof, None).unwrap();
    assert_eq!(failure.action, Action::FixConfig);
    let why = "is proved at L5, L6 was asked: assertion typo (";
    assert!(
        failure.message.contains(why) && failure.message.contains("does not exist"),
        "{failure}"
    );
    let sentence = proving::sentence(&proof);
    assert!(sentence.starts_with("orders is PROVED (L5), not L6 as asked: "), "{sentence}");
    assert!(sentence.ends_with("1 assertion holds, 1 assertion could not be asked"), "{sentence}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_remembers_that_its_role_may_not_count_and_its_proof_names_the_grant() {
    let mut house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    house
        .sql(
            "CREATE ROLE backup LOGIN REPLICATION; GRANT pg_read_all_settings TO backup;
             GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO backup",
        )
        .await;
    let of_superuser = house.server.url("postgres");
    house.reconnect(&of_superuser.replace("postgres@", "backup@"));
    let blind = house.back_up().await;
    let forbidden = blind.forbidden.clone().expect("it may read no table");
    assert_eq!(forbidden.role, "backup");
    assert!(forbidden.tables > 2 && forbidden.first.ends_with(" in postgres"), "{forbidden:?}");
    let repository = house.reopened().await;
    let stored = restoring::find(&repository, None, None, Some(blind.backup)).await.unwrap();
    let census = stored.facts().census.clone().unwrap();
    assert_eq!(census.forbidden.as_ref(), Some(&forbidden), "the backup itself says so");

    let proof = house.prove(ProofLevel::L5).await;
    assert_eq!(
        (proof.passed, proof.proved()),
        (false, Some(ProofLevel::L4)),
        "{:#?}",
        proof.checks
    );
    let failure = proving::shortfall(&proof, census.forbidden.as_ref()).unwrap();
    assert!(failure.message.contains("role backup may not read "), "{failure}");
    assert!(failure.hint.contains(&forbidden.cure()), "{}", failure.hint);
    assert!(proving::sentence(&proof).starts_with("orders is PROVED (L4), not L5 as asked: "));

    house.sql(&forbidden.cure()).await;
    let counted = house.back_up().await;
    assert_eq!(counted.forbidden, None);
    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_backup_stores_what_changed_and_restores_alone() {
    let house = still().await;
    // Whoever reads a row for the first time, as the census does, marks its page; vacuum has done so for all of them.
    house.sql("VACUUM (FREEZE)").await;
    house.sql("CHECKPOINT").await;
    let first = house.back_up().await;
    house.sql("UPDATE public.orders SET note = 'x' WHERE id = 7").await;
    house.sql("CHECKPOINT").await;
    let second = house.back_up().await;
    assert_eq!(second.compared_with, Some(first.backup));
    assert!(
        second.stored_bytes * 4 < first.stored_bytes,
        "first {} second {}",
        first.stored_bytes,
        second.stored_bytes
    );
    let proof = house.prove(ProofLevel::L5).await;
    assert_eq!(proof.backup, second.backup);
    assert!(proof.passed, "{:#?}", proof.checks);

    // What an order asks for; the configuration gives two threads, and sets no limit.
    let cx = house.cx();
    let task = job::Backup {
        full_read: true,
        processes: Some(1),
        rate_limit_bytes: Some(1 << 30),
        ..job::Backup::default()
    };
    let third = house.back_up_of(&cx, task).await.unwrap();
    assert!(third.read_bytes >= first.read_bytes, "{first:?} {third:?}");
    let steps = cx.steps();
    let copy = &steps.iter().find(|step| step.name == "copy").unwrap().figures;
    assert_eq!((copy["threads"], copy["rate_limit_bytes"]), (1, 1 << 30));
}

/// What the census of a backup says of a table in schema `public`.
async fn counted(house: &House, backup: BackupId, table: &str) -> TableCount {
    let repository = house.reopened().await;
    let found = restoring::find(&repository, None, None, Some(backup)).await.unwrap();
    let census = found.facts().census.clone().unwrap();
    let tables = census.databases.into_iter().flat_map(|database| database.tables);
    tables.into_iter().find(|count| count.table == table).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_tables_whose_files_changed_are_counted_again() {
    let mut house = still().await;
    house.sql("CREATE TABLE public.busy AS SELECT 1 AS id").await;
    house.sql("VACUUM (FREEZE)").await;
    house.sql("CHECKPOINT").await;
    // A file is believed to be what it was once the backup before has found it unchanged for more than two seconds.
    let until_taken_over = async {
        let mut before: Option<i64> = None;
        loop {
            house.sql("INSERT INTO public.busy VALUES (1)").await;
            let backup = house.back_up().await.backup;
            let orders = counted(&house, backup, "orders").await;
            let counted_at_ms = orders.file.unwrap().counted_at_ms;
            if before == Some(counted_at_ms) {
                return (backup, counted_at_ms);
            }
            before = Some(counted_at_ms);
        }
    };
    let waiting = tokio::time::timeout(Duration::from_mins(1), Box::pin(until_taken_over));
    let (backup, counted_at_ms) = waiting.await.unwrap();
    let rows = session(&house.server.url("postgres")).await;
    let rows = rows.one("count", "SELECT count(*) FROM public.busy", &[]).await.unwrap();
    let busy = counted(&house, backup, "busy").await;
    assert_eq!(busy.rows, Some(rows.get::<_, i64>(0).unsigned_abs()));
    assert!(busy.file.unwrap().counted_at_ms > counted_at_ms);
    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.backup == backup && proof.passed, "{:#?}", proof.checks);

    // A server that was started anew may have been set back together with its files.
    house.server.stop(StopMode::Fast).await.unwrap();
    house.server.start().await.unwrap();
    let backup = house.back_up().await.backup;
    assert!(counted(&house, backup, "orders").await.file.unwrap().counted_at_ms > counted_at_ms);
}

/// Changes a byte of a file without a trace in its times: `tmpfs` notes no writes through a mapping.
fn change_silently(file: &Path) {
    let times = || {
        let metadata = file.metadata().unwrap();
        (metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec())
    };
    let before = times();
    let script = "import mmap, sys\n\
                  with open(sys.argv[1], 'r+b') as file, mmap.mmap(file.fileno(), 0) as memory: memory[5] ^= 1";
    let mut python = std::process::Command::new("/usr/bin/python3");
    assert!(python.args(["-c", script]).arg(file).status().unwrap().success());
    assert_eq!(times(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_change_that_no_time_told_all_is_read_until_nothing_of_the_kind_is_found() {
    let house = still().await;
    let space = tempfile::tempdir_in("/dev/shm").unwrap();
    house.sql(&format!("CREATE TABLESPACE swift LOCATION '{}'", space.path().display())).await;
    house.sql("CREATE TABLE public.there TABLESPACE swift AS SELECT 1 AS id").await;
    house.sql("CHECKPOINT").await;
    let only = |place: PathBuf| std::fs::read_dir(place).unwrap().next().unwrap().unwrap().path();
    let database = only(only(space.path().to_owned()));
    let note = database.join("note");
    std::fs::write(&note, vec![7; 100_000]).unwrap();
    let written = note.metadata().unwrap().modified().unwrap();
    let written = written.duration_since(std::time::UNIX_EPOCH).unwrap();
    let written_ms = i64::try_from(written.as_millis()).unwrap();
    // What it says, and how much of the files was not read.
    let back_up = async |full_read: bool| {
        let cx = house.cx();
        let task = job::Backup { full_read, ..job::Backup::default() };
        let outcome = house.back_up_of(&cx, task).await.unwrap();
        let steps = cx.steps();
        let copy = steps.iter().find(|step| step.name == "copy").unwrap();
        (outcome, copy.figures["unread_bytes"])
    };
    // By its times a file need not be read once a backup has found it unchanged for more than two seconds.
    let until_it_need_not_be_read =
        async { while back_up(false).await.0.started_at_ms < written_ms + 3_000 {} };
    tokio::time::timeout(Duration::from_mins(1), until_it_need_not_be_read).await.unwrap();

    change_silently(&note);
    let (usual, unread) = back_up(false).await;
    assert_eq!(usual.silent_changes, None, "nobody has looked");
    assert!(unread > usual.size_bytes / 2, "{unread} of {usual:?}");
    let (found, unread) = back_up(true).await;
    let SilentChanges { units, files } = found.silent_changes.unwrap();
    assert_eq!((units, files.len(), unread), (1, 1, 0));
    assert!(files[0].starts_with("pg_tblspc/") && files[0].ends_with("/note"), "{files:?}");

    // The one before it knows of nothing, and would be believed.
    let forget = format!("repository/lineages/{}/backups/{}/forget", found.lineage, found.backup);
    std::fs::write(house.place.path().join(forget), "\n").unwrap();
    let (found, unread) = back_up(false).await;
    assert_eq!((found.compared_with, unread), (Some(usual.backup), 0), "no times are believed");
    assert!(found.changed_files.unwrap().contains("a newer backup cannot be compared with"));
    assert_eq!(found.silent_changes.unwrap().units, 1);

    let (next, unread) = back_up(false).await;
    assert_eq!((next.compared_with, unread), (Some(found.backup), 0), "no times are believed");
    assert!(next.changed_files.unwrap().contains("though their times and sizes had not"));
    assert_eq!(next.silent_changes, None);
    let (last, unread) = back_up(false).await;
    assert!(unread > last.size_bytes / 2, "{unread} of {last:?}");
    assert!(!last.changed_files.unwrap().contains("though their times and sizes had not"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_in_the_middle_fails_the_backup_and_nothing_is_committed() {
    let mut house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    let pid = house.server.pid().unwrap();
    let unplug = async {
        std::process::Command::new("kill").args(["-QUIT", &pid.to_string()]).status().unwrap();
    };
    let failure = Box::pin(back_up_and_meanwhile(&house, unplug)).await;
    assert!(
        matches!(failure.code, Code::BackupSessionLost | Code::ServerUnreachable),
        "{failure:?}"
    );
    house.server.stop(StopMode::Immediate).await.ok();
    house.server.start().await.unwrap();
    let repository = house.reopened().await;
    let lineages = repository.list_lineages().await.unwrap();
    assert!(repository.list_backups(lineages[0].lineage).await.unwrap().is_empty());
    nothing_is_left_on(&house).await;
    let next = house.back_up().await;
    assert_eq!(next.compared_with, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_backup_leaves_nothing_on_the_server_and_cannot_commit() {
    let house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    let cx = house.cx();
    let stop = cx.clone();
    let canceller = tokio::spawn(async move {
        copies(&stop).await;
        stop.stop(Failure::new(Code::Cancelled, Action::Abandon, "cancelled by the test"));
    });
    let failure = house.back_up_as(&cx).await.unwrap_err();
    canceller.await.unwrap();
    assert_eq!(failure.code, Code::Cancelled);
    nothing_is_left_on(&house).await;
    let repository = house.reopened().await;
    let lineage = repository.list_lineages().await.unwrap()[0].lineage;
    let attempts = repository.list_attempts(lineage).await.unwrap();
    assert_eq!(attempts.len(), 1);
    assert!(attempts[0].verdict.is_some() && attempts[0].backup().is_none());
}

/// It is stopped when nothing but its verdict is missing: the next attempt finds everything stored but what changed since.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_stopped_backup_had_stored_is_not_stored_again_and_the_outcome_says_so() {
    let mut house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    house.config.backup.checkpoint_s = 0;
    let itself: Arc<OnceLock<JobContext>> = Arc::default();
    let cx = {
        let (spec, itself) = ((*house.cx().spec).clone(), Arc::clone(&itself));
        JobContext::new(
            spec,
            Arc::new(move |step| {
                if step.name == "commit" {
                    let why = Failure::new(Code::Cancelled, Action::Abandon, "stopped by the test");
                    itself.get().unwrap().stop(why);
                }
            }),
        )
    };
    itself.set(cx.clone()).unwrap();
    let failure = house.back_up_as(&cx).await.unwrap_err();
    assert_eq!(failure.code, Code::Cancelled);
    let done = house.back_up().await;
    assert_eq!(done.compared_with, None);
    assert!(done.taken_over_bytes > done.size_bytes / 2, "{done:?}");
    // A segment of WAL, and what the server wrote between the two.
    assert!(done.stored_bytes < done.taken_over_bytes / 8, "{done:?}");
    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);
    // All of it was read.
    assert_eq!((done.reread_bytes, done.reread_by_ms), (0, None));
    assert_eq!(house.back_up().await.taken_over_bytes, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_attempt_of_a_restore_waits_for_the_one_before() {
    let house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    house.back_up().await;
    let repository = house.reopened().await;
    let backup = restoring::find(&repository, None, None, None).await.unwrap();
    let directory = house.place.path().join("restored");
    let destination = Destination::below(&directory, backup.facts());
    // The restore of the attempt before is still at it.
    std::fs::create_dir(&directory).unwrap();
    let before = std::fs::File::open(&directory).unwrap();
    before.lock().unwrap();

    let first = house.cx();
    let refused = restoring::restore(&first, &backup, &destination, 2).await.unwrap_err();
    assert_eq!(refused.code, Code::TargetNotEmpty, "{refused}");
    let planned = restoring::plan(&first, &backup, &destination, 2).await.unwrap_err();
    for refused in [refused, planned] {
        assert!(refused.message.ends_with("another restore is writing there"), "{refused}");
        assert!(refused.hint.starts_with("Let it end."), "{refused:?}");
    }

    let spec = Spec { predecessor: Some(first.spec.attempt), ..(*house.cx().spec).clone() };
    let second = JobContext::new(spec, Arc::new(|_| {}));
    let restore = restoring::restore(&second, &backup, &destination, 2);
    tokio::pin!(restore);
    let waits = async {
        while second.current_progress().is_none_or(|now| !now.step.starts_with("wait")) {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        early = &mut restore => panic!("it ends while the other is there: {early:?}"),
        () = waits => {}
    }
    drop(before);
    restore.await.unwrap();
    assert!(directory.join("backup_label").exists());
}

/// The attempt has its ABORT, and the server nothing of it.
async fn was_given_up(house: &House, failure: &Failure) {
    assert_eq!((failure.code, failure.action), (Code::WalHeld, Action::Retry), "{failure:?}");
    nothing_is_left_on(house).await;
    let repository = house.reopened().await;
    let lineage = repository.list_lineages().await.unwrap()[0].lineage;
    let attempts = repository.list_attempts(lineage).await.unwrap();
    let verdict = attempts.last().unwrap().verdict.as_ref().unwrap();
    let Outcome::Abort { why } = &verdict.outcome else { panic!("{verdict:?}") };
    assert!(why.contains("WAL_HELD"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_stands_still_does_not_make_the_server_keep_wal_without_bound() {
    let mut house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    house.config.backup.wal_held_max_bytes = 96 << 20;
    let gated = house.with_gate().await;
    let failure = house.back_up_while_wal_is_written(8).await.unwrap_err();
    assert!(failure.message.contains("more than the 100663296"), "{failure}");
    was_given_up(&house, &failure).await;

    gated.open.send_replace(true);
    house.back_up().await;
    nothing_is_left_on(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_ends_before_it_fills_the_disk_of_pg_wal() {
    let mut house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    house.config.backup.wal_free_min_bytes = Some(u64::MAX);
    let gated = house.with_gate().await;
    gated.open.send_replace(true);
    house.back_up().await;

    gated.open.send_replace(false);
    let failure = house.back_up_while_wal_is_written(6).await.unwrap_err();
    assert!(failure.message.contains("that stay free"), "{failure}");
    was_given_up(&house, &failure).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tablespaces_and_settings_outside_the_data_directory_come_back() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    let space = house.place.path().join("space");
    std::fs::create_dir(&space).unwrap();
    let data = house.server.data_directory();
    let hba = house.place.path().join("pg_hba.conf");
    std::fs::copy(data.join("pg_hba.conf"), &hba).unwrap();
    // As private keys are: its owner may only read it.
    std::fs::write(data.join("server.key"), "secret").unwrap();
    std::fs::set_permissions(data.join("server.key"), std::fs::Permissions::from_mode(0o400))
        .unwrap();
    // Included files are settings, too.
    let included = house.place.path().join("conf.d");
    std::fs::create_dir(&included).unwrap();
    std::fs::write(included.join("memory.conf"), "work_mem = '7MB'\n").unwrap();
    house.server.set(&[("include_dir", included.to_str().unwrap())]).unwrap();
    house.server.set(&[("hba_file", hba.to_str().unwrap())]).unwrap();
    house.server.restart().await.unwrap();
    house.sql(DATA).await;
    house.sql(&format!("CREATE TABLESPACE elsewhere LOCATION '{}'", space.display())).await;
    house
        .sql("CREATE TABLE public.far TABLESPACE elsewhere AS SELECT g FROM generate_series(1, 20000) g")
        .await;
    let outcome = house.back_up().await;
    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);

    let repository = house.reopened().await;
    let backup = restoring::find(&repository, None, None, Some(outcome.backup)).await.unwrap();
    let directory = house.place.path().join("restored");
    let destination = Destination::below(&directory, backup.facts());
    restoring::restore(&house.cx(), &backup, &destination, 2).await.unwrap();
    let (oid, place) = destination.tablespaces.first_key_value().unwrap();
    let link = std::fs::read_link(directory.join("pg_tblspc").join(oid.to_string())).unwrap();
    assert_eq!(link, *place, "the link leads to the copy and not to production");
    let kept = format!("{EXTERNAL_ROOT}{}", included.join("memory.conf").display());
    assert_eq!(std::fs::read_to_string(directory.join(kept)).unwrap(), "work_mem = '7MB'\n");
    let key = std::fs::metadata(directory.join("server.key")).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o400);
    let (_running, url) = start_plainly(&directory, 15).await;
    assert_eq!(number(&url, "SELECT count(*) FROM public.far").await, 20_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn tablespaces_that_come_or_vanish_in_the_middle_fail_the_backup() {
    let house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    let space = house.place.path().join("space");
    std::fs::create_dir(&space).unwrap();
    let create = format!("CREATE TABLESPACE elsewhere LOCATION '{}'", space.display());
    let failure = Box::pin(back_up_and_meanwhile(&house, house.sql(&create))).await;
    assert_eq!((failure.code, failure.action), (Code::DataDirectoryShape, Action::Retry));
    nothing_is_left_on(&house).await;
    house.back_up().await;

    // As when its file system is unmounted: its files look dropped.
    let away = house.place.path().join("away");
    let unmount = async {
        std::fs::rename(&space, &away).unwrap();
        std::fs::create_dir(&space).unwrap();
    };
    let failure = Box::pin(back_up_and_meanwhile(&house, unmount)).await;
    assert_eq!(failure.code, Code::DataDirectoryShape, "{failure}");
    std::fs::remove_dir(&space).unwrap();
    std::fs::rename(&away, &space).unwrap();
    nothing_is_left_on(&house).await;
    let outcome = house.back_up().await;
    assert!(house.prove(ProofLevel::L5).await.passed, "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_page_is_told_by_every_backup_until_it_is_gone() {
    use std::os::unix::fs::FileExt as _;
    let options = InstanceOptions { fsync: false, checksums: true, ..InstanceOptions::default() };
    let mut house = House::new(15, options).await;
    house.sql(DATA).await;
    let path = {
        let session = session(&house.server.url("postgres")).await;
        let row =
            session.one("look", "SELECT pg_relation_filepath('public.orders')", &[]).await.unwrap();
        row.get::<_, String>(0)
    };
    house.server.stop(StopMode::Fast).await.unwrap();
    let file = house.server.data_directory().join(&path);
    let file = std::fs::File::options().write(true).open(file).unwrap();
    file.write_all_at(b"rotten", 3 * 8192 + 5000).unwrap();
    house.server.start().await.unwrap();

    // By its times a file need not be read once the backup before has found it unchanged for more than two seconds.
    let changed_at_ms = || {
        let changed = file.metadata().unwrap().modified().unwrap();
        let since = changed.duration_since(std::time::UNIX_EPOCH).unwrap();
        i64::try_from(since.as_millis()).unwrap()
    };
    let until_it_need_not_be_read = async {
        let mut before: Option<(i64, i64)> = None;
        loop {
            let changed = changed_at_ms();
            let outcome = house.back_up().await;
            assert_eq!(outcome.bad_pages, 1);
            let repository = house.reopened().await;
            let found = restoring::find(&repository, None, None, Some(outcome.backup)).await;
            let found = found.unwrap();
            let bad = &found.facts().bad_pages;
            assert_eq!((bad.len(), &bad[0].path, bad[0].block), (1, &path, 3));
            let settled =
                before.is_some_and(|(then, started)| then == changed && started > then + 3_000);
            if settled && changed == changed_at_ms() {
                return;
            }
            before = Some((changed, outcome.started_at_ms));
        }
    };
    tokio::time::timeout(Duration::from_mins(1), Box::pin(until_it_need_not_be_read))
        .await
        .unwrap();

    house.sql("DROP TABLE public.orders; CHECKPOINT").await;
    assert_eq!(house.back_up().await.bad_pages, 0);
}

/// The packs of a lineage.
fn packs(house: &House, lineage: proto::LineageId) -> Vec<PathBuf> {
    let packs = house.place.path().join(format!("repository/lineages/{lineage}/packs"));
    let mut files: Vec<PathBuf> = Vec::new();
    let mut open = vec![packs];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { open.push(path) } else { files.push(path) }
        }
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_after_a_damaged_index_does_not_refer_to_it() {
    let house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    let first = house.back_up().await;
    for pack in packs(&house, first.lineage) {
        let mut bytes = std::fs::read(&pack).unwrap();
        // The type of a pack stands in its header; 2 is metadata.
        if bytes[9] == 2 {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&pack, bytes).unwrap();
        }
    }
    let cx = house.cx();
    let second = house.back_up_as(&cx).await.unwrap();
    assert_eq!(second.compared_with, None, "what is damaged is stored again");
    let steps = cx.steps();
    let began = steps.iter().find(|step| step.name == "begin").unwrap();
    assert_eq!(began.figures["damaged_backups"], 1);
    let proof = house.prove(ProofLevel::L5).await;
    assert_eq!(proof.backup, second.backup);
    assert!(proof.passed, "{:#?}", proof.checks);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_after_a_lost_pack_does_not_refer_to_it() {
    let house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    let first = house.back_up().await;
    let files = packs(&house, first.lineage);
    let largest = files.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    std::fs::remove_file(largest).unwrap();
    let second = house.back_up().await;
    assert_eq!(second.compared_with, None, "what is lost is stored again");
    let proof = house.prove(ProofLevel::L5).await;
    assert_eq!(proof.backup, second.backup);
    assert!(proof.passed, "{:#?}", proof.checks);
}

/// The largest file below a directory.
fn largest_below(directory: &Path) -> PathBuf {
    let mut largest = (0, PathBuf::new());
    let mut left = vec![directory.to_owned()];
    while let Some(place) = left.pop() {
        for entry in std::fs::read_dir(place).unwrap().map(Result::unwrap) {
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                left.push(entry.path());
            } else {
                largest = largest.max((metadata.len(), entry.path()));
            }
        }
    }
    largest.1
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_restore_mends_what_a_stopped_server_left_and_keeps_away_from_everything_else() {
    use std::os::unix::fs::FileExt as _;
    // Nobody changes pages but this test.
    let house = still().await;
    house
        .sql("CREATE TABLE public.still AS SELECT sha512(g::text::bytea) FROM generate_series(1, 60000) g")
        .await;
    let space = house.place.path().join("space");
    std::fs::create_dir(&space).unwrap();
    house.sql(&format!("CREATE TABLESPACE elsewhere LOCATION '{}'", space.display())).await;
    house
        .sql("CREATE TABLE public.far TABLESPACE elsewhere AS SELECT g FROM generate_series(1, 20000) g")
        .await;
    house.sql("VACUUM (FREEZE)").await;
    house.back_up().await;
    let repository = house.reopened().await;
    let backup = restoring::find(&repository, None, None, None).await.unwrap();
    let directory = house.place.path().join("restored");
    let destination = Destination::below(&directory, backup.facts());
    let first = restoring::restore(&house.cx(), &backup, &destination, 2).await.unwrap();
    let delta = |at: &Path| Destination {
        delta: true,
        believe_cache: false,
        data_directory: at.to_owned(),
        ..destination.clone()
    };
    let restore = async |to: &Destination| {
        restoring::restore(&house.cx(), &backup, to, 2).await.map_err(|failure| {
            let plan = (failure.code, failure.to_string());
            assert_eq!(failure.action, Action::FixConfig, "{plan:?}");
            plan
        })
    };

    // Another directory with the same links: what they lead to is the first one's.
    let twin = house.place.path().join("twin");
    let copied = std::process::Command::new("cp").arg("-a").args([&directory, &twin]).status();
    assert!(copied.unwrap().success());
    let ((mut running, _place), url) = start_plainly(&directory, 15).await;
    run_sql(&url, "UPDATE public.orders SET note = 'changed' WHERE id <= 700").await;
    run_sql(&url, "CREATE TABLE public.later AS SELECT 1").await;
    run_sql(&url, "CHECKPOINT").await;
    let (code, message) = restore(&delta(&directory)).await.unwrap_err();
    assert_eq!(code, Code::TargetNotEmpty);
    assert!(message.contains("a server that runs there"), "{message}");
    // The same when its lock file was deleted.
    let pid_file = directory.join("postmaster.pid");
    std::fs::rename(&pid_file, house.place.path().join("pid")).unwrap();
    let (_, message) = restore(&delta(&directory)).await.unwrap_err();
    assert!(message.contains("a server that runs there"), "{message}");
    std::fs::rename(house.place.path().join("pid"), &pid_file).unwrap();
    let (_, message) = restore(&delta(&twin)).await.unwrap_err();
    assert!(message.contains("it is a tablespace of the server"), "{message}");
    assert_eq!(number(&url, "SELECT count(*) FROM public.far").await, 20_000, "it went on");

    // Killed, and then its files are damaged.
    running.kill();
    running.wait().await.unwrap();
    let cx = house.cx();
    let mut unplanned = delta(&directory);
    let plan = async || restoring::plan(&cx, &backup, &delta(&directory), 2).await.ok();
    eventually("the killed server's processes are gone", Duration::from_secs(30), plan).await;
    assert!(pid_file.exists(), "it had no time to remove it");
    let damaged = largest_below(&directory.join("base"));
    let file = std::fs::OpenOptions::new().write(true).open(&damaged).unwrap();
    file.write_all_at(&[0xEE; 5000], 8192 * 3).unwrap();
    std::fs::write(directory.join("base/junk"), "junk").unwrap();
    std::fs::remove_file(directory.join("pg_xact/0000")).unwrap();
    let (oid, place) = destination.tablespaces.first_key_value().unwrap();
    let far = std::fs::OpenOptions::new().write(true).open(largest_below(place)).unwrap();
    far.write_all_at(&[0xEE; 5000], 0).unwrap();

    // A tablespace of somebody else's is none of ours, whoever names it.
    let alien = house.place.path().join("alien");
    std::fs::create_dir(&alien).unwrap();
    std::fs::write(alien.join("theirs"), "precious").unwrap();
    unplanned.tablespaces.insert(*oid, alien.clone());
    let (_, message) = restore(&unplanned).await.unwrap_err();
    assert!(message.contains("does not lead to it"), "{message}");

    let plan = restoring::plan(&house.cx(), &backup, &delta(&directory), 2).await.unwrap();
    let junk = format!("remove {}, 4 bytes", directory.join("base/junk").display());
    assert!(plan.plan.contains(&junk), "{:#?}", plan.plan);
    assert!(directory.join("base/junk").exists(), "a plan touches nothing");
    let done = restore(&delta(&directory)).await.unwrap();
    assert_eq!((done.fetched_bytes, done.reused_bytes), (plan.fetched_bytes, plan.reused_bytes));
    assert!(done.fetched_bytes * 2 < first.fetched_bytes, "{done:#?} {first:#?}");
    assert!(!pid_file.exists() && !directory.join("base/junk").exists());
    let (_running, url) = start_plainly(&directory, 15).await;
    assert_eq!(number(&url, "SELECT count(*) FROM public.orders").await, 50_000);
    let later = "SELECT count(*) FROM pg_class WHERE relname = 'later'";
    assert_eq!(number(&url, later).await, 0);
    assert_eq!(number(&url, "SELECT count(*) FROM public.orders WHERE note = 'changed'").await, 0);
    assert_eq!(number(&url, "SELECT count(*) FROM public.far").await, 20_000);
    assert_eq!(number(&url, "SELECT sum(x) FROM public.\"Odd \"\"name\"\"\"").await, 6);

    // Neither another cluster nor what is no data directory.
    let binaries = Binaries::at(&bin_dir(15)).await.unwrap();
    let other_place = house.place.path().join("other");
    let options = InstanceOptions { fsync: false, ..InstanceOptions::default() };
    let mut other = Instance::create(&binaries, &other_place, options).await.unwrap();
    let (code, message) = restore(&delta(&other.data_directory())).await.unwrap_err();
    assert_eq!(code, Code::SystemIdentifierMismatch, "{message}");
    let (_, message) = restore(&delta(&alien)).await.unwrap_err();
    assert!(message.contains("no data directory"), "{message}");
    assert_eq!(std::fs::read_dir(&alien).unwrap().count(), 1);

    // While a restore holds a directory, no server starts there.
    let lock = postgres::occupied::DirectoryLock::take(&other.data_directory()).unwrap();
    // Not as our own child: a server takes the number of its parent for a stale one.
    let mut server = std::process::Command::new("timeout");
    server.arg("30").arg(bin_dir(15).join("postgres")).arg("-D").arg(other.data_directory());
    let refused = server.output().unwrap();
    let refused = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.contains("lock file \"postmaster.pid\" already exists"), "{refused}");
    drop(lock);
    other.start().await.unwrap();
}
