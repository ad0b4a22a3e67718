//! Resumable training: [`Checkpointer`] saves a [`Ddp`](crate::Ddp), its optimizer and the program's own values while training
//! goes on, and brings all of it back, on as many ranks and in whatever ZeRO stage; and weights as safetensors files.
//!
//! `phalanx-checkpoint` knows how files come to be complete; here is what a training consists of: `held` names its tensors
//! and the parts of them that this rank has, `content` reads and fills their memory, `training` puts both together, `checkpointer`
//! decides when. `keeper` holds snapshots in the launcher's memory, `finder` finds them there: `neighbours` says who keeps whose share,
//! `inventory` what is whole.
//!
//! | name | what |
//! |---|---|
//! | `model/NAME` | a variable or a buffer |
//! | `optimizer/STATE/NAME` | what the rule keeps of a parameter |
//! | `optimizer/master/NAME` | the f32 master of a parameter in half precision |
//! | `ema/NAME` | the [average](crate::optim::Ema) of a parameter |
//! | `random/DEVICE/rank-R` | the state of a rank's random generator |
//! | `rank-R/NAME` | a buffer that each rank has for itself ([`Buffers::Own`](crate::Buffers::Own)) |
//! | `kept/alike/…`, `kept/by-rank/…` | what [hooks](crate::hooks) and [local training](crate::diloco) keep; by rank with an axis of ranks in front |

mod assembled;
mod checkpointer;
mod content;
mod finder;
pub(crate) mod held;
mod inventory;
mod keeper;
mod kept;
mod loading;
mod neighbours;
mod options;
mod parts;
mod random;
mod ranks;
pub(crate) mod sharded;
mod signals;
mod training;
mod weights;

pub use checkpointer::Checkpointer;
pub use loading::LoadOptions;
pub use options::{CheckpointerOptions, Next, Origin, Resumed};
pub use phalanx_checkpoint::WeightsOptions;
pub use phalanx_checkpoint::{Keep, OnBusy, OnError};
pub use weights::{load_safetensors, save_safetensors};
