//! `load`: what the guests and the host feel, sample by sample, and the pace that it leaves.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::several;
use super::target::looking;
use crate::cli::{LoadArgs, TargetArgs};
use crate::clock::{self, Deadline};
use crate::load::Load;
use crate::report::{self, Outcome, Style};
use crate::vm::Vm;

/// Samples when nobody says how many, and nobody watches.
const COUNT: u32 = 10;

/// How often, and how many times.
pub(super) struct Sampling {
    pub(super) interval: Duration,
    pub(super) count: Option<u32>,
    pub(super) repo: Option<PathBuf>,
}

struct Watched {
    vm: Vm,
    load: Load,
    samples: Vec<Value>,
}

/// `load`.
pub(super) fn load(
    args: &TargetArgs,
    load: &LoadArgs,
    sampling: &Sampling,
    style: Style,
    interrupted: &AtomicBool,
) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut watched = Vec::new();
    let several = several::chosen(args, &[])?;
    for target in several.as_deref().unwrap_or(std::slice::from_ref(args)) {
        match super::find(target, true) {
            Ok(vm) => watched.push(Watched {
                load: Load::new(&vm.key, load.config(None), sampling.repo.as_deref()),
                vm,
                samples: Vec::new(),
            }),
            Err(error) if several.is_some() => {
                outcome.join(&target.named()?.to_string(), Err(error));
            }
            Err(error) => return Err(error),
        }
    }
    let endless = !style.json && std::io::stdout().is_terminal();
    let count = sampling
        .count
        .unwrap_or(if endless { u32::MAX } else { COUNT });
    // The first look only begins the first interval.
    for round in 0..=count {
        let next = Deadline::after(sampling.interval);
        watched.retain_mut(|one| match one.sample(round > 0) {
            Ok(line) => {
                if let Some(line) = line {
                    report::at_once(style, &line);
                }
                true
            }
            Err(error) => {
                outcome.join(&one.vm.target.to_string(), Err(error));
                false
            }
        });
        if watched.is_empty() {
            break;
        }
        while round < count && !next.passed() && !interrupted.load(Ordering::Relaxed) {
            clock::sleep(next.left().min(Duration::from_millis(50)));
        }
        if interrupted.load(Ordering::Relaxed) {
            break;
        }
    }
    for one in watched {
        let unknown = &one.load.report().unknown;
        if !unknown.is_empty() {
            outcome.line(format!(
                "{}: not known here: {}",
                one.vm.target,
                unknown.join(", ")
            ));
        }
        outcome.targets.push(json!({
            "target": one.vm.target.to_string(), "key": one.vm.key, "samples": one.samples, "unknown": unknown,
        }));
    }
    Ok(outcome)
}

impl Watched {
    /// Looks at the VM, which is held for that moment only.
    fn sample(&mut self, shown: bool) -> Result<Option<String>> {
        let mut hold = self.vm.hold(&looking(), "forerun load")?;
        let machine = hold.machine()?;
        let off = self.vm.offline();
        self.load.begin(&mut hold.monitor, &machine, off);
        self.load.rest();
        drop(hold);
        if !shown {
            return Ok(None);
        }
        let seen = self.load.seen;
        let (decision, words) = self.load.outlook();
        let per_second = |count: u64, span: Duration| rounded(ratio(count, span) * 1e9, 1.0);
        let requests = seen.requests.map(|(requests, span)| {
            json!({
                "reads": per_second(requests.count[0], span), "writes": per_second(requests.count[1], span),
                "flushes": per_second(requests.count[2], span),
                "latency_ms": requests.mean().map(|nanos| rounded(nanos / 1e6, 1000.0)),
                "in_flight": rounded(requests.in_flight(span), 1000.0),
            })
        });
        let cpus = seen.cpus.map(|(cpus, span)| {
            json!({
                "ran": rounded(ratio(cpus.ran, span), 1000.0), "waited": rounded(ratio(cpus.waited, span), 1000.0),
            })
        });
        let baseline = self
            .load
            .baseline()
            .map(|nanos| rounded(nanos / 1e6, 1000.0));
        let sample = json!({
            "at": clock::utc_now(), "guest": requests, "baseline_ms": baseline, "cpus": cpus, "host": seen.host,
            "decision": { "rate": decision.rate, "in_flight": decision.in_flight, "cause": decision.cause, "words": words },
        });
        let line = self.line(&sample, &words);
        self.samples.push(sample);
        Ok(Some(line))
    }

    fn line(&self, sample: &Value, words: &str) -> String {
        let number = |pointer: &str, unit: &str| {
            let value = sample.pointer(pointer).and_then(Value::as_f64);
            value.map_or_else(|| "?".to_owned(), |value| format!("{value}{unit}"))
        };
        let percent = |pointer: &str| {
            let value = sample.pointer(pointer).and_then(Value::as_f64);
            value.map_or_else(|| "?".to_owned(), |value| format!("{:.0}%", value * 100.0))
        };
        format!(
            "{}  rd {} wr {} fl {}  lat {} (baseline {})  in flight {}  vcpu {} waits {}  host cpu {} disk {} psi io {} cpu {} mem {}  -> {words}",
            self.vm.target,
            number("/guest/reads", "/s"),
            number("/guest/writes", "/s"),
            number("/guest/flushes", "/s"),
            number("/guest/latency_ms", "ms"),
            number("/baseline_ms", "ms"),
            number("/guest/in_flight", ""),
            percent("/cpus/ran"),
            percent("/cpus/waited"),
            percent("/host/cpu"),
            percent("/host/disk_use"),
            percent("/host/io_pressure"),
            percent("/host/cpu_pressure"),
            percent("/host/memory_pressure"),
        )
    }
}

/// A count, or nanoseconds, by the nanoseconds of a time.
#[expect(clippy::cast_precision_loss, reason = "it is shown, rounded")]
fn ratio(count: u64, span: Duration) -> f64 {
    count as f64 / (span.as_secs_f64() * 1e9).max(1.0)
}

fn rounded(value: f64, scale: f64) -> f64 {
    (value * scale).round() / scale
}
