//! Rules of the source tree that no compiler checks: files say what they are for and stay small, imports point one way,
//! one file prints, nothing names a host.

#![expect(clippy::unwrap_used, reason = "helpers of tests, too")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a file, its test module apart.
const LONGEST: usize = 700;

/// Who may import what of this crate. What a layer is not allowed here it must be handed by a caller.
const LAYERS: [(&str, &[&str]); 17] = [
    ("src/units.rs", &[]),
    ("src/clock.rs", &[]),
    ("src/fault.rs", &[]),
    ("src/unix_path.rs", &[]),
    ("src/progress.rs", &[]),
    ("src/throttle.rs", &["clock"]),
    ("src/budget", &["clock", "fault", "throttle"]),
    ("src/load", &["clock", "qmp", "throttle", "units"]),
    ("src/image", &["image", "units", "clock", "fault"]),
    ("src/nbd", &["nbd", "units", "clock", "unix_path"]),
    ("src/qmp", &["qmp", "units", "clock", "fault", "unix_path"]),
    (
        "src/libvirt",
        &["libvirt", "qmp", "clock", "fault", "target"],
    ),
    ("src/bitmap", &["bitmap", "qmp", "units", "clock", "fault"]),
    ("src/plan", &["plan", "bitmap", "units"]),
    ("src/copy.rs", &["image", "units"]),
    (
        "src/replicate.rs",
        &["image", "units", "copy", "exit", "progress", "throttle"],
    ),
    (
        "src/restore.rs",
        &[
            "image", "nbd", "qmp", "units", "clock", "progress", "exit", "bitmap",
        ],
    ),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn walk(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_file() {
        found.push(path.to_owned());
        return;
    }
    for entry in fs::read_dir(path).unwrap() {
        walk(&entry.unwrap().path(), found);
    }
}

/// The files under these places of the repository, as (path from its root, text). What is no text is left out.
fn files(places: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for place in places {
        walk(&root().join(place), &mut found);
    }
    found.sort();
    let texts = found.iter().filter_map(|path| {
        let name = path.strip_prefix(root()).unwrap().to_str().unwrap();
        Some((name.to_owned(), fs::read_to_string(path).ok()?))
    });
    texts.collect()
}

fn sources() -> Vec<(String, String)> {
    let mut all = files(&["src", "blockjob/src", "rig/src", "rig/tests", "tests"]);
    all.retain(|(name, _)| Path::new(name).extension().is_some_and(|end| end == "rs"));
    assert!(all.len() > 50, "the sources are not found");
    all
}

/// A file without its test module, which stands last.
fn without_tests(text: &str) -> &str {
    text.split("\n#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or(text)
}

#[test]
fn every_file_says_what_it_is_for() {
    for (name, text) in sources() {
        assert!(text.starts_with("//! "), "{name} does not open with `//! `");
    }
}

#[test]
fn no_file_is_too_long_to_read() {
    for (name, text) in sources() {
        let lines = without_tests(&text).lines().count();
        assert!(
            lines <= LONGEST,
            "{name} has {lines} lines: make it a folder"
        );
    }
}

/// The modules of this crate that a text names: `crate::a`, `crate::{a, b::c}`.
fn imports(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for rest in text.split("crate::").skip(1) {
        let list = match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap_or_default(),
            None => rest,
        };
        let names = if rest.starts_with('{') {
            list.split(',').collect()
        } else {
            vec![list]
        };
        for name in names {
            let name = name.trim();
            let end = name
                .find(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'))
                .unwrap_or(name.len());
            found.insert(name[..end].to_owned());
        }
    }
    found.remove("");
    found
}

#[test]
fn imports_are_found_in_every_spelling() {
    let text =
        "use crate::units::Extent; use crate::{clock, qmp::graph}; fn f(_: crate::nbd::Client)";
    let found: Vec<String> = imports(text).into_iter().collect();
    assert_eq!(found, ["clock", "nbd", "qmp", "units"]);
}

#[test]
fn imports_point_one_way() {
    for (place, allowed) in LAYERS {
        for (name, text) in files(&[place]) {
            // Rustdoc links may point anywhere; what counts is code.
            let code: String = text
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .collect::<Vec<_>>()
                .join("\n");
            for import in imports(without_tests(&code)) {
                assert!(
                    allowed.contains(&import.as_str()),
                    "{name} imports crate::{import}; it may import only {allowed:?}"
                );
            }
        }
    }
}

#[test]
fn one_file_prints() {
    let words = [
        "println!(",
        "print!(",
        "writeln!(std::io::std",
        "write!(std::io::std",
        "stdout().write",
        "stderr().write",
    ];
    for (name, text) in files(&["src"]) {
        for word in words {
            assert!(
                name == "src/report.rs" || !text.contains(word),
                "{name} prints: `{word}`"
            );
        }
    }
}

#[test]
fn nothing_names_a_host() {
    let scheme = ["http", "://"].concat();
    let secure = ["https", "://"].concat();
    let places = [
        "src",
        "blockjob/src",
        "blockjob/Cargo.toml",
        "rig/src",
        "rig/tests",
        "rig/Cargo.toml",
        "tests",
        "scripts",
        "docs",
        ".ci",
        "Cargo.toml",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "NOTICE",
    ];
    // The name of the format of pictures, which nobody connects to.
    let format = format!("xmlns=\"{scheme}www.w3.org/2000/svg\"");
    for (name, text) in files(&places) {
        let text = text.replace(&format, "");
        assert!(
            !text.contains(&scheme) && !text.contains(&secure),
            "{name} names a host"
        );
    }
}

#[test]
fn scripts_can_be_run_and_stop_at_the_first_error() {
    use std::os::unix::fs::PermissionsExt;
    for (name, text) in files(&["scripts", ".ci"]) {
        if name.starts_with("scripts/lib/") {
            assert!(text.starts_with("# shellcheck shell="), "{name}");
            continue;
        }
        let mode = fs::metadata(root().join(&name))
            .unwrap()
            .permissions()
            .mode();
        assert!(mode & 0o111 != 0, "{name} is not executable");
        assert!(text.starts_with("#!"), "{name} has no interpreter");
        assert!(text.contains("\nset -eu"), "{name} goes on after an error");
    }
}
