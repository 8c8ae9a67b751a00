//! The images under a disk: the block graph (`query-named-block-nodes`, `x-debug-query-block-graph`), read down from a
//! device's top node.
//!
//! ```text
//! guest device --root--> [throttle] --file--> qcow2  --file--> file            `node` is the first node that is no
//!                        filters             node    --backing--> qcow2 ...     filter: bitmaps live there
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

use qapi::qmp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::command::{call, flag, list, text};
use super::{Monitor, Process, Result};

/// Drivers that pass data through: bitmaps belong under them.
const FILTERS: [&str; 8] = [
    "throttle",
    "copy-on-read",
    "compress",
    "preallocate",
    "copy-before-write",
    "mirror_top",
    "commit_top",
    "blklogwrites",
];
/// Filters that a block job puts in place.
const JOB_FILTERS: [&str; 3] = ["copy-before-write", "mirror_top", "commit_top"];
/// A bitmap as QEMU lists it.
#[expect(clippy::struct_excessive_bools, reason = "QEMU's own flags")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Enabled: it records the guest's writes.
    pub recording: bool,
    /// Stored in the image when the VM shuts down.
    pub persistent: bool,
    /// Left behind by a QEMU that died: it can only be removed.
    pub inconsistent: bool,
    /// In use by an export or a job.
    pub busy: bool,
    /// Bytes a bit.
    pub granularity: u32,
    /// Dirty bytes.
    pub count: u64,
}

/// One image of a disk's chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The node's driver: `qcow2`, `raw`, `file`.
    pub driver: String,
    /// The file or device as QEMU was told.
    pub filename: String,
    /// The driver of the file's node: `file`, `host_device`, `nbd`.
    pub protocol: String,
    /// The file's inode number, when the file can be seen from here.
    pub inode: Option<u64>,
    /// What the image's header says: cluster size, version, data file, encryption.
    pub header: Value,
}

/// A disk that can be backed up.
#[derive(Debug, Clone, Serialize)]
pub struct Disk {
    /// The disk's key: its device's id.
    pub key: String,
    /// The device as `query-block` names it.
    pub qdev: String,
    /// The kind of device: `virtio-blk-pci`.
    pub device: String,
    /// The node that bitmaps are put on.
    pub node: String,
    /// That node's driver.
    pub format: String,
    /// Bytes.
    pub size: u64,
    /// The filters above the node, top first.
    pub filters: Vec<String>,
    /// The images from the node down its backing chain.
    pub chain: Vec<Layer>,
    /// Why no bitmap can be stored in the image; `None` when it can.
    pub transient: Option<String>,
    /// The bitmaps on the node.
    pub bitmaps: Vec<Bitmap>,
    /// What the device does when a write fails (`report`, `stop`, `enospc`, `auto`, `ignore`).
    pub werror: String,
    /// Whether the image is opened with `O_DIRECT`.
    pub direct: bool,
    /// Whether QEMU decrypts it: a backup would hold plain text.
    pub decrypted: bool,
    /// Whether a qcow2 image updates its reference counts lazily.
    pub lazy_refcounts: bool,
    /// The job filters above the node that are not ours.
    pub foreign_filters: Vec<String>,
}

/// The block graph and its nodes.
pub struct Graph {
    /// `query-named-block-nodes`, by node name.
    nodes: BTreeMap<String, Value>,
    /// (parent node, child role) -> child node; a role held twice is kept as a list.
    children: BTreeMap<(String, String), Vec<String>>,
    process: Process,
}

impl Graph {
    /// Reads it from QEMU, or from `qemu-storage-daemon`, which has the same commands.
    pub fn read(monitor: &mut dyn Monitor) -> Result<Self> {
        let nodes = list::<qmp::query_named_block_nodes>(monitor, json!({ "flat": true }))?;
        let nodes = nodes
            .into_iter()
            .map(|node| (text(&node, "node-name").to_owned(), node))
            .collect();
        let graph = call::<qmp::x_debug_query_block_graph>(monitor, json!({}))?;
        let array = |key| {
            graph
                .get(key)
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default()
        };
        let names: BTreeMap<u64, String> = array("nodes")
            .iter()
            .filter_map(|node| Some((node.get("id")?.as_u64()?, text(node, "name").to_owned())))
            .collect();
        let mut children: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
        for edge in array("edges") {
            let end = |key| {
                edge.get(key)
                    .and_then(Value::as_u64)
                    .and_then(|id| names.get(&id))
            };
            if let (Some(parent), Some(child)) = (end("parent"), end("child")) {
                let role = (parent.clone(), text(&edge, "name").to_owned());
                children.entry(role).or_default().push(child.clone());
            }
        }
        Ok(Self {
            nodes,
            children,
            process: monitor.process().clone(),
        })
    }

    /// A node as `query-named-block-nodes` has it.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Value> {
        self.nodes.get(name)
    }

    /// Whether both answers that the graph is made of have the nodes from here down to an image.
    pub(super) fn agrees_on(&self, top: &str) -> bool {
        self.below_filters(top).is_ok()
    }

    /// The names of all nodes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    fn driver(&self, node: &str) -> &str {
        self.nodes.get(node).map_or("", |value| text(value, "drv"))
    }

    fn child(&self, node: &str, role: &str) -> Option<&str> {
        match self
            .children
            .get(&(node.to_owned(), role.to_owned()))?
            .as_slice()
        {
            [only] => Some(only),
            _ => None,
        }
    }

    /// The node behind another.
    #[must_use]
    pub fn backing(&self, node: &str) -> Option<&str> {
        self.child(node, "backing")
    }

    /// The nodes under another, each before its own.
    #[must_use]
    pub fn below(&self, node: &str) -> Vec<String> {
        let mut below = Vec::new();
        let mut next = vec![node.to_owned()];
        while let Some(parent) = next.pop() {
            let children = self.children.iter().filter(|((of, _), _)| *of == parent);
            for child in children.flat_map(|(_, children)| children) {
                if !child.is_empty() && !below.contains(child) {
                    below.push(child.clone());
                    next.push(child.clone());
                }
            }
        }
        below
    }

    /// Whether a device, filter, job or other node uses this one.
    #[must_use]
    pub fn has_parents(&self, node: &str) -> bool {
        self.children.values().flatten().any(|child| child == node)
    }

    /// Walks down from a device's top node through filters. Fails with what is unclear.
    pub(super) fn below_filters(
        &self,
        top: &str,
    ) -> std::result::Result<(String, Vec<String>), String> {
        let mut node = top.to_owned();
        let mut filters = Vec::new();
        while FILTERS.contains(&self.driver(&node)) {
            let next = self
                .child(&node, "file")
                .or_else(|| self.child(&node, "backing"));
            let Some(next) = next else {
                return Err(format!("the node under filter `{node}` cannot be told"));
            };
            filters.push(std::mem::replace(&mut node, next.to_owned()));
            if filters.len() > self.nodes.len() {
                return Err(format!("the filters above `{top}` form a circle"));
            }
        }
        if self.nodes.contains_key(&node) {
            Ok((node, filters))
        } else {
            Err(format!("node `{node}` is not listed"))
        }
    }

    /// The images from a node down its backing chain.
    fn chain(&self, node: &str) -> Vec<Layer> {
        let mut layers = Vec::new();
        let mut next = Some(node.to_owned());
        while let Some(name) = next {
            if FILTERS.contains(&self.driver(&name)) {
                next = self
                    .child(&name, "file")
                    .or_else(|| self.child(&name, "backing"))
                    .map(str::to_owned);
                continue;
            }
            layers.push(self.layer(&name));
            next = self.child(&name, "backing").map(str::to_owned);
            if layers.len() > self.nodes.len() {
                break;
            }
        }
        layers
    }

    fn layer(&self, node: &str) -> Layer {
        let empty = Value::Null;
        let value = self.nodes.get(node).unwrap_or(&empty);
        let image = value.get("image").unwrap_or(&empty);
        // A filter may stand between the format and its file, too.
        let under = |node: &str| self.child(node, "file").map(str::to_owned);
        let mut protocol = under(node).unwrap_or_else(|| node.to_owned());
        while FILTERS.contains(&self.driver(&protocol))
            && let Some(next) = under(&protocol)
        {
            protocol = next;
        }
        let protocol = protocol.as_str();
        let filename = self
            .nodes
            .get(protocol)
            .and_then(|file| file.get("image"))
            .map_or_else(|| text(value, "file"), |image| text(image, "filename"))
            .to_owned();
        let specific = image.pointer("/format-specific/data").unwrap_or(&empty);
        let keep = [
            "compat",
            "compression-type",
            "extended-l2",
            "refcount-bits",
            "data-file",
            "data-file-raw",
        ];
        let mut header: serde_json::Map<String, Value> = keep
            .into_iter()
            .filter_map(|key| Some((key.to_owned(), specific.get(key)?.clone())))
            .collect();
        if let Some(format) = specific.pointer("/encrypt/format") {
            header.insert("encrypt".to_owned(), format.clone());
        }
        for key in ["cluster-size", "backing-filename"] {
            if let Some(found) = image.get(key) {
                header.insert(key.to_owned(), found.clone());
            }
        }
        if let Some(data) = self
            .child(node, "data-file")
            .and_then(|child| self.nodes.get(child))
        {
            let meta = std::fs::metadata(self.seen_from_here(text(data, "file")));
            let inode = meta.ok().map(|meta| meta.ino());
            header.insert("data-file-inode".to_owned(), inode.into());
        }
        let inode = std::fs::metadata(self.seen_from_here(&filename))
            .ok()
            .map(|meta| meta.ino());
        Layer {
            driver: text(value, "drv").to_owned(),
            protocol: self.driver(protocol).to_owned(),
            filename,
            inode,
            header: header.into(),
        }
    }

    /// A path of QEMU's as this process can reach it, through QEMU's own root and working directory.
    fn seen_from_here(&self, filename: &str) -> PathBuf {
        let base = PathBuf::from(format!("/proc/{}", self.process.pid));
        match filename.strip_prefix('/') {
            Some(rest) => base.join("root").join(rest),
            None => base.join("cwd").join(filename),
        }
    }

    /// Whether the disk's host device is zoned: writes to it come back in another order than they went.
    fn zoned(&self, filename: &str) -> bool {
        let Ok(meta) = std::fs::metadata(self.seen_from_here(filename)) else {
            return false;
        };
        if !meta.file_type().is_block_device() {
            return false;
        }
        let device = meta.rdev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/queue/zoned"))
            .is_ok_and(|mode| mode.trim() != "none")
    }

    /// Describes the disk whose data is in `node`; `filters` are above it.
    pub fn disk(
        &self,
        key: &str,
        node: &str,
        filters: Vec<String>,
    ) -> std::result::Result<Disk, String> {
        let value = self
            .nodes
            .get(node)
            .ok_or_else(|| format!("node `{node}` is not listed"))?;
        let image = value.get("image").unwrap_or(&Value::Null);
        let size = image
            .get("virtual-size")
            .and_then(Value::as_u64)
            .ok_or_else(|| format!("node `{node}` has no size"))?;
        let chain = self.chain(node);
        let format = text(value, "drv").to_owned();
        // A mirror's filter is none of those above the node: QEMU does not show it there unless it was named.
        let users = self
            .children
            .iter()
            .filter(|(_, children)| children.iter().any(|child| child == node));
        let users: BTreeSet<&String> = users.map(|((user, _), _)| user).collect();
        let foreign_filters = filters
            .iter()
            .chain(users.into_iter().filter(|name| !filters.contains(name)))
            .filter(|name| JOB_FILTERS.contains(&self.driver(name)))
            .filter(|name| !name.starts_with(super::names::PREFIX))
            .cloned()
            .collect();
        if chain
            .first()
            .is_some_and(|layer| self.zoned(&layer.filename))
        {
            return Err("a zoned device: its writes cannot be followed".to_owned());
        }
        Ok(Disk {
            key: key.to_owned(),
            qdev: String::new(),
            device: String::new(),
            node: node.to_owned(),
            transient: why_transient(&format, value, image),
            decrypted: format == "luks"
                || flag(value, "encrypted")
                || image.pointer("/format-specific/data/encrypt").is_some(),
            lazy_refcounts: image.pointer("/format-specific/data/lazy-refcounts")
                == Some(&Value::Bool(true)),
            format,
            size,
            filters,
            chain,
            bitmaps: bitmaps(value)?,
            direct: value
                .get("cache")
                .is_some_and(|cache| flag(cache, "direct")),
            werror: String::new(),
            foreign_filters,
        })
    }
}

fn why_transient(format: &str, node: &Value, image: &Value) -> Option<String> {
    if format != "qcow2" {
        return Some(format!("{format} images hold no bitmaps"));
    }
    if image
        .pointer("/format-specific/data/compat")
        .and_then(Value::as_str)
        != Some("1.1")
    {
        return Some(
            "qcow2 version 2 holds no bitmaps (`qemu-img amend -o compat=1.1`)".to_owned(),
        );
    }
    if image
        .get("snapshots")
        .and_then(Value::as_array)
        .is_some_and(|list| !list.is_empty())
    {
        return Some(
            "it has internal snapshots, which a stored bitmap would keep from being reverted to"
                .to_owned(),
        );
    }
    flag(node, "ro").then(|| "it is opened read-only".to_owned())
}

fn bitmaps(node: &Value) -> std::result::Result<Vec<Bitmap>, String> {
    let listed = node
        .get("dirty-bitmaps")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    listed
        .iter()
        .filter(|bitmap| bitmap.get("name").is_some())
        .map(|bitmap| {
            let number = |key| bitmap.get(key).and_then(Value::as_u64);
            Ok(Bitmap {
                name: text(bitmap, "name").to_owned(),
                recording: flag(bitmap, "recording"),
                persistent: flag(bitmap, "persistent"),
                inconsistent: flag(bitmap, "inconsistent"),
                busy: flag(bitmap, "busy"),
                granularity: number("granularity")
                    .and_then(|value| u32::try_from(value).ok())
                    .ok_or("a bitmap without a granularity")?,
                count: number("count").unwrap_or(0),
            })
        })
        .collect()
}
