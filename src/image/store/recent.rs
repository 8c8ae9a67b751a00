//! A bounded set of what is costly to make anew for each object: an open file, a derived key. The least recently used one goes
//! first; who still holds it goes on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// How many objects are remembered at most.
const LIMIT: usize = 128;

struct Known<T> {
    by_name: HashMap<String, (Arc<T>, u64)>,
    tick: u64,
}

/// What is known of some objects, by name.
pub(super) struct Recent<T>(Mutex<Known<T>>);

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self(Mutex::new(Known {
            by_name: HashMap::new(),
            tick: 0,
        }))
    }
}

impl<T> Recent<T> {
    /// What is known of an object, made by `make` when nothing is yet.
    pub(super) fn get(
        &self,
        name: &str,
        make: impl FnOnce() -> super::Result<T>,
    ) -> super::Result<Arc<T>> {
        {
            let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            known.tick += 1;
            let tick = known.tick;
            if let Some((item, used)) = known.by_name.get_mut(name) {
                *used = tick;
                return Ok(Arc::clone(item));
            }
        }
        let item = Arc::new(make()?);
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.by_name.len() >= LIMIT {
            let oldest = known
                .by_name
                .iter()
                .min_by_key(|(_, (_, used))| *used)
                .map(|(name, _)| name.clone());
            if let Some(oldest) = oldest {
                known.by_name.remove(&oldest);
            }
        }
        let tick = known.tick;
        known
            .by_name
            .insert(name.to_owned(), (Arc::clone(&item), tick));
        Ok(item)
    }

    /// Forgets an object, which is deleted or not what it was.
    pub(super) fn forget(&self, name: &str) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.by_name.remove(name);
    }
}
