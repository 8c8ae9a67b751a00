//! Pins: a point that is pinned is kept by every policy until it is unpinned.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use super::envelope;
use super::error::{Error, Result};
use super::ids::PointId;
use super::repo::Repository;
use crate::clock;

/// Why and since when a point is pinned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The operator's words.
    pub reason: Option<String>,
    /// When it was pinned, UTC.
    pub since: Timestamp,
}

/// The pins of a repository.
#[derive(Debug, Default)]
pub struct Pins {
    /// By point. A pin that cannot be read pins all the same.
    pub pins: BTreeMap<PointId, Option<Pin>>,
    /// For each one that cannot be read, why.
    pub damaged: Vec<Error>,
}

impl Pins {
    /// Whether a point is pinned.
    #[must_use]
    pub fn has(&self, point: PointId) -> bool {
        self.pins.contains_key(&point)
    }

    /// Why a point is pinned, as far as somebody said.
    #[must_use]
    pub fn reason(&self, point: PointId) -> Option<&str> {
        self.pins.get(&point)?.as_ref()?.reason.as_deref()
    }
}

const PREFIX: &str = "pins/";

/// The name of the object.
pub(super) fn name(point: PointId) -> String {
    format!("{PREFIX}{point}")
}

impl Repository {
    /// Pins a point; [`Error::Exists`] when it is pinned.
    pub fn pin(&self, point: PointId, reason: Option<String>) -> Result<Pin> {
        let _lock = self.lock_forget("pinning a point")?;
        // A forget that was here before may have taken it.
        self.point(point)?;
        let since = clock::utc_now();
        let pin = Pin { reason, since };
        self.store()
            .put(&name(point), &envelope::seal("pin", &pin)?)?;
        Ok(pin)
    }

    /// Takes the pin from a point. Whether it had one.
    pub fn unpin(&self, point: PointId) -> Result<bool> {
        let pinned = self.pins()?.has(point);
        self.store().delete(&[name(point)])?;
        Ok(pinned)
    }

    /// All pins, past any cache: another host may have pinned what this one is about to forget.
    pub fn pins(&self) -> Result<Pins> {
        let mut pins = Pins::default();
        for object in self.store().list_fresh(PREFIX)? {
            let Some(Ok(point)) = object.strip_prefix(PREFIX).map(str::parse) else {
                let error = Error::corrupt(&*object, "its name is no point's");
                pins.damaged.push(error);
                continue;
            };
            let read = self.store().get(&object);
            match read.and_then(|bytes| envelope::open("pin", &object, &bytes)) {
                Ok(pin) => {
                    pins.pins.insert(point, Some(pin));
                }
                // Unpinned meanwhile.
                Err(error) if error.is_not_found() => {}
                Err(error @ (Error::Corrupt { .. } | Error::Unsupported(_))) => {
                    pins.pins.insert(point, None);
                    pins.damaged.push(error);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(pins)
    }
}
