"""The training step of bert_large under PyTorch DDP and bare, alternating: world size 1, medians.

The same network (of the same configuration file), precision, batch and optimizer: post-norm encoder, exact GELU,
attention of scaled_dot_product_attention, tied decoder at the masked positions alone, clipping, fused AdamW.
"""

import argparse
import contextlib
import json
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

IGNORED = -100


class Layer(nn.Module):
    def __init__(self, config, dropout):
        super().__init__()
        self.dropout = dropout
        width = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up = nn.Linear(width, config["intermediate_size"])
        self.down = nn.Linear(config["intermediate_size"], width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.last_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x):
        samples, length, width = x.shape

        def split(of):
            return of.view(samples, length, self.heads, -1).transpose(1, 2)

        # Cast once: autocast would do it for each of the three.
        kind = x.device.type
        y = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        attention = F.scaled_dot_product_attention(
            split(self.query(y)), split(self.key(y)), split(self.value(y)), dropout_p=0.1
        )
        attention = self.output(attention.transpose(1, 2).reshape(samples, length, width))
        x = self.norm(x + self.dropout(attention, 0.1))
        return self.last_norm(x + self.dropout(self.down(F.gelu(self.up(x))), 0.1))


class Bert(nn.Module):
    """`config` is the part `model` of a configuration file."""

    def __init__(self, config, dropout=F.dropout):
        super().__init__()
        self.dropout = dropout
        width, vocabulary = config["hidden_size"], config["vocab_size"]
        self.word = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(config.get("max_position_embeddings", 512), width)
        self.kind = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config["num_hidden_layers"]))
        self.dense = nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids, labels):
        # All tokens are of type 0.
        x = self.word(ids) + self.kind.weight[0] + self.position.weight[: ids.shape[1]]
        x = self.dropout(self.norm(x), 0.1)
        for layer in self.layers:
            x = layer(x)
        labels = labels.flatten()
        masked = labels.ne(IGNORED).nonzero().squeeze(1)
        x = self.head_norm(F.gelu(self.dense(x.flatten(0, 1).index_select(0, masked))))
        logits = F.linear(x, self.word.weight, self.bias)
        return F.cross_entropy(logits.float(), labels.index_select(0, masked))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/bert_large.json")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    with open(arguments.config) as file:
        config = json.load(file)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29534")
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=0, world_size=1)

    def network():
        torch.manual_seed(7)
        return Bert(config["model"]).to(device)

    models = [network(), DistributedDataParallel(network(), device_ids=[0] if on_gpu else None)]
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True) for model in models
    ]
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.batch, config["data"]["sequence_length"])
    ids = torch.randint(0, config["model"]["vocab_size"], shape, generator=generator)
    chosen = torch.rand(shape, generator=generator) < 0.15
    labels = torch.where(chosen, ids, torch.full_like(ids, IGNORED)).to(device)
    ids = ids.to(device)
    cast = torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()
    times = [[], []]
    for step in range(arguments.steps + 5):
        for kind in (step % 2, 1 - step % 2):
            start = time.perf_counter()
            optimizers[kind].zero_grad()
            with cast:
                loss = models[kind](ids, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(models[kind].parameters(), 1.0)
            optimizers[kind].step()
            loss.item()
            if on_gpu:
                torch.cuda.synchronize()
            if step >= 5:
                times[kind].append((time.perf_counter() - start) * 1e3)
    bare, ddp = (statistics.median(kind) for kind in times)
    print(
        f"BERT step, PyTorch {torch.__version__}: DDP {ddp:.3f} ms, bare {bare:.3f} ms, DDP / bare "
        f"{ddp / bare:.4f} (batch {arguments.batch} x {shape[1]}; median of {arguments.steps})"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
