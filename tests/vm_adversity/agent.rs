//! The guest agent: a real one in a real guest, that answers, sleeps, and falls asleep in the middle.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use forerun_rig::guest::{Disk, Guest, Program};

use crate::lab::{Lab, MIB, WAIT, is_clean, until};

/// A guest that writes to a file system all the time.
fn guest(dir: &Path) -> Guest {
    let writer = "n=0; while true; do n=$((n+1)); echo $n >/data/n.$((n % 16)); dd if=/dev/urandom of=/data/file bs=64k count=8 2>/dev/null; echo writer: $n; sleep 0.1; done";
    let mut guest = Guest::builder(dir)
        .disk(Disk::qcow2("vda", 64 * MIB).ext4())
        .agent(true)
        .mount("/dev/vda", "/data")
        .program(Program::Script(writer.into()))
        .boot()
        .unwrap();
    guest.wait_for("writer: 3", WAIT).unwrap();
    guest
}

/// The file system in a restored image: whether its journal is empty, and whether it is consistent.
fn file_system(image: &Path) -> (bool, bool) {
    let header = Command::new("dumpe2fs")
        .arg("-h")
        .arg(image)
        .output()
        .unwrap();
    let header = String::from_utf8_lossy(&header.stdout).into_owned();
    assert!(header.contains("Filesystem features"), "{header}");
    let check = Command::new("e2fsck")
        .arg("-fn")
        .arg(image)
        .output()
        .unwrap();
    (!header.contains("needs_recovery"), check.status.success())
}

/// Whether the guest's file systems are thawed.
fn thawed(socket: &Path) -> bool {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    writeln!(stream, r#"{{"execute":"guest-fsfreeze-status"}}"#).unwrap();
    let mut answer = [0; 4096];
    let mut text = String::new();
    // The answers to those who did not wait for theirs come first.
    while !text.contains("thawed") && !text.contains("frozen") {
        let count = stream.read(&mut answer).unwrap();
        assert!(count > 0, "the agent is gone");
        text.push_str(&String::from_utf8_lossy(&answer[..count]));
    }
    text.contains("thawed")
}

fn sh(guest: &mut Guest, line: &str) {
    let (status, said) = guest.sh(line, WAIT).unwrap();
    assert_eq!(status, 0, "{line}: {said}");
}

fn writes_on(guest: &mut Guest) {
    let line = |guest: &Guest| guest.last_line("writer: ").unwrap();
    let before = line(guest);
    until("the guest's next write", || line(guest) != before);
}

#[test]
fn a_quiesced_point_has_a_clean_file_system_and_a_sleeping_agent_holds_nothing_up() {
    let dir = tempfile::Builder::new().prefix("rig").tempdir().unwrap();
    let lab = Lab::new();
    let mut guest = guest(dir.path());
    let agent = guest.agent_socket().unwrap();
    let target = format!("qmp:{}", guest.qmp_socket().display());
    let with = |quiesce: &str, agent: &Path| {
        let agent = agent.to_str().unwrap();
        let words = ["backup", &target, "--as", "vm", "--quiesce", quiesce];
        [&words[..], &["--agent", agent]].concat().join(" ")
    };
    let backup = |quiesce: &str, agent: &Path| {
        let words = with(quiesce, agent);
        lab.forerun(&words.split(' ').collect::<Vec<_>>())
    };

    let ran = backup("always", &agent).ended(0);
    assert_eq!(ran.at("/targets/0/point/quiesce"), "quiesced");
    assert!(ran.at("/targets/0/point/quiesced_ms").as_u64() < Some(5000));
    let restored = lab.restore_all(&ran.point()).join("vda.raw");
    assert_eq!(file_system(&restored), (true, true));
    assert!(thawed(&agent));
    writes_on(&mut guest);
    // Without it, the journal has to be replayed.
    let ran = backup("never", &agent).ended(0);
    assert_eq!(ran.at("/targets/0/point/quiesce"), "crash-consistent");
    let restored = lab.restore_all(&ran.point()).join("vda.raw");
    assert!(!file_system(&restored).0);

    // Asleep.
    sh(&mut guest, "kill -STOP $(cat /run/qga.pid)");
    let begin = Instant::now();
    let ran = backup("auto", &agent).ended(3);
    let ran = ran.warned("the guest agent does not answer, so the guest is not quiesced");
    assert_eq!(ran.at("/targets/0/point/quiesce"), "crash-consistent");
    backup("always", &agent).failed(1, "the guest agent does not answer", "");
    assert!(begin.elapsed() < Duration::from_secs(60));
    is_clean(guest.monitor());
    sh(&mut guest, "kill -CONT $(cat /run/qga.pid)");
    assert!(thawed(&agent));

    // It falls asleep with the freeze in its ears, and executes it when it wakes.
    for (quiesce, code) in [("auto", 3), ("always", 1)] {
        let (proxy, heard) = Proxy::start(lab.path(), quiesce, &agent);
        let words = with(quiesce, &proxy.listen);
        let run = lab.begin(&words.split(' ').collect::<Vec<_>>());
        heard.recv_timeout(WAIT).unwrap();
        sh(&mut guest, "kill -STOP $(cat /run/qga.pid)");
        proxy.go_on();
        // Longer than the freeze is waited for.
        std::thread::sleep(Duration::from_secs(13));
        writes_on(&mut guest);
        sh(&mut guest, "kill -CONT $(cat /run/qga.pid)");
        let ran = run.end();
        assert_eq!(ran.code, code, "{ran:?}");
        assert!(ran.words.contains("the guest is not quiesced"), "{ran:?}");
        if code == 3 {
            assert_eq!(ran.at("/targets/0/point/quiesce"), "crash-consistent");
        }
        is_clean(guest.monitor());
        until("a thawed guest", || thawed(&agent));
        writes_on(&mut guest);
    }
    let ran = backup("always", &agent).ended(0);
    let restored = lab.restore_all(&ran.point()).join("vda.raw");
    assert_eq!(file_system(&restored), (true, true));
}

/// Stands before the agent's socket, and holds the first freeze back until it is told to go on.
struct Proxy {
    listen: PathBuf,
    go: std::sync::mpsc::Sender<()>,
}

impl Proxy {
    fn start(dir: &Path, name: &str, agent: &Path) -> (Self, Receiver<()>) {
        let listen = dir.join(format!("{name}.agent"));
        let listener = UnixListener::bind(&listen).unwrap();
        let agent = agent.to_owned();
        let (hear, heard) = channel();
        let (go, gone) = channel();
        std::thread::spawn(move || {
            let mut first = true;
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                let Ok(server) = UnixStream::connect(&agent) else {
                    return;
                };
                let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                let back = std::thread::spawn(move || {
                    std::io::copy(&mut from, &mut to).ok();
                });
                pass(client, &server, &mut first, &hear, &gone);
                server.shutdown(std::net::Shutdown::Both).ok();
                back.join().unwrap();
            }
        });
        (Self { listen, go }, heard)
    }

    fn go_on(&self) {
        self.go.send(()).unwrap();
    }
}

fn pass(
    mut client: UnixStream,
    mut server: &UnixStream,
    first: &mut bool,
    hear: &std::sync::mpsc::Sender<()>,
    go: &Receiver<()>,
) {
    let mut chunk = [0; 4096];
    while let Ok(count) = client.read(&mut chunk) {
        if count == 0 {
            return;
        }
        let freeze = String::from_utf8_lossy(&chunk[..count]).contains("guest-fsfreeze-freeze");
        if freeze && *first {
            *first = false;
            hear.send(()).ok();
            go.recv_timeout(WAIT).ok();
        }
        if server.write_all(&chunk[..count]).is_err() {
            return;
        }
    }
}
