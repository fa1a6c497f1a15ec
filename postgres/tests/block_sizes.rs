//! Files of servers that are built for other sizes, made by `golden/block_sizes/make`, against what those servers said of them;
//! and the reading of pages of every size.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use postgres::block_sizes::BlockSizes;
use postgres::control_file::ControlFile;
use postgres::files::LocalFiles;
use postgres::page::{self, PageState};
use postgres::relation::{PageRules, RelationFile, RelationReader};
use postgres::version::ServerVersion;
use postgres::wal::{SegmentHeader, WalOrigin, is_whole};
use postgres::wal_changes::WalChanges;
use postgres::wal_moments::{self, Event};
use proto::wal::{Segment, SegmentName};
use proto::{Lsn, Timeline};

const MIB: u32 = 1 << 20;

/// The files of one server, unpacked.
struct Golden {
    place: tempfile::TempDir,
    control: ControlFile,
    /// What it said, by its first word.
    said: BTreeMap<String, Vec<Vec<String>>>,
}

impl Golden {
    fn of(name: &str) -> Self {
        let from =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/block_sizes").join(name);
        let place = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&from).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "zst") {
                let content = zstd::decode_all(std::fs::File::open(&path).unwrap()).unwrap();
                std::fs::write(place.path().join(path.file_stem().unwrap()), content).unwrap();
            }
        }
        let mut control = std::fs::read(from.join("pg_control")).unwrap();
        control.resize(8192, 0);
        let control = ControlFile::parse(&control).unwrap();
        let mut said = BTreeMap::<_, Vec<_>>::new();
        for line in std::fs::read_to_string(from.join("said")).unwrap().lines() {
            let mut words = line.split(' ').map(str::to_owned);
            said.entry(words.next().unwrap()).or_default().push(words.collect());
        }
        Self { place, control, said }
    }

    fn one(&self, what: &str) -> &[String] {
        &self.said[what][0]
    }

    fn number(&self, what: &str, word: usize) -> u32 {
        self.one(what)[word].parse().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// As for a backup that began when all this was there.
    fn rules(&self) -> PageRules {
        PageRules {
            block_size: self.control.block_size,
            segment_blocks: self.control.relation_segment_blocks,
            checksums: self.control.has_checksums(),
            backup_start: self.control.redo,
        }
    }
}

/// By the names of their directories: what each was configured with.
fn every_server() -> [(Golden, BlockSizes); 3] {
    [
        ("4k", BlockSizes { page_bytes: 4096, file_pages: 64, wal_page_bytes: 4096 }),
        ("16k", BlockSizes { page_bytes: 16_384, file_pages: 32, wal_page_bytes: 16_384 }),
        ("32k", BlockSizes { page_bytes: 32_768, file_pages: 16, wal_page_bytes: 65_536 }),
    ]
    .map(|(name, sizes)| (Golden::of(name), sizes))
}

fn read_whole(directory: &Path, name: &str, rules: PageRules) -> (Vec<u8>, RelationReader) {
    let (files, path) = (LocalFiles::new(directory), Path::new(name));
    let file = RelationFile::parse(name).unwrap();
    let mut reader = RelationReader::open_in(&files, path, 0, file, rules).unwrap().unwrap();
    let mut bytes = vec![0; usize::try_from(path_bytes(&directory.join(name))).unwrap()];
    let read = reader.read_at(0, &mut bytes).unwrap();
    assert_eq!(read, bytes.len());
    (bytes, reader)
}

fn path_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

#[test]
fn a_control_file_tells_the_sizes_of_its_cluster() {
    for (golden, sizes) in every_server() {
        assert_eq!(BlockSizes::of(&golden.control), sizes);
        assert_eq!((golden.control.wal_segment_size, golden.control.checksum_version), (MIB, 1));
    }
}

#[test]
fn pages_of_other_sizes_have_the_checksums_that_their_servers_computed() {
    for (golden, sizes) in every_server() {
        let filenode = golden.number("filenode", 0).to_string();
        let files = [filenode.clone(), format!("{filenode}.1")];
        let said = golden.said["page"].iter().map(|words| {
            let checksum: u16 = words[1].parse().unwrap();
            (words[0].parse::<u32>().unwrap(), checksum, words[2].parse::<Lsn>().unwrap())
        });
        let said: Vec<_> = said.collect();
        let mut seen = 0;
        for (file, name) in (0_u32..).zip(&files) {
            let (bytes, reader) = read_whole(golden.place.path(), name, golden.rules());
            assert_eq!(reader.bad_blocks(), [0_u32; 0], "{sizes}, {name}");
            assert_eq!(reader.torn_pages(), 0);
            let pages = bytes.chunks_exact(sizes.page_bytes as usize);
            for (number, page) in (file * sizes.file_pages..).zip(pages) {
                assert_eq!(said[seen], (number, page::stored_checksum(page), page::lsn(page)));
                assert_eq!(page::checksum(page, number), page::stored_checksum(page));
                assert_eq!(page::inspect(page, number, true), PageState::Valid);
                seen += 1;
            }
            // Counted as if files were longer or shorter, no page of the second is right.
            let wrong = PageRules { segment_blocks: sizes.file_pages + 1, ..golden.rules() };
            let (_, reader) = read_whole(golden.place.path(), name, wrong);
            assert_eq!(reader.bad_blocks().is_empty(), file == 0, "{sizes}, {name}");
        }
        assert_eq!(seen, said.len(), "{sizes}");
        assert!(seen > sizes.file_pages as usize, "{sizes}: some of the second file");
        // Pages of another size are none.
        let rules = PageRules { block_size: 8192, ..golden.rules() };
        let (_, reader) = read_whole(golden.place.path(), &files[0], rules);
        assert!(!reader.bad_blocks().is_empty(), "{sizes}");
    }
}

#[test]
fn the_log_of_a_server_with_other_pages_is_read() {
    for (golden, sizes) in every_server() {
        let name: SegmentName = golden.one("segment")[0].parse().unwrap();
        let content = std::fs::read(golden.path(&name.to_string())).unwrap();
        let segment: Segment = name.segment(MIB).unwrap();
        let start = segment.start(MIB);
        let header = SegmentHeader::parse(&content).unwrap();
        assert_eq!((header.major(), header.block_size), (15, sizes.wal_page_bytes));
        let system_identifier = golden.control.system_identifier;
        let origin = WalOrigin { major: 15, system_identifier, segment_size: MIB };
        origin.verify(segment, &content).unwrap();
        assert!(is_whole(&content, start), "{sizes}: it was ended by a switch");
        let half = [&content[..content.len() / 16], &vec![0; content.len() / 16 * 15]].concat();
        assert!(!is_whole(&half, start), "{sizes}: its end was not written");

        let said = wal_moments::read(15, start, &content, None).unwrap();
        let events: Vec<_> = said.moments.iter().map(|moment| &moment.event).collect();
        let commits = [golden.number("inserted", 1), golden.number("deleted", 1)];
        let [first, second] = commits.map(Event::Commit);
        let named = Event::RestorePoint("golden".to_owned());
        for event in [&first, &second, &named] {
            assert!(events.contains(&event), "{sizes}: {event:?} in {events:?}");
        }
        let restore_point: Lsn = golden.one("restore_point")[0].parse().unwrap();
        let last = said.moments.iter().find(|moment| moment.event == named).unwrap();
        assert_eq!(last.end, restore_point, "{sizes}");
        assert!(
            last.end.0 - start.0 > u64::from(sizes.wal_page_bytes),
            "on a page behind the first"
        );

        // A segment that follows a switch begins with the beginning of a record.
        let begins = Lsn(start.0 + 40);
        let mut changes = WalChanges::new(ServerVersion(150_018), begins);
        changes.feed(start, &content).unwrap();
        assert_eq!(changes.read_to(), segment.end(MIB), "{sizes}");
        let (database, file_node) = (golden.number("database", 0), golden.number("filenode", 0));
        let rows = changes.of_table(database, file_node, begins, restore_point).unwrap();
        let expected = [golden.number("inserted", 0), golden.number("deleted", 0)].map(u64::from);
        assert_eq!([rows.inserted, rows.deleted], expected, "{sizes}");
        assert_eq!(segment.timeline, Timeline(1));
    }
}

/// Pages as a server would write them: no content that anybody knows, a header that is possible, a right checksum.
fn written(number: u32, page_bytes: u16, changed_at: Lsn) -> Vec<u8> {
    let mut page: Vec<u8> = (0..u32::from(page_bytes))
        .map(|at| at.wrapping_mul(number.wrapping_mul(2).wrapping_add(31)).to_ne_bytes()[0])
        .collect();
    let [high, low] = [changed_at.0 >> 32, changed_at.0 & 0xffff_ffff];
    page[..4].copy_from_slice(&u32::try_from(high).unwrap().to_ne_bytes());
    page[4..8].copy_from_slice(&u32::try_from(low).unwrap().to_ne_bytes());
    for (at, value) in [(10, 0_u16), (12, 24), (14, 100), (16, page_bytes)] {
        page[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    }
    let checksum = page::checksum(&page, number);
    page[8..10].copy_from_slice(&checksum.to_ne_bytes());
    page
}

#[test]
fn damage_is_told_by_its_page_whatever_the_size_of_pages_and_files() {
    const FILE_PAGES: u32 = 11;
    let place = tempfile::tempdir().unwrap();
    let of_size = |page_bytes: u16| {
        let directory = place.path().join(page_bytes.to_string());
        std::fs::create_dir(&directory).unwrap();
        let rules = PageRules {
            block_size: page_bytes.into(),
            segment_blocks: FILE_PAGES,
            checksums: true,
            backup_start: Lsn(1 << 33),
        };
        for file in [0_u32, 1, 7] {
            let name = if file == 0 { "16384".to_owned() } else { format!("16384.{file}") };
            let numbers = file * FILE_PAGES..(file + 1) * FILE_PAGES;
            let pages = numbers.map(|number| written(number, page_bytes, Lsn((1 << 32) + 8)));
            let mut bytes: Vec<u8> = pages.flatten().collect();
            let size = usize::from(page_bytes);
            bytes[2 * size + size / 2] ^= 4;
            bytes[9 * size + size - 1] ^= 1;
            // Changed since the backup began, and whole when it is replayed.
            bytes[5 * size..6 * size].copy_from_slice(&written(0, page_bytes, Lsn(1 << 34)));
            std::fs::write(directory.join(&name), &bytes).unwrap();
            let path = Path::new(&name);
            let relation = RelationFile::parse(&name).unwrap();
            let files = LocalFiles::new(&directory);
            let mut reader =
                RelationReader::open_in(&files, path, 0, relation, rules).unwrap().unwrap();
            // In two stretches, and no further than the end.
            let mut read = vec![0; 20 * size];
            assert_eq!(reader.read_at(0, &mut read[..4 * size]).unwrap(), 4 * size);
            assert_eq!(reader.read_at(4 * size as u64, &mut read[4 * size..]).unwrap(), 7 * size);
            assert_eq!(read[..11 * size], bytes, "what is damaged is copied as it is");
            assert_eq!(reader.bad_blocks(), [2, 9], "pages of {page_bytes}, {name}");
            assert_eq!(reader.torn_pages(), 1, "pages of {page_bytes}, {name}");
            let inside = reader.read_at(size as u64 / 2, &mut read).unwrap_err();
            assert_eq!(inside.kind(), std::io::ErrorKind::InvalidInput);
        }
    };
    // Whoever sees damage looks again for a while.
    std::thread::scope(|scope| {
        for kib in [1, 2, 4, 8, 16, 32] {
            scope.spawn(move || of_size(kib << 10));
        }
    });
}
