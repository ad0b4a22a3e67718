//! What layers that are computed by several ranks do with models on a device: collectives and messages of tensors, and a block whose matrices
//! are cut, beside one rank that has them whole.

use anyhow::{ensure, Context as _, Result};
use phalanx::ddp::collective::TensorGroup;
use phalanx::model_parallel::layer::{Builder, Init};
use phalanx::model_parallel::tensor::{
    ColumnLinear, Gelu, LayerNorm, LinearOptions, Mlp, RowLinear, TensorParallel,
};
use phalanx::tch::{nn, Device, Kind, Tensor};
use phalanx::Group;

use super::pattern;

/// Sums, gathers, parts and exchanges of tensors have what they have on the processor.
pub(crate) fn tensors(group: &mut Group, device: Device) -> Result<String> {
    let (rank, world_size) = (group.rank(), group.world_size());
    let group = TensorGroup::new(group.duplicate()?);
    let n = i64::try_from(world_size)?;
    // Whole numbers, whose sums are exact in every kind.
    let brought = |of: usize, kind: Kind| -> Result<Tensor> {
        let values = Tensor::arange(n * 6, (Kind::Int64, Device::Cpu)).remainder(7);
        let values = values + i64::try_from(of)?;
        Ok(values.view([2 * n, 3]).to_kind(kind))
    };
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double] {
        let all: Vec<Tensor> =
            (0..world_size).map(|of| brought(of, kind)).collect::<Result<_>>()?;
        let mine = all[rank].to_device(device);
        let sum: Tensor = all.iter().skip(1).fold(all[0].copy(), |sum, one| sum + one);
        let part = |whole: &Tensor| whole.chunk(n, 0).swap_remove(rank);
        let across: Vec<Tensor> = all.iter().map(part).collect();
        let results = [
            ("all_reduce", group.all_reduce(&mine, "sum")?, sum.copy()),
            ("reduce_scatter", group.reduce_scatter(&mine, 0, "part")?, part(&sum)),
            ("all_gather", group.all_gather(&mine, 1, "all")?, Tensor::cat(&all, 1)),
            ("all_to_all", group.all_to_all(&mine, "across")?, Tensor::cat(&across, 0)),
        ];
        for (what, result, expected) in results {
            ensure!(result.to_device(Device::Cpu).equal(&expected), "{what} of {kind:?}: {result}");
        }
        if world_size > 1 {
            let (next, before) = ((rank + 1) % world_size, (rank + world_size - 1) % world_size);
            // One order on a pair that sends to each other: the lower rank sends first.
            let receive =
                || group.start_receive(&mine.size(), (kind, device), before, "ring")?.wait();
            let send = || group.start_send(&mine, next, "ring");
            let came = if rank % 2 == 0 {
                let sending = send()?;
                let came = receive()?;
                sending.wait()?;
                came
            } else {
                let came = receive()?;
                send()?.wait()?;
                came
            };
            ensure!(
                came.to_device(Device::Cpu).equal(&all[before]),
                "a message of {kind:?}: {came}"
            );
        }
    }
    Ok("sums, gathers, parts, exchanges and messages of four kinds".to_owned())
}

/// A block whose matrices are cut over all ranks has the outputs and gradients of one rank that has them whole.
pub(crate) fn cut_block(group: &mut Group, device: Device) -> Result<String> {
    let shared = TensorGroup::new(group.duplicate()?);
    let heads = 2 * i64::try_from(group.world_size())?;
    let mut worst = 0.0_f64;
    let (expected, expected_gradient, expected_norm) =
        block(Device::Cpu, &TensorParallel::alone()?, heads)?;
    for sequence in [false, true] {
        let tp = TensorParallel { group: shared.clone(), sequence };
        let (output, gradient, of_norm) = block(device, &tp, heads)?;
        for (what, one, all) in [
            ("output", output, &expected),
            ("gradient of the input", gradient, &expected_gradient),
            ("gradient of the norm", of_norm, &expected_norm),
        ] {
            let size = all.abs().max().double_value(&[]);
            let off = (one.to_device(Device::Cpu) - all).abs().max().double_value(&[]) / size;
            // TF32 is off: single precision, and sums of a few hundred terms in another order.
            ensure!(off < 1e-4, "{what}, sequence {sequence}: {off:.1e} off");
            worst = worst.max(off);
        }
    }
    Ok(format!("a cut block, tokens whole and cut: within {worst:.1e} of one rank"))
}

/// The output, whole, and the gradients of the input, whole, and of a norm's weight.
fn block(device: Device, tp: &TensorParallel, heads: i64) -> Result<(Tensor, Tensor, Tensor)> {
    let width = 16 * heads;
    let vs = nn::VarStore::new(device);
    let builder = Builder::new(vs.root(), 5);
    let options = || LinearOptions { init: Init::Normal { std: 0.1 }, ..LinearOptions::default() };
    let norm = LayerNorm::new(&(&builder / "norm"), width, 1e-5, tp)?;
    let mlp = Mlp::new(
        ColumnLinear::new(&(&builder / "up"), width, 4 * width, options(), tp)?,
        RowLinear::new(&(&builder / "down"), 4 * width, width, options(), tp)?,
        Gelu::Tanh,
    )?;
    let tokens = 2 * i64::try_from(tp.ranks())?.max(heads / 2);
    let whole = pattern(&[3, tokens, width], 1.0).to_device(device);
    let outer = pattern(&[3, tokens, width], 2.0).to_device(device);
    let (rank, ranks) = (i64::try_from(tp.group.rank())?, i64::try_from(tp.ranks())?);
    let is_cut = tp.cuts_tokens();
    let own = |all: &Tensor| match is_cut {
        true => all.narrow(1, rank * (tokens / ranks), tokens / ranks),
        false => all.shallow_clone(),
    };
    let x = own(&whole).copy().set_requires_grad(true);
    let output = mlp.forward(&norm.forward(&x)?)?;
    (&output * own(&outer)).sum(Kind::Float).backward();
    let all = |part: &Tensor| -> Result<Tensor> {
        Ok(match is_cut {
            true => tp.group.all_gather(part, 1, "to compare")?,
            false => part.detach(),
        })
    };
    let weight = vs.variables().remove("norm.weight").context("the norm's weight")?;
    Ok((all(&output)?, all(&x.grad())?, weight.grad()))
}
