//! What a repository promises, in one program: each test program is linked with everything below, and that takes longer than most
//! tests.

mod changes;
mod collect;
mod common;
mod copy;
mod damage;
mod deletion;
mod golden;
mod interrupted;
mod keys;
mod killed;
#[path = "../store/lab.rs"]
#[expect(dead_code, reason = "the tests of the store need more of it")]
mod lab;
mod mirror;
mod model;
mod protocol;
mod reader;
mod reuse;
mod round_trip;
mod scrub;
mod single_writer;
mod stepped;
mod streams;
mod taken_over;
mod wal;
mod wal_collect;
mod wal_copy;
