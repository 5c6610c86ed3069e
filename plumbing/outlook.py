"""What fineweb.py says: how much there is to do, how far it is, what has come of it, and how to go on.

    Outlook(config, files, manifest)         how many tokens the files will give, by what has been read of them
    check_disk(config, tokens, what)         says how much will be written, if there is room for it
    told_on_interrupt(config)                a context in which Ctrl-C says that the same command goes on
    print_finished(config, manifest)         the totals, and the command that trains

`config` is a FineWebConfig of fineweb.py.
"""
import contextlib
import itertools
import math
import shlex
import shutil
import sys
from pathlib import Path

from plumbing.cli import UserError, plural, print0
from plumbing.manifest import Manifest
from plumbing.resuming import next_position
from plumbing.sources import File, estimate_tokens

FOLDER = "edu_fineweb10B"  # for FineWeb-Edu, where train_gpt2.py looks for it
FEW = 100_000_000  # tokens: with fewer, the small model of --preset demo makes sense
TOO_FEW = 2 * (64 + 1)  # tokens: a window of the demo's for each split
BY_HEART = 1_000_000  # tokens: with fewer, a model learns them by heart


class Outlook:
    """The expected number of tokens: the usual ones per byte, scaled by what the files so far have given."""

    def __init__(self, config, files: list[File], manifest: Manifest):
        self.limit = config.node_limit
        self.usual = [0, *itertools.accumulate(estimate_tokens([file]) for file in files)]  # before each file
        before, position = manifest.total("tokens"), next_position(manifest)
        part = (manifest.shards or [{}])[-1].get("file_tokens") or 0  # of a file that was read in part
        self.file, self.whole, self.tokens = position.file, before - part, before
        self.expected = self.scale(self.whole, self.usual[min(self.file, len(files))])
        if self.expected is None and before <= 0.9 * self.usual[-1]:  # otherwise there is evidently more than usual
            self.expected = self.usual[-1]
        if self.expected is None and self.limit < math.inf:
            self.expected = self.limit
        elif self.expected is not None:  # something is left as long as a file is
            least = before / 0.99 if position.file < len(files) else before
            self.expected = round(min(self.limit, max(self.expected, least)))
        self.shown = before / self.expected if self.expected else 0.0  # of a bar, which never falls

    def scale(self, tokens: float, usual: float) -> float | None:
        """Return how many tokens all files will have if those that usually have `usual` had `tokens`."""
        return tokens * self.usual[-1] / usual if usual and tokens else None

    def move(self, bar, tokens: int, file: int, share: float | None) -> None:
        """Move a bar to `tokens`, of which the last are of file number `file`; `share` of that one has been read.

        It shows less than 100 % while there may be more, and never less than before.
        """
        if file > self.file:
            self.file, self.whole = file, self.tokens
        self.tokens = tokens
        begin, end = self.usual[file:file + 2]
        measured = self.scale(self.whole, begin) if share is None else self.scale(
            tokens, begin + share * (end - begin))
        expected = measured or bar.total
        if expected:
            total = max(min(self.limit, expected), tokens / 0.99 if tokens < self.limit else tokens)
            total = math.ceil(total)
            bar.total = min(total, int(tokens / self.shown)) if self.shown else total
            self.shown = tokens / max(1, bar.total)
        bar.update(tokens - bar.n)


def describe_bytes(count: float) -> str:
    """Format a number of bytes in the unit that suits it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:,.0f} {unit}" if count >= 999.5 * size else f"{count / size:.3g} {unit}"
    return f"{count:,.0f} bytes"


def check_disk(config, needed: float | None, what: str, begun: bool = False) -> None:
    """Print how many bytes will be written, None if unknown. Raises UserError if the disk has less room than that."""
    free = shutil.disk_usage(config.out).free
    amount = "an unknown amount" if needed is None else f"about {describe_bytes(needed)}" if needed else "nothing"
    print0(f"{what}: {amount} {'left ' if begun else ''}to write to {config.out}, {describe_bytes(free)} free there")
    if needed and needed > free:
        raise UserError(f"{config.out} needs {describe_bytes(needed)} and its disk has {describe_bytes(free)} free: "
                        "make room, name another --out, or take less with --max_tokens")


@contextlib.contextmanager
def told_on_interrupt(config):
    """Say on Ctrl-C and SIGTERM what is kept, and that the same command goes on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        kept = sum(path.suffix in (".npy", ".bin") for path in Path(config.out).glob("*"))
        fate = "the whole shards are kept" if kept else "no shard was whole yet"
        with contextlib.suppress(OSError):
            print(f"\nstopped: {fate}; the same command {'goes on' if kept else 'begins again'}: {config.command}",
                  file=sys.stderr, flush=True)
        raise


def print_finished(config, manifest: Manifest, before: int = 0, seconds: float = 0) -> None:
    """Print what the folder holds, how fast this run wrote all but `before` tokens of it, and what to do with it."""
    tokens, documents, shards = manifest.total("tokens"), manifest.total("documents"), len(manifest.shards)
    line = f"finished: {tokens:,} tokens" + (f" of {documents:,} {plural(documents, 'document')}" if documents else "")
    line += f" in {shards} {plural(shards, 'shard')} in {config.out}"
    if skipped := manifest.values.get("skipped_rows"):
        line += f" ({skipped:,} bad {plural(skipped, 'row')} skipped)"
    if tokens > before and seconds:
        line += f"; {tokens - before:,} of them now, in {seconds:.1f} s: {(tokens - before) / seconds:,.0f} tokens/s"
    print0(line)
    out = shlex.quote(str(config.out))
    if config.num_nodes > 1:
        print0(f"when all {config.num_nodes} nodes have finished: python fineweb.py --verify --out {out}")
        return
    warn_of_size(config, manifest.shards, tokens)
    if tokens >= TOO_FEW and shards > 1:
        print0(f"train on it: {training_command(config, tokens)}")


def training_command(config, tokens: int) -> str:
    """Return the command that trains on the shards in --out."""
    words = ["python", "train_gpt2.py"]
    if config.out != FOLDER or tokens < FEW:
        words += ["--data", str(config.out)]
    if tokens < FEW:
        words += ["--preset", "demo"]
    return shlex.join(words)


def warn_of_size(config, shards: list[dict], tokens: int) -> None:
    """Say what so few tokens are good for, or that too many of them are in the validation split."""
    message, first = "", shards[0]["tokens"]
    if config.download:
        message = "" if len(shards) > 1 else "warning: the only shard is for validation: fetch more with --max_tokens"
    elif tokens < TOO_FEW:
        message = (f"warning: only {tokens:,} {plural(tokens, 'token')}, too few to train on: add texts to "
                   f"{config.source}")
    elif len(shards) == 1 or (first > tokens / 4 and first == config.shard_size):
        what = "all" if len(shards) == 1 else f"{first:,} of {tokens:,} tokens"
        message = (f"warning: {what} are in the validation split: to train on more, name another --out and "
                   f"--shard_size {max(1, tokens // 10)}")
    elif tokens < BY_HEART:
        message = (f"note: {tokens:,} tokens are few: good for trying things out, as a model soon knows them by heart; "
                   "it learns to write from some millions on")
    if message:
        print(message, file=sys.stderr, flush=True)
