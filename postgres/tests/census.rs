//! The census on busy servers: what it counts, what it leaves alone, and when it dares to say "exactly".

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod servers;

use std::collections::HashMap;
use std::time::Duration;

use postgres::census::{CensusDraft, CensusOptions, finish_census, take_census};
use postgres::relation::RelationFile;
use postgres::table_files::TableFiles;
use postgres::wal::Segment;
use postgres::wal_changes::WalChanges;
use postgres::{BackupOptions, BackupSession, Error, Stopped};
use proto::backup::{Census, TableCount};
use servers::{Server, job, shown};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

servers::on_each_major! {
    only_tables_that_nobody_touched_are_exact,
    an_open_transaction_makes_a_count_uncertain,
    a_truncated_or_vanished_table_is_not_promised,
    changes_by_bulk_and_with_full_pages_are_counted,
    odd_things_are_left_out_or_counted_right,
    the_census_waits_for_nobody,
    what_the_role_may_not_read_is_not_counted,
    without_wal_nothing_is_exact,
    a_census_that_saw_no_database_again_is_an_error,
    a_table_whose_files_did_not_change_is_not_counted_again,
    nothing_is_taken_over_when_times_and_sizes_were_wrong,
    changes_agree_with_the_servers_own_reading_of_its_wal,
}

/// A backup with a census, step by step.
struct Walk<'a> {
    server: &'a Server,
    options: CensusOptions,
    backup: BackupSession,
    draft: CensusDraft,
}

fn census_options() -> CensusOptions {
    CensusOptions {
        job: job(),
        deadline: Instant::now() + Duration::from_mins(1),
        table_limit: Duration::from_secs(10),
        cancel: CancellationToken::new(),
    }
}

async fn begin_backup(server: &Server) -> BackupSession {
    let options = BackupOptions {
        job: job(),
        label: "census".to_owned(),
        slot_name: "pgmuster_census".to_owned(),
        fast: true,
        system_identifier: None,
        start_deadline: None,
        cancel: CancellationToken::new(),
    };
    let begun = BackupSession::begin(&server.target("postgres"), &options).await;
    begun.unwrap_or_else(|e| panic!("{}", shown(&e)))
}

/// The relation files of a server as a scan lists them now.
fn scanned(server: &Server) -> Vec<(String, RelationFile, u64)> {
    let mut files = Vec::new();
    let data = server.instance.data_directory();
    for database in std::fs::read_dir(data.join("base")).unwrap() {
        let database = database.unwrap();
        for file in std::fs::read_dir(database.path()).unwrap() {
            let file = file.unwrap();
            let name = file.file_name().into_string().unwrap();
            let directory = format!("base/{}", database.file_name().into_string().unwrap());
            let relation = RelationFile::parse(&name);
            let bytes = file.metadata().unwrap().len();
            files.extend(relation.map(|relation| (directory, relation, bytes)));
        }
    }
    files
}

fn table_files(server: &Server, before: Option<&Census>, backup: &BackupSession) -> TableFiles {
    let files = scanned(server);
    let files = files.iter().map(|(directory, file, size)| (directory.as_str(), *file, *size));
    TableFiles::new(files, before, backup.started().start_lsn, 1_700_000_000_000)
}

/// A census that says of every table that it has a thousand rows more than it has.
async fn forged(server: &Server) -> Census {
    let backup = begin_backup(server).await;
    let files = table_files(server, None, &backup);
    let walk = Box::pin(Walk::beside(server, backup, &files)).await;
    let mut census = walk.finish().await;
    for table in census.databases.iter_mut().flat_map(|database| &mut database.tables) {
        assert!(table.file.is_some(), "{table:?}");
        table.rows = table.rows.map(|rows| rows + 1000);
    }
    census
}

impl<'a> Walk<'a> {
    async fn begin(server: &'a Server) -> Walk<'a> {
        let files = TableFiles::default();
        Self::beside(server, begin_backup(server).await, &files).await
    }

    /// Takes the census of a backup that has begun.
    async fn beside(server: &'a Server, backup: BackupSession, files: &TableFiles) -> Walk<'a> {
        let options = census_options();
        let draft = take_census(&server.target("postgres"), &options, files).await;
        Self { server, options, backup, draft: draft.unwrap_or_else(|e| panic!("{}", shown(&e))) }
    }

    async fn stop(&mut self) -> Stopped {
        self.backup.stop(&CancellationToken::new()).await.unwrap()
    }

    /// Reads the backup's WAL from the server's own directory.
    fn changes(&self, stopped: &Stopped) -> WalChanges {
        let started = self.backup.started();
        let size = started.server.wal_segment_size;
        let mut changes = WalChanges::new(started.server.version, started.start_lsn);
        let last = Segment::ending_at(stopped.stop_lsn, started.timeline, size);
        let mut segment = Segment::containing(started.start_lsn, started.timeline, size);
        loop {
            let bytes =
                std::fs::read(self.server.wal_directory().join(segment.file_name(size))).unwrap();
            changes.feed(segment.start(size), &bytes).unwrap_or_else(|e| panic!("{}", shown(&e)));
            if segment == last {
                assert!(changes.read_to() >= stopped.stop_lsn);
                return changes;
            }
            segment = segment.next();
        }
    }

    async fn finish(mut self) -> Census {
        let stopped = self.stop().await;
        let changes = self.changes(&stopped);
        self.finish_with(Some(&changes), &stopped).await
    }

    async fn finish_with(self, changes: Option<&WalChanges>, stopped: &Stopped) -> Census {
        let target = self.server.target("postgres");
        finish_census(&target, &self.options, self.draft, changes, stopped.stop_lsn).await.unwrap()
    }
}

/// The tables of schema `public` in database `postgres`.
fn tables(census: &Census) -> HashMap<&str, &TableCount> {
    let database = census.databases.iter().find(|d| d.database.as_str() == "postgres").unwrap();
    database.tables.iter().filter(|t| t.schema == "public").map(|t| (t.table.as_str(), t)).collect()
}

fn figures(census: &Census, table: &str) -> (Option<u64>, Option<(u64, u64)>) {
    tables(census)
        .get(table)
        .map_or_else(|| panic!("{table} is not in the census"), |t| (t.rows, t.drift))
}

async fn only_tables_that_nobody_touched_are_exact(major: u32) {
    let server = Server::start(major, &[]).await;
    server
        .run(
            "postgres",
            &[
                "CREATE TABLE still AS SELECT generate_series(1, 1000) AS id",
                "CREATE TABLE grows AS SELECT generate_series(1, 10) AS id",
                "CREATE TABLE shrinks AS SELECT generate_series(1, 10) AS id",
                "CREATE TABLE turns AS SELECT generate_series(1, 10) AS id, 0 AS n",
                "CREATE TABLE regrets AS SELECT generate_series(1, 10) AS id",
                "CREATE TABLE empty ()",
            ],
        )
        .await;
    let walk = Walk::begin(&server).await;
    assert_eq!(walk.draft.counted(), (6, 6));
    server
        .run(
            "postgres",
            &[
                "INSERT INTO grows VALUES (11), (12), (13)",
                "DELETE FROM shrinks WHERE id <= 2",
                "UPDATE turns SET n = 1",
                "BEGIN; INSERT INTO regrets VALUES (11); DELETE FROM regrets WHERE id = 1; ROLLBACK",
                "VACUUM ANALYZE",
            ],
        )
        .await;
    let census = walk.finish().await;
    assert_eq!(figures(&census, "still"), (Some(1000), Some((0, 0))));
    assert_eq!(figures(&census, "empty"), (Some(0), Some((0, 0))));
    assert_eq!(figures(&census, "grows"), (Some(10), Some((0, 3))));
    assert_eq!(figures(&census, "shrinks"), (Some(10), Some((2, 0))));
    assert_eq!(
        figures(&census, "turns"),
        (Some(10), Some((0, 0))),
        "an update keeps the number of rows"
    );
    assert_eq!(
        figures(&census, "regrets"),
        (Some(10), Some((1, 1))),
        "nobody asks whether it committed"
    );

    let canary = census.canary.clone().unwrap();
    let status =
        format!("SELECT count(*) FROM (SELECT 1) x WHERE pg_xact_status('{canary}') = 'committed'");
    assert_eq!(server.number(&status).await, 1);
}

async fn an_open_transaction_makes_a_count_uncertain(major: u32) {
    let settings = [("max_prepared_transactions", "2")];
    let server = Server::start(major, &settings).await;
    server
        .run(
            "postgres",
            &[
                "CREATE TABLE open (id int)",
                "CREATE TABLE prepared (id int)",
                "CREATE TABLE other (id int)",
            ],
        )
        .await;
    let writer = server.session("postgres").await;
    writer.run("open", "BEGIN; INSERT INTO open SELECT generate_series(1, 100)").await.unwrap();
    server
        .run("postgres", &["BEGIN; INSERT INTO prepared VALUES (1); PREPARE TRANSACTION 'p'"])
        .await;
    let walk = Walk::begin(&server).await;
    // Both commit after the count, and write nothing to the tables any more: the WAL alone would not show it.
    writer.run("commit", "COMMIT").await.unwrap();
    server.run("postgres", &["COMMIT PREPARED 'p'"]).await;
    let census = walk.finish().await;
    assert_eq!(figures(&census, "open"), (Some(0), None));
    assert_eq!(figures(&census, "prepared"), (Some(0), None));
    assert_eq!(figures(&census, "other"), (Some(0), Some((0, 0))));
}

async fn a_truncated_or_vanished_table_is_not_promised(major: u32) {
    let server = Server::start(major, &[]).await;
    for name in ["truncated", "rewritten", "dropped", "renamed", "moved", "stays"] {
        server
            .run(
                "postgres",
                &[&format!("CREATE TABLE {name} AS SELECT generate_series(1, 10) AS id")],
            )
            .await;
    }
    server.run("postgres", &["CREATE SCHEMA elsewhere", "CREATE DATABASE goes"]).await;
    let walk = Walk::begin(&server).await;
    server
        .run(
            "postgres",
            &[
                "TRUNCATE truncated",
                "VACUUM FULL rewritten",
                "DROP TABLE dropped",
                "ALTER TABLE renamed RENAME TO other",
                "ALTER TABLE moved SET SCHEMA elsewhere",
                "CREATE TABLE late (id int)",
                "DROP DATABASE goes",
            ],
        )
        .await;
    let census = walk.finish().await;
    assert_eq!(figures(&census, "truncated"), (Some(10), None));
    assert_eq!(figures(&census, "rewritten"), (Some(10), None));
    assert_eq!(figures(&census, "stays"), (Some(10), Some((0, 0))));
    for gone in ["dropped", "renamed", "other", "moved", "late"] {
        assert!(!tables(&census).contains_key(gone), "{gone}");
    }
    let names: Vec<_> = census.databases.iter().map(|d| d.database.as_str()).collect();
    assert_eq!(names, ["postgres"]);
    assert_eq!(census.databases[0].relations, [('r', 5)], "those that were there all the time");
}

async fn changes_by_bulk_and_with_full_pages_are_counted(major: u32) {
    let server = Server::start(major, &[("wal_compression", "on"), ("wal_log_hints", "on")]).await;
    server
        .run(
            "postgres",
            &[
                "CREATE TABLE bulk (id int PRIMARY KEY, t text)",
                "INSERT INTO bulk SELECT g, repeat('x', 100) FROM generate_series(1, 5000) g",
                "CREATE TABLE toasted (t text)",
                "CREATE TABLE beside (id int)",
                "INSERT INTO beside SELECT generate_series(1, 5000)",
            ],
        )
        .await;
    let walk = Walk::begin(&server).await;
    let file = server.directory.path().join("rows");
    let rows: Vec<_> = (10_001..=13_000).map(|n| format!("{n}\t{}\n", "y".repeat(50))).collect();
    std::fs::write(&file, rows.concat()).unwrap();
    let noise = "SELECT string_agg(md5(g::text || h::text), '') FROM generate_series(1, 400) g";
    server
        .run(
            "postgres",
            &[
                &format!("COPY bulk FROM '{}'", file.display()),
                "DELETE FROM bulk WHERE id <= 700",
                "INSERT INTO bulk SELECT g, 'z' FROM generate_series(20001, 20010) g ON CONFLICT DO NOTHING",
                &format!("INSERT INTO toasted SELECT ({noise}) FROM generate_series(1, 200) h"),
                "VACUUM bulk",
                "SELECT pg_switch_wal()",
                "CHECKPOINT",
                "DELETE FROM toasted WHERE ctid IN (SELECT ctid FROM toasted LIMIT 7)",
            ],
        )
        .await;
    let census = walk.finish().await;
    assert_eq!(figures(&census, "bulk"), (Some(5000), Some((700, 3010))));
    assert_eq!(
        figures(&census, "toasted"),
        (Some(0), Some((0, 200))),
        "fewer than none there cannot be"
    );
    assert_eq!(figures(&census, "beside"), (Some(5000), Some((0, 0))));
}

async fn odd_things_are_left_out_or_counted_right(major: u32) {
    let server = Server::start(major, &[]).await;
    server
        .run(
            "postgres",
            &[
                r#"CREATE TABLE "a'b ""c"" \d; -- é" AS SELECT generate_series(1, 3) AS id"#,
                r#"CREATE SCHEMA "Odd ""one""""#,
                r#"CREATE TABLE "Odd ""one"""."select" AS SELECT 1 AS id"#,
                "CREATE TABLE parts (id int) PARTITION BY RANGE (id)",
                "CREATE TABLE part_1 PARTITION OF parts FOR VALUES FROM (0) TO (10)",
                "INSERT INTO parts SELECT generate_series(1, 9)",
                "CREATE TABLE base (id int)",
                "CREATE TABLE child () INHERITS (base)",
                "INSERT INTO base VALUES (1); INSERT INTO child VALUES (1), (2)",
                "CREATE UNLOGGED TABLE unlogged AS SELECT 1 AS id",
                "CREATE MATERIALIZED VIEW filled AS SELECT generate_series(1, 4) AS id",
                "CREATE MATERIALIZED VIEW unfilled AS SELECT 1 AS id WITH NO DATA",
                "CREATE VIEW view AS SELECT 1 AS id",
                "CREATE FOREIGN DATA WRAPPER nowhere",
                "CREATE SERVER nowhere FOREIGN DATA WRAPPER nowhere",
                "CREATE FOREIGN TABLE far (id int) SERVER nowhere",
                r#"CREATE DATABASE "odd ""db"" 'é'""#,
                "CREATE DATABASE closed ALLOW_CONNECTIONS false",
            ],
        )
        .await;
    let holder = server.session("postgres").await;
    holder
        .run("hold a temporary table", "CREATE TEMP TABLE temporary AS SELECT 1 AS id")
        .await
        .unwrap();
    let census = Walk::begin(&server).await.finish().await;
    let names: Vec<_> = census.databases.iter().map(|d| d.database.as_str()).collect();
    assert_eq!(names, ["odd \"db\" 'é'", "postgres"]);
    assert_eq!((census.databases[0].tables.len(), census.databases[0].relations.len()), (0, 0));
    let database = &census.databases[1];
    let found: Vec<_> = database
        .tables
        .iter()
        .map(|t| (t.schema.as_str(), t.table.as_str(), t.rows, t.drift))
        .collect();
    let exact = Some((0, 0));
    assert_eq!(
        found,
        [
            ("Odd \"one\"", "select", Some(1), exact),
            ("public", "a'b \"c\" \\d; -- é", Some(3), exact),
            ("public", "base", Some(1), exact),
            ("public", "child", Some(2), exact),
            ("public", "filled", Some(4), exact),
            ("public", "part_1", Some(9), exact),
        ]
    );
    assert_eq!(database.relations, [('f', 1), ('m', 2), ('p', 1), ('r', 6), ('v', 1)]);
    assert_eq!(database.collation, "c");
    assert_eq!(database.extensions, ["plpgsql 1.0"]);
}

async fn the_census_waits_for_nobody(major: u32) {
    let server = Server::start(major, &[]).await;
    server
        .run(
            "postgres",
            &[
                "CREATE TABLE locked AS SELECT 1 AS id",
                "CREATE TABLE free AS SELECT 1 AS id",
                "CREATE DATABASE other",
            ],
        )
        .await;
    let holder = server.session("postgres").await;
    holder.run("lock", "BEGIN; LOCK TABLE locked IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let before = Instant::now();
    let walk = Walk::begin(&server).await;
    assert!(before.elapsed() < Duration::from_secs(20), "{:?}", before.elapsed());
    assert_eq!(walk.draft.counted(), (1, 2));
    // Nothing of ours is left that a CREATE or DROP DATABASE, or DDL on a table, would have to wait for.
    holder.run("unlock", "ROLLBACK").await.unwrap();
    server.run("postgres", &["SET lock_timeout = '2s'; ALTER TABLE free ADD COLUMN c int"]).await;
    server.run("postgres", &["DROP DATABASE other", "CREATE DATABASE another"]).await;
    let census = walk.finish().await;
    assert_eq!(figures(&census, "locked"), (None, None));
    assert_eq!(figures(&census, "free"), (Some(1), Some((0, 0))));

    // Without time nothing is counted, and everything is still listed.
    let options = CensusOptions { deadline: Instant::now(), ..census_options() };
    let draft =
        take_census(&server.target("postgres"), &options, &TableFiles::default()).await.unwrap();
    assert_eq!(draft.counted(), (0, 2));
}

async fn what_the_role_may_not_read_is_not_counted(major: u32) {
    let server = Server::start(major, &[]).await;
    server
        .run(
            "postgres",
            &[
                "CREATE ROLE reader LOGIN",
                "CREATE TABLE public AS SELECT 1 AS id; GRANT SELECT ON public TO reader",
                "CREATE TABLE secret AS SELECT 1 AS id",
                "CREATE TABLE by_row AS SELECT generate_series(1, 5) AS id; GRANT SELECT ON by_row TO reader",
                "ALTER TABLE by_row ENABLE ROW LEVEL SECURITY",
                "CREATE POLICY two ON by_row USING (id <= 2)",
            ],
        )
        .await;
    let target = server.target_of("reader", "postgres");
    let draft = take_census(&target, &census_options(), &TableFiles::default())
        .await
        .unwrap_or_else(|e| panic!("{}", shown(&e)));
    assert_eq!(draft.counted(), (1, 3), "the two rows that a policy shows are not the table");
}

async fn without_wal_nothing_is_exact(major: u32) {
    let server = Server::start(major, &[]).await;
    server.run("postgres", &["CREATE TABLE t AS SELECT 1 AS id"]).await;
    let mut walk = Walk::begin(&server).await;
    let stopped = walk.stop().await;
    let partly =
        WalChanges::new(walk.backup.started().server.version, walk.backup.started().start_lsn);
    let (options, draft) = (walk.options.clone(), walk.draft.clone());
    let census = walk.finish_with(None, &stopped).await;
    assert_eq!(figures(&census, "t"), (Some(1), None));
    let target = server.target("postgres");
    let census =
        finish_census(&target, &options, draft, Some(&partly), stopped.stop_lsn).await.unwrap();
    assert_eq!(
        figures(&census, "t"),
        (Some(1), None),
        "WAL that was not read to the end proves nothing"
    );
}

async fn a_census_that_saw_no_database_again_is_an_error(major: u32) {
    let server = Server::start(major, &[]).await;
    server.run("postgres", &["CREATE TABLE t AS SELECT 1 AS id", "CREATE DATABASE other"]).await;
    let mut walk = Walk::begin(&server).await;
    let stopped = walk.stop().await;
    let target = server.target("postgres");
    let finish = async |options: &CensusOptions| {
        finish_census(&target, options, walk.draft.clone(), None, stopped.stop_lsn).await
    };
    let late = CensusOptions { deadline: Instant::now(), ..census_options() };
    let error = finish(&late).await.unwrap_err();
    assert!(matches!(error, Error::Deadline { .. }), "{}", shown(&error));

    // One that cannot be entered is named, and the others are told.
    let shut = |name: &str| format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false");
    server.run("template1", &[&shut("postgres")]).await;
    let census = finish(&census_options()).await.unwrap();
    let names: Vec<_> = census.databases.iter().map(|d| d.database.as_str()).collect();
    assert_eq!(names, ["other"]);
    assert_eq!(census.unseen, ["postgres"]);

    server.run("template1", &[&shut("other")]).await;
    let error = finish(&census_options()).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{}", shown(&error));
}

/// The oracle is `pg_waldump` of the same version: the same inserts and deletes for each table.
async fn changes_agree_with_the_servers_own_reading_of_its_wal(major: u32) {
    let server =
        Server::with(major, &[("wal_level", "logical")], |o| o.wal_segment_size_mb = Some(1)).await;
    server.run("postgres", &["CREATE TABLE t (id int, t text)", "CREATE TABLE u (id int)"]).await;
    let mut walk = Walk::begin(&server).await;
    for round in 0..5 {
        server
            .run(
                "postgres",
                &[
                    &format!("INSERT INTO t SELECT {round} * 1000 + g, repeat('x', g % 3000) FROM generate_series(1, 1000) g"),
                    "BEGIN; SAVEPOINT a; INSERT INTO u VALUES (1); RELEASE a; SAVEPOINT b; DELETE FROM u; ROLLBACK TO b; COMMIT",
                    "UPDATE t SET id = id + 1 WHERE id % 7 = 0",
                    "DELETE FROM t WHERE id % 11 = 0",
                    "VACUUM t",
                    "CHECKPOINT",
                ],
            )
            .await;
    }
    let stopped = walk.stop().await;
    let changes = walk.changes(&stopped);
    let started = walk.backup.started().clone();
    let dump =
        std::process::Command::new(server.instance.binaries().directory().join("pg_waldump"))
            .args(["-p", server.wal_directory().to_str().unwrap()])
            .args(["-s", &started.start_lsn.to_string(), "-e", &stopped.stop_lsn.to_string()])
            .output()
            .unwrap();
    assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    let dump = String::from_utf8(dump.stdout).unwrap();
    let database: u32 = server
        .number("SELECT oid::int8 FROM pg_database WHERE datname = 'postgres'")
        .await
        .try_into()
        .unwrap();
    for table in ["t", "u", "pg_class", "pg_statistic"] {
        let node = server.number(&format!("SELECT pg_relation_filenode('{table}')::int8")).await;
        let node = u32::try_from(node).unwrap();
        let of_table =
            |line: &&str| line.contains(&format!("blkref #0: rel 1663/{database}/{node} "));
        let operation = |name: &str| {
            dump.lines().filter(of_table).filter(|line| line.contains(name)).count() as u64
        };
        let rows_of_multi: u64 = dump
            .lines()
            .filter(of_table)
            .filter(|line| line.contains("desc: MULTI_INSERT"))
            .map(|line| {
                let (_, after) =
                    line.split_once(" tuples").or_else(|| line.split_once("ntuples: ")).unwrap();
                let (before, _) = line.split_once(" tuples").unwrap_or((after, ""));
                let number = if line.contains("ntuples: ") {
                    after
                } else {
                    before.rsplit(' ').next().unwrap()
                };
                number.split([',', ' ']).next().unwrap().parse::<u64>().unwrap()
            })
            .sum();
        let found = changes.of_table(database, node, started.start_lsn, stopped.stop_lsn).unwrap();
        let expected = (operation("desc: INSERT") + rows_of_multi, operation("desc: DELETE"));
        assert_eq!((found.inserted, found.deleted), expected, "{table}");
    }
    let node =
        u32::try_from(server.number("SELECT pg_relation_filenode('t')::int8").await).unwrap();
    let t = changes.of_table(database, node, started.start_lsn, stopped.stop_lsn).unwrap();
    assert!(t.inserted >= 5000 && t.deleted > 0, "{t:?}");
}

async fn a_table_whose_files_did_not_change_is_not_counted_again(major: u32) {
    let server = Server::start(major, &[("autovacuum", "off")]).await;
    let made = ["still", "changed", "grows", "shrinks", "rewritten"]
        .map(|name| format!("CREATE TABLE {name} AS SELECT generate_series(1, 10) AS id"));
    server.run("postgres", &made.each_ref().map(String::as_str)).await;
    // Whoever reads rows for the first time marks their page.
    server.run("postgres", &["VACUUM"]).await;
    let before = Box::pin(forged(&server)).await;
    let rewritten = "TRUNCATE rewritten; INSERT INTO rewritten VALUES (1)";
    server.run("postgres", &["INSERT INTO changed VALUES (11)", rewritten]).await;

    let backup = begin_backup(&server).await;
    let files = table_files(&server, Some(&before), &backup);
    let changed = tables(&before)["changed"].file.clone().unwrap();
    let name = changed.path.rsplit_once('/').unwrap().1;
    files.changed(&changed.path, RelationFile::parse(name).unwrap());
    let (mut walk, ()) = tokio::join!(Box::pin(Walk::beside(&server, backup, &files)), async {
        // The census of a copy that goes on waits; this one has seen every file.
        files.end(true);
    });
    assert_eq!(walk.draft.counted(), (5, 5));
    server.run("postgres", &["INSERT INTO grows VALUES (11), (12)"]).await;
    server.run("postgres", &["DELETE FROM shrinks WHERE id = 1"]).await;
    let stopped = walk.stop().await;
    let changes = walk.changes(&stopped);
    let census = walk.finish_with(Some(&changes), &stopped).await;
    assert_eq!(figures(&census, "still"), (Some(1010), Some((0, 0))), "taken over");
    assert_eq!(figures(&census, "changed"), (Some(11), Some((0, 0))), "counted");
    assert_eq!(figures(&census, "rewritten"), (Some(1), Some((0, 0))), "another file");
    assert_eq!(figures(&census, "grows"), (Some(1010), Some((0, 2))), "its own WAL says so");
    assert_eq!(figures(&census, "shrinks"), (Some(1010), Some((1, 0))));
    assert_eq!(tables(&census)["still"].file, tables(&before)["still"].file);
}

async fn nothing_is_taken_over_when_times_and_sizes_were_wrong(major: u32) {
    let server = Server::start(major, &[]).await;
    server.run("postgres", &["CREATE TABLE still AS SELECT generate_series(1, 10) AS id"]).await;
    let before = Box::pin(forged(&server)).await;
    let backup = begin_backup(&server).await;
    let files = table_files(&server, Some(&before), &backup);
    files.end(false);
    let walk = Box::pin(Walk::beside(&server, backup, &files)).await;
    let census = walk.finish().await;
    assert_eq!(figures(&census, "still"), (Some(10), Some((0, 0))));
}
