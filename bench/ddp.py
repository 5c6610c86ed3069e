"""Two gloo ranks: how fast, and does the sum of gradients overlap with backward? `python bench/ddp.py`

    one rank     the real command with all threads
    two ranks    torchrun, half of the threads each, the same tokens a step

then options of DistributedDataParallel, and last a profile of a step of rank 0: how much of the time in which gradients
are summed is also spent computing gradients. All runs are train_gpt2.py's main, in turn; medians of the steps' times.
"""
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train_gpt2
from plumbing import runlog
from plumbing.cli import UserError, parse_flags, run_command

VARIANTS = {  # DistributedDataParallel's options in place of train_gpt2.py's
    "as it is": {},
    "no bucket view": {"gradient_as_bucket_view": False},
    "static graph": {"static_graph": True},
    "buckets of 5 MB": {"bucket_cap_mb": 5},
    "buckets of 100 MB": {"bucket_cap_mb": 100},
}


@dataclass
class BenchConfig:
    """Every field is a flag."""

    n_layer: int = 6  # blocks
    n_head: int = 6  # attention heads a block
    n_embd: int = 384  # channels
    sequence_length: int = 256  # tokens a window
    micro_batch_size: int = 8  # windows
    total_batch_size: int = 8192  # tokens a step, all ranks together
    dtype: str = "float32"  # float32 or bfloat16
    steps: int = 8  # of a run, the first two not counted
    rounds: int = 3  # runs of each side, in turn


def start(config: BenchConfig, data: str, ranks: int, options: dict) -> dict:
    """Train once -> {"seconds": of each step, "profile": of a step of rank 0, if there are several}."""
    threads = str(max(1, (os.cpu_count() or 2) // ranks))
    with tempfile.TemporaryDirectory() as out_dir:
        words = [sys.executable]
        if ranks > 1:
            words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        settings = json.dumps({"config": vars(config), "data": data, "out_dir": out_dir, "options": options})
        done = subprocess.run([*words, os.path.abspath(__file__)], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": threads, "BENCH_DDP": settings})
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error: " in line]
            raise UserError((errors or ["a rank failed"])[-1].strip())
        lines = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
        profile = Path(out_dir) / "profile.json"
        return {"seconds": [line["dt_ms"] / 1000 for line in lines if line["kind"] == "train"][2:],
                "profile": json.loads(profile.read_text()) if profile.exists() else None}


def train(settings: dict) -> None:
    """In a rank: train_gpt2.main with other options of DistributedDataParallel; rank 0 profiles the last step."""
    config, out_dir = settings["config"], settings["out_dir"]
    options = {"gradient_as_bucket_view": True, **settings["options"]}
    wrap = train_gpt2.DistributedDataParallel
    train_gpt2.DistributedDataParallel = lambda model, **_: wrap(model, **options)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    steps, rank = config.pop("steps"), int(os.environ.get("RANK", "0"))
    config.pop("rounds")

    class ProfiledLog(runlog.RunLog):
        def train(self, step, *rest, **more):
            super().train(step, *rest, **more)
            if "RANK" in os.environ and rank == 0 and step == steps - 1:
                profiler.start()
            elif "RANK" in os.environ and rank == 0 and step == steps:
                profiler.stop()
                (Path(out_dir) / "profile.json").write_text(json.dumps(overlap(profiler.events())))

    runlog.RunLog = ProfiledLog
    train_gpt2.main(train_gpt2.TrainConfig(
        data=settings["data"], out_dir=out_dir, max_steps=steps, val_every=0, val_tokens=config["sequence_length"],
        hellaswag_every=0, sample_every=0, checkpoint_every=0, compile=False, device="cpu", **config))


def overlap(events) -> dict:
    """Milliseconds of a step in which gradients are summed, in which they are computed, and in which both happen."""
    def spans(*names):
        found = sorted((event.time_range.start, event.time_range.end) for event in events
                       if any(name in event.name for name in names))
        merged = []
        for begin, end in found:
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([begin, end])
        return merged

    reducing, computing = spans("all_reduce", "allreduce"), spans("autograd::engine::evaluate_function")
    both = sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in reducing for b in computing)
    length = {name: sum(end - begin for begin, end in part) / 1000
              for name, part in (("reducing", reducing), ("computing", computing))}
    return {**length, "both": both / 1000, "sums": sum("all_reduce" in event.name for event in events)}


def main(config: BenchConfig) -> None:
    """Print two tables, the profile and one JSON line."""
    sides = {"one rank": (1, {}), **{f"two ranks, {name}": (2, options) for name, options in VARIANTS.items()}}
    seconds, profiles, failed = {side: [] for side in sides}, {}, {}
    with tempfile.TemporaryDirectory() as data:
        random = np.random.default_rng(0)
        for split in ("train", "val"):
            np.save(f"{data}/{split}_000.npy", random.integers(0, 50257, 2_000_000, dtype=np.uint16))
        for _ in range(config.rounds):
            for side, (ranks, options) in sides.items():
                try:
                    result = start(config, data, ranks, options)
                except UserError as error:
                    failed[side] = str(error)
                    continue
                seconds[side] += result["seconds"][:-1]  # the last step is profiled
                profiles[side] = result["profile"]
    tokens = config.total_batch_size
    print(f"{config.n_layer}L/{config.n_head}H/{config.n_embd}, T={config.sequence_length}, {tokens:,} tokens a step, "
          f"{config.dtype}, {os.cpu_count()} threads in all, torch {torch.__version__}")
    alone = statistics.median(seconds["one rank"])
    print(f"{'':>30} {'s a step':>9} {'tokens/s':>9} {'x one rank':>10} {'summing ms':>10} {'of it hidden':>12}")
    for side, taken in seconds.items():
        if not taken:
            print(f"{side:>30} fails: {failed[side]}")
            continue
        middle, profile = statistics.median(taken), profiles[side]
        hidden = f"{profile['reducing']:>10.1f} {profile['both'] / profile['reducing']:>12.0%}" if profile else ""
        print(f"{side:>30} {middle:>9.3f} {tokens / middle:>9,.0f} {alone / middle:>10.2f} {hidden}")
    print(json.dumps({"bench": "ddp", **vars(config), "seconds": seconds, "profiles": profiles, "failed": failed}))


if __name__ == "__main__":
    if "BENCH_DDP" in os.environ:
        run_command(train, json.loads(os.environ["BENCH_DDP"]))
    else:
        run_command(main, BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0])))
