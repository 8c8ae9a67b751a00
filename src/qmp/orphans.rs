//! What is in a VM under our names although no journal lists it: found by the names, each kind by its letter. Meaningful
//! only under the target's lock, when no run of this host has anything in the VM.

use std::path::Path;

use qapi::qmp;
use serde_json::{Value, json};

use super::command::{jobs, list, text};
use super::export::SOCKET;
use super::graph::Graph;
use super::names::PREFIX;
use super::release::Leftover;
use super::{Monitor, Result};

/// Everything under our names, of one repository or of all. `directory` is where the sockets of our servers are when QEMU has no
/// directory of its own.
pub fn of(
    monitor: &mut dyn Monitor,
    directory: &Path,
    repository: Option<&str>,
) -> Result<Vec<Leftover>> {
    let prefix = repository.map_or(PREFIX.to_owned(), |short| format!("{PREFIX}{short}-"));
    let ours = |name: &str| name.starts_with(&prefix) && part(name).is_some();
    let mut left = Vec::new();
    for job in jobs(monitor)? {
        let id = text(&job, "id");
        if ours(id) {
            left.push(Leftover::Job { id: id.to_owned() });
        }
    }
    for export in list::<qmp::query_block_exports>(monitor, json!({}))? {
        let id = text(&export, "id");
        if ours(id) {
            left.push(Leftover::Export { id: id.to_owned() });
        }
    }
    // A scratch goes before the file under it. Filters go with their jobs.
    let graph = Graph::read(monitor)?;
    for letter in ['h', 's', 'f'] {
        let names = graph
            .names()
            .filter(|name| ours(name) && part(name) == Some(letter));
        left.extend(names.map(|name| Leftover::Node {
            name: name.to_owned(),
        }));
    }
    let sets = match list::<qmp::query_fdsets>(monitor, json!({})) {
        // `qemu-storage-daemon` has none.
        Err(error) if error.refused() => Vec::new(),
        listed => listed?,
    };
    for set in sets {
        let passed = set
            .get("fds")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        let id = set.get("fdset-id").and_then(Value::as_i64);
        if let (true, Some(id)) = (passed.iter().any(|fd| ours(text(fd, "opaque"))), id) {
            left.push(Leftover::FdSet { id });
        }
    }
    left.extend(sockets(monitor.place().unwrap_or(directory), repository));
    Ok(left)
}

/// The sockets of our servers.
fn sockets(place: &Path, repository: Option<&str>) -> Vec<Leftover> {
    let entries = std::fs::read_dir(place).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let ours = names.filter(|name| {
        let parts = name
            .strip_suffix(SOCKET)
            .and_then(|name| name.split_once('-'));
        parts.is_some_and(|(of, run)| {
            is_hex8(of) && is_hex8(run) && repository.is_none_or(|short| short == of)
        })
    });
    ours.map(|name| Leftover::Server {
        socket: place.join(name),
        listener: String::new(),
    })
    .collect()
}

fn is_hex8(text: &str) -> bool {
    text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The letter of a name's kind: `forerun-<8>-<8>-<letter><number>`.
fn part(name: &str) -> Option<char> {
    let mut parts = name.strip_prefix(PREFIX)?.split('-');
    let (repository, run, last) = (parts.next()?, parts.next()?, parts.next()?);
    let mut last = last.chars();
    let letter = last.next()?;
    let number = last.as_str();
    let shaped = repository.len() == 8 && run.len() == 8 && parts.next().is_none();
    (shaped && !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
        .then_some(letter)
}

#[cfg(test)]
mod tests {
    use super::part;

    #[test]
    fn a_run_s_names_are_told_from_bitmaps_and_others() {
        assert_eq!(part("forerun-01234567-89abcdef-s12"), Some('s'));
        assert_eq!(part("forerun-01234567-5-0123456789abcdef"), None);
        assert_eq!(part("forerun-image"), None);
        assert_eq!(part("libvirt-1-format"), None);
    }
}
