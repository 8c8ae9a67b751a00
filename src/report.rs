//! The only printer: results on stdout, words and progress on stderr, one JSON document when asked for, and the exit code.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::clock;
use crate::exit::{Kind, classify};
use crate::progress::Progress;

/// How to print.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// One JSON document.
    pub json: bool,
    /// Only errors.
    pub quiet: bool,
}

/// What a command came to, besides failing.
#[derive(Debug, Default)]
pub struct Outcome {
    /// One entry a target, for JSON.
    pub targets: Vec<Value>,
    /// More top-level members of the JSON document.
    pub more: Map<String, Value>,
    /// The result as people read it.
    pub lines: Vec<String>,
    /// What the operator should know.
    pub warnings: Vec<String>,
    /// How it ended when it did not end well.
    pub kind: Option<Kind>,
    /// Why it failed, for commands that have something to warn of all the same.
    pub errors: Vec<anyhow::Error>,
}

impl Outcome {
    /// Adds a line for people.
    pub fn line(&mut self, line: impl Into<String>) {
        self.lines.push(line.into());
    }

    /// How it ends; `None` is well.
    #[must_use]
    pub fn ends_as(&self) -> Option<Kind> {
        let warned = (!self.warnings.is_empty()).then_some(Kind::Warned);
        let errors = self.errors.iter().map(|error| classify(error).0);
        errors.chain(self.kind).max().or(warned)
    }

    /// Takes in how the command ended on one of several targets.
    pub fn join(&mut self, target: &str, ended: Result<Self, anyhow::Error>) {
        let one = ended.unwrap_or_else(|error| Self {
            errors: vec![error],
            ..Self::default()
        });
        self.targets.extend(one.targets);
        self.lines.extend(one.lines);
        self.more.extend(one.more);
        let warnings = one.warnings.into_iter();
        self.warnings
            .extend(warnings.map(|warning| format!("{target}: {warning}")));
        self.kind = self.kind.into_iter().chain(one.kind).max();
        let errors = one.errors.into_iter();
        self.errors
            .extend(errors.map(|error| error.context(target.to_owned())));
    }
}

/// How a command failed: the kind, the words and the way out.
type Failed = (Kind, String, Option<String>);

/// Prints the end of a command and gives its exit code.
#[must_use]
pub fn finish(command: &str, style: Style, result: Result<Outcome, anyhow::Error>) -> ExitCode {
    let mut outcome = result.unwrap_or_else(|error| Outcome {
        errors: vec![error],
        ..Outcome::default()
    });
    let kind = outcome.ends_as();
    let failed: Vec<Failed> = std::mem::take(&mut outcome.errors)
        .iter()
        .map(|error| {
            let (kind, hint) = classify(error);
            (kind, format!("{error:#}"), hint)
        })
        .collect();
    if style.json {
        print_json(command, &outcome, &failed);
    } else if !style.quiet || outcome.kind.is_some() {
        for line in &outcome.lines {
            out(line);
        }
    }
    // Cron mails what is printed, not how it ended; of a document that is asked for quietly they are a part.
    if !(style.quiet && style.json) {
        for warning in &outcome.warnings {
            words(&format!("warning: {warning}"));
        }
    }
    for (_, message, hint) in &failed {
        words(&format!("forerun: {message}"));
        if let Some(hint) = hint {
            words(&format!("  {hint}"));
        }
    }
    kind.map_or(ExitCode::SUCCESS, |kind| ExitCode::from(kind.code()))
}

fn print_json(command: &str, outcome: &Outcome, failed: &[Failed]) {
    let errors: Vec<Value> = failed
        .iter()
        .map(|(kind, message, hint)| json!({ "kind": kind, "message": message, "hint": hint }))
        .collect();
    let mut document = json!({
        "schema": 1, "command": command, "targets": outcome.targets,
        "warnings": outcome.warnings, "errors": errors,
    });
    if let Some(members) = document.as_object_mut() {
        members.extend(outcome.more.clone());
    }
    writeln!(std::io::stdout(), "{document}").ok();
}

/// A line of a result that goes on: printed at once, for people.
pub fn at_once(style: Style, line: &str) {
    if !style.json && !style.quiet {
        out(line);
    }
}

/// A line about a run that goes on, for who started it by hand.
pub fn meanwhile(style: Style, line: &str) {
    if !style.json && !style.quiet {
        words(line);
    }
}

/// A line of the result. A reader that has gone away is no error of ours.
fn out(line: &str) {
    writeln!(std::io::stdout(), "{}", harmless(line)).ok();
}

/// A line for people.
fn words(line: &str) {
    writeln!(std::io::stderr(), "{}", harmless(line)).ok();
}

/// Names come from guests, from stored points and from the command line: what would move a terminal's cursor is spelled.
fn harmless(line: &str) -> Cow<'_, str> {
    let harms = |c: char| c.is_control() && c != '\n';
    if !line.contains(harms) {
        return line.into();
    }
    let spell = |c: char| {
        if harms(c) {
            c.escape_default().to_string()
        } else {
            c.to_string()
        }
    };
    line.chars().map(spell).collect()
}

/// A progress bar on a terminal, until it is dropped; nothing elsewhere.
pub struct Bar {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bar {
    /// Shows a run's progress.
    #[must_use]
    pub fn show(progress: Arc<Progress>, style: Style) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        if style.quiet || style.json || !std::io::stderr().is_terminal() {
            return Self {
                ended,
                thread: None,
            };
        }
        let stop = Arc::clone(&ended);
        let thread = std::thread::spawn(move || draw(&progress, &stop));
        Self {
            ended,
            thread: Some(thread),
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn draw(progress: &Progress, stop: &AtomicBool) {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    let template =
        "{msg:20} {bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} ETA {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    let mut phase = String::new();
    while !stop.load(Ordering::Relaxed) {
        let now = progress.phase();
        if now != phase {
            bar.reset();
            phase = now;
        }
        bar.set_message(progress.words());
        bar.set_length(progress.total.load(Ordering::Relaxed));
        bar.set_position(progress.done.load(Ordering::Relaxed));
        clock::sleep(Duration::from_millis(100));
    }
    bar.finish_and_clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_move_the_cursor() {
        let plain = "web-1: zwei Ämter, 3 µs\n  and more";
        assert_eq!(harmless(plain), plain);
        assert_eq!(harmless("a\u{1b}[2Jb\rc\u{9b}"), "a\\u{1b}[2Jb\\rc\\u{9b}");
    }
}
