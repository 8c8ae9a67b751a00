//! Times as operators write them: `HH:MM` in the host's zone, its next occurrence; up to a quarter of an hour past means now.

use jiff::civil::{DateTime, Time};
use jiff::{Timestamp, ToSpan, ZonedDateTime};
use std::fmt;
use std::time::Duration;

use anyhow::Result;

use crate::clock::{self, Deadline};
use crate::exit::{Failure, Kind};

/// How far past a time of day is still today's.
const LATE: Duration = Duration::from_secs(15 * 60);

/// A time that something is due at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// When.
    pub due: Timestamp,
    /// It has passed.
    pub late: bool,
}

impl Due {
    /// As a deadline on the monotonic clock.
    #[must_use]
    pub fn deadline(self) -> Deadline {
        let left = self.due.duration_since(clock::utc_now());
        Deadline::after(Duration::try_from(left).unwrap_or(Duration::ZERO))
    }
}

impl fmt::Display for Due {
    /// In the host's zone, and how long that is from now.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let zone = clock::local_now().time_zone().clone();
        let local = zone.to_datetime(self.due).strftime("%Y-%m-%d %H:%M:%S");
        if self.late {
            return write!(f, "was due at {local}: begins now, late");
        }
        let minutes = self.deadline().left().as_secs().div_ceil(60);
        match (minutes / 60, minutes % 60) {
            (0, minutes) => write!(f, "due at {local}, in {minutes} min"),
            (hours, minutes) => write!(f, "due at {local}, in {hours} h {minutes} min"),
        }
    }
}

/// Reads a time.
pub fn parse(text: &str) -> Result<Due> {
    parse_at(text, &clock::local_now())
}

fn parse_at(text: &str, now: &ZonedDateTime) -> Result<Due> {
    let bad = || {
        Failure::hinted(
            Kind::Usage,
            format!("`{text}` is no time"),
            "write HH:MM, or a date with a time such as 2026-11-22T02:00",
        )
    };
    let zone = now.time_zone().clone();
    if let Ok(due) = text.parse::<Timestamp>() {
        return Ok(Due {
            due,
            late: due < now.timestamp(),
        });
    }
    if let Ok(local) = text.parse::<DateTime>() {
        let due = zone.to_timestamp(local).map_err(|_| bad())?;
        return Ok(Due {
            due,
            late: due < now.timestamp(),
        });
    }
    let time: Time = text.parse().map_err(|_| bad())?;
    let at = |days: i64| -> Result<Timestamp> {
        let date = now.date().checked_add(days.days()).map_err(|_| bad())?;
        zone.to_timestamp(date.to_datetime(time)).map_err(|_| bad())
    };
    let today = at(0)?;
    let past = now.timestamp().duration_since(today);
    if past.is_negative() || past.is_zero() {
        return Ok(Due {
            due: today,
            late: false,
        });
    }
    if Duration::try_from(past).is_ok_and(|past| past <= LATE) {
        return Ok(Due {
            due: today,
            late: true,
        });
    }
    Ok(Due {
        due: at(1)?,
        late: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_of_day_is_its_next_occurrence_and_a_quarter_of_an_hour_past_is_now() {
        let now: ZonedDateTime = "2026-11-22T02:10[UTC]".parse().unwrap();
        let due = |text| parse_at(text, &now).unwrap();
        assert_eq!(due("02:30").due.to_string(), "2026-11-22T02:30:00Z");
        assert_eq!(
            due("02:00"),
            Due {
                due: "2026-11-22T02:00Z".parse().unwrap(),
                late: true
            }
        );
        assert_eq!(due("01:50").due.to_string(), "2026-11-23T01:50:00Z");
        assert_eq!(
            due("2026-11-22T03:00").due.to_string(),
            "2026-11-22T03:00:00Z"
        );
        assert!(parse_at("noon", &now).is_err());
    }
}
