"""Measure fineweb.py against the usual recipe, from parquet to shards on the disk.

    python -m bench.tokenize

The corpus is text that is on any machine, the sources and docs of Python, its packages and the system, in a parquet
file laid out as FineWeb's are (snappy, row groups of 1,000). Three sides take turns, each in a process of its own:

    recipe    load_dataset, then a pool of two processes that tokenize with tiktoken, one document per call, while the
              parent fills shards. load_dataset first copies the corpus into a cache; the time for that is printed too
    fineweb   python fineweb.py
    read      the text column, read with pyarrow and dropped: the ceiling

The start-up of a side is the time it takes for a file of one document; its seconds are those on top. Times are medians
of the runs. The sides must write the same bytes.

What bounds fineweb.py on two cores: both are busy from the first batch to the last. Shares of a whole run, by perf:
gigatoken 38 %, the kernel 21 % (page faults, the page cache), Python 13 % (mostly imports), Arrow's reader 9 %, copying
7 %, sha256 6 %, numpy 2 %, tiktoken's checks 1 %. What helped: one tokenizer per thread instead of one for both (it
holds a lock), read buffers of a few MB instead of 12 (half the page faults), hashing while writing.
"""
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from plumbing import cli
from plumbing.cli import Positive, UserError, parse_flags, run_command
from plumbing.tokenizer import EOT, gpt2_encoding

ROOT = Path(__file__).resolve().parent.parent
SHARD_SIZE = 100_000_000  # tokens
FOLDERS = (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"], "/usr/share", "/usr/include", "/usr/lib")
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".html", ".h", ".hpp", ".c", ".pm", ".pl")


@dataclass(frozen=True)
class BenchConfig:
    """Settings of this bench; every field is a flag."""
    # Measurement
    megabytes: Positive = 800  # text in the corpus in MB, at most
    runs: Positive = 3  # runs of each side, in turn
    # Internal: how this script starts a side in a process of its own
    side: Literal["", "recipe", "read"] = ""  # side that this process runs
    corpus: str = ""  # parquet file that it reads
    out: str = ""  # folder that it writes to

    def __post_init__(self):
        cli.check_values(self)


def write_corpus(path: Path, megabytes: int) -> tuple[int, int]:
    """Write text files of this machine to a parquet file, in a fixed shuffled order -> (documents, bytes)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = sorted(path for folder in FOLDERS for path in Path(folder).rglob("*") if path.suffix in SUFFIXES)
    random.Random(0).shuffle(found)
    texts, size = [], 0
    for file in found:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if size < megabytes * 10**6 and 200 < len(text) < 10**6 and not file.is_symlink():
            texts.append(text)
            size += len(text.encode())
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000)
    pq.write_table(pa.table({"text": texts[:1]}), path.with_name("one.parquet"))
    return len(texts), size


def tokenize(row: dict) -> np.ndarray:
    """Return the tokens of a row's text, as each process of the recipe's pool makes them."""
    tokens = np.array([EOT, *gpt2_encoding().encode_ordinary(row["text"])])
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def recipe(corpus: Path, out: Path) -> None:
    """Run the usual recipe."""
    import datasets

    started = time.perf_counter()
    datasets.disable_progress_bars()
    rows = datasets.load_dataset("parquet", data_files=str(corpus), split="train", cache_dir=str(out / "cache"))
    (out / "copied").write_text(str(time.perf_counter() - started))
    shard, filled, number = np.empty(SHARD_SIZE, np.uint16), 0, 0
    with multiprocessing.Pool(2) as pool:
        for tokens in pool.imap(tokenize, rows, chunksize=16):
            while filled + len(tokens) >= SHARD_SIZE:
                room = SHARD_SIZE - filled
                shard[filled:] = tokens[:room]
                np.save(out / f"{number:06d}.npy", shard)
                tokens, filled, number = tokens[room:], 0, number + 1
            shard[filled:filled + len(tokens)] = tokens
            filled += len(tokens)
    if filled:
        np.save(out / f"{number:06d}.npy", shard[:filled])


def read(corpus: Path) -> None:
    """Read the text column and drop it."""
    import pyarrow.parquet as pq

    for _ in pq.ParquetFile(corpus).iter_batches(columns=["text"], batch_size=1000):
        pass


def seconds(side: str, corpus: Path, out: Path) -> float:
    """Return how long a side takes on a corpus, in a process of its own. Raises UserError if it fails."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if side == "fineweb":
        command = [sys.executable, str(ROOT / "fineweb.py"), "--source", str(corpus), "--out", str(out)]
    else:
        command = [sys.executable, "-m", "bench.tokenize", "--side", side, "--corpus", str(corpus), "--out", str(out)]
    os.sync()
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    taken = time.perf_counter() - started
    if done.returncode:
        raise UserError(f"{side} failed: {done.stderr.strip()[-500:]}")
    return taken


def measure(config: BenchConfig, folder: Path) -> dict:
    """Run the three sides in turn in this folder; return what the JSON line holds, but for what follows from it."""
    corpus = folder / "corpus.parquet"
    documents, size = write_corpus(corpus, config.megabytes)
    times, copied = {side: {"startup": [], "seconds": []} for side in ("recipe", "fineweb", "read")}, []
    for _ in range(config.runs):
        for side, taken in times.items():
            taken["startup"].append(seconds(side, folder / "one.parquet", folder / side))
            taken["seconds"].append(seconds(side, corpus, folder / side) - taken["startup"][-1])
        copied.append(float((folder / "recipe" / "copied").read_text()))
    ours, theirs = (sorted((folder / side).glob("*.npy"), key=lambda path: path.name[-10:])
                    for side in ("fineweb", "recipe"))
    return {"documents": documents, "bytes": size, "tokens": sum(np.load(path, mmap_mode="r").size for path in ours),
            "same_bytes": [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs],
            "times": times, "recipe_copy": copied}


def main(config: BenchConfig) -> None:
    """Print the table and one JSON line, or run one side. Raises UserError if the sides write different bytes."""
    if config.side == "recipe":
        return recipe(Path(config.corpus), Path(config.out))
    if config.side == "read":
        return read(Path(config.corpus))
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-") as folder:
        result = measure(config, Path(folder).resolve())
    size, tokens = result["bytes"], result["tokens"]
    middle = {side: {what: statistics.median(values) for what, values in taken.items()}
              for side, taken in result["times"].items()}
    print(f"{result['documents']:,} documents, {size / 1e6:,.0f} MB of text, {tokens:,} tokens; {os.cpu_count()} "
          f"cores; same bytes: {'yes' if result['same_bytes'] else 'NO'}")
    print(f"{'side':>8} {'start-up s':>11} {'seconds':>8} {'each run':>22} {'M tokens/s':>11} {'MB/s':>6} "
          f"{'x recipe':>9}")
    for side, taken in middle.items():
        runs = " ".join(f"{value:.2f}" for value in result["times"][side]["seconds"])
        print(f"{side:>8} {taken['startup']:>11.2f} {taken['seconds']:>8.2f} {runs:>22} "
              f"{tokens / taken['seconds'] / 1e6:>11.1f} {size / taken['seconds'] / 1e6:>6.0f} "
              f"{middle['recipe']['seconds'] / taken['seconds']:>9.1f}")
    ratio, share = (middle[side]["seconds"] / middle["fineweb"]["seconds"] for side in ("recipe", "read"))
    copy = statistics.median(result["recipe_copy"])
    without_copy = (middle["recipe"]["seconds"] - copy) / middle["fineweb"]["seconds"]
    print(f"fineweb.py: {ratio:.1f} times as fast as the usual recipe ({without_copy:.1f} times without the {copy:.2f} "
          f"s of its load_dataset), {share:.0%} of the speed of the bare read")
    print(json.dumps({"bench": "tokenize", **result, "times_recipe": ratio, "share_of_read": share}))
    if not result["same_bytes"]:
        raise UserError("fineweb.py and the recipe wrote different bytes")


if __name__ == "__main__":
    run_command(lambda: main(BenchConfig(**parse_flags(BenchConfig, sys.argv[1:], __doc__.splitlines()[0]))))
