//! `demo`: a throwaway cluster with data, backed up, proved, damaged, restored, compared. Leaves nothing behind.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coordinator::api::types::{ClusterView, JobView, SubmitRequest};
use postgres::binaries::Binaries;
use postgres::instance::{Instance, InstanceOptions, StopMode};
use postgres::{Environment, Purpose, Session, Target, connect};
use proto::job::{Restore, RestoreTarget};
use proto::{Action, ClusterName, Code, Failure, JobId, JobState, ProofLevel, Task};
use tokio_util::sync::CancellationToken;

use crate::args::Demo;
use crate::commands::up::back_up_and_prove;
use crate::embedded::{Embedded, Served};
use crate::exit::Exit;
use crate::{environment, follow, output};

/// No part of the demonstration takes longer.
const STEP_MAX: Duration = Duration::from_hours(1);

/// What a shop remembers, beside pgbench's four tables.
const SHOP: &str = "
    CREATE SCHEMA shop;
    CREATE TABLE shop.customers (id int PRIMARY KEY, name text NOT NULL, note text);
    INSERT INTO shop.customers SELECT g, 'customer ' || g, repeat(md5(g::text), 4)
      FROM generate_series(1, 20000) g;
    CREATE TABLE shop.orders (id int, ordered_on date NOT NULL, customer int NOT NULL, amount numeric)
      PARTITION BY RANGE (ordered_on);
    CREATE TABLE shop.orders_2025 PARTITION OF shop.orders FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
    CREATE TABLE shop.orders_2026 PARTITION OF shop.orders FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
    INSERT INTO shop.orders
      SELECT g, date '2025-01-01' + g % 700, g % 20000 + 1, (g % 9999) / 100.0 FROM generate_series(1, 100000) g;
    CREATE INDEX ON shop.orders (customer);
    CREATE TABLE shop.documents (id int PRIMARY KEY, body jsonb);
    INSERT INTO shop.documents
      SELECT g, jsonb_build_object('id', g, 'tags', array[md5(g::text), md5((g * 7)::text)])
      FROM generate_series(1, 20000) g;
    CREATE TABLE shop.\"Odd \"\"Name\"\" ☂\" (\"column with spaces\" text);
    INSERT INTO shop.\"Odd \"\"Name\"\" ☂\" VALUES ('one'), ('two');
    CREATE TABLE shop.empty (id int);
";

/// Everything that must be the same before and after.
const FINGERPRINT: &str = "
    SELECT (SELECT count(*)::text || ' ' || sum(abalance)::text FROM pgbench_accounts)
        || ' ' || (SELECT md5(string_agg(name || coalesce(note, ''), '' ORDER BY id)) FROM shop.customers)
        || ' ' || (SELECT count(*)::text || ' ' || sum(amount)::text FROM shop.orders)
        || ' ' || (SELECT md5(string_agg(body::text, '' ORDER BY id)) FROM shop.documents)";

/// `demo`.
pub(crate) async fn run(args: Demo) -> Result<Exit, Failure> {
    let interrupted = CancellationToken::new();
    let signals = follow::interrupted();
    let listener = tokio::spawn({
        let interrupted = interrupted.clone();
        async move {
            signals.await;
            output::talk("Interrupted; clearing up");
            interrupted.cancel();
        }
    });
    let binaries = programs(args.major).await?;
    let root = args.directory.clone().unwrap_or_else(std::env::temp_dir);
    let place = tempfile::Builder::new().prefix("pgmuster-demo-").tempdir_in(&root);
    let place = place.map_err(|error| {
        let message = format!("failed to make a directory in {}: {error}", root.display());
        Failure::new(Code::TargetUnwritable, Action::FixConfig, message)
            .with_hint("Choose another one: pgmuster demo --directory DIR.")
    })?;
    // Returns when all it started has ended, also when it was interrupted: only then the directory can go.
    let scenes = scenes(&args, &binaries, place.path(), &interrupted);
    let ended = Box::pin(scenes).await;
    listener.abort();
    let path = place.path().to_owned();
    if let Err(error) = place.close() {
        output::talk(&format!("Failed to remove {}: {error}", path.display()));
    }
    ended
}

async fn programs(major: Option<u32>) -> Result<Binaries, Failure> {
    if let Some(major) = major {
        return Ok(Binaries::find(major, &[]).await?);
    }
    for major in (14..=18).rev() {
        if let Ok(found) = Binaries::find(major, &[]).await {
            return Ok(found);
        }
    }
    Ok(Binaries::find(15, &[]).await?)
}

async fn scenes(
    args: &Demo,
    binaries: &Binaries,
    place: &Path,
    interrupted: &CancellationToken,
) -> Result<Exit, Failure> {
    let name: ClusterName = "demo".parse().expect("it is a name");
    // Dropped unfinished, it ends what it started, and waits for that.
    let filling = async {
        let server = filled(args, binaries, place).await?;
        let before = ask(&server, FINGERPRINT).await?;
        Ok::<_, Failure>((server, before))
    };
    let Some(filled) = Box::pin(interrupted.run_until_cancelled(filling)).await else {
        return Ok(Exit::Interrupted);
    };
    let (mut server, before) = filled?;

    let restore_root = place.join("restore");
    std::fs::create_dir(&restore_root).map_err(|error| unwritable(&restore_root, &error))?;
    let served = Served {
        name: name.clone(),
        connection: server.url("postgres"),
        data_directory: None,
        bin_dirs: vec![binaries.directory().to_owned()],
        restore_roots: vec![restore_root.clone()],
    };
    // Its start is short, and half of it could not be stopped.
    let whole = Embedded::start(&place.join("home"), &served).await?;
    let ended = interrupted
        .run_until_cancelled(Box::pin(after_start(
            &whole,
            &name,
            &mut server,
            &restore_root,
            &before,
        )))
        .await
        .unwrap_or(Ok(Exit::Interrupted));
    let cluster = match &ended {
        Ok(Exit::Ok) => {
            whole.client.get::<ClusterView>(&format!("/v1/clusters/{name}")).await.map(Some)
        }
        _ => Ok(None),
    };
    whole.stop().await;
    // It may be stopped already, or damaged beyond a clean stop.
    let _ = server.stop(StopMode::Immediate).await;
    if let Some(proof) = cluster?.and_then(|cluster| cluster.backup?.proof) {
        output::data(&worker::proving::sentence(&proof.record));
    }
    ended
}

async fn filled(args: &Demo, binaries: &Binaries, place: &Path) -> Result<Instance, Failure> {
    let options = InstanceOptions {
        settings: vec![("max_wal_size".to_owned(), "1GB".to_owned())],
        fsync: false,
        ..InstanceOptions::default()
    };
    let mut server = Instance::create(binaries, &place.join("pg"), options).await?;
    server.start().await?;
    output::talk(&format!(
        "  cluster     PostgreSQL {}.{}, throwaway",
        binaries.major(),
        binaries.minor()
    ));
    let pgbench = binaries.program("pgbench")?;
    let scale = args.scale.to_string();
    let arguments =
        ["-i", "-q", "-s", scale.as_str(), "-d", "postgres"].map(std::ffi::OsString::from);
    let connection = ["-h".into(), server.socket_directory().as_os_str().to_owned()];
    let account = ["-p".into(), server.port().to_string().into(), "-U".into(), "postgres".into()];
    pgbench
        .args(arguments.into_iter().chain(connection).chain(account))
        .run(STEP_MAX, &CancellationToken::new())
        .await?;
    let session = session(&server).await?;
    session.run("fill the shop", SHOP).await?;
    session.close().await;
    let size = ask(&server, "SELECT pg_size_pretty(pg_database_size('postgres'))").await?;
    output::talk(&format!("  data        {size}, pgbench scale {} and a small shop", args.scale));
    Ok(server)
}

async fn after_start(
    whole: &Embedded,
    name: &ClusterName,
    server: &mut Instance,
    restore_root: &Path,
    before: &str,
) -> Result<Exit, Failure> {
    let proved = back_up_and_prove(whole, name, ProofLevel::L5).await?.exit;
    if proved != Exit::Ok {
        return Ok(proved);
    }
    let damaged = damage(server).await?;
    output::talk(&format!("  damage      {damaged}"));

    let started = Instant::now();
    let directory = "demo";
    let target = RestoreTarget {
        root: restore_root.display().to_string(),
        directory: directory.parse().expect("it is a relative path"),
    };
    let task = Task::Restore(Restore::at(target));
    let order = SubmitRequest::new(name.clone(), task);
    let job: JobView = whole.client.post("/v1/jobs", &order).await?;
    let job = follow::wait(&whole.client, job.id, STEP_MAX, true).await?;
    output::talk(&format!("  restore     {}", follow::result_line(&job)));
    if job.state != JobState::Succeeded {
        if let Some(failure) = &job.failure {
            output::failure(failure);
        }
        return Ok(Exit::of_job(job.state, job.failure.as_ref()));
    }
    put_in_place(server, &restore_root.join(directory))?;
    server.start().await?;
    let after = ask(server, FINGERPRINT).await?;
    if after != before {
        return Err(Failure::bug("the restored cluster differs from the one that was backed up"));
    }
    let took = output::duration(i64::try_from(started.elapsed().as_millis()).unwrap_or(0));
    output::talk(&format!("  compared    every row is as it was; from damage to repair {took}"));
    Ok(Exit::Ok)
}

/// Overwrites the table with the most rows and removes the commit log, as a broken disk would.
async fn damage(server: &mut Instance) -> Result<String, Failure> {
    let path = ask(server, "SELECT pg_relation_filepath('pgbench_accounts')").await?;
    server.stop(StopMode::Immediate).await?;
    let data = server.data_directory();
    let table = data.join(&path);
    let size = std::fs::metadata(&table).map_err(|error| unwritable(&table, &error))?.len();
    let garbage = vec![0xDE; usize::try_from(size).unwrap_or(0)];
    std::fs::write(&table, garbage).map_err(|error| unwritable(&table, &error))?;
    let control = data.join("global/pg_control");
    std::fs::remove_file(&control).map_err(|error| unwritable(&control, &error))?;
    match server.start().await {
        Ok(()) => Err(Failure::bug("the damaged cluster started all the same")),
        Err(_) => {
            Ok(format!("overwrote {path}, removed pg_control: the server does not start any more"))
        }
    }
}

fn put_in_place(server: &Instance, restored: &Path) -> Result<(), Failure> {
    let data = server.data_directory();
    let mut aside = data.clone().into_os_string();
    aside.push(".damaged");
    let aside = PathBuf::from(aside);
    std::fs::rename(&data, &aside).map_err(|error| unwritable(&aside, &error))?;
    std::fs::rename(restored, &data).map_err(|error| unwritable(&data, &error))
}

fn unwritable(path: &Path, error: &std::io::Error) -> Failure {
    let message = format!("failed to write {}: {error}", path.display());
    Failure::new(Code::TargetUnwritable, Action::FixConfig, message)
}

async fn session(server: &Instance) -> Result<Session, Failure> {
    let target = Target::parse(&server.url("postgres"), &Environment::default())?;
    let now_ms = u64::try_from(environment::now_ms()).unwrap_or(0);
    let job = JobId::mint(now_ms, repository::random());
    let mut purpose = Purpose::work(&job, STEP_MAX, STEP_MAX);
    "pgmuster demo".clone_into(&mut purpose.application_name);
    Ok(connect(&target, &purpose).await?)
}

async fn ask(server: &Instance, query: &str) -> Result<String, Failure> {
    let session = session(server).await?;
    session.run("look where its tables are", "SET search_path = public").await?;
    let answer = session.one("ask the demo cluster", query, &[]).await?.get(0);
    session.close().await;
    Ok(answer)
}
