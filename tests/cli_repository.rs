//! The program on repositories without a VM: what it says of damage, how a signal ends it, and the way out that its errors name.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it, and its files need not be durable"
)]

mod image_common;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use forerun::image::{Selection, Session};
use image_common::{BLOCK, Bench, backup_of, id_of, key_file};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Runs the program on a repository.
fn command(repo: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forerun"));
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .current_dir(repo.parent().unwrap())
        .env("FORERUN_STATE_DIR", repo.with_file_name("state"))
        .env("FORERUN_REPO", repo)
        .env_remove("FORERUN_KEY_FILE")
        .env_remove("FORERUN_PASSPHRASE_FILE");
    command
}

/// The exit code and all words.
fn told(output: &Output) -> (i32, String) {
    let words = [&output.stdout[..], &output.stderr].concat();
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&words).into_owned(),
    )
}

fn run(repo: &Path, arguments: &[&str]) -> (i32, String) {
    told(&command(repo, arguments).output().unwrap())
}

fn run_json(repo: &Path, arguments: &[&str]) -> (i32, Value) {
    let output = command(repo, arguments).arg("--json").output().unwrap();
    let json = serde_json::from_slice(&output.stdout);
    (output.status.code().unwrap(), json.unwrap())
}

/// A disk of so many blocks, all different and quick to store.
fn disk(blocks: u32) -> Vec<u8> {
    let block = |number: u32| number.to_le_bytes().repeat(BLOCK / 4);
    (1..=blocks).flat_map(block).collect()
}

fn all(blocks: u32) -> BTreeSet<u64> {
    (0..blocks.into()).collect()
}

fn packs(bench: &Bench) -> Vec<PathBuf> {
    let objects = bench.objects("packs/").into_iter();
    objects.map(|object| bench.path().join(object)).collect()
}

fn remove(bench: &Bench, prefix: &str) {
    for object in bench.objects(prefix) {
        std::fs::remove_file(bench.path().join(object)).unwrap();
    }
}

#[test]
fn what_no_point_needs_is_a_warning_until_a_prune() {
    let bench = Bench::new(0);
    let repo = bench.path();
    let gone = backup_of(&bench.repo, "a", &disk(4), &all(4), None).unwrap();
    backup_of(&bench.repo, "b", &disk(3), &all(3), None).unwrap();
    bench.repo.withdraw(gone.id).unwrap();
    // The stored bytes of the fourth block.
    let id = *id_of(&disk(4)[3 * BLOCK..]).as_bytes();
    let mut found = 0;
    for path in packs(&bench) {
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes
            .windows(40)
            .position(|entry| entry.starts_with(b"fBlk") && entry[8..] == id);
        if let Some(at) = at {
            bytes[at + 60] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            found += 1;
        }
    }
    assert_eq!(found, 1);
    let (code, words) = run(&repo, &["verify"]);
    assert_eq!(code, 3, "{words}");
    assert!(
        words.contains("no point needs it; `forerun prune` removes it"),
        "{words}"
    );
    assert!(!words.contains("DAMAGED"), "{words}");
    let (code, report) = run_json(&repo, &["check"]);
    assert_eq!((code, &report["check"]["damaged"]), (3, &json!(1)));
    assert_eq!(report["check"]["damage"][0]["needed"], json!(false));
    assert_eq!(run(&repo, &["prune"]).0, 0);
    let (code, words) = run(&repo, &["verify"]);
    assert_eq!(code, 0, "{words}");
}

#[test]
fn an_index_that_is_lost_is_told_in_few_lines_with_the_way_out() {
    const BLOCKS: u32 = 1100;
    let bench = Bench::new(0);
    let repo = bench.path();
    let point = backup_of(&bench.repo, "a", &disk(BLOCKS), &all(BLOCKS), None).unwrap();
    remove(&bench, "index/");
    for command in ["verify", "check"] {
        let (code, words) = run(&repo, &[command]);
        assert_eq!(code, 5, "{words}");
        let lines = words.lines().count();
        assert!(lines < 50, "{lines} lines: {words}");
        assert!(words.contains("and 1080 more"), "{words}");
        assert!(
            words.contains("lacks 1100 blocks that are needed: `forerun repair index`"),
            "{words}"
        );
        assert!(words.contains(&point.id.to_string()), "{words}");
    }
    let (_, report) = run_json(&repo, &["verify"]);
    let report = &report["verify"];
    assert_eq!(report["damage"].as_array().unwrap().len(), 1000);
    assert_eq!(
        (&report["damaged"], &report["truncated"]),
        (&json!(1100), &json!(100))
    );

    // A pack is gone as well: that is told by the repair itself.
    let lost = packs(&bench).remove(0);
    let kept = repo.with_file_name("kept");
    std::fs::rename(&lost, &kept).unwrap();
    let (code, words) = run(&repo, &["repair", "index"]);
    assert_eq!(code, 5, "{words}");
    assert!(
        words.contains("blocks that are needed are in no pack that is there"),
        "{words}"
    );
    assert!(words.lines().count() < 50, "{words}");
    std::fs::rename(&kept, &lost).unwrap();
    let (code, words) = run(&repo, &["repair", "index"]);
    assert_eq!(code, 0, "{words}");
    let (code, words) = run(&repo, &["verify"]);
    assert_eq!(code, 0, "{words}");
    // Now the index knows the pack, so it is named.
    std::fs::remove_file(&lost).unwrap();
    let (code, words) = run(&repo, &["repair", "index"]);
    assert_eq!(code, 5, "{words}");
    let name = lost.file_name().unwrap().to_str().unwrap();
    assert!(words.contains(name), "{words}");
}

/// Starts the program, interrupts it once it takes care of signals and before it has opened the repository, and lets it go on.
fn interrupted(repo: &Path, arguments: &[&str]) -> (i32, String) {
    let fifo = repo.with_file_name("fifo");
    if !fifo.exists() {
        let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
    }
    let mut command = command(repo, arguments);
    command.arg("--key-file").arg(&fifo);
    let child = command.spawn().unwrap();
    // The program opens it, or this waits.
    let mut key = std::fs::File::options().write(true).open(&fifo).unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    key.write_all(&key_file()).unwrap();
    drop(key);
    told(&child.wait_with_output().unwrap())
}

#[test]
fn a_signal_ends_every_long_command_in_order() {
    let mut bench = Bench::encrypted(4 * BLOCK);
    bench.write(0, &disk(4));
    let point = bench.backup().id.to_string();
    let repo = bench.path();
    let second = repo.with_file_name("second");
    assert_eq!(run(&repo, &["init", second.to_str().unwrap()]).0, 0);
    let second = second.to_str().unwrap();
    let out = repo.with_file_name("out");
    let to = out.to_str().unwrap();
    let commands: [&[&str]; 7] = [
        &["verify"],
        &["verify", &point],
        &["check"],
        &["prune"],
        &["copy", "--all", "--to", second],
        &["restore", &point, "--output", to],
        &["restore", &point, "--output", to, "--format", "qcow2"],
    ];
    for arguments in commands {
        let (code, words) = interrupted(&repo, arguments);
        assert_eq!(code, 130, "{arguments:?}: {words}");
        assert!(words.contains("interrupted"), "{arguments:?}: {words}");
        assert_eq!(bench.objects("leases/"), Vec::<String>::new());
        assert!(bench.repo.store().held("").unwrap().is_empty());
    }
    assert!(std::fs::read_dir(&out).unwrap().next().is_none());
    // What they were to do is done the next time.
    let key = repo.with_file_name("key");
    std::fs::write(&key, key_file()).unwrap();
    for arguments in commands {
        let with_key = [arguments, &["--key-file", key.to_str().unwrap()]].concat();
        let (code, words) = run(&repo, &with_key);
        assert_eq!(code, 0, "{arguments:?}: {words}");
    }
}

#[test]
fn errors_name_what_is_missing_and_the_way_out() {
    let mut bench = Bench::new(BLOCK);
    bench.write(0, &disk(1));
    let point = bench.backup().id.to_string();
    let repo = bench.path();
    let (code, words) = run(&repo, &["list", "--repo", "nowhere"]);
    assert_eq!(code, 1);
    assert!(
        words.contains("there is no repository at nowhere"),
        "{words}"
    );
    assert!(
        words.contains("`forerun init nowhere`, or mount"),
        "{words}"
    );
    for name in ["0123", "other@latest", "web@2001-01-01T00:00Z"] {
        for command in ["show", "verify", "pin"] {
            let (code, words) = run(&repo, &[command, name]);
            assert_eq!(code, 1, "{words}");
            assert!(words.contains("`forerun list --repo REPO`"), "{words}");
        }
    }
    let forget = ["forget", "--point", "0123456789abcdef"];
    let (code, words) = run(&repo, &forget);
    assert_eq!(code, 1);
    assert!(words.contains("`forerun list --repo REPO`"), "{words}");

    for (arguments, expected) in [
        (&["restore"][..], "the beginning of a point's id"),
        (&["restore", &point], "or `--disk DISK=PATH` for one"),
        (&["copy", "--to", "x"], "or `--all`"),
        (&["changed"], "run, status, inspect, load and audit"),
        (&["copy", "--all"], "the second repository, to copy to"),
    ] {
        let (code, words) = run(&repo, arguments);
        assert_eq!(code, 2);
        assert!(words.contains(expected), "{arguments:?}: {words}");
    }
    let mut bare = command(&repo, &["copy", "--all", "--to", "x"]);
    let (code, words) = told(&bare.env_remove("FORERUN_REPO").output().unwrap());
    assert_eq!(code, 2);
    assert!(words.contains("or set FORERUN_REPO"), "{words}");

    let (code, words) = run(&repo, &["forget", "--all-targets", "--keep-within", "1"]);
    assert_eq!(code, 2);
    assert!(words.contains("say 1d for days"), "{words}");
}

#[test]
fn a_point_is_shown_in_words() {
    let mut bench = Bench::new(BLOCK);
    bench.write(0, &disk(1));
    let repo = bench.path();
    let mut shown = bench.backup();
    shown.id = "00112233aabbccdd".parse().unwrap();
    shown.statistics = json!({
        "bytes": { "precopied": 3 << 20, "superseded": 0, "residual": 1 << 20, "stored": 4096 },
        "freeze_ms": 4, "released_ms": 26, "quiesced_ms": null, "window_ms": 100, "passes": [],
    });
    bench.repo.publish(&shown).unwrap();
    let (code, words) = run(&repo, &["show", "0011"]);
    assert_eq!(code, 0, "{words}");
    assert!(!words.contains(['{', '}', '"']), "{words}");
    assert!(
        words.contains("precopied 3 MiB, superseded 0 B, residual 1 MiB, stored 4 KiB"),
        "{words}"
    );
    assert!(
        words.contains("freeze 4 ms, guest released after 26 ms, window 100 ms"),
        "{words}"
    );
    let (_, report) = run_json(&repo, &["show", "0011"]);
    assert_eq!(report["point"]["statistics"], shown.statistics);
}

#[test]
fn times_are_shown_as_they_are_read() {
    let mut bench = Bench::new(2 * BLOCK);
    let repo = bench.path();
    let berlin = |arguments: &[&str]| {
        let mut command = command(&repo, arguments);
        told(&command.env("TZ", "Europe/Berlin").output().unwrap())
    };
    let (code, words) = berlin(&["list"]);
    assert_eq!(code, 0, "{words}");
    assert!(words.contains("holds no points"), "{words}");

    bench.write(0, &disk(2));
    let mut point = bench.backup();
    bench.write(BLOCK, &disk(1));
    let mut other = bench.backup();
    let selection = Selection::Points {
        points: [point.id, other.id].into(),
        allow_last: true,
    };
    bench.repo.forget(&selection).unwrap();
    point.instant = "2026-11-26T20:57:11.586605269Z".parse().unwrap();
    point.id = "00112233aabbccdd".parse().unwrap();
    bench.repo.publish(&point).unwrap();
    other.instant = "2026-11-26T21:57:11Z".parse().unwrap();
    other.id = "1122334455667788".parse().unwrap();
    other.target.key = "other".to_owned();
    other.target.spellings = vec!["other-one".to_owned()];
    bench.repo.publish(&other).unwrap();
    let (_, words) = berlin(&["list"]);
    let expected = [
        "00112233aabbccdd  2026-11-26 21:57:11+01:00  web        128 KiB on vda  crash-consistent",
        "1122334455667788  2026-11-26 22:57:11+01:00  other-one  128 KiB on vda  crash-consistent",
    ];
    assert_eq!(words.lines().collect::<Vec<_>>(), expected);
    let (_, report) = run_json(&repo, &["list"]);
    assert_eq!(
        report["points"][0]["instant"],
        "2026-11-26T20:57:11.586605269Z"
    );
    let (_, words) = berlin(&["show", "0011"]);
    let instant = "instant 2026-11-26 21:57:11+01:00 (2026-11-26T20:57:11.586605269Z)";
    assert!(words.contains(instant), "{words}");

    // What was shown names the point, and so does the local time without the offset.
    for time in [
        "2026-11-26 21:57:11+01:00",
        "2026-11-26T21:57:11",
        "2026-11-26T21:58",
    ] {
        let (code, words) = berlin(&["show", &format!("web@{time}")]);
        assert_eq!(code, 0, "{words}");
        assert!(words.contains("point 00112233aabbccdd"), "{words}");
    }
    let (code, words) = berlin(&["show", "web@2026-11-26T20:58"]);
    assert_eq!(code, 1, "{words}");
    let read = "none until 2026-11-26 20:58:00+01:00, read as local time (Europe/Berlin)";
    assert!(words.contains(read), "{words}");
    let (code, words) = berlin(&["show", "web@2026-11-26T20:57:10Z"]);
    assert_eq!(code, 1, "{words}");
    let read = "none until 2026-11-26 21:57:10+01:00, as its offset says, the first is of 2026-11-26 21:57:11";
    assert!(words.contains(read), "{words}");

    let (code, words) = berlin(&["restore", "web", "--output", "out"]);
    assert_eq!(code, 1, "{words}");
    assert!(words.contains("newest point is `web@latest`"), "{words}");
    let (code, words) = berlin(&["diff", "0011", "1122"]);
    assert_eq!(code, 0, "{words}");
    assert!(words.contains("vda: 64 KiB in 1 extent\n"), "{words}");
}

#[test]
fn an_encrypted_repository_refuses_a_new_id_before_its_sessions_go() {
    let bench = Bench::encrypted(0);
    let repo = bench.path();
    let session = Session::create(&bench.repo, "a-vm", &json!({})).unwrap();
    session.append(&json!({})).unwrap();
    let key = repo.with_file_name("key");
    std::fs::write(&key, key_file()).unwrap();
    let renew = ["repair", "new-id", "--drop-sessions", "--key-file"];
    let before = bench.objects("sessions/");
    let (code, words) = run(&repo, &[&renew[..], &[key.to_str().unwrap()]].concat());
    assert_eq!(code, 1, "{words}");
    assert!(words.contains("make another one and copy"), "{words}");
    assert_eq!(bench.objects("sessions/"), before);
}

#[test]
fn nothing_is_left_of_a_restore_whose_server_cannot_be_started() {
    let mut bench = Bench::new(BLOCK);
    bench.write(0, &disk(1));
    let point = bench.backup().id.to_string();
    let repo = bench.path();
    let beside = |name: &str| repo.with_file_name(name);
    for directory in ["bin", "tmp"] {
        std::fs::create_dir(beside(directory)).unwrap();
    }
    // Only qemu-img is found.
    let path = std::env::var_os("PATH").unwrap();
    let mut places = std::env::split_paths(&path).map(|place| place.join("qemu-img"));
    let image = places.find(|place| place.exists()).unwrap();
    std::os::unix::fs::symlink(image, beside("bin/qemu-img")).unwrap();
    let arguments = ["restore", &point, "--output", "out", "--format", "qcow2"];
    let mut command = command(&repo, &arguments);
    command
        .env("PATH", beside("bin"))
        .env("TMPDIR", beside("tmp"));
    let (code, words) = told(&command.output().unwrap());
    assert_eq!(code, 1, "{words}");
    assert!(words.contains("qemu-nbd"), "{words}");
    for directory in ["tmp", "out"] {
        let mut left = std::fs::read_dir(beside(directory)).unwrap();
        assert!(left.next().is_none(), "{directory}: {words}");
    }
}

/// The format and the cluster size of an image, as QEMU tells them from its header.
fn image_info(path: &Path) -> (String, u64) {
    let mut command = Command::new("qemu-img");
    let output = command.args(["info", "--output=json"]).arg(path).output();
    let info: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
    let format = info["format"].as_str().unwrap().to_owned();
    (format, info["cluster-size"].as_u64().unwrap_or(0))
}

#[test]
fn a_disk_is_put_back_in_the_format_that_is_expected_there() {
    let mut bench = Bench::new(4 * BLOCK);
    bench.write(0, &disk(4));
    let repo = bench.path();
    let mut point = bench.backup();
    point.id = "00112233aabbccdd".parse().unwrap();
    point.disks[0].format = "qcow2".to_owned();
    let header = json!({ "compat": "1.1", "cluster-size": 131_072 });
    point.machine = json!({ "disks": [{ "key": "vda", "chain": [{ "header": header }] }] });
    bench.repo.publish(&point).unwrap();
    let path = |name: &str| repo.with_file_name(name);
    let restore = |name: &str, more: &[&str]| {
        let to = format!("vda={}", path(name).display());
        run(
            &repo,
            &[&["restore", "0011", "--disk", &to][..], more].concat(),
        )
    };
    let is_qcow2 = |name: &str| {
        assert_eq!(image_info(&path(name)), ("qcow2".to_owned(), 131_072));
        let raw = path("converted");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "qcow2", "-O", "raw"]);
        let status = convert.arg(path(name)).arg(&raw).status();
        assert!(status.unwrap().success());
        assert!(std::fs::read(&raw).unwrap() == bench.disk, "{name}");
    };
    let is_raw = |name: &str| assert!(std::fs::read(path(name)).unwrap() == bench.disk, "{name}");

    // By the name, and by what is there.
    assert_eq!(restore("new.qcow2", &[]).0, 0);
    is_qcow2("new.qcow2");
    assert_eq!(restore("new.img", &[]).0, 0);
    is_raw("new.img");
    let (code, words) = restore("new.qcow2", &["--force"]);
    assert_eq!(code, 0, "{words}");
    is_qcow2("new.qcow2");
    std::fs::rename(path("new.qcow2"), path("web")).unwrap();
    assert_eq!(restore("web", &["--force"]).0, 0);
    is_qcow2("web");
    assert_eq!(restore("new.img", &["--force"]).0, 0);
    is_raw("new.img");
    std::fs::write(path("empty.img"), []).unwrap();
    let (code, words) = restore("empty.img", &["--force", "--format", "qcow2"]);
    assert_eq!(code, 0, "{words}");

    // Another format than the image had is said, and taken.
    let (code, words) = restore("web", &["--force", "--format", "raw"]);
    assert_eq!(code, 3, "{words}");
    assert!(
        words.contains("was a qcow2 image and is raw now"),
        "{words}"
    );
    is_raw("web");
    let (code, words) = restore("web", &["--force", "--format", "qcow2"]);
    assert_eq!(code, 3, "{words}");
    assert!(
        words.contains("was a raw image and is qcow2 now"),
        "{words}"
    );
    is_qcow2("web");
    let (code, words) = restore("web", &["--format", "raw"]);
    assert_eq!(code, 1, "{words}");
    is_qcow2("web");

    let (_, report) = run_json(&repo, &["restore", "0011", "--output", "out"]);
    assert_eq!(report["restored"][0]["format"], "raw");
    is_raw("out/vda.raw");
}

#[test]
fn disks_with_commas_between_are_told_apart() {
    let bench = Bench::new(BLOCK);
    let repo = bench.path();
    std::fs::write(repo.with_file_name("vda.raw"), disk(1)).unwrap();
    let backup = |option: &str| run(&repo, &["backup", "disk:vda.raw", option, "vda,vdb"]);
    for option in ["--include", "--exclude"] {
        let (code, words) = backup(option);
        assert_eq!(code, 2, "{words}");
        let way_out = format!("repeat the option: `{option} vda {option} vdb`");
        assert!(words.contains(&way_out), "{words}");
    }
}
