//! Where the writers of a cell are: eight on each of two disks, in a guest or on the host behind writable exports.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;

use super::Cell;
use crate::exports::{NbdRig, connect};
use crate::guest::{Disk, Guest, Machine, Program};
use crate::vclock::{Bounds, Layout, Shared};

/// Where the writers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// In a guest of two CPUs.
    Guest,
    /// On the host, through writable NBD exports.
    Exports,
}

/// Writers of the host.
struct HostWriters {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<std::io::Result<()>>>,
    longest: Duration,
}

enum Place {
    Guest(Box<Guest>),
    Exports(Box<NbdRig>, HostWriters),
}

/// A QEMU with two disks and writers at work.
pub(crate) struct Stage {
    place: Place,
    /// Holds everything; removed at the end.
    dir: PathBuf,
    pub(crate) disks: Vec<Disk>,
}

impl Stage {
    pub(crate) fn start(cell: &Cell) -> Result<Self> {
        let dir = directory();
        std::fs::create_dir_all(&dir)?;
        let disks = vec![
            Disk::qcow2("vda", cell.disk_size).iothread(cell.iothreads),
            Disk::raw("vdb", cell.disk_size).iothread(cell.iothreads),
        ];
        let place = match cell.via {
            Via::Guest => Place::Guest(Box::new(guest(cell, &dir, &disks)?)),
            Via::Exports => {
                let rig = NbdRig::start(&dir, disks.clone())?;
                let writers = HostWriters::start(cell, &rig)?;
                Place::Exports(Box::new(rig), writers)
            }
        };
        Ok(Self { place, dir, disks })
    }

    pub(crate) fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    pub(crate) fn machine(&mut self) -> &mut Machine {
        match &mut self.place {
            Place::Guest(guest) => guest,
            Place::Exports(rig, _) => rig,
        }
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.machine().is_alive()
    }

    /// The NBD server's socket, and whether the stage started one.
    pub(crate) fn nbd_socket(&self) -> (PathBuf, bool) {
        (
            self.dir.join("nbd.sock"),
            matches!(self.place, Place::Exports(..)),
        )
    }

    pub(crate) fn completed(&self) -> Option<Vec<u64>> {
        match &self.place {
            Place::Guest(_) => None,
            Place::Exports(_, writers) => Some(writers.shared.completed()),
        }
    }

    /// The bounds of an instant that lies between an earlier call of [`Stage::completed`] and now.
    pub(crate) fn bounds(&self, completed: Option<Vec<u64>>) -> Option<Bounds> {
        match &self.place {
            Place::Guest(_) => None,
            Place::Exports(_, writers) => completed.map(|completed| Bounds {
                completed,
                submitted: writers.shared.submitted(),
            }),
        }
    }

    /// Slows host writers down (0 lets them go): an active commit does not converge under their full speed.
    pub(crate) fn set_rate(&self, rate: u32) {
        if let Place::Exports(_, writers) = &self.place {
            writers.shared.set_rate(rate);
        }
    }

    /// Fails when a writer has ended: all later points would be of a disk that nobody writes.
    pub(crate) fn writers_alive(&mut self) -> Result<()> {
        match &mut self.place {
            Place::Guest(guest) => match guest.last_line("rig-guest: failed")? {
                Some(line) => bail!("{line}"),
                None => Ok(()),
            },
            Place::Exports(_, writers) => {
                writers.longest = writers.longest.max(writers.shared.take_longest());
                match writers.threads.iter().position(JoinHandle::is_finished) {
                    Some(at) => bail!(
                        "writer {at} has ended: {:?}",
                        writers.threads.swap_remove(at).join()
                    ),
                    None => Ok(()),
                }
            }
        }
    }

    /// At least how many writes are complete by now.
    pub(crate) fn written(&mut self) -> u64 {
        self.writers_summary().0
    }

    /// How many writes there were and how long the longest took.
    pub(crate) fn writers_summary(&mut self) -> (u64, Duration) {
        match &mut self.place {
            Place::Guest(guest) => {
                let line = guest
                    .last_line("vclock: t=")
                    .ok()
                    .flatten()
                    .unwrap_or_default();
                let number = |key: &str| {
                    let rest = line.split_once(key).map_or("", |(_, rest)| rest);
                    rest.split(' ')
                        .next()
                        .and_then(|text| text.parse().ok())
                        .unwrap_or(0)
                };
                (
                    number(" writes="),
                    Duration::from_micros(number(" max_us=")),
                )
            }
            Place::Exports(_, writers) => {
                let longest = writers.longest.max(writers.shared.take_longest());
                (writers.shared.completed().iter().sum(), longest)
            }
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Place::Exports(rig, writers) = &mut self.place {
            writers.shared.stop();
            // Ends the writes that nobody answers any more, too.
            let _gone = rig.kill9();
            for thread in writers.threads.drain(..) {
                let _ended = thread.join();
            }
        }
        let _none = std::fs::remove_dir_all(&self.dir);
    }
}

/// A new directory in memory where there is such a file system: a busy disk must not decide how long a flush takes.
fn directory() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let memory = PathBuf::from("/dev/shm");
    let chosen = std::env::var_os("TMPDIR").is_none() && memory.is_dir();
    let parent = if chosen { memory } else { std::env::temp_dir() };
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    parent.join(format!("rig-freeze-{}-{count}", std::process::id()))
}

fn guest(cell: &Cell, dir: &std::path::Path, disks: &[Disk]) -> Result<Guest> {
    let words = format!(
        "--writers {} --run {} --rate {} /dev/vda /dev/vdb",
        cell.writers, cell.run, cell.rate
    );
    let mut builder = Guest::builder(dir)
        .vcpus(2)
        .uuid("5f0d6e0a-2c55-4b0e-9a52-8a1f6f6f0001")
        .program(Program::Vclock(words));
    for disk in disks {
        builder = builder.disk(disk.clone());
    }
    let mut guest = builder.boot()?;
    guest.wait_for("vclock: running", Duration::from_secs(120))?;
    Ok(guest)
}

impl HostWriters {
    fn start(cell: &Cell, rig: &NbdRig) -> Result<Self> {
        let sizes: Vec<u64> = rig.disks().iter().map(Disk::size).collect();
        let layout = Layout::new(1, &sizes, cell.writers, cell.run)?;
        let shared = Arc::new(Shared::new(layout, cell.rate));
        let mut threads = Vec::new();
        for writer in 0..layout.writers() {
            let disk = usize::try_from(layout.disk(writer))?;
            let export = rig
                .disks()
                .get(disk)
                .ok_or_else(|| anyhow!("no disk {disk}"))?
                .id();
            let mut device =
                connect(&rig.nbd_socket(), export).with_context(|| json!(export).to_string())?;
            let shared = Arc::clone(&shared);
            threads.push(std::thread::spawn(move || {
                shared.run_writer(writer, device.as_mut())
            }));
        }
        Ok(Self {
            shared,
            threads,
            longest: Duration::ZERO,
        })
    }
}
