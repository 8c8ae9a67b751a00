//! One child process is started at a time. A guard inherits the lock of its target by a descriptor that every child would
//! get just then: one of another target, started by another thread in that moment, would keep the lock for as long as it
//! lives.

use std::sync::{Mutex, MutexGuard, PoisonError};

static ONE: Mutex<()> = Mutex::new(());

/// Held from before a descriptor may be inherited until the child runs.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}
