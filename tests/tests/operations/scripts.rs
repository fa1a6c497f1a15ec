//! The scripts for cron, `archive_command` and `restore_command`, each step of them made to fail.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;
use postgres::instance::{InstanceOptions, StopMode};
use serde_json::Value;
use tests::fleet::text;
use tests::{Bucket, Cluster, Finished, Pgmuster, SOON, bucket, eventually, eventually_async};

use crate::desk::{Desk, mode, root};
use crate::receiver::Receiver;

/// `wal get` does not know.
const NOT_KNOWN: i32 = 200;
/// A backup with all its steps.
const RUN_MAX: Duration = Duration::from_mins(1);

/// A server that asks for passwords, and a desk with settings that dump it.
struct Scene {
    desk: Desk,
    cluster: Cluster,
}

impl Scene {
    async fn create() -> anyhow::Result<Self> {
        let hba = vec!["host all all 127.0.0.1/32 scram-sha-256".to_owned()];
        let options = InstanceOptions { tcp_port: Some(0), hba, ..InstanceOptions::default() };
        let cluster = Cluster::start(15, options).await?;
        cluster.run("CREATE DATABASE \"it's a \\ shop\"").await?;
        for role in ["backup", "guest"] {
            let role =
                format!("CREATE ROLE {role} LOGIN PASSWORD 'right' IN ROLE pg_read_all_data");
            cluster.run(&role).await?;
        }
        let mut desk = Desk::new()?;
        let port = cluster.server.port().to_string();
        let passwords = format!("127.0.0.1:{port}:*:backup:right\n*:*:*:guest:wrong\n");
        desk.write("home/.pgpass", &passwords, 0o600)?;
        for (name, value) in [
            ("DB_HOST", "127.0.0.1".to_owned()),
            ("DB_PORT", port),
            ("DB_USER", "backup".to_owned()),
            ("CLUSTER", "orders".to_owned()),
            ("BACKUP_DIR", desk.at("backups")),
            ("PG_BINDIR", tests::services::postgres_bin(15)?.display().to_string()),
            ("PGMUSTER_SETTINGS", "/nowhere".to_owned()),
        ] {
            desk.set(name, value);
        }
        Ok(Self { desk, cluster })
    }

    fn dump(&self) -> anyhow::Result<Finished> {
        self.desk.script("dump", &[])
    }

    fn key(&self) -> String {
        self.desk.at("home/.config/pgmuster/repository.key")
    }

    /// The backups, oldest first; none where there is no repository.
    fn backups(&self) -> anyhow::Result<Vec<Value>> {
        if !Path::new(&self.key()).exists() {
            return Ok(Vec::new());
        }
        self.desk.backups(&format!("file://{}", self.desk.at("backups/repository")), &self.key())
    }

    /// Puts a program before all others of its name: it ends with 42 when its arguments are such, else it is the real one.
    fn breaks(&mut self, name: &str, arguments: &str) -> anyhow::Result<()> {
        let real = self.desk.expect(&["sh", "-c", &format!("command -v {name}")])?;
        let arguments = arguments.replace(' ', "\\ ");
        let fake = format!(
            "#!/bin/sh\ncase \"$*\" in {arguments}) echo 'it is broken' >&2; exit 42 ;; esac\nexec {real} \"$@\"\n"
        );
        std::fs::create_dir_all(self.desk.path("fakes"))?;
        self.desk.write(&format!("fakes/{name}"), &fake, 0o755)?;
        let path = self.desk.get("PATH")?;
        if !path.starts_with(&self.desk.at("fakes")) {
            let path = format!("{}:{path}", self.desk.at("fakes"));
            self.desk.set("PATH", path);
        }
        Ok(())
    }

    fn mends(&self) -> anyhow::Result<()> {
        Ok(std::fs::remove_dir_all(self.desk.path("fakes"))?)
    }
}

fn wishes(backups: &[Value]) -> Vec<Option<&str>> {
    backups.iter().map(|row| row["wish"].as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn cron_dumps_checks_thins_out_and_tells() -> anyhow::Result<()> {
    let mut scene = Scene::create().await?;
    let first = scene.dump()?;
    ensure!(first.code() == 0 && first.stdout.contains("Dumped 3 databases of orders"), "{first}");
    let sheet = format!("{}.sheet", scene.key());
    ensure!(first.stderr.contains(&sheet) && mode(&sheet)? == 0o600, "{first}");
    ensure!(std::fs::read_to_string(&sheet)?.contains("pgmuster-key-1"), "{sheet}");
    ensure!(!first.stderr.contains("pgmuster-key-1"), "the key is printed: {first}");

    let second = scene.dump()?;
    ensure!(second.code() == 0 && second.stderr.is_empty(), "{second}");
    ensure!(wishes(&scene.backups()?) == [None, None], "nothing is too old");

    let receiver = Receiver::answering(200)?;
    scene.desk.set("SLACK_WEBHOOK_URL", receiver.url("T0/B0/secret"));
    scene.desk.set("RETENTION_DAYS", "0");
    let third = scene.dump()?;
    ensure!(third.code() == 0, "{third}");
    let given_up = Some("given up");
    ensure!(wishes(&scene.backups()?) == [given_up, given_up, None], "the newest one stays");
    ensure!(receiver.texts()?.is_empty(), "a success is told only when that is wished");

    // A file with the settings; one database with an odd name.
    let settings = "RETENTION_DAYS=30 NOTIFY_SUCCESS=yes DB_NAME=\"it's a \\\\ shop\"\n";
    let settings = scene.desk.write("home/settings", settings, 0o600)?;
    scene.desk.set("PGMUSTER_SETTINGS", settings);
    let fourth = scene.dump()?;
    ensure!(fourth.code() == 0 && fourth.stdout.contains("Dumped 1 database of"), "{fourth}");
    let texts = receiver.texts()?;
    ensure!(texts.len() == 1 && texts[0].ends_with(fourth.stdout.trim()), "{texts:?}");
    ensure!(wishes(&scene.backups()?) == [given_up, given_up, None, None], "30 days again");

    let drill = scene.desk.script("restore-drill", &[])?;
    ensure!(drill.code() == 0 && drill.stdout.contains("gave 0 tables and 0 rows"), "{drill}");
    scene.desk.is_tidy()?;
    scene.cluster.is_left_alone().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_takes_dumps_and_a_drill_brings_them_back() -> anyhow::Result<()> {
    let mut scene = Scene::create().await?;
    let bucket = Bucket::create().await?;
    let place = format!(
        "{}/nightly?endpoint={}&region=us-east-1&path-style=true",
        bucket.name(),
        bucket.endpoint()
    );
    scene.desk.set("S3_BUCKET", &place);
    let none = scene.desk.script("restore-drill", &[])?;
    ensure!(none.code() == 2 && none.stderr.contains("failed to find a backup"), "{none}");
    // Before there is a repository and afterwards, a bucket that lets nobody in.
    let is_refused = async |scene: &mut Scene, script: &str, said: &str| -> anyhow::Result<()> {
        let before = bucket.keys("").await?;
        scene.desk.set("AWS_SECRET_ACCESS_KEY", "another");
        let refused = scene.desk.script(script, &[])?;
        scene.desk.set("AWS_SECRET_ACCESS_KEY", bucket::SECRET_KEY);
        ensure!(refused.code() == 4 && refused.stderr.contains(said), "{refused}");
        ensure!(refused.stderr.contains("STORE_FORBIDDEN"), "{refused}");
        ensure!(bucket.keys("").await? == before, "{refused}");
        scene.desk.is_tidy()
    };
    is_refused(&mut scene, "dump", "FAILED in step repository").await?;
    ensure!(!Path::new(&scene.key()).exists(), "a key without its repository");
    let done = scene.dump()?;
    ensure!(done.code() == 0 && bucket.keys("nightly/").await?.len() > 5, "{done}");
    ensure!(!scene.desk.path("backups/repository").exists(), "it went to the bucket only");
    is_refused(&mut scene, "dump", "FAILED in step dump").await?;
    is_refused(&mut scene, "restore-drill", "failed to find a backup").await?;

    let drill = scene.desk.script("restore-drill", &[])?;
    let counted = "(logical, 2";
    ensure!(drill.code() == 0 && drill.stdout.contains(counted), "{drill}");
    // Two tables and a partition with rows, and the parent, which has none of its own.
    ensure!(drill.stdout.contains("gave 2 tables and 6000 rows"), "{drill}");

    scene.desk.set("CLUSTER", "unheard-of");
    let none = scene.desk.script("restore-drill", &[])?;
    ensure!(none.code() == 6 && none.stderr.contains("has no backup of unheard-of"), "{none}");
    scene.desk.set("CLUSTER", "orders");
    scene.breaks("pgmuster", "restore*")?;
    let broken = scene.desk.script("restore-drill", &[])?;
    ensure!(broken.code() == 42 && broken.stderr.contains("failed to load backup"), "{broken}");
    ensure!(broken.stdout.is_empty() && broken.stderr.contains("it is broken"), "{broken}");
    scene.desk.is_tidy()
}

/// What is wrong, how the script names the step, its exit code, what it says, how many dumps there are afterwards.
struct Fault {
    variables: &'static [(&'static str, &'static str)],
    breaks: Option<(&'static str, &'static str)>,
    step: &'static str,
    code: i32,
    says: &'static str,
    dumps: usize,
}

const FAULTS: &[Fault] = &[
    Fault {
        variables: &[("RETENTION_DAYS", "a week")],
        breaks: None,
        step: "settings",
        code: 2,
        says: "RETENTION_DAYS=a week is no number",
        dumps: 0,
    },
    Fault {
        variables: &[("PATH", "/usr/bin:/bin")],
        breaks: None,
        step: "settings",
        code: 127,
        says: "pgmuster is not installed",
        dumps: 0,
    },
    Fault {
        variables: &[("BACKUP_DIR", "/proc/backups")],
        breaks: None,
        step: "lock",
        code: 1,
        says: "/proc/backups",
        dumps: 0,
    },
    Fault {
        variables: &[],
        breaks: Some(("pgmuster", "repo init*")),
        step: "repository",
        code: 42,
        says: "it is broken",
        dumps: 0,
    },
    Fault {
        variables: &[("DB_PORT", "1")],
        breaks: None,
        step: "dump",
        code: 8,
        says: "SERVER_UNREACHABLE",
        dumps: 0,
    },
    Fault {
        variables: &[("DB_USER", "guest")],
        breaks: None,
        step: "dump",
        code: 4,
        says: "LOGIN_REFUSED",
        dumps: 0,
    },
    Fault {
        variables: &[("DB_NAME", "no \"such\" \\ shop")],
        breaks: None,
        step: "dump",
        code: 2,
        says: "no database fits",
        dumps: 0,
    },
    Fault {
        variables: &[("PGMUSTER_FAILPOINT", "commit=abort")],
        breaks: None,
        step: "dump",
        code: 134,
        says: "",
        dumps: 0,
    },
    Fault {
        variables: &[],
        breaks: Some(("pgmuster", "repo check*")),
        step: "check",
        code: 42,
        says: "it is broken",
        dumps: 1,
    },
    Fault {
        variables: &[],
        breaks: Some(("pgmuster", "repo list*")),
        step: "retention",
        code: 42,
        says: "it is broken",
        dumps: 2,
    },
    Fault {
        variables: &[("RETENTION_DAYS", "0")],
        breaks: Some(("pgmuster", "repo delete*")),
        step: "retention",
        code: 42,
        says: "it is broken",
        dumps: 3,
    },
    Fault {
        variables: &[],
        breaks: Some(("pgmuster", "repo gc*")),
        step: "retention",
        code: 42,
        says: "it is broken",
        dumps: 4,
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn each_step_that_fails_fails_the_run_and_is_told() -> anyhow::Result<()> {
    let mut scene = Scene::create().await?;
    let receiver = Receiver::answering(200)?;
    scene.desk.set("SLACK_WEBHOOK_URL", receiver.url("T0/B0/secret"));
    scene.desk.set("NOTIFY_SUCCESS", "yes");
    for (number, fault) in FAULTS.iter().enumerate() {
        let Fault { step, code, says, dumps, .. } = fault;
        let mut before = Vec::new();
        for (name, value) in fault.variables {
            before.push((name, scene.desk.get(name).map(str::to_owned)));
            scene.desk.set(name, *value);
        }
        if let Some((program, arguments)) = fault.breaks {
            scene.breaks(program, arguments)?;
        }
        let done = scene.dump()?;
        if fault.breaks.is_some() {
            scene.mends()?;
        }
        for (name, value) in before {
            match value {
                Ok(value) => scene.desk.set(name, value),
                Err(_) => scene.desk.unset(name),
            }
        }
        ensure!(done.code() == *code && done.stdout.is_empty(), "{step}: {done}");
        let failed = format!("the backup FAILED in step {step} (exit code {code})");
        ensure!(done.stderr.contains(&failed) && done.stderr.contains(says), "{step}: {done}");
        let texts = receiver.texts()?;
        ensure!(texts.len() == number + 1, "one message for each failure: {texts:?}");
        ensure!(texts[number].contains(&failed) && texts[number].contains(says), "{texts:?}");
        let after = texts[number].contains("after: Dumped");
        ensure!(after == (*dumps > 0), "a dump that was taken is told of: {texts:?}");
        ensure!(scene.backups()?.len() == *dumps, "{step}: {:?}", scene.backups()?);
        scene.desk.is_tidy()?;
        scene.cluster.is_left_alone().await?;
    }

    // What is lost is found, and only told: the dump of this run is whole.
    let packs = scene.desk.at("backups/repository/lineages");
    let find = ["find", &packs, "-path", "*/packs/*", "-type", "f", "-delete"];
    scene.desk.expect(&find)?;
    let damaged = scene.dump()?;
    ensure!(damaged.code() == 3 && damaged.stderr.contains("in step check"), "{damaged}");
    ensure!(damaged.stderr.contains("after: Dumped"), "{damaged}");

    // A repository that is gone is not replaced by an empty one, nor is a key.
    std::fs::rename(scene.desk.path("backups/repository"), scene.desk.path("away"))?;
    let gone = scene.dump()?;
    ensure!(gone.code() == 6 && gone.stderr.contains("REPOSITORY_MISSING"), "{gone}");
    std::fs::rename(scene.desk.path("away"), scene.desk.path("backups/repository"))?;
    std::fs::rename(scene.key(), scene.desk.path("away"))?;
    let gone = scene.dump()?;
    ensure!(gone.code() == 7 && gone.stderr.contains("REPOSITORY_EXISTS"), "{gone}");
    ensure!(!Path::new(&scene.key()).exists(), "a key that opens nothing is not kept");
    Ok(())
}

/// Of a drill: the program that fails, with which arguments, and the step that is named.
const OF_A_DUMP: &[(&str, &str, &str)] = &[
    ("pgmuster", "repo list*", "find a backup"),
    ("jq", "*", "find a backup"),
    ("initdb", "*", "start a server"),
    ("pg_ctl", "start*", "start a server"),
    ("pgmuster", "restore*", "load backup"),
    ("psql", "*pg_database*", "count the rows of backup"),
    ("psql", IN_A_DATABASE, "count the rows of backup"),
];
const OF_FILES: &[(&str, &str, &str)] = &[
    ("pgmuster", "restore*", "restore backup"),
    ("pg_ctl", "start*", "start backup"),
    ("psql", IN_A_DATABASE, "count the rows of backup"),
];
/// What is asked there, comes on standard input.
const IN_A_DATABASE: &str = "*-U postgres";

#[tokio::test(flavor = "multi_thread")]
async fn each_step_of_a_drill_that_fails_fails_it_and_leaves_nothing() -> anyhow::Result<()> {
    let mut scene = Scene::create().await?;
    let dumped = scene.dump()?;
    ensure!(dumped.code() == 0, "{dumped}");
    let programs = scene.desk.get("PG_BINDIR")?.to_owned();
    let (server, key) = (scene.cluster.url(), scene.key());
    let repository = format!("file://{}", scene.desk.at("backups/repository"));
    for (faults, kind) in [(OF_A_DUMP, "logical"), (OF_FILES, "physical")] {
        if kind == "physical" {
            let backup = ["pgmuster", "backup", "orders", "--server", &server, "--key", &key];
            scene.desk.expect(&[&backup[..], &["--repository", &repository]].concat())?;
        }
        for (program, arguments, step) in faults {
            scene.breaks(program, arguments)?;
            // Beside the one that fails, the others of the directory that the script looks in.
            for name in ["postgres", "initdb", "pg_ctl", "psql"] {
                if name != *program {
                    scene.breaks(name, "nothing")?;
                }
            }
            scene.desk.set("PG_BINDIR", scene.desk.at("fakes"));
            let failed = scene.desk.script("restore-drill", &[])?;
            scene.desk.set("PG_BINDIR", &programs);
            scene.mends()?;
            let said = format!("the restore drill of orders failed to {step}");
            ensure!(failed.code() == 42 && failed.stderr.contains(&said), "{step}: {failed}");
            ensure!(failed.stderr.contains("it is broken"), "{step}: {failed}");
            ensure!(failed.stderr.contains("(exit code 42)"), "{step}: {failed}");
            is_over(&scene.desk, &failed)?;
        }
        // Nor is there anything to start a server with.
        scene.desk.set("PG_BINDIR", scene.desk.at("home"));
        let failed = scene.desk.script("restore-drill", &[])?;
        scene.desk.set("PG_BINDIR", &programs);
        ensure!(failed.code() == 127 && failed.stderr.contains("failed to start "), "{failed}");
        ensure!(failed.stderr.contains("name the directory in PG_BINDIR"), "{failed}");
        is_over(&scene.desk, &failed)?;
        let drill = scene.desk.script("restore-drill", &[])?;
        ensure!(drill.code() == 0 && drill.stdout.contains(&format!("({kind}, 2")), "{drill}");
    }

    // A copy that lets nobody in says why.
    scene.desk.set("PGUSER", "nobody");
    let failed = scene.desk.script("restore-drill", &[])?;
    ensure!(failed.stderr.contains("failed to count the rows of backup"), "{failed}");
    ensure!(failed.stderr.contains("role \"nobody\" does not exist"), "{failed}");
    is_over(&scene.desk, &failed)?;
    scene.cluster.is_left_alone().await
}

/// A drill that failed says nothing that looks like a success, and has left neither file nor server.
fn is_over(desk: &Desk, failed: &Finished) -> anyhow::Result<()> {
    ensure!(failed.stdout.is_empty(), "{failed}");
    desk.is_tidy()?;
    for entry in std::fs::read_dir("/proc")? {
        // It may end while it is looked at, or belong to somebody else.
        let line = std::fs::read(entry?.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        ensure!(!line.contains(&desk.at("tmp")), "this still runs: {line}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_at_once_is_refused_and_the_first_one_goes_on() -> anyhow::Result<()> {
    let mut scene = Scene::create().await?;
    let go = scene.desk.at("go");
    scene.desk.set("PGMUSTER_FAILPOINT", format!("dump=hold:{go}"));
    let script = root().join("scripts/backup/dump");
    let first: Pgmuster = scene.desk.start(&[text(&script)?])?;
    scene.desk.unset("PGMUSTER_FAILPOINT");
    let lineages = PathBuf::from(scene.desk.at("backups/repository/lineages"));
    eventually("the first run to begin", SOON, || Ok((begun(&lineages)? > 0).then_some(())))?;
    let second = scene.dump()?;
    ensure!(second.code() == 7 && second.stderr.contains("another run holds"), "{second}");
    ensure!(second.stderr.contains("FAILED in step lock"), "{second}");
    std::fs::write(go, "")?;
    let first = first.wait(RUN_MAX)?;
    ensure!(first.code() == 0, "{first}");
    let third = scene.dump()?;
    ensure!(third.code() == 0 && scene.backups()?.len() == 2, "{third}");
    scene.desk.is_tidy()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_that_is_down_fails_nothing_and_its_url_stays_secret() -> anyhow::Result<()> {
    let mut scene = Scene::create().await?;
    let refusing = Receiver::answering(500)?;
    let secret = "T0/B0/hunter2";
    // Every program that is run leaves its arguments and its environment.
    let seen = scene.desk.at("seen");
    std::fs::create_dir(scene.desk.path("spies"))?;
    for name in ["pgmuster", "jq", "curl", "flock"] {
        let real = scene.desk.expect(&["sh", "-c", &format!("command -v {name}")])?;
        let spy = format!(
            "#!/bin/sh\nprintf '%s\\n' {name} \"$@\" >>{seen}.arguments\nenv >>{seen}.{name}\nexec {real} \"$@\"\n"
        );
        scene.desk.write(&format!("spies/{name}"), &spy, 0o755)?;
    }
    let path = format!("{}:{}", scene.desk.at("spies"), scene.desk.get("PATH")?);
    scene.desk.set("PATH", path);
    scene.desk.set("NOTIFY_SUCCESS", "yes");

    scene.desk.set("SLACK_WEBHOOK_URL", refusing.url(secret));
    let refused = scene.dump()?;
    ensure!(refused.code() == 0 && refused.stdout.contains("Dumped"), "{refused}");
    ensure!(refused.stderr.contains("Slack was not told (curl ended with 22)"), "{refused}");
    ensure!(refusing.texts()?.len() == 1, "it was posted");
    scene.desk.set("SLACK_WEBHOOK_URL", format!("http://127.0.0.1:1/services/{secret}"));
    scene.desk.set("DB_PORT", "1");
    let down = scene.dump()?;
    ensure!(down.code() == 8 && down.stderr.contains("SERVER_UNREACHABLE"), "{down}");
    ensure!(down.stderr.contains("Slack was not told (curl ended with 7)"), "{down}");

    for said in [&refused, &down] {
        ensure!(!said.to_string().contains("hunter2"), "the webhook is told: {said}");
    }
    let arguments = std::fs::read_to_string(format!("{seen}.arguments"))?;
    ensure!(arguments.contains("curl\n") && arguments.contains("--config"), "{arguments}");
    ensure!(!arguments.contains("hunter2"), "the webhook is an argument: {arguments}");
    for name in ["pgmuster", "curl", "flock"] {
        let environment = std::fs::read_to_string(format!("{seen}.{name}"))?;
        ensure!(!environment.contains("hunter2"), "{name} has the webhook");
    }
    scene.desk.is_tidy()
}

/// In a namespace of its own the directory of backups is a small file system in memory. A second one gives the user back.
const SMALL_DISK: &str = r#"
    mkdir -p "$BACKUP_DIR"
    mount -t tmpfs -o mode=700,size=48m small "$BACKUP_DIR"
    exec unshare --user --map-user="$1" --map-group="$2" -- sh -uc "$3" "$4"
"#;

/// A run on an empty disk, one on a full one, one after room was made.
const THREE_RUNS: &str = r#"
    "$0"; echo "empty: $?"
    dd if=/dev/zero of="$BACKUP_DIR/full" bs=4096 2>/dev/null
    "$0"; echo "full: $?"
    rm "$BACKUP_DIR/full"
    "$0"; echo "room: $?"
    pgmuster repo list "file://$BACKUP_DIR/repository" --key "$HOME/.config/pgmuster/repository.key" -o json |
      jq -r '"\(length) dumps"'
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_full_directory_of_backups_fails_the_run_and_harms_nothing() -> anyhow::Result<()> {
    let scene = Scene::create().await?;
    let script = root().join("scripts/backup/dump");
    let user = rustix::process::getuid().as_raw().to_string();
    let group = rustix::process::getgid().as_raw().to_string();
    let unshare = ["unshare", "--user", "--map-root-user", "--mount", "--", "sh", "-euc"];
    let words = [SMALL_DISK, "sh", &user, &group, THREE_RUNS, text(&script)?];
    let done = scene.desk.run(&[&unshare[..], &words].concat())?;
    let told = &done.stdout;
    ensure!(
        told.contains("empty: 0") && told.contains("full: 5") && told.contains("room: 0"),
        "{done}"
    );
    ensure!(told.contains("2 dumps") && done.stderr.contains("TARGET_FULL"), "{done}");
    scene.desk.is_tidy()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_archives_and_recovers_through_the_scripts() -> anyhow::Result<()> {
    let mut desk = Desk::new()?;
    let scripts = root().join("scripts/backup");
    let settings = format!(
        "BACKUP_DIR={} KEY_FILE={} CLUSTER=orders\nPATH={}:$PATH\n",
        desk.at("backups"),
        desk.at("key"),
        desk.at("bin")
    );
    let settings = desk.write("home/settings", &settings, 0o600)?;
    let url = format!("file://{}", desk.at("backups/repository"));
    desk.expect(&["pgmuster", "repo", "init", &url, "--key", &desk.at("key")])?;
    // As an administrator would set it where the settings are not in /etc.
    let command = |name: &str, rest: &str| {
        format!("PGMUSTER_SETTINGS={settings} {}/{name} {rest}", scripts.display())
    };
    let (push, get) = (command("archive-wal", "%p"), command("restore-wal", "%f %p"));
    let archiving = [("archive_mode", "on"), ("archive_command", push.as_str())];
    let settings_of_server = archiving.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let options = InstanceOptions {
        settings: settings_of_server.to_vec(),
        wal_segment_size_mb: Some(1),
        ..InstanceOptions::default()
    };
    let mut cluster = Cluster::start(15, options).await?;
    let backup = ["pgmuster", "backup", "orders", "--server", &cluster.url(), "--repository", &url];
    let told = desk.expect(&[&backup[..], &["--key", &desk.at("key")]].concat())?;
    ensure!(told.starts_with("Backed up orders"), "{told}");
    cluster
        .run("INSERT INTO public.items SELECT g, 'late' FROM generate_series(5001, 6000) g")
        .await?;
    cluster.server.stop(StopMode::Fast).await?;

    desk.set("PGMUSTER_SETTINGS", desk.at("home/settings"));
    let drill = desk.script("restore-drill", &[])?;
    ensure!(drill.code() == 0 && drill.stdout.contains("(physical, 2"), "{drill}");
    ensure!(drill.stdout.contains("gave 2 tables and 6000 rows"), "{drill}");

    let data = cluster.server.data_directory();
    std::fs::remove_dir_all(&data)?;
    let into = ["--into", text(&data)?, "--key", &desk.at("key")];
    desk.expect(&[&["pgmuster", "restore", "--repository", &url], &into[..]].concat())?;
    std::fs::write(data.join("recovery.signal"), "")?;
    cluster.server.set(&[("restore_command", &get)])?;
    cluster.server.start().await?;
    eventually_async("the end of the recovery", SOON, async || {
        let recovering = "SELECT pg_is_in_recovery()::int::bigint";
        Ok((cluster.number(recovering).await? == 0).then_some(()))
    })
    .await?;
    ensure!(cluster.number("SELECT count(*) FROM public.items").await? == 6000, "rows are missing");

    // Before pgmuster runs nothing may be taken for an answer.
    let asks = |desk: &Desk| desk.script("restore-wal", &["000000010000000000000001", "x"]);
    for wrong in
        ["if then", "exit 1", "unset HOME; CLUSTER=$nothing", "PATH=/nowhere", "KEY_FILE=/no"]
    {
        desk.set("PGMUSTER_SETTINGS", desk.write("home/wrong", wrong, 0o600)?);
        let asked = asks(&desk)?;
        ensure!(asked.code() == NOT_KNOWN, "{wrong}: {asked}");
        let pushed = desk.script("archive-wal", &["x"])?;
        ensure!((1..=127).contains(&pushed.code()), "{wrong}: {pushed}");
    }
    desk.is_tidy()
}

/// Backups that were begun, whatever became of them.
fn begun(directory: &Path) -> anyhow::Result<usize> {
    let mut count = 0;
    if !directory.exists() {
        return Ok(count);
    }
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            count += begun(&entry.path())?;
        } else if entry.file_name() == "intent" {
            count += 1;
        }
    }
    Ok(count)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_without_a_coordinator_that_is_stopped_leaves_nothing() -> anyhow::Result<()> {
    let mut scene = Scene::create().await?;
    let made = scene.dump()?;
    ensure!(made.code() == 0, "{made}");
    let repository = format!("file://{}", scene.desk.at("backups/repository"));
    let (server, key) = (scene.cluster.url(), scene.key());
    let to = ["--repository", &repository, "--key", &key];
    for (engine, step) in [("native", "copy"), ("pg_dump", "dump")] {
        scene.desk.set("PGMUSTER_FAILPOINT", format!("{step}=pause"));
        let from = ["pgmuster", "backup", "orders", "--engine", engine, "--server", &server];
        let lineages = PathBuf::from(scene.desk.at("backups/repository/lineages"));
        let before = begun(&lineages)?;
        let program = scene.desk.start(&[&from[..], &to[..]].concat())?;
        eventually("a backup to begin", SOON, || Ok((begun(&lineages)? > before).then_some(())))?;
        program.terminate()?;
        let done = program.wait(RUN_MAX)?;
        ensure!(done.code() == 130 && done.stderr.contains("CANCELLED"), "{engine}: {done}");
        scene.cluster.is_left_alone().await?;
    }
    ensure!(scene.backups()?.len() == 1, "nothing was committed");
    let secret = ["pgmuster", "backup", "orders", "--server", "postgres://a:hunter2@h/d"];
    let secret = scene.desk.run(&[&secret[..], &to[..]].concat())?;
    ensure!(secret.code() == 2 && secret.stderr.contains(".pgpass"), "{secret}");
    ensure!(!secret.stderr.contains("hunter2"), "{secret}");
    Ok(())
}

#[test]
fn every_script_says_how_it_is_used_and_refuses_what_it_does_not_know() -> anyhow::Result<()> {
    let desk = Desk::new()?;
    for name in ["dump", "restore-drill"] {
        let help = desk.script(name, &["--help"])?;
        let usage = format!("Usage: {name} [--help]");
        ensure!(help.code() == 0 && help.stdout.contains(&usage), "{help}");
        ensure!(help.stdout.lines().all(|line| !line.starts_with('#')), "{help}");
        let unknown = desk.script(name, &["--dry-run"])?;
        ensure!(unknown.code() == 2 && unknown.stderr.contains("--dry-run"), "{unknown}");
    }
    desk.is_tidy()
}
