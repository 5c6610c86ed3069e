"""Measure what it brings, and costs, to prefetch the next step's sequences from the disk.

    python -m bench.readahead

Shuffled sequences of a few shards are read as training reads them, with a pause for the computing between
micro-batches: with a cold page cache (the shards are dropped from it first) and a warm one, each with and without
shards.read_ahead(). All four sides read the same sequences. Times are medians over all steps but the first.
"""
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing import cli, shards
from plumbing.cli import Positive, UserError, parse_flags, run_command
from plumbing.ranks import World
from plumbing.tokenizer import VOCAB_SIZE
from train_gpt2 import DataLoaderLite, TrainConfig


@dataclass(frozen=True)
class BenchConfig:
    """Settings of this bench; every field is a flag."""
    # Data
    shards: Positive = 4  # shards of 100 million tokens each
    folder: str = ""  # folder for the shards while the bench runs (empty: the system's temporary folder)
    # Training
    steps: Positive = 12  # optimizer steps of each side; the first is not timed
    micro_batch_size: Positive = 64  # sequences per micro-batch
    grad_accum_steps: Positive = 8  # micro-steps per optimizer step
    sequence_length: Positive = 1024  # tokens per sequence
    compute_ms: float = 120.0  # pause after each micro-batch, the time that a GPU takes for it

    def __post_init__(self):
        cli.check_values(self)
        cli.require(self, "steps", self.steps > 1, "more than 1")


def write_shards(folder: str, count: int) -> None:
    """Write shards of random tokens, and wait until they are on the disk."""
    generator = np.random.default_rng(0)
    for i in range(count + 1):
        with open(Path(folder) / f"{'val' if i == 0 else 'train'}_{i:03d}.npy", "wb") as file:
            tokens = 10_000 if i == 0 else 100_000_000
            np.save(file, generator.integers(0, VOCAB_SIZE, tokens, dtype=np.uint16))
            file.flush()
            os.fsync(file.fileno())


def empty_cache(folder: str) -> None:
    """Drop the shards from the page cache, which keeps what is still mapped."""
    gc.collect()  # the last side's loader, a reference cycle, still maps them
    for path in Path(folder).glob("*.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_steps(config: BenchConfig, folder: str, prefetches: bool) -> tuple[list[float], list[float], int]:
    """Read all steps -> the seconds waited for data and spent prefetching, per step, and a checksum of the tokens."""
    settings = TrainConfig(data=folder, micro_batch_size=config.micro_batch_size,
                           sequence_length=config.sequence_length)
    loader, n = DataLoaderLite(settings, "train", World()), config.grad_accum_steps
    waited, prefetching, checksum = [], [], 0
    for step in range(config.steps):
        waited.append(0.0)
        for i in range(step * n, (step + 1) * n):
            started = time.perf_counter()
            x, _ = loader.batch(i)
            waited[-1] += time.perf_counter() - started
            checksum = (checksum * 31 + int(x.sum())) % 2**61
            time.sleep(config.compute_ms / 1000)
        started = time.perf_counter()
        if prefetches:
            shards.read_ahead(loader, (step + 1) * n, n)
        prefetching.append(time.perf_counter() - started)
    return waited[1:], prefetching[1:], checksum


def main(config: BenchConfig) -> None:
    """Print the table and one JSON line. Raises UserError if the sides read different tokens."""
    if not hasattr(os, "posix_fadvise"):
        raise UserError("this needs posix_fadvise, which Linux has")
    rows, checksums = [], set()
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        write_shards(folder, config.shards)
        sequences = config.micro_batch_size * config.grad_accum_steps
        print(f"{sequences} sequences of {config.sequence_length} tokens per step, {config.compute_ms:g} ms after each "
              f"{config.micro_batch_size}; per step:")
        print(f"{'cache':>6} {'prefetch':>9} {'waited for data ms':>18} {'prefetching ms':>14}")
        for cache in ("cold", "warm"):
            for prefetches in (False, True):
                if cache == "cold":
                    empty_cache(folder)
                waited, prefetching, checksum = read_steps(config, folder, prefetches)
                checksums.add(checksum)
                row = {"cache": cache, "prefetch": prefetches, "waited_ms": 1000 * statistics.median(waited),
                       "prefetching_ms": 1000 * statistics.median(prefetching)}
                rows.append(row)
                print(f"{cache:>6} {'yes' if prefetches else 'no':>9} {row['waited_ms']:>18.1f} "
                      f"{row['prefetching_ms']:>14.2f}", flush=True)
    print(json.dumps({"bench": "readahead", **vars(config), "rows": rows}))
    if len(checksums) > 1:
        raise UserError("the sides read different tokens")


if __name__ == "__main__":
    run_command(lambda: main(BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0]))))
