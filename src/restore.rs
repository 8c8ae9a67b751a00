//! Restoring: every target is checked before a byte is written, every block is re-hashed on its way, and a file that was
//! not finished is removed.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{Advice, FallocateFlags};

use crate::clock::{self, Deadline};
use crate::exit::{Failure, Kind};
use crate::image::{BlockSink, DiskPoint, Repository};
use crate::nbd::{Client, Endpoint, Writer, ZeroMode};
use crate::progress::Progress;
use crate::units::{Bytes, Extent};

/// After so many bytes the kernel is told to begin writing them out.
const WRITE_OUT: u64 = 16 << 20;
/// What is read into memory is at most so long.
const SMALL: u64 = 16 << 20;
/// Requests in flight to a qcow2 image's server.
const IN_FLIGHT: usize = 8;

/// One disk to one place.
#[derive(Debug, Clone)]
pub struct Task {
    /// The disk.
    pub disk: DiskPoint,
    /// The file or device.
    pub path: PathBuf,
    /// As qcow2, else raw.
    pub qcow2: bool,
    /// How a qcow2 image is made: options of `qemu-img create`.
    pub create: Vec<String>,
}

impl Task {
    /// What is named in messages.
    #[must_use]
    pub fn what(&self) -> String {
        match &self.disk.file {
            Some(file) => format!("file `{}`", file.name),
            None => format!("disk `{}`", self.disk.key),
        }
    }
}

/// Who is told how far it is, and who may end it.
pub struct Watch<'a> {
    /// The bytes of the disk.
    pub progress: &'a Progress,
    /// Set by whoever wants it to end.
    pub interrupted: &'a AtomicBool,
}

impl Watch<'_> {
    fn go_on(&self) -> io::Result<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(ErrorKind::Interrupted.into());
        }
        Ok(())
    }

    fn done(&self, bytes: u64) -> io::Result<()> {
        self.progress.done.fetch_add(bytes, Ordering::Relaxed);
        self.go_on()
    }
}

/// Refuses what could not end well, before anything is written.
pub fn check(tasks: &[Task], force: bool) -> Result<()> {
    for (index, task) in tasks.iter().enumerate() {
        let shown = task.path.display();
        if tasks
            .iter()
            .take(index)
            .any(|other| same_place(&other.path, &task.path))
        {
            return Err(Failure::plain(
                Kind::Usage,
                format!("two disks would go to {shown}"),
            ));
        }
        let meta = match std::fs::metadata(&task.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("look at {shown}")),
            Ok(meta) => meta,
        };
        if meta.file_type().is_block_device() {
            check_device(task)?;
        } else if !meta.is_file() {
            return Err(Failure::plain(
                Kind::Usage,
                format!("{shown} is no file or block device"),
            ));
        }
        if !force {
            let hint = "overwrite it knowingly with `--force`";
            return Err(Failure::hinted(
                Kind::Failed,
                format!("{shown} exists already"),
                hint,
            ));
        }
        if in_use(&task.path)? {
            let hint = "stop the VM that uses it, or restore to another place";
            return Err(Failure::hinted(
                Kind::Busy,
                format!("{shown} is in use"),
                hint,
            ));
        }
    }
    Ok(())
}

/// Whether two paths name one file, which need not exist yet.
fn same_place(a: &Path, b: &Path) -> bool {
    let whole = |path: &Path| {
        std::fs::canonicalize(path).ok().or_else(|| {
            let parent = path.parent().filter(|parent| parent != &Path::new(""));
            let parent = std::fs::canonicalize(parent.unwrap_or(Path::new("."))).ok()?;
            Some(parent.join(path.file_name()?))
        })
    };
    a == b || whole(a).is_some_and(|path| Some(path) == whole(b))
}

fn check_device(task: &Task) -> Result<()> {
    use std::io::{Seek, SeekFrom};
    let shown = task.path.display();
    if task.qcow2 {
        return Err(Failure::hinted(
            Kind::Usage,
            format!("{shown} is a device: restore it as raw"),
            "add `--format raw`; a VM that has the device as qcow2 must then be told so",
        ));
    }
    let mut device = open_device(&task.path)?;
    let size = device
        .seek(SeekFrom::End(0))
        .with_context(|| format!("measure {shown}"))?;
    if size < task.disk.size {
        let message = format!(
            "{shown} has {}, disk `{}` needs {}",
            Bytes(size),
            task.disk.key,
            Bytes(task.disk.size)
        );
        return Err(Failure::plain(Kind::Failed, message));
    }
    Ok(())
}

/// Exclusive, so that a device that is mounted or otherwise claimed is refused, and nobody mounts it while it is held.
fn open_device(path: &Path) -> Result<File> {
    let shown = path.display();
    let flags = i32::try_from(rustix::fs::OFlags::EXCL.bits()).unwrap_or(0);
    let opened = OpenOptions::new()
        .write(true)
        .custom_flags(flags)
        .open(path);
    match opened {
        Err(error) if error.kind() == ErrorKind::ResourceBusy => Err(Failure::hinted(
            Kind::Busy,
            format!("{shown} is in use"),
            "unmount it, or restore to another place",
        )),
        opened => opened.with_context(|| format!("open {shown}")),
    }
}

/// Whether a QEMU has the image open for writing (its advisory locks say so).
fn in_use(path: &Path) -> Result<bool> {
    let output = Command::new("qemu-img")
        .arg("info")
        .arg("--")
        .arg(path)
        .output()
        .context("run qemu-img info")?;
    Ok(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("lock"))
}

/// Makes the directory of restored images, which are as secret as the disks. Who has to open one by its path may have to pass
/// through.
pub fn make_directory(path: &Path, passable: bool) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(if passable { 0o711 } else { 0o700 })
        .create(path)
        .with_context(|| format!("create {}", path.display()))
}

/// A small file of a point.
pub fn read_small(repo: &Repository, file: &DiskPoint) -> Result<Vec<u8>> {
    anyhow::ensure!(file.size <= SMALL, "{} is too large", file.key);
    let mut sink = MemorySink(vec![0; usize::try_from(file.size)?]);
    repo.read_disk(file, 1, &mut sink)?;
    Ok(sink.0)
}

struct MemorySink(Vec<u8>);

impl BlockSink for MemorySink {
    fn data(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let place = self.0.get_mut(start..start + data.len());
        place.ok_or(ErrorKind::UnexpectedEof)?.copy_from_slice(data);
        Ok(())
    }

    fn zero(&mut self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Makes a small new file, readable by us alone, durably.
pub fn write_small(path: &Path, bytes: &[u8], force: bool) -> Result<()> {
    if force {
        std::fs::remove_file(path).ok();
    }
    let write = || {
        let partial = with_suffix(path, ".partial");
        claim(&partial)?;
        let file = OpenOptions::new().write(true).open(&partial)?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()?;
        give_name(&partial, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// Restores one disk. A new file gets its name only when it is complete: until then it is `NAME.partial`, so that what a
/// killed restore leaves is not taken for an image.
/// One that is to end by the flag in `watch` fails, and leaves nothing new behind either.
pub fn apply(repo: &Repository, task: &Task, force: bool, watch: &Watch<'_>) -> Result<()> {
    let write = if task.qcow2 { apply_qcow2 } else { apply_raw };
    let done = if task.path.exists() {
        anyhow::ensure!(force, "{} exists already", task.path.display());
        write(repo, task, &task.path, watch)
    } else {
        let partial = with_suffix(&task.path, ".partial");
        let done = claim(&partial)
            .and_then(|()| write(repo, task, &partial, watch))
            .and_then(|()| give_name(&partial, &task.path));
        if done.is_err() {
            std::fs::remove_file(&partial).ok();
        }
        done
    };
    done.with_context(|| format!("restore {} to {}", task.what(), task.path.display()))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Makes the file under its first name, readable by us alone; what an earlier restore left there goes.
fn claim(partial: &Path) -> Result<()> {
    std::fs::remove_file(partial).ok();
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(partial)
        .with_context(|| format!("create {}", partial.display()))?;
    Ok(())
}

/// Gives a finished file its name, which must still be free, durably.
fn give_name(partial: &Path, path: &Path) -> Result<()> {
    use rustix::fs::{CWD, RenameFlags};
    rustix::fs::renameat_with(CWD, partial, CWD, path, RenameFlags::NOREPLACE)
        .context("give it its name")?;
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?
        .sync_all()
        .context("sync its directory")
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn apply_raw(repo: &Repository, task: &Task, path: &Path, watch: &Watch<'_>) -> Result<()> {
    let regular = std::fs::metadata(path).context("look at it")?.is_file();
    let file = if regular {
        OpenOptions::new()
            .write(true)
            .open(path)
            .context("open it")?
    } else {
        open_device(path)?
    };
    if regular {
        // Nothing of an old image stays, its bitmaps included.
        file.set_len(0)?;
        file.set_len(task.disk.size)?;
    }
    let mut sink = RawSink {
        file,
        fresh: regular,
        watch,
        unwritten: None,
    };
    repo.read_disk(&task.disk, threads(), &mut sink)?;
    sink.file.sync_all().context("sync it")?;
    Ok(())
}

/// A raw file or device.
struct RawSink<'a> {
    file: File,
    /// What is not written reads as zeros.
    fresh: bool,
    watch: &'a Watch<'a>,
    /// What was written since the kernel was last told to begin writing it out, as one span, with its bytes.
    unwritten: Option<(Extent, u64)>,
}

impl RawSink<'_> {
    /// Begins to write out what was written, now and then, so that the sync at the end finds little left to do.
    fn write_out(&mut self, written: Extent) {
        let (span, bytes) = self.unwritten.take().unwrap_or((written, 0));
        let offset = span.offset.min(written.offset);
        let span = Extent {
            offset,
            length: span.end().max(written.end()) - offset,
        };
        let bytes = bytes + written.length;
        if bytes < WRITE_OUT {
            self.unwritten = Some((span, bytes));
            return;
        }
        // It cannot drop dirty pages, so it begins to write them.
        let length = std::num::NonZeroU64::new(span.length);
        rustix::fs::fadvise(&self.file, span.offset, length, Advice::DontNeed).ok();
    }
}

impl BlockSink for RawSink<'_> {
    fn data(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let length = data.len() as u64;
        self.watch.done(length)?;
        self.file.write_all_at(data, offset)?;
        self.write_out(Extent { offset, length });
        Ok(())
    }

    fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.watch.done(length)?;
        if self.fresh {
            return Ok(());
        }
        match rustix::fs::fallocate(&self.file, FallocateFlags::ZERO_RANGE, offset, length) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NODEV) => {
                let zeros = vec![0; 1 << 20];
                let mut at = offset;
                while at < offset + length {
                    let part = (offset + length - at).min(zeros.len() as u64);
                    let part = usize::try_from(part).unwrap_or(zeros.len());
                    self.watch.go_on()?;
                    self.file.write_all_at(&zeros[..part], at)?;
                    at += part as u64;
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn apply_qcow2(repo: &Repository, task: &Task, path: &Path, watch: &Watch<'_>) -> Result<()> {
    let options = task.create.iter().flat_map(|option| ["-o", option]);
    let created = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args(options)
        .arg("--")
        .arg(path)
        .arg(task.disk.size.to_string())
        .output()
        .context("run qemu-img create")?;
    anyhow::ensure!(
        created.status.success(),
        "qemu-img create: {}",
        String::from_utf8_lossy(&created.stderr).trim()
    );
    let (server, client) = ImageServer::start(path, watch)?;
    let writer = Writer::new(client, IN_FLIGHT)?;
    let mut sink = NbdSink { writer, watch };
    repo.read_disk(&task.disk, threads(), &mut sink)?;
    sink.writer.flush()?;
    sink.writer.finish()?.disconnect()?;
    server.stop()?;
    File::open(path)?.sync_all().context("sync it")?;
    Ok(())
}

/// An image behind an NBD server; a new qcow2 image reads as zeros where nothing is written.
struct NbdSink<'a> {
    writer: Writer,
    watch: &'a Watch<'a>,
}

impl BlockSink for NbdSink<'_> {
    fn data(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.watch.done(data.len() as u64)?;
        self.writer.write(offset, data).map_err(io::Error::other)
    }

    fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.watch.done(length)?;
        let extent = Extent { offset, length };
        self.writer
            .write_zeroes(extent, ZeroMode::MayPunch)
            .map_err(io::Error::other)
    }
}

/// A directory of our own that goes with us.
struct Private(PathBuf);

impl Private {
    fn make() -> Result<Self> {
        let name = format!("forerun-{}", crate::qmp::names::random_hex(8));
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// A private `qemu-nbd` over one image.
struct ImageServer {
    child: Child,
    _directory: Private,
}

impl ImageServer {
    /// Starts it and connects once it listens; its socket is there a moment before that.
    fn start(image: &Path, watch: &Watch<'_>) -> Result<(Self, Client)> {
        let directory = Private::make()?;
        let socket = directory.0.join("nbd");
        let child = Command::new("qemu-nbd")
            .args(["-f", "qcow2", "--cache=writeback", "-k"])
            .arg(&socket)
            .arg("--")
            .arg(image)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start qemu-nbd")?;
        let mut server = Self {
            child,
            _directory: directory,
        };
        let deadline = Deadline::after(Duration::from_secs(20));
        let endpoint = Endpoint::new(&socket, "");
        loop {
            watch.go_on()?;
            match endpoint.connect() {
                Ok(client) => return Ok((server, client)),
                Err(error) if server.child.try_wait()?.is_some() || deadline.passed() => {
                    return Err(error).context("qemu-nbd does not serve the image");
                }
                Err(_) => clock::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Waits for its end: it ends when its client has gone, with the image complete.
    fn stop(mut self) -> Result<()> {
        let status = self.child.wait().context("wait for qemu-nbd")?;
        anyhow::ensure!(status.success(), "qemu-nbd failed: {status}");
        Ok(())
    }
}

impl Drop for ImageServer {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}
