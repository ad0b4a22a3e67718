"""A GPT-2 of plain PyTorch, for the peers of `scripts/bench_gpt.sh`: the network of a configuration of `examples/gpt.rs`."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.head_dim = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        batch, tokens, _ = x.shape
        # Of a cut product the rank has some of the heads.
        heads = lambda y: y.view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """Blocks `first..last`; with the embedding where they begin with block 0, with the head where they end with the last one."""

    def __init__(self, model, first=0, last=None):
        super().__init__()
        width, heads, layers = model["n_embd"], model["n_head"], model["n_layer"]
        last = layers if last is None else last
        self.words = nn.Embedding(model["vocab_size"], width) if first == 0 else None
        self.positions = nn.Embedding(model["n_positions"], width) if first == 0 else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(first, last))
        self.norm = nn.LayerNorm(width) if last == layers else None
        self.head = nn.Linear(width, model["vocab_size"], bias=False) if last == layers else None
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x):
        if self.words is not None:
            x = self.words(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(self.norm(x))


def batch(model, samples, tokens):
    """Tokens by a formula, and what follows each."""
    at = torch.arange(samples * (tokens + 1)).reshape(samples, tokens + 1)
    ids = (at * 7919 + 13) % model["vocab_size"]
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def optimizer(network, fused=True):
    return torch.optim.AdamW(network.parameters(), lr=1e-4, fused=fused)
