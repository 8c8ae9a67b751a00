//! Guests boot, stamp, survive a kill and freeze their file systems. Needs QEMU; a boot takes seconds.

#![expect(clippy::unwrap_used, reason = "helpers of tests, too")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use forerun_rig::block::{Image, RawFile};
use forerun_rig::guest::{Bus, Disk, Guest, Program};
use forerun_rig::{stamp, vclock};

const MIB: u64 = 1 << 20;
/// A machine that is busy with other things makes a guest under TCG slow, not wrong.
const WAIT: Duration = Duration::from_secs(240);

fn dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("rig").tempdir().unwrap()
}

/// The images of a guest that does not run, as raw files.
fn images(guest: &Guest) -> Vec<RawFile> {
    let raw = |id: &str| {
        let (image, raw) = (
            guest.image(id).unwrap(),
            guest.dir().join(format!("{id}.check")),
        );
        let mut convert = std::process::Command::new("qemu-img");
        assert!(
            convert
                .args(["convert", "-O", "raw"])
                .args([&image, &raw])
                .status()
                .unwrap()
                .success()
        );
        RawFile::open(&raw).unwrap()
    };
    guest.disks().iter().map(|disk| raw(disk.id())).collect()
}

#[test]
fn a_stamping_guest_is_exact_after_kills_and_goes_on() {
    let dir = dir();
    let mut guest = Guest::builder(dir.path())
        .disk(Disk::qcow2("vda", 64 * MIB).iothread(true))
        .disk(Disk::raw("vdb", 64 * MIB))
        .program(Program::Stamp("--trim --span 16 /dev/vda /dev/vdb".into()))
        .boot()
        .unwrap();
    guest.wait_for("stamp: seq ", WAIT).unwrap();
    guest.shutdown().unwrap();
    let first = verdict(&guest);
    guest.restart().unwrap();
    // How much it repairs depends on where the shutdown met it: a trim may not have been done.
    guest.wait_for("stamp: resume", WAIT).unwrap();
    guest.wait_for("stamp: seq ", WAIT).unwrap();
    guest.kill9().unwrap();
    assert!(!guest.is_alive());
    guest.restart().unwrap();
    guest.wait_for("stamp: seq ", WAIT).unwrap();
    guest.shutdown().unwrap();
    assert!(verdict(&guest) > first);
}

fn verdict(guest: &Guest) -> u64 {
    let images = images(guest);
    match stamp::check(&[&images[0], &images[1]]).unwrap() {
        stamp::Verdict::Exact(step) => step,
        other => panic!("{other:?}"),
    }
}

#[test]
fn concurrent_writers_leave_one_instant() {
    let dir = dir();
    let mut guest = Guest::builder(dir.path())
        .vcpus(2)
        .disk(Disk::qcow2("vda", 64 * MIB).iothread(true))
        .disk(Disk::raw("vdb", 64 * MIB).iothread(true))
        .program(Program::Vclock("/dev/vda /dev/vdb".into()))
        .boot()
        .unwrap();
    guest.wait_for("vclock: t=2 ", WAIT).unwrap();
    guest.shutdown().unwrap();
    let images = images(&guest);
    assert_eq!(images[0].slots(), 64 * MIB / 4096);
    let report = vclock::check(&[&images[0], &images[1]], None).unwrap();
    assert!(report.is_exact(), "{:?}", report.violations);
    assert!(
        report.newest.iter().all(|newest| *newest > 10),
        "{:?}",
        report.newest
    );
}

#[test]
fn disks_of_every_bus_are_seen_and_the_shell_answers() {
    let dir = dir();
    let mut guest = Guest::builder(dir.path())
        .disk(Disk::qcow2("vda", 64 * MIB).serial("SER-VDA"))
        .disk(Disk::raw("sda", 32 * MIB).bus(Bus::Scsi).iothread(true))
        .disk(Disk::raw("nvme0", 16 * MIB).bus(Bus::Nvme))
        .boot()
        .unwrap();
    let (status, said) = guest
        .sh("cat /sys/block/vda/serial; ls /sys/block; false", WAIT)
        .unwrap();
    assert_eq!(status, 1);
    for name in ["SER-VDA", "vda", "sda", "nvme0n1"] {
        assert!(said.contains(name), "{name}: {said}");
    }
}

#[test]
fn the_real_agent_freezes_and_thaws() {
    let dir = dir();
    let mut guest = Guest::builder(dir.path())
        .disk(Disk::qcow2("vda", 64 * MIB).ext4())
        .agent(true)
        .mount("/dev/vda", "/data")
        .boot()
        .unwrap();
    let stream = UnixStream::connect(guest.agent_socket().unwrap()).unwrap();
    stream.set_read_timeout(Some(WAIT)).unwrap();
    let mut replies = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut ask = |command: &str| {
        writeln!(&stream, r#"{{"execute":"{command}"}}"#).unwrap();
        replies.next().unwrap().unwrap()
    };
    assert!(ask("guest-fsfreeze-status").contains("thawed"));
    assert_eq!(ask("guest-fsfreeze-freeze"), r#"{"return": 1}"#);
    assert!(ask("guest-fsfreeze-status").contains("frozen"));
    // The writer sleeps in the kernel until the thaw: no signal ends it.
    let write =
        "(echo hello >/data/file; touch /run/written) >/dev/null 2>&1 & sleep 1; ls /run/written";
    assert_ne!(
        guest.sh(write, WAIT).unwrap().0,
        0,
        "a frozen file system takes no write"
    );
    assert_eq!(ask("guest-fsfreeze-thaw"), r#"{"return": 1}"#);
    assert_eq!(
        guest
            .sh(
                "sync; while ! [ -e /run/written ]; do sleep 0.1; done",
                WAIT
            )
            .unwrap()
            .0,
        0
    );
}
