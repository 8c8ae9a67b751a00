//! External snapshots that the manager of a VM (libvirt) takes and commits itself. It knows of the overlay at any time then: a VM
//! that ends meanwhile starts again from its overlay, and nothing is lost.
//!
//! The file is made beforehand, and the manager told to use it. So a snapshot that was asked for and has not come yet (the
//! manager may be waiting for its own locks, and goes on when we are dead) can be taken back: without its file it fails.
//!
//! ```text
//! the disk's source is our file         to be committed, whichever QEMU runs the VM by now
//! it is another                         never put in place, or committed already: the file is rubbish, unless QEMU has it open
//! there is no such disk                 nobody knows: the file stays
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::overlay::Committed;
use super::{Error, Result};
use crate::clock;
use crate::units::Bytes;

/// Between two looks at a commit.
const POLL: Duration = Duration::from_millis(10);
/// After this part of its time a commit is slow.
const SLOW: u32 = 20;
/// How the file of an overlay ends that is being taken back.
const ASIDE: &str = "overlay-aside";

/// An overlay that a manager knows of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Managed {
    /// The disk's key.
    pub disk: String,
    /// The overlay's file.
    pub file: PathBuf,
    /// How long a commit is waited for, milliseconds.
    pub deadline_ms: u64,
}

/// What a disk's data goes to, as the manager knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The disk is not the VM's any more.
    NoDisk,
    /// A file or device, or something else without a path.
    Path(Option<PathBuf>),
}

/// A block job as its manager tells of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub current: u64,
    /// Bytes in all.
    pub end: u64,
    /// Whether it commits the disk's active image; else it is somebody's for another purpose.
    pub commits_active: bool,
}

/// Who takes snapshots of a VM and commits them. Every call is one of the manager's own.
pub trait Manager: Send + Sync + std::fmt::Debug {
    /// Whether the VM runs.
    fn running(&self) -> Result<bool>;
    /// Takes an external snapshot of these disks onto files that are there, all at one instant or none.
    fn snapshot(&self, overlays: &[Managed]) -> Result<()>;
    /// What a disk's data goes to: first now, then after the VM's next start.
    fn sources(&self, disk: &str) -> Result<Vec<Source>>;
    /// The block job of a disk.
    fn job(&self, disk: &str) -> Result<Option<Progress>>;
    /// Whether the VM's QEMU has a file open.
    fn opened(&self, file: &Path) -> Result<bool>;
    /// Begins to commit an overlay; refused with [`Error::Libvirt`] when it is not what the disk's data goes to.
    fn commit(&self, overlay: &Managed) -> Result<()>;
    /// Ends a commit; refused with [`Error::Libvirt`] while it is not ready.
    fn pivot(&self, disk: &str) -> Result<()>;
}

/// Commits an overlay back into its base and removes its file, wherever an earlier try was cut off.
pub fn commit(manager: &dyn Manager, overlay: &Managed) -> Result<Committed> {
    let mut done = Committed::default();
    let aside = overlay.file.with_extension(ASIDE);
    if !overlay.file.exists() {
        if !aside.exists() {
            return Ok(done);
        }
        rename(&aside, &overlay.file)?;
    }
    let begun = clock::now();
    let deadline = Duration::from_millis(overlay.deadline_ms);
    let mut refused = None;
    loop {
        let sources = manager.sources(&overlay.disk)?;
        let ours = Source::Path(Some(overlay.file.clone()));
        if !sources.contains(&ours) {
            if done.what.is_none() && sources.contains(&Source::NoDisk) {
                return Err(Error::OverlayUnknown {
                    disk: overlay.disk.clone(),
                    file: overlay.file.clone(),
                });
            }
            // What has it open by now has it in use in a moment; what has not cannot open it any more.
            rename(&overlay.file, &aside)?;
            if !manager.opened(&overlay.file)? {
                break;
            }
            rename(&aside, &overlay.file)?;
            if clock::now() - begun > deadline {
                return Err(Error::Protocol(format!(
                    "QEMU has {} open, but libvirt does not know of it",
                    overlay.file.display()
                )));
            }
            clock::sleep(POLL);
            continue;
        }
        if !manager.running()? {
            return Err(Error::OverlayOff {
                disk: overlay.disk.clone(),
                file: overlay.file.clone(),
            });
        }
        let in_use = sources.first() == Some(&ours);
        if in_use {
            done.what = Some(format!("overlay of disk {}", overlay.disk));
        }
        let job = manager.job(&overlay.disk)?;
        let took = clock::now() - begun;
        if took > deadline {
            return Err(refused.unwrap_or(Error::NotConverged {
                disk: overlay.disk.clone(),
                file: overlay.file.clone(),
                seconds: took.as_secs(),
                left: job.map_or(0, |job| job.end.saturating_sub(job.current)),
            }));
        }
        // libvirt says no to a pivot that comes too early, and to a commit while another job is on the disk.
        let asked = match job {
            // Only the next start would have it: somebody has changed the definition, or is about to.
            _ if !in_use => Err(Error::Libvirt(format!(
                "the definition of the domain has {} for disk `{}`, which does not use it now",
                overlay.file.display(),
                overlay.disk
            ))),
            None => manager.commit(overlay),
            Some(job) if !job.commits_active => Err(Error::Libvirt(format!(
                "another block job is on disk `{}`, which is on the overlay {}",
                overlay.disk,
                overlay.file.display()
            ))),
            Some(job) if job.current >= job.end && job.end > 0 => manager.pivot(&overlay.disk),
            Some(_) => Ok(()),
        };
        match asked {
            Err(error @ (Error::Libvirt(_) | Error::Lost { .. })) => refused = Some(error),
            asked => asked?,
        }
        if done.slow.is_none() && took > deadline / SLOW {
            let left = job.map_or(0, |job| job.end.saturating_sub(job.current));
            let words = format!(
                "the overlay of disk `{}` was not committed after {} ms, {} were left",
                overlay.disk,
                took.as_millis(),
                Bytes(left)
            );
            tracing::warn!("{words}");
            done.slow = Some(words);
        }
        clock::sleep(POLL);
    }
    match std::fs::remove_file(&aside) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(Error::Io {
            what: format!("remove {}", aside.display()),
            source,
        }),
        _ => Ok(done),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "either name is found again after a crash"
)]
fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|source| Error::Io {
        what: format!("rename {}", from.display()),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// What cannot be provoked at will: libvirt at a moment of our choice.
    #[derive(Debug)]
    struct At {
        live: PathBuf,
        next: PathBuf,
        job: Option<Progress>,
        asked: Mutex<Vec<&'static str>>,
    }

    impl Manager for At {
        fn running(&self) -> Result<bool> {
            Ok(true)
        }

        fn snapshot(&self, _overlays: &[Managed]) -> Result<()> {
            Ok(())
        }

        fn sources(&self, _disk: &str) -> Result<Vec<Source>> {
            let paths = [&self.live, &self.next];
            Ok(paths.map(|path| Source::Path(Some(path.clone()))).to_vec())
        }

        fn job(&self, _disk: &str) -> Result<Option<Progress>> {
            Ok(self.job)
        }

        fn opened(&self, _file: &Path) -> Result<bool> {
            Ok(false)
        }

        fn commit(&self, _overlay: &Managed) -> Result<()> {
            self.asked.lock().unwrap().push("commit");
            Ok(())
        }

        fn pivot(&self, _disk: &str) -> Result<()> {
            self.asked.lock().unwrap().push("pivot");
            Ok(())
        }
    }

    #[test]
    fn neither_another_image_nor_another_job_is_touched() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let ours = file.path().to_path_buf();
        let overlay = Managed {
            disk: "vda".to_owned(),
            file: ours.clone(),
            deadline_ms: 50,
        };
        let at = |live: &Path, next: &Path, job| At {
            live: live.to_path_buf(),
            next: next.to_path_buf(),
            job,
            asked: Mutex::default(),
        };
        let ready = |commits_active| Progress {
            current: 1,
            end: 1,
            commits_active,
        };
        let other = Path::new("/images/base");
        // In use only after the next start: "the active image" is the guest's own.
        let pivoted = at(other, &ours, None);
        assert!(commit(&pivoted, &overlay).is_err());
        assert!(pivoted.asked.lock().unwrap().is_empty());
        // Somebody copies the disk elsewhere.
        let copied = at(&ours, &ours, Some(ready(false)));
        assert!(commit(&copied, &overlay).is_err());
        assert!(copied.asked.lock().unwrap().is_empty());
        assert!(ours.exists());
        // Ours, and nobody's at the end.
        let ours_ready = at(&ours, &ours, Some(ready(true)));
        assert!(commit(&ours_ready, &overlay).is_err());
        assert!(ours_ready.asked.lock().unwrap().contains(&"pivot"));
        assert!(
            commit(&at(other, other, None), &overlay)
                .unwrap()
                .what
                .is_none()
        );
        assert!(!ours.exists());
    }
}
