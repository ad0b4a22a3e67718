#!/usr/bin/env python3
"""Loads the weights that the trainer wrote into transformers and computes the loss over fixed batches.

    python scripts/check_with_transformers.py OUTPUT_DIR BATCHES.safetensors [--samples-per-step N]

OUTPUT_DIR holds model.safetensors and config.json. Prints one loss a step and fails if a weight is missing or left over.
"""

import argparse

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import BertForMaskedLM


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("batches")
    parser.add_argument("--samples-per-step", type=int, default=8)
    options = parser.parse_args()
    model, loading = BertForMaskedLM.from_pretrained(options.output, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            raise SystemExit(f"{kind}: {sorted(loading[kind])}")
    model.eval()
    data = load_file(options.batches)
    labels = data.pop("labels")
    with torch.no_grad():
        for at in range(0, len(labels) - options.samples_per_step + 1, options.samples_per_step):
            rows = slice(at, at + options.samples_per_step)
            logits = model(**{name: value[rows] for name, value in data.items()}).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].flatten())
            print(f"{loss.item():.7f}")


if __name__ == "__main__":
    main()
