//! Quiesced points of a domain with a distribution's own systemd and guest agent; the guest's hook and the host's hooks; an
//! agent that hangs in the middle of a freeze, and the program that dies in that moment: the guest never stays frozen.
//!
//! `FORERUN_KILL_ALL=1` has the agent hang at an external snapshot, too.
#![cfg(all(feature = "libvirt", feature = "fault-injection"))]
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it, and needs no durable writes"
)]
#![expect(clippy::print_stdout, reason = "numbers for who reads the log")]

mod domain_common;
mod vm_common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use domain_common::Lab;
use forerun::clock;
use forerun_rig::guest::{Disk, SystemFile};
use serde_json::{Value, json};
use vm_common::{Ended, MIB, WAIT, wait_for};

/// The guest's own hook: says that it was called, refuses when told to, or makes the agent hang in the middle of the freeze,
/// which it then goes on with.
const GUEST_HOOK: &str = r#"#!/bin/sh
echo "hook: $1" >/dev/console
[ "$1" = freeze ] || exit 0
[ ! -e /run/refuse ] || exit 1
if [ -e /run/hang ]; then
	agent=$PPID seconds=$(cat /run/hang)
	rm /run/hang
	(sleep $seconds; kill -CONT $agent) &
	kill -STOP $agent
fi
exit 0
"#;

/// Both file systems are never at rest.
const WRITER: &str = r#"#!/bin/sh
mkdir -p /data
mount -t ext4 /dev/vdb /data
echo "stamp: running" >/dev/console
n=0
while true; do
	n=$((n+1))
	echo $n >/data/n.$((n % 16))
	echo $n >/var/n.$((n % 4))
	dd if=/dev/urandom of=/data/file bs=64k count=4 2>/dev/null
	sleep 0.1
done
"#;

fn boot(name: &str) -> Lab {
    let unit = "/etc/systemd/system";
    let files = [
        SystemFile::new("/etc/qemu/fsfreeze-hook", GUEST_HOOK),
        SystemFile::new(
            &format!("{unit}/qemu-guest-agent.service.d/hook.conf"),
            "[Service]\nExecStart=\nExecStart=/usr/sbin/qemu-ga -F/etc/qemu/fsfreeze-hook\n",
        ),
        SystemFile::new("/etc/rig-writer", WRITER),
        SystemFile::new(
            &format!("{unit}/rig-writer.service"),
            "[Service]\nExecStart=/etc/rig-writer\n",
        ),
        SystemFile::new(
            &format!("{unit}/multi-user.target.d/rig-writer.conf"),
            "[Unit]\nWants=rig-writer.service\n",
        ),
    ];
    let begin = clock::now();
    let mut lab = Lab::boot_with(name, |builder| {
        builder
            .memory_mib(384)
            .disk(Disk::qcow2("vda", 384 * MIB))
            .disk(Disk::qcow2("vdb", 64 * MIB).ext4())
            .agent(true)
            .system(files)
    });
    wait_for("the agent never connects", || {
        ask(&lab, "guest-ping", &json!({})).is_some()
    });
    println!("booted and asked in {:?}", clock::now() - begin);
    // What a point is made of from now on is little.
    let name = lab.name();
    lab.run(&["backup", &name, "--quiesce", "never"]).done();
    lab
}

/// What the guest's agent answers to somebody else than forerun.
fn ask(lab: &Lab, command: &str, arguments: &Value) -> Option<Value> {
    let request = json!({ "execute": command, "arguments": arguments }).to_string();
    let words = [
        "qemu-agent-command",
        lab.domain.name(),
        &request,
        "--timeout",
        "5",
    ];
    let answer = lab.domain.virsh(&words).ok()?;
    serde_json::from_str(&answer).ok()
}

/// Runs a shell line in the guest.
fn inside(lab: &Lab, line: &str) {
    let arguments = json!({ "path": "/bin/sh", "arg": ["-c", line], "capture-output": true });
    let begun = ask(lab, "guest-exec", &arguments).unwrap();
    let pid = begun["return"]["pid"].clone();
    wait_for("the guest's shell does not end", || {
        let status = ask(lab, "guest-exec-status", &json!({ "pid": pid })).unwrap();
        status["return"]["exited"] == true && {
            assert_eq!(status["return"]["exitcode"], 0, "{line}: {status}");
            true
        }
    });
}

fn frozen(lab: &Lab) -> bool {
    ask(lab, "guest-fsfreeze-status", &json!({})).is_some_and(|said| said["return"] == "frozen")
}

fn thawed(lab: &Lab) -> bool {
    ask(lab, "guest-fsfreeze-status", &json!({})).is_some_and(|said| said["return"] == "thawed")
}

/// How often the guest's hook has said this.
fn said(lab: &Lab, text: &str) -> usize {
    let log = std::fs::read_to_string(lab.path("serial.log")).unwrap();
    log.lines().filter(|line| line.trim_end() == text).count()
}

fn point(ended: &Ended) -> &Value {
    &ended.json["targets"][0]["point"]
}

/// Whether the file systems in a point need no replay of their journals, and are consistent.
fn clean(lab: &mut Lab, backup: &Ended) -> Vec<(bool, bool)> {
    let output = lab.path("restored");
    std::fs::remove_dir_all(&output).ok();
    let shown = output.display().to_string();
    lab.run(&["restore", &backup.point(), "--output", &shown])
        .done();
    ["vda", "vdb"]
        .iter()
        .map(|disk| file_system(&output.join(format!("{disk}.raw"))))
        .collect()
}

fn file_system(image: &Path) -> (bool, bool) {
    let header = Command::new("dumpe2fs").arg("-h").arg(image).output();
    let header = String::from_utf8_lossy(&header.unwrap().stdout).into_owned();
    assert!(header.contains("has_journal"), "{header}");
    let check = Command::new("e2fsck").arg("-fn").arg(image).output();
    (
        !header.contains("needs_recovery"),
        check.unwrap().status.success(),
    )
}

#[test]
fn a_real_system_is_quiesced_hooked_and_never_left_frozen() {
    let mut lab = boot("quiesce");
    for method in ["fleece", "snapshot"] {
        quiesced(&mut lab, method);
    }
    not_quiesced(&mut lab);
    the_guest_s_hook_refuses(&mut lab);
    the_host_s_hooks(&mut lab);
    a_host_s_hook_fails(&mut lab);
    killed_between_the_hooks(&mut lab);
    the_agent_hangs(&mut lab);
    lab.is_clean();
    lab.progresses();
}

fn quiesced(lab: &mut Lab, method: &str) {
    let before = said(lab, "hook: thaw");
    let backup = lab
        .backup(&["--quiesce", "always", "--freeze", method])
        .code(0);
    let made = point(&backup);
    assert_eq!(made["quiesce"], "quiesced", "{made}");
    assert_eq!(made["file_systems"], 2, "{made}");
    assert_eq!(made["not_quiesced"], Value::Null);
    println!(
        "{method}: quiesced for {} ms, freeze {} ms, released {} ms",
        made["quiesced_ms"], made["freeze_ms"], made["released_ms"]
    );
    assert!(thawed(lab));
    assert!(said(lab, "hook: freeze") > 0);
    wait_for("the guest's hook is not told of the thaw", || {
        said(lab, "hook: thaw") > before
    });
    assert_eq!(clean(lab, &backup), [(true, true), (true, true)]);
    let shown = lab.run(&["show", &backup.point()]).code(0);
    assert_eq!(shown.json["point"]["statistics"]["file_systems"], 2);
    is_committed(lab);
    lab.is_clean();
}

/// No disk is on an overlay.
fn is_committed(lab: &Lab) {
    let disks = lab.domain.virsh(&["domblklist", lab.domain.name()]);
    let disks = disks.unwrap();
    assert!(!disks.contains("overlay"), "{disks}");
}

fn not_quiesced(lab: &mut Lab) {
    let backup = lab.backup(&["--quiesce", "never"]).code(0);
    assert_eq!(point(&backup)["quiesce"], "crash-consistent");
    assert_eq!(point(&backup)["not_quiesced"], "it was not asked for");
    let found = clean(lab, &backup);
    assert!(!found[0].0 && !found[1].0, "{found:?}");
}

fn the_guest_s_hook_refuses(lab: &mut Lab) {
    inside(lab, "touch /run/refuse");
    let failed = lab.backup(&["--quiesce", "always"]).code(1);
    assert!(
        failed.json["errors"].to_string().contains("hook"),
        "{failed:?}"
    );
    assert!(thawed(lab));
    lab.is_clean();
    let backup = lab.backup(&["--quiesce", "auto"]).code(3);
    assert_eq!(point(&backup)["quiesce"], "crash-consistent");
    let why = point(&backup)["not_quiesced"].as_str().unwrap().to_owned();
    assert!(why.contains("hook"), "{why}");
    assert!(
        backup.json["warnings"]
            .to_string()
            .contains("the guest is not quiesced")
    );
    assert!(thawed(lab));
    inside(lab, "rm /run/refuse");
}

/// A script for the host that notes its environment.
fn noting(lab: &Lab) -> String {
    let log = lab.path("hooks");
    std::fs::remove_file(&log).ok();
    format!(
        "env | grep ^FORERUN_ | sort | tr '\\n' ' ' >>{0}; echo >>{0}",
        log.display()
    )
}

fn noted(lab: &Lab) -> Vec<String> {
    let text = std::fs::read_to_string(lab.path("hooks")).unwrap_or_default();
    text.lines().map(|line| line.trim().to_owned()).collect()
}

fn the_host_s_hooks(lab: &mut Lab) {
    let (name, uuid) = (lab.name(), lab.uuid().to_owned());
    let note = noting(lab);
    let hooks = [
        "--pre-freeze",
        &note,
        "--post-thaw",
        &note,
        "--post-backup",
        &note,
    ];
    let backup = lab
        .backup(&[&["--quiesce", "always"], &hooks[..]].concat())
        .code(0);
    let common = |hook: &str| {
        let repo = lab.repo.display();
        format!("FORERUN_HOOK={hook} FORERUN_KEY={uuid} FORERUN_REPO={repo} FORERUN_TARGET={name}")
    };
    let said = noted(lab);
    let has = |line: &str, more: &str, hook: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let wanted = format!("{} {more}", common(hook));
        let mut wanted: Vec<&str> = wanted.split(' ').collect();
        wanted.sort_unstable();
        assert_eq!(words, wanted);
    };
    assert_eq!(said.len(), 3, "{said:?}");
    has(&said[0], "FORERUN_QUIESCE=always", "pre-freeze");
    has(&said[1], "FORERUN_QUIESCE=always", "post-thaw");
    let last = format!(
        "FORERUN_CONSISTENCY=quiesced FORERUN_EXIT=0 FORERUN_POINT={} FORERUN_QUIESCE=always FORERUN_STATUS=done",
        backup.point()
    );
    has(&said[2], &last, "post-backup");

    // The hooks' time is not the guest's.
    let slow = ["--pre-freeze", "sleep 5", "--post-thaw", "sleep 5"];
    let backup = lab
        .backup(&[&["--quiesce", "always"], &slow[..]].concat())
        .code(0);
    let made = point(&backup);
    assert!(made["quiesced_ms"].as_u64() < Some(5000), "{made}");
    assert!(made["released_ms"].as_u64() < Some(5000), "{made}");
}

fn a_host_s_hook_fails(lab: &mut Lab) {
    // One that fails, or hangs, before the freeze: no point, and the other one is run all the same.
    for (command, how) in [("exit 9", "ended with code 9"), ("sleep 600", "was killed")] {
        let note = noting(lab);
        let frozen_before = self::said(lab, "hook: freeze");
        let hooks = [
            "--pre-freeze",
            command,
            "--post-thaw",
            &note,
            "--hook-timeout",
            "8s",
        ];
        let failed = lab
            .backup(&[&["--post-backup", &note], &hooks[..]].concat())
            .code(7);
        assert!(
            failed.json["errors"].to_string().contains(how),
            "{failed:?}"
        );
        let said = noted(lab);
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].contains("FORERUN_HOOK=post-thaw"), "{said:?}");
        assert!(said[1].contains("FORERUN_EXIT=7"), "{said:?}");
        assert!(said[1].contains("FORERUN_STATUS=attention"), "{said:?}");
        assert_eq!(self::said(lab, "hook: freeze"), frozen_before);
        lab.is_clean();
    }
    // After it the point stands.
    for hook in ["--post-thaw", "--post-backup"] {
        let warned = lab.backup(&[hook, "exit 1"]).code(3);
        assert!(
            warned.json["warnings"]
                .to_string()
                .contains("ended with code 1")
        );
        warned.point();
    }
}

fn killed_between_the_hooks(lab: &mut Lab) {
    let name = lab.name();
    // An end by a signal, and deaths, with the guest frozen or about to be.
    for (method, action, step) in [
        ("fleece", "term", "hook:pre-freeze:ended"),
        ("fleece", "kill", "qga:guest-fsfreeze-freeze:answered"),
        (
            "fleece",
            "kill-with-guard",
            "qga:guest-fsfreeze-freeze:answered",
        ),
        ("fleece", "kill-with-guard", "hook:pre-freeze:started"),
        // On an overlay, and frozen.
        ("snapshot", "kill", "snapshot:answered"),
        ("snapshot", "kill-with-guard", "snapshot:answered"),
    ] {
        let note = noting(lab);
        let fault = format!("{action}@{step}#1");
        let words = [
            "backup",
            &name,
            "--freeze",
            method,
            "--pre-freeze",
            "true",
            "--post-thaw",
            &note,
        ];
        let ended = lab.start(&words, &fault).end();
        if action == "term" {
            assert_eq!(ended.status.code(), Some(130), "{ended:?}");
        } else {
            assert_eq!(ended.status.signal(), Some(9), "{ended:?}");
        }
        if action == "kill-with-guard" {
            assert_eq!(noted(lab), Vec::<String>::new());
            let recovered = lab.run(&["recover", &name]).code(0);
            assert!(
                recovered.json.to_string().contains("post-thaw"),
                "{recovered:?}"
            );
        }
        wait_for("the hook after the thaw is not run", || {
            noted(lab).len() == 1
        });
        assert!(noted(lab)[0].contains("FORERUN_HOOK=post-thaw"));
        wait_for("the guest stays frozen", || thawed(lab));
        wait_for("the host state is not settled", || {
            lab.host_state().is_empty()
        });
        is_committed(lab);
        lab.is_clean();
    }
}

fn the_agent_hangs(lab: &mut Lab) {
    let name = lab.name();
    // Within a freeze that was not answered in time; the agent goes on with it when it wakes.
    for (quiesce, method, code) in [
        ("auto", "fleece", 3),
        ("always", "fleece", 1),
        ("auto", "snapshot", 3),
    ] {
        // Each takes as long as the agent sleeps.
        if method == "snapshot" && std::env::var_os("FORERUN_KILL_ALL").is_none() {
            continue;
        }
        inside(lab, "echo 8 >/run/hang");
        let begin = clock::now();
        let ended = lab
            .backup(&[
                "--quiesce",
                quiesce,
                "--freeze",
                method,
                "--freeze-timeout",
                "3s",
            ])
            .code(code);
        let took = clock::now() - begin;
        println!("{quiesce}, {method}, with an agent that hangs: {took:?}");
        assert!(took < Duration::from_secs(100), "{took:?}");
        let words = ended.json.to_string();
        assert!(words.contains("the guest is not quiesced"), "{words}");
        wait_for("the guest stays frozen", || thawed(lab));
        is_committed(lab);
        lab.is_clean();
        lab.progresses();
    }
    // The program dies while it waits for that answer.
    for action in ["kill", "kill-with-guard"] {
        inside(lab, "echo 6 >/run/hang");
        let fault = format!("{action}@qga:guest-fsfreeze-freeze:answered#1");
        let words = [
            "backup",
            &name,
            "--quiesce",
            "always",
            "--freeze-timeout",
            "2s",
        ];
        let ended = lab.start(&words, &fault).end();
        assert_eq!(ended.status.signal(), Some(9), "{ended:?}");
        if action == "kill" {
            wait_for("the guard does not thaw", || lab.host_state().is_empty());
        } else {
            // Nobody is left: the freeze comes when the agent wakes, and stays until the next command.
            wait_for("the agent sleeps on", || frozen(lab));
            lab.run(&["recover", &name]).code(0);
        }
        assert!(thawed(lab));
        lab.is_clean();
        lab.progresses();
    }
    let backup = lab.backup(&["--quiesce", "always"]).code(0);
    assert_eq!(clean(lab, &backup), [(true, true), (true, true)]);
    lab.domain.wait_for("GUEST-UP", WAIT).unwrap();
}
