"""FineWeb-Edu, or texts of your own, as GPT-2 tokens: edu_fineweb10B/edufineweb_{val,train}_{i:06d}.npy

    python fineweb.py                                        # sample-10BT: reads 28.5 GB, writes 19.9 GB
    python fineweb.py --source my_texts                      # my_texts_shards/my_texts_{val,train}_{i:06d}.npy
    python fineweb.py --download kjj0/finewebedu10B-gpt2     # or the 10B tokens ready-made, 20 GB
    python fineweb.py --verify                               # is every shard still what was written?

A document is the token 50256 (<|endoftext|>) followed by the GPT-2 tokens of its text. Documents follow one another
through the shards: .npy files of uint16 with `shard_size` tokens each, the last with what is left. Shard 0 is the
validation split, 1 % of texts that fill less than two. Rows whose text is null are left out, and with
--skip_bad_rows those that cannot be read.

Reading, tokenizing and writing overlap, in threads:

    files -- read_texts --> Texts -- encode_texts --> ids -- write_shards --> shards and manifest.json

After a kill at any moment, the same command continues after the last whole shard and ends with the same bytes.

    1. Settings    2. Texts -> ids -> shards    3. Shards and their manifest    4. Ready-made shards    5. The command
"""
if __name__ == "__main__":
    from plumbing.cli import end_quietly
    end_quietly()  # on Ctrl-C, while the libraries are imported

import contextlib
import dataclasses
import functools
import math
import os
import re
import shlex
import sys
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from plumbing import cli, resuming
from plumbing.cli import Positive, Range, UserError, check_values, explain, parse_flags, plural, print0, run_command
from plumbing.encode import encode_texts, make_encoder, warn_of_marks
from plumbing.files import DataError, lock, sha256
from plumbing.hub_files import list_bin_files, parse_dataset
from plumbing.manifest import NAME, Manifest, ShardWriter, is_begun_with, verify
from plumbing.network import patiently
from plumbing.outlook import FOLDER, Outlook, check_disk, print_finished, told_on_interrupt
from plumbing.progress import load_tqdm, progress_bar
from plumbing.resuming import Beginning, Position, check_source, join_pieces, list_source, next_position
from plumbing.shards import FINEWEB_EDU, open_shard
from plumbing.sources import File, is_fineweb_edu, name_of
from plumbing.texts import read_texts
from plumbing.threads import count_cores, in_background, map_in_order, prefetch
from plumbing.tokenizer import SHA256

MAX_THREADS = 8  # threads that tokenize, by default: the one thread that reads can feed no more
NODE_SHARDS = 10_000  # shard numbers that each node has for itself


# ---------------------------------------------------------------------------------------------------------------------
# 1. Settings
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class FineWebConfig:
    """The settings of one run. Every field is a flag, and its comment is the flag's help."""

    # Where the texts come from
    source: str = FINEWEB_EDU  # hub dataset OWNER/NAME[@REVISION][/PATH], file, folder, pattern (default: FineWeb-Edu)
    text_column: str = "text"  # column, or key of each JSON object, that holds the text; a.b for b in a
    skip_bad_rows: bool = False  # leave out rows that cannot be read, and count them
    retries: int = 8  # retries in a row after a network error, with waits of 1, 2, 4 ... 60 seconds

    # Where the tokens go
    out: str = ""  # folder for the shards (empty: edu_fineweb10B, or one named after another --source, NAME_shards)
    shard_size: Annotated[int, Range(1, 2**40 - 1)] = 100_000_000  # tokens per shard; shard 0 is the validation split
    max_tokens: Annotated[int, Range(0, 10**15)] = 0  # tokens to write, by all nodes together (0: every document)

    # Tokenizer, threads and machines
    tokenizer: Literal["gigatoken", "tiktoken"] = "gigatoken"  # tiktoken is the reference, but many times slower
    num_proc: int = 0  # threads that tokenize (0: one per core, at most 8)
    num_nodes: Positive = 1  # machines that share the work, each with its own --node_rank
    node_rank: int = 0  # number of this machine, from 0; it reads every num_nodes-th file

    # What to do instead
    download: str = ""  # ready-made .bin shards to fetch: hub dataset OWNER/NAME[@REVISION]
    verify: bool = False  # hash check of every shard in --out against its manifest

    def __post_init__(self):
        check_values(self)
        nodes = self.num_nodes
        if 0 < self.max_tokens < nodes:
            raise UserError(f"--max_tokens is {self.max_tokens}, it must be 0 or at least --num_nodes, {nodes}")
        if self.node_rank >= nodes:
            raise UserError(f"--node_rank is {self.node_rank}, it must be less than --num_nodes, {nodes}")
        if self.download and nodes > 1:
            raise UserError(f"--num_nodes is {nodes}, it must be 1 with --download")
        dataset = parse_dataset(self.download)
        if self.download and (dataset is None or dataset.folder):
            raise UserError(f"--download is {self.download!r}, it must be OWNER/NAME or OWNER/NAME@REVISION")
        object.__setattr__(self, "out", self.out or self.default_out)

    @property
    def default_out(self) -> str:
        """Return the folder that the shards go to if none is named."""
        if self.download or is_fineweb_edu(self.source) or is_begun_with(FOLDER, self.source):  # by an earlier version
            return FOLDER
        return f"{name_of(self.source)}_shards"

    @property
    def command(self) -> str:
        """Return the command line that gives these settings."""
        default = dataclasses.replace(FineWebConfig(), out=self.default_out)
        return shlex.join(["python", "fineweb.py", *cli.changed_flags(self, default)])

    @property
    def remedy(self) -> str:
        """Return what an error message advises if the network stays down."""
        return f"go on later with: {self.command}"

    @property
    def node_limit(self) -> float:
        """Return how many tokens this node writes: its share of --max_tokens, or infinity."""
        if not self.max_tokens:
            return math.inf
        begin, end = (self.max_tokens * rank // self.num_nodes for rank in (self.node_rank, self.node_rank + 1))
        return end - begin


# ---------------------------------------------------------------------------------------------------------------------
# 2. Texts -> ids -> shards
# ---------------------------------------------------------------------------------------------------------------------

def prepare(config: FineWebConfig, encode) -> None:
    """Write the shards that `config` describes, or those that are missing, and print a summary."""
    manifest = open_manifest(config, ("text_column", "shard_size", "max_tokens", "tokenizer"))
    files, commit = list_source(config, manifest)
    mine = files[config.node_rank::config.num_nodes]
    if not check_source(config, encode, mine, manifest):
        print_finished(config, manifest)
        return
    before, started = manifest.total("tokens"), time.perf_counter()
    outlook = Outlook(config, mine, manifest)
    left = None if outlook.expected is None else 2 * (outlook.expected - before)
    check_disk(config, left, f"{len(mine)} {plural(len(mine), 'file')} of {config.source}", begun=before > 0)
    manifest.begin(manifest.values | {"source": config.source, "revision": commit, "tokenizer_sha256": SHA256,
                                      "files": [file.record for file in files],
                                      "tokenizer_version": version(config.tokenizer)})
    try:
        skipped = tokenize(config, encode, mine, manifest, outlook)
        if not manifest.shards:
            raise UserError(f"there is no text in {config.source}")
        if config.num_nodes == 1 and manifest.share_is_too_large():
            print0(f"{config.source} fills less than two shards: writing them again, with 1 % for validation")
            manifest.begin_again(val_tokens=resuming.validation_share(manifest.total("tokens")))
            skipped = tokenize(config, encode, mine, manifest, Outlook(config, mine, manifest))
    except BaseException:
        manifest.drop_if_empty()
        raise
    manifest.finish(skipped_rows=skipped)
    print_finished(config, manifest, before, time.perf_counter() - started)


def tokenize(config: FineWebConfig, encode, files: list[File], manifest: Manifest, outlook: Outlook) -> int:
    """Read, tokenize and write the files, from where the manifest ends, with a progress bar.

    Returns how many rows have been skipped, in earlier runs too.
    """
    names, stop, found = [file.path for file in files], threading.Event(), []
    start = next_position(manifest)
    texts = read_texts(names, config.text_column, (start.file, start.row), config.skip_bad_rows,
                       (config.retries, config.remedy), stop)
    ids = map_in_order(functools.partial(encode_texts, encode=encode, files=names), prefetch(texts, stop),
                       config.num_proc or min(count_cores(), MAX_THREADS))
    with contextlib.closing(ids), progress_bar(outlook.expected, manifest.total("tokens"), "tok") as bar:

        def report(tokens: int, documents: int, shards: int, piece) -> None:
            bar.set_postfix_str(f"{shards} {plural(shards, 'shard')}, {documents:,} {plural(documents, 'document')}",
                                refresh=False)
            outlook.move(bar, tokens, piece.file, piece.share)

        try:
            skipped = write_shards(join_pieces(ids, manifest, found), config, manifest, report)
            bar.total = bar.n  # all of it
            return skipped
        finally:
            warn_of_marks(np.sum(found, axis=0), config.source)


def write_shards(stream, config: FineWebConfig, manifest: Manifest, report) -> int:
    """Write Tokens as shards, up to the node's limit, and add each to the manifest. Returns the number of skipped rows.

    "next" in a shard's record is the Position at which the following shard begins. Calls report(tokens, documents,
    shards, piece) with the numbers so far, which include earlier runs.
    """
    written, documents, number = manifest.total("tokens"), manifest.total("documents"), len(manifest.shards)
    limit, start, beginning = config.node_limit, next_position(manifest), Beginning(config.shard_size)
    i = start.offset  # tokens of the first document that an earlier run has written
    shard, finishing, skipped = None, Future(), (manifest.shards or [{}])[-1].get("skipped", 0)
    finishing.set_result(None)
    record = {}  # of the shard

    def finish(shard: ShardWriter, record: dict) -> None:
        manifest.add(shard.finish() | record)

    with ThreadPoolExecutor(1) as disk:  # finishes one shard while the next one is filled
        try:
            for piece in stream:
                first = (*piece.starts[1:2].tolist(), len(piece.tokens))[0]  # tokens of the first document
                if i and (piece.rows[:1].tolist() != [start.row] or i > first - 1):
                    raise UserError(f"{config.source} is not what {config.out} was begun with: choose another --out")
                skipped = piece.skipped + len(piece.bad)
                beginning.add(piece)
                while i < len(piece.tokens) and written < limit:
                    if shard and shard.tokens == shard.size:  # and others follow
                        finishing.result()  # waits for the shard before
                        finishing, shard = disk.submit(finish, shard, record), None
                    if shard is None:
                        size = config.shard_size if number else manifest.values.get("val_tokens", config.shard_size)
                        shard = ShardWriter(Path(config.out) / shard_name(config, manifest, number), size)
                        number += 1
                    end = min(len(piece.tokens), i + shard.size - shard.tokens, i + limit - written)
                    begun = int(np.diff(np.searchsorted(piece.starts, [i, end]))[0])
                    shard.write(piece.tokens[i:end], begun)
                    i, written, documents = end, written + end - i, documents + begun
                    record = piece.record(i)
                report(written, documents, number, piece)
                if written == limit:
                    break
                i = 0
            finishing.result()
            if shard and written < limit:
                record = {"next": Position(piece.file + 1, 0, 0), "skipped": skipped, "file_tokens": 0}
            if shard and config.node_rank == 0 and number == 1 and shard.tokens > 1:
                shard = set_apart(shard, config, manifest, beginning)
            if shard:
                finish(shard, record)
        finally:
            if shard is not None:
                shard.abandon()
    return manifest.shards[-1].get("skipped", 0) if written == limit else skipped


def set_apart(shard: ShardWriter, config: FineWebConfig, manifest: Manifest, beginning: Beginning) -> ShardWriter:
    """Finish the only shard with a share of its tokens, for validation, and return another with the rest.

    A kill in between leaves the validation shard, after which the same command goes on.
    """
    count, documents, record = beginning.cut(shard.tokens)
    rest = ShardWriter(Path(config.out) / shard_name(config, manifest, 1), config.shard_size)
    try:
        shard.give(count, documents, rest)
        manifest.add(shard.finish() | record)
    except BaseException:
        rest.abandon()
        raise
    return rest


# ---------------------------------------------------------------------------------------------------------------------
# 3. Shards and their manifest
# ---------------------------------------------------------------------------------------------------------------------

def shard_name(config: FineWebConfig, manifest: Manifest, k: int) -> str:
    """Return the file name of this node's k-th shard. A folder that was begun goes on with the names that it has."""
    if config.num_nodes > 1 and k >= NODE_SHARDS:
        raise UserError(f"a node has numbers for {NODE_SHARDS:,} shards: choose a larger --shard_size, another --out")
    split = "val" if config.node_rank == k == 0 else "train"
    return f"{manifest.prefix}_{split}_{config.node_rank * NODE_SHARDS + k:06d}.npy"


def first_names(config: FineWebConfig) -> list[str]:
    """Return the names that this node's first shard has or, if an earlier version has begun the folder, may have."""
    split = "train" if config.node_rank else "val"
    return [f"{prefix}_{split}_{config.node_rank * NODE_SHARDS:06d}.npy" for prefix in (
        name_of(config.source), "edufineweb")]


def open_manifest(config: FineWebConfig, settings: tuple[str, ...]) -> Manifest:
    """Open this node's manifest of --out, or begin one with these settings.

    Raises DataError if the folder was made with other settings, and UserError if it holds shards without a manifest.
    """
    node = f"_{config.node_rank}_of_{config.num_nodes}" if config.num_nodes > 1 else ""
    manifest = Manifest(config.out, node)
    values = {name: getattr(config, name) for name in (*settings, "node_rank", "num_nodes")}
    manifest.require(values)
    for name in manifest.missing[:1]:
        print(f"warning: {Path(config.out) / name} is missing or cut off: going on from there", file=sys.stderr,
              flush=True)
    others = [shard["name"] for record in manifest.others() for shard in record["shards"]]
    prefixes = [manifest.prefix, *(match[1] for match in map(NAME.fullmatch, others) if match)]
    manifest.prefix = next(filter(None, prefixes), name_of(config.source))
    if not manifest.values:
        mine = range(config.node_rank * NODE_SHARDS, (config.node_rank + 1) * NODE_SHARDS)
        for path in sorted([*Path(config.out).glob("*.npy"), *Path(config.out).glob("*.bin")]):
            if manifest.progress.exists() and path.name in first_names(config):
                manifest.prefix = NAME.fullmatch(path.name)[1]
                continue  # a kill came before it was recorded: it is written again
            number = re.search(r"_(\d{6})\.npy$", path.name)
            if config.num_nodes == 1 or not number or int(number[1]) in mine:
                raise UserError(f"{path} is there and no manifest says what it is: choose another --out, or delete it")
    manifest.values = values | manifest.values
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# 4. Ready-made shards
# ---------------------------------------------------------------------------------------------------------------------

def download(config: FineWebConfig) -> None:
    """Fetch ready-made .bin shards from a dataset on the hub and compare each with the hub's hash of it.

    The validation split comes first, then as many whole shards as --max_tokens needs.
    """
    from huggingface_hub import snapshot_download

    manifest = open_manifest(config, ("download", "max_tokens"))
    if manifest.complete:
        print_finished(config, manifest)
        return
    dataset = parse_dataset(config.download)
    dataset = dataset._replace(revision=manifest.values.get("revision") or dataset.revision)
    entries, commit = patiently(functools.partial(list_bin_files, dataset),
                                f"list {config.download} on the Hugging Face hub", config.retries, config.remedy)
    wanted = choose_shards(config, entries)
    missing = sum(shard["bytes"] for shard in wanted if not manifest.is_whole(shard))
    check_disk(config, missing, f"{len(wanted)} {plural(len(wanted), 'shard')} of {config.download}")
    manifest.begin(manifest.values | {"revision": commit})
    fetch = functools.partial(snapshot_download, dataset.repository, repo_type="dataset", revision=commit,
                              local_dir=config.out, allow_patterns=[shard["name"] for shard in wanted],
                              tqdm_class=load_tqdm())
    try:
        patiently(functools.partial(in_background, fetch), f"download {config.download}", config.retries, config.remedy)
    except BaseException:
        manifest.drop_if_empty()
        raise
    with progress_bar(sum(shard["bytes"] for shard in wanted), 0, "B") as bar:
        for shard in wanted:
            path = Path(config.out) / shard["name"]
            if sha256(path) != shard["sha256"]:
                path.unlink()
                raise UserError(f"{path} arrived damaged and was deleted: fetch it again with: {config.command}")
            open_shard(path)
            bar.update(shard["bytes"])
    manifest.shards = wanted
    manifest.finish()
    print_finished(config, manifest)


def choose_shards(config: FineWebConfig, entries: list) -> list[dict]:
    """Return the manifest's records of the shards to fetch. `entries` are the .bin files on the hub."""
    wanted = []
    for entry in sorted(entries, key=lambda entry: ("val" not in entry.path, entry.path)):
        if not config.max_tokens or sum(shard["tokens"] for shard in wanted) < config.max_tokens:
            if entry.lfs is None:
                raise UserError(f"the hub has no sha256 of {entry.path} in {config.download}, so it cannot be trusted")
            wanted.append({"name": entry.path, "documents": 0, "tokens": (entry.size - 1024) // 2, "bytes": entry.size,
                           "sha256": entry.lfs.sha256})
    if not wanted:
        raise UserError(f"there are no .bin shards in {config.download}")
    return wanted


# ---------------------------------------------------------------------------------------------------------------------
# 5. The command
# ---------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def output_folder(config: FineWebConfig):
    """Create --out and keep other processes from writing the same shards.

    An OSError, such as that of a full disk, becomes a UserError with the command that continues.
    """
    name = f".lock{config.node_rank}"
    with lock(config.out, "another fineweb.py is writing to", "choose another --out", name):
        try:
            with told_on_interrupt(config):
                yield
        except DataError:
            raise
        except OSError as error:
            raise UserError(f"{explain(error)}; the whole shards in {config.out} are kept, {config.remedy}") from error


def verify_shards(config: FineWebConfig) -> None:
    """Hash every shard in --out and compare it with the manifest."""
    found = [path for path in Path(config.out).glob("*") if path.suffix in (".npy", ".bin")]
    with progress_bar(sum(path.stat().st_size for path in found), 0, "B") as bar:
        shards, tokens = verify(config.out, bar.update)
    print(f"verified: {shards} {plural(shards, 'shard')}, {tokens:,} tokens, all as they were written")


def main(argv: list[str]) -> None:
    """Run the command with these flags."""
    config = FineWebConfig(**parse_flags(FineWebConfig, argv, "Prepare token shards for train_gpt2.py: FineWeb-Edu's "
                                         "10 billion tokens, if no flags are given. The same command again continues."))
    if config.verify:
        verify_shards(config)
    elif config.download:
        config = dataclasses.replace(config, download=parse_dataset(config.download).name)
        with output_folder(config):
            download(config)
    else:
        encode, tokenizer = make_encoder(config.tokenizer)
        config = dataclasses.replace(config, tokenizer=tokenizer)
        with output_folder(config):
            prepare(config, encode)


if __name__ == "__main__":
    code = 0
    try:
        run_command(main, sys.argv[1:])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # not sys.exit: an Arrow thread may hold a Python file, and Python would wait for it for ever
