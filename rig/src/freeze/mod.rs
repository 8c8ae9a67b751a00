//! How exact freezes are: many points of two disks under concurrent writers, each checked for being one instant.
//!
//! ```text
//! stage    where the writers are: in a guest, or on the host behind exports; disks with iothreads or without
//! freezer  what takes a point: the rig's own commands (`own`), in the right or the wrong order, or the product (`product`)
//! cell     one stage and one freezer for N points, quiet or with busy loops on all cores; one line of results
//! ```

mod own;
mod product;
mod stage;

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::block::Image;
use crate::vclock::{self, Bounds};
pub use stage::Via;

use stage::Stage;

/// How the block snapshot of a freeze is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// `blockdev-backup sync=none` onto a scratch image over the disk.
    Fleece,
    /// `blockdev-snapshot`, committed afterwards.
    Snapshot,
}

/// The order of the actions in the freeze's transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Add the new bitmaps, take the snapshot, disable the old bitmaps.
    Right,
    /// Add the new bitmaps, disable the old ones, take the snapshot.
    Wrong,
}

/// The product's command line.
#[derive(Debug, Clone)]
pub struct Product {
    /// The program.
    pub program: PathBuf,
    /// More words for every command.
    pub extra: Vec<String>,
}

/// One cell of the table.
#[derive(Debug, Clone)]
pub struct Cell {
    /// How the snapshot is taken.
    pub method: Method,
    /// In which order.
    pub order: Order,
    /// Where the writers are.
    pub via: Via,
    /// Whether each disk has an iothread.
    pub iothreads: bool,
    /// Whether busy loops run on all cores.
    pub starve: bool,
    /// How many points.
    pub points: u32,
    /// Bytes of each disk.
    pub disk_size: u64,
    /// Writers on each disk.
    pub writers: u64,
    /// Slots in a 64 KiB block before the next block.
    pub run: u64,
    /// Writes a second of each writer; 0 for as fast as it goes.
    pub rate: u32,
    /// A pause before each point, so that the writers dirty something.
    pub pause: Duration,
    /// The product instead of the rig's own commands.
    pub product: Option<Product>,
    /// Where inexact images and logs are kept.
    pub keep: Option<PathBuf>,
}

impl Cell {
    /// A quiet cell of full speed writers on small disks with iothreads.
    pub fn new(method: Method, order: Order, via: Via, points: u32) -> Self {
        Self {
            method,
            order,
            via,
            iothreads: true,
            starve: false,
            points,
            disk_size: 64 << 20,
            writers: 8,
            run: match via {
                Via::Guest => 2,
                Via::Exports => 8,
            },
            rate: 0,
            pause: Duration::from_millis(30),
            product: None,
            keep: None,
        }
    }
}

/// A pair of images, and how long it took to take them.
pub(crate) struct Point {
    pub(crate) images: [Vec<u8>; 2],
    /// Of the transaction, where it can be seen.
    pub(crate) transaction: Duration,
    /// From the transaction's start until the guest was free of everything.
    pub(crate) released: Duration,
    /// What was read at the freeze.
    pub(crate) residual: u64,
    /// The instant lies between these moments, where the writers' counters can be read.
    pub(crate) bounds: Option<Bounds>,
}

/// What takes points.
pub(crate) trait Freezer {
    /// Takes a point, or gives one up (which is no failure: the blocks stay to be copied).
    fn point(&mut self, stage: &mut Stage, number: u32) -> Result<Option<Point>>;
}

/// What a cell gave.
#[derive(Debug, Default)]
pub struct Outcome {
    points: u32,
    inexact: u32,
    given_up: u32,
    transactions: Vec<Duration>,
    released: Vec<Duration>,
    residual: u64,
    writes: u64,
    stall: Duration,
    /// Whether QEMU was alive at the end.
    pub alive: bool,
}

impl Outcome {
    /// Points that were taken and checked.
    pub fn points(&self) -> u32 {
        self.points
    }

    /// Points that were not of one instant.
    pub fn inexact(&self) -> u32 {
        self.inexact
    }

    fn add(&mut self, point: &Point) {
        self.points += 1;
        self.transactions.push(point.transaction);
        self.released.push(point.released);
        self.residual += point.residual;
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transaction, released) = (Spread::of(&self.transactions), Spread::of(&self.released));
        write!(
            f,
            "points={} inexact={} given_up={} transaction_ms={transaction} released_ms={released} residual_mib_mean={} \
             writes={} longest_stall_ms={} qemu_alive={}",
            self.points,
            self.inexact,
            self.given_up,
            (self.residual / u64::from(self.points.max(1))) >> 20,
            self.writes,
            self.stall.as_millis(),
            if self.alive { "yes" } else { "NO" },
        )
    }
}

/// Median and maximum.
struct Spread {
    median: Duration,
    max: Duration,
}

impl Spread {
    fn of(list: &[Duration]) -> Self {
        let mut sorted = list.to_vec();
        sorted.sort();
        let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
        Self {
            median: at(sorted.len() / 2),
            max: at(sorted.len().saturating_sub(1)),
        }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.1}/{:.1}",
            self.median.as_secs_f64() * 1e3,
            self.max.as_secs_f64() * 1e3
        )
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = if self.product.is_some() {
            "product"
        } else {
            "own"
        };
        write!(
            f,
            "by={by} method={:?} order={:?} via={:?} iothreads={} starve={}",
            self.method, self.order, self.via, self.iothreads, self.starve
        )
    }
}

/// Runs a cell. `say` gets a line for what is worth one on the way.
pub fn run(cell: &Cell, say: &mut dyn FnMut(&str)) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut stage = Stage::start(cell)?;
    let mut freezer: Box<dyn Freezer> = match &cell.product {
        Some(product) => Box::new(product::ByProduct::new(&stage, cell, product)?),
        None => Box::new(own::ByRig::new(&mut stage, cell)?),
    };
    let stop = AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        if cell.starve {
            let loops = std::thread::available_parallelism().map_or(2, usize::from);
            for _ in 0..loops {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
        }
        let result = points(cell, &mut stage, freezer.as_mut(), &mut outcome, say);
        stop.store(true, Ordering::Relaxed);
        result
    });
    outcome.alive = stage.is_alive();
    (outcome.writes, outcome.stall) = stage.writers_summary();
    if let Err(error) = result {
        say(&format!(
            "  failed: {error:#}\n  QEMU: {}",
            stage.machine().stderr()
        ));
        if outcome.alive {
            return Err(error);
        }
    }
    Ok(outcome)
}

fn points(
    cell: &Cell,
    stage: &mut Stage,
    freezer: &mut dyn Freezer,
    outcome: &mut Outcome,
    say: &mut dyn FnMut(&str),
) -> Result<()> {
    let mut before = Vec::new();
    for number in 0..cell.points {
        std::thread::sleep(cell.pause);
        let floor = stage.written();
        let point = freezer.point(stage, number);
        let Some(point) = point.with_context(|| format!("point {number}"))? else {
            outcome.given_up += 1;
            say(&format!("  point {number}: given up at the deadline"));
            continue;
        };
        outcome.add(&point);
        let images: [&dyn Image; 2] = [&point.images[0], &point.images[1]];
        let report = vclock::check(&images, point.bounds.as_ref())?;
        let complaint = match report.violations.first() {
            Some(first) => Some(format!(
                "{} violations, the first: {first}",
                report.violated
            )),
            None => stale(&report.newest, &before, floor),
        };
        if let Some(complaint) = complaint {
            outcome.inexact += 1;
            say(&format!("  point {number}: {complaint}"));
            keep(cell, number, &point)?;
        }
        before = report.newest;
        stage.writers_alive()?;
    }
    Ok(())
}

/// Why a pair of one instant is that of an old one, if it is: it must hold all that was known to be written before, and
/// all that the point before it held.
fn stale(newest: &[u64], before: &[u64], floor: u64) -> Option<String> {
    let total: u64 = newest.iter().sum();
    if total < floor {
        return Some(format!(
            "stale: {total} writes, {floor} were complete before"
        ));
    }
    let older = (0..)
        .zip(before)
        .find(|(writer, old)| newest.get(*writer).is_none_or(|new| new < old));
    older.map(|(writer, old)| format!("stale: writer {writer} was at {old} at the point before"))
}

fn keep(cell: &Cell, number: u32, point: &Point) -> Result<()> {
    let Some(dir) = &cell.keep else { return Ok(()) };
    std::fs::create_dir_all(dir)?;
    for (name, image) in ["vda", "vdb"].iter().zip(&point.images) {
        std::fs::write(dir.join(format!("point-{number}-{name}.raw")), image)?;
    }
    Ok(())
}
