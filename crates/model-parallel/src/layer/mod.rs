//! What every layer of this crate is made of: a [`Builder`] that says where its variables go and how they begin, and the product with a weight,
//! whose gradient can be put off.

mod builder;
mod deferred;
mod init;
mod linear;
mod pass;
pub mod random;

pub use builder::{Builder, Cuts};
pub use deferred::{Deferred, WeightGradients};
pub use init::Init;
pub use linear::linear;
pub(crate) use linear::{none, weight_gradients};
pub(crate) use pass::numbers;
pub use pass::{Pass, Tokens};
