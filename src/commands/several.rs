//! Several targets in one command: those that are named, those that match a pattern, or all domains of the host. One after
//! the other, if not `run` or `--together`; one that fails does not keep the others from their turn, and the worst end counts.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;

use crate::cli::{RepoTargetArgs, TargetArgs};
use crate::exit::{Failure, Kind, classify};
use crate::libvirt::Domain;
use crate::report::Outcome;
use crate::target::Target;

/// The single targets that were asked for in one; `None` when one was named.
pub(super) fn chosen(args: &TargetArgs, more: &[Target]) -> Result<Option<Vec<TargetArgs>>> {
    let all = args.all.then(|| Target::Name("*".to_owned()));
    let named: Vec<&Target> = all.iter().chain(&args.target).chain(more).collect();
    let pattern =
        |target: &Target| matches!(target, Target::Name(name) if name.contains(['*', '?']));
    if named.len() < 2 && !named.iter().any(|target| pattern(target)) {
        return Ok(None);
    }
    if args.name.is_some() {
        return Err(Failure::plain(
            Kind::Usage,
            "`--as` names one target, not several",
        ));
    }
    let mut found: Vec<Target> = Vec::new();
    for target in named {
        let mut these = match target {
            Target::Name(name) if pattern(target) => matching(args.connect.as_deref(), name)?,
            _ => vec![target.clone()],
        };
        these.retain(|target| !found.contains(target));
        found.append(&mut these);
    }
    let single = |target| TargetArgs {
        target: Some(target),
        all: false,
        ..args.clone()
    };
    Ok(Some(found.into_iter().map(single).collect()))
}

/// The domains whose names match a pattern.
fn matching(connect: Option<&str>, pattern: &str) -> Result<Vec<Target>> {
    let found: Vec<Target> = Domain::all(connect)?
        .iter()
        .filter(|domain| matches(pattern, domain.name()))
        .map(|domain| Target::Name(domain.name().to_owned()))
        .collect();
    if found.is_empty() {
        return Err(Failure::hinted(
            Kind::Usage,
            format!("no domain matches `{pattern}`"),
            "`virsh list --all` has their names",
        ));
    }
    Ok(found)
}

/// Runs a command on the target that was named, or on each of several.
pub(super) fn each(
    args: &TargetArgs,
    more: &[Target],
    interrupted: &AtomicBool,
    one: impl Fn(&TargetArgs) -> Result<Outcome>,
) -> Result<Outcome> {
    let Some(targets) = chosen(args, more)? else {
        return one(args);
    };
    let mut all = Outcome::default();
    for target in &targets {
        let shown = target.named()?.to_string();
        all.join(&shown, one(target));
        let ended = |error| classify(error).0 == Kind::Interrupted;
        if interrupted.load(Ordering::Relaxed) || all.errors.iter().any(ended) {
            break;
        }
    }
    Ok(all)
}

/// As [`each`], for a command on a repository.
pub(super) fn each_of(
    args: &RepoTargetArgs,
    more: &[Target],
    interrupted: &AtomicBool,
    one: impl Fn(&RepoTargetArgs) -> Result<Outcome>,
) -> Result<Outcome> {
    each(&args.target, more, interrupted, |target| {
        one(&RepoTargetArgs {
            target: target.clone(),
            repo: args.repo.clone(),
        })
    })
}

/// Whether a name matches a pattern: `*` stands for any text, `?` for one character.
fn matches(pattern: &str, name: &str) -> bool {
    let Some(first) = pattern.chars().next() else {
        return name.is_empty();
    };
    let rest = &pattern[first.len_utf8()..];
    if first == '*' {
        let ends = name.char_indices().map(|(at, _)| at).chain([name.len()]);
        return ends.into_iter().any(|at| matches(rest, &name[at..]));
    }
    let mut letters = name.chars();
    letters
        .next()
        .is_some_and(|letter| first == '?' || first == letter)
        && matches(rest, letters.as_str())
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn a_pattern_stands_for_the_names_that_it_matches() {
        for (pattern, name) in [
            ("*", ""),
            ("web-*", "web-1"),
            ("*-1", "web-1"),
            ("w?b*", "web"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("web-*", "db-1"),
            ("web-?", "web-"),
            ("web", "web-1"),
            ("?", ""),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }
}
