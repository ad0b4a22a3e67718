//! Models larger than a device: a mesh of named axes, and pipeline schedules as data.
//!
//! A [`Mesh`] gives every rank a place on the axes `pp`, `dp_replicate`, `dp_shard`, `cp`, `tp` and `ep`, and says which groups follow from it. A
//! [`Schedule`](pipeline::schedule::Schedule) says what each rank of a pipeline computes, sends and receives, in order. Both are plain values: made, checked and printed without a peer, a device or a clock.
//! A [`Pipeline`](pipeline::Pipeline) runs a schedule.
//!
//! ```
//! use phalanx_comm::{Group, GroupOptions};
//! use phalanx_model_parallel::pipeline::schedule::{Costs, Schedule, ScheduleKind};
//! use phalanx_model_parallel::{Axes, Axis, Mesh, Nodes, Shape};
//!
//! # fn main() -> phalanx_model_parallel::Result<()> {
//! let shape = Shape { pp: 2, tp: 2, ..Shape::default() }.filling(Axis::DpShard, 8)?;
//! let mesh = Mesh::new(shape, 8)?;
//! assert_eq!(mesh.to_string(), "\
//! axis          ranks  groups  first group
//! pp                2       4  0 4
//! dp_replicate      1       8  0
//! dp_shard          2       4  0 2
//! cp                1       8  0
//! expert_shard      2       4  0 2
//! ep                1       8  0
//! tp                2       4  0 1");
//! assert_eq!(mesh.placement(&Nodes::consecutive(&[4, 4]))?.warning(), None);
//!
//! let schedule = Schedule::new(ScheduleKind::ZbH1, shape.pp, 4)?;
//! schedule.verify()?;
//! assert_eq!(schedule.timeline(&Costs::UNIT)?.to_string(), "\
//! rank 0 0F 1F .. 0B 0W 2F 1B 1W 3F 2B 2W 3B 3W
//! rank 1 .. 0F 0B 1F 1B 0W 2F 2B 1W 3F 3B 2W 3W");
//!
//! # let mesh = Mesh::new(Shape::default(), 1)?;
//! # let mut world = Group::single(GroupOptions::default())?; // doctests have no launcher
//! # #[cfg(any())]
//! let mut world = Group::from_environment(GroupOptions::default())?;
//! let mut groups = mesh.split(&mut world)?;             // all ranks together
//! let tp = groups.get(Axes::TP)?;
//! assert_eq!(tp.world_size(), mesh.shape().tp);
//! # Ok(())
//! # }
//! ```
//!
//! `docs/parallelism.md` says which axis to choose when.
//!
//! When not to use this crate: a model that fits into each device trains data-parallel, with `Ddp` alone.

pub mod context;
mod error;
pub mod expert;
pub mod layer;
pub mod mesh;
pub mod pipeline;
mod split;
pub mod tensor;

pub use error::{Error, Result};
pub use mesh::{Axes, Axis, AxisPlacement, Coordinates, GroupPlace, Mesh, Nodes, Placement, Shape};
pub use split::MeshGroups;
