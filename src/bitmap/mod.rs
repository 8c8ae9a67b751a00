//! What changed, and what is safe: the tracking protocol.
//!
//! A disk is followed by bitmaps named in a durable journal ([`track`]); what the journal and the VM say together is
//! judged before anything is believed ([`track::trust`]); blocks that are not yet proved safe are a [`blocks::BlockSet`]
//! ([`dirty`]). All of it is pure: the VM and the journal are behind traits, so that a model can crash them anywhere.

pub mod blocks;
pub mod dirty;
pub mod name;
pub mod rotate;
pub mod track;
