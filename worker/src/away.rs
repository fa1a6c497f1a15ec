//! When it is told that the repository of a cluster is not there: an outage of a moment is nobody's news.

use proto::message::RepositoryAway;
use proto::{Code, Failure};

use crate::clock::Seen;

/// A store that says that there is no repository says so again at the next look: a mount may have been on its way.
const MISSING_MS: i64 = 20_000;
/// A store that cannot be asked may be back soon; the jobs that need it fail and say why.
const SILENT_MS: i64 = 600_000;

/// Looks that failed, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Away {
    since: Option<Seen>,
    /// The same since one of them was told that there is no repository.
    missing_since: Option<Seen>,
    told: Option<RepositoryAway>,
}

impl Away {
    /// Takes in how a look ended, and says what is to be told. What was told stays the same for as long as it is so, and until a
    /// look succeeds it only becomes worse: that a store does not answer is no sign that what was gone from it is there again.
    pub(crate) fn heed(
        &mut self,
        place: &str,
        looked: Result<(), &Failure>,
        now: Seen,
    ) -> Option<&RepositoryAway> {
        let Err(failure) = looked else {
            *self = Self::default();
            return None;
        };
        let mut since = *self.since.get_or_insert(now);
        let mut patience_ms = SILENT_MS;
        if failure.code == Code::RepositoryMissing {
            since = *self.missing_since.get_or_insert(now);
            patience_ms = MISSING_MS;
        }
        let is_news = match &self.told {
            Some(told) => !told.is_gone() && told.failure.code != failure.code,
            None => true,
        };
        if is_news && since.age_ms(now) >= patience_ms {
            let place = place.split('?').next().unwrap_or_default().to_owned();
            let since_ms = since.at_ms_by(now);
            self.told = Some(RepositoryAway { place, since_ms, failure: failure.clone() });
        }
        self.told.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use proto::Action;

    use super::*;

    const AT_MS: i64 = 1_000_000;

    fn failure(code: Code) -> Failure {
        Failure::new(code, Action::Retry, "failed to look")
    }

    fn heed(away: &mut Away, after_s: i64, looked: Result<(), Code>) -> Option<(Code, i64)> {
        let now = Seen::test(AT_MS + after_s * 1_000, after_s * 1_000);
        let failed = looked.map_err(failure);
        let told = away.heed("s3://backups?region=x", failed.as_ref().copied(), now);
        told.map(|told| {
            assert_eq!(told.place, "s3://backups");
            (told.failure.code, (told.since_ms - AT_MS) / 1_000)
        })
    }

    #[test]
    fn a_repository_that_is_missing_is_told_at_the_second_look_and_an_outage_when_it_lasts() {
        use Code::{RepositoryMissing, StoreUnavailable};
        let mut away = Away::default();
        let mut look = |after_s, looked| heed(&mut away, after_s, looked);
        assert_eq!(look(0, Err(RepositoryMissing)), None, "a mount may be on its way");
        assert_eq!(look(30, Ok(())), None);
        assert_eq!(look(60, Err(RepositoryMissing)), None);
        assert_eq!(look(90, Err(RepositoryMissing)), Some((RepositoryMissing, 60)));
        assert_eq!(look(120, Err(RepositoryMissing)), Some((RepositoryMissing, 60)));
        assert_eq!(look(150, Ok(())), None, "it is back");
        assert_eq!(look(200, Err(StoreUnavailable)), None);
        assert_eq!(look(700, Err(StoreUnavailable)), None);
        assert_eq!(look(800, Err(StoreUnavailable)), Some((StoreUnavailable, 200)));
        // The store answers again, and has lost it: what is told becomes worse when that is certain, and does not rest meanwhile.
        assert_eq!(look(830, Err(RepositoryMissing)), Some((StoreUnavailable, 200)));
        assert_eq!(look(860, Err(RepositoryMissing)), Some((RepositoryMissing, 830)));
        assert_eq!(look(890, Err(StoreUnavailable)), Some((RepositoryMissing, 830)), "still gone");
        assert_eq!(look(9_000, Err(StoreUnavailable)), Some((RepositoryMissing, 830)));
        assert_eq!(look(9_030, Ok(())), None, "somebody has seen it");
        // An outage between two looks that miss it is no look that finds it.
        assert_eq!(look(9_060, Err(RepositoryMissing)), None);
        assert_eq!(look(9_090, Err(StoreUnavailable)), None);
        assert_eq!(look(9_120, Err(RepositoryMissing)), Some((RepositoryMissing, 9_060)));
    }

    #[test]
    fn what_is_told_does_not_change_with_the_words_of_each_look() {
        let mut away = Away::default();
        let mut look = |after_ms: i64, words: &str| {
            let failed = Failure::new(Code::RepositoryMissing, Action::Retry, words);
            let now = Seen::test(AT_MS + after_ms, after_ms);
            away.heed("file:///backups", Err(&failed), now).cloned()
        };
        look(0, "first");
        let told = look(30_000, "second").unwrap();
        assert_eq!(look(60_000, "third"), Some(told));
    }
}
