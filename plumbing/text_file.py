"""A text file as training data: refused unless it is plain UTF-8, and turned into tokens.

    open_text(path, split, out_dir, world)    the tokens of one split

A line that is only <|endoftext|> ends a document. As in shards, the token EOT then stands before each document.
"""
import codecs
import hashlib
import io
import itertools
import shlex
from pathlib import Path

import numpy as np

from plumbing.cli import UserError, print0
from plumbing.file_kinds import refuse_other_kinds
from plumbing.files import DataError, atomic_write, lock
from plumbing.manifest import npy_header
from plumbing.progress import busy, progress_bar
from plumbing.shard_file import Shard, open_shard
from plumbing.tokenizer import EOT, encode_in_pieces

MARK = "<|endoftext|>"
IN_MEMORY = 8 << 20  # bytes of a text that is tokenized at each start; the tokens of larger ones are kept in a file
BLOCK = 1 << 20  # bytes, or characters, at a time
LOCK_SECONDS = 3600  # longest wait for another process that tokenizes the same text
NOTHING = np.zeros(0, dtype=np.uint16)
CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\b\x1b"))  # which text does not have; logs have colours


def open_text(path: Path, split: str, out_dir="", world=None) -> np.ndarray | Shard:
    """Return the tokens of one split of a UTF-8 text: the last tenth is val, the rest train.

    Those of a large text are written to out_dir once, by rank 0 of `world`, in a file named by the hash of the text.
    Raises DataError if it is not a text, and UserError if it is stopped before all is tokenized.
    """
    if world is None or path.stat().st_size < IN_MEMORY:
        check_text(path)
        with open_stream(path) as file, busy(f"tokenizing {path.name}"):
            tokens = np.concatenate([NOTHING, *encode_documents(file, find_marks(path, says=split == "train"))])
        if not len(tokens):
            raise DataError(f"{path} holds nothing but {MARK}: name a file with text")
        boundary = len(tokens) - len(tokens) // 10
        return tokens[:boundary] if split == "train" else tokens[boundary:]
    whole = open_shard(world.from_rank0(lambda: tokenize(path, Path(out_dir), world)))
    boundary = len(whole) - len(whole) // 10
    return whole.part(0, boundary) if split == "train" else whole.part(boundary, len(whole))


def tokenize(path: Path, out_dir: Path, world) -> Path:
    """Write the tokens of a text to out_dir, unless they are there; return the path of that file."""
    before = state_of(path)
    cache = out_dir / f"tokens-{check_text(path)[:16]}.npy"
    if is_whole(cache):
        return cache
    remedy = "choose an --out_dir with space for 2 bytes per token, or make shards with fineweb.py"
    with lock(out_dir, f"another process is tokenizing {path} into", remedy, f".{cache.name}.lock", LOCK_SECONDS):
        if is_whole(cache):  # the other process has finished
            return cache
        size, count = before[0], 0
        try:
            with open_stream(path) as text, atomic_write(cache) as file, progress_bar(size, 0, "B") as bar:
                bar.set_description(f"tokenizing {path.name}")
                file.write(npy_header(0))
                for tokens in encode_documents(text, find_marks(path, says=True)):
                    file.write(tokens.astype("<u2", copy=False).data)
                    count += len(tokens)
                    bar.update(text.buffer.tell() - bar.n)
                    if world.stop.is_set():
                        raise UserError(f"interrupted while tokenizing {path}: the same command does it again")
                file.seek(0)
                file.write(npy_header(count))
                if state_of(path) != before:  # under this hash the tokens of another text would be found again
                    raise DataError(f"{path} was changed while it was tokenized: run the same command again when it is "
                                    "complete")
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"cannot write the tokens of {path} to {cache}: {error.strerror or error}: "
                            f"{remedy}") from error
    return cache


def is_whole(cache: Path) -> bool:
    """Return whether the tokens of a text are in a file, as a shard; say so if it is damaged."""
    try:
        if cache.exists():
            open_shard(cache)
            return True
    except DataError as error:
        print0(f"warning: {error}: the text is tokenized again")
    return False


def state_of(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is written or replaced: its size, date and number."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def open_stream(path: Path) -> io.TextIOWrapper:
    """Open a UTF-8 text. A mark of the byte order at its beginning is dropped, all ends of lines become a newline."""
    return open(path, encoding="utf-8-sig")


def read_pieces(file: io.TextIOWrapper):
    """Yield a text in pieces, and None for each line that separates documents.

    Such a line goes with its own newline and the one before it.
    """
    newline, at_line_start = "", True
    while line := file.readline(BLOCK):
        if at_line_start and line.strip() == MARK:
            newline = ""
            yield None
            continue
        at_line_start = line.endswith("\n")
        if piece := newline + line.removesuffix("\n"):
            yield piece
        newline = "\n" if at_line_start else ""
    if newline:
        yield newline


@busy("looking for documents in the text")
def find_marks(path: Path, says: bool) -> bool:
    """Return whether a line of a text is only <|endoftext|>. If `says`, tell of those within lines, which stay text."""
    with open(path, "rb") as file:
        blocks, before = iter(lambda: file.read(BLOCK), b""), b""
        for block in blocks:
            if MARK.encode() in before + block:
                break
            before = block[-len(MARK):]
        else:  # the usual case, without a look at each line
            return False
    found, within = False, 0
    with open_stream(path) as text:
        for piece in read_pieces(text):
            found = found or piece is None
            within += (piece or "").count(MARK)
    if within and says:
        print0(f"note: {path} has {within:,} {MARK} within lines, where it stays text; to end a document there, put it "
               f"on a line of its own: sed 's/{MARK}/\\n&\\n/g' {shlex.quote(str(path))} > NEW.txt")
    return found


def encode_documents(file: io.TextIOWrapper, marked: bool):
    """Yield the tokens of a text as uint16 arrays; if it is `marked`, with EOT before each document.

    A document is what stands between two marks, or between one and the end of the file, unless that is empty.
    """
    for is_mark, pieces in itertools.groupby(read_pieces(file), key=lambda piece: piece is None):
        if not is_mark:
            if marked:
                yield np.array([EOT], dtype=np.uint16)
            yield from encode_in_pieces(pieces)


@busy("reading the text")
def check_text(path: Path) -> str:
    """Return the SHA-256 of a file. Raises DataError if it is not a UTF-8 text, saying what it seems to be instead."""
    hashed, decoder, position, controls, blank = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0, 0, True
    try:
        with open(path, "rb") as file:
            head = file.read(BLOCK)
            refuse_other_kinds(path, head)
            check_encoding(path, head)
            file.seek(0)
            while block := file.read(BLOCK):
                hashed.update(block)
                decode(decoder, block, path, position)
                if b"\0" in block:
                    raise DataError(f"{path} has a NUL byte at byte {position + block.index(0):,}, which text does "
                                    f"not: remove them with tr -d '\\000' < {shlex.quote(str(path))} > NEW.txt")
                controls += count_controls(block)
                blank = blank and not block.removeprefix(codecs.BOM_UTF8).strip()
                position += len(block)
            decode(decoder, b"", path, position, final=True)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if blank:
        raise DataError(f"{path} is empty: name a file with text")
    if controls > position // 100:
        raise DataError(f"{path} is not a text file: {controls / position:.0%} of it are control characters: save its "
                        "text as UTF-8")
    return hashed.hexdigest()


def count_controls(block: bytes) -> int:
    """Count the control characters that text does not have."""
    return len(block) - len(block.translate(None, CONTROLS))


def check_encoding(path: Path, head: bytes) -> None:
    """Raise DataError if the first bytes of a file are those of UTF-16 or UTF-32, with or without a mark."""
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
             codecs.BOM_UTF16_BE: "UTF-16"}
    encoding = next((name for mark, name in marks.items() if head.startswith(mark)), "")
    if not encoding and b"\0" in head[:4096]:  # where in four bytes it stands tells
        quarters = [head[i:4096:4] for i in range(4)]
        zeros = [quarter.count(0) / max(1, len(quarter)) for quarter in quarters]
        often, never = [share > 0.02 for share in zeros], [share < 0.001 for share in zeros]
        for name, pattern in (("UTF-32LE", "x!00"), ("UTF-32LE", "!000"), ("UTF-32BE", "00!x"), ("UTF-32BE", "000!"),
                              ("UTF-16LE", "!0!0"), ("UTF-16BE", "0!0!")):
            if all({"0": often, "!": never}.get(sign, [True] * 4)[i] for i, sign in enumerate(pattern)):
                encoding = encoding or name
    if encoding:
        raise not_utf8(path, f"it seems to be {encoding}", f"-f {encoding} ")


def decode(decoder, block: bytes, path: Path, position: int, final: bool = False) -> None:
    """Decode the block of a file that begins at `position`. Raises DataError if it is not UTF-8, with a guess."""
    pending = decoder.getstate()[0]
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError as error:
        block = pending + block
        text = block.decode("utf-8", errors="replace")
        foreign, bad = sum(letter > "\x7f" for letter in text), text.count("\ufffd")
        place = f"at byte {position - len(pending) + error.start:,}"
        if final:
            raise not_utf8(path, "it ends within a character, as if it were cut", "-c -f UTF-8 ") from error
        if count_controls(block) > len(block) / 100:
            raise DataError(f"{path} is not a text file: it has control characters: save its text as UTF-8") from error
        if foreign > 20 * bad:
            raise not_utf8(path, f"it is, but for some bytes, the first {place}", "-c -f UTF-8 ") from error
        if is_western(block):
            raise not_utf8(path, f"it seems to be Windows-1252 (Windows-1250 if it is Central European), first {place}",
                           "-f WINDOWS-1252 ") from error
        raise not_utf8(path, f"it has other bytes, the first {place}", "-f ITS_ENCODING ") from error


def is_western(block: bytes) -> bool:
    """Return whether bytes seem to be Windows-1252, of which Latin-1 is a part: mostly ASCII, and letters or quotes."""
    high = block.translate(None, bytes(range(128)))
    signs = "\u2018\u2019\u201c\u201d\u2013\u2014\u2026\u20ac\xab\xbb\xa0\xb0\xa7"  # quotes, dashes, euro and such
    try:
        letters = sum(letter.isalpha() or letter in signs for letter in high.decode("cp1252"))
    except UnicodeDecodeError:
        return False
    return len(high) < len(block) / 4 and letters > 0.8 * len(high)


def not_utf8(path: Path, what: str, flags: str) -> DataError:
    """Return the error for a text that is not UTF-8, with the command that converts it."""
    new = path.with_name(f"{path.stem}.utf8.txt")
    return DataError(f"{path} is not a UTF-8 text file, {what}: convert it with iconv {flags}-t UTF-8 "
                     f"{shlex.quote(str(path))} > {shlex.quote(str(new))}, and name that file")
