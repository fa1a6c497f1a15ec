//! `wal …`: what a server calls for each file of its log. Quiet when all is well, because it speaks into the server's log.

use std::cell::Cell;
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::{Action, Code, Failure, LineageId};
use repository::{Repository, WalStored};
use worker::archive::service::{self, Asking, Heard, Service};
use worker::archive::{self, Got, Whose, patiently};
use worker::failpoint;

use crate::args::{Cli, Command, WalArchive, WalCommand, WalGet, WalPush, WalServe};
use crate::commands::repo::Named;
use crate::commands::roles::Signals;
use crate::exit::Exit;
use crate::opener::Opener;
use crate::{environment, output};

/// How long a file is tried for; a standby goes on by streaming, or asks again.
const GET_WITHIN: Duration = Duration::from_mins(5);
const GET_WITHIN_OF_STANDBY: Duration = Duration::from_secs(30);
/// How long a service may be silent until the work is done without it.
const SILENCE_MAX: Duration = Duration::from_mins(1);
/// What makes a server a standby.
const STANDBY_SIGNAL: &str = "standby.signal";

/// Variables by which a call does more than to ask: it exports, or fails on purpose.
const MORE_THAN_A_QUESTION: [&str; 3] =
    [FAILPOINT, "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
const FAILPOINT: &str = "PGMUSTER_FAILPOINT";

/// What came before there was a runtime.
pub(crate) struct Before {
    began: Instant,
    /// What a service said, if it was asked. It is not asked twice.
    heard: Cell<Option<Heard<Infallible>>>,
}

/// Asks the service, where there is one, and ends with its answer. A server starts this program for each segment and waits, in a
/// recovery with the one process that replays: whatever else is made ready first is most of the work.
pub(crate) fn at_once(cli: &Cli) -> ControlFlow<Exit, Before> {
    let began = Instant::now();
    let asked = match &cli.command {
        _ if cli.log.is_some() => None,
        _ if MORE_THAN_A_QUESTION.iter().any(|name| environment::variable(name).is_some()) => None,
        Command::Wal(WalCommand::Push(args)) => push_at_once(args, began),
        Command::Wal(WalCommand::Get(args)) => get_at_once(args, began),
        _ => None,
    };
    match asked.map(Heard::done).transpose() {
        Ok(Some(exit)) => ControlFlow::Break(exit),
        Ok(None) => ControlFlow::Continue(Before { began, heard: Cell::default() }),
        Err(heard) => ControlFlow::Continue(Before { began, heard: Cell::new(Some(heard)) }),
    }
}

fn push_at_once(args: &WalPush, began: Instant) -> Option<Heard<Exit>> {
    let archive = Archive::to_push(args, began).ok()?;
    let heard = archive.asking()?.to_store(&args.path);
    Some(heard.map(|(lineage, stored)| pushed(args, lineage, stored)))
}

fn get_at_once(args: &WalGet, began: Instant) -> Option<Heard<Exit>> {
    let archive = Archive::to_get(args, began).ok()?;
    Some(archive.asking()?.for_file(&args.file, &args.path, args.until).map(exit_of))
}

/// `wal …`.
pub(crate) async fn run(command: WalCommand, before: Before) -> Result<Exit, Failure> {
    if let Some(text) = environment::variable(FAILPOINT) {
        let armed = failpoint::arm(&text);
        tracing::warn!(armed, "This will fail on purpose: PGMUSTER_FAILPOINT={text}");
    }
    match command {
        WalCommand::Push(args) => push(&args, before).await,
        WalCommand::Get(args) => get(&args, before).await,
        WalCommand::Serve(args) => serve(args).await,
    }
}

async fn push(args: &WalPush, before: Before) -> Result<Exit, Failure> {
    let archive = Archive::to_push(args, before.began)?;
    let (lineage, stored) = patiently(archive.limit, before.began.elapsed(), async || {
        let away = match archive.ask(&before, |asking| asking.to_store(&args.path)) {
            Heard::Answer(answer) => return answer,
            Heard::Nobody(why) => why,
        };
        let repository = archive.open(away).await?;
        let pushed = archive::push(&repository, &archive.whose, &args.path).await?;
        Ok((pushed.identity.lineage, pushed.stored))
    })
    .await?;
    Ok(pushed(args, lineage, stored))
}

fn pushed(args: &WalPush, lineage: LineageId, stored: WalStored) -> Exit {
    if stored == WalStored::AlreadyThere {
        output::talk(&format!(
            "{} was archived before, with the same content, in lineage {lineage}",
            args.path.display()
        ));
    }
    Exit::Ok
}

async fn get(args: &WalGet, before: Before) -> Result<Exit, Failure> {
    let got = async {
        let archive = Archive::to_get(args, before.began)?;
        patiently(archive.limit, before.began.elapsed(), async || {
            let ask = |asking: Asking<'_>| asking.for_file(&args.file, &args.path, args.until);
            let away = match archive.ask(&before, ask) {
                Heard::Answer(answer) => return answer,
                Heard::Nobody(why) => why,
            };
            let repository = archive.open(away).await?;
            archive::get(&repository, &archive.whose, &args.file, &args.path, args.until).await
        })
        .await
    };
    match got.await {
        Ok(got) => Ok(exit_of(got)),
        Err(failure) if follows(args) => {
            output::failure(&failure);
            output::talk("A standby asks again: this is told as if there were no such file.");
            Ok(Exit::Failed)
        }
        Err(failure) => Err(failure),
    }
}

fn exit_of(got: Got) -> Exit {
    match got {
        Got::Written => Exit::Ok,
        Got::NotThere => Exit::Failed,
    }
}

async fn serve(args: WalServe) -> Result<Exit, Failure> {
    let opener = Opener::read(&args.opener)?;
    let archive = Named { url: args.repository, opener };
    // What is wrong with it is better known now than when a server asks.
    archive.open().await?;
    let socket = args.socket;
    let service = Service::listen(&socket, Arc::new(archive)).await.map_err(|error| {
        use std::io::ErrorKind::{AddrInUse, AlreadyExists, NotFound, PermissionDenied};
        let why = match (error.kind(), socket.parent()) {
            (NotFound, Some(directory)) if !directory.exists() => {
                format!("there is no directory {}", directory.display())
            }
            (kind, _) => kind.to_string(),
        };
        let what = format!("failed to listen at {}: {why}", socket.display());
        let hint = match error.kind() {
            AddrInUse => "Another service answers there, and goes on.",
            AlreadyExists => {
                "A file lies there that is no socket; it was not touched. Name another place."
            }
            NotFound => "Make that directory first, for this user alone, or name another place.",
            PermissionDenied => "Its directory must be this user's to write.",
            _ => "The path of a socket is short: some 100 bytes.",
        };
        Failure::new(Code::ConfigInvalid, Action::FixConfig, what).with_hint(hint)
    })?;
    output::talk(&format!("Answers at {}", socket.display()));
    Signals::listen()?.next().await;
    service.stop().await;
    Ok(Exit::Ok)
}

/// Whose archive, and how it is reached.
struct Archive<'a> {
    args: &'a WalArchive,
    whose: Whose,
    socket: Option<PathBuf>,
    /// How long a silent service is waited for.
    patience: Duration,
    began: Instant,
    limit: Duration,
}

impl<'a> Archive<'a> {
    fn to_push(args: &'a WalPush, began: Instant) -> Result<Self, Failure> {
        let limit = Duration::from_secs(args.deadline.into());
        let archive = Self::of(&args.archive, args.archive.socket.clone(), began, limit)?;
        let whose = match archive.whose {
            Whose::Cluster(cluster) if args.new => Whose::New(cluster),
            whose => whose,
        };
        Ok(Self { whose, ..archive })
    }

    fn to_get(args: &'a WalGet, began: Instant) -> Result<Self, Failure> {
        let socket = args.archive.socket.clone();
        let socket =
            socket.or_else(|| environment::variable(service::SOCKET_VARIABLE).map(PathBuf::from));
        Self::of(&args.archive, socket, began, within(args))
    }

    fn of(
        args: &'a WalArchive,
        socket: Option<PathBuf>,
        began: Instant,
        limit: Duration,
    ) -> Result<Self, Failure> {
        let whose = match (&args.whose.cluster, args.whose.lineage) {
            (Some(cluster), None) => Whose::Cluster(cluster.clone()),
            (None, Some(lineage)) => Whose::Lineage(lineage),
            _ => return Err(Failure::bug("WAL is of either --cluster or --lineage")),
        };
        // Who can do the work himself does not wait to the end.
        let patience = if args.repository.is_some() { (limit / 2).min(SILENCE_MAX) } else { limit };
        Ok(Self { args, whose, socket, patience, began, limit })
    }

    fn asking(&self) -> Option<Asking<'_>> {
        Some(Asking {
            socket: self.socket.as_deref()?,
            whose: &self.whose,
            repository: self.args.repository.as_deref(),
            within: self.patience.min(self.left()),
        })
    }

    fn left(&self) -> Duration {
        self.limit.saturating_sub(self.began.elapsed())
    }

    /// What a service says, or said before.
    fn ask<T>(&self, before: &Before, ask: impl FnOnce(Asking<'_>) -> Heard<T>) -> Heard<T> {
        match before.heard.take() {
            Some(heard) => heard.map(|never| match never {}),
            None => self.asking().map_or(Heard::Nobody(None), ask),
        }
    }

    /// Opens the repository to do the work here, because a service did not; `away` says why, where that is known.
    async fn open(&self, away: Option<Failure>) -> Result<Repository, Failure> {
        let opener = Opener::read_if_any(&self.args.opener)?;
        if let Some((url, opener)) = self.args.repository.clone().zip(opener) {
            return Named { url, opener }.open().await;
        }
        Err(away.unwrap_or_else(|| {
            let socket = self.socket.as_deref().unwrap_or(Path::new("?"));
            let what = format!("nobody answers at {}", socket.display());
            Failure::new(Code::WalServiceAway, Action::Retry, what).with_hint(
                "Start the worker there, or `pgmuster wal serve`; with --repository and --key as well, the command does the work itself.",
            )
        }))
    }
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

/// Whether arguments that cannot be read are beyond doubt none of `wal get`: above 125, the exit code of `wal push` would end the
/// server's archiver.
pub(crate) fn is_surely_no_question(words: impl Iterator<Item = String>) -> bool {
    let words: Vec<String> = words.collect();
    let first = words.iter().position(|word| word == "wal").unwrap_or(words.len());
    words.get(first + 1).is_some_and(|word| word == "push" || word == "serve")
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
    use std::collections::BTreeMap;
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixListener;

    use clap::Parser as _;

    use super::*;
    use crate::args::ServersCall;

    fn deployed(file: &str) -> Vec<(String, String)> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd").join(file);
        let text = std::fs::read_to_string(path).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let pairs = lines.filter_map(|line| line.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn the_unit_of_the_service_starts_a_command_that_there_is() {
        let unit: BTreeMap<String, String> =
            deployed("pgmuster-wal-serve.service").into_iter().collect();
        let mut line = unit["ExecStart"].clone();
        for (name, value) in deployed("pgmuster-wal-serve.env") {
            line = line.replace(&format!("${{{name}}}"), &value);
        }
        assert!(!line.contains('$'), "every variable has a value: {line}");
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Wal(WalCommand::Serve(args)) = cli.command else { panic!("{line}") };
        let directory = Path::new("/run").join(&unit["RuntimeDirectory"]);
        assert_eq!(args.socket.parent(), Some(directory.as_path()), "systemd makes its directory");
        assert_eq!(unit["EnvironmentFile"], "/etc/pgmuster/wal-serve.env");
    }

    /// `Before=` names units and no instances, so each instance has to say it for itself.
    #[test]
    fn every_instance_of_a_server_starts_behind_the_service_and_stops_before_it() {
        let order = deployed("postgresql@.service.d/pgmuster-wal-serve.conf");
        let unit = "pgmuster-wal-serve.service".to_owned();
        assert_eq!(order, [("After".to_owned(), unit.clone())]);
        assert!(!deployed(&unit).is_empty(), "{unit} is the name of the unit");
    }

    /// A server's call, of whose service the listener is.
    fn call(line: &str, place: &Path) -> (Cli, UnixListener) {
        let socket = place.join("s");
        let line = format!("pgmuster {line} --cluster orders --socket {}", socket.display());
        let listener = UnixListener::bind(&socket).unwrap();
        (Cli::try_parse_from(line.split_whitespace()).unwrap(), listener)
    }

    const GET: &str = "wal get 000000010000000000000001 RECOVERYXLOG";

    #[test]
    fn what_a_service_answers_ends_a_call_and_what_it_does_not_know_leaves_it_to_itself() {
        let lineage = "018bcfe5-6800-7000-8000-000000000000";
        let stored = format!("{{\"stored\":{{\"lineage\":\"{lineage}\",\"stored\":true}}}}\n");
        let failure = Failure::new(Code::WalMissing, Action::FixData, "there is a gap");
        let failed = format!("{}\n", serde_json::json!({ "failed": failure }));
        for (line, answer, exit) in [
            (GET, "\"not_there\"\n", Some(Exit::Failed)),
            ("wal push pg_wal/000000010000000000000001", &*stored, Some(Exit::Ok)),
            (GET, &failed, None),
            (GET, "\"not_the", None),
            (GET, "", None),
        ] {
            let place = tempfile::tempdir().unwrap();
            let (cli, listener) = call(line, place.path());
            let came = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let (mut asker, _) = listener.accept().unwrap();
                    BufReader::new(&asker).read_line(&mut String::new()).unwrap();
                    asker.write_all(answer.as_bytes()).unwrap();
                });
                at_once(&cli)
            });
            match came {
                ControlFlow::Break(ended) => assert_eq!(Some(ended), exit, "{line}: {answer}"),
                ControlFlow::Continue(before) => {
                    assert!(exit.is_none(), "{line}: {answer}");
                    let heard = before.heard.take().unwrap();
                    let has_failed = matches!(heard, Heard::Answer(Err(_)));
                    assert_eq!(has_failed, answer == failed, "{heard:?}");
                }
            }
        }
    }

    #[test]
    fn a_call_that_is_to_log_asks_when_it_can() {
        let place = tempfile::tempdir().unwrap();
        let (cli, listener) = call(&format!("--log warn {GET}"), place.path());
        let ControlFlow::Continue(before) = at_once(&cli) else { panic!("it has ended") };
        assert!(before.heard.take().is_none());
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_servers_call_is_read_alike_with_and_without_the_other_commands() {
        for line in [
            "wal push x --new --cluster c --socket s --deadline 7",
            "wal push x --lineage 018bcfe5-6800-7000-8000-000000000000 --repository file:///r --key k",
            "wal get 00000002.history x --standby --cluster c --socket s --until 0/3000148",
            "wal serve s --repository file:///r --key k",
        ] {
            let whole =
                Cli::try_parse_from(["pgmuster"].into_iter().chain(line.split(' '))).unwrap();
            let Command::Wal(whole) = whole.command else { panic!("{line}") };
            let alone = ServersCall::try_parse_from(line.split(' ')).unwrap().command;
            assert_eq!(format!("{whole:?}"), format!("{alone:?}"));
        }
        // What has an option of every command is read with all of them.
        assert!(
            ServersCall::try_parse_from("wal push x --cluster c --socket s --log x".split(' '))
                .is_err()
        );
    }

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
            assert!(!is_surely_no_question(words(line)), "{line}");
        }
        assert!(!may_be_a_question(words("status -o json")));
    }

    #[test]
    fn only_a_push_beyond_doubt_is_one() {
        for line in [
            "wal push",
            "wal serve --kye k",
            "--log debug wal push pg_wal/000000010000000000000001 --kye k",
        ] {
            assert!(is_surely_no_question(words(line)), "{line}");
        }
        for line in
            ["wal --log push get x", "wal push get x --kye k", "--log wal push wal get", "wal"]
        {
            assert!(!is_surely_no_question(words(line)), "{line}");
        }
    }
}
