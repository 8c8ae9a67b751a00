//! Forgetting: what a policy keeps is kept, the last good point and pinned ones stay, damaged ones are nobody's to count or to
//! take, and a crash anywhere leaves what the next forget finishes. The program is run for what only it does.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod image_common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use forerun::image::{Error, Manifest, PointId, Policy, Repository, Selection};
use image_common::memory::{Fate, Memory};
use image_common::{BLOCK, Bench, restore};
use jiff::tz::TimeZone;
use serde_json::Value;

/// Publishes a point with the disks of another one.
fn point(repo: &Repository, like: &Manifest, key: &str, instant: &str) -> PointId {
    let mut point = like.clone();
    point.id = PointId::random().unwrap();
    key.clone_into(&mut point.target.key);
    point.target.spellings = vec![format!("qmp:/run/{key}.sock")];
    point.instant = instant.parse().unwrap();
    repo.publish(&point).unwrap()
}

fn last(count: u32) -> Selection {
    Selection::Policy {
        policy: Policy {
            last: count,
            ..Policy::default()
        },
        zone: TimeZone::UTC,
        targets: None,
    }
}

fn these(points: &[PointId], allow_last: bool) -> Selection {
    Selection::Points {
        points: points.iter().copied().collect(),
        allow_last,
    }
}

fn ids(repo: &Repository) -> BTreeSet<PointId> {
    repo.points()
        .unwrap()
        .points
        .iter()
        .map(|point| point.id)
        .collect()
}

/// Three points of `a` and one, older than all, of `b`.
fn bench() -> (Bench, [PointId; 3], PointId) {
    let mut bench = Bench::new(BLOCK);
    bench.write(0, b"content");
    let like = bench.backup();
    let a = [
        "2026-11-01T02:00Z",
        "2026-11-02T02:00Z",
        "2026-11-03T02:00Z",
    ]
    .map(|instant| point(&bench.repo, &like, "a", instant));
    let b = point(&bench.repo, &like, "b", "2020-01-01T00:00Z");
    bench.repo.forget(&these(&[like.id], true)).unwrap();
    // The next one has no base, then.
    bench.last = None;
    (bench, a, b)
}

#[test]
fn a_policy_is_each_targets_own() {
    let (bench, a, b) = bench();
    let plan = bench.repo.plan_forget(&last(1)).unwrap();
    assert_eq!(ids(&bench.repo).len(), 4, "a plan does nothing");
    let done = bench.repo.forget(&last(1)).unwrap();
    assert_eq!(ids(&bench.repo), [a[2], b].into());
    for plan in [plan, done] {
        assert_eq!(plan.targets.len(), 2);
        let gone: Vec<_> = plan.targets[0]
            .forgotten
            .iter()
            .map(|point| point.id)
            .collect();
        assert_eq!(gone, a[..2], "oldest first");
        assert!(plan.warnings.is_empty());
    }
}

#[test]
fn a_pin_keeps_a_point_and_goes_with_it() {
    let (bench, a, _) = bench();
    let repo = &bench.repo;
    repo.pin(a[0], Some("audit".into())).unwrap();
    assert!(matches!(repo.pin(a[0], None), Err(Error::Exists { .. })));
    let plan = repo.forget(&last(1)).unwrap();
    let (kept, reasons) = &plan.targets[0].kept[0];
    assert_eq!(
        (kept.id, reasons[0].to_string()),
        (a[0], "pinned: audit".into())
    );
    let error = repo.forget(&these(&[a[0]], false)).unwrap_err();
    assert!(error.to_string().contains("is pinned"), "{error}");
    assert!(repo.unpin(a[0]).unwrap());
    assert!(!repo.unpin(a[0]).unwrap());
    repo.pin(a[0], None).unwrap();
    // Its point goes by other means; the pin must not wait for another of this name.
    repo.store().delete(&[format!("points/{}", a[0])]).unwrap();
    let plan = repo.forget(&last(1)).unwrap();
    assert_eq!(plan.stray_pins, [a[0]]);
    assert!(bench.objects("pins/").is_empty());
    assert!(repo.pin(a[0], None).unwrap_err().is_not_found());
}

#[test]
fn a_damaged_pin_pins() {
    let (bench, a, _) = bench();
    let object = format!("pins/{}", a[0]);
    bench.repo.store().put(&object, b"nonsense").unwrap();
    let plan = bench.repo.forget(&last(1)).unwrap();
    assert_eq!(plan.targets[0].kept[0].0.id, a[0]);
    assert!(plan.warnings[0].contains(&object), "{:?}", plan.warnings);
}

#[test]
fn the_last_good_point_needs_a_word_more() {
    let (bench, a, b) = bench();
    let repo = &bench.repo;
    for points in [&a[..], &[b]] {
        let error = repo.forget(&these(points, false)).unwrap_err();
        assert!(error.to_string().contains("--allow-last"), "{error}");
    }
    assert_eq!(ids(repo).len(), 4, "a refusal does nothing");
    repo.forget(&these(&a[1..], false)).unwrap();
    repo.forget(&these(&[a[0], b], true)).unwrap();
    assert!(ids(repo).is_empty());
    assert!(repo.forget(&these(&[b], true)).unwrap_err().is_not_found());
}

#[test]
fn what_is_damaged_is_not_counted_and_not_taken() {
    let (mut bench, a, _) = bench();
    // The newest of `a` has a layer of its own, which is lost; the second newest is unreadable.
    bench.write(0, b"other");
    let mut like = bench.backup();
    bench
        .repo
        .store()
        .delete(&[format!("maps/{}", like.disks[0].map.layers[0].id)])
        .unwrap();
    like.id = PointId::random().unwrap();
    like.target.key = "a".into();
    like.instant = "2026-11-09T00:00Z".parse().unwrap();
    let object = format!("points/{}", like.id);
    assert!(bench.repo.publish(&like).is_err());
    let envelope = std::fs::read(bench.path().join(format!("points/{}", a[2]))).unwrap();
    let mut json: Value =
        serde_json::from_slice(envelope.splitn(2, |byte| *byte == b'\n').nth(1).unwrap()).unwrap();
    let fresh = serde_json::to_value(&like).unwrap();
    json["disks"] = fresh["disks"].clone();
    json["id"] = fresh["id"].clone();
    json["instant"] = fresh["instant"].clone();
    bench
        .repo
        .store()
        .put(&object, &sealed("point", &json))
        .unwrap();
    let torn = format!("points/{}", a[2]);
    bench
        .repo
        .store()
        .delete(std::slice::from_ref(&torn))
        .unwrap();
    bench.repo.store().put(&torn, b"torn").unwrap();

    let plan = bench.repo.forget(&last(1)).unwrap();
    let of_a = plan
        .targets
        .iter()
        .find(|target| target.key == "a")
        .unwrap();
    assert_eq!(of_a.kept[0].0.id, a[1], "the newest good one");
    assert_eq!(
        bench
            .objects("points/")
            .iter()
            .filter(|name| **name == object || **name == torn)
            .count(),
        2
    );
    assert!(
        plan.warnings.iter().any(|words| words.contains(&torn)),
        "{:?}",
        plan.warnings
    );
    assert!(
        plan.warnings.iter().any(|words| words.contains("maps/")),
        "{:?}",
        plan.warnings
    );
    // They are no last good ones either, and go by name.
    let error = bench.repo.forget(&these(&[a[1]], false)).unwrap_err();
    assert!(error.to_string().contains("--allow-last"), "{error}");
    let plan = bench.repo.forget(&these(&[a[2], like.id], false)).unwrap();
    assert_eq!(plan.damaged, [a[2]]);
    assert!(
        bench
            .objects("points/")
            .iter()
            .all(|name| *name != object && *name != torn)
    );
}

/// A JSON object as the repository writes it.
fn sealed(kind: &str, value: &Value) -> Vec<u8> {
    let body = serde_json::to_vec(value).unwrap();
    let digest = image_common::sha256(&body);
    let mut bytes = format!("forerun {kind} 1 {} {digest}\n", body.len()).into_bytes();
    bytes.extend(body);
    bytes
}

#[test]
fn a_rule_counts_the_points_of_each_disk_and_what_a_name_takes_is_told() {
    let (bench, a, _) = bench();
    let mut like = bench.repo.point(a[2]).unwrap();
    like.disks[0].key = "vdb".into();
    let other = point(&bench.repo, &like, "a", "2026-11-04T00:00Z");
    bench.repo.forget(&last(1)).unwrap();
    assert!(ids(&bench.repo).contains(&a[2]) && ids(&bench.repo).contains(&other));
    assert!(!ids(&bench.repo).contains(&a[1]));
    let plan = bench.repo.forget(&these(&[a[2]], false)).unwrap();
    assert_eq!(
        plan.warnings,
        [format!("{} is the last point that has disk vda of a", a[2])]
    );
}

#[test]
fn nothing_to_keep_is_nothing_to_do() {
    let (bench, ..) = bench();
    assert!(bench.repo.forget(&last(0)).is_err());
    assert_eq!(ids(&bench.repo).len(), 4);
}

#[test]
fn two_plans_do_not_rely_on_each_others_points() {
    let (bench, a, _) = bench();
    let _lock = bench.repo.store().lock("forget", "another").unwrap();
    assert!(matches!(
        bench.repo.forget(&last(1)),
        Err(Error::Busy { .. })
    ));
    assert!(matches!(
        bench.repo.pin(a[0], None),
        Err(Error::Busy { .. })
    ));
}

#[test]
fn a_crash_leaves_points_that_the_next_forget_takes() {
    let mut bench = Bench::in_memory(2 * BLOCK);
    let mut content = Vec::new();
    for round in 1..=5 {
        bench.write(BLOCK, &[round; 10]);
        content.push((bench.backup(), bench.disk.clone()));
    }
    bench.repo.pin(content[1].0.id, None).unwrap();
    let stray = PointId::random().unwrap();
    let mut objects = std::collections::BTreeMap::new();
    for name in ["", "points/", "maps/", "packs/", "index/", "pins/"] {
        for object in bench.repo.store().list(name).unwrap() {
            let bytes = bench.repo.store().get(&object).unwrap();
            objects.insert(object, bytes);
        }
    }
    let pin = objects[&format!("pins/{}", content[1].0.id)].clone();
    objects.insert(format!("pins/{stray}"), pin);
    for fate in [Fate::Lost, Fate::Done] {
        // Three points and a stray pin.
        for at in 1..=4 {
            let store = Memory::new(objects.clone(), Some(at), fate);
            let repo = Repository::open_store(Arc::new(store.clone())).unwrap();
            repo.forget(&last(1)).unwrap_err();
            let repo =
                Repository::open_store(Arc::new(Memory::new(store.objects(), None, fate))).unwrap();
            let left = repo.points().unwrap();
            assert!(left.damaged.is_empty());
            // Those that are left are the newest and the pinned one.
            let gone = content
                .iter()
                .filter(|(point, _)| left.points.iter().all(|left| left.id != point.id));
            let gone = gone.count();
            assert!(
                gone <= 3 && gone <= usize::try_from(at).unwrap(),
                "{gone} at {at}"
            );
            for (point, disk) in &content {
                if let Some(left) = left.points.iter().find(|left| left.id == point.id) {
                    assert!(&restore(&repo, &left.disks[0]).unwrap() == disk);
                }
            }
            repo.forget(&last(1)).unwrap();
            assert_eq!(ids(&repo), [content[1].0.id, content[4].0.id].into());
            assert_eq!(repo.store().list("pins/").unwrap().len(), 1);
        }
    }
}

fn run(repo: &Path, args: &[&str]) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(env!("CARGO_BIN_EXE_forerun"))
        .args(args)
        .env("FORERUN_REPO", repo)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

#[test]
fn the_program_never_forgets_for_want_of_words() {
    let (bench, a, _) = bench();
    let path = bench.path();
    let a0 = a[0].to_string();
    for args in [
        &["forget"][..],
        &["forget", "a"],
        &["forget", "--all-targets"],
        &["forget", "--keep-last", "1"],
        &["forget", "--keep-last", "0", "a"],
        &["forget", "--keep-last", "1", "--point", &a0],
        &["forget", "--keep-last", "1", "a", "--tz", "Mars/Olympus"],
        &["forget", "--keep-last", "1", "a", "--allow-last"],
        &["forget", "a", "--point", &a0],
    ] {
        let (code, _, words) = run(&path, args);
        assert_eq!(code, 2, "{args:?}: {words}");
    }
    let (code, _, words) = run(&path, &["forget", "c", "--keep-last", "1"]);
    assert_eq!(code, 1, "{words}");
    assert!(words.contains("qmp:/run/a.sock (a)"), "{words}");
    assert_eq!(ids(&bench.repo).len(), 4);
}

#[test]
fn the_program_says_what_it_keeps_and_why() {
    let (bench, a, b) = bench();
    let path = bench.path();
    let (code, ..) = run(&path, &["pin", &a[0].to_string()[..6], "--reason", "audit"]);
    assert_eq!(code, 0);
    let (_, listed, _) = run(&path, &["list"]);
    assert!(listed.contains("pinned: audit"), "{listed}");
    let (_, shown, _) = run(&path, &["--json", "show", &a[0].to_string()]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["point"]["pinned"]["reason"], "audit");

    let policy = [
        "forget",
        "qmp:/run/a.sock",
        "--keep-daily",
        "1",
        "--tz",
        "UTC",
        "--json",
    ];
    let dry: Vec<&str> = policy.iter().copied().chain(["--dry-run"]).collect();
    let (code, said, words) = run(&path, &dry);
    assert_eq!(code, 0, "{words}");
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["forget"]["dry_run"], true);
    assert_eq!(ids(&bench.repo).len(), 4);
    let (code, done, words) = run(&path, &policy);
    assert_eq!(code, 0, "{words}");
    let done: Value = serde_json::from_str(&done).unwrap();
    assert_eq!(done["targets"], said["targets"]);
    assert_eq!(done["targets"][0]["kept"][0]["reasons"][0], "pinned: audit");
    assert_eq!(
        done["targets"][0]["kept"][1]["reasons"][0],
        "daily 2026-11-03"
    );
    assert_eq!(
        done["targets"][0]["forgotten"][0]["point"],
        a[1].to_string()
    );
    assert_eq!(
        ids(&bench.repo),
        [a[0], a[2], b].into(),
        "only of the target"
    );

    assert_eq!(run(&path, &["pin", &a[0].to_string()]).0, 1);
    assert_eq!(run(&path, &["unpin", &a[0].to_string()]).0, 0);
    assert_eq!(run(&path, &["unpin", &a[0].to_string()]).0, 3);
    let (code, said, _) = run(
        &path,
        &[
            "forget",
            "--point",
            &a[0].to_string(),
            "qmp:/run/a.sock@latest",
        ],
    );
    assert_eq!(code, 1, "{said}");
    let (code, said, words) = run(&path, &["forget", "--point", &a[0].to_string()]);
    assert_eq!(code, 0, "{words}");
    assert!(said.contains("forerun prune"), "{said}");
    assert_eq!(ids(&bench.repo), [a[2], b].into());
}
