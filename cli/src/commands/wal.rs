//! `wal …`: what a server calls for each file of its log. Quiet when all is well, because it speaks into the server's log.

use std::path::Path;
use std::time::Duration;

use proto::Failure;
use repository::WalStored;
use worker::archive::{self, Got, Whose, patiently};
use worker::failpoint;

use crate::args::{Cli, Command, WalArchive, WalCommand, WalGet, WalPush};
use crate::commands::repo;
use crate::exit::Exit;
use crate::opener::Opener;
use crate::{environment, output};

/// How long a file is tried for; a standby goes on by streaming, or asks again.
const GET_WITHIN: Duration = Duration::from_mins(5);
const GET_WITHIN_OF_STANDBY: Duration = Duration::from_secs(30);
/// What makes a server a standby.
const STANDBY_SIGNAL: &str = "standby.signal";

/// `wal …`.
pub(crate) async fn run(command: WalCommand) -> Result<Exit, Failure> {
    if let Some(text) = environment::variable("PGMUSTER_FAILPOINT") {
        let armed = failpoint::arm(&text);
        tracing::warn!(armed, "This will fail on purpose: PGMUSTER_FAILPOINT={text}");
    }
    match command {
        WalCommand::Push(args) => push(&args).await,
        WalCommand::Get(args) => get(&args).await,
    }
}

async fn push(args: &WalPush) -> Result<Exit, Failure> {
    let (opener, whose) = asked(&args.archive)?;
    let limit = Duration::from_secs(args.deadline.into());
    let pushed = patiently(limit, async || {
        let repository = open(&args.archive, &opener).await?;
        archive::push(&repository, &whose, &args.path).await
    });
    let pushed = pushed.await?;
    if pushed.stored == WalStored::AlreadyThere {
        output::talk(&format!(
            "{} was archived before, with the same content, in lineage {}",
            pushed.file, pushed.identity.lineage
        ));
    }
    Ok(Exit::Ok)
}

async fn get(args: &WalGet) -> Result<Exit, Failure> {
    let got = async {
        let (opener, whose) = asked(&args.archive)?;
        patiently(within(args), async || {
            let repository = open(&args.archive, &opener).await?;
            archive::get(&repository, &whose, &args.file, &args.path, args.until).await
        })
        .await
    };
    match got.await {
        Ok(Got::Written) => Ok(Exit::Ok),
        Ok(Got::NotThere) => Ok(Exit::Failed),
        Err(failure) if follows(args) => {
            output::failure(&failure);
            output::talk("A standby asks again: this is told as if there were no such file.");
            Ok(Exit::Failed)
        }
        Err(failure) => Err(failure),
    }
}

fn asked(archive: &WalArchive) -> Result<(Opener, Whose), Failure> {
    let whose = match (&archive.whose.cluster, archive.whose.lineage) {
        (Some(cluster), None) => Whose::Cluster(cluster.clone()),
        (None, Some(lineage)) => Whose::Lineage(lineage),
        _ => return Err(Failure::bug("WAL is of either --cluster or --lineage")),
    };
    Ok((Opener::read(&archive.opener)?, whose))
}

async fn open(archive: &WalArchive, opener: &Opener) -> Result<repository::Repository, Failure> {
    let store = repo::open_store(&archive.repository).await?;
    Ok(repository::Repository::open_with(store, opener.unlock()).await?)
}

fn within(args: &WalGet) -> Duration {
    match args.deadline {
        Some(seconds) => Duration::from_secs(seconds.into()),
        None if follows(args) => GET_WITHIN_OF_STANDBY,
        None => GET_WITHIN,
    }
}

/// Whether the server is a standby as long as nobody says otherwise. The server calls in its data directory.
fn follows(args: &WalGet) -> bool {
    args.standby && Path::new(STANDBY_SIGNAL).exists()
}

/// Whether the program may be asked for a file of the log. Only the arguments, once they are read, say whether it is; those
/// that cannot be read say nothing.
pub(crate) fn may_be_a_question(mut words: impl Iterator<Item = String>) -> bool {
    words.any(|word| word == "wal")
}

/// Whether arguments that cannot be read are those of `wal push` beyond doubt: above 125, its exit code would end the server's
/// archiver.
pub(crate) fn is_surely_a_push(words: impl Iterator<Item = String>) -> bool {
    let words: Vec<String> = words.collect();
    let first = words.iter().position(|word| word == "wal").unwrap_or(words.len());
    words.get(first + 1).is_some_and(|word| word == "push")
        && words.iter().all(|word| word != "get")
}

/// How long a question may take, and what silence says; `None` of what is no question.
pub(crate) fn limit(cli: &Cli) -> Option<(Duration, Exit)> {
    match &cli.command {
        Command::Wal(WalCommand::Get(args)) => {
            let silence = if follows(args) { Exit::Failed } else { Exit::NotKnown };
            Some((within(args), silence))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> impl Iterator<Item = String> {
        line.split_whitespace().map(str::to_owned)
    }

    #[test]
    fn whatever_may_be_a_question_is_taken_for_one() {
        for line in [
            "wal get 000000010000000000000001 pg_wal/RECOVERYXLOG --key k",
            "wal get 000000010000000000000001 pg_wal/RECOVERYXLOG --cluster push",
            "wal gte %f %p",
            "wal",
            "-o json --log=debug wal --coordinator x get",
            "--log push wal get",
            "cluster show wal",
        ] {
            assert!(may_be_a_question(words(line)), "{line}");
            assert!(!is_surely_a_push(words(line)), "{line}");
        }
        assert!(!may_be_a_question(words("status -o json")));
    }

    #[test]
    fn only_a_push_beyond_doubt_is_one() {
        for line in ["wal push", "--log debug wal push pg_wal/000000010000000000000001 --kye k"] {
            assert!(is_surely_a_push(words(line)), "{line}");
        }
        for line in
            ["wal --log push get x", "wal push get x --kye k", "--log wal push wal get", "wal"]
        {
            assert!(!is_surely_a_push(words(line)), "{line}");
        }
    }
}
