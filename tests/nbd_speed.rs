//! How fast the NBD client reads, against `nbdcopy` to null: 2 GiB of data in a 4 GiB qcow2 in the page cache, one
//! `qemu-nbd`. A measurement and no test of a rule, so it runs when it is asked for:
//! `cargo test --release --test nbd_speed -- --ignored --nocapture`.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a measurement prints what it measured"
)]

use std::{
    ops::ControlFlow,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};

use forerun::{
    nbd::{Endpoint, ReadOptions, ReadPool},
    units::Extent,
};
use rustix::process::{Pid, Signal, kill_process};

const SIZE: u64 = 4 << 30;

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program)
        .args(arguments)
        .status()
        .unwrap_or_else(|error| panic!("{program} must be installed: {error}"));
    assert!(status.success(), "{program} {arguments:?}");
}

struct Server(Pid);

impl Drop for Server {
    fn drop(&mut self) {
        kill_process(self.0, Signal::KILL).ok();
    }
}

fn serve(folder: &Path) -> Server {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (image, socket, pid) = (path("disk"), path("socket"), path("pid"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "4G"]);
    let mut arguments = vec!["-f".to_owned(), "qcow2".to_owned()];
    for part in 0..32 {
        arguments.extend([
            "-c".to_owned(),
            format!("write -q -P {} {}M 64M", part + 1, part * 128),
        ]);
    }
    arguments.push(image.clone());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run("qemu-io", &arguments);
    let fixed = [
        "--fork",
        "--persistent",
        "--shared=8",
        "--read-only",
        "--format=qcow2",
    ];
    let named = [
        "--export-name=vda",
        "--socket",
        &socket,
        "--pid-file",
        &pid,
        &image,
    ];
    run("qemu-nbd", &[&fixed[..], &named].concat());
    let pid = std::fs::read_to_string(pid).unwrap();
    Server(Pid::from_raw(pid.trim().parse().unwrap()).unwrap())
}

/// Seconds for the data of the disk, found by block status, through our client.
fn ours(endpoint: &Endpoint, connections: usize, options: ReadOptions) -> f64 {
    let start = forerun::clock::now();
    let mut pool = ReadPool::connect(endpoint, connections).unwrap();
    let mut extents = Vec::new();
    let disk = Extent {
        offset: 0,
        length: SIZE,
    };
    let mut each = |extent| {
        extents.push(extent);
        ControlFlow::Continue(())
    };
    if options.holes {
        let _ = each(disk);
    } else {
        pool.client().data_extents(disk, &mut each).unwrap();
    }
    let bytes = AtomicU64::new(0);
    pool.read_all(extents, options, &|_| ControlFlow::Continue(()), &|done| {
        let length = done.data.map_or(0, |data| data.len());
        bytes.fetch_add(length as u64, Ordering::Relaxed);
        ControlFlow::Continue(())
    })
    .unwrap();
    pool.disconnect().unwrap();
    assert_eq!(bytes.into_inner(), SIZE / 2);
    start.elapsed().as_secs_f64()
}

fn theirs(socket: &Path, connections: usize, depth: usize, request_bytes: u32) -> f64 {
    let uri = format!("nbd+unix:///vda?socket={}", socket.display());
    let start = forerun::clock::now();
    run(
        "nbdcopy",
        &[
            &format!("--connections={connections}"),
            &format!("--requests={depth}"),
            &format!("--request-size={request_bytes}"),
            &uri,
            "null:",
        ],
    );
    start.elapsed().as_secs_f64()
}

#[test]
#[ignore = "a measurement"]
fn against_nbdcopy() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(folder.path());
    let socket = folder.path().join("socket");
    let endpoint = Endpoint::new(&socket, "vda").allocation();
    println!("MiB/s of data, best of 5   nbdcopy   ours  ours with holes");
    for connections in [1, 2] {
        for depth in [8, 16] {
            for request_bytes in [256 << 10, 1 << 20] {
                let options = ReadOptions {
                    request_bytes,
                    depth,
                    spare_buffers: 4,
                    holes: false,
                };
                let with_holes = ReadOptions {
                    holes: true,
                    ..options
                };
                let mut best = [f64::MAX; 3];
                for _ in 0..5 {
                    let times = [
                        theirs(&socket, connections, depth, request_bytes),
                        ours(&endpoint, connections, options),
                        ours(&endpoint, connections, with_holes),
                    ];
                    for (best, time) in best.iter_mut().zip(times) {
                        *best = best.min(time);
                    }
                }
                let [theirs, ours, holes] = best.map(|time| (SIZE >> 21) as f64 / time);
                println!(
                    "{connections} x {depth:2} x {:4} KiB        {theirs:7.0} {ours:7.0} {holes:7.0}   {:.2}",
                    request_bytes >> 10,
                    ours / theirs
                );
            }
        }
    }
    drop(server);
}
