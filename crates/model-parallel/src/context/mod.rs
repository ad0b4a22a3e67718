//! Long sequences cut over the ranks of the axis `cp`: each computes its own tokens, and attention is where they meet.
//!
//! A [`Sequence`] says which tokens a rank has. [`RingAttention`] sends keys and values from rank to rank, a block at a time, while the block before is computed: any
//! number of heads, and no rank ever has all keys. [`HeadsAttention`] (all-to-all) gives each rank all tokens of some heads, and takes the outputs back: fewer messages and libtorch's own kernel, as
//! long as ranks divide heads. Both are differentiable and give the same bits every time.
//!
//! Everything else of a model works on a rank's tokens as it would on all: embeddings, norms, products; what depends on positions takes [`Sequence::positions`]. A rank's loss is the *sum* over
//! its tokens, for [`Ddp`](phalanx_ddp_core::Ddp) over `Axes::DP_CP`, and its weight their number.
//!
//! # Source
//! Liu et al. 2023, "Ring Attention with Blockwise Transformers"; Brandon et al. 2023, "Striped Attention", and Llama 3's report (2024, section 3.3.2) for the balance; Jacobs et al. 2023, "`DeepSpeed` Ulysses";
//! Dao 2023, "FlashAttention-2" (online softmax, backward from the log-sum-exp).

mod block;
mod heads;
mod pieces;
mod ring;
mod sequence;

pub use heads::HeadsAttention;
pub use pieces::Order;
pub use ring::RingAttention;
pub use sequence::Sequence;
