//! Meshes of every shape of small worlds, and what is said of impossible ones.

use phalanx_model_parallel::{Axes, Axis, Coordinates, Error, Mesh, Nodes, Shape};

/// Every mesh of the world, with every `ep` that it allows.
fn meshes(world_size: usize) -> Vec<Mesh> {
    let divisors = |number: usize| (1..=number).filter(move |size| number.is_multiple_of(*size));
    let mut found = Vec::new();
    for pp in divisors(world_size) {
        for dp_replicate in divisors(world_size / pp) {
            let left = world_size / pp / dp_replicate;
            for dp_shard in divisors(left) {
                for cp in divisors(left / dp_shard) {
                    for ep in divisors(dp_shard * cp) {
                        let tp = left / dp_shard / cp;
                        let shape = Shape { pp, dp_replicate, dp_shard, cp, tp, ep };
                        found.push(Mesh::new(shape, world_size).expect("it fills the world"));
                    }
                }
            }
        }
    }
    found
}

#[test]
fn ranks_have_coordinates_and_are_found_by_them() {
    for mesh in (1..=24).flat_map(meshes) {
        for rank in 0..mesh.world_size() {
            let coordinates = mesh.coordinates(rank).unwrap();
            assert_eq!(mesh.rank(&coordinates).unwrap(), rank);
            let ep = mesh.coordinate(rank, Axis::Ep).unwrap();
            let shard = mesh.coordinate(rank, Axis::ExpertShard).unwrap();
            let shape = mesh.shape();
            let dp_shard_cp = coordinates.dp_shard * shape.cp + coordinates.cp;
            assert_eq!(shard * shape.ep + ep, dp_shard_cp, "the same ranks, cut in another way");
            assert_eq!(mesh.coordinate(rank, Axis::Tp).unwrap(), coordinates.tp);
        }
    }
}

/// For every set of axes that training needs: who differs in nothing else is in the group, and all ranks agree on colors and keys.
#[test]
fn groups_are_the_ranks_that_differ_in_their_axes_alone() {
    for mesh in (1..=16).chain([24, 36]).flat_map(meshes) {
        for axes in Axes::PLAN {
            let groups = mesh.groups(axes);
            let mut all: Vec<usize> = groups.concat();
            assert!(groups.iter().all(|group| group.len() == mesh.group_size(axes)));
            assert!(groups.windows(2).all(|pair| pair[0][0] < pair[1][0]));
            assert!(groups.iter().all(|group| group.windows(2).all(|pair| pair[0] < pair[1])));
            for (color, group) in groups.iter().enumerate() {
                for (key, &rank) in group.iter().enumerate() {
                    let place = mesh.place(rank, axes).unwrap();
                    assert_eq!((place.color, place.key, place.size), (color, key, group.len()));
                    assert!(others(&mesh, axes).all(|axis| {
                        mesh.coordinate(rank, axis).unwrap()
                            == mesh.coordinate(group[0], axis).unwrap()
                    }));
                }
            }
            all.sort_unstable();
            assert!(all.into_iter().eq(0..mesh.world_size()), "every rank is in one group");
        }
    }
}

/// The axes that ranks of a group have in common.
fn others(mesh: &Mesh, axes: Axes) -> impl Iterator<Item = Axis> + '_ {
    let expert = axes.contains(Axis::Ep) || axes.contains(Axis::ExpertShard);
    let view = if expert { Axis::EXPERT } else { Axis::DENSE };
    assert_eq!(
        view.iter().map(|axis| mesh.shape().size(*axis)).product::<usize>(),
        mesh.world_size()
    );
    view.into_iter().filter(move |axis| !axes.contains(*axis))
}

/// The example of Megatron-LM's documentation of its groups: 16 ranks, tensor 2, pipeline 4, data 2.
#[test]
fn groups_are_those_of_megatron_lm() {
    let mesh = Mesh::new(Shape { pp: 4, dp_shard: 2, tp: 2, ..Shape::default() }, 16).unwrap();
    assert_eq!(mesh.groups(Axes::TP)[..3], [[0, 1], [2, 3], [4, 5]]);
    assert_eq!(mesh.groups(Axes::DP)[..4], [[0, 2], [1, 3], [4, 6], [5, 7]]);
    assert_eq!(
        mesh.groups(Axes::PP),
        [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]
    );
    assert_eq!(mesh.groups(Axes::MODEL)[0], [0, 1, 4, 5, 8, 9, 12, 13]);
}

#[test]
fn experts_are_spread_over_shards_and_parts_of_sequences() {
    let shape = Shape { dp_replicate: 2, dp_shard: 2, cp: 2, tp: 2, ep: 4, ..Shape::default() };
    let mesh = Mesh::new(shape, 16).unwrap();
    assert_eq!(
        mesh.groups(Axes::EP),
        [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    );
    assert_eq!(mesh.groups(Axes::EXPERT_DP)[0], [0, 8]);
    let narrow = Mesh::new(Shape { ep: 2, ..shape }, 16).unwrap();
    assert_eq!(narrow.groups(Axes::EP)[..2], [[0, 2], [1, 3]]);
    assert_eq!(narrow.groups(Axes::EXPERT_SHARD)[0], [0, 4]);
    assert_eq!(narrow.named(6).unwrap(), "rank 6 (dp_replicate 0, dp_shard 1, cp 1, tp 0, ep 1)");
}

#[test]
fn sets_of_axes_of_ones_own_are_groups_too() {
    let mesh = Mesh::new(Shape { pp: 2, dp_shard: 2, tp: 2, ..Shape::default() }, 8).unwrap();
    let none = Axes::of(&[]).unwrap();
    assert_eq!((mesh.groups(none).len(), none.to_string()), (8, "no axis".to_owned()));
    let all = Axes::of(&Axis::DENSE).unwrap();
    assert_eq!(mesh.groups(all), [(0..8).collect::<Vec<_>>()]);
    assert_eq!(Axes::of(&[Axis::Tp, Axis::DpShard]).unwrap().to_string(), "dp_shard × tp");
    let mixed = Axes::of(&[Axis::Ep, Axis::Cp]).unwrap_err().to_string();
    assert!(mixed.starts_with("cp × ep is no group"), "{mixed}");
}

#[test]
fn a_shape_that_does_not_fill_the_world_is_answered_with_those_that_do() {
    let error = |shape, world_size| Mesh::new(shape, world_size).unwrap_err().to_string();
    let shape = Shape { pp: 2, tp: 4, ..Shape::default() };
    assert_eq!(
        error(shape, 16),
        "a mesh of pp 2 × tp 4 = 8 ranks does not fill a world of 16; possible: \
         pp 2 × dp_shard 2 × tp 4 = 16 ranks; pp 2 × dp_replicate 2 × tp 4 = 16 ranks; \
         pp 2 × cp 2 × tp 4 = 16 ranks; pp 4 × tp 4 = 16 ranks; pp 2 × tp 8 = 16 ranks; \
         dp_shard 4 × tp 4 = 16 ranks"
    );
    assert!(error(shape, 7).contains("possible: tp 7; pp 7"), "{}", error(shape, 7));
    assert_eq!(error(Shape { cp: 0, ..shape }, 8), "cp 0: an axis that is not used has 1 rank");
    assert_eq!(error(shape, 0), "world 0: an axis that is not used has 1 rank");
    let huge = Shape { pp: usize::MAX, tp: usize::MAX, ..shape };
    assert!(error(huge, 2).contains("more ranks than a number holds"), "{}", error(huge, 2));
}

/// Whatever is asked for, what is offered fills the world.
#[test]
fn what_is_offered_is_possible() {
    for world_size in 1..=64 {
        for (pp, tp, ep) in [(3, 1, 1), (2, 5, 1), (1, 7, 2), (16, 16, 3)] {
            let shape = Shape { pp, tp, ep, ..Shape::default() };
            if let Err(Error::WorldMismatch { possible, .. }) = Mesh::new(shape, world_size) {
                assert!(!possible.is_empty());
                for offered in possible {
                    Mesh::new(offered, world_size).unwrap();
                }
            }
        }
    }
}

#[test]
fn experts_that_do_not_divide_are_answered_with_sizes_that_do() {
    let shape = Shape { dp_shard: 2, cp: 3, ep: 4, ..Shape::default() };
    assert_eq!(
        Mesh::new(shape, 6).unwrap_err().to_string(),
        "ep 4 does not divide dp_shard × cp = 6; possible: ep 1, 2, 3, 6"
    );
}

#[test]
fn an_axis_takes_what_is_left() {
    let shape = Shape { pp: 2, tp: 4, ..Shape::default() };
    assert_eq!(shape.filling(Axis::DpReplicate, 24).unwrap(), Shape { dp_replicate: 3, ..shape });
    assert!(matches!(shape.filling(Axis::Cp, 20), Err(Error::WorldMismatch { .. })));
    assert!(matches!(shape.filling(Axis::Ep, 8), Err(Error::NotAFactor { .. })));
}

#[test]
fn strangers_to_the_mesh_are_errors() {
    let mesh = Mesh::new(Shape { tp: 2, ..Shape::default() }, 2).unwrap();
    assert!(matches!(mesh.coordinates(2), Err(Error::NoSuchRank { rank: 2, world_size: 2 })));
    assert!(matches!(mesh.place(9, Axes::TP), Err(Error::NoSuchRank { .. })));
    let outside = Coordinates { tp: 2, ..Coordinates::default() };
    assert_eq!(mesh.rank(&outside).unwrap_err().to_string(), "tp 2 is not in a mesh with tp of 2");
}

#[test]
fn tensor_parallelism_across_nodes_is_warned_of() {
    let mesh = Mesh::new(Shape { pp: 2, tp: 8, ..Shape::default() }, 16).unwrap();
    let nodes = |ranks: &[usize]| Nodes::consecutive(ranks).with_links("NVLink", "InfiniBand");
    let wide = mesh.placement(&nodes(&[8, 8])).unwrap();
    assert!(wide.crosses(Axis::Pp) && !wide.crosses(Axis::Tp));
    assert_eq!(wide.warning(), None);

    let narrow = mesh.placement(&nodes(&[4, 4, 4, 4])).unwrap();
    assert!(narrow.crosses(Axis::Tp));
    assert_eq!(
        narrow.warning().unwrap(),
        "tp 8: ranks 0 to 7 are one group on nodes 0, 1, so that every layer's sums would go over InfiniBand instead of NVLink; \
         tp 4 stays inside a node, with pp or dp 2 times as large"
    );
    // Ranks dealt out one by one, as mpirun --map-by node does.
    let dealt = mesh.placement(&Nodes::of_ranks((0..16).map(|rank| rank % 4).collect())).unwrap();
    assert!(!dealt.crosses(Axis::Pp), "every fourth rank is on the same node");
    assert!(dealt.warning().unwrap().contains("start consecutive ranks on the same node"));
    let error = mesh.placement(&nodes(&[8, 4])).unwrap_err().to_string();
    assert_eq!(error, "the nodes have 12 ranks together and the mesh has 16");
}

#[test]
fn meshes_and_placements_print_as_tables() {
    let mesh =
        Mesh::new(Shape { pp: 2, dp_shard: 16, tp: 2, ep: 4, ..Shape::default() }, 64).unwrap();
    assert_eq!(
        mesh.to_string(),
        "axis          ranks  groups  first group
pp                2      32  0 32
dp_replicate      1      64  0
dp_shard         16       4  0 2 4 6 8 10 12 14 … 30
cp                1      64  0
expert_shard      4      16  0 8 16 24
ep                4      16  0 2 4 6
tp                2      32  0 1"
    );
    let placement = mesh.placement(&Nodes::consecutive(&[8; 8])).unwrap();
    assert_eq!(
        placement.to_string(),
        "axis          ranks  groups  crossing  link
pp                2      32        32  the network
dp_replicate      1      64         0  none
dp_shard         16       4         4  the network
cp                1      64         0  none
expert_shard      4      16        16  the network
ep                4      16         0  the node's own links
tp                2      32         0  the node's own links"
    );
}
