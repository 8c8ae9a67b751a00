//! A connection to a QEMU that is waiting for its disks does not hold it up.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use forerun::backup::connect::{Drained, connect};
use forerun::clock;
use forerun::nbd::Endpoint;
use forerun::qmp::socket::QmpSocket;

/// How long a request of the disk takes.
const SLOW: Duration = Duration::from_secs(2);

/// It would be held for as long as a server may make no progress, 30 s.
const HELD: Duration = Duration::from_secs(15);

/// A QEMU with a slow disk that is exported, and no guest.
struct Qemu(Child);

impl Qemu {
    fn start(folder: &Path) -> Self {
        let slow = format!(
            "driver=null-co,node-name=disk,size=67108864,latency-ns={}",
            SLOW.as_nanos()
        );
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "none", "-nodefaults", "-display", "none"]);
        command.args(["-blockdev", &slow]);
        for name in ["ours", "others"] {
            let socket = folder.join(name);
            command.args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", socket.display()),
            ]);
        }
        let qemu = Self(command.spawn().unwrap());
        let mut monitor = Others::open(folder);
        let socket = folder.join("nbd");
        let socket = socket.display();
        monitor.run(&format!(
            r#"{{"execute":"nbd-server-start","arguments":{{"addr":{{"type":"unix","data":{{"path":"{socket}"}}}}}}}}"#
        ));
        monitor.run(
            r#"{"execute":"block-export-add","arguments":{"id":"e","type":"nbd","node-name":"disk","name":"e"}}"#,
        );
        qemu
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Somebody else's monitor.
struct Others(BufReader<UnixStream>);

impl Others {
    fn open(folder: &Path) -> Self {
        let mut tries = 0;
        let socket = loop {
            match UnixStream::connect(folder.join("others")) {
                Ok(socket) => break socket,
                Err(error) => assert!(tries < 200, "{error}"),
            }
            tries += 1;
            clock::sleep(Duration::from_millis(50));
        };
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut monitor = Self(BufReader::new(socket));
        monitor.answer();
        monitor.run(r#"{"execute":"qmp_capabilities"}"#);
        monitor
    }

    fn begin(&mut self, command: &str) {
        self.0.get_mut().write_all(command.as_bytes()).unwrap();
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line
    }

    fn run(&mut self, command: &str) {
        self.begin(command);
        let answer = self.answer();
        assert!(answer.contains("return"), "{command}: {answer}");
    }
}

/// Hands a connection on, and stops it before the client's first word: then another client has QEMU drain its disks, while a
/// request is under way.
fn drain_before_negotiation(listener: &UnixListener, nbd: &Path, mut others: Others) -> Others {
    let (client, _) = listener.accept().unwrap();
    let server = UnixStream::connect(nbd).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::io::copy(&mut &server, &mut &client).ok();
            client.shutdown(Shutdown::Both).ok();
        });
        let mut first = [0; 4096];
        let count = (&client).read(&mut first).unwrap();
        others.begin(
            r#"{"execute":"transaction","arguments":{"actions":[{"type":"block-dirty-bitmap-add","data":{"node":"disk","name":"b"}}]}}"#,
        );
        clock::sleep(Duration::from_millis(300));
        (&server).write_all(&first[..count]).unwrap();
        std::io::copy(&mut &client, &mut &server).ok();
        server.shutdown(Shutdown::Both).ok();
    });
    let answer = others.answer();
    assert!(answer.contains("return"), "{answer}");
    others
}

#[test]
fn a_connection_that_is_made_within_a_drain_is_given_up_and_qemu_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let _qemu = Qemu::start(folder.path());
    let (nbd, between) = (folder.path().join("nbd"), folder.path().join("between"));
    let mut monitor = QmpSocket::connect(&folder.path().join("ours")).unwrap();
    let others = Others::open(folder.path());
    let listener = UnixListener::bind(&between).unwrap();
    let url = format!("nbd+unix:///e?socket={}", nbd.display());
    let mut reader = Command::new("qemu-io")
        .args(["-r", "-f", "raw", "-c", "read 0 4k", &url])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    clock::sleep(SLOW / 4);
    std::thread::scope(|scope| {
        let drained = scope.spawn(|| drain_before_negotiation(&listener, &nbd, others));
        let begun = clock::now();
        let connected = connect(&mut monitor, &Endpoint::new(&between, "e"));
        let error = connected.expect_err("QEMU drains its disks");
        assert!(error.is::<Drained>(), "{error:#}");
        assert!(clock::now() - begun < HELD, "QEMU was held up");
        drained.join().unwrap();
    });
    reader.wait().unwrap();
    let client = connect(&mut monitor, &Endpoint::new(&nbd, "e")).unwrap();
    assert_eq!(client.size(), 64 << 20);
}
