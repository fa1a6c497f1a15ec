//! Logical backups from the order to the rows: a worker dumps the databases of a server, and the repository and its key
//! alone load one of them into another server.

use anyhow::{Context as _, bail, ensure};
use postgres::instance::InstanceOptions;
use tests::fleet::text;
use tests::{Cluster, Fleet, Place, Vhost, WorkerSetup};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_is_ordered_taken_listed_and_loaded_into_another_server() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let other = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    let setup = WorkerSetup::of("w1", "orders", cluster.url());
    fleet.start_worker(&WorkerSetup { loads_dumps: false, ..setup })?;
    cluster.run("CREATE DATABASE shop").await?;
    cluster.run_in("shop", STOCK).await?;

    fleet.expect(&["backup", "orders", "--wait"])?;
    let dump = ["backup", "orders", "--engine", "pg_dump", "--exclude-database", "template*"];
    let told = fleet.expect(&[&dump[..], &["--wait"]].concat())?;
    ensure!(told.contains("Dumped 2 databases of orders"), "{told}\n{}", fleet.said());
    let none =
        fleet.run(&["backup", "orders", "--engine", "pg_dump", "--database", "no", "--wait"])?;
    ensure!(none.code() == 2 && none.stderr.contains("no database fits"), "{none}");
    let mixed = fleet.run(&["backup", "orders", "--database", "shop"])?;
    ensure!(mixed.code() == 2 && mixed.stderr.contains("--engine pg_dump"), "{mixed}");
    let trace = fleet.expect(&["job", "list", "--cluster", "orders"])?;
    ensure!(trace.contains("succeeded"), "{trace}");

    let backups = fleet.json(&["backups", "list", "orders", "-o", "json"])?;
    ensure!(backups[0]["facts"]["logical"]["databases"] == 2, "{backups}");
    let listed = fleet.expect(&["backups", "list", "orders"])?;
    ensure!(listed.contains("logical") && listed.contains("physical"), "{listed}");
    let id = backups[0]["id"].as_str().unwrap_or_default().to_owned();
    let shown = fleet.expect(&["backups", "show", &id])?;
    ensure!(shown.contains("2, by pg_dump 15."), "{shown}");
    // A cluster is judged by what a server starts from.
    let judged = fleet.json(&["cluster", "show", "orders", "-o", "json"])?;
    ensure!(judged["backup"]["id"] == backups[1]["id"], "{judged}");
    // The order for a database that does not exist says nothing about the backups there are.
    ensure!(judged["state"] == "TAKEN", "{judged}");
    // Nobody has allowed this worker to run what is in dumps; reading them is another matter.
    let verify = ["verify", "orders", "--backup", &id, "--wait", "--level"];
    let refused = fleet.run(&[&verify[..], &["3"]].concat())?;
    ensure!(refused.code() != 0 && refused.stderr.contains("w1 may not load dumps"), "{refused}");
    ensure!(refused.stderr.contains("allow.load_dumps = true"), "{refused}");
    ensure!(fleet.sandboxes()?.is_empty(), "a sandbox was made: {:?}", fleet.sandboxes()?);
    let read = fleet.expect(&[&verify[..], &["2"]].concat())?;
    ensure!(read.contains("passed L2"), "{read}");
    let refused = fleet.run(&["verify", "orders", "--level", "6", "--wait"])?;
    ensure!(
        refused.code() == 2 && refused.stderr.contains("asserts nothing of orders"),
        "{refused}"
    );
    ensure!(refused.stderr.contains("[[clusters.assertions]]"), "{refused}");
    ensure!(fleet.sandboxes()?.is_empty(), "a sandbox was made: {:?}", fleet.sandboxes()?);

    let (key, url) = (fleet.path("repository.key"), fleet.repository_url());
    let (key, server) = (text(&key)?, other.url());
    let at = ["restore", "--repository", &url, "--key", key, "--backup", &id];
    let refused = fleet.run(&[&at[..], &["--into", text(&fleet.path("files"))?]].concat())?;
    ensure!(refused.code() == 2 && refused.stderr.contains("--into-server"), "{refused}");
    let load = [&at[..], &["--into-server", &server]].concat();
    let occupied = fleet.run(&load)?;
    ensure!(occupied.code() == 5 && occupied.stderr.contains("--overwrite"), "{occupied}");
    other.run("DROP SCHEMA public CASCADE; CREATE SCHEMA public").await?;
    for (part, name) in [("--table", "nope"), ("--schema", "nope")] {
        let part = ["--database", "postgres", part, name];
        let refused = fleet.run(&[&load[..], &part].concat())?;
        ensure!(refused.code() == 2 && refused.stderr.contains(" nope"), "{refused}");
    }
    let whole = fleet.run(&[&at[..5], &["--into", "/x", "--database", "postgres"]].concat())?;
    ensure!(whole.code() == 2 && whole.stderr.contains("--into-server"), "{whole}");
    let plan = fleet.expect(&[&load[..], &["--database", "postgres", "--plan"]].concat())?;
    ensure!(plan.contains("restore into database postgres, which is there"), "{plan}");
    let (plan, of) = (fleet.expect(&[&load[..], &["--plan"]].concat())?, "of the whole cluster");
    let lines: Vec<&str> = plan.lines().collect();
    let number = |grouped: &str| grouped.replace(',', "").parse::<u64>();
    let all = |line: &str, before: &str, after: &str| {
        let size = line.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
        size.and_then(|size| number(size).ok()).is_some_and(|size| size > 100)
    };
    let [first, globals, postgres, shop] = lines[..] else { bail!("{of}: {plan}") };
    let whose = format!("restore logical backup {id} of orders (PostgreSQL 15.");
    ensure!(first.starts_with(&whose) && first.contains(") into PostgreSQL 15."), "{of}: {plan}");
    let kept = "create 0 roles and 0 tablespaces; leave these roles as they are: postgres";
    ensure!(globals == kept, "{of}: {plan}");
    let stays = " bytes; its owner, rights and settings stay";
    let there = "restore into database postgres, which is there, all of it, ";
    ensure!(all(postgres, there, stays), "{of}: {plan}");
    let made = "create database shop as it was, and restore all of it, ";
    ensure!(all(shop, made, " bytes"), "{of}: {plan}");
    let schema = ["--database", "shop", "--schema", "old \"stock\"", "--plan"];
    let (plan, of) = (fleet.expect(&[&load[..], &schema].concat())?, "of a schema");
    let lines: Vec<&str> = plan.lines().collect();
    let [first, part, made] = lines[..] else { bail!("{of}: {plan}") };
    ensure!(first.starts_with(&whose), "{of}: {plan}");
    let what = "create database shop, and restore into it schemas old \"stock\" with all that is in them, ";
    let bytes = part.strip_prefix(what).and_then(|rest| rest.strip_suffix(" bytes"));
    let bytes = bytes.and_then(|rest| rest.split_once(" of ")).context(plan.clone())?;
    let (wanted, whole): (u64, u64) = (number(bytes.0)?, number(bytes.1)?);
    ensure!(0 < wanted && wanted <= whole, "{of}: {plan}");
    ensure!(made == "create schema old \"stock\"", "{of}: {plan}");
    let rows = "SELECT count(*) FROM pg_class WHERE relname = 'items'";
    ensure!(other.number(rows).await? == 0, "a plan changes nothing");
    let shops = "SELECT count(*) FROM pg_database WHERE datname = 'shop'";
    ensure!(other.number(shops).await? == 0, "a plan changes nothing");
    other.run("ALTER DATABASE postgres SET default_transaction_read_only = on").await?;
    let done = fleet.expect(&[&load[..], &["--database", "postgres"]].concat())?;
    ensure!(done.contains("Loaded 1 database of"), "{done}");
    let rows = "SELECT count(*) FROM public.items";
    ensure!(other.number(rows).await? == cluster.number(rows).await?, "rows are missing");
    let again = [&load[..], &["--database", "postgres", "--overwrite", "postgres"]].concat();
    let plan = fleet.expect(&[&again[..], &["--plan"]].concat())?;
    let line = "DROP database postgres, create it as it was, and restore all of it, ";
    ensure!(plan.lines().any(|found| all(found, line, " bytes")), "{plan}");
    ensure!(other.number(rows).await? > 0, "a plan changes nothing");
    // One table and its schema, into a database that is not there.
    let table = [&load[..], &["--database", "shop", "--table", "sold"]].concat();
    let plan = fleet.expect(&[&table[..], &["--plan"]].concat())?;
    ensure!(
        plan.contains("create database shop, and restore into it tables old \"stock\".sold"),
        "{plan}"
    );
    ensure!(plan.contains("create schema old \"stock\""), "{plan}");
    let left_out =
        "foreign key old \"stock\".sold sold_article_fkey, for want of table old \"stock\".article";
    ensure!(plan.contains(&format!("leave out {left_out}")), "{plan}");
    let done = fleet.expect(&[&table[..], &["--jobs", "2"]].concat())?;
    ensure!(done.contains(&format!("Left out: {left_out}")), "{done}");
    other.run_in("shop", STOCK_IS_SOLD).await?;
    let password =
        fleet.run(&[&at[..], &["--into-server", "postgres://a:b@localhost/x"]].concat())?;
    ensure!(password.code() == 2 && password.stderr.contains("password"), "{password}");
    cluster.is_left_alone().await
}

const STOCK: &str = r#"
    CREATE SCHEMA "old ""stock""";
    CREATE TABLE "old ""stock""".article (id int PRIMARY KEY);
    CREATE TABLE "old ""stock""".sold (id bigserial PRIMARY KEY, article int REFERENCES "old ""stock""".article);
    INSERT INTO "old ""stock""".article VALUES (1);
    INSERT INTO "old ""stock""".sold (article) SELECT 1 FROM generate_series(1, 100)"#;
const STOCK_IS_SOLD: &str = r#"DO $$ BEGIN
    ASSERT (SELECT count(*) FROM "old ""stock""".sold) = 100;
    INSERT INTO "old ""stock""".sold (article) VALUES (2);
    ASSERT (SELECT max(id) FROM "old ""stock""".sold) = 101;
    ASSERT to_regclass('"old ""stock""".article') IS NULL;
    END $$"#;

const SALES_ARE_THERE: &str = r#"
    [[clusters.assertions]]
    name = "sales-are-there"
    database = "shop"
    sql = "SELECT count(*) = 5000 FROM public.sale"
    "#;

const SHOP: &str = "
    CREATE TABLE public.sale (id bigint, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
    CREATE TABLE public.sale_25 PARTITION OF public.sale FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
    CREATE TABLE public.sale_26 PARTITION OF public.sale FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
    INSERT INTO public.sale SELECT g, '2025-12-01'::date + g % 60 FROM generate_series(1, 5000) g;
    GRANT SELECT ON public.sale TO reader;
    ALTER TABLE public.sale_26 OWNER TO reader;
    SELECT lo_from_bytea(4711, decode(repeat('00ff10', 5000), 'hex'));";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_that_was_ordered_with_its_proof_is_loaded_counted_and_shown() -> anyhow::Result<()>
{
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    let mut setup = WorkerSetup::of("w1", "orders", cluster.url());
    setup.cluster_lines = SALES_ARE_THERE;
    fleet.start_worker(&setup)?;
    // It could prove as well, and has no assertions of the cluster.
    let nobody = WorkerSetup { clusters: Vec::new(), ..WorkerSetup::of("w2", "", String::new()) };
    fleet.start_worker(&nobody)?;
    cluster.run("CREATE ROLE reader").await?;
    for name in ["shop", "an \"odd\" name"] {
        cluster.run(&format!("CREATE DATABASE {}", postgres::quote::identifier(name))).await?;
        cluster.run_in(name, SHOP).await?;
    }

    let dump = ["backup", "orders", "--engine", "pg_dump", "--verify", "6", "--wait"];
    let told = fleet.expect(&dump)?;
    ensure!(told.contains("Dumped 4 databases of orders"), "{told}\n{}", fleet.said());
    ensure!(told.contains("orders is PROVED (L6)"), "{told}\n{}", fleet.said());
    ensure!(told.contains("1 assertion holds"), "{told}");
    ensure!(
        told.contains("a dump, which says nothing of the server's own files and WAL"),
        "{told}"
    );
    ensure!(fleet.sandboxes()?.is_empty(), "a sandbox is left: {:?}", fleet.sandboxes()?);

    // Its proof is what a cluster without physical backups is judged by, and what `verify` means there.
    let judged = fleet.json(&["cluster", "show", "orders", "-o", "json"])?;
    ensure!(judged["state"] == "PROVED", "{judged}");
    let backups = fleet.json(&["backups", "list", "orders", "-o", "json"])?;
    let id = backups[0]["id"].as_str().unwrap_or_default().to_owned();
    let shown = fleet.expect(&["backups", "show", &id])?;
    for check in ["contents", "restored", "row_counts", "L6 sales-are-there"] {
        ensure!(shown.contains(check), "{check}: {shown}");
    }
    ensure!(shown.contains("passed: true in shop, after 0."), "{shown}");
    let looked = fleet.expect(&["verify", "orders", "--level", "2", "--wait"])?;
    ensure!(looked.contains(&format!("backup {id} of orders passed L2")), "{looked}");

    // Where there are both, a proof is one of the files unless a dump is named.
    fleet.expect(&["backup", "orders", "--wait"])?;
    let physical = fleet.expect(&["verify", "orders", "--level", "1", "--wait"])?;
    ensure!(physical.contains("passed L1") && !physical.contains(&id), "{physical}");
    let named = fleet.expect(&["verify", "orders", "--backup", &id, "--level", "4", "--wait"])?;
    ensure!(named.contains("PROVED (L4)") && named.contains("of a dump"), "{named}");
    cluster.is_left_alone().await
}

const DAMAGE: &str = "SET allow_system_table_mods = on; \
    DELETE FROM pg_attribute WHERE attrelid = 'public.items'::regclass AND attname = 'id'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_cannot_be_dumped_is_told_until_a_dump_has_it_again() -> anyhow::Result<()>
{
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", cluster.url()))?;
    cluster.run("CREATE DATABASE shop").await?;
    cluster.run_in("shop", "CREATE TABLE public.items (id int)").await?;
    cluster.run_in("shop", DAMAGE).await?;

    // The first dump lacks it: nothing of it counts, whatever a proof says.
    let dump = ["backup", "orders", "--engine", "pg_dump", "--wait"];
    let part = fleet.run(&[&dump[..], &["--verify", "4"]].concat())?;
    ensure!(part.code() == 3 && part.stdout.contains("Dumped 2 databases of orders"), "{part}");
    ensure!(part.stdout.contains("database shop could not be dumped: pg_dump of"), "{part}");
    let judged = fleet.json(&["cluster", "show", "orders", "-o", "json"])?;
    let reason = judged["reason"].as_str().unwrap_or_default();
    ensure!(judged["state"] == "AT_RISK", "{judged}");
    let said =
        "database shop could not be dumped, and no backup of the whole cluster has it: pg_dump";
    ensure!(reason.starts_with(said), "{judged}");
    ensure!(judged["recoverable_to_at_ms"].is_null(), "a part is no recovery: {judged}");
    let status = fleet.run(&["status"])?;
    ensure!(status.code() == 3 && status.stdout.contains("database shop could not"), "{status}");
    let backups = fleet.json(&["backups", "list", "orders", "-o", "json"])?;
    let id = backups[0]["id"].as_str().unwrap_or_default().to_owned();
    let shown = fleet.expect(&["backups", "show", &id])?;
    ensure!(shown.contains("  not in it    shop, which could not be dumped: pg_dump"), "{shown}");
    ensure!(shown.contains("no backup of the whole cluster"), "{shown}");

    // A backup of the files has it, as damaged as it is on the server; that is told until it can be dumped.
    fleet.expect(&["backup", "orders", "--wait"])?;
    let judged = fleet.json(&["cluster", "show", "orders", "-o", "json"])?;
    let reason = judged["reason"].as_str().unwrap_or_default();
    ensure!(judged["state"] == "AT_RISK", "{judged}");
    ensure!(reason.contains("the newest backup of the whole cluster is "), "{judged}");
    cluster.run("DROP DATABASE shop").await?;
    fleet.expect(&dump)?;
    let judged = fleet.json(&["cluster", "show", "orders", "-o", "json"])?;
    ensure!(judged["state"] == "TAKEN", "{judged}");
    cluster.is_left_alone().await
}
