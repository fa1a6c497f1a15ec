//! The `pgmuster` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main().into()
}
