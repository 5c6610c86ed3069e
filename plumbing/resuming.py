"""Where a folder of shards stands in its source, and whether that is still the source it was begun with.

    Beginning(shard_size)                      where the first tokens come from, of which validation may get a share
    join_pieces(stream, manifest, marks)       what encode_texts gives as Tokens, which know their places in the source
    list_source(config, manifest)              the files to read
    check_source(config, encode, files, ...)   compares what has been read with what is there

`config` is a FineWebConfig of fineweb.py.
"""
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.cli import UserError, plural, print0
from plumbing.encode import join_documents
from plumbing.files import DataError
from plumbing.hub_files import parse_dataset
from plumbing.manifest import Manifest
from plumbing.progress import busy
from plumbing.shards import open_shard
from plumbing.sources import File, count_same, find_files, hub_dataset, those_read_before
from plumbing.texts import PIECE_BYTES, read_texts


class Position(NamedTuple):
    """A place in the stream of tokens: token `offset` of the document in row `row` of file number `file`."""

    file: int
    row: int
    offset: int


class Tokens(NamedTuple):
    """The tokens of consecutive rows of one file."""

    file: int
    end: int  # the row after the last one
    rows: np.ndarray  # (documents,) row number of each document
    starts: np.ndarray  # (documents,) offset of each document's EOT in `tokens`
    tokens: np.ndarray  # (tokens,) uint16
    bad: np.ndarray  # (rows,) row numbers of those that were skipped
    skipped: int  # rows that were skipped before these
    file_tokens: int | None  # tokens of this file before these; None if an earlier version has begun it
    share: float | None = None  # of the file that has been read, if known

    def position(self, i: int) -> Position:
        """Return the place of token i in the source, or of whatever follows if i = len(tokens)."""
        if i == len(self.tokens):
            return Position(self.file, self.end, 0)
        document = int(np.searchsorted(self.starts, i, side="right")) - 1
        return Position(self.file, int(self.rows[document]), i - int(self.starts[document]))

    def record(self, i: int) -> dict:
        """Return what the manifest says of a shard that ends before token i: where the next one begins."""
        following = self.position(i)
        return {"next": following, "skipped": self.skipped + int((self.bad < following.row).sum()),
                "file_tokens": None if self.file_tokens is None else self.file_tokens + i}


class Beginning:
    """The rows that the first tokens of a source come from, as far as a validation share may reach."""

    def __init__(self, shard_size: int):
        self.limit, self.tokens, self.pieces = validation_share(shard_size), 0, []

    def add(self, piece: Tokens) -> None:
        """Remember what is needed of a piece: its tokens are not."""
        if self.tokens <= self.limit:
            self.pieces.append((self.tokens, piece._replace(tokens=range(len(piece.tokens)))))
        self.tokens += len(piece.tokens)

    def cut(self, tokens: int) -> tuple[int, int, dict]:
        """Return validation's share of so many tokens, how many documents begin in it, and the record of its shard."""
        count = validation_share(tokens)
        documents = sum(int(np.searchsorted(piece.starts, count - begin)) for begin, piece in self.pieces)
        begin, piece = next((begin, piece) for begin, piece in self.pieces if begin + len(piece.tokens) >= count)
        return count, documents, piece.record(count - begin)


def validation_share(tokens: int) -> int:
    """Return how many of so few tokens that they fill no second shard are for validation: 1 %, or a window's 1,025.

    If there are less than two windows of 1,024, it is half of them.
    """
    return max(tokens // 100, min(1025, tokens // 2))


def next_position(manifest: Manifest) -> Position:
    """Return the place in the source at which the next shard begins."""
    return Position(*manifest.shards[-1]["next"]) if manifest.shards else Position(0, 0, 0)


def join_pieces(stream, manifest: Manifest, marks: list):
    """Yield what encode_texts returns as Tokens; the numbers of marks in the texts are appended to `marks`."""
    start, last = next_position(manifest), (manifest.shards or [{"file_tokens": 0}])[-1]
    file, skipped, file_tokens = start.file, last.get("skipped", 0), last.get("file_tokens")
    if file_tokens is not None or start.row == start.offset == 0:
        file_tokens = (file_tokens or 0) - start.offset  # the document that was begun comes again
    buffer = np.empty(PIECE_BYTES, np.uint16)
    for texts, ids, lengths, found in stream:
        marks.append(found)
        if texts.file != file:
            file, file_tokens = texts.file, 0
        starts, tokens = join_documents(ids, lengths, buffer)
        yield Tokens(file, texts.end, texts.rows, starts, tokens, texts.bad, skipped, file_tokens, texts.share)
        skipped += len(texts.bad)
        file_tokens = None if file_tokens is None else file_tokens + len(tokens)


def list_source(config, manifest: Manifest) -> tuple[list[File], str | None]:
    """Return ([File, ...], commit) for --source, in reading order.

    The files of a dataset on the hub are listed only once, so that a later run reads the same commit. A source that is
    gone when its shards are finished is what the manifest says. Raises UserError if there are fewer files than nodes.
    """
    known = manifest.values
    recorded = [File(*record[:1], *record) for record in known.get("files", [])]
    try:
        dataset = hub_dataset(config.source)
        if known.get("revision") and dataset and dataset == parse_dataset(known.get("source", "")):
            return recorded, known["revision"]
        files, commit = find_files(config.source, config.retries, config.remedy)
    except UserError:
        if manifest.complete and config.source == known.get("source"):
            return recorded, known.get("revision")
        raise
    files = those_read_before(recorded, files)
    if len(files) < config.num_nodes:
        raise UserError(f"--num_nodes is {config.num_nodes}, it must be at most the number of files, {len(files)}")
    for record in manifest.others():
        if record.get("files") and not count_same(record["files"], files):
            raise DataError(f"{config.out} was made with another source, {record.get('source')!r}: choose another "
                            "--out")
    return files, commit


@busy("comparing the source with what has been read of it")
def check_source(config, encode, files: list[File], manifest: Manifest) -> bool:
    """Return whether anything is left to do, after a check that what has been read of this node's files is unchanged.

    Files that have not been read yet may have changed, and others may have come behind them, which is said. Raises
    UserError if what has been read has changed.
    """
    known, position = manifest.values.get("files", [])[config.node_rank::config.num_nodes], next_position(manifest)
    same, total = count_same(known, files), manifest.total("tokens")
    in_part = (position.row, position.offset) != (0, 0)
    if same < position.file or (same == position.file and in_part and not (
            same < len(files) and begins_as_read(config, encode, files, manifest))):
        if manifest.values.get("source") != config.source:
            raise UserError(f"{config.out} was made from {manifest.values.get('source')}, not from {config.source}: "
                            "choose another --out")
        changed = [*known[same:same + 1], ["a file"]][0][0]
        raise UserError(f"{config.source} is not what {config.out} was begun with: rows of {changed} that have been "
                        "read have changed since: restore it, or choose another --out")
    is_new = not same == len(known) == len(files)
    if manifest.complete and (total == config.node_limit or not is_new):
        return False
    if manifest.shards and is_new and total < config.node_limit:
        print0(f"{config.source} has other files, or others behind them, than when {config.out} was begun: the "
               f"{len(manifest.shards)} finished {plural(len(manifest.shards), 'shard')} are of what is unchanged")
    if manifest.shards and position.file < len(files) and total < config.node_limit and not in_part and (
            manifest.shards[-1]["tokens"] < config.shard_size):  # it was the last, and others now follow
        manifest.drop_last()
    return True


def begins_as_read(config, encode, files: list[File], manifest: Manifest) -> bool:
    """Return whether a file that changed after it was read in part still gives the tokens in the shards up to there."""
    position, left = next_position(manifest), manifest.shards[-1].get("file_tokens")
    if left is None:  # an earlier version has not counted them
        return False
    shards = [open_shard(Path(config.out) / shard["name"]) for shard in manifest.shards]
    texts = read_texts([files[position.file].path], config.text_column, (0, 0), config.skip_bad_rows,
                       (config.retries, config.remedy), threading.Event())
    for piece in texts:
        ids = encode(piece.texts)
        starts, tokens = join_documents(*ids, np.empty(0, np.uint16))
        if not np.array_equal(tokens[:left], last_tokens(shards, left, min(left, len(tokens)))):
            return False
        if left <= len(tokens):
            piece = Tokens(position.file, piece.end, piece.rows, starts, tokens, piece.bad, 0, 0)
            return piece.position(left) == position
        left -= len(tokens)
    return False


def last_tokens(shards: list[np.ndarray], left: int, count: int) -> np.ndarray:
    """Return the `count` tokens that begin `left` tokens before the end of the shards, fewer if there are fewer."""
    begin, parts = sum(map(len, shards)) - left, []
    for shard in shards:
        parts.append(shard[max(0, begin):max(0, begin + count)])
        begin -= len(shard)
    return np.concatenate(parts)
