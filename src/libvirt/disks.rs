//! The disks of a domain under the names that its XML gives them. What libvirt and QEMU do not agree on is refused.

use super::xml::{Description, Disk};
use crate::qmp::machine::{LeftOut, Machine, PERSISTENT_MEMORY, SHARED};
use crate::target::Image;

/// Gives the disks of a running domain their target devs as keys. Says whether their nodes are those that the XML tells.
pub(super) fn name(machine: &mut Machine, xml: &Description) -> bool {
    let mut agreed = true;
    for left in &mut machine.left_out {
        let known = xml.disks.iter().find(|disk| {
            let alias = disk.alias.as_deref();
            alias.is_some_and(|alias| left.device.split('/').any(|part| part == alias))
        });
        if let Some(disk) = known {
            left.device.clone_from(&disk.target);
        }
    }
    for mut disk in std::mem::take(&mut machine.disks) {
        let described = xml
            .disks
            .iter()
            .find(|described| described.alias.as_deref() == Some(disk.key.as_str()));
        let refused = match described {
            None => Some("libvirt does not know of it".to_owned()),
            Some(described) => {
                disk.key.clone_from(&described.target);
                let unknown = unknown_node(described, &disk.node);
                agreed &= unknown.is_none();
                why_refused(described).or(unknown)
            }
        };
        match refused {
            None => machine.disks.push(disk),
            Some(reason) => machine.left_out.push(LeftOut {
                device: disk.key,
                reason,
                refused: true,
            }),
        }
    }
    machine.disks.sort_by(|a, b| a.key.cmp(&b.key));
    agreed
}

/// A node that is not of the number in the XML was put there behind libvirt's back: it would be forgotten at the next
/// start.
fn unknown_node(disk: &Disk, node: &str) -> Option<String> {
    let index = disk.index?;
    let known = node
        .strip_prefix("libvirt-")
        .and_then(|rest| rest.split('-').next())
        .is_some_and(|number| number.parse() == Ok(index));
    (!known).then(|| {
        format!(
            "its top node is `{node}`, but libvirt expects one of number {index}: somebody changed the chain without libvirt, or is changing it"
        )
    })
}

fn why_refused(disk: &Disk) -> Option<String> {
    let why = match (disk.device.as_str(), disk.shareable, disk.transient) {
        ("lun", ..) => "a `lun`: SCSI commands pass QEMU by",
        (_, true, _) => "`<shareable/>`: others may write to it, which no bitmap sees",
        (.., true) => "`<transient/>`: its writes are thrown away at the end",
        _ => return None,
    };
    Some(why.to_owned())
}

/// The images of a domain that is off.
pub(super) fn images(xml: &Description) -> (Vec<Image>, Vec<LeftOut>) {
    let mut images = Vec::new();
    let mut left_out = Vec::new();
    for disk in &xml.disks {
        let mut leave = |reason: String, refused| {
            left_out.push(LeftOut {
                device: disk.target.clone(),
                reason,
                refused,
            });
        };
        if matches!(disk.device.as_str(), "cdrom" | "floppy") {
            leave("removable medium".to_owned(), false);
        } else if disk.readonly {
            leave("read-only".to_owned(), false);
        } else if let Some(why) = why_refused(disk) {
            leave(why, true);
        } else if disk.encrypted {
            let why =
                "libvirt has the key of its encryption: it is opened only while the domain runs";
            leave(why.to_owned(), true);
        } else {
            match (disk.kind.as_str(), &disk.path, disk.format.as_deref()) {
                ("file" | "block", Some(path), Some("qcow2" | "raw")) => images.push(Image {
                    path: path.into(),
                    disk: Some(disk.target.clone()),
                    format: disk.format.clone(),
                }),
                ("file" | "block", Some(_), format) => leave(
                    format!(
                        "an image of format `{}` is not opened while the domain is off",
                        format.unwrap_or("unknown")
                    ),
                    true,
                ),
                (kind, ..) => leave(
                    format!("a source of type `{kind}` is not opened while the domain is off"),
                    true,
                ),
            }
        }
    }
    let others = [
        (&xml.memory, PERSISTENT_MEMORY, true),
        (&xml.shares, SHARED, false),
    ];
    for (devices, reason, refused) in others {
        left_out.extend(devices.iter().map(|device| LeftOut {
            device: device.clone(),
            reason: reason.to_owned(),
            refused,
        }));
    }
    (images, left_out)
}

#[cfg(test)]
mod tests {
    use super::super::xml::tests::LIVE;
    use super::*;

    #[test]
    fn a_domain_that_is_off_gives_the_images_that_can_be_opened() {
        let (images, left) = images(&Description::parse(LIVE).unwrap());
        assert_eq!(images.len(), 1);
        assert_eq!(images[0].key(), "vda");
        assert_eq!(images[0].format.as_deref(), Some("qcow2"));
        let left: Vec<(&str, bool)> = left
            .iter()
            .map(|left| (left.device.as_str(), left.refused))
            .collect();
        assert_eq!(
            left,
            [
                ("sda", true),
                ("sdb", false),
                ("vdc", true),
                ("vdd", true),
                ("nvdimm1", true),
                ("virtiopmem0", true),
                ("fs0", false)
            ]
        );
    }

    #[test]
    fn a_node_that_libvirt_does_not_know_is_refused() {
        let disk = Disk {
            index: Some(4),
            ..Disk::default()
        };
        assert_eq!(unknown_node(&disk, "libvirt-4-format"), None);
        assert_eq!(unknown_node(&disk, "libvirt-4-storage"), None);
        assert!(unknown_node(&disk, "libvirt-41-format").is_some());
        assert!(unknown_node(&disk, "overlay").is_some());
    }
}
