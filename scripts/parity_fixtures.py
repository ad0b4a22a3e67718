#!/usr/bin/env python3
"""Makes crates/ddp-core/tests/fixtures/parity.json: what PyTorch's own data-parallel training comes to.

Each case trains a small model on two and on three ranks under `DistributedDataParallel` over gloo, in fp32, and keeps the loss of
every step (the mean over the ranks) and the last weights. `crates/ddp-core/tests/parity` trains the same and has to meet them.
What has no counterpart there says so under `reference`: `single` is one process with everybody's samples (also for `SyncBatchNorm`, which
PyTorch has on GPUs alone), and `lamb` is its paper's algorithm 2 written out below, under `DistributedDataParallel` like the others.
`torch.optim.Muon` iterates in bf16, where a last bit of f32 decides about a last bit of bf16, which no two programs have alike; here its
own code iterates in f32 (`MuonAndAdamW`).

Weights and data are k / 1024 with k from a hash of a name and an index (`number`), so that both sides start from the same bits.
Every weight begins with a magnitude of 0.125 to 0.375 and stays away from zero, activations are tanh, losses squared errors, and
Adam and LAMB have eps = 2^-5: their first step is g / (|g| + eps), which with the usual 1e-8 turns the rounding of a gradient that
happens to be 1e-7 into a step of full size. Gradients are sums of terms near 1, so they are off by a few 1e-7; with 2^-5 that moves
a weight by 1e-5 of the learning rate.
What that leaves is checked before anything is written: no weight ends below `FLOOR`, and each case is far from the others.

Needs torch 2.11.0 (`scripts/setup.sh --test-extras` unpacks one) and no numpy:

    third_party/torch-python/bin/python scripts/parity_fixtures.py [--output FILE] [--compare FILE]

The same machine writes the same bytes. `--compare` writes nothing and prints how far the numbers are from those of FILE: under
another processor's code (`MKL_CBWR=COMPATIBLE`, `ATEN_CPU_CAPABILITY=default`) that is what rounding alone makes of them.
"""

import argparse
import json
import math
import pathlib
import struct
import sys
import tempfile
import types
import unittest.mock
import warnings

warnings.filterwarnings("ignore", message=".*NumPy.*")

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon
from torch.optim import lr_scheduler as schedulers
from torch.utils.checkpoint import checkpoint

OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "crates/ddp-core/tests/fixtures/parity.json"
WORLD_SIZES = (2, 3)
STEPS, ROWS, INPUTS, OUTPUTS = 6, 4, 5, 3
# Small enough for three buckets of uneven sizes and more.
BUCKET_BYTES = 128
# No weight may end nearer to zero: the tests compare to 1e-5 of each.
FLOOR = 2e-3
# What two cases differ by at least, relative to the weights: a hundred times the tolerance.
APART = 1e-3
EPS = 2**-5


# ---------------------------------------------------------------- values


def number(name, index):
    """32 bits that depend on a name and an index alone: FNV-1a of the name, then murmur3's finaliser."""
    x = 0x811C9DC5
    for byte in name.encode():
        x = (x ^ byte) * 0x01000193 & 0xFFFFFFFF
    x = (x + index * 0x9E3779B1) & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def weight(name, index):
    n = number(name, index)
    k = 128 + n % 257
    return -k if n >> 16 & 1 else k


def exact(numerators, shape):
    return (torch.tensor(numerators, dtype=torch.float32) / 1024).reshape(shape)


def samples(first, rows):
    """Inputs in [-1, 1] and targets in [-0.5, 0.5] of samples first, first + 1, …"""
    at = range(first * INPUTS, (first + rows) * INPUTS)
    x = exact([number("x", i) % 2049 - 1024 for i in at], (rows, INPUTS))
    at = range(first * OUTPUTS, (first + rows) * OUTPUTS)
    y = exact([number("y", i) % 1025 - 512 for i in at], (rows, OUTPUTS))
    return x, y


def fill(model):
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            values = exact([weight(name, i) for i in range(tensor.numel())], tensor.shape)
            # Scales and variances are about one.
            one = name.startswith("norm.") and name.endswith(("weight", "running_var"))
            with torch.no_grad():
                tensor.copy_(values + 1 if one else values)
    return model


# ---------------------------------------------------------------- models


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(INPUTS, 13), nn.Linear(13, 17)
        self.c, self.d = nn.Linear(17, 7), nn.Linear(7, OUTPUTS)

    def forward(self, x, step=0, rank=0):
        return self.d(self.c(self.b(self.a(x).tanh()).tanh()).tanh())


class Branches(Mlp):
    """Beside the layers of `Mlp`: one used on even steps, one on odd steps, one on rank 1, one never."""

    def __init__(self):
        super().__init__()
        self.even, self.never, self.odd, self.one = (nn.Linear(INPUTS, OUTPUTS) for _ in range(4))

    def forward(self, x, step=0, rank=0):
        y = super().forward(x)
        y = y + (self.even if step % 2 == 0 else self.odd)(x).tanh()
        return y + self.one(x).tanh() if rank == 1 else y


class Tied(nn.Module):
    """A layer used twice, one whose weight is the first one's, and one never used."""

    def __init__(self):
        super().__init__()
        self.a, self.t = nn.Linear(INPUTS, 13), nn.Linear(13, 13)
        self.d, self.never = nn.Linear(13, OUTPUTS), nn.Linear(INPUTS, OUTPUTS)

    def forward(self, x, step=0, rank=0):
        y = self.t(self.t(self.a(x).tanh()).tanh()).tanh()
        return self.d(y) + (y @ self.a.weight)[:, :OUTPUTS].tanh()


class Normed(Mlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(17)

    def forward(self, x, step=0, rank=0):
        return self.d(self.c(self.norm(self.b(self.a(x).tanh())).tanh()).tanh())


class Recomputed(nn.Module):
    """Two layers used twice, each time checkpointed, the second time inside of another checkpoint."""

    def __init__(self):
        super().__init__()
        self.a, self.t = nn.Linear(INPUTS, 13), nn.Linear(13, 17)
        self.u, self.d = nn.Linear(17, 13), nn.Linear(13, OUTPUTS)

    def forward(self, x, step=0, rank=0):
        part = lambda y: self.u(self.t(y).tanh()).tanh()
        again = lambda y: checkpoint(part, y, use_reentrant=False) * 0.5 + y
        y = checkpoint(part, self.a(x).tanh(), use_reentrant=False)
        return self.d(checkpoint(again, y, use_reentrant=False))


class Embedded(Mlp):
    """Rows of an embedding that depend on the step and the rank; its gradient is sparse."""

    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(11, INPUTS, sparse=True)

    def forward(self, x, step=0, rank=0):
        at = torch.tensor([(step * 3 + rank * 2 + row * row) % 11 for row in range(ROWS)])
        return super().forward(x + self.e(at))


class Products(Mlp):
    """The weights of `Mlp` times given numbers: their gradients, which are exact whatever the weights have become."""

    def forward(self, step=0, rank=0):
        named = self.named_parameters()
        return sum((p * gradient(n, p.shape, step, rank)).sum() for n, p in named)


def gradient(name, shape, step, rank):
    """3 (k + 1/2048) / 64 with k from 16 to 31, so that bf16 drops the fraction and nothing else: 3 k has at most seven bits, the sum of two or three
    such numbers at most eight in units of three, and a third of it is exact."""
    count = math.prod(shape)
    k = [16 + number(f"{name} {step} {rank}", i) % 16 for i in range(count)]
    return (torch.tensor(k, dtype=torch.float64) + 1 / 2048).mul(3 / 64).float().reshape(shape)


# ---------------------------------------------------------------- hooks


def first_value(seed, name, index):
    """What the first Q of PowerSGD is made of here: k / 1024 from -1 to 1."""
    x = 0x811C9DC5
    for byte in seed.to_bytes(8, "little") + name.encode():
        x = (x ^ byte) * 0x01000193 & 0xFFFFFFFF
    x = (x + index * 0x9E3779B1) & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return ((x ^ x >> 16) % 2049 - 1024) / 1024


def bf16(run):
    run.model.register_comm_hook(None, default_hooks.bf16_compress_hook)


def power_sgd(rank, **settings):
    """PyTorch's hook, with the first Q of each matrix from `first_value` and its name instead of `torch.randn`."""

    def register(run):
        names = {parameter: name for name, parameter in run.inner.named_parameters()}
        settings_of = {"start_powerSGD_iter": 2, "orthogonalization_epsilon": 0, **settings}
        # It asks numpy for the seed of `torch.randn`, which is not used here.
        seeds = types.SimpleNamespace(RandomState=lambda seed: types.SimpleNamespace(randint=lambda below: 0))
        sys.modules["numpy"] = types.SimpleNamespace(random=seeds)
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, **settings_of)
        del sys.modules["numpy"]

        def hook(state, bucket):
            compressed = []
            for parameter in bucket.parameters():
                rows, columns = parameter.shape[0], parameter[0].numel()
                r = min(rows, columns, rank)
                if powerSGD_hook._should_compress(rows, columns, r, state.min_compression_rate)[0]:
                    compressed.append(names[parameter])
            coming = iter(compressed)
            seed = 0 if state.warm_start else state.iter

            def randn(*shape, **_):
                name = next(coming)
                values = [first_value(seed, name, i) for i in range(math.prod(shape))]
                return torch.tensor(values, dtype=torch.float32).reshape(shape)

            usual = torch.randn
            torch.randn = randn
            try:
                return powerSGD_hook.powerSGD_hook(state, bucket)
            finally:
                torch.randn = usual

        run.model.register_comm_hook(state, hook)

    return register


# ---------------------------------------------------------------- LAMB


class Lamb(torch.optim.Optimizer):
    """You et al. 2020, algorithm 2, with bias correction and phi(x) = x: PyTorch has none."""

    def __init__(self, parameters, lr, betas=(0.9, 0.999), eps=EPS, weight_decay=0.01):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                m, v = state["m"], state["v"]
                m.mul_(beta1).add_(p.grad * (1 - beta1))
                v.mul_(beta2).add_(p.grad * p.grad * (1 - beta2))
                m_hat = m / (1 - beta1 ** state["step"])
                v_hat = v / (1 - beta2 ** state["step"])
                update = m_hat / (v_hat.sqrt() + group["eps"]) + p * group["weight_decay"]
                of_weight, of_update = p.double().norm().item(), update.double().norm().item()
                ratio = of_weight / of_update if of_weight > 0 and of_update > 0 else 1.0
                p.sub_(update * (group["lr"] * ratio))


# ---------------------------------------------------------------- Muon


class MuonAndAdamW:
    """PyTorch's Muon for matrices but the last layer's, PyTorch's AdamW for all else."""

    def __init__(self, named, adamw_lr, **settings):
        is_matrix = lambda name, p: p.ndim == 2 and not name.startswith("d.")
        self.muon = Muon([p for n, p in named if is_matrix(n, p)], **settings)
        others = [p for n, p in named if not is_matrix(n, p)]
        self.adamw = AdamW(others, lr=adamw_lr, eps=EPS, weight_decay=0.1)

    def step(self):
        # What it rounds to bf16 before it iterates stays in f32.
        with unittest.mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            self.muon.step()
        self.adamw.step()

    def zero_grad(self):
        self.muon.zero_grad()
        self.adamw.zero_grad()


# ---------------------------------------------------------------- training


class Run:
    """One rank of one case."""

    def __init__(self, case, rank, world_size):
        self.rank, self.world_size = rank, world_size
        self.inner = fill(case.model())
        self.model = DistributedDataParallel(
            self.inner, bucket_cap_mb=case.bucket_bytes / 2**20, **case.ddp
        )
        parameters = case.groups(self.inner) if case.groups else self.inner.parameters()
        self.optimizer = case.optimizer(parameters)
        self.losses, self.more = [], {}
        if case.hook:
            case.hook(self)

    def loss(self, step, part=0, rows=ROWS, model=None):
        """Mean over the rows of the summed squared error."""
        x, y = samples(step * 64 + self.rank * 16 + part * ROWS, rows)
        out = (model or self.model)(x, step=step, rank=self.rank)
        return (out - y).square().sum() / rows

    def note(self, name, value):
        self.more.setdefault(name, []).append(value)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain(run):
    for step in range(STEPS):
        loss = run.loss(step)
        loss.backward()
        run.losses.append(loss.item())
        run.step()


def clipped_to(norm_max, norm_type):
    def clipped(run):
        for step in range(STEPS):
            loss = run.loss(step)
            loss.backward()
            run.losses.append(loss.item())
            norm = nn.utils.clip_grad_norm_(run.model.parameters(), norm_max, norm_type)
            run.note("gradient_norms", norm.item())
            run.step()

    return clipped


def clamped(run):
    for step in range(STEPS):
        loss = run.loss(step)
        loss.backward()
        run.losses.append(loss.item())
        nn.utils.clip_grad_value_(run.model.parameters(), 0.05)
        run.step()


def accumulated(run):
    """Three micro-batches a step, of which the last exchanges."""
    for step in range(STEPS):
        losses = []
        with run.model.no_sync():
            for part in range(2):
                losses.append(run.loss(step, part) / 3)
                losses[-1].backward()
        losses.append(run.loss(step, 2) / 3)
        losses[-1].backward()
        run.losses.append(sum(loss.item() for loss in losses))
        run.step()


def accumulated_alone(run):
    """As `accumulated`, in one process with everybody's samples: a static graph that begins inside `no_sync` ends PyTorch's
    reducer with an internal assertion (`expect_autograd_hooks_`)."""
    for step in range(STEPS):
        total = 0.0
        for rank in range(run.world_size):
            for part in range(3):
                x, y = samples(step * 64 + rank * 16 + part * ROWS, ROWS)
                loss = (run.inner(x) - y).square().sum() / (ROWS * 3 * run.world_size)
                loss.backward()
                total += loss.item()
        run.losses.append(total)
        run.step()


def unused_in_the_last(run):
    """Of two micro-batches a step the first uses branches that the second, which exchanges, does not."""
    for step in range(0, 2 * STEPS, 2):
        with run.model.no_sync():
            first = run.loss(step) / 2
            first.backward()
        second = run.loss(step + 1) / 2
        second.backward()
        run.losses.append(first.item() + second.item())
        run.step()


def two_losses(run):
    """Two exchanged backwards, of different losses, before each step."""
    for step in range(STEPS):
        first = run.loss(step)
        first.backward()
        x, _ = samples(step * 64 + run.rank * 16 + ROWS, ROWS)
        second = run.model(x, step=step, rank=run.rank).square().sum() / ROWS
        second.backward()
        run.losses.append(first.item() + second.item())
        run.step()


def joined(run):
    """Rank r ends after 3 + r steps."""
    with run.model.join(divide_by_initial_world_size=False):
        for step in range(3 + run.rank):
            loss = run.loss(step)
            loss.backward()
            run.losses.append(loss.item())
            run.step()


def scaled(run):
    """The scale grows after two good steps; in step 2 a gradient of the last rank is infinite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(STEPS + 1):
        loss = run.loss(step)
        run.losses.append(loss.item())
        overflows = step == 2 and run.rank == run.world_size - 1
        run.note("scales", scaler.get_scale())
        scaler.scale(loss * 2.0**127 if overflows else loss).backward()
        scaler.unscale_(run.optimizer)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
        run.note("skipped", not math.isfinite(norm.item()))
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
    run.note("scales", scaler.get_scale())


def scheduled(run):
    """Warm-up over three steps, then linearly to zero at step 8."""
    factor = lambda step: (step + 1) / 3 if step < 3 else (8 - step) / 5
    schedule = schedulers.LambdaLR(run.optimizer, factor)
    for step in range(STEPS):
        run.note("rates", run.optimizer.param_groups[0]["lr"])
        loss = run.loss(step)
        loss.backward()
        run.losses.append(loss.item())
        run.step()
        schedule.step()


def together(run):
    """Micro-batches, clipping, groups and a schedule."""
    schedule = schedulers.LambdaLR(run.optimizer, lambda step: (step + 1) / 3 if step < 3 else (8 - step) / 5)
    for step in range(STEPS):
        with run.model.no_sync():
            first = run.loss(step) / 2
            first.backward()
        second = run.loss(step, 1) / 2
        second.backward()
        run.losses.append(first.item() + second.item())
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
        run.note("gradient_norms", norm.item())
        run.step()
        schedule.step()


def products(run):
    """Each weight times its gradient."""
    for step in range(STEPS):
        loss = run.model(step=step, rank=run.rank)
        loss.backward()
        run.losses.append(loss.item())
        run.step()


def averaged_buffers(run):
    """As `plain`, and after each backward the running statistics become the mean over the ranks."""
    for step in range(STEPS):
        loss = run.loss(step)
        loss.backward()
        for buffer in (run.inner.norm.running_mean, run.inner.norm.running_var):
            dist.all_reduce(buffer)
            buffer /= run.world_size
        run.losses.append(loss.item())
        run.step()


def weighted(run):
    """One process on everything: rank r's batch has 1 + r rows, in step 3 the last one's none; each row counts alike."""
    for step in range(STEPS):
        rows = [1 + rank for rank in range(run.world_size)]
        if step == 3:
            rows[-1] = 0
        run.optimizer.zero_grad()
        total = 0.0
        for rank, count in enumerate(rows):
            x, y = samples(step * 64 + rank * 16, count)
            total = total + (run.inner(x) - y).square().sum()
        loss = total / sum(rows)
        loss.backward()
        run.losses.append(loss.item())
        run.optimizer.step()


def normed_together(run, by_weight):
    """One process normalises everybody's batch as one: rank r's has 4 + r rows, by weight in step 3 the last one's none."""
    for step in range(STEPS):
        rows = [4 + rank for rank in range(run.world_size)]
        if by_weight and step == 3:
            rows[-1] = 0
        run.optimizer.zero_grad()
        parts = [samples(step * 64 + rank * 16, count) for rank, count in enumerate(rows)]
        out = run.inner(torch.cat([x for x, _ in parts])).split(rows)
        sums = [(part - y).square().sum() for part, (_, y) in zip(out, parts)]
        if by_weight:
            loss = sum(sums) / sum(rows)
        else:
            loss = sum(part / count for part, count in zip(sums, rows)) / run.world_size
        loss.backward()
        run.losses.append(loss.item())
        run.optimizer.step()


def normed_by_weight(run):
    normed_together(run, by_weight=True)


def normed_by_rank(run):
    normed_together(run, by_weight=False)


# ---------------------------------------------------------------- cases


class Case:
    def __init__(self, name, optimizer, train=plain, model=Mlp, groups=None, reference="ddp", hook=None, bucket_bytes=BUCKET_BYTES, **ddp):
        self.name, self.optimizer, self.train, self.model = name, optimizer, train, model
        self.hook, self.bucket_bytes = hook, bucket_bytes
        self.groups, self.reference, self.ddp = groups, reference, ddp


def using(kind, **settings):
    return lambda parameters: kind(parameters, **settings)


def by_name(model):
    """Biases, then what is left of layer c, then everything else."""
    named = list(model.named_parameters())
    bias = [p for n, p in named if n.endswith(".bias")]
    c = [p for n, p in named if n == "c.weight"]
    rest = [p for n, p in named if n in ("a.weight", "b.weight", "d.weight")]
    return [
        {"params": bias, "lr": 0.004, "weight_decay": 0.0},
        {"params": c, "lr": 0.002, "weight_decay": 0.5},
        {"params": rest},
    ]


def with_names(model):
    return list(model.named_parameters())


SLOW = using(SGD, lr=0.02)
MOMENTUM = using(SGD, lr=0.01, momentum=0.9)
# The decay shows in weights and in skipped parameters alike.
DECAYED = using(SGD, lr=0.01, momentum=0.9, weight_decay=0.1)
ADAMW = using(AdamW, lr=0.01, eps=EPS, weight_decay=0.1)
UNUSED = {"model": Branches, "find_unused_parameters": True}

CASES = [
    Case("sgd", SLOW),
    Case("sgd_momentum", MOMENTUM),
    Case("sgd_dampening", using(SGD, lr=0.02, momentum=0.9, dampening=0.3)),
    Case("sgd_nesterov", using(SGD, lr=0.01, momentum=0.9, nesterov=True)),
    Case("sgd_weight_decay", DECAYED),
    Case("adam", using(Adam, lr=0.01, eps=EPS)),
    Case("adam_l2", using(Adam, lr=0.01, eps=EPS, weight_decay=0.5)),
    Case("adamw", ADAMW),
    Case("adamw_groups", ADAMW, groups=by_name),
    Case("sgd_groups", DECAYED, groups=by_name),
    Case("lamb", using(Lamb, lr=0.02, weight_decay=0.1), reference="formula"),
    Case("muon", using(MuonAndAdamW, lr=0.006, adamw_lr=0.004), groups=with_names),
    Case(
        "muon_match_rms",
        using(MuonAndAdamW, lr=0.008, adamw_lr=0.01, nesterov=False, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        groups=with_names,
    ),
    Case("adafactor", using(Adafactor, lr=0.02, eps=(EPS, 1e-3), weight_decay=0.1)),
    Case("adafactor_groups", using(Adafactor, lr=0.01, eps=(EPS, 1e-3)), groups=by_name),
    # Momentum begins undamped, at each parameter's first gradient.
    Case("unused_sgd", using(SGD, lr=0.01, momentum=0.9, dampening=0.3, weight_decay=0.1), **UNUSED),
    Case("unused_adamw", ADAMW, **UNUSED),
    Case("static_graph", MOMENTUM, model=Tied, static_graph=True),
    Case("join", MOMENTUM, joined),
    Case("accumulation", MOMENTUM, accumulated),
    Case("unused_in_the_last", DECAYED, unused_in_the_last, **UNUSED),
    Case("static_graph_accumulation", MOMENTUM, accumulated_alone, model=Tied, reference="single"),
    Case("together", ADAMW, together, groups=by_name),
    Case("two_losses", using(SGD, lr=0.005, momentum=0.9), two_losses),
    Case("clipping", MOMENTUM, clipped_to(0.5, 2.0)),
    Case("clipping_sum", MOMENTUM, clipped_to(2.0, 1.0)),
    Case("clipping_p", MOMENTUM, clipped_to(0.2, 3.0)),
    Case("clipping_largest", MOMENTUM, clipped_to(0.1, math.inf)),
    Case("clipping_value", MOMENTUM, clamped),
    Case("loss_scaling", ADAMW, scaled),
    Case("schedule", ADAMW, scheduled),
    Case("buffers_rank_zero", SLOW, model=Normed),
    Case("buffers_own", SLOW, model=Normed, broadcast_buffers=False),
    Case("buffers_mean", SLOW, averaged_buffers, model=Normed, broadcast_buffers=False),
    Case("sparse", SLOW, model=Embedded),
    Case("hook_bf16", using(SGD, lr=0.015625), products, model=Products, hook=bf16),
    # Of every matrix; of two, the others being too small to gain. In one bucket, on which nothing depends: with several gloo's threads wait for each
    # other inside PyTorch's hook.
    Case("hook_powersgd_1", SLOW, hook=power_sgd(1), bucket_bytes=1 << 20),
    Case("hook_powersgd_2", MOMENTUM, hook=power_sgd(2), bucket_bytes=1 << 20),
    Case(
        "hook_powersgd_cold",
        SLOW,
        hook=power_sgd(2, warm_start=False, use_error_feedback=False),
        bucket_bytes=1 << 20,
    ),
    Case("weighted", MOMENTUM, weighted, reference="single"),
    Case("checkpointed", MOMENTUM, model=Recomputed),
    Case("sync_batch_norm", SLOW, normed_by_weight, model=Normed, reference="single"),
    Case("sync_batch_norm_by_rank", SLOW, normed_by_rank, model=Normed, reference="single"),
]


def train_all(rank, world_size, folder):
    """One rank: all cases, one after the other."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    outcomes = []
    for case in CASES:
        run = Run(case, rank, world_size)
        case.train(run)
        data = run.model._get_ddp_logging_data()
        # The first step has one bucket; those that are meant are made after it.
        buckets = data.get("rebuilt_bucket_sizes", data["bucket_sizes"]).split(", ")
        is_whole = case.reference == "single" or case.bucket_bytes > BUCKET_BYTES
        assert is_whole or len(set(buckets)) >= 3, (case.name, buckets)
        state = {n: t for n, t in run.inner.state_dict().items() if t.is_floating_point()}
        tensors = {n: t.flatten().tolist() for n, t in state.items()}
        outcomes.append({"losses": run.losses, "more": run.more, "tensors": tensors})
        del run
    pathlib.Path(f"{folder}/{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------- schedules


def rates(make, peak, steps):
    """The learning rate of each step."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def schedule_rows():
    """PyTorch's schedulers behind a linear warm-up whose first step has peak / warmup."""
    peak, steps, warmup, floor = 0.5, 24, 4, 0.0625
    left, decay_steps = 20 - warmup, 6

    def after_warmup(*parts, lengths=()):
        def make(optimizer):
            up = schedulers.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)
            stages = [up, *(part(optimizer) for part in parts)]
            milestones = [warmup]
            for length in lengths:
                milestones.append(milestones[-1] + length)
            return schedulers.SequentialLR(optimizer, stages, milestones)

        return make

    constant = lambda optimizer: schedulers.ConstantLR(optimizer, 1.0, 1)
    linear = lambda optimizer: schedulers.LinearLR(optimizer, 1.0, floor / peak, left)
    cosine = lambda optimizer: schedulers.CosineAnnealingLR(optimizer, left, floor)
    decay = lambda optimizer: schedulers.CosineAnnealingLR(optimizer, decay_steps, floor)
    square = lambda optimizer: schedulers.PolynomialLR(optimizer, left, power=2.0)
    # PyTorch's cosine rises again after its period: the comparison ends with it. Its polynomial has no floor.
    made = {
        "constant": (after_warmup(constant), steps, 0.0),
        "linear": (after_warmup(linear), steps, floor),
        "cosine": (after_warmup(cosine), 21, floor),
        "polynomial": (after_warmup(square), steps, 0.0),
        "warmup_stable_decay": (after_warmup(constant, decay, lengths=[left - decay_steps]), 21, floor),
    }
    settings = {"peak": peak, "warmup_steps": warmup, "total_steps": 20, "power": 2.0, "decay_steps": decay_steps}
    rows = [
        {"name": name, "floor": lowest, "rates": rates(make, peak, n)} for name, (make, n, lowest) in made.items()
    ]
    return {**settings, "rows": rows}


# ---------------------------------------------------------------- writing


def bits(values):
    """Eight hexadecimal digits for each f32."""
    return "".join(struct.pack(">f", value).hex() for value in values)


def merged(case, world_size, ranks):
    """The ranks' outcomes as one row; they hold the same weights, or the reference is no reference."""
    first = ranks[0]
    running = [name for name in first["tensors"] if ".running_" in name]
    for rank, outcome in enumerate(ranks):
        assert all(outcome["more"].get(n) == v for n, v in first["more"].items()), (case.name, rank)
        same = (n for n in first["tensors"] if n not in running)
        assert all(outcome["tensors"][n] == first["tensors"][n] for n in same), (case.name, rank)
    steps = max(len(outcome["losses"]) for outcome in ranks)
    losses = []
    for step in range(steps):
        there = [outcome["losses"][step] for outcome in ranks if step < len(outcome["losses"])]
        losses.append(sum(there) / len(there))
    row = {"name": case.name, "reference": case.reference, "world_size": world_size, "losses": losses}
    row.update(first["more"])
    row["weights"] = {n: bits(v) for n, v in first["tensors"].items() if n not in running}
    if running:
        row["buffers"] = [{n: bits(outcome["tensors"][n]) for n in running} for outcome in ranks]
    return row


def values_of(row):
    text = "".join([*row["weights"].values(), *(t for b in row.get("buffers", []) for t in b.values())])
    return [value for (value,) in struct.iter_unpack(">f", bytes.fromhex(text))]


def distance(left, right):
    """Greatest relative difference of two rows."""
    pairs = [*zip(values_of(left), values_of(right)), *zip(left["losses"], right["losses"])]
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs)


def check(rows):
    for row in rows:
        least = min(abs(value) for value in [*values_of(row), *row["losses"]])
        assert least > FLOOR, f"{row['name']} on {row['world_size']} ranks ends with {least:.1e}"
    for at, row in enumerate(rows):
        for other in rows[:at]:
            if len(values_of(row)) == len(values_of(other)):
                apart = distance(row, other)
                assert apart > APART, f"{row['name']} and {other['name']} differ by {apart:.1e} only"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
    parser.add_argument("--compare", type=pathlib.Path)
    arguments = parser.parse_args()
    version = torch.__version__.split("+")[0]
    if version != "2.11.0":
        sys.exit(f"this is torch {version}: the fixtures are of 2.11.0 (scripts/setup.sh --test-extras)")
    rows = []
    for world_size in WORLD_SIZES:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(train_all, (world_size, folder), nprocs=world_size)
            files = [pathlib.Path(folder) / f"{rank}.json" for rank in range(world_size)]
            ranks = [json.loads(file.read_text()) for file in files]
        rows += [merged(case, world_size, outcomes) for case, outcomes in zip(CASES, zip(*ranks))]
    if arguments.compare:
        for old, row in zip(json.loads(arguments.compare.read_text())["cases"], rows):
            print(f"{row['name']:20} {row['world_size']} ranks: {distance(row, old):.1e}")
        return
    check(rows)
    document = {"made_by": {"torch": version}, "schedules": schedule_rows(), "cases": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    # A row a line: what changed is then seen in a diff.
    parts = [f'"{part}": {json.dumps(document[part])}' for part in ("made_by", "schedules")]
    lines = ",\n".join(json.dumps(row) for row in document["cases"])
    body = "{\n" + ",\n".join([*parts, f'"cases": [\n{lines}\n]']) + "\n}\n"
    arguments.output.write_text(body)
    print(f"{arguments.output}: {len(rows)} rows, {len(body) // 1024} KiB, torch {version}")
    for row in rows:
        losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
        print(f"  {row['name']:18} {row['world_size']} ranks: {losses}")


if __name__ == "__main__":
    main()
