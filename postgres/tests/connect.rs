//! Sessions with real servers: who answers, what was agreed, what is refused, and that nothing stays open.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod servers;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use postgres::connect::{Purpose, connect, connect_maintenance};
use postgres::error::Error;
use postgres::instance::StopMode;
use postgres::locks::{Class, ClusterLock};
use postgres::{Session, Target, settings};
use proto::{Action, Code, Failure};
use servers::{Server, job, nobody, service, shown};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

servers::on_each_major! {
    the_server_is_who_the_instance_is,
    settings_of_role_and_database_do_not_reach_our_statements,
    a_dropped_session_takes_its_statement_with_it,
    a_cancelled_session_can_be_used_again,
    a_cancel_request_has_been_dealt_with_when_it_returns,
    settings_files_outside_the_data_directory_are_all_told,
    locks_are_found_held_and_lost,
    a_dropped_maintenance_database_is_no_obstacle,
    what_the_server_refuses_is_told_with_a_cure_and_no_password,
}

// TLS and poolers are the same for every version of the server.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_believed_only_as_far_as_asked() {
    tls(18).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn poolers_are_refused_in_every_mode() {
    poolers(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_restarted_is_asked_once_more_and_is_unreachable_then() {
    restarted(15).await;
}

fn purpose() -> Purpose {
    Purpose::ask(&job())
}

async fn open(target: &Target) -> Session {
    connect(target, &purpose()).await.unwrap_or_else(|e| panic!("{}", shown(&e)))
}

async fn refusal(target: &Target) -> Error {
    match connect(target, &purpose()).await {
        Ok(_) => panic!("connected to {target}"),
        Err(error) => error,
    }
}

async fn text(session: &Session, sql: &str) -> String {
    session.one("ask", sql, &[]).await.unwrap_or_else(|e| panic!("{}", shown(&e))).get(0)
}

async fn the_server_is_who_the_instance_is(major: u32) {
    let server = Server::with(major, &[], |options| options.wal_segment_size_mb = Some(4)).await;
    let target = Target::parse(&server.instance.url("postgres"), &nobody()).unwrap();
    let session = open(&target).await;
    let identity = session.identity().await.unwrap();
    assert_eq!(identity.version.major(), major);
    assert_eq!(identity.data_directory, Some(server.instance.data_directory()));
    assert_eq!(identity.socket_directories, [server.instance.socket_directory()]);
    assert_eq!((identity.port, identity.block_size), (server.instance.port(), 8192));
    assert_eq!((identity.relation_segment_size, identity.wal_segment_size), (1 << 30, 4 << 20));
    assert_eq!(
        (identity.timeline.0, identity.in_recovery, identity.data_checksums),
        (1, false, true)
    );
    assert_eq!(identity.backend_pid, session.backend_pid());
    assert!(identity.superuser && identity.may_replicate);
    assert!(identity.redo_lsn <= identity.checkpoint_lsn);
    session.identity_of(Some(identity.system_identifier)).await.unwrap();

    server.run("postgres", &["CREATE ROLE plain LOGIN"]).await;
    let plain = open(&server.target_of("plain", "postgres")).await.identity().await.unwrap();
    assert_eq!(plain.system_identifier, identity.system_identifier);
    assert_eq!((plain.data_directory, plain.superuser, plain.may_replicate), (None, false, false));
}

async fn settings_of_role_and_database_do_not_reach_our_statements(major: u32) {
    let server = Server::start(major, &[("statement_timeout", "1s"), ("lock_timeout", "1s")]).await;
    server
        .run(
            "postgres",
            &[
                "ALTER ROLE postgres SET search_path = evil, pg_catalog",
                "ALTER ROLE postgres SET statement_timeout = '5ms'",
                "ALTER DATABASE postgres SET default_transaction_read_only = off",
                "ALTER ROLE postgres SET client_encoding = 'LATIN1'",
                "ALTER ROLE postgres SET row_security = on",
                "CREATE SCHEMA evil",
                "CREATE FUNCTION evil.pg_backend_pid() RETURNS int LANGUAGE sql AS 'SELECT 1'",
                "CREATE FUNCTION evil.current_setting(text, boolean) RETURNS text LANGUAGE sql AS 'SELECT NULL::text'",
            ],
        )
        .await;
    let session = open(&server.target("postgres")).await;
    for (name, value) in [
        ("search_path", "pg_catalog, pg_temp"),
        ("statement_timeout", "30s"),
        ("lock_timeout", "2s"),
        ("idle_session_timeout", "0"),
        ("default_transaction_read_only", "on"),
        ("client_encoding", "UTF8"),
        ("row_security", "off"),
        ("application_name", "pgmuster/05060708090a"),
    ] {
        assert_eq!(
            text(&session, &format!("SELECT current_setting('{name}')")).await,
            value,
            "{name}"
        );
    }
    assert!(
        session.run("write", "CREATE TABLE public.t ()").await.is_err(),
        "asking must not write"
    );
    let backup = connect(&server.target("postgres"), &Purpose::backup(&job())).await.unwrap();
    assert_eq!(text(&backup, "SELECT current_setting('statement_timeout')").await, "0");
}

async fn settings_files_outside_the_data_directory_are_all_told(major: u32) {
    let server = Server::start(major, &[]).await;
    let outside = server.directory.path().join("etc");
    let place = |name: &str| outside.join(name);
    std::fs::create_dir_all(place("conf.d")).unwrap();
    let file = |name: &str, text: &str| std::fs::write(place(name), text).unwrap();
    file("one.conf", "work_mem = '5MB'\ninclude_dir 'conf.d'\n");
    file("conf.d/two.conf", "maintenance_work_mem = '50MB'\n");
    // Nothing of it is in effect.
    file("conf.d/overruled.conf", "deadlock_timeout = '3s'\n");
    file("conf.d/overruling.conf", "deadlock_timeout = '4s'\n");
    file("conf.d/not_read.txt", "");
    file("hba.conf", "local all all trust\n");
    let data = server.instance.data_directory();
    let append = |name: &str, line: String| {
        let text = std::fs::read_to_string(data.join(name)).unwrap();
        std::fs::write(data.join(name), text + &line).unwrap();
    };
    std::fs::write(data.join("inside.conf"), "").unwrap();
    append(
        "postgresql.conf",
        format!("include '{}'\ninclude 'inside.conf'\n", place("one.conf").display()),
    );
    let mut expected: Vec<_> =
        ["conf.d/overruled.conf", "conf.d/overruling.conf", "conf.d/two.conf", "one.conf"]
            .map(place)
            .into();
    if major >= 16 {
        append("pg_hba.conf", format!("\ninclude {}\n", place("hba.conf").display()));
        expected.insert(3, place("hba.conf"));
    }
    server
        .run(
            "postgres",
            &["CREATE ROLE reader LOGIN IN ROLE pg_read_all_settings", "SELECT pg_reload_conf()"],
        )
        .await;
    server
        .until("SELECT count(*) FROM pg_settings WHERE name = 'work_mem' AND setting = '5120'", 1)
        .await;
    let session = open(&server.target("postgres")).await;
    assert_eq!(settings::files_outside(&session).await.unwrap(), expected);

    // A role that may not look into the files hears of those that count.
    let session = open(&server.target_of("reader", "postgres")).await;
    let in_effect = ["conf.d/overruling.conf", "conf.d/two.conf", "one.conf"].map(place);
    assert_eq!(settings::files_outside(&session).await.unwrap(), in_effect);
}

async fn a_cancel_request_has_been_dealt_with_when_it_returns(major: u32) {
    let server = Server::with(major, &[], |options| options.tcp_port = Some(0)).await;
    server.run("postgres", &["CREATE ROLE worker LOGIN PASSWORD 's'"]).await;
    let tcp = server.instance.tcp_url("worker", "s", "postgres").unwrap();
    for target in [server.target("postgres"), Target::parse(&tcp, &nobody()).unwrap()] {
        let session = open(&target).await;
        let canceller = session.canceller();
        // A request that is still on its way when it is believed to be over ends the next statement, which has work to do.
        for _ in 0..50 {
            canceller.cancel().await.unwrap();
            session
                .run("go on", "SELECT count(*) FROM generate_series(1, 100000)")
                .await
                .unwrap_or_else(|e| panic!("{}", shown(&e)));
        }
    }
}

async fn a_dropped_session_takes_its_statement_with_it(major: u32) {
    let server = Server::start(major, &[]).await;
    let ours = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgmuster/%'";
    let asleep = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgmuster/%' AND wait_event = 'PgSleep'";
    let session = connect(&server.target("postgres"), &Purpose::backup(&job())).await.unwrap();
    let sleeping = tokio::spawn(async move { session.run("sleep", "SELECT pg_sleep(1000)").await });
    server.until(asleep, 1).await;
    sleeping.abort();
    server.until(ours, 0).await;

    let session = open(&server.target("postgres")).await;
    assert_eq!(server.number(ours).await, 1);
    session.close().await;
    server.until(ours, 0).await;
}

async fn a_cancelled_session_can_be_used_again(major: u32) {
    let server = Server::start(major, &[]).await;
    let session = open(&server.target("postgres")).await;
    let cancel = CancellationToken::new();
    let sleep = || session.run("sleep", "SELECT pg_sleep(1000)");
    let begun = Instant::now();
    let error = tokio::join!(session.within("sleep", &cancel, None, sleep()), async {
        server.until("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'", 1).await;
        cancel.cancel();
    });
    assert!(matches!(error.0, Err(Error::Cancelled { .. })));
    assert_eq!(text(&session, "SELECT 'usable'").await, "usable");

    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let error =
        session.within("sleep", &CancellationToken::new(), deadline, sleep()).await.unwrap_err();
    assert!(matches!(error, Error::Deadline { .. }), "{}", shown(&error));
    assert_eq!(text(&session, "SELECT 'usable'").await, "usable");
    assert!(begun.elapsed() < Duration::from_mins(1));
}

async fn locks_are_found_held_and_lost(major: u32) {
    let server = Server::start(major, &[]).await;
    let take = async |class| {
        let session = connect_maintenance(&server.target("postgres"), &purpose()).await.unwrap();
        ClusterLock::try_take(session, class).await
    };
    let lock = take(Class::Maintenance).await.unwrap();
    assert!(lock.still_held().await.unwrap());
    take(Class::Backup).await.expect("another class of work is not disturbed");
    let Err(error) = take(Class::Maintenance).await else { panic!("taken twice") };
    assert!(
        shown(&error).contains(&format!("process {}", lock.session().backend_pid())),
        "{}",
        shown(&error)
    );
    let failure = Failure::from(error);
    assert_eq!((failure.code, failure.action), (Code::ClusterBusy, Action::Retry));

    let kill = format!("SELECT pg_terminate_backend({})", lock.session().backend_pid());
    server.run("postgres", &[&kill]).await;
    servers::wait_for("the lock to be lost", async || !lock.still_held().await.unwrap()).await;
    // A server tells its client the end before it lets go of the locks.
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    server.until(locks, 0).await;
    let again = take(Class::Maintenance).await.unwrap();
    again.release().await;
    server.until(locks, 0).await;
}

async fn a_dropped_maintenance_database_is_no_obstacle(major: u32) {
    let server = Server::start(major, &[]).await;
    server.run("template1", &["CREATE DATABASE orders", "DROP DATABASE postgres"]).await;
    let session = connect_maintenance(&server.target("orders"), &purpose()).await.unwrap();
    assert_eq!(text(&session, "SELECT current_database()::text").await, "template1");
}

async fn what_the_server_refuses_is_told_with_a_cure_and_no_password(major: u32) {
    let mut server = Server::with(major, &[], |options| options.tcp_port = Some(0)).await;
    let secret = "correct horse";
    server
        .run(
            "postgres",
            &[
                &format!("CREATE ROLE worker LOGIN PASSWORD '{secret}'"),
                "CREATE ROLE nologin",
                "CREATE DATABASE shut",
                "REVOKE CONNECT ON DATABASE shut FROM PUBLIC",
            ],
        )
        .await;
    let url = |user: &str, password: &str, database: &str| {
        Target::parse(&server.instance.tcp_url(user, password, database).unwrap(), &nobody())
            .unwrap()
    };
    let session = open(&url("worker", secret, "postgres")).await;
    assert_eq!(text(&session, "SELECT current_user::text").await, "worker");
    // Read back from the socket itself: the server notices by them when this side has vanished.
    let keepalives = "SELECT string_agg(setting, ' ' ORDER BY name) FROM pg_settings \
                      WHERE name LIKE 'tcp\\_keepalives%' OR name = 'tcp_user_timeout'";
    assert_eq!(text(&session, keepalives).await, "6 60 10 60000");
    let on_socket = open(&server.target("postgres")).await;
    assert_eq!(text(&on_socket, keepalives).await, "0 0 0 0");

    for (target, hint) in [
        (url("worker", "wrong battery", "postgres"), "Correct the password of role worker"),
        (url("nobody", "wrong battery", "postgres"), "Correct the password of role nobody"),
        (server.target_of("nologin", "postgres"), "Let role nologin exist with LOGIN"),
        (server.target("absent"), "Create database absent"),
        (url("worker", secret, "shut"), "GRANT CONNECT ON DATABASE \"shut\" TO \"worker\";"),
    ] {
        let error = refusal(&target).await;
        let shown = format!("{error:?} {}", shown(&error));
        let failure = Failure::from(error);
        assert_eq!(
            (failure.code, failure.action),
            (Code::LoginRefused, Action::FixConfig),
            "{failure}"
        );
        assert!(failure.hint.contains(hint), "{failure:?}");
        for secret in [secret, "wrong battery"] {
            assert!(!format!("{shown} {failure:?}").contains(secret), "{failure:?}");
        }
    }
    // A password file does as well as a password; a server that is not there is worth another try.
    let port = server.instance.port();
    let passfile = server.directory.path().join("pgpass");
    std::fs::write(&passfile, format!("127.0.0.1:{port}:*:worker:{secret}\n")).unwrap();
    std::fs::set_permissions(&passfile, std::fs::Permissions::from_mode(0o600)).unwrap();
    let by_file = format!(
        "host=127.0.0.1 port={port} user=worker dbname=postgres passfile={}",
        passfile.display()
    );
    open(&Target::parse(&by_file, &nobody()).unwrap()).await;
    server.instance.stop(StopMode::Fast).await.unwrap();
    let failure = Failure::from(refusal(&Target::parse(&by_file, &nobody()).unwrap()).await);
    assert_eq!(
        (failure.code, failure.action),
        (Code::ServerUnreachable, Action::Retry),
        "{failure}"
    );
    assert!(!format!("{failure:?}").contains(secret));
}

/// What a server says before it hangs up.
fn farewell(code: &str) -> Vec<u8> {
    let fields = format!("SFATAL\0VFATAL\0C{code}\0Mthe server is not what it was\0\0");
    let length = u32::try_from(fields.len() + 4).unwrap().to_be_bytes();
    [b"E", &length[..], fields.as_bytes()].concat()
}

/// A socket at which the first clients hear these words, and all later ones the server.
fn door(directory: &Path, server: &Server, words: Vec<Vec<u8>>) -> JoinSet<()> {
    let listener = UnixListener::bind(directory.join(".s.PGSQL.6543")).unwrap();
    let behind = server.instance.socket_directory();
    let behind = behind.join(format!(".s.PGSQL.{}", server.instance.port()));
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut words = words.into_iter();
        while let Ok((mut client, _)) = listener.accept().await {
            let Some(words) = words.next() else {
                let mut server = UnixStream::connect(&behind).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                continue;
            };
            // Its start-up packet: a length that counts itself, and the rest.
            let length = client.read_u32().await.unwrap();
            let mut packet = vec![0; usize::try_from(length).unwrap() - 4];
            client.read_exact(&mut packet).await.unwrap();
            client.write_all(&words).await.unwrap();
            client.shutdown().await.unwrap();
            // It may ask something before it hears that.
            let _ = client.read_to_end(&mut Vec::new()).await;
        }
    });
    tasks
}

async fn restarted(major: u32) {
    let server = Server::start(major, &[]).await;
    // It lets the role in, and is ready for a statement.
    let lets_in = b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I".to_vec();
    let while_asked = |code: &str| [lets_in.clone(), farewell(code)].concat();
    let gone = lets_in.clone();
    let first =
        [farewell("57P01"), farewell("57P03"), while_asked("57P01"), while_asked("57P02"), gone];
    for words in first {
        let directory = tempfile::Builder::new().prefix("d").tempdir_in("/tmp").unwrap();
        let target = Target::on_socket(directory.path(), 6543, "postgres", "postgres");
        let said = String::from_utf8_lossy(&words).into_owned();
        let door_opens = door(directory.path(), &server, vec![words.clone()]);
        let session = open(&target).await;
        assert_eq!(text(&session, "SELECT 'in'").await, "in", "{said}");
        drop((session, door_opens));
        std::fs::remove_file(directory.path().join(".s.PGSQL.6543")).unwrap();
        let _door_stays_shut = door(directory.path(), &server, vec![words.clone(), words]);
        let failure = Failure::from(refusal(&target).await);
        let told = (failure.code, failure.action);
        assert_eq!(told, (Code::ServerUnreachable, Action::Retry), "{said}: {failure}");
    }
    // Nor is it the fault of a statement that it was the one during which the server went.
    let (session, other) =
        (open(&server.target("postgres")).await, server.session("postgres").await);
    let end = format!("SELECT pg_terminate_backend({})", session.backend_pid());
    let lock = "SELECT pg_advisory_lock(1)";
    other.run("lock", lock).await.unwrap();
    let waits = session.run("wait for a lock", lock);
    let (waited, _) = tokio::join!(waits, other.query("end it", &end, &[]));
    let failure = Failure::from(waited.unwrap_err());
    assert_eq!((failure.code, failure.action), (Code::ServerUnreachable, Action::Retry));
    assert!(failure.message.contains("wait for a lock"), "{failure}");
}

/// A certificate authority with a certificate for `localhost`, and another authority that signed nothing.
struct Certificates {
    directory: PathBuf,
}

impl Certificates {
    fn make(directory: &Path) -> Self {
        let authority = |name: &str| {
            let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
            parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
            let key = rcgen::KeyPair::generate().unwrap();
            let certificate = parameters.self_signed(&key).unwrap();
            (certificate.pem(), rcgen::Issuer::new(parameters, key))
        };
        let (root, issuer) = authority("ours");
        let (other_root, _) = authority("somebody else's");
        let key = rcgen::KeyPair::generate().unwrap();
        let server = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let server = server.signed_by(&key, &issuer).unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(directory.join(name), text).unwrap();
            std::fs::set_permissions(directory.join(name), std::fs::Permissions::from_mode(0o600))
                .unwrap();
        };
        write("root.crt", &root);
        write("other.crt", &other_root);
        write("server.crt", &server.pem());
        write("server.key", &key.serialize_pem());
        Self { directory: directory.to_owned() }
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }
}

async fn tls(major: u32) {
    let directory = tempfile::tempdir().unwrap();
    let certificates = Certificates::make(directory.path());
    let (certificate, key) = (certificates.path("server.crt"), certificates.path("server.key"));
    let mut server = Server::with(
        major,
        &[("ssl", "on"), ("ssl_cert_file", &certificate), ("ssl_key_file", &key)],
        |options| {
            options.tcp_port = Some(0);
        },
    )
    .await;
    server.run("postgres", &["CREATE ROLE worker LOGIN PASSWORD 's'"]).await;
    let port = server.instance.port();
    let target = |words: &str| {
        let all =
            format!("port={port} user=worker password=s dbname=postgres connect_timeout=5 {words}");
        Target::parse(&all, &nobody()).unwrap()
    };
    let (root, other) = (certificates.path("root.crt"), certificates.path("other.crt"));
    let encrypted = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    for (words, wanted) in [
        ("host=127.0.0.1 sslmode=disable".to_owned(), false),
        ("host=127.0.0.1 sslmode=prefer".to_owned(), true),
        ("host=127.0.0.1 sslmode=require".to_owned(), true),
        (format!("host=127.0.0.1 sslmode=require sslrootcert={root}"), true),
        (format!("host=127.0.0.1 sslmode=verify-ca sslrootcert={root}"), true),
        (format!("host=localhost sslmode=verify-full sslrootcert={root}"), true),
        (
            format!("host=localhost sslmode=verify-full sslrootcert={root} sslnegotiation=direct"),
            true,
        ),
        (
            format!(
                "host=localhost hostaddr=127.0.0.1 sslmode=verify-full sslrootcert={root} channel_binding=require"
            ),
            true,
        ),
    ] {
        let session = open(&target(&words)).await;
        let is_encrypted: bool = session.one("ask", encrypted, &[]).await.unwrap().get(0);
        assert_eq!(is_encrypted, wanted, "{words}");
        session.canceller().cancel().await.unwrap_or_else(|e| panic!("{words}: {}", shown(&e)));
    }
    for words in [
        format!("host=127.0.0.1 sslmode=require sslrootcert={other}"),
        format!("host=127.0.0.1 sslmode=verify-ca sslrootcert={other}"),
        format!("host=127.0.0.1 sslmode=verify-full sslrootcert={root}"),
        format!("host=localhost sslmode=verify-full sslrootcert={other}"),
        "host=localhost sslmode=verify-full".to_owned(),
        "host=127.0.0.1 sslmode=verify-ca sslrootcert=system".to_owned(),
        "host=127.0.0.1 sslmode=disable channel_binding=require".to_owned(),
    ] {
        let failure = Failure::from(refusal(&target(&words)).await);
        assert_eq!(failure.action, Action::FixConfig, "{words}: {failure}");
    }
    // A statement is cancelled over TLS as well.
    let session =
        open(&target(&format!("host=localhost sslmode=verify-full sslrootcert={root}"))).await;
    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let sleep = session.run("sleep", "SELECT pg_sleep(1000)");
    session.within("sleep", &CancellationToken::new(), deadline, sleep).await.unwrap_err();
    assert_eq!(text(&session, "SELECT 'usable'").await, "usable");

    server.instance.set(&[("ssl", "off")]).unwrap();
    server.instance.restart().await.unwrap();
    open(&target("host=127.0.0.1 sslmode=prefer")).await;
    let failure = Failure::from(refusal(&target("host=127.0.0.1 sslmode=require")).await);
    assert_eq!(failure.action, Action::FixConfig, "{failure}");
}

/// A `PgBouncer` that ends with the test.
struct Bouncer(Child);

impl Drop for Bouncer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn bouncer(server: &Server, directory: &Path, more: &str) -> Bouncer {
    let ini = directory.join("pgbouncer.ini");
    let host = server.instance.socket_directory().display();
    let text = format!(
        "[databases]\n* = host={host} port={}\n[pgbouncer]\nlisten_port = 6543\nunix_socket_dir = {}\n\
         auth_type = any\nadmin_users = postgres\n{more}\n",
        server.instance.port(),
        directory.display()
    )
    .replace("* = host", "postgres = user=postgres host");
    std::fs::write(&ini, text).unwrap();
    let child = Command::new(service("PGMUSTER_TEST_PGBOUNCER"))
        .arg("-q")
        .arg(&ini)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Bouncer(child)
}

async fn poolers(major: u32) {
    let server = Server::start(major, &[]).await;
    for more in [
        "pool_mode = transaction",
        "pool_mode = transaction\nignore_startup_parameters = options,extra_float_digits",
        "pool_mode = session\nignore_startup_parameters = options,extra_float_digits",
        "pool_mode = statement\nignore_startup_parameters = options,extra_float_digits",
    ] {
        // The path of a socket must be short.
        let directory = tempfile::Builder::new().prefix("b").tempdir_in("/tmp").unwrap();
        let _bouncer = bouncer(&server, directory.path(), more);
        let socket = directory.path().join(".s.PGSQL.6543");
        // A socket that has its name may not listen yet.
        let listens = || std::os::unix::net::UnixStream::connect(&socket).is_ok();
        servers::wait_for("pgbouncer to listen", async || listens()).await;
        let target = Target::on_socket(directory.path(), 6543, "postgres", "postgres");
        let error = refusal(&target).await;
        assert!(matches!(error, Error::Pooler { .. }), "{more}: {}", shown(&error));
        let failure = Failure::from(error);
        assert_eq!((failure.code, failure.action), (Code::PoolerDetected, Action::FixConfig));
    }
    open(&server.target("postgres")).await;
}
