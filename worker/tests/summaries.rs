//! Backups of a server that summarizes its WAL: of files that changed only the changed pages are read, and what is restored is what
//! it would be if all of them had been.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

mod house;
mod pages;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use house::{
    DATA, House, NOW_MS, caught_up, copies, copy_of, eventually, number, replay, run_sql,
    standby_of, start_plainly, text, within_limit,
};
use postgres::instance::{InstanceOptions, StopMode};
use proto::backup::Reading;
use proto::job::BackupOutcome;
use proto::message::Spec;
use proto::{BackupId, Lsn, ProofLevel};
use repository::{CollectOptions, Wish};
use rustix::process::{Pid, Signal, kill_process};
use tokio_util::sync::CancellationToken;
use worker::context::JobContext;
use worker::restoring;

const MAJOR: u32 = 18;

/// A server that summarizes its WAL, writes nothing by itself, and makes a checkpoint only when it is told to.
fn summarizing(checksums: bool) -> InstanceOptions {
    let settings = [
        ("summarize_wal", "on"),
        ("autovacuum", "off"),
        ("checkpoint_timeout", "1h"),
        ("wal_keep_size", "8GB"),
    ];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    InstanceOptions { fsync: false, checksums, settings, ..InstanceOptions::default() }
}

/// What a backup says of how it read files.
async fn reading(house: &House, backup: BackupId) -> Reading {
    let repository = house.reopened().await;
    let found = restoring::find(&repository, None, None, Some(backup)).await.unwrap();
    found.facts().reading.clone().unwrap()
}

/// Bytes of files, not of WAL, that a backup read.
fn read_of_files(outcome: &BackupOutcome) -> u64 {
    outcome.read_bytes - outcome.wal_bytes
}

/// Takes a backup that has to rely on summaries from the start of the one before.
async fn by_summaries(house: &House, cx: &JobContext, before: &BackupOutcome) -> BackupOutcome {
    let outcome = within_limit(house.back_up_as(cx)).await.unwrap();
    let reading = reading(house, outcome.backup).await;
    let used = reading.summaries.clone().unwrap_or_else(|| panic!("{reading:?}"));
    assert_eq!((used.since, reading.whole_files), (before.start_lsn, None));
    let step = cx.steps().into_iter().find(|step| step.name == "summaries").unwrap();
    assert_eq!(step.figures.get("summaries"), Some(&used.count));
    let copied = cx.steps().into_iter().find(|step| step.name == "copy").unwrap();
    assert_eq!(copied.figures.get("silent_changes"), Some(&0), "{copied:?}");
    assert!(outcome.changed_files.as_ref().unwrap().contains("by pages"), "{outcome:?}");
    outcome
}

/// Takes a backup that has to do without, and says why.
async fn by_whole_files(house: &House, why: &str) -> BackupOutcome {
    let outcome = within_limit(house.back_up()).await;
    let reading = reading(house, outcome.backup).await;
    assert_eq!(reading.summaries, None);
    let told = reading.whole_files.unwrap();
    assert!(told.contains(why), "{told}");
    outcome
}

/// Nobody waits for anything.
fn collection() -> CollectOptions {
    CollectOptions {
        by: "test".into(),
        now_ms: NOW_MS,
        grace_ms: 0,
        patience_ms: None,
        pins_for_ms: 0,
        lists_for_ms: None,
        cancel: CancellationToken::new(),
    }
}

/// Gives a backup up, and deletes all that no other one needs.
async fn delete(house: &House, backup: BackupId) {
    let repository = house.reopened().await;
    let lineage = repository.list_lineages().await.unwrap()[0].lineage;
    let wish = Wish { by: "test".into(), why: "it is in the way".into(), at_ms: NOW_MS };
    repository.forget(lineage, backup, &wish).await.unwrap();
    let options = collection();
    let plan = repository.plan_collection(lineage, &options).await.unwrap();
    assert!(plan.delete.packs > 0);
    plan.collect(&options).await.unwrap();
    restoring::find(&repository, None, None, Some(backup)).await.unwrap_err();
}

/// The file of a relation.
async fn file_of(house: &House, relation: &str) -> PathBuf {
    let sql = format!("SELECT pg_relation_filepath('{relation}')");
    house.server.data_directory().join(text(&house.server.url("postgres"), &sql).await)
}

/// Waits until a file was written so long ago that its times may be believed.
async fn is_old(file: &Path) {
    let is_old = async || {
        #[expect(clippy::disallowed_methods, reason = "the clock that stamps files")]
        let now = SystemTime::now();
        let written = fs::metadata(file).unwrap().modified().unwrap();
        let age = now.duration_since(written).unwrap_or_default();
        (age > Duration::from_millis(2_500)).then_some(())
    };
    eventually("the file looks old", Duration::from_secs(30), is_old).await;
}

/// Restores a backup and starts it.
async fn restored(
    house: &House,
    outcome: &BackupOutcome,
    name: &str,
) -> ((postgres::process::Running, tempfile::TempDir), String) {
    let directory = house.place.path().join(name);
    house.restore(outcome, &directory).await;
    start_plainly(&directory, MAJOR).await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_large_table_only_the_changed_pages_are_read() {
    let mut house = House::new(MAJOR, summarizing(true)).await;
    let rows = "SELECT g AS id, repeat(md5(g::text), 30) AS t FROM generate_series(1, 80000) g";
    house.sql(&format!("CREATE TABLE public.large AS {rows}")).await;
    house.sql("VACUUM (FREEZE)").await;
    house.sql("CHECKPOINT").await;
    let change =
        "UPDATE public.large SET t = t || '!' WHERE id IN (9, 20000, 40000, 79990); CHECKPOINT";
    let table = fs::metadata(file_of(&house, "public.large").await).unwrap().len();
    let first = by_whole_files(&house, "no backup to compare with").await;
    assert!(read_of_files(&first) >= table && table > 70 << 20, "{table} {first:?}");
    let mut before = first.clone();
    for over_connections in [false, true] {
        if over_connections {
            house.read_over_connections();
        }
        house.sql(change).await;
        let next = by_summaries(&house, &house.cx(), &before).await;
        assert!(read_of_files(&next) < table / 10, "over connections {over_connections}: {next:?}");
        let said = reading(&house, next.backup).await;
        assert!(said.unread_bytes > table - (1 << 20), "{said:?}");
        assert!(next.stored_bytes < first.stored_bytes / 4, "{next:?}");
        before = next;
    }
    let proof = within_limit(house.prove(ProofLevel::L5)).await;
    assert!(proof.backup == before.backup && proof.passed, "{:#?}", proof.checks);

    // The server goes on without them.
    house.read_locally();
    house.sql("ALTER SYSTEM SET summarize_wal = off").await;
    house.sql("SELECT pg_reload_conf()").await;
    let off = async || {
        let setting = text(&house.server.url("postgres"), "SHOW summarize_wal").await;
        (setting == "off").then_some(())
    };
    eventually("the setting is in effect", Duration::from_secs(10), off).await;
    house.sql(change).await;
    let last = by_whole_files(&house, "summarize_wal is off").await;
    assert!(read_of_files(&last) >= table, "{last:?}");
    let (_running, url) = restored(&house, &last, "restored").await;
    let changed = "SELECT count(*) FROM public.large WHERE t LIKE '%!!!'";
    assert_eq!(number(&url, changed).await, 4);
}

/// Pages of zeros.
fn empty_pages(file: &Path) -> usize {
    let content = fs::read(file).unwrap();
    content.chunks(8192).filter(|page| page.iter().all(|byte| *byte == 0)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_truncated_rewritten_or_made_anew_is_the_same_page_by_page() {
    let mut house = House::new(MAJOR, summarizing(true)).await;
    house.sql(DATA).await;
    house
        .sql(
            "CREATE TABLE public.shrinks AS SELECT g, repeat('s', 500) AS t FROM generate_series(1, 30000) g;
             CREATE TABLE public.rewritten AS SELECT g, repeat('r', 500) AS t FROM generate_series(1, 3000) g;
             CREATE TABLE public.emptied AS SELECT * FROM public.rewritten;
             CREATE TABLE public.seen AS SELECT g AS id, repeat('v', 300) AS t FROM generate_series(1, 3000) g;
             CREATE INDEX seen_id ON public.seen (id);
             CREATE TABLE public.points AS SELECT point(g, g) AS p FROM generate_series(1, 3000) g;
             CREATE INDEX points_p ON public.points USING spgist (p)",
        )
        .await;
    // Two databases with the same files and other rows, and one that is now a copy of the one and then of the other.
    house.sql("CREATE DATABASE one STRATEGY file_copy").await;
    let rows = "SELECT g, 'one' AS which FROM generate_series(1, 20000) g";
    run_sql(&house.server.url("one"), &format!("CREATE TABLE public.t AS {rows}")).await;
    house.sql("CREATE DATABASE two TEMPLATE one STRATEGY file_copy").await;
    run_sql(&house.server.url("two"), "UPDATE public.t SET which = 'two'").await;
    house.sql("CREATE DATABASE twin OID 50000 TEMPLATE one STRATEGY file_copy").await;
    house.sql("VACUUM (FREEZE)").await;
    house.sql("CHECKPOINT").await;
    // The witness: a copy by the server's own tool, from before, that is replayed by the server alone.
    let witness = house.place.path().join("witness");
    copy_of(&house.server.url("postgres"), MAJOR, &witness).await;
    let first = house.back_up().await;

    house.sql("DELETE FROM public.shrinks WHERE g > 100").await;
    house.sql("VACUUM public.shrinks").await;
    let shrinks = file_of(&house, "public.shrinks").await;
    assert!(fs::metadata(&shrinks).unwrap().len() < 20 * 8192, "vacuum has truncated it");
    // A bulk load makes the file longer than it needs, without a word in the log.
    let rows = house.place.path().join("rows");
    let rows = rows.display();
    let many = "SELECT g, repeat('n', 500) FROM generate_series(1, 1500) g";
    house.sql(&format!("COPY ({many}) TO '{rows}'; COPY public.shrinks FROM '{rows}'")).await;
    house.sql("CHECKPOINT").await;
    assert!(empty_pages(&shrinks) > 0, "there are pages behind its end");
    house.sql("VACUUM FULL public.rewritten").await;
    house
        .sql(
            "TRUNCATE public.emptied; INSERT INTO public.emptied VALUES (1, 'again');
             DELETE FROM public.seen WHERE id <= 100;
             UPDATE public.orders SET note = 'changed' WHERE id % 10000 = 7;
             INSERT INTO public.points SELECT point(g, -g) FROM generate_series(1, 500) g",
        )
        .await;
    house.sql("DROP DATABASE twin").await;
    house.sql("CREATE DATABASE twin OID 50000 TEMPLATE two STRATEGY file_copy").await;
    let cx = house.cx();
    let second = by_summaries(&house, &cx, &first).await;
    assert!(read_of_files(&second) < second.size_bytes / 2, "{second:?}");
    let proof = within_limit(house.prove(ProofLevel::L5)).await;
    assert!(proof.passed, "{:#?}", proof.checks);
    delete(&house, first.backup).await;

    house.sql("CHECKPOINT; SELECT pg_switch_wal()").await;
    house.server.stop(StopMode::Fast).await.unwrap();
    let copy = house.place.path().join("restored");
    house.restore(&second, &copy).await;
    let wal = house.server.data_directory().join("pg_wal");
    let command = format!("cp \"{}/%f\" \"%p\"", wal.display());
    replay(&witness, MAJOR, second.stop_lsn, &command).await;
    replay(&copy, MAJOR, second.stop_lsn, "false").await;
    let compared = pages::same_pages(&copy, &witness);
    assert!(compared.pages > 5_000 && compared.files > 500, "{compared:?}");

    let (_running, url) = start_plainly(&copy, MAJOR).await;
    for (query, wanted) in [
        ("SELECT count(*) FROM public.shrinks", 1_600),
        ("SELECT count(*) FROM public.rewritten", 3_000),
        ("SELECT count(*) FROM public.emptied", 1),
        ("SELECT count(*) FROM public.orders WHERE note = 'changed'", 5),
        ("SELECT count(*) FROM public.points WHERE p <@ box '((-9,-9),(9999,9999))'", 3_009),
    ] {
        assert_eq!(number(&url, query).await, wanted, "{query}");
    }
    // A visibility map that was not read would say that the rows are still there.
    let by_index = "SET enable_seqscan = off; SET enable_bitmapscan = off";
    let session = house::session(&url).await;
    session.run("look by index", by_index).await.unwrap();
    let row = session.one("look", "SELECT count(*) FROM public.seen WHERE id <= 200", &[]);
    assert_eq!(row.await.unwrap().get::<_, i64>(0), 100);
    session.close().await;
    let twin = url.replace("/postgres?", "/twin?");
    assert_eq!(number(&twin, "SELECT count(*) FROM public.t WHERE which = 'two'").await, 20_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_while_the_backup_before_ran_is_in_this_one() {
    let house = House::new(MAJOR, summarizing(true)).await;
    house.sql(DATA).await;
    house.sql("VACUUM (FREEZE)").await;
    house.sql("CHECKPOINT").await;
    // Its files are copied, and the backup has not ended.
    let go = house.place.path().join("go");
    assert!(worker::failpoint::arm(&format!("stop_backup=hold:{}", go.display())));
    let cx = house.cx();
    let meanwhile = async {
        let copied = async || cx.steps().iter().any(|it| it.name == "stop_backup").then_some(());
        eventually("all is copied", Duration::from_mins(1), copied).await;
        house.sql("UPDATE public.orders SET note = 'late' WHERE id = 7").await;
        // One summary ends here, before the backup does.
        house.sql("CHECKPOINT").await;
        fs::write(&go, "").unwrap();
    };
    let (first, ()) = tokio::join!(house.back_up_as(&cx), meanwhile);
    let first = first.unwrap();
    house.sql("UPDATE public.orders SET note = 'after' WHERE id = 49000; CHECKPOINT").await;
    let second = by_summaries(&house, &house.cx(), &first).await;
    let (_running, url) = restored(&house, &second, "restored").await;
    let late = "SELECT count(*) FROM public.orders WHERE note IN ('late', 'after')";
    assert_eq!(number(&url, late).await, 2);
    // Nor is there what it replaced.
    assert_eq!(number(&url, "SELECT count(*) FROM public.orders").await, 50_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_between_start_and_listing_is_in_the_next_backup() {
    let mut house = House::new(MAJOR, summarizing(true)).await;
    // Whoever counts rows writes to their pages.
    house.config.backup.census_s = 0;
    house.sql(DATA).await;
    house.sql("VACUUM (FREEZE)").await;
    house.sql("CHECKPOINT").await;
    let first = house.back_up().await;
    let file = file_of(&house, "public.orders").await;
    let cx = house.cx();
    let second = {
        let mut backup = Box::pin(by_summaries(&house, &cx, &first));
        tokio::select! {
            ended = &mut backup => panic!("the backup ended before it copied: {ended:?}"),
            () = copies(&cx) => {}
        }
        // Nobody asks how it goes, so nothing is listed yet. The page is on disk, its file has a time that looks old, and
        // the summaries are of what came before.
        house.sql("UPDATE public.orders SET note = 'between' WHERE id = 7; CHECKPOINT").await;
        is_old(&file).await;
        house.sql("CHECKPOINT").await;
        backup.await
    };
    let (running, url) = restored(&house, &second, "second").await;
    let between = "SELECT count(*) FROM public.orders WHERE note = 'between'";
    assert_eq!(number(&url, between).await, 1, "its WAL brings it");
    drop(running);
    let third = by_summaries(&house, &house.cx(), &second).await;
    let (_running, url) = restored(&house, &third, "third").await;
    assert_eq!(number(&url, between).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn hint_bits_that_no_log_tells_of_are_not_read_and_alarm_nobody() {
    let mut house = House::new(MAJOR, summarizing(false)).await;
    // Whoever counts rows sets hint bits.
    house.config.backup.census_s = 0;
    let rows = "SELECT g AS id, repeat(md5(g::text), 30) AS t FROM generate_series(1, 40000) g";
    house.sql("CREATE TABLE public.hinted (id int, t text)").await;
    house.sql(&format!("INSERT INTO public.hinted {rows}; CHECKPOINT")).await;
    let file = file_of(&house, "public.hinted").await;
    let table = fs::metadata(&file).unwrap().len();
    let mut before = house.back_up().await;
    let content = fs::read(&file).unwrap();
    house.sql("SELECT count(*) FROM public.hinted; CHECKPOINT").await;
    let now = fs::read(&file).unwrap();
    let pages = now.chunks(8192).zip(content.chunks(8192));
    let differ = pages.filter(|(now, then)| now != then).count() as u64;
    assert!(differ * 8192 > table / 2, "{differ} pages have new hint bits");
    for _ in 0..2 {
        let next = by_summaries(&house, &house.cx(), &before).await;
        assert!(read_of_files(&next) < table / 5, "{table} {next:?}");
        before = next;
    }
    let (_running, url) = restored(&house, &before, "restored").await;
    assert_eq!(number(&url, "SELECT count(*) FROM public.hinted").await, 40_000);
}

/// Whoever truncates a table clears bits of the map's last page; without checksums no record names that page, nor does a summary.
#[tokio::test(flavor = "multi_thread")]
async fn a_visibility_map_that_changed_without_a_word_in_the_log_is_read() {
    let mut house = House::new(MAJOR, summarizing(false)).await;
    house.config.backup.census_s = 0;
    house
        .sql(
            "CREATE TABLE public.seen AS SELECT g AS id, repeat('v', 300) AS t FROM generate_series(1, 3000) g;
             CREATE INDEX seen_id ON public.seen (id)",
        )
        .await;
    house.sql("VACUUM (FREEZE) public.seen").await;
    // Pages of which nothing is left are there, and all that is on them may be seen by everybody.
    house.sql("DELETE FROM public.seen WHERE id > 100").await;
    house.sql("VACUUM (FREEZE, TRUNCATE off) public.seen").await;
    house.sql("VACUUM (FREEZE, TRUNCATE off) public.seen").await;
    house.sql("CHECKPOINT").await;
    let table = file_of(&house, "public.seen").await;
    let map = PathBuf::from(format!("{}_vm", table.display()));
    let before = fs::read(&map).unwrap();
    let first = house.back_up().await;
    house.sql("VACUUM public.seen").await;
    house.sql("CHECKPOINT").await;
    assert!(fs::metadata(&table).unwrap().len() < 10 * 8192, "vacuum has truncated it");
    let now = fs::read(&map).unwrap();
    assert_ne!(now, before, "and cleared bits");
    let second = by_summaries(&house, &house.cx(), &first).await;
    let copy = house.place.path().join("restored");
    house.restore(&second, &copy).await;
    let restored = map.strip_prefix(house.server.data_directory()).unwrap();
    assert_eq!(fs::read(copy.join(restored)).unwrap(), now);

    // Such bits would say of rows that come where others were that they are there for all, also when they are not.
    let (_running, url) = start_plainly(&copy, MAJOR).await;
    let rows =
        "INSERT INTO public.seen SELECT g, repeat('v', 300) FROM generate_series(101, 3000) g";
    run_sql(&url, rows).await;
    run_sql(&url, "DELETE FROM public.seen WHERE id > 2000").await;
    let by_index = "SET enable_seqscan = off; SET enable_bitmapscan = off";
    let session = house::session(&url).await;
    session.run("look by index", by_index).await.unwrap();
    let row = session.one("look", "SELECT count(*) FROM public.seen WHERE id > 0", &[]).await;
    assert_eq!(row.unwrap().get::<_, i64>(0), 2_000);
    session.close().await;
}

/// What is stored and in no backup, by the checkpoints that tell of it.
async fn left_behind(house: &House) -> u64 {
    let repository = house.reopened().await;
    let Some(found) = repository.list_lineages().await.unwrap().into_iter().next() else {
        return 0;
    };
    // Whatever its age: the clock of these tests is not that of checkpoints.
    let options = CollectOptions { grace_ms: i64::MAX, ..collection() };
    let plan = repository.plan_collection(found.lineage, &options).await.unwrap();
    plan.left_behind.bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_backup_by_pages_had_stored_is_in_the_next_one_page_by_page() {
    let mut house = House::new(MAJOR, summarizing(true)).await;
    house.config.backup.checkpoint_s = 0;
    house.config.backup.processes = 1;
    house.sql(DATA).await;
    let rows = "SELECT g AS id, repeat(md5(g::text), 30) AS t FROM generate_series(1, 20000) g";
    house.sql(&format!("CREATE TABLE public.large AS {rows}")).await;
    house
        .sql(
            "CREATE TABLE public.shrinks AS SELECT g, repeat('s', 500) AS t FROM generate_series(1, 20000) g",
        )
        .await;
    house.sql("VACUUM (FREEZE)").await;
    house.sql("CHECKPOINT").await;
    let witness = house.place.path().join("witness");
    copy_of(&house.server.url("postgres"), MAJOR, &witness).await;
    let first = house.back_up().await;

    // Only the second backup sees some of this: pages that change once more, a table that goes, and one that becomes shorter.
    let apart = "(SELECT string_agg(md5((g * 100 + n)::text), '') FROM generate_series(1, 30) n)";
    let rows = format!("SELECT g AS id, {apart} AS t FROM generate_series(1, 20000) g");
    house.sql(&format!("CREATE TABLE public.fresh AS {rows}")).await;
    house
        .sql(
            "CREATE TABLE public.fleeting_one AS SELECT g FROM generate_series(1, 10000) g;
             UPDATE public.large SET t = t || '!' WHERE id % 1000 = 7;
             UPDATE public.shrinks SET t = upper(t) WHERE g > 15000;
             UPDATE public.orders SET note = 'second' WHERE id % 10000 = 7; CHECKPOINT",
        )
        .await;
    let go = house.place.path().join("go");
    assert!(worker::failpoint::arm(&format!("stop_backup=hold:{}", go.display())));
    let cx = house.cx();
    let killed = {
        let mut backup = Box::pin(house.back_up_as(&cx));
        let stored = async {
            let held = async || cx.steps().iter().any(|it| it.name == "stop_backup").then_some(());
            eventually("all is copied", Duration::from_mins(1), held).await;
            let told = async || Some(left_behind(&house).await).filter(|bytes| *bytes > 0);
            eventually("a checkpoint tells of it", Duration::from_mins(1), told).await
        };
        tokio::select! {
            ended = &mut backup => panic!("the backup ended before it was killed: {ended:?}"),
            bytes = stored => bytes,
        }
    };
    fs::write(&go, "").unwrap();
    house::nothing_is_left_on(&house).await;

    house
        .sql(
            "DROP TABLE public.fleeting_one;
             UPDATE public.large SET t = t || '?' WHERE id % 2000 = 7 OR id % 3000 = 9;
             DELETE FROM public.shrinks WHERE g > 100",
        )
        .await;
    house.sql("VACUUM public.shrinks").await;
    house.sql("INSERT INTO public.shrinks SELECT g, 'again' FROM generate_series(1, 5000) g").await;
    house.sql("CHECKPOINT").await;
    let cx = {
        let spec = Spec { predecessor: Some(cx.spec.attempt), ..(*house.cx().spec).clone() };
        JobContext::new(spec, Arc::new(|_| {}))
    };
    let third = by_summaries(&house, &cx, &first).await;
    assert_eq!(third.compared_with, Some(first.backup));
    let fresh = fs::metadata(file_of(&house, "public.fresh").await).unwrap().len();
    // The last checkpoint before the kill tells of all that was stored by then, or of a part: it may cost three hundredths of the time.
    assert!(third.taken_over_bytes > 0, "{third:?}");
    if third.taken_over_bytes >= fresh {
        assert!(third.stored_bytes < killed, "{killed} bytes were stored before: {third:?}");
    }
    delete(&house, first.backup).await;
    assert_eq!(left_behind(&house).await, 0, "what is taken over is the backup's");

    house.sql("CHECKPOINT; SELECT pg_switch_wal()").await;
    house.server.stop(StopMode::Fast).await.unwrap();
    let copy = house.place.path().join("restored");
    house.restore(&third, &copy).await;
    let wal = house.server.data_directory().join("pg_wal");
    let command = format!("cp \"{}/%f\" \"%p\"", wal.display());
    replay(&witness, MAJOR, third.stop_lsn, &command).await;
    replay(&copy, MAJOR, third.stop_lsn, "false").await;
    let compared = pages::same_pages(&copy, &witness);
    assert!(compared.pages > 5_000 && compared.files > 300, "{compared:?}");
    let (_running, url) = start_plainly(&copy, MAJOR).await;
    for (query, wanted) in [
        ("SELECT count(*) FROM public.fresh", 20_000),
        ("SELECT count(*) FROM public.large WHERE t LIKE '%!?'", 10),
        ("SELECT count(*) FROM public.shrinks", 5_100),
        ("SELECT count(*) FROM public.orders WHERE note = 'second'", 5),
    ] {
        assert_eq!(number(&url, query).await, wanted, "{query}");
    }
}

/// The process that summarizes.
async fn summarizer(house: &House) -> Pid {
    let pid = "SELECT summarizer_pid::int8 FROM pg_get_wal_summarizer_state()";
    Pid::from_raw(i32::try_from(house.number(pid).await).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hole_a_restart_or_a_right_that_is_missing_has_files_read_whole() {
    let mut house = House::new(MAJOR, summarizing(true)).await;
    house.sql(DATA).await;
    let change = "UPDATE public.orders SET note = note || '!' WHERE id % 10000 = 7";
    let first = house.back_up().await;
    // Several summaries, one after each checkpoint, of which one is missing.
    let since =
        format!("FROM pg_available_wal_summaries() WHERE start_lsn > '{}'", first.start_lsn);
    for _ in 0..3 {
        house.sql(change).await;
        house.sql("CHECKPOINT").await;
    }
    let count = format!("SELECT count(*) {since}");
    let several = async || (house.number(&count).await >= 2).then_some(());
    eventually("there are several summaries", Duration::from_mins(1), several).await;
    let earliest = format!("SELECT start_lsn::text {since} ORDER BY start_lsn LIMIT 1");
    let start: Lsn = text(&house.server.url("postgres"), &earliest).await.parse().unwrap();
    let summaries = house.server.data_directory().join("pg_wal/summaries");
    let begins = format!("00000001{:016X}", start.0);
    let missing: Vec<_> = fs::read_dir(&summaries)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&begins))
        .collect();
    let [missing] = missing.as_slice() else { panic!("{missing:?}") };
    fs::remove_file(missing).unwrap();
    let why = format!("no WAL summary of timeline 1 from {start} on");
    let second = by_whole_files(&house, &why).await;

    // The summarizer is late; the backup waits for it.
    let pid = summarizer(&house).await;
    kill_process(pid, Signal::STOP).unwrap();
    let cx = house.cx();
    let meanwhile = async {
        let asks = async || cx.steps().iter().any(|it| it.name == "summaries").then_some(());
        eventually("the backup waits", Duration::from_mins(1), asks).await;
        kill_process(pid, Signal::CONT).unwrap();
    };
    house.sql(change).await;
    let (third, ()) = tokio::join!(Box::pin(by_summaries(&house, &cx, &second)), meanwhile);

    // A role that may do all but that.
    house
        .sql(
            "CREATE ROLE backup LOGIN REPLICATION; GRANT pg_read_all_settings, pg_read_all_data TO backup;
             GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO backup;
             REVOKE EXECUTE ON FUNCTION pg_wal_summary_contents(bigint, pg_lsn, pg_lsn) FROM PUBLIC",
        )
        .await;
    let of_superuser = house.server.url("postgres");
    house.reconnect(&of_superuser.replace("postgres@", "backup@"));
    let fourth = by_whole_files(&house, "GRANT EXECUTE ON FUNCTION").await;
    let said = reading(&house, fourth.backup).await.whole_files.unwrap();
    let grant = &said[said.find("GRANT").unwrap()..];
    house.sql(grant).await;
    let fifth = by_summaries(&house, &house.cx(), &fourth).await;
    assert!(read_of_files(&fifth) < third.size_bytes / 2, "{fifth:?}");

    // Nobody knows what was done to the files of a server that stood still.
    house.server.restart().await.unwrap();
    house.sql(change).await;
    let sixth = by_whole_files(&house, "was started after").await;
    let (_running, url) = restored(&house, &sixth, "restored").await;
    let changed = "SELECT count(*) FROM public.orders WHERE note LIKE '%!!!!!'";
    assert_eq!(number(&url, changed).await, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_is_stored_while_a_backup_waits_for_the_summarizer() {
    let house = House::new(MAJOR, summarizing(true)).await;
    house.sql(DATA).await;
    let first = house.back_up().await;
    house.sql("UPDATE public.orders SET note = 'before' WHERE id = 7").await;
    let pid = summarizer(&house).await;
    kill_process(pid, Signal::STOP).unwrap();
    let cx = house.cx();
    let meanwhile = async {
        let asks = async || cx.steps().iter().any(|it| it.name == "summaries").then_some(());
        eventually("the backup waits", Duration::from_mins(1), asks).await;
        for segment in 1..=2 {
            house.sql("INSERT INTO public.empty VALUES (1)").await;
            let switch = "SELECT pg_switch_wal()::text";
            let end = text(&house.server.url("postgres"), switch).await;
            let held = format!(
                "SELECT count(*) FROM pg_replication_slots WHERE active AND restart_lsn <= '{end}'"
            );
            let stored = async || (house.number(&held).await == 0).then_some(());
            let what = format!("the server may let go of segment {segment}");
            eventually(&what, Duration::from_secs(20), stored).await;
        }
        kill_process(pid, Signal::CONT).unwrap();
    };
    let (second, ()) = tokio::join!(Box::pin(by_summaries(&house, &cx, &first)), meanwhile);
    assert!(second.wal_bytes >= 3 * (16 << 20), "{second:?}");
    let (_running, url) = restored(&house, &second, "restored").await;
    assert_eq!(number(&url, "SELECT count(*) FROM public.empty").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_only_what_changed_lately_is_read() {
    let mut house = House::new(MAJOR, summarizing(true)).await;
    // Whoever counts rows writes to their pages.
    house.config.backup.census_s = 0;
    // Of many stretches.
    let rows = "SELECT g AS id, repeat(md5(g::text), 30) AS t FROM generate_series(1, 40000) g";
    house.sql(&format!("CREATE TABLE public.large AS {rows}")).await;
    house.sql(DATA).await;
    house.sql("VACUUM (FREEZE)").await;
    house.sql("CHECKPOINT").await;
    let (large, orders) =
        (file_of(&house, "public.large").await, file_of(&house, "public.orders").await);
    let first = house.back_up().await;
    house.sql("UPDATE public.large SET t = t || '!' WHERE id IN (9, 20000); CHECKPOINT").await;
    is_old(&large).await;
    let second = by_summaries(&house, &house.cx(), &first).await;
    house.sql("UPDATE public.orders SET note = 'late' WHERE id = 7; CHECKPOINT").await;
    is_old(&orders).await;
    let third = by_summaries(&house, &house.cx(), &second).await;
    let size = |file: &Path| fs::metadata(file).unwrap().len();
    let (large, orders) = (size(&large), size(&orders));
    assert!(large > 30 << 20 && orders > 3 << 20, "{large} {orders}");

    house.server.restart().await.unwrap();
    let fourth = by_whole_files(&house, "was started after").await;
    let read = read_of_files(&fourth);
    assert!((orders..large).contains(&read), "{read} of {large} and {orders}: {fourth:?}");
    assert!(read_of_files(&third) < orders, "{third:?}");
    let (_running, url) = restored(&house, &fourth, "restored").await;
    let changed = "SELECT (SELECT count(*) FROM public.large WHERE t LIKE '%!')
                        + (SELECT count(*) FROM public.orders WHERE note = 'late')";
    assert_eq!(number(&url, changed).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_was_promoted_goes_on_across_the_timelines() {
    let mut house = House::new(MAJOR, summarizing(true)).await;
    house.sql(DATA).await;
    house.sql("CHECKPOINT").await;
    let directory = house.place.path().join("standby");
    let (_running, standby) = standby_of(&house.server, &directory, &["fsync=off"]).await;
    let primary = house.server.url("postgres");
    house.reconnect(&standby);
    caught_up(&primary, &standby).await;
    let first = house.back_up().await;
    // Nothing happened, and both begin with the same checkpoint.
    let second = by_whole_files(&house, "behind").await;
    assert_eq!(second.start_lsn, first.start_lsn);
    run_sql(&primary, "UPDATE public.orders SET note = 'before' WHERE id % 10000 = 7").await;
    run_sql(&primary, "CHECKPOINT").await;
    caught_up(&primary, &standby).await;
    let third = by_summaries(&house, &house.cx(), &second).await;
    run_sql(&primary, "UPDATE public.orders SET note = 'then' WHERE id % 10000 = 8").await;
    caught_up(&primary, &standby).await;
    assert_eq!(number(&standby, "SELECT pg_promote()::int4::int8").await, 1);
    run_sql(&standby, "UPDATE public.orders SET note = 'after' WHERE id % 10000 = 9").await;
    let fourth = by_summaries(&house, &house.cx(), &third).await;
    assert_eq!((third.timeline.0, fourth.timeline.0), (1, 2));
    assert!(read_of_files(&fourth) < fourth.size_bytes / 2, "{fourth:?}");
    let proof = within_limit(house.prove(ProofLevel::L5)).await;
    assert!(proof.backup == fourth.backup && proof.passed, "{:#?}", proof.checks);
    let (_running, url) = restored(&house, &fourth, "restored").await;
    let changed = "SELECT count(*) FROM public.orders WHERE note IN ('before', 'then', 'after')";
    assert_eq!(number(&url, changed).await, 15);
}
