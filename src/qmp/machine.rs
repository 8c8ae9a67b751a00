//! What a VM is: its disks as guest devices have them (`query-block`, QOM), what is left out of a backup and why, its jobs
//! and exports. Nothing is guessed: a device that cannot be attributed for certain is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use qapi::qmp;
use serde::Serialize;
use serde_json::{Value, json};

use super::command::{call, flag, list, text};
use super::graph::{Disk, Graph};
use super::{Error, Monitor, Process, Result};
use crate::clock;

/// How often devices and graph are read at most until they agree.
const READINGS: u32 = 5;
/// Between two of these.
const READ_AGAIN: Duration = Duration::from_millis(20);

/// Where devices with an id are.
const PERIPHERAL: &str = "/machine/peripheral";
/// Front ends whose writes all pass through their block node.
const FRONT_ENDS: [&str; 8] = [
    "virtio-blk-pci",
    "virtio-blk-pci-transitional",
    "virtio-blk-pci-non-transitional",
    "virtio-blk-device",
    "virtio-blk-ccw",
    "scsi-hd",
    "ide-hd",
    "nvme-ns",
];
/// The flash that UEFI firmware keeps its variables in: no disk.
const FLASH: &str = "cfi.pflash01";
/// Devices that keep a guest's data, but not in a block node of QEMU: what their types begin with, why they are left out,
/// and whether that must be said with `--exclude`.
const NODELESS: [(&str, &str, bool); 12] = [
    ("vhost-user-blk", UNSEEN, true),
    ("vhost-scsi", UNSEEN, true),
    ("vhost-user-scsi", UNSEEN, true),
    ("vhost-vdpa", UNSEEN, true),
    ("virtio-blk-vhost-vdpa", UNSEEN, true),
    ("nvdimm", PERSISTENT_MEMORY, true),
    ("virtio-pmem", PERSISTENT_MEMORY, true),
    ("vfio-pci", UNSEEN, false),
    ("usb-host", UNSEEN, false),
    ("vhost-user-fs", SHARED, false),
    ("virtio-9p", SHARED, false),
    ("usb-mtp", SHARED, false),
];
const UNSEEN: &str = "what it may hold has no block node in QEMU and is not backed up";
/// Why persistent memory is refused.
pub const PERSISTENT_MEMORY: &str =
    "persistent memory, which the guest writes without QEMU: it is not backed up";
/// Why a shared directory is left out.
pub const SHARED: &str = "a directory of the host, which is not part of a point";

/// A device that is not backed up, and why.
#[derive(Debug, Clone, Serialize)]
pub struct LeftOut {
    /// The device's id or path.
    pub device: String,
    /// Why.
    pub reason: String,
    /// Refused: it may hold data that a backup would lack. Otherwise it is merely skipped.
    pub refused: bool,
}

/// A job, export or other thing in the VM by name.
#[derive(Debug, Clone, Serialize)]
pub struct Thing {
    /// Its id.
    pub id: String,
    /// Its type or, for an export, its node.
    pub kind: String,
    /// Its state, when it has one.
    pub state: String,
}

/// What `query-*` says about a VM.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Its UUID, `None` when it was started without.
    pub uuid: Option<String>,
    /// The guest's name.
    pub name: Option<String>,
    /// QEMU's run state.
    pub state: String,
    /// QEMU's version.
    pub version: String,
    /// The QEMU process.
    pub process: Process,
    /// The disks that can be backed up.
    pub disks: Vec<Disk>,
    /// The devices that are not.
    pub left_out: Vec<LeftOut>,
    /// All jobs.
    pub jobs: Vec<Thing>,
    /// All exports.
    pub exports: Vec<Thing>,
}

/// What does not change and is not asked for again, since each question stops the guest's devices for a moment: of a QEMU
/// process its names, of a device its properties, for as long as the same devices are there.
#[derive(Debug, Clone, Default)]
pub struct Known {
    names: Option<(Process, Names)>,
    devices: Vec<Value>,
    /// Of the devices with an id, by their paths.
    types: BTreeMap<String, String>,
    /// By the device's path, the node that it has, and the property's name.
    properties: BTreeMap<(String, String, &'static str), Value>,
}

#[derive(Debug, Clone)]
struct Names {
    uuid: Option<String>,
    name: Option<String>,
    version: String,
}

impl Known {
    /// Devices may have come and gone unseen, with other ones at their nodes. libvirt gives no node's name twice.
    pub fn forget_devices(&mut self) {
        self.devices.clear();
        self.types.clear();
        self.properties.clear();
    }

    /// What was known of another process's devices is not known of this one's.
    fn is_of(&mut self, process: &Process) {
        if self.names.as_ref().is_none_or(|(of, _)| of != process) {
            self.forget_devices();
        }
    }

    fn names(&mut self, monitor: &mut dyn Monitor) -> Result<Names> {
        let process = monitor.process().clone();
        if let Some((of, names)) = &self.names
            && *of == process
        {
            return Ok(names.clone());
        }
        let version = call::<qmp::query_version>(monitor, json!({}))?;
        let number = |key| {
            let number = version["qemu"].get(key).and_then(Value::as_u64);
            number.unwrap_or(0)
        };
        let (major, minor, micro) = (number("major"), number("minor"), number("micro"));
        let names = Names {
            uuid: uuid(monitor)?,
            name: name(monitor)?,
            version: format!("{major}.{minor}.{micro}"),
        };
        self.names = Some((process, names.clone()));
        Ok(names)
    }

    fn compare(&mut self, devices: Vec<Value>) {
        if devices == self.devices {
            return;
        }
        self.forget_devices();
        for device in &devices {
            if let Some(kind) = kind(device) {
                let path = format!("{PERIPHERAL}/{}", text(device, "name"));
                self.types.insert(path, kind.to_owned());
            }
        }
        self.devices = devices;
    }

    /// A property of a device at a node, `None` when it has none of that name.
    fn property(
        &mut self,
        monitor: &mut dyn Monitor,
        (path, node): (&str, &str),
        name: &'static str,
    ) -> Result<Option<Value>> {
        let key = (path.to_owned(), node.to_owned(), name);
        if let Some(known) = self.properties.get(&key) {
            return Ok(Some(known.clone()));
        }
        let asked = json!({ "path": path, "property": name });
        match call::<qmp::qom_get>(monitor, asked) {
            Ok(value) => {
                self.properties.insert(key, value.clone());
                Ok(Some(value))
            }
            // Of a device that is just going the next look may say more.
            Err(Error::Command { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Asks a VM what it is and has.
pub fn identify(monitor: &mut dyn Monitor, known: &mut Known) -> Result<Machine> {
    let (blocks, graph) = blocks_and_graph(monitor)?;
    let devices = devices(monitor)?;
    known.is_of(monitor.process());
    let mut disks: Vec<Disk> = Vec::new();
    let mut left_out = nodeless(&devices);
    known.compare(devices);
    for block in blocks {
        match describe(monitor, known, &graph, &block)? {
            Ok(disk) => disks.push(disk),
            Err(left) => left_out.push(left),
        }
    }
    refuse_ambiguous(&mut disks, &mut left_out);
    disks.sort_by(|a, b| a.key.cmp(&b.key));
    let status = call::<qmp::query_status>(monitor, json!({}))?;
    let Names {
        uuid,
        name,
        version,
    } = known.names(monitor)?;
    let thing = |value: &Value, id, kind, state| Thing {
        id: text(value, id).to_owned(),
        kind: text(value, kind).to_owned(),
        state: text(value, state).to_owned(),
    };
    let jobs = super::command::jobs(monitor)?;
    let exports = list::<qmp::query_block_exports>(monitor, json!({}))?;
    Ok(Machine {
        uuid,
        name,
        state: text(&status, "status").to_owned(),
        version,
        process: monitor.process().clone(),
        disks,
        left_out,
        jobs: jobs
            .iter()
            .map(|job| thing(job, "id", "type", "status"))
            .collect(),
        exports: exports
            .iter()
            .map(|export| thing(export, "id", "node-name", "type"))
            .collect(),
    })
}

/// The devices and the graph under them. A job that begins or ends puts a filter above a node or takes it away; when that falls
/// between the two answers they are asked for again.
fn blocks_and_graph(monitor: &mut dyn Monitor) -> Result<(Vec<Value>, Graph)> {
    let mut tries = 0;
    loop {
        let devices = list::<qmp::query_block>(monitor, json!({}))?;
        let graph = Graph::read(monitor)?;
        tries += 1;
        let known = |device: &Value| {
            let top = device.get("inserted").map(|node| text(node, "node-name"));
            top.is_none_or(|top| graph.agrees_on(top))
        };
        if tries == READINGS || devices.iter().all(known) {
            return Ok((devices, graph));
        }
        clock::sleep(READ_AGAIN);
    }
}

/// The VM's UUID; the all-zero one of a QEMU without `-uuid` is none.
pub fn uuid(monitor: &mut dyn Monitor) -> Result<Option<String>> {
    let answer = call::<qmp::query_uuid>(monitor, json!({}))?;
    let uuid = text(&answer, "UUID");
    Ok((!uuid.chars().all(|c| c == '0' || c == '-')).then(|| uuid.to_owned()))
}

fn name(monitor: &mut dyn Monitor) -> Result<Option<String>> {
    let answer = call::<qmp::query_name>(monitor, json!({}))?;
    Ok(answer
        .get("name")
        .and_then(Value::as_str)
        .map(str::to_owned))
}

type Described = std::result::Result<Disk, LeftOut>;

fn describe(
    monitor: &mut dyn Monitor,
    known: &mut Known,
    graph: &Graph,
    device: &Value,
) -> Result<Described> {
    let qdev = text(device, "qdev");
    let shown = if qdev.is_empty() {
        text(device, "device")
    } else {
        qdev
    };
    let leave = |reason: String, refused| {
        Ok(Err(LeftOut {
            device: shown.to_owned(),
            reason,
            refused,
        }))
    };
    let Some(inserted) = device.get("inserted") else {
        return leave("no medium".to_owned(), false);
    };
    if flag(device, "removable") {
        return leave("removable medium".to_owned(), false);
    }
    if flag(inserted, "ro") {
        return leave("read-only".to_owned(), false);
    }
    if qdev.is_empty() {
        return leave("no guest device uses it".to_owned(), false);
    }
    let (path, key) = device_path(qdev);
    let top = text(inserted, "node-name");
    let at = (path.as_str(), top);
    let kind = if let Some(kind) = known.types.get(&path) {
        kind.clone()
    } else {
        let kind = known.property(monitor, at, "type")?.unwrap_or_default();
        kind.as_str().unwrap_or("").to_owned()
    };
    if kind == FLASH {
        let why = "the firmware's variables, no disk; a point of a domain holds them as its nvram";
        return leave(why.to_owned(), false);
    }
    if !FRONT_ENDS.contains(&kind.as_str()) {
        let why = format!("a `{kind}` device: not known to pass all its writes through its node");
        return leave(why, true);
    }
    let Some(key) = key else {
        let why = "the device has no id, so it cannot be told from others after a restart: give it one (`-device ...,id=NAME`)";
        return leave(why.to_owned(), true);
    };
    let shared = known.property(monitor, at, "share-rw")?;
    if shared == Some(Value::Bool(true)) {
        return leave(
            "shared with other writers (share-rw=on), which no bitmap sees".to_owned(),
            true,
        );
    }
    let found = graph
        .below_filters(top)
        .and_then(|(node, filters)| graph.disk(&key, &node, filters));
    match found {
        Ok(mut disk) => {
            qdev.clone_into(&mut disk.qdev);
            disk.device = kind;
            disk.werror = known
                .property(monitor, at, "werror")?
                .and_then(|value| value.as_str().map(str::to_owned))
                .unwrap_or_default();
            Ok(Ok(disk))
        }
        Err(why) => leave(why, true),
    }
}

/// The QOM path of a device and its id, from the spelling that `query-block` uses: an id, or the path of the device or
/// of the part of it that holds the disk.
fn device_path(qdev: &str) -> (String, Option<String>) {
    if !qdev.starts_with('/') {
        return (format!("{PERIPHERAL}/{qdev}"), Some(qdev.to_owned()));
    }
    let path = qdev
        .strip_suffix("/virtio-backend")
        .unwrap_or(qdev)
        .to_owned();
    let key = path
        .strip_prefix("/machine/peripheral/")
        .and_then(|rest| rest.split('/').next())
        .map(str::to_owned);
    (path, key)
}

/// All devices, whether they have an id or not.
fn devices(monitor: &mut dyn Monitor) -> Result<Vec<Value>> {
    let mut found = Vec::new();
    for container in [PERIPHERAL, "/machine/peripheral-anon"] {
        found.extend(list::<qmp::qom_list>(
            monitor,
            json!({ "path": container }),
        )?);
    }
    Ok(found)
}

/// The type of a device as its container lists it.
fn kind(device: &Value) -> Option<&str> {
    let kind = text(device, "type").strip_prefix("child<")?;
    kind.strip_suffix('>')
}

fn nodeless(devices: &[Value]) -> Vec<LeftOut> {
    let left_out = |device: &Value| {
        let kind = kind(device)?;
        let nodeless = NODELESS
            .iter()
            .find(|(prefix, ..)| kind.starts_with(prefix));
        nodeless.map(|(_, why, refused)| LeftOut {
            device: text(device, "name").to_owned(),
            reason: format!("a `{kind}` device: {why}"),
            refused: *refused,
        })
    };
    devices.iter().filter_map(left_out).collect()
}

/// Two devices under one key, or on one node, are both refused.
fn refuse_ambiguous(disks: &mut Vec<Disk>, left_out: &mut Vec<LeftOut>) {
    let mut keys: BTreeMap<String, usize> = BTreeMap::new();
    let mut nodes: BTreeMap<String, usize> = BTreeMap::new();
    for disk in disks.iter() {
        *keys.entry(disk.key.clone()).or_default() += 1;
        *nodes.entry(disk.node.clone()).or_default() += 1;
    }
    let twice = |map: &BTreeMap<String, usize>| -> BTreeSet<String> {
        map.iter()
            .filter(|(_, count)| **count > 1)
            .map(|(name, _)| name.clone())
            .collect()
    };
    let (keys, nodes) = (twice(&keys), twice(&nodes));
    disks.retain(|disk| {
        let reason = if keys.contains(&disk.key) {
            format!("two devices answer to the key `{}`", disk.key)
        } else if nodes.contains(&disk.node) {
            format!("two devices use the node `{}`", disk.node)
        } else {
            return true;
        };
        left_out.push(LeftOut {
            device: disk.qdev.clone(),
            reason,
            refused: true,
        });
        false
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_without_a_block_node_is_never_left_out_in_silence() {
        let device =
            |name: &str, kind: &str| json!({ "name": name, "type": format!("child<{kind}>") });
        let devices = [
            device("vda", "virtio-blk-pci"),
            device("nvdimm0", "nvdimm"),
            device("virtiopmem0", "virtio-pmem-pci"),
            device("dimm0", "pc-dimm"),
            device("d", "vhost-user-blk-pci"),
            device("fs0", "vhost-user-fs-pci"),
            device("gpu", "vfio-pci"),
        ];
        let left: Vec<(String, bool)> = nodeless(&devices)
            .into_iter()
            .map(|left| (left.device, left.refused))
            .collect();
        let is = |name: &str, refused| (name.to_owned(), refused);
        assert_eq!(
            left,
            [
                is("nvdimm0", true),
                is("virtiopmem0", true),
                is("d", true),
                is("fs0", false),
                is("gpu", false)
            ]
        );
    }

    #[test]
    fn a_device_is_known_by_its_id_in_every_spelling() {
        let path = |qdev| device_path(qdev);
        assert_eq!(
            path("sda"),
            ("/machine/peripheral/sda".to_owned(), Some("sda".to_owned()))
        );
        assert_eq!(
            path("/machine/peripheral/vda/virtio-backend"),
            ("/machine/peripheral/vda".to_owned(), Some("vda".to_owned()))
        );
        assert_eq!(
            path("/machine/peripheral/usb1/usb1.0/legacy[0]").1,
            Some("usb1".to_owned())
        );
        assert_eq!(
            path("/machine/peripheral-anon/device[0]/virtio-backend").1,
            None
        );
    }
}
