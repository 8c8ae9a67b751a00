//! External snapshots of a domain and their commits, as libvirt itself makes them: its XML names the overlay for as long as it
//! is in use, so that the domain may end and start at any time.

use std::ffi::CString;
use std::fmt::Write as _;

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use forerun_blockjob as blockjob;
use qapi::qmp;
use serde_json::json;
use virt::domain::Domain;
use virt::sys;

use super::xml::{Description, escaped};
use super::{Answered, XML_INACTIVE};
use crate::qmp::command::{list, text};
use crate::qmp::managed::{Managed, Manager, Progress, Source};
use crate::qmp::{Error, Result};

/// libvirt as the manager of a domain.
#[derive(Debug)]
pub(super) struct DomainSnapshots {
    pub(super) domain: super::Domain,
}

impl DomainSnapshots {
    fn ask<T: Send + 'static>(
        &self,
        what: &'static str,
        disk: &str,
        question: impl Fn(&Domain, &CString) -> Answered<T> + Clone + Send + 'static,
    ) -> Result<T> {
        let name = CString::new(disk)
            .map_err(|_| Error::Libvirt(format!("disk `{disk}` has a name that is none")))?;
        self.domain.ask(what, move |domain| question(domain, &name))
    }
}

impl Manager for DomainSnapshots {
    fn running(&self) -> Result<bool> {
        self.domain.active()
    }

    fn snapshot(&self, overlays: &[Managed]) -> Result<()> {
        let all = self.domain.description(0)?;
        let xml = snapshot_xml(&all, overlays);
        let flags = sys::VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
            | sys::VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
            | sys::VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
            | sys::VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC;
        self.domain.ask_once("take a snapshot", move |domain| {
            domain.create_snapshot_xml(&xml, flags).map(drop)
        })
    }

    fn sources(&self, disk: &str) -> Result<Vec<Source>> {
        let mut sources = Vec::new();
        for flags in [0, XML_INACTIVE] {
            let description = self.domain.description(flags)?;
            let found = description.disks.into_iter().find(|one| one.target == disk);
            sources.push(match found {
                Some(found) => Source::Path(found.path.map(Into::into)),
                None => Source::NoDisk,
            });
        }
        Ok(sources)
    }

    fn job(&self, disk: &str) -> Result<Option<Progress>> {
        let found = self.ask("look at a block job", disk, |domain, disk| {
            blockjob::progress(domain, disk)
        })?;
        Ok(found.map(|found| Progress {
            current: found.current,
            end: found.end,
            commits_active: found.commits_active,
        }))
    }

    fn opened(&self, file: &Path) -> Result<bool> {
        let mut monitor = match self.domain.monitor() {
            Err(Error::Closed) => return Ok(false),
            monitor => monitor?,
        };
        let nodes = list::<qmp::query_named_block_nodes>(&mut monitor, json!({ "flat": true }))?;
        Ok(nodes
            .iter()
            .any(|node| Path::new(text(node, "file")) == file))
    }

    fn commit(&self, overlay: &Managed) -> Result<()> {
        let file = CString::new(overlay.file.as_os_str().as_bytes())
            .map_err(|_| Error::Libvirt(format!("{} is no path", overlay.file.display())))?;
        self.ask("commit an overlay", &overlay.disk, move |domain, disk| {
            blockjob::commit_active(domain, disk, &file)
        })
    }

    fn pivot(&self, disk: &str) -> Result<()> {
        self.ask("end a commit", disk, |domain, disk| {
            blockjob::pivot(domain, disk)
        })
    }
}

/// A snapshot of these disks and of no other (libvirt's "Snapshot XML format").
fn snapshot_xml(all: &Description, overlays: &[Managed]) -> String {
    let mut disks = String::new();
    for disk in &all.disks {
        let name = escaped(&disk.target);
        let overlay = overlays.iter().find(|overlay| overlay.disk == disk.target);
        // Writing to a string does not fail.
        let _written = match overlay {
            Some(overlay) => write!(
                disks,
                "<disk name='{name}' snapshot='external' type='file'><driver type='qcow2'/><source file='{}'/></disk>",
                escaped(&overlay.file.display().to_string())
            ),
            None => write!(disks, "<disk name='{name}' snapshot='no'/>"),
        };
    }
    format!("<domainsnapshot><disks>{disks}</disks></domainsnapshot>")
}

#[cfg(test)]
mod tests {
    use super::super::xml::tests::LIVE;
    use super::*;

    #[test]
    fn only_the_named_disks_get_overlays() {
        let all = Description::parse(LIVE).unwrap();
        let overlay = Managed {
            disk: "vda".to_owned(),
            file: "/images/a'&b.overlay".into(),
            deadline_ms: 1,
        };
        let xml = snapshot_xml(&all, &[overlay]);
        assert!(
            xml.contains("<source file='/images/a&apos;&amp;b.overlay'/>"),
            "{xml}"
        );
        let others = all.disks.len() - 1;
        assert_eq!(xml.matches("snapshot='no'").count(), others, "{xml}");
        assert_eq!(xml.matches("snapshot='external'").count(), 1, "{xml}");
    }
}
