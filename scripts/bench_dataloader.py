#!/usr/bin/env python3
"""Sequences a second of PyTorch's DataLoader and of numpy alone over a flat file of u16 tokens (see benches/data_bars).

Map-style, shuffled, a memory map of all rows, batches of 32 x 512 as int64; raw, and with BERT's masks made for the whole batch.
`__getitem__` reads sample by sample, as most programs do; `__getitems__` gathers a batch with one fancy index, the fastest way
there is; numpy alone does that without a DataLoader and, for its best figure, without tensors. Each figure is the best of three
runs of at least SECONDS after one that is not counted. A JSON object a line: rate, the same of processor time (of this process:
without workers that is all there is), and the time to the first batch.
"""
import json
import sys
import time

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

LEN, BATCH, IGNORED, VOCAB = 512, 32, -100, 8192
SPECIAL_MAX, MASK, CLS, SEP = 4, 4, 2, 3
FILE, SECONDS = sys.argv[1], float(sys.argv[2])


class Tokens(Dataset):
    """Rows of tokens; for masks between [CLS] and [SEP]."""

    def __init__(self, masked, batched):
        self.masked = masked
        self.content = LEN - 2 if masked else LEN
        tokens = np.memmap(FILE, dtype="<u2", mode="r")
        self.rows = tokens[: len(tokens) // self.content * self.content].reshape(-1, self.content)
        if batched:
            self.__getitems__ = self.batch

    def __len__(self):
        return len(self.rows)

    def framed(self, rows, out):
        if self.masked:
            out[..., 1:-1] = rows
            out[..., 0], out[..., -1] = CLS, SEP
        else:
            out[...] = rows
        return torch.from_numpy(out)

    def __getitem__(self, i):
        return self.framed(self.rows[i], np.empty(LEN, dtype=np.int64))

    def batch(self, indices):
        return self.framed(self.rows[indices], np.empty((len(indices), LEN), dtype=np.int64))

    def mask(self, ids):
        labels = torch.full_like(ids, IGNORED)
        chosen = (torch.rand(ids.shape) < 0.15) & (ids > SPECIAL_MAX)
        labels[chosen] = ids[chosen]
        draw = torch.rand(ids.shape)
        ids[chosen & (draw < 0.8)] = MASK
        random = chosen & (draw >= 0.8) & (draw < 0.9)
        ids[random] = torch.randint(SPECIAL_MAX + 1, VOCAB, ids.shape)[random]
        return ids, labels

    def collate(self, batch):
        ids = batch if isinstance(batch, torch.Tensor) else torch.stack(batch)
        return self.mask(ids) if self.masked else ids


def data_loader(masked, batched, workers):
    data = Tokens(masked, batched)
    return DataLoader(
        data, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=workers, collate_fn=data.collate
    )


class Numpy:
    """A gather by a permutation, into memory that is used again."""

    def __init__(self):
        self.rows = Tokens(False, True).rows

    def __iter__(self):
        order = np.random.permutation(len(self.rows))
        narrow, wide = np.empty((BATCH, LEN), np.uint16), np.empty((BATCH, LEN), np.int64)
        for at in range(0, len(order) - BATCH + 1, BATCH):
            np.take(self.rows, order[at : at + BATCH], axis=0, out=narrow, mode="clip")
            np.copyto(wide, narrow)
            yield wide


def measure(what, how, workers, loader):
    best, best_busy, first = 0.0, 0.0, None
    for run in range(4):
        started, busy, done = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - started < SECONDS:
            for _ in loader:
                done += BATCH
                if first is None:
                    first = time.perf_counter() - started
                if time.perf_counter() - started > SECONDS:
                    break
        if run:
            best = max(best, done / (time.perf_counter() - started))
            best_busy = max(best_busy, done / max(time.process_time() - busy, 1e-9))
    line = {"what": what, "how": how, "workers": workers, "rate": best, "first_ms": first * 1e3}
    print(json.dumps({**line, "busy_rate": best_busy if workers == 0 else None}), flush=True)


def main():
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    for masked in (False, True):
        for batched in (False, True):
            for workers in (0, 2):
                what = "masked" if masked else "raw"
                how = "__getitems__" if batched else "__getitem__"
                measure(what, how, workers, data_loader(masked, batched, workers))
    measure("raw", "numpy alone", 0, Numpy())


if __name__ == "__main__":
    main()
