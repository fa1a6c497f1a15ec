//! The house rules as tests: who may import whom, what every failure code, source file, document and fragment has.
//!
//! Reads the checkout and what cargo says about it; starts nothing and connects to nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use proto::Code;
use serde_json::Value;

/// Which crates of ours a crate may import. Dependencies run downwards only; ARCHITECTURE.md shows the same table.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("policy", &["proto"]),
    ("broker", &["proto"]),
    ("telemetry", &["proto"]),
    ("repository", &["proto"]),
    ("postgres", &["proto"]),
    ("maintenance", &["postgres", "proto"]),
    ("coordinator", &["broker", "policy", "proto", "telemetry"]),
    ("worker", &["broker", "maintenance", "postgres", "proto", "repository", "telemetry"]),
    (
        "cli",
        &[
            "broker",
            "coordinator",
            "maintenance",
            "policy",
            "postgres",
            "proto",
            "repository",
            "telemetry",
            "worker",
        ],
    ),
    (
        "tests",
        &[
            "broker",
            "cli",
            "coordinator",
            "maintenance",
            "policy",
            "postgres",
            "proto",
            "repository",
            "telemetry",
            "worker",
        ],
    ),
];

/// One TLS stack, one crypto provider, one time library, no dead parsers. The same list as in deny.toml.
const BANNED: &[&str] = &["chrono", "openssl-sys", "ring", "serde_yaml", "tokio-tar"];

const ERROR_PAGE: &[&str] = &["## Cause", "## Check", "## Cure", "## How to verify"];
const ADR: &[&str] = &["## Context", "## Decision", "## Rejected", "## Consequences"];
const FRAGMENT_KINDS: &[&str] = &["added", "changed", "fixed", "removed", "security"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate has a parent folder")
}

/// What cargo prints for these arguments, from the file that `tests/run` made or from cargo itself.
fn cargo(file: &str, arguments: &[&str]) -> anyhow::Result<String> {
    if let Some(facts) = tests::services::facts() {
        return std::fs::read_to_string(facts.join(file)).with_context(|| format!("read {file}"));
    }
    let output = Command::new(env!("CARGO")).args(arguments).current_dir(root()).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn packages() -> anyhow::Result<Vec<Value>> {
    let arguments = ["metadata", "--locked", "--format-version", "1"];
    let metadata: Value = serde_json::from_str(&cargo("metadata.json", &arguments)?)?;
    let members: BTreeSet<&str> =
        list(&metadata, "workspace_members").iter().filter_map(Value::as_str).collect();
    let ours = |package: &&Value| members.contains(text(package, "id"));
    Ok(list(&metadata, "packages").iter().filter(ours).cloned().collect())
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// Every file of the checkout with this ending, except what is built or belongs to git.
fn files(ending: &str) -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("the checkout can be read").flatten() {
            let path = entry.path();
            // In a second worktree `.git` is a file.
            if path == root().join("target") || path == root().join(".git") {
                continue;
            }
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => walk(&path, found),
                Ok(kind) if kind.is_file() => found.push(path),
                _ => {}
            }
        }
    }
    let mut found = Vec::new();
    walk(root(), &mut found);
    found.retain(|path| path.to_string_lossy().ends_with(ending));
    found.sort();
    assert!(!found.is_empty(), "no file ends with {ending}: this check checks nothing");
    found
}

/// The text of a file; nothing for one that is not text.
fn read(path: &Path) -> String {
    let bytes = std::fs::read(path);
    String::from_utf8(bytes.expect("files of the checkout can be read")).unwrap_or_default()
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Fails with all that was found, not only the first.
fn none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn crates_import_only_what_lies_below() -> anyhow::Result<()> {
    let allowed: BTreeMap<&str, &[&str]> = MAY_IMPORT.iter().copied().collect();
    let packages = packages()?;
    let names: BTreeSet<&str> = packages.iter().map(|package| text(package, "name")).collect();
    assert_eq!(names, allowed.keys().copied().collect(), "the crates of the workspace");
    let mut wrong = Vec::new();
    for package in &packages {
        let name = text(package, "name");
        for dependency in list(package, "dependencies") {
            let import = text(dependency, "name");
            // Tests may use what they need: the coordinator's start PostgreSQL servers for its catalog.
            let shipped = text(dependency, "kind") != "dev";
            let ours = dependency.get("path").is_some_and(Value::is_string);
            if ours && shipped && import != name && !allowed[name].contains(&import) {
                wrong.push(format!("{name} imports {import}"));
            }
        }
    }
    none("these imports run against the order of the crates", &wrong);
    Ok(())
}

#[test]
fn architecture_shows_the_same_imports() {
    let document = read(&root().join("ARCHITECTURE.md"));
    for (name, imports) in MAY_IMPORT {
        let start = format!("| `{name}/` |");
        let row = document.lines().find(|line| line.starts_with(&start));
        let row = row.unwrap_or_else(|| panic!("ARCHITECTURE.md has no row for {name}/"));
        let cell = row.split('|').nth(3).unwrap_or_default().trim();
        let expected = match (*name, imports.len()) {
            (_, 0) => "-".to_owned(),
            ("tests", _) => "all".to_owned(),
            ("cli", _) => "all but tests".to_owned(),
            _ => imports.join(", "),
        };
        let mut shown: Vec<&str> = cell.split(", ").collect();
        shown.sort_unstable();
        assert_eq!(shown.join(", "), expected, "the imports of {name}/ in ARCHITECTURE.md");
    }
}

#[test]
fn every_crate_obeys_the_workspace_lints() {
    let opted_out: Vec<String> = MAY_IMPORT
        .iter()
        .map(|(name, _)| root().join(name).join("Cargo.toml"))
        .filter(|path| !read(path).contains("[lints]\nworkspace = true\n"))
        .map(|path| shown(&path))
        .collect();
    none("these crates have lints of their own", &opted_out);
}

#[test]
fn top_level_is_as_the_readers_expect() {
    let expected = ["Cargo.toml", "coordinator", "deploy", "proto", "README.md", "tests", "worker"];
    let missing: Vec<String> = expected
        .iter()
        .filter(|name| !root().join(name).exists())
        .map(|&name| name.into())
        .collect();
    none("these are missing at the top level", &missing);
    let crates: BTreeSet<&str> = MAY_IMPORT.iter().map(|(name, _)| *name).collect();
    let homeless: Vec<String> = files(".rs")
        .iter()
        .map(|path| shown(path))
        .filter(|path| !crates.contains(path.split('/').next().unwrap_or_default()))
        .filter(|path| !path.starts_with("benches/"))
        .collect();
    none("these sources belong to no crate", &homeless);
}

#[test]
fn banned_crates_are_not_built() -> anyhow::Result<()> {
    // cargo metadata unites the features of all platforms and lists more than is built; the tree is exact.
    let edges = "normal,build,dev";
    let arguments = [
        "tree",
        "--locked",
        "--workspace",
        "--target",
        "all",
        "--edges",
        edges,
        "--prefix",
        "none",
    ];
    let tree = cargo("tree.txt", &arguments)?;
    let built: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(built.contains("tokio"), "the tree has been read");
    let found: Vec<String> =
        BANNED.iter().filter(|name| built.contains(*name)).map(|&name| name.into()).collect();
    none("these crates are banned (cargo tree -i NAME tells who wants them)", &found);
    let deny = read(&root().join("deny.toml"));
    for name in BANNED {
        assert!(deny.contains(&format!("name = \"{name}\"")), "deny.toml does not ban {name}");
    }
    Ok(())
}

#[test]
fn every_failure_code_has_its_page() {
    let folder = root().join("docs/errors");
    let pages: BTreeSet<String> = files(".md")
        .iter()
        .filter(|path| path.starts_with(&folder))
        .map(|path| stem(path))
        .collect();
    let codes: BTreeSet<String> = Code::ALL.iter().map(|code| code.as_str().to_owned()).collect();
    assert_eq!(codes, pages, "left: the codes; right: the pages in docs/errors");
    let mut wrong = Vec::new();
    for code in codes {
        let page = read(&folder.join(format!("{code}.md")));
        if !page.starts_with(&format!("# {code}\n")) {
            wrong.push(format!("{code}: the title is not the code"));
        }
        wrong.extend(unlike(&page, ERROR_PAGE).map(|what| format!("{code}: {what}")));
    }
    none("these pages are incomplete", &wrong);
}

/// Whether a document has exactly these headings of the second level, in this order, each with text.
fn unlike(document: &str, headings: &[&str]) -> impl Iterator<Item = String> + use<> {
    let found: Vec<&str> = document.lines().filter(|line| line.starts_with("## ")).collect();
    let order = (found != headings).then(|| format!("its headings are {found:?}"));
    let empty: Vec<String> = document
        .split("\n## ")
        .skip(1)
        .filter(|part| part.split_once('\n').is_none_or(|(_, body)| body.trim().is_empty()))
        .map(|part| format!("nothing under {:?}", part.trim()))
        .collect();
    order.into_iter().chain(empty)
}

#[test]
fn decisions_are_numbered_and_complete() {
    let folder = root().join("docs/adr");
    let records: Vec<PathBuf> =
        files(".md").into_iter().filter(|path| path.starts_with(&folder)).collect();
    let mut wrong = Vec::new();
    for (number, path) in records.iter().enumerate() {
        if !stem(path).starts_with(&format!("{number:04}-")) {
            wrong.push(format!("{}: its number should be {number:04}", shown(path)));
        }
        wrong.extend(unlike(&read(path), ADR).map(|what| format!("{}: {what}", shown(path))));
    }
    none("these decision records are not in order", &wrong);
}

#[test]
fn sources_say_what_they_are_for() {
    let silent: Vec<String> = files(".rs")
        .iter()
        .filter(|path| !read(path).starts_with("//! "))
        .map(|path| shown(path))
        .collect();
    none("these sources do not begin with //! and what they are for", &silent);
}

#[test]
fn nothing_is_left_for_later() {
    // In two halves, so that this file does not hold them.
    let unfinished: Vec<String> = [
        ("#[ig", "nore"),
        ("to", "do!("),
        ("unimple", "mented!("),
        ("FIX", "ME"),
        ("TO", "DO"),
        ("Place", "holder."),
    ]
    .map(|(left, right)| format!("{left}{right}"))
    .into();
    let mut found = Vec::new();
    for path in files(".rs") {
        for (number, line) in (1..).zip(read(&path).lines()) {
            if unfinished.iter().any(|mark| line.contains(mark.as_str())) {
                found.push(format!("{}:{number}: {}", shown(&path), line.trim()));
            }
        }
    }
    none("these places are unfinished or skip a test", &found);
}

#[test]
fn change_fragments_parse() {
    let folder = root().join("changes");
    let fragments =
        files(".md").into_iter().filter(|path| path.starts_with(&folder) && stem(path) != "README");
    let mut wrong = Vec::new();
    for path in fragments {
        let name = stem(&path);
        let kind = name.rsplit_once('.').map(|(_, kind)| kind.to_owned()).unwrap_or_default();
        if !FRAGMENT_KINDS.contains(&kind.as_str()) {
            wrong.push(format!("{}: the kind is not one of {FRAGMENT_KINDS:?}", shown(&path)));
        }
        let body = read(&path);
        let mut lines = body.lines();
        let sentence = lines.next().unwrap_or_default();
        if !sentence.ends_with('.') || sentence.len() > 120 {
            wrong
                .push(format!("{}: line 1 is not one sentence of at most 120 bytes", shown(&path)));
        }
        if !lines.next().unwrap_or_default().is_empty() {
            wrong.push(format!("{}: line 2 is not empty", shown(&path)));
        }
    }
    none("these fragments cannot go into the changelog", &wrong);
}

#[test]
fn no_file_names_somebodys_machine() {
    // In two halves, so that this file does not hold them.
    let places = [("/ro", "ot/"), ("/wo", "rk/"), ("/ho", "me/")].map(|(a, b)| format!("{a}{b}"));
    let mut found = Vec::new();
    for path in files("") {
        for (number, line) in (1..).zip(read(&path).lines()) {
            if places.iter().any(|place| line.contains(place.as_str())) {
                found.push(format!("{}:{number}: {}", shown(&path), line.trim()));
            }
        }
    }
    none("these lines hold a path of one machine", &found);
}

#[test]
fn sample_configurations_are_complete_and_accepted() -> anyhow::Result<()> {
    let mut samples: BTreeSet<String> = files(".toml")
        .iter()
        .filter(|path| path.starts_with(root().join("deploy/config")))
        .map(|path| stem(path))
        .collect();
    let mut accept = |name: &str| -> anyhow::Result<String> {
        ensure!(samples.remove(name), "deploy/config/{name}.toml is missing");
        Ok(read(&root().join(format!("deploy/config/{name}.toml"))))
    };
    let text = accept("coordinator")?;
    let config: coordinator::config::Config = toml::from_str(&text)?;
    none("coordinator.toml", &config.validate());
    same_keys(&text, &toml::Value::try_from(&config)?)?;
    let text = accept("worker")?;
    let config: worker::config::WorkerConfig = toml::from_str(&text)?;
    none("worker.toml", &config.problems());
    same_keys(&text, &toml::Value::try_from(&config)?)?;
    none("nothing reads these samples", &samples.into_iter().collect::<Vec<_>>());
    Ok(())
}

#[test]
fn systemd_accepts_the_units_and_they_stop_the_worker_no_sooner_than_it_ends() -> anyhow::Result<()>
{
    let units = files(".service");
    let place = tempfile::tempdir()?;
    for path in &units {
        // The program itself is installed nowhere.
        let unit = read(path).replace("/usr/bin/pgmuster ", "/bin/true ");
        ensure!(unit.contains("ExecStart=/bin/true "), "{}", shown(path));
        let copy = place.path().join(path.file_name().context("a unit has a name")?);
        std::fs::write(&copy, unit)?;
        let analyze = |arguments: &[&str]| {
            let analyze = Command::new("systemd-analyze").args(arguments).arg(&copy).output();
            analyze.context("run systemd-analyze, which tests/tools installs")
        };
        let verified = analyze(&["verify"])?;
        let said = String::from_utf8_lossy(&verified.stderr);
        let named = said.lines().any(|line| line.contains("pgmuster"));
        ensure!(verified.status.success() && !named, "{}: {said}", shown(path));
        // Out of a hundred: how much of this machine a service that was taken over has.
        let exposed = analyze(&["security", "--offline=true", "--threshold=45"])?;
        ensure!(exposed.status.success(), "{}", String::from_utf8_lossy(&exposed.stdout));
    }
    let unit = |name: &str| -> anyhow::Result<String> {
        let path = units.iter().find(|path| stem(path) == name);
        Ok(read(path.with_context(|| format!("there is no unit {name}"))?))
    };
    let has = |unit: &str, line: &str| unit.lines().any(|it| it == line);
    let worker = unit("pgmuster-worker")?;
    let limit = worker.lines().find_map(|line| line.strip_prefix("TimeoutStopSec="));
    let limit: u64 = limit.context("the worker has a time to end")?.parse()?;
    ensure!(limit > worker::ENDS_WITHIN.as_secs(), "{limit} s");
    // A signal to the whole group would end pg_dump and the servers of sandboxes under a running job.
    ensure!(has(&worker, "KillMode=mixed"), "{worker}");
    let sample = read(&root().join("deploy/config/worker.toml"));
    let config: worker::config::WorkerConfig = toml::from_str(&sample)?;
    for directory in [config.state_dir, config.sandbox.directory] {
        let name = directory.as_str().strip_prefix("/var/lib/").context("it is below /var/lib")?;
        let made = worker.lines().find_map(|line| line.strip_prefix("StateDirectory="));
        ensure!(made.is_some_and(|made| made.split(' ').any(|one| one == name)), "{directory}");
    }
    let coordinator = unit("pgmuster-coordinator")?;
    let sample = read(&root().join("deploy/config/coordinator.toml"));
    let config: coordinator::config::Config = toml::from_str(&sample)?;
    let catalog = "sqlite:/var/lib/pgmuster/coordinator/";
    ensure!(config.catalog.url.starts_with(catalog), "{}", config.catalog.url);
    ensure!(has(&coordinator, "StateDirectory=pgmuster/coordinator"), "{coordinator}");
    Ok(())
}

/// A setting that the program has, with its default if need be, must stand in the sample.
fn same_keys(sample: &str, parsed: &toml::Value) -> anyhow::Result<()> {
    fn keys(prefix: &str, value: &toml::Value, into: &mut BTreeSet<String>) {
        match value {
            toml::Value::Table(table) => {
                table.iter().for_each(|(key, value)| keys(&format!("{prefix}.{key}"), value, into));
            }
            toml::Value::Array(items) => items.iter().for_each(|item| keys(prefix, item, into)),
            _ => drop(into.insert(prefix.to_owned())),
        }
    }
    let (mut shown, mut known) = (BTreeSet::new(), BTreeSet::new());
    keys("", &toml::from_str(sample)?, &mut shown);
    keys("", parsed, &mut known);
    assert_eq!(shown, known, "left: the keys of the sample; right: the settings there are");
    Ok(())
}

#[test]
fn the_format_names_every_field_of_a_stored_proof_and_of_what_a_backup_read_and_counted() {
    // Everything that may be absent is there. Whoever adds a field has to put it in here, because the structs are written out.
    let proof = serde_json::to_value(whole_proof()).expect("a proof is JSON");
    let reading = serde_json::to_value(whole_reading()).expect("it is JSON");
    let census = serde_json::to_value(whole_census()).expect("it is JSON");
    let format = read(&root().join("repository/FORMAT.md"));
    let mut missing = Vec::new();
    for (of, value) in [("", &proof), ("reading.", &reading), ("census.", &census)] {
        let fields = value.as_object().expect("it is an object");
        let is_named = |name: &str| format.contains(&format!("`{name}`"));
        missing
            .extend(fields.keys().map(|key| format!("{of}{key}")).filter(|field| !is_named(field)));
        let mut inner = BTreeSet::new();
        fields.values().for_each(|field| keys_of(field, &mut inner));
        missing.extend(inner.into_iter().filter(|key| !is_named(key)));
    }
    none("repository/FORMAT.md does not name these fields", &missing);
}

fn keys_of(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            into.insert(key.clone());
            keys_of(value, into);
        }),
        Value::Array(items) => items.iter().for_each(|item| keys_of(item, into)),
        _ => {}
    }
}

fn whole_proof() -> proto::Proof {
    use proto::proof::{
        BrokenWal, CheckOutcome, Phase, ProofAssertion, ProofCheck, ProofLevel, ProofRecovery,
    };
    use proto::{BackupId, BackupKind, LineageId, Lsn, Proof, SystemIdentifier, Timeline};
    let text = || "text".to_owned();
    let (name, at, timeline) = (text(), Lsn(1), Timeline(1));
    let outcome = CheckOutcome::Passed;
    let level = ProofLevel::L5;
    Proof {
        backup: BackupId::mint(1, [1; 10]),
        kind: BackupKind::Logical,
        lineage: LineageId::mint(1, [1; 10]),
        cluster: "orders".parse().expect("it is a name"),
        system_identifier: SystemIdentifier(1),
        worker: "w1".parse().expect("it is a name"),
        at_ms: 1,
        level_asked: level,
        level_reached: Some(level),
        passed: true,
        server_version_num: Some(150_018),
        reached_lsn: Some(at),
        phases: vec![Phase { name: text(), duration_ms: 1, counts_as_recovery: true }],
        size_bytes: 1,
        tables: 1,
        rows: 1,
        tables_exact: 1,
        tables_bounded: 0,
        checks: vec![ProofCheck { name, level, outcome, detail: text() }],
        isolation: text(),
        recovery: Some(ProofRecovery {
            target: text(),
            timeline,
            reached_lsn: at,
            last_commit: Some("1970-01-01T00:00:00Z".parse().expect("it is a time")),
            evidence: text(),
            replayed_bytes: 1,
        }),
        broken_wal: Some(BrokenWal { target: text(), timeline, from: at, to: at }),
        heartbeat_at_ms: Some(1),
        assertions: Some(vec![ProofAssertion {
            name: text(),
            database: "shop".parse().expect("it is a name"),
            outcome,
            answer: text(),
            duration_ms: 1,
        }]),
        lacks: vec![text()],
    }
}

fn whole_reading() -> proto::backup::Reading {
    use proto::backup::{Reading, SilentChanges, SummariesUsed};
    Reading {
        server_started_at_ms: 1,
        read_bytes: 1,
        unread_bytes: 1,
        summaries: Some(SummariesUsed { since: proto::Lsn(1), count: 1 }),
        whole_files: Some("text".to_owned()),
        silent_changes: Some(SilentChanges { units: 1, files: vec!["base/5/16384".to_owned()] }),
    }
}

fn whole_census() -> proto::backup::Census {
    use proto::backup::{Census, CountedFile, DatabaseCensus, Forbidden, TableCount};
    let text = || "text".to_owned();
    let file = CountedFile { path: text(), size_bytes: 1, counted_at_ms: 1 };
    Census {
        canary: Some(text()),
        databases: vec![DatabaseCensus {
            database: "shop".parse().expect("it is a name"),
            collation: text(),
            extensions: vec![text()],
            relations: vec![('r', 1)],
            tables: vec![TableCount {
                schema: text(),
                table: text(),
                rows: Some(1),
                drift: Some((0, 0)),
                file: Some(file),
            }],
        }],
        unseen: vec![text()],
        forbidden: Some(Forbidden { role: text(), tables: 1, first: text() }),
    }
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut broken = Vec::new();
    for path in files(".md") {
        let folder = path.parent().expect("a file has a folder");
        for link in read(&path).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            if !file.is_empty() && !link.contains("://") && !folder.join(file).exists() {
                broken.push(format!("{}: {link}", shown(&path)));
            }
        }
    }
    none("these links lead nowhere", &broken);
}

/// Commands that work on a repository, and need to be told which.
const OF_A_REPOSITORY: [&str; 6] = [
    "`pgmuster repo list",
    "`pgmuster repo gc",
    "`pgmuster repo check",
    "`pgmuster repo key",
    "`pgmuster repo delete",
    "`pgmuster repo undelete",
];

#[test]
fn commands_in_hints_name_their_repository() {
    let mut halves = Vec::new();
    for path in files(".rs").iter().filter(|path| !shown(path).contains("tests")) {
        let text = read(path);
        // What tests expect is what was filled in.
        let said = text.split("#[cfg(test)]").next().unwrap_or_default();
        for line in said.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for command in OF_A_REPOSITORY {
                // What is behind it belongs to it up to the next mark, or goes on in the next line.
                let rest = line.split(command).nth(1).and_then(|rest| rest.split_once('`'));
                if rest.is_some_and(|(rest, _)| !(rest.contains("URL") || rest.contains('{'))) {
                    halves.push(format!("{}: {}", shown(path), line.trim()));
                }
            }
        }
    }
    none("these commands cannot be pasted: they name no `URL --key FILE`", &halves);
}

#[test]
fn fault_matrix_names_tests_that_exist() {
    let matrix = read(&root().join("docs/fault-matrix.md"));
    let (promised, open) = matrix.split_once("\n## Open").expect("it ends with what is open");
    let sources: Vec<(Vec<String>, String)> =
        files(".rs").iter().map(|path| (modules_of(path), read(path))).collect();
    let mut wrong = Vec::new();
    let rows = promised.lines().filter(|line| line.starts_with("| ") && *line != HEAD_OF_FAULTS);
    for row in rows {
        let names = row.strip_suffix(" |").and_then(|row| row.rsplit_once(" | "));
        for name in names.map(|(_, names)| names).unwrap_or_default().split(", ") {
            let test = name.strip_prefix('`').and_then(|name| name.strip_suffix('`'));
            let is_right = test.is_some_and(|test| is_there(test, &sources));
            if !is_right {
                wrong.push(format!("{name:?} in: {row}"));
            }
        }
    }
    none("docs/fault-matrix.md names tests that are not where it says", &wrong);
    let named: Vec<String> =
        open.lines().filter(|line| line.contains("::")).map(str::to_owned).collect();
    none("what is open has no test yet", &named);
}

/// No build looks at the targets of libFuzzer, which need a nightly compiler.
#[test]
fn fuzz_targets_are_the_parsers_that_the_suite_tries() -> anyhow::Result<()> {
    let folder = root().join("repository/fuzz");
    let parsers = read(&root().join("repository/src/fuzzing/mod.rs"));
    let (_, tried) = parsers.split_once("const TARGETS: ").context("the suite has a list")?;
    let (tried, _) = tried.split_once("];").context("it has an end")?;
    let (_, tried) = tried.split_once("= [").context("it has a beginning")?;
    let tried: BTreeMap<&str, &str> = tried
        .split("),")
        .filter_map(|target| target.trim().strip_prefix("(\"")?.split_once("\", "))
        .collect();
    assert!(tried.len() > 5, "the list has been read: {tried:?}");
    let mut wrong = Vec::new();
    for (name, parser) in &tried {
        if name != parser || !parsers.contains(&format!("pub fn {parser}(data: &[u8]) -> bool {{"))
        {
            wrong.push(format!("{name} tries {parser}"));
        }
        let target = read(&folder.join(format!("fuzz_targets/{name}.rs")));
        let call =
            format!("fuzz_target!(|data: &[u8]| {{\n    repository::fuzzing::{name}(data);\n}});");
        if !target.contains(&call) {
            wrong.push(format!("fuzz_targets/{name}.rs calls another parser"));
        }
    }
    none("these are not what they are called", &wrong);
    let names: BTreeSet<String> = tried.keys().map(|&name| name.into()).collect();
    let sources =
        files(".rs").into_iter().filter(|path| path.starts_with(folder.join("fuzz_targets")));
    assert_eq!(sources.map(|path| stem(&path)).collect::<BTreeSet<_>>(), names, "fuzz_targets/");
    let manifest: toml::Table = toml::from_str(&read(&folder.join("Cargo.toml")))?;
    let built = manifest["bin"].as_array().context("Cargo.toml has targets")?;
    for target in built {
        let (name, path) = (target["name"].as_str(), target["path"].as_str());
        let expected = name.map(|name| format!("fuzz_targets/{name}.rs"));
        assert_eq!(path, expected.as_deref(), "the path of a target in Cargo.toml");
    }
    let built = built.iter().filter_map(|target| target["name"].as_str().map(str::to_owned));
    assert_eq!(built.collect::<BTreeSet<_>>(), names, "the targets in Cargo.toml");
    let told = read(&root().join("docs/testing.md"));
    let (_, told) = told.split_once("\n## Fuzzing\n").context("docs/testing.md tells of them")?;
    let (told, _) = told.split_once("Each takes any bytes").context("it lists them")?;
    let told = told.split('`').skip(3).step_by(2).map(str::to_owned);
    assert_eq!(told.collect::<BTreeSet<_>>(), names, "the targets in docs/testing.md");
    Ok(())
}

/// The first row of each table of faults.
const HEAD_OF_FAULTS: &str = "| fault | what must happen | test |";

/// The crate of a source, and the modules that its path tells: `tests/tests/wal_archive/service.rs` is `tests::wal_archive::service`.
fn modules_of(path: &Path) -> Vec<String> {
    let path = path.strip_prefix(root()).unwrap_or(path).with_extension("");
    let mut parts: Vec<String> =
        path.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    if parts.len() > 1 {
        parts.remove(1);
    }
    if parts.last().is_some_and(|last| ["lib", "main", "mod", "tests"].contains(&last.as_str())) {
        parts.pop();
    }
    parts
}

/// Whether a source of the crate that is named, in the file or below the directory that is named, has a function that is so called.
fn is_there(test: &str, sources: &[(Vec<String>, String)]) -> bool {
    let mut place: Vec<&str> = test.split("::").collect();
    let (Some(name), false) = (place.pop(), place.is_empty()) else { return false };
    let (its_crate, modules) = (place[0], &place[1..]);
    let function = format!("fn {name}(");
    sources.iter().any(|(parts, text)| {
        let below = parts.get(1..).unwrap_or_default();
        let is_named = modules.is_empty() || below.windows(modules.len()).any(|at| at == modules);
        parts.first().is_some_and(|first| first == its_crate)
            && is_named
            && text.contains(&function)
    })
}

#[test]
fn a_test_is_found_under_its_crate_and_its_file_and_nowhere_else() {
    let sources: Vec<(Vec<String>, String)> =
        files(".rs").iter().map(|path| (modules_of(path), read(path))).collect();
    let it = "a_test_is_found_under_its_crate_and_its_file_and_nowhere_else";
    assert!(is_there(&format!("tests::house::{it}"), &sources));
    for place in ["worker::house", "tests::crashes", "tests::house::inner"] {
        assert!(!is_there(&format!("{place}::{it}"), &sources), "{place}");
    }
    assert!(!is_there(it, &sources) && !is_there(&format!("tests::house::{it}_at_all"), &sources));
}
