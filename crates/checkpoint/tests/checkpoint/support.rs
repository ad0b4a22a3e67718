//! Ranks as threads, a model to save, and files in memory.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::time::Duration;

use phalanx_checkpoint::fs::{Fs, Output, Source};
use phalanx_checkpoint::{
    flat_range, scatter, Cause, Dtype, Extent, Progress, Ranks, Saver, Snapshot, Strided, Tensors,
};

/// No rank of these tests takes as long on any machine.
pub(crate) const LONG: Duration = Duration::from_secs(120);

/// A rank that talks to the others over channels.
pub(crate) struct Peer {
    rank: usize,
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Receiver<Vec<u8>>>,
    /// How often ranks have talked.
    pub(crate) gathered: usize,
}

impl Ranks for Peer {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.to.len()
    }

    fn all_gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Cause> {
        self.gathered += 1;
        for peer in &self.to {
            peer.send(bytes.to_vec())?;
        }
        self.from.iter().map(|peer| Ok(peer.recv_timeout(LONG)?)).collect()
    }
}

/// Runs a function as each rank of a world.
pub(crate) fn on_ranks<T: Send>(world_size: usize, act: impl Fn(&mut Peer) -> T + Sync) -> Vec<T> {
    let mut to: Vec<Vec<_>> = (0..world_size).map(|_| Vec::new()).collect();
    let mut from: Vec<Vec<_>> = (0..world_size).map(|_| Vec::new()).collect();
    for sender in &mut to {
        for receiver in &mut from {
            let (outgoing, incoming) = channel();
            sender.push(outgoing);
            receiver.push(incoming);
        }
    }
    let peers: Vec<Peer> = to
        .into_iter()
        .zip(from)
        .enumerate()
        .map(|(rank, (to, from))| Peer { rank, to, from, gathered: 0 })
        .collect();
    std::thread::scope(|scope| {
        let act = &act;
        let running: Vec<_> =
            peers.into_iter().map(|mut peer| scope.spawn(move || act(&mut peer))).collect();
        running.into_iter().map(|rank| rank.join().expect("a rank")).collect()
    })
}

/// A tensor of the model: all ranks hold it, or each a flat range of its memory.
pub(crate) struct Tensor {
    pub(crate) name: &'static str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    strides: Vec<u64>,
    is_sharded: bool,
}

fn tensor(name: &'static str, dtype: Dtype, shape: &[u64], strides: &[u64], shard: bool) -> Tensor {
    let (shape, strides) = (shape.to_vec(), strides.to_vec());
    Tensor { name, dtype, shape, strides, is_sharded: shard }
}

/// Replicas and shards, permuted memory, uneven sizes, nothing, a scalar.
pub(crate) fn model() -> Vec<Tensor> {
    vec![
        tensor("model/bias", Dtype::F32, &[13], &[1], false),
        tensor("model/conv", Dtype::F32, &[4, 3, 2, 2], &[12, 1, 6, 3], false),
        tensor("model/empty", Dtype::F32, &[0, 5], &[5, 1], false),
        tensor("model/steps", Dtype::I64, &[], &[], false),
        tensor("model/w", Dtype::BF16, &[17, 9], &[9, 1], false),
        tensor("optimizer/bias.m", Dtype::F32, &[13], &[1], true),
        tensor("optimizer/conv.m", Dtype::F32, &[4, 3, 2, 2], &[12, 1, 6, 3], true),
        tensor("optimizer/mask", Dtype::Bool, &[5, 1, 7], &[7, 99, 1], true),
        tensor("optimizer/w.m", Dtype::F64, &[17, 9], &[1, 17], true),
    ]
}

impl Tensor {
    pub(crate) fn len(&self) -> u64 {
        self.shape.iter().product()
    }

    /// The value of an element's byte: its tensor, index, the step.
    fn byte(&self, step: u64, index: u64, byte: usize) -> u8 {
        let seed = self.name.bytes().map(u64::from).sum::<u64>() * 7919
            + step * 104_729
            + index * 31
            + byte as u64 * 131;
        (seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
    }

    pub(crate) fn strides(&self) -> &[u64] {
        &self.strides
    }

    /// Its bytes with the last dimension fastest.
    pub(crate) fn plain(&self, step: u64) -> Vec<u8> {
        let width = self.dtype.bytes();
        (0..self.len())
            .flat_map(|index| (0..width).map(move |byte| self.byte(step, index, byte)))
            .collect()
    }

    /// Its bytes as they lie in memory.
    pub(crate) fn memory(&self, step: u64) -> Vec<u8> {
        let plain = self.plain(step);
        let mut memory = vec![0; plain.len()];
        let all = Extent::whole(&self.shape);
        scatter(&all, &plain, &mut memory, (&self.strides, 0), self.dtype.bytes()).expect("dense");
        memory
    }

    /// The flat range of a rank: uneven, and nothing for some.
    pub(crate) fn range(&self, rank: usize, world_size: usize) -> std::ops::Range<u64> {
        if !self.is_sharded {
            return 0..self.len();
        }
        let cut = |at: usize| self.len() * (at * at) as u64 / (world_size * world_size) as u64;
        cut(rank)..cut(rank + 1)
    }

    pub(crate) fn boxes(&self, rank: usize, world_size: usize) -> Vec<Extent> {
        flat_range(&self.shape, &self.strides, self.range(rank, world_size)).expect("dense")
    }
}

/// The memory of a rank's tensors.
pub(crate) struct Memory {
    tensors: Vec<(Tensor, std::ops::Range<u64>, Vec<u8>)>,
    place: (usize, usize),
    step: u64,
}

impl Memory {
    pub(crate) fn new(step: u64, rank: usize, world_size: usize) -> Self {
        let tensors = model().into_iter().map(|tensor| {
            let range = tensor.range(rank, world_size);
            let width = tensor.dtype.bytes();
            let bytes = range.start as usize * width..range.end as usize * width;
            let memory = tensor.memory(step)[bytes].to_vec();
            (tensor, range, memory)
        });
        Memory { tensors: tensors.collect(), place: (rank, world_size), step }
    }

    pub(crate) fn snapshot(&self) -> Snapshot<'_> {
        let (rank, world_size) = self.place;
        let mut snapshot = Snapshot::new();
        for (tensor, range, memory) in &self.tensors {
            let width = tensor.dtype.bytes();
            for extent in tensor.boxes(rank, world_size) {
                let content = Strided::new(memory, &tensor.strides, range.start, width);
                snapshot.part(tensor.name, tensor.dtype, &tensor.shape, extent, content);
            }
        }
        snapshot.values(serde_json::json!({ "step": self.step, "name": "model" }));
        snapshot.rank_values(serde_json::json!([rank, self.step]));
        snapshot
    }
}

/// Saves a step on one rank and waits for it.
pub(crate) fn save(saver: &mut Saver, ranks: &mut dyn Ranks, step: u64) -> Progress {
    let memory = Memory::new(step, ranks.rank(), ranks.world_size());
    saver.save(ranks, step, &memory.snapshot()).expect("save");
    saver.finish(ranks).expect("finish")
}

/// Whether every tensor is that of the model after a step.
pub(crate) fn check(tensors: &dyn Tensors, step: u64) {
    let model = model();
    assert_eq!(tensors.names(), model.iter().map(|tensor| tensor.name).collect::<Vec<_>>());
    for tensor in model {
        let spec = tensors.spec(tensor.name).expect("it has a name");
        assert_eq!((spec.dtype, spec.shape), (tensor.dtype, tensor.shape.as_slice()));
        let bytes = tensors.read_whole(tensor.name).expect("read");
        assert_eq!(bytes, tensor.plain(step), "{} at step {step}", tensor.name);
    }
}

/// Files in memory, to be read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Files(pub(crate) BTreeMap<PathBuf, Arc<[u8]>>);

impl Files {
    /// All files under a folder.
    pub(crate) fn load(folder: &Path) -> Self {
        let mut files = Files::default();
        for entry in std::fs::read_dir(folder).expect("list") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                files.0.extend(Files::load(&path).0);
            } else {
                files.0.insert(path.clone(), std::fs::read(&path).expect("read").into());
            }
        }
        files
    }
}

#[derive(Debug)]
struct Bytes(Arc<[u8]>);

impl Source for Bytes {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let start = offset as usize;
        let bytes = self.0.get(start..start + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }
}

fn refused<T>() -> io::Result<T> {
    Err(io::ErrorKind::ReadOnlyFilesystem.into())
}

impl Fs for Files {
    fn create_folder(&self, _path: &Path) -> io::Result<()> {
        refused()
    }

    fn create(&self, _path: &Path) -> io::Result<Box<dyn Output>> {
        refused()
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn Source>> {
        let bytes = self.0.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(Bytes(Arc::clone(bytes))))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let inside = self.0.keys().filter_map(|file| file.strip_prefix(path).ok());
        let first = inside.filter_map(|file| file.components().next());
        let mut names: Vec<_> =
            first.map(|name| name.as_os_str().to_string_lossy().into_owned()).collect();
        names.dedup();
        Ok(names)
    }

    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        refused()
    }

    fn remove_file(&self, _path: &Path) -> io::Result<()> {
        refused()
    }

    fn remove_folder(&self, _path: &Path) -> io::Result<()> {
        refused()
    }

    fn sync_folder(&self, _path: &Path) -> io::Result<()> {
        refused()
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        refused()
    }
}
