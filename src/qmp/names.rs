//! The names of everything we put into a VM: `forerun-<8 hex of the repository>-<8 hex of the run>-<part>`, so that
//! whatever a dead run left is known as ours, and whose. A node's name has at most 31 characters in QEMU.

use serde::{Deserialize, Serialize};

/// What all our names begin with.
pub const PREFIX: &str = "forerun-";

/// A run's own prefix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunName {
    /// The first 8 hex digits of the repository's id.
    pub repository: String,
    /// 8 random hex digits.
    pub run: String,
}

impl RunName {
    /// A new run of a repository.
    #[must_use]
    pub fn new(repository: &str) -> Self {
        Self {
            repository: repository.to_owned(),
            run: random_hex(4),
        }
    }

    /// The name of a part of this run: a letter for the kind and the disk's number.
    #[must_use]
    pub fn part(&self, kind: Part, disk: usize) -> String {
        format!(
            "{PREFIX}{}-{}-{}{disk}",
            self.repository,
            self.run,
            kind.letter()
        )
    }
}

/// The kinds of things that a run puts into a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// An NBD export.
    Export,
    /// The node that holds the bitmaps of an export.
    Holder,
    /// The file node under a scratch or an overlay.
    File,
    /// The qcow2 node of a scratch or an overlay.
    Scratch,
    /// The job that formats a scratch.
    Create,
    /// The fleecing or committing job.
    Job,
    /// The filter of that job.
    Filter,
    /// A passed listening socket.
    Listener,
}

impl Part {
    fn letter(self) -> char {
        match self {
            Self::Export => 'e',
            Self::Holder => 'h',
            Self::File => 'f',
            Self::Scratch => 's',
            Self::Create => 'c',
            Self::Job => 'j',
            Self::Filter => 't',
            Self::Listener => 'l',
        }
    }
}

/// Random bytes as hex.
#[must_use]
pub fn random_hex(bytes: usize) -> String {
    let mut buffer = vec![0u8; bytes];
    let mut filled = 0;
    while filled < bytes {
        // The kernel's generator fails only on a wrong address or before it is seeded; then it is asked again.
        filled +=
            rustix::rand::getrandom(&mut buffer[filled..], rustix::rand::GetRandomFlags::empty())
                .unwrap_or(0);
    }
    hex(&buffer)
}

/// Bytes as hex.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut hex, byte| {
        // Writing to a string does not fail.
        write!(hex, "{byte:02x}").ok();
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_name_fits_qemu_up_to_a_thousand_disks() {
        let name = RunName::new("0123abcd").part(Part::Scratch, 999);
        assert!(name.len() <= 31, "{name}");
        assert!(name.starts_with("forerun-0123abcd-"));
    }
}
