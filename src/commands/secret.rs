//! Where the secrets of encrypted repositories come from: files that the command line or the environment names, or a person at
//! a terminal. Never an argument or a variable that holds the secret itself: others could read those.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use zeroize::Zeroizing;

use crate::cli::{NewKeyArgs, RepoArgs, SecretArgs, ToArgs};
use crate::exit::{Failure, Kind};
use crate::image::{Closed, Repository, Secret};
use crate::prompt;

/// What is read of a key file or a passphrase's file at most.
const FILE_LIMIT: usize = 64 << 10;
const KEY_FILE: &str = "FORERUN_KEY_FILE";
const PASSPHRASE_FILE: &str = "FORERUN_PASSPHRASE_FILE";

/// Who is asked when no file is given, and what is said when there is no terminal.
struct Question {
    what: &'static str,
    hint: &'static str,
}

const OF_THE_REPOSITORY: Question = Question {
    what: "passphrase of the repository",
    hint: "give `--key-file FILE` or `--passphrase-file FILE` (or FORERUN_KEY_FILE, FORERUN_PASSPHRASE_FILE); on a terminal the passphrase is asked for",
};
const OF_THE_SECOND: Question = Question {
    what: "passphrase of the second repository",
    hint: "the second repository is encrypted: give `--to-key-file FILE` or `--to-passphrase-file FILE`; on a terminal the passphrase is asked for",
};
const OF_A_NEW_REPOSITORY: Question = Question {
    what: "passphrase of the new repository",
    hint: "give `--key-file FILE` (`forerun key generate FILE` makes one) or `--passphrase-file FILE`; on a terminal the passphrase is asked for",
};
const OF_A_NEW_KEY: Question = Question {
    what: "new passphrase",
    hint: "give `--new-key-file FILE` (`forerun key generate FILE` makes one) or `--new-passphrase-file FILE`; on a terminal the passphrase is asked for",
};

/// Opens a repository with what is given, or asks when it takes a secret and none is.
pub(super) fn open(args: &RepoArgs) -> Result<Repository> {
    let given = from_files(&args.secret)?;
    open_with(&args.repo, given, &OF_THE_REPOSITORY)
}

/// Opens the repository that is copied to. The environment's secret is the other one's.
pub(super) fn open_second(args: &ToArgs) -> Result<Repository> {
    let given = one_of(
        args.to_key_file.as_deref(),
        args.to_passphrase_file.as_deref(),
    )?;
    open_with(&args.to, given, &OF_THE_SECOND)
}

fn open_with(path: &Path, given: Option<Secret>, question: &Question) -> Result<Repository> {
    let closed = Closed::at(path)?;
    let secret = match given {
        None if closed.is_encrypted() => Some(ask_once(question)?),
        given => given,
    };
    Ok(closed.open(secret.as_ref())?)
}

/// The secret of an encrypted repository.
pub(super) fn for_keys(args: &SecretArgs) -> Result<Secret> {
    match from_files(args)? {
        Some(secret) => Ok(secret),
        None => ask_once(&OF_THE_REPOSITORY),
    }
}

/// The secret of a new repository, when it is to be encrypted.
pub(super) fn for_new_repository(encrypt: bool, args: &SecretArgs) -> Result<Option<Secret>> {
    match (from_files(args)?, encrypt) {
        (Some(secret), true) => Ok(Some(secret)),
        (None, true) => ask_twice(&OF_A_NEW_REPOSITORY).map(Some),
        (None, false) => Ok(None),
        (Some(_), false) => Err(Failure::hinted(
            Kind::Usage,
            "a key is given, but the repository is not to be encrypted",
            "add `--encrypt`, or leave the key and its environment variable away",
        )),
    }
}

/// The secret of a new key.
pub(super) fn for_new_key(args: &NewKeyArgs) -> Result<Secret> {
    let given = one_of(
        args.new_key_file.as_deref(),
        args.new_passphrase_file.as_deref(),
    )?;
    given.map_or_else(|| ask_twice(&OF_A_NEW_KEY), Ok)
}

/// The command line goes before the environment.
fn from_files(args: &SecretArgs) -> Result<Option<Secret>> {
    let variable = |name| {
        let value = std::env::var_os(name).filter(|value| value != OsStr::new(""));
        value.map(PathBuf::from)
    };
    let (mut key, mut words) = (args.key_file.clone(), args.passphrase_file.clone());
    if key.is_none() && words.is_none() {
        (key, words) = (variable(KEY_FILE), variable(PASSPHRASE_FILE));
    }
    match (key, words) {
        (Some(_), Some(_)) => Err(Failure::plain(
            Kind::Usage,
            format!("{KEY_FILE} and {PASSPHRASE_FILE} are both set: which of them?"),
        )),
        (key, words) => one_of(key.as_deref(), words.as_deref()),
    }
}

/// The secret in one of two files.
fn one_of(key: Option<&Path>, words: Option<&Path>) -> Result<Option<Secret>> {
    key.map(key_file)
        .or_else(|| words.map(passphrase_file))
        .transpose()
}

fn key_file(path: &Path) -> Result<Secret> {
    let bytes =
        read(path).with_context(|| format!("cannot read the key file {}", path.display()))?;
    Secret::key_file(bytes).with_context(|| format!("{} is no key file", path.display()))
}

fn passphrase_file(path: &Path) -> Result<Secret> {
    let shown = path.display();
    let mut bytes = read(path).with_context(|| format!("cannot read the passphrase in {shown}"))?;
    if let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
        bytes.truncate(end);
    }
    if bytes.ends_with(b"\r") {
        bytes.pop();
    }
    Secret::passphrase(bytes).with_context(|| format!("the first line of {shown} is no passphrase"))
}

/// Reads a small file, which may be a pipe. Its content goes nowhere else.
fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(
            "others may read {}: `chmod 600` it, and change the key if they did",
            path.display()
        );
    }
    // The buffer is never moved: each move would leave a copy behind.
    let mut bytes = Zeroizing::new(vec![0; FILE_LIMIT + 1]);
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read(&mut bytes[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    if filled > FILE_LIMIT {
        anyhow::bail!("it has more than {FILE_LIMIT} bytes");
    }
    bytes.truncate(filled);
    Ok(bytes)
}

fn terminal(question: &Question) -> Result<File> {
    prompt::terminal().ok_or_else(|| {
        Failure::hinted(
            Kind::Usage,
            "a key is needed, and there is no terminal to ask for a passphrase",
            question.hint,
        )
    })
}

fn ask_once(question: &Question) -> Result<Secret> {
    let words = prompt::ask(&terminal(question)?, question.what)?;
    Ok(Secret::passphrase(words)?)
}

fn ask_twice(question: &Question) -> Result<Secret> {
    let terminal = terminal(question)?;
    let words = prompt::ask(&terminal, question.what)?;
    let again = prompt::ask(&terminal, "once more")?;
    if words != again {
        return Err(Failure::plain(
            Kind::Failed,
            "the two passphrases are not the same",
        ));
    }
    Ok(Secret::passphrase(words)?)
}
