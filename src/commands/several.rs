//! Several domains in one command: all of the host, or those that match a pattern. One after the other; one that fails does
//! not keep the others from their turn, and the worst end counts.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;

use crate::cli::{RepoTargetArgs, TargetArgs};
use crate::exit::{Failure, Kind, classify};
use crate::libvirt::Domain;
use crate::report::Outcome;
use crate::target::Target;

/// The single targets that were asked for in one; `None` when one was named.
pub(super) fn chosen(args: &TargetArgs) -> Result<Option<Vec<TargetArgs>>> {
    let pattern = match &args.target {
        None if args.all => "*",
        Some(Target::Name(name)) if name.contains(['*', '?']) => name.as_str(),
        _ => return Ok(None),
    };
    if args.name.is_some() {
        return Err(Failure::plain(
            Kind::Usage,
            "`--as` names one target, not several",
        ));
    }
    let domains = Domain::all(args.connect.as_deref())?;
    let found: Vec<TargetArgs> = domains
        .iter()
        .filter(|domain| matches(pattern, domain.name()))
        .map(|domain| TargetArgs {
            target: Some(Target::Name(domain.name().to_owned())),
            all: false,
            ..args.clone()
        })
        .collect();
    if found.is_empty() {
        return Err(Failure::hinted(
            Kind::Usage,
            format!("no domain matches `{pattern}`"),
            "`virsh list --all` has their names",
        ));
    }
    Ok(Some(found))
}

/// Runs a command on the target that was named, or on each of several.
pub(super) fn each(
    args: &TargetArgs,
    interrupted: &AtomicBool,
    one: impl Fn(&TargetArgs) -> Result<Outcome>,
) -> Result<Outcome> {
    let Some(targets) = chosen(args)? else {
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
    interrupted: &AtomicBool,
    one: impl Fn(&RepoTargetArgs) -> Result<Outcome>,
) -> Result<Outcome> {
    each(&args.target, interrupted, |target| {
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
