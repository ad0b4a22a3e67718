//! `docs/parallelism.md` shows what the code prints.

use phalanx_model_parallel::pipeline::schedule::{Costs, Schedule, ScheduleKind};
use phalanx_model_parallel::{Mesh, Nodes, Shape};

const GUIDE: &str = include_str!("../../../docs/parallelism.md");

fn shows(text: &str) {
    assert!(GUIDE.contains(text), "docs/parallelism.md must show:\n{text}");
}

fn kinds() -> [ScheduleKind; 4] {
    ["gpipe", "1f1b", "interleaved:2", "zb-h1"].map(|name| name.parse().expect("a kind"))
}

#[test]
fn the_guide_shows_every_schedule() {
    for kind in kinds() {
        let schedule = Schedule::new(kind, 3, 6).unwrap();
        let timeline = schedule.timeline(&Costs::UNIT).unwrap();
        shows(&format!("{kind}\n{timeline}\n"));
    }
}

/// Eight ranks, 32 micro-batches; a forward pass of a rank takes 4, and so do its two halves of a backward pass.
#[test]
fn the_guide_shows_what_schedules_cost() {
    for (kind, cost) in kinds().into_iter().zip([4, 4, 2, 4]) {
        let costs =
            Costs { forward: cost, backward_input: cost, backward_weight: cost, transfer: 0 };
        let schedule = Schedule::new(kind, 8, 32).unwrap();
        let timeline = schedule.timeline(&costs).unwrap();
        let (idle, end) = (timeline.idle(0), timeline.end());
        let permille = (idle * 1000 + end / 2) / end;
        let tenths = schedule.activations_max(0) * 10 / kind.chunk_count();
        let (share, kept) = (decimal(permille), decimal(u64::try_from(tenths).unwrap()));
        shows(&format!("| `{kind}` | {idle} of {end} | {share} % | {kept} |"));
    }
}

/// A number of tenths, without a zero behind the point.
fn decimal(tenths: u64) -> String {
    let (whole, part) = (tenths / 10, tenths % 10);
    if part == 0 {
        whole.to_string()
    } else {
        format!("{whole}.{part}")
    }
}

#[test]
fn the_guide_shows_a_mesh() {
    let shape = Shape { pp: 2, dp_shard: 2, tp: 8, ep: 2, ..Shape::default() };
    let mesh = Mesh::new(shape, 32).unwrap();
    shows(&mesh.to_string());
    let nodes = Nodes::consecutive(&[4; 8]).with_links("NVLink", "InfiniBand");
    shows(mesh.placement(&nodes).unwrap().warning().unwrap());
}
