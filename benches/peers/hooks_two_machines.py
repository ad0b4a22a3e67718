#!/usr/bin/env python3
"""A step of BERT over two machines with a slow link between them, by communication hook, beside PyTorch's.

Two network namespaces, one rank in each, joined by a virtual cable that `tc` holds to `--mbit`. Needs root and iproute2. Ours is the
trainer (`bert_large --hook …`), PyTorch's the network of scripts/gpu_torch_bert.py under `DistributedDataParallel` over gloo with its
`powerSGD_hook`. Each side is started anew for its steps, one after the other and `--rounds` times over, so that all see the same machine;
medians of the steps after the first compressed ones, and the fastest, which says more on a machine that does other things as well.

    cargo build --release --example bert_large
    third_party/torch-python/bin/python benches/peers/hooks_two_machines.py --mbit 1000 --rounds 2
"""

import argparse
import json
import os
import pathlib
import secrets
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ADDRESSES = ("10.98.0.1", "10.98.0.2")
OURS = ("none", "bf16", "int8", "powersgd:4:3", "noop")
THEIRS = ("allreduce", "bf16", "powersgd")
# Steps that do not count: allocation, the layout of buckets, plain steps before PowerSGD.
FIRST = 6


def ip(words):
    subprocess.run(["ip", *words.split()], check=True)


class Machines:
    def __init__(self, mbit):
        self.names = [f"phx{os.getpid()}{side}" for side in "ab"]
        self.mbit = mbit

    def __enter__(self):
        a, b = self.names
        for name in self.names:
            ip(f"netns add {name}")
        ip(f"-n {a} link add veth0 type veth peer name veth0 netns {b}")
        for name, address in zip(self.names, ADDRESSES):
            ip(f"-n {name} addr add {address}/24 dev veth0")
            ip(f"-n {name} link set veth0 up")
            ip(f"-n {name} link set lo up")
            if self.mbit:
                limit = f"rate {self.mbit}mbit burst 256kb latency 50ms"
                ip(f"netns exec {name} tc qdisc add dev veth0 root tbf {limit}")
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def run(self, command, environment):
        """One rank on each; all must end well."""
        ranks = []
        for rank, name in enumerate(self.names):
            of_rank = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank}
            of_rank = {key: str(value) for key, value in of_rank.items()}
            # A host name of its own: who shares a name shares memory.
            words = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]
            full = {**os.environ, **environment, **of_rank}
            ranks.append(subprocess.Popen([*words, *command], env=full, stdout=subprocess.DEVNULL))
        for process in ranks:
            if process.wait(timeout=3600):
                sys.exit(f"hooks_two_machines: {command[0]} ended with {process.returncode}")


def common(port, arguments):
    return {
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(arguments.threads),
        "PHALANX_JOB_TOKEN": secrets.token_hex(32),
        "PHALANX_HOST_LINK": "tcp",
        "GLOO_SOCKET_IFNAME": "veth0",
        "LD_LIBRARY_PATH": str(ROOT / "third_party/libtorch/lib"),
    }


def ours(machines, hook, port, arguments):
    program = ROOT / "target/release/examples/bert_large"
    with tempfile.TemporaryDirectory() as folder:
        metrics = pathlib.Path(folder) / "steps.jsonl"
        command = [program, "--config", arguments.config, "--steps", FIRST + arguments.steps, "--zero", 0, "--hook", hook]
        command += ["--micro-batch", arguments.micro_batch, "--global-batch", 2 * arguments.micro_batch]
        command += ["--threads", arguments.threads, "--metrics", metrics, "--output", folder]
        machines.run([str(word) for word in command], common(port, arguments))
        steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [step for step in steps if "step_ms" in step][FIRST:]
    return [step["step_ms"] for step in steps], steps[-1]["bytes_sent"]


def theirs(machines, hook, port, arguments):
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-W", "ignore", __file__, "--worker", hook, "--times", file.name]
        command += ["--config", arguments.config, "--steps", arguments.steps, "--threads", arguments.threads]
        command += ["--micro-batch", arguments.micro_batch]
        environment = common(port, arguments)
        del environment["LD_LIBRARY_PATH"]
        machines.run([str(word) for word in command], environment)
        return json.loads(pathlib.Path(file.name).read_text()), None


def worker(arguments):
    import types

    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
    from torch.nn.parallel import DistributedDataParallel

    sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benches/peers")]
    from ddp_step import batch
    from gpu_torch_bert import Bert

    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo")
    config = json.loads(pathlib.Path(arguments.config).read_text())["model"]
    torch.manual_seed(7)
    bert = Bert(config, dropout=lambda x, p: torch.native_dropout(x, p, True)[0])
    # With several buckets gloo's threads wait for each other inside PowerSGD's callbacks.
    megabytes = 1 << 14 if arguments.worker == "powersgd" else 25
    model = DistributedDataParallel(bert, gradient_as_bucket_view=True, bucket_cap_mb=megabytes)
    if arguments.worker == "bf16":
        model.register_comm_hook(None, default_hooks.bf16_compress_hook)
    if arguments.worker == "powersgd":
        if "numpy" not in sys.modules:
            # Its only use is a seed.
            seeds = types.SimpleNamespace(RandomState=lambda seed: types.SimpleNamespace(randint=lambda below: 7))
            sys.modules["numpy"] = types.SimpleNamespace(random=seeds)
        settings = {"matrix_approximation_rank": 4, "start_powerSGD_iter": 3, "orthogonalization_epsilon": 1e-8}
        state = powerSGD_hook.PowerSGDState(None, **settings)
        del sys.modules["numpy"]
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, labels = batch(torch, config["vocab_size"], arguments.micro_batch)
    times = []
    for _ in range(FIRST + arguments.steps):
        start = time.perf_counter()
        model(ids, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append((time.perf_counter() - start) * 1e3)
    dist.barrier()
    if dist.get_rank() == 0:
        pathlib.Path(arguments.times).write_text(json.dumps(times[FIRST:]))
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/bert_small.json")
    parser.add_argument("--mbit", type=int, default=1000, help="0: as fast as it goes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--times", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments)
    sides = [(ours, hook) for hook in OURS] + [(theirs, hook) for hook in THEIRS]
    times, sent = {side: [] for side in sides}, {}
    with Machines(arguments.mbit) as machines:
        for number in range(arguments.rounds):
            for at, side in enumerate(sides if number % 2 == 0 else sides[::-1]):
                run, hook = side
                found, sent[side] = run(machines, hook, 29000 + 40 * number + at, arguments)
                times[side] += found
                print(f"# {run.__name__} {hook}: {statistics.median(found):.0f} ms", file=sys.stderr)
    print("| | hook | bytes sent a step | step, median | the fastest |\n|---|---|---|---|---|")
    for run, hook in sides:
        size = "" if sent[run, hook] is None else f"{sent[run, hook] / 1e6:.2f} MB"
        name = "phalanx" if run is ours else "PyTorch + gloo"
        print(f"| {name} | {hook} | {size} | {statistics.median(times[run, hook]):.0f} ms | {min(times[run, hook]):.0f} ms |")


if __name__ == "__main__":
    main()
