//! The guest of the demo: two disks that are full of stamps from the start, and a program that goes on with them.
//!
//! The stamps of the start are written on the host, since that takes a moment where an emulated guest takes minutes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::block::{BlockDevice, Page, SLOT};
use crate::guest::{Disk, Guest, Program};
use crate::stamp::{self, Options};

/// What the guest is made of.
#[derive(Debug, Clone)]
pub struct Demo {
    /// For sockets, the console's log, and the images where none are given.
    pub dir: PathBuf,
    /// Bytes of each disk.
    pub size: u64,
    /// MiB of each disk that are written to.
    pub span_mib: u64,
    /// Writes that are there from the start.
    pub fill: u64,
    /// Writes a second.
    pub rate: u32,
    /// The images of `vda` (qcow2) and `vdb` (raw); made when they are not there.
    pub images: [Option<PathBuf>; 2],
    /// The VM's UUID.
    pub uuid: Option<String>,
}

impl Demo {
    /// Boots it.
    pub fn boot(&self) -> Result<Guest> {
        let mut disks = [Disk::qcow2("vda", self.size), Disk::raw("vdb", self.size)];
        for (disk, image) in disks.iter_mut().zip(&self.images) {
            if let Some(image) = image {
                *disk = disk.clone().image(image);
            }
        }
        if self.fill > 0 {
            self.fill_images(&disks[0].path(&self.dir), &disks[1].path(&self.dir))?;
        }
        let words = format!(
            "--span {} --rate {} /dev/vda /dev/vdb",
            self.span_mib, self.rate
        );
        let mut builder = Guest::builder(&self.dir).program(Program::Stamp(words));
        for disk in disks {
            builder = builder.disk(disk);
        }
        if let Some(uuid) = &self.uuid {
            builder = builder.uuid(uuid);
        }
        builder.boot()
    }

    fn fill_images(&self, qcow2: &Path, raw: &Path) -> Result<()> {
        std::fs::create_dir_all(&self.dir)?;
        let first = qcow2.with_extension("fill");
        let mut disks: Vec<Box<dyn BlockDevice>> = Vec::new();
        for path in [first.as_path(), raw] {
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(path)
                .with_context(|| format!("create {}", path.display()))?;
            file.set_len(self.size)?;
            disks.push(Box::new(PlainFile(file, self.size)));
        }
        let options = Options {
            seed: 1,
            span: Some(self.span_mib << 20),
            trim: false,
            rate: None,
            steps: Some(self.fill),
        };
        stamp::run(&mut disks, &options, &mut |_| {})?;
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
        let status = convert.arg(&first).arg(qcow2).status()?;
        if !status.success() {
            bail!("qemu-img convert: {status}");
        }
        Ok(std::fs::remove_file(first)?)
    }
}

/// A file of the host through its page cache.
struct PlainFile(File, u64);

impl BlockDevice for PlainFile {
    fn size(&self) -> u64 {
        self.1
    }

    fn read(&mut self, slot: u64, page: &mut Page) -> io::Result<()> {
        self.0.read_exact_at(&mut page.0, slot * SLOT)
    }

    fn write(&mut self, slot: u64, page: &Page) -> io::Result<()> {
        self.0.write_all_at(&page.0, slot * SLOT)
    }

    fn zero(&mut self, slot: u64, count: u64) -> io::Result<()> {
        (slot..slot + count).try_for_each(|slot| self.write(slot, &Page::default()))
    }

    fn discard(&mut self, slot: u64, count: u64) -> io::Result<()> {
        self.zero(slot, count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }
}
