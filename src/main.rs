//! The `forerun` binary: parse, call the library, return the exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    forerun::commands::main()
}
