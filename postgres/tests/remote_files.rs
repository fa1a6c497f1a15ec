//! A server's files read over connections, held against the same files read from disk.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod servers;

use std::path::Path;

use postgres::control_file::ControlFile;
use postgres::files::{LocalFiles, RemoteFiles, RemoteOptions, ServerFiles};
use postgres::scan::{EXTERNAL_ROOT, EntryKind, Scan, ScanOptions, ScanWarning};
use postgres::{Error, Purpose, connect};
use servers::{Server, job, shown};
use tokio_util::sync::CancellationToken;

servers::on_each_major! {
    a_remote_scan_lists_what_a_local_one_lists,
    what_is_read_over_connections_is_what_the_disk_has,
}

async fn remote(server: &Server) -> RemoteFiles {
    let target = server.target("postgres");
    let session = connect(&target, &Purpose::ask(&job())).await.unwrap();
    let identity = session.identity().await.unwrap();
    let options = RemoteOptions { job: job(), sessions_max: 2, cancel: CancellationToken::new() };
    let files = RemoteFiles::of(&session, &target, &identity, options).await;
    session.close().await;
    files.unwrap_or_else(|error| panic!("{}", shown(&error)))
}

/// Off the threads of the runtime.
async fn off<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

fn options(server: &Server, settings_files: &[&Path]) -> ScanOptions {
    let data_directory = server.instance.data_directory();
    let catalog_version = ControlFile::read(&data_directory).unwrap().catalog_version;
    let major = server.instance.binaries().major();
    let settings_files = settings_files.iter().map(|path| (*path).to_owned()).collect();
    ScanOptions { data_directory, major, catalog_version, settings_files }
}

async fn scan_remotely(files: &RemoteFiles, options: &ScanOptions) -> Result<Scan, Error> {
    let (files, options) = (files.clone(), options.clone());
    off(move || files.scan(&options)).await
}

async fn furnished(major: u32) -> Server {
    // Nobody but the test writes.
    let mut settings = vec![("autovacuum", "off"), ("bgwriter_lru_maxpages", "0")];
    if major >= 15 {
        settings.push(("allow_in_place_tablespaces", "on"));
    }
    let server = Server::start(major, &settings).await;
    let data = server.instance.data_directory();
    let space = server.directory.path().join("space");
    std::fs::create_dir(&space).unwrap();
    std::fs::create_dir(data.join("inside")).unwrap();
    let create = |name: &str, place: &Path| {
        format!("CREATE TABLESPACE {name} LOCATION '{}'", place.display())
    };
    let mut statements = vec![
        create("there", &space),
        create("within", &data.join("inside")),
        "CREATE TABLE t TABLESPACE there AS SELECT generate_series(1, 30000) i".to_owned(),
        "CREATE TABLE w TABLESPACE within AS SELECT generate_series(1, 100) i".to_owned(),
        "CREATE UNLOGGED TABLE u AS SELECT generate_series(1, 10000) i".to_owned(),
        "CREATE UNLOGGED TABLE v TABLESPACE there AS SELECT generate_series(1, 10000) i".to_owned(),
        "CREATE TABLE large AS SELECT i, repeat('x', 400) FROM generate_series(1, 20000) i"
            .to_owned(),
        "VACUUM t, u, large".to_owned(),
        "CREATE DATABASE d".to_owned(),
        "SELECT pg_create_physical_replication_slot('s', true)".to_owned(),
    ];
    if major >= 15 {
        statements.push("CREATE TABLESPACE here LOCATION ''".to_owned());
        statements.push("CREATE TABLE h TABLESPACE here AS SELECT 1".to_owned());
    }
    statements.push("CHECKPOINT".to_owned());
    let statements: Vec<&str> = statements.iter().map(String::as_str).collect();
    server.run("postgres", &statements).await;
    std::fs::create_dir(data.join("base/pgsql_tmp")).unwrap();
    std::fs::create_dir_all(data.join("log/backup_label")).unwrap();
    for name in [
        "base/pgsql_tmp/pgsql_tmp1.0",
        "backup_label.old",
        "log/backup_label/x",
        "log-old",
        "log.1",
        "näme ☃ 'quoted' \\back",
        "pg_stat_tmp/x",
        "empty",
    ] {
        std::fs::write(data.join(name), if name == "empty" { "" } else { name }).unwrap();
    }
    server
}

async fn a_remote_scan_lists_what_a_local_one_lists(major: u32) {
    let server = furnished(major).await;
    let data = server.instance.data_directory();
    let _socket = std::os::unix::net::UnixListener::bind(data.join(".s.PGSQL.5432")).unwrap();
    let etc = server.directory.path().join("etc");
    std::fs::create_dir(&etc).unwrap();
    let (included, missing) = (etc.join("more.conf"), etc.join("missing.conf"));
    std::fs::write(&included, "work_mem = '5MB'\n").unwrap();
    let options = options(&server, &[&included, &missing, &data.join("postgresql.conf")]);
    let files = remote(&server).await;
    let ours = scan_remotely(&files, &options).await.unwrap_or_else(|e| panic!("{}", shown(&e)));
    let theirs = LocalFiles::new(&data).scan(&options).unwrap();

    let told = |scan: &Scan| -> Vec<(String, EntryKind, u64, u32)> {
        let entries = scan.entries.iter();
        entries.map(|e| (e.path, e.kind, e.size, e.mode & 0o700)).collect()
    };
    let (ours_told, theirs_told) = (told(&ours), told(&theirs));
    let differ: Vec<_> = ours_told.iter().filter(|entry| !theirs_told.contains(entry)).collect();
    assert!(differ.is_empty(), "only over connections: {differ:?}");
    let differ: Vec<_> = theirs_told.iter().filter(|entry| !ours_told.contains(entry)).collect();
    assert!(differ.is_empty(), "only from disk: {differ:?}");
    assert!(ours_told.len() > 900 && ours_told == theirs_told);
    assert_eq!(ours.tablespaces, theirs.tablespaces);
    assert_eq!(ours.tablespaces.len(), if major >= 15 { 3 } else { 2 });
    let external = format!("{EXTERNAL_ROOT}{}", included.display());
    assert!(ours.entries.iter().any(|entry| entry.path == external));
    let said = |wanted: &dyn Fn(&ScanWarning) -> bool| ours.warnings.iter().any(wanted);
    assert!(said(&|warning| matches!(warning, ScanWarning::TablespaceInside(..))));
    assert!(said(&|warning| matches!(warning, ScanWarning::SpecialFile(_))));
    assert!(said(&|warning| matches!(warning, ScanWarning::SettingsFileUnreadable(..))));
    assert_eq!(ours.warnings.len(), theirs.warnings.len(), "{:?}", ours.warnings);
    files.close();
}

async fn what_is_read_over_connections_is_what_the_disk_has(major: u32) {
    let server = furnished(major).await;
    let data = server.instance.data_directory();
    let options = options(&server, &[]);
    let files = remote(&server).await;
    let scan = scan_remotely(&files, &options).await.unwrap();
    let (reader, at) = (files.clone(), data.clone());
    let (compared, large) = off(move || {
        let (mut compared, mut large) = (0, 0);
        for entry in scan.entries.iter().filter(|entry| entry.kind != EntryKind::Directory) {
            let path = Path::new(&entry.path);
            let file = reader.open(path, entry.size).unwrap().unwrap();
            let wanted = std::fs::read(at.join(&entry.path)).unwrap();
            // In pieces that are none of ours, the last of them longer than what is there.
            let (mut bytes, mut buffer) = (Vec::new(), vec![0; 300 << 10]);
            let mut got = if entry.size > 0 { buffer.len() } else { 0 };
            while got == buffer.len() {
                got = file.read_full_at(&mut buffer, bytes.len() as u64).unwrap();
                bytes.extend_from_slice(&buffer[..got]);
            }
            assert!(bytes == wanted, "{}", entry.path);
            assert!(file.fetched_bytes().unwrap() >= entry.size, "{}", entry.path);
            // Its second page: a small one comes whole, and once.
            let file = reader.open(path, entry.size).unwrap().unwrap();
            let got = file.read_full_at(&mut buffer[..8192], 8192).unwrap();
            assert!(buffer[..got] == wanted[wanted.len().min(8192)..][..got], "{}", entry.path);
            assert_eq!(got as u64, entry.size.saturating_sub(8192).min(8192), "{}", entry.path);
            let fetched = if entry.size <= 512 << 10 { entry.size } else { 8192 };
            assert_eq!(file.fetched_bytes(), Some(fetched), "{}", entry.path);
            compared += 1;
            large += u32::from(bytes.len() > 2 << 20);
        }
        let (control, content) = ControlFile::read_in(&reader).unwrap();
        assert_eq!(control, ControlFile::read(&at).unwrap());
        assert_eq!(content.len(), 8192);
        (compared, large)
    })
    .await;
    assert!(compared > 900 && large > 0, "{compared} {large}");

    // What is gone is no failure: before it is opened, and afterwards.
    std::fs::write(data.join("note"), vec![7; 3 << 20]).unwrap();
    let note = Path::new("note");
    let (reader, at) = (files.clone(), data.join(note));
    off(move || {
        let file = reader.open(note, 3 << 20).unwrap().unwrap();
        let mut buffer = vec![0; 1000];
        assert_eq!(file.read_full_at(&mut buffer, (3 << 20) - 10).unwrap(), 10);
        std::fs::remove_file(at).unwrap();
        assert_eq!(file.read_full_at(&mut buffer, 0).unwrap(), 0);
        for size in [10, 3 << 20] {
            assert!(reader.open(note, size).unwrap().is_none());
        }
        assert_eq!(reader.read(note, 10).unwrap(), None);
    })
    .await;
    files.close();
    let reader = files.clone();
    let closed = off(move || reader.read(Path::new("PG_VERSION"), 10)).await;
    assert!(closed.unwrap_err().to_string().contains("cancelled"));
    let left = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgmuster/%'";
    server.until(left, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_that_is_not_mounted_is_noticed() {
    let server = furnished(15).await;
    let options = options(&server, &[]);
    let files = remote(&server).await;
    let roots = scan_remotely(&files, &options).await.unwrap().roots;
    let verify = async || {
        let (files, roots) = (files.clone(), roots.clone());
        off(move || files.verify(&roots)).await
    };
    verify().await.unwrap();
    let (space, aside) =
        (server.directory.path().join("space"), server.directory.path().join("aside"));
    std::fs::rename(&space, &aside).unwrap();
    for expected in ["does not exist", "has no such directory"] {
        let error = scan_remotely(&files, &options).await.unwrap_err();
        let Error::Shape { what, .. } = &error else { panic!("{error}") };
        assert!(what.contains(expected), "{what}");
        let error = verify().await.unwrap_err();
        let Error::Shape { what, .. } = &error else { panic!("{error}") };
        assert!(what.contains("it went away"), "{what}");
        let _ = std::fs::create_dir(&space);
    }
    std::fs::remove_dir(&space).unwrap();
    std::fs::rename(&aside, &space).unwrap();
    // What the server drops itself is no accident.
    server.run("postgres", &["DROP TABLE t, v", "DROP TABLESPACE there"]).await;
    verify().await.unwrap();
    files.close();
}

#[tokio::test(flavor = "multi_thread")]
async fn links_that_lead_back_end_the_scan() {
    let server = Server::start(15, &[]).await;
    let data = server.instance.data_directory();
    std::fs::create_dir(data.join("notes")).unwrap();
    std::os::unix::fs::symlink(data.join("notes"), data.join("notes/again")).unwrap();
    let files = remote(&server).await;
    let error = scan_remotely(&files, &options(&server, &[])).await.unwrap_err();
    let Error::Shape { cure, .. } = &error else { panic!("{error}") };
    assert!(cure.contains("leads back"), "{cure}");
    files.close();
}
