//! Rows of tokens on their way: to the experts' order and back, and to other ranks and back. All differentiable, and the same bits every time.

use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::collective::TensorGroup;
use phalanx_ddp_core::Result;
use tch::{Kind, Tensor};

/// A plan's two orders as tensors.
#[derive(Debug)]
pub(super) struct Orders {
    /// `[rows]`: the choice of each row.
    pub(super) choice_of_row: Tensor,
    /// `[tokens · k]`: the row of each choice, or the number of rows.
    pub(super) row_of_choice: Tensor,
    /// Choices of a token.
    pub(super) k: i64,
}

impl Orders {
    fn copied(&self) -> Self {
        Self {
            choice_of_row: self.choice_of_row.shallow_clone(),
            row_of_choice: self.row_of_choice.shallow_clone(),
            k: self.k,
        }
    }
}

/// `[tokens, width]` → `[rows, width]`: a token's row for each of its choices.
pub(super) fn spread(tokens: &Tensor, orders: &Orders) -> Result<Tensor> {
    let orders = orders.copied();
    let outputs = Function::new("tokens to rows").apply(
        &[tokens],
        |_, inputs| {
            let token_of_row = orders.choice_of_row.f_floor_divide_scalar(orders.k)?;
            Ok((vec![inputs[0].f_index_select(0, &token_of_row)?], orders))
        },
        |backward, gradients| {
            let Some(gradient) = &gradients[0] else { return Ok(vec![None]) };
            let by_choice = by_choice(gradient, backward.state)?;
            // In the order of choices: no sum depends on which row came first.
            Ok(vec![Some(by_choice.f_sum_dim_intlist([1_i64].as_slice(), false, None)?)])
        },
    )?;
    first(outputs)
}

/// `[rows, width]` → `[tokens, k, width]`: the row of each choice, and zeros for those that were dropped.
pub(super) fn collect(rows: &Tensor, orders: &Orders) -> Result<Tensor> {
    let orders = orders.copied();
    let outputs = Function::new("rows to tokens").apply(
        &[rows],
        |_, inputs| Ok((vec![by_choice(inputs[0], &orders)?], orders)),
        |backward, gradients| {
            let Some(gradient) = &gradients[0] else { return Ok(vec![None]) };
            let choices = gradient.f_flatten(0, 1)?;
            Ok(vec![Some(choices.f_index_select(0, &backward.state.choice_of_row)?)])
        },
    )?;
    first(outputs)
}

fn by_choice(rows: &Tensor, orders: &Orders) -> Result<Tensor> {
    let width = rows.size()[1];
    let none = Tensor::f_zeros([1, width], (rows.kind(), rows.device()))?;
    let rows = Tensor::f_cat(&[rows.f_detach()?, none], 0)?;
    let tokens = orders.row_of_choice.size()[0] / orders.k;
    Ok(rows.f_index_select(0, &orders.row_of_choice)?.f_view([tokens, orders.k, width])?)
}

/// How many rows go to each rank of the group, and come from each.
#[derive(Clone, Debug)]
pub(super) struct Traffic {
    pub(super) sent: Vec<i64>,
    pub(super) received: Vec<i64>,
}

impl Traffic {
    /// The way back.
    pub(super) fn reversed(&self) -> Self {
        Self { sent: self.received.clone(), received: self.sent.clone() }
    }
}

/// `[rows sent, width]`, by rank → `[rows received, width]`, by rank. Sends what is needed and no more. Collective, and so is its backward, which goes the
/// other way.
pub(super) fn exchange(
    rows: &Tensor,
    traffic: &Traffic,
    group: &TensorGroup,
    tag: &str,
) -> Result<Tensor> {
    if group.world_size() == 1 {
        return Ok(rows.shallow_clone());
    }
    let (there, back, group) = (traffic.clone(), traffic.reversed(), group.clone());
    let (back_tag, kind, device) = (format!("{tag}, backward"), rows.kind(), rows.device());
    let width = rows.size()[1];
    let forward_group = group.clone();
    let outputs = Function::new("rows to other ranks").apply(
        &[rows],
        move |_, inputs| Ok((vec![moved(inputs[0], &there, &forward_group, tag)?], ())),
        move |_, gradients| {
            let moved_back = match &gradients[0] {
                Some(gradient) => moved(gradient, &back, &group, &back_tag)?,
                // Other ranks wait for it all the same.
                None => {
                    let count: i64 = back.sent.iter().sum();
                    let nothing = Tensor::f_zeros([count, width], (kind, device))?;
                    moved(&nothing, &back, &group, &back_tag)?
                }
            };
            Ok(vec![Some(moved_back)])
        },
    )?;
    first(outputs)
}

fn moved(rows: &Tensor, traffic: &Traffic, group: &TensorGroup, tag: &str) -> Result<Tensor> {
    let (rank, world_size) = (group.rank(), group.world_size());
    let (width, at) = (rows.size()[1], (rows.kind(), rows.device()));
    let parts = rows.f_detach()?.f_split_with_sizes(traffic.sent.as_slice(), 0)?;
    // Each begins with its neighbour, so that no rank is everybody's first.
    let to = (1..world_size).map(|offset| (rank + offset) % world_size);
    let from = (1..world_size).map(|offset| (rank + world_size - offset) % world_size);
    let sends: Vec<_> =
        to.filter(|&peer| traffic.sent[peer] > 0).map(|peer| (&parts[peer], peer)).collect();
    let from: Vec<usize> = from.filter(|&peer| traffic.received[peer] > 0).collect();
    let shapes: Vec<[i64; 2]> = from.iter().map(|&peer| [traffic.received[peer], width]).collect();
    let receives: Vec<_> =
        shapes.iter().map(<[i64; 2]>::as_slice).zip(from.iter().copied()).collect();
    let (sending, receiving) = group.start_messages(&sends, &receives, at, tag)?;
    let mut came: Vec<Option<Tensor>> = (0..world_size).map(|_| None).collect();
    came[rank] = Some(parts[rank].shallow_clone());
    for (message, &peer) in receiving.into_iter().zip(&from) {
        came[peer] = Some(message.wait()?);
    }
    for message in sending {
        message.wait()?;
    }
    let came: Vec<Tensor> = came.into_iter().flatten().collect();
    Ok(Tensor::f_cat(&came, 0)?)
}

/// Every rank's counts of rows by expert, by rank. Collective; waits.
pub(super) fn counts_of_all(
    counts: &[i64],
    group: &TensorGroup,
    tag: &str,
) -> Result<Vec<Vec<i64>>> {
    let world_size = group.world_size();
    if world_size == 1 {
        return Ok(vec![counts.to_vec()]);
    }
    let mut all = vec![0_i64; counts.len() * world_size];
    group.with_group(|group| group.tagged(tag).all_gather(counts, &mut all[..])?.wait())?;
    Ok(all.chunks_exact(counts.len()).map(<[i64]>::to_vec).collect())
}

/// Whole numbers of a tensor.
pub(super) fn numbers(tensor: &Tensor) -> Result<Vec<i64>> {
    let flat = tensor.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Int64)?.f_contiguous()?;
    let mut values = vec![0; flat.numel()];
    flat.f_copy_data(&mut values, flat.numel())?;
    Ok(values)
}

pub(super) fn first(mut outputs: Vec<Tensor>) -> Result<Tensor> {
    outputs.pop().ok_or(phalanx_ddp_core::Error::BackwardAbandoned)
}
