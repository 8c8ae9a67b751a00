//! `init`, `list`, `show` and `diff`.

use anyhow::Result;
use serde_json::{Value, json};

use super::{counted, secret};
use crate::cli::{InitArgs, RepoArgs};
use crate::clock;
use crate::exit::{Failure, Kind};
use crate::image::{self, InitOptions, Manifest, Pins, PointId, Repository};
use crate::report::Outcome;
use crate::units::{BlockSize, Bytes};

/// `init`.
pub(super) fn init(args: &InitArgs) -> Result<Outcome> {
    let path = &args.repo;
    let block_size = u32::try_from(args.block_size)
        .map_err(|_| format!("block size {} is too large", args.block_size))
        .and_then(BlockSize::try_from)
        .map_err(|message| Failure::plain(Kind::Usage, message))?;
    let options = InitOptions {
        block_size,
        compression: args.compression,
    };
    let repo = match secret::for_new_repository(args.encrypt, &args.secret)? {
        Some(secret) => Repository::init_encrypted(path, options, &secret, &args.label)?,
        None => Repository::init(path, options)?,
    };
    let mut outcome = Outcome::default();
    outcome.line(format!(
        "repository {} with blocks of {block_size} in {}",
        repo.id(),
        path.display()
    ));
    if repo.is_encrypted() {
        outcome.line(
            "  encrypted: without its keys nothing of it can be read, so keep a copy of the key file or passphrase and of `keys/` elsewhere"
                .to_owned(),
        );
    }
    outcome.more.insert(
        "repository".to_owned(),
        json!({
            "id": repo.id(), "path": path, "block_size": block_size.bytes(),
            "compression": args.compression, "encrypted": repo.is_encrypted(),
        }),
    );
    Ok(outcome)
}

/// `list`.
pub(super) fn list(args: &RepoArgs, target: Option<&str>) -> Result<Outcome> {
    let repo = secret::open(args)?;
    let points = repo.points()?;
    let pins = repo.pins()?;
    let mut outcome = Outcome::default();
    let (mut listed, mut rows) = (Vec::new(), Vec::new());
    for point in &points.points {
        if target.is_some_and(|target| !point.target.is_called(target)) {
            continue;
        }
        let size: u64 = point.guest_disks().map(|disk| disk.size).sum();
        let disks: Vec<&str> = point.guest_disks().map(|disk| disk.key.as_str()).collect();
        rows.push([
            point.id.to_string(),
            clock::local(point.instant),
            name_of(point).to_owned(),
            format!("{} on {}{}", Bytes(size), disks.join(", "), without(point)),
            quiesce(point),
            pinned_words(&pins, point.id).trim_start().to_owned(),
        ]);
        listed.push(summary(point, &pins));
    }
    for line in aligned(&rows) {
        outcome.line(line);
    }
    if points.points.is_empty() && points.damaged.is_empty() && target.is_none() {
        outcome.line(format!(
            "the repository {} holds no points",
            args.repo.display()
        ));
    }
    let unread = pins
        .damaged
        .iter()
        .map(|error| format!("a pin cannot be read: {error}"));
    outcome.warnings.extend(unread);
    for error in &points.damaged {
        outcome
            .warnings
            .push(format!("a point cannot be read: {error}"));
        outcome.kind = Some(Kind::Corrupt);
    }
    // A name that nothing is called by is a slip, unless it is that of a point that cannot be read.
    if let (Some(name), true, true) = (target, listed.is_empty(), points.damaged.is_empty()) {
        outcome
            .errors
            .push(super::forget::no_target(&points.points, name));
    }
    outcome
        .more
        .insert("points".to_owned(), Value::from(listed));
    Ok(outcome)
}

/// What a point is without, in a list.
fn without(point: &Manifest) -> String {
    match point.without()[..] {
        [] => String::new(),
        ref names => format!(", without {}", names.join(", ")),
    }
}

/// The rows as lines, each column as wide as its longest cell.
fn aligned<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let wide = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(wide);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths);
        let cells: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

fn pinned_words(pins: &Pins, point: PointId) -> String {
    match (pins.has(point), pins.reason(point)) {
        (false, _) => String::new(),
        (true, None) => "  pinned".to_owned(),
        (true, Some(why)) => format!("  pinned: {why}"),
    }
}

/// What a target is called, as people know it.
pub(super) fn name_of(point: &Manifest) -> &str {
    point
        .target
        .spellings
        .first()
        .map_or(point.target.key.as_str(), String::as_str)
}

fn quiesce(point: &Manifest) -> String {
    serde_json::to_value(point.quiesce)
        .ok()
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

fn summary(point: &Manifest, pins: &Pins) -> Value {
    let pinned = pins.has(point.id).then(|| {
        let pin = pins.pins.get(&point.id).and_then(Option::as_ref);
        json!({ "reason": pin.and_then(|pin| pin.reason.clone()), "since": pin.map(|pin| pin.since) })
    });
    json!({
        "id": point.id, "target": point.target, "instant": point.instant, "parent": point.parent,
        "freeze": point.freeze, "quiesce": point.quiesce,
        "disks": point.guest_disks().map(|disk| json!({
            "key": disk.key, "size": disk.size, "format": disk.format, "rescanned": disk.rescanned,
        })).collect::<Vec<_>>(),
        "without": point.without(),
        "files": point.files().map(|(stored, file)| json!({
            "name": file.name, "role": file.role, "size": stored.size, "path": file.path,
        })).collect::<Vec<_>>(),
        "statistics": point.statistics, "pinned": pinned, "origin": point.origin,
    })
}

/// `show`.
pub(super) fn show(args: &RepoArgs, point: &str) -> Result<Outcome> {
    let repo = secret::open(args)?;
    let point = repo.resolve(point)?;
    let mut outcome = Outcome::default();
    outcome.line(format!("point {}", point.id));
    outcome.line(format!(
        "  target {} ({})",
        point.target.key,
        point.target.spellings.join(", ")
    ));
    outcome.line(format!(
        "  instant {} ({})",
        clock::local(point.instant),
        point.instant
    ));
    outcome.line(format!("  {} by {}", quiesce(&point), point.freeze));
    for disk in point.guest_disks() {
        outcome.line(format!(
            "  disk {}  {}  {}",
            disk.key,
            disk.format,
            Bytes(disk.size)
        ));
        if let Some(why) = &disk.rescanned {
            outcome.line(format!("    read in full: {why}"));
        }
    }
    for name in point.without() {
        outcome.line(format!("  without {name}"));
    }
    if let Some(domain) = point.machine.get("domain") {
        outcome.line(domain_words(domain));
    }
    for (stored, file) in point.files() {
        let from = file.path.as_ref().map(|path| format!("  from {path}"));
        outcome.line(format!(
            "  file {}  {}{}",
            file.name,
            Bytes(stored.size),
            from.unwrap_or_default()
        ));
    }
    if let Some(origin) = point.origin {
        outcome.line(format!("  copied from repository {}", origin.repository));
    }
    let pins = repo.pins()?;
    if pins.has(point.id) {
        outcome.line(pinned_words(&pins, point.id));
    }
    for line in numbers(&point.statistics) {
        outcome.line(format!("  {line}"));
    }
    let mut full = summary(&point, &pins);
    full["machine"] = point.machine.clone();
    outcome.more.insert("point".to_owned(), full);
    Ok(outcome)
}

/// What is known of a point's domain.
fn domain_words(domain: &Value) -> String {
    let mut words = format!("  domain of {}", domain["uri"].as_str().unwrap_or_default());
    let facts = [
        ("autostart", ", started with the host"),
        ("without_secrets", ", its definition without passwords"),
    ];
    if domain["persistent"] == false {
        words.push_str(", transient");
    }
    for (fact, said) in facts {
        if domain[fact] == true {
            words.push_str(said);
        }
    }
    if let Some(path) = domain.pointer("/loader/path").and_then(Value::as_str) {
        words.push_str(", firmware ");
        words.push_str(path);
    }
    words
}

/// What the backup measured, as far as it is known.
fn numbers(statistics: &Value) -> Vec<String> {
    let number = |at: &str| statistics.pointer(at).and_then(Value::as_u64);
    let bytes = [
        ("precopied", "/bytes/precopied"),
        ("superseded", "/bytes/superseded"),
        ("residual", "/bytes/residual"),
        ("stored", "/bytes/stored"),
    ];
    let bytes = bytes.map(|(what, at)| Some(format!("{what} {}", Bytes(number(at)?))));
    let times = [
        ("freeze", "/freeze_ms"),
        ("guest released after", "/released_ms"),
        ("file systems frozen for", "/quiesced_ms"),
        ("window", "/window_ms"),
    ];
    let times = times.map(|(what, at)| Some(format!("{what} {} ms", number(at)?)));
    let joined = |parts: [Option<String>; 4]| parts.into_iter().flatten().collect::<Vec<_>>();
    [joined(bytes), joined(times)]
        .into_iter()
        .filter(|parts| !parts.is_empty())
        .map(|parts| parts.join(", "))
        .collect()
}

/// `diff`.
pub(super) fn diff(args: &RepoArgs, a: &str, b: &str) -> Result<Outcome> {
    let repo = secret::open(args)?;
    let (a, b) = (repo.resolve(a)?, repo.resolve(b)?);
    let _lease = repo.lease(&[&a, &b], "forerun diff")?;
    let mut outcome = Outcome::default();
    let mut disks = Vec::new();
    for disk in b.guest_disks() {
        let Some(other) = a.guest_disks().find(|other| other.key == disk.key) else {
            outcome.line(format!("{}: only in {}", disk.key, b.id));
            disks.push(json!({ "disk": disk.key, "only_in": b.id }));
            continue;
        };
        let mut extents = Vec::new();
        let mut bytes = 0;
        let size = disk.size.max(other.size);
        for run in image::diff(&repo, &other.map, &disk.map)? {
            let extent = repo.block_size().run_extent(run?, size);
            bytes += extent.length;
            extents.push(extent);
        }
        outcome.line(format!(
            "{}: {} in {}",
            disk.key,
            Bytes(bytes),
            counted(extents.len() as u64, "extent")
        ));
        disks.push(json!({ "disk": disk.key, "bytes": bytes, "extents": extents }));
    }
    for disk in a
        .guest_disks()
        .filter(|disk| !b.guest_disks().any(|other| other.key == disk.key))
    {
        outcome.line(format!("{}: only in {}", disk.key, a.id));
        disks.push(json!({ "disk": disk.key, "only_in": a.id }));
    }
    outcome.more.insert("a".to_owned(), json!(a.id));
    outcome.more.insert("b".to_owned(), json!(b.id));
    outcome.more.insert("disks".to_owned(), Value::from(disks));
    Ok(outcome)
}
