//! The stores against real things: the contract on a directory and on an S3 server, and S3 under injected faults.

#[path = "../common/mod.rs"]
mod common;
mod faults;
mod kept;
mod lab;
mod line;
mod mix;
mod mixed;
mod odd;
mod proxy;
