//! The command line: asks and shows. The only crate that sees both coordinator and worker; `up` and `demo` run them in
//! one process. Wiring and printing, no decisions.

pub mod args;
mod become_user;
mod client;
mod commands;
mod configs;
mod embedded;
mod environment;
mod exit;
mod follow;
mod identity;
mod opener;
mod output;
mod secrets;

use std::time::Duration;

use clap::Parser as _;
use proto::{Action, Code, Failure};

pub use exit::Exit;

use crate::args::{Cli, Command};

/// How long the last spans may take on their way out.
const LAST_SPANS_MAX: Duration = Duration::from_secs(3);

/// Runs the program with the arguments of this process.
pub fn main() -> Exit {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody is left to tell when this fails.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage } else { Exit::Ok };
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::talk(&format!("error: failed to start: {error}"));
            return Exit::Failed;
        }
    };
    runtime.block_on(run(cli))
}

async fn run(cli: Cli) -> Exit {
    let ended = match become_user::become_owner(&cli).await {
        Err(failure) => Err(failure),
        Ok(()) => match telemetry::init(&telemetry_options(&cli)) {
            Err(error) => {
                let message = format!("failed to {error}");
                Err(Failure::new(Code::ConfigInvalid, Action::FixConfig, message)
                    .with_hint("Look at --log and at the OTEL_ variables of the environment."))
            }
            Ok(guard) => {
                let ended = Box::pin(commands::run(cli)).await;
                guard.shutdown(LAST_SPANS_MAX).await;
                ended
            }
        },
    };
    ended.unwrap_or_else(|failure| {
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
