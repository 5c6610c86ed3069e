"""Does announcing the next step's windows help, and what does it cost? `python bench/readahead.py`

Shuffled windows of a few shards are read as training reads them, with a pause for the computing between micro-batches,
from a cold page cache (the shards are dropped from it first) and from a warm one, with and without
DataLoaderLite.announce(). Each of the four sides reads the same windows. Medians of the steps but the first.
"""
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.cli import UserError, parse_flags, run_command
from train_gpt2 import DataLoaderLite


@dataclass
class BenchConfig:
    """Every field is a flag."""

    shards: int = 4  # of 100 million tokens each
    steps: int = 12  # optimizer steps of each side, the first not counted
    micro_batch_size: int = 64  # windows
    grad_accum_steps: int = 8  # micro-steps per optimizer step
    sequence_length: int = 1024  # tokens per window
    compute_ms: float = 120.0  # pause after each micro-batch: what a GPU takes for it
    folder: str = ""  # where the shards are written for the time being (empty: the temporary folder)


def write_shards(folder: str, count: int) -> None:
    """Random tokens, on the disk when this returns."""
    generator = np.random.default_rng(0)
    for i in range(count + 1):
        with open(Path(folder) / f"{'val' if i == 0 else 'train'}_{i:03d}.npy", "wb") as file:
            np.save(file, generator.integers(0, 50257, 10_000 if i == 0 else 100_000_000, dtype=np.uint16))
            file.flush()
            os.fsync(file.fileno())


def empty_cache(folder: str) -> None:
    """Drop the shards from the page cache, which keeps what is mapped."""
    gc.collect()  # the last side's loader, a reference cycle, still maps them
    for path in Path(folder).glob("*.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_steps(config: BenchConfig, folder: str, announced: bool) -> tuple[list[float], list[float], int]:
    """(seconds waited for data, seconds spent announcing) per step, and a checksum of the tokens."""
    loader = DataLoaderLite(folder, "train", config.micro_batch_size, config.sequence_length)
    waited, announcing, checksum = [], [], 0
    for _ in range(config.steps):
        for _ in range(config.grad_accum_steps):
            x, _ = loader.next_batch()
            checksum = (checksum * 31 + int(x.long().sum())) % 2**61
            time.sleep(config.compute_ms / 1000)
        waited.append(loader.take_seconds())
        began = time.perf_counter()
        if announced:
            loader.announce(config.grad_accum_steps)
        announcing.append(time.perf_counter() - began)
    return waited[1:], announcing[1:], checksum


def main(config: BenchConfig) -> None:
    """Print a table and one JSON line."""
    if not hasattr(os, "posix_fadvise"):
        raise UserError("this needs posix_fadvise, which Linux has")
    rows, checksums = [], set()
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        write_shards(folder, config.shards)
        windows = config.micro_batch_size * config.grad_accum_steps
        print(f"{windows} windows of {config.sequence_length} tokens per step, {config.compute_ms:g} ms after each "
              f"{config.micro_batch_size}; per step:")
        print(f"{'cache':>6} {'announced':>9} {'waited for data ms':>18} {'announcing ms':>13}")
        for cache in ("cold", "warm"):
            for announced in (False, True):
                if cache == "cold":
                    empty_cache(folder)
                waited, announcing, checksum = read_steps(config, folder, announced)
                checksums.add(checksum)
                row = {"cache": cache, "announced": announced, "waited_ms": 1000 * statistics.median(waited),
                       "announcing_ms": 1000 * statistics.median(announcing)}
                rows.append(row)
                print(f"{cache:>6} {'yes' if announced else 'no':>9} {row['waited_ms']:>18.1f} "
                      f"{row['announcing_ms']:>13.2f}", flush=True)
    print("the tokens were the same on all sides" if len(checksums) == 1 else "THE TOKENS DIFFER")
    print(json.dumps({"bench": "readahead", **vars(config), "rows": rows}))


if __name__ == "__main__":
    run_command(main, BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0])))
