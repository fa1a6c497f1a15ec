//! The stores against real things: the contract on a directory and on an S3 server, and S3 under injected faults.

#[path = "../suite/common/mod.rs"]
#[expect(dead_code, reason = "the suite uses the rest of it")]
mod common;
mod faults;
mod kept;
mod lab;
mod line;
mod mix;
mod mixed;
mod odd;
mod proxy;
