//! Backups that are told which parts of a file changed: the rest is not read, and what is restored is whole.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::common::{self, Bench, DAY_MS, NOW_MS, SECOND, SharedTree, Tree, noise};
use proto::backup::SilentChanges;
use repository::{
    BackupSummary, CheckLevel, CheckOptions, Error, ProgressSnapshot, ScrubOptions, ScrubReport,
    Source, SourceEntry, SourceFile, WriteOptions,
};

const PAGE: usize = 8192;
/// In shards, with units of a page.
const LARGE: usize = 12 << 20;
/// WAL of each backup.
const WAL: u64 = 100_000;

fn tree() -> Tree {
    Tree::new().file("large", noise(1, LARGE)).file("small", noise(2, 5 * PAGE))
}

fn bytes(pages: usize) -> u64 {
    (pages * PAGE) as u64
}

/// Pages of a file, as those that changed.
fn pages(pages: &[usize]) -> Vec<Range<u64>> {
    pages.iter().map(|page| bytes(*page)..bytes(page + 1)).collect()
}

/// Tells which parts of a file changed since the backup before.
fn told(tree: &Tree, path: &str, ranges: Vec<Range<u64>>) {
    tree.change(path, |file| file.changes = Some(ranges));
}

fn options() -> WriteOptions {
    WriteOptions { continuity: Some("here".to_owned()), ..WriteOptions::default() }
}

async fn back_up(
    bench: &Bench,
    tree: &Arc<Tree>,
    at_ms: i64,
    options: WriteOptions,
) -> (BackupSummary, ProgressSnapshot) {
    let progress = Arc::clone(&options.progress);
    let summary = bench.back_up_with(tree, at_ms, options).await.unwrap();
    (summary, progress.snapshot())
}

fn opened(tree: &Tree) -> Vec<String> {
    let mut opened = std::mem::take(&mut *tree.opened.lock().unwrap());
    opened.sort();
    opened.dedup();
    opened.into_iter().map(|path| String::from_utf8(path).unwrap()).collect()
}

fn advised(tree: &Tree) -> Vec<(String, Range<u64>)> {
    let mut advised = std::mem::take(&mut *tree.advised.lock().unwrap());
    advised.sort_by_key(|(path, range)| (path.clone(), range.start));
    let named = |(path, range)| (String::from_utf8(path).unwrap(), range);
    advised.into_iter().map(named).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_will_be_read_is_told_ahead_stretch_by_stretch_and_nothing_else() {
    let bench = Bench::new().await;
    let tree = Arc::new(Tree::new().file("large", noise(1, 300 * PAGE + 10)));
    back_up(&bench, &tree, NOW_MS, options()).await;
    let large = |from: usize, to: u64| ("large".to_owned(), bytes(from)..to);
    let end = bytes(300) + 10;
    assert_eq!(advised(&tree), [large(0, bytes(256)), large(256, end)]);

    let changed = [0, 1, 2, 9, 254, 255, 256, 299, 300];
    tree.write("large", 300 * PAGE, b"X");
    told(&tree, "large", pages(&changed));
    tree.bytes_read();
    back_up(&bench, &tree, NOW_MS + 1, options()).await;
    let parts = [(0, 3), (9, 10), (254, 256), (256, 257)].map(|(from, to)| large(from, bytes(to)));
    assert_eq!(advised(&tree), [&parts[..], &[large(299, end)]].concat());
    assert_eq!(tree.bytes_read(), bytes(changed.len() - 1) + 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_changed_is_read_and_the_backup_is_whole() {
    let bench = Bench::new().await;
    let tree = Arc::new(tree());
    let (first, _) = back_up(&bench, &tree, NOW_MS, options()).await;
    tree.bytes_read();

    // At both ends of the large file, over the edge of a unit, and in the small one.
    let last = LARGE / PAGE - 1;
    tree.write("large", 0, b"X");
    tree.write("large", 300 * PAGE - 2, b"both");
    tree.write("large", LARGE - 1, b"X");
    tree.write("small", 3 * PAGE + 100, b"X");
    told(&tree, "large", pages(&[0, 299, 300, last]));
    told(&tree, "small", pages(&[3]));
    let whole = tree.expected();
    // What nobody wrote to is not looked at, or this would be in the backup.
    tree.change("large", |file| file.content[1000 * PAGE] ^= 1);
    tree.change("large", |file| file.content[5 * PAGE] ^= 1);
    tree.change("small", |file| file.content[0] ^= 1);

    let (second, did) = back_up(&bench, &tree, NOW_MS + 1, options()).await;
    assert_eq!(tree.bytes_read(), bytes(5));
    assert_eq!(did.bytes_skipped, LARGE as u64);
    assert_eq!(did.bytes_read + did.bytes_skipped, did.bytes + WAL);
    assert_eq!(second.predecessor, Some(first.backup));
    assert!(second.counts.stored_bytes < 150_000 + bytes(5), "{:?}", second.counts);
    assert_eq!(bench.restore(&second).await, whole);
    let checked = bench.open(&second).await.check_decrypt(CheckOptions::default()).await.unwrap();
    assert!(checked.is_sound(), "{checked:?}");
    assert_ne!(bench.restore(&first).await, whole);

    // Written to, said the times; nothing of it was: nothing is opened, and what described it goes on to.
    for path in ["large", "small"] {
        tree.change(path, |file| file.mtime_ns += SECOND);
        told(&tree, path, Vec::new());
    }
    opened(&tree);
    let (third, _) = back_up(&bench, &tree, NOW_MS + 2, options()).await;
    assert_eq!(opened(&tree), [""; 0]);
    assert_eq!(bench.restore(&third).await, whole);
}

/// A tree whose small files come whole when they are opened.
struct AtOnce(SharedTree);

struct Whole(Box<dyn SourceFile>, u64);

impl SourceFile for Whole {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(offset, buffer)
    }

    fn fetched_bytes(&self) -> Option<u64> {
        Some(self.1)
    }
}

impl Source for AtOnce {
    fn open(&self, entry: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        let file = self.0.open(entry)?;
        let is_small = entry.size_bytes < 100_000;
        Ok(file.map(|file| -> Box<dyn SourceFile> {
            if is_small { Box::new(Whole(file, entry.size_bytes)) } else { file }
        }))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_though_nobody_wanted_it_counts_as_read() {
    let bench = Bench::new().await;
    let tree = Arc::new(tree());
    back_up(&bench, &tree, NOW_MS, options()).await;
    for path in ["large", "small"] {
        tree.write(path, PAGE, b"told");
        told(&tree, path, pages(&[1]));
    }
    let options = options();
    let progress = Arc::clone(&options.progress);
    let mut writer = bench.begin(NOW_MS + 1).await.write(options).unwrap();
    let source = Arc::new(AtOnce(SharedTree(Arc::clone(&tree))));
    writer.copy(source, tree.entries().into_iter().map(Ok)).await.unwrap();
    let did = progress.snapshot();
    assert_eq!(did.bytes_read, bytes(1) + bytes(5));
    assert_eq!(did.bytes_skipped, LARGE as u64 - bytes(1) + bytes(4), "it was not looked at");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_backup_before_does_not_have_is_read_whatever_is_said() {
    let bench = Bench::new().await;
    let tree = Arc::new(
        Tree::new()
            .file("grown", noise(1, 300 * PAGE + 100))
            .file("outgrown", noise(2, 30 * PAGE))
            .file("shrunk", noise(3, LARGE))
            .file("shrunk-small", noise(4, LARGE))
            .file("moved", noise(5, LARGE)),
    );
    back_up(&bench, &tree, NOW_MS, options()).await;
    let resize = |path: &str, length: usize| {
        tree.change(path, |file| {
            file.mtime_ns += SECOND;
            let more = noise(9, length);
            let kept = file.content.len().min(length);
            file.content.truncate(length);
            file.content.extend_from_slice(&more[kept..]);
        });
        told(&tree, path, Vec::new());
    };
    // Its last page was not whole; then into a second stretch.
    resize("grown", 600 * PAGE);
    // Too large to be described beside its neighbours.
    resize("outgrown", 40 * PAGE);
    resize("shrunk", 520 * PAGE + 17);
    resize("shrunk-small", 3 * PAGE);
    // Another inode, with what it had, as on another host.
    tree.change("moved", |file| file.inode += 1);
    told(&tree, "moved", Vec::new());
    // A new name.
    tree.put("new", noise(6, 20 * PAGE), Some(8192));
    told(&tree, "new", Vec::new());
    tree.bytes_read();
    let (second, did) = back_up(&bench, &tree, NOW_MS + 1, options()).await;
    assert_eq!(bench.restore(&second).await, tree.expected());
    // The page that was not whole and 299 more; ten; the seventeen bytes that end a unit now; the new one.
    assert_eq!(tree.bytes_read(), bytes(300) + bytes(10) + 17 + bytes(20));
    assert_eq!(did.bytes_read + did.bytes_skipped, did.bytes + WAL);
    let checked = bench.open(&second).await.check_decrypt(CheckOptions::default()).await.unwrap();
    assert!(checked.is_sound(), "{checked:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_of_a_file_that_was_read_in_part_are_not_believed() {
    let bench = Bench::new().await;
    let tree = Arc::new(tree());
    back_up(&bench, &tree, NOW_MS, options()).await;
    // A page is written, too late for whoever tells of writes; then the file is listed. The backup has what was there before.
    for path in ["large", "small"] {
        tree.write(path, 3 * PAGE, b"late");
        told(&tree, path, Vec::new());
    }
    let (second, _) = back_up(&bench, &tree, NOW_MS + 1, options()).await;
    assert_ne!(bench.restore(&second).await, tree.expected());
    // Nothing happens to the files. Now the write is told; of a file of which nothing is told everything is read.
    for told_again in [true, false] {
        let bench = bench.forked().await;
        for path in ["large", "small"] {
            let changes = told_again.then(|| pages(&[3]));
            tree.change(path, |file| file.changes = changes);
        }
        tree.bytes_read();
        let (third, did) = back_up(&bench, &tree, NOW_MS + 2, options()).await;
        let expected = if told_again { bytes(2) } else { LARGE as u64 + bytes(5) };
        assert_eq!(tree.bytes_read(), expected);
        assert_eq!(did.silent_changes, 0, "nobody said that nothing had changed");
        assert_eq!(bench.restore(&third).await, tree.expected());
        // What was read to its end is what its times say, and what was told to its end.
        back_up(&bench, &tree, NOW_MS + 3, options()).await;
        assert_eq!(tree.bytes_read(), 0);
    }
}

/// What is believed of a file of two stretches and of a small one that were written to, told or not, after the last backup.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_are_believed_again_once_every_write_that_they_stand_for_was_told() {
    let bench = Bench::new().await;
    let mut tree = Arc::new(tree());
    back_up(&bench, &tree, NOW_MS, options()).await;
    let tell = |tree: &Tree, ranges: Option<Vec<Range<u64>>>| {
        for path in ["large", "small"] {
            tree.change(path, |file| file.changes.clone_from(&ranges));
        }
    };
    for path in ["large", "small"] {
        tree.write(path, PAGE, b"told");
    }
    tell(&tree, Some(pages(&[1])));
    back_up(&bench, &tree, NOW_MS + 1, options()).await;
    tree.bytes_read();
    let everything = LARGE as u64 + bytes(5);

    // A server that was started anew tells nothing: that the times are the same means nothing yet.
    let restarted = bench.forked().await;
    tell(&tree, None);
    let (_, did) = back_up(&restarted, &tree, NOW_MS + 2, options()).await;
    assert_eq!((tree.bytes_read(), did.silent_changes), (everything, 0));

    // One more backup, to which nobody tells of a write, and there is none.
    tell(&tree, Some(Vec::new()));
    back_up(&bench, &tree, NOW_MS + 2, options()).await;
    let before = tree.expected();
    tell(&tree, None);
    let restarted = bench.forked().await;
    let (third, did) = back_up(&restarted, &tree, NOW_MS + 3, options()).await;
    assert_eq!((tree.bytes_read(), did.bytes_skipped), (0, everything));
    assert_eq!(restarted.restore(&third).await, before);

    // What nobody tells of differs from what is stored, which is found within 30 days and no fault of the times.
    let other = bench.forked().await;
    for path in ["large", "small"] {
        tree.change(path, |file| file.content[3 * PAGE] ^= 1);
    }
    let (fourth, did) = back_up(&other, &tree, NOW_MS + 31 * DAY_MS, options()).await;
    assert_eq!((tree.bytes_read(), did.silent_changes), (everything, 0));
    assert_eq!(other.restore(&fourth).await, tree.expected());
    // It has been read whole, and from now on it is one.
    for path in ["large", "small"] {
        tree.change(path, |file| file.content[3 * PAGE] ^= 1);
    }
    let (_, did) = back_up(&other, &tree, NOW_MS + 62 * DAY_MS, options()).await;
    assert_eq!((tree.bytes_read(), did.silent_changes), (everything, 2));

    // A write that is as fresh as the list of files may hide another one behind the same times.
    let scanned_at_ns = tree.scanned_at_ns;
    for path in ["large", "small"] {
        tree.change(path, |file| file.mtime_ns = scanned_at_ns - SECOND);
    }
    tell(&tree, Some(Vec::new()));
    back_up(&bench, &tree, NOW_MS + 4, options()).await;
    Arc::get_mut(&mut tree).unwrap().scanned_at_ns += 10 * SECOND;
    // Now it is old, but was there when the backup before listed files, and that could not tell it from a later one.
    for (at_ms, read) in [(5, 0), (6, everything)] {
        tell(&tree, (read == 0).then(Vec::new));
        back_up(&bench, &tree, NOW_MS + at_ms, options()).await;
        assert_eq!(tree.bytes_read(), read, "{at_ms}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_wants_everything_read_is_not_told_what_changed() {
    let bench = Bench::new().await;
    let tree = Arc::new(tree());
    back_up(&bench, &tree, NOW_MS, options()).await;
    for path in ["large", "small"] {
        tree.write(path, PAGE, b"unsaid");
        told(&tree, path, Vec::new());
    }
    let other = bench.forked().await;
    tree.bytes_read();
    let everything = WriteOptions { full_read: true, ..options() };
    let (second, _) = back_up(&bench, &tree, NOW_MS + 1, everything).await;
    assert_eq!(tree.bytes_read(), LARGE as u64 + bytes(5));
    assert_eq!(bench.restore(&second).await, tree.expected());
    let one_file = WriteOptions { read_again: [b"small".to_vec()].into(), ..options() };
    back_up(&other, &tree, NOW_MS + 1, one_file).await;
    assert_eq!(tree.bytes_read(), bytes(5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_reads_everything_finds_what_no_time_had_told_and_names_the_files() {
    let bench = Bench::new().await;
    let tree = Arc::new(tree());
    back_up(&bench, &tree, NOW_MS, options()).await;
    let full = async |at_ms: i64, continuity: &str| {
        let continuity = Some(continuity.to_owned());
        let options = WriteOptions { full_read: true, continuity, ..options() };
        let progress = Arc::clone(&options.progress);
        back_up(&bench, &tree, at_ms, options).await;
        progress.silent_changes()
    };
    assert_eq!(full(NOW_MS + 1, "here").await, None);
    tree.change("large", |file| file.content[700 * PAGE] ^= 1);
    // As everybody writes.
    tree.write("small", PAGE, b"openly");
    let found = SilentChanges { units: 1, files: vec!["large".to_owned()] };
    assert_eq!(full(NOW_MS + 2, "here").await, Some(found));
    assert_eq!(full(NOW_MS + 3, "here").await, None, "it is in the backup before");
    tree.change("large", |file| file.content[700 * PAGE] ^= 1);
    assert_eq!(full(NOW_MS + 4, "elsewhere").await, None, "other times, which claim nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_said_to_be_unchanged_is_read_within_thirty_days() {
    let bench = Bench::new().await;
    let tree = Arc::new(tree());
    back_up(&bench, &tree, NOW_MS, options()).await;
    tree.change("large", |file| file.content[700 * PAGE] ^= 1);
    tree.change("small", |file| file.content[0] ^= 1);
    tree.bytes_read();
    let (mut last, mut reread) = (None, 0);
    for day in 1..=30 {
        for path in ["large", "small"] {
            tree.change(path, |file| file.mtime_ns += SECOND);
            told(&tree, path, Vec::new());
        }
        let (summary, did) = back_up(&bench, &tree, NOW_MS + day * DAY_MS, options()).await;
        assert_eq!(did.silent_changes, 0, "times and sizes promised nothing");
        last = Some(summary);
        reread += did.bytes_reread;
    }
    assert_eq!(tree.bytes_read(), LARGE as u64 + bytes(5), "everything once");
    assert_eq!(reread, LARGE as u64 + bytes(5), "because it was its turn");
    assert_eq!(bench.restore(&last.unwrap()).await, tree.expected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_asks_for_it_has_everything_read_within_two_days() {
    let bench = Bench::new().await;
    let tree = Arc::new(tree());
    back_up(&bench, &tree, NOW_MS, options()).await;
    let within_two_days = || WriteOptions { reread_within: Duration::from_hours(48), ..options() };
    let mut reread = [0; 3];
    for (day, reread) in (1..).zip(&mut reread) {
        // Two pages of the large file are read in any case, and are no part of it.
        tree.write("large", 0, b"X");
        tree.write("large", LARGE - 1, b"X");
        tree.change("small", |file| file.mtime_ns += SECOND);
        told(&tree, "large", pages(&[0, LARGE / PAGE - 1]));
        told(&tree, "small", Vec::new());
        tree.bytes_read();
        let (_, did) = back_up(&bench, &tree, NOW_MS + day * DAY_MS, within_two_days()).await;
        *reread = did.bytes_reread;
        assert!(tree.bytes_read() <= did.bytes_reread + bytes(2), "{did:?}");
    }
    let all = LARGE as u64 + bytes(5) - bytes(2);
    let [first, second, third] = reread;
    assert_eq!(first + second, all, "everything once");
    assert_eq!(first, third, "and then the same again");
    assert!(first > all / 6 && second > all / 6, "{reread:?}");
    // No time has gone by, so it is nobody's turn; and what is read by order is read for no turn.
    told(&tree, "large", Vec::new());
    told(&tree, "small", Vec::new());
    let (_, did) = back_up(&bench, &tree, NOW_MS + 3 * DAY_MS, within_two_days()).await;
    assert_eq!(did.bytes_reread, 0);
    let everything = WriteOptions { full_read: true, ..within_two_days() };
    let (_, did) = back_up(&bench, &tree, NOW_MS + 9 * DAY_MS, everything).await;
    assert_eq!((did.bytes_reread, did.bytes_skipped), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_in_a_damaged_pack_is_read_though_it_did_not_change() {
    let bench = Bench::new().await;
    let tree = Arc::new(tree());
    back_up(&bench, &tree, NOW_MS, options()).await;
    let packs = common::files_below(&bench.store_path());
    let data = packs.iter().filter(|path| path.to_str().unwrap().contains("/packs/"));
    // A pack of file content, says its header.
    let rotten = data.map(|path| (path, std::fs::read(path).unwrap()));
    let (path, mut bytes) = rotten.max_by_key(|(_, bytes)| (bytes[9] == 1, bytes.len())).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(path, bytes).unwrap();
    let mark = ScrubOptions {
        mark: Some("tester".into()),
        ..ScrubOptions::new(CheckLevel::Read, NOW_MS + DAY_MS)
    };
    let mut report = ScrubReport::default();
    bench.repository.scrub(&mark, &mut report).await.unwrap();
    assert_eq!(report.damaged.len(), 1, "{report:#?}");
    for path in ["large", "small"] {
        tree.change(path, |file| file.mtime_ns += SECOND);
        told(&tree, path, Vec::new());
    }
    tree.bytes_read();
    let (second, _) = back_up(&bench, &tree, NOW_MS + 1, options()).await;
    let read = tree.bytes_read();
    assert!(read > LARGE as u64 / 3, "{read}");
    assert_eq!(bench.restore(&second).await, tree.expected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_are_not_in_order_are_refused() {
    let bench = Bench::new().await;
    let tree = Arc::new(tree());
    for ranges in [[(8192, 9000), (0, 10)], [(0, 10), (5, 20)], [(9, 3), (20, 30)]] {
        let ranges = ranges.map(|(start, end)| start..end);
        told(&tree, "large", ranges.to_vec());
        let refused = bench.back_up_with(&tree, NOW_MS, options()).await.unwrap_err();
        assert!(matches!(&refused, Error::Entry { .. }), "{refused:?}");
    }
}
