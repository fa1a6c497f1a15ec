//! Commands in hints, so that they can be pasted: where crates below can only say `URL --key FILE`, this command line says which
//! repository and which key; and whoever works without a coordinator is sent to the repository instead.

use std::path::Path;

use proto::SecretRef;

use crate::args::{
    BackupAt, BackupsCommand, Command, KeyCommand, RecoveryCommand, RepoCommand, WalCommand,
};

/// How a hint names a repository that it does not know.
const PLACEHOLDER: &str = "URL --key FILE";

/// Keys that are not the one that was typed.
const OTHER_KEYS: [&str; 2] = ["OTHER", "NEW_FILE"];

/// The repository of a command line, in words for a shell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    url: String,
    /// With what opens it.
    words: String,
    asks: Asks,
}

/// Who is asked by whoever is told a hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asks {
    /// A coordinator, which is there.
    Coordinator,
    /// The repository; there may be a coordinator beside it.
    Repository,
    /// Nobody: a command that needs none is given where there is none.
    Nobody,
}

impl Place {
    /// The one that was typed, where that is one.
    pub(crate) fn typed(command: &Command) -> Option<Self> {
        match command {
            Command::Backup(args) => {
                let (key, passphrase) = (args.key.as_deref(), args.passphrase.as_deref());
                Self::of(args.repository.as_deref()?, key, passphrase).map(Self::alone)
            }
            Command::Restore(args) => {
                let (key, passphrase) = (args.key.as_deref(), args.passphrase.as_deref());
                Self::of(args.repository.as_deref()?, key, passphrase).map(Self::alone)
            }
            Command::Backups(
                BackupsCommand::Delete { at, .. }
                | BackupsCommand::Undelete { at, .. }
                | BackupsCommand::Hold { at, .. }
                | BackupsCommand::Release { at },
            ) => {
                let BackupAt { repository, opener, .. } = at;
                let (key, passphrase) = (opener.key.as_deref(), opener.passphrase.as_deref());
                Self::of(repository.as_deref()?, key, passphrase)
            }
            Command::Repo(command) => Self::of_repo(command),
            Command::Recovery(RecoveryCommand::Windows { place, opener, .. }) => {
                Self::of(place, opener.key.as_deref(), opener.passphrase.as_deref())
            }
            Command::Wal(WalCommand::Push(args)) => Self::of_archive(&args.archive),
            Command::Wal(WalCommand::Get(args)) => Self::of_archive(&args.archive),
            Command::Wal(WalCommand::Serve(args)) => Self::of(
                &args.repository,
                args.opener.key.as_deref(),
                args.opener.passphrase.as_deref(),
            ),
            _ => None,
        }
    }

    /// That of the whole product in one process, which has a coordinator too.
    pub(crate) fn of_whole(url: &str, key: &Path) -> Self {
        Self {
            url: quoted(url),
            words: format!("{} {}", quoted(url), of_key(key)),
            asks: Asks::Coordinator,
        }
    }

    fn of_repo(command: &RepoCommand) -> Option<Self> {
        let at = match command {
            RepoCommand::Init { url, key, .. } => return Self::of(url, Some(key), None),
            RepoCommand::List(at)
            | RepoCommand::Key(
                KeyCommand::List(at)
                | KeyCommand::Check(at)
                | KeyCommand::Add { at, .. }
                | KeyCommand::Rotate { at, .. }
                | KeyCommand::Retire { at, .. },
            )
            | RepoCommand::Delete { at, .. }
            | RepoCommand::Undelete { at, .. }
            | RepoCommand::Hold { at, .. }
            | RepoCommand::Release { at, .. }
            | RepoCommand::Gc { at, .. } => at,
            RepoCommand::Check(args) => &args.at,
            // It has two, and a failure may be of either.
            RepoCommand::Copy(_) => {
                let (url, words) = ("URL".to_owned(), PLACEHOLDER.to_owned());
                return Some(Self { url, words, asks: Asks::Repository });
            }
        };
        Self::of(&at.url, at.opener.key.as_deref(), at.opener.passphrase.as_deref())
    }

    fn of_archive(archive: &crate::args::WalArchive) -> Option<Self> {
        let (key, passphrase) = (&archive.opener.key, &archive.opener.passphrase);
        Self::of(archive.repository.as_deref()?, key.as_deref(), passphrase.as_deref())
    }

    fn of(url: &str, key: Option<&Path>, passphrase: Option<&str>) -> Option<Self> {
        let opener = match (key, passphrase) {
            (Some(key), _) => of_key(key),
            (None, Some(reference)) => of_passphrase(reference)?,
            (None, None) => return None,
        };
        let url = quoted(url);
        Some(Self { words: format!("{url} {opener}"), url, asks: Asks::Repository })
    }

    fn alone(self) -> Self {
        Self { asks: Asks::Nobody, ..self }
    }

    /// A text with this repository in its commands.
    pub(crate) fn fill(&self, text: &str) -> String {
        let text = match self.asks {
            Asks::Coordinator => text.to_owned(),
            asks => of_repository(text, asks == Asks::Nobody),
        };
        // What is filled in is not looked at again.
        let of_other = |text: String, key: &str| {
            text.replace(&format!("URL --key {key}"), &format!("{} --key {key}", self.url))
        };
        OTHER_KEYS.into_iter().fold(text, of_other).replace(PLACEHOLDER, &self.words)
    }
}

fn of_key(key: &Path) -> String {
    format!("--key {}", quoted(&key.display().to_string()))
}

/// What is no reference is not repeated: it may be the passphrase.
fn of_passphrase(reference: &str) -> Option<String> {
    let is_reference = reference == "-" || reference.parse::<SecretRef>().is_ok();
    is_reference.then(|| format!("--passphrase {}", quoted(reference)))
}

/// A word for a shell.
pub(crate) fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./:@%+=,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// What is asked of a coordinator as a rule, asked of the repository.
fn of_repository(text: &str, takes_alone: bool) -> String {
    let mut parts = text.split('`');
    let mut told = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let mut words = part.split(' ');
        let part = match (words.next(), words.next(), words.next()) {
            (Some("pgmuster"), Some("backups"), Some("list")) => {
                format!("pgmuster repo list {PLACEHOLDER}")
            }
            (Some("pgmuster"), Some("recovery"), Some("windows")) => {
                format!("pgmuster recovery windows {PLACEHOLDER}")
            }
            (Some("pgmuster"), Some("backup"), Some(_)) if takes_alone => {
                format!("{part} --server … --repository {PLACEHOLDER}")
            }
            _ => part.to_owned(),
        };
        told.extend(["`", &part]);
    }
    told
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::Cli;

    fn filled(line: &[&str], hint: &str) -> String {
        let words = ["pgmuster"].iter().chain(line).copied();
        let place = Place::typed(&Cli::try_parse_from(words).unwrap().command);
        place.map_or_else(|| hint.to_owned(), |place| place.fill(hint))
    }

    #[test]
    fn a_hint_has_the_repository_and_the_key_that_were_typed() {
        let hint = "Look: `pgmuster repo list URL --key FILE`.";
        let url = "s3://b/p?endpoint=http://h";
        let restore = ["restore", "--into", "/x", "--repository", url, "--key", "my key"];
        let told = "Look: `pgmuster repo list 's3://b/p?endpoint=http://h' --key 'my key'`.";
        assert_eq!(filled(&restore, hint), told);
        let told = "Look: `pgmuster repo list file:///r --passphrase env:P`.";
        assert_eq!(filled(&["repo", "gc", "file:///r", "--passphrase", "env:P"], hint), told);
        // It may be the passphrase itself.
        assert_eq!(filled(&["repo", "gc", "file:///r", "--passphrase", "secret"], hint), hint);
        // It may be about either.
        let copy = ["repo", "copy", "file:///r", "--key", "k", "file:///s"];
        assert_eq!(filled(&copy, hint), hint);
        assert_eq!(filled(&copy, "`pgmuster backups list`"), "`pgmuster repo list URL --key FILE`");
        assert_eq!(filled(&["status"], hint), hint);
        let other = "`pgmuster repo key check URL --key OTHER`";
        let told = "`pgmuster repo key check file:///r --key OTHER`";
        assert_eq!(filled(&["repo", "list", "file:///r", "--key", "k"], other), told);
        let windows = ["recovery", "windows", "file:///URL", "--key", "k"];
        assert_eq!(filled(&windows, hint), "Look: `pgmuster repo list file:///URL --key k`.");
    }

    #[test]
    fn whoever_has_no_coordinator_is_sent_to_the_repository() {
        let hint = "`pgmuster backups list orders` shows them; `pgmuster backup orders --engine pg_dump` takes one.";
        let told = "`pgmuster repo list file:///r --key k` shows them; `pgmuster backup orders --engine pg_dump --server … \
                    --repository file:///r --key k` takes one.";
        let restore = ["restore", "--into", "/x", "--repository", "file:///r", "--key", "k"];
        assert_eq!(filled(&restore, hint), told);
        assert_eq!(filled(&["restore", "orders", "--into", "/x"], hint), hint);
        let told = "`pgmuster repo list file:///r --key k` shows them; `pgmuster backup orders --engine pg_dump` takes one.";
        assert_eq!(filled(&["repo", "list", "file:///r", "--key", "k"], hint), told);
        let whole = Place::of_whole("file:///srv/r", Path::new("/srv/k"));
        assert_eq!(whole.fill(hint), hint, "it has one");
        assert_eq!(whole.fill(PLACEHOLDER), "file:///srv/r --key /srv/k");
    }
}
