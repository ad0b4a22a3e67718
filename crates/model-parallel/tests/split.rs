//! The groups of a mesh, made by ranks that are threads.

use phalanx_comm::testing::{run_ranks, run_ranks_on};
use phalanx_comm::Sum;
use phalanx_model_parallel::{Axes, Axis, Error, Mesh, Nodes, Shape};

/// Shapes that use every axis, for each world size.
fn shapes(world_size: usize) -> Vec<Shape> {
    let one = Shape::default();
    match world_size {
        1 => vec![one],
        2 => vec![
            Shape { tp: 2, ..one },
            Shape { pp: 2, ..one },
            Shape { dp_shard: 2, ep: 2, ..one },
        ],
        3 => vec![Shape { cp: 3, ep: 3, ..one }, Shape { dp_replicate: 3, ..one }],
        4 => vec![Shape { pp: 2, tp: 2, ..one }, Shape { dp_shard: 2, cp: 2, ep: 2, ..one }],
        6 => vec![Shape { dp_shard: 3, ep: 3, tp: 2, ..one }],
        _ => vec![Shape { pp: 2, dp_shard: 2, ep: 2, tp: 2, ..one }],
    }
}

/// Each group gathers the ranks of the world that the mesh says, in its order.
#[test]
fn groups_have_the_ranks_of_the_plan() {
    for world_size in [1, 2, 3, 4, 6, 8] {
        for shape in shapes(world_size) {
            run_ranks(world_size, move |mut world| {
                let mesh = Mesh::new(shape, world_size).expect("a possible shape");
                let mut groups = mesh.split(&mut world).expect("the groups are made");
                for axes in Axes::PLAN {
                    let place = mesh.place(world.rank(), axes).expect("a rank of the mesh");
                    let group = groups.get(axes).expect("it was planned");
                    assert_eq!((group.rank(), group.world_size()), (place.key, place.size));
                    let ranks = group.all_gather_bytes(&[u8::try_from(world.rank()).expect("few")]);
                    let ranks: Vec<usize> = ranks
                        .expect("the group lives")
                        .concat()
                        .into_iter()
                        .map(usize::from)
                        .collect();
                    assert_eq!(ranks, mesh.groups(axes)[place.color], "{shape}: {axes}");
                }
            });
        }
    }
}

/// Groups that are taken are a rank's own: two of them work beside each other.
#[test]
fn groups_can_be_taken() {
    run_ranks(4, |mut world| {
        let mesh = Mesh::new(Shape { pp: 2, tp: 2, ..Shape::default() }, 4).expect("2 × 2");
        let both = [Axes::TP, Axes::of(&[Axis::Pp]).expect("an axis")];
        let mut groups = mesh.split_into(&mut world, &both).expect("the groups are made");
        let mut tp = groups.take(Axes::TP).expect("it was asked for");
        let mut pp = groups.take(Axes::PP).expect("it was asked for");
        let mine = i64::try_from(world.rank()).expect("few ranks");
        let (mut left, mut right) = ([mine], [mine]);
        let first = tp.all_reduce(&mut left[..], Sum).expect("it starts");
        let second = pp.all_reduce(&mut right[..], Sum).expect("it starts");
        first.wait().expect("it ends");
        second.wait().expect("it ends");
        assert_eq!(left, [[1], [5]][world.rank() / 2]);
        assert_eq!(right, [[2], [4]][world.rank() % 2]);
        let tp_peer = mesh.member(world.rank(), Axes::TP, 1).expect("a member");
        assert_eq!(tp_peer, world.rank() / 2 * 2 + 1);
        assert_eq!(mesh.member(world.rank(), Axes::PP, 0).expect("a member"), world.rank() % 2);
        assert!(mesh.member(world.rank(), Axes::PP, 2).is_err());
        assert!(matches!(groups.get(Axes::TP), Err(Error::NoSuchGroup { .. })));
        assert!(matches!(groups.take(Axes::DP), Err(Error::NoSuchGroup { .. })));
    });
}

#[test]
fn ranks_that_differ_are_named_and_their_group_lives() {
    run_ranks(4, |mut world| {
        let odd = world.rank() == 2;
        let shape = if odd {
            Shape { pp: 4, ..Shape::default() }
        } else {
            Shape { tp: 4, ..Shape::default() }
        };
        let mesh = Mesh::new(shape, 4).expect("a possible shape");
        let message = mesh.split(&mut world).expect_err("ranks differ").to_string();
        assert_eq!(
            message,
            "rank 2 has a mesh of pp 4 and rank 0 one of tp 4: give all ranks the same"
        );
        world.barrier().expect("the group lives").wait().expect("the group lives");
        let small = || Mesh::new(Shape::default(), 1).expect("one rank");
        let other = small().split(&mut world);
        assert!(matches!(other, Err(Error::WorldMismatch { world_size: 4, .. })));
        // One rank alone has a mesh of another size: all hear of it.
        let mixed = if odd { small() } else { mesh }.split(&mut world);
        assert!(matches!(mixed, Err(Error::MeshesDiffer { rank: 2, .. })));
    });
}

#[test]
fn nodes_are_those_of_the_group() {
    run_ranks_on(&[0, 0, 1], |mut world| {
        let nodes = Nodes::of_group(&mut world).expect("the group lives");
        assert_eq!(nodes, Nodes::consecutive(&[2, 1]));
    });
}
