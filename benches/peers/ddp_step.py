#!/usr/bin/env python3
"""A training step of ours and of PyTorch's DistributedDataParallel over gloo, taking turns in one run.

`scripts/bench_ddp.sh` builds what this needs and starts it. Both sides train the same BERT (of the same configuration file) on the
same tokens, with dropout, fp32 or under bf16 autocast, with AdamW and the usual weights without decay. PyTorch has its best
settings: `gradient_as_bucket_view=True`, buckets of 25 MiB, fused AdamW, gradients set to none, matrix products on activations that
are cast once, and `native_dropout`, which keeps a byte for each element.

Both sides stay resident and wait for a line on their standard input while the other one works; a waiting rank uses no processor.
A round asks each for a block of steps with the exchange of gradients and one without it, in turned order. The first step of a
block warms the caches up again and does not count. Where four models do not fit into memory (`--apart`, by itself where that is so),
each side is started anew for its blocks. Ranks start a step together, after a barrier that is not timed; a step takes what its
slowest rank takes. PyTorch's step without exchange is that inside `no_sync`. On a machine that does other things as well, the time
that the processors spent says more than the clock; what a rank spins while it waits is in it.

The limit is that of `benches/collectives.rs`: an all-reduce in place, in shared memory, of as many bytes as the gradients have.
"""

import argparse
import contextlib
import json
import os
import pathlib
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LENGTH = 128
IGNORED = -100
# Weights, gradients, two moments, and a fourth of that for what a step needs beside.
BYTES_A_PARAMETER = 20
# A rank that has not answered by then never will.
PATIENCE = 1800


# ---------------------------------------------------------------- PyTorch's rank


def batch(torch, vocabulary, samples):
    """As benches/step.rs makes it: tokens by a formula, every seventh to be predicted."""
    at = torch.arange(samples * LENGTH).reshape(samples, LENGTH)
    ids = (at * 7919 + 13) % (vocabulary - 5) + 5
    return ids, torch.where(at % 7 == 0, ids, torch.full_like(ids, IGNORED))


def sharded(bert, bf16):
    """FSDP2: a unit a layer, and the rest; where parameters are bf16 it gathers and computes in it, and gradients add up in fp32."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = narrow if bf16 else MixedPrecisionPolicy()
    for layer in bert.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(bert, mesh=mesh, mp_policy=policy)


def serve(arguments):
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    sys.path.insert(0, str(ROOT / "scripts"))
    from gpu_torch_bert import Bert

    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo")
    config = json.loads(pathlib.Path(arguments.config).read_text())["model"]
    torch.manual_seed(7)
    bert = Bert(config, dropout=lambda x, p: torch.native_dropout(x, p, True)[0])
    bf16 = arguments.precision == "bf16"
    model = sharded(bert, bf16 and arguments.fsdp == "bf16") if arguments.fsdp else DistributedDataParallel(bert, gradient_as_bucket_view=True)
    decays = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decays, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    ids, labels = batch(torch, config["vocab_size"], arguments.micro_batch)
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}), flush=True)

    def step(exchange):
        dist.barrier()
        start = time.perf_counter()
        with contextlib.nullcontext() if exchange or arguments.fsdp else model.no_sync():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and arguments.fsdp != "bf16"):
                loss = model(ids, labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (time.perf_counter() - start) * 1e3

    for line in sys.stdin:
        kind, count = line.split()
        print(json.dumps({"ms": [step(kind == "with") for _ in range(int(count))]}), flush=True)
    dist.destroy_process_group()


# ---------------------------------------------------------------- the sides


class Side:
    """All ranks of one program."""

    def __init__(self, name, command, arguments, environment=None):
        self.name, self.command, self.arguments = name, command, arguments
        self.environment = environment or {}
        self.ranks, self.parameters = [], None
        self.times = {"with": [], "without": []}
        self.busy = {"with": [], "without": []}

    def start(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world_size, token = self.arguments.ranks, secrets.token_hex(32)
        for rank in range(world_size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "PHALANX_JOB_TOKEN": token,
                "OMP_NUM_THREADS": str(self.arguments.threads),
                "GLOO_SOCKET_IFNAME": "lo",
                **self.environment,
            }
            pipe = subprocess.PIPE
            self.ranks.append(
                subprocess.Popen(self.command, env=environment, stdin=pipe, stdout=pipe, text=True)
            )
        self.parameters = self.answers("parameters")[0]
        # Allocators, buckets in their final order, both kinds of step, and the comparisons of parameters that are due in
        # the first exchanges (1, 2, 4, 8; later in one of a hundred).
        self.ask("with", 9)
        self.ask("without", 1)

    def answers(self, key):
        """One of each rank."""
        timer = threading.Timer(PATIENCE, self.kill)
        timer.start()
        try:
            return [self.answer(rank, key) for rank in self.ranks]
        finally:
            timer.cancel()

    def answer(self, process, key):
        for line in process.stdout:
            if line.startswith("{"):
                return json.loads(line)[key]
        sys.exit(f"ddp_step: a rank of {self.name} ended: {process.wait()} (its message is above)")

    def ask(self, kind, count):
        """Milliseconds of each step: those of its slowest rank."""
        for process in self.ranks:
            process.stdin.write(f"{kind} {count}\n")
            process.stdin.flush()
        return [max(times) for times in zip(*self.answers("ms"))]

    def block(self, kind):
        steps = self.arguments.steps + 1
        before = self.processor_ms()
        self.times[kind] += self.ask(kind, steps)[1:]
        self.busy[kind].append((self.processor_ms() - before) / steps / len(self.ranks))

    def processor_ms(self):
        """What all ranks have used so far, with all their threads."""
        ticks = 0
        for process in self.ranks:
            fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks * 1e3 / os.sysconf("SC_CLK_TCK")

    def stop(self):
        for process in self.ranks:
            process.stdin.close()
        for process in self.ranks:
            process.wait()
        self.ranks = []

    def kill(self):
        for process in self.ranks:
            process.kill()

    def median(self, kind):
        return statistics.median(self.times[kind])


# ---------------------------------------------------------------- the run


def available_bytes():
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def parameter_count(config):
    """As examples/bert/config/mod.rs counts them."""
    model = json.loads(pathlib.Path(config).read_text())["model"]
    width, inner = model["hidden_size"], model["intermediate_size"]
    tables = model["vocab_size"] + model.get("max_position_embeddings", 512) + 2
    layer = 4 * (width + 1) * width + (width + 1) * inner + (inner + 1) * width + 4 * width
    head = (width + 1) * width + 2 * width + model["vocab_size"]
    return (tables + 2) * width + model["num_hidden_layers"] * layer + head


def limit_ms(program, ranks, size):
    """The in-place limit, and our all-reduce of as many bytes."""
    with tempfile.NamedTemporaryFile() as file:
        words = [program, "--ranks", ranks, "--sizes", size, "--rounds", 1, "--no-mpi", "--json", file.name]
        subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)
        row = json.loads(pathlib.Path(file.name).read_text())["rows"][0]
    return row["limit_us"] / 1e3, row["us"] / 1e3


def take_turns(sides, arguments):
    """Rounds of blocks; who is first and which kind is first take turns as well."""
    if not arguments.apart:
        for side in sides:
            side.start()
    for number in range(arguments.rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            if arguments.apart:
                side.start()
            for kind in ("with", "without") if number // 2 % 2 == 0 else ("without", "with"):
                side.block(kind)
            if arguments.apart:
                side.stop()
        now = ", ".join(f"{side.name} {side.median('with'):.1f} ms" for side in sides)
        print(f"# round {number + 1} of {arguments.rounds}: {now}", file=sys.stderr)
    if not arguments.apart:
        for side in sides:
            side.stop()


def table(sides, arguments, limit, ours_alone):
    ours, peer = sides
    count = len(ours.times["with"])
    size = ours.parameters * 4 / 2**20
    lines = [
        f"{arguments.config}: {ours.parameters / 1e6:.1f} M parameters, {arguments.precision}, {arguments.ranks} ranks x "
        f"{arguments.threads} threads, {arguments.micro_batch} x {LENGTH} tokens a rank; medians of {count} steps in "
        f"{arguments.rounds} rounds{', each side started anew for each' if arguments.apart else ''}",
        "",
        "| | ours | PyTorch DDP + gloo | PyTorch / ours |",
        "|---|---|---|---|",
    ]
    for kind in ("with", "without"):
        a, b = ours.median(kind), peer.median(kind)
        lines.append(f"| step {kind} exchange | {a:.1f} ms | {b:.1f} ms | {b / a:.3f} |")
    for kind in ("with", "without"):
        a, b = (statistics.median(side.busy[kind]) for side in sides)
        lines.append(f"| processor time of a rank, {kind} | {a:.0f} ms | {b:.0f} ms | {b / a:.3f} |")
    shares = [side.median("with") / side.median("without") for side in sides]
    lines.append(f"| with / without | {shares[0]:.4f} | {shares[1]:.4f} | |")
    costs = [side.median("with") - side.median("without") for side in sides]
    lines.append(f"| with - without | {costs[0]:.1f} ms | {costs[1]:.1f} ms | |")
    against = [side.median("with") / (side.median("without") + limit) for side in sides]
    lines.append(f"| with / (without + limit) | {against[0]:.4f} | {against[1]:.4f} | |")
    lines += ["", f"The gradients have {size:.1f} MiB. All-reduce of as much: in-place limit {limit:.2f} ms, ours {ours_alone:.2f} ms."]
    return "\n".join(lines)


def written(arguments, sides, limit, ours_alone):
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    processor = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    settings = {k: v for k, v in vars(arguments).items() if k not in ("ours", "collectives", "json", "worker")}
    document = {
        "commit": commit.strip(),
        "processor": processor,
        **settings,
        "parameters": sides[0].parameters,
        "limit_ms": limit,
        "all_reduce_ms": ours_alone,
        "times_ms": {side.name: side.times for side in sides},
        "processor_ms": {side.name: side.busy for side in sides},
    }
    pathlib.Path(arguments.json).write_text(json.dumps(document, indent=1) + "\n")


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/bert_small.json")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--micro-batch", type=int, default=8, help="samples of a rank")
    parser.add_argument("--zero", type=int, choices=(0, 1), help="of ours; else what the configuration has")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a block")
    parser.add_argument("--apart", action="store_true", help="one side in memory at a time")
    parser.add_argument("--json", help="write everything to this file")
    parser.add_argument("--ours", help="the program of benches/step.rs")
    parser.add_argument("--collectives", help="the program of crates/comm/benches/collectives.rs")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--fsdp", choices=("bf16", "autocast"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    arguments = parsed()
    if arguments.worker:
        return serve(arguments)
    if not (arguments.ours and arguments.collectives):
        sys.exit("ddp_step: scripts/bench_ddp.sh starts this, with programs that it builds")
    count = parameter_count(arguments.config)
    need = 2 * arguments.ranks * count * BYTES_A_PARAMETER
    if need > available_bytes() and not arguments.apart:
        print(f"# both sides need {need / 2**30:.1f} GiB together: one at a time", file=sys.stderr)
        arguments.apart = True
    shared = ["--config", arguments.config, "--precision", arguments.precision]
    shared += ["--micro-batch", str(arguments.micro_batch)]
    peer = [sys.executable, "-W", "ignore", __file__, "--worker", "--threads", str(arguments.threads)]
    zero = [] if arguments.zero is None else ["--zero", str(arguments.zero)]
    libraries = {"LD_LIBRARY_PATH": str(ROOT / "third_party/libtorch/lib")}
    sides = [
        Side("ours", [arguments.ours, "--take-turns", *zero, *shared], arguments, libraries),
        Side("PyTorch", [*peer, *shared], arguments),
    ]
    limits = [limit_ms(arguments.collectives, arguments.ranks, 4 * count)]
    try:
        take_turns(sides, arguments)
    finally:
        for side in sides:
            side.kill()
    for side in sides:
        assert side.parameters == count, f"{side.name} has {side.parameters} parameters, not {count}"
    limits.append(limit_ms(arguments.collectives, arguments.ranks, 4 * count))
    limit, ours_alone = (min(of) for of in zip(*limits))
    print(table(sides, arguments, limit, ours_alone))
    if arguments.json:
        written(arguments, sides, limit, ours_alone)


if __name__ == "__main__":
    main()
