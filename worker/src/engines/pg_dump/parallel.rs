//! Loading one dump with several sessions, without a copy of it on disk: each `pg_restore` is fed with the contents and the data of
//! the tables that it is to fill, read from the repository side by side.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use postgres::archive::{Contents, Phase};
use postgres::process::Program;
use proto::Failure;
use proto::backup::DumpLayout;
use repository::FileContent;

use super::children::feed;
use super::lists::{Head, List, private_file};
use super::load::SAID_BYTES;

/// Bytes that are worth another program.
const BATCH_BYTES_MIN: u64 = 8 << 20;
/// Batches for each session: so many that the sessions end together, and few enough that the contents are not read all the time.
const BATCHES_PER_SESSION: u64 = 4;

/// One dump and how it is loaded.
pub(super) struct Parallel<'a> {
    /// For messages: `database shop`.
    pub(super) what: &'a str,
    pub(super) content: &'a FileContent,
    pub(super) head: &'a Head,
    pub(super) layout: &'a DumpLayout,
    /// Entries that are left out.
    pub(super) leave: &'a BTreeSet<u32>,
    /// Sessions at once.
    pub(super) jobs: u32,
    /// A directory for lists.
    pub(super) scratch: &'a Path,
    /// Makes the database, and what rows need.
    pub(super) first: Program,
    /// Loads into the database.
    pub(super) then: Program,
}

/// What one program loads.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Batch {
    ids: Vec<u32>,
    /// Where in the file their data are.
    parts: Vec<Range<u64>>,
    bytes: u64,
}

impl Parallel<'_> {
    /// Loads all of it, in the order of `pg_restore`: definitions; rows; indexes and whatever comes behind them. `told` hears how
    /// many bytes of the file have been loaded.
    pub(super) async fn load(&self, told: impl Fn(u64) + Sync) -> Result<(), Failure> {
        self.feed(&self.first, self.ids(Phase::Before), stream::empty()).await?;
        let done = AtomicU64::new(self.layout.contents_bytes);
        let (done, told) = (&done, &told);
        let jobs = usize::try_from(self.jobs).unwrap_or(usize::MAX);
        let batches = batches(&self.head.contents, self.layout, self.leave, self.jobs);
        let loading = batches.into_iter().map(|batch| async move {
            let data = self.content.parts(&batch.parts).inspect(|piece| {
                if let Ok(piece) = piece {
                    let bytes = piece.len() as u64;
                    told(done.fetch_add(bytes, Ordering::Relaxed) + bytes);
                }
            });
            self.feed(&self.then, batch.ids.into_iter(), data).await
        });
        stream::iter(loading).buffer_unordered(jobs).try_collect::<()>().await?;
        // Several sessions read several times: what they read is a file, but one without rows.
        let head = private_file(self.scratch, &self.head.bytes)?;
        let list = List::of(self.ids(Phase::After), self.scratch)?;
        let program = list.apply(self.then.clone());
        let program = program.arg(format!("--jobs={}", self.jobs)).arg(head.path());
        feed(self.what, &program, stream::empty(), SAID_BYTES).await.map(drop)
    }

    fn ids(&self, wanted: Phase) -> impl Iterator<Item = u32> {
        let entries = self.head.contents.phases().filter(move |(_, phase)| *phase == wanted);
        entries.map(|(entry, _)| entry.id).filter(|id| !self.leave.contains(id))
    }

    /// Has a program load these entries from an archive that has their data and no other.
    async fn feed(
        &self,
        program: &Program,
        ids: impl Iterator<Item = u32>,
        data: impl Stream<Item = Result<Bytes, repository::Error>>,
    ) -> Result<(), Failure> {
        let list = List::of(ids, self.scratch)?;
        let head = stream::iter([Ok(self.head.bytes.clone())]);
        let mut archive = std::pin::pin!(head.chain(data));
        feed(self.what, &list.apply(program.clone()), archive.as_mut(), SAID_BYTES).await?;
        // What is left when pg_restore has all that it needs was stored all the same, and is to be sound.
        while let Some(piece) = archive.next().await {
            piece?;
        }
        Ok(())
    }
}

/// Shares the data out: neighbours together, because they are stored together; the largest first, because the others can be loaded
/// beside them. What is no table's rows goes together, in its order.
fn batches(
    contents: &Contents,
    layout: &DumpLayout,
    leave: &BTreeSet<u32>,
    jobs: u32,
) -> Vec<Batch> {
    let (mut others, mut tables) = (Batch::default(), HashSet::new());
    for (entry, phase) in contents.phases() {
        match phase {
            Phase::Rows if leave.contains(&entry.id) => {}
            Phase::Rows if entry.has_rows => drop(tables.insert(entry.id)),
            Phase::Rows => others.ids.push(entry.id),
            Phase::Before | Phase::After => {}
        }
    }
    let wanted = layout.blocks.iter().filter(|(id, _)| !leave.contains(id));
    let total: u64 = wanted.map(|(_, bytes)| bytes).sum();
    let enough = total / (u64::from(jobs.max(1)) * BATCHES_PER_SESSION);
    let enough = enough.max(BATCH_BYTES_MIN);
    let mut batches = Vec::new();
    let mut batch = Batch::default();
    let mut start = layout.contents_bytes;
    for (id, bytes) in &layout.blocks {
        let part = start..start.saturating_add(*bytes);
        start = part.end;
        if leave.contains(id) {
            continue;
        }
        if !tables.contains(id) {
            others.add(part);
            continue;
        }
        if !batch.ids.is_empty() && batch.bytes + bytes > enough {
            batches.push(std::mem::take(&mut batch));
        }
        batch.ids.push(*id);
        batch.add(part);
    }
    batches.extend([batch, others].into_iter().filter(|batch| !batch.ids.is_empty()));
    batches.sort_by_key(|batch| Reverse(batch.bytes));
    batches
}

impl Batch {
    fn add(&mut self, part: Range<u64>) {
        self.bytes += part.end - part.start;
        match self.parts.last_mut() {
            Some(last) if last.end == part.start => last.end = part.end,
            _ => self.parts.push(part),
        }
    }
}

#[cfg(test)]
mod tests {
    use postgres::archive::{Entry, Section};

    use super::*;

    fn entry(id: u32, kind: &str) -> Entry {
        Entry {
            id,
            kind: kind.to_owned(),
            name: format!("e{id}").into_bytes(),
            schema: None,
            section: Some(if kind == "TABLE" { Section::PreData } else { Section::Data }),
            has_data: kind != "TABLE",
            has_rows: kind == "TABLE DATA",
            needs: Vec::new(),
        }
    }

    #[test]
    fn neighbours_go_together_the_largest_goes_first_and_nothing_goes_twice_or_not_at_all() {
        let rows = (2..=9).map(|id| entry(id, "TABLE DATA"));
        let entries = [entry(1, "TABLE")].into_iter().chain(rows);
        let entries = entries.chain([entry(10, "SEQUENCE SET"), entry(11, "BLOBS")]).collect();
        let contents = Contents { bytes: 100, entries };
        let mib = |n: u64| n << 20;
        // 6 is large; around it are small ones.
        let sizes = [1, 2, 1, 3, 900, 1, 7, 1].map(mib);
        let mut blocks: Vec<(u32, u64)> = (2..=9).zip(sizes).collect();
        blocks.push((11, mib(4)));
        let layout = DumpLayout { contents_bytes: 100, blocks };
        let made = batches(&contents, &layout, &BTreeSet::from([4]), 2);
        let ids: Vec<&[u32]> = made.iter().map(|batch| &batch.ids[..]).collect();
        assert_eq!(ids, [&[6][..], &[7, 8, 9], &[2, 3, 5], &[10, 11]]);
        assert_eq!((made[0].parts.len(), &made[0].parts[0]), (1, &(100 + mib(7)..100 + mib(907))));
        assert_eq!(made[2].parts, [100..100 + mib(3), 100 + mib(4)..100 + mib(7)], "4 is left out");
        // What is left out is read by nobody.
        assert_eq!(made[3].parts, std::slice::from_ref(&(100 + mib(916)..100 + mib(920))));
        let none = batches(
            &contents,
            &DumpLayout { contents_bytes: 100, blocks: vec![] },
            &BTreeSet::new(),
            2,
        );
        assert_eq!(none.len(), 1, "positions of sequences have no data");
    }
}
