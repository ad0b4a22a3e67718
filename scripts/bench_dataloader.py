#!/usr/bin/env python3
"""Sequences a second of PyTorch's DataLoader over the tokens of a prepared folder (see benches/feed.rs).

Map-style, shuffled, numpy's memory maps, batches of 32 x 512; raw, and with BERT's masks made for the whole batch. Each figure
is the best of three runs of at least two seconds after one that is not counted.
"""
import json
import pathlib
import sys
import time

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

LEN, BATCH, IGNORED = 512, 32, -100
SPECIAL_MAX, MASK = 4, 4


class Tokens(Dataset):
    """Rows of LEN - 2 tokens between [CLS] and [SEP]."""

    def __init__(self, folder, masked, batched):
        folder = pathlib.Path(folder)
        index = json.loads((folder / "index.json").read_text())
        self.vocab_size, self.masked = index["vocab_size"], masked
        # Safetensors: data start at byte 4096, tokens first.
        self.shards = [
            np.memmap(folder / s["file"], dtype="<u2", mode="r", offset=4096, shape=(s["token_count"],))
            for s in index["shards"]
        ]
        self.windows = [np.lib.stride_tricks.sliding_window_view(s, LEN - 2) for s in self.shards]
        self.starts = np.concatenate([[0], np.cumsum([len(s) for s in self.shards])])
        self.count = int(self.starts[-1]) // (LEN - 2)
        if batched:
            self.__getitems__ = self.batch

    def __len__(self):
        return self.count

    def read(self, i, out):
        start = i * (LEN - 2)
        end = start + LEN - 2
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        at = 1
        while start < end:
            upto = min(end, int(self.starts[shard + 1]))
            n = upto - start
            out[at : at + n] = self.shards[shard][start - self.starts[shard] : upto - self.starts[shard]]
            start, at, shard = upto, at + n, shard + 1
        out[0], out[LEN - 1] = 2, 3

    def mask(self, ids):
        labels = torch.full_like(ids, IGNORED)
        chosen = (torch.rand(ids.shape) < 0.15) & (ids > SPECIAL_MAX)
        labels[chosen] = ids[chosen]
        draw = torch.rand(ids.shape)
        ids[chosen & (draw < 0.8)] = MASK
        random = chosen & (draw >= 0.8) & (draw < 0.9)
        ids[random] = torch.randint(SPECIAL_MAX + 1, self.vocab_size, ids.shape)[random]
        return ids, labels

    def __getitem__(self, i):
        row = np.empty(LEN, dtype=np.int64)
        self.read(i, row)
        return torch.from_numpy(row)

    def batch(self, indices):
        """Best practice: one gather for all rows of a shard; rows across shards one by one."""
        rows = np.empty((len(indices), LEN), dtype=np.int64)
        starts = np.asarray(indices) * (LEN - 2)
        shards = np.searchsorted(self.starts, starts, side="right") - 1
        whole = starts + LEN - 2 <= self.starts[shards + 1]
        for shard in np.unique(shards):
            mine = np.flatnonzero((shards == shard) & whole)
            rows[mine, 1:-1] = self.windows[shard][starts[mine] - self.starts[shard]]
        for at in np.flatnonzero(~whole):
            self.read(indices[at], rows[at])
        rows[:, 0], rows[:, -1] = 2, 3
        return torch.from_numpy(rows)

    def collate(self, batch):
        ids = batch if isinstance(batch, torch.Tensor) else torch.stack(batch)
        return self.mask(ids) if self.masked else ids


def rate(folder, masked, batched, workers):
    data = Tokens(folder, masked, batched)
    loader = DataLoader(
        data, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=workers, collate_fn=data.collate
    )
    best, first = 0.0, None
    for run in range(4):
        started, done = time.perf_counter(), 0
        for batch in loader:
            done += BATCH
            if first is None:
                first = time.perf_counter() - started
            if time.perf_counter() - started > 2.0:
                break
        if run:
            best = max(best, done / (time.perf_counter() - started))
    return best, first


def main():
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    for masked in (False, True):
        for workers in (0, 2):
            for batched in (False, True):
                best, first = rate(sys.argv[1], masked, batched, workers)
                what = "tensors with masks" if masked else "raw tensors"
                how = "__getitems__" if batched else "__getitem__"
                print(
                    f"DataLoader, {what}, {how}, {workers} workers: {best:>9.0f} sequences/s, "
                    f"first batch {first * 1e3:.1f} ms"
                )


if __name__ == "__main__":
    main()
