//! What a domain of a restore is: as another VM and as the same; see [`super`].
use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;

const OLD: &str = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0";
const NEW: &str = "0b0f7a1c-58e5-4c26-9a7e-6f1f6b1f9d3e";

/// As libvirt 11 prints a UEFI guest with a TPM, all kinds of disks, and an operator's own metadata.
const WINDOWS: &str = "<domain type='kvm' xmlns:qemu='urn:as-libvirt-s-own'>
  <name>win &amp; more</name>
  <uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid>
  <genid>e9392370-2917-565e-692b-d057f46512d6</genid>
  <title>keep &lt;this&gt;</title>
  <metadata>
<app:it xmlns:app='urn:an-operator-s'><name>not the domain's</name><uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid></app:it>
  </metadata>
  <memory unit='KiB'>8388608</memory>
  <iothreads>2</iothreads>
  <sysinfo type='smbios'>
<system><entry name='manufacturer'>Fabrikam</entry><entry name='uuid'>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</entry></system>
  </sysinfo>
  <os firmware='efi'>
<type arch='x86_64' machine='pc-q35-10.0'>hvm</type>
<firmware><feature enabled='yes' name='secure-boot'/></firmware>
<loader readonly='yes' secure='yes' type='pflash' format='raw'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader>
<nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd' templateFormat='raw' format='raw'>/var/lib/libvirt/qemu/nvram/win_VARS.fd</nvram>
<smbios mode='sysinfo'/>
  </os>
  <devices>
<emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='block' device='disk'>
  <driver name='qemu' type='raw' cache='none' io='native' iothread='1'/>
  <source dev='/dev/vg/win'/>
  <backingStore/>
  <target dev='vda' bus='virtio'/>
  <boot order='1'/>
  <serial>SER-VDA</serial>
  <alias name='ua-system'/>
  <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
</disk>
<disk type='network' device='disk'>
  <driver name='qemu' type='qcow2' discard='unmap' discard_no_unref='on'><metadata_cache><max_size unit='bytes'>1048576</max_size></metadata_cache></driver>
  <auth username='admin'><secret type='ceph' uuid='4dea22b3-1d52-d8f3-2516-782e98ab3fa0'/></auth>
  <source protocol='rbd' name='pool/image' index='3'><host name='mon1' port='6789'/></source>
  <target dev='vdb' bus='virtio'/>
  <alias name='virtio-disk1'/>
</disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/images/refused.raw'/><target dev='sdc' bus='scsi'/><shareable/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/images/tools.raw'/><target dev='sdd' bus='scsi'/><readonly/></disk>
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='/iso/there.iso' index='1'/><target dev='sda' bus='sata'/><readonly/></disk>
<disk type='file' device='cdrom'>
  <driver name='qemu' type='raw'/>
  <source file='/iso/gone.iso' startupPolicy='optional'/>
  <target dev='sdb' bus='sata'/>
  <readonly/>
</disk>
<disk type='file' device='cdrom'><target dev='sde' bus='sata'/><readonly/></disk>
<controller type='pci' index='0' model='pcie-root'><alias name='pcie.0'/></controller>
<interface type='network'><mac address='52:54:00:11:22:33'/><source network='default'/><model type='virtio'/></interface>
<interface type='bridge'>
  <mac address='52:54:00:44:55:66'/>
  <source bridge='ovs'/>
  <virtualport type='openvswitch'><parameters interfaceid='4dea22b3-1d52-d8f3-2516-782e98ab3fa1' profileid='p'/></virtualport>
</interface>
<channel type='unix'><source mode='bind' path='/var/lib/libvirt/qemu/channel/target/domain-3-win/org.qemu.guest_agent.0'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<channel type='unix'><source mode='bind' path='/run/own.sock'/><target type='virtio' name='own'/></channel>
<serial type='file'><source path='/log/serial' append='on'/><target port='0'/></serial>
<console type='file'><source path='/log/serial' append='on'/><target type='serial' port='0'/></console>
<serial type='pty'><log file='/log/pty' append='on'/><target port='1'/></serial>
<serial type='dev'><source path='/dev/ttyS0'/><target port='2'/></serial>
<serial type='file'><source path='/dev/null'/><target port='3'/></serial>
<memory model='nvdimm'><source><path>/pm/win</path></source><target><size unit='KiB'>524288</size></target></memory>
<memory model='dimm'><target><size unit='KiB'>524288</size></target></memory>
<graphics type='spice'><listen type='socket' socket='/run/spice.sock'/></graphics>
<tpm model='tpm-crb'><backend type='emulator' version='2.0'><source type='dir' path='/srv/tpm/win'/></backend></tpm>
<graphics type='vnc' port='-1' autoport='yes' passwd='it&apos;s'/>
<hostdev mode='subsystem' type='pci' managed='yes'><source><address domain='0x0000' bus='0x06' slot='0x02' function='0x0'/></source></hostdev>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+64055</label><imagelabel>+64055:+64055</imagelabel></seclabel>
  <qemu:commandline><qemu:arg value='-name'/></qemu:commandline>
</domain>
";

fn image(path: &str, qcow2: bool, device: bool) -> Image {
    let path = path.into();
    Image {
        path,
        qcow2,
        device,
    }
}

fn made(
    xml: &str,
    uuid: Option<&str>,
    disks: &[(&str, Image)],
    files: &[(&str, &str)],
) -> Redefined {
    let disks: BTreeMap<String, Image> = disks
        .iter()
        .map(|(dev, image)| ((*dev).to_owned(), image.clone()))
        .collect();
    let files: BTreeMap<String, PathBuf> = files
        .iter()
        .map(|(role, path)| ((*role).to_owned(), PathBuf::from(path)))
        .collect();
    let plan = Plan {
        name: "it's <new>",
        uuid,
        disks: &disks,
        files: &files,
        exists: &|path| {
            ["/iso/there.iso", "/images/tools.raw"]
                .iter()
                .any(|there| Path::new(there) == path)
        },
    };
    redefine(xml, &plan).unwrap()
}

/// The `<disk>` of a target.
fn disk<'a, 'i>(document: &'a Document<'i>, dev: &str) -> Option<Node<'a, 'i>> {
    document.descendants().find(|node| {
        node.has_tag_name("disk")
            && child(*node, "target").and_then(|target| target.attribute("dev")) == Some(dev)
    })
}

fn windows(uuid: Option<&str>) -> Redefined {
    let disks = [
        ("vda", image("/srv/it's/vda.qcow2", true, false)),
        ("vdb", image("/dev/vg/b", false, true)),
        ("vdz", image("/srv/vdz.raw", false, false)),
    ];
    made(WINDOWS, uuid, &disks, &[("nvram", "/srv/new/nvram")])
}

#[test]
fn a_copy_is_somebody_else_with_disks_of_its_own() {
    let made = windows(Some(NEW));
    let document = Document::parse(&made.xml).unwrap();
    let root = document.root_element();
    let (name, uuid) = identity(&made.xml).unwrap();
    assert_eq!((name.as_str(), uuid.as_str()), ("it's <new>", NEW));
    assert_eq!(made.unknown, ["vdz"]);

    // Whoever asks for its UUID is told one; what the operator's own metadata says is nobody's business.
    assert!(
        made.xml
            .contains(&format!("<entry name='uuid'>{NEW}</entry>"))
    );
    assert!(
        made.xml
            .contains(&format!("<name>not the domain's</name><uuid>{OLD}</uuid>"))
    );
    assert!(made.xml.contains("<title>keep &lt;this&gt;</title>"));
    assert!(made.xml.contains("<genid/>"));

    let vda = disk(&document, "vda").unwrap();
    assert_eq!(vda.attribute("type"), Some("file"));
    let source = child(vda, "source").unwrap();
    assert_eq!(source.attribute("file"), Some("/srv/it's/vda.qcow2"));
    assert_eq!(source.attribute("dev"), None);
    let driver = child(vda, "driver").unwrap();
    assert_eq!(driver.attribute("type"), Some("qcow2"));
    assert_eq!(driver.attribute("iothread"), Some("1"));
    for kept in ["boot", "serial", "address", "alias"] {
        assert!(child(vda, kept).is_some(), "{kept}");
    }
    assert!(child(vda, "backingStore").is_none());

    let vdb = disk(&document, "vdb").unwrap();
    assert_eq!(vdb.attribute("type"), Some("block"));
    assert_eq!(
        child(vdb, "source").unwrap().attribute("dev"),
        Some("/dev/vg/b")
    );
    assert!(child(vdb, "auth").is_none() && child(vdb, "alias").is_none());
    let driver = child(vdb, "driver").unwrap();
    assert_eq!(driver.attribute("discard_no_unref"), None);
    assert!(child(driver, "metadata_cache").is_none());
    assert_eq!(driver.attribute("type"), Some("raw"));

    assert!(disk(&document, "sdc").is_none());
    assert!(child(disk(&document, "sdd").unwrap(), "source").is_some());
    let there = child(disk(&document, "sda").unwrap(), "source").unwrap();
    assert_eq!(there.attribute("file"), Some("/iso/there.iso"));
    assert_eq!(there.attribute("index"), None);
    assert!(child(disk(&document, "sdb").unwrap(), "source").is_none());
    assert!(disk(&document, "sde").is_some());

    assert!(!document.descendants().any(|node| node.has_tag_name("mac")));
    assert!(made.xml.contains("<parameters profileid='p'/>"));
    assert!(!made.xml.contains("org.qemu.guest_agent.0'/><target"));
    // Nothing that the original, which runs beside it, has open.
    let own = "it&apos;s &lt;new&gt;";
    for (path, times) in [
        ("path='/run/own.sock", 1),
        ("path='/log/serial", 2),
        ("file='/log/pty", 1),
        ("socket='/run/spice.sock", 1),
    ] {
        let there = made.xml.matches(&format!("{path}.{own}'")).count();
        assert_eq!(
            (there, made.xml.matches(path).count()),
            (times, times),
            "{path}"
        );
    }
    let name = "it's <new>";
    let told = [
        format!("its channel is /run/own.sock.{name}"),
        format!("its serial is /log/pty.{name}"),
        format!("its serial is /log/serial.{name}"),
        format!("its spice is /run/spice.sock.{name}"),
    ];
    assert!(made.own.iter().eq(&told), "{:?}", made.own);
    assert!(made.xml.contains("path='/dev/null'"), "{}", made.xml);
    assert!(!made.xml.contains("/pm/win"), "{}", made.xml);
    assert!(made.xml.contains("<memory model='dimm'>"), "{}", made.xml);
    assert!(
        made.xml
            .contains("<backend type='emulator' version='2.0'></backend>")
    );
    assert!(made.xml.contains(">/srv/new/nvram</nvram>"));
    assert!(
        made.xml
            .contains("<seclabel type='dynamic' model='dac' relabel='yes'></seclabel>")
    );
    assert!(made.xml.contains("passwd='it&apos;s'"));
    assert!(child(root, "os").is_some_and(|os| child(os, "loader").is_some()));

    for (part, times) in [
        ("sdc", 1),
        ("sdb is empty", 1),
        ("hostdev", 1),
        ("/dev/ttyS0", 1),
        ("persistent memory", 1),
        ("sdd", 0),
        ("sda", 0),
        ("nvram", 0),
    ] {
        let found = made.notes.iter().filter(|note| note.contains(part)).count();
        assert_eq!(found, times, "{part}: {:?}", made.notes);
    }
}

#[test]
fn the_same_identity_stays() {
    let made = windows(None);
    assert_eq!(identity(&made.xml).unwrap().1, OLD);
    for kept in [
        "52:54:00:11:22:33",
        "52:54:00:44:55:66",
        "782e98ab3fa1",
        "'/run/own.sock'",
        "'/log/serial'",
        "'/log/pty'",
        "'/run/spice.sock'",
        "/pm/win",
    ] {
        assert!(made.xml.contains(kept), "{kept}");
    }
    assert!(
        made.xml
            .contains(&format!("<entry name='uuid'>{OLD}</entry>"))
    );
    // Where it was in its history is another matter.
    assert!(made.xml.contains("<genid/>"));
}

#[test]
fn variables_that_are_not_held_are_made_anew_and_never_the_original_s() {
    let made = made(WINDOWS, Some(NEW), &[], &[]);
    assert!(!made.xml.contains("win_VARS.fd"), "{}", made.xml);
    assert!(made.xml.contains(
        "<nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd' templateFormat='raw' format='raw'/>"
    ));
    assert!(made.notes.iter().any(|note| note.contains("nvram")));
    let document = Document::parse(&made.xml).unwrap();
    assert!(disk(&document, "vda").is_none());
    let other =
        "<domain><name>a</name><uuid>b</uuid><os><nvram type='file'><source file='/x'/></nvram>
        <kernel>/boot/k</kernel><initrd>/boot/i</initrd></os></domain>";
    let files = [("nvram", "/n"), ("kernel", "/srv/kernel")];
    let made = self::made(other, None, &[], &files);
    assert!(made.xml.contains("<nvram>/n</nvram>"));
    assert!(
        made.xml
            .contains("<kernel>/srv/kernel</kernel><initrd>/boot/i</initrd>")
    );
    assert_eq!(made.notes, ["its initrd /boot/i is not there"]);
}

#[test]
fn the_files_of_a_domain_are_found() {
    let found = parts(WINDOWS, "qemu:///system").unwrap();
    assert_eq!(
        found.loader,
        Some("/usr/share/OVMF/OVMF_CODE_4M.ms.fd".into())
    );
    assert_eq!(
        found.nvram,
        Some("/var/lib/libvirt/qemu/nvram/win_VARS.fd".into())
    );
    assert_eq!(found.tpm, [PathBuf::from("/srv/tpm/win")]);
    assert!(found.boot.is_empty() && found.beyond.is_empty());
    let other = "<domain><name>a</name><uuid>b</uuid><os><nvram type='file'><source file='/x'/></nvram>
        <kernel>/boot/k</kernel><dtb> /boot/d </dtb></os><devices><tpm model='tpm-tis'><backend type='emulator'/></tpm>
        <tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>
        <tpm><backend type='external'><source type='unix' path='/run/tpm'/></backend></tpm></devices></domain>";
    let found = parts(other, "qemu:///system").unwrap();
    assert_eq!(found.nvram, Some("/x".into()));
    let boot = [
        ("kernel".to_owned(), "/boot/k".into()),
        ("dtb".to_owned(), "/boot/d".into()),
    ];
    assert_eq!(found.boot, boot);
    assert_eq!(found.tpm[0], PathBuf::from("/var/lib/libvirt/swtpm/b/tpm2"));
    assert_eq!(found.beyond.len(), 1);
}
