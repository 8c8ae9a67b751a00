//! The commands: each turns its arguments into calls of the library and the results into an [`Outcome`].

mod backup;
mod forget;
mod repository;
mod restore;
mod target;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;

use crate::cli::{Cli, Command, TargetArgs};
use crate::guard::Watched;
use crate::report::{self, Outcome, Style};
use crate::target::Choice;
use crate::vm::Vm;

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let style = Style {
        json: cli.json,
        quiet: cli.quiet,
    };
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("FORERUN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .init();
    let command = cli.command.name();
    report::finish(command, style, dispatch(cli.command, style))
}

fn dispatch(command: Command, style: Style) -> Result<Outcome> {
    // A guard must outlive the signals that end its run.
    if let Command::Guard {
        journal,
        deadline_ms,
        main,
        connect,
        domain,
    } = command
    {
        crate::guard::run(&Watched {
            journal: &journal,
            deadline: Duration::from_millis(deadline_ms),
            main,
            domain: connect.as_deref().zip(domain.as_deref()),
        })?;
        return Ok(Outcome::default());
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    if command.holds_a_vm() {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))
                .context("take care of signals")?;
        }
    }
    match command {
        Command::Init { repo, block_size } => repository::init(&repo, block_size),
        Command::Inspect(target) => target::inspect(&target),
        Command::Track(args) => backup::track(&args, interrupted),
        Command::Changed(args) => backup::changed(&args, interrupted),
        Command::Precopy {
            target,
            pace,
            once,
            until,
            converge,
        } => {
            let limits = backup::Limits {
                once,
                until,
                converge,
            };
            backup::precopy(&target, &pace, &limits, style, interrupted)
        }
        Command::Backup {
            target,
            pace,
            freeze,
        } => backup::backup(&target, &pace, &freeze, style, interrupted),
        Command::Run {
            target,
            pace,
            freeze,
            at,
        } => backup::run(&target, &pace, &freeze, &at, style, interrupted),
        Command::Status(args) => target::status(&args),
        Command::List { repo, target } => repository::list(&repo.repo, target.as_deref()),
        Command::Show { repo, point } => repository::show(&repo.repo, &point),
        Command::Diff { repo, a, b } => repository::diff(&repo.repo, &a, &b),
        Command::Verify {
            repo,
            points,
            max_duration,
        } => repository::verify(&repo.repo, &points, max_duration),
        Command::Restore {
            repo,
            point,
            output,
            disk,
            format,
            force,
        } => {
            let request = restore::Request {
                point,
                output,
                disks: disk,
                format,
                force,
            };
            restore::restore(&repo.repo, &request, style)
        }
        Command::Forget { repo, forget } => forget::forget(&repo.repo, &forget),
        Command::Pin {
            repo,
            point,
            reason,
        } => forget::pin(&repo.repo, &point, reason),
        Command::Unpin { repo, point } => forget::unpin(&repo.repo, &point),
        Command::Untrack(args) => target::untrack(&args),
        Command::Recover { target, repo } => target::recover(&target, repo.as_deref()),
        Command::DropSession { repo, target } => repository::drop_session(&repo.repo, &target),
        Command::Guard { .. } => Ok(Outcome::default()),
    }
}

fn find(args: &TargetArgs) -> Result<Vm> {
    let choice = Choice {
        include: args.include.clone(),
        exclude: args.exclude.clone(),
        allow_plaintext: args.allow_plaintext,
    };
    Vm::find(
        &args.target,
        args.connect.as_deref(),
        args.name.as_deref(),
        choice,
    )
}
