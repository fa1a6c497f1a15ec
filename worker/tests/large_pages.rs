//! A server that is built for sizes of which there are no packages (`tests/large-pages`): pages of 32 KiB, files of half a
//! MiB, pages of WAL of 64 KiB, segments of WAL of one MiB. Its WAL is archived and replayed in `recovery.rs`.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

mod house;
mod pages;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::process::Command;

use house::{
    DATA, House, LARGE_PAGES, nothing_is_left_on, replay, start_plainly, text, within_limit,
};
use postgres::block_sizes::BlockSizes;
use postgres::control_file::ControlFile;
use postgres::instance::{InstanceOptions, StopMode};
use proto::ProofLevel;
use proto::backup::BackupFacts;
use proto::job::BackupOutcome;
use worker::restoring;

const SIZES: BlockSizes = BlockSizes { page_bytes: 32_768, file_pages: 16, wal_page_bytes: 65_536 };
const FILE_BYTES: u64 = 16 * 32_768;

/// Eleven rows on a page, 176 in a file; values apart from their rows; indexes.
const LARGE: &str = "
    CREATE TABLE public.wide (id int PRIMARY KEY, filler text);
    ALTER TABLE public.wide ALTER filler SET STORAGE PLAIN;
    INSERT INTO public.wide SELECT g, repeat(md5(g::text), 90) FROM generate_series(1, 4000) g;
    CREATE TABLE public.apart (id int PRIMARY KEY, large text);
    ALTER TABLE public.apart ALTER large SET STORAGE EXTERNAL;
    INSERT INTO public.apart SELECT g, (SELECT string_agg(md5((1000 * g + n)::text), '') FROM generate_series(1, 3000) n)
      FROM generate_series(1, 20) g;
    CREATE INDEX apart_md5 ON public.apart (md5(large));
";

/// Every row of every table, as one text.
async fn content(url: &str) -> Vec<String> {
    let mut found = Vec::new();
    for table in ["orders", "wide", "apart"] {
        let sql = format!(
            "SELECT count(*) || ' ' || md5(string_agg(t::text, '' ORDER BY id)) FROM public.{table} t"
        );
        found.push(text(url, &sql).await);
    }
    found
}

async fn facts(house: &House, outcome: &BackupOutcome) -> BackupFacts {
    let repository = house.reopened().await;
    let found = restoring::find(&repository, None, None, Some(outcome.backup)).await.unwrap();
    found.facts().clone()
}

async fn is_proved(house: &House, outcome: &BackupOutcome) {
    let proof = within_limit(house.prove(ProofLevel::L5)).await;
    assert!(proof.backup == outcome.backup && proof.passed, "{:#?}", proof.checks);
    assert_eq!(proof.level_reached, Some(ProofLevel::L5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_of_large_pages_and_short_files_comes_back_page_by_page() {
    let settings = [("autovacuum", "off"), ("checkpoint_timeout", "1h"), ("wal_keep_size", "4GB")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let options = InstanceOptions {
        fsync: false,
        wal_segment_size_mb: Some(1),
        settings,
        ..InstanceOptions::default()
    };
    let mut house = House::new(LARGE_PAGES, options).await;
    let data = house.server.data_directory();
    let url = house.server.url("postgres");
    assert_eq!(BlockSizes::of(&ControlFile::read(&data).unwrap()), SIZES);
    house.sql(DATA).await;
    house.sql(LARGE).await;
    // Whoever reads a row for the first time marks its page; vacuum has done so for all of them.
    house.sql("VACUUM (FREEZE)").await;
    let wide = text(&url, "SELECT pg_relation_filepath('public.wide')").await;
    let file = |number: u32| data.join(format!("{wide}.{number}"));
    // The witness: the server's own files, which are replayed by the server alone.
    house.server.stop(StopMode::Fast).await.unwrap();
    let witness = house.place.path().join("witness");
    assert!(Command::new("cp").arg("-a").args([&data, &witness]).status().unwrap().success());
    house.server.start().await.unwrap();
    assert_eq!(fs::metadata(file(21)).unwrap().len(), FILE_BYTES, "the table has many files");

    let first = within_limit(house.back_up()).await;
    let known = facts(&house, &first).await;
    assert_eq!((known.block_size, known.wal_segment_size), (SIZES.page_bytes, 1 << 20));
    assert_eq!((known.data_checksums, first.bad_pages), (true, 0));
    nothing_is_left_on(&house).await;
    is_proved(&house, &first).await;

    // Pages here and there, values apart, and the last files go; then the same again, read over connections.
    house.sql("UPDATE public.wide SET filler = 'short' WHERE id IN (7, 1000, 2500)").await;
    house.sql("UPDATE public.apart SET large = reverse(large) WHERE id = 3").await;
    house.sql("INSERT INTO public.apart SELECT id + 100, md5(large) || large FROM public.apart WHERE id < 4").await;
    house.sql("DELETE FROM public.wide WHERE id > 3000").await;
    house.sql("VACUUM public.wide").await;
    house.sql("CHECKPOINT").await;
    assert!(fs::metadata(file(20)).map_or(0, |file| file.len()) == 0, "vacuum has cut it off");
    let second = within_limit(house.back_up()).await;
    assert_eq!(second.compared_with, Some(first.backup));
    assert!(second.stored_bytes * 3 < first.stored_bytes, "{first:?} {second:?}");
    house.read_over_connections();
    house.sql("UPDATE public.wide SET filler = 'over' WHERE id IN (500, 2900)").await;
    house.sql("INSERT INTO public.wide SELECT g, repeat('n', 2880) FROM generate_series(5001, 5200) g").await;
    house.sql("CHECKPOINT").await;
    let third = within_limit(house.back_up()).await;
    assert_eq!(third.compared_with, Some(second.backup));
    assert!(third.stored_bytes * 3 < first.stored_bytes, "{first:?} {third:?}");
    is_proved(&house, &third).await;
    let rows = content(&url).await;

    house.sql("CHECKPOINT; SELECT pg_switch_wal()").await;
    house.server.stop(StopMode::Fast).await.unwrap();
    let copy = house.place.path().join("restored");
    house.restore(&third, &copy).await;
    let command = format!("cp \"{}/%f\" \"%p\"", data.join("pg_wal").display());
    replay(&witness, LARGE_PAGES, third.stop_lsn, &command).await;
    replay(&copy, LARGE_PAGES, third.stop_lsn, "false").await;
    let compared = pages::same_pages(&copy, &witness);
    assert!(compared.pages > 1_000 && compared.files > 500, "{compared:?}");
    let running = start_plainly(&copy, LARGE_PAGES).await;
    assert_eq!(content(&running.1).await, rows);
    drop(running);

    // Nor is damage lost: the sixth page of the fourth file.
    let rotten = fs::File::options().write(true).open(file(3)).unwrap();
    rotten.write_all_at(b"rotten", 5 * u64::from(SIZES.page_bytes) + 20_000).unwrap();
    house.server.start().await.unwrap();
    for over_connections in [true, false] {
        if !over_connections {
            house.read_locally();
        }
        let last = within_limit(house.back_up()).await;
        let bad = facts(&house, &last).await.bad_pages;
        let told: Vec<_> = bad.iter().map(|bad| (bad.path.as_str(), bad.block)).collect();
        assert_eq!(
            told,
            [(format!("{wide}.3").as_str(), 5)],
            "over connections {over_connections}"
        );
    }
    let proof = within_limit(house.prove(ProofLevel::L4)).await;
    assert!(!proof.passed, "{proof:#?}");
    let told = format!("block 53 of relation {wide}");
    assert!(format!("{:?}", proof.checks).contains(&told), "{:#?}", proof.checks);
}
