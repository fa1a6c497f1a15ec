//! Whether the repository of a cluster is there. Without it nothing is recovered, however well it was proved; that nobody can look
//! into it takes no claim away, because it may be there.

use proto::message::RepositoryAway;

use crate::words::span;

/// That there is none any more, as a sentence without a period.
pub(crate) fn gone(away: Option<&RepositoryAway>, now_ms: i64) -> Option<String> {
    let away = away.filter(|away| away.is_gone())?;
    let since = since(away, now_ms);
    Some(format!("it cannot be recovered: its repository {} is gone since {since}", away.place))
}

/// That nobody can look into it, as a sentence without a period.
pub(crate) fn unseen(away: Option<&RepositoryAway>, now_ms: i64) -> Option<String> {
    let away = away.filter(|away| !away.is_gone())?;
    let (place, since, failure) = (&away.place, since(away, now_ms), &away.failure);
    Some(format!("nobody can look into its repository {place} since {since}: {failure}"))
}

fn since(away: &RepositoryAway, now_ms: i64) -> String {
    span(now_ms.saturating_sub(away.since_ms))
}
