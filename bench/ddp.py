"""Measure two gloo ranks on one CPU, and how far they sum gradients while backward is still computing.

    python -m bench.ddp

One rank with all threads and two ranks with half of the threads each take turns at train_gpt2.main, with the same
number of tokens per step; then follow other options of DistributedDataParallel. A profile of the last step of rank 0
shows how much of the time spent summing gradients is hidden behind computing them. Times are medians over the steps.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import train_gpt2
from plumbing import cli
from plumbing.cli import Positive, UserError, parse_flags, run_command
from plumbing.runlog import RunLog
from plumbing.tokenizer import VOCAB_SIZE

VARIANTS = {  # options of DistributedDataParallel that differ from train_gpt2.py's
    "as it is": {},
    "no bucket view": {"gradient_as_bucket_view": False},
    "static graph": {"static_graph": True},
    "buckets of 5 MB": {"bucket_cap_mb": 5},
    "buckets of 100 MB": {"bucket_cap_mb": 100},
}


@dataclass(frozen=True)
class BenchConfig:
    """Settings of this bench; every field is a flag."""
    # Model and batch
    n_layer: Positive = 6  # blocks
    n_head: Positive = 6  # attention heads per block
    n_embd: Positive = 384  # channels
    sequence_length: Positive = 256  # tokens per sequence
    micro_batch_size: Positive = 8  # sequences per forward pass on each rank
    total_batch_size: Positive = 8192  # tokens per optimizer step, over all ranks
    dtype: Literal["float32", "bfloat16"] = "float32"  # precision of matrix products
    # Runs
    steps: Positive = 8  # optimizer steps per run; the first two and the profiled last one are not timed
    rounds: Positive = 3  # runs of each side, in turn

    def __post_init__(self):
        cli.check_values(self)
        cli.require(self, "steps", self.steps > 3, "more than 3")


def start(config: BenchConfig, data: str, ranks: int, options: dict) -> dict:
    """Train once; return the `seconds` of each timed step and, with several ranks, the `profile` of a step of rank 0.

    Raises UserError with the last error of a rank if the run fails.
    """
    threads = str(max(1, (os.cpu_count() or 2) // ranks))
    with tempfile.TemporaryDirectory() as out_dir:
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        settings = json.dumps({"config": vars(config), "data": data, "out_dir": out_dir, "options": options})
        done = subprocess.run([*launcher, "-m", "bench.ddp"], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": threads, "BENCH_DDP": settings})
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error: " in line or "error: " in line]
            raise UserError((errors or ["a rank failed"])[-1].strip())
        lines = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
        profile = Path(out_dir) / "profile.json"
        return {"seconds": [line["dt_ms"] / 1000 for line in lines if line["kind"] == "train"][2:-1],
                "profile": json.loads(profile.read_text()) if profile.exists() else None}


def train(settings: dict) -> None:
    """Run train_gpt2.main in a rank, with options of DistributedDataParallel; profile the last step of rank 0."""
    config, out_dir = settings["config"], settings["out_dir"]
    options = {"gradient_as_bucket_view": True, **settings["options"]}
    wrap = train_gpt2.DistributedDataParallel
    train_gpt2.DistributedDataParallel = lambda model, **_: wrap(model, **options)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    profiles = os.environ.get("RANK") == "0"  # unset without torchrun
    steps = config.pop("steps")
    config.pop("rounds")

    class ProfiledLog(RunLog):
        def train(self, step, *values):
            super().train(step, *values)
            if profiles and step == steps - 1:
                profiler.start()
            elif profiles and step == steps:
                profiler.stop()
                (Path(out_dir) / "profile.json").write_text(json.dumps(overlap(profiler.events())))

    train_gpt2.RunLog = ProfiledLog
    train_gpt2.main(train_gpt2.TrainConfig(
        data=settings["data"], out_dir=out_dir, max_steps=steps, val_every=0,
        val_tokens=config["sequence_length"], hellaswag_every=0, sample_every=0, checkpoint_every=0, compile=False,
        device="cpu", yes=True, **config))


def spans(events, *names: str) -> list[list[float]]:
    """Merge the events whose name contains one of `names` into spans that do not overlap, [start, end] in us."""
    found = sorted((event.time_range.start, event.time_range.end) for event in events
                   if any(name in event.name for name in names))
    merged = []
    for begin, end in found:
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([begin, end])
    return merged


def overlap(events) -> dict:
    """Return the milliseconds of a step spent summing gradients, computing them, and on both at once."""
    reducing, computing = spans(events, "all_reduce", "allreduce"), spans(events, "autograd::engine::evaluate_function")
    both = sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in reducing for b in computing)
    length = {name: sum(end - begin for begin, end in part) / 1000
              for name, part in (("reducing", reducing), ("computing", computing))}
    return {**length, "both": both / 1000, "sums": sum("all_reduce" in event.name for event in events)}


def measure(config: BenchConfig, sides: dict[str, tuple[int, dict]]) -> tuple[dict, dict, dict]:
    """Run the sides, each (ranks, options), in turn -> the seconds, the profile and the error, if any, of each."""
    seconds, profiles, failed = {side: [] for side in sides}, {}, {}
    with tempfile.TemporaryDirectory() as data:
        random = np.random.default_rng(0)
        for split in ("train", "val"):
            np.save(f"{data}/{split}_000.npy", random.integers(0, VOCAB_SIZE, 2_000_000, dtype=np.uint16))
        for _ in range(config.rounds):
            for side, (ranks, options) in sides.items():
                try:
                    result = start(config, data, ranks, options)
                except UserError as error:
                    failed[side] = str(error)
                    continue
                seconds[side] += result["seconds"]
                profiles[side] = result["profile"]
    return seconds, profiles, failed


def main(config: BenchConfig) -> None:
    """Print the table and one JSON line."""
    sides = {"one rank": (1, {}), **{f"two ranks, {name}": (2, options) for name, options in VARIANTS.items()}}
    seconds, profiles, failed = measure(config, sides)
    if "one rank" in failed:
        raise UserError(f"one rank fails: {failed['one rank']}")
    tokens = config.total_batch_size
    print(f"{config.n_layer}L/{config.n_head}H/{config.n_embd}, T={config.sequence_length}, {tokens:,} tokens per "
          f"step, {config.dtype}, {os.cpu_count()} threads in all, torch {torch.__version__}")
    alone = statistics.median(seconds["one rank"])
    print(f"{'':>30} {'s per step':>10} {'tokens/s':>9} {'x one rank':>10} {'summing ms':>10} {'of it hidden':>12}")
    for side, taken in seconds.items():
        if not taken:
            print(f"{side:>30} fails: {failed[side]}")
            continue
        middle, profile = statistics.median(taken), profiles[side]
        hidden = f"{profile['reducing']:>10.1f} {profile['both'] / profile['reducing']:>12.0%}" if profile else ""
        print(f"{side:>30} {middle:>10.3f} {tokens / middle:>9,.0f} {alone / middle:>10.2f} {hidden}")
    print(json.dumps({"bench": "ddp", **vars(config), "seconds": seconds, "profiles": profiles, "failed": failed}))


if __name__ == "__main__":
    if "BENCH_DDP" in os.environ:
        run_command(train, json.loads(os.environ["BENCH_DDP"]))
    else:
        run_command(lambda: main(BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0]))))
