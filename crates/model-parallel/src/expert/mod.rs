//! A mixture of experts: each token goes to the k experts that a router finds best for it, of which every rank of the axis `ep` has some.
//!
//! A forward of [`MixtureOfExperts`]: the rank's router chooses for the rank's tokens ([`Router`]); rows are put in order by expert; ranks tell each other how many there
//! are for each expert (8 bytes each), and send them (k · width elements a token, less what stays); each expert computes all its rows in one product; outputs go back the same way and are
//! added up by the weights of the choices. The backward does the same in reverse. Nothing depends on which message comes first: sums are over a token's choices in
//! their order, and an expert's rows are in the order of ranks and positions.
//!
//! Experts' variables are on one `ep` rank each and have the gradients of all its ranks' tokens: see [`Parameters`] for their `Ddp`.
//!
//! # Source
//! Shazeer et al. 2017 (top-k gating); Lepikhin et al. 2020 (`GShard`: capacity, all-to-all); Jiang et al. 2024 (Mixtral: names, normalised weights).

mod beside;
mod layer;
mod parallel;
mod parameters;
mod plan;
mod router;
mod rows;
mod swiglu;
mod tokens;

pub use beside::with_loss;
pub use layer::{Expert, Mixture, MixtureOfExperts};
pub use parallel::ExpertParallel;
pub use parameters::{is_of_expert, Parameters, Wrapped};
pub use router::{Router, Routing};
pub use swiglu::mixtral_expert;

use crate::error::{Error, Result};
use crate::layer::Init;

/// How many experts there are, and how tokens choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertOptions {
    /// Experts of the layer, on all ranks together.
    pub experts: i64,
    /// Experts of a token.
    pub top_k: i64,
    /// Whether the weights of a token's k experts are divided by their sum, as in Mixtral. In Switch Transformer they are probabilities, so that the router
    /// learns with one expert a token, too.
    pub normalise: bool,
    /// How many times its even share of a rank's choices an expert takes: of a rank's T tokens ⌈factor · T · k / experts⌉, the first by position. Others get nothing
    /// from it. `None`: all of them (dropless).
    pub capacity_factor: Option<f64>,
    /// How the router's weight begins.
    pub init: Init,
}

impl ExpertOptions {
    /// Mixtral's choice: top 2, normalised, dropless; weights begin normally distributed around 0 with `std` 0.02.
    #[must_use]
    pub fn mixtral(experts: i64) -> Self {
        let init = Init::Normal { std: 0.02 };
        Self { experts, top_k: 2, normalise: true, capacity_factor: None, init }
    }

    fn check(&self) -> Result<()> {
        let bad = |setting, value, expected| Err(Error::BadSetting { setting, value, expected });
        if self.experts < 1 {
            return bad("experts", self.experts.to_string(), "at least 1");
        }
        if !(1..=self.experts).contains(&self.top_k) {
            let value = format!("{} of {} experts", self.top_k, self.experts);
            return bad("top_k", value, "at least 1, and no more than there are experts");
        }
        match self.capacity_factor {
            Some(factor) if !factor.is_finite() || factor <= 0.0 => {
                bad("capacity_factor", factor.to_string(), "a number > 0, or None")
            }
            _ => Ok(()),
        }
    }

    /// Rows that an expert takes of so many tokens of a rank.
    #[expect(clippy::cast_precision_loss, reason = "counts of tokens are far below 2^53")]
    #[expect(clippy::cast_possible_truncation, reason = "a float that is too large saturates")]
    fn capacity(&self, tokens: i64) -> Option<i64> {
        let even = (tokens * self.top_k) as f64 / self.experts as f64;
        self.capacity_factor.map(|factor| (factor * even).ceil() as i64)
    }
}
