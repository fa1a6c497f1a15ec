//! Which backups of a lineage stay, why, and which packs they need. Decides, deletes nothing.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use proto::{BackupId, LineageId};

use crate::collect::{Amount, CollectOptions};
use crate::error::Error;
use crate::layout;
use crate::lineage::{AttemptSummary, Seen, backups, has};
use crate::pack::PackId;
use crate::pins::SeenPin;
use crate::repository::Repository;
use crate::wal::{Start, WalBound};
use crate::wishes;

/// Why a backup stays.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Nobody gave it up.
    Wanted,
    /// It is the newest.
    Newest,
    /// It is the newest that was booted, and nothing was found wrong with it since.
    NewestProved,
    /// Somebody holds it.
    Held,
    /// Somebody reads it.
    Pinned {
        /// Who.
        by: String,
        /// What for.
        why: String,
        /// Since when, by their clock, Unix milliseconds.
        at_ms: i64,
    },
    /// It was given up too short a time ago.
    Grace {
        /// It goes from then on, Unix milliseconds.
        until_ms: i64,
    },
    /// It was given up by nobody who has the key.
    NotBelieved,
}

/// A backup, and what a collection does with it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Judged {
    /// The backup.
    pub backup: BackupId,
    /// When it was committed, Unix milliseconds; `None` when that cannot be read.
    pub committed_at_ms: Option<i64>,
    /// Somebody gave it up, and nobody took that back.
    pub given_up: bool,
    /// Why it stays. It goes when there is no reason.
    pub stays: Vec<Reason>,
    /// What it alone refers to, where that is known.
    pub alone: Option<Amount>,
}

impl Judged {
    /// It is deleted.
    pub fn goes(&self) -> bool {
        self.stays.is_empty()
    }
}

/// What has this date was made so long ago, or is so far in the future: nobody can say then how old it is.
pub(crate) fn is_older(at_ms: i64, now_ms: i64, than_ms: i64) -> bool {
    now_ms.abs_diff(at_ms) >= than_ms.unsigned_abs()
}

/// What a backup needs, by its manifest, which never changes.
#[derive(Debug)]
pub(crate) struct Needs {
    pub(crate) packs: Vec<PackId>,
    /// Where it begins in the log, if it is of a kind that does.
    pub(crate) start: Option<Start>,
}

/// What is known of the needs of backups.
pub(crate) type Roots = HashMap<BackupId, Needs>;

/// What stays.
pub(crate) struct Judgement {
    /// Every backup that is there, oldest first.
    pub(crate) backups: Vec<Judged>,
    /// Those that go.
    pub(crate) goes: Vec<BackupId>,
    /// Packs that those which stay refer to.
    pub(crate) packs: HashSet<PackId>,
}

impl Judgement {
    /// Before which segment no WAL is needed once those that go are gone. One that goes and cannot be read counts while it
    /// is there, so that nothing rests on what nobody knows.
    pub(crate) fn wal_bound(&self, roots: &Roots) -> WalBound {
        let starts = self.backups.iter().filter_map(|judged| {
            let needs = roots.get(&judged.backup);
            let counts = needs.is_none() || !self.goes.contains(&judged.backup);
            counts.then(|| (judged.backup, needs.and_then(|needs| needs.start)))
        });
        WalBound::by(starts)
    }
}

impl Repository {
    /// Judges every backup, by what was seen of the attempts. `planned` are those of which the collection said that they may
    /// go; every other one stays, whatever was wished since: who reads it or refers to it could not know. Fails when anything
    /// that stays cannot be read: what it refers to is unknown.
    pub(crate) async fn judge(
        &self,
        lineage: LineageId,
        options: &CollectOptions,
        planned: Option<&HashSet<BackupId>>,
        attempts: Vec<Seen>,
        roots: &mut Roots,
    ) -> Result<Judgement, Error> {
        let pins = self.list_pins(lineage).await?;
        let mut pinned: HashMap<BackupId, Vec<Reason>> = HashMap::new();
        for SeenPin { backup, pin, .. } in
            pins.into_iter().filter(|pin| !pin.is_older(options.now_ms, options.pins_for_ms))
        {
            let reason = Reason::Pinned { by: pin.by, why: pin.why, at_ms: pin.at_ms };
            pinned.entry(backup).or_default().push(reason);
        }
        let may = |backup| planned.is_none_or(|planned| planned.contains(&backup));
        let mut judgement =
            Judgement { backups: Vec::new(), goes: Vec::new(), packs: HashSet::new() };
        let mut readable = Vec::new();
        for seen in attempts {
            match seen.summary {
                Ok(summary) if summary.backup().is_none() => readable.push(summary),
                // What was given up and cannot be read is nobody's newest.
                Ok(summary)
                    if summary.has_manifest
                        && !(summary.forgotten
                            && self.is_damaged(lineage, seen.attempt.into(), roots).await?) =>
                {
                    readable.push(summary);
                }
                Err(Error::Damaged { .. }) if !has(&seen.names, "verdict") => {}
                Err(error) if !matches!(error, Error::Damaged { .. }) => return Err(error),
                _ => {
                    let judged = self.judge_damaged(lineage, seen, options).await?;
                    if may(judged.backup) {
                        judgement.goes.push(judged.backup);
                    }
                    judgement.backups.push(judged);
                }
            }
        }
        let readable = backups(readable);
        let newest = readable.last().and_then(AttemptSummary::backup);
        let proved = self.newest_proved(lineage, &readable).await?;
        for summary in &readable {
            let Some(backup) = summary.backup() else { continue };
            let mut stays = self.wishes_of(lineage, backup, summary, options).await?;
            stays.extend((newest == Some(backup)).then_some(Reason::Newest));
            stays.extend((proved == Some(backup)).then_some(Reason::NewestProved));
            stays.extend(pinned.remove(&backup).unwrap_or_default());
            if stays.is_empty() && may(backup) {
                judgement.goes.push(backup);
            } else {
                judgement.packs.extend(self.packs_of(lineage, backup, roots).await?);
            }
            judgement.backups.push(Judged {
                backup,
                committed_at_ms: summary.committed_at_ms(),
                given_up: summary.forgotten,
                stays,
                alone: None,
            });
        }
        Ok(judgement)
    }

    async fn wishes_of(
        &self,
        lineage: LineageId,
        backup: BackupId,
        summary: &AttemptSummary,
        options: &CollectOptions,
    ) -> Result<Vec<Reason>, Error> {
        let mut stays = Vec::new();
        if !summary.forgotten {
            stays.push(Reason::Wanted);
        } else if let Some(wish) = self.forgotten_by(lineage, backup, &summary.forgets).await? {
            let until_ms = wish.at_ms.saturating_add(options.grace_ms);
            stays.extend((until_ms > options.now_ms).then_some(Reason::Grace { until_ms }));
        } else {
            stays.push(Reason::NotBelieved);
        }
        stays.extend(summary.held.then_some(Reason::Held));
        Ok(stays)
    }

    /// Whether the manifest of a backup is there and cannot be believed.
    async fn is_damaged(
        &self,
        lineage: LineageId,
        backup: BackupId,
        roots: &mut Roots,
    ) -> Result<bool, Error> {
        match self.packs_of(lineage, backup, roots).await {
            Err(Error::Damaged { .. }) => Ok(true),
            // A collector was faster.
            Ok(_) | Err(Error::Missing { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A backup whose verdict or manifest cannot be believed, or whose manifest is not there. It goes, or nobody knows what it
    /// needs, and nothing may be collected.
    async fn judge_damaged(
        &self,
        lineage: LineageId,
        seen: Seen,
        options: &CollectOptions,
    ) -> Result<Judged, Error> {
        let backup: BackupId = seen.attempt.into();
        let is_there = has(&seen.names, "manifest");
        let ends: Vec<String> = wishes::forgets(&seen.names).map(str::to_owned).collect();
        let wish = self.forgotten_by(lineage, backup, &ends).await?;
        let until_ms = wish.map(|wish| wish.at_ms.saturating_add(options.grace_ms));
        let is_over = until_ms.is_some_and(|until_ms| until_ms <= options.now_ms);
        if is_over && !wishes::is_held(&seen.names) {
            let (stays, alone) = (Vec::new(), None);
            let committed_at_ms = seen.summary.ok().and_then(|seen| seen.committed_at_ms());
            return Ok(Judged { backup, committed_at_ms, given_up: true, stays, alone });
        }
        let key = layout::of_backup(lineage, backup, "manifest");
        Err(match seen.summary {
            Err(error) => error,
            Ok(_) if is_there => Error::damaged(key, "it cannot be believed"),
            Ok(_) => Error::Missing { key },
        })
    }

    pub(crate) async fn packs_of<'a>(
        &self,
        lineage: LineageId,
        backup: BackupId,
        roots: &'a mut Roots,
    ) -> Result<&'a [PackId], Error> {
        let needs = match roots.entry(backup) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let opened = self.open_backup(lineage, backup).await?;
                let packs = opened.root.packs.keys().copied().collect();
                unknown.insert(Needs { packs, start: Start::of(opened.facts()) })
            }
        };
        Ok(&needs.packs)
    }
}
