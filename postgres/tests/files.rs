//! The file side held against real servers: control file, page checksums, damaged and torn pages,
//! what a backup copies, WAL segments.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on ends there")]

mod throwaway;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use postgres::Error;
use postgres::control_file::{CONTROL_FILE_PATH, ControlFile};
use postgres::files::{LocalFiles, ServerFiles as _};
use postgres::instance::{Instance, StopMode};
use postgres::page::{self, PageState};
use postgres::process::Account;
use postgres::relation::{PageRules, RelationFile, RelationReader};
use postgres::scan::{EXTERNAL_ROOT, EntryKind, Scan, ScanOptions, ScanWarning};
use postgres::wal::{Segment, SegmentHeader, WalOrigin, read_history};
use proto::{Lsn, SystemIdentifier, Timeline};
use throwaway::{cluster, connect, optional_binaries, text};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_mins(2);

#[tokio::test(flavor = "multi_thread")]
async fn the_control_file_is_read_as_the_servers_own_tool_reads_it() {
    let mut n_majors = 0;
    for major in 14..=18 {
        if optional_binaries(major).await.is_none() && major != 15 && major != 18 {
            continue;
        }
        n_majors += 1;
        let settings = [
            ("max_connections", "37"),
            ("max_prepared_transactions", "5"),
            ("wal_level", "logical"),
        ];
        let (mut instance, _directory) = cluster(major, &settings).await;
        let data = instance.data_directory();
        let (running, bytes) = ControlFile::read_with_bytes(&data).unwrap();
        assert_eq!(running.state.as_str(), "in production");
        assert_eq!(bytes.len(), 8192);
        assert_eq!(running.max_connections, 37);
        instance.stop(StopMode::Fast).await.unwrap();
        let control = ControlFile::read(&data).unwrap();
        let told = controldata(&instance).await;
        let expect = |label: &str, ours: String| {
            let prefix = format!("{label}:");
            let line = told.lines().find_map(|line| line.strip_prefix(&prefix));
            assert_eq!(
                line.unwrap_or_else(|| panic!("no {label} in {told}")).trim(),
                ours,
                "{major} {label}"
            );
        };
        let on_off = |on: bool| if on { "on" } else { "off" }.to_owned();
        expect("pg_control version number", control.control_version.to_string());
        expect("Catalog version number", control.catalog_version.to_string());
        expect("Database system identifier", control.system_identifier.to_string());
        expect("Database cluster state", control.state.as_str().to_owned());
        expect("Latest checkpoint location", control.checkpoint.to_string());
        expect("Latest checkpoint's REDO location", control.redo.to_string());
        expect("Latest checkpoint's TimeLineID", control.timeline.to_string());
        expect("Latest checkpoint's PrevTimeLineID", control.previous_timeline.to_string());
        expect("Latest checkpoint's full_page_writes", on_off(control.full_page_writes));
        let xid = control.next_transaction;
        expect("Latest checkpoint's NextXID", format!("{}:{}", xid >> 32, xid & 0xffff_ffff));
        expect("Minimum recovery ending location", control.min_recovery_point.to_string());
        expect("Min recovery ending loc's timeline", control.min_recovery_timeline.to_string());
        expect("Backup start location", control.backup_start.to_string());
        expect("Backup end location", control.backup_end.to_string());
        let required = if control.backup_end_required { "yes" } else { "no" };
        expect("End-of-backup record required", required.to_owned());
        expect(
            "wal_level setting",
            ["minimal", "replica", "logical"][control.wal_level as usize].to_owned(),
        );
        expect("wal_log_hints setting", on_off(control.wal_log_hints));
        expect("max_connections setting", control.max_connections.to_string());
        expect("max_worker_processes setting", control.max_worker_processes.to_string());
        expect("max_wal_senders setting", control.max_wal_senders.to_string());
        expect("max_prepared_xacts setting", control.max_prepared_transactions.to_string());
        expect("max_locks_per_xact setting", control.max_locks_per_transaction.to_string());
        expect("track_commit_timestamp setting", on_off(control.track_commit_timestamp));
        expect("Database block size", control.block_size.to_string());
        expect("Blocks per segment of large relation", control.relation_segment_blocks.to_string());
        expect("WAL block size", control.wal_block_size.to_string());
        expect("Bytes per WAL segment", control.wal_segment_size.to_string());
        expect("Data page checksum version", control.checksum_version.to_string());
        // The tool prints times in words; the tests run in UTC without one of our own reading them
        // back.
        assert!(
            control.written_at_s >= control.checkpoint_at_s
                && control.checkpoint_at_s > 1_700_000_000
        );
    }
    assert!(n_majors >= 2);
}

async fn controldata(instance: &Instance) -> String {
    let program =
        instance.binaries().program("pg_controldata").unwrap().arg(instance.data_directory());
    program.run(PATIENCE, &CancellationToken::new()).await.unwrap().stdout_text()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_end_is_raised_as_the_servers_own_tool_reads_it() {
    for major in [14, 15, 18] {
        let (mut instance, _directory) = cluster(major, &[]).await;
        instance.stop(StopMode::Fast).await.unwrap();
        let data = instance.data_directory();
        let (before, bytes) = ControlFile::read_with_bytes(&data).unwrap();
        let end = Lsn(0x0001_2345_6789_ABC8);
        let raised = ControlFile::with_recovery_end(&bytes, end).unwrap();
        std::fs::write(data.join(CONTROL_FILE_PATH), &raised).unwrap();
        let shown = controldata(&instance).await;
        assert!(!shown.contains("WARNING"), "{shown}");
        let line = |name: &str, value: &str| {
            let line = shown.lines().find(|line| line.starts_with(name));
            assert!(line.is_some_and(|line| line.ends_with(value)), "{line:?}");
        };
        line("Minimum recovery ending location", "12345/6789ABC8");
        line("Min recovery ending loc's timeline", " 1");
        // Nothing else is touched, and nothing is ever lowered.
        let after = ControlFile::parse(&raised).unwrap();
        let expected = ControlFile {
            min_recovery_point: end,
            min_recovery_timeline: before.timeline,
            ..before
        };
        assert_eq!(after, expected);
        assert_eq!(ControlFile::with_recovery_end(&raised, Lsn(end.0 - 8)).unwrap(), raised);
        let mut torn = bytes;
        torn[40] ^= 1;
        assert!(ControlFile::with_recovery_end(&torn, end).unwrap_err().contains("checksum"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_control_file_is_read_again_and_a_damaged_one_refused() {
    let (mut instance, _directory) = cluster(15, &[]).await;
    instance.stop(StopMode::Fast).await.unwrap();
    let data = instance.data_directory();
    let path = data.join(CONTROL_FILE_PATH);
    let good = std::fs::read(&path).unwrap();
    for flipped in [0, 40, 100, 287, 288] {
        let mut damaged = good.clone();
        damaged[flipped] ^= 1;
        assert!(ControlFile::parse(&damaged).unwrap_err().contains("checksum"), "byte {flipped}");
    }
    let mut torn = good.clone();
    torn[40] ^= 1;
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&torn, 0).unwrap();
    assert!(matches!(ControlFile::read(&data), Err(Error::Content { .. })));
    // The other half is written a little later in every round, in the end surely after the first
    // look.
    for round in 0..30 {
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&torn, 0).unwrap();
        let begin = Arc::new(Barrier::new(2));
        let repair = std::thread::spawn({
            let (begin, good) = (begin.clone(), good.clone());
            move || {
                begin.wait();
                (0..round * 5000).for_each(|_| std::hint::spin_loop());
                file.write_all_at(&good, 0).unwrap();
            }
        });
        begin.wait();
        assert_eq!(ControlFile::read_with_bytes(&data).unwrap().1, good);
        repair.join().unwrap();
    }
    let nowhere = ControlFile::read(Path::new("/nowhere"));
    assert!(matches!(nowhere, Err(Error::Shape { .. })), "{nowhere:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn checksums_are_the_servers_at_every_block_number() {
    for major in [15, 18] {
        let (instance, _directory) = cluster(major, &[]).await;
        let client = connect(&instance.url("postgres")).await;
        client.batch_execute("CREATE EXTENSION pageinspect").await.unwrap();
        for (relation, fork) in [
            ("pg_class", "main"),
            ("pg_proc", "main"),
            ("pg_proc_oid_index", "main"),
            ("pg_proc", "fsm"),
        ] {
            for block in [0_u32, 1, 131_072, 131_073, 4_000_000_000] {
                let sql = format!(
                    "SELECT page, page_checksum(page, {block})::int4 FROM get_raw_page('{relation}', '{fork}', 0) AS page"
                );
                let row = client.query_one(sql.as_str(), &[]).await.unwrap();
                let (page, theirs): (Vec<u8>, i32) = (row.get(0), row.get(1));
                let ours = page::checksum(&page, block).cast_signed();
                assert_eq!(i32::from(ours), theirs, "{relation} {fork} {block}");
            }
        }
        let sql = "SELECT get_raw_page('pg_class', 0), (page_header(get_raw_page('pg_class', 0))).lsn::text";
        let row = client.query_one(sql, &[]).await.unwrap();
        let (page, lsn): (Vec<u8>, String) = (row.get(0), row.get(1));
        assert_eq!(page::lsn(&page).to_string(), lsn);
    }
}

/// The rules for a stopped or checkpointed cluster: every page was changed before the backup began.
fn strict(instance: &Instance) -> PageRules {
    let control = ControlFile::read(&instance.data_directory()).unwrap();
    PageRules {
        block_size: control.block_size,
        segment_blocks: control.relation_segment_blocks,
        checksums: control.has_checksums(),
        backup_start: Lsn(control.checkpoint.0 + (1 << 32)),
    }
}

fn scan(options: &ScanOptions) -> Result<Scan, Error> {
    LocalFiles::new(&options.data_directory).scan(options)
}

fn open(
    path: &Path,
    name: RelationFile,
    rules: PageRules,
) -> std::io::Result<Option<RelationReader>> {
    RelationReader::open_in(&LocalFiles::new("/"), path, 0, name, rules)
}

/// Reads a whole file through a reader, 96 KiB at a time.
fn read_whole(path: &Path, rules: PageRules) -> (Vec<u8>, RelationReader) {
    let name = RelationFile::parse(path.file_name().unwrap().to_str().unwrap()).unwrap();
    let mut reader = open(path, name, rules).unwrap().unwrap();
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; 96 << 10]);
    loop {
        let n_bytes = reader.read_at(bytes.len() as u64, &mut buffer).unwrap();
        bytes.extend_from_slice(&buffer[..n_bytes]);
        if n_bytes < buffer.len() {
            return (bytes, reader);
        }
    }
}

/// Whether entries stand as they are stored: each once, a directory right before what is in it.
fn in_order(scan: &Scan) -> bool {
    let paths: Vec<String> = scan.entries.iter().map(|entry| entry.path).collect();
    paths.is_sorted_by(|a, b| a.split('/').lt(b.split('/')))
}

fn scan_of(instance: &Instance) -> Scan {
    scan(&scan_options(instance)).unwrap()
}

fn scan_options(instance: &Instance) -> ScanOptions {
    let data_directory = instance.data_directory();
    let catalog_version = ControlFile::read(&data_directory).unwrap().catalog_version;
    let major = instance.binaries().major();
    ScanOptions { data_directory, major, catalog_version, settings_files: Vec::new() }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_page_of_a_sound_cluster_is_sound_and_read_as_it_is() {
    for major in [15, 18] {
        let (mut instance, _directory) = cluster(major, &[]).await;
        let client = connect(&instance.url("postgres")).await;
        let sql = "CREATE TABLE t AS SELECT i, repeat('x', 200) AS filler FROM generate_series(1, 20000) i; \
                   CREATE INDEX ON t (i); CREATE UNLOGGED TABLE u AS TABLE t; VACUUM t; CHECKPOINT";
        for statement in sql.split(';') {
            client.batch_execute(statement).await.unwrap();
        }
        instance.stop(StopMode::Fast).await.unwrap();
        let (mut n_pages, mut forks) = (0, BTreeSet::new());
        for entry in scan_of(&instance).entries {
            let EntryKind::Relation(name) = entry.kind else { continue };
            forks.insert(name.fork);
            let source = instance.data_directory().join(&entry.path);
            let (bytes, reader) = read_whole(&source, strict(&instance));
            assert_eq!(reader.bad_blocks(), [0_u32; 0], "{}", entry.path);
            assert_eq!(reader.torn_pages(), 0);
            assert_eq!(bytes, std::fs::read(&source).unwrap());
            n_pages += bytes.len() / 8192;
        }
        assert!(n_pages > 1000 && forks.len() == 4, "{n_pages} {forks:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_segment_of_a_relation_goes_on_counting() {
    let (mut instance, _directory) = cluster(15, &[]).await;
    let client = connect(&instance.url("postgres")).await;
    client.batch_execute("CREATE TABLE big (filler text)").await.unwrap();
    let path = text(&client, "SELECT pg_relation_filepath('big')").await;
    instance.stop(StopMode::Fast).await.unwrap();
    // A first segment of empty pages, which is legal and takes no space; the server goes on in the
    // second.
    let first = instance.data_directory().join(&path);
    OpenOptions::new().write(true).open(&first).unwrap().set_len(1 << 30).unwrap();
    instance.start().await.unwrap();
    let client = connect(&instance.url("postgres")).await;
    let fill = "INSERT INTO big SELECT repeat('x', 1000) FROM generate_series(1, 500)";
    client.batch_execute(fill).await.unwrap();
    client.batch_execute("CHECKPOINT").await.unwrap();

    let second = instance.data_directory().join(format!("{path}.1"));
    let (bytes, reader) = read_whole(&second, strict(&instance));
    assert!(bytes.len() > 100_000, "{}", bytes.len());
    assert_eq!(reader.bad_blocks(), [0_u32; 0]);
    // Counted from the file's own beginning every used page is wrong: the test can fail.
    let wrong = PageRules { segment_blocks: 1, ..strict(&instance) };
    let (_, reader) = read_whole(&second, wrong);
    assert!(!reader.bad_blocks().is_empty());
    // The sparse segment is all new pages but for the last.
    let state = page::inspect(&bytes[..8192], 131_072, true);
    assert_eq!(state, PageState::Valid);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_reported_by_block_and_copied_as_it_is() {
    let (mut instance, _directory) = cluster(18, &[]).await;
    let client = connect(&instance.url("postgres")).await;
    let make = "CREATE TABLE t AS SELECT i, repeat('x', 500) FROM generate_series(1, 1000) i";
    client.batch_execute(make).await.unwrap();
    let path = text(&client, "SELECT pg_relation_filepath('t')").await;
    instance.stop(StopMode::Fast).await.unwrap();
    let path = instance.data_directory().join(path);
    let rules = strict(&instance);
    let (sound, reader) = read_whole(&path, rules);
    assert!(reader.bad_blocks().is_empty());

    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    file.write_all_at(b"damage", 3 * 8192 + 5000).unwrap();
    // A page that claims to be new and is not empty.
    file.write_all_at(&[0; 24], 7 * 8192).unwrap();
    // A position from the far future is no excuse.
    file.write_all_at(&[0xff; 8], 20 * 8192).unwrap();
    let (bytes, reader) = read_whole(&path, rules);
    assert_eq!(reader.bad_blocks(), [3, 7, 20]);
    assert_eq!(bytes, std::fs::read(&path).unwrap());
    assert_ne!(bytes, sound);

    // Without checksums only the impossible header is seen.
    let (_, reader) = read_whole(&path, PageRules { checksums: false, ..rules });
    assert_eq!(reader.bad_blocks(), [7]);
    // Changed since the backup began, by its own position: replay brings the page back.
    let (_, reader) = read_whole(&path, PageRules { backup_start: Lsn(1), ..rules });
    assert_eq!(reader.bad_blocks(), [7, 20]);
    assert_eq!(reader.torn_pages(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_in_the_middle_of_a_write_is_read_again() {
    let (mut instance, _directory) = cluster(15, &[]).await;
    let client = connect(&instance.url("postgres")).await;
    let make = "CREATE TABLE t AS SELECT i, repeat('x', 500) FROM generate_series(1, 1000) i";
    client.batch_execute(make).await.unwrap();
    let path = text(&client, "SELECT pg_relation_filepath('t')").await;
    instance.stop(StopMode::Fast).await.unwrap();
    let path = instance.data_directory().join(path);
    let sound = std::fs::read(&path).unwrap();
    let rules = strict(&instance);

    // Half of page 5 is there; the other half comes while the reader looks. A little later in every
    // round, until it comes between two looks.
    let name = RelationFile::parse(path.file_name().unwrap().to_str().unwrap()).unwrap();
    let seen_torn = (1..100).any(|round| {
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[7; 4096], 5 * 8192 + 4096).unwrap();
        let mut reader = open(&path, name, rules).unwrap().unwrap();
        let mut buffer = vec![0; sound.len()];
        let begin = Arc::new(Barrier::new(2));
        let writer = std::thread::spawn({
            let (begin, rest) = (begin.clone(), sound[5 * 8192 + 4096..6 * 8192].to_vec());
            move || {
                begin.wait();
                (0..round * 1000).for_each(|_| std::hint::spin_loop());
                file.write_all_at(&rest, 5 * 8192 + 4096).unwrap();
            }
        });
        begin.wait();
        assert_eq!(reader.read_at(0, &mut buffer).unwrap(), sound.len());
        writer.join().unwrap();
        assert_eq!(buffer, sound);
        assert_eq!(reader.bad_blocks(), [0_u32; 0]);
        reader.torn_pages() == 1
    });
    assert!(seen_torn);

    // A last page that is only partly there is legal and comes as it is.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(sound.len() as u64 - 8192 + 100).unwrap();
    let (bytes, reader) = read_whole(&path, rules);
    assert_eq!(bytes, sound[..sound.len() - 8092]);
    assert_eq!(reader.bad_blocks(), [0_u32; 0]);
    // A dropped relation is nothing to read, and an offset inside a page is a mistake of the
    // caller.
    assert!(open(Path::new("/nowhere/1"), name, rules).unwrap().is_none());
    assert!(reader_at(&path, name, rules, 100).is_err());
}

fn reader_at(
    path: &Path,
    name: RelationFile,
    rules: PageRules,
    offset: u64,
) -> std::io::Result<usize> {
    open(path, name, rules).unwrap().unwrap().read_at(offset, &mut [0; 8192])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scan_lists_what_the_servers_own_base_backup_copies() {
    for major in [15, 18] {
        let settings =
            [("allow_in_place_tablespaces", "on"), ("autovacuum", "off"), ("temp_buffers", "100")];
        let (instance, directory) = cluster(major, &settings).await;
        let data = instance.data_directory();
        let space = directory.path().join("space");
        std::fs::create_dir(&space).unwrap();
        let client = connect(&instance.url("postgres")).await;
        let make = [
            format!("CREATE TABLESPACE there LOCATION '{}'", space.display()),
            "CREATE TABLESPACE here LOCATION ''".to_owned(),
            "CREATE TABLE t TABLESPACE there AS SELECT generate_series(1, 10000) i".to_owned(),
            "CREATE UNLOGGED TABLE u (i int PRIMARY KEY)".to_owned(),
            "CREATE UNLOGGED TABLE v (i int PRIMARY KEY) TABLESPACE there".to_owned(),
            "INSERT INTO u SELECT generate_series(1, 10000)".to_owned(),
            "VACUUM t, u".to_owned(),
            // In the session's own files, and too big for its buffers.
            "CREATE TEMP TABLE x AS SELECT generate_series(1, 100000) i".to_owned(),
            "CREATE TEMP TABLE y TABLESPACE there AS SELECT generate_series(1, 100000) i"
                .to_owned(),
            "CREATE DATABASE d".to_owned(),
            "SELECT pg_create_physical_replication_slot('s', true)".to_owned(),
        ];
        for statement in make {
            client.batch_execute(&statement).await.unwrap();
        }
        if major >= 15 {
            client.batch_execute("CREATE TABLE w TABLESPACE here AS SELECT 1").await.unwrap();
        }
        std::fs::create_dir(data.join("base/pgsql_tmp")).unwrap();
        std::fs::create_dir_all(data.join("log/backup_label")).unwrap();
        for junk in [
            "base/pgsql_tmp/pgsql_tmp1.0",
            "backup_label.old",
            "postgresql.auto.conf.tmp",
            "current_logfiles.tmp",
            "log/backup_label/x",
            // Byte by byte these stand between `log` and what is in it.
            "log-old",
            "log.1",
            "notes.txt",
            "pg_stat_tmp/x",
            "empty",
        ] {
            std::fs::write(data.join(junk), junk).unwrap();
        }
        let copy = directory.path().join("copy");
        let mapping =
            format!("{}={}", space.display(), directory.path().join("space-copy").display());
        let program = instance.binaries().program("pg_basebackup").unwrap();
        let url = instance.url("postgres");
        let arguments = [
            "-d",
            &url,
            "-X",
            "none",
            "-c",
            "fast",
            "--no-sync",
            "--no-manifest",
            "-T",
            &mapping,
            "-D",
        ];
        program.args(arguments).arg(&copy).run(PATIENCE, &CancellationToken::new()).await.unwrap();

        let scan = scan_of(&instance);
        let mut theirs = BTreeSet::new();
        list(&copy, Path::new(""), &mut theirs);
        // The server's tool makes these for the restore, and leaves out what only a look at the
        // whole path tells from rubbish.
        for made in ["backup_label", "tablespace_map", "pg_wal/archive_status"] {
            theirs.remove(made);
        }
        let mut ours: BTreeSet<String> = scan.entries.iter().map(|entry| entry.path).collect();
        ours.remove("pg_wal/archive_status");
        for kept in ["log/backup_label", "log/backup_label/x"] {
            assert!(ours.contains(kept), "{kept}");
            ours.remove(kept);
            theirs.remove(kept);
        }
        // The tool copies this one leftover of an earlier backup.
        assert!(!ours.contains("backup_label.old"));
        theirs.remove("backup_label.old");
        assert_eq!(
            ours.difference(&theirs).collect::<Vec<_>>(),
            Vec::<&String>::new(),
            "only ours, {major}"
        );
        assert_eq!(
            theirs.difference(&ours).collect::<Vec<_>>(),
            Vec::<&String>::new(),
            "only theirs, {major}"
        );
        assert!(ours.len() > 900, "{}", ours.len());

        assert_eq!(scan.tablespaces.len(), 2);
        assert!(scan.tablespaces.iter().any(|it| it.location == space && !it.in_place));
        assert!(scan.tablespaces.iter().any(|it| it.in_place));
        assert_eq!(scan.warnings, []);
        assert!(in_order(&scan));
        let control =
            scan.entries.iter().find(|entry| entry.kind == EntryKind::ControlFile).unwrap();
        assert_eq!((control.path.as_str(), control.size), (CONTROL_FILE_PATH, 8192));
        for entry in scan.entries {
            let is_directory = data.join(&entry.path).metadata().unwrap().is_dir();
            assert_eq!(is_directory, entry.kind == EntryKind::Directory, "{}", entry.path);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_parent_of_every_entry_is_a_directory_of_the_backup() {
    let (instance, directory) = cluster(15, &[("allow_in_place_tablespaces", "on")]).await;
    let data = instance.data_directory();
    let settings = directory.path().join("etc/main");
    std::fs::create_dir_all(&settings).unwrap();
    // Byte by byte it stands between `main` and what is in that.
    let beside = directory.path().join("etc/main.d");
    std::fs::create_dir(&beside).unwrap();
    let files = [
        beside.join("more.conf"),
        settings.join("pg_hba.conf"),
        settings.join("../main/pg_ident.conf"),
    ];
    for file in &files {
        std::fs::write(file, "# of now").unwrap();
    }
    // What an earlier restore left stands for nothing of today; `notes/` is the user's own.
    for old in [data.join(EXTERNAL_ROOT), data.join("notes").join(EXTERNAL_ROOT)] {
        let old = old.join(settings.strip_prefix("/").unwrap());
        std::fs::create_dir_all(&old).unwrap();
        std::fs::write(old.join("pg_hba.conf"), "# of then, and longer").unwrap();
    }
    std::fs::write(data.join("pgmuster-restore-incomplete"), "").unwrap();
    std::fs::write(data.join("notes/pgmuster-restore-incomplete"), "").unwrap();
    let space = directory.path().join("space");
    std::fs::create_dir(&space).unwrap();
    let client = connect(&instance.url("postgres")).await;
    let make = format!("CREATE TABLESPACE there LOCATION '{}'", space.display());
    client.batch_execute(&make).await.unwrap();
    client.batch_execute("CREATE TABLESPACE here LOCATION ''").await.unwrap();
    client.batch_execute("CREATE TABLE t TABLESPACE there AS SELECT 1").await.unwrap();

    let options = ScanOptions { settings_files: files.to_vec(), ..scan_options(&instance) };
    let scanned = scan(&options).unwrap();
    assert_eq!(scanned.warnings, []);
    assert_eq!(scanned.tablespaces.len(), 2);
    let find = |path: &str| scanned.entries.iter().find(|entry| entry.path == path);
    for entry in scanned.entries.iter() {
        let Some((parent, _)) = entry.path.rsplit_once('/') else { continue };
        let parent = find(parent).unwrap_or_else(|| panic!("{} has no parent", entry.path));
        assert_eq!(parent.kind, EntryKind::Directory, "{}", entry.path);
    }
    assert!(in_order(&scanned));
    let root = format!("{EXTERNAL_ROOT}/");
    let external: Vec<_> =
        scanned.entries.iter().filter(|entry| entry.path.starts_with(&root)).collect();
    let (files, directories): (Vec<_>, Vec<_>) =
        external.into_iter().partition(|entry| entry.kind == EntryKind::External);
    let names: Vec<_> = files.iter().map(|file| file.path.rsplit_once('/').unwrap().1).collect();
    assert_eq!(names, ["pg_hba.conf", "pg_ident.conf", "more.conf"]);
    for file in &files {
        assert_eq!(std::fs::read_to_string(&scanned.outside[&file.path]).unwrap(), "# of now");
    }
    assert_eq!(scanned.outside.len(), 3);
    assert!(files.iter().all(|file| file.size == 8 && !file.path.contains("..")), "{files:?}");
    assert!(directories.iter().all(|it| (it.kind, it.mode) == (EntryKind::Directory, 0o700)));
    assert!(find("pgmuster-restore-incomplete").is_none());
    assert!(find("notes/pgmuster-restore-incomplete").is_some());
    assert!(find(&format!("notes/{EXTERNAL_ROOT}")).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_that_is_not_mounted_ends_the_scan() {
    let (mut instance, directory) = cluster(15, &[]).await;
    let space = directory.path().join("space");
    std::fs::create_dir(&space).unwrap();
    let client = connect(&instance.url("postgres")).await;
    let make = format!("CREATE TABLESPACE there LOCATION '{}'", space.display());
    client.batch_execute(&make).await.unwrap();
    instance.stop(StopMode::Fast).await.unwrap();
    let options = scan_options(&instance);
    assert_eq!(scan(&options).unwrap().tablespaces.len(), 1);
    let mounted = directory.path().join("mounted");
    std::fs::rename(&space, &mounted).unwrap();
    // No mount point, and one without its file system.
    for expected in ["does not exist", "has no such directory"] {
        let error = scan(&options).unwrap_err();
        let Error::Shape { what, .. } = &error else { panic!("{error}") };
        assert!(what.contains(expected), "{what}");
        let _ = std::fs::create_dir(&space);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_replaced_while_it_is_copied_is_noticed() {
    let (mut instance, directory) = cluster(15, &[]).await;
    let client = connect(&instance.url("postgres")).await;
    for name in ["kept", "dropped"] {
        let space = directory.path().join(name);
        std::fs::create_dir(&space).unwrap();
        let make = format!("CREATE TABLESPACE {name} LOCATION '{}'", space.display());
        client.batch_execute(&make).await.unwrap();
    }
    let roots = scan_of(&instance).roots;
    roots.verify().unwrap();
    // What the server itself does is no accident.
    for change in ["DROP TABLESPACE dropped", "CREATE TABLE t (i int)"] {
        client.batch_execute(change).await.unwrap();
    }
    roots.verify().unwrap();
    drop(client);
    instance.stop(StopMode::Fast).await.unwrap();
    roots.verify().unwrap();

    for place in [directory.path().join("kept"), instance.data_directory()] {
        let aside = directory.path().join("aside");
        std::fs::rename(&place, &aside).unwrap();
        for expected in ["it went away", "another directory was put in its place"] {
            let error = roots.verify().unwrap_err();
            let Error::Shape { what, .. } = &error else { panic!("{error}") };
            assert!(what.contains(expected), "{what}");
            let _ = std::fs::create_dir(&place);
        }
        std::fs::remove_dir(&place).unwrap();
        std::fs::rename(&aside, &place).unwrap();
        roots.verify().unwrap();
    }
}

/// Every path below `root`, links to directories followed.
fn list(root: &Path, prefix: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(root).unwrap() {
        let entry = entry.unwrap();
        let path = prefix.join(entry.file_name());
        found.insert(path.to_str().unwrap().to_owned());
        if entry.path().is_dir() {
            list(&entry.path(), &path, found);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_come_and_go_during_a_scan_disturb_nothing() {
    let (instance, _directory) = cluster(15, &[]).await;
    let client = connect(&instance.url("postgres")).await;
    let churn = tokio::spawn(async move {
        for round in 0..40 {
            let make = format!("CREATE DATABASE d{round} STRATEGY file_copy");
            let sql = "CREATE UNLOGGED TABLE u AS SELECT 1 AS i; CREATE TABLE t AS SELECT 1 AS i; DROP TABLE t, u";
            client.batch_execute(sql).await.unwrap();
            if round % 10 == 0 {
                client.batch_execute(&make).await.unwrap();
                client.batch_execute(&format!("DROP DATABASE d{round}")).await.unwrap();
            }
        }
    });
    let mut n_scans = 0;
    while !churn.is_finished() {
        let entries = scan_of(&instance).entries;
        assert!(entries.len() > 900);
        n_scans += 1;
    }
    churn.await.unwrap();
    assert!(n_scans > 3, "{n_scans}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_copied_as_it_is_is_said() {
    let (mut instance, directory) = cluster(15, &[]).await;
    instance.stop(StopMode::Fast).await.unwrap();
    let data = instance.data_directory();
    let elsewhere = directory.path().join("elsewhere");
    std::fs::create_dir_all(elsewhere.join("log")).unwrap();
    std::fs::write(elsewhere.join("extra.conf"), "work_mem = 4MB\n").unwrap();
    std::fs::write(elsewhere.join("pg_hba.conf"), "local all all trust\n").unwrap();
    symlink(elsewhere.join("extra.conf"), data.join("extra.conf")).unwrap();
    symlink(elsewhere.join("log"), data.join("log")).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(data.join("socket")).unwrap();
    std::fs::rename(data.join("pg_wal"), elsewhere.join("wal")).unwrap();
    symlink(elsewhere.join("wal"), data.join("pg_wal")).unwrap();
    let mut options = scan_options(&instance);
    options.settings_files = vec![
        data.join("postgresql.conf"),
        elsewhere.join("pg_hba.conf"),
        elsewhere.join("missing.conf"),
    ];
    let scanned = scan(&options).unwrap();
    let find = |path: &str| scanned.entries.iter().find(|entry| entry.path == path);
    let warned = |path: &str| {
        let said = |warning: &&ScanWarning| warning.to_string().contains(path);
        scanned.warnings.iter().find(said).unwrap_or_else(|| panic!("no word of {path}"))
    };
    assert_eq!(find("extra.conf").unwrap().size, 15);
    assert!(matches!(warned("extra.conf"), ScanWarning::LinkFollowed(..)));
    assert!(find("log").is_none());
    assert!(matches!(warned("log"), ScanWarning::LinkLeftOut(..)));
    assert!(matches!(warned("socket"), ScanWarning::SpecialFile(_)));
    assert!(matches!(warned("missing.conf"), ScanWarning::SettingsFileUnreadable(..)));
    assert_eq!(scanned.warnings.len(), 4);
    assert_eq!(find("pg_wal").unwrap().kind, EntryKind::Directory);
    assert!(find("pg_wal/archive_status").is_some());
    assert!(!scanned.entries.iter().any(|entry| entry.path.starts_with("pg_wal/0")));
    let external = format!("{EXTERNAL_ROOT}{}", elsewhere.join("pg_hba.conf").display());
    assert_eq!(find(&external).unwrap().kind, EntryKind::External);
    assert_eq!(scanned.entries.iter().filter(|entry| entry.kind == EntryKind::External).count(), 1);
    drop(socket);

    // A database behind a link would be missing from the copy without a word.
    let database = std::fs::read_dir(data.join("base")).unwrap().next().unwrap().unwrap().path();
    let moved = elsewhere.join(database.file_name().unwrap());
    std::fs::rename(&database, &moved).unwrap();
    symlink(&moved, &database).unwrap();
    let error = scan(&options).unwrap_err();
    let Error::Shape { what, .. } = &error else { panic!("{error}") };
    assert!(what.contains("is a link to"), "{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_inside_the_data_directory_is_copied_once() {
    let (instance, _directory) = cluster(15, &[]).await;
    let inside = instance.data_directory().join("inside");
    std::fs::create_dir(&inside).unwrap();
    let client = connect(&instance.url("postgres")).await;
    let make = format!("CREATE TABLESPACE inside LOCATION '{}'", inside.display());
    client.batch_execute(&make).await.unwrap();
    client.batch_execute("CREATE TABLE t TABLESPACE inside AS SELECT 1").await.unwrap();
    let scanned = scan_of(&instance);
    let name = text(&client, "SELECT pg_relation_filenode('t')").await;
    let copies = scanned.entries.iter().filter(|entry| entry.path.ends_with(&format!("/{name}")));
    let paths: Vec<String> = copies.map(|entry| entry.path).collect();
    assert_eq!(paths.len(), 1);
    assert!(paths[0].starts_with("pg_tblspc/"), "{paths:?}");
    assert!(matches!(scanned.warnings[..], [ScanWarning::TablespaceInside(..)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_may_not_be_read_comes_with_its_cure() {
    assert!(
        !Account::current().is_root(),
        "run ./tests/run, which runs the tests as an ordinary user"
    );
    let (mut instance, _directory) = cluster(15, &[]).await;
    instance.stop(StopMode::Fast).await.unwrap();
    let options = scan_options(&instance);
    let global = options.data_directory.join("global");
    std::fs::set_permissions(&global, PermissionsExt::from_mode(0o000)).unwrap();
    let scanned = scan(&options);
    let control = ControlFile::read(&options.data_directory);
    std::fs::set_permissions(&global, PermissionsExt::from_mode(0o700)).unwrap();
    for error in [scanned.unwrap_err(), control.unwrap_err()] {
        let Error::Unreadable { cure, .. } = &error else { panic!("{error}") };
        assert!(cure.contains(&format!("uid {}", Account::current().uid)), "{cure}");
        assert!(cure.contains("--allow-group-access"), "{cure}");
    }
    let wrong_major = ScanOptions { major: 16, ..options.clone() };
    assert!(matches!(scan(&wrong_major), Err(Error::Shape { .. })));
    let nowhere = ScanOptions { data_directory: PathBuf::from("/nowhere"), ..options };
    assert!(matches!(scan(&nowhere), Err(Error::Shape { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn segments_are_read_only_when_they_are_what_their_name_says() {
    let mut n_majors = 0;
    for major in 14..=18 {
        if optional_binaries(major).await.is_none() && major != 15 && major != 18 {
            continue;
        }
        n_majors += 1;
        let (mut instance, _directory) = cluster(major, &[("wal_keep_size", "100MB")]).await;
        let client = connect(&instance.url("postgres")).await;
        let lsn = async |sql: &str| text(&client, sql).await.parse::<Lsn>().unwrap();
        let start = lsn("SELECT pg_current_wal_lsn()").await;
        for _ in 0..4 {
            client.batch_execute("SELECT txid_current(); SELECT pg_switch_wal()").await.unwrap();
        }
        let stop = lsn("SELECT pg_current_wal_flush_lsn()").await;
        let size = 1 << 20;
        let name = text(&client, &format!("SELECT pg_walfile_name('{start}')")).await;
        assert_eq!(Segment::containing(start, Timeline(1), size).file_name(size), name);
        let control = ControlFile::read(&instance.data_directory()).unwrap();
        let origin =
            WalOrigin { major, system_identifier: control.system_identifier, segment_size: size };
        let wal = instance.data_directory().join("pg_wal");
        let files = LocalFiles::new(instance.data_directory());
        let segments: Vec<Segment> = Segment::range(start, stop, Timeline(1), size).collect();
        assert!(segments.len() >= 4, "{segments:?}");
        for segment in &segments {
            let content = origin.read(&files, *segment).unwrap().unwrap();
            assert_eq!(content, std::fs::read(wal.join(segment.file_name(size))).unwrap());
        }
        let refused = |origin: WalOrigin, segment: Segment| {
            origin.read(&files, segment).unwrap_err().to_string()
        };
        let stranger = WalOrigin { system_identifier: SystemIdentifier(1), ..origin };
        assert!(refused(stranger, segments[0]).contains("system identifier"));
        let older = WalOrigin { major: major - 1, ..origin };
        assert!(refused(older, segments[0]).contains("PostgreSQL"));
        let longer = WalOrigin { segment_size: 2 << 20, ..origin };
        let far = Segment { number: 0, ..segments[0] };
        assert!(longer.read(&files, far).unwrap().is_none());
        // A segment under the name of another: what the server keeps ready for later looks just so.
        let later = Segment { number: segments[0].number + 1000, ..segments[0] };
        let copy = wal.join(later.file_name(size));
        std::fs::copy(wal.join(segments[0].file_name(size)), &copy).unwrap();
        assert!(refused(origin, later).contains("its name says"));
        File::options().write(true).open(&copy).unwrap().set_len(1000).unwrap();
        assert!(refused(origin, later).contains("1000 bytes"));
        std::fs::remove_file(&copy).unwrap();

        // After a promotion the first segment is a copy of the old timeline's last, headers
        // included.
        drop(client);
        instance.stop(StopMode::Fast).await.unwrap();
        std::fs::write(instance.data_directory().join("standby.signal"), "").unwrap();
        instance.start().await.unwrap();
        let client = connect(&instance.url("postgres")).await;
        client.batch_execute("SELECT pg_promote()").await.unwrap();
        let now = text(&client, "SELECT pg_current_wal_insert_lsn()").await.parse::<Lsn>().unwrap();
        let history = read_history(&wal, Timeline(2)).unwrap().unwrap();
        assert_eq!(history.entries.len(), 1);
        let left = history.end_of(Timeline(1)).unwrap();
        assert!(start < left && left <= now, "{start} {left} {now}");
        assert_eq!(read_history(&wal, Timeline(3)).unwrap(), None);
        let first = Segment::containing(history.entries[0].switched_at, Timeline(2), size);
        let content = origin.read(&files, first).unwrap().unwrap();
        let header = SegmentHeader::parse(&content).unwrap();
        assert!(header.timeline <= Timeline(2) && header.block_size == 8192);
    }
    assert!(n_majors >= 2);
}
