//! What to copy when: pure decisions over numbers that others measure. Nothing here reads a clock, a disk or a VM.
//!
//! ```text
//! rotations --> heat: how often a block changes      --> order: cold, warm, hot; what is left for later
//! looks     --> change: bytes that differ after t    --> outlook: residual and window at the due time
//! passes, freezes --> speeds: copying and spooling   --> ahead: a pass now, or sleep for how long
//! ```

pub mod ahead;
pub mod change;
pub mod heat;
pub mod outlook;

pub use ahead::{Situation, Step};
pub use change::{Change, Fit};
pub use heat::{Heat, Order, Patience};
pub use outlook::{Debt, Limits, Outlook, Speeds};
