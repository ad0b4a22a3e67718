//! Tensor and sequence parallelism: every matrix of a block is cut over a group of ranks, which compute one batch together.
//!
//! A block has two products with a collective between them and the next block. [`ColumnLinear`] cuts its outputs, [`RowLinear`] its
//! inputs: between the two nothing is sent, and attention and activations work on the columns (heads) that the rank has. After the second the
//! ranks' products are summed. The vocabulary is cut too: [`VocabEmbedding`] and [`cross_entropy`], where no rank holds the logits of more than its part.
//!
//! With [`TensorParallel::sequence`] the tokens between blocks are cut as well: norms, dropout and what is kept for their backward are 1/n, an
//! all-reduce becomes a reduce-scatter after a block and an all-gather before the next, which together move as many bytes. Variables that each rank
//! has whole and that compute with its tokens alone go through [`shared`].
//!
//! | per layer and micro-batch | forward | backward |
//! |---|---|---|
//! | column → row | all-reduce of `[batch, tokens, width]` | the same |
//! | with `sequence` | all-gather and reduce-scatter | the same, and the all-gather again |
//!
//! # Exchanges beside products
//! A product is made of up to four of runs of rows, of 512 rows and more ([`Chunks`]). On GPUs, and where a group spans nodes, the exchange of a run goes on while the next is multiplied: the sum behind [`RowLinear`] and of the
//! gradient of [`ColumnLinear`]'s input, and with `sequence` the gathers before the other two. Between ranks that share a processor there is one exchange of all, for nobody could compute meanwhile. The products are the same in both
//! cases, and so are their bits.
//!
//! # Determinism
//! Sums over ranks are in rank order, so all ranks of the group get the same bits, and gradients of variables that all have whole are equal on all of them, provided that
//! they compute alike: on one kind of device, with as many threads each.
//!
//! # Gradients later, forwards again
//! Products and the head leave gradients of weights to a [`Deferred`](crate::layer::Deferred) that is active in their forward. What these need of other ranks is sent when they are computed, so
//! the ranks of a group compute them at the same place in their order of calls. Blocks may be checkpointed (`phalanx_ddp_core::recompute`): their collectives run again in the backward, on all
//! ranks alike, and gradients go to the `Deferred` of the first forward.
//!
//! # Source
//! Shoeybi et al. 2019, "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism"; Korthikanti et al. 2022, "Reducing Activation
//! Recomputation in Large Transformer Models" (sequence parallelism).

mod attention;
mod chunked;
mod column;
mod cross_entropy;
mod cut;
mod dropout;
mod embedding;
mod mlp;
mod norm;
mod parallel;
mod product;
mod repeated;
mod row;
mod rows;
mod shared;

pub use attention::{
    Attend, Attention, AttentionDropout, AttentionOptions, KeyValues, Projections,
};
pub use column::ColumnLinear;
pub use cross_entropy::{cross_entropy, logits, IGNORED};
pub(crate) use dropout::{run, Places};
pub use dropout::{Dropout, Place};
pub use embedding::{PositionEmbedding, VocabEmbedding};
pub use mlp::{Gelu, Mlp, SwiGlu};
pub use norm::{LayerNorm, RmsNorm};
pub use parallel::TensorParallel;
pub use product::LinearOptions;
pub use row::RowLinear;
pub use rows::Chunks;
pub use shared::shared;
