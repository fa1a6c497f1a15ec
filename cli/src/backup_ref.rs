//! Which backup is meant by what was typed: its id, the beginning of one, or the newest or the newest proved one of its cluster.
//! What there is to choose from is found out elsewhere.

use std::collections::BTreeSet;
use std::str::FromStr;

use proto::near::meant;
use proto::{Action, BackupId, ClusterName, Code, Failure};

/// The shortest beginning of an id that is taken for one.
const BEGINNING_MIN: usize = 4;
/// Backups that are named where several are meant.
const NAMED_MAX: usize = 10;

/// A backup as it is typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupRef {
    /// This one.
    Id(BackupId),
    /// The one whose id begins so: its digits, without hyphens.
    Beginning(String),
    /// The newest of its cluster that nobody gave up.
    Last,
    /// The newest of its cluster that was proved.
    Proved,
}

impl FromStr for BackupRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(id) = text.parse() {
            return Ok(Self::Id(id));
        }
        let digits = plain(text);
        let is_beginning = (BEGINNING_MIN..32).contains(&digits.len())
            && digits.chars().all(|digit| digit.is_ascii_hexdigit());
        match text {
            "@last" => Ok(Self::Last),
            "@proved" => Ok(Self::Proved),
            _ if is_beginning => Ok(Self::Beginning(digits)),
            _ => Err(format!(
                "no backup has such an id: write it as the list of backups shows it, or its beginning ({BEGINNING_MIN} digits or more), \
                 @last or @proved"
            )),
        }
    }
}

/// The digits of an id, or of the beginning of one.
fn plain(text: &str) -> String {
    text.replace('-', "").to_ascii_lowercase()
}

/// A backup that can be meant.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) id: BackupId,
    pub(crate) cluster: ClusterName,
    /// When it was committed or stopped, which puts those of a cluster in their order.
    pub(crate) at_ms: Option<i64>,
    /// It can be used, and nobody gave it up.
    pub(crate) is_wanted: bool,
    pub(crate) is_proved: bool,
}

impl BackupRef {
    /// The one that is meant of those that `place` has.
    pub(crate) fn among(&self, known: &[Known], place: &str) -> Result<BackupId, Failure> {
        match self {
            Self::Id(id) => Ok(*id),
            Self::Beginning(digits) => beginning(digits, known, place),
            Self::Last => newest("@last", known.iter().filter(|one| one.is_wanted), place),
            Self::Proved => {
                let proved = known.iter().filter(|one| one.is_wanted && one.is_proved);
                newest("@proved", proved, place)
            }
        }
    }
}

fn beginning(digits: &str, known: &[Known], place: &str) -> Result<BackupId, Failure> {
    let fits: Vec<&Known> =
        known.iter().filter(|one| plain(&one.id.to_string()).starts_with(digits)).collect();
    match fits.as_slice() {
        [one] => Ok(one.id),
        [] => {
            let ids: Vec<String> = known.iter().map(|one| plain(&one.id.to_string())).collect();
            let beginnings = ids.iter().filter_map(|id| id.get(..digits.len()));
            let near = meant(digits, beginnings).and_then(|near| {
                known.iter().find(|one| plain(&one.id.to_string()).starts_with(near))
            });
            let near = near.map_or_else(String::new, |one| format!("; did you mean {}?", one.id));
            let what = format!("{place} has no backup whose id begins with {digits}{near}");
            Err(unknown(what))
        }
        several => {
            let (count, listed) = (several.len(), listed(several));
            let what =
                format!("the ids of {count} backups of {place} begin with {digits}: {listed}");
            Err(ambiguous(what, "Give more of the id: its end differs most."))
        }
    }
}

fn newest<'a>(
    word: &str,
    fits: impl Iterator<Item = &'a Known>,
    place: &str,
) -> Result<BackupId, Failure> {
    let mut fits: Vec<&Known> = fits.collect();
    fits.sort_by_key(|one| (one.at_ms, one.id));
    let clusters: BTreeSet<&ClusterName> = fits.iter().map(|one| &one.cluster).collect();
    match fits.last() {
        Some(newest) if clusters.len() == 1 => Ok(newest.id),
        Some(_) => {
            let of = |cluster: &ClusterName| fits.iter().rfind(|one| one.cluster == *cluster);
            let newest: Vec<&Known> = clusters.iter().copied().filter_map(of).copied().collect();
            let (count, listed) = (clusters.len(), listed(&newest));
            let what =
                format!("{place} has backups of {count} clusters, and {word} may be {listed}");
            Err(ambiguous(what, "Give the id of the one that is meant."))
        }
        None if word == "@proved" => Err(unknown(format!("{place} has no proved backup"))),
        None => Err(unknown(format!("{place} has no backup"))),
    }
}

fn listed(several: &[&Known]) -> String {
    let one = |one: &&Known| format!("{} of {}", one.id, one.cluster);
    let mut named: Vec<String> = several.iter().take(NAMED_MAX).map(one).collect();
    if several.len() > NAMED_MAX {
        named.push(format!("{} more", several.len() - NAMED_MAX));
    }
    named.join(", ")
}

fn unknown(what: String) -> Failure {
    Failure::new(Code::BackupUnknown, Action::FixConfig, what)
        .with_hint("`pgmuster backups list` shows what there is.")
}

fn ambiguous(what: String, hint: &str) -> Failure {
    Failure::new(Code::RequestInvalid, Action::FixConfig, what).with_hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: [&str; 3] = [
        "019ade00-0000-7000-8000-000000000001",
        "019ade00-0000-7000-8000-000000000002",
        "019adf00-0000-7000-8000-000000000003",
    ];

    fn known() -> Vec<Known> {
        let one = |(number, id): (usize, &&str)| Known {
            id: id.parse().unwrap(),
            cluster: "orders".parse().unwrap(),
            at_ms: Some(number.try_into().unwrap()),
            is_wanted: true,
            is_proved: number == 1,
        };
        IDS.iter().enumerate().map(one).collect()
    }

    fn chosen(text: &str, known: &[Known]) -> Result<String, Failure> {
        let chosen = text.parse::<BackupRef>().unwrap().among(known, "file:///r");
        chosen.map(|id| id.to_string())
    }

    #[test]
    fn a_backup_is_named_by_the_beginning_of_its_id() {
        let known = known();
        for text in ["019adf", "019adf00-00", "019ADF0000007", IDS[2]] {
            assert_eq!(chosen(text, &known).unwrap(), IDS[2], "{text}");
        }
        let several = chosen("019ade", &known).unwrap_err();
        assert_eq!(several.code, Code::RequestInvalid);
        for id in &IDS[..2] {
            assert!(several.message.contains(&format!("{id} of orders")), "{several}");
        }
        let none = chosen("019aef00", &known).unwrap_err();
        assert_eq!(none.code, Code::BackupUnknown);
        assert!(none.message.contains(&format!("did you mean {}?", IDS[2])), "{none}");
        assert!(!chosen("ffffffff", &known).unwrap_err().message.contains("did you mean"));
    }

    #[test]
    fn the_newest_and_the_newest_proved_one_have_names() {
        let mut known = known();
        assert_eq!(chosen("@last", &known).unwrap(), IDS[2]);
        assert_eq!(chosen("@proved", &known).unwrap(), IDS[1]);
        known[2].is_wanted = false;
        assert_eq!(chosen("@last", &known).unwrap(), IDS[1], "one that was given up is not meant");
        known[0].cluster = "billing".parse().unwrap();
        let several = chosen("@last", &known).unwrap_err();
        assert_eq!(several.code, Code::RequestInvalid);
        let told = format!("{} of billing, {} of orders", IDS[0], IDS[1]);
        assert!(several.message.contains(&told), "{several}");
        known.truncate(1);
        assert_eq!(chosen("@proved", &known).unwrap_err().code, Code::BackupUnknown);
    }

    #[test]
    fn what_can_be_no_id_is_told_in_a_sentence() {
        for text in ["", "019", "newest", "@first", "019ade00-0000-7000-8000-00000000000z"] {
            let refused = text.parse::<BackupRef>().unwrap_err();
            assert!(refused.starts_with("no backup has such an id: "), "{text}: {refused}");
        }
    }
}
