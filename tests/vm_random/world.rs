//! A VM of two disks, its repository, and the steps of a series.

mod ends;
mod writer;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use forerun_rig::block::mix;
use rustix::process::Signal;
use serde_json::Value;

use crate::history::{History, SECTOR, Write, differing, digests};
use crate::lab::{Lab, MIB, Ran, Still, WAIT, image, qemu_img};

/// What the disks are called.
const NAMES: [&str; 2] = ["vda", "vdb"];

/// Numbers that follow from a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(mix(self.0)) % end
    }

    fn index(&mut self, end: usize) -> usize {
        usize::try_from(self.below(end as u64)).unwrap()
    }

    fn one_in(&mut self, chance: u64) -> bool {
        self.below(chance) == 0
    }

    fn of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.index(choices.len())]
    }
}

/// A disk's image; over a base while an operator's snapshot is there.
struct Image {
    path: PathBuf,
    format: &'static str,
    base: Option<(PathBuf, &'static str)>,
}

/// A point that was compared, and what its disks must hold for ever.
struct Point {
    id: String,
    disks: Vec<(usize, Vec<u64>)>,
}

/// How fast is written while a command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    Still,
    Slow,
    Fast,
}

/// How a command is run.
#[derive(Debug, Clone, Copy)]
struct Manner {
    pace: Pace,
    /// It is killed after so long.
    kill: Option<Duration>,
    /// QEMU is killed after so long.
    end: Option<Duration>,
    /// No point of it is older than what was written by then.
    due: Option<SystemTime>,
}

#[derive(Default, Debug)]
struct Counts {
    points: usize,
    compared: usize,
    killed: usize,
    /// Times that the guard of a killed run was waited for.
    busy: usize,
    restarts: usize,
    ended: usize,
}

pub(crate) struct World {
    seed: u64,
    lab: Lab,
    vm: Option<Still>,
    images: Vec<Image>,
    history: History,
    /// Writes that may not have ended.
    flying: Vec<Write>,
    /// How many writes this QEMU was told of that are not waited for, by disk.
    launched: [u64; 2],
    plan: Dice,
    writer: Dice,
    log: Vec<String>,
    points: Vec<Point>,
    /// The newest point's disks, while it is of both.
    newest: Option<Vec<Vec<u8>>>,
    /// The last command was killed; what it left may be there.
    killed: bool,
    /// An overlay or a filter of a freeze may be above a disk.
    covered: bool,
    counts: Counts,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut plan = Dice(mix(seed));
        let mut lab = Lab::new();
        lab.dir.disable_cleanup(true);
        eprintln!("seed {seed}: {}", lab.path().display());
        // Another repository in the place of the usual one.
        let repo = lab.repo().display().to_string();
        fs::remove_dir_all(&repo).unwrap();
        let block = plan.of(&["64KiB", "64KiB", "128KiB", "256KiB"]);
        let compression = plan.of(&["lz4", "zstd", "none"]);
        let words = [
            "init",
            &repo,
            "--block-size",
            block,
            "--compression",
            compression,
        ];
        lab.forerun(&words).ended(0);
        let mut images = Vec::new();
        let mut sizes = Vec::new();
        for name in NAMES {
            let odd = plan.below(3) * 8 * MIB + plan.below(2) * 512 * plan.below(128);
            let size = 32 * MIB + odd;
            let format = if name == "vdb" {
                plan.of(&["qcow2", "raw"])
            } else {
                "qcow2"
            };
            let path = lab.path().join(name);
            if format == "raw" {
                image(lab.path(), name, format, size);
            } else {
                let cluster = format!("cluster_size={}", plan.of(&["64k", "16k", "4k"]));
                let (path, size) = (path.to_str().unwrap(), size.to_string());
                qemu_img(&["create", "-q", "-f", format, "-o", &cluster, path, &size]);
            }
            sizes.push(usize::try_from(size).unwrap());
            images.push(Image {
                path,
                format,
                base: None,
            });
        }
        let mut world = Self {
            seed,
            lab,
            vm: None,
            images,
            history: History::new(&sizes),
            flying: Vec::new(),
            launched: [0; 2],
            plan,
            writer: Dice(mix(!seed)),
            log: vec![format!("blocks of {block}, {compression}, disks {sizes:?}")],
            points: Vec::new(),
            newest: None,
            killed: false,
            covered: false,
            counts: Counts::default(),
        };
        world.start();
        world
    }

    /// Makes the steps, and compares all points once more at the end.
    pub(crate) fn series(mut self, steps: u64) {
        let begin = Instant::now();
        for step in 0..steps {
            let burst = self.plan.below(120);
            for _ in 0..burst {
                self.write();
            }
            self.log.push(format!(
                "{step}, {} ms: {burst} writes",
                begin.elapsed().as_millis()
            ));
            if !self.step() {
                break;
            }
        }
        let newest = self.points.len().saturating_sub(2);
        self.forget(newest);
        self.compare_all();
        self.done(&["verify"]);
        self.lab.dir.disable_cleanup(false);
        eprintln!(
            "seed {}: {steps} steps, {} writes, {:?}, {} s",
            self.seed,
            self.history.total(),
            self.counts,
            begin.elapsed().as_secs()
        );
        if std::env::var_os("FORERUN_RANDOM_LOG").is_some() {
            self.tell();
        }
    }

    fn tell(&self) {
        for line in &self.log {
            eprintln!("  {line}");
        }
    }

    /// One step; false: nothing can follow it.
    fn step(&mut self) -> bool {
        match self.plan.below(100) {
            0..34 => return self.backup(),
            34..44 => return self.ahead(&["precopy", "--once"], Duration::from_millis(250), None),
            44..48 => {
                let until = in_seconds(2);
                return self.ahead(
                    &["precopy", "--until", &spelled(until)],
                    Duration::from_secs(3),
                    None,
                );
            }
            48..54 => {
                let wait = 3 + self.plan.below(3);
                let due = in_seconds(wait);
                let method = self.plan.of(&["fleece", "snapshot"]);
                let words = [
                    "run",
                    "--at",
                    &spelled(due),
                    "--freeze",
                    method,
                    "--deadline",
                    "60s",
                ];
                return self.ahead(&words, Duration::from_secs(wait + 1), Some(due));
            }
            54..60 => {
                let share = self.plan.of(&["100%", "30%"]);
                return self.ahead(
                    &["audit", "--share", share],
                    Duration::from_millis(250),
                    None,
                );
            }
            60..63 => {
                self.newest = None;
                return self.ahead(&["untrack"], Duration::from_millis(50), None);
            }
            63..69 => self.changed(),
            69..71 => {
                self.recover();
            }
            71..73 => return self.ahead(&["drop-session"], Duration::from_millis(50), None),
            73..79 => self.operator(),
            79..87 => self.restart(),
            87..93 => self.power_cut(),
            _ => {
                let count = self.plan.index(3);
                self.forget(count);
                let any = self.points.len();
                if any > 0 {
                    let at = self.plan.index(any);
                    self.compare_again(at);
                }
            }
        }
        true
    }

    fn backup(&mut self) -> bool {
        let method = self
            .plan
            .of(&["fleece", "fleece", "snapshot", "snapshot", ""]);
        let mut words = vec!["backup", "--quiesce", "never", "--deadline", "60s"];
        if !method.is_empty() {
            words.extend(["--freeze", method]);
        }
        self.ahead(&words, Duration::from_millis(400), None)
    }

    /// A command on the VM while writes go on or not; it may be killed, or QEMU.
    fn ahead(&mut self, words: &[&str], typical: Duration, due: Option<SystemTime>) -> bool {
        let typical = u64::try_from(typical.as_millis()).unwrap();
        let pace = match self.plan.below(3) {
            0 => Pace::Still,
            1 => Pace::Slow,
            _ => Pace::Fast,
        };
        let moment = Duration::from_millis(self.plan.below(typical));
        let fate = self.plan.below(20);
        let manner = Manner {
            pace,
            kill: (fate < 5).then_some(moment),
            end: (4..7).contains(&fate).then_some(moment),
            due,
        };
        let target = self.target();
        let words = [&[words[0], &target, "--as", "vm"], &words[1..]].concat();
        self.command(&words, manner)
    }

    fn command(&mut self, words: &[&str], manner: Manner) -> bool {
        self.log.push(format!("{words:?}, {manner:?}"));
        let asked = Instant::now();
        loop {
            self.history.mark();
            self.covered |= matches!(words[0], "backup" | "run");
            let mut running = self.lab.begin(words);
            let began = Instant::now();
            let (mut killed, mut earliest) = (false, 0);
            while running.is_running() {
                assert!(began.elapsed() < WAIT, "{words:?} hangs");
                if manner.due.is_some_and(|due| SystemTime::now() < due) {
                    earliest = self.history.since();
                }
                if manner.kill.is_some_and(|at| began.elapsed() >= at) && !killed {
                    running.signal(Signal::KILL);
                    killed = true;
                }
                if manner.end.is_some_and(|at| began.elapsed() >= at) && self.vm.is_some() {
                    self.vm = None;
                    self.flying.clear();
                }
                match manner.pace {
                    Pace::Fast if self.vm.is_some() => self.write(),
                    Pace::Slow if self.vm.is_some() && self.writer.one_in(5) => self.write(),
                    _ => std::thread::sleep(Duration::from_millis(2)),
                }
            }
            let ran = running.end();
            self.log.push(format!(
                " after {} ms: code {}, {} writes",
                began.elapsed().as_millis(),
                ran.code,
                self.history.since()
            ));
            if self.vm.is_none() {
                assert_ne!(ran.code, 101, "{}", ran.words);
                self.killed |= killed;
                self.collect(earliest, None);
                return self.after_its_end();
            }
            if ran.code == -1 && killed {
                self.counts.killed += 1;
                self.killed = true;
                self.collect(earliest, None);
                return true;
            }
            if ran.code == 6 && self.killed && asked.elapsed() < WAIT {
                // The guard of the one that was killed is still at work.
                self.counts.busy += 1;
                continue;
            }
            self.expect(words, &ran, earliest);
            return true;
        }
    }

    /// A command that ended by itself did what it should.
    fn expect(&mut self, words: &[&str], ran: &Ran, earliest: usize) {
        // There may be nothing to drop or to audit.
        let nothing = ran.code == 1
            && (words[0] == "drop-session" || words[0] == "audit" && self.newest.is_none());
        assert!(
            matches!(ran.code, 0 | 3) || nothing,
            "{words:?}: {} {} {}",
            ran.code,
            ran.words,
            ran.json
        );
        let findings = &ran.json["targets"][0]["audit"]["findings"];
        assert!(findings.as_array().is_none_or(Vec::is_empty), "{findings}");
        (self.killed, self.covered) = (false, false);
        let made = matches!(words[0], "backup" | "run").then(|| ran.point());
        self.collect(earliest, made.as_deref());
        self.vm.as_mut().unwrap().is_clean();
    }

    fn target(&self) -> String {
        format!("qmp:{}", self.lab.path().join("qmp.sock").display())
    }

    /// A command that is not disturbed.
    fn done(&mut self, words: &[&str]) -> Ran {
        self.log.push(format!("{words:?}"));
        let begin = Instant::now();
        loop {
            let ran = self.lab.forerun(words);
            if ran.code == 6 && begin.elapsed() < WAIT {
                self.counts.busy += 1;
                continue;
            }
            return ran.done();
        }
    }

    /// Takes the points that are new, each the state after a write since the mark.
    fn collect(&mut self, earliest: usize, made: Option<&str>) {
        let listed = self.lab.forerun(&["list"]).done();
        let mut fresh = Vec::new();
        for point in listed.json["points"].as_array().unwrap() {
            let id = point["id"].as_str().unwrap().to_owned();
            if self.points.iter().any(|known| known.id == id) {
                continue;
            }
            let names = point["disks"].as_array().unwrap().iter();
            let names = names.map(|disk| disk["key"].as_str().unwrap());
            let disk = |name| NAMES.iter().position(|it| *it == name).unwrap();
            fresh.push((id, names.map(disk).collect::<Vec<usize>>()));
        }
        assert!(fresh.len() <= 1, "{fresh:?}");
        let made = made.is_none_or(|made| fresh.iter().any(|(id, _)| id == made));
        assert!(made, "the point is not listed: {}", listed.json);
        for (id, disks) in fresh {
            let found = self.restored(&id, &disks);
            let cut = self.history.cut(&found, earliest);
            let at = cut.unwrap_or_else(|wrong| panic!("point {id} is of no instant: {wrong}"));
            self.log.push(format!(
                " point {id} of {disks:?}: after write {at} of {}, not before {earliest}",
                self.history.since()
            ));
            self.drop_restored(&id);
            self.counts.points += 1;
            let digests = found.iter().map(|(disk, bytes)| (*disk, digests(bytes)));
            let disks = digests.collect();
            self.points.push(Point { id, disks });
            let both = found.len() == NAMES.len();
            self.newest = both.then(|| found.into_iter().map(|(_, bytes)| bytes).collect());
        }
    }

    fn restored(&mut self, id: &str, disks: &[usize]) -> Vec<(usize, Vec<u8>)> {
        let path = self.lab.restore_all(id);
        let read = |disk: &usize| (*disk, fs::read(path.join(format!("{}.raw", NAMES[*disk]))));
        let found = disks.iter().map(read);
        let found = found.map(|(disk, bytes)| (disk, bytes.unwrap())).collect();
        // It stays where the comparison fails.
        self.counts.compared += 1;
        found
    }

    fn drop_restored(&self, id: &str) {
        fs::remove_dir_all(self.lab.path().join(format!("restored-{id}"))).unwrap();
    }

    fn compare_again(&mut self, at: usize) {
        let id = self.points[at].id.clone();
        let disks: Vec<usize> = self.points[at]
            .disks
            .iter()
            .map(|(disk, _)| *disk)
            .collect();
        for ((disk, bytes), (_, expected)) in self
            .restored(&id, &disks)
            .iter()
            .zip(&self.points[at].disks)
        {
            let found = digests(bytes);
            let pairs = found.iter().zip(expected).enumerate();
            let wrong = pairs.filter(|(_, (a, b))| a != b).map(|(block, _)| block);
            let wrong: Vec<usize> = wrong.collect();
            assert!(
                wrong.is_empty() && found.len() == expected.len(),
                "point {id} is no longer what it was: disk {disk}, 64 KiB blocks {wrong:?}"
            );
        }
        self.drop_restored(&id);
    }

    fn compare_all(&mut self) {
        for at in 0..self.points.len() {
            self.compare_again(at);
        }
    }

    /// Forgets some points, and deletes what nothing needs any more.
    fn forget(&mut self, count: usize) {
        for _ in 0..count.min(self.points.len().saturating_sub(1)) {
            let at = self.plan.index(self.points.len());
            if at + 1 == self.points.len() {
                self.newest = None;
            }
            let id = self.points.remove(at).id;
            self.done(&["forget", "--point", &id]);
        }
        self.done(&["prune"]);
    }

    fn recover(&mut self) {
        let target = self.target();
        self.done(&["recover", &target, "--as", "vm"]);
        (self.killed, self.covered) = (false, false);
        self.vm.as_mut().unwrap().is_clean();
    }

    /// Whatever differs from the newest point is told.
    fn changed(&mut self) {
        let target = self.target();
        let ran = self.lab.forerun(&["changed", &target, "--as", "vm"]);
        self.log.push(format!("changed: code {}", ran.code));
        let Some(newest) = &self.newest else { return };
        if ran.code == 6 && self.killed {
            return;
        }
        let ran = ran.done();
        for disk in ran.at("/targets/0/disks").as_array().unwrap() {
            let at = NAMES.iter().position(|name| disk["disk"] == *name).unwrap();
            if !disk["whole"].is_null() {
                continue;
            }
            let number = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
            let extents = disk["extents"].as_array().unwrap().iter();
            let told: Vec<(usize, usize)> = extents
                .map(|it| (number(&it["offset"]), number(&it["length"])))
                .collect();
            for sector in differing(&newest[at], &self.history.now[at]) {
                let byte = sector * SECTOR;
                let inside = told
                    .iter()
                    .any(|(at, length)| (*at..at + length).contains(&byte));
                assert!(inside, "disk {at}: sector {sector} has changed: {told:?}");
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}, {:?}: what was done:", self.seed, self.counts);
            self.tell();
            eprintln!("the files are in {}", self.lab.path().display());
        }
    }
}

fn in_seconds(seconds: u64) -> SystemTime {
    SystemTime::now() + Duration::from_secs(seconds)
}

/// As the command line takes it.
fn spelled(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).unwrap().to_string()
}
