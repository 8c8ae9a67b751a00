//! `key list`, `key add`, `key change`, `key remove` and `key generate`.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::secret;
use crate::cli::{KeyCommand, NewKeyArgs, RepoArgs};
use crate::exit::{Failure, Kind};
use crate::image::{Closed, KeyId, KeyInfo, Keys, Secret};
use crate::report::Outcome;

/// `key`.
pub(super) fn run(command: KeyCommand) -> Result<Outcome> {
    match command {
        KeyCommand::List { repo } => list(&repo),
        KeyCommand::Add(args) => add(&args, false),
        KeyCommand::Change(args) => add(&args, true),
        KeyCommand::Remove { repo, key } => remove(&repo, &key),
        KeyCommand::Generate { file } => generate(&file),
    }
}

/// A repository that has keys at all.
fn encrypted(path: &Path) -> Result<Closed> {
    let closed = Closed::at(path)?;
    if closed.is_encrypted() {
        return Ok(closed);
    }
    Err(Failure::hinted(
        Kind::Failed,
        format!("the repository {} is not encrypted", path.display()),
        "a repository is encrypted when it is made: `forerun init --encrypt`",
    ))
}

fn list(path: &Path) -> Result<Outcome> {
    let Keys { keys, damaged } = encrypted(path)?.keys()?;
    let mut outcome = Outcome::default();
    for key in &keys {
        let KeyInfo {
            id,
            kind,
            label,
            created,
        } = key;
        outcome.line(format!("{id}  {kind}  {created}  {label}"));
    }
    for error in damaged {
        outcome
            .warnings
            .push(format!("a key cannot be read: {error}"));
        outcome.kind = Some(Kind::Corrupt);
    }
    outcome.more.insert("keys".to_owned(), json!(keys));
    Ok(outcome)
}

/// Adds a key; when it replaces the one that opened the repository, that one goes once the new one is there.
fn add(args: &NewKeyArgs, replaces: bool) -> Result<Outcome> {
    let closed = encrypted(&args.repo.repo)?;
    let ring = closed.key_ring(&secret::for_keys(&args.repo.secret)?)?;
    let old = closed
        .keys()?
        .keys
        .into_iter()
        .find(|key| key.id == ring.opened());
    let label = match (&args.label, &old) {
        (Some(label), _) => label,
        (None, Some(old)) if replaces => &old.label,
        _ => "",
    };
    let new = ring.add(&secret::for_new_key(args)?, label)?;
    let mut outcome = Outcome::default();
    outcome.line(format!("added {new}"));
    outcome.more.insert("key".to_owned(), json!(new));
    if replaces {
        ring.remove(ring.opened())?;
        outcome.line(format!("removed {}", ring.opened()));
        removed(&mut outcome, ring.opened());
    }
    Ok(outcome)
}

fn removed(outcome: &mut Outcome, id: KeyId) {
    outcome.more.insert("removed".to_owned(), json!(id));
}

fn remove(args: &RepoArgs, key: &str) -> Result<Outcome> {
    let closed = encrypted(&args.repo)?;
    let ring = closed.key_ring(&secret::for_keys(&args.secret)?)?;
    let id = choose(&closed.keys()?, key)?;
    ring.remove(id)?;
    let mut outcome = Outcome::default();
    outcome.line(format!("removed {id}"));
    removed(&mut outcome, id);
    Ok(outcome)
}

/// The one key that an operator means.
fn choose(keys: &Keys, named: &str) -> Result<KeyId> {
    // One that cannot be read can still be named in full.
    if let Ok(id) = named.parse() {
        return Ok(id);
    }
    let is_meant = |key: &&KeyInfo| {
        !named.is_empty() && (key.id.to_string().starts_with(named) || key.label == named)
    };
    let mut meant = keys.keys.iter().filter(is_meant);
    match (meant.next(), meant.next()) {
        (Some(key), None) => Ok(key.id),
        (first, _) => {
            let all: Vec<String> = keys.keys.iter().map(KeyInfo::to_string).collect();
            let count = if first.is_some() {
                "more than one"
            } else {
                "no"
            };
            Err(Failure::hinted(
                Kind::Failed,
                format!("`{named}` is {count} key of the repository"),
                format!("its keys: {}", all.join(", ")),
            ))
        }
    }
}

fn generate(path: &Path) -> Result<Outcome> {
    let shown = path.display().to_string();
    let bytes = Secret::new_key_file()?;
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot make the key file {shown}"))?;
    file.write_all(&bytes)
        .and_then(|()| file.sync_all())
        .with_context(|| format!("cannot write the key file {shown}"))?;
    let mut outcome = Outcome::default();
    outcome.line(format!(
        "key file {shown}: keep a copy of it elsewhere, not in the repository"
    ));
    outcome
        .more
        .insert("key_file".to_owned(), Value::from(shown));
    Ok(outcome)
}
