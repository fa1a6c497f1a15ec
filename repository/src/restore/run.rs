//! Doing a restore: a thread walks the manifest and says what is to be where, others compare what is there, one gathers what
//! is wanted and sends for it, and others open frames and write.

use std::sync::Arc;
use std::thread::{Builder, Scope};

use super::compare::Comparer;
use super::fetch::Fetcher;
use super::marker::{MARKER, Unfinished};
use super::target;
use super::tree::Tree;
use super::walk::{How, Outlets, Walk};
use super::write::Writer;
use super::{Comparison, Existing, RestoreOptions, RestorePlan, RestoreSummary, RestoreTarget};
use crate::detect::Detection;
use crate::entry::Entry;
use crate::error::Error;
use crate::reader::Backup;
use crate::stop::Stop;

/// Requests in flight or waiting for a thread, beside one a thread.
const REQUESTS: usize = 8;
/// Stretches of files between the threads: a few files each.
const PIECES: usize = 16;
/// Lists of what is wanted that wait to be gathered; each is of one stretch.
const WANTS: usize = 256;

/// Restores. The caller has checked the plan.
pub(super) fn restore(
    plan: &RestorePlan,
    options: &RestoreOptions,
    stop: &Arc<Stop>,
) -> Result<RestoreSummary, Error> {
    let (backup, target) = (&plan.backup, &plan.target);
    super::places::make_room_for_handles(target)?;
    // An attempt that was given up for lost may still be at it.
    let locks = target.roots().map(|(_, directory)| Tree::lock(directory));
    let locks = locks.collect::<Result<Vec<_>, _>>()?;
    target::look_again(plan)?;
    let mapping = target.mapping.clone().into_iter();
    let tree = Tree::open(&target.directory, mapping)?;
    tree.mark(MARKER, Unfinished::of(backup).text().as_bytes())?;
    let how = if plan.reuses() { How::Mend } else { How::Make };
    if how == How::Mend {
        // First what makes the directory look complete.
        for root in &backup.root.late {
            for entry in stop.wait(backup.reader.entries(&root.shard))? {
                if tree.look(&entry.path)?.is_some() {
                    tree.remove(&entry.path)?;
                    tree.sync_parent(&entry.path)?;
                }
            }
        }
        for foreign in &plan.foreign {
            if tree.look(&foreign.name)?.is_some() {
                tree.remove(&foreign.name)?;
            }
        }
    }
    let wal = wal(backup, target, stop)?;
    let believes_cache = believes_cache(target, plan.resumes);
    let crew = Crew { backup, tree: &tree, options, stop, believes_cache };
    let mut walk = Walk::new(backup, target, &tree, stop, &options.progress, how);
    let root = &backup.root;
    crew.phase(options.processes, &mut walk, |walk, outlets| {
        walk.shards(&root.shards, outlets)?;
        walk.wal(wal, outlets)
    })?;
    walk.make_links()?;
    if let Some(addition) = &target.addition {
        let failed =
            |source| Error::Target { path: target.directory.display().to_string(), source };
        (addition.write)(&target.directory).map_err(failed)?;
    }
    tree.sync()?;
    // Only now what makes the directory look complete.
    crew.phase(1, &mut walk, |walk, outlets| walk.shards(&root.late, outlets))?;
    walk.make_links()?;
    for (path, mode) in &walk.late_modes {
        tree.set_file_mode(path, *mode)?;
    }
    for (path, mode) in walk.directories.iter().rev() {
        tree.set_directory_mode(path, *mode)?;
    }
    tree.sync()?;
    tree.unmark(MARKER)?;
    drop(locks);
    let counted = options.progress.snapshot();
    Ok(RestoreSummary {
        files: counted.files,
        bytes: counted.bytes,
        fetched_bytes: counted.bytes_stored,
        reused_bytes: counted.bytes_skipped,
    })
}

/// Compares and counts, and touches nothing.
pub(super) fn compare(
    backup: &Backup,
    target: &RestoreTarget,
    resumes: bool,
    options: &RestoreOptions,
    stop: &Arc<Stop>,
) -> Result<Comparison, Error> {
    let tree = Tree::open(&target.directory, target.mapping.clone().into_iter())?;
    let wal = wal(backup, target, stop)?;
    let root = &backup.root;
    let believes_cache = believes_cache(target, resumes);
    let crew = Crew { backup, tree: &tree, options, stop, believes_cache };
    let mut walk = Walk::new(backup, target, &tree, stop, &options.progress, How::Look);
    crew.phase(options.processes, &mut walk, |walk, outlets| {
        walk.shards(&root.shards, outlets)?;
        walk.wal(wal, outlets)
    })?;
    // What makes a directory look complete is taken away first, and so never found.
    let nothing = Tree::nothing();
    let crew = Crew { tree: &nothing, ..crew };
    let mut walk = Walk::new(backup, target, &nothing, stop, &options.progress, How::Look);
    crew.phase(1, &mut walk, |walk, outlets| walk.shards(&root.late, outlets))?;
    let counted = options.progress.snapshot();
    Ok(Comparison { reused_bytes: counted.bytes_skipped, fetch_bytes: counted.bytes_stored })
}

/// Whether what is compared may come out of the page cache.
fn believes_cache(target: &RestoreTarget, resumes: bool) -> bool {
    !resumes && matches!(target.existing, Existing::Replace { believe_cache: true, .. })
}

/// Everybody who works on one restore.
struct Crew<'a> {
    backup: &'a Backup,
    tree: &'a Tree,
    options: &'a RestoreOptions,
    stop: &'a Arc<Stop>,
    believes_cache: bool,
}

impl Crew<'_> {
    /// Runs `work` on this thread with the others beside it, and waits until everything it wanted is written.
    fn phase<'w>(
        &self,
        processes: usize,
        walk: &mut Walk<'w>,
        work: impl FnOnce(&mut Walk<'w>, &Outlets) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Self { backup, tree, options, stop, believes_cache } = *self;
        let progress = &options.progress;
        let processes = processes.max(1);
        let requests = processes + REQUESTS;
        let (pieces, compared) = crossbeam_channel::bounded(PIECES);
        let (wants, wanted) = crossbeam_channel::bounded(WANTS);
        let (ready, fetched) = crossbeam_channel::bounded(requests);
        let (looks, mends) = (walk.how == How::Look, walk.how == How::Mend);
        std::thread::scope(|scope| {
            if !looks {
                for n in 0..processes {
                    let (fetched, writer) =
                        (fetched.clone(), Writer::new(backup, tree, stop, progress));
                    spawn(scope, stop, format!("restore-{n}"), move || writer.run(&fetched));
                }
            }
            if looks || mends {
                for n in 0..processes {
                    let comparer = Comparer {
                        tree,
                        stop,
                        progress,
                        detection: Detection(backup.repository.keys.detection(backup.lineage())),
                        writes: mends,
                        believes_cache,
                        wants: wants.clone(),
                    };
                    let compared = compared.clone();
                    spawn(scope, stop, format!("compare-{n}"), move || comparer.run(&compared));
                }
            }
            let ready = (!looks).then_some(ready);
            let fetcher = Fetcher::new(backup, stop, progress, ready, requests);
            spawn(scope, stop, "restore-fetch".to_owned(), move || fetcher.run(&wanted));
            drop((compared, fetched));
            let outlets = Outlets { pieces, wants };
            if let Err(error) = work(walk, &outlets) {
                stop.fail(error);
            }
            // Each of the others ends when the one before it has; the writers, when the last request has been answered.
            drop(outlets);
        });
        stop.check().map_err(|_| stop.cause())
    }
}

/// A thread that ends everything when it fails.
fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    stop: &'scope Stop,
    name: String,
    run: impl FnOnce() -> Result<(), Error> + Send + 'scope,
) {
    let run = move || run().unwrap_or_else(|error| stop.fail(error));
    if let Err(source) = Builder::new().name(name).spawn_scoped(scope, run) {
        stop.fail(Error::Target { path: "a thread for the restore".into(), source });
    }
}

/// The WAL the backup brought along, where it is to go.
fn wal(backup: &Backup, target: &RestoreTarget, stop: &Stop) -> Result<Vec<Entry>, Error> {
    let Some(directory) = &target.wal_directory else { return Ok(Vec::new()) };
    let mut entries = stop.wait(backup.wal_entries())?;
    for entry in &mut entries {
        entry.path = [directory, &b"/"[..], &entry.path].concat();
    }
    Ok(entries)
}
