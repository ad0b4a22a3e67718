//! Where a stage's graph begins and ends: backwards that start from a gradient which came from elsewhere, and inputs whose gradient goes elsewhere.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use phalanx_ddp_core::autograd::Function;
use phalanx_ddp_core::collective::{Sending, TensorGroup};
use phalanx_ddp_core::Result;
use tch::{Kind, Tensor};

/// Where the gradient of a stage's input goes, as soon as the backward has it.
#[derive(Clone, Debug, Default)]
pub(super) struct Outlet(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    gradient: Option<Tensor>,
    /// To whom it is sent at once.
    address: Option<Address>,
    sending: Option<Sending>,
}

/// Another rank.
#[derive(Clone, Debug)]
pub(super) struct Address {
    pub(super) group: TensorGroup,
    pub(super) peer: usize,
    pub(super) tag: String,
}

impl Outlet {
    /// The input of a stage: what it computes with is behind a node that lets the gradient out here.
    pub(super) fn of_input(input: &Tensor) -> Result<(Self, Tensor)> {
        let outlet = Self::default();
        let to = outlet.clone();
        let input = input.f_detach()?.f_set_requires_grad(true)?;
        let mut outputs = Function::new("input of a stage").apply(
            &[&input],
            |_, inputs| Ok((vec![inputs[0].f_detach()?], ())),
            move |_, gradients| {
                if let Some(gradient) = &gradients[0] {
                    to.came(gradient)?;
                }
                Ok(vec![None])
            },
        )?;
        let inside = outputs.pop().ok_or(phalanx_ddp_core::Error::BackwardAbandoned)?;
        Ok((outlet, inside))
    }

    /// The next gradient is sent when it comes, before the backward has ended.
    pub(super) fn send_at_once(&self, address: Address) {
        self.lock().address = Some(address);
    }

    /// What came, and the message that has it where it was sent.
    pub(super) fn take(&self) -> (Option<Tensor>, Option<Sending>) {
        let mut inner = self.lock();
        (inner.gradient.take(), inner.sending.take())
    }

    fn came(&self, gradient: &Tensor) -> Result<()> {
        let mut inner = self.lock();
        if let Some(Address { group, peer, tag }) = inner.address.take() {
            inner.sending = Some(group.start_send(gradient, peer, &tag)?);
        }
        inner.gradient = Some(gradient.f_detach()?);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Both are whole after every statement.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A scalar whose backward goes through what made `output`, from this gradient of it.
pub(super) fn resumed(output: &Tensor, gradient: Tensor) -> Result<Tensor> {
    scalar("output of a stage", &[output], vec![gradient])
}

/// A scalar whose backward gives weights these gradients. A weight that is there several times gets the sum, in this order.
pub(super) fn delivering(gradients: Vec<(Tensor, Tensor)>) -> Result<Tensor> {
    let (weights, gradients): (Vec<Tensor>, Vec<Tensor>) = gradients.into_iter().unzip();
    let weights: Vec<&Tensor> = weights.iter().collect();
    scalar("weights of a stage", &weights, gradients)
}

fn scalar(name: &str, inputs: &[&Tensor], gradients: Vec<Tensor>) -> Result<Tensor> {
    let device = inputs.first().map_or(tch::Device::Cpu, |first| first.device());
    let mut gradients = Some(gradients);
    let mut outputs = Function::new(name).apply(
        inputs,
        |_, _| Ok((vec![Tensor::f_zeros([0_i64; 0].as_slice(), (Kind::Float, device))?], ())),
        move |backward, _| {
            let count = backward.needs_input_grad.len();
            let gradients = gradients.take().unwrap_or_default();
            let mut gradients: Vec<Option<Tensor>> = gradients.into_iter().map(Some).collect();
            gradients.resize_with(count, || None);
            Ok(gradients)
        },
    )?;
    outputs.pop().ok_or(phalanx_ddp_core::Error::BackwardAbandoned)
}
