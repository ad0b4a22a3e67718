//! Data-parallel training for Rust on libtorch.
