//! What the operator names: a VM, and which of its disks.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::exit::{Failure, Kind};
use crate::qmp::graph::Disk;
use crate::qmp::machine::{LeftOut, Machine};

/// A VM, as it is spelled on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A QEMU without libvirt, by its QMP socket.
    Qmp(PathBuf),
    /// An image of a VM that is off.
    Disk(Image),
    /// A name: of a libvirt domain, or of a target that a repository knows.
    Name(String),
}

/// An image of a VM that is off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The file or device.
    pub path: PathBuf,
    /// The disk that it is in the VM, so that it goes on from what was made while the VM ran.
    pub disk: Option<String>,
    /// Its format where somebody says so; else it is told from its beginning.
    pub format: Option<String>,
}

impl Image {
    /// The disk's key: as it was named, else the file's name without its ending.
    #[must_use]
    pub fn key(&self) -> String {
        let stem = || Some(self.path.file_stem()?.to_string_lossy().into_owned());
        self.disk
            .clone()
            .or_else(stem)
            .unwrap_or_else(|| "disk".to_owned())
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = |rest: &str| {
            if rest.is_empty() {
                return Err(format!("`{text}` names no path"));
            }
            std::path::absolute(rest).map_err(|error| format!("`{rest}`: {error}"))
        };
        if let Some(rest) = text.strip_prefix("qmp:") {
            Ok(Self::Qmp(path(rest)?))
        } else if let Some(rest) = text.strip_prefix("disk:") {
            // `disk:KEY=PATH`; a path with a `=` in its first part is told from it by a leading `./` or `/`.
            let (disk, rest) = match rest.split_once('=') {
                Some((key, rest)) if is_key(key) => (Some(key.to_owned()), rest),
                _ => (None, rest),
            };
            let path = path(rest)?;
            Ok(Self::Disk(Image {
                path,
                disk,
                format: None,
            }))
        } else if text.is_empty() {
            Err("an empty target".to_owned())
        } else {
            Ok(Self::Name(text.to_owned()))
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Qmp(path) => write!(f, "qmp:{}", path.display()),
            Self::Disk(Image { path, disk, .. }) => match disk {
                Some(disk) => write!(f, "disk:{disk}={}", path.display()),
                None => write!(f, "disk:{}", path.display()),
            },
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// The name of a target, also one that `@` and a time follow, as the repository writes it: the path of a `qmp:` or `disk:`
/// spelling is made absolute, as it was when the point was made.
pub fn absolute_name(text: &str) -> Result<String, String> {
    if !text.starts_with("qmp:") && !text.starts_with("disk:") {
        return Ok(text.to_owned());
    }
    text.parse::<Target>().map(|target| target.to_string())
}

/// The key of a target without a UUID: the name that it was given, else one made of this machine's id and the path.
pub fn key_without_uuid(path: &Path, given: Option<&str>) -> anyhow::Result<String> {
    if let Some(name) = given {
        return checked_key(name);
    }
    let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let digest = Sha256::new()
        .chain_update(machine.trim())
        .chain_update([0])
        .chain_update(path.as_os_str().as_encoded_bytes())
        .finalize();
    let hex = crate::qmp::names::hex(&digest[..8]);
    Ok(format!("path-{hex}"))
}

fn is_key(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !name.is_empty() && name.len() <= 100 && !name.starts_with('.') && name.chars().all(good)
}

/// A key is a directory's name: letters, digits, `.`, `_` and `-`.
fn checked_key(name: &str) -> anyhow::Result<String> {
    if !is_key(name) {
        let message = format!("`{name}` is no name for a target");
        return Err(Failure::hinted(
            Kind::Usage,
            message,
            "use letters, digits, `.`, `_` and `-`",
        ));
    }
    Ok(name.to_owned())
}

/// Which disks of a target.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// Only these, when there are any.
    pub include: Vec<String>,
    /// Not these.
    pub exclude: Vec<String>,
    /// Take what QEMU decrypts: plain text is allowed, or the repository is encrypted.
    pub allow_plaintext: bool,
}

/// The chosen disks, and what was left out with the reasons.
#[derive(Debug, Clone)]
pub struct Chosen {
    /// To be backed up.
    pub disks: Vec<Disk>,
    /// Not to be.
    pub left_out: Vec<LeftOut>,
}

impl Choice {
    fn wants(&self, name: &str) -> bool {
        (self.include.is_empty() || self.include.iter().any(|key| key == name))
            && !self.exclude.iter().any(|key| key == name)
    }

    /// Applies the choice to what was found. A device that may hold data and cannot be backed up must be excluded by
    /// name, or the command fails: it is never left out in silence.
    pub fn apply(&self, machine: &Machine) -> anyhow::Result<Chosen> {
        for name in self.include.iter().chain(&self.exclude) {
            let known = machine.disks.iter().any(|disk| &disk.key == name)
                || machine.left_out.iter().any(|left| &left.device == name);
            if !known {
                let keys: Vec<&str> = machine.disks.iter().map(|disk| disk.key.as_str()).collect();
                let message = format!("the VM has no disk `{name}`");
                let is_disk = |name: &str| machine.disks.iter().any(|disk| disk.key == name);
                if name.contains(',') && name.split(',').any(|part| is_disk(part.trim())) {
                    let option = if self.include.contains(name) {
                        "--include"
                    } else {
                        "--exclude"
                    };
                    let each = name
                        .split(',')
                        .map(|part| format!("{option} {}", part.trim()));
                    let each: Vec<String> = each.collect();
                    let hint = format!("repeat the option: `{}`", each.join(" "));
                    return Err(Failure::hinted(Kind::Usage, message, hint));
                }
                return Err(Failure::hinted(
                    Kind::Usage,
                    message,
                    format!("its disks are: {}", keys.join(", ")),
                ));
            }
        }
        if let Some(left) = machine
            .left_out
            .iter()
            .find(|left| left.refused && self.wants(&left.device))
        {
            let message = format!(
                "device `{}` cannot be backed up: {}",
                left.device, left.reason
            );
            let hint = format!("leave it out knowingly with `--exclude '{}'`", left.device);
            return Err(Failure::hinted(Kind::Attention, message, hint));
        }
        let mut left_out = machine.left_out.clone();
        let mut disks = Vec::new();
        for disk in &machine.disks {
            if !self.wants(&disk.key) {
                let reason = "not chosen".to_owned();
                left_out.push(LeftOut {
                    device: disk.key.clone(),
                    reason,
                    refused: false,
                });
            } else if disk.decrypted && !self.allow_plaintext {
                return Err(Failure::hinted(
                    Kind::Attention,
                    format!(
                        "disk `{}` is encrypted, and QEMU hands it out decrypted",
                        disk.key
                    ),
                    "back it up to an encrypted repository (`forerun init --encrypt`), store it as plain text with `--allow-plaintext`, or leave it out with `--exclude`",
                ));
            } else {
                disks.push(disk.clone());
            }
        }
        if disks.is_empty() {
            return Err(Failure::hinted(
                Kind::Attention,
                "the VM has no disk to back up",
                "`forerun inspect` lists its devices with the reasons",
            ));
        }
        Ok(Chosen { disks, left_out })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_read_as_it_is_spelled() {
        assert_eq!(
            "qmp:/run/vm.sock".parse(),
            Ok(Target::Qmp("/run/vm.sock".into()))
        );
        let image = |text: &str| match text.parse() {
            Ok(Target::Disk(image)) => (image.key(), image.path),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(image("disk:/a.qcow2"), ("a".to_owned(), "/a.qcow2".into()));
        assert_eq!(
            image("disk:vda=/a.qcow2"),
            ("vda".to_owned(), "/a.qcow2".into())
        );
        assert_eq!(
            image("disk:/b=/a=c.raw"),
            ("a=c".to_owned(), "/b=/a=c.raw".into())
        );
        assert!("disk:vda=".parse::<Target>().is_err());
        let spelled: Target = "disk:vda=/a.qcow2".parse().unwrap();
        assert_eq!(spelled.to_string(), "disk:vda=/a.qcow2");
        assert_eq!("web-1".parse(), Ok(Target::Name("web-1".into())));
        assert!("qmp:".parse::<Target>().is_err());
        assert_eq!(Target::Qmp("/x".into()).to_string(), "qmp:/x");
        let here = std::env::current_dir().unwrap();
        let there = format!("disk:vda={}/a.raw@latest", here.display());
        assert_eq!(absolute_name("disk:vda=a.raw@latest"), Ok(there));
        assert_eq!(absolute_name("web-1@latest"), Ok("web-1@latest".into()));
        assert!(absolute_name("qmp:").is_err());
    }

    #[test]
    fn a_name_that_would_leave_its_directory_is_refused() {
        for bad in ["..", ".x", "a/b", "", "a b"] {
            assert!(
                key_without_uuid(Path::new("/x"), Some(bad)).is_err(),
                "{bad}"
            );
        }
        assert_eq!(
            key_without_uuid(Path::new("/x"), Some("web-1")).unwrap(),
            "web-1"
        );
    }
}
