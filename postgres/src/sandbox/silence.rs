//! A server that opened and then gives no answer: a real one, whose postmaster is made to stand still.

use std::time::{Duration, Instant};

use proto::{Lsn, Timeline};
use rustix::process::Signal;
use tokio_util::sync::CancellationToken;

use super::{AskError, Boot, EmptyOptions, Sandbox, SandboxOptions, SandboxRoom};
use crate::binaries::Binaries;
use crate::control_file::ControlFile;
use crate::{Error, unfit};

const PATIENCE: Duration = Duration::from_mins(2);

#[tokio::test]
async fn a_server_that_opened_and_gives_no_answer_is_held_against_this_machine() {
    let binaries = Binaries::of_the_suite(15).await;
    let rooms = tempfile::tempdir().unwrap();
    let room = SandboxRoom::create(rooms.path(), "proof", None).await.unwrap();
    let empty = EmptyOptions {
        superuser: "postgres".to_owned(),
        encoding: "UTF8".to_owned(),
        sessions: 1,
        timeout: PATIENCE,
        cancel: CancellationToken::new(),
    };
    let sandbox = Sandbox::empty(&binaries, room, empty).await.unwrap();
    // The server is dropped first.
    let Sandbox { room, isolation, mut server, .. } = sandbox;
    let identifier = ControlFile::read(&room.data_directory()).unwrap().system_identifier;
    let options = SandboxOptions::new(Lsn::INVALID, Timeline(1), identifier);
    let boot = Boot {
        binaries: &binaries,
        room: &room,
        options: &options,
        isolation: &isolation,
        account: room.account,
        deadline: Instant::now() + PATIENCE,
    };
    assert!(boot.ask("postgres").await.is_ok());

    server.signal(Signal::STOP).unwrap();
    // Nothing moves any more but the clock of this test.
    tokio::time::pause();
    let Err(error) = boot.ask("postgres").await else { panic!("it stands still") };
    assert!(matches!(error, AskError::Silent), "{}", error.text());
    let error = boot.gave_no_answer(&mut server, error).await;
    let Error::SandboxUnfit { what, evidence } = error else { panic!("{error}") };
    assert_eq!((what.as_str(), evidence.as_str()), (unfit::SLOW, "it does not answer within 30 s"));

    // Whether it is still there is asked of the system.
    tokio::time::resume();
    server.kill();
    let error = boot.gave_no_answer(&mut server, AskError::Silent).await;
    let Error::SandboxUnfit { what, .. } = error else { panic!("{error}") };
    assert_eq!(what, unfit::KILLED);
}
