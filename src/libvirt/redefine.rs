//! A domain's definition made into that of its restored copy: disks, firmware variables and boot files at their new places,
//! a new identity where one is wanted, and nothing of how the old one ran.
//!
//! What is not understood stays as it is: libvirt says what it thinks of it when the domain is defined.

use std::collections::BTreeSet;
use std::path::Path;

use roxmltree::{Document, Node};

use super::definition::{Image, Parts, Plan, Redefined, tpm_home};
use super::edit::{Edits, escape};
use super::xml::{child, keeps_data};
use crate::qmp::{Error, Result};

/// Elements of `<os>` that name a file to boot from.
const BOOT: [&str; 4] = ["kernel", "initrd", "dtb", "shim"];
/// Children of a `<disk>` that say where it was and how it ran.
const OLD_SOURCE: [&str; 5] = ["source", "backingStore", "mirror", "auth", "encryption"];
/// Where libvirt itself puts the sockets of channels.
const SOCKETS: [&str; 3] = [
    "/var/lib/libvirt/qemu/channel/",
    "/var/lib/libvirt/qemu/domain-",
    "/run/libvirt/qemu/channel/",
];

fn parse(xml: &str) -> Result<Document<'_>> {
    Document::parse(xml).map_err(|error| Error::Libvirt(format!("the domain's XML: {error}")))
}

fn text<'a>(node: Option<Node<'a, '_>>) -> Option<&'a str> {
    node.and_then(|node| node.text())
        .map(str::trim)
        .filter(|text| !text.is_empty())
}

/// A domain's name and UUID.
pub fn identity(xml: &str) -> Result<(String, String)> {
    let document = parse(xml)?;
    let root = document.root_element();
    let of = |name| text(child(root, name)).map(str::to_owned);
    match (of("name"), of("uuid")) {
        (Some(name), Some(uuid)) => Ok((name, uuid)),
        _ => Err(Error::Libvirt(
            "the domain's XML has no name or no UUID".to_owned(),
        )),
    }
}

/// The files of the host that belong to a domain.
pub(super) fn parts(xml: &str, uri: &str) -> Result<Parts> {
    let document = parse(xml)?;
    let root = document.root_element();
    let mut parts = Parts::default();
    if let Some(os) = child(root, "os") {
        parts.loader = text(child(os, "loader")).map(Into::into);
        if let Some(nvram) = child(os, "nvram") {
            let source = child(nvram, "source");
            match nvram.attribute("type").unwrap_or("file") {
                "file" | "block" => {
                    let named = source.and_then(|source| {
                        source.attribute("file").or_else(|| source.attribute("dev"))
                    });
                    parts.nvram = named.or_else(|| text(Some(nvram))).map(Into::into);
                }
                kind => parts.beyond.push(format!("nvram of type `{kind}`")),
            }
        }
        for name in BOOT {
            if let Some(path) = text(child(os, name)) {
                parts.boot.push((name.to_owned(), path.into()));
            }
        }
    }
    let devices = child(root, "devices");
    let tpms = devices.iter().flat_map(Node::children);
    for tpm in tpms.filter(|node| node.has_tag_name("tpm")) {
        let Some(backend) = child(tpm, "backend") else {
            continue;
        };
        match (backend.attribute("type"), child(backend, "source")) {
            (Some("emulator"), None) => {
                let uuid = text(child(root, "uuid")).unwrap_or_default();
                let home = tpm_home(uri).join(uuid);
                parts.tpm = ["tpm2", "tpm1.2"].map(|version| home.join(version)).into();
            }
            (Some("emulator"), Some(source)) if source.attribute("type") == Some("dir") => {
                parts.tpm = source
                    .attribute("path")
                    .map(Into::into)
                    .into_iter()
                    .collect();
            }
            // Its state is in the host's own chip.
            (Some("passthrough"), _) => {}
            (kind, _) => parts.beyond.push(format!(
                "the state of a TPM of type `{}` in a place of its own",
                kind.unwrap_or_default()
            )),
        }
    }
    Ok(parts)
}

/// Makes a definition into that of the restored domain.
pub fn redefine(xml: &str, plan: &Plan<'_>) -> Result<Redefined> {
    let document = parse(xml)?;
    let root = document.root_element();
    let mut work = Work {
        plan,
        edits: Edits::of(xml),
        notes: Vec::new(),
        own: BTreeSet::new(),
        placed: BTreeSet::new(),
    };
    work.identity(root);
    if let Some(os) = child(root, "os") {
        work.os(os);
    }
    for seclabel in root.children().filter(|node| node.has_tag_name("seclabel")) {
        if seclabel.attribute("type") == Some("dynamic") {
            work.remove_children(seclabel, &["label", "imagelabel"]);
        }
    }
    let devices = child(root, "devices");
    for device in devices.iter().flat_map(Node::children) {
        work.device(device);
    }
    let targets = plan.disks.keys();
    let unknown = targets.filter(|target| !work.placed.contains(*target));
    Ok(Redefined {
        unknown: unknown.cloned().collect(),
        xml: work.edits.apply()?,
        notes: work.notes,
        own: work.own,
    })
}

struct Work<'a> {
    plan: &'a Plan<'a>,
    edits: Edits<'a>,
    notes: Vec<String>,
    own: BTreeSet<String>,
    /// The targets that restored disks went to.
    placed: BTreeSet<String>,
}

impl Work<'_> {
    fn remove_children(&mut self, node: Node<'_, '_>, names: &[&str]) {
        for found in node.children().filter(Node::is_element) {
            if names.contains(&found.tag_name().name()) {
                self.edits.remove(found);
            }
        }
    }

    fn identity(&mut self, root: Node<'_, '_>) {
        self.edits.remove_attribute(root, "id");
        if let Some(name) = child(root, "name") {
            self.edits.set_text(name, self.plan.name);
        }
        // A restored VM is at another point of its history: its generation is a new one, whoever it is.
        if let Some(generation) = child(root, "genid") {
            self.edits.replace(generation, "<genid/>");
        }
        let Some(new) = self.plan.uuid else { return };
        if let Some(uuid) = child(root, "uuid") {
            self.edits.set_text(uuid, new);
        }
        // libvirt refuses a domain that tells its guest another UUID.
        let tables = root.children().filter(|node| node.has_tag_name("sysinfo"));
        for system in tables.filter_map(|table| child(table, "system")) {
            let entries = system.children().filter(|node| node.has_tag_name("entry"));
            for entry in entries.filter(|entry| entry.attribute("name") == Some("uuid")) {
                self.edits.set_text(entry, new);
            }
        }
    }

    fn os(&mut self, os: Node<'_, '_>) {
        if let Some(nvram) = child(os, "nvram") {
            self.edits.remove_attribute(nvram, "type");
            if let Some(path) = self.plan.files.get("nvram") {
                self.edits.set_text(nvram, &path.display().to_string());
            } else {
                // Never the original's file: libvirt makes one from the template.
                self.edits.clear(nvram);
                let note = "the firmware's variables (nvram) are not in the point: the domain starts with new ones";
                self.notes.push(note.to_owned());
            }
        }
        for name in BOOT {
            let Some(node) = child(os, name) else {
                continue;
            };
            match (self.plan.files.get(name), text(Some(node))) {
                (Some(path), _) => self.edits.set_text(node, &path.display().to_string()),
                (None, Some(path)) if !(self.plan.exists)(Path::new(path)) => {
                    self.notes.push(format!("its {name} {path} is not there"));
                }
                (None, _) => {}
            }
        }
    }

    fn device(&mut self, device: Node<'_, '_>) {
        let kind = device.tag_name().name();
        if kind == "disk" {
            return self.disk(device);
        }
        self.remove_alias(device);
        match kind {
            "interface" => self.interface(device),
            "hostdev" => {
                let what = device.attribute("type").unwrap_or("pci");
                self.notes.push(format!(
                    "it has a device of the host (`hostdev` of type {what}), which one running domain at a time can have"
                ));
            }
            "channel" | "serial" | "parallel" | "console" => self.character_device(device),
            "graphics" if self.plan.uuid.is_some() => {
                let what = device.attribute("type").unwrap_or("graphics");
                self.own_path(Some(device), "socket", what);
                for listen in device.children().filter(|node| node.has_tag_name("listen")) {
                    self.own_path(Some(listen), "socket", what);
                }
            }
            // The original's own is no place for another's writes.
            "memory" if self.plan.uuid.is_some() && keeps_data(device) => {
                self.edits.remove(device);
                let note = "persistent memory is not in the point: the domain is without it";
                self.notes.push(note.to_owned());
            }
            "tpm" => {
                if let Some(backend) = child(device, "backend")
                    && backend.attribute("type") == Some("emulator")
                {
                    // Its state is put where libvirt looks for it without being told.
                    self.remove_children(backend, &["source"]);
                    if child(backend, "encryption").is_some() {
                        let note = "the state of its TPM is encrypted with a secret that libvirt must have on this host";
                        self.notes.push(note.to_owned());
                    }
                }
            }
            _ => {}
        }
    }

    /// A second VM has sockets and files of its own: at the original's paths it would take the sockets from it, that of its
    /// guest agent too, and write into its logs.
    fn character_device(&mut self, device: Node<'_, '_>) {
        let mut source = child(device, "source");
        let path = source.and_then(|source| source.attribute("path"));
        if let (Some(old), Some(path)) = (source, path)
            && SOCKETS.iter().any(|place| path.starts_with(place))
        {
            self.edits.remove(old);
            source = None;
        }
        if self.plan.uuid.is_none() {
            return;
        }
        let what = match device.tag_name().name() {
            // The first serial port is listed as a console, too.
            "console" => "serial",
            name => name,
        };
        let mode = source.and_then(|source| source.attribute("mode"));
        match (device.attribute("type").unwrap_or_default(), mode) {
            ("file", _) | ("unix", Some("bind")) => self.own_path(source, "path", what),
            ("dev" | "pipe", _) => self.shares(what, path),
            ("tcp" | "udp", Some("bind")) => {
                let port = source.and_then(|source| source.attribute("service"));
                self.shares(what, port.map(|port| format!("port {port}")).as_deref());
            }
            _ => {}
        }
        self.own_path(child(device, "log"), "file", what);
    }

    /// A path beside the original's. Devices are everybody's: `/dev/null`; what is in `/dev/shm` is none.
    fn own_path(&mut self, node: Option<Node<'_, '_>>, attribute: &str, what: &str) {
        if let Some(node) = node
            && let Some(path) = node.attribute(attribute)
            && (!path.starts_with("/dev/") || path.starts_with("/dev/shm/"))
        {
            let own = format!("{path}.{}", self.plan.name);
            self.edits.set_attribute(node, attribute, &own);
            self.own.insert(format!("its {what} is {own}"));
        }
    }

    fn shares(&mut self, what: &str, with: Option<&str>) {
        let with = with.unwrap_or("the same");
        let note =
            format!("its {what} is {with}, as that of the original, which cannot run beside it");
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// Only a name that the operator gave stays.
    fn remove_alias(&mut self, device: Node<'_, '_>) {
        if let Some(alias) = child(device, "alias")
            && !alias
                .attribute("name")
                .unwrap_or_default()
                .starts_with("ua-")
        {
            self.edits.remove(alias);
        }
    }

    fn interface(&mut self, interface: Node<'_, '_>) {
        if self.plan.uuid.is_some() {
            // libvirt gives it new ones.
            self.remove_children(interface, &["mac"]);
            if let Some(port) = child(interface, "virtualport")
                && let Some(parameters) = child(port, "parameters")
            {
                self.edits.remove_attribute(parameters, "interfaceid");
            }
        }
        if interface.attribute("type") == Some("hostdev") {
            let note = "it has an interface that is a device of the host, which one running domain at a time can have";
            self.notes.push(note.to_owned());
        }
    }

    fn disk(&mut self, disk: Node<'_, '_>) {
        let target = child(disk, "target");
        let dev = target.and_then(|target| target.attribute("dev"));
        let dev = dev.unwrap_or_default();
        if let (Some(image), Some(target)) = (self.plan.disks.get(dev), target) {
            self.placed.insert(dev.to_owned());
            self.remove_alias(disk);
            return self.restored(disk, target, image);
        }
        let source = child(disk, "source");
        let path =
            source.and_then(|source| source.attribute("file").or_else(|| source.attribute("dev")));
        let is_there = path.is_none_or(|path| (self.plan.exists)(Path::new(path)));
        let removable = matches!(disk.attribute("device"), Some("cdrom" | "floppy"));
        let readonly = child(disk, "readonly").is_some();
        if removable && !is_there {
            if let Some(source) = source {
                self.edits.remove(source);
            }
            self.notes.push(format!(
                "drive {dev} is empty: its medium {} is not there",
                path.unwrap_or_default()
            ));
        } else if !(removable || readonly && is_there) {
            // The original's own image is no place for another's writes.
            self.edits.remove(disk);
            self.notes.push(format!(
                "disk {dev} is not in the point: the domain is without it"
            ));
            return;
        }
        self.remove_alias(disk);
        self.remove_children(disk, &["backingStore", "mirror"]);
        if let Some(source) = source.filter(|_| is_there) {
            self.edits.remove_attribute(source, "index");
        }
    }

    fn restored(&mut self, disk: Node<'_, '_>, target: Node<'_, '_>, image: &Image) {
        let format = if image.qcow2 { "qcow2" } else { "raw" };
        if disk
            .descendants()
            .any(|node| node.has_tag_name("encryption"))
        {
            let dev = target.attribute("dev").unwrap_or_default();
            self.notes.push(format!(
                "disk {dev} was encrypted by QEMU; the restored image is not"
            ));
        }
        self.remove_children(disk, &OLD_SOURCE);
        if let Some(driver) = child(disk, "driver") {
            self.edits.set_attribute(driver, "type", format);
            if !image.qcow2 {
                self.edits.remove_attribute(driver, "discard_no_unref");
                self.remove_children(driver, &["metadata_cache"]);
            }
        } else {
            let driver = format!("<driver name='qemu' type='{format}'/>");
            self.edits.insert_before(target, &driver);
        }
        let (kind, attribute) = if image.device {
            ("block", "dev")
        } else {
            ("file", "file")
        };
        self.edits.set_attribute(disk, "type", kind);
        let path = escape(&image.path.display().to_string());
        self.edits
            .insert_before(target, &format!("<source {attribute}='{path}'/>"));
    }
}

#[cfg(test)]
#[path = "redefine_tests.rs"]
mod tests;
