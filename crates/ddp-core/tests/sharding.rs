//! Every stage of ZeRO computes the same bits, whether ranks share memory or not, however the model is cut.

#![allow(clippy::cast_possible_wrap, clippy::cast_precision_loss, reason = "small numbers")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod support;

use phalanx_comm::environment::HostLink;
use phalanx_comm::Group;
use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::checkpoint::{load_safetensors, save_safetensors, WeightsOptions};
use phalanx_ddp_core::{
    AdamW, Ddp, DdpOptions, Optimizer, ParameterGroup, ParameterGroups, Sync, Zero,
};
use support::{options, run_over as run, wrapped, Model, LINKS, STAGES};
use tch::{nn, Device, Kind, Tensor};

/// Ways to cut the model.
fn cuts(zero: Zero) -> [DdpOptions; 3] {
    let units = |units: &[&str], stay: &[&str]| DdpOptions {
        units: units.iter().map(ToString::to_string).collect(),
        stay_gathered: stay.iter().map(ToString::to_string).collect(),
        ..options(zero)
    };
    [options(zero), units(&["*"], &["norm"]), units(&["two"], &[])]
}

fn adamw() -> AdamW {
    AdamW { lr: 0.01, weight_decay: 0.1, ..AdamW::default() }
}

fn groups() -> ParameterGroups {
    let no_decay = ParameterGroup::matching(["*bias", "norm*"]).weight_decay(0.0);
    ParameterGroups::default().with(no_decay)
}

#[test]
fn sharding_inside_of_a_part_of_the_ranks_changes_no_bit() {
    for link in LINKS {
        for (world_size, ranks) in [(4, 2), (4, 1), (3, 1), (2, 2)] {
            for accumulate in [1, 3] {
                let off = move |mut group: Group| train(&mut group, options(Zero::Off), accumulate);
                let expected = run(world_size, link, off).remove(0);
                for zero in STAGES {
                    let hybrid = run(world_size, link, move |mut group| {
                        let options = DdpOptions { shard_ranks: Some(ranks), ..options(zero) };
                        train(&mut group, options, accumulate)
                    });
                    for outcome in hybrid {
                        assert!(
                            outcome == expected,
                            "{zero:?}, {link:?}, {ranks} of {world_size} ranks"
                        );
                    }
                }
            }
        }
    }
}

/// 4 steps on 12 samples each, in micro-batches, with clipping; the weights, and the norms.
fn train(group: &mut Group, options: DdpOptions, accumulate: i64) -> (Vec<u32>, Vec<f64>) {
    let (model, ddp) = wrapped(group, options);
    let mut optimizer = Optimizer::new(&ddp, adamw(), groups()).unwrap();
    let norms = steps(group, (&model, &ddp, &mut optimizer), accumulate);
    (model.bits(), norms)
}

fn steps(
    group: &Group,
    (model, ddp, optimizer): (&Model, &Ddp, &mut Optimizer),
    accumulate: i64,
) -> Vec<f64> {
    let (rank, world_size) = (group.rank() as i64, group.world_size() as i64);
    let micro = 12 / (world_size * accumulate);
    let step = |step: i64| {
        for part in 0..accumulate {
            let start = step * 12 + (rank * accumulate + part) * micro;
            let sync = if part + 1 == accumulate { Sync::Reduce } else { Sync::Accumulate };
            ddp.backward(&model.loss_sum(start..start + micro), micro as f64, sync).unwrap();
        }
        optimizer.step(Some(0.5)).unwrap().gradient_norm.unwrap()
    };
    (0..4).map(step).collect()
}

#[test]
fn every_stage_has_the_bits_of_no_sharding() {
    for accumulate in [1, 3] {
        for link in LINKS {
            for world_size in [1, 2, 3, 4] {
                if 12 % (world_size as i64 * accumulate) != 0 {
                    continue;
                }
                let off = move |mut group: Group| train(&mut group, options(Zero::Off), accumulate);
                let expected = run(world_size, link, off).remove(0);
                for zero in STAGES {
                    for cut in 0..3 {
                        let ranks = run(world_size, link, move |mut group| {
                            let [a, b, c] = cuts(zero);
                            train(&mut group, [a, b, c][cut].clone(), accumulate)
                        });
                        for outcome in ranks {
                            assert!(
                                outcome == expected,
                                "{zero:?}, {link:?}, {world_size} ranks, cut {cut}, {accumulate} micro-batches"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn weights_that_the_program_writes_are_kept() {
    for link in LINKS {
        for zero in STAGES {
            let all = run(2, link, move |mut group| {
                let (model, ddp) = wrapped(&mut group, options(zero));
                let mut optimizer = Optimizer::new(&ddp, adamw(), groups()).unwrap();
                steps(&group, (&model, &ddp, &mut optimizer), 1);
                for (_, mut variable) in model.sorted() {
                    drop(tch::no_grad(|| variable.fill_(0.25)));
                }
                let sums: Vec<f64> = model
                    .sorted()
                    .iter()
                    .map(|(_, variable)| variable.mean(Kind::Double).double_value(&[]))
                    .collect();
                steps(&group, (&model, &ddp, &mut optimizer), 1);
                (sums, model.bits())
            });
            assert!(
                all[0].0.iter().all(|mean| (mean - 0.25).abs() < 1e-12),
                "{zero:?} {:?}",
                all[0].0
            );
            assert!(all[0].1 == all[1].1, "{zero:?}");
        }
    }
}

/// What the ranks end with when rank 1 does something else in its third step.
fn differing(
    link: HostLink,
    differ: impl Fn(&Model, &Ddp) + Send + std::marker::Sync + 'static,
) -> Vec<String> {
    run(2, link, move |mut group| {
        let options = DdpOptions { units: vec!["*".to_owned()], ..options(Zero::Three) };
        let (model, ddp) = wrapped(&mut group, options);
        let mut optimizer = Optimizer::new(&ddp, adamw(), groups()).unwrap();
        let mut step = |step: i64| -> Result<(), String> {
            // So that rank 1 leaves nobody in the step before.
            group.barrier().unwrap().wait().unwrap();
            let loss = match step {
                2 if group.rank() == 1 => {
                    support::caught(|| differ(&model, &ddp))?;
                    return Err("rank 1 has left".to_owned());
                }
                _ => support::caught(|| model.loss_sum(step * 4..step * 4 + 4))?,
            };
            ddp.backward(&loss, 4.0, Sync::Reduce).map_err(|error| error.to_string())?;
            optimizer.step(None).map_err(|error| error.to_string()).map(drop)
        };
        (0..4).find_map(|at| step(at).err()).unwrap_or_else(|| "no error".to_owned())
    })
}

#[test]
fn a_rank_that_needs_another_unit_is_named_at_once() {
    let texts = differing(HostLink::Tcp, |model, _| {
        let (_, variable) =
            model.sorted().into_iter().find(|(name, _)| name == "three.weight").unwrap();
        drop(variable.sum(Kind::Float));
    });
    for text in &texts {
        assert!(
            text.contains("parameters of three") && text.contains("parameters of one"),
            "{texts:?}"
        );
    }
}

#[test]
fn a_rank_that_goes_is_named_in_the_gathering() {
    let texts = differing(HostLink::Tcp, |_, _| {});
    assert!(texts[0].contains("rank 1") && texts[0].contains("parameters of"), "{texts:?}");
}

#[test]
fn the_model_of_a_ddp_that_is_gone_says_so() {
    let texts = run(2, HostLink::Tcp, |mut group| {
        let (model, ddp) = wrapped(&mut group, options(Zero::Three));
        drop(ddp);
        support::caught(|| model.bits()).err().unwrap_or_default()
    });
    assert!(texts.iter().all(|text| text.contains("keep the Ddp")), "{texts:?}");
}

/// Builds the model layer by layer, rank 0's values count, and trains it.
fn built_and_trained(mut group: Group, zero: Zero) -> (Vec<u32>, usize) {
    let vs = nn::VarStore::new(Device::Cpu);
    let mut building = Ddp::begin(&vs, &mut group, options(zero)).unwrap();
    let model = Model::built(vs, group.rank() as i64 * 1000, |_| building.add().unwrap());
    let ddp = building.finish().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.safetensors");
    for seed in [77, 0] {
        assert!(model.bits() == Model::new(if seed == 0 { 77 } else { 0 }).bits());
        // Before one writes where ranks share memory, all have read.
        group.barrier().unwrap().wait().unwrap();
        save_safetensors(&path, &Model::new(seed).sorted()).unwrap();
        assert!(load_safetensors(&path, &model.vs).unwrap().is_empty());
        group.barrier().unwrap().wait().unwrap();
    }
    let mut optimizer = Optimizer::new(&ddp, adamw(), groups()).unwrap();
    steps(&group, (&model, &ddp, &mut optimizer), 1);
    (model.bits(), ddp.memory().unwrap().parameters)
}

#[test]
fn a_model_that_is_built_piece_by_piece_is_the_same() {
    for link in LINKS {
        for zero in STAGES {
            for world_size in [1, 2, 3] {
                let whole = move |mut group: Group| train(&mut group, options(zero), 1).0;
                let expected = run(world_size, link, whole).remove(0);
                for (bits, _) in run(world_size, link, move |group| built_and_trained(group, zero))
                {
                    assert!(bits == expected, "{zero:?}, {link:?}, {world_size} ranks");
                }
            }
        }
    }
}

#[test]
fn layers_that_are_added_one_by_one_are_gathered_in_the_same_few_buffers() {
    let buffers = |layers: i64| {
        run(2, HostLink::Tcp, move |mut group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let mut building = Ddp::begin(&vs, &mut group, options(Zero::Three)).unwrap();
            for layer in 0..layers {
                let _layer = nn::linear(vs.root() / layer, 64, 64, nn::LinearConfig::default());
                building.add().unwrap();
            }
            building.finish().unwrap().memory().unwrap().exchange
        })
    };
    assert_eq!(buffers(24), buffers(4));
}

#[test]
fn writes_that_no_version_counts_are_kept() {
    for link in LINKS {
        let all = run(2, link, |mut group| {
            let (model, ddp) = wrapped(&mut group, options(Zero::Three));
            group.barrier().unwrap().wait().unwrap();
            for (_, variable) in model.sorted() {
                let _filled = tch::no_grad(|| variable.data().fill_(0.25));
            }
            group.barrier().unwrap().wait().unwrap();
            let values = model.values();
            drop(ddp);
            values
        });
        for values in all {
            assert!(values.iter().all(|&value| value.to_bits() == 0.25_f32.to_bits()), "{link:?}");
        }
    }
}

#[test]
fn each_stage_holds_its_part() {
    let of = |zero| {
        run(2, HostLink::Tcp, move |mut group| {
            let (_model, ddp) = wrapped(&mut group, options(zero));
            ddp.memory().unwrap()
        })[0]
    };
    let [off, one, two, three] = STAGES.map(of);
    assert_eq!(off, one);
    assert_eq!((two.parameters, two.gradients * 2), (one.parameters, one.gradients));
    assert_eq!((three.parameters * 2, three.gradients), (two.parameters, two.gradients));
    assert!(off.exchange == 0 && two.exchange > 0 && three.exchange > two.exchange);
}

#[test]
fn weights_are_written_whole_whatever_the_stage() {
    for link in LINKS {
        for zero in STAGES {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.safetensors");
            let all = run(3, link, move |mut group| {
                let (model, ddp) = wrapped(&mut group, options(zero));
                let mut optimizer = Optimizer::new(&ddp, adamw(), groups()).unwrap();
                steps(&group, (&model, &ddp, &mut optimizer), 1);
                ddp.save_weights(&path, &WeightsOptions::default()).unwrap();
                let other = Model::new(5);
                assert!(load_safetensors(&path, &other.vs).unwrap().is_empty());
                let missing = path.join("no/such/folder.safetensors");
                let refused = ddp.save_weights(&missing, &WeightsOptions::default());
                assert!(refused.is_err(), "a file is no folder");
                (other.bits(), model.bits())
            });
            assert!(all.iter().all(|(read, bits)| read == bits), "{zero:?}, {link:?}");
        }
    }
}

/// A gradient that comes once from a backward inside of the backward, and once from the outer one, before its bucket starts.
#[test]
fn a_parameter_with_two_gradients_has_their_sum_in_every_stage() {
    let trained = |mut group: Group, zero: Zero| {
        let vs = nn::VarStore::new(Device::Cpu);
        let [last, twice] = ["last", "twice"].map(|name| vs.root().ones(name, &[40]));
        let ddp = Ddp::new(&vs, &mut group, options(zero)).unwrap();
        let mut optimizer = Optimizer::new(&ddp, adamw(), ParameterGroups::default()).unwrap();
        let (inner, factor) = (twice.shallow_clone(), group.rank() as f64 + 1.0);
        // The node that was made last runs first, and the gradient of what was used first comes last.
        let first_used = (&last * 5.0).sum(Kind::Float);
        let outer = (&twice * factor).sum(Kind::Float);
        let again = Function::new("again").apply(
            &[&(first_used + outer)],
            |_, inputs| Ok((vec![inputs[0].f_mul_scalar(1.0)?], ())),
            move |_, gradients| {
                tch::with_grad(|| (&inner * (4.0 * factor)).sum(Kind::Float)).backward();
                Ok(vec![gradients[0].as_ref().map(Tensor::shallow_clone)])
            },
        );
        ddp.backward(&again.unwrap()[0], 1.0, Sync::Reduce).unwrap();
        // (1 + 2) · (1 + 4) / 2 and 5, 40 of each.
        let norm = optimizer.step(Some(1e6)).unwrap().gradient_norm.unwrap();
        (norm.to_bits(), twice.double_value(&[7]).to_bits())
    };
    let expected = (40.0 * (7.5_f64.powi(2) + 25.0)).sqrt().to_bits();
    for link in LINKS {
        let off = run(2, link, move |group| trained(group, Zero::Off));
        assert!(off[0].0 == expected, "{}", f64::from_bits(off[0].0));
        for zero in STAGES {
            assert_eq!(run(2, link, move |group| trained(group, zero)), off, "{zero:?}");
        }
    }
}
