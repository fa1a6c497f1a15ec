//! The stores against real things: the contract on a directory and on an S3 server, and S3 under injected faults.

mod faults;
mod kept;
mod lab;
mod proxy;
