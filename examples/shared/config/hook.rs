//! Field `hook` of the section `ddp`: how gradients travel, as one word.

use std::fmt;
use std::str::FromStr;

use phalanx_ddp_core::hooks::{
    Cast, ErrorFeedback, Int8Blocks, Noop, PowerSgd, PowerSgdOptions, TopK,
};
use phalanx_ddp_core::{Ddp, Result};
use serde::{Deserialize, Serialize};

/// How gradients travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Hook {
    /// As they are.
    #[default]
    None,
    /// Not at all: the ranks drift apart, to measure with.
    Noop,
    /// In bf16.
    Bf16,
    /// In f16.
    Fp16,
    /// In a byte each, with error feedback.
    Int8,
    /// This share of them, the largest, with error feedback.
    TopK(f64),
    /// Matrices as thin ones of this rank, after so many plain steps, with error feedback.
    PowerSgd(usize, u64),
}

/// Plain steps before `PowerSGD` where nothing else is said.
const PLAIN_STEPS: u64 = 10;

const KNOWN: &str = "none, noop, bf16, fp16, int8, topk:SHARE (topk:0.01) or powersgd:RANK[:PLAIN_STEPS] (powersgd:4)";

impl Hook {
    /// Gives it to the model. Collective.
    pub(crate) fn set(self, ddp: &Ddp) -> Result<()> {
        match self {
            Hook::None => Ok(()),
            Hook::Noop => ddp.set_hook(Noop),
            Hook::Bf16 => ddp.set_hook(Cast::bf16()),
            Hook::Fp16 => ddp.set_hook(Cast::fp16()),
            Hook::Int8 => ddp.set_hook(ErrorFeedback::around(Int8Blocks::default())),
            Hook::TopK(fraction) => ddp.set_hook(ErrorFeedback::around(TopK { fraction })),
            Hook::PowerSgd(rank, start_step) => {
                let options = PowerSgdOptions { rank, start_step, ..Default::default() };
                ddp.set_hook(ErrorFeedback::around(PowerSgd::new(options)))
            }
        }
    }

    /// Bytes that it keeps of each parameter.
    pub(crate) fn kept_bytes(self) -> u64 {
        match self {
            Hook::None | Hook::Noop => 0,
            // What travels.
            Hook::Bf16 | Hook::Fp16 => 2,
            // What was lost; and what travels of int8.
            Hook::TopK(_) | Hook::PowerSgd(..) => 4,
            Hook::Int8 => 5,
        }
    }
}

impl FromStr for Hook {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || format!("\"{text}\" is no hook; take {KNOWN}");
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let settings: Vec<&str> = parts.collect();
        Ok(match (name, settings.as_slice()) {
            ("none", []) => Hook::None,
            ("noop", []) => Hook::Noop,
            ("bf16", []) => Hook::Bf16,
            ("fp16", []) => Hook::Fp16,
            ("int8", []) => Hook::Int8,
            ("topk", [share]) => match share.parse() {
                Ok(share) if share > 0.0 && share <= 1.0 => Hook::TopK(share),
                _ => return Err(format!("\"{text}\": the share must be above 0 and at most 1")),
            },
            ("powersgd", [rank, rest @ ..]) if rest.len() <= 1 => {
                let plain = rest.first().map_or(Ok(PLAIN_STEPS), |steps| steps.parse());
                match (rank.parse(), plain) {
                    (Ok(rank), Ok(plain)) if rank > 0 => Hook::PowerSgd(rank, plain),
                    _ => {
                        return Err(format!(
                            "\"{text}\": rank (above 0) and plain steps are whole numbers"
                        ))
                    }
                }
            }
            _ => return Err(unknown()),
        })
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Hook::None => f.write_str("none"),
            Hook::Noop => f.write_str("noop"),
            Hook::Bf16 => f.write_str("bf16"),
            Hook::Fp16 => f.write_str("fp16"),
            Hook::Int8 => f.write_str("int8"),
            Hook::TopK(share) => write!(f, "topk:{share}"),
            Hook::PowerSgd(rank, plain) => write!(f, "powersgd:{rank}:{plain}"),
        }
    }
}

impl TryFrom<String> for Hook {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Hook> for String {
    fn from(hook: Hook) -> Self {
        hook.to_string()
    }
}
