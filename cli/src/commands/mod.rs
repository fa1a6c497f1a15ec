//! The commands: one file a group, wiring and printing only.

mod archiving;
mod backup;
mod backups;
mod cluster;
mod config;
mod copy;
mod demo;
mod doctor;
mod gc;
mod job;
mod load;
mod moment;
mod order;
mod recovery;
mod repo;
mod repo_check;
mod repo_key;
mod restore;
mod roles;
mod status;
mod token;
mod up;
mod wal;

pub(crate) use repo::{init as init_repository, refuse_in_server, write_secret};
pub(crate) use up::sockets;
pub(crate) use wal::{Before, at_once, is_surely_no_question, limit, may_be_a_question};

use proto::Failure;

use crate::args::{Cli, Command};
use crate::client::Client;
use crate::exit::Exit;

/// Runs what was typed, and goes on from what was done before there was a runtime.
pub(crate) async fn run(cli: Cli, before: Before) -> Result<Exit, Failure> {
    let format = cli.output;
    let client = || Client::new(cli.coordinator.as_deref(), cli.token_file.as_deref());
    match cli.command {
        Command::Up(args) => up::run(args).await,
        Command::Demo(args) => Box::pin(demo::run(args)).await,
        Command::Coordinator(args) => roles::coordinator(&args.config).await,
        Command::Worker(args) => roles::worker(args, client, format).await,
        Command::Backup(args) => match args.server {
            Some(_) => Box::pin(backup::alone(args, format)).await,
            None => order::backup(&client()?, args, format).await,
        },
        Command::Verify(args) => order::verify(&client()?, args, format).await,
        Command::Maintain(args) => order::maintain(&client()?, args, format).await,
        Command::Restore(args) => {
            restore::check(&args)?;
            match args.repository {
                Some(_) => restore::offline(args, format).await,
                None => order::restore(&client()?, args, format).await,
            }
        }
        Command::Status => status::run(&client()?, format).await,
        Command::Cluster(command) => cluster::run(&client()?, command, format).await,
        Command::Backups(command) => backups::run(client, command, format).await,
        Command::Job(command) => job::run(&client()?, command, format).await,
        Command::Repo(command) => repo::run(command, format).await,
        Command::Wal(command) => wal::run(command, before).await,
        Command::Recovery(command) => recovery::run(client, command, format).await,
        Command::Token(command) => token::run(&client()?, command, format).await,
        Command::Doctor(args) => doctor::run(client(), &args, format).await,
        Command::Config(command) => config::run(&command, format),
    }
}
