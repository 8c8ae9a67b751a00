//! Forgetting points: what is to go is planned from the points that can be read, and deleted one by one, the oldest first, each
//! durably. A crash in between leaves points that the next forget takes. Blocks and layers stay until they are pruned.
//!
//! A point is *good* when its manifest is readable and its layers are there; only good points count for a policy and as a
//! target's last one. What is not good is never taken by a policy: it may be all that is left to repair from.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::tz::TimeZone;

use super::error::{Error, Result};
use super::ids::PointId;
use super::manifest::Manifest;
use super::pins::{self, Pins};
use super::points::{self, Points};
use super::repo::Repository;
use super::retention::{Policy, Reason, keep};
use super::store::StoreLock;
use crate::clock::{self, Deadline};

/// How long the mark of a prune is waited for.
const POINTS_WAIT: Duration = Duration::from_secs(600);
/// How often the lock is tried meanwhile.
const POINTS_PAUSE: Duration = Duration::from_millis(5);

/// What a forget would do, or did.
#[derive(Debug, Default)]
pub struct ForgetPlan {
    /// By target, in the order of their keys.
    pub targets: Vec<TargetPlan>,
    /// Points that are named and cannot be read: they go.
    pub damaged: Vec<PointId>,
    /// What the operator should know.
    pub warnings: Vec<String>,
    /// Pins of points that are gone; they go, too.
    pub stray_pins: Vec<PointId>,
}

/// What becomes of the points of a target.
#[derive(Debug, Default)]
pub struct TargetPlan {
    /// What it is known by.
    pub key: String,
    /// Those that stay, with the reasons that a policy has; oldest first.
    pub kept: Vec<(Manifest, Vec<Reason>)>,
    /// Those that go, oldest first.
    pub forgotten: Vec<Manifest>,
}

/// What to forget.
#[derive(Debug, Clone)]
pub enum Selection {
    /// Whatever the policy does not keep, of the targets with these keys or of all.
    Policy {
        /// What to keep.
        policy: Policy,
        /// Whose days count.
        zone: TimeZone,
        /// The keys; `None`: all targets.
        targets: Option<BTreeSet<String>>,
    },
    /// These points, and no others.
    Points {
        /// Their ids; they may be damaged.
        points: BTreeSet<PointId>,
        /// Also the last good point of a target.
        allow_last: bool,
    },
}

/// All that a plan is made from.
struct Found {
    points: Points,
    pins: Pins,
    /// Points without a layer that they name.
    holed: BTreeMap<PointId, String>,
}

impl Repository {
    /// Keeps plans apart: what one of them relies on staying, no other may take, and nobody may pin.
    pub(super) fn lock_forget(&self, who: &str) -> Result<StoreLock> {
        self.store().lock("forget", who)
    }

    /// Keeps points from going while a prune looks for what is needed, and the other way round; waits for it.
    pub(super) fn lock_points(&self, who: &str) -> Result<StoreLock> {
        let deadline = Deadline::after(POINTS_WAIT);
        loop {
            match self.store().lock("points", who) {
                Err(Error::Busy { .. }) if !deadline.passed() => clock::sleep(POINTS_PAUSE),
                other => return other,
            }
        }
    }

    /// Says what a forget would do.
    pub fn plan_forget(&self, selection: &Selection) -> Result<ForgetPlan> {
        let found = self.find_forgettable()?;
        let mut plan = match selection {
            Selection::Policy {
                policy,
                zone,
                targets,
            } => by_policy(&found, policy, zone, targets.as_ref())?,
            Selection::Points { points, allow_last } => {
                self.by_name(&found, points, *allow_last)?
            }
        };
        let errors = found.points.damaged.iter().chain(&found.pins.damaged);
        plan.warnings.extend(errors.map(ToString::to_string));
        for (id, hole) in &found.holed {
            let words = format!("point {id} counts as no good one: {hole} is missing");
            plan.warnings.push(words);
        }
        for pinned in found.pins.pins.keys() {
            if !self.has_point(*pinned)? {
                plan.stray_pins.push(*pinned);
            }
        }
        Ok(plan)
    }

    /// Forgets, and says what was done.
    pub fn forget(&self, selection: &Selection) -> Result<ForgetPlan> {
        let _lock = self.lock_forget("forgetting points")?;
        let plan = self.plan_forget(selection)?;
        let mut going: Vec<&Manifest> = plan
            .targets
            .iter()
            .flat_map(|target| &target.forgotten)
            .collect();
        going.sort_by_key(|point| (point.instant, point.id));
        let _held = self.lock_points("forgetting points")?;
        let readable = going.iter().map(|point| &point.id);
        for point in plan.damaged.iter().chain(readable) {
            self.store().delete(&[points::name(*point)])?;
        }
        let pins: Vec<String> = plan.stray_pins.iter().map(|id| pins::name(*id)).collect();
        self.store().delete(&pins)?;
        Ok(plan)
    }

    fn find_forgettable(&self) -> Result<Found> {
        let points = self.points()?;
        let mut there: BTreeSet<String> = self.store().list("maps/")?.into_iter().collect();
        let mut holed = BTreeMap::new();
        for point in &points.points {
            for layer in point.disks.iter().flat_map(|disk| &disk.map.layers) {
                let object = layer.object();
                if there.contains(&object) {
                    continue;
                }
                // It may be newer than the listing.
                match self.store().size(&object) {
                    Ok(_) => {
                        there.insert(object);
                    }
                    Err(error) if error.is_not_found() => {
                        holed.insert(point.id, object);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(Found {
            points,
            pins: self.pins()?,
            holed,
        })
    }

    fn by_name(
        &self,
        found: &Found,
        points: &BTreeSet<PointId>,
        allow_last: bool,
    ) -> Result<ForgetPlan> {
        let mut plan = ForgetPlan::default();
        let readable: BTreeSet<PointId> =
            found.points.points.iter().map(|point| point.id).collect();
        for id in points {
            if found.pins.has(*id) {
                return Err(Error::Invalid(format!(
                    "point {id} is pinned: `forerun unpin {id}` first"
                )));
            }
            if !readable.contains(id) {
                if !self.has_point(*id)? {
                    return Err(Error::NoPoint {
                        name: id.to_string(),
                        more: String::new(),
                    });
                }
                plan.damaged.push(*id);
            }
        }
        for (key, of_target) in by_target(&found.points.points) {
            let mut target = TargetPlan {
                key: key.to_owned(),
                ..TargetPlan::default()
            };
            for point in of_target {
                if points.contains(&point.id) {
                    target.forgotten.push(point.clone());
                } else {
                    target.kept.push((point.clone(), Vec::new()));
                }
            }
            if target.forgotten.is_empty() {
                continue;
            }
            let good = |point: &Manifest| !found.holed.contains_key(&point.id);
            let stays = target.kept.iter().any(|(point, _)| good(point));
            if let Some(last) = target.forgotten.iter().rev().find(|point| good(point))
                && !stays
                && !allow_last
            {
                return Err(Error::Invalid(format!(
                    "point {} is the last good one of {key}: forget it knowingly with `--allow-last`",
                    last.id
                )));
            }
            plan.warnings.extend(lost_disks(found, &target));
            plan.targets.push(target);
        }
        Ok(plan)
    }
}

fn by_target(points: &[Manifest]) -> BTreeMap<&str, Vec<&Manifest>> {
    let mut targets: BTreeMap<&str, Vec<&Manifest>> = BTreeMap::new();
    for point in points {
        targets.entry(&point.target.key).or_default().push(point);
    }
    targets
}

fn by_policy(
    found: &Found,
    policy: &Policy,
    zone: &TimeZone,
    keys: Option<&BTreeSet<String>>,
) -> Result<ForgetPlan> {
    if policy.is_empty() {
        let what = "a policy that keeps nothing would forget everything";
        return Err(Error::Invalid(what.to_owned()));
    }
    let mut plan = ForgetPlan::default();
    for (key, mut points) in by_target(&found.points.points) {
        if keys.is_some_and(|keys| !keys.contains(key)) {
            continue;
        }
        points.retain(|point| !found.holed.contains_key(&point.id));
        let mut target = TargetPlan {
            key: key.to_owned(),
            ..TargetPlan::default()
        };
        let reasons = keep_of_disks(policy, &points, zone);
        for (point, mut reasons) in points.into_iter().zip(reasons) {
            if found.pins.has(point.id) {
                let why = found.pins.reason(point.id).map(str::to_owned);
                reasons.push(Reason::Pinned(why));
            }
            if reasons.is_empty() {
                target.forgotten.push(point.clone());
            } else {
                target.kept.push((point.clone(), reasons));
            }
        }
        plan.targets.push(target);
    }
    Ok(plan)
}

/// The reasons to keep each of a target's points: a rule counts the points of every disk by themselves, so that none takes the
/// last point of a disk that the newer points do not have.
fn keep_of_disks(policy: &Policy, points: &[&Manifest], zone: &TimeZone) -> Vec<Vec<Reason>> {
    let keys = points.iter().flat_map(|point| point.guest_disks());
    let keys: BTreeSet<&str> = keys.map(|disk| disk.key.as_str()).collect();
    let mut all: Vec<Vec<Reason>> = points.iter().map(|_| Vec::new()).collect();
    for key in keys {
        let has = |point: &Manifest| point.guest_disks().any(|disk| disk.key == key);
        let of_disk: Vec<usize> = (0..points.len()).filter(|at| has(points[*at])).collect();
        let instants: Vec<_> = of_disk.iter().map(|at| points[*at].instant).collect();
        for (at, reasons) in of_disk.into_iter().zip(keep(policy, &instants, zone)) {
            for reason in reasons {
                if !all[at].contains(&reason) {
                    all[at].push(reason);
                }
            }
        }
    }
    all
}

/// Disks that no good point has any more afterwards.
fn lost_disks(found: &Found, target: &TargetPlan) -> Vec<String> {
    let kept: BTreeSet<&str> = target
        .kept
        .iter()
        .filter(|(point, _)| !found.holed.contains_key(&point.id))
        .flat_map(|(point, _)| point.guest_disks())
        .map(|disk| disk.key.as_str())
        .collect();
    let mut last: BTreeMap<&str, PointId> = BTreeMap::new();
    for point in &target.forgotten {
        let gone = point.guest_disks().map(|disk| disk.key.as_str());
        last.extend(
            gone.filter(|disk| !kept.contains(disk))
                .map(|disk| (disk, point.id)),
        );
    }
    last.into_iter()
        .map(|(disk, point)| {
            format!(
                "{point} is the last point that has disk {disk} of {}",
                target.key
            )
        })
        .collect()
}
