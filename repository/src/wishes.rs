//! What people and retention wish for a backup: that it goes (`forget`), that this is taken back (`remember`), that it stays
//! (`hold`), that this is over (`release`).
//!
//! A wish is an object beside the backup; what follows from it is the collector's affair. `forget` and `hold` exclude each
//! other: each is written first and looks for the other afterwards, so of two at the same time at most one stands.
//!
//! No wish is ever deleted: a late request could bring it back, or take away what was wished since. A `forget` is taken back by
//! the `remember` of the same number (`forget` and `remember`, `forget.1` and `remember.1`, …), and a later one takes the next
//! number. One that is not believed takes a number as well, and is in nobody's way. A `hold` has a name that nobody else uses,
//! so whoever lost against a `forget` takes back its own and no other.

use proto::backup::LogicalFacts;
use proto::envelope::Signed;
use proto::failure::chain;
use proto::proof::{CheckOutcome, ProofCheck};
use proto::{AttemptId, BackupId, DatabaseName, LineageId, Proof, ProofLevel};

use crate::attempt::is_doomed;
use crate::error::Error;
use crate::lineage::{AttemptSummary, has};
use crate::note;
use crate::record::{Gone, Outcome, Wish};
use crate::repository::Repository;
use crate::store::PutOutcome;
use crate::{chance, hex, layout};

const FORGET: &str = "forget";
const REMEMBER: &str = "remember";
const HOLD: &str = "hold";
const RELEASE: &str = "release";
/// What an undone deletion is called where it is refused.
const TAKE_BACK: &str = "take back the deletion of";
/// Times that a backup may be given up.
const FORGETS_MAX: u32 = 1000;

/// What the names of the `forget` objects that nobody took back end with: nothing, or a dot and a number.
pub(crate) fn forgets(names: &[String]) -> impl Iterator<Item = &str> {
    standing(names, FORGET, REMEMBER)
}

/// Whether somebody wants it kept. The presence of either object counts.
pub(crate) fn is_held(names: &[String]) -> bool {
    standing(names, HOLD, RELEASE).next().is_some()
}

/// What the names of wishes end with that nobody took back.
fn standing<'a>(
    names: &'a [String],
    wish: &'static str,
    end: &'static str,
) -> impl Iterator<Item = &'a str> {
    let ends = move |name: &'static str| {
        let ends = names.iter().filter_map(move |known| known.strip_prefix(name));
        ends.filter(|end| end.is_empty() || end.starts_with('.'))
    };
    ends(wish).filter(move |standing| !ends(end).any(|taken_back| taken_back == *standing))
}

fn numbered(name: &str, end: &str) -> String {
    format!("{name}{end}")
}

impl Repository {
    /// Gives a backup up: a collector may delete it. Refused for the newest backup, the newest proved one, and one that is
    /// held. Idempotent: the first wish stands.
    pub async fn forget(
        &self,
        lineage: LineageId,
        backup: BackupId,
        wish: &Wish,
    ) -> Result<(), Error> {
        let refuse =
            |reason: &str| Err(Error::Wanted { what: FORGET, backup, reason: reason.to_owned() });
        self.check_writable()?;
        let backups = self.list_readable_backups(lineage).await?;
        let Some(summary) = backups.iter().find(|other| other.backup() == Some(backup)) else {
            return Err(Error::BackupUnknown { lineage, backup });
        };
        if summary.held {
            return refuse("it is held");
        }
        if backups.last().and_then(AttemptSummary::backup) == Some(backup) {
            return refuse("it is the newest one");
        }
        if self.newest_proved(lineage, &backups).await? == Some(backup) {
            return refuse("it is the newest one that was proved");
        }
        if let Some(database) = self.only_here(lineage, backup, &backups).await? {
            return refuse(&format!(
                "it is the newest one that has database {database}, which a later one could not dump"
            ));
        }
        self.write_forget(lineage, backup, wish).await
    }

    /// A database that a backup has, a later one was to have and could not dump, or left out, and no later one has that stays. One that
    /// dumped all there was, without it, says that it exists no more.
    async fn only_here(
        &self,
        lineage: LineageId,
        backup: BackupId,
        backups: &[AttemptSummary],
    ) -> Result<Option<DatabaseName>, Error> {
        if self.identity(lineage).await?.kind.is_physical() {
            return Ok(None);
        }
        let mut later = Vec::new();
        for summary in backups.iter().rev().filter(|summary| !summary.forgotten) {
            let Some(id) = summary.backup() else { continue };
            let Some(facts) = self.logical_facts(lineage, id).await? else { continue };
            if id != backup {
                later.push(facts);
                continue;
            }
            let only = facts.databases.into_iter().map(|dump| dump.database).find(|database| {
                // Newest first: one that left nothing out has the word, and where those that could not dump it are forgotten themselves,
                // one that leaves something out may leave out this.
                let is_over =
                    later.iter().any(|facts| facts.left_out == Some(0) && facts.failed.is_empty());
                let is_missed = |facts: &LogicalFacts| {
                    facts.left_out != Some(0)
                        || facts.failed.iter().any(|failed| failed.database == *database)
                };
                !is_over
                    && later.iter().any(is_missed)
                    && !later.iter().any(|facts| facts.has(database))
            });
            return Ok(only);
        }
        Ok(None)
    }

    /// What a dump says of itself; `None` of files, and where that is lost or damaged.
    async fn logical_facts(
        &self,
        lineage: LineageId,
        backup: BackupId,
    ) -> Result<Option<LogicalFacts>, Error> {
        match self.open_backup(lineage, backup).await {
            Ok(opened) => Ok(opened.facts().logical.clone()),
            Err(Error::Damaged { .. } | Error::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Gives up what cannot be used and stops every collection: an attempt whose verdict cannot be believed, or a backup
    /// whose manifest is lost or cannot be believed, be it the newest. Refused for everything else.
    pub async fn forget_damaged(
        &self,
        lineage: LineageId,
        attempt: AttemptId,
        wish: &Wish,
    ) -> Result<(), Error> {
        self.check_writable()?;
        let backup = attempt.into();
        let names = self.names_of(lineage, attempt).await?;
        let refuse =
            |reason: &str| Err(Error::Wanted { what: FORGET, backup, reason: reason.to_owned() });
        let opened = match self.verdict(lineage, attempt).await {
            Ok(None) => return Err(Error::BackupUnknown { lineage, backup }),
            Ok(Some(verdict)) if matches!(verdict.outcome, Outcome::Abort { .. }) => {
                return refuse("it was aborted");
            }
            Ok(Some(verdict)) => self.open_committed(lineage, &verdict).await.map(|_| ()),
            Err(error) => Err(error),
        };
        match opened {
            Ok(()) => return refuse("its verdict and its manifest can be read"),
            Err(Error::Damaged { .. } | Error::Missing { .. }) => {}
            Err(error) => return Err(error),
        }
        if is_held(&names) {
            return refuse("it is held");
        }
        self.write_forget(lineage, backup, wish).await
    }

    async fn write_forget(
        &self,
        lineage: LineageId,
        backup: BackupId,
        wish: &Wish,
    ) -> Result<(), Error> {
        let names = self.names_of(lineage, backup.into()).await?;
        for number in 0..FORGETS_MAX {
            let end = if number == 0 { String::new() } else { format!(".{number}") };
            if names.contains(&numbered(REMEMBER, &end)) {
                continue;
            }
            let key = layout::of_backup(lineage, backup, &numbered(FORGET, &end));
            let put = self.store.put_if_absent(&key, note::write(&self.keys, &key, wish)?).await?;
            if put == PutOutcome::Exists {
                // Somebody else's, which may be followed already: it stands.
                if self.believed(&key).await?.is_some() {
                    return Ok(());
                }
                continue;
            }
            if is_held(&self.names_of(lineage, backup.into()).await?) {
                self.write(lineage, backup, &numbered(REMEMBER, &end), wish).await?;
                let reason = "somebody held it at the same moment".to_owned();
                return Err(Error::Wanted { what: FORGET, backup, reason });
            }
            return Ok(());
        }
        Err(Error::Limit { reason: format!("backup {backup} was given up {FORGETS_MAX} times") })
    }

    /// Writes a wish that is there already, or is ours.
    async fn write(
        &self,
        lineage: LineageId,
        backup: BackupId,
        name: &str,
        wish: &Wish,
    ) -> Result<(), Error> {
        let key = layout::of_backup(lineage, backup, name);
        self.store.put_if_absent(&key, note::write(&self.keys, &key, wish)?).await?;
        Ok(())
    }

    /// Takes every `forget` of a backup back, also those that are not believed. `Ok` means that the backup is whole and wanted
    /// like any other. Refused when it is gone, or when a collection that began before may be deleting it: then it is whole
    /// or gone once that collection has ended, and nothing else deletes it. Idempotent.
    pub async fn remember(
        &self,
        lineage: LineageId,
        backup: BackupId,
        wish: &Wish,
    ) -> Result<(), Error> {
        self.check_writable()?;
        let refuse = |reason: String| Err(Error::Wanted { what: TAKE_BACK, backup, reason });
        let names = self.names_of(lineage, backup.into()).await?;
        if !has(&names, "verdict") {
            return Err(Error::BackupUnknown { lineage, backup });
        }
        if !has(&names, "manifest") {
            return refuse("it was deleted".to_owned());
        }
        for end in forgets(&names) {
            self.write(lineage, backup, &numbered(REMEMBER, end), wish).await?;
        }
        // In this order, for the reason that a reader has: see `pins`.
        let condemned = self.condemned(lineage).await?;
        let opened = match self.open_backup(lineage, backup).await {
            Err(Error::Missing { .. }) => return refuse("it was deleted meanwhile".to_owned()),
            opened => opened?,
        };
        if is_doomed(&opened, &condemned) {
            return refuse(
                "a collection that began before may be deleting it; it is whole or gone when that one has ended, and no \
                 later one deletes it. Of one that died, `pgmuster repo gc URL --key FILE --drop-lists-older-than HOURS` drops the list"
                    .to_owned(),
            );
        }
        let inventory = opened.check_inventory().await?;
        match inventory.missing.into_iter().next().or(inventory.wrong_size.into_iter().next()) {
            None => Ok(()),
            Some(key) => Err(Error::Missing { key }),
        }
    }

    /// Keeps a backup from being forgotten until the hold is released. Refused for one that is forgotten: its packs may be
    /// gone at any moment. Idempotent.
    pub async fn hold(
        &self,
        lineage: LineageId,
        backup: BackupId,
        wish: &Wish,
    ) -> Result<(), Error> {
        self.check_writable()?;
        let backups = self.list_readable_backups(lineage).await?;
        let Some(summary) = backups.iter().find(|other| other.backup() == Some(backup)) else {
            return Err(Error::BackupUnknown { lineage, backup });
        };
        if summary.forgotten {
            return Err(self.given_up(lineage, backup, &summary.forgets).await);
        }
        // Another's hold is none to rely on: that one may be about to lose.
        let end = format!(".{}", hex::encode(&chance::random::<16>()));
        self.write(lineage, backup, &numbered(HOLD, &end), wish).await?;
        let names = self.names_of(lineage, backup.into()).await?;
        let ends: Vec<String> = forgets(&names).map(str::to_owned).collect();
        if !ends.is_empty() {
            self.write(lineage, backup, &numbered(RELEASE, &end), wish).await?;
            return Err(self.given_up(lineage, backup, &ends).await);
        }
        Ok(())
    }

    /// Why a backup with these wishes is not held.
    async fn given_up(&self, lineage: LineageId, backup: BackupId, ends: &[String]) -> Error {
        let wish = self.forgotten_by(lineage, backup, ends).await.ok().flatten();
        let by = wish.map_or_else(String::new, |Wish { by, why, .. }| match why.as_str() {
            "" => format!(" by {by}"),
            why => format!(" by {by} ({why})"),
        });
        Error::GivenUp { backup, by }
    }

    /// Ends every hold that is there. Idempotent.
    pub async fn release(
        &self,
        lineage: LineageId,
        backup: BackupId,
        wish: &Wish,
    ) -> Result<(), Error> {
        self.check_writable()?;
        for end in standing(&self.names_of(lineage, backup.into()).await?, HOLD, RELEASE) {
            self.write(lineage, backup, &numbered(RELEASE, end), wish).await?;
        }
        Ok(())
    }

    /// Whether a backup was given up by somebody who has the key, and nobody took that back.
    pub async fn is_given_up(
        &self,
        lineage: LineageId,
        summary: &AttemptSummary,
    ) -> Result<bool, Error> {
        match summary.backup() {
            Some(backup) => {
                Ok(self.forgotten_by(lineage, backup, &summary.forgets).await?.is_some())
            }
            None => Ok(false),
        }
    }

    /// Whether a missing manifest is no damage: a collector deleted it, or the backup was given up and one may. `names` are
    /// those of its objects. What a collector says since they were listed is heard all the same.
    pub(crate) async fn may_be_deleted(
        &self,
        lineage: LineageId,
        backup: BackupId,
        names: &[String],
    ) -> Result<bool, Error> {
        if self.is_gone(lineage, backup).await? {
            return Ok(true);
        }
        let ends: Vec<String> = forgets(names).map(str::to_owned).collect();
        Ok(self.forgotten_by(lineage, backup, &ends).await?.is_some())
    }

    /// Whether it was a backup once, was given up and is deleted: its verdict stays.
    pub async fn was_deleted(&self, backup: BackupId) -> Result<bool, Error> {
        match self.lineage_of(backup.into()).await? {
            Some(lineage) => {
                let names = self.names_of(lineage, backup.into()).await?;
                Ok(!has(&names, "manifest") && self.is_gone(lineage, backup).await?)
            }
            None => Ok(false),
        }
    }

    /// Whether a collector said that it deletes the manifest.
    pub(crate) async fn is_gone(
        &self,
        lineage: LineageId,
        backup: BackupId,
    ) -> Result<bool, Error> {
        match self.read_note::<Gone>(&layout::of_backup(lineage, backup, "gone")).await {
            Ok(gone) => Ok(gone.is_some()),
            Err(Error::Damaged { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Who wanted a backup gone first, when and why, of the wishes with these ends; `None` when nobody did, or when that
    /// cannot be read or believed: a wish that is in doubt deletes nothing, and stands in nobody's way.
    pub(crate) async fn forgotten_by(
        &self,
        lineage: LineageId,
        backup: BackupId,
        ends: &[String],
    ) -> Result<Option<Wish>, Error> {
        let mut first: Option<Wish> = None;
        for end in ends {
            let key = layout::of_backup(lineage, backup, &numbered(FORGET, end));
            if let Some(wish) = self.believed(&key).await? {
                first = Some(first.map_or(wish.clone(), |first| {
                    if first.at_ms <= wish.at_ms { first } else { wish }
                }));
            }
        }
        Ok(first)
    }

    async fn believed(&self, key: &str) -> Result<Option<Wish>, Error> {
        match self.read_note(key).await {
            Err(error) => {
                let error = self.of_one_object(error).await?;
                tracing::warn!("{key} counts for nothing: failed to {}", chain(&error));
                Ok(None)
            }
            read => read,
        }
    }

    /// The newest of these backups that was restored and booted, and that no check has found anything wrong with since. A dump
    /// that lacks a database which it was to have is none while there is a whole one.
    /// Whose signature a proof has is not looked at: whoever may write here can delete as well.
    pub async fn newest_proved(
        &self,
        lineage: LineageId,
        backups: &[AttemptSummary],
    ) -> Result<Option<BackupId>, Error> {
        let mut part = None;
        for summary in backups.iter().rev().filter(|summary| summary.proofs > 0) {
            let Some(backup) = summary.backup() else { continue };
            let mut proved = false;
            for stored in self.list_proofs(lineage, backup).await? {
                let proof = serde_json::from_slice::<Signed<Proof>>(&stored.bytes);
                let Some(proof) = proof.ok().and_then(|proof| proof.unverified().ok()) else {
                    continue;
                };
                // One that could not look says nothing against an earlier one, nor does an assertion: that says that the source
                // was not as somebody wants it, and the backup can be restored all the same.
                let failed = |check: &ProofCheck| check.outcome == CheckOutcome::Failed;
                if proof.checks.iter().any(failed) {
                    proved = false;
                } else if proof.level_reached >= Some(ProofLevel::L3) {
                    proved = true;
                }
            }
            if !proved {
                continue;
            }
            match self.logical_facts(lineage, backup).await? {
                Some(facts) if !facts.failed.is_empty() => part = part.or(Some(backup)),
                _ => return Ok(Some(backup)),
            }
        }
        Ok(part)
    }
}
