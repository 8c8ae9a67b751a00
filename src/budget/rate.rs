//! The rate of all members together: when the next request may begin, in a file that they share.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::FlockOperation;

use crate::clock;
use crate::throttle::{schedule, takes};

/// The largest request that anybody makes at a time.
const LARGEST: u64 = 1 << 20;
/// Who cannot look, since somebody else does, tries again after so long.
const BUSY: Duration = Duration::from_micros(500);
/// Somebody who looks for so long is stopped; then each keeps the rate for itself.
const STOPPED: Duration = Duration::from_secs(2);

/// The file, and what is done without it.
#[derive(Debug)]
pub(super) struct Bucket {
    file: File,
    /// Since when somebody else has it.
    busy: Option<Duration>,
    alone: Duration,
}

impl Bucket {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        Ok(Self {
            file,
            busy: None,
            alone: Duration::ZERO,
        })
    }

    /// Takes so many bytes if they may go now; else says how long to wait before the next try.
    pub(super) fn take(&mut self, bytes: u64, rate: u64) -> Option<Duration> {
        let now = clock::since_boot();
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => self.busy = None,
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let since = *self.busy.get_or_insert(now);
                if now.saturating_sub(since) < STOPPED {
                    return Some(BUSY);
                }
                return self.take_alone(bytes, rate, now);
            }
            Err(_) => return self.take_alone(bytes, rate, now),
        }
        crate::fault::step("budget:rate");
        let mut word = [0; 8];
        // A file that is too short is new.
        self.file.read_exact_at(&mut word, 0).ok();
        let free_at = Duration::from_nanos(u64::from_le_bytes(word));
        let (wait, next) = decide(free_at, now, bytes, rate);
        let mut written = Ok(());
        if let Some(next) = next {
            let next = u64::try_from(next.as_nanos()).unwrap_or(u64::MAX);
            written = self.file.write_all_at(&next.to_le_bytes(), 0);
        }
        rustix::fs::flock(&self.file, FlockOperation::Unlock).ok();
        match written {
            Ok(()) => wait,
            Err(_) => self.take_alone(bytes, rate, now),
        }
    }

    fn take_alone(&mut self, bytes: u64, rate: u64, now: Duration) -> Option<Duration> {
        let (wait, next) = decide(self.alone, now, bytes, rate);
        if let Some(next) = next {
            self.alone = next;
        }
        wait
    }
}

/// How long to wait, or when the next request may begin after this one. What is further ahead than a request takes was written
/// before the host was started anew, or for a lower rate, and counts as now.
fn decide(
    free_at: Duration,
    now: Duration,
    bytes: u64,
    rate: u64,
) -> (Option<Duration>, Option<Duration>) {
    let free_at = if free_at > now + takes(bytes.max(LARGEST), rate) {
        now
    } else {
        free_at
    };
    let (begin, next) = schedule(free_at, now, bytes, rate);
    if begin > now {
        (Some(begin.saturating_sub(now)), None)
    } else {
        (None, Some(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: u64 = 16 << 20;

    #[test]
    fn what_another_boot_left_counts_as_now() {
        let now = Duration::from_secs(100);
        let (wait, next) = decide(Duration::from_secs(90_000), now, 1 << 18, RATE);
        assert_eq!((wait, next), (None, Some(now + takes(1 << 18, RATE))));
        let wait = Duration::from_millis(3);
        assert_eq!(decide(now + wait, now, 1 << 18, RATE), (Some(wait), None));
    }

    #[test]
    fn several_share_one_rate() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rate");
        let begin = clock::now();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut bucket = Bucket::open(&path).unwrap();
                    for _ in 0..16 {
                        while let Some(wait) = bucket.take(1 << 18, RATE) {
                            clock::sleep(wait);
                        }
                    }
                });
            }
        });
        // 16 MiB at 16 MiB a second, but for a burst of 0.1 s and the last request.
        let took = (clock::now() - begin).as_secs_f64();
        assert!((0.85..3.0).contains(&took), "{took} s");
    }

    #[test]
    fn one_that_is_stopped_with_the_file_stops_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rate");
        let holds = Bucket::open(&path).unwrap();
        rustix::fs::flock(&holds.file, FlockOperation::NonBlockingLockExclusive).unwrap();
        let mut bucket = Bucket::open(&path).unwrap();
        let begin = clock::now();
        while let Some(wait) = bucket.take(1 << 18, RATE) {
            clock::sleep(wait);
        }
        let took = clock::now() - begin;
        assert!(took >= STOPPED && took < STOPPED * 3, "{took:?}");
    }
}
