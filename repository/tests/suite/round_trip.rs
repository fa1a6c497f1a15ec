//! What goes in comes out: odd trees, odd files, files that change while they are read, second backups.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::common::{self, Bench, DAY_MS, NOW_MS, Node, SECOND, Tree, noise};
use repository::{RestoreOptions, RestoreTarget, Source, SourceEntry, SourceFile, WriteOptions};
use rustix::process::getpriority_process;
use rustix::thread::gettid;

/// Text that compresses like data does.
fn rows(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 64);
    let mut n = seed;
    while bytes.len() < length {
        n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        bytes.extend_from_slice(format!("{:08}|customer {:04}|open|", n >> 40, n >> 52).as_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn odd_tree() -> Tree {
    let mut holes = vec![0; 5 << 20];
    holes[3 << 20] = 1;
    let mut tree = Tree::new()
        .directory("base")
        .directory("base/1")
        .directory("base/1.x")
        .directory("empty")
        .directory("empty/deeper")
        .file("PG_VERSION", "15\n")
        .file("base/1/16384", rows(1, 40 << 20))
        .file("base/1/16384.1", rows(2, (1 << 20) + 777))
        .file("base/1/16385", vec![])
        .file("base/1/16386", vec![0; 3 * 8192])
        .file("base/1/16387", holes)
        .file("base/1/16388", noise(3, 3 << 20))
        .file("base/1.x/a", "in a.x")
        .file(&b"base/1/\xff\xfe name\nwith 'odd' \"bytes\" \\"[..], "odd")
        .file("base/1/partial", rows(4, 8192 * 2 + 1))
        .file("base/1/exactly-a-shard", rows(5, 256 * 8192))
        .file("base/1/one-more", rows(6, 256 * 8192 + 1))
        .file("base/1/thirty-two", rows(7, 32 * 8192))
        .file("base/1/thirty-three", rows(8, 32 * 8192 + 1));
    for n in 0..700_u32 {
        tree = tree.file(format!("base/1/2{n:04}"), rows(u64::from(n), (n as usize * 37) % 20_000));
    }
    tree.links.push((b"base/link".to_vec(), b"/nowhere/at all".to_vec()));
    tree
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_of_odd_things_comes_back_as_it_was() {
    let bench = Bench::new().await;
    let tree = Arc::new(odd_tree());
    let summary = bench.back_up(&tree, NOW_MS).await;
    assert_eq!(bench.restore(&summary).await, tree.expected());
    assert_eq!(summary.counts.files, 700 + 14 + 2);
    assert_eq!(summary.counts.directories, 5);
    assert_eq!(summary.counts.symlinks, 1);
    assert_eq!(summary.counts.wal_files, 1);
    assert_eq!(summary.predecessor, None);
    let stored: u64 = summary.counts.stored_bytes;
    assert!(stored < summary.counts.bytes / 2, "{stored} of {}", summary.counts.bytes);

    let backup = bench.open(&summary).await;
    assert!(backup.check_inventory().await.unwrap().is_sound());
    let report = backup.check_decrypt(repository::CheckOptions::default()).await.unwrap();
    assert!(report.is_sound(), "{report:?}");
    assert_eq!(report.packs, summary.counts.packs);
    assert_eq!(backup.facts(), &common::facts());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zeros_take_no_room_where_they_are_restored() {
    let bench = Bench::new().await;
    let mut islands = vec![0; 8 << 20];
    for at in [0, (3 << 20) + 5, (8 << 20) - 1] {
        islands[at] = 1;
    }
    let tree = Tree::new()
        .file("zeros", vec![0; 3 << 20])
        .file("islands", islands)
        .file("ends-in-zeros", [noise(1, 8192), vec![0; 6 << 20]].concat())
        .file("full", noise(2, 1 << 20));
    let tree = Arc::new(tree);
    let summary = bench.back_up(&tree, NOW_MS).await;
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("data");
    let target = RestoreTarget { directory: directory.clone(), ..RestoreTarget::default() };
    let plan = bench.open(&summary).await.restore_plan(target).await.unwrap();
    plan.restore(RestoreOptions::default()).await.unwrap();
    // Bytes on disk; a file system may give more than was written, but not for what was not.
    let on_disk = |name: &str| directory.join(name).metadata().unwrap().blocks() * 512;
    assert!(on_disk("zeros") < 1 << 16, "{}", on_disk("zeros"));
    assert!(on_disk("islands") < 1 << 20, "{}", on_disk("islands"));
    assert!(on_disk("ends-in-zeros") < 1 << 20, "{}", on_disk("ends-in-zeros"));
    assert!(on_disk("full") >= 1 << 20, "{}", on_disk("full"));
    let restored = common::look(&directory);
    for (path, node) in tree.expected() {
        assert!(restored[&path] == node, "{}", String::from_utf8_lossy(&path));
    }
}

/// Files that are all gone once as many threads have asked for one as are waited for.
#[derive(Default)]
struct Crowd {
    awaited: usize,
    /// Who came, and the nice value of the thread.
    came: Mutex<BTreeMap<String, i32>>,
    more: Condvar,
}

fn niceness() -> i32 {
    getpriority_process(Some(gettid())).expect("the nice value of a living thread")
}

impl Source for Crowd {
    fn open(&self, _: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        let thread = std::thread::current();
        let mut came = self.came.lock().expect("nobody panicked");
        came.insert(thread.name().expect("the copier names its threads").to_owned(), niceness());
        self.more.notify_all();
        let bound = Duration::from_mins(1);
        let too_few = |came: &mut BTreeMap<String, i32>| came.len() < self.awaited;
        let (came, ended) =
            self.more.wait_timeout_while(came, bound, too_few).expect("nobody panicked");
        assert!(!ended.timed_out(), "only {came:?} came");
        Ok(None)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_threads_copy_as_were_asked_for_and_they_step_back() {
    let bench = Bench::new().await;
    let tree = (0..60).fold(Tree::new(), |tree, n| tree.file(format!("f{n}"), "gone"));
    let ours = niceness();
    for (processes, nice) in [(1, 0), (3, 7)] {
        let options = WriteOptions { processes, nice, ..WriteOptions::default() };
        let mut writer = bench.begin(NOW_MS + i64::from(nice)).await.write(options).unwrap();
        let crowd = Arc::new(Crowd { awaited: processes, ..Crowd::default() });
        let entries = tree.entries().into_iter().map(Ok);
        writer.copy(Arc::<Crowd>::clone(&crowd), entries).await.unwrap();
        let wanted = (ours + i32::from(nice)).min(19);
        let threads: BTreeMap<_, _> =
            (0..processes).map(|number| (format!("copy-{number}"), wanted)).collect();
        assert_eq!(*crowd.came.lock().unwrap(), threads);
        assert_eq!(niceness(), ours);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_second_backup_reads_nothing_unchanged_and_stores_only_changed_units() {
    let bench = Bench::new().await;
    let tree = Arc::new(odd_tree());
    let first = bench.back_up(&tree, NOW_MS).await;
    tree.bytes_read();

    let idle = bench.back_up(&tree, NOW_MS + 1).await;
    assert_eq!(tree.bytes_read(), 0);
    assert_eq!(idle.predecessor, Some(first.backup));
    assert!(
        idle.counts.stored_bytes < 130_000,
        "late files and WAL only: {}",
        idle.counts.stored_bytes
    );
    assert_eq!(bench.restore(&idle).await, tree.expected());

    // One byte in each of three units, far apart, and one file that grew into its own shard.
    for at in [0, 20 << 20, (40 << 20) - 1] {
        tree.write("base/1/16384", at, b"X");
    }
    tree.change("base/1/thirty-two", |file| {
        file.content.extend_from_slice(&noise(5, 9000));
        file.mtime_ns += SECOND;
    });
    let third = bench.back_up(&tree, NOW_MS + 2).await;
    assert_eq!(tree.bytes_read(), (40 << 20) + 32 * 8192 + 9000);
    assert_eq!(bench.restore(&third).await, tree.expected());
    let grown = third.counts.stored_bytes - idle.counts.stored_bytes;
    assert!(grown < 5 * 8192 + 9000 + 20_000, "{grown}");

    // Everything read, nothing changed: nothing is stored, and whole shards are referred to.
    let options = WriteOptions { full_read: true, ..WriteOptions::default() };
    let full = bench.back_up_with(&tree, NOW_MS + 3, options).await.unwrap();
    assert_eq!(
        tree.bytes_read(),
        tree.files.lock().unwrap().values().map(|f| f.content.len() as u64).sum::<u64>()
    );
    assert!(full.counts.stored_bytes < 130_000, "{}", full.counts.stored_bytes);
    assert_eq!(bench.restore(&full).await, tree.expected());

    // The old ones are still what they were.
    assert_ne!(bench.restore(&first).await, tree.expected());
    let report =
        bench.open(&full).await.check_decrypt(repository::CheckOptions::default()).await.unwrap();
    assert!(report.is_sound(), "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_every_size_are_read_whole_and_only_changed_ones_are_stored_again() {
    for block in [1_u32, 2, 4, 8, 16, 32].map(|kib| kib << 10) {
        let bench = Bench::new().await;
        let pages = |count: usize| noise(count as u64, count * block as usize);
        let tree = Tree::new().directory("base");
        tree.put("base/one", pages(1), Some(block));
        tree.put("base/thirty-three", pages(33), Some(block));
        tree.put("base/large", pages((3 << 20) / block as usize), Some(block));
        // A file that was caught while it grew ends inside a page.
        tree.put("base/odd", [pages(2), vec![7; 100]].concat(), Some(block));
        let tree = Arc::new(tree);
        let first = bench.back_up(&tree, NOW_MS).await;
        assert_eq!(bench.restore(&first).await, tree.expected(), "{block}");
        let idle = bench.back_up(&tree, NOW_MS + 1).await;
        for path in ["base/thirty-three", "base/large"] {
            tree.write(path, 17 * block as usize, &[1; 50]);
        }
        let second = bench.back_up(&tree, NOW_MS + 2).await;
        assert_eq!(bench.restore(&second).await, tree.expected(), "{block}");
        let grown = second.counts.stored_bytes - idle.counts.stored_bytes;
        let units = 2 * u64::from(block.max(8192));
        assert!((units..units + 30_000).contains(&grown), "{block}: {grown}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_have_changed_unseen_is_read() {
    let bench = Bench::new().await;
    let tree = Tree::new()
        .file("old", vec![1; 9000])
        .file("racy", vec![2; 9000])
        .file("replaced", vec![3; 9000]);
    tree.change("racy", |file| file.mtime_ns = tree.scanned_at_ns - SECOND);
    let tree = Arc::new(tree);
    bench.back_up(&tree, NOW_MS).await;
    let opened = || {
        let mut opened = std::mem::take(&mut *tree.opened.lock().unwrap());
        opened.sort();
        opened.into_iter().map(|path| String::from_utf8(path).unwrap()).collect::<Vec<_>>()
    };
    opened();

    // Same times as before, other content: only the racy one may not be trusted, and an inode is looked at too.
    tree.change("racy", |file| file.content[0] = 9);
    tree.change("replaced", |file| {
        file.content[0] = 9;
        file.inode += 1;
    });
    let second = bench.back_up(&tree, NOW_MS + 1).await;
    assert_eq!(opened(), ["racy", "replaced"]);
    assert_eq!(bench.restore(&second).await, tree.expected());

    // Another node, or none named: everything is read.
    for continuity in [Some("elsewhere".to_owned()), None] {
        let options = WriteOptions { continuity, ..WriteOptions::default() };
        bench.back_up_with(&tree, NOW_MS + 2, options).await.unwrap();
        assert_eq!(opened(), ["old", "racy", "replaced"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_no_time_shows_is_found_within_thirty_days() {
    let bench = Bench::new().await;
    let tree = (0..60).fold(Tree::new(), |tree, n| tree.file(format!("f{n:02}"), noise(n, 20_000)));
    let tree = Arc::new(tree.file("large", noise(100, 6 << 20)));
    bench.back_up(&tree, NOW_MS).await;
    // Nobody tells when it was changed, or the old times are told.
    tree.change("f33", |file| file.content[0] ^= 1);
    tree.change("large", |file| {
        file.content[5 << 20] ^= 1;
        file.changed_at_read_ns = Some(file.mtime_ns);
    });
    // A server wrote to it between the scan and the reading, as servers do.
    tree.change("f44", |file| {
        file.content[0] ^= 1;
        file.changed_at_read_ns = Some(file.mtime_ns + SECOND);
    });
    tree.bytes_read();
    let (mut total, mut silent, mut reread) = (0, 0, 0);
    let mut last = None;
    for day in 1..=30 {
        let options =
            WriteOptions { continuity: Some("here".to_owned()), ..WriteOptions::default() };
        let progress = Arc::clone(&options.progress);
        last = Some(bench.back_up_with(&tree, NOW_MS + day * DAY_MS, options).await.unwrap());
        silent += progress.snapshot().silent_changes;
        reread += progress.snapshot().bytes_reread;
        let read = tree.bytes_read();
        assert!(read < 3 << 20, "day {day} reads its share only: {read}");
        total += read;
    }
    assert_eq!(total, 60 * 20_000 + (6 << 20), "everything once");
    assert_eq!(reread, total, "because it was its turn");
    assert_eq!(silent, 2, "and each change that no time shows is counted, and no other");
    assert_eq!(bench.restore(&last.unwrap()).await, tree.expected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_change_while_they_are_read_are_stored_as_they_were_found() {
    let bench = Bench::new().await;
    let tree = Tree::new()
        .directory("d")
        .file("d/gone", rows(1, 5000))
        .file("d/gone-large", rows(1, 9 << 20))
        .file("d/grown", rows(2, 5000))
        .file("d/shrunk", rows(3, 100_000))
        .file("d/shrunk-large", rows(4, 9 << 20))
        .file("d/shrunk-to-nothing", rows(5, 9 << 20))
        .file("d/still", rows(6, 5000));
    tree.change("d/gone", |file| file.at_read = Some(None));
    tree.change("d/gone-large", |file| file.at_read = Some(None));
    tree.change("d/grown", |file| file.at_read = Some(Some(rows(2, 50_000))));
    tree.change("d/shrunk", |file| file.at_read = Some(Some(rows(3, 12_345))));
    tree.change("d/shrunk-large", |file| file.at_read = Some(Some(rows(4, (5 << 20) + 1))));
    tree.change("d/shrunk-to-nothing", |file| file.at_read = Some(Some(vec![])));
    let tree = Arc::new(tree);
    let first = bench.back_up(&tree, NOW_MS).await;
    let expected = tree.expected();
    assert_eq!(bench.restore(&first).await, expected);
    assert!(!expected.contains_key(&b"d/gone"[..]));

    // Then they come to rest.
    for file in tree.files.lock().unwrap().values_mut() {
        file.at_read = None;
    }
    let second = bench.back_up(&tree, NOW_MS + 1).await;
    assert_eq!(bench.restore(&second).await, tree.expected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mapped_directories_and_wal_go_where_they_are_told() {
    let bench = Bench::new().await;
    let tree = Tree::new()
        .directory("pg_tblspc")
        .directory("pg_tblspc/16400")
        .directory("pg_tblspc/16400/PG_15")
        .directory("pg_wal")
        .file("pg_tblspc/16400/PG_15/1", rows(1, 30_000))
        .file("x", "x");
    let tree = Arc::new(tree);
    let summary = bench.back_up(&tree, NOW_MS).await;
    let backup = bench.open(&summary).await;
    let place = tempfile::tempdir().unwrap();
    let target = RestoreTarget {
        directory: place.path().join("data"),
        mapping: BTreeMap::from([(b"pg_tblspc/16400".to_vec(), place.path().join("fast/ts"))]),
        wal_directory: Some(b"pg_wal".to_vec()),
        ..RestoreTarget::default()
    };
    let plan = backup.restore_plan(target).await.unwrap();
    assert_eq!(plan.files, 5);
    assert_eq!(plan.places.len(), 2);
    assert_eq!(plan.places[1].needed_bytes, 30_000);
    plan.restore(RestoreOptions::default()).await.unwrap();
    let data = common::look(&place.path().join("data"));
    let link = place.path().join("fast/ts").to_str().unwrap().as_bytes().to_vec();
    assert_eq!(data[&b"pg_tblspc/16400"[..]], Node::Link(link));
    assert_eq!(data[&b"pg_wal/000000010000000000000001"[..]], Node::File(noise(99, 100_000)));
    let elsewhere = common::look(&place.path().join("fast/ts"));
    assert_eq!(elsewhere[&b"PG_15/1"[..]], Node::File(rows(1, 30_000)));
    assert_eq!(backup.wal_files().await.unwrap()[0].size_bytes, 100_000);
}
