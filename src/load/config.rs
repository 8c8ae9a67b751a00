//! What the operator allows: shares, rates and hours.

use std::str::FromStr;

use jiff::civil::Time;

use crate::units::{Bytes, parse_rate};

/// What a pass may do to the guest and the host.
#[derive(Debug, Clone)]
pub struct Config {
    /// Whether the pace follows the load at all.
    pub control: bool,
    /// Bytes a second at most.
    pub rate: Option<u64>,
    /// Requests in flight at most.
    pub in_flight: usize,
    /// How much longer the guest may wait for its I/O and its CPUs because of us, as a share.
    pub latency_increase: f64,
    /// The share of the time in which others may be held up by I/O while we copy.
    pub io_pressure: f64,
    /// The same by a lack of memory.
    pub memory_pressure: f64,
    /// The share of the host's CPUs that others may use while we copy at full speed.
    pub cpu: f64,
    /// The share of the time in which others may keep the disks of the images and of the repository busy, likewise.
    pub disk_use: f64,
    /// Hours with a rate of their own.
    pub busy_hours: Vec<BusyHours>,
    /// Whether the schedule may override the guest.
    pub urgency: Urgency,
    /// What the schedule needs, bytes a second: going faster gains nothing.
    pub needed: Option<u64>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            control: true,
            rate: None,
            in_flight: 16,
            latency_increase: 0.10,
            io_pressure: 0.20,
            memory_pressure: 0.10,
            cpu: 0.80,
            disk_use: 0.90,
            busy_hours: Vec::new(),
            urgency: Urgency::Usual,
            needed: None,
        }
    }
}

impl Config {
    /// The operator's ceiling at a minute of the local day.
    #[must_use]
    pub fn ceiling(&self, minute: u16) -> Option<u64> {
        let busy = self.busy_hours.iter();
        let busy = busy.filter_map(|hours| hours.contains(minute).then_some(hours.rate));
        self.rate.into_iter().chain(busy).min()
    }

    /// Whether it is the hours that make that ceiling.
    #[must_use]
    pub fn is_busy(&self, minute: u16) -> bool {
        self.ceiling(minute) != self.rate
    }
}

/// What a schedule may ask for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Urgency {
    /// Nothing: the guest comes first.
    #[default]
    Usual,
    /// This rate, bytes a second, whatever the guest and the host have to say: a hard deadline needs it. The operator's own
    /// ceilings hold all the same.
    Hard(u64),
}

/// A rate for some hours of every day: `08:00-18:00=20MiB/s`. It may cross midnight; a rate of 0 is a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusyHours {
    from: u16,
    to: u16,
    rate: u64,
}

impl BusyHours {
    fn contains(self, minute: u16) -> bool {
        if self.from <= self.to {
            (self.from..self.to).contains(&minute)
        } else {
            minute >= self.from || minute < self.to
        }
    }
}

impl FromStr for BusyHours {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is not like 08:00-18:00=20MiB/s");
        let (hours, rate) = text.split_once('=').ok_or_else(bad)?;
        let (from, to) = hours.split_once('-').ok_or_else(bad)?;
        let minute = |time: &str| {
            let time: Time = time.trim().parse().map_err(|_| bad())?;
            minute_of(time).ok_or_else(bad)
        };
        let (from, to) = (minute(from)?, minute(to)?);
        if from == to {
            return Err(format!("`{text}` begins when it ends"));
        }
        let rate = match rate.trim() {
            "0" => 0,
            rate => parse_rate(rate)?,
        };
        Ok(Self { from, to, rate })
    }
}

impl std::fmt::Display for BusyHours {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { from, to, rate } = self;
        let time = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
        write!(f, "{}-{}={}/s", time(*from), time(*to), Bytes(*rate))
    }
}

/// The minute of the day.
#[must_use]
pub fn minute_of(time: Time) -> Option<u16> {
    u16::try_from(i32::from(time.hour()) * 60 + i32::from(time.minute())).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_may_cross_midnight_and_the_lowest_rate_counts() {
        let config = Config {
            rate: Some(100 << 20),
            busy_hours: [
                "22:00-06:00=0",
                "05:00-08:30=20MiB/s",
                "05:00-07:00=30MiB/s",
            ]
            .map(|text| text.parse().unwrap())
            .to_vec(),
            ..Config::default()
        };
        let at = |hour: u16, minute: u16| config.ceiling(hour * 60 + minute);
        assert_eq!(at(21, 59), Some(100 << 20));
        assert_eq!(at(22, 0), Some(0));
        assert_eq!(at(0, 0), Some(0));
        assert_eq!(at(5, 59), Some(0));
        assert_eq!(at(6, 0), Some(20 << 20));
        assert_eq!(at(8, 30), Some(100 << 20));
        assert!(config.is_busy(0) && !config.is_busy(12 * 60));
    }

    #[test]
    fn what_is_no_time_or_no_rate_is_refused() {
        for text in [
            "08:00-18:00",
            "8-18=1MiB",
            "08:00-25:00=1MiB",
            "08:00-08:00=1MiB",
            "08:00-09:00=x",
        ] {
            assert!(text.parse::<BusyHours>().is_err(), "{text}");
        }
    }
}
