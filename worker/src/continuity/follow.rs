//! Follows one server's log into its archive: what is known of the archive, against where the server is.
//!
//! Whatever is known of the archive was seen before the server was asked where it is. So an archive that is ahead of the server
//! has what that server did not write.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use postgres::wal_position::WalPosition;
use proto::failure::{Action, Code, Failure};
use proto::message::{WalConflict, WalStanding, WalWaiting};
use proto::wal::{Segment, SegmentName};
use proto::{ClusterName, Lsn, RepositoryId, SystemIdentifier, Timeline};
use repository::{Repository, WalAbsence};
use tokio::sync::Semaphore;

use super::commits::Commits;
use super::line::Line;
use super::owner::Owner;
use super::passed::Passed;
use super::survey::{Asked, Ends, Found, Surveys};
use crate::clock::Seen;

/// Segments that one look goes on by; the next look goes on from there.
const SEGMENTS_MAX: usize = 256;
/// How long a full segment may be missing before it is asked whether the archive has later ones.
const MISSING_MS: i64 = 10_000;
/// How often at most that is asked.
const ASK_BEHIND_EVERY_MS: i64 = 30_000;
/// How soon the archive is looked at as a whole again while nothing is known of it, or it is known to have more.
const SURVEY_SOON: Duration = Duration::from_secs(30);
/// The same while it may turn out that it has more.
const SURVEY_IN_DOUBT: Duration = Duration::from_mins(5);
/// The same otherwise: what was deleted shows itself by nothing else. A list of more than so many files is asked for as much less
/// often, up to a limit: what is listed in a minute stays the same.
const SURVEY_EVERY: Duration = Duration::from_secs(30);
const SURVEY_FILES: u64 = 2_500;
const SURVEY_EVERY_MAX: Duration = Duration::from_hours(1);
/// Segments of its own that a server still has, and bytes of them, of which one look asks whether the archive has the same: a look is
/// short;
const LOOK_BACK_EACH: (u64, u64) = (16, 256 << 20);
/// and all together: while they are asked for, nothing is told.
const LOOK_BACK_MAX: (u64, u64) = (64, 1 << 30);
/// How long a new timeline may take to show itself in the archive before that is told.
const NEW_TIMELINE_MS: i64 = 60_000;

/// What one look at a server and its archive showed.
#[derive(Debug)]
pub(super) enum Looked {
    /// How the archive stands.
    Standing(Box<WalStanding>),
    /// Not known yet.
    Later,
    /// Nothing is archived here.
    Nothing,
}

/// A server that was asked, and when.
#[derive(Debug, Clone)]
pub(super) struct Server {
    /// Before it was asked.
    pub(super) seen: Seen,
    pub(super) system_identifier: SystemIdentifier,
    pub(super) major: u32,
    pub(super) position: WalPosition,
    /// Where its own segments are, if they are at hand.
    pub(super) pg_wal: Option<PathBuf>,
}

/// One server's way into its archive.
#[derive(Debug)]
pub(super) struct Follower {
    cluster: ClusterName,
    of: Option<(RepositoryId, SystemIdentifier, Timeline)>,
    known: Known,
}

/// What is known as long as server, timeline and repository stay the same.
#[derive(Debug, Default)]
struct Known {
    since: Option<Seen>,
    line: Option<Line>,
    surveys: Surveys,
    /// How many files the archive had when it was listed last.
    files: u64,
    /// What was found before its gaps.
    ends: Ends,
    /// Whether the archive is known to have more than the line.
    has_more: bool,
    passed: Passed,
    commits: Commits,
    /// The next segment, and since when it is known to be missing.
    missing: Option<(Segment, Seen)>,
    asked_behind: Option<Seen>,
    /// Whether it was asked if the archive has the segment that the server writes.
    peeked: bool,
    /// In which segment the server was when it turned out that the archive is ahead of it, and since when.
    behind: Option<(Segment, Seen)>,
    /// Up to where the line is known to be the server's own.
    own_to: Lsn,
    /// What the line ends before, though the archive has something of that name.
    held: Option<Held>,
    /// What the server went past though the archive has another one's, and what shows that: the line begins behind it.
    passed_over: Option<(Segment, Owner)>,
    /// Whether what the server still has was held against the archive.
    back: Back,
    /// Segments of this timeline of which other content was refused, when the archive was listed last.
    refused: Vec<SegmentName>,
}

/// How far the segments that a server still has were held against the archive, from the newest one down.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Back {
    #[default]
    Begins,
    /// Down to this one, and so many may follow.
    At {
        number: u64,
        left: u64,
    },
    Over,
}

/// A segment that is not the server's own, as far as is known.
#[derive(Debug, Clone, Copy)]
struct Held {
    segment: Segment,
    /// Since when at least the server has filled its own.
    since: Seen,
    owner: Owner,
}

impl Follower {
    pub(super) fn new(cluster: ClusterName) -> Self {
        Self { cluster, of: None, known: Known::default() }
    }

    /// Whether anything is known already.
    pub(super) fn follows(&self) -> bool {
        self.of.is_some()
    }

    /// Forgets the server, which is a standby now, or archives nothing.
    pub(super) fn forget(&mut self) {
        (self.of, self.known) = (None, Known::default());
    }

    /// Takes in what was found meanwhile; before the server is asked.
    pub(super) async fn prepare(
        &mut self,
        repository: &Repository,
        now: Seen,
    ) -> Result<(), Failure> {
        if self.of.is_some_and(|(id, ..)| id != repository.id()) {
            self.forget();
        }
        self.known.take_in_survey(now).await;
        self.known.peek(repository).await
    }

    /// What is to be said of the archive of a server. `is_idle` says whether it is certain that no transaction ended on the
    /// server between the end of the line and where it is.
    pub(super) async fn follow(
        &mut self,
        repository: &Arc<Repository>,
        few: &Arc<Semaphore>,
        server: &Server,
        is_idle: impl AsyncFnOnce(&Line) -> bool,
    ) -> Result<Looked, Failure> {
        let Server { seen: now, system_identifier, major, position, .. } = server;
        let of = Some((repository.id(), *system_identifier, position.timeline));
        if self.of != of {
            self.of = of;
            self.known = Known { since: Some(*now), ..Known::default() };
        }
        let known = &mut self.known;
        known.passed.note(position.lsn, *now);
        if known.surveys.may_begin(known.pause(), *now) {
            let asked = Asked {
                cluster: self.cluster.clone(),
                server: *system_identifier,
                major: *major,
                timeline: position.timeline,
                lsn: position.lsn,
                ends: known.ends.clone(),
            };
            let known_to = known.line.as_ref().map_or(Lsn(0), |line| line.to);
            known.surveys.begin(repository, few, asked, known_to);
            known.has_more = false;
        }
        // What cannot be looked at again and again is not vouched for.
        if let Some(failure) = &known.surveys.failure {
            return Err(failure.clone());
        }
        let Some(line) = &known.line else {
            return Ok(if known.surveys.is_running() { Looked::Later } else { Looked::Nothing });
        };
        if line.to > position.lsn && known.behind.is_none() {
            let writes = Segment::containing(position.lsn, line.timeline, line.segment_size);
            known.behind = Some((writes, *now));
            known.commits.forget();
            // What the server writes from here on is not what was seen to be its own.
            known.own_to = known.own_to.min(writes.start(line.segment_size));
        }
        if known.behind.is_some() && known.has_caught_up(repository, server).await? {
            known.behind = None;
        }
        if known.behind.is_none() {
            known.go_on(repository, server).await?;
        }
        let Some(line) = &known.line else { return Ok(Looked::Later) };
        if known.behind.is_none() && line.is_rooted {
            let behind = if is_idle(line).await { line.to } else { position.lsn };
            known.commits.note(*now, &position.snapshot, behind);
        }
        let looks_back = server.pg_wal.is_some() && matches!(known.back, Back::At { .. });
        if known.behind.is_none() && known.held.is_none() && looks_back {
            return Ok(Looked::Later);
        }
        Ok(known.standing(&self.cluster, position, *now))
    }
}

impl Known {
    /// How soon the archive is looked at as a whole again.
    fn pause(&self) -> Duration {
        match &self.line {
            None => SURVEY_SOON,
            Some(line) if !line.is_rooted || self.has_more || self.surveys.failure.is_some() => {
                SURVEY_SOON
            }
            Some(line) if line.is_doubtful() || self.behind.is_some() => {
                usual_pause(self.files).min(SURVEY_IN_DOUBT)
            }
            Some(_) => usual_pause(self.files),
        }
    }

    async fn take_in_survey(&mut self, now: Seen) {
        let Some((found, known_to)) = self.surveys.ended(now).await else { return };
        let Found { line: found, refused, files, ends } = found;
        (self.refused, self.files, self.ends) = (refused, files, ends);
        let before = self.line.take();
        let to = before.as_ref().map(|line| line.to);
        if before.is_some() && found.is_none() {
            let message = "nothing is left of the archive";
            self.surveys.failure = Some(Failure::new(Code::WalMissing, Action::FixConfig, message));
        }
        self.line = match (before, found) {
            (Some(line), Some(found)) => Some(line.renewed(found, known_to)),
            (_, found) => found,
        };
        if let (Some(line), Some(held)) = (&mut self.line, self.held) {
            let at = held.segment.start(line.segment_size);
            if (line.from..=line.to).contains(&at) {
                line.to = at;
            } else {
                self.held = None;
            }
        }
        if let (Some(line), Some((over, _))) = (&mut self.line, self.passed_over) {
            if (line.from..line.to).contains(&over.start(line.segment_size)) {
                line.begin_behind(over);
            } else {
                self.passed_over = None;
            }
        }
        let line = self.line.as_ref();
        // What the server did not write may be gone.
        if line.is_none_or(|line| Some(line.to) < to) {
            self.behind = None;
        }
        if line.map(|line| line.to) != to {
            self.peeked = false;
        }
        self.own_to = self.own_to.min(line.map_or(Lsn(0), |line| line.to));
    }

    /// Asks once for each segment that the server writes whether the archive has it already, from another server.
    async fn peek(&mut self, repository: &Repository) -> Result<(), Failure> {
        let is_due = !self.peeked && self.held.is_none();
        let Some(line) = self.line.as_mut().filter(|_| is_due) else { return Ok(()) };
        let next = line.next();
        if repository.has_wal(line.lineage, next.name(line.segment_size)).await? {
            line.to = next.end(line.segment_size);
            self.has_more |= !line.is_rooted;
        } else {
            self.peeked = true;
        }
        Ok(())
    }

    /// Whether a server that the archive was ahead of has written all that is there, and whose that is shows again by the newest
    /// segment: its own, or one that holds the line.
    async fn has_caught_up(
        &self,
        repository: &Repository,
        server: &Server,
    ) -> Result<bool, Failure> {
        let Some(line) = &self.line else { return Ok(false) };
        if line.to > server.position.lsn {
            return Ok(false);
        }
        let Some(number) = line.next().number.checked_sub(1) else { return Ok(false) };
        let newest = Segment { timeline: line.timeline, number };
        let owner = owner(repository, server, line, newest).await?;
        Ok(owner == Owner::Server || owner.is_another())
    }

    /// Goes on along the segments that came since, as far as they are the server's own.
    async fn go_on(&mut self, repository: &Repository, server: &Server) -> Result<(), Failure> {
        if let (Some(line), Some((over, owner))) = (&self.line, self.passed_over) {
            let name = over.name(line.segment_size);
            if !owner.still_differs(repository, line.lineage, name).await? {
                // The next list shows what is there now.
                (self.passed_over, self.has_more) = (None, true);
            }
        }
        if let (Some(line), Some(held)) = (&self.line, self.held) {
            let owner = again(repository, server, line, held).await?;
            self.held = owner.is_in_the_way().then_some(Held { owner, ..held });
            if self.held.is_some() && !self.pass_over(repository, server).await? {
                return Ok(());
            }
        }
        self.walk(repository, server.seen).await?;
        self.hold_back(repository, server).await?;
        self.look_back(repository, server).await
    }

    /// Begins the line behind the segment that holds it, when the server has gone on and the archive has what it wrote next: then
    /// that one is missing, whatever the archive has of its name. `false` while it has not.
    async fn pass_over(
        &mut self,
        repository: &Repository,
        server: &Server,
    ) -> Result<bool, Failure> {
        let (Some(line), Some(held)) = (&mut self.line, self.held) else { return Ok(true) };
        let next = held.segment.next();
        let is_filled = self.passed.since(next.end(line.segment_size)).is_some();
        if !matches!(held.owner, Owner::Differs(_))
            || !is_filled
            || owner(repository, server, line, next).await? != Owner::Server
        {
            return Ok(false);
        }
        line.begin_behind(held.segment);
        (self.own_to, self.held, self.missing) = (line.to, None, None);
        self.passed_over = Some((held.segment, held.owner));
        Ok(true)
    }

    /// Holds what the server still has of its own against the archive, once, a few segments with each look. The newest one vouches for
    /// those before it as long as the server passes over none; nobody who has just begun to look knows whether it did.
    async fn look_back(&mut self, repository: &Repository, server: &Server) -> Result<(), Failure> {
        let (Some(line), None) = (&mut self.line, self.held) else { return Ok(()) };
        let (from, left) = match self.back {
            Back::Over => return Ok(()),
            Back::Begins => (line.next().number, u64::MAX),
            Back::At { number, left } => (number, left),
        };
        let Some(pg_wal) = &server.pg_wal else { return Ok(()) };
        let left_at = line.ancestors.last().map_or(Lsn(0), |ancestor| ancestor.left_at);
        let first = Segment::containing(line.from.max(left_at), line.timeline, line.segment_size);
        let within = |(segments, bytes): (u64, u64)| {
            segments.min(bytes / u64::from(line.segment_size).max(1)).max(1)
        };
        let left = left.min(within(LOOK_BACK_MAX));
        let each = within(LOOK_BACK_EACH).min(left);
        let until = from.saturating_sub(each).max(first.number);
        for number in (until..from).rev() {
            let segment = Segment { timeline: line.timeline, number };
            if !pg_wal.join(segment.name(line.segment_size).to_string()).exists() {
                self.back = Back::Over;
                return Ok(());
            }
            let owner = owner(repository, server, line, segment).await?;
            if matches!(owner, Owner::Differs(_)) {
                line.begin_behind(segment);
                (self.passed_over, self.back) = (Some((segment, owner)), Back::Over);
                return Ok(());
            }
            // A look that takes too long is given up, and the next one goes on from here.
            self.back = Back::At { number, left: left.saturating_sub(from - number) };
        }
        let left = left.saturating_sub(from.saturating_sub(until));
        if until <= first.number || left == 0 {
            self.back = Back::Over;
        }
        Ok(())
    }

    /// Goes on along the names that came since.
    async fn walk(&mut self, repository: &Repository, now: Seen) -> Result<(), Failure> {
        let Some(line) = &mut self.line else { return Ok(()) };
        for _ in 0..SEGMENTS_MAX {
            let next = line.next();
            // The server still writes it.
            if self.passed.since(next.end(line.segment_size)).is_none() {
                self.missing = None;
                return Ok(());
            }
            let name = next.name(line.segment_size);
            if repository.has_wal(line.lineage, name).await? {
                line.to = next.end(line.segment_size);
                self.has_more |= !line.is_rooted;
                (self.missing, self.peeked) = (None, false);
                continue;
            }
            let since = self.missing.filter(|(segment, _)| *segment == next);
            let (_, since) = *self.missing.insert(since.unwrap_or((next, now)));
            let asked = self.asked_behind;
            if since.age_ms(now) >= MISSING_MS
                && asked.is_none_or(|asked| asked.age_ms(now) >= ASK_BEHIND_EVERY_MS)
            {
                self.asked_behind = Some(now);
                self.has_more |=
                    repository.wal_absence(line.lineage, name).await? != WalAbsence::End;
            }
            return Ok(());
        }
        Ok(())
    }

    /// Takes the line back to the first segment that is not the server's own. A server stores its segments in their order, each
    /// once the one before it is stored: so the last one vouches for all of them if it is its own.
    async fn hold_back(&mut self, repository: &Repository, server: &Server) -> Result<(), Failure> {
        let Some(line) = &mut self.line else { return Ok(()) };
        let number = |at| Segment::containing(at, line.timeline, line.segment_size).number;
        let left_at = line.ancestors.last().map_or(Lsn(0), |ancestor| ancestor.left_at);
        let (mut own, mut foreign) =
            (number(line.from.max(left_at).max(self.own_to)), number(line.to));
        let mut first = None;
        let mut probe = foreign.saturating_sub(1);
        while own < foreign {
            let segment = Segment { timeline: line.timeline, number: probe };
            let owner = owner(repository, server, line, segment).await?;
            if owner.is_in_the_way() {
                (foreign, first) = (probe, Some((segment, owner)));
            } else {
                own = probe + 1;
            }
            probe = own + (foreign - own) / 2;
        }
        if let Some((segment, owner)) = first {
            let since = self.passed.since(segment.end(line.segment_size)).unwrap_or(server.seen);
            line.to = segment.start(line.segment_size);
            (self.held, self.missing) = (Some(Held { segment, since, owner }), None);
        }
        self.own_to = line.to;
        Ok(())
    }

    /// What shows that another server archives here: the segment that holds the line, else the newest one that was refused.
    fn conflict(&self, line: &Line) -> Option<WalConflict> {
        let conflict = |segment: Segment, is_foreign| WalConflict {
            segment: segment.name(line.segment_size),
            at: segment.start(line.segment_size),
            is_foreign,
        };
        if let Some(Held { segment, owner, .. }) = self.held {
            return owner.is_another().then(|| conflict(segment, true));
        }
        let refused = self.refused.iter().filter_map(|name| name.segment(line.segment_size));
        let newest = refused
            .filter(|one| (line.from..line.to).contains(&one.start(line.segment_size)))
            .max()?;
        Some(conflict(newest, false))
    }

    fn standing(&mut self, cluster: &ClusterName, position: &WalPosition, now: Seen) -> Looked {
        let Some(line) = &self.line else { return Looked::Later };
        let held = self.held.map(|held| (held.segment, held.since));
        let waiting = match self.behind.or(held) {
            Some(known) => Some(known),
            None => self.missing.and_then(|(next, _)| {
                Some((next, self.passed.since(next.end(line.segment_size))?))
            }),
        };
        let writes = Segment::containing(position.lsn, line.timeline, line.segment_size);
        let waiting = waiting.and_then(|(segment, since)| {
            let segments = writes.number.saturating_sub(segment.number);
            let since_ms = now.at_ms.saturating_sub(since.age_ms(now));
            let segment = segment.name(line.segment_size);
            (segments > 0).then_some(WalWaiting { segment, since_ms, segments })
        });
        let age_ms = self.since.map_or(0, |since| since.age_ms(now));
        if !line.is_rooted && waiting.is_none() && age_ms < NEW_TIMELINE_MS {
            return Looked::Later;
        }
        let safe = if self.behind.is_none() { self.commits.safe_at(line.to) } else { None };
        Looked::Standing(Box::new(WalStanding {
            cluster: cluster.clone(),
            lineage: line.lineage,
            at_ms: now.at_ms,
            timeline: line.timeline,
            ancestors: line.ancestors.clone(),
            server_lsn: position.lsn,
            line_from: line.from,
            archived_to: line.to,
            safe_at_ms: safe.map(|safe| safe.at_ms_by(now)),
            waiting,
            gap: line.missing.map(|segment| segment.name(line.segment_size)),
            gaps: line.gaps.clone(),
            conflict: self.conflict(line),
        }))
    }
}

/// How often an archive of so many files is looked at as a whole.
fn usual_pause(files: u64) -> Duration {
    let lists = u32::try_from(files.div_ceil(SURVEY_FILES)).unwrap_or(u32::MAX);
    SURVEY_EVERY.saturating_mul(lists.max(1)).min(SURVEY_EVERY_MAX)
}

/// Whose the segment is that holds the line, as it is now.
async fn again(
    repository: &Repository,
    server: &Server,
    line: &Line,
    held: Held,
) -> Result<Owner, Failure> {
    let name = held.segment.name(line.segment_size);
    if held.owner.still_differs(repository, line.lineage, name).await? {
        return Ok(held.owner);
    }
    owner(repository, server, line, held.segment).await
}

/// Whose a segment of the line is.
async fn owner(
    repository: &Repository,
    server: &Server,
    line: &Line,
    segment: Segment,
) -> Result<Owner, Failure> {
    let name = segment.name(line.segment_size);
    let (pg_wal, archived) = (server.pg_wal.as_deref(), server.position.archived);
    Owner::of(repository, line.lineage, name, pg_wal, archived).await
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proto::wal::WalFileName;
    use repository::store::directory::DirectoryStore;
    use repository::{Encryption, InitOptions, WalStored};

    use super::super::survey::FILES_OF_A_TIMELINE;

    use super::*;

    const MIB: u64 = 1 << 20;
    const SERVER: SystemIdentifier = SystemIdentifier(7);

    /// A repository with an archive of segments of 1 MiB.
    async fn repository(place: &std::path::Path) -> Arc<Repository> {
        let store = Arc::new(DirectoryStore::new(place));
        let options = InitOptions { encryption: Encryption::Off, now_ms: 1 };
        Arc::new(Repository::init(store, options).await.unwrap().repository)
    }

    /// A server on a timeline, its archive, and who follows.
    struct Story {
        place: tempfile::TempDir,
        repository: Arc<Repository>,
        few: Arc<Semaphore>,
        follower: Follower,
        timeline: u32,
        /// The server's own segments, where they are at hand.
        pg_wal: Option<PathBuf>,
        /// What the server says that it archived last.
        archived: Option<WalFileName>,
        now_ms: i64,
    }

    impl Story {
        /// Segments `first` to `last` of timeline 1 are archived.
        async fn new(first: u64, last: u64) -> Self {
            let place = tempfile::tempdir().unwrap();
            let story = Self {
                repository: repository(&place.path().join("repository")).await,
                place,
                few: Arc::new(Semaphore::new(1)),
                follower: Follower::new("orders".parse().unwrap()),
                timeline: 1,
                pg_wal: None,
                archived: None,
                now_ms: 1_000_000,
            };
            for number in first..=last {
                story.archive(1, number).await;
            }
            story
        }

        async fn store(&self, file: &WalFileName, content: Bytes) {
            self.hand_over(file, content).await.unwrap();
        }

        async fn hand_over(
            &self,
            file: &WalFileName,
            content: Bytes,
        ) -> Result<WalStored, repository::Error> {
            let cluster = "orders".parse().unwrap();
            let identity = self.repository.find_or_mint_lineage(&cluster, SERVER, 1).await.unwrap();
            self.repository.store_wal(identity.lineage, file, content).await
        }

        /// A server hands over its segment of timeline 1, full of `byte`; zero is what the one that is followed writes.
        async fn hand_over_of(
            &self,
            number: u64,
            byte: u8,
        ) -> Result<WalStored, repository::Error> {
            let file = WalFileName::Segment(name(number));
            self.hand_over(&file, vec![byte; 1 << 20].into()).await
        }

        /// The followed server's own segments are at hand from now on.
        fn has_files(&mut self, numbers: std::ops::RangeInclusive<u64>) {
            let pg_wal = self.place.path().join("pg_wal");
            std::fs::create_dir_all(&pg_wal).unwrap();
            for number in numbers {
                std::fs::write(pg_wal.join(name(number).to_string()), vec![0; 1 << 20]).unwrap();
            }
            self.pg_wal = Some(pg_wal);
        }

        async fn archive(&self, timeline: u32, number: u64) {
            let segment = Segment { timeline: Timeline(timeline), number };
            self.store(&WalFileName::Segment(segment.name(1 << 20)), vec![0; 1 << 20].into()).await;
        }

        /// Somebody deletes a file of the archive.
        async fn lose(&self, name: &str) {
            let store = self.repository.store();
            let all = store.list("").await.unwrap();
            let lost = all.iter().find(|object| object.key.ends_with(name)).unwrap();
            store.delete(&lost.key).await.unwrap();
        }

        /// Looks after `ms`, when the server is at `lsn`.
        async fn look(&mut self, ms: i64, lsn: u64) -> Result<Looked, Failure> {
            self.now_ms += ms;
            let seen = Seen::test(self.now_ms, self.now_ms);
            self.follower.prepare(&self.repository, seen).await?;
            let position = WalPosition {
                snapshot: self.now_ms.to_string(),
                lsn: Lsn(lsn),
                timeline: Timeline(self.timeline),
                archives: true,
                archived: self.archived,
            };
            let pg_wal = self.pg_wal.clone();
            let server = Server { seen, system_identifier: SERVER, major: 15, position, pg_wal };
            let Self { repository, few, .. } = self;
            self.follower.follow(repository, few, &server, async |_| false).await
        }

        /// The same twice: what the first one began to list counts at the second one.
        async fn look_well(&mut self, ms: i64, lsn: u64) -> Result<Looked, Failure> {
            drop(self.look(ms, lsn).await);
            let listed = async {
                while self.follower.known.surveys.is_listing() {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_mins(1), listed).await.unwrap();
            self.look(1, lsn).await
        }

        async fn seen(&mut self, ms: i64, lsn: u64) -> WalStanding {
            match self.look_well(ms, lsn).await {
                Ok(Looked::Standing(standing)) => *standing,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Where a line begins and ends, in segments.
    fn line(standing: &WalStanding) -> (u64, u64) {
        (standing.line_from.0 / MIB, standing.archived_to.0 / MIB)
    }

    fn waiting(standing: &WalStanding) -> Option<(String, u64)> {
        standing.waiting.map(|waiting| (waiting.segment.to_string(), waiting.segments))
    }

    fn name(number: u64) -> SegmentName {
        Segment { timeline: Timeline(1), number }.name(1 << 20)
    }

    /// The segment that is told of, and whether the other server's came first.
    fn conflict(standing: &WalStanding) -> Option<(u64, bool)> {
        standing.conflict.map(|conflict| {
            assert_eq!(conflict.segment, name(conflict.at.0 / MIB));
            (conflict.at.0 / MIB, conflict.is_foreign)
        })
    }

    #[tokio::test]
    async fn a_segment_of_another_server_holds_the_line_until_it_is_gone() {
        let mut story = Story::new(1, 3).await;
        story.has_files(1..=3);
        let before = story.seen(0, 4 * MIB).await;
        let safe_at_ms = before.safe_at_ms;
        assert_eq!((line(&before), safe_at_ms), ((1, 4), Some(story.now_ms)));
        // The archive was asked for segment 4 when the server began it. Now a clone stores its own, and then the server fills it.
        story.hand_over_of(4, 1).await.unwrap();
        story.has_files(4..=4);
        for (ms, lsn) in [(5_000, 5 * MIB), (60_000, 6 * MIB), (3_600_000, 6 * MIB)] {
            let held = story.seen(ms, lsn).await;
            assert_eq!((line(&held), held.safe_at_ms), ((1, 4), safe_at_ms), "at {lsn}");
            assert_eq!(conflict(&held), Some((4, true)));
            assert_eq!(waiting(&held), Some((name(4).to_string(), lsn / MIB - 4)));
            // It is refused for as long.
            story.hand_over_of(4, 0).await.unwrap_err();
        }
        // Also when the clone goes on.
        story.hand_over_of(5, 1).await.unwrap();
        assert_eq!(line(&story.seen(3_600_000, 6 * MIB).await), (1, 4));
        for number in [4, 5] {
            story.lose(&format!("/00000001/{}", name(number))).await;
            story.hand_over_of(number, 0).await.unwrap();
        }
        story.has_files(5..=5);
        let cured = story.seen(5_000, 6 * MIB).await;
        assert_eq!((line(&cured), waiting(&cured)), ((1, 6), None));
        assert_eq!(cured.safe_at_ms, Some(story.now_ms));
    }

    #[tokio::test]
    async fn a_worker_that_starts_finds_where_another_server_came_between() {
        for own in 0..=7 {
            let mut story = Story::new(1, own).await;
            for number in own + 1..=7 {
                story.hand_over_of(number, 1).await.unwrap();
            }
            story.has_files(1..=9);
            let held = story.seen(0, 10 * MIB).await;
            let expected = (own < 7).then_some((own + 1, true));
            assert_eq!((line(&held), conflict(&held)), ((1, own + 1), expected));
            assert_eq!(waiting(&held), Some((name(own + 1).to_string(), 9 - own)));
        }
    }

    #[tokio::test]
    async fn where_its_files_are_not_at_hand_the_server_says_what_it_archived() {
        let mut story = Story::new(1, 3).await;
        story.archived = Some(WalFileName::Segment(name(3)));
        assert_eq!(line(&story.seen(0, 4 * MIB).await), (1, 4));
        story.hand_over_of(4, 1).await.unwrap();
        let unclear = story.seen(5_000, 5 * MIB).await;
        assert_eq!((line(&unclear), conflict(&unclear)), ((1, 4), None));
        assert_eq!(waiting(&unclear), Some((name(4).to_string(), 1)));
        story.hand_over_of(4, 0).await.unwrap_err();
        let refused = story.seen(5_000, 5 * MIB).await;
        assert_eq!((line(&refused), conflict(&refused)), ((1, 4), Some((4, true))));
        // Had it been its own, it would say so a moment later.
        story.archived = Some(WalFileName::Segment(name(4)));
        assert_eq!(line(&story.seen(5_000, 5 * MIB).await), (1, 5));
    }

    #[tokio::test]
    async fn a_server_that_remembers_nothing_it_archived_vouches_for_nothing_where_another_was_refused()
     {
        let mut story = Story::new(1, 3).await;
        assert_eq!(line(&story.seen(0, 4 * MIB).await), (1, 4));
        story.hand_over_of(4, 1).await.unwrap();
        story.hand_over_of(4, 0).await.unwrap_err();
        // As after a crash: it says nothing.
        let unclear = story.seen(5_000, 5 * MIB).await;
        assert_eq!((line(&unclear), conflict(&unclear)), ((1, 4), None));
        assert_eq!(waiting(&unclear), Some((name(4).to_string(), 1)));
        story.archived = Some(WalFileName::Segment(name(3)));
        assert_eq!(conflict(&story.seen(5_000, 5 * MIB).await), Some((4, true)));
    }

    #[tokio::test]
    async fn an_archive_that_was_ahead_counts_again_once_the_newest_is_the_servers_own() {
        for has_files in [true, false] {
            let mut story = Story::new(1, 3).await;
            let own_to = |story: &mut Story, number| {
                if has_files {
                    story.has_files(1..=number);
                } else {
                    story.archived = Some(WalFileName::Segment(name(number)));
                }
            };
            own_to(&mut story, 3);
            story.seen(0, 4 * MIB + 9).await;
            story.hand_over_of(4, 1).await.unwrap();
            let ahead = story.seen(31_000, 4 * MIB + 99).await;
            assert!(ahead.archived_to > ahead.server_lsn);
            // It is deleted, and the server's own comes, before anybody lists that.
            story.lose(&format!("/00000001/{}", name(4))).await;
            story.hand_over_of(4, 0).await.unwrap();
            own_to(&mut story, 4);
            let again = story.seen(5_000, 5 * MIB).await;
            assert_eq!((line(&again), waiting(&again)), ((1, 5), None), "{has_files}");
            assert_eq!(again.safe_at_ms, Some(story.now_ms));
        }
        // While the other one's is there, it holds the line.
        let mut story = Story::new(1, 3).await;
        story.has_files(1..=4);
        story.seen(0, 4 * MIB + 9).await;
        story.hand_over_of(4, 1).await.unwrap();
        story.seen(31_000, 4 * MIB + 99).await;
        let held = story.seen(5_000, 5 * MIB).await;
        assert_eq!((line(&held), conflict(&held)), ((1, 4), Some((4, true))));
        assert_eq!((waiting(&held), held.safe_at_ms), (Some((name(4).to_string(), 1)), None));
    }

    #[tokio::test]
    async fn a_server_that_was_set_back_and_wrote_on_beyond_vouches_for_nothing_of_before() {
        let mut story = Story::new(1, 5).await;
        story.has_files(1..=5);
        assert_eq!(line(&story.seen(0, 6 * MIB).await), (1, 6));
        story.seen(5_000, 3 * MIB + 100).await;
        for number in 3..=5 {
            let path = story.pg_wal.clone().unwrap().join(name(number).to_string());
            std::fs::write(path, vec![9; 1 << 20]).unwrap();
        }
        let beyond = story.seen(5_000, 6 * MIB).await;
        assert_eq!((line(&beyond), beyond.safe_at_ms), ((1, 3), None));
        assert_eq!(conflict(&beyond), Some((3, true)));
    }

    #[tokio::test]
    async fn a_segment_that_the_server_passed_over_is_missing_whatever_is_there_of_its_name() {
        for starts_later in [false, true] {
            let mut story = Story::new(1, 3).await;
            story.has_files(1..=4);
            if !starts_later {
                story.seen(0, 4 * MIB).await;
            }
            story.hand_over_of(4, 1).await.unwrap();
            let own = story.pg_wal.clone().unwrap().join(name(4).to_string());
            if !starts_later {
                assert_eq!(conflict(&story.seen(5_000, 5 * MIB).await), Some((4, true)));
                // The server is told that its own is archived, and takes the file for a later segment.
                story.archived = Some(WalFileName::Segment(name(4)));
                std::fs::remove_file(&own).unwrap();
                let held = story.seen(5_000, 5 * MIB).await;
                assert_eq!((line(&held), conflict(&held)), ((1, 4), Some((4, true))));
            }
            // It goes on archiving behind that.
            for number in [5, 6] {
                story.archive(1, number).await;
            }
            story.has_files(5..=6);
            story.archived = Some(WalFileName::Segment(name(6)));
            for _ in 0..2 {
                let over = story.seen(60_000, 7 * MIB).await;
                assert_eq!((line(&over), over.gap), ((5, 7), Some(name(4))), "{starts_later}");
                assert_eq!((waiting(&over), conflict(&over)), (None, None));
                assert_eq!(over.safe_at_ms, Some(story.now_ms));
                drop(std::fs::remove_file(&own));
            }
            story.lose(&format!("/00000001/{}", name(4))).await;
            story.hand_over_of(4, 0).await.unwrap();
            let whole = story.seen(60_000, 7 * MIB).await;
            assert_eq!((line(&whole), whole.gap), ((1, 7), None));
        }
    }

    #[tokio::test]
    async fn a_segment_that_the_archive_went_past_is_a_gap_for_whoever_starts_to_look_too() {
        for starts_later in [false, true] {
            let mut story = Story::new(1, 3).await;
            story.has_files(1..=5);
            if !starts_later {
                assert_eq!(line(&story.seen(0, 4 * MIB).await), (1, 4));
            }
            // The server keeps segment 4 and does not hand it over.
            story.archive(1, 5).await;
            if !starts_later {
                let waits = story.seen(5_000, 6 * MIB).await;
                assert_eq!(waiting(&waits), Some((name(4).to_string(), 2)));
            }
            let gap = story.seen(60_000, 6 * MIB).await;
            assert_eq!((line(&gap), gap.gap, waiting(&gap)), ((5, 6), Some(name(4)), None));
        }
    }

    #[tokio::test]
    async fn whoever_starts_to_look_holds_a_long_row_of_segments_against_the_archive() {
        let mut story = Story::new(1, 3).await;
        story.hand_over_of(4, 1).await.unwrap();
        for number in 5..=30 {
            story.archive(1, number).await;
        }
        story.has_files(3..=30);
        let first = story.look_well(0, 31 * MIB).await;
        assert!(matches!(first, Ok(Looked::Later)), "not all at once: {first:?}");
        let over = story.seen(5_000, 31 * MIB).await;
        assert_eq!((line(&over), over.gap), ((5, 31), Some(name(4))));
    }

    #[tokio::test]
    async fn what_another_server_was_refused_is_told_though_it_does_no_harm() {
        let mut story = Story::new(1, 3).await;
        story.has_files(1..=3);
        assert_eq!(conflict(&story.seen(0, 4 * MIB).await), None);
        for number in [2, 3] {
            story.hand_over_of(number, 1).await.unwrap_err();
        }
        let told = story.seen(3_600_000, 4 * MIB).await;
        assert_eq!((line(&told), conflict(&told)), ((1, 4), Some((3, false))));
        assert_eq!((waiting(&told), told.safe_at_ms), (None, Some(story.now_ms)));
    }

    #[tokio::test]
    async fn a_segment_that_cannot_be_read_is_none() {
        let mut story = Story::new(1, 3).await;
        story.has_files(1..=4);
        story.seen(0, 4 * MIB).await;
        story.hand_over_of(4, 0).await.unwrap();
        let store = story.repository.store();
        let all = store.list("").await.unwrap();
        let key =
            &all.iter().find(|object| object.key.ends_with(&name(4).to_string())).unwrap().key;
        let path = story.place.path().join("repository").join(key);
        let whole = std::fs::read(&path).unwrap();
        let mut rotten = whole.clone();
        rotten[100] ^= 1;
        std::fs::write(&path, rotten).unwrap();
        let held = story.seen(5_000, 5 * MIB).await;
        assert_eq!((line(&held), conflict(&held)), ((1, 4), None));
        std::fs::write(&path, whole).unwrap();
        assert_eq!(line(&story.seen(5_000, 5 * MIB).await), (1, 5));
    }

    #[tokio::test]
    async fn nothing_of_an_archive_that_is_ahead_of_its_server_is_safe() {
        let mut story = Story::new(1, 5).await;
        let safe = story.seen(0, 6 * MIB).await;
        assert_eq!((line(&safe), safe.safe_at_ms), ((1, 6), Some(story.now_ms)));
        // A volume is set back, and the server comes up on the same timeline.
        for (ms, lsn) in [(5_000, 3 * MIB + 100), (5_000, 6 * MIB - 1)] {
            let ahead = story.seen(ms, lsn).await;
            assert!(ahead.archived_to > ahead.server_lsn);
            assert_eq!(ahead.safe_at_ms, None);
        }
        // It writes on beyond, and nothing of that is archived: its segment 3 is not the one that is there.
        let beyond = story.seen(5_000, 6 * MIB).await;
        assert_eq!(beyond.safe_at_ms, None);
        assert_eq!(waiting(&beyond), Some(("000000010000000000000003".to_owned(), 3)));
        assert!(beyond.at_ms - beyond.waiting.unwrap().since_ms >= 10_000);
        // The other segments are gone, the server archives its own.
        for name in ["3", "4", "5"] {
            story.lose(&format!("00000001000000000000000{name}")).await;
        }
        let again = story.seen(300_000, 6 * MIB).await;
        assert_eq!((line(&again), again.safe_at_ms), ((1, 3), None));
        for number in 3..6 {
            story.archive(1, number).await;
        }
        let again = story.seen(5_000, 6 * MIB).await;
        assert_eq!((line(&again), waiting(&again)), ((1, 6), None));
        assert_eq!(again.safe_at_ms, Some(story.now_ms));
    }

    #[tokio::test]
    async fn another_server_that_archives_ahead_is_noticed() {
        let mut story = Story::new(1, 3).await;
        assert!(story.seen(0, 4 * MIB + 9).await.safe_at_ms.is_none());
        for number in 4..8 {
            story.archive(1, number).await;
        }
        // Its own segment 4 is refused, and there is one of this name.
        story.look(5_000, 5 * MIB + 9).await.unwrap();
        let ahead = story.seen(5_000, 5 * MIB + 9).await;
        assert!(ahead.archived_to > ahead.server_lsn);
        assert_eq!(ahead.safe_at_ms, None);
    }

    #[tokio::test]
    async fn an_archive_that_falls_behind_waits_since_the_server_was_ahead() {
        let mut story = Story::new(1, 1).await;
        story.seen(0, 2 * MIB).await;
        // The server fills a segment every five seconds, every second one arrives in that time.
        let mut waits_ms = Vec::new();
        for round in 1..=20 {
            if round % 2 == 0 {
                story.archive(1, 1 + round / 2).await;
            }
            let standing = story.seen(5_000, (2 + round) * MIB).await;
            let waiting = standing.waiting.unwrap();
            waits_ms.push((standing.at_ms - waiting.since_ms) / 1_000);
        }
        assert_eq!(waits_ms[..6], [0, 0, 5, 5, 10, 10]);
        assert_eq!(waits_ms[18..], [45, 45]);
    }

    #[tokio::test]
    async fn a_server_that_was_promoted_and_archives_nothing_is_told() {
        let mut story = Story::new(1, 5).await;
        assert_eq!(line(&story.seen(0, 6 * MIB + 9).await), (1, 6));
        story.timeline = 2;
        // The history may be on its way.
        let first = story.look_well(5_000, 6 * MIB + 99).await;
        assert!(matches!(first, Ok(Looked::Later)), "{first:?}");
        let full = story.seen(5_000, 7 * MIB + 9).await;
        assert_eq!(full.timeline, Timeline(2));
        assert_eq!(waiting(&full), Some(("000000020000000000000006".to_owned(), 1)));
        assert_eq!((full.ancestors.len(), full.safe_at_ms), (0, None));
        let since_ms = full.waiting.unwrap().since_ms;
        let later = story.seen(60_000, 8 * MIB + 9).await;
        assert_eq!(later.waiting.unwrap().since_ms, since_ms, "however often it is listed");
    }

    #[tokio::test]
    async fn an_idle_server_that_was_promoted_is_told_after_a_while() {
        let mut story = Story::new(1, 5).await;
        story.timeline = 2;
        assert!(matches!(story.look_well(0, 6 * MIB + 99).await, Ok(Looked::Later)));
        let standing = story.seen(NEW_TIMELINE_MS, 6 * MIB + 99).await;
        assert_eq!((line(&standing), waiting(&standing)), ((6, 6), None));
    }

    #[tokio::test]
    async fn a_healthy_promotion_goes_on_where_the_timelines_part() {
        let mut story = Story::new(1, 5).await;
        story.timeline = 2;
        let history = format!("1\t{}\tx\n", Lsn(6 * MIB + 50));
        story.store(&WalFileName::History(Timeline(2)), history.into()).await;
        let standing = story.seen(0, 6 * MIB + 99).await;
        assert_eq!((line(&standing), standing.gap), ((1, 6), None));
        assert_eq!(standing.ancestors[0].left_at, Lsn(6 * MIB + 50));
        story.archive(2, 6).await;
        let standing = story.seen(5_000, 7 * MIB).await;
        assert_eq!((line(&standing), standing.safe_at_ms), ((1, 7), Some(story.now_ms)));
    }

    #[tokio::test]
    async fn what_is_deleted_behind_the_line_is_noticed_and_what_is_filled_too() {
        let mut story = Story::new(1, 5).await;
        assert_eq!(line(&story.seen(0, 6 * MIB).await), (1, 6));
        story.lose("000000010000000000000002").await;
        let usual_ms = i64::try_from(SURVEY_EVERY.as_millis()).unwrap();
        assert_eq!(line(&story.seen(usual_ms - 2_000, 6 * MIB).await), (1, 6), "listing costs");
        let gap = story.seen(2_000, 6 * MIB).await;
        assert_eq!(line(&gap), (3, 6));
        assert_eq!(gap.gap.unwrap().to_string(), "000000010000000000000002");
        assert!(gap.safe_at_ms.is_some());
        story.archive(1, 2).await;
        let filled = story.seen(usual_ms, 6 * MIB).await;
        assert_eq!((line(&filled), filled.gap), ((1, 6), None));
        // The newest go: what seemed safe is not.
        for name in ["000000010000000000000004", "000000010000000000000005"] {
            story.lose(name).await;
        }
        let lost = story.seen(usual_ms, 6 * MIB).await;
        assert_eq!((line(&lost), lost.safe_at_ms), ((1, 4), None));
        assert_eq!(waiting(&lost), Some(("000000010000000000000004".to_owned(), 2)));
    }

    #[tokio::test]
    async fn a_long_list_is_asked_for_less_often() {
        let pauses = [0, 1, 2_500, 2_501, 25_000, 300_000, u64::MAX]
            .map(|files| usual_pause(files).as_secs());
        assert_eq!(pauses, [30, 30, 30, 60, 300, 3_600, 3_600]);
        let mut story = Story::new(1, 5).await;
        story.seen(0, 6 * MIB).await;
        assert_eq!(story.follower.known.files, 5 + FILES_OF_A_TIMELINE);
        story.follower.known.files = 2 * SURVEY_FILES;
        story.lose("000000010000000000000002").await;
        assert_eq!(line(&story.seen(31_000, 6 * MIB).await), (1, 6));
        assert_eq!(line(&story.seen(30_000, 6 * MIB).await), (3, 6));
    }

    #[tokio::test]
    async fn a_store_that_is_away_is_no_standing_until_it_is_back() {
        let mut story = Story::new(1, 5).await;
        story.seen(0, 6 * MIB).await;
        let (there, away) = (story.place.path().join("repository"), story.place.path().join("x"));
        std::fs::rename(&there, &away).unwrap();
        assert!(story.look_well(5_000, 7 * MIB).await.is_err());
        std::fs::rename(&away, &there).unwrap();
        assert_eq!(line(&story.seen(5_000, 6 * MIB).await), (1, 6));
        // Of an idle server nothing new is to be looked for, only what was there.
        let usual_ms = i64::try_from(SURVEY_EVERY.as_millis()).unwrap();
        std::fs::rename(&there, &away).unwrap();
        assert!(story.look_well(usual_ms, 6 * MIB).await.is_err());
        std::fs::rename(&away, &there).unwrap();
        assert_eq!(line(&story.seen(60_000, 6 * MIB).await), (1, 6));
    }

    #[tokio::test]
    async fn a_repository_that_was_made_anew_is_looked_at_anew() {
        let mut story = Story::new(1, 5).await;
        story.seen(0, 6 * MIB).await;
        story.repository = repository(&story.place.path().join("another")).await;
        let looked = story.look_well(5_000, 6 * MIB).await;
        assert!(matches!(looked, Ok(Looked::Nothing)), "{looked:?}");
        story.archive(1, 6).await;
        assert_eq!(line(&story.seen(60_000, 7 * MIB).await), (6, 7));
    }
}
