//! The `pgmuster` program.

use std::process::ExitCode;

/// A worker lives for months. The C library keeps what a job's threads free in the arenas of those threads, and the worker grows
/// with every job (ADR 0025).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    cli::main().into()
}
