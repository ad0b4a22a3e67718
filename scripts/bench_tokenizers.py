#!/usr/bin/env python3
"""MB of text a second of Python's `tokenizers` (see crates/data/benches/convert.rs): TOKENIZER.json TEXT SECONDS.

Lines are documents, given to `encode_batch` a thousand at a time, on all processors; the best of three runs.
"""
import sys
import time

import tokenizers


def main():
    tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
    with open(sys.argv[2], encoding="utf-8") as file:
        lines = file.read(8 << 20).splitlines()
    batches = [lines[at : at + 1000] for at in range(0, len(lines), 1000)]
    sizes = [sum(len(line.encode()) + 1 for line in batch) for batch in batches]
    best = 0.0
    for _ in range(3):
        started, done = time.perf_counter(), 0
        for batch, size in zip(batches, sizes):
            tokenizer.encode_batch(batch, add_special_tokens=False)
            done += size
            if time.perf_counter() - started > float(sys.argv[3]):
                break
        best = max(best, done / (time.perf_counter() - started) / 1e6)
    print(best, tokenizers.__version__)


if __name__ == "__main__":
    main()
