//! The rig by hand: check images, run stamp programs over exports, measure freezes.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use forerun_rig::bench::Bench;
use forerun_rig::block::{Image, RawFile};
use forerun_rig::demo::Demo;
use forerun_rig::freeze::{self, Cell, Method, Order, Product, Via};
use forerun_rig::{exports, stamp, vclock};

/// A guest that was forgotten ends by itself.
const DEMO_LASTS: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Parser)]
#[command(about = "The test rig of forerun", version)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Are these images the state after some write of `rig-guest stamp`, on all disks? Prints the write.
    CheckStamp { images: Vec<PathBuf> },
    /// Do these images of the disks of `rig-guest vclock` show one instant?
    CheckVclock { images: Vec<PathBuf> },
    /// Runs the concurrent writers on writable NBD exports.
    Vclock(VclockArgs),
    /// Takes many points under concurrent writers and checks each.
    FreezeExact(FreezeArgs),
    /// Boots a guest that writes to two disks all the time, and stays until that QEMU ends.
    DemoGuest(DemoArgs),
    /// Defines the domain of `scripts/bench-guest.sh` under a libvirtd of its own, and keeps both until standard input ends.
    BenchDomain(BenchArgs),
}

#[derive(Args)]
struct BenchArgs {
    /// For libvirtd's files, sockets and images; a short path.
    #[arg(long)]
    dir: PathBuf,
    /// What is put into the root of the guest.
    #[arg(long)]
    tree: PathBuf,
    /// Of `vda`; `vdb` has half of it.
    #[arg(long, default_value_t = 512)]
    disk_mib: u64,
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
}

#[derive(Args)]
struct DemoArgs {
    /// For sockets, the console's log, and the images where none are given.
    #[arg(long)]
    dir: PathBuf,
    /// Of each disk.
    #[arg(long, default_value_t = 64)]
    disk_mib: u64,
    /// What part of each disk it writes to.
    #[arg(long, default_value_t = 48)]
    span_mib: u64,
    /// Writes that are there from the start, in images that are made.
    #[arg(long, default_value_t = 0)]
    fill: u64,
    /// Writes a second.
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// An image for the qcow2 disk, made when it is not there.
    #[arg(long)]
    vda: Option<PathBuf>,
    /// An image for the raw disk, made when it is not there.
    #[arg(long)]
    vdb: Option<PathBuf>,
    /// The VM's UUID.
    #[arg(long)]
    uuid: Option<String>,
}

#[derive(Args)]
struct VclockArgs {
    /// The NBD server's socket.
    #[arg(long)]
    socket: PathBuf,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Writers on each disk.
    #[arg(long, default_value_t = 8)]
    writers: u64,
    /// Slots in a 64 KiB block before the next block.
    #[arg(long, default_value_t = 4)]
    run: u64,
    /// Writes a second of each writer; 0 for as fast as it goes.
    #[arg(long, default_value_t = 0)]
    rate: u32,
    #[arg(long)]
    seconds: Option<u64>,
    /// The exports' names, one for each disk.
    exports: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum YesNo {
    Yes,
    No,
}

#[derive(Clone, Copy, ValueEnum)]
enum MethodArg {
    Fleece,
    Snapshot,
}

#[derive(Clone, Copy, ValueEnum)]
enum OrderArg {
    Right,
    Wrong,
}

#[derive(Clone, Copy, ValueEnum)]
enum ViaArg {
    Guest,
    Exports,
}

/// Options that are given several times (or not at all) make a table of all their combinations.
#[derive(Args)]
struct FreezeArgs {
    #[arg(long, value_delimiter = ',', default_value = "fleece,snapshot")]
    method: Vec<MethodArg>,
    #[arg(long, default_value = "right")]
    order: OrderArg,
    #[arg(long, value_delimiter = ',', default_value = "guest,exports")]
    via: Vec<ViaArg>,
    #[arg(long, value_delimiter = ',', default_value = "yes,no")]
    iothreads: Vec<YesNo>,
    #[arg(long, value_delimiter = ',', default_value = "no,yes")]
    starve: Vec<YesNo>,
    /// Points in each cell.
    #[arg(long, default_value_t = 125)]
    points: u32,
    /// Of each of the two disks.
    #[arg(long, default_value_t = 64)]
    disk_mib: u64,
    /// Writers on each disk.
    #[arg(long, default_value_t = 8)]
    writers: u64,
    /// Slots in a 64 KiB block before the next block: few enough that there are always clean blocks to come, or no
    /// order of actions can lose a write [default: 2 in a guest, 8 over exports]
    #[arg(long)]
    run: Option<u64>,
    /// Writes a second of each writer; 0 for as fast as it goes.
    #[arg(long, default_value_t = 0)]
    rate: u32,
    /// Milliseconds before each point.
    #[arg(long, default_value_t = 30)]
    pause_ms: u64,
    /// Keeps the images of inexact points here.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Takes the points with this program's `backup` and `restore`.
    #[arg(long)]
    with_forerun: Option<PathBuf>,
    /// More words for every command of that program.
    #[arg(long, allow_hyphen_values = true)]
    forerun_arg: Vec<String>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Verb::CheckStamp { images } => check_stamp(&images),
        Verb::CheckVclock { images } => check_vclock(&images),
        Verb::Vclock(args) => run_vclock(&args).map(|()| true),
        Verb::FreezeExact(args) => Ok(freeze_exact(&args)),
        Verb::DemoGuest(args) => demo_guest(&args).map(|()| true),
        Verb::BenchDomain(args) => bench_domain(&args).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("rig: {error:#}"));
            ExitCode::from(2)
        }
    }
}

/// A reader that has gone away (`rig ... | head`) is no reason to fail.
fn say(line: &str) {
    let _gone = writeln!(std::io::stdout(), "{line}");
}

fn open(paths: &[PathBuf]) -> Result<Vec<RawFile>> {
    if paths.is_empty() {
        bail!("no image given");
    }
    paths
        .iter()
        .map(|path| RawFile::open(path).with_context(|| path.display().to_string()))
        .collect()
}

fn as_images(files: &[RawFile]) -> Vec<&dyn Image> {
    files.iter().map(|file| file as &dyn Image).collect()
}

fn check_stamp(paths: &[PathBuf]) -> Result<bool> {
    let files = open(paths)?;
    let verdict = stamp::check(&as_images(&files))?;
    match &verdict {
        stamp::Verdict::Empty => say("exact: no write yet"),
        stamp::Verdict::Exact(step) => say(&format!("exact: after write {step}")),
        stamp::Verdict::Inexact {
            newest,
            wrong,
            examples,
        } => {
            say(&format!(
                "INEXACT: {wrong} slots contradict the state after write {newest}"
            ));
            for example in examples {
                say(&format!("  {example}"));
            }
        }
    }
    Ok(verdict.is_exact())
}

fn check_vclock(paths: &[PathBuf]) -> Result<bool> {
    let files = open(paths)?;
    let report = vclock::check(&as_images(&files), None)?;
    if report.is_exact() {
        say(&format!("exact: newest writes {:?}", report.newest));
    } else {
        say(&format!("INEXACT: {} violations", report.violated));
        for violation in &report.violations {
            say(&format!("  {violation}"));
        }
    }
    Ok(report.is_exact())
}

fn run_vclock(args: &VclockArgs) -> Result<()> {
    let sizes = args
        .exports
        .iter()
        .map(|export| Ok(exports::connect(&args.socket, export)?.size()))
        .collect::<Result<Vec<_>>>()?;
    let layout = vclock::Layout::new(args.seed, &sizes, args.writers, args.run)?;
    let shared = vclock::Shared::new(layout, args.rate);
    let open = |disk| {
        let export = usize::try_from(disk)
            .ok()
            .and_then(|disk| args.exports.get(disk));
        exports::connect(&args.socket, export.map_or("", String::as_str))
    };
    let limit = args.seconds.map(Duration::from_secs);
    Ok(vclock::run(&shared, &open, limit, &mut |line| say(line))?)
}

fn demo_guest(args: &DemoArgs) -> Result<()> {
    let demo = Demo {
        dir: args.dir.clone(),
        size: args.disk_mib << 20,
        span_mib: args.span_mib,
        fill: args.fill,
        rate: args.rate,
        images: [args.vda.clone(), args.vdb.clone()],
        uuid: args.uuid.clone(),
    };
    let mut guest = demo.boot()?;
    say("up");
    guest.wait_exit(DEMO_LASTS)
}

fn bench_domain(args: &BenchArgs) -> Result<()> {
    let bench = Bench::define(&args.dir, &args.tree, args.disk_mib << 20, args.vcpus)?;
    say(&bench.places()?.to_string());
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}

fn freeze_exact(args: &FreezeArgs) -> bool {
    let mut good = true;
    for cell in cells(args) {
        let outcome = freeze::run(&cell, &mut |line| say(line));
        match outcome {
            Ok(outcome) => {
                say(&format!("{cell} {outcome}"));
                good &= outcome.inexact() == 0 && outcome.alive;
            }
            Err(error) => {
                say(&format!("{cell} FAILED: {error:#}"));
                good = false;
            }
        }
    }
    good
}

fn cells(args: &FreezeArgs) -> Vec<Cell> {
    let mut cells = Vec::new();
    for starve in &args.starve {
        for method in &args.method {
            for via in &args.via {
                for iothreads in &args.iothreads {
                    cells.push(cell(args, *method, *via, *iothreads, *starve));
                }
            }
        }
    }
    cells
}

fn cell(
    args: &FreezeArgs,
    method: MethodArg,
    via: ViaArg,
    iothreads: YesNo,
    starve: YesNo,
) -> Cell {
    let method = match method {
        MethodArg::Fleece => Method::Fleece,
        MethodArg::Snapshot => Method::Snapshot,
    };
    let order = match args.order {
        OrderArg::Right => Order::Right,
        OrderArg::Wrong => Order::Wrong,
    };
    let via = match via {
        ViaArg::Guest => Via::Guest,
        ViaArg::Exports => Via::Exports,
    };
    let mut cell = Cell::new(method, order, via, args.points);
    cell.iothreads = matches!(iothreads, YesNo::Yes);
    cell.starve = matches!(starve, YesNo::Yes);
    cell.disk_size = args.disk_mib << 20;
    cell.writers = args.writers;
    cell.run = args.run.unwrap_or(cell.run);
    cell.rate = args.rate;
    cell.pause = Duration::from_millis(args.pause_ms);
    cell.keep.clone_from(&args.keep);
    let extra = args.forerun_arg.clone();
    cell.product = args
        .with_forerun
        .clone()
        .map(|program| Product { program, extra });
    cell
}
