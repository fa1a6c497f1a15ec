//! Clusters of unusual shape: each is backed up, restored with the repository and its key alone, booted, and compared.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

mod house;
mod pages;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use house::{
    DATA, House, bin_dir, nothing_is_left_on, number, replay, serve, session, start_plainly,
    within_limit,
};
use pages::Compared;
use postgres::binaries::Binaries;
use postgres::instance::{Instance, InstanceOptions, StopMode};
use postgres::quote;
use postgres::scan::EXTERNAL_ROOT;
use postgres::wal::Segment;
use proto::job::BackupOutcome;
use proto::{Code, ProofLevel};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use worker::restoring::{self, Destination};

fn quick() -> InstanceOptions {
    with_settings(&[])
}

/// All of the log stays: the witnesses replay it.
fn with_settings(settings: &[(&str, &str)]) -> InstanceOptions {
    let settings = [&[("wal_keep_size", "1GB")], settings].concat();
    let settings = settings.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
    InstanceOptions { fsync: false, settings: settings.collect(), ..InstanceOptions::default() }
}

/// The files of a server that does not run. Links are followed, so that nothing leads back to the server: its tablespaces lie
/// in place, as far as the server may have such.
fn witness_of(data: &Path, place: &Path) -> PathBuf {
    let witness = place.join("witness");
    let copied = Command::new("cp").arg("-aL").args([data, &witness]).status().unwrap();
    assert!(copied.success(), "{copied}");
    witness
}

/// The witness, which the server's own log brings to the end of the backup, and a copy that was restored and has nothing but
/// itself must be the same.
async fn same_as_its_witness(house: &House, outcome: &BackupOutcome, witness: &Path) -> Compared {
    let copy = house.place.path().join("replayed");
    within_limit(house.restore(outcome, &copy)).await;
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        // Settings that lay elsewhere come to lie elsewhere.
        if !copy.join(name).exists() {
            fs::copy(witness.join(name), copy.join(name)).unwrap();
        }
    }
    let wal = house.server.data_directory().join("pg_wal");
    let (command, major) =
        (format!("cp \"{}/%f\" \"%p\"", wal.display()), house.server.binaries().major());
    replay(witness, major, outcome.stop_lsn, &command).await;
    replay(&copy, major, outcome.stop_lsn, "false").await;
    let compared = pages::same_pages(&copy, witness);
    assert!(compared.pages > 1_000 && compared.files > 500, "{compared:?}");
    compared
}

/// Tablespaces, which are twice as many as the file handles.
const MANY: usize = 1_000;
const HANDLES: u64 = 512;

/// Directories as only a test names them. PostgreSQL allows everything but single quotes in the path of a tablespace.
const ODD_DIRECTORIES: [&str; 9] = [
    "with space",
    "-leading",
    "100%s",
    "a=b",
    "double\"quote",
    "back\\slash",
    "new\nline",
    "ümläut ☃",
    "sixty-three-characters-are-the-most-that-a-name-of-a-table-has",
];

#[tokio::test(flavor = "multi_thread")]
async fn tablespaces_of_every_shape_come_back() {
    // Without it no server opens once it has one: the restored one reads this setting, too.
    let in_place = with_settings(&[("allow_in_place_tablespaces", "on")]);
    let mut house = House::new(15, in_place).await;
    let spaces = house.place.path().join("spaces");
    fs::create_dir(&spaces).unwrap();
    let sql = session(&house.server.url("postgres")).await;
    let run = async |statement: &str| sql.run("prepare", statement).await.unwrap();
    // Replay of a thousand directories is not what is tested; the copy of them is.
    run("SET synchronous_commit = off").await;
    let place = async |name: &str, directory: &Path| {
        fs::create_dir_all(directory).unwrap();
        let location = quote::literal(directory.to_str().unwrap());
        run(&format!("CREATE TABLESPACE {name} LOCATION {location}")).await;
    };
    for (number, directory) in ODD_DIRECTORIES.iter().enumerate() {
        place(&format!("odd_{number}"), &spaces.join(directory)).await;
        run(&format!("CREATE TABLE public.odd_{number} TABLESPACE odd_{number} AS SELECT 1 AS n"))
            .await;
    }
    // One below another, and one inside the data directory.
    place("outer_one", &spaces.join("outer")).await;
    place("inner_one", &spaces.join("outer/below/inner")).await;
    place("inside", &house.server.data_directory().join("inside")).await;
    run("CREATE TABLESPACE in_place LOCATION ''").await;
    for name in ["outer_one", "inner_one", "inside", "in_place"] {
        run(&format!("CREATE TABLE public.{name} TABLESPACE {name} AS SELECT 1 AS n")).await;
    }
    for number in 0..MANY {
        let name = format!("many_{number}");
        place(&name, &spaces.join(&name)).await;
        if number % 100 == 0 {
            run(&format!("CREATE TABLE public.{name} TABLESPACE {name} AS SELECT 1 AS n")).await;
        }
    }
    sql.close().await;
    house.server.stop(StopMode::Fast).await.unwrap();
    let witness = witness_of(&house.server.data_directory(), house.place.path());
    house.server.start().await.unwrap();
    for name in ["odd_6", "inner_one", "inside", "in_place"] {
        house
            .sql(&format!("INSERT INTO public.{name} SELECT 0 FROM generate_series(1, 5000)"))
            .await;
    }

    // As with a thousand and the usual limit.
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(HANDLES), maximum }).unwrap();
    let outcome = house.back_up().await;
    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);

    let repository = house.reopened().await;
    let backup = restoring::find(&repository, None, None, Some(outcome.backup)).await.unwrap();
    let facts = backup.facts();
    assert_eq!(
        facts.tablespaces.len(),
        MANY + ODD_DIRECTORIES.len() + 3,
        "all but the one in place"
    );
    let directory = house.place.path().join("restored");
    let at = |name: &str| {
        let location = spaces.join(name).display().to_string();
        facts.tablespaces.iter().find(|space| space.location == location).unwrap().oid
    };

    // Two that would meet are refused before anything is written.
    let together = house.place.path().join("together");
    let meet = [
        BTreeMap::from([(at("many_1"), together.clone()), (at("many_2"), together.clone())]),
        BTreeMap::from([(at("many_1"), together.clone()), (at("many_2"), together.join("in/it"))]),
        BTreeMap::from([(at("many_1"), directory.join("pg_tblspc/1"))]),
    ];
    for tablespaces in meet {
        let destination = Destination {
            data_directory: directory.clone(),
            tablespaces,
            delta: false,
            believe_cache: false,
            recovery: None,
            keep_archiving: false,
        };
        let destination = destination.complete(facts);
        let refused = restoring::restore(&house.cx(), &backup, &destination, 2).await.unwrap_err();
        assert_eq!(refused.code, Code::RequestInvalid, "{refused}");
        assert!(refused.message.contains("pg_tblspc/"), "{refused}");
        assert!(!directory.exists() && !together.exists(), "something was written");
    }

    // Where the person says, under an odd name, and beside the data directory for the others.
    let elsewhere = house.place.path().join("else where\n%");
    let tablespaces = BTreeMap::from([(at("with space"), elsewhere.clone())]);
    let destination = Destination {
        data_directory: directory.clone(),
        tablespaces,
        delta: false,
        believe_cache: false,
        recovery: None,
        keep_archiving: false,
    }
    .complete(facts);
    restoring::restore(&house.cx(), &backup, &destination, 2).await.unwrap();
    for (oid, place) in &destination.tablespaces {
        let link = directory.join(format!("pg_tblspc/{oid}"));
        assert_eq!(
            fs::read_link(&link).unwrap(),
            *place,
            "it leads to the copy, not to production"
        );
    }
    assert!(elsewhere.read_dir().unwrap().next().is_some());
    let (_running, url) = start_plainly(&directory, 15).await;
    let mut sum = String::from("SELECT 0::int8");
    let tables = ["outer_one", "inner_one", "inside", "in_place"].map(str::to_owned).into_iter();
    let tables = tables.chain((0..ODD_DIRECTORIES.len()).map(|number| format!("odd_{number}")));
    let tables = tables.chain((0..MANY).step_by(100).map(|number| format!("many_{number}")));
    let mut wanted = 0;
    for table in tables {
        wanted += 1;
        write!(sum, " + (SELECT sum(n) FROM public.{table})").unwrap();
    }
    assert_eq!(number(&url, &sum).await, wanted);
    let compared = same_as_its_witness(&house, &outcome, &witness).await;
    assert_eq!(compared.in_tablespaces, usize::try_from(wanted).unwrap(), "{compared:?}");

    // A link that leads round in a circle is no tablespace that was dropped.
    let (one, two) = (spaces.join("many_7"), spaces.join("round"));
    fs::remove_dir_all(&one).unwrap();
    symlink(&two, &one).unwrap();
    symlink(&one, &two).unwrap();
    let failure = house.back_up_as(&house.cx()).await.unwrap_err();
    let link = format!("pg_tblspc/{}", at("many_7"));
    assert_eq!(failure.code, Code::SourceUnreadable, "{failure}");
    assert!(failure.message.contains(&link), "{failure}");
    nothing_is_left_on(&house).await;
}

/// 63 bytes, each odd in some text: SQL, a shell, a path, a URL, TOML, JSON, HTML, a label of a metric.
fn odd(first: char) -> String {
    let mut name = format!("{first}a b'c\"d\ne\\f=g%h$i`j;k<l>m&n{{o}}p/q?r#s*t\té☃ --x");
    while name.len() < 63 {
        name.push('z');
    }
    assert_eq!(name.len(), 63, "{name:?}");
    name
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_every_odd_character_come_back() {
    let mut house = House::new(18, quick()).await;
    let names = [odd('-'), odd('"'), odd('.')];
    let data = house.server.data_directory();
    for name in &names {
        let quoted = quote::identifier(name);
        house.sql(&format!("CREATE DATABASE {quoted}")).await;
        let url = url_of(&house.server, name);
        let inside = session(&url).await;
        let table = quote::qualified(name, name);
        let statements = format!(
            "CREATE SCHEMA {quoted}; CREATE TABLE {table} ({quoted} int); INSERT INTO {table} VALUES (1), (2);
             CREATE INDEX {index} ON {table} ({quoted}); CREATE ROLE {quoted}; CREATE SEQUENCE public.{quoted}",
            index = quote::identifier(&name.replace('z', "y")),
        );
        inside.run("prepare", &statements).await.unwrap();
        inside.close().await;
    }
    // Files that an administrator or an extension put there. A slash is the one thing no name has.
    let files: Vec<String> = names.iter().map(|name| name.replace('/', ":")).collect();
    let long = "ü".repeat(127) + "x";
    let notes = data.join(&long);
    fs::create_dir(&notes).unwrap();
    for name in &files {
        fs::write(data.join(name), name).unwrap();
        fs::write(notes.join(name), name).unwrap();
    }
    // A settings file behind an odd path is one, too.
    let etc = house.place.path().join("etc").join(files[0].replace('\'', "").replace('\n', " "));
    fs::create_dir_all(&etc).unwrap();
    let included = etc.join("more.conf");
    fs::write(&included, "work_mem = '7MB'\n").unwrap();
    house.server.set(&[("include", included.to_str().unwrap())]).unwrap();
    house.server.stop(StopMode::Fast).await.unwrap();
    let witness = witness_of(&data, house.place.path());
    house.server.start().await.unwrap();

    let outcome = house.back_up().await;
    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);
    assert_eq!((proof.tables, proof.rows, proof.tables_exact), (3, 6, 3), "{proof:#?}");
    let directory = house.place.path().join("restored");
    house.restore(&outcome, &directory).await;
    for name in &files {
        assert_eq!(fs::read_to_string(directory.join(name)).unwrap(), *name);
        assert_eq!(fs::read_to_string(directory.join(&long).join(name)).unwrap(), *name);
    }
    let kept = format!("{EXTERNAL_ROOT}{}", included.display());
    assert_eq!(fs::read_to_string(directory.join(kept)).unwrap(), "work_mem = '7MB'\n");
    same_as_its_witness(&house, &outcome, &witness).await;
}

/// A connection to a database of any name.
fn url_of(server: &Instance, database: &str) -> String {
    let value = database.replace('\\', "\\\\").replace('\'', "\\'");
    let sockets = server.socket_directory().display();
    format!("host={sockets} port={} user=postgres dbname='{value}'", server.port())
}

/// The data directory and `pg_wal` are links, as on hosts with a volume for each.
async fn behind_links(major: u32, segment_mb: u32, checksums: bool) {
    let place = tempfile::tempdir().unwrap();
    let wal = place.path().join("wal volume");
    let initdb_args = vec![OsString::from("--waldir"), wal.clone().into_os_string()];
    let least = format!("{}MB", 2 * segment_mb);
    let options = InstanceOptions {
        checksums,
        wal_segment_size_mb: Some(segment_mb),
        initdb_args,
        ..with_settings(&[("min_wal_size", &least)])
    };
    let binaries = Binaries::at(&bin_dir(major)).await.unwrap();
    let mut server = Instance::create(&binaries, &place.path().join("pg"), options).await.unwrap();
    let witness = witness_of(&server.data_directory(), place.path());
    let real = place.path().join("data volume");
    fs::rename(server.data_directory(), &real).unwrap();
    symlink(&real, server.data_directory()).unwrap();
    server.start().await.unwrap();
    let connection = server.url("postgres");
    let house = House::around(place, server, &connection).await;
    assert!(house.server.data_directory().is_symlink() && real.join("pg_wal").is_symlink());
    house.sql(DATA).await;
    let outcome = house.back_up_while_wal_is_written(3).await.unwrap();
    nothing_is_left_on(&house).await;
    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);

    let repository = house.reopened().await;
    let backup = restoring::find(&repository, None, None, None).await.unwrap();
    assert_eq!(backup.facts().wal_segment_size, segment_mb << 20);
    assert_eq!(backup.facts().data_checksums, checksums);
    let directory = house.place.path().join("restored");
    house.restore(&outcome, &directory).await;
    let restored_wal = directory.join("pg_wal");
    assert!(fs::symlink_metadata(&restored_wal).unwrap().is_dir(), "it is no link to production");
    let (start, stop) = (outcome.start_lsn, outcome.stop_lsn);
    let segments: Vec<Segment> =
        Segment::range(start, stop, outcome.timeline, segment_mb << 20).collect();
    assert!(!segments.is_empty());
    for segment in segments {
        let file = restored_wal.join(segment.file_name(segment_mb << 20)).metadata().unwrap();
        assert_eq!(file.len(), u64::from(segment_mb) << 20);
    }
    let (_running, url) = start_plainly(&directory, major).await;
    assert_eq!(number(&url, "SELECT count(*) FROM public.orders").await, 50_000);
    same_as_its_witness(&house, &outcome, &witness).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn small_wal_segments_behind_links_come_back_without_checksums() {
    Box::pin(behind_links(15, 1, false)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_wal_segments_behind_links_come_back() {
    Box::pin(behind_links(18, 64, true)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_whose_settings_lie_in_etc_comes_back_with_them() {
    let place = tempfile::tempdir().unwrap();
    let binaries = Binaries::at(&bin_dir(15)).await.unwrap();
    let server = Instance::create(&binaries, &place.path().join("pg"), quick()).await.unwrap();
    let (data, etc) = (server.data_directory(), place.path().join("etc/postgresql/15/main"));
    let witness = witness_of(&data, place.path());
    fs::create_dir_all(&etc).unwrap();
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        fs::rename(data.join(name), etc.join(name)).unwrap();
    }
    let mut settings = fs::read_to_string(etc.join("postgresql.conf")).unwrap();
    for (name, value) in [
        ("data_directory", data.clone()),
        ("hba_file", etc.join("pg_hba.conf")),
        ("ident_file", etc.join("pg_ident.conf")),
    ] {
        writeln!(settings, "{name} = '{}'", value.display()).unwrap();
    }
    writeln!(settings, "work_mem = '7MB'").unwrap();
    fs::write(etc.join("postgresql.conf"), &settings).unwrap();
    let connection = server.url("postgres");
    let config = |etc: &Path| format!("config_file={}", etc.join("postgresql.conf").display());
    let arguments = ["-c".to_owned(), config(&etc)];
    let running = serve(15, &arguments, &place.path().join("log"), &connection).await;
    let house = House::around(place, server, &connection).await;
    house.sql(DATA).await;
    let outcome = house.back_up().await;
    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);
    drop(running);

    // The settings came along; whoever restores says what moved.
    let directory = house.place.path().join("restored");
    let (_, restored) = house.restore_and_tell(&outcome, &directory).await;
    assert!(!directory.join("postgresql.conf").exists());
    let apart = restored.settings_apart.expect("a server there lacks its settings");
    assert_eq!(Path::new(&apart), directory.join(EXTERNAL_ROOT));
    let kept = PathBuf::from(format!("{}/{EXTERNAL_ROOT}{}", directory.display(), etc.display()));
    assert_eq!(fs::read_to_string(kept.join("postgresql.conf")).unwrap(), settings);
    let sockets = house::sockets();
    let mut arguments = vec!["-c".to_owned(), config(&kept)];
    for (name, value) in [
        ("data_directory", directory),
        ("hba_file", kept.join("pg_hba.conf")),
        ("ident_file", kept.join("pg_ident.conf")),
        ("unix_socket_directories", sockets.path().to_owned()),
    ] {
        arguments.extend(["-c".to_owned(), format!("{name}={}", value.display())]);
    }
    let url = format!("postgres://postgres@/postgres?host={}", sockets.path().display());
    let _running = serve(15, &arguments, &sockets.path().join("log"), &url).await;
    assert_eq!(number(&url, "SELECT count(*) FROM public.orders").await, 50_000);
    let sql = "SELECT setting::int8 FROM pg_settings WHERE name = 'work_mem'";
    assert_eq!(number(&url, sql).await, 7 << 10, "it runs on the settings that came along");
    same_as_its_witness(&house, &outcome, &witness).await;
}

/// A relation's file, from its name.
async fn file_of(house: &House, relation: &str) -> PathBuf {
    let session = session(&house.server.url("postgres")).await;
    let sql = "SELECT pg_relation_filepath($1::text::regclass)";
    let row = session.one("look", sql, &[&relation]).await.unwrap();
    let path = row.get::<_, String>(0);
    session.close().await;
    path.into()
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_every_kind_and_size_come_back_as_the_server_would_have_them() {
    const SEGMENT: u64 = 1 << 30;
    let mut house = House::new(18, quick()).await;
    house
        .sql(
            "CREATE TABLE public.large (n int, filler text);
             ALTER TABLE public.large ALTER filler SET STORAGE PLAIN;
             INSERT INTO public.large SELECT g, repeat(chr(97 + g % 26), 8000) FROM generate_series(1, 300) g;
             CREATE TABLE public.empty (n int);
             CREATE UNLOGGED TABLE public.fleeting (n int PRIMARY KEY);
             INSERT INTO public.fleeting SELECT generate_series(1, 1000);
             CREATE UNLOGGED SEQUENCE public.counter;
             SELECT nextval('public.counter') FROM generate_series(1, 5);",
        )
        .await;
    let (large, empty) =
        (file_of(&house, "public.large").await, file_of(&house, "public.empty").await);
    let fleeting = file_of(&house, "public.fleeting").await;
    house.server.stop(StopMode::Fast).await.unwrap();
    let data = house.server.data_directory();
    // A table of more than one file: a row on each page at its beginning and on both sides of where its second file begins,
    // and a hole between them, as after a bulk load that was undone.
    let of_large = fs::File::options().write(true).open(data.join(&large)).unwrap();
    of_large.set_len(SEGMENT - 20 * 8192).unwrap();
    // Files of no table: empty, and with a hole in the middle.
    fs::write(data.join("nothing"), "").unwrap();
    let sparse = fs::File::create(data.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    sparse.write_all_at(b"middle", 40 << 20).unwrap();
    let witness = witness_of(&data, house.place.path());
    house.server.start().await.unwrap();
    house
        .sql(
            "INSERT INTO public.large SELECT g, repeat(chr(97 + g % 26), 8000) FROM generate_series(301, 350) g;
             CHECKPOINT",
        )
        .await;
    let second = data.join(format!("{}.1", large.display()));
    assert!(data.join(&large).metadata().unwrap().len() == SEGMENT, "its first file is full");
    assert!(second.metadata().unwrap().len() > 20 * 8192, "its second file has rows");
    // A session's own tables are there while the backup runs.
    let holder = session(&house.server.url("postgres")).await;
    holder.run("prepare", "CREATE TEMPORARY TABLE mine AS SELECT 1 AS n").await.unwrap();

    let outcome = within_limit(house.back_up()).await;
    let proof = within_limit(house.prove(ProofLevel::L5)).await;
    assert!(proof.passed, "{:#?}", proof.checks);
    holder.close().await;
    let directory = house.place.path().join("restored");
    within_limit(house.restore(&outcome, &directory)).await;
    let of = |path: &Path| fs::metadata(directory.join(path)).unwrap();
    assert_eq!(of(&large).len(), SEGMENT);
    assert_eq!(of(Path::new("nothing")).len(), 0);
    assert_eq!(of(&empty).len(), 0);
    assert_eq!(fs::read(directory.join("sparse")).unwrap(), fs::read(data.join("sparse")).unwrap());
    assert!(!directory.join(&fleeting).exists(), "an unlogged table brings its init fork only");
    assert!(directory.join(format!("{}_init", fleeting.display())).exists());
    let temporary = |root: &Path| {
        let files = root.join("base/5").read_dir().unwrap();
        files
            .filter(|file| file.as_ref().unwrap().file_name().as_encoded_bytes()[0] == b't')
            .count()
    };
    assert_eq!(temporary(&directory), 0, "nobody's session came along");

    let (_running, url) = start_plainly(&directory, 18).await;
    assert_eq!(number(&url, "SELECT sum(n) FROM public.large").await, 350 * 351 / 2);
    assert_eq!(number(&url, "SELECT count(*) FROM public.fleeting").await, 0);
    assert_eq!(number(&url, "SELECT nextval('public.counter')").await, 1);
    assert_eq!(number(&url, "SELECT count(*) FROM public.empty").await, 0);
    let compared = same_as_its_witness(&house, &outcome, &witness).await;
    assert!(compared.pages > 131_072, "{compared:?}");
}
