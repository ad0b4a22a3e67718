//! What carries collectives out.

pub(crate) mod host;
