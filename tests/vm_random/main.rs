//! Random series of everything that happens to a VM and its backups, against a real QEMU: writes that go on or stop, copies
//! ahead, points, forerun killed, QEMU ended, killed and started again, an operator's snapshots, retention. Every point is
//! the state of both disks after one of the writes, when it is made and at the end.
//!
//! `FORERUN_RANDOM_SEED` and `FORERUN_RANDOM_STEPS` make other series: the plan follows from the seed, the moments do not.
//! `FORERUN_RANDOM_LOG` prints what was done.
//! On a failure the files stay, and the log says where.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test's files need not be durable, and a test may panic and say what it measured"
)]

mod history;
#[path = "../vm_adversity/lab.rs"]
#[allow(dead_code, reason = "it is of other tests, too")]
mod lab;
mod world;

use std::path::Path;

use forerun_rig::block::mix;
use world::World;

/// Steps of a series in the gate.
const STEPS: u64 = 10;
/// Steps of one VM at most; then comes the next one.
const LONGEST: u64 = 40;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap())
}

#[test]
fn every_point_of_a_random_series_is_the_state_after_one_write() {
    // Hundreds of runs would wait for the disk most of the time.
    let memory = Path::new("/dev/shm");
    let room = |stat: rustix::fs::StatVfs| stat.f_bavail * stat.f_frsize > 4 << 30;
    if rustix::fs::statvfs(memory).is_ok_and(room) {
        tempfile::env::override_temp_dir(memory).unwrap();
    }
    let clock = std::time::UNIX_EPOCH.elapsed().unwrap();
    let chance = mix(clock.as_secs() ^ u64::from(clock.subsec_nanos()) << 20) % 1_000_000;
    let seeds = match number("FORERUN_RANDOM_SEED") {
        Some(seed) => vec![seed],
        None => vec![2, chance],
    };
    for mut seed in seeds {
        let mut left = number("FORERUN_RANDOM_STEPS").unwrap_or(STEPS);
        while left > 0 {
            let steps = left.min(LONGEST);
            World::new(seed).series(steps);
            left -= steps;
            seed += 1;
        }
    }
}
