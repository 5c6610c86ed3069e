"""The texts that fineweb.py tokenizes: the rows of all files of a source, in order.

    read_texts(files, column, start, ...)      the rows as Texts, from a position on
"""
import sys
import threading
from typing import NamedTuple

import numpy as np

from plumbing.cli import UserError, explain
from plumbing.formats import Spot, Unreadable, read_rows
from plumbing.network import wait_or_give_up

PIECE_BYTES = 4 << 20  # text per piece, at most; a longer document is a piece of its own
NAMED = 10  # rows that were skipped and are named
REMEDY = "mend it, or leave out what cannot be read with --skip_bad_rows"


class Texts(NamedTuple):
    """Consecutive rows of one file."""

    file: int  # number of the file
    end: int  # the row after the last one
    rows: np.ndarray  # (documents,) row number of each text; rows with null are left out
    texts: object  # pyarrow.LargeStringArray, (documents,)
    bad: np.ndarray  # (rows,) row numbers of those that cannot be read and are skipped
    share: float | None = None  # of the file that has been read, if known


def read_texts(files: list[str], column: str, start: tuple[int, int], skip: bool, patience: tuple[int, str],
               stop: threading.Event):
    """Yield the rows of all files as Texts, beginning at `start` = (number of the file, row).

    After a network error it waits and reads on from the row it had reached; `patience` is (retries, remedy), and
    setting `stop` ends the wait. With `skip`, what cannot be read is left out, and the first NAMED places are named.
    Raises UserError if the network stays down or a file is not what its name says.
    """
    (first_file, first_row), named = start, 0
    for index in range(first_file, len(files)):
        name, row, failures, finished = files[index], first_row if index == first_file else 0, 0, False
        while not finished:
            try:
                for texts, reasons in read_file(name, index, row, column, skip):
                    for reason in reasons[:NAMED - named]:
                        named += 1
                        tell(f"skipped: {name}: {reason}" + (" (others are not named)" if named == NAMED else ""))
                    yield texts
                    row, failures = texts.end, 0
                finished = True
            except Unreadable as error:
                if not skip:
                    raise UserError(f"{name}: {error} ({REMEDY})") from error
                yield leave_rest(name, index, row, str(error))
                finished = True
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            except (MemoryError, ModuleNotFoundError):
                raise
            except Exception as error:  # from Arrow, the file system, or any layer of the hub's client
                if "://" in name:
                    failures += 1
                    wait_or_give_up(failures, patience[0], f"read {name}", error, patience[1], stop)
                elif skip and not isinstance(error, (FileNotFoundError, PermissionError)):
                    yield leave_rest(name, index, row, explain(error))
                    finished = True
                else:
                    raise UserError(f"{name} cannot be read: {explain(error)}: {REMEDY}") from error


def leave_rest(name: str, index: int, row: int, reason: str) -> Texts:
    """Return the rest of a file that cannot be read as one bad row, and say so."""
    import pyarrow as pa

    tell(f"skipped: {name} from row {row + 1} on, counted as one: {reason}")
    return Texts(index, row + 1, np.empty(0, np.int64), pa.array([], pa.large_string()), np.array([row]))


def tell(message: str) -> None:
    """Print a warning beside the progress bar."""
    print(f"\nwarning: {message}", file=sys.stderr, flush=True)


def read_file(name: str, index: int, first_row: int, column: str, skip: bool):
    """Yield (Texts of about PIECE_BYTES, what is wrong with its bad rows) for one file from `first_row` on.

    Raises UserError, after the rows before it, for the first bad row unless `skip`.
    """
    row, spot = 0, Spot()
    for batch, bad in read_rows(name, column, skip, spot):
        begin = max(0, first_row - row)  # skips what an earlier run has written
        wrong = sorted(i for i in bad if i >= begin)
        stop = len(batch) if skip or not wrong else wrong[0]
        count = max(1, len(batch) * PIECE_BYTES // max(1, batch.nbytes))
        for i in range(begin, stop, count):
            piece = batch[i:min(i + count, stop)]
            rows = row + i + np.flatnonzero(piece.is_valid())
            here = [k for k in wrong if i <= k < i + len(piece)] if wrong else []
            end = row + i + len(piece)
            texts = Texts(index, end, rows, as_strings(piece.drop_null()), row + np.array(here, np.int64),
                          spot.share(end))
            yield texts, list(dict.fromkeys(bad[k] for k in here))
        if stop < len(batch):
            raise UserError(f"{bad[stop]} (leave out such rows with --skip_bad_rows)")
        row += len(batch)


def as_strings(column):
    """Convert Arrow binary without nulls to large strings. Bytes that are not UTF-8 become U+FFFD, as in Python."""
    import pyarrow as pa

    try:
        texts = column.cast(pa.large_string())
        # drop the validity bitmap: a slice may still carry its parent's, and gigatoken panics on it
        return pa.Array.from_buffers(texts.type, len(texts), [None, *texts.buffers()[1:]], 0, texts.offset)
    except pa.ArrowInvalid:
        return pa.array([text.decode("utf-8", "replace") for text in column.to_pylist()], pa.large_string())
