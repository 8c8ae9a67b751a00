//! A bounded set of open files, so that reading pages of the same objects costs no open each. The least recently used file is
//! closed first; readers that still hold it go on.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

/// How many objects are held open at most.
const LIMIT: usize = 128;

#[derive(Default)]
struct Files {
    by_name: HashMap<String, (Arc<File>, u64)>,
    tick: u64,
}

/// The open files by object name.
#[derive(Default)]
pub(super) struct OpenFiles(Mutex<Files>);

impl OpenFiles {
    /// The open file of an object, opened by `open` when it is not yet.
    pub(super) fn get(
        &self,
        name: &str,
        open: impl FnOnce() -> super::Result<File>,
    ) -> super::Result<Arc<File>> {
        {
            let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            files.tick += 1;
            let tick = files.tick;
            if let Some((file, used)) = files.by_name.get_mut(name) {
                *used = tick;
                return Ok(Arc::clone(file));
            }
        }
        let file = Arc::new(open()?);
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if files.by_name.len() >= LIMIT {
            let oldest = files
                .by_name
                .iter()
                .min_by_key(|(_, (_, used))| *used)
                .map(|(name, _)| name.clone());
            if let Some(oldest) = oldest {
                files.by_name.remove(&oldest);
            }
        }
        let tick = files.tick;
        files
            .by_name
            .insert(name.to_owned(), (Arc::clone(&file), tick));
        Ok(file)
    }

    /// Closes the file of an object that is deleted.
    pub(super) fn forget(&self, name: &str) {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        files.by_name.remove(name);
    }
}
