//! Looking for moments in archived WAL, from its end, because what people want is nearly always near it.

use bytes::Bytes;
use jiff::Timestamp;
use postgres::recovery::Way;
use postgres::wal_moments::{self, Event, Moment, SegmentMoments};
use proto::recovery::low_half;
use proto::{BackupFacts, Code, Failure, LineageId, Lsn, RecoveryTarget, WalFileName};
use repository::Repository;

use crate::context::blocking;

/// Segments that one plan may fetch to look into: 4 GiB of usual ones, a minute or two.
const SEGMENTS_MAX: usize = 256;

/// What was found about a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// A transaction ended after it.
    Event(Moment),
    /// None did, but something was written after it.
    Idle(Moment),
    /// Nothing was.
    Nothing,
    /// There was too much to look at.
    Unknown,
}

/// What one segment said, once it was read.
struct Looked {
    number: u64,
    way: proto::Timeline,
    said: Option<SegmentMoments>,
    first_page: Option<Bytes>,
}

pub(super) struct Search<'a> {
    repository: &'a Repository,
    lineage: LineageId,
    major: u32,
    left: usize,
    /// What is damaged counts as what cannot be looked into.
    rehearses: bool,
    /// A segment was damaged, and taken for one that is not there.
    met_damage: bool,
    looked: Vec<Looked>,
}

impl<'a> Search<'a> {
    pub(super) fn new(repository: &'a Repository, lineage: LineageId, facts: &BackupFacts) -> Self {
        Self::of_version(repository, lineage, facts.server_version_num / 10_000)
    }

    /// In the log of a server of a major version.
    pub(super) fn of_version(repository: &'a Repository, lineage: LineageId, major: u32) -> Self {
        let (left, looked) = (SEGMENTS_MAX, Vec::new());
        Self { repository, lineage, major, left, rehearses: false, met_damage: false, looked }
    }

    /// The same, where a damaged segment is no error.
    pub(super) fn rehearsing(self, rehearses: bool) -> Self {
        Self { rehearses, ..self }
    }

    /// The same, looking into fewer segments.
    pub(super) fn within(self, segments_max: usize) -> Self {
        Self { left: segments_max, ..self }
    }

    /// Lets it look into so many more; what it has seen costs nothing again.
    pub(super) fn allow(&mut self, segments_max: usize) {
        self.left = segments_max;
    }

    /// Where the log ends that is there up to `to`; `None` when its last segment cannot be looked into.
    pub(super) async fn end(&mut self, way: &Way, to: Lsn) -> Result<Option<Lsn>, Failure> {
        let last = last_number(way, to);
        Ok(self.look(way, last, last).await?.map(|said| said.end))
    }

    /// Where the last record begins; `None` when that is not known.
    pub(super) async fn last_record(&mut self, way: &Way, to: Lsn) -> Result<Option<Lsn>, Failure> {
        let last = last_number(way, to);
        Ok(self.look(way, last, last).await?.and_then(|said| said.last))
    }

    /// The last end of a transaction between two positions.
    pub(super) async fn newest_end(
        &mut self,
        way: &Way,
        from: Lsn,
        to: Lsn,
    ) -> Result<Option<Moment>, Failure> {
        for number in numbers(way, from, to) {
            let Some(said) = self.look(way, number, last_number(way, to)).await? else {
                return Ok(None);
            };
            let is_end = |moment: &&Moment| moment.ends_transaction() && moment.start >= from;
            if let Some(moment) = said.moments.iter().rfind(is_end) {
                return Ok(Some(moment.clone()));
            }
        }
        Ok(None)
    }

    /// The first moment between two positions that is wanted, of those segments that are there and may still be looked into.
    pub(super) async fn first(
        &mut self,
        way: &Way,
        from: Lsn,
        to: Lsn,
        is_wanted: impl Fn(&Moment) -> bool,
    ) -> Result<Option<Moment>, Failure> {
        let last = last_number(way, to);
        for number in from.0 / u64::from(way.segment_size())..=last {
            if self.is_exhausted() {
                break;
            }
            let Some(said) = self.look(way, number, last).await? else { continue };
            let mut behind = said.moments.iter().filter(|moment| moment.start >= from);
            if let Some(moment) = behind.find(|moment| is_wanted(moment)) {
                return Ok(Some(moment.clone()));
            }
        }
        Ok(None)
    }

    /// Whether there was too much to look at.
    pub(super) fn is_exhausted(&self) -> bool {
        self.left == 0
    }

    /// Whether something happened after a time, between two positions.
    pub(super) async fn after(
        &mut self,
        way: &Way,
        from: Lsn,
        to: Lsn,
        time: Timestamp,
        or_then: bool,
    ) -> Result<Found, Failure> {
        let is_after = |at: Timestamp| at > time || (or_then && at == time);
        let mut idle: Option<Moment> = None;
        let first = from.0 / u64::from(way.segment_size());
        for number in numbers(way, from, to) {
            let is_exhausted = self.is_exhausted();
            let Some(said) = self.look(way, number, last_number(way, to)).await? else {
                // What only the backup brought along ends where it does: nothing behind it is in there.
                if number == first && !is_exhausted && !self.met_damage {
                    break;
                }
                return Ok(Found::Unknown);
            };
            let moments = || said.moments.iter().filter(|moment| moment.start >= from);
            let ends = || moments().filter(|moment| moment.ends_transaction());
            if let Some(moment) = ends().find(|moment| is_after(moment.at)) {
                return Ok(Found::Event(moment.clone()));
            }
            let newest = ends().next_back().cloned();
            let behind = newest.as_ref().map_or(from, |moment| moment.end);
            let shows = |moment: &&Moment| moment.start >= behind && moment.at >= time;
            if let Some(moment) = moments().find(shows) {
                idle = Some(moment.clone());
            }
            if newest.is_some() {
                break;
            }
        }
        Ok(idle.map_or(Found::Nothing, Found::Idle))
    }

    /// Every place between two positions that a target means, in order; `None` when there is too much to look at.
    pub(super) async fn all(
        &mut self,
        way: &Way,
        from: Lsn,
        to: Lsn,
        target: &RecoveryTarget,
    ) -> Result<Option<Vec<Moment>>, Failure> {
        let is_meant = |moment: &&Moment| match (target, &moment.event) {
            (RecoveryTarget::Xid(xid), Event::Commit(id) | Event::Abort(id)) => {
                *id == low_half(*xid)
            }
            (RecoveryTarget::Name(name), Event::RestorePoint(point)) => name == point,
            _ => false,
        };
        let mut found = Vec::new();
        let first = from.0 / u64::from(way.segment_size());
        for number in numbers(way, from, to) {
            let is_exhausted = self.is_exhausted();
            let Some(said) = self.look(way, number, last_number(way, to)).await? else {
                // What only the backup brought along ends where it does: nothing behind it is in there.
                if number == first && !is_exhausted && !self.met_damage {
                    break;
                }
                return Ok(None);
            };
            found.extend(
                said.moments.iter().rev().filter(is_meant).filter(|m| m.start >= from).cloned(),
            );
        }
        found.reverse();
        Ok(Some(found))
    }

    /// What a segment says, fetched once. `None` when it is not archived, or there was too much already.
    async fn look(
        &mut self,
        way: &Way,
        number: u64,
        last: u64,
    ) -> Result<Option<&SegmentMoments>, Failure> {
        let segment = way.segment(number);
        let is_it = |looked: &Looked| looked.number == number && looked.way == segment.timeline;
        if let Some(at) = self.looked.iter().position(is_it) {
            return Ok(self.looked[at].said.as_ref());
        }
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        let following =
            if number < last { self.beginning_of(way, number + 1).await? } else { None };
        let content = self.fetch(way, number).await?;
        let (major, start) = (self.major, segment.start(way.segment_size()));
        let first_page = content.as_ref().map(|bytes| bytes.slice(..bytes.len().min(1 << 16)));
        let said = match content {
            None => None,
            Some(content) => {
                let read = blocking(move || {
                    Ok(wal_moments::read(major, start, &content, following.as_deref())?)
                });
                Some(read.await?)
            }
        };
        self.looked.push(Looked { number, way: segment.timeline, said, first_page });
        Ok(self.looked.last().and_then(|looked| looked.said.as_ref()))
    }

    /// The first pages of a segment, which is at hand when segments are looked at from the last one back.
    async fn beginning_of(&mut self, way: &Way, number: u64) -> Result<Option<Bytes>, Failure> {
        let timeline = way.segment(number).timeline;
        let known =
            self.looked.iter().find(|looked| looked.number == number && looked.way == timeline);
        match known {
            Some(looked) => Ok(looked.first_page.clone()),
            None => self.fetch(way, number).await,
        }
    }

    async fn fetch(&mut self, way: &Way, number: u64) -> Result<Option<Bytes>, Failure> {
        let name = way.segment(number).name(way.segment_size());
        let fetched = self.repository.fetch_wal(self.lineage, &WalFileName::Segment(name)).await;
        match fetched.map_err(Failure::from) {
            Err(failure) if self.rehearses && failure.code == Code::ObjectDamaged => {
                self.met_damage = true;
                Ok(None)
            }
            fetched => fetched,
        }
    }
}

/// The segment that holds the byte before a position.
fn last_number(way: &Way, to: Lsn) -> u64 {
    to.0.saturating_sub(1) / u64::from(way.segment_size())
}

/// The segments between two positions, the last one first.
fn numbers(way: &Way, from: Lsn, to: Lsn) -> impl Iterator<Item = u64> + use<> {
    let first = from.0 / u64::from(way.segment_size());
    let last = last_number(way, to);
    (first..=last).rev()
}
