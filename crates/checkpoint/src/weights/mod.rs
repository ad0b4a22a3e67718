//! Weights as others exchange them: `model.safetensors`, or several files with `model.safetensors.index.json`.
//!
//! Source: Hugging Face's transformers (`save_pretrained`, sharded checkpoints) and
//! <https://github.com/huggingface/safetensors#format>.

mod read;
mod write;

pub use read::Weights;
pub use write::{write_weights, write_weights_file, WeightsOptions};

/// The one file.
pub(crate) const FILE: &str = "model.safetensors";

/// The index of several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
