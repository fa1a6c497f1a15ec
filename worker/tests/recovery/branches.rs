//! Which of several ends of history a recovery goes to, on real servers that archive into one lineage: a copy that opened while
//! its source went on, and one that opened beside that copy.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use repository::Wish;
use tokio::time::Instant;

use super::{World, said, start, stop};
use crate::house::eventually;
use postgres::instance::StopMode;

const UNREACHABLE: &str = "RECOVERY_TARGET_UNREACHABLE";
const ASKED: &str = "REQUEST_INVALID";

/// Another server than the one that the world is at: its port, and its rows.
type Other = (Option<u16>, BTreeSet<i64>);

impl World {
    fn turn(&mut self, other: &mut Other) {
        std::mem::swap(&mut self.port, &mut other.0);
        std::mem::swap(&mut self.rows, &mut other.1);
    }

    /// Which rows a recovery has, whoever else is running.
    async fn seen(&mut self, arguments: &[&str]) -> BTreeSet<i64> {
        let mut aside = (Some(5499), BTreeSet::new());
        self.turn(&mut aside);
        let rows = self.rows_at("seen", &[arguments, &["--port", "5499"]].concat()).await;
        self.turn(&mut aside);
        rows
    }

    /// What a plan says.
    fn planned(&self, arguments: &[&str]) -> String {
        let into = self.house.place.path().join("planned");
        let done = self.restore(&into, &[arguments, &["--plan"]].concat());
        assert!(done.status.success(), "{arguments:?}: {}", said(&done));
        said(&done)
    }

    /// A server that opens at a port of its own.
    async fn branch(&mut self, port: u16, arguments: &[&str], timeline: u32) -> (PathBuf, Other) {
        let mut source = (Some(port), BTreeSet::new());
        self.turn(&mut source);
        let number = port.to_string();
        let words = [arguments, &["--port", &number]].concat();
        let place = self.succeed(&format!("at-{port}"), &words, timeline).await;
        (place, source)
    }
}

async fn several_ends(major: u32) {
    let mut world = World::new(major, 1).await;
    let oldest = world.house.back_up().await;
    let common = world.step().await;
    world.archived().await;
    let begun = Instant::now();
    let name = format!("name:{}", common.name);
    let (second, mut other) = world.branch(5433, &["--to", &name], 2).await;
    assert_eq!(world.rows, common.rows);
    // Both write, the source last.
    world.turn(&mut other);
    let lost = world.step().await;
    world.turn(&mut other);
    let kept = world.step().await;
    world.archived().await;
    world.turn(&mut other);
    let last = world.step().await;
    let silent = Instant::now();
    let own = world.house.back_up().await;
    world.archived().await;

    let both = ["--timeline 1", "--timeline 2", "which parted at"];
    world.refused(&["--to", "latest"], ASKED, &both);
    world.refused(&["--to", &lost.time], ASKED, &["--timeline 1", "--timeline 2", "parted"]);
    world.refused(&["--to", &last.time], UNREACHABLE, &["timeline 2", "--timeline 1 leads there"]);
    assert_eq!(world.seen(&["--to", "latest", "--timeline", "1"]).await, last.rows);
    assert_eq!(world.seen(&["--to", "latest", "--timeline", "2"]).await, kept.rows);
    assert_eq!(world.seen(&["--to", &common.time]).await, common.rows, "both have that");
    let named = ["--to", "latest", "--backup", &own.backup.to_string()];
    world.refused(&named, UNREACHABLE, &["timeline 2 left timeline 1 at", "with --timeline 1."]);

    // The source is gone, and its successor outlives it for longer than they were two.
    world.house.server.stop(StopMode::Fast).await.unwrap();
    world.turn(&mut other);
    let alone = silent + silent.duration_since(begun);
    let outlived = async || (Instant::now() > alone).then_some(());
    eventually("the copy has outlived its source", Duration::from_mins(5), outlived).await;
    let grown = world.step().await;
    world.archived().await;
    let text = world.planned(&["--to", "latest"]);
    for words in [
        "recover to the end of the WAL along timeline 2",
        "the way leaves timeline 1 at ",
        "timeline 2 left timeline 1 at ",
        "--timeline 1 leads there",
    ] {
        assert!(text.contains(words), "{words:?}: {text}");
    }
    assert_eq!(world.seen(&["--to", "latest"]).await, grown.rows);
    let text = world.planned(&["--to", "latest", "--timeline", "1"]);
    assert!(text.contains("--timeline 2 leads there"), "{text}");
    let into = world.house.place.path().join("told");
    let done = world.restore(&into, &["--to", "latest"]);
    let told = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(told.contains("--timeline 1 leads there"), "{}", said(&done));
    stop(major, &second, "fast").await;

    // One that opens beside it, where neither comes from the other.
    let (third, _) = world.branch(5434, &["--to", &name, "--timeline", "1"], 3).await;
    let sibling = world.step().await;
    world.archived().await;
    assert_eq!(world.seen(&["--to", "latest"]).await, sibling.rows);
    stop(major, &third, "fast").await;
    start(major, &second).await;
    (world.port, world.rows) = (Some(5433), grown.rows);
    let revived = world.step().await;
    world.archived().await;
    stop(major, &second, "fast").await;
    world.refused(&["--to", "latest"], ASKED, &["--timeline 2", "--timeline 3"]);
    assert_eq!(world.seen(&["--to", "latest", "--timeline", "2"]).await, revived.rows);

    // The one backup that stays is on the branch that both left.
    let lineage = world.house.repository.list_lineages().await.unwrap().remove(0).lineage;
    let wish = Wish { by: "tester".into(), why: String::new(), at_ms: 1 };
    world.house.repository.forget(lineage, oldest.backup, &wish).await.unwrap();
    let words = ["timeline 3 left timeline 1 at", "with --timeline 1."];
    world.refused(&["--to", "latest"], UNREACHABLE, &words);
    assert_eq!(world.seen(&["--to", "latest", "--timeline", "1"]).await, last.rows);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_of_history_that_may_be_abandoned_is_never_taken_in_silence() {
    Box::pin(several_ends(15)).await;
}
