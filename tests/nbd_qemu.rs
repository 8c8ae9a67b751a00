//! The NBD client against `qemu-nbd`: negotiation, block status, reads, writes, and servers that hang or die.
//!
//! The image is a qcow2 of 64 MiB with data, holes, zeroed clusters and a persistent dirty bitmap, made by `qemu-img`
//! and `qemu-io`. Each server is started by its test and ended by its process id.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test's files need not be durable, and a test may panic"
)]

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use forerun::{
    nbd::{
        ALLOCATION, Client, DIRTY_BITMAP_PREFIX, Endpoint, Error, ReadDone, ReadOptions, ReadPool,
        STATE_DIRTY, STATE_ZERO, Writer, ZeroMode,
    },
    units::Extent,
};
use rustix::process::{Pid, Signal, kill_process};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} must be installed for this test: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// A `qemu-nbd` that serves one image as export `vda`.
struct Server {
    pid: Pid,
    socket: PathBuf,
    image: PathBuf,
    _folder: tempfile::TempDir,
}

impl Server {
    fn start(make: impl FnOnce(&Path), arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk");
        make(&image);
        let arguments: Vec<String> = arguments
            .iter()
            .map(|argument| argument.replace("IMAGE", image.to_str().unwrap()))
            .collect();
        let socket = folder.path().join("socket");
        let pid_file = folder.path().join("pid");
        let mut all = vec!["--fork", "--persistent", "--shared=8", "--export-name=vda"];
        all.extend(["--socket", socket.to_str().unwrap()]);
        all.extend(["--pid-file", pid_file.to_str().unwrap()]);
        all.extend(arguments.iter().map(String::as_str));
        run("qemu-nbd", &all);
        let pid = std::fs::read_to_string(&pid_file).unwrap();
        Self {
            pid: Pid::from_raw(pid.trim().parse().unwrap()).unwrap(),
            socket,
            image,
            _folder: folder,
        }
    }

    /// The patterned qcow2, read-only, with its bitmap.
    fn patterned() -> Self {
        Self::start(
            patterned,
            &["--read-only", "--format=qcow2", "--bitmap=b0", "IMAGE"],
        )
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::new(&self.socket, "vda").timeout(Duration::from_secs(20))
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have been ended by its test.
        kill_process(self.pid, Signal::KILL).ok();
    }
}

/// Before the bitmap: 0x11 in the first 8 MiB, 0x22 in 1 MiB at 32 MiB, zeroed clusters at 40 MiB. After it: 0x33 in
/// 64 KiB at 1 MiB, 0x44 in 2 MiB at 16 MiB, zeros in 1 MiB at 32 MiB.
fn patterned(image: &Path) {
    let image = image.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", image, "64M"]);
    let io = |commands: &[&str]| {
        let mut arguments = vec!["-f", "qcow2"];
        for command in commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(image);
        run("qemu-io", &arguments);
    };
    io(&[
        "write -P 0x11 0 8M",
        "write -P 0x22 32M 1M",
        "write -z 40M 4M",
    ]);
    run("qemu-img", &["bitmap", "--add", "-g", "65536", image, "b0"]);
    io(&[
        "write -P 0x33 1M 64k",
        "write -P 0x44 16M 2M",
        "write -z 32M 1M",
    ]);
}

fn expected() -> Vec<u8> {
    let mut disk = vec![0; usize::try_from(SIZE).unwrap()];
    let mut fill = |from: u64, length: u64, byte| {
        let from = usize::try_from(from).unwrap();
        disk[from..from + usize::try_from(length).unwrap()].fill(byte);
    };
    fill(0, 8 * MIB, 0x11);
    fill(MIB, 64 << 10, 0x33);
    fill(16 * MIB, 2 * MIB, 0x44);
    disk
}

fn extent(offset: u64, length: u64) -> Extent {
    Extent { offset, length }
}

fn whole() -> Extent {
    extent(0, SIZE)
}

fn options(request_bytes: u32, depth: usize) -> ReadOptions {
    ReadOptions {
        request_bytes,
        depth,
        spare_buffers: 2,
        holes: false,
    }
}

fn always(_: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Puts a piece into a copy of the disk.
fn place(disk: &mut [u8], done: &ReadDone) {
    let from = usize::try_from(done.extent.offset).unwrap();
    let to = &mut disk[from..from + usize::try_from(done.extent.length).unwrap()];
    match &done.data {
        Some(data) => to.copy_from_slice(data),
        None => to.fill(0),
    }
    for hole in &done.holes {
        assert!(hole.offset >= done.extent.offset && hole.end() <= done.extent.end());
    }
}

/// A copy of the disk, filled with what no byte of it is, so that nothing missing looks right.
fn blank() -> Vec<u8> {
    vec![0xee; usize::try_from(SIZE).unwrap()]
}

fn read_whole(client: &mut Client, options: ReadOptions) -> Vec<u8> {
    let mut disk = blank();
    let summary = client
        .read_all([whole()], options, &always, &mut |done| {
            place(&mut disk, &done);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!((summary.bytes, summary.stopped), (SIZE, false));
    disk
}

fn collect(
    read: impl FnOnce(&mut dyn FnMut(Extent) -> ControlFlow<()>) -> Result<(), Error>,
) -> Vec<(u64, u64)> {
    let mut out = Vec::new();
    read(&mut |extent| {
        out.push((extent.offset, extent.length));
        ControlFlow::Continue(())
    })
    .unwrap();
    out
}

#[test]
fn an_export_tells_its_size_flags_and_blocks() {
    let server = Server::patterned();
    let client = server
        .endpoint()
        .allocation()
        .bitmap("b0")
        .connect()
        .unwrap();
    let info = client.info();
    assert_eq!(info.size, SIZE);
    assert!(info.read_only() && info.multi_conn());
    assert!(info.min_block.is_power_of_two() && info.max_payload == 32 << 20);
    assert_eq!(
        client.contexts().collect::<Vec<_>>(),
        [ALLOCATION, "qemu:dirty-bitmap:b0"]
    );
    client.disconnect().unwrap();
}

#[test]
fn what_a_server_does_not_have_is_named() {
    let server = Server::patterned();
    let no_bitmap = server.endpoint().allocation().bitmap("b1").connect();
    let no_bitmap = no_bitmap.unwrap_err().to_string();
    assert!(no_bitmap.contains("qemu:dirty-bitmap:b1"), "{no_bitmap}");
    let no_export = Endpoint::new(&server.socket, "vdb").connect().unwrap_err();
    assert!(matches!(no_export, Error::Refused { .. }), "{no_export}");
    assert!(no_export.to_string().contains("vdb"), "{no_export}");
    let no_socket = Endpoint::new("/nonexistent/socket", "vda")
        .connect()
        .unwrap_err();
    assert!(matches!(no_socket, Error::Io { .. }), "{no_socket}");
}

#[test]
fn dirty_and_zero_extents_are_those_of_the_image() {
    let server = Server::patterned();
    let mut client = server
        .endpoint()
        .allocation()
        .bitmap("b0")
        .connect()
        .unwrap();
    let dirty = collect(|each| client.dirty_extents("b0", whole(), each));
    assert_eq!(
        dirty,
        [(MIB, 64 << 10), (16 * MIB, 2 * MIB), (32 * MIB, MIB)]
    );
    let zero = collect(|each| client.zero_extents(whole(), each));
    assert_eq!(zero, [(8 * MIB, 8 * MIB), (18 * MIB, 46 * MIB)]);
    let data = collect(|each| client.data_extents(whole(), each));
    assert_eq!(data, [(0, 8 * MIB), (16 * MIB, 2 * MIB)]);
    let part = collect(|each| client.dirty_extents("b0", extent(17 * MIB, MIB / 2), each));
    assert_eq!(part, [(17 * MIB, MIB / 2)]);

    let all = client.block_status_all(whole()).unwrap();
    for (context, list) in &all {
        let mut at = 0;
        for (extent, _) in list {
            assert_eq!(extent.offset, at, "{context}");
            at = extent.end();
        }
        assert_eq!(at, SIZE, "{context}");
        assert_eq!(&client.block_status(whole(), context).unwrap(), list);
    }
    let is = |context: &str, flag: u32| {
        let (_, list) = all.iter().find(|(name, _)| name == context).unwrap();
        list.iter()
            .filter(|(_, flags)| flags & flag != 0)
            .map(|(extent, _)| extent.length)
            .sum::<u64>()
    };
    let bitmap = format!("{DIRTY_BITMAP_PREFIX}b0");
    assert_eq!(is(&bitmap, STATE_DIRTY), 3 * MIB + (64 << 10));
    assert_eq!(is(ALLOCATION, STATE_ZERO), 54 * MIB);

    let mut first = None;
    client
        .dirty_extents("b0", whole(), &mut |extent| {
            assert!(first.replace(extent).is_none(), "called after a break");
            ControlFlow::Break(())
        })
        .unwrap();
    assert_eq!(first, Some(extent(MIB, 64 << 10)));
    let outside = client.block_status(extent(SIZE - 512, 1024), ALLOCATION);
    assert!(matches!(outside, Err(Error::Input(_))), "{outside:?}");
}

#[test]
fn status_of_a_disk_larger_than_a_request_is_whole() {
    const TIB: u64 = 1 << 40;
    let server = Server::start(
        |image| {
            let image = image.to_str().unwrap();
            run("qemu-img", &["create", "-q", "-f", "qcow2", image, "16T"]);
            run("qemu-img", &["bitmap", "--add", "-g", "65536", image, "b0"]);
            run(
                "qemu-io",
                &["-f", "qcow2", "-c", "write -P 1 9T 64k", image],
            );
        },
        &["--read-only", "--format=qcow2", "--bitmap=b0", "IMAGE"],
    );
    let mut client = server
        .endpoint()
        .allocation()
        .bitmap("b0")
        .connect()
        .unwrap();
    let all = extent(0, 16 * TIB);
    let dirty = collect(|each| client.dirty_extents("b0", all, each));
    assert_eq!(dirty, [(9 * TIB, 64 << 10)]);
    let zero = collect(|each| client.zero_extents(all, each));
    assert_eq!(
        zero,
        [(0, 9 * TIB), (9 * TIB + (64 << 10), 7 * TIB - (64 << 10))]
    );
}

#[test]
fn reads_are_exact_at_every_depth_and_size() {
    let server = Server::patterned();
    let expected = expected();
    let mut client = server.endpoint().connect().unwrap();
    for (request_bytes, depth) in [
        (4096, 3),
        (64 << 10, 1),
        (64 << 10, 64),
        (256 << 10, 16),
        (1 << 20, 8),
        (32 << 20, 2),
    ] {
        let disk = read_whole(&mut client, options(request_bytes, depth));
        assert!(disk == expected, "{request_bytes} x {depth}");
    }
    let mut some = vec![0; 3 << 20];
    client.read_at(7 * MIB + 512, &mut some).unwrap();
    assert!(some[..] == expected[(7 << 20) + 512..][..3 << 20]);
}

#[test]
fn reads_are_exact_over_several_connections() {
    let server = Server::patterned();
    let expected = expected();
    for connections in [1, 2, 5] {
        let mut pool = ReadPool::connect(&server.endpoint(), connections).unwrap();
        for _ in 0..2 {
            let disk = Mutex::new(blank());
            let permitted = AtomicU64::new(0);
            let permit = |bytes| {
                permitted.fetch_add(bytes, Ordering::Relaxed);
                ControlFlow::Continue(())
            };
            let summary = pool
                .read_all([whole()], options(256 << 10, 8), &permit, &|done| {
                    place(&mut disk.lock().unwrap(), &done);
                    ControlFlow::Continue(())
                })
                .unwrap();
            assert_eq!((summary.bytes, summary.requests), (SIZE, 256));
            assert_eq!(permitted.into_inner(), SIZE);
            assert!(disk.into_inner().unwrap() == expected, "{connections}");
        }
        pool.disconnect().unwrap();
    }
}

#[test]
fn a_break_ends_a_run_with_nothing_in_flight() {
    let server = Server::patterned();
    let mut client = server.endpoint().connect().unwrap();
    let mut calls = 0;
    let summary = client
        .read_all([whole()], options(64 << 10, 16), &always, &mut |_| {
            calls += 1;
            ControlFlow::Break(())
        })
        .unwrap();
    assert!(
        summary.stopped && summary.requests == calls && calls <= 16,
        "{summary:?}"
    );

    let left = AtomicUsize::new(10);
    let permit = |_| match left.fetch_sub(1, Ordering::Relaxed) {
        0 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let summary = client
        .read_all([whole()], options(64 << 10, 4), &permit, &mut |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(summary.stopped && summary.requests == 10, "{summary:?}");
    assert!(read_whole(&mut client, options(1 << 20, 4)) == expected());
}

#[test]
fn buffers_that_a_consumer_keeps_hold_the_reader_up_and_no_more() {
    let server = Server::patterned();
    let mut client = server.endpoint().connect().unwrap();
    let (keep, kept) = std::sync::mpsc::channel::<ReadDone>();
    let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let disk = std::thread::scope(|scope| {
        let consumer = scope.spawn(|| {
            let mut disk = blank();
            for done in kept {
                place(&mut disk, &done);
                // Counted before the buffer goes home.
                now.fetch_sub(1, Ordering::SeqCst);
            }
            disk
        });
        client
            .read_all([whole()], options(64 << 10, 4), &always, &mut |done| {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                keep.send(done).unwrap();
                ControlFlow::Continue(())
            })
            .unwrap();
        drop(keep);
        consumer.join().unwrap()
    });
    assert!(disk == expected());
    assert!(
        most.into_inner() <= 4 + 2,
        "more buffers than depth and spare"
    );
}

#[test]
fn holes_are_told_when_they_are_asked_for() {
    let server = Server::patterned();
    let mut client = server.endpoint().connect().unwrap();
    let options = ReadOptions {
        holes: true,
        ..options(1 << 20, 8)
    };
    let mut disk = blank();
    let (mut zeros, mut hole_bytes) = (0, 0);
    client
        .read_all(
            [extent(MIB / 2, SIZE - MIB / 2)],
            options,
            &always,
            &mut |done| {
                place(&mut disk, &done);
                zeros += u64::from(done.data.is_none());
                hole_bytes += done.holes.iter().map(|hole| hole.length).sum::<u64>();
                ControlFlow::Continue(())
            },
        )
        .unwrap();
    assert!(disk[1 << 19..] == expected()[1 << 19..]);
    assert_eq!((zeros, hole_bytes), (54, 54 * MIB));
}

#[test]
fn a_read_out_of_range_is_an_error_of_the_server_and_the_connection_stays() {
    let server = Server::patterned();
    let mut client = server.endpoint().connect().unwrap();
    let mut good = 0;
    let work = [extent(0, 4 * MIB), extent(SIZE, 64 << 10), extent(0, SIZE)];
    let error = client
        .read_all(work, options(64 << 10, 16), &always, &mut |_| {
            good += 1;
            ControlFlow::Continue(())
        })
        .unwrap_err();
    let Error::Server {
        extent: at, errno, ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!((at.offset, at.length, *errno), (SIZE, 64 << 10, 22));
    assert!(
        (64..64 + 33).contains(&good),
        "{good} good reads are handed on"
    );
    assert!(!client.is_spent());
    assert!(read_whole(&mut client, options(1 << 20, 8)) == expected());
}

#[test]
fn an_unreadable_sector_names_its_request() {
    let server = Server::start(
        |image| std::fs::write(image, vec![7; 4 << 20]).unwrap(),
        &[
            "--read-only",
            "--image-opts",
            "driver=blkdebug,image.driver=file,image.filename=IMAGE,\
             inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.sector=4096,\
             inject-error.0.errno=5",
        ],
    );
    let mut pool = ReadPool::connect(&server.endpoint(), 2).unwrap();
    let error = pool
        .read_all([extent(0, 4 * MIB)], options(64 << 10, 4), &always, &|_| {
            ControlFlow::Continue(())
        })
        .unwrap_err();
    assert_eq!(error.server_errno(), Some(5), "{error}");
    assert!(
        error
            .to_string()
            .contains("read 65536 bytes at offset 0x200000: EIO"),
        "{error}"
    );
    let summary = pool
        .read_all([extent(0, 2 * MIB)], options(64 << 10, 4), &always, &|_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(summary.bytes, 2 * MIB);
}

#[test]
fn writes_zeroes_and_flushes_are_in_the_image() {
    let server = Server::start(
        |image| {
            let image = image.to_str().unwrap();
            run("qemu-img", &["create", "-q", "-f", "qcow2", image, "64M"]);
        },
        &["--format=qcow2", "--discard=unmap", "IMAGE"],
    );
    let client = server.endpoint().connect().unwrap();
    assert!(client.info().can_write_zeroes() && client.info().can_flush());
    let mut writer = Writer::new(client, 16).unwrap();
    let mut expected = vec![0; usize::try_from(SIZE).unwrap()];
    for (index, part) in expected.chunks_mut(64 << 10).enumerate().take(500) {
        part.fill(u8::try_from(index % 251 + 1).unwrap());
        writer.write((index as u64) << 16, part).unwrap();
    }
    writer.flush().unwrap();
    writer
        .write_zeroes(extent(MIB, 2 * MIB), ZeroMode::MayPunch)
        .unwrap();
    writer
        .write_zeroes(extent(8 * MIB, 512), ZeroMode::KeepAllocated)
        .unwrap();
    writer.wait_for_all().unwrap();
    expected[1 << 20..3 << 20].fill(0);
    expected[8 << 20..(8 << 20) + 512].fill(0);
    let outside = writer.write(SIZE, &[0; 512]).unwrap_err();
    assert!(matches!(outside, Error::Input(_)), "{outside}");
    writer.flush().unwrap();
    let mut client = writer.finish().unwrap();
    assert!(read_whole(&mut client, options(1 << 20, 8)) == expected);
    client.disconnect().unwrap();
    server.signal(Signal::TERM);
    let raw = server.image.with_extension("raw");
    let (image, raw) = (server.image.to_str().unwrap(), raw.to_str().unwrap());
    run(
        "qemu-img",
        &["convert", "--force-share", "-O", "raw", image, raw],
    );
    assert!(std::fs::read(raw).unwrap() == expected);
}

#[test]
fn a_write_that_fails_names_its_range_and_the_connection_stays() {
    let server = Server::start(
        |image| std::fs::write(image, vec![7; 4 << 20]).unwrap(),
        &[
            "--image-opts",
            "driver=blkdebug,image.driver=file,image.filename=IMAGE,\
             inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.sector=4096,\
             inject-error.0.errno=28",
        ],
    );
    let mut writer = Writer::new(server.endpoint().connect().unwrap(), 8).unwrap();
    for block in 30..40 {
        writer.write(block << 16, &vec![9; 64 << 10]).ok();
    }
    let again = writer
        .write(2 * MIB, &vec![9; 64 << 10])
        .and_then(|()| writer.wait_for_all());
    assert_eq!(again.unwrap_err().server_errno(), Some(28));
    writer.wait_for_all().ok();
    writer.write(0, &[8; 512]).unwrap();
    writer.flush().unwrap();
}

#[test]
fn a_read_only_export_takes_no_writer() {
    let server = Server::patterned();
    let refused = Writer::new(server.endpoint().connect().unwrap(), 4).unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
}

/// Reads until the server gets a signal after the first piece; the error and how long it took.
fn signalled(signal: Signal, timeout: Duration) -> (Error, Duration, Server) {
    let server = Server::patterned();
    let mut client = server.endpoint().timeout(timeout).connect().unwrap();
    let mut sent = None;
    let error = client
        .read_all(
            [whole(), whole()],
            options(64 << 10, 16),
            &always,
            &mut |_| {
                if sent.is_none() {
                    server.signal(signal);
                    sent = Some(forerun::clock::now());
                }
                ControlFlow::Continue(())
            },
        )
        .unwrap_err();
    let took = sent.unwrap().elapsed();
    assert!(client.is_spent());
    let after = client.read_at(0, &mut [0; 512]).unwrap_err();
    assert!(matches!(after, Error::Closed { .. }), "{after}");
    (error, took, server)
}

#[test]
fn a_server_that_dies_is_noticed_at_once() {
    let (error, took, _server) = signalled(Signal::KILL, Duration::from_secs(60));
    assert!(matches!(error, Error::Closed { .. }), "{error}");
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn a_server_that_hangs_is_a_timeout() {
    let (error, took, server) = signalled(Signal::STOP, Duration::from_millis(300));
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    let stopped = Endpoint::new(&server.socket, "vda").timeout(Duration::from_millis(300));
    let error = stopped.connect().unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}
