//! libnccl: what communicators do.
#![expect(unsafe_code, reason = "the other side of the C interfaces")]

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

use crate::driver::{gpu, is_inside, must_be_inside, CONTEXT, CURRENT};
use crate::library::{
    failure, is_wished, ready, Comm, INTERNAL, INVALID_ARGUMENT, INVALID_USAGE, IN_PROGRESS, SUCCESS,
};
use crate::numbers::{bytes_of, number_of, size_of};
use crate::{a_while, lock};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    AllReduce(c_int),
    Reduce(c_int, usize),
    ReduceScatter(c_int),
    AllGather,
    Broadcast(usize),
    Send(usize),
    Receive(usize),
}

/// One call: bytes `from` → `to`, `count` elements as the call has them.
pub(crate) struct Operation {
    comm: Arc<Comm>,
    stream: usize,
    kind: Kind,
    dtype: c_int,
    count: usize,
    from: u64,
    to: u64,
    /// In the communicator's order, or the pair's.
    number: u64,
    factor: Option<f64>,
}

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    static GROUPED: RefCell<Vec<Operation>> = const { RefCell::new(Vec::new()) };
}

#[no_mangle]
extern "C" fn ncclGroupStart() -> c_int {
    DEPTH.set(DEPTH.get() + 1);
    SUCCESS
}

#[no_mangle]
extern "C" fn ncclGroupEnd() -> c_int {
    if DEPTH.get() == 0 {
        return failure(INVALID_USAGE, "ncclGroupEnd: not in a group call");
    }
    DEPTH.set(DEPTH.get() - 1);
    if DEPTH.get() > 0 {
        return SUCCESS;
    }
    launch(GROUPED.take())
}

/// All of a group run together; the communicators say *in progress* for a moment.
pub(crate) fn launch(operations: Vec<Operation>) -> c_int {
    let Some(first) = operations.first() else { return SUCCESS };
    while is_wished(&format!("hang-{}", first.comm.rank)) {
        a_while(10_000);
    }
    let stream = gpu().streams.get(&first.stream).cloned();
    let Some(stream) = stream else { return failure(INVALID_ARGUMENT, "no such stream") };
    let mut touched: Vec<Arc<Comm>> = Vec::new();
    for operation in &operations {
        if operation.stream != first.stream {
            return failure(INTERNAL, "the stand-in groups calls of one stream");
        }
        if !touched.iter().any(|comm| Arc::ptr_eq(comm, &operation.comm)) {
            touched.push(Arc::clone(&operation.comm));
        }
    }
    touched.iter().for_each(|comm| comm.state.store(IN_PROGRESS, SeqCst));
    std::thread::spawn(move || {
        a_while(200);
        stream.push(move || {
            operations.iter().for_each(Operation::give);
            // Sends end when they are received, maybe by this very group.
            let (sends, others): (Vec<_>, Vec<_>) =
                operations.iter().partition(|one| matches!(one.kind, Kind::Send(_)));
            others.into_iter().for_each(Operation::take);
            sends.into_iter().for_each(Operation::take);
            // Whoever has come to a collective has read what was given for those before it; of a message
            // only its two ranks say that.
            let collectives = || {
                let is_message = |kind| matches!(kind, Kind::Send(_) | Kind::Receive(_));
                operations.iter().filter(move |operation| !is_message(operation.kind))
            };
            for operation in collectives() {
                for name in lock(&operation.comm.kept).drain(..) {
                    drop(std::fs::remove_file(operation.comm.path(&name)));
                }
            }
            for operation in collectives() {
                lock(&operation.comm.kept).push(operation.name(operation.comm.rank));
            }
        });
        for comm in touched {
            let _ = comm.state.compare_exchange(IN_PROGRESS, SUCCESS, SeqCst, SeqCst);
        }
    });
    IN_PROGRESS
}

pub(crate) fn call(
    comm: usize,
    stream: usize,
    kind: Kind,
    dtype: c_int,
    count: usize,
    from: u64,
    to: u64,
) -> c_int {
    if CURRENT.get() != CONTEXT {
        return failure(1, "no current device");
    }
    let comm = match ready(comm) {
        Ok(comm) => comm,
        Err(code) => return code,
    };
    let bytes = count * size_of(dtype);
    let (read, written) = match kind {
        Kind::ReduceScatter(_) => (bytes * comm.ranks, bytes),
        Kind::AllGather => (bytes, bytes * comm.ranks),
        Kind::Send(_) => (bytes, 0),
        Kind::Receive(_) => (0, bytes),
        _ => (bytes, bytes),
    };
    if !is_inside(from, read) || !is_inside(to, written) {
        return failure(INVALID_ARGUMENT, "a buffer outside of the GPU's memory");
    }
    let op = match kind {
        Kind::AllReduce(op) | Kind::Reduce(op, _) | Kind::ReduceScatter(op) => op,
        _ => 0,
    };
    let known = (0..5).contains(&op)
        || lock(&comm.factors).get(op.wrapping_sub(100) as usize).is_some_and(|f| {
            f.as_ref().is_some_and(|f| f.0 == dtype)
        });
    let peer = match kind {
        Kind::Send(peer) | Kind::Receive(peer) | Kind::Broadcast(peer) | Kind::Reduce(_, peer) => {
            peer
        }
        _ => 0,
    };
    if !known || peer >= comm.ranks || size_of(dtype) == 0 {
        return failure(INVALID_ARGUMENT, "an operation, rank or type that is none");
    }
    let next = |of: &Mutex<HashMap<usize, u64>>| {
        let mut of = lock(of);
        let number = of.entry(peer).or_default();
        *number += 1;
        *number - 1
    };
    let number = match kind {
        Kind::Send(_) => next(&comm.sent),
        Kind::Receive(_) => next(&comm.received),
        _ => comm.collectives.fetch_add(1, SeqCst),
    };
    // The factor goes along: the operation may be destroyed when the call is taken.
    let factor = lock(&comm.factors)
        .get(op.wrapping_sub(100) as usize)
        .and_then(Option::as_ref)
        .map(|(dtype, bytes)| number_of(*dtype, bytes).0);
    let operation = Operation { comm, stream, kind, dtype, count, from, to, number, factor };
    if DEPTH.get() > 0 {
        GROUPED.with_borrow_mut(|grouped| grouped.push(operation));
        return SUCCESS;
    }
    launch(vec![operation])
}

impl Operation {
    pub(crate) fn bytes(&self) -> usize {
        self.count * size_of(self.dtype)
    }

    pub(crate) fn name(&self, rank: usize) -> String {
        format!("{}-{rank}", self.number)
    }

    pub(crate) fn message(&self, from: usize, to: usize) -> String {
        format!("message-{from}-{to}-{}", self.number)
    }

    /// What all ranks must have called alike.
    pub(crate) fn header(&self) -> Vec<u8> {
        let kind = match self.kind {
            Kind::Send(_) | Kind::Receive(_) => "message".to_owned(),
            other => format!("{other:?}"),
        };
        format!("{kind} {} {}\n", self.dtype, self.count).into_bytes()
    }

    unsafe fn input(&self, bytes: usize) -> &[u8] {
        must_be_inside(self.from, bytes);
        std::slice::from_raw_parts(self.from as *const u8, bytes)
    }

    unsafe fn output(&self, bytes: usize) -> &mut [u8] {
        must_be_inside(self.to, bytes);
        std::slice::from_raw_parts_mut(self.to as *mut u8, bytes)
    }

    /// This rank's part goes out.
    pub(crate) fn give(&self) {
        let comm = &self.comm;
        if comm.aborted.load(SeqCst) {
            return;
        }
        let bytes = match self.kind {
            Kind::ReduceScatter(_) => self.bytes() * comm.ranks,
            Kind::Receive(_) => return,
            Kind::Broadcast(root) if root != comm.rank => 0,
            _ => self.bytes(),
        };
        let mut file = self.header();
        // SAFETY: checked by call.
        file.extend_from_slice(unsafe { self.input(bytes) });
        match self.kind {
            Kind::Send(peer) => comm.publish(&self.message(comm.rank, peer), &file),
            _ => comm.publish(&self.name(comm.rank), &file),
        }
    }

    /// What a peer gave, unless aborted; it must have called the same.
    pub(crate) fn given(&self, name: &str) -> Option<Vec<u8>> {
        let file = self.comm.read(name)?;
        let header = self.header();
        if !file.starts_with(&header) {
            // The real one hangs or gives nonsense.
            failure(INVALID_USAGE, "the ranks called different things");
            self.comm.state.store(INVALID_USAGE, SeqCst);
            return None;
        }
        Some(file[header.len()..].to_vec())
    }

    /// The others' parts come in.
    pub(crate) fn take(&self) {
        let comm = &self.comm;
        match self.kind {
            Kind::Send(peer) => {
                let path = comm.path(&self.message(comm.rank, peer));
                comm.until(|| (!path.exists()).then_some(()));
            }
            Kind::Receive(peer) => {
                let name = self.message(peer, comm.rank);
                let Some(message) = self.given(&name) else { return };
                // SAFETY: checked by call; the header says the same length.
                unsafe { self.output(self.bytes()) }.copy_from_slice(&message);
                drop(std::fs::remove_file(comm.path(&name)));
            }
            _ => {
                let mut parts = Vec::new();
                for rank in 0..comm.ranks {
                    let Some(part) = self.given(&self.name(rank)) else { return };
                    parts.push(part);
                }
                self.combine(&parts);
            }
        }
    }

    pub(crate) fn combine(&self, parts: &[Vec<u8>]) {
        let (rank, bytes) = (self.comm.rank, self.bytes());
        // SAFETY: checked by call.
        let output = |bytes| unsafe { self.output(bytes) };
        match self.kind {
            Kind::AllGather => output(bytes * parts.len()).copy_from_slice(&parts.concat()),
            Kind::Broadcast(root) => output(bytes).copy_from_slice(&parts[root]),
            Kind::Reduce(_, root) if root != rank => {}
            Kind::AllReduce(op) | Kind::Reduce(op, _) => {
                output(bytes).copy_from_slice(&self.fold(op, parts))
            }
            Kind::ReduceScatter(op) => {
                let mine: Vec<Vec<u8>> = parts
                    .iter()
                    .map(|part| part[rank * bytes..(rank + 1) * bytes].to_vec())
                    .collect();
                output(bytes).copy_from_slice(&self.fold(op, &mine));
            }
            Kind::Send(_) | Kind::Receive(_) => {}
        }
    }

    pub(crate) fn fold(&self, op: c_int, parts: &[Vec<u8>]) -> Vec<u8> {
        let size = size_of(self.dtype);
        let factor = self.factor;
        let mut result = Vec::new();
        for at in (0..parts[0].len()).step_by(size) {
            let mut values = parts.iter().map(|part| number_of(self.dtype, &part[at..at + size]));
            let (mut x, mut n) = values.next().unwrap_or_default();
            x *= factor.unwrap_or(1.0);
            for (y, m) in values {
                (x, n) = match op {
                    1 => (x * y, n.wrapping_mul(m)),
                    2 => (x.max(y), n.max(m)),
                    3 => (x.min(y), n.min(m)),
                    _ => (x + y * factor.unwrap_or(1.0), n.wrapping_add(m)),
                };
            }
            if op == 4 {
                (x, n) = (x / parts.len() as f64, n / parts.len() as i64);
            }
            result.extend(bytes_of(self.dtype, x, n));
        }
        result
    }
}

#[no_mangle]
extern "C" fn ncclAllReduce(
    from: u64,
    to: u64,
    count: usize,
    dtype: c_int,
    op: c_int,
    comm: usize,
    stream: usize,
) -> c_int {
    call(comm, stream, Kind::AllReduce(op), dtype, count, from, to)
}

#[no_mangle]
extern "C" fn ncclReduce(
    from: u64,
    to: u64,
    count: usize,
    dtype: c_int,
    op: c_int,
    root: c_int,
    comm: usize,
    stream: usize,
) -> c_int {
    call(comm, stream, Kind::Reduce(op, root as usize), dtype, count, from, to)
}

#[no_mangle]
extern "C" fn ncclReduceScatter(
    from: u64,
    to: u64,
    count: usize,
    dtype: c_int,
    op: c_int,
    comm: usize,
    stream: usize,
) -> c_int {
    call(comm, stream, Kind::ReduceScatter(op), dtype, count, from, to)
}

#[no_mangle]
extern "C" fn ncclAllGather(
    from: u64,
    to: u64,
    count: usize,
    dtype: c_int,
    comm: usize,
    stream: usize,
) -> c_int {
    call(comm, stream, Kind::AllGather, dtype, count, from, to)
}

#[no_mangle]
extern "C" fn ncclBroadcast(
    from: u64,
    to: u64,
    count: usize,
    dtype: c_int,
    root: c_int,
    comm: usize,
    stream: usize,
) -> c_int {
    call(comm, stream, Kind::Broadcast(root as usize), dtype, count, from, to)
}

#[no_mangle]
extern "C" fn ncclSend(
    from: u64,
    count: usize,
    dtype: c_int,
    peer: c_int,
    comm: usize,
    stream: usize,
) -> c_int {
    call(comm, stream, Kind::Send(peer as usize), dtype, count, from, 0)
}

#[no_mangle]
extern "C" fn ncclRecv(
    to: u64,
    count: usize,
    dtype: c_int,
    peer: c_int,
    comm: usize,
    stream: usize,
) -> c_int {
    call(comm, stream, Kind::Receive(peer as usize), dtype, count, 0, to)
}
