//! Streams: files whose length nobody knows before they end, and files that are read as a stream.

#![expect(clippy::unwrap_used, reason = "a test says what it expects")]

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::Arc;

use crate::common::{Bench, NOW_MS, facts, noise};
use futures::TryStreamExt as _;
use proto::{AttemptId, BackupKind, LineageId, SystemIdentifier};
use repository::{
    Backup, BackupSummary, CheckLevel, Error, Intent, ScrubOptions, ScrubReport, Source,
    SourceEntry, SourceFile, WriteOptions,
};
use tokio_util::sync::CancellationToken;

/// Streams by path. `None` is one that is gone.
struct Streams(BTreeMap<Vec<u8>, Option<Vec<u8>>>);

/// Ends in an error after its bytes, as the output of a program that failed does.
struct Broken(io::Cursor<Vec<u8>>);

impl Read for Broken {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 => Err(io::Error::other("the program ended with exit code 1")),
            read => Ok(read),
        }
    }
}

/// Says nothing until nobody listens any more.
struct Silent(CancellationToken);

impl Read for Silent {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        let waiting = tokio::runtime::Builder::new_current_thread().build()?;
        waiting.block_on(self.0.cancelled());
        Err(io::Error::other("it was killed"))
    }
}

impl Source for Streams {
    fn open(&self, _: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        Err(io::Error::other("these are streams"))
    }

    fn stream(
        &self,
        entry: &SourceEntry,
        ended: &CancellationToken,
    ) -> io::Result<Option<Box<dyn Read + Send>>> {
        let content = self.0[&entry.path].clone();
        Ok(content.map(|bytes| -> Box<dyn Read + Send> {
            match &entry.path[..] {
                b"broken" => Box::new(Broken(io::Cursor::new(bytes))),
                b"silent" => Box::new(Silent(ended.clone())),
                _ => Box::new(io::Cursor::new(bytes)),
            }
        }))
    }
}

async fn write(
    bench: &Bench,
    number: u8,
    streams: Vec<(&str, Option<Vec<u8>>)>,
    cancel: CancellationToken,
) -> Result<BackupSummary, Error> {
    let attempt = AttemptId::mint(u64::from(number), [number; 10]);
    let intent = Intent { attempt, follows: None, by: "test".into(), began_at_ms: NOW_MS };
    let attempt = bench.repository.begin(bench.lineage, intent).await?;
    let mut writer = attempt.write(WriteOptions { cancel, ..WriteOptions::default() })?;
    let streams: BTreeMap<Vec<u8>, Option<Vec<u8>>> =
        streams.into_iter().map(|(path, content)| (path.into(), content)).collect();
    let entries: Vec<io::Result<SourceEntry>> =
        streams.keys().map(|path| Ok(SourceEntry::stream(path.clone(), 0o600))).collect();
    let source = Arc::new(Streams(streams));
    writer.copy(Arc::<Streams>::clone(&source), entries).await?;
    let written = writer.finish(source, vec![], facts()).await?;
    written.commit(NOW_MS + i64::from(number)).await
}

async fn content(backup: &Backup, path: &str) -> Vec<u8> {
    let content = backup.file_content(path.as_bytes()).await.unwrap();
    let pieces: Vec<_> = content.stream().try_collect().await.unwrap();
    let bytes = pieces.concat();
    assert_eq!(content.size_bytes(), bytes.len() as u64);
    bytes
}

const UNIT: usize = 32 << 10;
const STRETCH: usize = 256 * UNIT;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_any_length_comes_back_byte_by_byte() {
    let bench = Bench::new().await;
    let lengths = [0, 1, UNIT, 32 * UNIT, 32 * UNIT + 1, STRETCH, STRETCH + 1, 3 * STRETCH + 77];
    let names: Vec<String> = lengths.iter().map(|length| format!("s{length:08}")).collect();
    let streams: Vec<(&str, Option<Vec<u8>>)> = names
        .iter()
        .zip(lengths)
        .map(|(name, length)| {
            let mut bytes = noise(length as u64, length);
            // Zeros have no place in any frame.
            let middle = length / 2..(length / 2 + 3 * UNIT).min(length);
            bytes[middle].fill(0);
            (name.as_str(), Some(bytes))
        })
        .chain([("gone", None)])
        .collect();
    let summary = write(&bench, 1, streams.clone(), CancellationToken::new()).await.unwrap();
    assert_eq!(summary.counts.files, lengths.len() as u64, "what is gone is not in the backup");
    assert_eq!(summary.counts.bytes, lengths.iter().sum::<usize>() as u64);
    let backup = bench.repository.open_backup(bench.lineage, summary.backup).await.unwrap();
    assert_eq!(backup.files().await.unwrap().len(), lengths.len());
    for (name, expected) in &streams {
        let Some(expected) = expected else { continue };
        assert!(content(&backup, name).await == *expected, "{name} is another");
    }
    assert!(matches!(backup.file_content(b"gone").await, Err(Error::Missing { .. })));
    let read = backup.check_decrypt(repository::CheckOptions::default()).await.unwrap();
    assert_eq!(read.damaged, []);

    // What a stream has in common with the one before it, at the same place, is not stored again.
    let mut changed = streams.clone();
    for (_, bytes) in &mut changed {
        if let Some(last) = bytes.as_mut().and_then(|bytes| bytes.last_mut()) {
            *last ^= 1;
        }
    }
    let second = write(&bench, 2, changed.clone(), CancellationToken::new()).await.unwrap();
    assert_eq!(second.predecessor, Some(summary.backup));
    assert!(second.counts.stored_bytes < 20 * UNIT as u64, "{:?}", second.counts);
    let backup = bench.repository.open_backup(bench.lineage, second.backup).await.unwrap();
    for (name, expected) in &changed {
        let Some(expected) = expected else { continue };
        assert!(content(&backup, name).await == *expected, "{name} is another");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_a_file_come_back_without_the_rest() {
    let bench = Bench::new().await;
    let mut long = noise(1, 2 * STRETCH + 5 * UNIT + 77);
    long[STRETCH - UNIT..STRETCH + 3 * UNIT].fill(0);
    let short = noise(2, 3 * UNIT + 5);
    let streams =
        vec![("empty", Some(vec![])), ("long", Some(long.clone())), ("short", Some(short.clone()))];
    let summary = write(&bench, 1, streams, CancellationToken::new()).await.unwrap();
    let backup = bench.repository.open_backup(bench.lineage, summary.backup).await.unwrap();
    for (name, bytes) in [("empty", &vec![]), ("short", &short), ("long", &long)] {
        let size = bytes.len();
        let content = backup.file_content(name.as_bytes()).await.unwrap();
        let middle = size / 2;
        for parts in [
            vec![0..size, size..size],
            vec![0..0, middle..middle],
            vec![0..size.min(1), middle..size],
            vec![middle..(middle + 3).min(size), size.saturating_sub(UNIT + 1)..size],
            vec![middle.saturating_sub(STRETCH - 1)..middle, 0..middle],
            vec![size..size + 10, size + 7..size + 9],
            vec![
                STRETCH - UNIT - 1..STRETCH + 1,
                STRETCH..STRETCH + UNIT,
                STRETCH + 3 * UNIT - 1..2 * STRETCH + 2,
            ],
        ] {
            let wanted: Vec<_> =
                parts.iter().map(|part| part.start as u64..part.end as u64).collect();
            let read: Vec<_> = content.parts(&wanted).try_collect().await.unwrap();
            let within = |at: usize| at.min(size);
            let expected: Vec<u8> = parts
                .iter()
                .flat_map(|part| &bytes[within(part.start)..within(part.end)])
                .copied()
                .collect();
            assert!(read.concat() == expected, "{parts:?} of {name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_breaks_off_is_no_backup() {
    let bench = Bench::new().await;
    for (number, length) in [(1, 100), (2, STRETCH), (3, STRETCH + 5)] {
        let streams = vec![("before", Some(vec![7; 10])), ("broken", Some(noise(1, length)))];
        let error = write(&bench, number, streams, CancellationToken::new()).await.unwrap_err();
        let Error::Source { path, source } = error else { panic!("{error}") };
        assert_eq!((path.as_str(), source.to_string().contains("exit code 1")), ("broken", true));
    }
    assert_eq!(bench.repository.list_backups(bench.lineage).await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_stream_does_not_outlive_a_cancel() {
    let bench = Bench::new().await;
    let cancel = CancellationToken::new();
    cancel.cancel();
    let streams = vec![("silent", Some(Vec::new()))];
    let ended = tokio::time::timeout(
        std::time::Duration::from_mins(1),
        write(&bench, 1, streams, cancel.clone()),
    );
    assert!(matches!(ended.await.expect("it ends"), Err(Error::Cancelled)));
}

#[tokio::test]
async fn logical_backups_have_a_lineage_of_their_own() {
    let bench = Bench::new().await;
    let (name, system) = ("orders".parse().unwrap(), SystemIdentifier(7));
    let of = async |kind| -> LineageId {
        let repository = &bench.repository;
        let minted = repository.find_or_mint_lineage_of(kind, &name, system, NOW_MS).await.unwrap();
        assert_eq!(minted.kind, kind);
        assert_eq!(repository.identity(minted.lineage).await.unwrap(), minted);
        minted.lineage
    };
    assert_eq!(of(BackupKind::Physical).await, bench.lineage);
    let logical = of(BackupKind::Logical).await;
    assert_ne!(logical, bench.lineage);
    assert_eq!(of(BackupKind::Logical).await, logical, "minting it again gives the same");
    let options = ScrubOptions::new(CheckLevel::Manifest, NOW_MS);
    let mut report = ScrubReport::default();
    bench.repository.scrub(&options, &mut report).await.unwrap();
    assert!(report.is_sound(), "{report:?}");
}
