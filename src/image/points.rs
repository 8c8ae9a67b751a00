//! Recovery points: publishing one is the only commit, and naming one.

use jiff::civil::DateTime;
use jiff::{Timestamp, ToSpan};

use super::envelope;
use super::error::{Error, Result};
use super::ids::{Digest, PointId, sha256};
use super::manifest::{Manifest, Origin};
use super::repo::Repository;
use crate::clock;

/// The points of a repository.
#[derive(Debug, Default)]
pub struct Points {
    /// The ones that can be read, oldest first.
    pub points: Vec<Manifest>,
    /// For each one that cannot, why. It hides no other.
    pub damaged: Vec<Error>,
}

/// The name of the object.
pub(super) fn name(id: PointId) -> String {
    format!("points/{id}")
}

impl Repository {
    /// Publishes a point under the id in its manifest: from now on it exists. Its packs, index and layers are durable before.
    pub fn publish(&self, manifest: &Manifest) -> Result<PointId> {
        for disk in &manifest.disks {
            if disk.map.size != disk.size {
                return Err(Error::Invalid(format!(
                    "the map of {} is of {} bytes, the disk has {}",
                    disk.key, disk.map.size, disk.size
                )));
            }
            for layer in &disk.map.layers {
                self.store().size(&layer.object())?;
            }
        }
        let bytes = envelope::seal("point", manifest)?;
        self.store().put(&name(manifest.id), &bytes)?;
        Ok(manifest.id)
    }

    /// A point by its id.
    pub fn point(&self, id: PointId) -> Result<Manifest> {
        let object = name(id);
        let manifest: Manifest = envelope::open("point", &object, &self.store().get(&object)?)?;
        if manifest.id == id {
            Ok(manifest)
        } else {
            Err(Error::corrupt(
                object,
                format!("it is the point {}", manifest.id),
            ))
        }
    }

    /// Whether a point exists, past any cache.
    pub fn has_point(&self, id: PointId) -> Result<bool> {
        let points = self.store().list_fresh("points/")?;
        Ok(points.binary_search(&name(id)).is_ok())
    }

    /// Takes back a point that must not have been published.
    pub fn withdraw(&self, id: PointId) -> Result<()> {
        let _held = self.lock_points("taking back a point")?;
        self.store().delete(&[name(id)])
    }

    /// What tells a point from another one of its id in another repository.
    pub fn origin(&self, point: &Manifest) -> Result<Origin> {
        match point.origin {
            Some(origin) => Ok(origin),
            None => Ok(Origin {
                repository: self.id(),
                digest: Digest::from_bytes(sha256(&self.store().get(&name(point.id))?)),
            }),
        }
    }

    /// All points, past any cache: the newest one is what is restored, gone on from and kept by a policy.
    pub fn points(&self) -> Result<Points> {
        let mut points = Points::default();
        for object in self.store().list_fresh("points/")? {
            let id = object.strip_prefix("points/").map(str::parse);
            let point = match id {
                Some(Ok(id)) => self.point(id),
                _ => Err(Error::corrupt(&*object, "its name is no point's")),
            };
            match point {
                Ok(manifest) => points.points.push(manifest),
                // Forgotten meanwhile.
                Err(error) if error.is_not_found() => {}
                Err(error @ (Error::Corrupt { .. } | Error::Unsupported(_))) => {
                    points.damaged.push(error);
                }
                Err(error) => return Err(error),
            }
        }
        points.points.sort_by_key(|point| (point.instant, point.id));
        Ok(points)
    }

    /// The point that a person names: the beginning of an id, `TARGET@latest`, or `TARGET@TIME` for the newest one that is not
    /// later; a time without an offset is local, and one to the second is all of that second.
    pub fn resolve(&self, text: &str) -> Result<Manifest> {
        match text.rsplit_once('@') {
            None => self.resolve_prefix(text),
            Some((target, "latest")) => self.resolve_time(target, None, text),
            Some((target, time)) => self.resolve_time(target, Some(&parse_time(time)?), text),
        }
    }

    fn resolve_prefix(&self, prefix: &str) -> Result<Manifest> {
        let names = self.store().list_fresh("points/")?;
        let matching: Vec<PointId> = names
            .iter()
            .filter_map(|name| name.strip_prefix("points/"))
            .filter(|id| !prefix.is_empty() && id.starts_with(prefix))
            .filter_map(|id| id.parse().ok())
            .collect();
        match matching[..] {
            [] => Err(Error::NoPoint {
                name: prefix.to_owned(),
                more: self.latest_of(prefix),
            }),
            [id] => self.point(id),
            _ => {
                let ids: Vec<String> = matching.iter().map(PointId::to_string).collect();
                let ids = ids.join(", ");
                Err(Error::Invalid(format!("{prefix} is ambiguous: {ids}")))
            }
        }
    }

    /// The way out for who names a target where a point is asked for.
    fn latest_of(&self, name: &str) -> String {
        let points = self.points().unwrap_or_default().points;
        if points.iter().any(|point| point.target.is_called(name)) {
            format!(": it is a target, whose newest point is `{name}@latest`")
        } else {
            String::new()
        }
    }

    fn resolve_time(&self, target: &str, time: Option<&Asked>, text: &str) -> Result<Manifest> {
        let Points { points, damaged } = self.points()?;
        // It could be the one that is asked for; an older one in its place would be a wrong answer.
        if let Some(error) = damaged.into_iter().next() {
            return match error {
                Error::Corrupt { object, what } => Err(Error::Corrupt {
                    object,
                    what: format!("{what}; it may be {text}: name a point by its id"),
                }),
                other => Err(other),
            };
        }
        let mut matching: Vec<Manifest> = points
            .into_iter()
            .filter(|point| point.target.is_called(target))
            .collect();
        if let (Some(first), Some(other)) = (
            matching.first(),
            matching
                .iter()
                .find(|point| point.target.key != matching[0].target.key),
        ) {
            return Err(Error::Invalid(format!(
                "{target} is the name of two targets, {} and {}",
                first.target.key, other.target.key
            )));
        }
        let more = match (time, matching.first()) {
            (_, None) => format!(": `{target}` has no point"),
            (Some(time), Some(first)) => format!(
                ": `{target}` has none until {}, the first is of {}",
                time.words,
                clock::local(first.instant)
            ),
            (None, Some(_)) => String::new(),
        };
        matching.retain(|point| time.is_none_or(|time| point.instant <= time.last));
        matching.pop().ok_or_else(|| Error::NoPoint {
            name: text.to_owned(),
            more,
        })
    }
}

/// A time that a point is asked for by.
struct Asked {
    /// The last instant that is not later. A time to the second, as lists show it, is all of that second.
    last: Timestamp,
    /// How it was read.
    words: String,
}

fn parse_time(text: &str) -> Result<Asked> {
    let whole_second = |instant: Timestamp| match instant.subsec_nanosecond() {
        0 => instant.checked_add(999.milliseconds().microseconds(999).nanoseconds(999)),
        _ => Ok(instant),
    };
    let bad = || {
        Error::Invalid(format!(
            "`{text}` is neither latest nor a time such as 2026-11-22T02:00"
        ))
    };
    if let Ok(instant) = text.parse() {
        return Ok(Asked {
            last: whole_second(instant).map_err(|_| bad())?,
            words: format!("{}, as its offset says", clock::local(instant)),
        });
    }
    let local: DateTime = text.parse().map_err(|_| bad())?;
    let zone = clock::local_now().time_zone().clone();
    let instant = zone.to_timestamp(local).map_err(|_| bad())?;
    Ok(Asked {
        last: whole_second(instant).map_err(|_| bad())?,
        words: format!(
            "{}, read as local time ({})",
            clock::local(instant),
            clock::local_zone()
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_an_offset_or_is_local() {
        let last = |text: &str| parse_time(text).unwrap().last;
        let utc = last("2026-11-22T02:00Z");
        assert_eq!(utc, last("2026-11-22T04:00+02:00"));
        assert_eq!(utc.to_string(), "2026-11-22T02:00:00.999999999Z");
        let exact = "2026-11-22T02:00:00.25Z";
        assert_eq!(last(exact).to_string(), exact);
        // As it is shown.
        let shown = clock::local(utc);
        assert_eq!(last(&shown), utc, "{shown}");
        assert!(parse_time("2026-11-22T02:00").is_ok());
        assert!(parse_time("2026-11-22").is_ok());
        assert!(parse_time("yesterday").is_err());
    }
}
