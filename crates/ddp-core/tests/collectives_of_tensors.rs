//! Collectives of tensors: what each rank gets, for worlds of one to four ranks, along every dimension, of every kind.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_wrap,
    reason = "a failed unwrap is a failed test, and numbers are small"
)]

mod support;

use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::Error;
use support::{pattern, run_over, LINKS};
use tch::{Device, Kind, Tensor};

/// What rank `rank` brings: small whole numbers, so that sums are exact in every kind.
fn brought(rank: usize, world_size: usize, kind: Kind) -> Tensor {
    let n = world_size as i64;
    let values = Tensor::arange(2 * n * 3 * n * 5, (Kind::Int64, Device::Cpu)).remainder(7);
    (values + rank as i64).view([2 * n, 3 * n, 5]).to_kind(kind)
}

fn brought_by_all(world_size: usize, kind: Kind) -> Vec<Tensor> {
    (0..world_size).map(|rank| brought(rank, world_size, kind)).collect()
}

fn same(what: &str, left: &Tensor, right: &Tensor) {
    assert_eq!((left.size(), left.kind()), (right.size(), right.kind()), "{what}");
    assert!(left.equal(right), "{what}:\n{left}\n{right}");
}

const REDUCED: [Kind; 4] = [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16];
const MOVED: [Kind; 4] = [Kind::Float, Kind::Int64, Kind::Bool, Kind::BFloat16];

#[test]
fn sums_are_of_all_ranks_whole_and_in_parts() {
    for link in LINKS {
        for world_size in 1..=4 {
            run_over(world_size, link, move |group| {
                let group = TensorGroup::new(group);
                for kind in REDUCED {
                    let all = brought_by_all(world_size, kind);
                    let sum: Tensor = all.iter().skip(1).fold(all[0].copy(), |sum, one| sum + one);
                    let mine = &all[group.rank()];
                    same("all_reduce", &group.all_reduce(mine, "sum").unwrap(), &sum);
                    for dim in [0, 1, -2] {
                        let part = group.reduce_scatter(mine, dim, "part").unwrap();
                        let parts = sum.chunk(world_size as i64, dim);
                        same("reduce_scatter", &part, &parts[group.rank()]);
                    }
                }
            });
        }
    }
}

#[test]
fn parts_come_together_and_go_to_others() {
    for link in LINKS {
        for world_size in 1..=4 {
            run_over(world_size, link, move |group| {
                let group = TensorGroup::new(group);
                for kind in MOVED {
                    let all = brought_by_all(world_size, kind);
                    let mine = &all[group.rank()];
                    for dim in 0..3 {
                        let together = group.all_gather(mine, dim, "all").unwrap();
                        same("all_gather", &together, &Tensor::cat(&all, dim));
                        // Not one behind the other in memory.
                        let mine_turned = mine.transpose(0, 2);
                        let gathered = group.all_gather(&mine_turned, dim, "turned").unwrap();
                        let turned: Vec<_> = all.iter().map(|one| one.transpose(0, 2)).collect();
                        same("all_gather", &gathered, &Tensor::cat(&turned, dim));
                    }
                    let came = group.all_to_all(mine, "across").unwrap();
                    let chunk =
                        |one: &Tensor| one.chunk(world_size as i64, 0).swap_remove(group.rank());
                    let expected: Vec<_> = all.iter().map(chunk).collect();
                    same("all_to_all", &came, &Tensor::cat(&expected, 0));
                }
            });
        }
    }
}

#[test]
fn memory_that_is_used_again_keeps_calls_apart() {
    for link in LINKS {
        run_over(4, link, |group| {
            let group = TensorGroup::new(group);
            for round in 0..300_i64 {
                let len = 1 + 37 * (round % 11) * (round % 11);
                let one =
                    Tensor::full([len], round + group.rank() as i64, (Kind::Float, Device::Cpu));
                // The first is still under way.
                let first = group.start_all_reduce(&one, "first").unwrap();
                let second = group.start_all_gather(&one, 0, "second").unwrap();
                let sum = Tensor::full([len], 4 * round + 6, (Kind::Float, Device::Cpu));
                same("sum", &first.wait().unwrap(), &sum);
                let parts = second.wait().unwrap().view([4, len]);
                for rank in 0..4 {
                    let theirs = Tensor::full([len], round + rank, (Kind::Float, Device::Cpu));
                    same("part", &parts.get(rank), &theirs);
                }
            }
        });
    }
}

#[test]
fn messages_arrive_whole_and_in_order_both_ways() {
    for link in LINKS {
        run_over(3, link, |group| {
            let group = TensorGroup::new(group);
            let (rank, next) = (group.rank(), (group.rank() + 1) % 3);
            let before = (rank + 2) % 3;
            let at = (Kind::BFloat16, Device::Cpu);
            let message = |from: usize, number: i64| {
                pattern(&[3, 1 + 1000 * number], from as i64 + number).to_kind(Kind::BFloat16)
            };
            let mut receives = Vec::new();
            let mut sends = Vec::new();
            for number in 0..3 {
                let shape = [3, 1 + 1000 * number];
                receives.push(group.start_receive(&shape, at, before, "on").unwrap());
                sends.push(group.start_send(&message(rank, number), next, "on").unwrap());
            }
            for (number, receive) in receives.into_iter().enumerate() {
                same("message", &receive.wait().unwrap(), &message(before, number as i64));
            }
            sends.into_iter().for_each(|send| send.wait().unwrap());
        });
    }
}

#[test]
fn shapes_that_cannot_be_cut_and_calls_that_differ_are_errors() {
    run_over(2, LINKS[0], |group| {
        let group = TensorGroup::new(group);
        let odd = Tensor::zeros([3, 2], (Kind::Float, Device::Cpu));
        let error = group.reduce_scatter(&odd, 0, "layer 3").unwrap_err();
        assert!(
            error.to_string().contains("layer 3") && error.to_string().contains("[3, 2]"),
            "{error}"
        );
        assert!(group
            .all_gather(&odd, 2, "layer 3")
            .unwrap_err()
            .to_string()
            .contains("dimension 2"));
        assert!(matches!(group.all_to_all(&odd, "layer 3").unwrap_err(), Error::BadInput { .. }));
        let tag = if group.rank() == 0 { "layer 1" } else { "layer 2" };
        let said = group.all_reduce(&odd, tag).unwrap_err().to_string();
        assert!(said.contains("layer 1") && said.contains("layer 2"), "{said}");
    });
}
