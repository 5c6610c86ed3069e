"""The texts that fineweb.py tokenizes: finds the files of a source and reads the texts in them.

    find_files(source, retries, remedy)        [[file, bytes], ...], on this disk or on the Hugging Face hub
    estimate_tokens(files)                     about how many tokens they hold
    read_texts(files, column, start, ...)      the rows of all files, in order, as Texts

.parquet, .jsonl, .jsonl.gz and .jsonl.zst files are read; a file on the hub is streamed, not stored.
"""
import functools
import glob
import io
import itertools
import json
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.cli import UserError, explain
from plumbing.hub_files import list_hub_files, parse_dataset
from plumbing.network import patiently, wait_or_give_up

TOKENS_PER_BYTE = {".parquet": 0.35, ".jsonl": 0.22, ".gz": 0.6, ".zst": 0.6}  # rough averages, by type of file
ROWS = 250  # rows per read: the system reuses buffers of a few MB, while larger ones cost page faults
PIECE_BYTES = 4 << 20  # text per piece, at most; a longer document is a piece of its own


class Texts(NamedTuple):
    """Consecutive rows of one file."""

    file: int  # number of the file
    end: int  # the row after the last one
    rows: np.ndarray  # (documents,) row number of each text; rows with null are left out
    texts: object  # pyarrow.LargeStringArray, (documents,)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Files
# ---------------------------------------------------------------------------------------------------------------------

def find_files(source: str, retries: int, remedy: str) -> tuple[list[list], str | None]:
    """Return ([[file, bytes], ...], commit) for the data files that --source names, in reading order.

    Files on the hub are hf:// addresses that contain the commit. The commit is None for local files. Raises UserError
    if there are no data files.
    """
    dataset = parse_dataset(source)
    if Path(source).exists() or not dataset or is_data(dataset.repository):
        found, commit = list_local(source), None
    else:
        listing = functools.partial(list_hub_files, dataset)
        found, commit = patiently(listing, f"list {source} on the Hugging Face hub", retries, remedy)
    files = sorted([name, size] for name, size in found if is_data(name))
    if not files:
        raise UserError(f"no .parquet, .jsonl, .jsonl.gz or .jsonl.zst files in --source {source!r}")
    return files, commit


def list_local(source: str) -> list[list]:
    """Return [[path, bytes], ...] for a local file, folder or pattern. A file with several links is listed once."""
    root = Path(source)
    if root.is_file():  # comes first, because a file's name may look like a pattern
        paths = [root]
    elif root.is_dir():
        paths = root.rglob("[!.]*")
    else:
        paths = map(Path, glob.glob(source, recursive=True))
    once = {path.resolve(): path for path in sorted(paths) if path.is_file() and not is_hidden(path, root)}
    return [[path.as_posix(), path.stat().st_size] for path in once.values()]


def is_data(name: str) -> bool:
    """Return whether a file of this name is read. All other files in a folder are ignored."""
    return re.search(r"(^|/)[^./][^/]*\.(parquet|jsonl|jsonl?\.(gz|zst))$", name) is not None


def is_hidden(path: Path, folder: Path) -> bool:
    """Return whether a path lies in a hidden folder below `folder`, such as editors and caches create."""
    return folder in path.parents and any(part.startswith(".") for part in path.relative_to(folder).parts)


def estimate_tokens(files: list[list], finished: int = 0, tokens: int = 0) -> int:
    """Estimate the number of tokens in the files from their sizes.

    If the first `finished` files are known to hold `tokens` tokens, the others are assumed to hold as many per byte.
    """
    if finished:
        return tokens * sum(size for _, size in files) // max(1, sum(size for _, size in files[:finished]))
    return int(sum(size * TOKENS_PER_BYTE[Path(name).suffix] for name, size in files))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Rows
# ---------------------------------------------------------------------------------------------------------------------

def read_texts(files: list[str], column: str, start: tuple[int, int], retries: int, remedy: str,
               stop: threading.Event):
    """Yield the rows of all files as Texts, beginning at `start` = (number of the file, row).

    After a network error it waits and reads on from the row it had reached; setting `stop` ends the wait. Raises
    UserError if the network stays down or a file is not what its name says.
    """
    def sleep(seconds: int) -> None:
        if stop.wait(seconds):
            raise UserError("interrupted")

    first_file, first_row = start
    for index in range(first_file, len(files)):
        row, failures, finished = first_row if index == first_file else 0, 0, False
        while not finished:
            try:
                for texts in read_file(files[index], index, row, column):
                    yield texts
                    row, failures = texts.end, 0
                finished = True
            except UserError as error:
                raise UserError(f"{files[index]}: {error}") from error
            except Exception as error:  # from Arrow, the file system, or any layer of the hub's client
                if "://" not in files[index]:
                    raise UserError(f"{files[index]} cannot be read: {explain(error)}") from error
                failures += 1
                wait_or_give_up(failures, retries, f"read {files[index]}", error, remedy, sleep)


def read_file(name: str, index: int, first_row: int, column: str):
    """Yield the rows of one file from `first_row` on as Texts of about PIECE_BYTES."""
    row = 0
    for batch in read_parquet(name, column) if name.endswith(".parquet") else read_jsonl(name, column):
        count = max(1, len(batch) * PIECE_BYTES // max(1, batch.nbytes))
        for i in range(max(0, first_row - row), len(batch), count):  # skips what an earlier run has written
            piece = batch[i:i + count]
            rows = row + i + np.flatnonzero(piece.is_valid())
            yield Texts(index, row + i + len(piece), rows, as_strings(piece.drop_null()))
        row += len(batch)


def read_parquet(name: str, column: str):
    """Yield one column of a parquet file as Arrow binary arrays of up to ROWS rows. Other columns are not read."""
    import pyarrow as pa
    import pyarrow.dataset

    options = {}
    if "://" in name:  # over a network: few and large requests, with the next one sent early
        cache = pa.CacheOptions(prefetch_limit=1, range_size_limit=128 << 20)
        options["fragment_scan_options"] = pa.dataset.ParquetFragmentScanOptions(cache_options=cache)
    path = glob.escape(name if "://" in name else os.path.abspath(name))
    table = import_datasets().load_dataset("parquet", data_files=[path], columns=[column], batch_size=ROWS,
                                           split="train", streaming=True, **options)
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
        columns = str(error).partition(" in ")[2].partition("__fragment_index")[0].split("\n")
        raise UserError(f"no column {column!r}: choose a --text_column of {', '.join(filter(None, columns))}"
                        ) from error


def import_datasets():
    """Import the package `datasets`, set up to start fast, print nothing and leave the retries to read_texts."""
    import datasets
    import huggingface_hub

    datasets.config.TORCH_AVAILABLE = False  # otherwise it imports torch, which takes a second
    datasets.config.STREAMING_OPEN_MAX_RETRIES = datasets.config.STREAMING_READ_MAX_RETRIES = 1
    for reason in ("OPEN", "READ", "READ_RATE_LIMIT", "READ_SERVER_UNAVAILABLE"):
        setattr(datasets.config, f"STREAMING_{reason}_RETRY_INTERVAL", 0)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # these two print what they also raise
    huggingface_hub.logging.set_verbosity_error()
    return datasets


def read_jsonl(name: str, column: str):
    """Yield one key of the JSON lines in a file as Arrow binary arrays of up to ROWS rows.

    Raises UserError, with the number of the line, for a bad one. Python's parser is used, because the one in
    `datasets` refuses lone surrogates and turns texts that look like dates into dates.
    """
    import fsspec
    import pyarrow as pa

    codec = {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix)
    with fsspec.open(name, "rb") if "://" in name else open(name, "rb") as raw:
        file = io.BufferedReader(pa.CompressedInputStream(raw, codec), 1 << 20) if codec else raw
        lines = enumerate(file, start=1)
        while batch := list(itertools.islice(lines, ROWS)):
            yield pa.array([text_of(line, number, column) for number, line in batch], pa.large_binary())


def text_of(line: bytes, number: int, column: str) -> bytes | None:
    """Return the text in a JSON line as UTF-8, or None if it is null or the line is blank.

    Raises UserError, with the number of the line, for anything else.
    """
    try:
        line = line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
        text = json.loads(line)[column] if line.strip() else None
        return None if text is None else as_utf8(text)
    except KeyError as error:
        raise UserError(f"line {number} has no key {column!r}: choose another --text_column") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"line {number} is not a JSON object with a string under {column!r}: {error}") from error


def as_utf8(text: str) -> bytes:
    """Encode a text as UTF-8. Lone surrogates, which UTF-8 cannot express, become U+FFFD, as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def as_strings(column):
    """Convert Arrow binary without nulls to large strings. Bytes that are not UTF-8 become U+FFFD, as in Python."""
    import pyarrow as pa

    try:
        texts = column.cast(pa.large_string())
        # drop the validity bitmap: a slice may still carry its parent's, and gigatoken panics on it
        return pa.Array.from_buffers(texts.type, len(texts), [None, *texts.buffers()[1:]], 0, texts.offset)
    except pa.ArrowInvalid:
        return pa.array([text.decode("utf-8", "replace") for text in column.to_pylist()], pa.large_string())
