//! The words of every command's help, as the program prints them, in one file: a change of them is seen in review.
//!
//! `INSTA_UPDATE=always cargo test -p cli --test help` writes the file anew.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write as _;
use std::process::Command;

use clap::CommandFactory as _;
use cli::args::Cli;

/// The section that ends every help; once is enough.
const EVERYWHERE: &str = "\nOptions of every command:\n";

/// What `pgmuster PATH --help` prints where nobody's terminal has a width.
fn help(path: &[&str]) -> String {
    let mut program = Command::new(env!("CARGO_BIN_EXE_pgmuster"));
    let output = program.args(path).arg("--help").env_clear().output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{path:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The help of a command and of those below it, in the order in which it lists them.
fn write(command: &clap::Command, path: &[&str], into: &mut String) {
    let text = help(path);
    let (own, _) = text.split_once(EVERYWHERE).unwrap();
    let shown = if path.is_empty() { &text } else { own };
    let asked: Vec<&str> = ["pgmuster"].iter().chain(path).chain(&["--help"]).copied().collect();
    let lines: Vec<&str> = shown.trim_end().lines().map(str::trim_end).collect();
    writeln!(into, "$ {}\n{}\n", asked.join(" "), lines.join("\n")).unwrap();
    for below in command.get_subcommands() {
        write(below, &[path, &[below.get_name()]].concat(), into);
    }
}

#[test]
fn the_help_of_every_command() {
    let mut text = String::new();
    write(&Cli::command(), &[], &mut text);
    insta::assert_snapshot!("commands", text);
}
