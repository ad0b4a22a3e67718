//! Blocks that are computed again in the backward.

use phalanx_comm::testing::run_ranks;
use phalanx_ddp_core::recompute::Checkpointed;
use phalanx_model_parallel::layer::{Builder, Deferred, Pass};
use phalanx_model_parallel::tensor::TensorParallel;
use tch::{nn, Device, Kind as Elements, Tensor};

use crate::model::{Kind, Model};
use crate::parity::{ids, targets};
use crate::support::{change, compute_once, gradients, parallel, same, Named};

/// Loss and gradients; weights' gradients come later if it `puts_off`, and blocks are checkpointed if computed `again`.
fn trained(kind: Kind, tp: &TensorParallel, (puts_off, again): (bool, bool)) -> (Tensor, Named) {
    let mut vs = nn::VarStore::new(Device::Cpu);
    let root = Builder::new(vs.root(), 1);
    let mut model = Model::new(&root, kind, 0.1, tp).unwrap();
    let cuts = root.cuts();
    change(&mut vs, &cuts);
    let pass = Pass::training(1, 0);
    let blocks = std::mem::take(&mut model.blocks);
    let blocks: Vec<_> = blocks.into_iter().map(Checkpointed::new).collect();
    let forward = || {
        let mut x = model.embedded(&ids(0), &pass).unwrap();
        for block in &blocks {
            x = match again {
                true => block
                    .run(&[&x], move |block, inputs| Ok(vec![block.forward(&inputs[0], &pass)?]))
                    .unwrap()
                    .swap_remove(0),
                false => block.bare(|block| block.forward(&x, &pass).unwrap()),
            };
        }
        model.loss(&model.last(&x).unwrap(), &targets()).unwrap()
    };
    let deferred = Deferred::new();
    let loss = if puts_off { deferred.during(forward) } else { forward() };
    loss.backward();
    for (weight, gradient) in deferred.take().compute().unwrap() {
        (weight * gradient).sum(Elements::Double).backward();
    }
    (loss.detach(), gradients(&vs))
}

#[test]
fn checkpointed_blocks_have_the_same_bits_on_any_number_of_ranks_now_and_later() {
    compute_once();
    for kind in [Kind::Gpt, Kind::Llama { kv_heads: 1 }] {
        for (ranks, sequence) in [(1, false), (2, false), (2, true), (3, true)] {
            run_ranks(ranks, move |group| {
                let tp = parallel(group, sequence);
                let (loss, kept) = trained(kind, &tp, (false, false));
                for puts_off in [false, true] {
                    let (again, of_again) = trained(kind, &tp, (puts_off, true));
                    same("loss", &again, &loss);
                    for (name, gradient) in &kept {
                        let what = format!("{name}, {ranks} ranks, later: {puts_off}");
                        same(&what, &of_again[name], gradient);
                    }
                }
            });
        }
    }
}
