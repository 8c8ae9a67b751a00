//! The commands: each turns its arguments into calls of the library and the results into an [`Outcome`].

mod audit;
mod backup;
mod copy;
mod define;
mod forget;
mod key;
mod load;
mod prune;
mod recover;
mod repair;
mod repository;
mod restore;
mod secret;
mod several;
mod stats;
mod status;
mod target;
mod together;
mod verify;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result};

use self::backup::How;
use crate::cli::{Cli, Command, TargetArgs};
use crate::guard::Watched;
use crate::report::{self, Outcome, Style};
use crate::schedule;
use crate::target::Choice;
use crate::vm::Vm;

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::read();
    let style = Style {
        json: cli.json,
        quiet: cli.quiet,
    };
    let level = match (cli.quiet, cli.verbose) {
        (true, _) if cli.json => "error",
        (true, _) | (_, 0) => "warn",
        (_, 1) => "info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("FORERUN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .without_time()
        .init();
    let command = cli.command.name();
    report::finish(command, style, dispatch(cli.command, style))
}

#[allow(clippy::too_many_lines, reason = "one arm a command")]
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
    if command.ends_in_order() {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))
                .context("take care of signals")?;
        }
    }
    match command {
        Command::Init(args) => repository::init(&args),
        Command::Key { command } => key::run(command),
        Command::Inspect(args) if args.target.is_none() => {
            let all = TargetArgs { all: true, ..args };
            several::each(&all, &[], &interrupted, target::overview)
        }
        Command::Inspect(args) => several::each(&args, &[], &interrupted, target::inspect),
        Command::Track(args) => backup::track(&args, interrupted),
        Command::Changed(args) => backup::changed(&args, interrupted),
        Command::Precopy {
            target,
            pace,
            once,
            until,
            converge,
            audit,
        } => {
            let limits = backup::Ends {
                once,
                until,
                converge,
                audit,
            };
            several::each_of(&target, &[], &interrupted, |target| {
                backup::precopy(target, &pace, &limits, style, Arc::clone(&interrupted))
            })
        }
        Command::Backup {
            target,
            pace,
            freeze,
            limits,
            more,
        } => {
            let how = How {
                pace: &pace,
                freeze: &freeze,
                plan: backup::Plan {
                    limits: limits.limits(),
                    ..backup::Plan::default()
                },
                style,
                interrupted: &interrupted,
            };
            if more.together {
                let targets = several::chosen(&target.target, &more.more)?;
                return together::backup(&target, targets, &how, None);
            }
            several::each_of(&target, &more.more, &interrupted, |target| {
                backup::backup(target, &how)
            })
        }
        Command::Run {
            target,
            pace,
            freeze,
            more,
            at,
            limits,
            hard,
            audit,
        } => {
            let at = schedule::parse(&at)?;
            let how = How {
                pace: &pace,
                freeze: &freeze,
                plan: backup::Plan {
                    limits: limits.limits(),
                    hard,
                    audit,
                },
                style,
                interrupted: &interrupted,
            };
            let targets = several::chosen(&target.target, &more.more)?;
            match targets {
                Some(targets) if more.together => {
                    together::backup(&target, Some(targets), &how, Some(at))
                }
                Some(targets) => together::run(&target, &targets, &how, at),
                None => backup::run(&target, &how, at),
            }
        }
        Command::Load {
            target,
            load,
            repo,
            interval,
            count,
        } => {
            let sampling = load::Sampling {
                interval,
                count,
                repo,
            };
            load::load(&target, &load, &sampling, style, &interrupted)
        }
        Command::Status(args) => status::status(&args, &interrupted),
        Command::Audit(args) => several::each_of(&args.target, &[], &interrupted, |target| {
            audit::audit(target, &args, Arc::clone(&interrupted))
        }),
        Command::List { repo, target } => repository::list(&repo, target.as_deref()),
        Command::Show { repo, point } => repository::show(&repo, &point),
        Command::Diff { repo, a, b } => repository::diff(&repo, &a, &b),
        Command::Stats { repo, of } => stats::stats(&repo, of.as_deref()),
        Command::Verify {
            repo,
            points,
            max_duration,
            share,
            older_than,
            rate,
        } => {
            let limits = verify::Limits {
                max_duration,
                share,
                older_than,
                rate,
            };
            verify::verify(&repo, &points, &limits, style, interrupted)
        }
        Command::Check { repo, points } => verify::check(&repo, &points, style, interrupted),
        Command::Restore(args) => restore::restore(&args, style, &interrupted),
        Command::Prune(args) => prune::prune(&args, style, &interrupted),
        Command::Copy {
            repo,
            points,
            all: _,
            target,
            to,
            rate,
        } => copy::copy(&repo, &to, &points, &target, rate, style, interrupted),
        Command::Forget { repo, forget } => forget::forget(&repo, &forget),
        Command::Pin {
            repo,
            point,
            reason,
        } => forget::pin(&repo, &point, reason),
        Command::Unpin { repo, point } => forget::unpin(&repo, &point),
        Command::Repair { what } => repair::repair(&what),
        Command::Untrack(args) => target::untrack(&args),
        Command::Recover { target, repo } => recover::run(&target, repo.as_deref(), &interrupted),
        Command::DropSession { repo, target, name } => {
            target::drop_session(&repo, &target, name.as_deref())
        }
        Command::Guard { .. } => Ok(Outcome::default()),
    }
}

/// So many of something, in words.
fn counted<T: std::fmt::Display + PartialEq + From<u8> + Copy>(count: T, one: &str) -> String {
    let ending = if count == T::from(1) { "" } else { "s" };
    format!("{count} {one}{ending}")
}

/// Finds a VM. What goes to an encrypted repository is never stored as plain text.
fn find(args: &TargetArgs, encrypted: bool) -> Result<Vm> {
    let choice = Choice {
        include: args.include.clone(),
        exclude: args.exclude.clone(),
        allow_plaintext: args.allow_plaintext || encrypted,
    };
    Vm::find(
        args.named()?,
        args.connect.as_deref(),
        args.name.as_deref(),
        choice,
    )
}
