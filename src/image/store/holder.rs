//! Who holds a lock, as it is written in the lock's file.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::clock;

/// Who holds a lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// What it is doing.
    pub who: String,
    /// Its process.
    pub pid: u32,
    /// On this host.
    pub host: String,
    /// Since then.
    pub since: String,
}

impl Holder {
    /// This process.
    #[must_use]
    pub fn ourselves(who: &str) -> Self {
        let host = rustix::system::uname();
        Self {
            who: who.to_owned(),
            pid: std::process::id(),
            host: host.nodename().to_string_lossy().into_owned(),
            since: clock::utc_now().to_string(),
        }
    }

    /// The text of a lock's file.
    #[must_use]
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// What a lock's file says, in words. The file of a lock that was only just taken says nothing yet.
    #[must_use]
    pub fn words(text: &str) -> String {
        match serde_json::from_str::<Self>(text) {
            Ok(holder) => holder.to_string(),
            Err(_) => "a process that has only just begun".to_owned(),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            who,
            pid,
            host,
            since,
        } = self;
        write!(f, "{who}, pid {pid} on {host} since {since}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_is_shown_in_words_and_half_a_text_is_no_error() {
        let holder = Holder::ourselves("pruning");
        let text = holder.to_text();
        assert_eq!(Holder::words(&text), holder.to_string());
        assert!(Holder::words(&text[..10]).contains("only just begun"));
    }
}
