//! What giving way came to, and why, in words.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::baseline::Increase;
use super::config::Config;
use super::control::{Cause, Decision};
use crate::units::Bytes;

/// What a run's passes gave up for the guest and the host.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Nothing was read.
    pub paused: Duration,
    /// The pace was held below full speed.
    pub slowed: Duration,
    /// How long for what.
    pub reasons: BTreeMap<Cause, Duration>,
    /// Bytes read, and the time of it, pauses included.
    pub copied: u64,
    /// Of batches, and of waiting for them.
    pub took: Duration,
    /// What could not be seen.
    pub unknown: Vec<&'static str>,
}

impl Report {
    /// A decision held for so long.
    pub(super) fn held(&mut self, decision: &Decision, span: Duration) {
        self.took += span;
        let Some(cause) = decision.cause else { return };
        if decision.stops() {
            self.paused += span;
        } else {
            self.slowed += span;
        }
        *self.reasons.entry(cause).or_default() += span;
    }

    /// For the JSON document.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        let reasons: BTreeMap<String, u64> = self
            .reasons
            .iter()
            .map(|(cause, span)| (name(*cause), millis(*span)))
            .collect();
        let took = millis(self.took);
        json!({
            "paused_ms": millis(self.paused), "slowed_ms": millis(self.slowed), "reasons": reasons,
            "mean_rate": (took > 0).then(|| self.copied.saturating_mul(1000) / took),
            "unknown": self.unknown,
        })
    }
}

fn name<T: Serialize>(value: T) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(name)) => name,
        _ => String::new(),
    }
}

/// A decision in words: `paused: guest I/O latency 3.2 ms, 2.1x of its baseline`.
#[must_use]
pub fn words(decision: &Decision, increase: Option<Increase>, config: &Config) -> String {
    let pace = match decision.rate {
        None => return "full speed".to_owned(),
        Some(0) => "paused".to_owned(),
        Some(rate) => format!("{}/s", Bytes(rate)),
    };
    let Some(cause) = decision.cause else {
        return pace;
    };
    let of = |limit: f64| {
        format!(
            "{:.0} % (allowed: {:.0} %)",
            decision.score * limit * 100.0,
            limit * 100.0
        )
    };
    let why = match (cause, increase) {
        (Cause::Latency, Some(seen)) => format!(
            "guest I/O latency {:.1} ms, {:.1}x of its baseline",
            seen.now / 1e6,
            seen.now / seen.baseline.max(1.0)
        ),
        (Cause::Latency, None) => "guest I/O latency".to_owned(),
        (Cause::Delay, _) => format!(
            "guest I/O took {} longer in the last minute",
            of(config.latency_increase)
        ),
        (Cause::Vcpu, _) => "the guest's CPUs wait longer for the host's".to_owned(),
        (Cause::IoPressure, _) => format!("others wait for I/O {}", of(config.io_pressure)),
        (Cause::MemoryPressure, _) => {
            format!("others wait for memory {}", of(config.memory_pressure))
        }
        (Cause::Cpu, _) => format!("others use the CPUs {}", of(config.cpu)),
        (Cause::DiskUse, _) => format!("others use the disk {}", of(config.disk_use)),
        (Cause::BusyHours, _) => "busy hours".to_owned(),
        (Cause::Rate, _) => "the given rate".to_owned(),
        (Cause::Schedule, _) => "there is time".to_owned(),
        (Cause::Measuring, _) => "measuring what is without us".to_owned(),
        (Cause::Rising, _) => "rising".to_owned(),
    };
    format!("{pace}: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_counted_by_their_reason() {
        let mut report = Report::default();
        let decision = |rate, cause| Decision {
            rate,
            in_flight: 1,
            cause,
            score: 2.0,
        };
        report.held(
            &decision(Some(0), Some(Cause::IoPressure)),
            Duration::from_secs(3),
        );
        report.held(
            &decision(Some(9), Some(Cause::IoPressure)),
            Duration::from_secs(2),
        );
        report.held(&decision(None, None), Duration::from_secs(5));
        report.copied = 1000;
        let json = report.to_json();
        assert_eq!(json["paused_ms"], 3000);
        assert_eq!(json["slowed_ms"], 2000);
        assert_eq!(json["reasons"], json!({ "io-pressure": 5000 }));
        assert_eq!(json["mean_rate"], 100);
    }

    #[test]
    fn the_words_name_the_figures() {
        let decision = Decision {
            rate: Some(0),
            in_flight: 1,
            cause: Some(Cause::Latency),
            score: 11.0,
        };
        let seen = Increase {
            share: 1.1,
            spread: 0.0,
            now: 3.2e6,
            baseline: 1.5e6,
        };
        let said = words(&decision, Some(seen), &Config::default());
        assert_eq!(
            said,
            "paused: guest I/O latency 3.2 ms, 2.1x of its baseline"
        );
    }
}
