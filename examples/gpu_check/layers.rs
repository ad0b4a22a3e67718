//! The checks of parts of a model that are computed again, of batch normalisation over all ranks, and of weights in files.

use std::path::Path;

use anyhow::{ensure, Context as _, Result};
use phalanx::checkpoint::{LoadOptions, WeightsOptions};
use phalanx::ddp::optim::AdamW;
use phalanx::ddp::recompute::Checkpointed;
use phalanx::ddp::{SyncBatchNorm, SyncBatchNormConfig, SyncGroup};
use phalanx::tch::{self, nn, nn::Init, nn::ModuleT as _, Device, Kind, Tensor};
use phalanx::{Ddp, Group, Sync, Zero};

use super::{
    apart, batch, fill, loss_sum, network, optimizer, options, pattern, weights, Net, ROWS, WIDTH,
};

/// Layers with dropout that backward computes again, beside the same layers that keep everything.
pub(super) fn recompute(group: &mut Group, device: Device) -> Result<String> {
    let mut worst: f32 = 0.0;
    for zero in [Zero::Off, Zero::Three] {
        let kept = dropped_out(group, (device, zero), false)?;
        let again = dropped_out(group, (device, zero), true)?;
        worst = worst.max(apart(&kept, &again));
        // The same kernels on the same numbers: at most a library chooses another one for another thread.
        ensure!(worst <= 1e-6, "{zero:?}: weights differ by {worst:e}: is the random state back?");
    }
    Ok(format!("5 steps, zero 0 and 3: weights differ by {worst:e}"))
}

/// Weights after a few steps of layers with dropout.
fn dropped_out(
    group: &mut Group,
    (device, zero): (Device, Zero),
    is_checkpointed: bool,
) -> Result<Vec<f32>> {
    let vs = nn::VarStore::new(device);
    // Ranks that are threads, as in a test, draw from one generator of the processor.
    let draws_alone = device.is_cuda() || group.world_size() == 1;
    let dropout = if draws_alone { 0.2 } else { 0.0 };
    let mut net = nn::seq_t();
    for layer in 0..4 {
        let path = vs.root() / format!("l{layer}");
        let block = nn::seq_t()
            .add(nn::linear(path, WIDTH, WIDTH, nn::LinearConfig::default()))
            .add_fn(|x| x.gelu("none"))
            .add_fn_t(move |x, train| x.dropout(dropout, train));
        net = if is_checkpointed { net.add(Checkpointed::new(block)) } else { net.add(block) };
    }
    fill(&vs, (2.0 / WIDTH as f64).sqrt());
    let ddp = Ddp::new(&vs, group, options(zero))?;
    let mut optimizer = optimizer(&ddp, AdamW { lr: 1e-3, ..AdamW::default() })?;
    for step in 0..5 {
        tch::manual_seed((step * 64 + group.rank()) as i64);
        let x = batch(group, device, step);
        let loss = (net.forward_t(&x, true) - &x).square().sum(Kind::Float);
        ddp.backward(&loss, ROWS as f64, Sync::Reduce)?;
        optimizer.step(Some(1.0))?;
    }
    weights(&vs)
}

/// Ranks with batches of different lengths beside one process with all of them, on the processor.
pub(super) fn batch_norm(group: &mut Group, device: Device) -> Result<String> {
    let ones = nn::BatchNormConfig { ws_init: Init::Const(1.0), ..nn::BatchNormConfig::default() };
    let sync = SyncGroup::new(group)?;
    let vs = nn::VarStore::new(device);
    let norm = SyncBatchNorm::new(vs.root(), WIDTH, SyncBatchNormConfig::from(ones), &sync);
    let alone = nn::VarStore::new(Device::Cpu);
    let plain = nn::batch_norm1d(alone.root(), WIDTH, ones);
    let (mut worst, mut rows) = (0.0_f32, 0);
    for step in 0..3 {
        let parts: Vec<Tensor> = (0..group.world_size())
            .map(|rank| pattern(&[ROWS + rank as i64, WIDTH], (step * 64 + rank) as f64))
            .collect();
        let x = parts[group.rank()].copy().to_device(device).set_requires_grad(true);
        let all = Tensor::cat(&parts, 0).set_requires_grad(true);
        rows = all.size()[0];
        let before: i64 = parts[..group.rank()].iter().map(|part| part.size()[0]).sum();
        let own = |of_all: &Tensor| of_all.narrow(0, before, x.size()[0]);
        let (y, expected) = (norm.forward_t(&x, true), plain.forward_t(&all, true));
        let factors = pattern(&[rows, WIDTH], 7.0 + step as f64);
        (&y * own(&factors).to_device(device)).sum(Kind::Float).backward();
        (&expected * &factors).sum(Kind::Float).backward();
        for (mine, of_all) in [(&y, &expected), (&x.grad(), &all.grad())] {
            worst = worst.max(apart(&numbers(mine)?, &numbers(&own(of_all))?));
        }
    }
    // Numbers of about one, from sums of a hundred: so many roundings of 6e-8, were they all on one side, in each of two sums.
    ensure!(worst < 2e-5, "outputs and gradients differ from one process's by {worst:.1e}");
    let mine = weights(&vs)?;
    let off = apart(&mine, &weights(&alone)?);
    // The gradients of weight and bias are this rank's part; the statistics are everybody's.
    ensure!(off < 2e-5, "running statistics differ from one process's by {off:.1e}");
    let bytes: Vec<u8> = mine.iter().flat_map(|value| value.to_le_bytes()).collect();
    let told = group.all_gather_bytes(&bytes)?;
    ensure!(told.iter().all(|other| *other == told[0]), "ranks have different statistics");
    Ok(format!("{rows} rows, uneven: within {worst:.0e} of one process"))
}

/// All values of a tensor.
fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(Vec::try_from(tensor.detach().to_device(Device::Cpu).reshape([-1]))?)
}

/// ZeRO-3 writes weights, and reads them into other models.
pub(super) fn weights_in_files(group: &mut Group, device: Device) -> Result<String> {
    let mine = format!("phalanx-weights-{}", std::process::id());
    let names = group.all_gather_bytes(mine.as_bytes())?;
    let folder = std::env::temp_dir().join(String::from_utf8(names[0].clone())?);
    let checked = written_and_read(group, device, &folder);
    group.barrier()?.wait()?;
    if group.rank() == 0 {
        std::fs::remove_dir_all(&folder).context("removing what was saved")?;
    }
    checked
}

fn written_and_read(group: &mut Group, device: Device, folder: &Path) -> Result<String> {
    let Net { vs, net } = network(device, WIDTH);
    let ddp = Ddp::new(&vs, group, options(Zero::Three))?;
    let mut of_ddp = optimizer(&ddp, AdamW { lr: 1e-3, ..AdamW::default() })?;
    for step in 0..2 {
        ddp.backward(&loss_sum(&net, &batch(group, device, step)), ROWS as f64, Sync::Reduce)?;
        of_ddp.step(Some(1.0))?;
    }
    // Several files and their index.
    let small = WeightsOptions { shard_bytes_max: 40_000, ..WeightsOptions::default() };
    ddp.save_weights(folder, &small)?;
    let written = weights(&vs)?;
    let files = std::fs::read_dir(folder).context("the folder of weights")?.count();
    ensure!(files > 2, "{files} files: all of it should not fit into one");
    for zero in [Zero::Off, Zero::One, Zero::Three] {
        let other = network(device, WIDTH);
        fill(&other.vs, 0.01);
        let filled = Ddp::new(&other.vs, group, options(zero))?;
        filled.load_weights(folder, &LoadOptions::default())?;
        ensure!(weights(&other.vs)? == written, "{zero:?} has read something else");
        filled.compare_parameters()?;
    }
    into_bf16(group, device, (folder, &written))?;
    Ok(format!("{} files read into zero 0, 1 and 3, and into bf16: every bit", files - 1))
}

/// f32 weights in parameters of bf16, and in their masters.
fn into_bf16(group: &mut Group, device: Device, (folder, written): (&Path, &[f32])) -> Result<()> {
    let Net { vs: mut narrow, net } = network(device, WIDTH);
    narrow.bfloat16();
    let ddp = Ddp::new(&narrow, group, options(Zero::Three))?;
    let mut optimizer = optimizer(&ddp, AdamW { lr: 0.0, weight_decay: 0.0, ..AdamW::default() })?;
    ddp.load_weights(folder, &LoadOptions::default())?;
    let rounded: Vec<f32> =
        Vec::try_from(Tensor::from_slice(written).to_kind(Kind::BFloat16).to_kind(Kind::Float))?;
    ensure!(weights(&narrow)? == rounded, "bf16 parameters have read something else");
    let x = batch(group, device, 0).to_kind(Kind::BFloat16);
    ddp.backward(&loss_sum(&net, &x), ROWS as f64, Sync::Reduce)?;
    optimizer.step(None)?;
    ensure!(weights(&narrow)? == rounded, "masters did not follow what was loaded");
    Ok(())
}
