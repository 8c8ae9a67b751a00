//! Which points of one target a policy keeps. Pure: instants in, reasons out.
//!
//! The points are looked at from the newest to the oldest. A rule of a period (hour, day, week, month, year) keeps the newest
//! point of each of the last N periods that have one; a point stays when any rule keeps it. So the newest point always stays,
//! and another rule, or a higher number, never keeps less.

use std::fmt;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};
use serde::{Serialize, Serializer};

/// How many points of each kind to keep; 0 is no rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    /// The newest ones.
    pub last: u32,
    /// The newest one of each hour.
    pub hourly: u32,
    /// Of each day.
    pub daily: u32,
    /// Of each ISO week, which begins on a Monday.
    pub weekly: u32,
    /// Of each month.
    pub monthly: u32,
    /// Of each year.
    pub yearly: u32,
    /// All that are no older than this, counted from the newest point of the target: one that was off for months keeps them.
    pub within: Option<Duration>,
}

impl Policy {
    /// Whether it has no rule.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Why a point is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// One of the newest.
    Last,
    /// Not much older than the newest.
    Within,
    /// The newest of a period: the rule's name, and the period as people write it.
    Period(&'static str, String),
    /// It is pinned, perhaps with words why.
    Pinned(Option<String>),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Last => f.write_str("last"),
            Self::Within => f.write_str("within"),
            Self::Period(rule, period) => write!(f, "{rule} {period}"),
            Self::Pinned(None) => f.write_str("pinned"),
            Self::Pinned(Some(why)) => write!(f, "pinned: {why}"),
        }
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The period that a time is in, as people write it.
type PeriodOf = fn(&ZonedDateTime) -> String;

/// The reasons to keep each of a target's points, which come oldest first; none: it may go. Of equal instants the later in the
/// list counts as newer. Days and the other periods are those of `zone`.
#[must_use]
pub(super) fn keep(policy: &Policy, instants: &[Timestamp], zone: &TimeZone) -> Vec<Vec<Reason>> {
    let mut reasons: Vec<Vec<Reason>> = instants.iter().map(|_| Vec::new()).collect();
    let newest_first = || local_newest_first(instants, zone);
    for (at, _) in newest_first().take(size(policy.last)) {
        reasons[at].push(Reason::Last);
    }
    if let (Some(within), Some(newest)) = (policy.within, instants.last()) {
        for (at, instant) in instants.iter().enumerate() {
            let age = newest.duration_since(*instant);
            if Duration::try_from(age).is_ok_and(|age| age <= within) {
                reasons[at].push(Reason::Within);
            }
        }
    }
    let rules: [(&str, u32, PeriodOf); 5] = [
        ("hourly", policy.hourly, hour),
        ("daily", policy.daily, |at| at.date().to_string()),
        ("weekly", policy.weekly, week),
        ("monthly", policy.monthly, |at| {
            format!("{:04}-{:02}", at.year(), at.month())
        }),
        ("yearly", policy.yearly, |at| format!("{:04}", at.year())),
    ];
    for (rule, count, period) in rules {
        let mut kept = 0;
        let mut last = None;
        for (at, local) in newest_first() {
            if kept == count {
                break;
            }
            let period = period(&local);
            if last.as_ref() != Some(&period) {
                reasons[at].push(Reason::Period(rule, period.clone()));
                last = Some(period);
                kept += 1;
            }
        }
    }
    reasons
}

fn size(count: u32) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

fn local_newest_first<'a>(
    instants: &'a [Timestamp],
    zone: &'a TimeZone,
) -> impl Iterator<Item = (usize, ZonedDateTime)> + 'a {
    let local = |instant: &Timestamp| instant.to_zoned_datetime(zone.clone());
    instants
        .iter()
        .enumerate()
        .rev()
        .map(move |(at, instant)| (at, local(instant)))
}

/// With the offset: where a clock is set back an hour comes twice.
fn hour(at: &ZonedDateTime) -> String {
    format!("{}T{:02}{}", at.date(), at.hour(), at.offset())
}

fn week(at: &ZonedDateTime) -> String {
    let week = at.date().iso_week_date();
    format!("{:04}-W{:02}", week.year(), week.week())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn berlin() -> TimeZone {
        TimeZone::get("Europe/Berlin").unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    /// The reasons of each point, as people read them.
    fn reasons(policy: &Policy, instants: &[&str], zone: &TimeZone) -> Vec<String> {
        let instants: Vec<Timestamp> = instants.iter().map(|text| at(text)).collect();
        keep(policy, &instants, zone)
            .iter()
            .map(|all| {
                let all: Vec<String> = all.iter().map(Reason::to_string).collect();
                all.join(", ")
            })
            .collect()
    }

    #[test]
    fn the_newest_of_each_day_is_kept_and_a_day_is_the_zones() {
        let policy = Policy {
            daily: 2,
            ..Policy::default()
        };
        // 23:30 UTC is the next day in Berlin.
        let instants = [
            "2026-11-20T12:00Z",
            "2026-11-21T10:00Z",
            "2026-11-21T22:30Z",
            "2026-11-21T23:30Z",
        ];
        let kept = reasons(&policy, &instants, &berlin());
        assert_eq!(kept, ["", "", "daily 2026-11-21", "daily 2026-11-22"]);
        let kept = reasons(&policy, &instants, &TimeZone::UTC);
        assert_eq!(kept, ["daily 2026-11-20", "", "", "daily 2026-11-21"]);
    }

    #[test]
    fn a_week_of_two_years_is_one_week() {
        let policy = Policy {
            weekly: 9,
            yearly: 9,
            ..Policy::default()
        };
        let instants = ["2026-12-31T12:00Z", "2027-01-01T12:00Z"];
        let kept = reasons(&policy, &instants, &TimeZone::UTC);
        assert_eq!(kept, ["yearly 2026", "weekly 2026-W53, yearly 2027"]);
    }

    #[test]
    fn an_hour_that_comes_twice_is_two_and_a_day_of_23_or_25_hours_is_one() {
        let hourly = Policy {
            hourly: 9,
            ..Policy::default()
        };
        // 02:30 summer time, 02:30 winter time.
        let autumn = ["2026-10-25T00:30Z", "2026-10-25T01:30Z"];
        let kept = reasons(&hourly, &autumn, &berlin());
        assert_eq!(kept, ["hourly 2026-10-25T02+02", "hourly 2026-10-25T02+01"]);
        let daily = Policy {
            daily: 9,
            ..Policy::default()
        };
        for (first, last, day) in [
            ("2026-10-24T22:00Z", "2026-10-25T22:59Z", "2026-10-25"),
            ("2026-03-28T23:00Z", "2026-03-29T21:59Z", "2026-03-29"),
        ] {
            let kept = reasons(&daily, &[first, last], &berlin());
            assert_eq!(kept, [String::new(), format!("daily {day}")]);
        }
    }

    #[test]
    fn within_counts_from_the_newest_point() {
        let policy = Policy {
            within: Some(Duration::from_secs(86400)),
            ..Policy::default()
        };
        let instants = [
            "2001-01-01T11:59Z",
            "2001-01-01T12:00Z",
            "2001-01-02T12:00Z",
        ];
        let kept = reasons(&policy, &instants, &TimeZone::UTC);
        assert_eq!(kept, ["", "within", "within"]);
    }

    fn policies() -> impl Strategy<Value = Policy> {
        let count = || prop_oneof![Just(0), 0_u32..6, Just(u32::MAX)];
        let periods = (count(), count(), count(), count(), count());
        (count(), periods, proptest::option::of(0_u64..100_000_000)).prop_map(
            |(last, (hourly, daily, weekly, monthly, yearly), within)| Policy {
                last,
                hourly,
                daily,
                weekly,
                monthly,
                yearly,
                within: within.map(Duration::from_secs),
            },
        )
    }

    /// Instants of some years, many near each other and some equal, oldest first.
    fn instants() -> impl Strategy<Value = Vec<Timestamp>> {
        let step = prop_oneof![Just(0_i64), 1_i64..7200, 1_i64..90_000, 1_i64..20_000_000];
        (
            1_500_000_000_i64..1_800_000_000,
            proptest::collection::vec(step, 0..40),
        )
            .prop_map(|(start, steps)| {
                let mut now = start;
                let mut all = Vec::new();
                for step in steps {
                    now += step;
                    all.push(Timestamp::from_second(now).unwrap());
                }
                all
            })
    }

    fn zones() -> impl Strategy<Value = TimeZone> {
        prop_oneof![
            Just("UTC"),
            Just("Europe/Berlin"),
            Just("Australia/Lord_Howe"),
            Just("America/Sao_Paulo"),
        ]
        .prop_map(|name| TimeZone::get(name).unwrap())
    }

    proptest! {
        #[test]
        fn the_newest_is_always_kept(policy in policies(), instants in instants(), zone in zones()) {
            prop_assume!(!policy.is_empty() && !instants.is_empty());
            let kept = keep(&policy, &instants, &zone);
            prop_assert!(!kept.last().unwrap().is_empty());
        }

        #[test]
        fn more_rules_never_keep_less(a in policies(), b in policies(), instants in instants(), zone in zones()) {
            let both = Policy {
                last: a.last.max(b.last),
                hourly: a.hourly.max(b.hourly),
                daily: a.daily.max(b.daily),
                weekly: a.weekly.max(b.weekly),
                monthly: a.monthly.max(b.monthly),
                yearly: a.yearly.max(b.yearly),
                within: a.within.max(b.within),
            };
            let more = keep(&both, &instants, &zone);
            for policy in [a, b] {
                for (less, more) in keep(&policy, &instants, &zone).iter().zip(&more) {
                    prop_assert!(less.iter().all(|reason| more.contains(reason)), "{less:?} {more:?}");
                }
            }
        }

        #[test]
        fn each_rule_keeps_as_many_as_there_are_periods_or_as_it_says(
            policy in policies(), instants in instants(), zone in zones()
        ) {
            let kept = keep(&policy, &instants, &zone);
            let local: Vec<ZonedDateTime> =
                instants.iter().map(|instant| instant.to_zoned_datetime(zone.clone())).collect();
            let has = |rule: &str| kept.iter().flatten()
                .filter(|reason| matches!(reason, Reason::Period(name, _) if *name == rule)).count();
            let expect = |count: u32, periods: BTreeSet<String>| size(count).min(periods.len());
            let days = local.iter().map(|at| at.strftime("%Y-%m-%d").to_string()).collect();
            prop_assert_eq!(has("daily"), expect(policy.daily, days));
            let hours = local.iter().map(|at| at.strftime("%Y-%m-%d %H %z").to_string()).collect();
            prop_assert_eq!(has("hourly"), expect(policy.hourly, hours));
            let weeks = local.iter().map(|at| at.strftime("%G-%V").to_string()).collect();
            prop_assert_eq!(has("weekly"), expect(policy.weekly, weeks));
            let months = local.iter().map(|at| at.strftime("%Y-%m").to_string()).collect();
            prop_assert_eq!(has("monthly"), expect(policy.monthly, months));
            let years = local.iter().map(|at| at.strftime("%Y").to_string()).collect();
            prop_assert_eq!(has("yearly"), expect(policy.yearly, years));
            let last = kept.iter().flatten().filter(|reason| **reason == Reason::Last).count();
            prop_assert_eq!(last, size(policy.last).min(instants.len()));
            // A period's point is the newest of it.
            for (number, reasons) in kept.iter().enumerate() {
                if reasons.iter().any(|reason| matches!(reason, Reason::Period("daily", _))) {
                    let later = local.get(number + 1);
                    prop_assert!(later.is_none_or(|later| later.date() != local[number].date()));
                }
            }
        }
    }
}
