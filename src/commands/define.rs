//! `restore --define`: the domain of a point, defined over its restored disks.
//!
//! All that could go wrong is looked at before a byte is written; the domain is defined when all files are in place, and its
//! XML lies beside them, so that a definition that libvirt does not take can be corrected by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::restore::plain_name;
use crate::backup::checksum;
use crate::cli::RestoreArgs;
use crate::exit::{Failure, Kind};
use crate::image::{self, HostFile, Manifest, Repository};
use crate::libvirt::definition::{Image, Plan, tpm_home};
use crate::libvirt::{self, Domain};
use crate::owner;
use crate::report::Outcome;
use crate::restore::{self, Task};

/// The name of the adjusted XML beside the disks.
const XML: &str = "domain.xml";

/// A domain that is to be defined.
pub(super) struct Planned {
    uri: String,
    name: String,
    uuid: String,
    xml: String,
    /// Where the restored files are, absolute.
    directory: PathBuf,
    /// Where the TPM's state goes, when the point has some.
    tpm: Option<PathBuf>,
    tpm_owner: Option<String>,
    autostart: bool,
    notes: Vec<String>,
    own: BTreeSet<String>,
}

/// Plans the domain of a point over restored disks.
pub(super) fn plan(
    args: &RestoreArgs,
    repo: &Repository,
    point: &Manifest,
    tasks: &[Task],
) -> Result<Planned> {
    let output = args.output.as_deref().context("no output directory")?;
    let directory = std::path::absolute(output).context("the output directory")?;
    let definition = point
        .files()
        .find(|(_, file)| file.role == image::DEFINITION);
    let Some((definition, _)) = definition else {
        return Err(Failure::hinted(
            Kind::Usage,
            format!("point {} holds no definition of a domain", point.id),
            "restore its disks without `--define`",
        ));
    };
    let text = restore::read_small(repo, definition).context("read the domain's definition")?;
    let text = String::from_utf8(text).context("the domain's definition is no text")?;
    let (old_name, old_uuid) = libvirt::identity(&text)?;
    let uri = libvirt::uri(args.connect.as_deref())?;
    let name = args.name.clone().unwrap_or(old_name);
    refuse_unfit(&name)?;
    refuse_taken(
        args,
        &uri,
        &name,
        "name the restored one with `--name NAME`, or undefine that one",
    )?;
    let uuid = if args.same_identity {
        let hint = "undefine it first, or restore without `--same-identity`";
        refuse_taken(args, &uri, &old_uuid, hint)?;
        old_uuid
    } else {
        new_uuid()
    };
    let mut disks = BTreeMap::new();
    for task in tasks {
        let device = std::fs::metadata(&task.path);
        let image = Image {
            path: std::path::absolute(&task.path).context("a disk's path")?,
            qcow2: task.qcow2,
            device: device.is_ok_and(|meta| meta.file_type().is_block_device()),
        };
        disks.insert(task.disk.key.clone(), image);
    }
    let mut files = BTreeMap::new();
    let (mut tpm, mut tpm_owner) = (None, None);
    for (_, file) in point.files() {
        let path = directory.join(plain_name(&file.name)?);
        if file.role == image::TPM {
            let was = file.path.as_deref().map(Path::new);
            let version = was.and_then(Path::parent).and_then(Path::file_name);
            // The version's directory, whatever the place was called.
            let version = match version {
                Some(version) if version == "tpm1.2" => "tpm1.2",
                _ => "tpm2",
            };
            tpm = Some(tpm_home(&uri).join(&uuid).join(version));
            tpm_owner.clone_from(&file.owner);
        } else {
            files.insert(file.role.clone(), path);
        }
    }
    let made = libvirt::redefine(
        &text,
        &Plan {
            name: &name,
            uuid: (!args.same_identity).then_some(&uuid),
            disks: &disks,
            files: &files,
            exists: &|path| path.exists(),
        },
    )?;
    let mut notes = made.notes;
    notes.extend(made.unknown.iter().map(|disk| not_attached(disk)));
    let known = point.machine.get("domain").unwrap_or(&Value::Null);
    notes.extend(firmware(known));
    if known["without_secrets"] == true {
        notes.push(
            "the definition is without its passwords (of VNC or SPICE): the repository is not encrypted".to_owned(),
        );
    }
    let xml_file = directory.join(XML);
    if xml_file.exists() && !args.force {
        return Err(Failure::hinted(
            Kind::Failed,
            format!("{} exists already", xml_file.display()),
            "overwrite it knowingly with `--force`",
        ));
    }
    Ok(Planned {
        uri,
        name,
        uuid,
        xml: made.xml,
        directory,
        tpm,
        tpm_owner,
        autostart: known["autostart"] == true,
        notes,
        own: made.own,
    })
}

fn not_attached(disk: &str) -> String {
    format!(
        "disk {disk} is restored, but the domain's definition has none of that name: it is not attached"
    )
}

/// What libvirt would refuse only when all is restored.
fn refuse_unfit(name: &str) -> Result<()> {
    if name.trim().is_empty() || name.contains('/') || name.contains(char::is_control) {
        return Err(Failure::hinted(
            Kind::Usage,
            format!("libvirt takes no domain of the name {name:?}"),
            "give another one with `--name NAME`",
        ));
    }
    Ok(())
}

fn refuse_taken(args: &RestoreArgs, uri: &str, name: &str, hint: &str) -> Result<()> {
    match Domain::find(args.connect.as_deref(), name) {
        Err(crate::qmp::Error::NoDomain { .. }) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(found) => Err(Failure::hinted(
            Kind::Failed,
            format!(
                "libvirt ({uri}) has a domain `{}` ({}) already",
                found.name(),
                found.uuid()
            ),
            hint,
        )),
    }
}

/// A random UUID (version 4).
fn new_uuid() -> String {
    let mut hex = crate::qmp::names::random_hex(16);
    hex.replace_range(12..13, "4");
    let variant = u8::from_str_radix(&hex[16..17], 16).unwrap_or(0) & 3 | 8;
    hex.replace_range(16..17, &format!("{variant:x}"));
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

/// The firmware is the host's, not the point's.
fn firmware(known: &Value) -> Option<String> {
    let path = known.pointer("/loader/path")?.as_str()?;
    match checksum(Path::new(path)) {
        Err(error) => Some(format!(
            "its firmware {path} cannot be read on this host ({error}): install it before the domain is started"
        )),
        Ok((_, sha256)) if known.pointer("/loader/sha256")? != sha256.as_str() => Some(format!(
            "its firmware {path} is another version than at the backup"
        )),
        Ok(_) => None,
    }
}

impl Planned {
    /// Where a file of the point goes; `None` when it goes nowhere.
    pub(super) fn place(&self, file: &HostFile) -> Option<PathBuf> {
        match file.role.as_str() {
            image::DEFINITION | image::LIVE_DEFINITION => None,
            image::TPM => self.tpm.as_ref().map(|tpm| tpm.join(&file.name)),
            _ => Some(self.directory.join(&file.name)),
        }
    }

    /// Makes the directories that libvirt would make at the domain's first start.
    pub(super) fn make_directories(&self) -> Result<()> {
        let Some(tpm) = &self.tpm else { return Ok(()) };
        let make = |path: &Path, mode| {
            let made = std::fs::DirBuilder::new()
                .recursive(true)
                .mode(mode)
                .create(path);
            made.with_context(|| format!("create {}", path.display()))
        };
        if let Some(parent) = tpm.parent() {
            make(parent, 0o711)?;
        }
        make(tpm, 0o700)
    }

    /// Defines the domain over its restored files.
    pub(super) fn define(
        self,
        args: &RestoreArgs,
        tasks: &[Task],
        outcome: &mut Outcome,
    ) -> Result<()> {
        let xml = self.directory.join(XML);
        restore::write_small(&xml, self.xml.as_bytes(), args.force)?;
        outcome.warnings.extend(self.notes);
        if let (Some(tpm), Some(owner)) = (&self.tpm, &self.tpm_owner) {
            let files = tasks.iter().map(|task| task.path.as_path());
            for path in files
                .filter(|path| path.starts_with(tpm))
                .chain([tpm.as_path()])
            {
                if let Err(error) = owner::give(path, owner) {
                    outcome.warnings.push(format!(
                        "the state of the TPM: {error:#}; it must be the user's that runs swtpm"
                    ));
                }
            }
        }
        let places = tasks.iter().map(|task| &task.path);
        let places =
            places.filter(|path| self.tpm.as_ref().is_none_or(|tpm| !path.starts_with(tpm)));
        if !self.uri.contains(":///session")
            && let Some(closed) = impassable(places)?
        {
            outcome.warnings.push(format!(
                "QEMU's user may not pass through {0}, and then the domain does not start: `chmod o+x {0}`",
                closed.display()
            ));
        }
        let shown = xml.display();
        let defined = match Domain::define(args.connect.as_deref(), &self.xml) {
            Ok(domain) => {
                outcome.line(format!(
                    "domain {} ({}) is defined as {shown} says",
                    domain.name(),
                    domain.uuid()
                ));
                for path in &self.own {
                    outcome.line(format!("  {path}"));
                }
                if self.autostart {
                    outcome.line(format!(
                        "  it was started with the host: `virsh autostart {}`",
                        domain.name()
                    ));
                }
                true
            }
            Err(error) => {
                outcome.errors.push(Failure::hinted(
                    Kind::Failed,
                    format!("all is restored, but libvirt does not take the domain: {error}"),
                    format!(
                        "correct the cause or the file, then run `virsh --connect '{}' define {shown}`",
                        self.uri
                    ),
                ));
                false
            }
        };
        outcome.more.insert(
            "domain".to_owned(),
            json!({
                "name": self.name, "uuid": self.uuid, "uri": self.uri, "xml": xml,
                "defined": defined,
            }),
        );
        Ok(())
    }
}

/// The first directory on the way to one of these files that others than its owner may not pass through.
fn impassable<'a>(files: impl Iterator<Item = &'a PathBuf>) -> Result<Option<PathBuf>> {
    for file in files {
        let whole = std::path::absolute(file).context("a restored file's path")?;
        let mut above: Vec<&Path> = whole.ancestors().skip(1).collect();
        above.reverse();
        for directory in above {
            let meta = std::fs::metadata(directory);
            if meta.is_ok_and(|meta| meta.permissions().mode() & 0o001 == 0) {
                return Ok(Some(directory.to_owned()));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_uuid_is_one() {
        let (one, other) = (new_uuid(), new_uuid());
        assert_ne!(one, other);
        assert_eq!(one.len(), 36);
        assert_eq!(&one[14..15], "4");
        assert!("89ab".contains(&one[19..20]), "{one}");
    }

    #[test]
    fn a_name_that_libvirt_would_refuse_is_refused_before() {
        for bad in ["", " ", "a/b", "../a", "a\nb", "a\u{1b}[31m"] {
            assert!(refuse_unfit(bad).is_err(), "{bad:?}");
        }
        for good in ["web-1", "a b&<\"'>", "-x", "ünï"] {
            assert!(refuse_unfit(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_directory_that_is_closed_to_others_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let (open, file) = (
            directory.path().join("open"),
            directory.path().join("open/file"),
        );
        std::fs::create_dir(&open).unwrap();
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        };
        mode(directory.path(), 0o711);
        mode(&open, 0o710);
        assert_eq!(impassable([&file].into_iter()).unwrap(), Some(open.clone()));
        mode(&open, 0o711);
        assert_eq!(impassable([&file].into_iter()).unwrap(), None);
    }
}
