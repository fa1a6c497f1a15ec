//! The job protocol at the coordinator's edge: real messages through the in-process broker, real HTTP over the Unix
//! socket, a clock that tests move, and a worker that is a script.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on stops where it stands"
)]

mod api;
mod archive;
mod attempts;
mod away;
mod orders;
mod several;
mod silence;
mod support;
