//! Logical backups of real servers: what comes back, and everything that must not become a backup.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

mod house;

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use house::dumps::{dump, dump_with, programs, quick, scope, stands_still};
use house::{
    DATA, House, NOW_MS, bin_dir, eventually, nothing_is_left_on, number, run_sql, session,
};
use postgres::instance::{Instance, InstanceOptions};
use postgres::{Environment, Target, binaries::Binaries, quote};
use proto::words::grouped;
use proto::{Action, BackupKind, Code, DatabaseName, Failure};
use repository::{Outcome, Pin, Wish};
use worker::engines::pg_dump::{LoadOutcome, LoadRequest, load, plan};
use worker::restoring;

const SOON: Duration = Duration::from_secs(30);

/// Loads into another server, or says why not.
async fn load_into(
    house: &House,
    url: &str,
    change: impl FnOnce(&mut LoadRequest),
) -> Result<LoadOutcome, Failure> {
    let repository = house.reopened().await;
    let pin = Pin { by: "test".into(), why: "restore".into(), at_ms: NOW_MS };
    let kind = BackupKind::Logical;
    let backup =
        restoring::find_pinned_of(kind, &repository, None, None, None, &pin).await.unwrap();
    let mut request = LoadRequest {
        target: Target::parse(url, &Environment::default()).unwrap(),
        bin_dirs: vec![house.server.binaries().directory().to_owned()],
        databases: Vec::new(),
        schemas: Vec::new(),
        tables: Vec::new(),
        overwrite: Vec::new(),
        no_owner: false,
        jobs: 1,
        scratch: house.place.path().to_owned(),
    };
    change(&mut request);
    let cx = house.cx();
    let done = match plan(&cx, &backup, &request).await {
        Ok(plan) => load(&cx, &backup, &request, plan).await,
        Err(failure) => Err(failure),
    };
    backup.release().await;
    done
}

async fn other_server(house: &House, name: &str) -> Instance {
    let binaries = Binaries::at(house.server.binaries().directory()).await.unwrap();
    let options = InstanceOptions { fsync: false, ..InstanceOptions::default() };
    let directory = house.place.path().join(name);
    let mut server = Instance::create(&binaries, &directory, options).await.unwrap();
    server.start().await.unwrap();
    server
}

async fn text(url: &str, query: &str) -> String {
    let session = session(url).await;
    let text: Option<String> = session.one("look", query, &[]).await.unwrap().get(0);
    session.close().await;
    text.unwrap_or_default()
}

fn at(server: &Instance, database: &str) -> String {
    server.url(database)
}

async fn no_backup(house: &House) {
    for identity in house.repository.list_lineages().await.unwrap() {
        for attempt in house.repository.list_attempts(identity.lineage).await.unwrap() {
            let verdict = attempt.verdict.expect("every attempt has an end");
            assert!(matches!(verdict.outcome, Outcome::Abort { .. }), "{verdict:?}");
        }
    }
    nothing_is_left_on(house).await;
    let mut look = std::process::Command::new("pgrep");
    let running = look.args(["-f", "pg_dump.*--snapshot="]).output().unwrap();
    let mine = house.place.path().display().to_string();
    for pid in String::from_utf8_lossy(&running.stdout).split_whitespace() {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&environment).contains(&mine), "pg_dump {pid} lives");
    }
}

const LONG: &str = "sixty-three bytes of a name, which is as long as a name may be.";
const HOSTILE: [&str; 7] =
    ["it's \"odd\"", "two\nlines", "é/..", "dbname=evil host='x'", "-x --", ".dot", LONG];

/// What of a database's content must be the same: rows, sequences, rights, owners, large objects, settings.
const CONTENT: &str = "
    SELECT concat_ws(E'\\n',
      (SELECT string_agg(t::text, '|' ORDER BY t::text) FROM shop.item t),
      (SELECT last_value::text || is_called::text FROM shop.item_id_seq),
      (SELECT relacl::text FROM pg_class WHERE oid = 'shop.item'::regclass),
      (SELECT pg_get_userbyid(relowner)::text FROM pg_class WHERE oid = 'shop.item'::regclass),
      (SELECT string_agg(loid::text || encode(data, 'hex'), '|' ORDER BY loid, pageno) FROM pg_largeobject),
      (SELECT string_agg(indexdef, '|' ORDER BY indexdef) FROM pg_indexes WHERE schemaname = 'shop'),
      (SELECT datacl::text || pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()),
      (SELECT setconfig::text FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase
        WHERE datname = current_database()))";

async fn hostile_names_come_back(major: u32) {
    let house = quick(major).await;
    house.sql("CREATE ROLE \"own'er\" LOGIN PASSWORD 'secret'; CREATE ROLE reader; GRANT reader TO \"own'er\"").await;
    for name in HOSTILE {
        let quoted = quote::identifier(name);
        house.sql(&format!("CREATE DATABASE {quoted} OWNER \"own'er\"")).await;
        house.sql(&format!("GRANT CONNECT ON DATABASE {quoted} TO reader; ALTER DATABASE {quoted} SET work_mem = '5MB'")).await;
        let fill = format!(
            "CREATE SCHEMA shop AUTHORIZATION \"own'er\";
             CREATE TABLE shop.item (id bigserial PRIMARY KEY, note text, at timestamptz DEFAULT '2026-01-01');
             INSERT INTO shop.item (note) SELECT {name} || g FROM generate_series(1, 200) g;
             CREATE INDEX ON shop.item (note);
             ALTER TABLE shop.item OWNER TO \"own'er\";
             GRANT SELECT ON shop.item TO reader;
             SELECT lo_from_bytea(4711, decode(repeat('00ff10', 5000), 'hex'));",
            name = quote::literal(name)
        );
        run_sql(&at(&house.server, name), &fill).await;
    }
    house.sql("CREATE DATABASE empty").await;

    let outcome = dump(&house, &scope(&[], &[])).await.unwrap();
    let logical = outcome.logical.as_ref().unwrap();
    assert_eq!(logical.databases, HOSTILE.len() as u64 + 3, "and postgres, template1 and empty");
    assert!(logical.role_passwords);
    let skipped: Vec<&str> = logical.skipped.iter().map(|row| row.database.as_str()).collect();
    assert_eq!(skipped, ["template0"]);
    nothing_is_left_on(&house).await;

    let other = other_server(&house, "other").await;
    let url = other.url("postgres");
    let loaded = load_into(&house, &url, |_| ()).await.unwrap();
    assert_eq!(loaded.databases.len(), HOSTILE.len() + 3);
    assert_eq!((loaded.roles_created, &loaded.roles_kept[..]), (2, &["postgres".to_owned()][..]));
    for name in HOSTILE {
        let before = text(&at(&house.server, name), CONTENT).await;
        assert!(before.contains("own'er"), "{before}");
        assert_eq!(text(&at(&other, name), CONTENT).await, before, "{name:?}");
    }
    let same = "SELECT rolpassword FROM pg_authid WHERE rolname = 'own''er'";
    assert_eq!(text(&url, same).await, text(&house.server.url("postgres"), same).await);
    let member = "SELECT pg_has_role('own''er', 'reader', 'MEMBER')::int::bigint";
    assert_eq!(number(&url, member).await, 1);

    // A second time everything is in the way, and nothing is touched.
    let refused = load_into(&house, &url, |_| ()).await.unwrap_err();
    assert_eq!(refused.code, Code::TargetNotEmpty, "{refused}");
    run_sql(&at(&other, LONG), "DELETE FROM shop.item").await;
    let named: DatabaseName = LONG.parse().unwrap();
    let one = |request: &mut LoadRequest| request.databases = vec![named.clone()];
    let refused = load_into(&house, &url, one).await.unwrap_err();
    assert!(
        refused.message.contains("shop.item") && refused.hint.contains("--overwrite"),
        "{refused:?}"
    );
    assert_eq!(number(&at(&other, LONG), "SELECT count(*) FROM shop.item").await, 0);
    // With several sessions and no file of it: the directory of temporary files takes lists and contents only.
    let replace = |request: &mut LoadRequest| {
        request.databases = vec![named.clone()];
        request.overwrite = vec![named.clone()];
        request.jobs = 3;
    };
    let replaced = load_into(&house, &url, replace).await.unwrap();
    assert!(!replaced.plan.iter().any(|line| line.contains("private file")), "{replaced:?}");
    let before = text(&at(&house.server, LONG), CONTENT).await;
    assert_eq!(text(&at(&other, LONG), CONTENT).await, before);

    // One table, into a server that has nothing of it.
    run_sql(&at(&other, LONG), "DROP TABLE shop.item").await;
    let part = |request: &mut LoadRequest| {
        request.databases = vec![named.clone()];
        request.schemas = vec!["shop".to_owned()];
        request.tables = vec!["item".to_owned()];
    };
    load_into(&house, &url, part).await.unwrap();
    assert_eq!(number(&at(&other, LONG), "SELECT count(*) FROM shop.item").await, 200);
    let refused = load_into(&house, &url, part).await.unwrap_err();
    assert_eq!(refused.code, Code::TargetNotEmpty, "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pg15_databases_of_hostile_names_come_back_with_all_they_had() {
    Box::pin(hostile_names_come_back(15)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pg18_databases_of_hostile_names_come_back_with_all_they_had() {
    Box::pin(hostile_names_come_back(18)).await;
}

const ODD_SCHEMA: &str = "it's \"odd\"";
const ODD_TABLE: &str = "an \"item\" of";

/// A schema in which a table has everything that a table can have.
const PARTS: &str = r#"
    CREATE SCHEMA "it's ""odd""";
    COMMENT ON SCHEMA "it's ""odd""" IS 'of the shop';
    GRANT USAGE ON SCHEMA "it's ""odd""" TO reader;
    SET search_path = "it's ""odd""";
    CREATE TYPE mood AS ENUM ('well', 'ill');
    CREATE TABLE buyer (id int PRIMARY KEY, name text);
    INSERT INTO buyer SELECT g, 'b' || g FROM generate_series(1, 5) g;
    CREATE TABLE "an ""item"" of" (id bigserial PRIMARY KEY, buyer int NOT NULL REFERENCES buyer,
        mood mood DEFAULT 'well', note text, part int GENERATED ALWAYS AS IDENTITY, CHECK (id > 0));
    INSERT INTO "an ""item"" of" (buyer, note) SELECT g % 5 + 1, 'n' || g FROM generate_series(1, 200) g;
    CREATE INDEX "by note" ON "an ""item"" of" (note);
    COMMENT ON INDEX "by note" IS 'for searching';
    COMMENT ON COLUMN "an ""item"" of".note IS 'free text';
    GRANT SELECT ON "an ""item"" of" TO reader;
    CREATE STATISTICS counted ON buyer, note FROM "an ""item"" of";
    CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.note := ''touched''; RETURN NEW; END';
    CREATE TRIGGER "is touched" BEFORE UPDATE ON "an ""item"" of" FOR EACH ROW EXECUTE FUNCTION touch();
    CREATE VIEW public.notes AS SELECT note FROM "an ""item"" of";
    CREATE TABLE public.needy (mood mood);
    CREATE TABLE public.sale (id int, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
    CREATE TABLE public.sale_25 PARTITION OF public.sale FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
    INSERT INTO public.sale SELECT g, '2025-12-01'::date + g % 30 FROM generate_series(1, 500) g;
    SELECT lo_from_bytea(4711, 'x')"#;

/// What must be the same of that table, and of its schema; and what refers to other tables.
const TABLE_STATE: &str = r#"
    SELECT concat_ws(E'\n',
      (SELECT string_agg(t::text, '|' ORDER BY id) FROM "it's ""odd"""."an ""item"" of" t),
      (SELECT string_agg(concat_ws(' ', attname, format_type(atttypid, -1), attnotnull, attidentity,
          pg_get_expr(adbin, adrelid), col_description(c.oid, attnum),
          pg_get_serial_sequence(c.oid::regclass::text, attname)), '|' ORDER BY attname)
        FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum WHERE attrelid = c.oid AND attnum > 0),
      (SELECT string_agg(concat_ws(' ', schemaname, sequencename, last_value), '|' ORDER BY sequencename) FROM pg_sequences),
      (SELECT string_agg(concat_ws(' ', pg_get_indexdef(indexrelid), obj_description(indexrelid, 'pg_class')), '|'
        ORDER BY indexrelid::regclass::text) FROM pg_index WHERE indrelid = c.oid),
      (SELECT string_agg(pg_get_constraintdef(oid), '|' ORDER BY conname) FROM pg_constraint WHERE conrelid = c.oid AND contype <> 'f'),
      (SELECT string_agg(pg_get_triggerdef(oid), '|' ORDER BY tgname) FROM pg_trigger WHERE tgrelid = c.oid AND NOT tgisinternal),
      (SELECT string_agg(pg_get_statisticsobjdef(oid), '|') FROM pg_statistic_ext WHERE stxrelid = c.oid),
      c.relacl, n.nspacl, obj_description(n.oid, 'pg_namespace'))
    FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE relname = 'an "item" of'"#;
const KEYS: &str = "SELECT count(*) FROM pg_constraint WHERE contype = 'f'";
const RELATIONS: &str = "SELECT string_agg(relname, ',' ORDER BY relname) FROM pg_class WHERE relkind IN ('r', 'v', 'p') \
    AND relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)";

async fn a_part_comes_back_with_all_that_is_its_own(major: u32) {
    let house = quick(major).await;
    house.sql("CREATE ROLE reader").await;
    house.sql("CREATE DATABASE \"the shop's\"").await;
    run_sql(&at(&house.server, "the shop's"), PARTS).await;
    let state = text(&at(&house.server, "the shop's"), TABLE_STATE).await;
    assert!(state.contains("free text") && state.contains("of the shop"), "{state}");
    dump(&house, &scope(&["the*"], &[])).await.unwrap();
    let other = other_server(&house, "other").await;
    let (url, shop) = (other.url("postgres"), at(&other, "the shop's"));
    let there = "SELECT count(*) FROM pg_database WHERE datname = 'the shop''s'";
    let part = |schemas: &[&str], tables: &[&str], jobs: u32| {
        let owned = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect();
        let (schemas, tables): (Vec<String>, Vec<String>) = (owned(schemas), owned(tables));
        move |request: &mut LoadRequest| {
            request.databases = vec!["the shop's".parse().unwrap()];
            (request.schemas, request.tables, request.jobs) = (schemas, tables, jobs);
        }
    };

    // What cannot be loaded leaves no database: without the role, and without a type that is not of its own schema.
    for jobs in [1, 2] {
        let failed = load_into(&house, &url, part(&[ODD_SCHEMA], &[], jobs)).await.unwrap_err();
        assert!(failed.message.contains("role \"reader\" does not exist"), "{failed}");
        assert!(failed.hint.contains("was removed again"), "{failed:?}");
        assert_eq!(number(&url, there).await, 0);
    }
    let failed = load_into(&house, &url, part(&[], &["needy"], 1)).await.unwrap_err();
    assert_eq!(failed.code, Code::RequestInvalid, "{failed}");
    assert!(failed.message.ends_with("come along: type it's \"odd\".mood"), "{failed}");
    assert_eq!(number(&url, there).await, 0);
    run_sql(&url, "CREATE ROLE reader").await;

    // A schema alone, into a new database.
    for jobs in [1, 2] {
        let done = load_into(&house, &url, part(&[ODD_SCHEMA], &[], jobs)).await.unwrap();
        assert_eq!(text(&shop, TABLE_STATE).await, state, "{jobs} sessions");
        assert_eq!(text(&shop, RELATIONS).await, format!("{ODD_TABLE},buyer"));
        assert_eq!(number(&shop, KEYS).await, 1);
        assert_eq!(done.left_out, ["large objects, which are of no schema and no table"]);
        let refused = load_into(&house, &url, part(&[ODD_SCHEMA], &[], jobs)).await.unwrap_err();
        assert_eq!(refused.code, Code::TargetNotEmpty, "{refused}");
        run_sql(&url, "DROP DATABASE \"the shop's\"").await;
    }

    // A table alone, into a new database, into one that has nothing, and into one that has what its key refers to.
    for (jobs, first) in
        [(1, None), (2, None), (1, Some("")), (1, Some("buyer")), (2, Some("buyer"))]
    {
        if first.is_some() {
            run_sql(&url, "CREATE DATABASE \"the shop's\"").await;
        }
        if first == Some("buyer") {
            load_into(&house, &url, part(&[ODD_SCHEMA], &["buyer"], jobs)).await.unwrap();
        }
        let done = load_into(&house, &url, part(&[], &[ODD_TABLE], jobs)).await.unwrap();
        let case = format!("{jobs} sessions, {first:?}: {:#?}", done.plan);
        assert_eq!(text(&shop, TABLE_STATE).await, state, "{case}");
        let is_told = done.left_out.iter().any(|what| {
            what.starts_with("foreign key") && what.ends_with("want of table it's \"odd\".buyer")
        });
        let has_buyer = first == Some("buyer");
        assert_eq!((number(&shop, KEYS).await == 1, !is_told), (has_buyer, has_buyer), "{case}");
        let relations = if has_buyer { format!("{ODD_TABLE},buyer") } else { ODD_TABLE.to_owned() };
        assert_eq!(text(&shop, RELATIONS).await, relations, "{case}");
        let more = format!(
            "INSERT INTO {} (buyer) VALUES (1) RETURNING id",
            quote::qualified(ODD_SCHEMA, ODD_TABLE)
        );
        assert_eq!(number(&shop, &more).await, 201, "{case}");
        let refused = load_into(&house, &url, part(&[], &[ODD_TABLE], jobs)).await.unwrap_err();
        assert_eq!(refused.code, Code::TargetNotEmpty, "{refused}");
        if jobs == 1 {
            // A partitioned table is its partitions; only what is wanted is read of the dump.
            let done = load_into(&house, &url, part(&["public"], &["sale"], 1)).await.unwrap();
            assert_eq!(number(&shop, "SELECT count(*) FROM public.sale").await, 500, "{case}");
            let read = format!("{} of ", grouped(done.size_bytes));
            assert!(done.plan.iter().any(|line| line.contains(&read)), "{:#?}", done.plan);
            let whole = format!("{read}{} bytes", grouped(done.size_bytes));
            assert!(!done.plan.iter().any(|line| line.contains(&whole)), "{:#?}", done.plan);
        }
        run_sql(&url, "DROP DATABASE \"the shop's\"").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pg15_a_schema_or_a_table_of_a_dump_comes_back_with_all_that_is_its_own() {
    Box::pin(a_part_comes_back_with_all_that_is_its_own(15)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pg18_a_schema_or_a_table_of_a_dump_comes_back_with_all_that_is_its_own() {
    Box::pin(a_part_comes_back_with_all_that_is_its_own(18)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_that_is_not_whole_is_no_backup() {
    let house = quick(15).await;
    house.sql(DATA).await;
    let whole = scope(&["postgres"], &[]);
    for (name, script, said) in [
        (
            "half",
            "$REAL \"$@\" | head -c 300000; echo 'the disk is on fire' >&2; exit 1",
            "the disk is on fire",
        ),
        ("killed", "$REAL \"$@\" | head -c 300000; kill -9 $$", "signal 9"),
        // All is well, it says: only whoever reads the archive can know.
        ("cut", "$REAL \"$@\" | head -c 300000; exit 0", "no whole archive"),
        (
            "cut-late",
            "$REAL \"$@\" > \"$TMPDIR/whole.$$\" || exit; head -c -40 \"$TMPDIR/whole.$$\"; rm \"$TMPDIR/whole.$$\"",
            "no whole archive",
        ),
        ("empty", "exit 0", "no whole archive"),
        ("text", "echo 'SELECT 1;'", "no whole archive"),
    ] {
        let script = format!("TMPDIR={}; {script}", house.place.path().display());
        let bin_dirs = programs(&house, name, &script);
        let failure = dump_with(&house, &house.cx(), &whole, &bin_dirs).await.unwrap_err();
        assert_eq!(failure.code, Code::DumpFailed, "{name}: {failure}");
        assert!(failure.message.contains(said), "{name}: {failure}");
        no_backup(&house).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_that_pg_restore_cannot_read_back_is_no_backup() {
    let house = quick(15).await;
    house.sql(DATA).await;
    let whole = scope(&["postgres"], &[]);
    let real = house.server.binaries().directory().join("pg_restore");
    for (name, script, said) in [
        ("refuses", "echo 'it is no archive' >&2; exit 1", "it is no archive"),
        ("refuses-late", "cat >/dev/null; exit 3", "exit code 3"),
        ("is-killed", "kill -9 $$", "signal 9"),
    ] {
        // What pg_dump wrote is whole; the program that has to read it some day does not find its way.
        let bin_dirs = programs(&house, name, "exec $REAL \"$@\"");
        let reads = bin_dirs[0].join("pg_restore");
        std::fs::remove_file(&reads).unwrap();
        let real = real.display();
        let text =
            format!("#!/bin/bash\nif [ \"$1\" = --list ]; then {script}; fi\nexec {real} \"$@\"\n");
        std::fs::write(&reads, text).unwrap();
        std::fs::set_permissions(&reads, std::fs::Permissions::from_mode(0o755)).unwrap();
        let cx = house.cx();
        let failure = dump_with(&house, &cx, &whole, &bin_dirs).await.unwrap_err();
        assert_eq!(failure.code, Code::DumpFailed, "{name}: {failure}");
        let what = "pg_restore of what is stored of database postgres ended with";
        assert!(failure.message.contains(what), "{name}: {failure}");
        assert!(failure.message.contains(said), "{name}: {failure}");
        assert!(failure.hint.contains("nothing was committed"), "{name}: {failure:?}");
        assert_eq!(cx.steps().last().unwrap().name, "read_back", "{name}");
        no_backup(&house).await;
    }
    assert!(dump(&house, &whole).await.unwrap().logical.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_without_rights_is_told_so_and_nothing_is_committed() {
    let mut house = quick(15).await;
    house.sql(DATA).await;
    house.sql("CREATE ROLE weak LOGIN").await;
    let url = house.server.url("postgres").replace("postgres@", "weak@");
    assert!(url.contains("weak@"), "{url}");
    house.reconnect(&url);
    let failure = dump(&house, &scope(&[], &[])).await.unwrap_err();
    assert_eq!(
        (failure.code, failure.action),
        (Code::PermissionDenied, Action::FixConfig),
        "{failure}"
    );
    assert!(failure.hint.contains("pg_read_all_data"), "{failure:?}");
    no_backup(&house).await;
    // With rights on the tables alone the same role can; it has no passwords to give.
    house.sql("GRANT SELECT ON ALL TABLES IN SCHEMA public TO weak").await;
    let outcome = dump(&house, &scope(&["postgres"], &[])).await.unwrap();
    assert!(!outcome.logical.unwrap().role_passwords);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_dump_leaves_neither_a_backup_nor_a_process() {
    let house = quick(15).await;
    house.sql(DATA).await;
    let holder = session(&house.server.url("postgres")).await;
    holder.run("lock", "BEGIN; LOCK TABLE public.orders").await.unwrap();
    let cx = house.cx();
    let whole = scope(&["postgres"], &[]);
    let bin_dirs = [house.server.binaries().directory().to_owned()];
    let cancelling = async {
        // It is pg_dump, whose end the server has to notice.
        stands_still(&house).await;
        cx.stop(Failure::new(Code::Cancelled, Action::Abandon, "told to stop"));
    };
    let (ended, ()) = tokio::join!(dump_with(&house, &cx, &whole, &bin_dirs), cancelling);
    let failure = ended.unwrap_err();
    assert_eq!((failure.code, failure.message.as_str()), (Code::Cancelled, "told to stop"));
    no_backup(&house).await;
    holder.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_dropped_meanwhile_is_reported_and_a_new_one_is_in_the_next_backup() {
    let house = quick(15).await;
    house.sql("CREATE DATABASE aa").await;
    house.sql("CREATE DATABASE zz").await;
    run_sql(&house.server.url("aa"), "CREATE TABLE public.t (x int)").await;
    for (patterns, named) in [(scope(&["aa", "z*"], &[]), false), (scope(&["aa", "zz"], &[]), true)]
    {
        let holder = session(&house.server.url("aa")).await;
        holder.run("lock", "BEGIN; LOCK TABLE public.t").await.unwrap();
        let dropping = async {
            stands_still(&house).await;
            house.sql("DROP DATABASE zz").await;
            holder.close().await;
        };
        let (ended, ()) = tokio::join!(dump(&house, &patterns), dropping);
        if named {
            let failure = ended.unwrap_err();
            assert!(failure.message.contains("zz was to be backed up"), "{failure}");
        } else {
            let logical = ended.unwrap().logical.unwrap();
            assert_eq!(logical.databases, 1);
            assert_eq!(logical.skipped[0].database.as_str(), "zz");
            assert!(logical.skipped[0].why.contains("dropped while the backup ran"));
        }
        house.sql("CREATE DATABASE zz").await;
    }
    let next = dump(&house, &scope(&[], &["postgres", "template*"])).await.unwrap();
    assert_eq!(next.logical.unwrap().databases, 2, "zz is there again, by itself");
    let failure = dump(&house, &scope(&["none"], &[])).await.unwrap_err();
    assert_eq!(failure.code, Code::RequestInvalid);
}

/// Makes a database one that no `pg_dump` gets through: the server cannot make sense of a table's row in its catalog.
const DAMAGE: &str = "SET allow_system_table_mods = on; \
    DELETE FROM pg_attribute WHERE attrelid = 'public.t'::regclass AND attname = 'x'";

async fn a_damaged_catalog_keeps_no_other_database_out(major: u32) {
    let house = quick(major).await;
    for name in ["aa", "zz"] {
        house.sql(&format!("CREATE DATABASE {name}")).await;
        let fill = "CREATE TABLE public.t AS SELECT generate_series(1, 7) AS x";
        run_sql(&house.server.url(name), fill).await;
    }
    let all = scope(&[], &[]);
    let whole = dump(&house, &all).await.unwrap();
    assert_eq!(whole.logical.as_ref().unwrap().left_out, Some(0));
    run_sql(&house.server.url("aa"), DAMAGE).await;

    let part = dump(&house, &all).await.unwrap();
    let logical = part.logical.as_ref().unwrap();
    assert_eq!((logical.databases, logical.left_out), (3, Some(1)), "{logical:?}");
    assert_eq!(logical.failed[0].database.as_str(), "aa");
    assert!(logical.failed[0].why.contains("pg_dump of database aa ended"), "{logical:?}");
    assert!(!logical.failed[0].why.contains('\n'), "{logical:?}");
    let backup = house.repository.open_backup(part.lineage, part.backup).await.unwrap();
    let stored = backup.facts().logical.as_ref().unwrap();
    assert_eq!((&stored.failed, stored.left_out), (&logical.failed, Some(1)));
    // What pg_dump had written by then is stored, and nobody takes it for a dump.
    let files: Vec<&str> = stored.databases.iter().map(|dump| dump.file.as_str()).collect();
    assert_eq!(files, ["postgres.dump", "template1.dump", "zz.dump"]);
    nothing_is_left_on(&house).await;
    // Where it is all that is wanted, there is no backup.
    let failure = dump(&house, &scope(&["aa"], &[])).await.unwrap_err();
    assert_eq!(failure.code, Code::DumpFailed, "{failure}");

    // Whoever restores is told, and whoever wants it back finds it in the backup before.
    let other = other_server(&house, "other").await;
    let url = other.url("postgres");
    let one = |request: &mut LoadRequest| request.databases = vec!["aa".parse().unwrap()];
    let refused = load_into(&house, &url, one).await.unwrap_err();
    assert!(refused.message.starts_with("the backup lacks database aa, which could"), "{refused}");
    let loaded = load_into(&house, &url, |_| ()).await.unwrap();
    assert!(loaded.left_out[0].starts_with("database aa, which could not be"), "{loaded:?}");
    assert_eq!(number(&at(&other, "zz"), "SELECT count(*) FROM public.t").await, 7);
    let wish = Wish { by: "test".into(), why: "old".into(), at_ms: NOW_MS };
    let forget = async || house.repository.forget(whole.lineage, whole.backup, &wish).await;
    let refused = forget().await.unwrap_err().to_string();
    assert!(refused.contains("the newest one that has database aa, which a later"), "{refused}");
    // It is no more, and the next dump has all there is.
    house.sql("DROP DATABASE aa").await;
    let next = dump(&house, &all).await.unwrap();
    assert_eq!(next.logical.unwrap().left_out, Some(0));
    forget().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pg15_a_database_with_a_damaged_catalog_is_named_and_the_others_are_dumped() {
    Box::pin(a_damaged_catalog_keeps_no_other_database_out(15)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pg18_a_database_with_a_damaged_catalog_is_named_and_the_others_are_dumped() {
    Box::pin(a_damaged_catalog_keeps_no_other_database_out(18)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_that_goes_on_for_long_says_what_it_holds_back_and_ends_at_its_limit() {
    let mut house = quick(15).await;
    house.sql(DATA).await;
    let whole = scope(&["postgres"], &[]);
    let bin_dirs = [house.server.binaries().directory().to_owned()];
    house.config.backup.dump_warn_s = 1;
    let holder = session(&house.server.url("postgres")).await;
    holder.run("lock", "BEGIN; LOCK TABLE public.orders").await.unwrap();
    let cx = house.cx();
    let looking = async {
        stands_still(&house).await;
        for _ in 0..20 {
            house.sql("SELECT pg_current_xact_id()").await;
        }
        let told = || {
            let step = cx.current_progress()?.step;
            step.starts_with("dump of database postgres for ").then_some(step)
        };
        let looked = async || told();
        let told = eventually("the dump says that it is old", SOON, looked).await;
        assert!(told.contains("vacuum removes nothing that was deleted since"), "{told}");
        holder.run("let go", "COMMIT").await.unwrap();
    };
    let (ended, ()) = tokio::join!(dump_with(&house, &cx, &whole, &bin_dirs), looking);
    ended.expect("it is only told");
    let steps = cx.steps();
    let step = steps.iter().find(|step| step.name == "dump").unwrap();
    assert!(step.figures["snapshot_s"] >= 1, "{step:?}");
    assert!(step.figures["held_back_transactions"] >= 1, "{step:?}");

    let mut house = quick(15).await;
    house.sql(DATA).await;
    house.config.backup.dump_max_s = 1;
    let holder = session(&house.server.url("postgres")).await;
    holder.run("lock", "BEGIN; LOCK TABLE public.orders").await.unwrap();
    let failure = dump(&house, &whole).await.unwrap_err();
    assert_eq!((failure.code, failure.action), (Code::DumpFailed, Action::FixConfig), "{failure}");
    assert!(failure.message.contains("backup.dump_max_s"), "{failure}");
    assert!(failure.hint.contains("--exclude-database"), "{failure:?}");
    no_backup(&house).await;
    holder.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_counted_in_the_dumps_own_snapshot_and_kinds_do_not_mix() {
    let house = quick(15).await;
    house.sql(DATA).await;
    let physical = house.back_up().await;
    let logical = dump(&house, &scope(&["postgres"], &[])).await.unwrap();
    assert_ne!(logical.lineage, physical.lineage);
    assert_eq!(logical.compared_with, None, "a dump is not compared with files");
    let backup = house.repository.open_backup(logical.lineage, logical.backup).await.unwrap();
    let census = backup.facts().census.as_ref().unwrap();
    let count = |name: &str| census.databases[0].tables.iter().find(|t| t.table == name).unwrap();
    assert_eq!((count("orders").rows, count("orders").drift), (Some(50_000), Some((0, 0))));
    // The newest of all is a dump, and a restore of files does not take it.
    let newest = restoring::find(&house.repository, None, None, None).await.unwrap();
    assert_eq!(newest.id(), physical.backup);
    let refused = restoring::find(&house.repository, None, None, Some(logical.backup)).await;
    let refused = refused.unwrap_err();
    assert!(refused.message.contains("logical"), "{refused}");
    let pin = Pin { by: "test".into(), why: "restore".into(), at_ms: NOW_MS };
    let kind = BackupKind::Logical;
    let refused =
        restoring::find_pinned_of(kind, &house.repository, None, None, Some(physical.backup), &pin);
    assert!(refused.await.unwrap_err().message.contains("physical"));
    // What did not change in the database is not stored again.
    let again = dump(&house, &scope(&["postgres"], &[])).await.unwrap();
    assert_eq!(again.compared_with, Some(logical.backup));
    assert!(again.stored_bytes < logical.stored_bytes / 4, "{again:?} after {logical:?}");
}

/// Whatever a row may look like, a table without rows, without columns, with rows of its own beside those of its children.
const ODD_ROWS: &str = r"
    CREATE TABLE public.lines (id int, note text, twice int GENERATED ALWAYS AS (id * 2) STORED);
    INSERT INTO public.lines (id, note) SELECT g, E'one
two
\.
	\n' || g FROM generate_series(1, 1000) g;
    INSERT INTO public.lines (note) VALUES (NULL), (''), (E'\.'), (E'


');
    CREATE TABLE public.empty_one (x int);
    CREATE TABLE public.no_columns ();
    INSERT INTO public.no_columns SELECT FROM generate_series(1, 7);
    CREATE TABLE public.parent (x int);
    CREATE TABLE public.child () INHERITS (public.parent);
    INSERT INTO public.parent SELECT generate_series(1, 5);
    INSERT INTO public.child SELECT generate_series(1, 11);
    CREATE TABLE public.long AS SELECT repeat(E'
', 3000000) AS x FROM generate_series(1, 4);
    CREATE UNLOGGED TABLE public.unlogged AS SELECT 1 AS x;
    CREATE MATERIALIZED VIEW public.seen AS SELECT * FROM public.parent";

async fn rows_are_counted_whatever_they_are(major: u32) {
    let house = quick(major).await;
    house
        .sql("CREATE DATABASE odd TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'")
        .await;
    let url = house.server.url("odd");
    run_sql(&url, ODD_ROWS).await;
    // Its name is another one in the dump.
    run_sql(&url, "CREATE TABLE public.é AS SELECT generate_series(1, 13) AS x").await;
    let outcome = dump(&house, &scope(&["odd"], &[])).await.unwrap();
    let backup = house.repository.open_backup(outcome.lineage, outcome.backup).await.unwrap();
    let census = &backup.facts().census.as_ref().unwrap().databases[0];
    let rows: Vec<_> =
        census.tables.iter().map(|table| (table.table.as_str(), table.rows, table.drift)).collect();
    let exact = |name, rows| (name, Some(rows), Some((0, 0)));
    assert_eq!(
        rows,
        [
            exact("child", 11),
            exact("empty_one", 0),
            exact("lines", 1004),
            exact("long", 4),
            exact("no_columns", 7),
            exact("parent", 5),
            exact("é", 13),
        ]
    );
    // What is in the file where is told to the byte, for whoever reads a part of it.
    let layout = backup.facts().logical.as_ref().unwrap().databases[0].layout.as_ref().unwrap();
    let blocks: u64 = layout.blocks.iter().map(|(_, bytes)| bytes).sum();
    let size = backup.file_content(b"odd.dump").await.unwrap().size_bytes();
    assert_eq!(layout.contents_bytes + blocks, size);

    let other = other_server(&house, "other").await;
    let several = |request: &mut LoadRequest| request.jobs = 4;
    load_into(&house, &other.url("postgres"), several).await.unwrap();
    for (name, rows, _) in rows {
        let rows = rows.map(u64::cast_signed);
        let count = format!("SELECT count(*) FROM ONLY public.{}", quote::identifier(name));
        assert_eq!(Some(number(&other.url("odd"), &count).await), rows, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pg14_rows_are_counted_as_they_pass_by_whatever_they_are() {
    rows_are_counted_whatever_they_are(14).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pg15_rows_are_counted_as_they_pass_by_whatever_they_are() {
    rows_are_counted_whatever_they_are(15).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pg18_rows_are_counted_as_they_pass_by_whatever_they_are() {
    rows_are_counted_whatever_they_are(18).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_database_that_one_is_in_can_be_overwritten_and_a_template_is_refused() {
    let house = quick(15).await;
    house.sql(DATA).await;
    dump(&house, &scope(&["postgres", "template1"], &[])).await.unwrap();
    let other = other_server(&house, "other").await;
    let url = other.url("postgres");
    run_sql(&url, "CREATE TABLE public.in_the_way (x int)").await;
    for jobs in [1, 2] {
        let overwrite = |request: &mut LoadRequest| {
            request.databases = vec!["postgres".parse().unwrap()];
            request.overwrite = request.databases.clone();
            request.jobs = jobs;
        };
        load_into(&house, &url, overwrite).await.unwrap();
        assert_eq!(number(&url, "SELECT count(*) FROM public.orders").await, 50_000);
        let gone = "SELECT count(*) FROM pg_class WHERE relname = 'in_the_way'";
        assert_eq!(number(&url, gone).await, 0);
    }
    let template = |request: &mut LoadRequest| {
        request.databases = vec!["postgres".parse().unwrap(), "template1".parse().unwrap()];
        request.overwrite = request.databases.clone();
    };
    let refused = load_into(&house, &url, template).await.unwrap_err();
    assert_eq!(refused.code, Code::RequestInvalid, "{refused}");
    assert!(refused.message.contains("database template1"), "{refused}");
    assert_eq!(
        number(&url, "SELECT count(*) FROM public.orders").await,
        50_000,
        "nothing was dropped"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memberships_come_back_where_another_superuser_made_the_cluster() {
    let house = quick(18).await;
    house
        .sql("CREATE ROLE reader; CREATE ROLE helper; CREATE ROLE person; GRANT reader TO person")
        .await;
    house.sql("GRANT reader TO helper WITH ADMIN OPTION").await;
    house.sql("CREATE ROLE guest; GRANT reader TO guest GRANTED BY helper").await;
    dump(&house, &scope(&["postgres"], &[])).await.unwrap();
    let binaries = Binaries::at(house.server.binaries().directory()).await.unwrap();
    let options = InstanceOptions {
        fsync: false,
        initdb_args: vec!["--username=boss".into()],
        ..InstanceOptions::default()
    };
    let mut other =
        Instance::create(&binaries, &house.place.path().join("other"), options).await.unwrap();
    other.start().await.unwrap();
    let url = other.url("postgres").replace("postgres@", "boss@");
    load_into(&house, &url, |_| ()).await.unwrap();
    let grants = "SELECT string_agg(m.roleid::regrole || ' to ' || m.member::regrole || ' by ' || m.grantor::regrole, ', '                   ORDER BY m.member::regrole::text) FROM pg_auth_members m WHERE m.roleid = 'reader'::regrole";
    assert_eq!(
        text(&url, grants).await,
        "reader to guest by helper, reader to helper by boss, reader to person by boss"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_is_not_loaded_into_a_server_that_its_pg_restore_would_confuse() {
    let house = quick(18).await;
    dump(&house, &scope(&["postgres"], &[])).await.unwrap();
    let binaries = Binaries::at(&bin_dir(15)).await.unwrap();
    let options = InstanceOptions { fsync: false, ..InstanceOptions::default() };
    let mut other =
        Instance::create(&binaries, &house.place.path().join("other"), options).await.unwrap();
    other.start().await.unwrap();
    let refused = load_into(&house, &other.url("postgres"), |_| ()).await.unwrap_err();
    assert!(refused.message.contains("sets transaction_timeout, which PostgreSQL 15"), "{refused}");
    assert!(refused.hint.contains("PostgreSQL 17 or newer"), "{refused:?}");
}
