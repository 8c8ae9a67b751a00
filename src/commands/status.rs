//! `status`: what is not copied yet, how fast that grows, and what is to be expected of the backup.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::target::looking;
use super::{secret, several};
use crate::backup::{Learned, Note};
use crate::bitmap::track::{self, Tracked};
use crate::budget::Overview;
use crate::cli::{RepoTargetArgs, StatusArgs};
use crate::clock;
use crate::exit::Kind;
use crate::hoststate;
use crate::plan::outlook::OnMiss;
use crate::plan::{Debt, Limits, Outlook};
use crate::qmp::{graph, orphans};
use crate::report::Outcome;
use crate::schedule;
use crate::session::Session;
use crate::units::{BlockSize, Bytes};
use crate::vm::seen;

/// What was asked besides the targets.
#[derive(Debug, Clone, Copy)]
struct Asked {
    at: Option<Timestamp>,
    limits: Limits,
}

/// `status`: of one target in words, of several a line each.
pub(super) fn status(args: &StatusArgs, interrupted: &AtomicBool) -> Result<Outcome> {
    let at = args.at.as_deref().map(schedule::parse).transpose()?;
    let asked = Asked {
        at: at.map(|at| at.due),
        limits: Limits {
            window: args.max_window,
            residual: args.max_residual,
            on_miss: OnMiss::Backup,
        },
    };
    if several::chosen(&args.target.target, &[])?.is_none() {
        let mut outcome = one(&args.target, &asked)?;
        tell_host(&mut outcome);
        return Ok(outcome);
    }
    let mut all = several::each_of(&args.target, &[], interrupted, |target| one(target, &asked))?;
    all.lines = vec![line([
        "TARGET", "DIRTY", "PER HOUR", "RESIDUAL", "WINDOW", "DUE", "",
    ])];
    for target in &all.targets {
        all.lines.push(summary(target));
    }
    tell_host(&mut all);
    Ok(all)
}

/// What all runs of this host do together.
fn tell_host(outcome: &mut Outcome) {
    let host = Overview::of(&hoststate::root());
    if let Some(words) = host.line(|bytes| Bytes(bytes).to_string()) {
        outcome.line(format!("host  {words}"));
    }
    outcome.more.insert("host".to_owned(), host.to_json());
}

/// A line of at most 80 columns, unless a name is long.
fn line(words: [&str; 7]) -> String {
    let [target, dirty, rate, residual, window, due, verdict] = words;
    format!("{target:<22} {dirty:>10} {rate:>10} {residual:>10} {window:>8} {due:>5} {verdict}")
        .trim_end()
        .to_owned()
}

fn summary(target: &Value) -> String {
    let bytes = |pointer: &str| {
        let found = target.pointer(pointer).and_then(Value::as_u64);
        found.map_or_else(|| "-".to_owned(), |bytes| Bytes(bytes).to_string())
    };
    let window = target["window"]["predicted_ms"].as_u64();
    let window = window.map_or_else(|| "-".to_owned(), words_of);
    let verdict = if target["miss"].is_null() { "" } else { "MISS" };
    line([
        target["target"].as_str().unwrap_or(""),
        &bytes("/dirty"),
        &bytes("/change/bytes_per_hour"),
        &bytes("/residual/predicted"),
        &window,
        target["due_local"].as_str().unwrap_or("now"),
        verdict,
    ])
}

#[allow(clippy::cast_precision_loss, reason = "one decimal is shown")]
fn words_of(millis: u64) -> String {
    format!("{:.1} s", millis as f64 / 1000.0)
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate that is not negative"
)]
fn whole(bytes: f64) -> u64 {
    bytes.max(0.0) as u64
}

fn one(args: &RepoTargetArgs, asked: &Asked) -> Result<Outcome> {
    let repo = secret::open(&args.repo)?;
    let vm = super::find(&args.target, repo.is_encrypted())?;
    let mut hold = vm.hold(&looking(), "forerun status")?;
    hold.look()?;
    let session = Session::open(&repo, &vm.key)?;
    let mut outcome = Outcome::default();
    let mut disks = Vec::new();
    let mut debt = Debt::default();
    for disk in hold.disks() {
        let (tracked, confirmed) = match session.state.disks.get(&disk.key) {
            Some(tracked) => (Some(tracked), session.state.confirmed(tracked)),
            None => (session.bases.get(&disk.key), true),
        };
        let found = describe(&session, tracked, confirmed, disk, repo.block_size())?;
        let dirty = found.debt.total();
        debt.open += found.debt.open;
        debt.live += found.debt.live;
        debt.whole += found.debt.whole;
        debt.size += disk.size;
        outcome.line(format!(
            "{}  {}, at most {} to copy",
            disk.key,
            found.state,
            Bytes(dirty)
        ));
        disks.push(json!({
            "disk": disk.key, "size": disk.size, "state": found.state, "dirty": dirty, "doubt": found.doubt,
        }));
    }
    let session_id = session.id().map(|id| id.to_string());
    let parent = session.parent.map(|id| id.to_string());
    let begun = session.begun();
    let age = begun
        .and_then(|begun| u64::try_from(clock::utc_now().duration_since(begun).as_millis()).ok());
    let words = |id: &Option<String>| id.clone().unwrap_or_else(|| "none".to_owned());
    let old = age.map_or_else(String::new, |age| format!(", {} min old", age / 60_000));
    outcome.line(format!(
        "session {}{old}  last point {}",
        words(&session_id),
        words(&parent)
    ));
    let found = orphans::of(&mut hold.monitor, vm.state.directory(), None)?;
    if !found.is_empty() {
        outcome.warnings.push(format!(
            "{} things that no journal lists are in the VM; `forerun recover` takes them back",
            found.len()
        ));
    }
    let mut target = json!({
        "target": vm.target.to_string(), "key": vm.key, "disks": disks, "session": session_id,
        "session_age_ms": age, "last_point": parent, "leftovers": found, "dirty": debt.total(),
    });
    let short = repo.id().short();
    let seen = Expected::of(&vm.state, &short, &debt, asked);
    seen.tell(&mut outcome, &mut target);
    outcome.targets.push(target);
    Ok(outcome)
}

/// What is to be expected of the next backup.
struct Expected {
    rate: Option<u64>,
    note: Option<Note>,
    due: Option<Timestamp>,
    outlook: Outlook,
    miss: Option<String>,
}

impl Expected {
    fn of(
        state: &crate::hoststate::TargetState,
        repository: &str,
        debt: &Debt,
        asked: &Asked,
    ) -> Self {
        let learned = Learned::recall(state, repository);
        let note = Note::of_live_run(state, repository);
        let due = asked.at.or(note.as_ref().map(|note| note.due));
        let left = due.map(|due| due.duration_since(clock::utc_now()));
        let left = left
            .and_then(|left| Duration::try_from(left).ok())
            .unwrap_or(Duration::ZERO);
        let fit = learned.change.fit();
        let outlook = if note.is_some() {
            Outlook::with_passes(debt, fit, &learned.speeds, None, left)
        } else {
            Outlook::alone(debt, fit, &learned.speeds, None, left)
        };
        let noted = note.as_ref().map(Note::limits).unwrap_or_default();
        let limits = Limits {
            window: asked.limits.window.or(noted.window),
            residual: asked.limits.residual.or(noted.residual),
            ..asked.limits
        };
        let mut miss = limits.missed(outlook.residual, outlook.window_ms);
        let limited = limits.window.is_some() || limits.residual.is_some();
        if !limited && due.is_some() && !outlook.in_time {
            let copy = learned.speeds.copy(None);
            miss = Some(format!(
                "what is to be copied before takes longer than there is time, at {} a second",
                Bytes(whole(copy))
            ));
        }
        Self {
            rate: fit.map(|fit| whole(fit.dirty(3600.0))),
            note,
            due,
            outlook,
            miss,
        }
    }

    fn tell(self, outcome: &mut Outcome, target: &mut Value) {
        let local = self.due.map(|due| {
            let zone = clock::local_now().time_zone().clone();
            zone.to_datetime(due).strftime("%H:%M").to_string()
        });
        let when = local.as_deref().unwrap_or("now");
        let how = match (&self.note, self.due) {
            (Some(_), _) => "a run copies ahead",
            (None, Some(_)) => "if nothing is copied before",
            (None, None) => "if it is made now",
        };
        if let Some(rate) = self.rate {
            outcome.line(format!("changes  {} in an hour", Bytes(rate)));
        }
        outcome.line(format!(
            "backup {when}  residual {}, window {} ({how})",
            Bytes(self.outlook.residual),
            words_of(self.outlook.window_ms)
        ));
        if let Some(miss) = &self.miss {
            outcome.kind = Some(Kind::Missed);
            outcome.line(format!("would miss {when}: {miss}"));
        }
        let more = json!({
            "change": { "bytes_per_hour": self.rate },
            "due": self.due, "due_local": local, "running": self.note.is_some(),
            "residual": { "predicted": self.outlook.residual },
            "window": { "predicted_ms": self.outlook.window_ms },
            "miss": self.miss,
        });
        if let (Some(target), Value::Object(more)) = (target.as_object_mut(), more) {
            target.extend(more);
        }
    }
}

/// A disk as the session knows it.
struct Described {
    state: &'static str,
    debt: Debt,
    doubt: Option<String>,
}

fn describe(
    session: &Session,
    tracked: Option<&Tracked>,
    confirmed: bool,
    disk: &graph::Disk,
    block_size: BlockSize,
) -> Result<Described> {
    let whole = Debt {
        whole: disk.size,
        size: disk.size,
        ..Debt::default()
    };
    let Some(tracked) = tracked else {
        return Ok(Described {
            state: "not followed yet",
            debt: whole,
            doubt: None,
        });
    };
    let chain = match track::trust(tracked, confirmed, &seen(disk)) {
        Ok(chain) => chain,
        Err(why) => {
            return Ok(Described {
                state: "to be read in full",
                debt: whole,
                doubt: Some(why),
            });
        }
    };
    let mut debt = Debt {
        size: disk.size,
        ..Debt::default()
    };
    for named in &chain {
        let bitmap = disk.bitmaps.iter().find(|bitmap| bitmap.name == named.name);
        match bitmap {
            Some(bitmap) if bitmap.recording => debt.live += bitmap.count,
            Some(bitmap) => debt.open += bitmap.count,
            None => {}
        }
    }
    debt.live = debt.live.min(disk.size);
    debt.open = debt.open.min(disk.size);
    if let Some(epoch) = tracked.whole {
        // What is proved since needs no second reading, unless it changed.
        let (proofs, _) = session.proofs(tracked, block_size)?;
        let blocks = block_size.blocks(tracked.size);
        let mut left = crate::bitmap::blocks::BlockSet::new(blocks);
        let all = crate::units::BlockRun {
            first: 0,
            count: blocks,
        };
        proofs.unsafe_of(epoch, all, &mut left);
        debt.whole = (left.count() * block_size.bytes()).min(disk.size);
    }
    Ok(Described {
        state: "followed",
        debt,
        doubt: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_several_targets_fits_a_terminal() {
        let target = json!({
            "target": "production-web-0001", "dirty": 1_099_511_627_775_u64,
            "change": { "bytes_per_hour": 1_099_511_627_775_u64 }, "residual": { "predicted": 1_099_511_627_775_u64 },
            "window": { "predicted_ms": 999_999 }, "due_local": "02:00", "miss": "yes",
        });
        let text = summary(&target);
        assert!(text.len() <= 80, "{} columns: {text}", text.len());
        assert!(text.ends_with("02:00 MISS"), "{text}");
    }
}
