"""FineWeb-Edu, or texts of your own, as token shards: edu_fineweb10B/edufineweb_{val,train}_{i:06d}.npy

    python fineweb.py                                        # sample-10BT: reads 28.5 GB, writes 19.9 GB
    python fineweb.py --source my_texts --max_tokens 2_000_000 --shard_size 500_000 --out my_shards
    python fineweb.py --download kjj0/finewebedu10B-gpt2     # or the 10B tokens ready-made, 20 GB
    python fineweb.py --verify                               # is every shard still what was written?

A document is 50256 (<|endoftext|>) and the GPT-2 tokens of its text; one follows the other through the shards, .npy
files of uint16 with `shard_size` tokens, the last with what is left. Shard 0 is the validation split. Rows with null
for a text are left out.

Reading, tokenizing and writing overlap, in threads:

    files -- read_texts --> Texts -- encode_texts --> ids -- write_shards --> shards and manifest.json

Killed at any moment, the same command goes on after the last whole shard and ends with the same bytes.
"""
import contextlib
import functools
import glob
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
import traceback
from base64 import b64encode
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np

from plumbing.cli import UserError, explain, parse_flags, plural, print0, run_command
from plumbing.files import DataError, sha256
from plumbing.network import patiently, progress_bar, wait_or_give_up
from plumbing.shards import FINEWEB_EDU, Manifest, ShardWriter, open_shard, verify
from plumbing.tokenizer import EOT, SHA256, gpt2_encoding

TOKENS_PER_BYTE = {".parquet": 0.35, ".jsonl": 0.22, ".gz": 0.6, ".zst": 0.6}  # of files, about
ROWS = 250  # of a file, read and tokenized at once: buffers of a few MB are used again, larger ones cost page faults
PIECE_BYTES = 4 << 20  # of text at most, but for longer documents
ENOUGH = 8  # threads that tokenize: as many as one that reads can feed
MEMORY_LIMIT = 2 << 30  # bytes in use at which gigatoken is made to forget the words it has seen,
CACHE_BYTES = 64 << 20  # those of more than so many bytes of text
CHECK_EVERY = 1000  # rows: the first of them is compared with tiktoken
NODE_SHARDS = 10_000  # numbers that a node has for its shards
ENDING = threading.Event()  # wakes a thread that waits for the network when nobody waits for the thread
HUB = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-]+))?(/(?P<folder>.*))?")
TRICKY = ("", " ", "\0", "a", "Hello world", "don't WE'LL I'm it's", "<|endoftext|> is text", " two\n\n\n  three \t",
          "0123456789 3.14 1e-5 \u00bd \u0663", "na\u00efve \u00c4\u00d6\u00dc \u00df", "\u4f60\u597d\u4e16\u754c",
          "\U0001f642 \U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea", "e\u0301 \u200b\u2028\u00a0\ufeff", "x" * 999)


@dataclass
class FineWebConfig:
    """What a run of this script does: every field is a flag."""

    source: str = FINEWEB_EDU  # OWNER/NAME[@REVISION][/FOLDER] on the hub; or a local file, folder or quoted pattern
    text_column: str = "text"  # column, or key in each JSON line, that holds the text
    out: str = "edu_fineweb10B"  # folder for the shards
    shard_size: int = 100_000_000  # tokens a shard; the first shard is the validation split
    max_tokens: int = 0  # tokens to write in all, by all nodes together; 0: every document
    tokenizer: str = "gigatoken"  # gigatoken, or tiktoken: the reference, many times slower
    num_proc: int = 0  # threads that tokenize; 0: one a core, at most 8, which is what one reader feeds
    node_rank: int = 0  # which of several machines this is: it takes every num_nodes-th file
    num_nodes: int = 1  # machines that share the work, each with its own --node_rank
    retries: int = 8  # times in a row that a failing network is asked again, after 1, 2, 4 ... 60 seconds
    download: str = ""  # instead: OWNER/NAME[@REVISION] on the hub, ready-made .bin shards to fetch
    verify: bool = False  # instead: hash every shard in --out and compare with its manifest

    @property
    def command(self) -> str:
        """The command line that these settings come from."""
        changed = [(field, getattr(self, field.name)) for field in fields(self)]
        words = ([f"--{field.name}", str(value)] for field, value in changed if value != field.default)
        return shlex.join(["python", "fineweb.py", *itertools.chain.from_iterable(words)])

    @property
    def remedy(self) -> str:
        """What to do where the network stays away."""
        return f"go on later with: {self.command}"


class Position(NamedTuple):
    """A place in the stream of tokens: token `offset` of the document in row `row` of file number `file`."""

    file: int
    row: int
    offset: int


class Texts(NamedTuple):
    """Consecutive rows of a file."""

    file: int
    end: int  # the row after the last
    rows: np.ndarray  # (documents,) the row of each that has a text
    texts: object  # pyarrow.LargeStringArray, (documents,)


class Tokens(NamedTuple):
    """The same rows as tokens."""

    file: int
    end: int
    rows: np.ndarray
    starts: np.ndarray  # (documents,) where in `tokens` each begins, with EOT
    tokens: np.ndarray  # uint16

    def position(self, i: int) -> Position:
        """Where token i of these is in the source; i = len(tokens): what follows them."""
        if i == len(self.tokens):
            return Position(self.file, self.end, 0)
        document = int(np.searchsorted(self.starts, i, side="right")) - 1
        return Position(self.file, int(self.rows[document]), i - int(self.starts[document]))


# ---------------------------------------------------------------------------------------------------------------------
# 1. Reading: files -> Texts
# ---------------------------------------------------------------------------------------------------------------------

def find_files(config: FineWebConfig) -> tuple[list[list], str | None]:
    """([[file, bytes], ...] in the order they are read, commit or None): all the data files that --source names.

    Files on the hub are hf:// addresses with the commit in them. UserError where there are none.
    """
    source, hub = Path(config.source), HUB.fullmatch(config.source)
    if source.exists() or not hub or is_data(hub["repository"]):
        paths = source.rglob("[!.]*") if source.is_dir() else map(Path, glob.glob(config.source, recursive=True))
        paths = [source] if source.is_file() else paths  # its name may look like a pattern
        once = {path.resolve(): path for path in sorted(paths) if path.is_file() and not is_hidden(path, source)}
        found, commit = [[path.as_posix(), path.stat().st_size] for path in once.values()], None
    else:
        listing = functools.partial(list_hub, **hub.groupdict())
        found, commit = patiently(
            listing, f"list {config.source} on the Hugging Face hub", config.retries, config.remedy)
    files = sorted([name, size] for name, size in found if is_data(name))
    if not files:
        raise UserError(f"no .parquet, .jsonl, .jsonl.gz or .jsonl.zst files in --source {config.source!r}")
    return files, commit


def is_data(name: str) -> bool:
    """Whether files of that name are read; others in a folder are left alone."""
    return re.search(r"(^|/)[^./][^/]*\.(parquet|jsonl|jsonl?\.(gz|zst))$", name) is not None


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether a path in a folder is in a hidden folder there, as editors and caches make them."""
    return folder in path.parents and any(part.startswith(".") for part in path.relative_to(folder).parts)


def list_hub(repository: str, revision: str | None, folder: str | None) -> tuple[list[list], str]:
    """([[hf:// address, bytes], ...], commit) of what is in a folder of a dataset on the hub."""
    from huggingface_hub import HfApi, HfFileSystem

    commit = HfApi().dataset_info(repository, revision=revision).sha
    root = f"datasets/{repository}@{commit}/{folder or ''}".rstrip("/")
    found = HfFileSystem(skip_instance_cache=True).find(root, detail=True)
    return [[f"hf://{name}", entry["size"]] for name, entry in found.items()], commit


def read_texts(files: list[str], start: Position, config: FineWebConfig):
    """Yield the rows of all files from `start` on as Texts.

    What the network fails to deliver is asked for again, from the row reached. UserError where it stays away, and
    where a file is not what its name says.
    """
    for index in range(start.file, len(files)):
        row, failures = start.row if index == start.file else 0, 0
        while row is not None:
            try:
                for texts in read_file(files[index], index, row, config.text_column):
                    yield texts
                    row, failures = texts.end, 0
                row = None  # the file is done
            except UserError as error:
                raise UserError(f"{files[index]}: {error}") from error
            except Exception as error:  # of Arrow, the file system, or any layer of the hub's client
                if "://" not in files[index]:
                    raise UserError(f"{files[index]} cannot be read: {explain(error)}") from error
                failures += 1
                wait_or_give_up(failures, config.retries, f"read {files[index]}", error, config.remedy, doze)


def read_file(name: str, index: int, first_row: int, column: str):
    """Yield the rows of one file from `first_row` on as Texts of about PIECE_BYTES."""
    row = 0
    for batch in read_parquet(name, column) if name.endswith(".parquet") else read_jsonl(name, column):
        count = max(1, len(batch) * PIECE_BYTES // max(1, batch.nbytes))
        for i in range(max(0, first_row - row), len(batch), count):  # what an earlier run has written is passed over
            piece = batch[i:i + count]
            rows = row + i + np.flatnonzero(piece.is_valid())
            yield Texts(index, row + i + len(piece), rows, as_strings(piece.drop_null()))
        row += len(batch)


def read_parquet(name: str, column: str):
    """Yield one column of a parquet file as Arrow arrays of binary, ROWS at a time; the other columns are not read."""
    import datasets
    import huggingface_hub
    import pyarrow as pa
    import pyarrow.dataset

    datasets.config.TORCH_AVAILABLE = False  # else it imports torch, which takes a second
    datasets.config.STREAMING_OPEN_MAX_RETRIES = datasets.config.STREAMING_READ_MAX_RETRIES = 1  # read_texts is patient
    for reason in ("OPEN", "READ", "READ_RATE_LIMIT", "READ_SERVER_UNAVAILABLE"):
        setattr(datasets.config, f"STREAMING_{reason}_RETRY_INTERVAL", 0)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # these print what they raise
    huggingface_hub.logging.set_verbosity_error()
    options = {}
    if "://" in name:  # over a network: few and large requests, and one ahead
        cache = pa.CacheOptions(prefetch_limit=1, range_size_limit=128 << 20)
        options["fragment_scan_options"] = pa.dataset.ParquetFragmentScanOptions(cache_options=cache)
    path = glob.escape(name if "://" in name else os.path.abspath(name))
    table = datasets.load_dataset("parquet", data_files=[path], columns=[column], batch_size=ROWS, split="train",
                                  streaming=True, **options)
    try:
        for batch in table.with_format("arrow").iter(batch_size=ROWS):
            kind = batch.schema.field(0).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
                raise UserError(f"column {column!r} holds {kind}, not text: choose another --text_column")
            yield from batch.column(0).cast(pa.large_binary()).chunks
    except pa.ArrowInvalid as error:
        if "No match for FieldRef" not in str(error):
            raise
        there = str(error).partition(" in ")[2].partition("__fragment_index")[0].split("\n")
        raise UserError(f"no column {column!r}: choose a --text_column of {', '.join(filter(None, there))}") from error


def read_jsonl(name: str, column: str):
    """Yield one key of the JSON lines in a file as Arrow arrays of binary, ROWS at a time. UserError names a bad line.

    Python's parser reads them: the one of `datasets` refuses lone surrogates and turns texts that look like dates into
    dates.
    """
    import fsspec
    import pyarrow as pa

    codec = {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix)
    with fsspec.open(name, "rb") if "://" in name else open(name, "rb") as raw:
        lines = enumerate(io.BufferedReader(pa.CompressedInputStream(raw, codec), 1 << 20) if codec else raw, start=1)
        while batch := list(itertools.islice(lines, ROWS)):
            yield pa.array([text_of(line, number, column) for number, line in batch], pa.large_binary())


def text_of(line: bytes, number: int, column: str) -> bytes | None:
    """The text in a JSON line as UTF-8; None where it is null or the line is empty. UserError for what is neither."""
    try:
        line = line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
        text = json.loads(line)[column] if line.strip() else None
        return None if text is None else as_utf8(text)
    except KeyError as error:
        raise UserError(f"line {number} has no key {column!r}: choose another --text_column") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"line {number} is not a JSON object with a string under {column!r}: {error}") from error


def as_utf8(text: str) -> bytes:
    """A text as UTF-8; lone surrogates, which have none, become U+FFFD as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def as_strings(column):
    """Arrow binary without nulls -> large strings; what is not UTF-8 becomes U+FFFD, as bytes.decode replaces it."""
    import pyarrow as pa

    try:
        texts = column.cast(pa.large_string())
        # no validity bitmap: a slice may still have that of its parent, for which gigatoken panics
        return pa.Array.from_buffers(texts.type, len(texts), [None, *texts.buffers()[1:]], 0, texts.offset)
    except pa.ArrowInvalid:
        return pa.array([text.decode("utf-8", "replace") for text in column.to_pylist()], pa.large_string())


def doze(seconds: int) -> None:
    """Sleep, unless nobody waits any more for the thread that this is."""
    if ENDING.wait(seconds):
        raise UserError("interrupted")


def ahead(items, depth: int = 4):
    """Yield the items, each fetched by a thread of its own before it is asked for."""
    end, pool = object(), ThreadPoolExecutor(1)
    try:
        futures = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := futures.popleft().result()) is not end:
            futures.append(pool.submit(next, items, end))
            yield item
    finally:
        ENDING.set()
        pool.shutdown(cancel_futures=True)
        items.close()


def in_parallel(function, items, threads: int):
    """Yield function(item) of each item in order, computed by so many threads."""
    futures, pool = deque(), ThreadPoolExecutor(threads)
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > 2 * threads:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()


# ---------------------------------------------------------------------------------------------------------------------
# 2. Tokenizing: Texts -> ids
# ---------------------------------------------------------------------------------------------------------------------

class Gigatoken:
    """Arrow strings -> (the ids of all, uint32; how many each has), by gigatoken: no Python strings are made, and words
    seen before are looked up. Each thread has a tokenizer of its own, which shares nothing and waits for none."""

    def __init__(self):
        import awkward
        import gigatoken
        import psutil

        self.awkward, self.gigatoken, self.memory_info = awkward, gigatoken, psutil.Process().memory_info
        self.thread = threading.local()

    def load(self) -> None:
        """Give this thread a tokenizer that has seen no bytes, from the kind of vocabulary file that it reads."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "gpt2.tiktoken"
            ranks = gpt2_encoding()._mergeable_ranks.items()
            path.write_bytes(b"".join(b64encode(token) + b" %d\n" % rank for token, rank in ranks))
            self.thread.tokenizer, self.thread.seen = self.gigatoken.Tokenizer.from_tiktoken(path, "gpt2", {}), 0

    def __call__(self, texts) -> tuple[np.ndarray, np.ndarray]:
        thread = self.thread
        if not hasattr(thread, "tokenizer") or (thread.seen > CACHE_BYTES and self.memory_info().rss > MEMORY_LIMIT):
            self.load()  # what it remembers of words has no bound of its own
        thread.seen += texts.nbytes
        ragged = thread.tokenizer.encode_batch(self.awkward.from_arrow(texts), parallel=False)
        return self.awkward.to_numpy(self.awkward.flatten(ragged)), self.awkward.to_numpy(self.awkward.num(ragged))


class Tiktoken:
    """The same by tiktoken, which defines what is right."""

    def __call__(self, texts) -> tuple[np.ndarray, np.ndarray]:
        ids = [gpt2_encoding().encode_ordinary(text) for text in texts.to_pylist()]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(itertools.chain.from_iterable(ids), np.uint32, lengths.sum()), lengths


def make_encoder(config: FineWebConfig):
    """The encoder that --tokenizer names; tiktoken, which is then in `config`, where gigatoken cannot be imported.

    UserError where gigatoken differs from tiktoken on a few odd texts.
    """
    import pyarrow as pa

    gpt2_encoding()  # made before several threads ask for it
    if config.tokenizer == "gigatoken":
        try:
            encode = Gigatoken()
            ids, lengths = encode(pa.array(TRICKY, pa.large_string()))
            for text, got in zip(TRICKY, np.split(ids, np.cumsum(lengths)[:-1])):
                if got.tolist() != gpt2_encoding().encode_ordinary(text):
                    raise UserError(f"gigatoken and tiktoken differ on the text {text!r}: use --tokenizer tiktoken")
            return encode
        except ImportError as error:
            print(f"warning: {error}: using tiktoken, many times slower", file=sys.stderr, flush=True)
            config.tokenizer = "tiktoken"
    return Tiktoken()


def join(ids: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids of documents, how many each has -> (where each begins, uint16 tokens with EOT before each document).

    The tokens are put into `out` where it is large enough: new memory costs as much time as the copy.
    """
    if ids.max(initial=0) >= EOT:
        raise UserError(f"the tokenizer gave the id {ids.max()}, text has ids below {EOT}: use --tokenizer tiktoken")
    ends, n = np.cumsum(lengths), len(ids) + len(lengths)
    starts = ends - lengths + np.arange(len(lengths))
    tokens = out[:n] if n <= len(out) else np.empty(n, np.uint16)
    tokens[starts] = EOT
    begin = 0
    for i, end in enumerate(ends.tolist(), start=1):  # i EOTs are before this document's first token
        tokens[begin + i:end + i] = ids[begin:end]
        begin = end
    return starts, tokens


def tokenize_documents(texts: list[str]) -> np.ndarray:
    """Texts -> uint16 tokens, each text led by EOT: what the shards hold."""
    import pyarrow as pa

    column = as_strings(pa.array([as_utf8(text) for text in texts], pa.large_binary()))
    return join(*make_encoder(FineWebConfig())(column), np.empty(0, np.uint16))[1]


def encode_texts(piece: Texts, encode, files: list[str]) -> tuple[Texts, np.ndarray, np.ndarray]:
    """(the same, its ids, how many each document has). UserError names a document on which the tokenizers differ."""
    ids, lengths = encode(piece.texts)
    ends = np.cumsum(lengths)
    for i in np.flatnonzero(piece.rows % CHECK_EVERY == 0).tolist():
        if ids[ends[i] - lengths[i]:ends[i]].tolist() != gpt2_encoding().encode_ordinary(piece.texts[i].as_py()):
            raise UserError(f"gigatoken and tiktoken differ on row {piece.rows[i]} (from 0) of {files[piece.file]}: "
                            "start again with --tokenizer tiktoken and another --out")
    return piece, ids, lengths


# ---------------------------------------------------------------------------------------------------------------------
# 3. Writing: ids -> Tokens -> shards
# ---------------------------------------------------------------------------------------------------------------------

def shard_name(config: FineWebConfig, k: int) -> str:
    """The file name of this node's k-th shard."""
    if config.num_nodes > 1 and k >= NODE_SHARDS:
        raise UserError(f"a node has numbers for {NODE_SHARDS:,} shards: choose a larger --shard_size, another --out")
    split = "val" if config.node_rank == k == 0 else "train"
    return f"edufineweb_{split}_{config.node_rank * NODE_SHARDS + k:06d}.npy"


def write_shards(stream, config: FineWebConfig, manifest: Manifest, limit: float, report) -> None:
    """Write what encode_texts yields as shards, until there are `limit` tokens with those of earlier runs, and add each
    shard to the manifest.

    "next" in a shard's record is the Position where the one after it begins. Calls report(tokens, documents, shards,
    file) with the numbers so far.
    """
    written, documents, number = manifest.total("tokens"), manifest.total("documents"), len(manifest.shards)
    start = Position(*manifest.shards[-1]["next"]) if number else Position(0, 0, 0)
    i = start.offset  # tokens of the first document that an earlier run has written
    shard, closing = None, None
    memory = np.empty(PIECE_BYTES, np.uint16)

    def close(shard: ShardWriter, following: Position) -> None:
        try:
            manifest.add(shard.finish() | {"next": following})
        finally:
            shard.abandon()  # where it could not be finished

    with ThreadPoolExecutor(1) as disk:  # which may take its time over one shard while the next is filled
        try:
            for texts, ids, lengths in stream:
                piece = Tokens(texts.file, texts.end, texts.rows, *join(ids, lengths, memory))
                if i and (texts.rows[:1].tolist() != [start.row] or i > lengths[0]):
                    raise UserError(f"{config.source} is not what {config.out} was begun with: choose another --out")
                while i < len(piece.tokens) and written < limit:
                    if shard is None:
                        path = Path(config.out) / shard_name(config, number)
                        shard, number = ShardWriter(path, config.shard_size), number + 1
                    end = min(len(piece.tokens), i + config.shard_size - shard.tokens, i + limit - written)
                    begun = int(np.diff(np.searchsorted(piece.starts, [i, end]))[0])
                    shard.write(piece.tokens[i:end], begun)
                    i, written, documents = end, written + end - i, documents + begun
                    if shard.tokens == config.shard_size or written == limit:
                        if closing is not None:
                            closing.result()
                        closing, shard = disk.submit(close, shard, piece.position(i)), None
                report(written, documents, number, piece.file)
                if written == limit:
                    break
                i = 0
            if closing is not None:
                closing.result()
            if shard is not None:
                close(shard, Position(piece.file + 1, 0, 0))
        finally:
            if shard is not None:
                shard.abandon()


# ---------------------------------------------------------------------------------------------------------------------
# 4. The command
# ---------------------------------------------------------------------------------------------------------------------

def prepare(config: FineWebConfig) -> None:
    """Write the shards that `config` describes, or those that are missing, and say how it went."""
    encode = make_encoder(config)
    manifest = open_manifest(config, ("source", "text_column", "shard_size", "max_tokens", "tokenizer"))
    if manifest.complete:
        say_finished(config, manifest)
        return
    known = manifest.values
    # a dataset on the hub is listed once, so that all of it is of one commit
    files, commit = (known["files"], known["revision"]) if known.get("revision") else find_files(config)
    if known.get("files", files) != files:
        raise UserError(f"the files of {config.source} have changed since {config.out} was begun: choose another --out")
    mine = files[config.node_rank::config.num_nodes]
    if len(files) < config.num_nodes:
        raise UserError(f"--num_nodes {config.num_nodes} is more than there are files, {len(files)}")
    limit = math.inf
    if config.max_tokens:  # each node writes its share
        limit = config.max_tokens * (config.node_rank + 1) // config.num_nodes
        limit -= config.max_tokens * config.node_rank // config.num_nodes
    before, started = manifest.total("tokens"), time.perf_counter()
    ENDING.clear()
    expected = min(limit, max(before, estimate(mine)))
    check_disk(config, 2 * (expected - before), f"{len(mine)} {plural(len(mine), 'file')} of {config.source}")
    manifest.begin(known | {"revision": commit, "files": files, "tokenizer_sha256": SHA256,
                            "tokenizer_version": version(config.tokenizer)})
    names = [name for name, _ in mine]
    start = Position(*manifest.shards[-1]["next"]) if manifest.shards else Position(0, 0, 0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    stream = in_parallel(functools.partial(encode_texts, encode=encode, files=names),
                         ahead(read_texts(names, start, config)), config.num_proc or min(cores, ENOUGH))
    with contextlib.closing(stream), progress_bar(expected, before, "tok") as bar:

        def report(tokens: int, documents: int, shards: int, file: int) -> None:
            if file:  # the files so far tell more of those to come than experience does
                bar.total = min(limit, max(tokens, estimate(mine, file, tokens)))
            bar.set_postfix_str(f"{shards} {plural(shards, 'shard')}, {documents:,} documents", refresh=False)
            bar.update(tokens - bar.n)

        write_shards(stream, config, manifest, limit, report)
    if not manifest.shards:
        raise UserError(f"there is no text in {config.source}")
    manifest.finish()
    say_finished(config, manifest, before, time.perf_counter() - started)
    if len(manifest.shards) == config.num_nodes == 1:
        print("warning: the only shard is the validation split: to train on this too, choose another --out and "
              f"--shard_size {max(1, manifest.total('tokens') // 10)}", file=sys.stderr, flush=True)


def estimate(files: list[list], finished: int = 0, tokens: int = 0) -> int:
    """About how many tokens the files hold, by their sizes: as many a byte as the first `finished` did, or as usual."""
    if finished:
        return tokens * sum(size for _, size in files) // max(1, sum(size for _, size in files[:finished]))
    return int(sum(size * TOKENS_PER_BYTE[Path(name).suffix] for name, size in files))


def download(config: FineWebConfig) -> None:
    """Fetch ready-made .bin shards from a dataset on the hub, the validation split first and whole shards up to
    --max_tokens, and compare each with the hash that the hub has of it."""
    from huggingface_hub import HfApi, snapshot_download

    hub = HUB.fullmatch(config.download)
    if not hub or hub["folder"] or config.num_nodes > 1:
        raise UserError("--download takes OWNER/NAME or OWNER/NAME@REVISION, on one machine")
    manifest = open_manifest(config, ("download", "max_tokens"))
    if manifest.complete:
        say_finished(config, manifest)
        return

    def listing() -> tuple[str, list]:
        asked = manifest.values.get("revision") or hub["revision"]
        commit = HfApi().dataset_info(hub["repository"], revision=asked).sha
        entries = HfApi().list_repo_tree(hub["repository"], repo_type="dataset", revision=commit)
        return commit, [entry for entry in entries if entry.path.endswith(".bin")]

    commit, entries = patiently(listing, f"list {config.download} on the Hugging Face hub", config.retries,
                                config.remedy)
    wanted = []
    for entry in sorted(entries, key=lambda entry: ("val" not in entry.path, entry.path)):
        if not config.max_tokens or sum(shard["tokens"] for shard in wanted) < config.max_tokens:
            if entry.lfs is None:
                raise UserError(f"the hub has no sha256 of {entry.path} in {config.download}, so it cannot be trusted")
            wanted.append({"name": entry.path, "documents": 0, "tokens": (entry.size - 1024) // 2, "bytes": entry.size,
                           "sha256": entry.lfs.sha256})
    if not wanted:
        raise UserError(f"there are no .bin shards in {config.download}")
    missing = sum(shard["bytes"] for shard in wanted if not manifest.is_whole(shard))
    check_disk(config, missing, f"{len(wanted)} {plural(len(wanted), 'shard')} of {config.download}")
    manifest.begin(manifest.values | {"revision": commit})
    patiently(functools.partial(
        snapshot_download, hub["repository"], repo_type="dataset", revision=commit, local_dir=config.out,
        allow_patterns=[shard["name"] for shard in wanted]), f"download {config.download}", config.retries,
        config.remedy)
    with progress_bar(sum(shard["bytes"] for shard in wanted), 0, "B") as bar:
        for shard in wanted:
            path = Path(config.out) / shard["name"]
            if sha256(path) != shard["sha256"]:
                path.unlink()
                raise UserError(f"{path} came damaged and was deleted: fetch it again with: {config.command}")
            open_shard(path)
            bar.update(shard["bytes"])
    manifest.shards = wanted
    manifest.finish()
    say_finished(config, manifest)


def open_manifest(config: FineWebConfig, settings: tuple[str, ...]) -> Manifest:
    """The manifest of --out as this node sees it. UserError where it is of other settings or the shards are foreign."""
    node = f"_{config.node_rank}_of_{config.num_nodes}" if config.num_nodes > 1 else ""
    manifest = Manifest(config.out, node)
    values = {name: getattr(config, name) for name in (*settings, "node_rank", "num_nodes")}
    manifest.require(values)
    for name in manifest.missing[:1]:
        print(f"warning: {Path(config.out) / name} is gone or cut: going on from there", file=sys.stderr, flush=True)
    if not manifest.values:
        mine = range(config.node_rank * NODE_SHARDS, (config.node_rank + 1) * NODE_SHARDS)
        for path in sorted([*Path(config.out).glob("*.npy"), *Path(config.out).glob("*.bin")]):
            number = re.search(r"_(\d{6})\.npy$", path.name)
            if config.num_nodes == 1 or not number or int(number[1]) in mine:
                raise UserError(f"{path} is there and no manifest says what it is: choose another --out, or delete it")
    manifest.values = values | manifest.values
    return manifest


def check_disk(config: FineWebConfig, needed: int, what: str) -> None:
    """Say how many bytes will be written; UserError where the disk has not that many."""
    free = shutil.disk_usage(config.out).free
    print0(f"{what}: {needed / 1e9:,.3g} GB to write to {config.out}, {free / 1e9:,.3g} GB free there")
    if needed > free:
        raise UserError(f"{config.out} needs {needed / 1e9:,.3g} GB and its disk has {free / 1e9:,.3g} GB free: make "
                        "room, name another --out, or take less with --max_tokens")


def say_finished(config: FineWebConfig, manifest: Manifest, before: int = 0, seconds: float = 0) -> None:
    """The last line: what is there, and how fast this run wrote its part."""
    tokens, documents, shards = manifest.total("tokens"), manifest.total("documents"), len(manifest.shards)
    line = f"finished: {tokens:,} tokens" + (f" of {documents:,} documents" if documents else "")
    line += f" in {shards} {plural(shards, 'shard')} in {config.out}"
    if tokens > before and seconds:
        line += f"; {tokens - before:,} of them now, in {seconds:.1f} s: {(tokens - before) / seconds:,.0f} tokens/s"
    print0(line)


@contextlib.contextmanager
def hold(config: FineWebConfig):
    """Make --out and keep other processes from writing the same shards. UserError where one does."""
    folder = Path(config.out)
    ours = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f".lock{config.node_rank}")
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"another fineweb.py is writing to {folder}: wait for it, or choose another --out") from error
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}: choose another --out") from error
    try:
        yield
    except DataError:
        raise
    except OSError as error:  # a full disk, first of all
        raise UserError(f"{explain(error)}; the whole shards in {folder} are kept, go on later with: {config.command}"
                        ) from error
    finally:
        with contextlib.suppress(OSError):
            if ours and os.listdir(folder) == [Path(lock.lock_file).name]:  # nothing came of it
                os.unlink(lock.lock_file)
                folder.rmdir()
        lock.release()


def main(argv: list[str]) -> None:
    """Run the command with these flags."""
    config = FineWebConfig(**parse_flags(FineWebConfig, argv, "Prepare token shards for train_gpt2.py; the same "
                                         "command again goes on. Without flags: FineWeb-Edu, 10 billion tokens."))
    if not 0 < config.shard_size < 2**40 or min(config.max_tokens, config.num_proc, config.retries) < 0:
        raise UserError("--shard_size must be from 1 to 2**40; --max_tokens, --num_proc and --retries at least 0")
    if not config.source or not config.out:
        raise UserError("--source and --out must not be empty")
    if 0 < config.max_tokens < config.num_nodes:
        raise UserError(f"--max_tokens {config.max_tokens} leaves nothing for some of --num_nodes {config.num_nodes}")
    if not 0 <= config.node_rank < config.num_nodes:
        raise UserError(f"--node_rank {config.node_rank} must be from 0 to --num_nodes {config.num_nodes} - 1")
    if config.tokenizer not in ("gigatoken", "tiktoken"):
        raise UserError(f"--tokenizer must be gigatoken or tiktoken, not {config.tokenizer!r}")
    if config.verify:
        found = [path for path in Path(config.out).glob("*") if path.suffix in (".npy", ".bin")]
        with progress_bar(sum(path.stat().st_size for path in found), 0, "B") as bar:
            shards, tokens = verify(config.out, bar.update)
        print(f"verified: {shards} {plural(shards, 'shard')}, {tokens:,} tokens, all as they were written")
    else:
        with hold(config):
            download(config) if config.download else prepare(config)


if __name__ == "__main__":
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # closed with >&-
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
    os._exit(code)  # Arrow's threads may hold a file of Python's, and Python's own exit would wait for them for ever
