//! What a point holds of a domain besides its disks: its definition, and the files of the host that it names.
//!
//! ```text
//! before the freeze    the definition; what the domain boots from is opened, its firmware hashed
//! right after the cut  the firmware's variables and the TPM's state, read into memory: small, and gone on from by the guest
//! after the release    all of it into the repository, each file as if it were a disk
//! ```
//!
//! Variables and TPM state are each as they were a moment after the disks' instant, not at it: QEMU and swtpm write them by
//! themselves. What cannot be read is a warning: the disks are worth a point without it.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::ops::{ControlFlow, Deref};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{CONDEMNED_TRIES, Runner, is_condemned};
use crate::bitmap::track::Tracked;
use crate::clock;
use crate::copy::{self, CopyDisk, Manner, Piece};
use crate::image::{self, DiskPoint, HostFile, MapReader};
use crate::libvirt::Domain;
use crate::libvirt::definition::Definition;
use crate::owner;
use crate::session::{Read, base_map};
use crate::units::Extent;

/// What is read at the freeze is at most so long; libvirt's own are a few hundred KiB.
const SMALL: u64 = 32 << 20;
/// How often a file is read until it is twice the same.
const READS: u32 = 4;
/// The largest piece that is handed on at once: whole blocks.
const PIECE: u64 = 1 << 20;
/// What keys of files begin with; no disk is called so.
const KEY: &str = "file:";

/// What is to be held of a domain.
pub(in crate::backup) struct Configuration {
    record: Value,
    files: Vec<Held>,
    /// Read at the freeze.
    nvram: Option<PathBuf>,
    tpm: Vec<PathBuf>,
    running: bool,
    warnings: Vec<String>,
}

struct Held {
    file: HostFile,
    content: Content,
}

enum Content {
    Bytes(Vec<u8>),
    Open(File, u64),
}

impl Held {
    fn size(&self) -> u64 {
        match &self.content {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Open(_, size) => *size,
        }
    }

    fn key(&self) -> String {
        format!("{KEY}{}", self.file.name)
    }

    fn read(&self, extent: Extent) -> std::io::Result<Vec<u8>> {
        let length = usize::try_from(extent.length).map_err(std::io::Error::other)?;
        let mut data = vec![0; length];
        match &self.content {
            Content::Open(file, _) => file.read_exact_at(&mut data, extent.offset)?,
            Content::Bytes(bytes) => {
                let start = usize::try_from(extent.offset).map_err(std::io::Error::other)?;
                let part = bytes.get(start..start + length);
                data.copy_from_slice(part.ok_or(ErrorKind::UnexpectedEof)?);
            }
        }
        Ok(data)
    }
}

impl Configuration {
    /// What a domain's definition says. Passwords of its consoles go into encrypted repositories only.
    fn of(domain: &Domain, encrypted: bool) -> Result<Self> {
        let definition = domain.definition(encrypted)?;
        let Definition {
            uri,
            live,
            inactive,
            persistent,
            autostart,
            without_secrets,
            parts,
        } = definition;
        let mut found = Self {
            record: json!({
                "uri": uri, "persistent": persistent, "autostart": autostart,
                "without_secrets": without_secrets, "loader": null, "taken": null,
            }),
            files: Vec::new(),
            nvram: parts.nvram,
            tpm: parts.tpm,
            running: live.is_some(),
            warnings: Vec::new(),
        };
        if without_secrets {
            found.warnings.push(
                "the domain's definition is held without its passwords (of VNC or SPICE): an encrypted repository holds them, too"
                    .to_owned(),
            );
        }
        let texts = [
            (image::DEFINITION, "domain.xml", Some(inactive)),
            (image::LIVE_DEFINITION, "domain-live.xml", live),
        ];
        for (role, name, text) in texts {
            if let Some(text) = text {
                found.hold(role, name, None, None, Content::Bytes(text.into_bytes()));
            }
        }
        for what in parts.beyond {
            found.warnings.push(format!("the point is without {what}"));
        }
        if let Some(loader) = parts.loader {
            match checksum(&loader) {
                Ok((size, sha256)) => {
                    found.record["loader"] =
                        json!({ "path": loader, "size": size, "sha256": sha256 });
                }
                Err(error) => found.warn(&loader, "the checksum of its firmware", &error),
            }
        }
        for (name, path) in parts.boot {
            match open(&path) {
                Ok((file, size, owner)) => {
                    found.hold(&name, &name, Some(&path), owner, Content::Open(file, size));
                }
                Err(error) => found.warn(&path, &format!("its {name}"), &error),
            }
        }
        Ok(found)
    }

    fn hold(
        &mut self,
        role: &str,
        name: &str,
        path: Option<&Path>,
        owner: Option<String>,
        content: Content,
    ) {
        let file = HostFile {
            role: role.to_owned(),
            name: name.to_owned(),
            path: path.map(|path| path.display().to_string()),
            owner,
        };
        let held = Held { file, content };
        // A file of no bytes says nothing.
        if held.size() > 0 {
            self.files.push(held);
        }
    }

    fn warn(&mut self, path: &Path, what: &str, error: &dyn std::fmt::Display) {
        self.warnings.push(format!(
            "the point is without {what} {}: {error}",
            path.display()
        ));
    }

    /// Reads what the VM goes on changing. The guest's snapshot is held meanwhile.
    pub(in crate::backup) fn take(&mut self) {
        if let Some(path) = self.nvram.take() {
            match read_steady(&path) {
                Ok((bytes, owner)) => {
                    let content = Content::Bytes(bytes);
                    self.hold(image::NVRAM, "nvram", Some(&path), owner, content);
                }
                // libvirt makes it at the first start.
                Err(error) if error.kind() == ErrorKind::NotFound && !self.running => {}
                Err(error) => self.warn(&path, "the firmware's variables", &error),
            }
        }
        let mut missing = None;
        for directory in std::mem::take(&mut self.tpm) {
            match std::fs::read_dir(&directory) {
                Ok(entries) => {
                    missing = None;
                    for entry in entries.flatten() {
                        self.take_tpm(&entry.path());
                    }
                    break;
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    missing.get_or_insert((directory, error));
                }
                Err(error) => self.warn(&directory, "the state of its TPM", &error),
            }
        }
        if let Some((directory, error)) = missing.filter(|_| self.running) {
            self.warn(&directory, "the state of its TPM", &error);
        }
        self.record["taken"] = json!(clock::utc_now());
    }

    fn take_tpm(&mut self, path: &Path) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // Locks and half-written files begin with a dot.
        if name.starts_with('.') || !path.is_file() {
            return;
        }
        match read_steady(path) {
            Ok((bytes, owner)) => {
                self.hold(image::TPM, &name, Some(path), owner, Content::Bytes(bytes));
            }
            // Replaced by a file of another name meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => self.warn(path, "the state of its TPM", &error),
        }
    }
}

fn open(path: &Path) -> std::io::Result<(File, u64, Option<String>)> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(std::io::Error::other("it is no file"));
    }
    Ok((file, meta.len(), owner::of(&meta)))
}

/// The size of a file and the SHA-256 of its content.
pub fn checksum(path: &Path) -> std::io::Result<(u64, String)> {
    let (mut file, ..) = open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            let digest = image::Digest::from_bytes(hasher.finalize().into());
            return Ok((size, digest.to_string()));
        }
        hasher.update(&buffer[..length]);
        size += length as u64;
    }
}

/// Reads a small file that may be written to meanwhile: until it is the same twice.
fn read_steady(path: &Path) -> std::io::Result<(Vec<u8>, Option<String>)> {
    let read = || {
        let (file, size, owner) = open(path)?;
        if size > SMALL {
            return Err(std::io::Error::other(
                "it is too large to be read at the freeze",
            ));
        }
        let mut bytes = Vec::new();
        file.take(SMALL).read_to_end(&mut bytes)?;
        Ok((bytes, owner))
    };
    let mut last = read()?;
    for _ in 1..READS {
        let again = read()?;
        if again == last {
            return Ok(again);
        }
        last = again;
    }
    Err(std::io::Error::other("it is being written to all the time"))
}

impl Runner {
    /// What is to be held of the VM besides its disks; nothing of one that libvirt does not know.
    pub(super) fn configuration(&mut self) -> Option<Configuration> {
        let domain = self.vm.domain.as_ref()?;
        match Configuration::of(domain, self.repo.is_encrypted()) {
            Ok(found) => Some(found),
            Err(error) => {
                let warning = format!("the point is without the domain's definition: {error:#}");
                if !self.warnings.contains(&warning) {
                    self.warnings.push(warning);
                }
                None
            }
        }
    }

    /// Stores it; gives what of it goes among the point's disks and what into its description of the machine.
    pub(super) fn store_configuration(
        &mut self,
        mut configuration: Configuration,
    ) -> Result<(Vec<DiskPoint>, Value)> {
        let files = std::mem::take(&mut configuration.files);
        self.progress.begin(
            "store the configuration",
            files.iter().map(Held::size).sum(),
        );
        let keys: Vec<String> = files.iter().map(Held::key).collect();
        self.session.ground(&keys)?;
        let mut tries = 0;
        let failed = loop {
            match self.store_files(&files) {
                Err(error) if is_condemned(&error) && tries < CONDEMNED_TRIES => tries += 1,
                stored => break stored?,
            }
        };
        let mut stored = Vec::new();
        for (held, failed) in files.into_iter().zip(failed) {
            let path = held.file.path.clone().unwrap_or_default();
            if let Some(error) = failed {
                configuration.warn(Path::new(&path), &format!("its {}", held.file.role), &error);
                continue;
            }
            let tracked = self.tracked_file(&held);
            let (map, _) = self.session.build_map(&tracked)?;
            stored.push(DiskPoint {
                key: held.key(),
                device: String::new(),
                node: String::new(),
                format: "raw".to_owned(),
                size: held.size(),
                map,
                tracking: None,
                rescanned: None,
                file: Some(held.file),
            });
        }
        self.warnings.append(&mut configuration.warnings);
        Ok((stored, configuration.record))
    }

    /// A file as if it were a disk: no bitmap follows it, it is read in full and compared.
    fn tracked_file(&self, held: &Held) -> Tracked {
        let key = held.key();
        let base = self.session.bases.get(&key);
        Tracked {
            size: held.size(),
            identity: Value::Null,
            persistent: false,
            granularity: 0,
            base: base.and_then(|based| based.base.clone()),
            needed: Vec::new(),
            new: None,
            whole: None,
            doubt: None,
            key,
        }
    }

    /// Stores and proves the files' blocks; says which of them could not be read, and why.
    fn store_files(&mut self, files: &[Held]) -> Result<Vec<Option<std::io::Error>>> {
        let session = self.session.id().context("files without a session")?;
        let mut disks = Vec::new();
        for held in files {
            let base = self.tracked_file(held).base;
            let map = base.as_ref().map(base_map).transpose()?;
            disks.push(CopyDisk {
                key: held.key(),
                size: held.size(),
                base_size: map.as_ref().map_or(0, |map| map.size),
                base: map
                    .map(|map| MapReader::open(&self.repo, &map))
                    .transpose()?,
            });
        }
        let done = &self.progress.done;
        let (failed, copied) = copy::copy(
            &self.repo,
            &disks,
            (session, "configuration"),
            done,
            Manner::default(),
            |give| hand_on(files, give),
        )?;
        self.bytes.stored += copied.stored;
        let epoch = self.session.state.epoch;
        for ((held, failed), mut proofs) in files.iter().zip(&failed).zip(copied.proofs) {
            if failed.is_none() {
                proofs.sort_unstable_by_key(|(run, _)| run.first);
                let (key, since) = (held.key(), copied.generation);
                self.session
                    .prove(&key, epoch, &proofs, Read::default(), since)?;
            }
        }
        Ok(failed)
    }
}

fn hand_on(
    files: &[Held],
    give: &mut dyn FnMut(Piece) -> ControlFlow<()>,
) -> Result<Vec<Option<std::io::Error>>> {
    let mut failed = Vec::new();
    for (disk, held) in files.iter().enumerate() {
        let mut offset = 0;
        let mut error = None;
        while offset < held.size() && error.is_none() {
            let length = PIECE.min(held.size() - offset);
            let extent = Extent { offset, length };
            match held.read(extent) {
                Ok(data) => {
                    let data: Box<dyn Deref<Target = [u8]> + Send> = Box::new(data);
                    let data = Some(data);
                    let piece = Piece { disk, extent, data };
                    anyhow::ensure!(
                        give(piece) == ControlFlow::Continue(()),
                        "the domain's files were not stored whole"
                    );
                }
                Err(found) => error = Some(found),
            }
            offset += length;
        }
        failed.push(error);
    }
    Ok(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration(directory: &Path, running: bool) -> Configuration {
        Configuration {
            record: json!({}),
            files: Vec::new(),
            nvram: Some(directory.join("VARS.fd")),
            tpm: vec![directory.join("tpm2"), directory.join("tpm1.2")],
            running,
            warnings: Vec::new(),
        }
    }

    #[test]
    fn what_a_running_vm_must_have_and_cannot_be_read_is_a_warning() {
        let directory = tempfile::tempdir().unwrap();
        for (running, warnings) in [(true, 2), (false, 0)] {
            let mut found = configuration(directory.path(), running);
            found.take();
            assert!(found.files.is_empty());
            assert_eq!(found.warnings.len(), warnings, "{:?}", found.warnings);
        }
        // A directory is no file to be read, whoever asks.
        std::fs::create_dir(directory.path().join("VARS.fd")).unwrap();
        let mut found = configuration(directory.path(), false);
        found.take();
        assert!(
            found.warnings[0].contains("VARS.fd"),
            "{:?}",
            found.warnings
        );
    }

    #[test]
    fn variables_and_tpm_state_are_held_and_locks_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("tpm1.2");
        std::fs::create_dir(&state).unwrap();
        for (path, text) in [
            (directory.path().join("VARS.fd"), "variables"),
            (state.join("tpm-00.permall"), "state"),
            (state.join("empty"), ""),
            (state.join(".lock"), "lock"),
        ] {
            use std::io::Write as _;
            File::create(path)
                .unwrap()
                .write_all(text.as_bytes())
                .unwrap();
        }
        let mut found = configuration(directory.path(), true);
        found.take();
        assert_eq!(found.warnings, Vec::<String>::new());
        let keys: Vec<String> = found.files.iter().map(Held::key).collect();
        assert_eq!(keys, ["file:nvram", "file:tpm-00.permall"]);
        let extent = Extent {
            offset: 2,
            length: 3,
        };
        assert_eq!(found.files[0].read(extent).unwrap(), b"ria");
        let beyond = Extent {
            offset: 8,
            length: 3,
        };
        assert!(found.files[0].read(beyond).is_err());
        assert!(found.record["taken"].is_string());
    }
}
