//! The manifest of a recovery point: everything that is needed to restore it and to build the next one on it. Unknown fields
//! are kept out of the way, so that later versions may add some; what changes the meaning raises the version.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ids::{Digest, PointId, RepoId, SessionId};
use super::map::MapRef;

/// A finished backup of all chosen disks of a target at one instant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its name.
    pub id: PointId,
    /// Whose backup it is.
    pub target: Target,
    /// The instant of the disks' content, UTC.
    pub instant: Timestamp,
    /// The host's offset from UTC then, in seconds.
    pub utc_offset: i32,
    /// The version of forerun that made it.
    pub forerun: String,
    /// The point it was built on; informative.
    pub parent: Option<PointId>,
    /// The session it came from, which a later run finds committed by this.
    pub session: SessionId,
    /// How the instant was taken.
    pub freeze: String,
    /// What the guest knew of it.
    pub quiesce: Quiesce,
    /// What is stored: the guest's disks, and the files of the host that belong to the VM.
    pub disks: Vec<DiskPoint>,
    /// The machine's configuration.
    pub machine: Value,
    /// What it took.
    pub statistics: Value,
    /// Bitmaps that are of no use once the point is published.
    pub retired_bitmaps: Vec<RetiredBitmap>,
    /// Where it was made, when it is a copy from another repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
}

impl Manifest {
    /// The guest's disks.
    pub fn guest_disks(&self) -> impl Iterator<Item = &DiskPoint> {
        self.disks.iter().filter(|disk| disk.file.is_none())
    }

    /// The files that belong to the VM.
    pub fn files(&self) -> impl Iterator<Item = (&DiskPoint, &HostFile)> {
        let files = self.disks.iter();
        files.filter_map(|disk| Some((disk, disk.file.as_ref()?)))
    }

    /// The VM's disks that were not chosen, and its other devices that may hold data: a restore is without them.
    #[must_use]
    pub fn without(&self) -> Vec<&str> {
        let listed = |list: &str| self.machine.get(list).and_then(Value::as_array);
        let (disks, devices) = (listed("disks"), listed("left_out"));
        let disks = disks.into_iter().flatten().map(|disk| &disk["key"]);
        let devices = devices.into_iter().flatten();
        let devices = devices
            .filter(|device| device["refused"] == true)
            .map(|device| &device["device"]);
        let names = disks.chain(devices).filter_map(Value::as_str);
        let is_held = |name: &&str| self.guest_disks().any(|disk| disk.key == *name);
        names.filter(|name| !is_held(name)).collect()
    }
}

/// The point that another one is a copy of, or a copy of a copy: two points of one digest have one content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The repository that it was made in.
    pub repository: RepoId,
    /// SHA-256 of its object there.
    pub digest: Digest,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// What it is known by, whatever it was called.
    pub key: String,
    /// What it was called.
    pub spellings: Vec<String>,
}

impl Target {
    /// Whether it goes by this name.
    pub fn is_called(&self, name: &str) -> bool {
        self.key == name || self.spellings.iter().any(|spelling| spelling == name)
    }
}

/// What the guest knew of the instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quiesce {
    /// Its file systems were frozen.
    Quiesced,
    /// Nothing: the disks are as after a power loss.
    CrashConsistent,
    /// It was off.
    Offline,
}

impl Quiesce {
    /// As the manifest and the reports have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Quiesced => "quiesced",
            Self::CrashConsistent => "crash-consistent",
            Self::Offline => "offline",
        }
    }
}

/// A disk of a point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskPoint {
    /// What it is known by in its target.
    pub key: String,
    /// The guest device.
    pub device: String,
    /// The block node it was read from.
    pub node: String,
    /// The image format it had.
    pub format: String,
    /// Its size in bytes.
    pub size: u64,
    /// What its blocks hold.
    pub map: MapRef,
    /// From where the next increment can go on.
    pub tracking: Option<Tracking>,
    /// Why it was read in full.
    pub rescanned: Option<String>,
    /// It is no disk of the guest but a file of the host that belongs to the VM. To whoever stores, keeps, checks and copies it
    /// that makes no difference, so it is one here too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<HostFile>,
}

/// A file of the host that belongs to a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFile {
    /// What it is for: [`DEFINITION`], `nvram`, `tpm`, `kernel`... Later versions may know more.
    pub role: String,
    /// Its name among the point's files, without a directory.
    pub name: String,
    /// Where it was; nothing, when it was no file.
    pub path: Option<String>,
    /// The user and the group that it belonged to, by their names: `swtpm:swtpm`.
    pub owner: Option<String>,
}

/// The role of a domain's definition, as it starts next time.
pub const DEFINITION: &str = "definition";
/// The role of a domain's definition, as it ran.
pub const LIVE_DEFINITION: &str = "live-definition";
/// The role of the firmware's variables.
pub const NVRAM: &str = "nvram";
/// The role of an emulated TPM's state.
pub const TPM: &str = "tpm";

/// From where the next increment of a disk can go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tracking {
    /// The epoch that began with the point.
    pub epoch: u64,
    /// The bitmap that was live from then on.
    pub bitmap: String,
    /// Whether it survives the QEMU process.
    pub persistent: bool,
    /// Its granularity in bytes.
    pub granularity: u32,
    /// What the disk's chain of files looked like.
    pub identity: Value,
}

/// A bitmap that is of no use any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetiredBitmap {
    /// The disk's key.
    pub disk: String,
    /// Its name.
    pub name: String,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_not_chosen_or_could_not_be_is_what_a_point_is_without() {
        let hex = "0123456789abcdef";
        let disk = |key: &str| {
            json!({ "key": key, "device": "", "node": "", "format": "raw", "size": 0,
                    "map": { "size": 0, "layers": [] }, "tracking": null, "rescanned": null })
        };
        let manifest = |machine: Value| -> Manifest {
            serde_json::from_value(json!({
                "id": hex, "target": { "key": "a", "spellings": [] }, "instant": "2026-11-27T00:00:00Z",
                "utc_offset": 0, "forerun": "", "parent": null, "session": hex.repeat(2), "freeze": "fleece",
                "quiesce": "quiesced", "disks": [disk("vda")], "machine": machine, "statistics": null,
                "retired_bitmaps": [],
            }))
            .unwrap()
        };
        let point = manifest(json!({
            "disks": [{ "key": "vda" }, { "key": "vdb" }],
            "left_out": [
                { "device": "cd", "refused": false },
                { "device": "nvdimm0", "refused": true },
            ],
        }));
        assert_eq!(point.without(), ["vdb", "nvdimm0"]);
        assert!(manifest(Value::Null).without().is_empty());
    }
}
