//! Whose a file is, by names: numbers differ from host to host.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

const USERS: &str = "/etc/passwd";
const GROUPS: &str = "/etc/group";

/// `user:group` of a file, where both have names on this host.
pub(crate) fn of(meta: &Metadata) -> Option<String> {
    let name = |file: &str, number: u32| {
        let text = std::fs::read_to_string(file).ok()?;
        let found = entries(&text).find(|(_, id)| *id == number)?;
        Some(found.0.to_owned())
    };
    let (user, group) = (name(USERS, meta.uid())?, name(GROUPS, meta.gid())?);
    Some(format!("{user}:{group}"))
}

/// Gives a file to a `user:group`.
pub(crate) fn give(path: &Path, owner: &str) -> Result<()> {
    let number = |file: &str, name: &str| -> Result<u32> {
        let text = std::fs::read_to_string(file).with_context(|| format!("read {file}"))?;
        let found = entries(&text).find(|(known, _)| *known == name);
        Ok(found
            .with_context(|| format!("this host has no `{name}` in {file}"))?
            .1)
    };
    let (user, group) = owner.split_once(':').context("an owner without a group")?;
    let (user, group) = (number(USERS, user)?, number(GROUPS, group)?);
    std::os::unix::fs::chown(path, Some(user), Some(group))
        .with_context(|| format!("give {} to {owner}", path.display()))
}

/// Names and their numbers, of either file.
fn entries(text: &str) -> impl Iterator<Item = (&str, u32)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        Some((fields.next()?, fields.nth(1)?.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_both_files_are_read() {
        let text =
            "root:x:0:0:root:/root:/bin/sh\nbroken\nswtpm:x:110:119::/x:/bin/false\ntss:!:111:\n";
        let found: Vec<(&str, u32)> = entries(text).collect();
        assert_eq!(found, [("root", 0), ("swtpm", 110), ("tss", 111)]);
        let own = std::fs::metadata("/").unwrap();
        assert_eq!(of(&own).as_deref(), Some("root:root"));
    }
}
