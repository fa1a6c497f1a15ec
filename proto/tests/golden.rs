//! The wire format, held still: each message of schema 1 as it was first sent. A golden file may never change; a new
//! field gets a new file, and the old ones must parse for ever.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;

use proto::backup::{Forbidden, SilentChanges, SkippedDatabase};
use proto::copies::{CopiedBackup, Copies};
use proto::envelope::{Certificate, SigningKey};
use proto::job::{
    Analyze, AnalyzeOutcome, Backup, BackupOutcome, EnableWal, EnableWalOutcome, LogicalOutcome,
    LostWal, PgDump, Probe, ProbeOutcome, ProofTarget, Reached, RecoveryOutcome, Restore,
    RestoreOutcome, RestoreTarget, SeenSegment, SeenVerdict, SkippedTable, Vacuum, VacuumOutcome,
    VacuumedTable, VerifyRestore, VerifyRestoreOutcome,
};
use proto::message::{
    ArchiveSetup, Beacon, Cancel, Claim, ClaimMessage, ClusterOffer, Control, Decline,
    DeclineReason, Denial, DenialReason, Grant, HeartbeatSetup, Holdings, Nonce, Offers, Pulse,
    Report, ReportBody, RepositoryAway, RepositoryLook, RepositoryOffer, Revoked, RunningAttempt,
    Slots, Spec, Ticket, WalAncestor, WalBacklog, WalConflict, WalEnd, WalGap, WalStanding,
    WalWaiting,
};
use proto::proof::{BrokenWal, CheckOutcome, Phase, ProofAssertion, ProofCheck};
use proto::{
    Action, ArchivedHeartbeats, AttemptId, BackupId, BootId, ClusterHeartbeat, Code, Failure,
    Heartbeat, JobId, JobKind, Lane, LineageId, Lsn, Outcome, Progress, Proof, ProofLevel,
    Recovery, RecoveryTarget, RepositoryId, Step, SystemIdentifier, TargetAction, Task, Timeline,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Compares with the golden file, both ways. `PGMUSTER_WRITE_GOLDEN=1` writes files that are not there yet; nothing
/// ever overwrites one.
fn golden<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, sample: &T) {
    let path = directory().join(format!("{name}.json"));
    #[expect(clippy::disallowed_methods, reason = "a switch of this test only")]
    let write = std::env::var("PGMUSTER_WRITE_GOLDEN").is_ok();
    if write && !path.exists() {
        std::fs::write(&path, serde_json::to_string_pretty(sample).unwrap() + "\n").unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(serde_json::from_str::<T>(&text).unwrap(), *sample, "{name} is read differently");
    let file: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(serde_json::to_value(sample).unwrap(), file, "{name} is written differently");
}

fn job() -> JobId {
    JobId::mint(1_700_000_000_000, [1; 10])
}
fn attempt() -> AttemptId {
    AttemptId::mint(1_700_000_000_001, [2; 10])
}
fn backup_id() -> BackupId {
    attempt().into()
}
fn boot() -> BootId {
    BootId::mint(1_700_000_000_002, [3; 10])
}
fn lineage() -> LineageId {
    LineageId::mint(1_700_000_000_003, [4; 10])
}
fn nonce() -> Nonce {
    Nonce("00112233445566778899aabbccddeeff".to_owned())
}
const SYSTEM: SystemIdentifier = SystemIdentifier(7_300_000_000_000_000_001);

fn spec(task: Task) -> Spec {
    Spec {
        schema: 1,
        job: job(),
        attempt: attempt(),
        predecessor: Some(AttemptId::mint(1_699_999_999_999, [9; 10])),
        cluster: "orders".parse().unwrap(),
        system_identifier: Some(SYSTEM),
        task,
        deadline_ms: 3_600_000,
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
    }
}

fn proof() -> Proof {
    let worker = "w1".parse().unwrap();
    let cluster = "orders".parse().unwrap();
    Proof {
        at_ms: 1_700_000_100_000,
        server_version_num: Some(150_018),
        reached_lsn: Some(Lsn(0x0300_0100)),
        phases: vec![Phase {
            name: "restore".to_owned(),
            duration_ms: 1_234,
            counts_as_recovery: true,
        }],
        size_bytes: 31_000_000,
        tables: 14,
        rows: 1_600_014,
        tables_exact: 13,
        tables_bounded: 1,
        checks: vec![ProofCheck {
            name: "row_counts".to_owned(),
            level: ProofLevel::L5,
            outcome: CheckOutcome::Passed,
            detail: "14 tables".to_owned(),
        }],
        isolation: "network namespace".to_owned(),
        ..Proof::of(backup_id(), lineage(), cluster, SYSTEM, worker, ProofLevel::L5).reached()
    }
}

fn failure() -> Failure {
    Failure::new(Code::PermissionDenied, Action::FixConfig, "role b may not start a backup")
        .with_hint("GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean) TO b;")
}

fn step() -> Step {
    Step {
        number: 3,
        name: "copy".to_owned(),
        span_id: "b7ad6b7169203331".to_owned(),
        started_at_ms: 1_700_000_000_100,
        ended_at_ms: Some(1_700_000_000_900),
        failed: false,
        figures: BTreeMap::from([("read_bytes".to_owned(), 31_000_000)]),
    }
}

fn report(body: ReportBody) -> Report {
    Report {
        schema: 1,
        job: job(),
        attempt: attempt(),
        token: 42,
        worker: "w1".parse().unwrap(),
        boot: boot(),
        seq: 7,
        at_ms: 1_700_000_000_950,
        body,
    }
}

#[test]
fn specs_of_every_kind() {
    let target = RestoreTarget {
        root: "/srv/restore".to_owned(),
        directory: "orders/drill".parse().unwrap(),
    };
    let tasks = [
        Task::Backup(Backup {
            fast_checkpoint: true,
            full_read: false,
            compression_level: Some(3),
            ..Backup::default()
        }),
        Task::VerifyRestore(VerifyRestore {
            backup: Some(backup_id()),
            level: ProofLevel::L5,
            to: None,
            heartbeats: None,
        }),
        Task::Restore(Restore { plan_only: true, ..Restore::at(target) }),
        Task::Analyze(Analyze {
            databases: Some(vec!["shop \"x\"".parse().unwrap()]),
            ..Analyze::default()
        }),
        Task::Vacuum(Vacuum::default()),
        Task::Probe(Probe { attempt: attempt(), terminate: true }),
        Task::EnableWal(EnableWal { replace: true, ..EnableWal::default() }),
    ];
    for task in tasks {
        let kind = task.kind();
        golden(&format!("spec.{kind}"), &spec(task));
    }
    let target = RestoreTarget { root: "/".to_owned(), directory: "data".parse().unwrap() };
    let plain = Restore::at(target);
    let delta = Restore { backup: Some(backup_id()), delta: true, ..plain.clone() };
    golden("spec.restore.delta", &spec(Task::Restore(delta)));
    let tablespaces = [(16_390, "/srv/fast", "orders/shelf"), (24_577, "/srv/restore", "heap")];
    let tablespaces = tablespaces.map(|(oid, root, directory)| {
        (oid, RestoreTarget { root: root.to_owned(), directory: directory.parse().unwrap() })
    });
    let placed = Restore { tablespaces: tablespaces.into(), ..plain.clone() };
    golden("spec.restore.tablespaces", &spec(Task::Restore(placed)));
    let to = RecoveryTarget::Time("2026-11-27T08:30:00.123456Z".parse().unwrap());
    let recovery = Recovery {
        timeline: Some(Timeline(10)),
        before: true,
        action: TargetAction::Pause,
        start: true,
        ..Recovery::to(to)
    };
    let moment = Restore { recovery: Some(recovery), ..plain };
    golden("spec.restore.moment", &spec(Task::Restore(moment.clone())));
    let recovery = moment.recovery.map(|recovery| Recovery { port: Some(5433), ..recovery });
    golden("spec.restore.port", &spec(Task::Restore(Restore { recovery, ..moment })));
}

#[test]
fn a_backup_that_takes_less_of_the_server() {
    let task = Task::Backup(Backup {
        processes: Some(2),
        rate_limit_bytes: Some(50 << 20),
        ..Backup::default()
    });
    golden("spec.backup.gentle", &spec(task));
}

#[test]
fn a_logical_backup_and_its_outcome() {
    let pg_dump = PgDump {
        databases: vec!["shop*".parse().unwrap(), "a \"b\"".parse().unwrap()],
        exclude: vec!["*_test".parse().unwrap()],
    };
    let task = Task::Backup(Backup { pg_dump: Some(pg_dump), ..Backup::default() });
    golden("spec.backup.pg_dump", &spec(task));
    let skipped = SkippedDatabase {
        database: "template0".parse().unwrap(),
        why: "it allows no connections".to_owned(),
    };
    let outcome = BackupOutcome {
        logical: Some(LogicalOutcome {
            client_version_num: 150_019,
            databases: 3,
            role_passwords: false,
            left_out: None,
            skipped: vec![skipped],
            failed: Vec::new(),
        }),
        ..backup_outcome()
    };
    golden("outcome.backup.pg_dump", &Outcome::Backup(outcome));
    let outcome = BackupOutcome { wal_to: Some(Lsn(0x0300_0000)), ..backup_outcome() };
    golden("outcome.backup.wal_to", &Outcome::Backup(outcome));
    let outcome = BackupOutcome { taken_over_bytes: 1_200_000, ..backup_outcome() };
    golden("outcome.backup.taken_over", &Outcome::Backup(outcome));
    let (reread_bytes, reread_by_ms) = (310_000, Some(2_592_000_001));
    let outcome = BackupOutcome { reread_bytes, reread_by_ms, ..backup_outcome() };
    golden("outcome.backup.reread", &Outcome::Backup(outcome));
    let changed_files = Some("read by pages, told by 12 WAL summaries since 0/1000028".to_owned());
    let outcome = BackupOutcome { changed_files, ..backup_outcome() };
    golden("outcome.backup.changed_files", &Outcome::Backup(outcome));
    let files = vec!["base/5/16384".to_owned(), "base/5/2619".to_owned()];
    let silent_changes = Some(SilentChanges { units: 3, files });
    let outcome = BackupOutcome { silent_changes, ..backup_outcome() };
    golden("outcome.backup.silent_changes", &Outcome::Backup(outcome));
    let first = "public.orders in shop".to_owned();
    let forbidden = Some(Forbidden { role: "backup".to_owned(), tables: 12, first });
    let outcome = BackupOutcome { forbidden, ..backup_outcome() };
    golden("outcome.backup.forbidden", &Outcome::Backup(outcome));
}

#[test]
fn a_field_this_version_does_not_know_is_refused_in_a_job_and_ignored_in_a_report() {
    let mut value = serde_json::to_value(spec(Task::Backup(Backup::default()))).unwrap();
    value["task"]["backup"]["upside_down"] = true.into();
    assert!(serde_json::from_value::<Spec>(value).is_err());
    let mut value = serde_json::to_value(report(ReportBody::Started)).unwrap();
    value["mood"] = "fine".into();
    assert!(serde_json::from_value::<Report>(value).is_ok());
}

fn backup_outcome() -> BackupOutcome {
    BackupOutcome {
        backup: backup_id(),
        lineage: lineage(),
        repository: "s3://bucket/prefix".to_owned(),
        system_identifier: SYSTEM,
        server_version_num: 150_018,
        timeline: Timeline(1),
        start_lsn: Lsn(0x0200_0028),
        stop_lsn: Lsn(0x0200_0100),
        wal_to: None,
        started_at_ms: 1,
        stopped_at_ms: 2,
        holds_to_ms: None,
        ended_at_ms: None,
        files: 1_000,
        size_bytes: 31_000_000,
        read_bytes: 31_000_000,
        stored_bytes: 4_000_000,
        taken_over_bytes: 0,
        reread_bytes: 0,
        reread_by_ms: None,
        wal_bytes: 16_777_216,
        bad_pages: 0,
        silent_changes: None,
        forbidden: None,
        compared_with: None,
        changed_files: None,
        logical: None,
    }
}

#[test]
fn outcomes_of_every_kind() {
    let database: proto::DatabaseName = "shop".parse().unwrap();
    let skipped = SkippedTable {
        database: database.clone(),
        table: "public.\"Odd\"".to_owned(),
        reason: "locked".to_owned(),
    };
    let restored = RestoreOutcome {
        backup: backup_id(),
        directory: "/srv/restore/orders/drill".to_owned(),
        files: 1_000,
        size_bytes: 31_000_000,
        wal_files: 0,
        wal_bytes: 0,
        fetched_bytes: 4_000_000,
        reused_bytes: 0,
        stop_lsn: Lsn(0x0200_0100),
        planned_only: false,
        plan: vec![],
        recovery: None,
        archiving_stopped: false,
        settings_apart: None,
    };
    let with_wal = RestoreOutcome { wal_files: 1, wal_bytes: 16_777_216, ..restored.clone() };
    golden("outcome.restore.wal", &Outcome::Restore(with_wal));
    let outcomes = [
        Outcome::Backup(backup_outcome()),
        Outcome::VerifyRestore(VerifyRestoreOutcome { proof: proof() }),
        Outcome::Restore(restored.clone()),
        Outcome::Analyze(AnalyzeOutcome {
            databases: 1,
            analyzed: 12,
            skipped: vec![skipped.clone()],
            plan: vec![],
        }),
        Outcome::Vacuum(VacuumOutcome {
            databases: 1,
            vacuumed: vec![VacuumedTable {
                database,
                table: "public.t".to_owned(),
                bloat_ratio: 2.5,
                dead_rows_before: 100,
                dead_rows_after: 0,
                size_before_bytes: 81_920,
                size_after_bytes: 81_920,
            }],
            skipped: vec![skipped],
            plan: vec![],
        }),
        Outcome::Probe(ProbeOutcome {
            sessions: Some(0),
            terminated: 0,
            verdict: Some(SeenVerdict::Open),
        }),
        Outcome::EnableWal(EnableWalOutcome {
            planned_only: false,
            plan: vec!["set archive_timeout = '600'".to_owned()],
            restart_for: vec!["archive_mode".to_owned()],
            seen: Some(SeenSegment {
                segment: "0000000A0000000100000002".parse().unwrap(),
                lineage: lineage(),
                after_ms: 812,
            }),
            lost: Some(LostWal {
                first: "0000000A0000000000000009".parse().unwrap(),
                last: "0000000A0000000100000001".parse().unwrap(),
                segments: 249,
                backup: backup_id(),
                recoverable_to_ms: Some(1_700_000_000_000),
            }),
        }),
    ];
    let names = JobKind::ALL.iter().map(|kind| kind.as_str());
    for (name, outcome) in names.zip(outcomes) {
        golden(&format!("outcome.{name}"), &outcome);
    }
    let reached = Reached {
        state: "open on timeline 11".to_owned(),
        lsn: Lsn(0x0500_0100),
        last_commit: Some("2026-11-27T08:29:59.9Z".parse().unwrap()),
        timeline: Timeline(11),
        evidence: "recovery stopping before commit of transaction 740".to_owned(),
        duration_ms: 2_345,
        stays_down: false,
    };
    let recovery = RecoveryOutcome {
        target: "2026-11-27T08:30:00Z".to_owned(),
        timeline: Timeline(10),
        segments: 3,
        wal_bytes: 50_331_648,
        recoverable_to: Lsn(0x0600_0000),
        recoverable_to_time: Some("2026-11-27T08:55:00Z".parse().unwrap()),
        reached: Some(reached),
    };
    golden("outcome.restore.moment", &recovery);
    let reached = recovery.reached.clone().map(|reached| Reached { stays_down: true, ..reached });
    let down = RestoreOutcome {
        recovery: Some(RecoveryOutcome { reached, ..recovery }),
        settings_apart: Some("/srv/restore/orders/drill/pgmuster_external".to_owned()),
        ..restored
    };
    golden("outcome.restore.down", &down);
}

#[test]
fn the_conversation() {
    golden(
        "ticket",
        &Ticket {
            schema: 1,
            job: job(),
            attempt: attempt(),
            kind: JobKind::Backup,
            lane: Lane::Urgent,
            cluster: "orders".parse().unwrap(),
            not_after_ms: 1_700_000_060_000,
        },
    );
    golden(
        "claim",
        &ClaimMessage::Claim(Claim {
            schema: 1,
            job: job(),
            attempt: attempt(),
            worker: "w1".parse().unwrap(),
            boot: boot(),
            nonce: nonce(),
        }),
    );
    golden(
        "decline",
        &ClaimMessage::Decline(Decline {
            schema: 1,
            job: job(),
            attempt: attempt(),
            worker: "w1".parse().unwrap(),
            boot: boot(),
            reason: DeclineReason::Busy,
            detail: "no slot".to_owned(),
        }),
    );
    golden(
        "grant",
        &Control::Grant(Box::new(Grant {
            schema: 1,
            attempt: attempt(),
            worker: "w1".parse().unwrap(),
            boot: boot(),
            nonce: nonce(),
            token: 42,
            lease_ms: 30_000,
            spec: serde_json::to_value(spec(Task::Backup(Backup::default()))).unwrap(),
        })),
    );
    golden(
        "denial",
        &Control::Denial(Denial {
            schema: 1,
            attempt: attempt(),
            worker: "w1".parse().unwrap(),
            boot: boot(),
            nonce: nonce(),
            reason: DenialReason::Taken,
        }),
    );
    golden("cancel", &Control::Cancel(Cancel { schema: 1, attempt: attempt(), token: 42 }));
    golden(
        "beacon",
        &Beacon {
            schema: 1,
            epoch: 3,
            boot: boot(),
            at_ms: 1_700_000_000_000,
            revoked: vec![Revoked { attempt: attempt(), token: 42 }],
        },
    );
    golden("report.started", &report(ReportBody::Started));
    golden("report.step", &report(ReportBody::Step(step())));
    golden(
        "report.failed",
        &report(ReportBody::Failed { failure: failure(), outcome: None, steps: vec![step()] }),
    );
    golden(
        "report.succeeded",
        &report(ReportBody::Succeeded {
            outcome: Box::new(Outcome::Analyze(AnalyzeOutcome::default())),
            steps: vec![step()],
        }),
    );
    golden(
        "pulse",
        &Pulse {
            schema: 1,
            worker: "w1".parse().unwrap(),
            site: "fra1".parse().unwrap(),
            boot: boot(),
            seq: 9,
            at_ms: 1_700_000_000_000,
            every_ms: 3_000,
            slots: Slots { urgent_free: 1, routine_free: 2 },
            draining: false,
            running: vec![RunningAttempt {
                attempt: attempt(),
                token: 42,
                progress: Some(Progress {
                    step: "copy".to_owned(),
                    done: 1,
                    total: Some(2),
                    unit: "bytes".to_owned(),
                }),
            }],
            offers: Some(Offers {
                version: "0.1.0".to_owned(),
                kinds: JobKind::ALL[..6].to_vec(),
                clusters: vec![ClusterOffer {
                    name: "orders".parse().unwrap(),
                    labels: BTreeMap::from([("tier".to_owned(), "gold".to_owned())]),
                    repository: Some("main".to_owned()),
                    system_identifier: Some(SYSTEM),
                    server_version_num: Some(150_018),
                    files: true,
                    remote: false,
                    problem: Some(failure()),
                    archive: None,
                    repository_away: None,
                    repository_look: None,
                    heartbeat: None,
                    assertions: false,
                    reads_little: None,
                }],
                repositories: vec![RepositoryOffer {
                    name: "main".to_owned(),
                    location: "s3://bucket/prefix".to_owned(),
                }],
                restore_roots: vec!["/srv/restore".to_owned()],
                postgres_majors: vec![15, 18],
            }),
            wal: Vec::new(),
            holdings: Vec::new(),
            heartbeats: Vec::new(),
        },
    );
    golden(
        "pulse.wal",
        &Pulse {
            schema: 1,
            worker: "w1".parse().unwrap(),
            site: "fra1".parse().unwrap(),
            boot: boot(),
            seq: 10,
            at_ms: 1_700_000_000_000,
            every_ms: 3_000,
            slots: Slots { urgent_free: 1, routine_free: 2 },
            draining: false,
            running: Vec::new(),
            offers: None,
            wal: vec![WalStanding {
                cluster: "orders".parse().unwrap(),
                lineage: lineage(),
                at_ms: 1_700_000_000_000,
                timeline: Timeline(10),
                ancestors: vec![WalAncestor {
                    timeline: Timeline(1),
                    left_at: Lsn(0x15_0000_0148),
                }],
                server_lsn: Lsn(0x16_B374_D848),
                line_from: Lsn(0x16_0000_0000),
                archived_to: Lsn(0x16_B300_0000),
                safe_at_ms: Some(1_699_999_940_000),
                waiting: Some(WalWaiting {
                    segment: "0000000A00000016000000B3".parse().unwrap(),
                    since_ms: 1_699_999_970_000,
                    segments: 1,
                }),
                gap: Some("0000000A0000001500000000".parse().unwrap()),
                gaps: vec![WalGap {
                    segment: "0000000A0000001500000000".parse().unwrap(),
                    segment_bytes: 16 << 20,
                    line_from: Lsn(0x14_0000_0000),
                    from: Lsn(0x15_0000_0000),
                    to: Lsn(0x16_0000_0000),
                    last_end: Some(WalEnd { at: Lsn(0x14_FF12_3448), at_ms: 1_699_990_000_000 }),
                }],
                conflict: None,
            }],
            holdings: Vec::new(),
            heartbeats: Vec::new(),
        },
    );
    golden(
        "pulse.heartbeat",
        &Pulse {
            schema: 1,
            worker: "w1".parse().unwrap(),
            site: "fra1".parse().unwrap(),
            boot: boot(),
            seq: 11,
            at_ms: 1_700_000_000_000,
            every_ms: 3_000,
            slots: Slots { urgent_free: 1, routine_free: 2 },
            draining: false,
            running: Vec::new(),
            offers: None,
            wal: Vec::new(),
            holdings: Vec::new(),
            heartbeats: vec![ClusterHeartbeat {
                cluster: "orders".parse().unwrap(),
                heartbeat: heartbeat(),
            }],
        },
    );
}

fn heartbeat() -> Heartbeat {
    Heartbeat {
        system_identifier: SYSTEM,
        timeline: Timeline(10),
        transaction: 4_294_968_036,
        begun_lsn: Lsn(0x16_B374_D848),
        ended_lsn: Lsn(0x16_B374_D8D0),
        begun_at_ms: 1_699_999_990_000,
        ended_at_ms: 1_699_999_990_004,
    }
}

#[test]
fn a_proof_is_told_which_heartbeats_there_were_and_tells_which_it_saw() {
    let task = VerifyRestore {
        backup: None,
        level: ProofLevel::L4,
        to: Some(ProofTarget::At(RecoveryTarget::Latest)),
        heartbeats: Some(ArchivedHeartbeats { lineage: lineage(), known: vec![heartbeat()] }),
    };
    golden("spec.verify_restore.heartbeat", &spec(Task::VerifyRestore(task)));
    let seen = Proof { heartbeat_at_ms: Some(1_699_999_990_000), ..proof() };
    golden("proof.heartbeat", &seen);
}

#[test]
fn a_proof_of_what_a_worker_asserts() {
    let level = ProofLevel::L6;
    let task = VerifyRestore { backup: Some(backup_id()), level, to: None, heartbeats: None };
    golden("spec.verify_restore.assertions", &spec(Task::VerifyRestore(task)));
    let assertion = |name: &str, outcome, answer: &str, duration_ms| ProofAssertion {
        name: name.to_owned(),
        database: "shop".parse().unwrap(),
        outcome,
        answer: answer.to_owned(),
        duration_ms,
    };
    let holds = assertion("orders-are-whole", CheckOutcome::Passed, "true", 120);
    let fails = assertion("sums_match", CheckOutcome::Failed, "false", 1_300);
    let asked = |assertions| Proof { assertions: Some(assertions), ..proof() };
    let sound = asked(vec![holds.clone()]);
    assert_eq!((sound.asked(), sound.level()), (level, Some(level)));
    let failed = Proof { passed: false, ..asked(vec![holds, fails]) };
    assert_eq!((failed.level(), failed.found_wrong()), (Some(ProofLevel::L5), true));
    golden("proof.assertions", &failed);
}

#[test]
fn what_was_added_for_what_is_proved() {
    let from = Some(BackupId::mint(1_699_000_000_000, [7; 10]));
    let holdings = Holdings {
        cluster: "orders".parse().unwrap(),
        repository: "s3://bucket/prefix".to_owned(),
        system_identifier: SYSTEM,
        at_ms: 1_700_000_000_000,
        backups: vec![backup_id()],
        from,
        copies: None,
    };
    golden("holdings", &holdings);
    let copied = CopiedBackup {
        backup: backup_id(),
        copied_at_ms: 1_700_000_000_000,
        checked_at_ms: 1_700_086_400_000,
    };
    let copies = Copies {
        place: "s3://second/prefix?region=eu-north-1".to_owned(),
        repository: RepositoryId::mint(1_700_000_000_000, [5; 10]),
        by: "ops@desk".to_owned(),
        backups: vec![copied],
    };
    golden("holdings.copies", &holdings.with_copies(vec![copies]));
    let outcome = BackupOutcome { holds_to_ms: Some(1), ..backup_outcome() };
    golden("outcome.backup.holds_to", &Outcome::Backup(outcome));
    let logical = LogicalOutcome {
        client_version_num: 150_019,
        databases: 3,
        role_passwords: true,
        left_out: Some(2),
        skipped: Vec::new(),
        failed: Vec::new(),
    };
    let outcome = BackupOutcome { logical: Some(logical.clone()), ..backup_outcome() };
    golden("outcome.backup.left_out", &Outcome::Backup(outcome));
    let failed = SkippedDatabase {
        database: "shop".parse().unwrap(),
        why: "pg_dump of database shop ended with exit code 1: cache lookup failed".to_owned(),
    };
    let logical = LogicalOutcome { left_out: Some(1), failed: vec![failed], ..logical };
    let outcome = BackupOutcome { logical: Some(logical), ..backup_outcome() };
    golden("outcome.backup.failed_database", &Outcome::Backup(outcome));
    let broken = BrokenWal {
        target: "the end of the WAL".to_owned(),
        timeline: Timeline(10),
        from: Lsn(0x15_0000_0000),
        to: Lsn(0x15_0100_0000),
    };
    golden("proof.broken_wal", &Proof { broken_wal: Some(broken), ..proof() });
}

#[test]
fn what_keeps_wal_from_its_archive_is_told() {
    let segment = "0000000A00000016000000B3".parse().unwrap();
    let conflict = WalConflict { segment, at: Lsn(0x16_B300_0000), is_foreign: true };
    golden("standing.conflict", &conflict);
    let backlog =
        WalBacklog { segments: 12, since_ms: 1_700_000_000_000, pg_wal_bytes: 1_073_741_824 };
    golden("offer.backlog", &backlog);
}

#[test]
fn an_offer_says_how_files_are_read_how_wal_is_archived_and_that_a_repository_is_away() {
    let offer = ClusterOffer {
        name: "orders".parse().unwrap(),
        labels: BTreeMap::new(),
        repository: Some("main".to_owned()),
        system_identifier: Some(SYSTEM),
        server_version_num: Some(150_018),
        files: true,
        remote: true,
        problem: None,
        archive: None,
        repository_away: None,
        repository_look: None,
        heartbeat: None,
        assertions: false,
        reads_little: None,
    };
    golden("offer.remote", &offer);
    let archive = Some(ArchiveSetup {
        mode: "off".to_owned(),
        has_command: true,
        pending_restart: vec!["archive_mode".to_owned()],
        failing_at: Some("0000000A00000016000000B3".to_owned()),
        backlog: None,
    });
    golden("offer.archive", &ClusterOffer { archive, remote: false, ..offer.clone() });
    let away = RepositoryAway {
        place: "s3://backups/fleet".to_owned(),
        since_ms: 1_700_000_000_000,
        failure: Failure::new(Code::RepositoryMissing, Action::FixConfig, "failed to find it")
            .with_hint("Check the repository's URL."),
    };
    golden("offer.repository_away", &ClusterOffer { repository_away: Some(away), ..offer.clone() });
    let found = |lineages| Some(RepositoryLook::Found { lineages });
    for (name, repository_look) in [
        ("offer.repository_not_yet", Some(RepositoryLook::NotYet)),
        ("offer.repository_found", found(Some(vec![LineageId::mint(1, [3; 10])]))),
        ("offer.repository_found_for_nobody", found(None)),
        ("offer.repository_failed", Some(RepositoryLook::Failed)),
    ] {
        golden(name, &ClusterOffer { repository_look, ..offer.clone() });
    }
    let heartbeat = Some(HeartbeatSetup { every_s: 60, problem: Some(failure()) });
    golden("offer.heartbeat", &ClusterOffer { heartbeat, remote: false, ..offer.clone() });
    let assertions = ClusterOffer { assertions: true, remote: false, ..offer.clone() };
    golden("offer.assertions", &assertions);
    let reads_little = Some("backup".to_owned());
    golden("offer.reads_little", &ClusterOffer { reads_little, remote: false, ..offer });
}

#[test]
fn signed_bytes_are_the_same_for_ever() {
    let key = SigningKey::from_seed(&[7; 32]);
    let certificate = Certificate {
        worker: "w1".parse().unwrap(),
        site: "fra1".parse().unwrap(),
        key: SigningKey::from_seed(&[8; 32]).public(),
        issued_at_ms: 1_700_000_000_000,
    };
    let signed = key.sign(&certificate);
    golden("signed.certificate", &signed);
    assert_eq!(signed.verify(&key.public()).unwrap(), certificate);
    golden("proof", &proof());
}
