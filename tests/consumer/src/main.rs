//! Two layers on two ranks, started by the program itself.

use std::error::Error;
use std::process::ExitCode;

use phalanx::launch::{self, LaunchOptions};
use phalanx::tch::{self, nn, nn::Module, nn::OptimizerConfig, Device, Kind, Reduction, Tensor};
use phalanx::{Ddp, DdpOptions, Group, GroupOptions};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    if launch::is_worker() {
        train()?;
        return Ok(ExitCode::SUCCESS);
    }
    let options = LaunchOptions { nproc_per_node: 2, ..LaunchOptions::default() };
    let report = launch::run(&options, &std::env::current_exe()?, &[])?;
    Ok(report.exit_code())
}

fn train() -> Result<(), Box<dyn Error>> {
    let mut group = Group::from_environment(GroupOptions::default())?;
    let vs = nn::VarStore::new(Device::Cpu);
    let net = nn::seq()
        .add(nn::linear(vs.root() / "hidden", 8, 32, Default::default()))
        .add_fn(Tensor::relu)
        .add(nn::linear(vs.root() / "output", 32, 1, Default::default()));
    let _ddp = Ddp::new(&vs, &mut group, DdpOptions::default())?;
    let mut optimizer = nn::AdamW::default().build(&vs, 1e-2)?;

    tch::manual_seed(group.rank() as i64); // each rank has samples of its own
    let mut losses = Vec::new();
    for _ in 0..50 {
        let x = Tensor::randn([16, 8], (Kind::Float, Device::Cpu));
        let target = x.square().mean_dim(1, true, Kind::Float);
        let loss = net.forward(&x).mse_loss(&target, Reduction::Mean);
        optimizer.backward_step(&loss);
        losses.push(loss.double_value(&[]));
    }

    let sums = group.all_gather_bytes(&weight_sum(&vs).to_le_bytes())?;
    assert!(sums.iter().all(|one| *one == sums[0]), "the ranks hold different weights");
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(group.world_size() == 2 && last < first, "loss {first} -> {last}");
    println!("rank {} of 2: loss {first:.3} -> {last:.3}, weights alike", group.rank());
    Ok(())
}

fn weight_sum(vs: &nn::VarStore) -> f64 {
    let sum_of = |t: &Tensor| t.abs().sum(Kind::Double).double_value(&[]);
    vs.trainable_variables().iter().map(sum_of).sum()
}
