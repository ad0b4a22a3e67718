//! Parameters that are gathered when an operation needs them.
//!
//! Each rank has its segment of a bucket, its *home*. The parameters are views of a [`Shell`]: a flat tensor without memory until
//! an operation of libtorch, in forward or backward, takes one of them; then the ranks gather the bucket into a
//! registered buffer, which becomes the shell's memory. There are few buffers of each size and they are used in turn, so the oldest bucket
//! in one goes. What the last step needed next is gathered meanwhile ([`Trace`]).
//!
//! Gathering and the exchange of gradients are one order of collectives: the program's operations decide it, and ranks whose programs
//! differ are out of step at once, with the names of both. Which bucket goes to which buffer follows from that order. An operation
//! that needs more buckets at once than there are buffers is lent memory for it.
//!
//! Source: the idea is `DeepSpeed`'s ZeRO-3, which traces modules; here it is operations.
#![expect(unsafe_code, reason = "gate: a buffer becomes a shell's memory")]

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use phalanx_comm::{Group, Work};
use tch::{Device, Kind, Tensor};

use super::access;
use super::trace::Trace;
use crate::shim::{self, Shell};
use crate::store::flat::{self, dense_bytes, dense_bytes_mut, Flat};
use crate::store::pool::{self, Size};
use crate::{Error, Result};

/// A bucket that is gathered.
#[derive(Debug)]
pub(crate) struct Gathered {
    shell: Shell,
    /// This rank's segment.
    home: Tensor,
    /// Where it lies in the bucket.
    segment: Range<usize>,
    /// What the bucket is called in collectives.
    name: String,
    /// Whether it stays from its first use to the end of the step.
    stays: bool,
    ring: usize,
    presence: Presence,
}

/// Where a bucket's elements are beside the ranks' homes.
#[derive(Debug)]
enum Presence {
    Away,
    /// On their way to a buffer of the ring.
    Coming(usize, Work<'static>),
    /// In a buffer of the ring.
    Here(usize),
    /// In memory for this operation alone.
    Lent(Tensor),
}

/// Buffers of one size, used in turn.
#[derive(Debug)]
struct Ring {
    size: Size,
    buffers: Vec<Flat>,
    holds: Vec<Option<usize>>,
    next: usize,
}

/// Gathers the buckets of a model.
#[derive(Debug)]
pub(crate) struct Gatherer {
    id: u64,
    device: Device,
    rings: Vec<Ring>,
    buckets: Vec<Gathered>,
    trace: Trace,
    failed: Option<String>,
    /// What was waited for since the last step.
    waited: Duration,
}

/// What a bucket is, for [`Gatherer::add`].
#[derive(Debug)]
pub(crate) struct Described<'a> {
    pub(crate) kind: Kind,
    pub(crate) len: usize,
    pub(crate) segment: Range<usize>,
    pub(crate) home: &'a Flat,
    pub(crate) name: String,
    /// Whether it stays from its first use to the end of the step.
    pub(crate) stays: bool,
}

impl Gatherer {
    /// Without buckets; in the place of the one with number `id`, if there was one.
    pub(crate) fn new(device: Device, id: Option<u64>) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self {
            id: id.unwrap_or_else(|| LAST.fetch_add(1, Ordering::Relaxed) + 1),
            device,
            rings: Vec::new(),
            buckets: Vec::new(),
            trace: Trace::default(),
            failed: None,
            waited: Duration::ZERO,
        }
    }

    /// What operations know it by.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Bytes of all buffers.
    pub(crate) fn bytes(&self) -> usize {
        let of = |flat: &Flat| flat.len() * flat.kind().elt_size_in_bytes();
        self.rings.iter().flat_map(|ring| &ring.buffers).map(of).sum()
    }

    /// Why nothing is gathered any more, if that is so.
    pub(crate) fn failure(&self) -> Option<String> {
        self.failed.clone()
    }

    /// How many buckets there are: the number of the next one.
    pub(crate) fn bucket_count(&self) -> usize {
        self.buckets.len()
    }

    /// Adds buckets, without variables yet. Collective.
    pub(crate) fn add(&mut self, group: &mut Group, described: Vec<Described<'_>>) -> Result<()> {
        for bucket in described {
            let token = self.id << access::BUCKET_BITS | self.buckets.len() as u64;
            let home = bucket.home;
            self.buckets.push(Gathered {
                shell: Shell::new(bucket.kind, self.device, bucket.len, token)?,
                home: home.range(&(0..home.len()))?,
                segment: bucket.segment,
                name: bucket.name,
                stays: bucket.stays,
                ring: 0,
                presence: Presence::Away,
            });
        }
        self.fit_rings(group)
    }

    /// Makes the rings those of all buckets; those that are right already stay. Collective.
    fn fit_rings(&mut self, group: &mut Group) -> Result<()> {
        for index in 0..self.buckets.len() {
            self.send_away(index)?;
        }
        let size_of = |gathered: &Gathered| {
            let shell = gathered.shell.tensor();
            Size { kind: shell.kind(), len: shell.numel(), count: 1 }
        };
        let going = self.buckets.iter().filter(|gathered| !gathered.stays).map(size_of);
        let lens: Vec<(Kind, usize)> = going.map(|size| (size.kind, size.len)).collect();
        let (mut sizes, ring_of) = pool::sizes(&lens);
        let mut ring_of = ring_of.into_iter();
        for gathered in &mut self.buckets {
            gathered.ring = match gathered.stays {
                true => {
                    sizes.push(size_of(gathered));
                    sizes.len() - 1
                }
                false => ring_of.next().unwrap_or(0),
            };
        }
        let mut before = std::mem::take(&mut self.rings);
        let mut known = |size: &Size| {
            before.iter().position(|ring| ring.size == *size).map(|at| before.swap_remove(at))
        };
        let kept: Vec<Option<Ring>> = sizes.iter().map(&mut known).collect();
        drop(before); // before others take their place
        for (size, ring) in sizes.into_iter().zip(kept) {
            self.rings.push(ring.map_or_else(|| Ring::new(group, self.device, size), Ok)?);
        }
        Ok(())
    }

    /// Makes `variable` the view `range` of a bucket; its values go home, as far as they are this rank's.
    pub(crate) fn settle(
        &mut self,
        bucket: usize,
        variable: &Tensor,
        (range, strides): (&Range<usize>, &[i64]),
    ) -> Result<()> {
        let gathered = &mut self.buckets[bucket];
        let segment = &gathered.segment;
        let (start, end) = (range.start.max(segment.start), range.end.min(segment.end));
        if start < end {
            let own = flat::part(
                &flat::elements_of(variable)?,
                &(start - range.start..end - range.start),
            )?;
            let mut home =
                gathered.home.f_narrow(0, as_i64(start - segment.start)?, as_i64(end - start)?)?;
            tch::no_grad(|| home.f_copy_(&own).map(drop))?;
        }
        access::unseen(|| {
            let shell = gathered.shell.tensor();
            let view = shell.f_as_strided(variable.size(), strides, as_i64(range.start).ok())?;
            shim::set_data(variable, &view)
        })?;
        Ok(())
    }

    /// A bucket is needed no more; whoever still has views of it hears that it has moved.
    pub(crate) fn release(&mut self, index: usize) -> Result<()> {
        self.send_away(index)?;
        let gathered = &mut self.buckets[index];
        gathered.home = Tensor::f_empty([0], (gathered.home.kind(), self.device))?;
        gathered
            .shell
            .fail("a view that was made before its variable began to train and moved: make it anew")
    }

    /// Whether a bucket can be read.
    pub(crate) fn is_here(&self, bucket: usize) -> bool {
        matches!(self.buckets[bucket].presence, Presence::Here(_) | Presence::Lent(_))
    }

    /// An operation takes `wanted`: they are here when this returns. Collective.
    pub(crate) fn bring(&mut self, group: &mut Group, wanted: &[usize]) {
        if self.failed.is_some() {
            return;
        }
        let start = Instant::now();
        if let Err(error) = access::unseen(|| self.try_bring(group, wanted)) {
            if !matches!(error, Error::Comm(_)) {
                // The others have not heard of it, and wait for this rank.
                group.abort(&error.to_string());
            }
            self.fail(&error);
        }
        self.waited += start.elapsed();
    }

    fn try_bring(&mut self, group: &mut Group, wanted: &[usize]) -> Result<()> {
        for index in 0..self.buckets.len() {
            if matches!(self.buckets[index].presence, Presence::Lent(_)) && !wanted.contains(&index)
            {
                self.send_away(index)?;
            }
        }
        let mut next = None;
        for &index in wanted {
            let is_away = matches!(self.buckets[index].presence, Presence::Away);
            if is_away && !self.start(group, index, wanted)? {
                self.lend(group, index)?;
            }
            if matches!(self.buckets[index].presence, Presence::Coming(..)) {
                self.arrive(index)?;
                next = self.trace.needed(index);
            }
        }
        if let Some(next) = next {
            if matches!(self.buckets[next].presence, Presence::Away) {
                self.start(group, next, wanted)?;
            }
        }
        Ok(())
    }

    /// Starts to gather a bucket, in a buffer that holds none of `wanted`; whether there is one.
    fn start(&mut self, group: &mut Group, index: usize, wanted: &[usize]) -> Result<bool> {
        let ring = self.buckets[index].ring;
        let Ring { holds, next, .. } = &self.rings[ring];
        let count = holds.len();
        let free = |at: &usize| holds[*at].is_none_or(|held| !wanted.contains(&held));
        let Some(at) = (0..count).map(|step| (next + step) % count).find(free) else {
            return Ok(false);
        };
        if let Some(held) = self.rings[ring].holds[at] {
            self.send_away(held)?;
        }
        self.rings[ring].next = (at + 1) % count;
        self.rings[ring].holds[at] = Some(index);
        let gathered = &mut self.buckets[index];
        let buffer = &self.rings[ring].buffers[at];
        let mut own = buffer.range(&gathered.segment)?;
        tch::no_grad(|| own.f_copy_(&gathered.home).map(drop))?;
        group.set_stream(shim::current_stream(self.device)?);
        group.tagged(&gathered.name);
        let work = buffer.all_gather(group, 0..gathered.shell.tensor().numel())?;
        gathered.presence = Presence::Coming(at, work);
        Ok(true)
    }

    /// Waits for a bucket that is coming.
    fn arrive(&mut self, index: usize) -> Result<()> {
        let stream = shim::current_stream(self.device)?;
        let gathered = &mut self.buckets[index];
        let before = std::mem::replace(&mut gathered.presence, Presence::Away);
        let Presence::Coming(at, work) = before else { return Ok(()) };
        work.wait_on(stream)?;
        gathered.attach(self.rings[gathered.ring].buffers[at].base())?;
        gathered.presence = Presence::Here(at);
        Ok(())
    }

    /// Gathers a bucket into memory for this operation alone.
    fn lend(&mut self, group: &mut Group, index: usize) -> Result<()> {
        let gathered = &mut self.buckets[index];
        let len = as_i64(gathered.shell.tensor().numel())?;
        let memory = Tensor::f_empty([len], (gathered.home.kind(), self.device))?;
        let mut whole = memory.f_to_device(Device::Cpu)?;
        let home = gathered.home.f_to_device(Device::Cpu)?;
        let bytes = dense_bytes_mut(&gathered.name, &mut whole)?;
        group.tagged(&gathered.name);
        group.all_gather(dense_bytes(&gathered.name, &home)?, bytes)?.wait()?;
        if self.device != Device::Cpu {
            tch::no_grad(|| memory.shallow_clone().f_copy_(&whole).map(drop))?;
        }
        gathered.attach(memory.data_ptr())?;
        gathered.presence = Presence::Lent(memory);
        Ok(())
    }

    /// A bucket goes; what the program has written to it goes home before.
    fn send_away(&mut self, index: usize) -> Result<()> {
        self.bring_home(index)?;
        self.drop_gathered(index)
    }

    /// A bucket goes, whatever was written to it.
    fn drop_gathered(&mut self, index: usize) -> Result<()> {
        let gathered = &mut self.buckets[index];
        // Before lent memory goes.
        gathered.shell.detach()?;
        match std::mem::replace(&mut gathered.presence, Presence::Away) {
            Presence::Away | Presence::Lent(_) => {}
            // It was never looked at; the buffer is free when the ranks are done with it.
            Presence::Coming(at, work) => {
                work.wait_on(shim::current_stream(self.device)?)?;
                self.rings[gathered.ring].holds[at] = None;
            }
            Presence::Here(at) => self.rings[gathered.ring].holds[at] = None,
        }
        Ok(())
    }

    /// What the program wrote to a bucket that is here, as far as it is this rank's, goes home: its segment, which is what it was if
    /// nobody wrote. (Writes through `Tensor::data` leave no other trace.)
    fn bring_home(&mut self, index: usize) -> Result<()> {
        let gathered = &mut self.buckets[index];
        let memory = match &gathered.presence {
            Presence::Here(at) => {
                self.rings[gathered.ring].buffers[*at].range(&gathered.segment)?
            }
            Presence::Lent(memory) => {
                let (start, len) = (gathered.segment.start, gathered.segment.len());
                memory.f_narrow(0, as_i64(start)?, as_i64(len)?)?
            }
            _ => return Ok(()),
        };
        Ok(tch::no_grad(|| gathered.home.f_copy_(&memory).map(drop))?)
    }

    /// Everything that the program wrote goes home: what is there counts from here on.
    pub(crate) fn bring_all_home(&mut self) -> Result<()> {
        (0..self.buckets.len()).try_for_each(|index| self.bring_home(index))
    }

    /// The homes have changed: what was gathered before goes, and the next step will be like this one.
    pub(crate) fn forget(&mut self) -> Result<()> {
        for index in 0..self.buckets.len() {
            self.drop_gathered(index)?;
        }
        self.rings.iter_mut().for_each(|ring| ring.next = 0);
        self.trace.turn();
        Ok(())
    }

    /// What was waited for since the last call.
    pub(crate) fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    /// From here on whoever needs a parameter hears `error`.
    pub(crate) fn fail(&mut self, error: &Error) {
        if self.failed.is_some() {
            return;
        }
        let text = format!("the parameters could not be gathered: {error}");
        tracing::error!("{text}");
        self.close(&text);
        self.failed = Some(text);
    }

    fn close(&mut self, text: &str) {
        for gathered in &mut self.buckets {
            if let Err(error) = gathered.shell.fail(text) {
                tracing::error!(%error, "a parameter's memory could not be taken away");
            }
            // Lent memory goes only now.
            gathered.presence = Presence::Away;
        }
    }
}

impl Drop for Gatherer {
    fn drop(&mut self) {
        if self.failed.is_none() {
            self.close("the model is sharded, and what gathered its parameters is gone: keep the Ddp while the model is used");
        }
    }
}

impl Ring {
    fn new(group: &mut Group, device: Device, size: Size) -> Result<Self> {
        let buffers = (0..size.count).map(|_| Flat::registered(group, size.kind, device, size.len));
        let buffers = buffers.collect::<Result<Vec<_>>>()?;
        Ok(Self { size, holds: vec![None; buffers.len()], buffers, next: 0 })
    }
}

impl Gathered {
    fn attach(&mut self, memory: *mut std::ffi::c_void) -> Result<()> {
        // SAFETY: the buffer is at least as long as the shell, of its kind and on its device, and stays until `detach` or `fail`:
        // rings and lent memory go only after that.
        unsafe { self.shell.attach(memory) }
    }
}

fn as_i64(len: usize) -> Result<i64> {
    i64::try_from(len).map_err(|_too_long| Error::TooLarge { elements: len })
}
