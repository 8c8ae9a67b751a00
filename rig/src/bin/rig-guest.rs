//! The programs that run inside a test guest (or on the host, on files and devices): `stamp` and `vclock`.
//!
//! ```text
//! rig-guest stamp  [--seed N] [--span MIB] [--trim] [--rate N] [--steps N] DEVICE...
//! rig-guest vclock [--seed N] [--writers N] [--run N] [--rate N] [--seconds N] DEVICE...
//! ```

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use forerun_rig::block::{BlockDevice, DirectDevice};
use forerun_rig::{stamp, vclock};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("rig-guest: failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let mut words = std::env::args().skip(1);
    let program = words.next().unwrap_or_default();
    let arguments = Arguments::parse(words)?;
    match program.as_str() {
        "stamp" => run_stamp(&arguments),
        "vclock" => run_vclock(&arguments),
        _ => Err(io::Error::other(
            "usage: rig-guest stamp|vclock [OPTIONS] DEVICE...",
        )),
    }
}

fn run_stamp(arguments: &Arguments) -> io::Result<()> {
    let options = stamp::Options {
        seed: arguments.number("seed")?.unwrap_or(1),
        span: arguments.number("span")?.map(|mib| mib << 20),
        trim: arguments.has("trim"),
        rate: arguments
            .number("rate")?
            .and_then(|rate| u32::try_from(rate).ok()),
        steps: arguments.number("steps")?,
    };
    let mut devices = arguments
        .devices
        .iter()
        .map(|path| open(path))
        .collect::<io::Result<Vec<_>>>()?;
    stamp::run(&mut devices, &options, &mut say).map(|_| ())
}

fn run_vclock(arguments: &Arguments) -> io::Result<()> {
    let sizes = arguments
        .devices
        .iter()
        .map(|path| Ok(DirectDevice::open(path)?.size()))
        .collect::<io::Result<Vec<_>>>()?;
    let seed = arguments.number("seed")?.unwrap_or(1);
    let writers = arguments.number("writers")?.unwrap_or(8);
    let layout = vclock::Layout::new(seed, &sizes, writers, arguments.number("run")?.unwrap_or(4))?;
    let rate = arguments.number("rate")?.unwrap_or(0);
    let shared = vclock::Shared::new(layout, u32::try_from(rate).map_err(io::Error::other)?);
    let open = |disk| open(&arguments.devices[usize::try_from(disk).unwrap_or(usize::MAX)]);
    let limit = arguments.number("seconds")?.map(Duration::from_secs);
    vclock::run(&shared, &open, limit, &mut say)
}

fn open(path: &Path) -> io::Result<Box<dyn BlockDevice>> {
    let device = DirectDevice::open(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    Ok(Box::new(device))
}

/// The console is slow and may be full: a line that cannot be written is not worth failing for.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _full = writeln!(out, "{line}").and_then(|()| out.flush());
}

struct Arguments {
    options: BTreeMap<String, String>,
    devices: Vec<PathBuf>,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> io::Result<Self> {
        let mut arguments = Self {
            options: BTreeMap::new(),
            devices: Vec::new(),
        };
        while let Some(word) = words.next() {
            match word.strip_prefix("--") {
                None => arguments.devices.push(word.into()),
                Some("trim") => drop(arguments.options.insert("trim".into(), String::new())),
                Some(name) => {
                    let missing = || io::Error::other(format!("--{name} needs a value"));
                    let value = words.next().ok_or_else(missing)?;
                    arguments.options.insert(name.to_owned(), value);
                }
            }
        }
        if arguments.devices.is_empty() {
            return Err(io::Error::other("no device given"));
        }
        Ok(arguments)
    }

    fn has(&self, name: &str) -> bool {
        self.options.contains_key(name)
    }

    fn number(&self, name: &str) -> io::Result<Option<u64>> {
        let Some(text) = self.options.get(name) else {
            return Ok(None);
        };
        let number = text
            .parse()
            .map_err(|_| io::Error::other(format!("--{name} {text}: no number")))?;
        Ok(Some(number))
    }
}
