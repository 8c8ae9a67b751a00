//! What a domain is besides its disks, and what it is to become when it is restored: plain values, with libvirt or without.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A domain's definition and the files of the host that it names.
#[derive(Debug, Clone)]
pub struct Definition {
    /// The hypervisor that it is defined at.
    pub uri: String,
    /// As it runs; `None` when it is off.
    pub live: Option<String>,
    /// As it starts next time.
    pub inactive: String,
    /// It stays defined when it ends.
    pub persistent: bool,
    /// libvirt starts it with the host.
    pub autostart: bool,
    /// Passwords were asked not to be there, and there are some.
    pub without_secrets: bool,
    /// What it names.
    pub parts: Parts,
}

/// The files of the host that belong to a domain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parts {
    /// The firmware's code, which many domains share.
    pub loader: Option<PathBuf>,
    /// Its variables.
    pub nvram: Option<PathBuf>,
    /// By element of `<os>`: `kernel`, `initrd`, `dtb`, `shim`.
    pub boot: Vec<(String, PathBuf)>,
    /// The directories that may have an emulated TPM's state; the first that is there counts.
    pub tpm: Vec<PathBuf>,
    /// What cannot be held, in words.
    pub beyond: Vec<String>,
}

/// What a definition is made into.
pub struct Plan<'a> {
    /// The domain's new name.
    pub name: &'a str,
    /// Its new UUID, and with it new addresses of its interfaces; `None`: it stays who it was.
    pub uuid: Option<&'a str>,
    /// Where its disks are now, by target.
    pub disks: &'a BTreeMap<String, Image>,
    /// Where its files are now, by element of `<os>`: `nvram`, `kernel`...
    pub files: &'a BTreeMap<String, PathBuf>,
    /// Whether there is a file or device.
    pub exists: &'a dyn Fn(&Path) -> bool,
}

/// A restored disk.
#[derive(Debug, Clone)]
pub struct Image {
    /// The file or device.
    pub path: PathBuf,
    /// As qcow2, else raw.
    pub qcow2: bool,
    /// It is a block device.
    pub device: bool,
}

/// A definition that was made into another.
#[derive(Debug, Clone)]
pub struct Redefined {
    /// The domain's XML.
    pub xml: String,
    /// What is not as it was, in words.
    pub notes: Vec<String>,
    /// Paths of its own that it has in place of the original's, in words.
    pub own: BTreeSet<String>,
    /// Disks that have no place in it.
    pub unknown: Vec<String>,
}

/// Where libvirt has the state of emulated TPMs, a directory for each UUID.
#[must_use]
pub fn tpm_home(uri: &str) -> PathBuf {
    let session = uri
        .split_once("://")
        .is_some_and(|(_, rest)| rest.starts_with("/session"));
    if !session {
        return PathBuf::from("/var/lib/libvirt/swtpm");
    }
    let own = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
    let own = own.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".config")));
    own.unwrap_or_default().join("libvirt/qemu/swtpm")
}
