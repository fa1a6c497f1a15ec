//! The command line: asks and shows. The only crate that sees both coordinator and worker; `up` and `demo` run them in
//! one process. Wiring and printing, no decisions.

pub mod args;
mod backup_ref;
mod become_user;
mod client;
mod commands;
mod configs;
mod embedded;
mod environment;
mod exit;
mod follow;
mod hints;
mod identity;
mod opener;
mod output;
mod secrets;

use std::ops::ControlFlow;
use std::time::Duration;

use clap::Parser as _;
use proto::{Action, Code, Failure};
use tokio::runtime::Builder;

pub use exit::Exit;

use crate::args::{Cli, Command, Output, ServersCall, WalCommand};
use crate::commands::Before;
use crate::hints::Place;

/// How long the last spans may take on their way out.
const LAST_SPANS_MAX: Duration = Duration::from_secs(3);
/// How long a loaded machine may take until the arguments are read.
const PARSED_WITHIN: Duration = Duration::from_secs(30);
/// What the main thread has elsewhere.
const STACK_BYTES: usize = 8 << 20;

/// Runs the program with the arguments of this process.
pub fn main() -> Exit {
    if commands::may_be_a_question(words()) && !commands::is_surely_no_question(words()) {
        return answered();
    }
    parsed().and_then(started).unwrap_or_else(|failed| failed)
}

fn words() -> impl Iterator<Item = String> {
    std::env::args_os().skip(1).map(|text| text.to_string_lossy().into_owned())
}

/// What was typed; when it is no command, the code to end with, after it was said.
fn parsed() -> Result<Cli, Exit> {
    servers_call().map_or_else(Cli::try_parse, Ok).map_err(|error| {
        // Nobody is left to tell when this fails.
        let _ = error.print();
        if error.use_stderr() { Exit::Usage } else { Exit::Ok }
    })
}

/// What a server's settings call, if it is that and nothing more.
fn servers_call() -> Option<Cli> {
    let mut words = std::env::args_os().skip(1).peekable();
    if words.peek()? != "wal" {
        return None;
    }
    let ServersCall { command } = ServersCall::try_parse_from(words).ok()?;
    Some(Cli {
        command: Command::Wal(command),
        output: Output::Table,
        coordinator: None,
        token_file: None,
        log: environment::variable("PGMUSTER_LOG"),
    })
}

/// Runs what may be `wal get`, whose ordinary codes are answers to the server's question whether there is a file. Whatever else
/// happens on the way, a wrong argument, a panic, a thread that hangs, must not be taken for one. What turns out to be
/// another command runs as ever.
fn answered() -> Exit {
    let (tell, hear) = std::sync::mpsc::sync_channel(2);
    let asked = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
        // Nobody waits any more when a send fails.
        let _ = match parsed() {
            Ok(cli) => match commands::limit(&cli) {
                Some(limit) => {
                    let _ = tell.send(Heard::Begun(limit));
                    tell.send(Heard::Ended(started(cli)))
                }
                None => tell.send(Heard::Another(Box::new(cli))),
            },
            Err(Exit::Ok) => tell.send(Heard::Ended(Ok(Exit::Ok))),
            Err(exit) => tell.send(Heard::Ended(Err(exit))),
        };
    });
    let (mut limit, mut silence) = (PARSED_WITHIN, Exit::NotKnown);
    while asked.is_ok() {
        match hear.recv_timeout(limit) {
            Ok(Heard::Begun((deadline, exit))) => {
                limit = deadline + LAST_SPANS_MAX * 2;
                silence = exit;
            }
            Ok(Heard::Another(cli)) => return started(*cli).unwrap_or_else(|failed| failed),
            Ok(Heard::Ended(Ok(exit))) => return exit,
            // It was said what is wrong.
            Ok(Heard::Ended(Err(_))) => return Exit::NotKnown,
            Err(_) => break,
        }
    }
    output::talk("error: there was no answer in time");
    silence
}

/// What is heard of a question that is being answered.
enum Heard {
    /// For so long it may take, and what silence means then.
    Begun((Duration, Exit)),
    /// It is none.
    Another(Box<Cli>),
    /// A command's own word, or the code of its failure.
    Ended(Result<Exit, Exit>),
}

fn started(cli: Cli) -> Result<Exit, Exit> {
    if let Some(place) = Place::typed(&cli.command) {
        output::about(place);
    }
    let before = match commands::at_once(&cli) {
        ControlFlow::Break(exit) => return Ok(exit),
        ControlFlow::Continue(before) => before,
    };
    // A server starts `wal push` for each segment, which asks a service and waits: threads would be most of its work.
    let mut builder = match &cli.command {
        Command::Wal(WalCommand::Push(_) | WalCommand::Get(_)) => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::talk(&format!("error: failed to start: {error}"));
            return Err(Exit::Failed);
        }
    };
    runtime.block_on(run(cli, before))
}

async fn run(cli: Cli, before: Before) -> Result<Exit, Exit> {
    let ended = match become_user::become_owner(&cli).await {
        Err(failure) => Err(failure),
        Ok(()) => match telemetry::init(&telemetry_options(&cli)) {
            Err(error) => {
                let message = format!("failed to {error}");
                Err(Failure::new(Code::ConfigInvalid, Action::FixConfig, message)
                    .with_hint("Look at --log and at the OTEL_ variables of the environment."))
            }
            Ok(guard) => {
                let ended = Box::pin(commands::run(cli, before)).await;
                guard.shutdown(LAST_SPANS_MAX).await;
                ended
            }
        },
    };
    ended.map_err(|failure| {
        output::failure(&failure);
        Exit::of(&failure)
    })
}

fn telemetry_options(cli: &Cli) -> telemetry::Options {
    let (role, filter) = match &cli.command {
        Command::Coordinator(_) => ("pgmuster-coordinator", "info"),
        Command::Worker(_) => ("pgmuster-worker", "info"),
        Command::Up(_) | Command::Demo(_) => ("pgmuster", "error"),
        _ => ("pgmuster-cli", "error"),
    };
    telemetry::Options {
        service_name: role.to_owned(),
        instance: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        log_format: telemetry::LogFormat::Human,
        log_filter: cli.log.clone().unwrap_or_else(|| filter.to_owned()),
        otlp: None,
        environment: telemetry::Environment::read(environment::variable),
    }
}
