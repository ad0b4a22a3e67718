//! Tests of the crate as its users see it.

#![expect(
    clippy::unwrap_used,
    clippy::shadow_unrelated,
    reason = "a failed unwrap is a failed test, in a function that tests call too; each case has its own `error`"
)]

mod agreeing;
mod causal;
mod converting;
mod damage;
mod documents;
mod end_to_end;
mod fixed;
mod loader;
mod lost;
mod masking;
mod megatron;
mod order;
mod orders;
mod outputs;
mod padded;
mod preparing;
mod raw;
mod records;
mod skipping;
mod staying;
mod support;
