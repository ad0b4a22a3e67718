//! Flat storage: one stretch of memory per (dtype, device) that parameters and gradients are views of.
//!
//! Memory comes from the group where the group's collectives work on it (so that they read the peers' in
//! place), else from libtorch.
#![expect(unsafe_code, reason = "gate: gives a registered region's memory to libtorch")]

use std::ops::Range;

use half::{bf16, f16};
use phalanx_comm::{Bf16Sum, Element, Float, Group, Region, ScaledSum, Work};
use tch::{Device, Kind, Tensor};

use crate::{shim, Error, Result};

/// A registered region of one of the kinds that parameters have, or that hooks send.
#[derive(Debug)]
enum Backing {
    F32(Region<f32>),
    F64(Region<f64>),
    F16(Region<f16>),
    BF16(Region<bf16>),
    U8(Region<u8>),
    I32(Region<i32>),
    /// libtorch's own memory: no collective works on it.
    Private,
}

/// Runs `$body` with `$region` bound to the typed region of numbers; `$other` for the rest.
macro_rules! with_numbers {
    ($memory:expr, $region:ident => $body:expr, $other:expr) => {
        match $memory {
            Backing::F32($region) => $body,
            Backing::F64($region) => $body,
            Backing::F16($region) => $body,
            Backing::BF16($region) => $body,
            _ => $other,
        }
    };
}

/// Runs `$body` with `$region` bound to the typed region; `Private` memory is our bug.
macro_rules! with_region {
    ($memory:expr, $region:ident => $body:expr) => {
        match $memory {
            Backing::U8($region) => $body,
            Backing::I32($region) => $body,
            other => with_numbers!(
                other,
                $region => $body,
                unreachable!("a collective on memory that is not registered")
            ),
        }
    };
}

/// How gradients become their mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scale(pub(crate) f64);

/// A flat tensor, and the region under it.
#[derive(Debug)]
pub(crate) struct Flat {
    tensor: Tensor,
    memory: Backing,
}

impl Flat {
    /// `len` zeroed elements on `device` that the group's collectives work on. Collective.
    pub(crate) fn registered(
        group: &mut Group,
        kind: Kind,
        device: Device,
        len: usize,
    ) -> Result<Self> {
        match kind {
            Kind::Float => Self::over(allocate(group, device, len)?, kind, device, Backing::F32),
            Kind::Double => Self::over(allocate(group, device, len)?, kind, device, Backing::F64),
            Kind::Half => Self::over(allocate(group, device, len)?, kind, device, Backing::F16),
            Kind::BFloat16 => {
                Self::over(allocate(group, device, len)?, kind, device, Backing::BF16)
            }
            Kind::Uint8 => Self::over(allocate(group, device, len)?, kind, device, Backing::U8),
            Kind::Int => Self::over(allocate(group, device, len)?, kind, device, Backing::I32),
            _ => Err(Error::UnsupportedKind { name: "flat storage".to_owned(), kind }),
        }
    }

    fn over<T: Element>(
        region: Region<T>,
        kind: Kind,
        device: Device,
        wrap: impl FnOnce(Region<T>) -> Backing,
    ) -> Result<Self> {
        // SAFETY: the region holds `len` elements of the kind, and a clone of it keeps them mapped.
        let tensor = unsafe {
            shim::tensor_over_memory(
                region.as_ptr().cast(),
                region.len(),
                kind,
                device,
                Box::new(region.clone()),
            )
        }?;
        Ok(Self { tensor, memory: wrap(region) })
    }

    /// `len` zeroed elements of libtorch's own memory.
    pub(crate) fn private(kind: Kind, device: Device, len: usize) -> Result<Self> {
        let len = i64::try_from(len).map_err(|_too_long| Error::TooLarge { elements: len })?;
        let tensor = Tensor::f_zeros([len], (kind, device))?;
        Ok(Self { tensor, memory: Backing::Private })
    }

    /// `len` zeroed elements of host memory, page-locked where `device` is a GPU, which copies faster from there.
    pub(crate) fn on_host(kind: Kind, device: Device, len: usize) -> Result<Self> {
        let flat = Self::private(kind, Device::Cpu, len)?;
        Ok(if device.is_cuda() {
            Self { tensor: flat.tensor.f_pin_memory(device)?, ..flat }
        } else {
            flat
        })
    }

    /// `len` elements on the CPU, zero at first, that are the same memory on all ranks of `group`, which share
    /// memory. Collective.
    pub(crate) fn shared(group: &mut Group, kind: Kind, len: usize) -> Result<Self> {
        match kind {
            Kind::Float => Self::of_all::<f32>(group, kind, len),
            Kind::Double => Self::of_all::<f64>(group, kind, len),
            Kind::Half => Self::of_all::<f16>(group, kind, len),
            Kind::BFloat16 => Self::of_all::<bf16>(group, kind, len),
            _ => Err(Error::UnsupportedKind { name: "flat storage".to_owned(), kind }),
        }
    }

    fn of_all<T: Element>(group: &mut Group, kind: Kind, len: usize) -> Result<Self> {
        let region = group.allocate_on_host::<T>(len)?;
        let Some(first) = region.part_of(0) else {
            let (setting, value) = ("parameters in shared memory", "another machine".to_owned());
            return Err(Error::BadSetting { setting, value, expected: "ranks of one machine" });
        };
        // SAFETY: the first rank's part of the region, mapped here: `len` elements of the kind, as long as a clone lives.
        let tensor = unsafe {
            shim::tensor_over_memory(first.cast(), len, kind, Device::Cpu, Box::new(region))
        }?;
        Ok(Self { tensor, memory: Backing::Private })
    }

    /// All of it.
    pub(crate) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Its first element.
    pub(crate) fn base(&self) -> *mut std::ffi::c_void {
        self.tensor.data_ptr()
    }

    /// Elements.
    pub(crate) fn len(&self) -> usize {
        self.tensor.numel()
    }

    pub(crate) fn kind(&self) -> Kind {
        self.tensor.kind()
    }

    pub(crate) fn device(&self) -> Device {
        self.tensor.device()
    }

    /// Elements `range` as a flat tensor in the same memory.
    pub(crate) fn range(&self, range: &Range<usize>) -> Result<Tensor> {
        part(&self.tensor, range)
    }

    /// Zeroes elements `range`.
    pub(crate) fn zero(&self, range: Range<usize>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mut zeroed = self.range(&range)?;
        Ok(tch::no_grad(|| zeroed.f_zero_().map(drop))?)
    }

    /// Elements `range` with a shape and strides.
    pub(crate) fn view(
        &self,
        range: &Range<usize>,
        shape: &[i64],
        strides: &[i64],
    ) -> Result<Tensor> {
        let (start, _) = as_i64(range)?;
        Ok(self.tensor.f_as_strided(shape, strides, start)?)
    }

    /// The bytes of elements `range`, on the CPU.
    pub(crate) fn bytes(&self, range: &Range<usize>) -> &[u8] {
        match self.kind() {
            Kind::Double => bytemuck::cast_slice(self.elements::<f64>(range)),
            Kind::Half | Kind::BFloat16 => bytemuck::cast_slice(self.elements::<f16>(range)),
            _ => bytemuck::cast_slice(self.elements::<f32>(range)),
        }
    }

    /// Elements `range`; `T` must be the type of the storage's kind.
    pub(crate) fn elements<T: Element>(&self, range: &Range<usize>) -> &[T] {
        assert_eq!(
            self.kind().elt_size_in_bytes(),
            size_of::<T>(),
            "elements of the storage's kind"
        );
        assert!(range.start <= range.end && range.end <= self.tensor.numel(), "{range:?}");
        let base = self.tensor.data_ptr().cast::<T>().cast_const();
        // SAFETY: the storage is dense, on the CPU, and has at least `range.end` elements.
        let start = unsafe { base.add(range.start) };
        // SAFETY: as above; the tensor keeps the memory while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(start, range.len()) }
    }

    pub(crate) fn all_reduce(
        &self,
        group: &mut Group,
        range: Range<usize>,
        scale: Scale,
    ) -> Result<Work<'static>> {
        self.reduce(group, range, (scale, true))
    }

    pub(crate) fn reduce_scatter(
        &self,
        group: &mut Group,
        range: Range<usize>,
        scale: Scale,
    ) -> Result<Work<'static>> {
        self.reduce(group, range, (scale, false))
    }

    /// Sums, `to_all` or to each rank its segment.
    pub(crate) fn reduce(
        &self,
        group: &mut Group,
        range: Range<usize>,
        (scale, to_all): (Scale, bool),
    ) -> Result<Work<'static>> {
        with_numbers!(
            &self.memory,
            region => reduce(group, region, range, scale, to_all),
            Err(Error::UnsupportedKind { name: "a sum".to_owned(), kind: self.kind() })
        )
    }

    /// As [`reduce`](Self::reduce) of f32 on the host, rounded to bf16 before and after.
    pub(crate) fn reduce_as_bf16(
        &self,
        group: &mut Group,
        range: Range<usize>,
        (scale, to_all): (Scale, bool),
    ) -> Result<Work<'static>> {
        let (Backing::F32(region), op) = (&self.memory, Bf16Sum(scale.0)) else {
            return Err(Error::UnsupportedKind { name: "a sum".to_owned(), kind: self.kind() });
        };
        let range = region.range(range);
        Ok(if to_all {
            group.all_reduce(range, op)?
        } else {
            group.reduce_scatter_in_place(range, op)?
        })
    }

    pub(crate) fn all_gather(
        &self,
        group: &mut Group,
        range: Range<usize>,
    ) -> Result<Work<'static>> {
        Ok(with_region!(&self.memory, region => group.all_gather_in_place(region.range(range))?))
    }

    /// In place on the host. GPUs need a second buffer, `into`, of the same kind and length.
    pub(crate) fn all_to_all(
        &self,
        group: &mut Group,
        into: Option<&Self>,
    ) -> Result<Work<'static>> {
        self.all_to_all_of(group, into, self.len())
    }

    /// As [`all_to_all`](Self::all_to_all), of the first `len` elements.
    pub(crate) fn all_to_all_of(
        &self,
        group: &mut Group,
        into: Option<&Self>,
        len: usize,
    ) -> Result<Work<'static>> {
        let Some(into) = into else {
            return Ok(with_region!(
                &self.memory,
                region => group.all_to_all_in_place(region.range(0..len))?
            ));
        };
        match (&self.memory, &into.memory) {
            (Backing::F32(from), Backing::F32(to)) => across(group, from, to, len),
            (Backing::F64(from), Backing::F64(to)) => across(group, from, to, len),
            (Backing::F16(from), Backing::F16(to)) => across(group, from, to, len),
            (Backing::BF16(from), Backing::BF16(to)) => across(group, from, to, len),
            (Backing::U8(from), Backing::U8(to)) => across(group, from, to, len),
            (Backing::I32(from), Backing::I32(to)) => across(group, from, to, len),
            _ => Err(Error::UnsupportedKind { name: "all_to_all".to_owned(), kind: self.kind() }),
        }
    }
}

fn across<T: Element>(
    group: &mut Group,
    from: &Region<T>,
    to: &Region<T>,
    len: usize,
) -> Result<Work<'static>> {
    Ok(group.all_to_all(from.range(0..len), to.range(0..len))?)
}

/// Memory where the model's gradients are.
fn allocate<T: Element>(group: &mut Group, device: Device, len: usize) -> Result<Region<T>> {
    Ok(if device.is_cuda() { group.allocate(len)? } else { group.allocate_on_host(len)? })
}

fn reduce<T: Float>(
    group: &mut Group,
    region: &Region<T>,
    range: Range<usize>,
    scale: Scale,
    to_all: bool,
) -> Result<Work<'static>> {
    let (range, op) = (region.range(range), ScaledSum(scale.0));
    Ok(if to_all {
        group.all_reduce(range, op)?
    } else {
        group.reduce_scatter_in_place(range, op)?
    })
}

fn as_i64(range: &Range<usize>) -> Result<(i64, i64)> {
    let convert = |value: usize| {
        i64::try_from(value).map_err(|_too_long| Error::TooLarge { elements: value })
    };
    Ok((convert(range.start)?, convert(range.len())?))
}

/// The memory of a dense tensor on the CPU.
pub(crate) fn dense_bytes<'a>(name: &str, tensor: &'a Tensor) -> Result<&'a [u8]> {
    let is_dense = dense_strides(name, tensor).is_ok() && tensor.device() == Device::Cpu;
    if !is_dense {
        let (shape, strides) = (tensor.size(), tensor.stride());
        return Err(Error::NotDense { name: name.to_owned(), shape, strides });
    }
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if len == 0 {
        return Ok(&[]);
    }
    // SAFETY: dense, on the CPU: its elements fill `len` bytes from its data pointer on, and the borrow keeps it.
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>().cast_const(), len) })
}

/// As [`dense_bytes`], to be written.
pub(crate) fn dense_bytes_mut<'a>(name: &str, tensor: &'a mut Tensor) -> Result<&'a mut [u8]> {
    let len = dense_bytes(name, tensor)?.len();
    if len == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as in `dense_bytes`. Others may hold the same memory, as with every tensor; they are not used meanwhile: this
    // thread alone works with the model's tensors.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), len) })
}

/// Strides that a view of a parameter needs: its own if it is dense, which keeps the layout that its
/// kernels like (channels last, say).
pub(crate) fn dense_strides(name: &str, tensor: &Tensor) -> Result<Vec<i64>> {
    let (shape, strides) = (tensor.size(), tensor.stride());
    let mut dims: Vec<(i64, i64)> = strides.iter().copied().zip(shape.iter().copied()).collect();
    dims.retain(|&(_, size)| size != 1);
    dims.sort_unstable();
    let mut expected = 1;
    for (stride, size) in dims {
        if stride != expected && tensor.numel() > 0 {
            return Err(Error::NotDense { name: name.to_owned(), shape, strides });
        }
        expected *= size;
    }
    Ok(strides)
}

/// Elements `range` of a flat tensor, in the same memory.
pub(crate) fn part(flat: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    let (start, len) = as_i64(range)?;
    Ok(flat.f_narrow(0, start, len)?)
}

/// The elements of a dense tensor one after the other, as memory has them.
pub(crate) fn elements_of(tensor: &Tensor) -> Result<Tensor> {
    let (_, len) = as_i64(&(0..tensor.numel()))?;
    Ok(tensor.f_detach()?.f_as_strided([len], [1], None)?)
}
