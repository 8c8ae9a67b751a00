//! What a domain's XML says of its disks and its agent (libvirt's "Domain XML format").

use roxmltree::{Document, Node};

use crate::qmp::{Error, Result};

/// The name of the guest agent's channel.
const AGENT: &str = "org.qemu.guest_agent.0";

/// What is read from a domain's XML.
#[derive(Debug, Clone, Default)]
pub(super) struct Description {
    pub(super) disks: Vec<Disk>,
    /// Persistent memory that the guest has as disks, by the ids that libvirt gives it.
    pub(super) memory: Vec<String>,
    /// Directories of the host that the guest shares, by the ids that libvirt gives them.
    pub(super) shares: Vec<String>,
    /// Whether the guest agent is connected; `None` without a channel for it.
    pub(super) agent_connected: Option<bool>,
}

/// A `<disk>`.
#[expect(clippy::struct_excessive_bools, reason = "libvirt's own elements")]
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Disk {
    /// The target's `dev`: `vda`.
    pub(super) target: String,
    /// `disk`, `lun`, `cdrom` or `floppy`.
    pub(super) device: String,
    /// The device's id in QEMU, while the domain runs.
    pub(super) alias: Option<String>,
    /// The number in its nodes' names, while the domain runs.
    pub(super) index: Option<u32>,
    /// The image's format.
    pub(super) format: Option<String>,
    /// The type of its source: `file`, `block`, `network`, `volume`, `vhostuser`.
    pub(super) kind: String,
    /// The path of a `file` or `block`.
    pub(super) path: Option<String>,
    pub(super) readonly: bool,
    pub(super) shareable: bool,
    pub(super) transient: bool,
    /// libvirt has its key.
    pub(super) encrypted: bool,
}

impl Description {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let document = Document::parse(text)
            .map_err(|error| Error::Libvirt(format!("the domain's XML: {error}")))?;
        let mut found = Self::default();
        let devices = child(document.root_element(), "devices");
        for node in devices.iter().flat_map(Node::children) {
            if node.has_tag_name("disk") {
                found.disks.push(disk(node));
            }
            if node.has_tag_name("memory") && keeps_data(node) {
                found.memory.push(memory_id(node, &found.memory));
            }
            if node.has_tag_name("filesystem") {
                found.shares.push(format!("fs{}", found.shares.len()));
            }
            if node.has_tag_name("channel")
                && let Some(target) = child(node, "target")
                && target.attribute("name") == Some(AGENT)
            {
                found.agent_connected = Some(target.attribute("state") == Some("connected"));
            }
        }
        Ok(found)
    }
}

/// Whether a `<memory>` device keeps what the guest writes.
pub(super) fn keeps_data(memory: Node<'_, '_>) -> bool {
    matches!(memory.attribute("model"), Some("nvdimm" | "virtio-pmem"))
}

/// The id of a `<memory>` device (libvirt's `qemuAssignDeviceMemoryAlias`): an NVDIMM goes by its slot, others are counted.
fn memory_id(node: Node<'_, '_>, before: &[String]) -> String {
    let kind = node.attribute("model").unwrap_or_default().replace('-', "");
    let slot = child(node, "address").and_then(|address| address.attribute("slot"));
    let slot = slot.filter(|_| kind == "nvdimm").map(str::to_owned);
    let count = || before.iter().filter(|id| id.starts_with(&kind)).count();
    let number = slot.unwrap_or_else(|| count().to_string());
    format!("{kind}{number}")
}

fn disk(node: Node<'_, '_>) -> Disk {
    let attribute =
        |name: &str, key: &str| child(node, name).and_then(|child| child.attribute(key));
    let path = attribute("source", "file").or_else(|| attribute("source", "dev"));
    Disk {
        target: attribute("target", "dev").unwrap_or_default().to_owned(),
        device: node.attribute("device").unwrap_or("disk").to_owned(),
        alias: attribute("alias", "name").map(str::to_owned),
        index: attribute("source", "index").and_then(|index| index.parse().ok()),
        format: attribute("driver", "type").map(str::to_owned),
        kind: node.attribute("type").unwrap_or("file").to_owned(),
        path: path.map(str::to_owned),
        readonly: child(node, "readonly").is_some(),
        shareable: child(node, "shareable").is_some(),
        transient: child(node, "transient").is_some(),
        encrypted: [Some(node), child(node, "source")]
            .into_iter()
            .flatten()
            .any(|of| child(of, "encryption").is_some()),
    }
}

/// A text as a value of an attribute.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('\'', "&apos;")
}

pub(super) fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) const LIVE: &str = "<domain type='qemu' id='1'><devices>
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
          <source file='/images/a.qcow2' index='4'/><backingStore type='file'><source file='/images/base.qcow2' index='9'/>
          </backingStore><target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>
        <disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/b' index='3'/>
          <target dev='sda' bus='scsi'/><shareable/><alias name='scsi0-0-0-0'/></disk>
        <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/><alias name='sata0-0-1'/></disk>
        <disk type='network' device='disk'><source protocol='rbd' name='pool/image' index='1'/>
          <target dev='vdc' bus='virtio'/><alias name='virtio-disk2'/></disk>
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/c.qcow2' index='6'>
          <encryption format='luks'><secret type='passphrase' uuid='x'/></encryption></source><target dev='vdd'/></disk>
        <filesystem type='mount'><driver type='virtiofs'/><source dir='/srv/x'/><target dir='x'/></filesystem>
        <memory model='dimm'><target><size unit='KiB'>524288</size></target></memory>
        <memory model='nvdimm'><source><path>/pm/1</path></source><address type='dimm' slot='1'/></memory>
        <memory model='virtio-pmem'><source><path>/pm/2</path></source></memory>
        <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
        </devices></domain>";

    #[test]
    fn a_domain_s_disks_and_agent_are_read() {
        let found = Description::parse(LIVE).unwrap();
        assert_eq!(found.agent_connected, Some(true));
        let disk = &found.disks[0];
        assert_eq!((disk.target.as_str(), disk.index), ("vda", Some(4)));
        assert_eq!(disk.path.as_deref(), Some("/images/a.qcow2"));
        assert_eq!(disk.alias.as_deref(), Some("virtio-disk0"));
        assert!(found.disks[1].shareable);
        assert_eq!(found.disks[1].path.as_deref(), Some("/dev/vg/b"));
        assert!(found.disks[2].readonly);
        assert_eq!(found.disks[2].path, None);
        assert_eq!(found.disks[3].kind, "network");
        assert!(found.disks[4].encrypted && !found.disks[0].encrypted);
        assert_eq!(
            (found.memory, found.shares),
            (
                vec!["nvdimm1".to_owned(), "virtiopmem0".to_owned()],
                vec!["fs0".to_owned()]
            )
        );
        assert!(Description::parse("<domain><devices").is_err());
        let bare = Description::parse("<domain/>").unwrap();
        assert!(bare.disks.is_empty() && bare.agent_connected.is_none());
    }
}
