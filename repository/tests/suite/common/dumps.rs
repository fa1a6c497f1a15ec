//! Logical backups whose content is known: what `pg_dump` and `pg_dumpall` of PostgreSQL 15 wrote of a small server, twice, with
//! one row more the second time.

use std::io::{self, Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::backup::{
    Census, DatabaseCensus, DatabaseDump, LogicalFacts, SkippedDatabase, TableCount,
};
use proto::{AttemptId, BackupFacts, BackupKind, LineageId, SystemIdentifier};
use repository::{
    BackupSummary, Intent, Source, SourceEntry, SourceFile, WriteOptions, path_order,
};
use tokio_util::sync::CancellationToken;

use super::{Bench, NOW_MS, facts};

/// The files of such a backup, in the order of their paths.
pub const FILES: [&str; 3] = ["a%2Fb%20%C3%A9.dump", "globals.sql", "shop.dump"];
/// How many of them there are.
pub const DUMPS: std::ops::RangeInclusive<u32> = 1..=2;

fn content_of(dump: u32) -> PathBuf {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1-dump/content");
    golden.join(dump.to_string())
}

/// What the backup of this number has under a path.
pub fn content(dump: u32, path: &str) -> Vec<u8> {
    std::fs::read(content_of(dump).join(path)).unwrap()
}

/// What the backup of this number says of itself.
pub fn dump_facts(dump: u32) -> BackupFacts {
    let database = |name: &str, file: &str, server_bytes| DatabaseDump {
        database: name.parse().unwrap(),
        file: file.to_owned(),
        snapshot: format!("00000003-0000001B-{dump}"),
        encoding: "UTF8".to_owned(),
        collate: "C".to_owned(),
        ctype: "C".to_owned(),
        server_bytes,
        layout: None,
    };
    let census = |name: &str, relations: &[(char, u64)], tables: &[(&str, u64)]| DatabaseCensus {
        database: name.parse().unwrap(),
        collation: "c".to_owned(),
        extensions: vec!["plpgsql 1.0".to_owned()],
        relations: relations.to_vec(),
        tables: tables
            .iter()
            .map(|(table, rows)| TableCount {
                schema: "public".to_owned(),
                table: (*table).to_owned(),
                rows: Some(*rows),
                drift: Some((0, 0)),
                file: None,
            })
            .collect(),
    };
    let sales = [("sale_25", 1_550), ("sale_26", 1_449 + u64::from(dump))];
    BackupFacts {
        server_version_num: 150_020,
        backup_label: String::new(),
        census: Some(Census {
            canary: None,
            databases: vec![
                census("a/b é", &[('r', 1)], &[("t", 7)]),
                census("shop", &[('I', 1), ('i', 2), ('p', 1), ('r', 2)], &sales),
            ],
            unseen: Vec::new(),
            forbidden: None,
        }),
        logical: Some(LogicalFacts {
            client_version_num: 150_020,
            role_passwords: true,
            databases: vec![
                database("a/b é", FILES[0], 7_716_199),
                database("shop", FILES[2], 8_125_799),
            ],
            skipped: vec![SkippedDatabase {
                database: "template0".parse().unwrap(),
                why: "it allows no connections".to_owned(),
            }],
            failed: Vec::new(),
            left_out: None,
        }),
        ..facts()
    }
}

struct Dump(u32);

impl Source for Dump {
    fn open(&self, _: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        Err(io::Error::other("these are streams"))
    }

    fn stream(
        &self,
        entry: &SourceEntry,
        _: &CancellationToken,
    ) -> io::Result<Option<Box<dyn Read + Send>>> {
        let path = std::str::from_utf8(&entry.path).unwrap();
        Ok(Some(Box::new(Cursor::new(content(self.0, path)))))
    }
}

/// Takes both, the second with the first as its predecessor, and returns their lineage.
pub async fn take_dumps(bench: &Bench) -> (LineageId, Vec<BackupSummary>) {
    let (repository, name) = (&bench.repository, "orders".parse().unwrap());
    let kind = BackupKind::Logical;
    let identity =
        repository.find_or_mint_lineage_of(kind, &name, SystemIdentifier(7), NOW_MS).await;
    let lineage = identity.unwrap().lineage;
    let mut taken = Vec::new();
    for dump in DUMPS {
        let random = [u8::try_from(dump).unwrap(); 10];
        let at_ms = NOW_MS + i64::from(dump) * 1_000;
        let attempt = AttemptId::mint(u64::try_from(at_ms).unwrap(), random);
        let intent =
            Intent { attempt, follows: None, by: "tests/golden".into(), began_at_ms: at_ms };
        let attempt = repository.begin(lineage, intent).await.unwrap();
        let mut writer = attempt.write(WriteOptions::default()).unwrap();
        let mut paths = FILES.map(|path| path.as_bytes().to_vec());
        paths.sort_by(|a, b| path_order(a, b));
        let entries: Vec<io::Result<SourceEntry>> =
            paths.into_iter().map(|path| Ok(SourceEntry::stream(path, 0o600))).collect();
        let source = Arc::new(Dump(dump));
        writer.copy(Arc::<Dump>::clone(&source), entries).await.unwrap();
        let written = writer.finish(source, vec![], dump_facts(dump)).await.unwrap();
        taken.push(written.commit(at_ms + 500).await.unwrap());
    }
    (lineage, taken)
}
