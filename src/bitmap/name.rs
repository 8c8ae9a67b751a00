//! A bitmap's name: `forerun-<8 hex of the repository>-<epoch>-<16 hex random>`. The token is new for every disk and every
//! rotation, so a swapped, rolled-back or copied disk shows itself by a name that nobody recorded.

use crate::qmp::names::{PREFIX, random_hex};

/// A new name for an epoch of a repository's tracking.
#[must_use]
pub fn new(repository: &str, epoch: u64) -> String {
    format!("{PREFIX}{repository}-{epoch}-{}", random_hex(8))
}

/// Whether a bitmap belongs to this repository.
#[must_use]
pub fn belongs_to(name: &str, repository: &str) -> bool {
    let rest = name
        .strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_prefix(repository));
    let Some((epoch, token)) = rest
        .and_then(|rest| rest.strip_prefix('-'))
        .and_then(|rest| rest.split_once('-'))
    else {
        return false;
    };
    !epoch.is_empty()
        && epoch.bytes().all(|byte| byte.is_ascii_digit())
        && token.len() == 16
        && token.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Greater epochs are nobody's: they would leave no room for the next.
const LAST: u64 = u64::MAX / 2;

/// The epoch of a bitmap of this repository.
#[must_use]
pub fn epoch(name: &str, repository: &str) -> Option<u64> {
    if !belongs_to(name, repository) {
        return None;
    }
    let epoch = name.rsplit('-').nth(1)?.parse().ok()?;
    (epoch <= LAST).then_some(epoch)
}

/// The repository in a bitmap's name.
#[must_use]
pub fn repository(name: &str) -> Option<&str> {
    name.strip_prefix(PREFIX)?.split('-').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_belongs_to_its_repository_only() {
        let name = new("0123abcd", 7);
        assert!(belongs_to(&name, "0123abcd"));
        assert!(!belongs_to(&name, "0123abce"));
        assert_eq!(epoch(&name, "0123abcd"), Some(7));
        assert_eq!(epoch(&name, "0123abce"), None);
        assert_eq!(repository(&name), Some("0123abcd"));
        let absurd = new("0123abcd", u64::MAX);
        assert_eq!(epoch(&absurd, "0123abcd"), None);
        for foreign in [
            "forerun-0123abcd",
            "forerun-0123abcd-x-0123456789abcdef",
            "backup-1",
            "",
        ] {
            assert!(!belongs_to(foreign, "0123abcd"), "{foreign}");
        }
        assert_ne!(name, new("0123abcd", 7));
    }
}
